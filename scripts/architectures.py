"""Writes docs/architectures.md: how FlashHead finds the head of each architecture.

    python scripts/architectures.py [--output docs/architectures.md]

It builds every architecture of the installed mlx-lm and mlx-vlm with random weights from the tests'
small configurations, with a head of its own and with one tied to the embedding. For a form that is
not served it writes the sentence that a user gets.
"""

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from textwrap import fill

import mlx.nn as nn
from tqdm import tqdm

CHECKOUT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests" / "helpers")]  # works uninstalled too

from architecture_models import architectures, quantized, tiny_architecture
from emulated_mlx_lm import emulated
from mlx_flashhead.common.command import check_writable, command, from_extra
from mlx_flashhead.models.libraries import is_vlm
from mlx_flashhead.models.locate import check_plain_product, find_head
from mlx_flashhead.models.model_errors import UnsupportedHeadError
from vlm_configs import PICTURES

DOCUMENT = CHECKOUT / "docs" / "architectures.md"
NO_SUCH_FORM, REFUSED, UNTESTED = "–", "refused", "not tested"
VLM_HEADING = "# Architectures of mlx-vlm"
SERVED = "`"  # begins a cell that names the head


@dataclass(frozen=True)
class Form:
    """One way to tie an architecture's head."""

    cell: str  # the head's path in backticks, or one of NO_SUCH_FORM, REFUSED, UNTESTED
    reason: str = ""  # why it is not served
    bits: int | None = None  # of the head after ``mlx_lm.convert -q``, if it is quantized

    @property
    def served(self) -> bool:
        return self.cell.startswith(SERVED)


def examine(name: str, tied: bool, build: Callable[..., nn.Module], configs: str) -> Form:
    """How FlashHead finds the head of an architecture, built from a file of configurations."""
    try:
        model = build(name, tied=tied)
    except ImportError as error:
        return Form(REFUSED, f"mlx-lm cannot load it here ({error}).")
    except Exception as error:  # an unknown architecture may fail in any way
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
    bits = None if is_vlm(model) else find_head(quantized(model)).rows().bits
    return Form(f"`{location.path}`", bits=bits)


def survey(progress: bool = True) -> dict[str, tuple[Form, Form]]:
    """Untied and tied form of every architecture of the installed mlx-lm."""
    names = tqdm(architectures(), desc="Architectures of mlx-lm", disable=not progress)
    how = (tiny_architecture, "architecture_configs.py")
    with emulated():
        return {name: (examine(name, False, *how), examine(name, True, *how)) for name in names}


def vlm_survey(progress: bool = True) -> dict[str, tuple[Form, Form]]:
    """Untied and tied form of every architecture of the installed mlx-vlm."""
    from vlm_models import tiny_vlm, vlm_architectures  # which import mlx-vlm

    names = tqdm(vlm_architectures(), desc="Architectures of mlx-vlm", disable=not progress)
    how = (tiny_vlm, "vlm_configs.py")
    with emulated("mlx_vlm"):
        return {name: (examine(name, False, *how), examine(name, True, *how)) for name in names}


def document(found: dict[str, tuple[Form, Form]]) -> str:
    """The part of docs/architectures.md about mlx-lm."""
    served = _served(found)
    rows = [
        f"| {name} | {untied.cell} | {tied.cell} | {_bits((untied, tied))} |"
        for name, (untied, tied) in found.items()
    ]
    return f"""# Architectures

Written by `python scripts/architectures.py` for mlx-lm {version("mlx-lm")}; a test compares it with
the installed mlx-lm. FlashHead serves {len(served)} of its {len(found)} language-model
architectures, without code for any of them: it traces a model on one token.

The table names the layer that makes the logits: one with its own weights (*untied*), or the
embedding (*tied*). A dash means that mlx-lm has no such form. *Bits* are those of the head after
`mlx_lm.convert -q`, since some models keep a finer head.

`tests/models/test_architectures.py` runs each form with random weights, dense and quantized, on
prompts, with caches and in batches. With all probes the logits are the dense model's, after its own
scales, caps and biases. With few probes the candidates' logits are, and the greedy token is a
candidate. Plain operations replace the Metal kernels of `bitnet` and `muse_spark` there.

| architecture | untied | tied | bits |
|---|---|---|---|
{chr(10).join(rows)}

## Not served

{chr(10).join(_reasons(found))}
"""


def vlm_document(found: dict[str, tuple[Form, Form]]) -> str:
    """The part of docs/architectures.md about mlx-vlm."""
    served = _served(found)
    rows = [f"| {name} | {untied.cell} | {tied.cell} |" for name, (untied, tied) in found.items()]
    return f"""
{VLM_HEADING}

Written for mlx-vlm {version("mlx-vlm")}, which has its own code for language models without
pictures too. FlashHead serves {len(served)} of the {len(found)} architectures that take text.
`tests/models/test_vlm_architectures.py` runs each form as above, without a cache and with one, and
{len(PICTURES)} architectures with a random picture through their towers:

{fill(", ".join(sorted(PICTURES)), 100)}.

| architecture | untied | tied |
|---|---|---|
{chr(10).join(rows)}

### Not served

{chr(10).join(_reasons(found))}
"""


def _served(found: dict[str, tuple[Form, Form]]) -> list[str]:
    return [name for name, forms in found.items() if any(form.served for form in forms)]


def _bits(forms: Iterable[Form]) -> str:
    bits = dict.fromkeys(str(form.bits or "as it was") for form in forms if form.served)
    return ", ".join(bits) or NO_SUCH_FORM


def _reasons(found: dict[str, tuple[Form, Form]]) -> list[str]:
    """A line for each form that is not served, with the sentence that a user gets."""
    lines = []
    for name, (untied, tied) in found.items():
        reasons = {"untied": untied.reason, "tied": tied.reason}
        if untied.reason == tied.reason:
            reasons = {"": untied.reason}
        lines += [
            f"- {' '.join(filter(None, (name, form)))}: {reason}"
            for form, reason in reasons.items()
            if reason
        ]
    return lines


@command
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=str(DOCUMENT), help="default: %(default)s")
    args = parser.parse_args()
    from_extra("mlx_vlm", "vlm", "scripts/architectures.py")
    check_writable("--output", args.output)
    found, vlm_found = survey(), vlm_survey()
    Path(args.output).write_text(document(found) + vlm_document(vlm_found), encoding="utf-8")
    for library, forms in (("mlx-lm", found), ("mlx-vlm", vlm_found)):
        print(
            f"{len(_served(forms))} of {len(forms)} architectures of {library} {version(library)}"
        )


if __name__ == "__main__":
    main()
