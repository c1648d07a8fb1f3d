r"""The probability flow: a deterministic path with the marginals of the diffusion.

In the variable γ = −log SNR, which is independent of the schedule, with α = sigmoid(−γ) and the
model's prediction ê = ê(z, γ), the flow of equation 2 (Song et al. 2021, equation 13) is

    dz/dγ = ½ √α (√α z − ê) =: f(z, γ),        zero if the data are standard normal,

since dz_t = ½ (α z − √α ê) dγ follows from z/√α = e + e^{γ/2} ε, d(z/√α)/de^{γ/2} = ε̂. Along the
flow d log p(z)/dγ = −tr ∂f/∂z, so with p(z_T) = N(0, 1) at the last γ

    log p(z_1) = log N(z_T; 0, 1) + ∫ tr ∂f/∂z dγ.

tr ∂f/∂z = Σ_v v·(∂f/∂z)ᵀ v over all unit vectors v, or in expectation over one v of random signs
(Hutchinson), drawn once for the whole path, so that f remains a function of (z, γ). The mean of
two such v is taken, and half their difference is its error. f and v·∂f/∂z share one forward pass;
each v takes one backward pass. Both are counted at the network.

Step sizes and errors are controlled for each example separately, so the value of an example does
not depend on the others in its batch.
"""

import math
from collections.abc import Iterable
from functools import partial
from os import PathLike
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nelbo._utils.numerics import over
from nelbo._utils.progress import Track
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model
from nelbo.diffusion.schedules import time_of
from nelbo.evaluation.blocks import scale_of
from nelbo.evaluation.dequantization import Dequantiser, Encoder, check_continuous, check_gaussian
from nelbo.evaluation.intervals import freedoms, widened
from nelbo.evaluation.ode_solver import solve
from nelbo.evaluation.replicates import BLOCK, check_samples, draw_replicates, log_mean
from nelbo.evaluation.result import BoundEstimate, FlowDetails

Trace = Literal["auto", "exact", "hutchinson"]
EXACT_UP_TO = 16  # dimensions up to which `auto` takes the exact trace
MAX_STEPS = 10_000  # steps of the solver, at most


class Carried(NamedTuple):
    """End z of a path, shape (B, ...), and log p(start) − log p(end) along it, shape (B,), or by
    each probe, (P, B)."""

    z: Tensor
    log_det: Tensor


def is_exact(model: Model, trace: Trace) -> bool:
    """Return whether the trace is exact: on request, or by `auto` for small D.

    Raises:
        ValueError: if the kind of trace is unknown.
    """
    if trace not in ("auto", "exact", "hutchinson"):
        raise ValueError(f"trace must be auto, exact or hutchinson; got {trace!r}")
    return trace == "exact" or (trace == "auto" and model.dims <= EXACT_UP_TO)


def unit_probes(z: Tensor) -> Tensor:
    """Return all D unit vectors, (D, B, ...), for the exact trace in D backward passes."""
    dims = z[0].numel()
    units = torch.eye(dims, dtype=z.dtype, device=z.device)
    return units.reshape(dims, 1, *z.shape[1:]).expand(dims, *z.shape)


def random_probes(z: Tensor, count: int = 1) -> Tensor:
    """Draw vectors of random signs per example, (count, B, ...); exact for diagonal ∂f/∂z."""
    return (torch.randint(0, 2, (count, *z.shape)) * 2 - 1).to(z)


def drift(
    model: Model, z: Tensor, gamma: Tensor, first: float, condition: Tensor | None = None
) -> Tensor:
    """Return f(z, γ) = ½ √α (√α z − ê); shape of z."""
    t = time_of(model.process.schedule, gamma, first)
    signal = over(torch.sigmoid(-gamma).sqrt(), z)
    return 0.5 * signal * (signal * z - model.predict(z, t, condition).e_hat)


