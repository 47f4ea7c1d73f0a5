"""The planner: known bytes of the released M1, estimates by hand, what fits, the command line."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType

from m1jax import plan as command
from m1jax.errors import UserError
from m1jax.presets import find_config
from m1jax.sharding import compiling
from m1jax.sharding import plan as planning
from m1jax.sharding.flops import Collective
from m1jax.sharding.liveness import temporaries
from m1jax.sharding.machines import DEVICES, known, parse_devices
from m1jax.sharding.mesh import MeshShape, abstract_mesh, factorings
from m1jax.sharding.plan import (
    Memory,
    Plan,
    Roofline,
    Traffic,
    _largest,  # pyright: ignore[reportPrivateUsage]
    arguments,
    best,
    busiest,
    compiled_plan,
    make_plan,
    measure,
    model_flops,
)
from m1jax.sharding.rules import shards
from m1jax.sharding.steps import Workload
from tests.tools import variant

FULL = find_config("m1-80k")
SMALL = variant(
    layer_types=("lightning", "softmax"),
    vocab_size=64,
    num_key_value_heads=4,
    num_local_experts=8,
    max_position_embeddings=4096,
)
H200 = DEVICES["H200"]
F32 = 4


def test_known_bytes_of_the_released_model() -> None:
    int8 = arguments(FULL, Workload("serve", 8, 131072, quantize="int8"), MeshShape(expert=8), 0)
    assert int8.parameters == pytest.approx(59.76e9, abs=5e6)
    assert int8.arguments == pytest.approx(65.42e9, abs=5e6)
    bf16 = arguments(FULL, Workload("serve", 64, 131072), MeshShape(expert=8, tensor=8), 0)
    assert bf16.arguments == pytest.approx(24.62e9, abs=5e6)
    # Float32 weights and both moments of Adam, split over all 512 devices but for the routers and most norms.
    train = arguments(FULL, Workload("train", 64, 4096), MeshShape(fsdp=8, expert=8, tensor=8), 0)
    assert train.arguments == pytest.approx(10.89e9, abs=5e6)
    assert train.optimizer == 2 * train.parameters
    # As when serving, and float32 factors of all attention's matrices with their moments, a part of which is split.
    beside = arguments(FULL, Workload("train", 8, 8192, quantize="int8", lora_rank=16), MeshShape(expert=8), 0)
    assert int8.parameters < beside.parameters < int8.parameters + 0.3e9
    assert beside.parameters + beside.optimizer == pytest.approx(60.38e9, abs=5e6)


def test_flops_of_a_step() -> None:
    decode = [model_flops(FULL, Workload("serve", batch, context)) for batch, context in ((1, 4096), (8, 4096))]
    assert decode[1] == 8 * decode[0]
    # A prompt costs what its positions cost one by one, but for the logits and the last layer's q, o and two experts.
    prefill = model_flops(FULL, Workload("prefill", 1, 4, chunk=4))
    steps = sum(model_flops(FULL, Workload("serve", 1, n)) for n in (1, 2, 3, 4))
    assert prefill == pytest.approx(steps - 3 * 2 * 6144 * (200_064 + 2 * 8192 + 2 * 3 * 9216), rel=1e-5)
    # 45.9 B active parameters, and the head.
    factors = model_flops(FULL, Workload("train", 1, 1024, quantize="int8", lora_rank=16))
    train = model_flops(FULL, Workload("train", 1, 1024))
    assert factors == 0.75 * train  # weights have no gradient
    assert train == pytest.approx(4 * 2 * (45.9e9 + 200_064 * 6144) * 1024, rel=0.05)


def test_plan_of_a_small_model() -> None:
    work = Workload("serve", 4, 512, dtype="float32")
    found = make_plan(SMALL, work, MeshShape(data=2, expert=4), H200)
    assert found.fits and found.memory.cache == 2 * 2 * 1 * 512 * 8 * F32 + 2 * F32  # and the lengths
    assert found.memory.state == 2 * 1 * 8 * 8 * F32
    assert found.roofline.bound == max(("arithmetic", "memory", "links"), key=lambda k: getattr(found.roofline, k))
    assert found.longest_context == SMALL.max_position_embeddings
    assert {"psum"} <= {t.collective.kind for t in found.traffic}
    assert all(not t.between_nodes for t in found.traffic)
    assert found.tokens_per_second == pytest.approx(4 / found.roofline.seconds)


def test_the_busiest_device_of_a_layer() -> None:
    """It holds up all the others: of one token's two experts among 8 groups of 4, both are in one in 3 of 31 cases."""
    assert abs(busiest(32, 2, 8, 1) - (1 + 3 / 31)) < 0.05
    assert busiest(32, 2, 1, 1) == 2 and busiest(32, 2, 32, 5) == 1 and busiest(32, 2, 8, 100_000) == 4
    assert 2.5 < busiest(32, 2, 8, 8) < 4  # though 1.6 on average


