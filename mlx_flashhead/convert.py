"""Converts a model. Takes the flags of ``mlx_lm.convert``, and FlashHead's own.

`conversion.options.ConvertOptions` has their names, defaults and limits.
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
        "overwrite": "Replace the folder if a conversion has written it.",
        "trust_remote_code": "Run the model's own Python code.",
    },
    "weights": {
        "quantize": "Quantize the model.",
        "q_group_size": "Weights that share a scale (default: as usual for --q-mode).",
        "q_bits": "Bits per weight (default: as usual for --q-mode).",
        "q_mode": "affine, mxfp4, nvfp4 or mxfp8 (default: %(default)s).",
        "quant_predicate": "Recipe of mixed bits.",
        "head_bits": "Bits of the head's rows, and of a tied embedding: 4, 6, 8 or 16 (default: 8 "
        "with --quantize or --fine-head, else as the model has it).",
        "fine_head": "Give a quantized model the finer output head of its original: a repository, "
        "a folder or a safetensors file (without a value: the original that the model names).",
        "dtype": "Type of the weights that stay floats (default: what an mlx-lm folder has, else "
        "what config.json says).",
        "dequantize": "Undo the model's quantization.",
    },
    "FlashHead": {
        "index_only": "Make only the FlashHead, which fits the model in all of its precisions.",
        "quick": "Read less text in fewer passes: a fraction of the time, and a few more clusters "
        "per token.",
        "cluster_size": "Tokens per cluster (default: %(default)s).",
        "n_probes": "Clusters scored per token (default: the number with the fewest expected "
        "bytes).",
        "target_agreement": "Share of positions at which unverified text keeps the normal (dense) "
        "head's best token (default: %(default)s).",
        "calibration": "Text to calibrate on: builtin (of many kinds), none, or a file (default: "
        "%(default)s).",
        "calibration_positions": "Positions to calibrate on (default: %(default)s).",
        "calibration_seconds": "Longest time to read the built-in text, in seconds (default: "
        "%(default)s).",
        "seed": "Seed of the clustering (default: %(default)s).",
    },
    "publishing": {
        "upload": "Upload the result to the Hugging Face Hub, to this repository (without a name: "
        "USER/MODEL-FlashHead-PRECISION).",
        "upload_repo": "The same as --upload, under mlx-lm's name.",
        "private": "Make the repository private if it is a new one.",
        "base_model": "The model's repository, for a folder that does not name it.",
        "license": "The model's licence, such as apache-2.0, for a card that does not name it.",
    },
}
ALIASES = {"hf_path": ["--model"], "quantize": ["-q"], "dequantize": ["-d"]}
RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")


def make_parser() -> Parser:
    """The parser of ``mlx_flashhead.convert``."""
    parser = Parser(
        prog="mlx_flashhead.convert",
        description="Make a folder with a model and its FlashHead, or with a FlashHead alone.",
        example="mlx_flashhead.convert --model mlx-community/gemma-3-1b-it-4bit",
    )
    defaults: dict[str, Any] = {each.name: each.default for each in fields(ConvertOptions)}
    # A model is needed: `ConvertOptions` says so.
    defaults["hf_path"] = None
    for heading, options in OPTIONS.items():
        group: Any = parser
        if heading != "options":
            group = parser.add_argument_group(heading)
        for name, text in options.items():
            _add_option(group, name, text, defaults[name])
    return parser


def _add_option(group: Any, name: str, text: str, default: Any) -> None:
    """Adds the flag of a field of `ConvertOptions`."""
    flags = ["--" + name.replace("_", "-"), *ALIASES.get(name, [])]
    if name == "quant_predicate":
        group.add_argument(*flags, help=text, default=default, choices=RECIPES)
    elif name in ("fine_head", "upload"):
        group.add_argument(*flags, help=text, default=default, nargs="?", const=True)
    elif default is False:
        group.add_argument(*flags, help=text, action="store_true")
    else:
        group.add_argument(*flags, help=text, default=default, type=LIMITS.get(name))


@command
def main() -> None:
    """Entry point."""
    options = ConvertOptions(**vars(make_parser().parse_args()))
    # This imports mlx-lm, which takes seconds: mistakes and --help do without.
    from .conversion.pipeline import convert_model

    convert_model(options, say=_say)


def _say(text: str) -> None:
    print(with_flags(text), flush=True)


if __name__ == "__main__":
    main()
