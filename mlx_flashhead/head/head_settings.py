"""What can be set of a head: how many clusters it scores, and what a plain call of it gives."""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class HeadSettings:
    """The settings of a head with C clusters.

    Attributes:
        n_clusters: C.
        n_probes: Clusters scored for a proposal that is verified, 1 … C.
        unverified_probes: Clusters scored where nothing verifies the choice, 1 … C.
        verified: Whether a plain call is the dense head's.
        draw_temperature: The temperature at which an unverified call draws the clusters; None takes
            the best ones.
    """

    n_clusters: int
    n_probes: int
    unverified_probes: int
    verified: bool = True
    draw_temperature: float | None = None

    @classmethod
    def of(
        cls, n_clusters: int, n_probes: int, unverified_probes: int | None = None
    ) -> "HeadSettings":
        """The settings outside of any block; ``unverified_probes`` is ``n_probes`` if it is None.

        Raises:
            ValueError: If a number is not a whole one from 1 to C.
        """
        if unverified_probes is None:
            unverified_probes = n_probes
        return cls(
            n_clusters,
            n_probes=_checked(n_probes, n_clusters),
            unverified_probes=_checked(unverified_probes, n_clusters),
        )

    def with_n_probes(self, value: int) -> "HeadSettings":
        """These settings with another number of clusters, verified or not.

        Raises:
            ValueError: If it is not a whole number from 1 to C.
        """
        n_probes = _checked(value, self.n_clusters)
        return replace(self, n_probes=n_probes, unverified_probes=n_probes)

    def with_unverified_probes(self, value: int) -> "HeadSettings":
        """These settings with another number of clusters where nothing verifies the choice.

        Raises:
            ValueError: If it is not a whole number from 1 to C.
        """
        return replace(self, unverified_probes=_checked(value, self.n_clusters))

    def of_block(
        self, n_probes: int | None, dense: bool, draw_temperature: float | None
    ) -> "HeadSettings":
        """The settings of a block in which a call is the unverified head's.

        The arguments are those of ``FlashHead.settings``.

        Raises:
            ValueError: If a setting is not valid.
        """
        if dense and n_probes is not None:
            raise ValueError("dense scores every token: leave n_probes out.")
        if draw_temperature is not None and not draw_temperature > 0:
            raise ValueError(
                f"The temperature of the draw is {draw_temperature}: it must be above 0."
            )
        settings = self
        if n_probes is not None:
            settings = self.with_n_probes(n_probes)
        return replace(settings, verified=dense, draw_temperature=draw_temperature)


def _checked(value: int, n_clusters: int) -> int:
    """A number of clusters to score.

    Raises:
        ValueError: If it is not a whole number from 1 to ``n_clusters``.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"n_probes must be a whole number, not {value!r}.")
    if not 1 <= value <= n_clusters:
        raise ValueError(
            f"n_probes is {value}, but this head has {n_clusters} clusters: "
            f"choose 1 to {n_clusters}."
        )
    return int(value)
