"""The bound of whatever can be measured: the Python twin of `nelbo evaluate`."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any, Unpack, cast

import torch

from nelbo._utils.arguments import checked
from nelbo._utils.progress import Track, tracks
from nelbo._utils.scalars import integer
from nelbo.data.rows import Rows
from nelbo.data.sources import Source, Splits
from nelbo.diffusion.batch import Batch, rows_of
from nelbo.diffusion.latent import LatentModel
from nelbo.diffusion.model import Model, find_device
from nelbo.diffusion.times import TimeDiscretization, TimeGrid
from nelbo.diffusion.unmasking import RANDOM, UnmaskingOrder, order_of_name
from nelbo.evaluation import any_order
from nelbo.evaluation.alternatives import Alternative, Dequantise
from nelbo.evaluation.both_sides import both_sides
from nelbo.evaluation.coercion import batch_of
from nelbo.evaluation.evaluate import check_budget
from nelbo.evaluation.latent_bound import evaluate_latent
from nelbo.evaluation.masks import check_symbols
from nelbo.evaluation.per_dimension import by_column, by_dimension
from nelbo.evaluation.plausibility import check_number, worse_than_uniform
from nelbo.evaluation.result import (
    BothSides,
    BoundEstimate,
    ColumnCosts,
    Evaluation,
    LatentEvaluation,
    rated,
    with_calls,
)
from nelbo.evaluation.unmasking_order import beside, order_for
from nelbo.integrations import Foreign, Pair
from nelbo.integrations.conditions import Condition
from nelbo.integrations.memory import Reading
from nelbo.integrations.text_records import TextForm
from nelbo.integrations.texts import TextReader
from nelbo.runs.subjects import (
    AnyRun,
    Asked,
    OfRun,
    Spacing,
    Subject,
    Tell,
    check_enough,
    model_of,
    subject_of,
)

COLUMN_STEPS, COLUMN_EXAMPLES = 32, 1000  # of the costs of columns: steps by default; at most


@checked
def evaluate(
    run: AnyRun | Model | Foreign | object,
    data: Source | Batch | None = None,
    split: str | None = None,
    *,
    condition: Condition | None = None,
    splits: Splits | None = None,
    lines: bool = False,
    prompt_field: str | None = None,
    answer_field: str | None = None,
    steps: int | None = None,
    grid: Spacing | None = None,
    times: TimeDiscretization | int | None = None,
    calls: float | None = None,
    target_error: float | None = None,
    per_example: bool = False,
    variates: bool | None = None,
    sampler: str | None = None,
    tokens_per_step: int | None = None,
    known: Source | None = None,
    surrogate: AnyRun | Model | Foreign | Pair | None = None,
    masks: str | None = None,
    resume: str | PathLike[str] | None = None,
    importance_samples: int | None = None,
    own_samples: int | None = None,
    ode: bool = False,
    dequantise: Dequantise | None = None,
    tolerance: float | None = None,
    columns: bool = False,
    trust_remote_code: bool = False,
    precision: str | None = None,
    device_map: str | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: bool | None = None,
    tell: Tell | None = None,
    **reading: Unpack[Reading],
) -> Evaluation | BoundEstimate | BothSides:
    """Measure the mean bound on -log P(x|φ) over examples, with its error and network calls.

    Args:
        run: a run, its folder or its name on the hub; another library's model, "diffusers:FOLDER"
            or "openai:FILE" or as loaded; a bare model; or a network in memory: a pipeline of
            diffusers, a pair of a network and its scheduler, or a module or function that is
            called as network(y, time), see `integrations.wrap`.
        data: examples of any kind in `nelbo.data.coerce`, or a `Batch` of examples and conditions;
            for a run, by default its own data.
        split: by default "test" for the run's own data, and all of other data.
        condition: for another library's model, c for the bound on P(x|c): classes or embeddings
            of the examples, in their order, or one for all; or a mapping of the network's keywords
            to these.
        splits: splits of other data, as for `nelbo.data.load`.
        lines: for a model of tokens, "hf:FOLDER": read each line of a text file as an example.
        prompt_field: in JSON lines, or in a data set of `datasets`: the field with the text that
            shows before the answer; by default prompt.
        answer_field: the field with the text that is scored; by default answer, or text.
        steps: T, for the bound of T steps: on the best grid for a run, on the even grid of a bare
            model (for tokens, L/T at a time); continuous time by default.
        grid: for a run, the times of the steps: "best", the default, or "uniform".
        times: for a bare model: TimeGrid(times), or a number as for `steps`.
        calls: network calls per example, at most; 24 by default. The check of how a network of
            another library is read takes some more, which the result counts.
        target_error: in place of calls, the Monte Carlo standard error to reach, in the unit of
            the result.
        per_example: for a better standard error of each example.
        variates: use control variates; by default, where no pilot is kept, those that take at most
            1/32 of the run by counted operations; a note says what is left out.
        sampler: for a masked model, left-to-right, greedy, margin, entropy or, for at most 16
            symbols, random: also measure the exact -log P(x) of the sampler that shows symbols in
            this order, as `result.in_order`; see `nelbo.diffusion.unmasking`.
        tokens_per_step: number of symbols that this sampler shows in each step, by default 1.
        known: for a bare model: other examples of the same distribution, such as the training
            data, to which control variates are fitted.
        surrogate: for a masked model in continuous time: a cheaper model of the same symbols, of
            the same kinds as `run`, which reads the same masks and many more
            (`evaluation.masks`). The result is unbiased for any surrogate, and its calls are not
            counted.
        masks: for a masked model in continuous time: the estimator, plain, unigram, draws, or
            two-levels, which needs a surrogate; by default a pilot chooses.
        resume: a file for what has been measured so far. The same call with the file of an
            interrupted evaluation continues it, bit for bit.
        importance_samples: K, for the tighter bound of K importance-weighted samples at T steps,
            with K T calls each; the result is a `BoundEstimate`.
        own_samples: with `importance_samples`: measure this number of samples of the model itself
            in place of the data, and bound their -log P(x) from below too; the result is a
            `BothSides`. Prompts, lengths and labels come from the data.
        ode: measure by the probability-flow ODE instead, at two tolerances; a `BoundEstimate`.
        dequantise: with `ode`: the distribution of the first latent given the data; by default
            "encoder".
        tolerance: with `ode`: absolute and relative tolerance per example; 1e-4 by default.
        columns: also measure the cost of each column of a table, as `result.columns`, at `steps`,
            by default 32, for at most 1000 examples.
        trust_remote_code: run the code in the folder of "hf:FOLDER".
        precision: for "hf:FOLDER", of the weights: bf16, fp16, float32 or float64; by default as
            they are stored. For other libraries' models bf16, by autocast; the result records it.
        device_map: for "hf:FOLDER", where to put the weights, in the form of transformers, in
            place of `device`.
        device: "cpu" or "cuda", to which the models are moved; by default they stay.
        seed: of everything random.
        progress: show bars on the error stream; by default if it is a terminal.
        tell: called with each note, and for a run with messages about slow work, as they arise;
            by default notes on a run's data are warnings. Notes are in `result.notes` too.
        reading: for a network in memory: what it predicts, its noise levels (betas, alphas, sigmas
            or schedule), its scaling, variance, clip, shape, .., as for `integrations.wrap`.

    Raises:
        ValueError: the data are not of the model, a model of P(x|c) lacks conditions, there are
            too few calls, the target error is impossible, or a network is read wrongly.
    """
    if times is not None and steps is not None:
        raise ValueError(f"give steps or times, not both; got steps={steps} and times={times}")
    if isinstance(times, int):
        steps, times = integer("times", times, 1), None
    if steps is not None:
        steps = integer("steps", steps, 1)
    alternative = Alternative(importance_samples, ode, dequantise, tolerance, own_samples)
    alternative.check(
        steps=times if steps is None else steps,
        calls=calls,
        target_error=target_error,
        sampler=sampler,
        surrogate=surrogate,
        masks=masks,
        resume=resume,
        columns=columns,
    )
    if grid is not None and steps is None and not columns:
        raise ValueError("grid chooses the times of the steps; give steps too")
    check_budget(calls, target_error)
    order_of_name(sampler, tokens_per_step)
    form = TextForm(lines, prompt_field, answer_field)
    cheaper = None if surrogate is None else model_of(surrogate, trust_remote_code)

    each = per_example or masks is not None or cheaper is not None

    def check(reader: TextReader) -> None:
        check_enough(calls, each, reader)
        if cheaper is not None and reader.rules.vocabulary is not None:
            check_symbols(reader.rules.vocabulary, cheaper.process.codes)

    subject, left = subject_of(
        run,
        data,
        steps=steps,
        condition=condition,
        trust_remote_code=trust_remote_code,
        precision=precision,
        device_map=device_map,
        reading=reading,
        ahead=[Asked(data, split, splits, form, str)],
        check=check,
    )
    if isinstance(subject.model, Model):
        alternative.check_model(subject.model)
    if columns and not subject.columns:
        raise ValueError("columns measures what each column of a run's table costs; leave it out")
    if isinstance(subject, OfRun) and not times is known is None:
        raise ValueError("times and known are for a bare model; a run knows its own; give steps")
    options: dict[str, Any] = {
        "calls": calls,
        "target_error": target_error,
        "per_example": per_example,
        "variates": variates,
        "masks": masks,
        "resume": resume,
    }
    if cheaper is not None:
        options["surrogate"] = cheaper if device is None else cheaper.to(find_device(device))
    if known is not None:
        options["known"] = batch_of(cast(Model, subject.model), known).x
    if device is not None:
        subject.to(device)
    measuring = Measuring(subject, alternative, options, seed, tracks(progress), tell)
    asked = Asked(data, split, splits, form, measuring.note)
    batch, name = subject.examples(asked, subject.read(asked))
    order = measuring.order_for(batch, sampler, tokens_per_step)
    if times is None:
        times = subject.times(left, grid, measuring.tracks("best times"))
    found = measuring(batch, name, data is None, times, order)
    if columns and isinstance(found, Evaluation):
        found = replace(found, columns=measuring.columns(batch, steps, grid))
    return found


class Measuring:
    """A measurement of one subject, and the notes on it.

    Args:
        subject: what is measured.
        alternative: what is asked for in place of the ELBO.
        options: of `evaluation.evaluate.evaluate`.
        seed: of everything random.
        tracks: map a description of work to its progress bar.
        tell: called with each note; by default notes on the data of a run are warnings.
    """

    def __init__(
        self,
        subject: Subject,
        alternative: Alternative,
        options: Mapping[str, Any],
        seed: int,
        tracks: Callable[[str], Track],
        tell: Tell | None,
    ) -> None:
        self.subject, self.alternative, self.options = subject, alternative, options
        self.seed, self.tracks, self.tell = seed, tracks, tell or str
        self.on_data: Tell = warn if tell is None and isinstance(subject, OfRun) else self.tell
        if isinstance(subject.model, LatentModel):
            _check_latents(alternative, options)
        self.notes = list(subject.notes)
        for line in self.notes:
            self.tell(line)

    def note(self, line: str) -> None:
        """Keep a note on the data for the result, and say it."""
        self.notes.append(line)
        self.on_data(line)

    def order_for(
        self, batch: Batch, sampler: str | None, tokens_per_step: int | None
    ) -> UnmaskingOrder | None:
        """Return the order of unmasking of a sampler's name; None for none."""
        model = self.subject.model.diffusion
        order = order_for(model, batch, sampler, tokens_per_step)
        if order is not None and order.name == RANDOM:
            calls = any_order.calls_for(model, batch)
            self.tell(f"{order.name} order takes {calls} network calls, 2^L - 1 for L symbols")
        return order

    def __call__(
        self,
        batch: Batch,
        name: str,
        own: bool,
        times: TimeDiscretization | None,
        order: UnmaskingOrder | None,
    ) -> Evaluation | BoundEstimate | BothSides:
        """Return the bound of examples.

        Args:
            batch: the examples.
            name: theirs, for the record.
            own: whether they are a run's own.
            times: of the bound; continuous time for None.
            order: of a sampler whose exact likelihood is stated beside the bound.
        """
        subject, model, other = self.subject, self.subject.model, self.alternative
        notes, *checked = subject.check(batch)
        for line in notes:
            self.note(line)
        track = self.tracks("evaluate")
        record: dict[str, Any] = {"seed": self.seed, "split": name, "track": track}
        found: Evaluation | BoundEstimate
        # a bound of other terms, and of calls of three networks: it has an estimator of its own
        if isinstance(model, LatentModel):
            found = self._of_latents(model, batch, times, record | {"weights": subject.weights})
        elif other.own_samples is not None and times is not None:
            rows = torch.arange(other.own_samples) % len(batch)
            sides = both_sides(
                model,
                other.own_samples,
                times=times,
                samples=cast(int, other.importance_samples),
                condition=rows_of(batch.condition, rows),
                seed=self.seed,
                weights=subject.weights,
                track=track,
            )
            return with_calls(sides, *checked)
        elif find := other.measure(model, times):
            resume = self.options.get("resume")
            found = find(batch, weights=subject.weights, resume=resume, **record)
        else:
            found = subject.bound(batch, own, self.tell, times=times, **self.options, **record)
            bar, resume = self.tracks("in order"), self.options.get("resume")
            found = beside(found, model, batch, order, bar, resume)
        found = with_calls(rated(found, lambda of: subject.rates(of, batch)), *checked)
        check_number(found)
        late = batch.x.notes() if isinstance(batch.x, Rows) else ()
        worse = worse_than_uniform(found, model.possible)
        after = [*late, *([worse] if worse else [])]
        return replace(found, notes=(*self.notes, *found.notes, *after))

    def _of_latents(
        self,
        model: LatentModel,
        batch: Batch,
        times: TimeDiscretization | None,
        record: Mapping[str, Any],
    ) -> LatentEvaluation:
        """Return the bound of images by a model of their latents."""
        if times is None:
            raise ValueError("give the times of a model of latents: steps, or times")
        return evaluate_latent(model, batch, times=times, calls=self.options["calls"], **record)

    def columns(self, batch: Batch, steps: int | None, grid: Spacing | None) -> ColumnCosts:
        """Return what each column of a table costs, for some of the examples."""
        model, count = cast(Model, self.subject.model), steps or COLUMN_STEPS
        times = self.subject.times(count, grid, self.tracks("best times"))
        some = batch[:COLUMN_EXAMPLES]
        (bound,) = by_dimension(model, some, cast(TimeGrid, times), seed=self.seed)
        known = self.subject.columns
        names = tuple(column.name for column in known)
        return ColumnCosts(names, by_column(-bound.elbo, known), count)


def warn(line: str) -> None:
    """Warn of a note on data that is not shown in any other way."""
    warnings.warn(line, stacklevel=2)


def _check_latents(alternative: Alternative, options: Mapping[str, Any]) -> None:
    """Raise a ValueError for what a bound through an autoencoder does not take."""
    names = ("target_error", "known", "surrogate", "masks", "resume")
    given = [name for name in names if options.get(name) is not None]
    given += ["ode"] * alternative.ode
    given += ["importance_samples"] * (alternative.importance_samples is not None)
    if given:
        raise ValueError(
            f"{', '.join(given)}: for models of the data themselves; a model of their latents"
            " takes calls; leave it out"
        )
