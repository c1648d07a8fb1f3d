"""Data sets of Hugging Face's `datasets` (extra: hub): hub:NAME, hub:NAME:CONFIG, hub:FOLDER.

A folder contains Parquet, CSV or JSON files, images, or the output of `save_to_disk`. The features
determine the kind of data: images if a column holds images, text if a column is called text, else
a table. Rows stay in the Arrow files of `datasets`. hub-stream: stores nothing on disk: a table is
read once to infer its columns and once for its hash, and then in its order, shuffled in windows; a
continued run skips what it has seen.

An untrusted folder may name other files: in its README, in the output of `save_to_disk`, in the
cells of its images. Only files inside the folder are read, and for a data set of the hub only
those that `datasets` downloaded.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np
from typing_extensions import override

from nelbo._utils import limits
from nelbo._utils.text import shortened
from nelbo.data.found import Found
from nelbo.data.labels import as_text
from nelbo.data.readers import text
from nelbo.data.readers.encoded import Form, read_images
from nelbo.data.schema import Schema
from nelbo.data.splits import Declared, group, one_each
from nelbo.data.tabular import decoded
from nelbo.data.tabular.frames import polars
from nelbo.data.tabular.table import Table

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from datasets.features.features import FeatureType
    from polars import DataFrame
    from pyarrow import Table as Arrow

    Split: TypeAlias = Dataset | IterableDataset

PREFIXES = {"hub:": False, "hub-stream:": True}
SAVED = ("dataset_info.json", "dataset_dict.json")  # written by `save_to_disk`
TEXT = "text"
BATCH = 1024  # rows of a stream that are fetched together


def is_hub(source: object) -> bool:
    """Return whether a source is a data set of `datasets`, by its name or opened."""
    return isinstance(source, Opened) or (
        isinstance(source, str) and source.startswith(tuple(PREFIXES))
    )


@dataclass(frozen=True)
class Opened:
    """An opened data set of `datasets`.

    Args:
        name: the source, by which it can be opened again.
        splits: the data sets by split.
        features: the features of their columns.
        streaming: whether they are streams.
        notes: notes on what was left out.
        homes: the folders in which its files may be.
    """

    name: str
    splits: "Mapping[str, Split]"
    features: "Mapping[str, FeatureType]"
    streaming: bool
    notes: tuple[str, ...]
    homes: tuple[Path, ...] = ()

    @property
    def image(self) -> str | None:
        """The column of images, or None."""
        return next((n for n, f in self.features.items() if _type(f) == "Image"), None)

    @property
    def is_text(self) -> bool:
        """Whether the data are text."""
        return TEXT in self.features and is_string(self.features[TEXT])


def is_string(feature: "FeatureType") -> bool:
    """Return whether a column of this feature holds texts."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


def opened(source: object, declared: Declared | None = None) -> Opened:
    """Return a data set that is open already, with the splits as declared.

    Raises:
        ValueError: its splits are unclear, or it has no columns.
    """
    splits = dict(source) if isinstance(source, dict) else {"all": cast("Split", source)}
    streaming = any(_type(each).startswith("Iterable") for each in splits.values())
    # who opened it could read all that it names, so the place of its files is not checked
    return _opened("the data set", splits, declared, (Path("/"),), streaming)


