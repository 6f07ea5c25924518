"""The input line of a chat: its history, completion, pasted texts and several lines."""

import asyncio
import signal
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.completion.word_completer import WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle


def line_editor(
    prompt: str,
    is_open: Callable[[str], bool],
    commands: Sequence[str],
    with_files: Sequence[str],
    history: Path,
) -> Callable[[], str]:
    """A function that lets a user type a text after ``prompt`` and returns it.

    A text that ``is_open`` goes on in the next line. ``commands`` complete the beginning of a line,
    and a file's name follows those in ``with_files``. The file ``history`` stores earlier texts, if
    it can be written.
    """
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    with suppress(OSError):
        history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    session: PromptSession[str] = PromptSession(
        history=_History(history),
        completer=_Commands(commands, with_files),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        key_bindings=keys,
        # Enter ends the text, or only a line while its quotes are open
        multiline=Condition(lambda: is_open(session.default_buffer.text)),
        prompt_continuation="… ",
    )

    def read() -> str:
        # An exception out of a signal's handler may be lost in the event loop, or leave the
        # terminal raw: the editor ends first.
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        received: list[int] = []

        def leave(number: int) -> None:
            received.append(number)
            if session.app.future is not None and not session.app.future.done():
                session.app.exit(result="")

        def heed_signals() -> None:
            for number, handler in handlers.items():
                if callable(handler):
                    asyncio.get_running_loop().add_signal_handler(number, leave, number)

        try:
            return session.prompt(prompt, pre_run=heed_signals)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if received:
                signal.raise_signal(received[0])

    return read


class _History(FileHistory):
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
