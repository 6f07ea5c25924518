"""The input line of a chat: its history, completion, pasted texts and several lines."""

import asyncio
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession, completion
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
    """A function that lets a user type a text after ``prompt`` and returns it. A text that is open
    goes on in the next line. ``commands`` complete the beginning of a line, and a file's name
    follows those ``with_files``. The file ``history`` stores earlier texts, if it can."""
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    store = None  # without a place the history lasts as long as the chat
    with suppress(OSError):
        history.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        history.touch()
        store = FileHistory(history)
    names = completion.WordCompleter([f"{name} " for name in commands], sentence=True)
    paths = completion.PathCompleter(expanduser=True)
    files = completion.NestedCompleter({name: paths for name in with_files})
    session: PromptSession[str] = PromptSession(
        history=store,
        completer=completion.DynamicCompleter(
            lambda: files if " " in session.default_buffer.text else names
        ),
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

        def leave(number: int) -> None:
            if session.app.future is not None and not session.app.future.done():
                session.app.exit(exception=SystemExit(128 + number))

        def heed_signals() -> None:
            for number, handler in handlers.items():
                if callable(handler):
                    asyncio.get_running_loop().add_signal_handler(number, leave, number)

        try:
            return session.prompt(prompt, pre_run=heed_signals)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return read
