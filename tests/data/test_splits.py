"""Splits by name: one rule for folders, texts, tables, shards and arrays, or as declared."""

import json
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nelbo import data
from nelbo.cli import main
from nelbo.data import Schema
from nelbo.data.splits import declare, group
from nelbo.runs.train import train

RNG = np.random.default_rng(5)
SIZES = {"train": 6, "validation": 3, "test": 2}
NAMES = [
    ("train", "val", "test"),
    ("Train", "Valid", "Test"),
    ("training", "dev", "testing"),
    ("TRAIN", "VALIDATION", "EVAL"),
    ("set.train", "set.val", "set.test"),
    ("my_train", "my_dev", "my_test"),
    ("train2017", "val2017", "test2017"),
]


def picture() -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (5, 7), dtype=np.uint8))


def folders(place: Path, names) -> Path:
    for name, count in zip(names, SIZES.values(), strict=True):
        (place / name).mkdir(parents=True)
        for i in range(count):
            picture().save(place / name / f"{i}.png")
    return place


def files(place: Path, names) -> Path:
    """Read splits from the names of files, without sub-folders."""
    place.mkdir()
    for name, count in zip(names, SIZES.values(), strict=True):
        for i in range(count):
            picture().save(place / f"{name}_{i}.png")
    return place


def texts(place: Path, names) -> Path:
    place.mkdir()
    for name, count in zip(names, SIZES.values(), strict=True):
        (place / f"{name}.txt").write_text(
            "abcde" * count if name == names[0] else "edcba" * count
        )
    return place


def shards(place: Path, names) -> Path:
    place.mkdir()
    for name, count in zip(names, SIZES.values(), strict=True):
        tar(place / f"{name}.tar", [f"{i}.png" for i in range(count)])
    return place


def members(place: Path, names) -> Path:
    """One tar file, whose members lie in folders."""
    all_names = [
        f"{name}/{i}.png"
        for name, count in zip(names, SIZES.values(), strict=True)
        for i in range(count)
    ]
    return tar(place.with_suffix(".tar"), all_names)


def tar(path: Path, names) -> Path:
    with tarfile.open(path, "w") as file:
        for name in names:
            content = BytesIO()
            picture().save(content, "PNG")
            member = tarfile.TarInfo(name)
            member.size = len(content.getvalue())
            file.addfile(member, BytesIO(content.getvalue()))
    return path


def arrays(place: Path, names) -> Path:
    found = {n: RNG.integers(0, 4, (k, 3)) for n, k in zip(names, SIZES.values(), strict=True)}
    np.savez(place.with_suffix(".npz"), **found)
    return place.with_suffix(".npz")


def tables(place: Path, names) -> Path:
    pl = pytest.importorskip("polars")
    place.mkdir()
    for name, count in zip(names, SIZES.values(), strict=True):
        frame = pl.DataFrame(
            {"a": [i % 3 for i in range(10 * count)], "b": ["x", "y"] * 5 * count}
        )
        frame.write_parquet(place / f"{name}.parquet")
    return place


MAKERS = (folders, files, texts, shards, members, arrays, tables)


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("make", MAKERS)
def test_words_in_names_are_the_splits(tmp_path, make, names):
    found = data.load(make(tmp_path / "x", names), size=5 if make is texts else None)
    scale = 10 if make is tables else 1
    sizes = {split: len(x) for split, x in found.splits.items()}
    if make is texts:  # chunks to train on overlap
        sizes["train"] = 6 if sizes["train"] == 26 else sizes["train"]
    assert sizes == {split: scale * count for split, count in SIZES.items()}
    assert not any("split 80/10/10" in note for note in found.notes)


def test_what_was_guessed_is_said(tmp_path):
    notes = data.load(folders(tmp_path / "a", ("Training", "my_dev", "test"))).notes
    assert any("train is Training; validation is my_dev; --splits" in note for note in notes)
    plain = data.load(folders(tmp_path / "b", ("train", "val", "test"))).notes
    assert not any("splits by name" in note for note in plain)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("names", [("trainset", "b", "c"), ("a", "b", "mytest")])
def test_names_that_may_be_splits_are_declared(tmp_path, make, names):
    """Nothing is pooled, or left out, that is called like a split."""
    source = make(tmp_path / "x", names)
    size = 5 if make is texts else None
    with pytest.raises(ValueError, match=r"holds 't.*' and is of no split .* --splits") as error:
        data.load(source, size=size)
    assert "\n" not in str(error.value)
    tail = "*" if make is files else ""
    said = {split: f"{name}{tail}" for split, name in zip(SIZES, names, strict=True)}
    found = data.load(source, size=size, splits=said)
    text = ",".join(f"{split}={name}" for split, name in said.items())
    again = data.load(source, size=size, splits=text)
    for split, x in found.splits.items():
        assert len(x) and (x[:] == again.splits[split][:]).all()
    if make not in (texts, tables):
        assert {k: len(x) for k, x in found.splits.items()} == SIZES
    if make is not arrays:
        drawn = data.load(source, size=2 if make is texts else None, splits="none")
        assert any("80/10/10" in n or "of each ten" in n or "a tenth" in n for n in drawn.notes)


@pytest.mark.parametrize("make", [folders, files, texts, shards, members, tables])
def test_one_split_among_others_is_declared(tmp_path, make):
    """A class may be called train, a text test: that the others are left out is not guessed."""
    source = make(tmp_path / "x", ("car", "train", "plane"))
    with pytest.raises(ValueError, match=r"of the train split by its name, and .*(car|plane)"):
        data.load(source, size=5 if make is texts else None)


