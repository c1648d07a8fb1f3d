"""Every reader keeps the contract of readers."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

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
        np.savez_compressed(folder / "x.npz", train=x[:15], test=x[15:])
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
