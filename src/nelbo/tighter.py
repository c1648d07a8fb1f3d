r"""One pass over a data set for a bound tighter than one ELBO, with its error and its price.

    evaluate_importance   L_K = E log 1/K Σ_k P(x,z^k)/q(z^k|x) on a grid of T times: K T calls
    evaluate_flow         E log 1/K Σ_k p(z^k) P(x|z^k)/q(z^k|x), z at the first time, p(z) by the
                          probability flow: the law of the deterministic sampler, another model
                          than the ancestral one

Each example is visited once, in R independent replicates; examples are independent of each other,
and blocks of them are seeded one by one, so any number of processes that share them give the same:

    total²       = var_i( mean_r L_ir ) / N           what another seed and other data change
    Monte Carlo² = mean_i( var_r L_ir ) / (N R)       what another seed changes; unknown if R = 1
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from nelbo._checks import as_tensor
from nelbo._numerics import seeded
from nelbo._processes import divided, gather, world
from nelbo._progress import Track
from nelbo.data import as_examples, fingerprint
from nelbo.dequantise import Dequantiser, Encoder, check_gaussian
from nelbo.estimate import Times
from nelbo.evaluate import precision_of, scale_of
from nelbo.flow import (
    Trace,
    check_flow,
    is_exact,
    log_density,
    random_probes,
    unit_probes,
)
from nelbo.importance import check_grid, check_samples, importance_weights, log_mean
from nelbo.intervals import freedoms, widened
from nelbo.model import Model, counting, measuring, model_hash
from nelbo.visits import StandardError

BLOCK = 64  # examples that are seeded together
TOLERANCE = 1e-4  # of the solver
LOOSE = 10.0  # the looser tolerance is this many times the one asked for
STILL = 0.01  # of the result per dimension, that an example may change where no error is stated


@dataclass(frozen=True)
class ByImportance:
    """K paths on a grid of T times. `weight_share` is the mean of (Σw)²/(K Σw²): 1 where all paths
    weigh the same, 1/K where one carries all."""

    samples: int
    steps: int
    weight_share: float


@dataclass(frozen=True)
class ByFlow:
    """The probability flow at the tighter of two tolerances.

    The bound at the looser one, on the same draws, is `loose`; `largest_change` is the most that
    any example's changed between them; both in the unit of the result.
    """

    samples: int
    dequantiser: str
    trace: str
    first: float
    tolerance: float
    loose_tolerance: float
    loose: float
    largest_change: float


@dataclass(frozen=True)
class Tighter:
    """A bound on −log P(x), mean over examples, and everything needed to obtain it again.

    `nats` is per example; standard errors are in `unit`: bits/dim for probabilities, nats for
    densities, which have no bits/dim. Calls are rows through the network, forward and backward,
    per example, all that were spent.
    """

    bits_per_dim: float | None
    nats: float
    unit: str
    standard_error: StandardError
    how: ByImportance | ByFlow
    examples: int
    dims: int
    replicates: int
    calls_per_example: float
    backward_calls_per_example: float
    seed: int
    weights: str
    split: str
    given: str
    precision: str
    model_hash: str
    data_hash: str
    processes: int
    #: the lower bound on log P(x), shape (N,), nats, mean of the replicates
    per_example: Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON, without the bounds per example; what is not known is None."""
        plain = asdict(replace(self, per_example=torch.empty(0)))
        del plain["per_example"]
        error = plain["standard_error"]
        plain["standard_error"] = {k: v if math.isfinite(v) else None for k, v in error.items()}
        return plain


