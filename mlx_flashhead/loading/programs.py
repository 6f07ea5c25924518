"""A FlashHead under the loads of mlx-lm and mlx-vlm, for programs that do not know it."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any

from ..common.command import printable
from ..interop.replace import Wrap, put_all_in_place
from ..models.compat.mlx_lm import load_tokenizer
from ..models.fetch import hub_sentence, resolve
from ..models.loading import check_format
from ..models.trained_drafter import CONFIG, TrainedDrafter, is_trained_drafter, read_config
from .drafts import load_draft
from .head_options import VARIABLE, HeadOptions
from .program_loops import ProgramLoops
from .program_models import ProgramModels
from .use import check_before_sigterm

# Whether a load gets no FlashHead, as within a function of mlx-lm's.
_plain: ContextVar[bool] = ContextVar("plain", default=False)
# Modules that load a model and do not generate: they convert it, train it, measure its layers.
WITHOUT_TEXT = {
    "mlx_lm.cache_prompt", "mlx_lm.fuse", "mlx_lm.lora", "mlx_lm.quant.awq", "mlx_lm.quant.dwq",
    "mlx_lm.quant.dynamic_quant", "mlx_lm.quant.gptq", "mlx_vlm.lora", "mlx_vlm.train",
}  # fmt: skip


def patch_library(library: str) -> None:
    """From now on the loads of mlx-lm or mlx-vlm attach a FlashHead, if they can.

    The options are in the environment.

    Args:
        library: "mlx_lm" or "mlx_vlm".
    """
    put_all_in_place(_patches().wraps[library])


@cache
def _patches() -> "Patches":
    """The patches of this process: all libraries share them."""
    options = HeadOptions(**json.loads(os.environ[VARIABLE]))
    if options.check:
        check_before_sigterm()
    return Patches(options)


@contextmanager
def plainly() -> Iterator[None]:
    """A block, or a function, whose loads get no FlashHead: it goes on with the dense model."""
    before = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(before)


def process_generates() -> bool:
    """Whether this process has imported no module without text, and runs none."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    running = getattr(spec, "name", "")
    # mlx-lm itself imports this one, whose function is called plainly.
    return running != "mlx_lm.convert" and not WITHOUT_TEXT & {running, *sys.modules}


class Patches:
    """What takes the places of the libraries' functions.

    Attributes:
        models: The models that the program has loaded.
        loops: What takes the places of the loops.
        wraps: For each library, and each name of it that is replaced, what makes the replacement.
    """

    def __init__(self, options: HeadOptions):
        self.models = ProgramModels(options)
        self.loops = ProgramLoops(self.models, options)
        loops = self.loops
        self.wraps: dict[str, dict[str, Wrap]] = {
            "mlx_lm": {
                "mlx_lm.utils.load": self.load,
                "mlx_lm.utils.load_model": self.load_model,
                "mlx_lm.utils.sharded_load": plainly(),
                "mlx_lm.convert.convert": plainly(),
                "mlx_lm.generate.generate_step": partial(loops.loop, loops.text_loop),
                "mlx_lm.generate.speculative_generate_step": partial(
                    loops.loop, loops.drafted_loop
                ),
                "mlx_lm.generate.BatchGenerator": loops.batches,
            },
            "mlx_vlm": {
                "mlx_vlm.utils.load": self.load,
                "mlx_vlm.generate.ar.generate_step": partial(loops.loop, loops.vlm_loop),
            },
        }

    def _attach(
        self, model: Any, tokenizer_of: Callable[[], Any], path: Any, revision: str | None = None
    ) -> None:
        if process_generates() and not _plain.get():
            self.models.attach(model, tokenizer_of, path, revision)

    def load(self, original: Any) -> Any:
        """A library's ``load``, whose models get a FlashHead."""

        @wraps(original)
        def load(path_or_hf_repo: Any, *arguments: Any, **named: Any) -> Any:
            try:
                with plainly():
                    loaded = original(path_or_hf_repo, *arguments, **named)
            except Exception as error:
                name = str(path_or_hf_repo)
                drafter = _trained_drafter(name)
                if drafter is not None:
                    return drafter, self.models.tokenizer
                _explain(error, name)
                raise
            self._attach(loaded[0], lambda: loaded[1], path_or_hf_repo, named.get("revision"))
            return loaded

        return load

    def load_model(self, original: Any) -> Any:
        """mlx-lm's ``load_model``, whose models get a FlashHead."""

        @wraps(original)
        def load_model(model_path: Any, *arguments: Any, **named: Any) -> Any:
            loaded = original(model_path, *arguments, **named)
            folder = Path(model_path)
            ends = loaded[1].get("eos_token_id")
            self._attach(loaded[0], partial(load_tokenizer, folder, eos_token_ids=ends), folder)
            return loaded

        return load_model


def _trained_drafter(name: str) -> TrainedDrafter | None:
    """The trained drafter of this name, which mlx-lm cannot load; None if it is none."""
    try:
        config = read_config(resolve(name, files=[CONFIG]))
    except ValueError:
        return None
    if not is_trained_drafter(config):
        return None
    drafter: TrainedDrafter = load_draft(name)[0]
    return drafter


def _explain(error: Exception, name: str) -> None:
    """Adds below the traceback of a load, in a sentence, what a user can do."""
    reason = _what_is_wrong(name, error)
    if reason is None:
        return
    error.add_note(printable(f"mlx_flashhead.run: {reason}"))
    # The Hub's own errors, one behind the other, say the same.
    error.__suppress_context__ = True
    error.__cause__ = None


def _what_is_wrong(name: str, error: Exception) -> str | None:
    """What a user can do about a model that does not load; None where the error says so."""
    folder = Path(name).expanduser()
    if not folder.exists():
        return hub_sentence(error, name)
    try:
        check_format(folder)
    except ValueError as problem:
        return str(problem)
    return None
