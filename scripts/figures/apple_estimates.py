"""Tables of estimates for Apple chips: docs/speed.md, docs/finer-head.md, README.md.

    python scripts/figures/apple_estimates.py            # prints the tables and the fit's errors
    python scripts/figures/apple_estimates.py --write    # puts them into the pages

`step_times.py` says how a step's time is estimated, `wide_times.py` that of several tokens, and
`draft_times.py` what trained drafters gain.
"""

from textwrap import wrap

import numpy as np

from draft_times import drafted_gain, drafters
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
from wide_times import CONTEXT, WIDTHS, cost, lookup_gain

CHIPS = ("m1", "m2", "m4", "m5", "m4-pro", "m4-max", "m3-ultra")
# The README's columns of guessed tokens are for this chip.
GUESSED_CHIP = "m4"
README_CHIPS = ("m4", "m5", "m4-pro", "m4-max")
README_DENSE = ("gemma-3-1b", "gemma-3-4b", "qwen3.5-4b", "qwen3.5-9b", "qwen3.8-27b")
README_EXPERTS = ("gemma-4-26b-a4b", "qwen3.5-35b-a3b")
# These are what people run, small to large.
README_MODELS = (*README_DENSE, *README_EXPERTS)
# A chat is assumed to accept these shares of drafts, by depth.
CHAT = (0.75, 0.5, 0.33)
EXPERTS = ("lfm2-8b-a1b", "ling-mini", "gpt-oss-20b", "gemma-4-26b-a4b", "qwen3.5-35b-a3b")
MODELS = (
    *("gemma-3-270m", "gemma-3-1b", "gemma-3-4b", "gemma-4-e2b", "gemma-4-e4b", "qwen3-0.6b"),
    *("qwen3.5-0.8b", "qwen3.5-2b", "qwen3.5-4b", "qwen3.5-9b", "qwen3.8-27b", "gemma-4-31b"),
    *("llama-3.2-1b", "llama-3.1-8b", "minicpm5-1b", "lfm2.5-1.2b", "lfm2.5-2.6b", "smollm2"),
    *EXPERTS,
)
REPEATS = (*README_DENSE, "gemma-4-31b", "llama-3.1-8b", "gpt-oss-20b", *README_EXPERTS)
# A context of so many tokens is within the windows of Gemma-3-4B.
SHORT = 512
COSTS = (
    *(("gemma-3-4b", SHORT), ("gemma-3-4b", CONTEXT), ("llama-3.1-8b", CONTEXT)),
    *(("qwen3.8-27b", CONTEXT), ("gemma-4-26b-a4b", CONTEXT), ("qwen3.5-35b-a3b", CONTEXT)),
)
FINER = tuple(model for model in MODELS if model not in ("llama-3.1-8b", "gpt-oss-20b"))


def shown(value: float) -> str:
    """The cell of a gain."""
    if value >= PAYS:
        return f"{value:.2f}"
    return "dense"


def table(*columns: str, chips: tuple[str, ...] = CHIPS) -> list[str]:
    """The head of a table with a column for each chip."""
    names = [*columns, *(chip.replace("-", " ").title() for chip in chips)]
    return [line(*names), line(*("---" for _ in names))]


def head_bits(model: str) -> tuple[int, ...]:
    """The heads that are shown; gpt-oss is not made with others."""
    if models()[model].expert_bits:
        return (4, 8)
    return (4, 8, 16)


def speed_page() -> list[str]:
    """All models: greedy with several heads, in brackets with a free one, and sampled."""

    def cells(model: str, head: int) -> list[str]:
        gains = [(gain(model, chip, head), ceiling(model, chip, head)) for chip in CHIPS]
        return [f"{shown(faster)} ({free:.2f})" for faster, free in gains]

    lines = table("model", "head")
    for model in MODELS:
        for head in head_bits(model):
            name = ""
            if head == 4:
                name = models()[model].name
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
    columns += [f"repeats its prompt, {GUESSED_CHIP.upper()}"]
    columns += [f"with its drafter, {GUESSED_CHIP.upper()}"]
    lines = [line(*columns), line(*("---" for _ in columns))]
    for model in README_MODELS:
        for head in (8, 4):
            gains = [at_least_dense(gain(model, chip, head)) for chip in README_CHIPS]
            gains.append(at_least_dense(lookup_gain(model, GUESSED_CHIP, head)))
            gains.append(drafter_range(model, GUESSED_CHIP, head))
            name = ""
            if head == 8:
                name = models()[model].name
            lines.append(line(name, f"{head} bits", *gains))
    return lines


