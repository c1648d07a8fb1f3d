"""Adapters from other conventions for diffusion models to ours.

Other models have latents y_t = a_t x + b_t ε with any a and b; ours preserve the variance:
α + (1-α) = 1. Both have the same log-SNR, γ = 2 log(b/a), so they differ by a factor that depends
on γ alone:

    y_t = c(γ) z_t,   c² = a² + b²,    √α_t = a/c,   √(1-α_t) = b/c

    preserving      a² + b² = 1                c = 1               Ho et al. 2020
    exploding       a = 1, b = σ               c² = 1 + e^γ        Song et al. 2021, EDM
    interpolating   a = 1 - τ, b = τ           τ = sigmoid(γ/2)    Lipman et al. 2023

Other predictions, from z and the output F of the network, beside our own parametrizations:

    score           F = ∇ log q(y_t)           ε̂ = -b F
    EDM             F of Karras et al. 2022    x̂ = c_skip y + c_out F            equation 7
    flow            F = dy/dτ = ε - x          x̂ = y - τ F

Times: a model trained at T times is defined at these only. They are i/T here, i = 1..T; the
decoder reads the first. A table translates them to the network's own time input (0, 999, a σ).
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Independent
from typing_extensions import override

from nelbo._utils.network_calls import NetworkCalls, is_exhausted
from nelbo._utils.numerics import over, seeded
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.decoder import Decoder
from nelbo.diffusion.distributions import draw
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion, Levels
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.parametrization import EpsPrediction, Parametrization
from nelbo.diffusion.prediction import Prediction
from nelbo.diffusion.process import ForwardProcess, per_example
from nelbo.diffusion.reverse import FixedVariance
from nelbo.diffusion.schedules import Schedule

Factor = Callable[[Tensor], Tensor]
MEASURED, EXAMPLES = 33, 64  # times, and examples, at most, for the best variance
NUMBERS = 2**18  # numbers in the first call of a foreign network, which may be large


def preserving(gamma: Tensor) -> Tensor:
    """Return c = 1."""
    return torch.ones_like(gamma)


def exploding(gamma: Tensor) -> Tensor:
    """Return c = √(1 + σ²), σ² = e^γ."""
    return gamma.exp().add(1).sqrt()


def interpolating(gamma: Tensor) -> Tensor:
    """Return c = √((1-τ)² + τ²), τ = sigmoid(γ/2)."""
    return torch.hypot((-gamma / 2).sigmoid(), (gamma / 2).sigmoid())


class Steps(Schedule):
    """γ at the times i/T, i = 1..T, and nowhere else; γ(0) = -inf.

    Args:
        gamma: γ_1 < ... < γ_T; the last may be infinite, without signal.
    """

    gamma: Tensor
    steps: int

    def __init__(self, gamma: Tensor) -> None:
        super().__init__()
        # persistent, so that the hash of the model depends on the schedule
        self.register_buffer("gamma", gamma.double())
        self.steps = len(gamma)
        self.start = 1 / self.steps

    def index(self, t: Tensor) -> Tensor:
        """Return i for the time t = i/T; int64.

        Raises:
            ValueError: a time is off the grid.
        """
        place = t.detach().double() * self.steps
        i = place.round()
        if (((place - i).abs() > 1e-9 * self.steps) | (i < 0) | (i > self.steps)).any():
            raise ValueError(
                f"the model knows {self.steps} times, i/{self.steps}, and no others, as continuous"
                f" time would need; try steps={self.steps}, TimeGrid.uniform({self.steps}), or a"
                " divisor of it, or keep=... for other times"
            )
        return i.long()

    @override
    def forward(self, t: Tensor) -> Tensor:
        i = self.index(t)
        return torch.where(i == 0, -torch.inf, self.gamma[(i - 1).clamp(min=0)])


class OnSteps(GaussianDiffusion):
    """A Gaussian diffusion on `Steps`, whose network takes i, not γ, as its time input."""

    schedule: Steps

    @override
    def log_snr_input(self, t: Tensor) -> Tensor:
        i = self.schedule.index(t)
        if (i == 0).any():
            raise ValueError(
                "the model was trained at discrete times and has no bound in continuous time;"
                f" give times=TimeGrid.uniform({self.schedule.steps})"
            )
        return i.to(t.dtype)


class Adapter(nn.Module):
    """Our protocol, network(features, level), in front of a foreign network(y, time).

    Args:
        network: called with y (B, *shape) and its time (B,); returns (B, C, ...), or (B, 2C, ...)
            with a variance in the second half of the channels.
        shape: shape of one example.
        outputs: 2 with a variance, else 1.
        times: time inputs of the network at the times of `gamma`, shape (T,); or a function of γ.
        gamma: γ_1..γ_T, if `times` is a table.
        factor: c(γ), which converts our latents to theirs.
    """

    times: Tensor
    gamma: Tensor

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, ...],
        outputs: int,
        times: Tensor | Callable[[Tensor], Tensor],
        gamma: Tensor | None,
        factor: Factor,
    ) -> None:
        super().__init__()
        own = next(network.parameters(), None)
        wide = own is None or own.dtype == torch.float64
        # `Model` calls in the type of the first parameter: at least float32, so that times stay
        # exact even if the network itself computes in lower precision.
        reference = torch.zeros(0, dtype=torch.float64 if wide else torch.float32)
        self.reference = nn.Parameter(reference, requires_grad=False)
        self.network, self.shape, self.outputs = network, shape, outputs
        self.factor = factor
        self.calls = NetworkCalls(type(network).__name__)
        self.name: Callable[[Tensor], Tensor] | None = None
        if isinstance(times, Tensor):
            assert gamma is not None and len(gamma) == len(times)
            self.register_buffer("times", times)
            self.register_buffer("gamma", gamma)
        else:
            self.name = times

    @override
    def forward(self, features: Tensor, level: Tensor, condition: Tensor | None = None) -> Tensor:
        gamma, time = self.inputs_at(level)
        y = features * over(self.factor(gamma), features)
        y = y.to(next(self.network.parameters(), features).dtype)
        rows = max(1, min(256, NUMBERS // y[0].numel()))
        inputs = (y, time) if condition is None else (y, time, condition)
        output = self.calls(self._call, inputs, rows).to(features.dtype)
        parts = output.reshape(len(output), self.outputs, -1, *self.shape[1:])
        return parts[:, 0] if self.outputs == 1 else parts.movedim(1, -1)

    def under(self, factor: Factor, times: Callable[[Tensor], Tensor]) -> "Adapter":
        """Return the same network with other inputs, c(γ) z and a function of γ as its time.

        Its calls are counted where those of this one are.
        """
        other = copy.copy(self)  # with the same weights and hooks
        other.factor, other.name = factor, times
        return other

    def inputs_at(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return γ and the time input of the network at levels of `log_snr_input`, (B,) each."""
        if self.name is not None:
            gamma = level.double()
            time = self.name(gamma)
        else:
            i = level.round().long() - 1
            gamma, time = self.gamma[i], self.times[i]
        return gamma, time.to(level.dtype) if time.is_floating_point() else time

    def _call(self, y: Tensor, time: Tensor, *condition: Tensor) -> Tensor:
        gradients = torch.is_grad_enabled()
        try:
            with torch.set_grad_enabled(gradients):  # which the network may switch
                output: object = self.network(y, time, *condition)
        except (RuntimeError, TypeError, IndexError, AttributeError) as error:
            if isinstance(error, RuntimeError) and is_exhausted(error):
                raise  # it is called with fewer rows
            raise ValueError(self._failure(error, y, time, *condition)) from error
        if not isinstance(output, Tensor):
            output = getattr(output, "sample", output)  # as the networks of diffusers say it
        channels, batch = self.outputs * self.shape[0], len(y)
        expected = (batch, channels, *self.shape[1:])
        if isinstance(output, Tensor) and output.shape == expected:
            if not output.is_floating_point():
                raise ValueError(
                    f"the wrapped network gives numbers of type {output.dtype}; it must give real"
                    " ones, such as torch.float32"
                )
            if not output.isfinite().all() and all(v.isfinite().all() for v in (y, *condition)):
                raise ValueError(
                    "the wrapped network gives values that are not finite at the time"
                    f" {time[~output.flatten(1).isfinite().all(1)][0].item():g}; was it trained"
                    " at that time, and is its precision sufficient?"
                )
            return output if gradients else output.detach()
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        hint = "wrap it in a module that gives that tensor"
        if got == (batch, 2 * self.shape[0], *self.shape[1:]):
            hint = (
                'if the second half of the channels is a variance, give variance="learned-range"'
            )
        raise ValueError(f"the wrapped network must give {expected}; got {got}; {hint}")

    def _failure(self, error: Exception, *inputs: Tensor) -> str:
        """Return a sentence on a call of the network that failed."""
        shown = ", ".join(
            f"{str(v.dtype).removeprefix('torch.')} ({', '.join(map(str, v.shape))})"
            for v in inputs
        )
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "is that how it is called?"
        if next(self.network.parameters(), None) is None and "type" in reason:
            hint = "a function gets float64; for a network of float32, give it y.float()"
        return f"the wrapped network fails, called with {shown}: {reason}; {hint}"


