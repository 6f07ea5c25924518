"""The settings of a FlashHead: everything but its arrays."""

from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, get_origin

FORMAT_VERSION = 2
DRAFT_SHARE = 0.095  # of the head's bytes, beside a text's latest tokens: docs/drafts.md
LEAST_DRAFT = 1 / 32  # of the clusters, where the centroids alone are nearly as much
AGAIN = "make it again with mlx_flashhead.convert"
MAX_END_TOKENS = 64  # models have up to about ten; their clusters are scored at every position
MAX_PADDING = 2  # slots per token; a conversion pads the last cluster alone
MAX_MEASURED, MAX_RISKS = 1000, 4096  # numbers of probes, and positions with a recorded risk
LARGEST = 1e300  # JSON has whole numbers that no float holds


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
    def from_dict(cls, values: Any, source: str) -> "FlashHeadConfig":
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
        entries = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        missing = sorted(REQUIRED - entries.keys())
        if missing:
            raise ValueError(f"{source} lacks {', '.join(missing)}: {AGAIN}.")
        config = cls(**entries)
        wrong = {name for name, value in vars(config).items() if type(value) not in TYPES[name]}
        if not wrong:
            ends, n_clusters = config.eos_token_ids, config.n_clusters
            slots = n_clusters * config.cluster_size
            most = MAX_PADDING * config.vocab_size  # padded slots cost memory as tokens do
            valid = {
                "vocab_size, n_clusters and cluster_size": 1 <= config.vocab_size <= slots <= most
                and config.cluster_size >= 1,
                "n_probes": 1 <= config.n_probes <= n_clusters,
                "unverified_probes": 1 <= config.unverified_probes <= n_clusters,
                "eos_token_ids": len(ends) <= MAX_END_TOKENS
                and all(type(token) is int and 0 <= token < config.vocab_size for token in ends),
                "verification": _is_valid(config.verification, n_clusters),
            }
            wrong = {name for name, is_valid in valid.items() if not is_valid}
        if wrong:
            raise ValueError(f"{source} has no valid {', '.join(sorted(wrong))}: {AGAIN}.")
        return replace(config, eos_token_ids=tuple(ends))


REQUIRED = {
    each.name for each in fields(FlashHeadConfig) if each.default is each.default_factory is MISSING
}
# a whole number is neither 2.0 nor true
_JSON_TYPES: dict[Any, set] = {int: {int}, str: {str}, tuple: {list, tuple}, dict: {dict}}
TYPES = {
    each.name: _JSON_TYPES[get_origin(each.type) or each.type] for each in fields(FlashHeadConfig)
}


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
            finite = abs(a) <= LARGEST and abs(b) <= LARGEST and 0 <= scale <= LARGEST
            return (
                finite and len(rows) <= MAX_MEASURED and all(_is_row(r, n_clusters) for r in rows)
            )
    return not verification


def _is_row(row: Any, n_clusters: int) -> bool:
    match row:
        case {
            "n_probes": int(n_probes),
            "greedy_differs": int() | float() as greedy,
            "sampled_differs": int() | float() as sampled,
        } if 1 <= n_probes <= n_clusters and 0 <= greedy <= 1 and 0 <= sampled <= 1:
            risks = row.get("risks", [])
            listed = isinstance(risks, list) and len(risks) <= MAX_RISKS
            return listed and all(type(risk) is int for risk in risks)
    return False
