"""Biases and penalties: the few tokens of a text whose logits they change, and by how much.

The operations, in mlx-lm's order, each rounded to the dtype of the model's logits:

    x + bias;  x · repetition where x < 0, else x / repetition;  x - presence;
    x - frequency, once for each time that the token occurs

Source: mlx_lm.sample_utils.make_logits_processors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from .clustered import ALWAYS_PROBED, ClusteredRows

# The constants of the same names in metal/flash_head/adjust.h.
# The words of a position begin with so many.
ADJUST_HEAD = 3
# Each token has so many: its id, the bits of its bias, how it occurs.
ADJUST_TOKEN = 3

# How a token occurs: two bits, and a count above them.
REPEATED = 1
PRESENT = 2
OCCURS = 4
# The tokens of a position are filled up to a multiple: only proposals of the same number of probes
# can be joined, and each new number is traced anew. Up to FEW_TOKENS the multiple is small, since
# each place costs a cluster.
TOKENS_MULTIPLE = 32
FEW_TOKENS = 64
FEW_MULTIPLE = 8
# The most occurrences of a token may rise with each token of a text: they are filled up, too.
OCCURRENCES_MULTIPLE = 4


@dataclass(frozen=True)
class ChangedTokens:
    """What the biases and penalties of one text change at one position.

    Attributes:
        repetition, presence, frequency: The penalties; 1, 0 and 0 for none.
        biases: By token.
        repeated, present: Tokens that these penalties count, without the latest one if it is not
            read yet. A token may be there more than once.
        occurrences: How often each token occurs that the frequency penalty counts, without
            the latest one if it is not read yet.
    """

    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    biases: Mapping[int, float] = field(default_factory=dict)
    repeated: Sequence[int] = ()
    present: Sequence[int] = ()
    occurrences: Mapping[int, int] = field(default_factory=dict)

    @property
    def token_ids(self) -> Sequence[int]:
        """All tokens that change, without the latest one if it is not read yet."""
        return sorted({*self.biases, *self.repeated, *self.present, *self.occurrences})

    @property
    def most_occurrences(self) -> int:
        """How often a token may be charged by the frequency penalty, with the latest one."""
        if not self.frequency:
            return 0
        return max(self.occurrences.values(), default=0) + 1


class Adjustment(NamedTuple):
    """What biases and penalties change, at R positions, for at most K tokens each.

    Attributes:
        words: (R, ADJUST_HEAD + ADJUST_TOKEN·K) uint32, as metal/flash_head/adjust.h has them.
        latest: (R,) uint32, the latest token, which may not be computed yet; V for none.
        most_occurrences: A token occurs at most so often, the latest one counted; 0 without a
            frequency penalty.
    """

    words: mx.array
    latest: mx.array
    most_occurrences: int

    @classmethod
    def of(
        cls,
        positions: Sequence[ChangedTokens | None],
        latest: mx.array | None,
        vocab_size: int,
    ) -> "Adjustment":
        """The adjustment of some positions.

        Args:
            positions: What changes at each; None where there are neither biases nor penalties.
            latest: (R,) tokens that the positions do not count yet, V for one that counts all;
                None where all do.
            vocab_size: V.
        """
        changes = [each or ChangedTokens() for each in positions]
        token_ids = [change.token_ids for change in changes]
        n_tokens = max(1, *map(len, token_ids))
        multiple = TOKENS_MULTIPLE
        if n_tokens <= FEW_TOKENS:
            multiple = FEW_MULTIPLE
        n_tokens = _filled_up(n_tokens, multiple)
        words = np.zeros((len(positions), ADJUST_HEAD + ADJUST_TOKEN * n_tokens), np.uint32)
        for own_words, change, ids in zip(words, changes, token_ids, strict=True):
            _write(own_words, change, ids, vocab_size)
        if latest is None:
            latest = mx.array([vocab_size] * len(positions), mx.uint32)
        most = max(change.most_occurrences for change in changes)
        most = _filled_up(most, OCCURRENCES_MULTIPLE)
        return cls(mx.array(words), latest.astype(mx.uint32), most)

    @property
    def n_tokens(self) -> int:
        """Tokens of a position, K and the latest one: as many clusters are probed for them."""
        return (self.words.shape[1] - ADJUST_HEAD) // ADJUST_TOKEN + 1


def _filled_up(number: int, multiple: int) -> int:
    """The least multiple that is not below the number."""
    return -(-number // multiple) * multiple


def _write(
    words: np.ndarray, change: ChangedTokens, token_ids: Sequence[int], vocab_size: int
) -> None:
    """Writes a position's words for the tokens that change. The last one is repeated to the end."""
    penalties = [change.repetition, change.presence, change.frequency]
    words[:ADJUST_HEAD] = np.array(penalties, np.float32).view(np.uint32)
    tokens = words[ADJUST_HEAD:].reshape(-1, ADJUST_TOKEN)
    n_tokens = len(token_ids)
    if not n_tokens:
        tokens[:, 0] = vocab_size
        return
    tokens[:n_tokens, 0] = token_ids
    repeated = set(change.repeated)
    present = set(change.present)
    biases = [change.biases.get(token, 0.0) for token in token_ids]
    tokens[:n_tokens, 1] = np.array(biases, np.float32).view(np.uint32)
    counts = []
    for token in token_ids:
        count = OCCURS * change.occurrences.get(token, 0)
        if token in repeated:
            count |= REPEATED
        if token in present:
            count |= PRESENT
        counts.append(count)
    tokens[:n_tokens, 2] = counts
    tokens[n_tokens:] = tokens[n_tokens - 1]


