"""A conversation at the terminal: the user types messages and commands."""

import math
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..common.arguments import whole_number
from ..common.command import sentence
from ..common.tables import count
from ..common.terminal import QUOTES, Terminal, bar_of, stop_key
from ..decoding.policy import decoding_mode, policy_of
from ..head.flash_head import FlashHead
from ..loading.builds import LEFT, Build, time_left
from ..loading.gain_sentences import speed_text
from ..models.install import get_flash_head
from .conversation import (
    LENGTH,
    STOPPED,
    ChatAnswer,
    Conversation,
    read_conversation,
    store_conversation,
    write_conversation,
)

COMMANDS = {
    "/help": "what can be typed (or h)",
    "/reset": "begin a new conversation (or r)",
    "/stats": "settings, and figures of the conversation",
    "/probes": "N: score N clusters per token",
    "/dense": "switch between the normal (dense) head and FlashHead",
    "/save": "FILE: write the conversation as JSON",
    "/load": "FILE: continue a conversation from there",
    "/exit": "leave (or q, or Ctrl-D)",
}
WITH_FILES = ("/save", "/load")
WITH_HEAD = ("/probes", "/dense")
# With a slash or without; the letters are those of mlx_lm.chat.
ALIASES = {"h": "/help", "help": "/help", "?": "/help", "r": "/reset"}
ALIASES |= dict.fromkeys(("q", "quit", "exit"), "/exit")
KEYS = """\
Ctrl-C stops an answer. A message that begins with a slash needs a space before it.
Several lines: paste them, end a line with Esc Enter, or put \"\"\" before and after them.
Up and down go through what was typed, Tab completes commands and files."""
HELP = "\n".join([*(f"  {name:8} {what}" for name, what in COMMANDS.items()), KEYS])
NO_FLASH_HEAD = "This model has no FlashHead: start without --dense and --no-build to build one."
BUILDING = "FlashHead is being built while you type and read: it is used once it is ready."


