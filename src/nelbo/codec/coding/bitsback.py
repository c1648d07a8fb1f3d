"""Bits-back coding: examples on a stack at the cost of the bound.

Each line of `push` adds or removes the bits of one term of the bound (equation 4; Townsend et al.
2019, interleaved as in Kingma et al. 2019, so that bits are borrowed for only one latent at a
time):

    pop  z_1 ~ q(z_1|x)                       - log 1/q(z_1|x)
    push x with P(x|z_1)                      + log 1/P(x|z_1)
    for t = 2..T:
        pop  z_t ~ q(z_t|z_{t-1})             - log 1/q(z_t|z_{t-1})
        push z_{t-1} with P(z_{t-1}|z_t)      + log 1/P(z_{t-1}|z_t)
    push z_T with P(z_T)                      + log 1/P(z_T)

The sum is log q(z|x)/P(x,z), whose mean is -ELBO. `pop` does the same backwards.
"""

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from nelbo.codec.coding.example import ExampleCode, known_numbers
from nelbo.codec.entropy.laws import Bits, GridNormal, SymbolModel, law
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeGrid


class BitsBack(ExampleCode):
    """Code batches of examples by a model at T times, with T network calls per batch.

    Args:
        model: a model of discrete data.
        grid: t_1 .. t_T.
    """

    borrows = True

    def __init__(self, model: Model, grid: TimeGrid) -> None:
        self.model, self.times = model, grid.times.to(model.device)
        width = model.process.grid_width
        self.widths = [width(model.shape, *around) for around in _neighbours(self.times)]
        self.moves = [self._move(i) for i in range(len(self.times))]

    @override
    def push(self, stack: Bits, x: np.ndarray, place: int = 0) -> None:
        n = self._first(x).pop(stack)
        self._decoder(n).push(stack, x)
        for i in range(1, len(self.times)):
            before, n = n, self._transition(n, i).pop(stack)
            self._reverse(n, i).push(stack, before)
        self._prior(len(x)).push(stack, n)

    @override
    def pop(self, stack: Bits, count: int, place: int = 0) -> np.ndarray:
        n = self._prior(count).pop(stack)
        for i in reversed(range(1, len(self.times))):
            after, n = n, self._reverse(n, i).pop(stack)
            self._transition(n, i).push(stack, after)
        x = self._decoder(n).pop(stack)
        self._first(x).push(stack, n)
        return x

    @override
    def answers(self, count: int) -> list[np.ndarray]:
        laws = []
        last = len(self.times) - 1
        for i in sorted({0, last // 2, last}):
            n = self._known_latents(count, i)
            laws.append(self._reverse(n, i) if i else self._decoder(n))
        return [numbers for each in laws for numbers in each.integers()]

    def _known_latents(self, count: int, i: int) -> np.ndarray:
        """Return n of known latents within about 2 standard deviations; for symbols, codes 0 and
        1."""
        known, width = known_numbers(count, self.model.shape), self.widths[i].cpu().numpy()
        n = np.rint((known - 128) / (64 * width)).astype(np.int64)
        return np.where(width == 1, known % 2, n)

    # ---- the distributions of the bound, over integers n with z = n·width

    def _first(self, x: np.ndarray) -> SymbolModel:
        e = self.model.embed(torch.from_numpy(x).to(self.model.device))
        return law(self.model.process.marginal(e, self._at(0, len(x))), self.widths[0], far=False)

    def _decoder(self, n: np.ndarray) -> SymbolModel:
        one = torch.ones_like(self.widths[0])
        return law(self.model.likelihood(self._z(n, 0), self._at(0, len(n))), one)

    def _transition(self, n: np.ndarray, i: int) -> SymbolModel:
        """Return q(z_t|z_s) for s, t = t_i, t_{i+1} and z_s from n."""
        if move := self.moves[i]:
            factor, sd = move
            return GridNormal(n * factor, sd, far=False)
        s, t = self._at(i - 1, len(n)), self._at(i, len(n))
        q = self.model.process.transition(self._z(n, i - 1), s, t)
        return law(q, self.widths[i], far=False)

    def _move(self, i: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the factor of z_s in a Gaussian q(z_t|z_s) and its standard deviation, in bins.

        Both have shape (*shape) and are the same for all z_s, so they are computed once.
        """
        if not i:
            return None
        move = self.model.process.linear_transition(self.times[i - 1], self.times[i])
        if move is None:
            return None
        factor, sd = move[0] * self.widths[i - 1] / self.widths[i], move[1] / self.widths[i]
        return factor.cpu().numpy(), sd.cpu().numpy()

    def _reverse(self, n: np.ndarray, i: int) -> SymbolModel:
        """Return P(z_s|z_t) for s, t = t_i, t_{i+1} and z_t from n."""
        s, t = self._at(i - 1, len(n)), self._at(i, len(n))
        return law(self.model.reverse(self._z(n, i), s, t), self.widths[i - 1])

    def _prior(self, count: int) -> SymbolModel:
        t = self._at(len(self.times) - 1, count)
        return law(self.model.process.prior(self.model.shape, t), self.widths[-1])

    def _z(self, n: np.ndarray, i: int) -> Tensor:
        return torch.from_numpy(n).to(self.model.device) * self.widths[i]

    def _at(self, i: int, count: int) -> Tensor:
        return self.times[i].expand(count)


def _neighbours(times: Tensor) -> list[tuple[Tensor | None, Tensor, Tensor | None]]:
    padded = [None, *times, None]
    return list(zip(padded, times, padded[2:], strict=False))
