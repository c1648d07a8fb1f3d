"""Distributions for an entropy coder: over integers, with integer parameters.

A latent lives on a grid of width d, z = n d; `law` converts a distribution over z, or over
symbols, to one over n that pushes and pops:

    Normal         bins of the grid; mean rounded to d/256, variance minus d²/12, so that the mass
                   of a bin is d times the density at its middle up to higher orders
    LevelMixture   Σ_k p_k N(m_k, σ²): the component k is another latent, recovered by bits-back.
                   Push n: pop k ~ P(k|n), push n with N(m_k, σ²), push k with p
    Discrete       symbols; log-probabilities rounded to 1/1024, then 24 bits of the probability
    Joint          its groups of columns one after another

All parameters are first rounded, and coarsely: outputs of a network that differ in their last
digits give the same integers, except for about one in 10^10. Computations on rounded numbers use
additions, multiplications and tables only, which are the same on every machine.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import singledispatch
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from typing_extensions import override

from nelbo.codec.entropy.stack import PRECISION, SideBySide, Stack, constriction
from nelbo.diffusion.distributions import Discrete, DiscretisedNormal, Joint, LevelMixture

FINE = 256  # parts of a bin to which a mean is rounded
SCALE = 1024  # parts of a bin to which a standard deviation is rounded
REACH = 9  # standard deviations within which each bin is a symbol
FAR = 22  # bits for the distance of values beyond
PARTS = 1024  # of a nat, to which log-probabilities are rounded
LEAST = 18  # nats beyond which all probabilities have the minimal weight
#: weights indexed by rounded log-probability, which is 0 or negative (from the end)
WEIGHTS = np.roll(
    np.maximum(1, np.rint(np.exp(np.arange(-LEAST * PARTS, 1) / PARTS) * (1 << PRECISION))), 1
).astype(np.float32)

Bits = Stack | SideBySide


class SymbolModel(ABC):
    """A distribution over integers n of shape (B, ...)."""

    @abstractmethod
    def nats(self, n: np.ndarray) -> float:
        """Return -log of the probability of n, or on a grid of its density times d, summed."""

    @abstractmethod
    def put(self, stack: Bits, n: np.ndarray) -> None:
        """Put n on the stack, without counting nats."""

    @abstractmethod
    def take(self, stack: Bits) -> np.ndarray:
        """Take n from the stack, int64, without counting nats."""

    def push(self, stack: Bits, n: np.ndarray) -> None:
        """Put n on the stack."""
        self.put(stack, n)
        if stack.counts:
            stack.ideal += self.nats(n)

    def pop(self, stack: Bits) -> np.ndarray:
        """Take n from the stack, int64."""
        n = self.take(stack)
        if stack.counts:
            stack.ideal -= self.nats(n)
        return n

    @abstractmethod
    def integers(self) -> list[np.ndarray]:
        """Return the rounded parameters, for known answers."""


class GridNormal(SymbolModel):
    """N(mean, sd²) on the integers, both in bins.

    Args:
        mean: shape (B, ...).
        sd: broadcastable to the mean.
        far: whether values beyond 9 standard deviations may occur, at an additional cost.
    """

    def __init__(self, mean: np.ndarray, sd: np.ndarray, far: bool = True) -> None:
        self.mean, self.far = finite(mean), far
        self.fine = np.rint(self.mean * FINE).astype(np.int64)
        narrow = np.sqrt(np.maximum(finite(sd) ** 2 - 1 / 12, 1 / 16))
        scale = np.rint(narrow * SCALE).astype(np.int64)
        self.sd, self.scale = np.broadcast_to(sd, mean.shape), np.broadcast_to(scale, mean.shape)
        self.middle = (self.fine + FINE // 2) // FINE
        self.reach = math.ceil(REACH * int(scale.max(initial=SCALE)) / SCALE) + 1

    @override
    def nats(self, n: np.ndarray) -> float:
        u = (n - self.mean) / self.sd
        return float((u * u / 2 + np.log(self.sd)).sum() + n.size * math.log(2 * math.pi) / 2)

    @override
    def integers(self) -> list[np.ndarray]:
        return [self.fine, self.scale]

    @override
    def put(self, stack: Bits, n: np.ndarray) -> None:
        away = (n - self.middle).ravel()
        symbols = away.clip(-self.reach, self.reach)
        if self.far:
            rest = np.abs(away) - self.reach
            stack.push_some(rest, rest >= 0, constriction().stream.model.Uniform(1 << FAR))
        stack.push(symbols, *self._model())

    @override
    def take(self, stack: Bits) -> np.ndarray:
        away = stack.pop(*self._model()).astype(np.int64)
        if self.far:
            uniform = constriction().stream.model.Uniform(1 << FAR)
            away += np.sign(away) * stack.pop_some(np.abs(away) >= self.reach, uniform)
        return away.reshape(self.middle.shape) + self.middle

    def _model(self) -> tuple[object, np.ndarray, np.ndarray]:
        bins = constriction().stream.model.QuantizedGaussian(-self.reach, self.reach)
        rest = (self.fine - FINE * self.middle).ravel() / FINE
        return bins, rest, self.scale.ravel() / SCALE


class Symbols(SymbolModel):
    """A categorical distribution.

    Args:
        log_probs: shape (B, ..., K).
    """

    def __init__(self, log_probs: np.ndarray) -> None:
        self.log_probs, self.rounded = log_probs, rounded(log_probs)

    @override
    def nats(self, n: np.ndarray) -> float:
        return -float(np.take_along_axis(self.log_probs, n[..., None], -1).sum())

    @override
    def integers(self) -> list[np.ndarray]:
        return [self.rounded.astype(np.int64)]

    @override
    def put(self, stack: Bits, n: np.ndarray) -> None:
        put_symbols(stack, n, self.rounded)

    @override
    def take(self, stack: Bits) -> np.ndarray:
        return take_symbols(stack, self.rounded)


class GridMixture(SymbolModel):
    """Σ_k p_k N(mean_k, sd²) on the integers, in bins.

    Args:
        log_probs: log p_k, shape (B, ..., K).
        mean: shape (B, ..., K).
        sd: shape (B, ..., 1).
    """

    def __init__(self, log_probs: np.ndarray, mean: np.ndarray, sd: np.ndarray) -> None:
        self.log_probs, self.mean, self.sd = log_probs, finite(mean), finite(sd)
        self.rounded = rounded(log_probs)
        self.fine = self.mean * FINE
        np.rint(self.fine, out=self.fine)

    @override
    def nats(self, n: np.ndarray) -> float:
        log_density = _log_density(n, self.log_probs, self.mean, self.sd)
        top = log_density.max(-1, keepdims=True)
        log_density -= top
        total = top[..., 0] + np.log(np.exp(log_density, out=log_density).sum(-1))
        each = np.log(self.sd)[..., 0]
        return float((each - total).sum() + n.size * math.log(2 * math.pi) / 2)

    @override
    def integers(self) -> list[np.ndarray]:
        return [self.rounded.astype(np.int64), self.fine.astype(np.int64)]

    @override
    def put(self, stack: Bits, n: np.ndarray) -> None:
        posterior = self._posterior(n)
        k = take_symbols(stack, posterior)
        self._component(k).put(stack, n)
        put_symbols(stack, k, self.rounded)

    @override
    def take(self, stack: Bits) -> np.ndarray:
        k = take_symbols(stack, self.rounded)
        n = self._component(k).take(stack)
        put_symbols(stack, k, self._posterior(n))
        return n

    def _component(self, k: np.ndarray) -> GridNormal:
        mean = np.take_along_axis(self.mean, k[..., None], -1)[..., 0]
        return GridNormal(mean, self.sd[..., 0])

    def _posterior(self, n: np.ndarray) -> np.ndarray:
        """Return P(k|n), rounded, computed from rounded numbers only."""
        sd = np.rint(self.sd * SCALE) / SCALE
        log_probs = _log_density(n, self.rounded / PARTS, self.fine / FINE, sd)
        log_probs -= log_probs.max(-1, keepdims=True)
        return rounded(log_probs)


def _log_density(
    n: np.ndarray, log_probs: np.ndarray, mean: np.ndarray, sd: np.ndarray
) -> np.ndarray:
    """Return log p_k - (n - m_k)²/2σ², shape (B, ..., K)."""
    u = n[..., None] - mean
    u /= sd
    u *= u
    u /= -2
    u += log_probs
    return u


class Groups(SymbolModel):
    """Groups of columns, each with its own distribution; n is (B, D)."""

    def __init__(self, parts: Sequence[SymbolModel], sizes: Sequence[int]) -> None:
        self.parts, self.cuts = parts, np.cumsum(sizes)[:-1]

    @override
    def nats(self, n: np.ndarray) -> float:
        return sum(part.nats(v) for part, v in self._of(n))

    @override
    def integers(self) -> list[np.ndarray]:
        return [numbers for part in self.parts for numbers in part.integers()]

    @override
    def put(self, stack: Bits, n: np.ndarray) -> None:
        for part, v in reversed(self._of(n)):
            part.put(stack, v)

    @override
    def take(self, stack: Bits) -> np.ndarray:
        return np.concatenate([part.take(stack) for part in self.parts], 1)

    def _of(self, n: np.ndarray) -> list[tuple[SymbolModel, np.ndarray]]:
        return list(zip(self.parts, np.split(n, self.cuts, 1), strict=True))


def law(distribution: Distribution, width: Tensor, far: bool = True) -> SymbolModel:
    """Convert a distribution with batch shape (B,) to one over the integers n of z = n·width.

    Args:
        distribution: distribution of a process, a reverse step or a decoder.
        width: width of the grid, broadcastable to one example; 1 for symbols.
        far: see `GridNormal`.

    Raises:
        TypeError: no code is known for this distribution.
    """
    base = distribution.base_dist if isinstance(distribution, Independent) else distribution
    return law_of(base, width, far)


@singledispatch
def law_of(base: Distribution, width: Tensor, far: bool) -> SymbolModel:
    """`law` of a distribution whose batch shape is that of its values, by its class.

    `@law_of.register` makes a further class of distributions known to the coder.
    """
    raise TypeError(f"no lossless code is known for a {type(base).__name__}")


@law_of.register
def _(base: Joint, width: Tensor, far: bool) -> SymbolModel:
    widths = width.split(base.sizes, -1)
    parts = [law_of(part, w, far) for part, w in zip(base.parts, widths, strict=True)]
    return Groups(parts, base.sizes)


@law_of.register
def _(base: LevelMixture, width: Tensor, far: bool) -> SymbolModel:
    normal = cast(Normal, base.component_distribution)
    wide = width[..., None]
    log_probs = base.mixture_distribution.logits
    # one standard deviation for all components
    return GridMixture(_np(log_probs), _np(normal.loc / wide), _np(normal.scale[..., :1] / wide))


@law_of.register
def _(base: Normal, width: Tensor, far: bool) -> SymbolModel:
    return GridNormal(_np(base.loc / width), _np(base.scale / width), far)


@law_of.register
def _(base: Discrete, width: Tensor, far: bool) -> SymbolModel:
    return Symbols(_np(base.log_probs))


@law_of.register
def _(base: DiscretisedNormal, width: Tensor, far: bool) -> SymbolModel:
    levels = torch.arange(len(base.edges) + 1, device=base.loc.device)
    each = [base.log_prob(level.expand(base.loc.shape)) for level in levels]
    return Symbols(_np(torch.stack(each, -1)))


def rounded(log_probs: np.ndarray) -> np.ndarray:
    """Round log-probabilities to parts of a nat; clip all that are too small."""
    parts = finite(log_probs, infinite=True).clip(-LEAST, 0)
    parts *= PARTS
    return np.rint(parts, out=parts)


def put_symbols(stack: Bits, k: np.ndarray, log_probs: np.ndarray) -> None:
    """Push symbols k, (...), with rounded log-probabilities (..., K)."""
    stack.push(k.ravel(), *_categorical(log_probs))


def take_symbols(stack: Bits, log_probs: np.ndarray) -> np.ndarray:
    """Pop symbols, (...) int64, with rounded log-probabilities (..., K)."""
    k = stack.pop(*_categorical(log_probs))
    return k.astype(np.int64).reshape(log_probs.shape[:-1])


def finite(v: np.ndarray, infinite: bool = False) -> np.ndarray:
    """Return v after checking that it is finite; log-probabilities may be -inf.

    Raises:
        ValueError: it holds NaN, or infinities that are not allowed.
    """
    # numpy's max and min of an array with NaN are NaN, which fails every comparison
    if v.size and not (v.max() < np.inf and (infinite or v.min() > -np.inf)):
        raise ValueError(
            "the model gives numbers that are not finite, so it cannot code; train it again"
        )
    return v


def _categorical(log_probs: np.ndarray) -> tuple[object, np.ndarray]:
    places = log_probs.astype(np.intp).reshape(-1, log_probs.shape[-1])
    weights = WEIGHTS[places]  # negative log-probabilities index from the end
    return constriction().stream.model.Categorical(perfect=False, lazy=False), weights


def _np(v: Tensor) -> np.ndarray:
    return np.ascontiguousarray(v.detach().to("cpu", torch.float64).numpy())
