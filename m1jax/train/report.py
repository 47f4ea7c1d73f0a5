"""What a run says of itself: a progress bar, JSONL, TensorBoard, and a picture of the curves at the end."""

import json
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from m1jax.config import M1Config
from m1jax.errors import UserError
from m1jax.params import param_table
from m1jax.sharding.machines import known
from m1jax.train.board import Board
from m1jax.train.settings import Settings

METRICS = "metrics.jsonl"
CURVES = "curves.png"
RECENT = 20  # steps that the time left is estimated from
SPARSE = 3  # points of a curve at most that are marked: of one alone there is no line


def flops_per_token(config: M1Config, context: float, passes: int = 3) -> float:
    """FLOPs of a training step per token: three forward passes of what a token uses, nothing computed twice.

    `context` is the mean number of tokens that a query of softmax attention sees. `passes` are two where no weight has
    a gradient, but for small factors.
    """
    H, D, k = config.num_attention_heads, config.head_dim, config.num_experts_per_tok
    used = 0
    for path, spec in param_table(config).items():
        share = k / config.num_local_experts if "experts" in spec.axes else 1.0
        used += spec.size * share * (path != "embed" or config.tie_word_embeddings)
    attention = len(config.lightning_layers) * 4 * H * D * D + len(config.softmax_layers) * 4 * H * D * context
    return passes * (2 * used + attention)


class Report:
    """The figures of a run, step by step. Of several processes the first one writes.

    Args:
      settings: of the run.
      config: of the model.
      devices: that share the run.
      first: the step that comes next; what was written from there on, by a run that was killed, is dropped.

    Raises:
      UserError: something that the report needs is not installed.
    """

    def __init__(self, settings: Settings, config: M1Config, devices: int, first: int) -> None:
        self._settings, self._config, self._out = settings, config, Path(settings.out)
        self._devices, self._passes = devices, 2 if settings.lora.rank else 3
        self._file = self._out / METRICS
        self._stream = self._board = None
        self._row: dict[str, Any] = {"step": first}  # of the last step, and where its line starts in the file
        self._start = 0
        self._first = first
        if jax.process_index() == 0:
            _drawing()  # what is missing is missed now, not after the training
            self._board = Board(self._out / "tensorboard", first) if settings.log.tensorboard else None
            lines = _drop(self._file, first)
            self._file.touch()
            self._stream = self._file.open("r+b")
            self._start = self._file.stat().st_size
            if lines and json.loads(lines[-1])["step"] == first:
                self._row, self._start = json.loads(lines[-1]), self._start - len(lines[-1].encode())
        self._peak = settings.log.peak_tflops or _peak_tflops(settings.model.dtype)
        self._bar = tqdm(total=settings.steps, initial=first, desc=settings.stage, unit="step", disable=None)
        self._clock = time.perf_counter()
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._plain = not sys.stderr.isatty()

    def step(self, step: int, values: Mapping[str, Any], tokens: int, context: float, aside: float = 0.0) -> None:
        """Takes the figures of step number `step`, 0 for the first: numbers for all three, arrays for the JSONL file.

        `tokens` is how many it was trained on, `context` as in `flops_per_token`, `aside` how many of its seconds went
        into something else: tokens per second and utilisation are those of the rest.
        """
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        training = seconds - aside
        figures = {name: float(value) for name, value in values.items() if np.ndim(value) == 0}
        figures |= {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / training}
        tflops = flops_per_token(self._config, context, self._passes) * tokens / training / 1e12 / self._devices
        figures["tflops_per_device"] = tflops
        if self._peak:
            figures["utilisation"] = tflops / self._peak
        self._bar.set_postfix_str(self._text(figures), refresh=False)
        self._bar.update(1)
        if step != self._first:  # which compiles
            self._recent.append(seconds)
        self._row = {"step": step + 1}
        if self._stream is not None:
            self._start = self._file.stat().st_size
        if (step + 1) % self._settings.log.every and step + 1 != self._settings.steps:
            return
        arrays = {name: value for name, value in values.items() if np.ndim(value)}
        self._row |= {name: np.asarray(value, np.float64).round(6).tolist() for name, value in arrays.items()}
        self._add(figures)
        if self._plain and self._bar.disable:
            steps = self._settings.steps - step - 1
            left = f"{statistics.median(self._recent) * steps:.0f} s" if self._recent else "?"
            print(f"step {step + 1}/{self._settings.steps} {self._text(figures)} left {left}", file=sys.stderr)

    def add(self, figures: Mapping[str, float]) -> None:
        """Adds figures of an evaluation to those of the step that was reported last, and says them."""
        self._add(figures)
        means = [f"{name} {value:.4f}" for name, value in figures.items() if "/" not in name]
        self.say(f"step {self._row['step']}/{self._settings.steps} {', '.join(means)}")

    def _add(self, figures: Mapping[str, float]) -> None:
        self._row |= {name: _finite(value) for name, value in figures.items()}
        if self._stream is not None:
            # The longer line goes over the one it begins like, which is never gone.
            self._stream.seek(self._start)
            self._stream.write(json.dumps(self._row).encode() + b"\n")
            self._stream.flush()
            self._stream.truncate()
        if self._board is not None:
            self._board.add(figures, self._row["step"])

    def has(self, name: str) -> bool:
        """Whether a figure of this name is among those of the step that was reported last, maybe by an earlier run.

        Process 0, which holds the file, says it to all; every process has to ask.
        """
        return bool(multihost_utils.broadcast_one_to_all(np.int32(name in self._row)))

    def resume(self) -> None:
        """Starts the clock of the next step: what came since the last one, such as an evaluation, is not its own."""
        self._clock = time.perf_counter()

    def _text(self, figures: Mapping[str, float]) -> str:
        parts = [f"{name} {figures[name]:.4f}" for name in ("loss", "reward", "accuracy") if name in figures]
        parts += [f"{figures['tokens_per_second']:.0f} tokens/s"]
        if "utilisation" in figures:
            parts.append(f"MFU {figures['utilisation']:.1%}")
        return ", ".join(parts)

    def say(self, text: str) -> None:
        """A line on stderr, above the bar."""
        tqdm.write(text, file=sys.stderr)

    def draw(self) -> None:
        """Draws the curves of all steps so far."""
        if self._stream is not None:
            curves(self._file, self._out / CURVES)

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._stream is not None:
            self._stream.close()
        if self._board is not None:
            self._board.close()


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _drop(file: Path, first: int) -> list[str]:
    """Keeps the lines of steps before number `first`, and returns them; a torn last line goes too."""
    kept: list[str] = []
    if not file.exists():
        return kept
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if row["step"] <= first:
            kept.append(line + "\n")
    part = file.with_name(file.name + ".part")
    part.write_text("".join(kept), encoding="utf-8")
    part.replace(file)
    return kept


