"""Factors beside a model: what it computes with them, their gradients, runs that train them, and their folders."""

import dataclasses
import errno
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import m1jax
from m1jax.config import M1Config
from m1jax.converting import convert
from m1jax.errors import UserError
from m1jax.generate import main as generate
from m1jax.kernels.experts import quantize
from m1jax.loading import open_parameters
from m1jax.lora import adapter as adapter_module
from m1jax.lora.adapted import IN_AXES, A, B, has_factors
from m1jax.lora.adapter import PREFIX, WEIGHTS, open_adapter, save_adapter
from m1jax.lora.factors import Base, Factors, Lora
from m1jax.model import M1, build
from m1jax.params import flatten, param_table
from m1jax.saving import save
from m1jax.sharding.mesh import MeshShape, make_mesh
from m1jax.sharding.rules import shardings
from m1jax.train import guard, parts, supervised
from m1jax.train.loss import Balance
from m1jax.train.step import accumulated, beside, cross_entropy
from m1jax.verify import verify
from m1jax.weights import expected
from tests.checkpoints import write_checkpoint
from tests.tools import HELLO, random_model, rms_error, variant
from tests.training import losses, rows, settings, write_corpus

CONFIG = variant(vocab_size=64, layer_types=("lightning", "lightning", "softmax"), num_hidden_layers=3)
LORA = Lora.of(CONFIG, 4, 8.0, ("lightning.*", "softmax.*"))
BATCH = {
    "tokens": np.random.default_rng(0).integers(0, 64, (1, 4, 12)).astype(np.int32),
    "targets": np.random.default_rng(1).integers(0, 64, (1, 4, 12)).astype(np.int32),
    "segments": np.repeat([[[1] * 12, [1] * 5 + [2] * 7]], 2, axis=1).astype(np.int32),
    "weights": np.ones((1, 4, 12), np.float32),
}
LOSS = cross_entropy("float32", "layer", Balance(0.01))


def random_factors(seed: int = 0) -> Factors:
    """Of which B is not 0."""
    keys = iter(jax.random.split(jax.random.key(seed), 2 * len(LORA.targets)))
    return LORA.build(CONFIG, lambda _, spec: 0.2 * jax.random.normal(next(keys), spec.shape))


def added(path: str, factors: Factors) -> np.ndarray:
    """scale · B A of every layer, in the shape of the parameter."""
    group, name = path.split(".")
    a, b = (np.asarray(factors[group][name][part], np.float64) for part in (A, B))
    n, shape = a.shape[0], param_table(CONFIG)[path].shape
    return LORA.scale * np.einsum("nor,nri->noi", b.reshape(n, -1, 4), a.reshape(n, 4, -1)).reshape(shape)


def merged(model: M1, factors: Factors) -> M1:
    """The model with the products in its weights."""
    arrays = flatten(model)
    products = {path: added(path, factors) for path in LORA.targets}
    return build(model.config, lambda p, _: jnp.asarray(arrays[p] + products.get(p, 0.0), jnp.float32))


def quantized(model: M1, kind: Any) -> M1:
    changed = {}
    for name in ("gate_up", "down"):
        param: nnx.Param = getattr(model.moe, name)
        changed[name] = nnx.Param(quantize(param[...], kind), axes=param.axes)
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, **changed))


# --- the model


def test_factors_are_what_their_product_in_the_weights_is() -> None:
    model, factors = random_model(CONFIG), random_factors()
    both, whole = Base(model, LORA.scale).with_factors(factors), merged(model, factors)
    tokens = BATCH["tokens"][0]
    assert rms_error(model(tokens), whole(tokens)) > 0.1
    assert rms_error(both(tokens), whole(tokens)) < 2e-6
    state = both.init_state(4, 16)
    _, state = both.step(tokens[:, :7], state)
    logits, state = both.step(tokens[:, 7:8], state)
    assert rms_error(logits[:, 0], whole(tokens)[:, 7]) < 2e-6
    assert has_factors(both) and not has_factors(model)


