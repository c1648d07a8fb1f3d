"""Cells: what counts as missing, as a number, as a code, and as the same value."""

import json

import numpy as np
import polars as pl
import pytest
import torch
from support.commands import run_ok
from support.runs import TINY

from nelbo import data
from nelbo.cli import main
from nelbo.data.columns import Column
from nelbo.data.inspection import inspect
from nelbo.data.tabular import cells, encoding, streams, tables
from nelbo.data.tabular.inference import infer_column, infer_columns
from nelbo.data.tabular.merging import infer_merged
from nelbo.data.tabular.spelling import canonical, is_number
from nelbo.diffusion.times import TimeGrid
from nelbo.models.conditioning import parse
from nelbo.runs import own_data
from nelbo.runs.train import train
from nelbo.sampling.imputation import impute

LANDS = ["NA", "DE", "FR", "NA", "", "DE"] * 10


def lands(tmp_path, suffix=".csv"):
    frame = pl.DataFrame({"land": LANDS, "size": ["1", "NA", "3", "4", "", "2"] * 10})
    path = tmp_path / f"lands{suffix}"
    frame.write_csv(path) if suffix == ".csv" else frame.write_parquet(path)
    return path


def declare(tmp_path, content):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_words_that_mean_missing_are_named(tmp_path, suffix):
    path = lands(tmp_path, suffix)
    for notes in (data.load(path).notes, inspect(path).warnings):
        assert any(note.startswith("land: the word 'NA' means a missing cell") for note in notes)
        assert any(note.startswith("size: the word 'NA' means a missing cell") for note in notes)
    _, notes = infer_merged([pl.DataFrame({"a": ["x", "NA"]}), pl.DataFrame({"a": ["?", "y"]})])
    assert [note for note in notes if "the words '?', 'NA' mean a missing cell" in note]


@pytest.mark.parametrize(
    "declared",
    [
        {"columns": [{"name": "land", "missing_words": []}]},
        [{"name": "land", "kind": "category", "categories": ["DE", "FR", "NA"], "missing": True}],
        [{"name": "land", "missing_words": ["-"]}],
        {"missing_words": ["n.a."], "columns": [{"name": "land"}]},
    ],
)
def test_a_schema_says_which_words_mean_missing(tmp_path, declared):
    path = lands(tmp_path)
    found = data.load(path, schema=declare(tmp_path, declared))
    (column,) = found.schema.columns
    assert column.categories == ("DE", "FR", "NA") and column.missing
    assert not any("the word" in note for note in found.notes)
    assert Column.from_dict(json.loads(json.dumps(column.to_dict()))) == column
    x = data.load_like(path, found.schema).splits["all"][:, 0].tolist()
    assert x[:6] == [3, 1, 2, 3, 4, 1]


def test_missing_words_alone_are_those_of_all_columns(tmp_path):
    frame = pl.DataFrame(
        {"a": ["-", "x", "NA"] * 5, "b": [-9, 1, 2] * 5, "c": ["-", "1", "2"] * 5}
    )
    frame.write_csv(tmp_path / "t.csv")
    schema = declare(tmp_path, {"missing_words": ["-", "-9"]})
    a, b, c = data.load(tmp_path / "t.csv", schema=schema).schema.columns
    assert a.categories == ("NA", "x") and a.missing
    assert (b.low, b.high, b.missing) == (c.low, c.high, c.missing) == (1, 2, True)
    for each in (frame, {"b": [-9, 1, 2]}):  # numbers by type too
        x, _ = encoding.encode(
            each if isinstance(each, pl.DataFrame) else pl.DataFrame(each), [b], "t"
        )
        assert x[:3, 0].tolist() == [4, 1, 2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("NA", "missing_words must be a list"),
        ([3], r"missing_words\[0\] must be a string"),
        (["a"], "choose one"),
    ],
)
def test_missing_words_that_cannot_be_are_refused(words, says):
    with pytest.raises(ValueError, match=says):
        Column.from_dict(
            {"name": "a", "kind": "category", "categories": ["a", "b"], "missing_words": words}
        )


