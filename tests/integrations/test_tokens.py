"""Masked language models of six ids and texts of up to four tokens, where all is enumerated."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from support.closed_forms import legendre_nodes
from support.tokens import MASK, PAD, Tiny, V
from torch import nn

import nelbo
from nelbo import Batch
from nelbo._utils.numerics import seeded
from nelbo.integrations import wrap_tokens
from nelbo.sampling.samplers import ancestral

NODES = list(zip(*legendre_nodes(0.0, 1.0, 20), strict=True))


@pytest.fixture
def module():
    with seeded(4):
        return Tiny().double()


def enumerated(module, text, shown=(), shift=0, never=(MASK,), clock=None):
    """The bound on -log P of a text by its definition: all shares of hidden tokens by quadrature,
    all sets of hidden tokens, one call of the module for each."""
    scored = [i for i in range(len(text)) if i not in shown]
    total = 0.0
    for t, weight in NODES:
        share = t**2  # any increasing function of the time will do
        for size in range(1, len(scored) + 1):
            for hidden in itertools.combinations(scored, size):
                ids = torch.tensor([[MASK if i in hidden else k for i, k in enumerate(text)]])
                time = () if clock is None else (clock(1 - share).reshape(1),)
                logits = module(ids, *time)[0].clone()
                logits[:, list(never)] = -torch.inf
                log_p = logits.log_softmax(-1)
                cost = -sum(log_p[max(i - shift, 0), text[i]] for i in hidden)
                times = share**size * (1 - share) ** (len(scored) - size) * 2 / t
                total = total + weight * times * cost
    return total.item()


def measured(model, batch):
    """The same by the package: E_q of its rate over all z, integrated over the time."""
    (text,), process = batch.x, model.process
    batch_row = text, batch.condition[0]
    with torch.no_grad():
        kinds = [[k.item(), V] if c == -1 else [k.item()] for k, c in zip(*batch_row, strict=True)]
        z = torch.tensor(list(itertools.product(*kinds)))
        x, condition = text.expand_as(z), batch.condition.expand_as(z)
        free = condition == -1
        total = 0.0
        for t, weight in NODES:
            times = t.expand(len(z))
            log_q = process.marginal(model.embed(x), times).base_dist.log_prob(z)
            q = torch.where(free, log_q, 0.0).sum(1).exp()
            prediction = model.predict(z, times, condition)
            total = total + weight * (q * process.predicted_rate(z, x, prediction, times)).sum()
    return total.item()


CASES = {
    "plain": ({}, {}),
    "padding": ({"pad_id": PAD}, {"never": (PAD, MASK)}),
    "shift": ({"shift": 1}, {"shift": 1}),
    "never": ({"never": (0,)}, {"never": (0, MASK)}),
    "sigma": ({"time": "sigma"}, {"clock": lambda alpha: -alpha.log()}),
    "masked": ({"time": "masked"}, {"clock": lambda alpha: 1 - alpha}),
    "first id shown": ({"shown": [3]}, {"shown": (0,)}),
    "all": (
        {"pad_id": PAD, "shift": 1, "time": "masked", "shown": [3]},
        {"never": (PAD, MASK), "shift": 1, "clock": lambda alpha: 1 - alpha, "shown": (0,)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bound_by_enumeration(module, name):
    """Equation 9: the bound of a text is the mean over all sets of hidden tokens."""
    options, given = CASES[name]
    model = wrap_tokens(module, MASK, **options)
    text = [3, 1, 2, 1]
    wanted = enumerated(module, text, **given)
    padded = [*text, PAD, PAD] if "pad_id" in options else text
    got = measured(model, model.batch([padded]))
    assert abs(got - wanted) < 1e-9 and wanted > 1


def test_a_prompt_is_given(module):
    """P(answer|prompt): tokens of the prompt are never hidden and cost nothing."""
    model = wrap_tokens(module, MASK)
    text = [3, 1, 2, 0]
    batch = model.batch([text], shown=torch.tensor([[True, True, False, False]]))
    wanted = enumerated(module, text, shown=(0, 1))
    assert abs(measured(model, batch) - wanted) < 1e-9
    found = nelbo.evaluate(model, batch, calls=3)
    assert math.isclose(found.nats, wanted, rel_tol=1e-9)  # all three masks
    assert math.isclose(found.bits_per_dim, found.nats / 2 / math.log(2))
    assert found.unit == "bits/token"
    assert "2 tokens of 1 texts are scored; 2 show" in found.notes[0]
    drawn = ancestral(model, 3, nelbo.TimeGrid.uniform(2), condition=batch.condition.expand(3, -1))
    assert (drawn[:, :2] == torch.tensor([3, 1])).all() and (drawn < V - 1).all()


@pytest.mark.parametrize(
    "options", [{}, {"shift": 1}, {"time": "sigma"}, {"never": (2,)}], ids=str
)
def test_bounds_sum_to_at_most_one(module, options):
    """Equation 1: Σ_x exp(ELBO(x)) <= 1 over all answers of two tokens to a prompt of one."""
    model = wrap_tokens(module, MASK, **options)
    possible = [k for k in range(V - 1) if k not in options.get("never", ())]
    total = 0.0
    for answer in itertools.product(possible, repeat=2):
        batch = model.batch([[3, *answer]], shown=torch.tensor([True, False, False]))
        total += math.exp(-measured(model, batch))
    assert 0.005 < total <= 1 + 1e-9


def test_numbers_do_not_depend_on_batch_order_or_padding(module):
    """The prediction for a text is that of the text alone."""
    model = wrap_tokens(module, MASK, pad_id=PAD, shift=1)
    texts = [[1, 2, 3, 0], [2, 2], [PAD, 3, 1, 0], [0, 1, PAD, 2, PAD]]
    batch = model.batch(texts)
    hidden = torch.where(batch.condition == -1, V, batch.x)
    t = torch.full((4,), 0.7, dtype=torch.float64)
    together = model.predict(hidden, t, batch.condition).symbols(hidden, V).log_prob(batch.x)
    for order in ([3, 1, 0, 2], [2]):
        z, x, c = hidden[order], batch.x[order], batch.condition[order]
        some = model.predict(z, t[order], c).symbols(z, V).log_prob(x)
        torch.testing.assert_close(some, together[order], rtol=1e-12, atol=1e-12)
    alone = model.batch([[3, 1, 0]])
    z = torch.full((1, 3), V)
    single = model.predict(z, t[:1], alone.condition).symbols(z, V).log_prob(alone.x)
    torch.testing.assert_close(single[0], together[2, :3], rtol=1e-12, atol=1e-12)
    assert together[0].sum() < 0 and (together[1, 2:] == 0).all()
    picked = model.predict(hidden, t, batch.condition).map(lambda v: v[[1, 3]])
    torch.testing.assert_close(picked.symbols(z, V).log_prob(batch.x[[1, 3]]), together[[1, 3]])


def test_grids_importance_and_sampling(module):
    """A grid's bound lies above that of continuous time, and importance samples tighten it."""
    module = module.float()
    model = wrap_tokens(module, MASK)
    ids = torch.tensor([[3, 1, 2], [0, 0, 1]])
    exact = sum(enumerated(module, row.tolist()) for row in ids) / 2
    grid = nelbo.TimeGrid.uniform(4)
    found = nelbo.evaluate(model, ids, times=grid, calls=256)
    assert found.nats > exact - 5 * found.standard_error.monte_carlo * 3 * math.log(2)
    continuous = nelbo.evaluate(model, ids, calls=6)  # one fewer than there are masks
    error = continuous.standard_error.monte_carlo * 3 * math.log(2)
    assert 0 < error < 0.5 * exact and abs(continuous.nats - exact) < 5 * error
    assert any("has no time input" in note for note in continuous.notes)
    some = ancestral(model, 5, grid, condition=torch.full((5, 3), -1))
    assert some.shape == (5, 3) and some.max() < MASK


