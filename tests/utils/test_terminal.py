"""Text printed from an untrusted file is no code for the terminal."""

import pytest
from rich.table import Table

from nelbo._utils.terminal import Terminal
from nelbo._utils.text import printable


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("a\x1b[2Jb", "a\ufffd[2Jb"),
        ("\x9b31m", "\ufffd31m"),
        ("a\rb", "a\ufffdb"),
        ("\u202egnp", "\ufffdgnp"),  # from right to left
        ("naïve \u00a0 表 \t\n", "naïve \u00a0 表 \t\n"),
    ],
)
def test_printable(given, shown):
    assert printable(given) == shown


def test_a_console_shows_marks_in_lines_and_cells(capsys):
    table = Table("a\x1b[1mb", title="c\x1b]0;d")
    table.add_row("e\x1bf")
    console = Terminal(width=40)
    console.print(table)
    console.print("g\x1bh", markup=False)
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.count("\ufffd") == 4


def test_names_of_a_table_are_inspected_so(tmp_path, capsys):
    pytest.importorskip("polars")
    from nelbo.cli import main

    rows = "\n".join(f"{i % 7}.5,u\x1b[31m{i % 2}" for i in range(60))
    (tmp_path / "t.csv").write_text(f"a\x1b[2J,b\n{rows}\n")
    with pytest.raises(SystemExit) as ended:
        main(["inspect", str(tmp_path / "t.csv")])
    said = capsys.readouterr()
    assert ended.value.code in (None, 0)
    assert "\x1b" not in said.out + said.err and "\ufffd" in said.out
