r"""Parametrizations: from a network's output to a prediction ê of e = embed(x), given z_t.

ê takes the place of e in the formulas of the encoder, so nothing else depends on the choice. Any
function of the output, z_t and t is a valid ê, so that the bound holds for any process; noise,
velocity and levels mean what they say where z_t = √α_t e + √(1-α_t) ε, as in Gaussian diffusion:

    EpsPrediction output is ε̂     ê = (z_t - √(1-α_t) ε̂) / √α_t
    XPrediction   output is ê
    VPrediction   output is v̂     ê = √α_t z_t - √(1-α_t) v̂
    Mean          output is f     ê solves m_t(z_t, ê) = f for the step from t to t - 1/T
    LevelLogits   P(x_i = v_k|z_t) = softmax_k( output_k + log N(z_t; √α_t v_k, 1-α_t) ), ê its
                  mean: the evidence of one pixel is exact, the network only adds context
    LevelCurves   the same with Σ_j output_j c_j(k) for output_k: a few curves over many levels
    SymbolLogits  ê = log P(x_i = k|z_t) = log_softmax(output), for masked diffusion

Sources: Ho et al. 2020 (noise), Salimans & Ho 2022 (velocity), Graves et al. 2023 (discrete data).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo._utils.numerics import over
from nelbo.diffusion.gaussian import GaussianDiffusion
from nelbo.diffusion.prediction import (
    LevelFamily,
    LevelPrediction,
    Prediction,
    SymbolPrediction,
    signal_and_precision,
)
from nelbo.diffusion.process import ForwardProcess
from nelbo.diffusion.symbols import WIDE

#: other spellings of what a network predicts, in papers and libraries
SPELLINGS = {
    **dict.fromkeys(("epsilon", "eps", "pred_noise", "ε"), "noise"),
    **dict.fromkeys(("x", "x0", "x_0", "x_start", "sample", "pred_x0"), "data"),
    **dict.fromkeys(("v", "v_prediction", "pred_v"), "velocity"),
    "flow_prediction": "flow",
    **dict.fromkeys(("f", "posterior_mean", "previous_x"), "mean"),
}


def spelled(word: str) -> str:
    """Return our word for what a network predicts; an unknown word as it is.

    >>> spelled("epsilon")
    'noise'
    """
    return SPELLINGS.get(word, word)


class Parametrization(nn.Module, ABC):
    """Function from a network's output, (B, ...) or (B, ..., outputs), to a prediction."""

    #: number of outputs of the network per dimension of the data
    outputs: int = 1
    #: T if the output is defined on a grid of T steps only, else None
    steps: int | None = None
    #: word for the output where other outputs of networks could be mistaken for it, else ""
    predicts: str = ""
    #: whether the second output is the variance of the reverse kernel
    has_variance: bool = False

    @property
    def factor(self) -> Callable[[Tensor], Tensor] | None:
        """c(γ) of the latents c z that the output belongs to; None where it goes with any."""
        return None

    @property
    def point(self) -> "Parametrization | None":
        """The part with one output per dimension, such as a noise or velocity; None for logits."""
        return self if self.outputs == 1 else None

    @property
    def factors(self) -> "Sequence[Parametrization]":
        """The parametrizations of the groups of columns; for other data, this one alone."""
        return (self,)

    def output_shape(self, z: Tensor) -> torch.Size:
        """Return the shape that the network's output must have for z."""
        return z.shape if self.outputs == 1 else torch.Size((*z.shape, self.outputs))

    def fit_statistics(self, x: Tensor) -> None:
        """Fit to training examples x, (N, ...), before training; does nothing here."""

    @property
    def level_values(self) -> Tensor | None:
        """v_1..v_K, shape (K,), if P(x_i = v_k|z_t) has the same values for all i; else None."""
        return None

    def exclude_missing(self) -> None:
        """Give missing cells of a table probability zero from now on; does nothing here."""

    @property
    def may_be_missing(self) -> Tensor:
        """Mask of the dimensions where NaN stands for a missing cell, (D or 1,): none here."""
        return torch.zeros(1, dtype=torch.bool)

    def allowed(self) -> Tensor | None:
        """Return a mask of the codes of each dimension, (D, K); None for all of the process."""
        return None

    @property
    def numbers(self) -> int:
        """Numbers per dimension that the arithmetic around a network call holds."""
        return self.outputs

    @abstractmethod
    @override
    def forward(self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess) -> Prediction:
        """Return the prediction at z = z_t and times t, shape (B,), from the network's output."""

    def read(
        self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess, dtype: torch.dtype
    ) -> Prediction:
        """Return the prediction, computed in `dtype`, from an output in the network's own."""
        prediction: Prediction = self(output.to(dtype), z, t, process)
        return prediction


