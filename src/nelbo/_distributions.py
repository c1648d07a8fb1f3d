r"""Distributions that torch lacks, or has without a finite Kullback-Leibler divergence.

A probability is an object. `torch.distributions.kl_divergence` finds the divergence of a pair;
the pairs registered here are
    Discrete || Discrete       closed form, in log space: no clamp, no 0 * inf;
    Normal   || LevelMixture   **Monte Carlo**, unbiased, an antithetic pair of draws of q.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    MixtureSameFamily,
    Normal,
    constraints,
)
from torch.distributions.kl import register_kl

from nelbo._numerics import log1mexp

Shape = torch.Size | list[int] | tuple[int, ...]


class Discrete(Distribution):
    """A distribution over the levels 0..K-1 of each element, given by log-probabilities.

    Args:
        log_probs: normalised log-probabilities, shape (..., K); -inf is a probability of zero.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs
        super().__init__(batch_shape=log_probs.shape[:-1], validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        value, log_probs = torch.broadcast_tensors(value[..., None], self.log_probs)
        return log_probs.gather(-1, value[..., :1])[..., 0]

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        # Inverse of the cumulative distribution in float64: a float32 uniform truncates tails.
        cdf = self.log_probs.double().exp().cumsum(-1)
        shape = torch.Size(sample_shape) + self.batch_shape
        u = torch.rand((*shape, 1), dtype=torch.float64, device=cdf.device) * cdf[..., -1:]
        # Counting with <= steps over levels of probability zero, also where u is exactly zero.
        return (cdf <= u).sum(-1)

    @property
    def mode(self) -> Tensor:
        return self.log_probs.argmax(-1)


@register_kl(Discrete, Discrete)
def _kl_discrete(p: Discrete, q: Discrete) -> Tensor:
    impossible = p.log_probs == -torch.inf
    log_ratio = torch.where(impossible, 0.0, p.log_probs - q.log_probs)
    return (p.log_probs.exp() * log_ratio).sum(-1)


class DiscretisedNormal(Distribution):
    """The level whose bin N(loc, scale²) falls into; the outermost bins are open.

    Bins end half-way between neighbouring values, so the probabilities sum to 1 for any values.

    Args:
        loc: mean, shape (...).
        scale: standard deviation, broadcastable to loc.
        values: the K increasing values of the levels, shape (K,), in units of loc.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, loc: Tensor, scale: Tensor, values: Tensor) -> None:
        self.loc, self.scale = loc, scale
        self.edges = (values[1:] + values[:-1]) / 2
        super().__init__(batch_shape=loc.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        edges = torch.cat([self.edges[:1], self.edges, self.edges[-1:]]).to(self.loc.dtype)
        lower = (edges[value] - self.loc) / self.scale
        upper = (edges[value + 1] - self.loc) / self.scale
        first, last = value == 0, value == len(self.edges)
        # In the upper tail use the mirror image, where log Φ keeps its digits.
        mirror = lower + upper > 0
        a, b = torch.where(mirror, -upper, lower), torch.where(mirror, -lower, upper)
        log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
        inner = ~(first | last)
        difference = log_b + log1mexp(torch.where(inner, log_a - log_b, -1.0))
        open_below, open_above = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
        return torch.where(first, open_below, torch.where(last, open_above, difference))

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        y = Normal(self.loc, self.scale, validate_args=False).sample(sample_shape)
        return torch.bucketize(y, self.edges.to(y.dtype))

    @property
    def mode(self) -> Tensor:
        # Among equal bins the one of the mean holds most; an open outermost one can hold more.
        middle = torch.bucketize(self.loc, self.edges.to(self.loc.dtype))
        first, last = torch.zeros_like(middle), torch.full_like(middle, len(self.edges))
        places = torch.stack([middle, first, last])
        best = torch.stack([self.log_prob(place) for place in places]).argmax(0)
        return places.gather(0, best[None])[0]


class LevelMixture(MixtureSameFamily):
    r"""Σ_k P(x = v_k) N(loc_k, scale²) of each element: the exact marginal of a reverse step.

    Args:
        log_probs: log P(x = v_k | z_t), shape (..., K).
        loc: mean of component k, shape (..., K).
        scale: standard deviation, broadcastable to loc.
    """

    def __init__(self, log_probs: Tensor, loc: Tensor, scale: Tensor) -> None:
        super().__init__(
            Categorical(logits=log_probs, validate_args=False),
            Normal(loc, scale.expand_as(loc), validate_args=False),
            validate_args=False,
        )


@register_kl(Normal, LevelMixture)
def _kl_normal_mixture(q: Normal, p: LevelMixture) -> Tensor:
    """E_q log q/p over the antithetic pair m ± σε: unbiased, and the part odd in ε cancels."""
    z = q.rsample()
    pair = torch.stack([z, 2 * q.loc - z])
    return (q.log_prob(pair) - p.log_prob(pair)).mean(0)
