"""Cells and dimensions drawn given the others: against closed forms, and as a user does it."""

import math

import polars as pl
import pytest
import torch
from torch import nn

from nelbo._numerics import seeded
from nelbo.build import build
from nelbo.cli import main
from nelbo.config import ModelConfig
from nelbo.data.examples import decode, encode, encode_holes
from nelbo.data.layout import Column
from nelbo.data.schema import Schema
from nelbo.estimate import Grid
from nelbo.heads import Data
from nelbo.impute import impute, present
from nelbo.likelihood import GaussianDensity
from nelbo.model import Model
from nelbo.particles import conditional, resample
from nelbo.process import Affine, Gaussian
from nelbo.reverse import Posterior
from nelbo.sample import complete
from nelbo.schedules import Linear

RHO = 0.9
COLUMNS = (
    Column("a", "real", missing=True),
    Column("b", "rounded", 1.0, 0.0, 4.0, missing=True),
    Column("c", "category", categories=("u", "v"), missing=True),
    Column("d", "boolean", categories=("false", "true")),
)


class Best(nn.Module):
    """E[x|z_t] of two standard normals with the correlation RHO."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.cov = torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=torch.float64)

    def forward(self, z, gamma):
        alpha, noise = torch.sigmoid(-gamma), torch.sigmoid(gamma)
        total = alpha[:, None, None] * self.cov + noise[:, None, None] * torch.eye(2)
        right = torch.linalg.solve(total, z[..., None])[..., 0]
        return self.one * alpha[:, None].sqrt() * right @ self.cov


def test_weighted_particles_draw_from_the_conditional_law():
    """x_2|x_1 = 2 is N(2ρ, 1-ρ²), to the error of the draws; one particle is far from it."""
    decoder = GaussianDensity(Affine(), 0.05).requires_grad_(False)
    process = Gaussian(Linear(-6.0, 6.0), Affine())
    best = Model(Best(), process, Data(), Posterior(), decoder, (2,))
    n = 1000
    x = torch.tensor([[2.0, 0.0]], dtype=torch.float64).expand(n, 2)
    known = torch.tensor([True, False]).expand(n, 2)
    grid, found = Grid.uniform(32), {}
    for k in (1, 64):
        found[k] = conditional(best, x, known, grid, particles=k, seed=2)
        assert found[k][:, 0].eq(2.0).all()
    mean, std = (f(found[64][:, 1]).item() for f in (torch.mean, torch.std))
    sigma = math.sqrt(1 - RHO**2)
    # 32 steps give these two numbers a variance of 0.83 and a covariance of 0.75: 1.80 and 0.40
    assert abs(mean - 2 * RHO) < 0.05 and abs(std - sigma) < 0.06
    assert abs(found[1][:, 1].mean().item() - 2 * RHO) > 0.2
    kept = complete(best, x, known, grid, seed=2)[:, 1].mean().item()
    assert abs(mean - 2 * RHO) < abs(kept - 2 * RHO)


def test_particles_come_as_often_as_they_weigh():
    with seeded(0):
        log_w = torch.tensor([[0.1, 0.2, 0.7, 0.0], [0.3, 0.2, 0.25, 0.25]]).log()
        drawn = torch.stack([resample(log_w)[0] for _ in range(2000)])
    often = torch.stack([(drawn[:, :4] == k).sum(1) for k in range(4)], 1).double()
    assert ((often - 4 * log_w[0].exp()).abs() <= 1).all()
    torch.testing.assert_close(often.mean(0), 4 * log_w[0].double().exp(), rtol=0, atol=0.03)
    assert (drawn[:, 4:] == torch.arange(4, 8)).all()  # weights alike enough: left alone
    after = resample(log_w)[1]
    assert after[:4].eq(0).all() and after[4:].equal(log_w[1])


def untrained(columns):
    schema = Schema.of_table(columns)
    config = ModelConfig(
        process="product",
        head="columns",
        step="columns",
        decoder="columns",
        network="table",
        width=8,
        depth=1,
    )
    with seeded(1):
        return build(config, schema)


def test_cells_that_are_drawn_are_never_missing_nor_new():
    """Though most cells of the training rows were."""
    frame = pl.DataFrame(
        {
            "a": [None] * 30 + [0.1234567 * i for i in range(10)],
            "b": [None] * 30 + [0, 1, 2, 3, 4] * 2,
            "c": [None] * 30 + ["u", "v"] * 5,
            "d": [True, False] * 20,
        }
    )
    model = untrained(COLUMNS)
    model.start_from(torch.from_numpy(encode(frame, COLUMNS, "t")[0]))
    x, known = map(torch.from_numpy, encode_holes(frame[:30], COLUMNS, "t"))
    assert known[0].sum() == 2 and known.eq(known[0]).all()  # d, and the symbol beside a
    before = conditional(model, x, known, Grid.uniform(4), particles=4)
    x = conditional(present(model), x, known, Grid.uniform(4), particles=4)
    schema = Schema.of_table(COLUMNS)
    made, worse = (decode(v.numpy(), schema.columns) for v in (x, before))
    assert made.null_count().sum_horizontal().item() == 0
    assert worse.null_count().sum_horizontal().item() > 30
    assert set(made["c"]) == {"u", "v"}
    assert made["d"].to_list() == ["true", "false"] * 15


def test_holes_are_told_from_cells():
    frame = pl.DataFrame(
        {"d": ["true", None], "c": [None, "w"], "b": [None, 3.0], "a": [None, 0.123456789]}
    )
    x, known = encode_holes(frame, COLUMNS, "t")
    whole = encode(frame[1:].with_columns(pl.lit("true").alias("d")), COLUMNS, "t")[0]
    assert (x[1, known[1]] == whole[0, known[1]]).all()  # "w" is new, and known as that
    assert known.sum(1).tolist() == [2, 4]
    with pytest.raises(ValueError, match="t has no column 'd'"):
        encode_holes(frame.drop("d"), COLUMNS, "t")


def test_missing_cells_of_rows_follow_the_others(of_words, tmp_path, capsys):
    run, frame = of_words
    odd = pl.int_range(pl.len()) % 2 == 1
    rows = frame[:60].with_columns(
        pl.when(odd).then(None).otherwise(pl.col("x")).alias("x"),
        pl.when(odd).then(pl.col("where")).otherwise(None).alias("again"),
    )
    rows = rows.select("id", "x", "again", "where")  # found by name
    rows.write_csv(tmp_path / "rows.csv")
    command = ["sample", str(run.path), "--impute", str(tmp_path / "rows.csv"), "--steps", "12"]
    command += ["--grid", "uniform", "--particles", "16", "--out"]
    with pytest.raises(SystemExit) as stop:
        main([*command, str(tmp_path / "out.parquet")])
    assert not stop.value.code, capsys.readouterr().err
    made = pl.read_parquet(tmp_path / "out.parquet")
    assert made.columns == rows.columns and made.null_count().sum_horizontal().item() == 0
    assert made["id"].cast(pl.Int64).equals(rows["id"])
    hole = rows["x"].is_null()
    x = made["x"].cast(pl.Float64)
    assert x.filter(~hole).to_list() == pytest.approx(rows["x"].drop_nulls().to_list())
    side = made["where"].replace_strict({"left": -1, "right": 1})
    assert ((side * x).filter(hole) > 0).mean() > 0.9
    assert (made["again"] == made["where"]).filter(~hole).mean() > 0.9
    again = impute(run, rows, Grid.uniform(12), particles=16)
    other = impute(run, rows, Grid.uniform(12), particles=16, seed=1)
    assert again["x"].equals(impute(run, rows, Grid.uniform(12), particles=16)["x"])
    assert not other["x"].equals(again["x"])
    assert impute(run, frame[1:2], Grid.uniform(2)).equals(frame[1:2])  # nothing to draw


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--n", "3"], "--impute completes a table into"),
        (["--particles", "0"], "particles must be at least 1; got 0"),
    ],
)
def test_impossible_options_are_one_line(of_words, tmp_path, capsys, options, says):
    (tmp_path / "rows.csv").write_text("where,again,x\nleft,,1.5\n")
    command = ["sample", str(of_words[0].path), "--impute", str(tmp_path / "rows.csv")]
    command += ["--grid", "uniform", "--steps", "2", "--out", str(tmp_path / "o.csv"), *options]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and not (tmp_path / "o.csv").exists()
    assert says in capsys.readouterr().err


def test_only_tables_have_cells(trained, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("a,b\n1,\n")
    command = ["sample", str(trained), "--impute", str(tmp_path / "rows.csv"), "--steps", "2"]
    with pytest.raises(SystemExit):
        main([*command, "--grid", "uniform", "--out", str(tmp_path / "o.npz")])
    assert "--impute completes a table" in capsys.readouterr().err
