"""Pieces of Triton kernels that several ops have."""

import triton
import triton.language as tl


@triton.jit
def number_of(layer, LAYERS: tl.constexpr):
    """The number at `layer`; the first or last where a traced one is out of range, instead of any address."""
    return tl.minimum(tl.maximum(tl.load(layer), 0), LAYERS - 1).to(tl.int64)


@triton.jit
def sums_of_runs(x, RUN: tl.constexpr):
    """`[n, m]` to `[n, m / RUN]`: each RUN that a thread has read at once is summed by it alone."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // RUN, RUN)), axis=2)
