"""Several processes under ``mlx.launch``: one prints, and all draw the same tokens."""

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import cast

import mlx.core as mx


def join_processes() -> mx.distributed.Group:
    """The group of all launched processes; a group of one without ``mlx.launch``.

    Raises:
        ValueError: If they do not find each other.
    """
    try:
        return mx.distributed.init()
    except RuntimeError as error:
        raise ValueError(
            f"The processes cannot be joined ({error}): check the hosts and ports of mlx.launch."
        ) from error


@contextmanager
def first_process_speaks(
    processes: mx.distributed.Group, *, errors: bool = False
) -> Iterator[None]:
    """Within the block, only the first process prints.

    ``errors`` silences standard error too. Otherwise another process prints its errors there, since
    it may be the only one that fails.

    Raises:
        ValueError: In place of a ValueError or an OSError of another process, naming it.
    """
    rank = processes.rank()
    if rank == 0:
        yield
        return
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(nowhere))
        if errors:
            stack.enter_context(redirect_stderr(nowhere))
        try:
            yield
        except (ValueError, OSError) as error:
            raise ValueError(f"process {rank}: {error}") from error


def draw_alike(processes: mx.distributed.Group, seed: int | None) -> None:
    """Seeds all processes alike, since each samples every token by itself and all must agree.

    Without a ``seed`` the first process chooses one.
    """
    if seed is None:
        chosen = mx.array(secrets.randbits(31) if processes.rank() == 0 else 0)
        chosen = mx.distributed.all_sum(chosen, group=processes, stream=mx.cpu)
        seed = cast(int, chosen.item())
    mx.random.seed(seed)


def leave_together(processes: mx.distributed.Group, stream) -> None:
    """Waits for all processes: mlx-lm computes a token ahead, for which each needs the others."""
    if processes.size() > 1:
        mx.synchronize(stream)
        mx.eval(mx.distributed.all_sum(mx.array(1), group=processes, stream=mx.cpu))
