"""Direct coding with an absorbing model: symbols are revealed in groups, without borrowing.

The set of symbols that are visible at time t is a draw of the encoder q that does not depend on x,
so coder and decoder can share it: an order σ of the dimensions, from a seed, of which the first
c_t are visible, c_t = α_t D rounded. The symbols that become visible between two times are coded
with P(x_i|z_t):

    Σ_t Σ_{i in σ(c_t .. c_{t-1}]} -log P(x_i | x_σ(1..c_t)),      σ uniform over all orders.

The mean is the bound of these steps, and with one call per symbol the any-order bound.
"""

import hashlib
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from nelbo.codec.coding.example import ExampleCode, known_numbers
from nelbo.codec.entropy.laws import Bits, Symbols
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeGrid


class Direct(ExampleCode):
    """Code batches of examples by an absorbing model.

    Args:
        model: a masked model of any order.
        shown: number of visible symbols at each network call, increasing from 0.
        seed: seed of the orders.
    """

    borrows = False

    def __init__(self, model: Model, shown: list[int], seed: str) -> None:
        assert model.process.mask is not None
        self.model, self.mask, self.seed = model, model.process.mask, seed
        self.groups = list(pairwise([*shown, model.dims]))

    @override
    def push(self, stack: Bits, x: np.ndarray, place: int = 0) -> None:
        order, flat = self._orders(len(x), place), x.reshape(len(x), -1)
        z = np.full_like(flat, self.mask)
        laws = []
        for first, last in self.groups:
            at = order[:, first:last]
            symbols = np.take_along_axis(flat, at, 1)
            laws.append((Symbols(self._log_probs(z, at)), symbols))
            np.put_along_axis(z, at, symbols, 1)
        for law, symbols in reversed(laws):
            law.push(stack, symbols)

    @override
    def pop(self, stack: Bits, count: int, place: int = 0) -> np.ndarray:
        order = self._orders(count, place)
        z = np.full((count, self.model.dims), self.mask, np.int64)
        for first, last in self.groups:
            at = order[:, first:last]
            np.put_along_axis(z, at, Symbols(self._log_probs(z, at)).pop(stack), 1)
        return z.reshape(count, *self.model.shape)

    @override
    def answers(self, count: int) -> list[np.ndarray]:
        known = known_numbers(count, (self.model.dims,))
        z = np.where(known % 4 < 2, known % 2, self.mask)
        everywhere = np.broadcast_to(np.arange(self.model.dims), z.shape)
        return [np.array(self.groups), *Symbols(self._log_probs(z, everywhere)).integers()]

    def _log_probs(self, z: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Return log P(x_i|z) of the dimensions `at`, (B, n), for flat z: (B, n, K)."""
        place = self.model.device
        shaped = torch.from_numpy(z).reshape(len(z), *self.model.shape).to(place)
        t = torch.ones(len(z), dtype=torch.float64, device=place)
        e_hat: Tensor = self.model.predict(shaped, t).e_hat
        log_probs = e_hat.double().cpu().numpy().reshape(*z.shape, -1)
        return np.take_along_axis(log_probs, at[..., None], 1)

    def _orders(self, count: int, place: int) -> np.ndarray:
        """Return a permutation of the dimensions for each example, (count, D)."""
        return np.stack([self._order(place + i) for i in range(count)])

    def _order(self, i: int) -> np.ndarray:
        stream = hashlib.shake_256(f"{self.seed}, {i}".encode()).digest(8 * self.model.dims)
        return np.frombuffer(stream, "<u8").argsort(kind="stable")


def one_by_one(model: Model, steps: int) -> bool:
    """Return whether each symbol has a network call of its own."""
    return model.process.any_order and steps >= model.dims


def shown_at(model: Model, grid: TimeGrid) -> list[int]:
    """Return the distinct c_t for the times of a grid, increasing from 0.

    With at least as many times as symbols, each symbol has its own call, whatever the times are.
    """
    if one_by_one(model, len(grid.times)):
        return list(range(model.dims))
    alpha = model.process.alpha(grid.times.flip(0).to(model.device))
    counts = (alpha * model.dims).round().long().clamp(max=model.dims - 1).tolist()
    return sorted({0, *counts})
