"""``generate`` as a program that sends itself a signal at a moment: KIND MOMENT SIGNAL ARGUMENTS.

The moments are counted, and written beside its home: each piece of text that is printed, each step
of the build, and each change in the folder of the cached FlashHeads.
"""

import functools
import json
import os
import sys
from collections import Counter
from pathlib import Path

from mlx_flashhead.conversion.options import IndexOptions
from mlx_flashhead.loading import background as build

TEXT, STEP, FILE = "text", "step", "file"
FILES = ("open", "os.mkdir", "os.rename", "os.rmdir", "os.remove", "tempfile.mkdtemp")


def main() -> None:
    """Counts, generates, and stops."""
    kind, moment, number = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
    home, moments = os.environ["MLX_FLASHHEAD_HOME"], Counter()

    def reached(name: str) -> None:
        moments[name] += 1
        Path(f"{home}.moments").write_text(json.dumps(moments))
        if (name, moments[name]) == (kind, moment):
            os.kill(os.getpid(), number)

    def look(event: str, values: tuple) -> None:
        is_path = event in FILES and isinstance(values[0], str | os.PathLike)
        if is_path and str(values[0]).startswith(f"{home}/"):
            reached(FILE)

    model_index, write = build.model_index, sys.stdout.write

    def counted_index(*values, **options):
        steps = model_index(*values, **options)
        try:
            while True:
                reached(STEP)
                yield next(steps)
        except StopIteration as end:
            return end.value
        finally:
            steps.close()

    build.IndexOptions = functools.partial(IndexOptions, calibration_positions=100)
    build.model_index = counted_index
    sys.stdout.write = lambda text: reached(TEXT) or write(text)
    sys.addaudithook(look)
    from mlx_flashhead.generate import main as generate

    generate()


if __name__ == "__main__":
    main()
