"""How long the rest of a build takes: by the pace of the stage at hand, and by what is expected."""

from mlx_flashhead.conversion import Progress
from mlx_flashhead.conversion.forecast import Forecaster


def test_the_pace_of_a_stage_counts_and_what_was_kept_does_not():
    forecaster = Forecaster({"reading": 100.0, "clustering": 10.0, "fitting": 5.0}, limit=100.0)
    assert forecaster.forecast == (0.0, 115.0)
    forecaster.note(Progress("reading", 20, 100), 4.0)
    # It reads 5 tokens a second.
    assert forecaster.forecast.seconds_left == 16 + 15
    forecaster.note(Progress("clustering", 50, 100, kept=True), 0.0)
    assert forecaster.forecast.seconds_left == 10 / 2 + 5
    forecaster.note(Progress("clustering", 10, 100), 3.0)
    assert forecaster.forecast.seconds_left == 30 * 0.4 + 5
    forecaster.note(Progress("another", 1, 2), 99.0)
    assert forecaster.forecast.seconds_left == 30 * 0.4 + 5
    forecaster.note(Progress("fitting", 100, 100), 1.0)
    assert forecaster.forecast == (1.0, 0.0)


def test_a_stage_ends_at_its_limit():
    forecaster = Forecaster({"reading": 100.0, "fitting": 10.0}, limit=100.0)
    forecaster.note(Progress("reading", 1, 1000), 25.0)
    assert forecaster.forecast.seconds_left == 75 + 10
