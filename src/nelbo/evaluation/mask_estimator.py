r"""Unbiased estimates of the bound of each text from masks; see `masks`, which chooses among them.

Masks of the first level are read by the surrogate alone, those of the second by both models.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model
from nelbo.diffusion.unmasking import time_of_share
from nelbo.evaluation.blocks import map_blocks
from nelbo.evaluation.kept import Tasks
from nelbo.evaluation.mask_regression import (
    Coefficients,
    fit,
    hats,
    predicted,
    shrinkage,
    usual,
)
from nelbo.evaluation.mask_sampling import Masks, Texts, all_masks, draw_masks

CELLS = 16  # of the curve over time, of equal masked shares
LEARNED = 64  # masks from which the pilot takes how hard each token is to the surrogate
TASK, FEWEST = 2**14, 256  # masks of a task, at most, and at least if the texts are enough
CALLED = 8  # network calls of a task
DEAR = 50.0  # nats; a token that the surrogate excludes costs this much


@dataclass(frozen=True)
class Plan:
    """Masks of each text in each replicate: of both models, and of the surrogate alone.

    A text with at most `every` masks has all of them read, once; its replicates are equal.
    """

    replicates: int
    masks: int
    alone: int = 0
    every: int = 0


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
        shape = masks.count.shape
        found = torch.empty(shape.numel(), dtype=torch.float64)
        sums = torch.zeros(shape[0] * shape[1], masks.hidden.shape[-1], dtype=torch.float64)
        seen = torch.zeros_like(sums)
        hidden, count = masks.hidden.flatten(0, 2), masks.count.flatten()
        group = torch.arange(shape[0] * shape[1]).repeat_interleave(shape[2])
        for some, cost in self._by_surrogate(masks, batch):
            found[some] = cost.sum(1) / count[some]
            sums.index_add_(0, group[some], cost)
            seen.index_add_(0, group[some], hidden[some].double())
        # a token that was never hidden is as hard as the mean one
        mean = sums.sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        by_token = torch.where(seen > 0, sums / seen.clamp(min=1), mean)
        return found.view(shape), by_token.view(*shape[:2], -1)

    def _by_surrogate(self, masks: Masks, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the surrogate's `token_costs`."""
        assert self.surrogate is not None
        for some, cost in token_costs(self.surrogate, batch, masks, self.texts):
            cost = cost.clamp(max=DEAR)
            if not cost.isfinite().all():
                raise ValueError(
                    "the surrogate's costs are not all numbers: check its weights, or leave it out"
                )
            yield some, cost

    def both(
        self, rows: Sequence[int], masks: Masks, batch: Batch, hard: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the costs of hidden tokens, (B, R, n, D), and variates of them, (.., D, F).

        The variates of a token are the surrogate's cost of it in the same mask, how hard it is to
        the surrogate otherwise, and how rare, less the mean over all places of the block; so all
        but the first have the mean zero over the masks of any number of tokens.

        Args:
            rows: of the texts, B.
            masks: of both models.
            batch: the texts, on the device of the model.
            hard: the surrogate's mean cost of each token, from masks of its own, (B, R, D).
        """
        shape = masks.hidden.shape
        cost = _joined(token_costs(self.model, batch, masks, self.texts), shape)
        v = [_centred(self.unigram[list(rows)][:, None, None], masks.places)]
        if self.surrogate is not None:
            assert hard is not None
            by_surrogate = _joined(self._by_surrogate(masks, batch), shape)
            v = [by_surrogate, _centred(hard[:, :, None], masks.places), *v]
        hidden = masks.hidden[..., None].double()
        return cost, torch.stack(v, -1) * hidden

    def pilot(self, pairs: int, tasks: Tasks | None = None, every: int = 0) -> "Pairs":
        """Return pairs of masks of texts in random order, two or more of different counts each.

        Args:
            pairs: their number, at most.
            tasks: what is known of it.
            every: see `Plan`; only texts with more masks are used.
        """
        order = self.texts.in_random_order(self.seed)
        chosen = [row for row in order if self.texts.sets[row] > every][: pairs // 2]
        each = pairs // len(chosen)
        blocks = torch.tensor(chosen).split(texts_of_a_task(self.model, 2 * each))
        start = usual(self.variates, self.surrogate is not None)

        def one(batch: Batch, g: int) -> list[Tensor]:
            rows = blocks[g].tolist()
            draw, hard = partial(draw_masks, self.texts, rows, deviations=start.deviations), None
            if self.surrogate is not None:
                first = draw((self.seed, 1), replicates=1, masks=LEARNED)
                hard = self.alone(first, batch)[1].expand(-1, 2, -1)
            masks = draw((self.seed, 2), replicates=2, masks=each, paired=True)
            cost, v = self.both(rows, masks, batch, hard)
            of_pair = masks.relative[:, 0], masks.count[:, 0], masks.places[:, 0]
            of_each = (part.movedim(1, 2) for part in (masks.hidden, cost, v))
            return [part.flatten(0, 1) for part in (*of_pair, *of_each)]

        found = map_blocks(self.model, self.texts.batch, blocks, (self.seed, 2), one, tasks=tasks)
        return Pairs(each, *map(torch.cat, zip(*found, strict=True)))

    def costs(
        self,
        rows: Sequence[int],
        batch: Batch,
        plan: Plan,
        coefficients: Coefficients,
        turn: int = 0,
    ) -> list[Tensor]:
        """Return the bound as a sum over the cells of the curve, (B, R, CELLS), nats.

        The second and third numbers are the costs of each token without control variates, whose
        sum is another unbiased estimate of the bound, and their standard errors, (B, D). Of texts
        with few masks all numbers are exact.

        Args:
            rows: of the texts, B.
            batch: the texts, on the device of the model.
            plan: the numbers of masks.
            coefficients: from a pilot.
            turn: of several draws.
        """
        known = self.texts.sets[list(rows)] <= plan.every
        kinds = {(): np.flatnonzero(~known).tolist()} if not known.all() else {}
        for i in np.flatnonzero(known).tolist():
            kinds.setdefault(tuple(self.texts.of_blocks[rows[i]].tolist()), []).append(i)
        parts = []
        for lengths, some in kinds.items():
            these, texts = [rows[i] for i in some], batch[torch.tensor(some)]
            if lengths:
                parts.append(self._exact(these, texts, plan.replicates))
            else:
                parts.append(self._sampled(these, texts, plan, coefficients, turn))
        back = torch.tensor([i for some in kinds.values() for i in some]).argsort()
        return [torch.cat(each)[back] for each in zip(*parts, strict=True)]

    def _exact(self, rows: Sequence[int], batch: Batch, replicates: int) -> list[Tensor]:
        """Return `costs` from all masks of texts whose blocks have the same lengths."""
        masks = all_masks(self.texts, rows)
        cost = masks.width[..., None] * _joined(
            token_costs(self.model, batch, masks, self.texts), masks.hidden.shape
        )
        by_token = (cost / masks.count[..., None])[:, 0].sum(1)
        lengths = self.texts.of_blocks[rows[0]]
        of_counts = torch.zeros(len(rows), int(lengths.sum()), dtype=torch.float64)
        begin = torch.from_numpy(lengths.cumsum() - lengths)
        of = (begin[masks.block] + masks.count - 1)[:, 0]
        of_counts.scatter_add_(1, of, (cost.sum(-1) / masks.count)[:, 0])
        found = (of_counts @ _cells_of_counts(lengths.tolist()))[:, None]
        return [found.expand(-1, replicates, -1), by_token, 0 * by_token]

    def _sampled(
        self,
        rows: Sequence[int],
        batch: Batch,
        plan: Plan,
        coefficients: Coefficients,
        turn: int,
    ) -> list[Tensor]:
        """Return `costs` from masks that are drawn."""
        draw = partial(draw_masks, self.texts, rows)
        found = torch.zeros(len(rows), plan.replicates, CELLS, dtype=torch.float64)
        hard = None
        if plan.alone:
            by_surrogate = partial(coefficients.deviations, surrogate=True)
            masks = draw((self.seed, 3 + 2 * turn), plan.replicates, plan.alone, by_surrogate)
            g, hard = self.alone(masks, batch)
            _add(found, masks, g * (hats(masks.relative) @ coefficients.slopes[0]))
        path = self.seed, 4 + 2 * turn
        masks = draw(path, plan.replicates, plan.masks, coefficients.deviations)
        cost, v = self.both(rows, masks, batch, hard)
        left = left_of(coefficients, masks.relative, masks.hidden, cost, v)
        rest = left.sum(-1) / masks.count
        if coefficients.by_draws is not None:
            slope = hats(masks.relative) @ coefficients.by_draws
            rest = rest - slope * self._by_draws(masks, left, coefficients.shrink)
        _add(found, masks, rest)
        lengths = list(map(tuple, self.texts.of_blocks[list(rows)].tolist()))
        curves = {each: _curve_in_cells(coefficients, each) for each in set(lengths)}
        found += torch.stack([curves[each] for each in lengths])[:, None]
        by_token = ((masks.width / masks.count)[..., None] * cost).sum(2)
        error = by_token.std(1) / math.sqrt(plan.replicates)
        return [found, by_token.mean(1), error]

    @staticmethod
    def _by_draws(masks: Masks, left: Tensor, shrink: float) -> Tensor:
        """Return how hard hidden tokens are by earlier masks of the text, (B, R, n).

        Earlier masks are those of other permutations, drawn before; so a mask is still uniform
        given them, the mean over it is zero, and replicates are uncorrelated: each is corrected by
        those before it, and their spread gives the error without bias.
        """
        hidden = masks.hidden.double()
        # sums over the replicates before, and within a replicate over the permutations before
        total, number = left.sum(2), hidden.sum(2)
        sums = (total.cumsum(1) - total)[:, :, None].expand(left.shape).clone()
        seen = (number.cumsum(1) - number)[:, :, None].expand(left.shape).clone()
        order = masks.order
        for i in range(1, order.shape[2]):
            before = (order[..., :i] < order[..., i : i + 1]).double()
            sums[:, :, i] += torch.einsum("brm,brmd->brd", before, left[:, :, :i])
            seen[:, :, i] += torch.einsum("brm,brmd->brd", before, hidden[:, :, :i])
        harder = predicted(sums, seen, shrink)
        return (hidden * _centred(harder, masks.places)).sum(-1) / masks.count


@dataclass(frozen=True)
class Pairs:
    """Pairs of masks with the same number of hidden tokens of the same text.

    Args:
        each: pairs of a text, with different numbers of hidden tokens.
        share: l/L of each pair, (Q,), text after text.
        count: l, (Q,).
        places: whether a place is scored, (Q, D).
        hidden: whether a token is hidden in each mask, (Q, 2, D).
        cost: of hidden tokens, (Q, 2, D), nats.
        v: variates of them, (Q, 2, D, F).
    """

    each: int
    share: Tensor
    count: Tensor
    places: Tensor
    hidden: Tensor
    cost: Tensor
    v: Tensor

    def coefficients(self, surrogate: bool, variates: int, draws: bool) -> Coefficients:
        """Return the coefficients that suit these pairs.

        Args:
            surrogate: use the surrogate.
            variates: F; the last F variates are used.
            draws: use other draws of the same text.
        """
        count = self.count[:, None]
        v = self.v[..., self.v.shape[-1] - variates :]
        cost, mean = self.cost.sum(-1) / count, v.sum(2) / count[..., None]
        first = fit(self.share, self.count, cost, mean, surrogate)
        if not draws:
            return first
        share = self.share[:, None].expand(-1, 2)
        left = left_of(first, share, self.hidden, self.cost, v)
        other, hides = self._of_others(left), self._of_others(self.hidden)
        kappa = shrinkage(left, other, self.hidden & hides)
        if not math.isfinite(kappa):
            return first
        hidden = self.hidden.double()
        harder = predicted(other, hides.double(), kappa)
        places = self.places[:, None].double()
        centre = (harder * places).sum(-1, keepdim=True) / places.sum(-1, keepdim=True)
        by_draws = (hidden * (harder - centre)).sum(-1) / count
        second = fit(self.share, self.count, left.sum(-1) / count, by_draws[..., None], False)
        curve = first.curve + second.curve
        return replace(
            first, curve=curve, spread=second.spread, by_draws=second.slopes[0], shrink=kappa
        )

    def _of_others(self, v: Tensor) -> Tensor:
        """Return for each mask those numbers, (Q, 2, D), of one of another count and permutation.

        Draws of a text differ in their counts, and what is hard with many hidden tokens need not
        be with few.
        """
        return v.flip(1).unflatten(0, (-1, self.each)).roll(1, 1).flatten(0, 1)


def left_of(
    coefficients: Coefficients, share: Tensor, hidden: Tensor, cost: Tensor, v: Tensor
) -> Tensor:
    """Return what variates and curve leave of the costs of hidden tokens, shape of `cost`.

    Args:
        coefficients: of the variates.
        share: l/L of each mask, (...).
        hidden: whether a token is hidden, (..., D).
        cost: of hidden tokens, (..., D).
        v: their variates, (..., D, F).
    """
    basis = hats(share)
    known = (v * (basis @ coefficients.slopes.T)[..., None, :]).sum(-1)
    return (cost - known - (basis @ coefficients.curve)[..., None]) * hidden


def texts_of_a_task(model: Model, masks: int) -> int:
    """Return the number of texts of a task, from their masks: a task takes some network calls."""
    return max(1, min(TASK, max(FEWEST, CALLED * model.rows)) // masks)


def _centred(cost: Tensor, places: Tensor) -> Tensor:
    """Return costs of tokens, (B, R, n, D), less their mean over the places, and 0 elsewhere."""
    inside = places.double()
    mean = (cost * inside).sum(-1) / inside.sum(-1)
    return (cost - mean[..., None]) * inside


def _add(cells: Tensor, masks: Masks, cost: Tensor) -> None:
    """Add weighted costs, (B, R, n), to the cells of their masked shares, (B, R, CELLS)."""
    share = (masks.after + masks.share) / masks.blocks
    cell = (share * CELLS).long().clamp(max=CELLS - 1)
    cells.scatter_add_(2, cell, masks.width * cost)


def _curve_in_cells(coefficients: Coefficients, lengths: Sequence[int]) -> Tensor:
    """Return Σ_b Σ_l b(l) P(u in cell|l) of blocks with so many places, (CELLS,)."""
    share = torch.cat([torch.arange(1, L + 1).double() / max(1, L) for L in lengths])
    return (hats(share) @ coefficients.curve) @ _cells_of_counts(lengths)


def _cells_of_counts(lengths: Sequence[int]) -> Tensor:
    """Return P(u in cell|l) of l = 1..L_b for all blocks, one after the other, (L, CELLS)."""
    from scipy.special import betainc  # here: scipy takes longer to import than nelbo

    found, edges = [], np.linspace(0, 1, CELLS + 1)
    for block, length in enumerate(lengths):
        count = np.arange(1, length + 1)[:, None]
        within = (edges * len(lengths) - (len(lengths) - 1 - block)).clip(0, 1)
        found.append(np.diff(betainc(count, length - count + 1, within)))
    return torch.from_numpy(np.concatenate(found))


def token_costs(
    model: Model, batch: Batch, masks: Masks, texts: Texts
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield numbers of masks, (m,), with the costs of their hidden tokens, (m, D), nats.

    Args:
        model: a masked model, of the blocks of the texts or of one block.
        batch: B examples.
        masks: of them; the B R n masks are numbered in order.
        texts: that they are of, which know the blocks.
    """
    shape, process = masks.count.shape, model.process
    hidden, share = masks.hidden.flatten(0, 2), masks.share.flatten()
    # in block diffusion what comes after a block is hidden, and does not count
    later = torch.from_numpy(texts.block) > masks.block.reshape(-1, 1)
    later = later.view(-1, *batch.x.shape[1:])
    blocks = process.blocks(batch.x.shape[1:])
    after = masks.after.flatten()
    of = torch.arange(shape[0]).repeat_interleave(shape[1] * shape[2])
    for some in torch.arange(len(hidden)).split(model.rows):
        part = batch[of[some].to(batch.x.device)].to(model.device)
        inside = hidden[some].to(model.device).view(part.x.shape)
        z = torch.where(inside | later[some].to(model.device), process.codes, part.x)
        within = time_of_share(model, share[some].to(model.device))
        # a model of one block, as a surrogate of block diffusion may be, has no time of others
        t = within if blocks == 1 else (after[some].to(model.device) + within) / blocks
        symbols = model.predict(z, t, part.condition).symbols(z, process.codes)
        cost = torch.where(inside, -symbols.log_prob(part.x, inside).double(), 0.0)
        del symbols  # and its logits, before the next ones are made
        yield some, cost.flatten(1).cpu()


def _joined(parts: Iterator[tuple[Tensor, Tensor]], shape: torch.Size) -> Tensor:
    return torch.cat([cost for _, cost in parts]).view(shape)
