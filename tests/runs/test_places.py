"""Where a run's data are is this user's word: a run from elsewhere reads nothing but itself."""

import json
import shutil

import numpy as np
import pytest
import torch
from support.commands import nelbo_fails, run_ok
from support.runs import TINY

from nelbo._utils import cache, limits, tensor_files
from nelbo.runs import config as run_config
from nelbo.runs import own_data
from nelbo.runs.config import read_config
from nelbo.runs.loading import load as load_run
from nelbo.runs.train import resume, train

SECRET = "hunter2"


@pytest.fixture
def me(tmp_path, monkeypatch):
    """A user without a past."""
    monkeypatch.setenv("NELBO_CACHE", str(tmp_path / "me"))
    monkeypatch.setattr(cache, "_unwritten", {})
    return monkeypatch


@pytest.fixture
def other(me, tmp_path):
    """Afterwards, another user who has none."""
    return lambda: me.setenv("NELBO_CACHE", str(tmp_path / "other"))


def rows(path, seed=0):
    np.save(path, np.random.default_rng(seed).integers(0, 3, (60, 3)))
    return path


@pytest.fixture
def run(me, tmp_path):
    return train(str(rows(tmp_path / "x.npy")), tmp_path / "run", **TINY).path


def names(run, source):
    document = json.loads((run / "config.json").read_text())
    document["data"]["source"] = str(source)
    (run / "config.json").write_text(json.dumps(document))


def test_a_run_of_this_user_just_works_also_where_it_was_moved(run, tmp_path):
    moved = run.rename(tmp_path / "moved")
    assert len(load_run(moved).examples()) == 6


def test_a_run_from_elsewhere_reads_its_data_once_they_are_given(run, tmp_path, other, capsys):
    """At the place that it names they are not read; where they are given they are, and then
    they are known, also for another run of the same data."""
    other()
    copy = shutil.copytree(run, tmp_path / "copy")
    for command in (["evaluate", run], ["report", run], ["train", "--resume", run]):
        line = nelbo_fails(capsys, *command)
        assert "nelbo evaluate RUN --data DATA" in line
    here = shutil.copy(tmp_path / "x.npy", tmp_path / "here.npy")
    run_ok("evaluate", run, "--data", here, "--calls", 8, "--json")
    out, err = capsys.readouterr()
    assert json.loads(out)["examples"] == 60
    assert "are the run's own data" in err
    (tmp_path / "x.npy").unlink()
    run_ok("evaluate", copy, "--calls", 8, "--json")
    assert json.loads(capsys.readouterr().out)["examples"] == 6


def test_other_data_do_not_make_its_own_known(run, tmp_path, other, capsys):
    other()
    run_ok("evaluate", run, "--data", rows(tmp_path / "y.npy", 1), "--calls", 8)
    assert "are the run's own" not in capsys.readouterr().err
    assert own_data.place_of(read_config(run)) is None


