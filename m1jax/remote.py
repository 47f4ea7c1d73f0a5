"""Replies of an OpenAI-compatible server, over HTTP, with the standard library."""

import dataclasses
import http.client
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from m1jax.errors import UserError
from m1jax.tasks import Problem

TIMEOUT = 600.0  # seconds that a server may take for one reply
TRIES = 9  # three minutes, as long as a limit of questions a minute lasts that many ask for at once
HUNG = 2  # tries of a server that takes a question and is silent
WAIT = 1.0  # seconds before the second try, twice as many before each further one
MOST = 60.0  # seconds, whatever the server asks for
AWAY = 0  # in place of a status: no answer at all
BUSY = (408, 429, 500, 502, 503, 504)  # answers that may be others a little later
_SHOWN = 200  # characters of a server's complaint that are shown


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
    """

    url: str
    name: str
    key: str
    instruction: str
    max_tokens: int
    connections: int

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
        try:
            key = "" if key_file is None else key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{key_file} cannot be read: {error}") from None
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise UserError(f"{key_file} holds more than a key: it must be one word on one line")
        remote = cls(url.rstrip("/"), name or "", key, instruction, max_tokens, connections)
        if name is None:
            listed = remote._ask("GET", "/models", None).get("data")
            first = listed[0] if isinstance(listed, list) and listed else None
            if not isinstance(first, dict) or not isinstance(first.get("id"), str):
                raise UserError(f"{url}/models lists no model: name one with --name")
            remote = dataclasses.replace(remote, name=first["id"])
        return remote

    def __call__(self, problems: Sequence[Problem]) -> list[tuple[str, bool]]:
        """Reply and whether it ended, of each problem."""
        with ThreadPoolExecutor(self.connections) as pool:
            return list(pool.map(self._reply, problems))

    def _reply(self, problem: Problem) -> tuple[str, bool]:
        question = f"{problem.question}\n{self.instruction}" if self.instruction else problem.question
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        answer = self._ask("POST", "/chat/completions", body, TRIES, WAIT)
        try:
            choice = answer["choices"][0]
            message, finish = choice["message"], choice["finish_reason"]
            text = _text(message.get("content"))
            thought = _text(message.get("reasoning_content") or message.get("reasoning"))
        except (KeyError, IndexError, TypeError, AttributeError):
            raise UserError(f"{self.url} gave no chat completion, but {json.dumps(answer)[:_SHOWN]}") from None
        # Some servers hand over the thinking apart from the answer.
        return (f"<think>{thought}</think>{text}" if thought else text), finish == "stop"

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None, tries: int = 1, wait: float = 0.0
    ) -> dict[str, Any]:
        """The JSON object that the server answers; one that is busy or away is asked again, ever later."""
        try:
            status, reason, text, later = self._send(method, path, body)
        except (OSError, http.client.HTTPException) as error:
            if tries == 1:
                raise UserError(
                    f"{self.url} cannot be reached ({error}): start the server, or correct the URL"
                ) from None
            status, reason, text, later = AWAY, "", "", None
            if isinstance(error, TimeoutError):
                tries = min(tries, HUNG)
        if tries > 1 and status in (AWAY, *BUSY):
            time.sleep(min(wait if later is None else later, MOST))
            return self._ask(method, path, body, tries - 1, 2 * wait)
        if status != 200:
            raise UserError(f"{self.url}{path} answers {status} {reason}: {text[:_SHOWN]}")
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise UserError(f"{self.url}{path} answers no JSON object: is this an OpenAI-compatible server?")
        return value

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


def _seconds(later: str) -> float | None:
    """How long a `Retry-After` asks to wait, in seconds or until a date; None if it does not."""
    try:
        return max(0.0, float(later))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(later)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - time.time())


def _text(content: Any) -> str:
    """A message's text, which may come in parts. Raises `TypeError` or `KeyError` if it is none."""
    if isinstance(content, list):
        return "".join(_text(part["text"]) for part in content)
    if not isinstance(content, str | None):
        raise TypeError
    return content or ""
