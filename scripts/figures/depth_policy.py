#!/usr/bin/env python3
"""What the policy of drafts' depth loses against the best depth and against none: docs/speed.md.

    python scripts/figures/depth_policy.py --json docs/benchmarks/depth-policy.json --write

The package's own policy (decoding/guessing/depth.py) chooses each step of texts of which is known
how many drafts in a row would be right behind each token: those of trained_drafter.py, and random
ones with shares that stay, fall with the depth, or change within a text and between texts. Times
are the estimates of draft_times.py for each model and chip. The best depth is the one that is best
for all texts of a kind, known beforehand. The first time nothing is known of a pair, the second
time what the first texts have shown.
"""

import json
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
from tqdm import tqdm

from apple_estimates import CHAT, CHIPS
from draft_times import by_depth, draft_costs, drafters
from mlx_flashhead.benchmark import add_number
from mlx_flashhead.common.arguments import Parser, writable
from mlx_flashhead.common.command import command
from mlx_flashhead.decoding.guessing.depth import MAX_GUESSES, Costs, Known
from pages import CHECKOUT, line, with_block
from simulated_texts import drawn, time_of_policy, time_of_width
from step_times import models

# Bits.
HEAD = 4
SHARES = (0.93, 0.85, 0.75, 0.6, 0.5, 0.4, 0.3, 0.1)
# The share of the next depth, relative to a depth's.
FALL = 0.9
# After so many tokens the shares change within a text.
PERIOD = 64
GOOD = 0.9
BAD = 0.25
RECORDED = CHECKOUT / "docs" / "benchmarks" / "trained-drafter.json"
PAGE = CHECKOUT / "docs" / "speed.md"

# Of each text, the number of right drafts in a row behind each token.
Runs = list[np.ndarray]


def changing(n_tokens: int, seed: int) -> np.ndarray:
    """A text whose drafts are good and bad by turns."""
    parts = []
    for number in range(0, n_tokens, PERIOD):
        parts.append(drawn(_good_or_bad(number // PERIOD), PERIOD, (seed, number)))
    return np.concatenate(parts)[:n_tokens]


def _good_or_bad(number: int) -> list[float]:
    """Shares of all depths, which are good for an even number and bad for an odd one."""
    share = GOOD
    if number % 2 == 1:
        share = BAD
    return by_depth((share,))


def texts_of(n_texts: int, n_tokens: int) -> dict[str, Runs]:
    """The texts of each kind."""
    numbers = range(n_texts)
    kinds: dict[str, Runs] = {}
    for share in SHARES:
        shares = by_depth((share,))
        kinds[f"{share:g}"] = [drawn(shares, n_tokens, (1, i)) for i in numbers]
    falling = [0.75 * FALL**depth for depth in range(MAX_GUESSES)]
    kinds["0.75, falling"] = [drawn(falling, n_tokens, (2, i)) for i in numbers]
    kinds[", ".join(f"{share:g}" for share in CHAT)] = [
        drawn(by_depth(CHAT), n_tokens, (3, i)) for i in numbers
    ]
    kinds["good and bad within a text"] = [changing(n_tokens, i) for i in numbers]
    kinds["good and bad texts"] = [drawn(_good_or_bad(i), n_tokens, (4, i)) for i in numbers]
    return kinds


def recorded() -> dict[str, Runs]:
    """The texts of the drafter that was trained, by how drafts were scored."""
    kinds: dict[str, Runs] = {}
    for text, ways in json.loads(RECORDED.read_text(encoding="utf-8"))["figures"].items():
        for way, figures in ways.items():
            runs = [np.array(list(map(int, run))) for run in figures["runs"]]
            kinds[f"trained drafter, {text}, {way.split(',')[0]}"] = runs
    return kinds


def compared(runs: Runs, costs: Costs) -> dict[str, Any]:
    """The policy beside each width, for texts of a kind."""
    of_width = {w: sum(time_of_width(run, costs, w) for run in runs) for w in (1, *costs.times)}
    best = min(of_width, key=lambda width: of_width[width])
    known = Known()
    first, then = (sum(time_of_policy(run, costs, known) for run in runs) for _ in range(2))
    return {
        "best_width": best,
        "best_gain": round(of_width[1] / of_width[best], 4),
        "gains": [round(of_width[1] / time, 4) for time in (first, then)],
        "lost_to_best": [round(time / of_width[best] - 1, 4) for time in (first, then)],
        "lost_to_none": [round(time / of_width[1] - 1, 4) for time in (first, then)],
    }


@cache
def costs_of(model: str, chip: str) -> Costs:
    """The times of a model with its drafter, whose drafts a FlashHead scores if it may."""
    return draft_costs(model, chip, HEAD, few=not drafters()[model].own_head)


def simulated(kinds: dict[str, Runs]) -> list[dict[str, Any]]:
    """A case for each kind of texts, model and chip."""
    cases = []
    for kind, runs in tqdm(kinds.items()):
        for model in drafters():
            for chip in CHIPS:
                about = {"texts": kind, "model": model, "chip": chip}
                cases.append(about | compared(runs, costs_of(model, chip)))
    return cases


def page_lines(cases: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a line for each kind of texts, over all models and chips."""
    yield line("shares of the drafts", "best depth gains", "policy gains", "lost to it", "to none")
    yield line(*("---" for _ in range(5)))
    for kind in dict.fromkeys(case["texts"] for case in cases):
        found = [case for case in cases if case["texts"] == kind]
        best = [case["best_gain"] for case in found]
        gains = [case["gains"][1] for case in found]
        lost = [case["lost_to_best"] for case in found]
        to_best = " / ".join(f"{100 * np.mean(each):.1f}" for each in zip(*lost, strict=True))
        to_none = max(max(case["lost_to_none"]) for case in found)
        yield line(
            kind, ends(best), ends(gains), f"{to_best} %", f"{max(0.0, 100 * to_none):.1f} %"
        )


def ends(values: list[float]) -> str:
    """The least and the greatest of some gains."""
    return f"{min(values):.2f}–{max(values):.2f}"


@command
def main() -> None:
    """Entry point."""
    description = __doc__.split("\n")[0]
    parser = Parser(prog="scripts/figures/depth_policy.py", description=description)
    parser.add_argument("--json", type=writable, metavar="FILE", help="where to write the figures")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    add_number(parser, "--texts", 8, "Random texts of a kind.")
    add_number(parser, "--tokens", 256, "Tokens of such a text.")
    args = parser.parse_args()
    kinds = texts_of(args.texts, args.tokens)
    if RECORDED.exists():
        kinds |= recorded()
    cases = simulated(kinds)
    lines = list(page_lines(cases))
    print(*lines, sep="\n")
    if args.json:
        names = {model: models()[model].name for model in drafters()}
        about = {"kind": "depth policy", "command": " ".join(sys.argv), "models": names}
        rows = ",\n".join(json.dumps(case) for case in cases)
        head = json.dumps(about | {"texts": args.texts, "tokens": args.tokens}, indent=1)
        content = f'{head[:-2]},\n "cases": [\n{rows}\n]}}\n'
        with open(args.json, "w", encoding="utf-8") as file:
            file.write(content)
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_block(page, "depth policy", lines), encoding="utf-8")


if __name__ == "__main__":
    main()
