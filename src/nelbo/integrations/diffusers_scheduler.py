"""Flags of a diffusers scheduler that have no bound, and the steps that it takes."""

from shlex import quote
from typing import Any, Protocol

import torch
from torch import Tensor

from nelbo.integrations.denoisers import Predicts, Variance
from nelbo.integrations.diffusers_folder import Config

PREDICTS: dict[str, Predicts] = {"epsilon": "noise", "sample": "data", "v_prediction": "velocity"}
VARIANCES: dict[str, Variance] = {
    "fixed_small": "small",
    "fixed_small_log": "small",
    "fixed_large": "large",
    "fixed_large_log": "large",
    "learned_range": "learned-range",
}


class Scheduler(Protocol):
    """The part of a scheduler that is used here."""

    config: Any
    timesteps: Tensor
    sigmas: Tensor
    betas: Tensor
    alphas_cumprod: Tensor

    def set_timesteps(self, num_inference_steps: int) -> None:
        """Set `timesteps` and `sigmas` for a number of steps."""


def steps_of(scheduler: Scheduler, gamma: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return γ and the network's times at the steps that a scheduler takes, from the least noise.

    Args:
        scheduler: one that takes some of the T times; or σ's, at times of its own.
        gamma: γ_1..γ_T.
        steps: their number.
    """
    total = len(gamma)
    if not 1 <= steps <= total:
        raise ValueError(f"the model has {total} steps, and {steps} were asked for; try {total}")
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.double().flip(0)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        times = times.sort().values
        rising = times
    else:
        sigmas = rising = sigmas[:-1].double().flip(0)
        if sigmas.shape == times.shape:  # a solver of second order takes each twice
            sigmas, times = torch.stack([sigmas, times]).unique_consecutive(dim=1)
            rising = sigmas
    inside = times[0] >= 0 and times[-1] <= total - 1
    if len(times) != steps or not inside or len(rising) != steps or (rising.diff() <= 0).any():
        raise ValueError(
            f"for {steps} steps the scheduler takes {len(times)} times from {times[0]:g} to"
            f" {times[-1]:g}: some are not among 0 to {total - 1}, where the network was trained,"
            " or occur twice; give another number of steps, leave it out for all, or set"
            " steps_offset to 0"
        )
    whole = times.long()
    if (times == whole).all():
        table = gamma[whole]
        if sigmas is None or torch.allclose(sigmas, (table / 2).exp(), rtol=1e-3):
            return table, whole  # the same noise levels, in float64
    if sigmas is None:
        raise ValueError(f"the scheduler takes times that are not whole, such as {times[0]:g}")
    return 2 * sigmas.log(), times


def check_scheduler(config: Config, clip: bool | None, name: str) -> None:
    """Raise ValueError for flags that imply another model, or one without a bound."""
    if config.get("clip_sample") and clip is None:
        ways = [
            f"`nelbo evaluate {quote(f'{name},clip={way}')} --data X`" for way in ("yes", "no")
        ]
        as_sampled, as_trained = ways if ":" in name else ("clip=True", "clip=False")
        raise ValueError(
            "the scheduler has clip_sample, and clipping x̂ makes a different model; choose which"
            f" to measure: {as_sampled} as it samples, or {as_trained} as it was trained"
        )
    if clip and config.get("clip_sample_range", 1.0) != 1.0:
        raise ValueError(
            f"clip_sample_range must be the data's range, 1; got {config['clip_sample_range']};"
            " measure with clip=False"
        )
    for name, wrong, why in (
        ("thresholding", True, "it rescales x̂ by its own quantiles: set it to false"),
        (
            "use_dynamic_shifting",
            True,
            "the times depend on the image: set it to false, and shift",
        ),
        ("invert_sigmas", True, "time runs backwards: set it to false"),
        ("timestep_type", "continuous", "use EDMEulerScheduler if the time input is log(σ)/4"),
        ("use_flow_sigmas", True, "use FlowMatchEulerDiscreteScheduler"),
    ):
        if config.get(name) == wrong:
            raise ValueError(f"the scheduler has {name}={wrong}, which has no bound: {why}")
    for name, known in (("prediction_type", PREDICTS), ("variance_type", VARIANCES)):
        value = config.get(name)
        null = value is None and (name == "variance_type" or name not in config)
        if value not in known and not null:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def at_least_one(steps: int) -> int:
    """Return a number of steps, if it is positive."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    return steps


def positive(config: Config, name: str) -> int:
    """Return a number of a config, if it is a positive integer."""
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}")
    return value
