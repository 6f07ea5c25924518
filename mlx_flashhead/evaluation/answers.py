"""How far whole greedy answers of the head alone, without a check, stay those of the dense model.

The dense model answers each request once. As long as an answer is the same, so are the hidden
states, and FlashHead chooses as the dense head does wherever the best token's cluster is among the
probes. So the states along the dense answer tell, for every number of probes, where the answers
part.
"""

import argparse
from collections.abc import Sequence
from importlib import resources
from typing import Any

import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ..common.head_flags import source_options
from ..common.tables import Table, new_table, percent, show
from ..conversion.calibration import read_windows
from ..conversion.steps import take_all
from ..head.flash_head import FlashHead
from ..head.matrix import as_float32
from ..loading.load import load
from ..models.compat.mlx_lm import BatchGenerator
from ..models.cpu_products import numpy_products
from ..models.install import installed_head
from ..models.locate import find_head
from ..models.tokenizers import prompt_of
from .text import add_probes, bytes_share, check_probe_counts

HELP = "compare whole answers"
DESCRIPTION = "Compare whole greedy answers to 114 requests with the dense model's."
BATCH_SIZE, MOST_TOKENS = 32, 100
LEGEND = """\
identical  greedy answers that are the dense model's to the end
parting    tokens that the others share with it, the median
agreement  share of the dense answers' tokens that FlashHead would choose
bytes      read per token, relative to the dense head"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_probes(parser, "half, once and twice the model's own")


def run(args: argparse.Namespace) -> dict:
    model, tokenizer = load(args.model, **source_options(args))
    figures = evaluate_answers(model, tokenizer, args.probes)
    show(make_table(figures))
    return figures


def usual_requests() -> list[str]:
    """The requests that are answered; calibration has others."""
    text = (resources.files(__package__) / "requests.txt").read_text(encoding="utf-8")
    return text.splitlines()


def evaluate_answers(
    model: nn.Module, tokenizer, probe_counts: Sequence[int] | None = None
) -> dict[str, Any]:
    """Compares greedy answers of ``model``, which has a FlashHead, with those of its dense head.

    Returns:
        What was asked, and for each number of probes (default: half, once and twice the model's
        own) the share of ``identical`` answers, ``median_parting``, the tokens that the others
        share with the dense answer (None without others), the ``agreement`` over all tokens, and
        the ``bytes_share``.
    """
    head = installed_head(model)
    if probe_counts is None:
        own = head.n_probes
        probe_counts = [max(1, own // 2), own, min(2 * own, head.n_clusters)]
    probe_counts = check_probe_counts(head, probe_counts)
    prompts = [prompt_of(tokenizer, text) for text in usual_requests()]
    with head.dense():
        answers = _greedy_answers(model, tokenizer, prompts)
    needed = _probes_needed(model, head, prompts, answers)
    measures = []
    for n_probes in probe_counts:
        missed = [of_answer > n_probes for of_answer in needed]
        partings = [int(of_answer.argmax()) for of_answer in missed if of_answer.any()]
        figures = {
            "n_probes": n_probes,
            "identical": 1 - len(partings) / len(prompts),
            "median_parting": float(np.median(partings)) if partings else None,
            "agreement": 1 - float(np.concatenate(missed).mean()),
            "bytes_share": bytes_share(head, n_probes),
        }
        measures.append(figures)
    return {
        "requests": len(prompts),
        "chat_template": bool(tokenizer.has_chat_template),
        "tokens": MOST_TOKENS,
        "positions": sum(map(len, answers)),
        "n_probes": head.n_probes,
        "n_clusters": head.n_clusters,
        "measures": measures,
    }


def make_table(figures: dict) -> Table:
    """A line for each number of probes, the model's own in bold."""
    way = "through the chat template" if figures["chat_template"] else "without a chat template"
    table = new_table(
        f"{figures['requests']} requests {way}, at most {figures['tokens']} tokens, "
        f"{figures['n_clusters']} clusters",
        ("probes", "identical", "parting", "agreement", "bytes"),
        LEGEND,
        left=0,
    )
    for row in figures["measures"]:
        parting = row["median_parting"]
        table.add_row(
            f"{row['n_probes']}",
            percent(row["identical"], 1),
            "–" if parting is None else f"{parting:.0f}",
            percent(row["agreement"]),
            percent(row["bytes_share"], 1),
            style="bold" if row["n_probes"] == figures["n_probes"] else None,
        )
    return table


def _greedy_answers(model: nn.Module, tokenizer, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Greedy answers. The token that ends an answer is part of it."""
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=BATCH_SIZE,
        prefill_batch_size=BATCH_SIZE,
    )
    uids = generator.insert(list(prompts), [MOST_TOKENS] * len(prompts))
    answers: dict[int, list[int]] = {uid: [] for uid in uids}
    with numpy_products(), tqdm(total=len(uids), desc="Answering", unit="answer") as bar:
        left = len(uids)
        while left:
            for response in generator.next_generated():
                answers[response.uid].append(response.token)
                if response.finish_reason is not None:
                    left -= 1
                    bar.update()
    generator.close()
    return list(answers.values())


def _probes_needed(
    model: nn.Module,
    head: FlashHead,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
) -> list[np.ndarray]:
    """For each answer: the probes with which each of its n tokens is scored, (n,) integers."""
    clustered = head.clustered
    cluster_of = np.array(clustered.slot_of).astype(np.int64) // head.cluster_size
    matrix = as_float32(clustered.centroids.matrix.dequantized())
    bias = as_float32(clustered.route_bias)  # lifts the clusters that are always scored
    windows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    read = take_all(read_windows(model, find_head(model), windows), progress=False)
    needed = []
    for prompt, states, tokens in zip(prompts, read, answers, strict=True):
        scores = states[len(prompt) - 1 :] @ matrix.T + bias
        own = np.take_along_axis(scores, cluster_of[tokens][:, None], axis=1)
        needed.append(1 + (scores > own).sum(axis=1))
        needed[-1][0] = 0  # the first token is chosen by the dense head
    return needed
