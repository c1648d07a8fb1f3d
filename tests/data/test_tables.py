"""Tables: what is inferred, round trips, and what is refused with a sentence."""

import datetime
import json
import math

import numpy as np
import polars as pl
import pytest
import torch
from support.commands import run_ok

from nelbo import data
from nelbo.cli import main
from nelbo.data.columns import Column, groups, log_cells, places
from nelbo.data.inspection import inspect, inspect_table
from nelbo.data.schema import Schema
from nelbo.data.tabular import encoding, tables
from nelbo.data.tabular.inference import infer_columns, lattice
from nelbo.evaluation.evaluate import evaluate
from nelbo.evaluation.per_dimension import by_column
from nelbo.report import tables as tables_of_report
from nelbo.runs.train import resume, train

PEOPLE = """age,sex,income,height,city,smoker
31,F,2.123456789,170.5,Oslo,0
45,M,,181.0,Rom,1
18,F,3.141592653,,,1
60,M,1.414213562,177.0,Oslo,0
"""


@pytest.fixture
def people(tmp_path):
    path = tmp_path / "people.csv"
    path.write_text(PEOPLE)
    return path


def write(tmp_path, content, name="t.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_kinds_precision_ranges_and_missing_cells_are_found(people):
    columns, notes = infer_columns(tables.read(people))
    assert columns == [
        Column("age", "rounded", 1.0, 18.0, 60.0),
        Column("sex", "category", categories=("F", "M")),
        Column("income", "real", missing=True),
        Column("height", "rounded", 0.5, 170.5, 181.0, missing=True),
        Column("city", "category", categories=("Oslo", "Rom"), missing=True),
        Column("smoker", "boolean", categories=("0", "1")),
    ]
    assert notes == []
    schema = Schema.of_table(columns)
    assert schema.density and schema.shape == (7,)
    assert Schema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema


@pytest.mark.parametrize(
    "values, expected",
    [
        ([1.0, 4.0, 10.0], 3.0),
        ([0.1, 0.3, 0.8], 0.1),
        ([1000.25, 1000.75], 0.5),
        ([1 / 3, 2 / 3], None),
        ([0.0, 1e-7], None),
        ([0.0, 1.0, 1e9], None),
        ([1e300, 2e300], None),
    ],
)
def test_a_lattice_is_the_coarsest_that_holds_all_values(values, expected):
    assert lattice(np.array(values)) == expected


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".arrow"])
def test_a_table_survives_the_way_to_examples_and_back(people, suffix, tmp_path):
    frame = tables.read(people)
    columns, _ = infer_columns(frame)
    x, notes = encoding.encode(frame, columns, "people")
    assert x.shape == (4, 7) and notes == []
    path = tmp_path / f"copy{suffix}"
    path.write_bytes(tables.to_bytes(encoding.decode(x, columns), suffix))
    again, _ = encoding.encode(tables.read(path), columns, "copy")
    np.testing.assert_array_equal(x, again)
    back = encoding.decode(x, columns)
    assert back.columns == [c.name for c in columns]
    assert back["age"].to_list() == [31, 45, 18, 60]
    assert back["height"].to_list() == [170.5, 181.0, None, 177.0]
    assert back["city"].to_list() == ["Oslo", "Rom", None, "Oslo"]
    assert back["smoker"].to_list() == ["0", "1", "1", "0"]


def test_where_columns_stand(people):
    columns, _ = infer_columns(tables.read(people))
    kinds = [(g.kind, g.size, [p.column.name for p in g.places]) for g in groups(columns)]
    assert kinds == [
        ("numbers", 1, ["income"]),
        ("levels", 64, ["age", "height"]),
        ("symbols", 4, ["sex", "income", "city", "smoker"]),
    ]
    assert [p.indicator for p in places(columns)].count(True) == 1


