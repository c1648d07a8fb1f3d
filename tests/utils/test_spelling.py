"""Options in messages are shown as their reader writes them."""

import numpy as np
import pytest
from support.commands import nelbo_fails

import nelbo
from nelbo._utils import spelling


def test_a_message_has_dashes_on_the_command_line_only(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.arange(40).reshape(10, 4) % 9)
    out = tmp_path / "run"
    line = nelbo_fails(capsys, "train", tmp_path / "x.npy", "--levels", 5, "--out", out)
    assert line.endswith("or train with --levels 9 or more")
    with pytest.raises(ValueError, match=r"or train with levels 9 or more$"):
        nelbo.train(tmp_path / "x.npy", out, levels=5)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("try --gamma-min of -20, or --lr", "try gamma_min of -20, or lr"),
        ("see: nelbo train --out RUN; or --size 5", "see: nelbo train --out RUN; or size 5"),
        ("pip install --upgrade nelbo", "pip install --upgrade nelbo"),
        ("step=S, on the command line --step s", "step=S, on the command line --step s"),
        ("a--b and x --- y", "a--b and x --- y"),
    ],
)
def test_commands_stay_as_they_are(text, wanted):
    assert spelling.shown(text) == wanted
    with spelling.of_command_line():
        assert spelling.shown(text) == text
