r"""Reverse kernels P(z_s|z_t), s < t, from a prediction at z_t.

    Posterior   q(z_s|z_t, x = ê): Gaussian with variance β̃, or categorical
    Beta        N(m_t(z_t, ê), β)
    Learned     N(m_t(z_t, ê), σ²), with log σ² between log β̃ and log β by the network
    Optimal     N(m_t(z_t, ê), σ²), with σ² of least KL: β̃ + (√α_s β/(1-α_t))² E‖e - ê‖²/D
    Mixture     Σ_k P(x_i = v_k|z_t) q(z_s|z_t, x_i = v_k): the exact marginal of each dimension

As s → t all of them tend to `Posterior` (β̃/β → 1, the mixture to one Gaussian), so they share one
continuous-time bound; the fewer the steps, the more they differ.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal
from typing_extensions import override

from nelbo._utils.numerics import over
from nelbo.diffusion.distributions import LevelMixture
from nelbo.diffusion.gaussian import GaussianDiffusion, normal
from nelbo.diffusion.prediction import LevelPrediction, Prediction
from nelbo.diffusion.process import ForwardProcess, per_example

if TYPE_CHECKING:
    from nelbo.diffusion.batch import Batch
    from nelbo.diffusion.model import Model


class ReverseKernel(nn.Module, ABC):
    """P(z_s|z_t) from a prediction at z_t, with batch shape (B,)."""

    #: whether it is a mixture over levels, whose cost is not w ‖e - ê‖² in a Gaussian process
    mixes_levels: bool = False

    @property
    def factors(self) -> "Sequence[ReverseKernel]":
        """The reverse kernels of the groups of columns; for other data, this one alone."""
        return (self,)

    def check(self, process: ForwardProcess) -> None:
        """Check that the kernel is one of such a process, before any work; any will do here.

        Raises:
            ValueError: if it is not.
        """

    def fits(self, process: ForwardProcess) -> bool:
        """Return whether `check` passes."""
        try:
            self.check(process)
        except ValueError:
            return False
        return True

    def name(self, process: ForwardProcess) -> str:
        """Return the name of the kernel in comparisons."""
        return "reverse step"

    def variance(self, s: Tensor, t: Tensor, process: GaussianDiffusion) -> Tensor:
        """Return σ², shape of t, if it does not depend on the network; β̃ here."""
        return process.beta_tilde(s, t)

    def error_times(self) -> Tensor:
        """Return the times at which `set_errors` needs v(t) = E‖e - ê‖²/D, (N,); none here."""
        return torch.zeros(0, dtype=torch.float64)

    def set_errors(self, errors: Tensor) -> None:
        """Set v at `error_times`, (N,); does nothing here."""

    def fit(self, model: "Model", batch: "Batch") -> str:
        """Fit what no file has to examples that are not measured; return a note, "" here."""
        return ""

    @abstractmethod
    @override
    def forward(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: ForwardProcess
    ) -> Distribution:
        """Return P(z_s|z_t) for z = z_t and times s < t, shape (B,)."""


class Posterior(ReverseKernel):
    """q(z_s|z_t,x) with ê in place of e; σ² = β̃ for a Gaussian process (equation 7)."""

    @override
    def name(self, process: ForwardProcess) -> str:
        return process.posterior_name

    @override
    def forward(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: ForwardProcess
    ) -> Distribution:
        return process.predicted_posterior(z, prediction, s, t)


class GaussianKernel(ReverseKernel):
    """A kernel made of the m_t and β̃ of Gaussian diffusion, which other processes do not have."""

    @override
    def forward(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: ForwardProcess
    ) -> Distribution:
        return self.kernel(prediction, z, s, t, self._gaussian(process))

    @override
    def check(self, process: ForwardProcess) -> None:
        self._gaussian(process)

    def _gaussian(self, process: ForwardProcess) -> GaussianDiffusion:
        need = f"{type(self).__name__} is a step of Gaussian diffusion"
        hint = ": give step=Posterior(), on the command line --step posterior"
        return GaussianDiffusion.require(process, need, hint)

    @abstractmethod
    def kernel(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: GaussianDiffusion
    ) -> Distribution:
        """Return P(z_s|z_t) as `forward`, of a Gaussian process."""


class FixedVariance(GaussianKernel):
    """N(f, σ²) with f = m_t(z_t, ê) and the `variance` of the times."""

    @override
    def kernel(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: GaussianDiffusion
    ) -> Distribution:
        f = process.m_t(z, prediction.e_hat, s, t)
        return normal(f, self.variance(s, t, process))


class Beta(FixedVariance):
    """N(f, β) with f = m_t(z_t, ê); the KL is ‖m_t - f‖²/(2β) + const (equation 7)."""

    @override
    def name(self, process: ForwardProcess) -> str:
        return "Gaussian step, σ² = β"

    @override
    def variance(self, s: Tensor, t: Tensor, process: GaussianDiffusion) -> Tensor:
        return process.beta(s, t)


class Learned(GaussianKernel):
    """N(f, σ²), log σ² = v log β + (1-v) log β̃ (Nichol & Dhariwal 2021, equation 15)."""

    @override
    def name(self, process: ForwardProcess) -> str:
        return "Gaussian step, learned σ²"

    @override
    def kernel(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: GaussianDiffusion
    ) -> Distribution:
        if prediction.fraction is None:
            raise TypeError("the learned variance needs a head with a variance: WithVariance")
        f = process.m_t(z, prediction.e_hat, s, t)
        low, high = process.beta_tilde(s, t).log(), process.beta(s, t).log()
        log_variance = over(low, f) + prediction.fraction * over(high - low, f)
        return per_example(Normal(f, (log_variance / 2).exp(), validate_args=False))


class Optimal(FixedVariance):
    """N(f, σ²) with the σ² of least expected KL: β̃ + (√α_s β/(1-α_t))² v(t).

    v(t) = E‖e - ê‖²/D (Bao et al. 2022, theorem 1) belongs to the model and is measured in
    training (`nelbo.evaluation.grid_search.measure_errors`); until then it is zero and σ² = β̃.
    Any v gives a valid bound, so linear interpolation is enough.

    Args:
        errors: v at evenly spaced times from 0 to 1, shape (N,); zero where left out.
    """

    errors: Tensor

    def __init__(self, errors: Tensor | None = None) -> None:
        super().__init__()
        errors = torch.zeros(33, dtype=torch.float64) if errors is None else errors
        self.register_buffer("errors", errors.double())

    @override
    def name(self, process: ForwardProcess) -> str:
        return "Gaussian step, best σ²"

    @override
    def error_times(self) -> Tensor:
        return torch.linspace(0, 1, len(self.errors), dtype=torch.float64)

    @override
    def set_errors(self, errors: Tensor) -> None:
        self.errors.copy_(errors)

    @override
    def variance(self, s: Tensor, t: Tensor, process: GaussianDiffusion) -> Tensor:
        _, of_e = process.m_t_weights(s, t)
        return process.beta_tilde(s, t) + of_e.square() * self.error(t)

    def error(self, t: Tensor) -> Tensor:
        """Return v(t), shape of t."""
        last = len(self.errors) - 1
        below = (t * last).long().clamp(0, last - 1)
        return torch.lerp(self.errors[below], self.errors[below + 1], t * last - below)


class Mixture(GaussianKernel):
    """Σ_k P(x_i = v_k|z_t) N(m_t(z_t, v_k), β̃) for each dimension i.

    Args:
        values: v_1..v_K, shape (K,).
    """

    mixes_levels = True
    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=False)

    @override
    def name(self, process: ForwardProcess) -> str:
        return "mixture step"

    @override
    def kernel(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: GaussianDiffusion
    ) -> Distribution:
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
    """Return Σ_k P(x_i = v_k|z_t) N(m_t(z_t, v_k), β̃) for values v, (K,) or (..., K)."""
    loc = process.m_t(z[..., None], values.to(z), s, t)
    scale = over(process.beta_tilde(s, t).sqrt(), loc)
    return per_example(LevelMixture(prediction.log_probs, loc, scale))
