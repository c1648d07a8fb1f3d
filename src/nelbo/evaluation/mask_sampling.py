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
"""

import hashlib
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

    A stream depends on the seed and the example, and not on its place among others; equal examples
    have streams of their own.

    Args:
        model: that says which places are scored.
        batch: the examples, x of shape (N, ...), D places each.
    """

    def __init__(self, model: Model, batch: Batch) -> None:
        self.batch = batch
        self.places = model.scored_places(batch).flatten(1).cpu().numpy()  # (N, D)
        self.lengths = self.places.sum(1)  # L of each, (N,)
        self._keys, seen = [], Counter[int]()
        for x, condition, places in zip(*self._contents(), self.places, strict=True):
            digest = hashlib.sha256(x[places].tobytes() + condition[condition >= 0].tobytes())
            key = int.from_bytes(digest.digest()[:8], "little")
            self._keys.append((key, seen[key]))
            seen[key] += 1

    def _contents(self) -> tuple[np.ndarray, np.ndarray]:
        batch = self.batch
        x = batch.x.flatten(1).cpu().long().numpy()
        condition = batch.x.new_zeros(len(x), 0) if batch.condition is None else batch.condition
        return x, condition.double().cpu().numpy()

    def stream(self, row: int, *path: int) -> np.random.Generator:
        """Return the random stream of an example for a path (seed, purpose)."""
        return np.random.default_rng([*path, *self._keys[row]])

    def in_random_order(self, seed: int) -> list[int]:
        """Return all rows, in an order that depends on the seed and the examples alone."""
        return sorted(range(len(self._keys)), key=lambda i: self.stream(i, seed, 0).random())


@dataclass(frozen=True)
class Masks:
    """Masks of B examples, n in each of R replicates.

    Args:
        count: number l of hidden places, (B, R, n).
        width: of the strata, the weight of each mask, (B, R, n).
        hidden: whether a place is hidden, (B, R, n, D).
        share: u, the masked share, the time input of a model, (B, R, n), float64.
        length: number L of scored places of the examples, (B,).
        order: the permutation of a replicate of which a mask is a window, (B, R, n).
    """

    count: Tensor
    width: Tensor
    hidden: Tensor
    share: Tensor
    length: Tensor
    order: Tensor

    @property
    def relative(self) -> Tensor:
        """The counts l/L, (B, R, n)."""
        return self.count / self.length[:, None, None]


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
    lengths = texts.lengths[list(rows)]
    v = np.stack([stream.random((replicates, masks)) for stream in streams])
    if paired:
        v[:] = v[:, :1]
    known = {length: _mass(deviations(length)) for length in set(lengths.tolist())}
    at, width = np.empty_like(v), np.ones_like(v)
    for b, length in enumerate(lengths.tolist()):
        if paired:
            at[b] = np.interp((np.arange(masks) + v[b]) / masks, *known[length])
        else:
            edges = np.interp(np.linspace(0, 1, masks + 1), *known[length])
            width[b] = np.diff(edges)
            at[b] = edges[:-1] + v[b] * width[b]
    count = np.minimum(np.floor(at).astype(np.int64) + 1, lengths[:, None, None])
    which, start = _windows(count, lengths)
    hidden = np.zeros((*count.shape, texts.places.shape[1]), dtype=bool)
    share = np.empty(count.shape)
    for b, (row, stream) in enumerate(zip(rows, streams, strict=True)):
        length = int(lengths[b])
        keys = stream.random((replicates, int(which[b].max()) + 1, length))
        rank = np.take_along_axis(keys.argsort(-1), which[b][..., None], 1)
        inside = (rank - start[b][..., None]) % length < count[b][..., None]
        hidden[b][..., texts.places[row]] = inside
        share[b] = stream.beta(count[b], length - count[b] + 1)
    parts = map(torch.from_numpy, (count, width, hidden, share, lengths, which))
    return Masks(*parts)


def _mass(deviations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of Σ sd(l) below v = 0..L, and these v, (L + 1,) each."""
    mass = np.concatenate([[0.0], deviations.cumsum()])
    return mass / mass[-1], np.arange(len(mass))


def _windows(count: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the permutation and the first place of each mask's window, (B, R, n) each."""
    which, start = np.zeros_like(count), np.zeros_like(count)
    length = lengths[:, None]
    for i in range(1, count.shape[2]):
        end = start[..., i - 1] + count[..., i - 1]
        full = end >= length
        which[..., i] = which[..., i - 1] + full
        start[..., i] = np.where(full, 0, end)
    return which, start
