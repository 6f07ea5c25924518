"""The training of a drafter, of Qwen3.5's MTP form, on a model's own answers.

The drafter is mlx-vlm's `qwen3_5_mtp`: a projection of the next token's embedding and the target's
hidden state, one transformer layer, and the target's own head. It learns the target's
distributions from its states, three tokens deep.
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW, cosine_decay, join_schedules, linear_schedule
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ConcatenateKVCache
from mlx_vlm.speculative.drafters.qwen3_5_mtp import ModelConfig, Qwen3_5MTPDraftModel
from tqdm import tqdm

from drafted_target import Target, Text

# The widest step has so many drafts.
DEPTHS = 7
# The loss of each depth counts so much in the training.
TAUGHT_DEPTHS = (1.0, 0.7, 0.5)
# A step of the training reads so many texts.
READ_TEXTS = 8
# All distributions are compared in so many of the target's best tokens.
BEST = 8
# So many more tokens are drawn at random.
OTHERS = 1024
PEAK_RATE = 1e-3
# After so many steps the rate is at its peak.
WARM_UP = 30


def new_drafter(target: Target) -> Qwen3_5MTPDraftModel:
    """A drafter of the target's sizes, whose weights are random."""
    args = target.args
    head_size = args.hidden_size // args.num_attention_heads
    half = head_size // 2
    config = {
        "model_type": "qwen3_5_mtp",
        "block_size": DEPTHS + 1,
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_5_text",
            "hidden_size": args.hidden_size,
            "intermediate_size": args.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": args.num_attention_heads,
            "num_key_value_heads": args.num_key_value_heads,
            "head_dim": head_size,
            "rms_norm_eps": args.rms_norm_eps,
            "vocab_size": args.vocab_size,
            "max_position_embeddings": args.max_position_embeddings,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "type": "default",
                "rope_theta": args.rope_theta,
                "partial_rotary_factor": 1.0,
                "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            },
            # These are a linear attention's, which an MTP layer does not have.
            "linear_num_value_heads": 1,
            "linear_num_key_heads": 1,
            "linear_key_head_dim": 1,
            "linear_value_head_dim": 1,
            "linear_conv_kernel_dim": 4,
        },
    }
    drafter = Qwen3_5MTPDraftModel(ModelConfig.from_dict(config))
    drafter.own_config = config
    # It begins with the target's own state, as the target's head knows it.
    width = args.hidden_size
    drafter.fc.weight = mx.concatenate([0.5 * drafter.fc.weight[:, :width], mx.eye(width)], axis=1)
    drafter.norm.weight = mx.array(target.model.model.norm.weight).astype(mx.float32)
    mx.eval(drafter.parameters())
    return drafter


def chain(
    drafter: Qwen3_5MTPDraftModel, embeddings: mx.array, states: mx.array, depths: int
) -> Iterator[mx.array]:
    """The drafter's states behind every place of texts, one draft deeper each time.

    The drafts behind a place know the text up to it and each other, and nothing of the places
    after it. That is what a loop of drafts and steps computes.

    Args:
        drafter: The drafter.
        embeddings: (B, L + depths, D) of the texts' tokens.
        states: (B, L, D) of the target, from which it chose the tokens.
        depths: The number of drafts.

    Yields:
        (B, L, D) for each depth. At depth d the state at place j guesses token j + d + 1.
    """
    length = states.shape[1]
    cache = ConcatenateKVCache()
    mask = mx.tril(mx.ones((length, length), mx.bool_))
    own = mx.eye(length).astype(mx.bool_)
    for depth in range(1, depths + 1):
        known = embeddings[:, depth : depth + length]
        parts = [drafter.pre_fc_norm_embedding(known), drafter.pre_fc_norm_hidden(states)]
        hidden = drafter.fc(mx.concatenate(parts, axis=-1))
        places = mx.arange(length, dtype=mx.int32)[None] + (depth - 1)
        hidden = drafter.layers[0](hidden, mask=mask, cache=cache, position_ids=places)
        states = drafter.norm(hidden)
        mask = mx.concatenate([mask, own], axis=1)
        yield states


class Lesson(NamedTuple):
    """What is known of a text that is learned from.

    Attributes:
        states: The states (n - 1, D) float32 after each token but the last.
        best: The target's best tokens there, (n - 1, BEST).
    """

    tokens: list[int]
    n_prompt: int
    states: np.ndarray
    best: np.ndarray


