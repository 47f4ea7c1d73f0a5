"""Figure 1 (right) of the MiniMax-M1 paper: FLOPs to generate a text against its length, counted, not measured.

    python scripts/figure1.py [--output scripts/results/figure1]      # writes figure1.csv and figure1.png

Counts decode steps of M1, DeepSeek-R1 and Qwen3-235B-A22B with `m1jax.sharding.flops`; a step is linear in its context,
so that the sum over a text follows from two of them. DeepSeek-R1 is counted with both forms of its attention: with keys
and values of every head in the cache, which takes the fewest FLOPs, and with the compressed vectors of 576 channels
that its own code decodes with. Needs the extra `plot`.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from m1jax.errors import UserError, main_guard
from m1jax.model import abstract
from m1jax.presets import find_config
from m1jax.sharding import peers
from m1jax.sharding.flops import count

K = 1024
LENGTHS = (*range(0, 129 * K, 4 * K), 100_000)
NAMES = {
    "m1": "MiniMax-M1",
    "r1": "DeepSeek-R1, keys and values of every head",
    "r1_latent": "DeepSeek-R1, latent vectors",
    "qwen3": "Qwen3-235B-A22B",
}


def m1_step(context: int) -> float:
    """FLOPs of one decode step of M1 over so many positions."""
    model = abstract(find_config("m1-80k"), "float32")
    state = jax.eval_shape(lambda m: m.init_state(1, context), model)
    return count(lambda m, s, t: m.step(t, s), model, state, jax.ShapeDtypeStruct((1, 1), jnp.int32)).flops


STEPS: dict[str, Callable[[int], float]] = {
    "m1": m1_step,
    "r1": lambda context: count(lambda: peers.deepseek_r1(context, latent=False)).flops,
    "r1_latent": lambda context: count(lambda: peers.deepseek_r1(context, latent=True)).flops,
    "qwen3": lambda context: count(lambda: peers.qwen3(context)).flops,
}


def table() -> list[dict[str, float]]:
    """For each length the FLOPs of all steps from an empty context (`_text`) and of the last one (`_step`)."""
    rows: list[dict[str, float]] = [{"tokens": length} for length in sorted(LENGTHS)]
    for name, step in STEPS.items():
        slope = (step(9 * K) - step(8 * K)) / K
        start = step(8 * K) - slope * 8 * K
        for row in rows:
            n = row["tokens"]
            row[f"{name}_text"] = n * start + slope * n * (n + 1) / 2
            row[f"{name}_step"] = start + n * slope
    return rows


def ratios(row: dict[str, float]) -> str:
    """M1's part of R1's FLOPs, in words."""
    parts = (
        f"{row[f'm1_{what}'] / row[f'{r1}_{what}']:.1%}" for r1 in ("r1", "r1_latent") for what in ("text", "step")
    )
    return "M1 / R1 {}, last token {}; against R1 with latent vectors {}, {}".format(*parts)


def draw(rows: list[dict[str, float]], file: Path) -> None:
    """The picture: whole texts on the left, the last step of each on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 4), dpi=80, layout="constrained")
    for ax, what, unit in zip(axes, ("text", "step"), (1e15, 1e12), strict=True):
        for name, label in NAMES.items():
            ax.plot([row["tokens"] / K for row in rows], [row[f"{name}_{what}"] / unit for row in rows], label=label)
        ax.set(xlabel="generated tokens / 1024", xlim=(0, 128), ylim=(0, 1.2 * rows[-1][f"r1_{what}"] / unit))
    axes[0].set_ylabel("PFLOP, the whole text")
    axes[1].set_ylabel("TFLOP, its last token")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=4)
    figure.savefig(file)


@main_guard
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python scripts/figure1.py", description="FLOPs against generation length.")
    parser.add_argument("--output", type=Path, default=Path("scripts/results/figure1"), metavar="NAME")
    args = parser.parse_args()
    rows = table()
    with args.output.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" for key, value in row.items()} for row in rows)
    for row in rows:
        if row["tokens"] in (64 * K, 100_000):
            print(f"{row['tokens']:.0f} tokens: {ratios(row)}")
    try:
        draw(rows, args.output.with_suffix(".png"))
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install 'm1jax[plot]'; the table is written") from None


if __name__ == "__main__":
    main()
