"""Lanes: parts of a stack, each of which codes its own examples, side by side.

With effort (`search`) an example is put on the complete one before it, so a decoder's network
calls would have one example each. But a stack of bits can be cut: the lower and the upper half of
its words are two independent stacks, and joined again they are the original. So a block begins on
one lane, and when every lane holds enough bits for two examples, all are cut in two; a network
call then takes an example of each. A cut costs nothing, but the end does, where the lanes, which
are numbers, become one number:

    the first lane | the others, without their leading ones | a field for each other | its bits

A field holds the length of a lane minus their mean, which varies by chance: for digits about 9
bits. The search loses 2 bits when it starts again, so a lane costs about 10.
The batches determine the cuts: there are as many lanes as the largest batch so far, and a smaller
batch takes the first of them.
"""

from collections.abc import Sequence

import numpy as np

from nelbo.codec.entropy.stack import WORD, Stack
from nelbo.codec.errors import CorruptFileError

FIELD = 5  # bits that hold the number of bits of a field


def widened(lanes: list[Stack], count: int) -> list[Stack]:
    """Cut lanes in two until there are `count`, a power of two."""
    while len(lanes) < count:
        lanes = [half for lane in lanes for half in lane.halves()]
    return lanes


def narrowed(lanes: list[Stack], count: int) -> list[Stack]:
    """Return the `count` lanes that were `widened` to these."""
    while len(lanes) > count:
        lanes = [low.under(high) for low, high in zip(lanes[::2], lanes[1::2], strict=True)]
    return lanes


def joined(lanes: Sequence[np.ndarray]) -> bytes:
    """Join the words of all lanes, each from the lowest."""
    whole, *others = (int.from_bytes(words.astype("<u4").tobytes(), "little") for words in lanes)
    sizes = [number.bit_length() - 1 for number in others]
    for number, size in zip(others, sizes, strict=True):
        whole = whole << size | number ^ 1 << size
    if others:
        mean = whole.bit_length() // len(lanes)
        bits = 1 + max(abs(size - mean) for size in sizes).bit_length()
        for size in sizes:
            whole = whole << bits | size - mean + (1 << bits - 1)
        whole = whole << FIELD | bits
    return whole.to_bytes((whole.bit_length() + 7) // 8, "little")


def parted(data: bytes, count: int) -> list[np.ndarray]:
    """Return the words of `count` lanes that were joined.

    Raises:
        CorruptFileError: these are not such words.
    """
    if data and not data[-1]:
        raise CorruptFileError("the coded words end in a zero")
    whole, fields, numbers = int.from_bytes(data, "little"), [], []
    if count > 1:
        bits, whole = _taken(whole, FIELD)
        for _ in range(count - 1):
            field, whole = _taken(whole, bits)
            fields.append(field - (1 << bits >> 1))
    mean = whole.bit_length() // count
    for field in fields:
        size = mean + field
        if not 0 <= size < whole.bit_length():
            raise CorruptFileError(f"the coded words are not those of {count} lanes")
        number, whole = _taken(whole, size)
        numbers.append(number | 1 << size)
    return [_words(number) for number in (whole, *reversed(numbers))]


def _taken(whole: int, bits: int) -> tuple[int, int]:
    """Return the lowest bits of a number, and the number without them."""
    return whole & (1 << bits) - 1, whole >> bits


def _words(number: int) -> np.ndarray:
    data = number.to_bytes(WORD // 8 * -(-number.bit_length() // WORD), "little")
    return np.frombuffer(data, "<u4").astype(np.uint32)
