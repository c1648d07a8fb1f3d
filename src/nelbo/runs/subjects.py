"""Subjects of a measurement: a run, a model of another library, or a bare model.

Each kind knows where its examples come from, which times its steps have, and how its bound is
drawn. `evaluation` measures all of them in the same way.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from torch import Tensor, nn
from typing_extensions import override

from nelbo import integrations
from nelbo._utils.distributed import gather
from nelbo._utils.progress import Track
from nelbo.data.columns import Column
from nelbo.data.schema import Dataset
from nelbo.data.sources import Source, Splits
from nelbo.data.splits import declare
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.latent import LatentModel
from nelbo.diffusion.model import Model, counting, find_device
from nelbo.diffusion.times import TimeDiscretization, times_of
from nelbo.evaluation.coercion import batch_of
from nelbo.evaluation.evaluate import evaluate
from nelbo.evaluation.result import Evaluation, Measurement
from nelbo.evaluation.survey import check_calls
from nelbo.integrations import Foreign, Pair, memory
from nelbo.integrations.conditions import Condition
from nelbo.integrations.external import check_in_memory, check_no_form, in_precision
from nelbo.integrations.memory import Reading
from nelbo.integrations.text_records import TextForm
from nelbo.integrations.texts import TextReader
from nelbo.runs import own_data
from nelbo.runs.loading import NOT_A_RUN, load
from nelbo.runs.pilot_cache import Pilots
from nelbo.runs.run import Run

#: a run, its folder, or its name on the hub
AnyRun: TypeAlias = Run | str | PathLike[str]
Spacing: TypeAlias = Literal["best", "uniform"]
Tell: TypeAlias = Callable[[str], object]
PARTS = (
    "of the parts of a pipeline, give a network with its scheduler as (network, scheduler), and"
    " one of latents as the pipeline itself"
)


def run_of(run: object) -> Run:
    """Return a run as it is, or load it.

    Raises:
        ValueError: it is neither a run nor a path or name.
    """
    if isinstance(run, str | PathLike):
        return load(run if isinstance(run, str) else Path(run))
    if not isinstance(run, Run):
        other = f"; {NOT_A_RUN}" if isinstance(run, Foreign | Model | LatentModel) else ""
        if isinstance(run, tuple | list) or hasattr(run, "set_timesteps"):
            other = f"; {PARTS}"
        raise ValueError(
            "give a run, from nelbo.train or nelbo.load, or its folder; got"
            f" {type(run).__name__}{other}"
        )
    return run


def model_of(run: AnyRun | Model | Foreign | Pair, trust_remote_code: bool = False) -> Model:
    """Return the model of a run or of another library, and a bare model as it is."""
    if integrations.is_foreign(run):
        run = integrations.load(run, trust_remote_code=trust_remote_code)
    if isinstance(run, Foreign):
        model = run.model.diffusion
        if model is not run.model:
            raise ValueError(f"{run.name} is a model of latents; give one of the data themselves")
        return model
    # an argument is a model itself or stands for one
    return run if isinstance(run, Model) else run_of(run).model


@dataclass(frozen=True)
class Asked:
    """The examples that are to be measured.

    Args:
        data: of any kind; None for a run's own.
        split: which of them, a name.
        splits: which names in the data belong to which split.
        form: how texts are taken from data, for a model of tokens.
        tell: called with each note on the data.
    """

    data: Source | Batch | None
    split: str | None
    splits: Splits | None
    form: TextForm
    tell: Tell


class Checked(NamedTuple):
    """Notes on how a network is read, with the rows that went through it and an encoder."""

    notes: Sequence[str] = ()
    rows: int = 0
    encoder_rows: int = 0


class Subject(ABC):
    """Something whose bound can be measured."""

    model: Model | LatentModel
    weights: str = "as given"
    #: a sentence for each choice that the meaning of the bound depends on
    notes: tuple[str, ...] = ()
    #: columns of the table that it is a model of
    columns: tuple[Column, ...] = ()

    @abstractmethod
    def read(self, asked: Asked) -> object:
        """Return data as `examples` takes them, so that those of several models are read once."""

    @abstractmethod
    def examples(self, asked: Asked, found: object) -> tuple[Batch, str]:
        """Return the examples that are asked for among what `read` has found, and a name."""

    @abstractmethod
    def times(
        self, steps: int | None, grid: Spacing | None, track: Track
    ) -> TimeDiscretization | None:
        """Return the times of a number of steps; None for continuous time."""

    def check(self, batch: Batch) -> Checked:
        """Check how the network is read, from its errors on some examples."""
        return Checked()

    def bound(self, batch: Batch, own: bool, tell: Tell, **options: Any) -> Evaluation:  # noqa: ANN401
        """Return the bound of examples.

        Args:
            batch: the examples.
            own: whether they are a run's own.
            tell: called with messages about slow work.
            options: as for `evaluation.evaluate.evaluate`.
        """
        return evaluate(cast(Model, self.model), batch, weights=self.weights, **options)

    def to(self, device: str) -> None:
        """Move the model to a device.

        Raises:
            ValueError: there is no such device, or something else has placed the weights.
        """
        self.model.to(find_device(device))

    def rates(self, found: Measurement, batch: Batch) -> Mapping[str, float]:
        """Return the bound of a text per token, character and byte; nothing of other data."""
        return {}

    def sizes(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return the scored tokens, characters and bytes of each text; nothing of other data."""
        return {}


