"""The card, README.md, made from a folder's settings and the template in card.md.

A person may add text below a marker. Conversions and uploads keep it.
"""

from pathlib import Path

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from ..common.tables import percent
from ..index.files import FILE_NAME, is_companion
from ..index.settings import FlashHeadConfig
from .licences import Licence, changes_in

MARKER = "<!-- mlx_flashhead: your own text goes below this line and is kept -->"
RELATIONS = ("quantized", "adapter")
SOURCES = {"given": "given text of many kinds", "file": "a text that was given"}


def write_card(
    folder: Path,
    metadata: dict,
    config: FlashHeadConfig,
    licence: Licence | None,
    title: str,
    model: str,
    own_text: str = "",
) -> None:
    """Writes README.md into the folder of a model with a FlashHead, or of a FlashHead alone.

    The examples name it as ``model``, a repository or a folder. ``own_text`` is a person's.
    """
    base, link = metadata.get("base_model"), str(metadata.get("license_link"))
    if not isinstance(base, str) or metadata.get("base_model_relation") not in RELATIONS:
        base = None
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"percent": percent, "size": _size, "number": _number}
    template = environment.from_string(
        Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    )
    versions = config.recipe.get("versions", {})
    body = template.render(
        title=title,
        model=model,
        base=base,
        link=base and f"[{base}](https://huggingface.co/{base})",
        size=(folder / FILE_NAME).stat().st_size if is_companion(folder) else None,
        config=config,
        source=SOURCES.get(config.calibration.get("source", "")),
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        licence=licence,
        licence_name=metadata.get("license_name") or metadata.get("license"),
        licence_link=link if link.startswith("http") else None,
        changes=changes_in(folder),
    )
    header = ModelCardData(**metadata, ignore_metadata_errors=True).to_yaml()
    text = f"---\n{header}\n---\n\n{body}\n{MARKER}\n{own_text}"
    (folder / "README.md").write_text(text, encoding="utf-8")


def text_below_marker(card: str) -> str:
    """A person's text on a card: all below the marker, or the whole of a card without a marker."""
    if not card:
        return ""
    _, marker, below = card.partition(f"{MARKER}\n")
    return below if marker else ModelCard(card, ignore_metadata_errors=True).text.strip("\n") + "\n"


def _number(value: float | None, decimals: int) -> str:
    return "–" if value is None else f"{value:.{decimals}f}"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.2f} MB" if n_bytes >= 1e4 else f"{n_bytes:.0f} B"