@pytest.mark.parametrize(
    "options",
    [{}, {"steps": 3, "importance_samples": 1}, {"sampler": "greedy"}],
    ids=str,
)
def test_texts_of_unequal_lengths_do_not_blur_the_bound_per_token(module, options):
    """Where each token costs log 5, the bound per token has no error, whatever the lengths."""
    with torch.no_grad():
        module.out.weight.zero_()
        module.out.bias.zero_()
    model = wrap_tokens(module, MASK)
    texts = [[i % 5] * (1 + i % 7) for i in range(40)]
    found = nelbo.evaluate(model, texts, **options)
    for each in (found, *([found.in_order] if "sampler" in options else [])):
        assert math.isclose(each.bits_per_dim, math.log2(5))
        assert each.standard_error.total < 1e-9


def test_an_object_with_logits_of_bfloat16(module):
    """The module's dtype is kept, and so is its output where it is an object with logits."""
    module = module.bfloat16()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, ids):
            return SimpleNamespace(logits=self.inner(ids))

    model = wrap_tokens(Wrapped(), MASK)
    found = nelbo.evaluate(model, [[1, 2, 3]], calls=8)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert math.isfinite(found.nats) and "bfloat16" in found.precision


def refused(module, words, ids=((1, 2, 3),), shown=None, **options):
    with pytest.raises(ValueError, match=words):
        wrap_tokens(module, MASK, **options).batch([list(row) for row in ids], shown)


