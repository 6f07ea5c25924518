"""Models that bring their own Python code, as mlx-lm's ``model_file`` names it."""

import mlx.core as mx
import pytest

from mlx_flashhead import convert, get_flash_head, load, stream_generate
from mlx_flashhead.models.compat.utils import load as load_plain
from remote_code import write_remote_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``(dense, converted)``."""
    folder = tmp_path_factory.mktemp("remote")
    dense = write_remote_model(folder / "dense")
    options = {"n_probes": 3, "calibration_positions": 40, "progress": False}
    convert(str(dense), str(folder / "converted"), trust_remote_code=True, **options)
    return dense, folder / "converted"


def greedy(model, ids, n_tokens=10):
    """Without a cache; one state alone goes through the head."""
    ids = list(ids)
    for _ in range(n_tokens):
        hidden = model.body(mx.array([ids]), None)[:, -1:]
        ids.append(mx.argmax(model.output(hidden)).item())
    return ids[-n_tokens:]


def test_generates(folders):
    dense, _ = load_plain(str(folders[0]), trust_remote_code=True)
    model, tokenizer = load(str(folders[1]), trust_remote_code=True)
    assert type(model).__module__ == "custom_model" != "mlx_lm"
    assert get_flash_head(model) is not None
    ids, options = tokenizer.encode("How do I bake bread"), {"max_tokens": 10}
    found = [response.token for response in stream_generate(model, tokenizer, ids, **options)]
    assert found == greedy(dense, ids) != greedy(model, ids)
