"""Prompts, as a pipeline's own text encoders read them.

The pipeline is one in memory, or made of a folder: of a class of diffusers, with text encoders and
tokenizers of the classes of transformers below, so that no code in the folder is run.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from nelbo._utils import limits
from nelbo._utils.text import shortened
from nelbo.integrations.conditions import Condition
from nelbo.integrations.configs import INDEX, read_json
from nelbo.integrations.diffusers_network import MASK, POOLED, PROMPTS, sizes_of

ENCODERS = {"CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"}
TOKENIZERS = {"CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast"}
SIZE = 2**26  # bytes of a file of prompts, at most


def is_prompts(condition: object) -> bool:
    """Return whether a condition is a text, or a list of texts."""
    every = condition if isinstance(condition, list | tuple) else [condition]
    return bool(every) and all(isinstance(each, str) for each in every)


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a text file, one in each line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text of UTF-8, has no line, or is too large.
    """
    if limits.regular(path) > SIZE:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; prompts have at most {SIZE}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; give a prompt in each line") from None
    if not text:
        raise ValueError(f"{path} is empty; give a prompt in each line")
    return text.removesuffix("\n").split("\n")  # str.splitlines would divide at U+2028 too


def pipeline_of(path: Path, network: nn.Module, scheduler: object, vae: nn.Module | None) -> Any:  # noqa: ANN401
    """Return the pipeline of a folder with its text encoders, to read prompts with.

    Args:
        path: of the folder.
        network: of the pipeline.
        scheduler: of the pipeline.
        vae: of the pipeline, if it has one.

    Raises:
        ValueError: its index names no pipeline of diffusers, or text encoders that are not known.
    """
    index = read_json(path / INDEX, "prompts are read for a whole pipeline; give embeddings")
    name = str(index.get("_class_name"))
    kind = getattr(import_module("diffusers"), name, None)
    if not name.endswith("Pipeline") or not isinstance(kind, type):
        raise ValueError(f"{path / INDEX} names {shortened(name, 64)}, no pipeline of diffusers")
    given: dict[str, object] = {"unet": network, "transformer": network, "vae": vae}
    given["scheduler"] = copy.deepcopy(scheduler)  # some pipelines change its steps
    given["requires_safety_checker"] = False
    parts: dict[str, object] = {}
    for part, own in [*signature(kind.__init__).parameters.items()][1:]:  # type: ignore[misc]
        value = index.get(part)
        if part in given:
            parts[part] = given[part]
        elif isinstance(value, list) and part.startswith(("text_encoder", "tokenizer")):
            named = value[-1] is not None  # [None, None] for one that was left out
            parts[part] = _pretrained(path / part, str(value[-1])) if named else None
        elif value is not None and not isinstance(value, list):
            parts[part] = value  # a setting, such as the names of classes
        elif own.default is own.empty:
            parts[part] = None  # it reads no prompts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the steps of the scheduler, which read no prompts
        return kind(**parts)


def _pretrained(home: Path, name: str) -> object:
    """Return a text encoder or a tokenizer in a folder, of a known class of transformers."""
    if name not in ENCODERS | TOKENIZERS:
        raise ValueError(
            f"{home} holds a {shortened(name, 64)}; known are"
            f" {', '.join(sorted(ENCODERS | TOKENIZERS))}; give embeddings in place of prompts"
        )
    try:
        kind: Any = getattr(import_module("transformers"), name)
    except ModuleNotFoundError:
        raise ValueError("prompts need transformers; pip install 'nelbo[text]'") from None
    options: dict[str, object] = {"local_files_only": True}
    if name in ENCODERS:
        options |= {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        with limits.within_memory(f"the text encoder in {home}"):
            found = kind.from_pretrained(str(home), **options)
    except Exception as error:  # a damaged file may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{home} holds no {name} that can be read: {reason}") from None
    if name in TOKENIZERS:
        return found
    module, info = found
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{home} lacks weights of its {name}, such as {missing[0]}")
    return module.eval()


def of_prompts(pipeline: Any, network: nn.Module, prompts: object) -> Condition:  # noqa: ANN401
    """Return the embeddings of prompts by a pipeline's own text encoders, without guidance.

    Raises:
        ValueError: the pipeline has no text encoder, or names no such class.
    """
    every = [prompts] if isinstance(prompts, str) else list(cast("Sequence[str]", prompts))
    if hasattr(pipeline, "get_label_ids"):  # of DiT, which calls classes by their words
        known = pipeline.labels
        if wrong := [each for each in every if each not in known]:
            raise ValueError(f"the pipeline knows no class {wrong[0]!r}")
        labels: Sequence[object] = pipeline.get_label_ids(every)
        return labels
    return _named(pipeline, network, *_encoded(pipeline, network, every, guidance=False)[0])


def of_no_prompt(pipeline: Any, network: nn.Module) -> Condition:  # noqa: ANN401
    """Return the condition that stands for none in the guidance of a pipeline of prompts."""
    return _named(pipeline, network, *_encoded(pipeline, network, [""], guidance=True)[1])


class Encoded(NamedTuple):
    """Prompts as text encoders read them: embeddings, and those of whole prompts or a mask."""

    embeddings: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None


def _encoded(
    pipeline: Any,  # noqa: ANN401
    network: nn.Module,
    prompts: list[str],
    *,
    guidance: bool,
) -> tuple[Encoded, Encoded]:
    """Return what a pipeline makes of prompts and of none."""
    encode = getattr(pipeline, "encode_prompt", None)
    if encode is None:
        raise ValueError(
            f"a {type(pipeline).__name__} has no encode_prompt; give embeddings, condition=(N, L,"
            " E), in place of texts"
        )
    takes = signature(encode).parameters
    options: dict[str, object] = {
        "device": next(network.parameters()).device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": guidance,
    }
    options |= {name: None for name in ("prompt_2", "prompt_3") if name in takes}
    with torch.no_grad():
        found = encode(prompts, **{name: v for name, v in options.items() if name in takes})
    if "prompt_attention_mask" in takes:  # of T5, beside its embeddings
        return Encoded(found[0], mask=found[1]), Encoded(found[2], mask=found[3])
    pooled = found[2:4] if len(found) >= 4 else (None, None)
    return Encoded(found[0], pooled[0]), Encoded(found[1], pooled[1])


def _named(
    pipeline: Any,  # noqa: ANN401
    network: nn.Module,
    embeddings: Tensor,
    pooled: Tensor | None,
    mask: Tensor | None,
) -> Mapping[str, Tensor]:
    """Return embeddings by the keywords of the network."""
    given, takes = {PROMPTS: embeddings}, signature(network.forward).parameters
    about = getattr(network, "config", {})
    if mask is not None and MASK in takes:
        given[MASK] = mask
    if pooled is not None and POOLED in takes:
        given[POOLED] = pooled
    elif pooled is not None and about.get("addition_embed_type") == "text_time":
        given["added_cond_kwargs.text_embeds"] = pooled
    if isinstance(side := about.get("sample_size"), int):
        sizes = sizes_of(about, side * getattr(pipeline, "vae_scale_factor", 1))
        given |= {name: torch.tensor([size]) for name, size in sizes.items()}
    return given