def test_new_factors_change_nothing() -> None:
    model = random_model(CONFIG)
    fresh = LORA.init(CONFIG, jax.random.key(0))
    assert all(bool(jnp.any(x != 0)) == path.endswith(A) for path, x in flatten(fresh).items())
    tokens = BATCH["tokens"][0]
    assert np.array_equal(Base(model, LORA.scale).with_factors(fresh)(tokens), model(tokens))


@pytest.mark.parametrize("remat", ["none", "projections", "layer"])
def test_gradients_follow_from_those_of_the_whole_matrices(remat: Any) -> None:
    """d A = scale · Bᵀ dW and d B = scale · dW Aᵀ; packed rows, routers balanced."""
    model, factors = random_model(CONFIG), random_factors()
    loss = cross_entropy("float32", remat, Balance(0.01))
    base = Base(model, LORA.scale)
    got, metrics = jax.jit(lambda f, b: accumulated(beside(loss, base), f, b))(factors, BATCH)
    want, wanted = jax.jit(lambda m, b: accumulated(loss, m, b))(merged(model, factors), BATCH)
    assert abs(metrics["loss"] / wanted["loss"] - 1) < 1e-6
    for path in LORA.targets:
        group, name = path.split(".")
        a, b = (np.asarray(factors[group][name][part], np.float64) for part in (A, B))
        n = a.shape[0]
        a, b = a.reshape(n, 4, -1), b.reshape(n, -1, 4)
        whole = np.asarray(flatten(want)[path], np.float64).reshape(n, b.shape[1], a.shape[2])
        d_a, d_b = np.einsum("nor,noi->nri", b, whole), np.einsum("noi,nri->nor", whole, a)
        for part, d in ((A, d_a), (B, d_b)):
            assert rms_error(np.asarray(got[group][name][part]).reshape(d.shape), LORA.scale * d) < 1e-5, (path, part)


def gradient(base: Base, factors: Factors, batch: Any) -> Factors:
    return accumulated(beside(LOSS, base), factors, batch)[0]


@pytest.mark.parametrize(
    ("kind", "mesh"),
    [("int8", "fsdp=2,expert=2,tensor=2"), ("int8", "expert=4"), ("int4", "data=2,expert=2"), (None, "seq=2,fsdp=2")],
)
def test_on_a_mesh_gradients_are_those_of_one_device(kind: Any, mesh: str) -> None:
    """Of experts that are quantised, too: each device gathers what fsdp splits of them."""
    model, factors = random_model(CONFIG), random_factors()
    base = Base(model if kind is None else quantized(model, kind), LORA.scale)
    want = flatten(jax.jit(gradient)(base, factors, BATCH))
    shape = MeshShape.parse(mesh)
    devices = make_mesh(shape, "train", jax.devices()[: shape.size])
    with jax.set_mesh(devices):
        placed = (jax.device_put(x, shardings(CONFIG, devices, x)) for x in (base, factors))
        got = flatten(jax.jit(gradient)(*placed, BATCH))
    for path in want:
        assert rms_error(got[path], want[path]) < 1e-5, path


def test_nothing_is_kept_of_weights_that_are_not_trained() -> None:
    """No copy of a stack for the gradient, which weights that come to the loop as its input would have."""
    config = dataclasses.replace(CONFIG, layer_types=("lightning", "softmax") * 4, num_hidden_layers=8)
    lora = Lora.of(config, 2, 2.0, ("softmax.*",))
    base, factors = Base(random_model(config), 1.0), lora.init(config, jax.random.key(0))
    batch = jax.tree.map(lambda x: x[:, :1, :2], BATCH)  # activations are small beside weights
    compiled = jax.jit(gradient).lower(base, factors, batch).compile()
    experts = base.model.moe.gate_up[...].nbytes + base.model.moe.down[...].nbytes
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < experts / 2


# --- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and a model to train beside."""
    path = write_corpus(tmp_path_factory.mktemp("lora"))
    config = M1Config.from_file(path / "config.json")
    save(random_model(config), path / "model", tokenizer=HELLO)
    return path


