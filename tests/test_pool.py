"""The pool of pages: who has which, what texts share, and what happens when there are no more."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from m1jax import UserError
from m1jax import pool as pool_module
from m1jax.engine import Engine
from m1jax.generation import Generation
from m1jax.pool import Pool
from m1jax.reply import Request
from m1jax.slots import Prompt
from tests.generation_fixtures import (
    PAGE,
    all_are_free,
    calls_of,
    limited,
    make_pages_small,
    random_engine,
    replies,
    tokens,
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """One engine for all tests, so that each shape is compiled once."""
    return random_engine(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    make_pages_small(monkeypatch)


def run(generation: Generation) -> dict[tuple[int, int], list[int]]:
    """The tokens of all texts; in the end nobody has a page."""
    found = {(e.request, e.reply.sample): e.reply.tokens for e in generation if e.reply.finish is not None}
    all_are_free(generation)
    return found


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("pages", [4, 5, 8])
def test_who_has_no_page_goes_on_later_the_same(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, pages: int, eager: bool
) -> None:
    """Five texts of which one and a bit, or two, have room when they are long.

    A budget of thinking is kept, too, and the place in a grammar.
    """
    lengths = [(3, 50), (20, 44), (1, 63), (33, 20), (16, 40)]
    requests = [Request((5 + i,) * n, seed=i, max_tokens=most) for i, (n, most) in enumerate(lengths)]
    requests[2] = Request((7,), seed=2, max_tokens=63, thinking=True, thinking_budget=30)
    schema = '{"type": "array", "items": {"enum": [1, 22]}, "minItems": 30}'
    requests[4] = Request((9,) * 16, seed=4, max_tokens=40, json_schema=schema, may_think=False)
    want = tokens(replies(engine, requests, 5))
    small = limited(engine, pages)
    displaced = calls_of(monkeypatch, "_displace")
    assert run(small.generate(requests, 4, eager=eager)) == want
    # With the room of one text most come one after the other.
    assert pages == 4 or (displaced and small.stats.prompt_tokens > sum(length for length, _ in lengths))


def test_what_is_read_gives_its_pages_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of four chunks, while a text grows that began before and needs a page between two of them."""
    first, second = Request((5, 6, 7), max_tokens=60, seed=1), Request(tuple(range(9, 59)), max_tokens=9, seed=2)
    want = tokens(replies(engine, [first, second]))
    given_up = 0
    for after in range(1, 44, 2):
        small = limited(engine, 5)
        generation, found = small.generate([first], 4, eager=True), dict[tuple[int, int], list[int]]()
        for count, event in enumerate(generation, 1):
            if count == after:
                generation.add(1, second)
            if event.reply.finish is not None:
                found[event.request, event.reply.sample] = event.reply.tokens
        assert found == want
        all_are_free(generation)
        given_up += small.stats.prompt_tokens > 3 + 50
    assert given_up


@pytest.mark.parametrize("length", [15, 16, 40])
def test_samples_share_the_full_pages_of_their_prompt(engine: Engine, length: int) -> None:
    request = Request((8,) * length, seed=3, n=4, max_tokens=3)
    want = tokens(replies(engine, [request]))
    fixed = limited(engine, 20)
    generation, most = fixed.generate([request], 4), Counter[int]()
    for event in generation:
        users = Counter(generation._pool._users[0].values())
        most = users if event.reply.sample == 0 and len(event.reply.tokens) == 1 else most
    full, partial = divmod(length, PAGE)
    assert most[4] == full and most[1] == 4 * (partial > 0)
    all_are_free(generation)
    assert fixed.stats.prompt_tokens == length
    assert run(fixed.generate([request], 4)) == run(limited(engine, 5).generate([request], 3)) == want


def test_dropped_texts_leave_no_page(engine: Engine) -> None:
    """While they wait again, while they are generated, and while they are read."""
    requests = [Request((5 + i,) * 10, seed=i, n=2, max_tokens=50) for i in range(3)]
    for when in range(5, 150, 12):
        small = limited(engine, 6)
        generation = small.generate([requests[0]], 4, eager=True)
        for count, _ in enumerate(generation, 1):
            if count in (3, 4):
                generation.add(count - 2, requests[count - 2])
            if count == when:
                generation.drop(when % 3)
        all_are_free(generation)


def added(engine: Engine, first: list[Request], last: Request, after: int, rows: int = 8, eager: bool = True) -> Any:
    """Generates the first and, after so many events, the last; returns the tokens of all."""
    generation, found = engine.generate(first, rows, eager=eager), {}
    for count, event in enumerate(generation, 1):
        if count == after:
            generation.add(len(first), last)
        if event.reply.finish is not None:
            found[event.request, event.reply.sample] = event.reply.tokens
    all_are_free(generation)
    return found


def test_samples_that_wait_for_their_prompt_keep_room_for_its_last_page(engine: Engine) -> None:
    """While it is read others grow, who must not take the pages that their copies of it will lie in."""
    first, last = [Request((5,) * 15, max_tokens=30)] * 3, Request((6,) * 57, n=2, max_tokens=2)
    want = tokens(replies(engine, [*first, last], 8))
    for pages in range(5, 11):
        for after in (3, 30, 40):
            assert added(limited(engine, pages), first, last, after) == want


