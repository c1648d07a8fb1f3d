r"""A diffusion model of one real number x, where every quantity is known, log P(x) included.

    P(x, z_1..z_T) = P(x|z_1) Π_{t=2..T} P(z_{t-1}|z_t) P(z_T),  P(z_{t-1}|z_t) = N(f(z_t,t), σ_t²)

    log P(x) = ELBO + KL[ q(z|x) ‖ P(z|x) ]                                        equation 1

`Toy.bound` gives the ELBO term by term and log P(x), `Toy.kl` the gap between them from P(z|x).
The integrals are those of `evaluation.quadrature`, on two grids, one twice as fine as the other.
Their difference is the stated error, and values that differ by more than a tolerance are refused.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo._utils.arguments import checked
from nelbo.diffusion import parametrization, reverse
from nelbo.diffusion.decoder import GaussianDensity
from nelbo.diffusion.elbo import Bound
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.schedules import Betas, Schedule
from nelbo.diffusion.times import TimeGrid
from nelbo.evaluation.quadrature import Chain

Numbers = Tensor | Sequence[float] | float
#: f(z, t): z of shape (N,), t an integer in 1..T; returns shape (N,)
Function = Callable[[Tensor, int], Tensor]

PREDICTS: dict[str, Callable[[int], parametrization.Parametrization]] = {
    "mean": parametrization.Mean,
    "noise": lambda _: parametrization.EpsPrediction(),
    "data": lambda _: parametrization.XPrediction(),
    "velocity": lambda _: parametrization.VPrediction(),
}
VARIANCES: dict[str, Callable[[], reverse.ReverseKernel]] = {
    "beta": reverse.Beta,
    "beta_tilde": reverse.Posterior,
}
FINENESS = (1, 2, 4)  # of the grids that are compared in turn
TOLERANCE = 1e-4  # difference between two grids beyond which a value is refused, nats


class ToyBound(NamedTuple):
    """The terms of −ELBO and log P(x) for B examples, nats.

    `diffusion` has one column per step t = 2..T, shape (B, T - 1); other terms have shape (B,).
    `error` is the largest difference of any of them from its value on a grid half as fine.
    """

    prior: Tensor
    reconstruction: Tensor
    diffusion: Tensor
    log_p: Tensor
    error: float

    @property
    def bound(self) -> Bound:
        """The three terms of −ELBO, shape (B,) each."""
        return Bound(self.prior, self.reconstruction, self.diffusion.sum(1))

    @property
    def elbo(self) -> Tensor:
        """The lower bound on log P(x), shape (B,)."""
        return self.bound.elbo

    @property
    def gap(self) -> Tensor:
        """KL[ q(z|x) ‖ P(z|x) ] as the difference log P(x) − ELBO, shape (B,)."""
        return self.log_p - self.elbo


class Toy:
    """A diffusion model of one real number, whose log P(x) is known; made by `toy`.

    Attributes:
        model: the same as a `Model`, for all other functions of the library; its examples have
            the shape (B, 1).
        times: the grid of T times, of the same functions.
        tolerance: the difference between two grids, in nats, beyond which values are refused.
    """

    def __init__(self, model: Model, times: TimeGrid, tolerance: float = TOLERANCE) -> None:
        self.model, self.times, self.tolerance = model, times, tolerance

    @override
    def __repr__(self) -> str:
        return f"Toy(T={self.times.steps}, {self.model.step.name(self.model.process)})"

    def bound(self, x: Numbers) -> ToyBound:
        """Return the terms of −ELBO, and log P(x), per example.

        Args:
            x: examples, shape (B,), or one number.

        Raises:
            ValueError: if x is not finite, if f gives anything but finite numbers, or if the
                values on two grids differ by more than the tolerance.
        """
        (*terms, log_p), error = self._settled(
            x, lambda chain: (*chain.minus_elbo(), chain.log_prob(chain.x))
        )
        prior, reconstruction, diffusion = terms
        return ToyBound(prior, reconstruction, diffusion, log_p, error)

    def log_prob(self, x: Numbers) -> Tensor:
        """Return log P(x) by quadrature, shape (B,), nats; arguments and errors as for `bound`."""
        (value,), _ = self._settled(x, lambda chain: (chain.log_prob(chain.x),))
        return value

    def kl(self, x: Numbers) -> Tensor:
        """Return KL[ q(z|x) ‖ P(z|x) ], shape (B,), nats; arguments and errors as for `bound`.

        It is computed from P(z|x), not as the difference of log P(x) and the ELBO.
        """
        (value,), _ = self._settled(x, lambda chain: (chain.kl(),))
        return value

    def _settled(
        self, x: Numbers, terms: Callable[[Chain], tuple[Tensor, ...]]
    ) -> tuple[tuple[Tensor, ...], float]:
        """Return terms on the first grid that agrees with the one before, and the difference."""
        x, before, error = _examples(x), None, math.inf
        with measuring(self.model):
            for fineness in FINENESS:
                values = terms(Chain(self.model, self.times, x, fineness))
                if before is not None:
                    pairs = zip(values, before, strict=True)
                    error = torch.cat([(a - b).abs().flatten() for a, b in pairs]).max().item()
                if error <= self.tolerance:
                    return values, error
                before = values
        raise ValueError(
            f"the quadrature has not settled: values on two grids differ by {error:.2g} nats, more"
            f" than the tolerance of {self.tolerance:g}; f may jump, or a β or an x be extreme:"
            " try a smoother f, larger betas, or tolerance=..."
        )


@checked
def toy(
    betas: Tensor | Sequence[float],
    f: Function,
    *,
    variance: Literal["beta", "beta_tilde"] = "beta",
    predicts: str = "mean",
    tolerance: float = TOLERANCE,
) -> Toy:
    """Return a diffusion model of one real number, with ELBO, log P(x) and the gap between them.

    q(z_t|z_{t-1}) = N(√(1-β_t) z_{t-1}, β_t) with z_0 = x, P(z_T) = N(0, 1), P(z_{t-1}|z_t) =
    N(f(z_t, t), σ_t²) and P(x|z_1) = N(f(z_1, 1), β_1). All are densities in the units of x.

    Args:
        betas: β_1..β_T, each in (0, 1).
        f: called with latents z, shape (N,), float64, and an integer t in 1..T; returns the mean
            of z_{t-1} given z_t, shape (N,).
        variance: σ_t² for t = 2..T, β_t or β̃_t.
        predicts: meaning of f: the "mean" of z_{t-1}, or a prediction of the "noise" ε, the "data"
            x or the "velocity" √α ε − √(1-α) x, from which the mean follows; other names of these,
            such as "epsilon" and "x0", are understood.
        tolerance: largest acceptable error of the quadrature, nats.

    Raises:
        ValueError: if an argument is not like that.

    >>> exact = toy([0.2, 0.5], lambda z, t: (1 - [0.2, 0.5][t - 1]) ** 0.5 * z)
    >>> at = exact.bound([-1.0, 0.0, 2.0])  # P(x) is N(0, 1), and P(z|x) is q(z|x)
    >>> at.log_p
    tensor([-1.4189, -0.9189, -2.9189], dtype=torch.float64)
    >>> at.elbo
    tensor([-1.4189, -0.9189, -2.9189], dtype=torch.float64)
    >>> bool(exact.kl([-1.0, 0.0, 2.0]).abs().max() < 1e-6)
    True
    """
    predicts = parametrization.spelled(predicts)
    for name, value, known in (
        ("variance", variance, VARIANCES),
        ("predicts", predicts, PREDICTS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    if not callable(f):
        raise ValueError(f"f must be a function f(z, t) of latents and a step; got {f!r}")
    schedule = _Remembered(betas)
    affine, steps = Affine(), schedule.steps
    beta_1 = schedule.gamma[0].sigmoid().item()  # 1 - α_1
    model = Model(
        _ByStep(f),
        _StepDiffusion(schedule, affine),
        PREDICTS[predicts](steps),
        VARIANCES[variance](),
        GaussianDensity(affine, math.sqrt(beta_1)),
        (1,),
    )
    return Toy(model.eval(), TimeGrid.uniform(steps), tolerance)


def ideal_f(data: Numbers, betas: Tensor | Sequence[float]) -> Function:
    """Return the f of least KL for a data set: f(z, t) = m_t(z, E[x|z_t = z]).

    E[x|z_t] is the posterior mean for x drawn from the data set, each example equally likely.

    Args:
        data: examples, shape (N,).
        betas: β_1..β_T, as for `toy`.
    """
    x = _examples(data)
    process = GaussianDiffusion(schedule := Schedule.from_betas(betas), Affine())
    t = torch.arange(1, schedule.steps + 1, dtype=torch.float64) / schedule.steps
    of_z, of_e = process.m_t_weights(t - 1 / schedule.steps, t)
    q = [process.marginal(x[:, None], at.expand(len(x))) for at in t]

    def f(z: Tensor, t: int) -> Tensor:
        e_hat = q[t - 1].log_prob(z[:, None, None]).softmax(-1) @ x
        return of_z[t - 1] * z + of_e[t - 1] * e_hat

    return f


class _Remembered(Betas):
    """A schedule that remembers γ of a single time, for which quadrature asks many times."""

    def __init__(self, betas: Tensor | Sequence[float]) -> None:
        super().__init__(betas)
        self.known: dict[tuple[float, torch.device], Tensor] = {}

    @override
    def forward(self, t: Tensor) -> Tensor:
        if t.numel() != 1:
            return super().forward(t)
        key = t.item(), t.device
        if key not in self.known:
            self.known[key] = super().forward(t)
        return self.known[key].reshape(t.shape)


class _StepDiffusion(GaussianDiffusion):
    """A Gaussian diffusion whose network takes t = 1..T, not γ."""

    schedule: Betas

    @override
    def log_snr_input(self, t: Tensor) -> Tensor:
        return (t * self.schedule.steps).round()


class _ByStep(nn.Module):
    """f(z, t) as a network of features (B, 1) and steps (B,) or (1,)."""

    def __init__(self, f: Function) -> None:
        super().__init__()
        self.f = f
        # its type is the one in which f is called
        self.reference = nn.Parameter(torch.zeros(0, dtype=torch.float64), requires_grad=False)

    @override
    def forward(self, features: Tensor, step: Tensor) -> Tensor:
        if len(step) == 1:  # one for all
            return self._call(features[:, 0], int(step.item()))[:, None]
        output = torch.empty_like(features)
        for t in step.unique().tolist():
            rows = step == t
            output[rows, 0] = self._call(features[rows, 0], int(t))
        return output

    def _call(self, z: Tensor, t: int) -> Tensor:
        found = torch.as_tensor(self.f(z, t), dtype=torch.float64)
        if found.ndim and found.shape != z.shape:
            raise ValueError(
                f"f(z, t) must return one number for each of z, shape {tuple(z.shape)}; got"
                f" {tuple(found.shape)}"
            )
        found = found.expand_as(z)
        wrong = ~found.isfinite()
        if wrong.any():
            place, value = z[wrong][0].item(), found[wrong][0].item()
            raise ValueError(f"f(z, t) must be finite; f({place:.4g}, {t}) is {value}")
        return found


def _examples(x: Numbers) -> Tensor:
    x = (x if isinstance(x, Tensor) else torch.tensor(x)).double().reshape(-1)
    if not len(x) or not x.isfinite().all():
        raise ValueError(f"x must be finite numbers; got {x.tolist()}")
    return x