def run(folder: Path, out: Path, **changes: Any) -> None:
    lora = {"rank": 2, "alpha": 4.0, "quantize": "int8", **changes.pop("lora", {})}
    model = {"config": "", "path": str(folder / "model"), "tokenizer": "", **changes.pop("model", {})}
    supervised.run(settings(folder, out, model=model, lora=lora, **changes))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run that nobody interrupted, beside int8 experts."""
    run(folder, folder / "whole")
    return folder / "whole"


def test_a_run_leaves_an_adapter_of_its_model(folder: Path, whole: Path, tmp_path: Path) -> None:
    found = rows(whole)
    assert found[-1]["loss"] < found[0]["loss"] and not (whole / "model").exists()
    config = M1Config.from_file(folder / "model")
    tokens = np.random.default_rng(0).integers(0, 512, (2, 9))
    plain = m1jax.load(folder / "model", quantize="int8")
    trained = m1jax.load(folder / "model", quantize="int8", adapter=whole / "adapter")
    assert rms_error(trained(tokens), plain(tokens)) > 1e-3
    # What was trained, unmerged.
    lora = Lora.of(config, 2, 4.0, ("*",))
    adapter = open_adapter(whole / "adapter", config)
    adapter.check(lora, config)
    factors = adapter.factors(lora, config)
    assert rms_error(Base(plain, lora.scale).with_factors(factors)(tokens), trained(tokens)) < 2e-6
    # Written and read back: the same bits.
    save_adapter(factors, tmp_path / "again", lora, config, "somewhere")
    first, second = (load_file(p / WEIGHTS) for p in (whole / "adapter", tmp_path / "again"))
    assert first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)
    given = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert given["target_modules"] == [path.split(".")[1] for path in IN_AXES] and given["lora_alpha"] == 4.0


def test_interrupted_it_goes_on_bit_by_bit(folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real, steps = folder / "broken", supervised.Supervised.step, []

    def dies(self: Any, state: Any, number: int, report: Any) -> Any:
        steps.append(number)
        if number == 5:
            raise KeyboardInterrupt
        return real(self, state, number, report)

    with monkeypatch.context() as patch:
        patch.setattr(supervised.Supervised, "step", dies)
        with pytest.raises(KeyboardInterrupt):
            run(folder, out)
    run(folder, out)
    assert steps[-1] == 5 and losses(out) == losses(whole)
    first, second = (load_file(p / "adapter" / WEIGHTS) for p in (whole, out))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    with pytest.raises(
        UserError, match=r"written with lora 'rank 2, alpha 4.0, experts in int8, beside .*: choose another"
    ):
        run(folder, out, lora={"quantize": ""})
    with pytest.raises(UserError, match=r"written with lora 'rank 2"):
        supervised.run(settings(folder, out, model={"config": "", "path": str(folder / "model"), "tokenizer": ""}))


def test_an_adapter_is_gone_on_from(folder: Path, whole: Path, tmp_path: Path) -> None:
    """Its first loss is not that of new factors; with a rate of nearly 0 it comes out as it went in."""
    still = {"learning_rate": 1e-30, "warmup": 0, "decay": 0, "weight_decay": 0.0}
    run(folder, tmp_path / "more", lora={"path": str(whole / "adapter")}, steps=1, optimizer=still)
    assert abs(rows(tmp_path / "more")[0]["loss"] - rows(whole)[0]["loss"]) > 1e-3
    first, second = (load_file(p / "adapter" / WEIGHTS) for p in (whole, tmp_path / "more"))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    with pytest.raises(UserError, match=r"has rank 2 and alpha 4, \[lora\] rank 3 and alpha 4: make them agree"):
        run(folder, tmp_path / "no", lora={"path": str(whole / "adapter"), "rank": 3})
    with pytest.raises(UserError, match=r"does not fit lora.targets: they differ in model.layers.1.self_attn"):
        run(folder, tmp_path / "no", lora={"path": str(whole / "adapter"), "targets": ["lightning.*"]})
    with pytest.raises(UserError, match="is where the trained model goes"):
        run(folder, whole, lora={"path": str(whole / "adapter")}, steps=9)


def test_rates_name_factors(folder: Path, whole: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "out", steps=2, optimizer={"rates": "*=0,softmax.*.lora_b=1", "warmup": 0, "decay": 0})
    for name, x in load_file(tmp_path / "out" / "adapter" / WEIGHTS).items():
        assert "lora_A" in name or bool(x.any()) == (".1.self_attn" in name), name
    with pytest.raises(UserError, match=r"no parameter is named 'moe.router': there are lightning"):
        run(folder, tmp_path / "no", optimizer={"rates": "moe.router=0"})


def test_a_bad_step_names_the_layer(folder: Path, whole: Path, tmp_path: Path) -> None:
    """With the factors that are in it, which an adapter brings along."""
    shutil.copytree(whole / "adapter", tmp_path / "bad")
    given = load_file(whole / "adapter" / WEIGHTS)
    given[f"{PREFIX}model.layers.1.self_attn.o_proj.lora_B.weight"][3] = np.nan
    save_file(given, tmp_path / "bad" / WEIGHTS)
    with pytest.raises(UserError, match=r"step 1: NaN or infinity first appears in layer 1 \(softmax\); the weights"):
        run(folder, tmp_path / "out", lora={"path": str(tmp_path / "bad")})


def test_a_bad_gradient_names_the_factor() -> None:
    base, factors = Base(random_model(CONFIG), LORA.scale), random_factors()
    factors["softmax"]["o_proj"][B] = factors["softmax"]["o_proj"][B].at[0, 0, 0].set(jnp.nan)
    assert guard.bad_gradients(LOSS, factors, BATCH, base).startswith("lightning.out_proj.lora_a[0]")


def test_a_full_disk_leaves_no_adapter(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's last checkpoint is there: the same command writes it."""
    real = adapter_module.write_file

    def full(file: Path, entries: Any) -> None:
        real(file, entries[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(adapter_module, "write_file", full)
        with pytest.raises(UserError, match="No space left on device: make room, then run again"):
            run(folder, tmp_path / "out", steps=1, optimizer={"warmup": 0, "decay": 0})
    assert not (tmp_path / "out" / "adapter").exists()
    run(folder, tmp_path / "out", steps=1, optimizer={"warmup": 0, "decay": 0})
    m1jax.load(folder / "model", adapter=tmp_path / "out" / "adapter")
    (tmp_path / "out" / "adapter" / "m1jax_adapter.json").unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    with pytest.raises(UserError, match="exists and is not empty"):
        run(folder, tmp_path / "out", steps=1, optimizer={"warmup": 0, "decay": 0})


def test_texts_of_other_adapters_are_not_mixed(folder: Path, whole: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "1 + 1"}\n')
    flags = [
        "--model",
        str(folder / "model"),
        "--raw",
        "--max-tokens",
        "2",
        "--input",
        str(source),
        "--output",
        str(output),
    ]

    def code(*more: object) -> object:
        with pytest.raises(SystemExit) as ended:
            generate([*flags, *map(str, more)])
        return ended.value.code

    assert code() == 0
    text = output.read_text()
    assert code("--adapter", whole / "adapter") == code("--adapter", tmp_path) == 2
    assert output.read_text() == text


def test_models_of_one_kind_of_attention() -> None:
    for kind, other in (("lightning", "softmax"), ("softmax", "lightning")):
        config = variant(vocab_size=64, layer_types=(kind,) * 2)
        lora = Lora.of(config, 2, 2.0, ("lightning.*", "softmax.*"))
        assert lora.targets and all(path.startswith(kind) for path in lora.targets)
        with pytest.raises(UserError, match=r"lora.targets = .*are none of this model's"):
            Lora.of(config, 2, 2.0, (f"{other}.*",))
        base, tokens = Base(random_model(config), 1.0), BATCH["tokens"][0]
        assert rms_error(base.with_factors(lora.init(config, jax.random.key(0)))(tokens), base.model(tokens)) < 1e-6


def test_what_a_run_cannot_do_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for change, message in (
        ({"lora": {"targets": []}}, r"lora.targets = \[\] are none of this model's"),
        ({"lora": {"targets": ["moe.*"]}}, r"'moe.\*' names no matrix that can have factors: lightning.qkv_proj"),
        ({"lora": {"rank": -1}}, "lora.rank = -1 must be 0"),
        ({"lora": {"rank": 0}}, "lora.alpha has no meaning without factors: set lora.rank"),
        ({"lora": {"alpha": 0.0}}, "lora.alpha = 0.0 must be more than 0"),
        ({"lora": {"path": str(tmp_path / "none")}}, "none is not a folder: give one with adapter_config.json"),
        ({"model": {"path": "", "config": str(folder / "config.json")}}, "factors are trained beside a model"),
        ({"model": {"save_dtype": "bfloat16"}}, "save_dtype has no meaning with"),
    ):
        with pytest.raises(UserError, match=message):
            run(folder, tmp_path / "out", **change)
    monkeypatch.setattr(parts.sizes, "free_memory", lambda _: 1000)
    with pytest.raises(UserError, match=r"for the model and what is trained beside it, 0.0 GB are free"):
        run(folder, tmp_path / "out")
    model = {"config": "", "path": str(folder / "model"), "tokenizer": ""}
    with pytest.raises(UserError, match=r"or factors beside this one \(\[lora\]"):
        supervised.run(settings(folder, tmp_path / "out", model=model))


# --- folders


def peft(folder: Path, config: M1Config, names: list[str], rank: int = 3, **given: Any) -> Path:
    """An adapter of these matrices as PEFT writes it."""
    rng, tensors = np.random.default_rng(0), {}
    for name, slot in expected(config).items():
        if any(re.search(pattern, name) for pattern in names):
            module = PREFIX + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((rank, slot.shape[1])).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.standard_normal((slot.shape[0], rank)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / WEIGHTS)
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, "bias": "none", "target_modules": ["x"], **given}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("official") / "model", np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s.shape).astype(np.float32) for n, s in expected(CONFIG).items()}
    return write_checkpoint(folder, CONFIG, tensors)


