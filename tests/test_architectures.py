"""Every language-model architecture of mlx-lm through FlashHead.

The cases are those that docs/architectures.md names, and that document is compared with what the
installed mlx-lm gives: an architecture that is new there makes the comparison fail.
"""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

import architectures as script
from architecture_configs import VOCAB_SIZE
from architecture_models import architectures, quantized, tiny_architecture
from emulated_mlx_lm import emulated
from mlx_flashhead.indexing import build_index
from mlx_flashhead.load import install_index
from mlx_flashhead.locate import find_head, recorded_hidden

CLUSTER_SIZE, N_PROBES = 16, 4
EOS = 7


def documented_cells() -> dict[tuple[str, bool], str]:
    """(architecture, tied) → its cell in the document's table."""
    cells = {}
    for line in script.DOCUMENT.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| architecture"):
            name, untied, tied, _ = line.strip("| ").split(" | ")
            cells |= {(name, False): untied, (name, True): tied}
    return cells


CELLS = documented_cells()
SERVED = [form for form, cell in CELLS.items() if cell.startswith(script.SERVED)]
REFUSED = [form for form, cell in CELLS.items() if cell == script.REFUSED]
form_ids = {"ids": lambda value: {True: "tied", False: "untied"}.get(value)}


@pytest.fixture(autouse=True, scope="module")
def _on_this_machine():
    """Without compilation, which takes a second for some of the models and changes no result."""
    mx.disable_compile()
    with emulated():
        yield
    mx.enable_compile()


def test_document_is_what_the_script_writes():
    written = script.document(script.survey(progress=False))
    assert script.DOCUMENT.read_text(encoding="utf-8") == written, (
        "run `python scripts/architectures.py`; if it says 'not tested', give the architecture a "
        "line in tests/architecture_configs.py"
    )


def test_nearly_all_architectures_are_served():
    assert {name for name, _ in CELLS} == set(architectures())
    assert len({name for name, _ in SERVED}) >= 120
    assert script.UNTESTED not in CELLS.values()


def steps(model, tokens) -> list[mx.array]:
    """Logits of a whole prompt without a cache, and of a prompt and two tokens with one."""
    cache = make_prompt_cache(model)
    inputs = (tokens[:, :-2], tokens[:, -2:-1], tokens[:, -1:])
    return [model(tokens), *(model(part, cache=cache) for part in inputs)]


def close(actual: mx.array, expected: mx.array) -> bool:
    same_dtype = actual.dtype == expected.dtype
    return same_dtype and mx.allclose(actual, expected, rtol=1e-4, atol=1e-4).item()


@pytest.mark.parametrize("bits", [None, 4], ids=["dense", "4-bit"])
@pytest.mark.parametrize("name, tied", SERVED, **form_ids)
def test_flash_head(name, tied, bits):
    model = tiny_architecture(name, tied=tied)
    model = model if bits is None else quantized(model)
    location = find_head(model)
    assert location.tied == tied
    rng = np.random.default_rng(0)
    tokens = mx.array(rng.integers(0, VOCAB_SIZE, (2, 9)))

    text = mx.array(rng.integers(0, VOCAB_SIZE, (1, 40)))
    with recorded_hidden(location) as states:
        model(text)
    index = build_index(
        location.rows(),
        np.array(states[0][0].astype(mx.float32)),
        np.array(text[0]),
        cluster_size=CLUSTER_SIZE,
        n_probes=N_PROBES,
        eos_token_ids=(EOS,),
        progress=False,
    )
    dense = steps(model, tokens)
    mx.eval(dense)
    head = install_index(model, index, backend="mlx")

    head.n_probes = head.n_clusters
    for actual, expected in zip(steps(model, tokens), dense, strict=True):
        assert close(actual, expected)

    head.n_probes = N_PROBES
    with recorded_hidden(location) as states:
        sparse = steps(model, tokens)
    estimated = 0
    for hidden, actual, expected in zip(states, sparse, dense, strict=True):
        ids, _ = head.candidates(hidden)
        assert ids.shape == (*hidden.shape[:-1], N_PROBES * CLUSTER_SIZE)
        real = mx.minimum(ids, VOCAB_SIZE - 1)  # a padded slot looks at the last token instead
        at = [mx.take_along_axis(logits, real, axis=-1) for logits in (actual, expected)]
        assert mx.where(ids == VOCAB_SIZE, True, mx.isclose(*at, rtol=1e-4, atol=1e-4)).all()
        best = mx.argmax(actual, axis=-1, keepdims=True)
        assert (ids == best).any(axis=-1).all()
        assert (ids == EOS).any(axis=-1).all()
        estimated += (mx.abs(actual - expected) > 1e-3).sum().item()
    assert estimated > 0
