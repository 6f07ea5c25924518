"""Tables of estimates for Apple chips: docs/speed.md, docs/finer-head.md, README.md.

    python scripts/figures/apple_estimates.py            # prints the tables and the fit's errors
    python scripts/figures/apple_estimates.py --write    # puts them into the pages

`step_times.py` says how a step's time is estimated, and `wide_times.py` that of several tokens.
"""

from textwrap import wrap

import numpy as np

from mlx_flashhead.common.arguments import Parser
from mlx_flashhead.common.command import command
from pages import CHECKOUT, line, with_block
from step_times import (
    PAYS,
    ceiling,
    chips,
    constants,
    dense_us,
    fitted_speeds,
    flash_us,
    gain,
    left_out,
    models,
    rows,
    sampled_gains,
)
from wide_times import WIDTHS, cost, lookup_gain

CHIPS = ("m1", "m2", "m4", "m5", "m4-pro", "m4-max", "m3-ultra")
REPEATS_CHIP = "m4"  # of the README's column of answers that repeat their prompt
README_CHIPS = ("m4", "m5", "m4-pro", "m4-max", "m5-max")
README_MODELS = (  # what people run, small to large
    *("gemma-3-1b", "gemma-3-4b", "qwen3.5-4b", "gpt-oss-20b", "gemma-4-26b-a4b"),
    "qwen3.5-35b-a3b",
)
EXPERTS = ("lfm2-8b-a1b", "ling-mini", "gpt-oss-20b", "gemma-4-26b-a4b", "qwen3.5-35b-a3b")
MODELS = (
    *("gemma-3-270m", "gemma-3-1b", "gemma-3-4b", "gemma-4-e2b", "gemma-4-e4b", "qwen3-0.6b"),
    *("qwen3.5-0.8b", "qwen3.5-2b", "qwen3.5-4b", "llama-3.2-1b", "llama-3.1-8b", "minicpm5-1b"),
    *("lfm2.5-1.2b", "lfm2.5-2.6b", "smollm2", *EXPERTS),
)
REPEATS = (*README_MODELS[:3], "llama-3.1-8b", *README_MODELS[3:])  # and a large one
COSTS = ("gemma-3-4b", "llama-3.1-8b", "gemma-4-26b-a4b")
FINER = tuple(model for model in MODELS if model not in ("llama-3.1-8b", "gpt-oss-20b"))


def shown(value: float) -> str:
    """The cell of a gain."""
    return f"{value:.2f}" if value >= PAYS else "dense"


def table(*columns: str, chips: tuple[str, ...] = CHIPS) -> list[str]:
    """The head of a table with a column for each chip."""
    names = [*columns, *(chip.replace("-", " ").title() for chip in chips)]
    return [line(*names), line(*("---" for _ in names))]


def head_bits(model: str) -> tuple[int, ...]:
    """The heads that are shown; gpt-oss is not made with others."""
    return (4, 8) if models()[model].expert_bits else (4, 8, 16)


def speed_page() -> list[str]:
    """All models: greedy with several heads, in brackets with a free one, and sampled."""

    def cells(model: str, head: int) -> list[str]:
        gains = [(gain(model, chip, head), ceiling(model, chip, head)) for chip in CHIPS]
        return [f"{shown(faster)} ({free:.2f})" for faster, free in gains]

    lines = table("model", "head")
    for model in MODELS:
        for head in head_bits(model):
            name = models()[model].name if head == 4 else ""
            lines.append(line(name, f"{head} bits", *cells(model, head)))
        ranges = [sampled_gains(model, chip) for chip in CHIPS]
        sampled = ("–".join(dict.fromkeys(map(shown, ends))) for ends in ranges)
        lines.append(line("", "4 bits, top-p", *sampled))
    return lines


