"""The page about a run: its numbers are the bound's, it stands alone, it follows from the seed."""

import importlib
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pages import Page

from nelbo._utils.numerics import LOG_2, seeded
from nelbo.cli import app
from nelbo.data import Schema, as_examples
from nelbo.data.columns import Column
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.elbo import diffusion_term, prior_term, reconstruction_term
from nelbo.diffusion.model import measuring
from nelbo.diffusion.reverse import Posterior
from nelbo.diffusion.schedules import even_times
from nelbo.diffusion.times import TimeGrid
from nelbo.evaluation.evaluate import evaluate
from nelbo.evaluation.per_dimension import by_dimension
from nelbo.report import markup, sections, studies
from nelbo.report.figures import readable
from nelbo.report.reproduce import train_command
from nelbo.report.sections import training
from nelbo.report.studies import measure_steps, trajectory
from nelbo.runs import grids, own_data
from nelbo.runs.pilot_cache import Pilots
from nelbo.runs.train import train
from nelbo.sampling.samplers import ancestral

STEPS = (2, 4, 8)
SMALL = {"steps": 5, "batch": 16, "width": 8, "depth": 1, "evaluate_every": 5}


def vectors(count: int = 60, dims: int = 5) -> np.ndarray:
    return np.random.default_rng(3).normal(size=(count, dims)).cumsum(1).astype(np.float32)


def integers(count: int, *shape: int, levels: int) -> np.ndarray:
    return np.random.default_rng(4).integers(0, levels, (count, *shape)).astype(np.uint8)


