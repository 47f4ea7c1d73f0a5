"""Meshes and rules: known bytes per device of the released M1, and what is refused."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from m1jax import model as m1
from m1jax.errors import UserError
from m1jax.params import ParamSpec
from m1jax.presets import find_config
from m1jax.sharding.mesh import PRESETS, MeshShape, Use, abstract_mesh, choose, factorings, make_mesh
from m1jax.sharding.rules import check, rules_of, shardings, spec
from tests.tools import variant

FULL = find_config("m1-80k")


def bytes_per_device(mesh: AbstractMesh, *trees: Any) -> int:
    total = 0
    for tree in trees:
        pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings(FULL, mesh, tree)), strict=True)
        total += sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)
    return total


def int8_experts(path: str, spec: ParamSpec) -> Any:
    """Experts as int8 with a float32 scale for each output, the rest bfloat16."""
    if path in ("moe.gate_up", "moe.down"):
        scales = jax.ShapeDtypeStruct(spec.shape[:-1], jnp.float32)
        return {"values": jax.ShapeDtypeStruct(spec.shape, jnp.int8), "scales": scales}
    return jax.ShapeDtypeStruct(spec.shape, jnp.dtype(spec.dtype or "bfloat16"))


def test_int8_experts_on_8_devices() -> None:
    mesh = abstract_mesh(MeshShape.parse("data=1,expert=8,tensor=1"))
    model = m1.build(FULL, int8_experts)
    assert bytes_per_device(mesh, model) == pytest.approx(59.76e9, abs=5e6)
    state = jax.eval_shape(lambda: m1.abstract(FULL).init_state(8, 131072))
    assert bytes_per_device(mesh, model, state) == pytest.approx(65.42e9, abs=5e6)


def test_bfloat16_on_64_devices_with_128k_context() -> None:
    mesh = abstract_mesh(choose(FULL, 64))
    model = m1.abstract(FULL)
    state = jax.eval_shape(lambda: model.init_state(64, 131072))
    assert bytes_per_device(mesh, model, state) == pytest.approx(24.62e9, abs=5e6)


def test_training_on_512_devices() -> None:
    mesh = abstract_mesh(choose(FULL, 512, "train"), "train")
    model = m1.abstract(FULL, "float32")
    optimizer = jax.eval_shape(optax.adamw(1e-4).init, model)
    assert bytes_per_device(mesh, model, optimizer) == pytest.approx(10.89e9, abs=5e6)


@pytest.mark.parametrize("use", ["serve", "train"])
def test_every_preset_divides_the_released_model(use: Use) -> None:
    for preset in PRESETS[use]:
        assert preset.mesh.size == preset.devices
        check(FULL, abstract_mesh(preset.mesh, use))
        assert choose(FULL, preset.devices, use, preset.memory) == preset.mesh
        if use == "serve" and preset.weights in ("bfloat16", "int8"):
            model = m1.abstract(FULL) if preset.weights == "bfloat16" else m1.build(FULL, int8_experts)
            assert bytes_per_device(abstract_mesh(preset.mesh), model) < preset.memory * 1e9


def test_the_chooser_finds_a_mesh_for_other_models_and_machines() -> None:
    two_keys = variant(vocab_size=62)
    assert choose(two_keys, 2) == MeshShape(expert=2)
    assert choose(two_keys, 8) == MeshShape(expert=4, tensor=2)  # the preset would split 2 key heads 8 ways
    assert choose(FULL, 24) == MeshShape(data=3, expert=8)
    with pytest.raises(UserError, match="no mesh of 7 devices divides this model"):
        choose(two_keys, 7, "train")


@pytest.mark.parametrize("use", ["serve", "train"])
def test_factorings(use: Use) -> None:
    plain, every = list(factorings(12, use)), list(factorings(12, use, sequence=True))
    assert every[: len(plain)] == plain and all(mesh.seq == 1 for mesh in plain)
    assert len(plain) == 18 and len(set(every)) == len(every) == 40  # 12 = 2·2·3 over 3 axes, over 4
    assert {mesh.size for mesh in every} == {12} and {mesh.seq for mesh in every} == {1, 2, 3, 4, 6, 12}


def test_spelling_of_a_mesh() -> None:
    shape = MeshShape.parse("data=1, expert=8,seq=2")
    assert shape == MeshShape(seq=2, expert=8) and shape.size == 16
    assert str(shape) == "data=1,seq=2,expert=8,tensor=1" and MeshShape.parse(str(shape)) == shape
    for text, message in {
        "exper=8": "unknown axis 'exper'",
        "": "unknown axis ''",
        "expert=8,expert=2": "expert is given twice",
        "expert=x": "not of the form expert=8",
        "expert=0": "must be 1 or more",
    }.items():
        with pytest.raises(UserError, match=message):
            MeshShape.parse(text)


def test_meshes_that_do_not_fit_the_devices_are_refused() -> None:
    with pytest.raises(UserError, match="mesh data=1,expert=8,tensor=1 needs 8 devices, 1 are present"):
        make_mesh(MeshShape(expert=8), devices=jax.devices()[:1])
    with pytest.raises(UserError, match="fsdp is an axis of training only"):
        abstract_mesh(MeshShape(fsdp=2))
    mesh = make_mesh(MeshShape(), devices=jax.devices()[:1])
    assert mesh.axis_types == (AxisType.Auto,) * 4


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh is laid out by; a TPU of a single slice."""

    id: int
    process_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


