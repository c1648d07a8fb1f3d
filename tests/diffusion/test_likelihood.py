"""P(x|z_1) is normalised over the data's own space, whatever the decoder."""

import math

import pytest
import torch
from torch.distributions import Independent

from nelbo._utils.numerics import seeded
from nelbo.diffusion import level_law
from nelbo.diffusion.decoder import (
    Bernoulli,
    Categorical,
    DiscretisedGaussian,
    Evidence,
    GaussianDensity,
    LevelDecoder,
)
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion, Levels
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.parametrization import LevelLogits
from nelbo.diffusion.prediction import LevelPrediction, Prediction
from nelbo.diffusion.schedules import Linear, PowerAlpha
from nelbo.testing import DiscreteContract, assert_mean

SHAPE = (2, 3, 5, 7)
T1 = torch.tensor([0.1, 0.6], dtype=torch.float64)
LEVELS = [2, 3, 17, 256]


@pytest.fixture(autouse=True)
def _seed():
    with seeded(6):
        yield


def noisy(count: int) -> tuple[GaussianDiffusion, torch.Tensor, torch.Tensor]:
    """A process on K levels, data, and a z_1 of it."""
    process = GaussianDiffusion(Linear(-6.0, 4.0), Levels(count))
    x = torch.randint(count, SHAPE)
    return process, x, process.marginal(process.embed(x), T1).sample()


class OfLevels(DiscreteContract):
    @pytest.fixture(params=LEVELS)
    def count(self, request):
        self.levels = request.param
        return request.param


class TestLevelHead(OfLevels):
    @pytest.fixture
    def distribution(self, count):
        process, _, z = noisy(count)
        output = torch.randn(*SHAPE, count, dtype=torch.float64)
        prediction = LevelLogits(Levels(count).values)(output, z, T1, process)
        return LevelDecoder()(prediction, z, T1, process)


class TestEvidence(OfLevels):
    @pytest.fixture
    def distribution(self, count):
        process, _, z = noisy(count)
        return Evidence(Levels(count))(Prediction(z), z, T1, process)


class TestDiscretisedGaussian(OfLevels):
    @pytest.fixture(params=[None, 0.05, 2.0], ids=["default", "narrow", "wide"])
    def distribution(self, count, request):
        process, _, z = noisy(count)
        e_hat = 1.5 * torch.randn(SHAPE, dtype=torch.float64)
        decoder = DiscretisedGaussian(Levels(count), request.param).requires_grad_(False)
        return decoder(Prediction(e_hat), z, T1, process)


class TestBernoulli(DiscreteContract):
    levels = 2

    @pytest.fixture
    def distribution(self):
        process, _, z = noisy(2)
        e_hat = 3 * torch.randn(SHAPE, dtype=torch.float64)
        return Bernoulli().requires_grad_(False)(Prediction(e_hat), z, T1, process)


class TestCategorical(OfLevels):
    @pytest.fixture
    def distribution(self, count):
        process = MaskedDiffusion(PowerAlpha(), count)
        z = process.marginal(process.embed(torch.randint(count, SHAPE)), T1).sample()
        e_hat = torch.randn(*SHAPE, count, dtype=torch.float64).log_softmax(-1)
        return Categorical()(Prediction(e_hat), z, T1, process)


@pytest.mark.parametrize("cached", [1, 100, 2**18])
def test_evidence_is_bayes_rule(monkeypatch, cached):
    """Kingma et al. 2021, equation 16: P(x_i = v_k|z_1) = N(z_1; √α v_k, 1-α) over its sum on k,
    the densities by hand; in parts of any size."""
    monkeypatch.setitem(level_law.PART, "cpu", cached)
    process, x, z = noisy(17)
    alpha = 1 / (1 + (-6 + 10 * T1).exp())
    values = [2 * k / 16 - 1 for k in range(17)]
    density = torch.stack(
        [
            torch.exp(
                -((z - alpha.sqrt().reshape(2, 1, 1, 1) * v) ** 2)
                / (2 * (1 - alpha)).reshape(2, 1, 1, 1)
            )
            for v in values
        ]
    )
    truth = (density / density.sum(0)).gather(0, x[None])[0].log().flatten(1).sum(1)
    got = Evidence(Levels(17))(Prediction(z), z, T1, process).log_prob(x)
    torch.testing.assert_close(got, truth, rtol=1e-11, atol=0)


def test_discretised_gaussian_bins():
    """Ho et al. 2020, equation 13: Φ at bin ends half-way between levels, outermost open."""
    process, _, z = noisy(3)
    e_hat = torch.full(SHAPE, 0.2, dtype=torch.float64)
    p = DiscretisedGaussian(Levels(3), 0.4)(Prediction(e_hat), z, T1, process)
    low, high = (0.5 * math.erfc((0.2 - edge) / 0.4 / math.sqrt(2)) for edge in (-0.5, 0.5))
    for level, truth in enumerate((low, high - low, 1 - high)):
        got = p.base_dist.log_prob(torch.full(SHAPE, level)).exp()
        torch.testing.assert_close(got, torch.full_like(got, truth), rtol=1e-13, atol=0)


