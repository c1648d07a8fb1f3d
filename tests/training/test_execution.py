"""The way in which a training is run changes neither what is kept nor how it is measured."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from support.runs import killed_after

from nelbo._utils import tensor_files
from nelbo.diffusion.model import measuring
from nelbo.runs import config as run_config
from nelbo.runs import training_state
from nelbo.runs.loading import load as load_run
from nelbo.runs.train import resume, train
from nelbo.training import trainer
from nelbo.training.config import TrainConfig

SMALL = {"steps": 4, "batch": 16, "width": 16, "evaluate_every": 2, "warmup": 0, "lr": 0.01}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(path, np.random.default_rng(0).integers(0, 5, (80, 4)))
    return str(path)


def two_steps(source, tmp_path, **options):
    """The learner of a run after two steps, and what its first layer gave in the second."""
    taken = []

    def stop(self):
        self.model.network.first.register_forward_hook(lambda *a: taken.append(a[-1]))
        step(self)
        taken.clear()
        step(self)
        made.append(self)
        raise KeyboardInterrupt

    made, step = [], trainer.Trainer.step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "step", stop)
        train(source, tmp_path, **SMALL | options)
    return made[0], taken


def test_bf16_is_inside_the_network_in_training_only(source, tmp_path):
    narrow, seen = two_steps(source, tmp_path / "narrow", precision="bf16")
    wide, seen_wide = two_steps(source, tmp_path / "wide")
    assert {t.dtype for t in seen} == {torch.bfloat16}
    assert {t.dtype for t in seen_wide} == {torch.float32}
    assert all(p.dtype == torch.float32 for p in narrow.model.network.parameters())
    assert narrow.at.recent != wide.at.recent
    assert narrow.at.recent == pytest.approx(wide.at.recent, rel=0.02)
    z, t = torch.zeros(3, 4).double(), torch.full((3,), 0.5).double()
    seen.clear()
    with measuring(narrow.model):
        narrow.model.predict(z, t)
    assert narrow.model.precision is torch.bfloat16
    assert seen[0].dtype == torch.float32 and narrow.average.precision is None
    written = json.loads((tmp_path / "narrow" / run_config.CONFIG).read_text())["train"]
    assert (written["precision"], written["deterministic"]) == ("bf16", False)


def test_a_run_in_bf16_continues_exactly(source, tmp_path):
    train(source, tmp_path / "whole", precision="bf16", **SMALL)
    whole = tensor_files.read_tensors(tmp_path / "whole" / run_config.STATE)[0]
    with killed_after(3):
        train(source, tmp_path / "half", precision="bf16", **SMALL)
    resume(tmp_path / "half")
    half = tensor_files.read_tensors(tmp_path / "half" / run_config.STATE)[0]
    assert all(torch.equal(whole[name], half[name]) for name in whole)


def test_compiled_networks_keep_the_names_of_their_weights(source, tmp_path, monkeypatch):
    """The compiler itself is not asked: it takes longer than all other tests of a file."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda f, *a, **k: asked.append(f) or f)
    run = train(source, tmp_path / "run", compile=True, **SMALL)
    plain = train(source, tmp_path / "plain", **SMALL)
    assert len(asked) == 1
    states = [tensor_files.read_tensors(r.path / run_config.STATE)[0] for r in (run, plain)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_deterministic_is_for_the_steps_alone(source, tmp_path, monkeypatch):
    seen, gradient = [], trainer.Trainer._gradient

    def watched(self, step):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return gradient(self, step)

    monkeypatch.setattr(trainer.Trainer, "_gradient", watched)
    train(source, tmp_path / "run", deterministic=True, **SMALL)
    assert seen == [True] * 4
    assert not torch.are_deterministic_algorithms_enabled()
    train(source, tmp_path / "other", **SMALL)
    assert seen[4:] == [False] * 4


def poison(monkeypatch, steps):
    """The gradient of these steps is not finite."""
    gradient = trainer.Trainer._gradient

    def poisoned(self, step):
        u, loss = gradient(self, step)
        if step in steps:
            next(self.model.network.parameters()).grad[0] = math.inf
        return u, loss

    monkeypatch.setattr(trainer.Trainer, "_gradient", poisoned)


def test_a_gradient_that_is_not_finite_stops_with_the_last_state(source, tmp_path, monkeypatch):
    poison(monkeypatch, {2})
    with pytest.raises(ValueError, match=r"non-finite \(.*, gradient .*\) at step 3; the w"):
        train(source, tmp_path / "run", **SMALL)
    monkeypatch.undo()
    whole = train(source, tmp_path / "whole", **SMALL)
    resumed = resume(tmp_path / "run")
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_step_that_is_not_finite_can_be_skipped(source, tmp_path, monkeypatch):
    """It is counted and changes nothing: no weight, average, moment or law of the times."""
    poison(monkeypatch, {2, 3, 6})
    options = SMALL | {"steps": 8, "nonfinite": "skip"}
    before = []
    step = trainer.Trainer.step

    def watched(self):
        training_state.save(tmp_path / "run", self)
        tensors, _ = tensor_files.read_tensors(tmp_path / "run" / run_config.STATE)
        before.append(tensors)
        step(self)

    monkeypatch.setattr(trainer.Trainer, "step", watched)
    run = train(source, tmp_path / "run", **options)
    changed = [
        any(not torch.equal(a[k], b[k]) for k in a if k in b and not k.startswith("best."))
        for a, b in pairwise(before)
    ]
    assert changed == [True, True, False, False, True, True, False]
    assert [event["skipped"] for event in run.metrics] == [0, 2, 2, 3]


def test_ten_skipped_steps_in_a_row_are_too_many(source, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(3, 40)))
    with pytest.raises(ValueError, match=r"non-finite 10 times in a row .* at step 13; the"):
        train(source, tmp_path / "run", nonfinite="skip", **SMALL | {"steps": 40})
    assert load_run(tmp_path / "run").metrics[-1]["skipped"] == 9


def test_flags_are_true_or_false():
    assert TrainConfig(compile=True).compile is True
    with pytest.raises(ValueError, match="compile must be true or false; got 1"):
        TrainConfig(compile=1)
    with pytest.raises(ValueError, match="steps must be an integer; got True"):
        TrainConfig(steps=True)
