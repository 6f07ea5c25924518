"""The options of a conversion, with their defaults and limits.

``convert`` in Python, ``mlx_flashhead.convert`` and the stored recipe read them here.
"""

import argparse
from collections.abc import Callable
from dataclasses import KW_ONLY, Field, dataclass, field, fields
from typing import Any

from ..common.arguments import Type, check, number, one_of, whole_number
from ..common.repository_name import full_name
from ..models.compat.convert import MODEL_CONVERSION_DTYPES
from .calibration import read_text
from .probes import Goals
from .quantization import HEAD_BITS, check_form

MIX, NO_CALIBRATION = "mix", "none"
MIN_POSITIONS = 10  # enough to hold some out; hundreds are needed for good probes


def option(
    default: Any,
    help: str | None = None,
    type: Type | None = None,
    *,
    flag: str | None = None,
    recipe: bool = True,
    **parser: Any,
) -> Any:
    """A field that is also an option of the command.

    Args:
        default: Its default.
        help: Its text in the command's help; None: mlx-lm's parser has the flag.
        type: Checks a value; None: everything is allowed.
        flag: Its flag, if that is not its name.
        recipe: Whether it is part of the command that makes the same checkpoint again.
        **parser: Further arguments of ``add_argument``.
    """
    about = {"help": help, "type": type, "flag": flag, "recipe": recipe, "parser": parser}
    return field(default=default, metadata=about)


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """The options of an index, each with its help text.

    Raises:
        ValueError: If an option is not valid.
    """

    cluster_size: int = option(16, "Tokens per cluster (default: %(default)s).", whole_number(1))
    n_probes: int | None = option(
        None,
        "Clusters scored per token (default: the fewest that reach --target-agreement and "
        "--target-kl).",
        whole_number(1),
    )
    target_agreement: float = option(
        Goals.agreement,
        "Share of positions that must keep the dense head's best token, measured on the held-out "
        "part of the calibration (default: %(default)s).",
        number(0, 1, above=True),
    )
    target_kl: float = option(
        Goals.kl,
        "Greatest divergence from the dense head's distribution, in nats (default: %(default)s).",
        number(0, above=True),
    )
    calibration: str = option(
        MIX,
        "Text to calibrate on: a mix of given text and of text that the model writes, none, or a "
        "file (default: %(default)s).",
        metavar="mix|none|FILE",
    )
    calibration_positions: int = option(
        12_000, "Positions to calibrate on (default: %(default)s).", whole_number(MIN_POSITIONS)
    )
    calibration_seconds: float = option(
        120.0,
        "Seconds after which reading and writing the text ends, with fewer positions then "
        "(default: %(default)s).",
        number(0, above=True),
    )
    seed: int = option(
        0,
        "Seed of the clustering and of the text that the model writes (default: %(default)s).",
        whole_number(0),
        recipe=False,
    )

    def __post_init__(self) -> None:
        for one in fields(self):
            value, type = getattr(self, one.name), one.metadata.get("type")
            if type is not None and not (value is None and one.default is None):
                check(one.name, value, type)

    def calibration_text(self) -> str | None:
        """The text of a file to calibrate on; None for the mix and without calibration.

        Raises:
            ValueError: If the file cannot be read.
        """
        given = self.calibration not in (MIX, NO_CALIBRATION)
        return read_text(self.calibration) if given else None

    def check_size(self, vocab_size: int) -> None:
        """Checks that the clusters and the probes fit a vocabulary.

        Raises:
            ValueError: If they do not fit.
        """
        size = self.cluster_size
        if size > vocab_size:
            raise ValueError(
                f"cluster_size is {size}, but the model has {vocab_size} tokens: choose at most "
                f"{vocab_size} (16 is usual)."
            )
        n_clusters = -(-vocab_size // size)
        if self.n_probes is not None and self.n_probes > n_clusters:
            raise ValueError(
                f"n_probes is {self.n_probes}, but clusters of {size} make only {n_clusters} of "
                f"them: choose 1 to {n_clusters}."
            )


@dataclass(frozen=True)
class ConvertOptions(IndexOptions):
    """The options of a conversion. The first fields are those of ``mlx_lm.convert``.

    Attributes:
        hf_path: A local folder (Hugging Face or mlx-lm, also quantized) or a Hub repository.
        mlx_path: Folder to write.
        quantize: Quantize the model.
        q_group_size: Weights that share a scale; default: the mode's usual number.
        q_bits: Bits per weight; default: the mode's usual number.
        q_mode: "affine", "mxfp4", "nvfp4" or "mxfp8".
        dtype: Of the weights that are not quantized; default: an mlx-lm folder's own, else the
            configuration's ``torch_dtype``.
        upload_repo: Repository to upload the checkpoint to, as ``upload``.
        revision: Branch, tag or commit of the repository.
        dequantize: Undo the model's quantization.
        quant_predicate: One of mlx-lm's mixed-bit recipes, or a function as mlx-lm takes it.
        trust_remote_code: Allow the repository's own Python code.

    Raises:
        ValueError: If an option is not valid, or two contradict each other.
    """

    hf_path: str = option(None, recipe=False)
    mlx_path: str = option("mlx_model", recipe=False)
    quantize: bool = option(False, flag="-q")
    q_group_size: int | None = option(None, type=whole_number(1))
    q_bits: int | None = option(None, type=whole_number(1))
    q_mode: str = option("affine")
    dtype: str | None = option(None, type=one_of(*MODEL_CONVERSION_DTYPES))
    upload_repo: str | None = option(None, recipe=False)
    revision: str | None = option(
        None,
        "Branch, tag or commit of the model's repository (default: main).",
        recipe=False,
    )
    dequantize: bool = option(False, flag="-d")
    quant_predicate: Callable | str | None = option(None)
    trust_remote_code: bool = option(False)
    _: KW_ONLY
    head_bits: int | None = option(
        None,
        "Bits of the head's rows, apart from the body's (default: as the model has it).",
        one_of(*HEAD_BITS),
        metavar="|".join(map(str, HEAD_BITS)),
    )
    index_only: bool = option(
        False,
        "Make the FlashHead alone, a few MB that go beside the model in any of its precisions.",
        action="store_true",
    )
    base_model: str | None = option(
        None,
        "The model's repository, for a folder that does not name it: the card names it and has its "
        "licence and language.",
        recipe=False,
        metavar="OWNER/NAME",
    )
    license: str | None = option(
        None,
        "The model's licence as the Hub calls it, such as apache-2.0, for a card that does not "
        "name it.",
        recipe=False,
        metavar="ID",
    )
    upload: bool | str = option(
        False,
        "Upload the checkpoint to the Hugging Face Hub (without a name: "
        "USER/MODEL-FlashHead-PRECISION). The repository is made before the long work, and the "
        "folder is kept.",
        recipe=False,
        nargs="?",
        const=True,
        metavar="OWNER/NAME",
    )
    private: bool = option(
        False, "Make the repository private if it is a new one.", recipe=False, action="store_true"
    )
    overwrite: bool = option(
        False, "Replace the target folder if it exists.", recipe=False, action="store_true"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hf_path is None:
            raise ValueError("--model is needed: the folder or repository of the model to convert.")
        self._refuse_what_does_nothing()
        if self.quantize and self.dequantize:
            raise ValueError("Choose either --quantize or --dequantize, not both.")
        if isinstance(self.upload, str) and self.upload_repo not in (None, self.upload):
            raise ValueError("--upload and --upload-repo name two repositories: give one of them.")
        if self.private and not self.uploads:
            raise ValueError("--private is for an upload: add --upload, or leave it out.")
        if self.base_model is not None:
            if "/" not in self.base_model:
                raise ValueError(
                    f"--base-model is {self.base_model!r}: give OWNER/NAME, as on the Hub."
                )
            full_name(self.base_model, "")

    def _refuse_what_does_nothing(self) -> None:
        if self.index_only:
            for name in ("quantize", "dequantize", "dtype", "head_bits"):
                if getattr(self, name):
                    raise ValueError(
                        f"--index-only writes no weights: leave --{name.replace('_', '-')} out."
                    )
        if not self.quantize:
            default = {one.name: one.default for one in fields(self)}
            for name in ("q_group_size", "q_bits", "q_mode", "quant_predicate"):
                if getattr(self, name) != default[name]:
                    raise ValueError(
                        f"--{name.replace('_', '-')} is for a quantized model: add --quantize, or "
                        "leave it out."
                    )
            return
        if self.quant_predicate is None:
            check_form(self.q_mode, self.q_bits, self.q_group_size)

    @property
    def uploads(self) -> bool:
        """Whether the checkpoint is uploaded."""
        return bool(self.upload) or self.upload_repo is not None

    @property
    def repository(self) -> str | None:
        """The repository of the upload, "owner/name" or "name"; None: a derived name."""
        return self.upload if isinstance(self.upload, str) else self.upload_repo

    def flags(self) -> dict[str, Any]:
        """The flags of the recipe with their values, without defaults."""
        return {
            flag(one): getattr(self, one.name)
            for one in sorted(fields(self), key=lambda one: one.kw_only is True)
            if one.metadata.get("recipe") and getattr(self, one.name) != one.default
        }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds to mlx-lm's parser the options that it does not have."""
    group = parser.add_argument_group("FlashHead")
    for one in fields(ConvertOptions):
        about = one.metadata
        if about["help"] is not None:
            more = about["parser"]
            if about["type"] is not None:
                more = more | {"type": about["type"]}
            group.add_argument(flag(one), default=one.default, help=about["help"], **more)
    of_mlx_lm = {one.name: one.metadata["type"] for one in fields(ConvertOptions)}
    for action in parser._actions:
        action.type = of_mlx_lm.get(action.dest) or action.type


def flag(one: Field) -> str:
    """The flag of an option."""
    return one.metadata["flag"] or "--" + one.name.replace("_", "-")