def evaluate_importance(
    model: Model,
    x: Tensor,
    *,
    times: Times,
    samples: int,
    replicates: int = 1,
    seed: int = 0,
    weights: str = "as given",
    split: str = "as given",
    track: Track = iter,
) -> Tighter:
    """L_K, the K-sample importance-weighted bound on −log P(x|φ), mean over the examples x.

    Args:
        model: the model; measured in evaluation mode with float64 around the network.
        x: examples in the space of the data, shape (N, *model.shape).
        times: Grid(times).
        samples: K; K T network calls per example and replicate.
        replicates: independent draws of L_K per example; from two the Monte Carlo error follows.
        seed: everything random follows from it.
        weights: which weights these are, for the record.
        split: which data these are, for the record.
        track: wraps the blocks of examples, for a progress bar.

    Raises:
        ValueError: no grid, K < 1, or examples of another shape.
    """
    check_samples(samples)
    grid = check_grid(times)

    def draw(model: Model, x: Tensor) -> Tensor:
        log_w = importance_weights(model, x, grid, samples)
        return torch.stack([log_mean(log_w), (2 * log_mean(log_w) - log_mean(2 * log_w)).exp()])

    (bound, share), record = _visit(model, x, replicates, seed, track, draw)
    how = ByImportance(samples, len(grid.times), share.mean().item())
    return record(bound, how, weights, split)


def evaluate_flow(
    model: Model,
    x: Tensor,
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
) -> Tighter:
    """The bound on −log P(x|φ) by the probability flow, mean over the examples x.

    Args:
        model: the model; measured in evaluation mode with float64 around the network.
        x: examples in the space of the data, shape (N, *model.shape).
        dequantiser: q(z|x) at the first time: Encoder(), the default, for levels and real data;
            TruncatedNormal() and Uniform() for levels.
        tolerance: of the solver; the bound is stated at it and at 10 times it.
        samples: K draws of z per example, importance-weighted; more than 1 needs the exact trace.
        trace: exact, hutchinson (one probe per draw of z), or auto: exact up to D = 16.
        first: time of z_1; left out, the earliest of the schedule.
        replicates: independent repetitions per example; from two the Monte Carlo error follows.
        seed: everything random follows from it.
        weights: which weights these are, for the record.
        split: which data these are, for the record.
        track: wraps the blocks of examples, for a progress bar.

    Raises:
        ValueError: no Gaussian process, a dequantiser of other data, K < 1, K > 1 with a random
            trace, no torchode; or an example's bound that changes between the two tolerances by
            more than the standard error of the mean: the solver has not settled what it is.
    """
    check_samples(samples)
    process, exact = check_gaussian(model), is_exact(model, trace)
    if samples > 1 and not exact:
        raise ValueError(
            f"{samples} importance samples need the exact trace: the noise of Hutchinson's would"
            " raise the mean of the weights, and the result be no bound; try trace='exact'"
        )
    dequantiser = Encoder() if dequantiser is None else dequantiser
    first = process.schedule.start if first is None else first
    tolerances = (LOOSE * tolerance, tolerance)
    for each in tolerances:
        check_flow(model, first, 1.0, each)

    def draw(model: Model, x: Tensor) -> Tensor:
        rows = torch.arange(len(x)).repeat_interleave(samples).split(min(BLOCK, model.rows))
        each = [
            _flow_weights(model.at(part), x[part], dequantiser, first, exact, tolerances)
            for part in rows
        ]
        return log_mean(torch.cat(each, 1).reshape(2, len(x), samples))

    (loose, tight), record = _visit(model, x, replicates, seed, track, draw)
    how = ByFlow(
        samples=samples,
        dequantiser=dequantiser.name,
        trace="exact" if exact else "hutchinson",
        first=first,
        tolerance=tolerance,
        loose_tolerance=tolerances[0],
        loose=-loose.mean().item() * scale_of(model),
        largest_change=(tight - loose).abs().max().item() * scale_of(model),
    )
    found = record(tight, how, weights, split)
    _check_settled(found, how)
    return found