class Whole(nn.Module):
    """Logits rounded to integers, or what are ids."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, ids):
        return self.module(ids).long()


def test_bad_input_is_refused_in_a_sentence(module):
    """Ids beyond the vocabulary, the mask in a text, an empty answer, a text that is too long."""
    refused(module, r"text 0 has id 9 at 1, beyond 0\.\.5", [(1, 9, 2)])
    refused(module, "text 1 has id 5 at 0, the model's mask", [(1, 1), (5, 1)])
    refused(module, "text 0 has id 2 at 1, never predicted", never=(2,))
    refused(module, "text 0 has no token to score", shown=torch.tensor([True] * 3))
    refused(module, "text 1 has no token to score", [(1,), (PAD,)], pad_id=PAD)
    refused(module, "3 tokens, and the model takes at most 2; divide it", length=2)
    refused(module, "shown tokens are a mask of booleans", shown=torch.tensor([1, 0, 0]))
    refused(module, "ids of the module are 0..5; got", never=(8,))
    refused(module, "time must be one of masked, sigma or a function", time="noise")
    for condition in (torch.zeros(1, 3).long(), torch.zeros(1, 2)):
        with pytest.raises(ValueError, match="a condition for each token, an integer; got"):
            wrap_tokens(module, MASK).batch(Batch(torch.tensor([[0, 2]]), condition))
    for value in (2, -3):
        with pytest.raises(ValueError, match="text 0 has id 1 at 2, whose condition must be"):
            wrap_tokens(module, MASK).batch(
                Batch(torch.tensor([[0, 2, 1]]), torch.tensor([[-2, -1, value]]))
            )
    with pytest.raises(ValueError, match="text 0 has id 9 at 3, beyond"):  # its place as given
        wrap_tokens(module, MASK, pad_id=PAD).batch(torch.tensor([[PAD, PAD, 1, 9]]))
    with pytest.raises(ValueError, match="texts are ids, integers"):
        wrap_tokens(module, MASK).batch(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="must return logits"):
        wrap_tokens(nn.Flatten(), MASK)
    with pytest.raises(ValueError, match=r"must return logits .* real .* torch.int64"):
        wrap_tokens(Whole(module), MASK)
    refused(module, "shift must be one of 0, 1; got 9", shift=9)


@pytest.mark.parametrize(
    "texts", [[1, 2], ["ab"], [[0.5, 1.2]], [[[1]]], torch.ones(1, 2, dtype=torch.bool), 3]
)
def test_texts_that_are_no_rows_of_ids_are_refused(module, texts):
    """Half an id is not rounded, and a mapping, a text or a single row is no list of rows."""
    with pytest.raises(ValueError, match="texts are ids, integers"):
        wrap_tokens(module, MASK).batch(texts)


def test_a_module_that_fails_says_what_it_was_called_with():
    """Eight tokens are more positions than it has; the largest number of tokens is the remedy."""
    module = Tiny()
    assert wrap_tokens(module, MASK, length=2).length == 2

    class Short(nn.Module):
        def forward(self, ids):
            return module(ids) + torch.zeros(3)[torch.arange(ids.shape[1])][:, None]

    assert wrap_tokens(Short(), MASK, length=3).length == 3
    with pytest.raises(ValueError, match=r"fails on 8 ids 5 .*as length"):
        wrap_tokens(Short(), MASK)


def test_a_text_beyond_the_positions_of_a_module(module):
    """Where no length was given, it shows in a call: a sentence, not the module's own error."""
    model = wrap_tokens(module, MASK)
    with pytest.raises(ValueError, match=r"fails on texts of 12 tokens .*as length, and divide"):
        nelbo.evaluate(model, [[1, 2] * 6], calls=4)
    with pytest.raises(ValueError, match=r"mask of booleans .* got torch.int64 of shape \(\)"):
        wrap_tokens(module, MASK, shown=lambda ids: 3).batch([[1, 2]])


