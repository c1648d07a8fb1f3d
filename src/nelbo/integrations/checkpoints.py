"""Weights of any training script: found in a file under any prefix, and loaded into a module.

A file of safetensors, an index of shards, a folder of these (accelerate), or a file of
`torch.save` that holds tensors and plain values alone (.pt, .ckpt of Lightning) may hold a module
several times: as trained, and averaged over the steps (EMA). Each time it is a set of names,

    prefix + name                           model., module., state_dict.model., ema_model., ..
    prefix + name without its dots          LitEma of latent diffusion: model_ema.
    prefix + place among the parameters     shadow_params of diffusers and torch-ema

which is taken whole or not at all. No code in a file is executed.
"""

import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nelbo._utils import limits
from nelbo._utils.arguments import checked
from nelbo._utils.tensor_files import put_weights, read_tensors
from nelbo._utils.text import shortened
from nelbo.integrations.configs import read_json

INDEX = ".safetensors.index.json"
#: matches a name of averaged weights
AVERAGED = re.compile(r"(?<!non[_-])(?<![a-z])(ema|swa)(?![a-z])|averag|shadow", re.IGNORECASE)
COUNTERS = {"decay", "num_updates"}  # of LitEma, beside its weights
DEPTH, NODES = 16, 2**20  # of mappings and lists in a file, at most
LISTED = 5  # sets, or weights, that a message names


@dataclass(frozen=True)
class Weights:
    """A set of weights that was found in a file.

    Args:
        file: name of the file, or of the index of its shards.
        prefix: of its names there, which is left out.
        form: how the names go on: "" as in the module, or "without dots", or "in order".
    """

    file: str
    prefix: str
    form: str = ""

    @property
    def averaged(self) -> bool:
        """Whether the names say that it is an average over the training (EMA)."""
        return bool(AVERAGED.search(self.prefix) or AVERAGED.search(self.file))

    def __str__(self) -> str:
        under = f"under {self.prefix!r}" if self.prefix else "without a prefix"
        form = f", names {self.form}" if self.form else ""
        kind = "averaged, EMA" if self.averaged else "raw"
        return f"those {under} in {shortened(self.file)} ({kind}{form})"


@dataclass(frozen=True)
class _Found:
    """A set of weights.

    Args:
        weights: where they were found.
        keys: their names in the file, by those of the module.
        tensors: all of the file.
    """

    weights: Weights
    keys: Mapping[str, str]
    tensors: Mapping[str, Tensor]


@checked
def load_weights(
    module: nn.Module, path: str | Path, weights: str | None = None
) -> tuple[Weights, list[str]]:
    """Load a module's weights from a file of any training script.

    Args:
        module: whose weights to replace.
        path: a file of safetensors, an index of shards, a folder of these, or a file of tensors by
            `torch.save`.
        weights: which of several sets: "ema", "raw", or a part of a name, such as "ema_model" or
            "model_1".

    Returns:
        The weights that were loaded, with their prefix; and notes on all other decisions.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no such weights, or several sets and `weights` names none; or it could
            run code.
    """
    path = Path(path)
    sets: list[_Found] = []
    nearest = ""
    for file, tensors in _files(path):
        sets += _sets(module, file, tensors)
        nearest = nearest or ("" if sets else _nearest(module, tensors))
    if not sets:
        raise ValueError(
            f"{path} holds no whole set of weights of this {type(module).__name__}{nearest}; was"
            " the module made with the settings of the training?"
        )
    used = {key for each in sets for key in each.keys.values()}
    sets = _of_size(module, sets)
    chosen = _chosen(sets, weights, path)
    others = [each for each in sets if each is not chosen]
    notes = [f"the weights are {chosen.weights}"]
    if others:
        notes.append(f"not used: {_listed(others)}")
    taken = {name: chosen.tensors[key] for name, key in chosen.keys.items()}
    if missing := [name for name in module.state_dict() if name not in taken]:
        beside = [each for each in others if each.weights.file == chosen.weights.file]
        more, where = _beside(module, missing, beside)
        taken |= more
        notes.append(f"for {_listed(missing)}, which they lack: {where}")
    put_weights(module, taken | _unknown(chosen, used), str(path))
    return chosen.weights, notes


def _beside(
    module: nn.Module, names: Sequence[str], sets: Sequence[_Found]
) -> tuple[dict[str, Tensor], str]:
    """Return weights that an average lacks, such as buffers, and where they are from.

    They are those of the only other set of the file, or of the module itself.
    """
    whole = [each for each in sets if not {*names} - {*each.keys}]
    if len(whole) == 1:
        return {n: whole[0].tensors[whole[0].keys[n]] for n in names}, str(whole[0].weights)
    own = module.state_dict()
    return {n: own[n] for n in names}, "as the module had them"


