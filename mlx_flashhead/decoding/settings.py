"""What a caller asks of the decoding of a text."""

from dataclasses import dataclass
from typing import Any

LOOKUPS = ("auto", "on", "off")


@dataclass(frozen=True)
class DecodingSettings:
    """The settings of a call, which change a text's speed, or how close it is to the dense model's.

    Attributes:
        n_probes: Clusters scored per token; None: the FlashHead's own number.
        verify: Verify every token. Otherwise the FlashHead alone chooses, with estimates for the
            tokens that it does not score.
        dense: Score every token.
        draw_temperature: Draw the probes at this temperature, without verification; sample with
            the same one.
        max_wait: Seconds that text may wait for its verification, 0 to 1; 0 decodes densely; None:
            as long as pays.
        lookup: Whether the next tokens are looked up in the prompt and the text, and several are
            computed in a step: "auto" where that is worth its time, "on" wherever some are found,
            or "off".

    Raises:
        ValueError: If ``max_wait`` or ``lookup`` is out of its range.
    """

    n_probes: int | None = None
    verify: bool = True
    dense: bool = False
    draw_temperature: float | None = None
    max_wait: float | None = None
    lookup: str = "auto"

    def __post_init__(self) -> None:
        if self.max_wait is not None and not 0 <= self.max_wait <= 1:
            raise ValueError(f"max_wait is {self.max_wait}: it must be 0 to 1 seconds.")
        if self.lookup not in LOOKUPS:
            raise ValueError(f"lookup is {self.lookup!r}: it must be one of {', '.join(LOOKUPS)}.")

    @classmethod
    def taken_from(cls, keywords: dict[str, Any]) -> "DecodingSettings":
        """Takes the settings out of the keywords of a call."""
        named = {name: keywords.pop(name) for name in cls.__annotations__ if name in keywords}
        return cls(**named)

    @property
    def verifies(self) -> bool:
        """Whether the dense rows shall verify what the FlashHead proposes."""
        return self.verify and self.draw_temperature is None and not self.decodes_densely

    @property
    def decodes_densely(self) -> bool:
        """Whether the normal (dense) head shall choose every token."""
        return self.dense or self.max_wait == 0
