"""log P(x) = ELBO + KL on one number: against closed forms, and as a probability."""

import math

import pytest
import torch
from support.closed_forms import chain, condition, normal_kl, normal_log_prob

import nelbo
from nelbo._utils.numerics import seeded
from nelbo.diffusion.gaussian import Affine
from nelbo.diffusion.parametrization import Mean
from nelbo.diffusion.times import elbo
from nelbo.evaluation import toy as toys
from nelbo.evaluation.toy import ideal_f, toy
from nelbo.integrations import wrap

BETAS = [0.3, 0.1, 0.6, 0.45]
SLOPE, OFFSET = [0.8, 1.1, 0.5, 0.9], [0.2, -0.4, 0.3, 0.1]
DATA = [-1.2, -0.8, 1.5]
X = torch.tensor([-2.0, 0.3, 1.4], dtype=torch.float64)


def linear(z, t):
    return SLOPE[t - 1] * z + OFFSET[t - 1]


def tilde():
    """β̃_t, with β_1 in place of β̃_1 = 0, which is the variance of P(x|z_1)."""
    alphas = torch.cumprod(1 - torch.tensor(BETAS, dtype=torch.float64), 0)
    before = torch.cat([torch.ones(1), alphas[:-1]])
    found = torch.tensor(BETAS) * (1 - before) / (1 - alphas)
    found[0] = BETAS[0]
    return found.tolist()


def scalar(*v):
    return tuple(torch.tensor([[float(u)]], dtype=torch.float64) for u in v)


