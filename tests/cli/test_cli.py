"""The command line: what a user sees, and what a wrong argument costs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from support.commands import nelbo_fails, run_ok
from support.files import arrays_in

import nelbo
from nelbo.__main__ import SPINS
from nelbo._utils import tensor_files
from nelbo._utils.progress import progress_bar
from nelbo.cli import app
from nelbo.models.config import ModelConfig
from nelbo.training.config import TrainConfig


@pytest.mark.parametrize("command", [c for c in app if not c.startswith("-")])
def test_every_option_says_what_it_is(command):
    for argument in app[command].assemble_argument_collection(parse_docstring=True):
        assert argument.parameter.help, argument.name


def test_the_options_of_train_are_the_fields_of_the_configurations():
    """Declared once, with their help and their default; a list of times is no option."""
    arguments = app["train"].assemble_argument_collection(parse_docstring=True)
    options = {name: argument for argument in arguments for name in argument.names}
    for config, groups in ((ModelConfig, {"Model"}), (TrainConfig, {"Training", "Computation"})):
        for each in fields(config):
            if each.name == "grid":
                assert "--grid" not in options
                continue
            argument = options[f"--{each.name.replace('_', '-')}"]
            assert argument.parameter.show_default(None) == f"by preset, {each.default}"
            assert " ".join(argument.parameter.help.split()) in " ".join(config.__doc__.split())
            assert {group.name for group in argument.parameter.group} <= groups


def test_version_and_help(capsys):
    run_ok("--version")
    assert capsys.readouterr().out.strip() == f"nelbo {nelbo.__version__}"
    run_ok("train", "--help")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())  # lines as they fit
    assert "--resume" in text and "1800" in text and "[default: auto]" in text


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
    ids=str,
)
def test_waiting_threads_leave_the_processor_to_others(monkeypatch, given, wanted):
    """Unless the caller has said how they wait; and before torch is imported, which reads it."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    code = "from nelbo.__main__ import main; import os, sys; sys.argv[1:] = ['--version']\n"
    code += "assert 'torch' not in sys.modules\ntry: main()\nexcept SystemExit: pass\n"
    code += "print(os.environ.get('GOMP_SPINCOUNT'))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.split()[-1] == str(wanted), found.stderr


def test_a_bar_fits_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    note = "bound 2.783, validation 2.405 bits/dim"
    with progress_bar("train", 12_574) as update:
        update(12_574, note)
    bar = capsys.readouterr().err
    assert "12574/12574" in bar and note in bar and "0:00:00" in bar


def test_evaluate_json(trained, capsys):
    run_ok("evaluate", trained, "--json", "--calls", 1)
    result = json.loads(capsys.readouterr().out)
    assert result["examples"] == 447 and result["dims"] == 64 and result["split"] == "test"
    assert result["steps"] is None and 0.5 <= result["calls_per_example"] <= 1
    terms = result["terms"]
    assert sum(terms.values()) == pytest.approx(result["bits_per_dim"])
    run_ok("evaluate", trained, "--json", "--calls", 1)
    assert json.loads(capsys.readouterr().out) == result


def test_evaluate_without_variates(trained, capsys):
    """Another estimate of the same bound, at no more calls: its pilot is out of them."""
    found = []
    for option in ("--variates", "--no-variates"):
        run_ok("evaluate", trained, "--json", "--calls", 4, option)
        found.append(json.loads(capsys.readouterr().out))
    errors = [each["standard_error"]["monte_carlo"] for each in found]
    difference = found[0]["bits_per_dim"] - found[1]["bits_per_dim"]
    assert 0 < abs(difference) < 5 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    assert errors[0] < errors[1]
    calls = [each["calls_per_example"] for each in found]
    assert calls[1] <= calls[0] <= 4 and calls[0] > 3.5


