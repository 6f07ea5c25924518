"""Each kernel beside MLX's own operations, at the shapes and with the templates of a head.

What runs here is compiled here, and nothing is compiled afterwards.
"""

import re
from collections.abc import Iterator
from textwrap import shorten
from typing import NamedTuple, cast

import mlx.core as mx

from .adjustment import Adjustment, ChangedTokens
from .draw import Draws, DrawSettings, log_mass, position_key, threshold
from .logit_map import LogitMap
from .lowest_kept import NAME, lowest_kept
from .metal_steps import MetalSteps
from .proposal import Candidates, Proposal, Selection, Tolerance
from .steps import PortableSteps, mapped_mass

# Allowed difference, relative to the size of the products: only the order of additions and the
# rounding of results differ. A lane that is left out changes a product by a sixth of its size.
UNITS = 2
LEAST = 1e-3

# The constants of the same names in metal/flash_head/constants.h.
SELECT_BINS = 4096
BINS_PER_NAT = 64.0
CERTAIN = 1e29

DRAWN = 4 * (
    DrawSettings(),
    DrawSettings(temperature=1.0),
    DrawSettings(temperature=2.0, top_p=0.9),
    DrawSettings(temperature=0.7, top_k=5, min_p=0.02),
)
TOO_MANY = re.compile("greater than +the maximum allowed threads per threadgroup")

Pair = tuple[mx.array, mx.array, float]  # a result, the expected values and the tolerance


class Trouble(NamedTuple):
    """A kernel that cannot be used."""

    sentence: str
    too_many_threads: bool = False  # whether its pipeline allows no threadgroup of its size


def find_trouble(
    steps: MetalSteps, dtype: mx.Dtype, n_probes: int, logit_map: LogitMap
) -> Trouble | None:
    """Runs each kernel: the first that fails, or None. Evaluates.

    Args:
        steps: Of a head.
        dtype: Of the hidden states.
        n_probes: Clusters that are scored.
        logit_map: What the model does to its head's logits. The kernels that know of no such map
            run with the identity only.
    """
    kernel = ""
    try:
        for step in _Trial(steps, dtype, n_probes, logit_map).steps():
            if isinstance(step, str):
                kernel = step
            elif problem := _difference(*step):
                return Trouble(f"the kernel {kernel!r} {problem}")
    # MLX raises this for a text that does not compile, a rejected pipeline, a lost device
    except (RuntimeError, ValueError) as error:
        reason = shorten(str(error), 300, placeholder=" ...").rstrip(".")
        sentence = f"the kernel {kernel!r} does not run on this device ({reason})"
        return Trouble(sentence, TOO_MANY.search(str(error)) is not None)
    return None


def _difference(found: mx.array, expected: mx.array, tolerance: float) -> str | None:
    found = found.astype(mx.float32)
    expected = expected.astype(mx.float32)
    if not mx.isfinite(found).all().item():
        return "returns values that are not finite"
    worst = float((mx.abs(found - expected) - tolerance * mx.abs(expected)).max())
    # the median magnitude, since clusters that are always probed have huge values
    if worst > tolerance * float(mx.median(mx.abs(expected))):
        return f"differs from MLX's own operations by {worst:.3g}"
    return None