def test_columns_are_matched_by_name_and_what_is_new_has_its_place(people, tmp_path):
    columns, _ = infer_columns(tables.read(people))
    schema = Schema.of_table(columns)
    other = write(
        tmp_path,
        "extra;smoker;city;age;height;income;sex\n7;1;Bonn;17;171;1e3;\n7;0;;99;400;0;F\n",
    )
    x = data.load_like(other, schema).splits["all"]
    at = [f"{p.column.name}{'?' * p.indicator}" for p in places(columns)]
    first, second = (dict(zip(at, row, strict=True)) for row in x.tolist())
    assert first["city"] == 0 and second["city"] == 3  # not known, and missing
    assert first["sex"] == 0  # missing, as it never was in training
    assert first["age"] == 0 and second["age"] == 44  # below and above
    assert second["height"] == 23 and first["income"] == 1000 and first["income?"] == 1


def test_parquet_types_are_understood(tmp_path):
    frame = pl.DataFrame(
        {
            "i": [1, 2, None],
            "f": [0.5, float("nan"), 2.0],
            "b": [True, False, True],
            "s": pl.Series(["x", "y", "x"], dtype=pl.Categorical),
        }
    )
    path = tmp_path / "t.parquet"
    frame.write_parquet(path)
    columns, _ = infer_columns(tables.read(path))
    assert [(c.kind, c.missing) for c in columns] == [
        ("rounded", True),
        ("rounded", True),
        ("boolean", False),
        ("category", False),
    ]


def test_headings_may_be_quoted_as_cells_are(tmp_path):
    names = ['say "hi"', "a, b", "two\nlines", " space ", "größe"]
    frame = pl.DataFrame({name: ["x", 'y "z"'] for name in names})
    for suffix in tables.SEPARATORS:
        path = write(tmp_path, b"\xef\xbb\xbf" + tables.to_bytes(frame, suffix), f"t{suffix}")
        assert tables.read(path).equals(frame.rename({" space ": "space"}))  # and it is noted


def test_an_inspection_shows_columns_of_every_type(tmp_path):
    day = datetime.date(2020, 1, 1)
    frame = pl.DataFrame(
        {"x": [1, 2, 3], "day": [day, day, None], "list": [[1, 2]] * 3, "row": [{"a": 1}] * 3}
    )
    frame.write_parquet(tmp_path / "t.parquet")
    found = inspect(tmp_path / "t.parquet")
    assert [(c.distinct, c.missing) for c in found.columns] == [(3, 0), (1, 1), (1, 0), (1, 0)]
    assert found.schema == Schema.of_table([Column("x", "rounded", 1.0, 1.0, 3.0)])
    assert len(found.warnings) == 3 and "--schema" in found.warnings[0]


def test_a_constant_column_and_a_mixed_one_are_categories_with_a_note(tmp_path):
    path = write(tmp_path, "a,b,c\n5,1,2\n5,x,3\n5,3,4\n")
    columns, notes = infer_columns(tables.read(path))
    assert [c.kind for c in columns] == ["category", "category", "rounded"]
    assert any("always 5" in note for note in notes)
    assert any("'x'" in note for note in notes)


def test_a_decimal_comma_is_told(tmp_path):
    path = write(tmp_path, "a;b\n0,5;x,1\n-1,25;y\n2,0;z\n")
    columns, notes = infer_columns(tables.read(path))
    assert [c.kind for c in columns] == ["category", "category"]
    (note,) = notes
    assert note.startswith("a holds texts such as '-1,25'") and "write 1.5, not 1,5" in note


