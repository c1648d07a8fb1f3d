"""Examples at the door of evaluate and elbo: taken where they are plain, else one sentence."""

import numpy as np
import pytest
import torch

import nelbo
from nelbo import data
from nelbo._utils.numerics import seeded
from nelbo.data import Schema
from nelbo.evaluation.importance_bound import evaluate_importance
from nelbo.models.build import build
from nelbo.training.presets import configure

RNG = np.random.default_rng(2)


def untrained(schema: Schema, x: torch.Tensor, **options):
    with seeded(0):
        model = build(configure(schema, len(x), width=8, depth=1, **options)[0], schema, None)
        model.fit_statistics(x)
    return model.eval()


@pytest.fixture(scope="module", params=["gaussian", "absorbing"])
def levels(request):
    x = torch.from_numpy(RNG.integers(0, 5, (6, 3)))
    return untrained(Schema("levels", (3,), 5), x, process=request.param), x


def test_what_is_plain_is_taken_as_it_is(levels):
    model, x = levels
    want = nelbo.evaluate(model, x, calls=8).nats
    byte = x.to(torch.uint8)
    for same in (x.numpy(), byte, byte.numpy(), x.numpy().astype(">i4"), x.int()):
        assert nelbo.evaluate(model, same, calls=8).nats == want
        with seeded(1):
            bound = nelbo.elbo(model, same).elbo
        with seeded(1):
            assert torch.equal(bound, nelbo.elbo(model, x).elbo)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.float(), r"x is torch\.float32, but the model takes integers 0\.\.4"),
        (lambda x: x / 4, r"not scaled; .* \(x \* 4\)\.round\(\)\.long\(\)"),
        (lambda x: (x / 4).numpy(), "not scaled"),
        (
            lambda x: x + 3,
            r"row \d of x has [567] in dimension \d, which .* 0\.\.4",
        ),
        (
            lambda x: x.index_put((torch.tensor(4), torch.tensor(1)), torch.tensor(-1)),
            r"row 4 .* -1",
        ),
        (lambda x: x[:, :2], r"the shape \(2,\) where \(3,\) is needed"),
        (lambda x: x[:, :2].tolist(), r"the shape \(2,\) where \(3,\) is needed"),
        (lambda x: x[0], r"where \(3,\) is needed; this is one example, so give x\[None\]"),
        (lambda x: x.numpy().astype(str), "array of numbers; got one of the type <U"),
        (lambda x: x.to(torch.complex64), "x must be real numbers"),
        (lambda x: x[:0], "give at least 1 example|at least one example to evaluate; got none"),
    ],
)
def test_what_is_no_example_is_one_sentence(levels, change, message):
    model, x = levels
    wrong, grid = change(x), nelbo.TimeGrid.uniform(2)
    for measure in (
        lambda: nelbo.evaluate(model, wrong),
        lambda: nelbo.elbo(model, wrong),
        lambda: evaluate_importance(model, wrong, times=grid, samples=2),
    ):
        with pytest.raises(ValueError, match=message) as error:
            measure()
        assert "\n" not in str(error.value)


def test_bytes_are_all_levels_of_256():
    x = torch.arange(256).reshape(64, 4)
    model = untrained(Schema("levels", (4,), 256), x)
    assert nelbo.elbo(model, x.to(torch.uint8)).elbo.isfinite().all()


def test_times_are_times(levels):
    for measure in (nelbo.evaluate, nelbo.elbo):
        with pytest.raises(ValueError, match=r"times must be a nelbo TimeDiscretization.*got '8'"):
            measure(*levels, times="8")
        with pytest.raises(ValueError, match="give steps or times, not both"):
            measure(*levels, times=nelbo.TimeGrid.uniform(2), steps=2)
        with pytest.raises(ValueError, match="steps must be at least 1; got 0"):
            measure(*levels, steps=0)


def test_codes_of_a_table_are_its_columns(tmp_path):
    pytest.importorskip("polars")
    frame = {
        "word": ["a", "b", "c", "a"] * 10,
        "flag": [True, False] * 20,
        "level": [1, 2, 4, 2] * 10,
        "real": RNG.normal(size=40).tolist(),
    }
    found = data.load(frame)
    x = torch.cat(list(found.splits.values())).double()
    model = untrained(found.schema, x)
    assert nelbo.evaluate(model, x[:5], calls=8).nats < float("inf")
    for dim in range(x.shape[1]):
        for value in (np.inf, 99.0, 0.5, -1.0):
            wrong = x[:5].clone()
            wrong[3, dim] = value
            real = len({*x[:, dim].tolist()}) > 5
            if real and value != np.inf:
                assert nelbo.elbo(model, wrong).elbo.shape == (5,)
                continue
            with pytest.raises(ValueError, match=rf"row 3 of x .* in dimension {dim}"):
                nelbo.evaluate(model, wrong)


