"""Orders of unmasking of models so small that all their texts are enumerated."""

import itertools
import math

import pytest
import torch
from support.known_models import K, gaussian, symbols
from support.tokens import CASES, MASK, PAD, Tiny, V, every_text
from torch import nn

import nelbo
from nelbo._utils.numerics import seeded
from nelbo.diffusion.decoder import Categorical
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.parametrization import SymbolLogits
from nelbo.diffusion.reverse import Posterior
from nelbo.diffusion.schedules import Linear
from nelbo.diffusion.unmasking import SURENESS, UnmaskingOrder
from nelbo.evaluation.unmasking_order import evaluate_order, log_prob
from nelbo.integrations import wrap_tokens
from nelbo.sampling.unmasking import in_order

ORDERS = [UnmaskingOrder(name, k) for name in SURENESS for k in (1, 2)]


@pytest.fixture
def module():
    with seeded(4):
        return Tiny().double()


def by_hand(module, text, order, shown=(), shift=0, never=(MASK,), clock=None, block=99):
    """log P of a text, from the module's own logits, one step after another, block after block."""
    scored = [i for i in range(len(text)) if i not in shown]
    hidden, total = set(scored), 0.0
    while hidden:
        now = min(hidden) // block
        end = (now + 1) * block
        ids = torch.tensor([[MASK if i in hidden else k for i, k in enumerate(text[:end])]])
        inside = [i for i in scored if i // block == now]
        share = torch.tensor([len(hidden & {*inside}) / len(inside)], dtype=torch.float64)
        logits = module(ids, *(() if clock is None else (clock(share),)))[0].detach().clone()
        logits[:, list(never)] = -torch.inf
        here = [i for i in inside if i in hidden]
        p = {i: logits[max(i - shift, 0)].softmax(-1).tolist() for i in here}
        key = {
            "left-to-right": lambda p: 0.0,
            "greedy": lambda p: -max(p),
            "margin": lambda p: sorted(p)[-2] - sorted(p)[-1],
            "entropy": lambda p: -sum(v * math.log(v) for v in p if v),
        }[order.name]
        chosen = sorted(here, key=lambda i: (key(p[i]), i))[: order.tokens_per_step]
        total += sum(math.log(p[i][text[i]]) for i in chosen)
        hidden -= set(chosen)
    return total


@pytest.mark.parametrize("name", CASES)
def test_probabilities_sum_to_one_and_are_those_of_the_steps(module, name):
    """Σ_x P(x) = 1 for each order, k = 1 and 2; P(x) by hand from the module's own logits."""
    model, batch, texts, given = every_text(module, name)
    for order in ORDERS:
        with measuring(model, batch):
            found = log_prob(model, batch, order)
        assert abs(found.exp().sum().item() - 1) < 1e-12
        for i in range(0, len(texts), 31):
            assert abs(found[i].item() - by_hand(module, texts[i], order, **given)) < 1e-9
    assert len({round(log_prob(model, batch, order)[7].item(), 6) for order in ORDERS}) > 2


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("name", ["plain", "padding", "shift", "sigma", "prompt"])
def test_orders_within_blocks(module, name, block):
    """Block diffusion: the same, block after block; each call sees the text up to its block."""
    model, batch, texts, given = every_text(module, name, block=block)
    for order in ORDERS:
        with measuring(model, batch):
            found = log_prob(model, batch, order)
        assert abs(found.exp().sum().item() - 1) < 1e-12
        for i in range(0, len(texts), 31):
            wanted = by_hand(module, texts[i], order, **given, block=block)
            assert abs(found[i].item() - wanted) < 1e-9
    whole, _, _, _ = every_text(module, name)
    with measuring(whole, batch):
        apart = (log_prob(whole, batch, order) - found).abs().max()
    assert apart > 1e-3 if block < len(texts[0]) else apart == 0


class OfClass(nn.Module):
    """Two symbols from both places, the mask and a class."""

    def __init__(self):
        super().__init__()
        self.of = nn.Linear(2 * (K + 1) + 1, 2 * K).double()

    def forward(self, features, level, condition):
        return self.of(torch.cat([features.flatten(1), condition], 1)).reshape(-1, 2, K)


def test_a_class_hides_nothing():
    """A condition that is no token, such as a class, and a schedule that ends with symbols."""
    with seeded(5):
        network = OfClass()
    parts = MaskedDiffusion(Linear(-4.0, 1.0), K), SymbolLogits(K), Posterior(), Categorical()
    model = Model(network, *parts, (2,), conditioned_on="class")
    every = torch.tensor(list(itertools.product(range(K), repeat=2)))
    both = torch.cat([torch.full((len(every), 1), c).double() for c in (-1.0, 2.0)])
    batch = nelbo.Batch(every.repeat(2, 1), both)
    for order in ORDERS:
        with measuring(model, batch):
            found = log_prob(model, batch, order).exp().reshape(2, -1)
        torch.testing.assert_close(found.sum(1), torch.ones(2).double(), rtol=0, atol=1e-12)
        assert (found[0] - found[1]).abs().max() > 0.01
    drawn = in_order(model, 4, ORDERS[2], condition=both[:4])
    assert drawn.shape == (4, 2) and drawn.max() < K


@pytest.mark.parametrize("block", [None, 2], ids=["whole", "blocks"])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_samples_have_the_probabilities(module, order, block):
    """Frequencies of 3000 draws of two tokens after a prompt: χ² of the cells, 4 sigma."""
    model = wrap_tokens(module, MASK, shift=1, block=block)
    with torch.no_grad():
        model.network.module.out.weight.mul_(0.3)  # so that no cell is all but empty
    pairs = list(itertools.product(range(V - 1), repeat=2))
    texts = [[a, 3, b] for a, b in pairs]
    batch = model.batch(texts, shown=torch.tensor([False, True, False]))
    with measuring(model, batch):
        p = log_prob(model, batch, order).exp()
    n = 3000
    x = in_order(model, n, order, seed=1, condition=batch.condition[:1].expand(n, -1))
    assert (x[:, 1] == 3).all()
    found = torch.bincount(x[:, 0] * (V - 1) + x[:, 2], minlength=len(p))
    some = n * p > 2
    chi = ((found - n * p).square() / (n * p))[some].sum().item()
    free = int(some.sum()) - 1
    assert free >= 15 and chi < free + 4 * math.sqrt(2 * free)


def test_one_text_or_many(module, monkeypatch):
    """Of texts of different lengths, alone and together, in one call or many; and the samples."""
    model = wrap_tokens(module, MASK, pad_id=PAD, time="masked")
    batch = model.batch([[1, 2, 3, 0, 1], [2, 2], [PAD, 3, 1, 0], [0, 1, PAD, 2, PAD]])
    for order in ORDERS[::3]:
        result = evaluate_order(model, batch, order)
        together = result.per_example
        for i in range(4):
            alone = evaluate_order(model, batch[i : i + 1], order).per_example[0]
            assert abs(alone - together[i]) < 1e-12
        steps = sum(-(-n // order.tokens_per_step) for n in (5, 2, 3, 3)) / 4
        assert result.calls_per_example == steps
        few = in_order(model, 4, order, seed=3, condition=batch.condition)
        with monkeypatch.context() as patch:
            patch.setattr(Model, "rows", property(lambda self: 3))
            assert torch.equal(evaluate_order(model, batch, order).per_example, together)
        assert (few[1, 2:] == 0).all() and few[3, 2] == PAD
        again = in_order(model, 4, order, seed=3, condition=batch.condition)
        assert torch.equal(few, again)


def test_ties_go_to_the_earlier_place():
    """Of a model without places all are equally sure: each order is that from left to right."""

    class Unigram(nn.Module):
        def forward(self, ids):
            seen = (ids == 1).sum(1)[:, None, None] * torch.arange(V)
            return (seen + torch.zeros(*ids.shape, V)).double()

    model = wrap_tokens(Unigram(), MASK)
    batch = model.batch([[1, 0, 1, 2], [1, 1, 0, 3]])
    first = evaluate_order(model, batch, UnmaskingOrder("left-to-right")).per_example
    for name in SURENESS:
        found = evaluate_order(model, batch, UnmaskingOrder(name)).per_example
        torch.testing.assert_close(found, first, rtol=1e-12, atol=1e-12)
    reversed_batch = model.batch([[2, 1, 0, 1], [3, 0, 1, 1]])
    other = evaluate_order(model, reversed_batch, UnmaskingOrder("greedy")).per_example
    assert (first - other).abs().min() > 0.01


def test_the_record():
    """Exact: only other data would change it."""
    known = symbols()
    x = known.examples(70)
    result = evaluate_order(known.model, x, UnmaskingOrder("entropy", 2), seed=5)
    error = result.standard_error
    assert error.monte_carlo == 0 and error.total == error.data > 0
    assert math.isclose(result.nats, -result.per_example.mean().item())
    assert result.calls_per_example == 1 and result.tokens_per_step == 2
    assert math.isclose(result.bits_per_dim, result.nats / 2 / math.log(2))


def test_what_is_refused(module):
    for name, why in {
        "confidence": "looks at the symbols drawn",
        "top-p": "temperature 1",
        "sideways": "no order that looks only at what shows",
    }.items():
        with pytest.raises(ValueError, match=f"one of left-to-right, .*{name}.*{why}"):
            UnmaskingOrder(name)
    with pytest.raises(ValueError, match="tokens_per_step must be at least 1; got 0"):
        UnmaskingOrder("greedy", 0)
    real = gaussian().model
    order = UnmaskingOrder("greedy")
    for refused in (
        lambda: evaluate_order(real, torch.zeros(1, 2), order),
        lambda: in_order(real, 1, order),
    ):
        with pytest.raises(ValueError, match="greedy needs a masked model; got one of GaussianD"):
            refused()
    with pytest.raises(ValueError, match="at least 1; got 0"):
        in_order(wrap_tokens(module, MASK), 0, order)
