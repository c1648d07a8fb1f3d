r"""A proposal density over the times that needs no network call.

The diffusion term is an integral over u ∈ [0, 1] (`nelbo.diffusion.times`). Its integrand may be
concentrated: 19 of the 999 steps of the usual schedule are a fifth of the term, and the last step
of a cosine schedule may be most of it. Draws that are even in u miss such steps unnoticed. The
cost of a step (s, t) follows from the schedule, except for the error of the prediction,

    KL( q(z_s|z_t,x) ‖ P(z_s|z_t) ) = D/2 (SNR_s - SNR_t) δ²,      δ² = E‖e - ê‖²/D   (σ² = β̃)

and δ² is near one of these, for any network:

    reference   the denoiser of N(μ, Σ) of the data:   Σ_d λ_d (1-α) / (α λ_d + 1-α) / D
    output      an output with an error of one: 1/SNR for a network that predicts noise, 1 for one
                that predicts data (`parametrization`)

In masked diffusion, a symbol is unmasked between t and s with probability α_s - α_t, to which the
cost of a step is proportional. The proposal mixes both with even draws, so that the weight of a
draw is at most 1/SHARE times that under the best of the three. In continuous time, models of
logits are drawn evenly: their costs follow another curve, which a pilot finds.
"""

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from nelbo._utils.numerics import thinned
from nelbo.data.schema import as_examples
from nelbo.diffusion.gaussian import GaussianDiffusion, normal
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.process import ForwardProcess
from nelbo.evaluation.variate import WIDEST

if TYPE_CHECKING:
    from nelbo.diffusion.model import Model
    from nelbo.diffusion.parametrization import Parametrization
    from nelbo.diffusion.reverse import ReverseKernel
    from nelbo.diffusion.times import TimeDiscretization

SHARE = 0.4, 0.4, 0.2  # shares of the draws: by the reference, by an output error, and even
BINS = 256  # bins of continuous time, at least; each at most 1/256 of u and of the range of γ or α
HALVINGS = 40  # halvings of a bin in which γ or α changes fast, at most
FITTED = 4096  # examples from which variances are estimated, at most


