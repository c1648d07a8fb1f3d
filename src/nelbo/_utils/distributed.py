"""One command on several processes: who this one is, and what all of them found.

`torchrun --nproc_per_node N -m nelbo ...` starts them; alone, a process is rank 0 of 1.
A process that dies closes its connections, and one that hangs is waited for so many seconds; then
all others end with a sentence that says so.
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
TIMEOUT = "NELBO_TIMEOUT"  # seconds; names a variable of the environment
PATIENCE = 600.0
LETTING_GO = 0.1  # seconds in which gloo's threads can get Python's lock and free a last tensor

_alone: ContextVar[bool] = ContextVar("alone", default=False)


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    import torch.distributed as dist

    if _alone.get():
        return 0, 1
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def no_communication() -> Iterator[None]:
    """Every process does all of the work, at the same pace as the others, and shares none."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def gather(mine: T) -> list[T]:
    """What each process found, in the order of their ranks, on all of them."""
    import torch.distributed as dist

    _, size = world()
    if size == 1:
        return [mine]
    found = [mine] * size  # each is replaced
    with _all_are_there():
        dist.all_gather_object(found, mine)
    return found


def map_across_processes(
    count: int,
    work: Callable[[int], T],
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[T]:
    """work(0), .., work(count - 1), each done by one of the processes; all get them all.

    `track` wraps those of this process, for a progress bar.
    """
    rank, size = world()
    mine = {i: work(i) for i in track(range(rank, count, size))}
    found = {i: done for some in gather(mine) for i, done in some.items()}
    return [found[i] for i in range(count)]


def add(*mine: "Tensor") -> None:
    """The sums of what all processes hold, put in their places on each; all wait but once."""
    import torch.distributed as dist

    if world()[1] > 1:
        with _all_are_there():
            for message in [dist.all_reduce(each, async_op=True) for each in mine]:
                message.wait()


def anywhere(mine: bool) -> bool:
    """Whether it is so on any process; they find it out together."""
    import torch

    if world()[1] == 1:
        return mine
    count = torch.tensor(int(mine))
    add(count)
    return bool(count)


def main_process_first(work: Callable[[], T]) -> T:
    """What rank 0 makes of it, alone, while the others wait; all get it. If it fails, all end."""
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
    """Joins the processes that torchrun started, if it did; yields the rank of this one.

    Raises:
        ConnectionError: another process ended or did not answer.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    import torch
    import torch.distributed as dist
    import torch.distributed.nn  # later it would keep the group, and gloo's threads abort the exit

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    with _all_are_there():
        dist.init_process_group(backend, timeout=timedelta(seconds=_patience()))
    try:
        with _all_are_there(dist.DistError):  # a sharded network asks for the others by itself
            yield dist.get_rank()
    finally:
        dist.destroy_process_group()
        # where a cache of DTensor's holds the group, nobody waits for its threads but here
        time.sleep(LETTING_GO)


def check_alone(what: str) -> None:
    """ValueError where torchrun started several processes for what they cannot share."""
    if (size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"{what} is work for one process, not for {size}; start it by itself")


def _patience() -> float:
    given = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(given or PATIENCE)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise ValueError(f"{TIMEOUT} must be positive seconds, such as 600; got {given!r}")
    return seconds


@contextmanager
def _all_are_there(kind: type[RuntimeError] = RuntimeError) -> Iterator[None]:
    """Around what needs every process; torch's own errors here name lines of its source.

    Around other work too, they have to be told from its errors: by their kind, or by gloo's name.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, kind) and "gloo" not in str(error):
            raise
        raise ConnectionError(
            f"process {os.environ.get('RANK', '?')} of {os.environ.get('WORLD_SIZE', '?')}:"
            f" another one ended or did not answer for {_patience():g} seconds ({TIMEOUT} sets"
            f" how long to wait); see what it said, then continue with --resume"
        ) from error
