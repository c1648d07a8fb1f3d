"""Diffusion language models in folders of Hugging Face's `transformers`.

    BERT, RoBERTa, ModernBERT, ESM, EuroBERT   AutoModelForMaskedLM, classes of transformers itself
    LLaDA-like     code in the folder; a bidirectional decoder, without a time input
    Dream-like     code in the folder; logits shifted by one place
    MDLM-like      code in the folder; time input σ = -log α_t
    UDLM, Duo      code in the folder; uniform-state models, with the same time input
    BD3-LM         code in the folder; block diffusion, called like its own sampler, on the
                   text up to the end of a block (`sample_mode`)

Weights are read from safetensors alone. Code in a folder (`auto_map`) is refused unless the caller
trusts it, and then what will run is printed; see docs/security.md.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from typing_extensions import override

from nelbo._utils.scalars import integer
from nelbo.data.schema import Schema
from nelbo.data.sources import Source, Splits
from nelbo.data.splits import Declared, declare
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import find_device
from nelbo.diffusion.times import ContinuousTime, grid_of
from nelbo.integrations.configs import read_json
from nelbo.integrations.external import Foreign
from nelbo.integrations.text_records import TextForm
from nelbo.integrations.texts import Texts, Tokenizer, drawn, read, same, to_draw
from nelbo.integrations.tokens import TokenModel, wrap_tokens

#: positions of these begin after the id of padding
OFFSET = ("roberta", "xlm-roberta", "camembert", "esm")
#: the maps by which accelerate spreads weights over devices
SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")
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
    time: Literal["sigma"] | None = None
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


class _UpToABlock(nn.Module):
    """The module of BD3-LM for a text that ends with the block to be read."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @override
    def forward(self, ids: Tensor, time: Tensor) -> object:
        return self.module(ids, time, sample_mode=True)


CLASSES = "AutoModelForMaskedLM", "AutoModel", "AutoModelForCausalLM"


@dataclass(frozen=True)
class ForeignText(Foreign):
    """A diffusion language model with its tokenizer; `texts` reads data for it."""

    tokenizer: Tokenizer | None = None
    #: the texts read last, whose characters are known
    found: list[Texts] = field(default_factory=list)

    @override
    def read(
        self,
        source: Source | None,
        split: str | None = None,
        splits: Splits | None = None,
        tell: Callable[[str], object] = str,
        *,
        form: TextForm | None = None,
    ) -> object:
        texts = self._read(source, form or TextForm(), split, declare(splits))
        for note in texts.notes:
            tell(note)
        return texts

    @override
    def select(
        self,
        found: object,
        source: Source,
        split: str | None = None,
        tell: Callable[[str], object] = str,
    ) -> tuple[Tensor | Batch, str]:
        texts = cast(Texts, found)
        self.found[:] = [texts]
        return texts.batch, texts.name

    @override
    def rates(self, nats: float, batch: Batch) -> dict[str, float]:
        known = next((t for t in self.found if same(t.batch, batch)), None)
        return (known or Texts(batch, None, None, ())).rates(nats)

    def texts(
        self,
        source: Source,
        *,
        lines: bool = False,
        prompt_field: str | None = None,
        answer_field: str | None = None,
        split: str | None = None,
    ) -> Texts:
        """Return texts on which to measure the model, as in `evaluate(found, texts.batch)`.

        Args:
            source: a file, a data set of `datasets` (open, its folder or its name), a list of
                texts or of mappings, or ids; see `texts` and `text_records`.
            lines: whether each line of a text file is an example of its own.
            prompt_field: of JSON lines and data sets: the name of the text that shows.
            answer_field: that of the text that is scored.
            split: of a data set.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: texts that do not suit the model, or no such field.
        """
        return self._read(source, TextForm(lines, prompt_field, answer_field), split)

    def to_draw(self, prompts: Sequence[str], length: int | None = None) -> Batch:
        """Return texts to draw after prompts, in place of `texts`; see `texts.to_draw`."""
        assert self.tokenizer is not None
        return to_draw(prompts, length, cast(TokenModel, self.model), self.tokenizer)

    def drawn(self, ids: np.ndarray) -> list[str]:
        """Return the texts of samples, with their prompts; see `texts.drawn`."""
        assert self.tokenizer is not None
        return drawn(ids, self.tokenizer)

    def _read(
        self,
        source: object,
        form: TextForm,
        split: str | None = None,
        splits: Declared | None = None,
    ) -> Texts:
        if source is None:
            raise ValueError(f"{self.name} comes without data; give some with --data")
        assert self.tokenizer is not None
        model = cast(TokenModel, self.model)
        found = read(source, model, self.tokenizer, form, split, splits)
        self.found[:] = [found]
        return found


