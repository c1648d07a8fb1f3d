"""Models saved with diffusers: a folder, or a network and a scheduler in memory.

A folder holds `unet` or `transformer` (config.json, safetensors) and `scheduler`
(scheduler_config.json), or all in one place. The scheduler determines the training of the network:

    with betas       DDPM, DDIM, Euler, DPM-Solver, ..: T times with time inputs 0..T-1;
                     prediction_type epsilon, sample or v_prediction
    EDM..            any σ in [sigma_min, sigma_max], time input log(σ)/4; preconditioned
    FlowMatch..      any τ in (0, 1), time input 1000 τ; the network predicts ε - x

Only diffusers' own classes are created and only safetensors are read, so no code in a folder is
run. The values of DDPM's variance_type with a bound are fixed_small(_log), fixed_large(_log) and
learned_range; a scheduler without one, or without noise, is measured with the smaller variance,
β̃.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo.data.schema import Schema
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model
from nelbo.diffusion.process import Affine, Levels
from nelbo.diffusion.schedules import Linear, Schedule
from nelbo.diffusion.times import ContinuousTime, TimeDiscretization, TimeGrid
from nelbo.integrations.adapters import EDM, BestVariance, Flow, interpolating
from nelbo.integrations.conditions import Condition, Conditioned, Given
from nelbo.integrations.denoisers import Variance, assemble, gamma_of, signal_left
from nelbo.integrations.diffusers_folder import (
    AUTOENCODER,
    Config,
    autoencoder_of,
    check_keys,
    described,
    home_of,
    made,
    network_of,
)
from nelbo.integrations.diffusers_scheduler import (
    PREDICTS,
    VARIANCES,
    Scheduler,
    at_least_one,
    check_scheduler,
    positive,
    steps_of,
)
from nelbo.integrations.external import Foreign, check_label, check_labels, read_json, scaled
from nelbo.integrations.latents import VARIATIONAL, refusal, scaling_of, through
from nelbo.integrations.probe import probe

#: keywords of the networks' classes and prompts
LABELS, PROMPTS, POOLED = "class_labels", "encoder_hidden_states", "pooled_projections"


def load(
    path: str | Path,
    *,
    steps: int | None = None,
    clip: bool | None = None,
    label: int | None = None,
    scaling: Levels | None = None,
    keep: Sequence[int] | None = None,
    variance: Variance | None = None,
    weights: str | None = None,
    condition: Condition | None = None,
    law: str | None = None,
    levels: int | None = None,
) -> Foreign:
    """Load the model in a folder; arguments and errors as for `build`.

    Args:
        path: of the folder.
        steps: as for `build`, and so are the next.
        clip: as said.
        label: as said.
        scaling: as said.
        keep: as said.
        variance: as said.
        weights: a variant of the weights, such as fp16, or a folder of others, such as unet_ema.
        condition: as for `build`.
        law: as for `build`.
        levels: number of levels of the images, which span the scaling; by default 256.

    Raises:
        FileNotFoundError: there is no such folder, or a part is missing.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}; save a pipeline there, or its parts")
    if levels is not None:
        low, high = (-1.0, 1.0) if scaling is None else (scaling.low, scaling.high)
        scaling = Levels(levels, low, high)
    vae = _autoencoder(path)
    home, variant, notes = home_of(path, weights)
    network, kind, said = network_of(home, variant)
    settings = path / "scheduler" / "scheduler_config.json"
    settings = settings if settings.is_file() else path / "scheduler_config.json"
    config = read_json(settings, infinite=True)  # DPM-Solver's has infinite values
    if not str(config.get("_class_name")).endswith("Scheduler"):
        raise ValueError(f"{settings} names no scheduler; its _class_name says which it is")
    scheduler = made(config, settings)
    name = f"diffusers:{path}"
    kind = kind if weights is None else f"{kind}, {weights}"
    options: dict[str, object] = {"clip": clip, "label": label, "scaling": scaling, "keep": keep}
    options |= {"variance": variance, "weights": kind, "condition": condition}
    options |= {"vae": vae, "law": law}
    found = build(network, scheduler, name, steps=steps, **options)  # type: ignore[arg-type]
    return replace(found, notes=(*found.notes, *notes, *said))


