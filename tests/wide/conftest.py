"""Models whose wide steps are tried."""

import pytest

from architecture_models import quantized, tiny_architecture
from tiny_models import tiny_model

# windows, a state, experts, lists of caches, an attention with a formula for one token
NAMES = {
    "llama": False,
    "qwen3_5": False,
    "gpt_oss": False,
    "falcon_h1": False,
    "deepseek_v3": True,
}


@pytest.fixture(scope="module", params=NAMES)
def architecture(request):
    return quantized(tiny_architecture(request.param, tied=False)), NAMES[request.param]


@pytest.fixture(scope="module")
def model():
    return tiny_model()
