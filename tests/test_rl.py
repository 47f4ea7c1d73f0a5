"""The rl stage: experience, the update, the agreement of log-probabilities, and whole runs of a small model."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax import UserError, load, nano
from m1jax.evaluate import open_local
from m1jax.model import M1, build, init_params
from m1jax.params import flatten
from m1jax.prompt import Prompter
from m1jax.rl import stage
from m1jax.rl.experience import Reply, pack, reward, stacked
from m1jax.rl.learner import Learner
from m1jax.rl.losses import NAMED
from m1jax.rl.policy import agreement, correlation, policy_gradient
from m1jax.rl.rollout import Rollout, rollout
from m1jax.rl.settings import RLSettings
from m1jax.saving import save
from m1jax.tasks import TASKS, Problem, split_of
from m1jax.tokenizer import Tokenizer
from m1jax.train.loss import Balance
from m1jax.train.saving import Checkpoints
from m1jax.train.settings import GuardSettings, OptimizerSettings, Settings, parse
from m1jax.train.step import TrainState, adamw, init_state, make_step, totals
from tests.tools import HELLO, rows_are_alone, variant
from tests.training import interrupted

SMALL_RUN: dict[str, Any] = {
    "tasks": ["addition"],
    "difficulty": 0.25,
    "questions": 8,
    "replies": 4,
    "updates": 4,
    "windows": [24],
    "row_tokens": 128,
    "attempts": 2,
    "dynamic_sampling": False,  # the small model's answers are all wrong; their format is not
}


def reply(prompt: int, length: int, advantage: float = 1.0, first: int = 1) -> Reply:
    tokens = np.arange(first, first + length, dtype=np.int32)
    return Reply(list(range(40, 40 + prompt)), tokens, -0.1 * np.arange(1, length + 1, dtype=np.float32), advantage)


def test_packing_keeps_every_reply_with_its_targets() -> None:
    replies = [reply(3, 4, 1.0), reply(2, 6, -0.5, 10), reply(1, 9, 2.0, 20), reply(3, 5, 0.25, 30)]
    data = pack(replies, 17)
    assert data.tokens.shape == (2, 17)
    assert int(data.weights.sum()) == 4 + 6 + 9 + 5
    for row in range(2):
        for segment in range(1, data.segments[row].max() + 1):
            places = np.flatnonzero(data.segments[row] == segment)
            assert (np.diff(places) == 1).all()
            tokens, learnt = data.tokens[row, places], data.weights[row, places] > 0
            (own,) = [r for r in replies if r.advantage == data.advantage[row, places][learnt][0]]
            assert tokens.tolist() == [*own.prompt, *own.tokens]
            assert np.flatnonzero(learnt).tolist() == list(range(len(own.prompt) - 1, len(tokens) - 1))
            assert (data.targets[row, places][learnt] == own.tokens).all()
            assert (data.old_logp[row, places][learnt] == own.logp).all()
    with pytest.raises(UserError, match=r"row_tokens = 6 does not hold a prompt and reply of 10"):
        pack(replies, 6)
    alike = pack(replies, 17, "replies").weights
    assert (alike > 0).tolist() == (data.weights > 0).tolist() and alike.sum() == pytest.approx(4)
    assert sorted({round(1 / w) for w in alike[alike > 0].tolist()}) == [4, 5, 6, 9]


def test_batches_of_one_shape() -> None:
    batches = stacked([pack([reply(3, 4)] * n, 8) for n in (3, 5)], accumulate=2)
    shapes = {x.shape for batch in batches for x in batch.values()}
    assert shapes == {(2, 3, 8)}
    assert [int(batch["weights"].sum()) for batch in batches] == [12, 20]


def test_rewards_by_rule() -> None:
    problem = Problem("addition", "What is 27 + 58?", "…", "85", "")
    good = "<think>\n7+8=15\n</think>\n85"
    assert reward(problem, good, True, 0.1) == (1.1, True)
    assert reward(problem, good, False, 0.1) == (0.0, False)  # cut off: 85 may be the beginning of 851
    assert reward(problem, good.replace("\n85", "\n84"), True, 0.1) == (0.1, False)
    assert reward(problem, "85", True, 0.1) == (1.0, True)


def test_correlation_is_pearsons() -> None:
    rng = np.random.default_rng(0)
    b = rng.normal(size=500)
    for noise in (1.0, 0.1, 1e-3):
        a = b + noise * rng.normal(size=500) + 0.3
        d = a - b
        sums = np.asarray([500, b.sum(), (b * b).sum(), d.sum(), (d * d).sum(), (d * b).sum()], np.float32)
        assert abs(correlation(sums) - np.corrcoef(a, b)[0, 1]) < 1e-6
    assert np.isnan(correlation(np.zeros(6)))


def test_correlation_where_the_policy_is_sure() -> None:
    """All probabilities within 1e-4 of 1: sums of p² itself would lose in float32 how they vary."""
    rng = np.random.default_rng(0)
    theirs = -1e-4 * rng.random(400)
    ours = theirs * (1 + 0.02 * rng.normal(size=400))
    found = agreement(jnp.float32(ours), jnp.float32(theirs), jnp.ones(400, bool))
    for sums, (a, b) in zip(np.asarray(found), ((ours, theirs), (np.exp(ours), np.exp(theirs))), strict=True):
        assert abs(correlation(sums) - np.corrcoef(a, b)[0, 1]) < 1e-5


@pytest.mark.parametrize(
    ("even", "sizes"), [(True, {8: [8] * 4, 3: [6, 6], 2: [8], 1: [4]}), (False, {8: [8] * 4, 1: [1] * 4})]
)
def test_a_batch_of_few_groups_has_fewer_updates(even: bool, sizes: dict[int, list[int]]) -> None:
    """Not updates of fewer replies, unless they are asked for."""
    rl = RLSettings(questions=8, replies=4, updates=4, even_updates=even, row_tokens=16, windows=(8,))
    learner = Learner(rl, None, [0], "float32", 0, 9)  # pyright: ignore[reportArgumentType]
    for groups, wanted in sizes.items():
        replies = [reply(1, 2, first=n + 1) for n in range(4 * groups)]
        parts = learner._packed(replies, 0)
        assert [int(part.weights.sum()) // 2 for part in parts] == wanted
        assert sorted(part.targets[part.weights > 0].min() for part in parts)[0] == 1


def test_the_schedule_counts_the_updates_that_were_planned() -> None:
    """So that the last batch ends where the schedule does, however few there were before."""
    rl = RLSettings(questions=8, replies=4, updates=4, row_tokens=16, windows=(8,))
    learner = Learner(rl, None, [0], "float32", 0, 9)  # pyright: ignore[reportArgumentType]
    places: list[int] = []

    def update(state: Any, batch: Any, at: int) -> Any:
        places.append(at)
        return state, {"agreement": np.zeros((2, 6))}

    state: Any = None
    for number, groups in enumerate((8, 3, 1, 6)):
        learner.learn(state, [reply(1, 2)] * (4 * groups), number, update)
    assert places == [0, 1, 2, 3, 5, 7, 11, 12, 13, 15]


def test_updates_follow_the_advantages() -> None:
    """After updates, what had a positive advantage is likelier, the rest less likely; the ratio starts at 1."""
    model = init_params(variant(initializer_range=0.2), jax.random.key(0))
    replies = [reply(3, 5, 1.0, 1), reply(3, 5, -1.0, 11)]
    rl = RLSettings(updates=1, row_tokens=16, windows=(8,))
    optimizer = adamw(model.config, OptimizerSettings(learning_rate=3e-3, warmup=0, eps=1e-15, weight_decay=0.0), 9)
    loss = policy_gradient(rl.policy_loss, rl.temperature, "float32", "none", Balance(0.0))
    step = make_step(loss, optimizer, GuardSettings())

    def update(state: TrainState, batch: Any, at: int) -> tuple[TrainState, Any]:
        state, metrics = step(state, jax.device_put(dict(batch)), at)
        return state, jax.device_get(metrics)

    learner = Learner(rl, None, [0], "float32", 0, 9)  # pyright: ignore[reportArgumentType]

    def logp(model: M1) -> list[np.ndarray]:
        out = []
        for r in replies:
            logits = model(jnp.asarray([[*r.prompt, *r.tokens]]))[0, 2:-1]
            out.append(np.asarray(jax.nn.log_softmax(logits)[np.arange(5), r.tokens]))
        return out

    before = logp(model)
    replies = [r._replace(logp=old) for r, old in zip(replies, before, strict=True)]
    state = jax.jit(functools.partial(init_state, optimizer=optimizer))(model)
    told = []
    for number in range(6):
        state, metrics = learner.learn(state, replies, number, update)
        told.append(metrics)
    after = logp(state.model)
    assert abs(told[0]["ratio"] - 1) < 1e-4 and told[0]["correlation_logp"] > 0.9999
    assert after[0].sum() > before[0].sum() + 0.5 and after[1].sum() < before[1].sum() - 0.5
    assert all(metrics["good"] == 1 and metrics["entropy"] > 0 for metrics in told)


def table(out: Path, steps: int = 2, dtype: str = "float32", **rl: Any) -> dict[str, Any]:
    return {
        "stage": "rl",
        "out": str(out),
        "steps": steps,
        "model": {"path": str(HELLO), "dtype": dtype, "remat": "none"},
        "optimizer": {"learning_rate": 1e-5, "warmup": 0},
        "checkpoint": {"every": 1},
        "log": {"tensorboard": False},
        "rl": SMALL_RUN | rl,
    }


def settings(*args: Any, **rl: Any) -> Settings:
    return parse(Settings, table(*args, **rl))


def rows(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "per_second", "tflops_per_device", "utilisation")
    return [{name: value for name, value in line.items() if not name.endswith(timed)} for line in lines]


def test_a_run_goes_on_bit_by_bit_after_it_was_broken_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.run(settings(tmp_path / "whole"))
    whole = rows(tmp_path / "whole")
    timed = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    for row in timed:  # of the updates, and of the rollouts, each in its own time
        training = row["seconds"] - row["rollout_seconds"]
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / training)
        assert row["rollout_tokens_per_second"] == pytest.approx(row["rollout_tokens"] / row["rollout_seconds"])
        assert row["rollout_tokens"] == pytest.approx(row["reply_tokens"] * row["attempts"] * 32)
        assert row["learning_rate"] == pytest.approx(1e-5)
    assert all(row["correlation_logp"] > 0.9999 and row["correlation_p"] > 0.9999 for row in whole)
    assert all(row["updates"] == 4 and row["ratio"] != 1 and 1 <= row["groups"] <= 8 for row in whole)
    load(tmp_path / "whole" / "model")
    assert (tmp_path / "whole" / "curves.png").exists()

    real = Learner.step

    def dies(self: Learner, model: M1, state: TrainState, number: int, *functions: Any) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return real(self, model, state, number, *functions)

    broken = settings(tmp_path / "broken")
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            stage.run(broken)
    assert len(rows(tmp_path / "broken")) == 1
    stage.run(broken)
    assert rows(tmp_path / "broken") == whole


def test_factors_are_reinforced_beside_quantised_experts(tmp_path: Path) -> None:
    """The rollout's policy is the model with its factors, as that of the updates is."""
    lora = {"rank": 2, "alpha": 4.0, "quantize": "int8"}
    stage.run(parse(Settings, table(tmp_path / "out", 2) | {"lora": lora}))
    found = rows(tmp_path / "out")
    assert all(row["correlation_logp"] > 0.9999 and row["updates"] == 4 and row["good"] == 1 for row in found)
    tokens = np.arange(12)[None]
    plain, trained = (load(HELLO, quantize="int8", adapter=a) for a in (None, tmp_path / "out" / "adapter"))
    assert 0 < float(jnp.abs(trained(tokens) - plain(tokens)).max()) < 1


