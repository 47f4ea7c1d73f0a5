"""Text generation: prefill in shape buckets, one compiled decode step, many texts at once.

Every array shape is rounded up to a power of two (rows, prompt chunk, pages of a text and of all), so that a handful of
compiled functions serves all requests. Rows are independent of each other: what a row generates does not depend on its
batch. Between two chunks of a long prompt the others go on by a step.
The host reads tokens one step behind the device, and in time where it decides a token itself (thinking budgets).

Letters: B batch rows (a bucket), T tokens of a chunk (a bucket), V vocabulary.
"""

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Collection, Generator, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from m1jax import rows as device
from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.generation import Cancelled, Generation, Prior
from m1jax.grammar import Grammars
from m1jax.model import M1
from m1jax.pool import Pool, bucket
from m1jax.reply import Reply, Request, check_context
from m1jax.rows import Read
from m1jax.sharding.mesh import MeshShape, abstract_mesh, mesh_of
from m1jax.sharding.region import on_mesh_of
from m1jax.sharding.rules import shards
from m1jax.sharding.sizes import free_memory, tree_bytes
from m1jax.slots import Prompt, Slot
from m1jax.state import PAGE, empty
from m1jax.tokenizer import Tokenizer

CHUNK = 2048  # the most tokens of one prompt read at once
CHUNK_OF_ALL = 8192  # the same for all prompts of a batch together
SMALLEST_CHUNK = 16


