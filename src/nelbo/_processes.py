"""One command on several processes: who this one is, and what all of them found.

`torchrun --nproc_per_node N -m nelbo ...` starts them; alone, a process is rank 0 of 1.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(mine: T) -> list[T]:
    """What each process found, in the order of their ranks, on all of them."""
    import torch.distributed as dist

    _, size = world()
    if size == 1:
        return [mine]
    found = [mine] * size  # each is replaced
    dist.all_gather_object(found, mine)
    return found


@contextmanager
def together() -> Iterator[int]:
    """Joins the processes that torchrun started, if it did; yields the rank of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