class Score(Parametrization):
    """ε̂ = -b F for a network that predicts ∇ log q(y) of y = c z = a x + b ε.

    Args:
        factor: c(γ).
    """

    predicts = "score"

    def __init__(self, factor: Factor) -> None:
        super().__init__()
        self.of_latents = factor

    @property
    @override
    def factor(self) -> Factor:
        return self.of_latents

    @override
    def forward(self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess) -> Prediction:
        gamma = process.schedule(t)
        b = self.factor(gamma) * gamma.sigmoid().sqrt()
        return EpsPrediction()(-over(b, z) * output, z, t, process)


class EDM(Parametrization):
    """x̂ = c_skip y + c_out F for variance-exploding latents y (Karras et al. 2022, table 1).

    Args:
        sigma_data: their σ_data.
        sign: -1 if the network was trained with -c_out, as in v-prediction.
    """

    predicts = "edm"

    def __init__(self, sigma_data: float, sign: float = 1.0) -> None:
        super().__init__()
        self.sigma_data, self.sign = sigma_data, sign

    @override
    def forward(self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess) -> Prediction:
        gamma, data = process.schedule(t), self.sigma_data
        sigma = (gamma / 2).exp()
        total = torch.hypot(sigma, torch.full_like(sigma, data))
        of_z = exploding(gamma) * (data / total) ** 2
        of_output = self.sign * sigma * data / total
        return Prediction(over(of_z, z) * z + over(of_output, z) * output)

    @property
    @override
    def factor(self) -> Factor:
        """c(γ) of the network's input: it takes c_in y, c_in = 1/√(σ² + σ_data²)."""
        return self._scaled_input

    def _scaled_input(self, gamma: Tensor) -> Tensor:
        sigma = (gamma / 2).exp()
        return exploding(gamma) / torch.hypot(sigma, torch.full_like(sigma, self.sigma_data))


