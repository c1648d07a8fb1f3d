r"""The mean bound of a data set, its terms, its error and its cost in network calls.

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
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from nelbo._utils.distributed import gather
from nelbo._utils.numerics import seeded
from nelbo._utils.progress import Track
from nelbo._utils.scalars import integer
from nelbo.data.schema import fingerprint
from nelbo.data.sources import Source
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.elbo import prior_term
from nelbo.diffusion.model import Model, counting, measuring, model_hash
from nelbo.diffusion.terms import ReconstructionTerm
from nelbo.diffusion.times import TimeDiscretization, stratified, times_of
from nelbo.evaluation.allocation import STRATA, Proposal, Strata, estimate, even, pilot
from nelbo.evaluation.blocks import check_not_empty, described, map_blocks, measurement, scale_of
from nelbo.evaluation.coercion import batch_of
from nelbo.evaluation.control_variates import ControlVariates
from nelbo.evaluation.intervals import OWN
from nelbo.evaluation.kept import Tasks, keeping
from nelbo.evaluation.masks import check_masks, evaluate_masks, exact_counts
from nelbo.evaluation.price import Budget, operations
from nelbo.evaluation.result import CurvePoint, Evaluation, Terms
from nelbo.evaluation.survey import FEWEST, SamplingPlan, SurveyEstimate, plan
from nelbo.evaluation.time_density import FITTED, time_density

#: returns the proposal of a pilot, from strata and controls
Pilots = Callable[[Strata, ControlVariates], Proposal]

CALLS = 24  # network calls per example by default
PILOT = 16  # rows per stratum of a pilot, at least
FEW = 4  # pairs of calls of a single example of symbols, at least, for an error
#: share of the calls for a pilot that is not kept; with its fit and `price.SHARE`, a tenth
OF_PILOT = 1 / 15
FEW_STRATA = 3  # strata of the diffusion term, at least, for a pilot to be worth its calls
MANY = 1e9  # network calls of an example, at most
MUCH = 1 / 4  # share of the draws for the reconstruction without a pilot, at most
TASK = 256  # draws, or examples, whose results are computed together


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
    variates: bool | None = None,
    surrogate: Model | None = None,
    masks: str | None = None,
    resume: str | PathLike[str] | None = None,
    seed: int = 0,
    weights: str = "as given",
    split: str = "as given",
    track: Track = iter,
) -> Evaluation:
    """Measure the mean bound on -log P(x|φ) over the examples x.

    All examples are measured equally often, or, if the calls or the target error allow few draws
    of each, a random sample: with fewer than two calls per example, or, after a kept pilot and
    with some hundred examples or more, fewer than eight.

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
        pilots: returns the proposal of a pilot of this model, for the strata and the controls of
            `known`: `runs.pilot_cache`. Its calls are not counted.
        variates: use control variates; by default, where no pilot is kept, those that take at most
            2.5 % of the operations of the network (`price`), which a note says.
        surrogate: a cheaper masked model of the same symbols, for a masked model in continuous
            time: it reads the same masks and many more, and the model is called only for
            the difference (`masks`). The result is unbiased for any surrogate; its calls are not
            counted.
        masks: for a masked model in continuous time: the estimator, plain, unigram, draws or
            two-levels, which needs a surrogate; by default a pilot chooses for texts of tokens.
        resume: a file for what was measured so far; with the file of an evaluation that was
            interrupted, it continues where that stood, with exactly the same result.
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
    if target_error is not None and not (target_error > 0 and math.isfinite(target_error)):
        raise ValueError(f"target_error must be positive; got {target_error}; try 0.005")
    if target_error is not None and calls is not None:
        raise ValueError("give calls or target_error, not both")
    if calls is not None and MANY < calls < math.inf:
        raise ValueError(f"calls must be at most {MANY:g} per example; got {calls:g}; try 24")
    named = surrogate is not None or masks is not None
    if named:
        check_masks(model, surrogate, times, masks)
    about: dict[str, object] = {
        "calls": calls,
        "target error": target_error,
        "per example": per_example,
    }
    about |= {"variates": variates, "masks": masks, "steps": described(times)}
    about["surrogate"] = None if surrogate is None else model_hash(surrogate)
    about["known examples"] = None if known is None else fingerprint(known)
    path, spent = None if resume is None else Path(resume), 0.0
    if named or _has_masks(model, times, calls):
        usual = CALLS if calls is None and target_error is None else calls
        with keeping(path, model, batch, seed, about) as kept:
            by_masks = evaluate_masks(
                model,
                batch,
                calls=usual,
                target_error=target_error,
                surrogate=surrogate,
                masks=masks,
                per_example=per_example,
                variates=variates is not False,
                kept=kept,
                seed=seed,
                weights=weights,
                split=split,
                track=track,
            )
        if isinstance(by_masks, Evaluation):
            return by_masks
        spent = by_masks
    count, target = len(batch), target_error and target_error / scale_of(model, batch)
    calls = CALLS if calls is None else calls
    with (
        measuring(model, batch),
        counting(model.network) as calls_made,
        keeping(path, model, batch, seed, about) as kept,
    ):
        known_tasks = None if kept is None else Tasks(kept, "draws", calls_made)
        others = batch.x if known is None else known
        had = pilots is not None
        most = STRATA if had else STRATA // 2 if target else _strata_for(calls * count)
        strata = Strata(times, time_density(model, times, others), most)
        rows, left = PILOT, math.inf
        if target is None:
            rows, left = _divided(count, calls, strata.count, per_example, had)
        piloted = rows > 0 or had
        # fewer pairs would be too few for an error, of an example or of the mean of few
        least = OWN if model.process.has_flow else FEW
        few = max(2, 1 + (least - 1) / count) if count < 2 * FEWEST else 0
        pairs = left >= 2 * (OWN if per_example and count > 1 else few)
        with seeded(seed, 0):
            # without a pilot, variates whose coefficients are known: those of symbols
            wanted = variates is not False and (piloted or not model.process.has_flow)
            budget = None
            if variates is None and not had:
                each = min(len(others), FITTED) + 2 * count
                # those of a target are unknown before the pilot: as many as its share stands for
                whole = calls * count if target is None else rows * strata.count / OF_PILOT
                budget = Budget(each, whole, partial(_operations, model, times, batch))
            controls = ControlVariates(
                model, others if wanted else None, strata.edges, pairs, budget
            )
            draws = left / controls.calls
            if piloted:
                make = pilots or partial(pilot, batch=batch, calls=rows)
                proposal = _proposal(partial(make, strata, controls), seed, known_tasks)
            if target is not None:
                draws = _foreseen(proposal, count, target, per_example)
            sampling = plan(count, draws, per_example or not piloted, level=not piloted)
            if not piloted:
                proposal = even(strata, controls, _first_share(model, times, sampling))
        begun = calls_made.forward
        known_costs = _known(controls, proposal, batch)
        _check_prior(known_costs[:, 0])
        of_proposal = strata, controls, proposal, batch, known_costs
        draw = partial(_draw, *of_proposal, sampling.draws, tasks=known_tasks)
        with seeded(seed, 2):
            blocks, turn = torch.randperm(count).split(list(sampling.sizes)), 0
        # in a single step of masks nothing shows, and there is no noise
        single = times.steps == 1 and model.process.hides(torch.ones(1, dtype=torch.float64))
        found = SurveyEstimate(blocks, [], known_costs, torch.zeros(count) if single else None)
        some: Mapping[int, int] = sampling.counts
        while some:
            found = found.joined(draw(blocks, some, (seed, 1, turn), track))
            enough = target is None or found.stated() <= target
            some, turn = {} if enough or target is None else found.missing(target), turn + 1
        called = (0 if pilots else begun) + sum(gather(calls_made.forward - begun))

    nats, scale = found.mean(), scale_of(model, batch)
    columns = slice(0, 1), slice(1, 2), slice(2, None)
    record = measurement(
        model, batch, nats, found.error(), called + spent, seed=seed, weights=weights, split=split
    )
    return Evaluation(
        **vars(record),
        terms=Terms(*(scale * found.mean(some) for some in columns)),
        visited=len(found.rows),
        steps=times.steps,
        curve=_curve(strata, found, scale),
        per_example=found.bound,
        per_example_error=found.error_of_each,
        notes=(*model.notes(batch), *filter(None, [controls.note])),
    )