@pytest.mark.parametrize(
    "content, name, words",
    [
        ("a,b\n1,2\n3\n", "t.csv", "line 3.*1 fields.*2"),
        ("a,b\n1,2,3\n", "t.csv", "line 2.*3 fields.*2"),
        ("a,b\n1,\xe9\n".encode("latin-1"), "t.csv", "UTF-8"),
        ("a,a\n1,2\n", "t.csv", "two columns.*'a'"),
        ("a,\n1,2\n", "t.csv", "column 2.*no name"),
        ("1,2\n3,4\n", "t.csv", "first line.*numbers"),
        ("a,b\n", "t.csv", "0 rows"),
        ("", "t.csv", "0 rows"),
        ("a,b\n1,inf\n2,3\n", "t.csv", "'b'.*infinite.*row 1"),
        ("a,b\n1,\n2,\n", "t.csv", "'b' has no value.*leave it out with --schema"),
        ("a\n" + "\n".join(f"{i}" for i in range(100)) + "\nzz\n", "t.csv", "'zz' in row 101"),
        ("a\n" + "\n".join(f"w{i // 2}" for i in range(4000)), "t.csv", "2000 different texts"),
        ("a\n" + "\n".join(f"w{i}" for i in range(100)), "t.csv", "100 different texts.*100 rows"),
        (b"PAR1 no", "t.parquet", "cannot be read"),
        (b"ARROW", "t.arrow", "cannot be read"),
        ('a,b\n1,"x\n', "t.csv", "not a row of text"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(tmp_path, content, name, words):
    path = write(tmp_path, content, name)
    with pytest.raises(ValueError, match=words) as error:
        data.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (("age", "years"), "no column 'age'"),
        (("31,F", ",F"), "'age' has 1 missing values.*row 1.*none in training"),
        (("31,F", "31.5,F"), "'age' has the precision 1; row 1 holds 31.5"),
        (("31,F", "old,F"), "'old' in row 1"),
        (("Oslo,0", "Oslo,2"), "'smoker' is boolean, 0 or 1; row 1 holds '2'"),
    ],
)
def test_a_table_of_another_kind_is_refused(people, tmp_path, change, words):
    schema = data.load(people).schema
    other = write(tmp_path, PEOPLE.replace(*change), "other.csv")
    with pytest.raises(ValueError, match=words):
        data.load_like(other, schema)


def test_data_of_another_kind_are_refused(people, tmp_path):
    schema = data.load(people).schema
    np.save(tmp_path / "x.npy", np.zeros((3, 7)))
    with pytest.raises(ValueError, match="one of tables, and"):
        data.load_like(tmp_path / "x.npy", schema)
    with pytest.raises(ValueError, match="is a table, and the model takes"):
        data.load_like(people, Schema("real", (7,), None))
    with pytest.raises(ValueError, match="--levels is for arrays"):
        data.load(people, levels=3)


def test_frames_are_tables_as_files_are(people):
    frame = pl.read_csv(people)
    by_file, by_frame = data.load(people), data.load(frame)
    assert by_frame.schema == by_file.schema
    pandas_like = {name: frame[name].to_list() for name in reversed(frame.columns)}
    again = data.load_like(pandas_like, by_file.schema).splits["all"]
    everything = data.load_like(people, by_file.schema).splits["all"]
    torch.testing.assert_close(again, everything, equal_nan=True)
    for wrong in (3, {"a": 1}, {}):
        with pytest.raises(
            ValueError,
            match=r"data must be an array .* got int|'a' .* is the one value 1|give at least 1",
        ):
            data.load(wrong)


def test_pandas_says_missing_in_many_ways(people):
    pd = pytest.importorskip("pandas")
    whole = data.load(people)
    frame = pd.read_csv(people)
    odd = frame.assign(
        age=frame["age"].astype("Int64"),
        city=frame["city"].astype("category"),
        sex=frame["sex"].astype("string"),
        smoker=frame["smoker"] == 1,
    )
    odd["smoker"] = odd["smoker"].map({True: "1", False: "0"})
    for each in (frame, odd):
        found = data.load(each)
        assert found.schema == whole.schema
        for split, x in whole.splits.items():
            torch.testing.assert_close(found.splits[split], x, equal_nan=True)


def test_a_frame_is_trained_on_and_kept(people, tmp_path):
    pd = pytest.importorskip("pandas")
    frame = pd.concat([pd.read_csv(people)] * 10, ignore_index=True)
    options = {"batch": 8, "width": 8, "depth": 1, "evaluate_every": 2}
    run = train(frame, tmp_path / "run", steps=2, **options)
    assert run.config.source == str(tmp_path / "run" / "data.parquet")
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    again = resume(moved, steps=4)
    x, name = again.batch(frame[:3])
    assert name == "all of the table" and len(x) == 3
    assert math.isfinite(evaluate(again.model, x, calls=4).nats)
    frame.to_csv(tmp_path / "t.csv", index=False)
    by_file = train(str(tmp_path / "t.csv"), tmp_path / "by_file", steps=2, **options)
    assert by_file.config.hashes == run.config.hashes
    with pytest.raises(ValueError, match=r"data must be an array or tensor .*; got int"):
        train(3, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "values, words",
    [
        ({"name": "a", "kind": "date"}, "kind must be one of real, rounded, category"),
        (
            {"name": "a", "kind": "rounded", "precision": 0.0, "low": 0, "high": 1},
            "precision must be positive",
        ),
        ({"name": "a", "kind": "rounded"}, "must be numbers"),
        ({"name": "a", "kind": "real", "precision": 1}, "for the kind rounded"),
        ({"name": "a", "kind": "category"}, "different strings"),
        ({"name": "a", "kind": "boolean", "categories": ["x"]}, "two categories"),
        ({"name": 3, "kind": "real"}, "must be a string"),
        ({"name": "a", "kind": "real", "unit": "m"}, "unknown key 'unit'"),
    ],
)
def test_columns_that_contradict_themselves_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        Column.from_dict(values)


def test_costs_of_columns_hold_their_missing_symbols(people):
    columns = data.load(people).schema.columns
    each = torch.arange(14.0).reshape(2, 7)
    found = by_column(each, columns)
    assert found.shape == (2, 6)
    torch.testing.assert_close(found.sum(1), each.sum(1).double())
    at = [place.column.name for place in places(columns)]
    income = sum(each[:, i] for i, name in enumerate(at) if name == "income")
    torch.testing.assert_close(found[:, 2], income.double())


def test_marginals_are_compared_as_they_are_seen(people):
    dataset = data.load(people)
    columns = dataset.schema.columns
    x = torch.from_numpy(encoding.encode(tables.read(people), columns, "people")[0]).repeat(50, 1)
    for place, values in tables_of_report.known(x, columns):
        assert np.isnan(values).mean() == (0.25 if place.column.missing else 0)
        assert tables_of_report.distance(place, values, values) == 0
        shifted = np.full_like(values, 1.0)
        assert tables_of_report.distance(place, values, shifted) > 0.2
    cost = np.ones((200, x.shape[1]))
    shown = tables_of_report.rows(columns, x, x, cost)
    assert [row[0] for row in shown] == [column.name for column in columns]
    assert shown[2][1].startswith("2.000") and shown[2][4] == "25.0% / 25.0%"
    assert "<svg" in tables_of_report.marginals(columns, x, x)


def test_probabilities_of_cells_as_a_density():
    columns = [Column("a", "rounded", 0.1, 0.0, 1.0), Column("b", "real")]
    assert log_cells(columns) == pytest.approx(np.log(0.1))


def declare(tmp_path, content):
    path = tmp_path / "schema.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_schema_overrides_what_is_inferred_and_leaves_the_rest_to_the_cells(people, tmp_path):
    path = declare(
        tmp_path,
        [
            {"name": "income"},
            {"name": "age", "kind": "rounded", "precision": 5},
            {"name": "smoker", "kind": "category"},
            {"name": "sex", "kind": "category", "categories": ["F", "M", "X"], "missing": True},
        ],
    )
    found = data.load(people, schema=path)
    assert found.schema.columns == (
        Column("income", "real", missing=True),
        Column("age", "rounded", 5.0, 20.0, 60.0),
        Column("smoker", "category", categories=("0", "1")),
        Column("sex", "category", categories=("F", "M", "X"), missing=True),
    )
    assert "2 values of age were rounded to 5" in found.notes
    assert any("left out: height, city" in note for note in found.notes)


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "schema.json is not JSON"),
        ("3", "a schema is a list of columns"),
        ([{"name": "agee"}], "has the column 'agee'; the table has 'age'"),
        ([{"name": "age", "precision": -1}], "precision of the column 'age' must be positive"),
        (
            [{"name": "age", "unit": "years"}],
            "unknown key 'unit' in the column 'age'; known are name",
        ),
        ([{"name": "city", "kind": "real"}], "'city' holds numbers, but 'Oslo' in row 1"),
        ([{"name": "age"}, {"name": "age"}], "different names"),
    ],
)
def test_a_schema_that_does_not_fit_is_refused(people, tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        data.load(people, schema=declare(tmp_path, content))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((-1, 0, 2), "integer, 4 levels"),
        ((1.5, 2.5, 3.5), "steps of 1 from 1.5, 3 levels"),
        ((-0.5, 0.5, 1.5), "steps of 1 from -0.5, 3 levels"),
        ((1, 3, 7), "steps of 2 from 1, 4 levels"),
        ((0.62, 0.66, 0.76), "rounded to 0.02, 8 levels"),
        ((9_999_999_999, 9_999_999_998, 9_999_999_996), "integer, 4 levels"),
        ((999_999.9999, 999_999.9998, 999_999.9996), "rounded to 0.0001, 4 levels"),
    ],
)
def test_an_inspection_says_where_a_lattice_lies(values, words):
    found = inspect_table(pl.DataFrame({"v": values}, strict=False), "the table")
    assert found.columns[0].kind == words


