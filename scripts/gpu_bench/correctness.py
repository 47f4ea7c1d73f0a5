"""Stage `check`: every kernel against the reference on this device, at small shapes that no tile divides."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpu_bench import attention, fla, mixture
from gpu_bench.report import Report
from gpu_bench.timing import normal
from m1jax.kernels.experts import dequantize, experts
from m1jax.kernels.lightning_attention import lightning_attention, log_decay
from m1jax.kernels.softmax_attention import softmax_attention

TOLERANCE = {"float32": 1e-5, "bfloat16": 1.5e-2}  # relative RMS, gradients included


def check(report: Report, lightning: attention.Sizes, mix: mixture.Sizes) -> None:
    """Adds a row for each comparison; `wrong` is whether it failed."""
    T = 40 if report.dry else 700
    for dtype in TOLERANCE:
        with report.attempt(f"lightning {dtype}"):
            _lightning(report, lightning, T, dtype)
        with report.attempt(f"experts {dtype}"):
            _experts(report, mix, 12 if report.dry else 300, dtype)
        _softmax(report, lightning, 24 if report.dry else 512, dtype)
    with report.attempt("fla against the reference"):
        _fla(report, lightning)


def _compare(report: Report, what: str, dtype: str, got: Any, want: Any) -> None:
    errors = []
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        errors.append(float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))))
    report.add(what, dtype=dtype, error=max(errors), wrong=not max(errors) < TOLERANCE[dtype])


def _lightning(report: Report, sizes: attention.Sizes, T: int, dtype: str) -> None:
    H, D = min(sizes.heads, 4), sizes.head_dim
    state = normal(2, (2, H, D, D), jnp.float32)
    decay, segments = jnp.asarray(log_decay(H, 35, 80)), (jnp.arange(T) // (T // 3) + 1)[None].repeat(2, 0)
    for what, length, options in (("forward", T, {}), ("packed", T, {"segments": segments}), ("decode", 1, {})):
        qkv, into = normal(1, (2, length, H, 3, D), dtype), normal(3, (2, length, H, D), jnp.float32)

        def run(how: Any, qkv: jax.Array = qkv, into: jax.Array = into, options: Any = options) -> Any:
            def out(qkv: jax.Array, state: jax.Array) -> Any:
                return lightning_attention(qkv, decay, state=state, implementation=how, **options)

            outputs, vjp = jax.vjp(out, qkv.astype(jnp.float32) if how == "reference" else qkv, state)
            back = vjp((into.astype(outputs[0].dtype), outputs[1])) if into.shape[1] > 1 else ()
            return outputs, back

        with jax.default_matmul_precision("highest"):
            got, want = jax.jit(run, static_argnums=0)(sizes.triton), jax.jit(run, static_argnums=0)("reference")
        _compare(report, f"lightning {what}", dtype, got, want)


def _experts(report: Report, sizes: mixture.Sizes, N: int, dtype: str) -> None:
    small = mixture.Sizes(*((3, 32, 64) if report.dry else (6, 96, 256)), 2, (), (), sizes.triton)
    M = small.hidden
    chosen, shares = mixture.routing(small, N)
    chosen = chosen.at[1].set(small.experts)
    for kind, rows in ((None, N), ("int8", N), ("int4", N), (None, 3), ("int8", 3), ("int4", 3)):
        x, into = normal(4, (rows, M), dtype), normal(6, (rows, M), jnp.float32)
        w = mixture.weights(small, kind)
        w = jax.tree.map(lambda a: a.astype(dtype), w) if kind is None else w

        def run(how: Any, x: jax.Array, shares: jax.Array, w: Any, chosen: jax.Array, into: jax.Array) -> Any:
            def out(x: jax.Array, shares: jax.Array) -> jax.Array:
                w13, w2 = map(dequantize, w) if how == "reference" else w
                return experts(x, w13, w2, chosen, shares, implementation=how)

            y, vjp = jax.vjp(out, x.astype(jnp.float32) if how == "reference" else x, shares)
            return y, vjp(into)

        args = x, shares[:rows], w, chosen[:rows], into
        got, want = (jax.jit(run, static_argnums=0)(how, *args) for how in (sizes.triton, "reference"))
        _compare(report, f"experts {kind or 'float'} {rows} tokens", dtype, got, want)


def _softmax(report: Report, sizes: attention.Sizes, T: int, dtype: str) -> None:
    H, K, D, N = 4, 2, sizes.head_dim, 512
    packed = (jnp.arange(T) // (T // 3) + 1)[None].repeat(2, 0)
    for what, name, length, cache, options in (
        ("prefill", sizes.cudnn, T, T, {}),
        ("packed", sizes.cudnn, T, T, {"segments": packed}),
        ("chunk", sizes.cudnn, T // 2, T, {"offset": jnp.asarray([0, T // 2])}),
        ("decode", sizes.pallas, 1, N, {"offset": jnp.asarray([7, N - 1])}),
    ):
        q = normal(1, (2, length, H, D), dtype)
        k, v = (normal(i, (2, K, cache, D), dtype) for i in (2, 3))

        def run(how: Any, q: jax.Array = q, k: jax.Array = k, v: jax.Array = v, options: Any = options) -> Any:
            def out(*a: jax.Array) -> jax.Array:
                return softmax_attention(*a, implementation=how, **options)  # pyright: ignore[reportCallIssue]

            wide = [a.astype(jnp.float32) for a in (q, k, v)]
            arrays = wide if how == "reference" else (q, k, v)
            if "offset" in options:  # into a cache, which has no gradient
                return out(*arrays)
            y, vjp = jax.vjp(out, *arrays)
            return y, vjp(y)

        with report.attempt(f"softmax {what} {dtype}"):
            _compare(report, f"softmax {what}", dtype, jax.jit(run, static_argnums=0)(name), run("reference"))


def _fla(report: Report, sizes: attention.Sizes) -> None:
    """fla's outputs and gradients: a baseline that computes something else is none."""
    T, H, D = 300, 4, sizes.head_dim
    decay = log_decay(H, 35, 80)
    qkv, into = normal(1, (1, T, H, 3, D)), normal(3, (1, T, H, D))
    active = jax.nn.silu(qkv.astype(jnp.float32))
    position = jnp.arange(T)
    lag = position[:, None] - position
    mask = jnp.where(lag >= 0, jnp.exp(decay[:, None, None] * jnp.maximum(lag, 0)), 0.0)  # [H, T, T]

    def out(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * mask
        return jnp.einsum("bhts,bshd->bthd", scores, v, precision="highest")

    parts = [active[:, :, :, i] for i in range(3)]
    y, vjp = jax.vjp(out, *parts)
    want = [y, *vjp(into.astype(jnp.float32))]
    q, k, v = (np.asarray(x) for x in parts)
    got = fla.outputs(q, k, v, decay, np.asarray(into, np.float32))
    _compare(report, "fla chunk_simple_gla and gradients", "bfloat16", got, want)
