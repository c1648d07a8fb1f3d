"""Files of tensors with a checksum: safetensors with their SHA-256, so that damage is noticed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nelbo._utils import limits
from nelbo._utils.files import write
from nelbo._utils.sharding import check_finite, divided_like

HASH = "sha256"
#: bytes of a safetensors header, at most: the names and shapes of 100 000 tensors
HEAD = 2**24
OTHER = "it belongs to another architecture"  # the usual cause of other weights


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, object],
    before: Path | None = None,
) -> None:
    """Write tensors and metadata as one safetensors file.

    Args:
        path: the file.
        tensors: by name.
        about: metadata, ready for JSON.
        before: as for `write`.
    """
    # Clones, because the format refuses names that share memory (the transform of real data).
    whole = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    # One key: the format writes several in no fixed order, and equal runs must give equal files.
    words = {**about, HASH: _sha256(whole, about)}
    write(path, save(whole, {"about": json.dumps(words, sort_keys=True)}), before)


def _sha256(tensors: Mapping[str, Tensor], about: Mapping[str, object]) -> str:
    """Return the hash of all tensors and metadata of a file."""
    digest = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_tensors(path: Path, hashed: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a safetensors file.

    Args:
        path: the file.
        hashed: refuse a file without its SHA-256, such as those of other programs.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, not safetensors, or not as it was written.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a run that has been trained")
    limits.check_file(path, 2)
    _check_head(path)
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        if not isinstance(about, dict):
            raise ValueError(f"its metadata is {about!r}")
        known = about.pop(HASH, None)
        if (hashed or known is not None) and known != _sha256(tensors, about):
            raise ValueError(f"its SHA-256 is not {known}" if known else "it has no SHA-256")
        return tensors, about
    except (SafetensorError, OSError, ValueError, RecursionError, RuntimeError) as error:
        raise ValueError(
            f"{path} is truncated, damaged or not a safetensors file ({error}); restore it from a"
            " copy or train again"
        ) from None


def _check_head(path: Path) -> None:
    """Raise a ValueError if the header of a safetensors file is implausibly large."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if HEAD < size <= path.stat().st_size and not limits.trusted():
        raise ValueError(
            f"the header of {path} has {size} bytes, more than the {HEAD} that are read; set"
            f" {limits.TRUST}=1 if you trust the file"
        )


def put_weights(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    where: str,
    because: str = OTHER,
) -> None:
    """Load tensors into a module.

    Args:
        module: whose state dict to load.
        tensors: by name.
        where: they come from, for the message.
        because: the cause of other names or shapes, for the message.

    Raises:
        ValueError: if the names or shapes are not those of the module, or a value is not finite.
    """
    own = module.state_dict()
    for name in sorted(own.keys() ^ tensors.keys()):
        kind = "lacks" if name in own else "has an unknown"
        raise ValueError(f"{where} {kind} weight {name}: {because}")
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise ValueError(
                f"{name} in {where} has the shape {tuple(tensor.shape)}, and in the model"
                f" {tuple(own[name].shape)}: {because}"
            )
        if own[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(
                f"{name} in {where} is {tensor.dtype}, and in the model {own[name].dtype}"
            )
    module.load_state_dict({name: divided_like(own[name], t) for name, t in tensors.items()})
    check_finite(module, where)