def test_killed_while_it_is_evaluated_it_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is written before, and what says only how the run is done may be changed."""

    tasks = ["addition", "subtraction"]
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stage.run(settings(tmp_path, 1, tasks=tasks, evaluate_every=1, evaluate_problems=2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    (before,) = rows(tmp_path)
    changes: dict[str, Any] = {"evaluate_every": 2, "evaluate_problems": 4, "row_tokens": 96, "attempts": 1}
    stage.run(settings(tmp_path, 1, tasks=tasks, **changes))
    (after,) = rows(tmp_path)
    assert after.pop("held_out") == np.mean([after.pop(f"held_out/{name}") for name in tasks]) and after == before
    load(tmp_path / "model")
    with pytest.raises(UserError, match=r"was written with rl\.loss 'cispo', not 'dapo'"):
        stage.run(settings(tmp_path, 1, tasks=tasks, loss="dapo"))


def test_a_run_on_a_mesh_is_that_of_one_device(tmp_path: Path) -> None:
    evaluated: dict[str, Any] = {"evaluate_every": 1, "evaluate_problems": 6}  # four groups of devices share 6
    stage.run(settings(tmp_path / "one", steps=1, **evaluated))
    stage.run(dataclasses.replace(settings(tmp_path / "mesh", steps=1, **evaluated), mesh="fsdp=2,expert=2,tensor=2"))
    (one,), (mesh,) = rows(tmp_path / "one"), rows(tmp_path / "mesh")
    for name in ("reward", "reply_tokens", "groups", "informative", "held_out"):
        assert mesh[name] == one[name], name
    for name in ("loss", "policy", "balance", "entropy", "ratio", "gradient_norm", "correlation_logp"):
        np.testing.assert_allclose(mesh[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_run_in_bfloat16(tmp_path: Path) -> None:
    """The log-probabilities agree, and what is saved are the float32 weights, not what they are rounded to."""
    # At 1 it is so sure of itself that its log-probabilities hardly vary: what rounding there is would tell.
    exact = all(rows_are_alone(few, 4096, 128) for few in (4, 32, 256))
    mixed: dict[str, Any] = {"tasks": ["all"], "difficulty": 1.0, "temperature": 1.0 if exact else 1.5}
    mixed |= {"questions": 16, "replies": 2, "updates": 2, "windows": [160], "row_tokens": 512}
    run = settings(tmp_path, 1, "bfloat16", **mixed)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, path=str(nano.FOLDER)))
    stage.run(run)
    (row,) = rows(tmp_path)
    assert row["correlation_logp"] > 0.9999 and row["correlation_p"] > 0.9999
    parts = stage.prepare(run, 1)
    state, _ = Checkpoints(tmp_path, 1, {}).load(parts.shapes)
    trained, saved = flatten(state.model), flatten(load(tmp_path / "model"))
    assert all(np.array_equal(saved[path], trained[path]) for path in trained)
    assert not np.array_equal(trained["lm_head"], trained["lm_head"].astype("bfloat16"))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_the_head_that_wrote_the_replies(tied: bool) -> None:
    """In bfloat16 as they compute: more of them no rollout has seen. A head of its own stays float32."""
    config = variant(tie_word_embeddings=tied)
    weights = flatten(init_params(config, jax.random.key(0)))
    (batch,) = stacked([pack([reply(3, 5, 1.0, 1), reply(2, 4, -1.0, 11)], 16)], 1)
    some = {name: jnp.asarray(x[0]) for name, x in batch.items()}
    loss = jax.jit(policy_gradient(NAMED["cispo"], 1.0, "bfloat16", "none", Balance(0.0)))

    def value(rounded: bool) -> float:
        head = "embed" if tied else "lm_head"
        exact = weights[head].astype("bfloat16").astype("float32") if rounded else weights[head]
        model = build(config, lambda path, _: exact if path == head else weights[path])
        return float(loss(model, some, totals(some))[0])

    assert (value(True) == value(False)) == tied


def test_a_run_does_not_go_on_from_other_weights_or_with_another_task(tmp_path: Path) -> None:
    task = tmp_path / "sum.py"
    task.write_text(
        "from m1jax.tasks import TASKS\nimport dataclasses\nTASK = dataclasses.replace(TASKS['addition'], name='own')\n"
    )
    for name, seed in (("m", 0), ("other", 1)):
        save(init_params(load(HELLO).config, jax.random.key(seed)), tmp_path / name, "float32", HELLO)

    def run(model: str) -> None:
        one = settings(tmp_path / "out", 1, tasks=[str(task)])
        stage.run(dataclasses.replace(one, model=dataclasses.replace(one.model, path=str(tmp_path / model))))

    run("m")
    run("m")
    with pytest.raises(UserError, match=r"was written with model\.weights '\w+', not"):
        run("other")
    task.write_text(task.read_text() + "\n")
    with pytest.raises(UserError, match=r"was written with rl\.own_tasks"):
        run("m")


def test_a_task_without_held_out_problems_is_found_before_the_run(tmp_path: Path) -> None:
    n = next(n for n in range(99) if split_of(f"one {[('n', n)]}") == "train")
    task = f"Task('one', 1, lambda rng, d: {{'n': {n}}}, ('{{n}}?',), lambda i: Solution('so', '1'))"
    (tmp_path / "one.py").write_text(f"from m1jax.tasks import Solution, Task\nTASK = {task}\n")
    with pytest.raises(UserError, match=r"task one .*has no held-out problem"):
        stage.run(settings(tmp_path / "out", tasks=[str(tmp_path / "one.py")], evaluate_every=1))
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_weights_that_are_no_numbers_are_found_where_nothing_is_learnt(tmp_path: Path) -> None:
    """Such a model's replies are all wrong, so that no update looks at them; evaluation must not count them either."""
    model = load(HELLO)
    model.softmax.o_proj.set_value(model.softmax.o_proj.get_value().at[-1, 0].set(jnp.nan))
    save(model, tmp_path / "bad", tokenizer=HELLO)
    table_of = table(tmp_path / "out", 1, dynamic_sampling=True)
    table_of["model"]["path"] = str(tmp_path / "bad")
    with pytest.raises(UserError, match="NaN or infinity, first in layer"):
        stage.run(parse(Settings, table_of))
    assert not (tmp_path / "out" / "model").exists()
    answers = open_local(tmp_path / "bad", "float32", 24, 4)
    with pytest.raises(UserError, match="NaN or infinity, first in layer"):
        answers(TASKS["addition"].problems(4, 0))


