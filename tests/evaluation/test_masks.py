"""Masks with exact counts, and two levels: against enumeration of all masks of tiny texts."""

import importlib.util
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from integrations.test_token_processes import by_blocks, of_blocks
from support import known_models
from support.closed_forms import legendre_nodes
from torch import nn

import nelbo
from nelbo import Batch
from nelbo._utils.numerics import seeded
from nelbo.evaluation import mask_estimator, masks, price
from nelbo.evaluation.mask_estimator import MaskEstimator, Plan, token_costs
from nelbo.evaluation.mask_regression import NODES, fit, hats, usual
from nelbo.evaluation.mask_sampling import Texts, draw_masks
from nelbo.integrations import wrap_tokens

V, MASK = 5, 4
PROGRAM = Path(__file__).parents[2] / "benchmarks" / "evaluation" / "masks.py"
NODES_OF_TIME = list(zip(*legendre_nodes(0.0, 1.0, 20), strict=True))


class Tiny(nn.Module):
    """A module from ids to logits in which each place sees all others, and the time if told."""

    def __init__(self, size=1.0):
        super().__init__()
        self.embed, self.place = nn.Embedding(V, 6), nn.Embedding(8, 6)
        self.out = nn.Linear(12, V)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, size)

    def forward(self, ids, time=None):
        h = self.embed(ids) + self.place(torch.arange(ids.shape[1]))
        if time is not None:
            h = h + 2 * time[:, None, None].to(h)
        return self.out(torch.cat([h, h.sin().sum(1, keepdim=True).expand_as(h)], -1))


def tiny(seed, time=None, mask_id=MASK, **options):
    with seeded(seed):
        return wrap_tokens(Tiny().double(), mask_id, time=time, **options)


def exact(model, batch, row=0):
    """The bound on -log P of a text: the share u of hidden tokens by quadrature, all masks."""
    x, condition = batch.x[row], batch.condition[row]
    x, condition = x[condition != -2], condition[condition != -2]
    scored = (condition == -1).nonzero().flatten().tolist()
    sets = [s for n in range(1, len(scored) + 1) for s in itertools.combinations(scored, n)]
    hidden = torch.tensor([[i in s for i in range(len(x))] for s in sets])
    size, clock, total = hidden.sum(1), model.network.clock, 0.0
    for u, weight in NODES_OF_TIME:
        time = () if clock is None else (clock(1 - u).expand(len(sets)),)
        logits = model.network.module(torch.where(hidden, MASK, x), *time).clone()
        logits[..., MASK] = -torch.inf
        log_p = logits.log_softmax(-1).gather(-1, x.expand_as(hidden)[..., None])[..., 0]
        cost = -torch.where(hidden, log_p, 0.0).sum(1)
        total += weight * (u ** (size - 1) * (1 - u) ** (len(scored) - size) * cost).sum()
    return total.item()


