"""What M1-nano is made of: its shape, its tokenizer, and the texts of its pretraining and fine-tuning.

Everything is synthesized: the tasks of `m1jax.tasks` in M1's chat format, the same as plain text, and simple sentences.
"""

import dataclasses
import json
import random
import shutil
import string
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from m1jax.chat_template import ChatTemplate
from m1jax.config import M1Config
from m1jax.model import M1, build, init_params
from m1jax.params import flatten
from m1jax.tasks import Problem, Task, find, mixture
from m1jax.tasks.retrieval import RETRIEVAL

TOKENIZER_CONFIG = Path(__file__).parent / "tokenizer_config.json"  # M1's own, with its chat template
MARKS = ("<begin_of_document>", "<end_of_document>", "<beginning_of_sentence>", "<end_of_sentence>")
VOCABULARY = 600  # what these texts fill
END = "<end_of_sentence>"
SHORT = 16  # items at most of a list while nothing but lists is learnt
# Difficulty of the worked solutions where it is not the shipped one, which RL gets to by reward alone.
TAUGHT = {"cipher": 6}
LONGEST = 150  # items of a list in training; with the letters asked for a row of 512 tokens holds no more

# Letters inside quotes are tokens of their own, as digits are: a letter is only known apart from its neighbours.
_QUOTED_LETTER = r'(?:(?<=")|(?!\A)\G)[a-z]'


def config(hidden: int = 128, experts: int = 8, width: int = 128, periods: int = 1) -> M1Config:
    """M1's architecture in small: periods of 7 lightning layers and a softmax one, half rotary, α = β = (2 L)^¼.

    β is as large as α: where what a layer adds weighs less, softmax attention hardly begins to find anything.
    """
    layers = 8 * periods
    alpha = (2 * layers) ** 0.25
    return M1Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        head_dim=32,
        num_local_experts=experts,
        num_experts_per_tok=2,
        rotary_dim=16,
        layer_types=(("lightning",) * 7 + ("softmax",)) * periods,
        max_position_embeddings=32768,
        lightning_alpha=alpha,
        lightning_beta=alpha,
        softmax_alpha=alpha,
        softmax_beta=alpha,
        mlp_alpha=alpha,
        mlp_beta=alpha,
        initializer_range=0.1,
    )


def first_weights(config: M1Config, seed: int = 0) -> M1:
    """Random weights, but in two places, without which softmax attention does not come to find letters in lists.

    What lightning attention and experts add to a token begins small, by 1/√(2 L) as in GPT-2, so that the last layer
    sees the tokens themselves. And queries begin equal to keys, so that a token looks for its like (mimetic
    initialisation, arXiv 2305.09828).
    """
    weights = flatten(init_params(config, jax.random.key(seed)))
    for name in ("lightning.out_proj", "moe.down"):
        weights[name] *= (2 * config.num_hidden_layers) ** -0.5
    groups = config.num_attention_heads // config.num_key_value_heads
    weights["softmax.q_proj"] = jnp.repeat(weights["softmax.k_proj"], groups, axis=1)
    return build(config, lambda path, _: weights[path])


@dataclasses.dataclass(frozen=True)
class Chat:
    """Problems as conversations in M1's format."""

    template: ChatTemplate

    @classmethod
    def load(cls) -> "Chat":
        """With the template that nano's tokenizer has."""
        return cls(ChatTemplate(json.loads(TOKENIZER_CONFIG.read_text(encoding="utf-8"))["chat_template"]))

    def prompt(self, question: str) -> str:
        """The question up to where the model's turn begins."""
        return self.template.render([{"role": "user", "content": question}])

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """The conversation to be learnt."""
        return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.reply}]


def plain(problem: Problem) -> str:
    """A problem as a document for pretraining."""
    return f"{problem.question}\n{problem.thought}\n{problem.answer}"


_PEOPLE = ("the boy", "the girl", "my friend", "the teacher", "a farmer", "the old man", "our neighbour", "the king")
_THINGS = ("a book", "the door", "an apple", "the window", "a small boat", "two stones", "the letter", "some bread")
_DEEDS = ("sees", "wants", "finds", "takes", "brings", "likes", "forgets", "gives away")
_PLACES = ("in the house", "by the river", "at school", "on the hill", "near the sea", "under the tree")
_TIMES = ("today", "in the morning", "at night", "every week", "after the rain", "before dinner")


def sentence(rng: random.Random) -> str:
    """A simple sentence: who does what, sometimes where and when."""
    parts = [rng.choice(_PEOPLE), rng.choice(_DEEDS), rng.choice(_THINGS)]
    parts += [rng.choice(choices) for choices in (_PLACES, _TIMES) if rng.random() < 0.5]
    text = " ".join(parts)
    return text[0].upper() + text[1:] + "."


def evenly(rng: random.Random, longest: int = LONGEST) -> int:
    """Items of a list of at most `longest`, short ones as frequent as long ones."""
    return round(longest ** rng.random())


def long(rng: random.Random) -> int:
    """Items of a list that is longer than those of the task itself."""
    return rng.randint(SHORT, LONGEST)


def recall(rng: random.Random, items: int) -> list[str]:
    """A list of numbered letters, then some that occur but once, each followed by its number: every second part."""
    count = rng.randint(1, min(25, items))
    alphabet = rng.sample(string.ascii_lowercase, 26)
    letters = alphabet[:count] + rng.choices(alphabet[count:], k=items - count)
    rng.shuffle(letters)
    numbers = [str(rng.randrange(10)) for _ in letters]
    listed = ",".join(map("".join, zip(numbers, letters, strict=True)))
    number = dict(zip(letters, numbers, strict=True))
    return [f'List: "{listed}". Again:\n', *(part for letter in alphabet[:count] for part in (letter, number[letter]))]


def taught(tasks: Sequence[Task]) -> list[Task]:
    """The tasks at the difficulty of pretraining and SFT."""
    return [dataclasses.replace(task, difficulty=TAUGHT.get(task.name, task.difficulty)) for task in tasks]


def far(rng: random.Random) -> Problem:
    """Retrieval from a long list."""
    return RETRIEVAL.problem(rng, long(rng) - 1)


def documents(seed: int, tasks: Sequence[Task]) -> Iterator[str]:
    """Pretraining documents without end: problems as plain text, and a few simple sentences."""
    rng, problems = random.Random(f"documents {seed}"), mixture(taught(tasks), seed)
    while True:
        few = rng.random() < 1 / 8
        yield " ".join(sentence(rng) for _ in range(rng.randint(1, 4))) if few else plain(next(problems))


def train_tokenizer(folder: Path, samples: int = 4000) -> tokenizers.Tokenizer:
    """Writes nano's byte-level BPE to `folder`: single digits, M1's special tokens and chat template."""
    chat = Chat.load()
    tasks = find(["all"])
    problems = islice(mixture(taught(tasks), seed=0), samples)
    texts = [chat.prompt(p.question) + p.reply for p in problems] + list(islice(documents(0, tasks), samples))
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QUOTED_LETTER), "isolated"),
            pre_tokenizers.Split(Regex("[()]"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKS), initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    for mark in MARKS:
        texts = [text.replace(mark, "\n") for text in texts]
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(list(MARKS))
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    shutil.copy(TOKENIZER_CONFIG, folder / "tokenizer_config.json")
    return backend
