"""Every reader keeps the contract of readers."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nelbo.data import Schema
from nelbo.data.found import Found, Reader, is_file
from nelbo.data.readers.encoded import Form
from nelbo.data.sources import READERS, load, load_like
from nelbo.data.splits import Declared
from nelbo.testing import ReaderContract


def png(image: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image[0]).save(content, "png")
    return content.getvalue()


class TestNpy(ReaderContract):
    examples = np.random.default_rng(1).integers(0, 5, (30, 5), dtype=np.int16)

    @staticmethod
    def write(folder: Path, x: np.ndarray) -> Path:
        np.save(folder / "x.npy", x)
        return folder / "x.npy"


class TestNpz(ReaderContract):
    @staticmethod
    def write(folder: Path, x: np.ndarray) -> Path:
        y = {"train_labels": np.arange(15) % 3, "test_labels": np.arange(5) % 3}
        np.savez_compressed(folder / "x.npz", train=x[:15], test=x[15:], **y)
        return folder / "x.npz"


class TestIdx(ReaderContract):
    @staticmethod
    def write(folder: Path, x: np.ndarray) -> Path:
        for name, part in (("train", x[:15]), ("t10k", x[15:])):
            head = struct.pack(">HBBIII", 0, 8, 3, len(part), *part.shape[2:])
            (folder / f"{name}-images-idx3-ubyte").write_bytes(head + part.tobytes())
        return folder


class TestFolder(ReaderContract):
    @staticmethod
    def write(folder: Path, x: np.ndarray) -> Path:
        for i, image in enumerate(x):
            (folder / f"{i}.png").write_bytes(png(image))
        return folder


class TestShards(ReaderContract):
    @staticmethod
    def write(folder: Path, x: np.ndarray) -> Path:
        with tarfile.open(folder / "0.tar", "w") as tar:
            for i, image in enumerate(x):
                member = tarfile.TarInfo(f"{i}.png")
                member.size = len(png(image))
                tar.addfile(member, io.BytesIO(png(image)))
        return folder / "0.tar"


def read_raw(path: Path, form: Form, splits: Declared | None) -> Found:
    """Read bytes (N, 4), each example with a label, but in `short.raw` for the last."""
    x = np.fromfile(path, np.uint8).reshape(-1, 4)
    labels = np.arange(len(x) - (path.stem == "short"))
    return Found(str(path), {"all": x}, labels={"number": {"all": labels}})


RAW = Reader(is_file(".raw"), read_raw)


def test_one_line_registers_a_reader(monkeypatch, tmp_path):
    x = np.random.default_rng(3).integers(0, 256, (30, 4), dtype=np.uint8)
    for name in ("x.raw", "short.raw"):
        (tmp_path / name).write_bytes(x.tobytes())
    with pytest.raises(ValueError, match="unknown type; give"):
        load(tmp_path / "x.raw")
    monkeypatch.setitem(READERS, ".raw", f"{__name__}:RAW")
    assert len(load_like(tmp_path / "x.raw", load(tmp_path / "x.raw").schema).splits["all"]) == 30
    ReaderContract().test_each_example_has_its_label(tmp_path / "x.raw")
    with pytest.raises(AssertionError, match="number of all"):
        ReaderContract().test_each_example_has_its_label(tmp_path / "short.raw")


def test_a_file_is_idx_by_the_end_of_its_name(tmp_path):
    """Not by idx in its middle, as in an archive of arrays."""
    x = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    np.savez(tmp_path / "my-idx.npz", x=x)
    read = load_like(tmp_path / "my-idx.npz", Schema("levels", (1, 4, 5), 60))
    head = struct.pack(">HBBIII", 0, 8, 3, *x.shape)
    for name in ("t10k-images.idx3-ubyte", "a.idx", "b_idx3-ubyte"):
        (tmp_path / name).write_bytes(head + x.tobytes())
        same = load_like(tmp_path / name, read.schema)
        assert torch.equal(same.splits["all"], read.splits["all"])
