"""The calls that people guess: each works, or ends in one sentence with the value and the fix."""

import inspect as python
import re
import shutil
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from support.runs import TINY

import nelbo
from nelbo._utils import progress, terminal
from nelbo.data import Schema
from nelbo.data.tabular import encoding
from nelbo.evaluation.importance_bound import evaluate_importance
from nelbo.evaluation.probability_flow import evaluate_flow
from nelbo.models.config import ModelConfig
from nelbo.runs import hub, run, samples
from nelbo.training.config import TrainConfig
from nelbo.training.presets import configure


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A run of tiny images."""
    x = np.random.default_rng(0).integers(0, 5, (80, 4, 4)).astype(np.uint8)
    return nelbo.train(x, tmp_path_factory.mktemp("digits") / "run", **TINY)


@pytest.fixture(scope="module")
def pixels(digits):
    """Eight images as people hold them: uint8, (N, H, W)."""
    return digits.examples()[:8, 0].numpy()


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.integers(0, 9, 120), "b": rng.choice(["x", "y"], 120)})
    frame.loc[::7, "b"] = None
    return nelbo.train(frame, tmp_path_factory.mktemp("people") / "run", **TINY), frame


def test_every_command_has_a_twin_and_the_names_are_few():
    from nelbo.cli import app

    commands = {name for name in app if not name.startswith("-")}
    assert commands <= set(nelbo.__all__) and len(nelbo.__all__) <= 28
    for name in ("sample", "impute", "score", "compress", "decompress"):
        twin = python.signature(getattr(nelbo, name)).parameters
        method = python.signature(getattr(nelbo.Run, name)).parameters
        assert [*twin] == ["run", *[*method][1:]]


def test_what_the_documents_name_is_reached():
    assert callable(nelbo.integrations.diffusers.build) and callable(
        nelbo.sklearn.DiffusionDensity
    )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        nelbo.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        nelbo.integrations.nothing  # noqa: B018


def test_a_page_is_a_function_and_a_package():
    import nelbo.report.studies as studies

    assert nelbo.report.studies is studies and nelbo.explain.toy.__name__ == "nelbo.explain.toy"
    for name in ("report", "explain"):
        function = getattr(sys.modules[f"nelbo.{name}"], name)
        assert python.signature(getattr(nelbo, name)) == python.signature(function)
    with pytest.raises(ValueError, match=r"give a run, .* or its folder; got int"):
        nelbo.report(3)


def test_train_of_an_array_is_train_of_its_file(tmp_path, monkeypatch, capsys):
    x = np.random.default_rng(0).integers(0, 5, (40, 6)).astype(np.uint8)
    np.save(tmp_path / "x.npy", x)
    monkeypatch.chdir(tmp_path)
    named = nelbo.train(x, **TINY)
    assert (
        named.path.as_posix() == "runs/data"
        and "the run is in runs/data" in capsys.readouterr().err
    )
    by_file = nelbo.train("x.npy", "by_file", **TINY)
    assert named.config.hashes == by_file.config.hashes
    (tmp_path / "runs/data").rename(tmp_path / "moved")
    again = nelbo.resume("moved", steps=TINY["steps"] + 2)
    assert torch.equal(again.examples("train"), by_file.examples("train"))
    assert repr(again.evaluate(calls=8)).count("\n") == 1


def test_a_copy_of_texts_and_labels_is_read_back(tmp_path):
    from nelbo.data import load
    from nelbo.runs import held

    for data, options in (
        (["to be or not to be"] * 20, {"size": 8}),
        (
            {"x": np.arange(60).reshape(20, 3) % 5, "y": np.arange(20) % 3},
            {"condition": ["class"]},
        ),
    ):
        found = load(data, **options)
        (tmp_path / "data.npz").write_bytes(held.to_bytes(held.whole(found)))
        again = held.read(tmp_path / "data.npz", found.schema)
        assert again.splits.keys() == found.splits.keys()
        assert all(torch.equal(again.splits[k], x) for k, x in found.splits.items())
        assert all(torch.equal(again.labels[k], y) for k, y in found.labels.items())


def test_one_number_however_it_is_asked_for(digits, pixels):
    wanted = digits.evaluate(digits.examples()[:8], calls=8)
    for found in (
        nelbo.evaluate(digits, pixels, calls=8),
        nelbo.evaluate(str(digits.path), torch.tensor(pixels), calls=8),
        nelbo.evaluate(digits.model, pixels, calls=8),
        nelbo.evaluate(digits.model, list(pixels), calls=8),
        nelbo.evaluate(digits.model, iter(np.array_split(pixels, 3)), calls=8),
    ):
        assert found.nats == wanted.nats
    own = digits.evaluate(calls=8)
    assert nelbo.evaluate(digits, calls=8).nats == own.nats
    assert own.split == "test" and own.examples == len(digits.examples())


def test_steps_are_a_grid(digits, pixels):
    model = digits.model
    even = nelbo.evaluate(model, pixels, times=nelbo.TimeGrid.uniform(2), calls=8)
    assert nelbo.evaluate(model, pixels, steps=2, calls=8).nats == even.nats
    assert nelbo.evaluate(model, pixels, times=2, calls=8).nats == even.nats
    by_count, by_steps = nelbo.elbo(model, pixels, times=2), nelbo.elbo(model, pixels, steps=2)
    assert torch.equal(by_count.elbo, by_steps.elbo)
    best = nelbo.evaluate(model, pixels, times=digits.grid(2), calls=8)
    assert digits.evaluate(pixels, steps=2, calls=8).nats == best.nats
    samples = nelbo.ancestral(model, 2, 2, seed=3)
    assert torch.equal(samples, nelbo.ancestral(model, 2, nelbo.TimeGrid.uniform(2), seed=3))
    with pytest.raises(ValueError, match="give steps or times, not both; got steps=2"):
        nelbo.evaluate(model, pixels, steps=2, times=nelbo.TimeGrid.uniform(2))
    with pytest.raises(ValueError, match="steps must be an integer or None; got True"):
        nelbo.evaluate(model, pixels, steps=True)
    with pytest.raises(ValueError, match="times must be a nelbo TimeGrid or an integer"):
        nelbo.ancestral(model, 2, 2.5)


def test_tighter_bounds_are_arguments_too(digits, pixels):
    few, model = pixels[:2], digits.model
    grid, batch = nelbo.TimeGrid.uniform(2), digits.batch(few)[0]
    weighted = evaluate_importance(model, batch, times=grid, samples=3)
    found = nelbo.evaluate(model, few, steps=2, importance_samples=3)
    assert found.nats == weighted.nats and found.how.samples == 3
    best = evaluate_importance(model, batch, times=digits.grid(2), samples=3)
    assert digits.evaluate(few, steps=2, importance_samples=3).nats == best.nats
    flow = evaluate_flow(model, batch, tolerance=0.01)
    for held in (digits, model):
        found = nelbo.evaluate(held, few, ode=True, tolerance=0.01)
        assert found.nats == flow.nats
    for options, message in (
        ({"importance_samples": 3}, "give steps"),
        ({"ode": True, "steps": 2}, "leave steps and importance_samples out"),
        ({"ode": True, "calls": 9}, "ode takes tolerance instead"),
        ({"tolerance": 0.1}, "need ode; add it"),
        ({"ode": True, "tolerance": -1}, "got -1; try"),
        ({"ode": True, "dequantise": "gaussian"}, "one of encoder, truncated-normal, uniform"),
        ({"ode": True, "sampler": "greedy"}, "sampler is stated beside the plain bound"),
    ):
        for held in (digits, model):
            with pytest.raises(ValueError, match=message):
                nelbo.evaluate(held, few, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x / 4, r"0\.\d+, which is not one of the 5 levels 0\.\.4; if .* give np"),
        (lambda x: (x / 4)[:, None], r"not scaled; if x is scaled to \[0, 1\], \(x \* 4\)"),
        (lambda x: x + 9, "beyond the 5 levels"),
        (lambda x: x[:, :2], r"the shape \(2, 4\) where \(1, 4, 4\) is needed"),
        (lambda x: x[0], r"this is one example, so give x\[None\]"),
        (lambda x: object(), "data must be an array .*; got object"),
        (lambda x: None, "a model brings no data"),
    ],
)  # fmt: skip
def test_what_is_no_example_of_a_model(digits, pixels, change, message):
    for measure in (nelbo.evaluate, nelbo.elbo) if "brings" not in message else (nelbo.evaluate,):
        with pytest.raises(ValueError, match=message) as error:
            measure(digits.model, change(pixels))
        assert "\n" not in str(error.value)


def test_the_elbo_of_each_example_has_its_error(digits, pixels):
    found = nelbo.elbo(digits, pixels)
    assert torch.equal(found.elbo, nelbo.elbo(digits.model, pixels).elbo) and len(found) == 8
    many = nelbo.elbo(digits.model, pixels, calls=800, seed=1)
    assert ((found.elbo - many.elbo).abs() < 5 * found.standard_error).all()
    assert (many.standard_error < found.standard_error / 1.5).all()
    exact = nelbo.elbo(digits, pixels, steps=1, calls=64)  # no diffusion term
    assert not exact.diffusion.any()
    with pytest.raises(ValueError, match=r"calls must be at least 16, .* got 4"):
        nelbo.elbo(digits, pixels, calls=4)


def test_samples_are_held_as_the_data_are(digits, people):
    images = digits.sample(3, 2)
    assert images.shape == (3, 4, 4) and images.dtype == np.uint8
    assert (images == nelbo.sample(digits.path, 3, 2)).all()
    run_, frame = people
    drawn = nelbo.load(run_.path).sample(4, 2)
    assert type(drawn) is type(frame) and list(drawn) == ["a", "b"] and len(drawn) == 4
    with pytest.raises(ValueError, match=r"one of ancestral, flow, left.*'ddim'"):
        digits.sample(3, 2, sampler="ddim")
    with pytest.raises(ValueError, match="the run is not conditional"):
        digits.sample(3, 2, condition=1)


def test_impute_and_score_of_a_frame(people, digits):
    run_, frame = people
    made = run_.impute(frame.head(9), 2, particles=2)
    assert type(made) is type(frame) and not made["b"].isna().any()
    kept = frame["b"].head(9).notna()
    assert (made["b"][kept] == frame["b"].head(9)[kept]).all()
    scored = nelbo.score(run_, frame.head(9), calls=8)
    assert len(scored) == 9 and scored.columns == ("a", "b") and "\n" not in repr(scored)
    with pytest.raises(ValueError, match="impute is for tables, and the run is of levels"):
        nelbo.impute(digits, frame)
    with pytest.raises(
        ValueError, match=r"give the table to the run, as in run\.evaluate\(frame\)"
    ):
        nelbo.evaluate(run_.model, frame)


def test_what_is_compressed_comes_back(tmp_path, digits, people, pixels):
    pytest.importorskip("constriction")
    nelbo.compress(digits, pixels, tmp_path / "a.nlb", 2)
    found = digits.decompress(tmp_path / "a.nlb")
    assert found.dtype == pixels.dtype and (found == pixels).all()
    assert nelbo.inspect(tmp_path / "a.nlb").header.examples == 8
    digits.decompress(tmp_path / "a.nlb", tmp_path / "x.npy")
    assert (np.load(tmp_path / "x.npy") == pixels).all()
    run_, frame = people
    run_.compress(frame.head(9), tmp_path / "t.nlb", 2)
    assert run_.decompress(tmp_path / "t.nlb").rows() == [
        tuple(None if v != v else v for v in row) for row in frame.head(9).itertuples(index=False)
    ]


def test_a_missing_extra_is_said_before_any_work(tmp_path, digits, pixels, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    monkeypatch.setattr(run.Run, "grid", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=r"pip install 'nelbo\[codec\]'"):
        nelbo.compress(digits, pixels, tmp_path / "a.nlb")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'nelbo\[hub\]'"):
        nelbo.load("nobody/nothing")


def test_a_run_goes_to_the_hub_and_comes_back(tmp_path, digits, monkeypatch):
    """The hub is a folder here: what is uploaded is what is downloaded."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, name, private, exist_ok):
            assert name == "user/name" and private and exist_ok

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: tmp_path / "hub"
    )
    assert digits.push_to_hub("user/name", private=True).endswith("/user/name")
    assert not (tmp_path / "hub" / "state.safetensors").exists()
    again = nelbo.load("user/name")
    x = digits.examples()
    assert again.evaluate(x, calls=8).nats == digits.evaluate(x, calls=8).nats
    assert (again.sample(2) == digits.sample(2)).all()  # on the grid that went with it
    with pytest.raises(ValueError, match=r"the data .* of the run are not read"):
        again.evaluate()
    card = (tmp_path / "hub" / hub.CARD).read_text()
    whole = digits.evaluate()
    assert f"{whole.bits_per_dim:.4f}" in card and f"{whole.standard_error.total:.4f}" in card
    assert "nelbo evaluate user/name" in card
    with pytest.raises(ValueError, match="called user/name; got 'name'"):
        digits.push_to_hub("name")


