"""Writes docs/architectures.md: how FlashHead finds the head of each architecture.

    python scripts/architectures.py

It builds every architecture of the installed mlx-lm and mlx-vlm with random weights from the tests'
small configurations, with a head of its own and with one tied to the embedding. What it finds is
recorded in architectures.json, which the tests compare with the installed libraries, form by form.
So is which of mlx-lm's take several tokens a step.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from importlib.metadata import version
from pathlib import Path

import mlx.nn as nn
from tqdm import tqdm

CHECKOUT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # The script works uninstalled, too.
    sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests" / "helpers")]

from architecture_models import architectures, quantized, tiny_architecture
from emulated_mlx_lm import emulated
from mlx_flashhead.common.arguments import writable
from mlx_flashhead.common.command import command, from_extra
from mlx_flashhead.models.errors import UnsupportedHeadError
from mlx_flashhead.models.locate import check_plain_product, find_head
from mlx_flashhead.models.vlm import is_vlm
from vlm_configs import PICTURES
from wide_checks import form_that_holds

DOCUMENT = CHECKOUT / "docs" / "architectures.md"
RECORD = Path(__file__).with_suffix(".json")
NO_SUCH_FORM = "–"
REFUSED = "refused"
UNTESTED = "not tested"
LM_CONFIGS = "architecture_configs.py"
VLM_CONFIGS = "vlm_configs.py"
# A cell that names the head begins with this.
SERVED = "`"
STEPS = "several tokens a step"
# These are the tokens of prompts. The windows are of 8.
LENGTHS = 5, 12, 37
# So many tokens a step are tried.
WIDTHS = 2, 3, 4
HOLDS = {None: "no", False: "yes", True: "apart"}


@dataclass(frozen=True)
class Form:
    """One way to tie an architecture's head.

    Attributes:
        cell: The head's path in backticks, or one of NO_SUCH_FORM, REFUSED, UNTESTED.
        reason: Why it is not served.
        bits: The head's bits after ``mlx_lm.convert -q``, if it is quantized.
    """

    cell: str
    reason: str = ""
    bits: int | None = None

    @property
    def served(self) -> bool:
        """Whether FlashHead serves it."""
        return self.cell.startswith(SERVED)


# By architecture, its untied and its tied form.
Forms = dict[str, tuple[Form, Form]]
# Whether several tokens a step have the bits of single steps.
Steps = dict[str, str]


def examine(name: str, tied: bool, build: Callable[..., nn.Module], configs: str) -> Form:
    """How FlashHead finds the head of an architecture.

    Args:
        name: The architecture.
        tied: Whether the head is tied to the embedding.
        build: Makes a small model.
        configs: The file of small configurations, for messages.
    """
    try:
        model = build(name, tied=tied)
    except ImportError as error:
        return Form(REFUSED, f"mlx-lm cannot load it here ({error}).")
    except Exception as error:
        # An unknown architecture may fail in any way.
        return Form(
            UNTESTED,
            f"tests/helpers/{configs} has no small configuration for it "
            f"({type(error).__name__}: {error}).",
        )
    try:
        location = find_head(model)
        if location.tied != tied:
            return Form(NO_SUCH_FORM)
        check_plain_product(location)
    except UnsupportedHeadError as error:
        return Form(REFUSED, str(error))
    if is_vlm(model):
        bits = None
    else:
        bits = find_head(quantized(model)).rows().bits
    return Form(f"`{location.path}`", bits=bits)


def survey(progress: bool = True) -> Forms:
    """Untied and tied form of every architecture of the installed mlx-lm."""
    names = tqdm(architectures(), desc="Architectures of mlx-lm", disable=not progress)
    with emulated():
        return {name: _examine_both(name, tiny_architecture, LM_CONFIGS) for name in names}


def vlm_survey(progress: bool = True) -> Forms:
    """Untied and tied form of every architecture of the installed mlx-vlm."""
    # These import mlx-vlm.
    from vlm_models import tiny_vlm, vlm_architectures

    names = tqdm(vlm_architectures(), desc="Architectures of mlx-vlm", disable=not progress)
    with emulated("mlx_vlm"):
        return {name: _examine_both(name, tiny_vlm, VLM_CONFIGS) for name in names}


def _examine_both(name: str, build: Callable[..., nn.Module], configs: str) -> tuple[Form, Form]:
    """The untied and the tied form of an architecture."""
    return examine(name, False, build, configs), examine(name, True, build, configs)


def steps_survey(progress: bool = True) -> Steps:
    """Whether each architecture of the installed mlx-lm takes several tokens a step."""
    names = tqdm(architectures(), desc="Several tokens a step", disable=not progress)
    with emulated():
        return {name: steps_of(name) for name in names}


def steps_of(name: str) -> str:
    """Whether wide steps of an architecture hold, in float32 and in 4 bits."""
    try:
        model = tiny_architecture(name, tied=False)
    except ImportError:
        return HOLDS[None]
    found = [form_that_holds(model, LENGTHS, WIDTHS)]
    found.append(form_that_holds(quantized(model), LENGTHS, WIDTHS))
    if None in found:
        return HOLDS[None]
    return HOLDS[any(found)]


def recorded_steps() -> Steps:
    """Which architectures took several tokens a step when the script last ran."""
    steps: Steps = json.loads(RECORD.read_text(encoding="utf-8"))[STEPS]
    return steps


def recorded(library: str) -> Forms:
    """The forms of "mlx_lm" or "mlx_vlm" when the script last ran."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))[library]
    return {name: (Form(*untied), Form(*tied)) for name, (untied, tied) in record.items()}


