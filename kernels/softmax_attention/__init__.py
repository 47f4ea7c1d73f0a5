"""Causal grouped-query softmax attention over a cache."""

from m1jax.kernels.softmax_attention.api import softmax_attention

__all__ = ["softmax_attention"]
