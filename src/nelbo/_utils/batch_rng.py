"""Parts of a batch: on several processes, or one after the other to save memory.

A batch in P parts is the same batch, and the loss curve the same: part p holds the rows p, p + P,
p + 2P, .., and whatever is random in them is what it is for these rows in the whole batch. Each
part draws for all rows and keeps its own, since there is one stream of random numbers and none for
each row. That costs next to nothing for the noise of the examples; the masks of dropout it makes
P times as dear, so networks without dropout scale best.
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
    """Rows of a batch, in increasing order; as a context, the part in which random numbers are
    drawn, see `shard_rng`.

    Args:
        rows: their places in the batch.
        batch: rows of the whole batch.
    """

    def __init__(self, rows: Tensor, batch: int) -> None:
        self.rows, self.batch = rows.contiguous(), batch
        self.before: list[Token[BatchShard | None]] = []

    @staticmethod
    def whole(batch: int) -> "BatchShard":
        return BatchShard(torch.arange(batch), batch)

    def __len__(self) -> int:
        return len(self.rows)

    def of(self, whole: Tensor) -> Tensor:
        """Of something of each row of the batch, that of the own rows."""
        return whole if len(self) == self.batch else whole[self.rows.to(whole.device)]

    def between(self, start: int, stop: int) -> tuple[slice, "BatchShard"]:
        """Which own rows are among the rows start..stop-1 of the batch, as a part of those."""
        first, last = torch.searchsorted(self.rows, torch.tensor([start, stop])).tolist()
        own = slice(first, last)
        return own, BatchShard(self.rows[own] - start, stop - start)

    def some(self, start: int, stop: int) -> tuple[slice, "BatchShard", int]:
        """As `between`, and how many; but where there are none, one row that counts for nothing.

        So all parts call a network equally often: other parts draw for it, or hold its weights.
        """
        own, within = self.between(start, stop)
        if len(within):
            return own, within, len(within)
        return slice(0, 1), BatchShard(torch.zeros(1, dtype=torch.long), stop - start), 0

    def among(self, chosen: Tensor) -> "BatchShard":
        """The own rows among the chosen ones, True in a mask (batch,), as a part of those."""
        chosen = chosen.cpu()
        places = chosen.cumsum(0) - 1
        return BatchShard(places[self.rows][chosen[self.rows]], int(chosen.sum()))

    def __enter__(self) -> "BatchShard":
        self.before.append(_current.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self.before.pop())


def current(rows: int) -> BatchShard:
    """The part that `rows` rows at hand are; the whole batch where nobody said."""
    return _current.get() or BatchShard.whole(rows)


def shard_rng() -> AbstractContextManager[object]:
    """What is random inside is drawn for the whole batch; the own rows of it are what one gets."""
    part = _current.get()
    return nullcontext() if part is None or len(part) == part.batch else _OwnRows(part)


def again() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Around what is computed now, and once more later, in another thread: the same part."""
    return nullcontext(), _current.get() or nullcontext()


class _OwnRows(TorchDispatchMode):
    """Widens each random operation from the own rows to the batch, and takes them out again."""

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
        if not isinstance(first, Tensor):  # the size of what is drawn
            size = [self._widened(first[0]), *first[1:]]
            return self._own(func(size, *others, **kwargs))
        wide = tree_map_only(Tensor, self._wide, args)
        drawn = tree_map_only(Tensor, self._own, func(*wide, **kwargs))
        return first.copy_(drawn) if func._schema.is_mutable else drawn

    def _widened(self, rows: int) -> int:
        """As many of each row of the batch; a tensor can have several rows of each example."""
        if rows % len(self.part):
            raise RuntimeError(f"{rows} random numbers belong to no {len(self.part)} examples")
        return rows // len(self.part) * self.part.batch

    def _wide(self, own: Tensor) -> Tensor:
        """A tensor for the whole batch: the own rows in their places, else one of them."""
        size = self._widened(len(own)), *own.shape[1:]
        # a fill goes through the memory: channels may come last there
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
        """The own rows of a tensor of the whole batch."""
        places = self.part.rows.to(wide.device)
        return self._by_example(wide, self.part.batch)[places].flatten(0, 1)

    @staticmethod
    def _by_example(rows: Tensor, examples: int) -> Tensor:
        return rows.unflatten(0, (examples, -1))


def local_shard(batch: int) -> BatchShard:
    """The part of this process, of as many as there are; all of it where it is too small."""
    rank, size = world()
    return (
        BatchShard(torch.arange(batch)[rank::size], batch)
        if batch >= size
        else BatchShard.whole(batch)
    )


def gather_rows(part: BatchShard, own: Tensor) -> Tensor:
    """What the processes found for the rows of their parts, for the whole batch."""
    if len(part) == part.batch:
        return own
    whole = own.new_empty(part.batch, *own.shape[1:])
    for rows, found in gather((part.rows, own.cpu())):
        whole[rows.to(own.device)] = found.to(own.device)
    return whole
