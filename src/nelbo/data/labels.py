"""Labels of examples, which a model may be conditioned on: classes by name, or real numbers."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nelbo.data.schema import Label


def of_examples(values: np.ndarray, count: int, name: str, where: str) -> np.ndarray:
    """Labels as found, of `count` examples, as (count,) texts, integers or finite reals.

    Raises:
        ValueError: if they are none.
    """
    if values.shape not in ((count,), (count, 1)):
        raise ValueError(
            f"the labels {name} of {where} have the shape {values.shape} for {count} examples;"
            f" give one for each"
        )
    if values.dtype.kind not in "biufU":
        raise ValueError(
            f"the labels {name} of {where} have the type {values.dtype}; save them as integers,"
            f" float64 or strings"
        )
    values = values.reshape(count)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        first = int((~np.isfinite(values)).argmax())
        raise ValueError(
            f"the label {name} of example {first} of {where} is {values[first]}; fill or remove it"
        )
    return values


def infer_label(name: str, parts: Mapping[str, np.ndarray], source: str) -> Label:
    """Strings, integers and booleans are classes, in their order; reals are numbers.

    Args:
        name: of the label.
        parts: (N,) of each part.
        source: for messages.

    Raises:
        ValueError: if there is one class only, or about as many as examples.
    """
    if all(values.dtype.kind == "f" for values in parts.values()):
        return Label(name)
    values = [text for part in parts.values() for text in as_text(part)]
    classes = sorted(set(values), key=_in_order)
    if len(classes) < 2:
        raise ValueError(
            f"all labels {name} of {source} are {classes[0]!r}; leave --condition {name} out"
        )
    if len(classes) > max(len(values) // 2, 2):
        raise ValueError(
            f"the label {name} of {source} takes {len(classes)} values in {len(values)} examples,"
            f" which are no classes; save it as float64 if it is a number"
        )
    return Label(name, tuple(classes))


def codes(values: np.ndarray, label: Label, where: str) -> Tensor:
    """Labels as the places of their classes, or as numbers; (N,), float64.

    Raises:
        ValueError: if one is none of the classes.
    """
    if not label.classes:
        if values.dtype.kind not in "biuf":
            raise ValueError(
                f"the labels {label.name} of {where} must be numbers; got {values[0]}"
            )
        return torch.from_numpy(values.astype(np.float64))
    place = {name: i for i, name in enumerate(label.classes)}
    texts = as_text(values)
    for i, text in enumerate(texts):
        if text not in place:
            raise ValueError(
                f"the label of example {i} of {where} is {text!r}, out of range:"
                f" {label.describe()}"
            )
    return torch.tensor([place[text] for text in texts], dtype=torch.float64)


def standardised(label: Label, train: Tensor) -> Label:
    """A real label with mean and spread of the training examples; classes as they are.

    Raises:
        ValueError: if the label is constant.
    """
    if label.classes:
        return label
    spread = train.std(correction=0).item()
    if not spread > 0:
        raise ValueError(f"all labels {label.name} are {train[0]:g}; leave --condition out")
    return replace(label, mean=train.mean().item(), spread=spread)


def as_text(values: np.ndarray) -> list[str]:
    """The names of classes: strings as they are, integers in decimals; (N,)."""
    if values.dtype.kind in "biu":
        values = values.astype(object) + 0  # True is 1
    return [str(value) for value in values.tolist()]


def _in_order(name: str) -> tuple[bool, int, str]:
    """Numbers by value, then words."""
    number = name.removeprefix("-").isdecimal()
    return not number, int(name) if number else 0, name
