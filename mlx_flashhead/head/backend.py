"""Which path a head takes: plain MLX operations, or Metal kernels, which are first tried beside
them at their real shapes."""

import logging
import os
import re
from collections.abc import Iterator
from textwrap import shorten
from typing import cast

import mlx.core as mx

from .adjustment import Adjustment, ChangedTokens, changed_clusters
from .clustered import ClusteredRows, in_token_order
from .draw import Draws, DrawSettings, gpu_is_default, position_key
from .kernels import MIN_PROBES, MetalSteps
from .matrix import Matrix
from .proposal import Candidates, Proposal, Selection, Tolerance
from .steps import PortableSteps, unscored

METAL, PORTABLE = "metal", "mlx"
BACKEND_VARIABLE = "MLX_FLASHHEAD_BACKEND"
COMMAND = "mlx_flashhead.benchmark head --shape 32000,1024 --report"
HOW_TO_REPORT = f"please report this as an issue, with the output of `{COMMAND}`"

log = logging.getLogger("mlx_flashhead")

# Allowed difference, relative to the size of the products: only the order of additions and the
# rounding of results differ. A lane that is left out changes a product by a sixth of its size.
UNITS, LEAST = 2, 1e-3

N_STATES = 3  # whose dense logits are compared
SCORED_AT_ONCE = 1024  # clusters, of which a CPU makes a copy

# The constants of the same names in metal/flash_head/constants.h.
SELECT_BINS, BINS_PER_NAT = 4096, 64.0
CERTAIN = 1e29

DRAWN = 4 * (
    DrawSettings(),
    DrawSettings(temperature=1.0),
    DrawSettings(temperature=2.0, top_p=0.9),
    DrawSettings(temperature=0.7, top_k=5, min_p=0.02),
)

Pair = tuple[mx.array, mx.array, float]  # a result, the expected values and the tolerance


def named_backend(requested: str | None) -> str | None:
    """The path requested by name: ``requested``, else the environment's; None without a name."""
    return requested or os.environ.get(BACKEND_VARIABLE) or None


def choose_backend(requested: str | None = None) -> str:
    """The path to take: the one requested by name, else Metal if MLX computes on an Apple GPU.
    ValueError if the name is unknown, or this machine has no Metal."""
    name = named_backend(requested)
    if name is None:
        return METAL if gpu_is_default() else PORTABLE
    if name not in (METAL, PORTABLE):
        raise ValueError(f"Unknown FlashHead backend {name!r}: choose {METAL} or {PORTABLE}.")
    if name == METAL and not mx.metal.is_available():
        raise ValueError(
            "The FlashHead backend 'metal' needs an Apple GPU and this machine has none: "
            f"use backend='mlx' or unset {BACKEND_VARIABLE}."
        )
    return name


def make_steps(clustered: ClusteredRows, requested: str | None) -> tuple[PortableSteps, str]:
    """The steps of the chosen path, and a sentence: the reason for it, or its slower part."""
    if choose_backend(requested) == PORTABLE:
        reason = "MLX finds no Apple GPU on this machine."
        if named_backend(requested) is not None:
            reason = "The backend 'mlx' was requested."
        elif mx.metal.is_available():
            reason = "MLX's default device is the CPU."
        return PortableSteps(clustered), reason
    steps = MetalSteps(clustered)
    if steps.reads_rows:
        return steps, "MLX computes on an Apple GPU."
    reason = (
        f"FlashHead's Metal kernels do not read {clustered.rows.format} rows: MLX's own operations "
        "do, which takes a few more kernels per token. The other steps are FlashHead's."
    )
    log.warning(reason)
    return steps, reason


def check_kernels(
    steps: PortableSteps, requested: str | None, dtype: mx.Dtype, n_probes: int
) -> str | None:
    """Runs each kernel once: None if all are sound. If one fails, why the portable path has to be
    taken, or a ValueError if "metal" was requested by name."""
    if not isinstance(steps, MetalSteps):
        return None
    kernel, trouble = "", None
    try:
        for step in _trial(steps, dtype, n_probes):
            if isinstance(step, str):
                kernel = step
            elif problem := _difference(*step):
                trouble = f"the kernel {kernel!r} {problem}"
                break
    # MLX raises this for a text that does not compile, a rejected pipeline, a lost device
    except (RuntimeError, ValueError) as error:
        said = shorten(str(error), 300, placeholder=" ...").rstrip(".")
        trouble = f"the kernel {kernel!r} does not run on this device ({said})"
    if trouble is None:
        # those of M1 and M2: a matrix product takes 1.8 times as long (ml-explore/mlx, number 4216)
        emulating = "applegpu_g1[34]"
        if dtype == mx.bfloat16 and re.match(emulating, str(mx.device_info().get("architecture"))):
            steps.float16_rows = steps.clustered.flat_rows().in_float16()
        return None
    if named_backend(requested) == METAL:
        raise ValueError(
            f"FlashHead's Metal kernels cannot be used: {trouble}; use backend='mlx' or unset "
            f"{BACKEND_VARIABLE}, and {HOW_TO_REPORT}."
        )
    instead = "FlashHead takes MLX's own operations instead of its Metal kernels"
    log.warning(reason := f"{instead}, because {trouble}; {HOW_TO_REPORT}.")
    return reason


