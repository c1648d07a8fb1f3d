"""Number of training steps that fit into a time."""

import math
import time
from collections.abc import Callable

from nelbo.data.schema import Dataset
from nelbo.models import custom
from nelbo.models.config import ModelConfig
from nelbo.training.config import TrainConfig
from nelbo.training.trainer import Trainer

VALIDATIONS = 5  # number of validations of a training that is given minutes


def pace(
    model: ModelConfig,
    train: TrainConfig,
    dataset: Dataset,
    seconds: float,
    device: str = "auto",
    clock: Callable[[], float] = time.monotonic,
    network: custom.Network | None = None,
) -> int:
    """Return how many steps fit into `seconds` with `VALIDATIONS` validations, from timing a few.

    The learning rate falls to zero at the last step, so the number of steps must be known before
    the first. It is stored in the run, which is then as reproducible as any other.

    Raises:
        ValueError: the time is too short for any training.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"minutes must be positive; got {seconds / 60:g}")
    learner = Trainer(model, train, dataset, device, network=network)
    learner.step()  # the first step includes one-time setup
    begun = clock()
    learner.measure()
    measured, steps = clock(), 0
    while steps < 3 or clock() - measured < 0.01 * seconds:
        learner.step()
        steps += 1
    left = seconds - VALIDATIONS * (measured - begun) - (clock() - begun)
    within = int(left * steps / (clock() - measured))
    if within < VALIDATIONS:
        raise ValueError(
            f"{seconds / 60:g} minutes are too few: a step takes"
            f" {(clock() - measured) / steps:.2g} seconds, and {VALIDATIONS} validations"
            f" {VALIDATIONS * (measured - begun):.2g}; give more, or --steps"
        )
    return within
