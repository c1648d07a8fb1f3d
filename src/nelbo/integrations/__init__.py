"""Measure models trained elsewhere: `load("diffusers:FOLDER")`, `wrap(network, ...)`.

See docs/foreign.md for the meaning of the bound and for flags that have none.
"""

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TypeGuard

from torch import nn

from nelbo._utils import limits
from nelbo._utils.arguments import checked
from nelbo.integrations.checkpoints import load_weights
from nelbo.integrations.conditions import Condition
from nelbo.integrations.configs import read_json
from nelbo.integrations.denoisers import wrap
from nelbo.integrations.external import Foreign, Pair, check_precision, in_precision
from nelbo.integrations.noise_levels import spaced
from nelbo.integrations.texts import TextReader
from nelbo.integrations.tokens import TokenModel, wrap_tokens

__all__ = [
    "Foreign",
    "Pair",
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
        "check",
    ),
    "openai": ("clip", "label", "check"),
    "hf": ("mask", "shown", "never", "pad", "shift", "time", "process", "block", "length"),
}
#: names of options that are others as arguments of `load` of that kind
ARGUMENTS = {"mask": "mask_id", "pad": "pad_id"}
NUMBER = r"-?\d+(\.\d+)?"
IDS = r"none|\d+(-\d+)?(:\d+(-\d+)?)*"
PATTERNS = {
    "clip": "yes|no",
    "check": "yes|no",
    "label": r"\d+",
    "scaling": f"{NUMBER}:{NUMBER}",
    "keep": r"\d+(:\d+)*",
    "variance": "small|large|optimal",
    "levels": r"\d+",
    "weights": r"\w[\w.-]*",
    "law": r"[\w.:]+",
    "condition": r".+\.(npy|txt)",
    "mask": r"\d+",
    "shown": IDS,
    "never": IDS,
    "pad": r"none|-?\d+",
    "shift": "0|1",
    "time": "none|masked|sigma",
    "process": "masked|uniform",
    "block": r"\d+",
    "length": r"\d+",
}
SHOWN = {
    "clip": "clip=yes or clip=no",
    "check": "check=no (a note, not a refusal, where another reading fits better)",
    "label": "label=N",
    "scaling": "scaling=0:1 (what 0 and 255 are to the network)",
    "keep": "keep=0:4:9 (times of the training)",
    "variance": "variance=small, variance=large or variance=optimal",
    "levels": "levels=16 (of the images; 256 where left out)",
    "weights": "weights=NAME (a variant or a folder)",
    "condition": "condition=FILE.npy (classes, or embeddings of prompts, of each example) or"
    " condition=FILE.txt (a prompt in each line)",
    "law": "law=laplace (of pixels, for a model of latents)",
    "mask": "mask=ID (of a hidden token)",
    "shown": "shown=1:2 (ids that show in arrays of ids; ranges as in 5-99; or none)",
    "never": "never=0:5-99 (ids that are never predicted; or none)",
    "pad": "pad=0 (padding at the ends of rows of ids; or none)",
    "shift": "shift=0 or shift=1 (of the logits)",
    "time": "time=none, time=masked or time=sigma (the time input)",
    "process": "process=masked or process=uniform",
    "block": "block=16 (tokens of a block)",
    "length": "length=512 (tokens of a text, at most)",
}


def is_pair(source: object) -> TypeGuard[Pair]:
    """Return whether it is a model of tokens in memory with its tokenizer."""
    if not isinstance(source, tuple) or len(source) != 2:
        return False
    return isinstance(source[0], nn.Module) and hasattr(source[1], "mask_token_id")


def is_foreign(source: object) -> TypeGuard[str | Pair]:
    """Return whether `load` knows this kind of source."""
    if not isinstance(source, str):
        return is_pair(source)
    return source.partition(":")[0] in SOURCES and ":" in source


def name_of(source: str | Pair) -> str:
    """Return a name for a source in a message: itself, or the class of a model in memory."""
    return source if isinstance(source, str) else type(source[0]).__name__


