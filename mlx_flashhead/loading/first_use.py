"""A program's first use of a model, whose FlashHead is built while the program writes nothing."""

import atexit
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.command import sentence
from .builds import LEFT, PREPARING, Build
from .head_options import HeadOptions
from .use import Use


class FirstUse:
    """A program's use of a model whose FlashHead is built while the program writes nothing.

    When the process ends, what is left of the build is done at a terminal. A program that ends by
    an error, or by Ctrl-C, leaves it for the next use.

    Args:
        use: Says what there is to say, and knows when the program has used the model.
    """

    def __init__(self, model: Any, tokenizer: Any, folder: Path, options: HeadOptions, use: Use):
        self.use = use
        telling = replace(options, tell=use.say)
        self.build = Build(model, tokenizer, folder, telling, lambda: use.is_quiet)
        atexit.register(self._end)

    def _end(self) -> None:
        if self.build.has_ended or self.build.closed:
            return
        at_terminal = sys.stderr.isatty()
        if self.build.stored is None and at_terminal and not hasattr(sys, "last_type"):
            self.use.say(PREPARING, at_once=True)
            try:
                self.build.wait()
            except KeyboardInterrupt:
                self.use.say(LEFT, at_once=True)
            except Exception as error:
                # The model goes on with its normal head next time.
                self.use.say(f"Without FlashHead: {sentence(error)}", at_once=True)
        self.build.leave()
        if self.build.stored is not None:
            self.use.say("FlashHead is ready for next time.", at_once=True)
        elif not at_terminal:
            # A script waits for its end.
            self.use.say(
                "FlashHead is not built yet, and goes on next time: --build-first builds it before "
                "the first text, and `mlx_flashhead.cache --build MODEL` now.",
                at_once=True,
            )
