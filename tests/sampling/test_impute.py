"""Cells and dimensions drawn given the others: against closed forms, and as a user does it."""

import math
import re

import numpy as np
import polars as pl
import pytest
import torch
from support.commands import run_ok
from torch import nn

from nelbo._utils.numerics import seeded
from nelbo.cli import main
from nelbo.data.columns import Column
from nelbo.data.schema import Schema
from nelbo.data.tabular.encoding import decode, encode, encode_holes, outside_training
from nelbo.diffusion.decoder import GaussianDensity
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import XPrediction
from nelbo.diffusion.reverse import Posterior
from nelbo.diffusion.schedules import Linear
from nelbo.diffusion.times import TimeGrid
from nelbo.models.build import build
from nelbo.models.config import ModelConfig
from nelbo.runs.loading import load
from nelbo.sampling.imputation import impute, present, sample_table, within
from nelbo.sampling.samplers import complete, rejection
from nelbo.sampling.smc import conditional, resample

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


@pytest.mark.slow
def test_weighted_particles_draw_from_the_conditional_law():
    """x_2|x_1 = 2 is N(2ρ, 1-ρ²), to the error of the draws; one particle is far from it."""
    decoder = GaussianDensity(Affine(), 0.05).requires_grad_(False)
    process = GaussianDiffusion(Linear(-6.0, 6.0), Affine())
    best = Model(Best(), process, XPrediction(), Posterior(), decoder, (2,))
    n = 1000
    x = torch.tensor([[2.0, 0.0]], dtype=torch.float64).expand(n, 2)
    known = torch.tensor([True, False]).expand(n, 2)
    grid, found = TimeGrid.uniform(32), {}
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
    model.fit_statistics(torch.from_numpy(encode(frame, COLUMNS, "t")[0]))
    x, known = map(torch.from_numpy, encode_holes(frame[:30], COLUMNS, "t"))
    assert known[0].sum() == 2 and known.eq(known[0]).all()  # d, and the symbol beside a
    before = conditional(model, x, known, TimeGrid.uniform(4), particles=4)
    x = conditional(present(model), x, known, TimeGrid.uniform(4), particles=4)
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
    again = impute(run.model, run.config.schema, rows, TimeGrid.uniform(12), particles=16)
    other = impute(run.model, run.config.schema, rows, TimeGrid.uniform(12), particles=16, seed=1)
    assert again["x"].equals(
        impute(run.model, run.config.schema, rows, TimeGrid.uniform(12), particles=16)["x"]
    )
    assert not other["x"].equals(again["x"])
    assert impute(run.model, run.config.schema, frame[1:2], TimeGrid.uniform(2)).equals(
        frame[1:2]
    )  # nothing to draw


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--n", "3"], "--impute writes the completed table"),
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
    assert "--impute writes the completed table" in capsys.readouterr().err


# ---- new rows


def test_rejection_draws_from_the_law_within_a_set_and_gives_up_in_time():
    """A normal law above 1: its mean there is φ(1)/(1 - Φ(1)); the first draws stay."""

    def draw(rows, seed):
        with seeded(seed):
            return torch.randn(len(rows), 1, dtype=torch.float64) + 100.0 * (rows[:, None] % 2)

    def above(limit):
        return lambda x: (x - 100.0 * (x > 50)).squeeze(1) > limit

    n = 4000
    found = rejection(draw, n, above(1.0), seed=3)
    part = 0.5 * math.erfc(math.sqrt(0.5))  # 1 - Φ(1)
    mean = math.exp(-0.5) / math.sqrt(2 * math.pi) / part
    kind = 100.0 * (torch.arange(n) % 2)
    z = found.x[:, 0] - kind  # each row is of its own law
    assert z.min() > 1 and abs(z.mean().item() - mean) < 5 * 0.45 / math.sqrt(n)
    assert abs(1 - found.outside / found.drawn - part) < 5 * math.sqrt(part / found.drawn)
    first, kept = draw(torch.arange(n), 3), above(1.0)(draw(torch.arange(n), 3))
    assert found.x[kept].equal(first[kept])
    alike = rejection(draw, n, lambda x: torch.ones(len(x), dtype=torch.bool), seed=3)
    assert alike.x.equal(first) and (alike.drawn, alike.outside) == (n, 0)
    for count, limit in ((1, 4.5), (n, 2.5)):
        with pytest.raises(ValueError, match=r"only \d+ of \d+ samples"):
            rejection(draw, count, above(limit))
    calls = []

    def stubborn(rows, seed):  # one row of many is never inside
        calls.append(len(rows))
        return torch.where(rows == 7, -1.0, 1.0)[:, None]

    with pytest.raises(ValueError, match="samples that the model drew lie in"):
        rejection(stubborn, n, lambda x: x[:, 0] > 0)
    assert len(calls) < 20 and sum(calls) < 2 * n


