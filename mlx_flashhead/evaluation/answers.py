"""How far whole greedy answers stay those of the dense model.

The dense model answers each request once. As long as an answer is the same, so are the hidden
states, and FlashHead chooses as the dense head does wherever the best token's cluster is among the
probes. So the states along the dense answer tell, for every number of probes, where the answers
part; only those that do are generated again.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import chain

import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from ..conversion.calibration import read_windows
from ..head.flash_head import FlashHead
from ..head.matrix import as_float32
from ..models.compat.generate import BatchGenerator
from ..models.cpu_products import numpy_products
from ..models.locate import find_head
from .text import bytes_share, check_probe_counts, installed_head

CONFIDENCES = (0.0, 0.5, 0.8)  # of the dense head in its best token: from each to the next
BATCH_SIZE = 32
BLOCK_LOGITS = 1 << 24


@dataclass(frozen=True)
class AnswerMeasures:
    """Answers at one number of probes against the dense model's.

    Attributes:
        n_probes: Clusters scored per position.
        identical: Share of answers that are the same to the end, 0 … 1.
        median_parting: Tokens that the others share with the dense answer, the median; NaN where
            all are identical.
        nats_per_token: How much less likely the dense model finds a token of FlashHead's answers
            than one of its own, over all answers.
        misses: Positions of the dense answers at which FlashHead would choose another token, by
            the dense head's confidence in its own: below 0.5, 0.5 to 0.8, 0.8 and above.
        bytes_share: Bytes read per token, relative to the dense head.
    """

    n_probes: int
    identical: float
    median_parting: float
    nats_per_token: float
    misses: tuple[int, ...]
    bytes_share: float


@dataclass(frozen=True)
class AnswerEvaluation:
    """What was measured.

    Attributes:
        requests: Number of requests.
        chat_template: Whether they went through one.
        tokens: Longest answer.
        positions: Tokens of all dense answers, by confidence as ``AnswerMeasures.misses``.
        n_probes: The checkpoint's own number of probes.
        n_clusters: Number of clusters.
        measures: One entry a number of probes.
    """

    requests: int
    chat_template: bool
    tokens: int
    positions: tuple[int, ...]
    n_probes: int
    n_clusters: int
    measures: list[AnswerMeasures]

    def to_dict(self) -> dict:
        """JSON-ready."""
        found = asdict(self)
        for one in found["measures"]:
            if one["median_parting"] != one["median_parting"]:
                one["median_parting"] = None
        return found


def requests() -> list[str]:
    """The requests that are answered; calibration has others."""
    text = (resources.files(__package__) / "requests.txt").read_text(encoding="utf-8")
    return text.splitlines()


def evaluate_answers(
    model: nn.Module,
    tokenizer,
    *,
    probe_counts: Sequence[int] | None = None,
    tokens: int = 100,
    asked: Sequence[str] | None = None,
    progress: bool = True,
) -> AnswerEvaluation:
    """Compares greedy answers of ``model`` with those of its dense head.

    Args:
        model: A model loaded by ``mlx_flashhead.load``.
        tokenizer: Its tokenizer. Without a chat template the requests are texts to go on from.
        probe_counts: Numbers of probes, 1 … C; default: half, once and twice the model's own.
        tokens: Length at which an answer is cut.
        asked: Requests; default: :func:`requests`.
        progress: Show bars.

    Raises:
        ValueError: If the model has no FlashHead, or a number of probes is not valid.
    """
    head = installed_head(model)
    if probe_counts is None:
        own = head.n_probes
        probe_counts = [max(1, own // 2), own, min(2 * own, head.n_clusters)]
    probe_counts = check_probe_counts(head, probe_counts)
    prompts = [_prompt(tokenizer, text) for text in (requests() if asked is None else asked)]
    with head.dense():
        dense, states = _answers(model, tokenizer, prompts, tokens, "Answering, dense", progress)
    chosen = np.array(list(chain(*dense)), dtype=np.int64)
    confidence = np.exp(-_negative_log_likelihood(head, np.concatenate(states), chosen))
    needed = _probes_needed(head, np.concatenate(states), chosen)
    bins = np.digitize(confidence, CONFIDENCES) - 1
    ends = np.cumsum([len(answer) for answer in dense])
    measures = []
    for n_probes in probe_counts:
        missed = needed > n_probes
        by_answer = np.split(missed, ends[:-1])
        parted = [i for i, of_answer in enumerate(by_answer) if of_answer.any()]
        with head.settings(n_probes=n_probes, max_positions=BATCH_SIZE):
            parted_answers, parted_states = _answers(
                model,
                tokenizer,
                [prompts[i] for i in parted],
                tokens,
                f"Answering, {n_probes} probes",
                progress,
            )
        kept = ~np.isin(np.repeat(np.arange(len(prompts)), np.diff(ends, prepend=0)), parted)
        nll = [-np.log(confidence[kept])]
        if parted:
            own_ids = np.array(list(chain(*parted_answers)), dtype=np.int64)
            nll.append(_negative_log_likelihood(head, np.concatenate(parted_states), own_ids))
        partings = [int(by_answer[i].argmax()) for i in parted]
        measures.append(
            AnswerMeasures(
                n_probes=n_probes,
                identical=1 - len(parted) / len(prompts),
                median_parting=float(np.median(partings)) if partings else math.nan,
                nats_per_token=float(np.concatenate(nll).mean() + np.log(confidence).mean()),
                misses=_by_confidence(bins[missed]),
                bytes_share=bytes_share(head, n_probes),
            )
        )
    return AnswerEvaluation(
        requests=len(prompts),
        chat_template=bool(tokenizer.has_chat_template),
        tokens=tokens,
        positions=_by_confidence(bins),
        n_probes=head.n_probes,
        n_clusters=head.n_clusters,
        measures=measures,
    )


def _prompt(tokenizer, text: str) -> list[int]:
    if not tokenizer.has_chat_template:
        return list(tokenizer.encode(text))
    messages = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def _answers(
    model: nn.Module,
    tokenizer,
    prompts: Sequence[list[int]],
    tokens: int,
    description: str,
    progress: bool,
) -> tuple[list[list[int]], list[np.ndarray]]:
    """Greedy answers, and the states (n, D) from which their tokens were chosen.

    The token that ends an answer is part of it.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return answers, []
    generator = BatchGenerator(
        model,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=BATCH_SIZE,
        prefill_batch_size=BATCH_SIZE,
    )
    uids = generator.insert(list(prompts), [tokens] * len(prompts))
    place = {uid: i for i, uid in enumerate(uids)}
    with (
        numpy_products(),
        tqdm(total=len(prompts), desc=description, unit="answer", disable=not progress) as bar,
    ):
        left = len(prompts)
        while left:
            for response in generator.next_generated():
                answers[place[response.uid]].append(response.token)
                if response.finish_reason is not None:
                    left -= 1
                    bar.update()
    generator.close()
    location = find_head(model)
    # one pass over each gives the states
    windows = [[*p, *answer] for p, answer in zip(prompts, answers, strict=True)]
    read = read_windows(model, location, windows, [[]] * len(windows), progress=False)
    return answers, [of_window[len(p) - 1 :] for p, of_window in zip(prompts, read, strict=True)]


