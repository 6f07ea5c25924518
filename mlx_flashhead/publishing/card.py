"""The card, README.md, made from a folder's settings and the text in card.md.

A person may add text below a marker. Conversions and uploads keep it.
"""

from pathlib import Path
from string import Template

from huggingface_hub import ModelCard, ModelCardData

from ..common.quantities import percent
from ..index.files import FILE_NAME, is_companion
from ..index.settings import FlashHeadConfig
from .licences import Licence, changes_in

MARKER = "<!-- mlx_flashhead: your own text goes below this line and is kept -->"
RELATIONS = ("quantized", "adapter")
SOURCES = {
    "given": "given text of many kinds",
    "file": "a text that was given",
}
USE = """\
```
mlx_flashhead.generate --model {arguments} --prompt "Why is the sky blue?"
```

```python
from mlx_flashhead import load, generate

model, tokenizer = load({loaded})
prompt = "Why is the sky blue?"
if tokenizer.chat_template is not None:
    messages = [{{"role": "user", "content": prompt}}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
print(generate(model, tokenizer, prompt, max_tokens=100))
```"""
PLACE = "These {size} go beside the model, in any of its precisions: bfloat16, 8 bits, 4 bits.\n\n"
USE_DENSE = """\


Plain [mlx-lm](https://github.com/ml-explore/mlx-lm) reads the same files as the ordinary dense
model, without FlashHead and its speed:

```
mlx_lm.generate --model {model} --prompt "Why is the sky blue?"
```"""
LEGEND = """\
*Agreement*: the same best token as the dense head. *Coverage*: the true next token is among the
scored ones. *KL*: from the dense head's distribution, in nats. *Perplexity*: of the true next
tokens, as a multiple of the dense head's{dense}, with estimates for the tokens that are not scored.
*Bytes*: weights that the head reads per token; the dense head reads {dense_bytes}. **Bold**: the
setting. Speed was not measured."""
NOT_MEASURED = """\
Nothing, since it was not calibrated. `mlx_flashhead.evaluate text --model {model} --text FILE`
measures it."""


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
    base = metadata.get("base_model")
    known = isinstance(base, str) and metadata.get("base_model_relation") in RELATIONS
    named = f"[{base}](https://huggingface.co/{base})" if known else "a language model"
    if is_companion(folder):
        what = f"The **FlashHead** of {named}"
        dense = base if known else "MODEL"
        use = PLACE.format(size=_size((folder / FILE_NAME).stat().st_size)) + USE.format(
            arguments=f"{dense} --flash-head {model}", loaded=f'"{dense}", flash_head="{model}"'
        )
    else:
        what = f"{named[0].upper()}{named[1:]} in the format of MLX, with **FlashHead**"
        use = USE.format(arguments=model, loaded=f'"{model}"') + USE_DENSE.format(model=model)
    template = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"))
    body = template.substitute(
        title=title,
        attribution=f"**{licence.attribution}**\n\n" if licence and licence.attribution else "",
        what=what,
        use=use,
        n_clusters=f"{config.n_clusters:,}",
        cluster_size=config.cluster_size,
        n_probes=config.n_probes,
        measured=_measured(config, model),
        command=config.recipe.get("command", "# the command was not recorded"),
        made_with=_made_with(config),
        licence=_licence(metadata, licence, changes_in(folder)),
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


def _measured(config: FlashHeadConfig, model: str) -> str:
    report = config.report
    rows = report.get("by_probes")
    if not rows:
        return NOT_MEASURED.format(model=model)
    lines = [
        f"On {report['positions']:,} positions of {SOURCES[config.calibration['source']]} that the "
        "centroids were not fitted on:",
        "",
        "| probes | agreement | coverage | KL | perplexity | bytes per token | of dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        chosen = "**" if row["n_probes"] == config.n_probes else ""
        figures = (
            f"{chosen}{row['n_probes']}{chosen}",
            percent(row["agreement"]),
            percent(row["coverage"]),
            *("–" if row[key] is None else f"{row[key]:.3f}" for key in ("kl", "perplexity_ratio")),
            _size(row["bytes_per_token"]),
            percent(row["bytes_share"], 1),
        )
        lines.append(f"| {' | '.join(figures)} |")
    dense = report["dense_perplexity"]
    legend = LEGEND.format(
        dense="" if dense is None else f" {dense:.2f}", dense_bytes=_size(report["dense_bytes"])
    )
    return "\n".join([*lines, "", legend])


def _made_with(config: FlashHeadConfig) -> str:
    recipe, calibration = config.recipe, config.calibration
    versions = ", ".join(f"{name} {v}" for name, v in recipe.get("versions", {}).items())
    lines = [f"With {versions} on {recipe.get('platform', 'an unknown system')}."]
    positions = calibration.get("positions", 0)
    if positions:
        source = SOURCES[calibration["source"]]
        lines.append(
            f"Calibrated on {positions:,} positions of {source}, seed {calibration['seed']}."
        )
    else:
        lines.append(f"Not calibrated, seed {calibration.get('seed', 0)}.")
    for name, digest in recipe.get("files", {}).items():
        lines.append(f"SHA-256 of {name}: `{digest}`.")
    return "\n".join(lines)


def _licence(metadata: dict, licence: Licence | None, changes: str) -> str:
    if licence is not None:
        return f"[{licence.name}]({licence.link}). {licence.notice.rstrip('.')}. {changes}"
    name = metadata.get("license_name") or metadata.get("license")
    if not name:
        return "The base model's. Its files do not name it."
    link = metadata.get("license_link")
    is_address = isinstance(link, str) and link.startswith("http")
    return f"The base model's: {f'[{name}]({link})' if is_address else name}. {changes}"


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e6:.2f} MB" if n_bytes >= 1e4 else f"{n_bytes:.0f} B"
