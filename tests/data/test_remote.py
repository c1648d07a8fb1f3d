"""Data at URLs: those of the files themselves, copied once, and never more than was told."""

import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import run_ok

from nelbo import data
from nelbo.data.remote import here
from nelbo.runs.config import read_config
from nelbo.runs.train import resume

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store in memory, which remembers what was opened and says what it is told to say
    of some paths; and an empty cache."""
    monkeypatch.setenv("NELBO_CACHE", str(tmp_path / "cache"))
    memory, told, opened = fsspec.filesystem("memory"), {}, []
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    info, find, read = memory.info, memory.find, memory.open

    def says(path, **options):
        return info(path, **options) | told.get(path, {})

    def lists(path, **options):
        return {told.get(k, {}).get("name", k): says(k) for k in find(path)}

    def opens(path, *arguments, **options):
        if arguments == ("rb",):
            opened.append(path)
        return read(path, *arguments, **options)

    for name, value in (("info", says), ("find", lists), ("open", opens)):
        monkeypatch.setattr(memory, name, value)
    monkeypatch.setattr(memory, "told", told, raising=False)
    monkeypatch.setattr(memory, "opened", opened, raising=False)
    return memory


def upload(store, folder, root="/bucket/data"):
    for file in folder.rglob("*"):
        if file.is_file():
            store.pipe(f"{root}/{file.relative_to(folder)}", file.read_bytes())


def png(seed):
    file = io.BytesIO()
    x = np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8)
    Image.fromarray(x).save(file, "PNG")
    return file.getvalue()


def shard(path, seeds):
    with tarfile.open(path, "w") as tar:
        for seed in seeds:
            for name, content in ((f"{seed}.png", png(seed)), (f"{seed}.cls", b"%d" % (seed % 2))):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def make(kind, folder):
    """Some data of a kind in a folder; the place of them in it."""
    rng = np.random.default_rng(0)
    if kind == "npz":
        np.savez(
            folder / "x.npz", x_train=rng.integers(0, 9, (40, 3)), x_test=np.zeros((5, 3), int)
        )
        return "x.npz"
    if kind == "npy":
        np.save(folder / "x.npy", rng.normal(size=(40, 3)))
        return "x.npy"
    if kind == "shards":
        for i in range(3):
            shard(folder / f"{('train', 'train', 'val')[i]}-{i}.tar", range(20 * i, 20 * i + 20))
        return ""
    if kind == "images":
        for i in range(30):
            (folder / "ab"[i % 2]).mkdir(exist_ok=True)
            (folder / "ab"[i % 2] / f"{i}.png").write_bytes(png(i))
        return ""
    pl = pytest.importorskip("polars")
    for name in ("train-0", "train-1", "test-0"):
        pl.DataFrame({"a": rng.normal(size=20), "b": ["u", "v"] * 10}).write_parquet(
            folder / f"{name}.parquet"
        )
    return "" if kind == "parquets" else "train-0.parquet"


@pytest.mark.parametrize("kind", ["npz", "npy", "shards", "images", "parquet", "parquets"])
def test_a_url_is_its_files(store, tmp_path, kind):
    """The same examples, labels and splits, and the name of the source is the URL."""
    folder = tmp_path / "own"
    folder.mkdir()
    place = make(kind, folder)
    upload(store, folder)
    url = f"memory://bucket/data/{place}".rstrip("/")
    options = {"condition": ["class"]} if kind in ("shards", "images") else {}
    own, there = data.load(str(folder / place), **options), data.load(url, **options)
    assert there.source == url and there.schema == own.schema
    for name, x in own.splits.items():
        assert torch.equal(x[:], there.splits[name][:])
    assert own.labels.keys() == there.labels.keys()
    assert all(torch.equal(y, there.labels[name]) for name, y in own.labels.items())
    like = data.load_like(url, own.schema)
    assert len(like.splits["all"]) >= len(own.splits["train"])


def test_names_are_chosen_by_a_pattern(store, tmp_path):
    (tmp_path / "own").mkdir()
    make("shards", tmp_path / "own")
    upload(store, tmp_path / "own")
    few = data.load("memory://bucket/data/train-*.tar")
    assert sum(map(len, few.splits.values())) == 40
    with pytest.raises(FileNotFoundError, match=r"there is no file at memory://bucket/data/x\*"):
        here("memory://bucket/data/x*")


def test_what_is_there_is_not_copied_again_and_what_changed_is(store):
    store.pipe("/bucket/x.npy", b"one")
    first = here("memory://bucket/x.npy")
    assert here("memory://bucket/x.npy") == first and len(store.opened) == 1
    store.pipe("/bucket/x.npy", b"two")
    second = here("memory://bucket/x.npy")
    assert Path(second).read_bytes() == b"two" and Path(first).read_bytes() == b"one"


def test_a_copy_that_was_interrupted_goes_on(store):
    for name in "abc":
        store.pipe(f"/bucket/data/{name}.npy", name.encode())
    folder = Path(here("memory://bucket/data"))
    (folder / "b.npy").write_bytes(b"")
    store.opened.clear()
    assert here("memory://bucket/data") == str(folder)
    assert [Path(path).name for path in store.opened] == ["b.npy"]


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"size": 3}, "has more bytes than its store states"),
        ({"size": 9}, "has fewer bytes than its store states"),
        ({"size": 10**18}, "GiB are free in|are free in .* set NELBO_CACHE"),
        ({"size": None}, "the size of /bucket/data/x.npy is unknown"),
        ({"name": "/bucket/data/../../../x.npy"}, "cannot be the name of a file here"),
        ({"name": "/bucket/data//etc/x.npy"}, "cannot be the name of a file here"),
        ({"name": "/bucket/data/c:x.npy"}, "cannot be the name of a file here"),
    ],
)
def test_a_store_that_lies_writes_nothing(store, tmp_path, told, says):
    """Neither outside the cache, nor more than it said, nor a part of a file."""
    store.pipe("/bucket/data/x.npy", b"sixsix")
    store.told["/bucket/data/x.npy"] = told
    with pytest.raises(ValueError, match=says):
        here("memory://bucket/data")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_what_is_missing_is_one_sentence(store, monkeypatch):
    with pytest.raises(ValueError, match="nosuch://x cannot be read: Protocol not known"):
        here("nosuch://x")
    with pytest.raises(ValueError, match="is a chain of URLs"):
        here("simplecache::memory://x")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(
        ValueError, match=r"s3://b/x cannot be read: Install s3fs.*; nelbo\[remote\]"
    ):
        here("s3://b/x")
    monkeypatch.setenv("NELBO_OFFLINE", "1")
    with pytest.raises(ValueError, match="NELBO_OFFLINE=1 forbids the network"):
        here("s3://b/x")
    monkeypatch.delenv("NELBO_OFFLINE")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ValueError, match=r"pip install 'nelbo\[remote\]'"):
        here("s3://b/x")


def test_a_run_is_trained_and_continued_at_its_url(tmp_path, monkeypatch):
    monkeypatch.setenv("NELBO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "own").mkdir()
    make("shards", tmp_path / "own")
    url, run = f"file://{tmp_path}/own/*.tar", tmp_path / "run"
    command = ["train", url, "--out", str(run), "--steps", "2", "--batch", "4", "--width", "8"]
    command += ["--depth", "1", "--evaluate-every", "2"]
    run_ok(*command)
    assert read_config(run).source == url
    assert json.loads((run / "config.json").read_text())["data"]["source"] == url
    assert resume(run, steps=3).metrics[-1]["step"] == 3
    (tmp_path / "own" / "val-2.tar").unlink()
    with pytest.raises(ValueError, match="have changed since the run was trained"):
        resume(run, steps=4)
