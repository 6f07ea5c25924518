"""A FlashHead that the generating thread builds beside its answers."""

from functools import partial
from pathlib import Path

import mlx_lm
import pytest

from engines import SHORT, generated, submit, tokens_of
from mlx_flashhead.conversion.options import IndexOptions
from mlx_flashhead.loading import background as build
from mlx_flashhead.loading.background import background_build
from mlx_flashhead.loading.sources import HeadOptions
from mlx_flashhead.lossless.policy import policy_of
from mlx_flashhead.serving.engine import Engine
from mlx_flashhead.serving.served_models import ServedModel
from served_models import flags


@pytest.mark.parametrize("together", [1, 3])
def test_answers_before_at_and_after_the_swap_are_the_dense_models(
    random_model, flash_head_home, monkeypatch, together
):
    monkeypatch.setattr(build, "IndexOptions", partial(IndexOptions, calibration_positions=100))
    model, tokenizer = mlx_lm.load(str(random_model / "dense"))
    expected = generated((model, tokenizer), SHORT, 30)
    options = HeadOptions(progress=False)
    served = ServedModel(("tiny",), model, tokenizer, None, 512)
    served.build = background_build(model, tokenizer, Path("tiny"), options)
    engine = Engine(lambda: [served], flags())
    seen = {engine.models.result(60)[0].decoding()}
    while served.build is not None:
        jobs = [submit(engine, SHORT, 30) for _ in range(together)]
        assert [tokens_of(job) for job in jobs] == [expected] * together
        seen.add(served.decoding())
    assert "dense: FlashHead is being built" in seen and served.decoding() == "verified"
    assert tokens_of(submit(engine, SHORT, 30)) == expected
    assert engine.close(20)


def test_what_is_said_is_what_decodes(tiny, monkeypatch):
    policy = policy_of(tiny.head)
    monkeypatch.setattr(policy, "dense", True)
    assert tiny.decoding() == "dense: FlashHead is no faster on this machine"
    assert tiny.decoding(dense=True) == "dense: as requested"
    assert tiny.decoding(n_probes=2) == "verified"
    monkeypatch.setattr(policy, "drafts_only", True)
    assert tiny.decoding(n_probes=2) == "dense: its FlashHead only drafts"
    monkeypatch.setattr(policy, "drafts_only", False)
    monkeypatch.setattr(tiny, "max_wait", 0)
    assert tiny.decoding(n_probes=2) == "dense: --max-wait is 0"
    monkeypatch.setattr(tiny, "dense", True)
    assert tiny.decoding() == "dense: as requested"
