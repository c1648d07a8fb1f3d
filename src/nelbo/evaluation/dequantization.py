r"""Dequantisation: from data x to a latent z at the first time, where a flow begins.

A flow gives the density p(z) of z = z_1, not of x: levels have no density, and for real data the
interval [0, first] comes before. For any q(z|x) and any P(x|z) that is normalised over x,

    log P(x) = log ∫ P(x|z) p(z) dz >= E_q(z|x)[ log p(z) + log P(x|z) − log q(z|x) ],

which includes the cost of that interval. With z = √α e + σ ε, σ² = 1-α, and levels 2h apart:

    Encoder           q = q(z_1|x), P the decoder of the model        levels and real data
    TruncatedNormal   q = N(√α e, σ²) on the bin of x, P = 1 in that bin: its ends are at
                      τ = √α h/σ, −log q = ½ε² + ½ log 2πσ² + log[ Φ(τ) − Φ(−τ) ]
    Uniform           q uniform on the bin, −log q = log 2h√α; P = 1 in that bin

per dimension. The outermost bins of TruncatedNormal are open: its P(x|z) is "the nearest level".
Sources: Ho et al. 2019 (Flow++, variational dequantisation), Zheng et al. 2023 (i-DODE, truncated
normal).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import override

from nelbo._utils.numerics import log1mexp, over
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model
from nelbo.diffusion.process import ForwardProcess

#: the largest double below 1, whose quantile is finite
BELOW_ONE = 1 - 2.0**-53


def check_gaussian(model: Model) -> ForwardProcess:
    """Return the process of a model that has a probability flow.

    Raises:
        ValueError: if it has none, such as masked diffusion.
    """
    if not model.process.has_flow:
        raise ValueError(
            f"the ODE likelihood needs a Gaussian process; the model's is"
            f" {type(model.process).__name__}: symbols have no flow; use importance samples"
        )
    return model.process


def check_continuous(model: Model) -> ForwardProcess:
    """Return the process of a model whose probability flow a network of all times follows.

    Raises:
        ValueError: if it has none, or the network was trained at some times only.
    """
    process = check_gaussian(model)
    if (steps := process.schedule.steps) is not None:
        raise ValueError(
            f"the ODE likelihood needs a network of continuous time, and this one was trained at"
            f" {steps} times only; leave --ode out, for the bound of its steps"
        )
    return process


class Dequantiser(ABC):
    """q(z|x) and P(x|z) for z at the first time."""

    name: str

    @abstractmethod
    def __call__(self, model: Model, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        """Draw z ~ q(z|x), shape of x; also return log P(x|z) − log q(z|x), shape (B,), nats."""


class Encoder(Dequantiser):
    """q(z_1|x) of the process and P(x|z_1) of the model."""

    name = "encoder"

    @override
    def __call__(self, model: Model, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        q = model.process.marginal(model.embed(batch.x), t)
        z = q.sample()
        return z, model.likelihood(z, t, batch.condition).log_prob(batch.x) - q.log_prob(z)


class TruncatedNormal(Dequantiser):
    """z ~ N(√α e, σ²) within the bin of x."""

    name = "truncated-normal"

    @override
    def __call__(self, model: Model, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        process, h = _of_levels(model, self)
        x, e = batch.x, model.embed(batch.x)
        sigma = over((process.log_one_minus_alpha(t) / 2).exp(), e)
        tau = over((-process.schedule(t) / 2).exp(), e) * h
        low = torch.where(x == 0, -torch.inf, -tau)
        high = torch.where(x == process.codes - 1, torch.inf, tau)
        below, upto = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
        log_mass = upto + log1mexp(below - upto)
        u = below.exp() + torch.rand_like(e) * log_mass.exp()
        epsilon = torch.special.ndtri(u.clamp(1 - BELOW_ONE, BELOW_ONE)).clamp(low, high)
        log_q = -0.5 * epsilon.square() - (sigma * math.sqrt(2 * math.pi)).log() - log_mass
        return over(process.alpha(t).sqrt(), e) * e + sigma * epsilon, -_total(log_q)


class Uniform(Dequantiser):
    """z uniform on the bin of x."""

    name = "uniform"

    @override
    def __call__(self, model: Model, batch: Batch, t: Tensor) -> tuple[Tensor, Tensor]:
        process, h = _of_levels(model, self)
        e = model.embed(batch.x)
        signal = over(process.alpha(t).sqrt(), e)
        log_width = (2 * h * signal).log().expand_as(e)
        return signal * (e + h * (2 * torch.rand_like(e) - 1)), _total(log_width)


DEQUANTISERS: Mapping[str, Dequantiser] = {
    kind.name: kind for kind in (Encoder(), TruncatedNormal(), Uniform())
}


def _of_levels(model: Model, dequantiser: Dequantiser) -> tuple[ForwardProcess, Tensor]:
    """Return the process and h, half the distance between the values of neighbouring levels."""
    process = check_gaussian(model)
    if not process.codes:
        raise ValueError(
            f"{dequantiser.name} dequantisation is for levels; the model's data are real numbers;"
            f" try {Encoder.name}"
        )
    first, second = process.embed(torch.arange(2, device=model.device))
    return process, (second - first) / 2


def _total(each: Tensor) -> Tensor:
    return each.flatten(1).sum(1)
