"""What Python runs at its start where `mlx_flashhead.run` has put this folder on PYTHONPATH: in the
processes that a program starts, and in services.

It costs nothing until mlx-lm or mlx-vlm is imported. It stands alone, since other Pythons than the
one of `run` read it too.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

VARIABLE = "MLX_FLASHHEAD_RUN"
LIBRARIES = ("mlx_lm", "mlx_vlm")


class Watch:
    """Waits, as a finder, for the first import of one of the libraries."""

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name in LIBRARIES else None
        if spec is None or spec.loader is None or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            start()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def start():
    """Patches the libraries' loads in this process."""
    try:
        from mlx_flashhead.loading.patch import patch_from_environment
    except ImportError as error:
        reason = f"{error} in {sys.executable}"
        print(f"Without FlashHead: {reason}: install mlx_flashhead there.", file=sys.stderr)
    else:
        patch_from_environment()


def pass_on():
    """Runs the sitecustomize that Python would have found without this one."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [place for place in sys.path if os.path.abspath(place) != here]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        sys.modules["sitecustomize"] = module = module_from_spec(spec)
        spec.loader.exec_module(module)


if VARIABLE in os.environ:
    sys.meta_path.insert(0, Watch())
pass_on()
