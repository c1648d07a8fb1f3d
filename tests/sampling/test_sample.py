"""Samples follow the law that the bound is of."""

import math

import pytest
import torch
from torch import nn

from nelbo.diffusion.decoder import Categorical, GaussianDensity, LevelDecoder
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion, Levels
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import LevelLogits, SymbolLogits, XPrediction
from nelbo.diffusion.reverse import Beta, Mixture, Posterior
from nelbo.diffusion.schedules import Linear, PowerAlpha
from nelbo.diffusion.times import TimeGrid
from nelbo.sampling.samplers import ancestral, probability_flow


class Zero(nn.Module):
    """No context: the head's log-prior is all there is."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = nn.Parameter(torch.zeros(outputs, dtype=torch.float64))

    def forward(self, features, level):
        rows = features.reshape(len(features), 2, -1)[..., :1]
        return 0 * rows + self.outputs


class Shrink(nn.Module):
    """Ideal denoiser of N(0, 4): ê = 4√α z / (4α + 1 - α)."""

    def __init__(self):
        super().__init__()
        self.variance = nn.Parameter(torch.tensor(4.0, dtype=torch.float64))

    def forward(self, z, level):
        alpha = torch.sigmoid(-level)[:, None]
        return self.variance * alpha.sqrt() * z / (self.variance * alpha + 1 - alpha)


PRIOR = torch.tensor([0.5, 0.1, 0.4], dtype=torch.float64)


def level_model(step):
    levels = Levels(3)
    head = LevelLogits(levels.values)
    head.log_prior.data = PRIOR.log()
    made = Mixture(levels.values) if step == "mixture" else Posterior()
    return Model(
        Zero(3), GaussianDiffusion(Linear(-7.0, 6.0), levels), head, made, LevelDecoder(), (2,)
    )


def symbol_model():
    head = SymbolLogits(3)
    head.log_prior.data = PRIOR.log()
    process = MaskedDiffusion(PowerAlpha(), 3)
    return Model(Zero(3), process, head, Posterior(), Categorical(), (2,))


def normal_model(step):
    affine = Affine(torch.full((2,), 5.0), torch.full((2,), 0.5))
    decoder = GaussianDensity(affine, math.exp(-4))
    return Model(
        Shrink(), GaussianDiffusion(Linear(-8.0, 8.0), affine), XPrediction(), step, decoder, (2,)
    )


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        (level_model("mixture"), 1),
        (level_model("mixture"), 3),
        (level_model("gaussian"), 200),
        (symbol_model(), 4),
    ],
    ids=["mixture, 1 step", "mixture, 3 steps", "gaussian, 200 steps", "absorbing"],
)
def test_independent_dimensions_are_sampled_exactly(model, steps):
    """With the exact conditionals of independent dimensions, P(x) is the prior at any T where
    the step is exact, and for T → ∞ where it is not."""
    n = 4000
    x = ancestral(model, n, TimeGrid.uniform(steps), seed=1)
    frequency = torch.stack([(x == k).double().mean() for k in range(3)])
    error = (PRIOR * (1 - PRIOR) / (2 * n)).sqrt()
    assert ((frequency - PRIOR).abs() < 4 * error).all()
    both = torch.stack([(x[:, 0] == 0), (x[:, 1] == 0)]).all(0).double().mean()
    assert abs(both.item() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)


@pytest.mark.parametrize("sampler", [ancestral, probability_flow])
def test_normal_data_come_back_with_mean_and_variance(sampler):
    """N(0, 4) in the units of e, so N(5, 1) in those of the data."""
    x = sampler(normal_model(Posterior()), 3000, TimeGrid.uniform(100), seed=2)
    assert abs(x.mean().item() - 5) < 4 / math.sqrt(6000)
    assert x.std().item() == pytest.approx(1, abs=4 / math.sqrt(12000) + 0.02)


def test_beta_steps_are_wider_than_posterior_steps():
    wide = ancestral(normal_model(Beta()), 2000, TimeGrid.uniform(10), seed=3).std()
    narrow = ancestral(normal_model(Posterior()), 2000, TimeGrid.uniform(10), seed=3).std()
    assert wide > narrow


def test_seeds():
    model, grid = level_model("mixture"), TimeGrid.uniform(3)
    assert torch.equal(ancestral(model, 50, grid, 1), ancestral(model, 50, grid, 1))
    assert not torch.equal(ancestral(model, 50, grid, 1), ancestral(model, 50, grid, 2))


def test_the_flow_needs_a_gaussian_process():
    with pytest.raises(ValueError, match=r"Gaussian process.*MaskedDiffusion.*ancestral"):
        probability_flow(symbol_model(), 1, TimeGrid.uniform(2))


def test_no_samples():
    with pytest.raises(ValueError, match="at least 1; got 0"):
        ancestral(symbol_model(), 0, TimeGrid.uniform(2))
