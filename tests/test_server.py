"""The OpenAI-compatible server: its engine's thread, its HTTP, the command."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from m1jax import UserError
from m1jax.engine import Engine
from m1jax.reply import Reply, Request
from m1jax.server import protocol
from m1jax.server.app import Server
from m1jax.server.service import Busy, Closing, Service
from m1jax.tokenizer import Tokenizer
from tests.generation_fixtures import CONTEXT, counted_chunks, random_model, small_tokenizer
from tests.test_server_protocol import OPTIONS, USER, form, read

ROWS, WAITING = 2, 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def service(tokenizer: Tokenizer) -> Iterator[Service]:
    """Texts of a random model, which no token ends; one for all tests, so that each shape is compiled once."""
    service = Service(random_model(), tokenizer, ROWS, WAITING)
    service.engine.eos_ids = frozenset()
    yield service
    service.close()
    service.join(10)


@pytest.fixture(scope="module")
def alone(service: Service) -> Engine:
    """An engine that shares the compiled functions."""
    engine = Engine(service.engine.model, service.engine.tokenizer)
    engine.eos_ids, engine._compiled = service.engine.eos_ids, service.engine._compiled
    return engine


def request(k: int, tokens: int = 12, n: int = 1) -> Request:
    return Request(tokens=(5 + k, 6, 7 + 2 * k), seed=k, n=n, max_tokens=tokens)


def tokens_of(engine: Engine, asked: Request) -> list[list[int]]:
    found = {event.reply.sample: event.reply for event in engine.generate([asked], ROWS)}
    return [found[k].tokens for k in range(asked.n)]


class Listener:
    """Collects what a service tells."""

    def __init__(self, texts: int = 1) -> None:
        self.replies: dict[int, Reply] = {}
        self.errors: list[Exception] = []
        self.events = 0
        self._texts, self.ended, self.begun = texts, threading.Event(), threading.Event()

    def __call__(self, news: Any) -> None:
        self.events += 1
        self.begun.set()
        if isinstance(news, Exception):
            self.errors.append(news)
        elif news.reply.finish is not None:
            self.replies[news.reply.sample] = news.reply
        if self.errors or len(self.replies) == self._texts:
            self.ended.set()


def order(service: Service, asked: Request, listener: Any) -> int:
    return service.order([asked], [listener])[0]


class Gate(Listener):
    """One that holds the engine at its first event until it is opened, however slow the machine."""

    def __init__(self, texts: int = 1) -> None:
        super().__init__(texts)
        self.opened = threading.Event()

    def __call__(self, news: Any) -> None:
        super().__call__(news)
        assert self.opened.wait(60)


def test_texts_are_what_they_are_alone(service: Service, alone: Engine) -> None:
    """More than there are rows, ordered at once and while others are generated, one of several texts."""
    asked = [request(0), request(1, 20), request(2, 7, n=3), request(3)]
    heard = [Listener(each.n) for each in asked]
    for each, listener in zip(asked[:3], heard, strict=False):
        order(service, each, listener)
    assert heard[1].begun.wait(60)
    order(service, asked[3], heard[3])
    for each, listener in zip(asked, heard, strict=True):
        assert listener.ended.wait(60)
        assert [listener.replies[k].tokens for k in range(each.n)] == tokens_of(alone, each)
    assert service.texts == 0


def test_a_cancelled_text_makes_room(service: Service, alone: Engine) -> None:
    """Of texts that go on and of one that waits; those that stay are not disturbed."""
    long = [Listener(), Gate(), Listener()]
    numbers = [order(service, request(k, CONTEXT), listener) for k, listener in enumerate(long)]
    assert long[1].begun.wait(60) and long[0].begun.is_set()
    late, in_time = Listener(), []

    def hear(news: Any) -> None:
        late(news)
        in_time.append(not long[1].ended.is_set())

    order(service, request(7), hear)
    for k in (0, 2):
        service.cancel(numbers[k])
    heard = long[0].events
    long[1].opened.set()  # pyright: ignore[reportAttributeAccessIssue]
    assert late.ended.wait(60) and long[1].ended.wait(60)
    assert all(in_time) and (long[0].events, long[2].events) == (heard, 0)
    assert late.replies[0].tokens == tokens_of(alone, request(7))[0]
    assert long[1].replies[0].tokens == tokens_of(alone, request(1, CONTEXT))[0]
    service.cancel(numbers[1])  # of one that has ended
    assert service.texts == 0


def test_a_long_prompt_that_nobody_wants_is_not_read(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself, with no other text of which there were news meanwhile."""
    monkeypatch.setattr("m1jax.engine.CHUNK", 16)
    chunks, listener = counted_chunks(service.engine, monkeypatch), Listener()
    run, number = service.engine.run, [0]

    def cancelling(function: Any, *args: Any, **static: int) -> Any:
        if len(chunks) == 3:
            service.cancel(number[0])
        return run(function, *args, **static)

    monkeypatch.setattr(service.engine, "run", cancelling)
    number[0] = order(service, Request((7,) * 200), listener)
    last = Listener()
    order(service, request(0), last)
    assert last.ended.wait(60) and not listener.events
    assert len(chunks) <= 5  # of 13, and the last one's


