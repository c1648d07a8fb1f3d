"""Scores by name: what they are, where an example ranks, and the command that writes them."""

import csv
import io
import math
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image
from support.commands import nelbo_fails, run_ok

from nelbo import data
from nelbo._utils import tensor_files
from nelbo._utils.numerics import seeded
from nelbo.data import Schema, as_examples
from nelbo.diffusion.model import measuring
from nelbo.diffusion.times import TimeGrid, elbo, stratified
from nelbo.evaluation.anomaly_scores import Scored, Scorer, code_length
from nelbo.evaluation.evaluate import evaluate
from nelbo.report.score_figure import histogram
from nelbo.runs import own_data
from nelbo.runs.loading import load
from nelbo.runs.train import train
from nelbo.sampling.samplers import ancestral
from nelbo.testing import assert_mean


@pytest.fixture(scope="module")
def run(trained):
    return load(trained)


@pytest.fixture(scope="module")
def x(run):
    return run.examples()[:6]


def scorer(run, name, **options):
    reference = own_data.load(run.config).splits["validation"][:20]
    return Scorer(name, run.config.schema, run.model, reference, calls=8, **options)


def test_each_definition_is_the_bound_and_what_its_name_says(run, x):
    bound, complexity, typicality = (
        scorer(run, name) for name in ("bound", "complexity", "typicality")
    )
    nats = bound(x).nats
    torch.testing.assert_close(bound(x).score, nats)
    length = code_length(x, run.config.schema)
    torch.testing.assert_close(complexity(x).score, nats - length)
    torch.testing.assert_close(typicality(x).score, (nats - bound.reference.mean()).abs())
    assert bound(x).bits == pytest.approx(1 / (64 * math.log(2)))


def test_the_bound_of_an_example_and_its_error(run, x):
    """By 48 seeds: their mean is the bound, their spread the error they state."""
    each = [scorer(run, "bound", seed=seed)(x) for seed in range(48)]
    nats = torch.stack([found.nats for found in each])
    with seeded(0), measuring(run.model):
        many = as_examples(x).repeat_interleave(100, 0)
        truth = elbo(run.model, many, u=stratified(len(many), 4)).elbo.reshape(len(x), -1).mean(1)
    assert_mean(nats, -truth, 20.0)
    stated = torch.stack([found.standard_error for found in each]).square().mean().sqrt()
    assert 0.7 < stated / nats.var(0).mean().sqrt() < 1.4


def test_codes_are_lossless_and_simple_images_are_short():
    """A PNG of the levels; longer for noise than for nothing; zlib for what is no image."""
    image = Schema("levels", (1, 8, 8), 17)
    noise = torch.randint(17, (1, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    x = torch.cat([torch.zeros_like(noise), noise]).to(torch.uint8)
    short, long = code_length(x, image) / (8 * math.log(2))
    assert long > short + 20
    file = io.BytesIO()
    Image.fromarray(x[1, 0].numpy()).save(file, "PNG", optimize=True)
    assert long == len(file.getvalue())
    assert code_length(x.flatten(1), Schema("levels", (64,), 17)).diff() > 20


def test_rank_and_percentile():
    score, zeros = torch.tensor([0.0, 2.0, 2.5, 9.0]), torch.zeros(4)
    found = Scored(score, score, zeros, torch.tensor([1.0, 2.0, 3.0, 4.0]), None)
    assert found.rank.tolist() == [5, 3, 3, 1]
    assert found.percentile.tolist() == [0.0, 37.5, 50.0, 100.0]
    assert b"bits_per_dim" not in found.csv()


def test_held_out_examples_of_the_same_law_rank_anywhere(run):
    """Each half of a split among the other: the mean percentile is 50 within its error."""
    half, rest = own_data.load(run.config).splits["test"][:120].split(60)
    found = Scorer("bound", run.config.schema, run.model, half, calls=8)(rest)
    assert abs(found.percentile.mean().item() - 50) < 4 * 100 * math.sqrt(2 / 12 / 60)


def test_what_makes_no_sense_is_refused(run):
    real = Schema("real", (3,), None)
    with pytest.raises(ValueError, match="lossless code, which real numbers"):
        Scorer("complexity", real, run.model, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="score must be one of bound, complexity, typicality"):
        scorer(run, "surprise")


def test_a_picture_of_the_scores():
    normal = torch.randn(100, generator=torch.Generator().manual_seed(0))
    with Image.open(io.BytesIO(histogram({"train": normal, "new": normal + 1}, "nats"))) as image:
        ink = (np.asarray(image.convert("RGB")).min(-1) < 128).mean()
    assert 0.001 < ink < 0.5
    histogram({"one": torch.zeros(1), "new": torch.zeros(1)}, "nats")


def test_columns_that_make_a_row_strange(of_words, tmp_path):
    """Their parts are the whole but for the noise; the cell that contradicts the rest leads."""
    run, frame = of_words
    rows = frame.select("where", "again", "x").filter(pl.col("again").is_not_null())[:40]
    turned = rows.with_columns(
        pl.when(pl.int_range(pl.len()) == 7).then(-pl.col("x")).otherwise(pl.col("x")).alias("x")
    )
    reference = own_data.load(run.config).splits["validation"]
    score = Scorer("bound", run.config.schema, run.model, reference, calls=384)  # or noise ranks
    x = data.load_like(rows, run.config.schema).splits["all"]
    odd = data.load_like(turned, run.config.schema).splits["all"]
    found, strange = score(x), score(odd)
    whole = found.excess.sum(1) + score.usual.sum()
    # a grid of 32 steps is a little above continuous time, and one draw of it noisy
    assert abs((whole - found.nats).mean()) < 1.0
    assert strange.columns == ("where", "again", "x")
    assert strange.excess[7].sum() > found.excess[7].sum() + 2
    assert strange.rank[7] == 1
    turned.write_csv(tmp_path / "rows.csv")
    out = tmp_path / "scores.csv"
    run_ok("score", str(run.path), str(tmp_path / "rows.csv"), "--out", str(out))
    lines = list(csv.DictReader(out.read_text().splitlines()))
    assert [lines[7][f"column_{k}"] for k in (1, 2, 3)] == [
        strange.columns[i] for i in strange.excess[7].argsort(descending=True).tolist()
    ]
    assert float(lines[7]["nats_1"]) >= float(lines[7]["nats_2"]) >= float(lines[7]["nats_3"])


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    path = tmp_path_factory.mktemp("few") / "few.npz"
    np.savez(path, x=data.load("digits").splits["test"][:3].numpy())
    return path


def test_the_command(trained, few, tmp_path):
    out, figure = tmp_path / "scores.csv", tmp_path / "scores.png"
    options = ["--out", str(out), "--figure", str(figure), "--calls", "8"]
    run_ok("score", str(trained), str(few), *options)
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["example"] for row in rows] == ["0", "1", "2"]
    for row in rows:
        assert float(row["nats"]) == pytest.approx(
            float(row["bits_per_dim"]) * 64 * math.log(2), rel=1e-4
        )
        assert 0 <= float(row["percentile"]) <= 100 and float(row["standard_error"]) > 0
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--out", "scores.txt"), "must end in .csv"),
        (("--out", "s.csv", "--figure", "f.pdf"), "must end in .png"),
        (("--out", "s.csv", "--score", "beauty"), "bound"),
        (("--out", "s.csv", "--calls", "1"), "at least 8"),
    ],
)
def test_bad_options_are_one_line(trained, few, tmp_path, monkeypatch, capsys, options, says):
    monkeypatch.chdir(tmp_path)
    assert says in nelbo_fails(capsys, "score", trained, few, *options)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def far_run(tmp_path_factory):
    """A run of arrays, and of a table, and rows further and further out for each."""
    folder, random = tmp_path_factory.mktemp("far"), np.random.default_rng(0)
    rows = random.normal(size=(200, 2))
    far = [[0.1, 0.2], [1e13, 0.0], [0.0, -1e21], [3.4e38, 0.0], [0.0, 1e100], [-1.7e308, 0.0]]
    np.savez(folder / "train.npz", x=rows)
    np.savez(folder / "far.npz", x=np.array(far))
    names = ["a", "b"]
    pl.DataFrame(rows, schema=names, orient="row").write_csv(folder / "train.csv")
    pl.DataFrame(far, schema=names, orient="row").write_csv(folder / "far.csv")
    for kind in ("npz", "csv"):
        options = {"steps": 3, "width": 8, "depth": 1}
        train(str(folder / f"train.{kind}"), folder / kind, **options)
    return folder


