"""Shards of a batch: on several processes, or one after the other to save memory.

Training on P shards gives the same loss curve as on the whole batch: shard p holds the rows p,
p + P, p + 2P, .., and the random numbers of these rows are those that they have in the whole
batch. As there is one stream of random numbers and not one for each row, each shard draws for all
rows of the batch and keeps the numbers of its rows. This costs next to nothing for the noise of
the examples, but dropout masks cost P times as much, so networks without dropout scale best.
"""

from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from nelbo._utils.distributed import gather, world

_current: ContextVar["BatchShard | None"] = ContextVar("part", default=None)


class BatchShard:
    """Some rows of a batch, in increasing order.

    As a context manager it is the shard for which `shard_rng` draws random numbers.

    Args:
        rows: their indices in the batch.
        batch: number of rows of the whole batch.
    """

    def __init__(self, rows: Tensor, batch: int) -> None:
        self.rows, self.batch = rows.contiguous(), batch
        self.before: list[Token[BatchShard | None]] = []

    @staticmethod
    def whole(batch: int) -> "BatchShard":
        """Return the shard of all rows."""
        return BatchShard(torch.arange(batch), batch)

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, whole: Tensor) -> Tensor:
        """Select the shard's rows of a tensor with one row for each row of the batch."""
        return whole if len(self) == self.batch else whole[self.rows.to(whole.device)]

    def between(self, start: int, stop: int) -> tuple[slice, "BatchShard"]:
        """Return the shard's rows among the rows start..stop-1 of the batch.

        Returns:
            A slice of the shard's rows, and these rows as a shard of start..stop-1.
        """
        first, last = torch.searchsorted(self.rows, torch.tensor([start, stop])).tolist()
        own = slice(first, last)
        return own, BatchShard(self.rows[own] - start, stop - start)

    def some(self, start: int, stop: int) -> tuple[slice, "BatchShard", int]:
        """Return the result of `between` and the number of rows, but at least a dummy row.

        Where the shard has none of the rows, slice and shard hold one row and the number is 0. So
        all shards call a network equally often, as they must where others hold its weights.
        """
        own, within = self.between(start, stop)
        if len(within):
            return own, within, len(within)
        return slice(0, 1), BatchShard(torch.zeros(1, dtype=torch.long), stop - start), 0

    def among(self, chosen: Tensor) -> "BatchShard":
        """Return the shard's rows among those True in a mask, (batch,), as a shard of these."""
        chosen = chosen.cpu()
        places = chosen.cumsum(0) - 1
        return BatchShard(places[self.rows][chosen[self.rows]], int(chosen.sum()))

    def __enter__(self) -> "BatchShard":
        self.before.append(_current.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self.before.pop())


def current(rows: int) -> BatchShard:
    """Return the shard of the context; where there is none, a whole batch of `rows` rows."""
    return _current.get() or BatchShard.whole(rows)


def shard_rng() -> AbstractContextManager[object]:
    """Inside, draw random numbers for the whole batch and return those of the current shard."""
    part = _current.get()
    return nullcontext() if part is None or len(part) == part.batch else _OwnRows(part)


def again() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Return contexts for a computation and its repetition in another thread: the same shard.

    For `context_fn` of `torch.utils.checkpoint.checkpoint`.
    """
    return nullcontext(), _current.get() or nullcontext()


class _OwnRows(TorchDispatchMode):
    """Widens each random operation from a shard to the batch, and selects the shard's rows."""

    def __init__(self, part: BatchShard) -> None:
        super().__init__()
        self.part = part

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - as torch has it
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator"):
            return func(*args, **kwargs)
        first, *others = args
        if not isinstance(first, Tensor):  # the size of the draw
            size = [self._widened(first[0]), *first[1:]]
            return self._own(func(size, *others, **kwargs))
        wide = tree_map_only(Tensor, self._wide, args)
        drawn = tree_map_only(Tensor, self._own, func(*wide, **kwargs))
        return first.copy_(drawn) if func._schema.is_mutable else drawn

    def _widened(self, rows: int) -> int:
        """Return the rows of a tensor for the batch; a tensor may have several per example."""
        if rows % len(self.part):
            raise RuntimeError(f"{rows} random numbers belong to no {len(self.part)} examples")
        return rows // len(self.part) * self.part.batch

    def _wide(self, own: Tensor) -> Tensor:
        """Return a tensor for the whole batch, with the shard's rows in place, else the first."""
        size = self._widened(len(own)), *own.shape[1:]
        # random fills follow the layout in memory, in which channels may come last
        order = sorted(range(own.ndim), key=own.stride, reverse=True)
        wide = own.new_zeros([size[d] for d in order]).permute(
            [order.index(d) for d in range(own.ndim)]
        )
        places = self.part.rows.to(own.device)
        rows, own = self._by_example(wide, self.part.batch), self._by_example(own, len(self.part))
        rows[:] = own[:1]
        rows[places] = own
        return wide

    def _own(self, wide: Tensor) -> Tensor:
        """Select the shard's rows of a tensor of the whole batch."""
        places = self.part.rows.to(wide.device)
        return self._by_example(wide, self.part.batch)[places].flatten(0, 1)

    @staticmethod
    def _by_example(rows: Tensor, examples: int) -> Tensor:
        return rows.unflatten(0, (examples, -1))


def local_shard(batch: int) -> BatchShard:
    """Return the shard of this process; the whole batch if it has fewer rows than processes."""
    rank, size = world()
    return (
        BatchShard(torch.arange(batch)[rank::size], batch)
        if batch >= size
        else BatchShard.whole(batch)
    )


def gather_rows(part: BatchShard, own: Tensor) -> Tensor:
    """Assemble the rows of the whole batch from the shards of all processes."""
    if len(part) == part.batch:
        return own
    whole = own.new_empty(part.batch, *own.shape[1:])
    for rows, found in gather((part.rows, own.cpu())):
        whole[rows.to(own.device)] = found.to(own.device)
    return whole
