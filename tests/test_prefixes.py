"""Beginnings of prompts that are remembered: texts are what they are without, and less is read."""

from typing import Any

import numpy as np
import pytest

from m1jax.engine import Engine
from m1jax.generation import Generation
from m1jax.reply import Request
from tests.generation_fixtures import (
    LONGEST,
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


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(5, 400, length).tolist())


class Conversation:
    """One generation that is asked for one thing after the other, as a server is."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.count = engine, 0
        self.generation = engine.generate([], 4, eager=True)

    def ask(self, *requests: Request) -> list[list[list[int]]]:
        """The tokens of each text; in `read` how many tokens of prompts were read, in `cached` how many were not."""
        before, first, found = self.engine.stats.prompt_tokens, self.count, dict[tuple[int, int], Any]()
        for request in requests:
            self.generation.add(self.count, request)
            self.count += 1
        for event in self.generation:
            if event.reply.finish is not None:
                found[event.request, event.reply.sample] = event.reply
        self.generation.rest()
        self.read = self.engine.stats.prompt_tokens - before
        self.cached = [found[first + i, 0].cached_tokens for i in range(len(requests))]
        return [[found[first + i, k].tokens for k in range(one.n)] for i, one in enumerate(requests)]


def alone(engine: Engine, request: Request) -> list[list[int]]:
    found = tokens(replies(engine, [request]))
    return [found[0, k] for k in range(request.n)]


@pytest.mark.parametrize("length", [PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 5])
def test_a_conversation_is_read_from_its_last_prompt_on(engine: Engine, length: int) -> None:
    """Twice, by several texts; of a prompt that fills no page nothing is remembered."""
    talk, first = Conversation(limited(engine, 32, 4)), Request(prompt(1, length), seed=1, n=2, max_tokens=5)
    assert talk.ask(first) == [alone(engine, first)] and talk.cached == [0]
    second = Request((*first.tokens, *prompt(2, 9)), seed=2, n=3, max_tokens=5)
    third = Request((*second.tokens, *prompt(3, 3)), seed=3, max_tokens=5)
    known = length if length >= PAGE else 0
    assert talk.ask(second) == [alone(engine, second)]
    assert talk.cached == [known] and talk.read == len(second.tokens) - known
    assert talk.ask(third) == [alone(engine, third)]
    assert talk.cached == [len(second.tokens)] and talk.read == 3
    assert talk.ask(third) == [alone(engine, third)] and talk.read == 0  # the same once more
    all_are_free(talk.generation)


@pytest.mark.parametrize("length", [PAGE, 2 * PAGE + 3, 3 * PAGE - 1])
def test_the_second_with_the_same_beginning_leaves_it_to_the_third(engine: Engine, length: int) -> None:
    """Its full pages, of what is a chunk that ends elsewhere, too."""
    talk, beginning = Conversation(limited(engine, 32, 8)), prompt(4, length)
    asked = [Request((*beginning, *prompt(5 + i, 10 - i)), seed=i, max_tokens=4) for i in range(4)]
    full = length // PAGE * PAGE
    for i, request in enumerate(asked):
        assert talk.ask(request) == [alone(engine, request)]
        assert talk.cached == [full if i > 1 else 0]
    all_are_free(talk.generation)


def test_requests_at_once_share_what_the_first_has_read(engine: Engine) -> None:
    talk, first = Conversation(limited(engine, 32, 4)), Request(prompt(1, 20), max_tokens=6)
    more = [Request((*first.tokens, *prompt(i, 4)), seed=i, max_tokens=6) for i in range(2, 6)]
    assert talk.ask(first, *more) == [alone(engine, request) for request in (first, *more)]
    assert talk.cached == [0, *[20] * 4]
    all_are_free(talk.generation)


def test_the_oldest_is_forgotten_but_a_conversation_before_its_last_prompt(engine: Engine) -> None:
    talk = Conversation(limited(engine, 32, 2))
    one, other = Request(prompt(1, 20), max_tokens=2), Request(prompt(2, 20), max_tokens=2)
    longer = Request((*one.tokens, 7, 8), max_tokens=2)
    talk.ask(one)
    talk.ask(other)
    talk.ask(longer)  # in the place of `one`, from which it went on
    assert talk.cached == [20]
    talk.ask(other)
    assert talk.cached == [20]
    talk.ask(one)
    assert talk.cached == [0]
    assert [prefix.tokens.size for prefix in talk.generation._prefixes._known[0]] == [
        PAGE,
        20,
    ]  # what it shares, and it
    all_are_free(talk.generation)


def test_beginnings_are_forgotten_before_a_text_waits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pool of four pages; where a text's own beginning is all that is there, it is kept."""
    displaced = calls_of(monkeypatch, "_displace")
    talk = Conversation(limited(engine, 4, 4))
    for request in (Request(prompt(1, 40), max_tokens=2), Request(prompt(2, 3), max_tokens=60)):
        assert talk.ask(request) == [alone(engine, request)]
    assert talk.generation._prefixes._known == [[]]
    first = Request(prompt(3, 2 * PAGE), max_tokens=2)
    second = Request((*first.tokens, 9), max_tokens=LONGEST - 2 * PAGE - 1)
    assert talk.ask(first, second) == [alone(engine, first), alone(engine, second)]
    assert talk.cached == [0, 2 * PAGE] and not displaced
    all_are_free(talk.generation)


