"""A block: examples on one stack, decoded independently of other blocks.

A bits-back code borrows bits before it pays any; these bits are the initial cost of a file. They
are kept low by

    seeds   the first examples are coded by a static table, until their bits suffice for one
            example of the model
    ramp    then batches grow with the bits on the stack, their sizes powers of two

and only missing bits are put under the stack. The words there are derived from the name of the
block and from its data, so a stack that does not end with them reveals wrong data: a check that
costs nothing if the words are borrowed, and one word in a direct code, whose first symbols would
otherwise waste most of it. With effort (`search`) each example follows the number that makes the
block short, and a batch is an example on each of the `lanes`.
"""

import contextlib
import hashlib
import itertools
import lzma
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nelbo.codec.coding.example import ExampleCode, Static
from nelbo.codec.coding.search import best_ways, pop_way, power_of_two, push_way
from nelbo.codec.entropy.lanes import joined, narrowed, parted, widened
from nelbo.codec.entropy.stack import (
    CHECK,
    PRECISION,
    START,
    WORD,
    Bottom,
    SideBySide,
    Stack,
    constriction,
)
from nelbo.codec.errors import CorruptFileError

MODEL, EVEN, PACKED = 0, 1, 2  # codes of a block: the model, equally likely levels, xz
BATCH = 32  # examples per network call, at most
SPARE = 1.02  # factor on the bits that an example is expected to need
LANE = 8192  # bits of a block per lane, at the cost of seeds
FILTER = [{"id": lzma.FILTER_LZMA2, "preset": 6 | lzma.PRESET_EXTREME}]
Done = Callable[[int], None]  # called with the number of examples newly finished


