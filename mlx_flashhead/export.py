"""Writes a head as functions for an app that uses MLX, on an iPad for example."""

from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx

from .cli.arguments import Parser, whole_number
from .cli.console import command
from .cli.tables import check_tables, new_table, show
from .companion.load import load
from .companion.look_up import add_look_up_options, look_up_options
from .exporting.functions import (
    METAL,
    PORTABLE,
    ExportedFunction,
    export_head,
    head_dtype,
    head_weights,
)
from .exporting.mlxfn import VERSIONS, rewrite_for
from .index.new_folder import new_file
from .models.install import installed_head

SUFFIX = ".mlxfn"


def make_parser() -> Parser:
    """The command's arguments."""
    parser = Parser(
        prog="mlx_flashhead.export",
        description="Write a FlashHead's functions to a file that mlx-swift's importFunction "
        "reads: hidden state in; greedy token, candidates or full logits out.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="Folder or Hugging Face repository of any model that mlx-lm loads.",
    )
    add_look_up_options(parser)
    parser.add_argument("--output", required=True, metavar="head.mlxfn", help="File to write.")
    parser.add_argument(
        "--include-weights",
        action="store_true",
        help="Put the weights into the file. Otherwise the functions take them as arguments, and "
        "they are written to a file beside it that ends in .safetensors.",
    )
    parser.add_argument(
        "--n-probes",
        type=whole_number(1),
        help="Clusters scored per token (default: the number chosen at conversion).",
    )
    parser.add_argument(
        "--backend",
        choices=(METAL, PORTABLE),
        default=METAL,
        help="metal: FlashHead's kernels (default). mlx: plain operations, also for a CPU.",
    )
    parser.add_argument(
        "--for-mlx",
        choices=VERSIONS,
        default=VERSIONS[-1],
        metavar="VERSION",
        help="MLX that reads the file: 0.32 for 0.32.1 and later (default), 0.31 for 0.31, as in "
        "mlx-swift 0.31.6. The latter needs the backend metal.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace existing files.")
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.export``."""
    args = make_parser().parse_args()
    check_tables("mlx_flashhead.export")
    output = Path(args.output).expanduser()
    weights_file = None if args.include_weights else output.with_suffix(".safetensors")
    _check_files(output, weights_file, args.overwrite)
    if args.for_mlx != VERSIONS[-1] and args.backend != METAL:
        raise ValueError(f"--for-mlx {args.for_mlx} is for --backend metal: leave one of them out.")

    options = look_up_options(args) | {"n_probes": args.n_probes}
    model, _ = load(args.model, backend=PORTABLE, **options)
    head = installed_head(model)
    with ExitStack() as stack:
        path = stack.enter_context(new_file(output))
        functions = export_head(
            head,
            path,
            dtype=head_dtype(model),
            backend=args.backend,
            include_weights=args.include_weights,
        )
        if args.for_mlx != VERSIONS[-1]:
            rewrite_for(args.for_mlx, path)
        if weights_file is not None:
            weights = stack.enter_context(new_file(weights_file))
            mx.save_safetensors(str(weights), head_weights(head.clustered), {"format": "mlx"})
    print_table(functions, f"{head.n_probes} of {head.n_clusters} clusters, {args.backend}")
    for file in filter(None, (output, weights_file)):
        print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")
    print(f"Next: {_next_step(args, output, weights_file)}")


def print_table(functions: list[ExportedFunction], title: str) -> None:
    """Prints the functions, with the shape and dtype of each argument and result."""
    table = new_table(title, ("function", "argument", "shape", "dtype"), left=4)
    for function in functions:
        first = function.name
        for name, (shape, dtype) in function.inputs.items():
            table.add_row(first, name, str(shape), _name(dtype))
            first = ""
        for shape, dtype in function.outputs:
            table.add_row("", "→", str(shape), _name(dtype))
        table.add_section()
    show(table)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _next_step(args, output: Path, weights: Path | None) -> str:
    files = output.name if weights is None else f"{output.name} and {weights.name}"
    if args.backend == PORTABLE:
        return f'mx.import_function("{output}") in Python, or importFunction(from:) in Swift.'
    return (
        f"add {files} to the app and call importFunction(from:), as docs/ipad.md shows; its MLX "
        f"must be {'0.31' if args.for_mlx == '0.31' else '0.32.1 or later'}."
    )


def _check_files(output: Path, weights: Path | None, overwrite: bool) -> None:
    if output.suffix != SUFFIX:
        raise ValueError(f"--output {output} must end in {SUFFIX}, such as head{SUFFIX}.")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}, make it first.")
    for file in filter(None, (output, weights)):
        if file.is_dir():
            raise ValueError(f"{file} is a folder: choose another --output.")
        if file.exists() and not overwrite:
            raise ValueError(
                f"{file} exists already: choose another --output, or pass --overwrite to replace "
                "it."
            )


if __name__ == "__main__":
    main()
