"""What is timed, seconds of it on the device, and random inputs made there."""

import dataclasses
import functools
import glob
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gpu_bench.report import Report

ROUNDS = 3  # of which the median counts; 1 in a dry run
UNROLL = 8  # steps of a loop that one program's text has
LONG = 0.04  # seconds that a loop should take: starting it and waiting for it take up to 0.0008


@dataclasses.dataclass
class Measurement:
    """A function to time. Compiled for abstract arguments first: nothing lies on the device until its turn.

    Attributes:
      what: its row of the report.
      fn: the function; with `steps` it maps a carry and further arguments to the next carry.
      make: the arguments, made on the device.
      add: writes its rows, given seconds of a call.
      must: seconds it must not exceed.
      steps: how many calls follow each other in one program, so that launching it and waiting for it do not count.
      add_busy: writes a row of the seconds of a call in which the device computes, without those between kernels.
    """

    what: str
    fn: Callable[..., Any]
    make: Callable[[], tuple[Any, ...]]
    add: Callable[[float], None]
    must: float | None = None
    steps: int = 0
    add_busy: Callable[[float], None] | None = None
    made: Any = None
    run: Any = None

    def compile(self) -> None:
        """Compiles the function, and what makes its arguments."""
        self.made = jax.jit(self.make).lower().compile()
        fn, donated = (self._loop, 0) if self.steps else (self.fn, ())
        self.run = jax.jit(fn, donate_argnums=donated).lower(*jax.eval_shape(self.make)).compile()

    def _loop(self, carry: Any, *args: Any) -> Any:
        steps = self._steps()
        return lax.fori_loop(0, steps, lambda _, carry: self.fn(carry, *args), carry, unroll=min(UNROLL, steps))

    def _steps(self) -> int:
        return min(self.steps, 2) if ROUNDS == 1 else self.steps

    def seconds(self) -> float:
        """Median over rounds of the mean time of a call; calls of a round overlap their launches."""
        args = jax.block_until_ready(self.made())
        if self.steps:
            return self._chained(*args) / self._steps()
        jax.block_until_ready(self.run(*args))
        once = _clocked(lambda: self.run(*args))
        if ROUNDS == 1 or once > 0.5:  # what takes so long does not vary
            return once
        calls = calls_of_a_round(once)

        def several() -> Any:
            out = None
            for _ in range(calls):
                out = self.run(*args)
            return out

        return statistics.median(_clocked(several) / calls for _ in range(ROUNDS))

    def busy(self) -> float:
        """Seconds of a call in which the device computes."""
        args = jax.block_until_ready(self.made())
        spans = sorted((start, start + length) for _, start, length in _events(lambda: self.run(*args)))
        total, end = 0.0, 0.0
        for start, stop in spans:
            total += max(0.0, stop - max(start, end))
            end = max(end, stop)
        if not total:
            raise RuntimeError("the profile shows nothing of the device")
        return total / self._steps()

    def _chained(self, carry: Any, *args: Any) -> float:
        times = []
        for _ in range(ROUNDS + 1):  # the first does not count
            start = time.perf_counter()
            carry = jax.block_until_ready(self.run(carry, *args))
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])


def calls_of_a_round(once: float) -> int:
    """How many calls of so many seconds follow each other, so that launching them does not count."""
    return max(1, min(200, int(0.03 / once)))


def enough_steps(floor: float) -> int:
    """`steps` for calls of at least `floor` seconds."""
    return UNROLL * min(32, max(1, round(LONG / (UNROLL * floor))))


def _clocked(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    out = jax.block_until_ready(fn())
    taken = time.perf_counter() - start
    del out
    return taken


def compile_all(report: Report, measurements: list[Measurement]) -> None:
    """Compiles all; one that fails becomes a row."""
    for m in measurements:
        with report.attempt(m.what, m.must):
            m.compile()


def time_all(report: Report, measurements: list[Measurement]) -> None:
    """Times those that compiled, in order."""
    for m in measurements:
        if m.run is not None:
            with report.attempt(m.what, m.must):
                m.add(m.seconds())
                if m.add_busy and not report.dry:  # a profile takes seconds, and stage `model` has one
                    m.add_busy(m.busy())
            m.run = m.made = None
            report.write()


def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16, scale: float = 1.0) -> jax.Array:
    """Random numbers of the given standard deviation, made in place: no wider copy of a large array exists.

    8-bit integers are uniform.
    """
    return _normal(jnp.uint32(seed * 2654435761 % 2**32), shape, jnp.dtype(dtype), scale)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(bits: jax.Array, shape: tuple[int, ...], dtype: Any, scale: float) -> jax.Array:
    bits = jnp.full(shape, bits)
    for axis in range(len(shape)):
        bits = (bits ^ lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
        bits = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA77)
        bits = bits ^ (bits >> 13)
    if dtype in (jnp.int8, jnp.uint8):
        return (bits & 255).astype(jnp.uint8).view(dtype)
    uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24 - 0.5
    return (uniform * (12**0.5 * scale)).astype(dtype)


def operations(fn: Callable[[], Any]) -> list[tuple[str, float]]:
    """The operations that take the device's time in a call, those that take most first: names and seconds."""
    total: dict[str, float] = {}
    for name, _, seconds in _events(fn):
        name = re.sub(r"[._]\d+$", "", name)
        total[name] = total.get(name, 0.0) + seconds
    return sorted(total.items(), key=lambda item: -item[1])


def _events(fn: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """What the device does in a call: names, when it starts, seconds."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(fn())
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        profile = jax.profiler.ProfileData.from_file(file)
        found = []
        for plane in profile.planes:
            for line in plane.lines:
                # A GPU's streams; on CPUs, for dry runs, the threads that execute: before jax 0.12, and since.
                if (line.name or "").startswith(("Stream", "tf_XLAPjRtCpuClient", "tf_XLAExecute")):
                    found += [(e.name, e.start_ns * 1e-9, int(e.duration_ns) * 1e-9) for e in line.events]
    return found
