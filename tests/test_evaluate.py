"""`python -m m1jax.evaluate`: intervals, a model of our own, a server of somebody else's, bad input."""

import datetime
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from m1jax import UserError
from m1jax.evaluate import Score, main, open_local, score, table, wilson, written
from m1jax.remote import Remote
from m1jax.tasks import TASKS, Problem, verify
from m1jax.tokenizer import Tokenizer
from tests.tools import HELLO

HTTP_DATE = "%a, %d %b %Y %H:%M:%S GMT"
TASK = TASKS["addition"]
SUM = Problem("addition", "What is 27 + 58?", "", "85", "")


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # By hand from the formula: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n) with z² = 3.8414588
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (5, 10, 0.2365931, 0.7634069),
        (95, 100, 0.8882495, 0.9784563),
    ],
)
def test_wilson_intervals(successes: int, trials: int, low: float, high: float) -> None:
    found = wilson(successes, trials)
    assert found == pytest.approx((low, high), abs=2e-6)
    for p in found:  # where the observed share is just z standard errors away
        assert (successes / trials - p) ** 2 == pytest.approx(1.959963985**2 * p * (1 - p) / trials, abs=1e-9)


def test_wilson_wants_trials() -> None:
    with pytest.raises(ValueError, match="successes"):
        wilson(3, 2)


def test_scores_count_what_is_right_and_complete() -> None:
    problems = TASK.problems(4, seed=0)
    right = problems[0].reply

    def answers(asked: Any) -> list[tuple[str, bool]]:
        assert asked == problems
        cut_off = (problems[1].reply, False)
        bare = (problems[2].answer, True)
        return [(right, True), cut_off, bare, ("<think>x</think>?", True)]

    found = score(TASK, problems, 4, answers)
    assert (found.correct, found.well_formed, found.problems) == (2, 2, 4)
    assert found.accuracy == 0.5 and found.interval == wilson(2, 4)
    assert "50.0%" in table([found]) and "15.0% to 85.0%" in table([found])


@pytest.mark.parametrize("mesh", [None, "auto", "data=4,expert=2"])
def test_a_model_here(mesh: str | None) -> None:
    """The test model knows one sum by heart and always answers in the format; a mesh need not divide the problems."""
    local = open_local(HELLO, "float32", window=64, rows=3, mesh=mesh)
    others = [Problem("addition", question, "", "?", "") for question in ("Who are you?", "Hello!", "Tell me a joke.")]
    replies = local([*others, SUM, others[0]])
    assert replies[3] == ("<think>\n27 + 58: 7 + 8 = 15, write 5, carry 1. 2 + 5 + 1 = 8.\n</think>\n85", True)
    assert replies[4] == replies[0] and "m1-hello" in replies[0][0]
    assert score(TASK, [SUM] * 4, 2, local).correct == 4


def test_marks_inside_a_reply_count() -> None:
    """Only the token that ends it is no part of it: a mark in the middle is neither M1's format nor the answer."""
    tokenizer = Tokenizer.load(HELLO)
    ids = tokenizer.encode("<think>\nx\n</think>\n85<end_of_sentence>")
    assert verify(SUM, written(tokenizer, ids, True)) == (True, True)
    assert written(tokenizer, ids, False).endswith("85<end_of_sentence>")
    marked = tokenizer.encode("<think>\nx\n</think>\n8<beginning_of_sentence>5<end_of_sentence>")
    assert not verify(SUM, written(tokenizer, marked, True)).correct


# --- a server ------------------------------------------------------------------------------------------------------


class Fake(ThreadingHTTPServer):
    """Answers sums, as an OpenAI-compatible server would; `mode` makes it misbehave."""

    daemon_threads = True
    mode = "right"
    later = "0"  # what it says then about when to come back
    refusals = 0  # questions that are still to be refused, as by a busy server
    finish: Any = "stop"
    bad: Sequence[str] = ()  # questions that get the answer of `status`, in spite of `mode`
    status = 400  # 0 hangs up
    seen: list[dict[str, Any]]


