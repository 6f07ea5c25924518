"""Forms of architectures: what scripts/architectures.json says of them, and whether it is so."""

import os
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from architecture_configs import VOCAB_SIZE
from architectures import REFUSED, Form, examine
from emulated_mlx_lm import emulated
from mlx_flashhead.models.errors import UnsupportedHeadError
from mlx_flashhead.models.install import get_flash_head, install
from mlx_flashhead.models.locate import HeadLocation, recorded_hidden
from retrieval import candidates
from tiny_models import install_index, tiny_index

CLUSTER_SIZE = 16
N_PROBES = 4
EOS = 7


def on_this_machine(library: str):
    """A fixture: without compilation, which takes a second for some models."""

    @pytest.fixture(autouse=True, scope="module")
    def emulate():
        mx.disable_compile()
        with emulated(library):
            yield
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()

    return emulate


def by_form(found: dict[str, tuple[Form, Form]], wanted: Callable[[Form], bool]):
    """Runs a test with the name of each wanted form, and whether it is tied."""
    cases = []
    for name, forms in found.items():
        cases += [(name, tied) for tied in (False, True) if wanted(forms[tied])]
    return pytest.mark.parametrize("name, tied", cases)


def check_other(form: Form, name: str, tied: bool, build: Callable, configs: str) -> None:
    """Checks that a form is as recorded: where it is refused, that no FlashHead is installed for
    that reason, and that the model stays as it was."""
    assert examine(name, tied, build, configs) == form
    if form.cell != REFUSED or "cannot load it here" in form.reason:
        return
    model = build(name, tied=tied)
    reason = form.reason

    def modules():
        return [(path, type(module), dict(module)) for path, module in model.named_modules()]

    before = modules()
    with pytest.raises(UnsupportedHeadError) as raised:
        install(model, np.arange(304).reshape(-1, CLUSTER_SIZE), None, n_probes=1)
    assert str(raised.value) == reason
    assert reason.endswith(".")
    assert "\n" not in reason
    assert get_flash_head(model) is None
    assert modules() == before


def check_form(
    model: nn.Module, location: HeadLocation, steps: Callable[[], list[mx.array]]
) -> None:
    """Installs a FlashHead and checks all logits of ``steps``, of the dense head and of few probes.

    ``steps`` runs the model in several ways, and returns the logits of each call of the head.
    """
    dense = steps()
    mx.eval(dense)
    index = tiny_index(
        model, cluster_size=CLUSTER_SIZE, n_probes=N_PROBES, eos_token_ids=(EOS,), location=location
    )
    head = install_index(model, index, backend="mlx", location=location)
    for actual, expected in zip(steps(), dense, strict=True):
        assert actual.dtype == expected.dtype
        assert mx.allclose(actual, expected, rtol=1e-4, atol=1e-4)
    with recorded_hidden(location) as states, head.settings():
        sparse = steps()
    estimated = 0
    for hidden_states, actual, expected in zip(states, sparse, dense, strict=True):
        ids, _ = candidates(head, hidden_states)
        assert ids.shape == (*hidden_states.shape[:-1], N_PROBES * CLUSTER_SIZE)
        # A padded slot looks at the last token instead.
        real = mx.minimum(ids, VOCAB_SIZE - 1)
        scored = mx.take_along_axis(actual, real, axis=-1)
        wanted = mx.take_along_axis(expected, real, axis=-1)
        assert ((ids == VOCAB_SIZE) | mx.isclose(scored, wanted, rtol=1e-4, atol=1e-4)).all()
        best = mx.argmax(actual, axis=-1, keepdims=True)
        assert (ids == best).any(axis=-1).all()
        assert (ids == EOS).any(axis=-1).all()
        estimated += (mx.abs(actual - expected) > 1e-3).sum().item()
    assert estimated > 0
