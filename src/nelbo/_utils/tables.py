"""Tables of names, in which a line "name": "module:what" registers a part of the package."""

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any


def resolve(name: str, table: Mapping[str, str]) -> Any:  # noqa: ANN401
    """Return the class, function or other object that a name of a table stands for.

    Raises:
        ValueError: if there is none in the place that the table says.
    """
    try:
        return resolve_name(table[name])
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f'the line "{name}": "{table[name]}" names nothing that can be imported: {error};'
            ' it must be "module:class"'
        ) from error
