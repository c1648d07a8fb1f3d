"""Distributions of symbols without tables: the same numbers and draws as the tables."""

import pytest
import torch
from torch.distributions import kl_divergence

from nelbo._utils.numerics import seeded
from nelbo.diffusion import symbols as rooms
from nelbo.diffusion.decoder import Categorical
from nelbo.diffusion.distributions import Discrete, draw
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.parametrization import SymbolLogits
from nelbo.diffusion.schedules import Linear
from nelbo.diffusion.symbols import Certain, MaybeMasked, Predicted, Uniform

K, SHAPE = 7, (3, 5)
S, T = torch.tensor([[0.1, 0.4, 0.0], [0.3, 0.9, 1.0]], dtype=torch.float64)


@pytest.fixture(params=[2**21, 3 * K], ids=["at once", "in chunks"])
def parts(request, monkeypatch):
    """A process, x, z with symbols and masks, and a prediction with a log-prior."""
    monkeypatch.setattr(rooms, "AT_ONCE", request.param)
    with seeded(3):
        process, head = MaskedDiffusion(Linear(-3.0, 2.0), K), SymbolLogits(K, SHAPE[1:])
        head.log_prior.data.normal_()
        x = torch.randint(K, SHAPE)
        z = torch.where(torch.rand(SHAPE) < 0.6, process.mask, x)
        prediction = head(torch.randn(*SHAPE, K), z, T, process)
    return process, x, z, prediction


def laws(process, x, z, prediction):
    """All conditionals of the process, and the decoder."""
    e = process.embed(x)
    t = torch.full_like(T, 0.8)
    return {
        "marginal": process.marginal(e, t),
        "posterior": process.posterior(z, e, S, t),
        "transition": process.transition(z, S, t),
        "reverse": process.predicted_posterior(z, prediction, S, t),
        "prior": process.prior(SHAPE[1:], t),
        "decoder": Categorical()(prediction, z, T, process),
    }


NAMES = ["marginal", "posterior", "transition", "reverse", "prior", "decoder"]


@pytest.mark.parametrize("name", NAMES)
def test_lean_is_dense(parts, name):
    """Equation 9: probabilities and draws without a table are those of the table."""
    lean = laws(*parts)[name]
    dense = Discrete(lean.base_dist.log_probs)
    for k in range(dense.log_probs.shape[-1]):
        value = torch.full(SHAPE, k)
        torch.testing.assert_close(
            lean.base_dist.log_prob(value).double(),
            dense.log_prob(value).double(),
            rtol=1e-12,
            atol=1e-12,
        )
    total = dense.log_probs.exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    for seed in range(20):
        with seeded(seed):
            got = draw(lean)
        with seeded(seed):
            assert torch.equal(got, draw(dense))
    with seeded(0):
        many = lean.sample((4,))
    with seeded(0):
        assert torch.equal(many, dense.sample((4,)))
    assert torch.equal(lean.base_dist.mode, dense.mode)


def test_divergences_are_dense(parts):
    """Equations 5 and 9: KL without tables is that of the tables, at any times."""
    found = laws(*parts)
    for p, q in (("posterior", "reverse"), ("marginal", "prior"), ("reverse", "reverse")):
        dense = kl_divergence(*(Discrete(found[name].base_dist.log_probs) for name in (p, q)))
        got = kl_divergence(found[p], found[q])
        torch.testing.assert_close(got, dense.flatten(1).sum(1), rtol=1e-6, atol=1e-6)
        if (p, q) != ("reverse", "reverse"):
            assert (got > 0.01).all()


def test_only_hidden_places_are_normalised(parts, monkeypatch):
    """A softmax is taken once at each masked place, and at no other."""
    process, x, z, prediction = parts
    rows = []
    plain = Predicted._normalised

    def counted(self, logits, log_prior):
        rows.append(len(logits))
        return plain(self, logits, log_prior)

    monkeypatch.setattr(Predicted, "_normalised", counted)
    process.predicted_rate(z, x, prediction, T)
    assert sum(rows) == (z == process.mask).sum()
    assert max(rows) <= rooms.AT_ONCE // K


def test_many_symbols_in_float32():
    """Above 4096 symbols: float32 log-softmax, float64 sums, 1e-5 nats per token off at most."""
    count, shape = 5000, (2, 6)
    process, head = MaskedDiffusion(Linear(-3.0, 2.0), count), SymbolLogits(count)
    with seeded(1):
        output, x = 4 * torch.randn(*shape, count), torch.randint(count, shape)
    z, t = torch.full(shape, process.mask), T[:2]
    found = process.predicted_rate(z, x, head.read(output, z, t, process, torch.float64), t)
    exact = process.rate(z, x, output.double().log_softmax(-1), t)
    assert found.dtype == torch.float64 and not torch.equal(found, exact)
    assert ((found - exact).abs() / process.rate(z, x, -torch.ones(*shape, count), t)).max() > 0
    assert ((found - exact).abs() < 6e-5 * exact / exact.min()).all()


def test_sources_agree_on_their_draws():
    """The distribution function is passed at u: certain, uniform and predicted symbols."""
    u = torch.tensor([[0.0, 0.2, 0.5, 0.999999]], dtype=torch.float64)
    z = torch.full(u.shape, K)
    flat = Predicted(torch.zeros(1, 4, K), z, K)
    assert torch.equal(flat.inverse(u), Uniform(K, u.shape, u.device).inverse(u))
    assert torch.equal(Certain(z - 1, K).inverse(u), z - 1)
    never = Predicted(torch.zeros(1, 4, K), z, K, never=torch.tensor([0, K - 1]))
    assert torch.equal(never.inverse(u), torch.tensor([[1, 2, 3, K - 2]]))
    half = torch.tensor(0.5, dtype=torch.float64).log()
    with seeded(0):
        drawn = MaybeMasked(never, half, half).sample((4000,))
    assert abs((drawn == K).double().mean() - 0.5) < 0.02
