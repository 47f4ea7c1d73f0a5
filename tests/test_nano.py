"""M1-nano: its recipe, and the default model of the commands."""

import itertools
import json
import random
import re
import runpy
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from m1jax import M1Config, UserError, load, nano
from m1jax.converting import convert
from m1jax.evaluate import open_local
from m1jax.generate import main
from m1jax.model import build, init_params
from m1jax.nano import recipe, training
from m1jax.params import count, flatten
from m1jax.rl.settings import RLSettings
from m1jax.saving import save
from m1jax.tasks import TASKS, find, verify
from m1jax.tokenizer import Tokenizer
from m1jax.train.encoder import chat_tokens
from m1jax.train.settings import parse
from tests.tools import DATA

LIST = re.compile(r'List: "(?P<items>\d[a-z](,\d[a-z])*)"\. Again:\n(?P<again>([a-z]\d)+)')
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
    assert config.lightning_beta == config.softmax_beta == config.mlp_beta == config.lightning_alpha
    assert 0 < config.rotary_dim == config.head_dim // 2 and not config.tie_word_embeddings
    assert 2 * count(config) < SHIPPED
    assert M1Config.from_dict(config.to_official()) == config
    assert recipe.config(periods=2).layer_types == config.layer_types * 2


def test_what_ships_is_what_the_recipe_makes(tmp_path: Path) -> None:
    assert M1Config.from_file(nano.FOLDER) == recipe.config()
    assert Tokenizer.load(nano.FOLDER).size == recipe.VOCABULARY
    recipe.train_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (nano.FOLDER / name).read_bytes() == (tmp_path / name).read_bytes(), name
    results = json.loads((Path(__file__).parents[1] / "scripts" / "results" / "nano.json").read_text())
    assert tuple(results) == training.STEPS
    steps = {step: found["steps"] for step, found in results.items() if "steps" in found}
    assert steps == training.PLANS["cpu"]["steps"]


def test_the_first_queries_are_the_keys_and_layers_add_little() -> None:
    config = recipe.config(hidden=64)
    random_, ours = flatten(init_params(config, jax.random.key(3))), flatten(recipe.first_weights(config, 3))
    changed = {"softmax.q_proj", "lightning.out_proj", "moe.down"}
    assert {path for path, x in random_.items() if (x != ours[path]).any()} == changed
    for head in range(config.num_attention_heads):
        key = head // (config.num_attention_heads // config.num_key_value_heads)
        assert (ours["softmax.q_proj"][:, head] == ours["softmax.k_proj"][:, key]).all()
    for path in ("lightning.out_proj", "moe.down"):
        np.testing.assert_allclose(ours[path], random_[path] / 4, rtol=1e-6)


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
    for task in find(["all"]):
        for problem in task.problems(5, seed=0):
            prompt, reply = chat.prompt(problem.question), problem.reply + recipe.END
            tokens = tokenizer.encode(prompt + reply)
            assert tokenizer.decode(tokens, keep=None) == prompt + reply
            assert tokens[-1] in tokenizer.eos_ids and len(tokens) <= 256
            assert tokenizer.encode(prompt) == tokens[: len(tokenizer.encode(prompt))]


def test_documents_are_training_problems_and_sentences() -> None:
    tasks = find(["all"])
    texts = list(itertools.islice(recipe.documents(0, tasks), 400))
    assert texts == list(itertools.islice(recipe.documents(0, tasks), 400))
    sentences = [text for text in texts if re.fullmatch(r"([A-Z][a-z ]+\.\s?)+", text)]
    assert 20 < len(sentences) < 90
    held_out = {p.question for task in tasks for p in task.problems(100, seed=1)}
    assert not held_out & {text.split("\n")[0] for text in texts}


