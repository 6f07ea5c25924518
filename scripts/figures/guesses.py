"""Tokens a step where prompt lookup guesses them, on real models: docs/speed.md.

    python scripts/figures/guesses.py models/smollm2 models/gemma3 models/qwen2 --json guesses.json

Each model answers the tasks of guess_tasks.toml by mlx-lm, greedily and at a temperature. A text is
the same whatever is guessed, so each is written once, and its steps follow from its tokens: where a
step begins, the lookup is asked with what is known by then, and those of its tokens that the text
has are accepted. What a step costs is the estimate of wide_times.py for one model and one chip. The
texts stay in the work folder, and a second run begins with them.
"""

import json
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm import batch_generate
from mlx_lm.sample_utils import make_sampler

from mlx_flashhead.benchmark import add_number
from mlx_flashhead.benchmarks.reporting import machine
from mlx_flashhead.common.arguments import Parser, picture, writable
from mlx_flashhead.common.command import command
from mlx_flashhead.common.tables import new_table, percent, show
from mlx_flashhead.decoding.guessing.depth import Budget, Costs, Known, best_width
from mlx_flashhead.decoding.guessing.lookup import Lookup, chances_behind, shares_by_length
from mlx_flashhead.models.cpu_products import numpy_products
from mlx_flashhead.models.loading import load_dense
from mlx_flashhead.models.templates import prompt_of
from mlx_flashhead.wide.step import MAX_WIDTH
from pages import CHECKOUT, line, with_block
from wide_times import WIDTHS, cost

TASKS = Path(__file__).with_name("guess_tasks.toml")
TEMPERATURES = (0.0, 0.7)
# The accepted guesses of this width are shown.
ACCEPTED_AT = 4
# The costs of this model on this chip say where a guess pays.
PAYING = "gemma-3-4b", "m4"
PAGE = CHECKOUT / "docs" / "speed.md"
WORK = Path(tempfile.gettempdir()) / "mlx-flashhead-guesses"


class Replay(NamedTuple):
    """The steps of a text behind its first token, which the prompt's own step gives.

    Attributes:
        wide: The numbers of steps of several tokens, by their width.
    """

    tokens: int
    steps: int
    wide: dict[int, int]
    guessed: int
    accepted: int

    @property
    def tokens_a_step(self) -> float:
        """The tokens of the text for each step."""
        return self.tokens / self.steps

    def gain(self, costs: Mapping[int, float]) -> float:
        """How many times as fast the text is as by single steps, which cost 1 each."""
        single = self.steps - sum(self.wide.values())
        return self.tokens / (single + sum(n * costs[width] for width, n in self.wide.items()))


class Always:
    """Guesses wherever something is found, as `lookup="on"` does.

    Args:
        width: The tokens of a wide step.
    """

    def __init__(self, width: int):
        self._width = width

    def width(self, length: int, n_unknown: int) -> int:
        """The tokens of a step where an n-gram of this length was found."""
        return self._width

    def note(self, length: int, n_right: int, wrong: bool) -> None:
        """Learns nothing of a guess."""

    def step(self, width: int, n_right: int) -> None:
        """Learns nothing of a step."""


class WherePaid:
    """Guesses where that is worth its time, as `lookup="auto"` does.

    Args:
        costs: The time of a wide step by its tokens, relative to a single one.
    """

    def __init__(self, costs: Mapping[int, float]):
        self._costs = Costs(costs)
        self._shares = shares_by_length()
        self._budget = Budget(Known())

    def width(self, length: int, n_unknown: int) -> int:
        """The tokens of a step where an n-gram of this length was found."""
        chances = chances_behind(self._shares[length].chances, n_unknown)
        return best_width(chances, self._budget.affordable(self._costs))

    def note(self, length: int, n_right: int, wrong: bool) -> None:
        """Notes how many tokens of a guess were right, and whether the next one was wrong."""
        self._shares[length].note(n_right + wrong, n_right)

    def step(self, width: int, n_right: int) -> None:
        """Notes a step, and how many of its guesses were right."""
        self._budget.note(width, self._costs, n_right)


