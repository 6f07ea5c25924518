"""Builds a real model and its FlashHead, and shows the dense and the FlashHead form side by side.

`scripts/demo.sh` runs this in a virtual environment of the checkout. Both forms have the same
weights at the same precision. Both generate greedily through mlx-lm, in turn, so that neither slows
the other down.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from fetch_model import fetch
from mlx_flashhead import FlashHead, get_flash_head, load, stream_generate
from mlx_flashhead.common.command import command
from mlx_flashhead.common.tables import new_table, percent
from mlx_flashhead.common.timing import in_turns, spread, timer
from mlx_flashhead.models.install import dense_copy
from mlx_flashhead.models.locate import find_head, recorded_hidden

MODELS = {  # name of scripts/fetch_model.py → folder, prompt
    "gemma3": (
        Path("models/Gemma-3-270M"),
        "The keeper of the lighthouse had never seen such a storm.",
    ),
    "smollm2": (Path("models/SmolLM2-135M-Instruct"), "Why is the sky blue?"),
}
TITLES = ("dense", "FlashHead")
HEAD_ROUNDS = 5  # times that each state goes through both heads


@dataclass
class Answer:
    """What a model has generated so far, and mlx-lm's measure of its speed."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    tokens_per_second: float = 0.0


def answers(model: nn.Module, tokenizer, prompt: list[int], max_tokens: int) -> Iterator[Answer]:
    """Generates greedily; yields the growing answer after each token."""
    answer = Answer()
    options = {"max_tokens": max_tokens, "logprobs": False}
    for response in stream_generate(model, tokenizer, prompt, **options):
        answer.text += response.text
        answer.tokens_per_second = response.generation_tps
        if response.finish_reason != "stop":
            answer.token_ids.append(response.token)
        yield answer


def compare(
    flash: nn.Module, tokenizer, prompt: str, *, max_tokens: int, runs: int, console: Console
) -> None:
    """Streams the answers of a model and of its dense form, then prints speed and agreement.

    Each form generates ``runs`` times, and the first time is shown.
    """
    dense = dense_copy(flash)
    models = (dense, flash)
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt_ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    else:  # a model that goes on with a text
        prompt_ids = tokenizer.encode(prompt)
    for model in models:  # warms up
        list(answers(model, tokenizer, prompt_ids, 2))

    console.print(Text.assemble(("\nPrompt: ", "bold"), prompt))
    last: list[Answer] = [Answer(), Answer()]
    speeds: tuple[list[float], list[float]] = ([], [])
    with _two_panels(console) as show:
        for column, model in enumerate(models):
            for last[column] in answers(model, tokenizer, prompt_ids, max_tokens):
                show(column, last[column].text)
            speeds[column].append(last[column].tokens_per_second)
    for _ in tqdm(range(runs - 1), desc="Timing", unit="run", leave=False):
        for column, model in enumerate(models):
            *_, answer = answers(model, tokenizer, prompt_ids, max_tokens)
            speeds[column].append(answer.tokens_per_second)

    dense_ids, flash_ids = (answer.token_ids for answer in last)
    states = captured_states(dense, prompt_ids, dense_ids)
    location, head = find_head(dense), get_flash_head(flash)
    heads = (getattr(location.module, location.method), head)
    timers = {
        title: timer(lambda number, head=head: head(states[None, number % len(states), None]))
        for title, head in zip(TITLES, heads, strict=True)
    }
    *_, seconds = in_turns(timers, HEAD_ROUNDS * len(states))
    console.print(_table(speeds, tuple(seconds.values())))
    console.print(_agreement(head, states, dense_ids, flash_ids), highlight=False)


def captured_states(model: nn.Module, prompt: list[int], token_ids: list[int]) -> mx.array:
    """States (L, D), captured at the head, from which the L tokens after the prompt were drawn."""
    with recorded_hidden(find_head(model)) as recorded:
        model(mx.array([[*prompt, *token_ids[:-1]]]))
    states = mx.contiguous(recorded[-1][0, len(prompt) - 1 :])
    mx.eval(states)
    return states


