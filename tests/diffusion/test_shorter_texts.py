"""Texts of tokens that are shorter than the model's: their bound is that of their tokens alone."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence

import nelbo
from nelbo import Batch
from nelbo._utils.numerics import seeded
from nelbo.diffusion.decoder import Categorical
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.parametrization import SymbolLogits
from nelbo.diffusion.reverse import Posterior
from nelbo.diffusion.schedules import PowerAlpha
from nelbo.diffusion.unmasking import UnmaskingOrder
from nelbo.evaluation.unmasking_order import evaluate_order, log_prob

K, LENGTH = 3, 4


class Dense(nn.Module):
    """Logits of each of four places from the codes of all of them, or from a channel for each."""

    def __init__(self, as_codes):
        super().__init__()
        self.as_codes = as_codes
        self.embed = nn.Embedding(K + 1, 4, dtype=torch.float64)
        self.out = nn.Linear(4 * LENGTH, LENGTH * K, dtype=torch.float64)

    def forward(self, features, level):
        codes = features if self.as_codes else features.view(-1, LENGTH, K + 1).argmax(2)
        h = self.embed(codes.long()).tanh().flatten(1)
        return self.out(h).reshape(-1, LENGTH, K) * 3


@pytest.fixture(params=[True, False], ids=["tokens", "characters"])
def model(request):
    with seeded(3):
        network = Dense(as_codes=request.param)
    process = MaskedDiffusion(PowerAlpha(2.0), K, as_codes=request.param, shorter=True)
    return Model(network, process, SymbolLogits(K), Posterior(), Categorical(), (LENGTH,)).eval()


def filled(texts):
    """Texts as rows of LENGTH codes, K beyond their ends."""
    return torch.tensor([[*text, *[K] * (LENGTH - len(text))] for text in texts])


def by_definition(model, text):
    """The any-order bound of a text: the mean over all sets of hidden places, all absent ones
    hidden too."""
    n = len(text)
    sets = [h for size in range(1, n + 1) for h in itertools.combinations(range(n), size)]
    rows = filled([[K if i in hidden else k for i, k in enumerate(text)] for hidden in sets])
    with torch.no_grad():
        log_p = (
            model.network(model.process.features(rows), None) + model.head.log_prior
        ).log_softmax(-1)
    return sum(
        -sum(log_p[row, i, text[i]].item() for i in hidden)
        / len(hidden)
        / math.comb(n, len(hidden))
        for row, hidden in enumerate(sets)
    )


def test_the_bound_of_a_shorter_text_is_that_of_its_tokens(model):
    """Of all texts of 1 to 4 tokens: Σ exp(ELBO) <= 1 for each length, the bound by definition;
    the estimator of masks and one of T steps agree with it."""
    for n in (1, 2, 4):
        texts = list(itertools.product(range(K), repeat=n))
        exact = torch.tensor([by_definition(model, text) for text in texts], dtype=torch.float64)
        total = (-exact).exp().sum().item()
        assert 0.2 < total <= 1 + 1e-12
        found = nelbo.evaluate(model, filled(texts), calls=64, seed=n)
        assert math.isclose(found.bits_per_dim, found.nats / n / math.log(2))
        error = found.standard_error.monte_carlo * n * math.log(2)
        assert abs(found.nats - exact.mean()) < 4 * error + 1e-9
        far = (-found.per_example.elbo - exact).abs() / found.per_example_error.clamp(min=1e-9)
        assert n == 1 or (far < 3).double().mean() > 0.8
    assert total < 0.999


def on_a_grid(model, text, s, t):
    """The cost of the step from t to s of a text, nats: the mean over all z_t, by enumeration."""
    x = filled([text])
    hidden = itertools.product([False, True], repeat=len(text))
    z = filled([[K if h else k for h, k in zip(each, text, strict=True)] for each in hidden])
    e, one = x.expand_as(z), torch.ones(len(z), dtype=torch.float64)
    with measuring(model):
        log_q = model.process.marginal(e, t * one).base_dist.log_prob(z)[:, : len(text)].sum(1)
        if s is None:
            cost = -model.likelihood(z, t * one).log_prob(e)
        else:
            q = model.process.posterior(z, e, s * one, t * one)
            cost = kl_divergence(q, model.reverse(z, s * one, t * one))
    return (log_q.exp() * cost).sum().item()


def test_a_grid_of_steps(model):
    """Its bound is the mean over all latents; that of two lengths is measured with and without
    control variates."""
    times = nelbo.TimeGrid(torch.tensor([0.5, 1.0]))
    for n in (1, 3):
        texts = list(itertools.product(range(K), repeat=n))
        exact = [on_a_grid(model, t, None, 0.5) + on_a_grid(model, t, 0.5, 1.0) for t in texts]
        total = sum(math.exp(-nats) for nats in exact)
        assert total <= 1 + 1e-12 and (n > 1 or total > 1 - 1e-12)  # one token: P(x) itself
        found = nelbo.evaluate(model, filled(texts), times=times, calls=200, variates=n == 3)
        error = found.standard_error.monte_carlo * n * math.log(2)
        assert abs(found.nats - sum(exact) / len(exact)) < 4 * error
        assert 0 < error < 0.1


def test_orders_of_a_shorter_text_sum_to_one(model):
    """P(x) of each sampler over all texts of a length, at 1 and 2 tokens a step, is 1 in all."""
    for n in (1, 3):
        x = filled(itertools.product(range(K), repeat=n))
        for order in (UnmaskingOrder("left-to-right"), UnmaskingOrder("greedy", 2)):
            with measuring(model, Batch(x)):
                assert abs(log_prob(model, Batch(x), order).exp().sum().item() - 1) < 1e-12
            calls = evaluate_order(model, x, order).calls_per_example
            assert calls == -(-n // order.tokens_per_step)
        with measuring(model, Batch(x)):
            exact = log_prob(model, Batch(x), UnmaskingOrder("random"))
        assert abs(exact.exp().sum().item() - 1) < 1e-12
        bounds = [by_definition(model, t) for t in itertools.product(range(K), repeat=n)]
        assert (-torch.tensor(bounds, dtype=torch.float64) <= exact + 1e-9).all()


@pytest.mark.parametrize("model", [True], ids=["tokens"], indirect=True)
def test_the_length_of_others_changes_nothing(model):
    """A text alone, and beside longer ones, has the same bound."""
    texts = [(0, 1), (2, 1, 0, 1), (1,), (2, 2, 1)]
    alone = nelbo.evaluate(model, filled(texts[:1]), calls=16).per_example.elbo[0]
    few = nelbo.evaluate(model, filled(texts), calls=16, per_example=True)
    assert math.isclose(few.bits_per_dim, few.nats * 4 / 10 / math.log(2))
    exact = [by_definition(model, t) for t in texts]
    error = few.per_example_error.clamp(min=1e-9)
    assert ((-few.per_example.elbo - torch.tensor(exact)).abs() < 6 * error + 1e-6).all()
    assert abs(-alone - exact[0]) < 1


def test_codes_beyond_are_refused_elsewhere(model):
    with pytest.raises(ValueError, match="row 0 of x has 4 in dimension 1"):
        nelbo.evaluate(model, torch.tensor([[0, 4, 1, 1]]))
