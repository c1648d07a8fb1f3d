"""Networks in memory, of whatever kind people hold them in, ready to be measured.

pipeline                   of diffusers: its unet or transformer, and its scheduler
(network, scheduler)       of diffusers
module or plain function   network(y, time), with noise levels (`betas`, ..); see `wrap`
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypedDict, cast

from torch import Tensor, nn

from nelbo._utils.text import shortened
from nelbo.data import coerce
from nelbo.data.readers.arrays import layout
from nelbo.data.schema import Schema
from nelbo.data.sources import Source
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.gaussian import Affine, Levels
from nelbo.diffusion.model import Model
from nelbo.diffusion.schedules import Schedule, even_times
from nelbo.diffusion.times import ContinuousTime, TimeDiscretization, TimeGrid
from nelbo.integrations.conditions import Condition, Conditioned, Given
from nelbo.integrations.denoisers import Called, Predicts, Variance, wrap
from nelbo.integrations.external import Foreign, scaled
from nelbo.integrations.noise_levels import Numbers, spaced
from nelbo.integrations.prompts import is_prompts, of_prompts

GUIDANCE = (
    "guidance has no likelihood: x̂ is pushed beyond the network's prediction at each step, so that"
    " neither the variance nor the data of the training belong to it; measure P(x|c) without, and"
    " use guidance for samples"
)
NETWORKS = ("unet", "transformer")  # of a pipeline
OF_PIPELINES = {"check", "clip", "keep", "label", "law", "scaling", "variance", "weights"}
OF_IMAGES = (
    "a network with its scheduler is taken for one of the images themselves; for one of latents"
    " give the pipeline with its autoencoder"
)
MODES = {"L": 1, "1": 1, "RGB": 3, "RGBA": 4, "I;16": 1}  # channels of an image of Pillow


class Reading(TypedDict, total=False):
    """The reading of a network, where it does not say so itself; as for `wrap` and `build`."""

    shape: tuple[int, ...]
    predicts: Predicts
    betas: Numbers
    alphas: Numbers
    sigmas: Numbers
    schedule: Schedule
    sigma_data: float
    variance: Variance
    scaling: Levels | Affine
    clip: bool
    keep: Sequence[int]
    label: int
    law: str
    guidance: float
    check: bool
    weights: str  # their name, for the record
    scheduler: object  # of diffusers, with which a network of its own is a pair


class Parts(NamedTuple):
    """The parts of a network with its scheduler."""

    network: nn.Module
    scheduler: Any


def is_network(thing: object) -> bool:
    """Return whether something is a network to be read, rather than a run or a model."""
    # all that an argument may be beside: a model is callable too
    if isinstance(thing, str | Model | Foreign | type):
        return False
    return _parts(thing) is not None or callable(thing)


def has_scheduler(thing: object) -> bool:
    """Return whether something is a pipeline, or a network with its scheduler."""
    return _parts(thing) is not None


def _parts(thing: object) -> Parts | None:
    """Return the network and the scheduler of a pipeline or of a pair, else None."""
    if isinstance(thing, tuple | list):
        if len(thing) == 2 and isinstance(thing[0], nn.Module) and _is_scheduler(thing[1]):
            return Parts(*thing)
        return None
    network = next((n for name in NETWORKS if (n := getattr(thing, name, None)) is not None), None)
    scheduler = getattr(thing, "scheduler", None)
    if not isinstance(network, nn.Module) or not _is_scheduler(scheduler):
        return None
    return Parts(network, scheduler)


def _is_scheduler(thing: object) -> bool:
    return hasattr(thing, "config") and hasattr(thing, "set_timesteps")


def read(
    thing: object,
    source: Source | Batch,
    *,
    steps: int | None = None,
    condition: Condition | None = None,
    reading: Reading,
) -> Foreign:
    """Return a network in memory as a model that can be measured.

    Args:
        thing: the network; see above.
        source: the examples, which say the shape of one if the network does not.
        steps: number of steps of the model; by default its own.
        condition: c of each example, in their order, for the bound on P(x|c).
        reading: how the network is to be read.

    Raises:
        ValueError: it has no bound, or more must be said of it; the message says what.
    """
    if "guidance" in reading:
        raise ValueError(GUIDANCE)
    if "scheduler" in reading:
        pair = (thing, reading["scheduler"])
        if _parts(pair) is None:
            raise ValueError(
                "scheduler is a scheduler of diffusers, beside a network that is a module; got"
                f" {shortened(repr(pair[1]))} beside {type(thing).__name__}"
            )
        reading = cast(Reading, {k: v for k, v in reading.items() if k != "scheduler"})
        return read(pair, source, steps=steps, condition=condition, reading=reading)
    name = type(thing).__name__
    parts = _parts(thing)
    if hasattr(getattr(thing, "config", None), "vocab_size"):
        raise ValueError(
            f"{name} is a model of tokens, whose ids only its tokenizer explains: give both,"
            " (model, tokenizer), or wrap_tokens(model, mask_id)"
        )
    if parts is None:
        return _of_function(
            cast("Callable[..., Tensor]", thing), source, steps, condition, reading
        )
    unknown = reading.keys() - OF_PIPELINES
    if unknown:
        raise ValueError(
            f"{', '.join(sorted(unknown))}: the scheduler of a {name} determines this; leave it"
            " out, or give the network alone"
        )
    from nelbo.integrations import diffusers
    from nelbo.integrations.diffusers_folder import AUTOENCODER

    if condition is not None and is_prompts(condition):
        condition = of_prompts(thing, parts.network, condition)
    of_pipeline = getattr(thing, "components", {}).values()
    vae = next((each for each in of_pipeline if AUTOENCODER.search(type(each).__name__)), None)
    options = cast("dict[str, Any]", reading)
    found = diffusers.build(
        *parts, name=name, steps=steps, condition=condition, vae=vae, **options
    )
    if not isinstance(thing, tuple | list):
        return found
    # neither of the two says whether it was trained on images or on latents of an autoencoder
    return replace(found, notes=(*found.notes, OF_IMAGES))


def _of_function(
    network: Callable[..., Tensor],
    source: Source | Batch,
    steps: int | None,
    condition: Condition | None,
    reading: Reading,
) -> Foreign:
    """Return the model of a module or a plain function, by `wrap`."""
    if "label" in reading:
        raise ValueError("label is for a network with its scheduler; give condition=label")
    if not {"betas", "alphas", "sigmas", "schedule"} & reading.keys():
        raise ValueError(
            "give the noise levels as one of betas, alphas, sigmas or schedule, or a scheduler of"
            " diffusers as scheduler; got none"
        )
    module = network if isinstance(network, nn.Module) else Called(network)
    options = cast("dict[str, Any]", dict(reading))
    shape = options.pop("shape", None) or _shape_of(module, source)
    weights = options.pop("weights", "as given")
    given = None if condition is None else Given.of(condition, _keyword(module))
    table = next((options[k] for k in ("betas", "alphas", "sigmas") if k in options), None)
    if steps is not None and table is not None:
        if "keep" in options:
            raise ValueError("give steps or keep, not both")
        # a sampler's σ's end with 0, which is no step
        count = len(table) - ("sigmas" in options and float(table[-1]) == 0)
        options["keep"] = spaced(count, steps)
    if len(options.get("keep", (0, 1))) == 1:
        options["decoder"] = "evidence"  # the last step takes its variance from the one before
    called = module if given is None else Conditioned(module, given)
    word = "" if given is None else given.word
    check = options.pop("check", True)
    # the examples say more of the reading than pure noise does
    model = wrap(called, shape, conditioned_on=word, check=False, **options)
    model.check = check
    process = model.process
    times: TimeDiscretization
    if table is not None:
        times = TimeGrid.uniform(cast(int, process.schedule.steps))
        how = f"in {process.schedule.steps} steps"
    elif steps is not None:
        times, how = TimeGrid(even_times(process.schedule, steps, steps)), f"in {steps} steps"
    else:
        times, how = ContinuousTime(process.schedule.start), "in continuous time"
    how_read = f'predicts="{reading.get("predicts", "noise")}"'
    if "sigma_data" in reading:
        how_read += f", sigma_data={reading['sigma_data']:g}"
    notes = (
        f"ancestral sampling {how}, variance {reading.get('variance', 'small')}; the network is"
        f" read as {how_read}",
        scaled(process.embedding),
    )
    levels = process.codes or None
    schema = Schema("levels" if levels else "real", tuple(shape), levels)
    return Foreign(type(network).__name__, model, schema, times, weights, notes, given)


def _keyword(module: nn.Module) -> str:
    """Return the keyword for the condition of a network; "" for its third argument."""
    config = getattr(module, "config", {})
    if "cross_attention_dim" in config and config.get("num_class_embeds") is None:
        return "encoder_hidden_states"
    return "class_labels" if {"num_class_embeds", "num_embeds_ada_norm"} & {*config} else ""


def _shape_of(module: nn.Module, source: Source | Batch) -> tuple[int, ...]:
    """Return the shape of one example, as the network's config or the examples say it."""
    config = getattr(module, "config", {})
    if {"sample_size", "in_channels"} <= {*config}:
        from nelbo.integrations.diffusers_network import shape_of

        return shape_of(config)
    if isinstance(source, Batch):
        return tuple(source.x.shape[1:])
    first = source[0] if isinstance(source, list | tuple) and source else None
    if hasattr(first, "getexif"):
        image = cast(Any, first)
        return (MODES.get(image.mode, 3), image.height, image.width)
    array = coerce.as_array(source)
    if array is None:
        raise ValueError(
            "the shape of one example is not known from the network or the data; give"
            " shape=(C, H, W)"
        )
    return tuple(layout(array[:1], coerce.NAME)[0].shape[1:])