def test_an_imputation_fills_what_is_empty_and_keeps_words(tmp_path, capsys):
    """Among words NA may be Namibia; among numbers, and where declared, it is nothing."""
    path = lands(tmp_path)
    run = train(str(path), tmp_path / "run", **TINY)
    made = tmp_path / "made.csv"
    command = ["sample", run.path, "--impute", path, "--steps", "2", "--grid", "uniform"]
    run_ok(*command, "--out", made)
    said = capsys.readouterr().err
    assert "land: 'NA' is kept as it is" in said and "size: 'NA' counts as a missing" in said
    full = pl.read_csv(made, infer_schema=False)
    kept = [was or None for was in LANDS]
    assert [a for a, was in zip(full["land"], kept, strict=True) if was] == [*filter(None, kept)]
    assert set(full["land"].filter(pl.Series(kept).is_null())) <= {"DE", "FR"}
    assert full["size"].cast(pl.Float64).is_not_null().all()
    schema = declare(tmp_path, {"missing_words": ["NA"]})
    declared = train(str(path), tmp_path / "declared", schema=str(schema), **TINY)
    assert set(
        impute(declared.model, declared.config.schema, path, TimeGrid.uniform(2), particles=2)[
            "land"
        ]
    ) == {"DE", "FR"}


@pytest.mark.parametrize(
    ("values", "first"),
    [
        (["007", "010", "100"], "007"),
        (["00501", "90210", "10001"], "00501"),
        (["1E5", "2E3", "12e4"], "12e4"),
        (["17", "1E5", "18"], "1E5"),
        (["042.0", "250.1", "401.9"], "042.0"),
        (["007", "x1", "12"], "x1"),
    ],
)
def test_codes_that_look_like_numbers_are_categories_and_stay_as_written(values, first):
    column, notes = infer_column(pl.Series("a", values * 5))
    assert column.categories == tuple(sorted(values)) and repr(first) in " ".join(notes)
    frame = pl.DataFrame({"a": values})
    x, _ = encoding.encode(frame, [column], "t")
    assert encoding.decode(x, [column])["a"].to_list() == values
    assert (
        encoding.encode(pl.DataFrame({"a": ["7", "501", "100000"]}), [column], "t")[0] == 0
    ).all()
    halves = [frame, pl.DataFrame({"a": values[::-1]})]
    assert infer_merged(halves)[0] == [column]


def test_many_codes_are_a_category_or_are_left_out_with_advice():
    zips = [f"{i:05d}" for i in range(9_900, 10_100)]
    column, _ = infer_column(pl.Series("zip", zips * 2))
    assert column.kind == "category" and len(column.categories) == 200
    with pytest.raises(ValueError, match=r'200 different texts.*declare "kind": "rounded"'):
        infer_column(pl.Series("zip", zips))


@pytest.mark.parametrize(
    ("values", "precision"),
    [
        (["1E+05", "2e+05", "3e+05"], 1e5),
        (["1.5e3", "2e3", "3e3"], 500),
        (["0", "0.5", "-1"], 0.5),
    ],
)
def test_numbers_as_programs_write_them_are_numbers(values, precision):
    column, notes = infer_column(pl.Series("a", values))
    assert column.kind == "rounded" and column.precision == precision and not notes


@pytest.mark.parametrize("text", ["2019_20", "1_000", "٣", "0x10", "1e", "+", ".", "nan", "12 3"])
def test_one_grammar_tells_numbers_everywhere(text):
    assert not is_number(text) and canonical(text) == text
    values = [text, "1", "2"]
    if text != "nan":  # a missing cell
        assert infer_column(pl.Series("a", values))[0].categories == tuple(sorted(values))
        with pytest.raises(ValueError, match="holds numbers, but"):
            cells.numbers(pl.Series("a", values))