def test_log_probabilities_are_compared_when_there_is_nothing_to_learn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where every group is all right or all wrong."""
    stage.run(settings(tmp_path, 1, format_reward=0.0, dynamic_sampling=True))
    (row,) = rows(tmp_path)
    assert row["groups"] == row["updates"] == row["tokens"] == 0 and row["correlation_logp"] > 0.9999
    assert "warning: step 1 taught nothing" in capsys.readouterr().err


def test_dynamic_sampling_leaves_out_groups_that_teach_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a temperature at which the shipped model solves some ciphers at times."""
    known: dict[bytes, Rollout] = {}

    def once(policy: M1, *asked: Any, **named: Any) -> Rollout:
        """The same problems are asked again below, with the same seeds."""
        key = b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(asked))
        if key not in known:
            known[key] = rollout(policy, *asked, **named)
        return known[key]

    monkeypatch.setattr("m1jax.rl.learner.rollout", once)
    prompter = Prompter(Tokenizer.load(nano.FOLDER))
    common: dict[str, Any] = {"questions": 8, "replies": 4, "windows": (136,), "tasks": ("cipher",), "updates": 4}
    common |= {"row_tokens": 256, "temperature": 1.6, "difficulty": 1.2, "hardest_share": 1.0}
    model = load(nano.FOLDER)

    def collect(**changes: Any) -> tuple[list[list[Reply]], dict[str, float]]:
        learner = Learner(RLSettings(**common | changes), prompter, sorted(prompter.tokenizer.eos_ids), "float32", 0, 1)
        groups, metrics, last = learner.collect(model, 0)
        assert len(last) == 8 * 4 and metrics["rollout_tokens"] >= sum(len(reply.tokens) for reply in last)
        for group in groups:
            np.testing.assert_allclose(sum(reply.advantage for reply in group), 0, atol=1e-5)
        return groups, metrics

    every, metrics = collect(dynamic_sampling=False)
    assert len(every) == 8 and metrics["attempts"] == 1 and 0 < metrics["informative"] < 1
    kept, again = collect(attempts=1)
    assert len(kept) == round(8 * metrics["informative"]) and again["accuracy"] == metrics["accuracy"]
    assert all(len({reply.advantage for reply in group}) > 1 for group in kept)
    more, _ = collect(attempts=2)
    assert len(kept) < len(more) <= 8 and len(known) == 2


