"""The file, extension .nlb; all numbers are little-endian.

    93 4E 4C 42 0D 0A 1A 0A      the first byte is not text, and a transfer that changes line
                                 ends changes these bytes first
    u8  version
    u32 length of the header, u32 length of the extra
    header                       JSON, deflated with a dictionary
    extra                        data that are not coded by the model, unchanged
    u32 CRC-32 of everything before

    for each block:
    BLK1, u32 length of the block without its CRC
    u32 first, u32 count, u8 mode, u8 nonce, u16 runs, u32 borrowed, u32 seeds
    runs times: u8 log2 size, u16 number of consecutive batches of that size
    the coded words, which contain the check of the data (blocks.py)
    u32 CRC-32 of the block since its length

    END1, u32 number of blocks, u32 CRC-32 of everything before

Memory is allocated only in proportion to the bytes that are present: a batch is at most 2^8
examples and part of a run of three bytes, so a false header cannot exhaust memory.
"""

import itertools
import json
import struct
import zlib
from collections.abc import Iterator, Mapping

from nelbo._utils.limits import parse_json
from nelbo.codec.coding.blocks import EVEN, MODEL, PACKED, Block
from nelbo.codec.errors import CodecError, CorruptFileError

MAGIC = b"\x93NLB\r\n\x1a\n"
VERSION = 4
BLOCK, END = b"BLK1", b"END1"
_PREFIX = struct.Struct("<8sBII")
_BLOCK = struct.Struct("<IIBBHII")
_RUN = struct.Struct("<BH")
_CRC = struct.Struct("<I")
_LARGEST = 8  # log2 of a batch
_MANY = 65535  # batches of a run, and examples of a block, at most
#: usual contents of a header, so that it takes few bytes; part of the format
_USUAL = (
    b'"kind":"text","kind":"image","kind":"images","names":[".png"],"sizes":[,"kind":"table",'
    b'"kind":"npy","dtype":"int64","dtype":"uint8","arrays":[["x_test","x","|u1",[],true]]}'
    b'{"examples":1000,"shape":[1,28,28],[3,32,32],"levels":256,"model":"","weights":"EMA, raw,'
    b' step 1000","steps":[,1,1,2,1,3,1,"precision":"float32","precision":"float64","effort":1,'
    b'"batch":32,"device":"cuda","device":"cpu","versions":{"nelbo":"0.1.0","torch":"2.13.0+cpu",'
    b'"constriction":"0.5.0"},"answers":{"1":,"32":},"coder":,"ideal":[,447.0],"contents":{"kind"'
    b':"npz","arrays":[["x","|u1",[447,1,8,8],true]]}}'
)
_INFLATION = 64  # maximal ratio of a header to its deflated bytes, beyond 64 KiB
HEADER = 2**24  # maximal bytes of a header: the names of 500 000 images


def write_prefix(header: Mapping[str, object], extra: bytes) -> bytes:
    """Return everything before the blocks."""
    text = json.dumps(dict(header), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    if len(text.encode()) > HEADER:
        raise ValueError(
            f"the names and sizes of the data take more than {HEADER} bytes; compress them in"
            " several files"
        )
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=_USUAL)
    packed = packer.compress(text.encode()) + packer.flush()
    prefix = _PREFIX.pack(MAGIC, VERSION, len(packed), len(extra)) + packed + extra
    return prefix + _CRC.pack(zlib.crc32(prefix))


