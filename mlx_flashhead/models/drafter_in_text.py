"""A trained drafter in one text: it reads the target's states, and drafts from the latest one."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from .compat import mlx_lm
from .compat import mlx_vlm as compat
from .drafted_target import DraftedTarget
from .trained_drafter import TrainedDrafter

# States (1, L, D) → logits (1, 1, V) of the last one.
Project = Callable[[mx.array], mx.array]
# Logits (1, V) and a place of the text, None where nobody will read the token → a token (1,).
Choose = Callable[[mx.array, int | None], mx.array]


class _Names:
    """The parts of a target under all the names at which mlx-vlm's drafters look for them."""

    def __init__(self, target: DraftedTarget, project: Project):
        self.embed_tokens = target.embedding
        self.embeddings = target.embedding
        self.embed_scale = target.scale
        self.lm_head = project
        self.config = target.model.args
        self.model = self
        self.backbone = self


class PairsMark:
    """A mark of the caches of a drafter's layers, from which pairs are taken back.

    Args:
        drafter: Of mlx-vlm, begun in a text.
        layers: The caches of its layers, which can be trimmed.
    """

    def __init__(self, drafter: Any, layers: list[Any]):
        self._drafter = drafter
        self._layers = layers
        self._n_pairs = _n_pairs(layers)

    def back_to(self, n: int) -> list[Any]:
        """Leaves in the caches the first ``n`` of the pairs that were taken since.

        Returns:
            The caches of the drafter's layers.
        """
        n_beyond = _n_pairs(self._layers) - self._n_pairs - n
        if n_beyond > 0:
            compat.take_back(self._drafter, n_beyond)
        return self._layers


def _n_pairs(layers: list[Any]) -> int:
    """The pairs in the caches of a drafter's layers; 0 where it has none."""
    return compat.length_of_pairs(layers[0]) if layers else 0


class DrafterInText:
    """A drafter in one text. Everything is lazy.

    A layer of it takes pairs: the target's state at a place, and the token at the next place. What
    it drafts itself it takes with states of its own.

    Args:
        drafter: The drafter.
        target: What it drafts for.
        project: Makes the logits of drafts from states, where the drafter has no head of its own.
        choose: Chooses the token of a place from its logits.
        layers: The caches of the drafter's layers, from which it goes on; None: new ones.
    """

    def __init__(
        self,
        drafter: TrainedDrafter,
        target: DraftedTarget,
        *,
        project: Project,
        choose: Choose,
        layers: list[Any] | None = None,
    ):
        if layers is None:
            layers = drafter.make_cache()
        self._model = target.model
        self.layers = layers
        self._drafter: Any = compat.begun(drafter.module, _Names(target, project), layers)
        self._choose = choose
        # The place for which the next token is chosen.
        self._place: int | None = None
        # The latest drafts, whose pairs it holds.
        self._drafts = mx.zeros((1, 0), mx.uint32)

    def read(self, tokens: mx.array, states: mx.array, place: int | None = None) -> None:
        """Takes pairs.

        Args:
            tokens: (n,), each the one after a state. They may not be computed yet.
            states: (n, D) of the target.
            place: The text's place after the last token, if it is drafted next.
        """
        if not self.layers:
            return
        self._place = place
        self._drafter.accept_verified_tokens(
            states[None],
            tokens[None],
            len(tokens),
            [],
            self._sample,
            mx.uint32,
        )

    def draft(
        self,
        latest: mx.array,
        state: mx.array,
        n: int,
        place: int,
        caches: list[Any],
        *,
        greedy: bool = False,
    ) -> mx.array:
        """Drafts the ``n`` tokens after the latest one, (n,) uint32.

        Args:
            latest: (1,), the latest token, with which the last pair ends.
            state: (1, D), the target's state that has chosen it.
            n: How many.
            place: The text's place of the first one.
            caches: The target's, for a drafter that reads these.
            greedy: Whether the likeliest tokens are chosen.
        """
        self._place = place
        if self.layers:
            # Its first token is drafted already.
            self._place += 1
        else:
            keys, n_tokens = mlx_lm.keys_by_layer_type(self._model.layers, caches)
            self._drafter.set_shared_kv(keys, n_tokens, position=n_tokens - 1)
        drafts: mx.array = self._drafter.draft_block(
            latest, state[None], None, n + 1, self._sample, mx.uint32, greedy=greedy
        )
        self._drafts = drafts.astype(mx.uint32)
        return self._drafts[0]

    def accept(
        self, n_right: int, states: mx.array, token: int | None, place: int | None = None
    ) -> None:
        """Keeps the first drafts, takes back the others, and reads on with the target's states.

        Args:
            n_right: How many drafts were right.
            states: (T, D) of the step that took the latest token and the drafts.
            token: The one that was chosen after the last right draft, if it is known.
            place: The text's place after that token, if it is drafted next.
        """
        if not self.layers:
            return
        chosen = []
        if token is not None:
            chosen.append(token)
        self._place = place
        self._drafter.accept_verified_tokens(
            states[None],
            self._drafts,
            n_right,
            chosen,
            self._sample,
            mx.uint32,
        )

    def forget_drafts(self) -> None:
        """Takes all of the latest drafts back."""
        if self.layers:
            self._drafter.accept_verified_tokens(None, self._drafts, 0, [], None, mx.uint32)

    def mark(self) -> PairsMark:
        """A mark behind the pairs that it holds."""
        return PairsMark(self._drafter, self.layers)

    def _sample(self, logits: mx.array) -> mx.array:
        """Chooses the next place's token: logits (1, 1, V) → (1, 1)."""
        token = self._choose(logits[:, -1], self._place)
        if self._place is not None:
            self._place += 1
        return token[None].astype(mx.uint32)
