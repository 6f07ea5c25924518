"""Python runs this at its start where `mlx_flashhead.run` has put this folder on PYTHONPATH.

It costs nothing until mlx-lm or mlx-vlm is imported, and stands alone, since other Pythons than
the one of `run` read it too.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec

LIBRARIES = ("mlx_lm", "mlx_vlm")


class Watch:
    """A finder that finds the libraries as Python does, and has them patched."""

    looks = False

    def find_spec(self, name, path=None, target=None):
        """Finds one of the libraries; None for other modules."""
        if name not in LIBRARIES or self.looks:
            return None
        # The other finders look for it meanwhile.
        self.looks = True
        spec = find_spec(name)
        self.looks = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                patch(name)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def patch(library):
    """Patches a library's loads and loops in this process, unless it is one of mlx_flashhead's."""
    if library == "mlx_lm" and "mlx_flashhead.models" in sys.modules:
        return
    try:
        import mlx_lm  # noqa: F401 - which is patched first

        from mlx_flashhead.loading.programs import patch_library

        patch_library(library)
    except ImportError as error:
        reason = f"{error} in {sys.executable}"
        print(f"Without FlashHead: {reason}: install mlx_flashhead there.", file=sys.stderr)
    except Exception as error:
        # A library may have another version, or options of one.
        reason = f"{type(error).__name__}: {error}"
        print(f"Without FlashHead: it does not fit these libraries ({reason}).", file=sys.stderr)


def pass_on():
    """Runs the sitecustomize that Python would have found without this one."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [folder for folder in sys.path if os.path.abspath(folder) != here]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if "MLX_FLASHHEAD_RUN" in os.environ:
    sys.meta_path.insert(0, Watch())
pass_on()
