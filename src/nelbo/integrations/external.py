"""A foreign model with everything that `nelbo evaluate` needs to know."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from nelbo.data.coerce import name_of
from nelbo.data.rows import Rows
from nelbo.data.schema import Dataset, Schema
from nelbo.data.sources import Source, Splits, load_like
from nelbo.diffusion.batch import Batch, rows_of
from nelbo.diffusion.gaussian import Affine, Levels
from nelbo.diffusion.latent import LatentModel
from nelbo.diffusion.model import Model
from nelbo.diffusion.times import TimeDiscretization
from nelbo.integrations.conditions import Given
from nelbo.integrations.text_records import TextForm

#: a model of transformers in memory, and its tokenizer
Pair: TypeAlias = tuple[nn.Module, Any]

LEAVE_OUT = 10  # of so many examples one is left out, to fit parts of a model to
FITTED = 1024  # examples to which they are fitted, at most


@dataclass(frozen=True)
class Foreign:
    """A foreign model, as returned by `nelbo.integrations.load`.

    Args:
        name: the source.
        model: the model whose bound is measured.
        schema: the schema of one example.
        times: the times of the model's own sampler, or continuous time.
        weights: the name of the weights, for the record.
        notes: one sentence for each choice that determines the meaning of the bound.
        condition: c, where the bound is one on P(x|c) of conditions in memory.
        fit: fits parts of the model that no file has to examples that are not measured, and
            returns a note on them.
        placed: whether the weights are on devices already, from which nothing moves them.
        nothing: returns the condition that stands for none in guidance, if the model has one.
        of_steps: returns the model of another number of steps, of the same network.
    """

    name: str
    model: Model | LatentModel
    schema: Schema
    times: TimeDiscretization
    weights: str
    notes: tuple[str, ...]
    condition: Given | None = None
    fit: Callable[[Batch], str] | None = None
    placed: bool = False
    nothing: Callable[[], Given] | None = None
    of_steps: "Callable[[int | None], Foreign] | None" = None

    def examples(
        self,
        source: Source | None,
        split: str | None = None,
        splits: Splits | None = None,
        tell: Callable[[str], object] = str,
        *,
        form: TextForm | None = None,
    ) -> tuple[Tensor | Batch, str]:
        """Return examples on which to measure the model, and a name for them.

        Args:
            source: as for `nelbo evaluate --data`, or data in memory, see `nelbo.data.coerce`.
            split: "train", "validation", "test" or "all", the default.
            splits: which names belong to which split, as for `nelbo.data.load`.
            tell: called with each note on the data.
            form: how texts are taken from data, for a model of tokens.

        Raises:
            ValueError: no source, data of another schema, no such split, or a condition of another
                number of examples.
        """
        found = self.read(source, split, splits, tell, form=form)
        return self.select(found, source, split, tell)

    def read(
        self,
        source: Source | None,
        split: str | None = None,
        splits: Splits | None = None,
        tell: Callable[[str], object] = str,
        *,
        form: TextForm | None = None,
    ) -> object:
        """Return data as `select` takes them; arguments and errors as for `examples`."""
        if source is None:
            raise ValueError(f"{self.name} comes without data; give some with --data")
        check_no_form(form)
        dataset = load_like(source, self.schema, splits=splits, scaled=True)
        for note in dataset.notes:
            tell(note)
        return dataset

    def select(
        self,
        found: object,
        source: Source,
        split: str | None = None,
        tell: Callable[[str], object] = str,
    ) -> tuple[Tensor | Batch, str]:
        """Return the examples of a split of what `read` has found in the source, and a name."""
        split, dataset = split or "all", cast(Dataset, found)
        return self._fitted(dataset, split, tell), f"{split} of {name_of(source)}"

    def _fitted(
        self, dataset: Dataset, split: str, tell: Callable[[str], object]
    ) -> Tensor | Batch:
        """Return the examples of a split, with their conditions, after `fit` to others.

        These are those of another split, or every tenth of the examples, which is then not
        measured.
        """
        x = dataset.split(split)
        given = None if self.condition is None else self.condition.rows(len(x))
        if self.fit is None:
            return x if given is None else Batch(x, given)
        names = ("validation", "train", "test") if split != "all" else ()
        other = next((n for n in names if n != split and n in dataset.splits), None)
        if other is not None and (given is None or len(given.unique(dim=0)) == 1):
            held = dataset.splits[other][:FITTED]
            rows = None if given is None else given[:1].expand(len(held), -1)
            tell(f"{self.fit(Batch(held, rows))}, fitted to the {other} split")
            return x if given is None else Batch(x, given)
        if len(x) < 2:
            raise ValueError(
                "a part of the model is fitted to examples that are not measured, and there is"
                " only one example; give more, or for the pixels of a latent diffusion model"
                " ,law=laplace:0.05"
            )
        out = torch.arange(len(x)) % LEAVE_OUT == min(LEAVE_OUT, len(x)) - 1
        held = _some(x, out)
        images = "1 image that was" if len(held) == 1 else f"{len(held)} images that were"
        fitted = self.fit(Batch(held[:FITTED], _first(rows_of(given, out))))
        tell(f"{fitted}, fitted to the {images} left out")
        x, given = _some(x, ~out), rows_of(given, ~out)
        return x if given is None else Batch(x, given)

    def rates(self, nats: float, batch: Batch) -> dict[str, float]:
        """Return the bound per token, character and byte; nothing where it is not of text.

        Args:
            nats: the bound, mean per example.
            batch: the examples.
        """
        return {}

    def sizes(self, batch: Batch) -> dict[str, Tensor]:
        """Return the characters and bytes of the scored text of each example, where known."""
        return {}


def check_no_form(form: TextForm | None) -> None:
    """Raise ValueError if a form of texts is given for data of another kind."""
    if form not in (None, TextForm()):
        raise ValueError(
            "--lines, --prompt-field and --answer-field are for a model of tokens, hf:FOLDER;"
            " leave them out"
        )


def in_precision(found: Foreign, precision: str | None) -> Foreign:
    """Return a model whose network computes in a precision; None leaves it as it is.

    Args:
        found: the model.
        precision: as `check_precision` allows; bf16 by torch.autocast.
    """
    return found if precision is None else with_autocast(found)


def check_precision(precision: str | None, name: str) -> None:
    """Raise ValueError for a precision that no network of images is given here."""
    if precision not in (None, "bf16"):
        raise ValueError(
            f"the precision of {name} is bf16, by autocast, or its own; got {precision!r}"
        )


def check_in_memory(
    thing: object,
    name: str,
    trust_remote_code: bool,
    precision: str | None,
    device_map: str | None,
) -> None:
    """Raise ValueError for options of a model in files, where it is in memory.

    The precision of a network in memory may be chosen, that of a model made of one may not.
    """
    if isinstance(thing, Foreign | Model | LatentModel):
        names, other = "trust_remote_code, precision and device_map", precision
    else:
        check_precision(precision, "a network in memory")
        names, other = "trust_remote_code and device_map", None
    if trust_remote_code or other is not None or device_map is not None:
        raise ValueError(
            f"{names} are for a model that is read from files; got {name}: leave them out"
        )


def with_autocast(found: Foreign) -> Foreign:
    """Return a model whose network computes in bfloat16 where torch.autocast finds it safe."""
    found.model.diffusion.autocast = torch.bfloat16
    more = found.of_steps
    return replace(
        found,
        notes=(*found.notes, "the network computes with autocast to bfloat16"),
        of_steps=None if more is None else lambda steps: with_autocast(more(steps)),
    )


def _some(x: Tensor, chosen: Tensor) -> Tensor:
    """Return the examples where `chosen`, (N,), is true; those in files stay unread."""
    if isinstance(x, Rows):
        return cast(Tensor, x.take(chosen.nonzero().flatten().numpy()))
    return x[chosen]


def _first(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows[:FITTED]


def scaled(scaling: Levels | Affine) -> str:
    """Return a note on the scaling of the data that the network sees."""
    return f"the network sees {scaling.describe()}"
