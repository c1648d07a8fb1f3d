"""Compress data on disk to a file, and restore them; called by the command line."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nelbo._utils import limits
from nelbo._utils.distributed import main_process_first
from nelbo._utils.files import check_writable, write
from nelbo._utils.numerics import LOG_2
from nelbo._utils.text import shortened
from nelbo.codec.api import BLOCK, Decoded, compress, decompress, describe, head_of
from nelbo.codec.coding.blocks import EVEN, MODEL, PACKED, Block, nothing
from nelbo.codec.coding.codec import check_codable
from nelbo.codec.entropy.stack import constriction
from nelbo.codec.errors import CodecError, naming
from nelbo.codec.format import contents
from nelbo.codec.format.header import Header
from nelbo.codec.settings import Settings
from nelbo.data.schema import Schema
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeGrid

SUFFIX = ".nlb"
MODES = {MODEL: "model", EVEN: "even", PACKED: "packed"}
Progress = Callable[[int], Callable[[int], None]]  # total -> function called per increment


@dataclass(frozen=True)
class Summary:
    """Result of compressing some data.

    Args:
        original: bytes of the data as plain numbers or text.
        compressed: bytes of the file.
        bits_per_dim: bits per dimension of the file.
        notes: notes on anything that is not restored to the byte.
    """

    original: int
    compressed: int
    bits_per_dim: float
    notes: tuple[str, ...]


def compress_file(
    model: Model,
    schema: Schema,
    source: str,
    out: Path,
    times: Callable[[], TimeGrid],
    *,
    weights: str = "as given",
    effort: int = 1,
    block: int = BLOCK,
    precision: str = "float64",
    verify: bool = True,
    progress: Progress = lambda total: nothing,
) -> Summary:
    """Write the data at `source` as a compressed file.

    Args:
        model: the model, on the device on which it is to run.
        schema: schema of the data.
        source: see `contents.read`.
        out: a .nlb file that does not exist.
        times: returns the grid; called after all other checks.
        weights: name of the weights, for the record.
        effort: effort of the search for a short file; see `Settings`.
        block: about how many examples to code in one block, independently of all others.
        precision: precision of the network.
        verify: decode before writing.
        progress: shows progress.

    Raises:
        ValueError: the data, the model or the options have no such code.
        OSError: a file cannot be read or written; the error names it.
    """
    constriction()  # raises before any work
    if out.suffix != SUFFIX:
        raise ValueError(f"a compressed file ends in {SUFFIX}; got {out}; try {out}{SUFFIX}")
    if out.exists():
        raise FileExistsError(f"{out} exists; give another --out, or remove it")
    check_writable(out)
    if schema.condition:
        names = ", ".join(label.name for label in schema.condition)
        raise ValueError(
            f"the model is conditional on {names}, which a compressed file does not contain;"
            " train one without --condition"
        )
    check_codable(model)
    found = contents.read(source, schema)
    if not len(found.x):
        raise ValueError(f"{source} has no examples to compress")
    settings = Settings(tuple(times().times.tolist()), precision, effort)
    unit = {} if model.dimension == Model.dimension else {"dimension": model.dimension}
    data = compress(
        model,
        found.x,
        settings,
        block=block,
        contents={**found.about, **unit},
        extra=found.extra,
        weights=weights,
        verify=verify,
        done=progress(len(found.x) * (2 if verify else 1)),
    )
    main_process_first(lambda: write(out, data))
    bits = 8 * len(data) / contents.numbers(found.about, found.x.numel())
    return Summary(found.original, len(data), bits, found.notes)


def decompress_file(
    model: Model,
    schema: Schema,
    file: Path,
    out: Path,
    *,
    salvage: bool = False,
    progress: Progress = lambda total: nothing,
) -> Decoded:
    """Write the data of a compressed file; with `salvage`, whatever can be decoded.

    Raises:
        CodecError: the file cannot be decoded, or not here.
        OSError: a file cannot be read or written; the error names it.
    """
    constriction()
    limits.check_file(file)
    data = file.read_bytes()
    with naming(file):
        header = head_of(data)
    contents.check_output(header.contents, out)
    with naming(file):
        found = decompress(data, model, salvage=salvage, done=progress(header.examples))
    if salvage and not len(found.x):
        raise CodecError(f"no block of {file} is intact, so nothing can be restored")
    made = contents.Contents(found.x, found.header.contents, found.extra)
    kept = found.kept if found.lost else None
    main_process_first(lambda: contents.save(made, schema, out, kept))
    return found


@dataclass(frozen=True)
class BlockReport:
    """Description of a block."""

    first: int
    count: int
    mode: str
    seeds: int
    batches: int
    size: int
    bits_per_dim: float


@dataclass(frozen=True)
class Report:
    """Description of a compressed file, without decoding it.

    Args:
        size: bytes of the file.
        header: its header.
        dimension: name of a dimension, such as dim, or token of a text.
        bits_per_dim: bits per dimension of the file; symbols that fill up a text do not count.
        bound: bits per dimension of one draw of the bound of the examples coded by the model, at
            the latents in the file; None if there are none.
        blocks: its blocks.
    """

    size: int
    header: Header
    dimension: str
    bits_per_dim: float
    bound: float | None
    blocks: tuple[BlockReport, ...]


def report(data: bytes) -> Report:
    """Describe the bytes of a file.

    Raises:
        CodecError: they are damaged.
    """
    header, blocks = describe(data)
    dims = math.prod(header.shape)
    padded = header.examples * dims
    numbers = max(1, contents.numbers(header.contents, padded))
    nats, by_model = header.ideal
    bound = nats / (LOG_2 * by_model * dims) if by_model else None
    end = header.examples
    each = tuple(
        _of_block(b, b.count * dims - (padded - numbers) * (b.first + b.count == end))
        for b in blocks
    )
    dimension = shortened(str(header.contents.get("dimension", Model.dimension)), 16)
    return Report(len(data), header, dimension, 8 * len(data) / numbers, bound, each)


def _of_block(block: Block, numbers: int) -> BlockReport:
    size = len(block.payload)
    bits = 8 * size / max(1, numbers)
    batches = len(block.sizes)
    return BlockReport(
        block.first, block.count, MODES[block.mode], block.seeds, batches, size, bits
    )
