"""A stage that is left goes on from there, and ends as if it had not been left."""

from functools import partial

import numpy as np
import pytest

from mlx_flashhead.conversion import checkpoint, clusters, run_task
from mlx_flashhead.conversion.centroids import fit_centroids
from mlx_flashhead.conversion.checkpoint import Checkpoint
from mlx_flashhead.conversion.clusters import cluster_rows
from mlx_flashhead.conversion.measures import measure_positions


def ended(task_of, folder, n_parts):
    """The result of a task that is left after so many parts each time, and the times it was."""
    n_times = 0
    while True:
        n_times += 1
        kept = Checkpoint(folder)
        task = task_of(checkpoint=kept)
        try:
            # There are more each time, since not every part is kept.
            for _ in range(n_parts * n_times):
                next(task)
        except StopIteration as end:
            return end.value, n_times
        task.close()
        kept.write()


@pytest.fixture
def crowded(monkeypatch):
    """Rows whose shortlists are full, so that many of them get one of the open clusters."""
    for name in ("FIRST_PRICE_UPDATES", "LATER_PRICE_UPDATES"):
        monkeypatch.setattr(clusters, name, 1)
    monkeypatch.setattr(clusters, "BLOCK_ROWS", 64)
    rng = np.random.default_rng(0)
    rows = 0.01 * rng.standard_normal((1000, 16))
    rows[:400] += rng.standard_normal((400, 16))
    return rows.astype(np.float32)


@pytest.mark.parametrize("n_parts", [7, 20, 50])
def test_clusters(crowded, tmp_path, n_parts):
    metric = np.eye(16, dtype=np.float32)
    task_of = partial(cluster_rows, crowded, 4, metric=metric, passes=3)
    found, n_times = ended(task_of, tmp_path, n_parts)
    assert n_times > 1 and (found == run_task(task_of())).all()


class Killed(Checkpoint):
    """Its process is killed once it has written so many times."""

    n_left = 0

    def offer(self, *arguments):
        super().offer(*arguments)
        self.write()
        self.n_left -= 1
        if not self.n_left:
            raise KeyboardInterrupt


def test_clusters_of_a_build_that_was_killed(crowded, tmp_path):
    """After any writing, also at the end of a pass."""
    task_of = partial(cluster_rows, crowded, 4, metric=np.eye(16, dtype=np.float32), passes=2)
    expected = run_task(task_of())
    n_killed = 0
    for n_writings in range(1, 100):
        killed = Killed(tmp_path / str(n_writings))
        killed.n_left = n_writings
        try:
            run_task(task_of(checkpoint=killed), progress=False)
            break
        except KeyboardInterrupt:
            n_killed += 1
        kept = Checkpoint(tmp_path / str(n_writings))
        assert (run_task(task_of(checkpoint=kept), progress=False) == expected).all()
    assert n_killed > 10


def test_centroids_and_measures(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((1100, 32)).astype(np.float32)
    states = rng.standard_normal((300, 32)).astype(np.float32)
    token_ids = np.arange(1100, dtype=np.uint32).reshape(-1, 4)
    task_of = partial(fit_centroids, rows, token_ids, states)
    found, n_times = ended(task_of, tmp_path, 3)
    expected = run_task(task_of())
    assert n_times > 1
    assert (np.array(found.bias) == np.array(expected.bias)).all()
    task_of = partial(
        measure_positions,
        states,
        lambda hidden: hidden @ rows.T,
        token_ids,
        lambda hidden: hidden @ rows[::4].T,
        np.zeros(275, np.float32),
        [1, 5],
        np.arange(300),
    )
    found, n_times = ended(task_of, tmp_path, 3)
    assert n_times > 1 and (found.values == run_task(task_of()).values).all()


def test_only_what_has_the_same_source_and_is_whole_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    kept = Checkpoint(tmp_path / "new")
    kept.offer("stage", 7, lambda: {"a": np.arange(3)})
    assert (kept.read("stage", 7)["a"] == np.arange(3)).all()
    assert kept.read("stage", 8) == kept.read("another", 7) == {}
    (file,) = (tmp_path / "new").iterdir()
    whole = file.read_bytes()
    for content in (b"", b"PK\x03\x04", whole[:100], whole[:-30], whole[:200] + b"x" + whole[201:]):
        file.write_bytes(content)
        found = kept.read("stage", 7)
        assert not found or list(found["a"]) == [0, 1, 2]