def _table(speeds: tuple[list[float], ...], seconds: tuple[list[float], ...]) -> Table:
    table = new_table("median (quartiles)", ("", *TITLES, "ratio"))
    of_speeds = [spread(values) for values in speeds]
    of_ms = [spread(values, 1000) for values in seconds]
    faster = of_speeds[1]["median"] / of_speeds[0]["median"]
    table.add_row("tokens/s", *map(_cell, of_speeds), f"{faster:.2f} x")
    faster = of_ms[0]["median"] / of_ms[1]["median"]
    table.add_row("ms/token in the head", *map(_cell, of_ms), f"{faster:.1f} x")
    shares = (s["median"] * v["median"] / 1000 for s, v in zip(of_ms, of_speeds, strict=True))
    table.add_row("the head's share", *(percent(share, 0) for share in shares), "")
    return table


def _cell(values: dict) -> str:
    return "{median:.2f} ({lower:.2f}–{upper:.2f})".format(**values)


def _agreement(
    head: FlashHead, states: mx.array, dense_ids: list[int], flash_ids: list[int]
) -> str:
    pairs = zip(dense_ids, flash_ids, strict=False)
    n_same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if dense_ids == flash_ids:
        texts = f"The two texts are the same, token for token ({n_same})."
    else:
        texts = f"The two texts are the same for {n_same} of {len(dense_ids)} tokens."
    proposed = head.propose(states, None).tokens.tolist()
    agreement = sum(map(int.__eq__, proposed, dense_ids)) / len(dense_ids)
    return (
        f"{texts}\nFlashHead scored {head.checked_probes:,} of {head.n_clusters:,} clusters per "
        f"token. {percent(agreement, 1)} of its proposals were right; the dense rows check them."
    )


@contextmanager
def _two_panels(console: Console) -> Iterator[Callable[[int, str], None]]:
    """Two panels whose texts grow; without a terminal, one text after the other."""
    texts = ["", ""]

    def print_more(column: int, text: str) -> None:
        if not texts[column]:
            console.print(f"\n[bold]{TITLES[column]}:[/]")
        console.out(text[len(texts[column]) :], end="", highlight=False)
        console.file.flush()
        texts[column] = text

    def panels() -> Columns:
        width = (console.width - 1) // 2
        return Columns(
            Panel(Text(text), title=title, width=width)
            for title, text in zip(TITLES, texts, strict=True)
        )

    if not console.is_terminal:
        yield print_more
        console.print("\n")
        return
    with Live(panels(), console=console, refresh_per_second=12) as live:

        def update(column: int, text: str) -> None:
            texts[column] = text
            live.update(panels())

        yield update


@command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="scripts/demo.sh", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model",
        choices=MODELS,
        default="gemma3",
        help="Gemma-3-270M goes on with a text; SmolLM2-135M, a smaller download, answers "
        "(default: %(default)s)",
    )
    parser.add_argument("--prompt", help="what to ask, or the beginning of a text")
    parser.add_argument(
        "--max-tokens", type=int, default=100, help="longest answer (default: %(default)s)"
    )
    parser.add_argument("--runs", type=int, default=3, help="timed runs (default: %(default)s)")
    args = parser.parse_args()
    if args.max_tokens < 2 or args.runs < 1:
        parser.error("--max-tokens must be 2 or more, and --runs 1 or more")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("--prompt is empty: ask something")

    folder, prompt = MODELS[args.model]
    fetch(args.model, folder)
    # its FlashHead is built at the first use, and found where it is kept at the second
    flash, tokenizer = load(str(folder))
    compare(
        flash,
        tokenizer,
        args.prompt or prompt,
        max_tokens=args.max_tokens,
        runs=args.runs,
        console=Console(),
    )


if __name__ == "__main__":
    sys.exit(main())
