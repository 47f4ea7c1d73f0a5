"""What a person sees while text is generated: the stream, thinking dimmed, and the figures at the end."""

import os
from collections.abc import Sequence
from typing import TextIO

from m1jax.engine import Stats
from m1jax.generation import Event
from m1jax.reply import Reply, Segment
from m1jax.runtime import peak_memory

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# A model can write any character; those that steer a terminal are shown as pictures instead.
_VISIBLE = (
    {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)
)
_ENDS = {
    "eos": "",
    "complete": "",
    "stop": "ended by a stop string",
    "length": "cut off by --max-tokens",
    "context": "cut off by the model's context",
    "interrupted": "interrupted",
}


class Printer:
    """Writes streamed texts to `out`, one after the other.

    Of several samples, the first one that is not complete streams; each has a heading, and later ones wait.
    """

    def __init__(self, out: TextIO, samples: int = 1) -> None:
        self._out, self._samples = out, samples
        self._terminal, self._coloured = out.isatty(), has_colour(out)
        self._waiting: dict[int, list[Segment]] = {}
        self._ended: set[int] = set()
        self._current = 0  # the sample that streams
        self._headed = 0  # how many samples have their heading
        self._dim = self._line_open = False

    def show(self, event: Event) -> None:
        """Writes what is new and due."""
        sample = event.reply.sample
        self._waiting.setdefault(sample, []).extend(event.segments)
        if event.reply.finish is not None:
            self._ended.add(sample)
        while self._current in self._waiting:
            self._head()
            self._write(self._waiting[self._current])
            self._waiting[self._current] = []
            if self._current not in self._ended:
                break
            self._current += 1
            self.end_line()
        self._out.flush()

    def end_line(self) -> None:
        """Ends the dimming and the line, if they are open."""
        self._set_dim(False)
        if self._line_open:
            self._out.write("\n")
        self._line_open = False
        self._out.flush()

    def _head(self) -> None:
        if self._samples > 1 and self._headed == self._current:
            self._out.write(f"=== {self._current + 1} of {self._samples} ===\n")
            self._headed += 1

    def _write(self, segments: Sequence[Segment]) -> None:
        for text, thinking in segments:
            self._set_dim(thinking)
            self._out.write(text.translate(_VISIBLE) if self._terminal else text)
            self._line_open = not text.endswith("\n")

    def _set_dim(self, dim: bool) -> None:
        if self._coloured and dim != self._dim:
            self._out.write(_DIM if dim else _PLAIN)
        self._dim = dim


def has_colour(out: TextIO) -> bool:
    """Whether escape codes are welcome there (no-color.org)."""
    return out.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def note(text: str, err: TextIO) -> None:
    """A remark to the person, dimmed if possible."""
    print(f"{_DIM}{text}{_PLAIN}" if has_colour(err) else text, file=err, flush=True)


def ending(replies: Sequence[Reply]) -> str:
    """Why texts ended, where that needs saying."""
    reasons = {reply.finish: None for reply in replies if reply.finish is not None}
    return ", ".join(_ENDS[reason] for reason in reasons if _ENDS[reason])


def figures(stats: Stats, load_seconds: float | None = None) -> str:
    """One line of counts, speeds and peak memory."""
    parts = [
        f"prompt {stats.prompt_tokens} tokens{_speed(stats.prompt_tokens, stats.prompt_seconds)}",
        f"generated {stats.generated_tokens} tokens{_speed(stats.decoded_tokens, stats.decode_seconds)}",
    ]
    if stats.compile_seconds:
        parts.append(f"compiling {stats.compile_seconds:.1f} s")
    if load_seconds is not None:
        parts.append(f"loading {load_seconds:.1f} s")
    memory = [f"{kind} {size / 2**30:.2f} GiB" for kind, size in peak_memory().items()]
    return " · ".join([*parts, f"peak memory {', '.join(memory)}"])


def rates(stats: Stats) -> dict[str, float | int | None]:
    """The figures for machines."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "prompt_tokens_per_second": _rate(stats.prompt_tokens, stats.prompt_seconds),
        "generated_tokens": stats.generated_tokens,
        "generated_tokens_per_second": _rate(stats.decoded_tokens, stats.decode_seconds),
        "compile_seconds": round(stats.compile_seconds, 3),
        **{f"peak_{kind}_memory_bytes": size for kind, size in peak_memory().items()},
    }


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 2) if tokens and seconds > 0 else None


def _speed(tokens: int, seconds: float) -> str:
    rate = _rate(tokens, seconds)
    return "" if rate is None else f" at {rate:.1f}/s"
