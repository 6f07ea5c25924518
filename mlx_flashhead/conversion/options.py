"""The options of a conversion, with their defaults and limits: of `convert`, its command and the
stored recipe."""

from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import Any

from ..common.arguments import Type, check, number, one_of, whole_number
from ..common.repositories import full_name
from ..head.formats import AFFINE_BITS, FORMATS
from ..models.compat.mlx_lm import MODEL_CONVERSION_DTYPES

GIVEN, NO_CALIBRATION = "given", "none"
HEAD_BITS = (*AFFINE_BITS, 16)  # 16: floats
MIN_POSITIONS = 10  # enough to hold some out; hundreds are needed for good probes
QUICK_POSITIONS = 4_000


def option(
    default: Any,
    type: Type | None = None,
    *,
    flag: str | None = None,
    recipe: bool = True,
    **parser: Any,
) -> Any:
    """A field that is also an option of the command, with further arguments of ``add_argument``."""
    # `type` checks a value; `recipe`: it is part of the command that makes the same again
    about = {"type": type, "flag": flag, "recipe": recipe, "parser": parser}
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    quick: bool = option(False, action="store_true")
    cluster_size: int = option(16, whole_number(1))
    n_probes: int | None = option(None, whole_number(1))
    target_agreement: float = option(0.998, number(0, 1, above=True))
    calibration: str = option(GIVEN, metavar="given|none|FILE")
    calibration_positions: int = option(12_000, whole_number(MIN_POSITIONS))
    calibration_seconds: float = option(120.0, number(0, above=True))
    seed: int = option(0, whole_number(0), recipe=False)

    def __post_init__(self) -> None:
        for one in fields(self):
            value, type = getattr(self, one.name), one.metadata.get("type")
            if type is not None and not (value is None and one.default is None):
                check(one.name, value, type)

    @property
    def positions(self) -> int:
        quick = self.quick and self.calibration_positions > QUICK_POSITIONS
        return QUICK_POSITIONS if quick else self.calibration_positions

    @property
    def source(self) -> str:
        """Source of the positions: "given", "none" or "file"."""
        return self.calibration if self.calibration in (GIVEN, NO_CALIBRATION) else "file"

    def check_size(self, vocab_size: int) -> None:
        """Raises a ValueError if the clusters or the probes do not fit a vocabulary."""
        size = self.cluster_size
        if size > vocab_size:
            raise ValueError(
                f"`cluster_size` is {size}, but the model has {vocab_size} tokens: choose at most "
                f"{vocab_size} (16 is usual)."
            )
        n_clusters = -(-vocab_size // size)
        if self.n_probes is not None and self.n_probes > n_clusters:
            raise ValueError(
                f"`n_probes` is {self.n_probes}, but clusters of {size} make only {n_clusters} of "
                f"them: choose 1 to {n_clusters}."
            )


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(IndexOptions):
    hf_path: str = option(None, recipe=False)
    mlx_path: str = option("mlx_model", recipe=False)
    quantize: bool = option(False, flag="-q")
    q_group_size: int | None = option(None, whole_number(1))
    q_bits: int | None = option(None, whole_number(1))
    q_mode: str = option("affine")
    dtype: str | None = option(None, one_of(*MODEL_CONVERSION_DTYPES))
    upload_repo: str | None = option(None, recipe=False)
    revision: str | None = option(None, recipe=False)
    dequantize: bool = option(False, flag="-d")
    quant_predicate: Callable | str | None = option(None)
    trust_remote_code: bool = option(False)
    head_bits: int | None = option(None, one_of(*HEAD_BITS), metavar="|".join(map(str, HEAD_BITS)))
    index_only: bool = option(False, action="store_true")
    base_model: str | None = option(None, recipe=False, metavar="OWNER/NAME")
    license: str | None = option(None, recipe=False, metavar="ID")
    upload: bool | str = option(False, recipe=False, nargs="?", const=True, metavar="OWNER/NAME")
    private: bool = option(False, recipe=False, action="store_true")
    overwrite: bool = option(False, recipe=False, action="store_true")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hf_path is None:
            raise ValueError("`hf_path` is needed: the folder or repository of the model.")
        if self.index_only:
            for name in ("quantize", "dequantize", "dtype", "head_bits"):
                if getattr(self, name):
                    raise ValueError(f"`index_only` writes no weights: leave `{name}` out.")
        for name in ("q_group_size", "q_bits", "q_mode", "quant_predicate"):
            if not self.quantize and getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"`{name}` is for a quantized model: add `quantize`, or leave it out."
                )
        if self.quantize and self.quant_predicate is None:
            # mlx-lm would leave weights as they are
            forms = [form for form in FORMATS if form.mode == self.q_mode]
            bits = {form.bits for form in forms}
            groups = {size for form in forms for size in form.group_sizes}
            for name, choices in (("q_bits", bits), ("q_group_size", groups)):
                if getattr(self, name) is not None:
                    check(name, getattr(self, name), one_of(*sorted(choices)))
        if self.quantize and self.dequantize:
            raise ValueError("Choose either `quantize` or `dequantize`, not both.")
        if isinstance(self.upload, str) and self.upload_repo not in (None, self.upload):
            raise ValueError("`upload` and `upload_repo` name two repositories: give one of them.")
        if self.private and not self.uploads:
            raise ValueError("`private` is for an upload: add `upload`, or leave it out.")
        if self.base_model is not None:
            if "/" not in self.base_model:
                raise ValueError(
                    f"`base_model` is {self.base_model!r}: give OWNER/NAME, as on the Hub."
                )
            full_name(self.base_model, "")

    @property
    def uploads(self) -> bool:
        return bool(self.upload) or self.upload_repo is not None


def flag(one: Field) -> str:
    return one.metadata["flag"] or "--" + one.name.replace("_", "-")