@dataclass
class OfRun(Subject):
    """A run, with the best grids and the pilots of its own."""

    run: Run
    own: Dataset = field(init=False)  # its data, once read

    def __post_init__(self) -> None:
        self.model, self.weights = self.run.model, self.run.weights
        self.columns = self.run.config.schema.columns

    @override
    def read(self, asked: Asked) -> object:
        data = asked.data
        check_no_form(asked.form)
        if isinstance(data, str | PathLike) and self.run.meet(data):
            asked.tell(
                f"{data} are the run's own data; from now on its commands read them from there"
            )
        found = own_data.read(self.run.config, data, asked.splits, asked.tell)
        if data is None:
            self.own = cast(Dataset, found)
        return found

    @override
    def examples(self, asked: Asked, found: object) -> tuple[Batch, str]:
        known = cast("Dataset | Batch", found)
        return own_data.select(self.run.config, known, asked.data, asked.split)

    @override
    def times(
        self, steps: int | None, grid: Spacing | None, track: Track
    ) -> TimeDiscretization | None:
        if steps is None:
            return None
        return (
            times_of(self.run.model, None, steps)
            if grid == "uniform"
            else self.run.grid(steps, track)
        )

    @override
    def bound(self, batch: Batch, own: bool, tell: Tell, **options: Any) -> Evaluation:
        """Return the bound of examples, see `Subject`.

        For its own data, control variates are fitted to the training split, and a pilot on the
        validation split is kept for this user; except for tokens, whose masks have exact counts.
        """
        if own and options["variates"] is not False and not self.run.model.process.as_codes:
            options["known"] = own_data.select(self.run.config, self.own, None, "train")[0].x
            options["pilots"] = Pilots(self.run, tell)
        return super().bound(batch, own, tell, **options)

    @override
    def rates(self, found: Measurement, batch: Batch) -> Mapping[str, float]:
        return self.run.config.schema.rates(found.bits_per_dim, batch.x)


@dataclass
class OfModel(Subject):
    """A bare model, in times of the user's own."""

    model: Model | LatentModel

    @override
    def read(self, asked: Asked) -> object:
        if asked.data is None:
            raise ValueError("a model brings no data; give examples, as in evaluate(model, x)")
        check_no_form(asked.form)
        if asked.splits is not None:
            raise ValueError("splits are for files; a bare model takes the examples")
        return batch_of(self.model, asked.data)

    @override
    def examples(self, asked: Asked, found: object) -> tuple[Batch, str]:
        return cast(Batch, found), asked.split or "as given"

    @override
    def times(
        self, steps: int | None, grid: Spacing | None, track: Track
    ) -> TimeDiscretization | None:
        if grid == "best":
            raise ValueError("the best grid is a run's; give times, or grid='uniform'")
        return None if steps is None else times_of(self.model.diffusion, None, steps)

    @override
    def check(self, batch: Batch) -> Checked:
        model = self.model
        encoder = model.encoder if isinstance(model, LatentModel) else nn.Identity()
        with counting(model.network) as calls, counting(encoder) as encoded:
            notes = model.check_reading(batch)
        # each process makes the same check
        return Checked(notes, sum(gather(calls.forward)), sum(gather(encoded.forward)))

    @override
    def sizes(self, batch: Batch) -> Mapping[str, Tensor]:
        model = self.model.diffusion
        counts = model.scored_counts(batch)
        return {} if counts is None else {model.dimension: counts}