@pytest.mark.parametrize(
    ("row", "device", "work"),
    [
        ("8×H800, int8, decode B=8 at 128k", "H800", Workload("serve", 8, 131072, quantize="int8")),
        ("64×H800, bfloat16, decode B=64 at 128k", "H800", Workload("serve", 64, 131072)),
    ],
    ids=["8 devices", "64 devices"],
)
def test_the_readmes_table_is_the_planners(row: str, device: str, work: Workload) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {row} |"))
    _, _, mesh, *cells, bound, _ = (cell.strip() for cell in line.split("|"))
    plan = make_plan(FULL, work, MeshShape.parse(mesh), DEVICES[device])
    memory = plan.memory
    sizes = [f"{x / 1e9:.2f}" for x in (memory.parameters, memory.cache + memory.state, memory.temporaries)]
    limits = [f"{n:,}" for n in (plan.largest_batch, plan.longest_context)]
    assert [*cells, bound] == [*sizes, *limits, f"{1e3 * plan.roofline.seconds:.2f}", plan.roofline.bound]


def test_limits_are_the_last_that_fit() -> None:
    work = Workload("serve", 8, 131072, quantize="int8")
    found = make_plan(FULL, work, MeshShape(expert=8), H200)
    batch, context = found.largest_batch, found.longest_context
    assert batch is not None and context is not None
    room = H200.memory - found.memory.parameters
    assert arguments(FULL, Workload("serve", batch, 131072, quantize="int8"), MeshShape(expert=8), 0).fits(H200.memory)
    assert batch * (found.memory.cache + found.memory.state) / 8 < room < 1.3 * batch * found.memory.cache / 8
    assert context * found.memory.cache / 131072 < room < 1.3 * context * found.memory.cache / 131072
    none = make_plan(FULL, work, MeshShape(expert=8), DEVICES["v6e"])
    assert not none.fits and none.largest_batch is None and none.longest_context is None