def test_an_inspection_says_what_speaks_against_a_likelihood(tmp_path, capsys):
    rows = [f"{i % 4},{0.1234567 * (i % 4)},name {i},7" for i in range(60)]
    path = write(tmp_path, "\n".join(["k,v,who,c", *rows]))
    run_ok("inspect", path)
    text = " ".join(capsys.readouterr().out.split())
    assert "integer, 4 levels" in text and "not usable" in text
    assert "'who' has 60 different texts" in text and "c is always 7" in text
    assert "v has 4 different values in 60 rows" in text
    assert "examples are" not in text
    run_ok("inspect", path, "--json")
    usable = json.loads(capsys.readouterr().out)
    assert [column["name"] for column in usable["schema"]["columns"]] == ["k", "v", "c"]
    assert len(data.load(path, schema=declare(tmp_path, usable)).schema.columns) == 3
    run_ok(
        "inspect", path, "--json", "--schema", declare(tmp_path, [{"name": "v"}, {"name": "k"}])
    )
    found = json.loads(capsys.readouterr().out)
    assert any("56 of 60 rows are copies" in warning for warning in found["warnings"])
    again = data.load(path, schema=declare(tmp_path, found))
    assert again.schema == Schema.from_dict(found["schema"])
    run_ok("inspect", "digits")
    assert "17 levels" in capsys.readouterr().out


