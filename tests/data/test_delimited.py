"""Text tables: separators, headings and line ends, and the advice where they are not clear."""

import polars as pl
import pytest

from nelbo import data
from nelbo.data.inspection import inspect
from nelbo.data.tabular import tables


def write(tmp_path, content, name="t.csv"):
    path = tmp_path / name
    path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("size, m;mass, kg\n1,25;2,5\n2,5;3,25\n", {"size, m": "1,25", "mass, kg": "2,5"}),
        ("a;b,c\n1;2,3\n", {"a": "1", "b,c": "2,3"}),
        ("a;b,c\n1,2\n3,4\n", {"a;b": "1", "c": "2"}),
        ('"a;b",c\n"1;2",3\n', {"a;b": "1;2", "c": "3"}),
        ('"x|y"\tz\n"1|2"\t"3\t4"\n', {"x|y": "1|2", "z": "3\t4"}),
        ("a,b\r1,x\r2,y\r", {"a": "1", "b": "x"}),
        ('a,b\r1,"x\ry"\r', {"a": "1", "b": "x\ry"}),
        ("a,b\r\n1,x\r\n\r\n2,y\r\n", {"a": "1", "b": "x"}),
        ("note\nfirst; second\nthird\n", {"note": "first; second"}),
        ('note\n"one, two"\n""\n', {"note": "one, two"}),
    ],
)
def test_the_separator_is_the_one_that_fits_all_rows(tmp_path, content, expected):
    frame = tables.read(write(tmp_path, content))
    assert frame.row(0, named=True) == expected


def test_a_guess_of_the_separator_is_said(tmp_path):
    path = write(tmp_path, "a, m;b\n" + "1,5;2\n2,5;3\n" * 20)
    for notes in (data.load(path).notes, inspect(path).warnings):
        assert any("separated by ';', though ',' fits too" in note for note in notes)
    assert data.load(write(tmp_path, "a,b\n" + "1,2\n3,4\n" * 20, "u.csv")).notes[0][:5] == "split"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("2019,2020\n1,2\n", "numbers alone, '2019'.*if they are names.*such as y2019"),
        ("6.3,red\n5.1,blue\n6.0,green\n", "holds '6.3' where a name should be; if that line"),
        ("5,red\n5,blue\n6,red\n", "holds '5' where a name should be"),
        ("red,round\nblue,long\nred,round\n", "row 2 of .* is its first line again"),
        ("red,round\nblue,round\nred,long\n", "holds 'red', as other rows do"),
        ("a,b\n1,2\na,b\n3,4\n", "row 2 of .* is its first line again; remove that row"),
        ("x\n1,5\n2\n", "line 2 .* has 2 fields where .* 1; quote cells that hold ','"),
        ("my table\na;b\n1;2\n", "line 2 .* 2 fields where the heading has 1.*';'"),
        ("x\n1\n\n2\n", 'line 3 of .* is blank; remove it, or write "" for an empty cell'),
        ("a b\n1 2\n3 4\n", "separated by blanks; separate it by commas"),
        ("sep=;\na;b\n1;2\n", "'sep=;', an instruction for spreadsheets; remove it"),
        ("\na,b\n1,2\n", "first line of .* is blank"),
    ],
)
def test_what_is_no_heading_is_said_with_what_to_do(tmp_path, content, says):
    with pytest.raises(ValueError, match=says) as error:
        tables.read(write(tmp_path, content))
    assert "\n" not in str(error.value)


def test_names_that_are_numbers_beside_words_are_noted(tmp_path):
    notes = []
    frame = tables.read(write(tmp_path, "land,2019,2020\nDE,1,2\nFR,3,4\n"), notes)
    assert frame.columns == ["land", "2019", "2020"]
    assert "taken as the columns' names, though '2019' is a number" in notes[0]
    notes.clear()
    tables.read(write(tmp_path, "full name\nJohn Smith\nJane Doe\n"), notes)
    assert "has one column, 'full name'; if blanks separate" in notes[0]


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_one_column_with_empty_cells_keeps_its_rows(tmp_path, suffix):
    frame = pl.DataFrame({"x": [1, None, 3]})
    path = tmp_path / f"t{suffix}"
    path.write_bytes(tables.to_bytes(frame, suffix))
    assert [cell or None for cell in tables.read(path)["x"]] == ["1", None, "3"]


def test_headings_are_taken_without_the_blanks_around_them(tmp_path):
    (tmp_path / "x.csv").write_text('a , b," c "\n' + "".join(f"{i},{i},x\n" for i in range(12)))
    notes: list[str] = []
    frame = tables.read(tmp_path / "x.csv", notes)
    assert frame.columns == ["a", "b", "c"] and frame.height == 12
    assert any("has headings such as 'a '" in note for note in notes)
    (tmp_path / "x.csv").write_text("a, a\n1,2\n")
    with pytest.raises(ValueError, match="two columns of the name 'a'"):
        tables.read(tmp_path / "x.csv", [])
