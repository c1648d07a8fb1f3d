r"""The bound from draws over the time, for any process.

Each replicate of an example has its own draws of the terms and of z, which follow a pilot
(`allocation`); where the calls or the target error allow few draws of each, only a random sample
of the examples is drawn. `survey` computes the mean and its error. Network calls are counted at
the network, including those of a pilot unless it is kept: a run keeps one for all evaluations.

For a target error, the pilot, whose draws are not part of the mean, sets the number of draws; more
rounds follow only if the error is still above the target. Stopping at the mean's own error would
bias it, because draws that happen to miss rare large costs look sufficient.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, groupby

import torch
from torch import Tensor

from nelbo._utils.distributed import gather
from nelbo._utils.numerics import seeded, thinned
from nelbo._utils.progress import Track
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.elbo import prior_term
from nelbo.diffusion.model import Model, counting
from nelbo.diffusion.terms import ReconstructionTerm
from nelbo.diffusion.times import TimeDiscretization, stratified
from nelbo.evaluation.allocation import STRATA, Proposal, Strata, estimate, even, pilot
from nelbo.evaluation.blocks import map_blocks
from nelbo.evaluation.control_variates import STANDARD, ControlVariates
from nelbo.evaluation.intervals import OWN, as_replicates
from nelbo.evaluation.kept import Kept, Tasks, once
from nelbo.evaluation.price import BRIEF, FREE, OF_PILOT, Budget, around, fit_of, operations
from nelbo.evaluation.survey import (
    FEWEST,
    Estimate,
    SamplingPlan,
    SurveyEstimate,
    check_calls,
    plan,
)
from nelbo.evaluation.time_density import FITTED, time_density
from nelbo.evaluation.variate import together

#: returns the proposal of a pilot, from strata and controls
Pilots = Callable[[Strata, ControlVariates], Proposal]

CALLS = 24  # network calls per example by default
MANY = 1e9  # the same, at most
PILOT = 8  # rows per stratum of a pilot, at least
FEW = 4  # pairs of calls of a single example, at least, for an error
SHORT = (
    "so short a run has no pilot and no control variates, which would take more than a tenth of"
    " it; --variates or variates=True includes them"
)
LONGER = (
    "the run has {:.0f} network calls, so that its pilot and control variates are a tenth of it,"
    " where the target takes about {:.0f}; --variates or variates=True ends at the target"
)
FEW_STRATA = 6  # strata of the diffusion term, at least, for a pilot to be worth its calls
MUCH = 1 / 4  # share of the draws for the reconstruction without a pilot, at most


def estimate_times(
    model: Model,
    batch: Batch,
    times: TimeDiscretization,
    *,
    calls: float | None,
    target: float | None,
    per_example: bool,
    known: Tensor | None,
    pilots: Pilots | None,
    variates: bool | None,
    kept: Kept | None,
    seed: int,
    track: Track,
) -> Estimate:
    """Estimate the costs of the examples by draws over the time.

    The arguments are those of `evaluate`; `target` is in nats, and `kept` is the file to resume.
    """
    count, calls = len(batch), CALLS if calls is None else calls
    with counting(model.network) as made:
        tasks = None if kept is None else Tasks(kept, "draws", made)
        # those that the fits take
        others = batch.x[thinned(batch.order, FITTED)] if known is None else known
        had, density, before = pilots is not None, time_density(model, times, others), made.forward
        most = STRATA if had else STRATA // 2 if target else _strata_for(calls * count)
        strata, rows, left = Strata(times, density, most), PILOT, math.inf
        if target is None:
            rows, left = _divided(count, calls, strata.count, per_example, had)
        budget, seen, notes = None, rows * strata.count, list[str]()
        if not variates and not had:
            # how long a run to a target is, its pilot will say
            whole, free = (calls * count, 0.0) if target is None else (seen / OF_PILOT, FREE)
            # to standardise their numbers, for the pilot, and for what is known of each example
            each = min(len(others), STANDARD) + min(seen, count) + count
            # counted by a call, if it leaves enough of them for an error
            spare = left - 1 / count >= check_calls(calls, count, per_example)
            counted = partial(_operations, model, times, batch) if spare else lambda: 0.0
            beside = around(model.dims, model.head.numbers, together(model.dims))
            budget = Budget(each, whole, beside, counted, free, endless=target is not None)
            if rows and not budget.take(fit_of(strata.count)):
                notes.append(SHORT)
                # all calls are draws
                strata, rows, left = Strata(times, density), 0, left + seen / count
            if not rows:
                budget.free = BRIEF
        piloted = rows > 0 or had
        # fewer pairs would be too few for an error, of an example or of the mean of few
        few = max(2, 1 + (FEW - 1) / count) if count < 2 * FEWEST else 0
        pairs = left >= 2 * (OWN if per_example and count > 1 else few)
        with seeded(seed, 0):
            fitted_to = None if variates is False else others
            controls = ControlVariates(model, fitted_to, strata.edges, pairs, budget, piloted)
            draws = (left - (made.forward - before) / count) / controls.calls
            if piloted:
                make = pilots or partial(pilot, batch=batch, calls=rows)
                found = partial(make, strata, controls)
                parts = once(tasks, (seed, 0), torch.zeros(0), lambda: [*vars(found()).values()])
                proposal = Proposal(*parts)
            if target is not None:
                draws = _foreseen(proposal, count, target, per_example)
                _check_many(draws * controls.calls)
                if budget is not None:
                    whole, enough = budget.least(seen), seen + draws * count * controls.calls
                    if whole > 2 * enough:
                        notes.append(LONGER.format(whole, enough))
                    draws = max(draws, (whole - seen) / count / controls.calls)
            many, rounds = per_example or not piloted, target is not None
            sampling = plan(count, draws, many, level=not piloted, rounds=rounds)
            if not piloted:
                proposal = even(
                    strata, controls, _first_share(model, times, sampling, controls.calls)
                )
        begun = made.forward
        of_examples = _known(controls, proposal, batch)
        _check_prior(of_examples[:, 0])
        given = strata, controls, proposal, batch, of_examples
        # without a pilot there is one round, of all draws of an example
        alone = not piloted and max(sampling.sizes) == 1
        draw = partial(_draw, *given, sampling, alone, tasks=tasks)
        with seeded(seed, 2):
            order, turn = batch.order[torch.randperm(count)], 0
        blocks = order.split(list(sampling.sizes))
        # in a single step of masks nothing shows, and there is no noise
        single = times.steps == 1 and model.process.hides(torch.ones(1, dtype=torch.float64))
        size, share = torch.zeros(count) if single else None, sampling.again / sampling.draws
        costs = SurveyEstimate(blocks, [], of_examples, size, share)
        costs = costs.joined(draw(blocks, sampling.counts, (seed, 1, 0), track))
        while target is not None and costs.stated() > target:
            turn += 1
            costs = costs.joined(draw(blocks, costs.further(), (seed, 1, turn), track))
        called = (0 if pilots else begun) + sum(gather(made.forward - begun))
    return Estimate(costs, strata.edges, called, tuple(filter(None, [*notes, controls.note])))


def _operations(model: Model, times: TimeDiscretization, batch: Batch) -> float:
    """Return the floating-point operations of a network call, by a call of one example."""
    first = torch.full((1,), times.first, dtype=torch.float64, device=model.device)
    one = batch[torch.zeros(1, dtype=torch.long)].to(model.device)
    return operations(lambda: ReconstructionTerm(first).draw(model, one))


def _divided(
    examples: int, calls: float, strata: int, scored: bool, kept: bool
) -> tuple[int, float]:
    """Return the rows per stratum of a pilot, and the calls per example left for the draws.

    `kept`: there is a pilot from before, which takes no calls now. `scored`: each example needs an
    error of its own. A ValueError is raised if there are fewer calls than an error requires.
    """
    least = check_calls(calls, examples, scored)
    if calls >= 2:
        least, calls = 2.0, float(int(calls))
    # what n rows fail to show costs about 1/n of all calls, so n grows as their root
    affordable = int(OF_PILOT * examples * calls / strata)
    rows = min(affordable, max(PILOT, int(2 * math.sqrt(examples * calls / strata))))
    left = calls - rows * strata / examples
    return (0, calls) if kept or rows < PILOT or left < least else (rows, left)


def _strata_for(draws: float) -> int:
    """Return the number of strata, at most, of which a pilot may see enough beside the draws.

    Fewer strata with a pilot leave less variance than many without; too few are no use.
    """
    affordable = int(OF_PILOT * draws / PILOT) - 1
    return min(affordable, STRATA) if affordable >= FEW_STRATA else STRATA


def _foreseen(proposal: Proposal, examples: int, target: float, scored: bool) -> float:
    """Return the draws per example that a target error, nats, takes by what a pilot has seen."""
    variance, effect = proposal.variance.item(), proposal.effect.item()
    # (1 - n/N) s²/n + n/N w²/n = error², where s² is the variance and w² that less the effect
    wanted = variance / (target**2 * examples + effect)
    if wanted > 1:
        wanted = (variance - effect) / target**2 / examples
    # if no number of draws is enough, one round shows it
    wanted = wanted if math.isfinite(wanted) else 0.0
    return max(wanted, 2.0 if scored else 2 * min(1.0, FEWEST / examples))


def _check_many(calls: float) -> None:
    """Raise a ValueError if a target error takes more calls per example than can be made."""
    if calls > MANY:
        raise ValueError(
            f"the target error would take some {calls:.0e} network calls per example; try a"
            " larger one"
        )


def _first_share(
    model: Model, times: TimeDiscretization, sampling: SamplingPlan, calls: int
) -> float:
    """Return the share of the draws for the reconstruction without a pilot.

    It is drawn once for each example, on average, but less often if a draw takes several `calls`
    and there are few; and, if this changes the share little, an equal number of times in each
    replicate of a block; and never if it is certain.
    """
    first = torch.tensor([times.first], dtype=torch.float64, device=model.device)
    if model.process.shows(first):
        return 0.0
    once = 1 / (sampling.draws * sampling.replicates)
    in_block = sampling.sizes[0] * sampling.draws
    evenly = max(1, round(in_block * once)) / in_block
    return evenly if evenly <= MUCH else min(once, MUCH / calls)


def _check_prior(nats: Tensor) -> None:
    """Raise a ValueError for examples so large that float64 overflows and all costs are NaN."""
    # other costs are larger than the prior, and their squares overflow before its cube
    beyond = (~nats.pow(3).isfinite()).nonzero().flatten()
    if len(beyond):
        raise ValueError(
            f"example {int(beyond[0])} (counted from 0; {len(beyond)} in all) has values too large"
            " for its bound to be a number; leave it out, or correct it"
        )


def _known(controls: ControlVariates, proposal: Proposal, batch: Batch) -> Tensor:
    """Return the prior and the known part of each stratum's cost, (N, 1 + S), nats."""

    def part(some: Batch, g: int) -> Tensor:
        last = torch.ones(len(some), dtype=torch.float64, device=some.x.device)
        prior = prior_term(controls.model, some.x, last).double().cpu()
        return torch.cat([prior[:, None], proposal.known(controls.between(some.x))], 1)

    blocks = torch.arange(len(batch)).split(together(controls.model.dims))
    return torch.cat(map_blocks(controls.model, batch, blocks, (0,), part))


