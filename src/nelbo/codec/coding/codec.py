"""Code examples as blocks, and back, with a model that both sides have.

`Codec` fixes everything that coder and decoder must share: the network in one precision,
evaluation mode, the times, the batches, the rounding. The header of a file states it, with known
answers: a checksum of the rounded output of the network for known latents, in the batches that the
file uses, and one of known symbols through the entropy coder. If these differ, nothing is decoded.
"""

import copy
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.distributed import map_across_processes
from nelbo._utils.network_calls import fixed_rows
from nelbo.codec.coding.bitsback import BitsBack
from nelbo.codec.coding.blocks import Block, Codes, Done, decode, encode, nothing, storage
from nelbo.codec.coding.direct import Direct, shown_at
from nelbo.codec.coding.example import ExampleCode, Static
from nelbo.codec.coding.search import power_of_two
from nelbo.codec.entropy.laws import GridNormal, SymbolModel, Symbols, law
from nelbo.codec.entropy.stack import Bottom, Stack, constriction
from nelbo.codec.format.header import pack_times
from nelbo.codec.settings import PRECISIONS, Settings
from nelbo.diffusion.model import Model, measuring, model_hash
from nelbo.diffusion.process import ForwardProcess
from nelbo.diffusion.schedules import Schedule
from nelbo.diffusion.times import TimeGrid


def coder_answer() -> int:
    """Return the checksum of known symbols through the entropy coder."""
    stack, n = Stack(bottom=Bottom("known answer")), np.arange(-40, 41)
    GridNormal(n / 7, 4 + (n % 5) / 3).put(stack, n // 4)
    Symbols(-np.abs(n[:, None] / 50 + np.arange(3))).put(stack, np.abs(n % 3))
    return zlib.crc32(stack.words().astype("<u4").tobytes())


class Codec:
    """A lossless code of the examples of a model.

    Args:
        model: a model of discrete data, not conditional.
        settings: settings shared by coder and decoder.

    Raises:
        ValueError: the model has a density, or a part without a known lossless code.
    """

    def __init__(self, model: Model, settings: Settings) -> None:
        constriction()
        self.levels = check_codable(model)
        self.hash = model_hash(model)
        self.settings = settings
        self.model = copy.deepcopy(model)
        self.model.network.to(PRECISIONS[settings.precision])
        _remember(self.model)
        most = min(settings.batch, self.model.rows)
        times, effort = pack_times(settings.grid), settings.effort
        # determines the words under a stack and the orders of symbols: part of the format
        self.name = f"{self.hash}, {times}, {settings.precision}, {effort}"
        with _fixed(self.model):
            self.codes = Codes(
                self._example_code,
                Static(_table(self.model, self.levels)),
                self.name,
                self.model.shape,
                self.levels,
                settings.effort,
                power_of_two(most),
            )

    def _example_code(self, nonce: int) -> ExampleCode:
        grid = TimeGrid(self.settings.grid)
        if self.model.process.any_order:
            return Direct(self.model, shown_at(self.model, grid), f"{self.name}, {nonce}")
        return BitsBack(self.model, grid)

    def answers(self, batches: set[int]) -> dict[str, int]:
        """Return checksums of the network's known answers, by the size of the batch."""
        with _fixed(self.model):
            code = self._example_code(0)
            return {str(b): _checksum(code.answers(b)) for b in sorted(batches)}

    def encode_blocks(
        self, x: Tensor, block: int, done: Done = nothing
    ) -> list[tuple[Block, float]]:
        """Encode examples x, (N, *shape), as blocks of about `block` examples.

        Return each block with its ideal cost: one draw of the bound, in nats, of the examples
        coded by the model. Several processes share the blocks.
        """
        count = max(1, round(len(x) / block)) if len(x) else 0
        parts = np.array_split(np.arange(len(x)), count) if count else []

        def one(i: int) -> tuple[Block, float]:
            first = int(parts[i][0])
            rows = x[first : first + len(parts[i])].long().numpy()
            return encode(self.codes, rows, first, done)

        with _fixed(self.model):
            return map_across_processes(len(parts), one)

    def decode_block(self, block: Block, done: Done = nothing) -> np.ndarray:
        """Decode the examples of a block, (N, *shape).

        Raises:
            CorruptFileError: they are not those that were coded.
        """
        with _fixed(self.model):
            return decode(self.codes, block, done).astype(storage(self.levels))


def _checksum(arrays: list[np.ndarray]) -> int:
    check = 0
    for numbers in arrays:
        check = zlib.crc32(np.ascontiguousarray(numbers, "<i8").tobytes(), check)
    return check


def check_codable(model: Model) -> int:
    """Return the maximal number of levels of a dimension.

    Raises:
        ValueError: the model has no lossless code.
    """
    if model.decoder.density:
        raise ValueError(
            "the model has a density, and only discrete data have a lossless code: train on"
            " integers, with --levels K for the values 0..K-1, or declare the precision of a"
            " table's columns with --schema"
        )
    if model.conditioned_on:
        raise ValueError(
            f"the model is conditional on {model.conditioned_on}, which a compressed file does"
            " not contain; train one without --condition"
        )
    return _levels(model.process)


def _levels(process: ForwardProcess) -> int:
    counts = [factor.codes for factor in process.factors]
    if not all(counts):
        raise ValueError(
            "the model has columns of numbers with too many different values to be levels, which"
            " have no lossless code here; declare a coarser precision of them with --schema"
        )
    return max(counts)


def _table(model: Model, levels: int) -> SymbolModel:
    """Return a distribution of one example without context.

    It is the prediction of the model from pure noise, or uniform if that is not over levels.
    """
    if not model.decoder.at_any_time:
        return Symbols(np.full((1, *model.shape, levels), -math.log(levels)))
    t = torch.ones(1, dtype=torch.float64, device=model.device)
    z = model.process.blank(model.shape).to(model.device)[None]
    return law(model.likelihood(z, t), torch.ones(model.shape, device=model.device))


class _Remembered(Schedule):
    """A schedule that caches its values, because the same few times are requested again and
    again."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule, self.start, self.steps = schedule, schedule.start, schedule.steps
        self.known: dict[float, Tensor] = {}

    def forward(self, t: Tensor) -> Tensor:
        if t.numel() != 1 and t.stride() != (0,):
            return self.schedule(t)
        first = t.flatten()[:1]
        key = first.item()
        if key not in self.known:
            self.known[key] = self.schedule(first)[0]
        return self.known[key].expand(t.shape)


def _remember(model: Model) -> None:
    for process in {model.process, *model.process.factors}:
        process.schedule = _Remembered(process.schedule)


@contextmanager
def _fixed(model: Model) -> Iterator[None]:
    """Set the network to evaluation, and choose deterministic algorithms and fixed batches."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        with measuring(model), fixed_rows():
            yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