@dataclass
class OfForeign(OfModel):
    """A model of another library, in times of its own."""

    model: Model | LatentModel = field(init=False)
    foreign: Foreign = field(kw_only=True)

    def __post_init__(self) -> None:
        self.model, self.weights = self.foreign.model, self.foreign.weights
        self.notes = self.foreign.notes

    @override
    def read(self, asked: Asked) -> object:
        if not isinstance(asked.data, Batch):
            return self.foreign.read(
                asked.data, asked.split, asked.splits, asked.tell, form=asked.form
            )
        if self.foreign.fit is not None:
            raise ValueError(
                "a part of the model is fitted to examples that are left out: give the examples,"
                " and their conditions as condition=, not a Batch; or give that part"
            )
        return super().read(asked)

    @override
    def examples(self, asked: Asked, found: object) -> tuple[Batch, str]:
        if isinstance(asked.data, Batch):
            return super().examples(asked, found)
        assert asked.data is not None  # or `read` has refused
        x, name = self.foreign.select(found, asked.data, asked.split, asked.tell)
        return batch_of(self.model, x), name

    @override
    def times(
        self, steps: int | None, grid: Spacing | None, track: Track
    ) -> TimeDiscretization | None:
        found = super().times(steps, grid, track)
        return self.foreign.times if found is None else found

    @override
    def to(self, device: str) -> None:
        if self.foreign.placed:
            raise ValueError(f"device_map places the weights; leave the device {device} out")
        super().to(device)

    @override
    def rates(self, found: Measurement, batch: Batch) -> Mapping[str, float]:
        return self.foreign.rates(found.nats, batch)

    @override
    def sizes(self, batch: Batch) -> Mapping[str, Tensor]:
        return {**super().sizes(batch), **self.foreign.sizes(batch)}


def subject_of(
    run: AnyRun | Model | LatentModel | Foreign | object,
    data: Source | Batch | None,
    *,
    steps: int | None = None,
    condition: Condition | None = None,
    trust_remote_code: bool = False,
    precision: str | None = None,
    device_map: str | None = None,
    reading: Reading,
    ahead: Sequence[Asked] = (),
    check: Callable[[TextReader], object] = str,
) -> tuple[Subject, int | None]:
    """Return what is to be measured, and the number of steps that is left to choose for it.

    A model of another library that is loaded or read here has the steps that are asked for.

    Args:
        run: as for `evaluation.evaluate`, which has the other arguments too.
        data: the examples, which may say the shape of one.
        steps: number of steps; continuous time, or the model's own, by default.
        condition: c of each example.
        trust_remote_code: run the code of a folder of hf:.
        precision: of the weights of hf:.
        device_map: where to put them.
        reading: how a network in memory is to be read.
        ahead: texts that `Subject.read` will be asked for, which are read before the weights of
            hf:, so that a mistake in them costs no wait.
        check: called with what has read these, before the weights too.

    Raises:
        ValueError: an option that is not for this kind.
    """
    if not isinstance(run, Run) and memory.is_network(run):
        if data is None:
            raise ValueError("a network brings no data; give examples, as in evaluate(network, x)")
        kind = type(run).__name__
        check_in_memory(run, kind, trust_remote_code, precision, device_map)
        made = memory.read(run, data, steps=steps, condition=condition, reading=reading)
        return OfForeign(foreign=in_precision(made, precision)), None
    known = isinstance(run, Run | str | PathLike | Foreign | Model | LatentModel)
    if not known and not integrations.is_foreign(run):
        run_of(run)  # which says what may be given, before what goes with it
    if "guidance" in reading:
        raise ValueError(memory.GUIDANCE)
    if reading:
        raise ValueError(f"{', '.join(sorted(reading))} say how a network is read; leave them out")
    if integrations.is_foreign(run):
        # blocks of tokens, among which steps are divided, depend on the texts
        left = steps if integrations.is_text(run) else None
        made = integrations.load(
            run,
            steps=steps if left is None else None,
            condition=condition,
            trust_remote_code=trust_remote_code,
            precision=precision,
            device_map=device_map,
            first=partial(_read_ahead, run, ahead, check),
        )
        return OfForeign(foreign=made), left
    if precision is not None or device_map is not None:
        raise ValueError(
            "--precision and --device-map are for other libraries' models; leave them out"
        )
    if condition is not None:
        raise ValueError("condition is for another library's network; give Batch(x, condition)")
    if isinstance(run, Foreign):
        if steps is not None and run.of_steps is not None:
            return OfForeign(foreign=run.of_steps(steps)), None
        return OfForeign(foreign=run), steps
    if isinstance(run, Model | LatentModel):  # of all that an argument may be
        return OfModel(run), steps
    return OfRun(run_of(run)), steps


def check_enough(calls: float | None, each: bool, reader: TextReader) -> None:
    """Raise a ValueError if the calls are too few for an error of texts that were read ahead.

    Args:
        calls: per text; None for as many as are needed.
        each: whether each text needs an error of its own.
        reader: what has read the texts.
    """
    if calls is not None and reader.count is not None:
        check_calls(calls, reader.count, each)


def _read_ahead(
    run: str | Pair,
    ahead: Sequence[Asked],
    check: Callable[[TextReader], object],
    reader: TextReader,
) -> None:
    for each in ahead:
        if each.data is None:
            raise ValueError(
                f"{integrations.name_of(run)} comes without data; give some with --data"
            )
        if not isinstance(each.data, Batch):
            reader.ahead(each.data, each.form, each.split, declare(each.splits))
    check(reader)
