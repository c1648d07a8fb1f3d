"""A trained run in memory: its model, configuration and metrics, with methods to measure it."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Self

from torch import Tensor

from nelbo._utils.arguments import checked
from nelbo._utils.progress import Track, interactive, tracks
from nelbo.data.sources import Source, Splits
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import Model, find_device
from nelbo.diffusion.times import TimeGrid
from nelbo.evaluation.example_bounds import CALLS as ELBO_CALLS
from nelbo.evaluation.example_bounds import ExampleBounds, elbo
from nelbo.evaluation.result import BothSides, BoundEstimate, Evaluation
from nelbo.runs import grids, own_data, shown
from nelbo.runs.config import RunConfig

if TYPE_CHECKING:
    from nelbo.codec.files import Summary
    from nelbo.data.tabular.tables import Frame
    from nelbo.evaluation.alternatives import Dequantise
    from nelbo.evaluation.anomaly_scores import Scored, Scorer
    from nelbo.runs.samples import Condition, Samples
    from nelbo.runs.subjects import Spacing


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=4)


@dataclass(frozen=True, repr=False)
class Run:
    """A trained run, as returned by `nelbo.load`."""

    path: Path
    model: Model
    config: RunConfig
    weights: str
    metrics: list[dict]

    def __repr__(self) -> str:
        return shown.text(self)

    def _repr_html_(self) -> str:
        return shown.html(self)

    @property
    def step(self) -> int:
        """The step of training from which the weights are."""
        return int(number[1]) if (number := re.search(r"step (\d+)", self.weights)) else 0

    @checked
    def to(self, device: str) -> Self:
        """Move the model to a device, such as "cuda"; return the run itself.

        Raises:
            ValueError: this machine has no such device.
        """
        self.model.to(find_device(device))
        return self

    @checked
    def examples(self, split: str = "test", data: Source | None = None) -> Tensor:
        """Return the examples of a split of the run's own data, (N, *shape), or of other data."""
        return self.batch(data, split if data is None else None)[0].x

    def batch(
        self,
        source: Source | None = None,
        split: str | None = None,
        splits: Splits | None = None,
        tell: Callable[[str], object] = _warn,
    ) -> tuple[Batch, str]:
        """Return examples of the run's own data or of other data, and a name for them.

        If the run is conditional, the batch contains their labels as conditions.

        Args:
            source: other data of the run's schema, of any kind in `nelbo.data.coerce`; the run's
                own by default. A batch is returned as it is.
            split: "train", "validation", "test"; for other data also "all". The default is "test"
                for the run's own data and "all" for other data.
            splits: splits of other data, as for `nelbo.data.load`.
            tell: called with notes on other data, such as values that did not occur in training;
                by default it issues a warning.

        Raises:
            ValueError: the data have another schema; there is no such split; or it is not known
                where the run's own data are.
        """
        found = own_data.read(self.config, source, splits, tell)
        return own_data.select(self.config, found, source, split)

    @checked
    def evaluate(
        self,
        data: Source | None = None,
        split: str | None = None,
        *,
        splits: Splits | None = None,
        steps: int | None = None,
        grid: "Spacing | None" = None,
        calls: float | None = None,
        target_error: float | None = None,
        per_example: bool = False,
        variates: bool | None = None,
        sampler: str | None = None,
        tokens_per_step: int | None = None,
        surrogate: Model | None = None,
        masks: str | None = None,
        resume: str | PathLike[str] | None = None,
        importance_samples: int | None = None,
        own_samples: int | None = None,
        ode: bool = False,
        dequantise: "Dequantise | None" = None,
        tolerance: float | None = None,
        columns: bool = False,
        seed: int = 0,
        progress: bool | None = None,
        tell: Callable[[str], object] | None = None,
    ) -> Evaluation | BoundEstimate | BothSides:
        """Return the bound on -log P(x) of the run's own data or of other data.

        It is `nelbo.evaluate(run, ...)`, and that of `nelbo evaluate RUN`; all arguments are
        described there. Without any, the test split is measured in continuous time, with a pilot
        of some thousand calls that is made once for each run, kept in the cache, and not counted.

        Raises:
            ValueError: as for `batch`, `grid` and `nelbo.evaluate`.
        """
        from nelbo.runs import evaluation

        return evaluation.evaluate(
            self,
            data,
            split,
            splits=splits,
            steps=steps,
            grid=grid,
            calls=calls,
            target_error=target_error,
            per_example=per_example,
            variates=variates,
            sampler=sampler,
            tokens_per_step=tokens_per_step,
            surrogate=surrogate,
            masks=masks,
            resume=resume,
            importance_samples=importance_samples,
            own_samples=own_samples,
            ode=ode,
            dequantise=dequantise,
            tolerance=tolerance,
            columns=columns,
            seed=seed,
            progress=progress,
            tell=tell,
        )

    @checked
    def elbo(
        self,
        data: Source | None = None,
        split: str | None = None,
        *,
        steps: int | None = None,
        calls: int = ELBO_CALLS,
        seed: int = 0,
    ) -> ExampleBounds:
        """Return the lower bound on log P(x) of each example, with its error, nats.

        Args:
            data: as for `evaluate`.
            split: as for `evaluate`.
            steps: T, on the run's best grid; continuous time by default.
            calls: network calls per example, at most.
            seed: of everything random.
        """
        batch, _ = self.batch(data, split)
        times = None if steps is None else self.grid(steps)
        return elbo(self.model, batch, times=times, calls=calls, seed=seed)

    @checked
    def sample(
        self,
        n: int = 64,
        steps: int | None = None,
        *,
        condition: "Condition | None" = None,
        seed: int = 0,
        guidance: float = 1.0,
        sampler: str = "ancestral",
        tokens_per_step: int | None = None,
        as_modelled: bool = False,
        progress: bool | None = None,
    ) -> "Samples":
        """Draw new examples: a frame of a table, an array of images or vectors, or texts.

        Args:
            n: number of examples.
            steps: number of steps, on the run's best grid, by default 32; each is one network
                call.
            condition: of a conditional run: the label of all samples, such as 3; a mapping of
                names to labels; or a list of one for each sample. By default those of random
                training examples.
            seed: of everything random.
            guidance: how strongly the label counts; only 1 draws from the model that is measured.
            sampler: "ancestral", or "flow" for the deterministic probability flow; or for a masked
                model left-to-right, greedy, margin or entropy, the order in which symbols are
                shown, with the exact likelihood of `evaluate(sampler=...)`.
            tokens_per_step: number of symbols that such an order shows in each step, by default 1.
            as_modelled: for a table: keep rows outside the ranges of the training data.
            progress: show bars on the error stream; by default if it is a terminal.

        Returns:
            A table: a frame of the library of the training frame, polars for files. Images: uint8
            (N, H, W, C), or (N, H, W) if grey, in the levels of the data. Text: a list of strings.
            Anything else: an array (N, *shape).

        Raises:
            ValueError: the run has no such labels, or as for `grid` and `draw`.
        """
        from nelbo.runs import samples

        track = tracks(progress)
        labels = samples.labels_for(condition, n, self.config.schema)
        order = samples.order_of(self.model, sampler, tokens_per_step, steps)
        count = samples.SAMPLE_STEPS if steps is None else steps
        x = samples.draw(
            self,
            n,
            lambda: order or self.grid(count, track("best times")),
            labels=labels,
            seed=seed,
            guidance=guidance,
            sampler=sampler,
            as_modelled=as_modelled,
            track=track("sample"),
        )
        return samples.as_held(x, self.config)

    @checked
    def impute(
        self,
        data: Source,
        steps: int = 32,
        *,
        particles: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
        tell: Callable[[str], object] = _warn,
    ) -> "Frame":
        """Return a table with its missing cells drawn given the other cells of their row.

        Args:
            data: a table with the columns of the run's; others stay as they are.
            steps: number of steps, on the run's best grid.
            particles: candidates for each row, by default 32.
            seed: of everything random; another seed gives another draw.
            progress: show bars on the error stream; by default if it is a terminal.
            tell: called with notes on words that mean missing cells; warnings by default.

        Returns:
            A frame of the library of `data`; of polars for a file.

        Raises:
            ValueError: the run is not of a table, or the data are not of its columns.
        """
        from nelbo.runs import samples

        track = tracks(progress)
        made = samples.complete_table(
            self,
            data,
            lambda: self.grid(steps, track("best times")),
            particles=particles,
            seed=seed,
            tell=tell,
            track=track("impute"),
        )
        return samples.like(made, data)

    @checked
    def score(
        self,
        data: Source | None = None,
        split: str | None = None,
        *,
        splits: Splits | None = None,
        score: str = "bound",
        against: str = "validation",
        calls: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> "Scored":
        """Return the anomaly score of each example, its error, rank and percentile.

        Args:
            data: as for `evaluate`; by default the run's own test split.
            split: split of the data.
            splits: splits of other data, as for `nelbo.data.load`.
            score: "bound", "complexity" or "typicality", see `nelbo.evaluation.anomaly_scores`.
            against: the split of the run's own data that rank and percentile refer to.
            calls: network calls per example, at least 8; 24 by default.
            seed: of everything random.
            progress: show bars on the error stream; by default if it is a terminal.

        Raises:
            ValueError: as for `batch`, or the score is not defined for such data.
        """
        batch, _ = self.batch(data, split, splits)
        return self.scorer(score, against, calls, seed, tracks(progress)("score"))(batch)

    def scorer(
        self,
        score: str = "bound",
        against: str = "validation",
        calls: int | None = None,
        seed: int = 0,
        track: Track = iter,
    ) -> "Scorer":
        """Return the function that `score` calls, for several data; arguments as there."""
        from nelbo.evaluation.anomaly_scores import Scorer

        reference, _ = self.batch(split=against)
        return Scorer(
            score,
            self.config.schema,
            self.model,
            reference,
            calls=calls,
            seed=seed,
            track=track,
        )

    @checked
    def compress(
        self,
        data: Source,
        out: str | Path,
        steps: int = 32,
        *,
        grid: str = "best",
        effort: int = 1,
        block: int = 1000,
        verify: bool = True,
        precision: str = "float64",
        progress: bool | None = None,
    ) -> "Summary":
        """Compress data without loss into the file `out`, as long as the bound says.

        Args:
            data: a file or folder, whose bytes come back; or data in memory, which come back as
                an array or a table.
            out: a .nlb file that does not exist.
            steps: T of the bound that is coded: more steps make a smaller file.
            grid: times of the steps: "best" for this run, or "uniform".
            effort: how many beginnings of a code are searched; see `nelbo compress --help`.
            block: about how many examples to code in one block, independently of all others.
            verify: decompress and compare before the file is written.
            precision: of the network; "float32" is faster, and decodes only on the same machine
                and versions.
            progress: show a bar on the error stream; by default if it is a terminal.

        Raises:
            ValueError: the coder is not installed, or the data or the model have no such code.
        """
        from nelbo.runs import compressed

        show = interactive() if progress is None else progress
        return compressed.compress(
            self,
            data,
            Path(out),
            steps,
            grid=grid,
            effort=effort,
            block=block,
            verify=verify,
            precision=precision,
            show=show,
        )

    @checked
    def decompress(self, file: str | Path, out: str | Path | None = None) -> object:
        """Return the data in a compressed file, exactly; with `out`, write them there.

        Args:
            file: a .nlb file that this run compressed.
            out: where to write the data in their original format; it must not exist.

        Returns:
            A frame of a table, a list of texts, or an array; or, with `out`, this path.

        Raises:
            CodecError: the file is damaged, of another run, or not to be decoded here.
        """
        from nelbo.runs import compressed

        return compressed.decompress(self, Path(file), None if out is None else Path(out))

    @checked
    def push_to_hub(self, name: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the weights and the configuration, with a model card; return the address.

        The card has the bound of the test split, its error and the command. Neither the data nor
        the state of training are uploaded.

        Args:
            name: "user/name" on the hub of Hugging Face.
            private: whether only the user may see it, if it is new.
            token: of the user; by default that of `hf auth login`.

        Raises:
            ValueError: huggingface_hub is not installed, or the hub refuses or is out of reach.
        """
        from nelbo.runs import hub

        return hub.push(self, name, private=private, token=token)

    def meet(self, source: Source) -> bool:
        """Tell the run where its data are; return whether they were unknown and `source` has them.

        A run that this user did not train reads no data that it names, until they are given here.
        """
        return own_data.meet(self.config, source)

    def conditions(self, count: int, labels: Tensor | None = None, seed: int = 0) -> Tensor | None:
        """Return conditions for `count` examples, (count, F); None if the run is unconditional.

        Args:
            count: number of examples.
            labels: one row per example, (count, len(schema.condition)); by default drawn with
                replacement from the training examples that have all labels.
            seed: seed of that draw.

        Raises:
            ValueError: labels are to be drawn and the training data are not available.
        """
        return own_data.conditions(self.config, count, labels, seed)

    def grid(self, steps: int, track: Track = iter) -> TimeGrid:
        """Return the best grid of `steps` times for this model; it does not depend on any seed.

        It is the grid that the run was trained on, if that has `steps` times. Otherwise it is
        found once on the training data and stored in the run folder for these weights.

        Raises:
            ValueError: invalid number of steps, or the training data are not available.
        """
        return grids.best(self, steps, track)
