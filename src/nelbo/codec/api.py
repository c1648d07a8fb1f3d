"""Compress examples to the bytes of a file, and decompress them."""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from nelbo._utils import limits
from nelbo._utils.distributed import map_across_processes
from nelbo._version import __version__
from nelbo.codec.coding.blocks import MODEL, Block, Done, nothing, storage
from nelbo.codec.coding.codec import Codec, coder_answer
from nelbo.codec.entropy.stack import coder_version
from nelbo.codec.errors import (
    CodecError,
    CorruptFileError,
    ModelMismatchError,
    NotReproducibleError,
)
from nelbo.codec.format import container
from nelbo.codec.format.header import Header, pack_times, unpack_times
from nelbo.codec.settings import Settings
from nelbo.diffusion.model import Model, model_hash

BLOCK = 1000  # examples
#: bytes per example beside its numbers: its place in a batch, and whether it is lost
SIZE = 16
#: copies of all examples in memory while a file is restored
COPIES = 10


def compress(
    model: Model,
    x: Tensor,
    settings: Settings,
    *,
    block: int = BLOCK,
    contents: dict[str, object] | None = None,
    extra: bytes = b"",
    weights: str = "as given",
    verify: bool = True,
    done: Done = nothing,
) -> bytes:
    """Compress examples to the bytes of a file.

    Args:
        model: a model of discrete data, not conditional.
        x: examples, (N, *model.shape), of integers that are levels of the model.
        settings: settings of the code.
        block: about how many examples to code in one block, independently of all others.
        contents: stored in the header.
        extra: stored in the file unchanged.
        weights: name of the weights, for the record.
        verify: decode the file and compare before it is returned.
        done: called with the number of examples newly finished, coded or verified.

    Raises:
        ValueError: the model or the examples have no such code.
        NotReproducibleError: the verification failed.
    """
    if block < 1 or block > 20_000:
        raise ValueError(f"a block must have 1 to 20000 examples; got {block}; try {BLOCK}")
    codec = Codec(model, settings)
    coded = codec.encode_blocks(x, block, done)
    blocks = [found for found, _ in coded]
    by_model = sum(b.count - b.seeds for b in blocks if b.mode == MODEL)
    ideal = sum(nats for _, nats in coded)
    header = Header(
        examples=len(x),
        shape=list(model.shape),
        levels=codec.levels,
        model=codec.hash,
        weights=weights,
        steps=pack_times(settings.grid),
        precision=settings.precision,
        effort=settings.effort,
        batch=settings.batch,
        device=model.device.type,
        versions={
            "nelbo": __version__,
            "torch": torch.__version__,
            "constriction": coder_version(),
        },
        answers=codec.answers({max(b.sizes, default=1) for b in blocks} | {1}),
        coder=coder_answer(),
        ideal=(round(ideal, 1), float(by_model)) if math.isfinite(ideal) else (0.0, 0.0),
        contents=contents or {},
    )
    data = container.write_prefix(asdict(header), extra)
    data += b"".join(container.write_block(found) for found in blocks)
    data += container.write_end(data, len(blocks))
    if verify and not _same(decompress(data, model, done=done).x, x):
        raise NotReproducibleError(
            "the compressed data do not decode to the original data on this machine, so no file"
            " was written"
        )
    return data


def _same(a: Tensor, b: Tensor) -> bool:
    kind = torch.promote_types(a.dtype, b.dtype)  # not all as int64: they may be many
    return torch.equal(a.to(kind), b.to(kind))


@dataclass(frozen=True)
class Decoded:
    """Contents of a decoded file.

    Args:
        x: the examples that could be decoded, (N, *shape).
        lost: first and count of those that could not, in order; empty except after a salvage.
        header: header of the file.
        extra: extra bytes of the file.
    """

    x: Tensor
    lost: tuple[tuple[int, int], ...]
    header: Header
    extra: bytes

    @property
    def kept(self) -> Tensor:
        """Indices of the examples x in the original data, (N,)."""
        keep = torch.ones(self.header.examples, dtype=torch.bool)
        for first, count in self.lost:
            keep[first : first + count] = False
        return keep.nonzero()[:, 0]


