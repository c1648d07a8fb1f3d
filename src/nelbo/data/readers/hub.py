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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

from nelbo._utils import limits
from nelbo._utils.text import shortened
from nelbo.data.splits import Declared, group, one_each
from nelbo.data.tabular import decoded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset, IterableDataset
    from datasets.features.features import FeatureType

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
        return next((n for n, f in self.features.items() if type_of(f) == "Image"), None)

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
    streaming = any(type_of(each).startswith("Iterable") for each in splits.values())
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
            check_inside(named, homes, rest)
            here = (Path(file) for file in named if file.endswith(".parquet"))
            decoded.check([file for file in here if file.is_file()])
            found = datasets.load_dataset(rest, config or None, streaming=streaming)
    except OutsideError:
        raise
    except Exception as error:  # from fsspec, requests, pyarrow, ..
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"datasets cannot load {rest!r}: {reason}") from error
    check_inside(named, homes, rest)
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


def check_inside(named: "Sequence[str]", homes: tuple[Path, ...], source: str) -> None:
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


def rows_of(rows: "Split", columns: list[str]) -> Iterator[tuple[str | None, ...]]:
    """Yield the values of some columns of a split, row by row."""
    for batch in rows.select_columns(columns).iter(batch_size=BATCH):
        yield from zip(*(batch[name] for name in columns), strict=True)


def type_of(feature: object) -> str:
    """Return the name of a class, which says the kind of a feature or of a data set."""
    return type(feature).__name__
