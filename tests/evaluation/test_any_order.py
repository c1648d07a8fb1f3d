"""The random order of models so small that all orders and all texts are enumerated."""

import itertools
import math

import pytest
import torch
from integrations.test_tokens import enumerated
from support.tokens import CASES, MASK, PAD, Tiny, every_text

from nelbo._utils.numerics import seeded
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.unmasking import UnmaskingOrder
from nelbo.evaluation.unmasking_order import evaluate_order, log_prob
from nelbo.integrations import wrap_tokens
from nelbo.sampling.unmasking import in_order

RANDOM = UnmaskingOrder("random")


@pytest.fixture
def module():
    with seeded(4):
        return Tiny().double()


def by_orders(module, text, shown=(), shift=0, never=(MASK,), clock=None):
    """log of the mean over all orders of the product of the module's own probabilities."""
    scored = [i for i in range(len(text)) if i not in shown]
    every = []
    for order in itertools.permutations(scored):
        total = 0.0
        for j, i in enumerate(order):
            ids = torch.tensor([[MASK if k in order[j:] else v for k, v in enumerate(text)]])
            share = torch.tensor([1 - j / len(scored)], dtype=torch.float64)
            logits = module(ids, *(() if clock is None else (clock(share),)))[0].detach().clone()
            logits[:, list(never)] = -torch.inf
            total += logits[max(i - shift, 0)].log_softmax(-1)[text[i]].item()
        every.append(total)
    return torch.tensor(every, dtype=torch.float64).logsumexp(0).item() - math.log(len(every))


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_mean_over_all_orders(module, name):
    """By enumeration; Σ_x P(x) = 1; and the any-order bound is below where no time is told."""
    model, batch, texts, given = every_text(module, name)
    with measuring(model, batch):
        found = log_prob(model, batch, RANDOM)
    assert abs(found.exp().sum().item() - 1) < 1e-12
    for i in range(0, len(texts), 25):
        assert abs(found[i].item() - by_orders(module, texts[i], **given)) < 1e-9
        if "clock" not in given:
            bound = -enumerated(module, texts[i], **given)
            assert bound < found[i] - 1e-6


def test_its_price_and_its_limit(module, monkeypatch):
    """2^L - 1 calls of a text of L symbols, by few rows or many; 17 symbols are too many."""
    model = wrap_tokens(module, MASK, pad_id=PAD)
    batch = model.batch([[1, 2, 3, 0, 1], [2, 2]])
    whole = evaluate_order(model, batch, RANDOM)
    assert whole.calls_per_example == (31 + 3) / 2 and whole.standard_error.monte_carlo == 0
    monkeypatch.setattr(Model, "rows", property(lambda self: 7))
    some = evaluate_order(model, batch, RANDOM).per_example
    torch.testing.assert_close(some, whole.per_example, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"2\^L network calls .* at most 16 are allowed; got 17"):
        evaluate_order(model, model.batch([[1] * 17]), RANDOM)
    with pytest.raises(ValueError, match=r"random shows one symbol at a time; got .* 2"):
        UnmaskingOrder("random", 2)
    with pytest.raises(ValueError, match="the ancestral sampler draws in random order"):
        in_order(model, 2, RANDOM, condition=batch.condition)
