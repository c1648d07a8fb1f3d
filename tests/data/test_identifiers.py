"""Columns that name rows are left out, with a note, unless asked for; others never are."""

import json

import numpy as np
import polars as pl
import pytest

from nelbo import data
from nelbo.data.inspection import inspect
from nelbo.data.tabular.identifiers import Evidence, says_identifier
from nelbo.data.tabular.inference import infer_columns
from nelbo.data.tabular.merging import infer_merged

N = 60
R = np.random.default_rng(0)
LEFT_OUT = {
    "number": [str(i) for i in range(N)],  # of rows
    "shuffled": R.permutation(N) + 1,
    "floats": np.arange(N, dtype=float),
    "long": 2**53 + R.integers(0, 10**6, N),
    "huge": [f"{10**19 + 7 * i}" for i in range(N)],
    "name": [f"name {i}" for i in range(N)],
    "code": [f"{i:05d}" for i in R.permutation(N) + 700],
    "customerId": R.permutation(10**6)[:N],
    "ID": [f"{i % 30}" for i in range(N)],
    "Unnamed: 0": R.permutation(N) + 50,
    "__index_level_0__": ["a", "b"] * (N // 2),
}
KEPT = {
    "price": R.permutation(10**5)[:N],
    "population": [str(i) for i in R.permutation(10**7)[:N]],
    "height": [f"{v:.3f}" for v in R.normal(size=N)],
    "year": np.arange(1950, 1950 + N),
    "days": np.arange(N)[::-1] * 3,
    "store_id": [f"{i % 5}" for i in range(N)],
    "grid": [f"{i % 40}" for i in range(N)],
    "id current": R.normal(size=N),
    "kind": [f"kind {i % 40}" for i in range(N)],
    "enum": pl.Series([f"{i}" for i in range(N)], dtype=pl.Categorical),
    "truth": [i % 2 == 0 for i in range(N)],
    "far": R.normal(size=N) * 1e20,
}


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("name", [*LEFT_OUT, *KEPT])
def test_what_names_the_rows_is_left_out(name, pieces):
    frame = pl.DataFrame({name: (LEFT_OUT | KEPT)[name], "x": R.normal(size=N)})
    if pieces > 1 and name == "shuffled":
        pytest.skip("rows in pieces are looked at in their order")
    chunks = frame.iter_slices(N // pieces)
    columns, notes = infer_columns(frame) if pieces == 1 else infer_merged(chunks)
    assert [c.name for c in columns] == ([name, "x"] if name in KEPT else ["x"])
    if name in LEFT_OUT:
        assert any(name in note and "left out" in note and "--schema" in note for note in notes)
    if name == "store_id":
        assert any("kept" in note for note in notes)


def test_a_few_rows_say_nothing():
    frame = pl.DataFrame({"a": range(10), "b": [f"n{i}" for i in range(10)], "my id": range(10)})
    assert [c.name for c in infer_columns(frame)[0]] == ["a", "b"]


def test_what_is_left_out_is_kept_where_it_is_asked_for(tmp_path):
    path = tmp_path / "t.csv"
    pl.DataFrame({"id": range(N), "who": LEFT_OUT["name"], "x": R.normal(size=N)}).write_csv(path)
    found = data.load(path)
    assert [c.name for c in found.schema.columns] == ["x"]
    assert found.schema.left_out == ("id", "who")
    shown = inspect(path)
    assert [c.column is None for c in shown.columns] == [True, True, False]
    assert sum("left out" in warning for warning in shown.warnings) == 2
    asked = tmp_path / "s.json"
    asked.write_text('[{"name": "x"}, {"name": "id"}, {"name": "who"}]')
    kinds = [c.kind for c in data.load(path, schema=asked).schema.columns]
    assert kinds == ["real", "rounded", "category"]
    asked.write_text(json.dumps({"missing_words": ["-"]}))  # says nothing of columns
    assert [c.name for c in data.load(path, schema=asked).schema.columns] == ["x"]
    alone = tmp_path / "alone.csv"
    pl.DataFrame({"id": range(N)}).write_csv(alone)
    with pytest.raises(ValueError, match=r"no column of .*alone\.csv is left to model: id"):
        data.load(alone)


def test_the_index_that_pandas_stored_is_left_out(tmp_path):
    pytest.importorskip("pyarrow")
    pd = pytest.importorskip("pandas")
    x = pd.Series(R.normal(size=N))
    frame = pd.DataFrame({"x": x, "city": ["u", "v"] * (N // 2)}).set_index("city")
    frame.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "shards").mkdir()
    frame.to_parquet(tmp_path / "shards" / "train-0.parquet")
    for source in (tmp_path / "t.parquet", tmp_path / "shards"):
        found = data.load(source)
        assert [c.name for c in found.schema.columns] == ["x"]
        assert any("city is the index" in note for note in found.notes)
    assert inspect(tmp_path / "t.parquet").schema == found.schema
    frame.reset_index(drop=True).to_csv(tmp_path / "t.csv")  # which gives the index no name
    found = data.load(tmp_path / "t.csv")
    assert [c.name for c in found.schema.columns] == ["x"] and found.schema.left_out == ("",)
    assert any("without a name" in note for note in found.notes)


def test_numbers_with_commas_name_no_rows(tmp_path):
    """Though all differ: there is advice on how to write them."""
    path = tmp_path / "t.csv"
    pl.DataFrame({"x": range(N), "y": [f"{i},25" for i in range(N)]}).write_csv(path)
    with pytest.raises(ValueError, match=r"'y' has 60 different texts.*write 1\.5, not 1,5"):
        data.load(path)


def test_names_of_identifiers():
    yes = ("id", "ID", "user_id", "userId", "USER-ID", "Id Kunde", "uuid", "row number", "index")
    no = ("paid", "grid", "idea", "width", "price index", "row count", "identity", "x", "", "Ärid")
    assert all(map(says_identifier, yes)) and not any(map(says_identifier, no))
    assert not Evidence("id").add(pl.Series([0.5, 1.5])).reason
