"""Data sets of `datasets`, from files that the tests write: tables, streams, images, text."""

import io
import json
import sys
from contextlib import nullcontext

import datasets
import numpy as np
import polars as pl
import pytest
import torch
from PIL import Image

from nelbo import data
from nelbo._utils.signals import Interrupted
from nelbo.cli import main
from nelbo.data.readers import hub
from nelbo.data.tabular import streams
from nelbo.data.tabular.streams import TableRows
from nelbo.runs.train import resume, train

OPTIONS = {"batch": 16, "width": 8, "depth": 1, "evaluate_every": 3}


@pytest.fixture(autouse=True)
def _quiet(tmp_path_factory, monkeypatch):
    """No network, no cache of the user's, no progress bars."""
    datasets.disable_progress_bars()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


def table(n, start=0):
    k = np.arange(start, start + n)
    word = [("red", "green", None)[i % 3] for i in k]
    return pl.DataFrame({"place": 3 * k, "real": np.sin(k * 1.0), "word": word})


@pytest.fixture
def parquet(tmp_path):
    """A folder of shards with a training and a test split."""
    folder = tmp_path / "table"
    folder.mkdir()
    table(120).write_parquet(folder / "train-00000-of-00002.parquet")
    table(80, 120).write_parquet(folder / "train-00001-of-00002.parquet")
    table(30, 200).write_parquet(folder / "test-00000-of-00001.parquet")
    return folder


def test_a_folder_of_few_bytes_is_not_unpacked(tmp_path):
    """A dictionary of one text, 2 MiB, in a hundred rows."""
    (tmp_path / "table").mkdir()
    frame = pl.DataFrame({"a": range(100)}).with_columns(b=pl.lit("x" * 2**21))
    frame.write_parquet(tmp_path / "table" / "train.parquet")
    with pytest.raises(ValueError, match=r"would be unpacked from .* to 0.195 GiB"):
        data.load(f"hub:{tmp_path / 'table'}")


@pytest.mark.parametrize("prefix", ["hub:", "hub-stream:"])
def test_a_table_by_name_is_that_of_its_files(parquet, prefix, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 32)
    monkeypatch.setattr(hub, "BATCH", 7)
    by_files = data.load(parquet)
    found = data.load(f"{prefix}{parquet}")
    assert found.schema == by_files.schema
    assert found.source == f"{prefix}{parquet}"
    for split, x in by_files.splits.items():
        y = found.splits[split]
        assert isinstance(y, TableRows) and y.sequential == (prefix == "hub-stream:")
        torch.testing.assert_close(y[:], x[:], equal_nan=True)
        back = torch.tensor([len(x) - 1, 0, 3])
        torch.testing.assert_close(y[back], x[:][back], equal_nan=True)
    like = data.load_like(f"{prefix}{parquet}", found.schema).splits
    assert {k: len(x) for k, x in like.items()} == {"train": 200, "test": 30, "all": 230}
    torch.testing.assert_close(like["all"][200:], like["test"][:], equal_nan=True)
    given = data.load(f"{prefix}{parquet}", condition=["word"])
    assert given.schema.condition[0].classes == ("green", "red")
    assert len(given.labels["test"]) == 30


@pytest.mark.parametrize("prefix", ["hub:", "hub-stream:"])
def test_training_is_stopped_and_resumed_exactly(parquet, prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK", 16)
    source = f"{prefix}{parquet}"
    options = OPTIONS | {"steps": 24, "evaluate_every": 8}
    one = train(source, tmp_path / "one", **options)
    stopped = iter([False] * 16 + [True])
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        soon = nullcontext(lambda: next(stopped))
        patch.setattr(sys.modules["nelbo.runs.training"], "interruptible", lambda **_: soon)
        train(source, tmp_path / "two", **options)
    two = resume(tmp_path / "two")
    weights = [(run.path / "model.safetensors").read_bytes() for run in (one, two)]
    assert weights[0] == weights[1]
    frame = table(30, 200).with_columns(pl.col("real") + 1)
    frame.write_parquet(parquet / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="changed since the run was trained"):
        resume(tmp_path / "two", steps=30)


def test_a_stream_is_read_forward(parquet, monkeypatch):
    """One pass for an epoch of shuffled windows, though each window is read out of order."""
    monkeypatch.setattr(streams, "BLOCK", 8)
    x = data.load(f"hub-stream:{parquet}").splits["train"]
    begun, skip = [], datasets.IterableDataset.skip

    def counted(self, n):
        begun.append(n)
        return skip(self, n)

    monkeypatch.setattr(datasets.IterableDataset, "skip", counted)
    window = x.block * streams.WINDOW
    for first in range(0, len(x), window):
        rows = torch.arange(first, min(first + window, len(x)))
        for batch in rows[torch.randperm(len(rows))].split(10):
            x[batch]
    assert len(begun) == 1
    assert x[len(x) - 1 :].shape == (1, 3)


def test_what_was_saved_to_disk(tmp_path):
    rows = {"n": list(range(40)), "kind": [i % 2 for i in range(40)]}
    features = {"n": datasets.Value("int64"), "kind": datasets.ClassLabel(names=["cat", "dog"])}
    saved = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    saved.save_to_disk(tmp_path / "saved")
    found = data.load(f"hub:{tmp_path / 'saved'}")
    n, kind = found.schema.columns
    assert kind.categories == ("cat", "dog") and (n.low, n.high) == (0, 39)
    assert len(found.splits["train"]) == 32
    frame = data.load(saved.remove_columns("kind"))  # as a table of Python
    assert frame.schema.columns == (n,)


def test_images_with_their_classes(tmp_path):
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (20, 5, 7, 3), np.uint8)
    cells = []
    for pixels in x:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "weight": datasets.Value("float32"),
        }
    )
    rows = {"image": cells, "label": [0, 1] * 10, "weight": [0.5] * 20}
    made = datasets.Dataset.from_dict(rows, features=features)
    folder = tmp_path / "images"
    folder.mkdir()
    made.to_parquet(folder / "train.parquet")
    found = data.load(f"hub:{folder}", condition=["label"])
    assert found.schema.shape == (3, 5, 7) and found.schema.levels == 256
    assert found.schema.condition[0].classes == ("cat", "dog")
    like = data.load_like(f"hub:{folder}", found.schema)
    assert like.splits["all"].equal(torch.from_numpy(np.moveaxis(x, 3, 1).copy()))
    assert like.labels["all"][:, 0].tolist() == [0, 1] * 10
    with pytest.raises(ValueError, match="has images, which are not streamed"):
        data.load(f"hub-stream:{folder}")