class _Trial:
    """A state, and what the kernels and MLX's operations make of it."""

    def __init__(self, steps: MetalSteps, dtype: mx.Dtype, n_probes: int, logit_map: LogitMap):
        self._kernels = steps
        self._plain = PortableSteps(steps.clustered)
        self._n_probes = n_probes
        self._map = logit_map
        width = steps.clustered.rows.hidden_size
        self._hidden = mx.random.normal((1, width), key=mx.random.key(0)).astype(dtype)
        self._in_float32 = self._hidden.astype(mx.float32)  # all sums are, whatever the dtype
        self._rounding = max(LEAST, UNITS * mx.finfo(dtype).eps)

    def steps(self) -> Iterator[str | Pair]:
        """The name of each kernel before it runs, then what it gives."""
        alone = self._map.identity
        yield "route"
        scores = self._kernels.route(self._hidden)
        if alone:
            yield from self._route(scores)
        yield "select"
        selection = self._kernels.select(scores, self._n_probes, False, logit_map=self._map)
        yield from self._selected(scores, selection, self._n_probes)
        yield "select_words"
        with_words = self._kernels.select(scores, self._n_probes, logit_map=self._map)
        yield from self._selected(scores, with_words, self._n_probes)
        yield "score"
        candidates = self._kernels.score(self._hidden, with_words, self._map)
        yield from self._score(with_words, candidates)
        if alone:
            yield "expand"
            expected = self._plain.expand(scores, *self._once(with_words, candidates))
            yield self._kernels.expand(scores, with_words, candidates), expected, self._rounding
        yield "sample"
        yield from self._sample(with_words, candidates)
        token, _ = self._plain.choose(*self._once(with_words, candidates), None)
        proposal = Proposal(
            self._hidden, token, with_words.probes, candidates.logits, mx.zeros(1), None
        )
        if alone:
            yield NAME
            yield from self._lowest_kept()
            yield "join"
            rows = [(1, 0), (0, 0)]
            found = self._kernels.join([proposal] * 2, rows)
            expected_rows = self._plain.join([proposal] * 2, rows)
            for one, other in zip(found, expected_rows, strict=True):
                yield one, other, 0.0
            yield "tolerance"
            shares = {"longest": 1.5, "product": 0.1, "scored": 0.01}
            lengths = self._kernels.tolerances(self._hidden, **shares)
            plainly = self._plain.tolerances(self._hidden, **shares)
            for one, other in zip(lengths, plainly, strict=True):
                yield one, other, LEAST
        yield from self._screen(proposal, None)
        yield from self._adjust(scores)
        masked = self._masked(with_words, candidates, token)
        yield from self._screen(proposal._replace(logits=masked), self._allowed(token))

    def _once(self, selection: Selection, candidates: Candidates) -> tuple[Selection, Candidates]:
        """Each probe once: the kernels repeat the last one where they hold more than there are."""
        probes = selection.probes[:, : self._n_probes]
        logits = candidates.logits[:, : self._n_probes]
        return Selection(probes, unscored=selection.unscored), Candidates(logits)

    def _route(self, scores: mx.array) -> Iterator[Pair]:
        expected = self._plain.route(self._in_float32)
        yield scores, expected, self._rounding
        twice = self._kernels.route(mx.tile(self._hidden, (2, 1)))
        yield twice, mx.tile(expected, (2, 1)), self._rounding

    def _selected(
        self,
        scores: mx.array,
        selection: Selection,
        n_probes: int,
        adjustment: Adjustment | None = None,
    ) -> Iterator[Pair]:
        """As good clusters as MLX's operations find, none of them twice, and what is left."""
        probes = selection.probes[:, :n_probes]
        # distances to the best score as the kernel sees them; see metal/flash_head/select.h
        forced = scores >= CERTAIN
        best = mx.where(forced, mx.finfo(mx.float32).min, scores).max()
        bins = mx.minimum(mx.floor((best - scores) * BINS_PER_NAT), SELECT_BINS - 2)
        bins = mx.where(forced, -1, bins)
        plain = self._plain.select(scores, n_probes, adjustment=adjustment).probes
        found, expected = (
            mx.sort(mx.take_along_axis(bins, ids, axis=-1), axis=-1) for ids in (probes, plain)
        )
        yield found, expected, 0.0
        in_order = mx.sort(probes, axis=-1)
        yield (in_order[:, 1:] == in_order[:, :-1]).sum(), mx.zeros(()), 0.0
        yield cast(mx.array, selection.held_unscored)[:, :2], self._left(scores, probes), LEAST

    def _left(self, scores: mx.array, probes: mx.array) -> mx.array:
        """The best score of the clusters that are not probed, and their mass: (R, 2)."""
        n_left = scores.shape[-1] - probes.shape[-1]
        if not n_left:
            return mx.full((len(scores), 2), mx.finfo(mx.float32).min)
        probed = mx.put_along_axis(mx.zeros_like(scores), probes, mx.array(1.0), axis=-1)
        others = mx.argsort(probed, axis=-1)[:, :n_left]
        left = mx.take_along_axis(scores, others, axis=-1)
        mass = mapped_mass(left, self._map, self._kernels.clustered.cluster_size)
        return mx.concatenate([mx.max(left, axis=-1, keepdims=True), mass], axis=-1)

    def _score(self, selection: Selection, candidates: Candidates) -> Iterator[Pair]:
        once, found = self._once(selection, candidates)
        lowest = mx.finfo(found.logits.dtype).min  # of padded slots
        if self._kernels.reads_rows:
            # in the dtype that the model's own operations see
            raw = self._plain.score(self._in_float32, once).logits
            raw = raw.astype(self._kernels.clustered.rows.logits_dtype(self._hidden.dtype))
            ids = self._plain.token_ids(once.probes)
            padded = ids == self._kernels.clustered.vocab_size
            expected = mx.where(padded, lowest, self._map(raw))
            yield found.logits, mx.maximum(expected, lowest), self._rounding
        yield cast(mx.array, candidates.best), candidates.logits.max(axis=-1), 0.0

    def _sample(self, selection: Selection, candidates: Candidates) -> Iterator[Pair]:
        """The greedy token, and draws with each kind of filter."""
        once = self._once(selection, candidates)
        choose = self._kernels.choose
        plainly = self._plain.choose
        token, _ = choose(selection, candidates, None, logit_map=self._map)
        yield token, plainly(*once, None)[0], 0.0
        n_other = mx.array(0)
        for position, settings in enumerate(DRAWN):
            draws = Draws.of([(settings, position_key(0, position))])
            drawn, risk = choose(selection, candidates, draws, logit_map=self._map)
            expected_token, expected_risk = plainly(*once, draws, logit_map=self._map)
            n_other += drawn != expected_token
            yield risk, expected_risk, self._rounding
        yield mx.maximum(n_other - 1, 0), mx.zeros(1), 0.0  # rounding may move a token over a limit

    def _lowest_kept(self) -> Iterator[Pair]:
        vocab_size = self._kernels.clustered.vocab_size
        rows = [(settings, position_key(0, 0)) for settings in DRAWN[:4]]
        logits = mx.random.normal((len(rows), vocab_size), scale=3, key=mx.random.key(1))
        draws = Draws.of(rows)
        total = log_mass(logits)
        threads = self._kernels.row_threads
        settings, top_k, _ = draws.held
        found = lowest_kept(logits, settings, top_k, total, threads)
        expected = threshold(logits, draws, total, kernel=False)
        n_found, n_expected = ((logits >= lowest).sum(axis=-1) for lowest in (found, expected))
        # rounding may move a token over a limit
        allowed = 1 + mx.maximum(n_found, n_expected) // 1000
        n_other = mx.maximum(mx.abs(n_found.astype(mx.int32) - n_expected) - allowed, 0)
        yield n_other, mx.zeros(len(rows)), 0.0

    def _adjust(self, scores: mx.array) -> Iterator[str | Pair]:
        """Biases and penalties, and a mask: each alone and both."""
        clustered = self._kernels.clustered
        vocab_size = clustered.vocab_size
        tokens = [i for i in (1, 5, 7) if i < vocab_size]
        changes = ChangedTokens(
            repetition=1.3,
            presence=0.5,
            frequency=0.25,
            biases=dict.fromkeys(tokens[:1], 2.0),
            repeated=tokens,
            present=tokens,
            occurrences=dict.fromkeys(tokens, 2),
        )
        adjustment = Adjustment.of([changes], mx.array([0], mx.uint32), vocab_size)
        n_probes = min(self._n_probes + adjustment.n_tokens, clustered.n_clusters)
        yield "select_forced"
        selection = self._kernels.select(
            scores, n_probes, False, logit_map=self._map, adjustment=adjustment
        )
        yield from self._selected(scores, selection, n_probes, adjustment)
        yield "adjust"
        candidates = self._kernels.score(self._hidden, selection, self._map)
        allowed = self._allowed(mx.array([0], mx.uint32))
        for change, mask in ((adjustment, None), (None, allowed), (adjustment, allowed)):
            found = self._kernels.adjust(selection, candidates, change, mask)
            expected = self._plain.adjust(selection, candidates, change, mask).logits
            yield found.logits, expected, self._rounding
            yield cast(mx.array, found.best), found.logits.max(axis=-1), 0.0

    def _allowed(self, token: mx.array) -> mx.array:
        """A mask of about half the tokens, (1, ⌈V/32⌉) uint32, with ``token`` (1,)."""
        n_words = -(-self._kernels.clustered.vocab_size // 32)
        bits = mx.random.randint(0, 2**31 - 1, (1, n_words), mx.int32, mx.random.key(3))
        bit = mx.left_shift(mx.array(1, mx.uint32), token % 32)
        of_token = mx.where(mx.arange(n_words)[None] == token[:, None] // 32, bit, 0)
        return bits.astype(mx.uint32) | of_token.astype(mx.uint32)

    def _masked(self, selection: Selection, candidates: Candidates, token: mx.array) -> mx.array:
        return self._plain.adjust(selection, candidates, None, self._allowed(token)).logits

    def _screen(self, proposal: Proposal, allowed: mx.array | None) -> Iterator[str | Pair]:
        """Two states, of which one is greedy."""
        hidden, tokens, probes, logits = (mx.concatenate([array, array]) for array in proposal[:4])
        both = Proposal(hidden, tokens, probes, logits, mx.zeros(2), None)
        if allowed is not None:
            allowed = mx.concatenate([allowed, allowed])
        slots = self._plain.product(hidden).reshape(2, *self._kernels.clustered.token_ids.shape)
        draws = Draws.of([(settings, position_key(0, 0)) for settings in DRAWN[:2]])
        tolerance = Tolerance(mx.array([0.01, 0.01]), mx.array([0.0, 0.01]))
        expected = self._plain.screen(slots, both, draws, tolerance, 0.0, self._map, allowed)
        yield "screen"
        tallies = self._kernels.tallies(slots, both, draws, tolerance, self._map, allowed)
        largest, best = (tallies[..., i].max(axis=1) for i in range(2))
        yield largest, expected.largest, self._rounding
        yield best, expected.best_unscored, self._rounding
        mass = mx.log(tallies[..., 3].sum(axis=1)) + tallies[:, 0, 8]  # relative to the token's
        yield mass, expected.unscored_mass, self._rounding
        yield "certain"
        found = self._kernels.screen(slots, both, draws, tolerance, 0.0, self._map, allowed)
        for one, other in zip(found, expected, strict=True):
            yield one, other, self._rounding
