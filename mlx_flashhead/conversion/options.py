"""The options of a conversion, with their defaults and limits.

Their help is in `convert.py`.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from ..common.arguments import Type, check, number, one_of, whole_number
from ..common.repositories import full_name
from ..head.matrix import AFFINE, FORMATS, GROUPS

BUILTIN = "builtin"
NO_CALIBRATION = "none"
# 16 bits are floats.
HEAD_BITS = (4, 6, 8, 16)
# Some are held out. Good probes need hundreds.
MIN_POSITIONS = 10
QUICK_POSITIONS = 4_000
# The types that mlx-lm's conversion has.
DTYPES = ("float16", "bfloat16", "float32")

# Limits of the options, for Python and the command.
LIMITS: dict[str, Type] = {
    "cluster_size": whole_number(1),
    "n_probes": whole_number(1),
    "target_agreement": number(0, 1, above=True),
    "calibration_positions": whole_number(MIN_POSITIONS),
    "calibration_seconds": number(0, above=True),
    "seed": whole_number(0),
    # With another size mlx-lm would leave weights alone.
    "q_group_size": one_of(16, *GROUPS),
    "q_bits": one_of(*sorted(form.bits for form in FORMATS if form.mode == AFFINE)),
    "q_mode": one_of(AFFINE, "mxfp4", "nvfp4", "mxfp8"),
    "dtype": one_of(*DTYPES),
    "head_bits": one_of(*HEAD_BITS),
}


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """How an index is made."""

    quick: bool = False
    cluster_size: int = 16
    n_probes: int | None = None
    target_agreement: float = 0.998
    calibration: str = BUILTIN
    calibration_positions: int = 12_000
    calibration_seconds: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            if getattr(self, name, None) is not None:
                check(name, getattr(self, name), limit)

    @property
    def positions(self) -> int:
        """The most positions to calibrate on."""
        if self.quick:
            return min(self.calibration_positions, QUICK_POSITIONS)
        return self.calibration_positions

    @property
    def source(self) -> str:
        """Source of the positions: "builtin", "none" or "file"."""
        if self.calibration in (BUILTIN, NO_CALIBRATION):
            return self.calibration
        return "file"

    def check_size(self, vocab_size: int) -> None:
        """Checks that the clusters and the probes fit a vocabulary.

        Args:
            vocab_size: The number of the head's rows.

        Raises:
            ValueError: If they do not.
        """
        size = self.cluster_size
        n_clusters = -(-vocab_size // size)
        if size > vocab_size:
            raise ValueError(
                f"`cluster_size` is {size}, but the model has {vocab_size} tokens: choose at most "
                f"{vocab_size} (16 is usual)."
            )
        if self.n_probes is not None and self.n_probes > n_clusters:
            raise ValueError(
                f"`n_probes` is {self.n_probes}, but clusters of {size} make only {n_clusters} of "
                f"them: choose 1 to {n_clusters}."
            )


@dataclass(frozen=True)
class ConvertOptions(IndexOptions):
    """All arguments of a conversion: those of ``mlx_lm.convert`` in its order, then FlashHead's."""

    hf_path: str
    mlx_path: str = "mlx_model"
    quantize: bool = False
    q_group_size: int | None = None
    q_bits: int | None = None
    q_mode: str = AFFINE
    dtype: str | None = None
    upload_repo: str | None = None
    revision: str | None = None
    dequantize: bool = False
    quant_predicate: Callable | str | None = None
    trust_remote_code: bool = False
    _: KW_ONLY
    head_bits: int | None = None
    fine_head: str | Path | bool = False
    index_only: bool = False
    base_model: str | None = None
    license: str | None = None
    upload: bool | str = False
    private: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("quantize", "dequantize", "dtype", "head_bits", "fine_head"):
            if self.index_only and getattr(self, name):
                raise ValueError(f"`index_only` writes no weights: leave `{name}` out.")
        for name in ("q_group_size", "q_bits", "q_mode", "quant_predicate"):
            if not self.quantize and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"`{name}` is for a quantized model: add `quantize`, or leave it out."
                )
        alters = self.quantize or self.dequantize
        has_recipe = isinstance(self.quant_predicate, str)
        another_repo = isinstance(self.upload, str) and self.upload_repo not in (None, self.upload)
        contradictions = [
            (not self.hf_path, "`hf_path` is needed: the folder or repository of the model."),
            (
                self.quantize and self.dequantize,
                "Choose either `quantize` or `dequantize`, not both.",
            ),
            (
                self.fine_head and alters,
                "`fine_head` is for a model that is quantized already: leave it out, or `quantize` "
                "and `dequantize`.",
            ),
            (
                has_recipe and self.q_mode != AFFINE,
                "Mixed-bit recipes (`quant_predicate`) need the affine `q_mode`.",
            ),
            (
                another_repo,
                "`upload` and `upload_repo` name two repositories: give one of them.",
            ),
            (self.private and not self.uploads, "`private` is for an upload: add `upload`."),
        ]
        for contradicts, sentence in contradictions:
            if contradicts:
                raise ValueError(sentence)
        if self.base_model is not None:
            full_name(self.base_model, "")

    @property
    def uploads(self) -> bool:
        """Whether the result is uploaded."""
        return bool(self.upload) or self.upload_repo is not None
