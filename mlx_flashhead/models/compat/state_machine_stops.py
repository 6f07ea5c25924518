"""The state machines by which mlx-lm 0.31 ends a text."""

from typing import Any


class StateMachineStops:
    """0.31's state machine of a sequence, with the face of 0.32's ``StopSequences`` too."""

    def __init__(self, machine: Any):
        self._machine = machine
        self._state = machine.make_state()
        self.match_sequence: Any = None
        self.current_state: Any = None

    def matcher(self) -> "StateMachineStops":
        """Returns a new matcher of the same machine, at its beginning."""
        return StateMachineStops(self._machine)

    def advance(self, token: int) -> bool:
        """Goes on by a token, and returns whether a stop sequence is complete."""
        found = self._machine.match(self._state, token)
        self._state, self.match_sequence, self.current_state = found
        return self.match_sequence is not None and self.current_state is None
