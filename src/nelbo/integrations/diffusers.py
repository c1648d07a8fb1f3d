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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

from torch import nn

from nelbo.data.schema import Schema
from nelbo.diffusion.gaussian import Affine, Levels
from nelbo.integrations.conditions import LABELS, Condition, Conditioned, Given
from nelbo.integrations.configs import Config, positive, read_json
from nelbo.integrations.denoisers import Variance, signal_left
from nelbo.integrations.diffusers_folder import (
    AUTOENCODER,
    adapters_of,
    autoencoder_of,
    check_keys,
    described,
    home_of,
    made,
    network_of,
)
from nelbo.integrations.diffusers_network import (
    Plain,
    check_call,
    classes_of,
    condition_of,
    shape_of,
)
from nelbo.integrations.diffusers_scheduler import (
    VARIANCES,
    Scheduler,
    Whole,
    check_scheduler,
    discrete,
    edm,
    flow,
)
from nelbo.integrations.external import Foreign, scaled
from nelbo.integrations.latents import VARIATIONAL, refusal, scaling_of, through
from nelbo.integrations.prompts import is_prompts, of_no_prompt, of_prompts, pipeline_of


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
    check: bool = True,
) -> Foreign:
    """Load the model in a folder; arguments and errors as for `build`.

    Args:
        path: of the folder.
        steps: as for `build`.
        clip: as for `build`.
        label: as for `build`.
        scaling: as for `build`.
        keep: as for `build`.
        variance: as for `build`.
        weights: a variant of the weights, such as fp16, or a folder of others, such as unet_ema.
        condition: as for `build`.
        law: as for `build`.
        levels: number of levels of the images, which span the scaling; by default 256.
        check: as for `build`.

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
    notes += adapters_of(path, home)
    network, kind, weight_notes = network_of(home, variant)
    name = "scheduler_config.json"
    places = (path / "scheduler" / name, path / name)
    settings = next((place for place in places if place.is_file()), None)
    if settings is None:
        raise FileNotFoundError(
            f"{places[0]} does not exist; write it with save_pretrained of the scheduler of the"
            " training"
        )
    config = read_json(settings, infinite=True)  # DPM-Solver's has infinite values
    if not str(config.get("_class_name")).endswith("Scheduler"):
        raise ValueError(f"{settings} names no scheduler; its _class_name says which it is")
    scheduler = made(config, settings)
    name = f"diffusers:{path}"
    kind = kind if weights is None else f"{kind}, {weights}"
    options: dict[str, object] = {"clip": clip, "label": label, "scaling": scaling, "keep": keep}
    options |= {"variance": variance, "weights": kind, "condition": condition}
    options |= {"vae": vae, "law": law, "check": check}
    if condition is not None and is_prompts(condition):
        texts = [condition] if isinstance(condition, str) else cast("list[str]", condition)
        about = dict(network.config)  # type: ignore[arg-type]
        if classes_of(about) is not None and all(map(str.isdigit, texts)):
            options["condition"] = [int(text) for text in texts]
        else:
            pipeline = pipeline_of(path, network, scheduler, vae)
            options["condition"] = of_prompts(pipeline, network, condition)
            options["nothing"] = lambda: Given.of(of_no_prompt(pipeline, network))

    def of_steps(steps: int | None) -> Foreign:
        found = build(network, scheduler, name, steps=steps, **options)  # type: ignore[arg-type]
        read = found.model.diffusion.check_reading()
        return replace(
            found, notes=(*found.notes, *read, *notes, *weight_notes), of_steps=of_steps
        )

    return of_steps(steps)


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
    nothing: Callable[[], Given] | None = None,
    check: bool = True,
) -> Foreign:
    """Return the model of a network and the scheduler it was trained with.

    Args:
        network: a UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel,
            PixArtTransformer2DModel or SD3Transformer2DModel.
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
            classes, or embeddings of prompts (N, L, E); or a mapping of the network's keywords to
            these.
        vae: the autoencoder whose latents the network models, an AutoencoderKL, for the bound on
            images.
        law: of their pixels, "gaussian", "logistic" or "laplace", with ":channels" for a scale of
            each channel, or a scale such as ":0.05"; by default the best, fitted to images that
            are not measured.
        nothing: returns the condition that means "none", for guidance; DiT has a known one.
        check: refuse a network that fits another reading better by far, as for `wrap`; False makes
            a note of it.

    Raises:
        ValueError: a scheduler or network without a bound; the message says why.
    """
    check_call(network)
    scheduler, scaling = copy.deepcopy(scheduler), scaling or Levels(256)
    config: Config = dict(scheduler.config)
    about = dict(network.config)  # type: ignore[arg-type]
    if vae is not None:
        if not scaling.count:
            raise ValueError("a model of images through their latents needs a scaling of levels")
        pixels, scaling = scaling, scaling_of(vae, about)
    elif law is not None:
        raise ValueError("law is for models of the latents of an autoencoder; leave it out")
    kind = str(config.get("_class_name", type(scheduler).__name__))
    if clip not in (None, True, False):
        raise ValueError(f"clip must be True, False or None; got {clip!r}")
    check_scheduler(config, clip, name)
    check_keys(config, type(scheduler), "the scheduler's config")
    shape, wide = shape_of(about), about.get("out_channels") == 2 * positive(about, "in_channels")
    asked = variance is not None
    variance = variance or VARIANCES[str(config.get("variance_type") or "fixed_small")]
    learned = variance == "learned-range"
    given = condition_of(network, about, condition, label)
    drop = wide and not learned
    plain = Plain(network, label, shape[0] if drop else None)
    called = plain if given is None else Conditioned(plain, given)
    whole = Whole(called, scheduler, shape, scaling)
    if asked and "beta_schedule" not in config:
        raise ValueError("variance is for models that were trained with β's; leave it out")
    if keep is not None and (steps is not None or "beta_schedule" not in config):
        raise ValueError("keep is for models that were trained with β's, and goes without steps")
    with described(f"the scheduler {kind} cannot be read"):
        if kind.startswith("EDM"):
            model, times, how = edm(whole, steps, bool(clip))
        elif kind.startswith("FlowMatch"):
            model, times, how = flow(whole, steps, bool(clip))
        elif "beta_schedule" in config:
            model, times, how = discrete(whole, steps, bool(clip), kind, keep, variance)
        else:
            raise ValueError(
                f"the scheduler {kind} has no betas and is not EDM or flow matching; wrap the"
                " network with nelbo.integrations.wrap"
            )
    model.check = check
    how = f"ancestral sampling {how}, x̂ {'' if clip else 'not '}clipped"
    if given is not None:
        model.conditioned_on = given.word
    notes = [how, scaled(scaling), *signal_left(model)]
    if drop:
        notes.append("the network also gives a variance, which is not used")
    levels = scaling.count or None
    schema = Schema("real" if levels is None else "levels", shape, levels)
    fit = partial(model.step.fit, model) if variance == "optimal" else None
    if nothing is None and given is not None and about.get("num_embeds_ada_norm") is not None:
        classes = positive(about, "num_embeds_ada_norm")
        nothing = partial(Given.of, classes, LABELS)  # of DiT, after the last class
    found = Foreign(name, model, schema, times, weights, tuple(notes), given, fit, nothing=nothing)
    return found if vae is None else through(found, vae, pixels, law)


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
