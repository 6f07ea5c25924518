"""A talk at the terminal: the user types messages and commands."""

import textwrap
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..common.command import sentence
from ..common.tables import count
from ..common.terminal import Terminal, stop_key, without_quotes
from ..head.flash_head import FlashHead
from ..loading.background import IdleBuild
from ..lossless.policy import decoding_mode, policy_of
from ..models.install import get_flash_head
from .conversation import (
    LENGTH,
    STOPPED,
    USER,
    Answer,
    Conversation,
    keep,
    read_conversation,
    write_conversation,
)

COMMANDS = {
    "/help": "what can be typed (or h)",
    "/reset": "begin a new conversation (or r)",
    "/stats": "settings, and figures of the conversation",
    "/probes": "N: clusters probed per token",
    "/dense": "switch between the normal (dense) head and FlashHead",
    "/save": "FILE: write the conversation as JSON",
    "/load": "FILE: continue a conversation from there",
    "/exit": "leave (or q, or Ctrl-D)",
}
WITH_FILES = ("/save", "/load")
# What people type for a command; the letters are those of mlx_lm.chat.
ALIASES = {
    "/help": ("h", "/h", "help", "?"),
    "/reset": ("r", "/r"),
    "/exit": ("q", "/q", "quit", "/quit", "exit"),
}
HELP = """\
Ctrl-C stops an answer. A message that begins with a slash needs a space before it.
Several lines: paste them, end a line with Esc Enter, or put \"\"\" before and after them.
Up and down go through what was typed, Tab completes commands and files."""
NOT_LIMITED = "--max-kv-size has no effect: mlx-lm lets this model choose the size of its cache."
NO_FLASH_HEAD = "This model has no FlashHead yet: start without --dense, and it is built."


