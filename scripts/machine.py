"""The machine on which a benchmark runs, as its results name it."""

import os
import platform
from pathlib import Path


def processor() -> str:
    """Name of the processor and how many cores may be used."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
