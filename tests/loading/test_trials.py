"""What takes long before the first token is said once."""

from mlx_flashhead.loading import trials
from mlx_flashhead.models.compat.mlx_lm import make_prompt_cache
from mlx_flashhead.wide import trial
from mlx_flashhead.wide.step import NOTHING, WideSteps
from tiny_models import tiny_model


def test_the_first_trial_of_a_block_is_said(monkeypatch):
    monkeypatch.setattr(trial, "_tried", lambda *_: NOTHING)
    said = []

    def tries():
        model = tiny_model()
        trial.established_costs(WideSteps.of(model), make_prompt_cache(model))

    with trials.trials_said(said.append):
        tries()
        tries()
    tries()
    assert said == [trials.SENTENCE]
