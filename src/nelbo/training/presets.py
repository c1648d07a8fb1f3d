"""Default configurations of model and training for a data set."""

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from nelbo._utils.text import nearest
from nelbo.models.config import CUSTOM, LEVEL_HEADS, SYMBOL_PROCESSES, Decoder, ModelConfig
from nelbo.training.config import TrainConfig

if TYPE_CHECKING:
    from nelbo.data.schema import Schema


Preset = Literal["auto", "best"]


MANY_LEVELS = 64  # levels above which a few curves replace a logit for each
MANY_EXAMPLES = 10_000  # examples above which overfitting needs no augmentation or dropout
FINE = 4096  # levels above which the decoder is a discretised Gaussian
PATIENCE = 10  # validations of a table without improvement after which training ends
SMALL = 16  # pixels of the shorter side up to which an image is small
#: options by their names in other libraries
OTHERS = {
    "learning_rate": "lr",
    "model": "network",
    "batch_size": "batch",
    "epochs": "steps",
    "layers": "depth",
}
#: options of the networks that nelbo makes
OF_NETWORKS = ("width", "depth", "dropout", "members")


def _for_table(examples: int) -> tuple[ModelConfig, TrainConfig]:
    model = ModelConfig(
        process="product",
        gamma_min=-9.0,
        head="columns",
        step="columns",
        decoder="columns",
        network="table",
        width=128,
        depth=2,
        dropout=0.1 if examples < MANY_EXAMPLES else 0.0,
    )
    return model, TrainConfig(steps=3000, batch=256, augment=0.0, patience=PATIENCE)


def configure(
    schema: "Schema", examples: int, preset: str = "auto", **options: str | int | float
) -> tuple[ModelConfig, TrainConfig]:
    """Return the preset that suits the data, with options in place of its values.

    Values that depend on an option change with it: another head brings its step and decoder.

    Args:
        schema: kind and shape of an example.
        examples: number of training examples; a small set gets augmentation or dropout.
        preset: one of `Preset`.
        options: fields of either section.

    Raises:
        ValueError: if the preset or an option is unknown, or a value is impossible.
    """
    if preset not in get_args(Preset):
        raise ValueError(f"preset must be one of {', '.join(get_args(Preset))}; got {preset!r}")
    model, train, levels = ModelConfig(), TrainConfig(), schema.levels or 0
    of_model, of_train = by_config(options)
    if of_model.get("network") == CUSTOM:
        _check_custom(schema, preset, options)
        of_model = {"head": "noise", "process": "gaussian", **of_model}
    if levels > MANY_LEVELS:
        # start at noise of about a level: neighbours reveal regularities of a whole image
        model = replace(model, head="level-curves", gamma_min=-10.0)
    fine = levels > FINE
    if fine:  # the noise of z_1 is half a level
        model = replace(model, head="velocity", gamma_min=-2 * math.log(levels - 1))
    text = schema.text
    if schema.kind == "table":
        model, train = _for_table(examples)
    elif schema.levels is None:
        model = replace(
            model, head="velocity", step="posterior", decoder="gaussian", gamma_min=-10.0
        )
        train = replace(train, cross_entropy=0.0)
    elif (
        process := str(of_model.get("process", "absorbing" if text else ""))
    ) in SYMBOL_PROCESSES:
        model = replace(
            model,
            process=process,
            schedule="cubic-alpha" if process == "uniform" else "quadratic-alpha",
            head="symbols",
            step="posterior",
            decoder="categorical",
        )
    elif str(of_model.get("head", model.head)) not in LEVEL_HEADS:
        decoder: Decoder = "discretised-gaussian" if fine else "evidence"
        model = replace(model, step="posterior", decoder=decoder)
        train = replace(train, cross_entropy=0.0)
    image = len(schema.shape) == 3 and min(schema.shape[1:]) >= 4
    if not image or examples > MANY_EXAMPLES:
        train = replace(train, augment=0.0)
    large = image and min(schema.shape[1:]) > SMALL
    of_image = "unet" if large else "conv"
    network = of_model.get("network", of_image if image else "transformer" if text else "mlp")
    if network == "transformer" or large:
        # an example is expensive: many small steps and few validations
        train = replace(train, steps=10_000, batch=16, lr=3e-3, evaluate_every=1000)
        train = replace(train, optimizer="muon")
    if network == "conv":  # a validation takes the time of some 25 steps
        train = replace(train, evaluate_every=200)
    if network == CUSTOM:  # of any kind, so without what suits only some
        model = replace(model, network=CUSTOM)
        train = replace(train, optimizer="adamw", lr=5e-4, augment=0.0)
    if network == "unet":
        dropout = model.dropout if examples <= MANY_EXAMPLES else 0.0
        model = replace(model, network="unet", depth=1, dropout=dropout)
    if network == "transformer":
        model = replace(model, network="transformer", width=128, depth=4, dropout=0.0)
        train = replace(train, lr=2e-3, augment=0.0)
    if network == "mlp" and schema.kind != "table":
        model = replace(model, network="mlp", width=128)
        train = replace(train, steps=3000, batch=128, lr=1e-3, augment=0.0, evaluate_every=100)
    if preset == "best":
        model = replace(model, width=3 * model.width // 2, dropout=0.2, members=3)
        train = replace(train, steps=4 * train.steps // 3, batch=3 * train.batch)
        if train.augment:
            train = replace(train, augment=0.75)

    return replace(model, **of_model), replace(train, **of_train)


def by_config(options: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of ModelConfig and those of TrainConfig, each checked by itself.

    Raises:
        ValueError: an option is unknown, or its value is impossible for any data.
    """
    if isinstance(head := options.get("head"), str):
        from nelbo.diffusion.parametrization import spelled  # torch, which --help does not load

        options = {**options, "head": spelled(head)}
    known = {f.name: kind for kind in (ModelConfig, TrainConfig) for f in fields(kind)}
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name!r}; {_nearest(name, [*known])}")
    of_model, of_train = (
        cast(dict[str, Any], {name: v for name, v in options.items() if known[name] is kind})
        for kind in (ModelConfig, TrainConfig)
    )
    replace(ModelConfig(), **of_model)  # which checks each value
    replace(TrainConfig(), **of_train)
    return of_model, of_train


def _check_custom(schema: "Schema", preset: str, options: Mapping[str, object]) -> None:
    """Raise ValueError for what does not go with a network of the user's own."""
    if schema.kind == "table":
        raise ValueError(
            "a table takes nelbo's own network, which reads its columns; leave network out"
        )
    if preset != "auto":
        raise ValueError(f"the preset {preset} is for nelbo's own networks; leave it out")
    for name in OF_NETWORKS:
        if name in options:
            raise ValueError(f"{name} is for nelbo's own networks; leave it out")


def _nearest(name: str, known: list[str]) -> str:
    """Return the advice to take the option that is spelled most alike, or all of them."""
    near = OTHERS.get(name) or nearest(name, known)
    return f"did you mean {near!r}?" if near else f"known are {', '.join(known)}"