def decompress(
    data: bytes, model: Model, *, salvage: bool = False, done: Done = nothing
) -> Decoded:
    """Decompress the examples in the bytes of a file.

    Args:
        data: the file.
        model: the model with which it was compressed.
        salvage: leave out damaged blocks instead of raising an error.
        done: called with the number of examples newly finished.

    Raises:
        CorruptFileError: the file is damaged.
        ModelMismatchError: the file belongs to another model.
        NotReproducibleError: the file would not be decoded correctly here.
    """
    raw, extra, at = container.read_prefix(data)
    header = Header.read(raw)
    blocks = _blocks(data, at, header, salvage)  # check all that needs no network first
    codec = _codec_of(header, model)

    def one(i: int) -> np.ndarray | None:
        try:
            return codec.decode_block(blocks[i], done)
        except CorruptFileError:
            if not salvage:
                raise
            return None

    found = zip(blocks, map_across_processes(len(blocks), one), strict=True)
    parts = {block.first: part for block, part in found if part is not None}
    lost, at = [], 0
    for first, part in sorted(parts.items()):
        if first > at:
            lost.append((at, first - at))
        at = first + len(part)
    if at < header.examples:
        lost.append((at, header.examples - at))
    whole = [part for _, part in sorted(parts.items())]
    x = np.concatenate(whole) if whole else np.zeros((0, *model.shape), storage(header.levels))
    return Decoded(torch.from_numpy(x), tuple(lost), header, extra)


def head_of(data: bytes) -> Header:
    """Return the header of a file.

    Raises:
        CodecError: the file does not have this format, or its header is damaged.
    """
    return Header.read(container.read_prefix(data)[0])


def describe(data: bytes) -> tuple[Header, list[Block]]:
    """Return the header and the blocks of a file; no model is needed.

    Raises:
        CodecError: the file is damaged.
    """
    raw, _, at = container.read_prefix(data)
    header = Header.read(raw)
    return header, _blocks(data, at, header)


def _codec_of(header: Header, model: Model) -> Codec:
    """Return the codec of a file, after checking that it can decode the file correctly."""
    if header.model != model_hash(model):
        raise ModelMismatchError(
            f"the file was compressed with the model {header.model}, not with this one,"
            f" {model_hash(model)}; give the run that it was compressed with (weights"
            f" {header.weights})"
        )
    try:
        settings = Settings(
            unpack_times(header.steps), header.precision, header.effort, header.batch
        )
        codec = Codec(model, settings)
        batches = {int(size) for size in header.answers}
    except CodecError:
        raise
    except (ValueError, TypeError) as error:
        raise CorruptFileError(f"the header is impossible: {error}") from None
    same = header.shape == list(model.shape) and header.levels == codec.levels
    if not batches <= set(range(1, 257)) or not same:
        raise CorruptFileError("the header contradicts the model")
    here = f"torch {torch.__version__} on {model.device.type}"
    there = f"torch {header.versions.get('torch')} on {header.device}"
    if coder_answer() != header.coder:
        raise NotReproducibleError(
            f"the file was coded with constriction {header.versions.get('constriction')}, and"
            f" constriction {coder_version()} here codes differently; install that version"
        )
    if codec.answers(batches) != header.answers:
        raise NotReproducibleError(
            f"the network computes other numbers here ({here}) than where the file was made"
            f" ({there}); decode it there"
        )
    return codec


def _blocks(data: bytes, at: int, header: Header, salvage: bool = False) -> list[Block]:
    """Return the blocks of a file, with as many examples as its header states.

    Raises:
        CorruptFileError: they are not all examples in order; for a salvage it is enough that
            no two overlap.
        ValueError: the bytes of the file cannot be that many examples.
    """
    read = container.find_blocks if salvage else container.read_blocks
    if not salvage and (count := sum(b.count for b in read(data, at))) != header.examples:
        raise CorruptFileError(f"the file holds {count} examples, not {header.examples}")
    numbers = header.examples * (math.prod(header.shape) * storage(header.levels).itemsize + SIZE)
    claimed = f"the {header.examples} examples that the file claims"
    limits.check_unpacked(numbers, len(data), claimed, COPIES)
    blocks: list[Block] = []
    found = 0
    for block in read(data, at):
        if not salvage and block.first != found:
            raise CorruptFileError(f"a block begins at example {block.first}, not at {found}")
        if found + block.count <= header.examples:
            blocks.append(block)
            found += block.count
    return _apart(blocks, header.examples) if salvage else blocks


def _apart(blocks: list[Block], examples: int) -> list[Block]:
    """Return the blocks that do not overlap an earlier one or the end of the examples."""
    found, end = [], 0
    for block in sorted(blocks, key=lambda block: block.first):
        if end <= block.first <= examples - block.count:
            found.append(block)
            end = block.first + block.count
    return found