def replay(prompt: Sequence[int], answer: Sequence[int], policy: Always | WherePaid) -> Replay:
    """Counts the steps of a text.

    A step is launched while the single one before it is computed, so that its latest token is not
    known yet. What follows a wide step waits for its tokens.

    Args:
        prompt: The tokens before the text.
        answer: The text's tokens, two or more.
        policy: How wide a step is.
    """
    lookup = Lookup(prompt)
    wide: Counter[int] = Counter()
    steps = guessed = accepted = 0
    # So many tokens of the answer are in the lookup.
    n_known = 0
    # The place of the token that the next step chooses.
    place = 1
    # So many tokens before that are not in the lookup yet.
    n_unknown = 1
    # What was not guessed has a length, a place and a token.
    watched: tuple[int, int, int] | None = None
    while place < len(answer):
        lookup.extend(answer[n_known : place - n_unknown])
        n_known = place - n_unknown
        if watched is not None and watched[1] < n_known:
            right = answer[watched[1]] == watched[2]
            policy.note(watched[0], int(right), not right)
            watched = None
        length, found = lookup.find(MAX_WIDTH)
        width = 1
        if length:
            width = policy.width(length, n_unknown)
        guess = found[n_unknown:][: width - 1]
        pairs = zip(guess, answer[place:], strict=False)
        n_right = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        steps += 1
        policy.step(len(guess) + 1, n_right)
        # The step's own choice follows what was right.
        place += n_right + 1
        guessed += len(guess)
        accepted += n_right
        if guess:
            wide[width] += 1
            policy.note(length, n_right, n_right < len(guess))
        elif length:
            watched = length, n_known, found[0]
        n_unknown = 1
        if guess:
            n_unknown = 0
    return Replay(len(answer) - 1, steps, dict(wide), guessed, accepted)


def tasks() -> list[dict[str, str]]:
    """The tasks, each with its name, its kind and what is asked."""
    return tomllib.loads(TASKS.read_text(encoding="utf-8"))["tasks"]


def texts_of(folder: Path, args: Any) -> list[dict]:
    """The prompts and answers of a model, written once."""
    file = args.work / f"{folder.name}-{args.tokens}.json"
    if not file.exists():
        model, tokenizer, _ = load_dense(folder)
        texts = []
        for temperature in TEMPERATURES:
            texts += write(model, tokenizer, temperature, args.tokens)
            print(f"{folder.name}: answered at temperature {temperature}", file=sys.stderr)
        file.write_text(json.dumps(texts, indent=1) + "\n")
    return json.loads(file.read_text())


def write(model, tokenizer, temperature: float, n_tokens: int) -> list[dict]:
    """Answers all tasks, together, by mlx-lm."""
    prompts = []
    for task in tasks():
        request = task["request"].strip()
        if not tokenizer.has_chat_template:
            request += "\n" + task["before"]
        prompts.append(prompt_of(tokenizer, request))
    mx.random.seed(0)
    sampler = make_sampler(temp=temperature)
    with numpy_products(model):
        answers = batch_generate(
            model,
            tokenizer,
            prompts,
            max_tokens=n_tokens,
            sampler=sampler,
            return_token_ids=True,
        ).token_ids
    return [
        {
            "temperature": temperature,
            "task": task["name"],
            "kind": task["kind"],
            "prompt": prompt,
            "answer": list(answer),
            "text": tokenizer.decode(answer),
        }
        for task, prompt, answer in zip(tasks(), prompts, answers, strict=True)
    ]


def counted(model: str, text: dict) -> dict:
    """The figures of a text, JSON-ready."""
    of = text["prompt"], text["answer"]
    widths = {}
    for width in WIDTHS:
        steps = replay(*of, Always(width))
        widths[str(width)] = steps._asdict() | {"tokens_a_step": steps.tokens_a_step}
        widths[str(width)]["wide"] = sum(steps.wide.values())
    costs = costs_of(*PAYING)
    paying = replay(*of, WherePaid(costs))
    about = {key: text[key] for key in ("temperature", "task", "kind")}
    gain = {"tokens_a_step": paying.tokens_a_step, "gain": paying.gain(costs)}
    return {"model": model, **about, "widths": widths, "where_paid": gain}


def costs_of(model: str, chip: str) -> dict[int, float]:
    """The estimated time of a wide step by its tokens, with a head of 4 bits."""
    return {width: cost(model, chip, 4, width) for width in WIDTHS}