def nothing(done: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Block:
    """Contents of a block.

    Args:
        first: index of its first example in the data.
        count: number of its examples.
        mode: MODEL, EVEN or PACKED.
        nonce: index of the order of its symbols.
        borrowed: number of words put under the stack.
        seeds: number of examples coded by the static table.
        sizes: sizes of the batches of the other examples, powers of two, in the order of the data.
        payload: the coded words.
    """

    first: int
    count: int
    mode: int
    nonce: int
    borrowed: int
    seeds: int
    sizes: tuple[int, ...]
    payload: bytes


@dataclass(frozen=True)
class Codes:
    """The codes of a block.

    Args:
        model: returns the code by the model for a nonce.
        static: the code of seeds.
        name: name of the model and its steps, for the words under the stack.
        shape: shape of one example.
        levels: maximal number of levels of a dimension.
        effort: effort of the coder, see `search`; for a code without borrowing, number of orders
            of symbols.
        batch: examples per network call, at most.
    """

    model: Callable[[int], ExampleCode]
    static: Static
    name: str
    shape: tuple[int, ...]
    levels: int
    effort: int = 1
    batch: int = BATCH


def encode(codes: Codes, x: np.ndarray, first: int, done: Done) -> tuple[Block, float]:
    """Encode examples x, (N, *shape) int64, as a block; also return the ideal cost in nats.

    The cost is that of the examples coded by the model.

    Args:
        codes: the codes.
        x: the examples.
        first: index of the first example.
        done: called with the number of examples newly finished.
    """
    if x.min() < 0 or x.max() >= codes.levels:
        raise ValueError(f"values must be 0..{codes.levels - 1}; got {x.min()}..{x.max()}")
    even = Block(first, len(x), EVEN, 0, CHECK, 0, (), _push_alike(codes, x, first))
    packed = Block(first, len(x), PACKED, 0, 0, 0, (), _pack(codes, x))
    tries = [(even, 0.0), (packed, 0.0)]
    with contextlib.suppress(CorruptFileError):  # data too far from what the model expects
        if codes.model(0).borrows:
            tries.append(_with_bits_back(codes, x, first, done))
        else:
            nonces = range(codes.effort)
            tries += [_directly(codes, x, first, nonce, done) for nonce in nonces]
    return min(tries, key=lambda found: len(found[0].payload))


def decode(codes: Codes, block: Block, done: Done) -> np.ndarray:
    """Decode the examples of a block, (N, *shape) int64.

    Raises:
        CorruptFileError: they are not those that were encoded.
    """
    if block.mode != MODEL:
        done(block.count)  # all at once
    if block.mode == PACKED:
        return _unpack(codes, block)
    floor = WORD if block.borrowed >= START else WORD * CHECK - 1
    wide = block.mode == MODEL and block.borrowed >= START and codes.effort > 1
    parts = parted(block.payload, max(block.sizes, default=1) if wide else 1)
    lanes = [Stack(words, floor=floor, counts=False) for words in parts]
    if block.mode == EVEN:
        x, stack = _pop_alike(codes, block, lanes[0]), lanes[0]
    else:
        x, stack = _unstack(codes, block, lanes, done)
    bottom = _bottom(codes, block.first, x).words(block.borrowed)
    if not np.array_equal(stack.words(), bottom):
        raise CorruptFileError(
            "the stack of bits does not end as it began: the decoded data are not those that"
            " were coded"
        )
    return x


def _bottom(codes: Codes, first: int, x: np.ndarray) -> Bottom:
    """Return the words under the stack of examples x, whose first example has the index
    `first`."""
    data = hashlib.sha256(np.ascontiguousarray(x, "<i8").tobytes()).hexdigest()
    return Bottom(f"{codes.name}, {first}, {data}")


def _with_bits_back(codes: Codes, x: np.ndarray, first: int, done: Done) -> tuple[Block, float]:
    code, bottom = codes.model(0), _bottom(codes, first, x)
    stack, need, seeds = Stack(bottom=bottom), _need(code, x[:1], bottom), 0
    while seeds < len(x) and stack.bits < need:
        codes.static.push(stack, x[seeds : seeds + 1])
        seeds += 1
    done(seeds)
    if codes.effort > 1:
        most = power_of_two(min(codes.batch, len(x) * stack.bits / seeds / LANE))
        lanes, sizes, ideal = _with_effort(codes, code, stack, x[seeds:], need, most, done)
    else:
        lanes, sizes, at = [stack], [], seeds
        while at < len(x):
            sizes.append(power_of_two(min(stack.bits / need, len(x) - at, codes.batch)))
            code.push(stack, x[at : at + sizes[-1]])
            at += sizes[-1]
            done(sizes[-1])
        ideal = stack.ideal
    payload = joined([lane.words() for lane in lanes])
    block = Block(first, len(x), MODEL, 0, lanes[0].borrowed, seeds, tuple(sizes), payload)
    return block, ideal


def _with_effort(
    codes: Codes,
    code: ExampleCode,
    stack: Stack,
    x: np.ndarray,
    need: float,
    most: int,
    done: Done,
) -> tuple[list[Stack], list[int], float]:
    """Code the examples x on a stack, divided into at most `most` lanes, with a search.

    Return the lanes, the sizes of batches, and the ideal cost in nats.
    """
    try:
        ways, sizes = best_ways(code, stack, x, need, most, codes.effort, codes.batch, done)
        lanes, at, ideal = [stack.copy()], 0, stack.ideal
        for size in sizes:
            lanes = widened(lanes, size)
            rows = SideBySide(lanes[:size], counts=True)
            push_way(rows, ways[at : at + size])
            code.push(rows, x[at : at + size])
            at += size
            ideal += rows.ideal
    except CorruptFileError:  # only the lowest lane has a bottom to borrow from
        if most == 1:
            raise
        return _with_effort(codes, code, stack, x, need, 1, done)
    return lanes, sizes, ideal


def _directly(
    codes: Codes, x: np.ndarray, first: int, nonce: int, done: Done
) -> tuple[Block, float]:
    code, stack = codes.model(nonce), Stack(_bottom(codes, first, x).words(CHECK))
    sizes, at = [], 0
    while at < len(x):
        size = power_of_two(min(len(x) - at, codes.batch))
        code.push(stack, x[at : at + size], first + at)
        at += size
        sizes.append(size)
        done(size)
    words = joined([stack.words()])
    return Block(first, len(x), MODEL, nonce, CHECK, 0, tuple(sizes), words), stack.ideal


def _need(code: ExampleCode, x: np.ndarray, bottom: Bottom) -> float:
    """Return the bits that must be on the stack for one example like x."""
    trial = Stack(bottom=bottom)
    code.push(trial, x)
    return max(1.0, SPARE * (WORD * START - trial.least))


def _unstack(
    codes: Codes, block: Block, lanes: list[Stack], done: Done
) -> tuple[np.ndarray, Stack]:
    """Decode the parts coded by the model and the static table, the last batch first.

    Return the examples and the remaining stack.
    """
    code, at, parts = codes.model(block.nonce), block.count, []
    if code.borrows != (block.borrowed >= START) or (block.seeds and not code.borrows):
        raise CorruptFileError("a block claims a way of coding that its model does not have")
    most = [*itertools.accumulate(block.sizes, max)]
    for size, count in zip(reversed(block.sizes), reversed(most), strict=True):
        at -= size
        if codes.effort > 1 and code.borrows:
            lanes = narrowed(lanes, count)
            rows = SideBySide(lanes[:size])
            parts.append(code.pop(rows, size))
            pop_way(rows)
        else:
            parts.append(code.pop(lanes[0], size, block.first + at))
        done(size)
    (stack,) = narrowed(lanes, 1)
    parts += [codes.static.pop(stack, 1) for _ in range(block.seeds)]
    done(block.seeds)
    return np.concatenate(parts[::-1]), stack


def _push_alike(codes: Codes, x: np.ndarray, first: int) -> bytes:
    """Code all levels as equally likely."""
    stack = Stack(_bottom(codes, first, x).words(CHECK))
    stack.push(x.ravel(), constriction().stream.model.Uniform(codes.levels))
    return joined([stack.words()])


def _pop_alike(codes: Codes, block: Block, stack: Stack) -> np.ndarray:
    """Decode the words of `_push_alike`."""
    count = block.count * int(np.prod(codes.shape))
    often = 2**PRECISION - (codes.levels - 1) * (2**PRECISION // codes.levels)  # last level
    if 8 * len(block.payload) < count * (PRECISION - math.log2(often)):
        raise CorruptFileError("the coded words end before the data do")
    uniform = constriction().stream.model.Uniform(codes.levels)
    return stack.pop(uniform, count=count).astype(np.int64).reshape(-1, *codes.shape)


def _pack(codes: Codes, x: np.ndarray) -> bytes:
    """Pack by xz, after a CRC-32 of the data."""
    data = x.astype(_packed_type(codes)).tobytes()
    return struct.pack("<I", zlib.crc32(data)) + pack(data)


def _unpack(codes: Codes, block: Block) -> np.ndarray:
    dtype = _packed_type(codes)
    size = block.count * int(np.prod(codes.shape)) * dtype.itemsize
    data = unpack(block.payload[4:], size)
    if len(data) != size or struct.pack("<I", zlib.crc32(data)) != block.payload[:4]:
        raise CorruptFileError("the unpacked data are not those that were packed")
    return np.frombuffer(data, dtype).astype(np.int64).reshape(-1, *codes.shape)


def pack(data: bytes) -> bytes:
    """Pack bytes by xz, without its frame; no bytes stay none."""
    return lzma.compress(data, lzma.FORMAT_RAW, filters=FILTER) if data else b""


def unpack(packed: bytes, most: int) -> bytes:
    """Unpack bytes, `most` at most.

    Raises:
        CorruptFileError: they were not packed by `pack`.
    """
    try:
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=FILTER)
        return unpacker.decompress(packed, most) if packed else b""
    except lzma.LZMAError as error:
        raise CorruptFileError(f"packed bytes cannot be unpacked: {error}") from None


def storage(levels: int) -> np.dtype:
    """Return the smallest type of numpy and torch that holds the levels."""
    return np.dtype(np.uint8 if levels <= 256 else np.int32)


def _packed_type(codes: Codes) -> np.dtype:
    """Return the type in which data are packed: part of the format."""
    return np.dtype("u1" if codes.levels <= 256 else "<u2" if codes.levels <= 65536 else "<u4")
