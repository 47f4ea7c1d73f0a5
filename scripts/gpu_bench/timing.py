"""Seconds of a function on the device, and random inputs made there."""

import glob
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

ROUNDS = 5  # of which the median counts; 1 in a dry run


def seconds(fn: Callable[..., Any], *args: Any) -> float:
    """Median over rounds of the mean time of a call; calls of a round overlap their launches."""
    run = jax.jit(fn)
    jax.block_until_ready(run(*args))
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    once = time.perf_counter() - start
    if ROUNDS == 1:
        return once
    calls, times = max(1, min(200, int(0.06 / once))), []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        out = None
        for _ in range(calls):
            out = run(*args)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
        del out
    return statistics.median(times)


def seconds_chained(step: Callable[..., Any], carry: Any, *args: Any, steps: int = 64) -> float:
    """Seconds of `carry = step(carry, *args)`, many in one program, so that launching from Python does not count.

    `carry` is given away.
    """
    steps = min(steps, 2) if ROUNDS == 1 else steps

    def loop(carry: Any, *args: Any) -> Any:
        return lax.scan(lambda c, _: (step(c, *args), None), carry, None, length=steps, unroll=min(8, steps))[0]

    run = jax.jit(loop, donate_argnums=0)
    carry = jax.block_until_ready(run(carry, *args))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        carry = jax.block_until_ready(run(carry, *args))
        times.append((time.perf_counter() - start) / steps)
    return statistics.median(times)


def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.bfloat16, scale: float = 1.0) -> jax.Array:
    """Random numbers of the given standard deviation, made in place: no wider copy of a large array exists.

    8-bit integers are uniform.
    """
    dtype = jnp.dtype(dtype)

    @jax.jit
    def make() -> jax.Array:
        bits = jnp.full(shape, jnp.uint32(seed * 2654435761 % 2**32))
        for axis in range(len(shape)):
            bits = (bits ^ lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x9E3779B1)
            bits = (bits ^ (bits >> 15)) * jnp.uint32(0x85EBCA77)
            bits = bits ^ (bits >> 13)
        if dtype in (jnp.int8, jnp.uint8):
            return (bits & 255).astype(jnp.uint8).view(dtype)
        uniform = (bits >> 8).astype(jnp.float32) * 2.0**-24 - 0.5
        return (uniform * (12**0.5 * scale)).astype(dtype)

    return make()


def top_operations(fn: Callable[[], Any], most: int = 10) -> list[tuple[str, float]]:
    """The operations that take most of the device's time in a call: names and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(fn())
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        profile = jax.profiler.ProfileData.from_file(file)
        total: Counter[str] = Counter()
        for plane in profile.planes:
            for line in plane.lines:
                name = line.name or ""
                if name.startswith("Stream") or name.startswith("tf_XLAPjRtCpuClient"):
                    for event in line.events:
                        total[re.sub(r"[._]\d+$", "", event.name)] += int(event.duration_ns)
    return [(name, ns * 1e-9) for name, ns in total.most_common(most)]
