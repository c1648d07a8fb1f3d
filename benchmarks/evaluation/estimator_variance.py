"""Monte Carlo variance of the mean bound at equal network calls: nelbo's estimator and its peers.

    python benchmarks/evaluation/estimator_variance.py RUN [--examples N] [--seeds S]
        [--passes P] [--json out.json]

RUN is a run of `nelbo train`; its test split is measured, in continuous time. Calls are network
calls per example. Every example is fixed, so the variance is that of the draws alone.

    low-discrepancy     each call one time in each of N strata of the whole set (VDM)
    i.i.d.              a time for each call, uniform
    importance          i.i.d., density ∝ √E[L²] in 32 bins, weighted (OpenAI)
    importance, low-d.  the same density, times as low-discrepancy
    free reconstruction low-discrepancy, the reconstruction for nothing, in calls and in variance
    full sum            the bound of T = 1000 steps, a draw for each of its terms (OpenAI)
    nelbo               `allocation.estimate`, strata within blocks as in `nelbo.evaluate`;
                        controls from the training data, the run's own pilot on its validation
                        split

The reconstruction takes network calls too. The first four give it the share of their calls, of
SHARES, that turns out best for each: a stretch of the times. That share and what density they
need they know for nothing. nelbo's pilot is paid once per model, as `nelbo evaluate` does it, and
counted apart.

At n calls the first four have 1/n of the variance at one, which is measured in S passes. Low
discrepancy leaves what is neither an effect of the example nor one of time: the residual variance
of a two-way fit, the limit of infinitely fine strata. nelbo at n calls does as `nelbo
evaluate --calls n`, an error bar included: few calls are of a sample of the examples, some of it
twice; `survey` has the variance, whose parts are taken from P passes over all, by default
max(2, S/n); with 60 the errors are 4 %. Of the full sum's terms each example draws one, at
stratified places, and the reconstruction, twice: the mean half square of the differences, times
the number of terms. Its steps are Gaussian, as theirs.
The ± are relative errors, from the spread over examples or blocks. Peers' seconds are those of our
own network calls.

Below the table: what `nelbo evaluate` makes of its default calls; and, of the whole test split
whatever N is, how many it takes for a standard error of TARGET.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nelbo._utils.numerics import LOG_2, seeded
from nelbo.data import as_examples
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.elbo import reconstruction_term
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.reverse import Posterior
from nelbo.diffusion.times import ContinuousTime, TimeDiscretization, TimeGrid, iid, stratified
from nelbo.evaluation.allocation import Proposal, Strata, estimate
from nelbo.evaluation.control_variates import ControlVariates
from nelbo.evaluation.evaluate import evaluate
from nelbo.evaluation.result import Evaluation
from nelbo.evaluation.survey import SamplingPlan, plan
from nelbo.evaluation.time_density import time_density
from nelbo.evaluation.time_estimator import CALLS
from nelbo.runs import own_data
from nelbo.runs.loading import load
from nelbo.runs.pilot_cache import ROWS, Pilots
from nelbo.runs.run import Run

AT = (1, 2, 4, 16)  # calls per example
REFERENCE = "low-discrepancy"
BINS = 32  # of the density of importance
SHARES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)  # of the calls, for the reconstruction
WAVES = 16  # cosines that may describe how costs go with time
T = 1000
TARGET = 0.01  # bits/dim


@dataclass(frozen=True)
class Variance:
    """Variance of the test mean, nats²; `error` is relative."""

    value: float
    error: float

    @staticmethod
    def of(parts: Tensor) -> "Variance":
        """The sum of independent parts, and its error from their spread."""
        total = parts.sum().item()
        return Variance(total, math.sqrt(len(parts) * parts.var().item()) / total)

    def at(self, calls: int) -> "Variance":
        """Return the variance at `calls` independent calls, from that at one."""
        return Variance(self.value / calls, self.error)

    def __add__(self, other: "Variance") -> "Variance":
        """Return the variance of the sum of two independent numbers."""
        total = self.value + other.value
        each = (v.error * v.value for v in (self, other))
        return Variance(total, math.hypot(*each) / total)

    def over(self, other: "Variance") -> "Variance":
        return Variance(self.value / other.value, math.hypot(self.error, other.error))


@dataclass(frozen=True)
class Known:
    """Quantities that nelbo learns of a model before it measures."""

    strata: Strata
    controls: ControlVariates
    proposal: Proposal


@dataclass(frozen=True)
class Row:
    """A method at so many calls per example; seconds of a call with all around it."""

    method: str
    calls: int
    variance: Variance
    seconds: float


def independent(y: Tensor) -> Variance:
    """Return the variance of the mean over examples, each with one of its S draws; y (N, S)."""
    return Variance.of(y.var(1) / len(y) ** 2)


def low_discrepancy(y: Tensor, u: Tensor) -> Variance:
    """Return what an effect of each example and a smooth one of u (N, S) leave of y (N, S).

    Where u is negative y is the reconstruction, which has an effect of its own.
    """
    waves = torch.cos(math.pi * torch.arange(WAVES + 1) * u[..., None])
    waves = torch.where(u[..., None] < 0, 0.0, waves)
    design, left = waves - waves.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    flat, target = design.flatten(0, 1), left.flatten()
    # where nothing is a reconstruction the first column is zero
    known = torch.linalg.pinv(flat.T @ flat, hermitian=True) @ (flat.T @ target)
    left = (target - flat @ known).view_as(y)
    freedoms = y.numel() - len(y) - WAVES
    return Variance.of(left.square().sum(1) / freedoms / len(y))


def paying(y: Tensor, u: Tensor, decoded: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """y and u (N, S) with the reconstruction, of which `decoded` (N, S) are draws, at u = -1."""
    for share in SHARES:
        chosen = torch.rand_like(u) < share
        yield torch.where(chosen, decoded / share, y / (1 - share)), torch.where(chosen, -1.0, u)


def diffusion(model: Model, times: TimeDiscretization, x: Tensor, u: Tensor) -> Tensor:
    """Draws of the diffusion term at u (N, S), nats."""
    rows = x.repeat_interleave(u.shape[1], 0)
    parts = zip(rows.split(model.rows), u.flatten().split(model.rows), strict=True)
    found = [times.diffusion(model, Batch(a), b.to(a.device)).cpu() for a, b in parts]
    return torch.cat(found).view_as(u)


def warp(u: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Uniform draws to draws of a density even within bins of this mass; and 1/density."""
    ends = mass.cumsum(0)
    bin_ = torch.searchsorted(ends, u).clamp(max=len(mass) - 1)
    share = 1 - ((ends[bin_] - u) / mass[bin_]).clamp(0, 1)
    return ((bin_ + share) / len(mass)).clamp(max=1 - 2**-53), 1 / (mass[bin_] * len(mass))