def _unknown(chosen: _Found, used: Set[str]) -> dict[str, Tensor]:
    """Return the tensors under the same prefix that are of no set, by their names after it."""
    if chosen.weights.form == "in order":
        return {}
    prefix = chosen.weights.prefix
    rest = {k.removeprefix(prefix): k for k in chosen.tensors if k.startswith(prefix)}
    return {
        name: chosen.tensors[key]
        for name, key in rest.items()
        if key not in used and name not in COUNTERS
    }


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of safetensors or by `torch.save`; no code in it is run.

    Those in mappings and lists have the names of their places, joined by dots.

    Raises:
        ValueError: it holds other objects than tensors and plain values, or is damaged.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    limits.check_file(path, 2)
    try:
        _check_zip(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = dict(_flat(content))
    except Exception as error:  # a damaged file may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is not a file of tensors only ({reason}); where you trust it, write its"
            ' weights as safetensors: safetensors.torch.save_file(torch.load("'
            f'{path.name}", weights_only=False)["state_dict"], "weights.safetensors")'
        ) from None
    for name, tensor in tensors.items():
        _check_dense(tensor, f"{shortened(name)} in {path}")
    return tensors


def _check_zip(path: Path) -> None:
    """Raise ValueError if a file written by torch.save unpacks to more than its own size."""
    if not zipfile.is_zipfile(path):
        return  # the format of torch.save before 1.6, which is not compressed
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > path.stat().st_size and not limits.trusted():
        raise ValueError(f"it claims to hold {size} bytes, and torch.save does not compress")


def _check_dense(tensor: Tensor, where: str) -> None:
    """Raise ValueError unless each number of a tensor has bytes of its own."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{where} repeats its numbers or is sparse; save the tensor contiguous")


def shards_of(index: Path) -> dict[str, set[str]]:
    """Return the names of the weights in each file that an index of shards names beside it.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: it names none, or files of other folders.
    """
    named = read_json(index).get("weight_map")
    found: dict[str, set[str]] = {}
    for weight, file in named.items() if isinstance(named, dict) else ():
        found.setdefault(str(file), set()).add(weight)
    if not found or any(Path(file).name != file for file in found):
        raise ValueError(f"{index} must name the weights' files beside it in weight_map")
    missing = sorted(file for file in found if not (index.parent / file).is_file())
    if missing:
        one = index.with_name(index.name.removesuffix(".index.json"))
        fix = "copy it there, or write the weights again"
        if one != index and one.is_file():  # a later save in one file leaves the index of shards
            fix = f"or delete the index, if the weights are those of {one.name} now"
        raise FileNotFoundError(
            f"{index} names {len(found)} files of weights, and {shortened(missing[0])} is not"
            f" beside it ({len(missing)} missing); {fix}"
        )
    return found


def read_shards(index: Path) -> dict[str, Tensor]:
    """Return the tensors of all files that an index names.

    Raises:
        ValueError: a file holds other weights than the index says, as after another save.
    """
    found: dict[str, Tensor] = {}
    for file, names in sorted(shards_of(index).items()):
        tensors = read_tensors(index.parent / file)[0]
        for name in sorted(names ^ tensors.keys()):
            raise ValueError(
                f"{shortened(file)} {'lacks' if name in names else 'also has'} the weight"
                f" {shortened(name)}, other than {index} says: they are of two saves; write the"
                " weights again"
            )
        found |= tensors
    return found


def _files(path: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the name and the tensors of each file, those of all its shards under an index."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a file of weights, or its folder")
    if not path.is_dir():
        if path.name.endswith(INDEX):
            yield path.name, read_shards(path)
        else:
            yield path.name, tensors_of(path)
        return
    indexes = sorted(path.glob(f"*{INDEX}"))
    shards = {file for index in indexes for file in shards_of(index)}
    singles = [each for each in sorted(path.glob("*.safetensors")) if each.name not in shards]
    if not indexes and not singles:
        raise ValueError(f"{path} holds no safetensors; give the file of the weights itself")
    for each in (*indexes, *singles):
        yield from _files(each)


def _flat(content: object) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors within mappings and lists, with the names of their places."""
    left: list[tuple[tuple[str, ...], object]] = [((), content)]
    seen = 0
    while left:
        place, value = left.pop()
        seen += 1
        if seen > NODES or len(place) > DEPTH:
            raise ValueError("it nests its values too deep, or has too many")
        if isinstance(value, Tensor):
            yield ".".join(place), value.detach()
        elif isinstance(value, Mapping):
            left += [((*place, str(key)), each) for key, each in value.items()]
        elif isinstance(value, list | tuple):
            left += [((*place, str(i)), each) for i, each in enumerate(value)]


