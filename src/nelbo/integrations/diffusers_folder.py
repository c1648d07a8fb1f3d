"""Read a folder written by diffusers without running any code in it."""

import glob
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import UnionType
from typing import Any, get_args

from torch import Tensor, nn

from nelbo._utils import limits
from nelbo._utils.tensor_files import put_weights, read_tensors
from nelbo._utils.text import shortened
from nelbo.integrations.checkpoints import read_shards, without_prefix
from nelbo.integrations.configs import INDEX, Config, read_json

NETWORKS = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
)
WEIGHTS = "diffusion_pytorch_model"
#: files of weights that are added to those of a network
ADAPTERS = ("*lora*.safetensors", "adapter_model*.safetensors")
SHOWN = 80  # characters of a name from a folder, in a message
#: matches the name of a class or folder of an autoencoder
AUTOENCODER = re.compile("autoencoder|vae|vq", re.IGNORECASE)
#: matches the name of a pipeline whose network models latents
LATENT = re.compile("latent|^ldm", re.IGNORECASE)
#: flags of a scheduler that state how the network was trained: one that the class of the scheduler
#: does not have, with any other value than this, makes another model
TRAINING = {"rescale_betas_zero_snr": False, "prediction_type": "epsilon", "sigma_data": None}
#: former keys of schedulers, and the present one
OLD_KEYS = {
    "predict_epsilon": 'prediction_type, "epsilon" if it was true and "sample" if false',
    "timesteps": "num_train_timesteps",
}
#: what a parameter that is annotated so takes, and words for it
NUMBERS: dict[object, tuple[type | UnionType, str]] = {
    int: (int, "one whole number"),
    float: (int | float, "one number"),
    bool: (int | float, "true or false"),
}
HARMLESS = {"tensor_format"}  # a former key without a meaning
#: keys of diffusers' EMAModel, which it writes into the config of the network of its averages
AVERAGING = {
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
}
#: former names of attention weights, and their present names
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def autoencoder_of(path: Path) -> str | None:
    """Return the place where a pipeline names or holds an autoencoder, or None.

    The network of such a pipeline models latents.
    """
    for name, kind in _components(path):
        if AUTOENCODER.search(name) or AUTOENCODER.search(kind):
            return shortened(f"{name}: {kind}" if kind else name, SHOWN)
    index = path / INDEX
    pipeline = str(read_json(index).get("_class_name")) if index.is_file() else ""
    return shortened(f"{INDEX}: {pipeline}", SHOWN) if LATENT.search(pipeline) else None


def _components(path: Path) -> Iterator[tuple[str, str]]:
    """Yield names and classes of the parts of a pipeline, from its index and its folders.

    An unknown class is "".
    """
    index = path / INDEX
    for name, value in read_json(index).items() if index.is_file() else ():
        # [library, class], or [None, None] for a part that was left out
        if isinstance(value, list) and len(value) == 2 and value[1] is not None:
            yield name, str(value[1])
    for config in sorted(path.glob("*/config.json")):
        yield config.parent.name, str(read_json(config).get("_class_name", ""))
    for part in sorted(path.iterdir()):
        if part.is_dir():
            yield part.name, ""


def home_of(path: Path, weights: str | None) -> tuple[Path, str | None, list[str]]:
    """Return the folder of the network, the variant of its weights and a note on other folders.

    Args:
        path: of the pipeline.
        weights: a folder of other weights, such as unet_ema, or a variant, such as fp16.
    """
    names = ("unet", "transformer")
    home = next((path / name for name in names if (path / name).is_dir()), path)
    if weights is not None and (path / weights / "config.json").is_file():
        return path / weights, None, []
    notes = [
        f"the weights in {home.name} are measured; for those in {name}, add ,weights={name} to the"
        " path"
        for name in (beside(home) if home != path else ())
    ]
    return home, weights, notes


