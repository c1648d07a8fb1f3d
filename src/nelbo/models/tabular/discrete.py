r"""The columns of a table that are codes, ordered levels or symbols; `continuous` has the others.

    levels    Gaussian diffusion of the values of the codes, level probabilities, mixture kernel
    symbols   masked diffusion

Values that training did not see have a positive probability: a level by the estimate of Good
(1953) for unseen species, a category by the rule of succession.
"""

import math

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from typing_extensions import override

from nelbo.data.columns import Group
from nelbo.diffusion.gaussian import GaussianDiffusion
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.parametrization import Parametrization
from nelbo.diffusion.prediction import LevelPrediction, LevelTable, Prediction, level_evidence
from nelbo.diffusion.process import ForwardProcess
from nelbo.diffusion.reverse import GaussianKernel, mixture
from nelbo.diffusion.schedules import Schedule

WAVES = 24  # cosines that describe the context of a column with more than SINGLE levels
SINGLE = 64  # levels up to which each has a context number of its own


def _valid(group: Group) -> Tensor:
    """Return a mask of the codes that each column has, shape (D, K)."""
    codes = torch.tensor([place.codes for place in group.places])
    return torch.arange(group.size) < codes[:, None]


def _counts(x: Tensor, size: int) -> Tensor:
    """Return how often each column of x, (N, D), has each code; (D, K), float64."""
    places = size * torch.arange(x.shape[1])
    flat = torch.bincount((x.long() + places).flatten(), minlength=size * x.shape[1])
    return flat.reshape(-1, size).double()