@dataclass
class ChatSession:
    """Reads texts from the terminal, answers messages and runs commands.

    Attributes:
        conversation: The conversation.
        terminal: Where the user types and reads.
        args: The command's flags.
        options: Keywords of each answer.
        build: That of a FlashHead, while the user types and reads.
        lines: What the build says, before the next text.
    """

    conversation: Conversation
    terminal: Terminal
    args: Namespace
    options: dict[str, Any]
    build: Build | None = None
    lines: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.stores = self.args.resume or self.terminal.interactive
        self.head = get_flash_head(self.conversation.model)
        self.dense = self.args.dense
        # A text that is worked on has the machine to itself.
        self._works = False
        if self.build is not None:
            self.build.gate = lambda: not self._works
        self.terminal.status = self._status

    def run(self) -> None:
        """Until the end of the input or /exit."""
        say = self.terminal.say
        interactive = self.terminal.interactive
        self._say_lines()
        if interactive:
            say(f"{self.args.model}, {self._settings()}. /help lists the commands.")
        if self.args.resume:
            say(f"Continuing the last conversation, {self._messages()}.")
        more = True
        while more:
            try:
                more = self._take_turn()
            except EOFError:
                say("")
                more = False
            except KeyboardInterrupt:
                # Ctrl-C comes at the prompt, or when an answer has just ended.
                if not interactive:
                    raise
                say("\n/exit or Ctrl-D leaves.")
        if self.build is not None and self.build.stored is None and self.build.under_way:
            say(LEFT)

    def _take_turn(self) -> bool:
        """Reads a text and answers it, or runs the command in it; False at /exit."""
        command, rest = _command(self.terminal.read())
        if command == "/exit":
            return False
        with self._working():
            try:
                if command:
                    self.terminal.say(self._run(command, rest))
                elif rest:
                    self._answer(rest)
            except BrokenPipeError:
                raise
            except (ValueError, OSError) as error:
                self.terminal.say(sentence(error))
        return True

    @contextmanager
    def _working(self) -> Iterator[None]:
        """A block that has the machine to itself, and begins with what was built meanwhile."""
        self._works = True
        try:
            if self.build is not None:
                self.build.take_over(self.conversation.model)
            self._say_lines()
            if self.head is None:
                self._welcome_head()
            yield
        finally:
            self._works = False

    def _say_lines(self) -> None:
        while self.lines:
            self.terminal.say(self.lines.pop(0))

    def _status(self) -> str:
        """What stands below the line that is typed: how far the build is."""
        build = self.build
        if build is None or build.has_ended:
            return ""
        if build.stored is not None:
            return "FlashHead is ready. Its speed on this machine is being measured."
        forecast = build.forecast
        if forecast is None:
            return "FlashHead is being built."
        bar = bar_of(forecast.share)
        return f"FlashHead is being built: {bar} {forecast.share:.0%}, {time_left(forecast)}"

    @property
    def _is_building(self) -> bool:
        """Whether a FlashHead, or the measurement of its speed, is under way."""
        return self.build is not None and self.build.under_way

    def _answer(self, text: str) -> None:
        conversation = self.conversation
        say = self.terminal.say
        before = len(conversation.answers)
        try:
            # The answer so far stays.
            with suppress(KeyboardInterrupt), stop_key() as stopping:
                answering = conversation.ask(
                    text, stopping=stopping, dense=self.dense, **self.options
                )
                for piece in answering:
                    self.terminal.show(piece)
        finally:
            self.terminal.end()
        if len(conversation.answers) == before:
            say("[stopped before the answer, the message is forgotten]")
            return
        answer = conversation.answers[-1]
        say(f"[{_figures(answer)}]")
        if answer.finish == LENGTH:
            remedy = "ask to go on, or start with a higher limit, or -1 for none"
            say(f"[cut at --max-tokens {self.args.max_tokens}: {remedy}]")
        if self.stores:
            try:
                store_conversation(conversation.messages, self.args.model)
            except OSError as error:
                # It is said once.
                self.stores = False
                say(f"This conversation is not kept for --resume: {sentence(error)}")

    def _welcome_head(self) -> None:
        """Takes a FlashHead that was built meanwhile, and says so."""
        self.head = get_flash_head(self.conversation.model)
        if self.head is None:
            return
        if self._is_building:
            self.terminal.say("[FlashHead is ready. Its speed is still being measured.]")
        elif not policy_of(self.head).dense:
            # The build says itself that a head stays unused.
            self.terminal.say(f"[FlashHead is ready: {self._settings()}]")

    def _run(self, command: str, argument: str) -> str:
        """Runs a command, and returns what to say."""
        actions = {
            "/help": lambda: HELP,
            "/reset": self._reset,
            "/stats": self._stats,
            "/probes": lambda: self._set_probes(argument),
            "/dense": self._switch_head,
            "/save": lambda: self._save(Path(argument).expanduser()),
            "/load": lambda: self._load(Path(argument).expanduser()),
        }
        if command not in actions:
            raise ValueError(f"There is no command {command}: /help lists the commands.")
        if command in WITH_FILES and not argument:
            raise ValueError(f"{command} needs the name of a file, such as {command} chat.json.")
        if command == "/probes" and argument:
            _check_probes(argument, self.head)
        if command in WITH_HEAD and self.head is None:
            if self._is_building:
                raise ValueError(BUILDING)
            raise ValueError(NO_FLASH_HEAD)
        return actions[command]()

    def _reset(self) -> str:
        self.conversation.reset()
        return "A new conversation."

    def _save(self, path: Path) -> str:
        if path.exists():
            # It replaces conversations alone.
            read_conversation(path, remedy="choose another name")
        write_conversation(path, self.conversation.messages, self.args.model)
        return f"Wrote {self._messages()} to {path}."

    def _load(self, path: Path) -> str:
        self.conversation.replace(read_conversation(path))
        return f"Read {self._messages()} from {path}."

    def _switch_head(self) -> str:
        self.dense = not self.dense
        return f"Now {self._settings()}."

    def _set_probes(self, argument: str) -> str:
        # `_run` has checked it.
        assert self.head is not None
        if argument:
            self.head.n_probes = int(argument)
            # A number that the user names comes before what was measured.
            policy_of(self.head).dense = False
        return f"Now {self._settings()}."

    def _stats(self) -> str:
        lines = [f"{self.args.model}, {self._settings()}"]
        if self.head is not None:
            lines.append(f"backend {self.head.backend!r}: {self.head.backend_reason}")
            policy = policy_of(self.head)
            lines.append(f"speed with FlashHead on this machine: {speed_text(policy.tuning)}")
        lines.append(f"{self._messages()}, {len(self.conversation.cached_ids)} tokens in the cache")
        if self.conversation.answers:
            lines.append(f"last answer: {_figures(self.conversation.answers[-1])}")
        return "\n".join([*lines, f"memory at most {mx.get_peak_memory() / 1e9:.2f} GB"])

    def _messages(self) -> str:
        return count(len(self.conversation.messages), "message")

    def _settings(self) -> str:
        if self.head is None and self._is_building:
            return "dense, FlashHead is being built"
        if self.head is None:
            return "dense, without FlashHead"
        verify = self.options.get("verify", True)
        mode = decoding_mode(self.conversation.model, verify=verify, dense=self.dense)
        if mode.is_dense:
            return mode.words
        n_probes = self.head.unverified_probes
        if verify:
            n_probes = self.head.n_probes
        return f"{mode}, {n_probes:,} of {self.head.n_clusters:,} clusters scored per token"


def _check_probes(argument: str, head: FlashHead | None) -> None:
    """Raises a ValueError if a text is no number of clusters, as far as that is known."""
    most = math.inf
    wanted = "of 1 or more"
    if head is not None:
        most = head.n_clusters
        wanted = f"from 1 to {most:,}"
    try:
        whole_number(1, most)(argument)
    except ArgumentTypeError:
        raise ValueError(f"/probes needs a number {wanted}.") from None


def _command(text: str) -> tuple[str, str]:
    """A command and its argument; or no command, and a message."""
    message = text.strip()
    # A slash after a space begins no command.
    is_command = text.startswith("/") or message in ALIASES
    if is_command and "\n" not in text.strip("\n"):
        name = message.split(maxsplit=1)[0]
        argument = message.removeprefix(name).strip()
        return ALIASES.get(name.removeprefix("/"), name), argument
    if message.startswith(QUOTES):
        message = message.removeprefix(QUOTES).removesuffix(QUOTES).strip()
    return "", message


def _figures(answer: ChatAnswer) -> str:
    figures = [count(answer.n_tokens, "token")]
    if answer.tokens_per_second is not None:
        figures.append(f"{answer.tokens_per_second:.1f} tokens/s")
    figures.append(f"prompt {answer.n_prompt} tokens, {answer.n_cached} from the cache")
    if answer.finish == STOPPED:
        figures.append("stopped")
    return ", ".join(figures)