def drift_and_trace(
    model: Model,
    z: Tensor,
    gamma: Tensor,
    first: float,
    probes: Iterable[Tensor],
    condition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return f(z, γ) and v·(∂f/∂z)ᵀ v, (P, B): one forward pass, one backward pass per v."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        f = drift(model, z, gamma, first, condition)
        traces = []
        for v in probes:
            (gradient,) = torch.autograd.grad(f, z, v, retain_graph=True)
            traces.append((v * gradient).flatten(1).sum(1))
    return f.detach(), torch.stack(traces) if traces else gamma.new_zeros(0, len(gamma))


def carry(
    model: Model,
    z: Tensor,
    start: float,
    end: float,
    probes: Tensor,
    tolerance: float,
    condition: Tensor | None = None,
    *,
    apart: bool = False,
) -> Carried:
    """Integrate the flow and tr ∂f/∂z from time `start` to time `end`, in either direction.

    Args:
        model: the model; its process must be Gaussian.
        z: latents at `start`, shape (B, ...).
        start: a time.
        end: a time, before or after `start`.
        probes: `unit_probes` or `random_probes`.
        tolerance: absolute and relative, of one step and each example: of the root mean square
            over z, and of the integral in nats per dimension.
        condition: of the examples, (B, F).
        apart: whether the integral is returned by each probe, not as their sum.

    Raises:
        ValueError: if the process is not Gaussian, its parametrization has no flow, or the solver
            does not finish.
    """
    begin, stop = check_flow(model, start, end, tolerance).tolist()
    first, dims = min(start, end), model.dims

    def flow(gamma: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        place = state[:, :dims].reshape(-1, *z.shape[1:])
        given = None if condition is None else condition[rows]
        own = (v[rows] for v in probes)
        f, traces = drift_and_trace(model, place, gamma, first, own, given)
        traces = traces if apart else traces.sum(0, keepdim=True)
        return torch.cat([f.flatten(1), traces.T / dims], 1)

    state = torch.cat([z.flatten(1), z.new_zeros(len(z), len(probes) if apart else 1)], 1)
    norm = partial(error_norm, dims=dims)
    at_end = solve(flow, state, begin, stop, tolerance, norm, MAX_STEPS)
    log_det = at_end[:, dims:].T * dims
    return Carried(at_end[:, :dims].reshape(z.shape), log_det if apart else log_det[0])


def log_density(
    model: Model,
    z: Tensor,
    first: float,
    probes: Tensor,
    tolerance: float,
    condition: Tensor | None = None,
    *,
    apart: bool = False,
) -> Tensor:
    """Return log p(z_1) = log N(z_T; 0, 1) + ∫ tr ∂f/∂z dγ at the time `first`, in nats; (B,), or
    by each probe, (P, B)."""
    z_last, log_det = carry(model, z, first, 1.0, probes, tolerance, condition, apart=apart)
    last = torch.ones(len(z), dtype=torch.float64, device=z.device)
    return model.process.prior(z.shape[1:], last).log_prob(z_last) + log_det


def error_norm(error: Tensor, dims: int) -> Tensor:
    """Return the larger of the root mean square over z, (B, dims), and the errors of the integrals
    beside it; shape (B,)."""
    of_z = error[:, :dims].square().mean(1).sqrt()
    return torch.maximum(of_z, error[:, dims:].abs().amax(1))


def check_flow(model: Model, start: float, end: float, tolerance: float) -> Tensor:
    """Return γ at both ends, shape (2,).

    Raises:
        ValueError: if the process is not Gaussian, the parametrization has no flow, a γ is
            infinite, or the tolerance is outside (0, 1).
    """
    process = check_gaussian(model)
    if model.head.steps is not None:
        raise ValueError(
            f"the mean f belongs to {model.head.steps} steps and has no flow between them; try a"
            " model that predicts noise, data or velocity"
        )
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be in (0, 1); got {tolerance}; try 1e-4")
    with torch.no_grad():
        times = torch.tensor([start, end], dtype=torch.float64, device=model.device)
        gammas = process.schedule(times)
    if not gammas.isfinite().all():
        raise ValueError(
            f"the flow needs a finite γ at both ends; at the times {start:g} and {end:g} it is"
            f" {gammas.tolist()}; try a first time above 0 and a schedule with a finite end"
        )
    return gammas


TOLERANCE = 1e-4  # of the solver, by default
LOOSE = 10.0  # the looser tolerance in units of the requested one
STILL = 0.01  # change per dimension that is allowed where no error is stated, in its unit


def evaluate_flow(
    model: Model,
    x: Tensor | Batch,
    *,
    dequantiser: Dequantiser | None = None,
    tolerance: float = TOLERANCE,
    samples: int = 1,
    trace: Trace = "auto",
    first: float | None = None,
    replicates: int = 1,
    seed: int = 0,
    weights: str = "as given",
    split: str = "as given",
    track: Track = iter,
    resume: str | PathLike[str] | None = None,
) -> BoundEstimate:
    """Measure the mean bound on −log P(x|φ) by the probability flow over examples x.

    Args:
        model: the model; measured in evaluation mode with float64 around the network.
        x: examples in the space of the data, shape (N, *model.shape), or a `Batch`.
        dequantiser: q(z|x) at the first time: Encoder(), the default, for levels and real data;
            TruncatedNormal() and Uniform() for levels.
        tolerance: of the solver; the bound is measured at it and at 10 times it.
        samples: K draws of z per example, importance-weighted; more than 1 needs the exact trace.
        trace: exact, hutchinson (two probes per draw of z, whose error is stated), or auto: exact
            up to D = 16.
        first: time of z_1; the earliest of the schedule where left out.
        replicates: independent repetitions per example; two or more give a Monte Carlo error.
        seed: of everything random.
        weights: name of the weights, for the record.
        split: name of the data, for the record.
        track: wraps the blocks of examples, for a progress bar.
        resume: a file for what was measured so far, as for `evaluate`.

    Raises:
        ValueError: if the process is not Gaussian, the dequantiser is for other data, K < 1,
            or K > 1 with a random trace; or if the bound changes between the two tolerances by
            more than the standard error, so the solver is not precise enough.
    """
    check_samples(samples)
    process, exact = check_continuous(model), is_exact(model, trace)
    if samples > 1 and not exact:
        raise ValueError(
            f"{samples} importance samples need the exact trace: the noise of Hutchinson's would"
            " raise the mean of the weights, so the result would not be a bound; try trace='exact'"
        )
    dequantiser = Encoder() if dequantiser is None else dequantiser
    first = process.schedule.start if first is None else first
    tolerances = (LOOSE * tolerance, tolerance)
    for each in reversed(tolerances):
        check_flow(model, first, 1.0, each)

    def draw(batch: Batch) -> Tensor:
        rows = torch.arange(len(batch)).repeat_interleave(samples).split(min(BLOCK, model.rows))
        each = [
            _flow_weights(model, batch[part], dequantiser, first, exact, tolerances)
            for part in rows
        ]
        pairs = torch.cat([pair for pair, _ in each], 1).reshape(2, len(batch), samples)
        variance = torch.cat([of_probes for _, of_probes in each]).reshape(len(batch), samples)
        return torch.cat([log_mean(pairs), variance.mean(1)[None]])

    about = {"flow": dequantiser.name, "tolerance": tolerance, "importance samples": samples}
    about |= {"trace": exact, "first": first}
    (loose, tight, of_probes), record = draw_replicates(
        model, x, replicates, seed, track, draw, resume, about
    )
    how = FlowDetails(
        samples=samples,
        dequantiser=dequantiser.name,
        trace="exact" if exact else "hutchinson",
        first=first,
        tolerance=tolerance,
        loose_tolerance=tolerances[0],
        loose=-loose.mean().item() * scale_of(model),
        largest_change=(tight - loose).abs().max().item() * scale_of(model),
        probe_error=None if exact else _probe_error(of_probes) * scale_of(model),
    )
    found = record(tight, how, weights, split)
    _check_settled(found, how)
    return found


def _probe_error(variances: Tensor) -> float:
    """Return the stated error of the mean bound from its probes alone, nats, from the variance of
    each example's pair, (N, R), with one degree of freedom."""
    parts = variances.flatten() / variances.numel() ** 2
    return math.sqrt(parts.sum().item()) * widened(freedoms(parts, torch.ones_like(parts)))


def _check_settled(found: BoundEstimate, how: FlowDetails) -> None:
    """Raise a ValueError if the solver's error, which is not stated, exceeds the stated error."""
    stated = [found.standard_error.total, found.standard_error.monte_carlo]
    unknown = STILL * (found.dims if found.unit == "nats" else 1)
    error = next((e for e in stated if math.isfinite(e)), unknown)
    bound = found.value
    # if examples change independently, the mean changes by √N less than one of them
    for what, change, most in (
        ("the mean", abs(bound - how.loose), error),
        ("an example", how.largest_change, error * math.sqrt(found.examples)),
    ):
        if not change <= most:
            raise ValueError(
                "the solver has not settled the bound: between the tolerances"
                f" {how.loose_tolerance:g} and {how.tolerance:g} {what} changes by {change:.2g}"
                f" {found.unit}, more than the stated error of {most:.2g}; try a tolerance of"
                f" {how.tolerance / LOOSE:g}"
            )


def _flow_weights(
    model: Model,
    batch: Batch,
    dequantiser: Dequantiser,
    first: float,
    exact: bool,
    tolerances: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Return log p(z) + log P(x|z) − log q(z|x) at both tolerances, same z and probes, (2, B); and
    the variance of its probes, (B,)."""
    t = torch.full((len(batch),), first, dtype=torch.float64, device=batch.x.device)
    z, log_ratio = dequantiser(model, batch, t)
    probes = unit_probes(z) if exact else random_probes(z, 2)
    log_p = torch.stack(
        [
            log_density(
                model, z, first, probes, tolerance, batch.condition, apart=not exact
            ).reshape(-1, len(z))
            for tolerance in tolerances
        ]
    )
    # the mean of two has half the variance of one, which is half the square of their difference
    spread = (log_p[1, 0] - log_p[1, -1]) / 2
    return log_p.mean(1) + log_ratio, spread.square()
