#!/usr/bin/env python3
"""Figures of docs/drafts.md: how many of a dense drafter's accepted tokens remain.

    python scripts/figures/drafts.py TARGET DRAFTER --json drafts.json

The target writes answers densely. Under the target's own tokens the drafter's states say, for every
way to choose its tokens, which of them the target accepts: a draft is only looked at where all
drafts before it were right. So the rounds of a loop with k drafts follow from one pass, for all
ways at once: the drafter's dense head, its FlashHead with some numbers of probes, and a list of the
most frequent tokens at the same bytes, with and without the latest tokens of the text.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import batch_generate
from tqdm import tqdm

from mlx_flashhead import get_flash_head, grammar_processor, make_sampler, stream_generate
from mlx_flashhead.benchmarks.agreement import bytes_read
from mlx_flashhead.common.command import command
from mlx_flashhead.conversion.builtin_text import builtin_documents, dialogues
from mlx_flashhead.decoding.guessing.draft_model import LATEST
from mlx_flashhead.decoding.policy import policy_of
from mlx_flashhead.head.draws import draw
from mlx_flashhead.head.draws.noise import position_key
from mlx_flashhead.head.flash_head import FlashHead
from mlx_flashhead.head.matrix import as_float32, to_mlx
from mlx_flashhead.head.operations import Candidates
from mlx_flashhead.loading.drafts import load_draft
from mlx_flashhead.models.cpu_products import numpy_products
from mlx_flashhead.models.fetch import resolve
from mlx_flashhead.models.loading import load_dense
from mlx_flashhead.models.templates import prompt_of

# Calibration has other requests.
REQUESTS = Path(__file__).with_name("requests.txt")
DENSE = "dense, 100.0 %"
SETTINGS = {
    "greedy": {},
    "greedy, JSON": {},
    "0.8, top-p 0.95": {"temp": 0.8, "top_p": 0.95},
}
# A draft reads these shares of the dense head's bytes.
SHARES = (0.07, 0.08, 0.09, 0.1)
# These are enough where a draw sorts the vocabulary.
FEW_SHARES = (0.1,)
# The numbers of drafts of a round.
DRAFTS = (2, 4, 8)
# So long are answers whose tokens are counted, too.
WRITTEN_TOKENS = 240
SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "answer": {"type": "string"},
        "keywords": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
    },
    "required": ["title", "answer", "keywords"],
    "additionalProperties": False,
}


@command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("target", help="the target's folder")
    parser.add_argument("drafter", help="the drafter's folder, with its FlashHead")
    parser.add_argument("--requests", type=int, default=24, help="answers of each sampling")
    parser.add_argument("--tokens", type=int, default=60, help="tokens of an answer")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    target, tokenizer, _ = load_dense(resolve(args.target))
    model, _ = load_draft(args.drafter)
    head = get_flash_head(model)
    requests = REQUESTS.read_text(encoding="utf-8").splitlines()
    drafter = Drafter(model, frequent_tokens(target, tokenizer, head.vocab_size))
    figures = {
        "target": Path(args.target).name,
        "drafter": Path(args.drafter).name,
        "clusters": head.n_clusters,
        "draft_probes": policy_of(head).draft_probes,
        "requests": args.requests,
    }
    for name, arguments in SETTINGS.items():
        right: dict[str, list[np.ndarray]] = {}
        for seed, request in enumerate(tqdm(requests[: args.requests], desc=name)):
            sampler = make_sampler(**arguments, seed=seed)
            grammar = None
            if "JSON" in name:
                grammar = grammar_processor(tokenizer, json_schema=SCHEMA)
            prompt = prompt_of(tokenizer, request)
            answer = write(target, tokenizer, prompt, args.tokens, sampler, grammar)
            masks = masks_of(grammar, prompt, answer, head.vocab_size)
            draw = Draw(sampler.settings, seed, len(answer), masks)
            for way, tokens in drafter.ways(prompt, answer, draw):
                right.setdefault(way, []).append(tokens == np.array(answer))
        figures[name] = accepted(right)
        print(json.dumps({name: figures[name]}, indent=1), flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


def write(target, tokenizer, prompt, n_tokens, sampler, grammar) -> list[int]:
    """The tokens of the target's answer."""
    processors = None
    if grammar is not None:
        processors = [grammar]
    responses = stream_generate(
        target,
        tokenizer,
        prompt,
        max_tokens=n_tokens,
        sampler=sampler,
        logits_processors=processors,
        logprobs=False,
    )
    return [response.token for response in responses]


