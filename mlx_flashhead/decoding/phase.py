"""The phases of a text, and how its tokens are said to be decoded.

    LEVEL ──▶ AHEAD ──▶ DRAINING ──▶ LEVEL
      │ └──── a guess ────▲             │
      └──────────────▶ DENSE ◀──────────┘

`Text.enter` alone changes a text's phase, `Decoder._change_phase` says when, and
`Proposer.mode_for` whether and why. What holds from a text's first token to its last is decided
once, by `Proposer.begin`. At each token that is handed out the caller finds what mlx-lm's loop
would have left then.
"""

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


class Mode(str):
    """How a token is decoded, in the words that are shown. It is asked by its properties."""

    __slots__ = ()

    @classmethod
    def dense(cls, why: str) -> "Mode":
        """The normal (dense) head chooses, for this reason."""
        return cls(f"dense: {why}")

    @property
    def is_dense(self) -> bool:
        """Whether the normal (dense) head chooses, for a reason that holds for the whole text."""
        return self.startswith("dense: ")

    @property
    def is_verified(self) -> bool:
        """Whether the FlashHead proposes, and the dense rows verify."""
        return self in (VERIFIED, FIRST)

    @property
    def is_unverified(self) -> bool:
        """Whether the FlashHead alone chooses."""
        return self == UNVERIFIED


VERIFIED = Mode("verified")
UNVERIFIED = Mode("unverified")
# The token that the prompt's own logits have chosen, of a text that is verified.
FIRST = Mode("the first of its text")
# Of a text that can be verified.
PAUSED = Mode("decoded densely for a while, since that was faster")

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
