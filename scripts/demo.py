"""Builds a real model and its FlashHead, and lets the normal (dense) head and FlashHead race.

`scripts/demo.sh` runs this in the checkout's virtual environment. Both forms have the same weights
and the same seed, so they write the same text. The dense form writes first. Then FlashHead writes,
and beside it the dense text appears again at the times at which it was written: a race that neither
slows down. Each clock stops when its text is complete.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from statistics import median

import mlx.nn as nn
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from fetch_model import fetch
from mlx_flashhead import get_flash_head, load, make_sampler, stream_generate
from mlx_flashhead.common.arguments import Parser, whole_number
from mlx_flashhead.common.bars import Bar
from mlx_flashhead.common.command import command
from mlx_flashhead.common.tables import new_table
from mlx_flashhead.decoding.policy import policy_of
from mlx_flashhead.models.install import dense_copy

SMOLLM2 = "smollm2"
GEMMA3 = "gemma3"
# By the names of scripts/fetch_model.py: a model's folder and its prompt.
MODELS = {
    GEMMA3: (
        Path("models/Gemma-3-270M"),
        "The keeper of the lighthouse had never seen such a storm.",
    ),
    SMOLLM2: (Path("models/SmolLM2-135M-Instruct"), "Why is the sky blue?"),
}
TITLES = ("normal (dense) head", "FlashHead")
SAMPLING = {"temp": 0.7, "top_p": 0.9, "seed": 1}
# After so long a busy machine's dense form stops, and so does the other.
RACE_SECONDS = 40.0
# All rounds that are timed after the race take so long.
TIMING_SECONDS = 60.0
# Each head writes so many before the race.
WARM_TOKENS = 4
# So long one picture of the race is shown.
FRAME_SECONDS = 0.08


@dataclass
class Run:
    """A text as it was written: its pieces, each with the seconds since the first token."""

    pieces: list[tuple[float, str]] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the first token to the last."""
        if self.pieces:
            return self.pieces[-1][0]
        return 0.0

    def text(self, seconds: float = math.inf) -> str:
        """What had been written after some seconds."""
        return "".join(piece for when, piece in self.pieces if when <= seconds)

    def speed(self, seconds: float = math.inf) -> float:
        """Tokens per second, without the prompt."""
        n = sum(when <= seconds for when, _ in self.pieces)
        last = min(seconds, self.seconds)
        if n > 1 and last > 0:
            return (n - 1) / last
        return 0.0


def write(
    model: nn.Module, tokenizer, prompt: list[int], max_tokens: int, run: Run
) -> Iterator[None]:
    """Writes a text into ``run``; yields after each token."""
    sampler = make_sampler(**SAMPLING)
    began = None
    for response in stream_generate(
        model, tokenizer, prompt, max_tokens=max_tokens, sampler=sampler, logprobs=False
    ):
        now = time.perf_counter()
        began = began or now
        run.pieces.append((now - began, response.text))
        run.token_ids.append(response.token)
        yield


def race(
    models: tuple[nn.Module, nn.Module],
    tokenizer,
    prompt: str,
    max_tokens: int,
    show: Callable[[tuple[Run, Run], float | None], None] = lambda runs, seconds: None,
) -> tuple[Run, Run]:
    """Writes a text with the dense model, then with FlashHead.

    ``show`` gets both runs, and the second one's time.
    """
    prompt_ids = encode(tokenizer, prompt)
    runs = Run(), Run()
    for _ in write(models[0], tokenizer, prompt_ids, max_tokens, runs[0]):
        show(runs, None)
        if runs[0].seconds > RACE_SECONDS:
            break
    for _ in write(models[1], tokenizer, prompt_ids, len(runs[0].token_ids), runs[1]):
        show(runs, runs[1].seconds)
    return runs


