r"""The mean bound of a data set, its terms, its error and its cost in network calls.

Each example is visited once per replicate, with its own draws of the terms and of z, which follow
a pilot (`allocation`); where the calls or the target error allow few draws of each, only a random
sample of the examples is visited. `survey` computes the mean and its error. Network calls are
counted at the network, including those of a pilot unless it was kept from before. Each block of
examples has its own seed, so the result does not depend on the number of processes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, groupby

import torch
from torch import Tensor

from nelbo._utils.distributed import gather
from nelbo._utils.numerics import seeded
from nelbo._utils.progress import Track
from nelbo._utils.scalars import integer
from nelbo.data.sources import Source
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.elbo import prior_term
from nelbo.diffusion.model import Model, counting, measuring
from nelbo.diffusion.times import TimeDiscretization, stratified, times_of
from nelbo.evaluation.allocation import Proposal, Strata, estimate, even, pilot, visits
from nelbo.evaluation.blocks import check_not_empty, map_blocks, measurement, scale_of
from nelbo.evaluation.coercion import batch_of
from nelbo.evaluation.control_variates import ControlVariates, NoControlVariates
from nelbo.evaluation.masks import check_two_levels, evaluate_masks, exact_counts
from nelbo.evaluation.result import CurvePoint, Evaluation, Terms
from nelbo.evaluation.survey import FEWEST, LEAST, SamplingPlan, SurveyEstimate, first_round, plan
from nelbo.evaluation.time_density import time_density

#: returns the allocation of a pilot, from cells, controls, draws and replicates
Pilots = Callable[[Strata, ControlVariates, int, int], Proposal]

CALLS = 24  # network calls per example by default
AT_ONCE = 1024  # examples per task for costs known without the network
FARTHEST = 1e140  # nats of the prior beyond which squares of other costs overflow
MUCH = 1 / 4  # share of the draws for the reconstruction without a pilot, at most
TOGETHER = 128  # draws per task, of several small blocks


def evaluate(
    model: Model,
    x: Source | Batch,
    *,
    steps: int | None = None,
    times: TimeDiscretization | None = None,
    calls: float | None = None,
    target_error: float | None = None,
    per_example: bool = False,
    known: Tensor | None = None,
    pilots: Pilots | None = None,
    variates: bool = True,
    surrogate: Model | None = None,
    seed: int = 0,
    weights: str = "as given",
    split: str = "as given",
    track: Track = iter,
) -> Evaluation:
    """Measure the mean bound on -log P(x|φ) over the examples x.

    All examples are visited equally, or, if the calls or the target error allow few draws of each,
    a random sample: with fewer than two calls per example, or, after a kept pilot and with some
    hundred examples or more, fewer than eight.

    Args:
        model: the model; measured in evaluation mode with float64 around the network.
        x: examples in the space of the data, (N, *model.shape), of any kind in
            `nelbo.data.coerce`; or a `Batch` of examples and conditions.
        steps: T, for the bound of T steps on the model's even grid; continuous time by default.
        times: TimeGrid(times) in place of these steps.
        calls: network calls per example, at most; 24 where left out. If not all examples are
            visited, the Monte Carlo error includes the variance of the sampling.
        target_error: in place of calls, the Monte Carlo standard error to reach, in the unit of
            the result.
        per_example: visit all examples, in more replicates of fewer draws, for a better standard
            error of each example.
        known: other examples of the same distribution, such as the training data, to which
            control variates are fitted. More of them reduce the variance; the result is the
            bound of x, and unbiased, whatever they are.
        pilots: returns the allocation of a pilot of this model, for the cells, the controls of
            `known`, draws and replicates: `runs.pilot_cache`. Its calls are not counted.
        variates: use control variates. For large images their fit takes longer than some hundred
            calls of a small network.
        surrogate: a cheaper masked model of the same symbols, for a masked model in continuous
            time: it reads the same masks and many more, and the model is asked for the difference
            alone (`masks`). The result is unbiased, whatever it is; its calls are not counted.
        seed: of everything random.
        weights: name of the weights, for the record.
        split: name of the data, for the record.
        track: wraps the blocks of examples, for a progress bar.

    Raises:
        ValueError: if the examples are not of the model, a model of P(x|c) lacks conditions, there
            are too few calls, or the target error is impossible.
    """
    seed = integer("seed", seed, 0)
    batch, times = batch_of(model, x), times_of(model, times, steps)
    check_not_empty(batch)
    count = len(batch)
    if target_error is not None and not (target_error > 0 and math.isfinite(target_error)):
        raise ValueError(f"target_error must be positive; got {target_error}; try 0.005")
    if target_error is not None and calls is not None:
        raise ValueError("give calls or target_error, not both")
    if surrogate is not None or _has_masks(model, times, calls, target_error):
        if surrogate is not None:
            check_two_levels(model, surrogate, times, target_error)
        return evaluate_masks(
            model,
            batch,
            calls=CALLS if calls is None else calls,
            surrogate=surrogate,
            per_example=per_example,
            variates=variates,
            seed=seed,
            weights=weights,
            split=split,
            track=track,
        )
    scale = scale_of(model, batch)
    with measuring(model, batch), counting(model.network) as calls_made:
        others = batch.x if known is None else known
        cells = Strata(times, time_density(model, times, others))
        kept = pilots is not None
        way = plan(count, CALLS if calls is None else calls, cells.count, per_example, kept)
        target = None if target_error is None else target_error / scale
        if target is not None:
            way = replace(way, pilot=0 if kept else LEAST, draws=1)
            if count > FEWEST and not per_example:
                way = replace(way, replicates=1, draws=2)
        with seeded(seed, 0):
            controls: ControlVariates = NoControlVariates(model, cells.edges)
            if variates and (way.pilot or kept):
                controls = ControlVariates(model, others, cells.edges)
            learn = partial(_learn, cells, controls, batch, pilots)
            allocation = learn(way)
            if target is not None:
                of_visit = visits(way.draws, controls)[1]
                foreseen = allocation.variance.item() * of_visit / count / target**2
                wanted = first_round(way, count, foreseen, cells.count, per_example)
                if (wanted.draws, wanted.replicates) != (way.draws, way.replicates):
                    # nearer draws are better contexts, so the coefficients change
                    allocation = learn(wanted)
                way = wanted
        begun = calls_made.forward
        known_costs = _known(controls, allocation, batch)
        _check_prior(known_costs[:, 0])
        visit = partial(
            _visit, cells, controls, allocation, batch, known_costs, seed=seed, track=track
        )
        order = torch.arange(count) if way.visited == count else _order(count, seed)
        blocks = order.split(way.block)
        there = range(math.ceil(way.visited / way.block))
        some = {g: way.replicates + (g < way.repeated) for g in there}
        found, turn = (
            SurveyEstimate(blocks, [], known_costs).joined(visit(blocks, some, way.draws, 0)),
            0,
        )
        while target is not None and found.monte_carlo() > 0 and not found.stated() <= target:
            turn += 1
            found = found.joined(visit(blocks, found.missing(target), way.draws, turn))
        called = (0 if kept else begun) + sum(gather(calls_made.forward - begun))

    nats, columns = found.mean(), (slice(0, 1), slice(1, 2), slice(2, None))
    record = measurement(
        model, batch, nats, found.error(), called, seed=seed, weights=weights, split=split
    )
    return Evaluation(
        **vars(record),
        terms=Terms(*(scale * found.mean(some) for some in columns)),
        visited=len(found.rows),
        steps=times.steps,
        curve=_curve(cells, found, scale),
        per_example=found.bound,
        per_example_error=found.error_of_each,
        notes=(*model.notes(batch), *filter(None, [controls.note])),
    )


def _has_masks(
    model: Model, times: TimeDiscretization, calls: float | None, target_error: float | None
) -> bool:
    """Return whether to draw masks with exact counts: for texts of tokens."""
    enough = target_error is None and (calls is None or calls >= 2)
    return model.any_length and enough and exact_counts(model, times)


def _learn(
    cells: Strata,
    controls: ControlVariates,
    batch: Batch,
    pilots: Pilots | None,
    way: SamplingPlan,
) -> Proposal:
    """Return the allocation of a kept pilot, of the pilot of a plan, or of none."""
    if pilots is not None:
        return pilots(cells, controls, way.draws, way.replicates)
    if way.pilot:
        return pilot(cells, controls, batch, way.pilot, way.draws, way.replicates)
    # the reconstruction once per example, on average; and, if this changes the share little, an
    # equal number of times in each replicate of a block
    once, strata = 1 / (way.draws * way.replicates), way.block * way.draws
    evenly = max(1, round(strata * once)) / strata
    return even(cells, controls, 1, evenly if evenly <= MUCH else min(once, MUCH))


def _order(examples: int, seed: int) -> Tensor:
    """Return a random order of the examples, of which the first are the sample."""
    with seeded(seed, 2):
        return torch.randperm(examples)


def _check_prior(nats: Tensor) -> None:
    """Raise a ValueError for examples so large that float64 overflows and all costs are NaN."""
    beyond = (~(nats < FARTHEST)).nonzero().flatten()
    if len(beyond):
        raise ValueError(
            f"example {int(beyond[0])} (counted from 0; {len(beyond)} in all) has values too large"
            " for its bound to be a number; leave it out, or correct it"
        )


def _known(controls: ControlVariates, allocation: Proposal, batch: Batch) -> Tensor:
    """Return the prior and the known part of each cell's cost, (N, 1 + C), nats."""

    def part(some: Batch, g: int) -> Tensor:
        last = torch.ones(len(some), dtype=torch.float64, device=some.x.device)
        prior = prior_term(controls.model, some.x, last).double().cpu()
        return torch.cat([prior[:, None], allocation.known(controls.between(some.x))], 1)

    blocks = torch.arange(len(batch)).split(AT_ONCE)
    return torch.cat(map_blocks(controls.model, batch, blocks, (0,), part))


