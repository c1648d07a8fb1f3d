r"""The bound with the same times and the same noise for every example: a function of x alone.

An example's score must not depend on which others are scored beside it, and two examples compare
best under equal draws. So t_1..t_J, stratified, and ε_1..ε_J are drawn once from a seed, each ε
is used with both signs, and for e = embed(x), z = √α e + √(1-α) ε:

    -ELBO(x) = prior + reconstruction + (1-start)/J Σ_j ½ γ'(t_j) SNR(t_j) ‖e - ê(z_j)‖².

What the examples share does not average out over them. Most of it is known: the linear denoiser
√α z has ‖e - √α z‖² of mean (1-α)² ‖e‖² + α (1-α) D, and its deviation from that is taken off.
"""

import math

import torch
from torch import Tensor

from nelbo._numerics import over, seeded
from nelbo.elbo import Bound, prior_term
from nelbo.likelihood import GaussianDensity
from nelbo.model import Model, measuring
from nelbo.process import Gaussian
from nelbo.terms import Rate


def common_bound(model: Model, x: Tensor, draws: int, seed: int) -> Bound:
    """The three terms of each example of real data, (N,), nats; the same whatever stands beside.

    Args:
        model: of a Gaussian process and a Gaussian density.
        x: examples, (N, *model.shape).
        draws: J; the network is called 2J times for each example, and twice for each fourth
            of J for the reconstruction.
        seed: of the draws.

    Raises:
        ValueError: another kind of model, or no draws.
    """
    process, decoder = model.process, model.decoder
    if not (isinstance(process, Gaussian) and isinstance(decoder, GaussianDensity)):
        raise ValueError("common noise is for real data with a Gaussian process and density")
    if draws < 1:
        raise ValueError(f"draws must be at least 1; got {draws}; try 32")
    start, first = process.schedule.start, math.ceil(draws / 4)
    with measuring(model, x), seeded(seed):
        u = (torch.arange(draws) + torch.rand(draws, dtype=torch.float64)) / draws
        t = torch.cat([torch.full((first,), start, dtype=torch.float64), start + (1 - start) * u])
        noise = torch.randn(len(t), *model.shape, dtype=torch.float64)
        rate = (1 - start) * Rate(t).error_weight(process)
        precision = (-2 * decoder.log_spread).exp() / 2
        weight = torch.cat([precision.expand(first) / first, rate[first:] / draws])
        parts = [_costs(model, part, t, noise) * weight for part in x.split(model.rows)]
        cost = torch.cat(parts)
        last = torch.ones(len(x), dtype=torch.float64)
        prior = prior_term(model, x, last)
        scale = (decoder.affine.scale.log() + decoder.log_spread).expand(model.shape).sum()
    constant = scale + model.dims * math.log(2 * math.pi) / 2
    return Bound(prior, cost[:, :first].sum(1) + constant, cost[:, first:].sum(1))


def _costs(model: Model, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """‖e - ê‖² less what the linear denoiser tells of the noise, (B, J), mean over both signs."""
    process, e = model.process, model.embed(x)
    columns = []
    for time, eps in zip(t, noise, strict=True):
        at = time.expand(len(x))
        alpha, rest = process.alpha(at), process.log_one_minus_alpha(at).exp()
        known = rest.square() * e.flatten(1).square().sum(1) + alpha * rest * model.dims
        cost = known.clone()
        for sign in (1, -1):
            z = over(alpha.sqrt(), e) * e + sign * over(rest.sqrt(), e) * eps
            missed, linear = e - model.predict(z, at).e_hat, e - over(alpha.sqrt(), e) * z
            cost += (missed.square() - linear.square()).flatten(1).sum(1) / 2
        columns.append(cost)
    return torch.stack(columns, 1)
