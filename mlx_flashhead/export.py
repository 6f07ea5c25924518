"""Writes a head's kernels and arrays for an app that uses MLX, on an iPad for example."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from .common.arguments import Parser
from .common.command import command
from .common.flags import add_head_options
from .common.new_folder import new_file
from .common.tables import megabytes

SUFFIX = ".safetensors"
# An app measures nothing: its choices are not verified there.
PROBES = "Clusters scored per token (default: the FlashHead's own number for unverified text)."


def make_parser() -> Parser:
    """The parser of ``mlx_flashhead.export``."""
    parser = Parser(
        prog="mlx_flashhead.export",
        description="Write a FlashHead's Metal kernels and arrays to a file for an app made with "
        "mlx-swift-lm. The Swift package of this project, metal/swift, reads it there.",
        example=f"mlx_flashhead.export --model mlx_model --output head{SUFFIX}",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="Folder or Hugging Face repository of any model that mlx-lm loads.",
    )
    add_head_options(parser, probes=PROBES)
    parser.add_argument(
        "--output",
        required=True,
        metavar=f"head{SUFFIX}",
        help="File to write.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace an existing file.")
    return parser


@command
def main() -> None:
    """Entry point."""
    args = make_parser().parse_args()
    # --help needs none of these, which take seconds.
    from .conversion.build import index_nbytes
    from .conversion.pipeline import check_space
    from .head.backend import PORTABLE
    from .head.plan import export_plan
    from .loading.head_options import HeadOptions
    from .loading.load import attach_head
    from .loading.sources import explicit_head
    from .models.fetch import resolve
    from .models.install import installed_head
    from .models.loading import load_dense
    from .models.locate import find_head

    output = _checked_output(args)
    options = replace(HeadOptions.from_flags(args), backend=PORTABLE, tunes=False)
    folder = resolve(args.model)
    stored = explicit_head(options, folder)
    model, tokenizer, _ = load_dense(folder)
    rows = find_head(model).rows()
    # The rows stay the model's: the file has the index alone.
    check_space(output, output.parent, index_nbytes(rows), "output")
    del rows
    attach_head(model, tokenizer, stored, folder, options)
    head = installed_head(model)
    location = find_head(model)
    with new_file(output) as path:
        try:
            export_plan(head, location.path, location.hidden_dtype, path)
        except RuntimeError as error:
            # MLX raises it, as for a disk that others have filled.
            raise ValueError(
                f"{output} cannot be written ({error}): free some space or choose another --output."
            ) from error
    scored = f"{head.unverified_probes:,} of {head.n_clusters:,} clusters scored per token"
    print(f"{output}: {megabytes(output.stat().st_size)}, {scored}")
    print(
        f"Next: add {output.name}, the model's folder and this project's Swift package "
        "(metal/swift) to the app, and call installFlashHead(from: headFile, in: model.model)."
    )


def _checked_output(args: Namespace) -> Path:
    """The file to write; ValueError if it must not be written there."""
    from .index.files import CONFIG_NAME

    output = Path(args.output).expanduser()
    if output.suffix != SUFFIX:
        raise ValueError(f"--output {output} must end in {SUFFIX}, such as head{SUFFIX}.")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}, make it first.")
    if (output.parent / CONFIG_NAME).exists():
        raise ValueError(
            f"--output {output} lies in a model's folder, where other programs take it for "
            "weights: choose another folder."
        )
    if output.exists() and not args.overwrite:
        raise ValueError(
            f"{output} exists already: choose another --output, or pass --overwrite to replace it."
        )
    return output


if __name__ == "__main__":
    main()
