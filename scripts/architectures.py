"""Writes docs/architectures.md: how FlashHead finds the head of each of mlx-lm's architectures.

    python scripts/architectures.py [--output docs/architectures.md]

It builds every architecture of the installed mlx-lm with random weights from the tests' small
configurations, with a head of its own and with one tied to the embedding. For a form that is not
served it writes the sentence that a user gets.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

CHECKOUT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests" / "helpers")]  # works uninstalled too

from architecture_models import architectures, quantized, tiny_architecture
from emulated_mlx_lm import emulated
from mlx_flashhead.cli.console import check_writable, command
from mlx_flashhead.models.errors import UnsupportedHeadError
from mlx_flashhead.models.locate import check_plain_product, find_head

DOCUMENT = CHECKOUT / "docs" / "architectures.md"
NO_SUCH_FORM, REFUSED, UNTESTED = "–", "refused", "not tested"
SERVED = "`"  # begins a cell that names the head


@dataclass(frozen=True)
class Form:
    """One way to tie an architecture's head.

    Attributes:
        cell: The head's path in backticks, or one of NO_SUCH_FORM, REFUSED, UNTESTED.
        reason: Why it is not served.
        bits: Of the head after ``mlx_lm.convert -q``; None when it is not quantized.
    """

    cell: str
    reason: str = ""
    bits: int | None = None

    @property
    def served(self) -> bool:
        return self.cell.startswith(SERVED)


def examine(name: str, tied: bool) -> Form:
    """How FlashHead finds an architecture's head."""
    try:
        model = tiny_architecture(name, tied=tied)
    except ImportError as error:
        return Form(REFUSED, f"mlx-lm cannot load it here ({error}).")
    except Exception as error:  # an unknown architecture may fail in any way
        return Form(
            UNTESTED,
            "tests/helpers/architecture_configs.py has no small configuration for it "
            f"({type(error).__name__}: {error}).",
        )
    try:
        location = find_head(model)
        if location.tied != tied:
            return Form(NO_SUCH_FORM)
        check_plain_product(location)
    except UnsupportedHeadError as error:
        return Form(REFUSED, str(error))
    return Form(f"`{location.path}`", bits=find_head(quantized(model)).rows().bits)


def survey(progress: bool = True) -> dict[str, tuple[Form, Form]]:
    """Untied and tied form of every architecture of the installed mlx-lm."""
    names = tqdm(architectures(), desc="Architectures", disable=not progress)
    with emulated():
        return {name: (examine(name, False), examine(name, True)) for name in names}


def document(found: dict[str, tuple[Form, Form]]) -> str:
    """The text of docs/architectures.md."""
    served = [name for name, forms in found.items() if any(form.served for form in forms)]
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
    check_writable("--output", args.output)
    found = survey()
    Path(args.output).write_text(document(found), encoding="utf-8")
    served = sum(any(form.served for form in forms) for forms in found.values())
    print(f"{served} of {len(found)} architectures of mlx-lm {version('mlx-lm')}: {args.output}")


if __name__ == "__main__":
    main()
