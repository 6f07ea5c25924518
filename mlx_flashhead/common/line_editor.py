"""The input line of a chat: its history, completion, pasted texts and several lines."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession, completion
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

from .typed_lines import is_open, modes_kept

# What stands at the bottom is drawn again after so many seconds.
REFRESH_SECONDS = 0.5


def line_editor(
    prompt: str,
    commands: Sequence[str],
    with_files: Sequence[str],
    history: Path,
    status: Callable[[], str] = str,
) -> Callable[[], str]:
    """Makes a function that lets a user type a text and returns it.

    Args:
        prompt: What stands before the text.
        commands: They complete the beginning of a line.
        with_files: The commands that the name of a file follows.
        history: The file that stores earlier texts, if it can be written.
        status: What stands at the bottom of the screen meanwhile; nothing if it is empty.
    """
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    names = completion.WordCompleter([f"{name} " for name in commands], sentence=True)
    paths = completion.PathCompleter(expanduser=True)
    files = completion.NestedCompleter({name: paths for name in with_files})

    def names_or_files() -> completion.Completer:
        if " " in session.default_buffer.text:
            return files
        return names

    session: PromptSession[str] = PromptSession(
        history=_stored_history(history),
        completer=completion.DynamicCompleter(names_or_files),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        key_bindings=keys,
        # Enter ends the text, or only a line while its quotes are open.
        multiline=Condition(lambda: is_open(session.default_buffer.text)),
        prompt_continuation="… ",
    )

    def read_line() -> str:
        with modes_kept():
            # A toolbar that is empty would take a line.
            toolbar = None
            if status():
                toolbar = status
            return session.prompt(prompt, bottom_toolbar=toolbar, refresh_interval=REFRESH_SECONDS)

    return read_line


def _stored_history(file: Path) -> FileHistory | None:
    """The history in a file; None if it cannot be written, and lasts as long as the chat."""
    with suppress(OSError):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch()
        return FileHistory(file)
    return None