def test_missing_is_a_value_of_columns_that_have_it():
    """NaN is a cell without a number where training, or a schema, had such cells; in any other
    column its bound would be one of something that is no value of the model."""
    pytest.importorskip("polars")
    some = [None if i % 5 == 0 else i / 7 for i in range(40)]
    found = data.load({"all": RNG.normal(size=40).tolist(), "some": some})
    x = torch.cat(list(found.splits.values())).double()
    model = untrained(found.schema, x)
    assert nelbo.evaluate(model, x, calls=8).nats < float("inf")
    wrong = x.clone()
    wrong[3, 0] = np.nan
    with pytest.raises(ValueError, match=r"row 3 of x has nan in dimension 0, .* finite"):
        nelbo.evaluate(model, wrong)
    with pytest.raises(ValueError, match=r"row 3 of x has nan in dimension 0, .* finite"):
        nelbo.elbo(model, wrong)


def test_reals_are_finite():
    x = torch.from_numpy(RNG.normal(size=(6, 3)))
    model = untrained(Schema("real", (3,), None), x)
    assert nelbo.evaluate(model, x.numpy(), calls=8).nats == nelbo.evaluate(model, x, calls=8).nats
    for value in (np.nan, np.inf, -np.inf):
        wrong = x.clone()
        wrong[2, 1] = value
        with pytest.raises(ValueError, match=r"row 2 of x has .* in dimension 1, .* finite"):
            nelbo.evaluate(model, wrong)


def test_other_levels_are_told_and_so_is_a_bound_worse_than_uniform(tmp_path, capsys):
    from nelbo.cli import main

    x = RNG.integers(0, 256, (40, 6), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "low.npy", x % 17)
    tiny = {"steps": 2, "batch": 8, "width": 8, "depth": 1}
    run = nelbo.train(tmp_path / "x.npy", tmp_path / "run", **tiny)
    notes = data.load_like(tmp_path / "low.npy", run.config.schema).notes
    assert any(
        "largest value 16 of 255" in note and "rescale it to 0..255" in note for note in notes
    )
    assert not data.load_like(tmp_path / "x.npy", run.config.schema).notes
    command = ["evaluate", str(run.path), "--data", str(tmp_path / "low.npy"), "--calls", "8"]
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, *more])
        assert not stop.value.code
        said = capsys.readouterr().err
        assert "largest value 16 of 255" in said
        bound = nelbo.evaluate(run.model, x % 17, calls=8).bits_per_dim
        assert ("worse than uniform" in said and "8 bits/dim" in said) == (bound > 8)


def test_worse_than_uniform_by_its_number():
    from types import SimpleNamespace

    from nelbo.evaluation.plausibility import worse_than_uniform

    for bits, levels, worse in (
        (8.01, 256, True),
        (7.99, 256, False),
        (1.1, 2, True),
        (9.0, 0, 0),
    ):
        found = SimpleNamespace(bits_per_dim=bits, unit="bits/dim")
        line = worse_than_uniform(found, levels)
        assert bool(line) == worse
    assert not worse_than_uniform(SimpleNamespace(bits_per_dim=None), 256)


def test_what_fails_before_the_first_step_is_not_the_learning_rate(tmp_path):
    pytest.importorskip("polars")
    tiny = {"steps": 5, "batch": 8, "width": 8, "depth": 1}
    frame = {"a": (RNG.normal(size=60) * 1e160).tolist()}
    with pytest.raises(
        ValueError, match=r"learning rate is not .* the data lie in -\S+e\+160\.\."
    ):
        nelbo.train(frame, tmp_path / "a", **tiny)
    frame["a"] = RNG.normal(size=60).tolist()
    with pytest.raises(ValueError, match="learning rate is not the cause: gamma begins at -79, "):
        nelbo.train(frame, tmp_path / "c", gamma_min=-79, **tiny)
    with pytest.raises(ValueError, match="gamma_min must be at least -80; got -100"):
        nelbo.train(frame, tmp_path / "c", gamma_min=-100, **tiny)
    assert not (tmp_path / "c").exists()
    np.save(tmp_path / "x.npy", RNG.normal(size=(60, 2)) * 1e160)
    with pytest.raises(ValueError, match=r"which lie in -\S+e\+160\.\..* rescale the data"):
        nelbo.train(tmp_path / "x.npy", tmp_path / "b", **tiny)
    np.save(tmp_path / "y.npy", RNG.normal(size=(60, 2)))
    with pytest.raises(ValueError, match="learning rate is too high"):
        nelbo.train(tmp_path / "y.npy", tmp_path / "c", **{**tiny, "lr": 1e6, "warmup": 0})