def _sets(module: nn.Module, file: str, tensors: Mapping[str, Tensor]) -> list[_Found]:
    """Return all sets of the module's weights among tensors."""
    own = module.state_dict()
    parameters = [name for name, _ in module.named_parameters()]
    found = [
        _Found(Weights(file, prefix), {name: prefix + name for name in own}, tensors)
        for prefix in _prefixes(own.keys(), tensors)
    ]
    short = {name: name.replace(".", "") for name in parameters}
    if {*short.values()} != {*parameters} and len({*short.values()}) == len(short):
        found += [
            _Found(
                Weights(file, prefix, "without dots"),
                {name: prefix + short[name] for name in parameters},
                tensors,
            )
            for prefix in _prefixes(short.values(), tensors, "")
        ]
    return found + _in_order(module, file, tensors)


def _prefixes(names: Iterable[str], tensors: Mapping[str, Tensor], end: str = ".") -> list[str]:
    """Return the prefixes under which tensors have all of the names; they end with `end`."""
    every = list(names)
    longest = max(every, key=len, default="")
    ends = [key.removesuffix(longest) for key in tensors if longest and key.endswith(longest)]
    return [
        prefix
        for prefix in ends
        if (not prefix or prefix.endswith(end)) and all(prefix + name in tensors for name in every)
    ]


def _in_order(module: nn.Module, file: str, tensors: Mapping[str, Tensor]) -> list[_Found]:
    """Return the sets that are lists of all parameters, or of those that are trained."""
    lists: dict[str, set[int]] = {}
    for key in tensors:
        if match := re.fullmatch(r"(.*\.|)(\d{1,9})", key):
            lists.setdefault(match[1], set()).add(int(match[2]))
    every = list(module.named_parameters())
    found = []
    for prefix, places in lists.items():
        for some in (every, [(n, p) for n, p in every if p.requires_grad]):
            keys = {name: f"{prefix}{i}" for i, (name, _) in enumerate(some)}
            if (
                places == {*range(len(some))}
                and all(tensors[keys[name]].shape == p.shape for name, p in some)
                and any(prefix + name != key for name, key in keys.items())
            ):
                found.append(_Found(Weights(file, prefix, "in order"), keys, tensors))
                break
    return found


def _of_size(module: nn.Module, sets: list[_Found]) -> list[_Found]:
    """Return the sets whose shapes are the module's; all, if none are."""
    own = module.state_dict()
    fits = [
        each
        for each in sets
        if all(own[name].shape == each.tensors[key].shape for name, key in each.keys.items())
    ]
    return fits or sets


def _chosen(sets: Sequence[_Found], weights: str | None, path: Path) -> _Found:
    """Return the set of weights of a name; without one, the only one."""
    if weights in ("ema", "raw"):
        fits = [each for each in sets if each.weights.averaged == (weights == "ema")]
    else:
        part = weights or ""
        names = [(each.weights.file, each.weights.prefix.removesuffix(".")) for each in sets]
        pairs = list(zip(sets, names, strict=True))
        fits = [each for each, own in pairs if part.removesuffix(".") in own]
        fits = fits or [each for each, own in pairs if part in " ".join(own) + "."]
    if len(fits) == 1:
        return fits[0]
    if not fits:
        raise ValueError(f"{path} has no weights {weights!r}; it has {_listed(sets)}")
    raise ValueError(
        f'{path} holds several sets of weights: {_listed(fits)}; choose one: weights="ema",'
        ' "raw" or a part of a name'
    )


def _listed(things: Sequence[_Found] | Sequence[str]) -> str:
    names = [each if isinstance(each, str) else str(each.weights) for each in things]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _nearest(module: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Return a clause on the prefix under which most of a module's names are; "" for none."""
    own = module.state_dict().keys()
    counts: Counter[str] = Counter()
    for key in tensors:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in own:
                counts["".join(f"{part}." for part in parts[:i])] += 1
    if not counts:
        return ""
    ((prefix, count),) = counts.most_common(1)
    lacking = next(name for name in own if prefix + name not in tensors)
    under = f"under {shortened(prefix)!r}" if prefix else "without a prefix"
    return f": {under} it has {count} of {len(own)} names, and lacks {lacking}"


def without_prefix(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return weights without the prefix of training in parallel, and a note if they had it."""
    prefix = "module."
    if not weights or not all(name.startswith(prefix) for name in weights):
        return dict(weights), []
    return {name.removeprefix(prefix): weights[name] for name in weights}, [
        f"the prefix {prefix!r} of the weights' names, of training in parallel, is left out"
    ]