@pytest.mark.parametrize("text", ["5", "+5.", ".5", "-0", "1e400"[:3], "1E-07", "007", "12.50"])
def test_what_is_a_number_is_read_as_one(text):
    assert is_number(text)
    assert cells.numbers(pl.Series("a", [text])).tolist() == [float(text)]
    assert np.isfinite(float(canonical(text)))


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        (
            ["1,250", "2,100"],
            "write 1250 if its comma groups thousands, and 1.250 if it is a deci",
        ),
        (["1,250,000", "2,100"], "write 1250, not 1,250"),
        (["1,250.5", "950"], "write 1250, not 1,250"),
        (["1,25", "2,5"], "write 1.5, not 1,5"),
        (["1.250,5", "2.100,75"], "write 1250.5, not 1.250,5"),
        (["1 250", "2 100"], "write 1250, not 1 250"),
        (["1'250.5", "2'100"], "write 1250.5, not 1'250.5"),
        (["$1,250.5", "$2.10"], "write 1250.5, not $1,250.5"),
        (["1,5 \u20ac", "7 \u20ac"], "write 1.5, not 1,5 \u20ac"),
        (["15%", "7.5%"], "write 15, not 15%"),
        (["\u22121.5", "\u22127"], "write -1.5, not \u22121.5"),
    ],
)
def test_commas_in_numbers_are_advised_on(values, advice):
    column, (note,) = infer_column(pl.Series("a", values * 5))
    assert column.kind == "category" and advice in note
    many = [values[0].replace("1", str(i), 1) for i in range(1, 100)]
    with pytest.raises(ValueError, match="different texts") as error:
        infer_column(pl.Series("a", many))
    assert "; write " in str(error.value)
    assert infer_columns(pl.DataFrame({"a": ["x,1", "y"]}))[1] == []
    for plain in (["12:30", "9:15"], ["030 123 456", "089 1"], ["2019-01", "3-4"], ["5'", "6'"]):
        assert infer_columns(pl.DataFrame({"a": plain * 5}))[1] == []


def codes_of(values, column):
    frame = pl.DataFrame({"a": values}, strict=False)
    return encoding.encode(frame, [column], "t")[0][:, 0].tolist()


@pytest.mark.parametrize(
    ("classes", "values", "expected"),
    [
        (("1", "2"), [1.0, 2.0, 3.0], [1, 2, 0]),
        (("1", "2"), ["1.0", "+2", "2.00", "2.5"], [1, 2, 2, 0]),
        (("1.0", "2.0"), [2, 1], [2, 1]),
        (("False", "True"), [True, False], [2, 1]),
        (("false", "true"), ["TRUE", "False", "1", "0"], [2, 1, 2, 1]),
        (("0", "1"), ["true", "False"], [2, 1]),
        (("Zoe\u0308",), ["Zo\u00eb", "Zoe"], [1, 0]),
        (("1.1", "1.10"), ["1.10", "1.1", "1.100"], [2, 1, 0]),
        (("007", "1E5"), ["7", "007", "1E5", "100000"], [0, 1, 2, 0]),
        (("true", "x"), ["True", "1"], [1, 0]),
    ],
)
def test_a_value_is_the_same_however_it_is_spelled(classes, values, expected):
    assert codes_of(values, Column("a", "category", categories=classes)) == expected


def test_spellings_of_one_file_are_one_category():
    column, notes = infer_column(pl.Series("a", ["True", "true", "FALSE", "True"]))
    assert column == Column("a", "boolean", categories=("FALSE", "true"))
    column, notes = infer_column(pl.Series("a", ["1", "1.0", "x", "2.50", "2.5"]))
    assert column.categories == ("1", "2.5", "2.50", "x") and "as '1' and as '1.0'" in notes[0]
    chunks = [pl.DataFrame({"a": ["x", "1"]}), pl.DataFrame({"a": ["y", "1.0"]})]
    assert infer_merged(chunks)[0][0].categories == ("1", "x", "y")


