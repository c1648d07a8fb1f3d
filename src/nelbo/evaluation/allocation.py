r"""Stratification, Neyman allocation and control variates: an unbiased estimate of low variance.

The costs of an example, reconstruction and diffusion, are one sum over strata ("cells"). Cell 0 is
the reconstruction; the others divide u ∈ [0, 1] of the diffusion term into parts of about equal
cost under a density q (`time_density`), in which an expensive step is a cell of its own. A visit
to an example falls into cell c with probability p_c, and within the cell follows q; it gives

    y = Σ_c b_c·φ_c(x) + [ w (cost - k_c·v) - b_c·φ_c(x) ] / p_c ,        w = q(c)/q(u)

with v and φ of `control_variates`; the centred position in the cell is a further v. E[y] is the
sum of costs for any b, k and p > 0. A pilot on some of the examples fits b and k in each cell
(least squares over neighbouring cells) and estimates the residual standard deviation sd_c, to
which the optimal p is proportional (Neyman 1934). A share of the visits is spread evenly: at least
a twentieth, so that no weight 1/p_c exceeds twenty times the number of cells, whatever the pilot
missed; and more where a cell has few rows or the residuals have heavy tails.

Draws of an example give each other context (`control_variates`): each takes it from the nearest
draw in time, of its own replicate or of an earlier one. So no two replicates depend on each other
both ways, their control variates are uncorrelated, and their spread gives the error of the mean.
Two draws help each other most at nearly the same time: then they form one visit, half a cell
apart, and the pilot fits their mean.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo._utils.numerics import over
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.terms import ReconstructionTerm, Term
from nelbo.diffusion.times import TimeDiscretization, stratified
from nelbo.evaluation.control_variates import NO_CONTEXT, ContextLogits, ControlVariates
from nelbo.evaluation.intervals import apart
from nelbo.evaluation.time_density import TimeDensity
from nelbo.evaluation.time_density import even as even_proposal

CELLS = 32  # cells of the diffusion term, at most
NEAR, FAR = 10.0, 4.0  # half-widths of smoothing over cells: of slopes, times rows^(-1/3); of sd
BORROWED = 16.0  # weight of the neighbours' variance, in rows of normal residuals
EVEN = 0.05  # share of the draws that is spread evenly over the cells, at least; and ..
DOUBT = 3.0  # .. the multiple of the relative variance of the estimated variances
NOISIER = 4.0  # factor on the distance to a noisier draw in the choice of the neighbouring draw
LIKE = 64  # rows of a network call, at least, if there are as many
ALIKE = 1 / 2, 16  # share of a pilot's rows, and rows per cell, that are spread evenly, at least
RIDGE = 0.01  # ridge penalty per coefficient, relative to the weight of the rows


class Strata:
    """The strata of the costs: the reconstruction and cells of the diffusion term.

    Args:
        times: of the bound.
        proposal: density of u that is expected to follow the costs; even where left out.
    """

    def __init__(self, times: TimeDiscretization, proposal: TimeDensity | None = None) -> None:
        self.times, self.proposal = times, even_proposal(times) if proposal is None else proposal
        edges = torch.tensor(self.proposal.cells(CELLS) if times.terms else [0])
        #: the distribution function of the proposal at the edges
        self.ends = torch.cat([torch.zeros(1).double(), self.proposal.mass.cumsum(0)])[edges]
        self.diffusion = len(edges) - 1
        self.count = 1 + self.diffusion
        at = self.proposal.u[edges]
        self.edges = times.at(at) if self.diffusion else torch.tensor([1.0]).double()

    def variates(self, controls: ControlVariates) -> int:
        """Return G, the number of control variates, with the position in the cell."""
        return controls.variates + 1

    def visit(
        self,
        controls: ControlVariates,
        batch: Batch,
        cell: Tensor,
        share: Tensor,
        replicate: Tensor,
        each: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Return w·cost, shape (B, n), and w·v, shape (B, n, G), of n visits to each example.

        Args:
            controls: the control variates and their model.
            batch: examples, x of shape (B, ...).
            cell: of each visit, shape (B, n).
            share: position in the cell, in [0, 1), shape (B, n).
            replicate: of each of the n visits, not decreasing, shape (n,).
            each: draws per visit, in the same cell, over which the results are averaged.
        """
        shape = (*cell.shape, each)
        within = (share[..., None] + torch.arange(each) / each) % 1
        cost, v = self._draw(
            controls,
            batch,
            cell[..., None].expand(shape).flatten(1),
            within.flatten(1),
            replicate.repeat_interleave(each),
        )
        # costs change within a cell, and the mean of uniform positions is known
        place = (within.mean(-1) - 1 / 2) * (cell > 0)
        v = torch.cat([v.view(*shape, -1).mean(2), place[..., None]], -1)
        return cost.view(shape).mean(2), v

    def _draw(
        self,
        controls: ControlVariates,
        batch: Batch,
        cell: Tensor,
        share: Tensor,
        replicate: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the same for single draws, v without the position in the cell."""
        cost = torch.zeros(cell.shape, dtype=torch.float64)
        v = torch.zeros(*cell.shape, controls.variates, dtype=torch.float64)
        rows = controls.model.rows
        for columns in torch.arange(cell.shape[1]).split(rows):
            for some in torch.arange(len(batch)).split(max(1, rows // len(columns))):
                at = some[:, None], columns
                cost[at], v[at] = self._call(
                    controls, batch[some], cell[at], share[at], replicate[columns]
                )
        return cost, v

    def _call(
        self,
        controls: ControlVariates,
        batch: Batch,
        cell: Tensor,
        share: Tensor,
        replicate: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x = batch.x
        row = torch.arange(len(x)).repeat_interleave(cell.shape[1])
        at, cell, share = cell + share, cell.flatten(), share.flatten()
        place = at.flatten()
        cost = torch.zeros(len(row), dtype=torch.float64)
        v = torch.zeros(len(row), controls.variates, dtype=torch.float64)
        draws = []
        for kind in (cell == 0, cell > 0):
            # similar times share a call, as the work of a control variate depends on the noise
            order = kind.nonzero()[:, 0][place[kind].argsort()]
            for part in order.split(max(LIKE, math.ceil(len(order) / 4))) if kind.any() else ():
                term, factor = self._term(cell[part], share[part], x.device)
                draw = term.draw(controls.model, batch[row[part]])
                cost[part] = factor * draw.cost.cpu()
                draws.append((part, factor, draw))
        said = ContextLogits.gathered([d[0] for d in draws], [controls.said(d[2]) for d in draws])
        # without a context from the network, no draw has a neighbour
        lender = torch.full_like(row, -1)
        if said.by_network is not None:
            lender = _lenders(at, replicate).flatten()
        for part, factor, draw in draws:
            by = lender[part]
            other = said.at(by) if (by >= 0).any() else NO_CONTEXT
            alone = (by < 0).to(x.device)
            v[part] = factor[:, None] * controls.within(draw, said.at(part), other, alone).cpu()
        return cost.view(len(x), -1), v.view(len(x), len(replicate), -1)

    def _term(self, cell: Tensor, share: Tensor, device: torch.device) -> tuple[Term, Tensor]:
        """Return the terms at positions in the cells, and w times the factor of their cost."""
        if (cell == 0).any():
            first = torch.full_like(share, self.times.first).to(device)
            return ReconstructionTerm(first), torch.ones_like(share)
        width = self.ends.diff()[cell - 1]
        u, weight = self.proposal.at(self.ends[cell - 1] + share * width)
        term, factor = self.times.term(u.to(device))
        return term, factor * weight * width


def _lenders(place: Tensor, replicate: Tensor) -> Tensor:
    """Return the row of the neighbouring draw of each of n draws of B examples, (B, n), or -1.

    It is the nearest draw in `place`, (B, n), of the same example and of no later replicate, (n,),
    with a preference for less noise, which leaves more information.
    """
    ahead = place[:, None] - place[:, :, None]
    distance = torch.where(ahead > 0, NOISIER * ahead, -ahead)
    own = torch.eye(len(replicate), dtype=torch.bool)
    distance[:, own | (replicate[:, None] < replicate)] = torch.inf
    nearest, index = distance.min(2)
    first = len(replicate) * torch.arange(len(place))[:, None]
    return torch.where(nearest.isfinite(), first + index, -1)


@dataclass(frozen=True)
class Proposal:
    """Allocation and coefficients from a pilot.

    Args:
        probability: p, (C,).
        within: k, (C, G).
        between: b, (C, 1 + F).
        left: residual standard deviation of w·cost in each cell, (C,), nats.
    """

    probability: Tensor
    within: Tensor
    between: Tensor
    left: Tensor

    @property
    def variance(self) -> Tensor:
        """Predicted variance of an example's estimate by one visit; scalar, nats²."""
        return (self.left.square() / self.probability).sum()

    def known(self, phi: Tensor) -> Tensor:
        """Return b_c·φ_c of each example and cell, shape (B, C)."""
        return (phi * self.between).sum(-1)


def even(cells: Strata, controls: ControlVariates, features: int, first: float) -> Proposal:
    """Return the allocation without a pilot and without control variates.

    Args:
        cells: the strata.
        controls: the control variates, whose coefficients are 0.
        features: 1 + F, likewise.
        first: share of the reconstruction; the proposal density divides the rest.
    """
    first = 1.0 if cells.count == 1 else max(first, 1 / cells.count)
    p = torch.cat([torch.full((1,), first).double(), (1 - first) * cells.ends.diff()])
    within = torch.zeros(cells.count, cells.variates(controls), dtype=torch.float64)
    between = torch.zeros(cells.count, features, dtype=torch.float64)
    return Proposal(p, within, between, torch.full_like(p, torch.nan))


def pilot(
    cells: Strata,
    controls: ControlVariates,
    batch: Batch,
    rows: int,
    draws: int,
    replicates: int,
) -> Proposal:
    """Draw rows in each cell on examples of x, and fit an allocation to them.

    Args:
        cells: the strata.
        controls: the control variates.
        batch: examples, x of shape (N, ...).
        rows: network calls per cell, on average; eight or more.
        draws: of each example in each replicate of the estimate to come.
        replicates: of the estimate to come.
    """
    times, each = visits(draws, controls)
    # two visits per example where the estimate has several visits of one draw, at the distance
    # that they will have; the first one has no neighbour if this occurs in the estimate
    both = min(2, times * replicates) if each == 1 else 1
    replicate = torch.arange(both) * (draws == 1)
    found: list[tuple[Tensor, ...]] = []
    # the reconstruction cannot borrow rows from other cells: it gets about as many, if available,
    # as a cell has with those of its neighbours
    p = torch.ones(cells.count, dtype=torch.float64)
    p[0] = max(1.0, min(FAR, cells.count, rows / 4))
    p = p / p.sum()
    whole = rows * cells.count // (both * each)
    # the first rows are spread evenly; the others follow the allocation, as the estimate will
    part, least = ALIKE
    alike = min(whole, math.ceil(max(least, part * rows) * cells.count / (both * each)))
    for examples in (alike, whole - alike):
        if not examples:
            break
        u = stratified(examples) + torch.arange(both) * _apart(examples, draws, replicates)
        cell, share = stratum_of(p, u % 1)
        found.append(_rows(cells, controls, batch, cell, share, replicate, each))
        fitted = fit_proposal(cells.count, *_usual(*map(torch.cat, zip(*found, strict=True))))
        p = fitted.probability
    return fitted


def _rows(
    cells: Strata,
    controls: ControlVariates,
    batch: Batch,
    cell: Tensor,
    share: Tensor,
    replicate: Tensor,
    each: int,
) -> tuple[Tensor, ...]:
    """Visit examples drawn at random, (B, n) visits; return the arguments of `_usual`."""
    # φ covers all cells, so it is computed once for an example that is visited in many of them
    drawn = torch.randint(len(batch), (len(cell),))
    once, place = drawn.unique(return_inverse=True)
    some = batch[once].to(controls.model.device)
    cost, v = cells.visit(controls, some[place], cell, share, replicate, each)
    phi = torch.cat([controls.between(part) for part in some.x.split(256)])[place[:, None], cell]
    example = drawn.repeat_interleave(cell.shape[1])
    return example, cell.flatten(), cost.flatten(), v.flatten(0, 1), phi.flatten(0, 1)


def _usual(
    example: Tensor, cell: Tensor, cost: Tensor, v: Tensor, phi: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the arguments of `fit_proposal`, with outlying examples neutralised.

    An example is outlying if all its costs are far beyond those of others, or one is not finite.
    """
    finite = cost.isfinite() & v.isfinite().all(1)
    counted = torch.where(finite, cost, torch.nan)
    middle = torch.stack([counted[cell == c].nanmedian() for c in range(int(cell.max()) + 1)])
    middle = middle[cell]
    off = torch.where(finite, (cost - middle).abs(), torch.inf)
    of = example.unique(return_inverse=True)[1]
    silent = apart(off, of)[of]
    cost, some = torch.where(silent, middle, cost), silent[:, None]
    one = torch.ones_like(phi[:, :1])
    phi = torch.cat([one, torch.where(some, 0.0, phi[:, 1:])], 1)
    return cell, cost, torch.where(some, 0.0, v), phi


def visits(draws: int, controls: ControlVariates) -> tuple[int, int]:
    """Return the number of visits in which draws of an example are made, and draws per visit."""
    return (1, 2) if draws == 2 and controls.lends else (draws, 1)


def _apart(examples: int, draws: int, replicates: int) -> Tensor | float:
    """Return the distance in u between a draw of an example and its neighbouring draw."""
    if draws > 1:
        return 1 / (draws * replicates)
    # among independent replicates, the nearest on a circle of half of them
    return (1 - torch.rand(examples, 1, dtype=torch.float64) ** (2 / max(2, replicates))) / 2


def stratum_of(probability: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cell of uniform u, given the probabilities, and the position in it, in [0, 1)."""
    ends = probability.cumsum(0)
    cell = torch.searchsorted(ends, u, right=True).clamp(max=len(ends) - 1)
    share = (u - ends[cell] + probability[cell]) / probability[cell]
    return cell, share.clamp(0, 1 - 2**-53)


def fit_proposal(count: int, cell: Tensor, cost: Tensor, v: Tensor, phi: Tensor) -> Proposal:
    """Fit costs, (n,), by ridge regression on v, (n, G), and φ, (n, 1 + F), in each cell.

    Slopes, in units of the spread of each cell, and spreads are smoothed over neighbouring cells;
    the intercept is of each cell alone.

    Args:
        count: C, the number of cells.
        cell: of each row, shape (n,), two rows or more in each.
        cost: w·cost, shape (n,).
        v: w·v, shape (n, G).
        phi: of the example and the cell of each row, shape (n, 1 + F).
    """
    rows, typical = cell.bincount(minlength=count).double(), len(cell) / count

    def mean(of: Tensor) -> Tensor:
        """Return the mean in each cell, (C, ...)."""
        sums = torch.zeros(count, *of.shape[1:], dtype=torch.float64).index_add_(0, cell, of)
        return sums / over(rows, sums)

    place = torch.arange(count)
    distance = (place[:, None] - place).abs().double()
    # the reconstruction is a term of another kind, so it is not smoothed with the others
    alike = (place > 0)[:, None] == (place > 0)

    def around(cells: float) -> Tensor:
        """Return the weights of each cell's neighbours, (C, C)."""
        return (1 - distance / (cells + 1)).clamp(min=0) * alike

    # the more rows a cell has, the more the bias from its neighbours' slopes matters
    near, far = around(NEAR / typical ** (1 / 3)), around(FAR)
    # the few rows of one cell may miss rare large costs, so spreads shrink to the neighbours'
    lent = far / far.sum(1, keepdim=True)
    y = cost - mean(cost)[cell]
    own = mean(y.square()) * rows / (rows - 1)
    variance, borrowed = own, BORROWED
    for _ in range(2):
        variance = (rows * own + borrowed * lent @ own) / (rows + borrowed)
        borrowed = BORROWED * max(1.0, _excess(y, variance[cell]) / 2)
    size = variance.sqrt().clamp(min=1e-12 * cost.abs().max() + 1e-300)
    y = y / size[cell]
    design = torch.cat([v / size[cell, None], phi[:, 1:]], 1)
    # φ has variance 1 over the examples, however little of it the pilot saw
    least = torch.ones_like(design[0])
    least[: v.shape[1]] = 1e-300
    scale = mean(design.square())
    design = design - mean(design)[cell]
    slopes, error = [], torch.empty_like(y)
    for c, weights in enumerate(near):
        used = weights[cell] > 0
        unit = scale[weights > 0].mean(0).sqrt().maximum(least)
        slope, left_out = _ridge(
            design[used] / unit, y[used], weights[cell[used]], 1 / rows[cell[used]]
        )
        slopes.append(slope / unit)
        error[cell == c] = left_out[cell[used] == c]
    weighted = far * rows
    left = weighted @ mean(error.square()) / weighted.sum(1)
    sd = size * left.sqrt()
    p = _probability(sd, _excess(error, left[cell]) / (typical + BORROWED))
    table = torch.stack(slopes)
    within, between = table[:, : v.shape[1]], size[:, None] * table[:, v.shape[1] :]
    level = mean(cost - (v * within[cell]).sum(1) - (phi[:, 1:] * between[cell]).sum(1))
    return Proposal(p, within, torch.cat([level[:, None], between], 1), sd)


def _probability(sd: Tensor, doubt: float) -> Tensor:
    """Return p proportional to sd, (C,), plus an even share, larger the less sd is known."""
    best = sd / sd.sum() if sd.sum() > 0 else torch.full_like(sd, 1 / len(sd))
    evenly = min(max(EVEN, DOUBT * doubt), 1 / 2)
    return (1 - evenly) * best + evenly / len(sd)


def _excess(error: Tensor, variance: Tensor) -> float:
    """Return kurtosis - 1, which is n times the relative variance of a variance of n rows."""
    seen = variance > 0
    return (error[seen].square() / variance[seen] - 1).square().sum().item() / len(error)


def _ridge(design: Tensor, y: Tensor, weight: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return ridge coefficients of normalised columns, and leave-one-out errors of the rows.

    Rows are centred by the mean of their cell, of which each row is the share `share`.
    """
    weighted = weight[:, None] * design
    gram = weighted.T @ design + RIDGE * weight.sum() * torch.eye(design.shape[1], dtype=y.dtype)
    inverse = torch.linalg.inv(gram)
    solution = inverse @ (weighted.T @ y)
    leverage = (weighted @ inverse * design).sum(1) + share
    return solution, (y - design @ solution) / (1 - leverage).clamp(min=0.1)


def estimate(
    cells: Strata,
    controls: ControlVariates,
    allocation: Proposal,
    batch: Batch,
    u: Tensor,
    each: int = 1,
    known: Tensor | None = None,
) -> Tensor:
    """Estimate the costs in each cell without bias from visits at u; they add up to the bound.

    Args:
        cells: the strata.
        controls: the control variates.
        allocation: from a pilot.
        batch: examples on the device of the model, x of shape (B, ...).
        u: uniform draws, shape (B, R, n), for means over n visits in each of R replicates, which
            are uncorrelated given x.
        each: draws per visit.
        known: b·φ of the examples, (B, C), if it is computed already.

    Returns:
        Costs, shape (B, R, C), nats.
    """
    examples, replicates, times = u.shape
    cell, share = stratum_of(allocation.probability, u.flatten(1))
    replicate = torch.arange(replicates).repeat_interleave(times)
    cost, v = cells.visit(controls, batch, cell, share, replicate, each)
    if known is None:
        known = allocation.known(controls.between(batch.x))
    left = cost - (v * allocation.within[cell]).sum(-1) - known.gather(1, cell)
    sums = torch.zeros(examples, replicates, cells.count, dtype=torch.float64)
    of_visit = (left / (allocation.probability[cell] * times)).view(u.shape)
    sums.scatter_add_(2, cell.view(u.shape), of_visit)
    return known[:, None] + sums
