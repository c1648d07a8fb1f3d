"""Diffusion language models in folders of Hugging Face's `transformers`.

    BERT, RoBERTa, ModernBERT, ESM, EuroBERT   AutoModelForMaskedLM, classes of transformers itself
    LLaDA-like     code in the folder; a bidirectional decoder, without a time input
    Dream-like     code in the folder; logits shifted by one place
    MDLM-like      code in the folder; time input σ = -log α_t
    UDLM, Duo      code in the folder; uniform-state models, with the same time input
    BD3-LM         code in the folder; block diffusion, called like its own sampler, on the
                   text up to the end of a block (`sample_mode`)

What a folder says of itself, and its weights, are read by `text_folder`.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from nelbo._utils.scalars import integer
from nelbo.data.schema import Schema
from nelbo.data.sources import Source, Splits
from nelbo.data.splits import Declared, declare
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.times import ContinuousTime, grid_of
from nelbo.integrations.external import Foreign, Pair
from nelbo.integrations.special_ids import special_ids
from nelbo.integrations.text_folder import (
    PRECISIONS,
    of_memory,
    open_folder,
    placed,
    some_of,
)
from nelbo.integrations.text_records import TextForm
from nelbo.integrations.texts import TextReader, Texts, same
from nelbo.integrations.token_rows import TokenRules
from nelbo.integrations.tokens import TokenModel, check_process, wrap_tokens


class _UpToABlock(nn.Module):
    """The module of BD3-LM for a text that ends with the block to be read."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    @override
    def forward(self, ids: Tensor, time: Tensor) -> object:
        return self.module(ids, time, sample_mode=True)


def _may_mix_types(error: ValueError, module: nn.Module) -> bool:
    """Return whether a call may have failed since code such as BD3-LM's has numbers of float32."""
    narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())
    return narrow and isinstance(error.__cause__, RuntimeError)


@dataclass(frozen=True)
class ForeignText(Foreign):
    """A diffusion language model with its tokenizer; `texts` reads data for it."""

    reader: TextReader | None = None
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

    @override
    def sizes(self, batch: Batch) -> dict[str, Tensor]:
        known = next((t for t in self.found if same(t.batch, batch)), None)
        return {} if known is None else dict(known.sizes)

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
        """Return texts to draw after prompts, in place of `texts`; see `TextReader.to_draw`."""
        return cast(TokenModel, self.model).batch(self._reader.to_draw(prompts, length))

    def drawn(self, ids: np.ndarray) -> list[str]:
        """Return the texts of samples, with their prompts; see `TextReader.drawn`."""
        return self._reader.drawn(ids)

    @property
    def _reader(self) -> TextReader:
        """The reader of texts, by all that is known of the model with its weights."""
        assert self.reader is not None
        return replace(self.reader, rules=cast(TokenModel, self.model).rules)

    def _read(
        self,
        source: object,
        form: TextForm,
        split: str | None = None,
        splits: Declared | None = None,
    ) -> Texts:
        if source is None:
            raise ValueError(f"{self.name} comes without data; give some with --data")
        found = self._reader.read(source, form, split, splits)
        found = replace(found, batch=cast(TokenModel, self.model).batch(found.batch))
        self.found[:] = [found]
        return found