def record(surveyed: dict[str, Forms], steps: Steps) -> str:
    """The content of architectures.json, a line for each architecture."""
    parts = []
    for library, forms in surveyed.items():
        lines = []
        for name, both in forms.items():
            entry = [list(astuple(form)) for form in both]
            lines.append(f"{json.dumps(name)}: {json.dumps(entry)}")
        joined = ",\n".join(lines)
        parts.append(f'"{library}": {{\n{joined}\n}}')
    parts.append(f'"{STEPS}": {json.dumps(steps, indent=0)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def document(lm: Forms, vlm: Forms, steps: Steps) -> str:
    """docs/architectures.md."""
    return f"""# Architectures

FlashHead serves {len(_served(lm))} of the {len(lm)} language-model architectures of mlx-lm
{version("mlx-lm")}, and {len(_served(vlm))} of the {len(vlm)} of mlx-vlm {version("mlx-vlm")}
that take text, without code for any of them: it traces a model on one token.
`python scripts/architectures.py` writes this page; tests compare it with the installed libraries.

The tables name the layer that makes the logits: one with its own weights (*untied*), or the
embedding (*tied*). A dash means that the library has no such form. *Bits* are those of the head
after `mlx_lm.convert -q`: some models keep a finer head.

`tests/models/test_architectures.py` and `test_vlm_architectures.py` run each form with random
weights, dense and quantized, on prompts, with caches and in batches, {len(PICTURES)} of mlx-vlm's
with a picture too. With all clusters scored the logits are the dense model's, after its own scales,
caps and biases. With few, the candidates' logits are, and the greedy token is a candidate. Plain
operations replace the Metal kernels of `bitnet` and `muse_spark` there.

*Several tokens a step* says whether steps of 2, 3 and 4 tokens leave all bits of logits and caches
that single steps leave, and the step after them too: after prompts of 5, 12 and 37 tokens, past the
ends of windows, in float32 and in 4 bits, on a CPU. They do for {_n_wide(steps)} of {len(steps)}.
*Apart* means that each operation of their attention runs once per token, since its formula for one
token is another than for several. A model itself is tried on the machine before it takes
several tokens a step.

## Architectures of mlx-lm

| untied | tied | bits | several tokens a step | architectures |
|---|---|---|---|---|
{_groups(lm, steps)}

Not served:

{chr(10).join(_reasons(lm))}

## Architectures of mlx-vlm

| untied | tied | architectures |
|---|---|---|
{_groups(vlm)}

Not served:

{chr(10).join(_reasons(vlm))}
"""


def _n_wide(steps: Steps) -> int:
    return sum(cell != HOLDS[None] for cell in steps.values())


def _groups(surveyed: Forms, steps: Steps | None = None) -> str:
    """A line for all architectures with the same layers, the most frequent ones first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, (untied, tied) in surveyed.items():
        cells = [untied.cell, tied.cell]
        if steps is not None:
            cells += [_bits((untied, tied)), steps[name]]
        groups.setdefault(tuple(cells), []).append(name)
    lines = []
    for group, names in sorted(groups.items(), key=lambda item: -len(item[1])):
        line = " | ".join([*group, ", ".join(names)])
        lines.append(f"| {line} |")
    return "\n".join(lines)


def _served(surveyed: Forms) -> list[str]:
    return [name for name, forms in surveyed.items() if any(form.served for form in forms)]


def _bits(forms: Iterable[Form]) -> str:
    bits = dict.fromkeys(str(form.bits or "as it was") for form in forms if form.served)
    return ", ".join(bits) or NO_SUCH_FORM


def _reasons(surveyed: Forms) -> list[str]:
    """A line for each reason, which is the sentence that a user gets, with its architectures."""
    by_reason: dict[str, list[str]] = {}
    for name, (untied, tied) in surveyed.items():
        reasons = {"untied": untied.reason, "tied": tied.reason}
        if untied.reason == tied.reason:
            reasons = {"": untied.reason}
        for form, reason in reasons.items():
            if reason:
                label = " ".join(filter(None, (name, form)))
                by_reason.setdefault(reason.replace(f"'{name}'", "…"), []).append(label)
    return [f"- {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


@command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=writable, default=str(DOCUMENT), help="default: %(default)s"
    )
    args = parser.parse_args()
    from_extra("mlx_vlm", "vlm", "scripts/architectures.py")
    surveyed = {"mlx_lm": survey(), "mlx_vlm": vlm_survey()}
    steps = steps_survey()
    RECORD.write_text(record(surveyed, steps), encoding="utf-8")
    Path(args.output).write_text(document(*surveyed.values(), steps), encoding="utf-8")
    for library, forms in surveyed.items():
        print(
            f"{len(_served(forms))} of {len(forms)} architectures of {library} {version(library)}"
        )
    print(f"{_n_wide(steps)} of {len(steps)} take several tokens a step")


if __name__ == "__main__":
    main()