def warm_up(models: tuple[nn.Module, nn.Module], tokenizer, prompt: str) -> None:
    """Lets both heads write some tokens, after which neither is slower for being the first."""
    prompt_ids = encode(tokenizer, prompt)
    with Bar("Warming up both heads", 2 * WARM_TOKENS, leave=False) as bar:
        for model in models:
            for _ in write(model, tokenizer, prompt_ids, WARM_TOKENS, Run()):
                bar.update()


def let_the_slower_finish(
    runs: tuple[Run, Run], show: Callable[[tuple[Run, Run], float | None], None]
) -> None:
    """After FlashHead's last token the dense text goes on, at the times at which it was written."""
    began = time.perf_counter()
    seconds = runs[1].seconds
    while seconds < runs[0].seconds:
        show(runs, seconds)
        time.sleep(FRAME_SECONDS)
        seconds = runs[1].seconds + time.perf_counter() - began
    show(runs, math.inf)


def encode(tokenizer, prompt: str) -> list[int]:
    """The prompt's tokens: a question by the chat template, else a text that goes on."""
    if not tokenizer.has_chat_template:
        return tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def compare(
    model: nn.Module, tokenizer, prompt: str, *, max_tokens: int, rounds: int, console: Console
) -> None:
    """Shows the race, times more rounds, and prints the speeds and whether the texts agree."""
    models = dense_copy(model), model
    console.print(Text.assemble(("\nPrompt: ", "bold"), prompt))
    warm_up(models, tokenizer, prompt)
    with _panels(console) as show:
        runs = race(models, tokenizer, prompt, max_tokens, show)
        if console.is_terminal:
            let_the_slower_finish(runs, show)
    took = sum(run.seconds for run in runs)
    rounds = min(rounds, int(TIMING_SECONDS / max(took, 0.1)))
    speeds = _time_again(models, tokenizer, encode(tokenizer, prompt), runs, rounds)
    console.print(_table(runs, speeds))
    console.print(_agreement(get_flash_head(model), *runs), highlight=False)


def _time_again(
    models: tuple[nn.Module, nn.Module], tokenizer, prompt_ids, runs: tuple[Run, Run], rounds: int
) -> list[list[float]]:
    """The speeds of both forms: of the race, and of more rounds in turns."""
    speeds = [[run.speed()] for run in runs]
    if not rounds:
        return speeds
    n_tokens = len(runs[0].token_ids)
    with Bar("Timing both again, in turns", 2 * rounds * n_tokens, leave=False) as bar:
        for _ in range(rounds):
            for column, form in enumerate(models):
                again = Run()
                for _ in write(form, tokenizer, prompt_ids, n_tokens, again):
                    bar.update()
                speeds[column].append(again.speed())
    return speeds


def _table(runs: tuple[Run, Run], speeds: list[list[float]]):
    """The seconds of the race and the median speeds, as a table."""
    n_runs = len(speeds[0])
    if n_runs == 1:
        title = None
    else:
        title = f"speed: median of {n_runs} runs"
    table = new_table(title, ("", *TITLES, "faster"))
    seconds = [run.seconds for run in runs]
    medians = [median(values) for values in speeds]
    times = f"{seconds[0] / max(seconds[1], 1e-9):.2f} x"
    table.add_row("seconds for this text", *(f"{value:.1f}" for value in seconds), times)
    times = f"{medians[1] / medians[0]:.2f} x"
    table.add_row("tokens per second", *(f"{value:.1f}" for value in medians), times)
    return table


def _agreement(head, dense: Run, flash: Run) -> str:
    pairs = zip(dense.token_ids, flash.token_ids, strict=False)
    n_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    whole = dense.token_ids == flash.token_ids
    if whole:
        same = "the same, token for token"
    else:
        same = f"the same for {n_same} tokens"
    return (
        f"The two texts are {same} ({len(dense.token_ids)} tokens). FlashHead scored "
        f"{head.n_probes:,} of {head.n_clusters:,} clusters for each proposal and verified every "
        "token with all rows."
    )


