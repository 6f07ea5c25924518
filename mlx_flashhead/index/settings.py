"""The settings of a FlashHead: everything but its arrays."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

FORMAT_VERSION = 2
DRAFT_SHARE = 0.095  # of the head's bytes, beside a text's latest tokens: docs/drafts.md
LEAST_DRAFT = 1 / 32  # of the clusters, where the centroids alone are nearly as much
AGAIN = "make it again with mlx_flashhead.convert"
MAX_END_TOKENS = 64  # models have up to about ten; their clusters are scored at every position
MAX_PADDING = 2  # slots per token; a conversion pads the last cluster alone
MAX_MEASURED = 1000  # numbers of probes
MAX_RISKS = 4096  # positions with a recorded risk
LARGEST = 1e300  # JSON has whole numbers that no float holds

# Types of keys in JSON. All other keys are whole numbers.
TYPES = {
    "fingerprint": str,
    "eos_token_ids": list,
    "calibration": dict,
    "report": dict,
    "verification": dict,
    "recipe": dict,
}

_JSON_NAMES = {int: "a whole number", str: "a text", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class FlashHeadConfig:
    """A FlashHead's settings.

    Attributes:
        vocab_size: Rows V of the head.
        n_clusters: Clusters C.
        cluster_size: Slots of a cluster.
        n_probes: Clusters scored per verified proposal, 1 … C: the fewest expected bytes.
        unverified_probes: Clusters scored per token without verification, 1 … C.
        fingerprint: SHA-256 over 64 evenly spaced rows as stored.
        eos_token_ids: Tokens whose clusters are always among the probes.
        centroid_bits: Bits of a centroid's weights; 16 or 32 are floats.
        centroid_group_size: Weights that share a scale; 0 are floats.
        calibration: ``source``, ``positions``, ``seed``; ``quick`` if less was read on purpose,
            ``cut_short`` if the time limit ended it.
        report: Measures of held-out positions, by `conversion.report`.
        verification: Settings of verified decoding, by `conversion.probes`.
        recipe: How it was made, by `conversion.recipe`.
        version: Of this format.
    """

    vocab_size: int
    n_clusters: int
    cluster_size: int
    n_probes: int
    unverified_probes: int
    fingerprint: str
    eos_token_ids: tuple[int, ...] = ()
    centroid_bits: int = 4
    centroid_group_size: int = 64
    calibration: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    @property
    def draft_probes(self) -> int:
        """Clusters for a draft: with the centroids they are a tenth of the head's bytes."""
        share = max(DRAFT_SHARE - 1 / self.cluster_size, LEAST_DRAFT)
        return max(1, int(self.n_clusters * share))

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are stored, JSON-ready."""
        return asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, values: Any, source: str) -> "FlashHeadConfig":
        """Reads stored settings.

        Args:
            values: What :meth:`to_dict` has made.
            source: Its place, for messages.

        Raises:
            ValueError: If the version is not this package's, or a key is missing or not valid.
        """
        version = values.get("version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{source} has version {version!r}, but this package reads version "
                f"{FORMAT_VERSION}: update mlx_flashhead, or {AGAIN}."
            )
        entries = {each.name: values.get(each.name) for each in fields(cls)}
        problems = []
        for name, value in entries.items():
            wanted = TYPES.get(name, int)
            # a whole number is neither 2.0 nor true
            if type(value) is not wanted:
                problems.append(f"{name} is {_shown(value)}, and must be {_JSON_NAMES[wanted]}")
        if not problems:
            entries["eos_token_ids"] = tuple(entries["eos_token_ids"])
            config = cls(**entries)
            problems = config._problems()
        if problems:
            raise ValueError(f"{source} is damaged ({'; '.join(problems)}): {AGAIN}.")
        return config

    def _problems(self) -> list[str]:
        """What is wrong with values of the right types, in words."""
        n_clusters = self.n_clusters
        n_slots = n_clusters * self.cluster_size
        most_slots = MAX_PADDING * self.vocab_size  # padded slots cost memory as tokens do
        problems = []
        if self.cluster_size < 1 or not 1 <= self.vocab_size <= n_slots <= most_slots:
            problems.append(
                f"n_clusters is {n_clusters} and cluster_size is {self.cluster_size}, which do not "
                f"fit a vocab_size of {self.vocab_size}"
            )
        for name in ("n_probes", "unverified_probes"):
            value = getattr(self, name)
            if not 1 <= value <= n_clusters:
                problems.append(f"{name} is {value}, and must be 1 to {n_clusters}")
        ends = self.eos_token_ids
        are_tokens = all(type(token) is int and 0 <= token < self.vocab_size for token in ends)
        if len(ends) > MAX_END_TOKENS or not are_tokens:
            problems.append(f"eos_token_ids is {_shown(list(ends))}, and must be a few token ids")
        if not _is_verification(self.verification, n_clusters):
            problems.append(f"verification is {_shown(self.verification)}, which is not complete")
        return problems


def _shown(value: Any) -> str:
    """The beginning of a value, for messages."""
    return "missing" if value is None else f"{value!r:.60}"


def _is_verification(verification: dict[str, Any], n_clusters: int) -> bool:
    """Whether these are settings of verified decoding, or none."""
    match verification:
        case {"risk": {"greedy": [a, b], "sampled": scale}, "by_probes": [*rows]}:
            is_risk = _within(-LARGEST, LARGEST, a, b) and _within(0, LARGEST, scale)
            measured = len(rows) <= MAX_MEASURED and all(_is_row(row, n_clusters) for row in rows)
            return is_risk and measured
    return not verification


def _is_row(row: Any, n_clusters: int) -> bool:
    """Whether this is a row of measures with a number of probes."""
    match row:
        case {"n_probes": int(n_probes), "greedy_differs": greedy, "sampled_differs": sampled}:
            risks = row.get("risks", [])
            listed = isinstance(risks, list) and len(risks) <= MAX_RISKS
            in_range = 1 <= n_probes <= n_clusters and _within(0, 1, greedy, sampled)
            return in_range and listed and all(type(risk) is int for risk in risks)
    return False


def _within(low: float, high: float, *values: Any) -> bool:
    """Whether all values are numbers from ``low`` to ``high``."""
    return all(isinstance(value, int | float) and low <= value <= high for value in values)
