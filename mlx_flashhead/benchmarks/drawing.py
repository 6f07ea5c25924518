"""The pictures of ``benchmark``."""

from ..common.pictures import pyplot
from ..common.quantities import percent
from .conversion import TOTAL
from .head import DENSE as DENSE_HEAD
from .head import DENSE_FORMS, LOGITS
from .model import DENSE
from .output import PARTS
from .positions import DENSE_PATH
from .sampler import MLX_LM, OURS
from .server_output import draw_server


def draw(result: dict, path: str) -> None:
    """Draws one benchmark's figures: bars, or lines against the number of positions."""
    plt = pyplot()
    results = result["results"]
    height = 3.6 if result["kind"] == "positions" else 2.2
    figure, axes = plt.subplots(
        len(results), figsize=(8, 0.6 + height * len(results)), layout="constrained", squeeze=False
    )
    draw_one = {
        "head": _draw_head,
        "positions": _draw_positions,
        "model": _draw_model,
        "convert": _draw_convert,
        "first-use": _draw_convert,
        "sampler": _draw_sampler,
        "draft": _draw_draft,
        "host": _draw_host,
        "memory": _draw_memory,
        "server": draw_server,
    }
    for axis, one in zip(axes[:, 0], results, strict=True):
        draw_one[result["kind"]](axis, one)
        if result["kind"] != "positions":
            axis.invert_yaxis()
            axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_head(axis, one: dict) -> None:
    for name, ms in one["ms"].items():
        color = "tab:gray" if name in DENSE_FORMS else "tab:blue"
        bar = axis.barh(name, ms["median"], color=color)
        axis.bar_label(bar, fmt=" %.2f")
    axis.set(title=f"{one['name']}, {one['dtype']}", xlabel="ms per call")
    axis.margins(x=0.1)


def _draw_positions(axis, one: dict) -> None:
    colors = {DENSE_HEAD: "tab:gray", DENSE_PATH: "tab:orange", LOGITS: "tab:blue"}
    for name, spreads in one["ms"].items():
        medians, lower, upper = ([s[k] for s in spreads] for k in ("median", "lower", "upper"))
        axis.plot(one["counts"], medians, marker="o", color=colors[name], label=name)
        axis.fill_between(one["counts"], lower, upper, color=colors[name], alpha=0.2, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(one["counts"], [str(count) for count in one["counts"]])
    axis.set(
        title=f"{one['name']}, {one['dtype']}", xlabel="positions at once", ylabel="ms per call"
    )
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_model(axis, one: dict) -> None:
    for name, split in one["split_ms"].items():
        left = 0.0
        for part, color in zip(PARTS, ("tab:gray", "tab:orange", "tab:green"), strict=True):
            label = part if name == DENSE else None
            axis.barh(name, split[part], left=left, color=color, label=label)
            left += split[part]
    axis.set(title=f"{one['model']}, {one['sampler']}, batch {one['batch']}", xlabel="ms per step")
    axis.legend()


def _draw_convert(axis, one: dict) -> None:
    for stage, seconds in one["seconds"].items():
        if stage != TOTAL:
            axis.bar_label(axis.barh(stage, seconds, color="tab:blue"), fmt=" %.1f")
    what = "First use" if "again" in one else "Conversion"
    axis.set(title=f"{what} of {one.get('name') or one['model']}", xlabel="s")
    axis.margins(x=0.1)


def _draw_sampler(axis, one: dict) -> None:
    for name, ms in one["ms"].items():
        for form, color in ((MLX_LM, "tab:gray"), (OURS, "tab:blue")):
            bar = axis.barh(f"{name}, {form}", ms[form]["median"], color=color)
            axis.bar_label(bar, fmt=" %.2f")
    axis.set(title=f"{one['name']}, batch {one['positions']}", xlabel="ms per call")
    axis.margins(x=0.1)


def _draw_draft(axis, one: dict) -> None:
    for form in one["forms"]:
        bar = axis.barh(form["name"], form["tokens_per_second"]["median"], color="tab:blue")
        accepted = form["acceptance"]
        axis.bar_label(
            bar, labels=["" if accepted is None else f" {percent(accepted, 0)} accepted"]
        )
    axis.set(title=f"{one['draft_model']} drafts for {one['model']}", xlabel="tokens/s")
    axis.margins(x=0.2)


def _draw_host(axis, one: dict) -> None:
    for name, us in one["us"].items():
        bar = axis.barh(name, us["median"], color="tab:gray" if name == DENSE else "tab:blue")
        axis.bar_label(bar, fmt=" %.1f")
    axis.set(title=one["name"], xlabel="µs of the host per token")
    axis.margins(x=0.1)


def _draw_memory(axis, one: dict) -> None:
    for name, taken in one["memory"].items():
        axis.bar_label(axis.barh(name, taken["peak_mb"], color="tab:blue"), fmt=" %.0f")
    axis.set(title=f"{one['name']}, {one['form']}", xlabel="MB at the peak of loading")
    axis.margins(x=0.1)