@dataclass(frozen=True)
class TimeDensity:
    """A density of u that is constant within bins, which for a grid are its steps.

    Args:
        u: edges of the bins, from 0 to 1, shape (K + 1,).
        mass: probabilities of the bins, shape (K,).
        steps: whether the bins are the steps of a grid.
    """

    u: Tensor
    mass: Tensor
    steps: bool

    def at(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Return u at which the distribution function is `place`, and 1/density there."""
        ends = self.mass.cumsum(0)
        bin_ = torch.searchsorted(ends, place, right=True).clamp(max=len(ends) - 1)
        width, mass = self.u.diff()[bin_], self.mass[bin_]
        share = ((place - ends[bin_] + mass) / mass).clamp(0, 1 - 2**-53)
        # a step is one term, wherever u falls in it
        share = torch.full_like(share, 0.5) if self.steps else share
        return self.u[bin_] + share * width, width / mass

    def groups(self, most: int) -> list[int]:
        """Return edges, as indices of u, of at most `most` groups of bins of nearly equal mass.

        A bin with the mass of a group or more is a group of its own.
        """
        if len(self.mass) <= most:
            return list(range(len(self.u)))
        edges, left, here = [0], 1.0, 0.0
        for i, mass in enumerate(self.mass.tolist()):
            wanted = left / (most - len(edges) + 1)
            if here and len(edges) < most and (mass >= wanted or here + mass / 2 > wanted):
                edges.append(i)
                left, here = left - here, 0.0
            here += mass
        return [*edges, len(self.mass)]


def even(times: "TimeDiscretization") -> TimeDensity:
    """Return the uniform density."""
    count = BINS if times.steps is None else times.terms
    u = torch.arange(count + 1, dtype=torch.float64) / max(count, 1)
    return TimeDensity(u, u.diff(), times.steps is not None)


@torch.no_grad()
def time_density(model: "Model", times: "TimeDiscretization", x: Tensor) -> TimeDensity:
    """Return the proposal, from the schedule, the parametrization and the variances of examples.

    Args:
        model: to measure; its network is not called.
        times: of the bound.
        x: examples of the distribution to be measured, shape (N, ...).
    """
    # Logits include the evidence of z, so costs nearly vanish at low noise, where the reference
    # would place too many draws.
    logits = all(head.point is None for head in model.head.factors)
    if times.terms == 0 or (times.steps is None and logits):
        return even(times)
    u = even(times).u if times.steps is not None else _bins(times, model.process)
    edges = times.at(u).to(model.device)
    some = as_examples(thinned(x, FITTED)).to(model.device)
    shares = zip(SHARE, (*_masses(model, some, edges[:-1], edges[1:]), u.diff()), strict=True)
    mass = torch.zeros_like(u[1:])
    for share, each in shares:
        each = each.cpu().nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
        if each.sum() > 0:
            mass += share * each / each.sum()
    return TimeDensity(u, mass / mass.sum(), times.steps is not None)


def _bins(times: "TimeDiscretization", process: ForwardProcess) -> Tensor:
    """Return edges of bins of continuous time that are small in u, and in γ or α."""
    u = torch.arange(BINS + 1, dtype=torch.float64) / BINS
    follow = process.schedule if process.mask is None else process.alpha
    device = next(process.buffers(), u).device
    for _ in range(HALVINGS):
        run = follow(times.at(u).to(device)).cpu().diff().abs()
        wide = run > run.sum() / BINS
        if not run.sum().isfinite() or not wide.any():
            break
        u = torch.cat([u, (u[:-1] + u[1:])[wide] / 2]).sort().values
    return u


def _masses(model: "Model", x: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return costs of steps by the reference and by an error of the output, shape of t each."""
    reference, output = torch.zeros_like(t), torch.zeros_like(t)
    groups = model.process.factors, model.head.factors, model.step.factors, model.process.split(x)
    for process, head, step, own in zip(*groups, strict=True):
        by_reference, by_output = step_costs(process, head, step, own, s, t)
        reference, output = reference + by_reference, output + by_output
    return reference, output


@singledispatch
def step_costs(
    process: ForwardProcess,
    head: "Parametrization",
    step: "ReverseKernel",
    x: Tensor,
    s: Tensor,
    t: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the costs of steps by the reference and by an error of the output.

    They have the shape of t and are known up to a factor; zeros where nothing is known.
    `@step_costs.register(class)` adds the costs for a class of processes.

    Args:
        process: q of the examples.
        head: the parametrization.
        step: the reverse kernel.
        x: examples, (N, ...).
        s: earlier times of the steps.
        t: later times of the steps.
    """
    return torch.zeros_like(t), torch.zeros_like(t)


@step_costs.register(GaussianDiffusion)
def _(
    process: GaussianDiffusion,
    head: "Parametrization",
    step: "ReverseKernel",
    x: Tensor,
    s: Tensor,
    t: Tensor,
) -> tuple[Tensor, Tensor]:
    errors = (
        _linear(process, _variances(process.embed(x).flatten(1)), t),
        _of_output(process, head, t),
    )
    reference, output = (_cost(process, step, error, s, t) for error in errors)
    return x[0].numel() * reference, x[0].numel() * output


@step_costs.register(MaskedDiffusion)
def _(
    process: MaskedDiffusion,
    head: "Parametrization",
    step: "ReverseKernel",
    x: Tensor,
    s: Tensor,
    t: Tensor,
) -> tuple[Tensor, Tensor]:
    shown = x[0].numel() * math.log(process.count) * (process.alpha(s) - process.alpha(t))
    return shown, shown


def _variances(e: Tensor) -> Tensor:
    """Return λ of examples e, (N, D): of principal components if N allows, else of dimensions."""
    centred = (e - e.nanmean(0)).nan_to_num().double()
    if centred.shape[1] <= min(WIDEST, len(e) - 1):
        return torch.linalg.eigvalsh(centred.T @ centred / len(e)).clamp(min=0)
    variances = centred.square().mean(0).sort().values
    return thinned(variances, WIDEST)


def _linear(process: ForwardProcess, variances: Tensor, t: Tensor) -> Tensor:
    """Return δ² of the denoiser of N(μ, Σ), shape of t."""
    alpha, noise = process.alpha(t)[:, None], process.log_one_minus_alpha(t).exp()[:, None]
    return (variances * noise / (alpha * variances + noise)).mean(1)


def _of_output(process: ForwardProcess, head: "Parametrization", t: Tensor) -> Tensor:
    """Return δ² of an output with an error of one, shape of t; 0 for logits."""
    point = head.point
    if point is None:
        return torch.zeros_like(t)
    zero = torch.zeros_like(t)[:, None]
    outputs = (torch.zeros_like(zero), torch.ones_like(zero))
    low, high = (point(output, zero, t, process).e_hat for output in outputs)
    return (high - low)[:, 0].square()


def _cost(
    process: GaussianDiffusion, step: "ReverseKernel", error: Tensor, s: Tensor, t: Tensor
) -> Tensor:
    """Return the KL of steps in one dimension with prediction error √error; shape of t, nats."""
    zero = torch.zeros_like(t)[:, None]
    q = process.posterior(zero, error.sqrt()[:, None], s, t)
    p = normal(process.m_t(zero, zero, s, t), step.variance(s, t, process))
    return kl_divergence(q, p)