def test_who_comes_after_a_rest_has_his_own_pages(engine: Engine) -> None:
    """Though the new pool has changed as often as the old one had, and the table is as wide."""
    first, second = Request((5,) * 14, max_tokens=3), Request((6,) * 20, max_tokens=3)
    want = tokens(replies(engine, [second]))[0, 0]
    generation = engine.generate([first], 4, eager=True)
    assert run(generation)
    generation.rest()
    generation.add(1, second)
    assert run(generation) == {(1, 0): want}


def test_a_dropped_prompt_is_forgotten(engine: Engine) -> None:
    """It holds no pages that another waits for, and whoever comes under its number gets his own."""
    long, pair = Request((5,) * 15, max_tokens=40), Request((6,) * 40, n=2, max_tokens=3)
    other = Request((7,) * 50, max_tokens=3)
    want = tokens(replies(engine, [other]))[0, 0]
    generation, begun, found = limited(engine, 8).generate([long], 2, eager=True), dict[int, int](), []
    for count, event in enumerate(generation, 1):
        begun.setdefault(event.request, count)
        if count == 1:
            generation.add(1, pair)
        if event.request == 1 and 2 not in begun:
            generation.drop(1)
            generation.add(1, other)
            begun[2] = count
        elif event.request == 1:
            found = event.reply.tokens
    assert found == want and begun[2] < 20
    all_are_free(generation)


def test_a_dropped_request_begins_no_more_samples(engine: Engine) -> None:
    """Of those that were there from the start, too; nor are they told of where all is interrupted."""
    many, other = Request((5, 6, 7), n=5, max_tokens=4), Request((8, 9), max_tokens=4)
    generation, after = engine.generate([many, other], 1), list[int]()
    for event in generation:
        after.append(event.request)
        generation.drop(0)
    assert after == [0, 1, 1, 1, 1]
    stopped = limited(engine, 8)
    stopped.cancelled = lambda: True
    generation = stopped.generate([other, many, other], 4)
    for event in generation:
        after.append(event.request)
        generation.drop(1)
    assert after[5:] == [0, 2]


def test_texts_that_go_on_wait_before_those_that_have_not_begun(engine: Engine) -> None:
    """In the order that they began in, also where prompts are given up in the step that displaces a text."""
    generation = engine.generate([Request((k,)) for k in range(1, 5)], 4)
    slots = list(generation._queue)
    for slot, turn in zip(slots[:2], (5, 3), strict=True):
        slot.reply.tokens, slot.turn = [7], turn
    generation._queue.clear()
    generation._return([slots[0]])
    generation._return([slots[2], slots[3], slots[1]])
    assert list(generation._queue) == [slots[1], slots[0], slots[2], slots[3]]


def test_rows_that_ended_are_dropped_while_others_wait_for_pages(engine: Engine) -> None:
    requests = [Request((5,), max_tokens=60), *[Request((6,), max_tokens=5)] * 3]
    generation, sizes = limited(engine, 4).generate(requests, 8), set[int]()
    for count, _ in enumerate(generation, 1):
        if count == 10:  # all have some tokens and a page, the next wants all pages
            generation.add(4, Request((7,) * 60, max_tokens=4))
        if count > 25 and generation._queue:
            sizes.add(len(generation._slots))
    assert sizes == {1}
    all_are_free(generation)


def test_a_pool_counts_its_pages(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "FEWEST", 4)
    pool = Pool(engine, None)
    none = np.zeros(0, np.int32)
    first, second = Prompt(0, 0, none, pages=pool.take(0, 3)), Prompt(0, 0, none, pages=[])
    assert first.pages == [0, 1, 2] and pool._capacity == 4
    second.pages = pool.share(0, first.pages[:2]) + pool.take(0, 4)
    assert pool._capacity == 8 and pool.pages_for(17) == 2 and pool.full(17) == pool.full(31) == 1
    assert pool.table([second, None], 8).tolist() == [[0, 1, 3, 4, 5, 6, 8, 8], [8] * 8]
    pool.release(first)
    changes = pool.changes
    assert first.pages == [] and pool.take(0, 2) == [2, 7] and pool.changes > changes
    with pytest.raises(MemoryError, match="0 pages left, 1 are wanted"):
        full = Pool(limited(engine, 4), 2)
        full.take(0, 2)
        full.take(0, 1)


def test_room_that_is_too_small_is_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match="cache-tokens must be 64 or more, room for one text, not 63"):
        Engine(engine.model, engine.tokenizer, context=64, cache_tokens=63)
    with pytest.raises(UserError, match="cache-tokens goes with context"):
        Engine(engine.model, engine.tokenizer, cache_tokens=63)
    limited(engine, 4).check_room(8)
    with pytest.raises(UserError, match=r"keys and values of \d+ tokens need .* GB .* are free: give less context"):
        limited(engine, 1 << 40).check_room(8)
