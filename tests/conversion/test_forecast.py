"""How long the rest of a build takes: by the pace of the stage at hand, and by what is expected."""

from mlx_flashhead.conversion import Progress
from mlx_flashhead.conversion.forecast import Pace


def test_the_pace_of_a_stage_counts_and_what_was_kept_does_not():
    pace = Pace({"reading": 100.0, "clustering": 10.0, "fitting": 5.0}, limit=100.0)
    assert pace.forecast == (0.0, 115.0)
    pace.note(Progress("reading", 20, 100, "token"), 4.0)
    # It reads 5 tokens a second.
    assert pace.forecast.seconds_left == 16 + 15
    pace.note(Progress("clustering", 50, 100, "row", kept=True), 0.0)
    assert pace.forecast.seconds_left == 10 / 2 + 5
    pace.note(Progress("clustering", 10, 100, "row"), 3.0)
    assert pace.forecast.seconds_left == 30 * 0.4 + 5
    pace.note(Progress("another", 1, 2, "row"), 99.0)
    assert pace.forecast.seconds_left == 30 * 0.4 + 5
    pace.note(Progress("fitting", 100, 100, "cluster"), 1.0)
    assert pace.forecast == (1.0, 0.0)


def test_a_stage_ends_at_its_limit():
    pace = Pace({"reading": 100.0, "fitting": 10.0}, limit=100.0)
    pace.note(Progress("reading", 1, 1000, "token"), 25.0)
    assert pace.forecast.seconds_left == 75 + 10