def _check_settled(found: Tighter, how: ByFlow) -> None:
    """The solver's own error is none of those stated, so it must be the smaller one."""
    stated = [found.standard_error.total, found.standard_error.monte_carlo]
    unknown = STILL * (found.dims if found.unit == "nats" else 1)
    error = next((e for e in stated if math.isfinite(e)), unknown)
    bound = found.nats if found.bits_per_dim is None else found.bits_per_dim
    # what one example may change by is what the mean may, of so many that change independently
    for what, change, most in (
        ("the mean", abs(bound - how.loose), error),
        ("an example", how.largest_change, error * math.sqrt(found.examples)),
    ):
        if not change <= most:
            raise ValueError(
                "the solver has not settled the bound: between the tolerances"
                f" {how.loose_tolerance:g} and {how.tolerance:g} {what} changes by {change:.2g}"
                f" {found.unit}, more than an error of {most:.2g} that is stated of it; try a"
                f" tolerance of {how.tolerance / LOOSE:g}"
            )


def _flow_weights(
    model: Model,
    x: Tensor,
    dequantiser: Dequantiser,
    first: float,
    exact: bool,
    tolerances: tuple[float, float],
) -> Tensor:
    """log p(z) + log P(x|z) − log q(z|x) at both tolerances for the same z and probes; (2, B)."""
    t = torch.full((len(x),), first, dtype=torch.float64, device=x.device)
    z, log_ratio = dequantiser(model, x, t)
    probes = unit_probes(z) if exact else random_probes(z)
    log_p = [log_density(model, z, first, probes, tolerance) for tolerance in tolerances]
    return torch.stack(log_p) + log_ratio


Record = Callable[[Tensor, ByImportance | ByFlow, str, str], Tighter]


def _visit(
    model: Model,
    x: Tensor,
    replicates: int,
    seed: int,
    track: Track,
    draw: Callable[[Model, Tensor], Tensor],
) -> tuple[Tensor, Record]:
    """draw (M, B) of every example and replicate, shape (M, N, R), and what makes the record."""
    x = as_tensor(x)
    if len(x) == 0:
        raise ValueError("there must be at least one example to evaluate; got none")
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1; got {replicates}")
    blocks = torch.arange(len(x)).split(BLOCK)

    def one(g: int) -> Tensor:
        with seeded(seed, g):
            rows = blocks[g].repeat_interleave(replicates)
            each = draw(model.at(rows), as_examples(x[rows]).to(model.device)).double().cpu()
        return each.reshape(len(each), -1, replicates)

    with measuring(model, x), counting(model.network) as calls:
        found = torch.cat(divided(len(blocks), one, track), 1)
    every = gather((calls.forward, calls.backward))
    forward, backward = (sum(each) for each in zip(*every, strict=True))

    def record(each: Tensor, how: ByImportance | ByFlow, weights: str, split: str) -> Tighter:
        nats, density = -each.mean().item(), model.decoder.density
        return Tighter(
            bits_per_dim=None if density else nats * scale_of(model),
            nats=nats,
            unit="nats" if density else "bits/dim",
            standard_error=_standard_error(each * scale_of(model)),
            how=how,
            examples=len(x),
            dims=model.dims,
            replicates=replicates,
            calls_per_example=forward / len(x),
            backward_calls_per_example=backward / len(x),
            seed=seed,
            weights=weights,
            split=split,
            given=model.given_what,
            precision=precision_of(model),
            model_hash=model_hash(model),
            data_hash=fingerprint(x),
            processes=world()[1],
            per_example=each.mean(1),
        )

    return found, record


def _standard_error(each: Tensor) -> StandardError:
    """Of the mean of each (N, R), independent in both; widened as far as few tell of it."""
    examples, replicates = each.shape
    total = each.mean(1).var().item() / examples if examples > 1 else math.nan
    own = each.var(1) / replicates if replicates > 1 else torch.full_like(each[:, 0], math.nan)
    noise = own.mean().item() / examples
    known = freedoms(own, torch.full_like(own, replicates - 1.0))
    data = max(0.0, total - noise) if replicates > 1 else math.nan
    width = widened(examples - 1.0)
    return StandardError(
        math.sqrt(total) * width, math.sqrt(data) * width, math.sqrt(noise) * widened(known)
    )
