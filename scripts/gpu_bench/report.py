"""Rows of the report: printed as they come, written as JSON and as a table after every stage."""

import dataclasses
import datetime
import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m1jax.kernels.experts.cases import PEAK
from m1jax.kernels.gpu.case import Cases, reduced

BANDWIDTH = {"H200": 4.3e12, "H100": 3.0e12}  # bytes a second as a copy reaches them, 90% of the data sheets'
FEW = 3  # cases of a stage in a dry run
WHOLE_STAGE = "the whole stage"  # what broke off, where no part of it caught the error
PEAKS = {"measured": 790e12, "data sheet": PEAK}  # bfloat16 FLOP a second


@dataclasses.dataclass
class Report:
    """Where results go. `rows` are dictionaries with stage, what, and figures; times are in microseconds.

    Those of an earlier run have its date as `earlier`.
    """

    path: Path
    dry: bool
    device: str  # its kind
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    stage: str = ""

    @property
    def bandwidth(self) -> float:
        """Of the device; of an H200 where it is not known."""
        return next((b for name, b in BANDWIDTH.items() if name in self.device), BANDWIDTH["H200"])

    @property
    def judges(self) -> bool:
        """Whether times are held against what they must reach, which is said of an H200."""
        return self.dry or "H200" in self.device

    def implementation(self, name: str) -> Any:
        """What stands for a GPU's implementation in a dry run."""
        return {"cudnn": "xla"}.get(name, f"{name}_interpreted") if self.dry else name

    def sized(self, cases: Iterable[Cases]) -> list[Cases]:
        """The cases; in a dry run the first few, reduced."""
        return reduced(cases)[:FEW] if self.dry else list(cases)

    def add(self, what: str, **figures: Any) -> None:
        """Adds a row."""
        row = {"stage": self.stage, "what": what} | figures
        self.rows.append(row)
        print(" | ".join([self.stage, what, *(f"{key} {_text(value)}" for key, value in figures.items())]), flush=True)

    def timed(
        self, what: str, seconds: float, floor: float | None = None, must: float | None = None, **more: Any
    ) -> None:
        """Adds a row of a time; `floor` and `must` are in seconds."""
        out: dict[str, Any] = {"us": seconds * 1e6}
        if floor:
            out |= {"floor_us": floor * 1e6, "times_floor": seconds / floor}
        if must and self.judges:
            out |= {"must_us": must * 1e6, "reached": bool(seconds <= must)}
        self.add(what, **out, **more)

    @contextmanager
    def attempt(self, what: str, must: float | None = None) -> Iterator[None]:
        """Turns an error into a row: `skipped` for a library that is not here and for exhausted memory, else `wrong`.

        Stage `check` has room for its shapes, and an H200 for what must reach a time on it, so there exhausted memory
        is wrong too. The sweep tries tiles that may not fit a multiprocessor's memory.
        """
        fits = self.stage == "check" or (must is not None and self.judges)
        try:
            yield
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if isinstance(error, ImportError) or (not fits and self._out_of_memory(error)):
                self.add(what, skipped=text)
            else:
                self.add(what, failed=text, wrong=True)

    def _out_of_memory(self, error: Exception) -> bool:
        text = str(error).lower()
        words = ["resource_exhausted", "out of memory", *["shared memory"] * (self.stage == "sweep")]
        return isinstance(error, MemoryError) or any(word in text for word in words)

    def failures(self) -> list[str]:
        """What was wrong, and the stages of which nothing ran."""
        now = [row for row in self.rows if "earlier" not in row]
        return [f"{row['stage']}: {row['what']}" for row in now if row.get("wrong") or row["what"] == WHOLE_STAGE]

    def replace(self, fresh: list[dict[str, Any]]) -> None:
        """Adds rows; those of earlier runs go of which they are a newer measurement."""

        def key(row: dict[str, Any]) -> tuple[str, str, str | None]:
            return row["stage"], row["what"], row.get("dtype")

        again = {key(row) for row in fresh if _measured(row)}
        self.rows = [row for row in self.rows if "earlier" not in row or key(row) not in again] + fresh

    def forget_earlier(self) -> None:
        """Drops what earlier runs found of stages that have now been measured to their end, and how those broke off."""
        now = [row for row in self.rows if "earlier" not in row]
        ended = {row["stage"] for row in now if _measured(row)}
        ended -= {row["stage"] for row in now if row["what"] == WHOLE_STAGE}
        began = {row["stage"] for row in now}

        def stale(row: dict[str, Any]) -> bool:
            return row["stage"] in ended or (row["what"] == WHOLE_STAGE and row["stage"] in began)

        self.rows = [row for row in self.rows if "earlier" not in row or not stale(row)]

    def write(self) -> None:
        """Writes the JSON file and, beside it, the table."""
        head = {
            "date": str(datetime.date.today()),
            "device": self.device,
            "dry": self.dry,
            "versions": versions(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({**head, "rows": self.rows}, indent=1) + "\n")
        self.path.with_suffix(".md").write_text("\n".join(_table(head, self.rows)) + "\n")


def _measured(row: dict[str, Any]) -> bool:
    return "us" in row or "error" in row


def versions() -> dict[str, str]:
    """Versions of what is measured and what it is measured with."""
    found = {}
    for name in ("jax", "jaxlib", "jax-triton", "triton", "torch", "flash-linear-attention", "tokamax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{head['device']}, {head['date']}, {', '.join(f'{k} {v}' for k, v in head['versions'].items())}"
    if head["dry"]:
        yield "\nA dry run at tiny shapes: the times mean nothing."
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        columns = list(dict.fromkeys(key for row in mine for key in row if key != "stage"))
        yield f"\n## {stage}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
        for row in mine:
            yield f"| {' | '.join(_text(row.get(column, '')) for column in columns)} |"