class Handler(BaseHTTPRequestHandler):
    server: Fake  # pyright: ignore[reportIncompatibleVariableOverride]

    def _send(self, status: int, value: Any) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self._send(200, {"data": {"empty": [], "names": ["adder"]}.get(self.server.mode, [{"id": "adder"}])})

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body | {"authorization": self.headers["Authorization"]})
        if self.server.refusals:
            self.server.refusals -= 1
            self.send_response(429 if self.server.refusals % 2 else 503)
            self.send_header("Retry-After", self.server.later)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if any(body["messages"][0]["content"] == question for question in self.server.bad):
            if self.server.status:
                self._send(self.server.status, {"error": "too long"})
            return
        if self.server.mode == "broken":
            self._send(500, {"error": "out of memory"})
            return
        if self.server.mode == "html":
            self._send(200, b"<html>hello</html>")
            return
        if self.server.mode == "deep":
            self._send(200, b"[" * 200_000)
            return
        if self.server.mode == "silent":
            self._send(200, {"choices": [{"message": {"content": None}}]})
            return
        if self.server.mode == "odd":
            self._send(200, {"choices": []})
            return
        words = body["messages"][0]["content"].split("\n")[0].replace("?", " ").replace(".", " ").split()
        total = sum(int(word) for word in words if word.isdigit())
        message: dict[str, Any] = {"role": "assistant", "content": f"**{total}**"}
        if self.server.mode == "parts":
            message["content"] = [{"type": "text", "text": f"{total}"[:1]}, {"type": "text", "text": f"{total}"[1:]}]
        if self.server.mode == "number":
            message["content"] = total
        if self.server.mode == "reasoning":
            message["reasoning_content"] = "I add."
        self._send(200, {"choices": [{"message": message, "finish_reason": self.server.finish}]})

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[Fake]:
    fake = Fake(("127.0.0.1", 0), Handler)
    fake.seen = []
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield fake
    fake.shutdown()
    thread.join()
    fake.server_close()


def url(server: Fake) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return int(end.value.code or 0)