def test_what_training_had():
    """Codes of nothing that was seen, and numbers beyond their ranges, are outside it."""
    columns = (
        Column("a", "real", missing=True, range=(-1.0, 2.0)),
        Column("b", "rounded", 1.0, 1.0, 12.0, missing=True),
        Column("c", "category", categories=("u", "v"), missing=True),
        Column("e", "rounded", 0.01, 0.0, 50.0),
    )
    frame = pl.DataFrame(
        {
            "a": [0.5, None, 2.0, 2.1, 0.0, 0.0, 0.0, 0.0],
            "b": [1.0, None, 12.0, 5.0, 13.0, 0.0, 5.0, 5.0],
            "c": ["u", None, "v", "u", "u", "u", "w", "u"],
            "e": [0.0, 1.0, 50.0, 3.0, 3.0, 3.0, 3.0, 50.01],
        }
    )
    x, _ = encode(frame, columns, "t")
    at = np.argwhere(outside_training(x, columns)).tolist()
    assert at == [[3, 0], [4, 1], [5, 1], [6, 2], [7, 3]]
    unknown = (Column("a", "real"),)
    assert not outside_training(np.array([[1e9]]), unknown).any()


def test_rows_that_are_drawn_lie_in_what_training_had(tmp_path, capsys):
    """By the command line and by Python the same rows, and as modelled others beside them."""
    rows = [f"{i % 12 + 1},{'ABC'[i % 3]},{(7 * i % 100) / 8}" for i in range(150)]
    (tmp_path / "t.csv").write_text("month,city,spend\n" + "\n".join(rows) + "\n")
    run, out = tmp_path / "run", tmp_path / "s.csv"
    options = ("--steps", 2, "--width", 8, "--depth", 1, "--batch", 16)
    run_ok("train", tmp_path / "t.csv", "--out", run, *options)
    grid = ("--steps", 2, "--grid", "uniform")
    run_ok("sample", run, "--n", 300, *grid, "--out", out)
    said = capsys.readouterr().err
    assert re.search(r"redrawn: [1-9]\d* of \d+ rows \(\d+\.\d%\)", said)
    made = pl.read_csv(out)
    assert made["month"].is_between(1, 12).all() and made["spend"].is_between(0, 99 / 8).all()
    assert set(made["city"]) <= set("ABC")
    loaded, times, told = load(run), TimeGrid((0.5, 1.0)), []
    assert sample_table(loaded.model, loaded.config.schema, 300, times, tell=told.append).equals(
        made
    )
    assert told[0] in said
    run_ok("sample", run, "--n", 300, *grid, "--out", tmp_path / "m.csv", "--as-modelled")
    assert "redrawn" not in capsys.readouterr().err
    own = pl.read_csv(tmp_path / "m.csv")
    assert sample_table(loaded.model, loaded.config.schema, 300, times, as_modelled=True).equals(
        own
    )
    inside = (
        own["month"].is_between(1, 12)
        & own["spend"].is_between(0, 99 / 8)
        & own["city"].is_in(["A", "B", "C"])
    )
    assert not inside.all() and own.filter(inside).equals(made.filter(inside))
    with pytest.raises(SystemExit):
        main(["sample", str(run), "--impute", str(out), "--out", "x.csv", "--as-modelled"])


def test_a_hopeless_law_is_said_in_a_sentence():
    """Nothing is drawn without end where no row can lie in the ranges."""
    columns = (Column("a", "real", range=(0.0, 1.0)),)
    with pytest.raises(ValueError, match=r"only 0 of .* --as-modelled$"):
        within(lambda rows, seed: rows[:, None] + 7.0, 5, Schema.of_table(columns), 0)

    def refuses(rows, seed):
        raise ValueError("other reasons")

    with pytest.raises(ValueError, match=r"^other reasons$"):
        within(refuses, 5, Schema.of_table(columns), 0)
