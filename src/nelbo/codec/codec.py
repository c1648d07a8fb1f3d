r"""Examples as bytes and back, with a model that both sides have.

`Codec` fixes what coder and decoder must share: the network in one precision, evaluation mode, the
times, the batches, the rounding. The header of a file states it, with known answers: a checksum of
the rounded answers of the network to known latents, in the batches that the file uses, and one of
known symbols through the entropy coder. Where they differ nothing is decoded.
"""

import copy
import itertools
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

import nelbo
from nelbo.codec import container
from nelbo.codec.bitsback import BitsBack
from nelbo.codec.blocks import BATCH, Block, Codes, decode, encode
from nelbo.codec.direct import Direct, shown_at
from nelbo.codec.errors import CodecError, Damaged, NotReproducible, OtherModel
from nelbo.codec.example import ExampleCode, Static
from nelbo.codec.laws import GridNormal, Groups, Law, Symbols, law
from nelbo.codec.stack import Bottom, Stack, coder_version, constriction
from nelbo.columns import LevelColumns
from nelbo.estimate import Grid
from nelbo.likelihood import Categorical, LevelHead
from nelbo.model import Model, measuring, model_hash
from nelbo.process import Absorbing, Gaussian, Levels, Process
from nelbo.product import Product, ProductDecoder

BLOCK = 1000  # examples
PARTS = 4096  # even parts of time that a header knows, at most
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}
Done = Callable[[int], None]


def nothing(done: int) -> None:
    """No progress shown."""


@dataclass(frozen=True)
class Settings:
    """How examples are coded: what coder and decoder must share beside the model.

    Args:
        grid: times of the bound that is coded, as `Grid` takes them.
        precision: of the network, "float64" or "float32"; the latter decodes on the same
            machine and versions only.
        effort: ways in which each example is coded, the shortest kept; 1 to 255.
        batch: examples of a network call, at most; a power of two up to 256.

    Raises:
        ValueError: values that cannot be.
    """

    grid: tuple[float, ...]
    precision: str = "float64"
    effort: int = 1
    batch: int = BATCH

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be float64 or float32; got {self.precision!r}")
        if not 1 <= self.effort <= 255:
            raise ValueError(f"effort must be 1 to 255; got {self.effort}; try 8")
        if not 1 <= self.batch <= 256:
            raise ValueError(f"batch must be 1 to 256; got {self.batch}; try 32")
        Grid(self.grid)


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Args:
        examples: how many.
        shape: of one.
        levels: of a dimension, at most.
        model: hash of the model.
        weights: which these are, for the record.
        steps: the times of the grid as `pack_times` has them.
        precision: of the network.
        effort: ways in which each example was coded.
        batch: examples of a network call, at most.
        device: type of the device that coded.
        versions: of what coded.
        answers: batch size to the checksum of the network's known answers.
        coder: checksum of known symbols through the coder.
        ideal: nats, and examples, of which one draw of the bound was the model's part.
        contents: how the examples become the data again.
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
        """Raises Damaged where a key is missing, unknown or of another kind."""
        kinds = {f.name: f.type for f in fields(cls)}
        if values.keys() != kinds.keys():
            raise Damaged(f"the header has the keys {sorted(values)}, not those of this format")
        for name, value in values.items():
            kind = getattr(kinds[name], "__origin__", kinds[name])
            if not isinstance(value, kind):  # type: ignore[arg-type]
                raise Damaged(f"{name} in the header cannot be {value!r}")
        return cls(**values)  # type: ignore[arg-type]


