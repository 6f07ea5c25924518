"""Writes a head's kernels and arrays for an app that uses MLX, on an iPad for example."""

from dataclasses import replace
from pathlib import Path

from .common.arguments import Parser
from .common.command import command
from .common.flags import add_head_options
from .common.new_folder import new_file
from .common.tables import megabytes

SUFFIX = ".safetensors"


def make_parser() -> Parser:
    parser = Parser(
        prog="mlx_flashhead.export",
        description="Write a FlashHead's Metal kernels and arrays to a file for an app made with "
        "mlx-swift-lm; docs/ipad.md has the app's side.",
    )
    model = "Folder or Hugging Face repository of any model that mlx-lm loads."
    parser.add_argument("--model", required=True, help=model)
    add_head_options(parser)
    output = {"metavar": f"head{SUFFIX}", "help": "File to write."}
    parser.add_argument("--output", required=True, **output)
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing file.")
    return parser


@command
def main() -> None:
    args = make_parser().parse_args()
    # --help needs none of these, which take seconds
    from .head.backend import PORTABLE
    from .head.plan import export_plan
    from .index.files import CONFIG_NAME
    from .loading.head_options import HeadOptions
    from .loading.load import load_with_head
    from .models.fetch import resolve
    from .models.install import installed_head
    from .models.locate import find_head

    output = Path(args.output).expanduser()
    if output.suffix != SUFFIX:
        raise ValueError(f"--output {output} must end in {SUFFIX}, such as head{SUFFIX}.")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}, make it first.")
    if (output.parent / CONFIG_NAME).exists():
        reason = "where other programs take it for weights: choose another folder"
        raise ValueError(f"--output {output} lies in a model's folder, {reason}.")
    if output.exists() and not args.overwrite:
        remedy = "choose another --output, or pass --overwrite to replace it"
        raise ValueError(f"{output} exists already: {remedy}.")
    options = replace(HeadOptions.from_flags(args), backend=PORTABLE, tunes=False)
    model, _, _ = load_with_head(resolve(args.model), options)
    head, location = installed_head(model), find_head(model)
    with new_file(output) as path:
        export_plan(head, location.path, location.hidden_dtype, path)
    scored = f"{head.unverified_probes:,} of {head.n_clusters:,} clusters scored per token"
    print(f"{output}: {megabytes(output.stat().st_size)}, {scored}")
    print(f"Next: add {output.name} and the model's folder to the app, as docs/ipad.md shows.")


if __name__ == "__main__":
    main()