def peers(model: Model, times: TimeDiscretization, x: Tensor, passes: int) -> dict[str, Variance]:
    """The first five at one call."""
    decoded = torch.stack([reconstruction(model, times, x) for _ in range(passes)], 1)
    u = iid(len(x), passes)
    y = diffusion(model, times, x, u)
    bins = (u * BINS).long().flatten()
    second = torch.zeros(BINS).double().index_add_(0, bins, y.square().flatten())
    mass = (second / bins.bincount(minlength=BINS)).sqrt()
    v = iid(len(x), passes)
    where, weight = warp(v, mass / mass.sum())
    weighted = weight * diffusion(model, times, x, where)

    def best(found: Iterator[Variance]) -> Variance:
        return min(found, key=lambda variance: variance.value)

    return {
        REFERENCE: best(low_discrepancy(*draws) for draws in paying(y, u, decoded)),
        "i.i.d.": best(independent(y) for y, _ in paying(y, u, decoded)),
        "importance": best(independent(y) for y, _ in paying(weighted, v, decoded)),
        "importance, low-d.": best(
            low_discrepancy(*draws) for draws in paying(weighted, v, decoded)
        ),
        "free reconstruction": low_discrepancy(y, u),
    }


def full_sum(model: Model, x: Tensor) -> Variance:
    """Return that of a draw of all T terms, from two draws of one and of the reconstruction."""
    grid = TimeGrid.uniform(T)
    # a Gaussian step, whose KL has no noise of its own, as theirs
    own, model.step = model.step, Posterior()
    step = diffusion(model, grid, x, stratified(len(x)).expand(-1, 2))
    model.step = own
    decode = torch.stack([reconstruction(model, grid, x) for _ in range(2)], 1)
    # each draw stands for all T - 1 terms: as a sum of so many its variance is that much less
    each = step.diff(dim=1).square() / 2 / grid.terms + decode.diff(dim=1).square() / 2
    return Variance.of(each[:, 0] / len(x) ** 2)


