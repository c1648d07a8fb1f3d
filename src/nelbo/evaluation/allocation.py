r"""Stratification, Neyman allocation and control variates: an unbiased estimate of low variance.

The costs of an example, reconstruction and diffusion, are one sum over strata. Stratum 0 is the
reconstruction; the others divide u ∈ [0, 1] of the diffusion term into parts of about equal cost
under a density q (`time_density`), in which an expensive step is a stratum of its own. A draw of
an example falls into stratum c with probability p_c, and within the stratum follows q; it gives

    y = Σ_c b_c·φ_c(x) + [ w (cost - k_c·v) - b_c·φ_c(x) ] / p_c ,        w = q(c)/q(u)

with v and φ of `control_variates`; the centred position in the stratum is a further v. E[y] is the
sum of costs for any b, k and p > 0. A pilot on some of the examples fits b and k in each stratum
and estimates the residual standard deviation sd_c, to which the optimal p is proportional (Neyman
1934). Strata share information: in the regression of a stratum its neighbours together count as
POOLED rows, however many rows they have. Rows with large residuals get less weight (Huber 1964),
because a single outlier would change the coefficients. A v that has a usual coefficient counts as
large as the costs, however little of it the rows show: with rare values that they missed, its
slope would be that of chance. A share of the draws, 2/n for n rows of
the pilot in a stratum, is spread evenly, so that no weight 1/p_c exceeds n/2 times the number of
strata, whatever the pilot missed.

If the network's prediction at one draw is context for another (`control_variates`), a draw is a
pair of network calls half a stratum apart; each is the context of the other, and the mean of both
is one cost. Different draws are independent.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nelbo._utils.numerics import over
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.terms import ReconstructionTerm, Term
from nelbo.diffusion.times import TimeDiscretization, stratified
from nelbo.evaluation.intervals import apart
from nelbo.evaluation.time_density import TimeDensity
from nelbo.evaluation.time_density import even as even_density
from nelbo.evaluation.variate import together

if TYPE_CHECKING:
    from nelbo.evaluation.control_variates import ControlVariates

STRATA = 32  # strata of the diffusion term, at most
POOLED = 64.0  # rows for which the neighbours of a stratum count in its fit
DOUBT = 0.03  # ridge penalty, in the rows' weight
EVEN = 2.0  # share of the draws that is spread evenly, times the pilot's rows of a stratum
OUTLIER = 4.0  # error of a row, in medians, beyond which the row weighs less (Huber 1964)


class Strata:
    """The strata of the costs of some times: the reconstruction and parts of the diffusion term.

    `density` is of u and should follow the costs; uniform by default. `most` is the number
    of strata of the diffusion term, at most.
    """

    def __init__(
        self, times: TimeDiscretization, density: TimeDensity | None = None, most: int = STRATA
    ) -> None:
        self.times, self.density = times, even_density(times) if density is None else density
        edges = torch.tensor(self.density.groups(most) if times.terms else [0])
        #: the distribution function of the density at the edges
        self.ends = torch.cat([torch.zeros(1).double(), self.density.mass.cumsum(0)])[edges]
        self.count = len(edges)
        at = self.density.u[edges]
        self.edges = times.at(at) if self.count > 1 else torch.tensor([1.0]).double()

    def draw(
        self, controls: "ControlVariates", batch: Batch, stratum: Tensor, place: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw w·cost, shape (B,), and w·v, shape (B, G + 1), means over the calls of a draw.

        Args:
            controls: the control variates and their model.
            batch: examples, x of shape (B, ...).
            stratum: of each draw, shape (B,).
            place: position in the stratum, in [0, 1), shape (B,).
        """
        cost = torch.zeros(len(batch), dtype=torch.float64)
        v = torch.zeros(len(batch), controls.columns + 1, dtype=torch.float64)
        for kind in (stratum == 0, stratum > 0):
            for part in kind.nonzero()[:, 0].split(max(1, controls.model.rows // controls.calls)):
                if len(part):
                    some = batch[part], stratum[part], place[part]
                    cost[part], v[part] = self._call(controls, *some)
        return cost, v

    def _call(
        self, controls: "ControlVariates", batch: Batch, stratum: Tensor, place: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the same for draws that are all of the reconstruction, or none."""
        places = (place + torch.arange(controls.calls)[:, None] / controls.calls) % 1
        terms = [self._term(stratum, at, batch.x.device) for at in places]
        draws = [term.draw(controls.model, batch) for term, _ in terms]
        factor = torch.stack([factor for _, factor in terms])
        cost = (factor * torch.stack([draw.cost.cpu() for draw in draws])).mean(0)
        v = (factor[..., None] * controls.within(draws).cpu()).mean(0)
        # costs change within a stratum, and the mean of uniform positions is known
        centred = (places.mean(0) - 1 / 2) * (stratum > 0)
        return cost, torch.cat([v, centred[:, None]], 1)

    def _term(self, stratum: Tensor, place: Tensor, device: torch.device) -> tuple[Term, Tensor]:
        """Return the terms at positions in the strata, and w times the factor of their cost."""
        if (stratum == 0).any():
            first = torch.full_like(place, self.times.first).to(device)
            return ReconstructionTerm(first), torch.ones_like(place)
        width = self.ends.diff()[stratum - 1]
        u, weight = self.density.at(self.ends[stratum - 1] + place * width)
        term, factor = self.times.term(u.to(device))
        return term, factor * weight * width


@dataclass(frozen=True)
class Proposal:
    """Probabilities of the strata and coefficients of the control variates, from a pilot.

    Args:
        probability: p, (S,).
        within: k, (S, G + 1).
        between: b, (S, 1 + F).
        left: residual standard deviation of w·cost in each stratum, (S,), nats.
        variance: of the estimate of a random example by one draw; scalar, nats². It is the pilot's
            estimate plus one standard deviation, because a pilot may miss rare large costs.
        effect: the part of this variance that lies between examples, which more draws of the
            same examples do not reduce.
    """

    probability: Tensor
    within: Tensor
    between: Tensor
    left: Tensor
    variance: Tensor
    effect: Tensor

    def known(self, phi: Tensor) -> Tensor:
        """Return b_c·φ_c of each example and stratum, shape (B, S)."""
        return (phi * self.between).sum(-1)


def even(strata: Strata, controls: "ControlVariates", first: float) -> Proposal:
    """Return the proposal without a pilot, with the usual coefficients of control variates.

    The reconstruction has the share `first`, which is at least even unless it is 0, and the
    density of the strata divides the rest.
    """
    if first > 0:
        first = 1.0 if strata.count == 1 else max(first, 1 / strata.count)
    p = torch.cat([torch.full((1,), first).double(), (1 - first) * strata.ends.diff()])
    within = torch.zeros(strata.count, controls.columns + 1, dtype=torch.float64)
    within[:, :-1] = controls.usual
    between = torch.zeros(strata.count, controls.features, dtype=torch.float64)
    unknown = torch.full_like(p, torch.nan)
    return Proposal(p, within, between, unknown, unknown[0], unknown[0])


def pilot(strata: Strata, controls: "ControlVariates", batch: Batch, calls: int) -> Proposal:
    """Draw rows in each stratum on examples of x, and fit a proposal to them.

    Args:
        strata: the strata.
        controls: the control variates.
        batch: examples, x of shape (N, ...).
        calls: network calls per stratum, on average; eight or more.
    """
    # the reconstruction has no neighbours, and what is rare in it may be most of the variance
    p = torch.ones(strata.count, dtype=torch.float64)
    p[0] = min(4, strata.count)
    p = p / p.sum()
    stratum, place = stratum_of(p, stratified(calls * strata.count // controls.calls)[:, 0])
    example = batch.order[torch.randint(len(batch), stratum.shape)]
    once, index = example.unique(return_inverse=True)
    some = batch[once].to(controls.model.device)
    cost, v = strata.draw(controls, some[index], stratum, place)
    examples = some.x.split(together(controls.model.dims))
    phi = torch.cat([controls.between(part) for part in examples])[index, stratum]
    alike = _alike(index, stratum, cost, v)
    if not stratum[alike].bincount(minlength=strata.count).all():
        return even(strata, controls, DOUBT)
    # the penalty shrinks the coefficients to those of no pilot
    known = torch.cat([controls.usual, torch.zeros(1).double()])
    rest = cost - v @ known
    rows = stratum[alike], rest[alike], v[alike], phi[alike]
    found = fit_proposal(strata.count, *rows, known != 0)
    found = replace(found, within=found.within + known)
    left = cost - (v * found.within[stratum]).sum(1) - (phi * found.between[stratum]).sum(1)
    left = left.nan_to_num(0.0, 0.0, 0.0)
    parts = left.square() / (found.probability * stratum.bincount())[stratum]
    variance = parts.sum().maximum(found.variance) + parts.square().sum().sqrt()
    # the product of two draws of an example has the square of its effect as its mean
    each, square = torch.zeros(2, len(once), dtype=torch.float64)
    each.index_add_(0, index, left / p[stratum])
    square.index_add_(0, index, (left / p[stratum]).square())
    pairs = index.bincount() * (index.bincount() - 1)
    effect = (each.square() - square).sum() / pairs.sum().clamp(min=1)
    return replace(found, variance=variance, effect=effect.clamp(min=0).minimum(variance))


def _alike(example: Tensor, stratum: Tensor, cost: Tensor, v: Tensor) -> Tensor:
    """Return a mask of the rows to fit a proposal to: those of examples that are not outliers.

    An example is outlying if all its costs are far beyond those of others, or one is not finite.
    """
    cost = torch.where(v.isfinite().all(1), cost, torch.nan)
    middle = torch.stack([cost[stratum == c].nanmedian() for c in range(stratum.max() + 1)])
    return ~apart((cost - middle[stratum]).abs(), example)[example]


def stratum_of(probability: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stratum of uniform u, given the probabilities, and the position, in [0, 1)."""
    ends = probability.cumsum(0)
    stratum = torch.searchsorted(ends, u, right=True).clamp(max=len(ends) - 1)
    place = (u - ends[stratum] + probability[stratum]) / probability[stratum]
    return stratum, place.clamp(0, 1 - 2**-53)


def fit_proposal(
    count: int, stratum: Tensor, cost: Tensor, v: Tensor, phi: Tensor, large: Tensor
) -> Proposal:
    """Fit costs, (n,), by ridge regression on v, (n, G), and φ, (n, 1 + F), in each stratum.

    Slopes, in units of the spread of each stratum, and spreads are pooled in part with those of
    neighbouring strata; the intercept is of each stratum alone.

    Args:
        count: S, the number of strata.
        stratum: of each row, shape (n,).
        cost: w·cost, shape (n,).
        v: w·v, shape (n, G).
        phi: of the example and the stratum of each row, shape (n, 1 + F).
        large: mask of the v that vary about as much as costs, (G,), however little of it the rows
            show: what is rare in them may be most of the variance.
    """
    rows = stratum.bincount(minlength=count).double()

    def mean(of: Tensor) -> Tensor:
        """Return the mean in each stratum, (S, ...)."""
        sums = torch.zeros(count, *of.shape[1:], dtype=torch.float64).index_add_(0, stratum, of)
        return sums / over(rows.clamp(min=1), sums)

    place = torch.arange(count)
    near = torch.exp2(-(place[:, None] - place).abs().double())
    # the reconstruction is a term of another kind, so it is not pooled with the others
    near = near * ((place > 0)[:, None] == (place > 0)) * (1 - torch.eye(count))
    #: weight of a row of each stratum in the fit of another, (S, S)
    pooled = torch.eye(count) + POOLED * near / (near @ rows).clamp(min=POOLED)[:, None]

    def spread(variance: Tensor) -> Tensor:
        return ((pooled * rows) @ variance / (pooled @ rows)).sqrt()

    y = cost - mean(cost)[stratum]
    size = spread(mean(y.square()) * rows / (rows - 1).clamp(min=1))
    size = size.clamp(min=1e-15 * cost.abs().sum() + 1e-150)
    y = y / size[stratum]
    design = torch.cat([v / size[stratum, None], phi[:, 1:]], 1)
    # φ has variance 1 over the examples, however little of it the pilot saw
    least = torch.ones_like(design[0])
    least[: v.shape[1]] = large.double().clamp(min=1e-300)
    square = mean(design.square())
    design = design - mean(design)[stratum]
    shares = pooled * rows
    unit = (shares @ square / shares.sum(1, keepdim=True)).sqrt().maximum(least)
    slopes, left_out = _ridge(design / unit[:, None], y, pooled[:, stratum], 1 / rows[stratum])
    error = left_out[stratum, torch.arange(len(y))]
    sd = size * spread(mean(error.square()))
    table = slopes / unit
    within, between = table[:, : v.shape[1]], size[:, None] * table[:, v.shape[1] :]
    level = mean(cost - (v * within[stratum]).sum(1) - (phi[:, 1:] * between[stratum]).sum(1))
    best = sd / sd.sum() if sd.sum() > 0 else torch.full_like(sd, 1 / count)
    # what n rows of a stratum did not show may be in one of n draws
    evenly = min(1.0, EVEN * count / len(cost))
    p = (1 - evenly) * best + evenly / count
    variance = (sd.square() / p).sum()
    between = torch.cat([level[:, None], between], 1)
    return Proposal(p, within, between, sd, variance, torch.zeros_like(variance))


def _ridge(design: Tensor, y: Tensor, weight: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return ridge coefficients for each stratum, and leave-one-out errors of all rows.

    Args:
        design: normalised columns, (S, n, G); they are centred by the mean of the row's stratum.
        y: shape (n,).
        weight: of each row in the fit of each stratum, (S, n).
        share: of each row in the mean of its stratum, (n,).

    Returns:
        Coefficients (S, G) and errors (S, n).
    """
    penalty = DOUBT * torch.eye(design.shape[2], dtype=y.dtype)
    used = weight > 0
    for _ in range(2):  # the second time, outlying rows weigh less
        weighted = weight[..., None] * design
        inverse = torch.linalg.inv(weighted.mT @ design + weight.sum(1)[:, None, None] * penalty)
        solution = (inverse @ (weighted.mT @ y)[..., None])[..., 0]
        leverage = (weighted @ inverse).mul_(design).sum(2) + share
        error = (y - (design @ solution[..., None])[..., 0]) / (1 - leverage).clamp(min=0.1)
        usual = OUTLIER * error.abs().where(used, torch.nan).nanmedian(1, keepdim=True).values
        weight = torch.where(error.abs() > usual, weight * usual / error.abs(), weight)
    return solution, error


def estimate(
    strata: Strata,
    controls: "ControlVariates",
    proposal: Proposal,
    batch: Batch,
    u: Tensor,
    known: Tensor | None = None,
) -> Tensor:
    """Estimate the costs in each stratum without bias from draws at u; they add up to the bound.

    Args:
        strata: the strata.
        controls: the control variates.
        proposal: from a pilot.
        batch: examples on the device of the model, x of shape (B, ...).
        u: uniform, shape (B, n), of n draws of each example, over which the mean is taken.
        known: b·φ of the examples, (B, S), if it is computed already.

    Returns:
        Costs, shape (B, S), nats.
    """
    if known is None:
        known = proposal.known(controls.between(batch.x))
    row = torch.arange(len(u)).repeat_interleave(u.shape[1])
    stratum, place = stratum_of(proposal.probability, u.flatten())
    cost, v = strata.draw(controls, batch[row], stratum, place)
    left = cost - (v * proposal.within[stratum]).sum(1) - known[row, stratum]
    left = left / (proposal.probability[stratum] * u.shape[1])
    return known.index_put((row, stratum), left, accumulate=True)
