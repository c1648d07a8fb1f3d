"""Read tar shards in the WebDataset layout: members KEY.png and KEY.cls are one example.

A shard is an index of byte ranges. Members are never extracted, and their names are never paths.
"""

import mmap
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from typing_extensions import override

from nelbo._utils import limits
from nelbo.data.found import Found, Reader
from nelbo.data.readers import idx
from nelbo.data.readers.encoded import Encoded, Form, read_images
from nelbo.data.readers.pillow import SUFFIXES
from nelbo.data.readers.walk import walk
from nelbo.data.splits import Declared, group, split_of

SUFFIX = ".tar"
LABEL = ".cls"
LONGEST = 1000  # bytes of a label, at most


def read_shards(source: Path, form: Form, splits: Declared | None = None) -> Found:
    """Read the images of one tar file, or of all tar files in a folder, in order of their names.

    The names of shards and of their members determine the splits; see `splits`.

    Args:
        source: a .tar file, or a folder of some.
        form: the conversion of images to arrays.
        splits: as declared.

    Raises:
        ValueError: a shard is cut or damaged, or has no images.
    """
    walked = None if source.is_file() else walk(source, (SUFFIX,), "tar files")
    indices = [_index(file) for file in ([source] if walked is None else walked.files)]
    if not indices:
        raise ValueError(f"{source} has no images, because its tar files are not files")
    names, texts, ignored = [], [], Counter[str]()
    for index in indices:
        shard = index.images.files[0].relative_to(source).as_posix()
        names += index.names if walked is None else [f"{shard}/{name}" for name in index.names]
        texts += index.labels
        ignored += index.ignored
    parts, _, guessed = group(names, source, splits, "images outside the splits")
    images = indices[0].images.join([index.images for index in indices[1:]])
    notes = [] if walked is None else walked.notes()
    if ignored:
        notes.append(f"members {', '.join(sorted(ignored))} ignored")
    groups = {part: images.at(np.array(rows)) for part, rows in parts.items()}
    found = read_images(str(source), groups, form, [*notes, *guessed])
    if not any(texts):
        return found
    labels = {part: np.array([texts[i] for i in rows]) for part, rows in parts.items()}
    return replace(found, labels={"class": labels})


def is_shards(path: Path) -> bool:
    """Return whether `read_shards` reads a path: a tar file, or a folder of them without idx
    files."""
    if path.is_dir():
        return not idx.images_in(path) and holds_shards(path)
    return path.is_file() and path.suffix.lower() == ".tar"


def holds_shards(folder: Path) -> bool:
    """Return whether there are tar files in a folder, or in its sub-folders of splits."""
    places = [folder, *(each for each in folder.iterdir() if split_of(each.name))]
    return any(
        file.name[0] != "." for place in places if place.is_dir() for file in place.glob("*.tar")
    )


SHARDS = Reader(is_shards, read_shards, resizes=True, parts=True)


class Index(NamedTuple):
    """Contents of a shard.

    Args:
        images: the images as ranges of bytes.
        names: names of their members.
        labels: label of each image; empty if it has none.
        ignored: types of the other members.
    """

    images: Encoded
    names: list[str]
    labels: list[str]
    ignored: Counter[str]


def _index(shard: Path) -> Index:
    images: dict[str, tuple[str, str, int, int]] = {}  # by the name without its type
    labels: dict[str, str] = {}
    ignored = Counter[str]()
    limits.regular(shard)
    with shard.open("rb") as file:
        for member in _members(shard):
            folder, _, name = member.name.rpartition("/")
            if member.isdir() or name.startswith("."):
                continue
            stem, dot, last = name.rpartition(".")
            key, suffix = f"{folder}/{stem}", f"{dot}{last}".lower()
            if not member.isreg():
                ignored["that are links"] += 1
            elif suffix in SUFFIXES:
                if key in images:
                    raise ValueError(f"{shard} has two images {key.lstrip('/')}; keep one")
                images[key] = member.name, suffix, member.offset_data, member.size
            elif suffix == LABEL:
                file.seek(member.offset_data)
                text = file.read(min(member.size, LONGEST)).decode(errors="replace").strip()
                if not text:
                    raise ValueError(f"the label {member.name} in {shard} is empty; name a class")
                labels[key] = sys.intern(text)  # labels repeat
            else:
                ignored[name[name.find(".") :].lower() if "." in name else name] += 1
    images, fields = _examples(images, shard)
    ignored += fields
    if not images:
        raise ValueError(f"{shard} has no images; give a tar file that holds some")
    names, _, offset, size = zip(*images.values(), strict=True)
    encoded = Encoded(
        (shard,), np.zeros(len(names), np.int64), np.array(offset, np.int64), np.array(size)
    )
    known = [labels.get(key) or labels.get(_key(key), "") for key in images]
    return Index(encoded, list(names), known, ignored)


def _key(name: str) -> str:
    """Return the key of a member, which in WebDataset ends at the first dot of the name."""
    folder, _, last = name.rpartition("/")
    return f"{folder}/{last.partition('.')[0]}"


def _examples(
    images: dict[str, tuple[str, str, int, int]], shard: Path
) -> tuple[dict[str, tuple[str, str, int, int]], Counter[str]]:
    """Return the images that are an example each, and the types of those that are not.

    KEY.seg.png beside KEY.png is another field of that example. If there is no KEY.png, the dots
    belong to the key, unless the same words follow several keys: then they name fields.
    """
    dotted: dict[str, list[str]] = {}
    for name in images:
        if (key := _key(name)) != name:
            dotted.setdefault(key, []).append(name)
    beside = [name for key, names in dotted.items() if key in images for name in names]
    alone = {key: names for key, names in dotted.items() if key not in images}
    fields = Counter(name.removeprefix(key) for key, names in alone.items() for name in names)
    if any(len(names) > 1 for names in alone.values()) and max(fields.values()) > 1:
        several = next(names for names in alone.values() if len(names) > 1)
        first, second = (images[name][0] for name in several[:2])
        raise ValueError(
            f"{shard} has several images of one example, {first} and {second}; keep only one of"
            " these fields"
        )
    ignored = Counter(name.removeprefix(_key(name)) + images[name][1] for name in beside)
    others = set(beside)
    return {name: each for name, each in images.items() if name not in others}, ignored


class _Mapped(mmap.mmap):
    """A file that returns only existing bytes, however many tarfile requests for a false
    header."""

    @override
    def seek(self, pos: int, whence: Literal[0, 1, 2, 3, 4] = 0, /) -> None:
        if not whence and pos > len(self):
            raise tarfile.ReadError("unexpected end of data")
        super().seek(pos, whence)


def _members(shard: Path) -> Iterator[tarfile.TarInfo]:
    """Yield all members, whole, one at a time; tarfile itself would keep a kilobyte for each.

    Raises:
        ValueError: the file is damaged or ends before they do.
    """
    try:
        if not limits.regular(shard):
            raise ValueError("it is empty")
        # r: refuses compression, as members must be ranges of bytes
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
            # tarfile does not notice that a file is cut between members, or in a header
            mapped.seek(tar.offset)
            if mapped.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError("it is truncated")
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{shard} cannot be read as a tar file: {error}; copy or write it again, without"
            f" compression"
        ) from error
