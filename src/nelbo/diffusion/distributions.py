r"""Distributions that torch lacks, or has without a stable Kullback-Leibler divergence.

A probability is an object. `torch.distributions.kl_divergence` finds the divergence of a pair;
the pairs registered here are
    Discrete || Discrete       closed form, in log space: no clamp, no 0 * inf;
    Normal   || LevelMixture   **Monte Carlo**, unbiased, an antithetic pair of draws of q;
    Joint    || Joint          of each group of columns.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    MixtureSameFamily,
    Normal,
    constraints,
    kl_divergence,
)
from torch.distributions.kl import register_kl
from typing_extensions import override

from nelbo._utils.numerics import draw, log1mexp

Shape = torch.Size | list[int] | tuple[int, ...]


class Discrete(Distribution):
    """Distribution over the levels 0..K-1 of each element, by their log-probabilities.

    Args:
        log_probs: normalised log-probabilities, shape (..., K); -inf is a probability of zero.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs
        super().__init__(batch_shape=log_probs.shape[:-1], validate_args=False)

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        value, log_probs = torch.broadcast_tensors(value[..., None].long(), self.log_probs)
        return log_probs.gather(-1, value[..., :1])[..., 0]

    @override
    def sample(self, sample_shape: Shape = ()) -> Tensor:
        # Inverse of the cumulative distribution in float64: a float32 uniform truncates tails.
        cdf = self.log_probs.double().exp().cumsum(-1)
        shape = torch.Size(sample_shape) + self.batch_shape
        u = torch.rand((*shape, 1), dtype=torch.float64, device=cdf.device) * cdf[..., -1:]
        # Counting with <= skips levels of probability zero, even where u is exactly zero.
        return (cdf <= u).sum(-1)

    @property
    @override
    def mode(self) -> Tensor:
        return self.log_probs.argmax(-1)


@register_kl(Discrete, Discrete)
def _kl_discrete(p: Discrete, q: Discrete) -> Tensor:
    impossible = p.log_probs == -torch.inf
    log_ratio = torch.where(impossible, 0.0, p.log_probs - q.log_probs)
    return (p.log_probs.exp() * log_ratio).sum(-1)


def log_between(lower: Tensor, upper: Tensor) -> Tensor:
    """Return log[ Φ(upper) - Φ(lower) ] for lower < upper, elementwise."""
    # In the upper tail use the mirror image, where log Φ is precise.
    mirror = lower + upper > 0
    a, b = torch.where(mirror, -upper, lower), torch.where(mirror, -lower, upper)
    log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    return log_b + log1mexp(log_a - log_b)


class DiscretisedNormal(Distribution):
    """Distribution of the level into whose bin N(loc, scale²) falls; the outermost bins are open.

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

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        edges = torch.cat([self.edges[:1], self.edges, self.edges[-1:]]).to(self.loc.dtype)
        lower = (edges[value] - self.loc) / self.scale
        upper = (edges[value + 1] - self.loc) / self.scale
        first, last = value == 0, value == len(self.edges)
        difference = log_between(torch.where(first | last, upper - 1, lower), upper)
        open_below, open_above = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
        return torch.where(first, open_below, torch.where(last, open_above, difference))

    @override
    def sample(self, sample_shape: Shape = ()) -> Tensor:
        y = Normal(self.loc, self.scale, validate_args=False).sample(sample_shape)
        return torch.bucketize(y, self.edges.to(y.dtype))

    @property
    @override
    def mode(self) -> Tensor:
        # Of equal bins that of the mean is the likeliest; an open outermost one may be likelier.
        middle = torch.bucketize(self.loc, self.edges.to(self.loc.dtype))
        first, last = torch.zeros_like(middle), torch.full_like(middle, len(self.edges))
        places = torch.stack([middle, first, last])
        best = torch.stack([self.log_prob(place) for place in places]).argmax(0)
        return places.gather(0, best[None])[0]


class LevelMixture(MixtureSameFamily):
    r"""Σ_k P(x = v_k) N(loc_k, scale²) of each element: exact marginal of a reverse kernel.

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
    """Estimate E_q log q/p by an antithetic pair m ± σε: unbiased, the part odd in ε cancels."""
    z = draw(q)
    pair = torch.stack([z, 2 * q.loc - z])
    return (q.log_prob(pair) - p.log_prob(pair)).mean(0)


class Joint(Distribution):
    """Joint distribution of groups of columns, each with its own kind of distribution.

    Values are (..., D) with the groups one after the other; log-probabilities and divergences
    are per column, so that `Independent` sums them as for any other distribution.

    Args:
        parts: distributions of batch shape (..., D_g), equal but for D_g.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, parts: Sequence[Distribution]) -> None:
        self.parts = tuple(parts)
        sizes = [part.batch_shape[-1] for part in parts]
        shape = (*self.parts[0].batch_shape[:-1], sum(sizes))
        self.sizes = sizes
        super().__init__(batch_shape=torch.Size(shape), validate_args=False)

    @property
    @override
    def has_rsample(self) -> bool:  # type: ignore[override]
        return any(part.has_rsample for part in self.parts)

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        values = value.split(self.sizes, -1)
        each = [part.log_prob(v) for part, v in zip(self.parts, values, strict=True)]
        return torch.cat(each, -1)

    @override
    def sample(self, sample_shape: Shape = ()) -> Tensor:
        return torch.cat([part.sample(torch.Size(sample_shape)) for part in self.parts], -1)

    @override
    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        """Draw one sample, reparametrised in the columns whose distributions allow it."""
        if sample_shape:
            raise ValueError(f"a Joint draws one sample at a time; got {sample_shape}")
        return torch.cat([p.rsample() if p.has_rsample else p.sample() for p in self.parts], -1)


@register_kl(Joint, Joint)
def _kl_joint(q: Joint, p: Joint) -> Tensor:
    return torch.cat([kl_divergence(a, b) for a, b in zip(q.parts, p.parts, strict=True)], -1)