def closed_form(x, variance):
    """log P(x) and KL[ q(z_1..z_T|x) ‖ P(z_1..z_T|x) ] of the linear f, as joint Gaussians."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64)
    steps = [
        (
            scalar(SLOPE[i])[0],
            torch.tensor([OFFSET[i]], dtype=torch.float64),
            scalar(variance[i])[0],
        )
        for i in reversed(range(len(BETAS)))
    ]
    mean, cov = chain(zero, one, steps)  # of z_T, .., z_1, x
    given, latents = slice(len(BETAS), None), slice(0, len(BETAS))
    gain, offset, posterior = condition(mean, cov, given, latents)
    offset = mean[latents] - gain @ mean[given]
    log_p = normal_log_prob(x[None], mean[given], cov[given, given])
    q_steps = [(scalar((1 - b) ** 0.5)[0], zero, scalar(b)[0]) for b in BETAS]
    q_mean, q_cov = chain(x[None], 1e-300 * one, q_steps)  # of x, z_1, .., z_T
    q_mean, q_cov = q_mean[1:].flip(0), q_cov[1:, 1:].flip(0, 1)
    return log_p, normal_kl(q_mean, q_cov, gain @ x[None] + offset, posterior)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_a_linear_f_in_closed_form(variance):
    made = toy(BETAS, linear, variance=variance)
    at, kl = made.bound(X), made.kl(X)
    assert at.error < 1e-4
    for b, x in enumerate(X):
        log_p, gap = closed_form(x, BETAS if variance == "beta" else tilde())
        assert at.log_p[b].item() == pytest.approx(log_p.item(), abs=1e-6)
        assert kl[b].item() == pytest.approx(gap.item(), abs=1e-6)
        assert at.elbo[b].item() == pytest.approx((log_p - gap).item(), abs=1e-6)
    torch.testing.assert_close(made.log_prob(X), at.log_p, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
@pytest.mark.parametrize("betas", [[0.4], [0.1, 0.5, 0.8]], ids=["T=1", "T=3"])
def test_the_gap_of_any_f_is_the_kl(betas, variance):
    """The two sides are computed from different densities; a gap is never below zero."""
    for f in (ideal_f(DATA, betas), lambda z, t: (3 * z).sin() + 0.1 * t * z):
        made = toy(betas, f, variance=variance)
        at, kl = made.bound(DATA), made.kl(DATA)
        torch.testing.assert_close(at.gap, kl, rtol=0, atol=1e-4)
        assert (kl > 0.01).all() and at.diffusion.shape == (3, len(betas) - 1)


@pytest.mark.parametrize("predicts", toys.PREDICTS)
def test_p_is_a_density_and_the_bound_below_it(predicts):
    """∫ P(x) dx = 1 and ∫ exp(ELBO(x)) dx <= 1, whatever f means."""
    made = toy([0.2, 0.7], lambda z, t: (2 * z).tanh() / t, predicts=predicts)
    x = torch.linspace(-9, 9, 91, dtype=torch.float64)
    at = made.bound(x)
    assert (0.2 * at.log_p.exp().sum()).item() == pytest.approx(1, abs=1e-4)
    assert 0.1 < 0.2 * at.elbo.exp().sum() < 0.999
    assert (at.gap >= 0).all()


def test_the_ideal_f_has_the_least_cost():
    best = toy(BETAS, ideal_f(DATA, BETAS)).bound(DATA).elbo.mean()
    for wrong in (lambda z, t: 0.05, lambda z, t: 0.05 * z, lambda z, t: 0.05 * t):
        f = ideal_f(DATA, BETAS)
        other = toy(BETAS, lambda z, t, f=f, wrong=wrong: f(z, t) + wrong(z, t))
        assert other.bound(DATA).elbo.mean() < best - 1e-4


@pytest.mark.filterwarnings("ignore:the schedule ends with signal left")
def test_its_model_is_one_for_the_library():
    """The mean of draws of `nelbo.elbo` is the bound, and `wrap` says the same model."""
    made = toy(BETAS, linear)
    model, x = made.model, X.repeat(4000)[:, None]
    with seeded(3), torch.no_grad():
        drawn = elbo(model, x, made.times)

    class Network(torch.nn.Module):
        def forward(self, z, i):  # i = 0..T-1
            f = torch.stack([linear(z[:, 0], t) for t in range(1, 5)])
            return f.gather(0, i[None].long())[0][:, None]

    same = wrap(
        Network(),
        (1,),
        predicts=Mean(4),
        betas=BETAS,
        variance="large",
        scaling=Affine(0.0, 1.0),
        decoder=model.decoder,
    )
    with seeded(3), torch.no_grad():
        torch.testing.assert_close(elbo(same, x, made.times).elbo, drawn.elbo)
    mean = drawn.elbo.reshape(4000, 3).mean(0)
    error = drawn.elbo.reshape(4000, 3).std(0) / 4000**0.5
    assert ((mean - made.bound(X).elbo).abs() < 4 * error + 1e-6).all()
    assert nelbo.ancestral(model, 5, made.times, seed=0).shape == (5, 1)


def test_what_is_not_settled_is_refused():
    made = toy([0.4], lambda z, t: 3 * (z > 0.1).double())
    with pytest.raises(ValueError, match=r"has not settled: .* differ by \S+ nats"):
        made.bound([0.5])
    error = toy([0.4], made.model.network.f, tolerance=0.1).bound([0.5]).error
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"betas": [0.5, 1.5]}, r"betas must be one row of numbers in \(0, 1\)"),
        ({"f": 3}, "f must be a function; got 3"),
        ({"f": lambda z, t: z[:2]}, "one number for each of z"),
        ({"f": lambda z, t: z / 0}, "must be finite"),
        ({"variance": "large"}, "variance must be one of beta, beta_tilde; got 'large'"),
        ({"predicts": "score"}, "predicts must be one of mean"),
    ],
)
def test_wrong_arguments_are_one_sentence(change, said):
    with pytest.raises(ValueError, match=said):
        toy(**{"betas": BETAS, "f": linear, **change}).bound(X)


def test_x_must_be_numbers():
    with pytest.raises(ValueError, match="x must be finite numbers"):
        toy(BETAS, linear).bound([math.nan])
