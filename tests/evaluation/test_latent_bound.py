"""Through the autoencoder: the bound of images by a diffusion model of their latents."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from nelbo import Batch, ContinuousTime, TimeGrid
from nelbo._utils.numerics import seeded
from nelbo.diffusion.gaussian import Affine, Levels
from nelbo.diffusion.latent import LAWS, LatentModel, PixelLaw, latent_elbo
from nelbo.diffusion.schedules import Linear
from nelbo.evaluation.latent_bound import evaluate_latent
from nelbo.integrations import wrap
from nelbo.testing import DiscreteContract

pytestmark = pytest.mark.filterwarnings("ignore:the schedule ends with signal left")

D, LATENTS = 5, 3  # numbers of x and of z
SHIFT, SCALE = 0.7, 2.5  # of the latents, as the prior sees them: e = (z - SHIFT)/SCALE
T = 6
BETAS = np.linspace(0.05, 0.5, T)
ALPHAS = np.cumprod(1 - BETAS)


class Linear_(nn.Module):
    """x -> [A x + b, log s²] or z -> W z + c."""

    def __init__(self, weight, bias, log_variance=None):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.log_variance = log_variance

    def forward(self, x):
        mean = x @ self.weight.T + self.bias
        if self.log_variance is None:
            return mean
        return torch.cat([mean, self.log_variance.expand_as(mean)], 1)


@pytest.fixture(scope="module")
def linear():
    """A linear autoencoder of real numbers with the exact posterior, and its exact prior."""
    with seeded(0):
        w, c = torch.randn(D, LATENTS).double(), torch.randn(D).double()
    sd = 0.4
    # z = SHIFT + SCALE e, e ~ N(0, 1); x = W z + c + sd ε
    precision = torch.eye(LATENTS) / SCALE**2 + w.T @ w / sd**2
    covariance = precision.inverse()
    gain = covariance @ w.T / sd**2
    offset = covariance @ (SHIFT / SCALE**2 * torch.ones(LATENTS).double()) - gain @ c
    # a q of independent dimensions, wider and off: any q is a bound
    log_variance = covariance.diagonal().log() + 0.3
    encoder, decoder = Linear_(gain, offset + 0.05, log_variance), Linear_(w, c)
    return encoder, decoder, PixelLaw(Affine(), scale=sd), sd


def prior(share=0.9, schedule=None):
    """A linear denoiser of N(0, 1): the exact one times `share`, and the prior of it."""

    def denoiser(y, time):
        alpha = torch.tensor(ALPHAS)[time.long()] if schedule is None else (-time).sigmoid()
        return share * alpha.sqrt()[:, None] * y

    if schedule is None:
        return wrap(
            denoiser, (LATENTS,), predicts="data", betas=BETAS, scaling=Affine(SHIFT, SCALE)
        )
    return wrap(
        denoiser,
        (LATENTS,),
        predicts="data",
        schedule=schedule,
        times=lambda gamma: gamma,
        scaling=Affine(SHIFT, SCALE),
    )


def in_closed_form(linear, x, share):
    """Each term for each x by the moments of Gaussians, from the equations alone."""
    encoder, decoder, _, sd = linear
    with torch.no_grad():
        m, log_v = encoder(x).chunk(2, 1)
        gap = x - decoder(m)
        w = decoder.weight
    v = log_v.exp()
    spread = (v * w.square().sum(0)).sum(1)
    decoded = (gap.square().sum(1) + spread) / (2 * sd**2) + D * math.log(
        sd * math.sqrt(2 * math.pi)
    )
    entropy = 0.5 * (log_v + math.log(2 * math.pi * math.e)).sum(1)
    square = ((m - SHIFT) ** 2 + v).sum(1) / SCALE**2  # E‖e‖²
    last = ALPHAS[-1]
    prior_ = 0.5 * (last * square - LATENTS * (last + math.log(1 - last)))

    def missed(alpha):  # E‖e - c z_t‖², c = share √α
        return (1 - share * alpha) ** 2 * square + LATENTS * share**2 * alpha * (1 - alpha)

    beta = 1 - ALPHAS[1:] / ALPHAS[:-1]
    tilde = beta * (1 - ALPHAS[:-1]) / (1 - ALPHAS[1:])
    first = missed(ALPHAS[0]) / (2 * tilde[0]) + LATENTS * math.log(
        SCALE * math.sqrt(2 * math.pi * tilde[0])
    )
    snr = ALPHAS / (1 - ALPHAS)
    diffusion = sum(0.5 * (snr[t - 1] - snr[t]) * missed(ALPHAS[t]) for t in range(1, T))
    return torch.stack([decoded, -entropy, prior_, first, diffusion])


def test_a_linear_model_in_closed_form(linear):
    """Each of the five terms, its mean over draws and the stated error of their sum."""
    share = 0.9
    model = LatentModel(*linear[:3], prior(share), (D,))
    with seeded(3):
        x = 2 * torch.randn(4, D).double()
    want = in_closed_form(linear, x, share)
    many = x.repeat_interleave(3000, 0)
    with seeded(4), torch.no_grad():
        found = latent_elbo(model, many, TimeGrid.uniform(T))
    for term, exact in zip(found, want, strict=True):
        each = term.reshape(4, -1)
        error = each.std(1) / math.sqrt(each.shape[1])
        assert ((each.mean(1) - exact).abs() <= 4 * error + 1e-9).all()
    result = evaluate_latent(model, x, times=TimeGrid.uniform(T), calls=40 * T, seed=1)
    assert result.unit == "nats" and result.calls_per_example == 40 * T
    assert result.decoder_calls_per_example == 40
    exact = want.sum(0).mean().item()
    assert abs(result.nats - exact) < 4 * result.standard_error.monte_carlo < 2
    assert sum(vars(result.terms).values()) == pytest.approx(result.nats)
    torch.testing.assert_close(
        -result.per_example.elbo, want.sum(0), rtol=0, atol=5 * result.per_example_error.max()
    )
    assert sum(p.value for p in result.curve) == pytest.approx(result.terms.diffusion)


def test_the_bound_is_above_and_near_the_exact_likelihood(linear):
    """log P(x) of the linear model is that of a Gaussian. The bound lies above −log P(x) by
    KL(q ‖ P(z|x)) and what the prior's own bound leaves, which is little in continuous time."""
    encoder, decoder, law, sd = linear
    schedule = Linear(-12.0, 12.0)
    model = LatentModel(encoder, decoder, law, prior(1.0, schedule), (D,))
    with seeded(3), torch.no_grad():
        x = decoder(SHIFT + SCALE * torch.randn(800, LATENTS).double())
        x = x + sd * torch.randn(800, D)
    w = decoder.weight.detach()
    mean = w @ torch.full((LATENTS,), SHIFT).double() + decoder.bias.detach()
    exact = torch.distributions.MultivariateNormal(
        mean, SCALE**2 * w @ w.T + sd**2 * torch.eye(D).double()
    ).log_prob(x)
    with torch.no_grad():
        q = model.posterior(x)
    precision = torch.eye(LATENTS).double() / SCALE**2 + w.T @ w / sd**2
    true_mean = (
        torch.full((LATENTS,), SHIFT).double() / SCALE**2 + (x - decoder.bias.detach()) @ w / sd**2
    ) @ precision.inverse()
    true = torch.distributions.MultivariateNormal(true_mean, precision_matrix=precision)
    own = torch.distributions.MultivariateNormal(
        q.base_dist.loc, torch.diag_embed(q.base_dist.scale.square())
    )
    gap = torch.distributions.kl_divergence(own, true).mean().item()
    found = evaluate_latent(model, x, times=ContinuousTime(), calls=200)
    above = found.nats + exact.mean().item() - gap
    assert (
        -3 * found.standard_error.monte_carlo
        < above
        < 0.1 + 3 * (found.standard_error.monte_carlo)
    )
    assert found.standard_error.monte_carlo < 0.1


