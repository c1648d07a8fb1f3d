r"""Gaussian diffusion, and the embeddings of data that it diffuses.

For times s < t, e = embed(x), and α_t = sigmoid(-γ(t)) from a schedule (equations 2-6 and 8):

    q(z_t|z_s)   = N( √(1-β) z_s, β ),                 1-β = α_t/α_s
    q(z_t|x)     = N( √α_t e, 1-α_t )
    q(z_s|z_t,x) = N( m_t, β̃ ),                        β̃ = β (1-α_s)/(1-α_t)
    m_t          = [ (1-α_s) √(1-β) z_t + √α_s β e ] / (1-α_t)
"""

import math

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from typing_extensions import override

from nelbo._utils.arguments import checked
from nelbo._utils.numerics import over, slope
from nelbo.diffusion.distributions import DiscretisedNormal
from nelbo.diffusion.process import ForwardProcess, Shape, per_example
from nelbo.diffusion.schedules import Schedule


def normal(mean: Tensor, variance: Tensor) -> Independent:
    """Return N(mean, variance) of means (B, ...) and variances (B,), with batch shape (B,)."""
    scale = over(variance.sqrt(), mean).expand_as(mean)
    return per_example(Normal(mean, scale, validate_args=False))


class Levels(nn.Module):
    """Embedding of integers 0..K-1 as K equally spaced values from low to high, both included.

    Args:
        count: the number K of levels.
        low: value of level 0.
        high: value of level K-1. With high = 1 - 1/K = -low, the K bins divide [-1, 1].
    """

    values: Tensor

    def __init__(self, count: int, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        if count < 2:
            raise ValueError(f"levels must be at least 2; got {count}")
        if not low < high:
            raise ValueError(f"low must be less than high; got {low} and {high}; try -1 and 1")
        self.count, self.low, self.high = count, low, high
        values = torch.linspace(low, high, count, dtype=torch.float64)
        self.register_buffer("values", values, persistent=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return self.values[x]

    def describe(self) -> str:
        """Return how the data look to a network, for a note."""
        return f"levels 0..{self.count - 1} as {self.low:g}..{self.high:g}"

    def inverse(self, e: Tensor) -> Tensor:
        """Return x of values e, including those between and beyond the levels; shape of e."""
        return (e - self.low) / (self.high - self.low) * (self.count - 1)

    def pushforward(self, mean: Tensor, sd: Tensor) -> Distribution:
        """Return the distribution of the level into whose bin e ~ N(mean, sd²) falls."""
        return DiscretisedNormal(mean, sd, self.values)


class Affine(nn.Module):
    """Embedding of real data as e = (x - shift) / scale.

    Args:
        shift: broadcastable to one example, in the units of the data.
        scale: positive, broadcastable to one example.
    """

    count, low, high = 0, -math.inf, math.inf  # no levels, and no limits on the values e
    shift: Tensor
    scale: Tensor
    values: Tensor

    def __init__(self, shift: Tensor | float = 0.0, scale: Tensor | float = 1.0) -> None:
        super().__init__()
        self.register_buffer("shift", torch.as_tensor(shift, dtype=torch.float64))
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64))
        self.register_buffer("values", torch.zeros(0, dtype=torch.float64), persistent=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return (x.double() - self.shift) / self.scale

    def describe(self) -> str:
        """Return how the data look to a network, for a note."""
        return "real data, (x - shift)/scale"

    def inverse(self, e: Tensor) -> Tensor:
        """Return x = shift + scale e, shape of e."""
        return self.shift + self.scale * e

    def pushforward(self, mean: Tensor, sd: Tensor) -> Distribution:
        """Return the distribution of x for e ~ N(mean, sd²), a density in the units of x."""
        return Normal(self.inverse(mean), self.scale * sd, validate_args=False)


class GaussianDiffusion(ForwardProcess):
    """q(z_t|z_s) = N(√(1-β) z_s, β), equations 2, 3, 6 and 8.

    Args:
        schedule: γ(t).
        embedding: Levels(K) for integers, Affine(shift, scale) for real data. By
            default Affine(), real data as they are.
    """

    channels = 1
    has_flow = True
    posterior_name = "Gaussian step, σ² = β̃"

    @checked
    def __init__(self, schedule: Schedule, embedding: Levels | Affine | None = None) -> None:
        super().__init__(schedule)
        self.embedding = embedding = Affine() if embedding is None else embedding
        self.codes = embedding.count

    def beta(self, s: Tensor | float, t: Tensor | float) -> Tensor:
        """Return β = 1 - α_t/α_s of the step from s to t; float64."""
        return -torch.expm1(self.log_kept(s, t))

    def beta_tilde(self, s: Tensor | float, t: Tensor | float) -> Tensor:
        """Return β̃ = β (1-α_s)/(1-α_t), the variance of q(z_s|z_t,x); float64."""
        shrink = self.log_one_minus_alpha(s) - self.log_one_minus_alpha(t)
        return self.beta(s, t) * shrink.exp()

    def m_t(self, z: Tensor, e: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Return m_t = [ (1-α_s) √(1-β) z_t + √α_s β e ] / (1-α_t), the mean of q(z_s|z_t,x)."""
        of_z, of_e = self.m_t_weights(s, t)
        return over(of_z, z) * z + over(of_e, z) * e

    def m_t_weights(self, s: Tensor | float, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return the coefficients of z_t and e in m_t, shape of t, float64."""
        shrink = self.log_one_minus_alpha(s) - self.log_one_minus_alpha(t)
        of_z = (shrink + self.log_kept(s, t) / 2).exp()
        of_e = (self.log_alpha(s) / 2 - self.log_one_minus_alpha(t)).exp() * self.beta(s, t)
        return of_z, of_e

    @override
    def embed(self, x: Tensor) -> Tensor:
        return self.embedding(x)

    @override
    def features(self, z: Tensor) -> Tensor:
        return z

    @override
    def log_snr_input(self, t: Tensor) -> Tensor:
        # γ itself: given the log-SNR, a network suits any grid and any learned schedule
        return self.schedule(t)

    @override
    def transition(self, z: Tensor, s: Tensor, t: Tensor) -> Independent:
        mean = over((self.log_kept(s, t) / 2).exp(), z) * z
        return normal(mean, self.beta(s, t))

    @override
    def marginal(self, e: Tensor, t: Tensor) -> Independent:
        mean = over((self.log_alpha(t) / 2).exp(), e) * e
        return normal(mean, self.log_one_minus_alpha(t).exp())

    @override
    def posterior(self, z: Tensor, e: Tensor, s: Tensor, t: Tensor) -> Independent:
        return normal(self.m_t(z, e, s, t), self.beta_tilde(s, t))

    @override
    def grid_width(self, shape: Shape, s: Tensor | None, t: Tensor, u: Tensor | None) -> Tensor:
        """Return the smaller of the standard deviations with which z_t is drawn and coded."""
        drawn = self.log_one_minus_alpha(t).exp() if s is None else self.beta(s, t)
        coded = torch.ones_like(t) if u is None else self.beta_tilde(t, u)
        return torch.minimum(drawn, coded).sqrt().expand(shape)

    @override
    def linear_transition(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return √(1-β) and √β."""
        return (self.log_kept(s, t) / 2).exp(), self.beta(s, t).sqrt()

    @override
    def picture(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if self.codes:  # scale signal plus two standard deviations of noise to the range of levels
            alpha = self.alpha(t)
            z = z / (alpha.sqrt() + 2 * (1 - alpha).sqrt())
        return self.embedding.inverse(z), torch.zeros_like(z, dtype=torch.bool)

    @override
    def mean(self, e: Tensor, z: Tensor) -> Tensor:
        return self.embedding.inverse(e)

    @override
    def prior(self, shape: Shape, t: Tensor) -> Independent:
        zeros = torch.zeros((len(t), *shape), dtype=t.dtype, device=t.device)
        return normal(zeros, torch.ones_like(t))

    @override
    def rate(self, z: Tensor, e: Tensor, e_hat: Tensor, t: Tensor) -> Tensor:
        """Return ½ γ'(t) SNR(t) ‖e - ê‖², (B,) (equation 8; VDM equation 18)."""
        error = (e - e_hat).square().flatten(1).sum(1)
        return 0.5 * slope(self.schedule, t) * (-self.schedule(t)).exp() * error
