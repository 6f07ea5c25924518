"""How a model gets its FlashHead, as a user chooses.

The choices are made by flags, in Python, or in the variables of a process that `mlx_flashhead.run`
has started. Imports no mlx-lm, which takes seconds.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from ..common.command import printable, with_flags

BUILD = "build"
REFUSE = "refuse"
DENSE = "dense"
LATER = "later"
VARIABLE = "MLX_FLASHHEAD_RUN"  # read by interop/hook/sitecustomize.py


@dataclass(frozen=True)
class HeadOptions:
    """How a model gets its FlashHead."""

    flash_head: str | Path | None = None
    missing: str = BUILD  # what to do without any; DENSE: for good, LATER: until it is built
    n_probes: int | None = None
    backend: str | None = None
    progress: bool = True
    tunes: bool = True  # measure the settings of the loop on this machine, once
    measures: bool = False  # measure them now, even if they are known
    drafts: bool = False  # whether the model drafts for another one
    always: bool = False  # use a FlashHead that makes nothing faster, too
    flags: bool = False  # name parameters by their flags, for a command
    fine_head: str | Path | bool | None = None  # True: of the original that the model names
    head_bits: int | None = None  # of the finer head; default: 8
    verify: bool = True  # whether another program's text is verified
    lookup: str = "auto"  # when the next tokens of another program's text are looked up
    # of another program's texts: a trained drafter, or where the model's own MTP layer is
    draft_model: str | None = None
    mtp: str | Path | bool | None = None
    num_draft_tokens: int = 3  # that it guesses at a time, at most
    check: bool = False  # whether its tokens are counted, for a line at its end
    tell: Callable[[str], object] | None = None  # takes what is said; None: standard error

    @classmethod
    def from_flags(cls, args: argparse.Namespace, *, dense: bool = False) -> "HeadOptions":
        """The choices of `common/flags.py`; ValueError if they contradict each other."""
        unverified = getattr(args, "no_verify", False) or getattr(args, "draw_probes", False)
        # unverified choices are a FlashHead's, never silently a normal head's
        answers_first = "build_first" in args and not unverified
        missing = LATER if answers_first and not args.build_first else BUILD
        if dense or args.no_build:
            missing = DENSE if dense or answers_first else REFUSE
        if args.head_bits is not None and not args.fine_head:
            raise ValueError("`head_bits` is for a finer head: add --fine-head.")
        return cls(
            args.flash_head,
            missing,
            args.n_probes,
            always=getattr(args, "flash_head_always", False),
            flags=True,
            fine_head=args.fine_head,
            head_bits=args.head_bits,
            verify=not unverified,
            lookup=getattr(args, "lookup", "auto"),
            check=getattr(args, "check", False),
            draft_model=getattr(args, "draft_model", None),
            mtp=getattr(args, "mtp", None),
            num_draft_tokens=getattr(args, "num_draft_tokens", cls.num_draft_tokens),
        )

    def environment(self) -> dict[str, str]:
        """The variables with which a new Python process patches mlx-lm, by `interop/hook`."""
        values = asdict(self)
        for name in ("flash_head", "fine_head", "draft_model", "mtp"):
            if isinstance(values[name], str | Path) and Path(values[name]).exists():
                values[name] = str(Path(values[name]).resolve())  # the process may start elsewhere
        changed = {name: v for name, v in values.items() if v != getattr(HeadOptions, name)}
        hook = str(Path(__file__).parents[1] / "interop" / "hook")
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [hook, *(path for path in paths if path not in ("", hook))]
        return {"PYTHONPATH": os.pathsep.join(paths), VARIABLE: json.dumps(changed)}

    def say(self, text: str) -> None:
        """Prints a sentence on standard error, if there is progress to be shown."""
        text = printable(with_flags(text) if self.flags else text)
        if self.tell is not None and self.progress:
            self.tell(text)
        elif self.progress:
            tqdm.write(text, file=sys.stderr)  # above a bar that is shown
            sys.stderr.flush()
