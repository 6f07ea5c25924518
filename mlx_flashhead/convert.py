"""Converts a model: the flags of ``mlx_lm.convert`` and those of FlashHead.

Names, defaults and limits are those of `conversion.options.ConvertOptions`.
"""

from dataclasses import MISSING, fields
from typing import Any

from .common.arguments import Parser
from .common.command import command, with_flags
from .conversion.options import HEAD_BITS, LIMITS, ConvertOptions

# The help of each option, by the headings.
OPTIONS = {
    "options": {
        "hf_path": "Model to convert: a Hugging Face or mlx-lm folder, or a Hub repository.",
        "revision": "Branch, tag or commit of the repository.",
        "mlx_path": "Folder to write (default: %(default)s).",
        "overwrite": "Replace it if a conversion has written it.",
        "trust_remote_code": "Allow the repository's own Python code.",
    },
    "weights": {
        "quantize": "Quantize the model.",
        "q_group_size": "Weights that share a scale (default: the mode's usual number).",
        "q_bits": "Bits per weight (default: the mode's usual).",
        "q_mode": "Quantization mode (default: %(default)s).",
        "quant_predicate": "Recipe of mixed bits.",
        "head_bits": "Bits of the head's rows, and of a tied embedding (default: 8 where the model "
        "is quantized, else as the model has it).",
        "fine_head": "Give a quantized model the finer output head of its original, of 8 bits or "
        "--head-bits: a repository, a folder or a safetensors file (without a value: the original "
        "that the model names).",
        "dtype": "Of the weights that are not quantized (default: an mlx-lm folder's own, else "
        "that of config.json).",
        "dequantize": "Undo the model's quantization.",
    },
    "FlashHead": {
        "index_only": "Make the FlashHead alone, a few MB that go beside the model in any of its "
        "precisions.",
        "quick": "Less text and fewer passes: a fraction of the time, and a few more clusters per "
        "token.",
        "cluster_size": "Tokens per cluster (default: %(default)s).",
        "n_probes": "Clusters scored per token (default: the number that is expected to be "
        "fastest).",
        "target_agreement": "Share of positions that keep the normal (dense) head's best token "
        "without verification (default: %(default)s).",
        "calibration": "Text to calibrate on: built-in text of many kinds, none, or a file "
        "(default: %(default)s).",
        "calibration_positions": "Positions to calibrate on (default: %(default)s).",
        "calibration_seconds": "Time limit of reading the built-in text (default: %(default)s).",
        "seed": "Seed of the clustering (default: %(default)s).",
    },
    "publishing": {
        "upload": "Upload the result to the Hugging Face Hub, to this repository (without a name: "
        "USER/MODEL-FlashHead-PRECISION).",
        "upload_repo": "The same, as mlx-lm has it.",
        "private": "Make the repository private if it is a new one.",
        "base_model": "The model's repository, for a folder that does not name it.",
        "license": "The model's licence as the Hub calls it, such as apache-2.0, for a card that "
        "does not name it.",
    },
}
FLAGS = {
    "hf_path": ["--hf-path", "--model"],
    "quantize": ["-q", "--quantize"],
    "dequantize": ["-d", "--dequantize"],
}
METAVARS = {
    "hf_path": "FOLDER_OR_REPO",
    "mlx_path": "FOLDER",
    "head_bits": "|".join(map(str, HEAD_BITS)),
    "fine_head": "SOURCE",
    "calibration": "builtin|none|FILE",
    "upload": "OWNER/NAME",
    "upload_repo": "OWNER/NAME",
    "base_model": "OWNER/NAME",
    "license": "ID",
}
CHOICES = {
    "q_mode": ("affine", "mxfp4", "nvfp4", "mxfp8"),
    "quant_predicate": ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"),
}


def make_parser() -> Parser:
    parser = Parser(
        prog="mlx_flashhead.convert",
        description="Make a folder of a model and its FlashHead, or of a FlashHead alone.",
    )
    defaults = {each.name: each.default for each in fields(ConvertOptions)}
    for heading, options in OPTIONS.items():
        group: Any = parser if heading == "options" else parser.add_argument_group(heading)
        for name, text in options.items():
            flags, default = FLAGS.get(name, ["--" + name.replace("_", "-")]), defaults[name]
            about: dict[str, Any] = {
                "type": LIMITS.get(name),
                "metavar": METAVARS.get(name),
                "choices": CHOICES.get(name),
            }
            if name in ("fine_head", "upload"):
                about |= {"nargs": "?", "const": True}
            elif default is False:
                about = {"action": "store_true"}
            about["default"] = None if default is MISSING else default
            group.add_argument(*flags, help=text, **about)
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.convert``."""
    options = ConvertOptions(**vars(make_parser().parse_args()))
    from .conversion.pipeline import convert_model  # imports mlx-lm, which takes seconds

    convert_model(options, say=lambda text: print(with_flags(text), flush=True))


if __name__ == "__main__":
    main()
