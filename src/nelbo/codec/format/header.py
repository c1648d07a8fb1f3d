"""The header of a file: everything that coder and decoder share beside the model."""

import itertools
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import cast, get_args, get_origin

import torch

from nelbo._utils.progress import shortened
from nelbo.codec.errors import CorruptFileError

PARTS = 4096  # maximal number of even parts of time in a header


@dataclass(frozen=True)
class Header:
    """Header of a file.

    Args:
        examples: number of examples.
        shape: shape of one example.
        levels: maximal number of levels of a dimension.
        model: hash of the model.
        weights: name of the weights, for the record.
        steps: the times of the grid, by `pack_times`.
        precision: precision of the network.
        effort: effort of the coder; if more than 1, a number stands before each example.
        batch: examples per network call, at most.
        device: type of the device that coded.
        versions: versions of the libraries that coded.
        answers: batch size to the checksum of the network's known answers.
        coder: checksum of known symbols through the coder.
        ideal: nats of one draw of the bound of the examples coded by the model, and their number.
        contents: description that restores the data from the examples.
    """

    examples: int
    shape: list[int]
    levels: int
    model: str
    weights: str
    steps: list[float]
    precision: str
    effort: int
    batch: int
    device: str
    versions: dict[str, str]
    answers: dict[str, int]
    coder: int
    ideal: list[float]
    contents: dict[str, object]

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> "Header":
        """Return the header with these values.

        Raises:
            CorruptFileError: a key is missing or unknown, or a value has the wrong type.
        """
        kinds = {f.name: f.type for f in fields(cls)}
        if values.keys() != kinds.keys():
            raise CorruptFileError(
                f"the header has the keys {sorted(values)}, not those of this format"
            )
        for name, value in values.items():
            if not _is(value, kinds[name]):
                raise CorruptFileError(f"{name} in the header cannot be {shortened(repr(value))}")
        if cast(int, values["examples"]) > 2**53:
            raise CorruptFileError(
                f"the file cannot hold {shortened(repr(values['examples']))} examples"
            )
        if len(cast(list, values["ideal"])) != 2 or not all(
            0 < n < 2**53 for n in cast(list, values["shape"])
        ):
            raise CorruptFileError("the shape or the price in the header cannot be")
        return cls(**values)  # type: ignore[arg-type]


def _is(value: object, kind: object) -> bool:
    """Return whether a JSON value has a type such as list[int]."""
    outer, inner = get_origin(kind) or kind, get_args(kind)
    if outer is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, cast(type, outer)) or isinstance(value, bool):
        return False
    if not inner or inner[-1] is object:
        return True
    values = value.values() if isinstance(value, dict) else cast(list, value)
    return all(_is(each, inner[-1]) for each in values)


def pack_times(times: tuple[float, ...]) -> list[float]:
    """Convert times for JSON: the number N of even parts of (0, 1] and the steps between times.

    The steps are in parts. If this does not give exactly these times, return 0 and the times.

    >>> pack_times((0.25, 0.5, 1.0))
    [4, 1, 1, 2]
    """
    for parts in range(1, PARTS + 1):
        places = [round(t * parts) for t in times]
        if min(places) > 0 and _even_times(parts, places) == times:
            return [parts, *(b - a for a, b in pairwise([0, *places]))]
    return [0, *times]


def unpack_times(packed: list[float]) -> tuple[float, ...]:
    """Return the times that were packed.

    Raises:
        ValueError: these are not packed times.
    """
    parts, *rest = packed
    if not parts:
        return tuple(map(float, rest))
    return _even_times(int(parts), list(itertools.accumulate(map(int, rest))))


def _even_times(parts: int, places: list[int]) -> tuple[float, ...]:
    if not 1 <= parts <= PARTS or not all(0 < i <= parts for i in places):
        raise ValueError(f"times {places} of {parts} parts")
    even = torch.linspace(0, 1, parts + 1, dtype=torch.float64)
    return tuple(even[places].tolist())
