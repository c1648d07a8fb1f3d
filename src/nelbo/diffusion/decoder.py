r"""P(x|z_1): the decoder of the last latent into data, normalised over the data's own space.

For integers it is a probability that sums to 1 over the levels; for real data a density that
integrates to 1 **in the data's units** (the transform's log-determinant is inside). Each class
takes a prediction made at (z_1, t_1) and returns a distribution with batch shape (B,).
"""

import math
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent
from torch.nn.functional import logsigmoid

from nelbo.diffusion.distributions import Discrete
from nelbo.diffusion.parametrization import LevelPrediction, Prediction, level_evidence
from nelbo.diffusion.process import Affine, ForwardProcess, Levels, per_example


class Decoder(nn.Module, ABC):
    """P(x|z_1) from a prediction at z_1."""

    #: a density, in nats only; else a probability
    density = False
    #: of a prediction at any time t it makes P(x|z_t), not only of one at the first
    at_any_time = False

    @classmethod
    def of_levels(cls, levels: Levels) -> Self:
        """Make the decoder into integers that stand for these levels, as a configuration does."""
        return cls()

    @abstractmethod
    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        """P(x|z_1) for z = z_1, shape (B, ...), at the first times t, shape (B,)."""


class _Predicted(Discrete):
    """The levels of a prediction; all of their probabilities only where they are asked for."""

    def __init__(self, prediction: LevelPrediction) -> None:
        self.prediction = prediction
        Distribution.__init__(self, prediction.e_hat.shape, validate_args=False)

    @property
    def log_probs(self) -> Tensor:  # type: ignore[override]
        return self.prediction.log_probs

    def log_prob(self, value: Tensor) -> Tensor:
        if value.shape != self.batch_shape:
            return super().log_prob(value)
        return self.prediction.log_prob(value)


class LevelDecoder(Decoder):
    """P(x_i = v_k|z_1) are the level probabilities the network predicts, evidence included."""

    at_any_time = True

    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        levels = prediction.levels
        if levels is None:
            raise TypeError("LevelDecoder needs a network head that predicts levels: LevelLogits")
        return per_example(_Predicted(levels))


class Evidence(Decoder):
    """P(x_i = v_k|z_1) ∝ q(z_1|x_i = v_k), no network (Kingma et al. 2021, equation 16)."""

    @classmethod
    def of_levels(cls, levels: Levels) -> Self:
        return cls(levels)

    def __init__(self, levels: Levels) -> None:
        super().__init__()
        self.levels = levels

    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        evidence = level_evidence(z, self.levels.values, t, process)
        return per_example(Discrete(evidence.log_softmax(-1)))


class DiscretisedGaussian(Decoder):
    """The bin of level k under N(x̂(z_1), scale²), outermost bins open (Ho et al. 2020, eq. 13).

    Args:
        levels: the values of the levels.
        scale: standard deviation in units of the values, where it starts; learned.
    """

    @classmethod
    def of_levels(cls, levels: Levels) -> Self:
        return cls(levels)

    def __init__(self, levels: Levels, scale: float | None = None) -> None:
        super().__init__()
        self.levels = levels
        start = 1 / (levels.count - 1) if scale is None else scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(start), dtype=torch.float64))

    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        scale = self.log_scale.exp().to(z.dtype)
        return per_example(self.levels.pushforward(prediction.e_hat, scale))


class GaussianDensity(Decoder):
    """x ~ N(shift + scale·ê(z_1), (scale·spread)²): a density in the data's units.

    Args:
        affine: the transform e = (x - shift)/scale; log|de/dx| = -log scale enters through the
            units of the normal.
        spread: standard deviation in units of e, where it starts; learned.
    """

    density = True

    def __init__(self, affine: Affine, spread: float = 0.1) -> None:
        super().__init__()
        self.affine = affine
        self.log_spread = nn.Parameter(torch.tensor(math.log(spread), dtype=torch.float64))

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

    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        logit = self.slope.to(z.dtype) * prediction.e_hat + self.offset.to(z.dtype)
        return per_example(Discrete(torch.stack([logsigmoid(-logit), logsigmoid(logit)], -1)))


class Categorical(Decoder):
    """Absorbing process: a symbol that shows is itself, a masked one is predicted."""

    at_any_time = True

    def forward(
        self, prediction: Prediction, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> Independent:
        shows = torch.arange(prediction.e_hat.shape[-1], device=z.device) == z[..., None]
        certain = shows.to(prediction.e_hat.dtype).log()
        masked = ~shows.any(-1, keepdim=True)
        return per_example(Discrete(torch.where(masked, prediction.e_hat, certain)))
