"""Converts a model: the flags of ``mlx_lm.convert`` and those of FlashHead.

Names, defaults and limits are those of `conversion.options.ConvertOptions`.
"""

from dataclasses import fields
from typing import Any

from .common.arguments import Parser
from .common.command import command, with_flags
from .conversion.options import LIMITS, ConvertOptions

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
        "q_mode": "affine, mxfp4, nvfp4 or mxfp8 (default: %(default)s).",
        "quant_predicate": "Recipe of mixed bits.",
        "head_bits": "Bits of the head's rows, and of a tied embedding: 4, 6, 8 or 16 (default: 8 "
        "where the model is quantized, else as the model has it).",
        "fine_head": "Give a quantized model the finer output head of its original: a repository, "
        "a folder or a safetensors file (without a value: the original that the model names).",
        "dtype": "Of weights that stay floats (default: an mlx-lm folder's own, or config.json's).",
        "dequantize": "Undo the model's quantization.",
    },
    "FlashHead": {
        "index_only": "Make the FlashHead alone, which serves the model in any of its precisions.",
        "quick": "A fraction of the text and time, and a few more clusters per token.",
        "cluster_size": "Tokens per cluster (default: %(default)s).",
        "n_probes": "Clusters scored per token (default: the expected fastest number).",
        "target_agreement": "Share of positions that keep the normal (dense) head's best token "
        "without verification (default: %(default)s).",
        "calibration": "Text: builtin (of many kinds), none, or a file (default: %(default)s).",
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
        "license": "The model's licence, such as apache-2.0, for a card that does not name it.",
    },
}
ALIASES = {"hf_path": ["--model"], "quantize": ["-q"], "dequantize": ["-d"]}
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")


def make_parser() -> Parser:
    parser = Parser(
        prog="mlx_flashhead.convert",
        description="Make a folder of a model and its FlashHead, or of a FlashHead alone.",
    )
    defaults: dict[str, Any] = {each.name: each.default for each in fields(ConvertOptions)}
    defaults["hf_path"] = None  # needed, which the options say
    for heading, options in OPTIONS.items():
        group: Any = parser if heading == "options" else parser.add_argument_group(heading)
        for name, text in options.items():
            flags = ["--" + name.replace("_", "-"), *ALIASES.get(name, [])]
            about: dict[str, Any] = {"type": LIMITS.get(name)}
            if name == "quant_predicate":
                about = {"choices": RECIPES}
            elif name in ("fine_head", "upload"):
                about = {"nargs": "?", "const": True}
            elif defaults[name] is False:
                about = {"action": "store_true"}
            group.add_argument(*flags, help=text, default=defaults[name], **about)
    return parser


@command
def main() -> None:
    options = ConvertOptions(**vars(make_parser().parse_args()))
    from .conversion.pipeline import convert_model  # imports mlx-lm, which takes seconds

    convert_model(options, say=lambda text: print(with_flags(text), flush=True))


if __name__ == "__main__":
    main()
