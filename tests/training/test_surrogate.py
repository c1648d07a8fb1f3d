"""A surrogate learns the texts, and then the model's costs, if it may call it."""

import pytest
import torch
from torch import nn

import nelbo
from nelbo._utils.numerics import seeded
from nelbo.diffusion.model import counting, measuring
from nelbo.evaluation.mask_estimator import MaskEstimator
from nelbo.evaluation.mask_sampling import Texts
from nelbo.integrations import wrap_tokens
from nelbo.training import surrogate as training
from nelbo.training.surrogate import train_surrogate

V, MASK, PAD = 6, 5, 4


class Neighbours(nn.Module):
    """A module whose logits depend on the two neighbours, other than texts do."""

    def __init__(self):
        super().__init__()
        with seeded(5):
            self.table = nn.Parameter(2 * torch.randn(2, V, V))

    def forward(self, ids):
        before, after = ids.roll(1, 1), ids.roll(-1, 1)
        return self.table[0][before] + self.table[1][after]


@pytest.fixture(scope="module")
def texts():
    """Texts in which each id tells the next."""
    with seeded(6):
        start, step = torch.randint(4, (300, 1)), torch.randint(1, 3, (300, 1))
    return (start + step * torch.arange(8)) % 4


@pytest.fixture
def few(monkeypatch):
    """Steps of few texts, at the rate that suits few of them."""
    monkeypatch.setattr(training, "BATCH", 16)
    monkeypatch.setattr(training, "RATE", 3e-2)


@pytest.mark.parametrize("block", [None, 4])
def test_it_learns_the_texts_without_a_call(texts, few, block):
    """Its bound comes close to the texts' 3 bits of 8 ids; and it calls the model in no step."""
    model = wrap_tokens(Neighbours(), MASK, pad_id=PAD, block=block)
    with counting(model.network) as made:
        found = train_surrogate(model, texts[:200], steps=60)
    assert made.forward == 0
    before = nelbo.evaluate(train_surrogate(model, texts, steps=0), texts[200:240], calls=16)
    after = nelbo.evaluate(found, texts[200:240], calls=16)
    assert after.bits_per_dim < 0.75 < 1.9 < before.bits_per_dim
    again = train_surrogate(model, texts[:200], steps=60)
    assert torch.equal(found.network.module.out.weight, again.network.module.out.weight)


@pytest.mark.parametrize("block", [None, 4])
def test_it_learns_the_costs(texts, few, block):
    """What is left of the model's costs is least after training on them, with padding too."""
    model = wrap_tokens(Neighbours(), MASK, pad_id=PAD, block=block)
    padded = [[*row, PAD, PAD] if i % 2 else row[:5] for i, row in enumerate(texts.tolist())]
    of_texts = train_surrogate(model, padded[:200], steps=30)
    with counting(model.network) as made:
        of_costs = train_surrogate(model, padded[:200], steps=0, calls=16 * 100, start=of_texts)
    assert made.forward == 16 * 100
    spreads = []
    for surrogate in (None, of_texts, of_costs):
        batch = model.batch(padded[200:])
        with torch.no_grad(), measuring(model):
            way = MaskEstimator(model, surrogate, Texts(model, batch), 0)
            found = way.pilot(400).coefficients(surrogate is not None, way.variates, False)
        spreads.append(found.deviations(8).sum())
    assert spreads[2] < 0.7 * spreads[0] and spreads[2] < 0.8 * spreads[1]


def test_numbers_of_steps_are_checked(texts):
    """One sentence, before work."""
    model = wrap_tokens(Neighbours(), MASK)
    with pytest.raises(ValueError, match="calls must be at least 0"):
        train_surrogate(model, texts, calls=-1)
