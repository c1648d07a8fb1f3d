"""Signals, vanishing folders and failures: nothing of the user's is lost, nothing half-written
stays, and what a killed command left goes with the next one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.runs import TINY

from nelbo._utils import files
from nelbo.runs import config as run_config
from nelbo.runs.train import resume, train
from nelbo.training import trainer

training = sys.modules["nelbo.runs.train"]  # the function has its name
unix = pytest.mark.skipif(os.name != "posix", reason="signals and locks of Unix")
ENDLESS = TINY | {"steps": 10**6, "evaluate_every": 10**6}


def at_step(monkeypatch, step, action):
    """Have something happen before a step of the next training."""
    before = trainer.Trainer.step

    def stepped(self):
        if self.at.step == step:
            action()
        return before(self)

    monkeypatch.setattr(trainer.Trainer, "step", stepped)


def fail():
    raise ValueError("it failed")


# ---- what a failed training removes


def test_a_failed_training_removes_only_what_it_made(tmp_path, monkeypatch):
    """The user's files beside it stay, in its folders too, and so does a folder that was there."""
    run = tmp_path / "run"

    def keep_notes_and_fail():
        (run / "tensorboard").mkdir(exist_ok=True)
        for name in ("notes.txt", "model.py", "tensorboard/mine.txt", ".config.json.backup"):
            (run / name).write_text("mine")
        (run / "figures").mkdir()
        (run / "figures" / "state.safetensors").write_text("mine")
        fail()

    at_step(monkeypatch, 1, keep_notes_and_fail)
    with pytest.raises(ValueError, match="it failed"):
        train("digits", run, **TINY)
    assert {p.name for p in run.rglob("*") if p.is_file()} == {
        *("notes.txt", "model.py", "mine.txt", ".config.json.backup", "state.safetensors")
    }


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_was_there_stays(tmp_path, monkeypatch, there):
    run = tmp_path / "run"
    if there:
        run.mkdir()
    at_step(monkeypatch, 1, fail)
    with pytest.raises(ValueError, match="it failed"):
        train("digits", run, **TINY)
    assert run.exists() == there and not (there and list(run.iterdir()))