class TestLaws(DiscreteContract):
    """P(x|z) sums to one for each law."""

    levels = 7

    @pytest.fixture(params=LAWS)
    def distribution(self, request):
        law = PixelLaw(Levels(7), request.param, torch.tensor([0.05, 0.3, 4.0]))
        with seeded(2):
            return law(1.3 * torch.randn(2, 3, 4, 5).double())


SMALL, LEVELS = (1, 2, 1), 3  # a picture of 2x1 with 3 levels


def every_picture():
    return torch.tensor(list(itertools.product(range(LEVELS), repeat=2))).reshape(-1, *SMALL)


def sums(model, times, draws, dropped=None):
    """Σ_x exp(ELBO(x)) over all pictures, with one term left out if named; its standard error."""
    x = every_picture().repeat_interleave(draws, 0)
    with seeded(6), torch.no_grad():
        found = latent_elbo(model, x, times)
    if dropped is not None:
        found = found._replace(**{dropped: torch.zeros(len(x)).double()})
    each = found.elbo.reshape(-1, draws)
    mass = each.mean(1).exp()
    error = (mass.square() * each.var(1) / draws).sum().sqrt()
    return mass.sum().item(), error.item()


class Affine_(nn.Module):
    """A 1x1 network of a picture."""

    def __init__(self, weight, log_variance=None):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight).double())
        self.log_variance = log_variance

    def forward(self, e):
        mean = self.weight * e
        if self.log_variance is None:
            return mean
        return torch.cat([mean, torch.full_like(mean, self.log_variance)], 1)


