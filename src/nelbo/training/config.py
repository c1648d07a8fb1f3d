"""The configuration of training: names and sizes, as a run stores them."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from nelbo.models.config import Section, _at_least

Objective = Literal["bound", "simple", "min-snr", "p2"]
Times = Literal["stratified", "importance", "iid"]
Optimizer = Literal["adamw", "muon"]
Precision = Literal["float32", "bf16"]
Nonfinite = Literal["stop", "skip"]


@dataclass(frozen=True)
class TrainConfig(Section):
    """Names and sizes of a training; with a `grid` of times, the bound on that grid is trained."""

    steps: int = 1800
    batch: int = 128
    lr: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 5.0
    ema: float = 0.999
    optimizer: Optimizer = "adamw"
    objective: Objective = "bound"
    times: Times = "importance"
    cross_entropy: float = 0.1
    augment: float = 0.7
    label_dropout: float = 0.1
    evaluate_every: int = 100
    seed: int = 0
    grid: tuple[float, ...] = ()
    accumulate: int = 1
    precision: Precision = "float32"
    compile: bool = False
    checkpoint_activations: bool = False
    shard: bool = False
    deterministic: bool = False
    nonfinite: Nonfinite = "stop"

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "steps", "batch", "evaluate_every", "accumulate")
        _at_least(self, 0, "warmup", "weight_decay", "cross_entropy", "seed")
        if self.shard and self.compile:
            raise ValueError("shard does not go with compile; leave one of them out")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")
        for name in ("ema", "augment", "label_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1); got {getattr(self, name)}")
        ends = (0.0, *self.grid)
        if self.grid and not (ends[-1] == 1 and all(a < b for a, b in pairwise(ends))):
            raise ValueError(f"grid must increase within (0, 1] and end at 1.0; got {self.grid}")


@dataclass
class Progress:
    """Progress of a training, saved with its state."""

    step: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_step: int = 0
    recent: float = math.nan  # running mean of the bound, nats
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_now: int = 0  # of these, the last ones in a row
