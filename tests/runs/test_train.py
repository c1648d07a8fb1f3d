"""Training can be stopped anywhere and loses nothing."""

import importlib
import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.runs import TINY, assert_same_run
from torch import nn

from nelbo import data
from nelbo._utils import files, tensor_files
from nelbo.data import Schema
from nelbo.diffusion.times import ContinuousTime, TimeGrid
from nelbo.evaluation.evaluate import evaluate
from nelbo.models.build import build
from nelbo.runs import config as run_config
from nelbo.runs.folder import alone_in
from nelbo.runs.loading import load as load_run
from nelbo.runs.pace import pace
from nelbo.training import trainer
from nelbo.training.config import TrainConfig
from nelbo.training.optim import Muon, parameter_groups
from nelbo.training.presets import configure

# `nelbo.train` is the function; this is its module.
training = importlib.import_module("nelbo.runs.train")


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_an_interrupted_run_ends_as_if_it_was_not(trained, tmp_path, monkeypatch, stop):
    """Ctrl-C in the middle of step `stop`: the step is finished, saved, and continued exactly."""
    order = trainer.batch_indices

    def interrupt(examples, batch, step, *how):
        if step == stop - 1:
            signal.raise_signal(signal.SIGINT)
        return order(examples, batch, step, *how)

    monkeypatch.setattr(trainer, "batch_indices", interrupt)
    with pytest.raises(KeyboardInterrupt):
        training.train("digits", tmp_path / "run", **TINY)
    monkeypatch.setattr(trainer, "batch_indices", order)
    _, about = tensor_files.read_tensors(tmp_path / "run" / run_config.STATE)
    assert about["progress"]["step"] == stop
    training.resume(tmp_path / "run")
    assert_same_run(trained, tmp_path / "run")


