"""A folder of transformers: what its files say before the weights are read, and the weights; and
a model in memory with its tokenizer, which say the same.

Weights are read from safetensors alone. Code in a folder (`auto_map`) is refused unless the caller
trusts it, and then what will run is printed; see docs/security.md.
"""

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from nelbo._utils.scalars import integer
from nelbo.diffusion.model import find_device
from nelbo.integrations.configs import read_json
from nelbo.integrations.special_ids import NoTokenizer
from nelbo.integrations.transformers_warnings import without_covered

#: positions of these begin after the id of padding
OFFSET = ("roberta", "xlm-roberta", "camembert", "esm")
#: keys of a configuration for the number of positions
POSITIONS = ("max_position_embeddings", "max_sequence_length", "model_length")
CLASSES = "AutoModelForMaskedLM", "AutoModel", "AutoModelForCausalLM"
#: the maps by which accelerate spreads weights over devices
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
#: files of a tokenizer
TOKENIZERS = ("tokenizer*", "vocab*", "merges*", "*.model")
DECLARE = "give ids, and say what they mean: hf:FOLDER,mask=3,shown=0:1,never=0:1,pad=0 (or none)"
NAMED = 3  # weights in a message
PRECISIONS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class Kind(NamedTuple):
    """Shift of the logits, time input and process of a model; see `wrap_tokens`.

    `blocks`: it is block diffusion, of blocks of `block_size` of the configuration.
    """

    shift: Literal[0, 1] = 0
    time: Literal["masked", "sigma"] | None = None
    process: Literal["masked", "uniform"] = "masked"
    blocks: bool = False


#: by the start of the name of the folder's model type
KINDS: Mapping[str, Kind] = {
    "dream": Kind(shift=1),
    "mdlm": Kind(time="sigma"),
    "udlm": Kind(time="sigma", process="uniform"),
    "duo": Kind(time="sigma", process="uniform"),
    "bd3lm": Kind(time="sigma", blocks=True),
}