def _difference(found: mx.array, expected: mx.array, tolerance: float) -> str | None:
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    if not mx.isfinite(found).all().item():
        return "returns values that are not finite"
    worst = float((mx.abs(found - expected) - tolerance * mx.abs(expected)).max())
    # the median magnitude, since always probed clusters have huge values
    if worst > tolerance * float(mx.median(mx.abs(expected))):
        return f"differs from MLX's own operations by {worst:.3g}"
    return None


def _trial(steps: MetalSteps, dtype: mx.Dtype, n_probes: int) -> Iterator[str | Pair]:
    """The name of each kernel before it runs, then what it gives."""
    plain = PortableSteps(steps.clustered)
    width, seed = steps.clustered.rows.hidden_size, mx.random.key(0)
    hidden = mx.random.normal((1, width), key=seed).astype(dtype)
    in_float32 = hidden.astype(mx.float32)  # all sums are, whatever the dtype
    rounding = max(LEAST, UNITS * mx.finfo(dtype).eps)

    yield "route"
    scores = steps.route(hidden)
    yield scores, plain.route(in_float32), rounding
    yield steps.route(mx.tile(hidden, (2, 1))), mx.tile(scores, (2, 1)), rounding

    yield "select"
    single = steps.select(scores, n_probes, words=False)
    probes, left = single.probes[:, :n_probes], cast(mx.array, single.unscored)
    # distances to the best score as the kernel sees them; see metal/flash_head/select.h
    forced = scores >= CERTAIN
    best = mx.where(forced, mx.finfo(mx.float32).min, scores).max()
    bins = mx.minimum(mx.floor((best - scores) * BINS_PER_NAT), SELECT_BINS - 2)
    bins = mx.where(forced, -1, bins)
    found = mx.sort(mx.take_along_axis(bins, probes, axis=-1), axis=-1)
    yield found, mx.sort(bins, axis=-1)[:, :n_probes], 0.0
    yield (probes[:, 1:] == probes[:, :-1]).sum(), mx.zeros(()), 0.0  # none is repeated
    yield left, unscored(scores, probes), LEAST

    yield "select_words"
    selection = steps.select(scores, n_probes)
    yield selection.probes, single.probes, 0.0
    yield cast(mx.array, selection.unscored), left, 0.0

    yield "score"
    candidates = steps.score(hidden, selection)
    # the probes, which the kernels repeat below 8, each once
    once = single._replace(probes=probes), Candidates(candidates.logits[:, :n_probes])
    if steps.reads_rows:
        lowest = mx.finfo(candidates.logits.dtype).min  # of padded slots
        expected = mx.maximum(plain.score(in_float32, once[0]).logits, lowest)
        yield once[1].logits, expected, rounding
    yield cast(mx.array, candidates.best), candidates.logits.max(axis=-1), 0.0

    yield "expand"
    yield steps.expand(scores, selection, candidates), plain.expand(scores, *once), rounding

    yield "sample"  # the greedy token, and draws with each kind of filter
    token, _ = plain.choose(*once, None)
    yield steps.choose(selection, candidates, None)[0], token, 0.0
    n_other = mx.array(0)
    for position, settings in enumerate(DRAWN):
        draws = Draws.of([(settings, position_key(0, position))])
        drawn, risk = steps.choose(selection, candidates, draws)
        expected_token, expected_risk = plain.choose(*once, draws)
        n_other += drawn != expected_token
        yield risk, expected_risk, rounding
    yield mx.maximum(n_other - 1, 0), mx.zeros(1), 0.0  # rounding may move a token over a limit

    yield "join"
    proposal = Proposal(hidden, token, selection.probes, candidates.logits, mx.zeros(1), None)
    rows = [(1, 0), (0, 0)]
    joined = steps.join([proposal] * 2, rows)
    for one, other in zip(joined, plain.join([proposal] * 2, rows), strict=True):
        yield one, other, 0.0

    yield "screen"  # of two states, of which one is greedy
    hidden, probes, logits = joined
    slots = steps.product(hidden).reshape(len(rows), *steps.clustered.token_ids.shape)
    both = Proposal(hidden, mx.tile(token, 2), probes, logits, mx.zeros(2), None)
    draws = Draws.of([(settings, position_key(0, 0)) for settings in DRAWN[:2]])
    tolerance = Tolerance(mx.array([0.01, 0.01]), mx.array([0.0, 0.01]))
    screens = [path.screen(slots, both, draws, tolerance, 0.0) for path in (steps, plain)]
    for one, other in zip(*screens, strict=True):
        yield one, other, rounding
    yield from _trial_of_changes(steps, plain, hidden[:1], scores)