def test_the_data_of_every_stage(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plan = training.scaled(training.PLANS["cpu"], 1e-3) | {"rows": 1}
    shutil.copytree(tokenizer.folder, tmp_path / "tokenizer")
    (tmp_path / "start").mkdir()
    training.prepare(tmp_path, plan, ["addition", "logic"])
    assert not list((tmp_path / "start").iterdir())
    lines = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    documents = [json.loads(line) for line in (tmp_path / "pretrain.jsonl").read_text().splitlines()]
    assert len(documents) == 1000 + 1000 // 6 and len(lines) == 1000 + 1000 // 6
    short = [json.loads(line) for line in (tmp_path / "recall.jsonl").read_text().splitlines()]
    assert len(short) == 1000
    for line in (*short[:50], *lines[6:600:14], *documents[6:600:7]):  # lists to recall
        found = LIST.fullmatch(tokenizer.decode(line["tokens"], keep=None))
        assert found is not None
        assert len(found["items"].split(",")) <= (recipe.SHORT if line in short else recipe.LONGEST)
        learnt = [token for token, weight in zip(line["tokens"], line["weights"], strict=True) if weight]
        assert tokenizer.decode(learnt) == found["again"][1::2] and set(line["weights"]) == {0, training.FOUND}
    for line in lines[13:600:14]:  # retrievals
        assert tokenizer.decode(line["tokens"], keep=None).count(recipe.END) == 2
    for line in (line for n, line in enumerate(lines[:50], 1) if n % 14 != 7):
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


def test_lists_of_every_length_fit_a_row(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    lengths = []
    for row in itertools.islice(training.reminders(3, tokenizer, recipe.evenly), 300):
        found = LIST.fullmatch(tokenizer.decode(row["tokens"], keep=None))
        assert found is not None
        items, pairs = found["items"].split(","), re.findall(r"[a-z]\d", found["again"])
        lengths.append(len(items))
        assert len(row["tokens"]) <= training.LENGTH and sum(row["weights"]) == training.FOUND * len(pairs)
        assert len(pairs) <= min(25, len(items))
        assert all([i for i in items if i[1] == letter] == [number + letter] for letter, number in pairs)
        assert len({letter for letter, _ in pairs}) == len(pairs)
    assert min(lengths) == 1 and 140 < max(lengths) <= recipe.LONGEST and 10 < np.median(lengths) < 16
    questions = [recipe.far(rng) for _ in range(200)]
    lengths = [len(re.findall(r"\d[a-z]", p.question)) for p in questions]
    assert recipe.SHORT <= min(lengths) < 30 and 130 < max(lengths) <= recipe.LONGEST
    assert all(len(row["tokens"]) <= training.LENGTH for row in training.conversations(questions, tokenizer))


def test_runs_made_otherwise_are_not_gone_on_with(tmp_path: Path) -> None:
    for _ in range(2):
        training.claim(tmp_path / "out", {"machine": "cpu", "scale": 0.1})
    with pytest.raises(UserError, match=r"out was made with scale 0.1, not 1.0: choose another --out"):
        training.claim(tmp_path / "out", {"machine": "cpu", "scale": 1.0})


@pytest.mark.parametrize("machine", list(training.PLANS))
def test_settings_of_every_stage(machine: str) -> None:
    for stage in training.STAGES:
        found = training.settings(stage, Path("out"), training.PLANS[machine], ["all"])
        own = training.REINFORCED.get(stage)
        assert found.stage == ("rl" if own else "sft" if stage == "recall" else stage)
        assert found.steps == training.PLANS[machine]["steps"][stage]
        before = {"recall": "start", "pretrain": "recall/model", "sft": "pretrain/model", "longer": "sharpened"}
        assert found.model.path == f"out/{before.get(stage, 'longer/model')}"
        if own:
            rl = parse(RLSettings, found.rl, "rl.")
            assert rl.loss == "cispo" and rl.temperature == own["temperature"] and found.optimizer.eps == 1e-15
            assert set(rl.tasks) == set(own["tasks"])
    for tasks, left in ((["sorting", "addition"], ["sorting"]), (["addition"], ["addition"])):
        assert training.settings("surer", Path("out"), training.PLANS[machine], tasks).rl["tasks"] == left


def test_another_recipe_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = training.PLANS["cpu"]
    found = [training.fingerprint(plan), training.fingerprint(training.scaled(plan, 0.5))]
    monkeypatch.setitem(training.OFTEN, "sorting", 1)
    assert len({*found, training.fingerprint(plan)}) == 3


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("train_nano", "--machine cpu --problems 0", "must be 1 or more"),
        ("train_nano", "--machine cpu --scale nan", "must be 1 or more"),
        ("train_nano", "--machine cpu --steps sfd=40", "'sfd=40' is not STAGE=N"),
        ("train_nano", "--machine cpu --steps sft=1", "4 steps or more"),
        ("compare_policy_losses", "--model none --every 0", "must be 1 or more"),
        ("compare_policy_losses", "--model none --seeds 0", "must be 1 or more"),
    ],
)
def test_bad_flags_are_found_before_the_work(
    script: str,
    flags: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["script", *flags.split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(__file__).parents[1] / "scripts" / f"{script}.py"), run_name="__main__")
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rl_goes_further_than_worked_solutions() -> None:
    for task in recipe.taught(find(["all"])):
        shipped = TASKS[task.name].difficulty
        assert task.difficulty == recipe.TAUGHT.get(task.name, shipped)
        assert (task.difficulty < shipped) == (task.name in training.REINFORCED["longer"]["tasks"])


def test_rl_begins_with_sharper_queries(tmp_path: Path) -> None:
    shutil.copytree(DATA / "m1_hello", tmp_path / "sft" / "model")
    shutil.copytree(DATA / "m1_hello", tmp_path / "tokenizer")
    training.change("sharpened", tmp_path)
    before, after = flatten(load(tmp_path / "sft" / "model")), flatten(load(tmp_path / "sharpened"))
    for path, x in before.items():
        np.testing.assert_allclose(after[path], x * (training.SHARPER if path == "softmax.q_proj" else 1), rtol=1e-6)
    Tokenizer.load(tmp_path / "sharpened")


def test_what_ships_lies_between_the_models_after_rls_stages(tmp_path: Path) -> None:
    shutil.copytree(DATA / "m1_hello", tmp_path / "longer" / "model")
    shutil.copytree(DATA / "m1_hello", tmp_path / "tokenizer")
    before = load(tmp_path / "longer" / "model")
    moved = {path: x + 0.5 for path, x in flatten(before).items()}
    save(build(before.config, lambda path, _: moved[path]), tmp_path / "surer" / "model", "float32")
    training.change("settled", tmp_path)
    settled = flatten(load(tmp_path / "settled"))
    for path, x in flatten(before).items():
        factor = training.SHARPER_AGAIN if path == "softmax.q_proj" else 1
        np.testing.assert_allclose(settled[path], (x + 0.5 * training.KEPT) * factor, rtol=1e-5, atol=1e-6)


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


def test_the_shipped_model_solves_held_out_problems_of_every_task() -> None:
    """A few of each, so that what ships cannot be exchanged for something worse; README has the accuracy itself."""
    each = 16
    problems = [problem for task in TASKS.values() for problem in task.problems(each, seed=1)]
    replies = open_local(nano.FOLDER, "float32", window=160, rows=len(problems))(problems)
    right = np.asarray(
        [verify(problem, text) == (True, True) for problem, (text, _) in zip(problems, replies, strict=True)]
    )
    assert right.mean() > 0.95 and right.reshape(-1, each).sum(1).min() >= 13