def test_other_spellings_change_no_bound(tmp_path, capsys):
    """Integers, floats and booleans, in columns and in conditions, in files of either kind."""
    whole = pl.DataFrame({"g": [1, 2, 3] * 20, "b": [True, False] * 30, "k": [0, 1, 2, 3, 4] * 12})
    as_text = whole.with_columns(
        pl.col("g").cast(pl.Float64).cast(pl.String),
        pl.col("b").replace_strict({True: "TRUE", False: "False"}, return_dtype=pl.String),
    )
    whole.write_parquet(tmp_path / "t.parquet")
    as_text.write_csv(tmp_path / "t.csv")
    schema = declare(tmp_path, [{"name": "g", "kind": "category"}, {"name": "b"}, {"name": "k"}])
    run = train(str(tmp_path / "t.parquet"), tmp_path / "run", schema=str(schema), **TINY)
    both = [run.batch(tmp_path / name)[0].x for name in ("t.parquet", "t.csv")]
    assert both[0].equal(both[1]) and (both[0] > 0).all()
    given = train(str(tmp_path / "t.csv"), tmp_path / "given", condition=["b", "g"], **TINY)
    laws = [given.batch(tmp_path / name)[0].condition for name in ("t.parquet", "t.csv")]
    assert laws[0].equal(laws[1])
    typed = parse(["b=true", "g=2"], given.config.schema)
    assert typed.equal(parse(["b=TRUE", "g=2.0"], given.config.schema))


def test_cells_that_training_did_not_have_are_counted_and_said(tmp_path, capsys):
    rows = pl.DataFrame({"g": ["u", "v"] * 30, "k": [0, 1, 2] * 20})
    rows.write_csv(tmp_path / "t.csv")
    run = train(str(tmp_path / "t.csv"), tmp_path / "run", **TINY)
    odd = pl.DataFrame({"g": ["u", "V", "V", "NA", "v"] * 4, "k": [0, 1, 9, 2, 0] * 4})
    odd.write_csv(tmp_path / "odd.csv")
    said = [
        "8 cells of g, such as 'V', are not among its categories: counted as (other)",
        "4 cells of g, such as 'NA', are missing, but none was in training: counted as (other)",
        "4 cells of k, such as 9, lie outside 0 .. 2: counted as just outside",
    ]
    assert set(data.load_like(tmp_path / "odd.csv", run.config.schema).notes) == {*said}
    commands = (
        ["evaluate", run.path, "--calls", "4", "--data", tmp_path / "odd.csv"],
        ["score", run.path, tmp_path / "odd.csv", "--calls", "8", "--out", tmp_path / "s.csv"],
    )
    for command in commands:
        run_ok(*command)
        told = capsys.readouterr().err
        assert all(line in told for line in said)
    with pytest.warns(UserWarning, match="8 cells of g"):
        run.batch({"g": ["V"] * 8, "k": [0] * 8})
    holes = odd.with_columns(k=pl.lit(None, pl.Int64))
    told = []
    impute(run.model, run.config.schema, holes, TimeGrid.uniform(2), particles=2, tell=told.append)
    assert said[0] in told


def test_rows_read_in_blocks_are_counted_once(tmp_path, capsys, monkeypatch):
    rows = pl.DataFrame({"g": ["u", "v"] * 60, "k": [0, 1, 2] * 40})
    (tmp_path / "t").mkdir()
    rows.write_parquet(tmp_path / "t" / "a.parquet")
    run = train(str(tmp_path / "t"), tmp_path / "run", **TINY)
    monkeypatch.setattr(streams, "BLOCK", 20)
    monkeypatch.setattr(streams, "WINDOW", 1)
    (tmp_path / "odd").mkdir()
    odd = rows.with_columns(g=pl.when(pl.col("k") == 1).then(pl.lit("w")).otherwise(pl.col("g")))
    odd.write_parquet(tmp_path / "odd" / "a.parquet")
    x = run.batch(tmp_path / "odd")[0].x
    for _ in range(2):
        assert len(torch.cat(list(x.split(7)))) == 120
        assert x.notes() == [
            "40 cells of g, such as 'w', are not among its categories: counted as (other)"
        ]
    run_ok("evaluate", run.path, "--calls", "4", "--data", tmp_path / "odd")
    assert "40 cells of g" in capsys.readouterr().err


PRICES = [round(1.1 + 0.1 * ((i * 7919) % 9000), 1) for i in range(300)]


