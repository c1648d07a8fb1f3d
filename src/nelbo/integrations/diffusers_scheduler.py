"""Schedulers of diffusers: flags without a bound, the steps that are taken, and the model that
one makes of a network."""

import math
from collections.abc import Callable, Sequence
from shlex import quote
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nelbo.diffusion.gaussian import Affine, Levels
from nelbo.diffusion.schedules import Linear, Schedule
from nelbo.diffusion.times import ContinuousTime, TimeDiscretization, TimeGrid
from nelbo.integrations.adapters import EDM, Flow, interpolating
from nelbo.integrations.configs import Config, positive
from nelbo.integrations.denoisers import Predicts, Variance, WrappedModel, assemble
from nelbo.integrations.noise_levels import gamma_of

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


class Whole(NamedTuple):
    """A network with what it was trained with."""

    network: nn.Module
    scheduler: Scheduler
    shape: tuple[int, ...]
    scaling: Levels | Affine


Found = tuple[WrappedModel, TimeDiscretization, str]


def steps_of(scheduler: Scheduler, gamma: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return γ and the network's times at the steps that a scheduler takes, from the least noise.

    Args:
        scheduler: one that takes some of the T times; or σ's, at times of its own.
        gamma: γ_1..γ_T.
        steps: their number; all T are the steps of the training if the scheduler takes others.

    Raises:
        ValueError: the times are repeated, outside of those of the training, or more than steps.
    """
    total = len(gamma)
    if not 1 <= steps <= total:
        raise ValueError(f"the model has {total} steps, and {steps} were asked for; try {total}")
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:  # PNDM with fewer than 4 steps
        why = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"a {type(scheduler).__name__} cannot take {steps} steps ({why}); give another number,"
            f" or none for all {total}"
        ) from error
    times = scheduler.timesteps.double().flip(0)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        times = times.unique()  # which sorts; PNDM takes one of them twice
        rising = times
    else:
        sigmas = rising = sigmas[:-1].double().flip(0)
        if sigmas.shape == times.shape:  # a solver of second order takes each twice
            sigmas, times = torch.stack([sigmas, times]).unique_consecutive(dim=1)
            rising = sigmas
    inside = times[0] >= 0 and times[-1] <= total - 1
    if len(times) != steps or not inside or len(rising) != steps or (rising.diff() <= 0).any():
        if steps == total:  # all steps of the training, which the scheduler never takes
            return gamma, torch.arange(total)
        if len(times) > steps:
            raise ValueError(
                f"for {steps} steps a {type(scheduler).__name__} calls the network at {len(times)}"
                " times, as a method of higher order, and ancestral sampling has one call for each"
                " step; give a scheduler of first order with the same settings, such as"
                " EulerDiscreteScheduler or DDPMScheduler"
            )
        hint = ", or set steps_offset to 0" if scheduler.config.get("steps_offset") else ""
        raise ValueError(
            f"for {steps} steps the scheduler takes {len(times)} times from {times[0]:g} to"
            f" {times[-1]:g}, some of them outside of 0..{total - 1} or repeated; give another"
            f" number of steps, or none for all {total}{hint}"
        )
    whole = times.long()
    if (times == whole).all():
        table = gamma[whole]
        if sigmas is None or torch.allclose(sigmas, (table / 2).exp(), rtol=1e-3):
            return table, whole  # the same noise levels, in float64
    if sigmas is None:
        raise ValueError(f"the scheduler takes times that are not integers, such as {times[0]:g}")
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
    if "beta_schedule" in config and "prediction_type" not in config:
        raise ValueError(
            f"a {config.get('_class_name', 'scheduler')} does not say what the network predicts"
            " (prediction_type); give the scheduler of the training, such as DDPMScheduler"
        )
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


def discrete(
    whole: Whole,
    steps: int | None,
    clip: bool,
    kind: str,
    keep: Sequence[int] | None,
    variance: Variance,
) -> Found:
    """Return the model of a network trained at T times, with β's."""
    network, scheduler, shape, scaling = whole
    config = scheduler.config
    gamma = gamma_of(betas=scheduler.betas)
    alphas = (-gamma).sigmoid()[:-1]  # at the last time, some classes have 2^-24 in place of 0
    if not torch.allclose(scheduler.alphas_cumprod[:-1].double(), alphas, rtol=1e-3):
        raise ValueError(
            f"the {kind} changes its α's after making them of its β's; wrap the network with"
            " nelbo.integrations.wrap(network, alphas=scheduler.alphas_cumprod)"
        )
    total, stated = len(gamma), positive(config, "num_train_timesteps")
    if total != stated:
        raise ValueError(
            f"the scheduler has {total} betas and num_train_timesteps={stated}; write the number"
            " of times of the training, and as many trained_betas"
        )
    times: Tensor = torch.arange(total)
    if steps is not None:
        gamma, times = steps_of(scheduler, gamma, steps)
    count = len(gamma if keep is None else keep)
    model = assemble(
        network,
        shape,
        predicts=PREDICTS[str(config["prediction_type"])],
        gamma=gamma,
        times=times,
        variance=variance,
        scaling=scaling,
        clip=clip,
        keep=keep,
        decoder="step" if count > 1 else "evidence",
    )
    how = f"in {count} of {total} steps, variance {variance}"
    return model, TimeGrid.uniform(count), how


def edm(whole: Whole, steps: int | None, clip: bool) -> Found:
    """Return the model for any σ; F of Karras et al. 2022, with time input log(σ)/4 = γ/8."""
    network, scheduler, shape, scaling = whole
    config = scheduler.config
    for name in ("sigma_data", "sigma_min", "sigma_max"):
        value = config[name]
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"the scheduler's {name} must be a positive number; got {value!r}")
    signs = {"epsilon": 1.0, "v_prediction": -1.0}
    predicts = config["prediction_type"]
    if predicts not in signs:
        raise ValueError(
            f"prediction_type of an EDM scheduler must be one of {', '.join(signs)}, which say how"
            f" F is scaled; got {predicts!r}"
        )
    head = EDM(config["sigma_data"], signs[predicts])
    if steps is None:
        low, high = (2 * math.log(config[name]) for name in ("sigma_min", "sigma_max"))
        gamma: Tensor | Schedule = Linear(low, high)
    else:
        scheduler.set_timesteps(at_least_one(steps))
        gamma = gamma_of(sigmas=scheduler.sigmas[:-1].flip(0))
    model = assemble(
        network,
        shape,
        predicts=head,
        gamma=gamma,
        times=_named(gamma, lambda gamma: gamma / 8),
        factor=head.factor,
        scaling=scaling,
        clip=clip,
        decoder="evidence",
    )
    return model, *_times(steps)


