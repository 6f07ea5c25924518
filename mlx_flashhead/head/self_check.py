"""Runs each Metal kernel once, at its real shapes, beside plain MLX operations.

For the installation. Nothing else in `head/` evaluates.
"""

from textwrap import shorten

import mlx.core as mx

from .draw import Draws, DrawSettings, position_key
from .kernels import MetalSteps
from .portable import PortableSteps
from .steps import Candidates, Selection

# Allowed difference, relative to the size of the products. All sums are float32: only the order of
# the additions and the rounding of the result differ. A lane that is left out changes a product by
# a sixth of its size.
UNITS = 2  # of rounding
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

KERNELS = ("route", "select", "select_words", "score", "expand", "sample")
Pairs = list[tuple[mx.array, mx.array, float]]  # results, expected values and tolerances


def find_trouble(steps: MetalSteps, dtype: mx.Dtype, n_probes: int) -> str | None:
    """The trouble with the kernels on this device, in words that follow "because"; or None.

    Each kernel is built, for one position and for several.

    Args:
        dtype: Of the model's hidden states.
    """
    trial = _Trial(steps, dtype, n_probes)
    for name in KERNELS:
        try:
            for found, expected, tolerance in getattr(trial, name)():
                problem = _difference(found, expected, tolerance)
                if problem is not None:
                    return f"the kernel {name!r} {problem}"
        # MLX raises this for a text that does not compile, a refused pipeline, a lost device
        except (RuntimeError, ValueError) as error:
            said = shorten(str(error), 300, placeholder=" ...").rstrip(".")
            return f"the kernel {name!r} does not run on this device ({said})"
    return None


def _difference(found: mx.array, expected: mx.array, tolerance: float) -> str | None:
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    if not mx.isfinite(found).all().item():
        return "returns values that are not finite"
    worst = float((mx.abs(found - expected) - tolerance * mx.abs(expected)).max())
    # the median magnitude, since always probed clusters have huge values
    if worst > tolerance * float(mx.median(mx.abs(expected))):
        return f"differs from MLX's own operations by {worst:.3g}"
    return None


class _Trial:
    """A method for each kernel runs it. Each takes the results of the one before."""

    def __init__(self, steps: MetalSteps, dtype: mx.Dtype, n_probes: int):
        self.steps, self.n_probes = steps, n_probes
        self.plain = PortableSteps(steps.clustered)
        self.clustered = steps.clustered
        shape = (1, self.clustered.hidden_size)
        self.hidden = mx.random.normal(shape, key=mx.random.key(0)).astype(dtype)
        self.in_float32 = self.hidden.astype(mx.float32)  # all sums are, whatever the dtype
        self.rounding = max(LEAST, UNITS * mx.finfo(dtype).eps)

    def route(self) -> Pairs:
        self.scores = self.steps.route(self.hidden)
        several = self.steps.route(mx.tile(self.hidden, (2, 1)))
        return [
            (self.scores, self.plain.route(self.in_float32), self.rounding),
            (several, mx.tile(self.scores, (2, 1)), self.rounding),
        ]

    def select(self) -> Pairs:
        self.of_token = self.steps.select(self.scores, self.n_probes, words=False)
        probes = self.of_token.probes[:, : self.n_probes]
        self.unscored = self.steps.unscored(self.scores, self.of_token)
        bins = _bins(self.scores)
        found = mx.sort(mx.take_along_axis(bins, probes, axis=-1), axis=-1)
        repeated = (probes[:, 1:] == probes[:, :-1]).sum()
        left = mx.put_along_axis(self.scores, probes, mx.array(-mx.inf), axis=-1)
        unscored = mx.stack([left.max(axis=-1), mx.logsumexp(left, axis=-1)], axis=-1)
        return [
            (found, mx.sort(bins, axis=-1)[:, : self.n_probes], 0.0),
            (repeated, mx.zeros(()), 0.0),
            (self.unscored, mx.maximum(unscored, mx.finfo(mx.float32).min), LEAST),
        ]

    def select_words(self) -> Pairs:
        self.selection = self.steps.select(self.scores, self.n_probes)
        unscored = self.steps.unscored(self.scores, self.selection)
        probes = (self.selection.probes, self.of_token.probes, 0.0)
        return [probes, (unscored, self.unscored, 0.0)]

    def score(self) -> Pairs:
        self.candidates = self.steps.score(self.hidden, self.selection)
        pairs: Pairs = []
        if self.candidates.best is not None:
            pairs.append((self.candidates.best, self.candidates.logits.max(axis=-1), 0.0))
        if "score" in self.steps.unread:  # no kernel
            return pairs
        selection, scored = self._plain()
        expected = self.plain.score(self.in_float32, selection).logits
        lowest = mx.finfo(scored.logits.dtype).min  # of padded slots
        return [(scored.logits, mx.maximum(expected, lowest), self.rounding), *pairs]

    def expand(self) -> Pairs:
        full = self.steps.expand(self.scores, self.selection, self.candidates)
        return [(full, self.plain.expand(self.scores, *self._plain()), self.rounding)]

    def sample(self) -> Pairs:
        """The greedy token, and draws with each kind of filter."""
        token = self.steps.token(self.selection, self.candidates)
        pairs: Pairs = [(token, self.plain.token(*self._plain()), 0.0)]
        n_other = mx.array(0)
        for position, settings in enumerate(DRAWN):
            last = self.unscored, Draws.of([(settings, position_key(0, position))])
            token, risk = self.steps.choose(self.selection, self.candidates, *last)
            expected, expected_risk = self.plain.choose(*self._plain(), *last)
            n_other += token != expected
            pairs.append((risk, expected_risk, self.rounding))
        # rounding may put a token on the other side of a limit
        return [*pairs, (mx.maximum(n_other - 1, 0), mx.zeros(1), 0.0)]

    def _plain(self) -> tuple[Selection, Candidates]:
        """The probes, which the kernels repeat below 8, each once."""
        probes = self.selection.probes[:, : self.n_probes]
        return Selection(probes), Candidates(self.candidates.logits[:, : self.n_probes])


def _bins(scores: mx.array) -> mx.array:
    """Distances to each row's best score as `select` sees them; see metal/flash_head/select.h."""
    certain = scores >= CERTAIN
    best = mx.where(certain, mx.finfo(mx.float32).min, scores).max(axis=-1, keepdims=True)
    distances = mx.floor((best - scores) * BINS_PER_NAT)
    return mx.where(certain, -1, mx.minimum(distances, SELECT_BINS - 2))
