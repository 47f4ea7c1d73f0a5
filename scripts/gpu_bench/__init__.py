"""The stages of `scripts/bench_gpu.py`."""
