"""Writes a head's kernels and arrays for an app that uses MLX, on an iPad for example."""

from dataclasses import replace
from pathlib import Path

from .common.arguments import Parser
from .common.command import command, from_extra
from .common.flags import add_head_options
from .common.new_folder import new_file
from .common.tables import new_table, show

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
    """Entry point of ``mlx_flashhead.export``."""
    args = make_parser().parse_args()
    from_extra("rich", "report", "mlx_flashhead.export")  # before long work

    # --help needs none of these, which take seconds
    from .head.backend import PORTABLE
    from .head.plan import export_plan
    from .index.files import CONFIG_NAME
    from .loading.load import load_with_head
    from .loading.options import HeadOptions
    from .models.fetch import resolve
    from .models.install import installed_head
    from .models.locate import find_head

    output = Path(args.output).expanduser()
    if output.suffix != SUFFIX:
        raise ValueError(f"--output {output} must end in {SUFFIX}, such as head{SUFFIX}.")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}, make it first.")
    if (output.parent / CONFIG_NAME).exists():
        raise ValueError(
            f"--output {output} lies in a model's folder, where other programs take it "
            "for weights: choose another folder."
        )
    if output.exists() and not args.overwrite:
        raise ValueError(
            f"{output} exists already: choose another --output, or pass --overwrite to replace it."
        )
    options = replace(HeadOptions.from_flags(args), backend=PORTABLE, tunes=False)
    model, _, _ = load_with_head(resolve(args.model), options)
    head, location = installed_head(model), find_head(model)
    with new_file(output) as path:
        arrays = export_plan(head, location.path, location.hidden_dtype, path)
    title = f"{head.unverified_probes:,} of {head.n_clusters:,} clusters"
    table = new_table(title, ("array", "shape", "dtype"), left=3)
    for name, array in arrays.items():
        table.add_row(name, str(array.shape), str(array.dtype).removeprefix("mlx.core."))
    show(table)
    print(f"{output}: {output.stat().st_size / 1e6:.2f} MB")
    print(f"Next: add {output.name} and the model's folder to the app, as docs/ipad.md shows.")


if __name__ == "__main__":
    main()
