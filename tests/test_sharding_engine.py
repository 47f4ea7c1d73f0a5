"""Text from a mesh is the text from one device."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest

from m1jax import engine, generation, rows, slots
from m1jax.generate import main
from m1jax.model import M1, abstract
from m1jax.sampling import Sampling
from m1jax.sharding.mesh import MeshShape, make_mesh
from m1jax.sharding.rules import shardings, shards
from m1jax.state import empty
from m1jax.tokenizer import Tokenizer
from tests.tools import HELLO, random_model, variant

CONFIG = variant(vocab_size=64, num_key_value_heads=4, num_local_experts=8, layer_types=("lightning", "softmax") * 4)


def generated(capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    with pytest.raises(SystemExit) as exit:
        main(["--model", str(HELLO), "--prompt", "Who are you?", "--json", *map(str, args)])
    out, err = capsys.readouterr()
    assert exit.value.code in (0, None), err
    return json.loads(out)


def test_the_same_text_on_a_mesh(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    schema = '{"type": "array", "items": {"enum": [1, 22]}, "minItems": 2, "maxItems": 4}'
    held = ("--temperature", 2, "--seed", 1, "--no-thinking", "--json-schema", schema)
    asked = ("--greedy", "--max-tokens", 24), ("--seed", 5, "--max-tokens", 12, "-n", 3), held
    want = [[sample["text"] for sample in generated(capsys, *args)["samples"]] for args in asked]
    devices = jax.devices()
    for text, count in (("data=1,expert=2,tensor=1", 2), ("data=2,expert=2,tensor=2", 8)):
        monkeypatch.setattr(jax, "devices", lambda *_, count=count: devices[:count])
        got = [[sample["text"] for sample in generated(capsys, *args, "--mesh", text)["samples"]] for args in asked]
        assert got == want


MESHES = ["data=2,expert=2,tensor=2", "data=4,expert=2"]
Compiled = tuple[Any, Any]  # what a jitted function was compiled to, and what it gave


def compiled(function: Any, mesh: jax.sharding.Mesh, *args: Any, **static: Any) -> Compiled:
    """On a mesh, its trees of parameters and states where they lie there."""
    with jax.set_mesh(mesh):
        placed = [
            arg if isinstance(arg, np.ndarray) else jax.device_put(arg, shardings(CONFIG, mesh, arg)) for arg in args
        ]
        program = jax.jit(function).lower(*placed, **static).compile()
        return program, program(*placed)


def noise(tree: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), tree)


def check_little_memory(program: Any) -> None:
    memory = program.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < memory.output_size_in_bytes


@pytest.mark.parametrize("mesh", MESHES)
def test_rows_are_taken_without_a_device_holding_all(mesh: str) -> None:
    """Rows that are split over devices stay so, and little is needed beside the states and the result."""
    there, source = make_mesh(MeshShape.parse(mesh)), np.asarray([7, 0, 3, 5, 7, 7, 4, 1], np.int32)
    state = noise(jax.eval_shape(lambda model: model.init_state(8, 256), abstract(CONFIG, "float32")))
    program, got = compiled(lambda state, rows: state.take(rows), there, state, source)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(state.take(source)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for x, where in zip(jax.tree.leaves(got), jax.tree.leaves(shardings(CONFIG, there, got)), strict=True):
        assert x.sharding.is_equivalent_to(where, x.ndim)
    check_little_memory(program)


@pytest.mark.parametrize("mesh", MESHES)
def test_rows_join_on_their_devices(mesh: str) -> None:
    """Nothing travels, and little is needed beside the states and the result."""
    there = make_mesh(MeshShape.parse(mesh))
    parts = shards(there, "batch")
    lefts = [
        rows.Left(state.lightning, state.length)
        for state in (noise(empty(CONFIG, "float32", parts * count, parts, 1)) for count in (1, 2))
    ]
    # Of the part p the first batch has the row p, the second those from parts + 2·p on.
    source = np.asarray([(parts + 2 * p + 1, p)[k] for p in range(parts) for k in range(2)], np.int32)
    program, got = compiled(lambda source, *lefts: rows._rows_of(lefts, source), there, source, *lefts)
    both = np.concatenate([left.lightning.s for left in lefts], axis=1)
    np.testing.assert_array_equal(got.lightning.s, both[:, source])
    np.testing.assert_array_equal(got.length, np.concatenate([left.length for left in lefts])[source])
    for x, where in zip(jax.tree.leaves(got), jax.tree.leaves(shardings(CONFIG, there, got)), strict=True):
        assert x.sharding.is_equivalent_to(where, x.ndim)
    assert "collective" not in program.as_text() and "all-gather" not in program.as_text()
    check_little_memory(program)


@pytest.mark.parametrize("mesh", ["data=2,expert=2,tensor=2", "expert=4", "seq=2,expert=2"])
def test_nothing_is_compiled_twice(mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What begins lies where a step leaves its own; a prompt of several chunks finds the program of the first."""
    shape = MeshShape.parse(mesh)
    there = make_mesh(shape, devices=jax.devices()[: shape.size])
    model = random_model(dataclasses.replace(CONFIG, vocab_size=512))
    model = jax.device_put(model, shardings(model.config, there, model))
    step: Any = jax.jit(lambda model, tokens, state: model.step(tokens, state, logits="last"))
    state = model.init_state(4, 32)
    for _ in range(2):
        _, state = step(model, np.zeros((4, 1), np.int32), state)
    assert step._cache_size() == 1
    taken = state.take(np.arange(4))  # without `jax.set_mesh`
    for ours, theirs in zip(jax.tree.leaves(taken), jax.tree.leaves(state), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    monkeypatch.setattr(engine, "CHUNK", 16)
    ours = engine.Engine(model, Tokenizer.load(HELLO))
    ours.eos_ids = frozenset()
    list(ours.generate([engine.Request((1,) * 32, Sampling(temperature=0), max_tokens=1)]))
    compiled: Any = ours._compiled
    assert [kind for kind, *_ in compiled].count("prefill") == 1


@pytest.mark.parametrize(("mesh", "room"), [("data=2", {"context": 64, "cache_tokens": 160}), ("seq=2,expert=1", {})])
def test_texts_in_pages_on_a_mesh(mesh: str, room: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that share prompts, join, leave, grow out of their pages or give them up are what they are alone."""
    monkeypatch.setattr(engine, "PAGE", 16)
    monkeypatch.setattr(slots, "ROOM", 4)
    shape = MeshShape.parse(mesh)
    there = make_mesh(shape, devices=jax.devices()[: shape.size])
    model = random_model(variant(vocab_size=512, num_key_value_heads=4, layer_types=("lightning", "softmax")))
    requests = [engine.Request((5 + i,) * (9 * i + 3), seed=i, n=1 + i % 3, max_tokens=36) for i in range(3)]

    def texts(model: M1, **room: Any) -> tuple[dict[tuple[int, int], list[int]], int]:
        ours = engine.Engine(model, Tokenizer.load(HELLO), **room)
        ours.eos_ids = frozenset()
        made = ours.generate(requests, 4)
        found = {(e.request, e.reply.sample): e.reply.tokens for e in made if e.reply.finish is not None}
        made._release_ended()
        made._forget()
        assert not any(made._pool._users)
        return found, ours.stats.prompt_tokens

    want, once = texts(model)
    assert once == sum(len(request.tokens) for request in requests)
    got, read = texts(jax.device_put(model, shardings(model.config, there, model)), **room)
    assert got == want and (read > once if room else read == once)


def test_beginnings_of_prompts_are_remembered_on_a_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the devices that have read them, to which conversations come back; texts are what they are alone."""
    monkeypatch.setattr(engine, "PAGE", 16)
    monkeypatch.setattr(slots, "ROOM", 4)
    monkeypatch.setattr(generation, "WORTH", 1)
    there = make_mesh(MeshShape.parse("data=2"), devices=jax.devices()[:2])
    model = random_model(variant(vocab_size=512, num_key_value_heads=4, layer_types=("lightning", "softmax")))
    one, other = (engine.Request((5 + i,) * 20, seed=i, n=1 + i, max_tokens=9) for i in range(2))
    longer = [dataclasses.replace(request, tokens=(*request.tokens, 9, 9), max_tokens=4) for request in (other, one)]

    def texts(model: M1, **room: Any) -> tuple[dict[tuple[int, int], list[int]], int]:
        ours, found = engine.Engine(model, Tokenizer.load(HELLO), context=64, **room), {}
        ours.eos_ids = frozenset()
        made = ours.generate([], 4, eager=True)
        for index, request in enumerate([one, other, *longer]):
            made.add(index, request)
            if index in (1, 3):
                found |= {(e.request, e.reply.sample): e.reply.tokens for e in made if e.reply.finish is not None}
                made.rest()
        return found, ours.stats.prompt_tokens

    want, _ = texts(model)
    got, read = texts(jax.device_put(model, shardings(model.config, there, model)), prefix_cache=8)
    # The samples of one are in both parts, so that each part has read its prompt; whoever goes on reads two tokens.
    assert got == want and read == 3 * 20 + 3 * 2


def test_a_text_goes_where_much_of_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else where the fewest texts are, though the same system message is known elsewhere."""
    monkeypatch.setattr(engine, "PAGE", 16)
    monkeypatch.setattr(slots, "ROOM", 4)
    there = make_mesh(MeshShape.parse("data=2"), devices=jax.devices()[:2])
    model = random_model(variant(vocab_size=512, num_key_value_heads=4, layer_types=("lightning", "softmax")))
    placed = jax.device_put(model, shardings(model.config, there, model))
    ours = engine.Engine(placed, Tokenizer.load(HELLO), context=64, prefix_cache=8)
    ours.eos_ids = frozenset()

    def parts(*prompts: tuple[int, ...]) -> list[int]:
        made, found = ours.generate([], 4, eager=True), {}
        for index, prompt in enumerate([(7,) * 16, *prompts]):
            made.add(index, engine.Request(prompt, max_tokens=30 if index else 1))
            for event in made:
                found |= {slot.request: slot.part for slot in made._live()}
                if not index and event.reply.finish:
                    break
                if index < len(prompts):
                    break
        return [found[index + 1] for index in range(len(prompts))]

    prompts = [(7,) * 16 + (k,) for k in range(9, 12)]
    assert parts(*prompts) == [0, 1, 0]
    monkeypatch.setattr(generation, "WORTH", 1)
    assert parts(*prompts)[:2] == [0, 0]


def test_a_mesh_that_does_not_fit_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in {"expert=3": "needs 3 devices, 8 are present", "heads=2": "unknown axis 'heads'"}.items():
        with pytest.raises(SystemExit) as exit:
            main(["--model", str(HELLO), "--prompt", "Hi", "--mesh", text])
        err = capsys.readouterr().err
        assert exit.value.code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