def build(
    network: nn.Module,
    scheduler: Scheduler,
    name: str = "diffusers",
    *,
    steps: int | None = None,
    clip: bool | None = None,
    label: int | None = None,
    scaling: Levels | Affine | None = None,
    keep: Sequence[int] | None = None,
    variance: Variance | None = None,
    weights: str = "as given",
    condition: Condition | None = None,
    vae: nn.Module | None = None,
    law: str | None = None,
) -> Foreign:
    """Return the model of a network and the scheduler it was trained with.

    Args:
        network: a UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel or
            SD3Transformer2DModel.
        scheduler: with its config; it is not changed.
        name: name of the result, for messages.
        steps: number of steps of the model, at the times that the scheduler takes; by default all
            that it was trained at, or continuous time.
        clip: whether x̂ is clipped; required if the scheduler's config has clip_sample.
        label: the class, for a class-conditional model.
        scaling: scaling of the data; by default that of 8-bit images in [-1, 1].
        keep: the times of the training to keep, from 0, in place of `steps`.
        variance: of each step, "small", "large" or "optimal", which is fitted to examples that are
            not measured; by default that of the scheduler.
        weights: name of the weights, for the record.
        condition: of the examples to be measured, in their order, for the bound on P(x|c): their
            classes, or embeddings of prompts (N, L, E); or such by the network's own keywords.
        vae: the autoencoder whose latents the network models, an AutoencoderKL, for the bound on
            images.
        law: of their pixels, "gaussian", "logistic" or "laplace", with ":channels" for a scale of
            each channel, or a scale such as ":0.05"; by default the best, fitted to images that
            are not measured.

    Raises:
        ValueError: a scheduler or network without a bound; the message says why.
    """
    scheduler, scaling = copy.deepcopy(scheduler), scaling or Levels(256)
    config: Config = dict(scheduler.config)
    about = dict(network.config)  # type: ignore[arg-type]
    if vae is not None:
        if not isinstance(scaling, Levels):
            raise ValueError("the scaling of a model of images by their latents is of levels")
        pixels, scaling = scaling, scaling_of(vae, about)
    elif law is not None:
        raise ValueError("a law of pixels is for a model of the latents of an autoencoder")
    kind = str(config.get("_class_name", type(scheduler).__name__))
    if clip not in (None, True, False):
        raise ValueError(f"clip must be True, False or None; got {clip!r}")
    check_scheduler(config, clip, name)
    check_keys(config, type(scheduler), "the scheduler's config")
    shape, wide = shape_of(about), about.get("out_channels") == 2 * positive(about, "in_channels")
    asked = variance is not None
    variance = variance or VARIANCES[str(config.get("variance_type") or "fixed_small")]
    learned = variance == "learned-range"
    given = _condition(network, about, condition, label)
    drop = wide and not learned
    plain = Plain(network, label, shape[0] if drop else None)
    called = plain if given is None else Conditioned(plain, given)
    whole: Whole = called, scheduler, shape, scaling
    if asked and "beta_schedule" not in config:
        raise ValueError("variance chooses among those of a training with β's")
    if keep is not None and (steps is not None or "beta_schedule" not in config):
        raise ValueError("keep chooses among the times of a training with β's, and without steps")
    with described(f"the scheduler {kind} does not say what one of its kind does"):
        if kind.startswith("EDM"):
            model, times, how = _edm(whole, steps, bool(clip))
        elif kind.startswith("FlowMatch"):
            model, times, how = _flow(whole, steps, bool(clip))
        elif "beta_schedule" in config:
            model, times, how = _discrete(whole, steps, bool(clip), kind, keep, variance)
        else:
            raise ValueError(
                f"the scheduler {kind} has no betas and is not EDM or flow matching; wrap the"
                " network with nelbo.integrations.wrap"
            )
    how = f"ancestral sampling {how}, x̂ {'' if clip else 'not '}clipped"
    if given is not None:
        model.conditioned_on = given.word
    notes = [how, scaled(scaling), *signal_left(model), *probe(model)]
    if drop:
        notes.append("the network also gives a variance, which is not used")
    levels = scaling.count or None
    schema = Schema("real" if levels is None else "levels", shape, levels)
    fit = partial(_fit_variance, model) if isinstance(model.step, BestVariance) else None
    found = Foreign(name, model, schema, times, weights, tuple(notes), given, fit)
    return found if vae is None else through(found, vae, pixels, law)


def _fit_variance(model: Model, batch: Batch) -> str:
    assert isinstance(model.step, BestVariance)
    model.step.fit(model, batch)
    last = model.step.errors[0].sqrt().item()
    return f"the variance of each step is the best one ({last:.3g}² in the last, P(x|z_1))"


def _autoencoder(path: Path) -> nn.Module | None:
    """Return the autoencoder of a folder whose network models latents, None if there is none."""
    named = autoencoder_of(path)
    if named is None:
        return None
    begin = f"{path} models the latents of an autoencoder ({named})"
    kinds = {
        home: str(read_json(home / "config.json").get("_class_name"))
        for home in sorted(path.iterdir())
        if (home / "config.json").is_file()
    }
    of_latents = {home: kind for home, kind in kinds.items() if AUTOENCODER.search(kind)}
    for home, kind in of_latents.items():
        if kind == VARIATIONAL:
            return network_of(home, kinds=(VARIATIONAL,))[0]
        raise ValueError(f"{begin}, and {refusal(kind)}")
    raise ValueError(f"{begin}, and its files are not there: give the folder of the autoencoder")