@pytest.mark.parametrize("dtype", [pl.Float64, pl.Float32])
def test_prices_are_a_lattice_whatever_type_holds_them(tmp_path, dtype):
    frame = pl.DataFrame({"price": pl.Series(PRICES, dtype=dtype), "k": [0, 1, 2] * 100})
    want = Column("price", "rounded", 0.1, min(PRICES), max(PRICES))
    widened = frame.with_columns(pl.col("price").cast(pl.Float64))  # as pandas and JSON do
    for each in (frame, widened, frame.write_csv):
        if callable(each):
            each(tmp_path / "t.csv")
            each = tables.read(tmp_path / "t.csv")
        (column, _), notes = infer_columns(each)
        assert column == want and not notes
        x = encoding.encode(each, [column], "t", rounding=False)[0][:, 0]
        np.testing.assert_allclose(x, PRICES, rtol=1e-12)
    assert infer_merged([frame[:150], frame[150:]])[0][0] == want


def test_other_numbers_of_float32_stay_what_they_are():
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=300), rng.uniform(512, 513, 300), rng.uniform(1e5, 2e5, 300)):
        assert infer_column(pl.Series("a", values, dtype=pl.Float32))[0].kind == "real"
    eighths = pl.Series("a", [1e5 + i / 8 for i in range(100)], dtype=pl.Float32)
    assert infer_column(eighths)[0].precision == 0.125
    column = Column("a", "rounded", 0.1, 1.0, 900.0)
    for off in (136.25, 136.31, 0.15):
        with pytest.raises(ValueError, match="round it first"):
            encoding.encode(pl.DataFrame({"a": pl.Series([off], dtype=pl.Float32)}), [column], "t")


def test_what_was_trained_on_is_not_refused(tmp_path, capsys):
    """Values of float32, and of a declared precision that is coarser than the data."""
    frame = pl.DataFrame({"price": pl.Series(PRICES, dtype=pl.Float32), "k": [0, 1, 2] * 100})
    frame.write_parquet(tmp_path / "t.parquet")
    for precision in (0.1, 5):
        declared = [{"name": "price", "kind": "rounded", "precision": precision}, {"name": "k"}]
        schema = declare(tmp_path, declared)
        run = train(str(tmp_path / "t.parquet"), tmp_path / f"{precision}", schema=schema, **TINY)
        run_ok("evaluate", run.path, "--calls", "4", "--data", tmp_path / "t.parquet")
        told = capsys.readouterr().err
        assert ("of price, such as" in told and "are rounded to 5, as in training" in told) == (
            precision == 5
        )
        assert run.config.schema.columns[0].rounds == (precision == 5)


def cased(values, dtype=None):
    return pl.DataFrame({"cls": pl.Series(values * 30, dtype=dtype), "x": [0, 1, 2, 3] * 30})


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_whole_numbers_of_a_condition_are_classes(tmp_path, capsys, suffix):
    """As those of arrays; numbers between them are no class."""
    path = tmp_path / f"t{suffix}"
    path.write_bytes(tables.to_bytes(cased([1, 2, 3, 2]), suffix))
    found = data.load(path, condition=["cls"])
    assert found.schema.condition[0].classes == ("1", "2", "3")
    assert any("cls: whole numbers are taken as 3 classes" in note for note in found.notes)
    run = train(str(path), tmp_path / "run", condition=["cls"], **TINY)
    assert own_data.load(run.config).schema == run.config.schema
    other = run.batch(cased([1.0, 2.0, 3.0, 2.0]))[0]
    assert other.condition.equal(run.batch(path)[0].condition)
    command = ["sample", run.path, "--n", "2", "--steps", "2", "--out", tmp_path / "s.csv"]
    run_ok(*command, "--condition", "2.0")
    with pytest.raises(SystemExit) as stop:
        main([*map(str, command), "--condition", "2.5"])
    assert stop.value.code and "'2.5' is out of range: cls is one of 1" in capsys.readouterr().err