@pytest.mark.parametrize(
    ("config", "work", "mesh", "memory"),
    [
        (FULL, Workload("prefill", 1, 131072, quantize="int8"), MeshShape(expert=8), 80e9),
        (FULL, Workload("serve", 64, 131072), MeshShape(expert=8, tensor=8), 80e9),
        (SMALL, Workload("prefill", 512, 2048), MeshShape(seq=2), 200e6),  # asked is more than fits
    ],
)
def test_the_limits_fit_as_measured_and_one_percent_more_does_not(
    config: Any, work: Workload, mesh: MeshShape, memory: float
) -> None:
    plan = make_plan(config, work, mesh, H200._replace(memory=memory))

    def needed(**change: int) -> int:
        return measure(config, dataclasses.replace(work, **change), mesh)[0].total

    batch, context = plan.largest_batch, plan.longest_context
    rows = shards(abstract_mesh(mesh, work.use), "batch")
    assert batch is not None and needed(batch=batch) <= memory < needed(batch=batch + rows * (1 + batch // rows // 100))
    if context is None:
        assert needed(context=math.gcd(work.context, 1024)) > memory
    else:
        unit = math.gcd(work.context, 1024)
        more = context + unit * (1 + context // unit // 100)
        assert needed(context=context) <= memory < needed(context=more)


@pytest.mark.parametrize(
    "needed",
    [
        lambda n: 10 + 3 * n,
        lambda n: 10 + n + n * n / 50,
        lambda n: 10 + (n if n < 90 else 10 * n),
        lambda n: 10 if n < 123 else 1e9,
        lambda n: 10 + 100 * math.log1p(n),
        lambda n: 10,
        lambda n: 2000,
    ],
)
@pytest.mark.parametrize("here", [1, 40, 1000])
def test_the_largest_that_fits_is_found_in_few_measures(needed: Any, here: int) -> None:
    calls = []
    found = _largest(lambda n: calls.append(n) or needed(n), here, 5000, 1000)
    true = max((n for n in range(1, 5001) if needed(n) <= 1000), default=0)
    assert 0.99 * true <= found <= true and len(calls) <= 22


def test_limits_agree_with_the_compilers_temporaries() -> None:
    work = Workload("serve", 64, 131072)
    plan = make_plan(FULL, work, MeshShape(expert=8, tensor=8), DEVICES["H800"])
    assert plan.fits and plan.largest_batch is not None and plan.largest_batch > 64
    same = compiled_plan(FULL, plan, plan.memory.temporaries, "cuda")
    assert (same.largest_batch, same.longest_context) == (plan.largest_batch, plan.longest_context)
    over = compiled_plan(FULL, plan, int(60e9), "cuda")
    assert not over.fits and over.memory.compiled == "cuda"
    assert over.largest_batch is not None and over.largest_batch < 64
    assert over.longest_context is None or over.longest_context < 131072


def test_groups_within_a_node_and_between() -> None:
    found = make_plan(FULL, Workload("serve", 64, 4096), MeshShape(expert=8, tensor=8), H200)
    over = {t.collective.axes: t.between_nodes for t in found.traffic}
    assert over[("tensor",)] is False and over[("expert",)] is True
    # In training, fsdp and expert together gather over 64 devices, 8 of them on each node.
    gathered = next(t for t in make_plan(FULL, Workload("train", 64, 1024), MeshShape(fsdp=8, expert=8), H200).traffic
                    if t.collective.devices == 64 and t.collective.kind == "all_gather")  # fmt: skip
    assert gathered.nearby == 8 and gathered.seconds(H200) == gathered.sent / 8 / H200.network
    everybody = Traffic(Collective("all_to_all", ("a",), 16, 1600), 1, 8)
    assert everybody.sent == 1500 and everybody.seconds(H200) == 800 / H200.network
    assert Traffic(Collective("psum", ("a",), 8, 800), 1, 8).seconds(H200) == 1400 / H200.link
    collective = Collective("psum", ("a",), 8, 800)
    assert Traffic(collective, 3, 8).sent == 3 * 2 * 7 / 8 * 800


def test_best_mesh() -> None:
    assert best(FULL, Workload("serve", 8, 131072), 1, H200) is None
    found = best(FULL, Workload("serve", 8, 131072), 8, H200)
    assert found is not None and found.fits and found.mesh.size == 8


def test_one_row_is_split_over_its_cache() -> None:
    found = best(FULL, Workload("serve", 1, 131072), 16, H200)  # 16 devices cannot split one row otherwise
    assert found is not None and found.fits and found.mesh.seq > 1


def test_one_long_prompt_is_split_over_its_tokens() -> None:
    work = Workload("prefill", 1, 1 << 20)
    found = best(FULL, work, 64, DEVICES["H800"])  # 64 devices cannot split one row otherwise
    assert found is not None and found.fits and found.mesh.seq > 1 and found.work.batch == 1
    with_rows = best(FULL, dataclasses.replace(work, context=131072, batch=None), 16, H200)
    assert with_rows is not None and with_rows.mesh.seq == 1
    assert with_rows.fits and with_rows.work.batch == with_rows.largest_batch


@pytest.mark.parametrize("work", [Workload("serve", 4, 512), Workload("prefill", 2, 512)])
def test_best_is_the_best_of_all(work: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_with_limits", lambda config, plan: plan)  # most of the time, and no matter here
    plans = []
    for mesh in factorings(4, "serve", sequence=work.mode != "serve"):
        with contextlib.suppress(UserError):
            plans.append(make_plan(SMALL, work, mesh, H200))
    found = best(SMALL, work, 4, H200)
    assert found is not None and found.tokens_per_second == max(plan.tokens_per_second for plan in plans)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (Workload("serve", 3, 512), "batch 3 is not a multiple of 2"),
        (Workload("serve", 4, 511), "context 511 is not a multiple of 2"),
    ],
)
def test_what_does_not_divide(size: Workload, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_plan(SMALL, size, MeshShape(data=2, seq=2), H200)


# --- temporaries ---------------------------------------------------------------------------------------------------

X = jax.ShapeDtypeStruct((100, 100), jnp.float32)
SIZE = 100 * 100 * F32


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x + 1, 0),  # an output
        (lambda x: jnp.sum(jnp.exp(x) * 2), 0),  # fused into the sum
        (lambda x: jnp.sum((x @ x) @ x), 2 * SIZE),
        (lambda x: jnp.sum(((x @ x) @ x) @ x), 2 * SIZE),  # the first is gone when the third is made
        (lambda x: jnp.sum((x @ x).reshape(-1)), SIZE),
        (lambda x: x.at[0].set(1.0), 0),  # in place
        (lambda x: jnp.sum(lax.scan(lambda c, _: (c.at[0].add(1.0), None), x @ x, length=9)[0]), SIZE),
        (lambda x: jnp.sum(lax.scan(lambda c, _: (c, jnp.sum(c @ x @ x)), x @ x, length=9)[1]), 3 * SIZE),
        (lambda x: jnp.sum(lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x)), 2 * SIZE),
    ],
)
def test_temporaries_by_hand(function: Any, expected: int) -> None:
    assert abs(temporaries(function, X) - expected) < 0.1 * SIZE