class OrdinalValues(nn.Module):
    """The value of each code of ordinal columns, (D, K), in standard deviations from the mean.

    The codes for numbers below and above the range lie one precision outside that range; the code
    for a missing number lies one standard deviation below all others.

    Args:
        group: the columns.
    """

    values: Tensor
    valid: Tensor

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.places = group.places
        shape = len(group.places), group.size
        self.register_buffer("values", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("valid", _valid(group), persistent=False)

    def fit_statistics(self, x: Tensor) -> None:
        """Fit the values to the codes x, (N, D)."""
        code = torch.arange(self.values.shape[1]).double()
        for i, place in enumerate(self.places):
            points = x[:, i].double()
            last = place.codes - 1
            if place.column.missing:
                points = points[points < last]
            spread = points.std(correction=0).item() if len(points) else 0.0
            values = (code - (points.mean() if len(points) else 0)) / (spread or 1.0)
            if place.column.missing:
                values[last] = values[0] - 1
            self.values[i] = torch.where(self.valid[i], values, 0.0)

    @override
    def forward(self, x: Tensor) -> Tensor:
        values = self.values.expand(len(x), -1, -1)
        return values.gather(-1, x.long()[..., None])[..., 0]


class OrdinalColumns(GaussianDiffusion):
    """Gaussian diffusion of the values of the codes.

    Args:
        schedule: γ(t).
        levels: the values.
    """

    def __init__(self, schedule: Schedule, levels: OrdinalValues) -> None:
        ForwardProcess.__init__(self, schedule)
        self.values, self.codes = levels, levels.values.shape[1]

    @override
    def fit_statistics(self, x: Tensor) -> None:
        self.values.fit_statistics(x)

    @override
    def embed(self, x: Tensor) -> Tensor:
        e: Tensor = self.values(x)
        return e


class OrdinalContext(Parametrization):
    """P(x = v_k|z_t) ∝ exp(context_k + log-prior_k) N(z_t; √α_t v_k, 1-α_t), and ê is its mean.

    For many levels the context is a sum of a few smooth functions of the level, whose
    coefficients the network gives; for few levels, one number for each.

    Args:
        group: the columns.
        levels: their values.
    """

    basis: Tensor

    def __init__(self, group: Group, levels: OrdinalValues) -> None:
        super().__init__()
        self.levels = levels
        single = group.size <= SINGLE
        self.outputs = group.size if single else WAVES + 1
        basis = torch.eye(group.size) if single else _waves(group)
        self.register_buffer("basis", basis.double(), persistent=False)
        self.log_prior = nn.Parameter(torch.zeros(len(group.places), group.size))

    @override
    def fit_statistics(self, x: Tensor) -> None:
        """Fit the log-prior to the frequencies of the codes x, (N, D).

        The codes share, equally, one count more than there are codes that occur once: the share
        of unseen values that a sample of this size suggests (Good 1953).
        """
        counts, valid = _counts(x, self.levels.values.shape[1]), self.levels.valid
        unseen = (counts == 1).sum(1, keepdim=True) + 1.0
        smooth = counts + unseen / valid.sum(1, keepdim=True)
        smooth = smooth / smooth.sum(1, keepdim=True)
        self.log_prior.data.copy_(torch.where(valid, smooth, 1.0).log())

    @override
    def allowed(self) -> Tensor:
        return self.levels.valid

    @override
    def exclude_missing(self) -> None:
        """Give the code for missing numbers probability zero from now on."""
        for i, place in enumerate(self.levels.places):
            self.levels.valid[i, place.codes - 1] &= not place.column.missing

    @override
    def forward(
        self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess
    ) -> LevelPrediction:
        values = self.levels.values.to(z)
        context = (self.basis.to(output) @ output[..., None])[..., 0] + self.log_prior.to(output)
        logits = context + level_evidence(z, values, t, process)
        log_probs = logits.masked_fill(~self.levels.valid, -torch.inf).log_softmax(-1)
        return LevelTable((log_probs.exp() * values).sum(-1), log_probs)


def _waves(group: Group) -> Tensor:
    """Return cosines over the codes of each column and an indicator of its last: (D, K, M)."""
    code = torch.arange(group.size)
    columns = []
    for place in group.places:
        u = code / (place.codes - 1)
        waves = torch.cos(math.pi * u[:, None] * torch.arange(1, WAVES + 1))
        last = (code == place.codes - 1).float() * place.column.missing
        columns.append(torch.cat([waves, last[:, None]], 1))
    return torch.stack(columns)


class OrdinalMixture(GaussianKernel):
    """Σ_k P(x_i = v_k|z_t) q(z_s|z_t, x_i = v_k), with values v_k of each column.

    Args:
        levels: the values.
    """

    def __init__(self, levels: OrdinalValues) -> None:
        super().__init__()
        self.levels = levels

    @override
    def kernel(
        self, prediction: Prediction, z: Tensor, s: Tensor, t: Tensor, process: GaussianDiffusion
    ) -> Distribution:
        assert prediction.levels is not None
        return mixture(prediction.levels, self.levels.values, z, s, t, process)


class MaskedColumns(MaskedDiffusion):
    """Masked diffusion of codes; the network sees code 0, unseen in training, as a mask."""

    @override
    def features(self, z: Tensor) -> Tensor:
        return super().features(torch.where(z == 0, self.mask, z.long()))


class MaskedContext(Parametrization):
    """ê = log P(x_i = k|z_t) = log_softmax(output + log-prior), with code 0 at a fixed share.

    Code 0 stands for any category that the N training examples do not have. Its probability is
    1/(N + 2) whatever the network predicts (the rule of succession); a boolean has no code 0.

    Args:
        group: the columns.
    """

    log_other: Tensor
    valid: Tensor
    open: Tensor

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.outputs, self.places = group.size, group.places
        valid = _valid(group)
        valid[:, 0] = False
        open_ = [p.column.kind == "category" and not p.indicator for p in group.places]
        self.register_buffer("valid", valid, persistent=False)
        self.register_buffer("open", torch.tensor(open_), persistent=False)
        others = torch.full((len(group.places),), -torch.inf, dtype=torch.float64)
        self.register_buffer("log_other", others)
        self.log_prior = nn.Parameter(torch.zeros(len(group.places), group.size))

    @override
    def fit_statistics(self, x: Tensor) -> None:
        """Fit the log-prior to the frequencies of the codes x, (N, D)."""
        counts = torch.where(self.valid, _counts(x, self.outputs) + 1, 0.0)
        smooth = counts / counts.sum(1, keepdim=True)
        self.log_prior.data.copy_(torch.where(self.valid, smooth, 1.0).log())
        share = (_counts(x, self.outputs)[:, 0] + 1) / (len(x) + 2)
        self.log_other.copy_(torch.where(self.open, share, 0.0).log())

    @override
    def allowed(self) -> Tensor:
        """Return the codes of positive probability, with 0 where new categories may occur."""
        allowed = self.valid.clone()
        allowed[:, 0] = self.log_other > -torch.inf
        return allowed

    @override
    def exclude_missing(self) -> None:
        """Give missing values, and categories unseen in training, probability zero from now on."""
        for i, place in enumerate(self.places):
            self.valid[i, place.codes - 1] &= place.indicator or not place.column.missing
        self.log_other.fill_(-torch.inf)

    @override
    def forward(self, output: Tensor, z: Tensor, t: Tensor, process: ForwardProcess) -> Prediction:
        logits = output + self.log_prior.to(output)
        known = logits.masked_fill(~self.valid, -torch.inf).log_softmax(-1)
        other = self.log_other.to(known)[:, None]
        known = known + torch.log1p(-other.exp())
        is_other = torch.arange(self.outputs, device=z.device) == 0
        return Prediction(torch.where(is_other, other, known))
