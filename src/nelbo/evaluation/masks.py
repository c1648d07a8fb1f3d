r"""The bound of a masked model from few network calls: exact mask counts and two levels.

    -log P(x) <= Σ_{l=1..L} f(l),   f(l) = E_{|S|=l} f(S),   f(S) = 1/l Σ_{i in S} -log P(x_i|z)

Masks S are drawn as in `mask_sampling`. With a surrogate, a cheap masked model of the same symbols
with costs g(S), the bound is a sum of two levels (multilevel Monte Carlo, Giles 2015), each with
masks of its own:

    Σ_l k(l) g(l)                              many masks, read by the surrogate alone
    Σ_l E[ f(S) - k(l) g(S) - Σ_j k_j(l) v_j(S) - b(l) ] + b(l)    few masks, read by both models

The v_j have mean zero given the text. They measure how much harder than others the hidden tokens
are: by their frequency (`unigram`), by the surrogate's costs in the first level, and by earlier
masks of the same text (`draws`). The latter belong to other permutations, so that replicates are
uncorrelated and their spread gives the error. A pilot (`mask_regression`), with masks of its own,
chooses the variates with the least variance, and fits k, k_j, b and the shares of the counts; so
the estimate is unbiased for any surrogate. For n masks of the second level the first has
n √(V_g/(V_f κ)), which gives the least variance for the price (Giles 2015, equation 2.1). V are
the variances of one mask on each level, and κ is the price of a mask read by the surrogate, in
network calls, as its share of floating-point operations. Replicates have separate masks.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.distributed import gather
from nelbo._utils.progress import Track
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model, counting, measuring
from nelbo.diffusion.times import TimeDiscretization
from nelbo.diffusion.unmasking import time_of_share
from nelbo.evaluation.blocks import map_blocks
from nelbo.evaluation.kept import Kept, Tasks
from nelbo.evaluation.mask_estimator import (
    CELLS,
    MaskEstimator,
    Plan,
    texts_of_a_task,
)
from nelbo.evaluation.mask_regression import Coefficients, usual
from nelbo.evaluation.mask_sampling import Texts
from nelbo.evaluation.price import price_of
from nelbo.evaluation.result import TokenCosts
from nelbo.evaluation.survey import Estimate, SurveyEstimate, check_calls

PLAIN, UNIGRAM, DRAWS, TWO_LEVELS = WAYS = "plain", "unigram", "draws", "two-levels"
PILOT = (1 / 8, 32, 1024)  # share of the calls for a pilot, at most; its pairs, at least and most
FREEDOMS = 16  # degrees of freedom of the error, at least, if there are enough calls
SCORED = 8  # replicates that give an example its own standard error
SHARED = 8  # tasks, at least, so that several processes share them; not by their number
PILOTED = 8.0  # calls per text of which a target error's pilot takes its share
FIRST = 16.0  # calls per text of the first round without a pilot
ROUNDS = 8  # of a target error, at most
FEWER, SAMPLED = 0.5, 512  # calls of each text below which, of so many texts, a sample is drawn
ALL = 2**16  # masks of a text that are all read, if there are as many calls, at most
BLOCKS = 256  # groups of texts whose replicates give the error of the mean
MOST = 64  # masks per place that the surrogate reads alone in a replicate, at most


def exact_counts(model: Model, times: TimeDiscretization) -> bool:
    """Return whether the bound is one over all counts: a masked model in continuous time."""
    if model.process.mask is None or times.steps is not None:
        return False
    ends = torch.tensor([times.first, 1.0], dtype=torch.float64)
    return bool((model.process.alpha(ends) == torch.tensor([1.0, 0.0])).all())


def check_masks(
    model: Model,
    surrogate: Model | None,
    times: TimeDiscretization,
    masks: str | None,
) -> None:
    """Raise a ValueError unless a surrogate and an estimator of this name can serve a model."""
    if masks is not None and masks not in WAYS:
        raise ValueError(f"masks must be {', '.join(WAYS)}; got {masks!r}")
    if not exact_counts(model, times):
        what = "a surrogate is" if surrogate is not None else "masks are"
        raise ValueError(
            f"{what} for a masked model in continuous time; leave it out, or leave the steps out"
        )
    if masks == TWO_LEVELS and surrogate is None:
        raise ValueError(f"{TWO_LEVELS} need a surrogate; give one, or other masks")
    if masks not in (None, TWO_LEVELS) and surrogate is not None:
        raise ValueError(f"a surrogate takes the masks {TWO_LEVELS}; got {masks!r}: leave one out")
    if surrogate is None:
        return
    if surrogate.process.mask is None:
        raise ValueError("a surrogate is a masked model for a masked model; leave it out")
    blocks = [each.process.block_of_places(model.shape) for each in (model, surrogate)]
    if not surrogate.process.any_order and not torch.equal(*blocks):
        raise ValueError(
            "a surrogate is of one block, or of the blocks of the model, as its masks are; this"
            f" one has {blocks[1].max() + 1} blocks in {model.dims} places, and the model"
            f" {blocks[0].max() + 1}"
        )
    check_symbols(model.process.codes, surrogate.process.codes)


def check_symbols(own: int, other: int) -> None:
    """Raise a ValueError unless a surrogate has as many symbols as a model."""
    if own != other:
        raise ValueError(
            f"a surrogate has the symbols of the model, {own}; got {other}: give one with the"
            " same tokenizer"
        )


def variance_of(deviations: np.ndarray) -> float:
    """Return the variance of one mask that is spread well over the counts, (Σ_l sd(l))²."""
    return float(deviations.sum()) ** 2


def masks_alone(coefficients: Coefficients, length: int, price: float) -> float:
    """Return how many masks the surrogate reads alone for each mask of both models."""
    first = variance_of(coefficients.deviations(length, surrogate=True))
    return math.sqrt(first / (variance_of(coefficients.deviations(length)) * price))


@dataclass(frozen=True)
class Way:
    """An estimator with its coefficients.

    Args:
        name: one of WAYS.
        coefficients: from a pilot, or without.
        spent: network calls of the pilot per text; 0 without one.
        variance: of the bound of a text by one mask, nats²; NaN without a pilot.
        price: of a mask read by the surrogate, in network calls; 0 where none is used.
        note: how it was chosen, and what for.
    """

    name: str
    coefficients: Coefficients
    spent: float
    variance: float
    price: float
    note: str


def estimate_masks(
    model: Model,
    batch: Batch,
    *,
    calls: float | None = None,
    target: float | None = None,
    surrogate: Model | None = None,
    masks: str | None = None,
    per_example: bool = False,
    variates: bool = True,
    kept: Kept | None = None,
    seed: int = 0,
    track: Track = iter,
) -> Estimate | float:
    """Estimate the costs of the examples by masks with exact counts.

    Where a target error takes far fewer than two calls of each of many texts, return the calls of
    the pilot instead: a sample of the texts is cheaper.

    Args:
        model: the masked model.
        batch: the examples.
        calls: network calls per example, at most, with those of the pilot; at least 2.
        target: in place of calls, the Monte Carlo standard error of the mean, nats.
        surrogate: a cheaper masked model of the same symbols, whose calls are not counted.
        masks: the estimator, one of WAYS; the pilot chooses where left out.
        per_example: use more replicates, for a better standard error of each example.
        variates: use the frequencies of tokens, and how hard they were in other draws.
        kept: what is known of it.
        seed: of everything random.
        track: wraps the tasks, for a progress bar.

    Raises:
        ValueError: the surrogate is of other symbols, or there are too few calls.
    """
    if calls is not None:
        check_calls(calls, len(batch), each=True)
    if surrogate is not None:
        surrogate.batch(batch)
    texts = Texts(model, batch)
    length, count = int(np.median(texts.lengths)), len(batch)
    order = batch.order
    order = order[torch.from_numpy(texts.lengths)[order].argsort(stable=True)]
    blocks = order.split(max(1, count // BLOCKS))
    with (
        nullcontext() if surrogate is None else measuring(surrogate, batch),
        counting(model.network) as made,
    ):
        known_tasks = None if kept is None else Tasks(kept, "masks", made)
        estimator = MaskEstimator(model, surrogate, texts, seed, variates)
        budget = PILOTED if calls is None else calls
        # without a time input a mask has one cost: a text with few of them is measured exactly
        every = 0 if model.takes_time else int(min(budget, ALL))
        sampled = texts.sets > every
        way = _learn(estimator, budget, masks, known_tasks, every)
        if surrogate is not None and way.name != TWO_LEVELS:
            estimator = MaskEstimator(model, None, texts, seed, variates)
        if calls is None:
            assert target is not None
            left = way.variance * sampled.mean() / count / target**2
            if left < FEWER and sampled.sum() >= SAMPLED and masks is surrogate is None:
                return float(made.forward)
            left = max(2.0, math.ceil(left)) if math.isfinite(left) else FIRST
        else:
            # texts of few masks leave calls to the others
            exact = texts.sets[~sampled].sum()
            left = max(2.0, ((calls - way.spent) * count - exact) / max(1, sampled.sum()))
        found: list[list[Tensor]] = []
        read, masks_of = 0.0, list[int]()
        plan = replace(_plan(max(1, sampled.sum()), left, per_example), every=every)
        for turn in range(ROUNDS):
            plan = replace(plan, masks=max(1, int(left / plan.replicates)))
            if way.name == TWO_LEVELS:
                alone = math.ceil(plan.masks * masks_alone(way.coefficients, length, way.price))
                plan = replace(plan, alone=min(alone, MOST * length))
            each = texts_of_a_task(model, plan.replicates * (plan.masks + plan.alone))
            groups = order.split(min(each, math.ceil(count / SHARED)))

            draw = partial(_draw, estimator, way.coefficients, plan, turn, groups)
            parts = map_blocks(model, batch, groups, (seed, 1, turn), draw, track, known_tasks)
            found.append([torch.cat(part) for part in zip(*parts, strict=True)])
            masks_of.append(plan.masks)
            read += plan.replicates * (plan.alone + plan.masks)
            size = torch.from_numpy(np.where(sampled, texts.lengths, 0)).double()
            # a round of many masks says more than one of few
            share = (torch.tensor(masks_of) / sum(masks_of)).double()
            costs = torch.stack([part for part, *_ in found])
            estimate = _estimate(blocks, (share[:, None, None, None] * costs).sum(0), size)
            error = estimate.stated()
            if target is None or error <= target:
                break
            measured = plan.replicates * sum(masks_of)
            left = max(2.0, math.ceil(measured * ((error / target) ** 2 - 1)))
        called = sum(gather(made.forward))
    notes = [way.note] if sampled.any() else []
    if not sampled.all():
        what = (
            f"{count - sampled.sum()} of {count} texts, which are short,"
            if sampled.any()
            else "each text"
        )
        notes = [f"all masks of {what} were read: no Monte Carlo error", *notes]
    if way.name == TWO_LEVELS:
        notes += [
            f"the surrogate read {read:.0f} masks of each text, at {way.price:.2g} of a network"
            " call per mask"
        ]
    elif surrogate is not None and sampled.any() and not way.spent:
        notes += [
            "the surrogate is not used: the calls are too few for a pilot, which finds what it"
            f" saves; give {_enough(int(sampled.sum()))} calls or more, or masks {TWO_LEVELS}"
        ]
    elif surrogate is not None and sampled.any():
        notes += ["the surrogate is not used: its masks cost more than they save"]
    by_token = _by_token(model, batch, order, found, share) if per_example else None
    return Estimate(estimate, _edges(model), called, tuple(notes), by_token)


def _draw(
    estimator: MaskEstimator,
    coefficients: Coefficients,
    plan: Plan,
    turn: int,
    groups: Sequence[Tensor],
    some: Batch,
    g: int,
) -> list[Tensor]:
    return estimator.costs(groups[g].tolist(), some, plan, coefficients, turn)


def _estimate(blocks: Sequence[Tensor], costs: Tensor, size: Tensor) -> SurveyEstimate:
    """Return the estimate of all texts from their costs, (N, R, CELLS)."""
    # prior and reconstruction are 0: nothing shows at the end, and all at the beginning
    whole = torch.nn.functional.pad(costs, (2, 0))
    known = torch.zeros(len(whole), 2 + CELLS, dtype=torch.float64)
    return SurveyEstimate(blocks, whole.split([len(b) for b in blocks]), known, size)


def _by_token(
    model: Model, batch: Batch, order: Tensor, found: Sequence[Sequence[Tensor]], share: Tensor
) -> TokenCosts:
    """Return the costs of tokens and their errors in the order of the examples."""
    of_round = share[:, None, None]
    mean = (of_round * torch.stack([part for _, part, _ in found])).sum(0)
    error = (of_round * torch.stack([part for _, _, part in found])).square().sum(0).sqrt()
    back = order.argsort()
    scored = model.scored_places(batch).cpu()
    parts = (torch.where(scored, v[back].view(scored.shape), torch.nan) for v in (mean, error))
    return TokenCosts(*parts)


def _learn(
    estimator: MaskEstimator,
    calls: float,
    name: str | None,
    tasks: Tasks | None,
    every: int,
) -> Way:
    """Return the estimator of a name, or the one of least variance for its price by a pilot.

    It is for the texts with more than `every` masks.

    Raises:
        ValueError: the calls are too few for the pilot that the estimator of this name needs.
    """
    surrogate, texts = estimator.surrogate, estimator.texts

    def price() -> float:
        """Return that of a mask read by the surrogate, by a network call."""
        assert surrogate is not None
        return price_of(estimator.model, surrogate, texts.batch)

    sampled = np.flatnonzero(texts.sets > every)
    examples = len(sampled)
    of_calls, least, most = PILOT
    # an error needs two calls of each text, which no pilot takes
    pairs = min(most, int(min(of_calls * calls, calls - 2) * examples / 2))
    if pairs < least:
        if name in (UNIGRAM, DRAWS) and examples:
            raise ValueError(
                f"masks {name} need a pilot of {2 * least} calls, of which it takes"
                f" 1/{1 / of_calls:.0f}; got {calls:g} per text; give {_enough(examples)} calls or"
                f" more, or masks {PLAIN}"
            )
        # a surrogate with coefficients of no pilot may add more variance than it takes
        used = TWO_LEVELS if name == TWO_LEVELS and examples else PLAIN
        start = usual(estimator.variates if used == TWO_LEVELS else 1, used == TWO_LEVELS)
        note = f"masks: {used}, without a pilot"
        return Way(used, start, 0.0, math.nan, price() if used == TWO_LEVELS else 0.0, note)
    per_mask = 0.0 if surrogate is None else price()
    found = estimator.pilot(pairs, tasks, every)
    length = int(np.median(texts.lengths[sampled]))
    middle = int(sampled[texts.lengths[sampled].argsort(kind="stable")[(examples - 1) // 2]])
    ways: dict[str, Coefficients] = {}
    if surrogate is None or name is None:
        ways[PLAIN] = replace(found, v=0 * found.v).coefficients(False, 1, False)
        if estimator.frequencies:
            ways[UNIGRAM] = found.coefficients(False, 1, False)
            ways[DRAWS] = found.coefficients(False, 1, True)
    if surrogate is not None:
        ways[TWO_LEVELS] = found.coefficients(True, 3, estimator.frequencies)

    def variance(of: str) -> float:
        roots = [math.sqrt(variance_of(texts.deviations(middle, ways[of].deviations)))]
        if of == TWO_LEVELS:
            first = variance_of(ways[of].deviations(length, surrogate=True))
            roots.append(math.sqrt(per_mask * first))
        return sum(roots) ** 2

    if name is not None and name not in ways:
        raise ValueError(f"masks {name} are control variates, which are left out; choose one")
    best = name or min(ways, key=variance)
    why = "as named" if name else f"the least variance of {', '.join(ways)} in a pilot"
    spent = 2 * pairs / len(texts.batch)
    return Way(best, ways[best], spent, variance(best), per_mask, f"masks: {best}, {why}")


def _enough(examples: int) -> int:
    """Return the calls per text from which there are enough for a pilot, and two of each text."""
    of_pilot = 2 * PILOT[1] / examples
    return math.ceil(max(of_pilot / PILOT[0], of_pilot + 2))


def _plan(examples: int, calls: float, per_example: bool) -> Plan:
    """Return the plan of at most `calls` per text."""
    calls = int(calls)
    wanted = max(2, math.ceil(FREEDOMS / examples) + 1, SCORED if per_example else 0)
    masks = calls // min(calls, wanted)
    return Plan(calls // masks, masks)


def _edges(model: Model) -> Tensor:
    """Return the times between the strata of the diffusion term, (CELLS + 1,)."""
    blocks = model.process.blocks(model.shape)
    place = blocks * torch.linspace(0, 1, CELLS + 1, dtype=torch.float64)
    after = place.floor().clamp(max=blocks - 1)
    return (after + time_of_share(model, place - after)) / blocks