class Flow(Parametrization):
    """x̂ = y - τ F for a network that predicts dy/dτ = ε - x of y = (1-τ) x + τ ε."""

    predicts = "flow"

    @property
    @override
    def factor(self) -> Factor:
        return interpolating

    @override
    def forward(self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess) -> Prediction:
        gamma = process.schedule(t)
        return Prediction(
            over(interpolating(gamma), z) * z - over((gamma / 2).sigmoid(), z) * output
        )


class Clipped(Parametrization):
    """x̂ clipped to the range of the data: a different model, with a bound of its own."""

    def __init__(self, head: Parametrization, low: float, high: float) -> None:
        super().__init__()
        self.head, self.low, self.high = head, low, high
        self.outputs, self.steps, self.has_variance = head.outputs, head.steps, head.has_variance

    @override
    def forward(self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess) -> Prediction:
        prediction = self.head(output, z, t, process)
        e_hat = prediction.e_hat.clamp(self.low, self.high)
        return Prediction(e_hat, fraction=prediction.fraction)


class BestVariance(FixedVariance):
    """N(m_t(z_t, x̂), σ²) with the σ² of least expected KL: β̃ + (√α_s β/(1-α_t))² v(t).

    v(t) = E‖e - ê‖²/D (Bao et al. 2022, theorem 1) at each of the T times is that of examples that
    are not measured (`fit`); until then it is zero, and σ² = β̃. In the last step, σ² = v.

    Args:
        steps: T.
    """

    errors: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.register_buffer("errors", torch.zeros(steps, dtype=torch.float64))

    @override
    def variance(self, s: Tensor, t: Tensor, process: GaussianDiffusion) -> Tensor:
        assert isinstance(process, OnSteps)
        _, of_e = process.m_t_weights(s, t)
        v = self.errors[process.schedule.index(t) - 1]
        return process.beta_tilde(s, t) + of_e.square() * v

    @override
    def fit(self, model: Model, batch: Batch) -> str:
        """Measure v at some of the times, from the network's errors, and set it at all of them."""
        steps = len(self.errors)
        some = torch.linspace(1, steps, min(steps, MEASURED), dtype=torch.float64).round()
        batch = batch[:EXAMPLES].to(model.device)
        found = []
        with measuring(model, batch), seeded(0):
            e = model.embed(batch.x)
            for i in some.tolist():
                t = torch.full((len(e),), i / steps, dtype=torch.float64, device=e.device)
                z = draw(model.process.marginal(e, t))
                e_hat = model.predict(z, t, batch.condition).e_hat
                found.append((e - e_hat).square().mean().item())
        logs = np.interp(np.arange(1, steps + 1), some.numpy(), np.log(np.maximum(found, 1e-30)))
        self.errors.copy_(torch.from_numpy(np.exp(logs)))
        last = self.errors[0].sqrt().item()
        return f"the variance of each step is the best one ({last:.3g}² in the last, P(x|z_1))"


