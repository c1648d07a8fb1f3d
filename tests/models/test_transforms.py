"""Scales that numbers are modelled in, and the density in the units of the user."""

import math

import polars as pl
import pytest
import torch

from nelbo import data
from nelbo._utils.numerics import seeded
from nelbo.data.columns import Column, places
from nelbo.diffusion.schedules import Linear
from nelbo.evaluation.evaluate import evaluate
from nelbo.models.tabular.continuous import (
    ContinuousColumns,
    ContinuousDecoder,
    ContinuousMixture,
    MonotoneTransform,
)
from nelbo.runs.train import train

KINDS = ("standardise", "log", "quantile")


@pytest.fixture(scope="module")
def sample():
    """exp N(2, 1), and a few zeros and less."""
    with seeded(3):
        x = (2 + torch.randn(4000, dtype=torch.float64)).exp()
    return torch.cat([x, torch.tensor([0.0, -1.0], dtype=torch.float64)])[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_transform_inverts_and_owns_its_log_determinant(kind, sample):
    made = MonotoneTransform(1, transforms=[kind])
    made.fit_statistics(sample)
    x = torch.tensor([[-30.0], [-0.2], [0.0], [1e-3], [0.7], [9.0], [44.0], [1e4]]).double()
    x.requires_grad_()
    e = made(x)
    assert (e.diff(dim=0) > 0).all()
    torch.testing.assert_close(made.inverse(e), x)
    (slope,) = torch.autograd.grad(e.sum(), x)
    torch.testing.assert_close(made.log_slope(x), slope.log())


def law(kind, x, precision=None):
    """Return the head's law P(x) of a column at the end of noise, where z says nothing."""
    if precision:
        low, high = x.min().item(), x.max().item()
        place = places([Column("x", "rounded", precision, low, high, transform=kind)])
    else:
        place = places([Column("x", "real", transform=kind)])
    made = MonotoneTransform(1, transforms=[kind])
    process, t = ContinuousColumns(Linear(-6.0, 40.0), made), torch.ones(1).double()
    made.fit_statistics(x)
    head = ContinuousMixture(made, place)
    head.fit_statistics(x)
    z = torch.zeros(1, 1).double()
    prediction = head(torch.zeros(1, 1, head.outputs).double(), z, t, process)
    return ContinuousDecoder(made, place, head.law)(prediction, z, t, process)


@pytest.mark.parametrize("kind", KINDS)
def test_densities_are_of_the_units_of_the_data(kind, sample):
    x = torch.cat([torch.linspace(-200, 0, 20_001), torch.logspace(-8, 6, 200_001)])
    x = x.double()[:, None]
    total = torch.trapezoid(law(kind, sample).log_prob(x).exp(), x[:, 0]).item()
    assert total == pytest.approx(1, abs=2e-3)  # the jumps at the knots
    # a thousandth of the unit: a thousandth of the density
    here, there = (law(kind, scale * sample).log_prob(scale * sample) for scale in (1, 1000))
    torch.testing.assert_close(here - there, torch.full_like(here, math.log(1000)))


def test_a_scale_that_fits_costs_the_entropy(sample):
    """The entropy of exp N(2, 1) is 2 + ½ log 2πe; Gaussians of x itself are farther from it."""
    entropy = 2 + 0.5 * math.log(2 * math.pi * math.e)
    known = sample[sample[:, 0] > 0]
    with seeded(11):
        new = torch.randn(20_000, 1, dtype=torch.float64).add(2).exp()
    nats = {kind: -law(kind, known).log_prob(new).mean().item() for kind in KINDS}
    assert nats["log"] == pytest.approx(entropy, abs=0.03)  # of 4000 draws ± 0.016
    assert nats["quantile"] == pytest.approx(entropy, abs=0.05)
    assert nats["log"] < nats["standardise"]


@pytest.mark.parametrize("kind", KINDS)
def test_cells_sum_to_one(kind, sample):
    x = sample.mul(4).round().div(4)
    cells = law(kind, x, 0.25)
    lattice = torch.arange(-4000, 40_000).double()[:, None] / 4
    assert cells.log_prob(lattice).exp().sum().item() == pytest.approx(1, abs=1e-6)
    drawn = cells.sample((200,))
    assert (drawn % 0.25 == 0).all()


def test_a_quantile_transform_stands_values_that_repeat():
    made = MonotoneTransform(2, transforms=["quantile", "standardise"])
    x = torch.stack([torch.tensor([1.0] * 90 + [2.0] * 10), torch.arange(100.0)], 1).double()
    made.fit_statistics(x)
    assert (made.x.diff(dim=1) > 0).all()
    torch.testing.assert_close(made.inverse(made(x)), x)
    torch.testing.assert_close(made(x)[:, 1], (x[:, 1] - 49.5) / x[:, 1].std(correction=0))


def test_a_transform_is_declared_in_the_schema(tmp_path):
    with seeded(1):
        dear = (1 + torch.randn(200, dtype=torch.float64)).exp()
    frame = pl.DataFrame({"dear": dear.tolist(), "few": [1, 2, 3, 4] * 50})
    frame.write_parquet(tmp_path / "t.parquet")
    schema = tmp_path / "s.json"
    schema.write_text('[{"name": "dear", "transform": "log"}, {"name": "few"}]')
    options = {"batch": 16, "width": 8, "depth": 1, "evaluate_every": 20, "steps": 20}
    source = str(tmp_path / "t.parquet")
    run = train(source, tmp_path / "run", schema=schema, **options)
    assert run.config.schema.columns[0].transform == "log"
    assert math.isfinite(evaluate(run.model, run.batch()[0], calls=4).nats)
    schema.write_text('[{"name": "few", "transform": "log"}]')
    with pytest.raises(ValueError, match="transform of the column 'few' is for real numbers"):
        data.load(source, schema=schema)
    schema.write_text('[{"name": "dear", "transform": "root"}]')
    with pytest.raises(ValueError, match="must be one of standardise, log, quantile; got 'root'"):
        data.load(source, schema=schema)
