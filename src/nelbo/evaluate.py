r"""One pass over a data set: the mean bound, its terms, its error, its price.

Each example is visited once per replicate r = 1..R, with its own draws of the terms and of z:

    L_ir = prior_i + Σ_cells cost_ir,      bound = mean_i mean_r L_ir

The draws, and what is taken off them, follow a pilot (`allocate`). They are stratified within
blocks of examples, so neighbours share strata, and the replicates of a block are what is
independent. Hence the two parts of the standard error:

    Monte Carlo   Σ_g (n_g/N)² var_r( mean_{i in block g} L_ir ) / R      another seed, same data
    data          ( var_i(mean_r L_ir) - mean_i(var_r(L_ir)/R) ) / N      other data, no noise

The number of network calls is counted at the network, the pilot's among them. Blocks are seeded
one by one, so any number of processes that share them give the same number.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nelbo._numerics import LOG_2, seeded
from nelbo._processes import divided, gather, world
from nelbo._progress import Track
from nelbo.allocate import Allocation, Cells, estimate, even, pilot, spread
from nelbo.control import Controls, Nothing
from nelbo.data import as_examples, fingerprint
from nelbo.elbo import Bound, prior_term
from nelbo.estimate import Continuum, Times
from nelbo.model import Model, counting, measuring, model_hash

BLOCKS = 32  # of examples that share strata, where there are enough: degrees of freedom
BLOCK = 32  # examples in one, at most
CALLS = 24  # network calls per example, if nothing else is asked for
PILOT = (1 / 8, 128)  # share of the calls, and rows of each cell, at most; but ..
LEAST = 16  # .. so many rows of each cell, where they take no more than half of the calls
FIRST = 0.5  # share of the calls foreseen for a target error that is spent at once
SCORED = 8  # replicates that give an example its own standard error


@dataclass(frozen=True)
class StandardError:
    """Of the mean bound; `total`² = `data`² + `monte_carlo`². NaN where it cannot be known."""

    total: float
    data: float
    monte_carlo: float


@dataclass(frozen=True)
class Terms:
    """The three terms; they add up to the bound."""

    prior: float
    reconstruction: float
    diffusion: float


@dataclass(frozen=True)
class CurvePoint:
    """What the times between t_from and t_to add to the diffusion term; error by Monte Carlo."""

    t_from: float
    t_to: float
    value: float
    standard_error: float


@dataclass(frozen=True)
class Evaluation:
    """The bound on −log P(x), mean over examples, and everything needed to obtain it again.

    Where the model was given conditions it is on −log P(x|c), and `given` names c.

    `nats` is per example. Standard errors, terms and curve are in `unit`: bits/dim for
    probabilities, nats for densities, which have no bits/dim.
    """

    bits_per_dim: float | None
    nats: float
    unit: str
    standard_error: StandardError
    terms: Terms
    examples: int
    dims: int
    calls_per_example: float
    steps: int | None
    seed: int
    weights: str
    split: str
    given: str
    precision: str
    model_hash: str
    data_hash: str
    processes: int
    curve: list[CurvePoint]
    per_example: Bound = field(repr=False, compare=False)
    per_example_error: Tensor = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON, without the terms per example; what is not finite is None."""
        empty = torch.empty(0)
        plain = asdict(
            replace(self, per_example=Bound(empty, empty, empty), per_example_error=empty)
        )
        del plain["per_example"], plain["per_example_error"]
        return {key: _finite(value) for key, value in plain.items()}

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Per example, in the order of the data, shape (N,), nats: the bound `nats` on
        -log P(x), its Monte Carlo `standard_error` and its three terms."""
        arrays = {name: term.numpy() for name, term in self.per_example._asdict().items()}
        error = self.per_example_error.numpy()
        return {"nats": -self.per_example.elbo.numpy(), "standard_error": error, **arrays}


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Plan:
    """How the calls for N examples are spent.

    Args:
        block: examples that share strata.
        pilot: rows in each cell of the pilot.
        replicates: R.
        draws: of each example in each replicate.
    """

    block: int
    pilot: int
    replicates: int
    draws: int


def plan(examples: int, calls: int, cells: int, scored: bool = False) -> Plan:
    """Spend `calls` network calls per example, at most, on the pilot and on the draws.

    Raises:
        ValueError: fewer calls than an error bar needs.
    """
    if calls < 2:
        raise ValueError(
            f"calls must be at least 2, the least that has an error bar; got {calls}; try 24"
        )
    rows = _pilot_rows(examples * calls, cells)
    # what the pilot takes is not left for the draws
    left = calls - math.ceil(rows * cells / examples)
    if left < max(2, calls / 2):
        rows, left = 0, calls
    # two, for strata as fine as can be; more, where examples alone give too few freedoms, ..
    # .. and without a pilot: more examples can share strata then, which do what it would
    many = scored or not rows or examples < 2 * BLOCKS
    replicates = min(left, SCORED if many else 2)
    if left == replicates + 1:
        replicates = left
    freedoms = replicates - 1 if not rows else 1
    block = max(1, min(BLOCK, examples * freedoms // BLOCKS))
    return Plan(block, rows, replicates, left // replicates)


def _pilot_rows(calls: float, cells: int) -> int:
    """Rows of each cell for a pilot of so many calls in all."""
    return min(PILOT[1], max(LEAST, int(PILOT[0] * calls / cells)))


def evaluate(
    model: Model,
    x: Tensor,
    *,
    times: Times | None = None,
    calls: int | None = None,
    target_error: float | None = None,
    per_example: bool = False,
    known: Tensor | None = None,
    variates: bool = True,
    seed: int = 0,
    weights: str = "as given",
    split: str = "as given",
    track: Track = iter,
) -> Evaluation:
    """The bound on -log P(x|φ), mean over the examples x, each visited exactly once.

    Args:
        model: the model; measured in evaluation mode with float64 around the network.
        x: examples in the space of the data, shape (N, *model.shape).
        times: Grid(times) for the bound of T steps; left out, continuous time.
        calls: network calls per example, at most; 24 where left out.
        target_error: in place of calls, the Monte Carlo standard error to be reached, in the unit
            of the result.
        per_example: more replicates of fewer draws, so that each example's own standard error
            has seven degrees of freedom.
        known: other examples of the same law, such as those trained on. The result is on x, and
            unbiased, whatever they are; control variates that were fitted to more are better.
        variates: take off each cost what is known of it without the network. To fit that to
            large images takes longer than some hundred calls of a small network.
        seed: everything random follows from it.
        weights: which weights these are, for the record.
        split: which data these are, for the record.
        track: wraps the blocks of examples, for a progress bar.

    Raises:
        ValueError: examples of another shape, too few calls, an impossible target.
    """
    times = Continuum(model.process.schedule.start) if times is None else times
    if len(x) == 0:
        raise ValueError("there must be at least one example to evaluate; got none")
    if target_error is not None and not (target_error > 0 and math.isfinite(target_error)):
        raise ValueError(f"target_error must be positive; got {target_error}; try 0.005")
    if target_error is not None and calls is not None:
        raise ValueError("give calls or target_error, not both")
    density = model.decoder.density
    scale = scale_of(model)
    cells = Cells(times)
    way = plan(len(x), CALLS if calls is None else calls, cells.count, per_example)
    if target_error is not None:
        way = replace(way, pilot=LEAST, draws=1)
    with measuring(model), counting(model.network) as calls_made:
        with seeded(seed, 0):
            target = None if target_error is None else target_error / scale
            controls: Controls = Nothing(model, cells.edges)
            if variates and way.pilot:
                controls = Controls(model, x if known is None else known, cells.edges)
            allocation, way = _learn(cells, controls, x, way, target)
        piloted = calls_made.forward
        turn, prior, costs = 0, torch.empty(0), torch.empty(len(x), 0, cells.count)
        while True:
            one = partial(_block, cells, controls, allocation, x, way, (seed, 1, turn))
            blocks = divided(math.ceil(len(x) / way.block), one, track)
            prior = torch.cat([known for known, _ in blocks])
            costs = torch.cat([costs, torch.cat([drawn for _, drawn in blocks])], 1)
            error = _standard_error((prior[:, None] + costs.sum(2)) * scale, way.block)
            if target_error is None or error.monte_carlo <= target_error:
                break
            turn += 1
            way = _next_round(way, error.monte_carlo, target_error, costs.shape[1])
        called = piloted + sum(gather(calls_made.forward - piloted))

    bound = Bound(prior, costs[..., 0].mean(1), costs[..., 1:].sum(2).mean(1))
    nats = -bound.elbo.mean().item()
    return Evaluation(
        bits_per_dim=None if density else nats * scale,
        nats=nats,
        unit="nats" if density else "bits/dim",
        standard_error=error,
        terms=Terms(*((term.mean() * scale).item() for term in bound)),
        examples=len(x),
        dims=model.dims,
        calls_per_example=called / len(x),
        steps=times.steps,
        seed=seed,
        weights=weights,
        split=split,
        given=model.given_what,
        precision=precision_of(model),
        model_hash=model_hash(model),
        data_hash=fingerprint(x),
        processes=world()[1],
        curve=_curve(cells, costs * scale, way.block),
        per_example=bound,
        per_example_error=(costs.sum(2).var(1) / costs.shape[1]).sqrt(),
    )


def scale_of(model: Model) -> float:
    """From nats per example to the unit of a result: bits/dim, or nats for densities."""
    return 1.0 if model.decoder.density else 1 / (model.dims * LOG_2)


def precision_of(model: Model) -> str:
    """In which arithmetic a bound was measured, for the record."""
    return f"float64 around {next(model.network.parameters()).dtype}".replace("torch.", "")


def _learn(
    cells: Cells, controls: Controls, x: Tensor, way: Plan, target: float | None
) -> tuple[Allocation, Plan]:
    """The pilot of a plan; for a target in nats, as large as the calls that it foresees allow."""
    if not way.pilot:
        # the reconstruction of an example once, if chance will
        return even(cells, controls, 1, 1 / (way.draws * way.replicates)), way
    allocation = pilot(cells, controls, x, way.pilot, way.draws, way.replicates)
    if target is None:
        return allocation, way
    calls = allocation.variance.item() / len(x) / target**2
    draws = max(1, math.ceil(FIRST * calls / way.replicates)) if math.isfinite(calls) else 1
    if draws == way.draws:
        return allocation, way
    # draws that stand nearer lend more, so the coefficients are others
    rows = _pilot_rows(len(x) * calls, cells.count)
    return _learn(cells, controls, x, replace(way, draws=draws, pilot=rows), None)


def _next_round(way: Plan, error: float, target: float, replicates: int) -> Plan:
    """The replicates that are missing, of as many draws each."""
    missing = replicates * ((error / target) ** 2 - 1)
    return replace(way, replicates=max(1, math.ceil(missing)))


def _block(
    cells: Cells,
    controls: Controls,
    allocation: Allocation,
    x: Tensor,
    way: Plan,
    place: tuple[int, ...],
    g: int,
) -> tuple[Tensor, Tensor]:
    """Of the g-th block of B examples: prior (B,) and costs (B, R, cells), nats."""
    model = controls.model
    with seeded(*place, g):
        rows = slice(g * way.block, (g + 1) * way.block)
        block = as_examples(x[rows]).to(model.device)
        last = torch.ones(len(block), dtype=torch.float64, device=model.device)
        prior = prior_term(model, block, last).double().cpu()
        u = torch.stack([spread(len(block), way.draws) for _ in range(way.replicates)], 1)
        return prior, estimate(cells, controls.at(rows), allocation, block, u)


def _monte_carlo(each: Tensor, block: int) -> float:
    """Standard error of the mean of each (N, R), in blocks whose replicates are independent."""
    examples, replicates = each.shape
    variance = sum(
        (len(part) / examples) ** 2 * part.mean(0).var().item() / replicates
        for part in each.split(block)
    )
    return math.sqrt(variance)


def _standard_error(each: Tensor, block: int) -> StandardError:
    """Of the mean of each (N, R)."""
    examples, replicates = each.shape
    monte_carlo = _monte_carlo(each, block)
    if examples == 1:
        return StandardError(math.nan, math.nan, monte_carlo)
    noise = each.var(1).mean() / replicates
    data = math.sqrt(max(0.0, (each.mean(1).var() - noise).item() / examples))
    return StandardError(math.hypot(data, monte_carlo), data, monte_carlo)


def _curve(cells: Cells, costs: Tensor, block: int) -> list[CurvePoint]:
    """The diffusion term over time, from the costs (N, R, cells)."""
    edges = cells.edges.tolist()
    return [
        CurvePoint(edges[c - 1], edges[c], costs[..., c].mean().item(), error)
        for c in range(1, cells.count)
        for error in [_monte_carlo(costs[..., c], block)]
    ]
