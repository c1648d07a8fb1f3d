r"""Distributions that torch lacks, or has without a stable Kullback-Leibler divergence.

A probability is an object. `torch.distributions.kl_divergence` finds the divergence of a pair in
closed form; the pairs registered here are
    Discrete || Discrete       in log space: no clamp, no 0 * inf;
    Joint    || Joint          of each group of columns.
`kl` adds one by Monte Carlo, with noise that is handed in:
    Normal   || LevelMixture   unbiased, an antithetic pair of draws of q.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    constraints,
    kl_divergence,
)
from torch.distributions.kl import register_kl
from torch.nn.functional import logsigmoid
from typing_extensions import override

from nelbo._utils.batch_rng import BatchShard, rand, randn
from nelbo._utils.numerics import LOG_2, log1mexp

Shape = torch.Size | list[int] | tuple[int, ...]
LogCDF = Callable[[Tensor], Tensor]


class Drawable(Distribution):
    """Distribution whose draws are functions of standard noise."""

    @abstractmethod
    def draw(self, shape: Shape, shard: BatchShard | None) -> Tensor:
        """Draw a tensor of a shape that ends in the batch shape; arguments as for `draw`."""

    @override
    def sample(self, sample_shape: Shape = ()) -> Tensor:
        return self.draw(torch.Size(sample_shape) + self.batch_shape, None)


def draw(q: Distribution, shard: BatchShard | None = None, shape: Shape = ()) -> Tensor:
    """Draw from a distribution as a function of standard noise; differentiable for a Normal.

    Args:
        q: a Normal, a Drawable, or an Independent of one of them.
        shard: rows of a larger batch that q describes; they get the noise that they have there.
        shape: of the result, ending in the batch shape, which is the default.

    Raises:
        TypeError: if q is another distribution.
    """
    match q:
        case Independent():
            return draw(q.base_dist, shard, shape)
        case Normal():
            return q.loc + q.scale * randn(shape or q.batch_shape, shard, q.loc)
        case Drawable():
            return q.draw(shape or q.batch_shape, shard)
    raise TypeError(f"how to draw a {type(q).__name__} is unknown; make it a Drawable")


class Discrete(Drawable):
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
    def draw(self, shape: Shape, shard: BatchShard | None) -> Tensor:
        # Inverse of the cumulative distribution in float64: a float32 uniform truncates tails.
        cdf = self.log_probs.double().exp().cumsum(-1)
        u = rand((*shape, 1), shard, dtype=torch.float64, device=cdf.device) * cdf[..., -1:]
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


def log_between(
    lower: Tensor, upper: Tensor, *, log_cdf: LogCDF = torch.special.log_ndtr
) -> Tensor:
    """Return log[ F(upper) - F(lower) ] for lower < upper, elementwise.

    F is Φ by default, or another distribution function that is symmetric about 0.
    """
    # In the upper tail use the mirror image, where log F is precise.
    mirror = lower + upper > 0
    a, b = torch.where(mirror, -upper, lower), torch.where(mirror, -lower, upper)
    log_a, log_b = log_cdf(a), log_cdf(b)
    return log_b + log1mexp(log_a - log_b)


class Discretised(Drawable):
    """Distribution of the level into whose bin y = loc + scale u falls; outermost bins are open.

    Bins end half-way between neighbouring values, so the probabilities sum to 1 for any values.
    The law of u is that of a subclass, symmetric about 0 with one mode.

    Args:
        loc: mean, shape (...).
        scale: broadcastable to loc.
        values: the K increasing values of the levels, shape (K,), in units of loc.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, loc: Tensor, scale: Tensor, values: Tensor) -> None:
        self.loc, self.scale = loc, scale
        self.edges = (values[1:] + values[:-1]) / 2
        super().__init__(batch_shape=loc.shape, validate_args=False)

    @staticmethod
    @abstractmethod
    def log_cdf(u: Tensor) -> Tensor:
        """Return log F(u)."""

    @abstractmethod
    def standard(self, shape: Shape, shard: BatchShard | None) -> Tensor:
        """Draw u, of a shape that ends in the batch shape."""

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        edges = torch.cat([self.edges[:1], self.edges, self.edges[-1:]]).to(self.loc.dtype)
        lower = (edges[value] - self.loc) / self.scale
        upper = (edges[value + 1] - self.loc) / self.scale
        first, last = value == 0, value == len(self.edges)
        inner = torch.where(first | last, upper - 1, lower)
        difference = log_between(inner, upper, log_cdf=self.log_cdf)
        open_below, open_above = self.log_cdf(upper), self.log_cdf(-lower)
        return torch.where(first, open_below, torch.where(last, open_above, difference))

    @override
    def draw(self, shape: Shape, shard: BatchShard | None) -> Tensor:
        y = self.loc + self.scale * self.standard(shape, shard)
        return torch.bucketize(y.contiguous(), self.edges.to(y.dtype))

    @property
    @override
    def mode(self) -> Tensor:
        # Of equal bins that of the mean is the likeliest; an open outermost one may be likelier.
        middle = torch.bucketize(self.loc, self.edges.to(self.loc.dtype))
        first, last = torch.zeros_like(middle), torch.full_like(middle, len(self.edges))
        places = torch.stack([middle, first, last])
        best = torch.stack([self.log_prob(place) for place in places]).argmax(0)
        return places.gather(0, best[None])[0]


