"""Uploads the result of a conversion."""

from pathlib import Path

from .common.arguments import Parser
from .common.command import command


def make_parser() -> Parser:
    """The parser of ``mlx_flashhead.upload``."""
    parser = Parser(
        prog="mlx_flashhead.upload",
        description="Upload the result of mlx_flashhead.convert to the Hugging Face Hub. Run it "
        "again to continue an interrupted upload.",
        example="mlx_flashhead.upload --path mlx_model",
    )
    add = parser.add_argument
    add("--path", required=True, metavar="DIR", help="Folder to upload.")
    add(
        "--repo",
        "--upload-repo",
        metavar="OWNER/NAME",
        help="Repository to upload to (default: the conversion's name for it, under your own).",
    )
    add("--private", action="store_true", help="Make the repository private if it is a new one.")
    add(
        "--license",
        help="The model's licence, such as apache-2.0, for a card that does not name it.",
    )
    return parser


@command
def main() -> None:
    """Entry point."""
    args = make_parser().parse_args()
    folder = Path(args.path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"There is no folder {args.path}: check --path.")
    # --help and mistakes do without this, which takes seconds.
    from .publishing.publish import publish

    address = publish(folder, args.repo, private=args.private, license=args.license, say=print)
    print(f"Uploaded to {address}")


if __name__ == "__main__":
    main()
