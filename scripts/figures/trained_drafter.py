#!/usr/bin/env python3
"""Trains a drafter of Qwen3.5's MTP form for a small model, and measures it: docs/drafts.md.

    mlx_flashhead.convert --model models/SmolLM2-135M-Instruct --mlx-path models/smollm2-flashhead
    OPENBLAS_NUM_THREADS=1 LD_PRELOAD=libopenblas.so.0 python scripts/figures/trained_drafter.py \
        models/smollm2-flashhead --json trained_drafter.json

The drafter is mlx-vlm's `qwen3_5_mtp`: a projection of the next token's embedding and the target's
hidden state, one transformer layer, and the target's own head. The target invents requests and
answers them, greedily and at a temperature, and the drafter learns the target's distributions from
its states, three tokens deep. Then the target answers the requests of requests.txt. Under its own
tokens each state says how many drafts in a row the target would accept, by the dense head and by
the few clusters of FlashHead that score a draft. Draft and target draw with the same noise.

MLX's own products are slow on a CPU, hence OpenBLAS. What is written and trained stays in the work
folder, and a second run begins with it; the drafter there is one that mlx-vlm loads. Needs the
extra ``vlm``.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_vlm.speculative.drafters.qwen3_5_mtp import Qwen3_5MTPDraftModel
from tqdm import tqdm

from drafted_target import Target, Text
from drafter_training import DEPTHS, READ_TEXTS, chain, lessons_of, new_drafter, save, train
from drafts import REQUESTS, few_logits, latest_tokens
from mlx_flashhead import make_sampler
from mlx_flashhead.benchmark import add_number
from mlx_flashhead.benchmarks.reporting import machine
from mlx_flashhead.common.arguments import Parser, writable
from mlx_flashhead.common.command import command
from mlx_flashhead.common.tables import new_table, percent, show
from mlx_flashhead.decoding.policy import policy_of
from mlx_flashhead.head.draws.draw import Draws
from mlx_flashhead.head.draws.noise import position_key
from mlx_flashhead.models.templates import prompt_of
from mlx_flashhead.wide.step import WIDTHS
from pages import CHECKOUT, line, with_block

HEATS = (0.0, 0.7)
# The page shows these. Deeper ones were seldom reached.
SHOWN_DEPTHS = 4
DENSE = "dense head"
PAGE = CHECKOUT / "docs" / "speed.md"
WORK = Path(tempfile.gettempdir()) / "mlx-flashhead-trained-drafter"


def trained(target: Target, args: Any) -> tuple[Qwen3_5MTPDraftModel, dict[str, Any]]:
    """The drafter in the work folder, or a new one; and what is known of its training."""
    name = f"{args.texts}-{args.tokens}-{args.steps}-{args.seed}"
    folder = args.work / name
    about = folder / "training.json"
    if not about.exists():
        began = time.process_time()
        requests = target.requests(args.texts, args.seed)
        prompts = [prompt_of(target.tokenizer, request) for request in requests]
        half = len(prompts) // 2
        texts = target.write(prompts[:half], HEATS[0], args.tokens, args.seed)
        texts += target.write(prompts[half:], HEATS[1], args.tokens, args.seed + half)
        lessons = lessons_of(target, [text for text in texts if len(text.answer) > DEPTHS])
        drafter, losses = train(target, lessons, args.steps, args.seed)
        n_weights: int = sum(array.size for _, array in tree_flatten(drafter.parameters()))
        known = {
            "texts": len(lessons),
            "answer_tokens": sum(len(of.tokens) - of.n_prompt for of in lessons),
            "steps": args.steps,
            "texts_a_step": READ_TEXTS,
            "weights": n_weights,
            "losses": losses,
            "cpu_seconds": round(time.process_time() - began),
        }
        save(drafter, folder)
        about.write_text(json.dumps(known, indent=1) + "\n")
    drafter = new_drafter(target)
    drafter.load_weights(str(folder / "model.safetensors"))
    return drafter, json.loads(about.read_text())


def runs_of(
    target: Target, drafter: Qwen3_5MTPDraftModel, text: Text, n_probes: int
) -> dict[str, np.ndarray]:
    """How many drafts in a row are right behind each token of an answer but the last.

    Returns:
        For each way to score drafts (n - 1,), at most DEPTHS.
    """
    tokens = [*text.prompt, *text.answer]
    states = target.states(tokens[:-1])
    known = mx.array([[*tokens, *(0 for _ in range(DEPTHS))]])
    embeddings = target.embed(known).astype(mx.float32)
    # The state of this place chose the answer's first token.
    first = len(text.prompt) - 1
    n_rows = len(text.answer) - 1
    right: dict[str, list[np.ndarray]] = {}
    drafted = chain(drafter, embeddings[:, : len(states) + DEPTHS], states[None], DEPTHS)
    for depth, hidden in enumerate(drafted, 1):
        drafts = hidden[0, first : first + n_rows]
        # They guess these tokens.
        of_answer = np.arange(depth, depth + n_rows)
        wanted = np.pad(text.answer, (0, DEPTHS), constant_values=-1)[of_answer]
        keys = [position_key(text.seed, int(place)) for place in of_answer]
        draw = make_sampler(temp=text.heat).settings
        exact = drafts @ target.rows.T
        latest = latest_tokens(tokens, first + 2, n_rows, exact.shape[1])
        few = mx.where(mx.array(latest), exact, few_logits(target.head, drafts, exact, n_probes))
        for way, logits in ((DENSE, exact), (few_name(target, n_probes), few)):
            chosen = Draws.of([(draw, key) for key in keys]).choose(logits)
            right.setdefault(way, []).append(np.array(chosen) == wanted)
    return {way: np.cumprod(deep, axis=0).sum(axis=0) for way, deep in right.items()}


def few_name(target: Target, n_probes: int) -> str:
    """How FlashHead scores drafts, in words."""
    return f"FlashHead, {n_probes} of {target.head.n_clusters:,} clusters"


def figures_of(runs: list[np.ndarray]) -> dict[str, Any]:
    """Shares of each depth, and tokens a step, of the runs of some texts."""
    tried = [0 for _ in range(DEPTHS)]
    right = [0 for _ in range(DEPTHS)]
    for run in runs:
        for place, length in enumerate(run.tolist()):
            # So many tokens of the text may be guessed.
            left = len(run) - place
            for depth in range(min(length + 1, DEPTHS, left)):
                tried[depth] += 1
                if depth < length:
                    right[depth] += 1
    shares = []
    for n_right, n_tried in zip(right, tried, strict=True):
        share = None
        if n_tried:
            share = round(n_right / n_tried, 4)
        shares.append(share)
    by_width = {}
    for width in WIDTHS:
        n_steps = sum(len(steps_of(run, width)) for run in runs)
        by_width[str(width)] = round(sum(map(len, runs)) / n_steps, 4)
    return {"right": right, "tried": tried, "shares": shares, "tokens_a_step": by_width}


def steps_of(run: np.ndarray, width: int) -> list[int]:
    """The drafts that are accepted in each step of a text, all of one width."""
    place = 0
    accepted = []
    while place < len(run):
        accepted.append(min(int(run[place]), width - 1))
        place += accepted[-1] + 1
    return accepted


def measured(target: Target, drafter: Qwen3_5MTPDraftModel, args: Any) -> dict[str, Any]:
    """The figures of answers to requests that the drafter has not seen."""
    n_probes = policy_of(target.head).draft_probes
    lines = REQUESTS.read_text(encoding="utf-8").splitlines()
    every = max(1, len(lines) // args.requests)
    prompts = [prompt_of(target.tokenizer, line) for line in lines[::every][: args.requests]]
    figures = {}
    for heat in HEATS:
        texts = target.write(prompts, heat, args.tokens, args.seed)
        texts = [text for text in texts if len(text.answer) > 1]
        runs: dict[str, list[np.ndarray]] = {}
        for text in tqdm(texts, desc=f"Drafting at {heat:g}"):
            for way, run in runs_of(target, drafter, text, n_probes).items():
                runs.setdefault(way, []).append(run)
        dense, few = (figures_of(of) for of in runs.values())
        pairs = zip(few["tokens_a_step"].items(), dense["tokens_a_step"].values(), strict=True)
        kept = {width: round((a - 1) / (b - 1), 4) for (width, a), b in pairs}
        names = list(runs)
        kind = f"{heat:g}"
        if heat == 0:
            kind = "greedy"
        figures[kind] = {
            names[0]: dense | {"runs": traces(runs[names[0]])},
            names[1]: few | {"kept_accepted": kept, "runs": traces(runs[names[1]])},
        }
    return figures


def traces(runs: list[np.ndarray]) -> list[str]:
    """The runs of each text, a digit for each of its tokens but the last."""
    return ["".join(map(str, run.tolist())) for run in runs]


def make_table(figures: dict[str, Any]):
    """A line for each temperature and way."""
    depths = (f"{depth}" for depth in range(1, DEPTHS + 1))
    widths = (f"T = {width}" for width in WIDTHS)
    table = new_table("A trained drafter", ("text", "drafts by", *depths, *widths), left=2)
    for text, ways in figures.items():
        for way, of in ways.items():
            shares = []
            for share in of["shares"]:
                cell = "–"
                if share is not None:
                    cell = percent(share, 0)
                shares.append(cell)
            table.add_row(text, way, *shares, *(f"{n:.2f}" for n in of["tokens_a_step"].values()))
    return table


def page_lines(figures: dict[str, Any]) -> list[str]:
    """Markdown: a line for each temperature and way."""
    depths = (f"draft {depth}" for depth in range(1, SHOWN_DEPTHS + 1))
    titles = ("text", "drafts are scored by", *depths, *(f"T = {width}" for width in WIDTHS))
    lines = [line(*titles), line(*("---" for _ in titles))]
    for text, ways in figures.items():
        for way, of in ways.items():
            shares = (percent(share, 0) for share in of["shares"][:SHOWN_DEPTHS])
            steps = (f"{number:.2f}" for number in of["tokens_a_step"].values())
            lines.append(line(text, way, *shares, *steps))
    return lines


@command
def main() -> None:
    """Entry point."""
    description = __doc__.split("\n")[0]
    parser = Parser(prog="scripts/figures/trained_drafter.py", description=description)
    parser.add_argument("target", help="a folder in float32, with its FlashHead")
    parser.add_argument("--json", type=writable, metavar="FILE", help="where to write the figures")
    parser.add_argument("--work", type=Path, default=WORK, help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    add_number(parser, "--texts", 256, "Answers to train on.")
    add_number(parser, "--tokens", 112, "Tokens of an answer at most.")
    add_number(parser, "--steps", 280, "Steps of the training.")
    add_number(parser, "--requests", 38, "Answers of each temperature to measure on.")
    add_number(parser, "--seed", 1, "Of the texts and the training.")
    args = parser.parse_args()
    # On a CPU mx.compile takes a C++ compiler for each formula.
    mx.disable_compile()
    args.work.mkdir(parents=True, exist_ok=True)
    target = Target(args.target)
    drafter, training = trained(target, args)
    figures = measured(target, drafter, args)
    show(make_table(figures))
    if args.json:
        about = {"kind": "trained drafter", "machine": machine(), "command": " ".join(sys.argv)}
        about |= {"target": Path(args.target).name, "training": training}
        Path(args.json).write_text(json.dumps(about | {"figures": figures}, indent=1) + "\n")
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(with_block(page, "trained drafter", page_lines(figures)), encoding="utf-8")


if __name__ == "__main__":
    main()
