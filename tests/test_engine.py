"""The engine: batches, chunks, stop conditions, thinking, conversations."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from m1jax import UserError, slots
from m1jax import engine as engine_module
from m1jax.chat import Chat
from m1jax.engine import Engine
from m1jax.prompt import Options, Prompter
from m1jax.reply import CLOSE, OPEN, Phase, Reply, Request, StopFilter, ThinkingSplitter
from m1jax.sampling import Sampling
from m1jax.tokenizer import Tokenizer
from tests.generation_fixtures import CONTEXT, one, random_engine, replies

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """One engine for all tests, so that each shape is compiled once."""
    return random_engine(tmp_path_factory.mktemp("tokenizer"))


def like(engine: Engine, **changes: object) -> Engine:
    """Another engine with the same compiled functions and other attributes."""
    other = Engine(engine.model, engine.tokenizer)
    for name, value in {"eos_ids": engine.eos_ids, "_compiled": engine._compiled, **changes}.items():
        setattr(other, name, value)
    return other


def prompts(engine: Engine) -> list[tuple[int, ...]]:
    words = ["Hi", "The quick brown", "17 * 24 = ", "日本語", "a", "over the lazy dog"]
    return [tuple(engine.tokenizer.encode(word)) for word in words]


def test_the_same_text_alone_and_in_any_batch(engine: Engine) -> None:
    """Six different requests of different lengths and settings, four rows: rows are joined, dropped and refilled."""
    sampling = [GREEDY, Sampling(), Sampling(0.8, top_k=9), Sampling(1.2, min_p=0.02), Sampling(top_p=0.5)]
    sampling.append(Sampling(temperature=0, repetition_penalty=1.5))
    requests = [
        Request(tokens, sampling[i], seed=i % 3, max_tokens=[5, 31, 12, 3, 40, 22][i])
        for i, tokens in enumerate(prompts(engine))
    ]
    together = replies(engine, requests)
    backwards = replies(engine, requests[::-1], max_rows=3)
    for i, request in enumerate(requests):
        alone = one(engine, request)
        assert alone.tokens == together[i, 0].tokens == backwards[5 - i, 0].tokens
        assert alone.finish == together[i, 0].finish == "length" and len(alone.tokens) == request.max_tokens


def test_greedy_equals_the_whole_model(engine: Engine) -> None:
    tokens = list(prompts(engine)[1])
    reply = one(engine, Request(tuple(tokens), GREEDY, max_tokens=8))
    for token in reply.tokens:
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        assert int(jnp.argmax(engine.model(padded)[0, len(tokens) - 1])) == token
        tokens.append(token)


def test_samples_share_a_prefill_and_differ(engine: Engine) -> None:
    request = Request(prompts(engine)[1], seed=3, n=4, max_tokens=9)
    before = engine.stats.prompt_tokens
    out = replies(engine, [request], max_rows=4)
    assert engine.stats.prompt_tokens - before == len(request.tokens)
    assert len({tuple(reply.tokens) for reply in out.values()}) == 4
    few = replies(engine, [request], max_rows=2)
    assert {key: reply.tokens for key, reply in few.items()} == {key: reply.tokens for key, reply in out.items()}
    assert one(engine, dataclasses.replace(request, n=1)).tokens == out[0, 0].tokens


@pytest.mark.parametrize("max_rows", [1, 2, 3, 4])
def test_a_prompt_is_read_once_however_its_samples_start(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, max_rows: int
) -> None:
    """Requests whose samples start in several batches, alone and beside the next one's, in caches that grow."""
    lengths = [(3, 9), (1, 4), (5, 12), (2, 6)]
    requests = [
        Request(tokens, seed=i, n=n, max_tokens=limit)
        for i, (tokens, (n, limit)) in enumerate(zip(prompts(engine), lengths, strict=False))
    ]
    want = {(i, k): r.tokens for i, one in enumerate(requests) for (_, k), r in replies(engine, [one], 8).items()}
    monkeypatch.setattr(engine_module, "PAGE", 16)
    monkeypatch.setattr(slots, "ROOM", 4)
    before = engine.stats.prompt_tokens
    got = replies(engine, requests, max_rows)
    assert {key: reply.tokens for key, reply in got.items()} == want
    assert engine.stats.prompt_tokens - before == sum(len(request.tokens) for request in requests)