def lessons_of(target: Target, texts: Sequence[Text]) -> list[Lesson]:
    """The states of texts."""
    lessons = []
    for text in tqdm(texts, desc="Reading"):
        tokens = [*text.prompt, *text.answer]
        states = target.states(tokens[:-1])
        best = mx.argpartition(-(states @ target.rows.T), BEST, axis=-1)[:, :BEST]
        found = np.array(states), np.array(best)
        lessons.append(Lesson(tokens, len(text.prompt), *found))
    return lessons


class Teacher:
    """Makes a step's loss of some texts.

    Args:
        target: The target.
        lessons: All texts.
        seed: Of the random tokens.
    """

    def __init__(self, target: Target, lessons: list[Lesson], seed: int):
        self._target = target
        self._lessons = sorted(lessons, key=lambda lesson: len(lesson.tokens))
        self._random = np.random.default_rng(seed)

    def steps(self, n: int) -> Iterator[tuple[mx.array, ...]]:
        """The arguments of :func:`loss_of` for each step, of texts of about the same length."""
        starts = np.arange(0, len(self._lessons) - READ_TEXTS + 1, READ_TEXTS)
        while n > 0:
            for start in self._random.permutation(starts)[:n]:
                yield self._step(self._lessons[start : start + READ_TEXTS])
                n -= 1

    def _step(self, lessons: list[Lesson]) -> tuple[mx.array, ...]:
        longest = max(len(lesson.tokens) for lesson in lessons)
        # These are the places whose next token but one is known.
        length = longest - 2
        depths = len(TAUGHT_DEPTHS)
        tokens = np.zeros((len(lessons), length + depths), np.int32)
        states = np.zeros((len(lessons), length + depths, lessons[0].states.shape[1]), np.float32)
        counts = np.zeros((len(lessons), length + depths), np.float32)
        for i, lesson in enumerate(lessons):
            n = len(lesson.tokens)
            tokens[i, :n] = lesson.tokens
            states[i, : n - 1] = lesson.states
            # These states chose the answer.
            counts[i, lesson.n_prompt - 1 : n - 1] = 1
        vocab = self._target.args.vocab_size
        compared = [tokens.ravel(), self._random.integers(0, vocab, OTHERS)]
        compared += [lesson.best.ravel() for lesson in lessons]
        rows = self._target.rows[mx.array(np.unique(np.concatenate(compared)))]
        embeddings = self._target.embed(mx.array(tokens)).astype(mx.float32)
        expected = mx.softmax(mx.array(states) @ rows.T, axis=-1)
        step = embeddings, mx.array(states[:, :length]), expected, mx.array(counts), rows
        mx.eval(step)
        return step


def loss_of(drafter, embeddings, states, expected, counts, rows) -> mx.array:
    """How far the drafts' distributions are from the target's, in nats of cross-entropy."""
    length = states.shape[1]
    loss = mx.array(0.0)
    for depth, drafted in enumerate(chain(drafter, embeddings, states, len(TAUGHT_DEPTHS)), 1):
        logits = drafted @ rows.T
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        nats = -(expected[:, depth : depth + length] * logprobs).sum(axis=-1)
        counted = counts[:, depth : depth + length]
        mean = (nats * counted).sum() / mx.maximum(counted.sum(), 1)
        loss = loss + TAUGHT_DEPTHS[depth - 1] * mean
    return loss / sum(TAUGHT_DEPTHS)


def train(target: Target, lessons: list[Lesson], n_steps: int, seed: int):
    """A trained drafter, and the mean loss of each tenth of its steps."""
    mx.random.seed(seed)
    drafter = new_drafter(target)
    warm_up = min(WARM_UP, n_steps // 4)
    rates = [linear_schedule(0, PEAK_RATE, warm_up), cosine_decay(PEAK_RATE, n_steps - warm_up)]
    optimizer = AdamW(join_schedules(rates, [warm_up]), betas=[0.9, 0.95], weight_decay=0.01)
    loss_and_gradient = nn.value_and_grad(drafter, partial(loss_of, drafter))
    losses = []
    for step in tqdm(Teacher(target, lessons, seed).steps(n_steps), total=n_steps, desc="Training"):
        loss, gradient = loss_and_gradient(*step)
        optimizer.update(drafter, gradient)
        mx.eval(loss, drafter.parameters(), optimizer.state)
        losses.append(loss.item())
    tenths = np.array_split(losses, min(10, n_steps))
    return drafter, [round(float(tenth.mean()), 3) for tenth in tenths]


def save(drafter: Qwen3_5MTPDraftModel, folder: Path) -> None:
    """Writes a drafter as mlx-vlm loads one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(drafter.own_config, indent=1) + "\n")
    weights = dict(tree_flatten(drafter.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
