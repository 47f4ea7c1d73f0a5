"""`save`: a model, wherever its parameters lie, as a checkpoint of the kind that `python -m m1jax.convert` makes."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from m1jax import checkpoint
from m1jax.distributed import wait
from m1jax.errors import UserError
from m1jax.kernels.experts.quantized import Quantized
from m1jax.loading import MARKER
from m1jax.model import M1
from m1jax.params import flatten, nest
from m1jax.workplace import carry, check_folder, check_space, disk_errors, open_workplace

CHUNK = 16 << 20  # bytes of a stored chunk at most, so that a shard of another mesh reads little more than its own


def save(
    model: M1,
    folder: str | Path,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model so that `load` reads it, on any mesh, in any number of processes.

    Every process of the model's mesh calls this and writes what its own devices hold. The folder appears when all is
    written.

    Args:
      model: its parameters may be split over devices and processes.
      folder: to be made; all processes must see the same.
      dtype: "float32" or "bfloat16" to store in; None is the model's own. What is always float32 stays so.
      tokenizer: a model's folder whose tokenizer and chat template go along.
      overwrite: replaces a folder that m1jax has made.

    Raises:
      UserError: the folder is taken or cannot be written, or no such `dtype`.
    """
    folder = Path(folder)
    check_folder(folder, overwrite, "choose another name")
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype {dtype!r} is not supported: choose float32 or bfloat16")
    quantize = model.moe.gate_up[...].kind if isinstance(model.moe.gate_up[...], Quantized) else None
    table = checkpoint.stored_table(model.config, quantize)
    leaves = {path: leaf for path, leaf in flatten(model).items() if path in table}
    kind = dtype or str(model.dtype)
    arrays = {path: leaf.astype(jnp.dtype(table[path].dtype or kind)) for path, leaf in leaves.items()}
    first = jax.process_index() == 0
    with disk_errors(folder), _workplace(folder, overwrite) if first else contextlib.nullcontext():
        partial = folder.with_name(folder.name + ".partial")
        if first:
            check_space(partial, sum(leaf.nbytes for leaf in arrays.values()))
        wait("save: the folder is made")
        _write(partial / checkpoint.WEIGHTS, nest(arrays))
        if first:
            if tokenizer is not None:
                carry(Path(tokenizer), partial)
            config = json.dumps(model.config.to_official(), indent=1) + "\n"
            (partial / "config.json").write_text(config, encoding="utf-8")
            marker = {"format": checkpoint.FORMAT, "dtype": kind, "quantize": quantize, "dtypes": {}}
            (partial / MARKER).write_text(json.dumps({**marker, "arrays": sorted(table)}, indent=1), encoding="utf-8")
    wait("save: the folder is whole")


@contextlib.contextmanager
def _workplace(folder: Path, overwrite: bool) -> Iterator[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open_workplace(folder, {"save": checkpoint.FORMAT}, overwrite):
        yield


def _write(path: Path, tree: Any) -> None:
    from orbax.checkpoint import v1 as ocp  # takes half a second, which loading need not wait for

    saving = ocp.options.ArrayOptions.Saving
    options = ocp.options.ArrayOptions(
        saving=saving(storage_options=saving.StorageOptions(chunk_byte_size=CHUNK), use_compression=False)
    )
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)  # Orbax logs a traceback from each of its threads before it raises
    try:
        with ocp.Context(array_options=options):
            ocp.save(str(path.resolve()), tree, overwrite=True)
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be written ({checkpoint.short(error)}): make room or check the disk") from error
    finally:
        log.setLevel(level)
