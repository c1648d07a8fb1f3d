"""The configuration of training: names and sizes, as a run stores them."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from nelbo._utils.validation import Record
from nelbo.models.config import Count, Fraction

Objective = Literal["bound", "simple", "min-snr", "p2"]
Times = Literal["stratified", "importance", "iid"]
Optimizer = Literal["adamw", "muon"]
Precision = Literal["float32", "bf16"]
Nonfinite = Literal["stop", "skip"]


@dataclass(frozen=True)
class TrainConfig(Record):
    """Names and sizes of a training; with a `grid` of times, the bound on that grid is trained.

    Args:
        steps: Training steps.
        batch: Examples per step.
        lr: Peak learning rate.
        warmup: Steps until the peak.
        weight_decay: Decoupled weight decay of the network's matrices.
        clip: Maximal norm of the gradient.
        ema: Decay of the moving average of the weights.
        optimizer: adamw; or muon, which orthogonalises the updates of hidden matrices: large
            images and text need fewer steps.
        objective: The bound, or a re-weighting of its diffusion term.
        times: Times of the training steps: stratified over the batch; importance, more often where
            the loss is large, learned while training; or iid. The mean loss is the same with each.
        cross_entropy: Weight of the decoder's loss at the drawn times.
        augment: Fraction of the images that are transformed in training; the transform is an input
            of the network.
        label_dropout: Fraction of the examples whose labels are dropped, so that the network also
            learns P(x), which sample --guidance needs.
        evaluate_every: Steps between validations; each saves the run.
        patience: Validations in a row without a better bound after which training ends; 0 for
            never. By default 10 for tables and 0 for all else.
        seed: Seed of everything random.
        grid: Times of the bound that is trained, increasing to 1; none for continuous time.
        accumulate: Number of parts into which each process divides its examples of a batch, one
            after the other: less memory, and the same loss.
        precision: Precision of the network in training, bf16 by autocast; weights, bound and
            validation stay in full precision.
        compile: Compile the network: quicker steps on a GPU, after some minutes.
        checkpoint_activations: Store only the input of each block and compute the rest again for
            the gradient: less memory, and the same gradient.
        shard: Divide weights, gradients, moments and averages among the processes, for a network
            larger than one device (docs/scale.md).
        deterministic: Use only algorithms that give the same bits each time, also on a GPU.
        nonfinite: Handling of a step whose loss or gradient is not finite: stop, with the best
            weights kept; or skip it, at most 9 times in a row.
    """

    steps: Count = 1800
    batch: Count = 128
    lr: Annotated[float, Gt(0)] = 2e-3
    warmup: Annotated[int, Ge(0)] = 100
    weight_decay: Annotated[float, Ge(0)] = 0.1
    clip: Annotated[float, Gt(0)] = 5.0
    ema: Fraction = 0.999
    optimizer: Optimizer = "adamw"
    objective: Objective = "bound"
    times: Times = "importance"
    cross_entropy: Annotated[float, Ge(0)] = 0.1
    augment: Fraction = 0.7
    label_dropout: Fraction = 0.1
    evaluate_every: Count = 100
    patience: Annotated[int, Ge(0)] = 0
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    grid: tuple[float, ...] = ()
    accumulate: Count = 1
    precision: Precision = "float32"
    compile: bool = False
    checkpoint_activations: bool = False
    shard: bool = False
    deterministic: bool = False
    nonfinite: Nonfinite = "stop"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard and self.compile:
            raise ValueError("shard does not go with compile; leave one of them out")
        ends = (0.0, *self.grid)
        if self.grid and not (ends[-1] == 1 and all(a < b for a, b in pairwise(ends))):
            raise ValueError(f"grid must increase within (0, 1] and end at 1.0; got {self.grid}")


@dataclass
class Progress:
    """Progress of a training, saved with its state."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    step: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_step: int = 0
    unimproved: int = 0  # measurements since the best one
    recent: float = math.nan  # running mean of the bound, nats
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_now: int = 0  # of these, the last ones in a row