def fit_text() -> list[str]:
    """The constants, and the errors of speeds that are left out."""
    c = constants()
    known = rows("speeds")
    speeds = left_out("tokens_per_second")
    by_chip = left_out("chip")
    sizes = np.abs(speeds)
    experts = [models()[speed["model"]].experts > 0 for speed in fitted_speeds()]
    text = (
        f"Fitted to {len(speeds)} of {len(known)} public speeds on "
        f"{len({s['chip'] for s in known})} chips ({len(known) - len(speeds)} wait for the host): "
        f"{c['bandwidth']:.2f} of Apple's bandwidth, {c['ultra']:.2f} on an Ultra, "
        f"{c['launch']:.1f} µs a kernel, {c['old launch']:.1f} µs on M1 and M2. A "
        f"speed that is left out is missed by {np.median(sizes):.0%} in the median, nine of ten by "
        f"less than {np.quantile(sizes, 0.9):.0%}, all by {speeds.min():+.0%} to "
        f"{speeds.max():+.0%}; a whole chip by {np.median(np.abs(by_chip)):.0%}; the "
        f"{sum(experts)} of mixtures of experts by {np.median(sizes[experts]):.0%} in the median."
    )
    return wrap(text.replace("%", " %"), 120)


def readme() -> list[str]:
    """Models that people run: greedy, with heads as files have them."""
    columns = ["model", "head", *(chip.replace("-", " ").title() for chip in README_CHIPS)]
    columns += [f"repeats its prompt, {REPEATS_CHIP.title()}"]
    lines = [line(*columns), line(*("---" for _ in columns))]
    for model in README_MODELS:
        for head in (8, 4):
            gains = [shown(gain(model, chip, head)) for chip in README_CHIPS]
            gains.append(f"{lookup_gain(model, REPEATS_CHIP, head):.2f}")
            name = models()[model].name if head == 8 else ""
            lines.append(line(name, f"{head} bits", *gains))
    return lines


def finer_head() -> list[str]:
    """A finer head with whichever is faster, as a multiple of the dense model with 4 bits."""

    def cell(model: str, chip: str, head: int) -> str:
        of = models()[model], chips()[chip]
        step = min(flash_us(*of, 4, head), dense_us(*of, 4, head))
        return f"{dense_us(*of, 4, 4) / step:.2f}"

    lines = table("model", "head, bits")
    for model in FINER:
        for head in (8, 16):
            name = "" if head == 16 else models()[model].name
            lines.append(line(name, str(head), *(cell(model, chip, head) for chip in CHIPS)))
    return lines


def repeats() -> list[str]:
    """Answers that repeat their prompt, with prompt lookup."""
    lines = table("model", "head")
    for model in REPEATS:
        for head in (4, 8):
            name = models()[model].name if head == 4 else ""
            gains = (f"{lookup_gain(model, chip, head):.2f}" for chip in CHIPS)
            lines.append(line(name, f"{head} bits", *gains))
    return lines


def wide_costs() -> list[str]:
    """A wide step relative to a single one, for each number of its tokens."""
    lines = table("model, 4 bits")
    for model in COSTS:
        costs = (" / ".join(f"{cost(model, chip, 4, n):.2f}" for n in WIDTHS) for chip in CHIPS)
        lines.append(line(models()[model].name, *costs))
    return lines


BLOCKS = {  # page and marker: lines
    ("docs/speed.md", "estimates"): speed_page,
    ("docs/speed.md", "fit"): fit_text,
    ("docs/speed.md", "repeats"): repeats,
    ("docs/speed.md", "wide costs"): wide_costs,
    ("docs/finer-head.md", "estimates"): finer_head,
    ("README.md", "estimates"): readme,
}


@command
def main() -> None:
    """Entry point."""
    parser = Parser(prog="scripts/figures/apple_estimates.py", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="Put the tables into the pages.")
    write = parser.parse_args().write
    for (page, name), lines in BLOCKS.items():
        path = CHECKOUT / page
        if not write:
            print(f"{page}, {name}:", *lines(), "", sep="\n")
        elif path.exists():
            text = path.read_text(encoding="utf-8")
            path.write_text(with_block(text, name, lines()), encoding="utf-8")


if __name__ == "__main__":
    main()