def tokens_a_step(case: dict) -> Iterator[str]:
    """The tokens a step of each width."""
    for width in WIDTHS:
        yield f"{case['widths'][str(width)]['tokens_a_step']:.2f}"


def share_accepted(case: dict) -> str:
    """The share of the guesses that were accepted."""
    of = case["widths"][str(ACCEPTED_AT)]
    if of["guessed"]:
        return percent(of["accepted"] / of["guessed"], 0)
    return "no guess"


def make_table(cases: list[dict]):
    """A line for each text."""
    widths = (f"T = {width}" for width in WIDTHS)
    headings = ("model", "temperature", "task", *widths, "accepted", "gain where it pays")
    caption = (
        f"accepted: of the guesses at T = {ACCEPTED_AT}; gain: by the costs of {', '.join(PAYING)}"
    )
    table = new_table("Tokens a step by prompt lookup", headings, caption, left=3)
    for case in cases:
        about = case["model"], f"{case['temperature']}", case["task"]
        gain = f"{case['where_paid']['gain']:.2f}"
        table.add_row(*about, *tokens_a_step(case), share_accepted(case), gain)
    return table


def page_lines(cases: list[dict]) -> Iterator[str]:
    """Markdown: a line for each task, for each model the tokens a step, greedy and sampled."""
    by_case = {(case["task"], case["model"], case["temperature"]): case for case in cases}
    columns = list(dict.fromkeys(key[1:] for key in by_case))
    titles = []
    for model, heat in columns:
        draw = "greedy"
        if heat:
            draw = f"{heat:g}"
        titles.append(f"{model}, {draw}")
    yield line("task", *titles)
    yield line("---", *("---" for _ in columns))
    for task in dict.fromkeys(case["task"] for case in cases):
        found = (by_case[task, *column] for column in columns)
        yield line(task, *(" / ".join(tokens_a_step(case)) for case in found))


def plot(cases: list[dict], path: str) -> None:
    """Draws the tokens a step of each task, the mean of its greedy and its sampled text."""
    # It may be absent.
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(case["model"] for case in cases))
    names = [task["name"] for task in tasks()]
    figure = Figure(figsize=(9, 1.2 + 0.34 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(models), sharex=True, sharey=True, squeeze=False)[0]
    for axis, model in zip(axes, models, strict=True):
        for number, width in enumerate(WIDTHS):
            means = [mean_of(cases, model, name, width) for name in names]
            places = [place + 0.27 * (number - 1) for place in range(len(names))]
            axis.barh(places, means, height=0.25, label=f"up to {width} tokens a step")
        axis.set(title=model, xlabel="tokens a step", xlim=(1, max(WIDTHS)))
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    axes[-1].legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=110)


def mean_of(cases: list[dict], model: str, task: str, width: int) -> float:
    """The tokens for each step of a task's texts together."""
    found = [c["widths"][str(width)] for c in cases if (c["model"], c["task"]) == (model, task)]
    return sum(of["tokens"] for of in found) / sum(of["steps"] for of in found)


@command
def main() -> None:
    """Entry point."""
    parser = Parser(prog="scripts/figures/guesses.py", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path, help="folders of models in float32")
    parser.add_argument("--json", type=writable, metavar="FILE", help="where to write the figures")
    parser.add_argument("--plot", type=picture, metavar="FILE.png", help="draw the figures")
    parser.add_argument("--work", type=Path, default=WORK, help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    add_number(parser, "--tokens", 200, "Tokens of an answer at most")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    cases = []
    for folder in args.models:
        cases += [counted(folder.name, text) for text in texts_of(folder, args)]
    if args.json:
        about = {"kind": "guesses", "machine": machine(), "command": " ".join(sys.argv)}
        about["costs"] = {", ".join(PAYING): costs_of(*PAYING)}
        Path(args.json).write_text(json.dumps(about | {"cases": cases}, indent=1) + "\n")
    if args.plot:
        plot(cases, args.plot)
    show(make_table(cases))
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_block(page, "guesses", list(page_lines(cases))), encoding="utf-8")


if __name__ == "__main__":
    main()