def _peak_tflops(dtype: str) -> float:
    """Of one of the devices present, 0 if that is not known."""
    device = known(jax.devices()[0].device_kind)
    if device is None:
        return 0.0
    # GPUs compute float32 in TF32, at half of bfloat16's rate; TPUs out of bfloat16.
    return device.flops / 1e12 / (2 if dtype == "float32" and device.platform == "cuda" else 1)


def _drawing() -> Any:
    """Matplotlib's figure and its canvas."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the picture of the curves needs matplotlib: pip install 'm1jax[train]'") from None
    return Figure, FigureCanvasAgg


def curves(metrics: Path, picture: Path) -> None:
    """Draws the curves in a metrics file. Raises `UserError` without matplotlib."""
    Figure, FigureCanvasAgg = _drawing()
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    plotted = (name for row in rows for name, value in row.items() if isinstance(value, float))
    names = [name for name in dict.fromkeys(plotted) if name not in ("seconds", "good", "limit")]
    if not names:
        return
    down = -(-len(names) // 3)
    height = 2.6 * down
    figure = Figure(figsize=(12, height))
    FigureCanvasAgg(figure)
    # Margins in inches rather than a constrained layout, which draws everything several times.
    figure.subplots_adjust(0.05, 0.5 / height, 0.985, 1 - 0.3 / height, wspace=0.18, hspace=0.45)
    for i, name in enumerate(names):
        axes = figure.add_subplot(down, 3, i + 1)
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        axes.locator_params(nbins=4)  # most of the time goes into ticks
        axes.plot(*zip(*points, strict=True), linewidth=1, marker="o" if len(points) <= SPARSE else "", markersize=3)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    part = picture.with_name(f".{picture.name}.part")
    figure.savefig(part, dpi=110, format="png")
    part.replace(picture)