class EpsPrediction(Parametrization):
    """The output is ε̂ in z_t = √α_t e + √(1-α_t) ε."""

    predicts = "noise"

    @override
    def forward(self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess) -> Prediction:
        signal = over((process.log_alpha(t) / 2).exp(), z)
        noise = over((process.log_one_minus_alpha(t) / 2).exp(), z)
        return Prediction((z - noise * output) / signal)


class XPrediction(Parametrization):
    """The output is ê."""

    predicts = "data"

    @override
    def forward(self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess) -> Prediction:
        return Prediction(output)


class VPrediction(Parametrization):
    """The output is v̂ = √α_t ε̂ - √(1-α_t) ê.

    An output of zero is the best linear prediction for data of mean 0 and variance 1.
    """

    predicts = "velocity"

    @override
    def forward(self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess) -> Prediction:
        signal = over((process.log_alpha(t) / 2).exp(), z)
        noise = over((process.log_one_minus_alpha(t) / 2).exp(), z)
        return Prediction(signal * z - noise * output)


class Mean(Parametrization):
    """The output is f(z_t, φ, t), the mean of p(z_{t-1}|z_t), at times i/T.

    Args:
        steps: T; f belongs to the step from t to t - 1/T, with α_0 = 1.
    """

    steps: int

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    @override
    def forward(self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess) -> Prediction:
        # a mean f is one of m_t: refused with another process, which has none
        process = GaussianDiffusion.require(process, "Mean needs GaussianDiffusion")
        i = (t * self.steps).round()
        if ((t * self.steps - i).abs() > 1e-9 * self.steps).any():
            raise ValueError(
                f"the mean f belongs to steps of 1/{self.steps}; got a time off that grid;"
                f" try TimeGrid.uniform({self.steps}), or another head for continuous time"
            )
        s = (i - 1) / self.steps
        of_z, of_e = process.m_t_weights(s, t)
        return Prediction((output - over(of_z, z) * z) / over(of_e, z))


class WithVariance(Parametrization):
    """A parametrization with a second output v for the variance of the reverse kernel.

    log σ² lies at (v + 1)/2 between log β̃ and log β (Nichol & Dhariwal 2021, equation 15).

    Args:
        head: with one output, such as `EpsPrediction`.
    """

    outputs, has_variance = 2, True

    def __init__(self, head: Parametrization) -> None:
        super().__init__()
        if head.outputs != 1:
            raise ValueError(
                f"WithVariance wraps a head with one output; {type(head).__name__} has"
                f" {head.outputs}; try WithVariance(EpsPrediction())"
            )
        self.head, self.steps = head, head.steps

    @property
    @override
    def point(self) -> Parametrization | None:
        return self.head.point

    @override
    def forward(self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess) -> Prediction:
        point = self.head(output[..., 0], z, t, process)
        return Prediction(point.e_hat, fraction=(output[..., 1] + 1) / 2)