def test_nothing_is_copied_or_opened_for_a_run_from_elsewhere(run, tmp_path, me, capsys):
    """Folders of the victim, by a URL, by a link, by a path through the run, and by the hub."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "a.csv").write_text(f"password,{SECRET}\n1,{SECRET}\n2,{SECRET}\n")
    rows(secret / "x.npy", 2)
    me.setenv("NELBO_CACHE", str(tmp_path / "victim"))
    (run / "link").symlink_to(secret)
    for source in (
        f"file://{secret}",
        f"local://{secret}/a.csv",
        secret / "a.csv",
        run / "link" / "x.npy",
        f"{run}/../secret/x.npy",
        f"hub:{secret}",
        secret / "data.parquet",
    ):
        names(run, source)
        line = nelbo_fails(capsys, "evaluate", run)
        assert "are not read" in line and SECRET not in line and "password" not in line
    kept = [path for path in (tmp_path / "victim").rglob("*") if path.is_file()]
    assert not kept


def test_of_data_that_changed_nothing_is_shown(me, tmp_path, capsys):
    pytest.importorskip("polars")
    table = tmp_path / "t.csv"
    table.write_text("a,b\n" + "".join(f"{i % 7},{'xy'[i % 2]}\n" for i in range(60)))
    run = train(str(table), tmp_path / "run", **TINY).path
    for text in (f"password,{SECRET}\n1,{SECRET}\n", f"a,b\n{SECRET},x\n", "a,b\n1\n"):
        table.write_text(text)
        line = nelbo_fails(capsys, "evaluate", run)
        assert SECRET not in line and "password" not in line and "nelbo inspect" in line


def test_built_in_data_and_a_table_in_the_run_are_its_own(trained, tmp_path, other):
    pl = pytest.importorskip("polars")
    frame = pl.DataFrame({"a": [i % 7 for i in range(60)], "b": ["xy"[i % 2] for i in range(60)]})
    with_table = train(frame, tmp_path / "table", **TINY)
    assert len(with_table.examples()) == 6
    other()
    for path in (trained, with_table.path, shutil.copytree(with_table.path, tmp_path / "moved")):
        assert len(load_run(path).examples()) > 5


def test_a_user_may_trust_a_run(run, other, me):
    other()
    me.setenv(limits.TRUST, "1")
    assert len(load_run(run).examples()) == 6


def test_without_a_cache_a_training_still_knows_its_data(me, tmp_path, capsys):
    (tmp_path / "file").touch()
    me.setenv("NELBO_CACHE", str(tmp_path / "file"))
    run = train(str(rows(tmp_path / "x.npy")), tmp_path / "run", progress=True, **TINY)
    assert "the place of the data is not remembered" in capsys.readouterr().err
    assert len(run.examples()) == 6


@pytest.mark.parametrize("change", ["too many", "too few", "early"])
def test_a_grid_is_one_of_the_steps_asked(trained, tmp_path, monkeypatch, change):
    run = load_run(shutil.copytree(trained, tmp_path / "run"))
    right = run.grid(3).times.tolist()
    path = run.path / run_config.GRIDS
    document = json.loads(path.read_text())
    (key,) = (key for key, times in document.items() if times == right)
    lies = {"too many": [i / 500 for i in range(1, 501)], "too few": [1.0], "early": [2, 3, 1.0]}
    path.write_text(json.dumps(document | {key: lies[change]}))
    assert run.grid(3).times.tolist() == right


def test_events_are_read_only_so_far(trained, tmp_path, me):
    """Neither a file of gigabytes nor one endless line; what is whole is read."""
    run = shutil.copytree(trained, tmp_path / "run")
    path, whole = run / run_config.METRICS, run_config.read_metrics(run)
    line = path.read_text().splitlines()[0]
    path.write_text(f'{line[:-1]}, "more": "{"x" * 10**6}"}}\n' + path.read_text())
    assert run_config.read_metrics(run) == whole
    with path.open("ab") as file:
        file.truncate(2**30)
    with pytest.raises(ValueError, match=r"has 1073741824 bytes, more than"):
        load_run(run)


@pytest.mark.parametrize(
    "change",
    [{"step": "3"}, {"step": 1.5}, {"best": []}, {"other": 1}, {"skipped": None}],
)
def test_a_state_says_where_it_stood(trained, tmp_path, change):
    run = shutil.copytree(trained, tmp_path / "run")
    tensors, about = tensor_files.read_tensors(run / run_config.STATE)
    about["progress"] |= change
    tensor_files.write_tensors(run / run_config.STATE, tensors, about)
    with pytest.raises(ValueError, match=r"does not say where the training stood|lacks a part"):
        resume(run)


@pytest.mark.parametrize("name", ["optimizer.x.exp_avg", "optimizer.exp_avg"])
def test_moments_are_of_parameters(trained, tmp_path, name):
    run = shutil.copytree(trained, tmp_path / "run")
    tensors, about = tensor_files.read_tensors(run / run_config.STATE)
    tensors[name] = torch.zeros(1)
    tensor_files.write_tensors(run / run_config.STATE, tensors, about)
    with pytest.raises(ValueError, match="moments of unknown parameters"):
        resume(run)


@pytest.mark.parametrize(
    ("name", "content", "source"),
    [
        ("model_index.json", {}, "diffusers"),
        ("config.json", {"_class_name": "UNet2DModel"}, "diffusers"),
        ("config.json", {"model_type": "bert"}, "hf"),
    ],
)
def test_a_folder_of_another_library_is_answered_with_its_source(tmp_path, name, content, source):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises((FileNotFoundError, ValueError), match=f"give it as {source}:") as error:
        load_run(tmp_path)
    assert str(tmp_path) in str(error.value)
