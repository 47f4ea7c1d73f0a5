"""Lightning (linear) attention with a fixed decay per head: S_t = λ S_{t-1} + k_tᵀ v_t, o_t = q_t S_t."""

from m1jax.kernels.lightning_attention.api import lightning_attention, log_decay

__all__ = ["lightning_attention", "log_decay"]
