"""Records the demo's race and writes it as an animated picture, for the README.

Each piece of text appears at the time at which it was written. Run it on a quiet machine, in the
environment of `scripts/demo.sh`: `.venv/bin/python scripts/record_demo.py`
"""

import platform
import re
import sys
from html import escape
from pathlib import Path

from demo import GEMMA3, MODELS, TITLES, Run, load_demo, race, warm_up
from mlx_flashhead.common.arguments import Parser, whole_number, writable
from mlx_flashhead.common.command import command
from mlx_flashhead.models.install import dense_copy

# Of a panel: characters of a line; pixels of a character, of a line and of a margin.
COLUMNS = 46
CHARACTER = 7.8
LINE = 18
MARGIN = 16
# So long the animation waits before it begins again.
PAUSE_SECONDS = 4.0
COLORS = ("#8b949e", "#3fb950")


def picture(runs: tuple[Run, Run], caption: str) -> str:
    """An animated SVG of both runs, side by side."""
    total = max(run.seconds for run in runs) + PAUSE_SECONDS
    panel = COLUMNS * CHARACTER + 2 * MARGIN
    lines = max(len(wrapped(run)) for run in runs)
    width = 2 * panel + 3 * MARGIN
    height = (lines + 5) * LINE + 3 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" font-family="ui-monospace,Menlo,monospace" font-size="13">',
        '<rect width="100%" height="100%" rx="10" fill="#0d1117"/>',
    ]
    for column, run in enumerate(runs):
        x = MARGIN + column * (panel + MARGIN)
        parts += _panel(run, column, x, total, panel, height)
    parts.append(
        f'<text x="{2 * MARGIN}" y="{height - MARGIN:.0f}" fill="#8b949e" font-size="11">'
        f"{escape(caption)}</text></svg>"
    )
    return "\n".join(parts) + "\n"


def wrapped(run: Run) -> list[list[tuple[float, str]]]:
    """The lines of a panel, each of words with the time at which they are complete."""
    # The time of each character.
    times = [when for when, piece in run.pieces for _ in piece]
    lines: list[list[tuple[float, str]]] = [[]]
    for match in re.finditer(r"\n|\S+", run.text()):
        word = match[0]
        when = times[match.end() - 1]
        if word == "\n" or sum(len(text) + 1 for _, text in lines[-1]) + len(word) > COLUMNS:
            lines.append([])
        if word != "\n":
            lines[-1].append((when, word))
    return [line for line in lines if line]


def _panel(run: Run, column: int, x: float, total: float, width: float, height: float) -> list[str]:
    color = COLORS[column]
    left = x + MARGIN
    speed = f"{run.speed():.1f} tokens/s, {run.seconds:.1f} s"
    end = run.seconds / total
    full = width - 2 * MARGIN
    parts = [
        f'<rect x="{x:.0f}" y="{MARGIN}" width="{width:.0f}" height="{height - 4 * MARGIN:.0f}" '
        f'rx="8" fill="#161b22" stroke="{color}"/>',
        f'<text x="{left:.0f}" y="{MARGIN + 1.4 * LINE:.0f}" fill="{color}" font-weight="bold">'
        f"{escape(TITLES[column])}</text>",
        f'<text x="{x + width - MARGIN:.0f}" y="{MARGIN + 1.4 * LINE:.0f}" fill="{color}" '
        f'text-anchor="end">{speed}{_appears(end, total)}</text>',
        f'<rect x="{left:.0f}" y="{MARGIN + 2 * LINE:.0f}" height="3" rx="1.5" fill="{color}" '
        f'width="{full:.0f}"><animate attributeName="width" values="0;{full:.0f};{full:.0f}" '
        f'keyTimes="0;{end:.4f};1" dur="{total:.2f}s" repeatCount="indefinite"/></rect>',
    ]
    for number, line in enumerate(wrapped(run)):
        y = MARGIN + (3.4 + number) * LINE
        words = "".join(
            f"<tspan>{escape(word)} {_appears(when / total, total)}</tspan>" for when, word in line
        )
        parts.append(f'<text x="{left:.0f}" y="{y:.0f}" fill="#e6edf3">{words}</text>')
    return parts


def _appears(share: float, total: float) -> str:
    """The animation of a text that appears after a share of the time."""
    return (
        '<animate attributeName="fill-opacity" calcMode="discrete" values="0;1" '
        f'keyTimes="0;{share:.4f}" dur="{total:.2f}s" repeatCount="indefinite"/>'
    )


@command
def main() -> None:
    """Entry point."""
    parser = Parser(prog="scripts/record_demo.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, default=GEMMA3, help="default: %(default)s")
    parser.add_argument("--max-tokens", type=whole_number(2), default=100)
    output = {"type": writable, "default": "docs/demo.svg"}
    parser.add_argument("--output", **output, help="default: %(default)s")
    args = parser.parse_args()
    folder, model, tokenizer = load_demo(args.model)
    prompt = MODELS[args.model][1]
    models = dense_copy(model), model
    warm_up(models, tokenizer, prompt)
    runs = race(models, tokenizer, prompt, args.max_tokens)
    machine = f"{platform.machine()}, {platform.system()}"
    caption = f"{folder.name}, the same seed, recorded on {machine}: “{prompt} …”"
    Path(args.output).write_text(picture(runs, caption), encoding="utf-8")
    print(f"Wrote {args.output}: {runs[0].speed():.1f} and {runs[1].speed():.1f} tokens/s.")


if __name__ == "__main__":
    sys.exit(main())
