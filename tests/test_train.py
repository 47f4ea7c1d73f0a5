"""The trainer's settings and its step. Data is in `test_train_data.py`, runs of the command in `test_train_run.py`."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m1jax.errors import UserError
from m1jax.params import flatten
from m1jax.rl.settings import RLSettings
from m1jax.train.forward import Routing
from m1jax.train.loss import Balance, balancing_loss
from m1jax.train.settings import GuardSettings, OptimizerSettings, Settings, parse, read
from m1jax.train.step import accumulated, adamw, computing, cross_entropy, init_state, make_step, schedule
from tests.tools import SMALL, random_model, rms_error, variant

TABLE: dict[str, Any] = {"stage": "sft", "out": "run", "steps": 10, "model": {"path": "somewhere"}}


# --- settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"learning_rat": 1.0}}, "unknown key optimizer.learning_rat: did you mean optimizer.learning_r"),
        ({"step": 3}, "unknown key step: did you mean steps"),
        ({"qqq": 3}, "unknown key qqq: known are stage, out, steps"),
        ({"stage": "dpo"}, "stage = 'dpo' must be one of pretrain, sft, rl"),
        ({"steps": "ten"}, "steps = 'ten' must be of type int"),
        ({"steps": True}, "steps = True must be of type int"),
        ({"steps": 0}, "steps = 0 must be 1 or more"),
        ({"data": 3}, "data = 3 must be a table"),
        ({"data": {"rows": 0}}, "data.rows = 0 must be 1 or more"),
        ({"data": {"files": 3}}, "data.files = 3 must be a list"),
        ({"optimizer": {"b2": 1.0}}, "optimizer.b2 = 1.0 must be at least 0 and less than 1"),
        ({"optimizer": {"decay": -1}}, "optimizer.decay = -1 must be 0 or more"),
        ({"model": {"config": "x", "capacity": -1.0}}, "model.capacity = -1.0 must be 0"),
        ({"model": {}}, "needs either path"),
        ({"seed": -1}, "seed = -1 must be from 0 to 4294967295"),
        ({"seed": 2**32}, "seed = 4294967296 must be from 0 to 4294967295"),
        ({"optimizer": {"learning_rate": float("inf")}}, "optimizer.learning_rate = inf must be finite"),
        ({"optimizer": {"weight_decay": -3}}, "optimizer.weight_decay = -3.0 must be 0 or more"),
        ({"log": {"peak_tflops": -5}}, "log.peak_tflops = -5.0 must be 0"),
        ({"checkpoint": {"every": -1}}, "checkpoint.every = -1 must be 0"),
        ({"rl": {"foo": 1}}, "[rl] has no meaning in stage sft: leave it out"),
        ({"stage": "rl", "data": {"files": ["a"]}}, "data.files has no meaning in stage rl"),
        ({"stage": "rl", "data": {"bins": 9}}, "data.bins has no meaning in stage rl"),
        ({"guard": {"spike": -1.0}}, "guard.spike = -1.0 must be 0"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse(Settings, TABLE | change)


def test_settings_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('stage = "rl"\nout = "x"\nsteps = 3\nmodel.config = "c"\ndata.accumulate = 2\n[rl]\ncap = 5\n')
    settings = read(file)
    assert settings.data.accumulate == 2 and settings.rl == {"cap": 5} and settings.optimizer.b2 == 0.95
    assert settings.checkpoint_every == 10 and parse(Settings, TABLE).checkpoint_every == 500
    assert parse(Settings, TABLE | {"data": {"files": "a"}}).data.files == ("a",)
    for text, message in (("stage = ", "is not a TOML file"), ('stage = "rl"', "out is missing")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read(file)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read(tmp_path / "none.toml")


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "scripts" / "configs").glob("*.toml")))
def test_the_example_settings_are_read(file: Path) -> None:
    settings = read(file)
    assert settings.stage in file.stem
    if settings.stage == "rl":
        rl = parse(RLSettings, settings.rl, "rl.")
        assert (
            settings.optimizer.warmup < settings.steps * rl.updates / 10 and settings.checkpoint_every < settings.steps
        )


# --- the step

CONFIG = variant(layer_types=("lightning",))


def batch(seed: int, accumulate: int = 1) -> dict[str, np.ndarray]:
    rng, shape = np.random.default_rng(seed), (accumulate, 2, 10)
    out = {name: rng.integers(0, CONFIG.vocab_size, shape).astype(np.int32) for name in ("tokens", "targets")}
    segments = np.ones(shape, np.int32)
    segments[:, 1, 5:] = [2, 2, 2, 0, 0]
    return out | {"segments": segments, "weights": (rng.random(shape) < 0.7).astype(np.float32) * (segments > 0)}


def test_accumulated_gradients_are_those_of_one_batch() -> None:
    model, several = random_model(CONFIG), batch(0, accumulate=3)
    one = {name: x.reshape(1, 6, 10) for name, x in several.items()}
    loss = cross_entropy("float32", "layer", Balance(0.0))  # the balancing loss is each batch's own
    (got, metrics), (want, wanted) = (jax.jit(lambda b: accumulated(loss, model, b))(b) for b in (several, one))
    for path, leaf in flatten(got).items():
        assert not leaf.size or rms_error(leaf, flatten(want)[path]) < 1e-5, path
    for name in ("loss", "cross_entropy", "entropy", "load", "router_entropy"):
        assert rms_error(metrics[name], wanted[name]) < 2e-6, name


def test_a_batch_of_padding_adds_nothing() -> None:
    model, two = random_model(CONFIG), batch(0, accumulate=2)
    padded = {name: np.concatenate([x[:1], np.zeros_like(x[:1]), x[1:]]) for name, x in two.items()}
    loss = cross_entropy("float32", "layer", Balance(0.1))
    (got, metrics), (want, wanted) = (jax.jit(lambda b: accumulated(loss, model, b))(b) for b in (padded, two))
    assert metrics["loss"] == wanted["loss"]
    for path, leaf in flatten(got).items():
        np.testing.assert_array_equal(leaf, flatten(want)[path], err_msg=path)


def test_balancing_by_hand() -> None:
    """Two layers that use one of two experts each: alike over the model, not in any layer."""
    one, other = jnp.asarray([[4.0, 0.0]]), jnp.asarray([[0.0, 4.0]])  # k = 1, four tokens
    none = jnp.zeros(2)
    apart = Routing(jnp.stack([one, other]), jnp.stack([one[0], other[0]]), none, jnp.full(2, 4.0), none)
    assert balancing_loss(apart) == 2 * (0.5 * 0.5 + 0.5 * 0.5) == 1  # the least
    assert balancing_loss(apart, "layer") == (2 * 1 * 1 + 2 * 1 * 1) / 2 == 2  # the most
    even = apart._replace(chosen=jnp.full((2, 1, 2), 2.0), probability=jnp.full((2, 2), 2.0))
    assert balancing_loss(even) == balancing_loss(even, "layer") == 1
    padding = jax.tree.map(jnp.zeros_like, apart)
    assert balancing_loss(padding) == balancing_loss(padding, "layer") == 0
    assert Balance.of(OptimizerSettings(), CONFIG) == (CONFIG.router_aux_loss_coef, "model")
    assert Balance.of(OptimizerSettings(balance=0.0, balance_over="layer"), CONFIG) == (0, "layer")


def test_adamw_as_written_down() -> None:
    """Two steps by hand: clipping, both moments with their bias, decay of matrices and not of norms, the rate."""
    settings = OptimizerSettings(learning_rate=0.1, warmup=2, eps=1e-15, weight_decay=0.3, clip=0.5)
    optimizer, model = adamw(CONFIG, settings, 10), random_model(CONFIG)
    state = optimizer.init(model)  # pyright: ignore[reportArgumentType]
    step_of: Any = jax.jit(optimizer.update)
    names = ("moe.router", "norm")
    weights = {name: np.asarray(flatten(model)[name], np.float64) for name in names}
    m, v = ({name: np.zeros_like(weights[name]) for name in names} for _ in range(2))
    for t in (1, 2):
        gradient = jax.tree.map(lambda a, t=t: 1e-3 * a * t, model)
        norm = float(optax.tree.norm(gradient))
        update, state = step_of(gradient, state, model)
        model = jax.tree.map(jnp.add, model, update)
        for name in names:
            g = np.asarray(flatten(gradient)[name], np.float64) * min(1, 0.5 / norm)
            m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.95 * v[name] + 0.05 * g * g
            step = (m[name] / (1 - 0.9**t)) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-15)
            weights[name] = weights[name] - 0.1 * t / 2 * (step + (0.3 if name != "norm" else 0) * weights[name])
            assert rms_error(flatten(model)[name], weights[name]) < 1e-6, (name, t)


def test_adamw_moves_at_the_gradients_of_rl() -> None:
    """Gradients down to 1e-18: with eps 1e-15 their direction still counts, with 1e-8 nothing moves."""
    model = random_model(CONFIG)
    moved = {}
    for eps in (1e-15, 1e-8):
        optimizer = adamw(CONFIG, OptimizerSettings(learning_rate=1.0, warmup=0, weight_decay=0.0, eps=eps), 10)
        state = optimizer.init(model)  # pyright: ignore[reportArgumentType]
        update, _ = optimizer.update(jax.tree.map(lambda a: 1e-11 * a, model), state, model)  # pyright: ignore
        moved[eps] = float(jnp.mean(jnp.abs(flatten(update)["moe.router"])))
    assert moved[1e-15] > 0.95 and moved[1e-8] < 1e-3


def test_each_parameter_has_the_rate_asked_for() -> None:
    """Steps by AdamW are in proportion to the rate; what has none stays, and counts not even in the norm."""

    def loss(model: Any, batch: Any, total: Any) -> Any:
        return sum(jnp.sum(a * a) for a in flatten(model).values()) / 2, {}

    def stepped(rates: str) -> tuple[dict[str, np.ndarray], float]:
        settings = OptimizerSettings(learning_rate=1e-3, warmup=0, rates=rates)
        optimizer = adamw(CONFIG, settings, 10)
        step, state = make_step(loss, optimizer, GuardSettings(), rates), init_state(random_model(CONFIG), optimizer)
        some: Any = batch(0)
        state, metrics = step(state, some)
        moved = {name: np.asarray(a) - before[name] for name, a in flatten(state.model).items()}
        return moved, float(metrics["gradient_norm"])

    before = {name: np.array(a) for name, a in flatten(random_model(CONFIG)).items()}
    plain, whole = stepped("")
    moved, norm = stepped("*=0, softmax.*=4 ,softmax.v_proj=.5,norm=1")
    for name in before:
        factor = {"softmax.v_proj": 0.5, "norm": 1.0}.get(name, 4.0 if name.startswith("softmax.") else 0.0)
        assert np.allclose(moved[name], factor * plain[name], rtol=1e-3, atol=1e-7), name
        assert factor or not moved[name].any(), name
    trained = [np.sum(a.astype(np.float64) ** 2) for name, a in before.items() if "softmax." in name or name == "norm"]
    assert norm == pytest.approx(float(np.sqrt(sum(trained))), rel=1e-5) and norm < whole


def test_a_checkpoint_fits_whatever_the_rates() -> None:
    plain, rated = (adamw(CONFIG, OptimizerSettings(rates=rates), 10) for rates in ("", "norm=0"))
    one, other = (jax.tree.structure(init_state(random_model(CONFIG), o)) for o in (plain, rated))
    assert one == other


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ("softmax.*", "optimizer.rates: 'softmax.*' must be NAME=FACTOR, a factor of 0 or more"),
        ("norm=-1", "optimizer.rates: 'norm=-1' must be NAME=FACTOR"),
        ("norm=nan", "optimizer.rates: 'norm=nan' must be NAME=FACTOR"),
        ("*=0", "optimizer.rates = '*=0' leaves nothing to train: give a parameter a factor above 0"),
        ("norm=1,attention.*=2", "optimizer.rates: no parameter is named 'attention.*': there are embed, "),
    ],
)
def test_bad_rates_are_named(rates: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        adamw(CONFIG, OptimizerSettings(rates=rates), 10)


def test_the_schedule_warms_up_stays_and_decays() -> None:
    rate = schedule(OptimizerSettings(learning_rate=2.0, warmup=4, decay=5, final=0.1), 20)
    got = [float(np.asarray(rate(i))) for i in range(20)]
    assert got[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert got[4:15] == pytest.approx([2.0] * 11)
    assert got[15:] == pytest.approx([1.64, 1.28, 0.92, 0.56, 0.2])
    with pytest.raises(UserError, match="warmup = 4 and decay = 7 do not fit into 10 steps"):
        schedule(OptimizerSettings(warmup=4, decay=7), 10)
    decaying = schedule(OptimizerSettings(learning_rate=2.0, warmup=0, decay=2, final=0.1), 4)
    assert [float(np.asarray(decaying(i))) for i in range(4)] == pytest.approx([2.0, 2.0, 1.1, 0.2])
    constant = schedule(OptimizerSettings(learning_rate=2.0, warmup=0), 5)
    assert [float(np.asarray(constant(i))) for i in range(5)] == pytest.approx([2.0] * 5)


def test_an_update_is_where_in_the_schedule_it_is_said_to_be() -> None:
    settings = OptimizerSettings(learning_rate=1.0, warmup=2, decay=4, final=0.1, weight_decay=0.0)
    optimizer, rate, model = adamw(CONFIG, settings, 10), schedule(settings, 10), random_model(CONFIG)
    state = optimizer.init(model)  # pyright: ignore[reportArgumentType]
    step_of: Any = jax.jit(lambda state, at: optimizer.update(model, state, model, at=at))  # pyright: ignore
    update, moved = step_of(state, None)
    plain = float(jnp.max(flatten(update)["moe.router"]) / rate(0))
    for at in (0, 1, 5, 8, 9):
        update, after = step_of(state, at)
        assert float(jnp.max(flatten(update)["moe.router"])) == pytest.approx(plain * float(np.asarray(rate(at))))
        assert jax.tree.structure(after) == jax.tree.structure(moved)
        again, _ = step_of(after, None)  # the one after it
        assert float(jnp.max(flatten(again)["moe.router"])) == pytest.approx(plain * float(np.asarray(rate(at + 1))))


def test_bfloat16_computes_with_float32_weights_head_and_router() -> None:
    model = random_model(SMALL)
    compute = flatten(computing(model, "bfloat16"))
    assert {path for path, leaf in compute.items() if leaf.dtype == jnp.float32} == {"moe.router", "lm_head"}
    assert np.array_equal(compute["lm_head"], flatten(model)["lm_head"])


def loss_at(value: float) -> Any:
    return batch(0) | {"value": np.full((1, 2, 10), value, np.float32)}


def told_loss(**guard: Any) -> tuple[Any, Any]:
    """A step whose loss is what the batch says, and a state to begin with."""
    optimizer = adamw(CONFIG, OptimizerSettings(learning_rate=1e-2, warmup=0), 200)

    def loss(model: Any, batch: Any, total: Any) -> Any:
        mean = jnp.mean(model.norm[...])
        return batch["value"][0, 0] + mean - jax.lax.stop_gradient(mean), {}

    return make_step(loss, optimizer, GuardSettings(**guard)), init_state(random_model(CONFIG), optimizer)


def test_a_bad_step_changes_nothing_but_the_count() -> None:
    step, state = told_loss(spike=5.0)
    rng = np.random.default_rng(0)
    for _ in range(60):
        state, metrics = step(state, loss_at(1 + 0.01 * rng.standard_normal()))
        assert metrics["good"]
    for value, good in ((np.nan, False), (np.inf, False), (50.0, False), (1.0, True)):
        before = jax.tree.map(np.array, state)
        state, metrics = step(state, loss_at(value))
        assert bool(metrics["good"]) == good, value
        assert int(state.step) == int(before.step) + 1
        same = all(
            np.array_equal(a, b)
            for name in ("model", "optimizer", "accepted", "mean", "variance")
            for a, b in zip(*(jax.tree.leaves(getattr(s, name)) for s in (before, state)), strict=True)
        )
        assert same != good


def test_a_loss_that_hardly_varies_has_no_spikes_of_nothing() -> None:
    for level, limit in ((0.001, 0.201), (5.0, 5.5)):
        step, state = told_loss(spike=10.0)
        for _ in range(54):
            state, _ = step(state, loss_at(level))
        state, metrics = step(state, loss_at(level))
        assert float(metrics["loss_limit"]) == pytest.approx(limit)
        for value, good in ((0.99 * limit, True), (1.2 * limit, False)):
            assert step(jax.tree.map(jnp.copy, state), loss_at(value))[1]["good"] == good


def test_skipped_a_new_level_is_accepted_after_a_while_and_an_outlier_is_none() -> None:
    step, state = told_loss(spike=10.0, action="skip")
    rng = np.random.default_rng(0)

    def after(state: Any, *values: float) -> tuple[Any, list[bool], float]:
        good, limit = [], 0.0
        for value in values:
            state, metrics = step(state, loss_at(value))
            good.append(bool(metrics["good"]))
            limit = float(metrics["loss_limit"])
        return state, good, limit

    state, good, _ = after(state, *(1 + 0.05 * rng.standard_normal(60)))
    assert all(good)
    before = jax.tree.map(np.array, state)
    state, good, limit = after(state, 1e30, 1.0)
    wider = (limit - float(state.mean)) / 10 / float(np.sqrt(before.variance))
    assert good == [False, True] and wider < 1.3
    state, good, _ = after(state, 1e30, np.nan, 1.0, 2.5)
    assert good == [False, False, True, False]
    _, good, _ = after(state, *[2.5] * 9)  # before the tenth the run would stop
    assert not good[0] and good[-1] and good == sorted(good)
