"""Texts that join, leave and are dropped while others are generated."""

import pytest

from m1jax import engine as engine_module
from m1jax import slots
from m1jax.engine import Engine
from m1jax.reply import Request
from tests.generation_fixtures import counted_chunks, one, random_engine, replies


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """One engine for all tests, so that each shape is compiled once."""
    return random_engine(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("prefix_cache", [0, 3])
def test_what_is_warm_is_not_compiled(engine: Engine, monkeypatch: pytest.MonkeyPatch, prefix_cache: int) -> None:
    """Prompts of all lengths and in chunks, texts that join and leave one by one; nothing of the warming stays."""
    monkeypatch.setattr(engine_module, "PAGE", 16)
    warm = Engine(engine.model, engine.tokenizer, context=64, prefix_cache=prefix_cache)
    warm.warm_up(4)
    assert warm.stats.generated_tokens == warm.stats.compilations == 0
    warm.eos_ids = frozenset()
    requests = [Request((7,) * length, max_tokens=9 + length % 7, seed=length) for length in (1, 15, 17, 33, 50, 3)]
    generation, found, cached = warm.generate([requests[0]], 4, eager=True), {}, 0
    for count, event in enumerate(generation, 1):
        if count % 3 == 0 and count // 3 < len(requests):
            generation.add(count // 3, requests[count // 3])
        cached += event.reply.cached_tokens
        if event.reply.finish is not None:
            found[event.request] = event.reply.tokens
    assert warm.stats.compilations == 0 and bool(cached) == bool(prefix_cache)
    assert found == {k: one(engine, request).tokens for k, request in enumerate(requests)}


@pytest.mark.parametrize("context", [16, 17, 18])
def test_what_is_warm_is_not_compiled_in_a_context_of_a_page(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    """And a token or two, of which the longest prompt has one less."""
    monkeypatch.setattr(engine_module, "PAGE", 16)
    warm = Engine(engine.model, engine.tokenizer, context=context, prefix_cache=2)
    warm.warm_up(2)
    generation = warm.generate([Request((7,) * (context - 1), max_tokens=1)] * 2, 2, eager=True)
    *_, last = generation
    assert warm.stats.compilations == 0 and last.reply.cached_tokens == (0 if context == 16 else context - 1)


@pytest.mark.parametrize("after", range(4, 9))
def test_a_text_is_dropped_when_it_is_its_turn(engine: Engine, after: int) -> None:
    """Between the events of the last step before it would join, or those of the first after; of two, which stay."""
    pair, other = Request((5, 6, 7), n=2, max_tokens=12), Request((8, 9), seed=1, max_tokens=12)
    want = {k: reply.tokens for (_, k), reply in replies(engine, [pair]).items()}
    generation, found = engine.generate([pair], 4, eager=True), {}
    for count, event in enumerate(generation, 1):
        assert event.request == 0
        if count == after:
            generation.add(1, other)
        if count == after + 1:
            generation.drop(1)
        if event.reply.finish is not None:
            found[event.reply.sample] = event.reply.tokens
    assert found == want


@pytest.mark.parametrize("context", [None, 64])
def test_texts_one_after_the_other_in_one_generation(engine: Engine, context: int | None) -> None:
    """As a server has them, that rests between; pages are given out anew. Dropping leaves nothing behind."""
    own = Engine(engine.model, engine.tokenizer, context=context)
    own.eos_ids, own._compiled = frozenset(), engine._compiled
    generation = own.generate([], 4, eager=True)
    for k in range(24):
        asked = Request((5 + k,) * (1 + 7 * k % 40), seed=k, n=1 + k % 3, max_tokens=4 + 5 * k % 17)
        generation.add(k, asked)
        found = {e.reply.sample: e.reply.tokens for e in generation if e.reply.finish is not None}
        assert found == {sample: reply.tokens for (_, sample), reply in replies(engine, [asked]).items()}
        generation.rest()
        assert generation._rows is None and not any(generation._pool._users)
    for k in range(5000):
        generation.drop(k)
    assert not generation._dropped
    generation.add(0, Request((5,), max_tokens=2))
    assert len(list(generation)) == 2


def joining(engine: Engine, first: Request, second: Request, after: int, drop: int = 0) -> dict[int, list[int]]:
    """Tokens of two texts, of which the second is asked for when the first has some, and dropped some events later."""
    generation, order, found, gone = engine.generate([first], 4, eager=True), [], {}, 0
    for event in generation:
        order.append(event.request)
        if len(order) == after:
            generation.add(1, second)
        if drop and len(order) == after + drop:
            generation.drop(1)
            gone = len(order)
        if event.reply.finish not in (None, "interrupted"):
            found[event.request] = event.reply.tokens
    if drop:
        assert 1 not in order[gone:]
    else:
        assert order[after : order.index(1)] and 0 in order[order.index(1) :]
    return found


def test_texts_go_on_while_a_long_prompt_is_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step between two chunks; the cache of those that go on may meanwhile become the longer one."""
    monkeypatch.setattr(engine_module, "CHUNK", 16)
    monkeypatch.setattr(engine_module, "PAGE", 16)
    monkeypatch.setattr(slots, "ROOM", 4)
    first, second = Request((5, 6, 7), max_tokens=90, seed=1), Request(tuple(range(9, 59)), max_tokens=9, seed=2)
    want = {0: one(engine, first).tokens, 1: one(engine, second).tokens}
    for after in (3, *range(56, 62)):  # at 64 tokens, prompt included, the cache of the first doubles
        assert joining(engine, first, second, after) == want
    chunks = counted_chunks(engine, monkeypatch)
    for drop, read in enumerate((0, 1, 2, 3, 4, 4), 1):  # before it is read, after each chunk, and when it has begun
        chunks.clear()
        assert joining(engine, first, second, 3, drop) == {0: want[0]}
        assert len(chunks) == 1 + read, drop


def test_short_texts_do_not_hold_up_those_that_go_on(engine: Engine) -> None:
    """A queue that never empties, of texts that end with their first token."""
    long, short = Request((5, 6, 7), max_tokens=20, seed=1), Request((8, 9), max_tokens=1)
    generation, found = engine.generate([long], 2, eager=True), None
    for count, event in enumerate(generation, 1):
        if event.request == 0 and event.reply.finish is not None:
            found = event.reply.tokens
            break
        assert count < 60
        generation.add(count, short)
    assert found == one(engine, long).tokens