def test_too_many_texts_are_sent_away(service: Service) -> None:
    listeners = [Gate(3), Gate(3)]
    numbers = [order(service, request(k, CONTEXT, n=3), listener) for k, listener in enumerate(listeners)]
    with pytest.raises(Busy, match="6 texts are generated or wait: ask again later"):
        order(service, request(9), Listener())
    for number, listener in zip(numbers, listeners, strict=True):
        service.cancel(number)
        listener.opened.set()
    with pytest.raises(UserError, match="shorten the prompt"):
        order(service, Request(tokens=(1,) * CONTEXT), Listener())
    deadline = time.monotonic() + 60
    while service.texts and time.monotonic() < deadline:
        time.sleep(0.01)
    last = Listener()
    order(service, request(9), last)
    assert last.ended.wait(60) and not last.errors


def test_an_error_is_told_and_the_service_goes_on(
    service: Service, alone: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To those who are generated for and those who wait; not twice; and to the log."""
    gate = Gate()
    heard = [gate, *(Listener() for _ in range(3))]
    for k, listener in enumerate(heard):
        order(service, request(k, CONTEXT), listener)
    assert gate.begun.wait(60)
    run = service.engine.run

    def broken(*args: Any, **static: int) -> Any:
        monkeypatch.setattr(service.engine, "run", run)
        raise RuntimeError("out of order")

    monkeypatch.setattr(service.engine, "run", broken)
    gate.opened.set()
    assert all(listener.ended.wait(60) for listener in heard)
    assert [[str(error) for error in listener.errors] for listener in heard] == [["out of order"]] * 4
    assert "error: out of order\nTraceback" in capsys.readouterr().err
    after = Listener()
    order(service, request(0), after)
    assert after.ended.wait(60) and after.replies[0].tokens == tokens_of(alone, request(0))[0]


def test_a_service_that_ends_ends_its_texts(tokenizer: Tokenizer, service: Service) -> None:
    ending = Service(service.engine.model, tokenizer, ROWS, WAITING, context=64)
    ending.engine._compiled = service.engine._compiled
    assert ending.engine.cache_bucket(3) == 64 == ending.engine.context
    heard = [Listener() for _ in range(3)]
    for k, listener in enumerate(heard):
        order(ending, request(k, 10_000), listener)
    assert heard[0].begun.wait(60)
    ending.close()
    ending.join(60)
    assert not ending.works
    for listener in heard:
        assert listener.ended.wait(10)
        assert [type(error) for error in listener.errors] == [Closing] or listener.replies[0].finish is not None
    with pytest.raises(Closing):
        order(ending, request(0), Listener())


def test_between_texts_only_the_pages_are_kept(service: Service, tokenizer: Tokenizer) -> None:
    """Those that were there from the start; they are not made anew for each text, and no text keeps any."""
    fixed = Service(service.engine.model, tokenizer, ROWS, WAITING, context=64)
    fixed.engine.eos_ids, fixed.engine._compiled = service.engine.eos_ids, service.engine._compiled
    pools, want = list[Any](), tokens_of(fixed.engine, request(0))[0]
    for _ in range(2):
        listener = Listener()
        order(fixed, request(0), listener)
        assert listener.ended.wait(60) and listener.replies[0].tokens == want
        deadline = time.monotonic() + 10
        while fixed._generation is None or fixed._generation._rows is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pools.append(fixed._generation._pool)
        assert not any(pools[-1]._users) and pools[-1]._cache is not None
    assert pools[0] is pools[1]
    fixed.close()
    fixed.join(10)


def test_a_context_is_within_the_models(tokenizer: Tokenizer, service: Service) -> None:
    for context in (1, CONTEXT + 1):
        with pytest.raises(UserError, match=f"context must be from 2 to the model's {CONTEXT}, not {context}"):
            Engine(service.engine.model, tokenizer, context=context)


@pytest.fixture(scope="module")
def port(service: Service) -> Iterator[int]:
    """The port of a server with a key."""
    app = Server(service, "m1", OPTIONS, key="secret").app
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(20)


@contextlib.contextmanager
def asking(port: int, body: Any, path: str = "/v1/chat/completions", key: str = "secret") -> Iterator[Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Authorization": f"bearer {key}"}
    data = body if isinstance(body, bytes | None) else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, data, headers)
    try:
        yield connection.getresponse()
    finally:
        connection.close()


def ask(port: int, body: Any, path: str = "/v1/chat/completions", key: str = "secret") -> tuple[int, Any]:
    with asking(port, body, path, key) as response:
        return response.status, json.loads(response.read())


def test_answers_over_http(port: int, alone: Engine, tokenizer: Tokenizer) -> None:
    body = {"messages": USER, "seed": 3, "n": 2, "max_tokens": 8}
    status, whole = ask(port, body)
    assert status == 200 and whole["object"] == "chat.completion"
    asked = read(tokenizer, body).request
    assert whole["usage"]["completion_tokens"] == 16
    want = {event.reply.sample: event.reply for event in alone.generate([asked], ROWS)}
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["length"] * 2
    assert [choice["message"]["content"] for choice in whole["choices"]] == [want[k].answer for k in range(2)]
    with asking(port, body | {"stream": True, "stream_options": {"include_usage": True}}) as response:
        assert response.getheader("Content-Type").startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.read().decode().split("\n\n") if line]
    assert events.pop() == "[DONE]"
    *pieces, last = map(json.loads, events)
    assert last["usage"] == whole["usage"] and not last["choices"]
    texts = ["", ""]
    for piece in pieces:
        (choice,) = piece["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [want[k].answer for k in range(2)]
    status, plain = ask(port, {"prompt": [5, 6], "seed": 1, "max_tokens": 4}, "/v1/completions")
    assert status == 200 and plain["choices"][0]["finish_reason"] == "length" and plain["object"] == "text_completion"


@pytest.mark.parametrize("chat", [True, False])
def test_logprobs_over_http(port: int, alone: Engine, tokenizer: Tokenizer, chat: bool) -> None:
    """A stream tells of each token once, in order, what the whole answer tells; the random model writes broken text."""
    body = {"messages": USER, "logprobs": True, "top_logprobs": 2} if chat else {"prompt": "hi", "logprobs": 2}
    body |= {"seed": 3, "n": 2, "max_tokens": 9}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    asked = read(tokenizer, body, chat).request
    want = {event.reply.sample: event.reply for event in alone.generate([asked], ROWS)}
    whole = ask(port, body, path)[1]
    with asking(port, body | {"stream": True}, path) as response:
        pieces = [json.loads(line[6:]) for line in response.read().decode().split("\n\n") if "{" in line]
    streamed: list[dict[str, list[Any]]] = [{}, {}]
    for (choice,) in (piece["choices"] for piece in pieces):
        for name, values in choice.get("logprobs", {}).items():
            streamed[choice["index"]].setdefault(name, []).extend(values or [])
    for k, choice in enumerate(whole["choices"]):
        told, own = choice["logprobs"], want[k].logprobs
        assert {name: values or [] for name, values in told.items()} == streamed[k]
        texts = [tokenizer.text_of(token) for token in want[k].tokens]
        if chat:
            assert [one["token"] for one in told["content"]] == texts
            assert [one["logprob"] for one in told["content"]] == [one.logprob for one in own]
            assert bytes(told["content"][0]["bytes"]) == tokenizer.bytes_of(want[k].tokens[0])
            best = [[(b["token"], b["logprob"]) for b in one["top_logprobs"]] for one in told["content"]]
            assert best == [[(tokenizer.text_of(token), logprob) for token, logprob in one.best] for one in own]
        else:
            assert told["tokens"] == texts and told["token_logprobs"] == [one.logprob for one in own]
            assert told["text_offset"] == [sum(map(len, texts[:i])) for i in range(9)]
            assert [max(best.values()) for best in told["top_logprobs"]] == [one.best[0][1] for one in own]
    assert "logprobs" not in ask(port, {"prompt": "hi", "logprobs": False}, "/v1/completions")[1]["choices"][0]


def test_answers_of_a_form_over_http(port: int) -> None:
    """Beside a text that may say anything, whole and streamed."""
    schema = {"type": "object", "properties": {"city": {"enum": ["Zürich", "Rom"]}}, "required": ["city"]}
    held = {"response_format": form(schema | {"additionalProperties": False}), "temperature": 2, "seed": 1}
    body = {"messages": USER, "max_tokens": 60, "chat_template_kwargs": {"enable_thinking": False}}
    with asking(port, body | {"stream": True}) as other:
        status, whole = ask(port, body | held)
        (choice,) = whole["choices"]
        assert status == 200 and choice["finish_reason"] == "stop"
        assert json.loads(choice["message"]["content"]) in ({"city": "Zürich"}, {"city": "Rom"})
        other.read()
    with asking(port, body | held | {"stream": True}) as response:
        events = [line.removeprefix("data: ") for line in response.read().decode().split("\n\n") if line]
    pieces = [json.loads(event)["choices"][0] for event in events[:-1]]
    assert "".join(piece["delta"].get("content", "") for piece in pieces) == choice["message"]["content"]
    assert pieces[-1]["finish_reason"] == "stop"


def test_several_prompts_over_http(port: int, alone: Engine, tokenizer: Tokenizer) -> None:
    """More texts than there are rows, in the order of the prompts, whole and streamed; none where one is refused."""
    body = {"prompt": ["hi", [5, 6, 7], "17 * 24"], "seed": 3, "n": 2, "max_tokens": 6}
    asked = read(tokenizer, body, chat=False)
    want = {(e.request, e.reply.sample): e.reply.text for e in alone.generate(asked.requests, ROWS) if e.reply.finish}
    whole = ask(port, body, "/v1/completions")[1]
    assert [choice["text"] for choice in whole["choices"]] == [want[key] for key in asked.texts()]
    assert whole["usage"]["prompt_tokens"] == sum(len(request.tokens) for request in asked.requests)
    texts = [""] * 6
    with asking(port, body | {"stream": True}, "/v1/completions") as response:
        for line in response.read().decode().split("\n\n"):
            for choice in json.loads(line[6:])["choices"] if "{" in line else ():
                texts[choice["index"]] += choice["text"]
    assert texts == [want[key] for key in asked.texts()]
    assert ask(port, body | {"prompt": ["hi", [5] * CONTEXT]}, "/v1/completions")[0] == 400


def test_what_is_refused_over_http(port: int, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ask(port, None, "/v1/models")[1]["data"][0]
    assert listed["id"] == "m1" and ask(port, None, "/v1/models/m1") == (200, listed)
    assert ask(port, None, "/health", key="")[0] == 200
    for path, body, key, status, why in [
        ("/v1/models", None, "wrong", 401, "the key is missing or wrong"),
        ("/v1/chat/completions", {"messages": USER}, "", 401, "key"),
        ("/v1/chat/completions", b"{", "secret", 400, "not valid JSON"),
        ("/v1/chat/completions", b"[" * 100_000, "secret", 400, "not valid JSON"),
        ("/v1/chat/completions", b"\xff", "secret", 400, "not valid JSON"),
        ("/v1/chat/completions", {"messages": USER, "n": 0}, "secret", 400, "n must be 1 or more"),
        ("/v1/chat/completions", {"prompt": "x"}, "secret", 400, "give messages"),
        ("/v1/chat/completions", None, "secret", 405, "GET /v1/chat/completions: Method Not Allowed"),
        ("/v2", None, "secret", 404, "Not Found"),
        ("/v1/models/a/b", None, "secret", 404, "'a/b' is not served here: ask for 'm1'"),
        ("/v1/chat/completions", {"messages": USER, "model": "m2"}, "secret", 404, "'m2' is not served here"),
        ("/v1/chat/completions", b'{"\\ud800": 1}', "secret", 400, "is not known here"),
    ]:
        found, value = ask(port, body, path, key)
        assert found == status and why in value["error"]["message"], (path, body, value)
    with asking(port, None) as response:
        assert response.status == 405 and response.getheader("Allow") == "POST"
    long = {"messages": [{"role": "user", "content": "x" * (2 << 20)}]}
    assert ask(port, long)[0] == 413  # more than fits into 256 tokens, however it is written
    gates = [Gate(3), Gate(3)]
    full = [order(service, request(k, CONTEXT, n=3), gate) for k, gate in enumerate(gates)]
    with asking(port, {"messages": USER}) as response:
        assert response.status == 503 and response.getheader("Retry-After") == "1"
    for number, gate in zip(full, gates, strict=True):
        service.cancel(number)
        gate.opened.set()

    def broken(*_: Any) -> Any:
        raise RuntimeError("secret things")

    monkeypatch.setattr(protocol, "_check", broken)
    status, value = ask(port, {"messages": USER})
    assert status == 500 and value["error"]["type"] == "server_error" and "secret" not in str(value)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_texts(port: int, service: Service, stream: bool) -> None:
    """While they are generated, one after the other, which takes longer than is waited here."""
    with asking_for_long(service, port, stream):
        assert service.texts > 90
    deadline = time.monotonic() + 1.5
    while service.texts and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.texts == 0


@contextlib.contextmanager
def asking_for_long(service: Service, port: int, stream: bool) -> Iterator[None]:
    """A client that hangs up in the middle."""
    body = json.dumps({"messages": USER, "stream": stream, "max_tokens": CONTEXT, "n": 100})
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: {len(body)}"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        else:
            deadline = time.monotonic() + 10
            while not service.texts and time.monotonic() < deadline:
                time.sleep(0.01)
        yield


@contextlib.contextmanager
def serve(*args: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "m1jax.serve", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        try:
            yield server
        finally:
            server.kill()


def test_the_command_serves_until_ctrl_c(tmp_path: Path) -> None:
    """The shipped model, asked by `evaluate --against`; a stream that Ctrl-C ends is told why."""
    key = tmp_path / "key"
    key.write_text("secret\n")
    with serve(
        "--port",
        "0",
        "--api-key-file",
        str(key),
        "--context",
        "512",
        "--cache-tokens",
        "1024",
        "--batch-size",
        "4",
        "--warm-up",
    ) as server:
        assert server.stderr
        assert server.stderr.readline() == "compiling for up to 4 texts…\n"
        line = server.stderr.readline()
        assert line.startswith("m1-nano at http://127.0.0.1:"), line
        port = int(line.split(":")[2].split("/")[0])
        address = f"http://127.0.0.1:{port}/v1"
        command = [sys.executable, "-m", "m1jax.evaluate", "--against", address, "--api-key-file", str(key)]
        command += ["--task", "addition", "--problems", "12", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["scores"][0]["accuracy"] > 0.9
        talk = [{"role": "user", "content": "1 2 3 4 5 " * 40}, {"role": "assistant", "content": "15"}, *USER]
        first, second = (ask(port, {"messages": talk[:n], "max_tokens": 1})[1]["usage"] for n in (1, 3))
        assert second["prompt_tokens_details"]["cached_tokens"] == first["prompt_tokens"] > 256
        body = {"messages": USER, "stream": True, "temperature": 3, "repetition_penalty": 9, "thinking_budget": 400}
        with asking(port, body) as response:
            assert response.readline().startswith(b"data: ")
            server.send_signal(signal.SIGINT)
            rest = response.read().decode()
        assert "[DONE]" in rest or "the server ends: ask again later" in rest
        assert server.wait(30) == 130
        assert server.stderr.read().strip() == "interrupted"


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--port", "70000"], "port must be from 0 to 65535"),
        (["--batch-size", "0"], "batch-size must be 1 or more"),
        (["--max-waiting", "-1"], "max-waiting must be 0 or more"),
        (["--model", "nowhere"], "nowhere is not a folder"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--api-key-file", os.devnull], "is empty"),
        (["--context", "99999999"], "context must be from 2 to the model's"),
        (["--warm-up"], "--warm-up goes with --context"),
        (["--cache-tokens", "512"], "--cache-tokens goes with --context"),
        (["--prefix-cache", "2"], "--prefix-cache goes with --context"),
        (["--prefix-cache", "-1", "--context", "512"], "prefix-cache must be 0 or more, not -1"),
        (["--cache-tokens", "511", "--context", "512"], "cache-tokens must be 512 or more, room for one text, not 511"),
    ],
)
def test_commands_that_are_refused(
    args: list[str], why: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from m1jax.serve import main

    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == 2 and why in capsys.readouterr().err


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    from m1jax.serve import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as end:
            main(["--port", str(port)])
    assert end.value.code == 2 and f"port {port}: Address already in use; choose another" in capsys.readouterr().err