def test_temporaries_are_those_of_one_device() -> None:
    mesh = jax.sharding.AbstractMesh((4,), ("a",), axis_types=(AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("a")
    function = jax.shard_map(lambda x: x @ x.T @ x, mesh=mesh, in_specs=spec, out_specs=spec)
    assert temporaries(function, X) == 25 * 25 * F32


# --- compilers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["serve", "prefill", "train"])
def test_the_compiler_counts_the_same_arguments(mode: Any) -> None:
    work, mesh = Workload(mode, 8, 32, chunk=16, dtype="float32"), MeshShape(data=2, expert=4)
    counted = arguments(SMALL, work, mesh, 0).arguments
    found = compiling.compile_step(SMALL, work, mesh, "cpu", H200)
    inputs = found.arguments - counted
    assert 0 <= inputs <= 8 * 32 * F32 + 64  # tokens, lengths, the optimiser's count


def test_missing_wheels_and_wrong_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("jax_cuda13_plugin", "jax_plugins"):  # there are two wheels
        monkeypatch.setattr(
            compiling.importlib.util, "find_spec", lambda name, missing=missing: name != missing or None
        )
        with pytest.raises(UserError, match="pip install --no-deps jax-cuda13-plugin=="):
            compiling.check_backend("cuda")
    monkeypatch.setattr(compiling.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="libtpu"):
        compiling.check_backend("tpu")
    with pytest.raises(UserError, match="compiles for H100, H800, H200, not for A100"):
        compiling.compile_step(SMALL, Workload("serve", 16, 32), MeshShape(data=16), "cuda", DEVICES["A100"])
    monkeypatch.undo()
    with pytest.raises(UserError, match="16 CPU devices are needed"):
        compiling.compile_step(SMALL, Workload("serve", 16, 32), MeshShape(data=16), "cpu", H200)


@pytest.mark.parametrize(
    ("device", "count", "name"),
    [("v5p", 16, "v5p:2x2x4"), ("v5p", 512, "v5p:8x8x8"), ("v6e", 8, "v6e:2x4"), ("v5e", 4, "v5e:2x2")],
)
def test_tpu_slices_have_names(device: str, count: int, name: str) -> None:
    assert compiling.tpu_topology(DEVICES[device], count) == name


@pytest.mark.parametrize(("device", "count"), [("v5p", 12), ("v5p", 4), ("v6e", 512)])
def test_no_other_tpu_slices(device: str, count: int) -> None:
    with pytest.raises(UserError, match=f"no slice of {count} {device} is known: choose a power of two from"):
        compiling.tpu_topology(DEVICES[device], count)


# --- command line --------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(compiling, "prepare", lambda *_: None)  # this process has its devices
    with pytest.raises(SystemExit) as caught:
        command.main(args)
    out = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, out.out, out.err


def test_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--config", "m1-80k", "--devices", "8xH200", "--quantize", "int8", "--context", "131072", "--batch", "8"]
    code, out, _ = run(capsys, monkeypatch, *options)
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "parameters 59.76" in lines and "cache 5.37" in lines and "it fits" in lines
    assert any("bound by memory" in line for line in lines)
    code, out, _ = run(capsys, monkeypatch, *options, "--json")
    values = json.loads(out)
    assert values["memory"]["parameters"] == pytest.approx(59.76e9, abs=5e6)
    assert values["mesh"]["expert"] == 8 and values["fits"] is True
    assert values["collectives"][0]["devices"] == 8


def test_a_plan_that_an_estimate_does_not_decide_says_so() -> None:
    """Such as a training step on 64 H200s, of whose temporaries the compiler needs 0.6 of the estimate."""

    def verdict(kind: str, temporaries: float, compiled: str | None = None, mode: Any = "train") -> str:
        memory = Memory(int(20e9), int(66e9), 0, 0, int(temporaries), compiled)
        work = Workload(mode, 64, 4096)
        plan = Plan(MeshShape(fsdp=8, expert=8), work, DEVICES[kind], memory, (), 1e15, Roofline(1, 1, 1), None, None)
        (line,) = (line for line in command.report(plan, "m1").splitlines() if "fit" in line.lower())
        return line

    assert verdict("H200", 50e9) == "it fits" and verdict("H200", 160e9) == "IT DOES NOT FIT"
    assert verdict("H200", 93e9).endswith("needed 0.35 to 1.1 times the temporaries estimated: --compile cuda decides")
    assert verdict("H200", 160e9, mode="serve").startswith("IT DOES NOT FIT by the estimate")
    assert verdict("H200", 54e9).startswith("it fits by the estimate") and verdict("H200", 54e9, "cuda") == "it fits"
    assert verdict("v5p", 10e9).endswith("--compile tpu decides")


def test_limits_of_a_compiled_plan_say_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compiling.Compiled("cuda", 0, int(60e9), 1.0)
    monkeypatch.setattr(compiling, "compile_step", lambda *_: compiled)
    options = ["--config", "m1-80k", "--devices", "64xH800", "--context", "131072", "--batch", "64"]
    code, out, _ = run(capsys, monkeypatch, *options, "--compile", "cuda")
    assert code == 0 and "IT DOES NOT FIT" in out and "in proportion to the cuda compiler's figure" in out
    code, out, _ = run(capsys, monkeypatch, *options, "--compile", "cuda", "--json")
    values = json.loads(out)
    assert values["fits"] is False and values["largest_batch"] < 64


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_official()))
    options = ["--config", str(tmp_path), "--devices", "2xH100", "--context", "512", "--batch", "4", "--sweep"]
    code, out, _ = run(capsys, monkeypatch, *options)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["devices", "1", "2"]
    monkeypatch.setattr(planning, "best", lambda config, work, count, device: plan if count == 2 else None)
    plan = make_plan(SMALL, Workload("serve", 4, 512), MeshShape(expert=2), H200)
    code, out, _ = run(capsys, monkeypatch, *options, "--json")
    assert [(row["devices"], row["fits"]) for row in json.loads(out)] == [(1, False), (2, True)]


