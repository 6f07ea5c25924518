"""The loops of mlx-lm and mlx-vlm in a program under `mlx_flashhead.run`: who decodes a text."""

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial, wraps
from inspect import BoundArguments, signature
from typing import Any

from ..decoding.drafting import drafted_tokens
from ..decoding.loop import verified_tokens, why_mlx_lms_own
from ..decoding.phase import Mode
from ..decoding.proposer import Proposer
from ..decoding.settings import DecodingSettings
from ..decoding.vlm_text import vlm_tokens
from ..models.compat.mlx_lm import make_prompt_cache
from ..models.install import get_flash_head
from ..models.trained_drafter import TrainedDrafter
from ..models.trust import is_recognised
from .head_options import HeadOptions
from .program_batches import batch_class
from .program_models import ProgramModels
from .use import BUILDING, Use

# Makes the loop that decodes in the place of a library's; None: the library's own decodes.
Take = Callable[[Any, BoundArguments], Iterator[Any] | None]

ONLY_GREEDY = Mode.dense("with mlx-vlm only greedy text is verified")


class ProgramLoops:
    """What takes the places of the libraries' loops.

    Args:
        models: The program's.
        options: How tokens are guessed.
    """

    def __init__(self, models: ProgramModels, options: HeadOptions):
        self._models = models
        self._options = options

    def loop(self, take: Take, original: Any) -> Any:
        """A library's loop of a text, which decides at its first token who decodes."""
        parameters = signature(original)

        @wraps(original)
        def tokens(*arguments: Any, **named: Any) -> Iterator[Any]:
            call = parameters.bind(*arguments, **named)
            loop = self._models.decided(take, original, call)
            if loop is None:
                loop = original(*arguments, **named)
            yield from loop

        return tokens

    def _proposer(self, model: Any) -> Proposer:
        return Proposer(model, DecodingSettings(lookup=self._options.lookup))

    def text_loop(self, original: Any, call: BoundArguments) -> Iterator[Any] | None:
        """The loop that decodes in the place of mlx-lm's; None if that one does."""
        options = call.arguments
        model = options["model"]
        use = self._models.use_of(model)
        own = why_mlx_lms_own(model)
        if own is not None:
            if use is None:
                return None
            return use.follow(original(**options), own)
        drafter = self._models.drafter_of(model)
        if drafter is not None and options.get("input_embeddings") is None:
            return self._guessed(drafter, options, use)
        if use is None:
            return None
        mode = use.mode_of(model)
        looks_up = self._options.lookup != "off"
        if mode == BUILDING or not (mode.is_verified or looks_up):
            return use.follow(original(**options), mode)
        return verified_tokens(**options, proposer=self._proposer(model), announce=use.announce)

    def _guessed(
        self, drafter: TrainedDrafter, options: dict[str, Any], use: Use | None
    ) -> Iterator[Any]:
        """A text of mlx-lm's loop, with a drafter."""
        model = options["model"]
        given = {"num_draft_tokens": self._options.num_draft_tokens} | options
        limit = given.pop("max_kv_size", None)
        if not given.get("prompt_cache"):
            given["prompt_cache"] = make_prompt_cache(model, limit)
        tokens = drafted_tokens(
            **given,
            draft_model=drafter,
            proposer=self._proposer(model),
            announce=_announce_of(use),
        )
        with closing(tokens):
            for token, logprobs, _ in tokens:
                yield token, logprobs

    def drafted_loop(self, original: Any, call: BoundArguments) -> Iterator[Any] | None:
        """With a draft model the target is dense: it is the draft's FlashHead that is used."""
        options = call.arguments
        model = options["model"]
        draft_model = options["draft_model"]
        if isinstance(draft_model, TrainedDrafter):
            return self._drafted(draft_model, options)
        draft = self._models.use_of(draft_model)
        if draft is None or options.get("logits_processors"):
            return None
        use = self._models.use_of(model)
        if use is None:
            use = draft
        own = why_mlx_lms_own(model)
        if own is not None:
            return draft.follow(use.follow(original(**options), own))
        # While the draft's FlashHead is being built its drafts are dense, and the text is the same.
        is_built = get_flash_head(draft_model) is not None
        if is_built and not is_recognised(draft_model):
            return None
        tokens = drafted_tokens(**options, proposer=self._proposer(model), announce=use.announce)
        return draft.follow(use.follow(tokens))

    def _drafted(self, drafter: TrainedDrafter, options: dict[str, Any]) -> Iterator[Any]:
        """A text with a trained drafter that was named to the program.

        It fails where that is another model's: no loop of mlx-lm could take the drafter.
        """
        model = options["model"]
        drafter.check_target(model)
        use = self._models.use_of(model)
        proposer = self._proposer(model)
        yield from drafted_tokens(**options, proposer=proposer, announce=_announce_of(use))

    def batches(self, original: Any) -> Any:
        """mlx-lm's ``BatchGenerator``, which decides at its first use who decodes."""
        return batch_class(partial(self._models.decided, self._models.use_of))

    def vlm_loop(self, original: Any, call: BoundArguments) -> Iterator[Any] | None:
        """The loop in the place of mlx-vlm's, verified where it is greedy."""
        model = call.arguments["model"]
        use = self._models.use_of(model)
        if use is None:
            return None
        mode = use.mode_of(model)
        loop = None
        if mode.is_verified:
            mode = ONLY_GREEDY
            ids, _, pixel_values, mask = call.args
            loop = vlm_tokens(original, ids, model, pixel_values, mask, call.kwargs, use.announce)
        if loop is None:
            loop = use.follow(original(*call.args, **call.kwargs), mode)
        return loop


def _announce_of(use: Use | None) -> Callable[[Mode], None] | None:
    """What hears how each token was decoded; None where nothing is said."""
    if use is None:
        return None
    return use.announce
