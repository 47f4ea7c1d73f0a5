"""The HTTP of the server: addresses, streams, errors, and what happens when a client goes away."""

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from m1jax.errors import UserError
from m1jax.generation import Event
from m1jax.prompt import Options, Prompter
from m1jax.server import protocol
from m1jax.server.protocol import Answer, Asked
from m1jax.server.service import Busy, Closing, Service

LARGEST = 64 << 20  # bytes of a request's body
LOOK = 1.0  # seconds after which one looks whether a client that waits is still there
LATER = 1  # seconds after which a client may ask again


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    @property
    def value(self) -> dict[str, Any]:
        """What is sent."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": None}}

    @property
    def response(self) -> Response:
        """The answer."""
        headers = {"Retry-After": str(LATER)} if self.status == 503 else None
        return JSONResponse(self.value, self.status, headers)


class Server:
    """The addresses of one served model.

    Args:
      service: generates.
      name: of the model.
      options: what holds where a request says nothing.
      key: that clients must send as bearer token; None if none.
    """

    def __init__(self, service: Service, name: str, options: Options, key: str | None = None) -> None:
        self._service, self._name, self._options, self._key = service, name, options, key
        self._prompter = Prompter(service.engine.tokenizer)
        self._began = int(time.time())

    @property
    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.plain, methods=["POST"]),
        ]
        handlers: Any = {Refused: _refused, HTTPException: _http, ClientDisconnect: _gone, Exception: _broken}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def health(self, request: Request) -> Response:
        """That it runs, and how many texts are generated or wait."""
        return JSONResponse({"status": "ok", "texts": self._service.texts})

    async def models(self, request: Request) -> Response:
        """The one model."""
        self._authorise(request)
        model = {"id": self._name, "object": "model", "created": self._began, "owned_by": "m1jax"}
        return JSONResponse({"object": "list", "data": [model | {"max_model_len": self._service.engine.context}]})

    async def chat(self, request: Request) -> Response:
        """A reply to messages."""
        return await self._answer(request, chat=True)

    async def plain(self, request: Request) -> Response:
        """What follows a text."""
        return await self._answer(request, chat=False)

    def _authorise(self, request: Request) -> None:
        sent = request.headers.get("Authorization", "").encode()
        if self._key is not None and not hmac.compare_digest(sent, f"Bearer {self._key}".encode()):
            raise Refused(401, "the key is missing or wrong: send it as bearer token")

    async def _answer(self, request: Request, chat: bool) -> Response:
        self._authorise(request)
        body = await _body(request)
        try:
            asked = await run_in_threadpool(protocol.read, body, chat, self._name, self._prompter, self._options)
            work = _Work(self._service, asked, self._name)
        except (Busy, Closing) as error:
            raise Refused(503, str(error)) from None
        except UserError as error:
            raise Refused(400, " ".join(str(error).split())) from None
        return _Stream(work) if asked.stream else await work.whole(request)


class _Work:
    """An order, and what has come of it: told in the engine's thread, read in that of the HTTP."""

    def __init__(self, service: Service, asked: Asked, name: str) -> None:
        self._service, self._asked = service, asked
        self._answer = Answer(asked, name)
        self._news: asyncio.Queue[tuple[list[dict[str, Any]] | Refused, bool]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._number = service.order(asked.request, self._told)

    def end(self) -> None:
        """Ends the order, if it has not ended."""
        self._service.cancel(self._number)

    def _told(self, news: Event | Exception) -> None:
        if isinstance(news, Event) and news.reply.finish == "interrupted":
            news = Closing()
        if isinstance(news, Event):
            out: Any = self._answer.push(news.reply, news.segments)
        else:
            out = Refused(503 if isinstance(news, Closing) else 500, " ".join(str(news).split()) or repr(news))
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._news.put_nowait, (out, self._answer.done))

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events, as the text comes."""
        done = False
        while not done:
            out, done = await self._news.get()
            if isinstance(out, Refused):
                yield _event(out.value)
                return
            for piece in out:
                yield _event(piece)
        if self._asked.usage:
            yield _event(self._answer.usage_piece())
        yield "data: [DONE]\n\n"

    async def whole(self, request: Request) -> Response:
        """The answer when it is complete; ends the order if the client goes away."""
        try:
            done = False
            while not done:
                news = asyncio.ensure_future(self._news.get())
                while not (await asyncio.wait({news}, timeout=LOOK))[0]:
                    if await request.is_disconnected():
                        news.cancel()
                        raise ClientDisconnect
                out, done = await news
                if isinstance(out, Refused):
                    raise out
            return JSONResponse(self._answer.whole)
        finally:
            self.end()


class _Stream(StreamingResponse):
    """The answer in pieces; ends the order if the client goes away, before the first piece too."""

    def __init__(self, work: _Work) -> None:
        super().__init__(work.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._work.end()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _body(request: Request) -> Any:
    """The JSON value of a request. Raises `Refused`."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > LARGEST:
            raise Refused(413, f"the body has more than {LARGEST} bytes: shorten the prompt")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not valid JSON ({error})") from None


async def _refused(request: Request, error: Refused) -> Response:
    return error.response


async def _http(request: Request, error: HTTPException) -> Response:
    return Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response


async def _broken(request: Request, error: Exception) -> Response:
    return Refused(500, "an error of the server, which its log tells").response


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # which nobody reads