class Logits(Parametrization):
    """Logits of K values per dimension, added to a learned log-prior.

    Args:
        count: the number K of values.
        shape: shape of one example, for a log-prior (*shape, K); where left out, all dimensions
            share one, (K,).
    """

    def __init__(self, count: int, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.outputs = self.count = count
        self.log_prior = nn.Parameter(torch.zeros(*shape, count))

    @property
    @override
    def point(self) -> None:
        return None

    @property
    @override
    def numbers(self) -> int:
        return self.count

    @override
    def fit_statistics(self, x: Tensor) -> None:
        """Set the log-prior to the log-frequencies of the levels in x, (N, *shape).

        With a network output of zero, the model is then the factorised Bayes denoiser.
        """
        if self.log_prior.ndim == 1:  # shared by all dimensions
            counts = x[x < self.count].bincount(minlength=self.count) + 1
            self.log_prior.data.copy_((counts / counts.sum()).log())
            return
        self.log_prior.data.copy_(log_frequencies(x, self.count))


def log_frequencies(x: Tensor, count: int) -> Tensor:
    """Return log-frequencies of the `count` levels in each dimension of x, (N, ...): (..., count).

    Each dimension is smoothed with `count` pseudo-counts, distributed as in all dimensions. The
    code `count`, where a shorter text has no symbol, is not counted.
    """
    places = count * torch.arange(x[0].numel()).reshape(x.shape[1:])
    counts = torch.zeros(x[0].numel() * count, dtype=torch.int64)
    for part in x.split(4096):
        counts += torch.bincount((places + part)[part < count], minlength=len(counts))
    table = counts.double().reshape(*x.shape[1:], count)
    overall = table.flatten(0, -2).sum(0) + 1
    smooth = table + count * overall / overall.sum()
    return (smooth / smooth.sum(-1, keepdim=True)).log()


class LevelLogits(Logits):
    """P(x_i = v_k|z_t) ∝ exp(output_k + log-prior_k) N(z_t; √α_t v_k, 1-α_t), and ê = Σ_k P_k v_k.

    Args:
        values: v_1..v_K, shape (K,).
        shape: shape of one example; see `Logits`.
    """

    values: Tensor
    curves: Tensor

    def __init__(self, values: Tensor, shape: tuple[int, ...] = ()) -> None:
        super().__init__(len(values), shape)
        self.register_buffer("values", values, persistent=False)
        self.register_buffer("curves", torch.eye(len(values)), persistent=False)

    @property
    @override
    def level_values(self) -> Tensor:
        return self.values

    @override
    def forward(
        self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> LevelPrediction:
        signal, precision = signal_and_precision(t, process)
        values, curves = self.values.to(z), self.curves.to(z)
        prior = self.log_prior.to(z).reshape(-1, self.count)
        flat = output.reshape(len(z), -1, len(curves))
        evidence = values, z.flatten(1), signal.to(z), precision.to(z)
        return LevelFamily(flat, curves, prior, evidence, z.shape)


class LevelCurves(LevelLogits):
    """`LevelLogits` with Σ_j output_j c_jk for output_k, for many ordered levels.

    The curves c_j are learned. They start as evenly spaced bumps, as wide as their distance, and a
    spike at each end of the range, where clipped values accumulate. With the K unit vectors as
    curves, this would be `LevelLogits`.

    Args:
        values: v_1..v_K, shape (K,).
        shape: shape of one example; see `Logits`.
        curves: number of curves, at least 4.

    Raises:
        ValueError: if there are fewer curves.
    """

    def __init__(self, values: Tensor, shape: tuple[int, ...] = (), curves: int = 32) -> None:
        if curves < 4:
            raise ValueError(f"curves must be at least 4; got {curves}")
        Logits.__init__(self, len(values), shape)  # without K unit vectors
        self.register_buffer("values", values, persistent=False)
        self.outputs = curves
        place = torch.linspace(0, curves - 3, len(values))
        bumps = (-0.5 * (place - torch.arange(curves - 2)[:, None]).square()).exp()
        ends = torch.zeros(2, len(values))
        ends[0, 0] = ends[1, -1] = 1
        self.curves = nn.Parameter(torch.cat([bumps, ends]))


class SymbolLogits(Logits):
    """ê = log P(x_i = k|z_t) = log_softmax(output + log-prior), computed where it is asked for.

    For more than 4096 symbols it is computed in float32.
    """

    @override
    def forward(
        self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> SymbolPrediction:
        return self.read(output, z, t, process, output.dtype)

    @override
    def read(
        self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess, dtype: torch.dtype
    ) -> SymbolPrediction:
        if process.has_flow or process.codes != self.count:
            raise TypeError(
                f"SymbolLogits needs a process of symbols; got {type(process).__name__}, whose e"
                f" are not log-probabilities of {self.count} symbols"
            )
        dtype = dtype if self.count <= WIDE else torch.float32
        return SymbolPrediction(output, self.log_prior.to(dtype), dtype)
