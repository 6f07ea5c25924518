"""The steps that a head takes: Metal kernels, or MLX's operations where none run.

Kernels are first tried beside the operations at their real shapes.
"""

import re
from typing import Any

import mlx.core as mx

from .backend import BACKEND_VARIABLE, METAL, PORTABLE, choose_backend, log, named_backend
from .clustered import ClusteredRows
from .kernel_texts import FEWER_THREADS
from .kernel_trial import TOO_MANY_THREADS, find_trouble
from .logit_map import IDENTITY, LogitMap, all_values
from .metal_steps import MetalSteps
from .steps import PortableSteps

COMMAND = "mlx_flashhead.benchmark head --shape 32000,1024 --report"
HOW_TO_REPORT = f"please report this as an issue, with the output of `{COMMAND}`"
# Architectures of GPUs that emulate bfloat16, those of M1 and M2: a matrix product takes 1.8 times
# as long. Source: ml-explore/mlx, number 4216.
EMULATING = re.compile("applegpu_g1[34]")


class ChosenSteps:
    """The steps in use, and why.

    Args:
        clustered: The rows.
        requested: The name of a backend; None: by the environment and the machine.

    Attributes:
        steps: The steps.
        reason: A sentence: the reason for them, or their slower part.
    """

    def __init__(self, clustered: ClusteredRows, requested: str | None):
        self._clustered = clustered
        self.steps, self.reason = make_steps(clustered, requested)
        # A head without kernels has none for its life, pickled or not.
        self._requested = requested
        if self.steps.name == PORTABLE:
            self._requested = PORTABLE

    def __getstate__(self) -> dict[str, Any]:
        """Without the kernels, which belong to this process."""
        return {name: value for name, value in vars(self).items() if name != "steps"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.steps, reason = make_steps(self._clustered, self._requested)
        # Another thread could not evaluate them.
        mx.eval(self.steps.arrays())
        # Otherwise the reason may be a kernel that has failed.
        if self.steps.name != PORTABLE:
            self.reason = reason

    def copy(self) -> "ChosenSteps":
        """The same steps, for a head that may fall back on its own."""
        copied = ChosenSteps.__new__(ChosenSteps)
        vars(copied).update(vars(self))
        return copied

    def try_kernels(self, dtype: mx.Dtype, n_probes: int, logit_map: LogitMap) -> None:
        """Runs each kernel once, with smaller threadgroups if its pipeline allows no others.

        If one fails, MLX's operations take their place.

        Args:
            dtype: Of the hidden states.
            n_probes: Clusters that are scored.
            logit_map: What the model does to its head's logits.

        Raises:
            ValueError: If one fails and the backend "metal" was requested by name.
        """
        steps = self.steps
        if not isinstance(steps, MetalSteps):
            return
        trouble = find_trouble(steps, dtype, n_probes, logit_map)
        if trouble and TOO_MANY_THREADS in trouble and steps.row_threads > FEWER_THREADS:
            steps = MetalSteps(steps.clustered, steps.metal_kernel, FEWER_THREADS)
            self.steps = steps
            # A second trial of a map comes after one without it, whose kernels are others now.
            for tried in dict.fromkeys((IDENTITY, logit_map)):
                trouble = find_trouble(steps, dtype, n_probes, tried)
                if trouble is not None:
                    break
        if trouble is not None:
            self.fall_back(trouble)
            return
        architecture = str(mx.device_info().get("architecture"))
        if dtype == mx.bfloat16 and EMULATING.match(architecture):
            steps.float16_rows = steps.clustered.flat_rows().in_float16()

    def fall_back(self, trouble: str) -> None:
        """Takes MLX's operations from now on, because of trouble with the kernels.

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
        self.steps = PortableSteps(self._clustered)
        self._requested = PORTABLE

    def maps_as_mlx(self, logit_map: LogitMap, dtype: mx.Dtype) -> bool:
        """Returns whether the steps map logits of ``dtype`` as MLX's operations do.

        In 16 bits all must agree to the last bit, in float32 within the map's slack. Evaluates.
        """
        if not isinstance(self.steps, MetalSteps):
            return True
        values = all_values(dtype)
        expected = logit_map(values).astype(mx.float32)
        try:
            found = self.steps.mapped(values, logit_map).astype(mx.float32)
            allowed = logit_map.slack(dtype) / 4 * mx.abs(expected)
            is_off = mx.abs(found - expected) > allowed
            return not is_off.any().item()
        # The kernel does not run on this device.
        except RuntimeError:
            return False


def make_steps(clustered: ClusteredRows, requested: str | None) -> tuple[PortableSteps, str]:
    """The steps of the chosen backend, and a sentence: the reason for it, or its slower part."""
    if choose_backend(requested) == PORTABLE:
        reason = "MLX finds no Apple GPU on this machine."
        if named_backend(requested) is not None:
            reason = "The backend 'mlx' was requested."
        elif mx.metal.is_available():
            reason = "MLX's default device is the CPU."
        return PortableSteps(clustered), reason
    steps = MetalSteps(clustered)
    if steps.reads_rows:
        return steps, "MLX computes on an Apple GPU."
    reason = (
        f"FlashHead's Metal kernels do not read {clustered.rows.format} rows: MLX's own operations "
        "do, which takes a few more kernels per token. The other steps are FlashHead's."
    )
    log.warning(reason)
    return steps, reason
