"""Labels of examples, which a model may be conditioned on: named classes, or real numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nelbo.data.schema import Label
from nelbo.data.tabular.spelling import places_of

NO_CLASS = "-1"  # of an example without a class, if classes are 0, 1, 2, ..


def of_examples(values: np.ndarray, count: int, name: str, where: str) -> np.ndarray:
    """Return the labels of `count` examples, (count,): texts, integers or reals, NaN if missing.

    Raises:
        ValueError: these values cannot be labels.
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
    if values.dtype.kind == "f" and np.isinf(values).any():
        first = int(np.isinf(values).argmax())
        raise ValueError(
            f"the label {name} of example {first} of {where} is {values[first]}; fill or remove it"
        )
    return values


def infer_label(name: str, parts: Mapping[str, np.ndarray], source: str) -> Label:
    """Return the label: strings, integers and booleans are classes, in order; reals are numbers.

    NaN, "" and, beside 0, 1, .., the code -1 mean that an example has no label.

    Args:
        name: name of the label.
        parts: labels (N,) of each part.
        source: name of the source, for messages.

    Raises:
        ValueError: there is one class only, about as many classes as examples, or none; or it is
            unclear whether -1 is a class.
    """
    if all(values.dtype.kind == "f" for values in parts.values()):
        for part, values in parts.items():
            if np.isnan(values).all():
                where = source if part == "all" else f"the {part} split of {source}"
                if part in ("all", "train"):
                    raise ValueError(
                        f"the label {name} of example 0 of {where} is nan, and so are all others;"
                        f" leave --condition {name} out"
                    )
        return Label(name)
    texts = {part: as_text(values) for part, values in parts.items()}
    known = [text for part in texts.values() for text in part if text]
    classes = sorted(set(known), key=_in_order)
    if NO_CLASS in classes and _is_code(name, texts, classes):
        classes.remove(NO_CLASS)
        known = [text for text in known if text != NO_CLASS]
    if len(classes) < 2:
        has = f"are {classes[0]!r}" if classes else "are missing"
        raise ValueError(f"all labels {name} of {source} {has}; leave --condition {name} out")
    if len(classes) > max(len(known) // 2, 2):
        raise ValueError(
            f"the label {name} of {source} takes {len(classes)} values in {len(known)} examples,"
            f" too many for classes; save it as float64 if it is a number"
        )
    return Label(name, tuple(classes))


def _is_code(name: str, texts: Mapping[str, list[str]], classes: list[str]) -> bool:
    """Return whether -1 means that an example has no class, as it does beside 0, 1, 2, ..

    Raises:
        ValueError: the others are 0 and 1 only, so that it may be a third class.
    """
    others = [text for text in classes if text != NO_CLASS]
    if len(others) < 2 or not all(map(str.isdecimal, others)):
        return False
    mixed = any(NO_CLASS in part and len(set(part)) > 1 for part in texts.values())
    if others == ["0", "1"] and mixed:
        raise ValueError(
            f"the labels {name} are -1, 0 and 1: three classes, or two and -1 for none; save them"
            " as words, empty where there is none"
        )
    return True


def codes(values: np.ndarray, label: Label, where: str) -> Tensor:
    """Return labels as indices of their classes, or as numbers; (N,), float64, NaN if missing.

    Raises:
        ValueError: a value is not one of the classes.
    """
    if not label.classes:
        if values.dtype.kind not in "biuf":
            raise ValueError(
                f"the labels {label.name} of {where} must be numbers; got {values[0]}"
            )
        return torch.from_numpy(values.astype(np.float64))
    if values.dtype.kind == "f":  # integer classes become reals if some are missing
        if not np.array_equal(values, np.rint(values), equal_nan=True):
            raise ValueError(f"the labels {label.name} of {where} are numbers, not classes")
        values = np.array(["" if np.isnan(v) else str(int(v)) for v in values.tolist()], str)
    texts = as_text(values)
    place: dict[str, float] = {**places_of({*texts}, label.classes), "": math.nan}
    if all(map(str.isdecimal, label.classes)):
        place[NO_CLASS] = math.nan
    for i, text in enumerate(texts):
        if text not in place:
            raise ValueError(
                f"the label of example {i} of {where} is {text!r}, out of range:"
                f" {label.describe()}"
            )
    return torch.tensor([place[text] for text in texts], dtype=torch.float64)


def missing(labels: Sequence[Label], stored: Mapping[str, Tensor]) -> list[str]:
    """Return a note on the examples of each split that lack a label (N, len(labels)), if any
    do."""
    lacking = {split: int(values.isnan().any(1).sum()) for split, values in stored.items()}
    counts = [f"{n} of {len(stored[split])} {split}" for split, n in lacking.items() if n]
    if not counts:
        return []
    names = " or ".join(label.name for label in labels)
    return [
        f"without {names}: {', '.join(counts)} examples; they are learned and measured by P(x),"
        f" as examples with unknown {names}"
    ]


def standardised(label: Label, train: Tensor) -> Label:
    """Return a real label with mean and spread of the training examples; classes as they are.

    Raises:
        ValueError: the label is constant.
    """
    if label.classes:
        return label
    train = train[~train.isnan()]
    spread = train.std(correction=0).item() if len(train) else 0.0
    if not spread > 0:
        value = f"{train[0]:g}" if len(train) else "missing"
        raise ValueError(f"all labels {label.name} are {value}; leave --condition out")
    return replace(label, mean=train.mean().item(), spread=spread)


def as_text(values: np.ndarray) -> list[str]:
    """Return the names of classes, (N,): strings as they are, integers in decimals."""
    if values.dtype.kind in "biu":
        values = values.astype(object) + 0  # True is 1
    return [str(value) for value in values.tolist()]


def _in_order(name: str) -> tuple[bool, int, str]:
    """Return a sort key: numbers by value, then words."""
    number = name.removeprefix("-").isdecimal()
    return not number, int(name) if number else 0, name
