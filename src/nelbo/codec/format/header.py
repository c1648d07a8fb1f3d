"""The header of a file: everything that coder and decoder share beside the model."""

import itertools
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
from annotated_types import Ge, Le, Lt

from nelbo._utils.validation import Record
from nelbo.codec.errors import CorruptFileError

PARTS = 4096  # maximal number of even parts of time in a header


@dataclass(frozen=True)
class Header(Record):
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

    examples: Annotated[int, Ge(0), Le(2**53)]
    shape: list[Annotated[int, Ge(1), Lt(2**53)]]
    levels: int
    model: str
    weights: str
    steps: list[int | float]
    precision: str
    effort: int
    batch: int
    device: str
    versions: dict[str, str]
    answers: dict[str, int]
    coder: int
    ideal: tuple[float, float]
    contents: dict[str, object]

    @classmethod
    def read(cls, values: object) -> "Header":
        """Return the header with these values.

        Raises:
            CorruptFileError: a key is missing or unknown, or a value is impossible.
        """
        try:
            return cls.from_dict(values, "the header")
        except ValueError as error:
            raise CorruptFileError(str(error)) from None


def pack_times(times: tuple[float, ...]) -> list[float]:
    """Convert times for JSON: the number N of even parts of (0, 1] and the steps between times.

    The steps are in parts. If this does not give exactly these times, return 0 and the times.

    >>> pack_times((0.25, 0.5, 1.0))
    [4, 1, 1, 2]
    """
    for parts in range(1, PARTS + 1):
        places = _near(times, parts)
        if places and _even_times(parts, places) == times:
            return [parts, *(b - a for a, b in pairwise([0, *places]))]
    return [0, *times]


def _near(times: tuple[float, ...], parts: int) -> list[int]:
    """Return the places of times among `parts` even parts; none if a time is between two."""
    places = []
    for t in times:
        place = round(t * parts)
        if place < 1 or abs(t * parts - place) > 1e-9:  # far above the rounding of 4096 parts
            return []
        places.append(place)
    return places


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
