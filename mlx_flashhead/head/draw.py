"""The draw of a token: temperature, top-k, top-p and min-p, with noise that belongs to each token.

    token = argmax over the kept tokens of logit / temperature + noise(seed, position, token)

So the scored tokens, all tokens and a kernel draw the same token wherever they see the same logits.
Filters see the logits at temperature 1, as mlx-lm's do, and each of them is a threshold. A
temperature of 0 takes the best logit.

Source: Gumbel 1954, the Gumbel-max trick; Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3", for Threefry, which is MLX's generator.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import mlx.core as mx

from .lowest_kept import kernel_is_used, lowest_kept
from .short_inputs import HELD

NO_MIN_P = -1e30
BELOW_ONE = 1 - 2.0**-24  # the float32 number below 1

# Logits that are sorted at once: halving more of them takes more operations, which a CPU feels.
SORTED = 65536
MANY_LOGITS = 8192  # from here on powers of two are faster on a CPU, in more operations


@dataclass(frozen=True)
class DrawSettings:
    """The settings by which a sampler draws a token."""

    temperature: float = 0.0  # 0 takes the best logit
    top_p: float = 1.0  # keep the likeliest tokens that together have this probability
    min_p: float = 0.0  # keep tokens of at least this share of the best one's probability
    top_k: int = 0  # keep so many of the best tokens, and those that equal the last; 0 keeps all
    # Whether top-p adds up probabilities from the least likely on, as mlx-lm 0.31 does. Its own
    # sampler draws then; :class:`Draws` have the cut of 0.32, which is near.
    sums_from_least: bool = False
    # Whether a uniform number's place among the probabilities chooses the token, as mlx-lm's
    # samplers draw (inverse_cdf.py). Otherwise noise decides.
    inverse_cdf: bool = False
    # The row, and of how many, of a batch that MLX draws at once, as mlx-lm's samplers do for
    # several texts: its noise is that of ``mx.random.gumbel``. None: this package's own.
    batch: tuple[int, int] | None = None

    @property
    def greedy(self) -> bool:
        """Whether the best logit is taken."""
        return self.temperature == 0

    @property
    def filters(self) -> bool:
        """Whether top-p, min-p or top-k leaves tokens out."""
        return self.top_p < 1 or self.min_p > 0 or self.top_k > 0


@dataclass(frozen=True, eq=False)
class Draws:
    """The draws of R rows.

    Attributes:
        rows: The settings of each.
        held: The same as arrays of n ≥ R rows, the last one repeated, as kernels read them. First
            (n, 3) float32, with the columns 1 / temperature (0: the best logit), top_p and
            log(min_p). Then (n,) uint32, top_k; 0 keeps all. Then (n, 2) uint32, the key of each
            row's seed and position, or for an inverse CDF the bits of its number and 0.
        uniform: (R, V) float32, the numbers of rows that MLX draws at once; None without such.
    """

    rows: tuple[DrawSettings, ...]
    held: tuple[mx.array, mx.array, mx.array]
    uniform: mx.array | None = None

    @classmethod
    def of(
        cls, rows: Sequence[tuple[DrawSettings, tuple[int, int]]], vocab_size: int = 0
    ) -> "Draws":
        """The draws of some rows, from the settings and the key of each.

        Args:
            rows: R of them.
            vocab_size: The number of tokens V, for rows that MLX draws at once.
        """
        settings = tuple([settings for settings, _ in rows])
        keys = [key for _, key in rows]
        keys += [keys[-1]] * (HELD - len(rows))
        held = (*_settings_arrays(settings), mx.array(keys, mx.uint32))
        drawn_at_once = any(each.batch is not None for each in settings)
        return cls(settings, held, _uniform_of_batches(rows, vocab_size) if drawn_at_once else None)

    @classmethod
    def of_arrays(cls, rows: tuple[DrawSettings, ...], arrays: Sequence[mx.array]) -> "Draws":
        """The draws that had these :attr:`steps` and :attr:`arrays`."""
        settings, top_k, keys, *uniform = arrays
        return cls(rows, (settings, top_k, keys), uniform[0] if uniform else None)

    @cached_property
    def inverse_temperature(self) -> mx.array:
        """1 / temperature, (R, 1) float32; 0 takes the best logit."""
        return self.held[0][: len(self.rows), :1]

    @cached_property
    def top_p(self) -> mx.array:
        """The share of the mass that the likeliest tokens must reach, (R, 1) float32."""
        return self.held[0][: len(self.rows), 1:2]

    @cached_property
    def log_min_p(self) -> mx.array:
        """How far a kept logit may lie below the best one, (R, 1) float32, in nats below 0."""
        return self.held[0][: len(self.rows), 2:]

    @cached_property
    def top_k(self) -> mx.array:
        """The number of best tokens that are kept, (R, 1) uint32; 0 keeps all."""
        return self.held[1][: len(self.rows), None]

    @cached_property
    def keys(self) -> mx.array:
        """The keys of the rows, (R, 2) uint32."""
        return self.held[2][: len(self.rows)]

    @cached_property
    def numbers(self) -> mx.array:
        """The uniform numbers of rows with an inverse CDF, (R, 1) float32."""
        return self.held[2][: len(self.rows), :1].view(mx.float32)

    @property
    def arrays(self) -> list[mx.array]:
        """What a function of these draws depends on beside :attr:`steps`."""
        return [*self.held] if self.uniform is None else [*self.held, self.uniform]

    @cached_property
    def any_greedy(self) -> bool:
        """Whether a row takes the best logit."""
        return any(row.greedy for row in self.rows)

    @cached_property
    def any_top_p(self) -> bool:
        """Whether a row has a top-p."""
        return any(row.top_p < 1 for row in self.rows)

    @cached_property
    def most_top_k(self) -> int:
        """The largest top-k of a row; 0 without any."""
        return max((row.top_k for row in self.rows), default=0)

    @cached_property
    def any_min_p(self) -> bool:
        """Whether a row has a min-p."""
        return any(row.min_p > 0 for row in self.rows)

    @property
    def as_mlx_lm(self) -> bool:
        """Whether a row is drawn as mlx-lm's samplers draw, for which there is no kernel."""
        return self.any_by_number or self.uniform is not None

    @property
    def any_by_number(self) -> bool:
        """Whether a row has an inverse CDF."""
        return any(row.inverse_cdf for row in self.rows)

    def noise(self, token_ids: mx.array) -> mx.array:
        """Gumbel noise of tokens: ids (R, K) uint32 → (R, K) float32."""
        if self.uniform is None:
            return noise(self.keys, token_ids)
        # that of a padded slot does not matter
        ids = mx.minimum(token_ids, self.uniform.shape[-1] - 1)
        of_batches = _gumbel(mx.take_along_axis(self.uniform, ids, axis=-1))
        return self._where_in_batch(of_batches, lambda: noise(self.keys, token_ids))

    def noise_of_all(self, vocab_size: int) -> mx.array:
        """Gumbel noise of tokens 0 … V-1: (R, V) float32."""
        if self.uniform is None:
            return noise_of_all(self.keys, vocab_size)
        return self._where_in_batch(
            _gumbel(self.uniform), lambda: noise_of_all(self.keys, vocab_size)
        )

    def _where_in_batch(self, of_batches: mx.array, own: Callable[[], mx.array]) -> mx.array:
        in_batch = [row.batch is not None for row in self.rows]
        if all(in_batch):
            return of_batches
        return mx.where(mx.array(in_batch)[:, None], of_batches, own())

    def by_kind(
        self, by_number: Callable[[], mx.array], by_noise: Callable[[], mx.array]
    ) -> mx.array:
        """Takes the first array for rows with an inverse CDF, the second for others: (R,)."""
        if not self.any_by_number:
            return by_noise()
        if all(row.inverse_cdf for row in self.rows):
            return by_number()
        numbered = mx.array([row.inverse_cdf for row in self.rows])
        return mx.where(numbered, by_number(), by_noise())

    @property
    def steps(self) -> tuple[DrawSettings, ...]:
        """Settings that take the same steps, whatever the values in the arrays are."""
        return _same_steps(self.rows)