@dataclasses.dataclass(frozen=True)
class Sliced(Chip):
    """A GPU, each machine of which XLA takes for a slice, or a TPU of several."""

    slice_index: int = 0


def torus(*sizes: int, kind: type[Chip] = Chip, first: int = 0, **changes: Any) -> list[Any]:
    """TPUs v5p."""
    places = enumerate(np.ndindex(*sizes))
    return [kind(first + i, i // 4, coords=place, **changes) for i, place in places]


def test_machines_of_one_mesh() -> None:
    """`jax.make_mesh` refuses GPUs of more than one; inner axes stay inside a machine."""
    chips: Any = [Sliced(i, i, "gpu", "NVIDIA H200", slice_index=i // 8) for i in range(64)]
    placed = make_mesh(MeshShape(expert=8, tensor=8), devices=chips).devices
    assert all(len({chip.slice_index for chip in row}) == 1 for row in placed.reshape(8, 8))
    assert make_mesh(MeshShape(fsdp=8, expert=8), "train", chips).shape["fsdp"] == 8


def test_meshes_of_a_torus() -> None:
    """Those that split one of its axes, and those over two slices, of which an outer axis takes one each."""
    for use in ("serve", "train"):
        shape = choose(FULL, 64, use)
        assert make_mesh(shape, use, torus(4, 4, 4)).devices.size == 64
    two = [chip for i in range(2) for chip in torus(2, 2, 2, kind=Sliced, first=8 * i, slice_index=i)]
    placed = make_mesh(MeshShape(data=2, expert=8), devices=two).devices
    assert [{chip.slice_index for chip in part.flat} for part in placed] == [{0}, {1}]
    four = [chip for i in range(4) for chip in torus(2, 1, 1, kind=Sliced, first=2 * i, slice_index=i)]
    with pytest.raises(UserError, match="over 4 TPU slices: one of its sizes must be a multiple of 4"):
        make_mesh(MeshShape(data=2, expert=2, tensor=2), devices=four)


def test_axes_that_do_not_divide_name_parameter_axis_and_sizes() -> None:
    for context, seq in ((1001, 2), (1024, 3)):
        short = dataclasses.replace(FULL, max_position_embeddings=context, num_local_experts=6)
        with pytest.raises(UserError, match=f"mesh axis seq={seq} cannot split caches: .* divides {context} tokens"):
            check(short, abstract_mesh(MeshShape(seq=seq)))
    with pytest.raises(UserError, match=r"softmax.k_proj: kv_heads = 8 cannot be split 32 ways .* work are 1, 2, 4, 8"):
        check(FULL, abstract_mesh(MeshShape(expert=32)))
    with pytest.raises(UserError, match="the mesh has axes rack: make it with m1jax"):
        check(FULL, jax.make_mesh((1,), ("rack",)))
    one_group = dataclasses.replace(FULL, intermediate_size=128)  # of int4
    with pytest.raises(UserError, match=r"moe.down.scales: expert_width = 1 cannot be split 2 ways"):
        check(one_group, abstract_mesh(MeshShape(expert=4, tensor=2)), "int4")
    with pytest.raises(UserError, match=r"moe.down.values: groups of expert_width = 1 cannot be split 2 ways"):
        shardings(one_group, abstract_mesh(MeshShape(expert=4, tensor=2)), m1.abstract(one_group, quantize="int4"))
    assert choose(one_group, 16, quantize="int4").tensor == 1
    with pytest.raises(UserError, match="the experts cannot be held in int4: in-channels"):
        check(dataclasses.replace(FULL, intermediate_size=129), abstract_mesh(MeshShape()), "int4")
    rules = rules_of(abstract_mesh(MeshShape()))
    wide = abstract_mesh(MeshShape(tensor=256))
    with pytest.raises(UserError, match=r"embed: vocab = 200064 .* 256 ways .*sizes that work are 1, 2, 3.* 128, .*"):
        spec(wide, "embed", ("vocab", "hidden"), (200064, 6144))
    with pytest.raises(UserError, match=r"moe.down: axis 'expertz' is in no rule"):
        spec(wide, "moe.down", ("expertz",), (8,))
    with pytest.raises(UserError, match=r"moe.down: experts and expert_width are both .* mesh axis 'tensor'"):
        spec(wide, "moe.down", ("experts", "expert_width"), (256, 256), {**rules, "experts": ("tensor",)})
    with pytest.raises(UserError, match="experts is to be split over 'rack', which this mesh has not"):
        spec(wide, "moe.down", ("experts",), (256,), {**rules, "experts": ("rack",)})


def test_arrays_of_quantised_parameters_lie_with_their_parameter() -> None:
    mesh = abstract_mesh(MeshShape(expert=4, tensor=2))
    where = shardings(FULL, mesh, m1.build(FULL, int8_experts))
    experts, width = ("seq", "expert"), ("tensor",)
    assert where.moe.gate_up["values"].spec == P(None, experts, None, width, None)
    assert where.moe.gate_up["scales"].spec == P(None, experts, None, width)
    assert where.moe.down["values"].spec == P(None, experts, None, width)
    assert where.moe.down["scales"].spec == P(None, experts, None)


def test_an_array_that_no_rule_knows_is_refused() -> None:
    with pytest.raises(UserError, match=r"extra: \(3, 4\) is neither a parameter nor a state"):
        shardings(FULL, abstract_mesh(MeshShape()), {"extra": jnp.zeros((3, 4)), "count": jnp.zeros(())})