def find(source: "str | Opened", declared: Declared | None = None) -> Opened:
    """Open the data set of this name, with the splits as declared.

    Raises:
        ValueError: `datasets` is missing or cannot load it, or its splits are unclear.
    """
    if isinstance(source, Opened):
        return source
    try:
        import datasets
    except ImportError:
        raise ValueError("hub: needs datasets; try: pip install 'nelbo[hub]'") from None
    prefix = next(p for p in PREFIXES if source.startswith(p))
    streaming, rest = PREFIXES[prefix], source.removeprefix(prefix)
    place, config = Path(rest).absolute(), None
    if place.exists():
        rest = str(place)
    else:
        rest, _, config = rest.partition(":")
    homes = _homes(place if place.exists() else None)
    try:
        if any((place / name).is_file() for name in SAVED):
            found = datasets.load_from_disk(rest)
            each = found.values() if isinstance(found, dict) else [found]
            named = [about["filename"] for one in each for about in one.cache_files]
        else:
            builder = datasets.load_dataset_builder(rest, config or None)
            named = [
                file for files in (builder.config.data_files or {}).values() for file in files
            ]
            _check_inside(named, homes, rest)
            here = (Path(file) for file in named if file.endswith(".parquet"))
            decoded.check([file for file in here if file.is_file()])
            found = datasets.load_dataset(rest, config or None, streaming=streaming)
    except OutsideError:
        raise
    except Exception as error:  # from fsspec, requests, pyarrow, ..
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"datasets cannot load {rest!r}: {reason}") from error
    _check_inside(named, homes, rest)
    name = prefix + (f"{rest}:{config}" if config else rest)
    splits = dict(found) if isinstance(found, dict) else {"all": found}
    return _opened(name, splits, declared, homes, streaming)


def _opened(
    name: str,
    splits: "Mapping[str, Split]",
    declared: Declared | None,
    homes: tuple[Path, ...],
    streaming: bool,
) -> Opened:
    groups = group(list(splits), name, declared, "beside the splits")
    if len(groups.parts.get("all", ())) > 1:
        raise ValueError(
            f"{name} has the splits {', '.join(splits)}, none of which is train; name it, as in"
            f" --splits train={next(iter(splits))}"
        )
    known = {each: splits[k] for each, k in one_each(groups, list(splits), name).items()}
    first = next(iter(known.values()))
    features = first.features or first.resolve_features().features
    streamed = streaming and hasattr(first, "skip")
    return Opened(name, known, features, streamed, tuple(groups.notes), homes)


class OutsideError(ValueError):
    """A data set names a file outside its own folders."""


def _homes(place: Path | None) -> tuple[Path, ...]:
    """Return where files of a data set may be: its folder, and the caches of `datasets`."""
    import datasets
    from huggingface_hub import constants

    kept = (
        datasets.config.HF_DATASETS_CACHE,
        datasets.config.DOWNLOADED_DATASETS_PATH,
        constants.HF_HUB_CACHE,
    )
    return tuple(Path(each).resolve() for each in (*kept, *([] if place is None else [place])))


def _check_inside(named: "Sequence[str]", homes: tuple[Path, ...], source: str) -> None:
    """Raise OutsideError if a data set names a local file outside its own folders."""
    for name in map(str, named):
        local = name.removeprefix("file://")
        if ("://" in local and "::" not in local) or limits.trusted():
            continue  # in the hub, or at a URL
        path = Path(local.rpartition("::")[2].removeprefix("file://")).resolve()
        if not any(path.is_relative_to(home) for home in homes):
            raise OutsideError(
                f"{source} names the file {shortened(name, 200)}, which is outside it; move the"
                f" file into it, or set {limits.TRUST}=1 if you wrote it"
            )


def table(source: "str | Opened", declared: Declared | None = None) -> Table | None:
    """Return the data set as a table; None if it has images or text.

    Raises:
        ValueError: it has columns that a table cannot have.
    """
    found = find(source, declared)
    if found.image or found.is_text:
        return None
    for name, feature in found.features.items():
        if _type(feature) not in ("Value", "ClassLabel"):
            raise ValueError(
                f"the column {name!r} of {found.name} holds {_type(feature)}, where a table holds"
                " numbers, texts or booleans; remove it, or name a column of texts text"
            )
    return (Stream if found.streaming else Stored)(found)


