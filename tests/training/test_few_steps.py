"""Training the bound of T steps: its loss, the run that comes of it, the grid all agree on."""

import importlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from support.closed_forms import Formula
from support.commands import run_ok
from support.runs import assert_same_run

from nelbo._utils import files
from nelbo._utils.numerics import seeded
from nelbo.cli import main
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.decoder import LevelDecoder
from nelbo.diffusion.gaussian import GaussianDiffusion, Levels
from nelbo.diffusion.model import Model, model_hash
from nelbo.diffusion.parametrization import LevelLogits
from nelbo.diffusion.reverse import Mixture
from nelbo.diffusion.schedules import Linear
from nelbo.diffusion.times import TimeGrid, elbo, iid
from nelbo.evaluation.evaluate import evaluate
from nelbo.runs import config as run_config
from nelbo.runs import grids
from nelbo.runs.finetune import fine_tune, name_of
from nelbo.runs.loading import load as load_run
from nelbo.runs.run import Run
from nelbo.testing import assert_mean
from nelbo.training import trainer
from nelbo.training.config import TrainConfig
from nelbo.training.objective import GridObjective

# `nelbo.train` is the function; this is its module.
training = importlib.import_module("nelbo.runs.train")
TIMES = (0.3, 0.55, 1.0)
VALUES = Levels(3).values


class Network(Formula):
    """Says something that is not the truth; a condition scales it."""

    def __init__(self):
        super().__init__(lambda z, level: 0.4 * z[..., None].roll(1, 1) * torch.arange(3.0))

    def forward(self, z, level, condition=None):
        moved = 0 if condition is None else condition
        return super().forward(z, level) * (1 + torch.as_tensor(moved).reshape(-1, 1, 1))


def model():
    process, head = GaussianDiffusion(Linear(-5.0, 4.0), Levels(3)), LevelLogits(VALUES)
    return Model(Network(), process, head, Mixture(VALUES), LevelDecoder(), (4,))


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_loss_is_the_bound_of_the_grid(power):
    """E_u of the loss is −ELBO of T steps, for uniform u and for others with their weights; with
    λ, plus λ times the mean surprise of the data at the T times."""
    n = 40_000
    with seeded(4), torch.no_grad():
        x = torch.randint(3, (n, 4))
        bound = elbo(model(), x, TimeGrid(TIMES))
        u = iid(n)[:, 0] ** power  # density u^(1/power - 1) / power
        weight = power * u ** (1 - 1 / power)
        loss = GridObjective(TIMES)(model(), Batch(x), u, weight=weight)
        each = weight * loss.each + bound.prior
        assert loss.loss.item() == pytest.approx(each.mean().item())
        assert loss.bound.item() == loss.loss.item()
        error = bound.elbo.std() / math.sqrt(n)
        assert_mean(each + bound.elbo.mean(), 0.0, error=0.05)
        assert error < 0.05
        with_entropy = GridObjective(TIMES, 0.5)(model(), Batch(x), 0 * u, weight=weight)
        # all u are 0: each example decodes z_1, and λ adds its 3rd part's half
        added = (with_entropy.loss - with_entropy.bound) / (
            with_entropy.bound - bound.prior.mean()
        )
        assert added.item() == pytest.approx(0.5 / 3)


def test_a_condition_reaches_the_network():
    losses = []
    for condition in (None, torch.zeros(8, 1), torch.ones(8, 1)):
        with seeded(4):
            x, u = torch.randint(3, (8, 4)), torch.rand(8, dtype=torch.float64)
            losses.append(GridObjective(TIMES)(model(), Batch(x, condition), u).loss)
    assert losses[0] == losses[1] != losses[2]


FINE = {"steps_of_bound": 2, "steps": 4}


@pytest.fixture(scope="module")
def source(trained, tmp_path_factory):
    return shutil.copytree(trained, tmp_path_factory.mktemp("few") / "digits")


@pytest.fixture(scope="module")
def tuned(source):
    return fine_tune(source, **FINE)


