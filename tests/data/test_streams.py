"""Tables read in blocks of rows: the same rows, each once, in an order of the seed alone."""

import sys
from contextlib import nullcontext

import numpy as np
import polars as pl
import pytest
import torch

from nelbo import data
from nelbo._utils.signals import Interrupted
from nelbo.cli import main
from nelbo.data import fingerprint, rows
from nelbo.data.columns import Column
from nelbo.data.tabular import files, streams
from nelbo.data.tabular.encoding import encode
from nelbo.data.tabular.inference import infer_columns
from nelbo.data.tabular.merging import infer_merged, merge
from nelbo.data.tabular.streams import Share, TableRows
from nelbo.evaluation.evaluate import evaluate
from nelbo.runs.train import resume, train
from nelbo.training.batching import Blocks, batch_indices

N = 1003


def table(n=N, start=0):
    k = np.arange(start, start + n)
    return pl.DataFrame(
        {
            "place": 3 * k,
            "half": np.round(k / 2 % 7, 1),
            "real": np.sin(k * 1.0),
            "word": [("red", "green", None)[i % 3] for i in k],
        }
    )


@pytest.fixture
def shards(tmp_path, monkeypatch):
    """Three files of different sizes and row groups, read in blocks of few rows."""
    monkeypatch.setattr(streams, "BLOCK", 48)
    monkeypatch.setattr("nelbo.data.tabular.table.INFERRED", 400)
    folder = tmp_path / "shards"
    folder.mkdir()
    whole = table()
    whole[:500].write_parquet(folder / "0.parquet", row_group_size=70)
    whole[500:503].select(reversed(whole.columns)).write_parquet(folder / "1.parquet")
    whole[503:].write_ipc(folder / "2.arrow")
    return folder


def test_each_row_is_in_one_split(shards):
    found = data.load(shards)
    x = {split: v[:] for split, v in found.splits.items()}
    assert all(isinstance(v, TableRows) for v in found.splits.values())
    assert {split: len(v) for split, v in x.items()} == {
        "train": 803,
        "validation": 100,
        "test": 100,
    }
    whole = torch.from_numpy(encode(table(), found.schema.columns, "t")[0])
    place = [c.name for c in found.schema.columns].index("place")
    at = [p.index for p in data.columns.places(found.schema.columns)].index(place)
    ids = torch.cat([v[:, at] for v in x.values()])
    assert sorted(ids.tolist()) == sorted(whole[:, at].tolist())
    by_id = whole[whole[:, at].argsort()]
    for v in x.values():
        rows_of = torch.searchsorted(by_id[:, at].contiguous(), v[:, at].contiguous())
        torch.testing.assert_close(v, by_id[rows_of], equal_nan=True, rtol=0, atol=0)
        assert (v[1:, at] > v[:-1, at]).all()
    tens = x["test"][:, at].long() // 30
    assert tens.unique().numel() == 100
    other = data.load(shards, seed=1).splits["test"][:]
    assert not other.equal(x["test"])


@pytest.mark.parametrize("drawn", [0, 1, 2])
@pytest.mark.parametrize("count", [10, 29, 10_000])
def test_shares_are_of_all_rows(drawn, count):
    parts = [Share(7, count, drawn, which, 3) for which in (None, *range(drawn))]
    found = [part.rows(np.arange(len(part))) for part in parts]
    assert sorted(np.concatenate(found).tolist()) == list(range(7, 7 + count))
    assert all((np.diff(each) > 0).all() for each in found)
    if drawn and count == 10_000:
        places = np.bincount(found[1] % 10, minlength=10)
        assert abs(places - 100).max() < 5 * 100**0.5  # of a uniform law


