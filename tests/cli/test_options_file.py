"""Options from nelbo.toml or --config, and the completion of a shell."""

import pytest
from support.commands import nelbo_fails, run_ok

from nelbo.cli import app
from nelbo.runs.config import read_config

TINY = "steps = 2\nbatch = 8\nwidth = 8\ndepth = 1\n"


def test_options_come_from_a_file_and_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nelbo.toml").write_text(f"[train]\n{TINY}evaluate_every = 2\n")
    run_ok("train", "digits", "--out", "one", "--steps", 1)
    said = capsys.readouterr().err
    used = "options from nelbo.toml: --width, --depth, --batch, --evaluate-every"
    assert said.splitlines()[0] == used  # the command line takes precedence for steps
    run = read_config(tmp_path / "one")
    assert (run.train.steps, run.train.batch, run.model.width) == (1, 8, 8)
    run_ok("train", "--resume", "one")  # as it was configured, and not as in nelbo.toml
    assert "options from" not in capsys.readouterr().err

    (tmp_path / "run.yaml").write_text("train:\n  lr: fast\n")
    line = nelbo_fails(capsys, "train", "digits", "--out", "two", "--config", "run.yaml")
    assert "run.yaml" in line and '"fast"' in line
    line = nelbo_fails(capsys, "--config", "run.yaml", "train", "--resume", "one")
    assert '"fast"' in line  # asked for, so it is used
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.toml", "[train]\nlearning_rate = 1\n", 'Unknown option: "[learning_rate]" from'),
        ("x.toml", "[training]\nlr = 1\n", "x.toml has the table [training]; known are [train], "),
        ("x.toml", "[train", "x.toml cannot be read"),
        ("x.yaml", "train: [", "x.yaml cannot be read"),
        ("x.json", "[1]", "the value must be a JSON object; got [1] in"),
        ("x.json", '{"train": 1}', "train must be a JSON object; got 1 in"),
        ("x.ini", "", "--config reads a .toml, .yaml or .json file; got"),
        ("x.toml", None, "x.toml: No such file"),
    ],
)
def test_a_mistake_in_a_file_is_one_sentence(tmp_path, capsys, name, content, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    asked = ("train", "digits", "--out", tmp_path / "run", "--config", tmp_path / name)
    assert says in nelbo_fails(capsys, *asked)
    assert not (tmp_path / "run").exists() and app.config == ()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_options_and_their_values(tmp_path, monkeypatch, shell):
    monkeypatch.setenv("HOME", str(tmp_path))  # the shell's startup file is there
    path = tmp_path / "completion"
    run_ok("--install-completion", "--shell", shell, "--output", path)
    text = path.read_text()
    assert all(word in text for word in ("evaluate", "gamma-min", "stratified"))