def test_the_hub_out_of_reach_is_one_sentence(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(*_, **__):
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"no run nobody/nothing here, .* offline") as e:
        nelbo.load("nobody/nothing")
    assert "\n" not in str(e.value)
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        nelbo.load("./nothing")


def test_a_repr_is_two_lines_and_has_a_picture(digits):
    assert repr(digits).count("\n") == 1 and len(repr(digits)) < 400
    assert "averaged weights of step" in repr(digits) and "<table>" in digits._repr_html_()
    (curve,) = re.findall(r'points="([^"]+)"', digits._repr_html_())
    heights = [float(point.split(",")[1]) for point in curve.split()]
    validations = [event["validation"] for event in digits.metrics]
    assert np.argsort(heights).tolist() == np.argsort(validations)[::-1].tolist()
    result = digits.evaluate(calls=8)
    assert repr(result).count("\n") == 1 and f"{result.bits_per_dim:.4f} ±" in repr(result)
    page = result._repr_html_()
    widths = [float(w) for w in re.findall(r'width="([\d.]+)%"', page)]
    assert abs(sum(widths) - 100) < 0.1 and "<svg" in page
    assert "TimeGrid of 2 times" in repr(digits.grid(2))
    one = digits.evaluate(digits.examples()[:1], calls=24)
    known = f"± {one.standard_error.monte_carlo:.2g} (Monte Carlo alone) bits/dim"
    assert known in repr(one) and known in one._repr_html_()


