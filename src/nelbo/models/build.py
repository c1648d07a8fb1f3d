"""From a configuration to a model, with the tables of names in `config`."""

import math
from collections.abc import Callable
from inspect import signature

import torch
from torch import nn

from nelbo._utils import limits
from nelbo._utils.tables import resolve
from nelbo.data.columns import Group, groups
from nelbo.data.schema import Schema
from nelbo.diffusion import decoder as likelihood
from nelbo.diffusion import parametrization, reverse, schedules
from nelbo.diffusion.gaussian import Affine, Levels
from nelbo.diffusion.model import Model
from nelbo.diffusion.process import ForwardProcess
from nelbo.diffusion.product import (
    ProductDecoder,
    ProductDiffusion,
    ProductParametrization,
    ProductReverseKernel,
)
from nelbo.models import conditioning, custom
from nelbo.models.config import (
    CUSTOM,
    LEVEL_DECODERS,
    LEVEL_HEADS,
    NETWORKS,
    POINT_HEADS,
    SCHEDULES,
    STEPS,
    SYMBOL_PROCESSES,
    VALUE_PROCESSES,
    ModelConfig,
)
from nelbo.models.tabular import continuous, discrete
from nelbo.nn.ensemble import Ensemble
from nelbo.nn.table import TableNet


def build(
    config: ModelConfig,
    schema: Schema,
    affine: Affine | None = None,
    network: custom.Network | None = None,
) -> Model:
    """Return the untrained model of a configuration for the data of a schema.

    Args:
        config: names and sizes of the parts.
        schema: kind and shape of an example.
        affine: the transform of real data; the identity where left out.
        network: of the user's own, for `config.network` "custom".

    Raises:
        ValueError: if the parts do not fit together, the data or the memory.
    """
    custom.check_given(config, network, "RUN")
    own = None if network is None else custom.instantiate(network)
    with limits.within_memory(f"a model of width {config.width}, depth {config.depth}"):
        model = _build(config, schema, affine, own)
    model.conditioned_on = conditioning.names(schema)
    if schema.text:
        model.dimension = schema.symbol
    return model


def _build(
    config: ModelConfig, schema: Schema, affine: Affine | None, own: nn.Module | None
) -> Model:
    if config.network in ("conv", "unet") and len(schema.shape) != 3:
        raise ValueError(
            f"the network {config.network} is for images; the data's shape is {schema.shape};"
            " try mlp"
        )
    schedule = resolve(config.schedule, SCHEDULES)(config.gamma_min, config.gamma_max)
    if schema.kind == "table":
        return _table(config, schema, schedule)
    if config.process in SYMBOL_PROCESSES:
        return _symbols(config, schema, schedule)
    _require_finite(config, schedule)
    if schema.levels is None:
        affine = affine or Affine(torch.zeros(schema.shape), torch.ones(schema.shape))
        return _real(config, schema, schedule, affine, own)
    return _levels(config, schema, schedule, Levels(schema.levels), own)


def _require_finite(config: ModelConfig, schedule: schedules.Schedule) -> None:
    """Raise a ValueError if γ is infinite at an end, where only symbols have a density."""
    with torch.no_grad():
        ends = schedule(torch.tensor([schedule.start, 1.0], dtype=torch.float64)).tolist()
    if not all(map(math.isfinite, ends)):
        raise ValueError(
            f"the schedule {config.schedule} has γ from {ends[0]:g} to {ends[1]:g}, and real"
            f" numbers and levels need finite ends: it is for the processes"
            f" {' and '.join(SYMBOL_PROCESSES)}; try --schedule linear"
        )


def _symbols(config: ModelConfig, schema: Schema, schedule: schedules.Schedule) -> Model:
    if schema.levels is None:
        raise ValueError(
            f"the {config.process} process is for integers; these data are real numbers"
        )
    _only(config, head=("symbols",), step=("posterior",), decoder=("categorical",))
    if config.network == CUSTOM:
        raise ValueError(
            f"a network of your own goes with the process gaussian; got {config.process}"
        )
    make = resolve(config.process, SYMBOL_PROCESSES)
    if schema.tokenizer is None:
        process = _made(make, config, schedule, schema.levels, ["shorter"] * schema.text)
        head = parametrization.SymbolLogits(schema.levels, schema.shape)
        network = _network(config, schema, process.channels, head.outputs)
    else:  # so many symbols are embedded, and all places share their frequencies
        if config.network != "transformer":
            raise ValueError(
                f"tokens take the network transformer, which embeds them; got {config.network}"
            )
        process = _made(make, config, schedule, schema.levels, ["as_codes", "shorter"])
        head = parametrization.SymbolLogits(schema.levels)
        network = _network(config, schema, 1, head.outputs, symbols=schema.levels + 1)
    step, decoder = reverse.Posterior(), likelihood.Categorical()
    return Model(network, process, head, step, decoder, schema.shape)


def _made(
    make: Callable[..., ForwardProcess],
    config: ModelConfig,
    schedule: schedules.Schedule,
    count: int,
    flags: list[str],
) -> ForwardProcess:
    """Return a process of symbols, with the flags that the data need: a class may lack others."""
    lacking = [flag for flag in flags if flag not in signature(make).parameters]
    if lacking:
        raise ValueError(
            f"the process {config.process} is not made for text: it takes no argument"
            f" {' and '.join(lacking)}; try --process absorbing"
        )
    return make(schedule, count, **dict.fromkeys(flags, True))