def test_where_lightning_attention_goes_token_by_token() -> None:
    """Where rounding would tell rollout and training apart: if it is not said, on CPUs alone, which tests run on."""
    assert RLSettings().recurs("bfloat16") and not RLSettings().recurs("float32")
    assert not RLSettings(recurrent=False).recurs("bfloat16") and RLSettings(recurrent=True).recurs("float32")


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key rl\.question: did you mean rl\.questions"):
        stage.run(settings(tmp_path, question=4))
    for key, value, message in [
        ("replies", 1, "2 or more"),
        ("windows", [20, 10], "rising"),
        ("loss", "ppo2", "choose from"),
        ("cap", 0.2, "either side of 1"),
        ("unified_mask", [0.8], "goes with"),
        ("temperature", 0.0, "above 0"),
        ("hardest_share", 1.5, r"rl\.hardest_share = 1\.5 must be from 0 to 1"),
        ("updates", 1000, "exceeds"),
        ("overlong_margin", 99, "window"),
        ("temperature", float("inf"), r"rl\.temperature = inf must be finite"),
        ("format_reward", -5, r"rl\.format_reward = -5\.0 must be 0 or more"),
        ("evaluate_every", -1, r"rl\.evaluate_every = -1 must be 0 or more"),
        ("mean_over", "words", "mean_over 'words' is unknown"),
        ("row_tokens", 24, "does not hold a prompt and a window of 24: raise it"),
    ]:
        with pytest.raises(UserError, match=message):
            parse(RLSettings, SMALL_RUN | {key: value}, "rl.")
    with pytest.raises(UserError, match=r"rl\.floor and rl\.cap have no meaning with loss = 'reinforce'"):
        parse(RLSettings, SMALL_RUN | {"loss": "reinforce", "cap": 3.0}, "rl.")
    with pytest.raises(UserError, match=r"rl\.questions = 9 does not divide among 8 groups"):
        stage.run(dataclasses.replace(settings(tmp_path, questions=9), mesh="data=4,expert=2"))
    with pytest.raises(UserError, match="did you mean 'addition'"):
        stage.run(settings(tmp_path, tasks=["additon"]))
    with pytest.raises(
        UserError, match=r"rl\.row_tokens = 30 does not hold a prompt of \d\d tokens and a window of 24"
    ):
        stage.run(settings(tmp_path, row_tokens=30))
    with pytest.raises(
        UserError, match=r"a prompt of \d+ tokens and a window of 8190 exceed the model's context of 8192"
    ):
        stage.run(settings(tmp_path, windows=[8190], row_tokens=9000))
    assert TASKS["addition"].difficulty * SMALL_RUN["difficulty"] == 1