def test_bernoulli_is_a_logistic():
    """P(x_i = 1) = sigmoid(5 x̂_i) at first, and learned from there."""
    decoder = Bernoulli()
    e_hat = torch.tensor([[-1.0, 0.3]], dtype=torch.float64)
    p = decoder(Prediction(e_hat), e_hat, T1[:1], None)
    truth = math.log(1 / (1 + math.exp(5.0))) + math.log(1 / (1 + math.exp(1.5)))
    got = p.log_prob(torch.tensor([[1, 0]]))
    torch.testing.assert_close(got.item(), truth, rtol=1e-14, atol=0)
    got.sum().backward()
    assert decoder.slope.grad != 0 and decoder.offset.grad != 0


def test_categorical_copies_what_shows():
    """Equation 9: a symbol that shows is certain, a masked one is the prediction."""
    z = torch.tensor([[1, 3, 3]])
    e_hat = torch.randn(1, 3, 3, dtype=torch.float64).log_softmax(-1)
    p = Categorical()(Prediction(e_hat), z, T1[:1], MaskedDiffusion(PowerAlpha(), 3))
    assert p.base_dist.log_prob(torch.tensor([[1, 0, 0]]))[0, 0] == 0
    assert p.base_dist.log_prob(torch.tensor([[2, 0, 0]]))[0, 0] == -math.inf
    got = p.base_dist.log_prob(torch.tensor([[1, 0, 2]]))[0, 1:]
    torch.testing.assert_close(got, torch.stack([e_hat[0, 1, 0], e_hat[0, 2, 2]]), rtol=0, atol=0)


class TestGaussianDensity:
    """A density in the data's units, each dimension with a shift and a scale of its own."""

    shift = torch.tensor([[[0.0]], [[50.0]], [[-3.0]]], dtype=torch.float64)
    scale = torch.tensor([[[1.0]], [[255.0]], [[1e-3]]], dtype=torch.float64)

    @pytest.fixture
    def distribution(self) -> Independent:
        decoder = GaussianDensity(Affine(self.shift, self.scale), 0.2).requires_grad_(False)
        e_hat = torch.randn(SHAPE, dtype=torch.float64)
        return decoder(Prediction(e_hat), e_hat, T1, None)

    def test_integrates_to_one(self, distribution):
        """∫ P(x|z_1) dx = 1 over the data's units, by quadrature that knows
        only where the mass is."""
        base = distribution.base_dist
        steps = torch.linspace(-30, 30, 4001, dtype=torch.float64)
        x = self.shift + self.scale * steps[:, None, None, None, None]
        cells = self.scale * (steps[1] - steps[0])
        total = (base.log_prob(x).exp() * cells).sum(0)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)

    def test_log_determinant(self, distribution):
        """log p(x) = log N(e; ê, spread²) − Σ log scale, e = (x - shift)/scale."""
        x = distribution.sample()
        e = (x - self.shift) / self.scale
        e_hat = (distribution.base_dist.mean - self.shift) / self.scale
        in_e = -0.5 * ((e - e_hat) / 0.2).square() - math.log(0.2 * math.sqrt(2 * math.pi))
        truth = (in_e - self.scale.log()).flatten(1).sum(1)
        torch.testing.assert_close(distribution.log_prob(x), truth, rtol=1e-11, atol=1e-10)

    def test_samples_are_in_the_units_of_the_data(self, distribution):
        """Mean and spread of draws, per dimension, in units of x."""
        draws = distribution.sample((20_000,))
        error = ((draws - distribution.base_dist.mean) / (0.2 * self.scale)).flatten(1)[:, ::13]
        assert_mean(error, 0.0, error=0.008)
        assert_mean(error.square(), 1.0, error=0.012)


@pytest.mark.parametrize(
    "decoder", [LevelDecoder(), Evidence(Levels(17))], ids=["head", "evidence"]
)
def test_level_decoders_are_certain_without_noise(decoder):
    """As the noise of z_1 goes, the level is read out of z_1 for nothing."""
    process = GaussianDiffusion(Linear(-30.0, 4.0), Levels(17))
    x = torch.randint(17, SHAPE)
    t = torch.zeros(2, dtype=torch.float64)
    z = process.marginal(process.embed(x), t).sample()
    output = torch.randn(*SHAPE, 17, dtype=torch.float64)
    prediction = LevelLogits(Levels(17).values)(output, z, t, process)
    cost = -decoder(prediction, z, t, process).log_prob(x)
    assert (cost >= 0).all() and (cost < 1e-12).all()


def test_level_head_refuses_other_predictions():
    """A network that predicts a point gives no probabilities of levels."""
    process, _, z = noisy(17)
    with pytest.raises(TypeError, match="LevelLogits"):
        LevelDecoder()(Prediction(z), z, T1, process)
    assert isinstance(
        LevelLogits(Levels(17).values)(z[..., None].expand(*SHAPE, 17), z, T1, process),
        LevelPrediction,
    )
