"""M1-nano: its recipe, and the default model of the commands."""

import itertools
import re
import shutil
from pathlib import Path

import pytest

from m1jax import M1Config, UserError, nano
from m1jax.generate import main
from m1jax.nano import recipe
from m1jax.params import count
from m1jax.tasks import TASKS
from m1jax.tokenizer import Tokenizer
from tests.tools import DATA

SHIPPED = 16_000_000  # bytes that the package may gain


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("nano")
    recipe.train_tokenizer(folder, samples=1500)
    return Tokenizer.load(folder)


def test_the_architecture_is_m1s() -> None:
    config = recipe.config()
    assert config.layer_types == ("lightning",) * 7 + ("softmax",)
    assert config.num_local_experts >= 8 and config.num_experts_per_tok == 2
    assert config.postnorm and config.lightning_alpha == config.mlp_alpha == (2 * config.num_hidden_layers) ** 0.25
    assert 0 < config.rotary_dim == config.head_dim // 2 and not config.tie_word_embeddings
    assert 2 * count(config) < SHIPPED
    assert M1Config.from_dict(config.to_official()) == config
    assert recipe.config(periods=2).layer_types == config.layer_types * 2


def test_digits_and_quoted_letters_are_tokens_of_their_own(tokenizer: Tokenizer) -> None:
    assert tokenizer.size == recipe.VOCABULARY
    text = 'What is 2758 + 3? Reverse "window" and the window. ((True))'
    pieces = [tokenizer.decode([index]) for index in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert [piece for piece in pieces if re.search(r"\d", piece)] == list("27583")
    quoted = "".join(pieces).index('"window"') + 1
    starts = list(itertools.accumulate(map(len, pieces), initial=0))
    assert all(n in starts for n in range(quoted, quoted + 7))
    assert any("indow" in piece or "wi" in piece or "nd" in piece for piece in pieces)  # elsewhere words are merged
    assert [piece for piece in pieces if set(piece) & set("()")] == ["(", "(", ")", ")"]


def test_conversations_are_short_and_end(tokenizer: Tokenizer) -> None:
    chat = recipe.Chat.load()
    for task in TASKS.values():
        for problem in task.problems(5, seed=0):
            prompt, reply = chat.prompt(problem.question), problem.reply + recipe.END
            tokens = tokenizer.encode(prompt + reply)
            assert tokenizer.decode(tokens, keep=None) == prompt + reply
            assert tokens[-1] in tokenizer.eos_ids and len(tokens) <= 256
            assert tokenizer.encode(prompt) == tokens[: len(tokenizer.encode(prompt))]


def test_documents_are_training_problems_and_sentences() -> None:
    texts = list(itertools.islice(recipe.documents(seed=0), 400))
    assert texts == list(itertools.islice(recipe.documents(seed=0), 400))
    sentences = [text for text in texts if re.fullmatch(r"([A-Z][a-z ]+\.\s?)+", text)]
    assert 20 < len(sentences) < 90
    held_out = {p.question for task in TASKS.values() for p in task.problems(100, seed=1)}
    assert not held_out & {text.split("\n")[0] for text in texts}


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


def test_generate_without_a_model_takes_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nano, "FOLDER", tmp_path / "model")
    with pytest.raises(UserError, match=r"lacks config\.json, model\.safetensors, tokenizer\.json"):
        nano.default_model()
    assert run("--prompt", "What is 27 + 58?") == 2
    assert "comes without its nano model" in capsys.readouterr().err
    shutil.copytree(DATA / "m1_hello", tmp_path / "model")
    assert run("--prompt", "What is 27 + 58?", "--greedy") == 0
    assert capsys.readouterr().out.strip().endswith("</think>\n85")
