r"""Which terms to draw, how often, and what to take off: an unbiased estimate of small variance.

The costs of an example, reconstruction and diffusion, are one sum over cells: cell 0 is the
reconstruction, the others divide u ∈ [0, 1] of the diffusion term evenly. A draw falls into cell c
with probability p_c and gives

    y = Σ_c b_c·φ_c(x) + [ w_c (cost - k_c·v) - b_c·φ_c(x) ] / p_c ,        w_c the width of c in u

v and φ from `control`. E[y] is the sum of costs for any b, k and p > 0. A pilot on some of the
examples fits b and k cell by cell (least squares over neighbouring cells) and gives what is left,
sd_c; the best p is proportional to it (Neyman 1934). A share of the draws, 1/√n for n pilot rows
in a cell and no less than a tenth, is spread evenly, so no weight 1/p_c exceeds ten times the
number of cells, whatever the pilot missed.

Where there are calls for it, draws come in pairs at the same times, which lend each other their
context (`control`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nelbo.control import Controls, Draw, observe
from nelbo.data import as_examples
from nelbo.estimate import Times, stratified
from nelbo.terms import Decode, Term

CELLS = 32  # of the diffusion term, at most
SPREAD = 4.0  # cells to either side that lend a cell their pilot rows
BORROWED = 16.0  # pilot rows of its own that its neighbours' variance counts for
EVEN = 0.1  # share of the draws that do not follow the pilot, at least
RIDGE = 0.02  # of each coefficient, relative to the rows that determine it


class Cells:
    """The cells of the costs for one kind of times."""

    def __init__(self, times: Times) -> None:
        self.times = times
        self.diffusion = CELLS if times.steps is None else min(times.terms, CELLS)
        self.count = 1 + self.diffusion
        u = torch.arange(self.diffusion + 1, dtype=torch.float64) / max(self.diffusion, 1)
        self.edges = times.at(u) if self.diffusion else torch.tensor([1.0]).double()

    def draw(
        self, controls: Controls, x: Tensor, cell: Tensor, share: Tensor, paired: bool
    ) -> tuple[Tensor, Tensor]:
        """w_c·cost, shape (B,), and w_c·v, shape (B, G), of a draw or a pair of them for each row.

        Args:
            controls: the variates and their model.
            x: examples, shape (B, ...).
            cell: of each, shape (B,).
            share: where in its cell, in [0, 1), shape (B,).
            paired: two draws for each, which are averaged.
        """
        cost = torch.zeros(len(x), dtype=torch.float64)
        v = torch.zeros(len(x), controls.variates, dtype=torch.float64)
        rows = max(1, controls.model.rows // 2)
        for kind in (cell == 0, cell > 0):
            # like times together: the cost of an integral depends on the noise
            order = kind.nonzero()[:, 0][(cell + share)[kind].argsort()]
            for part in order.split(rows) if kind.any() else ():
                term, factor = self._term(cell[part], share[part].to(x.device))
                draws = [observe(controls.model, x[part], term) for _ in range(2 if paired else 1)]
                others: list[Draw | None] = [draws[1], draws[0]] if paired else [None]
                for one, other in zip(draws, others, strict=True):
                    cost[part] += factor * one.cost.cpu() / len(draws)
                    v[part] += factor * controls.within(one, other).double().cpu() / len(draws)
        return cost, v

    def _term(self, cell: Tensor, share: Tensor) -> tuple[Term, float]:
        if (cell == 0).any():
            return Decode(torch.full_like(share, self.times.first)), 1.0
        u = (cell.to(share.device) - 1 + share) / self.diffusion
        term, factor = self.times.term(u)
        return term, factor / self.diffusion


@dataclass(frozen=True)
class Allocation:
    """What a pilot settles: p (C,), k (C, G), b (C, 1 + F), and the sd of w_c cost (C,) left."""

    probability: Tensor
    within: Tensor
    between: Tensor
    left: Tensor

    def locate(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The cell of uniform draws, and where in it, in [0, 1); shape of u."""
        ends = self.probability.cumsum(0)
        cell = torch.searchsorted(ends, u, right=True).clamp(max=len(ends) - 1)
        share = (u - ends[cell] + self.probability[cell]) / self.probability[cell]
        return cell, share.clamp(0, 1 - 2**-53)

    def known(self, phi: Tensor) -> Tensor:
        """b_c·φ_c of each example and cell, shape (B, C)."""
        return (phi * self.between).sum(-1)


def even(cells: Cells, controls: Controls, features: int) -> Allocation:
    """No pilot: cells alike, and nothing taken off."""
    p = torch.full((cells.count,), 1 / cells.count, dtype=torch.float64)
    none = torch.zeros(cells.count, controls.variates + features, dtype=torch.float64)
    return Allocation(p, none[:, features:], none[:, :features], torch.full_like(p, torch.nan))