@dataclasses.dataclass
class Stats:
    """Counts and seconds; what compiling took is in `compile_seconds` only."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    decoded_tokens: int = 0  # the generated ones but for each text's first, which the prefill gives
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    compilations: int = 0


class Engine:
    """Generates texts with a model, on the mesh that its parameters lie on if they do.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      cancelled: asked before every step and chunk of a prompt; once true, all texts end as "interrupted".
      context: the most tokens of a prompt and its reply, for which there is room from the start, so that there are
        fewer shapes. None is the model's; room then grows.
      cache_tokens: with `context`, of how many tokens in all there is room for keys and values, as many as the context
        has or more. None is room for texts as long as the context, as many as are generated at once.
      prefix_cache: with `context`, how many beginnings of prompts an eager generation remembers. Each takes a row's
        lightning states, and pages until there are too few. Where a mesh splits sequences there are none.

    Attributes:
      parts: in how many parts the mesh splits the rows of a batch.
      splits_sequences: whether it splits the tokens of a sequence.
      fixed: whether there is room for the whole context from the start.
      prefix_cache: how many beginnings are remembered in each part.

    Raises:
      UserError: the tokenizer has tokens that the model does not know, or the model's context is shorter.
    """

    def __init__(
        self,
        model: M1,
        tokenizer: Tokenizer,
        cancelled: Callable[[], bool] = lambda: False,
        context: int | None = None,
        cache_tokens: int | None = None,
        prefix_cache: int = 0,
    ) -> None:
        config = model.config
        if context is not None:
            check_own_context(context, config)
        if tokenizer.size > config.vocab_size:
            raise UserError(
                f"the tokenizer in {tokenizer.folder} has {tokenizer.size} tokens, the model {config.vocab_size}: "
                "use the tokenizer that came with the model"
            )
        unknown = [token for token in tokenizer.eos_ids if token >= config.vocab_size]
        if unknown:
            raise UserError(
                f"{tokenizer.folder} names token {unknown[0]} as one that ends a text, the model has "
                f"{config.vocab_size}: correct eos_token_id in generation_config.json"
            )
        self.model, self.tokenizer, self.cancelled = model, tokenizer, cancelled
        self.context = config.max_position_embeddings if context is None else context
        self.fixed, self._cache_tokens = context is not None, cache_tokens
        self.eos_ids = end_tokens(config, tokenizer)
        self.stats = Stats()
        mesh = mesh_of(model.embed.get_value())
        self.parts = 1 if mesh is None else shards(mesh, "batch")
        self.splits_sequences = mesh is not None and shards(mesh, "sequence") > 1
        if cache_tokens is not None:
            check_cache_tokens(cache_tokens, context, self.parts)
        self.prefix_cache = -(-prefix_cache // self.parts) if self.fixed and not self.splits_sequences else 0
        self._grammars = Grammars(tokenizer, self.eos_ids, config.vocab_size)
        self._compiled: dict[Hashable, Any] = {}

    def generate(
        self,
        requests: Sequence[Request],
        max_rows: int = 8,
        prior: Prior | None = None,
        done: Collection[tuple[int, int]] = (),
        eager: bool = False,
    ) -> Generation:
        """Starts generating; iterate over the result for the events.

        Args:
          requests: what to generate.
          max_rows: the most texts generated at once; others take the place of those that end.
          prior: with a single request for a single text, what one that its prompt begins with has left (`left` of its
            generation). It is used up.
          done: (index of request, sample) of texts to leave out.
          eager: begin a request as soon as there is a place, by itself, not several when a quarter of the rows is free:
            whoever waits for one waits less, there are fewer shapes, all together take longer.

        Raises:
          UserError: a prompt does not fit into the model's context.
          ValueError: `max_rows` is less than 1.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows: expected 1 or more, got {max_rows}")
        for request in requests:
            check_context(len(request.tokens), self.context)
        texts = ((i, request, k) for i, request in enumerate(requests) for k in range(request.n))
        queue = (self.slot(i, request, k) for i, request, k in texts if (i, k) not in done)
        return Generation(self, queue, max_rows, prior, eager)

    def warm_up(self, max_rows: int) -> None:
        """Compiles what up to so many texts need, generated eagerly in a given context, each of a request of its own.

        That is, reading prompts of any length, steps of any number of texts, and from each number to each other one;
        and going on from prompts that are remembered.
        """
        longest = min(CHUNK, self.context - 1)
        shorter = itertools.takewhile(lambda length: length < longest, (SMALLEST_CHUNK << i for i in itertools.count()))
        sizes = [*itertools.takewhile(lambda size: size < max_rows, (1 << i for i in itertools.count())), max_rows]
        eos_ids, self.eos_ids = self.eos_ids, frozenset()
        try:
            for length in [*shorter, longest]:
                collections.deque(self.generate([Request((0,) * length, max_tokens=2)], max_rows), maxlen=0)
            for size in sizes:
                for left in sizes[: sizes.index(size) + 1]:
                    for joining in range(1 + (left < max_rows)):
                        self._change(max_rows, size, left, joining)
            if self.prefix_cache and self.page < self.context:  # a prompt, and one that goes on from it
                lengths = (min(self.page + i, self.context - 1) for i in (1, 2))
                texts = [Request((0,) * length, max_tokens=1) for length in lengths]
                collections.deque(self.generate(texts, max_rows, eager=True), maxlen=0)
        finally:
            self.eos_ids, self.stats = eos_ids, Stats()

    def _change(self, max_rows: int, size: int, left: int, joining: int) -> None:
        """Begins `size` texts; when all have begun, all but `left` are dropped, and so many join."""
        texts, begun = self.generate([Request((0,), max_tokens=2 * size + 2)] * size, max_rows, eager=True), set[int]()
        for event in texts:
            if event.request not in begun and len(begun) == size - 1:
                for k in range(left, size):
                    texts.drop(k)
                for k in range(joining):
                    texts.add(size + k, Request((0,), max_tokens=2))
            begun.add(event.request)

    def check_form(self, request: Request) -> None:
        """Raises `UserError` if a request's answers cannot be held to their form; builds what they are held to."""
        self._grammars.matcher(request)

    def slot(self, index: int, request: Request, sample: int) -> Slot:
        """A text that has not begun, of the request of this index."""
        matcher = self._grammars.matcher(request)
        return Slot(index, Reply(request, sample, self.tokenizer, self.eos_ids, self.context, matcher))

    def run(self, function: Any, *args: Any, **static: int) -> Any:
        """Calls a jitted function of `m1jax.rows`, compiling it (once per shape) outside the measured time."""
        leaves = [x for arg in args if not isinstance(arg, M1) for x in jax.tree.leaves(arg)]
        shapes = tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
        key = (function.__name__, shapes, *static.items())
        if key not in self._compiled:
            start = time.perf_counter()
            with on_mesh_of(self.model.embed.get_value()):
                self._compiled[key] = function.lower(*args, **static).compile()
            self.stats.compile_seconds += time.perf_counter() - start
            self.stats.compilations += 1
        return self._compiled[key](*args)

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Adds the time inside to a field of `stats`, compiling excepted."""
        start, compiling = time.perf_counter(), self.stats.compile_seconds
        try:
            yield
        finally:
            spent = time.perf_counter() - start - (self.stats.compile_seconds - compiling)
            setattr(self.stats, name, getattr(self.stats, name) + spent)

    @property
    def page(self) -> int:
        """How many tokens a page has room for, at first."""
        return self.cache_bucket(1) if self.splits_sequences else min(PAGE, self.context)

    def pool(self, max_rows: int) -> Pool:
        """Pages for so many texts at once."""
        if not self.fixed:
            return Pool(self, None)
        each = 1 if self.splits_sequences else -(-self.context // self.page)
        if self._cache_tokens is None:
            return Pool(self, -(-max_rows // self.parts) * each)
        return Pool(self, max(each, self._cache_tokens // self.parts // self.page))

    def check_room(self, max_rows: int) -> None:
        """Raises `UserError` if there is less memory than it takes to have the pages that `pool` has from the start and
        the states after the beginnings of prompts that are remembered.
        """
        limit, config, dtype = self.pool(max_rows).limit, self.model.config, self.model.dtype
        if limit is None:
            return
        mesh = mesh_of(self.model.embed.get_value())
        state = jax.eval_shape(lambda: empty(config, dtype, self.parts, limit * self.parts, self.page))
        sizes = tree_bytes(config, abstract_mesh(MeshShape()) if mesh is None else mesh, state)
        devices = jax.devices()[:1] if mesh is None else mesh.local_devices
        on_host = devices[0].platform == "cpu"  # all of them share the host's memory
        each = sizes["cache.k"] + sizes["cache.v"] + self.prefix_cache * sizes["lightning.s"]
        needed, free = each * (len(devices) if on_host else 1), free_memory(devices)
        if needed > free:
            where = "this machine" if on_host else "each device"
            states = f" and the states of {self.prefix_cache * self.parts} prompts" if self.prefix_cache else ""
            or_less = ", batch-size or prefix-cache" if self.prefix_cache else " or batch-size"
            raise UserError(
                f"keys and values of {limit * self.parts * self.page} tokens{states} need {needed / 1e9:.1f} GB of "
                f"memory on {where}, {free / 1e9:.1f} GB are free: give less context, cache-tokens{or_less}"
            )

    def cache_bucket(self, n: int) -> int:
        """Room for n tokens."""
        return self.context if self.fixed else min(bucket(n, PAGE), self.context)

    def read(
        self, prompts: Sequence[Prompt | None], pool: Pool, width: int, read: Read, stop: int | None = None
    ) -> Generator[Read | None, None, Read]:
        """Reads what of prompts is not known, chunk by chunk.

        Args:
          prompts: of each row, None for padding.
          pool: in which they have their pages.
          width: how many a row has at most.
          read: what the rows have left that have read a beginning of their prompts already; used up.
          stop: after so many tokens of a single prompt a chunk is to end.

        Yields:
          Between two chunks, None, or what was read up to `stop`, which is used up when this goes on.

        Returns:
          Logits after each prompt's last token, and what they have left.

        Raises:
          Cancelled: it was, between two chunks.
        """
        B = len(prompts)
        unread = [() if prompt is None else prompt.tokens[prompt.known :] for prompt in prompts]
        longest, start = max(map(len, unread)), 0
        stop = None if stop is None else stop - next(prompt.known for prompt in prompts if prompt is not None)
        chunk = min(CHUNK, max(SMALLEST_CHUNK, CHUNK_OF_ALL // B))
        while start < longest:
            if start:
                with self.clock("prompt_seconds"):
                    read.logits.block_until_ready()  # a long prompt can be given up between two chunks
                if self.cancelled():
                    raise Cancelled
                yield read if start == stop else None
            end = min(start + chunk, longest)
            if stop is not None and start < stop < end:
                end = stop
            T = bucket(end - start, SMALLEST_CHUNK)
            tokens, lengths = np.zeros((B, T), np.int32), np.zeros((B,), np.int32)
            for b, prompt in enumerate(unread):
                part = prompt[start:end]
                tokens[b, : len(part)], lengths[b] = part, len(part)
            with self.clock("prompt_seconds"):
                table = pool.table(prompts, width)
                read, pool.cache = self.run(device.prefill, self.model, tokens, lengths, read, pool.cache, table)
            self.stats.prompt_tokens += int(lengths.sum())
            start = end
        return read


def end_tokens(config: M1Config, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's and the model's."""
    eos = config.eos_token_id
    return tokenizer.eos_ids | frozenset(() if eos is None else (eos,) if isinstance(eos, int) else eos)


def check_own_context(context: int, config: M1Config) -> None:
    """Raises `UserError` if an engine of this model cannot have such a context."""
    if not 1 < context <= config.max_position_embeddings:
        raise UserError(f"context must be from 2 to the model's {config.max_position_embeddings}, not {context}")


def check_cache_tokens(cache_tokens: int, context: int | None, parts: int = 1) -> None:
    """Raises `UserError` if an engine cannot have room for so many tokens; a mesh splits rows into so many parts."""
    if context is None:
        raise UserError("cache-tokens goes with context, the most tokens of one text: give it, too")
    if cache_tokens < context * parts:
        of = f" in each of the {parts} parts of the mesh" if parts > 1 else ""
        raise UserError(f"cache-tokens must be {context * parts} or more, room for one text{of}, not {cache_tokens}")