@lru_cache(maxsize=256)
def _same_steps(rows: tuple[DrawSettings, ...]) -> tuple[DrawSettings, ...]:
    return tuple(
        DrawSettings(
            temperature=1.0 if row.temperature else 0.0,
            top_p=0.5 if row.top_p < 1 else 1.0,
            min_p=0.5 if row.min_p > 0 else 0.0,
            top_k=row.top_k,
            inverse_cdf=row.inverse_cdf,
            batch=None if row.batch is None else (0, 0),
        )
        for row in rows
    )


@lru_cache(maxsize=256)
def _settings_arrays(rows: tuple[DrawSettings, ...]) -> tuple[mx.array, mx.array]:
    """Returns the first two arrays of :class:`Draws`. They stay the same for a text."""
    filled = [*rows, *[rows[-1]] * (HELD - len(rows))]
    floats = []
    for row in filled:
        inverse = 1 / row.temperature if row.temperature else 0.0
        log_min_p = math.log(row.min_p) if row.min_p else NO_MIN_P
        floats.append([inverse, row.top_p, log_min_p])
    return mx.array(floats, mx.float32), mx.array([row.top_k for row in filled], mx.uint32)


def position_key(seed: int, position: int) -> tuple[int, int]:
    """A position's key, two words: SplitMix64 (Steele et al. 2014) of the seed's stream."""
    value = 0
    for number in (seed, position):
        value = (value + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        value ^= value >> 31
    return value >> 32, value & 0xFFFFFFFF


def noise(keys: mx.array, token_ids: mx.array) -> mx.array:
    """Gumbel noise of tokens: keys (R, 2), ids (R, K) uint32 → (R, K) float32.

    Two neighbouring ids share a call of Threefry, which gives two words.
    """
    words = _random_words(_keys_of_pairs(keys.view(mx.uint64), token_ids // 2))
    return _gumbel(_uniform((words >> token_ids % 2 * 32).astype(mx.uint32)))


def noise_of_all(keys: mx.array, vocab_size: int) -> mx.array:
    """Gumbel noise of tokens 0 … V-1: keys (R, 2) → (R, V) float32."""
    pairs = mx.arange(-(-vocab_size // 2), dtype=mx.uint32)
    words = _random_words(_keys_of_pairs(keys.view(mx.uint64), pairs))
    return _gumbel(_uniform(words.view(mx.uint32)[:, :vocab_size]))


def _uniform_of_batches(
    rows: Sequence[tuple[DrawSettings, tuple[int, int]]], vocab_size: int
) -> mx.array:
    """The uniform numbers of rows that MLX draws at once, zeros for others: (R, V) float32.

    Source: ``random::gumbel`` of the shape of all rows' logits in MLX.
    """
    drawn: dict[tuple[tuple[int, int], int], mx.array] = {}
    for settings, key in rows:
        if settings.batch is not None and (key, settings.batch[1]) not in drawn:
            shape = settings.batch[1], vocab_size
            drawn[key, shape[0]] = mx.random.uniform(shape=shape, key=mx.array(key, mx.uint32))
    batches = [settings.batch for settings, _ in rows]
    if len(drawn) == 1 and batches == [(row, len(rows)) for row in range(len(rows))]:
        return next(iter(drawn.values()))
    none = mx.zeros((1, vocab_size))
    numbers = [
        none if batch is None else drawn[key, batch[1]][batch[0] : batch[0] + 1]
        for batch, (_, key) in zip(batches, rows, strict=True)
    ]
    return mx.concatenate(numbers)


def _keys_of_pairs(keys: mx.array, pairs: mx.array) -> mx.array:
    """Adds numbers (R, K) to the first (lower) words of keys (R, 1) uint64, without a carry."""
    first = keys.astype(mx.uint32) + pairs
    return keys >> 32 << 32 | first.astype(mx.uint64)


def _random_words(keys: mx.array) -> mx.array:
    """Two random words of each key, the first one the lower half of a number: (R, K) uint64."""
    words = _two_words(keys.view(mx.uint32).reshape(-1, 2))
    return words.reshape(len(keys), -1).view(mx.uint64)


_two_words = mx.vmap(lambda key: mx.random.split(key, 1))


def _uniform(words: mx.array) -> mx.array:
    """Makes words uniform numbers as ``mx.random.uniform`` does."""
    return mx.minimum(words.astype(mx.float32) * 2.0**-32, BELOW_ONE)


def _gumbel(uniform: mx.array) -> mx.array:
    """Gumbel noise by uniform numbers."""
    return -mx.log(-mx.log(uniform))  # -inf at 0


def log_mass(logits: mx.array) -> mx.array:
    """The log of the summed exponentials: (R, K) float32 → (R, 1)."""
    if logits.shape[-1] < MANY_LOGITS or gpu_is_default():
        return mx.logsumexp(logits, axis=-1, keepdims=True)
    best = mx.maximum(mx.max(logits, axis=-1, keepdims=True), mx.finfo(mx.float32).min)
    powers = mx.power(2.0, (logits - best) * math.log2(math.e))  # exp takes three times as long
    return best + mx.log(powers.sum(axis=-1, keepdims=True))


def threshold(
    logits: mx.array, draws: Draws, log_total: mx.array | None = None, kernel: bool = True
) -> mx.array:
    """The lowest logit that the filters keep: (R, K) float32 → (R, 1).

    Args:
        logits: Of R rows.
        draws: Of R rows.
        log_total: (R, 1), the log of the mass of all tokens; None if these are the K.
        kernel: Whether the kernel may compute it, where it is used.
    """
    if (draws.any_top_p or draws.most_top_k) and kernel and kernel_is_used():
        total = log_mass(logits) if draws.any_top_p and log_total is None else log_total
        return lowest_kept(logits, *draws.held[:2], total)
    return thresholds(logits, draws, [log_total])[0]


def thresholds(
    logits: mx.array, draws: Draws, log_totals: Sequence[mx.array | None]
) -> list[mx.array]:
    """Returns :func:`threshold` for each of several masses of all tokens."""
    lowest = mx.array(-mx.inf)
    if draws.any_min_p:
        lowest = mx.max(logits, axis=-1, keepdims=True) + draws.log_min_p
    if n_top := min(draws.most_top_k, logits.shape[-1]):
        top = mx.sort(mx.partition(logits, -n_top, axis=-1)[:, -n_top:], axis=-1)
        kth = n_top - mx.clip(draws.top_k, 1, n_top)
        by_count = mx.take_along_axis(top, kth, axis=-1)
        lowest = mx.maximum(lowest, mx.where(draws.top_k == 0, -mx.inf, by_count))
    if not draws.any_top_p:
        return [lowest] * len(log_totals)
    return [mx.maximum(lowest, each) for each in _by_mass(logits, draws, log_totals)]


def gpu_is_default() -> bool:
    """Whether MLX computes on an Apple GPU."""
    return mx.metal.is_available() and mx.default_device().type == mx.gpu


def _by_mass(
    logits: mx.array, draws: Draws, log_totals: Sequence[mx.array | None]
) -> list[mx.array]:
    """Returns the lowest logit that top-p keeps, for each mass of all tokens.

    The logits above it have less than ``top_p`` of the mass. They are sorted once; but many logits
    are halved first, for each mass: of each half that holds the lowest one another half is left,
    until they are few enough to sort.
    """
    limit = mx.where(draws.top_p < 1, mx.maximum(draws.top_p, 1e-30), mx.inf)
    if logits.shape[-1] > SORTED:
        return [_by_mass_in_halves(logits, limit, log_total) for log_total in log_totals]
    left = mx.sort(logits, axis=-1)
    first = log_totals[0]
    masses = mx.softmax(left, axis=-1) if first is None else mx.exp(left - first)
    above = mx.cumsum(masses, axis=-1, reverse=True, inclusive=False)
    limits = [limit]
    if first is not None:
        limits += [limit * mx.exp(more - first) for more in log_totals[1:] if more is not None]
    return [_lowest_within(left, above, each) for each in limits]


def _by_mass_in_halves(logits: mx.array, limit: mx.array, log_total: mx.array | None) -> mx.array:
    n_halvings = ((logits.shape[-1] - 1) // SORTED).bit_length()
    left = logits
    total = mx.logsumexp(logits, axis=-1, keepdims=True) if log_total is None else log_total
    if n_more := -logits.shape[-1] % 2**n_halvings:
        left = mx.pad(left, [(0, 0), (0, n_more)], constant_values=-mx.inf)
    for _ in range(n_halvings):
        low, high = mx.split(mx.partition(left, left.shape[-1] // 2, axis=-1), 2, axis=-1)
        below_high = limit - mx.exp(high - total).sum(axis=-1, keepdims=True)
        in_low = below_high > 0
        left = mx.where(in_low, low, high)
        limit = mx.where(in_low, below_high, limit)
    left = mx.sort(left, axis=-1)
    above = mx.cumsum(mx.exp(left - total), axis=-1, reverse=True, inclusive=False)
    return _lowest_within(left, above, limit)


def _lowest_within(logits: mx.array, above: mx.array, limit: mx.array) -> mx.array:
    """The lowest logit with less than ``limit`` of the mass ``above`` it: (R, K) → (R, 1)."""
    return mx.min(mx.where(above < limit, logits, mx.inf), axis=-1, keepdims=True)


def draw(
    logits: mx.array,
    gumbel: mx.array | None,
    draws: Draws | None,
    token_ids: mx.array | None = None,
    others: mx.array | None = None,
    kernel: bool = True,
) -> mx.array:
    """Draws a token of each row: (R,) uint32, of equal values the lowest id.

    Args:
        logits: (R, K) float32.
        gumbel: Noise (R, K). Without it and ``draws`` the best logit is taken, NaN the highest.
        draws: Of R rows.
        token_ids: (R, K) uint32; 0 … V-1 if None.
        others: (R, 1), the log of the mass of the other tokens.
        kernel: As of :func:`threshold`.
    """
    values = logits
    if gumbel is not None and draws is not None:
        inverse = draws.inverse_temperature
        values = logits * inverse + gumbel
        if any(s.filters for s in draws.rows):
            total = None if others is None else mx.logaddexp(log_mass(logits), others)
            values = mx.where(logits >= threshold(logits, draws, total, kernel), values, -mx.inf)
        if draws.any_greedy:
            values = mx.where(inverse == 0, logits, values)
    if token_ids is None:
        return mx.argmax(values, axis=-1)
    return lowest_of_equals(values, mx.max(values, axis=-1, keepdims=True), token_ids)


def lowest_of_equals(values: mx.array, best: mx.array, token_ids: mx.array) -> mx.array:
    """The lowest id of the tokens that have the best value, or NaN: (R, K) → (R,) uint32."""
    highest = (values == best) | mx.isnan(values)  # where one is NaN, no value equals the best
    return mx.min(mx.where(highest, token_ids, mx.array(0xFFFFFFFF, mx.uint32)), axis=-1)


def draw_all(logits: mx.array, rows: Sequence[tuple[DrawSettings, tuple[int, int]]]) -> mx.array:
    """Draws from all tokens, by the settings and the key of each row: (R, V) → (R,) uint32."""
    draws = Draws.of(rows)
    return draw(logits.astype(mx.float32), noise_of_all(draws.keys, logits.shape[-1]), draws)