@pytest.mark.parametrize("prefix", ["hub:", "hub-stream:"])
def test_text(tmp_path, prefix):
    folder = tmp_path / "text"
    folder.mkdir()
    lines = [f"line {i} of a text" for i in range(100)]
    pl.DataFrame({"text": lines, "id": range(100)}).write_parquet(folder / "train.parquet")
    found = data.load(f"{prefix}{folder}", size=16)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "train.txt").write_text("\n".join(lines))
    by_file = data.load(tmp_path / "t", size=16)
    assert found.schema == by_file.schema
    assert all(found.splits[split].equal(x) for split, x in by_file.splits.items())
    assert any("columns left out: id" in note for note in found.notes)
    like = data.load_like(f"{prefix}{folder}", found.schema)
    assert like.splits["all"].shape[1] == 16


def test_what_is_refused(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        main(["train", "hub:nobody/nothing", "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "datasets cannot load 'nobody/nothing'" in shown and "Traceback" not in shown
    (tmp_path / "lists").mkdir()
    pl.DataFrame({"a": [[1, 2], [3]]}).write_parquet(tmp_path / "lists" / "train.parquet")
    with pytest.raises(ValueError, match=r"the column 'a' of hub:.* holds \w*List"):
        data.load(f"hub:{tmp_path / 'lists'}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'nelbo\[hub\]'"):
        data.load("hub:nobody/nothing")


# ---- folders from elsewhere


@pytest.fixture
def secret(tmp_path):
    """Files of a victim: an image, a table, and a folder that `save_to_disk` wrote."""
    folder = tmp_path / "secret"
    folder.mkdir()
    Image.new("L", (8, 8), 7).save(folder / "x.png")
    table(60).with_columns(password=pl.lit("hunter2")).write_csv(folder / "x.csv")
    datasets.Dataset.from_dict({"a": [*range(60)]}).save_to_disk(folder / "saved")
    return folder


def cells_with_paths(folder, secret):
    image = {"bytes": None, "path": str(secret / "x.png")}
    features = datasets.Features({"image": datasets.Image()})
    images = datasets.Dataset.from_dict({"image": [image] * 20}, features=features)
    images.to_parquet(folder / "train.parquet")


def files_in_a_readme(folder, secret, how="../secret/x.csv"):
    (folder / "README.md").write_text(
        f'---\nconfigs:\n- config_name: default\n  data_files: "{how}"\n---\n'
    )
    table(60).write_csv(folder / "train.csv")


def absolute_files_in_a_readme(folder, secret):
    files_in_a_readme(folder, secret, str(secret / "x.csv"))


def names_of_saved_files(folder, secret):
    datasets.Dataset.from_dict({"a": [*range(60)]}).save_to_disk(folder)
    state = json.loads((folder / "state.json").read_text())
    (name,) = (p.name for p in (secret / "saved").glob("*.arrow"))
    state["_data_files"] = [{"filename": f"../secret/saved/{name}"}]
    (folder / "state.json").write_text(json.dumps(state))


def a_link(folder, secret):
    (folder / "train.csv").symlink_to(secret / "x.csv")


@pytest.mark.parametrize(
    "make",
    [
        cells_with_paths,
        files_in_a_readme,
        absolute_files_in_a_readme,
        names_of_saved_files,
        a_link,
    ],
)
def test_a_folder_reads_nothing_outside_of_itself(tmp_path, secret, make, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder, secret)
    with pytest.raises(ValueError, match="outside it") as error:
        data.load(f"hub:{folder}")
    assert "hunter2" not in str(error.value) and "password" not in str(error.value)
    if make is not names_of_saved_files:  # which has but one column, of row numbers
        monkeypatch.setenv("NELBO_TRUST_FILES", "1")
        data.load(f"hub:{folder}", levels=256 if make is cells_with_paths else None)


def test_images_in_files_of_the_folder_are_read(tmp_path):
    folder = tmp_path / "folder" / "train"
    folder.mkdir(parents=True)
    for i in range(20):
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / f"{i}.png")
    assert data.load(f"hub:{folder.parent}").schema.shape == (1, 8, 8)