class Drafter:
    """A drafter's ways to choose its tokens under a target's own.

    Args:
        model: The drafter, with its FlashHead.
        frequent: All tokens, the most frequent ones first.
    """

    def __init__(self, model, frequent: list[int]):
        self.model = model
        self.head = get_flash_head(model)
        rows = self.head.clustered.token_rows()
        # the products of all rows by numpy, whose BLAS is fast everywhere
        self._rows = as_float32(rows.dequantized(mx.float32))
        self._frequent = np.array(frequent)

    def ways(self, prompt: list[int], answer: list[int], draw: "Draw") -> Iterator:
        """Pairs of a way's name and its tokens (n,)."""
        head = self.head
        n_tokens = len(answer)
        vocab_size = len(self._rows)
        states = self._states(prompt, answer)
        exact = to_mlx(as_float32(states) @ self._rows.T)
        latest = latest_tokens([*prompt, *answer], len(prompt), n_tokens, vocab_size)
        flash = partial(few_logits, head, states, exact)

        def listed(n_listed: int, more: np.ndarray | bool = False) -> mx.array:
            listed = np.zeros((1, vocab_size), dtype=bool)
            listed[:, self._frequent[:n_listed]] = True
            return mx.where(mx.array(listed | more), exact, -mx.inf)

        yield DENSE, draw(exact)
        n_probes = policy_of(head).draft_probes or head.n_probes
        share = bytes_read(head).share(n_probes) + LATEST / vocab_size
        logits = mx.where(mx.array(latest), exact, flash(n_probes))
        yield f"default, {100 * share:.1f} %, {n_probes}", draw(logits)
        shares = FEW_SHARES
        if draw.quick:
            shares = SHARES
        for share in shares:
            name = f"{100 * share:.1f} %"
            n_listed = round(share * vocab_size)
            yield f"list, {name}", draw(listed(n_listed))
            yield f"list and latest, {name}", draw(listed(max(0, n_listed - LATEST), latest))
            n_probes = probes_of(head, share)
            if n_probes:
                yield f"FlashHead, {name}, {n_probes}", draw(flash(n_probes))
            n_probes = probes_of(head, share - LATEST / vocab_size)
            if n_probes:
                logits = mx.where(mx.array(latest), exact, flash(n_probes))
                yield f"FlashHead and latest, {name}, {n_probes}", draw(logits)

    def _states(self, prompt: list[int], answer: list[int]) -> mx.array:
        """The head's input (n, D) at the positions where an answer's tokens are chosen."""
        states = []

        def record(hidden: mx.array) -> mx.array:
            states.append(hidden)
            return mx.zeros((*hidden.shape[:-1], 1))

        with numpy_products(self.model), self.head.intercepted(record):
            self.model(mx.array([[*prompt, *answer[:-1]]]))
        return states[0][0, len(prompt) - 1 :]


def few_logits(head: FlashHead, states: mx.array, exact: mx.array, n_probes: int) -> mx.array:
    """What a FlashHead that scores few clusters knows of the logits.

    Args:
        head: The FlashHead.
        states: The head's inputs (n, D).
        exact: Their dense logits (n, V).
        n_probes: Clusters that are scored.

    Returns:
        (n, V).
    """
    operations = head.operations
    token_ids = mx.minimum(head.clustered.token_ids, exact.shape[1] - 1)
    in_clusters = exact[:, token_ids.reshape(-1)].reshape(len(exact), *token_ids.shape)
    scores = operations.route(states)
    selection = operations.select(scores, n_probes)
    probed = mx.take_along_axis(in_clusters, selection.probes[..., None], axis=1)
    return operations.expand(scores, selection, Candidates(probed))