@pytest.mark.parametrize("kind", ["npz", "csv"])
def test_rows_out_of_all_range_are_the_most_anomalous(far_run, kind):
    """Beyond 1e19 the squares of float32 overflow, beyond 1e154 those of float64."""
    run_ok("score", far_run / kind, far_run / f"far.{kind}", "--out", far_run / "s.csv")
    found = list(csv.DictReader((far_run / "s.csv").read_text().splitlines()))
    assert not any(value == "nan" for row in found for value in row.values())
    assert float(found[0]["percentile"]) < 100
    assert [float(row["percentile"]) for row in found[1:]] == [100.0] * 5
    assert [int(row["rank"]) for row in found[1:]] == [1] * 5
    # most of these rows are extreme; what is usual is that of the reference
    assert 0 < float(found[0]["standard_error"]) < 10


@pytest.mark.parametrize("kind", ["npz", "csv"])
def test_no_bound_is_printed_that_is_not_a_number(far_run, kind, capsys):
    error = nelbo_fails(capsys, "evaluate", far_run / kind, "--data", far_run / f"far.{kind}")
    assert "example 4" in error and "too large" in error
    loaded = load(far_run / kind)
    x = loaded.examples(data=far_run / f"far.{kind}")
    with pytest.raises(ValueError, match=r"example 4 \(counted from 0; 2 in all\)"):
        evaluate(loaded.model, x)
    assert math.isfinite(evaluate(loaded.model, x[:3]).nats)


def test_weights_that_are_not_finite_are_refused(far_run, tmp_path, capsys):
    """Weights that are not finite are refused, in a loaded run and in a model without a file."""
    loaded = load(far_run / "npz")
    x = loaded.examples()
    weight = next(loaded.model.network.parameters())
    weight.data.view(-1)[0] = math.nan
    for use in (
        lambda: evaluate(loaded.model, x),
        lambda: ancestral(loaded.model, 2, TimeGrid.uniform(2)),
        lambda: Scorer("bound", loaded.config.schema, loaded.model, x),
    ):
        with pytest.raises(ValueError, match=r"not finite.*restore the weights"):
            use()
    broken = shutil.copytree(far_run / "npz", tmp_path / "broken")
    tensor_files.write_tensors(broken / "model.safetensors", loaded.model.state_dict(), {})
    for command in (
        ("evaluate", broken),
        ("score", broken, "--out", tmp_path / "s.csv"),
        ("sample", broken, "--out", tmp_path / "s.npz"),
    ):
        assert "not finite" in nelbo_fails(capsys, *command)
    assert not (tmp_path / "s.csv").exists()
