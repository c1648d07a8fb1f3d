"""Load a data set from its source."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TypeAlias, cast

from torch import Tensor

from nelbo._utils.tables import resolve
from nelbo.data import coerce, conditions, remote
from nelbo.data.conform import infer, refuse_constant, split, store, together, unscaled
from nelbo.data.found import Found, Reader
from nelbo.data.labels import missing
from nelbo.data.readers import builtin, hub, hub_examples, text
from nelbo.data.readers.encoded import Form
from nelbo.data.schema import Dataset, Schema
from nelbo.data.splits import Declared, declare
from nelbo.data.tabular import datasets
from nelbo.data.tokenizer import Tokenizer

#: readers of arrays and images by kind of source, as messages say it; a line registers one. The
#: first that knows a path reads it; they are imported when a path is read.
READERS = {
    ".npy": "nelbo.data.readers.arrays:NPY",
    ".npz": "nelbo.data.readers.arrays:NPZ",
    ".tar": "nelbo.data.readers.shards:SHARDS",
    "idx": "nelbo.data.readers.idx:IDX",
    "a folder of images": "nelbo.data.readers.folders:FOLDER",
}
BUILT_IN = {"digits": builtin.digits}
SUPPORTED = (
    f"{', '.join(READERS)}, .txt, a .csv, .tsv, .parquet or .arrow table,"
    " or a folder of such files"
)
#: declarations of splits
Splits = str | Mapping[str, str | Sequence[str]]


#: the schema of a table, complete or as a user declares it
Declaration: TypeAlias = Schema | str | PathLike[str] | Sequence[Mapping[str, object]] | None
#: a path, a URL or the name of a built-in set; or data in memory of any kind that `coerce` knows
Source: TypeAlias = str | PathLike[str] | object


def load(
    source: Source,
    *,
    levels: int | None = None,
    size: int | None = None,
    seed: int = 0,
    condition: Sequence[str] = (),
    schema: Declaration = None,
    splits: Splits | None = None,
    tokenizer: str | Tokenizer | None = None,
) -> Dataset:
    """Load a data set to train on, with the splits "train", "validation" and "test".

    Splits that the source lacks are drawn from its training examples: 80/10/10 if it has none.

    Args:
        source: "digits", or the path of a .npy, .npz, .txt, idx or .tar file, of a table, or of a
            folder of images, .txt, idx, .tar, .parquet or .arrow files; or hub:NAME, see `hub`; or
            a URL of such files, see `remote`. A string that is a built-in name is never a path:
            write ./digits for that. Or the data themselves, of any kind in `coerce`: an array, a
            frame, a list of images, a data set of `datasets`, an iterable of batches, ..
        levels: read the data as integers 0..levels-1. By default integers have as many levels as
            are found in all splits (256 for 8-bit images), and reals have a density. 256 takes the
            upper 8 bits of images of 16 bits. Text is read as characters, with 256 levels as
            bytes.
        size: resize encoded images to size x size; cut a text into chunks of that length.
        seed: seed of the split.
        condition: names of one or more labels that the examples are conditioned on.
        schema: the schema of a table, or a JSON file or its content that `inference.complete`
            understands; by default inferred from its cells.
        splits: which names belong to which split, {"train": "a", "test": "b*"} or
            "train=a,test=b*", for sub-folders, files, arrays or splits of a hub; "none" draws all
            splits. By default words in the names decide, see `splits`.
        tokenizer: read a text as tokens: "bpe:4096" for 4096 of them, learned from the training
            split; a folder with a tokenizer.json; or a tokenizer. By default characters.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it cannot be read, or has values that no model of its kind can have.
    """
    if levels is not None and levels < 2:
        raise ValueError(f"levels must be at least 2; got {levels}")
    if seed < 0:
        raise ValueError(f"seed must not be negative; got {seed}")
    condition = [condition] if isinstance(condition, str) else condition
    declared = declare(splits)
    if remote.is_url(source):
        copy = remote.here(source)
        at_copy = load(
            copy,
            levels=levels,
            size=size,
            seed=seed,
            condition=condition,
            schema=schema,
            splits=splits,
            tokenizer=tokenizer,
        )
        return replace(at_copy, source=str(source))
    source = coerce.plain(source)
    if datasets.is_table(source, declared):
        if tokenizer is not None:
            raise ValueError(f"a tokenizer is for text, and {coerce.name_of(source)} is a table")
        return datasets.load(source, levels, size, seed, schema, condition, declared)
    if schema is not None:
        raise ValueError(f"a schema is for tables, and {coerce.name_of(source)} is not one")
    form = Form(size, levels=levels, tokenizer=tokenizer)
    name, found = _read(source, form, None, declared, seed)
    if tokenizer is not None and found.tokenizer is None:
        raise ValueError(
            f"a tokenizer is for text, and {coerce.name_of(source)} is not text; leave it out"
        )
    schema, inferred = infer(found, levels)
    made, how = split(store(found, schema), found.source, seed)
    if schema.kind == "real":
        refuse_constant(made["train"], found.source)
    labels, stored, unseen = conditions.infer_labels(found, condition, seed)
    if not labels:
        inferred += [f"to condition on labels, add --condition {each}" for each in found.labels]
    schema = replace(schema, condition=labels)
    return Dataset(name, schema, made, (*found.notes, *inferred, *how, *unseen), stored)


def load_like(
    source: Source,
    schema: Schema,
    *,
    size: int | None = None,
    splits: Splits | None = None,
    scaled: bool = False,
) -> Dataset:
    """Load a data set to evaluate a model of some schema on.

    Args:
        source: as for `load`.
        schema: the schema of the model; the data must have this shape and these values.
        size: as for `load`.
        splits: as for `load`; with "none" there is only "all".
        scaled: accept levels that were scaled to [0, 1] or [-1, 1], with a note.

    Returns:
        The splits that the source itself has, and "all" of its examples in order.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it cannot be read or is not of this schema.
    """
    declared = declare(splits)
    source = coerce.plain(remote.here(source) if isinstance(source, str) else source)
    if datasets.is_table(source, declared):
        return datasets.load_like(source, schema, declared)
    if schema.kind == "table":
        some = [column.name for column in schema.columns[:8]] + [".."] * (len(schema.columns) > 8)
        raise ValueError(
            f"the model is one of tables, and {coerce.name_of(source)} is not a table; give a"
            f" frame or a mapping of its columns {', '.join(some)}"
        )
    channels = schema.shape[0] if len(schema.shape) == 3 else 1
    form = Form(size, channels, schema.levels, shape=schema.shape)
    name, found = _read(source, form, schema, declared)
    if scaled and schema.levels is not None and not schema.text:
        found = unscaled(found, schema.levels)
    if found.levels is not None and schema.levels is not None and found.levels < schema.levels:
        # The values would be valid, but with another meaning.
        raise ValueError(
            f"{found.source} has {found.levels} levels where {schema.levels} are needed; "
            f"rescale it to 0..{schema.levels - 1} and save it as integers"
        )
    made, labels = store(found, schema), conditions.store_labels(found, schema.condition)
    notes = [*found.notes, *_much_less(made, schema, found.source)]
    for each in (made, labels):
        if each and "all" not in each:
            each["all"] = together(list(each.values()))
    return Dataset(name, schema, made, (*notes, *missing(schema.condition, labels)), labels)


def find_reader(path: Path) -> Reader | None:
    """Return the first of the readers that knows a path; None if none does."""
    readers: Iterator[Reader] = (resolve(kind, READERS) for kind in READERS)
    return next((reader for reader in readers if reader.knows(path)), None)


def _much_less(splits: Mapping[str, Tensor], schema: Schema, source: str) -> list[str]:
    """Return a note if all levels lie in the lower half of the model's: they may be other
    levels."""
    if schema.levels is None or schema.text:
        return []
    largest = max(int(x.max()) for x in splits.values())
    if 2 * largest >= schema.levels - 1 or schema.levels == 2:
        return []
    return [
        f"largest value {largest} of {schema.levels - 1} in {source}: if its levels are"
        f" 0..{largest}, they mean something else to the model; rescale it to"
        f" 0..{schema.levels - 1}"
    ]


def _read(
    source: Source,
    form: Form,
    schema: Schema | None,
    splits: Declared | None,
    seed: int = 0,
) -> tuple[str, Found]:
    """Return the full name of a source and its contents, for a model of `schema` if given."""
    if form.size is not None and form.size < 1:
        raise ValueError(f"size must be at least 1; got {form.size}")
    if hub.is_hub(source):
        opened = cast("str | hub.Opened", source)
        return hub_examples.read(opened, form, schema, splits, seed)
    if not isinstance(source, str | PathLike):
        return coerce.NAME, coerce.read(source, form, schema, splits, seed)
    path = Path(source).absolute()
    built_in = BUILT_IN.get(source) if isinstance(source, str) else None
    if built_in is None and text.is_text(path):
        if schema is not None:
            return str(path), text.read_like(path, schema, splits)
        options = form.size, form.levels, splits, seed, form.tokenizer
        return str(path), text.read(path, *options)
    reader = None if built_in else find_reader(path)
    if form.size is not None and not (reader and reader.resizes):
        raise ValueError(
            f"--size resizes encoded images or cuts text; {source} holds none, so leave it out"
        )
    if splits is not None and not (reader and reader.parts) and not path.is_dir():
        raise ValueError(f"{source} has no named parts; leave --splits out")
    if built_in is not None:
        return str(source), built_in()
    if reader is not None:
        return str(path), reader.read(path, form, splits)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file or folder {path}; give {SUPPORTED}, or a built-in set: "
            f"{', '.join(BUILT_IN)}"
        )
    raise ValueError(f"{path} is of an unknown type; give {SUPPORTED}")
