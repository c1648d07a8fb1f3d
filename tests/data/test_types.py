"""The types that a source declares: kept by the schema, and given back by what is drawn."""

import json

import numpy as np
import polars as pl
import pytest

from nelbo import data
from nelbo.data.schema import Schema
from nelbo.data.tabular import dtypes, encoding
from nelbo.data.tabular.inference import infer_columns, typed
from nelbo.data.tabular.tables import frame_of

N = 60
R = np.random.default_rng(3)
FRAME = pl.DataFrame(
    {
        "truth": R.random(N) < 0.5,
        "flag": pl.Series(R.integers(0, 2, N), dtype=pl.Int8),
        "digit": pl.Series(R.choice(["1", "2", "5"], N)),
        "small": pl.Series(R.integers(0, 9, N), dtype=pl.UInt8),
        "real": pl.Series(R.normal(size=N), dtype=pl.Float32),
        "price": pl.Series([f"{v}.{v}0" for v in R.integers(1, 9, N)]).cast(pl.Decimal(10, 2)),
        "enum": pl.Series(R.choice(["lo", "hi"], N), dtype=pl.Enum(["lo", "mid", "hi"])),
        "word": pl.Series(R.choice(["u", "v"], N), dtype=pl.Categorical),
        "code": pl.Series(R.choice(["0", "1"], N), dtype=pl.Categorical),
    }
)


def columns_of(frame):
    columns = typed(infer_columns(frame)[0], frame.schema)
    document = json.loads(json.dumps(Schema.of_table(columns).to_dict()))
    return Schema.from_dict(document).columns


@pytest.mark.parametrize("holes", [False, True])
def test_rows_that_are_drawn_have_the_types_of_the_source(holes):
    frame = FRAME
    if holes:
        gaps = pl.int_range(pl.len()) % 5 == 0
        frame = frame.with_columns(pl.when(~gaps).then(pl.all()))
    columns = columns_of(frame)
    x, _ = encoding.encode(frame, columns, "t")
    made = encoding.decode(x, columns)
    assert made.schema == frame.schema and made.equals(frame)


def test_a_completed_table_keeps_its_types():
    columns = columns_of(FRAME)
    gaps = pl.int_range(pl.len()) % 4 == 0
    holes = FRAME.with_columns(pl.when(~gaps).then(pl.all()))
    x, _ = encoding.encode(FRAME, columns, "t")
    made = encoding.filled(holes, encoding.decode(x, columns), columns)
    assert made.schema == FRAME.schema and made.equals(FRAME)
    empty = FRAME.with_columns(pl.lit(None).alias("small"))  # a column that is all to be drawn
    made = encoding.filled(empty, encoding.decode(x, columns), columns)
    assert made.schema == FRAME.schema and made.equals(FRAME)


def test_a_type_gives_way_to_a_cell_that_has_no_place_in_it():
    """Such as a category that training did not have, which is drawn as a word."""
    columns = columns_of(FRAME)
    x, _ = encoding.encode(FRAME, columns, "t")
    made = encoding.decode(np.zeros_like(x), columns)
    assert made["enum"].dtype == made["truth"].dtype == pl.String
    assert made["enum"][0] == encoding.OTHER and made["small"].dtype == pl.Int64


def test_a_declared_category_is_one_whatever_its_values_look_like():
    kinds = {c.name: (c.kind, c.categories) for c in columns_of(FRAME)}
    assert kinds["code"] == ("category", ("0", "1"))
    assert kinds["enum"] == ("category", ("hi", "lo", "mid"))  # declared, and not in the cells
    pd = pytest.importorskip("pandas")
    values = {"int": [3, 1, 3], "bool": [True, False, True], "float": [1.0, 2.5, 1.0]}
    frame = pd.DataFrame({name: pd.Categorical(v) for name, v in values.items()})
    found = infer_columns(frame_of(frame))[0]
    assert [c.kind for c in found] == ["category"] * 3
    assert [c.categories for c in found] == [("1", "3"), ("false", "true"), ("1", "2.5")]


def test_frames_of_others_keep_their_types_and_all_their_columns():
    pd = pytest.importorskip("pandas")
    kinds = {"a": "float32", "b": "uint8", "c": "Int16", "d": "boolean", "e": "int64"}
    frame = pd.DataFrame({name: pd.Series([1, 0, 1], dtype=kind) for name, kind in kinds.items()})
    frame.loc[1, ["a", "c", "d"]] = None
    made = frame_of(frame)
    assert made.dtypes == [pl.Float32, pl.UInt8, pl.Int16, pl.Boolean, pl.Int64]
    assert made.null_count().row(0) == (1, 0, 1, 1, 0)
    fields = np.array([(1, 0.5), (2, 1.5)], [("id", ">i4"), ("w", "<f4")])
    for source in (fields, {"id": fields["id"], "w": fields["w"]}):
        assert frame_of(source).schema == {"id": pl.Int32, "w": pl.Float32}
    for odd in (
        pd.DataFrame([[1, 2]], columns=["a", "a"]),
        pd.DataFrame([[1, 2]], columns=[0, "0"]),
        {0: [1], "0": [2]},
    ):
        with pytest.raises(ValueError, match="two columns of the name"):
            frame_of(odd)
    for odd in (np.zeros((3, 2)), np.zeros(3), pd.Series([1, 2])):
        with pytest.raises(ValueError, match=r"a table is a .*save an array with numpy\.save"):
            frame_of(odd)
    with pytest.raises(ValueError, match=r"'a' has the shape \(3, 2\)"):
        frame_of({"a": np.zeros((3, 2))})


@pytest.mark.parametrize(
    "text",
    [
        "list",
        "Boolean[1]",
        "Decimal[999, 2]",
        "Decimal[]",
        "Decimal[true, 0]",
        'Enum["a", "a"]',
        "Enum[3]",
        'Datetime["us", "Nowhere"]',
        "Enum" + "[" * 10**5,
    ],
)
def test_types_that_no_column_has_are_refused(text):
    with pytest.raises(ValueError, match="is not a type of a column") as error:
        dtypes.parse(text)
    assert len(str(error.value)) < 300


def test_a_schema_is_of_its_columns_not_of_their_types():
    """Parquet and CSV have one schema: a type is no part of the model, nor is a range."""
    by_type = Schema.of_table(columns_of(FRAME))
    plain = Schema.of_table(infer_columns(FRAME)[0])
    assert by_type == plain and by_type.to_dict() != plain.to_dict()
    real = next(c for c in by_type.columns if c.name == "real")
    assert real.range == (FRAME["real"].min(), FRAME["real"].max())


def test_a_named_index_of_pandas_is_said_to_be_left_out():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"city": ["u", "v"] * 20, "x": np.arange(40) % 7})
    assert not any("index" in note for note in data.load(frame).notes)
    notes = data.load(frame.set_index("city")).notes
    assert any("index of the frame, city, left out" in note for note in notes)


def test_columns_of_objects_are_refused_in_one_sentence():
    pd = pytest.importorskip("pandas")
    months = pd.period_range("2000-01", periods=40, freq="M")
    for cells in (months, np.arange(40) * 1j):
        with pytest.raises(ValueError, match="'m' is of the type Object; give numbers"):
            data.load(pd.DataFrame({"m": cells, "x": np.arange(40)}))
