r"""The columns of a table that are numbers: real, or on a lattice too fine to count its points.

e = T(x), T increasing, has a Gaussian process, and given the other columns a mixture for its law,

    P(e) = Σ_c w_c N(e; μ_c, s_c²),     so that     P(e|z_t) = Σ_c w_c(z) N(e; μ_c(z), s_c²(z)),
    w_c(z) ∝ w_c N(z_t; √α_t μ_c, α_t s_c² + 1-α_t),     s_c²(z) = s_c² (1-α_t)/(α_t s_c² + 1-α_t),
    μ_c(z) = μ_c + √α_t s_c² (z_t - √α_t μ_c)/(α_t s_c² + 1-α_t)

exactly, at all noise levels: the network only adds context, as with levels. Components with s = 0
are values that repeat. ê = Σ_c w_c(z) μ_c(z); the reverse step is the marginal of q(z_s|z_t,e);
the decoder is the density of T(x) times T'(x), or P of the cell [x - Δ/2, x + Δ/2].

A missing number is x = NaN. The bound holds for any law q(z|x), also one that differs where x is
missing: there z is noise at all times and remembers nothing,

    q(z_t|x) = N(0, 1),   q(z_s|z_t,x) = N( √(α_t/α_s) z_t, 1 - α_t/α_s ),

the stationary chain, whose rate is that of e = √α_t z_t in place of e. It is that of a component
N(0, 1), which is there for it. There is nothing to decode, since a symbol beside the column says
that it is missing and is decoded itself: P is normalised over {missing} ∪ ℝ.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.nn.functional import softplus

from nelbo._distributions import LevelMixture, Shape, log_between
from nelbo._numerics import over
from nelbo.data.layout import Place, Transform
from nelbo.heads import Head, Prediction
from nelbo.likelihood import Likelihood
from nelbo.process import Gaussian, Process, per_example
from nelbo.reverse import Reverse
from nelbo.schedules import Schedule

COMPONENTS = 8  # of each column
ATOMS = 16  # values of a column that repeat, at most
FREQUENT = 0.01  # share of the rows that makes a value one of them
NARROWEST = 1e-3  # s of a component, in standard deviations of the column
KNOTS = 32  # of a quantile transform
FITTED = 4096  # values that the mixture of a column is fitted to


class Increasing(nn.Module):
    """e = T(x) for each column: straight lines between knots, and beyond, T(u_k) = e_k, where

        u = x;   or where the transform is log, with the least positive value c of training,
        u = 1 + log(x/c) from c on, and x/c below it, so that all numbers have a place.

    Two knots standardise u. Of a quantile transform the knots are quantiles of u, and e_k those
    of the normal law. log T'(x) is in every density, which so is one of x.

    Args:
        columns: how many.
        knots: in each.
        transforms: of each column; "standardise" where left out.
    """

    x: Tensor
    e: Tensor
    unit: Tensor
    log: Tensor

    def __init__(
        self, columns: int, knots: int = 2, transforms: Sequence[Transform] | None = None
    ) -> None:
        super().__init__()
        self.transforms = transforms or ["standardise"] * columns
        if "quantile" in self.transforms:
            knots = max(knots, KNOTS)
        at = torch.linspace(-1, 1, knots, dtype=torch.float64).expand(columns, -1)
        self.register_buffer("x", at.clone())
        self.register_buffer("e", at.clone())
        log = [transform == "log" for transform in self.transforms]
        self.register_buffer("log", torch.tensor(log), persistent=False)
        self.register_buffer("unit", torch.ones(columns, dtype=torch.float64))

    def start_from(self, x: Tensor) -> None:
        """T from x, (N, D); NaN does not count."""
        positive = torch.where(x > 0, x.double(), torch.inf).amin(0)
        self.unit.copy_(torch.where(positive.isfinite(), positive, 1.0))
        u = self._scaled(x)
        mean = u.nanmean(0)
        spread = (u - mean).square().nanmean(0).sqrt()
        spread = torch.where(spread > 0, spread, 1.0)
        self.x.copy_(mean[:, None] + spread[:, None] * self.e)
        share = (torch.arange(self.x.shape[1], dtype=torch.float64) + 0.5) / self.x.shape[1]
        for i, transform in enumerate(self.transforms):
            known = u[~u[:, i].isnan(), i]
            if transform == "quantile" and len(known):
                # values that repeat would make knots fall together
                least = spread[i] * NARROWEST * torch.arange(len(share))
                found = torch.quantile(known[:: math.ceil(len(known) / 2**20)], share)
                self.x[i] = (found - least).cummax(0).values + least
                self.e[i] = torch.special.ndtri(share)

    def _scaled(self, x: Tensor) -> Tensor:
        """u, shape of x."""
        x = x.double()
        v = x / self.unit
        return torch.where(self.log, torch.where(v < 1, v, 1 + v.clamp(min=1).log()), x)

    def _segment(self, v: Tensor, knots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """v_k, w_k and the slope of the line on which v lies, from knots v to the others w."""
        others = self.e if knots is self.x else self.x
        flat = v.reshape(-1, len(knots)).T.contiguous()
        k = (torch.searchsorted(knots, flat).T.reshape(v.shape) - 1).clamp(0, knots.shape[1] - 2)
        columns = torch.arange(knots.shape[0], device=v.device)
        low, high = knots[columns, k], knots[columns, k + 1]
        low_w, high_w = others[columns, k], others[columns, k + 1]
        return low, low_w, (high_w - low_w) / (high - low)

    def forward(self, x: Tensor) -> Tensor:
        u = self._scaled(x)
        low, e, tangent = self._segment(u, self.x)
        return e + tangent * (u - low)

    def log_slope(self, x: Tensor) -> Tensor:
        """log T'(x), shape of x."""
        of_u = self._segment(self._scaled(x), self.x)[2].log()
        return of_u - torch.where(self.log, torch.maximum(x.double(), self.unit).log(), 0.0)

    def inverse(self, e: Tensor) -> Tensor:
        """x = T⁻¹(e), shape of e."""
        low, u, tangent = self._segment(e.double(), self.e)
        u = u + tangent * (e.double() - low)
        x = self.unit * torch.where(u < 1, u, (u.clamp(min=1) - 1).exp())
        return torch.where(self.log, x, u)