def test_classes_beside_the_split(tmp_path):
    """The split may lie above or below the classes."""
    for name in ("cup/train/good/0.png", "lid/train/good/1.png", "cup/test/bad/0.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        picture().save(path)
    for i in range(4):
        picture().save(tmp_path / "lid/train/good" / f"{i + 2}.png")
    found = data.load(tmp_path, condition=["class"])
    assert found.schema.condition[0].classes == ("cup", "lid")
    assert found.labels["test"].tolist() == [[0.0]]


def test_what_is_declared_must_be_there_and_once(tmp_path):
    source = folders(tmp_path / "x", ("one", "two", "three"))
    for said, message in [
        ("train=four", "has no 'four', .* it has one, three, two"),
        ("train=one,test=o*", "declared of the train and of the test split"),
        ("one", "declared as train=A"),
        ("first=one", "declared as train=A"),
        ("", "declared as train=A"),
    ]:
        with pytest.raises(ValueError, match=message):
            data.load(source, splits=said)
    notes = data.load(source, splits="train=one,test=two").notes
    assert any("2 images outside" in note and "three" in note for note in notes)
    np.save(tmp_path / "x.npy", RNG.integers(0, 3, (9, 2)))
    for single in ("digits", tmp_path / "x.npy", {"a": [1, 2, 3] * 9}):
        with pytest.raises(ValueError, match=r"named parts; leave (--)?splits out"):
            data.load(single, splits="train=a")


def test_arrays_by_their_usual_names(tmp_path):
    x, y = RNG.integers(0, 5, (12, 4)), np.arange(12) % 3
    for names in (
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("X_train", "Y_train", "X_test", "Y_test"),
        ("xtrain", "ytrain", "xtest", "ytest"),
        ("trainData", "trainTarget", "testData", "testTarget"),
    ):
        parts = dict(zip(names, (x, y, x[:5], y[:5]), strict=True))
        np.savez(tmp_path / "x.npz", **parts, mean=np.zeros(4))
        found = data.load(tmp_path / "x.npz", condition=["class"])
        assert (
            len(found.splits["test"]) == 5
            and found.labels["test"][:, 0].tolist() == y[:5].tolist()
        )
        assert any("ignored mean" in note for note in found.notes)
    np.savez(tmp_path / "y.npz", images=x, labels=y)
    assert data.load(tmp_path / "y.npz", condition=["class"]).schema.shape == (4,)


def test_a_run_keeps_what_was_declared(tmp_path, capsys):
    source = folders(tmp_path / "x", ("one", "two", "three"))
    tiny = {"steps": 2, "batch": 2, "width": 8, "depth": 1}
    said = "train=one,val=two,test=three"
    run = train(str(source), tmp_path / "run", splits=said, **tiny)
    assert len(run.examples(split="test")) == 2
    document = json.loads((run.path / "config.json").read_text())
    assert document["data"]["splits"]["validation"] == ["two"]
    for command in (
        ["evaluate", str(run.path), "--calls", "8"],
        ["evaluate", str(run.path), "--data", str(source), "--splits", said, "--split", "train"],
        ["inspect", str(source), "--splits", said],
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert not stop.value.code, capsys.readouterr().err
    assert "6 train, 3 validation, 2 test" in " ".join(capsys.readouterr().out.split())
    drawn = train(str(source), tmp_path / "drawn", splits="none", **tiny)
    assert len(drawn.examples(split="train")) == 9


def test_measured_data_follow_the_same_rule(tmp_path):
    source = folders(tmp_path / "x", ("Train", "Dev", "Test"))
    found = data.load_like(source, Schema("levels", (1, 5, 7), 256)).splits
    assert {k: len(x) for k, x in found.items()} == {**SIZES, "all": 11}


def test_partitions_of_hive_are_columns_or_splits(tmp_path):
    pl = pytest.importorskip("polars")
    for split, count in (("train", 30), ("test", 20)):
        for year in ("2019", "2020"):
            place = tmp_path / f"split={split}" / f"year={year}"
            place.mkdir(parents=True)
            frame = pl.DataFrame({"a": [k % 4 for k in range(count)]})
            frame.write_parquet(place / "part-0.parquet")
    (tmp_path / "_SUCCESS").touch()
    found = data.load(tmp_path)
    assert [column.name for column in found.schema.columns] == ["a", "year"]
    assert len(found.splits["test"]) == 40
    assert sorted(len({*column.tolist()}) for column in found.splits["test"][:].T) == [2, 4]
    assert any("columns named by folders: year" in note for note in found.notes)
    with pytest.raises(ValueError, match="both name the train"):
        group(["Train/a", "train/b"], "x")
    assert declare("none") == {}


def test_ordinary_words_are_no_splits(tmp_path):
    """Words that hold "test" or "train" by chance, as names of classes and of files."""
    source = folders(tmp_path / "x", ("latest_cars", "Contest", "trains"))
    for i in range(4):
        picture().save(source / "trains" / f"protest_{i}.png")
    found = data.load(source)
    assert sum(len(x) for x in found.splits.values()) == 15
    assert any("split 80/10/10" in note for note in found.notes)


def test_a_folder_of_tables_is_told_from_one_of_images(tmp_path):
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"holds \.csv files, which are read one at a time"):
        data.load(tmp_path)