def test_a_fine_tuned_run_is_a_new_run(trained, source, tuned):
    """It stands beside its source, trains the best grid of it, and says so."""
    assert tuned.path == source.with_name("digits-2steps")
    run = load_run(source)
    assert tuned.config.train.grid == tuple(run.grid(2).times.tolist())
    assert tuned.grid(2).times.tolist() == list(tuned.config.train.grid)
    assert run.weights == load_run(trained).weights and run.config.train.grid == ()
    assert [event["step"] for event in tuned.metrics] == [2, 4]


def test_fine_tuning_improves_the_bound_of_its_steps(source, tmp_path, monkeypatch):
    """On a given grid; validation is by that bound."""
    # the best grid of a model that has learned nothing stays in the noise
    monkeypatch.setattr(Run, "grid", lambda run, steps, *_: TimeGrid.uniform(steps))
    source = shutil.copytree(source, tmp_path / "source")
    config = (source / run_config.CONFIG).read_text()
    seldom = config.replace('"evaluate_every": 2', '"evaluate_every": 60')
    (source / run_config.CONFIG).write_text(seldom)
    run = load_run(source)
    seen = []

    def listen(model, x, times, **rest):
        seen.append(times.times.tolist())
        return evaluate(model, x, times=times, **rest)

    monkeypatch.setattr(trainer, "evaluate", listen)
    better = fine_tune(source, 4, tmp_path / "new", steps=120)
    assert seen == 3 * [[0.25, 0.5, 0.75, 1.0]]
    x = run.examples(split="validation")[:64]
    before, after = (
        evaluate(each.model, x, times=run.grid(4), calls=32, seed=3) for each in (run, better)
    )
    spread = math.hypot(*(each.standard_error.monte_carlo for each in (before, after)))
    assert after.bits_per_dim < before.bits_per_dim - max(0.01, 4 * spread)


def test_worse_weights_are_not_kept(source, tmp_path, monkeypatch):
    """The weights it starts from stay where training only harms."""
    monkeypatch.setattr(trainer, "learning_rate", lambda t, step: 0.3)
    run = fine_tune(source, 2, tmp_path / "new", steps=2)
    assert run.weights == "averaged weights of step 0"
    start = load_run(source).model.state_dict()
    assert all(torch.equal(v, start[k]) for k, v in run.model.state_dict().items())


