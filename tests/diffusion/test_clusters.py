"""A mixture's law of one dimension given the others, against joint normals conditioned by hand."""

import pytest
import torch
from sklearn.mixture import GaussianMixture
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from nelbo._utils.numerics import seeded
from nelbo.diffusion import gaussian_mixture
from nelbo.diffusion.gaussian_mixture import GaussianMixtureEnsemble, Mixture, Principal

EYE = torch.eye(5, dtype=torch.float64)
ALPHA = torch.tensor([0.1, 0.5, 0.9, 0.99], dtype=torch.float64)


@pytest.fixture
def data():
    with seeded(0):
        turn = torch.randn(3, 5, 5, dtype=torch.float64)
        noise = torch.randn(3, 60, 5, dtype=torch.float64)
        return (noise @ turn / 2 + 2 * torch.randn(3, 1, 5, dtype=torch.float64)).flatten(0, 1)


@pytest.fixture(params=[5, 2], ids=["all components", "two"])
def fitted(data, request, monkeypatch):
    monkeypatch.setattr(gaussian_mixture, "RANK", request.param)
    return Mixture(Principal(data), 3)


def covariances(fitted):
    """S_c, shape (C, D, D)."""
    across = fitted.vectors @ fitted.vectors.mT
    along = fitted.vectors @ fitted.variance.diag_embed() @ fitted.vectors.mT
    return along + fitted.beyond * (EYE - across)


def given_others(fitted, z, alpha, i):
    """log p(c, z without i), mean and variance of e_i for each c, by conditioning."""
    rest = [j for j in range(5) if j != i]
    found = []
    for c, s in enumerate(covariances(fitted)):
        joint = alpha * s + (1 - alpha) * EYE
        mean = alpha.sqrt() * fitted.mean[c]
        others = MultivariateNormal(mean[rest], joint[rest][:, rest])
        gain = alpha.sqrt() * s[i, rest] @ torch.linalg.inv(joint[rest][:, rest])
        found.append(
            (
                fitted.log_weight[c] + others.log_prob(z[rest]),
                fitted.mean[c, i] + gain @ (z[rest] - mean[rest]),
                s[i, i] - gain @ s[rest, i] * alpha.sqrt(),
            )
        )
    return (torch.stack(part) for part in zip(*found, strict=True))


def test_odds_are_bayes_rule(fitted, data):
    values = torch.linspace(-1, 1, 7, dtype=torch.float64)
    with seeded(1):
        z = ALPHA.sqrt()[:, None] * data[:4] + torch.randn(4, 5, dtype=torch.float64)
    odds = fitted.odds(z, ALPHA, values)
    for b in range(4):
        for i in range(5):
            log_w, mean, variance = given_others(fitted, z[b], ALPHA[b], i)
            told = Normal(mean, variance.sqrt()).log_prob(values[:, None]) + log_w.log_softmax(0)
            spread = covariances(fitted)[:, i, i].sqrt()
            alone = Normal(fitted.mean[:, i], spread).log_prob(values[:, None]) + fitted.log_weight
            expected = told.logsumexp(1) - alone.logsumexp(1)
            torch.testing.assert_close(odds[b, i], expected, rtol=1e-8, atol=1e-8)


def test_a_dimension_s_own_noise_tells_nothing_of_it(fitted, data):
    values = torch.linspace(-1, 1, 7, dtype=torch.float64)
    z = data[:4].clone()
    before = fitted.odds(z, ALPHA, values)
    z[:, 2] += 3.0
    after = fitted.odds(z, ALPHA, values)
    torch.testing.assert_close(after[:, 2], before[:, 2], rtol=1e-9, atol=1e-9)
    assert (after[:, 3] - before[:, 3]).abs().max() > 0.1


def test_features_are_log_densities(fitted, data):
    found = fitted.features(data[:4])
    for k, gamma in enumerate(gaussian_mixture.NOISES):
        alpha = torch.tensor(-gamma, dtype=torch.float64).sigmoid()
        joint = alpha * covariances(fitted) + (1 - alpha) * EYE
        each = MultivariateNormal(alpha.sqrt() * fitted.mean, joint)
        z = alpha.sqrt() * data[:4]
        log_p = (each.log_prob(z[:, None]) + fitted.log_weight).logsumexp(1)
        torch.testing.assert_close(found[:, 2 * k], -log_p)
        for b in range(4):
            total = 0.0
            for i in range(5):
                log_w, mean, variance = given_others(fitted, z[b], alpha, i)
                one = Normal(mean, variance.sqrt()).log_prob(data[b, i]) + log_w.log_softmax(0)
                total -= one.logsumexp(0).item()
            constant = 5 / 2 * 1.8378770664093453
            assert found[b, 2 * k + 1].item() == pytest.approx(total - constant, rel=1e-6)


def test_the_mixtures_are_of_the_data(data, monkeypatch):
    """No more than a component for each 32 examples, and their mean is that of the data."""
    monkeypatch.setattr(gaussian_mixture, "SIZES", (1, 4, 10))
    mixtures = GaussianMixtureEnsemble(data).mixtures
    assert [len(mixture.log_weight) for mixture in mixtures] == [1, 4, 180 // 32]
    for mixture in mixtures:
        total = (mixture.log_weight.exp()[:, None] * mixture.mean).sum(0)
        torch.testing.assert_close(total, data.mean(0), rtol=0, atol=0.02)


@pytest.mark.parametrize("components", [1, 3, 5])
def test_the_fit_is_as_good_as_that_of_scikit_learn(data, components):
    """In nats per example; and repeating rows, of which a component has none, are no error."""
    floor = 0.05 * data.var(0).mean().item()
    other = GaussianMixture(components, reg_covar=floor, random_state=0).fit(data.numpy())
    log_w, mean, covariance = gaussian_mixture._fit_components(data, components, floor)
    found = MixtureSameFamily(Categorical(logits=log_w), MultivariateNormal(mean, covariance))
    assert found.log_prob(data).mean().item() > other.score(data.numpy()) - 0.02
    same = gaussian_mixture._fit_components(torch.ones(40, 2).double(), components, 0.1)
    assert all(part.isfinite().all() for part in same)


def test_what_they_say_is_the_mean(data):
    found, values = GaussianMixtureEnsemble(data), torch.linspace(-1, 1, 7, dtype=torch.float64)
    count = len(found.mixtures)
    odds = sum(mixture.odds(data[:4], ALPHA, values) for mixture in found.mixtures) / count
    torch.testing.assert_close(found.odds(data[:4], ALPHA, values), odds)
    features = sum(mixture.features(data[:4]) for mixture in found.mixtures) / count
    torch.testing.assert_close(found.features(data[:4]), features)
