"""One command on several processes: ranks, and the exchange of results.

`torchrun --nproc_per_node N -m nelbo ...` starts them; a single process is rank 0 of 1. When a
process dies, or hangs for NELBO_TIMEOUT seconds, all others end with a sentence that says so.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
TIMEOUT = "NELBO_TIMEOUT"  # environment variable, in seconds
PATIENCE = 600.0  # its default, in seconds
LETTING_GO = 0.1  # seconds for gloo's threads to get Python's lock and free a last tensor

_alone: ContextVar[bool] = ContextVar("alone", default=False)


def world() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    import torch.distributed as dist

    if _alone.get():
        return 0, 1
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def no_communication() -> Iterator[None]:
    """Inside, act as a single process: each does all the work, at the same pace as the others."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def gather(mine: T) -> list[T]:
    """Return the objects of all processes, in the order of their ranks, on every process."""
    import torch.distributed as dist

    _, size = world()
    if size == 1:
        return [mine]
    found = [mine] * size  # placeholders
    with _all_are_there():
        dist.all_gather_object(found, mine)
    return found


def map_across_processes(
    count: int,
    work: Callable[[int], T],
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[T]:
    """Return work(0), .., work(count - 1), each computed on one process, on every process.

    Args:
        count: number of results.
        work: computes a result from its index.
        track: wraps the indices of this process, for a progress bar.
    """
    rank, size = world()
    mine = {i: work(i) for i in track(range(rank, count, size))}
    found = {i: done for some in gather(mine) for i, done in some.items()}
    return [found[i] for i in range(count)]


def add(*mine: "Tensor") -> None:
    """Replace each tensor by its sum over all processes, in one exchange."""
    import torch.distributed as dist

    if world()[1] > 1:
        with _all_are_there():
            for message in [dist.all_reduce(each, async_op=True) for each in mine]:
                message.wait()


def anywhere(mine: bool) -> bool:
    """Return whether `mine` is true on any process; all processes must call this."""
    import torch

    if world()[1] == 1:
        return mine
    count = torch.tensor(int(mine))
    add(count)
    return bool(count)


def main_process_first(work: Callable[[], T]) -> T:
    """Return work() of rank 0, on every process; the others wait. If it fails, all end."""
    rank, size = world()
    if size == 1:
        return work()
    made: list[T] = []
    try:
        if rank == 0:
            made.append(work())
    finally:
        found = gather(made)
    if not found[0]:
        sys.exit(2)  # rank 0 says why
    return found[0][0]


@contextmanager
def process_group() -> Iterator[int]:
    """Inside, be connected to the other processes of torchrun, if any; yield the rank.

    Raises:
        ConnectionError: if another process ended or did not answer.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    import torch
    import torch.distributed as dist
    import torch.distributed.nn  # imported later, it would keep the group, and gloo abort the exit

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    with _all_are_there():
        dist.init_process_group(backend, timeout=timedelta(seconds=_patience()))
    try:
        with _all_are_there(dist.DistError):  # a sharded network communicates by itself
            yield dist.get_rank()
    finally:
        dist.destroy_process_group()
        # where a cache of DTensor holds the group, only this waits for the group's threads
        time.sleep(LETTING_GO)


def check_alone(what: str) -> None:
    """Raise a ValueError if torchrun started several processes for work that is not shared.

    Args:
        what: name of the work, for the message.
    """
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"{what} runs in one process, not in {size}; start it without torchrun")


def _patience() -> float:
    given = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(given or PATIENCE)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(
            f"{TIMEOUT} must be a positive number of seconds, such as 600; got {given!r}"
        )
    return seconds


@contextmanager
def _all_are_there(kind: type[RuntimeError] = RuntimeError) -> Iterator[None]:
    """Turn errors of communication, in which torch names lines of its source, into a sentence.

    Args:
        kind: class of these errors; other RuntimeErrors count only if they name gloo.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, kind) and "gloo" not in str(error):
            raise
        raise ConnectionError(
            f"process {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')}:"
            f" another one ended or did not answer for {_patience():g} seconds ({TIMEOUT} sets"
            f" how long to wait); see its output, then continue with --resume"
        ) from error