@dataclass(frozen=True)
class TextFolder:
    """A folder of transformers whose weights are not read yet; or a module in memory.

    Args:
        home: the folder; the name of the class of a module in memory.
        config: its config.json.
        tokenizer: of transformers.
        trusted: whether its code may run.
        held: the module in memory.
    """

    home: Path
    config: Mapping[str, object]
    tokenizer: Any
    trusted: bool = False
    held: nn.Module | None = None

    @property
    def name(self) -> str:
        """The model type, in small letters."""
        return str(self.config.get("model_type", "")).lower()

    @property
    def kind(self) -> Kind:
        """The kind of the model by its model type; a masked one where that is unknown."""
        return next((v for k, v in KINDS.items() if self.name.startswith(k)), Kind())

    @property
    def positions(self) -> int | None:
        """The largest number of tokens of a text, if the configuration has one."""
        found = next((self.config[key] for key in POSITIONS if key in self.config), None)
        if not isinstance(found, int):
            return None
        pad = self.config.get("pad_token_id")
        return found - (pad + 1 if self.name in OFFSET and isinstance(pad, int) else 0)

    def mask(self, given: int | None) -> int:
        """Return the id of the mask: as given, or of the tokenizer, or of the configuration.

        Raises:
            ValueError: there is none, so that the model may be no masked one.
        """
        own = self.tokenizer.mask_token_id, self.config.get("mask_token_id")
        found = next((i for i in (given, *own) if i is not None), None)
        if not isinstance(found, int):
            give = f"hf:{self.home},mask=ID"
            if self.held is not None:
                give = "integrations.huggingface.load((model, tokenizer), mask_id=ID)"
            raise ValueError(
                f"{self.home} has no mask token, so it is no masked model; got mask_token null; if"
                f" it has one all the same, give its id: {give}"
            )
        return found

    def block(self, given: int | None) -> int | None:
        """Return the tokens of a block: as given, or of the configuration; None for no blocks."""
        if given is None and self.kind.blocks:
            return integer("block_size", self.config.get("block_size"), 1)
        return given

    def module(self, precision: str | None, device_map: str | None) -> tuple[nn.Module, list[str]]:
        """Return the module with its weights, and the names of those that it does not take.

        Args:
            precision: of the weights, a key of PRECISIONS; as they are stored for None.
            device_map: as for `from_pretrained`.

        Raises:
            ImportError: accelerate is missing, which a device_map needs.
            ValueError: the weights are damaged, missing, or do not fit on the devices; or a
                precision or device_map of a module in memory.
        """
        if self.held is not None:
            if precision is not None or device_map is not None:
                raise ValueError(
                    f"{self.home} is in memory, in a precision and place of its own; leave"
                    " precision and device_map out"
                )
            return self.held, []
        if device_map is not None:
            _check_map(device_map)
        options: dict[str, object] = {
            "local_files_only": True,
            "trust_remote_code": self.trusted,
            "use_safetensors": True,
            "dtype": "auto" if precision is None else PRECISIONS[precision],
        }
        if device_map is not None:
            options["device_map"] = device_map
        if self.kind.blocks and "attn_backend" in self.config:
            options["attn_backend"] = "sdpa"  # the one that its sampler takes
        named = self.config.get("auto_map")
        name = CLASSES[0]
        if isinstance(named, dict):
            name = next((each for each in CLASSES if each in named), name)
        make: Callable[..., Any] = getattr(_transformers(), name).from_pretrained
        own = isinstance(named, dict) and device_map is None
        older: Any = partial(self._of_older_code, cast(Any, named), name, options, precision)
        try:
            with without_covered():
                module, found = make(
                    str(self.home),
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are refused below, by name
                    **options,
                )
            missing, left_out = found["missing_keys"], found["unexpected_keys"]
            other = found["mismatched_keys"]
            if own and _has_lost_tensors(module):
                module, missing, left_out = older()
        except SafetensorError as error:
            raise ValueError(
                f"the weights in {self.home} are damaged ({_first(error)}); restore them from a"
                " copy"
            ) from None
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"{self.home} has no masked language model of transformers: {_first(error)}"
            ) from None
        except AttributeError:
            if not own:
                raise
            module, missing, left_out = older()
            other = ()
        kind = type(module).__name__
        for name, stored, wanted in sorted(other):
            raise ValueError(
                f"{self.home} has weights of another size than its config.json says: {name} is"
                f" {tuple(stored)}, and {kind} has {tuple(wanted)}; restore one of the two"
            )
        if missing:
            raise ValueError(
                f"{self.home} lacks weights of {kind}, which would be random: {some_of(missing)}"
            )
        if any(p.is_meta for p in module.parameters()):
            raise ValueError(
                f"{self.home} does not fit on the devices, and device_map {device_map} would fetch"
                " weights for each call from memory or disk, which is not supported; give a"
                " smaller precision (bf16), or cpu"
            )
        return module.eval(), sorted(left_out)

    def _of_older_code(
        self,
        named: Mapping[str, str],
        name: str,
        options: Mapping[str, object],
        precision: str | None,
    ) -> tuple[nn.Module, list[str], list[str]]:
        """Return the module of a class in the folder, and which weights it lacks or leaves out.

        Classes written for transformers 4 (BD3-LM, MDLM, LLaDA) lack what `from_pretrained` of
        transformers 5 sets in `post_init`, or keep plain tensors, which it does not fill.
        """
        transformers = _transformers()
        known = ("local_files_only", "trust_remote_code", "attn_backend")
        given = {key: options[key] for key in known if key in options}
        with without_covered():
            config = transformers.AutoConfig.from_pretrained(str(self.home), **given)
        load = transformers.dynamic_module_utils.get_class_from_dynamic_module
        module = load(named[name], str(self.home), local_files_only=True)(config)
        weights: dict[str, torch.Tensor] = {}
        for path in sorted(self.home.glob("*.safetensors")):
            weights |= load_file(path)
        missing, left_out = module.load_state_dict(weights, strict=False, assign=True)
        if precision is not None:
            module = module.to(PRECISIONS[precision])
        return module, missing, left_out


def _has_lost_tensors(module: nn.Module) -> bool:
    """Return whether a part has a tensor, neither weight nor buffer, that holds no numbers."""
    plain = (value for part in module.modules() for value in vars(part).values())
    return any(isinstance(value, torch.Tensor) and value.is_meta for value in plain)


def of_memory(module: nn.Module, tokenizer: object) -> TextFolder:
    """Return a module and its tokenizer as what a folder of both would be.

    Raises:
        ValueError: the module does not say what it is, as models of transformers do.
    """
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_dict"):
        raise ValueError(
            f"{type(module).__name__} has no config of transformers, which says what it is; give"
            " wrap_tokens(module, mask_id)"
        )
    return TextFolder(Path(type(module).__name__), config.to_dict(), tokenizer, held=module)


