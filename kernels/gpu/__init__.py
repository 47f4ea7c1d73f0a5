"""What the ops' GPU kernels share: which device a program is for, calling Triton, checking kernels with no GPU at hand.

Nothing here imports triton until a kernel is called.
"""

from m1jax.kernels.gpu.case import Case
from m1jax.kernels.gpu.launch import launch
from m1jax.kernels.gpu.target import capability, refusal

__all__ = ["Case", "capability", "launch", "refusal"]
