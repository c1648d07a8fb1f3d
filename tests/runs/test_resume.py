"""A training that is killed at any moment of writing its files ends as one that is not."""

import contextlib
import itertools
import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save
from support.runs import Killed, killed_after

from nelbo._utils import files, tensor_files
from nelbo.evaluation.result import StandardError
from nelbo.runs import config as run_config
from nelbo.runs import training_state
from nelbo.runs.loading import load as load_run
from nelbo.runs.train import resume, train
from nelbo.training import trainer

SMALL = {
    "steps": 4,
    "batch": 8,
    "width": 8,
    "depth": 1,
    "evaluate_every": 2,
    "lr": 0.02,
    "seed": 5,
}
LEARNED = {"schedule": "learned-ends", "times": "importance", "warmup": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run on rows of levels, beside its data; do not change it, copy it.

    Its second weights are better than its first, so that both are written.
    """
    path = tmp_path_factory.mktemp("whole")
    np.save(path / "x.npy", np.random.default_rng(0).integers(0, 3, (60, 3)) // 2 * 2)
    run = train(str(path / "x.npy"), path / "run", **SMALL, **LEARNED).path
    first, second = (event["validation"] for event in run_config.read_metrics(run))
    assert second < first
    return run


def contents(run):
    """All that a run holds but the clock's, tensors as their bytes."""
    found = {"names": sorted(p.name for p in run.iterdir() if p.is_file())}
    found |= {n: (run / n).read_bytes() for n in (run_config.CONFIG, run_config.WEIGHTS)}
    for name in {run_config.STATE, run_config.BEFORE} & {*found["names"]}:
        tensors, about = tensor_files.read_tensors(run / name, hashed=True)
        del about["progress"]["seconds"]
        found[name] = about
        found |= {
            f"{name} {k}": t.flatten().view(torch.uint8).tolist() for k, t in tensors.items()
        }
    events = [json.loads(line) for line in (run / run_config.METRICS).read_text().splitlines()]
    found[run_config.METRICS] = [{k: v for k, v in e.items() if k != "seconds"} for e in events]
    return found


def growth(model, *_, **__):
    """Stand in for the validation: it is better the nearer the weights are to zero."""
    nats = sum(p.detach().double().square().sum().item() for p in model.network.parameters())
    error = StandardError(0.1, 0.1, 0.0)
    return SimpleNamespace(nats=nats, unit="bits/dim", standard_error=error)


def kill_at(patch, moment):
    """Be killed at this moment: they are counted before a sync and before and after a renaming.

    Of what is then on its way nothing is tidied up. Returns the moments so far, in a list.
    """
    past = []
    sync, rename, unlink = os.fsync, os.replace, os.unlink

    def reach(what):
        past.append(what)
        if len(past) >= moment:
            raise Killed

    def killed_sync(handle):
        reach("sync")
        sync(handle)

    def killed_rename(old, new):
        reach(f"before {new.name}")
        rename(old, new)
        reach(new.name)

    patch.setattr(os, "fsync", killed_sync)
    patch.setattr(os, "replace", killed_rename)
    patch.setattr(os, "unlink", lambda path: None if len(past) >= moment else unlink(path))
    return past


@pytest.mark.filterwarnings("ignore:.*is missing. the state before it:UserWarning")
def test_killed_at_each_moment_of_writing(whole, tmp_path, monkeypatch):
    """Among them are those of a state that makes room for a newer one, and of the last one."""
    monkeypatch.setattr(trainer, "evaluate", growth)
    source, options = str(whole.parent / "x.npy"), {**SMALL, **LEARNED, "evaluate_every": 1}
    options["steps"] = 3
    expected = contents(train(source, tmp_path / "whole", **options).path)
    for moment in itertools.count(1):
        run = tmp_path / str(moment)
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            past = kill_at(patch, moment)
            train(source, run, **options)
        if len(past) < moment:
            break
        if run_config.is_run(run):
            resume(run)
        else:
            train(source, run, **options)
        assert contents(run) == expected, (moment, past)
    # in the user's cache an entry has 64 digits
    files = [name for name in past if " " not in name and name != "sync" and len(name) < 64]
    states = [name for name in files if name != run_config.WEIGHTS]
    state, before = run_config.STATE, run_config.BEFORE
    assert states == [run_config.CONFIG, state, before, state, state]
    assert files.count(run_config.WEIGHTS) > 1


@pytest.fixture(scope="module")
def longer(whole):
    """A run of 6 steps that was killed in the last one, and one that was not."""
    source, options = str(whole.parent / "x.npy"), {**SMALL, **LEARNED, "steps": 6}
    with killed_after(5):
        train(source, whole.parent / "killed", **options)
    train(source, whole.parent / "longer", **options)
    return whole.parent / "killed", whole.parent / "longer"


def test_what_a_run_takes_on_the_disk(longer):
    """While it is trained, the best weights and two states of 4 or 5 times; then one."""
    _, ended = longer
    sizes = [{p.name: p.stat().st_size for p in run.glob("*.safetensors")} for run in longer]
    assert {*sizes[0]} == {"model.safetensors", "state.safetensors", "before.safetensors"}
    assert {*sizes[1]} == {"model.safetensors", "state.safetensors"}
    best = load_run(ended).step
    names = {
        name.partition(".")[0]
        for name in tensor_files.read_tensors(ended / "state.safetensors")[0]
    }
    assert ("best" in names) == (best != 6) and {"model", "ema", "optimizer"} <= names


@pytest.mark.parametrize("damage", ["one bit", "cut", "other", "missing"])
def test_a_damaged_state_gives_way_to_the_one_before(longer, tmp_path, damage):
    """It is said, and no bit of the end is another one; the damaged one is never the one kept."""
    killed, whole = longer
    run = shutil.copytree(killed, tmp_path / "run")
    path = run / run_config.STATE
    content = bytearray(path.read_bytes())
    if damage == "one bit":
        content[-len(content) // 3] ^= 1
    path.write_bytes(content[: 100 if damage == "cut" else None])
    if damage == "other":  # whole, but by a program that knows no hash
        files.write(path, save({"x": torch.zeros(2)}))
    if damage == "missing":
        path.unlink()
    with pytest.warns(UserWarning, match=r"state.safetensors is .*; the state before .* step 2"):
        resume(run)
    left, right = contents(run), contents(whole)
    assert left == right


def test_every_bit_of_a_state_counts(whole, tmp_path):
    """Flipped anywhere, it is an error or says the same."""
    before, words = tensor_files.read_tensors(whole / run_config.STATE, hashed=True)
    content = (whole / run_config.STATE).read_bytes()
    rng, path, same = np.random.default_rng(0), tmp_path / "state.safetensors", 0
    for place in rng.integers(0, 8 * len(content), 300):
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            tensors, about = tensor_files.read_tensors(path, hashed=True)
        except ValueError as error:
            assert "truncated, damaged or not" in str(error)
        else:
            same += 1
            assert about == words and tensors.keys() == before.keys()
            assert all(torch.equal(tensors[k], before[k]) for k in before)
    assert same < 10


def test_damaged_weights_are_not_used(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    content = bytearray((run / run_config.WEIGHTS).read_bytes())
    content[-1] ^= 1
    (run / run_config.WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=r"model.safetensors is .*damaged.*SHA-256"):
        load_run(run)
    resume(run)
    assert contents(run) == contents(whole)


def test_the_weights_of_a_finished_run_are_made_again(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / run_config.WEIGHTS).unlink()
    resume(run)
    assert contents(run) == contents(whole)


def test_a_run_that_was_stopped_at_its_new_last_step_is_measured(whole, tmp_path, monkeypatch):
    step = trainer.Trainer.step

    def stop(self):
        step(self)
        training_state.save(tmp_path / "run", self)
        raise Killed

    monkeypatch.setattr(trainer.Trainer, "step", stop)
    with pytest.raises(Killed):
        train(str(whole.parent / "x.npy"), tmp_path / "run", **SMALL)
    monkeypatch.setattr(trainer.Trainer, "step", step)
    run = resume(tmp_path / "run", steps=1)
    assert run.weights == "averaged weights of step 1" and [
        event["step"] for event in run.metrics
    ] == [1]


@pytest.mark.parametrize("there", [True, False])
def test_a_failed_training_leaves_what_was_there(whole, tmp_path, monkeypatch, there):
    def fail(self):
        raise ValueError("no step")

    monkeypatch.setattr(trainer.Trainer, "step", fail)
    if there:
        (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="no step"):
        train(str(whole.parent / "x.npy"), tmp_path / "run", **SMALL)
    assert [path.name for path in tmp_path.rglob("*")] == ["run"] * there


STOPPING = SMALL | {"steps": 60, "patience": 3, "lr": 0.1, "dropout": 0.0}


@pytest.fixture(scope="module")
def overfitted(whole):
    """A run that its validation bound has stopped; do not change it, copy it."""
    run = train(str(whole.parent / "x.npy"), whole.parent / "overfitted", **STOPPING)
    steps = [event["step"] for event in run.metrics]
    best = min(run.metrics, key=lambda event: event["validation"])["step"]
    assert best > 2 and steps[-1] == best + 3 * SMALL["evaluate_every"] < 60
    assert run.weights == f"averaged weights of step {best}"
    return run.path


@pytest.mark.parametrize("saved", [False, True])
def test_patience_survives_a_kill(overfitted, tmp_path, monkeypatch, saved):
    """Killed before the last state is saved, or after the one before it: it stops at the same."""
    last = run_config.read_metrics(overfitted)[-1]["step"]
    killed_at = last - SMALL["evaluate_every"] if saved else last
    save = training_state.save

    def killed(out, learner):
        if saved or learner.at.step < killed_at:
            save(out, learner)
        if learner.at.step == killed_at:
            raise Killed

    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(training_state, "save", killed)
        train(str(overfitted.parent / "x.npy"), tmp_path / "run", **STOPPING)
    resume(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(overfitted)


def test_a_stopped_training_says_why_and_goes_on_if_asked(overfitted, tmp_path, capsys):
    run = shutil.copytree(overfitted, tmp_path / "run")
    before = contents(run)
    best = resume(run, progress=True).weights.removeprefix("averaged weights of ")
    last = run_config.read_metrics(run)[-1]["step"]
    assert contents(run) == before
    assert (
        f"training stopped at step {last} of 60: 3 validations in a row have not improved on the"
        f" bound of {best} (--patience)"
    ) in capsys.readouterr().err
    steps = [event["step"] for event in resume(run, patience=0, progress=True).metrics]
    assert steps[-1] == 60 and len(steps) == 30
    assert "stopped" not in capsys.readouterr().err
