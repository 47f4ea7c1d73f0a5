"""Settings of the test run: CPU, modules as plain pytrees, compiled programs kept between runs."""

import gc
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["NNX_GRAPH_MODE"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # the interpreter's products are small: further threads only wait
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # of each operation's origin, which the compiler carries along
# Most of the time goes into compiling programs that run once: what makes them faster costs more than it saves.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"
    * (importlib.metadata.version("jaxlib") < "0.11")  # gone in that version
)

import jax
import pytest
from hypothesis import settings

from m1jax.errors import GARBAGE

jax.config.update("jax_num_cpu_devices", 8)  # meshes
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

settings.register_profile("m1jax", deadline=None, max_examples=15, derandomize=True)
settings.load_profile("m1jax")

gc.set_threshold(*GARBAGE)


@pytest.fixture(autouse=True)
def _look_at_garbage_once() -> None:
    """What stays after a test is not looked at again in later ones, where that would take a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _let_go_of_programs() -> Iterator[None]:
    """Each compiled program holds memory maps, of which a process may have 65,530: the whole suite would need more."""
    yield
    maps = Path("/proc/self/maps")  # of Linux
    if not maps.exists() or maps.read_bytes().count(b"\n") > 30_000:
        gc.unfreeze()
        jax.clear_caches()