def _visit(
    cells: Strata,
    controls: ControlVariates,
    allocation: Proposal,
    batch: Batch,
    known: Tensor,
    blocks: Sequence[Tensor],
    some: Mapping[int, int],
    draws: int,
    turn: int,
    *,
    seed: int,
    track: Track,
) -> dict[int, Tensor]:
    """Return the prior and the costs of the cells for some blocks, (B, R, 1 + C) each, nats.

    Args:
        cells: the strata.
        controls: the control variates.
        allocation: from a pilot.
        batch: all examples.
        known: their known costs, (N, 1 + C).
        blocks: rows of each block, (B,).
        some: number of replicates R of each block to visit.
        draws: of each example in each replicate.
        turn: number of this round.
        seed: of everything random.
        track: wraps the tasks, for a progress bar.
    """
    times, each = visits(draws, controls)
    tasks = list(_tasks(some, draws * len(blocks[0])))

    rows = [torch.cat([blocks[g] for g in together]) for together, _ in tasks]

    def visited(examples: Batch, task: int) -> list[Tensor]:
        together, replicates = tasks[task]
        sizes, of = [len(blocks[g]) for g in together], known[rows[task]]
        u = torch.cat([_strata(size, replicates, times) for size in sizes])
        costs = estimate(cells, controls, allocation, examples, u, each, of[:, 1:])
        prior = of[:, :1, None].expand(-1, replicates, -1)
        return list(torch.cat([prior, costs], 2).split(sizes))

    found = map_blocks(controls.model, batch, rows, (seed, 1, turn), visited, track)
    return dict(zip(some, chain.from_iterable(found), strict=True))


def _strata(examples: int, replicates: int, times: int) -> Tensor:
    """Draw uniform u, stratified within each replicate, (examples, replicates, times)."""
    return torch.stack([stratified(examples, times) for _ in range(replicates)], 1)


def _tasks(some: Mapping[int, int], draws: int) -> Iterator[tuple[list[int], int]]:
    """Yield tasks of neighbouring blocks with equal replicates, and their number of replicates.

    A task has about TOGETHER draws, of which a replicate of a block takes `draws`.
    """
    for replicates, alike in groupby(some, key=lambda g: some[g]):
        blocks = list(alike)
        size = max(1, TOGETHER // (draws * replicates))
        for first in range(0, len(blocks), size):
            yield blocks[first : first + size], replicates


def _curve(cells: Strata, found: SurveyEstimate, scale: float) -> list[CurvePoint]:
    """Return the diffusion term over time."""
    edges = cells.edges.tolist()
    return [
        CurvePoint(edges[c - 1], edges[c], scale * found.mean(one), scale * found.stated(one))
        for c in range(1, cells.count)
        for one in [slice(1 + c, 2 + c)]
    ]