def test_a_text_takes_its_beginning_over_where_there_is_no_page_to_copy_it(engine: Engine) -> None:
    """It has all four pages, of which the beginning had three; so it is forgotten, and what came after remembered."""
    talk, first = Conversation(limited(engine, 4, 4)), Request(prompt(1, 35), max_tokens=2)
    second = Request((*first.tokens, *prompt(2, 15)), max_tokens=4)
    assert talk.ask(first, second) == [alone(engine, first), alone(engine, second)]
    assert talk.cached == [0, 35] and talk.read == 35 + 15
    all_are_free(talk.generation)


def test_a_text_does_not_wait_for_a_page_of_its_beginning(engine: Engine) -> None:
    """Four of eight pages are another's, who goes on for long: without what is known there is room."""
    talk, first = Conversation(limited(engine, 8, 4)), Request(prompt(1, 35), max_tokens=2)
    talk.ask(first)
    long, second = Request(prompt(5, 49), max_tokens=15), Request((*first.tokens, *prompt(2, 15)), max_tokens=4)
    talk.generation.add(1, long)
    talk.generation.add(2, second)
    found: dict[int, Any] = {}
    for event in talk.generation:
        if event.request == 2 and len(event.reply.tokens) == 1:
            assert len(found[1].tokens) < 6
        found[event.request] = event.reply
    assert [found[1].tokens, found[2].tokens] == [*alone(engine, long), *alone(engine, second)]
    all_are_free(talk.generation)


def test_a_prompt_that_is_given_up_leaves_what_it_went_on_from(engine: Engine) -> None:
    """As the last to be forgotten: it was used last."""
    talk = Conversation(limited(engine, 32, 2))
    one, other = Request(prompt(1, 20), max_tokens=2), Request(prompt(2, 20), max_tokens=2)
    longer = Request((*one.tokens, *prompt(3, 40)), max_tokens=2)
    talk.ask(one, other)

    def drop() -> bool:
        if talk.generation._entering:
            talk.generation.drop(2)
        return False

    talk.engine.cancelled = drop
    talk.generation.add(2, longer)
    assert not list(talk.generation)
    talk.engine.cancelled, talk.count = lambda: False, 3
    talk.generation.rest()
    talk.ask(Request(prompt(4, 20), max_tokens=2))
    assert talk.ask(longer) == [alone(engine, longer)] and talk.cached == [20]
    all_are_free(talk.generation)


def test_who_shares_all_pages_is_not_forgotten_for_one(engine: Engine) -> None:
    """Of a common beginning and a prompt with it and a page of its own, the prompt gives that page."""
    talk, common = Conversation(limited(engine, 6, 2)), prompt(1, 2 * PAGE)
    for i in range(2):
        talk.ask(Request((*common, *prompt(10 + i, 8)), max_tokens=1))
    talk.ask(Request(prompt(40, 10), max_tokens=LONGEST - 10))
    talk.ask(Request((*common, *prompt(12, 8)), max_tokens=1))
    assert talk.cached == [2 * PAGE]
    all_are_free(talk.generation)