@contextmanager
def _panels(console: Console) -> Iterator[Callable[..., None]]:
    """Two panels whose texts grow, each with its speed.

    Without a terminal the texts follow each other.
    """
    if not console.is_terminal:
        shown = [0, 0]

        def print_more(runs: tuple[Run, Run], seconds: float | None) -> None:
            column = int(seconds is not None)
            if not shown[column]:
                console.print(f"\n[bold]{TITLES[column]}:[/]")
            text = runs[column].text()
            console.out(text[shown[column] :], end="", highlight=False)
            console.file.flush()
            shown[column] = len(text)

        yield print_more
        console.print("\n")
        return

    with Live(console=console, auto_refresh=False) as live:
        drawn = 0.0
        last: list = []

        def update(runs: tuple[Run, Run], seconds: float | None) -> None:
            nonlocal drawn
            if time.perf_counter() - drawn > FRAME_SECONDS:
                live.update(picture_of_race(runs, seconds, console.width), refresh=True)
                drawn = time.perf_counter()
            last[:] = runs, seconds

        yield update
        live.update(picture_of_race(*last, console.width), refresh=True)


def picture_of_race(runs: tuple[Run, Run], seconds: float | None, columns: int) -> Columns:
    """Both texts after some seconds, side by side; without seconds while the dense one is written.

    A text that is complete has its own time, whatever the clock of the race says.
    """
    clocks = (seconds, seconds)
    if seconds is None:
        clocks = (math.inf, 0.0)
    width = (columns - 1) // 2
    height = max(8, 3 + len(runs[0].text()) // max(1, width - 6))
    return Columns(
        Panel(
            Text(run.text(clock)),
            title=title,
            subtitle=_subtitle(run, clock, is_complete=seconds is not None),
            width=width,
            height=height,
        )
        for title, run, clock in zip(TITLES, runs, clocks, strict=True)
    )


def _subtitle(run: Run, clock: float, *, is_complete: bool) -> str:
    """The time and the speed of a text; the time is the end's when its last token is shown."""
    figures = f"{min(clock, run.seconds):.1f} s, {run.speed(clock):.1f} tokens/s"
    if is_complete and clock > run.seconds:
        return f"done in {figures}"
    return figures


def make_parser() -> Parser:
    """The arguments."""
    parser = Parser(prog="scripts/demo.sh", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model",
        choices=MODELS,
        default=GEMMA3,
        help="Gemma-3-270M continues a text; SmolLM2-135M, a smaller download, answers "
        "(default: %(default)s).",
    )
    parser.add_argument("--prompt", type=_prompt, help="A question, or the beginning of a text.")
    for flag, low, default, about in (
        ("--max-tokens", 2, 100, "Longest text"),
        ("--rounds", 0, 2, "Rounds that are timed after the race, fewer on a busy machine"),
    ):
        about += " (default: %(default)s)."
        parser.add_argument(flag, type=whole_number(low), default=default, help=about)
    return parser


def _prompt(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give a text")
    return text


def load_demo(name: str) -> tuple[Path, nn.Module, object]:
    """A model of `MODELS` with its FlashHead; both are made at the first use."""
    folder = MODELS[name][0]
    fetch(name, folder)
    print("Loading the model …", flush=True)
    model, tokenizer = load(str(folder))
    # a race shows what FlashHead does, also where this machine would leave it out
    policy_of(get_flash_head(model)).dense = False
    return folder, model, tokenizer


@command
def main() -> None:
    """Entry point."""
    args = make_parser().parse_args()
    folder, model, tokenizer = load_demo(args.model)
    compare(
        model,
        tokenizer,
        args.prompt or MODELS[args.model][1],
        max_tokens=args.max_tokens,
        rounds=args.rounds,
        console=Console(),
    )
    programs = os.path.relpath(Path(sys.executable).parent)
    print("\nNow try:")
    print(f'  {programs}/mlx_flashhead.generate --model {folder} --temp 0.8 --prompt "The moon"')
    print(f"  {programs}/mlx_flashhead.chat --model mlx-community/gemma-3-1b-it-4bit")


if __name__ == "__main__":
    sys.exit(main())