CASES = {
    "plain": (None, [[3, 1, 2, 1]], None),
    "told the time": ("masked", [[3, 1, 2, 1]], None),
    "prompt": (None, [[3, 1, 2, 0]], [[True, False, True, False]]),
    "padding": (None, [[3, 1, 2, 0, 1], [2, 2, 1]], None),
}
SURROGATES = {"alone": None, "good": 1, "bad": 7}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def totals(model, surrogate, batch, plan, repeats, seed=0, coefficients=None):
    """Bounds of each text by independent estimates, (N, R · repeats)."""
    texts, found = Texts(model, batch), []
    for i in range(repeats):
        way = MaskEstimator(model, surrogate, texts, seed + i)
        own = coefficients or usual(way.variates, surrogate is not None)
        found.append(way.costs(range(len(batch)), batch, plan, own)[0].sum(-1))
    return torch.cat(found, 1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", SURROGATES)
def test_the_mean_is_that_of_all_masks(case, kind):
    """Unbiased with any surrogate and any coefficients, as both have masks of their own."""
    time, ids, shown = CASES[case]
    model, seed = tiny(4, time), SURROGATES[kind]
    surrogate = None if seed is None else tiny(seed)
    batch = model.batch(ids, None if shown is None else torch.tensor(shown))
    way = MaskEstimator(model, surrogate, Texts(model, batch), 0)
    with seeded(2):
        odd = usual(way.variates, surrogate is not None)
        odd.slopes.add_(torch.rand_like(odd.slopes))
        odd.curve.add_(torch.rand_like(odd.curve))
        odd = replace(odd, by_draws=torch.rand_like(odd.curve) + 0.5, shrink=0.5)
    plan = Plan(1500, 2, 3 if surrogate else 0)
    found = totals(model, surrogate, batch, plan, 4, coefficients=odd)
    error = found.std(1) / math.sqrt(found.shape[1])
    wanted = torch.tensor([exact(model, batch, row) for row in range(len(batch))])
    assert (error < 0.025 * wanted).all()
    assert ((found.mean(1) - wanted).abs() < 4 * error).all()


@pytest.mark.parametrize("time", [None, "sigma"], ids=["untold", "told the time"])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_blocks_have_counts_of_their_own(block, time):
    """Block diffusion: unbiased with any coefficients, of texts of different lengths of which some
    tokens show; a block without a token to score, or beyond the end of a text, has no masks."""
    model = tiny(4, time, block=block)
    shown = torch.tensor([[False, False, True, True, False]] * 2)
    batch = model.batch([[3, 1, 2, 0, 1], [2, 1]], shown)
    wanted = torch.tensor(of_blocks(model, batch, 24))
    if time is None:
        module, scored = model.network.module, [0, 1, 4]
        by_hand = by_blocks(module, [3, 1, 2, 0, 1], block, scored, never=(MASK,), mask=MASK)
        assert abs(wanted[0] - by_hand) < 1e-6 * by_hand
    with seeded(2):
        odd = usual(1, False)
        odd.slopes.add_(torch.rand_like(odd.slopes))
        odd.curve.add_(torch.rand_like(odd.curve))
        odd = replace(odd, by_draws=torch.rand_like(odd.curve) + 0.5, shrink=0.5)
    found = totals(model, None, batch, Plan(1500, 3), 4, coefficients=odd)
    error = found.std(1) / math.sqrt(found.shape[1])
    assert (error < 0.025 * wanted).all()
    assert ((found.mean(1) - wanted).abs() < 4 * error + 1e-6 * wanted).all()


def test_block_diffusion_takes_exact_counts():
    """The value and its stated error are true, and the curve over time adds up to it."""
    model, texts = tiny(4, block=3), [[3, 1, 2, 0, 1, 2], [2, 2, 1]] * 4
    batch = model.batch(texts)
    wanted = sum(of_blocks(model, batch[:2])) / 2
    found = [nelbo.evaluate(model, texts, calls=12, seed=seed) for seed in range(12)]
    errors = [r.standard_error.monte_carlo * r.nats / r.bits_per_dim for r in found]
    z = [(r.nats - wanted) / e for r, e in zip(found, errors, strict=True)]
    assert 2.2 < sum(v * v for v in z) < 33  # chi² of 12, all but 1 in 1000 on either side
    assert "masks: " in " ".join(found[0].notes)
    assert math.isclose(sum(point.value for point in found[0].curve), found[0].terms.diffusion)
    with pytest.raises(ValueError, match="this one has 3 blocks in 6 places, and the model 2"):
        nelbo.evaluate(model, texts, surrogate=tiny(4, block=2))
    with pytest.raises(ValueError, match="this one has 2 blocks in 6 places, and the model 1"):
        nelbo.evaluate(tiny(4), texts, surrogate=model)


@pytest.mark.parametrize("time", [None, "masked"])
@pytest.mark.parametrize("block", [None, 2])
def test_a_surrogate_of_block_diffusion_reads_its_masks(block, time):
    """Unbiased with any coefficients, of one block or of the model's; the model itself leaves
    nothing to correct, which needs the same tokens to show and the same time."""
    model, surrogate = tiny(4, time, block=2), tiny(1, time, block=block)
    batch = model.batch([[3, 1, 2, 0, 1], [2, 1]])
    surrogate.batch(batch)
    wanted = torch.tensor(of_blocks(model, batch, 24))
    with seeded(2):
        odd = usual(3, True)
        odd.slopes.add_(torch.rand_like(odd.slopes))
        odd = replace(odd, curve=odd.curve + torch.rand_like(odd.curve))
    found = totals(model, surrogate, batch, Plan(1500, 2, 3), 4, coefficients=odd)
    error = found.std(1) / math.sqrt(found.shape[1])
    assert (error < 0.03 * wanted).all()
    assert ((found.mean(1) - wanted).abs() < 4 * error).all()
    texts = Texts(model, batch)
    drawn = draw_masks(texts, [0, 1], (0, 1), 3, 4, usual(1, False).deviations)
    of_model, of_other = (
        torch.cat([cost for _, cost in token_costs(each, batch, drawn, texts)])
        for each in (model, tiny(4, time, block=block))
    )
    if block:
        torch.testing.assert_close(of_model, of_other)
    else:  # it reads places after the block, which are hidden, so the last block is the same
        last = (drawn.block == 2).flatten()
        torch.testing.assert_close(of_model[last], of_other[last])
    changed = Batch(torch.where(torch.arange(5) < 2, batch.x, 3), batch.condition)
    for each in (model, surrogate):  # tokens after a block are of no account
        before, after = (
            torch.cat([cost for _, cost in token_costs(each, some, drawn, texts)])
            for some in (batch, changed)
        )
        first = (drawn.block == 0).flatten()
        assert first.any() and torch.equal(before[first], after[first])


def test_what_other_draws_say_is_unbiased_and_so_is_the_error():
    """Of 800 copies of a text: three replicates of seven masks, each corrected by those before."""
    model, ids = tiny(4), [[3, 1, 2, 0, 1, 2]]
    batch = model.batch(ids * 800)
    wanted = exact(model, batch)
    estimator = MaskEstimator(model, None, Texts(model, batch), 0)
    pairs = estimator.pilot(800)
    plan, variances = Plan(3, 7), []
    for draws in (False, True):
        known = pairs.coefficients(False, 1, draws)
        assert (known.by_draws is not None) == draws
        cells, by_token, _ = estimator.costs(range(800), batch, plan, known)
        found = cells.sum(-1)
        mean = found.mean(1)
        assert abs(mean.mean() - wanted) < 4 * mean.std() / 800**0.5
        stated = (found.var(1) / 3).mean() / mean.var()
        assert abs(stated - 1) < 4 * (2 / 800 + 1 / 800) ** 0.5
        variances.append(mean.var().item())
        tokens = by_token.sum(1)
        assert abs(tokens.mean() - wanted) < 4 * tokens.std() / 800**0.5
    assert variances[1] < 0.8 * variances[0]
    odd = replace(known, curve=known.curve + 5.0, by_draws=torch.ones(len(NODES)).double())
    cells, *_ = estimator.costs(range(800), batch, Plan(2, 7), replace(odd, shrink=0.5))
    mean = cells.sum(-1).mean(1)  # those of one permutation alone would not be uniform
    assert abs(mean.mean() - wanted) < 4 * mean.std() / 800**0.5


def costs_of_tokens(model, x):
    """Each token's share of the bound, by the definition."""
    terms, places = torch.zeros(len(x), dtype=torch.float64), range(len(x))
    for size in range(1, len(x) + 1):
        for hidden in itertools.combinations(places, size):
            z = torch.tensor([[MASK if i in hidden else k for i, k in enumerate(x)]])
            logits = model.network.module(z)[0].clone()
            logits[:, MASK] = -torch.inf
            cost = -logits.log_softmax(-1)[places, x]
            for i in hidden:
                terms[i] += cost[i] / size / math.comb(len(x), size)
    return terms


def test_the_costs_of_tokens(every_text):
    """Each token's share of the bound, with an error of nominal size."""
    model, batch, _ = every_text
    x = [0, 1, 2, 3, 3, 1]
    terms = costs_of_tokens(model, x)
    found = nelbo.evaluate(model, model.batch([x] * 300), calls=32, per_example=True)
    arrays = found.to_arrays()
    mean, error = arrays["token_nats"].mean(0), arrays["token_nats"].std(0) / 300**0.5
    assert (abs(mean - terms.numpy()) < 4 * error).all() and terms.std() > 3 * error.max()
    far = abs(arrays["token_nats"] - terms.numpy()) / arrays["token_standard_error"]
    assert 0.85 < (far < 1.96).mean() < 0.99
    np.testing.assert_allclose(6 * arrays["nats_per_token"], arrays["nats"])
    np.testing.assert_allclose(6 * arrays["standard_error_per_token"], arrays["standard_error"])
    assert nelbo.evaluate(model, batch, calls=8).by_token is None
    few = nelbo.evaluate(model, [[0, 1], [2, 1, 0]], calls=8, per_example=True).by_token
    assert few.nats.isnan().tolist() == [[False, False, True], [False] * 3]


def mask_note(found):
    (note,) = [note for note in found.notes if note.startswith("masks: ")]
    return note


def test_the_masks_by_name_and_by_a_pilot():
    """The pilot chooses the least variance; a name is obeyed; the numbers differ."""
    model = tiny(4)
    texts = model.batch([[3, 1, 2, 0, 1, 2], [0, 0, 1, 3, 2, 1], [1, 2, 3, 0, 0, 0]] * 40)
    wanted = sum(exact(model, texts, i) for i in range(3)) / 3
    nats = {}
    for name in (None, "plain", "unigram", "draws"):
        found = nelbo.evaluate(model, texts, calls=32, masks=name)
        assert abs(found.nats - wanted) < 4 * found.standard_error.monte_carlo * 6 * math.log(2)
        nats[name] = found.nats
        why = "the least variance of plain, unigram, draws in a pilot" if name is None else "named"
        assert why in mask_note(found)
    assert len({nats["plain"], nats["unigram"], nats["draws"]}) == 3
    assert nats[None] in (nats["unigram"], nats["draws"])
    for name in ("draws", "unigram"):
        too_few = f"masks {name} need a pilot of 64 calls.*got 4 per text; give 171 calls"
        with pytest.raises(ValueError, match=too_few):
            nelbo.evaluate(model, texts[:3], calls=4, masks=name)
        with pytest.raises(ValueError, match=f"masks {name} are control variates.*left out"):
            nelbo.evaluate(model, texts, calls=32, masks=name, variates=False)
    without = nelbo.evaluate(model, texts, calls=32, variates=False)
    assert "masks: plain, the least variance of plain in a pilot" in mask_note(without)


def test_a_target_error_of_masks():
    """The stated error is at most the target, from about as many calls as it takes."""
    model = tiny(4)
    texts = model.batch([[3, 1, 2, 0, 1, 2], [0, 0, 1, 3, 2, 1], [1, 2, 3, 0, 0, 0]] * 40)
    wanted = sum(exact(model, texts, i) for i in range(3)) / 3
    calls = []
    for target in (0.08, 0.04):
        found = nelbo.evaluate(model, texts, target_error=target)
        assert 0.5 * target < found.standard_error.monte_carlo <= target
        assert abs(found.nats - wanted) < 4 * found.standard_error.monte_carlo * 6 * math.log(2)
        assert any(note.startswith("masks: ") for note in found.notes)
        calls.append(found.calls_per_example)
    assert 2.5 < calls[1] / calls[0] < 6
    many = model.batch([[3, 1, 2, 0, 1, 2], [0, 0, 1, 3, 2, 1]] * 300)
    sample = nelbo.evaluate(model, many, target_error=1.0, variates=True)
    assert sample.visited < 600 and sample.calls_per_example < 3


@pytest.fixture(scope="module")
def every_text():
    """All texts of four tokens, with their bounds by enumeration."""
    with torch.no_grad():
        model = tiny(4)
        batch = model.batch(torch.tensor(list(itertools.product(range(MASK), repeat=4))))
        return model, batch, torch.tensor([exact(model, batch, i) for i in range(len(batch))])


@pytest.mark.parametrize("kind", SURROGATES)
def test_bounds_sum_to_at_most_one_and_errors_are_nominal(every_text, kind, monkeypatch):
    """Equation 1: Σ_x exp(ELBO(x)) <= 1; 95 % of the bounds lie within 1.96 of their errors."""
    monkeypatch.setattr(masks, "price_of", lambda *parts: price.LEAST)
    model, batch, wanted = every_text
    assert wanted.neg().exp().sum() <= 1
    surrogate = None if kind == "alone" else tiny(SURROGATES[kind])
    ratios = []
    for seed in range(4):
        found = nelbo.evaluate(model, batch, calls=14, surrogate=surrogate, seed=seed)
        assert found.calls_per_example <= 14 and found.unit == "bits/token"
        scale = 4 * math.log(2)
        assert math.isclose(sum(c.value for c in found.curve), found.bits_per_dim)
        error = found.standard_error.monte_carlo * scale
        assert abs(found.nats - wanted.mean()) < 3.5 * error
        far = (-found.per_example.elbo - wanted) / found.per_example_error
        ratios.append((far.abs() < 1.96).double().mean().item())
        noise = (wanted.neg().exp() * found.per_example_error).norm()
        assert found.per_example.elbo.exp().sum() <= wanted.neg().exp().sum() + 4 * noise
    assert sum(ratios) / len(ratios) > 0.9


def test_the_surrogate_reduces_the_error_and_a_bad_one_is_left_out(every_text, monkeypatch):
    """The model itself as a surrogate that costs little leaves only the error of its own mean."""
    model, batch, wanted = every_text
    same, bad = tiny(4), tiny(7)
    plain = nelbo.evaluate(model, batch, calls=14)
    dear = nelbo.evaluate(model, batch, calls=14, surrogate=same)  # at the price of a call a mask
    assert "not used" in " ".join(dear.notes) and dear.nats == plain.nats
    monkeypatch.setattr(masks, "price_of", lambda *parts: 0.01)
    two = nelbo.evaluate(model, batch, calls=14, surrogate=same)
    assert two.standard_error.monte_carlo < 0.3 * plain.standard_error.monte_carlo
    assert two.nats != wanted.mean() and "of each text, at 0.01" in " ".join(two.notes)
    other = nelbo.evaluate(model, batch, calls=14, surrogate=bad)
    assert other.standard_error.monte_carlo < 1.2 * plain.standard_error.monte_carlo


def test_without_a_pilot_a_surrogate_is_used_only_where_it_is_named():
    """Nothing says then whether it helps: the numbers are those without it."""
    model, bad = tiny(4), tiny(7)
    texts = [[3, 1, 2, 0, 1, 2, 2], [0, 0, 1, 3, 3, 1, 0, 2], [1, 2, 3, 0, 0, 3, 1]] * 2
    plain = nelbo.evaluate(model, texts, calls=64)
    found = nelbo.evaluate(model, texts, calls=64, surrogate=bad)
    assert found.nats == plain.nats and mask_note(found) == "masks: plain, without a pilot"
    assert found.calls_per_example == plain.calls_per_example
    assert "too few for a pilot, which finds what it saves; give 86 calls" in " ".join(found.notes)
    some = nelbo.evaluate(model, texts, target_error=0.5, surrogate=bad)
    assert some.nats == nelbo.evaluate(model, texts, target_error=0.5).nats
    named = nelbo.evaluate(model, texts, calls=64, surrogate=bad, masks="two-levels")
    assert named.nats != plain.nats and "the surrogate read" in " ".join(named.notes)
    piloted = nelbo.evaluate(model, texts, calls=86, surrogate=bad)
    assert "in a pilot" in mask_note(piloted)


def test_a_round_of_many_masks_outweighs_one_of_few():
    """Else the few masks of the first round would decide the error for any number of others."""
    model = tiny(0)
    texts = np.random.default_rng(0).integers(0, MASK, (13, 8))
    some = nelbo.evaluate(model, texts, calls=16)
    error = some.standard_error.monte_carlo / 6
    found = nelbo.evaluate(model, texts, target_error=error)
    assert found.standard_error.monte_carlo <= error
    assert found.calls_per_example < 3 * 36 * some.calls_per_example


def test_two_calls_of_many_texts_have_an_error_and_no_pilot():
    """A pilot would leave fewer than two masks of each text, and so no error."""
    model = tiny(0)
    texts = np.random.default_rng(0).integers(0, MASK, (400, 4))
    found = nelbo.evaluate(model, texts, calls=2)
    assert mask_note(found) == "masks: plain, without a pilot" and found.calls_per_example == 2
    assert 0 < found.standard_error.monte_carlo < 0.1 * found.bits_per_dim
    assert nelbo.evaluate(model, texts[:8], calls=8).calls_per_example == 8
    with pytest.raises(ValueError, match=r"got 2 per text; give 3 calls"):
        nelbo.evaluate(model, texts, calls=2, masks="unigram")
    assert "unigram, as named" in mask_note(nelbo.evaluate(model, texts, calls=3, masks="unigram"))


def test_numbers_do_not_depend_on_the_batch(every_text, monkeypatch):
    """The masks of a text depend on the seed and on the text: not on order, task or padding."""
    monkeypatch.setattr(masks, "price_of", lambda *parts: price.LEAST)
    model, surrogate = tiny(4, pad_id=3), tiny(1, pad_id=3)
    one, other, short = [0, 1, 2, 2, 1, 0], [2, 0, 1, 1, 0, 2, 0], [1, 1]
    texts = [one, short, one, other] * 20
    found = nelbo.evaluate(model, texts, calls=32, surrogate=surrogate)
    order = np.random.default_rng(0).permutation(len(texts))
    padded = [[3, *texts[i], 3, 3] for i in order]
    monkeypatch.setattr(mask_estimator, "CALLED", 0)
    monkeypatch.setattr(mask_estimator, "FEWEST", 60)
    again = nelbo.evaluate(model, padded, calls=32, surrogate=surrogate)
    assert math.isclose(found.nats, again.nats, rel_tol=1e-12)
    each, other = found.per_example.elbo, again.per_example.elbo
    for text in (one, other, short):
        here = [i for i, t in enumerate(texts) if t == text]
        there = [i for i, j in enumerate(order) if texts[j] == text]
        torch.testing.assert_close(each[here].sort().values, other[there].sort().values)
        # equal texts have masks of their own, and the same if they are all there are
        assert (len(each[here].unique()) == 1) == (text is short)


def test_own_masked_models_take_a_surrogate(monkeypatch):
    """Against their exact bounds."""
    monkeypatch.setattr(masks, "price_of", lambda *parts: price.LEAST)
    known = known_models.text()
    x = known.examples(60)
    wanted = known.bound(x, nelbo.ContinuousTime()).sum(1)
    found = nelbo.evaluate(known.model, x, calls=64, surrogate=known.model)
    scale = known.model.dims * math.log(2)
    assert abs(found.nats - wanted.mean()) < 4 * found.standard_error.monte_carlo * scale
    far = (-found.per_example.elbo - wanted).abs() / found.per_example_error
    assert (far < 1.96).double().mean() > 0.85 and "the surrogate read" in " ".join(found.notes)


def test_short_examples_are_measured_by_all_their_masks():
    """Exact, and the error is 0; of one-hot features too, whose places are all scored."""
    known = known_models.symbols()
    x = known.examples(60)
    found = nelbo.evaluate(known.model, x, calls=3, masks="plain", per_example=True)
    wanted = known.bound(x, nelbo.ContinuousTime()).sum(1)
    torch.testing.assert_close(-found.per_example.elbo, wanted, rtol=1e-6, atol=0)
    assert found.calls_per_example == 3 and found.standard_error.monte_carlo == 0
    assert (found.per_example_error == 0).all() and not any(p.standard_error for p in found.curve)
    assert "all masks of each text were read: no Monte Carlo error" in found.notes
    sampled = nelbo.evaluate(known.model, x, calls=2, masks="plain")
    assert sampled.standard_error.monte_carlo > 0 and "plain, without" in mask_note(sampled)
    target = nelbo.evaluate(known.model, x, target_error=1e-9, masks="plain")
    assert target.nats == found.nats and target.standard_error.monte_carlo == 0


@pytest.mark.parametrize("block", [None, 2, 3])
def test_all_masks_give_the_cells_and_tokens_that_drawn_ones_do(block):
    """Of texts of different lengths, some of whose tokens show, and of blocks."""
    model = tiny(4, block=block)
    shown = torch.tensor([[False, True, False, False, False]] * 3)
    batch = model.batch([[3, 1, 2, 0, 1], [2, 1, 3, 3, 0], [0, 1, 2]], shown)
    estimator = MaskEstimator(model, None, Texts(model, batch), 0)
    known = usual(1, False)
    cells, tokens, error = estimator.costs(range(3), batch, Plan(2, 1, 0, 15), known)
    drawn, other, spread = estimator.costs(range(3), batch, Plan(4000, 2), known)
    noise = drawn.std(1) / 4000**0.5
    assert ((cells[:, 0] - drawn.mean(1)).abs() <= 4.5 * noise + 1e-9).all()
    assert ((tokens - other).abs() <= 4.5 * spread + 1e-9).all() and not error.any()
    torch.testing.assert_close(cells[:, 0].sum(1), tokens.sum(1))
    if block is None:
        scored = costs_of_tokens(model, [0, 1, 2])  # with all hidden
        assert not torch.allclose(tokens[2, :3], scored)
        wanted = torch.tensor([exact(model, batch, row) for row in range(3)], dtype=torch.float64)
    else:
        wanted = torch.tensor(of_blocks(model, batch, 24), dtype=torch.float64)
    torch.testing.assert_close(tokens.sum(1), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("calls", [8, 40])
def test_texts_of_unequal_lengths_have_errors_of_their_own(calls):
    """Each text by itself: 95 % of its intervals hold its bound, and their size is that of its
    noise, where one error for all is too large for short texts and too small for long ones."""
    known, seeds = known_models.lengths(), 120
    model, texts = known.model, known.examples(4)
    texts[0, 2:] = texts[0, -1]  # padding: a text of two tokens, with three masks
    wanted = known.bound(texts, nelbo.ContinuousTime()).sum(1)
    found = [
        nelbo.evaluate(model, texts, calls=calls, per_example=True, seed=seed)
        for seed in range(seeds)
    ]
    # what the short text leaves of its calls goes to the others
    assert found[0].calls_per_example > (7 if calls == 8 else 36)
    off = torch.stack([-r.per_example.elbo for r in found]) - wanted
    error = torch.stack([r.per_example_error for r in found])
    assert not error[:, 0].any() and off[:, 0].abs().max() < 1e-9  # all its masks
    held = (off.abs() <= 1.96 * error).double().mean(0)[1:]
    binomial = math.sqrt(0.95 * 0.05 / seeds)
    assert (held > 0.93 - 2.5 * binomial).all()
    ratio = error[:, 1:].square().mean(0).sqrt() / off[:, 1:].square().mean(0).sqrt()
    # few replicates make errors 1.2 times as wide, and what texts share may be 1.5 times off
    assert ((ratio > 0.85) & (ratio < 1.8)).all()
    mean = torch.tensor([r.standard_error.monte_carlo * r.nats / r.bits_per_dim for r in found])
    held = (off.mean(1).abs() <= 1.96 * mean).double().mean()
    assert 0.93 - 2.5 * binomial < held


def test_masks_are_uniform_and_balanced():
    """Each set of l places is equally likely, and together the masks cover all places alike."""
    model = tiny(4)
    texts = Texts(model, model.batch([[0, 1, 2, 3]]))
    drawn = draw_masks(texts, [0], (0, 0), 4000, 3, lambda L: 1 / np.arange(1, L + 1) ** 0.5)
    assert (drawn.hidden.sum(-1) == drawn.count).all()
    for i in range(3):
        for size in range(1, 4):
            of_size = drawn.hidden[0, :, i][drawn.count[0, :, i] == size]
            seen = of_size.double().unique(dim=0, return_counts=True)[1]
            if len(of_size):
                expected = len(of_size) / math.comb(4, size)
                assert len(seen) == math.comb(4, size)
                assert ((seen - expected).abs() < 4 * math.sqrt(expected)).all()
    torch.testing.assert_close(drawn.width.sum(-1), torch.full((1, 4000), 4.0).double())
    halves = draw_masks(texts, [0], (0, 0), 50, 2, lambda L: np.array([1e-9, 1, 1e-9, 1e-9]))
    two = halves.hidden[0][(halves.count[0] == 2).all(-1)]
    assert len(two) and (two.sum(1) == 1).all()  # complementary masks


def test_masks_of_a_text_are_counted():
    """2^L - 1 of each block, of any length."""
    module = known_models.Counted(longest=1200)
    for block, wanted in ((None, [7, math.inf]), (2, [3 + 1, 600 * 3])):
        model = wrap_tokens(module, module.mask, block=block)
        texts = Texts(model, model.batch([[0, 1, 2], [0] * 1200]))
        assert texts.sets.tolist() == wanted


def test_the_masked_share_has_its_law_given_the_count():
    """u of l hidden places of 5 is the l-th smallest of 5 uniform numbers: Beta(l, 6 - l)."""
    model = tiny(4)
    texts = Texts(model, model.batch([[0, 1, 2, 3, 0]]))
    drawn = draw_masks(texts, [0], (0, 0), 3000, 5, lambda L: np.ones(L))
    uniform = np.sort(np.random.default_rng(1).random((3000, 5)), 1)
    for i in range(5):
        assert (drawn.count[0, :, i] == i + 1).all()
        for power in (1, 2):
            ours, theirs = drawn.share[0, :, i] ** power, torch.from_numpy(uniform[:, i] ** power)
            error = math.sqrt((ours.var() + theirs.var()).item() / 3000)
            assert abs(ours.mean() - theirs.mean()) < 4 * error


def test_the_regression_finds_what_made_the_costs():
    """Slopes, curve and spread of pairs that were made with known ones."""
    with seeded(3):
        share = torch.rand(4000).double()
        count = (share * 40).ceil()
        v = torch.randn(4000, 2, 2).double() / count[:, None, None].sqrt()
        slope, noise = 0.5 + share, 0.3 / count.sqrt()
        cost = slope[:, None] * v[..., 0] + share[:, None] ** 2
        cost = cost + noise[:, None] * torch.randn(4000, 2)
        found = fit(share, count, cost, v, True)
    nodes = torch.tensor(NODES).double()
    assert ((found.slopes[0] - 0.5 - nodes).abs() < 0.05).all()
    assert (found.slopes[1].abs() < 0.05).all()
    assert ((found.curve - nodes**2).abs() < 0.05).all()
    assert ((found.spread - 0.3).abs() < 0.05).all()
    torch.testing.assert_close(hats(share) @ nodes, share)


def test_what_has_no_counts_or_no_such_surrogate_is_refused():
    """One sentence each, before work."""
    model = tiny(4)
    ids = [[0, 1, 2]]
    with pytest.raises(ValueError, match="masked model in continuous time; leave it out"):
        nelbo.evaluate(model, ids, steps=3, surrogate=model)
    with pytest.raises(
        ValueError, match="masks must be plain, unigram, draws, two-levels; got 'x'"
    ):
        nelbo.evaluate(model, ids, masks="x")
    with pytest.raises(ValueError, match="masks are for a masked model in continuous time"):
        nelbo.evaluate(model, ids, steps=3, masks="plain")
    with pytest.raises(ValueError, match="two-levels need a surrogate"):
        nelbo.evaluate(model, ids, masks="two-levels")
    with pytest.raises(ValueError, match="a surrogate takes the masks two-levels; got 'draws'"):
        nelbo.evaluate(model, ids, masks="draws", surrogate=model)
    with pytest.raises(ValueError, match="calls must be at least 2 per example"):
        nelbo.evaluate(model, ids, calls=1, surrogate=model)
    with pytest.raises(ValueError, match=r"calls must be at most 1e\+09 per example; got 1e\+30"):
        nelbo.evaluate(model, ids, calls=1e30)

    class Other(nn.Module):
        def forward(self, ids):
            return torch.zeros(*ids.shape, V + 1)

    with pytest.raises(ValueError, match="symbols of the model, 5; got 6"):
        nelbo.evaluate(model, ids, surrogate=wrap_tokens(Other(), MASK))


def test_a_surrogate_of_no_numbers_is_refused():
    class NoNumber(nn.Module):
        def forward(self, ids):
            return torch.full((*ids.shape, V), math.nan)

    model, broken = tiny(0), wrap_tokens(NoNumber(), MASK)
    with pytest.raises(ValueError, match="the surrogate's costs are not all numbers"):
        nelbo.evaluate(
            model, [[0, 1, 2], [1, 1, 0]], calls=4, surrogate=broken, masks="two-levels"
        )


def test_rounded_counts_are_not_uniform():
    """LLaDA's script rounds evenly spaced counts; at a spacing of 1/2 halves go to even ones.

    So with answers of 8 tokens and batches of 16, even counts are three times as frequent as odd
    ones, and the mean of a cost that rises with the count depends on the size of the batch.
    """
    spec = importlib.util.spec_from_file_location("masks_program", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    seen = torch.cat([program.rounded_counts(8, 16, 50).flatten() for _ in range(4)])
    frequency = seen.bincount(minlength=9)[1:]
    assert (frequency[1::2] == 3 * frequency[0::2]).all() and frequency.sum() == 3200
    whole = program.rounded_counts(8, 8).flatten().bincount(minlength=9)[1:]
    assert (whole == 1).all()
    rising = torch.arange(1, 9).double() ** 2
    assert abs((frequency * rising).sum() / 3200 - rising.mean()) > 1
    model = tiny(4)
    ours = draw_masks(
        Texts(model, model.batch([[0, 1, 2, 3] * 2])), [0], (0, 0), 200, 16, lambda L: np.ones(L)
    )
    assert (ours.count.flatten().bincount(minlength=9)[1:] == 400).all()
