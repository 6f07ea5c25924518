"""The settings of a FlashHead: everything but its arrays."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

FORMAT_VERSION = 2
DRAFT_SHARE = 0.095  # of the head's bytes, beside a text's latest tokens: docs/drafts.md
LEAST_DRAFT = 1 / 32  # of the clusters, where the centroids alone are nearly as much
AGAIN = "make it again with mlx_flashhead.convert"
MAX_END_TOKENS = 64  # models have up to about ten; their clusters are scored at every position
MAX_PADDING = 2  # slots per token; a conversion pads the last cluster alone
MAX_MEASURED, MAX_RISKS = 1000, 4096  # numbers of probes, and positions with a recorded risk
LARGEST = 1e300  # JSON has whole numbers that no float holds
# Types of the keys in JSON; those of the others are whole numbers.
TYPES = {"fingerprint": str, "eos_token_ids": list}
TYPES |= dict.fromkeys(("calibration", "report", "verification", "recipe"), dict)


@dataclass(frozen=True)
class FlashHeadConfig:
    """A FlashHead's settings. ``calibration`` has ``source``, ``positions``, ``seed``, ``quick`` if
    less was read on purpose, ``cut_short`` by the time limit. `conversion.measures` makes the
    ``report`` of held-out positions and ``verification``, `conversion.options` the ``recipe``."""

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
        return asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, values: Any, source: str) -> "FlashHeadConfig":
        """Reads the form written by :meth:`to_dict`; ``source`` is its place, for messages.
        ValueError if the version is not this package's, or a key is missing or not valid."""
        version = values.get("version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            reads = f"but this package reads version {FORMAT_VERSION}: update mlx_flashhead"
            raise ValueError(f"{source} has version {version!r}, {reads}, or {AGAIN}.")
        entries = {each.name: values.get(each.name) for each in fields(cls)}
        # a whole number is neither 2.0 nor true
        wrong = {name for name, value in entries.items() if type(value) is not TYPES.get(name, int)}
        if not wrong:
            ends = entries["eos_token_ids"] = tuple(entries["eos_token_ids"])
            config = cls(**entries)
            vocab_size, n_clusters = config.vocab_size, config.n_clusters
            most = MAX_PADDING * vocab_size  # padded slots cost memory as tokens do
            valid = {
                "vocab_size, n_clusters and cluster_size": config.cluster_size >= 1
                and 1 <= vocab_size <= n_clusters * config.cluster_size <= most,
                "n_probes": 1 <= config.n_probes <= n_clusters,
                "unverified_probes": 1 <= config.unverified_probes <= n_clusters,
                "eos_token_ids": len(ends) <= MAX_END_TOKENS
                and all(type(token) is int and 0 <= token < vocab_size for token in ends),
                "verification": _is_valid(config.verification, n_clusters),
            }
            wrong = {name for name, is_valid in valid.items() if not is_valid}
        if wrong:
            raise ValueError(f"{source} has no valid {', '.join(sorted(wrong))}: {AGAIN}.")
        return config


def _is_valid(verification: dict[str, Any], n_clusters: int) -> bool:
    """Whether these are settings of verified decoding, or none."""
    match verification:
        case {"risk": {"greedy": [a, b], "sampled": scale}, "by_probes": [*rows]}:
            is_risk = _within(-LARGEST, LARGEST, a, b) and _within(0, LARGEST, scale)
            measured = len(rows) <= MAX_MEASURED and all(_is_row(row, n_clusters) for row in rows)
            return is_risk and measured
    return not verification


def _is_row(row: Any, n_clusters: int) -> bool:
    match row:
        case {"n_probes": int(n_probes), "greedy_differs": greedy, "sampled_differs": sampled}:
            risks = row.get("risks", [])
            listed = isinstance(risks, list) and len(risks) <= MAX_RISKS
            in_range = 1 <= n_probes <= n_clusters and _within(0, 1, greedy, sampled)
            return in_range and listed and all(type(risk) is int for risk in risks)
    return False


def _within(low: float, high: float, *values: Any) -> bool:
    return all(isinstance(value, int | float) and low <= value <= high for value in values)
