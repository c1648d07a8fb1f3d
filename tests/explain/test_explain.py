"""The page of the lecture: it stands alone, and its numbers are the library's."""

import itertools
import json
import re
from functools import reduce
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from support.pages import Page
from support.runs import TINY

import nelbo
from nelbo._utils.numerics import LOG_2, seeded, widened
from nelbo.diffusion.elbo import prior_term
from nelbo.diffusion.model import measuring
from nelbo.diffusion.times import TimeGrid, elbo
from nelbo.explain import run as run_page
from nelbo.explain import toy as toy_page
from nelbo.explain.panels import SOURCE
from nelbo.runs.train import train

SCRIPT = files("nelbo.explain").joinpath("page.js").read_text()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A page of few choices, and its values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_page, "STEPS", (1, 3))
        patch.setattr(toy_page, "DATA", (-1.3, 1.5))
        patch.setattr(toy_page, "DRAWS", 2)
        patch.setattr(toy_page, "CURVE", torch.linspace(-3, 3, 5, dtype=torch.float64))
        for table, kept in (("SCHEDULES", 1), ("PREDICTIONS", 2)):
            few = dict(itertools.islice(getattr(toy_page, table).items(), kept))
            patch.setattr(toy_page, table, few)
        out = tmp_path_factory.mktemp("toy") / "toy.html"
        assert nelbo.explain("toy", out) == out
        yield out.read_text(encoding="utf-8")


def values_of(text: str) -> dict:
    return json.loads(re.search(r'id="values">(.*?)</script>', text, re.DOTALL)[1])


def check_alone(text: str) -> None:
    page = Page(text)
    assert not page.stack
    assert not page.tags & {"link", "iframe", "object", "base"}
    for reference in page.references:
        assert reference.startswith((SOURCE, "data:image/png;base64,")), reference
    assert len(page.ids) == len(set(page.ids))
    assert "default-src 'none'" in text and "fetch(" not in text and "@import" not in text
    assert len(text) < 1.5e6
    assert not re.search(
        r"\b(nan|inf|NaN|Infinity)\b", text[text.index('id="values"') :].split("</script>")[0]
    )


def check_complete(found: dict) -> None:
    """For each combination of choices, each table has the value that the page looks up."""
    count = {choice["name"]: len(choice["options"]) for choice in found["choices"]}
    for name, table in found["tables"].items():
        every = itertools.product(*(range(count[choice]) for choice in table["of"]))
        assert {",".join(map(str, key)) for key in every} == set(table["at"]), name
    assert all(0 <= found["first"][name] < n for name, n in count.items())


def check_functions(text: str) -> None:
    """Each function that a panel names exists where it says."""
    named = re.findall(r"<code>([\w/]+\.py:[\w.]+)</code>", text)
    assert len(named) >= 6
    for place in named:
        file, name = place.split(":")
        module = import_module("nelbo." + file.removesuffix(".py").replace("/", "."))
        assert callable(reduce(getattr, name.split("."), module)), place


def test_the_page_stands_alone(toy):
    check_alone(toy)


def test_panels_name_functions_that_exist(toy):
    check_functions(toy)
    assert len(re.findall("Equations? ", toy)) == toy.count('class="panel')


def test_all_that_is_looked_up_is_there(toy):
    found = values_of(toy)
    check_complete(found)
    assert {*found["tables"]} <= {*re.findall(r'look\("(\w+)"', SCRIPT)}


def test_the_numbers_are_those_of_the_toy(toy):
    """Terms add up to −ELBO, and −ELBO = −log P(x) + KL."""
    tables = values_of(toy)["tables"]
    made = nelbo.toy(
        toy_page.even_log_snr(3),
        toy_page.ideal_f((-1.3, 1.5), toy_page.even_log_snr(3)),
        variance="beta_tilde",
    )
    at = made.bound([-1.3, 1.5])
    key = "1,1,0,1,0"  # x, steps, betas, variance, predicts
    assert tables["terms"]["of"] == ["x", "steps", "betas", "variance", "predicts"]
    terms = tables["terms"]["at"][key]
    assert len(terms) == 4
    assert terms[0] == pytest.approx(at.prior[1].item() / LOG_2, rel=1e-3)
    assert terms[1] == pytest.approx(at.diffusion[1, 1].item() / LOG_2, rel=1e-3)  # t = 3
    assert terms[3] == pytest.approx(at.reconstruction[1].item() / LOG_2, rel=1e-3)
    for key, terms in tables["terms"]["at"].items():
        total, evidence, gap = (tables[n]["at"][key] for n in ("total", "evidence", "gap"))
        assert sum(terms) == pytest.approx(total, abs=0.01 * max(1, abs(total)))
        assert total - evidence == pytest.approx(gap, abs=0.005 * max(1, abs(total)))
        assert gap >= 0
    below, density = (torch.tensor([*tables[n]["at"].values()]) for n in ("below", "density"))
    assert (below <= density + 1e-3).all()