def test_auto_is_the_mesh_for_the_devices(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "make_plan", lambda config, work, mesh, device: pytest.fail(str(mesh)))
    for mesh in ([], ["--mesh", "auto"]):
        with pytest.raises(pytest.fail.Exception, match=r"^data=1,expert=8,tensor=1$"):
            run(capsys, monkeypatch, "--config", "m1-80k", "--devices", "8xH200", *mesh)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "8xZ80"], "devices '8xZ80': expected a count and a kind"),
        (["--devices", "8xH200", "--mesh", "expert=4"], "has 4 devices, --devices says 8"),
        (["--devices", "8xH200", "--mesh", "tensor=3,data=1"], "has 3 devices"),
        (["--devices", "24xH200", "--mesh", "tensor=24"], "heads = 64 cannot be split 24 ways"),
        (["--devices", "8xH200", "--mode", "train", "--quantize", "int8"], "--quantize is for serving"),
        (["--devices", "8xH200", "--context", "99999999"], "exceeds the model's 10240000 tokens"),
        (["--devices", "8xH200", "--sweep", "--mesh", "expert=8"], "drop --mesh"),
        (["--devices", "8xH200", "--batch", "0"], "batch must be 1 or more"),
        (["--config", "m2"], "known m1-80k"),
        (["--mod", "serve"], "unrecognized arguments"),
    ],
)
def test_bad_command_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    required = [f"--{k}={v}" for k, v in (("config", "m1-80k"), ("devices", "8xH200")) if f"--{k}" not in options]
    code, _, err = run(capsys, monkeypatch, *required, *options)
    assert code == 2 and message in err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_devices_by_the_names_that_jax_gives_them() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H200": "H200",
        "TPU v5 lite": "v5e",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
    }
    for kind, name in names.items():
        assert known(kind) == DEVICES[name], kind
    assert known("cpu") is None and known("TPU v4") is None


def test_devices() -> None:
    assert parse_devices("8xH200") == (8, H200)
    assert parse_devices("512 x h800")[0] == 512
    assert parse_devices("H100") == (1, DEVICES["H100"])
    assert DEVICES["H800"].link < DEVICES["H100"].link
