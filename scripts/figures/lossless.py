#!/usr/bin/env python3
"""Figures of docs/speed.md: texts with the check against dense ones, and the speed of both.

    python scripts/figures/lossless.py MODEL --json lossless.json

Every text is generated densely and with the check, with the same seed. The speed is measured in
turns: dense, the FlashHead alone, and with the check.
"""

import argparse
import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import mlx.core as mx
from tqdm import tqdm

from mlx_flashhead import get_flash_head, grammar_processor, load, make_sampler, stream_generate
from mlx_flashhead.common.command import command
from mlx_flashhead.common.timing import in_turns
from mlx_flashhead.evaluation.answers import usual_requests
from mlx_flashhead.lossless.verify import Check
from mlx_flashhead.models.compat.mlx_lm import make_logits_processors
from mlx_flashhead.models.tokenizers import prompt_of

SETTINGS = {
    "greedy": {},
    "temperature 1": {"temp": 1.0},
    "0.8, top-p 0.95": {"temp": 0.8, "top_p": 0.95},
    "0.7, min-p 0.05": {"temp": 0.7, "min_p": 0.05},
    "1, top-k 40": {"temp": 1.0, "top_k": 40},
    "greedy, repetition penalty": {},
    "greedy, JSON": {},
}
PENALTY, JSON_SCHEMA = 1.1, {"type": "object"}
FORMS = {
    "dense": {"dense": True},
    "without the check": {"verify": False},
    "with the check": {},
}
TIMED = ("greedy", "0.8, top-p 0.95")


@command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model's folder")
    parser.add_argument("--texts", type=int, default=10, help="texts of each setting")
    parser.add_argument("--tokens", type=int, default=60, help="tokens of a text")
    parser.add_argument("--rounds", type=int, default=5, help="turns of the speed")
    parser.add_argument("--n-probes", type=int, help="clusters scored, instead of the index's")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    head = get_flash_head(model)
    head.stays_dense = False
    if args.n_probes:
        head.n_probes = args.n_probes
    figures = {
        "model": Path(args.model).name,
        "clusters": head.n_clusters,
        "bare_probes": head.n_probes,
        "checked_probes": head.checked_probes,
        "texts": compare(model, tokenizer, args),
        "speed": speeds(model, tokenizer, args) if args.rounds else {},
    }
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def compare(model, tokenizer, args: argparse.Namespace) -> dict:
    """How many texts are the dense model's, and what the checks did."""
    figures = {}
    for name in SETTINGS:
        counts, same = Counter(), 0
        with counted(counts):
            for i, request in enumerate(tqdm(usual_requests()[: args.texts], desc=name)):
                run = (model, tokenizer, prompt_of(tokenizer, request), args.tokens, name, i)
                dense, checked = (generate(*run, dense=dense)[0] for dense in (True, False))
                same += dense == checked
        figures[name] = {"same": same, "texts": args.texts, **counts}
    return figures


def speeds(model, tokenizer, args: argparse.Namespace) -> dict:
    """Tokens per second in turns, relative to dense, and how long text waits."""
    prompts = [prompt_of(tokenizer, request) for request in usual_requests()[: args.rounds + 1]]
    figures: dict[str, dict] = {}
    for name in TIMED:
        waits: list[float] = []

        def seconds(form: str, number: int, name=name, waits=waits) -> float:
            run = (model, tokenizer, prompts[number], args.tokens, name, number)
            _, times = generate(*run, **FORMS[form])
            if number and form == "with the check":
                waits += [b - a for a, b in itertools.pairwise(times)]
            return (times[-1] - times[0]) / (len(times) - 1)

        *_, turns = in_turns({form: partial(seconds, form) for form in FORMS}, args.rounds)
        figures[name] = {
            form: {
                "tokens_per_second": 1 / median(turn),
                "relative": median(a / b for a, b in zip(turns["dense"], turn, strict=True)),
                "of_each_turn": [1 / taken for taken in turn],
            }
            for form, turn in turns.items()
        }
        gaps = sorted(gap for gap in waits if gap > 1e-3)
        figures[name]["gaps"] = {"median": median(gaps), "longest": gaps[-1]}
    return figures


def generate(model, tokenizer, prompt, n_tokens, name, seed, **options):
    """The tokens of a text, and the time of each."""
    processors = None
    if "penalty" in name:
        processors = make_logits_processors(repetition_penalty=PENALTY)
    elif "JSON" in name:
        processors = [grammar_processor(tokenizer, json_schema=JSON_SCHEMA)]
    mx.random.seed(seed)
    options |= {"max_tokens": n_tokens, "sampler": make_sampler(**SETTINGS[name])}
    options |= {"logits_processors": processors, "logprobs": False}
    responses = stream_generate(model, tokenizer, prompt, **options)
    tokens, times = zip(*((r.token, time.perf_counter()) for r in responses), strict=True)
    return tokens, times


@contextmanager
def counted(counts: Counter) -> Iterator[None]:
    """Counts what the checks do within the block."""
    counts.update(checks=0, positions=0, doubts=0, others=0)
    launch, settle = Check.__init__, Check._settle

    def counting(check, *arguments):
        launch(check, *arguments)
        counts.update(checks=1, positions=len(check._rows))

    def settling(check, text, position):
        settle(check, text, position)
        counts.update(doubts=1, others=int(text.refused))

    with patch.multiple(Check, __init__=counting, _settle=settling):
        yield


if __name__ == "__main__":
    main()
