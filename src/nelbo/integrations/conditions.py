"""Conditions c of P(x|c) for foreign networks: labels or embeddings, under the network's names.

A batch holds the condition of each example as a row of numbers, (N, F). `Given.rows` makes these
of whatever the network takes, class labels (N,), embeddings of prompts (N, L, E) or several of
these by name, and `Conditioned` gives them back to the network in their own shapes and types.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo._utils.text import shortened

Numbers: TypeAlias = int | Sequence[object] | np.ndarray | Tensor
#: one class, or the class or embedding of each example; or such by the network's own names; texts
#: are for pipelines with a text encoder
Condition: TypeAlias = str | Numbers | Mapping[str, Numbers]
LABELS = "class_labels"  # the keyword of networks of diffusers for classes
EXACT = 2**24  # least integer that float32, in which rows reach a network, does not hold


@dataclass(frozen=True)
class Given:
    """A condition as it was given.

    Args:
        values: by the keyword of the network, "" for its third argument, "a.b" for the entry b of
            a mapping a: (N, ...), or (1, ...) for all examples.
    """

    values: Mapping[str, Tensor]

    @staticmethod
    def of(condition: "Condition | Given", name: str = "") -> "Given":
        """Return a condition of numbers, under a keyword if it has none.

        Raises:
            ValueError: it is not of numbers.
        """
        if isinstance(condition, Given):
            condition = dict(condition.values)
        named = condition if isinstance(condition, Mapping) else {"": condition}
        found = {key or name: _tensor(key, value) for key, value in named.items()}
        labels = found.get(LABELS)
        if labels is not None and not labels.is_floating_point() and labels.shape[1:] == (1,):
            found[LABELS] = labels[:, 0]  # a column of labels
        return Given(found)

    @property
    def word(self) -> str:
        """The word for the condition in the record."""
        whole = [not value.is_floating_point() for value in self.values.values()]
        return "class" if all(whole) else "embedding"

    def rows(self, examples: int) -> Tensor:
        """Return the rows (N, F) of N examples, float32.

        Raises:
            ValueError: the condition is of another number of examples.
        """
        rows = []
        for name, value in self.values.items():
            if len(value) not in (1, examples):
                raise ValueError(
                    f"{_called(name)} has {len(value)} values, and there are {examples} examples"
                )
            rows.append(value.expand(examples, *value.shape[1:]).reshape(examples, -1).float())
        return torch.cat(rows, 1)

    def spread(self, count: int) -> "Given":
        """Return the conditions of `count` of the examples, at even distances; or one for all.

        Those of fewer examples are repeated.
        """
        return Given(
            {
                name: value
                if len(value) == 1
                else value[torch.arange(count) * len(value) // count]
                for name, value in self.values.items()
            }
        )


class Conditioned(nn.Module):
    """network(y, time, rows (B, F)) of a network that takes its conditions by name.

    Args:
        network: called with y, the time and the conditions.
        given: their names, shapes and types.
    """

    def __init__(self, network: nn.Module, given: Given) -> None:
        super().__init__()
        self.network = network
        self.parts = [
            (name, tuple(v.shape[1:]), None if v.is_floating_point() else v.dtype)
            for name, v in given.values.items()
        ]

    @override
    def forward(self, y: Tensor, time: Tensor, rows: Tensor) -> object:
        sizes = (torch.Size(shape).numel() for _, shape, _ in self.parts)
        ends = pairwise(accumulate(sizes, initial=0))
        found = {
            name: rows[:, a:b].reshape(-1, *shape).to(dtype or y.dtype)
            for (name, shape, dtype), (a, b) in zip(self.parts, ends, strict=True)
        }
        after = [found.pop("")] if "" in found else []
        named: dict[str, Any] = {}
        for name, value in found.items():
            outer, _, inner = name.partition(".")
            if inner:  # of a mapping that the network takes
                named.setdefault(outer, {})[inner] = value
            else:
                named[name] = value
        return self.network(y, time, *after, **named)


def _called(name: str) -> str:
    return f"the condition {name}".strip()


def _tensor(name: str, value: object) -> Tensor:
    try:
        each = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        texts = np.asarray(value, dtype=object).flatten()
        text = next((each for each in texts if isinstance(each, str)), None)
        got, hint = type(value).__name__, ""
        if text is not None:
            got = shortened(repr(str(text)))
            hint = "; give classes as numbers, and prompts to a pipeline with a text encoder"
        raise ValueError(
            f"{_called(name)} must be labels or embeddings, numbers for each example; got"
            f" {got}{hint}"
        ) from None
    if each.is_floating_point():
        each = each.float()
        if not each.isfinite().all():
            raise ValueError(f"{_called(name)} has values that are not finite")
    else:
        each = each.long()
        if each.numel() and each.abs().max() >= EXACT:
            raise ValueError(f"labels must be below {EXACT}; got {int(each.abs().max())}")
    return each[None] if each.ndim == 0 else each


def check_labels(given: Given, name: str, classes: int) -> None:
    """Raise ValueError unless the labels under a name are of a model's classes."""
    labels = given.values.get(name)
    if labels is None or labels.is_floating_point():
        raise ValueError("the model is of P(x|class): its condition is class labels, integers")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise ValueError(f"labels must be 0..{classes - 1}; got {int(wrong[0])}")


def check_label(label: int | None, classes: int | None) -> None:
    """Raise ValueError unless `label` is valid for a model of `classes` classes, or of none."""
    if classes is None and label is not None:
        raise ValueError(f"label={label} was given to a model without classes; leave it out")
    if classes is not None and (label is None or not 0 <= label < classes):
        raise ValueError(
            f"the model is of P(x|class) with {classes} classes; give a class in"
            f" 0..{classes - 1} for all examples, label=N, or one for each as their condition"
            f" (after the path: ,label=N or ,condition=FILE.npy); got {label}"
        )