def test_the_optimizer_is_the_papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW with β 0.9 and 0.95, eps 1e-15 unless given; its schedule counts updates."""
    found: list[Settings] = []

    def stop(settings: Settings, updates: int) -> Any:
        found.append(settings)
        assert updates == SMALL_RUN["updates"]
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "prepare", stop)
    run = settings(tmp_path, steps=3)
    for eps in (0.0, 1e-9):
        with pytest.raises(KeyboardInterrupt):
            stage.run(dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, eps=eps)))
    assert [s.optimizer.eps for s in found] == [1e-15, 1e-9]
    assert (found[0].optimizer.b1, found[0].optimizer.b2) == (0.9, 0.95)
    monkeypatch.undo()
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, decay=3 * SMALL_RUN["updates"]))
    stage.prepare(run, SMALL_RUN["updates"])
    with pytest.raises(UserError, match="do not fit into 3 steps"):
        stage.prepare(run)


def test_losses_by_their_settings() -> None:
    assert RLSettings(loss="dapo").policy_loss.cap == 1.28
    means = [RLSettings(loss=loss).policy_loss.mean_over for loss in ("grpo", "dapo", "cispo")]
    assert means == ["replies", "tokens", "tokens"]
    assert RLSettings(loss="grpo", mean_over="tokens").policy_loss.mean_over == "tokens"
    assert RLSettings(cap=3.0).policy_loss.cap == 3.0 and RLSettings(cap=3.0).policy_loss.kind == "cispo"
    unified = RLSettings(unified_mask=(0.8, 1.2)).policy_loss
    assert (unified.kind, unified.mask_floor, unified.mask_cap, unified.cap) == ("unified", 0.8, 1.2, 5.0)
    assert [RLSettings(windows=(1, 2)).window(n, 5) for n in range(5)] == [1, 1, 1, 2, 2]
