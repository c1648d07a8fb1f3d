"""Settings of a code."""

from dataclasses import dataclass

import torch

from nelbo.codec.coding.blocks import BATCH
from nelbo.diffusion.times import TimeGrid

PRECISIONS = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """Settings that coder and decoder must share beside the model.

    Args:
        grid: times of the bound that is coded, as `TimeGrid` takes them.
        precision: precision of the network, "float64" or "float32"; the latter decodes on the same
            machine and versions only.
        effort: K, 1 to 255: a search keeps the K shortest stacks and continues each in 4 ways
            (`search`), 1 for no search; for an absorbing model, K orders of the symbols of a
            block.
        batch: examples per network call, at most; a power of two up to 256.

    Raises:
        ValueError: invalid values.
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
        TimeGrid(self.grid)
