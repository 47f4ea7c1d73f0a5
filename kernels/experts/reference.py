"""The mixture written out: every expert on every token, weighted by a matrix that is zero where it was not chosen."""

import jax
import jax.numpy as jnp

from m1jax.kernels.experts.quantized import Weights, dequantize, layer_of


def experts(
    x: jax.Array, gate_up: Weights, down: Weights, layer: jax.Array | int, chosen: jax.Array, weights: jax.Array
) -> jax.Array:
    """y_n = Σ_j weights[n, j] · w2_e(silu(w1_e x_n) ⊙ w3_e x_n) with e = chosen[n, j]; e = E chooses nobody.

    x `[N, M]`, gate_up `[L, E, 2, F, M]` (w1, w3), down `[L, E, M, F]` (w2), chosen int32 and weights float32 `[N, k]`;
    returns float32 `[N, M]`.
    """
    f32 = jnp.float32
    w13, w2 = dequantize(layer_of(gate_up, layer)), dequantize(layer_of(down, layer))
    gate, up = jnp.einsum("nm,ecfm->cenf", x.astype(f32), w13, precision="highest")
    y = jnp.einsum("enf,emf->enm", (jax.nn.silu(gate) * up).astype(x.dtype).astype(f32), w2, precision="highest")
    share = jnp.sum(jax.nn.one_hot(chosen, w2.shape[0], dtype=f32) * weights[..., None], axis=1)  # [N, E]
    return jnp.einsum("ne,enm->nm", share, y, precision="highest")