def reconstruction(model: Model, times: TimeDiscretization, x: Tensor) -> Tensor:
    """A draw of it for each example, (N,), nats."""
    first = torch.full((len(x),), times.first, dtype=torch.float64, device=x.device)
    parts = zip(x.split(model.rows), first.split(model.rows), strict=True)
    return torch.cat([reconstruction_term(model, a, t).cost.cpu() for a, t in parts])


def ours(known: Known, x: Tensor, calls: int, passes: int) -> Variance:
    """Return the variance of nelbo at `calls` calls per example."""
    sampling = plan(len(x), calls / known.controls.calls, many=False)
    phi = torch.cat([known.controls.between(some) for some in x.split(256)])
    known_costs = known.proposal.known(phi)
    blocks = torch.arange(len(x)).split(list(sampling.sizes))
    costs = _costs(known, x, known_costs, sampling, blocks, passes)
    parts = [costs[rows].mean(0).var() * (len(rows) / len(x)) ** 2 for rows in blocks]
    within = Variance.of(torch.stack(parts))
    whole, halves = sampling.sampled == len(sampling.sizes), 2 * sampling.again == sampling.draws
    if whole and (halves or not sampling.repeated):
        return within
    # (1 - n/N) s²/n, and n/N of the sample's w²/n, which is that of all; w² less by half where
    # an example is drawn twice
    sampled = sum(sampling.sizes[: sampling.sampled])
    again = sum(sampling.sizes[: sampling.repeated]) / sampled / 2
    left = costs - known_costs.sum(1, keepdim=True)
    square = (left - left.mean(0)).square().mean(1) - again * left.var(1)
    share = (1 - sampled / len(x)) / sampled
    twice = Variance((1 - again) * within.value, within.error)
    return twice + Variance.of(share * square / (len(x) - 1))


def _costs(
    known: Known,
    x: Tensor,
    known_costs: Tensor,
    sampling: SamplingPlan,
    blocks: Sequence[Tensor],
    passes: int,
) -> Tensor:
    """Return the mean of each example's replicates in each pass, (N, passes), nats.

    The prior is not random.
    """
    strata, controls, proposal = known.strata, known.controls, known.proposal
    found = []
    for _ in range(passes * sampling.replicates):
        u = torch.cat([_places(sampling, g, len(rows)) for g, rows in enumerate(blocks)])
        cost = estimate(strata, controls, proposal, Batch(x), u, known_costs)
        found.append(cost.sum(1))
    return torch.stack(found, 1).view(len(x), passes, sampling.replicates).mean(2)


