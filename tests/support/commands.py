"""The command line as a user calls it."""

import pytest

from nelbo.cli import main


def nelbo_fails(capsys, *arguments):
    """Run a command that must fail; return its one line."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines and lines[-1].startswith("nelbo: ")
    return lines[-1]


def run_ok(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code in (0, None)