def adapters_of(path: Path, home: Path) -> list[str]:
    """Return notes on weights that change those of the network, and are not applied.

    Raises:
        ValueError: there is no network beside them.
    """
    folders = dict.fromkeys((path, home))
    files = [file for f in folders for name in ADAPTERS for file in sorted(f.glob(name))]
    if not files:
        return []
    fix = "pipeline.load_lora_weights, fuse_lora and save_pretrained write a folder with them"
    names = shortened(", ".join(f"{file.relative_to(path)}" for file in files), SHOWN)
    if not (home / "config.json").is_file():
        raise ValueError(f"{path} has no network, only changes of another's, {names}; {fix}")
    return [f"the changes of the weights in {names} (LoRA) are not applied; {fix}"]


def beside(home: Path) -> list[str]:
    """Return the names of folders of other weights beside that of a network, such as unet_ema."""
    configs = sorted(home.parent.glob(f"{glob.escape(home.name)}*/config.json"))
    names = [config.parent.name for config in configs]
    return [shortened(name, SHOWN) for name in names if name != home.name]


def network_of(
    home: Path, variant: str | None = None, kinds: tuple[str, ...] = NETWORKS
) -> tuple[nn.Module, str, list[str]]:
    """Return the network in a folder with exactly its weights, the name of its class, and notes.

    The weights are the default ones, or those of a variant, such as fp16.
    """
    config = read_json(home / "config.json")
    config = {name: config[name] for name in config if name not in AVERAGING}
    kind = str(config.get("_class_name"))
    if kind not in kinds:
        raise ValueError(
            f"{home} holds a {shortened(kind, SHOWN)}; known are {', '.join(kinds)}; wrap another"
            " in memory with nelbo.integrations.wrap"
        )
    files = _files_of(home, variant)
    if not files:
        pickled = any(home.glob("*.bin"))
        why = "only .bin, a format that can hold code" if pickled else "none"
        raise ValueError(
            f"{home} must hold its weights as {WEIGHTS}.safetensors; it has {why}; write it with"
            " save_pretrained(folder, safe_serialization=True)"
        )
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= read_shards(file) if file.suffix == ".json" else read_tensors(file)[0]
    weights, notes = without_prefix(weights)
    if variant is not None or not files[0].name.startswith((f"{WEIGHTS}.s", f"{WEIGHTS}-")):
        notes.append(f"the weights are those of {shortened(files[0].name, SHOWN)}")
    with limits.within_file(weights, home):
        network: nn.Module = made(config, home / "config.json")
    check_keys(config, type(network), f"{home / 'config.json'}")
    put_weights(network, {_renamed(name, weights): weights[name] for name in weights}, str(home))
    return network.eval(), kind, notes


def _files_of(home: Path, variant: str | None) -> list[Path]:
    """Return the files of a variant of the weights, or the default ones, as diffusers finds them.

    They are the index of shards, or else the single file. Without a name, those of a variant are
    taken if there are no others.

    Raises:
        ValueError: there is no such variant, or there are several and none by default.
    """
    dotted = "" if variant is None else f".{variant}"
    index = home / f"{WEIGHTS}.safetensors.index{dotted}.json"
    one = home / f"{WEIGHTS}{dotted}.safetensors"
    if index.is_file():
        return [index]
    if one.is_file():
        return [one]
    files = sorted(home.glob(f"{WEIGHTS}*.safetensors"))
    variants = {re.sub(r"-\d+-of-\d+", "", file.name) for file in files}
    several = shortened(", ".join(sorted(variants)))
    if variant is not None:
        folders = beside(home)
        near = next((name for name in folders if variant in name), "".join(folders[:1]))
        other = f"; for those in {near}, add ,weights={near} to the path" if near else ""
        raise ValueError(
            f"{home} has no weights of {variant!r}; it has {several or 'none'}{other}"
        )
    if len(variants) > 1:
        raise ValueError(
            f"{home} has weights of several variants, {several}, and none by default; keep one, or"
            " name it after the path: ,weights=fp16"
        )
    return files


def _renamed(name: str, weights: Mapping[str, Tensor]) -> str:
    """Return the present name of a weight of an attention layer in an old file."""
    place, _, leaf = name.rpartition(".")
    block, _, part = place.rpartition(".")
    old = part in OLD_NAMES and f"{block}.proj_attn.{leaf}" in weights
    return f"{block}.{OLD_NAMES[part]}.{leaf}" if old else name


