r"""The numeric columns of a table: real numbers, or points of a lattice too fine to enumerate.

e = T(x), with T increasing, has a Gaussian process; given the other columns, e is a mixture,

    P(e) = Σ_c w_c N(e; μ_c, s_c²),     so that     P(e|z_t) = Σ_c w_c(z) N(e; μ_c(z), s_c²(z)),
    w_c(z) ∝ w_c N(z_t; √α_t μ_c, α_t s_c² + 1-α_t),     s_c²(z) = s_c² (1-α_t)/(α_t s_c² + 1-α_t),
    μ_c(z) = μ_c + √α_t s_c² (z_t - √α_t μ_c)/(α_t s_c² + 1-α_t)

exactly, at all noise levels: the network only adds context, as it does for levels. Components with
s = 0 are values that repeat. ê = Σ_c w_c(z) μ_c(z); the reverse kernel is the marginal of
q(z_s|z_t,e); the decoder is the density of T(x) times T'(x), or P of the cell [x - Δ/2, x + Δ/2].

A missing number is x = NaN. The bound holds for any q(z|x), including one that differs where x is
missing: there z is noise at all times and carries no information,

    q(z_t|x) = N(0, 1),   q(z_s|z_t,x) = N( √(α_t/α_s) z_t, 1 - α_t/α_s ),

which is the stationary chain; its rate is that of √α_t z_t in place of e. The mixture has a
component N(0, 1) for it. Nothing is decoded there, since a symbol beside the column says that the
number is missing and is decoded itself: P is normalised over {missing} ∪ ℝ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from typing_extensions import override

from nelbo._utils.batch_rng import BatchShard
from nelbo._utils.numerics import over, thinned
from nelbo.data.columns import Place, Transform
from nelbo.diffusion.decoder import Decoder
from nelbo.diffusion.distributions import Drawable, LevelMixture, Shape, log_between
from nelbo.diffusion.gaussian import GaussianDiffusion
from nelbo.diffusion.gaussian_mixture import GaussianMixtureWithAtoms
from nelbo.diffusion.parametrization import Parametrization
from nelbo.diffusion.prediction import Prediction
from nelbo.diffusion.process import ForwardProcess, per_example
from nelbo.diffusion.reverse import GaussianKernel
from nelbo.diffusion.schedules import Schedule

COMPONENTS = 128  # Gaussians of the mixture, at most
ATOMS = 512  # values of a column that count as repeating, at most
OWN = 16  # atoms with a logit each from the network; all others share one
REPEATS = 5  # rows that a value needs to count as repeating ..
RARE, FREQUENT = 5e-4, 0.01  # .. and its share of all rows, for any and for a frequent value
NARROWEST = 1e-3  # least distance of two knots, in standard deviations of the column
KNOTS = 32  # of a quantile transform, at least


class MonotoneTransform(nn.Module):
    """The transform e = T(x) of each column, piecewise linear in u with T(u_k) = e_k at knots.

        u = x;   or for a log transform, with the least positive value c of the training data,
        u = 1 + log(x/c) for x >= c and x/c below, so that every number has an image.

    The outer lines continue beyond the knots. Two knots standardise u. The knots of a quantile
    transform are quantiles of u, and its e_k those of the normal distribution. Every density
    includes log T'(x), so it is a density of x.

    Args:
        columns: D.
        knots: in each column.
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

    def fit_statistics(self, x: Tensor) -> None:
        """Fit T to x, (N, D), of which NaN is ignored."""
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
                # keep knots apart where values repeat
                least = spread[i] * NARROWEST * torch.arange(len(share))
                found = torch.quantile(thinned(known, 2**20), share)
                self.x[i] = (found - least).cummax(0).values + least
                self.e[i] = torch.special.ndtri(share)

    def _scaled(self, x: Tensor) -> Tensor:
        """Return u, shape of x."""
        x = x.double()
        v = x / self.unit
        return torch.where(self.log, torch.where(v < 1, v, 1 + v.clamp(min=1).log()), x)

    def _segment(self, v: Tensor, knots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return v_k, w_k and the slope of the line through v, of knots (v_k, w_k)."""
        others = self.e if knots is self.x else self.x
        flat = v.reshape(-1, len(knots)).T.contiguous()
        k = (torch.searchsorted(knots, flat).T.reshape(v.shape) - 1).clamp(0, knots.shape[1] - 2)
        columns = torch.arange(knots.shape[0], device=v.device)
        low, high = knots[columns, k], knots[columns, k + 1]
        low_w, high_w = others[columns, k], others[columns, k + 1]
        return low, low_w, (high_w - low_w) / (high - low)

    @override
    def forward(self, x: Tensor) -> Tensor:
        u = self._scaled(x)
        low, e, tangent = self._segment(u, self.x)
        return e + tangent * (u - low)

    def log_slope(self, x: Tensor) -> Tensor:
        """Return log T'(x), shape of x."""
        of_u = self._segment(self._scaled(x), self.x)[2].log()
        return of_u - torch.where(self.log, torch.maximum(x.double(), self.unit).log(), 0.0)

    def inverse(self, e: Tensor) -> Tensor:
        """Return x = T⁻¹(e), shape of e."""
        low, u, tangent = self._segment(e.double(), self.e)
        u = u + tangent * (e.double() - low)
        x = self.unit * torch.where(u < 1, u, (u.clamp(min=1) - 1).exp())
        return torch.where(self.log, x, u)


class ContinuousColumns(GaussianDiffusion):
    """Gaussian diffusion of numbers, some of which may be missing: NaN in x and in e.

    Args:
        schedule: γ(t).
        transform: T.
    """

    def __init__(self, schedule: Schedule, transform: MonotoneTransform) -> None:
        ForwardProcess.__init__(self, schedule)
        self.transform = transform

    @override
    def fit_statistics(self, x: Tensor) -> None:
        self.transform.fit_statistics(x)

    @override
    def embed(self, x: Tensor) -> Tensor:
        e: Tensor = self.transform(x)
        return e

    @override
    def marginal(self, e: Tensor, t: Tensor) -> Independent:
        known = super().marginal(e.nan_to_num(), t).base_dist
        missing = e.isnan()
        loc, scale = known.loc.masked_fill(missing, 0.0), known.scale.masked_fill(missing, 1.0)
        return per_example(Normal(loc, scale, validate_args=False))

    @override
    def posterior(self, z: Tensor, e: Tensor, s: Tensor, t: Tensor) -> Independent:
        known = super().posterior(z, e.nan_to_num(), s, t).base_dist
        forgotten = super().transition(z, s, t).base_dist  # the stationary chain is reversible
        missing = e.isnan()
        loc = torch.where(missing, forgotten.loc, known.loc)
        scale = torch.where(missing, forgotten.scale, known.scale)
        return per_example(Normal(loc, scale, validate_args=False))

    @override
    def mean(self, e: Tensor, z: Tensor) -> Tensor:
        """Return T⁻¹(ê), which is E[x|z_t] where T is linear."""
        return self.transform.inverse(e)

    @override
    def rate(self, z: Tensor, e: Tensor, e_hat: Tensor, t: Tensor) -> Tensor:
        signal = over((self.log_alpha(t) / 2).exp(), z)
        return super().rate(z, torch.where(e.isnan(), signal * z, e), e_hat, t)


@dataclass(frozen=True)
class MixturePrediction(Prediction):
    """P(e|z_t): log-weights, means and variances of the components, (B, D, C) each.

    The first component is for missing numbers; then come values that repeat, with variance zero,
    and then Gaussians.
    """

    log_weights: Tensor
    mean: Tensor
    variance: Tensor


class ContinuousMixture(Parametrization):
    """Mixture for each column; the network gives logits of its components, a shift and a scale.

    Shift and scale are common to the Gaussians of a column. At an output of zero, each column has
    the distribution given z of a mixture that was fitted to whole rows; see
    `nelbo.diffusion.gaussian_mixture`.

    Args:
        transform: T.
        places: the columns.
    """

    law: GaussianMixtureWithAtoms
    special: Tensor

    def __init__(self, transform: MonotoneTransform, places: Sequence[Place]) -> None:
        super().__init__()
        self.transform, self.places = transform, places
        columns = len(places)
        self.outputs = 1 + OWN + 1 + COMPONENTS + 2
        self.law = GaussianMixtureWithAtoms(columns, COMPONENTS, 1 + ATOMS)
        # means of the component for missing numbers and of the atoms
        self.register_buffer("special", torch.zeros(columns, 1 + ATOMS, dtype=torch.float64))

    @property
    @override
    def numbers(self) -> int:
        return 1 + ATOMS + COMPONENTS

    @override
    def fit_statistics(self, x: Tensor) -> None:
        """Fit the mixture to x, (N, D), and find the values that repeat."""
        e, blurred = self.transform(x), self._blurred(x)
        special = torch.where(e.isnan(), 0, 1 + ATOMS)
        for i, place in enumerate(self.places):
            column = place.column
            values = _repeats(e[:, i], column.points) if column.precision else e[:0, i]
            self.special[i, 1 : 1 + len(values)] = values
            if len(values):
                ordered, order = values.sort()
                at = torch.searchsorted(ordered, e[:, i].contiguous()).clamp(max=len(values) - 1)
                equal = ordered[at] == e[:, i]
                special[equal, i] = 1 + order[at[equal]]
        self.law.fit_statistics(blurred, special)

    def _blurred(self, x: Tensor) -> Tensor:
        """Return e of points drawn uniformly in the cells, and noise for missing numbers.

        Where x is missing, z is noise at all times.
        """
        width = torch.tensor([place.column.precision or 0.0 for place in self.places])
        generator = torch.Generator().manual_seed(0)
        within = torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        e = self.transform(x + width.double() * within)
        return torch.where(e.isnan(), noise, e)

    @property
    @override
    def may_be_missing(self) -> Tensor:
        return torch.tensor([place.column.missing for place in self.places])

    @override
    def exclude_missing(self) -> None:
        """Give the component for missing numbers probability zero from now on."""
        self.law.log_share[..., 0] = -torch.inf

    @override
    def forward(
        self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> MixturePrediction:
        components, special = self.law.used.tolist()
        own, others, logits, shift, wider = output.split([1 + OWN, 1, COMPONENTS, 1, 1], -1)
        of_special = torch.cat([own, others.expand(*z.shape, ATOMS - OWN)], -1)
        logits = torch.cat([of_special[..., :special], logits[..., :components]], -1)
        alpha, noise = process.alpha(t), process.log_one_minus_alpha(t).exp()
        log_weights, mean, variance = self.law(z, alpha, noise)
        mean = mean + variance.sqrt() * shift
        variance = NARROWEST**2 + variance * (2 * wider).exp()
        of_special = self.special[:, :special].to(z).expand(len(z), -1, -1)
        exact = torch.zeros_like(of_special)
        exact[..., 0] = 1  # what is missing is N(0, 1)
        mean, variance = torch.cat([of_special, mean], -1), torch.cat([exact, variance], -1)
        alpha, noise = over(alpha, mean), over(noise, mean)
        total = alpha * variance + noise
        error = z[..., None] - alpha.sqrt() * mean
        log_weights = logits + log_weights - (total.log() + error.square() / total) / 2
        log_weights = log_weights.log_softmax(-1)
        mean = mean + alpha.sqrt() * variance / total * error
        e_hat = (log_weights.exp() * mean).sum(-1)
        return MixturePrediction(e_hat, log_weights, mean, variance * noise / total)


def _repeats(e: Tensor, points: int) -> Tensor:
    """Return the values of a lattice column, (N,), that become atoms, most frequent first.

    All values that repeat become atoms where they cover most rows with few of the lattice points;
    otherwise only some frequent values do, as the cells describe the others as well.
    """
    values, counts = e[~e.isnan()].unique(return_counts=True)
    order = counts.argsort(descending=True)[:ATOMS]
    values, counts = values[order], counts[order]
    repeat = counts >= max(REPEATS, RARE * len(e))
    if 4 * repeat.sum() < points and 2 * counts[repeat].sum() > len(e):
        return values[repeat]
    return values[counts >= max(REPEATS, FREQUENT * len(e))][:OWN]


class ContinuousReverseKernel(GaussianKernel):
    """∫ q(z_s|z_t,e) P(e|z_t) de = Σ_c w_c(z) N( m_t(z_t, μ_c(z)), β̃ + b² s_c²(z) ).

    b = √α_s β/(1-α_t) is the derivative of m_t with respect to e.
    """

    @override
    def kernel(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: GaussianDiffusion
    ) -> Distribution:
        assert isinstance(prediction, MixturePrediction)
        loc = process.m_t(z[..., None], prediction.mean, s, t)
        _, of_e = process.m_t_weights(s, t)
        variance = over(process.beta_tilde(s, t), loc) + (
            over(of_e.square(), loc) * prediction.variance
        )
        return per_example(LevelMixture(prediction.log_weights, loc, variance.sqrt()))


class _OfNumbers(Drawable):
    """Distribution of x = T⁻¹(e), where e is a mixture, (..., C); log P of a missing x is 0.

    Where the width Δ of a column is positive, x is rounded to the lattice origin + Δ·ℤ and has a
    probability; elsewhere it has a density.
    """

    def __init__(
        self,
        prediction: MixturePrediction,
        special: int,
        transform: MonotoneTransform,
        origin: Tensor,
        width: Tensor,
    ) -> None:
        # given that x is not missing
        self.log_weights = prediction.log_weights[..., 1:].double().log_softmax(-1)
        self.atoms = prediction.mean[..., 1:special].double()
        self.loc = prediction.mean[..., special:].double()
        self.scale = prediction.variance[..., special:].double().sqrt()
        self.transform, self.origin = transform, origin
        self.rounded, self.width = width > 0, torch.where(width > 0, width, 1.0)
        super().__init__(batch_shape=prediction.e_hat.shape, validate_args=False)

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        missing = value.isnan()
        x = torch.where(missing, self.transform.x[:, 0], value).double()
        law = Normal(self.loc, self.scale, validate_args=False)
        e = self.transform(x)
        density = law.log_prob(e[..., None]) + self.transform.log_slope(x)[..., None]
        # columns without a lattice get a unit cell of e, whose gradient is finite in any unit
        lower, upper = (
            torch.where(self.rounded, self.transform(x + side * self.width), e + side)[..., None]
            for side in (-0.5, 0.5)
        )
        of_cell = log_between(*((v - self.loc) / self.scale for v in (lower, upper)))
        rounded = self.rounded[..., None]
        repeats = (lower < self.atoms) & (self.atoms <= upper) & rounded
        each = [torch.where(repeats, 0.0, -torch.inf), torch.where(rounded, of_cell, density)]
        found = (self.log_weights + torch.cat(each, -1)).logsumexp(-1)
        return torch.where(missing, 0.0, found)

    @override
    def draw(self, shape: Shape, shard: BatchShard | None) -> Tensor:
        loc = torch.cat([self.atoms, self.loc], -1)
        scale = torch.cat([torch.zeros_like(self.atoms), self.scale], -1)
        e = LevelMixture(self.log_weights, loc, scale).draw(shape, shard)
        x = self.transform.inverse(e)
        point = self.origin + self.width * ((x - self.origin) / self.width).round()
        return torch.where(self.rounded, point, x)


class ContinuousDecoder(Decoder):
    """P(x|z_1): a density in the units of x, or the probability of the cell of width Δ around x.

    Args:
        transform: T.
        places: the columns.
        law: the mixture of the parametrization, which knows how many components are Gaussians.
    """

    origin: Tensor
    cell: Tensor

    def __init__(
        self, transform: MonotoneTransform, places: Sequence[Place], law: GaussianMixtureWithAtoms
    ) -> None:
        super().__init__()
        self.transform, self.law = transform, law
        self.density = any(place.column.kind == "real" for place in places)
        for name, values in (
            ("origin", [place.column.low or 0.0 for place in places]),
            ("cell", [place.column.precision or 0.0 for place in places]),
        ):
            number = torch.tensor(values, dtype=torch.float64)
            self.register_buffer(name, number, persistent=False)

    @override
    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        assert isinstance(prediction, MixturePrediction)
        _, special = self.law.used.tolist()
        parts = prediction, special, self.transform, self.origin, self.cell
        return per_example(_OfNumbers(*parts))