def test_two_trainings_on_one_folder_do_not_overwrite_each_other(tmp_path, monkeypatch):
    """The other began and ended while this one still read its data."""
    run, before = tmp_path / "run", training.configure
    seeds = {}

    def other_first(*args, **options):
        monkeypatch.setattr(training, "configure", before)
        train("digits", run, seed=1, **TINY)
        seeds["content"] = (run / run_config.WEIGHTS).read_bytes()
        return before(*args, **options)

    monkeypatch.setattr(training, "configure", other_first)
    with pytest.raises(ValueError, match="is a run; continue it with resume"):
        train("digits", run, seed=2, **TINY)
    assert (run / run_config.WEIGHTS).read_bytes() == seeds["content"]


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_run_folder_that_vanishes_ends_the_training_at_once(tmp_path, monkeypatch, capfd, how):
    run, steps = tmp_path / "run", []

    def vanish():
        if how != "removed":
            run.rename(tmp_path / "moved")
        else:
            for path in sorted(run.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            run.rmdir()
        if how == "replaced":
            run.mkdir()
            (run / "mine").touch()

    at_step(monkeypatch, 2, vanish)
    monkeypatch.setattr(sys.modules["nelbo.runs.training"], "_bar", counted(steps))
    with pytest.raises(FileNotFoundError, match=r"removed or moved.*--resume"):
        train("digits", run, progress=True, **ENDLESS | {"evaluate_every": 2})
    assert steps == [1, 2]
    assert [p.name for p in run.iterdir()] == ["mine"] if how == "replaced" else not run.exists()
    assert "Traceback" not in capfd.readouterr().err
    monkeypatch.undo()
    if how == "moved":
        resume(tmp_path / "moved", steps=4)


def counted(steps):
    from contextlib import contextmanager

    @contextmanager
    def bar(*_):
        yield lambda done, note: steps.append(done)

    return bar


@pytest.mark.filterwarnings("ignore:events for tensorboard are no longer written:UserWarning")
def test_tensorboard_that_fails_is_no_matter(tmp_path, monkeypatch, capfd):
    pytest.importorskip("tensorboard")
    import shutil

    run = tmp_path / "run"

    def vanish():
        shutil.rmtree(run / "tensorboard")
        time.sleep(0.1)

    at_step(monkeypatch, 1, vanish)
    train("digits", run, **TINY)
    assert "Traceback" not in capfd.readouterr().err


# ---- what killed commands leave


def left_behind(folder, name):
    """A temporary file as a killed command leaves it."""
    handle, temporary = files.part_of(folder / name)
    os.close(handle)
    return Path(temporary)


@unix
def test_leftovers_go_with_the_next_command_and_nothing_else_does(tmp_path):
    """Ours by name that no process holds: not the user's files, not one that is being written."""
    mine = [".x.npz.12345678", f"x{files.PART}", f".x.short{files.PART}", ".nelbo-part"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / f".link.abcd1234{files.PART}").symlink_to(tmp_path / mine[0])
    left = left_behind(tmp_path, "other.csv")
    with files.folder_part_of(tmp_path / "images") as folder:
        (folder / "0.png").touch()
        held, writing = files.part_of(tmp_path / "x.npz")
        files.check_writable(tmp_path / "y.npz")
        assert not left.exists()
        assert Path(writing).exists() and (folder / "0.png").exists()
        os.close(held)
    files.check_writable(tmp_path / "y.npz")
    assert sorted(p.name for p in tmp_path.iterdir() if not p.is_symlink()) == sorted(mine)


def test_a_name_of_full_length_can_be_written(tmp_path):
    """A temporary name is not longer than a file system allows."""
    files.write(tmp_path / ("x" * 251 + ".csv"), b"1")
    assert len(list(tmp_path.iterdir())) == 1


SLOW = """
import os, sys, time
from nelbo._utils import files as _files
from nelbo.cli import main
where, arguments = sys.argv[1], sys.argv[2:]
before = os.fsync
def wait(handle):
    if where in os.readlink(f"/proc/self/fd/{handle}"):
        print("writing", flush=True)
        time.sleep(60)
    before(handle)
_files.os.fsync = wait
main(arguments)
"""


def killed_while_writing(number, where, *arguments):
    """Run a command and send it a signal while it writes a file; what it said."""
    command = [sys.executable, "-c", SLOW, where, *map(str, arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert any("writing" in line for line in process.stdout)
        process.send_signal(number)
        errors = process.stderr.read()
    return process.returncode, errors


@unix
@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_command_that_is_ended_leaves_nothing_half_written(trained, tmp_path, number):
    out = tmp_path / "out" / "x.npz"
    command = ("sample", trained, "--n", 2, "--steps", 2, "--grid", "uniform", "--out", out)
    code, errors = killed_while_writing(number, "x.npz", *command)
    left = list(out.parent.iterdir())
    assert "Traceback" not in errors
    if number == signal.SIGKILL:
        assert code == -number and all(map(files.is_part, left)) and len(left) == 1
        files.check_writable(out)
        assert not list(out.parent.iterdir())
    else:
        assert code == 128 + number and not left


@unix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_training_that_is_ended_is_saved(tmp_path, monkeypatch, number):
    from nelbo._utils.signals import Interrupted

    at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted):
        train("digits", tmp_path / "run", **ENDLESS)
    monkeypatch.undo()
    assert resume(tmp_path / "run", steps=4).metrics[-1]["step"] == 4


@unix
def test_what_is_ignored_stays_ignored(tmp_path, monkeypatch):
    """As `nohup` asks for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert train("digits", tmp_path / "run", **TINY).metrics[-1]["step"] == 4
    finally:
        signal.signal(signal.SIGHUP, before)
