"""Other people's models, measured: `load("diffusers:FOLDER")`, `wrap(network, ...)`.

What the number means and which flags are refused: docs/foreign.md.
"""

from importlib import import_module

from nelbo.integrations.denoisers import spaced, wrap
from nelbo.integrations.external import Foreign

__all__ = ["Foreign", "is_foreign", "load", "spaced", "wrap"]

SOURCES = {
    "diffusers": "nelbo.integrations.diffusers",
    "openai": "nelbo.integrations.openai",
}


def is_foreign(source: str) -> bool:
    """Whether `load` knows the kind of a source."""
    return source.partition(":")[0] in SOURCES and ":" in source


def load(source: str, *, steps: int | None = None) -> Foreign:
    """A model that something else trained, ready to measure. No code in its files is run.

    Args:
        source: "diffusers:FOLDER" or "openai:FILE", and after commas what its flags leave open:
            "clip=yes" or "clip=no", "label=3".
        steps: the model of so many steps; its own number where left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown kind or option, or a model that has no bound; it says why.
    """
    kind, _, rest = source.partition(":")
    if kind not in SOURCES:
        known = " or ".join(f"{name}:PATH" for name in SOURCES)
        raise ValueError(f"a foreign model is {known}; got {source!r}")
    path, *options = rest.split(",")
    clip: bool | None = None
    label: int | None = None
    for option in options:
        name, _, value = option.partition("=")
        if name == "clip" and value in ("yes", "no"):
            clip = value == "yes"
        elif name == "label" and value.isdecimal():
            label = int(value)
        else:
            raise ValueError(f"options are clip=yes, clip=no and label=N; got {option!r}")
    found: Foreign = import_module(SOURCES[kind]).load(path, steps=steps, clip=clip, label=label)
    return found
