"""The experts of a mixture: SwiGLU of each token by its chosen experts only; their weights may be quantised."""

from m1jax.kernels.experts.api import experts
from m1jax.kernels.experts.quantized import Quantization, Quantized, dequantize, quantize

__all__ = ["Quantization", "Quantized", "dequantize", "experts", "quantize"]