def made(config: Config, where: Path) -> Any:  # noqa: ANN401
    """Create the object of diffusers that a config describes."""
    try:
        library = import_module("diffusers")
    except ModuleNotFoundError:
        raise ValueError(
            "diffusers models need the package diffusers; pip install 'nelbo[diffusers]'"
        ) from None
    limits.check_integers(config.values(), limits.STEPS, f"a number in {where}")
    name = str(config.get("_class_name"))
    with described(f"{where} describes no {shortened(name, 64)}"):
        kind = getattr(library, name, None)
        if kind is None:
            raise ValueError(f"{where} names {shortened(name, 64)}, which diffusers lacks")
        _check_numbers(config, kind, where)
        try:
            found = kind.from_config(dict(config))
        except NotImplementedError as error:  # a name that the class does not know
            raise ValueError(_unknown(config, error, where)) from error
        except ValueError as error:
            raise ValueError(f"{where}: {shortened(' '.join(str(error).split()), 300)}") from error
        if found is None:  # a class that diffusers no longer has
            raise ValueError(
                f"{where} describes a {shortened(name, 64)}, which diffusers no longer has"
            )
        return found


def _unknown(config: Config, error: NotImplementedError, where: Path) -> str:
    """Return the sentence about a value that the class of a config does not know."""
    key = next((k for k, v in config.items() if str(error).startswith(f"{v} ")), None)
    given = "a value" if key is None else shortened(f"{key}={config[key]!r}", SHOWN)
    fix = "a value that it knows"
    if key == "beta_schedule":
        fix = "squaredcos_cap_v2 for a cosine, or the β's of the training as trained_betas"
    return f"{where} has {given}, which a {config['_class_name']} does not know; write {fix}"


def _check_numbers(config: Config, kind: type, where: Path) -> None:
    """Raise ValueError for a value that is no number, of a parameter that is annotated as one."""
    for name, parameter in signature(kind.__init__).parameters.items():  # type: ignore[misc]
        value, annotation = config.get(name), parameter.annotation
        if value is None:
            continue
        takes = ""
        if annotation in NUMBERS:
            kinds, word = NUMBERS[annotation]
            takes = "" if isinstance(value, kinds) else word
        elif any(get_args(part) == (float,) for part in get_args(annotation)):
            numbers = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
            takes = "" if numbers else "a list of numbers"
        if takes:
            raise ValueError(
                f"{where} has {shortened(f'{name}={value!r}', SHOWN)}, where a {kind.__name__}"
                f" takes {takes}; write that"
            )


def check_keys(config: Config, kind: type, where: str) -> None:
    """Raise ValueError for a key that the class does not have, which diffusers passes over.

    A scheduler may have those of the classes for which it can be exchanged, unless they state how
    the network was trained.
    """
    name, own = kind.__name__, signature(kind.__init__).parameters.keys()  # type: ignore[misc]
    unknown = {
        key: value
        for key, value in config.items()
        if key not in own and not key.startswith("_") and value is not None
    }
    if not unknown:
        return
    for key, plain in TRAINING.items():
        if unknown.get(key, plain) != plain:
            raise ValueError(
                f"{where} has {key}={str(unknown[key]).lower()}, as the network was trained, and a"
                f" {name} ignores it; give the scheduler of the training, such as DDPMScheduler"
            )
    others: set[str] = {*HARMLESS}
    if name.endswith("Scheduler"):
        made_of = import_module("diffusers").DDPMScheduler().compatibles
        others.update(*(signature(other.__init__).parameters for other in made_of))
    for key, value in unknown.items():
        if key not in others:
            close = get_close_matches(key, own, 1)
            fix = OLD_KEYS.get(key) or (close[0] if close else "a key that it has, or none")
            raise ValueError(
                f"{where} has {shortened(f'{key}={value!r}', SHOWN)}, and a {name} has no such"
                f" key: it would be ignored silently; write {fix}"
            )


@contextmanager
def described(what: str) -> Iterator[None]:
    """Turn any exception from diffusers reading a description into a one-sentence ValueError."""
    try:
        yield
    except (ValueError, OSError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no message"
        raise ValueError(f"{what}: {type(error).__name__}: {shortened(reason, 300)}") from error