def open_folder(
    folder: str | Path, trust_remote_code: bool = False, declared: bool = False
) -> TextFolder:
    """Open a folder of transformers and read its configuration and its tokenizer.

    Args:
        folder: the folder.
        trust_remote_code: run the code that it brings.
        declared: whether the meaning of ids is known without a tokenizer, which it may lack.

    Raises:
        FileNotFoundError: there is no such folder, or no config.json in it.
        ImportError: transformers is missing.
        ValueError: weights that are no safetensors, untrusted code, or no tokenizer.
    """
    home = Path(folder)
    if not home.is_dir():
        raise FileNotFoundError(f"{home} is not a folder; give one that save_pretrained wrote")
    config = read_json(home / "config.json", "a folder of transformers has one")
    _check_weights(home)
    _check_code(home, config, trust_remote_code)
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    if declared and not any(found for each in TOKENIZERS for found in home.glob(each)):
        return TextFolder(home, config, NoTokenizer(home), trust_remote_code)
    # outside of `without_covered`, as the import makes the handler of warnings
    load = _transformers().AutoTokenizer.from_pretrained
    try:
        with without_covered():
            tokenizer = load(str(home), **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{home} has no tokenizer that can be read: {_first(error)}; if there is none,"
            f" {DECLARE}"
        ) from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one without files
        raise ValueError(
            f"{home} has no tokenizer: it has special tokens alone; save the model's with"
            f" tokenizer.save_pretrained(folder), or {DECLARE}"
        )
    return TextFolder(home, config, tokenizer, trust_remote_code)


def placed(module: nn.Module, device_map: str | None) -> str:
    """Return the types of the weights, and where they are if that was asked for."""
    types = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()})
    if device_map is None:
        return ", ".join(types)
    places = sorted({str(p.device) for p in module.parameters()})
    return f"{', '.join(types)} on {', '.join(places)} (device_map {device_map})"


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError:
        raise ImportError(
            "models of Hugging Face need transformers: pip install 'nelbo[text]'"
        ) from None
    found: ModuleType = transformers
    return found


def _check_map(device_map: str) -> None:
    """Raise an error if nothing can place weights so.

    Raises:
        ImportError: accelerate is missing.
        ValueError: it is neither a way to spread weights nor a device of this machine.
    """
    if find_spec("accelerate") is None:
        raise ImportError("device_map needs accelerate: pip install accelerate")
    if device_map not in SPREAD:
        try:
            find_device(device_map)
        except ValueError as error:
            raise ValueError(
                f"device_map is {', '.join(SPREAD)} or a device; got {device_map!r}: {error}"
            ) from None


def _check_weights(home: Path) -> None:
    if any(home.glob("*.safetensors")):
        return
    others = sorted(
        path.name for kind in ("bin", "pt", "pth", "ckpt", "h5") for path in home.glob(f"*.{kind}")
    )
    got = f"got {others[0]}, which can run code when it is read" if others else "got no weights"
    raise ValueError(
        f"weights must be safetensors; {got}: save them with"
        " save_pretrained(folder, safe_serialization=True)"
    )


def _check_code(home: Path, config: Mapping[str, object], trusted: bool) -> None:
    """Refuse code that a folder brings, or print what will run.

    Raises:
        ValueError: the folder names code, and the caller does not trust it.
    """
    named: dict[str, object] = {}
    for file in ("config.json", "tokenizer_config.json"):
        path = home / file
        found = (config if file == "config.json" else read_json(path)) if path.is_file() else {}
        own = found.get("auto_map")
        if isinstance(own, dict):
            named |= own
    if not named:
        return
    what = ", ".join(f"{k}: {v}" for k, v in named.items())
    if not trusted:
        raise ValueError(
            f"{home} would run code of its own ({what}); read it, and if you trust it, give"
            " --trust-remote-code"
        )
    files = ", ".join(path.name for path in sorted(home.glob("*.py")))
    print(f"running code of {home}: {what} ({files or 'from elsewhere'})", file=sys.stderr)


def some_of(names: Collection[str]) -> str:
    """Return the first names of some, in their order, with dots where there are more."""
    return ", ".join(sorted(names)[:NAMED]) + (", .." if len(names) > NAMED else "")


def _first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
