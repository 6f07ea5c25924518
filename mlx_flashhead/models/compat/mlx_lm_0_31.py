"""What mlx-lm 0.31 lacks of 0.32. It leaves with 0.31, and so do the imports of it beside it."""

import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import utils

# The attribute mlx_lm.generate is the function, so the module is imported by name.
module = importlib.import_module("mlx_lm.generate")
# These names may be replaced later on.
own_steps = module.generate_step
drafted_steps = module.speculative_generate_step

# From a state's name to its markers, each with the state after it.
Transitions = dict[str, list[tuple[str, str | None]]]
State = tuple[str | None, Transitions, str]

DEFAULT_ALLOW_PATTERNS = ["*.json", "model*.safetensors", "*.py", "tokenizer.model"]
DEFAULT_ALLOW_PATTERNS += ["*.tiktoken", "tiktoken.model", "*.txt", "*.jsonl", "*.jinja"]


def maybe_set_recommended_wired_limit() -> int | None:
    """0.32's: the GPU keeps as much memory as is recommended."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    return None if recommended is None else mx.set_wired_limit(int(recommended))


def checks_code(load: Callable[..., Any]) -> Callable[..., Any]:
    """A ``load`` that takes ``trust_remote_code``: 0.31 runs a checkpoint's own code unasked."""

    def checked(path: str, *arguments: Any, trust_remote_code: bool = False, **options: Any) -> Any:
        how: Any = {"revision": options.get("revision"), "allow_patterns": ["config.json"]}
        folder = Path(utils._download(str(path), **how))
        config = folder / "config.json"
        code = None
        # What cannot be read is left to mlx-lm's own errors.
        if config.is_file():
            settings = json.loads(config.read_text(encoding="utf-8"))
            code = settings.get("model_file")
        if code is not None and not trust_remote_code:
            raise ValueError(
                f"The model at {folder} runs its own code ({code!r}): "
                "pass trust_remote_code=True if you trust it."
            )
        return load(path, *arguments, **options)

    return checked


load = checks_code(utils.load)
sharded_load = checks_code(utils.sharded_load)


def generate_step(
    prompt: mx.array, model: Any, stream: Any = None, **options: Any
) -> Iterator[Any]:
    """Decodes in mlx-lm's loop, on its own stream."""
    return own_steps(prompt, model, **options)


def speculative_generate_step(
    prompt: mx.array, model: Any, draft_model: Any, stream: Any = None, **options: Any
) -> Iterator[Any]:
    """Decodes with a draft model in mlx-lm's loop, on its own stream."""
    return drafted_steps(prompt, model, draft_model, **options)


def load_processor(model: Any, config: dict[str, Any]) -> None:
    """0.31 knows no images."""


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


class TextStateMachine:
    """Follows the markers of thoughts and calls in a text, with the face of 0.32's."""

    def __init__(self, transitions: Transitions | None = None):
        self._transitions = transitions or {}

    def make_state(self, initial: str = "normal") -> State:
        """Returns a state of the name ``initial``, with no text held back."""
        return initial, self._transitions, ""

    @staticmethod
    def split(state: State, text: str) -> tuple[State, list[tuple[str | None, str]]]:
        """Takes a chunk of text. Returns the state after it, and the text in each state passed."""
        name, transitions, held_back = state
        text = held_back + text
        segments: list[tuple[str | None, str]] = []
        while name is not None:
            markers = {marker: after for marker, after in transitions.get(name, []) if marker}
            ends = []
            for marker in markers:
                if marker in text:
                    end = text.find(marker) + len(marker)
                    ends.append((end, -len(marker), marker))
            if not ends:
                break
            # The first one to end counts, of those the longest.
            end, _, marker = min(ends)
            segments.append((name, text[: end - len(marker)]))
            name = markers[marker]
            text = text[end:]
        if name is None:
            return (name, transitions, text), [*segments, (name, "")]
        n_held_back = max((_n_begun(marker, text) for marker in markers), default=0)
        certain = len(text) - n_held_back
        return (name, transitions, text[certain:]), [*segments, (name, text[:certain])]

    @staticmethod
    def flush(state: State) -> tuple[State, str, str | None]:
        """Gives out the text held back as a possible beginning of a marker."""
        name, transitions, held_back = state
        return (name, transitions, ""), held_back, name


def _n_begun(marker: str, text: str) -> int:
    """How many characters of a marker a text ends with; 0 if it does not begin there."""
    for n in reversed(range(1, len(marker))):
        if text.endswith(marker[:n]):
            return n
    return 0


def make_text_state_machine(tokenizer: Any) -> TextStateMachine:
    """Makes the machine that finds thinking and tool calls by the tokenizer's marks."""
    transitions: Transitions = {"normal": []}
    if tokenizer.has_thinking:
        transitions["normal"].append((tokenizer.think_start, "reasoning"))
        transitions["reasoning"] = [(tokenizer.think_end, "normal")]
    if tokenizer.has_tool_calling:
        for edges in list(transitions.values()):
            edges.append((tokenizer.tool_call_start, "tool"))
        transitions["tool"] = [(tokenizer.tool_call_end, "normal")]
    return TextStateMachine(transitions)
