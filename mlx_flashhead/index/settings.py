"""The settings of a FlashHead: everything but its arrays."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

FORMAT_VERSION = 2
DRAFT_SHARE = 0.095  # of the head's bytes, beside a text's latest tokens: docs/drafts.md
LEAST_DRAFT = 1 / 32  # of the clusters, where the centroids alone are nearly as much
REQUIRED = {
    "vocab_size",
    "n_clusters",
    "cluster_size",
    "n_probes",
    "unverified_probes",
    "fingerprint",
}
AGAIN = "make it again with mlx_flashhead.convert"
MAX_END_TOKENS = 64  # models have up to about ten; their clusters are scored at every position
MAX_PADDING = 2  # slots per token; a conversion pads the last cluster alone
MAX_MEASURED, MAX_RISKS = 1000, 4096  # numbers of probes, and positions with a recorded risk


@dataclass(frozen=True)
class FlashHeadConfig:
    """Settings of a FlashHead.

    Attributes:
        calibration: The hidden states that it was fitted on: ``source``, ``positions``, ``seed``;
            ``quick`` if less was read on purpose, ``cut_short`` if the time limit came first.
        report: Measured on held-out calibration positions: ``positions``, ``agreement``,
            ``coverage`` (shares of them), ``kl``, ``perplexity_ratio``, ``dense_perplexity``,
            ``dense_bytes``, and ``by_probes`` with the same at several numbers of probes.
        verification: For verified decoding: the ``risk`` that a proposal is rejected
            (`conversion/measures.py`), and ``by_probes`` with the shares ``greedy_differs`` and
            ``sampled_differs``, and some ``risks``. Empty without calibration.
        recipe: How the checkpoint was made: `conversion/options.py`.
    """

    vocab_size: int
    n_clusters: int
    cluster_size: int
    n_probes: int  # clusters scored per verified proposal, 1 … C: the fewest expected bytes
    unverified_probes: int  # clusters scored per token without verification, 1 … C
    fingerprint: str  # SHA-256 over 64 evenly spaced rows as stored
    eos_token_ids: tuple[int, ...] = ()  # whose clusters are always among the probes
    centroid_bits: int = 4  # 16 or 32: floats
    centroid_group_size: int = 64  # 0: floats
    calibration: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    @property
    def draft_probes(self) -> int:
        """Clusters for a draft: with the centroids they are a tenth of the head's bytes."""
        return max(1, int(self.n_clusters * max(DRAFT_SHARE - 1 / self.cluster_size, LEAST_DRAFT)))

    def to_dict(self) -> dict[str, Any]:
        """The form for JSON."""
        return asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> "FlashHeadConfig":
        """Reads the form written by :meth:`to_dict`; ``source`` is its place, for messages.

        Raises:
            ValueError: If the version is not this package's, or a key is missing or not valid.
        """
        version = values.get("version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{source} has version {version!r}, but this package reads version "
                f"{FORMAT_VERSION}: update mlx_flashhead, or {AGAIN}."
            )
        known = {f.name: f for f in fields(cls)}
        entries = {key: value for key, value in values.items() if key in known}
        missing = REQUIRED - entries.keys()
        if missing:
            raise ValueError(f"{source} lacks {', '.join(sorted(missing))}: {AGAIN}.")
        ends = entries.get("eos_token_ids", ())
        numbers = [value for key, value in entries.items() if known[key].type is int]
        whole = isinstance(ends, list | tuple) and all(type(n) is int for n in (*numbers, *ends))
        if not whole:
            raise ValueError(f"{source} must hold whole numbers: {AGAIN}.")
        if len(ends) > MAX_END_TOKENS:
            raise ValueError(
                f"{source} names {len(ends)} tokens that end a text, more than {MAX_END_TOKENS}: "
                f"{AGAIN}."
            )
        if not isinstance(entries["fingerprint"], str):
            raise ValueError(f"{source} must hold a text as fingerprint: {AGAIN}.")
        objects = ("calibration", "report", "verification", "recipe")
        if not all(isinstance(entries.get(name, {}), dict) for name in objects):
            raise ValueError(f"{source} must hold objects as {', '.join(objects)}: {AGAIN}.")
        config = cls(**entries | {"eos_token_ids": tuple(ends)})
        clusters = f"{config.n_clusters} clusters of {config.cluster_size}"
        slots = config.n_clusters * config.cluster_size
        # before any array is read: padded slots cost memory as tokens do
        if min(config.n_clusters, config.cluster_size, config.vocab_size) < 1 or not (
            config.vocab_size <= slots <= MAX_PADDING * config.vocab_size
        ):
            raise ValueError(
                f"{source} describes {clusters} for {config.vocab_size} tokens, which is not "
                f"possible: {AGAIN}."
            )
        if not all(0 <= token < config.vocab_size for token in ends):
            raise ValueError(f"{source} must hold ids of tokens as eos_token_ids: {AGAIN}.")
        for name in ("n_probes", "unverified_probes"):
            if not 1 <= getattr(config, name) <= config.n_clusters:
                raise ValueError(
                    f"{source} has {getattr(config, name)} as {name}, not 1 to {config.n_clusters}:"
                    f" {AGAIN}."
                )
        if not _is_valid(config.verification, config.n_clusters):
            raise ValueError(f"{source} has no valid settings of verification: {AGAIN}.")
        return config


def _is_valid(verification: dict[str, Any], n_clusters: int) -> bool:
    """Whether these are settings of verified decoding, or none."""
    match verification:
        case {
            "risk": {
                "greedy": [int() | float() as a, int() | float() as b],
                "sampled": int() | float() as scale,
            },
            "by_probes": [*rows],
        }:
            risks = math.isfinite(a) and math.isfinite(b) and 0 <= scale < math.inf
            return risks and len(rows) <= MAX_MEASURED and all(_is_row(r, n_clusters) for r in rows)
    return not verification


def _is_row(row: Any, n_clusters: int) -> bool:
    match row:
        case {
            "n_probes": int(n_probes),
            "greedy_differs": int() | float() as greedy,
            "sampled_differs": int() | float() as sampled,
        }:
            shares = 0 <= greedy <= 1 and 0 <= sampled <= 1
            risks = row.get("risks", [])
            listed = isinstance(risks, list) and len(risks) <= MAX_RISKS
            numbers = listed and all(type(risk) is int for risk in risks)
            return 1 <= n_probes <= n_clusters and shares and numbers
    return False