def load(
    folder: str | Path,
    *,
    trust_remote_code: bool = False,
    steps: int | None = None,
    precision: str | None = None,
    device_map: str | None = None,
    length: int | None = None,
) -> ForeignText:
    """Load a diffusion language model from a folder.

    Args:
        folder: with config.json, *.safetensors and a tokenizer.
        trust_remote_code: run the code that the folder brings (`auto_map`), after printing which.
        steps: number of steps of the model that is measured; continuous time where left out.
        precision: of the weights, a key of PRECISIONS; as they are stored where left out.
        device_map: as for `from_pretrained`, such as "auto"; it needs the library accelerate.
        length: tokens of an example, at most; the model's positions where left out.

    Raises:
        FileNotFoundError: there is no such folder, or no config.json in it.
        ImportError: transformers is missing, or accelerate for a device_map.
        ValueError: weights that are no safetensors, untrusted code, no mask token, a
            left-to-right model, or no such precision.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be {', '.join(PRECISIONS)}; got {precision!r}")
    home = Path(folder)
    if not home.is_dir():
        raise FileNotFoundError(f"{home} is not a folder; give one that save_pretrained wrote")
    config = read_json(home / "config.json", "a folder of transformers has one")
    _check_weights(home)
    _check_code(home, config, trust_remote_code)
    try:
        import transformers
    except ImportError:
        raise ImportError(
            "models of Hugging Face need transformers: pip install 'nelbo[text]'"
        ) from None
    if device_map is not None:
        _check_map(device_map)
    options: dict[str, object] = {
        "local_files_only": True,
        "trust_remote_code": trust_remote_code,
    }
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(home), **options)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{home} has no tokenizer that can be read: {_first(error)}") from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one without files
        raise ValueError(
            f"{home} has no tokenizer: it has special tokens alone; save the model's with"
            " tokenizer.save_pretrained(folder)"
        )
    dtype = None if precision is None else PRECISIONS[precision]
    name = str(config.get("model_type", "")).lower()
    kind = next((v for k, v in KINDS.items() if name.startswith(k)), Kind())
    block = integer("block_size", config.get("block_size"), 1) if kind.blocks else None
    if block is not None and steps is not None:
        raise ValueError("block diffusion is measured in continuous time; leave the steps out")
    if kind.blocks and "attn_backend" in config:
        options["attn_backend"] = "sdpa"  # the one that its sampler takes
    module = _module(transformers, home, config, options, dtype, device_map)
    masked = kind.process == "masked"
    mask = _mask(home, config, tokenizer.mask_token_id) if masked else None
    positions = _positions(config, name)
    if length is not None:
        length = integer("length", length, 1)
        if positions is not None and length > positions:
            raise ValueError(
                f"length must be at most {positions}, the model's number of positions; got"
                f" {length}"
            )
    vocabulary = cast(Any, module).config.vocab_size
    unused = set(range(vocabulary)) - set(tokenizer.get_vocab().values())  # it may have gaps
    model = wrap_tokens(
        _UpToABlock(module) if kind.blocks else module,
        mask,
        shift=kind.shift,
        time=kind.time,
        process=kind.process,
        block=block,
        # padding is never written: lengths are given
        never={*tokenizer.all_special_ids, *unused} - {mask},
        length=positions if length is None else length,
    )
    sampler = "block" if block else "any-order" if masked else "uniform-state"
    notes = (
        f"{type(module).__name__} of {home}: the bound of its {sampler} sampler, -log P(x) given"
        " the tokens that show; special tokens show and are never predicted",
        *(("logits are shifted by one place",) if kind.shift else ()),
        *((f"the model's time input is {kind.time}",) if kind.time else ()),
        f"its weights are {_placed(module, device_map)}",
    )
    shape = (model.length or 1,)
    return ForeignText(
        name=f"hf:{home}",
        model=model,
        schema=Schema("levels", shape, vocabulary),
        times=ContinuousTime() if steps is None else grid_of(model, steps),
        weights=home.name,
        notes=notes,
        tokenizer=cast(Tokenizer, tokenizer),
        placed=device_map is not None,
    )


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


def _placed(module: nn.Module, device_map: str | None) -> str:
    """Return the types of the weights, and where they are if that was asked for."""
    types = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters()})
    if device_map is None:
        return ", ".join(types)
    places = sorted({str(p.device) for p in module.parameters()})
    return f"{', '.join(types)} on {', '.join(places)} (device_map {device_map})"


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


def _module(
    transformers: ModuleType,
    home: Path,
    config: Mapping[str, object],
    options: Mapping[str, object],
    dtype: torch.dtype | None,
    device_map: str | None,
) -> nn.Module:
    named = config.get("auto_map")
    name = CLASSES[0]
    if isinstance(named, dict):
        name = next((each for each in CLASSES if each in named), name)
    more: dict[str, object] = {"use_safetensors": True, "dtype": dtype or "auto"}
    if device_map is not None:
        more["device_map"] = device_map
    make: Callable[..., Any] = getattr(transformers, name).from_pretrained
    try:
        module, found = make(str(home), output_loading_info=True, **options, **more)
    except SafetensorError as error:
        raise ValueError(
            f"the weights in {home} are damaged ({_first(error)}); restore them from a copy"
        ) from None
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{home} has no masked language model of transformers: {_first(error)}"
        ) from None
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(
            f"{home} lacks weights of {type(module).__name__}, which would be random:"
            f" {', '.join(missing[:3])}"
        )
    if any(p.is_meta for p in module.parameters()):
        raise ValueError(
            f"{home} does not fit on the devices, and device_map {device_map} would fetch weights"
            " for each call from memory or disk, which is not supported; give a smaller precision"
            " (bf16), or cpu"
        )
    made: nn.Module = module.eval()
    return made


def _mask(home: Path, config: Mapping[str, object], found: int | None) -> int:
    """Return the id of the mask, of the tokenizer or else of the configuration."""
    mask = found if found is not None else config.get("mask_token_id")
    if not isinstance(mask, int):
        raise ValueError(
            f"{home} has no mask token, so it is no masked model; got mask_token null"
        )
    return mask


def _positions(config: Mapping[str, object], kind: str) -> int | None:
    found = config.get("max_position_embeddings", config.get("max_sequence_length"))
    if not isinstance(found, int):
        return None
    pad = config.get("pad_token_id")
    offset = pad + 1 if kind in OFFSET and isinstance(pad, int) else 0
    return found - offset


def _first(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
