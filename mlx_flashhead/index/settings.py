"""The settings of a FlashHead: everything but its arrays."""

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

FORMAT_VERSION = 1
DRAFT_SHARE = 0.095  # of the head's bytes, beside a text's latest tokens: docs/drafts.md
LEAST_DRAFT = 1 / 32  # of the clusters, where the centroids alone are nearly as much
REQUIRED = {"vocab_size", "n_clusters", "cluster_size", "n_probes", "fingerprint"}
AGAIN = "make it again with mlx_flashhead.convert"
MOST_END_TOKENS = 64  # models have up to about ten; their clusters are scored at every position


@dataclass(frozen=True)
class FlashHeadConfig:
    """Settings of a FlashHead.

    Attributes:
        calibration: The hidden states that it was fitted on: ``source``, ``positions``, ``seed``;
            ``quick`` if less was read on purpose, ``cut_short`` if the time limit came first.
        report: Measured on held-out calibration positions: ``positions``, ``agreement``,
            ``coverage`` (shares of them), ``kl``, ``perplexity_ratio``, ``dense_perplexity``,
            ``dense_bytes``, ``by_probes`` with the same at several numbers of probes, and
            ``choice``, a sentence on ``n_probes``.
        lossless: For decoding with a check: ``n_probes``, the number that reads the fewest bytes;
            ``risk`` that a proposal differs (`conversion/probes.py`); ``by_probes`` with the
            shares ``greedy_differs`` and ``sampled_differs``. Empty without calibration.
        recipe: How the checkpoint was made: `conversion/recipe.py`.
    """

    vocab_size: int
    n_clusters: int
    cluster_size: int
    n_probes: int  # clusters that the bare head scores per position, 1 … C
    fingerprint: str  # SHA-256 over 64 evenly spaced rows as stored
    eos_token_ids: tuple[int, ...] = ()  # whose clusters are always among the probes
    centroid_bits: int = 4  # 16 or 32: floats
    centroid_group_size: int = 64  # 0: floats
    calibration: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    lossless: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    @property
    def checked_probes(self) -> int | None:
        """Clusters scored per position in the checked loop; None: ``n_probes``."""
        return self.lossless.get("n_probes")

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
        known = {f.name for f in fields(cls)}
        given = {key: value for key, value in values.items() if key in known}
        missing = REQUIRED - given.keys()
        if missing:
            raise ValueError(f"{source} lacks {', '.join(sorted(missing))}: {AGAIN}.")
        ends = given.get("eos_token_ids", ())
        numbers = [given.get(f.name, f.default) for f in fields(cls) if f.type is int]
        whole = isinstance(ends, list | tuple) and all(type(n) is int for n in (*numbers, *ends))
        if not whole:
            raise ValueError(f"{source} must hold whole numbers: {AGAIN}.")
        if len(ends) > MOST_END_TOKENS:
            raise ValueError(
                f"{source} names {len(ends)} tokens that end a text, more than {MOST_END_TOKENS}: "
                f"{AGAIN}."
            )
        objects = ("calibration", "report", "lossless", "recipe")
        if not all(isinstance(given.get(name, {}), dict) for name in objects):
            raise ValueError(f"{source} must hold objects as {', '.join(objects)}: {AGAIN}.")
        config = cls(**given | {"eos_token_ids": tuple(ends)})
        if not _is_lossless(config.lossless, config.n_clusters):
            raise ValueError(f"{source} has no valid settings of the check (lossless): {AGAIN}.")
        return config


def _is_lossless(values: dict[str, Any], n_clusters: int) -> bool:
    """Whether these are the settings of a checked loop, or none."""
    match values:
        case {
            "n_probes": int(n_probes),
            "risk": {
                "greedy": [int() | float() as a, int() | float() as b],
                "sampled": int() | float() as scale,
            },
        }:
            return 1 <= n_probes <= n_clusters and all(map(math.isfinite, (a, b, scale)))
    return not values