def test_a_crash_between_checkpoints_repeats_the_lost_steps(trained, tmp_path, monkeypatch):
    """Killed after step 3, the state is that of step 2; what was logged later is dropped."""
    step = trainer.Trainer.step

    def crash(self):
        if self.at.step == 3:
            raise RuntimeError("power cut")
        step(self)

    monkeypatch.setattr(trainer.Trainer, "step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        training.train("digits", tmp_path / "run", **TINY)
    monkeypatch.setattr(trainer.Trainer, "step", step)
    with (tmp_path / "run" / run_config.METRICS).open("a") as file:
        file.write('{"step": 3, "validation": 1.0}\n{"step": 4, "valid')
    training.resume(tmp_path / "run")
    assert_same_run(trained, tmp_path / "run")


def test_a_finished_run_stays_as_it_is(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    before = (run / run_config.WEIGHTS).read_bytes()
    assert training.resume(run).metrics == run_config.read_metrics(trained)
    assert (run / run_config.WEIGHTS).read_bytes() == before


def test_more_steps_than_planned(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    longer = training.resume(run, steps=6)
    assert [event["step"] for event in longer.metrics] == [2, 4, 6]
    assert longer.config.train.steps == 6


def test_minutes_are_steps_by_the_time_of_some(tmp_path, monkeypatch):
    """With a clock that ticks at each step, validations being free, they are budget over tick;
    the run knows their number, so it is resumed like any."""
    ticks = [0.0]
    step = trainer.Trainer.step

    def ticking(self):
        ticks[0] += 2.0
        step(self)

    monkeypatch.setattr(trainer.Trainer, "step", ticking)
    dataset = data.load("digits")
    sizes = {k: v for k, v in TINY.items() if k not in ("steps", "evaluate_every")}
    preset = configure(dataset.schema, 1000, **sizes)
    steps = pace(*preset, dataset, 100.0, clock=lambda: ticks[0])
    assert steps == (100 - 3 * 2) // 2
    with pytest.raises(ValueError, match=r"0\.1 minutes are too few: a step takes 2 seconds"):
        pace(*preset, dataset, 6.0, clock=lambda: ticks[0])
    with pytest.raises(ValueError, match="minutes must be positive; got -1"):
        pace(*preset, dataset, -60.0)
    with pytest.raises(ValueError, match="give one of them"):
        training.train("digits", tmp_path / "run", minutes=1, steps=4)
    monkeypatch.setattr(training, "pace", lambda *_: 4)
    run = training.train("digits", tmp_path / "run", minutes=1, **sizes)
    assert (run.config.train.steps, run.config.train.evaluate_every) == (4, 1)


def test_seeds(trained, tmp_path):
    training.train("digits", tmp_path / "same", **TINY)
    assert_same_run(trained, tmp_path / "same")
    other = training.train("digits", tmp_path / "other", seed=1, **TINY)
    assert other.metrics[0]["validation"] != run_config.read_metrics(trained)[0]["validation"]


def test_the_callers_generator_is_left_alone(tmp_path):
    state = torch.get_rng_state()
    training.train("digits", tmp_path / "run", **TINY)
    assert torch.equal(state, torch.get_rng_state())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    objective = trainer.Objective.__call__

    def explode(self, model, batch, u, weight, part):
        loss = objective(self, model, batch, u, weight, part)
        explode.calls += 1
        return loss._replace(loss=loss.loss * float("nan")) if explode.calls == 4 else loss

    explode.calls = 0
    monkeypatch.setattr(trainer.Objective, "__call__", explode)
    with pytest.raises(
        ValueError, match=r"non-finite .*at step 4; the weights of step 2.*a lower lr"
    ):
        training.train("digits", tmp_path / "run", **TINY)
    run = load_run(tmp_path / "run")
    assert run.weights == "averaged weights of step 2"
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_the_disk_is_full(tmp_path, monkeypatch):
    """The last whole checkpoint survives, and no half-written file is left."""
    run = training.train("digits", tmp_path / "run", **TINY).path
    before = {path.name: path.read_bytes() for path in run.glob("*.safetensors")}

    def full(descriptor):
        raise OSError(28, "No space left on device", "disk")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        training.resume(run, steps=6)
    assert {path.name: path.read_bytes() for path in run.glob("*.safetensors")} == before
    assert [path.name for path in run.glob(".*")] == [run_config.LOCK]


def test_batches_visit_every_example_once_per_epoch():
    stream = torch.cat([trainer.batch_indices(7, 3, step, seed=5) for step in range(14)])
    for epoch in stream.reshape(6, 7):
        assert sorted(epoch.tolist()) == list(range(7))
    assert not torch.equal(stream[:7], stream[7:14])
    larger = trainer.batch_indices(3, 10, 0, seed=5)
    assert [int((larger == i).sum()) for i in range(3)] in ([4, 3, 3], [3, 4, 3], [3, 3, 4])


def test_learning_rate_warms_up_and_ends_at_zero():
    config = TrainConfig(steps=100, warmup=10, lr=1.0)
    rates = [trainer.learning_rate(config, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9]
    assert rates[9] == pytest.approx(1.0, abs=0.03) and rates[100] == pytest.approx(0.0)


def test_the_average_warms_up():
    """After n steps the average is no older than a tenth of them."""
    average = trainer.warmed_ema(0.999)
    ema, at_zero = [torch.zeros(())], 1.0
    for i in range(1, 40):
        average(ema, [torch.ones(())], torch.tensor(i))
        at_zero *= min(0.999, (1 + i) / (10 + i))
        assert ema[0].item() == pytest.approx(1 - at_zero, rel=1e-5)
    assert at_zero < 1e-4


def test_weight_decay_leaves_all_but_matrices_alone():
    schema = Schema("levels", (1, 8, 8), 17)
    model, _ = configure(schema, 1000, schedule="learned-ends")
    built = build(model, schema)
    hidden, outer, vectors, outside = parameter_groups(built, 0.1)
    decays = [g["weight_decay"] for g in (hidden, outer, vectors, outside)]
    assert decays == [0.1, 0.1, 0, 0]
    assert all(p.ndim in (2, 4) for p in (*hidden["params"], *outer["params"]))
    spared = {id(p) for p in outside["params"]}
    for part in (built.process, built.head, built.decoder):
        assert {id(p) for p in part.parameters()} <= spared
    spared |= {id(p) for p in vectors["params"]}
    sizes = [len(g["params"]) for g in (hidden, outer)]
    assert len(spared) + sum(sizes) == len(list(built.parameters()))
    blocks = [m for m in built.network.blocks.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    scales = [m for n, m in built.network.blocks.named_modules() if n.endswith("scale_shift")]
    assert sizes[0] == len(blocks) - len(scales) and sizes[1] == len(scales) + 5


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 2, 3, 3)])
def test_a_step_of_muon_is_orthogonal(shape):
    """A matrix decays and moves by 0.4 √max(m, n) of about UVᵀ of gradient and momentum, whatever
    their size; a vector of the other groups is AdamW's."""
    start, vector = torch.randn(shape), torch.randn(3)
    m, v, w = (nn.Parameter(x.clone()) for x in (start, vector, vector))
    groups = [{"params": [m], "weight_decay": 0.1}, {"params": [v], "weight_decay": 0.0}]
    muon = Muon(groups, lr=0.01, betas=(0.9, 0.99))
    adamw = torch.optim.AdamW([w], lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    matrix = (shape[0], start[0].numel())
    momentum = torch.zeros(shape)
    for _ in range(2):
        before = m.detach().clone()
        m.grad, v.grad = 1e-3 * torch.randn(shape), torch.randn(3)
        w.grad = v.grad.clone()
        momentum = 0.95 * momentum + m.grad
        u, s, vt = torch.linalg.svd(
            (m.grad + 0.95 * momentum).reshape(matrix), full_matrices=False
        )
        muon.step(), adamw.step()
        step = (before * (1 - 0.01 * 0.1) - m.detach()).reshape(matrix)
        turned = u.T @ step @ vt.T / (0.01 * 0.4 * max(matrix) ** 0.5)
        off = turned - turned.diagonal().diag()
        assert off.abs().max() < 1e-3
        assert (turned.diagonal()[s > 0.1 * s.max()] - 0.95).abs().max() < 0.4
        torch.testing.assert_close(v, w)


def test_a_run_with_muon_is_resumed_exactly(tmp_path):
    options = TINY | {"optimizer": "muon"}
    whole = training.train("digits", tmp_path / "whole", **options)
    assert whole.config.train.optimizer == "muon"
    step = trainer.Trainer.step

    def crash(self):
        if self.at.step == 3:
            raise RuntimeError("power cut")
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            training.train("digits", tmp_path / "cut", **options)
    training.resume(tmp_path / "cut")
    assert_same_run(whole.path, tmp_path / "cut")


def test_two_trainings_do_not_write_into_one_run(trained, tmp_path):
    """Neither two resumed ones nor one beside a new one; the files stay as they are."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = (run / run_config.STATE).read_bytes()
    with (
        alone_in(run),
        pytest.raises(ValueError, match="run is being trained by another process; wait"),
    ):
        training.resume(run, steps=9)
    assert (run / run_config.STATE).read_bytes() == before
    found, step = [], trainer.Trainer.step

    def beside(self):
        if self.at.step == 1:
            with pytest.raises(ValueError, match="trained by another"):
                training.resume(tmp_path / "new")
            found.append(self.at.step)
        step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", beside)
        training.train("digits", tmp_path / "new", **TINY)
    assert found == [1]
    assert_same_run(trained, tmp_path / "new")
    training.resume(run, steps=5)  # the lock is gone with its holder
    with (
        alone_in(tmp_path / "same"),
        pytest.raises(ValueError, match="trained by another"),
    ):
        training.train("digits", tmp_path / "same", **TINY)  # of two that begin it at once
    assert not (tmp_path / "same" / run_config.CONFIG).exists()


def test_the_bound_of_a_trained_model_is_below_the_density(tmp_path):
    """ELBO <= log P(x) within the stated error, on a mixture of Gaussians of known density, and
    close to it: the model did learn."""
    rng = np.random.default_rng(0)
    means, spread = np.array([[-2.0, 1.0], [2.0, -1.0]]), 0.5
    x = means[rng.integers(0, 2, 3000)] + spread * rng.normal(size=(3000, 2))
    np.savez(tmp_path / "x.npz", x_train=x[:1600], x_val=x[1600:1800], x_test=x[1800:2000])
    options = {"steps": 400, "width": 64, "depth": 2, "lr": 5e-3, "warmup": 20, "dropout": 0.0}
    run = training.train(str(tmp_path / "x.npz"), tmp_path / "run", evaluate_every=200, **options)
    test = run.examples()
    distance = (test.numpy()[:, None] - means) ** 2 / (2 * spread**2)
    log_p = np.log(np.exp(-distance.sum(-1)).mean(1) / (2 * np.pi * spread**2))
    for times in (ContinuousTime(), TimeGrid.uniform(64)):
        result = evaluate(run.model, test, times=times, calls=32)
        gap = result.nats + log_p.mean()  # E log P(x) − ELBO on the same examples
        assert gap > -3 * result.standard_error.monte_carlo
        if times.steps is None:
            assert gap < 0.25


@pytest.mark.parametrize(
    ("shape", "levels", "options", "expected"),
    [
        ((1, 8, 8), 17, {}, ("conv", "levels", 128)),
        ((1, 28, 28), 256, {}, ("unet", "level-curves", 16)),
        ((3, 32, 32), 2, {"network": "conv"}, ("conv", "levels", 16)),
        ((1, 28, 28), 256, {"network": "mlp", "head": "levels"}, ("mlp", "levels", 128)),
        ((5,), 256, {}, ("mlp", "level-curves", 128)),
        ((3, 32, 32), None, {}, ("unet", "velocity", 16)),
        ((3, 32, 32), 256, {"head": "noise"}, ("unet", "noise", 16)),
        ((8,), 256, {"process": "absorbing"}, ("mlp", "symbols", 128)),
    ],
)
def test_the_preset_follows_the_data(shape, levels, options, expected):
    """... and what a preset names can be built and read back."""
    schema = Schema("real" if levels is None else "levels", shape, levels)
    model, train = configure(schema, 1000, **options)
    assert (model.network, model.head, train.batch) == expected
    build(replace(model, width=8, depth=1), schema)
    assert type(model).from_dict(model.to_dict(), "here") == model


def test_numbers_of_numpy_are_options(tmp_path):
    rows = {"a": np.random.default_rng(0).normal(size=60)}
    options = {"steps": np.int64(2), "width": np.arange(8, 9)[0], "lr": np.float32(1e-3)}
    run = training.train(rows, tmp_path / "run", depth=np.int8(1), **options)
    kinds = [type(value) for value in (run.config.train.steps, run.config.model.width)]
    assert kinds == [int, int] and run.config.train.lr == pytest.approx(1e-3)
    x = run.examples()
    found = evaluate(run.model, x, calls=np.int64(8), seed=np.int64(3))
    assert json.loads(json.dumps(found.to_dict()))["seed"] == 3


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": 16.0}, "width must be an integer"),
        ({"steps": True}, "steps must be an integer"),
        ({"lr": "fast"}, "lr must be a number"),
        ({"lr": float("inf")}, "lr must be finite"),
        ({"lr": 10**400}, "lr must be a number"),
        ({"levels": "17"}, "levels must be an integer"),
        ({"size": 4.5}, "size must be an integer"),
        ({"minutes": "3"}, "minutes must be a finite number"),
        ({"preset": None}, "preset must be a string"),
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"steps": 5, "minutes": 1}, "steps and minutes both say how long"),
        ({"step": 5}, "step must be one of"),
        ({"shard": True, "compile": True}, "shard does not go with compile"),
    ],
)
def test_options_are_checked_before_any_data_are_read(tmp_path, options, says):
    with pytest.raises(ValueError, match=says):
        training.train(tmp_path / "no such file.npz", tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
