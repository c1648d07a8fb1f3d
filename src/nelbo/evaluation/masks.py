r"""The bound of a masked model from few network calls: exact mask counts and two levels.

    -log P(x) <= Σ_{l=1..L} f(l),   f(l) = E_{|S|=l} f(S),   f(S) = 1/l Σ_{i in S} -log P(x_i|z)

Masks S are drawn as in `mask_sampling`. With a surrogate, a cheap masked model of the same symbols
with costs g(S), the bound is a sum of two levels (multilevel Monte Carlo, Giles 2015), each with
masks of its own:

    Σ_l k(l) g(l)                              many masks, read by the surrogate alone
    Σ_l E[ f(S) - k(l) g(S) - Σ_j k_j(l) v_j(S) - b(l) ] + b(l)    few masks, read by both models

v_j are of known mean zero given the text: how much harder than others the hidden tokens are, by
their frequency (`unigram`) and by the surrogate's own costs in the first level. k, k_j, b and the
shares of the counts come from a pilot (`mask_regression`) with masks of its own, so that the
estimate is unbiased for any surrogate. The first level has n √(V_g/(V_f κ)) masks for n masks of
the second, where V are the variances of one mask of each and κ is the price of one by the
surrogate in network calls, as the share of floating-point operations: the least variance for the
price (Giles 2015, equation 2.1). Replicates of a text have masks of their own on both levels, so
that their spread gives the error.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nelbo._utils.distributed import gather, world
from nelbo._utils.progress import Track
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.model import Model, counting, measuring
from nelbo.diffusion.times import TimeDiscretization
from nelbo.diffusion.unmasking import time_of_share
from nelbo.evaluation.blocks import map_blocks, measurement, scale_of
from nelbo.evaluation.mask_regression import Coefficients, fit, hats, usual
from nelbo.evaluation.mask_sampling import Masks, Texts, draw_masks
from nelbo.evaluation.result import CurvePoint, Evaluation, Terms
from nelbo.evaluation.survey import SurveyEstimate

CELLS = 16  # of the curve over time, of equal masked shares
PILOT = (1 / 8, 32, 1024)  # share of the calls for a pilot, at most; its pairs, at least and most
FREEDOMS = 16  # degrees of freedom of the error, at least, if there are enough calls
SCORED = 8  # replicates that give an example its own standard error
LEARNED = 64  # masks from which the pilot takes how hard each token is to the surrogate
TASK = 2**16  # masks per task
BLOCKS = 256  # groups of texts whose replicates give the error of the mean
FREE = 1e-3  # price of a mask read by the surrogate in network calls, at least
MOST = 64  # masks per place that the surrogate reads alone in a replicate, at most
DEAR = 50.0  # nats; a token that the surrogate excludes costs this much


def exact_counts(model: Model, times: TimeDiscretization) -> bool:
    """Return whether the bound is one over all counts: a masked model in continuous time."""
    if not isinstance(model.process, MaskedDiffusion) or times.steps is not None:
        return False
    ends = torch.tensor([times.first, 1.0], dtype=torch.float64)
    return bool((model.process.alpha(ends) == torch.tensor([1.0, 0.0])).all())


def check_two_levels(
    model: Model, surrogate: Model, times: TimeDiscretization, target_error: float | None
) -> None:
    """Raise a ValueError unless a surrogate can serve a model."""
    if not exact_counts(model, times) or not isinstance(surrogate.process, MaskedDiffusion):
        raise ValueError(
            "a surrogate is a masked model for a masked model in continuous time; leave it out, or"
            " leave the steps out"
        )
    if target_error is not None:
        raise ValueError("with a surrogate give calls in place of target_error; try calls=16")
    own, other = model.process.codes, surrogate.process.codes
    if own != other:
        raise ValueError(
            f"a surrogate has the symbols of the model, {own}; got {other}: give one with the"
            " same tokenizer"
        )


@dataclass(frozen=True)
class Plan:
    """Masks of each text in each replicate: of both models, and of the surrogate alone."""

    replicates: int
    masks: int
    alone: int = 0


class MaskEstimator:
    """Unbiased estimates of the bound of each text.

    Args:
        model: a masked model in continuous time.
        surrogate: a cheaper one of the same symbols, if any.
        texts: the examples.
        seed: of all masks.
        variates: use the frequencies of tokens.
    """

    def __init__(
        self,
        model: Model,
        surrogate: Model | None,
        texts: Texts,
        seed: int,
        variates: bool = True,
    ) -> None:
        self.model, self.surrogate, self.texts, self.seed = model, surrogate, texts, seed
        self.frequencies = variates
        x = texts.batch.x.flatten(1).cpu().long()
        places = torch.from_numpy(texts.places)
        seen = x[places].bincount(minlength=int(x.max()) + 1).double()
        cost = -((seen[x] + 1) / (seen.sum() + len(seen))).log() if variates else torch.zeros(())
        self.unigram = torch.where(places, cost, 0.0)

    @property
    def variates(self) -> int:
        """F: the surrogate's cost, that of its hard tokens, and that of rare tokens."""
        return 1 if self.surrogate is None else 3

    def alone(self, masks: Masks, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the surrogate's g, (B, R, n), and its mean cost of each token, (B, R, D)."""
        assert self.surrogate is not None
        cost, by_token = mean_costs(self.surrogate, batch, masks, DEAR)
        if not cost.isfinite().all():
            raise ValueError(
                "the surrogate's costs are not all numbers: check its weights, or leave it out"
            )
        return cost, by_token

    def both(
        self, rows: Sequence[int], masks: Masks, batch: Batch, hard: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return f, (B, R, n), and the control variates, (B, R, n, F).

        Args:
            rows: of the texts, B.
            masks: of both models.
            batch: the texts, on the device of the model.
            hard: the surrogate's mean cost of each token, from masks of its own, (B, R, D).
        """
        cost, _ = mean_costs(self.model, batch, masks)
        v = [self._excess(self.unigram[list(rows), None], masks, rows)]
        if self.surrogate is not None:
            assert hard is not None
            by_surrogate, _ = self.alone(masks, batch)
            v = [by_surrogate, self._excess(hard, masks, rows), *v]
        return cost, torch.stack(v, -1)

    def _excess(self, cost: Tensor, masks: Masks, rows: Sequence[int]) -> Tensor:
        """Return the mean of (B, R, D) over the hidden places less that over all, (B, R, n)."""
        places = torch.from_numpy(self.texts.places[list(rows)])[:, None].double()
        mean = (cost * places).sum(-1) / places.sum(-1)
        centred = ((cost - mean[..., None]) * places).expand(-1, masks.count.shape[1], -1)
        return torch.einsum("brnd,brd->brn", masks.hidden.double(), centred) / masks.count

    def pilot(self, pairs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return pairs of costs of texts in random order, the first arguments of `fit`."""
        chosen = self.texts.in_random_order(self.seed)[:pairs]
        each = pairs // len(chosen)
        blocks = torch.tensor(chosen).split(max(1, TASK // (2 * each)))
        start = usual(self.variates, self.surrogate is not None)

        def one(batch: Batch, g: int) -> list[Tensor]:
            rows = blocks[g].tolist()
            draw, hard = partial(draw_masks, self.texts, rows, deviations=start.deviations), None
            if self.surrogate is not None:
                first = draw((self.seed, 1), replicates=1, masks=LEARNED)
                hard = self.alone(first, batch)[1].expand(-1, 2, -1)
            masks = draw((self.seed, 2), replicates=2, masks=each, paired=True)
            cost, v = self.both(rows, masks, batch, hard)
            of_pair = masks.relative[:, 0], masks.count[:, 0], cost.movedim(1, 2), v.movedim(1, 2)
            return [part.flatten(0, 1) for part in of_pair]

        found = map_blocks(self.model, self.texts.batch, blocks, (self.seed, 2), one)
        share, count, cost, v = map(torch.cat, zip(*found, strict=True))
        return share, count, cost, v

    def costs(
        self, rows: Sequence[int], batch: Batch, plan: Plan, coefficients: Coefficients
    ) -> Tensor:
        """Return the bound as a sum over the cells of the curve, (B, R, CELLS), nats.

        Args:
            rows: of the texts, B.
            batch: the texts, on the device of the model.
            plan: the numbers of masks.
            coefficients: from a pilot.
        """
        draw = partial(draw_masks, self.texts, rows)
        found = torch.zeros(len(rows), plan.replicates, CELLS, dtype=torch.float64)
        hard = None
        if plan.alone:
            by_surrogate = partial(coefficients.deviations, surrogate=True)
            masks = draw((self.seed, 3), plan.replicates, plan.alone, by_surrogate)
            g, hard = self.alone(masks, batch)
            _add(found, masks, g * (hats(masks.relative) @ coefficients.slopes[0]))
        masks = draw((self.seed, 4), plan.replicates, plan.masks, coefficients.deviations)
        cost, v = self.both(rows, masks, batch, hard)
        _add(found, masks, cost - coefficients.known(masks.relative, v))
        for length in set(masks.length.tolist()):
            found[masks.length == length] += _curve_in_cells(coefficients, length)
        return found


def _add(cells: Tensor, masks: Masks, cost: Tensor) -> None:
    """Add weighted costs, (B, R, n), to the cells of their masked shares, (B, R, CELLS)."""
    cell = (masks.share * CELLS).long().clamp(max=CELLS - 1)
    cells.scatter_add_(2, cell, masks.width * cost)


def _curve_in_cells(coefficients: Coefficients, length: int) -> Tensor:
    """Return Σ_l b(l) P(u in cell|l), (CELLS,)."""
    from scipy.special import betainc  # here: scipy takes longer to import than nelbo

    count, edges = np.arange(1, length + 1)[:, None], np.linspace(0, 1, CELLS + 1)
    inside = torch.from_numpy(np.diff(betainc(count, length - count + 1, edges)))
    share = torch.from_numpy(count[:, 0] / length)
    return (hats(share) @ coefficients.curve) @ inside


def mean_costs(
    model: Model, batch: Batch, masks: Masks, most: float = math.inf
) -> tuple[Tensor, Tensor]:
    """Return mean costs per hidden token, (B, R, n), and of each token, (B, R, D), nats.

    Args:
        model: a masked model.
        batch: B examples.
        masks: of them.
        most: the largest cost of a token.
    """
    shape, process = masks.count.shape, model.process
    hidden = masks.hidden.flatten(0, 2)
    share = masks.share.flatten()
    group = torch.arange(shape[0] * shape[1]).repeat_interleave(shape[2])
    found = torch.empty(len(hidden), dtype=torch.float64)
    sums = torch.zeros(shape[0] * shape[1], hidden.shape[1], dtype=torch.float64)
    seen = torch.zeros_like(sums)
    for some in torch.arange(len(hidden)).split(model.rows):
        part = batch[(group[some] // shape[1]).to(batch.x.device)].to(model.device)
        inside = hidden[some].to(model.device).view(part.x.shape)
        z = torch.where(inside, process.codes, part.x)
        t = time_of_share(model, share[some].to(model.device))
        symbols = model.predict(z, t, part.condition).symbols(z, process.codes)
        cost = torch.where(inside, -symbols.log_prob(part.x, inside).double(), 0.0)
        cost = cost.flatten(1).cpu().clamp(max=most)
        found[some] = cost.sum(1)
        sums.index_add_(0, group[some], cost)
        seen.index_add_(0, group[some], hidden[some].double())
    # a token that was never hidden is as hard as the mean one
    mean = sums.sum(1, keepdim=True) / seen.sum(1, keepdim=True)
    by_token = torch.where(seen > 0, sums / seen.clamp(min=1), mean)
    return found.view(shape) / masks.count, by_token.view(*shape[:2], -1)


def price_of(model: Model, surrogate: Model, batch: Batch) -> float:
    """Return the price of a mask read by the surrogate, in calls of the model.

    It is the share of the floating-point operations of a call, and at least FREE.
    """
    counts, fast = [], torch.backends.mha.get_fastpath_enabled()
    one = batch[torch.zeros(1, dtype=torch.long)]
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # whose operations are not counted
        for each in (model, surrogate):
            part, t = one.to(each.device), torch.ones(1, dtype=torch.float64, device=each.device)
            z = torch.full_like(part.x, each.process.codes)
            with FlopCounterMode(display=False) as counter:
                each.predict(z, t, part.condition)
            counts.append(counter.get_total_flops())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return max(FREE, counts[1] / max(counts[0], 1))


def variance_of(deviations: np.ndarray) -> float:
    """Return the variance of one mask that is spread well over the counts, (Σ_l sd(l))²."""
    return float(deviations.sum()) ** 2


def masks_alone(coefficients: Coefficients, length: int, price: float) -> float:
    """Return how many masks the surrogate reads alone for each mask of both models."""
    first = variance_of(coefficients.deviations(length, surrogate=True))
    return math.sqrt(first / (variance_of(coefficients.deviations(length)) * price))


def evaluate_masks(
    model: Model,
    batch: Batch,
    *,
    calls: float,
    surrogate: Model | None = None,
    per_example: bool = False,
    variates: bool = True,
    seed: int = 0,
    weights: str = "as given",
    split: str = "as given",
    track: Track = iter,
) -> Evaluation:
    """Measure the mean bound on -log P(x) of a masked model in continuous time.

    Args:
        model: the masked model.
        batch: the examples.
        calls: network calls per example, at most, with those of the pilot; at least 2.
        surrogate: a cheaper masked model of the same symbols, whose calls are not counted.
        per_example: use more replicates, for a better standard error of each example.
        variates: use the frequencies of tokens.
        seed: of everything random.
        weights: name of the weights, for the record.
        split: name of the data, for the record.
        track: wraps the tasks, for a progress bar.

    Raises:
        ValueError: the surrogate is of other symbols, or there are too few calls.
    """
    if not 2 <= calls < math.inf:
        raise ValueError(f"calls must be at least 2 per example, and finite; got {calls}; try 24")
    if surrogate is not None:
        surrogate.batch(batch)
    texts = Texts(model, batch)
    with (
        measuring(model, batch),
        nullcontext() if surrogate is None else measuring(surrogate, batch),
        counting(model.network) as made,
    ):
        way = MaskEstimator(model, surrogate, texts, seed, variates)
        price = 0.0 if surrogate is None else price_of(model, surrogate, batch)
        way, coefficients, spent = _learn(way, calls, price)
        plan = _plan(len(batch), calls - spent, per_example)
        note = None
        if way.surrogate is not None:
            length = int(np.median(texts.lengths))
            alone = math.ceil(plan.masks * masks_alone(coefficients, length, price))
            plan = replace(plan, alone=min(alone, MOST * length))
            note = (
                f"the surrogate read {plan.replicates * (plan.alone + plan.masks)} masks of each"
                f" text, at {price:.2g} of a network call a mask"
            )
        elif surrogate is not None:
            note = "the surrogate is not used: its masks cost more than they save"
        order = torch.from_numpy(texts.lengths.argsort(kind="stable"))
        each = max(1, TASK // (plan.replicates * (plan.masks + plan.alone)))
        tasks = order.split(min(each, math.ceil(len(batch) / world()[1])))
        found = map_blocks(
            model,
            batch,
            tasks,
            (seed, 1),
            lambda some, g: way.costs(tasks[g].tolist(), some, plan, coefficients),
            track,
        )
        called = sum(gather(made.forward))
    blocks = order.split(max(1, len(batch) // BLOCKS))
    # prior and reconstruction are 0: nothing shows at the end, and all at the beginning
    costs = torch.nn.functional.pad(torch.cat(found), (2, 0)).split([len(b) for b in blocks])
    known = torch.zeros(len(batch), 2 + CELLS, dtype=torch.float64)
    estimate, scale = SurveyEstimate(blocks, costs, known), scale_of(model, batch)
    nats = estimate.mean()
    record = measurement(
        model, batch, nats, estimate.error(), called, seed=seed, weights=weights, split=split
    )
    return Evaluation(
        **vars(record),
        terms=Terms(0.0, 0.0, scale * nats),
        visited=len(batch),
        steps=None,
        curve=_curve(model, estimate, scale),
        per_example=estimate.bound,
        per_example_error=estimate.error_of_each,
        notes=(*model.notes(batch), *filter(None, [note])),
    )


def _learn(
    way: MaskEstimator, calls: float, price: float
) -> tuple[MaskEstimator, Coefficients, float]:
    """Return the estimator, with or without the surrogate, its coefficients, and calls spent."""
    examples = len(way.texts.batch)
    of_calls, least, most = PILOT
    pairs = min(most, int(of_calls * calls * examples / 2))
    if pairs < least:
        return way, usual(way.variates, way.surrogate is not None), 0.0
    spent = 2 * pairs / examples
    share, count, cost, v = way.pilot(pairs)
    plain = fit(share, count, cost, v[..., -1:], False)
    if way.surrogate is None:
        return way, plain, spent
    both, length = fit(share, count, cost, v, True), int(np.median(way.texts.lengths))
    first = price * variance_of(both.deviations(length, surrogate=True))
    second = variance_of(both.deviations(length))
    if (math.sqrt(first) + math.sqrt(second)) ** 2 < variance_of(plain.deviations(length)):
        return way, both, spent
    return MaskEstimator(way.model, None, way.texts, way.seed, way.frequencies), plain, spent


def _plan(examples: int, calls: float, per_example: bool) -> Plan:
    """Return the plan of at most `calls` per text."""
    calls = int(calls)
    wanted = max(2, math.ceil(FREEDOMS / examples) + 1, SCORED if per_example else 0)
    replicates = min(calls, wanted)
    if calls < 2 * replicates:
        replicates = calls
    return Plan(replicates, calls // replicates)


def _curve(model: Model, found: SurveyEstimate, scale: float) -> list[CurvePoint]:
    """Return the diffusion term over time."""
    edges = time_of_share(model, torch.linspace(0, 1, CELLS + 1, dtype=torch.float64)).tolist()
    return [
        CurvePoint(edges[c], edges[c + 1], scale * found.mean(one), scale * found.stated(one))
        for c in range(CELLS)
        for one in [slice(2 + c, 3 + c)]
    ]