class _Tokens(NamedTuple):
    """An adjustment as arrays of R positions, the latest token among the others.

    Attributes:
        ids: (R, K + 1) uint32, V where there is none.
        biases: (R, K + 1) float32.
        counts: (R, K + 1) uint32.
        penalties: (R, ADJUST_HEAD) float32.
    """

    ids: mx.array
    biases: mx.array
    counts: mx.array
    penalties: mx.array


def _unpacked(adjustment: Adjustment, vocab_size: int) -> _Tokens:
    words = adjustment.words
    tokens = words[:, ADJUST_HEAD:].reshape(len(words), -1, ADJUST_TOKEN)
    ids = tokens[..., 0]
    biases = tokens[..., 1].view(mx.float32)
    counts = tokens[..., 2]
    latest = adjustment.latest[:, None]
    is_latest = ids == latest
    with_latest = (counts | REPEATED | PRESENT) + OCCURS
    counts = mx.where(is_latest, with_latest, counts)
    # The latest token has a place of its own, unless it is one of the others.
    is_known = is_latest.any(axis=1, keepdims=True)
    other = mx.where(is_known, vocab_size, latest).astype(mx.uint32)
    no_bias = mx.zeros(other.shape)
    once = mx.full(other.shape, REPEATED + PRESENT + OCCURS, mx.uint32)
    return _Tokens(
        ids=mx.concatenate([ids, other], axis=1),
        biases=mx.concatenate([biases, no_bias], axis=1),
        counts=mx.concatenate([counts, once], axis=1),
        penalties=words[:, :ADJUST_HEAD].view(mx.float32),
    )


def probed_for(scores: mx.array, adjustment: Adjustment, clustered: ClusteredRows) -> mx.array:
    """The scores (R, C), raised for the clusters of tokens that change, so that they are probed."""
    ids = _unpacked(adjustment, clustered.vocab_size).ids
    clusters = _slots(ids, clustered) // clustered.cluster_size
    # A place without a token raises a column that is cut off.
    column = mx.zeros((len(scores), 1))
    padded = mx.concatenate([scores, column], axis=-1)
    clusters = mx.where(ids < clustered.vocab_size, clusters, clustered.n_clusters)
    top = mx.array(ALWAYS_PROBED, mx.float32)
    raised = mx.put_along_axis(padded, clusters, top, axis=-1)
    return raised[:, :-1]


def _slots(ids: mx.array, clustered: ClusteredRows) -> mx.array:
    """The slots of tokens (R, K), any slot for V: (R, K)."""
    return mx.take(clustered.slot_of, mx.minimum(ids, clustered.vocab_size - 1))


def adjusted_logits(
    logits: mx.array, probes: mx.array, adjustment: Adjustment, clustered: ClusteredRows
) -> mx.array:
    """Returns the scored logits (R, p, n) after biases and penalties.

    Args:
        logits: The scored logits (R, p, n).
        probes: The clusters (R, p), which hold all tokens that change.
        adjustment: The biases and penalties.
        clustered: The rows.
    """
    size = clustered.cluster_size
    tokens = _unpacked(adjustment, clustered.vocab_size)
    slots = _slots(tokens.ids, clustered)
    is_its = probes[:, None, :] == (slots // size)[..., None]
    index = mx.argmax(is_its, axis=-1) * size + slots % size
    nothing = mx.zeros((len(logits), 1), logits.dtype)
    flat = mx.concatenate([logits.flatten(1), nothing], axis=1)
    # Places that hold no token go there.
    nowhere = flat.shape[1] - 1
    index = mx.where(tokens.ids < clustered.vocab_size, index, nowhere)
    before = mx.take_along_axis(flat, index, axis=1)
    changed = _changed(before, tokens, adjustment.most_occurrences)
    flat = mx.put_along_axis(flat, index, changed, axis=1)
    return flat[:, :-1].reshape(logits.shape)


def _changed(logits: mx.array, tokens: _Tokens, most_occurrences: int) -> mx.array:
    """The logits (R, K) of the tokens by the operations of mlx-lm, in their dtype."""
    dtype = logits.dtype
    counts = tokens.counts
    repetition, presence, frequency = mx.split(tokens.penalties.astype(dtype), 3, axis=1)
    logits = logits + tokens.biases.astype(dtype)
    repeated = mx.where(logits < 0, logits * repetition, logits / repetition)
    logits = mx.where((counts & REPEATED) != 0, repeated, logits)
    logits = mx.where((counts & PRESENT) != 0, logits - presence, logits)
    for i in range(most_occurrences):
        logits = mx.where(counts >= OCCURS * (i + 1), logits - frequency, logits)
    finite = mx.finfo(dtype)
    # A bias may be infinite.
    return mx.clip(logits, finite.min, finite.max)
