"""What all commands share: one clear sentence and exit code 2 for what a user can mend."""

import functools
import signal
import sys
from collections.abc import Callable


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Wraps a command's ``main``: mistakes end with a sentence on stderr, never a traceback."""

    @functools.wraps(main)
    def run(*args, **kwargs):
        # a terminated conversion cleans up after itself, as an interrupted one does
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            main(*args, **kwargs)
        except KeyboardInterrupt:
            print("\nInterrupted.", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:
            sys.exit(141)
        except (ValueError, OSError) as error:
            print(f"error: {_sentence(error)}", file=sys.stderr)
            sys.exit(2)

    return run


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: free some space or choose another place."
    return str(error).strip().split("\n")[0]