def test_a_device_is_said(digits):
    assert digits.to("cpu") is digits
    with pytest.raises(ValueError, match="there is no device 'abacus'"):
        digits.to("abacus")


def test_progress_is_for_who_watches(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert progress.interactive()
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert not progress.interactive()  # its stream shows the codes of a terminal as they are
    monkeypatch.delitem(sys.modules, "ipykernel")
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert not progress.interactive()
    monkeypatch.setattr(terminal, "find_spec", lambda name: None)
    assert terminal.Terminal(stderr=True).is_jupyter is False


def test_train_names_its_options():
    """In its signature and its docstring; one that it has not is answered with the nearest."""
    found = python.signature(nelbo.train)
    for kind in (ModelConfig, TrainConfig):
        assert {field.name for field in fields(kind)} <= {*found.parameters}
        assert all(f"{field.name}: " in nelbo.train.__doc__ for field in fields(kind))
    assert found.parameters["head"].default is None and "options" not in found.parameters
    x = np.zeros((20, 4), np.uint8) + np.arange(20, dtype=np.uint8)[:, None] % 3
    for name, near in (("widths", "width"), ("batch_size", "batch"), ("model", "network")):
        with pytest.raises(ValueError, match=f"unknown option '{name}'; did you mean '{near}'\\?"):
            nelbo.train(x, "nowhere", **{name: 1})
    with pytest.raises(ValueError, match="unknown option 'zzz'; known are process, schedule"):
        nelbo.train(x, "nowhere", zzz=1)


def test_what_a_network_predicts_has_one_set_of_names():
    images = Schema("levels", (1, 8, 8), 17)
    assert configure(images, 100, head="epsilon")[0] == configure(images, 100, head="noise")[0]
    zero = lambda z, t: 0 * z  # noqa: E731
    for name, word in (("eps", "noise"), ("x0", "data"), ("v", "velocity"), ("f", "mean")):
        pair = [nelbo.toy([0.2, 0.5], zero, predicts=p).bound([0.3]).elbo for p in (name, word)]
        assert torch.equal(*pair)
    with pytest.raises(ValueError, match="predicts must be one of mean"):
        nelbo.toy([0.2, 0.5], zero, predicts="nothing")


def test_refusals_come_before_a_grid_is_searched(digits, people, tmp_path):
    never = lambda *args: pytest.fail("the grid was searched")  # noqa: E731
    for changes, message in (
        ({"guidance": 2.0}, "guidance is for conditional runs"),
        ({"as_modelled": True}, "is for tables"),
        ({"n": 0}, "must be at least 1"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nelbo.Run, "grid", never)
            with pytest.raises(ValueError, match=message):
                digits.sample(**{"n": 2, **changes})
            with pytest.raises(ValueError, match=r"give a frame of one row, as in df\.iloc\[\[0"):
                people[0].score(people[1].iloc[0])
            with pytest.raises(ValueError, match="impute is for tables"):
                digits.impute(people[1])
            with pytest.raises(ValueError, match=r"ends in \.nlb"):
                digits.compress(digits.examples(), tmp_path / "x.zip")
            with pytest.raises(ValueError, match="grid must be best or uniform; got 'even'"):
                digits.compress(digits.examples(), tmp_path / "x.nlb", grid="even")


def test_rows_that_are_drawn_again_open_no_second_bar(people, monkeypatch):
    bars, rounds = [], []

    def half(x, columns):
        rounds.append(len(x))
        return np.arange(x.size).reshape(x.shape) % (2 * x.shape[1]) == 0

    monkeypatch.setattr(encoding, "outside_training", half)

    def track(steps):
        bars.append(1)
        return steps

    found = samples.draw(people[0], 20, lambda: nelbo.TimeGrid.uniform(2), track=track)
    assert len(found) == 20 and len(rounds) > 1 and len(bars) == 1