@pytest.mark.parametrize("examples", [5, 64, 200, 777])
@pytest.mark.parametrize("sequential", [False, True])
def test_an_epoch_of_blocks_has_each_example_once(examples, sequential):
    blocks = Blocks(2, sequential)
    steps = range(3 * examples // 10 + 3)
    parts = [batch_indices(examples, 10, k, 1, blocks=blocks) for k in steps]
    stream = torch.cat(parts)
    for epoch in range(3):
        seen = stream[epoch * examples : (epoch + 1) * examples]
        assert sorted(seen.tolist()) == list(range(examples))
        if sequential:
            window = 2 * rows.WINDOW
            assert (seen // window == torch.arange(examples) // window)[: -window - 1].all()
    assert examples < 10 or not stream[:examples].equal(stream[examples : 2 * examples])
    shares = [
        torch.cat([batch_indices(examples, 10, k, 1, r, 3, blocks) for k in steps])
        for r in (0, 1, 2)
    ]
    assert sorted(torch.cat(shares).tolist()) == sorted(stream.tolist())


def test_columns_are_those_of_the_whole(shards):
    whole = infer_columns(table())[0]
    assert list(data.load(shards).schema.columns) == whole


def column(name="a", kind="rounded", *lattice, **values):
    return Column(name, kind, *lattice, **values)


@pytest.mark.parametrize(
    ("cells", "more"),
    [
        ([1, 2, 3], [4.5, 6]),
        ([1, 1], [1, 1]),
        ([0, 1], [1, 1, 0]),
        ([0, 1], [2, 1, 0]),
        ([0, 0], [1, 1]),
        (["true", "false"], ["true"]),
        (["a", "b"], ["c", None]),
        (["a", "a"], ["b", "b"]),
        ([0.1234567, 0.7654321], [1, 2]),
        ([3, 3], [0.12345678, 0.5]),
        ([None, None], [1, 2]),
        ([0.5, 0.25], [0.1, 0.3]),
        (["true", "true"], ["x", "y"]),
    ],
)
def test_chunks_tell_what_all_cells_tell(cells, more):
    first, second = (pl.DataFrame({"a": part}) for part in (cells, more))
    whole = pl.concat([first, second], how="vertical_relaxed")
    for order in ([first, second], [second, first]):
        assert infer_merged(order)[0] == infer_columns(whole)[0]


def test_numbers_and_texts_in_different_chunks_are_refused():
    chunks = [pl.DataFrame({"a": [1, 2]}), pl.DataFrame({"a": ["x", "y"]})]
    with pytest.raises(ValueError, match="'a' holds numbers in some rows and texts such as 'x'"):
        infer_merged(chunks)
    assert merge(column("a", "real"), column("a", "real", missing=True)).missing
    with pytest.raises(ValueError, match="has no value in any row"):
        infer_merged([pl.DataFrame({"a": [None]})])


def test_a_schema_overrides_the_columns_of_shards(shards, tmp_path):
    (tmp_path / "s.json").write_text('[{"name": "half", "precision": 0.25}, {"name": "word"}]')
    found = data.load(shards, schema=tmp_path / "s.json").schema.columns
    assert [c.name for c in found] == ["half", "word"]
    assert found[0].precision == 0.25 and found[0].high == 6.5
    assert found[1].categories == ("green", "red")


def test_files_may_be_named_for_their_splits(tmp_path):
    folder = tmp_path / "t"
    folder.mkdir()
    for k in range(2):
        table(40, 40 * k).write_parquet(folder / f"train-{k}.parquet")
    table(30, 80).write_parquet(folder / "test-0.parquet")
    found = data.load(folder)
    assert {k: len(v) for k, v in found.splits.items()} == {
        "train": 72,
        "validation": 8,
        "test": 30,
    }
    assert "of each ten rows, 1 by seed 0" in " ".join(found.notes)
    like = data.load_like(folder, found.schema).splits
    assert len(like["all"]) == 110 and len(like["train"]) == 80
    given = data.load(folder, condition=["word"])  # in memory
    sizes = {split: len(x) for split, x in given.splits.items()}
    assert sizes == {"train": 72, "validation": 8, "test": 30}
    assert [label.name for label in given.schema.condition] == ["word"]
    assert len(given.labels["test"]) == 30


def test_a_large_file_is_read_in_blocks_and_a_small_one_is_not(tmp_path, monkeypatch):
    table(50).write_parquet(tmp_path / "t.parquet")
    assert not isinstance(data.load(tmp_path / "t.parquet").splits["train"], TableRows)
    monkeypatch.setattr(files, "IN_MEMORY", 100)
    later = data.load(tmp_path / "t.parquet")
    assert isinstance(later.splits["train"], TableRows)
    labelled = data.load(tmp_path / "t.parquet", condition=["word"])
    assert not isinstance(labelled.splits["train"], TableRows) and labelled.labels


OPTIONS = {"batch": 16, "width": 8, "depth": 1, "evaluate_every": 3}


def test_training_resumes_exactly_and_is_measured(shards, tmp_path, monkeypatch):
    options = OPTIONS | {"steps": 9, "evaluate_every": 6}
    one = train(str(shards), tmp_path / "one", **options)
    stopped = iter([False] * 4 + [True] * 9)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        soon = nullcontext(lambda: next(stopped))
        patch.setattr(sys.modules["nelbo.runs.training"], "interruptible", lambda **_: soon)
        train(str(shards), tmp_path / "two", **options)
    two = resume(tmp_path / "two")
    weights = [(run.path / "model.safetensors").read_bytes() for run in (one, two)]
    assert weights[0] == weights[1]
    model, x = two.model, two.batch()[0].x
    assert isinstance(x, TableRows) and evaluate(model, x, calls=4).examples == 100
    known = evaluate(model, x[:], calls=4).nats
    assert evaluate(model, x, calls=4).nats == known
    frame = pl.read_parquet(shards / "0.parquet")
    frame.with_columns(pl.col("real") + 1).write_parquet(shards / "0.parquet")
    with pytest.raises(ValueError, match="changed since the run was trained"):
        resume(tmp_path / "two", steps=12)


def test_only_so_many_blocks_are_kept(shards, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 24)
    x = data.load(shards).splits["train"]
    assert len(x) // x.block > 2 * rows.WINDOW + 5
    before = fingerprint(x)
    again = torch.cat(list(x.chunks()))
    assert len(x.known) == 2 * rows.WINDOW + 2
    assert again.shape == x.shape and fingerprint(x) == before
    some = torch.tensor([800, 3, 3, 401])
    torch.testing.assert_close(x[some], again[some], equal_nan=True)
    assert len(x.few(50)) <= 50 and len(x.few(10**6)) > 32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: f.drop("word"), r"1\.parquet has the columns .* shards must have the same"),
        (lambda f: f.clear(), r"1\.parquet has 0 rows"),
        (None, r"1\.parquet cannot be read as a table"),
    ],
)
def test_shards_that_do_not_fit_are_refused(shards, change, says):
    file = shards / "1.parquet"
    if change is None:
        file.write_bytes(file.read_bytes()[:-20])
    else:
        change(pl.read_parquet(file)).write_parquet(file)
    with pytest.raises(ValueError, match=says):
        data.load(shards)