def flow(whole: Whole, steps: int | None, clip: bool) -> Found:
    """Return the model for any τ, with time input T τ."""
    network, scheduler, shape, scaling = whole
    total = positive(scheduler.config, "num_train_timesteps")
    if steps is None:
        # τ runs from 0 to 1, where γ is infinite; cutting the ends off costs little, and the bound
        # includes that cost
        gamma: Tensor | Schedule = Linear(-2 * math.log(total - 1), 2 * math.log(total - 1))
    else:
        scheduler.set_timesteps(at_least_one(steps))
        # a solver of second order takes each twice
        tau = scheduler.sigmas[:-1].flip(0).double().unique_consecutive()
        if not tau.isfinite().all():
            raise ValueError(
                f"the scheduler's times for steps={steps} are no numbers; give more steps"
            )
        if len(tau) != steps:
            raise ValueError(f"the scheduler takes {len(tau)} times where {steps} were asked for")
        gamma = 2 * (tau.log() - torch.log1p(-tau))
    model = assemble(
        network,
        shape,
        predicts=Flow(),
        gamma=gamma,
        times=_named(gamma, lambda gamma: (gamma / 2).sigmoid() * total),
        factor=interpolating,
        scaling=scaling,
        clip=clip,
        decoder="evidence",
    )
    return model, *_times(steps)


def _named(
    gamma: Tensor | Schedule, name: Callable[[Tensor], Tensor]
) -> Tensor | Callable[[Tensor], Tensor]:
    """Return the time inputs for a table of γ; in continuous time, the function itself."""
    return name(gamma) if isinstance(gamma, Tensor) else name


def _times(steps: int | None) -> tuple[TimeDiscretization, str]:
    if steps is None:
        return ContinuousTime(), "in continuous time"
    return TimeGrid.uniform(steps), f"in {steps} steps, variance small"
