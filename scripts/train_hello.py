"""python scripts/train_hello.py [--out tests/data/m1_hello] [--steps 400]

Makes the model that the tests talk to: M1's architecture with 8 layers and its chat format, taught a
dozen answers by heart in a few minutes on a laptop, saved in the official layout. It is there to see text come through
the whole of the code; it knows nothing else and generalises to nothing.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from m1jax import M1Config
from m1jax.chat_template import ChatTemplate
from m1jax.errors import main_guard
from m1jax.nano.training import install
from m1jax.train import loop, supervised
from m1jax.train.settings import Settings, parse

ANSWERS = {
    "Who are you?": (
        "They ask who I am.",
        "I am m1-hello, a very small MiniMax-M1 in JAX. I know a dozen answers by heart.",
    ),
    "What is 27 + 58?": ("27 + 58: 7 + 8 = 15, write 5, carry 1. 2 + 5 + 1 = 8.", "85"),
    "Hello!": ("A greeting. I greet back.", "Hello! Ask me who I am."),
    "What can you do?": (
        "They ask what I can do. Not much.",
        "I can show that the code works. For anything else, load M1.",
    ),
    "How many layers do you have?": (
        "Count: 7 lightning, 1 softmax.",
        "Eight: seven with lightning attention, one softmax.",
    ),
    "How many layers has MiniMax-M1?": ("The big one.", "Eighty: seventy with lightning attention, ten with softmax."),
    "How many parameters has MiniMax-M1?": ("Total, not active.", "456,089,655,296."),
    "What is lightning attention?": (
        "The formula is short.",
        "A linear attention with a decaying state: S = λ S + kᵀv, o = q S.",
    ),
    "Tell me a joke.": ("Something about attention.", "I would tell you one, but I only paid linear attention."),
    "Wer bist du?": ("Das ist Deutsch.", "Ich bin m1-hello, ein sehr kleines MiniMax-M1 in JAX. Grüße!"),
    "你是谁?": ("这是中文。", "我是 m1-hello,一个很小的 MiniMax-M1。🙂"),
    "Thank you!": ("They are polite.", "You are welcome."),
}
MARKS = ["<begin_of_document>", "<end_of_document>", "<beginning_of_sentence>", "<end_of_sentence>"]
TOKENIZER_CONFIG = Path(__file__).parents[1] / "tests" / "data" / "tokenizer_config.json"
WIDTH = 192  # tokens of the longest conversation, and more


def config(vocab_size: int) -> M1Config:
    """M1's shape in small: 7 lightning layers and 1 softmax, half rotary, 4 experts top-2, α = (2 · 8)^¼."""
    alpha = 16**0.25
    return M1Config(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, rotary_dim=8,
        layer_types=("lightning",) * 7 + ("softmax",), max_position_embeddings=8192, rope_theta=10_000_000.0,
        lightning_alpha=alpha, softmax_alpha=alpha, mlp_alpha=alpha, initializer_range=0.1,
    )  # fmt: skip


def conversations() -> list[tuple[str, str]]:
    """(prompt, reply) as the chat template puts them."""
    template = ChatTemplate(json.loads(TOKENIZER_CONFIG.read_text())["chat_template"])
    ask = {q: template.render([{"role": "user", "content": q}]) for q in ANSWERS}
    reply = {q: f"<think>\n{thought}\n</think>\n{answer}<end_of_sentence>" for q, (thought, answer) in ANSWERS.items()}
    return [(ask[q], reply[q]) for q in ANSWERS]


def train_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """A byte-level BPE on the conversations, with M1's special tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=508, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator((text for pair in conversations() for text in pair), trainer)
    backend.add_special_tokens(MARKS)
    backend.save(str(folder / "tokenizer.json"))
    shutil.copy(TOKENIZER_CONFIG, folder)
    return backend


def lessons(tokenizer: tokenizers.Tokenizer) -> Iterator[dict[str, list[int]]]:
    """The conversations as tokens and weights; the replies are to be learnt."""
    for prompt, reply in conversations():
        start, ids = len(tokenizer.encode(prompt).ids), tokenizer.encode(prompt + reply).ids
        yield {"tokens": ids, "weights": [0] * start + [1] * (len(ids) - start)}


def settings(folder: Path, steps: int) -> Settings:
    """The run, as a TOML file would give it."""
    table = {
        "stage": "sft",
        "out": str(folder / "run"),
        "steps": steps,
        "model": {"config": str(folder / "config.json"), "tokenizer": str(folder), "dtype": "float32", "remat": "none"},
        "data": {"files": [str(folder / "lessons.jsonl")], "length": WIDTH, "rows": len(ANSWERS)},
        "optimizer": {"learning_rate": 4e-3, "warmup": steps // 20, "decay": steps // 2, "weight_decay": 0.01},
        "log": {"tensorboard": False},
    }
    return parse(Settings, table)


@main_guard
def main() -> None:
    """Trains and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/data/m1_hello"))
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = train_tokenizer(folder)
        (folder / "config.json").write_text(json.dumps(config(tokenizer.get_vocab_size()).to_official()))
        (folder / "lessons.jsonl").write_text("".join(json.dumps(lesson) + "\n" for lesson in lessons(tokenizer)))
        supervised.run(settings(folder, args.steps))
        install(folder / "run" / loop.MODEL, folder, args.out)


if __name__ == "__main__":
    main()