def test_the_cost_of_a_step_is_the_distance_and_the_constant(toy):
    """Equation 7 from the numbers on the page: (m_t − f)²/2σ² + constant."""
    tables = values_of(toy)["tables"]
    checked = 0
    for key, here in tables["here"]["at"].items():
        x, steps, betas, variance, _, draw = key.split(",")
        back = tables["back"]["at"][",".join((x, steps, betas, draw))]
        fixed = tables["constant"]["at"][",".join((steps, betas, variance))]
        for i, ((m, q_sd), c) in enumerate(zip(back, fixed, strict=True)):
            f, sd = tables["f"]["at"][key][i + 1]
            assert here[i + 1] == pytest.approx(
                (m - f) ** 2 / (2 * sd**2 * LOG_2) + c, rel=0.02, abs=2e-3
            )
            assert q_sd <= sd * 1.001
            checked += 1
    assert checked


def test_straight_line_and_ideal_agree_for_two_points_far_in_the_noise():
    """Where all signal is lost, both are the mean of the data."""
    betas = torch.tensor([0.5, 1 - 1e-9], dtype=torch.float64)
    z = torch.tensor([-1.0, 0.7], dtype=torch.float64)
    line, ideal = toy_page.linear_f(betas), toy_page.ideal_f(toy_page.DATA, betas)
    torch.testing.assert_close(line(z, 2), ideal(z, 2), rtol=0, atol=1e-3)


def test_what_is_no_run_is_one_sentence(tmp_path):
    with pytest.raises((ValueError, OSError)):
        nelbo.explain(tmp_path / "none", tmp_path / "x.html")
    assert not Path(tmp_path / "x.html").exists()


RUNS = {
    "images": (lambda: integers(40, 1, 5, 7, levels=6), {}),
    "masked": (lambda: integers(40, 6, levels=3), {"process": "absorbing"}),
    "real": (lambda: integers(40, 2, levels=9) / np.float32(3), {}),
    "table": (None, {}),
}


def integers(count, *shape, levels):
    return np.random.default_rng(4).integers(0, levels, (count, *shape)).astype(np.uint8)


def a_table():
    random = np.random.default_rng(5)
    rows = [
        f"{1e6 * random.normal():.7f},{i % 7 / 2},{random.choice(['a', '<b>'])}" for i in range(40)
    ]
    rows[3] = ",1.5,a"
    return "\n".join(["x,y,z", *rows]) + "\n"


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    make, options = RUNS[request.param]
    folder = tmp_path_factory.mktemp("run")
    source = folder / ("data.npy" if make else "data.csv")
    if make:
        np.save(source, make())
    else:
        source.write_text(a_table())
    return train(str(source), folder / "run", **TINY, **options)


def test_a_run_is_shown_step_by_step(run, monkeypatch):
    """Its page stands alone and is complete; its terms are those of the bound."""
    monkeypatch.setattr(run_page, "STEPS", (2, 4))
    text = nelbo.explain(run, seed=1).read_text()
    assert nelbo.explain(run.path, run.path / "again.html", seed=1).read_text() == text
    check_alone(text)
    check_functions(text)
    found = values_of(text)
    check_complete(found)
    tables = found["tables"]
    for curves in tables["f"]["at"].values():  # a density has a height to be drawn, in any unit
        assert all(c[0] == "normal" or max(c[-1]) > 0 for c in curves)
    for key, terms in tables["terms"]["at"].items():
        assert len(terms) == 1 + (2, 4)[int(key.split(",")[1])]
        assert sum(terms) == pytest.approx(tables["total"]["at"][key], rel=0.01, abs=0.01)
    batch, _ = run.batch()
    rows = [int(c.split()[1]) for c in found["choices"][0]["options"]]
    x = batch.x[rows]
    with seeded(2), torch.no_grad(), measuring(run.model):
        many = widened(x).repeat_interleave(400, 0)
        prior = prior_term(run.model, widened(x), torch.ones(len(x), dtype=torch.float64))
        drawn = -elbo(run.model, many, TimeGrid.uniform(4)).elbo.reshape(len(x), 400) / LOG_2
    for b in range(len(x)):
        assert tables["terms"]["at"][f"{b},1,0"][0] == pytest.approx(
            prior[b].item() / LOG_2, rel=1e-3, abs=1e-9
        )
        error = (tables["error"]["at"][f"{b},1,0"] ** 2 + drawn[b].var().item() / 400) ** 0.5
        assert abs(tables["total"]["at"][f"{b},1,0"] - drawn[b].mean().item()) < 4.5 * error + 0.01
