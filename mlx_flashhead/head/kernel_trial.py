"""Each kernel beside the portable operations, at the shapes and with the templates of a head.

What runs here is compiled here, and nothing is compiled afterwards.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import repeat
from textwrap import shorten
from typing import cast

import mlx.core as mx

from .adjustment import Adjustment, ChangedTokens
from .draws.draw import Draws
from .draws.greedy import Greedy
from .draws.noise import Noise, position_key
from .logit_map import LogitMap
from .metal_operations import MetalOperations, screen_inputs
from .operations import PortableOperations
from .proposal import Candidates, Proposal, Selection, Tolerance, Unscored

# Allowed difference, relative to the size of the products: only the order of additions and the
# rounding of results differ. A lane that is left out changes a product by a sixth of its size.
UNITS = 2
LEAST = 1e-3

# The constants of the same names in metal/flash_head/constants.h.
SELECT_BINS = 4096
BINS_PER_NAT = 64.0
CERTAIN = 1e29

DRAWS_TRIED = (
    Greedy(),
    Noise(temperature=1.0),
    Noise(temperature=2.0, top_p=0.9),
    Noise(temperature=0.7, top_k=5, min_p=0.02),
)
N_DRAWN = 16
# Kernels that know of no map.
WITHOUT_MAP = ("expand", "tolerance")
# What MLX says of a pipeline that allows no threadgroup of its size.
TOO_MANY_THREADS = "greater than the maximum allowed threads per threadgroup"

# A result, the expected values and the tolerance.
Pair = tuple[mx.array, mx.array, float]


def find_trouble(
    operations: MetalOperations, dtype: mx.Dtype, n_probes: int, logit_map: LogitMap
) -> str | None:
    """Runs each kernel: what the first one does that fails, or None. Evaluates.

    Args:
        operations: Of a head.
        dtype: Of the hidden states.
        n_probes: Clusters that are scored.
        logit_map: What the model does to its head's logits. The kernels that know of no such map
            run with the identity only.
    """
    trial = _Trial(operations, dtype, n_probes, logit_map)
    for kernel, pairs_of in trial.kernels():
        try:
            for found, expected, tolerance in pairs_of():
                problem = _difference(found, expected, tolerance)
                if problem is not None:
                    return f"the kernel {kernel!r} {problem}"
        # MLX raises this for a text that does not compile, a rejected pipeline, a lost device.
        except (RuntimeError, ValueError) as error:
            reason = shorten(str(error), 300, placeholder=" ...").rstrip(".")
            return f"the kernel {kernel!r} does not run on this device ({reason})"
    return None


def _difference(found: mx.array, expected: mx.array, tolerance: float) -> str | None:
    found = found.astype(mx.float32)
    expected = expected.astype(mx.float32)
    if not mx.isfinite(found).all().item():
        return "returns values that are not finite"
    sizes = mx.abs(expected)
    beyond = mx.abs(found - expected) - tolerance * sizes
    worst = float(beyond.max())
    # The median size counts, since clusters that are always probed have huge values.
    if worst > tolerance * float(mx.median(sizes)):
        return f"differs from MLX's own operations by {worst:.3g}"
    return None


class _Trial:
    """A state, and what the kernels and the portable operations make of it.

    Each method runs one kernel, and keeps what the next ones take from it.
    """

    def __init__(
        self, operations: MetalOperations, dtype: mx.Dtype, n_probes: int, logit_map: LogitMap
    ):
        self._kernels = operations
        self._plain = PortableOperations(operations.clustered)
        self._n_probes = n_probes
        self._map = logit_map
        shape = 1, operations.clustered.rows.hidden_size
        state = mx.random.normal(shape, key=mx.random.key(0))
        self._hidden = state.astype(dtype)
        # All sums are in float32, whatever the dtype.
        self._in_float32 = self._hidden.astype(mx.float32)
        self._rounding = max(LEAST, UNITS * mx.finfo(dtype).eps)

    def kernels(self) -> list[tuple[str, Callable[[], Iterable[Pair]]]]:
        """The kernels, each with what compares its results, in the order in which they run."""
        tried: list[tuple[str, Callable[[], Iterable[Pair]]]] = [
            ("route", self._route),
            ("select", partial(self._select, words=False)),
            ("select_words", partial(self._select, words=True)),
            ("score", self._score),
            ("expand", self._expand),
            ("sample", self._sample),
            ("join", self._join),
            ("tolerance", self._tolerance),
            ("screen", partial(self._screen, masked=False)),
            ("certain", self._certain),
            ("select_forced", self._select_forced),
            ("adjust", self._adjust),
            ("screen", partial(self._screen, masked=True)),
            ("certain", self._certain),
        ]
        if self._map.identity:
            return tried
        return [each for each in tried if each[0] not in WITHOUT_MAP]

    def _route(self) -> Iterator[Pair]:
        """The scores of one state, and of two."""
        self._scores = self._kernels.route(self._hidden)
        expected = self._plain.route(self._in_float32)
        yield self._scores, expected, self._rounding
        both = mx.tile(self._hidden, (2, 1))
        yield self._kernels.route(both), mx.tile(expected, (2, 1)), self._rounding

    def _select(self, words: bool) -> Iterator[Pair]:
        """The best clusters."""
        self._selection = self._kernels.select(
            self._scores, self._n_probes, words, logit_map=self._map
        )
        return self._selected(self._selection, self._n_probes)

    def _select_forced(self) -> Iterator[Pair]:
        """Clusters that are best, or hold a token that biases and penalties change."""
        clustered = self._kernels.clustered
        tokens = [i for i in (1, 5, 7) if i < clustered.vocab_size]
        changes = ChangedTokens(
            repetition=1.3,
            presence=0.5,
            frequency=0.25,
            biases=dict.fromkeys(tokens[:1], 2.0),
            repeated=tokens,
            present=tokens,
            occurrences=dict.fromkeys(tokens, 2),
        )
        latest = mx.array([0], mx.uint32)
        self._adjustment = Adjustment.of([changes], latest, clustered.vocab_size)
        n_probes = min(self._n_probes + self._adjustment.n_tokens, clustered.n_clusters)
        self._forced = self._kernels.select(
            self._scores, n_probes, False, logit_map=self._map, adjustment=self._adjustment
        )
        return self._selected(self._forced, n_probes, self._adjustment)

    def _adjust(self) -> Iterator[Pair]:
        """Biases and penalties, and a mask: each alone and both."""
        candidates = self._kernels.score(self._hidden, self._forced, self._map)
        allowed = self._allowed(0)
        cases = ((self._adjustment, None), (None, allowed), (self._adjustment, allowed))
        for change, mask in cases:
            found = self._kernels.adjust(self._forced, candidates, change, mask)
            expected = self._plain.adjust(self._forced, candidates, change, mask).logits
            yield found.logits, expected, self._rounding
            yield cast(mx.array, found.best), found.logits.max(axis=-1), 0.0

    def _selected(
        self, selection: Selection, n_probes: int, adjustment: Adjustment | None = None
    ) -> Iterator[Pair]:
        """As good clusters as the portable operation finds, none twice, and what is left."""
        scores = self._scores
        probes = selection.probes[:, :n_probes]
        # The kernel sees distances to the best score in bins; see metal/flash_head/select.h.
        forced = scores >= CERTAIN
        best = mx.where(forced, mx.finfo(mx.float32).min, scores).max()
        bins = mx.floor((best - scores) * BINS_PER_NAT)
        bins = mx.minimum(bins, SELECT_BINS - 2)
        bins = mx.where(forced, -1, bins)
        plain = self._plain.select(scores, n_probes, logit_map=self._map, adjustment=adjustment)
        found = mx.take_along_axis(bins, probes, axis=-1)
        expected = mx.take_along_axis(bins, plain.probes, axis=-1)
        yield mx.sort(found, axis=-1), mx.sort(expected, axis=-1), 0.0
        in_order = mx.sort(probes, axis=-1)
        n_twice = (in_order[:, 1:] == in_order[:, :-1]).sum()
        yield n_twice, mx.zeros(()), 0.0
        unscored = cast(Unscored, plain.unscored)
        left = mx.concatenate([unscored.best, cast(mx.array, unscored.mass)], axis=-1)
        found_left = cast(mx.array, selection.unscored_input)[:, :2]
        # Of the clusters in the last bin others may be left.
        allowed = max(1.0, self._map.slope) / BINS_PER_NAT + LEAST * mx.abs(left)
        beyond = mx.abs(found_left - left) - allowed
        yield mx.maximum(beyond, 0.0), mx.zeros_like(left), 0.0

    def _score(self) -> Iterator[Pair]:
        """The logits of the clusters' tokens, and the best one of each cluster."""
        candidates = self._kernels.score(self._hidden, self._selection, self._map)
        self._candidates = candidates
        # Each probe is there once: the kernels repeat the last one where they hold more than there
        # are.
        probes = self._selection.probes[:, : self._n_probes]
        self._once = Selection(probes, unscored=self._selection.unscored)
        self._once_scored = Candidates(candidates.logits[:, : self._n_probes])
        found = self._once_scored.logits
        if self._kernels.reads_rows:
            # The model's own operations see the products in this dtype.
            dtype = self._kernels.clustered.rows.logits_dtype(self._hidden.dtype)
            products = self._plain.score(self._in_float32, self._once).logits
            ids = self._plain.token_ids(probes)
            padded = ids == self._kernels.clustered.vocab_size
            lowest = mx.finfo(found.dtype).min
            expected = mx.where(padded, lowest, self._map(products.astype(dtype)))
            yield found, mx.maximum(expected, lowest), self._rounding
        yield cast(mx.array, candidates.best), candidates.logits.max(axis=-1), 0.0

    def _expand(self) -> Iterator[Pair]:
        """The logits of all tokens."""
        found = self._kernels.expand(self._scores, self._selection, self._candidates)
        expected = self._plain.expand(self._scores, self._once, self._once_scored)
        yield found, expected, self._rounding

    def _sample(self) -> Iterator[Pair]:
        """Greedy tokens, and draws with each filter."""
        n_other = mx.array(0)
        for position in range(N_DRAWN):
            settings = DRAWS_TRIED[position % len(DRAWS_TRIED)]
            draws = Draws.of([(settings, position_key(0, position))])
            token, risk = self._kernels.choose(
                self._selection, self._candidates, draws, logit_map=self._map
            )
            expected, expected_risk = self._plain.choose(
                self._once, self._once_scored, draws, logit_map=self._map
            )
            yield risk, expected_risk, self._rounding
            if settings.greedy:
                yield token, expected, 0.0
                self._proposal = Proposal(
                    self._hidden,
                    token,
                    self._selection.probes,
                    self._candidates.logits,
                    mx.zeros(1),
                )
            n_other += token != expected
        # Rounding may move one token over a limit.
        yield mx.maximum(n_other - 1, 0), mx.zeros(1), 0.0

    def _join(self) -> Iterable[Pair]:
        """Positions of two proposals, in another order."""
        positions = [(1, 0), (0, 0)]
        sources = [self._proposal, self._proposal]
        joined = self._kernels.join(sources, positions)
        return zip(joined, self._plain.join(sources, positions), repeat(0.0))

    def _tolerance(self) -> Iterable[Pair]:
        """How far logits may be off."""
        shares = {"longest": 1.5, "product": 0.1, "scored": 0.01}
        found = self._kernels.tolerances(self._hidden, **shares)
        return zip(found, self._plain.tolerances(self._hidden, **shares), repeat(LEAST))

    def _allowed(self, token: int) -> mx.array:
        """A mask of about half the tokens, (1, ⌈V/32⌉) uint32, with ``token``."""
        n_words = -(-self._kernels.clustered.vocab_size // 32)
        words = [0] * n_words
        words[::2] = [0xFFFFFFFF] * len(words[::2])
        words[token // 32] = 0xFFFFFFFF
        return mx.array([words], mx.uint32)

    def _screen(self, masked: bool) -> Iterator[Pair]:
        """The first kernel of a screen, for two states of which one is greedy."""
        proposal = self._proposal
        allowed = None
        if masked:
            mask = self._allowed(cast(int, proposal.tokens.item()))
            ruled_out = self._plain.adjust(self._selection, self._candidates, None, mask)
            proposal = proposal._replace(logits=ruled_out.logits)
            allowed = mx.concatenate([mask, mask])
        both = Proposal._make(mx.concatenate([array, array]) for array in proposal)
        slots = self._plain.product(both.hidden)
        slots = slots.reshape(2, *self._kernels.clustered.token_ids.shape)
        draws = Draws.of([(settings, position_key(0, 0)) for settings in DRAWS_TRIED[:2]])
        tolerance = Tolerance(mx.array([0.01, 0.01]), mx.array([0.0, 0.01]))
        self._screened = slots, both, draws, tolerance, 0.0, self._map, allowed
        expected = self._plain.screen(*self._screened)
        self._expected = expected
        inputs = screen_inputs(both, tolerance)
        tallies = self._kernels.tallies(slots, inputs, draws, self._map, allowed)
        largest = tallies[..., 0].max(axis=1)
        yield largest, expected.largest, self._rounding
        best = tallies[..., 1].max(axis=1)
        yield best, expected.best_unscored, self._rounding
        # The mass is relative to the token's.
        mass = mx.log(tallies[..., 3].sum(axis=1)) + tallies[:, 0, 8]
        yield mass, expected.unscored_mass, self._rounding

    def _certain(self) -> Iterable[Pair]:
        """Both, whose second one takes what the first one has found."""
        found = self._kernels.screen(*self._screened)
        return zip(found, self._expected, repeat(self._rounding))