@pytest.mark.parametrize("law", LAWS)
def test_all_pictures_of_a_tiny_model_have_at_most_probability_one(law):
    """By enumeration, for a model that nobody trained."""
    exact = wrap(
        lambda y, time: torch.tensor(ALPHAS)[time.long()].sqrt().reshape(-1, 1, 1, 1) * y,
        SMALL,
        predicts="data",
        betas=BETAS,
        scaling=Affine(SHIFT, SCALE),
    )
    model = LatentModel(
        Affine_(2.0, math.log(0.4)), Affine_(0.45), PixelLaw(Levels(3), law, 0.3), exact, SMALL
    )
    total, error = sums(model, TimeGrid.uniform(T), 2000)
    assert 0.1 < total <= 1 and error < 0.01


def test_a_law_is_fitted_to_other_images():
    """The scale and the law that made the images are found again, also for each channel."""
    shape = (2, 6, 7)
    model = LatentModel(
        Affine_(1.0, -20.0),
        Affine_(1.0),
        PixelLaw(Levels(64)),
        wrap(lambda y, time: 0 * y, shape, betas=BETAS, scaling=Affine()),
        shape,
    )
    with seeded(8):
        clean = torch.rand(40, *shape).double() - 0.5
        made = PixelLaw(Levels(64), "laplace", torch.tensor([0.05, 0.2]))
        # an autoencoder that gives back what is in its latents, and here these are the clean ones
        model.posterior = lambda x: torch.distributions.Independent(
            torch.distributions.Normal(clean[: len(x)], 1e-9), 3
        )
        x = made(clean).sample()
    model.fit_law(x, channels=True)
    assert model.law.law == "laplace"
    found = model.law.log_scale.exp().tolist()
    assert found == pytest.approx([0.05, 0.2], rel=0.1)
    assert "laplace of scale 0.0" in str(model.law) and "for each channel" in str(model.law)
    model.fit_law(x, "gaussian")
    assert model.law.law == "gaussian" and model.law.log_scale.numel() == 1
    with pytest.raises(ValueError, match="one of gaussian, logistic, laplace; got 'cauchy'"):
        PixelLaw(Levels(64), "cauchy")


def test_what_is_not_of_the_model_is_refused():
    exact = wrap(lambda y, time: 0 * y, SMALL, betas=BETAS, scaling=Affine())
    parts = (Affine_(2.0, 0.0), Affine_(0.5), PixelLaw(Levels(3)))
    model = LatentModel(*parts, exact, SMALL)
    times = TimeGrid.uniform(T)
    for x, words in (
        (torch.zeros(2, 1, 2, 2).long(), r"examples \(1, 2, 1\); got \(1, 2, 2\)"),
        (torch.full((2, *SMALL), 3), "integers 0..2"),
        (torch.zeros(2, *SMALL), "integers 0..2"),
        (Batch(torch.zeros(2, *SMALL).long(), torch.zeros(2, 1)), "one of P"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate_latent(model, x, times=times)
    with pytest.raises(ValueError, match="calls must be at least 4"):
        evaluate_latent(model, every_picture(), times=times, calls=3)
    with pytest.raises(ValueError, match="must be a density"):
        LatentModel(*parts, wrap(lambda y, t: 0 * y, SMALL, betas=BETAS), SMALL)
