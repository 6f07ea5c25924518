"""A server on an Apple GPU: two clients before, while and after its FlashHead is built."""

import time

import mlx_lm
import pytest

from engines import flags, submit, tokens_of
from kernel_cases import on_gpu
from mlx_flashhead.decoding.measuring import rehearsal
from mlx_flashhead.serving.engine import Engine
from mlx_flashhead.serving.served_models import load_models

# As of test_mac_batches.py: texts together have the bits of each alone.
pytestmark = [pytest.mark.newest, pytest.mark.parametrize("gpu", ["M1"], indirect=True)]
PROMPTS = ([40, 41, 42], [50, 51, 52, 53])
N_TOKENS = 6


@pytest.mark.skipif(on_gpu(), reason="later GPUs round texts together otherwise")
def test_two_clients_before_while_and_after_a_build(gpu, folder, quick, monkeypatch, caplog):
    monkeypatch.setattr(rehearsal, "CLASSES", (1, 2))
    loaded = mlx_lm.load(str(folder))
    expected = [
        [r.token for r in mlx_lm.stream_generate(*loaded, prompt, max_tokens=N_TOKENS)]
        for prompt in PROMPTS
    ]
    arguments = flags("--model", folder, "--flash-head-always")
    engine = Engine(lambda: load_models(arguments), arguments)
    (served,) = engine.models.result(60)

    def answers():
        jobs = [submit(engine, prompt, N_TOKENS) for prompt in PROMPTS]
        return [tokens_of(job) for job in jobs]

    seen = []
    while served.build is not None:
        assert answers() == expected
        seen.append(served.decoding())
        # The build goes on meanwhile.
        time.sleep(0.3)
    assert "dense: its FlashHead is being built" in seen and served.decoding() == "verified"
    assert answers() == expected
    assert engine.close(60) and engine.status == "shutting down"
    # A turn that fails is taken again, alone, so that only the log knows.
    assert "Traceback" not in caplog.text and "failed" not in caplog.text
