"""Rows of tables that need not fit in memory: they are read one block at a time.

A split is computed by arithmetic (`Share`), and the order of training follows from the seed and
the step alone (`training.batching.batch_indices`), so memory does not grow with the rows and a
stopped run continues where it was.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from nelbo._utils.numerics import derive_seed
from nelbo.data.columns import Column, places
from nelbo.data.rows import WINDOW, Rows
from nelbo.data.splits import SALT
from nelbo.data.tabular import encoding
from nelbo.data.tabular.merging import complete_columns, infer_merged
from nelbo.data.tabular.table import Table

BLOCK = 2**15  # numbers in a block of examples
GOLDEN, MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True)
class Share:
    """Some of the rows first..first+count-1, in order.

    `drawn` of every ten rows go to other splits, by the seed, and the others are the rest. An
    incomplete ten at the end belongs to the rest.

    Args:
        first: first row.
        count: number of rows.
        drawn: 0, 1 or 2.
        which: which of the drawn rows; None for the rest.
        seed: seed of the draw.
    """

    first: int
    count: int
    drawn: int = 0
    which: int | None = None
    seed: int = 0

    def __len__(self) -> int:
        tens = self.count // 10
        return self.count - tens * self.drawn if self.which is None else tens

    def rows(self, k: np.ndarray) -> np.ndarray:
        """Return the row numbers of the k-th rows of this share, increasing in k."""
        k = k.astype(np.int64)
        of_ten, tens = 10 - self.drawn, self.count // 10
        if self.which is not None:
            return self.first + 10 * k + self._places(k)[self.which]
        if not self.drawn:
            return self.first + k
        ten, place = np.divmod(k, of_ten)
        for taken in np.sort(self._places(ten)[: self.drawn], axis=0):
            place = place + (place >= taken)
        last = self.first + 10 * tens + (k - of_ten * tens)
        return np.where(k < of_ten * tens, self.first + 10 * ten + place, last)

    def _places(self, ten: np.ndarray) -> np.ndarray:
        """Return the places drawn in each ten, (2, len(ten)), distinct."""
        one = _hash(ten, self.seed, 0) % np.uint64(10)
        two = (one + np.uint64(1) + _hash(ten, self.seed, 1) % np.uint64(9)) % np.uint64(10)
        return np.stack([one, two]).astype(np.int64)


def _hash(k: np.ndarray, *seeds: int) -> np.ndarray:
    """Return pseudo-random bits, uint64, the same on every machine (splitmix64)."""
    x = k.astype(np.uint64) * np.uint64(GOLDEN) + np.uint64(derive_seed(SALT, *seeds))
    for shift, factor in zip((30, 27), MIX, strict=True):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


class TableRows(Rows):
    """Rows of a table as examples, read in blocks; the last blocks used are kept.

    Args:
        table: the table.
        columns: the columns to encode.
        share: the rows.
        rounding: as for `encoding.encode`.
    """

    def __init__(
        self, table: Table, columns: Sequence[Column], share: Share, rounding: bool = False
    ) -> None:
        width = len(places(columns))
        super().__init__((len(share), width), np.dtype(np.float64))
        self.table, self.columns, self.share = table.fork(), tuple(columns), share
        self.rounding = rounding
        self.per_block = self.block = max(1, BLOCK // width)
        self.sequential = table.sequential
        self.known: OrderedDict[int, Tensor] = OrderedDict()
        self.coming = 0  # the block after the last one read
        self.lock = threading.Lock()
        self.unseen, self.counted = encoding.Unseen(), np.zeros(-(-len(self) // self.block), bool)

    @override
    def read(self, rows: np.ndarray) -> Tensor:
        x = torch.empty((len(rows), *self.shape[1:]), dtype=torch.float64)
        block, place = np.divmod(rows, self.per_block)
        for b in np.unique(block).tolist():
            here = block == b
            x[torch.from_numpy(here)] = self._block(b)[torch.from_numpy(place[here])]
        return x

    @override
    def chunks(self) -> Iterator[Tensor]:
        return self.split(self.per_block)

    @override
    def warm(self, rows: np.ndarray) -> None:
        for b in np.unique(rows // self.per_block).tolist():
            self._block(b)

    @override
    def few(self, count: int) -> Tensor:
        """Return examples from blocks spread over the table, or the first ones of a stream."""
        blocks = np.arange(-(-len(self) // self.per_block))
        if not self.sequential:
            blocks = blocks[:: max(1, len(blocks) // WINDOW)][:WINDOW]
        each = max(1, count // len(blocks)) if not self.sequential else count
        rows = (blocks[:, None] * self.per_block + np.arange(min(each, self.per_block))).flatten()
        return self.read(rows[rows < len(self)][:count])

    @override
    def notes(self) -> list[str]:
        return self.unseen.notes()

    @override
    def fingerprint(self) -> bytes | None:
        content = self.table.identity()
        return content and repr((self.share, self.columns)).encode() + content

    @override
    def take(self, rows: np.ndarray) -> "TableRows":
        raise NotImplementedError("rows of a table are split by Share")

    @override
    def join(self, others: Sequence["TableRows"]) -> "TableRows":
        raise NotImplementedError("rows of a table are split by Share")

    def _block(self, b: int) -> Tensor:
        with self.lock:
            if b in self.known:
                self.known.move_to_end(b)
                return self.known[b]
            return self._load(b)

    def _load(self, b: int) -> Tensor:
        ahead = b - self.coming
        first = b
        if self.sequential and ahead:
            # earlier blocks of the window will be needed, and a stream cannot go back
            first = self.coming if 0 < ahead < 2 * WINDOW else b - b % WINDOW
        for each in range(first, b + 1):
            self._keep(each)
        self.coming = b + 1
        return self.known[b]

    def _keep(self, b: int) -> None:
        low, high = b * self.per_block, min((b + 1) * self.per_block, len(self))
        rows = self.share.rows(np.arange(low, high))
        begin, end = int(rows[0]), int(rows[-1]) + 1
        frame = self.table.read(begin, end, [column.name for column in self.columns])
        unseen = encoding.Unseen() if self.counted[b] else self.unseen
        self.counted[b] = True
        name, rounding = self.table.name, self.rounding
        x, _ = encoding.encode(frame, self.columns, name, rounding, begin, unseen)
        self.known[b] = torch.from_numpy(x[rows - begin])
        if len(self.known) > 2 * WINDOW + 2:
            self.known.popitem(last=False)


def infer(table: Table, declared: object = None) -> tuple[list[Column], list[str]]:
    """Infer the columns of a table in one pass over its rows, with notes; see `inference`."""
    if declared is None:
        return infer_merged(table.chunks(), table.stored)
    return complete_columns(table.chunks(), declared)


def splits(
    table: Table, columns: Sequence[Column], seed: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Return train, validation and test; a missing one is drawn, one row of every ten.

    Raises:
        ValueError: there are no training rows, or too few.
    """
    parts = table.parts
    train = parts.get("train", parts.get("all"))
    missing = [name for name in ("validation", "test") if name not in parts]
    if train is None:
        raise ValueError(f"{table.name} has only {', '.join(parts)}; name files train-..")
    if missing and train[1] < 10:
        raise ValueError(f"{table.name} has {train[1]} training rows; at least 10 are needed")
    share = partial(Share, *train, drawn=len(missing), seed=seed)
    shares = {"train": share()}
    for name in ("validation", "test"):
        own = name in parts
        shares[name] = Share(*parts[name]) if own else share(which=missing.index(name))
    made = {name: TableRows(table, columns, s, rounding=True) for name, s in shares.items()}
    sizes = ", ".join(f"{len(x)} {name}" for name, x in made.items())
    how = f"of each ten rows, {len(missing)} by seed {seed}: " if missing else ""
    return cast(dict[str, Tensor], made), [*table.notes, f"read in blocks of rows; {how}{sizes}"]


def measured(table: Table, columns: Sequence[Column]) -> dict[str, Tensor]:
    """Return the splits of a table, and "all", to evaluate a model of these columns on."""
    shares = {name: Share(*part) for name, part in table.parts.items()}
    shares["all"] = Share(0, table.count)
    made = {name: TableRows(table, columns, share) for name, share in shares.items()}
    return cast(dict[str, Tensor], made)