def test_a_schema_says_what_a_condition_is(tmp_path):
    path = tmp_path / "t.csv"
    cased(["1", "2", "3", "NA"]).write_csv(path)
    classes = {}
    for key, declared in {
        "words": {"missing_words": []},
        "category": {"kind": "category", "categories": ["1", "2", "3", "NA"]},
    }.items():
        schema = declare(tmp_path, [{"name": "cls", **declared}, {"name": "x"}])
        found = data.load(path, condition=["cls"], schema=schema)
        classes[key] = found.schema.condition[0].classes
        assert [column.name for column in found.schema.columns] == ["x"]
        again = data.load(path, condition=["cls"], schema=found.schema)
        assert again.schema == found.schema
    assert set(classes.values()) == {("1", "2", "3", "NA")}
    cased([1, 2, 3, 2]).write_csv(path)
    schema = declare(tmp_path, [{"name": "cls", "kind": "real"}, {"name": "x"}])
    found = data.load(path, condition=["cls"], schema=schema)
    assert not found.schema.condition[0].classes
    assert data.load(path, condition=["cls"], schema=found.schema).schema == found.schema
    schema = declare(tmp_path, [{"name": "cls", "missing_words": ["-"]}, {"name": "x"}])
    with pytest.raises(ValueError, match=r"the condition 'cls' has missing_words \['-'\]"):
        data.load(path, condition=["cls"], schema=schema)


def test_a_condition_that_is_measured_stays_a_number():
    rng = np.random.default_rng(0)
    ages = [int(i) for i in rng.permutation(120)]
    frame = pl.DataFrame({"age": ages, "cls": [1.0, 2.0, 3.0] * 40, "x": [0, 1, 2, 3] * 30})
    found = data.load(frame, condition=["age", "cls"])
    assert [label.classes for label in found.schema.condition] == [(), ()]
    assert "age has 120 different whole numbers in 120 rows: taken as a number" in found.notes


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_whole_numbers_of_a_real_type_as_a_condition_are_said_to_be_numbers(tmp_path, suffix):
    """As pandas has integers where a cell is missing."""
    path = tmp_path / f"t{suffix}"
    path.write_bytes(tables.to_bytes(cased([1.0, 2.0, 3.0, None]), suffix))
    found = data.load(path, condition="cls")
    assert not found.schema.condition[0].classes
    assert any(
        "cls: whole numbers of a real type are taken as a number; if" in n for n in found.notes
    )
    other = data.load(cased([1.5, 2.0, 3.0, 2.0]), condition="cls")
    assert not any("real type" in note for note in other.notes)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_columns_that_training_did_not_have_are_said_to_be_left_out(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    frame = cased([1, 2, 3, 2]).with_row_index("id")
    schema = data.load(frame, condition="cls").schema
    path.write_bytes(tables.to_bytes(frame.with_columns(y=1, z=2), suffix))
    for like in (schema, data.load(frame).schema):
        (note,) = data.load_like(path, like).notes
        assert note == "columns that training did not have are left out: 'y', 'z'"
        assert data.load_like(frame, like).notes == ()


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (["1.007", "12.077", "850"], True),
        (["1.007", "0.125", "850"], False),
        (["1.007", "1.5", "850"], False),
        (["1007", "1250", "850"], False),
    ],
)
def test_points_that_may_group_thousands_are_said(tmp_path, cells, said):
    rows = "".join(f"{cells[i % 3]};{i % 5}\n" for i in range(40))
    (tmp_path / "x.csv").write_text(f"a;b\n{rows}")
    found = data.load(tmp_path / "x.csv")
    note = "a: 1.007 is read with three decimals; if the point groups thousands, write 1007"
    assert any(note in each for each in found.notes) == said
    pl.DataFrame({"a": [float(c) for c in cells] * 10}).write_parquet(tmp_path / "x.parquet")
    assert not any("thousands" in note for note in data.load(tmp_path / "x.parquet").notes)


def test_several_groups_of_thousands_are_advised_on(tmp_path):
    rows = "".join(f"1.{i % 5}00.000;{i % 5}\n" for i in range(40))
    (tmp_path / "x.csv").write_text(f"a;b\n{rows}")
    assert any(
        "write 1000000, not 1.000.000" in note for note in data.load(tmp_path / "x.csv").notes
    )
