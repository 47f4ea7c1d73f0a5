"""What the ops' products with matrices of weights are tuned by."""

import dataclasses

MULTIPROCESSORS = 132  # of an H100 or H200


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows, out and in channels of a tile, warps, pipeline stages, and in how many parts the sum is cut."""

    rows: int
    out: int
    inner: int
    warps: int
    stages: int
    split: int = 1
