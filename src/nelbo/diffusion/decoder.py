r"""Decoders P(x|z_1) of the last latent, normalised over the space of the data.

For integers it is a probability that sums to 1 over the levels; for real data a density that
integrates to 1 **in the units of the data** (the log-determinant of the transform is included).
Each class takes a prediction at (z_1, t_1) and returns a distribution with batch shape (B,).
"""

import math
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent
from torch.nn.functional import logsigmoid
from typing_extensions import override

from nelbo.diffusion.distributions import Discrete
from nelbo.diffusion.gaussian import Affine, Levels
from nelbo.diffusion.prediction import (
    LevelFamily,
    LevelPrediction,
    Prediction,
    signal_and_precision,
)
from nelbo.diffusion.process import ForwardProcess, per_example


class Decoder(nn.Module, ABC):
    """P(x|z_1) from a prediction at z_1."""

    #: whether it is a density, of which bits have no meaning, or a probability
    density = False
    #: whether it gives P(x|z_t) from a prediction at any time t, not only at the first time
    at_any_time = False

    @classmethod
    def of_levels(cls, levels: Levels) -> Self:
        """Make the decoder into integers that stand for these levels, as a configuration does."""
        return cls()

    @property
    def log_scales(self) -> tuple[Tensor, Tensor] | None:
        """log σ and log s where P(x|z_1) is the normal law of x = μ + s e, e ~ N(ê, σ²)."""
        return None

    @abstractmethod
    @override
    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        """Return P(x|z_1) for z = z_1, shape (B, ...), at the first times t, shape (B,)."""


class _Predicted(Discrete):
    """The distribution of a prediction of levels; its full table is computed only if needed."""

    def __init__(self, prediction: LevelPrediction) -> None:
        self.prediction = prediction
        Distribution.__init__(self, prediction.e_hat.shape, validate_args=False)

    @property
    def log_probs(self) -> Tensor:  # type: ignore[override]
        return self.prediction.log_probs

    @override
    def log_prob(self, value: Tensor) -> Tensor:
        if value.shape != self.batch_shape:
            return super().log_prob(value)
        return self.prediction.log_prob(value)


class LevelDecoder(Decoder):
    """P(x_i = v_k|z_1) by the level probabilities of the prediction, evidence included."""

    at_any_time = True

    @override
    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        levels = prediction.levels
        if levels is None:
            raise TypeError("LevelDecoder needs a network head that predicts levels: LevelLogits")
        return per_example(_Predicted(levels))


class Evidence(Decoder):
    """P(x_i = v_k|z_1) ∝ q(z_1|x_i = v_k), without a network (Kingma et al. 2021, equation 16).

    Args:
        levels: the values of the levels.
    """

    @classmethod
    @override
    def of_levels(cls, levels: Levels) -> Self:
        return cls(levels)

    def __init__(self, levels: Levels) -> None:
        super().__init__()
        self.levels = levels

    @override
    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        values, flat = self.levels.values.to(z), z.flatten(1)
        signal, precision = (v.to(z) for v in signal_and_precision(t, process))
        # a family without curves: all levels are equally likely
        coefficients, curves = z.new_zeros(*flat.shape, 0), z.new_zeros(0, len(values))
        evidence, prior = (values, flat, signal, precision), z.new_zeros(1, len(values))
        return per_example(_Predicted(LevelFamily(coefficients, curves, prior, evidence, z.shape)))


class DiscretisedGaussian(Decoder):
    """Probability of the bin of level k under N(x̂(z_1), scale²); Ho et al. 2020, equation 13.

    The outermost bins are open.

    Args:
        levels: the values of the levels.
        scale: initial standard deviation in units of the values; learned.
    """

    @classmethod
    @override
    def of_levels(cls, levels: Levels) -> Self:
        return cls(levels)

    def __init__(self, levels: Levels, scale: float | None = None) -> None:
        super().__init__()
        self.levels = levels
        start = 1 / (levels.count - 1) if scale is None else scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(start), dtype=torch.float64))

    @override
    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        scale = self.log_scale.exp().to(z.dtype)
        return per_example(self.levels.pushforward(prediction.e_hat, scale))


class GaussianDensity(Decoder):
    """x ~ N(shift + scale·ê(z_1), (scale·spread)²), a density in the units of the data.

    Args:
        affine: the transform e = (x - shift)/scale; log|de/dx| = -log scale enters through the
            units of the normal distribution.
        spread: initial standard deviation in units of e; learned.
    """

    density = True

    def __init__(self, affine: Affine, spread: float = 0.1) -> None:
        super().__init__()
        self.affine = affine
        self.log_spread = nn.Parameter(torch.tensor(math.log(spread), dtype=torch.float64))

    @property
    @override
    def log_scales(self) -> tuple[Tensor, Tensor]:
        return self.log_spread, self.affine.scale.log()

    @override
    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        e_hat = prediction.e_hat.double()
        return per_example(self.affine.pushforward(e_hat, self.log_spread.exp()))


class Bernoulli(Decoder):
    """P(x_i = 1|z_1) = sigmoid(slope·x̂_i + offset), for two levels; slope and offset learned."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(5.0, dtype=torch.float64))
        self.offset = nn.Parameter(torch.tensor(0.0, dtype=torch.float64))

    @override
    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        logit = self.slope.to(z.dtype) * prediction.e_hat + self.offset.to(z.dtype)
        return per_example(Discrete(torch.stack([logsigmoid(-logit), logsigmoid(logit)], -1)))


class Categorical(Decoder):
    """P(x|z_1) of symbols, as the process reads it from z_1 and the prediction.

    Symbols that masks leave visible are certain; without masks, all are predicted.
    """

    at_any_time = True

    @override
    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        return per_example(process.likelihood(prediction, z, t))
