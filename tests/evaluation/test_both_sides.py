"""Lower and upper ends of log P(x), against P(x) by enumeration and in closed form."""

import json
import math

import numpy as np
import pytest
import torch
from evaluation.test_importance import mild
from evaluation.test_importance import symbols as symbols_and_chain
from support.tokens import MASK, PAD, Tiny

from nelbo._utils.numerics import seeded
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.reverse import Beta
from nelbo.diffusion.times import ContinuousTime, TimeGrid
from nelbo.evaluation import both_sides as sides
from nelbo.evaluation.both_sides import both_sides
from nelbo.evaluation.importance_bound import evaluate_importance
from nelbo.integrations import wrap_tokens
from nelbo.testing import assert_mean


@pytest.fixture(autouse=True)
def _seed():
    with seeded(31), torch.no_grad():
        yield


@pytest.mark.parametrize("samples", [1, 2])
def test_each_end_has_its_expectation_by_enumeration(samples, monkeypatch):
    """Given x, both ends have the means of their formulas over all paths, around log P(x); and
    what is drawn has the probabilities P(x)."""
    model, times, chain = symbols_and_chain()
    monkeypatch.setattr(sides, "BLOCK", 4000)  # blocks of 64 take time and change nothing
    found = both_sides(model, 12_000, times=times, samples=samples)
    for x in [(0, 2), (1, 1), (2, 0)]:
        p, q = (v.ravel() for v in chain.log_terms(x))
        evidence, paths = p.sum(), q > 0
        w, q, posterior = p[paths] / q[paths], q[paths], p[paths] / evidence
        if samples == 1:
            least, most = q @ np.log(w), posterior @ np.log(w)
        else:
            pairs = np.log((w[:, None] + w) / 2)
            least, most = q @ pairs @ q, posterior @ pairs @ q
        log_p = math.log(evidence)
        assert least + 0.01 < log_p < most - 0.01
        own = (found.x == torch.tensor(x)).all(1)
        assert_mean(own.double(), evidence, error=0.005)
        assert_mean(found.lower[own], least, error=0.06)
        assert_mean(found.upper[own], most, error=0.06)


def test_a_density_from_both_sides():
    """Of a linear Gaussian model, of known density: E e^lower = P(x) and E e^-upper = 1/P(x)."""
    case = mild(Beta())
    found = both_sides(case.model, 600, times=case.times, samples=3)
    log_p = torch.stack([case.log_evidence(x) for x in found.x])
    lower, upper = found.lower - log_p, found.upper - log_p
    assert_mean(lower.exp(), 1.0, error=0.06)
    assert_mean((-upper).exp(), 1.0, error=0.06)
    assert found.unit == "nats" and found.bits_per_dim is None
    assert found.gap > 4 * found.gap_error / 1.96 > 0


def test_more_paths_bring_them_together(monkeypatch):
    """Of texts with prompts and of different lengths; its calls; by few rows at a time too."""
    module = Tiny().double()
    module.out.weight.mul_(0.5)
    model = wrap_tokens(module, MASK, pad_id=PAD, time="masked")
    batch = model.batch(
        [[1, 2, 3, 0], [2, 2], [0, 1, 2]] * 20, shown=torch.tensor([True] + 3 * [False])
    )
    times, given = TimeGrid.uniform(3), batch.condition
    model.batch([[1] * 7])  # the length of other texts
    few, many = (both_sides(model, 60, times=times, samples=k, condition=given) for k in (2, 64))
    assert few.gap > many.gap > -2 * many.gap_error and many.gap < few.gap / 4
    assert many.calls_per_example == 65 * 3
    assert (many.x[:, 0] == batch.x[:, 0]).all() and (many.x[1, 2:] == 0).all()
    assert math.isclose(many.nats - many.at_least, many.gap)
    assert math.isclose(many.bits_per_dim, many.nats / 2 / math.log(2))
    plain = json.loads(json.dumps(many.to_dict(), allow_nan=False))
    assert plain["samples"] == 64 and "lower" not in plain
    assert "between" in repr(many) and "bits/token" in repr(many)
    with measuring(model):
        again = evaluate_importance(
            model, model.batch(type(batch)(many.x, given)), times=times, samples=64
        )
    error = math.hypot(again.standard_error.total, 0.01)
    assert abs(again.bits_per_dim - many.bits_per_dim) < error
    monkeypatch.setattr(Model, "rows", property(lambda self: 50))
    small = both_sides(model, 60, times=times, samples=2, condition=given)
    assert small.calls_per_example == few.calls_per_example


def test_refusals():
    model, times, _ = symbols_and_chain()
    with pytest.raises(ValueError, match="at least 1; got 0"):
        both_sides(model, 3, times=times, samples=0)
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        both_sides(model, 0, times=times, samples=1)
    with pytest.raises(ValueError, match="got ContinuousTime"):
        both_sides(model, 3, times=ContinuousTime(), samples=1)
    with pytest.raises(ValueError, match=r"P\(x\|shown tokens"):
        both_sides(wrap_tokens(Tiny(), MASK), 3, times=times, samples=1)


def test_texts_of_unequal_lengths(monkeypatch):
    """Blocks whose longest text is shorter than others; and padding belongs behind the texts."""
    model = wrap_tokens(Tiny().double(), MASK)
    monkeypatch.setattr(sides, "BLOCK", 2)
    condition = torch.full((9, 6), -2)
    condition[:, :2] = -1
    condition[4] = -1
    times = TimeGrid(model.even_times(2))
    found = both_sides(model, 9, times=times, samples=2, condition=condition)
    assert found.x.shape == (9, 6) and (found.x[:4, 2:] == 0).all()
    assert (found.lower <= 0).all() and len(found.upper) == 9
    between = torch.tensor([[-1, -2, -1, -1, -2, -2]]).expand(9, 6)
    for wrong in (condition.flip(1), between):
        with pytest.raises(ValueError, match=r"padding before a token.*model.batch\(texts\)"):
            both_sides(model, 9, times=times, samples=2, condition=wrong)
