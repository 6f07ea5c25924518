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
from pathlib import Path
from statistics import median

import mlx.core as mx
from tqdm import tqdm

from mlx_flashhead import get_flash_head, grammar_processor, load, make_sampler, stream_generate
from mlx_flashhead.common.command import command
from mlx_flashhead.evaluation.answers import usual_requests
from mlx_flashhead.lossless import check as check_module
from mlx_flashhead.models.compat.sample_utils import make_logits_processors

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
    found = {}
    for name, arguments in SETTINGS.items():
        counted = Counted()
        same = 0
        for i, request in enumerate(tqdm(usual_requests()[: args.texts], desc=name)):
            prompt = prompt_of(tokenizer, request)
            texts = [
                generate(model, tokenizer, prompt, args.tokens, name, arguments, i, dense=dense)[0]
                for dense in (True, False)
            ]
            same += texts[0] == texts[1]
        found[name] = {"same": same, "texts": args.texts} | counted.close()
    return found


def speeds(model, tokenizer, args: argparse.Namespace) -> dict:
    """Tokens per second in turns, relative to dense, and how long text waits."""
    forms = {
        "dense": {"dense": True},
        "without the check": {"check": False},
        "with the check": {},
    }
    found = {}
    prompts = [prompt_of(tokenizer, request) for request in usual_requests()[: args.rounds]]
    for name in TIMED:
        rates: dict[str, list[float]] = {form: [] for form in forms}
        waits: list[float] = []
        for i, prompt in enumerate(tqdm(prompts, desc=f"speed, {name}")):
            order = list(forms)[i % 3 :] + list(forms)[: i % 3]
            for form in order:
                _, times = generate(
                    model, tokenizer, prompt, args.tokens, name, SETTINGS[name], i, **forms[form]
                )
                rates[form].append((len(times) - 1) / (times[-1] - times[0]))
                if form == "with the check":
                    waits += [b - a for a, b in itertools.pairwise(times)]
        found[name] = {
            form: {
                "tokens_per_second": median(values),
                "relative": median(a / b for a, b in zip(values, rates["dense"], strict=True)),
                "of_each_turn": values,
            }
            for form, values in rates.items()
        }
        gaps = sorted(gap for gap in waits if gap > 1e-3)
        found[name]["gaps"] = {"median": median(gaps), "longest": gaps[-1]}
    return found


def generate(model, tokenizer, prompt, n_tokens, name, arguments, seed, **options):
    """The tokens of a text, and the time of each."""
    processors = []
    if "penalty" in name:
        processors = make_logits_processors(repetition_penalty=PENALTY)
    elif "JSON" in name:
        processors = [grammar_processor(tokenizer, json_schema=JSON_SCHEMA)]
    mx.random.seed(seed)
    tokens, times = [], []
    for response in stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=n_tokens,
        sampler=make_sampler(**arguments),
        logits_processors=processors or None,
        logprobs=False,
        **options,
    ):
        tokens.append(response.token)
        times.append(time.perf_counter())
    return tokens, times


def prompt_of(tokenizer, request: str) -> list[int]:
    """A request as a chat, or as a text where the model has no turns."""
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": request}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return tokenizer.encode(request)


class Counted:
    """Counts what the checks do until it is closed."""

    def __init__(self):
        self.checks = self.positions = self.doubts = self.others = 0
        self._originals = check_module.Check.__init__, check_module.Check._settle
        launch, settle = self._originals

        def counting(check, *arguments):
            launch(check, *arguments)
            self.checks += 1
            self.positions += len(check._rows)

        def settling(check, text, position):
            settle(check, text, position)
            self.doubts += 1
            self.others += text.refused

        check_module.Check.__init__, check_module.Check._settle = counting, settling

    def close(self) -> dict:
        """Ends the count."""
        check_module.Check.__init__, check_module.Check._settle = self._originals
        names = ("checks", "positions", "doubts", "others")
        return {name: getattr(self, name) for name in names}


if __name__ == "__main__":
    main()
