"""M1-nano: its recipe, and the default model of the commands."""

import dataclasses
import itertools
import json
import random
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

from m1jax import M1Config, UserError, load, nano
from m1jax.convert import convert
from m1jax.generate import main
from m1jax.nano import recipe, training
from m1jax.params import count, flatten
from m1jax.rl.settings import RLSettings
from m1jax.tasks import TASKS
from m1jax.tokenizer import Tokenizer
from m1jax.train.data import chat_tokens
from m1jax.train.settings import parse
from tests.tools import DATA

LISTS = re.compile(r'(?P<listed>(List: "[a-z\d,]+"\. ?)+)Again:\n(?P<again>([a-z]\d)+)')
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


def test_what_ships_has_the_recipes_shape() -> None:
    """But for the vocabulary, which an earlier form of the recipe filled; config and tokenizer agree in it."""
    shipped = M1Config.from_file(nano.FOLDER)
    assert dataclasses.replace(recipe.config(), vocab_size=shipped.vocab_size) == shipped
    assert Tokenizer.load(nano.FOLDER).size == shipped.vocab_size == 704 != recipe.VOCABULARY


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


def test_the_data_of_every_stage(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plan = training.scaled(training.PLANS["cpu"], 1e-3) | {"rows": 1}
    shutil.copytree(tokenizer.folder, tmp_path / "tokenizer")
    (tmp_path / "config.json").write_text("kept")
    training.prepare(tmp_path, plan, ["addition", "logic"])
    assert (tmp_path / "config.json").read_text() == "kept"
    lines = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    documents = [json.loads(line) for line in (tmp_path / "pretrain.jsonl").read_text().splitlines()]
    assert len(documents) == 1000 + 1000 // 6 and len(lines) == 1000 + 1000 // 2
    for line in (*lines[2:72:6], *documents[6:84:7]):  # lists to recall
        found = LISTS.fullmatch(tokenizer.decode(line["tokens"], keep=None))
        assert found is not None
        learnt = [token for token, weight in zip(line["tokens"], line["weights"], strict=True) if weight]
        assert tokenizer.decode(learnt) == found["again"][1::2]
        assert set(line["weights"]) == {0, training.FOUND}
        pairs = re.findall(r"[a-z]\d", found["again"])
        items = re.findall(r"[a-z]\d", found["listed"])
        assert set(pairs) <= set(items) and all(len([i for i in items if i[0] == pair[0]]) == 1 for pair in pairs)
        lengths = [len(text.split(",")) for text in found["listed"].split('"')[1::2]]
        assert max(lengths) <= TASKS["retrieval"].difficulty + 1 and len(lengths) <= 8
    for line in (line for n, line in enumerate(lines[:50], 1) if n % 6 != 3):
        learnt = [token for token, weight in zip(line["tokens"], line["weights"], strict=True) if weight]
        text, reply = tokenizer.decode(line["tokens"], keep=None), tokenizer.decode(learnt, keep=None)
        assert text.endswith(reply) and text.count(recipe.END) == 2
        assert reply.startswith("<think>\n") and reply.endswith(recipe.END)
        chat = [{"role": "user", "content": text.split("name=user\n")[1].split(recipe.END)[0]}]
        chat.append({"role": "assistant", "content": reply.removesuffix(recipe.END)})
        tokens, weights = chat_tokens(tokenizer, chat)  # what the trainer makes of the messages
        last = len(line["tokens"])
        assert tokens[:last].tolist() == line["tokens"] and weights[:last].tolist() == line["weights"]
        assert not weights[last:].any()
    assert all("text" in line for n, line in enumerate(documents, 1) if n % 7)
    mixed: list[tuple[training.Stage, int, int]] = [("recall", 3, 12), ("review", 40, 45)]
    for stage, taught, every in mixed:
        rows = [json.loads(line)["tokens"] for line in (tmp_path / f"{stage}.jsonl").read_text().splitlines()]
        texts = [tokenizer.decode(row, keep=None) for row in rows]
        assert len(texts) == 1000
        lists = [n for n, text in enumerate(texts) if LISTS.fullmatch(text)]
        assert lists == [n for n in range(1000) if taught <= n % every < every - 1]
        asked = texts[every - 1 :: every]
        assert all(len(text.split(",")) > 3 and text.count(recipe.END) == 2 for text in asked)
        assert all(len(text.split(",")) <= 3 for text in texts[::every])  # of addition and logic


def test_long_lists_fill_a_row(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    lengths = []
    for row in itertools.islice(training.reminders(3, tokenizer, recipe.long_recall, 1), 100):
        found = LISTS.fullmatch(tokenizer.decode(row["tokens"], keep=None))
        assert found is not None and found["listed"].count("List") == 1
        items, pairs = (re.findall(r"[a-z]\d", found[name]) for name in ("listed", "again"))
        lengths.append(len(items))
        assert len(row["tokens"]) <= training.LENGTH and sum(row["weights"]) == len(pairs) >= min(24, len(items))
        assert all([i for i in items if i[0] == pair[0]] == [pair] for pair in pairs)
    assert min(lengths) >= 20 and 130 < max(lengths) <= recipe.LONGEST
    questions = [recipe.far(rng) for _ in range(100)]
    assert 130 < max(len(p.question.split(",")) for p in questions) <= recipe.LONGEST + 1  # one phrasing has a comma
    assert all(len(row["tokens"]) <= training.LENGTH for row in training.conversations(questions, tokenizer))


def test_scattered_lists_are_retrievals_from_lists_no_longer_than_the_tasks() -> None:
    rng = random.Random(0)
    for problem in (recipe.scattered(rng) for _ in range(50)):
        texts = re.findall(r'"([a-z\d,]+)"', problem.question)
        *lists, letter = sorted(texts, key=len, reverse=True)
        assert 2 <= len(lists) <= 8 and all(8 <= len(text.split(",")) <= 16 for text in lists)
        assert [i for text in lists for i in text.split(",") if i[0] == letter] == [problem.thought]
        assert problem.thought == letter + problem.answer


def test_runs_made_otherwise_are_not_gone_on_with(tmp_path: Path) -> None:
    for _ in range(2):
        training.claim(tmp_path / "out", {"machine": "cpu", "scale": 0.1})
    with pytest.raises(UserError, match=r"out was made with scale 0.1, not 1.0: choose another --out"):
        training.claim(tmp_path / "out", {"machine": "cpu", "scale": 1.0})


@pytest.mark.parametrize("machine", list(training.PLANS))
def test_settings_of_every_stage(machine: str) -> None:
    for stage in training.STAGES:
        found = training.settings(stage, Path("out"), training.PLANS[machine], ["all"])
        assert found.stage == {"recall": "sft", "review": "sft"}.get(stage, stage)
        assert found.steps == training.PLANS[machine]["steps"][stage]
        assert bool(found.optimizer.rates) == (stage == "recall")
        if stage == "rl":
            assert parse(RLSettings, found.rl, "rl.").loss == "cispo" and found.optimizer.eps == 1e-15
            assert found.rl["tasks"] == ["subtraction", "multiplication", "sorting", "sequence"]
    for tasks, own in ((["sorting", "addition"], ["sorting"]), (["addition"], ["addition"])):
        assert training.settings("rl", Path("out"), training.PLANS[machine], tasks).rl["tasks"] == own


def test_the_model_ships_in_bfloat16(tmp_path: Path) -> None:
    training.install(DATA / "m1_hello", DATA / "m1_hello", tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    ours, theirs = flatten(load(tmp_path)), flatten(load(DATA / "m1_hello"))
    assert size < 2.1 * sum(x.size for x in theirs.values())
    for path, x in theirs.items():
        exact = x if path == "moe.router" else x.astype("bfloat16").astype("float32")
        assert (ours[path] == exact).all(), path
    assert Tokenizer.load(tmp_path).size == Tokenizer.load(DATA / "m1_hello").size


def test_the_comparison_counts_steps_to_dapo(tmp_path: Path) -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "compare_policy_losses.py"))
    curves = {
        "cispo": np.asarray([[0.5, 0.8, 0.9], [0.5, 0.7, 0.9]]),
        "dapo": np.asarray([[0.4, 0.6, 0.7], [0.5, 0.6, 0.8]]),
        "grpo": np.asarray([[0.4, 0.5, 0.6], [0.4, 0.5, 0.6]]),
    }
    (tmp_path / "metrics.jsonl").write_text('{"outside": 0.001}\n{"updates": 0}\n{"outside": 0.002}\n')
    clipped = {"cispo": 0.0, "dapo": script["outside"](tmp_path), "grpo": 0.01}
    lines = script["table"]([5, 10, 15], curves, clipped).splitlines()
    assert lines[2] == "| CISPO | 90.0% (90.0% to 90.0%) | 10 | 0.0000% |"
    assert lines[3] == "| DAPO | 75.0% (70.0% to 80.0%) | 15 | 0.1500% |"
    assert lines[4] == "| GRPO | 60.0% (60.0% to 60.0%) | not reached | 1.0000% |"
    script["draw"]([5, 10, 15], curves, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").stat().st_size > 10_000


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


def test_the_shipped_model_is_right_converted_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(nano.FOLDER, tmp_path / "m")
    capsys.readouterr()
    for model in ([], ["--model", str(tmp_path / "m")]):
        assert run(*model, "--prompt", "What is 27 + 58?", "--greedy") == 0
        assert capsys.readouterr().out == "<think>\n7+8+0=15\n2+5+1=08\n</think>\n85\n"
    assert sum(file.stat().st_size for file in nano.FOLDER.iterdir()) < 16e6
