"""The operations M1 is made of, one folder each: `reference.py` is the mathematics, `api.py` the function to call.

Kernels know arrays, not the model: nothing here imports `m1jax.model`.
"""
