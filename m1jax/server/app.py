"""The HTTP of the server: addresses, streams, errors, and what happens when a client goes away."""

import asyncio
import contextlib
import functools
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

LARGEST = 64 << 20  # bytes of a request's body, or as many as can fit into the context:
ROOM, WRITTEN = 1 << 20, 8  # those beside the text, and those that JSON may write for one
BROKEN = "an error of the server, which its log tells"
LATER = 1  # seconds after which a client may ask again


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Any = None) -> None:
        super().__init__(" ".join(message.split()))
        self.status, self._code, self._headers = status, code, headers

    @property
    def value(self) -> dict[str, Any]:
        """What is sent."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self._code}}

    @property
    def response(self) -> Response:
        """The answer."""
        headers = {"Retry-After": str(LATER)} if self.status == 503 else self._headers
        return _Ascii(self.value, self.status, headers)


class _Ascii(JSONResponse):
    """JSON in ASCII: texts may have half of a surrogate pair, which UTF-8 has not."""

    def render(self, content: Any) -> bytes:
        """The bytes of it."""
        return json.dumps(content).encode()


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
        self._largest = min(LARGEST, ROOM + WRITTEN * service.engine.context * self._prompter.tokenizer.longest)

    @property
    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.plain, methods=["POST"]),
        ]
        handlers: Any = {Refused: _refused, HTTPException: _http, ClientDisconnect: _gone, Exception: _broken}
        return Starlette(routes=routes, exception_handlers=handlers)

    async def health(self, request: Request) -> Response:
        """Whether it takes orders, and how many texts are generated or wait."""
        works = self._service.works
        return JSONResponse({"status": "ok" if works else "ends", "texts": self._service.texts}, 200 if works else 503)

    async def models(self, request: Request) -> Response:
        """The one model, in a list."""
        self._authorise(request)
        return JSONResponse({"object": "list", "data": [self._model]})

    async def model(self, request: Request) -> Response:
        """The one model."""
        self._authorise(request)
        if request.path_params["name"] != self._name:
            raise _other_model(request.path_params["name"], self._name)
        return JSONResponse(self._model)

    @property
    def _model(self) -> dict[str, Any]:
        model = {"id": self._name, "object": "model", "created": self._began, "owned_by": "m1jax"}
        return model | {"max_model_len": self._service.engine.context}

    async def chat(self, request: Request) -> Response:
        """A reply to messages."""
        return await self._answer(request, chat=True)

    async def plain(self, request: Request) -> Response:
        """What follows a text."""
        return await self._answer(request, chat=False)

    def _authorise(self, request: Request) -> None:
        scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
        right = scheme.lower() == "bearer" and hmac.compare_digest(sent.encode(), (self._key or "").encode())
        if self._key is not None and not right:
            raise Refused(401, "the key is missing or wrong: send it as bearer token")

    async def _answer(self, request: Request, chat: bool) -> Response:
        self._authorise(request)
        body = await _body(request, self._largest)
        if isinstance(body, dict) and body.get("model") not in (None, self._name):
            raise _other_model(str(body["model"]), self._name)
        try:
            asked = await run_in_threadpool(protocol.read, body, chat, self._prompter, self._options)
            work = _Work(self._service, asked, self._name)
        except (Busy, Closing) as error:
            raise Refused(503, str(error)) from None
        except UserError as error:
            raise Refused(400, str(error)) from None
        return _Stream(work) if asked.stream else await work.whole(request)


class _Work:
    """What is ordered for a client, and what has come of it: told in the engine's thread, read in that of the HTTP."""

    def __init__(self, service: Service, asked: Asked, name: str) -> None:
        self._service, self._asked = service, asked
        self._answer = Answer(asked, name)
        self._news: asyncio.Queue[tuple[list[dict[str, Any]] | Refused, bool]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        listeners = [functools.partial(self._told, i) for i in range(len(asked.requests))]
        self._numbers = service.order(asked.requests, listeners)

    def end(self) -> None:
        """Ends the orders that have not ended."""
        for number in self._numbers:
            self._service.cancel(number)

    def _told(self, request: int, news: Event | Exception) -> None:
        if isinstance(news, Event):
            out: Any = self._answer.push(news.reply, news.segments, request)
        else:
            told = isinstance(news, Closing | UserError)
            out = Refused(503 if isinstance(news, Closing) else 500, str(news) if told else BROKEN)
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
        """The answer when it is complete; ends the orders if the client goes away."""
        gone, complete = asyncio.ensure_future(_disconnected(request)), asyncio.ensure_future(self._complete())
        try:
            await asyncio.wait({gone, complete}, return_when=asyncio.FIRST_COMPLETED)
            if not complete.done():
                raise ClientDisconnect
            return await complete
        finally:
            gone.cancel()
            complete.cancel()
            self.end()

    async def _complete(self) -> Response:
        done = False
        while not done:
            out, done = await self._news.get()
            if isinstance(out, Refused):
                return out.response
        return _Ascii(self._answer.whole)


class _Stream(StreamingResponse):
    """The answer in pieces; ends the orders if the client goes away, before the first piece too."""

    def __init__(self, work: _Work) -> None:
        super().__init__(work.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._work.end()


async def _disconnected(request: Request) -> None:
    """Ends when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _other_model(asked: str, served: str) -> Refused:
    return Refused(404, f"the model {asked!r} is not served here: ask for {served!r}", "model_not_found")


async def _body(request: Request, largest: int) -> Any:
    """The JSON value of a request. Raises `Refused`."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > largest:
            raise Refused(413, f"the body has more than {largest} bytes: shorten the prompt")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not valid JSON ({error})") from None


async def _refused(request: Request, error: Refused) -> Response:
    return error.response


async def _http(request: Request, error: HTTPException) -> Response:
    what = f"{request.method} {request.url.path}: {error.detail}"
    return Refused(error.status_code, what, headers=error.headers).response


async def _broken(request: Request, error: Exception) -> Response:
    return Refused(500, BROKEN).response


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=499)  # which nobody reads
