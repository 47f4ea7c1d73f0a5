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

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from m1jax.chat_template import ChatTemplate
from m1jax.config import M1Config
from m1jax.tasks import TASKS, Problem, Task, mixture
from m1jax.tasks.retrieval import RETRIEVAL

TOKENIZER_CONFIG = Path(__file__).parent / "tokenizer_config.json"  # M1's own, with its chat template
MARKS = ("<begin_of_document>", "<end_of_document>", "<beginning_of_sentence>", "<end_of_sentence>")
VOCABULARY = 600  # what these texts fill; the model that ships has 704 tokens, from earlier texts
END = "<end_of_sentence>"
LONGEST = 150  # items of a list in training; with the letters asked for a row of 512 tokens holds no more

# Letters inside quotes are tokens of their own, as digits are: a letter is only known apart from its neighbours.
_QUOTED_LETTER = r'(?:(?<=")|(?!\A)\G)[a-z]'


def config(hidden: int = 128, experts: int = 8, width: int = 128, periods: int = 1) -> M1Config:
    """M1's architecture in small: periods of 7 lightning layers and a softmax one, half rotary, α = (2 L)^¼."""
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
        softmax_alpha=alpha,
        mlp_alpha=alpha,
        initializer_range=0.05,
    )


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


def recall(rng: random.Random) -> list[str]:
    """Lists of numbered letters, then some that occur but once, each followed by its number: every second part.

    Half of the time one list, short ones as frequent as long ones: finding a letter again is learnt from few, then from
    more. Else several.
    """
    return _again(*_lists(rng, _several(rng) if rng.random() < 0.5 else [round(16 ** rng.random())], 12))


def long_recall(rng: random.Random) -> list[str]:
    """A list of up to `LONGEST` numbered letters, then nearly all letters there are, as in `recall`."""
    return _again(*_lists(rng, [rng.randint(20, LONGEST)], 25, 24))


def far(rng: random.Random) -> Problem:
    """Retrieval from a list of up to `LONGEST` items."""
    return RETRIEVAL.problem(rng, rng.randint(4, LONGEST) - 1)


def scattered(rng: random.Random) -> Problem:
    """Retrieval from several lists at once."""
    lists, [(letter, number)] = _lists(rng, _several(rng), 1)
    question = rng.choice(RETRIEVAL.phrasings).format(items='", "'.join(lists), letter=letter)
    return Problem(RETRIEVAL.name, question, letter + number, number, question)


def _several(rng: random.Random) -> list[int]:
    """Lengths of lists, none longer than retrieval's own: a letter is to be found from afar and among many."""
    return [rng.randint(8, RETRIEVAL.difficulty + 1) for _ in range(rng.randint(2, 8))]


def _again(lists: list[str], once: list[tuple[str, str]]) -> list[str]:
    shown = " ".join(f'List: "{items}".' for items in lists)
    return [f"{shown} Again:\n", *(part for letter, number in once for part in (letter, number))]


def _lists(
    rng: random.Random, lengths: list[int], most: int, least: int = 1
) -> tuple[list[str], list[tuple[str, str]]]:
    """Lists of numbered letters, and from `least` to `most` that occur once in all of them, with their numbers."""
    items = sum(lengths)
    count = rng.randint(min(least, items), min(most, items))
    alphabet = rng.sample(string.ascii_lowercase, 26)
    letters = alphabet[:count] + rng.choices(alphabet[count:], k=items - count)
    rng.shuffle(letters)
    numbered = [(letter, str(rng.randrange(10))) for letter in letters]
    numbers, rest = dict(numbered), iter(map("".join, numbered))
    lists = [",".join(islice(rest, length)) for length in lengths]
    return lists, [(letter, numbers[letter]) for letter in rng.sample(alphabet[:count], count)]


def documents(seed: int, tasks: Sequence[Task] = tuple(TASKS.values())) -> Iterator[str]:
    """Pretraining documents without end: problems as plain text, and a few simple sentences."""
    rng, problems = random.Random(f"documents {seed}"), mixture(tasks, seed)
    while True:
        few = rng.random() < 1 / 8
        yield " ".join(sentence(rng) for _ in range(rng.randint(1, 4))) if few else plain(next(problems))


def train_tokenizer(folder: Path, samples: int = 4000) -> tokenizers.Tokenizer:
    """Writes nano's byte-level BPE to `folder`: single digits, M1's special tokens and chat template."""
    chat = Chat.load()
    problems = islice(mixture(list(TASKS.values()), seed=0), samples)
    texts = [chat.prompt(p.question) + p.reply for p in problems] + list(islice(documents(0), samples))
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
