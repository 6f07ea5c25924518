"""Uploads the result of a conversion."""

from pathlib import Path

from .common.arguments import Parser
from .common.command import command


def make_parser() -> Parser:
    parser = Parser(
        prog="mlx_flashhead.upload",
        description="Upload what mlx_flashhead.convert has made, a model with its FlashHead or a "
        "FlashHead alone, to the Hugging Face Hub. An upload that was interrupted continues when "
        "the same command is run again.",
    )
    add = parser.add_argument
    add("--path", required=True, metavar="DIR", help="Its folder.")
    repo = "Repository to upload to (default: the conversion's name for it, under your own)."
    add("--repo", "--upload-repo", metavar="OWNER/NAME", help=repo)
    add("--private", action="store_true", help="Make the repository private if it is a new one.")
    licence = (
        "The model's licence as the Hub calls it, such as apache-2.0, for a card that does not "
    )
    add("--license", metavar="ID", help=licence + "name it.")
    return parser


@command
def main() -> None:
    """Entry point of ``mlx_flashhead.upload``."""
    args = make_parser().parse_args()
    folder = Path(args.path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"There is no folder {args.path}: check --path.")
    from .publishing.publish import publish  # after the flags are read: --help is quick

    address = publish(folder, args.repo, private=args.private, license=args.license, say=print)
    print(f"Uploaded to {address}")


if __name__ == "__main__":
    main()
