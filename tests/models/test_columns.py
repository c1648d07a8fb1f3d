"""The columns of a table as probabilities: sums to one, exact bounds, missing cells."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import kl_divergence

from nelbo._utils.numerics import seeded
from nelbo.data import Schema
from nelbo.data.columns import Column, groups, places
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.distributions import Discrete, Joint, draw, kl, kl_noise, log_between
from nelbo.diffusion.model import measuring
from nelbo.diffusion.process import per_example
from nelbo.diffusion.schedules import Linear
from nelbo.diffusion.times import ContinuousTime, TimeGrid, elbo
from nelbo.evaluation.per_dimension import by_dimension
from nelbo.models.build import build
from nelbo.models.tabular.continuous import (
    ContinuousColumns,
    ContinuousDecoder,
    ContinuousMixture,
    MonotoneTransform,
)
from nelbo.testing import assert_mean
from nelbo.training.presets import configure

COLUMNS = (
    Column("city", "category", categories=("a", "b", "c"), missing=True),
    Column("age", "rounded", 1.0, 0.0, 6.0, missing=True),
    Column("income", "real", missing=True),
    Column("flag", "boolean", categories=("0", "1")),
    Column("height", "rounded", 0.001, 100.0, 600.0, missing=True),
)
#: the same, with all numbers known
KNOWN = tuple(replace(c, missing=c.missing and not c.indicated) for c in COLUMNS)


def rows(n, seed=0, columns=COLUMNS):
    """Independent columns in the order of the layout: numbers, levels, symbols."""
    g = torch.Generator().manual_seed(seed)

    def pick(weights):
        weights = torch.tensor(weights, dtype=torch.float64)
        return torch.multinomial(weights, n, replacement=True, generator=g).double()

    income = 3 + 2 * torch.randn(n, generator=g, dtype=torch.float64)
    height = (300 + 40 * torch.randn(n, generator=g, dtype=torch.float64)).mul(1000).round() / 1000
    no_income, no_height = pick([0.7, 0.3]), pick([0.9, 0.1])
    if columns is COLUMNS:
        income[no_income == 1], height[no_height == 1] = torch.nan, torch.nan
    age = pick([0, 3, 1, 0.2, 2, 2, 1, 1, 0, 1])
    city, flag = pick([0, 2, 1, 1, 0.5]), pick([0, 1, 3])
    made = {"income": income, "height": height, "age": age, "city": city, "flag": flag}
    signs = {"income": no_income + 1, "height": no_height + 1}
    at = places(columns)
    return torch.stack([(signs if p.indicator else made)[p.column.name] for p in at], 1)


def made_of(columns):
    schema = Schema.of_table(columns)
    with seeded(0):
        model = build(configure(schema, 100, width=16, depth=1)[0], schema)
    model.fit_statistics(rows(4000, columns=columns))
    return model.double().eval()


@pytest.fixture(scope="module")
def model():
    return made_of(COLUMNS)


@pytest.fixture(scope="module")
def known():
    return made_of(KNOWN)


def mixture_law(head, v, given_known):
    """log of the fitted mixture of numbers (N, D), P of a cell or a density, those known; (N,)."""
    knots, law = head.transform.x, head.law
    count, special = law.used.tolist()
    assert special == 1  # nothing repeats
    mean, spread = knots.mean(1), (knots[:, 1] - knots[:, 0]) / 2
    cell = torch.tensor([place.column.precision or 1.0 for place in head.places]).double()
    axes = law.axes[:count].double()
    covariance = axes @ law.spread[:count].double().diag_embed() @ axes.mT + 1e-6 * torch.eye(
        v.shape[1]
    )
    found = []
    for x in v:
        known = (~x.isnan()).nonzero()[:, 0]
        gaussian = torch.distributions.MultivariateNormal(
            law.mean.double()[:count, known], covariance[:, known][:, :, known]
        )
        each = law.log_weight[:count].double() + gaussian.log_prob(((x - mean) / spread)[known])
        if not given_known:
            each = each + law.log_rest[known, :count].double().sum(0)
        found.append(each.logsumexp(0) + (cell / spread)[known].log().sum())
    return torch.stack(found)[:, None]


def started_from(model, x, columns=COLUMNS, given_known=True):
    """log P(x) under the law that the model starts from, of numbers together, by column else."""
    found = []
    for group, head, v in zip(
        groups(columns), model.head.parts, model.process.split(x), strict=True
    ):
        if group.kind == "numbers":
            found.append(mixture_law(head, v, given_known))
        else:
            valid = head.levels.valid if group.kind == "levels" else head.valid
            log_p = head.log_prior.double().masked_fill(~valid, -torch.inf)
            log_p = log_p.log_softmax(-1).expand(len(v), -1, -1)
            found.append(log_p.gather(-1, v.long()[..., None])[..., 0])
    return torch.cat(found, 1).sum(1)


def draws_of(model, few, times, count, calls):
    """The bound of each of a few examples, drawn so often: (count, examples)."""
    x = few.repeat_interleave(count, 0)
    u = None if calls is None else torch.rand(len(x), calls).double()
    with measuring(model), seeded(3):
        return elbo(model, x, times, u).elbo.reshape(len(few), count).T


def test_an_indifferent_network_costs_exactly_the_law_it_starts_from(known):
    # Its last layer is zero: the rows are then denoised exactly, and the bound is tight.
    few = rows(6, 1, KNOWN)
    truth = started_from(known, few, KNOWN)
    assert_mean(draws_of(known, few, ContinuousTime(), 800, 8), truth, 0.25)


def test_few_steps_are_as_tight_where_columns_are_independent(known):
    few = rows(4, 2, KNOWN)
    truth = started_from(known, few, KNOWN)
    # The mixture steps are exact; that masks of several columns fall in one step costs nothing.
    assert_mean(draws_of(known, few, TimeGrid([0.2, 0.6, 1.0]), 1500, None), truth, 0.1)


def test_a_known_number_pays_at_most_for_not_being_missing(model):
    few = rows(6, 1)
    draws = draws_of(model, few, ContinuousTime(), 800, 8)
    error = 4 * draws.std(0) / math.sqrt(len(draws))
    low, high = (started_from(model, few, given_known=known) for known in (False, True))
    assert (error < 1.0).all() and (low < high - 0.05).any()
    assert (draws.mean(0) > low - error).all() and (draws.mean(0) < high + error).all()


def test_costs_by_column_add_up_to_the_bound(model):
    x = rows(3)
    x = x[Batch(x).order]  # in which draws are made
    with measuring(model):
        (found,) = by_dimension(model, x, TimeGrid([0.3, 1.0]), seed=5)
        with seeded(5, 0):
            total = model_terms(model, x)
    assert found.elbo.shape == (3, 8 - 1)
    torch.testing.assert_close(found.elbo.sum(1), total)


def model_terms(model, x):
    """The bound on the same grid with the same draws, summed inside."""
    e = model.embed(x)
    s, t = (torch.full((len(x),), v, dtype=torch.float64) for v in (0.3, 1.0))
    prior = kl_divergence(model.process.marginal(e, t), model.process.prior(model.shape, t))
    z = draw(model.process.marginal(e, s))
    decoded = model.likelihood(z, s).log_prob(x)
    z = draw(model.process.marginal(e, t))
    q, p = model.process.posterior(z, e, s, t), model.reverse(z, s, t)
    step = kl(q, p, kl_noise(q, p))
    return decoded - prior - step


def test_a_missing_number_is_a_stationary_chain():
    process = ContinuousColumns(Linear(-6.0, 4.0), MonotoneTransform(1))
    nan = torch.full((2, 1), torch.nan, dtype=torch.float64)
    s, t = torch.tensor([0.2, 0.5]).double(), torch.tensor([0.6, 0.9]).double()
    z = torch.tensor([[1.3], [-0.4]]).double()
    at_t, back = process.marginal(nan, t).base_dist, process.posterior(z, nan, s, t).base_dist
    assert (at_t.loc == 0).all() and (at_t.scale == 1).all()
    # z_s has variance 1 when z_t has: slope² + variance of the step
    slope = back.loc / z
    torch.testing.assert_close(slope.square() + back.scale.square(), torch.ones(2, 1).double())
    # a velocity of zero, ê = √α z, costs nothing
    e_hat = process.alpha(t).sqrt()[:, None] * z
    assert (process.rate(z, nan, e_hat, t).abs() < 1e-12).all()
    assert (process.rate(z, nan, e_hat + 0.1, t) > 0).all()
    # and a step to s → t is what the rate says
    near = t - 1e-7
    kl = kl_divergence(
        process.posterior(z, nan, near, t), process.posterior(z, e_hat + 0.1, near, t)
    )
    torch.testing.assert_close(kl / 1e-7, process.rate(z, nan, e_hat + 0.1, t), rtol=1e-3, atol=0)


def transform():
    made = MonotoneTransform(1, 4)
    made.x.copy_(torch.tensor([[-2.0, 0.0, 0.5, 7.0]]))
    made.e.copy_(torch.tensor([[-1.5, -0.5, 0.8, 2.0]]))
    return made


def test_a_transform_inverts_and_knows_its_slope():
    made = transform()
    x = torch.tensor([[-9.0], [-1.0], [0.1], [3.0], [20.0]]).double().requires_grad_()
    torch.testing.assert_close(made.inverse(made(x)), x)
    (slope,) = torch.autograd.grad(made(x).sum(), x)
    torch.testing.assert_close(made.log_slope(x), slope.log())


def test_numbers_integrate_and_cells_sum_to_one_in_the_units_of_the_data():
    made, column = transform(), Column("x", "rounded", 0.25, -2.0, 100.0)
    process, t = ContinuousColumns(Linear(-6.0, 4.0), made), torch.full((1,), 0.3).double()
    z, place = torch.tensor([[0.3]]).double(), places([column])
    head = ContinuousMixture(made, place)
    column_of = torch.randn(500, 1, generator=torch.Generator().manual_seed(0)).double()
    column_of[:100] = 0.0  # a value that repeats
    head.fit_statistics(column_of.div(0.25).round().mul(0.25))
    assert (head.law.log_share[0, : head.law.used[0], 1] > -torch.inf).all()
    prediction = head(torch.zeros(1, 1, head.outputs).double(), z, t, process)
    real = replace(prediction, log_weights=prediction.log_weights.clone())
    real.log_weights[..., 1 : head.law.used[1]] = -torch.inf
    x = torch.arange(-100000, 100000).double()[:, None] / 5000 + 1e-5
    density = ContinuousDecoder(made, places([Column("x", "real")]), head.law)(real, z, t, process)
    total = torch.trapezoid(density.log_prob(x).exp(), x[:, 0])
    assert total.item() == pytest.approx(1, abs=1e-3)  # the jumps at the knots
    cells = ContinuousDecoder(made, place, head.law)(prediction, z, t, process)
    lattice = -2.0 + 0.25 * torch.arange(-400, 800).double()[:, None]
    assert cells.log_prob(lattice).exp().sum().item() == pytest.approx(1, abs=1e-12)
    # a missing cell is decoded by its symbol alone
    assert cells.log_prob(torch.tensor([[torch.nan]])).item() == 0
    drawn = cells.sample((4000,))
    assert ((drawn + 2.0) % 0.25 == 0).all()
    share = (drawn == 0).double().mean().item()
    assert share == pytest.approx(cells.log_prob(torch.zeros(1, 1)).exp().item(), abs=0.03)


@pytest.mark.parametrize("unit", [2.0**-40, 2.0**40])
def test_the_unit_of_a_density_is_a_factor(unit):
    """Also of 1e18 ± 1e12: a cell that a column does not have has no gradient, whatever it is."""
    income = 1e6 + torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).double()

    def log_density(x):
        schema = Schema.of_table([Column("income", "real")])
        with seeded(0):
            model = build(configure(schema, 64, width=16, depth=1)[0], schema)
        model.fit_statistics(x)
        model.double().eval()
        t = torch.full((64,), 0.1).double()
        found = model.likelihood(model.embed(x), t).log_prob(x).sum()
        found.backward()
        return found.item(), [p.grad for p in model.parameters() if p.grad is not None]

    (one, gradient), (other, of_other) = log_density(income), log_density(income * unit)
    assert other == pytest.approx(one - 64 * math.log(unit), rel=1e-9)
    assert any(g.abs().max() > 0 for g in gradient)
    for a, b in zip(gradient, of_other, strict=True):
        torch.testing.assert_close(a, b)


def test_codes_that_a_column_lacks_have_no_probability(model):
    z = model.process.prior(model.shape, torch.ones(50).double()).sample()
    with seeded(1):
        torch.nn.init.normal_(model.network.last.weight, std=0.5)
    try:
        law = model.likelihood(z, torch.full((50,), 0.4).double()).base_dist
    finally:
        torch.nn.init.zeros_(model.network.last.weight)
    for group, part in zip(groups(COLUMNS), law.parts, strict=True):
        if group.kind == "numbers":
            continue
        p = part.log_probs.exp()
        torch.testing.assert_close(p.sum(-1), torch.ones(p.shape[:-1]).double())
        for i, place in enumerate(group.places):
            assert (p[:, i, place.codes :] == 0).all()


def test_a_new_category_has_the_probability_that_succession_gives_it(model):
    expected = {"city": 1 / 4002, "flag": 0.0, "income": 0.0, "height": 0.0}
    z, t = torch.zeros(2, 1), torch.zeros(2)
    for group, head in list(zip(groups(COLUMNS), model.head.parts, strict=True))[-2:]:
        output = torch.randn(2, len(group.places), head.outputs).double()
        first = head(output, z, t, None).e_hat[..., 0].exp()
        for p, place in zip(first.T, group.places, strict=True):
            torch.testing.assert_close(p, torch.full_like(p, expected.pop(place.column.name)))
    assert not expected


def test_groups_of_a_joint_keep_their_own_kinds():
    normal = torch.distributions.Normal(torch.zeros(3, 2), torch.ones(3, 2))
    coin = Discrete(torch.tensor([0.25, 0.75]).log().expand(3, 1, 2))
    joint = per_example(Joint([normal, coin]))
    assert joint.batch_shape == (3,) and joint.sample().shape == (3, 3)
    value = torch.tensor([[0.0, 0.0, 1.0]])
    expected = math.log(0.75) - math.log(2 * math.pi)
    assert joint.log_prob(value)[0].item() == pytest.approx(expected, rel=1e-6)
    shifted = per_example(Joint([torch.distributions.Normal(normal.loc + 1, normal.scale), coin]))
    torch.testing.assert_close(kl_divergence(joint, shifted), torch.ones(3))


def test_the_interval_of_a_normal_is_exact_in_both_tails():
    lower = torch.tensor([-40.0, 0.0, 30.0]).double()
    found = log_between(lower, lower + 0.5)
    assert found[1].item() == pytest.approx(math.log(0.191462461274013), rel=1e-12)
    assert found[2].item() == pytest.approx(log_between(-lower - 0.5, -lower)[2].item(), rel=1e-12)
    assert found.isfinite().all()
