"""Accelerators as far as a plan needs them; figures from the makers' data sheets, dense, without sparsity."""

import re
from typing import NamedTuple

from m1jax.errors import UserError


class Device(NamedTuple):
    """One accelerator.

    `memory` is what it is sold as, in units of 10⁹ bytes: GPUs have 6% more, which is left for the runtime. `link` and
    `network` are bytes per second that a device can send to others within, and outside, a group of `node` devices.
    """

    name: str
    memory: float
    bandwidth: float  # bytes per second
    flops: float  # bfloat16, per second
    link: float
    network: float
    node: int
    platform: str


NETWORK = 50e9  # one 400 Gbit/s adapter per GPU

DEVICES = {
    device.name: device
    for device in (
        Device("A100", 80e9, 2.039e12, 312e12, 300e9, NETWORK / 2, 8, "cuda"),
        Device("H100", 80e9, 3.35e12, 989e12, 450e9, NETWORK, 8, "cuda"),
        Device("H800", 80e9, 3.35e12, 989e12, 200e9, NETWORK, 8, "cuda"),
        Device("H200", 141e9, 4.8e12, 989e12, 450e9, NETWORK, 8, "cuda"),
        Device("B200", 180e9, 7.7e12, 2250e12, 900e9, NETWORK, 8, "cuda"),
        Device("v5e", 16e9, 0.819e12, 197e12, 200e9, NETWORK / 8, 256, "tpu"),
        Device("v5p", 95 * 2**30, 2.765e12, 459e12, 600e9, NETWORK / 8, 8960, "tpu"),
        Device("v6e", 32e9, 1.64e12, 918e12, 400e9, NETWORK / 8, 256, "tpu"),
    )
}


# What jax calls them, where that is not their name.
_KINDS = {"TPU v5 lite": "v5e", "TPU v6 lite": "v6e", "TPU v5": "v5p"}


def known(kind: str) -> Device | None:
    """The accelerator of a `device_kind` of jax's, such as "NVIDIA H100 80GB HBM3", if it is one of these."""
    kind = _KINDS.get(kind, kind)
    return next((device for name, device in DEVICES.items() if name in kind), None)


def parse_devices(text: str) -> tuple[int, Device]:
    """Reads ``"8xH200"``: how many of which. Raises `UserError`."""
    match = re.fullmatch(r"(?:([1-9][0-9]{0,4})\s*[x×*]\s*)?(\w+)", text.strip())
    found = match and next((device for name, device in DEVICES.items() if name.lower() == match[2].lower()), None)
    if match is None or found is None:
        raise UserError(f"devices {text!r}: expected a count and a kind, e.g. 8xH200; known are {', '.join(DEVICES)}")
    return int(match[1] or 1), found
