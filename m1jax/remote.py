"""Replies of an OpenAI-compatible server, over HTTP, with the standard library."""

import contextlib
import dataclasses
import http.client
import json
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from m1jax.errors import UserError
from m1jax.tasks import Problem

TIMEOUT = 600.0  # seconds that a server may take for one reply
TRIES = 9  # three minutes, as long as a limit of questions a minute lasts that many ask for at once
HUNG = 2  # tries of a server that takes a question and is silent
ODD = 4  # tries where what comes back is no reply
WAIT = 1.0  # seconds before the second try, twice as many before each further one
MOST = 60.0  # seconds, whatever the server asks for
AWAY = 0  # in place of a status: no answer at all
OK = 200
BUSY = (408, 429, 500, 502, 503, 504)  # answers that may be others a little later
REFUSED = (401, 403, 404)  # answers that every question would get: a wrong key, address or name
LOST = (TimeoutError, ConnectionResetError, BrokenPipeError, http.client.HTTPException)  # one question may cause them
IN_A_ROW = 5  # questions: where so many fail, it is the server
UNENDED = ("length", "content_filter")  # servers have several other words for an end, or none
_SHOWN = 200  # characters of a server's complaint that are shown


class Unanswered(UserError):
    """A question without a reply, when the next one may get one."""


@dataclasses.dataclass(frozen=True)
class Remote:
    """A server's chat completions, greedy.

    Attributes:
      url: base address, with `/v1` if the server has it, e.g. ``http://localhost:8000/v1``.
      name: the model to ask for.
      key: sent as bearer token; empty is none.
      instruction: put after each question, on a line of its own.
      max_tokens: the most tokens of a reply.
      connections: questions asked at once.
      told: what was said of waiting.
    """

    url: str
    name: str
    key: str
    instruction: str
    max_tokens: int
    connections: int
    told: list[str] = dataclasses.field(default_factory=list, compare=False)

    @classmethod
    def open(
        cls, url: str, name: str | None, key_file: Path | None, instruction: str, max_tokens: int, connections: int
    ) -> "Remote":
        """Connects; without a name, the first model that the server lists.

        Raises:
          UserError: no such server, or it lists no model.
        """
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # a port or an IPv6 address that is none
            good = False
        if not good:
            raise UserError(f"{url} is not an address: give one like http://localhost:8000/v1")
        key = "" if key_file is None else read_key(key_file)
        remote = cls(url.rstrip("/"), name or "", key, instruction, max_tokens, connections)
        if name is None:
            try:
                listed = remote._ask("GET", "/models", None, lambda value: value["data"])
            except UserError as error:
                raise UserError(f"{error}; a server that lists no models wants one named, with --name") from None
            first = listed[0] if isinstance(listed, list) and listed else None
            if not isinstance(first, dict) or not isinstance(first.get("id"), str):
                raise UserError(f"{url}/models lists no model: name one with --name")
            remote = dataclasses.replace(remote, name=first["id"])
        return remote

    def __call__(self, problems: Sequence[Problem]) -> list[tuple[str | UserError, bool]]:
        """Reply, or why there is none, and whether it ended, of each problem.

        Raises:
          UserError: the server answers none, or not `IN_A_ROW` of them one after the other.
        """
        asked: list[tuple[Problem, Future[tuple[str, bool]]]] = [(problem, Future()) for problem in problems]
        todo = deque(asked)
        for _ in range(min(self.connections, len(asked))):
            # Daemons, in place of an executor's threads: a Python that exits waits for those.
            threading.Thread(target=self._work, args=(todo,), daemon=True).start()
        replies: list[tuple[str | UserError, bool]] = []
        failed = 0
        try:
            for _, reply in asked:
                try:
                    replies.append(reply.result())
                    failed = 0
                except Unanswered as error:
                    failed += 1
                    if failed == min(IN_A_ROW, len(asked)):
                        raise
                    replies.append((error, False))
            return replies
        finally:
            todo.clear()

    def _work(self, todo: deque[tuple[Problem, Future[tuple[str, bool]]]]) -> None:
        """Asks what no other thread has taken, until nothing is left."""
        with contextlib.suppress(IndexError):
            while True:
                problem, reply = todo.popleft()
                try:
                    reply.set_result(self._reply(problem))
                except Exception as error:
                    reply.set_exception(error)

    def _reply(self, problem: Problem) -> tuple[str, bool]:
        question = f"{problem.question}\n{self.instruction}" if self.instruction else problem.question
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        return self._ask("POST", "/chat/completions", body, _completion, TRIES, WAIT)

    def _ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[Any], Any],
        tries: int = 1,
        wait: float = 0.0,
    ) -> Any:
        """What `read` finds in the JSON that the server answers; one that is busy, away or odd is asked again, later.

        Raises:
          Unanswered: the question may be the reason.
          UserError: it is the server.
        """
        later = None
        try:
            status, reason, text, later = self._send(method, path, body)
        except (OSError, http.client.HTTPException) as error:
            status, lost = AWAY, isinstance(error, LOST)
            complaint = f"{self.url} cannot be reached ({error}): start the server, or correct the URL"
            if isinstance(error, TimeoutError):
                tries = min(tries, HUNG)
        else:
            lost, complaint = status not in REFUSED, f"{self.url}{path} answers {status} {reason}: {text[:_SHOWN]}"
            if status == OK:
                try:
                    return read(json.loads(text))
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    complaint += " (is this an OpenAI-compatible server?)"
                    tries = min(tries, ODD)
        if tries > 1 and status in (AWAY, OK, *BUSY):
            self._tell(complaint)
            time.sleep(min(wait if later is None else later, MOST))
            return self._ask(method, path, body, read, tries - 1, 2 * wait)
        raise (Unanswered if lost else UserError)(complaint)

    def _tell(self, complaint: str) -> None:
        """Says once why it waits, not for each question."""
        if not self.told:
            self.told.append(complaint)
            print(f"note: {' '.join(complaint.split())}; asking again", file=sys.stderr)

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, str, str, float | None]:
        """Status, its reason, the text, and in how many seconds to come back if the server says so."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT)
        try:
            connection.request(method, parts.path + path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode("utf-8", errors="replace")
            return response.status, response.reason, text, _seconds(response.getheader("Retry-After", ""))
        except ValueError as error:
            raise UserError(f"{self.url} cannot be sent ({error}): correct it") from None
        finally:
            connection.close()


def read_key(file: Path) -> str:
    """The bearer token in a file; an empty one is none. Raises `UserError`."""
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"{file} holds more than a key: it must be one word on one line")
    return key


def _seconds(later: str) -> float | None:
    """How long a `Retry-After` asks to wait, in seconds or until a date; None if it does not."""
    try:
        seconds = float(later)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(later).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _completion(value: Any) -> tuple[str, bool]:
    """The reply in a chat completion, and whether it ended. Raises what Python does where the value is none."""
    choice = value["choices"][0]
    message = choice["message"]
    text, thought = _text(message.get("content")), _text(message.get("reasoning_content") or message.get("reasoning"))
    if message.get("content") is None and not thought:
        raise TypeError  # not even an empty text
    # Some servers hand over the thinking apart from the answer.
    return (f"<think>{thought}</think>{text}" if thought else text), choice.get("finish_reason") not in UNENDED


def _text(content: Any) -> str:
    """A message's text, which may come in parts. Raises `TypeError` or `KeyError` if it is none."""
    if isinstance(content, list):
        return "".join(_text(part["text"]) for part in content)
    if not isinstance(content, str | None):
        raise TypeError
    return content or ""