def _by_confidence(bins: np.ndarray) -> tuple[int, ...]:
    return tuple(np.bincount(bins, minlength=len(CONFIDENCES)).tolist())


def _negative_log_likelihood(
    head: FlashHead, states: np.ndarray, token_ids: np.ndarray
) -> np.ndarray:
    """Of tokens (N,) under the dense head's distribution at states (N, D): (N,) nats."""
    rows = head.clustered.token_rows()
    weight = as_float32(rows.dequantized())
    bias = 0.0 if rows.bias is None else as_float32(rows.bias)
    found = np.empty(len(states))
    size = max(1, BLOCK_LOGITS // len(weight))
    for start in range(0, len(states), size):
        part = slice(start, start + size)
        logits = states[part] @ weight.T + bias
        own = np.take_along_axis(logits, token_ids[part, None], axis=1)[:, 0]
        best = logits.max(axis=1)
        logits -= best[:, None]
        found[part] = best - own + np.log(np.exp(logits, out=logits).sum(axis=1))
    return found


def _probes_needed(head: FlashHead, states: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """Probes with which each token (N,) is scored at its state (N, D): (N,) integers."""
    clustered = head.clustered
    cluster_of = np.empty(head.vocab_size + 1, np.int64)
    ids = np.array(clustered.token_ids)
    cluster_of[ids.ravel()] = np.repeat(np.arange(len(ids)), ids.shape[1])
    matrix = as_float32(clustered.centroids.matrix.dequantized())
    bias = as_float32(clustered.route_bias)  # lifts the clusters that are always scored
    needed = np.empty(len(states), np.int64)
    size = max(1, BLOCK_LOGITS // len(matrix))
    for start in range(0, len(states), size):
        part = slice(start, start + size)
        scores = states[part] @ matrix.T + bias
        own = np.take_along_axis(scores, cluster_of[token_ids[part], None], axis=1)
        needed[part] = 1 + (scores > own).sum(axis=1)
    return needed