def read_prefix(data: bytes) -> tuple[dict[str, object], bytes, int]:
    """Return the header, the extra, and the position of the blocks.

    Raises:
        CodecError: this is not a container, has another version, or is damaged.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise CorruptFileError(
            "not a compressed file of nelbo, by its first bytes; nelbo compress writes one"
        )
    if len(data) < _PREFIX.size:
        raise CorruptFileError("the file ends within its first bytes; get a whole copy")
    _, version, of_header, of_extra = _PREFIX.unpack_from(data)
    if version > VERSION:
        raise CodecError(
            f"the file has version {version} and this nelbo reads {VERSION}; try: pip install"
            " --upgrade nelbo"
        )
    if 1 <= version < VERSION:
        raise CodecError(
            f"the file has version {version} and this nelbo reads {VERSION}; restore it with the"
            " nelbo that wrote it and compress the data again"
        )
    at = _PREFIX.size + of_header + of_extra
    if version < 1 or len(data) < at + _CRC.size:
        raise CorruptFileError("the file ends within its header; get a whole copy")
    if _CRC.unpack_from(data, at)[0] != zlib.crc32(data[:at]):
        raise CorruptFileError(
            "the header is damaged, and nothing can be read without it; get a whole copy"
        )
    packed = data[_PREFIX.size : _PREFIX.size + of_header]
    header = _inflate(packed, min(HEADER, _INFLATION * len(packed) + 2**16))
    return header, data[_PREFIX.size + of_header : at], at + _CRC.size


def write_block(block: Block) -> bytes:
    """Return a block with its frame."""
    runs = [(size, len(list(same))) for size, same in itertools.groupby(block.sizes)]
    split = [(size, min(_MANY, n - i)) for size, n in runs for i in range(0, n, _MANY)]
    body = _BLOCK.pack(
        block.first,
        block.count,
        block.mode,
        block.nonce,
        len(split),
        block.borrowed,
        block.seeds,
    )
    body += b"".join(_RUN.pack(size.bit_length() - 1, n) for size, n in split) + block.payload
    framed = _CRC.pack(len(body)) + body
    return BLOCK + framed + _CRC.pack(zlib.crc32(framed))


def read_blocks(data: bytes, at: int) -> Iterator[Block]:
    """Yield the blocks from `at` to the end of the file, which must be intact.

    Raises:
        CorruptFileError: the file is damaged.
    """
    count = 0
    while data[at : at + 4] != END:
        block, at = _read_block(data, at)
        count += 1
        yield block
    if at + 12 != len(data):
        raise CorruptFileError(
            "the file ends within its last bytes"
            if at + 12 > len(data)
            else "there are bytes after the end of the file"
        )
    if struct.unpack_from("<II", data, at + 4) != (count, zlib.crc32(data[: at + 8])):
        raise CorruptFileError("the file as a whole is damaged")


def find_blocks(data: bytes, at: int) -> Iterator[Block]:
    """Yield all intact blocks, wherever they are."""
    while (at := data.find(BLOCK, at)) >= 0:
        try:
            block, at = _read_block(data, at)
            yield block
        except CorruptFileError:
            at += 1


def write_end(data: bytes, count: int) -> bytes:
    """Return the last bytes of a file whose previous bytes are `data`."""
    end = END + _CRC.pack(count)
    return end + _CRC.pack(zlib.crc32(end, zlib.crc32(data)))


def _read_block(data: bytes, at: int) -> tuple[Block, int]:
    """Return the block at `at`, and the position of its end."""
    place = f"at byte {at} of {len(data)}"
    if data[at : at + 4] != BLOCK or len(data) < at + 8:
        raise CorruptFileError(f"there is no block {place}: the file is truncated or damaged")
    (length,) = _CRC.unpack_from(data, at + 4)
    end = at + 8 + length
    if len(data) < end + 4:
        raise CorruptFileError(f"the block {place} is truncated")
    if _CRC.unpack_from(data, end)[0] != zlib.crc32(data[at + 4 : end]):
        raise CorruptFileError(f"the block {place} is damaged; get a whole copy, or try --salvage")
    if length < _BLOCK.size:
        raise CorruptFileError(f"the block {place} is too short")
    first, count, mode, nonce, runs, borrowed, seeds = _BLOCK.unpack_from(data, at + 8)
    start = at + 8 + _BLOCK.size
    payload = start + runs * _RUN.size
    if payload > end or mode not in (MODEL, EVEN, PACKED) or 32 * borrowed > 8 * length + 64:
        raise CorruptFileError(f"the block {place} contradicts itself")
    sizes: list[int] = []
    for log_size, n in _RUN.iter_unpack(data[start:payload]):
        if log_size > _LARGEST or len(sizes) + n > _MANY:
            raise CorruptFileError(f"the block {place} has impossible batches")
        sizes += [1 << log_size] * n
    if (mode == MODEL and sum(sizes) + seeds != count) or not 0 < count <= _MANY:
        raise CorruptFileError(f"the block {place} has another number of examples than stated")
    block = Block(first, count, mode, nonce, borrowed, seeds, tuple(sizes), data[payload:end])
    return block, end + 4


def _inflate(packed: bytes, most: int) -> dict[str, object]:
    unpacker = zlib.decompressobj(-15, zdict=_USUAL)
    try:
        header = parse_json(unpacker.decompress(packed, most), "the header")
    except zlib.error as error:
        raise CorruptFileError(f"the header cannot be unpacked: {error}") from None
    except ValueError as error:
        raise CorruptFileError(str(error)) from None
    if not unpacker.eof or not isinstance(header, dict):
        raise CorruptFileError("the header is not one of this format")
    return header