def test_what_a_text_leaves_has_its_pages_to_itself(engine: Engine) -> None:
    small, first = limited(engine, 4, 4), Request(prompt(1, 35), max_tokens=4)
    generation = small.generate([first], 1, eager=True)
    *_, last = generation
    second = Request((*first.tokens, *last.reply.tokens, *prompt(2, 13)), max_tokens=4)
    *_, last = small.generate([second], 1, prior=generation.left)
    assert [last.reply.tokens] == alone(engine, second) and small.stats.prompt_tokens == 35 + 1 + 13


def test_a_text_that_waited_goes_on_from_its_prompt(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """If that is remembered: both prompts fill pages of which the texts give up none. It is not remembered itself."""
    displaced = calls_of(monkeypatch, "_displace")
    requests = [Request(prompt(i, PAGE), seed=i, max_tokens=40) for i in range(2)]
    talk = Conversation(limited(engine, 6, 4))
    assert talk.ask(*requests) == [alone(engine, request) for request in requests]
    assert displaced and talk.read < 2 * PAGE + 40
    assert {prefix.tokens.size for prefix in talk.generation._prefixes._known[0]} == {PAGE}
    all_are_free(talk.generation)


def test_nothing_is_remembered_where_room_grows(engine: Engine) -> None:
    growing = Engine(engine.model, engine.tokenizer, prefix_cache=4)
    growing.eos_ids = engine.eos_ids
    talk, request = Conversation(growing), Request(prompt(1, 20), max_tokens=2)
    assert growing.prefix_cache == 0
    for _ in range(2):
        talk.ask(request)
        assert talk.cached == [0]


def tree(rng: np.random.Generator, known: list[tuple[int, ...]]) -> Request:
    """A prompt, most often one that begins as another one does."""
    beginning = known[rng.integers(len(known))] if known and rng.random() < 0.8 else ()
    beginning = beginning[: rng.integers(len(beginning) + 1)] if rng.random() < 0.3 else beginning
    room = LONGEST - 4 - len(beginning)
    tokens = beginning[: LONGEST - 4] + prompt(int(rng.integers(50)), int(rng.integers(1, max(2, min(room, 24)))))
    tokens = tokens[: LONGEST - 2]
    known.append(tokens)
    n, most = int(rng.integers(1, 3)), int(rng.integers(1, LONGEST - len(tokens)))
    return Request(tokens, seed=int(rng.integers(9)), n=n, max_tokens=most)


@pytest.mark.parametrize("pages", [4, 6, 9, 16])
def test_whatever_comes_is_what_it_is_alone(engine: Engine, pages: int) -> None:
    """Conversations, common beginnings, samples, some dropped, in pools with too few pages for all."""
    rng = np.random.default_rng(pages)
    small = limited(engine, pages, 3)
    generation: Generation = small.generate([], 4, eager=True)
    requests, known, got = dict[int, Request](), list[tuple[int, ...]](), dict[tuple[int, int], list[int]]()
    dropped, cached = set[int](), 0

    def add() -> None:
        requests[len(requests)] = tree(rng, known)
        generation.add(len(requests) - 1, requests[len(requests) - 1])

    for _ in range(12):
        for _ in range(rng.integers(1, 4)):
            add()
        for event in generation:
            if rng.random() < 0.02 and len(requests) < 60:
                add()
            if rng.random() < 0.01:
                dropped.add(int(rng.integers(len(requests))))
                for k in dropped:
                    generation.drop(k)
            if event.reply.finish is not None:
                got[event.request, event.reply.sample] = event.reply.tokens
                cached += event.reply.cached_tokens
        generation.rest()
    for index, request in requests.items():
        if index not in dropped:
            assert [got[index, k] for k in range(request.n)] == alone(engine, request), request
    assert cached
    all_are_free(generation)