class LastStep(Decoder):
    """N(x̂(z_1), σ²), discretised for levels: the last step, from z_1 to x, with the model's
    variance.

    The posterior variance of this step is 0. Nichol & Dhariwal 2021 replace it by that of the step
    before, β̃_2, also for σ² = β; a learned variance lies between β̃_2 and β_1. The best one is
    the network's error at z_1.
    """

    def __init__(self, scaling: Levels | Affine, best: BestVariance | None = None) -> None:
        super().__init__()
        self.scaling, self.best = scaling, best
        self.density = not scaling.count

    @override
    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        assert isinstance(process, OnSteps)
        steps = process.schedule.steps
        if (process.schedule.index(t) != 1).any():
            raise ValueError(
                f"the model's last step is from z_1 at 1/{steps} to x, and the grid begins later;"
                ' begin it there, wrap with keep=..., or with decoder="evidence"'
            )
        e_hat = prediction.e_hat
        variance = process.beta_tilde(t, t * 2)
        if self.best is not None and self.best.errors[0] > 0:
            variance = self.best.errors[0].expand_as(t)
        log_variance = over(variance.log(), e_hat).expand_as(e_hat)
        if prediction.fraction is not None:
            largest = over(process.log_one_minus_alpha(t), e_hat)
            log_variance = log_variance + prediction.fraction * (largest - log_variance)
        return per_example(self.scaling.pushforward(e_hat, (log_variance / 2).exp()))