@pytest.mark.parametrize("last", [0, 3])
def test_a_crash_repeats_the_lost_steps(source, tuned, tmp_path, monkeypatch, last):
    """Also the first ones: the state of step 0 holds the weights it starts from."""
    step = trainer.Trainer.step

    def crash(self):
        if self.at.step == last:
            raise RuntimeError("power cut")
        step(self)

    monkeypatch.setattr(trainer.Trainer, "step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        fine_tune(source, out=tmp_path / "run", **FINE)
    monkeypatch.setattr(trainer.Trainer, "step", step)
    training.resume(tmp_path / "run")
    assert_same_run(tuned.path, tmp_path / "run")


def test_the_best_variance_is_measured_with_the_weights(source, tmp_path):
    """A step whose variance is data of the model: in its file and in its hash."""
    run = training.train(
        "digits", tmp_path / "run", step="optimal", steps=2, batch=8, width=8, depth=1
    )
    assert (run.model.step.errors > 0).all() and (run.model.step.errors.diff() > 0).sum() > 25
    before = model_hash(run.model)
    run.model.step.errors *= 2
    assert model_hash(run.model) != before


# ---- the grid of a run


@pytest.fixture(scope="module")
def gridded(source, tmp_path_factory):
    """A run with its grids of one and of two steps; do not change it, copy it."""
    path = shutil.copytree(source, tmp_path_factory.mktemp("gridded") / "run")
    (path / run_config.GRIDS).unlink(missing_ok=True)
    run = load_run(path)
    run.grid(1), run.grid(2)
    return path


@pytest.fixture
def run(source, tmp_path):
    (source / run_config.GRIDS).unlink(missing_ok=True)
    return load_run(shutil.copytree(source, tmp_path / "run"))


def test_a_grid_is_found_once(run, monkeypatch):
    first = run.grid(2).times

    def found_again(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(grids, "best_grid", found_again)
    again = load_run(run.path)
    assert torch.equal(again.grid(2).times, first)
    with pytest.raises(AssertionError):
        again.grid(3)
    with torch.no_grad():  # other weights have another best grid
        next(again.model.parameters()).add_(1)
    with pytest.raises(AssertionError):
        again.grid(2)


HUGE = f"[1{'0' * 400}]"


@pytest.mark.parametrize(
    "damage",
    ["", "[]", "{", '{"a": [2, 1]}', '{"KEY": [2, 1]}', f'{{"KEY": {HUGE}}}', "null", "remove"],
)
def test_a_damaged_file_of_grids_is_no_matter(gridded, tmp_path, damage):
    run = load_run(shutil.copytree(gridded, tmp_path / "run"))
    path = run.path / run_config.GRIDS
    _, (key, first) = json.loads(path.read_text()).items()
    path.unlink()
    if damage != "remove":
        path.write_text(damage.replace("KEY", key))
    assert run.grid(2).times.tolist() == first
    others = {"a": [2, 1]} if '"a"' in damage else {}
    assert json.loads(path.read_text()) == others | {key: first}


def test_a_folder_that_is_read_only_is_no_matter(run, monkeypatch):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(files, "write", refuse)
    assert run.grid(2).steps == 2
    assert not (run.path / run_config.GRIDS).exists()


def test_a_run_of_an_older_version_loads(run):
    path = run.path / run_config.CONFIG
    document = json.loads(path.read_text())
    del document["train"]["grid"]
    path.write_text(json.dumps(document))
    assert load_run(run.path).config == run.config


@pytest.mark.parametrize("grid", [(0.5, 0.2, 1.0), (0.5,), (0.0, 1.0)])
def test_a_grid_in_a_configuration_is_checked(grid):
    with pytest.raises(ValueError, match=r"grid must increase within \(0, 1\] and end at 1.0"):
        TrainConfig(grid=grid)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train --resume RUN --steps-of-bound 0", "steps must be at least 1; got 0"),
        ("train digits --out NEW --steps-of-bound 4", "name it with --resume"),
        ("train --resume RUN --steps-of-bound 2 --lr 1", "leave --lr out"),
        ("train --resume RUN --steps-of-bound 2 --out RUN", "exists and is a run"),
        ("train --resume NEW --steps-of-bound 2", "NEW"),
        ("sample RUN --steps 0 --out s.npz", "steps must be at least 1; got 0"),
        ("sample RUN --steps -1 --grid uniform --out s.npz", "steps must be at least 1; got -1"),
        ("sample RUN --grid worst --out s.npz", "worst"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    parts = [str(run.path) if part == "RUN" else part for part in arguments.split()]
    with pytest.raises(SystemExit) as exit_:
        main(parts)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and words in error
    assert not (tmp_path / "NEW").exists() and not (tmp_path / "s.npz").exists()


def test_samples_follow_the_grid(run, tmp_path, monkeypatch):
    """`sample --steps T` takes the grid of the run; `--grid uniform` the even one."""
    seen = []
    samplers = importlib.import_module("nelbo.runs.samples").SAMPLERS
    draw = samplers["ancestral"]

    def listen(model, n, times, *rest):
        seen.append(times)
        return draw(model, n, times, *rest)

    monkeypatch.setitem(samplers, "ancestral", listen)
    command = f"sample {run.path} --n 2 --steps 2 --out {tmp_path / 's.npz'}".split()
    run_ok(*command)
    run_ok(*command, "--grid", "uniform")
    assert torch.equal(seen[0].times, run.grid(2).times)
    assert seen[1].times.tolist() == [0.5, 1.0]


def test_the_name_of_a_fine_tuned_run():
    assert name_of(Path("a/b"), 4) == Path("a/b-4steps")