def _real(
    config: ModelConfig,
    schema: Schema,
    schedule: schedules.Schedule,
    affine: Affine,
    own: nn.Module | None,
) -> Model:
    _only(config, head=tuple(POINT_HEADS), step=tuple(STEPS), decoder=("gaussian",))
    decoder = likelihood.GaussianDensity(affine, _start_spread(schedule))
    process = resolve(config.process, VALUE_PROCESSES)(schedule, affine)
    head = _point_head(config)
    network = _network(config, schema, process.channels, head.outputs, own)
    step = resolve(config.step, STEPS)()
    return Model(network, process, head, step, decoder, schema.shape)


def _levels(
    config: ModelConfig,
    schema: Schema,
    schedule: schedules.Schedule,
    levels: Levels,
    own: nn.Module | None,
) -> Model:
    if config.head in LEVEL_HEADS:
        _only(
            config, step=("mixture", "posterior", "beta", "optimal"), decoder=tuple(LEVEL_DECODERS)
        )
        head = resolve(config.head, LEVEL_HEADS)(levels.values, schema.shape)
    else:
        decoders = tuple(name for name in LEVEL_DECODERS if name != "levels")
        _only(config, head=tuple(POINT_HEADS), step=tuple(STEPS), decoder=decoders)
        head = _point_head(config)
    if config.decoder == "bernoulli" and levels.count != 2:
        raise ValueError(f"the decoder bernoulli is for 2 levels; the data have {levels.count}")
    mixture = config.step == "mixture"
    step = reverse.Mixture(levels.values) if mixture else resolve(config.step, STEPS)()
    decoder = resolve(config.decoder, LEVEL_DECODERS).of_levels(levels)
    process = resolve(config.process, VALUE_PROCESSES)(schedule, levels)
    network = _network(config, schema, process.channels, head.outputs, own)
    return Model(network, process, head, step, decoder, schema.shape)


def _table(config: ModelConfig, schema: Schema, schedule: schedules.Schedule) -> Model:
    if (config.process, config.network) != ("product", "table"):
        raise ValueError(
            f"a table takes the process product and the network table; got {config.process} and"
            f" {config.network}; leave both out"
        )
    _only(config, head=("columns",), step=("columns",), decoder=("columns",))
    found = groups(schema.columns)
    count = sum(len(group.places) for group in found if group.kind != "symbols")
    if count:
        _require_finite(config, schedule)
    parts = [_group(group, schedule) for group in found]
    sizes = [len(group.places) for group in found]
    process = ProductDiffusion([part[0] for part in parts], sizes)
    head = ProductParametrization([part[1] for part in parts], sizes)
    features = sum(p.channels * size for p, size in zip(process.parts, sizes, strict=True))
    sizes_of_network = config.width, config.depth, config.dropout, conditioning.features(schema)
    network = _members(
        config, lambda: TableNet(count, features, sum(head.widths), *sizes_of_network)
    )
    step = ProductReverseKernel([part[2] for part in parts])
    decoder = ProductDecoder([part[3] for part in parts])
    return Model(network, process, head, step, decoder, schema.shape)


def _group(
    group: Group, schedule: schedules.Schedule
) -> tuple[
    ForwardProcess, parametrization.Parametrization, reverse.ReverseKernel, likelihood.Decoder
]:
    """Return process, parametrization, reverse kernel and decoder of a group of columns.

    Symbols have a schedule of their own, which ends with all of them masked.
    """
    if group.kind == "symbols":
        process = discrete.MaskedColumns(schedules.PowerAlpha(2.0), group.size)
        head = discrete.MaskedContext(group)
        return process, head, reverse.Posterior(), likelihood.Categorical()
    if group.kind == "levels":
        levels = discrete.OrdinalValues(group)
        return (
            discrete.OrdinalColumns(schedule, levels),
            discrete.OrdinalContext(group, levels),
            discrete.OrdinalMixture(levels),
            likelihood.LevelDecoder(),
        )
    transforms = [place.column.transform for place in group.places]
    transform = continuous.MonotoneTransform(len(transforms), transforms=transforms)
    mixture = continuous.ContinuousMixture(transform, group.places)
    return (
        continuous.ContinuousColumns(schedule, transform),
        mixture,
        continuous.ContinuousReverseKernel(),
        continuous.ContinuousDecoder(transform, group.places, mixture.law),
    )


def _start_spread(schedule: schedules.Schedule) -> float:
    """Return the standard deviation of unit data given z_1, √((1-α)/α) = exp(γ/2) at the start."""
    with torch.no_grad():
        gamma = schedule(torch.tensor(schedule.start, dtype=torch.float64)).item()
    return math.exp(gamma / 2)


def _point_head(config: ModelConfig) -> parametrization.Parametrization:
    head = resolve(config.head, POINT_HEADS)()
    return parametrization.WithVariance(head) if config.step == "learned" else head


def _network(
    config: ModelConfig,
    schema: Schema,
    channels: int,
    outputs: int,
    own: nn.Module | None = None,
    **more: int,
) -> nn.Module:
    if own is not None:
        return custom.adapted(own, config, schema, outputs)
    sizes = config.width, config.depth, config.dropout
    made = resolve(config.network, NETWORKS)
    parts = schema.shape, channels, outputs, *sizes, conditioning.features(schema)
    return _members(config, lambda: made(*parts, **more))


def _members(config: ModelConfig, make: Callable[[], nn.Module]) -> nn.Module:
    members = [make() for _ in range(config.members)]
    return members[0] if config.members == 1 else Ensemble(members)


def _only(config: ModelConfig, **allowed: tuple[str, ...]) -> None:
    """Raise a ValueError unless each named part of the configuration is one of those allowed."""
    for part, names in allowed.items():
        value = getattr(config, part)
        if value not in names:
            raise ValueError(
                f"the {part} {value} does not go with the process {config.process} and"
                f" {'these data' if part == 'head' else f'the head {config.head}'};"
                f" try --{part} {names[0]}"
            )
