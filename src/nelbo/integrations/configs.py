"""Configs of other libraries' models: JSON objects, whose values are checked when read."""

from collections.abc import Mapping
from pathlib import Path

from nelbo._utils import limits

Config = Mapping[str, object]
INDEX = "model_index.json"  # the config of a pipeline of diffusers


def read_json(
    path: Path, hint: str = "a model has one beside its weights", infinite: bool = False
) -> dict[str, object]:
    """Read a JSON object from a file; `infinite` as for `limits.read_json`.

    Raises:
        FileNotFoundError: there is no such file; the message ends with `hint`.
        ValueError: the file is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {hint}")
    found = limits.read_json(path, infinite)
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object; got {type(found).__name__}")
    return found


def positive(config: Config, name: str) -> int:
    """Return a number of a config, if it is a positive integer."""
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}")
    return value
