"""What a conversion refuses before it begins."""

from ..head.matrix import Matrix
from ..models.compat import MODEL_CONVERSION_DTYPES
from ..publishing.hub import full_name
from .calibration import read_text
from .quantization import HEAD_BITS

SELF_GENERATED, NO_CALIBRATION = "self", "none"
MIN_POSITIONS = 10  # enough to hold some out; hundreds are needed for good probes


def check_arguments(
    cluster_size: int,
    n_probes: int | None,
    target_agreement: float,
    positions: int,
    head_bits: int | None,
    dtype: str | None,
    seed: int,
) -> None:
    """Refuses arguments of `conversion.convert` that fit no model.

    Raises:
        ValueError: If one does, naming it.
    """
    if cluster_size < 1:
        raise ValueError(f"cluster_size is {cluster_size}: it must be 1 or more (16 is usual).")
    if n_probes is not None and n_probes < 1:
        raise ValueError(f"n_probes is {n_probes}: it must be 1 or more.")
    if not 0 < target_agreement <= 1:
        raise ValueError(
            f"target_agreement is {target_agreement}: it is a share, above 0 and at most 1 (0.99)."
        )
    if positions < MIN_POSITIONS:
        raise ValueError(
            f"calibration_positions is {positions}: give 100 or more, or --calibration none."
        )
    if head_bits is not None and head_bits not in HEAD_BITS:
        raise ValueError(f"head_bits is {head_bits}: choose 4, 8 or 16.")
    if seed < 0:
        raise ValueError(f"seed is {seed}: it must be 0 or more.")
    if dtype is not None and dtype not in MODEL_CONVERSION_DTYPES:
        raise ValueError(f"dtype is {dtype!r}: choose {', '.join(MODEL_CONVERSION_DTYPES)}.")


def check_size(rows: Matrix, cluster_size: int, n_probes: int | None) -> None:
    """Refuses a cluster size or a number of probes that does not fit the head.

    Args:
        rows: The head's.
        cluster_size: Tokens per cluster.
        n_probes: Clusters scored per token, or None.

    Raises:
        ValueError: If one does not.
    """
    vocab_size = rows.n_rows
    if cluster_size > vocab_size:
        raise ValueError(
            f"cluster_size is {cluster_size}, but the model has {vocab_size} tokens: "
            f"choose at most {vocab_size} (16 is usual)."
        )
    n_clusters = -(-vocab_size // cluster_size)
    if n_probes is not None and n_probes > n_clusters:
        raise ValueError(
            f"n_probes is {n_probes}, but clusters of {cluster_size} make only {n_clusters} of "
            f"them: choose 1 to {n_clusters}."
        )


def check_upload(upload: bool, private: bool, base_model: str | None) -> None:
    """Refuses what an upload cannot be.

    Raises:
        ValueError: If an option is for an upload that was not asked for, or the base model's name
            is none.
    """
    if private and not upload:
        raise ValueError("--private is for an upload: add --upload, or leave it out.")
    if base_model is not None:
        if "/" not in base_model:
            raise ValueError(f"--base-model is {base_model!r}: give OWNER/NAME, as on the Hub.")
        full_name(base_model, "")


def calibration_text(calibration: str) -> str | None:
    """The text of ``--calibration FILE``; None for "self" and "none".

    Raises:
        ValueError: If it cannot be read.
    """
    return None if calibration in (SELF_GENERATED, NO_CALIBRATION) else read_text(calibration)
