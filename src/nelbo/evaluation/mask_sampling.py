r"""Masks with exact counts: strata over the number of hidden places; windows of permutations.

With l of the L scored places of a text hidden, f(l) = E_{|S|=l} (1/l) Σ_{i in S} -log P(x_i|z),
and the bound is Σ_{l=1..L} f(l) = ∫_0^L f(⌊v⌋ + 1) dv. The interval [0, L] is divided into strata
of about equal Σ sd(l) (Neyman 1934); from each, one v is drawn uniformly, and its weight is the
width of the stratum, so that a constant is integrated without error.

Within a replicate the masks of a text are consecutive windows of a random permutation of its
places, closed to a circle; when the circle is full, another permutation begins. Each mask alone is
a uniformly random set, so that every mean is right; together they hide all places about equally
often, which removes most of the variance of how hard each token is. Two windows of half of the
places are complementary masks (Ye et al. 2025), and windows of a whole permutation an order.

A model with a time input gets the masked share u. Where α is uniform, l given u is binomial,
so that E over l and u ~ Beta(l, L - l + 1) is the integral over u of the bound:

    C(L, l) ∫ u^{l-1} (1-u)^{L-l} c(u) du = 1/l E_{u ~ Beta(l, L-l+1)} c(u).

The bound of block diffusion is the sum of the bounds of the blocks, each given those before it:
the intervals [0, L_b] of the blocks stand side by side in [0, L], and each block has permutations
of its own. For other masked models, all places are one block.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model

#: standard deviations of the cost with l = 1..L hidden places, (L,), from L
Deviations = Callable[[int], np.ndarray]


class Texts:
    """The scored places of the examples of a batch, and a random stream for each example.

    A stream depends on the seed and the example, and not on others; equal examples have streams of
    their own.

    Args:
        model: that says which places are scored.
        batch: the examples, x of shape (N, ...), D places each.
    """

    def __init__(self, model: Model, batch: Batch) -> None:
        self.batch = batch
        self.places = model.scored_places(batch).flatten(1).cpu().numpy()  # (N, D)
        self.lengths = self.places.sum(1)  # L of each, (N,)
        self.block = model.process.block_of_places(batch.x.shape[1:]).flatten().numpy()  # (D,)
        inside = np.eye(self.block.max() + 1, dtype=np.int64)[self.block]
        self.of_blocks = self.places.astype(np.int64) @ inside  # L_b of each, (N, blocks)
        x, condition = self._contents()
        self._keys, seen = dict[int, tuple[int, int]](), Counter[int]()
        for row in batch.order.tolist():
            tokens, shown = x[row, self.places[row]], condition[row, condition[row] >= 0]
            digest = hashlib.sha256(tokens.tobytes() + shown.tobytes())
            key = int.from_bytes(digest.digest()[:8], "little")
            self._keys[row] = key, seen[key]
            seen[key] += 1

    def _contents(self) -> tuple[np.ndarray, np.ndarray]:
        batch = self.batch
        x = batch.x.flatten(1).cpu().long().numpy()
        condition = batch.x.new_zeros(len(x), 0) if batch.condition is None else batch.condition
        return x, condition.double().cpu().numpy()

    def stream(self, row: int, *path: int) -> np.random.Generator:
        """Return the random stream of an example for a path (seed, purpose)."""
        return np.random.default_rng([*path, *self._keys[row]])

    def deviations(self, row: int, each: Deviations) -> np.ndarray:
        """Return the standard deviations of the cost over [0, L], block after block, (L,)."""
        return np.concatenate([each(length) for length in self.of_blocks[row].tolist() if length])

    def in_random_order(self, seed: int) -> list[int]:
        """Return all rows, in an order that depends on the seed and the examples alone."""
        return sorted(range(len(self._keys)), key=lambda i: self.stream(i, seed, 0).random())

    @property
    def sets(self) -> np.ndarray:
        """The number of masks of each text that hide a scored place, (N,); inf if beyond 2^53."""
        count = 2.0 ** np.minimum(self.of_blocks, 53) - 1
        return np.where(self.of_blocks > 53, np.inf, count).sum(1)


@dataclass(frozen=True)
class Masks:
    """Masks of B examples, n in each of R replicates.

    Args:
        blocks: the number of blocks of an example.
        count: number l of hidden places, (B, R, n).
        width: the weight of each mask, (B, R, n): of drawn ones the width of their stratum.
        hidden: whether a place is hidden, (B, R, n, D).
        share: u, the masked share, the time input of a model, (B, R, n), float64.
        block: the block whose places are hidden, (B, R, n).
        places: its scored places, L of them, (B, R, n, D).
        order: the permutation of a block in a replicate of which a mask is a window, (B, R, n);
            of drawn masks.
    """

    blocks: int
    count: Tensor
    width: Tensor
    hidden: Tensor
    share: Tensor
    block: Tensor
    places: Tensor
    order: Tensor

    @property
    def after(self) -> Tensor:
        """The number of blocks after that of each mask, (B, R, n)."""
        return self.blocks - 1 - self.block

    @property
    def relative(self) -> Tensor:
        """The counts l/L, (B, R, n)."""
        return self.count / self.places.sum(-1)


def draw_masks(
    texts: Texts,
    rows: Sequence[int],
    path: tuple[int, int],
    replicates: int,
    masks: int,
    deviations: Deviations,
    paired: bool = False,
) -> Masks:
    """Draw masks of some examples, each from its own stream.

    Args:
        texts: the examples.
        rows: which of them, B.
        path: of their streams, (seed, purpose).
        replicates: R, independent unless `paired`.
        masks: n, of an example in each replicate.
        deviations: of the cost.
        paired: use the same counts in all replicates, by importance in place of strata, for the
            regression of a pilot; the widths are then not to be used.
    """
    streams = [texts.stream(row, *path) for row in rows]
    v = np.stack([stream.random((replicates, masks)) for stream in streams])
    if paired:
        v[:] = v[:, :1]
    lengths = texts.of_blocks[list(rows)]  # (B, blocks)
    first = dict(zip(map(tuple, lengths.tolist()), rows, strict=True))
    known = {each: _mass(texts.deviations(row, deviations)) for each, row in first.items()}
    at, width = np.empty_like(v), np.ones_like(v)
    for b, each in enumerate(map(tuple, lengths.tolist())):
        if paired:
            at[b] = np.interp((np.arange(masks) + v[b]) / masks, *known[each])
        else:
            edges = np.interp(np.linspace(0, 1, masks + 1), *known[each])
            width[b] = np.diff(edges)
            at[b] = edges[:-1] + v[b] * width[b]
    begins = lengths.cumsum(1) - lengths
    # the last block that begins at v or before it, and has a scored place
    reached = (begins[:, None, None] <= at[..., None]) & (lengths > 0)[:, None, None]
    block = lengths.shape[1] - 1 - reached[..., ::-1].argmax(-1)
    of = np.arange(len(lengths))[:, None, None], block
    length = lengths[of]
    count = np.minimum(np.floor(at - begins[of]).astype(np.int64) + 1, length)
    which, start = _windows(count, block, lengths)
    places = texts.places[list(rows)][:, None, None] & (texts.block == block[..., None])
    hidden = np.zeros(places.shape, dtype=bool)
    share = np.empty(count.shape)
    for b, (row, stream) in enumerate(zip(rows, streams, strict=True)):
        own = np.flatnonzero(texts.places[row])
        keys = stream.random((replicates, int(which[b].max()) + 1, len(own)))
        for k in set(block[b].flatten().tolist()):
            at_masks, columns = np.nonzero(block[b] == k), texts.block[own] == k
            rank = keys[at_masks[0], which[b][at_masks]][:, columns].argsort(-1)
            shifted = (rank - start[b][at_masks][:, None]) % lengths[b, k]
            inside = shifted < count[b][at_masks][:, None]
            hidden[b][(*(i[:, None] for i in at_masks), own[columns])] = inside
        share[b] = stream.beta(count[b], length[b] - count[b] + 1)
    parts = map(torch.from_numpy, (count, width, hidden, share, block, places, which))
    return Masks(lengths.shape[1], *parts)


def all_masks(texts: Texts, rows: Sequence[int]) -> Masks:
    """Return all masks of texts whose blocks have the same lengths, each with its share of Σ_l.

    There are C(L, l) masks of l places, which have the weight 1/C(L, l) each, and the mean of the
    masked share given l.
    """
    of_blocks = texts.of_blocks[rows[0]]
    own = np.stack([np.flatnonzero(texts.places[row]) for row in rows])  # (B, L)
    block = np.repeat(np.arange(len(of_blocks)), [2**length - 1 for length in of_blocks])
    # of each mask, the places of its block among all: bit i of its number is the i-th of them
    number = np.concatenate([np.arange(1, 2**length) for length in of_blocks])
    begin = of_blocks.cumsum() - of_blocks
    place = np.arange(own.shape[1]) - begin[block][:, None]
    of_block = (place >= 0) & (place < of_blocks[block][:, None])
    inside = of_block & ((number[:, None] >> place.clip(0)) & 1 > 0)
    places = np.zeros((len(rows), len(block), texts.places.shape[1]), dtype=bool)
    hidden = places.copy()
    of_rows = np.arange(len(rows))[:, None]
    hidden[of_rows, :, own] = inside.T
    places[of_rows, :, own] = of_block.T
    count, length = inside.sum(1), of_blocks[block]
    width = np.array([1 / math.comb(*each) for each in zip(length, count, strict=True)])

    def alike(v: np.ndarray) -> Tensor:
        return torch.from_numpy(v).expand(len(rows), 1, -1)

    return Masks(
        blocks=len(of_blocks),
        count=alike(count),
        width=alike(width),
        hidden=torch.from_numpy(hidden)[:, None],
        share=alike(count / (length + 1)),
        block=alike(block),
        places=torch.from_numpy(places)[:, None],
        order=alike(0 * count),
    )


def _mass(deviations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of Σ sd(l) below v = 0..L, and these v, (L + 1,) each."""
    mass = np.concatenate([[0.0], deviations.cumsum()])
    return mass / mass[-1], np.arange(len(mass))


def _windows(
    count: np.ndarray, block: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the permutation and the first place of each mask's window, (B, R, n) each."""
    which, start = np.zeros_like(count), np.zeros_like(count)
    # of each block, the permutation of its last window and where this ends, (B, R, blocks)
    last, end = np.zeros((2, *count.shape[:2], lengths.shape[1]), dtype=count.dtype)
    every = np.broadcast_to(lengths[:, None], last.shape)
    for i in range(count.shape[2]):
        of = block[..., i, None]
        length, before, begin = (np.take_along_axis(v, of, 2) for v in (every, last, end))
        full = begin >= length
        which[..., i, None] = before + full
        start[..., i, None] = np.where(full, 0, begin)
        np.put_along_axis(last, of, which[..., i, None], 2)
        np.put_along_axis(end, of, (start + count)[..., i, None], 2)
    return which, start