def read(
    source: "str | Opened",
    form: Form,
    schema: Schema | None,
    declared: Declared | None = None,
    seed: int = 0,
) -> tuple[str, Found]:
    """Read the images or the text of a data set, for a model of `schema` if given.

    Raises:
        ValueError: it is a stream of images, or the options do not apply.
    """
    found = find(source, declared)
    if found.image:
        return found.name, _images(found, found.image, form)
    parts = {split: _join(each) for split, each in found.splits.items()}
    others = [name for name in found.features if name != TEXT]
    notes = [*found.notes, *([f"columns left out: {', '.join(others)}"] if others else [])]
    if schema is not None:
        return found.name, text.of_bytes_like(found.name, parts, notes, schema)
    return found.name, text.of_bytes(
        found.name, parts, notes, form.size, form.levels, seed, form.tokenizer
    )


def _join(rows: "Split") -> bytes:
    return "\n".join(each or "" for (each,) in rows_of(rows, [TEXT])).encode()


def rows_of(rows: "Split", columns: list[str]) -> Iterator[tuple[str | None, ...]]:
    """Yield the values of some columns of a split, row by row."""
    for batch in rows.select_columns(columns).iter(batch_size=BATCH):
        yield from zip(*(batch[name] for name in columns), strict=True)


def _images(found: Opened, column: str, form: Form) -> Found:
    if found.streaming:
        raise ValueError(
            f"{found.name} has images, which are not streamed; hub: keeps them on disk and reads"
            " them from there"
        )
    import datasets

    cells = {
        split: Cells(
            found.name,
            rows.cast_column(column, datasets.Image(decode=False)),
            column,
            homes=found.homes,
        )
        for split, rows in found.splits.items()
    }
    labels = {
        name: {split: _labels(rows, name, feature) for split, rows in found.splits.items()}
        for name, feature in found.features.items()
        if _type(feature) in ("ClassLabel", "Value")
    }
    others = [name for name in found.features if name != column and name not in labels]
    notes = [*found.notes, *([f"columns left out: {', '.join(others)}"] if others else [])]
    return replace(read_images(found.name, cells, form, notes), labels=labels)


def _labels(rows: "Split", name: str, feature: "FeatureType") -> np.ndarray:
    """Return the labels of rows; "" or NaN if missing; for classes the code -1 means missing
    too."""
    values = rows.with_format("arrow")[name][:].to_pylist()
    if _type(feature) == "ClassLabel":
        names = dict(enumerate(feature.names)) | {None: "", -1: ""}
        odd = next((i for i, value in enumerate(values) if value not in names), None)
        if odd is not None:
            raise ValueError(
                f"the label {name} of row {odd + 1} is {values[odd]}; it has {len(feature.names)}"
                " classes, and -1 for none"
            )
        return np.array([names[value] for value in values], str)
    some = [value for value in values if value is not None]
    if any(isinstance(value, float) for value in some):
        return np.array([math.nan if value is None else value for value in values], float)
    if len(some) == len(values) and not any(isinstance(value, str) for value in some):
        return np.array(values)
    texts = {value: as_text(np.array([value]))[0] for value in set(some)}
    return np.array([texts.get(value, "") for value in values], str)