def test_a_left_to_right_module_is_refused():
    """Its logits depend on earlier tokens and never on later ones; a unigram's on neither."""
    with seeded(4), pytest.raises(ValueError, match="left to right"):
        wrap_tokens(Tiny(causal=True), MASK)

    class Unigram(nn.Module):
        def forward(self, ids):
            return torch.zeros(*ids.shape, V)

    model = wrap_tokens(Unigram(), MASK)
    assert math.isclose(measured(model, model.batch([[1, 2]])), 2 * math.log(V - 1))


def test_one_step_of_masks_has_no_noise(module):
    """All is hidden, so two draws agree, and the error is 0; with two steps it is not."""
    model, texts = wrap_tokens(module, MASK), [[3, 1, 2, 0], [1, 1]]
    found = nelbo.evaluate(model, texts, steps=1, calls=8)
    logits = [module(torch.full((1, len(x)), MASK))[0].clone() for x in texts]
    for each in logits:
        each[:, MASK] = -torch.inf
    costs = [
        -z.log_softmax(-1)[range(len(x)), x].sum() for z, x in zip(logits, texts, strict=True)
    ]
    torch.testing.assert_close(-found.per_example.elbo, torch.stack(costs).double())
    assert found.standard_error.monte_carlo == 0 and not found.per_example_error.any()
    assert found.standard_error.total > 0  # of other texts
    assert nelbo.evaluate(model, texts, steps=2, calls=8).standard_error.monte_carlo > 0


def test_notes_say_what_time_and_ids_a_model_has(module):
    """The unit of comparison is the ids that can be predicted: here 2, which take one bit each."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3)
    for time, says in (
        ("masked", "has the share of tokens that noise has changed as its time input"),
        ("sigma", "has σ, minus the log of the share of tokens that noise leaves as its time"),
        (lambda alpha: alpha, "has a function of the share of tokens that noise leaves as its"),
    ):
        model = wrap_tokens(module, MASK, time=time, never=(0, 2, 4))
        notes = " ".join(nelbo.evaluate(model, [[3, 1, 3, 1], [1, 1, 1, 3]], calls=8).notes)
        assert says in notes
        assert "worse than uniform: 2 equally likely levels take 1 bits/token" in notes


def test_a_module_in_training_stays_so(module):
    """Wrapped and measured, with each of its parts in the mode it had."""
    module.train()
    part = next(module.children()).eval()
    model = wrap_tokens(module, MASK)
    nelbo.evaluate(model, [[3, 1, 2, 0]], calls=8)
    assert module.training and not part.training