def _places(sampling: SamplingPlan, g: int, rows: int) -> Tensor:
    """Uniform draws of a block, (rows, draws): in several replicates, if they share its draws."""
    each = sampling.draws_of(g)
    return torch.cat([stratified(rows, each) for _ in range(sampling.draws // each)], 1)


def learn(run: Run, times: TimeDiscretization, x: Tensor, trained: Tensor) -> Known:
    """Return the quantities that the run's own pilot settles."""
    strata, pilots = Strata(times, time_density(run.model, times, trained)), Pilots(run)
    controls = ControlVariates(run.model, trained, strata.edges)
    return Known(strata, controls, pilots(strata, controls))


def compare(run: Run, x: Tensor, trained: Tensor, passes: int, own: int | None) -> Iterator[Row]:
    """All methods, as they are measured; `own` are the passes of nelbo."""
    model, times = run.model, ContinuousTime(run.model.process.schedule.start)
    start = time.perf_counter()
    found = peers(model, times, x, passes)
    seconds = (time.perf_counter() - start) / (3 * passes * len(x))
    for name, variance in found.items():
        yield from (Row(name, n, variance.at(n), seconds) for n in AT)
    start = time.perf_counter()
    variance = full_sum(model, x)
    yield Row("full sum", T, variance, (time.perf_counter() - start) / (4 * len(x)))
    known = learn(run, times, x, trained)
    for n in AT:
        repeated = own or max(2, passes // n)
        start = time.perf_counter()
        variance = ours(known, x, n, repeated)
        each = known.controls.calls
        sampling = plan(len(x), n / each, many=False)
        calls = len(x) * each * sampling.draws * sampling.replicates * repeated
        seconds = (time.perf_counter() - start) / calls
        yield Row("nelbo", n, variance, seconds)


def evaluations(
    run: Run, x: Tensor, trained: Tensor, seeds: int, target: float | None = None
) -> list[Evaluation]:
    """As `nelbo evaluate` does it."""
    times = ContinuousTime(run.model.process.schedule.start)
    options = {"times": times, "known": trained, "pilots": Pilots(run), "target_error": target}
    return [evaluate(run.model, x, seed=seed, **options) for seed in range(seeds)]


def tell(rows: Iterator[Row], unit: float) -> tuple[list[dict[str, object]], Variance]:
    """Print the table row by row; its rows, and the variance of low discrepancy at one call."""
    columns = f"{'std, bits/dim':>14} {'ms/call':>8} {'per call':>9} {'±':>5} {'per second':>11}"
    print(f"{'':43} low-discrepancy's variance over it,\n{'method':20} {'calls':>5} {columns}")
    document: list[dict[str, object]] = []
    for row in rows:
        if row.method == REFERENCE and row.calls == 1:
            low = row
        std = math.sqrt(row.variance.value) / unit
        ratio = low.variance.at(row.calls).over(row.variance)
        per_second = ratio.value * low.seconds / row.seconds
        name = f"{row.method:20} {row.calls:5} {std:14.5f} {1000 * row.seconds:8.2f}"
        print(f"{name} {ratio.value:9.2f} {ratio.error:5.0%} {per_second:11.2f}", flush=True)
        numbers = {"std": std, "seconds": row.seconds, "per_call": ratio.value}
        errors = {"relative_error": ratio.error, "per_second": per_second}
        document.append({"method": row.method, "calls": row.calls} | numbers | errors)
    return document, low.variance


def spent(
    run: Run, x: Tensor, trained: Tensor, whole: Tensor, low: Variance, seeds: int, unit: float
) -> dict[str, float]:
    """Return the variance by `evaluate` with its calls for x, and that of the whole test split."""
    results = evaluations(run, x, trained, seeds)
    blocks = len(plan(len(x), CALLS / 2, many=False).sizes)  # of pairs
    value = sum((r.standard_error.monte_carlo * unit) ** 2 for r in results) / seeds
    variance = Variance(value, math.sqrt(2 / blocks / seeds))  # two replicates of each
    calls = results[0].calls_per_example
    ratio = low.at(CALLS).over(variance)
    std = math.sqrt(variance.value) / unit
    print(f"evaluate, {calls:.1f} calls: std {std:.5f} bits/dim; variance of low-discrepancy")
    print(f"  with as many over it: {ratio.value:.2f} ± {ratio.error:.0%}")
    reached = evaluations(run, whole, trained, 4 * seeds, TARGET)
    totals = torch.tensor([r.calls_per_example * len(whole) for r in reached], dtype=torch.float64)
    total, error = totals.mean().item(), (totals.std() / math.sqrt(len(totals))).item()
    fewer = T * len(whole) / total
    stated = math.sqrt(sum(r.standard_error.monte_carlo**2 for r in reached) / len(reached))
    print(f"evaluate, target_error {TARGET} of all {len(whole)} test examples:")
    print(f"  {total:.0f} ± {error:.0f} calls, the mean of")
    print(f"  {len(reached)} seeds ({totals.min():.0f} to {totals.max():.0f}), error {stated:.4f}")
    print(f"  bits/dim; the full sum takes {T * len(whole)} calls, {fewer:.0f} times")
    return {
        "evaluate_calls": calls,
        "evaluate_std": std,
        "evaluate_ratio": ratio.value,
        "evaluate_relative_error": ratio.error,
        "target_calls": total,
        "target_calls_error": error,
        "target_error": stated,
        "full_sum_over_target": fewer,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--examples", type=int)
    parser.add_argument("--seeds", type=int, default=32, help="S: passes of the peers")
    parser.add_argument("--passes", type=int, help="P: passes of nelbo")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    run = load(options.run)
    splits, model = own_data.load(run.config).splits, run.model
    x, trained = as_examples(splits["test"][: options.examples]), splits["train"]
    whole = splits["test"]
    unit = model.dims * LOG_2
    with measuring(model), seeded(0):
        rows, low = tell(compare(run, x, trained, options.seeds, options.passes), unit)
    summary = spent(run, x, trained, whole, low, max(1, options.seeds // 8), unit)
    if options.json:
        document = {"run": run.path.name, "examples": len(x), "seeds": options.seeds}
        document |= {"pilot_rows": ROWS, "rows": rows, "summary": summary}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