def _draw(
    strata: Strata,
    controls: ControlVariates,
    proposal: Proposal,
    batch: Batch,
    known: Tensor,
    sampling: SamplingPlan,
    alone: bool,
    blocks: Sequence[Tensor],
    counts: Mapping[int, int],
    seed: Sequence[int],
    track: Track,
    tasks: Tasks | None,
) -> dict[int, Tensor]:
    """Return the prior and the costs of the strata for some blocks, (B, R, 1 + S) each, nats.

    `known`, (N, 1 + S), is of all examples; `counts` has the number of replicates R of each block.
    The draws of blocks of one example, if they are `alone`, are independent, and R is the number
    `as_replicates` of them.
    """
    each = [g for g, replicates in counts.items() for _ in range(replicates)]
    groups: list[list[int]] = []
    for draws, alike in groupby(each, sampling.draws_of):
        some, size = [*alike], max(1, together(controls.model.dims) // (draws * len(blocks[0])))
        groups += [some[i : i + size] for i in range(0, len(some), size)]
    spread = sampling.draws if alone else 1
    rows = [torch.cat([blocks[g].repeat(spread) for g in group]) for group in groups]

    def costs_of(examples: Batch, task: int) -> list[Tensor]:
        sizes, of = [spread * len(blocks[g]) for g in groups[task]], known[rows[task]]
        draws = sampling.draws_of(groups[task][0]) // spread
        drawn = [stratified(n, draws) for n in sizes]
        u = torch.cat([v.sort(0).values for v in drawn] if alone else drawn)
        costs = estimate(strata, controls, proposal, examples, u, of[:, 1:])
        return list(torch.cat([of[:, :1], costs], 1).split(sizes))

    found: dict[int, list[Tensor]] = {g: [] for g in counts}
    costs = map_blocks(controls.model, batch, rows, seed, costs_of, track, tasks)
    for g, of_block in zip(each, chain.from_iterable(costs), strict=True):
        found[g].append(of_block)
    if alone:
        return {g: as_replicates(torch.stack(parts))[None] for g, parts in found.items()}
    return {g: torch.stack(replicates, 1) for g, replicates in found.items()}
