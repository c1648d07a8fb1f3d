"""Base of both estimators: the parameters, training, and the bound of each row."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from threadpoolctl import threadpool_limits
from torch import Tensor

from nelbo._utils.progress import progress_bar
from nelbo._utils.validation import Record
from nelbo.data.schema import Dataset, Schema
from nelbo.data.sources import load_like
from nelbo.data.tabular import frames
from nelbo.data.tabular.datasets import schema_of
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.model import find_device
from nelbo.evaluation.example_bounds import REPLICATES, elbo
from nelbo.evaluation.row_bounds import RowBounds, row_bounds
from nelbo.models.config import ModelConfig
from nelbo.nn.ensemble import Ensemble
from nelbo.nn.memory import Memory, best_bandwidth
from nelbo.nn.mixture import MixtureDenoiser
from nelbo.sklearn.start import Measure, affine_of, mixture_of, widen
from nelbo.training.config import TrainConfig
from nelbo.training.presets import configure
from nelbo.training.trainer import Trainer

if TYPE_CHECKING:
    from numpy.random import RandomState
    from numpy.typing import ArrayLike

PATIENCE = 5  # measurements without improvement before training stops


@dataclass(frozen=True)
class _Settings(Record):
    """Parameters of an estimator that no other record has."""

    resolution: Annotated[float, Gt(0), Le(1)]
    validation: Annotated[float, Gt(0), Lt(1)]
    memory: Annotated[int, Ge(0)]
    draws: Annotated[int, Ge(2)]
    verbose: bool


@dataclass(kw_only=True, eq=False, repr=False)
class Diffusion(BaseEstimator):
    """Base of both estimators: a model of the rows of X, and its bound per row."""

    resolution: float = 0.001
    steps: int | None = None
    batch: int = TrainConfig.batch
    lr: float = TrainConfig.lr
    width: int = 64
    depth: int = ModelConfig.depth
    dropout: float = ModelConfig.dropout
    weight_decay: float = TrainConfig.weight_decay
    validation: float = 0.1
    memory: int = 0
    draws: int = 32
    random_state: "int | RandomState | None" = None
    device: str = "cpu"
    verbose: bool = False

    def _learn(self, X: "ArrayLike") -> tuple[Tensor, Tensor]:
        """Fit the model; return the rows used for training and those held out."""
        settings = _Settings(
            self.resolution, self.validation, self.memory, self.draws, bool(self.verbose)
        )
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        # raises for bad options before reading the rows
        self._configure(Schema("real", (1,), None), 1, seed, settings)
        device = find_device(self.device)
        schema, x = self._read(X)
        order = random.permutation(len(x))
        held = min(len(x) - 1, max(1, round(settings.validation * len(x))))
        chosen = {"train": order[held:], "validation": order[:held]}
        splits = {name: x[np.sort(rows)] for name, rows in chosen.items()}
        dataset = Dataset("memory", schema, splits)
        self._seed, self._draws = seed, settings.draws
        self._known: MixtureDenoiser | None = None  # of real rows
        configs = self._configure(schema, len(x), seed, settings)
        # more threads slow such small batches down
        with threadpool_limits(1), _bar(settings.verbose, configs[1].steps) as update:
            if schema.columns:
                learner = Trainer(*configs, dataset, str(device))
                self.model_ = learner.fit(update=update)
            else:
                learner = self._learn_real(dataset, configs, settings, device, update)
                if settings.memory:
                    self._remember(splits["train"], order[held:].argsort(), settings)
        self.schema_ = schema
        self.n_iter_, self.best_iter_ = learner.at.step, learner.at.best_step
        if settings.verbose and (why := learner.stopped()):
            print(why, file=sys.stderr)
        found, place = self._bound(splits["validation"])
        self.validation_score_ = found.elbo[place].mean().item()
        # rows that are equal have one error
        of_all = place.bincount() * found.error
        self.validation_score_std_ = of_all.square().sum().sqrt().item() / held
        return splits["train"], splits["validation"]

    def _learn_real(
        self,
        dataset: Dataset,
        configs: tuple[ModelConfig, TrainConfig],
        settings: _Settings,
        device: torch.device,
        update: Callable[[int, str], object],
    ) -> Trainer:
        """Fit the model to real rows, starting from a mixture."""
        rows = torch.cat([*dataset.splits.values()])
        affine = affine_of(rows.numpy())
        known = mixture_of(affine(dataset.splits["train"]), settings.resolution).to(device)
        learner = Trainer(*configs, dataset, str(device), affine=affine, known=known)
        self._known = known.double()
        held = dataset.splits["validation"]
        measure = Measure(held, configs[1].seed, self._known, settings.resolution)
        self.model_ = learner.fit(measure, update).double()
        widen(self.model_, settings.resolution)
        return learner

    def _remember(self, x: Tensor, order: np.ndarray, settings: _Settings) -> None:
        """Average the network with the kernel density of the first rows of x in this order."""
        embedded = self.model_.embed(x.to(self.model_.device))[order[: settings.memory]]
        several = len(embedded) > 1
        bandwidth = best_bandwidth(embedded, settings.resolution) if several else 1.0
        self.model_.network = Ensemble([self.model_.network, Memory(embedded, bandwidth)]).eval()

    def _read(self, X: "ArrayLike") -> tuple[Schema, Tensor]:
        """Return the rows to fit and their schema: of a table for a mixed frame, else real."""
        if not frames.is_mixed(X):
            x = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
            return Schema("real", (x.shape[1],), None), torch.tensor(x)
        for name in ("resolution", "memory"):
            if (value := getattr(self, name)) != getattr(type(self), name):
                raise ValueError(
                    f"{name}={value!r} is for rows of numbers alone, and X is a mixed frame, for"
                    f" which {name} does not apply; leave it out"
                )
        schema, notes = schema_of(cast(Any, X))
        for note in notes:
            _note(note)
        names = [str(name) for name in X.columns]  # type: ignore[union-attr]
        self.feature_names_in_ = np.array(names, dtype=object)
        self.n_features_in_ = len(names)
        # of pandas; None for polars, whose types the schema has
        self._dtypes = frames.dtypes_of(X)
        return schema, load_like(X, schema).splits["all"][:]

    def _rows(self, X: "ArrayLike") -> Tensor:
        """Return rows to score, of the kind of those of `fit`."""
        check_is_fitted(self)
        if not self.schema_.columns:
            return torch.tensor(validate_data(self, X, dtype=np.float64, reset=False))
        found = load_like(X, self.schema_)
        for note in found.notes:
            _note(note)
        return found.splits["all"][:]

    def _configure(
        self, schema: Schema, rows: int, seed: int, settings: _Settings
    ) -> tuple[ModelConfig, TrainConfig]:
        """Return the configuration for this number of rows; few rows need few steps."""
        steps = min(1000, max(200, 2 * rows)) if self.steps is None else self.steps
        model, train = configure(schema, rows)
        if not schema.columns:
            model = replace(model, network="mlp", gamma_min=2 * float(np.log(settings.resolution)))
        model = replace(model, width=self.width, depth=self.depth, dropout=self.dropout)
        train = TrainConfig(
            steps=steps,
            batch=self.batch,
            lr=self.lr,
            warmup=50,
            weight_decay=self.weight_decay,
            cross_entropy=train.cross_entropy,
            augment=0.0,
            evaluate_every=50,
            patience=PATIENCE,
            seed=seed,
        )
        return model, train

    def score_samples(
        self, X: "ArrayLike", return_std: bool = False
    ) -> "np.ndarray | tuple[np.ndarray, np.ndarray]":
        """Estimate a lower bound on log P(x) of each row, (N,), nats, in the units of X.

        The estimate is unbiased: its mean over seeds is a lower bound, and a single one has an
        error that falls with `draws`. The draws of a row depend on `random_state` and the row
        only, so equal rows have equal scores, the errors of different rows are independent, and
        the error of the mean of N different rows is the root of the sum of their squares divided
        by N.

        Args:
            X: rows, (N, D); a frame if `fit` was given a mixed one.
            return_std: also return the standard error of each score, (N,), nats.

        Raises:
            NotFittedError: before `fit`.
            ValueError: other columns than those of `fit`, or values that are not finite.
        """
        found, place = self._bound(self._rows(X))
        scores, error = found.elbo[place].numpy(), found.error[place].numpy()
        return (scores, error) if return_std else scores

    def _bound(self, x: Tensor) -> tuple[RowBounds, Tensor]:
        """Return the bounds of the different rows of x, and which of them each row has."""
        cells = np.ascontiguousarray(x.numpy()).reshape(len(x), -1)
        rows = cells.view(np.dtype((np.void, cells.itemsize * cells.shape[1]))).ravel()
        _, first, place = np.unique(rows, return_index=True, return_inverse=True)
        few = x[torch.from_numpy(first)]
        if self._known is not None:
            bounds = row_bounds(self.model_, few, self._draws, self._seed, self._known)
        else:
            calls = max(self._draws, 2 * REPLICATES)
            found = elbo(self.model_, Batch(few), calls=calls, seed=self._seed, by_content=True)
            bounds = RowBounds(found.elbo, found.standard_error)
        return bounds, torch.from_numpy(place.ravel())


def _note(line: str) -> None:
    warnings.warn(line, stacklevel=4)


@contextmanager
def _bar(show: bool, steps: int) -> Iterator[Callable[[int, str], object]]:
    if not show:
        yield lambda done, note: None
        return
    with progress_bar("train", steps) as update:
        yield update