class Codec:
    """Lossless codes of the examples of a model.

    Args:
        model: of discrete data, not conditional.
        settings: what coder and decoder share.

    Raises:
        ValueError: the model has a density, or a part of which no lossless code is known.
    """

    def __init__(self, model: Model, settings: Settings) -> None:
        constriction()
        self.levels = check_codable(model)
        self.hash = model_hash(model)
        self.settings = settings
        self.model = copy.deepcopy(model)
        self.model.network.to(PRECISIONS[settings.precision])
        most = min(settings.batch, self.model.rows)
        self.name = f"{self.hash}, {settings}"
        with _fixed(self.model):
            self.codes = Codes(
                self._example_code,
                Static(_table(self.model, self.levels)),
                self.name,
                self.model.shape,
                self.levels,
                settings.effort,
                1 if settings.effort > 1 else 1 << (most.bit_length() - 1),
            )

    def _example_code(self, nonce: int) -> ExampleCode:
        grid = Grid(self.settings.grid)
        if isinstance(self.model.process, Absorbing):
            return Direct(self.model, shown_at(self.model, grid), f"{self.name}, {nonce}")
        return BitsBack(self.model, grid)

    def answers(self, batches: set[int]) -> dict[str, int]:
        """Checksums of the network's known answers, by the size of the batch."""
        with _fixed(self.model):
            code = self._example_code(0)
            return {str(b): _checksum(code.answers(b)) for b in sorted(batches)}

    def encode_blocks(
        self, x: Tensor, block: int, done: Done = nothing
    ) -> Iterator[tuple[Block, float]]:
        """Blocks of about so many examples x, (N, *shape), and the nats of one draw of the bound
        of those that the model coded."""
        count = max(1, round(len(x) / block)) if len(x) else 0
        with _fixed(self.model):
            for part in np.array_split(np.arange(len(x)), count) if count else ():
                first = int(part[0])
                rows = x[first : first + len(part)].long().numpy()
                yield encode(self.codes, rows, first, done)

    def decode_block(self, block: Block, done: Done = nothing) -> np.ndarray:
        """The examples of a block, (N, *shape).

        Raises:
            Damaged: they are not those that were coded.
        """
        small = np.uint8 if self.levels <= 256 else np.int32
        with _fixed(self.model):
            return decode(self.codes, block, done).astype(small)


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
    """Examples as the bytes of a file.

    Args:
        model: of discrete data, not conditional.
        x: examples, (N, *model.shape), of integers that are levels of the model.
        settings: how they are coded.
        block: about how many examples are independent of all others.
        contents: kept in the header.
        extra: kept in the file as it is.
        weights: which these are, for the record.
        verify: decode the file and compare before it is returned.
        done: told how many examples are finished, coded or verified.

    Raises:
        ValueError: a model or examples that have no such code.
        NotReproducible: the verification failed.
    """
    if block < 1 or block > 20_000:
        raise ValueError(f"a block must have 1 to 20000 examples; got {block}; try {BLOCK}")
    codec = Codec(model, settings)
    coded = list(codec.encode_blocks(x, block, done))
    blocks = [found for found, _ in coded]
    by_model = sum(b.count - b.seeds for b in blocks if b.sizes)
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
            "nelbo": nelbo.__version__,
            "torch": torch.__version__,
            "constriction": coder_version(),
        },
        answers=codec.answers({max(b.sizes, default=1) for b in blocks} | {1}),
        coder=coder_answer(),
        ideal=[round(ideal, 1), float(by_model)] if math.isfinite(ideal) else [0.0, 0.0],
        contents=contents or {},
    )
    data = container.write_prefix(asdict(header), extra)
    data += b"".join(container.write_block(found) for found in blocks)
    data += container.write_end(data, len(blocks))
    if verify and not torch.equal(decompress(data, model, done=done).x.long(), x.long()):
        raise NotReproducible("what was compressed does not decode to itself here: not written")
    return data


@dataclass(frozen=True)
class Decoded:
    """What was in a file.

    Args:
        x: the examples that could be decoded, (N, *shape).
        lost: first and count of those that could not, in order; empty but for a salvage.
        header: of the file.
        extra: of the file.
    """

    x: Tensor
    lost: tuple[tuple[int, int], ...]
    header: Header
    extra: bytes

    @property
    def kept(self) -> Tensor:
        """Places of the examples x in the data, (N,)."""
        keep = torch.ones(self.header.examples, dtype=torch.bool)
        for first, count in self.lost:
            keep[first : first + count] = False
        return keep.nonzero()[:, 0]


def decompress(
    data: bytes, model: Model, *, salvage: bool = False, done: Done = nothing
) -> Decoded:
    """The examples in the bytes of a file.

    Args:
        data: the file.
        model: the one that it was compressed with.
        salvage: leave out blocks that are damaged; else they are an error.
        done: told how many examples are finished.

    Raises:
        Damaged: the file is damaged.
        OtherModel: it is of another model.
        NotReproducible: it would not decode to the right data here.
    """
    raw, extra, at = container.read_prefix(data)
    header = Header.from_dict(raw)
    # all that needs no network comes first
    blocks = list(container.find_blocks(data, at) if salvage else container.read_blocks(data, at))
    if not salvage:
        _check_order(blocks, header.examples)
    codec = _codec_of(header, model)
    parts = {}
    for block in blocks:
        try:
            parts[block.first] = codec.decode_block(block, done)
        except Damaged:
            if not salvage:
                raise
    lost, at = [], 0
    for first, part in sorted(parts.items()):
        if first > at:
            lost.append((at, first - at))
        at = first + len(part)
    if at < header.examples:
        lost.append((at, header.examples - at))
    small = np.uint8 if header.levels <= 256 else np.int32
    whole = [part for _, part in sorted(parts.items())]
    x = np.concatenate(whole) if whole else np.zeros((0, *model.shape), small)
    return Decoded(torch.from_numpy(x), tuple(lost), header, extra)


def head_of(data: bytes) -> Header:
    """What a file says of itself.

    Raises:
        CodecError: it is no file of this format, or its header is damaged.
    """
    return Header.from_dict(container.read_prefix(data)[0])


def describe(data: bytes) -> tuple[Header, list[Block]]:
    """What a file says of itself, and its blocks; no model is needed.

    Raises:
        CodecError: the file is damaged.
    """
    raw, _, at = container.read_prefix(data)
    header, blocks = Header.from_dict(raw), list(container.read_blocks(data, at))
    _check_order(blocks, header.examples)
    return header, blocks


