"""The settings of a FlashHead: everything but its arrays."""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import Meta

FORMAT_VERSION = 2
# A draft reads this share of the head's bytes, beside a text's latest tokens: docs/drafts.md.
DRAFT_SHARE = 0.095
# It reads at least this share of the clusters, where the centroids alone are nearly as much.
LEAST_DRAFT = 1 / 32
AGAIN = "make it again with mlx_flashhead.convert"
# The most slots per token. A conversion pads the last cluster alone.
MAX_PADDING = 2

# Limits of what is read from a file, whoever wrote it.
Count = Annotated[int, Meta(ge=1, le=1 << 40)]
Share = Annotated[float, Meta(ge=0, le=1)]
Finite = Annotated[float, Meta(ge=-1e300, le=1e300)]
# Models have up to about ten.
EndTokens = Annotated[tuple[int, ...], Meta(max_length=64)]
RiskLine = Annotated[list[Finite], Meta(min_length=2, max_length=2)]


class Measured(TypedDict):
    """What was measured with a number of probes."""

    n_probes: Count
    greedy_differs: Share
    sampled_differs: Share


class RiskSettings(TypedDict):
    """The numbers of `head/operations.py`'s risk."""

    greedy: RiskLine
    sampled: Annotated[float, Meta(ge=0, le=1e300)]


class VerificationSettings(TypedDict, total=False):
    """Settings of verified decoding: both keys, or none without calibration."""

    risk: RiskSettings
    by_probes: Annotated[list[Measured], Meta(max_length=1000)]


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

    vocab_size: Count
    n_clusters: Count
    cluster_size: Count
    n_probes: Count
    unverified_probes: Count
    fingerprint: str
    eos_token_ids: EndTokens = ()
    centroid_bits: int = 4
    centroid_group_size: int = 64
    calibration: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    verification: VerificationSettings = field(default_factory=VerificationSettings)
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
            source: Where they are, for messages.

        Raises:
            ValueError: If the version is not this package's, or a key is missing or not valid.
        """
        version = None
        if isinstance(values, dict):
            version = values.get("version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{source} has version {version!r}, but this package reads version "
                f"{FORMAT_VERSION}: update mlx_flashhead, or {AGAIN}."
            )
        try:
            config = msgspec.convert(values, cls)
            config._check()
        except ValueError as error:
            # Backticks would mark a parameter of Python.
            problem = str(error).replace("`", "")
            raise ValueError(f"{source} is damaged ({problem}): {AGAIN}.") from error
        return config

    def _check(self) -> None:
        """Raises a ValueError for values that do not fit each other."""
        n_clusters = self.n_clusters
        n_slots = n_clusters * self.cluster_size
        # Padded slots cost memory as tokens do.
        most_slots = MAX_PADDING * self.vocab_size
        if not self.vocab_size <= n_slots <= most_slots:
            raise ValueError(
                f"n_clusters {n_clusters} and cluster_size {self.cluster_size} do not fit "
                f"vocab_size {self.vocab_size}"
            )
        measured = [row["n_probes"] for row in self.verification.get("by_probes", ())]
        if max(self.n_probes, self.unverified_probes, *measured) > n_clusters:
            raise ValueError(
                f"n_probes, unverified_probes and those of verification must be 1 to {n_clusters}"
            )
        if len(self.verification) == 1:
            raise ValueError("verification is not complete")
        if any(not 0 <= token < self.vocab_size for token in self.eos_token_ids):
            raise ValueError("eos_token_ids must be token ids")
