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
# `interop/hook/sitecustomize.py` reads this variable.
VARIABLE = "MLX_FLASHHEAD_RUN"


@dataclass(frozen=True)
class HeadOptions:
    """How a model gets its FlashHead.

    Attributes:
        flash_head: The folder or repository of one.
        missing: What to do without any: BUILD one, REFUSE, stay DENSE for good, or be dense until
            one is built LATER.
        n_probes: Clusters scored per token; None: the FlashHead's own number.
        backend: "metal", "mlx" or None to choose.
        progress: Whether something is said, and bars are shown.
        tunes: Measure the settings of the loop on this machine, once.
        measures: Measure them now, even if they are known.
        drafts: Whether the model drafts for another one.
        always: Use a FlashHead that makes nothing faster, too.
        flags: Name parameters by their flags, for a command.
        fine_head: Where a finer head comes from; True: from the original that the model names.
        head_bits: Bits of the finer head; None: 8.
        verify: Whether the text of another program is verified.
        lookup: When the next tokens of another program's text are looked up.
        draft_model: A trained drafter for another program's texts.
        mtp: Where the model's own MTP layer is, for these.
        num_draft_tokens: The most tokens that a drafter guesses at a time.
        check: Whether another program's tokens are counted, for a line at its end.
        tell: Takes what is said; None: standard error.
    """

    flash_head: str | Path | None = None
    missing: str = BUILD
    n_probes: int | None = None
    backend: str | None = None
    progress: bool = True
    tunes: bool = True
    measures: bool = False
    drafts: bool = False
    always: bool = False
    flags: bool = False
    fine_head: str | Path | bool | None = None
    head_bits: int | None = None
    verify: bool = True
    lookup: str = "auto"
    draft_model: str | None = None
    mtp: str | Path | bool | None = None
    num_draft_tokens: int = 3
    check: bool = False
    tell: Callable[[str], object] | None = None

    @classmethod
    def from_flags(cls, args: argparse.Namespace, *, dense: bool = False) -> "HeadOptions":
        """The choices of `common/flags.py`; ValueError if they contradict each other."""
        unverified = getattr(args, "no_verify", False) or getattr(args, "draw_probes", False)
        # Unverified choices are a FlashHead's, never silently a normal head's.
        answers_first = "build_first" in args and not unverified
        missing = BUILD
        if dense or (args.no_build and answers_first):
            missing = DENSE
        elif args.no_build:
            missing = REFUSE
        elif answers_first and not args.build_first:
            missing = LATER
        if args.head_bits is not None and not args.fine_head:
            raise ValueError("`head_bits` is for a finer head: add --fine-head.")
        return cls(
            flash_head=args.flash_head,
            missing=missing,
            n_probes=args.n_probes,
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
                # The process may start elsewhere.
                values[name] = str(Path(values[name]).resolve())
        changed = {name: v for name, v in values.items() if v != getattr(HeadOptions, name)}
        hook = str(Path(__file__).parents[1] / "interop" / "hook")
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [hook, *(path for path in paths if path not in ("", hook))]
        return {"PYTHONPATH": os.pathsep.join(paths), VARIABLE: json.dumps(changed)}

    def say(self, text: str) -> None:
        """Prints a sentence on standard error, if there is progress to be shown."""
        if not self.progress:
            return
        if self.flags:
            text = with_flags(text)
        text = printable(text)
        if self.tell is not None:
            self.tell(text)
        else:
            # The sentence stands above a bar that is shown.
            tqdm.write(text, file=sys.stderr)
            sys.stderr.flush()
