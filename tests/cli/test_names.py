"""Names and values in files are shown, never obeyed: not by a terminal, a page, a figure or a
spreadsheet without a word; and every failure at the command line is one line that can be read."""

import sys
import warnings

import pytest
import torch
from support.commands import nelbo_fails, run_ok
from support.fuzzing import alarm
from support.runs import TINY

from nelbo._utils import text
from nelbo.cli import main
from nelbo.data.columns import Column
from nelbo.data.tabular.tables import formula_in
from nelbo.diffusion.elbo import Bound
from nelbo.evaluation.result import Evaluation
from nelbo.report import tables
from nelbo.runs.loading import load as load_run
from nelbo.runs.run import Run
from nelbo.runs.train import train

NAMES = ("$5^$", "$1k-$5k", "a\x1b[31mb", "x\u202ey", r"\frac{", "=cmd|'/C calc'!A0", "日" * 3)


def of_categories(names):
    column = Column(names[0], "category", categories=tuple(names))
    x = torch.tensor([[float(1 + i % len(names))] for i in range(40)])
    return column, x


def test_names_are_no_mathematics_in_a_figure():
    """Dollars show as they are, at once."""
    column, x = of_categories(NAMES[:6])
    with alarm(20), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure = tables.marginals((column,), x, x)
    assert "$5^$" in figure and "$1k-$5k"[:5] in figure
    assert not [w for w in caught if "Glyph" in str(w.message)]


def test_a_name_of_a_megabyte_fits_a_figure():
    column, x = of_categories(("x" * 10**6, "y" * 10**6))
    with alarm(20):
        assert len(tables.marginals((column,), x, x)) < 10**5


def test_a_page_holds_no_codes(monkeypatch, trained, tmp_path):
    """Neither of a terminal nor such as turn text around, whatever its sections hold."""
    module = sys.modules["nelbo.report"]
    for name in ("measure_steps", "measure_files"):
        monkeypatch.setattr(module, name, lambda *_, **__: (None, torch.zeros(1)))
    result = object.__new__(Evaluation)
    vars(result).update(unit="nats", per_example=Bound(*torch.zeros(3, 1000)))
    monkeypatch.setattr(Run, "evaluate", lambda *_, **__: result)
    monkeypatch.setattr(Run, "grid", lambda *_, **__: None)
    monkeypatch.setattr(module, "trajectory", lambda *_, **__: type("P", (), {"x": None}))
    monkeypatch.setattr(module, "again", lambda *_: "a\x1b[31m\u202e\u200fb é")
    for name in ("headline", "terms", "steps", "training", "images", "pixels", "files"):
        monkeypatch.setattr(module.sections, name, lambda *_: "a\x1b[31m\u202e\u200fb é")
    page = module.report(load_run(trained), tmp_path / "x.html").read_text()
    assert not {"\x1b", "\u202e", "\u200f"} & {*page} and "b é" in page


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a,b\n1,=1+1\n", "=1+1"),
        ("=a,b\n1,2\n", "=a"),
        ("a,b\n1,\"=HYPERLINK(0)\"\n", "=HYPERLINK(0)"),
        ("a;b\n-2+3+cmd|' /C calc'!A0;1\n", "-2+3+cmd|' /C calc'!A0"),
        ("a,b\n@SUM(1),1\n", "@SUM(1)"),
        ("a,b\n-1.5e-3,+2\n-,\n", None),
        ("a,b\nx=1,y-2\n", None),
    ],
)  # fmt: skip
def test_a_formula_is_known_from_a_number(text, cell):
    assert formula_in(text.encode()) == cell


def test_formulas_in_samples_are_said(tmp_path, capsys):
    pl = pytest.importorskip("polars")
    words = [("=cmd|'/C calc'!A0", "@sum")[i % 2] for i in range(80)]
    run = train(pl.DataFrame({"word": words}), tmp_path / "run", **TINY).path
    out = tmp_path / "x.csv"
    command = ("sample", run, "--n", 20, "--steps", 2, "--grid", "uniform", "--out")
    run_ok(*command, out)
    assert "takes for formulas, such as" in capsys.readouterr().err
    assert words[0] in out.read_text() or words[1] in out.read_text()  # as they are
    run_ok(*command, tmp_path / "x.parquet")
    assert "takes for formulas" not in capsys.readouterr().err


# ---- what is printed


def test_endless_words_are_cut(tmp_path, capsys):
    value = "x" * 10**6
    line = nelbo_fails(capsys, "inspect", value + "y")
    assert len(line) < 1000 and line.endswith("too long")
    line = text.line(" ".join(map(str, range(10**5))))
    assert len(line) == text.LINE and line.startswith("0 1") and line.endswith("99999")
    short = "the column 'a' holds numbers\n"
    assert text.line(short) == short


def test_a_failure_that_nothing_foresaw_is_one_line(monkeypatch, tmp_path, capsys):
    """Also the panics of polars, which are no Exceptions; with its stack where that is wanted."""
    from nelbo.data import inspection

    class PanicException(BaseException):
        pass

    for error in (KeyError("a"), PanicException("index\nout"), RuntimeError("of torch")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(inspection, "inspect", fail)
        with pytest.raises(SystemExit) as stop:
            main(["inspect", "digits"])
        err = capsys.readouterr().err
        assert stop.value.code == 1 and type(error).__name__ in err
        assert len(err.splitlines()) == 1 and "NELBO_TRACEBACK=1" in err
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setenv("NELBO_TRACEBACK", "1")
            main(["inspect", "digits"])


@pytest.mark.filterwarnings("default")
def test_warnings_are_notes_without_source(monkeypatch, capsys):
    from nelbo.data import inspection

    def warn(*_, **__):
        warnings.warn("mind\nthis", UserWarning, stacklevel=1)
        warnings.warn("for programmers", DeprecationWarning, stacklevel=1)
        warnings.warn("for programmers too", FutureWarning, stacklevel=1)
        raise ValueError("end")

    monkeypatch.setattr(inspection, "inspect", warn)
    with pytest.raises(SystemExit):
        main(["inspect", "digits"])
    assert capsys.readouterr().err == "note: mind this\nnelbo: end\n"


# ---- samples


def test_all_samples_have_one_bar(trained, monkeypatch):
    """A bar has as many parts as there are calls of blocks of rows; also in one step."""
    from nelbo.diffusion.times import TimeGrid
    from nelbo.sampling.samplers import ancestral

    model = load_run(trained).model
    monkeypatch.setattr(type(model), "rows", 8)
    for steps in (1, 3):
        totals, past = [], []

        def track(items, totals=totals, past=past):
            totals.append(len(items))
            for i in items:
                yield i
                past.append(i)

        x = ancestral(model, 2 * model.rows + 1, TimeGrid.uniform(steps), track=track)
        assert len(x) == 2 * model.rows + 1
        assert totals == [3 * steps] and past == list(range(3 * steps))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_output_that_is_no_number_is_not_drawn_from(trained, bad):
    from nelbo.diffusion.times import TimeGrid
    from nelbo.sampling.samplers import ancestral, probability_flow

    model = load_run(trained).model
    before = model.network.forward
    model.network.forward = lambda *a, **k: before(*a, **k) * bad
    for draw in (ancestral, probability_flow):
        with pytest.raises(ValueError, match="the network's output is not finite"):
            draw(model, 2, TimeGrid.uniform(2))
