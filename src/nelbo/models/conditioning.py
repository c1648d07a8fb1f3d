r"""What a network is told of an example beside z: numbers, all zero where nothing is known.

A model of P(x|c) is given c as one row of numbers per example: first whether the example was moved
by augmentation, then each label of the schema, classes one-hot and reals standardised. In training
the labels of some examples are dropped, so that the same network knows P(x) as well.

Guidance (Ho & Salimans 2022) samples with the network's output

    guided = given nothing + g (given c - given nothing)

in place of the output given c. At g = 1 it is the model whose bound is stated; at any other g the
samples are of another law, which has no bound here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nelbo._utils.batch_rng import shard_rng
from nelbo.data import Label, Schema
from nelbo.data.tabular.spelling import is_number, places_of
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model


def features(schema: Schema) -> int:
    """F, how many numbers a condition has."""
    return 1 + sum(label.features for label in schema.condition)


def names(schema: Schema) -> str:
    """The labels that a model of this schema is given, as c of P(x|c); empty where none are."""
    return ", ".join(label.name for label in schema.condition)


def encode(labels: Tensor, schema: Schema) -> Tensor:
    """Labels (B, len(schema.condition)) as conditions (B, F) of examples that were not moved."""
    columns = zip(schema.condition, labels.unbind(1), strict=True)
    told = [label.encode(values) for label, values in columns]
    return torch.cat([torch.zeros_like(labels[:, :1]), *told], 1)


def drop(condition: Tensor, share: float) -> Tensor:
    """The same (B, F), each row zero with probability `share`."""
    with shard_rng():
        keep = torch.rand(len(condition), device=condition.device) >= share
    return condition * keep[:, None]


def labelled(x: Tensor, labels: Tensor | None, schema: Schema) -> Batch:
    """Return examples and, where the schema is conditional, their labels as conditions.

    Args:
        x: examples (N, ...).
        labels: (N, len(schema.condition)). Where they are missing, NaN, the example is one of
            P(x), and `given` says how many are.
        schema: of the examples.
    """
    if not schema.condition or labels is None:
        return Batch(x)
    without = int(labels.isnan().any(1).sum())
    some = f", where it is known, which {without} of {len(labels)} are not" if without else ""
    return Batch(x, encode(labels, schema), names(schema) + some)


def parse(texts: Sequence[str], schema: Schema) -> Tensor:
    """What a user typed, NAME=VALUE or the one VALUE, as labels (1, len(schema.condition)).

    Raises:
        ValueError: a label that is missing, unknown, given twice or out of range.
    """
    if not schema.condition:
        raise ValueError("the run is not conditional; train one with --condition NAME")
    labels = {label.name: label for label in schema.condition}
    given: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals and len(labels) == 1:
            name, value = next(iter(labels)), text
        if name not in labels or name in given:
            wrong = "given twice" if name in given else "no label of the run"
            raise ValueError(
                f"{text!r} is {wrong}; its labels are {', '.join(labels)}; give each once as"
                f" NAME=VALUE"
            )
        given[name] = _value(labels[name], value)
    missing = [name for name in labels if name not in given]
    if missing:
        raise ValueError(
            f"--condition {missing[0]}=VALUE is missing; {labels[missing[0]].describe()}"
        )
    return torch.tensor([[given[name] for name in labels]], dtype=torch.float64)


def _value(label: Label, text: str) -> float:
    if label.classes:
        place = places_of([text], label.classes).get(text)
        if place is not None:
            return float(place)
    elif is_number(text) and abs(float(text)) < float("inf"):
        return float(text)
    raise ValueError(f"the label {text!r} is out of range: {label.describe()}")


def guided(model: Model, guidance: float) -> Model:
    """Return the model with conditions that count `guidance` times; it shares all weights.

    Raises:
        ValueError: the model takes no condition, or the guidance is not finite.
    """
    if not abs(guidance) < float("inf"):
        raise ValueError(f"guidance must be finite; got {guidance}")
    if guidance == 1:
        return model
    if not model.conditioned_on:
        raise ValueError("guidance is for conditional runs; train one with --condition NAME")
    network = Guided(model.network, guidance)
    parts = model.process, model.head, model.step, model.decoder
    strong = Model(network, *parts, model.shape)
    strong.conditioned_on = model.conditioned_on
    return strong


class Guided(nn.Module):
    """A network whose condition counts `guidance` times; two calls of it for each of its own.

    Args:
        network: called with and without the condition.
        guidance: g; 1 changes nothing, 0 ignores the condition.
    """

    def __init__(self, network: nn.Module, guidance: float) -> None:
        super().__init__()
        self.network, self.guidance = network, guidance

    def forward(self, features: Tensor, level: Tensor, condition: Tensor) -> Tensor:
        free = self.network(features, level, torch.zeros_like(condition))
        output: Tensor = torch.lerp(free, self.network(features, level, condition), self.guidance)
        return output
