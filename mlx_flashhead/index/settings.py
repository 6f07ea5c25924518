"""The settings of a FlashHead: everything but its arrays."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

FORMAT_VERSION = 1
REQUIRED = {"vocab_size", "n_clusters", "cluster_size", "n_probes", "fingerprint"}
AGAIN = "make it again with mlx_flashhead.convert"


@dataclass(frozen=True)
class FlashHeadConfig:
    """Settings of a FlashHead.

    Attributes:
        vocab_size: Tokens V of the model.
        n_clusters: Number of clusters C.
        cluster_size: Tokens per cluster n.
        n_probes: Clusters scored per position, 1 … C.
        eos_token_ids: Tokens whose clusters are always among the probes.
        centroid_bits: Bits per centroid weight (4), or 16/32 for unquantized centroids.
        centroid_group_size: Quantization group of the centroids, 0 when unquantized.
        calibration: Where the hidden states came from: ``source``, ``positions``, ``seed``.
        report: Measured on held-out calibration positions: ``agreement``, ``coverage`` (shares of
            positions), ``probes_needed`` at p50, p90 and p99, ``dense_perplexity``,
            ``dense_bytes``, and ``by_probes``, which has figures for several numbers of probes.
        lossless: What the checked loop needs: ``n_probes``, ``risk`` and ``by_probes``, shares of
            positions at which the dense head chooses another token.
        recipe: How the checkpoint was made: `recipe.py`.
        fingerprint: SHA-256 over 64 evenly spaced rows as stored.
        version: Version of the file format.
    """

    vocab_size: int
    n_clusters: int
    cluster_size: int
    n_probes: int
    fingerprint: str
    eos_token_ids: tuple[int, ...] = ()
    centroid_bits: int = 4
    centroid_group_size: int = 64
    calibration: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    lossless: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    @property
    def checked_probes(self) -> int | None:
        """Clusters scored per position in the checked loop; None: ``n_probes``."""
        return self.lossless.get("n_probes")

    def to_dict(self) -> dict[str, Any]:
        """The form for JSON."""
        return asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> "FlashHeadConfig":
        """Reads the form written by :meth:`to_dict`.

        Args:
            values: The form.
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
        known = {f.name for f in fields(cls)}
        given = {key: value for key, value in values.items() if key in known}
        missing = REQUIRED - given.keys()
        if missing:
            raise ValueError(f"{source} lacks {', '.join(sorted(missing))}: {AGAIN}.")
        given["eos_token_ids"] = _whole_numbers(given.get("eos_token_ids", ()))
        numbers = [given.get(f.name, f.default) for f in fields(cls) if f.type is int]
        if given["eos_token_ids"] is None or _whole_numbers(numbers) is None:
            raise ValueError(f"{source} must hold whole numbers: {AGAIN}.")
        return cls(**given)


def _whole_numbers(values: Any) -> tuple[int, ...] | None:
    is_list = isinstance(values, list | tuple)
    return tuple(values) if is_list and all(type(v) is int for v in values) else None