def _has_masks(model: Model, times: TimeDiscretization, calls: float | None) -> bool:
    """Return whether to draw masks with exact counts: for texts of tokens."""
    tokens = model.any_length or model.process.as_codes
    return tokens and (calls is None or calls >= 2) and exact_counts(model, times)


def _operations(model: Model, times: TimeDiscretization, batch: Batch) -> float:
    """Return the floating-point operations of a network call, by one more for one example."""
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
    least = 2.0 if scored else 2 * min(1.0, FEWEST / examples)
    if not least <= calls < math.inf:
        raise ValueError(
            f"calls must be at least {least:.2g} per example, to have an error bar"
            f"{' of each' if scored else ''}, and finite; got {calls}; try 24"
        )
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


def _proposal(make: Callable[[], Proposal], seed: int, tasks: Tasks | None) -> Proposal:
    """Return the proposal of a pilot, or the one that is kept."""
    if tasks is None:
        return make()
    path, every = (seed, 0), torch.zeros(0)
    parts = tasks.find(path, every)
    if parts is None:
        found = make()
        tasks.add(path, every, [*vars(found).values()])
        return found
    return Proposal(*cast(Sequence[Tensor], parts))


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


def _first_share(model: Model, times: TimeDiscretization, sampling: SamplingPlan) -> float:
    """Return the share of the draws for the reconstruction without a pilot.

    It is drawn once for each example, on average; and, if this changes the share little, an equal
    number of times in each replicate of a block; and never if it is certain.
    """
    first = torch.tensor([times.first], dtype=torch.float64, device=model.device)
    if model.process.shows(first):
        return 0.0
    once = 1 / (sampling.draws * sampling.replicates)
    in_block = sampling.sizes[0] * sampling.draws
    evenly = max(1, round(in_block * once)) / in_block
    return evenly if evenly <= MUCH else min(once, MUCH)


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

    blocks = torch.arange(len(batch)).split(TASK)
    return torch.cat(map_blocks(controls.model, batch, blocks, (0,), part))


