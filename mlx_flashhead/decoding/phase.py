"""The phases of a text, and how its tokens are said to be decoded.

    LEVEL ──▶ AHEAD ──▶ DRAINING ──▶ LEVEL
      │ └──── a guess ────▲             │
      └──────────────▶ DENSE ◀──────────┘

`Text.enter` alone changes a text's phase. The decoder says when, and the proposer whether and why:
`Proposer.begin` decides once what holds from a text's first token to its last, `Proposer.mode_for`
in each round whether tokens are proposed, and `Proposer.may_guess` whether they may be guessed. At
each token that is handed out the caller finds what mlx-lm's loop would have left then.
"""

from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    """How far a text may be ahead of the tokens that its caller has."""

    # As in mlx-lm's loop: caches, random state, and the calls of its functions. Only the token
    # after the one that is handed out is being computed.
    LEVEL = "level"
    # Its next tokens are proposed, and verified later.
    AHEAD = "ahead"
    # Its next tokens are the dense ones. Some are pending, proposed or guessed.
    DRAINING = "draining"
    # LEVEL for good, since what it depends on is not known.
    DENSE = "dense"


AHEAD_OF_CALLER = (Phase.AHEAD, Phase.DRAINING)


class Chooser(Enum):
    """What chooses a token."""

    # The FlashHead proposes it, and the dense rows verify it.
    BOTH = "both"
    FLASH_HEAD = "the FlashHead"
    # The normal head, for a while or for a reason that holds for the whole text.
    DENSE_NOW = "the dense head for now"
    DENSE = "the dense head"


@dataclass(frozen=True)
class Mode:
    """How a token is decoded.

    Attributes:
        words: As it is shown.
        chooser: What chooses the token.
    """

    words: str
    chooser: Chooser

    @classmethod
    def dense(cls, why: str) -> "Mode":
        """The normal (dense) head chooses, for this reason."""
        return cls(f"dense: {why}", Chooser.DENSE)

    @property
    def is_dense(self) -> bool:
        """Whether the normal (dense) head chooses, for a reason that holds for the whole text."""
        return self.chooser is Chooser.DENSE

    @property
    def is_verified(self) -> bool:
        """Whether the FlashHead proposes, and the dense rows verify."""
        return self.chooser is Chooser.BOTH

    @property
    def is_unverified(self) -> bool:
        """Whether the FlashHead alone chooses."""
        return self.chooser is Chooser.FLASH_HEAD

    def __str__(self) -> str:
        return self.words


VERIFIED = Mode("verified", Chooser.BOTH)
UNVERIFIED = Mode("unverified", Chooser.FLASH_HEAD)
# The token that the prompt's own logits have chosen, of a text that is verified.
FIRST = Mode("the first of its text", Chooser.BOTH)
# Of a text that can be verified.
PAUSED = Mode("decoded densely for a while, since that was faster", Chooser.DENSE_NOW)

REQUESTED = Mode.dense("as requested")
NO_HEAD = Mode.dense("the model has no FlashHead")
CHANGED_MODEL = Mode.dense("the model is wrapped or changed, so nothing is known of its text")
NO_FASTER = Mode.dense("FlashHead is no faster on this machine")
SAMPLED_DENSE = Mode.dense("FlashHead is no faster for sampled text on this machine")
SEVERAL_DRAW = Mode.dense("several texts of a batch draw from MLX's random state")
UNKNOWN_FUNCTION = Mode.dense("its sampler, or one of its processors, cannot be verified")
UNKNOWN_CACHE = Mode.dense("its caches are not mlx-lm's own")
TRAINED = Mode.dense("the model is being trained, and leaves out values at random")
REPLACED = Mode.dense("functions of mlx-lm were replaced")
DISTURBED = Mode.dense(
    "between tokens the program uses the text's caches, processors or random state"
)
MAY_DIFFER = Mode.dense(
    "a draft model proposes, in mlx-lm's own loop, which computes several tokens at once: "
    "rounding may change the text"
)