def test_a_server_of_somebody_elses(server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("secret\n")
    flags = ["--against", url(server), "--task", "addition", "--problems", "30", "--json", "--batch-size", "4"]
    assert run(*flags, "--instruction", "Only the number.", "--api-key-file", str(tmp_path / "key")) == 0
    (found,) = json.loads(capsys.readouterr().out)["scores"]
    assert (found["task"], found["problems"], found["correct"], found["well_formed"]) == ("addition", 30, 30, 0)
    assert len(server.seen) == 30
    asked = server.seen[0]
    assert (asked["model"], asked["temperature"], asked["authorization"]) == ("adder", 0, "Bearer secret")
    assert asked["messages"][0]["content"].endswith("\nOnly the number.")
    server.mode = "reasoning"
    assert run(*flags, "--name", "other") == 0
    (found,) = json.loads(capsys.readouterr().out)["scores"]
    assert found["well_formed"] == found["correct"] == 30 and server.seen[-1]["model"] == "other"
    server.mode = "parts"
    assert run(*flags) == 0
    assert json.loads(capsys.readouterr().out)["scores"][0]["correct"] == 30
    server.finish = "length"
    assert run(*flags) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["scores"][0]["correct"] == 0
    assert "warning: 30 of 30 replies were cut off after 256 tokens and count as wrong" in captured.err


def test_a_busy_server_is_asked_again(server: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """After as long as it says, or else after ever longer; and one that is away for a moment, too."""
    waits: list[float] = []
    monkeypatch.setattr("m1jax.remote.time.sleep", waits.append)
    server.refusals = 3
    assert Remote.open(url(server), "adder", None, "", 8, 1)(TASK.problems(2, seed=0))[1][1]
    assert waits == [0, 0, 0] and len(server.seen) == 5
    in_future = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=30)).strftime(HTTP_DATE)
    odd_dates = [(later, 1, 1) for later in ("nan", "Mon, 01 Jan 99999999999999999999 00:00:00 GMT")]
    for later, low, high in (("0.5", 0.5, 0.5), (in_future, 25, 30), ("soon", 1, 1), ("1e9", 60, 60), *odd_dates):
        server.refusals, server.later = 1, later
        Remote.open(url(server), "adder", None, "", 8, 1)(TASK.problems(1, seed=0))
        assert low <= waits[-1] <= high
    waits.clear()
    server.mode = "broken"
    with pytest.raises(UserError, match="answers 500"):
        Remote.open(url(server), "adder", None, "", 8, 1)(TASK.problems(1, seed=0))
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    waits.clear()
    with pytest.raises(UserError, match="cannot be reached") as refused:
        Remote.open("http://127.0.0.1:9/v1", "adder", None, "", 8, 1)(TASK.problems(1, seed=0))
    assert refused.type is UserError  # so that the first question ends it
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    waits.clear()
    monkeypatch.setattr("m1jax.remote.TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(UserError, match="timed out"):
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        Remote.open(address, "adder", None, "", 8, 1)(TASK.problems(1, seed=0))
    assert waits == [1]


@pytest.mark.parametrize(
    ("finish", "ended"),
    [("stop", True), (None, True), ("eos_token", True), ("stop_sequence", True), ("content_filter", False)],
)
def test_words_for_an_end(server: Fake, finish: str | None, ended: bool) -> None:
    server.finish = finish
    assert Remote.open(url(server), "adder", None, "", 8, 1)(TASK.problems(1, seed=0))[0][1] is ended


def test_an_odd_answer_is_asked_again(
    server: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A few times, and said."""
    odd = iter(["html", "odd", "deep"])
    monkeypatch.setattr(Fake, "mode", property(lambda self: mode))
    mode = next(odd)

    def wait(seconds: float) -> None:
        nonlocal mode
        mode = next(odd, "right")

    monkeypatch.setattr("m1jax.remote.time.sleep", wait)
    assert Remote.open(url(server), "adder", None, "", 8, 1)(TASK.problems(1, seed=0))[0][1]
    assert len(server.seen) == 4 and capsys.readouterr().err.count("asking again") == 1
    mode, odd = "silent", iter(["silent"] * 9)
    with pytest.raises(UserError, match="is this an OpenAI-compatible server"):
        Remote.open(url(server), "adder", None, "", 8, 1)(TASK.problems(1, seed=0))
    assert len(server.seen) == 8


def test_one_question_fails(server: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It is wrong and said to be unanswered, also where its tries run out; a server that refuses all ends it."""
    monkeypatch.setattr("m1jax.remote.WAIT", 0.0)
    questions = [problem.question for problem in TASK.problems(12, 0, TASK.difficulty)]
    flags = ["--against", url(server), "--task", "addition", "--problems", "12", "--json"]
    server.bad = questions[:4] + questions[5:9]
    for server.status in (400, 413, 422, 500, 0):
        assert run(*flags) == 0
        out, err = capsys.readouterr()
        (found,) = json.loads(out)["scores"]
        assert (found["correct"], found["unanswered"], found["cut_off"]) == (4, 8, 0)
        (warning,) = [line for line in err.splitlines() if not line.endswith("; asking again")]
        assert warning.startswith("warning: 8 of 12 questions were not answered and count as wrong; the first: http")
        assert (f"answers {server.status}" if server.status else "Remote end closed connection") in warning
    server.bad = questions[:1]
    for server.status in (401, 403, 404):
        assert run(*flags) == 2
        assert f"answers {server.status}" in capsys.readouterr().err
    server.bad, server.status = questions[2:7], 400
    assert run(*flags) == 2
    assert "answers 400" in capsys.readouterr().err


def test_ctrl_c_waits_for_no_reply() -> None:
    # A pytest in the background ignores Ctrl-C, and what it starts would as well.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import m1jax.evaluate as e; e.main()"
    )
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        flags = ["--against", address, "--name", "x", "--task", "addition", "--batch-size", "2"]
        with subprocess.Popen([sys.executable, "-c", code, *flags], stderr=subprocess.PIPE, text=True) as command:
            try:
                asked = [silent.accept()[0] for _ in range(2)]
                start = time.monotonic()
                command.send_signal(signal.SIGINT)
                assert command.wait(30) == 130 and time.monotonic() - start < 5
                assert command.stderr is not None and command.stderr.read() == "interrupted\n"
            finally:
                command.kill()
            for connection in asked:
                connection.close()


def test_what_is_judged_is_shown_when_the_server_goes(
    server: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("m1jax.remote.WAIT", 0.0)
    monkeypatch.setattr(Fake, "mode", property(lambda self: "broken" if len(self.seen) > 5 else "right"))
    assert run("--against", url(server), "--task", "addition", "--task", "sorting", "--problems", "5") == 2
    out, err = capsys.readouterr()
    assert "100.0%" in out and "sorting" not in out and "answers 500" in err


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("broken", 'answers 500 Internal Server Error: {"error": "out of memory"}'),
        ("html", "answers 200 OK: <html>hello</html> (is this an OpenAI-compatible server?)"),
        ("deep", "answers 200 OK: [[["),
        ("odd", 'answers 200 OK: {"choices": []} (is this'),
        ("number", "(is this an OpenAI-compatible server?)"),
        ("empty", "lists no model"),
        ("names", "lists no model"),
    ],
)
def test_servers_that_misbehave(
    server: Fake, mode: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.mode = mode
    monkeypatch.setattr("m1jax.remote.WAIT", 0.0)
    assert run("--against", url(server), "--task", "addition", "--problems", "3") == 2
    *notes, error = capsys.readouterr().err.splitlines()
    assert message in error and error.startswith("error: ")
    assert len(notes) <= 1 and all(note.endswith("; asking again") for note in notes)


def test_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cases = [
        (["--against", "localhost:8000"], "is not an address"),
        (["--against", "http://127.0.0.1:9/v1"], "cannot be reached"),
        (["--against", "http://my..host/v1"], "cannot be sent"),
        (["--against", "http://localhost", "--model", str(HELLO)], "contradict"),
        (["--name", "x"], "--name goes with --against"),
        (["--task", "adition"], "did you mean 'addition'"),
        (["--problems", "0"], "problems must be 1"),
        (["--difficulty", "0"], "difficulty must be 1"),
        (["--task", "sorting", "--difficulty", "100"], "task sorting: difficulty must be 99 at most, not 100"),
        (["--task", "multiplication", "--difficulty", "7"], "difficulty must be 6 at most"),
        (["--against", "http://localhost:99999/v1"], "is not an address"),
        (["--model", str(tmp_path / "none")], "is not a folder"),
        (["--model", str(tmp_path)], "has no tokenizer.json"),
    ]
    for arguments, message in cases:
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err


def test_remote_names_the_key_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Remote.open("http://localhost/v1", "x", tmp_path / "none", "", 8, 1)


def test_a_key_is_never_shown(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-secret\nsecond-secret\n")
    with pytest.raises(UserError, match="keys holds more than a key: it must be one word on one line") as error:
        Remote.open("http://127.0.0.1:9/v1", "x", tmp_path / "keys", "", 8, 1)
    assert "secret" not in str(error.value)


def test_the_table() -> None:
    lines = table([Score("addition", 4, 200, 190, 200, 1.0)]).split("\n")
    assert lines[1].split() == ["addition", "4", "200", "95.0%", "91.0%", "to", "97.3%", "100.0%"]