def at_least_dense(value: float) -> str:
    """The cell of a gain where a model that keeps its dense head is as fast as it was."""
    if value >= PAYS:
        return f"{value:.2f}"
    return "1.00"


def drafter_range(model: str, chip: str, head: int) -> str:
    """The gains of a model's drafter by the shares of a chat and by published ones.

    A FlashHead scores the drafts, but for a drafter with a head of its own.
    """
    if model not in drafters():
        return "–"
    shares = CHAT, drafters()[model].shares
    few = not drafters()[model].own_head
    gains = sorted(drafted_gain(model, chip, head, few, each)[0] for each in shares)
    return "–".join(dict.fromkeys(map(at_least_dense, gains)))


def trained_drafters() -> list[str]:
    """Trained drafters, whose drafts the dense head scores, and FlashHead's few clusters."""

    def cell(model: str, chip: str, shares: tuple[float, ...]) -> str:
        dense, _ = drafted_gain(model, chip, 4, False, shares)
        few, width = drafted_gain(model, chip, 4, True, shares)
        if width == 1:
            return f"single ({shown(few)})"
        return f"{shown(dense)}, {few:.2f} ({width})"

    lines = table("model, head of 4 bits", "shares of the drafts, by depth")
    for model, drafter in drafters().items():
        for name, shares in (("published", drafter.shares), ("a chat, assumed", CHAT)):
            title = ""
            if name == "published":
                title = models()[model].name
            said = f"{', '.join(f'{share:g}' for share in shares)} ({name})"
            lines.append(line(title, said, *(cell(model, chip, shares) for chip in CHIPS)))
    return lines


def drafter_sources() -> list[str]:
    """What the shares and the sizes of drafters rest on."""
    columns = ("model", "drafter", "a draft reads, beside a head", "published shares", "of")
    lines = [line(*columns), line(*("---" for _ in columns))]
    for model, drafter in drafters().items():
        read = f"{drafter.weights / 1e6:.0f} M weights of {drafter.bits:g} bits"
        shares = ", ".join(f"{share:g}" for share in drafter.shares)
        source = f"[{drafter.measured_on}]({drafter.source})"
        lines.append(line(models()[model].name, drafter.drafter, read, shares, source))
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
            if head == 16:
                name = ""
            else:
                name = models()[model].name
            lines.append(line(name, str(head), *(cell(model, chip, head) for chip in CHIPS)))
    return lines


def repeats() -> list[str]:
    """Answers that repeat their prompt, with prompt lookup."""
    lines = table("model", "head")
    for model in REPEATS:
        for head in (4, 8):
            name = ""
            if head == 4:
                name = models()[model].name
            gains = (shown(lookup_gain(model, chip, head)) for chip in CHIPS)
            lines.append(line(name, f"{head} bits", *gains))
    return lines


def wide_costs() -> list[str]:
    """A wide step relative to a single one, for each number of its tokens."""
    lines = table("model, 4 bits", "tokens before")
    for model, context in COSTS:
        costs = (
            " / ".join(f"{cost(model, chip, 4, n, context):.2f}" for n in WIDTHS) for chip in CHIPS
        )
        lines.append(line(models()[model].name, f"{context:,}", *costs))
    return lines


# By page and marker: the lines of a block.
BLOCKS = {
    ("docs/speed.md", "estimates"): speed_page,
    ("docs/speed.md", "fit"): fit_text,
    ("docs/speed.md", "repeats"): repeats,
    ("docs/speed.md", "wide costs"): wide_costs,
    ("docs/speed.md", "drafters"): trained_drafters,
    ("docs/speed.md", "drafter sources"): drafter_sources,
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
