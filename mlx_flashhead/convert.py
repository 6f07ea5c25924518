"""Converts a model: the flags of ``mlx_lm.convert`` and those of FlashHead.

Names, defaults and limits are those of `conversion.options.ConvertOptions`.
"""

from dataclasses import MISSING, fields

from .common.arguments import Parser
from .common.command import command, with_flags
from .conversion.options import HEAD_BITS, LIMITS, ConvertOptions


def make_parser() -> Parser:
    parser = Parser(
        prog="mlx_flashhead.convert",
        description="Make a folder of a model and its FlashHead, or of a FlashHead alone.",
    )
    add = parser.add_argument
    add(
        "--hf-path",
        "--model",
        metavar="FOLDER_OR_REPO",
        help="Model to convert: a Hugging Face or mlx-lm folder, or a Hub repository.",
    )
    add("--revision", help="Branch, tag or commit of the repository.")
    add("--mlx-path", metavar="FOLDER", help="Folder to write (default: %(default)s).")
    add("--overwrite", action="store_true", help="Replace it if a conversion has written it.")
    add("--trust-remote-code", action="store_true", help="Allow the repository's own Python code.")

    weights = parser.add_argument_group("weights")
    add = weights.add_argument
    add("-q", "--quantize", action="store_true", help="Quantize the model.")
    add(
        "--q-group-size",
        type=LIMITS["q_group_size"],
        help="Weights that share a scale (default: the mode's usual number).",
    )
    add("--q-bits", type=LIMITS["q_bits"], help="Bits per weight (default: the mode's usual).")
    add(
        "--q-mode",
        choices=("affine", "mxfp4", "nvfp4", "mxfp8"),
        help="Quantization mode (default: %(default)s).",
    )
    add(
        "--quant-predicate",
        choices=("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"),
        help="Recipe of mixed bits.",
    )
    add(
        "--head-bits",
        type=LIMITS["head_bits"],
        metavar="|".join(map(str, HEAD_BITS)),
        help="Bits of the head's rows, and of a tied embedding (default: 8 where the model is "
        "quantized, else as the model has it).",
    )
    add(
        "--fine-head",
        nargs="?",
        const=True,
        metavar="SOURCE",
        help="Give a quantized model the finer output head of its original, of 8 bits or "
        "--head-bits: a repository, a folder or a safetensors file (without a value: the original "
        "that the model names).",
    )
    add(
        "--dtype",
        type=LIMITS["dtype"],
        help="Of the weights that are not quantized (default: an mlx-lm folder's own, else that of "
        "config.json).",
    )
    add("-d", "--dequantize", action="store_true", help="Undo the model's quantization.")

    index = parser.add_argument_group("FlashHead")
    add = index.add_argument
    add(
        "--index-only",
        action="store_true",
        help="Make the FlashHead alone, a few MB that go beside the model in any of its "
        "precisions.",
    )
    add(
        "--quick",
        action="store_true",
        help="Less text and fewer passes: a fraction of the time, and a few more clusters per "
        "token.",
    )
    add(
        "--cluster-size",
        type=LIMITS["cluster_size"],
        help="Tokens per cluster (default: %(default)s).",
    )
    add(
        "--n-probes",
        type=LIMITS["n_probes"],
        help="Clusters scored per token (default: the number that is expected to be fastest).",
    )
    add(
        "--target-agreement",
        type=LIMITS["target_agreement"],
        help="Share of positions that keep the normal (dense) head's best token without "
        "verification (default: %(default)s).",
    )
    add(
        "--calibration",
        metavar="builtin|none|FILE",
        help="Text to calibrate on: built-in text of many kinds, none, or a file (default: "
        "%(default)s).",
    )
    add(
        "--calibration-positions",
        type=LIMITS["calibration_positions"],
        help="Positions to calibrate on (default: %(default)s).",
    )
    add(
        "--calibration-seconds",
        type=LIMITS["calibration_seconds"],
        help="Time limit of reading the built-in text (default: %(default)s).",
    )
    add("--seed", type=LIMITS["seed"], help="Seed of the clustering (default: %(default)s).")

    publishing = parser.add_argument_group("publishing")
    add = publishing.add_argument
    add(
        "--upload",
        nargs="?",
        const=True,
        metavar="OWNER/NAME",
        help="Upload the result to the Hugging Face Hub, to this repository (without a name: "
        "USER/MODEL-FlashHead-PRECISION).",
    )
    add("--upload-repo", metavar="OWNER/NAME", help="The same, as mlx-lm has it.")
    add("--private", action="store_true", help="Make the repository private if it is a new one.")
    add(
        "--base-model",
        metavar="OWNER/NAME",
        help="The model's repository, for a folder that does not name it.",
    )
    add(
        "--license",
        metavar="ID",
        help="The model's licence as the Hub calls it, such as apache-2.0, for a card that does "
        "not name it.",
    )
    defaults = {field.name: field.default for field in fields(ConvertOptions)}
    parser.set_defaults(**{name: None if d is MISSING else d for name, d in defaults.items()})
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.convert``."""
    options = ConvertOptions(**vars(make_parser().parse_args()))
    from .conversion.pipeline import convert_model  # imports mlx-lm, which takes seconds

    convert_model(options, say=lambda text: print(with_flags(text), flush=True))


if __name__ == "__main__":
    main()