def test_from_a_file_to_a_synthetic_file(tmp_path, capsys):
    rng = np.random.default_rng(0)
    n = 120
    frame = pl.DataFrame(
        {
            "kind": rng.choice(["red", "green"], n),
            "size": rng.integers(1, 9, n),
            "weight": rng.normal(size=n),
            "dear": rng.random(n) < 0.3,
        }
    ).with_columns(
        pl.when(pl.col("size") > 6).then(None).otherwise(pl.col("weight")).alias("weight")
    )
    frame.write_csv(tmp_path / "t.csv")
    run, out = str(tmp_path / "run"), tmp_path / "new.parquet"
    options = ["--steps", "20", "--width", "16", "--depth", "1", "--evaluate-every", "20"]
    run_ok("train", tmp_path / "t.csv", "--out", run, *options)
    run_ok("evaluate", run, "--calls", "4", "--steps", "3", "--grid", "uniform", "--columns")
    shown = capsys.readouterr().out
    assert "by column, 12 examples, 3 steps" in shown and "weight" in shown
    run_ok("evaluate", run, "--calls", "4", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["unit"] == "nats" and found["examples"] == 12
    run_ok("sample", run, "--n", "30", "--steps", "4", "--grid", "uniform", "--out", out)
    made = pl.read_parquet(out)
    assert made.columns == frame.columns and len(made) == 30
    assert set(made["kind"]) <= {"red", "green", "(other)"}
    assert made["size"].dtype == pl.Int64 and made["dear"].is_in(["true", "false"]).all()
    run_ok("evaluate", run, "--data", out, "--calls", "4", "--steps", "3")
    with pytest.raises(SystemExit):
        main(["sample", run, "--out", str(tmp_path / "s.png")])
    assert "ends in .csv or .tsv or .parquet" in capsys.readouterr().err
