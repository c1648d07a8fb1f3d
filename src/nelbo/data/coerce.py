"""Data in memory, of whatever kind people hold them in, as the parts of a source.

    array, tensor, nested list     examples (N, ...), as in a .npy file
    mapping of such arrays         as a .npz file of these names: x_train, y_train, x_test, ..
    list of images of Pillow       as a folder of images; one image of its own is refused
    list of texts                  as a .txt file with a line for each
    frame, mapping of columns, list of records, series
                                   a table, see `tabular.frames`
    mapping of split names to frames
                                   a table with these splits
    data set of `datasets`         as from a folder, see `readers.hub`
    DataLoader, data set of torch, generator, any other iterable
                                   batches, copied to a temporary file as they come, so that no
                                   more than one of them is in memory

`nelbo.data.load` and `load_like` call this for everything that is not a path; so each function
that takes data takes all of these.
"""

import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from nelbo._utils import scalars
from nelbo.data.found import Found
from nelbo.data.readers import arrays, hub, text
from nelbo.data.readers.encoded import Form, read_images
from nelbo.data.schema import Schema
from nelbo.data.splits import Declared, split_of

if TYPE_CHECKING:
    from PIL.Image import Image

NAME = "the data"  # in messages
KINDS = (
    "an array or tensor of examples (N, ...), a list of images or texts, a table (a frame, or a"
    " mapping of names to columns), a data set of datasets, an iterable of batches, or a path"
)


def plain(source: object) -> object:
    """Return tables as a frame or mapping of columns, data sets opened, and the rest as it is."""
    source = scalars.plain(source)
    if is_data_set(source):
        return hub.opened(source)
    if hasattr(source, "to_frame") and not _is_frame(source):  # one column
        return cast(Any, source).to_frame(getattr(source, "name", None) or "value")
    if _listed(source) and all(isinstance(each, Mapping) for each in cast(Sequence, source)):
        rows = cast(Sequence[Mapping], source)
        if rows and all(_is_cell(v) for v in rows[0].values()):
            names = dict.fromkeys(chain.from_iterable(rows))
            return {name: [row.get(name) for row in rows] for name in names}
    return source


def is_data_set(source: object) -> bool:
    """Return whether a source is a data set, or a dictionary of them, of `datasets` itself."""
    return type(source).__module__.partition(".")[0] == "datasets" and hasattr(source, "map")


def is_table(source: object) -> bool:
    """Return whether a source that is not a path is a table, or a table in splits."""
    if isinstance(source, np.ndarray):
        return source.dtype.names is not None
    if _is_frame(source) or in_splits(source):
        return True
    return isinstance(source, Mapping) and not any(map(_is_array, source.values()))


def name_of(source: object) -> str:
    """Return a path as it is given, or words for data in memory, for a message or a record."""
    if isinstance(source, str | PathLike):
        return str(source)
    return "the table" if is_table(source) else NAME


def in_splits(source: object) -> bool:
    """Return whether a source is a mapping of the names of splits to frames."""
    return isinstance(source, Mapping) and bool(source) and all(map(_is_frame, source.values()))


def read(
    source: object, form: Form, schema: Schema | None, splits: Declared | None, seed: int = 0
) -> Found:
    """Return the parts of data in memory other than a table, for a model of `schema` if given.

    Raises:
        ValueError: they are of no kind that is known, or an array does not hold examples.
    """
    if isinstance(source, Mapping):
        return _of_mapping(source, form, splits)
    if splits:
        raise ValueError(
            "splits are declared by names, and these data have none; give a mapping such as"
            ' {"train": ..., "test": ...}'
        )
    if _listed(source) and len(cast(Sequence, source)):
        every = list(cast(Sequence, source))
        if all(isinstance(each, str) for each in every):
            return _of_texts(cast(list[str], every), form, schema, seed)
        if all(map(_is_image, every)):
            return read_images(NAME, {"all": Pictures(every)}, form)
    if _is_image(source):
        raise ValueError("data must be a list of images, and this is one image; give [image]")
    if isinstance(source, np.ndarray) and source.dtype.kind in "OUSVmM":
        raise ValueError(f"data must be an array of numbers; got one of the type {source.dtype}")
    array = None if np.isscalar(source) else as_array(source)
    if array is not None:
        return _of_array(array, form)
    if not isinstance(source, Iterable) and not hasattr(source, "__getitem__"):
        raise ValueError(f"data must be {KINDS}; got {type(source).__name__}")
    return _of_batches(source, form, schema, seed)