@dataclass
class ChatSession:
    """Reads texts from the terminal, answers messages and runs commands."""

    conversation: Conversation
    terminal: Terminal
    args: Namespace
    options: dict[str, Any]  # keywords of each answer
    idle: IdleBuild | None = None  # a FlashHead that is built while the user types and reads

    def __post_init__(self):
        self.keeping = self.args.resume or self.terminal.interactive
        self.head = get_flash_head(self.conversation.model)
        self.dense = self.args.dense

    def run(self) -> None:
        """Until the end of the input or /exit."""
        if self.terminal.interactive:
            self.terminal.say(f"{self.args.model}, {self._settings()}. /help lists the commands.")
        if self.args.max_kv_size is not None and not self.conversation.cache.limited:
            self.terminal.say(NOT_LIMITED)
        if self.args.resume:
            messages = self.conversation.messages
            summary = f"Continuing the last conversation, {count(len(messages), 'message')}"
            if questions := [m["content"] for m in messages if m["role"] == USER]:
                summary += f"; last: {textwrap.shorten(questions[-1], 60, placeholder='…')}"
            self.terminal.say(summary)
        while True:
            try:
                text = self.terminal.read()
                command, argument = _command(text)
                if command == "/exit":
                    return
                self._do(command, argument, without_quotes(text))
            except EOFError:
                if self.terminal.interactive:
                    self.terminal.say("")
                return
            except KeyboardInterrupt:  # at the prompt, or when an answer has just ended
                if not self.terminal.interactive:
                    raise
                self.terminal.say("\n/exit or Ctrl-D leaves.")

    def _do(self, command: str, argument: str, text: str) -> None:
        try:
            if command:
                if command not in COMMANDS:
                    raise ValueError(f"There is no command {command}: /help lists the commands.")
                getattr(self, f"_{command[1:]}")(argument)
            elif text:
                self._answer(text)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            self.terminal.say(sentence(error))

    def _answer(self, text: str) -> None:
        before = len(self.conversation.answers)
        try:
            with self._model_to_itself(), stop_key() as stopping:
                for piece in self.conversation.ask(
                    text, stopping=stopping, dense=self.dense, **self.options
                ):
                    self.terminal.show(piece)
        except KeyboardInterrupt:
            pass  # the answer so far stays
        finally:
            self.terminal.end()
        if len(self.conversation.answers) == before:
            self.terminal.say("[stopped before the answer, the message is forgotten]")
            return
        answer = self.conversation.answers[-1]
        self.terminal.say(f"[{_figures(answer)}]")
        if answer.finish == LENGTH:
            remedy = "ask to go on, or start with a higher limit, or -1 for none"
            self.terminal.say(f"[cut at --max-tokens {self.args.max_tokens}: {remedy}]")
        if self.keeping:
            try:
                keep(self.conversation.messages, self.args.model)
            except OSError as error:
                self.keeping = False  # and it is said once
                reason = sentence(error)
                self.terminal.say(f"This conversation is not kept for --resume: {reason}")

    @contextmanager
    def _model_to_itself(self) -> Iterator[None]:
        """A block in which nothing is built; says once that a FlashHead is there."""
        if self.idle is None:
            yield
            return
        with self.idle.paused():
            if self.head is None:
                self.head = get_flash_head(self.conversation.model)
                if self.head is not None:
                    self.terminal.say(f"[FlashHead is ready: {self._settings()}]")
            yield

    def _help(self, _: str) -> None:
        for name, what in COMMANDS.items():
            self.terminal.say(f"  {name:8} {what}")
        self.terminal.say(HELP)

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self.terminal.say("A new conversation.")

    def _stats(self, _: str) -> None:
        answers, cache, head = self.conversation.answers, self.conversation.cache, self.head
        lines = [f"{self.args.model}, {self._settings()}"]
        if head is not None:
            lines.append(f"backend {head.backend!r}: {head.backend_reason}")
            policy = policy_of(head)
            if policy.gain is not None:
                known = "predicted" if policy.predicted else "measured"
                lines.append(f"{known} on this machine: {policy.gain:.2f} times as fast as dense")
        held = f"{len(cache.token_ids)} tokens in the cache"
        held += f", which keeps the last {self.args.max_kv_size}" if cache.limited else ""
        lines.append(f"{count(len(self.conversation.messages), 'message')}, {held}")
        if answers:
            lines.append(f"last answer: {_figures(answers[-1])}")
            tokens = sum(answer.n_tokens for answer in answers)
            lines.append(f"{count(len(answers), 'answer')} of {count(tokens, 'token')}")
        lines.append(f"memory at most {mx.get_peak_memory() / 1e9:.2f} GB")
        self.terminal.say("\n".join(lines))

    def _probes(self, argument: str) -> None:
        head = self._flash_head()
        if argument:
            try:
                n_probes = int(argument)
            except ValueError:
                remedy = f"give a whole number, 1 to {head.n_clusters}"
                raise ValueError(f"/probes is {argument!r}: {remedy}.") from None
            head.n_probes = n_probes
            policy_of(head).dense = False  # the user's number comes before what was measured
        self.terminal.say(f"Now {self._settings()}.")

    def _dense(self, _: str) -> None:
        self._flash_head()  # or an error that there is none
        self.dense = not self.dense
        self.terminal.say(f"Now {self._settings()}.")

    def _save(self, argument: str) -> None:
        path = _path("/save", argument)
        write_conversation(path, self.conversation.messages, self.args.model)
        self.terminal.say(f"Wrote {count(len(self.conversation.messages), 'message')} to {path}.")

    def _load(self, argument: str) -> None:
        path = _path("/load", argument)
        self.conversation.replace(read_conversation(path))
        self.terminal.say(f"Read {count(len(self.conversation.messages), 'message')} from {path}.")

    def _flash_head(self) -> FlashHead:
        if self.head is None:
            raise ValueError(NO_FLASH_HEAD)
        return self.head

    def _settings(self) -> str:
        if self.head is None:
            return "dense, without FlashHead"
        verify = self.options.get("verify", True)
        mode = decoding_mode(self.conversation.model, verify=verify, dense=self.dense)
        if mode.startswith("dense"):
            return mode
        n_probes = self.head.n_probes if verify else self.head.unverified_probes
        return f"{mode}, {n_probes:,} of {self.head.n_clusters:,} clusters scored per token"


def _command(text: str) -> tuple[str, str]:
    """The command in a line and its argument; two empty texts if it is a message."""
    words = text.split(maxsplit=1)
    if not words or "\n" in text.strip("\n"):
        return "", ""
    name = next((name for name, others in ALIASES.items() if words[0] in others), words[0])
    alone = len(words) == 1 and name in ALIASES and "/" not in words[0]
    if text.startswith("/") or alone:  # after a space, a slash begins a message
        return name, words[1].strip() if words[1:] else ""
    return "", ""


def _figures(answer: Answer) -> str:
    figures = [count(answer.n_tokens, "token")]
    if answer.tokens_per_second is not None:
        figures.append(f"{answer.tokens_per_second:.1f} tokens/s")
    figures.append(f"prompt {answer.n_prompt} tokens, {answer.n_cached} from the cache")
    if answer.finish == STOPPED:
        figures.append("stopped")
    return ", ".join(figures)


def _path(name: str, argument: str) -> Path:
    if not argument:
        raise ValueError(f"{name} needs the name of a file, such as {name} chat.json.")
    return Path(argument).expanduser()
