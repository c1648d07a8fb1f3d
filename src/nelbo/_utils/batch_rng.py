"""Shards of a batch: on several processes, or one after the other to save memory.

Training on P shards gives the same loss curve as on the whole batch: shard p holds the rows p,
p + P, p + 2P, .., and the random numbers of these rows are those that they have in the whole
batch. As there is one stream of random numbers and not one for each row, each shard draws for all
rows of the batch and keeps the numbers of its rows. This costs next to nothing for the noise of
the examples, but dropout masks cost P times as much, so networks without dropout scale best.

Within `drawn_by_rows` each row has a stream of its own instead, so that its numbers depend on no
other row.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.distributed import gather, world

_current: ContextVar["BatchShard | None"] = ContextVar("part", default=None)
_streams: ContextVar["list[np.random.Generator] | None"] = ContextVar("streams", default=None)


class BatchShard:
    """Some rows of a batch, in increasing order.

    As a context manager it tells layers that draw noise themselves, such as dropout, of which
    shard the rows of a network call are: see `current`.

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


def again() -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Return contexts for a computation and its repetition in another thread: the same shard.

    For `context_fn` of `torch.utils.checkpoint.checkpoint`.
    """
    return nullcontext(), _current.get() or nullcontext()


def rand(
    shape: Sequence[int],
    shard: BatchShard | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Draw uniform noise in [0, 1) as `torch.rand` does; for a shard, its rows of the batch.

    `shape` and `shard` are as for `own_rows`.
    """
    if (streams := _streams.get()) is not None:
        return _each(streams, lambda stream, own: stream.random(own), shape).to(device, dtype)
    return own_rows(lambda wide: torch.rand(wide, dtype=dtype, device=device), shape, shard)


def randn(shape: Sequence[int], shard: BatchShard | None, like: Tensor) -> Tensor:
    """Draw standard normal noise with the dtype and the device of `like`; otherwise as `rand`."""
    if (streams := _streams.get()) is not None:
        return _each(streams, lambda stream, own: stream.standard_normal(own), shape).to(like)
    return own_rows(
        lambda wide: torch.randn(wide, dtype=like.dtype, device=like.device), shape, shard
    )


def row_streams(x: Tensor, seed: int) -> list[np.random.Generator]:
    """Return a stream of random numbers for each row of x, (B, ...), from its values and a seed.

    Equal rows have equal streams; -0.0 is 0.0.
    """
    streams = []
    for row in (x + 0).cpu().numpy():
        key = hashlib.blake2b(row.tobytes(), digest_size=16, key=seed.to_bytes(8, "little"))
        number = int.from_bytes(key.digest(), "little")
        streams.append(np.random.Generator(np.random.Philox(key=number)))
    return streams


@contextmanager
def drawn_by_rows(streams: "list[np.random.Generator] | None") -> Iterator[None]:
    """Inside, draw the numbers of each row of a batch from the stream of this row.

    Args:
        streams: one for each row, from `row_streams`; None for the one stream of all rows.
    """
    before = _streams.set(streams)
    try:
        yield
    finally:
        _streams.reset(before)


def _each(
    streams: "list[np.random.Generator]",
    fill: Callable[[np.random.Generator, Sequence[int]], np.ndarray],
    shape: Sequence[int],
) -> Tensor:
    """Return noise of a shape whose first size is a multiple of the number of rows, float64."""
    each = _per_row(shape[0], len(streams))
    return torch.from_numpy(np.concatenate([fill(one, (each, *shape[1:])) for one in streams]))


def _per_row(numbers: int, rows: int) -> int:
    each, rest = divmod(numbers, rows)
    if rest:
        raise RuntimeError(f"{numbers} random numbers cannot be divided among {rows} examples")
    return each


def own_rows(
    fill: Callable[[Sequence[int]], Tensor], shape: Sequence[int], shard: BatchShard | None
) -> Tensor:
    """Fill a tensor for the whole batch, and return the rows of the shard.

    Args:
        fill: draws noise of a shape.
        shape: of the result; its first size is that of the shard, or a multiple where each
            example has several rows.
        shard: the rows; the whole batch where left out.

    Raises:
        RuntimeError: if the first size is not a multiple of that of the shard.
    """
    if shard is None or len(shard) == shard.batch:
        return fill(shape)
    each = _per_row(shape[0], len(shard))
    wide = fill((shard.batch * each, *shape[1:])).unflatten(0, (shard.batch, each))
    return wide[shard.rows.to(wide.device)].flatten(0, 1)


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