def _draw(
    strata: Strata,
    controls: ControlVariates,
    proposal: Proposal,
    batch: Batch,
    known: Tensor,
    draws: int,
    blocks: Sequence[Tensor],
    counts: Mapping[int, int],
    seed: Sequence[int],
    track: Track,
    tasks: Tasks | None,
) -> dict[int, Tensor]:
    """Return the prior and the costs of the strata for some blocks, (B, R, 1 + S) each, nats.

    `known`, (N, 1 + S), is of all examples; `counts` has the number of replicates R of each block,
    with `draws` of each example.
    """
    each = [g for g, replicates in counts.items() for _ in range(replicates)]
    size = max(1, TASK // (draws * len(blocks[0])))
    groups = [each[i : i + size] for i in range(0, len(each), size)]
    rows = [torch.cat([blocks[g] for g in group]) for group in groups]

    def costs_of(examples: Batch, task: int) -> list[Tensor]:
        sizes = [len(blocks[g]) for g in groups[task]]
        u, of = torch.cat([stratified(n, draws) for n in sizes]), known[rows[task]]
        costs = estimate(strata, controls, proposal, examples, u, of[:, 1:])
        return list(torch.cat([of[:, :1], costs], 1).split(sizes))

    found: dict[int, list[Tensor]] = {g: [] for g in counts}
    costs = map_blocks(controls.model, batch, rows, seed, costs_of, track, tasks)
    for g, of_block in zip(each, chain.from_iterable(costs), strict=True):
        found[g].append(of_block)
    return {g: torch.stack(replicates, 1) for g, replicates in found.items()}


def _curve(strata: Strata, found: SurveyEstimate, scale: float) -> list[CurvePoint]:
    """Return the diffusion term over time."""
    edges = strata.edges.tolist()
    return [
        CurvePoint(edges[c - 1], edges[c], scale * found.mean(one), scale * found.stated(one))
        for c in range(1, strata.count)
        for one in [slice(1 + c, 2 + c)]
    ]
