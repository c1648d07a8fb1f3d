"""Tar shards in the WebDataset layout: members KEY.png and KEY.cls are one example.

A shard is an index of byte ranges. Members are never extracted, and their names are never paths.
"""

import mmap
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from nelbo import _limits
from nelbo.data.conform import Found, parts_of
from nelbo.data.encoded import SUFFIXES, Encoded, Form, read_images

LABEL = ".cls"
LONGEST = 1000  # bytes of a label, at most


def read_shards(source: Path, form: Form) -> Found:
    """The images of one tar file, or of all the tar files in a folder, in order of their names.

    Files named train-000.tar, val-000.tar, test-000.tar and the like are the splits.

    Args:
        source: a .tar file, or a folder of some.
        form: how images become arrays.

    Raises:
        ValueError: if a shard is cut or damaged, has no images, or only some have labels.
    """
    groups: dict[str, Encoded] = {}
    labels: dict[str, list[str | None]] = {}
    ignored: set[str] = set()
    for part, files in _parts(source).items():
        images, labels[part] = [], []
        for file in files:
            encoded, texts, others = _index(file)
            images.append(encoded)
            labels[part] += texts
            ignored |= others
        groups[part] = images[0].join(images[1:])
    notes = [f"members {', '.join(sorted(ignored))} ignored"] if ignored else []
    found = read_images(str(source), groups, form, notes)
    known = [text is not None for texts in labels.values() for text in texts]
    if any(known) and not all(known):
        raise ValueError(
            f"{source} has a label {LABEL} for {sum(known)} of its {len(known)} images; label all"
        )
    if not all(known):
        return found
    return replace(found, labels={"class": {p: np.array(texts) for p, texts in labels.items()}})


def shards_of(folder: Path) -> list[Path]:
    """The tar files in a folder, by name."""
    return sorted(file for file in folder.glob("*.tar") if not file.name.startswith("."))


def _parts(source: Path) -> dict[str, list[Path]]:
    if source.is_file():
        return {"all": [source]}
    return parts_of(shards_of(source))


def _index(shard: Path) -> tuple[Encoded, list[str | None], set[str]]:
    """The images of a shard, their labels, and the types of its other members."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    ignored: set[str] = set()
    _limits.regular(shard)
    with shard.open("rb") as file:
        for member in _members(shard):
            folder, _, name = member.name.rpartition("/")
            if not member.isreg() or name.startswith("."):
                continue
            stem, dot, suffix = name.partition(".")
            key, suffix = f"{folder}/{stem}", f"{dot}{suffix}".lower()
            if suffix in SUFFIXES:
                if key in images:
                    raise ValueError(f"{shard} has two images {key.lstrip('/')}; keep one")
                images[key] = member.offset_data, member.size
            elif suffix == LABEL:
                file.seek(member.offset_data)
                text = file.read(min(member.size, LONGEST)).decode(errors="replace").strip()
                if not text:
                    raise ValueError(f"the label {member.name} in {shard} is empty; name a class")
                labels[key] = sys.intern(text)  # few different ones
            else:
                ignored.add(suffix or name)
    if not images:
        raise ValueError(f"{shard} has no PNG or JPEG images; give a tar file that holds some")
    offset, size = np.array(list(images.values()), np.int64).T
    encoded = Encoded((shard,), np.zeros(len(images), np.int64), offset, size)
    return encoded, [labels.get(key) for key in images], ignored


class _Mapped(mmap.mmap):
    """A file that gives the bytes which are there, however many tarfile reads by a header."""

    def seek(self, pos: int, whence: Literal[0, 1, 2, 3, 4] = 0, /) -> None:
        if not whence and pos > len(self):
            raise tarfile.ReadError("unexpected end of data")
        super().seek(pos, whence)


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    """All members, whole, one at a time: tarfile would keep a kilobyte of each.

    Raises:
        ValueError: if the file is damaged or ends before they do.
    """
    try:
        if not _limits.regular(shard):
            raise ValueError("it is empty")
        # r: refuses compression, under which members are no ranges of bytes
        with (
            shard.open("rb") as file,
            _Mapped(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            tarfile.open(fileobj=mapped, mode="r:") as tar,
        ):
            at = -1
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                if member.offset <= at or member.size < 0:
                    raise ValueError("its members do not follow each other")
                at = member.offset
                if member.issparse():
                    raise ValueError("it has sparse members")
                yield member
            # tarfile takes a file that is cut between members, or in a header, for whole
            mapped.seek(tar.offset)
            if mapped.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("it is cut, its end is missing")
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{shard} cannot be read as a tar file: {error}; copy or write it again, without"
            f" compression"
        ) from error
