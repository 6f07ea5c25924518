"""Puts two tables into docs/speed.md: estimates for chips, and the Macs of docs/benchmarks/macs.

    python scripts/figures/speed_tables.py

Each table stands between two comments of the page. A test compares the page with them.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlx_flashhead.benchmarks.roofline import find_chip, of_bits
from mlx_flashhead.benchmarks.shapes import SHAPES
from mlx_flashhead.lossless.tuning import LEAST_GAIN

CHECKOUT = Path(__file__).resolve().parents[2]
PAGE = CHECKOUT / "docs" / "speed.md"
MACS = CHECKOUT / "docs" / "benchmarks" / "macs"
CHIPS = ("m1", "m2", "m4", "m5", "m4-pro", "m1-max", "m4-max", "m5-max", "m3-ultra")
MODELS = ("gemma-3-270m", "gemma-3-1b", "qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b", "smollm2")
BITS = ((4, 4), (4, 8), (16, 16))  # body, head
NO_MAC = "No Mac has been measured yet."


def estimates() -> Iterator[str]:
    """Gains by model and bits, a column for each chip."""
    names = [chip.replace("-", " ").title() for chip in CHIPS]
    yield from _head("model", "bits of body, head", *names)
    for model in MODELS:
        for i, bits in enumerate(BITS):
            name = "" if i else SHAPES[model].name
            yield _row(name, f"{bits[0]}, {bits[1]}", *(_gain(model, chip, bits) for chip in CHIPS))


def macs(folder: Path = MACS) -> Iterator[str]:
    """Tokens per second of the folder's files, a line for each model and sampling."""
    files = [json.loads(file.read_text()) for file in sorted(folder.glob("m*.json"))]
    if not files:
        yield NO_MAC
        return
    yield from _head("chip", "model", "head", "sampling", "dense", "bare", "checked", "faster")
    for figures in files:
        for result in figures["results"]:
            speeds, gain = result["tokens_per_second"], result["times_faster"]["FlashHead"]
            yield _row(
                figures["machine"]["processor"],
                result["model"],
                f"{result['head_bits']}-bit",
                result["sampler"],
                *(f"{speeds[form]:.1f}" for form in ("dense", "bare FlashHead", "FlashHead")),
                f"{gain:.2f} x" + (", stays dense" if result["stays_dense"] else ""),
            )


def with_table(page: str, name: str, lines: Iterable[str]) -> str:
    """The page with other lines between the comments of a table."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    pattern = f"(?s){re.escape(begin)}.*?{re.escape(end)}"
    table = begin + "".join(f"{line}\n" for line in lines) + end
    return re.sub(pattern, lambda _: table, page)


def with_tables(page: str) -> str:
    """The page with both tables as they are today."""
    return with_table(with_table(page, "estimates", estimates()), "macs", macs())


def _gain(model: str, chip: str, bits: tuple[int, int]) -> str:
    dense, flash = of_bits(SHAPES[model], find_chip(chip), *bits)
    gain = dense.model_ms / flash.model_ms
    return f"{gain:.2f}" if gain >= LEAST_GAIN else "dense"


def _head(*cells: str) -> Iterator[str]:
    yield _row(*cells)
    yield _row(*("---" for _ in cells))


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Writes the page."""
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
