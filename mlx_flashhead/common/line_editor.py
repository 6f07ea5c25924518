"""The input line of a chat: kept history, completion, pasted texts and several lines."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from prompt_toolkit import PromptSession
from prompt_toolkit.application import Application
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.completion.word_completer import WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

from .terminal import PROMPT, is_open

CONTINUATION = "… "
KEPT_TEXTS = 1000


def line_editor(
    commands: Sequence[str], with_files: Sequence[str], history: Path
) -> Callable[[], str]:
    """A function that lets a user type a text and returns it.

    Args:
        commands: Completions for the beginning of a line.
        with_files: Commands that a file's name follows.
        history: File of earlier texts. If it cannot be written, nothing is kept.
    """
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    session: PromptSession[str] = PromptSession(
        history=_KeptHistory(history),
        completer=_Commands(commands, with_files),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        key_bindings=keys,
        # Enter ends the text, or only a line while its quotes are open
        multiline=Condition(lambda: is_open(session.default_buffer.text)),
        prompt_continuation=CONTINUATION,
    )

    def read() -> str:
        with _ending_at_signals(session.app) as leave:
            return session.prompt(PROMPT, pre_run=leave)

    return read


@contextmanager
def _ending_at_signals(app: Application[str]) -> Iterator[Callable[[], None]]:
    """Within the block, signals that end the program wait until the editor has left the terminal.

    An exception out of a signal's handler may be lost in the event loop, or leave the terminal raw.

    Yields:
        A function that ends the editor if a signal has come, to be called when it starts.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    received: list[int] = []

    def leave() -> None:
        if received and app.future is not None and not app.future.done():
            app.exit(result="")

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if app.loop is not None:
            with suppress(RuntimeError):  # closed just now
                app.loop.call_soon_threadsafe(leave)

    for number, handler in handlers.items():
        if callable(handler):
            signal.signal(number, note)
    try:
        yield leave
    finally:
        for number, handler in handlers.items():
            if callable(handler):
                signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])


class _KeptHistory(FileHistory):
    """A history in a file, of which the newest texts stay from one start to the next."""

    def __init__(self, path: Path):
        super().__init__(path)
        with suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            newest = list(self.load_history_strings())
            if len(newest) > KEPT_TEXTS:
                new = path.with_suffix(".new")
                new.unlink(missing_ok=True)
                for text in reversed(newest[:KEPT_TEXTS]):
                    FileHistory(new).store_string(text)
                new.replace(path)

    def store_string(self, string: str) -> None:
        with suppress(OSError):  # a full disk must not end the chat
            super().store_string(string)


class _Commands(Completer):
    def __init__(self, commands: Sequence[str], with_files: Sequence[str]):
        self._commands = WordCompleter([f"{name} " for name in commands], sentence=True)
        self._files = PathCompleter(expanduser=True)
        self._with_files = with_files

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        command, space, path = document.text_before_cursor.partition(" ")
        if not space and command:
            yield from self._commands.get_completions(document, event)
        elif command in self._with_files:
            yield from self._files.get_completions(Document(path), event)