class Numbers(Gaussian):
    """The Gaussian process of numbers, some of which are missing: NaN, in x and in e.

    Args:
        schedule: γ(t).
        transform: T.
    """

    def __init__(self, schedule: Schedule, transform: Increasing) -> None:
        Process.__init__(self, schedule)
        self.transform = transform

    def start_from(self, x: Tensor) -> None:
        self.transform.start_from(x)

    def embed(self, x: Tensor) -> Tensor:
        e: Tensor = self.transform(x)
        return e

    def marginal(self, e: Tensor, t: Tensor) -> Independent:
        known = super().marginal(e.nan_to_num(), t).base_dist
        missing = e.isnan()
        loc, scale = known.loc.masked_fill(missing, 0.0), known.scale.masked_fill(missing, 1.0)
        return per_example(Normal(loc, scale, validate_args=False))

    def posterior(self, z: Tensor, e: Tensor, s: Tensor, t: Tensor) -> Independent:
        known = super().posterior(z, e.nan_to_num(), s, t).base_dist
        forgotten = super().transition(z, s, t).base_dist  # the stationary chain is reversible
        missing = e.isnan()
        loc = torch.where(missing, forgotten.loc, known.loc)
        scale = torch.where(missing, forgotten.scale, known.scale)
        return per_example(Normal(loc, scale, validate_args=False))

    def rate(self, z: Tensor, e: Tensor, e_hat: Tensor, t: Tensor) -> Tensor:
        signal = over((self.log_alpha(t) / 2).exp(), z)
        return super().rate(z, torch.where(e.isnan(), signal * z, e), e_hat, t)


@dataclass(frozen=True)
class MixturePrediction(Prediction):
    """P(e|z_t): log-weights, means and variances of the components, (B, D, C) each.

    The first component is that of what is missing; variances of repeating values are zero.
    """

    log_weights: Tensor
    mean: Tensor
    variance: Tensor