def test_evaluate_to_a_target_error_and_save(trained, tmp_path, capsys):
    """The error asked for is reached, and the file holds the terms of each example."""
    file = tmp_path / "scores.npz"
    data = np.random.default_rng(0).integers(0, 17, (40, 8, 8))
    np.save(tmp_path / "some.npy", data)
    arguments = ("--data", tmp_path / "some.npy", "--target-error", 0.05, "--save", file)
    run_ok("evaluate", trained, *arguments, "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["standard_error"]["monte_carlo"] <= 0.05
    saved = arrays_in(file)
    terms = saved["prior"] + saved["reconstruction"] + saved["diffusion"]
    np.testing.assert_allclose(saved["nats"], terms, rtol=1e-12)
    assert saved["nats"].mean() == pytest.approx(result["nats"], rel=1e-12)
    assert saved["standard_error"].shape == (40,) and (saved["standard_error"] > 0).all()
    assert json.loads(str(saved["about"])) == result


def test_evaluate_by_importance_samples(trained, tmp_path, capsys):
    np.save(tmp_path / "some.npy", np.random.default_rng(0).integers(0, 17, (5, 8, 8)))
    some = ("--data", tmp_path / "some.npy", "--grid", "uniform", "--steps", 3)
    run_ok("evaluate", trained, *some, "--importance-samples", 4, "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["how"]["samples"] == 4 and result["calls_per_example"] == 12
    run_ok("evaluate", trained, *some, "--importance-samples", 4)
    assert "importance-weighted" in capsys.readouterr().out


def test_evaluate_by_the_probability_flow(trained, tmp_path, capsys):
    np.save(tmp_path / "some.npy", np.random.default_rng(0).integers(0, 17, (2, 8, 8)))
    run_ok("evaluate", trained, "--data", tmp_path / "some.npy", "--ode", "--tolerance", 0.001)
    text = capsys.readouterr().out
    assert "at tolerance 0.001; at 0.01" in text and "backward" in text


def test_evaluate_table(trained, capsys):
    run_ok("evaluate", trained, "--steps", 2, "--split", "validation", "--calls", 1)
    text = capsys.readouterr().out
    for word in ("bound", "bits/dim", "prior", "reconstruction", "diffusion", "350 examples"):
        assert word in text


def test_evaluate_other_data(trained, tmp_path, capsys):
    np.save(tmp_path / "some.npy", np.random.default_rng(0).integers(0, 17, (5, 8, 8)))
    run_ok("evaluate", trained, "--data", tmp_path / "some.npy", "--json", "--calls", 4)
    assert json.loads(capsys.readouterr().out)["examples"] == 5


def test_samples(trained, tmp_path):
    run_ok("sample", trained, "--n", 5, "--steps", 2, "--out", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.mode == "L"
    for name in ("a.npz", "b.npz"):
        run_ok("sample", trained, "--n", 5, "--steps", 2, "--seed", 1, "--out", tmp_path / name)
    a, b = (arrays_in(tmp_path / name)["x"] for name in ("a.npz", "b.npz"))
    assert a.shape == (5, 1, 8, 8) and np.array_equal(a, b) and a.min() >= 0 and a.max() <= 16


def test_bad_data(tmp_path, capsys):
    """More of these in test_data; here that they arrive as one line, and leave no run behind."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "nan.npy", np.array([[0.1, np.nan], [0.2, 0.3], [1.0, 2.0]]))
    np.save(tmp_path / "negative.npy", np.array([[0, -1], [2, 3], [1, 1]]))
    np.save(tmp_path / "seven.npy", rng.integers(0, 8, (20, 4)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for i, side in enumerate((8, 9, 8)):
        Image.fromarray(np.zeros((side, side), np.uint8)).save(tmp_path / "mixed" / f"{i}.png")
    shutil.copytree(tmp_path / "mixed", tmp_path / "cut")
    whole = (tmp_path / "cut" / "1.png").read_bytes()
    (tmp_path / "cut" / "1.png").write_bytes(whole[: len(whole) // 2])
    for source, options, words in [
        ("missing.npy", (), "missing.npy"),
        ("empty", (), "empty"),
        ("mixed", (), "--size"),
        ("cut", (), "1.png"),
        ("nan.npy", (), "NaN"),
        ("negative.npy", (), "negative"),
        ("seven.npy", ("--levels", 5), "levels"),
    ]:
        out = tmp_path / "run"
        line = nelbo_fails(capsys, "train", tmp_path / source, "--out", out, *options)
        assert words in line
        assert not out.exists()


def test_bad_options(trained, tmp_path, capsys):
    run = tmp_path / "run"
    for arguments, words in [
        (("train",), "nelbo train digits --out"),
        (("evaluate", trained, "--importance-samples", 4), "give --steps"),
        (("evaluate", trained, "--steps", 2, "--importance-samples", 0), "at least 1; got 0"),
        (("evaluate", trained, "--ode", "--steps", 2), "leave --steps"),
        (("evaluate", trained, "--ode", "--calls", 9), "--tolerance"),
        (("evaluate", trained, "--tolerance", 0.1), "need --ode; add it"),
        (("evaluate", trained, "--dequantise", "uniform"), "need --ode; add it"),
        (("evaluate", trained, "--grid", "uniform"), "give --steps T too"),
        (("evaluate", trained, "--calls", 9, "--target-error", 1), "not both"),
        (("evaluate", trained, "--columns"), "of a run's table"),
        (("evaluate", trained, "--columns", "--json"), "--json one object; give one"),
        (("evaluate", trained, "--target-error", 0), "target_error must be positive; got 0"),
        (("evaluate", trained, "--save", "scores.csv"), ".npz file; got scores.csv"),
        (("evaluate", "openai:nowhere.pt", "--data", "digits"), "nowhere"),
        (("train", "digits", "--out", run, "--steps", 0), "steps must be at least 1; got 0"),
        (("train", "digits", "--out", run, "--lr", -1), "lr must be positive; got -1"),
        (("train", "digits", "--out", run, "--head", "nose"), "nose"),
        (("train", "digits", "--out", run, "--width", 10), "multiple of 8"),
        (("train", "digits", "--out", run, "--step", "learned"), "--step mixture"),
        (("train", "digits", "--out", run, "--decoder", "bernoulli"), "2 levels"),
        (("train", "digits", "--out", run, "--gamma-min", 9), "gamma_min must be less"),
        (("train", "digits", "--out", trained), "--resume"),
        (("train", "digits", "--out", tmp_path), "not a run"),
        (("train", "digits", "--resume", trained), "leave DATA out"),
        (("train", "--resume", trained, "--lr", 1), "leave --lr out"),
        (("train", "--resume", run), "does not exist"),
        (("evaluate", run), "does not exist"),
        (("evaluate", tmp_path), "not a run"),
        (("evaluate", trained, "--steps", 0), "steps must be at least 1; got 0"),
        (("evaluate", trained, "--calls", 0.1), "calls must be at least 0.29 per example"),
        (("evaluate", trained, "--calls", 1, "--save", "x.npz"), "calls must be at least 2 per"),
        (("evaluate", trained, "--calls", "inf"), "must be a finite number or None; got inf"),
        (
            ("evaluate", trained, "--calls", 1e30),
            "calls must be at most 1e+09 per example; got 1e+30; try 24",
        ),
        (("train", "digits", "--out", run, "--batch", 10**30), "batch must be at most 1e+12"),
        (("evaluate", trained, "--split", "tset"), "train, validation, test; got 'tset'"),
        (("sample", trained, "--out", tmp_path / "x.gif"), ".png or .npz"),
        (("sample", trained), ".png or .npz; got none"),
        (("sample", trained, "--length", 3), "are for other libraries' models; leave them out"),
        (("sample", trained, "--out", tmp_path / "x.png", "--n", 0), "at least 1; got 0"),
        (("sample", trained, "--out", tmp_path / "x.png", "--steps", 0), "at least 1; got 0"),
        (("sample", trained, "--out", "/proc/x.png", "--n", 1, "--steps", 1), "/proc"),
        (("evaluate", trained, "--colour"), "--colour"),
        (("inspect", trained), "is a run and not data"),
        (("train", "digits", "--out", "/dev/null/x"), "cannot be made: Not a directory; choose"),
        (("compress", trained, "x.npz", "--out", tmp_path / "x.nlb"), "x.npz; give a .npy, .npz"),
        (("evaluate", trained, "--seed", -1), "seed must be at least 0; got -1"),
        (("train", "digits", "--out", run, "--lr", "inf"), "lr must be finite"),
        (
            ("train", "digits", "--out", run, "--process", "absorbing", "--step", "beta"),
            "posterior",
        ),
        (("train", "--resume", trained, "--preset", "best"), "leave --preset out"),
        (("sample", trained, "--out", tmp_path / "run.png" / "x.npz"), "run.png"),
        (("evaluate", trained, "--device", "abacus"), "no device 'abacus'"),
        (("train", "digits", "--out", run, "--device", "abacus"), "no device 'abacus'"),
    ]:
        (tmp_path / "run.png").write_text("a file, and so the folder is not empty")
        assert words in nelbo_fails(capsys, *arguments), arguments
        assert not run.exists()


def test_data_of_another_shape(trained, tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.zeros((4, 9, 9), np.int64))
    line = nelbo_fails(capsys, "evaluate", trained, "--data", tmp_path / "x.npy")
    assert "(1, 8, 8)" in line and "(9, 9)" in line


def test_damaged_runs(trained, tmp_path, capsys):
    def damaged(name):
        return shutil.copytree(trained, tmp_path / name)

    run = damaged("no weights")
    (run / "model.safetensors").unlink()
    assert "does not exist" in nelbo_fails(capsys, "evaluate", run)

    for size in (0, 7, 1000, -1):
        run = damaged(f"cut to {size}")
        whole = (run / "model.safetensors").read_bytes()
        (run / "model.safetensors").write_bytes(whole[:size])
        assert "truncated" in nelbo_fails(capsys, "evaluate", run)

    run = damaged("other shape")
    document = json.loads((run / "config.json").read_text())
    document["model"]["width"] = 16
    (run / "config.json").write_text(json.dumps(document))
    assert "another architecture" in nelbo_fails(capsys, "evaluate", run)

    run = damaged("other names")
    tensors = load_file(run / "model.safetensors")
    tensors["network.extra"] = tensors.pop("network.position")
    save_file(tensors, run / "model.safetensors")
    assert "another architecture" in nelbo_fails(capsys, "evaluate", run)

    for path, value, words in [
        (("colour",), 1, "unknown key 'colour'"),
        (("format",), 1, "has format 1 and this nelbo reads 2: train the run again"),
        (("model", "colour"), 1, "unknown key 'model.colour'"),
        (("model", "width"), "wide", "model.width must be an integer; got 'wide'"),
        (("model", "head"), "nose", "head must be one of"),
        (("train", "steps"), 0, "steps must be at least 1"),
        (("data", "schema"), {"kind": "levels"}, "schema"),
        (("model",), [1], "must be a JSON object"),
        (("model", "width"), True, "width must be an integer; got True"),
        (("data", "source"), 5, "source"),
    ]:
        run = damaged(f"config {path} {value!r}")
        document = json.loads((run / "config.json").read_text())
        place = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (run / "config.json").write_text(json.dumps(document))
        line = nelbo_fails(capsys, "evaluate", run)
        assert words in line and "config.json" in line

    run = damaged("no json")
    (run / "config.json").write_text("{")
    assert "not JSON" in nelbo_fails(capsys, "evaluate", run)

    run = damaged("nested")
    (run / "config.json").write_text("[" * 100_000)
    assert "not JSON" in nelbo_fails(capsys, "evaluate", run)

    run = damaged("metrics")
    (run / "metrics.jsonl").write_text('[1]\n{"a": 1}\nword\n')
    run_ok("train", "--resume", run)

    run = damaged("state of nothing")
    tensor_files.write_tensors(run / "state.safetensors", {}, {})
    assert "another architecture" in nelbo_fails(capsys, "train", "--resume", run)

    run = damaged("no whole state")
    whole = (run / "state.safetensors").read_bytes()
    for name in ("state.safetensors", "before.safetensors"):
        (run / name).write_bytes(whole[:-9])
    assert "truncated" in nelbo_fails(capsys, "train", "--resume", run, "--steps", 8)


def test_ctrl_c_and_resume(tmp_path):
    """A real process, a real signal."""
    run, source = tmp_path / "run", tmp_path / "x.npy"
    np.save(source, np.random.default_rng(0).integers(0, 4, (60, 3)))
    options = ["--batch", "16", "--width", "8", "--depth", "1", "--evaluate-every", "5"]
    command = [sys.executable, "-m", "nelbo", "train", str(source), "--out", str(run), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--steps", "100000"], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        while not (run / "state.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"nelbo train --resume {run}" in errors.replace("\n", "") and "Traceback" not in errors
    done = json.loads((run / "config.json").read_text())["train"]["steps"]
    assert done == 100000
    run_ok("train", "--resume", run, "--steps", 5)


def test_data_that_changed(tmp_path, capsys):
    """A run refuses data that are no longer its own: a test split could hold what it has seen."""
    rng, path, run = np.random.default_rng(0), tmp_path / "x.npy", tmp_path / "run"
    np.save(path, rng.integers(0, 4, (60, 3)))
    options = ("--steps", 2, "--batch", 8, "--width", 8, "--levels", 4)
    run_ok("train", path, "--out", run, *options)
    run_ok("evaluate", run)
    np.save(path, rng.integers(0, 4, (60, 3)))
    assert "changed since the run was trained" in nelbo_fails(capsys, "evaluate", run)
    assert "changed since the run was trained" in nelbo_fails(capsys, "train", "--resume", run)
    run_ok("evaluate", run, "--data", path)


def test_a_failed_training_leaves_no_run_behind(tmp_path, capsys):
    run = tmp_path / "run"
    command = ["train", "digits", "--out", run, "--batch", 8, "--width", 8, "--lr", 1e30]
    assert "at step 2" in nelbo_fails(capsys, *command, "--warmup", 0)
    assert not run.exists()


def test_augmentation_is_for_images(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 4, (60, 3)))
    command = ("train", tmp_path / "x.npy", "--out", tmp_path / "run", "--augment", 0.5)
    assert "augment is for images" in nelbo_fails(capsys, *command)


def test_names_with_brackets_and_a_terminal_of_few_symbols(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run[1] ü")
    np.save(tmp_path / "some [bold].npy", np.zeros((5, 8, 8), np.int64))
    command = [sys.executable, "-m", "nelbo", "evaluate", str(run), "--calls", "4"]
    result = subprocess.run(
        [*command, "--data", str(tmp_path / "some [bold].npy")],
        env={**os.environ, "PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=True,
    )
    assert b"[bold]" in result.stdout and b"bits/dim" in result.stdout