DATA = {
    "vectors with levels": (lambda: integers(60, 3, levels=6), {}),
    "real vectors": (vectors, {"step": "optimal"}),
    "one real column": (lambda: vectors(60, 1), {"step": "beta"}),
    "real images": (lambda: integers(60, 1, 5, 7, levels=9) / np.float32(3), {}),
    "colour": (lambda: integers(60, 3, 5, 7, levels=4), {}),
    "absorbing": (lambda: integers(60, 1, 5, 7, levels=4), {"process": "absorbing"}),
    "absorbing vectors": (lambda: integers(60, 70, levels=3), {"process": "absorbing"}),
    "noise and learned variance": (
        lambda: integers(60, 4, levels=5),
        {"head": "noise", "step": "learned"},
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _quick_grids():
    """The best grids are not measured here; they are some other ones than the uniform ones."""

    def early(model, x, steps, **_):
        return TimeGrid(even_times(model.process.schedule, steps, steps) ** 1.5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grids, "best_grid", early)
        patch.setattr(studies, "CODED_STEPS", (2, 3))
        for module in (studies, sections):
            patch.setattr(module, "STEPS", STEPS)
        yield


@pytest.fixture(scope="module", params=DATA)
def run(request, tmp_path_factory):
    make, options = DATA[request.param]
    folder = tmp_path_factory.mktemp("run")
    np.save(folder / "data.npy", make())
    return train(str(folder / "data.npy"), folder / "run", **SMALL, **options)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "run"
    run = train("digits", out, **SMALL)
    select = own_data.select

    def of_few(config, dataset, source, split):
        """A dozen of the test examples are enough here."""
        batch, name = select(config, dataset, source, split)
        return (batch[:12] if config is run.config and name == "test" else batch), name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_data, "select", of_few)
        yield run


def write(run, out: Path, seed: int = 0) -> str:
    from nelbo.report import report

    assert report(run, out, seed) == out
    return out.read_text(encoding="utf-8")


def check(text: str) -> None:
    page = Page(text)
    assert not page.stack
    assert not page.tags & {"script", "link", "iframe", "object", "base"}
    for reference in page.references:
        assert reference.startswith(("#", "data:image/png;base64,")), reference
        assert not reference.startswith("#") or reference[1:] in page.ids
    assert len(page.ids) == len(set(page.ids))
    style = text[text.index("<style>") : text.index("</style>")]
    assert text.count("<style") == 1 and "url(" not in style and "@import" not in style
    assert "$" not in text.split("<pre>")[0]
    assert not re.search(r"\bnan\b|\binf\b", re.sub("base64,[^\"']*", "", text))


def test_page_of_any_run_stands_alone(run, tmp_path):
    """Nothing is loaded from elsewhere, every tag is closed, no number is missing."""
    text = write(run, tmp_path / "report.html")
    check(text)
    density = run.config.schema.levels is None
    assert ("bits/dim" in text) != density
    assert ("nats per example. P is a density" in text) == density
    assert "<h2>Training</h2>" in text
    assert ("<h2>What the bits buy</h2>" in text) != density


def test_run_without_validation_shows_no_training(run):
    assert training(replace(run, metrics=[]), "bits/dim") == ""


def test_short_times_are_milliseconds():
    shown = {0.00036: "0.36 ms", 0.0994: "99 ms", 0.0996: "0.1 s", 1.23: "1.2 s", 14.4: "14 s"}
    assert {value: markup.seconds(value) for value in shown} == shown


def test_a_table_without_a_heading_has_no_row_for_one():
    assert markup.html_table((), [("a", "b")]) == "<table><tr><td>a</td><td>b</td></tr></table>"
    assert markup.html_table(("x",), [("a",)]).count("<tr>") == 2


def without_seconds(text):
    """All of the page but the times of the codecs, by which its rows are not sorted."""
    return re.sub(r'class="time">[^<]*<', "", text)


def test_page_states_the_bound_of_evaluate_and_follows_from_the_seed(digits, tmp_path):
    text, again = (write(digits, tmp_path / name, seed=3) for name in ("a.html", "b.html"))
    assert without_seconds(text) == without_seconds(again)
    check(text)
    x, known = as_examples(digits.batch()[0].x), digits.examples(split="train")
    result = evaluate(digits.model, x, known=known, pilots=Pilots(digits), seed=3)
    shown = re.search(r'class="number">([\d.]+) <small>± ([\d.]+) bits/dim', text)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(result.bits_per_dim, abs=6e-4)
    assert float(shown[2]) == pytest.approx(result.standard_error.total, rel=0.06)
    assert result.model_hash in text and result.data_hash in text
    assert f"nelbo evaluate {digits.path} --seed 3" in text


def test_train_command_is_one_the_command_line_takes(digits):
    words = shlex.split(train_command(digits).replace("\\\n", " "))
    assert words[:5] == ["nelbo", "train", "digits", "--out", str(digits.path)]
    options = {words[i][2:].replace("-", "_"): words[i + 1] for i in range(5, len(words), 2)}
    stated = digits.config.model.to_dict() | digits.config.train.to_dict() | {"levels": 17}
    assert options == {
        name: str(value) for name, value in stated.items() if name != "grid" and value is not False
    }
    app.parse_args(words[1:], exit_on_error=False, print_error=False)


def test_flags_of_a_training_are_flags_of_its_command(digits):
    train = replace(digits.config.train, compile=True)
    command = train_command(replace(digits, config=replace(digits.config, train=train)))
    words = shlex.split(command.replace("\\\n", " "))
    assert words[words.index("--compile") + 1].startswith("--") or words[-1] == "--compile"
    assert "--shard" not in words


def test_dimensions_add_up_to_the_terms_of_the_same_draws(run):
    x, grid = as_examples(run.examples()), TimeGrid.uniform(4)
    x = x[Batch(x).order]  # in which draws are made
    (found,) = by_dimension(run.model, x, grid, seed=5)
    t = grid.times[:, None].expand(-1, len(x))
    with measuring(run.model), seeded(5, 0):
        expected = (
            prior_term(run.model, x, t[-1]),
            reconstruction_term(run.model, x, t[0]).cost,
            sum(diffusion_term(run.model, x, t[i], t[i + 1]).cost for i in range(3)),
        )
    for each, total in zip(found, expected, strict=True):
        assert each.shape == x.shape
        torch.testing.assert_close(each.flatten(1).sum(1), total, rtol=1e-9, atol=1e-9)


def test_curves_and_costs_are_of_one_measurement(digits):
    x = as_examples(digits.batch()[0].x)
    step = digits.model.step
    limit = torch.arange(len(x), dtype=torch.float64)
    curves, cost = measure_steps(digits.model, Batch(x), limit, seed=2)
    assert digits.model.step is step
    mixture, gaussian = curves
    assert (mixture.name, gaussian.name) == ("mixture step", "Gaussian step, σ² = β̃")
    last = mixture.values[-1], mixture.errors[-1]
    assert last == (gaussian.values[-1], gaussian.errors[-1])
    expected = limit.mean().item(), limit.std().item() / len(x) ** 0.5
    assert last == pytest.approx([v / digits.model.dims / LOG_2 for v in expected], rel=1e-12)
    # The own step is the mixture; its last grid is the one whose dimensions are shown.
    each = cost.flatten(1).sum(1) / digits.model.dims
    assert mixture.values[len(STEPS) - 1] == pytest.approx(each.mean().item(), rel=1e-12)
    error = each.std().item() / len(x) ** 0.5
    assert mixture.errors[len(STEPS) - 1] == pytest.approx(error, rel=1e-9)
    _, bound = by_dimension(digits.model, x, TimeGrid.uniform(8), (step, Posterior()), seed=2)
    nats = -bound.elbo.flatten(1).sum(1).mean().item()
    assert gaussian.values[STEPS.index(8)] == pytest.approx(
        nats / digits.model.dims / LOG_2, rel=1e-12
    )


@pytest.mark.parametrize("numbers", [2**23, 1], ids=["at once", "row by row"])
def test_path_ends_in_the_ancestral_samples(run, numbers, monkeypatch):
    monkeypatch.setattr("nelbo.diffusion.model.ROWS", numbers)
    path = trajectory(run.model, 7, TimeGrid.uniform(9), seed=6)
    assert torch.equal(path.x, ancestral(run.model, 7, TimeGrid.uniform(9), seed=6))
    assert path.times[0] == 1 and path.times == sorted(path.times, reverse=True)
    assert len(path.times) == len(path.z) == len(path.e_hat) == 8
    assert all(len(seen) == 7 for seen in (*path.z, *path.e_hat))


def test_axis_is_readable_with_a_far_value():
    low, top = readable([243, 16.9, 4.3, 2.6, 2.1, 1.9, 1.75])
    assert low < 1.75 and 2.6 < top < 10
    low, top = readable([2.2, 2.1, 2.0, 1.9])
    assert low < 1.9 and top > 2.2
    low, top = readable([3.0, 3.0])
    assert low < 3 < top


def test_the_best_grids_stand_before_the_uniform_ones(digits):
    """The model's own step on the grids given, in full, then the same on uniform ones, thin."""
    x = as_examples(digits.batch()[0].x[:8])

    def late(steps):
        return TimeGrid(TimeGrid.uniform(steps).times ** 0.5)

    curves, _ = measure_steps(digits.model, Batch(x), torch.zeros(len(x)), seed=2, best=late)
    names = "mixture step, best grid", "mixture step, uniform grid", "Gaussian step, σ² = β̃"
    assert tuple(curve.name for curve in curves) == names
    assert [curve.thin for curve in curves] == [False, True, False]
    for curve, grid in zip(curves, (late, TimeGrid.uniform), strict=False):
        (bound,) = by_dimension(digits.model, x, grid(4), seed=2)
        bits = sum(term.sum().item() for term in bound) / (8 * digits.model.dims * LOG_2)
        assert curve.values[STEPS.index(4)] == pytest.approx(bits, rel=1e-9)
    assert curves[0].values[-1] == curves[1].values[-1]


def test_a_table_is_compared_with_synthetic_rows(tmp_path, monkeypatch):
    pytest.importorskip("polars")
    monkeypatch.setattr(importlib.import_module("nelbo.report"), "SYNTHETIC", 40)
    random = np.random.default_rng(5)
    rows = [f"{random.normal():.7f},{i % 7 / 2},{random.choice(['a', '<b>'])}" for i in range(60)]
    rows[3] = ",1.5,a"
    (tmp_path / "rows.csv").write_text("\n".join(["x,y,z", *rows]) + "\n")
    run = train(str(tmp_path / "rows.csv"), tmp_path / "run", **SMALL)
    page = write(run, tmp_path / "report.html")
    check(page)
    assert "Synthetic rows" in page and "40 synthetic rows beside 6 real ones" in page
    assert re.search(r"Synthetic rows: (redrawn: \d+ of \d+ rows|as the model draws them)", page)


def test_synthetic_rows_are_those_of_sample(monkeypatch):
    """Rows beyond the range of training are drawn again, or said to be kept where all are."""
    pytest.importorskip("polars")
    report = importlib.import_module("nelbo.report")

    def draw(model, count, grid, seed, track, condition=None):
        with seeded(seed):
            return torch.randn(count, 1, dtype=torch.float64)

    monkeypatch.setattr(report, "ancestral", draw)
    for ends, said in (((-1.0, 2.0), "redrawn: "), ((50.0, 60.0), "as the model draws them")):
        schema = Schema.of_table([Column("a", "real", range=ends)])
        x, how = report._rows(None, None, 200, schema, TimeGrid.uniform(2), 0, iter)
        assert len(x) == 200 and how.startswith(said)
        assert ((x >= -1) & (x <= 2)).all() == (ends[0] == -1)