def latest_tokens(tokens: list[int], first: int, n: int, vocab_size: int) -> np.ndarray:
    """Which tokens are among the latest of a text when each of some is guessed.

    Args:
        tokens: The text with its prompt.
        first: The place of the first token that is guessed.
        n: How many are.
        vocab_size: V.

    Returns:
        (n, V) bool.
    """
    latest = np.zeros((n, vocab_size), dtype=bool)
    for i in range(n):
        latest[i, tokens[max(0, first + i - LATEST) : first + i]] = True
    return latest


class Draw:
    """The choices of an answer's tokens from logits (n, V), with the target's own noise.

    Args:
        settings: Of the sampling.
        seed: Of the answer.
        masks: (n, V) added to the logits, or 0.
    """

    def __init__(self, settings: draw.Draw, seed: int, n_tokens: int, masks):
        keys = [(settings, position_key(seed, i)) for i in range(n_tokens)]
        self._draws = draw.Draws.of(keys)
        self._masks = masks
        self.quick = settings.greedy

    def __call__(self, logits: mx.array) -> np.ndarray:
        """The tokens (n,) that are drawn from logits (n, V)."""
        return np.array(self._draws.choose(logits + self._masks))


def masks_of(grammar, prompt: list[int], answer: list[int], vocab_size: int) -> mx.array | int:
    """What a grammar adds to the logits (n, V) of an answer's positions."""
    if grammar is None:
        return 0
    grammar.begin()
    zeros = mx.zeros((1, vocab_size))
    context = mx.array([*prompt, *answer])
    return mx.concatenate([grammar(context[: len(prompt) + i], zeros) for i in range(len(answer))])


def probes_of(head, share: float) -> int:
    """The number of probes that reads a share of the dense head's bytes; below 1 for none."""
    nbytes = bytes_read(head)
    fixed = nbytes.share(0)
    return max(0, int((share - fixed) / (nbytes.share(1) - fixed)))


def frequent_tokens(target, tokenizer, vocab_size: int) -> list[int]:
    """Tokens by their number in the calibration's text and in answers that the target writes.

    Tokens that are in none follow by their id, which is the order of a tokenizer's merges.
    """
    counted: Counter[int] = Counter()
    documents = [text for texts in builtin_documents().values() for text in texts]
    documents += [message["content"] for messages in dialogues() for message in messages]
    for text in documents:
        counted.update(tokenizer.encode(text))
    with numpy_products(target):
        written = batch_generate(
            target,
            tokenizer,
            [prompt_of(tokenizer, talk[0]["content"]) for talk in dialogues()],
            max_tokens=WRITTEN_TOKENS,
            return_token_ids=True,
        )
    for ids in written.token_ids:
        counted.update(ids)
    seen = [token for token, _ in counted.most_common()]
    return [*seen, *(token for token in range(vocab_size) if token not in counted)]


def accepted(right: dict[str, list[np.ndarray]]) -> dict:
    """The accepted tokens of every way, by the number of drafts of a round."""
    figures = {}
    for way, answers in right.items():
        figures[way] = {"right": float(np.concatenate(answers).mean())}
        for n_drafts in DRAFTS:
            rounds = [rounds_of(answer, n_drafts) for answer in answers]
            n_rounds, n_accepted = (sum(part) for part in zip(*rounds, strict=True))
            dense = figures[DENSE].get(f"accepted, {n_drafts}", n_accepted)
            figures[way] |= {
                f"accepted, {n_drafts}": n_accepted,
                f"of dense, {n_drafts}": n_accepted / dense,
                f"tokens per round, {n_drafts}": sum(map(len, answers)) / n_rounds,
            }
    return figures


def rounds_of(right: np.ndarray, n_drafts: int) -> tuple[int, int]:
    """Rounds and accepted tokens of an answer in mlx-lm's loop."""
    place = n_rounds = n_accepted = 0
    while place < len(right):
        run = right[place : place + n_drafts]
        if run.all():
            hits = len(run)
        else:
            hits = int(np.argmin(run))
        n_accepted += hits
        n_rounds += 1
        place += hits + 1
    return n_rounds, n_accepted


if __name__ == "__main__":
    main()