class DiscretisedNormal(Discretised):
    """That of N(loc, scale²)."""

    @staticmethod
    @override
    def log_cdf(u: Tensor) -> Tensor:
        return torch.special.log_ndtr(u)

    @override
    def standard(self, shape: Shape, shard: BatchShard | None) -> Tensor:
        return randn(shape, shard, self.loc)


class DiscretisedLogistic(Discretised):
    """That of the logistic law, F(u) = sigmoid(u)."""

    @staticmethod
    @override
    def log_cdf(u: Tensor) -> Tensor:
        return logsigmoid(u)

    @override
    def standard(self, shape: Shape, shard: BatchShard | None) -> Tensor:
        return rand(shape, shard, dtype=self.loc.dtype, device=self.loc.device).logit(1e-12)


class DiscretisedLaplace(Discretised):
    """That of the Laplace law, F(u) = e^u/2 below 0."""

    @staticmethod
    @override
    def log_cdf(u: Tensor) -> Tensor:
        above = torch.log1p(-(-u.clamp(min=0)).exp() / 2)
        return torch.where(u < 0, u - LOG_2, above)

    @override
    def standard(self, shape: Shape, shard: BatchShard | None) -> Tensor:
        u = 2 * rand(shape, shard, dtype=self.loc.dtype, device=self.loc.device) - 1
        return -u.sign() * torch.log1p(-u.abs().clamp(max=1 - 1e-12))


class LevelMixture(Drawable, MixtureSameFamily):
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

    @override
    def draw(self, shape: Shape, shard: BatchShard | None) -> Tensor:
        level = Discrete(self.mixture_distribution.logits).draw(shape, shard)[..., None]
        every = cast(Normal, self.component_distribution)
        loc, scale = (v.expand(*shape, -1).gather(-1, level) for v in (every.loc, every.scale))
        return draw(Normal(loc[..., 0], scale[..., 0], validate_args=False), shard)


class Joint(Drawable):
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

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        values = value.split(self.sizes, -1)
        each = [part.log_prob(v) for part, v in zip(self.parts, values, strict=True)]
        return torch.cat(each, -1)

    @override
    def draw(self, shape: Shape, shard: BatchShard | None) -> Tensor:
        each = zip(self.parts, self.sizes, strict=True)
        return torch.cat([draw(part, shard, (*shape[:-1], size)) for part, size in each], -1)


@register_kl(Joint, Joint)
def _kl_joint(q: Joint, p: Joint) -> Tensor:
    return torch.cat([kl_divergence(a, b) for a, b in zip(q.parts, p.parts, strict=True)], -1)


#: standard normal noise of a Monte Carlo divergence; None for an exact one, a tuple for a Joint
Noise = Tensor | tuple["Noise", ...] | None


def kl_noise(q: Distribution, p: Distribution, shard: BatchShard | None = None) -> Noise:
    """Draw the noise that `kl` needs for this pair; None where the divergence is exact."""
    if isinstance(q, Independent) and isinstance(p, Independent):
        return kl_noise(q.base_dist, p.base_dist, shard)
    if isinstance(q, Joint) and isinstance(p, Joint):
        return tuple(kl_noise(a, b, shard) for a, b in zip(q.parts, p.parts, strict=True))
    if isinstance(q, Normal) and isinstance(p, LevelMixture):
        return randn(q.batch_shape, shard, q.loc)
    return None


def kl(q: Distribution, p: Distribution, noise: Noise) -> Tensor:
    """Return KL( q ‖ p ): exact, or, with noise ε, the mean of log q/p at m ± σε.

    The latter is unbiased, and its part odd in ε cancels.

    Args:
        q: the first distribution.
        p: the second distribution, of the same batch shape, which is that of the result.
        noise: of this pair, from `kl_noise`.
    """
    if noise is None:
        return kl_divergence(q, p)
    if isinstance(q, Independent) and isinstance(p, Independent):
        return kl(q.base_dist, p.base_dist, noise).reshape(*q.batch_shape, -1).sum(-1)
    if isinstance(noise, tuple):
        assert isinstance(q, Joint) and isinstance(p, Joint)
        return torch.cat([kl(*each) for each in zip(q.parts, p.parts, noise, strict=True)], -1)
    assert isinstance(q, Normal)
    z = q.loc + q.scale * noise
    pair = torch.stack([z, 2 * q.loc - z])
    return (q.log_prob(pair) - p.log_prob(pair)).mean(0)
