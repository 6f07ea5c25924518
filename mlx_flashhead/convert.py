"""Converts a model: the flags of ``mlx_lm.convert`` and those of FlashHead."""

from .cli.console import command
from .conversion.pipeline import convert
from .conversion.quantization import HEAD_BITS
from .models.compat import configure_parser


def make_parser():
    """mlx-lm's parser, extended."""
    parser = configure_parser()
    parser.prog = "mlx_flashhead.convert"
    parser.description = "Convert a model to a FlashHead checkpoint."
    for action in parser._actions:
        if action.dest == "hf_path":
            action.help = "Model to convert: a Hugging Face or mlx-lm folder, or a Hub repository."
    group = parser.add_argument_group("FlashHead")
    group.add_argument(
        "--head-bits",
        type=int,
        choices=HEAD_BITS,
        help="Bits of the head's rows, apart from the body's (default: as the model has it).",
    )
    group.add_argument(
        "--cluster-size", type=int, default=16, help="Tokens per cluster (default: %(default)s)."
    )
    group.add_argument(
        "--n-probes",
        type=int,
        help="Clusters scored per token (default: chosen for --target-agreement).",
    )
    group.add_argument(
        "--target-agreement",
        type=float,
        default=0.99,
        help="Share of positions that must keep the dense head's best token, measured on the "
        "held-out part of the calibration (default: %(default)s).",
    )
    group.add_argument(
        "--calibration",
        default="self",
        metavar="self|none|FILE",
        help="Text to calibrate on: written by the model itself, none, or a file "
        "(default: %(default)s).",
    )
    group.add_argument(
        "--calibration-positions",
        type=int,
        default=12_000,
        help="Positions to calibrate on (default: %(default)s).",
    )
    group.add_argument("--seed", type=int, default=0, help="Seed (default: %(default)s).")
    group.add_argument(
        "--revision", help="Branch, tag or commit of the model's repository (default: main)."
    )
    group.add_argument(
        "--base-model",
        metavar="OWNER/NAME",
        help="The model's repository, where --hf-path is a folder that does not say so: the card "
        "names it and has its licence and language.",
    )
    group.add_argument(
        "--license",
        metavar="ID",
        help="The model's licence as the Hub calls it, such as apache-2.0, where its card does not "
        "name it.",
    )
    group.add_argument(
        "--upload",
        nargs="?",
        const="",
        metavar="OWNER/NAME",
        help="Upload the checkpoint to the Hugging Face Hub (without a name: "
        "USER/MODEL-FlashHead-4bit, or whatever the precision is). The repository is made before "
        "the long work, and the folder is kept.",
    )
    group.add_argument(
        "--private", action="store_true", help="Make the repository private if it is a new one."
    )
    group.add_argument(
        "--overwrite", action="store_true", help="Replace the target folder if it exists."
    )
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.convert``."""
    parser = make_parser()
    args = parser.parse_args()
    if args.hf_path is None:
        parser.error("--model is needed: the folder or repository of the model to convert")
    if args.upload and args.upload_repo and args.upload != args.upload_repo:
        parser.error("--upload and --upload-repo name two repositories: give one of them")
    args.upload_repo = args.upload or args.upload_repo
    args.upload = args.upload is not None
    convert(**vars(args))


if __name__ == "__main__":
    main()