def is_text(source: object) -> bool:
    """Return whether a source is a model of tokens, which takes texts."""
    return is_pair(source) or str(source).partition(":")[0] == "hf"


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
    source: str | Pair,
    *,
    steps: int | None = None,
    condition: Condition | None = None,
    trust_remote_code: bool = False,
    precision: str | None = None,
    device_map: str | None = None,
    first: Callable[[TextReader], object] | None = None,
) -> Foreign:
    """Load a model that was trained elsewhere, ready to be measured. No code in its files is run.

    Args:
        source: "diffusers:FOLDER" or "openai:FILE", followed after commas by options that its
            flags leave open: "clip=yes" or "clip=no", "label=3", "check=no", and for a folder
            "scaling=0:1" for x/255 (by default -1:1), "keep=0:4:9" for some of its times,
            "variance=large" or "weights=ema" in place of the default ones; or "hf:FOLDER", a
            masked language model, with "mask=4", "shown=1:2", "never=0:5-99" or "pad=0" for its
            ids, "shift=1", "time=sigma", "process=uniform" or "block=16" for what its model type
            does not say, and "length=512" for the tokens of a text (`huggingface.load`); or a
            model of transformers in memory with its tokenizer, (model, tokenizer).
        steps: number of steps of the model; by default its own.
        condition: for a folder of diffusers: c of each example that is to be measured, in their
            order, for the bound on P(x|c).
        trust_remote_code: the one exception: run the code in a folder of hf:.
        precision: for hf:, of the weights: bf16, fp16, float32 or float64; by default as they are
            stored. For the others bf16, by torch.autocast of the network.
        device_map: for hf:, where to put the weights, as for `from_pretrained` of transformers,
            such as "auto".
        first: for hf:, called with what reads texts before the weights are read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown kind or option, or a model without a bound (the message says why).
    """
    kind, _, rest = ("hf", "", "") if is_pair(source) else str(source).partition(":")
    if kind not in SOURCES:
        known = " or ".join(f"{name}:PATH" for name in SOURCES)
        raise ValueError(f"another library's model is given as {known}; got {source!r}")
    if condition is not None and kind != "diffusers":
        raise ValueError(f"a condition is for diffusers:FOLDER; {kind} models take none")
    path, options = _options(kind, rest)
    if kind == "hf":
        return import_module(SOURCES[kind]).load(
            source if isinstance(source, tuple) else path,
            **options,
            steps=steps,
            trust_remote_code=trust_remote_code,
            precision=precision,
            device_map=device_map,
            first=first,
        )
    if trust_remote_code:
        raise ValueError(f"trust_remote_code is for hf:FOLDER; {kind} models contain no code")
    check_precision(precision, f"{kind}:")
    if device_map is not None:
        raise ValueError(f"device_map is for hf:FOLDER, and this is {kind}:")
    if condition is not None:
        if "condition" in options:
            raise ValueError("give the condition once: after the path, or beside it")
        options["condition"] = condition
    found: Foreign = import_module(SOURCES[kind]).load(path, steps=steps, **options)
    return in_precision(found, precision)


def _options(kind: str, rest: str) -> tuple[str, dict[str, object]]:
    """Return the path before the options, which may have commas, and the options by name."""
    pieces = rest.split(",")
    paths = (",".join(pieces[:n]) for n in range(len(pieces), 1, -1))
    path = next((path for path in paths if Path(path).exists()), pieces[0])
    known = OPTIONS[kind]
    found: dict[str, object] = {}
    for option in rest[len(path) + 1 :].split(",") if len(rest) > len(path) else ():
        name, _, value = option.partition("=")
        if name not in known:
            listed = ", ".join(SHOWN[name] for name in known)
            raise ValueError(f"options of {kind}: are {listed}, each once; got {option!r}")
        if name in found:
            raise ValueError(f"{name} is given once after a path; got {option!r} again")
        if not re.fullmatch(PATTERNS[name], value):
            raise ValueError(f"{name} after a path is given as {SHOWN[name]}; got {option!r}")
        found[name] = value
    values = {name: _read(name, str(value)) for name, value in found.items()}
    return path, {ARGUMENTS.get(name, name): value for name, value in values.items()}


def _read(name: str, value: str) -> object:
    """Return the value of an option."""
    if name in ("clip", "check"):
        return value == "yes"
    if name == "condition":
        from nelbo.data.readers.arrays import load_npy
        from nelbo.integrations.prompts import read_prompts

        if value.endswith(".txt"):
            return read_prompts(Path(value))
        limits.regular(Path(value))
        return load_npy(Path(value))
    if name in ("shown", "never"):
        return _ids(value)
    if name in ("label", "levels", "mask", "shift", "block", "length"):
        return int(value)
    if name == "pad":
        return value if value == "none" else int(value)
    if name == "keep":
        return [int(i) for i in value.split(":")]
    if name == "scaling":
        from nelbo.diffusion.gaussian import Levels

        low, high = map(float, value.split(":"))
        return Levels(256, low, high)
    return value


def _ids(value: str) -> list[int]:
    """Return the ids of a list such as 0:5-99; of none, an empty one."""
    found: list[int] = []
    for piece in value.split(":") if value != "none" else ():
        first, _, last = piece.partition("-")
        if int(last or first) < int(first):
            raise ValueError(f"a range of ids goes from the smaller to the larger; got {piece!r}")
        found += range(int(first), int(last or first) + 1)
    return found


def __getattr__(name: str) -> object:
    if name not in SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(SOURCES[name])