def load(
    folder: str | Path | Pair,
    *,
    trust_remote_code: bool = False,
    steps: int | None = None,
    precision: str | None = None,
    device_map: str | None = None,
    mask_id: int | None = None,
    shift: Literal[0, 1] | None = None,
    time: Literal["none", "masked", "sigma"] | None = None,
    process: Literal["masked", "uniform"] | None = None,
    block: int | None = None,
    shown: Collection[int] | None = None,
    never: Collection[int] | None = None,
    pad_id: int | Literal["none"] | None = None,
    length: int | None = None,
    first: Callable[[TextReader], object] | None = None,
) -> ForeignText:
    """Load a diffusion language model from a folder.

    What is left out is what the folder says, or its model type (`text_folder.KINDS`).

    Args:
        folder: with config.json, *.safetensors and a tokenizer; without one it takes ids alone, if
            `shown`, `never` and `pad_id` are given. Or a model in memory with its tokenizer.
        trust_remote_code: run the code that the folder brings (`auto_map`), after printing which.
        steps: number of steps of the model that is measured; continuous time where left out.
        precision: of the weights, a key of PRECISIONS; as they are stored where left out.
        device_map: as for `from_pretrained`, such as "auto"; it needs the library accelerate.
        mask_id: id of a hidden token.
        shift: 1 where the logits at a place predict the next token, see `wrap_tokens`.
        time: the module's time input, "none", "masked" or "sigma".
        process: "masked", or "uniform" for a uniform-state model.
        block: tokens of a block, for block diffusion.
        shown: ids that show wherever they are in arrays of ids; the tokenizer's special tokens
            where left out. In texts the special tokens show that the tokenizer adds.
        never: ids that cannot be predicted, beside the mask and those that the tokenizer lacks;
            the tokenizer's special tokens where left out.
        pad_id: id of padding at either end of a row of an array, or "none"; the tokenizer's where
            left out.
        length: tokens of an example, at most; the model's positions where left out.
        first: called with what reads texts for the model before the weights are read, so that a
            mistake in the texts costs no wait.

    Raises:
        FileNotFoundError: there is no such folder, or no config.json in it.
        ImportError: transformers is missing, or accelerate for a device_map.
        ValueError: weights that are no safetensors, untrusted code, no mask token, a
            left-to-right model, no such precision, or ids that the model does not have.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision must be {', '.join(PRECISIONS)}; got {precision!r}")
    declared = None not in (shown, never, pad_id)
    if isinstance(folder, tuple):
        found = of_memory(*folder)
    else:
        found = open_folder(folder, trust_remote_code, declared)
    home, kind, positions = found.home, found.kind, found.positions
    shift = kind.shift if shift is None else shift
    own_time = kind.time if time is None else None if time == "none" else time
    process = process or kind.process
    mask = found.mask(mask_id) if process == "masked" else mask_id
    block = check_process(process, mask, found.block(block))
    if block is not None and steps is not None:
        raise ValueError(
            "steps of block diffusion are divided among the blocks of the texts, which are not"
            " known yet: give the steps with the texts, as in evaluate(found, texts, steps=...)"
        )
    if length is not None:
        length = integer("length", length, 1)
        if positions is not None and length > positions:
            raise ValueError(
                f"length must be at most {positions}, the model's number of positions; got"
                f" {length}"
            )
    length = positions if length is None else length
    special = special_ids(found.tokenizer, mask, shown, never, pad_id)
    count = found.config.get("vocab_size")
    count = count if isinstance(count, int) else None
    if count is not None:
        special.check(count)
    rules = TokenRules(count, mask, frozenset(special.never), length)
    reader = TextReader(found.tokenizer, special, rules)
    if first is not None:
        first(reader)
    module, left_out = found.module(precision, device_map)
    vocabulary = cast(Any, module).config.vocab_size
    known = {*found.tokenizer.get_vocab().values()}  # it may have gaps
    unused = {*range(vocabulary)} - known if known else set()
    stored = placed(module, device_map)
    wrapped = partial(
        wrap_tokens,
        _UpToABlock(module).eval() if kind.blocks else module,
        mask,
        shift=shift,
        time=own_time,
        process=process,
        block=block,
        # padding is never written: lengths are given
        never={*special.never, *unused} - {mask},
        length=length,
    )
    try:
        model = wrapped()
    except ValueError as error:
        if found.held is not None or not _may_mix_types(error, module):
            raise
        if precision is not None:
            raise ValueError(
                f"{error}; or leave --precision {precision} out, in which its code may fail"
            ) from None
        module.float()  # which holds each number of fewer bits
        model = wrapped()
        stored = (
            f"{placed(module, device_map)}, exactly those of {stored}, in which its code fails"
        )
    special.check(model.network.vocabulary)
    sampler = "block" if block else "any-order" if process == "masked" else "uniform-state"
    notes = (
        f"{type(module).__name__} {'in memory' if found.held else f'of {home}'}: the bound of its"
        f" {sampler} sampler, -log P(x) given the tokens that show",
        special.note_of_never(len(unused - {mask, *special.never})),
        *(("logits are shifted by one place",) if shift else ()),
        *((f"the model's time input is {own_time}",) if own_time else ()),
        f"its weights are {stored}",
        *(
            (f"{len(left_out)} weights in the folder are none of the model: {some_of(left_out)}",)
            if left_out
            else ()
        ),
    )
    return ForeignText(
        name=f"hf:{home}" if found.held is None else str(home),
        model=model,
        schema=Schema("levels", (model.length or 1,), vocabulary),
        times=ContinuousTime() if steps is None else grid_of(model, steps),
        weights=home.name,
        notes=notes,
        reader=reader,
        placed=device_map is not None,
    )