@pytest.mark.parametrize("rslora", [False, True])
def test_any_matrix_of_the_official_layout_is_added_to(official: Path, tmp_path: Path, rslora: bool) -> None:
    """Experts, router and head, too; read whole, in blocks, and converted, the same weights."""
    names = [
        r"0.self_attn.(qkv|out)_proj",
        r"2.self_attn.[kov]_proj",
        r"1.*experts.[02].w[13]",
        r"moe.gate.weight",
        "lm_head",
    ]
    folder = peft(tmp_path / "a", CONFIG, names, use_rslora=rslora)
    given, scale = load_file(folder / WEIGHTS), 2 / (3**0.5 if rslora else 3)
    plain = m1jax.load(official)
    want = {path: np.array(x, np.float64) for path, x in flatten(plain).items()}
    changed = set()
    for name, slot in expected(CONFIG).items():
        module = PREFIX + name.removesuffix(".weight")
        if f"{module}.lora_A.weight" in given:
            product = given[f"{module}.lora_B.weight"].astype(np.float64) @ given[f"{module}.lora_A.weight"]
            at = want[slot.target][slot.index]
            at += scale * product.reshape(at.shape)
            changed.add(slot.target)
    assert changed == {
        *("lightning.qkv_proj", "lightning.out_proj", "softmax.k_proj", "softmax.v_proj", "softmax.o_proj"),
        *("moe.gate_up", "moe.router", "lm_head"),
    }
    for dtype, limit in (("float32", 2e-7), ("bfloat16", 3e-3)):
        got = flatten(m1jax.load(official, dtype, adapter=folder))
        assert all(rms_error(got[path], want[path]) < limit for path in want)
    read = open_parameters(official, adapter=folder).read
    for path, spec in param_table(CONFIG).items():
        block = tuple(slice(n // 3, n - n // 4) for n in spec.shape)
        part = read(path, spec, block, np.dtype(np.float32))
        assert rms_error(part, want[path][block]) < 2e-7 or not part.size, path
    convert(official, tmp_path / "converted", adapter=folder)
    got, loaded = (flatten(m1jax.load(official, adapter=folder)), flatten(m1jax.load(tmp_path / "converted")))
    assert all(np.array_equal(got[path], loaded[path]) for path in got)
    small = flatten(m1jax.load(official, "bfloat16", "int8", adapter=folder))
    whole = quantize(jnp.asarray(want["moe.gate_up"], jnp.float32), "int8")
    assert np.mean(np.asarray(small["moe.gate_up.values"]) != np.asarray(whole.values)) < 1e-3


def test_adapters_that_are_more_than_a_product_are_refused(official: Path, tmp_path: Path) -> None:
    names, cases = [r"0.self_attn.qkv_proj"], iter(range(100))

    def refused(message: str, change: Any = None, **given: Any) -> None:
        folder = peft(tmp_path / str(next(cases)), CONFIG, names, **given)
        if change is not None:
            change(folder)
        with pytest.raises(UserError, match=message):
            m1jax.load(official, adapter=folder)

    refused("use_dora = True is not supported", use_dora=True)
    refused("is not of LoRA: peft_type must be LORA", peft_type="LOHA")
    refused("init_lora_weights = 'pissa' is not supported", init_lora_weights="pissa")
    refused("use_qalora = True is not supported", use_qalora=True)
    refused("use_rslora = 'false' is not supported", use_rslora="false")
    refused("target_parameters = .*is not supported", target_parameters=["mlp.experts.gate_up_proj"])
    refused("bias = 'all' is not supported", bias="all")
    refused("modules_to_save = .'lm_head'. is not supported", modules_to_save=["lm_head"])
    refused("rank_pattern = .* is not supported", rank_pattern={"qkv_proj": 5})
    for bad in ("x", True, 0, 10**400, None):
        refused("r = .* must be an integer from 1 to", r=bad)
    for bad in ("x", True, 0, -1.0, 10**400, float("nan"), float("inf")):
        refused("lora_alpha = .* must be a number above 0", lora_alpha=bad)
    refused(r"misshapen: .*qkv_proj.lora_A.weight is \[3, 32\], not \[5, 32\]", r=5)
    refused("has no adapter_model.safetensors", lambda folder: (folder / WEIGHTS).unlink())
    refused("is truncated", lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4]))
    refused("adapter_config.json is not valid JSON", lambda folder: (folder / "adapter_config.json").write_text("{"))

    def with_more(name: str, kind: str = "float32") -> Any:
        def change(folder: Path) -> None:
            tensors = load_file(folder / WEIGHTS)
            save_file({**tensors, name: np.zeros((3, 32), kind)}, folder / WEIGHTS)

        return change

    refused(
        "of no matrix of this model: base_model.model.model.layers.9.x.lora_A.weight",
        with_more(PREFIX + "model.layers.9.x.lora_A.weight"),
    )
    refused("of no matrix of this model: .*norm.lora_A.weight", with_more(PREFIX + "model.norm.lora_A.weight"))
    alone = PREFIX + "model.layers.1.self_attn.qkv_proj.lora_B.weight"
    refused("lora_A without lora_B or the other way round: model.layers.1.self_attn.qkv_proj", with_more(alone))
    first = "model.layers.0.self_attn.qkv_proj.lora_A.weight"
    refused("there twice: model.layers.0.self_attn.qkv_proj.lora_A", with_more(first))
    refused(
        "not float32, float16 or bfloat16: .*layers.0.self_attn.qkv_proj.lora_A", with_more(PREFIX + first, "int32")
    )
    refused("has no factors", lambda folder: save_file({}, folder / WEIGHTS))
    folder = peft(tmp_path / "experts", CONFIG, [r"0.*experts.0.w1"])
    convert(official, tmp_path / "int8", quantize="int8")
    with pytest.raises(UserError, match="adapts experts, which are stored in int8: use it with the model they are of"):
        m1jax.load(tmp_path / "int8", adapter=folder)
    m1jax.load(tmp_path / "int8", adapter=peft(tmp_path / "attention", CONFIG, names))
    with pytest.raises(UserError, match="is an adapter, not a model: give the model, and this as its adapter"):
        m1jax.load(folder)
    convert(official, tmp_path / "with", adapter=folder)
    with pytest.raises(UserError, match="has an adapter in its weights"):
        verify(official, tmp_path / "with")
    # What PEFT saves beside the factors of a head is passed over.
    head = peft(tmp_path / "head", CONFIG, ["lm_head"])
    with_more(PREFIX + "lm_head.base_layer.weight")(head)
    heads = [flatten(m1jax.load(official, adapter=a))["lm_head"] for a in (None, head)]
    assert not np.array_equal(*heads)
