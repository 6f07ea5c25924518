"""Draws the plots of the pages into docs/ from the figures in docs/benchmarks/.

python scripts/plots.py [--figures benchmarks] [--docs docs]
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CHECKOUT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(CHECKOUT)  # works uninstalled too

from mlx_flashhead.benchmarks.head import CANDIDATES, DENSE, LOGITS
from mlx_flashhead.benchmarks.model import DENSE as DENSE_MODEL
from mlx_flashhead.benchmarks.model import FLASH_HEAD, NO_HEAD
from mlx_flashhead.common.command import command

BEST_DENSE = "best dense"
STYLES = {
    DENSE: ("tab:gray", "dense, mlx-lm"),
    BEST_DENSE: ("black", "dense, best form"),
    LOGITS: ("tab:cyan", "FlashHead, full logits"),
    CANDIDATES: ("tab:blue", "FlashHead, candidates"),
}
LABELS = {
    "vocab_size": "vocabulary V",
    "hidden_size": "width D",
    "n_probes": "clusters scored p",
    "positions": "batch",
}


def measured_on(figures: dict) -> str:
    """Machine and date of the figures."""
    about = figures["machine"]
    return f"{about['processor']}, CPU, {about['blas']}, {about['date']}"


def spread_of(one: dict, form: str) -> dict:
    """Milliseconds of a form, or of the fastest dense one."""
    return one["ms"][one["best_dense"] if form == BEST_DENSE else form]


def draw_growth(figures: dict, path: Path) -> None:
    """Milliseconds above, megabytes read below, along each axis."""
    names = ("vocab_size", "hidden_size", "n_probes", "n_positions")
    figure, axes = plt.subplots(2, 4, figsize=(14, 6.4), layout="constrained", sharex="col")
    for column, name in enumerate(names):
        key = "positions" if name == "n_positions" else name
        points = [one for one in figures["results"] if one["axis"] == name]
        x = [one[key] for one in points]
        above, below = axes[:, column]
        for form, (color, label) in STYLES.items():
            spreads = [spread_of(one, form) for one in points]
            above.plot(x, [s["median"] for s in spreads], color=color, marker=".", label=label)
            lower, upper = [s["lower"] for s in spreads], [s["upper"] for s in spreads]
            above.fill_between(x, lower, upper, color=color, alpha=0.2)
        dense = [one["head_mb"] for one in points]
        below.plot(x, dense, color="black", marker=".")
        below.plot(x, [one["read_mb"] for one in points], color="tab:blue", marker=".")
        below.set_xlabel(LABELS[key])
        for axis in (above, below):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(_short))
    axes[0, 0].set_ylabel("ms per call")
    axes[1, 0].set_ylabel("MB of weights read per call")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    usual = figures["usual"]
    figure.suptitle(
        f"A float32 head; V={usual['vocab_size']:,}, D={usual['hidden_size']:,}, "
        f"p={usual['n_probes']}, batch {usual['n_positions']} where not varied. "
        f"{measured_on(figures)}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_heads(figures: dict, path: Path) -> None:
    """Each model's head: milliseconds of all forms."""
    results = figures["results"]
    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    height = 0.8 / len(STYLES)
    for number, (form, (color, label)) in enumerate(STYLES.items()):
        values = [spread_of(one, form)["median"] for one in results]
        places = [i + number * height for i in range(len(results))]
        bars = axis.barh(places, values, height, color=color, label=label)
        axis.bar_label(bars, fmt=" %.1f", fontsize="x-small")
    axis.set_yticks([i + 0.3 for i in range(len(results))], [one["name"] for one in results])
    axis.invert_yaxis()
    axis.set(xlabel="ms per call, float32, one state, cold caches")
    axis.set_title(measured_on(figures), fontsize="medium")
    axis.legend(fontsize="small", loc="upper right")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_model(figures: dict, path: Path) -> None:
    """Decoding: tokens/s of the dense, the FlashHead and the headless model."""
    results = figures["results"]
    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    colors = {DENSE_MODEL: "tab:gray", FLASH_HEAD: "tab:blue", NO_HEAD: "lightgray"}
    width = 0.8 / len(colors)
    for number, (form, color) in enumerate(colors.items()):
        values = [one["tokens_per_second"][form]["median"] for one in results]
        places = [i + number * width for i in range(len(results))]
        label = "a head that costs nothing" if form == NO_HEAD else form
        axis.bar_label(
            axis.bar(places, values, width, color=color, label=label), fmt="%.1f", fontsize="small"
        )
    names = [f"{one['sampler']}, batch {one['batch']}" for one in results]
    axis.set_xticks([i + width for i in range(len(results))], names)
    axis.set(ylabel="tokens/s, all sequences")
    axis.set_title(f"{results[0]['model']}. {measured_on(figures)}", fontsize="medium")
    axis.legend(fontsize="small", loc="lower center")
    axis.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _short(value: float, _=None) -> str:
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


DRAW = {"growth": draw_growth, "head": draw_heads, "model": draw_model}


@command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--figures", type=Path, default=CHECKOUT / "docs" / "benchmarks")
    parser.add_argument("--docs", type=Path, default=CHECKOUT / "docs")
    args = parser.parse_args()
    files = sorted(args.figures.glob("*.json"))
    if not files:
        parser.error(f"--figures {args.figures}: there are no figures here")
    args.docs.mkdir(parents=True, exist_ok=True)
    for file in files:
        figures = json.loads(file.read_text())
        draw = DRAW.get(figures.get("kind"))
        if draw is not None:
            draw(figures, args.docs / f"{file.stem}.png")
            print(args.docs / f"{file.stem}.png")


if __name__ == "__main__":
    main()
