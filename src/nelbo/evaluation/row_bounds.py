r"""The bound of each row of real data by draws of its own, with an error for each.

The times and the noise of a row follow from the seed and the values of the row, and no row of
other values has the same. So its score does not depend on other rows, and the error of a mean
falls with the rows as with the draws. Each noise is used with both signs, and each stratum of
times has two draws, whose difference gives the error.

Known costs are not drawn. Any distribution P has an exact denoiser ê_P, whose cost for each e is

    ∫ w(t) E‖e - ê_P(z_t)‖² dt = KL( q(z_start|e) ‖ P(z_start) ) - KL( q(z_1|e) ‖ P(z_1) )

(the chain rule of KL along the exact reverse process), w = ½ γ' SNR. With a mixture of Gaussians
near the model,

    -ELBO(x) = prior - KL_1 + [ reconstruction + KL_start ] + ∫ w E[ ‖e-ê‖² - ‖e-ê_P‖² ] dt,

only the difference of the model from the mixture is left to chance.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.batch_rng import row_streams
from nelbo._utils.numerics import over
from nelbo.diffusion.elbo import prior_term
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.process import ForwardProcess
from nelbo.diffusion.terms import DiffusionRate
from nelbo.nn.mixture import MixtureDenoiser

LATENTS = 2**14  # rows of a network call, at most, for all draws of some examples


class RowBounds(NamedTuple):
    """The lower bound on log P(x) of each row and its standard error, (N,), nats."""

    elbo: Tensor
    error: Tensor


def row_bounds(
    model: Model, x: Tensor, draws: int, seed: int, known: MixtureDenoiser
) -> RowBounds:
    """Return the bound of each example of real data; -inf where it overflows float64.

    Args:
        model: with a Gaussian process and a Gaussian density as decoder.
        x: examples, (N, *model.shape).
        draws: number J of times, rounded up to even; each takes two network calls per example,
            and J/4 further draws of the reconstruction take two calls each.
        seed: of the draws, together with the values of a row.
        known: mixture near the embedded examples, such as the one that training started from.

    Raises:
        ValueError: if the model is of another kind, or there are fewer than two draws.
    """
    process, scales = model.process, model.decoder.log_scales
    # the reconstruction is integrated by hand here, which holds for a normal law alone
    if not process.has_flow or scales is None:
        raise ValueError("row bounds are for real data with a Gaussian process and density")
    if draws < 2:
        raise ValueError(f"draws must be at least 2, to have an error; got {draws}; try 32")
    strata = math.ceil(draws / 2)
    ends = max(2, math.ceil(draws / 4))
    rows = max(1, min(model.rows, LATENTS) // (2 * strata + ends))
    parts = []
    with measuring(model):
        for some in x.double().split(rows):
            some = some.to(model.device)
            u, noise = _own_draws(model.embed(some), strata, ends, seed)
            parts.append(_some(model, process, scales, some, u, noise, known))
    elbo, error = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
    far = elbo.isnan()
    return RowBounds(
        torch.where(far, -math.inf, elbo), torch.where(far | error.isnan(), math.inf, error)
    )


def _own_draws(e: Tensor, strata: int, ends: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw times in [0, 1), (B, 2 strata), two per stratum, and noise, (B, 2 strata + ends, ...).

    They follow from the embedded rows e, (B, *shape), so the unit of a column has no effect.
    """
    draws, shape = 2 * strata, e.shape[1:]
    u, noise = np.empty((len(e), draws)), np.empty((len(e), draws + ends, *shape))
    for i, of_row in enumerate(row_streams(e, seed)):
        u[i], noise[i] = of_row.random(draws), of_row.standard_normal(noise.shape[1:])
    within = torch.from_numpy(u).reshape(len(e), strata, 2)
    spread = (torch.arange(strata)[:, None] + within).flatten(1) / strata
    return spread.to(e.device), torch.from_numpy(noise).to(e.device)


def _some(
    model: Model,
    process: ForwardProcess,
    scales: tuple[Tensor, Tensor],
    x: Tensor,
    u: Tensor,
    noise: Tensor,
    known: MixtureDenoiser,
) -> RowBounds:
    start, draws = process.schedule.start, u.shape[1]
    log_spread, log_unit = scales
    e = model.embed(x)
    last, each = e.new_ones(len(x)), torch.arange(len(x), device=e.device)

    # the times between: the excess of the model's error over that of the mixture
    t = start + (1 - start) * u
    of_row = each.repeat_interleave(draws)
    wide, eps = e[of_row], noise[:, :draws].flatten(0, 1)
    cost = e.new_zeros(len(wide))
    for sign in (1, -1):
        z, e_hat, of_known, _ = _both(model, known, wide, sign * eps, t.flatten())
        # ‖e - ê‖² - ‖e - ê_P‖² without cancellation
        more = (of_known - e_hat) * (2 * wide - e_hat - of_known)
        cost += more.flatten(1).sum(1) / 2
    weight = (1 - start) * DiffusionRate(t.flatten()).error_weight(process)
    pairs = (cost * weight).reshape(len(x), -1, 2)
    diffusion = pairs.mean((1, 2))
    variance = pairs.diff(dim=2)[..., 0].square().sum(1) / (2 * pairs.shape[1]) ** 2

    # the ends: reconstruction + KL_start - KL_1
    eps = noise[:, draws:]
    of_row = each.repeat_interleave(eps.shape[1])
    wide, eps = e[of_row], eps.flatten(0, 1)
    first, final = e.new_full((len(wide),), start), last[of_row]
    cost = e.new_zeros(len(wide))
    for sign in (1, -1):
        _, e_hat, _, log_p = _both(model, known, wide, sign * eps, first)
        missed = (wide - e_hat).square().flatten(1).sum(1)
        signal, rest = (process.alpha(final).sqrt(), process.log_one_minus_alpha(final) / 2)
        z = over(signal, wide) * wide + over(rest.exp(), wide) * (sign * eps)
        log_p_last = known.describe(z, process.schedule(final))[1]
        cost += (missed * (-2 * log_spread).exp() / 2 - log_p + log_p_last) / 2
    of_ends = cost.reshape(len(x), -1)
    entropies = (process.log_one_minus_alpha(t_) for t_ in (last, torch.full_like(last, start)))
    of_last, of_start = entropies
    scale = (log_unit + log_spread).expand(model.shape).sum()
    constant = scale + model.dims * (math.log(2 * math.pi) + of_last - of_start) / 2
    nats = prior_term(model, x, last) + diffusion + of_ends.mean(1) + constant
    return RowBounds(-nats, (variance + of_ends.var(1) / of_ends.shape[1]).sqrt())


def _both(
    model: Model, known: MixtureDenoiser, e: Tensor, noise: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return z_t, ê of the model, ê of the mixture, (B, *shape) each, and log P(z_t), (B,)."""
    process = model.process
    signal, rest = process.alpha(t).sqrt(), (process.log_one_minus_alpha(t) / 2).exp()
    z = over(signal, e) * e + over(rest, e) * noise
    v, log_p = known.describe(z, process.schedule(t))
    return z, model.predict(z, t).e_hat, over(signal, z) * z - over(rest, z) * v, log_p