def pack_times(times: tuple[float, ...]) -> list[float]:
    """Times for JSON: the number N of even parts of (0, 1] and the steps between them in parts,
    where that gives exactly these times; else 0 and the times.

    >>> pack_times((0.25, 0.5, 1.0))
    [4, 1, 1, 2]
    """
    for parts in range(1, PARTS + 1):
        places = [round(t * parts) for t in times]
        if min(places) > 0 and _even_times(parts, places) == times:
            return [parts, *(b - a for a, b in pairwise([0, *places]))]
    return [0, *times]


def unpack_times(packed: list[float]) -> tuple[float, ...]:
    """The times that were packed.

    Raises:
        ValueError: there are none.
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


def coder_answer() -> int:
    """Checksum of known symbols through the entropy coder."""
    stack, n = Stack(bottom=Bottom("known answer")), np.arange(-40, 41)
    GridNormal(n / 7, 4 + (n % 5) / 3).put(stack, n // 4)
    Symbols(-np.abs(n[:, None] / 50 + np.arange(3))).put(stack, np.abs(n % 3))
    return zlib.crc32(stack.words().astype("<u4").tobytes())


def _codec_of(header: Header, model: Model) -> Codec:
    """The codec of a file, after all that speaks against decoding it was ruled out."""
    if header.model != model_hash(model):
        raise OtherModel(
            f"the file is of the model {header.model}, and this one is {model_hash(model)}: give"
            f" the run it was compressed with (weights {header.weights})"
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
        raise Damaged(f"the header cannot be: {error}") from None
    same = header.shape == list(model.shape) and header.levels == codec.levels
    if not batches <= set(range(1, 257)) or not same:
        raise Damaged("the header contradicts the model")
    here = f"torch {torch.__version__} on {model.device.type}"
    there = f"torch {header.versions.get('torch')} on {header.device}"
    if coder_answer() != header.coder:
        raise NotReproducible(
            f"the entropy coder of constriction {coder_version()} is not that of"
            f" {header.versions.get('constriction')}; install that version"
        )
    if codec.answers(batches) != header.answers:
        raise NotReproducible(
            f"the network answers otherwise here ({here}) than where the file was made ({there});"
            " decode it there"
        )
    return codec


def _check_order(blocks: list[Block], examples: int) -> None:
    """Raises Damaged where the blocks are not all examples in their order."""
    expected = 0
    for block in blocks:
        if block.first != expected:
            raise Damaged(f"a block begins at example {block.first}, not at {expected}")
        expected += block.count
    if expected != examples:
        raise Damaged(f"the file holds {expected} examples, not {examples}")


def _checksum(arrays: list[np.ndarray]) -> int:
    check = 0
    for numbers in arrays:
        check = zlib.crc32(np.ascontiguousarray(numbers, "<i8").tobytes(), check)
    return check


def check_codable(model: Model) -> int:
    """How many levels a dimension has, at most.

    Raises:
        ValueError: the model has no lossless code.
    """
    if model.decoder.density:
        raise ValueError(
            "the model has a density, and only discrete data have a lossless code: train on"
            " integers, with --levels K for the values 0..K-1, or declare the precision of a"
            " table's columns with --schema"
        )
    if model.condition is not None:
        raise ValueError(
            f"the model is given {model.given_what}, which a file of the data alone lacks; train"
            " one without --condition"
        )
    return _levels(model.process)


def _levels(process: Process) -> int:
    if isinstance(process, Product):
        return max(map(_levels, process.parts))
    if isinstance(process, Absorbing):
        return process.count
    if isinstance(process, LevelColumns):
        return process.values.values.shape[1]
    if isinstance(process, Gaussian) and isinstance(process.embedding, Levels):
        return process.embedding.count
    raise ValueError(
        "the model has columns of numbers with too many different values to be levels, which have"
        " no lossless code here; declare a coarser precision of them with --schema"
    )


def _table(model: Model, levels: int) -> Law:
    """The law of one example without context: what the model says of pure noise; where that is
    no law of levels, all levels alike."""
    if not isinstance(model.decoder, LevelHead | Categorical | ProductDecoder):
        return Symbols(np.full((1, *model.shape, levels), -math.log(levels)))
    t = torch.ones(1, dtype=torch.float64, device=model.device)
    z = _noise(model.process, model.shape).to(model.device)[None]
    found = law(model.likelihood(z, t), torch.ones(model.shape, device=model.device))
    assert isinstance(found, Symbols | Groups)
    return found


def _noise(process: Process, shape: tuple[int, ...]) -> Tensor:
    """The latent that knows nothing, (*shape)."""
    if isinstance(process, Product):
        pairs = zip(process.parts, process.sizes, strict=True)
        return torch.cat([_noise(part, (size,)) for part, size in pairs])
    nothing = process.mask if isinstance(process, Absorbing) else 0
    return torch.full(shape, nothing, dtype=torch.float64)


@contextmanager
def _fixed(model: Model) -> Iterator[None]:
    """The network as it measures, and the same algorithms each time."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        with measuring(model):
            yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