def test_a_row_that_cannot_be_is_named_by_its_place_in_the_table(shards):
    schema = data.load(shards).schema
    frame = pl.read_ipc(shards / "2.arrow")
    bad = frame.with_columns(
        pl.when(pl.int_range(pl.len()) == 100).then(None).otherwise(pl.col("real")).alias("real")
    )
    bad.write_ipc(shards / "2.arrow")
    x = data.load_like(shards, schema).splits["all"]
    with pytest.raises(ValueError, match="'real' has 1 missing values, the first in row 604"):
        x[:]


def test_an_inspection_passes_over_the_rows_once(shards, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(shards)])
    shown = capsys.readouterr().out
    assert not stop.value.code and "1003 rows" in shown
    assert "rounded to 3, 1003 cells" in shown and "some" in shown and "green, red" in shown
    assert "copies of rows are not looked for" in " ".join(shown.split())


def test_all_that_is_done_with_a_run_is_done_with_blocks(shards, tmp_path, capsys):
    run = train(str(shards), tmp_path / "run", steps=3, **OPTIONS)
    path, out = str(run.path), tmp_path / "scores.csv"
    commands = [
        ["train", "--resume", path, "--steps-of-bound", "2", "--steps", "3"],
        ["evaluate", path, "--steps", "2", "--calls", "4", "--columns"],
        ["score", path, "--out", str(out), "--figure", str(tmp_path / "s.png"), "--calls", "8"],
        ["sample", path, "--n", "2", "--steps", "2", "--out", str(tmp_path / "new.parquet")],
    ]
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert not stop.value.code, capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 101
    assert (tmp_path / "run-2steps" / "model.safetensors").is_file()
    assert len(pl.read_parquet(tmp_path / "new.parquet")) == 2


def test_a_folder_of_other_things_is_no_table(tmp_path):
    (tmp_path / "a").mkdir()
    assert files.find(tmp_path) is None
    table(20).write_parquet(tmp_path / "t.parquet")
    (tmp_path / "readme.md").write_text("of a table")
    assert files.find(tmp_path) is None
