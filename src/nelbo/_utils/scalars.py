"""Numbers from users: those of NumPy and torch are accepted, texts and NaN are not."""

import numbers
from typing import Any

LARGEST = 1.7e308  # about the largest float64


def plain(value: object) -> Any:  # noqa: ANN401 - any value comes through
    """Return the value, with scalars of NumPy and torch, alone or in a tuple, as those of Python.

    >>> import numpy as np
    >>> plain(np.int64(32)), plain((np.float32(0.5), 1))
    (32, (0.5, 1))
    """
    if type(value) in (str, int, float, bool):
        return value  # quickly: most are
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    scalar = isinstance(value, numbers.Number | str) or getattr(value, "shape", None) == ()
    return value.item() if scalar and hasattr(value, "item") else value


def integer(name: str, value: object, least: int | None = None) -> int:
    """Return the value as an integer.

    Raises:
        ValueError: if it is not one, or less than `least`.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer; got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    return value


def real(name: str, value: object) -> float:
    """Return the value as a finite float.

    Raises:
        ValueError: if it is not one.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        raise ValueError(f"{name} must be a finite number; got {value!r}")
    return float(value)