class Cells:
    """The encoded images in a column, as `encoded.Encoded` holds those in files.

    Args:
        source: for messages.
        rows: a data set of `datasets` that does not decode them.
        column: name of the column.
        chosen: row numbers; by default all.
        homes: the folders in which a cell may name a file.
    """

    def __init__(
        self,
        source: str,
        rows: "Split",
        column: str,
        chosen: np.ndarray | None = None,
        homes: tuple[Path, ...] = (),
    ) -> None:
        self.source, self.rows, self.column, self.homes = source, rows, column, homes
        self.chosen = np.arange(len(rows)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def at(self, rows: np.ndarray) -> "Cells":
        """Return a selection of the images."""
        return Cells(self.source, self.rows, self.column, self.chosen[rows], self.homes)

    def join(self, others: "Sequence[Cells]") -> "Cells":
        """Return these images followed by others."""
        import datasets

        each = [cells.rows.select(cells.chosen) for cells in (self, *others)]
        joined = datasets.concatenate_datasets(each)
        return Cells(self.source, joined, self.column, homes=self.homes)

    def content(self, i: int) -> bytes:
        """Return the bytes of the i-th image."""
        cell = self.rows[int(self.chosen[i])][self.column]
        if cell is None:
            raise ValueError(f"{self.name(i)} has no image; remove it")
        if cell["bytes"]:
            return bytes(cell["bytes"])
        if not cell["path"]:
            raise ValueError(f"{self.name(i)} has no image; remove it")
        _check_inside([cell["path"]], self.homes, self.name(i))
        limits.regular(Path(cell["path"]))
        return Path(cell["path"]).read_bytes()

    def name(self, i: int) -> str:
        """Return the place of the i-th image, for messages."""
        return f"row {self.chosen[i] + 1} of {self.source}"


class _Rows(Table):
    """The rows of all splits, one split after another, with classes as names."""

    def __init__(self, found: Opened) -> None:
        self.found, self.rows = found, list(found.splits.values())
        self.label_names = {
            name: list(feature.names)
            for name, feature in found.features.items()
            if _type(feature) == "ClassLabel"
        }
        parts, first = {}, 0
        for split, rows in found.splits.items():
            parts[split] = first, self._count(rows)
            first += parts[split][1]
        super().__init__(found.name, parts, list(found.features))
        self.notes = found.notes
        if not first:
            raise ValueError(f"{found.name} has 0 rows; give at least 1")

    def _count(self, rows: "Split") -> int:
        return len(rows)

    @override
    def read(self, begin: int, end: int, names: Sequence[str]) -> "DataFrame":
        pl = polars()
        frames = []
        for i, (first, count) in enumerate(self.parts.values()):
            low, high = max(begin, first) - first, min(end, first + count) - first
            if low < high:
                frames.append(self._read(i, low, high).select(names))
        frame: DataFrame = pl.concat(frames)
        for name in set(names) & set(self.label_names):
            of_code = dict(enumerate(self.label_names[name]))
            frame = frame.with_columns(
                pl.col(name).replace_strict(of_code, default=None, return_dtype=pl.String)
            )
        return frame

    def _read(self, i: int, low: int, high: int) -> "DataFrame":
        raise NotImplementedError


class Stored(_Rows):
    """Rows that `datasets` has mapped into memory."""

    @override
    def _read(self, i: int, low: int, high: int) -> "DataFrame":
        return _frame(self.rows[i].with_format("arrow")[low:high])


class Stream(_Rows):
    """Rows that are read in order; going back means starting again."""

    sequential = True

    def __init__(self, found: Opened) -> None:
        super().__init__(found)
        self.at = 0, 0
        self.held: DataFrame | None = None
        self.coming: Iterator[Arrow] = iter(())

    @override
    def fork(self) -> "Stream":
        other = object.__new__(Stream)
        other.__dict__ |= self.__dict__
        other.at, other.held, other.coming = (0, 0), None, iter(())
        return other

    @override
    def _count(self, rows: "Split") -> int:
        return sum(map(len, rows.with_format("arrow").iter(batch_size=BATCH)))

    @override
    def _read(self, i: int, low: int, high: int) -> "DataFrame":
        pl = polars()
        part, begin = self.at
        held = self.held
        if held is None or part != i or low < begin:
            rows = self.rows[i].skip(low).with_format("arrow")
            self.coming, begin, held = rows.iter(batch_size=BATCH), low, None
        frames = [] if held is None else [held]
        have = begin + sum(map(len, frames))
        while have < high:
            frames.append(_frame(next(self.coming)))
            have += len(frames[-1])
        whole: DataFrame = pl.concat(frames)
        self.at, self.held = (i, high), whole[high - begin :]
        return whole[low - begin : high - begin]


def _frame(rows: "Arrow") -> "DataFrame":
    frame: DataFrame = polars().from_arrow(rows)
    return frame


def _type(feature: object) -> str:
    return type(feature).__name__