class Pictures:
    """Images of Pillow, as `encoded.Encoded` holds those in files: each is encoded when read."""

    def __init__(self, images: "Sequence[Image]", chosen: Sequence[int] | None = None) -> None:
        self.images, self.chosen = images, range(len(images)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def at(self, rows: np.ndarray) -> "Pictures":
        """Return a selection of the images."""
        return Pictures(self.images, [self.chosen[i] for i in rows.tolist()])

    def join(self, others: "Sequence[Pictures]") -> "Pictures":
        """Return these images followed by others."""
        return Pictures([each.images[i] for each in (self, *others) for i in each.chosen])

    def content(self, i: int) -> bytes:
        """Return the bytes of the i-th image, as a PNG file."""
        buffer, image = io.BytesIO(), self.images[self.chosen[i]]
        try:
            image.save(buffer, "PNG", compress_level=1, exif=image.getexif())
        except (OSError, ValueError):  # PNG lacks its colours
            raise ValueError(
                f"{self.name(i)} has the colour mode {image.mode}; convert it to grey or RGB"
            ) from None
        return buffer.getvalue()

    def name(self, i: int) -> str:
        """Return the place of the i-th image, for messages."""
        return f"image {self.chosen[i]} of {NAME}"


def _of_array(array: np.ndarray, form: Form) -> Found:
    _refuse_size(form)
    return arrays.found_arrays(NAME, {"all": array}, {"all": NAME}, shape=form.shape)


def _refuse_size(form: Form) -> None:
    if form.size is not None:
        raise ValueError(
            f"size={form.size} resizes images of Pillow or cuts text, and these are arrays; leave"
            " it out"
        )


def _of_mapping(source: Mapping, form: Form, splits: Declared | None) -> Found:
    """Return the parts of named arrays, or of images or arrays by split."""
    if all(_listed(each) and all(map(_is_image, each)) for each in source.values()):
        parts = {split_of(str(name)) or "all": Pictures(list(v)) for name, v in source.items()}
        if len(parts) == len(source):
            return read_images(NAME, parts, form)
    _refuse_size(form)
    known = {str(name): as_array(value) for name, value in source.items()}
    found = {name: value for name, value in known.items() if value is not None and value.ndim}
    return arrays.found_named(
        NAME, list(found), lambda names: {name: found[name] for name in names}, splits, form.shape
    )


def _of_texts(texts: list[str], form: Form, schema: Schema | None, seed: int) -> Found:
    content = {"all": "\n".join(texts).encode()}
    if schema is not None:
        return text.of_bytes_like(NAME, content, [], schema)
    return text.of_bytes(NAME, content, [], form.size, form.levels, seed, form.tokenizer)


def _of_batches(source: object, form: Form, schema: Schema | None, seed: int) -> Found:
    """Return the examples, and the labels if there are some, of an iterable of batches.

    Items of a data set of torch are single examples, those of any other iterable are batches, but
    if they have the shape of one example of a known model.
    """
    single = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    items = map(_named, _items(source))
    first = next(items, None)
    if first is None:
        raise ValueError(
            "the iterable of batches gave none; a generator is empty once it has been read"
        )
    every = chain(iter([first]), items)  # an iterator lets go of what it gave
    if isinstance(first[0], str) or _is_image(first[0]):
        pairs = list(every)
        found = read([x for x, _ in pairs], form, schema, None, seed)
        return _with_labels(found, [y for _, y in pairs if y is not None])
    some = as_array(first[0])
    if some is None:
        raise ValueError(f"data must be {KINDS}; got items of the type {type(first[0]).__name__}")
    alone = single or some.shape == form.shape
    if not alone and some.ndim < 2:
        raise ValueError(
            f"the iterable gave an array of the shape {some.shape}, and a batch of examples has"
            " (N, ...); give batches, or one array of all examples"
        )
    labels: list[object] = []
    del first, some  # only the batch at work is in memory
    array = spilled(_examples(every, alone, labels))
    return _with_labels(_of_array(array, form), labels)


def _items(source: object) -> Iterator[object]:
    if hasattr(source, "__iter__"):
        return iter(cast(Iterable, source))
    indexed = cast(Any, source)  # a data set of torch
    return (indexed[i] for i in range(len(indexed)))


def _named(item: object) -> tuple[object, object]:
    """Return the examples of a batch and their labels, or None."""
    if isinstance(item, Mapping):
        names, labels, _ = arrays.choose(list(map(str, item)))
        if set(names) != {"all"}:
            raise ValueError(
                f"a batch has the keys {', '.join(map(str, item))}; name the examples x or images"
            )
        return item[names["all"]], item[labels["all"]] if labels else None
    if isinstance(item, tuple | list) and 1 <= len(item) <= 2 and not np.isscalar(item[0]):
        return item[0], item[1] if len(item) == 2 else None
    return item, None


def _examples(
    items: Iterable[tuple[object, object]], alone: bool, labels: list[object]
) -> Iterator[np.ndarray]:
    """Yield the examples of each batch, and add their labels to `labels`."""
    for x, y in items:
        array = as_array(x)
        if array is None:
            raise ValueError(f"a batch must be an array of examples; got {type(x).__name__}")
        if y is not None:
            labels.append(np.asarray(as_array(y)).reshape(-1))
        yield array[None] if alone else array


def _with_labels(found: Found, labels: Sequence[object]) -> Found:
    if not labels:
        return found
    values = np.concatenate([np.atleast_1d(np.asarray(y)) for y in labels])
    if any(len(values) != len(part) for part in found.parts.values()):
        return found  # such as the targets of a task, of which there are several each
    name = "y" if values.dtype.kind == "f" else "class"
    return Found(
        found.source, found.parts, found.levels, found.notes, {name: {"all": values}},
        found.alphabet, found.tokenizer,
    )  # fmt: skip


def spilled(batches: Iterable[np.ndarray]) -> np.ndarray:
    """Return batches (n_i, ...) as one array (N, ...) that is mapped from a temporary file.

    Raises:
        ValueError: the batches differ in type or in the shape of an example.
    """
    count, shape, dtype = 0, None, None
    # its name is gone already, so that nothing is left behind, whatever ends this process
    with tempfile.TemporaryFile() as file:
        for i, batch in enumerate(batches):
            if shape is None or dtype is None:
                shape, dtype = batch.shape[1:], batch.dtype
            if (batch.shape[1:], batch.dtype) != (shape, dtype):
                raise ValueError(
                    f"batch {i} has examples of {batch.dtype} {batch.shape[1:]}, and those before"
                    f" are of {dtype} {shape}; give all alike"
                )
            file.write(np.ascontiguousarray(batch).data)
            count += len(batch)
        if shape is None or dtype is None or not count:
            raise ValueError("the iterable of batches holds no example")
        file.flush()
        return np.memmap(file, dtype, "c", shape=(count, *shape))


def as_array(value: object) -> np.ndarray | None:
    """Return an array, a tensor or nested lists of numbers as an array; None for anything else."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype.itemsize < 4 and value.is_floating_point() else value
        return value.resolve_conj().resolve_neg().numpy()
    if isinstance(value, list | tuple):
        if value and all(isinstance(each, Tensor) for each in value):
            value = [each.detach().cpu().numpy() for each in value]
        try:
            value = np.asarray(value)
        except ValueError:  # of different lengths
            shapes = {np.shape(each) for each in value if hasattr(each, "shape")}
            some = f", {' and '.join(map(str, sorted(shapes)[:2]))}" if shapes else ""
            raise ValueError(
                f"the examples in the list have different shapes{some}; make them alike; if they"
                ' are examples and labels, give {"x": examples, "y": labels}'
            ) from None
    elif (not isinstance(value, np.ndarray) and hasattr(value, "__array__")) or (
        np.isscalar(value) and not isinstance(value, str | bytes)
    ):
        value = np.asarray(value)
    if not isinstance(value, np.ndarray) or value.dtype.kind in "OUSV":
        return None
    return value.view(np.ndarray) if type(value) is not np.memmap else value


def _is_array(value: object) -> bool:
    """Return whether a value of a mapping is examples rather than a column of a table."""
    if _listed(value) and len(cast(Sequence, value)):
        first = cast(Sequence, value)[0]
        return _is_image(first) or isinstance(first, Tensor | np.ndarray | list | tuple)
    return isinstance(value, Tensor | np.ndarray) and value.ndim > 1


def _is_frame(value: object) -> bool:
    if isinstance(value, Mapping | np.ndarray | Tensor):
        return False
    kind = type(value)  # a lazy frame would look for its columns
    return hasattr(kind, "columns") or hasattr(kind, "column_names")


def _is_image(value: object) -> bool:
    return hasattr(value, "getexif") and hasattr(value, "mode")


def _is_cell(value: object) -> bool:
    return value is None or np.isscalar(value) or not hasattr(value, "__len__")


def _listed(value: object) -> bool:
    """Return whether a value is a list, or an array of texts or of objects."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "OU" and value.ndim == 1
    return isinstance(value, list | tuple)
