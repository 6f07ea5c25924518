"""Another loop takes wide steps, as the room's docstring shows: with mlx-lm's own pieces alone."""

import re
import textwrap

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from architecture_models import quantized, tiny_architecture
from mlx_flashhead import wide
from mlx_flashhead.wide.step import WideSteps

PROMPT = [5, 17, 3, 40, 8, 61]
N_TOKENS = 40


def loop():
    """The docstring's ``generate``."""
    (code,) = re.findall(r"\n(    from .*?return text\n)", wide.__doc__, flags=re.DOTALL)
    names = {"mx": mx, "make_prompt_cache": make_prompt_cache}
    # The code is this package's own.
    exec(textwrap.dedent(code), names)
    return names["generate"]


@pytest.mark.parametrize("share", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("name", ["llama", "qwen3_5", "gemma3_text", "falcon_h1", "deepseek_v3"])
def test_a_loop_of_mlx_lms_pieces(name, share, monkeypatch):
    """A text beyond windows, of whose guesses some are right, or all, or none."""
    model = quantized(tiny_architecture(name, tied=False))
    plain = generate_step(mx.array(PROMPT), model, max_tokens=N_TOKENS)
    expected = [token for token, _ in plain]
    random = np.random.default_rng(0)
    n_fed = []
    feed = WideSteps.feed

    def counted(steps, tokens, caches):
        n_fed.append(tokens.shape[1])
        return feed(steps, tokens, caches)

    monkeypatch.setattr(WideSteps, "feed", counted)

    def maybe_right(token):
        if random.random() < share:
            return token
        return 99 - token % 50

    def guess(text):
        following = expected[len(text) : len(text) + 7]
        return [maybe_right(token) for token in following]

    assert loop()(model, PROMPT, guess, N_TOKENS)[:N_TOKENS] == expected
    assert len(n_fed) >= N_TOKENS / 8
    assert (len(n_fed) <= N_TOKENS / 4) == (share == 1.0)
