"""The report's numbers of synthetic rows are right where the answer is known."""

import numpy as np
import pytest
import torch

from nelbo.data.columns import Column
from nelbo.report import quality
from nelbo.report.quality import Rows

COLUMNS = (
    Column("a", "real"),
    Column("b", "real", missing=True),
    Column("c", "category", categories=("x", "y", "z")),
)


def draw(count: int, seed: int, together: bool = True) -> torch.Tensor:
    """a ~ N(0, 1); b = a and a little noise, or missing; c tells whether a is low or high."""
    random = np.random.default_rng(seed)
    a = random.normal(size=count)
    b = a + 0.1 * random.normal(size=count)
    gone = random.random(count) < 0.2
    c = 1 + (a > -0.5) + (a > 0.5)
    x = np.stack([a, np.where(gone, np.nan, b), 1.0 + gone, c], 1)
    if not together:
        x = np.concatenate([random.permutation(x[:, i]) for i in ([0], [1, 2], [3])], 1)
    return torch.from_numpy(x)


@pytest.fixture(scope="module")
def seen():
    return Rows.of(draw(800, 0), COLUMNS)


@pytest.fixture(scope="module")
def held():
    return Rows.of(draw(400, 1), COLUMNS)


@pytest.fixture(scope="module")
def alike():
    return Rows.of(draw(400, 2), COLUMNS)


@pytest.fixture(scope="module")
def apart():
    return Rows.of(draw(400, 3, together=False), COLUMNS)


def test_ranks_are_those_of_scipy():
    from scipy.stats import rankdata

    values = np.array([3.0, np.nan, 1.0, 3.0, -np.inf, 2.0, 1.0, 3.0])
    np.testing.assert_array_equal(quality._ranks(values), rankdata(values, nan_policy="omit"))


def test_pairs_of_columns(seen, held, alike, apart):
    same, other = (quality.pairs(seen, held, made) for made in (alike, apart))
    assert same.names == [("b", "a"), ("c", "a"), ("c", "b")]
    # b is 0, the middle rank, in the fifth of the rows where it is missing
    assert 0.8 < same.seen[0] < 0.95
    assert same.difference < 0.08 and same.expected < 0.08
    assert other.difference > 0.5


def test_copies_are_told_from_new_rows(seen, held, alike):
    new, old = (quality.copies(seen, held, made) for made in (alike, seen))
    share, error = new.nearer
    assert abs(share - 0.5) < 3 * error and error < 0.03
    assert new.exact == (0, 0)
    assert old.nearer[0] > 0.99 and old.exact == (0, 800)


def test_what_rows_are_good_for(seen, held, alike, apart):
    good, bad = (quality.use(seen, held, made) for made in (alike, apart))
    assert [u.name for u in good] == ["a", "b", "c"]
    assert all(u.real > 0.8 and u.synthetic > u.real - 0.1 for u in (good[0], good[2]))
    assert all(u.synthetic < 0.7 for u in (bad[0], bad[2]))
    assert good[0].always == pytest.approx(0.5, abs=0.08)


def test_a_category_with_nearly_as_many_values_as_rows_is_no_warning():
    columns = (Column("a", "real"), Column("c", "category", categories=tuple(map(str, range(30)))))
    rows = Rows.of(torch.stack([torch.arange(40.0), 1 + torch.arange(40.0) % 30], 1), columns)
    assert [u.name for u in quality.use(rows, rows, rows)] == ["a", "c"]


def test_rows_without_a_pair_or_with_a_constant_have_a_figure():
    x = torch.ones(20, 1, dtype=torch.float64)
    rows = Rows.of(x, COLUMNS[:1])
    pairs, copies = quality.pairs(rows, rows, rows), quality.copies(rows, rows, rows)
    assert pairs.names == [] and copies.nearer[0] == 0.5
    assert "<svg" in quality.figure(pairs, copies)
