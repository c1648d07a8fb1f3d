r"""The condition c of a model of P(x|c): one row of numbers per example, zero where unknown.

The first number says whether augmentation moved the example; then come the labels of the schema,
classes one-hot and reals standardised. Training drops the labels of some examples, so that the
same network learns P(x) as well.

Guidance (Ho & Salimans 2022) samples with the network output

    guided = f(z, 0) + g (f(z, c) - f(z, 0))

in place of f(z, c). At g = 1 this is the model whose bound is stated; at any other g the samples
follow another distribution, for which no bound is computed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo._utils.batch_rng import BatchShard, rand
from nelbo.data.schema import Label, Schema
from nelbo.data.tabular.spelling import is_number, places_of
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model


def features(schema: Schema) -> int:
    """Return F, the number of features of a condition."""
    return 1 + sum(label.features for label in schema.condition)


def names(schema: Schema) -> str:
    """Return the names of the labels in c of P(x|c), joined by commas; empty without labels."""
    return ", ".join(label.name for label in schema.condition)


def encode(labels: Tensor, schema: Schema) -> Tensor:
    """Return conditions (B, F) of labels (B, len(schema.condition)) of unmoved examples."""
    columns = zip(schema.condition, labels.unbind(1), strict=True)
    encoded = [label.encode(values) for label, values in columns]
    return torch.cat([torch.zeros_like(labels[:, :1]), *encoded], 1)


def drop(condition: Tensor, share: float, shard: BatchShard | None = None) -> Tensor:
    """Return the condition, (B, F), with each row set to zero with probability `share`."""
    keep = rand((len(condition),), shard, device=condition.device) >= share
    return condition * keep[:, None]


def labelled(x: Tensor, labels: Tensor | None, schema: Schema) -> Batch:
    """Return examples and, where the schema is conditional, their labels as conditions.

    Args:
        x: examples (N, ...).
        labels: (N, len(schema.condition)). An example with a missing label, NaN, is one of P(x),
            and the `given` of the batch says how many these are.
        schema: of the examples.
    """
    if not schema.condition or labels is None:
        return Batch(x)
    without = int(labels.isnan().any(1).sum())
    some = f", where it is known, which {without} of {len(labels)} are not" if without else ""
    return Batch(x, encode(labels, schema), names(schema) + some)


def parse(texts: Sequence[str], schema: Schema) -> Tensor:
    """Return labels (1, len(schema.condition)) of texts NAME=VALUE, or VALUE of the only label.

    Raises:
        ValueError: if a label is missing, unknown, given twice or out of range.
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


def guided(model: Model, guidance: float, nothing: Tensor | None = None) -> Model:
    """Return the model with guidance; it shares all weights with the original.

    Args:
        model: of P(x|c).
        guidance: g; see `Guided`.
        nothing: the condition (F,) that stands for none, zeros where left out.

    Raises:
        ValueError: if the model takes no condition or the guidance is not finite.
    """
    if not abs(guidance) < float("inf"):
        raise ValueError(f"guidance must be finite; got {guidance}")
    if guidance == 1:
        return model
    if not model.conditioned_on:
        raise ValueError("guidance is for conditional runs; train one with --condition NAME")
    network = Guided(model.network, guidance, nothing, model.head.has_variance)
    parts = model.process, model.head, model.step, model.decoder
    return Model(network, *parts, model.shape, model.conditioned_on)


class Guided(nn.Module):
    """A network with classifier-free guidance: f(z, 0) + g (f(z, c) - f(z, 0)).

    Each call takes two calls of the network.

    Args:
        network: f, called with and without the condition.
        guidance: g; 1 changes nothing, 0 ignores the condition.
        nothing: the condition (F,) that stands for none, zeros where left out.
        variance: whether the second output is the share of a variance, which stays that of
            f(z, c), as in DiT.
    """

    nothing: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        guidance: float,
        nothing: Tensor | None = None,
        variance: bool = False,
    ) -> None:
        super().__init__()
        self.network, self.guidance, self.variance = network, guidance, variance
        self.register_buffer("nothing", nothing, persistent=False)

    @override
    def forward(self, features: Tensor, level: Tensor, condition: Tensor) -> Tensor:
        none = torch.zeros_like(condition)
        if self.nothing is not None:
            none = self.nothing.to(condition).expand_as(condition)
        free, given = (self.network(features, level, c) for c in (none, condition))
        output: Tensor = torch.lerp(free, given, self.guidance)
        if self.variance:
            output = torch.stack([output[..., 0], given[..., 1]], -1)
        return output