def pilot(cells: Cells, controls: Controls, x: Tensor, rows: int, paired: bool) -> Allocation:
    """Draw so many rows in each cell on examples of x, and fit.

    Args:
        cells: where.
        controls: the variates.
        x: examples, shape (N, ...).
        rows: network calls in each cell; none, and there is no pilot.
        paired: draws come in pairs.
    """
    device = controls.model.device
    if not rows:
        features = controls.between(as_examples(x[:1]).to(device)).shape[-1]
        return even(cells, controls, features)
    groups = rows // 2 if paired else rows
    cell = torch.arange(cells.count).repeat_interleave(groups)
    share = torch.cat([stratified(groups)[:, 0] for _ in range(cells.count)])
    chosen = torch.randint(len(x), cell.shape)
    cost, v = cells.draw(controls, as_examples(x[chosen]).to(device), cell, share, paired)
    # an example is drawn in many cells, and its φ is of them all
    once, place = chosen.unique(return_inverse=True)
    some = as_examples(x[once]).to(device)
    phi = torch.cat([controls.between(part) for part in some.split(256)])[place, cell]
    shape = cells.count, groups
    return fit(cost.view(shape), v.view(*shape, -1), phi.view(*shape, -1))


def fit(cost: Tensor, v: Tensor, phi: Tensor) -> Allocation:
    """Ridge regression of cost (C, n) on v (C, n, G) and φ (C, n, 1 + F), cell by cell.

    A cell's slopes and spread lean on its neighbours', slopes in units of each cell's spread; its
    level is its own.
    """
    count, groups = cost.shape
    place = torch.arange(count)
    distance = (place[:, None] - place).abs().double()
    # the reconstruction is a term of another kind: it lends nothing and borrows nothing
    alike = (place > 0)[:, None] == (place > 0)
    near = (1 - distance / (SPREAD + 1)).clamp(min=0) * alike
    # a few rows of one cell may all miss what is rare in it: spread is shrunk to the neighbours'
    lent = BORROWED * near / near.sum(1, keepdim=True)
    variance = (groups * cost.var(1) + lent @ cost.var(1)) / (groups + BORROWED)
    size = variance.sqrt().clamp(min=1e-12 * cost.abs().max() + 1e-300)
    y = (cost - cost.mean(1, keepdim=True)) / size[:, None]
    design = torch.cat([v / size[:, None, None], phi[..., 1:]], -1)
    # φ has variance 1 over the examples, however little of it the pilot saw
    least = torch.ones_like(design[0, 0])
    least[: v.shape[-1]] = 1e-300
    scale = design.square().mean(1)
    design = design - design.mean(1, keepdim=True)
    slopes, left = [], []
    for weights in near:
        rows = weights > 0
        weight = weights[rows].repeat_interleave(groups)
        unit = scale[rows].mean(0).sqrt().maximum(least)
        slope, error = _ridge(design[rows].flatten(0, 1) / unit, y[rows].flatten(), weight, groups)
        slopes.append(slope / unit)
        left.append(error)
    sd = size * torch.stack(left)
    p_best = sd / sd.sum() if sd.sum() > 0 else torch.full_like(sd, 1 / count)
    # what few rows say of a spread is known to 1/√(2 rows): a cell they underrate has heavy tails
    spread_evenly = max(EVEN, groups**-0.5)
    p = (1 - spread_evenly) * p_best + spread_evenly / count
    table = torch.stack(slopes)
    within, between = table[:, : v.shape[-1]], size[:, None] * table[:, v.shape[-1] :]
    own = cost - (v * within[:, None]).sum(-1) - (phi[..., 1:] * between[:, None]).sum(-1)
    return Allocation(p, within, torch.cat([own.mean(1, keepdim=True), between], 1), sd)


def _ridge(design: Tensor, y: Tensor, weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Coefficients of columns of one unit, and the root mean square error of a row left out.

    Rows have the mean of their `groups`, a cell, taken off.
    """
    weighted = weight[:, None] * design
    gram = weighted.T @ design + RIDGE * weight.sum() * torch.eye(design.shape[1], dtype=y.dtype)
    inverse = torch.linalg.inv(gram)
    solution = inverse @ (weighted.T @ y)
    leverage = (weighted @ inverse * design).sum(1) + 1 / groups
    residual = (y - design @ solution) / (1 - leverage).clamp(min=0.1)
    return solution, ((weight * residual.square()).sum() / weight.sum()).sqrt()


def estimate(
    cells: Cells,
    controls: Controls,
    allocation: Allocation,
    x: Tensor,
    u: Tensor,
    paired: bool,
) -> Tensor:
    """Costs of each cell, estimated without bias from draws at u; they add up to the bound's.

    Args:
        cells: where.
        controls: the variates.
        allocation: from a pilot.
        x: examples on the device of the model, shape (B, ...).
        u: uniform draws, shape (B, R, n), averaged over n.
        paired: two network calls for each u.

    Returns:
        shape (B, R, C), nats.
    """
    examples, replicates, draws = u.shape
    cell, share = allocation.locate(u.flatten())
    rows = x.repeat_interleave(replicates * draws, 0)
    cost, v = cells.draw(controls, rows, cell, share, paired)
    known = allocation.known(controls.between(x))
    row = torch.arange(examples).repeat_interleave(replicates * draws)
    left = cost - (v * allocation.within[cell]).sum(1) - known[row, cell]
    place = torch.arange(examples * replicates).repeat_interleave(draws) * cells.count + cell
    sums = torch.zeros(examples * replicates * cells.count, dtype=torch.float64)
    sums.index_add_(0, place, left / (allocation.probability[cell] * draws))
    return known[:, None] + sums.view(examples, replicates, cells.count)