def test_chunked_prefill_equals_one_shot(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        Request(tuple(engine.tokenizer.encode(text)), GREEDY, max_tokens=6) for text in ("fox " * 7, "dog " * 3)
    ]
    whole = replies(engine, requests)
    monkeypatch.setattr(engine_module, "CHUNK", 16)
    chunked = replies(engine, requests)
    assert {key: reply.tokens for key, reply in whole.items()} == {key: reply.tokens for key, reply in chunked.items()}


def test_nothing_is_compiled_twice(engine: Engine) -> None:
    requests = [Request(tokens, GREEDY, max_tokens=12) for tokens in prompts(engine)[:4]]
    replies(engine, requests)
    before = engine.stats.compilations
    replies(engine, [dataclasses.replace(r, sampling=Sampling(top_k=3), max_tokens=10, seed=9) for r in requests])
    assert engine.stats.compilations == before


def test_the_cache_grows(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for 4 tokens at first, 140 generated, beyond the smallest cache."""
    request = Request(prompts(engine)[2], seed=1, max_tokens=140)
    whole = one(engine, request)
    monkeypatch.setattr(slots, "ROOM", 4)
    monkeypatch.setattr(engine_module, "PAGE", 128)
    assert one(engine, request).tokens == whole.tokens and len(whole.tokens) == 140


def test_the_context_ends_the_text(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "CHUNK", 16)
    tokens = tuple(engine.tokenizer.encode("x" * (CONTEXT - 5)))
    assert len(tokens) == CONTEXT - 5
    reply = one(engine, Request(tokens, GREEDY))
    assert reply.finish == "context" and len(reply.tokens) == 5
    with pytest.raises(UserError, match=f"{CONTEXT} tokens.*context is {CONTEXT}"):
        engine.generate([Request((1,) * CONTEXT)])


def test_end_of_turn(engine: Engine) -> None:
    """Any token of a known text, declared to end it, ends it there and is not shown."""
    request = Request(prompts(engine)[0], seed=2, max_tokens=20)
    tokens = one(engine, request).tokens
    cut = next(i for i in range(7, 20) if tokens[i] not in tokens[:i])
    reply = one(like(engine, eos_ids=frozenset({tokens[cut], 410})), request)
    assert reply.finish == "eos" and reply.tokens == tokens[: cut + 1]
    assert reply.text == engine.tokenizer.decode(tokens[:cut])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 25), st.integers(1, 8), st.integers(0, 3))
def test_stop_strings_never_leak(engine: Engine, start: int, length: int, seed: int) -> None:
    request = Request(prompts(engine)[3], seed=seed, max_tokens=30)
    text = one(engine, request).text
    stop = text[start : start + length]
    if not stop:
        return
    reply = one(engine, dataclasses.replace(request, stop=("never there", stop)))
    assert reply.finish == "stop" and reply.text == text[: text.index(stop)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", max_size=3), max_size=10), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_filter(pieces: list[str], stops: list[str]) -> None:
    stream, shown = StopFilter(stops), ""
    for piece in pieces:
        shown += stream.feed(piece)
        assert not any(stop in shown for stop in stops)
    shown += stream.flush()
    text = "".join(pieces)
    found = [text.index(stop) for stop in stops if stop in text]
    # The first to be complete wins; of those complete with the same piece, the first to begin.
    assert shown == text[: len(shown)] and stream.stopped == bool(found)
    assert not any(stop in shown for stop in stops)
    assert shown == text if not found else len(shown) in found


def cut(text: str, phase: Phase, sizes: Iterable[int]) -> tuple[str, str]:
    """Thinking and answer of a text streamed in pieces of the given sizes."""
    splitter, segments = ThinkingSplitter(phase), []
    for size in sizes:
        segments += splitter.feed(text[:size])
        text = text[size:]
    segments += splitter.feed(text) + splitter.flush()
    thinking = "".join(s.text for s in segments if s.thinking)
    return thinking, "".join(s.text for s in segments if not s.thinking)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([OPEN, CLOSE, "<", "</thin", "a", "\n", " "]), max_size=8).map("".join),
    st.sampled_from(list(Phase)),
    st.lists(st.integers(0, 4), max_size=40),
)
@example("\n<think>a</think>b<think>c", Phase.START, [1, 1, 5, 4])
def test_thinking_is_split_the_same_in_any_pieces(text: str, phase: Phase, sizes: list[int]) -> None:
    thinking, answer = cut(text, phase, sizes)
    assert thinking + answer == text
    opened = phase is Phase.THINKING or (phase is Phase.START and text.lstrip().startswith(OPEN))
    if not opened:
        assert answer == text
    elif CLOSE in text:
        assert thinking == text[: text.index(CLOSE) + len(CLOSE)]
    else:
        assert thinking == text


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("rows", [1, 3])
def test_thinking_budget(engine: Engine, budget: int, rows: int) -> None:
    """The prompt opens the block; exactly `budget` tokens are thought, then the end is put in."""
    tokens = tuple(engine.tokenizer.encode(f"Hi{OPEN}\n"))
    free = Request(tokens, seed=5, max_tokens=40, thinking=True, n=rows)
    bound = dataclasses.replace(free, thinking_budget=budget)
    unbound = replies(engine, [free])
    for key, reply in replies(engine, [bound]).items():
        assert reply.tokens[:budget] == unbound[key].tokens[:budget]
        inside, closed, after = reply.text.partition(CLOSE)
        assert closed and after.startswith("\n")
        thought = engine.tokenizer.decode(reply.tokens[:budget])
        assert inside.removesuffix("\n") == thought.removesuffix("\n")
        assert reply.thinking == thought.strip() and len(reply.tokens) == 40


@pytest.mark.parametrize("begun", ["", "\n", "<", "\n</", "</think", "1 <"])
def test_a_tag_begun_by_the_model_is_completed(engine: Engine, begun: str) -> None:
    splitter = ThinkingSplitter(Phase.THINKING)
    splitter.feed("so x" + begun)
    whole = "so x" + begun + splitter.closing()
    assert whole.endswith(f"{CLOSE}\n") and whole.count("<") == 1


def test_thinking_that_the_model_opens_itself(engine: Engine) -> None:
    """`<think>` arrives as several ordinary tokens; the budget counts from its end."""
    opening = engine.tokenizer.encode(OPEN)
    assert len(opening) > 1
    reply = Reply(Request((1,), max_tokens=99, thinking_budget=2), 0, engine.tokenizer, engine.eos_ids, 999)
    thought = engine.tokenizer.encode("ok")[:1] * 2
    segments = []
    for token in [*opening, *thought]:
        assert reply.take_forced() is None
        segments += reply.push(token)
    forced = []
    while (token := reply.take_forced()) is not None:
        forced.append(token)
        segments += reply.push(token)
    assert engine.tokenizer.decode(forced) == f"\n{CLOSE}\n"
    segments += reply.push(engine.tokenizer.encode("a")[0])
    assert "".join(s.text for s in segments if not s.thinking) == "\na" and reply.answer == "a"
    assert reply.thinking == engine.tokenizer.decode(thought)


def test_a_block_that_closes_in_time_is_left_alone(engine: Engine) -> None:
    reply = Reply(Request((1,), thinking=True, thinking_budget=20), 0, engine.tokenizer, engine.eos_ids, 9999)
    for token in engine.tokenizer.encode(f"x{CLOSE}" + "answer " * 20):
        assert reply.take_forced() is None
        reply.push(token)


def test_logprobs_are_those_of_the_model(engine: Engine) -> None:
    """Of texts with and without them in one batch, whatever temperature and filters; texts stay what they are."""
    requests = [
        Request(tokens, Sampling(1.5, top_k=5, repetition_penalty=1.3), seed=i, max_tokens=8, logprobs=(None, 0, 3)[i])
        for i, tokens in enumerate(prompts(engine)[:3])
    ]
    forced = Request(
        tuple(engine.tokenizer.encode(f"Hi{OPEN}")), max_tokens=9, thinking=True, thinking_budget=2, logprobs=1
    )
    requests.append(forced)
    out = replies(engine, requests)
    plain = replies(engine, [dataclasses.replace(request, logprobs=None) for request in requests])
    for i, request in enumerate(requests):
        reply = out[i, 0]
        assert reply.tokens == plain[i, 0].tokens and not plain[i, 0].logprobs
        if request.logprobs is None:
            assert not reply.logprobs
            continue
        whole = np.zeros((1, 64), np.int32)
        tokens = [*request.tokens, *reply.tokens]
        whole[0, : len(tokens)] = tokens
        want = np.asarray(jax.nn.log_softmax(engine.model(whole)[0, len(request.tokens) - 1 : len(tokens) - 1]))
        assert [told.token for told in reply.logprobs] == reply.tokens
        for k, told in enumerate(reply.logprobs):
            assert told.logprob == pytest.approx(want[k, told.token], abs=1e-4)
            best = np.argsort(-want[k], kind="stable")[: request.logprobs]
            assert [token for token, _ in told.best] == best.tolist()
            assert [logprob for _, logprob in told.best] == pytest.approx(want[k, best].tolist(), abs=1e-4)


def test_nan_is_reported_with_its_layer(engine: Engine) -> None:
    model = engine.model
    norm = model.block.mlp_norm
    damaged = dataclasses.replace(
        model, block=dataclasses.replace(model.block, mlp_norm=norm.replace(norm[...].at[1].set(jnp.nan)))
    )
    other = like(engine, model=damaged)
    with pytest.raises(UserError, match=r"NaN.*layer 1 \(softmax\)"):
        list(other.generate([Request((1,), max_tokens=4)]))


def test_interrupting_ends_every_text(engine: Engine) -> None:
    steps = iter(range(7))
    other = like(engine, cancelled=lambda: next(steps, None) is None)
    out = replies(other, [Request(tokens, GREEDY, max_tokens=99) for tokens in prompts(engine)], max_rows=4)
    assert {reply.finish for reply in out.values()} == {"interrupted"} and len(out) == 6
    whole = one(engine, Request(prompts(engine)[1], GREEDY, max_tokens=99))
    assert 2 < len(out[1, 0].tokens) < 9 and whole.tokens[: len(out[1, 0].tokens)] == out[1, 0].tokens
    assert not out[5, 0].tokens


def test_a_long_prompt_can_be_given_up(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "CHUNK", 16)
    monkeypatch.setattr(engine_module, "SMALLEST_CHUNK", 16)
    steps = iter(range(3))
    other = like(engine, cancelled=lambda: next(steps, None) is None)
    long, short = Request((1, 2, 3) * 40, GREEDY, max_tokens=9), Request((1,), GREEDY, max_tokens=9)
    out = replies(other, [long, short], max_rows=1)
    assert {(reply.finish, len(reply.tokens)) for reply in out.values()} == {("interrupted", 0)} and len(out) == 2
    assert other.stats.prompt_tokens == 48


def test_texts_that_are_not_due_are_not_made(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    init = Reply.__init__

    def count(self: Reply, request: Request, sample: int, *args: Any) -> None:
        made.append(sample)
        assert len(made) < 100, "everything is made at once"
        init(self, request, sample, *args)

    monkeypatch.setattr(Reply, "__init__", count)
    request = Request(prompts(engine)[0], Sampling(), n=10**9, max_tokens=2)
    done = [e.reply.sample for e in itertools.islice(engine.generate([request], 4), 24) if e.reply.finish]
    assert sorted(done) == list(range(len(done))) and len(done) > 8


def test_a_foreign_tokenizer_is_refused(engine: Engine) -> None:
    config = dataclasses.replace(engine.model.config, vocab_size=300)
    with pytest.raises(UserError, match=r"400 tokens.*300"):
        Engine(dataclasses.replace(engine.model, config=config), engine.tokenizer)


def test_bad_options_are_named(engine: Engine) -> None:
    with pytest.raises(ValueError, match="max_rows: expected 1 or more, got 0"):
        engine.generate([], max_rows=0)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"stop": "abc"}, "stop must be a tuple of strings, not 'abc'"),
        ({"max_tokens": 1.5}, "max-tokens must be an integer, not 1.5"),
        ({"n": "2"}, "n must be an integer, not '2'"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20, not 21"),
        ({"logprobs": True}, "logprobs must be an integer, not True"),
        ({"seed": None}, "seed must be an integer, not None"),
        ({"sampling": 0.5}, "sampling must be a Sampling, not 0.5"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            Options(**options)
    wrong = [({"top_k": 1.5}, "top-k must be an integer"), ({"temperature": None}, "temperature must be a number")]
    for setting, message in wrong:
        with pytest.raises(UserError, match=message):
            Sampling(**setting)


def test_an_end_that_the_model_does_not_know_is_refused(engine: Engine, tmp_path: Path) -> None:
    folder = shutil.copytree(engine.tokenizer.folder, tmp_path / "model")
    for ids, message in (([3, 99999], "names token 99999 as one that ends a text"), (-1, "neither a token's id")):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        with pytest.raises(UserError, match=message):
            Engine(engine.model, Tokenizer.load(folder))


@pytest.mark.parametrize("no_thinking", [False, True])
@pytest.mark.parametrize("ending", ["length", "eos", "interrupted"])
def test_conversation_with_kept_state_equals_reading_it_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, ending: str, no_thinking: bool
) -> None:
    """Whether a turn ends by length, by an end-of-turn token (put in as the fifth token) or by the user."""
    cancelled = False
    end = engine.tokenizer.id_of("<end_of_sentence>")
    other = like(engine, cancelled=lambda: cancelled, eos_ids=frozenset({end} if ending == "eos" else ()))
    options = Options(GREEDY, max_tokens=12, no_thinking=no_thinking)
    chat = Chat(other, options)
    for message in ["Hi", "fox?", "24"]:
        before, start = list(chat.tokens), other.stats.prompt_tokens
        cancelled, last, steps = False, None, iter([None] * 4 + [end] * (ending == "eos"))
        with monkeypatch.context() as patch:
            patch.setattr(Reply, "take_forced", lambda _, steps=steps: next(steps, None))
            for event in chat.send(message):
                last = event.reply
                cancelled = ending == "interrupted" and len(last.tokens) == 5
        assert last is not None and last.finish == ending and chat.tokens[: len(before)] == before
        prompt = chat.tokens[: len(chat.tokens) - len(last.tokens)]
        if before:  # only what is new is read, and the last token of the reply if it was not fed yet
            assert other.stats.prompt_tokens - start - (len(prompt) - len(before)) in (0, 1)
        again = one(engine, Request(tuple(prompt), GREEDY, max_tokens=12))
        sampled = last.tokens[:-1] if ending == "eos" else last.tokens
        assert sampled == again.tokens[: len(sampled)]
        assert len(sampled) == {"length": 12, "interrupted": 5}.get(ending, len(sampled))


def test_conversation_text_is_the_templates(engine: Engine) -> None:
    options = Options(GREEDY, max_tokens=6)
    chat = Chat(engine, options)
    last = [list(chat.send(message))[-1].reply for message in ("Hi", "fox")]
    words = engine.tokenizer.decode(last[0].tokens, keep=None)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": words},
        {"role": "user", "content": "fox"},
    ]
    text, _ = Prompter(engine.tokenizer).text(messages, options)
    shown = engine.tokenizer.decode(chat.tokens[: -len(last[1].tokens)], keep=None)
    # A half character at the end of a turn reads as a replacement character in text, and as its bytes in tokens.
    assert shown.replace("\N{REPLACEMENT CHARACTER}", "") == text.replace("\N{REPLACEMENT CHARACTER}", "")
