"""The operations that a head takes: Metal kernels, or portable ones where no kernel runs.

Kernels are first tried beside the portable operations at their real shapes.
"""

import re
from typing import Any

import mlx.core as mx

from .backend import BACKEND_VARIABLE, METAL, PORTABLE, choose_backend, log, named_backend
from .clustered import ClusteredRows
from .kernel_texts import FEWER_THREADS
from .kernel_trial import TOO_MANY_THREADS, find_trouble
from .logit_map import IDENTITY, LogitMap, all_values
from .metal_operations import MetalOperations
from .operations import PortableOperations

COMMAND = "mlx_flashhead.benchmark head --shape 32000,1024 --report"
HOW_TO_REPORT = f"please report this as an issue, with the output of `{COMMAND}`"
# Architectures of GPUs that emulate bfloat16, those of M1 and M2: a matrix product takes 1.8 times
# as long. Source: ml-explore/mlx, number 4216.
EMULATING = re.compile("applegpu_g1[34]")


class ChosenOperations:
    """The operations in use, and why.

    Args:
        clustered: The rows.
        requested: The name of a backend; None: by the environment and the machine.

    Attributes:
        operations: Those in use.
        reason: A sentence: the reason for them, or their slower part.
    """

    def __init__(self, clustered: ClusteredRows, requested: str | None):
        self._clustered = clustered
        self.operations, self.reason = make_operations(clustered, requested)
        # A head without kernels has none for its life, pickled or not.
        self._requested = requested
        if self.operations.name == PORTABLE:
            self._requested = PORTABLE

    def __getstate__(self) -> dict[str, Any]:
        """Without the kernels, which belong to this process."""
        return {name: value for name, value in vars(self).items() if name != "operations"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.operations, reason = make_operations(self._clustered, self._requested)
        # Another thread could not evaluate them.
        mx.eval(self.operations.arrays())
        # Otherwise the reason may be a kernel that has failed.
        if self.operations.name != PORTABLE:
            self.reason = reason

    def copy(self) -> "ChosenOperations":
        """The same operations, for a head that may fall back on its own."""
        copied = ChosenOperations.__new__(ChosenOperations)
        vars(copied).update(vars(self))
        return copied

    def try_kernels(self, dtype: mx.Dtype, n_probes: int, logit_map: LogitMap) -> None:
        """Runs each kernel once, with smaller threadgroups if its pipeline allows no others.

        If one fails, the portable operations take their place.

        Args:
            dtype: Of the hidden states.
            n_probes: Clusters that are scored.
            logit_map: What the model does to its head's logits.

        Raises:
            ValueError: If one fails and the backend "metal" was requested by name.
        """
        operations = self.operations
        if not isinstance(operations, MetalOperations):
            return
        trouble = find_trouble(operations, dtype, n_probes, logit_map)
        if trouble and TOO_MANY_THREADS in trouble and operations.row_threads > FEWER_THREADS:
            operations = MetalOperations(
                operations.clustered, operations.metal_kernel, FEWER_THREADS
            )
            self.operations = operations
            # A second trial of a map comes after one without it, whose kernels are others now.
            for tried in dict.fromkeys((IDENTITY, logit_map)):
                trouble = find_trouble(operations, dtype, n_probes, tried)
                if trouble is not None:
                    break
        if trouble is not None:
            self.fall_back(trouble)
            return
        architecture = str(mx.device_info().get("architecture"))
        if dtype == mx.bfloat16 and EMULATING.match(architecture):
            operations.float16_rows = operations.clustered.flat_rows().in_float16()

    def fall_back(self, trouble: str) -> None:
        """Takes the portable operations from now on, because of trouble with the kernels.

        Args:
            trouble: What it is, as a part of a sentence.

        Raises:
            ValueError: If the backend "metal" was requested by name.
        """
        if named_backend(self._requested) == METAL:
            raise ValueError(
                f"FlashHead's Metal kernels cannot be used: {trouble}; use backend='mlx' or "
                f"unset {BACKEND_VARIABLE}, and {HOW_TO_REPORT}."
            )
        self.reason = (
            "FlashHead takes MLX's own operations instead of its Metal kernels, because "
            f"{trouble}; {HOW_TO_REPORT}."
        )
        log.warning(self.reason)
        self.operations = PortableOperations(self._clustered)
        self._requested = PORTABLE

    def maps_as_mlx(self, logit_map: LogitMap, dtype: mx.Dtype) -> bool:
        """Returns whether the operations in use map logits of ``dtype`` as MLX does.

        In 16 bits all must agree to the last bit, in float32 within the map's slack. Evaluates.
        """
        if not isinstance(self.operations, MetalOperations):
            return True
        values = all_values(dtype)
        expected = logit_map(values).astype(mx.float32)
        try:
            found = self.operations.mapped(values, logit_map).astype(mx.float32)
            allowed = logit_map.slack(dtype) / 4 * mx.abs(expected)
            is_off = mx.abs(found - expected) > allowed
            return not is_off.any().item()
        # The kernel does not run on this device.
        except RuntimeError:
            return False


def make_operations(
    clustered: ClusteredRows, requested: str | None
) -> tuple[PortableOperations, str]:
    """The operations of the chosen backend, and a sentence: the reason, or their slower part."""
    if choose_backend(requested) == PORTABLE:
        reason = "MLX finds no Apple GPU on this machine."
        if named_backend(requested) is not None:
            reason = "The backend 'mlx' was requested."
        elif mx.metal.is_available():
            reason = "MLX's default device is the CPU."
        return PortableOperations(clustered), reason
    operations = MetalOperations(clustered)
    if operations.reads_rows:
        return operations, "MLX computes on an Apple GPU."
    reason = (
        f"FlashHead's Metal kernels do not read {clustered.rows.format} rows: MLX's own operations "
        "do, which takes a few more kernels per token. The other operations are kernels."
    )
    log.warning(reason)
    return operations, reason
