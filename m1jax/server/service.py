"""One engine, in a thread of its own, for texts that many ask for meanwhile."""

import dataclasses
import itertools
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence

from m1jax.engine import Engine
from m1jax.errors import UserError
from m1jax.generation import Event, Generation
from m1jax.model import M1
from m1jax.reply import Request, check_context
from m1jax.runtime import memory_errors
from m1jax.tokenizer import Tokenizer

# Is told each event of a request, in the engine's thread, or the error that ends it.
Listener = Callable[[Event | Exception], None]


class Busy(Exception):
    """So many texts wait that no more are taken."""


class Closing(Exception):
    """The service ends."""

    def __init__(self) -> None:
        super().__init__("the server ends: ask again later")


@dataclasses.dataclass
class _Order:
    """A request, who is told of it, and how many of its texts have not ended."""

    request: Request
    listener: Listener
    left: int


class Service:
    """Generates texts as they are ordered; each begins when there is a place for it.

    What an order gets does not depend on the others (`Engine`). An error ends all texts, and the service goes on.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      max_rows: the most texts generated at once.
      max_waiting: the most that wait for a place.
      context, cache_tokens, prefix_cache: see `Engine`.
    """

    def __init__(
        self,
        model: M1,
        tokenizer: Tokenizer,
        max_rows: int,
        max_waiting: int,
        context: int | None = None,
        cache_tokens: int | None = None,
        prefix_cache: int = 0,
    ) -> None:
        self._closing = False
        self._generation: Generation | None = None
        self.engine = Engine(model, tokenizer, self._look, context, cache_tokens, prefix_cache)
        self._max_rows, self._most = max_rows, max_rows + max_waiting
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._orders: dict[int, _Order] = {}
        self._news: queue.SimpleQueue[int] = queue.SimpleQueue()  # of which something is to be done
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def texts(self) -> int:
        """How many texts are generated or wait."""
        with self._lock:
            return self._count()

    def _count(self) -> int:
        return sum(order.left for order in self._orders.values())

    def order(self, requests: Sequence[Request], listeners: Sequence[Listener]) -> list[int]:
        """Orders the texts of requests, all or none, each with its listener; returns their numbers.

        Raises:
          Busy: too many texts wait.
          Closing: the service ends.
          UserError: the prompt does not fit into the context, or the answer cannot be held to its form.
        """
        for request in requests:
            check_context(len(request.tokens), self.engine.context)
            self.engine.check_form(request)  # not in the engine's thread, where others would wait for it
        with self._lock:
            if self._closing:
                raise Closing
            waiting = self._count()
            if waiting and waiting + sum(request.n for request in requests) > self._most:
                raise Busy(f"{waiting} texts are generated or wait: ask again later")
            orders = [_Order(*both, both[0].n) for both in zip(requests, listeners, strict=True)]
            numbers = list(itertools.islice(self._numbers, len(orders)))
            self._orders.update(zip(numbers, orders, strict=True))
        for number in numbers:
            self._news.put(number)
        return numbers

    def cancel(self, number: int) -> None:
        """Ends an order, of which nothing more is told; nothing happens if it has ended."""
        with self._lock:
            known = self._orders.pop(number, None)
        if known is not None:
            self._news.put(number)

    @property
    def works(self) -> bool:
        """Whether orders are taken."""
        return self._thread.is_alive() and not self._closing

    def close(self) -> None:
        """Ends all texts, and takes no more; may be called in a signal handler.

        Who waits is told at once: the engine may be compiling.
        """
        self._closing = True
        self._news.put(-1)
        threading.Thread(target=self._fail, args=(Closing(),), daemon=True).start()

    def join(self, seconds: float) -> None:
        """Waits until the thread has ended, for so long at most."""
        self._thread.join(seconds)

    def _work(self) -> None:
        while not self._closing:
            number = self._news.get()
            try:
                with memory_errors():
                    if self._generation is None:
                        self._generation = self.engine.generate([], self._max_rows, eager=True)
                    self._take(self._generation, number)
                    for event in self._generation:
                        self._tell(event)
                    self._generation.rest()
            except Exception as error:  # whatever it is, it is told to those who wait
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
                if not isinstance(error, UserError):
                    traceback.print_exc()
                self._generation = None  # its pages may be gone
                self._fail(error)
        self._fail(Closing())

    def _look(self) -> bool:
        """What the engine asks before every step and chunk of a prompt: takes the news; whether the service ends."""
        while self._generation is not None and not self._news.empty():
            self._take(self._generation, self._news.get())
        return self._closing

    def _take(self, generation: Generation, number: int) -> None:
        """Begins an order, or ends one that was cancelled."""
        with self._lock:
            order = self._orders.get(number)
        if order is None:
            generation.drop(number)
        else:
            generation.add(number, order.request)

    def _tell(self, event: Event) -> None:
        if event.reply.finish == "interrupted":  # the service ends, of which everyone is told
            return
        with self._lock:
            order = self._orders.get(event.request)
            if order is None:
                return
            order.left -= event.reply.finish is not None
            if not order.left:
                del self._orders[event.request]
        order.listener(event)

    def _fail(self, error: Exception) -> None:
        """Ends all orders that are being worked on."""
        with self._lock:
            orders, self._orders = self._orders, {}
        for order in orders.values():
            order.listener(error)