def _trial_of_changes(
    steps: MetalSteps, plain: PortableSteps, hidden: mx.array, scores: mx.array
) -> Iterator[str | Pair]:
    """The kernels for biases, penalties and masks, and that of tolerances."""
    yield "tolerance"
    expected = plain.tolerances(hidden, 1.5, 0.1, 0.01)
    for one, other in zip(steps.tolerances(hidden, 1.5, 0.1, 0.01), expected, strict=True):
        yield one, other, LEAST

    yield "select_forced"
    vocab_size = steps.clustered.vocab_size
    last = vocab_size - 1
    change = ChangedTokens(1.3, 0.5, 0.25, {last: 2.0, 0: -1.0}, frozenset([last]), frozenset([0]))
    worst = mx.min(steps.clustered.token_ids[mx.argmin(scores)])  # a token that is not probed else
    adjustment = Adjustment.of([change], worst.reshape(1), vocab_size)
    n_probes = min(MIN_PROBES, steps.clustered.n_clusters)
    selection = steps.select(scores, n_probes, words=False, adjustment=adjustment)
    clusters = changed_clusters(adjustment, steps.clustered)
    probed = (selection.probes[:, :, None] == clusters[:, None]).any(axis=1)
    yield probed, clusters < steps.clustered.n_clusters, 0.0

    yield "adjust"
    candidates = steps.score(hidden, selection)
    mask = mx.full((1, -(-vocab_size // 32)), 0x55555555, mx.uint32)
    lowest = mx.finfo(candidates.logits.dtype).min
    # the probes that the kernels repeat below 8 are the last
    once = slice(None), slice(n_probes)
    for changes in ((adjustment, None), (None, mask), (adjustment, mask)):
        found = steps.adjust(selection, candidates, *changes).logits[once]
        wanted = plain.adjust(selection, candidates, *changes).logits[once]
        yield mx.where(found == lowest, 0, found), mx.where(wanted == lowest, 0, wanted), 0.0


def check_dense_rows(steps: PortableSteps, rows: Matrix, dtype: mx.Dtype) -> None:
    """Compares the dense logits of single states with those of the model's own rows. Where they are
    not the same numbers, the steps multiply the rows in the model's order from now on. Evaluates.

    Args:
        steps: Of a head made of ``rows``.
        rows: (V, D), in token order.
        dtype: Of the hidden states.
    """
    for seed in range(N_STATES):
        hidden = mx.random.normal((1, rows.hidden_size), key=mx.random.key(seed)).astype(dtype)
        if not mx.array_equal(steps.dense(hidden), rows.matmul(hidden)).item():
            steps.gathers_rows = True
            log.warning(
                "This version of MLX multiplies reordered rows in another order of sums: where "
                "FlashHead needs dense logits it puts the rows in order first, which takes longer."
            )
            return


def logits_of_scores(steps: PortableSteps, hidden: mx.array) -> mx.array:
    """Logits of all tokens as the step that scores clusters gives them: (1, D) → (1, V)."""
    clustered = steps.clustered
    n_clusters = clustered.n_clusters
    size = min(n_clusters, SCORED_AT_ONCE)
    parts = []
    for start in range(0, n_clusters, size):
        first = min(start, n_clusters - size)
        # fewer than MIN_PROBES would be another kernel
        clusters = mx.arange(first, first + max(size, MIN_PROBES), dtype=mx.uint32)
        selection = Selection(mx.minimum(clusters, n_clusters - 1)[None])
        parts.append(steps.score(hidden, selection).logits[:, start - first : size])
    slots = mx.concatenate(parts, axis=1).reshape(1, -1)
    return in_token_order(slots, clustered.slot_of)


def scored_logits_agree(steps: PortableSteps, dtype: mx.Dtype) -> float:
    """The share of all V logits that the scores give as MLX's product with one state does, to the
    last bit. Evaluates."""
    width = steps.clustered.rows.hidden_size
    hidden = mx.random.normal((1, width), key=mx.random.key(1)).astype(dtype)
    same = logits_of_scores(steps, hidden) == steps.dense(hidden)
    return int(mx.sum(same)) / same.size
