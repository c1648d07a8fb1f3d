"""Convert any denoiser to a `Model`, so that its bound can be measured.

The network, what it predicts, its noise levels in training and the scaling of its data determine
everything else: α_t follows from the β's (equation 2), x̂ from the prediction, the mean of
P(z_{t-1}|z_t) from m_t(z_t, x̂) (equation 6), its variance from the convention of the sampler
(equation 7). The bound is that of **ancestral sampling with that variance**: of the distribution
of x if z_T ~ N(0, I), every step draws from P(z_{t-1}|z_t), and the last from P(x|z_1). A
deterministic sampler with the same network has another distribution, without such a bound.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo._utils.arguments import checked
from nelbo._utils.numerics import LOG_2, digest_of
from nelbo.diffusion import parametrization, reverse
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.decoder import Decoder, Evidence, GaussianDensity
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion, Levels
from nelbo.diffusion.model import Model
from nelbo.diffusion.schedules import Schedule
from nelbo.integrations.adapters import (
    EDM,
    Adapter,
    BestVariance,
    Clipped,
    Factor,
    Flow,
    LastStep,
    OnSteps,
    Score,
    Steps,
    exploding,
    preserving,
)
from nelbo.integrations.noise_levels import (
    Numbers,
    as_table,
    check_levels,
    gamma_of,
    kept_times,
    rising,
    row_of,
)
from nelbo.integrations.probe import ReadingError, probe
from nelbo.integrations.reading_hash import described, output_of

Predicts = str  # a key of HEADS or of parametrization.SPELLINGS, "edm" or "mean"
Variance = Literal["small", "large", "learned-range", "optimal"]
Denoiser = Callable[..., Tensor]

HEADS: dict[str, Callable[[], parametrization.Parametrization] | None] = {
    "noise": parametrization.EpsPrediction,
    "data": parametrization.XPrediction,
    "velocity": parametrization.VPrediction,
    "score": None,  # `Score` takes c(γ),
    "flow": Flow,
    "edm": None,  # `EDM` σ_data,
    "mean": None,  # and `Mean` T
}
STEPS: dict[str, Callable[[], reverse.ReverseKernel]] = {
    "small": reverse.Posterior,
    "large": reverse.Beta,
    "learned-range": reverse.Learned,
    "optimal": reverse.Posterior,  # `BestVariance` on T times; in continuous time all are equal
}
INSIST = (
    "to measure it as given all the same, give check=False, or ,check=no after a folder or a file"
)
NOTED = 1e-3  # bits/dim of the prior term above which a note is issued


class Called(nn.Module):
    """A plain function of latents and times as a network without weights, in float64."""

    def __init__(self, function: Denoiser) -> None:
        super().__init__()
        self.function = function

    @override
    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


class WrappedModel(Model):
    """A network of another library as a model, with the kind of its output.

    Args:
        network: the network of the other library.
        process: the Gaussian diffusion of its training.
        parts: the other parts of a `Model`, in the order of its arguments.
        shape: the shape of one example.
        predicts: the word for the output, as `probe` knows it; "" for one that it cannot check.

    Attributes:
        check: whether a network that fits another reading better by far is refused, or measured
            with a note.
    """

    network: Adapter
    process: GaussianDiffusion
    check: bool = True

    def __init__(
        self,
        network: Adapter,
        process: GaussianDiffusion,
        parts: tuple[parametrization.Parametrization, reverse.ReverseKernel, Decoder],
        shape: tuple[int, ...],
        predicts: str,
    ) -> None:
        super().__init__(network, process, *parts, shape)
        self.predicts = predicts

    @property
    @override
    def settings(self) -> str:  # type: ignore[override]
        """The functions by which its network is read, by their values, for the hash."""
        return described(self)

    @override
    def output_hash(self, batch: Batch) -> str:
        if not self.conditioned_on or batch.condition is None:
            return ""
        found = output_of(self, batch.condition[:1])
        return digest_of(*found) if found else ""

    @override
    def check_reading(self, batch: Batch | None = None) -> list[str]:
        try:
            return probe(self, batch)
        except ReadingError as error:
            if self.check:
                raise ValueError(f"{error}; {INSIST}") from None
            return [f"{error}; it is measured as given all the same, as check=False says"]


@checked
def wrap(
    network: nn.Module | Denoiser,
    shape: tuple[int, ...],
    *,
    predicts: Predicts | parametrization.Parametrization = "noise",
    betas: Numbers | None = None,
    alphas: Numbers | None = None,
    sigmas: Numbers | None = None,
    schedule: Schedule | None = None,
    sigma_data: float | None = None,
    times: Numbers | Callable[[Tensor], Tensor] | None = None,
    factor: Factor | None = None,
    variance: Variance = "small",
    scaling: Levels | Affine | None = None,
    decoder: Decoder | Literal["step", "evidence"] | None = None,
    clip: bool = False,
    keep: Sequence[int] | None = None,
    conditioned_on: str = "",
    check: bool = True,
) -> WrappedModel:
    """Return a model of any network that is called as network(y (B, *shape), time (B,)).

    The network keeps its mode, training or evaluation; `nelbo.evaluate` and `nelbo.sample` use it
    in evaluation mode and put its mode back.

    Args:
        network: module or plain function; returns (B, C, ...), or (B, 2C, ...) with a learned
            variance in the second half. A function is called with float64 latents.
        shape: shape of one example, channels first.
        predicts: kind of the output: ε ("noise"), x ("data"), √α ε - √(1-α) x ("velocity"),
            ∇ log q ("score"), ε - x ("flow"), F(c_in y, log(σ)/4) of Karras et al. 2022 ("edm",
            with `sigma_data`) or the mean of z_{t-1} given z_t ("mean", all T times); other names
            of these, such as "epsilon", "x0" and "v", are understood; or a parametrization of your
            own.
        betas: β_1..β_T of y_t = √(1-β_t) y_{t-1} + √β_t ε.
        alphas: α_1..α_T, the products of 1-β (others' "alphas_cumprod"), decreasing.
        sigmas: σ_1 < ... < σ_T of y_t = x + σ_t ε; or for a flow y_t = (1-σ_t) x + σ_t ε. They
            are sorted, with `times`, if they come in another order, and a sampler's 0 at the end
            is left out.
        schedule: γ(t) instead of these, for a network that takes any time.
        sigma_data: σ_data of "edm": x̂ = c_skip y + c_out F for y = x + σ ε.
        times: time inputs of the network at the T times; by default 0..T-1, or the σ's, or
            log(σ)/4 for "edm". With `schedule`, a function of γ; by default for a flow, its σ.
        factor: c(γ) of their latents y = c z, if it is not implied by betas, alphas, sigmas, a
            flow or "edm".
        variance: variance of P(z_{t-1}|z_t): "small" is β̃_t, "large" β_t, "learned-range"
            between; "optimal", of least KL, once `model.step.fit(model, batch)` has seen examples
            that are not measured.
        scaling: scaling of the data: Levels(256), the default, for 8-bit data as x/127.5 - 1;
            Levels(256, 0, 1) for x/255; Affine(shift, scale) for real data, whose bound is that of
            a density.
        decoder: P(x|z_1). "step", the default on T times, is the last step with the model's own
            variance; "evidence" uses no network.
        clip: clip x̂ to the range of the data, as some samplers do. This is a different model.
        keep: increasing indices in 0..T-1 of the times to keep, for a model of fewer steps,
            counted from the least noise.
        conditioned_on: name of c in a model of P(x|c), such as "class". The examples are then a
            `Batch(x, condition)` with numbers (B, F) as conditions, and the network is called as
            network(y, time, condition); a label is condition[:, 0].long().
        check: refuse a network that fits another reading better by far: at pure noise, which 2 to
            8 rows show here, and at the examples of `nelbo.evaluate`. False leaves the first look
            out, and makes a note of what the second finds.

    Warns:
        UserWarning: signal is left at the last time, with its cost in nats; or the output of a
            flow does not follow the noise there.

    Raises:
        ValueError: parts that do not fit together, or a schedule that is not monotone; an output
            at pure noise that contradicts `predicts` (`probe`).
    """
    gamma: Tensor | Schedule
    if not shape or min(shape) < 1:
        raise ValueError(
            f"shape is that of one example, channels first, such as (3, 32, 32); got {shape}"
        )
    word, head = _read(predicts, sigma_data)
    flow = word == "flow"
    if isinstance(network, type) or not callable(network):
        raise ValueError(
            "network must be a torch.nn.Module, not its class, or a function network(z, t); got"
            f" {network!r}"
        )
    if not isinstance(network, nn.Module):
        network = Called(network)
    table = as_table(times)
    if sigmas is not None:
        sigmas, table = rising(row_of("sigmas", sigmas), table)
    if schedule is None and sigmas is not None and flow:
        check_levels(
            "sigmas", sigmas, (sigmas <= 0) | (sigmas > 1), "of a flow must lie in (0, 1]"
        )
        odds = gamma_of(sigmas=sigmas) / 2
        gamma = 2 * (odds - torch.log1p(-sigmas))
    elif schedule is None:
        gamma = gamma_of(betas=betas, alphas=alphas, sigmas=sigmas)
    elif betas is alphas is sigmas is None:
        gamma = schedule
    else:
        raise ValueError("give the noise levels as a schedule or as a table of them, not as both")
    if table is None and word == "edm":
        table = gamma / 8 if isinstance(gamma, Tensor) else (lambda gamma: gamma / 8)
    if table is None:
        table = sigmas if schedule is None or not flow else (lambda gamma: (gamma / 2).sigmoid())
    own = None if head is None else head.factor
    model = assemble(
        network,
        shape,
        predicts=head if word == "edm" and head is not None else predicts,
        gamma=gamma,
        times=table,
        factor=factor or own or (preserving if sigmas is None else exploding),
        variance=variance,
        scaling=scaling or Levels(256),
        decoder=decoder,
        clip=clip,
        keep=keep,
    )
    model.conditioned_on, model.check = conditioned_on, check
    for note in (*(model.check_reading() if check else ()), *signal_left(model)):
        warnings.warn(note, stacklevel=3)  # beyond `checked`
    return model


def assemble(
    network: nn.Module,
    shape: tuple[int, ...],
    *,
    predicts: Predicts | parametrization.Parametrization,
    gamma: Tensor | Schedule,
    times: Tensor | Callable[[Tensor], Tensor] | None,
    factor: Factor = preserving,
    variance: Variance = "small",
    scaling: Levels | Affine,
    decoder: Decoder | Literal["step", "evidence"] | None = None,
    clip: bool = False,
    keep: Sequence[int] | None = None,
) -> WrappedModel:
    """Do the same as `wrap` from γ_1..γ_T, or γ(t), and without its warning."""
    if variance not in STEPS:
        raise ValueError(f"variance must be one of {', '.join(STEPS)}; got {variance!r}")
    word, head = _read(predicts)
    if word == "score":
        head = Score(factor)
    elif head is None:
        head = parametrization.Mean(_steps_of_mean(gamma, factor, keep))
    known = head.predicts
    head = _head(head, variance, scaling if clip else None)
    if isinstance(gamma, Tensor):
        table = torch.arange(len(gamma)) if times is None else times
        if not isinstance(table, Tensor) or table.shape != gamma.shape:
            got = tuple(table.shape) if isinstance(table, Tensor) else "a function"
            raise ValueError(f"times must be {len(gamma)} numbers, one per noise level; got {got}")
        kept = kept_times(keep, len(gamma))
        gamma, table = gamma[kept], table[kept]
        if gamma[-1] == torch.inf and word in ("noise", "score"):
            raise ValueError(
                f"a network that predicts {word} says nothing about the data where no signal is"
                " left, and the schedule ends there (α_T = 0); leave that time out with keep=..."
            )
        process: GaussianDiffusion = OnSteps(Steps(gamma), scaling)
        adapter = Adapter(network, shape, head.outputs, table, gamma, factor)
        steps = len(gamma)
    else:
        if times is None or isinstance(times, Tensor) or keep is not None:
            raise ValueError("a schedule γ(t) needs times=, a function of γ, and no keep")
        process = GaussianDiffusion(gamma, scaling)
        adapter = Adapter(network, shape, head.outputs, times, None, factor)
        steps = 0
    best = BestVariance(steps) if variance == "optimal" and steps else None
    last = _decoder(decoder, process.schedule, scaling, steps, best)
    return WrappedModel(adapter, process, (head, best or STEPS[variance](), last), shape, known)


def signal_left(model: Model) -> list[str]:
    """Return a note if KL( q(z_T|x) ‖ N(0, I) ) is not negligible, with its cost.

    For levels the cost is an upper bound; for real data, which have no largest value, it is a
    function of their mean square.
    """
    last = torch.ones((), dtype=torch.float64)
    alpha = model.process.alpha(last).item()
    levels = model.process.codes
    ends = torch.tensor([0, levels - 1])
    square = model.process.embed(ends).square().max().item() if levels else 1.0
    nats = model.dims / 2 * (alpha * (square - 1) - math.log1p(-alpha))
    if nats < NOTED * model.dims * LOG_2:
        return []
    each = f"{model.dims / 2 * alpha:.3g} (E[e²] - 1)"
    cost = (
        f"costs up to {nats:.3g} nats per example"
        if levels
        else f"costs {nats:.3g} + {each} nats per example, where E[e²] is the mean square of the"
        " data as the model sees them, (x - shift)/scale"
    )
    return [
        f"the schedule ends with signal left (α_T = {alpha:.2g}): sampling starts from noise that"
        f" has none, and the prior term {cost}"
    ]


def _read(
    predicts: Predicts | parametrization.Parametrization, sigma_data: float | None = None
) -> tuple[str, parametrization.Parametrization | None]:
    """Return our word for an output and its parametrization, None if that takes other parts too.

    >>> _read("epsilon")
    ('noise', EpsPrediction())
    """
    word = parametrization.spelled(predicts) if isinstance(predicts, str) else ""
    if (word == "edm") != (sigma_data is not None) or not (
        sigma_data is None or 0 < sigma_data < math.inf
    ):
        raise ValueError(
            'predicts="edm" and sigma_data, a positive number such as 0.5, go together; got'
            f" predicts={predicts!r} and sigma_data={sigma_data}"
        )
    if sigma_data is not None:
        return word, EDM(sigma_data)
    if not isinstance(predicts, str):
        return predicts.predicts, predicts
    if word not in HEADS:
        raise ValueError(f"predicts must be one of {', '.join(HEADS)}; got {predicts!r}")
    make = HEADS[word]
    return word, None if make is None else make()


def _steps_of_mean(gamma: Tensor | Schedule, factor: Factor, keep: Sequence[int] | None) -> int:
    """Return T for a network that gives the mean of z_{t-1}."""
    if not isinstance(gamma, Tensor) or keep is not None or factor is not preserving:
        raise ValueError(
            'predicts="mean" is the mean of one step of T, of latents that preserve the variance:'
            " give betas or alphas, and no keep or factor"
        )
    return len(gamma)


def _head(
    head: parametrization.Parametrization, variance: Variance, clip: Levels | Affine | None
) -> parametrization.Parametrization:
    if variance == "learned-range":
        head = parametrization.WithVariance(head)
    if clip is None:
        return head
    if not clip.count:
        raise ValueError("clip=True needs data with a range, levels; real data have none")
    return Clipped(head, clip.low, clip.high)


def _decoder(
    decoder: Decoder | Literal["step", "evidence"] | None,
    schedule: Schedule,
    scaling: Levels | Affine,
    steps: int,
    best: BestVariance | None,
) -> Decoder:
    if not (decoder is None or isinstance(decoder, str)):
        return decoder
    name = decoder or ("step" if steps else "evidence")
    if name == "step":
        if steps < 2:
            raise ValueError(
                'decoder="step" takes its variance from the second of at least 2 times; try'
                ' decoder="evidence"'
            )
        return LastStep(scaling, best)
    if name != "evidence":
        raise ValueError(f"decoder must be step, evidence or a Decoder; got {name!r}")
    if isinstance(scaling, Levels):  # each decoder is of one scaling: the user's choice decides
        return Evidence(scaling)
    first = torch.full((), schedule.start, dtype=torch.float64)
    return GaussianDensity(scaling, math.exp(schedule(first).item() / 2))
