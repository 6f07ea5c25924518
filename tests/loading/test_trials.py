"""What takes long before the first token is said once."""

import pytest

from mlx_flashhead.loading import trials
from mlx_flashhead.models.compat.mlx_lm import make_prompt_cache
from mlx_flashhead.wide import trial
from mlx_flashhead.wide.step import NOTHING, WideSteps
from tiny_models import tiny_model


@pytest.fixture
def said():
    handlers = list(trial.log.handlers)
    level = trial.log.level
    lines = []
    trials.say_trials(lines.append)
    yield lines
    trial.log.handlers[:] = handlers
    trial.log.setLevel(level)


def test_the_first_trial_is_said(said, monkeypatch):
    monkeypatch.setattr(trial, "_tried", lambda *_: NOTHING)
    for _ in range(2):
        model = tiny_model()
        trial.established_costs(WideSteps.of(model), make_prompt_cache(model))
    assert said == [trials.SENTENCE]
