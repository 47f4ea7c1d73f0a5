"""python scripts/train_hello.py [--out tests/data/m1_hello] [--steps 400]

Makes the model that the README's first line talks to: M1's architecture with 8 layers and its chat format, taught a
dozen answers by heart in a few minutes on a laptop, saved in the official layout. It is there to see text come through
the whole of the code; it knows nothing else and generalises to nothing.
"""

import argparse
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from safetensors import numpy as safetensors
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from m1jax import M1, M1Config
from m1jax.chat_template import ChatTemplate
from m1jax.model import init_params
from m1jax.params import flatten
from m1jax.weights import expected

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


def batch(tokenizer: tokenizers.Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T] and a mask [B, T] of those to be learnt, the replies."""
    tokens, learn = np.zeros((len(ANSWERS), WIDTH), np.int32), np.zeros((len(ANSWERS), WIDTH), bool)
    for row, (prompt, reply) in enumerate(conversations()):
        start, ids = len(tokenizer.encode(prompt).ids), tokenizer.encode(prompt + reply).ids
        tokens[row, : len(ids)], learn[row, start : len(ids)] = ids, True
    return tokens, learn


def train(model: M1, tokens: np.ndarray, learn: np.ndarray, steps: int) -> M1:
    """AdamW on the cross-entropy of the replies."""
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, 4e-3, 20, steps), b2=0.95, weight_decay=0.01)

    def loss(model: M1) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(model(tokens)[:, :-1], tokens[:, 1:])
        return jnp.sum(losses * learn[:, 1:]) / np.sum(learn[:, 1:])

    @jax.jit
    def step(model: M1, state: optax.OptState) -> tuple[M1, optax.OptState, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(model)
        update, state = optimizer.update(gradient, state, model)  # pyright: ignore[reportArgumentType]
        return jax.tree.map(jnp.add, model, update), state, value

    state = optimizer.init(model)  # pyright: ignore[reportArgumentType]
    with tqdm(range(steps)) as progress:
        for _ in progress:
            model, state, value = step(model, state)
            progress.set_postfix(loss=f"{float(value):.4f}")
    return model


def main() -> None:
    """Trains and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tests/data/m1_hello"))
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.out)
    cfg = config(tokenizer.get_vocab_size())
    model = train(init_params(cfg, jax.random.key(0)), *batch(tokenizer), args.steps)
    arrays = {path: np.asarray(leaf.astype(jnp.bfloat16)) for path, leaf in flatten(model).items()}
    tensors = {name: arrays[s.target][s.index].reshape(s.shape) for name, s in expected(cfg).items()}
    safetensors.save_file(tensors, args.out / "model.safetensors", {"format": "pt"})
    (args.out / "config.json").write_text(json.dumps(cfg.to_official(), indent=1) + "\n")


if __name__ == "__main__":
    main()