class NumberMixture(Head):
    """The network gives logits of the components, and shifts of their means and log-widths.

    Args:
        transform: T.
        places: the columns.
    """

    log_prior: nn.Parameter
    valid: Tensor
    atoms: Tensor

    def __init__(self, transform: Increasing, places: Sequence[Place]) -> None:
        super().__init__()
        self.transform, self.places = transform, places
        columns, count = len(places), 1 + COMPONENTS + ATOMS
        self.outputs = count + 2 * COMPONENTS
        self.log_prior = nn.Parameter(torch.zeros(columns, count))
        self.mean = nn.Parameter(torch.linspace(-2, 2, COMPONENTS).repeat(columns, 1))
        self.log_width = nn.Parameter(torch.zeros(columns, COMPONENTS))
        valid = torch.zeros(columns, count, dtype=torch.bool)
        valid[:, 1 : 1 + COMPONENTS] = True
        valid[:, 0] = torch.tensor([place.column.missing for place in places])
        self.register_buffer("valid", valid)
        self.register_buffer("atoms", torch.zeros(columns, ATOMS, dtype=torch.float64))

    def start_from(self, x: Tensor) -> None:
        """Components and repeating values of each column of x, (N, D), by itself."""
        e = self.transform(x)
        for i, place in enumerate(self.places):
            known = e[:, i][~e[:, i].isnan()]
            missing = 1 - len(known) / len(x)
            values, counts = known.unique(return_counts=True)
            least = max(FREQUENT * len(x), 5)
            repeats = (counts >= least).nonzero()[:, 0] if place.column.precision else counts[:0]
            repeats = repeats[counts[repeats].argsort(descending=True)][:ATOMS].long()
            rest = known[~torch.isin(known, values[repeats])]
            share = counts[repeats].double() / len(x)
            weight, mean, width = _fit(rest if len(rest) > COMPONENTS else known)
            weight = weight * max(1 - missing - share.sum().item(), 1 / len(x))
            self.atoms[i, : len(repeats)] = values[repeats]
            self.valid[i, 1 + COMPONENTS :] = torch.arange(ATOMS) < len(repeats)
            self.mean.data[i], self.log_width.data[i] = mean, width.log()
            none = torch.ones(ATOMS - len(repeats))
            first = torch.tensor([missing or 1.0])
            self.log_prior.data[i] = torch.cat([first, weight, share, none]).log()

    def exclude_missing(self) -> None:
        """From now on no column is missing."""
        self.valid[:, 0] = False

    def forward(self, output: Tensor, z: Tensor, t: Tensor, process: Process) -> MixturePrediction:
        logits, shift, wider = output.split(
            [output.shape[-1] - 2 * COMPONENTS, COMPONENTS, COMPONENTS], -1
        )
        narrowest = math.log(NARROWEST)
        width = narrowest + softplus(self.log_width.to(z) + wider - narrowest)
        mean = self.mean.to(z) + shift
        zero = torch.zeros_like(mean[..., :1])
        mean = torch.cat([zero, mean, self.atoms.to(z).expand(len(z), -1, -1)], -1)
        variance = torch.cat(
            [
                zero + 1,
                (2 * width).exp(),
                torch.zeros_like(self.atoms.to(z)).expand(len(z), -1, -1),
            ],
            -1,
        )
        alpha, noise = (over(v, mean) for v in (process.alpha(t), _noise(process, t)))
        total = alpha * variance + noise
        error = z[..., None] - alpha.sqrt() * mean
        logits = logits + self.log_prior.to(z) - (total.log() + error.square() / total) / 2
        log_weights = logits.masked_fill(~self.valid, -torch.inf).log_softmax(-1)
        mean = mean + alpha.sqrt() * variance / total * error
        e_hat = (log_weights.exp() * mean).sum(-1)
        return MixturePrediction(e_hat, log_weights, mean, variance * noise / total)


def _noise(process: Process, t: Tensor) -> Tensor:
    return process.log_one_minus_alpha(t).exp()