class Plain(nn.Module):
    """network(y, time) -> (B, C, ...), for a fixed class if given, with the first `keep`
    channels."""

    def __init__(
        self, network: nn.Module, label: int | None = None, keep: int | None = None
    ) -> None:
        super().__init__()
        self.network, self.label, self.keep = network, label, keep

    @override
    def forward(self, y: Tensor, time: Tensor, **given: Tensor) -> Tensor:
        if self.label is not None:
            given[LABELS] = torch.full((len(y),), self.label, device=y.device)
        # the second argument of some transformers is the condition
        named = "timestep" in [*signature(self.network.forward).parameters][2:]
        place = () if named else (time,)
        if named:
            given["timestep"] = time
        output: Tensor = self.network(y, *place, return_dict=False, **given)[0]
        return output[:, : self.keep]


def _condition(
    network: nn.Module, about: Config, condition: Condition | None, label: int | None
) -> Given | None:
    """Return the condition of a network as it takes it, None where it takes none.

    Raises:
        ValueError: it is missing, left over, or not what the network takes.
    """
    classes, width = _classes(about), _width_of_prompts(about)
    if width is not None and condition is None:
        raise ValueError(
            "the model is of P(x|prompt): give condition=embeddings of the prompts, (N, L,"
            f" {width}), those of the empty prompt for P(x|no prompt), or the prompts themselves"
            " to the pipeline in memory"
        )
    if label is not None or condition is None:
        check_label(label, classes)
    if condition is None:
        return None
    if label is not None or (classes is None and width is None):
        why = "label is one for all" if label is not None else "the model has none"
        raise ValueError(f"the condition is left over: {why}; leave it out")
    given = Given.of(condition, LABELS if width is None else PROMPTS)
    if classes is not None:
        check_labels(given, LABELS, classes)
    needs = [name for name in (PROMPTS, POOLED) if name in signature(network.forward).parameters]
    needs = needs if width is not None else []
    if about.get("addition_embed_type") == "text_time":
        needs += ["added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids"]
    elif about.get("addition_embed_type") is not None or about.get("time_cond_proj_dim"):
        raise ValueError(
            "the network takes more than prompts (addition_embed_type or a guidance scale); wrap"
            " it with nelbo.integrations.wrap(..., conditioned_on=)"
        )
    if missing := [name for name in needs if name not in given.values]:
        raise ValueError(
            f"the condition lacks {', '.join(missing)}: give a mapping of"
            f" {', '.join(needs)} to arrays"
        )
    takes = signature(network.forward).parameters
    for name in given.values:
        if name.partition(".")[0] not in takes:
            raise ValueError(f"a {type(network).__name__} takes no condition {name!r}")
    prompts = given.values.get(PROMPTS)
    if prompts is not None and (prompts.ndim != 3 or prompts.shape[2] != width):
        raise ValueError(
            f"embeddings of prompts must be (N, L, {width}), or (1, L, {width}) for all; got"
            f" {tuple(prompts.shape)}"
        )
    return given


def _width_of_prompts(about: Config) -> int | None:
    """Return the width of the embeddings of prompts that a network takes, None if it takes
    none."""
    for name in ("joint_attention_dim", "encoder_hid_dim", "cross_attention_dim"):
        if about.get(name) is not None and "norm_type" not in about:  # a DiT has one, unused
            return positive(about, name)
    return None


Whole = tuple[nn.Module, Scheduler, tuple[int, ...], Levels | Affine]
Found = tuple[Model, TimeDiscretization, str]


def _discrete(
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
    total = len(gamma)
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


def _edm(whole: Whole, steps: int | None, clip: bool) -> Found:
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


def _flow(whole: Whole, steps: int | None, clip: bool) -> Found:
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


def shape_of(about: Config) -> tuple[int, ...]:
    """Return the shape (C, H, W) of one example."""
    size = about.get("sample_size")
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        raise ValueError(f"the network's sample_size must be its side in pixels; got {size!r}")
    pixels = tuple(map(int, sides))
    blocks = about.get("block_out_channels")
    halvings = len(blocks) - 1 if isinstance(blocks, list | tuple) and blocks else 0
    if any(side % 2**halvings for side in pixels):
        raise ValueError(
            f"the network halves its images {halvings} times, and sample_size {size} is no"
            f" multiple of {2**halvings}: it was trained at another, so set sample_size to that"
        )
    return (positive(about, "in_channels"), *pixels)


def _classes(about: Config) -> int | None:
    """Return the number of classes of a label, or None."""
    if about.get("class_embed_type") is not None:
        raise ValueError(
            f"class_embed_type {about['class_embed_type']!r} takes no label; wrap the network with"
            " nelbo.integrations.wrap"
        )
    if about.get("num_embeds_ada_norm") is not None:
        return positive(about, "num_embeds_ada_norm") + 1  # the last is "no class"
    return None if about.get("num_class_embeds") is None else positive(about, "num_class_embeds")
