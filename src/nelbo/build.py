"""Names into objects: the one place where a string chooses a class."""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import nn

from nelbo import heads, likelihood, objective, reverse, schedules
from nelbo.config import ModelConfig
from nelbo.data import Schema
from nelbo.model import Model
from nelbo.nn.conv import ConvNet
from nelbo.nn.mlp import MLP
from nelbo.process import Absorbing, Affine, Gaussian, Levels

Thing = TypeVar("Thing")

SCHEDULES: Mapping[str, Callable[[float, float], schedules.Schedule]] = {
    "linear": schedules.Linear,
    "cosine": schedules.Cosine,
    "learned": schedules.LearnedMonotone,
    "learned-ends": lambda low, high: schedules.LearnedMonotone(low, high, learn_endpoints=True),
    "linear-alpha": lambda low, high: schedules.LinearAlpha(),
}
HEADS: Mapping[str, Callable[[], heads.Head]] = {
    "noise": heads.Noise,
    "data": heads.Data,
    "velocity": heads.Velocity,
}
STEPS: Mapping[str, Callable[[], reverse.Reverse]] = {
    "posterior": reverse.Posterior,
    "beta": reverse.Beta,
    "learned": reverse.Learned,
}
NETWORKS: Mapping[str, type[nn.Module]] = {"conv": ConvNet, "mlp": MLP}
OBJECTIVES: Mapping[str, objective.Weight] = {
    "bound": objective.bound,
    "simple": objective.simple,
    "min-snr": objective.min_snr,
    "p2": objective.p2,
}


def look_up(what: str, table: Mapping[str, Thing], name: str) -> Thing:
    """table[name], or an error that says which names there are."""
    if name not in table:
        raise ValueError(f"{what} must be one of {', '.join(table)}; got {name!r}")
    return table[name]


def build(config: ModelConfig, schema: Schema, affine: Affine | None = None) -> Model:
    """The untrained model of a config for data of a schema.

    Args:
        config: names and sizes.
        schema: what one example is.
        affine: the transform of real data; the identity where left out.

    Raises:
        ValueError: an unknown name, or parts that do not fit together or to the data.
    """
    schedule = look_up("schedule", SCHEDULES, config.schedule)(config.gamma_min, config.gamma_max)
    if config.process == "absorbing":
        return _absorbing(config, schema, schedule)
    if config.process != "gaussian":
        raise ValueError(f"process must be one of gaussian, absorbing; got {config.process!r}")
    if config.schedule == "linear-alpha":
        raise ValueError(
            "the schedule linear-alpha has infinite γ at its ends, which a Gaussian process cannot"
            " use; try --schedule linear"
        )
    if schema.levels is None:
        embedding: Levels | Affine = affine or Affine(
            torch.zeros(schema.shape), torch.ones(schema.shape)
        )
    else:
        embedding = Levels(schema.levels)
    head, step = _head(config, embedding), _step(config, embedding)
    network = _network(config, schema, 1, head.outputs)
    decoder = _decoder(config, embedding)
    return Model(network, Gaussian(schedule, embedding), head, step, decoder, schema.shape)


def _absorbing(config: ModelConfig, schema: Schema, schedule: schedules.Schedule) -> Model:
    if schema.levels is None:
        raise ValueError("the absorbing process is for integers; these are real numbers")
    process = Absorbing(schedule, schema.levels)
    head = heads.SymbolLogits(schema.levels)
    network = _network(config, schema, process.channels, head.outputs)
    decoder = likelihood.Categorical()
    return Model(network, process, head, reverse.Posterior(), decoder, schema.shape)


def _network(config: ModelConfig, schema: Schema, channels: int, outputs: int) -> nn.Module:
    network = look_up("network", NETWORKS, config.network)
    if network is ConvNet and len(schema.shape) != 3:
        raise ValueError(
            f"the network conv is for images; the data's shape is {schema.shape}; try mlp"
        )
    made: nn.Module = network(
        schema.shape, channels, outputs, config.width, config.depth, config.dropout
    )
    return made


def _head(config: ModelConfig, embedding: Levels | Affine) -> heads.Head:
    if config.head == "levels":
        if isinstance(embedding, Affine):
            raise ValueError("the head levels is for integers; try velocity for real numbers")
        head: heads.Head = heads.LevelLogits(embedding.values)
    else:
        head = look_up("head", {"levels": None, **HEADS}, config.head)()
    if config.step == "learned":
        return heads.WithVariance(head)
    return head


def _step(config: ModelConfig, embedding: Levels | Affine) -> reverse.Reverse:
    if config.step == "mixture":
        if isinstance(embedding, Affine) or config.head != "levels":
            raise ValueError("the step mixture needs the head levels; try --step posterior")
        return reverse.Mixture(embedding.values)
    made: reverse.Reverse = look_up("step", {"mixture": None, **STEPS}, config.step)()
    return made


def _decoder(config: ModelConfig, embedding: Levels | Affine) -> likelihood.Likelihood:
    if isinstance(embedding, Affine):
        if config.decoder != "gaussian":
            raise ValueError(
                f"real numbers need the decoder gaussian, a density; got {config.decoder!r}"
            )
        # starts at what z_1 leaves open of unit data: variance (1-α)/α at γ_min
        return likelihood.GaussianDensity(embedding, math.exp(config.gamma_min / 2))
    table: Mapping[str, Callable[[], likelihood.Likelihood]] = {
        "levels": likelihood.LevelHead,
        "evidence": lambda: likelihood.Evidence(embedding),
        "discretised-gaussian": lambda: likelihood.DiscretisedGaussian(embedding),
        "bernoulli": likelihood.Bernoulli,
    }
    if config.decoder == "levels" and config.head != "levels":
        raise ValueError("the decoder levels needs the head levels; try --decoder evidence")
    if config.decoder == "bernoulli" and embedding.count != 2:
        raise ValueError(f"the decoder bernoulli is for 2 levels; the data have {embedding.count}")
    made: likelihood.Likelihood = look_up("decoder", table, config.decoder)()
    return made