def _fit(e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and widths of a mixture fitted to values (N,)."""
    from sklearn.mixture import GaussianMixture

    some = e[:: math.ceil(len(e) / FITTED)].numpy()[:, None]
    count = max(1, min(COMPONENTS, len(np.unique(some)) // 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not quite converged
        found = GaussianMixture(count, reg_covar=1e-4, random_state=0).fit(some)
    # what is left over splits the components evenly
    of = torch.arange(COMPONENTS) % count
    shared = torch.bincount(of, minlength=count)[of]
    weight = torch.from_numpy(found.weights_)[of] / shared
    mean = torch.from_numpy(found.means_[:, 0])[of]
    return weight, mean, torch.from_numpy(found.covariances_[:, 0, 0])[of].sqrt()


class NumberStep(Reverse):
    """∫ q(z_s|z_t,e) P(e|z_t) de = Σ_c w_c(z) N( m_t(z_t, μ_c(z)), β̃ + b² s_c²(z) ), where
    b = √α_s β/(1-α_t) is how far m_t moves when e does."""

    def forward(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: Process
    ) -> Distribution:
        assert isinstance(prediction, MixturePrediction) and isinstance(process, Gaussian)
        loc = process.m_t(z[..., None], prediction.mean, s, t)
        of_e = process.m_t(torch.zeros_like(t), torch.ones_like(t), s, t)
        variance = over(process.beta_tilde(s, t), loc) + (
            over(of_e.square(), loc) * prediction.variance
        )
        return per_example(LevelMixture(prediction.log_weights, loc, variance.sqrt()))


class _OfNumbers(Distribution):
    """x of which T(x) is of a mixture, (..., C); where x is NaN there is nothing to say."""

    def __init__(self, prediction: MixturePrediction, transform: Increasing) -> None:
        # given that it is not missing
        self.log_weights = prediction.log_weights[..., 1:].double().log_softmax(-1)
        self.loc = prediction.mean[..., 1 : 1 + COMPONENTS].double()
        self.scale = prediction.variance[..., 1 : 1 + COMPONENTS].double().sqrt()
        self.atoms = prediction.mean[..., 1 + COMPONENTS :].double()
        self.transform = transform
        super().__init__(batch_shape=prediction.e_hat.shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        missing = value.isnan()
        found = self._log_prob(torch.where(missing, self.transform.x[:, 0], value))
        return torch.where(missing, 0.0, found)

    def _log_prob(self, x: Tensor) -> Tensor:
        law = Normal(self.loc, self.scale, validate_args=False)
        each = law.log_prob(self.transform(x)[..., None])
        log_density = (self.log_weights[..., :COMPONENTS] + each).logsumexp(-1)
        return log_density + self.transform.log_slope(x)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        chosen = Categorical(logits=self.log_weights, validate_args=False).sample(shape)[..., None]
        values = torch.cat(
            [
                Normal(self.loc, self.scale).sample(shape),
                self.atoms.expand(*shape, *self.atoms.shape),
            ],
            -1,
        )
        return self.transform.inverse(values.gather(-1, chosen)[..., 0])


class _OfCells(_OfNumbers):
    """The point of the lattice origin + Δ·ℤ in whose cell that x lies."""

    def __init__(
        self,
        prediction: MixturePrediction,
        transform: Increasing,
        origin: Tensor,
        width: Tensor,
    ) -> None:
        super().__init__(prediction, transform)
        self.origin, self.width = origin, width

    def _log_prob(self, x: Tensor) -> Tensor:
        lower, upper = (
            self.transform(x + d)[..., None] for d in (-self.width / 2, self.width / 2)
        )
        spread = log_between(*((v - self.loc) / self.scale for v in (lower, upper)))
        repeats = torch.where((lower < self.atoms) & (self.atoms <= upper), 0.0, -torch.inf)
        return (self.log_weights + torch.cat([spread, repeats], -1)).logsumexp(-1)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        x = super().sample(sample_shape)
        return self.origin + self.width * ((x - self.origin) / self.width).round()


class NumberDensity(Likelihood):
    """P(e|z_1) as a density in the units of x.

    Args:
        transform: T.
    """

    density = True

    def __init__(self, transform: Increasing) -> None:
        super().__init__()
        self.transform = transform

    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: Process
    ) -> Independent:
        assert isinstance(prediction, MixturePrediction)
        return per_example(_OfNumbers(prediction, self.transform))


class CellProbability(Likelihood):
    """The same law, of the points of a lattice: P of the cell of width Δ around each.

    Args:
        transform: T.
        places: the columns.
    """

    origin: Tensor
    cell: Tensor

    def __init__(self, transform: Increasing, places: Sequence[Place]) -> None:
        super().__init__()
        self.transform = transform
        for name, values in (
            ("origin", [place.column.low for place in places]),
            ("cell", [place.column.precision for place in places]),
        ):
            number = torch.tensor(values, dtype=torch.float64)
            self.register_buffer(name, number, persistent=False)

    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: Process
    ) -> Independent:
        assert isinstance(prediction, MixturePrediction)
        return per_example(_OfCells(prediction, self.transform, self.origin, self.cell))
