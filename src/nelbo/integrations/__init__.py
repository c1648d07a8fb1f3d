"""Measure models trained elsewhere: `load("diffusers:FOLDER")`, `wrap(network, ...)`.

See docs/foreign.md for the meaning of the bound and for flags that have none.
"""

import re
from importlib import import_module
from pathlib import Path

from nelbo._utils import limits
from nelbo._utils.arguments import checked
from nelbo.integrations.checkpoints import load_weights
from nelbo.integrations.conditions import Condition
from nelbo.integrations.configs import read_json
from nelbo.integrations.denoisers import wrap
from nelbo.integrations.external import Foreign, with_autocast
from nelbo.integrations.noise_levels import spaced
from nelbo.integrations.tokens import TokenModel, wrap_tokens

__all__ = [
    "Foreign",
    "TokenModel",
    "is_foreign",
    "load",
    "load_weights",
    "spaced",
    "wrap",
    "wrap_tokens",
]

SOURCES = {
    "diffusers": "nelbo.integrations.diffusers",
    "openai": "nelbo.integrations.openai",
    "hf": "nelbo.integrations.huggingface",
}
#: the options after a path, and the form of each
OPTIONS = {
    "diffusers": (
        "clip",
        "label",
        "scaling",
        "levels",
        "keep",
        "variance",
        "weights",
        "law",
        "condition",
    ),
    "openai": ("clip", "label"),
}
NUMBER = r"-?\d+(\.\d+)?"
PATTERNS = {
    "clip": "yes|no",
    "label": r"\d+",
    "scaling": f"{NUMBER}:{NUMBER}",
    "keep": r"\d+(:\d+)*",
    "variance": "small|large|optimal",
    "levels": r"\d+",
    "weights": r"\w[\w.-]*",
    "law": r"[\w.:]+",
    "condition": r".+\.(npy|txt)",
}
SHOWN = {
    "clip": "clip=yes or clip=no",
    "label": "label=N",
    "scaling": "scaling=0:1 (what 0 and 255 are to the network)",
    "keep": "keep=0:4:9 (times of the training)",
    "variance": "variance=small, variance=large or variance=optimal",
    "levels": "levels=16 (of the images; 256 where left out)",
    "weights": "weights=NAME (a variant or a folder)",
    "condition": "condition=FILE.npy (classes, or embeddings of prompts, of each example) or"
    " condition=FILE.txt (a prompt in each line)",
    "law": "law=laplace (of pixels, for a model of latents)",
}


def is_foreign(source: str) -> bool:
    """Return whether `load` knows this kind of source."""
    return source.partition(":")[0] in SOURCES and ":" in source


def source_of(folder: Path) -> str | None:
    """Return the source by which `load` takes a folder of diffusers or transformers, else None.

    Only the names of files and the keys of a config.json are looked at.
    """
    whole = ("model_index.json", "scheduler/scheduler_config.json", "scheduler_config.json")
    if any((folder / name).is_file() for name in whole):
        return f"diffusers:{folder}"
    config = folder / "config.json"
    keys = read_json(config).keys() if config.is_file() else set()
    for key, kind in (("_class_name", "diffusers"), ("model_type", "hf")):
        if key in keys:
            return f"{kind}:{folder}"
    return None


@checked
def load(
    source: str,
    *,
    steps: int | None = None,
    condition: Condition | None = None,
    trust_remote_code: bool = False,
    precision: str | None = None,
    device_map: str | None = None,
) -> Foreign:
    """Load a model that was trained elsewhere, ready to be measured. No code in its files is run.

    Args:
        source: "diffusers:FOLDER" or "openai:FILE", followed after commas by options that its
            flags leave open: "clip=yes" or "clip=no", "label=3", and for a folder "scaling=0:1"
            for x/255 (by default -1:1), "keep=0:4:9" for some of its times, "variance=large" or
            "weights=ema" in place of the default ones; or "hf:FOLDER", a masked language model.
        steps: number of steps of the model; by default its own.
        condition: for a folder of diffusers: c of each example that is to be measured, in their
            order, for the bound on P(x|c).
        trust_remote_code: the one exception: run the code in a folder of hf:.
        precision: for hf:, of the weights: bf16, fp16, float32 or float64; by default as they are
            stored. For the others bf16, by torch.autocast of the network.
        device_map: for hf:, where to put the weights, as for `from_pretrained` of transformers,
            such as "auto".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown kind or option, or a model without a bound (the message says why).
    """
    kind, _, rest = source.partition(":")
    if kind not in SOURCES:
        known = " or ".join(f"{name}:PATH" for name in SOURCES)
        raise ValueError(f"another library's model is given as {known}; got {source!r}")
    if condition is not None and kind != "diffusers":
        raise ValueError(f"a condition is for diffusers:FOLDER; {kind} models take none")
    if kind == "hf":
        from nelbo.integrations.huggingface import load as load_text

        return load_text(
            rest,
            steps=steps,
            trust_remote_code=trust_remote_code,
            precision=precision,
            device_map=device_map,
        )
    if trust_remote_code:
        raise ValueError(f"trust_remote_code is for hf:FOLDER; {kind} models contain no code")
    if precision not in (None, "bf16"):
        raise ValueError(
            f"the precision of {kind}: is bf16, by autocast, or its own; got {precision!r}"
        )
    if device_map is not None:
        raise ValueError(f"device_map is for hf:FOLDER, and this is {kind}:")
    path, options = _options(kind, rest)
    if condition is not None:
        if "condition" in options:
            raise ValueError("give the condition once: after the path, or beside it")
        options["condition"] = condition
    found: Foreign = import_module(SOURCES[kind]).load(path, steps=steps, **options)
    return found if precision is None else with_autocast(found)


def _options(kind: str, rest: str) -> tuple[str, dict[str, object]]:
    """Return the path before the options, which may have commas, and the options by name."""
    pieces = rest.split(",")
    paths = (",".join(pieces[:n]) for n in range(len(pieces), 1, -1))
    path = next((path for path in paths if Path(path).exists()), pieces[0])
    known = OPTIONS[kind]
    found: dict[str, object] = {}
    for option in rest[len(path) + 1 :].split(",") if len(rest) > len(path) else ():
        name, _, value = option.partition("=")
        if name not in known or name in found or not re.fullmatch(PATTERNS[name], value):
            listed = ", ".join(SHOWN[name] for name in known)
            raise ValueError(f"options of {kind}: are {listed}, each once; got {option!r}")
        found[name] = value
    return path, {name: _read(name, str(value)) for name, value in found.items()}


def _read(name: str, value: str) -> object:
    """Return the value of an option."""
    if name == "clip":
        return value == "yes"
    if name == "condition":
        from nelbo.data.readers.arrays import load_npy
        from nelbo.integrations.prompts import read_prompts

        if value.endswith(".txt"):
            return read_prompts(Path(value))
        limits.regular(Path(value))
        return load_npy(Path(value))
    if name in ("label", "levels"):
        return int(value)
    if name == "keep":
        return [int(i) for i in value.split(":")]
    if name == "scaling":
        from nelbo.diffusion.gaussian import Levels

        low, high = map(float, value.split(":"))
        return Levels(256, low, high)
    return value


def __getattr__(name: str) -> object:
    if name not in SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(SOURCES[name])
