"""Measure models trained elsewhere: `load("diffusers:FOLDER")`, `wrap(network, ...)`.

See docs/foreign.md for the meaning of the bound and for flags that have none.
"""

from importlib import import_module

from nelbo.integrations.denoisers import spaced, wrap
from nelbo.integrations.external import Foreign
from nelbo.integrations.tokens import TokenModel, wrap_tokens

__all__ = ["Foreign", "TokenModel", "is_foreign", "load", "spaced", "wrap", "wrap_tokens"]

SOURCES = {
    "diffusers": "nelbo.integrations.diffusers",
    "openai": "nelbo.integrations.openai",
    "hf": "nelbo.integrations.huggingface",
}


def is_foreign(source: str) -> bool:
    """Return whether `load` knows this kind of source."""
    return source.partition(":")[0] in SOURCES and ":" in source


def load(source: str, *, steps: int | None = None, trust_remote_code: bool = False) -> Foreign:
    """Load a model that was trained elsewhere, ready to be measured. No code in its files is run.

    Args:
        source: "diffusers:FOLDER" or "openai:FILE", followed after commas by options that its
            flags leave open: "clip=yes" or "clip=no", "label=3"; or "hf:FOLDER", a masked
            language model.
        steps: number of steps of the model; by default its own.
        trust_remote_code: the one exception: run the code that a folder of hf: brings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown kind or option, or a model without a bound (the message says why).
    """
    kind, _, rest = source.partition(":")
    if kind not in SOURCES:
        known = " or ".join(f"{name}:PATH" for name in SOURCES)
        raise ValueError(f"a foreign model is {known}; got {source!r}")
    if kind == "hf":
        from nelbo.integrations.huggingface import load as load_text

        return load_text(rest, steps=steps, trust_remote_code=trust_remote_code)
    if trust_remote_code:
        raise ValueError(f"trust_remote_code is for hf:FOLDER; {kind} models bring no code")
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
