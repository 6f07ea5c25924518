"""The models of a program under `mlx_flashhead.run`: what each gets, what is said of its use."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast
from weakref import finalize

from ..common.command import sentence
from ..common.interrupts import INTERRUPTED
from ..models.fetch import resolve
from ..models.install import detach, get_flash_head
from ..models.origin import local_origin
from ..models.trained_drafter import CONFIG, TrainedDrafter, is_trained_drafter, read_config
from ..models.vlm import is_vlm
from .drafts import DraftOptions
from .first_use import FirstUse
from .head_options import BUILD, LATER, HeadOptions
from .load import attach_head
from .sources import explicit_head
from .use import Use

Decision = TypeVar("Decision")


class ProgramModels:
    """The models that a program has loaded. Those that it drops are forgotten.

    Attributes:
        tokenizer: The latest model's; None before one is loaded.
    """

    def __init__(self, options: HeadOptions):
        self.tokenizer: Any = None
        self._options = options
        self._warned = False
        # By the id of a model: the first uses of those without a FlashHead, and the drafters.
        self._first_uses: dict[int, FirstUse] = {}
        self._drafters: dict[int, TrainedDrafter] = {}

    def attach(
        self, model: Any, tokenizer_of: Callable[[], Any], path: Any, revision: str | None = None
    ) -> None:
        """Attaches a FlashHead to a model, or begins to build it. What fails is one line.

        Args:
            model: A model of mlx-lm or mlx-vlm.
            tokenizer_of: Returns its tokenizer, or its processor.
            path: Its folder or repository.
            revision: Branch, tag or commit of the repository.
        """
        options = self._options
        before = get_flash_head(model)
        try:
            if Path(path).expanduser().is_dir():
                # mlx_vlm.generate names a revision of a folder, too.
                revision = None
            # The libraries have downloaded no FlashHead.
            folder = resolve(str(path), revision)
            stored = explicit_head(options, folder)
            if is_vlm(model) and options.missing == LATER:
                options = replace(options, missing=BUILD)
            tokenizer = tokenizer_of()
            self.tokenizer = tokenizer
            drafter = self._load_drafter(model, folder)
            head = attach_head(model, tokenizer, stored, folder, options)
            use = Use(local_origin(folder).known_as, options, drafter)
            if head is None:
                self._first_uses[id(model)] = FirstUse(model, tokenizer, folder, options, use)
                finalize(model, self._end_build, id(model)).atexit = False
            else:
                use.take(head)
        except KeyboardInterrupt:
            options.say("Interrupted: the next use of the model tries again.")
            sys.exit(INTERRUPTED)
        except Exception as error:
            # Whatever it is, the program goes on as without this package.
            self._say_without(error)
            if get_flash_head(model) is not before:
                detach(model)

    def _load_drafter(self, model: Any, folder: Path) -> TrainedDrafter | None:
        """The trained drafter that the options name for a model; None, and a line, without it."""
        options = self._options
        if is_vlm(model) or not (options.draft_model or options.mtp):
            return None
        drafting = DraftOptions(options.draft_model, options.mtp)
        try:
            drafting.check(str(folder))
            name = options.draft_model
            # Loading a model would come here again.
            if name and not is_trained_drafter(read_config(resolve(name, files=[CONFIG]))):
                raise ValueError(
                    f"{name} is a model of its own: name it to the program, which drafts with it."
                )
            loaded = drafting.load(model, folder, options, trust_remote_code=False)
        except (ValueError, OSError) as error:
            options.say(f"Without drafts: {sentence(error)}")
            return None
        drafter = cast(TrainedDrafter, loaded)
        self._drafters[id(model)] = drafter
        finalize(model, self._drafters.pop, id(model), None).atexit = False
        return drafter

    def drafter_of(self, model: Any) -> TrainedDrafter | None:
        """The trained drafter that the options name for a model; None without one."""
        return self._drafters.get(id(model))

    def _end_build(self, key: int) -> None:
        first_use = self._first_uses.pop(key, None)
        if first_use is not None:
            first_use.build.close()

    def _say_without(self, error: Exception) -> None:
        if not self._warned:
            self._options.say(f"Without FlashHead: {sentence(error)}")
        self._warned = True

    def decided(self, decide: Callable[..., Decision], *arguments: Any) -> Decision | None:
        """What a function decides about a text; None, and a line, where it fails."""
        try:
            return decide(*arguments)
        except Exception as error:
            # The text is then decoded as without this package.
            self._say_without(error)
            return None

    def use_of(self, model: Any) -> Use | None:
        """What is said of a text that begins; None for a model that is not recognised."""
        use = self._use_of_build(model)
        if use is None and self._options.verify:
            use = _use_of_head(model)
        if use is not None:
            use.begin()
        return use

    def _use_of_build(self, model: Any) -> Use | None:
        """The use of a model whose FlashHead is being built. One that is ready is put on it."""
        first_use = self._first_uses.get(id(model))
        if first_use is None:
            return None
        built = first_use.build.take_over(model)
        if built is not None:
            first_use.use.take(built)
        if first_use.build.under_way:
            return first_use.use
        self._end_build(id(model))
        return None


def _use_of_head(model: Any) -> Use | None:
    """The use that gets the calls of a model's FlashHead; None if there is none."""
    head = get_flash_head(model)
    if head is None:
        return None
    use = getattr(head.projection, "__self__", None)
    if isinstance(use, Use):
        return use
    return None
