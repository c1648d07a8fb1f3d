r"""P(z_s|z_t): the reverse step, s < t, made of a prediction at z_t.

    Posterior   q(z_s|z_t, x = ê): Gaussian with variance β̃, or the categorical step
    Beta        N(m_t(z_t, ê), β)
    Learned     N(m_t(z_t, ê), σ²), log σ² between log β̃ and log β by the network
    Optimal     N(m_t(z_t, ê), σ²), σ² of the least KL: β̃ + (√α_s β/(1-α_t))² E‖e - ê‖²/D
    Mixture     Σ_k P(x_i = v_k|z_t) q(z_s|z_t, x_i = v_k): the exact marginal of each dimension

For s → t all of them tend to the posterior step (β̃/β → 1, the mixture to one Gaussian), so they
share one continuous-time bound, and differ the more the fewer the steps.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from nelbo._utils.numerics import over
from nelbo.diffusion.distributions import LevelMixture
from nelbo.diffusion.parametrization import LevelPrediction, Prediction
from nelbo.diffusion.process import ForwardProcess, GaussianDiffusion, normal, per_example


class ReverseKernel(nn.Module, ABC):
    """P(z_s|z_t) for z = z_t, with batch shape (B,)."""

    #: a mixture over levels, whose cost is not w ‖e - ê‖² even where the process is Gaussian
    mixes_levels: bool = False

    @property
    def factors(self) -> "Sequence[ReverseKernel]":
        """Those of the groups of columns; of other data, this one alone."""
        return (self,)

    def name(self, process: ForwardProcess) -> str:
        """How it is called where steps are compared."""
        return "reverse step"

    def variance(self, s: Tensor, t: Tensor, process: GaussianDiffusion) -> Tensor:
        """σ², shape of t, as far as no network decides it: β̃ where this is not overridden."""
        return process.beta_tilde(s, t)

    def error_times(self) -> Tensor:
        """Times at which it is to be given v(t) = E‖e - ê‖²/D of the model, (N,); none here."""
        return torch.zeros(0, dtype=torch.float64)

    def set_errors(self, errors: Tensor) -> None:
        """Take v at `error_times`."""

    @abstractmethod
    def forward(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: ForwardProcess
    ) -> Distribution: ...


class Posterior(ReverseKernel):
    """q(z_s|z_t,x) with ê for x: σ² = β̃ for a Gaussian process (equation 7)."""

    def name(self, process: ForwardProcess) -> str:
        return process.posterior_name

    def forward(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: ForwardProcess
    ) -> Distribution:
        return process.posterior(z, prediction.e_hat, s, t)


class Beta(ReverseKernel):
    """N(f, β) with f = m_t(z_t, ê); the KL is ‖m_t - f‖²/(2β) + const (equation 7)."""

    def name(self, process: ForwardProcess) -> str:
        return "Gaussian step, σ² = β"

    def variance(self, s: Tensor, t: Tensor, process: GaussianDiffusion) -> Tensor:
        return process.beta(s, t)

    def forward(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: ForwardProcess
    ) -> Distribution:
        process = _gaussian(process, self)
        f = process.m_t(z, prediction.e_hat, s, t)
        return normal(f, self.variance(s, t, process))


class Learned(ReverseKernel):
    """N(f, σ²), log σ² = v log β + (1-v) log β̃ (Nichol & Dhariwal 2021, equation 15)."""

    def name(self, process: ForwardProcess) -> str:
        return "Gaussian step, learned σ²"

    def forward(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: ForwardProcess
    ) -> Distribution:
        process = _gaussian(process, self)
        if prediction.fraction is None:
            raise TypeError("the learned variance needs a head with a variance: WithVariance")
        f = process.m_t(z, prediction.e_hat, s, t)
        low, high = process.beta_tilde(s, t).log(), process.beta(s, t).log()
        log_variance = over(low, f) + prediction.fraction * over(high - low, f)
        return per_example(Normal(f, (log_variance / 2).exp(), validate_args=False))


class Optimal(ReverseKernel):
    """N(f, σ²) with the σ² of the least expected KL: β̃ + (√α_s β/(1-α_t))² v(t), where
    v(t) = E‖e - ê‖²/D (Bao et al. 2022, theorem 1).

    v is data of the model, measured in training (`grids.measure_errors`); before, it is zero and
    σ² = β̃. Any v gives a bound, so straight lines between its points will do.

    Args:
        errors: v at evenly spaced times from 0 to 1, shape (N,).
    """

    errors: Tensor

    def __init__(self, errors: Tensor | None = None) -> None:
        super().__init__()
        errors = torch.zeros(33, dtype=torch.float64) if errors is None else errors
        self.register_buffer("errors", errors.double())

    def name(self, process: ForwardProcess) -> str:
        return "Gaussian step, best σ²"

    def error_times(self) -> Tensor:
        return torch.linspace(0, 1, len(self.errors), dtype=torch.float64)

    def set_errors(self, errors: Tensor) -> None:
        self.errors.copy_(errors)

    def variance(self, s: Tensor, t: Tensor, process: GaussianDiffusion) -> Tensor:
        _, of_e = process.m_t_weights(s, t)
        return process.beta_tilde(s, t) + of_e.square() * self.error(t)

    def error(self, t: Tensor) -> Tensor:
        """v(t), shape of t."""
        last = len(self.errors) - 1
        below = (t * last).long().clamp(0, last - 1)
        return torch.lerp(self.errors[below], self.errors[below + 1], t * last - below)

    def forward(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: ForwardProcess
    ) -> Distribution:
        process = _gaussian(process, self)
        f = process.m_t(z, prediction.e_hat, s, t)
        return normal(f, self.variance(s, t, process))


class Mixture(ReverseKernel):
    """Σ_k P(x_i = v_k|z_t) N(m_t(z_t, v_k), β̃) for each dimension i.

    Args:
        values: v_1..v_K, shape (K,).
    """

    mixes_levels = True
    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=False)

    def name(self, process: ForwardProcess) -> str:
        return "mixture step"

    def forward(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: ForwardProcess
    ) -> Distribution:
        process = _gaussian(process, self)
        levels = prediction.levels
        if levels is None:
            raise TypeError("the mixture step needs a head that predicts levels: LevelLogits")
        return mixture(levels, self.values, z, s, t, process)


def mixture(
    prediction: LevelPrediction,
    values: Tensor,
    z: Tensor,
    s: Tensor,
    t: Tensor,
    process: GaussianDiffusion,
) -> Distribution:
    """Σ_k P(x_i = v_k|z_t) N(m_t(z_t, v_k), β̃) for values v of shape (K,) or (..., K)."""
    loc = process.m_t(z[..., None], values.to(z), s, t)
    scale = over(process.beta_tilde(s, t).sqrt(), loc)
    return per_example(LevelMixture(prediction.log_probs, loc, scale))


def _gaussian(process: ForwardProcess, step: ReverseKernel) -> GaussianDiffusion:
    need = f"{type(step).__name__} is a step of a Gaussian process"
    return GaussianDiffusion.require(process, need, "; try Posterior()")
