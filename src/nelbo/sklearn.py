"""Density estimation and outlier detection as scikit-learn estimators: `fit(X)`, scores, samples.

Both train a diffusion model of real rows in memory, by `training.trainer.Trainer`. Training starts
from a mixture of Gaussians (`diffusion.gaussian_mixture.fit`), whose exact denoiser the network
corrects, and stops by the bound of held-out rows. The model describes the standardised rows at a
finite resolution r: its first latent keeps noise of r standard deviations of each column, so that
the decoder is never narrower. Thus a column, however few distinct values it has, contributes to

    log P(x) <= -Σ_i log( √(2π) r s_i ),    s_i the standard deviation of column i (1 if constant).

The times and the noise in the score of a row depend on the seed and the row only (`row_bounds`).

A frame of pandas or polars with words or missing values is modelled as `nelbo train` models
a table instead: each column as what it is, numbers at the precision of their cells. There is then
no mixture and no memory, the score is the bound of `nelbo.elbo`, and samples are frames.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, Self, cast

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Lt
from sklearn import get_config
from sklearn.base import BaseEstimator, DensityMixin, OutlierMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from threadpoolctl import threadpool_limits
from torch import Tensor

from nelbo._utils.progress import progress_bar
from nelbo._utils.scalars import integer, plain
from nelbo._utils.validation import Record
from nelbo.data.schema import Dataset, Schema
from nelbo.data.sources import load_like, schema_of
from nelbo.data.tabular import encoding, frames
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.gaussian_mixture import fit
from nelbo.diffusion.model import Model, find_device
from nelbo.diffusion.process import Affine
from nelbo.evaluation.example_bounds import REPLICATES, elbo
from nelbo.evaluation.row_bounds import RowBounds, row_bounds
from nelbo.models.config import ModelConfig
from nelbo.nn.ensemble import Ensemble
from nelbo.nn.memory import Memory, best_bandwidth
from nelbo.nn.mixture import MixtureDenoiser
from nelbo.sampling.imputation import within
from nelbo.sampling.samplers import ancestral
from nelbo.training.config import TrainConfig
from nelbo.training.presets import configure
from nelbo.training.trainer import Trainer

if TYPE_CHECKING:
    from numpy.random import RandomState
    from numpy.typing import ArrayLike

    from nelbo.data.tabular.tables import Frame

PATIENCE = 5  # measurements without improvement before training stops
COMPONENTS = 128  # of the mixture, at most
NARROWER = 4  # a component may be narrower than the resolution by this factor
WIDEST = 1000  # columns, beyond which training starts from a standard normal distribution
MEASURED = (1000, 8)  # held-out rows, at most, and draws per row in a measurement


@dataclass(frozen=True)
class _Settings(Record):
    """Parameters of an estimator that no other record has."""

    resolution: Annotated[float, Gt(0), Le(1)]
    validation: Annotated[float, Gt(0), Lt(1)]
    memory: Annotated[int, Ge(0)]
    draws: Annotated[int, Ge(2)]
    verbose: bool


@dataclass(kw_only=True, eq=False, repr=False)
class _Diffusion(BaseEstimator):
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
        self._known: MixtureDenoiser | None = None
        configs = self._configure(schema, len(x), seed, settings)
        # more threads slow such small batches down
        with threadpool_limits(1), _bar(settings.verbose, configs[1].steps) as update:
            if schema.columns:
                learner = Trainer(*configs, dataset, str(device))
                self.model_ = learner.fit(update=update)
            else:
                learner = self._learn_real(dataset, configs, settings, device, update)
        if settings.memory and not schema.columns:
            embedded = self.model_.embed(splits["train"].to(device))
            embedded = embedded[order[held:].argsort()[: settings.memory]]
            several = len(embedded) > 1
            bandwidth = best_bandwidth(embedded, settings.resolution) if several else 1.0
            self.model_.network = Ensemble(
                [self.model_.network, Memory(embedded, bandwidth)]
            ).eval()
        self.schema_ = schema
        self.n_iter_, self.best_iter_ = learner.at.step, learner.at.best_step
        if settings.verbose and (why := learner.stopped()):
            print(why, file=sys.stderr)
        found = self._bound(splits["validation"])
        self.validation_score_ = found.elbo.mean().item()
        self.validation_score_std_ = found.error.square().sum().sqrt().item() / held
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
        affine = _affine(rows.numpy())
        known = _mixture(affine(dataset.splits["train"]), settings.resolution).to(device)
        learner = Trainer(*configs, dataset, str(device), affine=affine, known=known)
        few = dataset.splits["validation"][: MEASURED[0]]
        measure = _Measure(few, configs[1].seed, known.double(), settings.resolution)
        self.model_ = learner.fit(measure, update).double()
        _widen(self.model_, settings.resolution)
        self._known = known.double()
        return learner

    def _read(self, X: "ArrayLike") -> tuple[Schema, Tensor]:
        """Return the rows to fit and their schema: of a table for a mixed frame, else real."""
        if not frames.is_mixed(X):
            x = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
            return Schema("real", (x.shape[1],), None), torch.tensor(x)
        schema, notes = schema_of(cast(Any, X))
        for note in notes:
            _note(note)
        names = [str(name) for name in X.columns]  # type: ignore[union-attr]
        self.feature_names_in_ = np.array(names, dtype=object)
        self.n_features_in_, self._pandas = len(names), hasattr(X, "iloc")
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
        only (in a table, on the place of the row), so the errors of different rows are
        independent, and the error of the mean of N rows is the root of the sum of their squares
        divided by N.

        Args:
            X: rows, (N, D); a frame if `fit` was given a mixed one.
            return_std: also return the standard error of each score, (N,), nats.

        Raises:
            NotFittedError: before `fit`.
            ValueError: other columns than those of `fit`, or values that are not finite.
        """
        found = self._bound(self._rows(X))
        scores = found.elbo.numpy()
        return (scores, found.error.numpy()) if return_std else scores

    def _bound(self, x: Tensor) -> RowBounds:
        if self._known is not None:
            return row_bounds(self.model_, x, self._draws, self._seed, self._known)
        calls = max(self._draws, 2 * REPLICATES)
        found = elbo(self.model_, Batch(x), calls=calls, seed=self._seed)
        return RowBounds(found.elbo, found.standard_error)


class _Measure:
    """Measures the bound of held-out rows by an averaged model.

    A model counts as better than the first one only by the part of the gain that exceeds its
    standard error; otherwise the best of many would win by chance.
    """

    def __init__(self, x: Tensor, seed: int, known: MixtureDenoiser, resolution: float) -> None:
        self.x, self.seed, self.known = x, seed, known
        self.resolution = resolution
        self.first: Tensor | None = None

    def __call__(self, model: Model) -> float:
        _widen(model, self.resolution)
        nats = -row_bounds(model, self.x, MEASURED[1], self.seed, self.known).elbo
        if self.first is None:
            self.first = nats
        gain = self.first - nats
        error = gain.std(correction=0) / len(gain) ** 0.5
        return (self.first.mean() - gain.mean() + error).item()


def _widen(model: Model, resolution: float) -> None:
    """Make the decoder at least as wide as the resolution."""
    with torch.no_grad():
        cast(Tensor, model.decoder.log_spread).clamp_(min=float(np.log(resolution)))


class DiffusionDensity(DensityMixin, _Diffusion):
    """Estimate the density of real rows by a diffusion model.

    Args:
        resolution: the finest detail, in standard deviations of each column: the floor under the
            density of repeated values, like `reg_covar` of a mixture of Gaussians.
        steps: maximal number of training steps; by default 200 to 1000, from the number of rows.
            Training ends earlier after five measurements on the rows held out without improvement.
        batch: rows per step.
        lr: peak learning rate.
        width: hidden units.
        depth: residual blocks.
        dropout: fraction of hidden units dropped in training.
        weight_decay: weight decay of the network's matrices.
        validation: fraction of the rows held out, for early stopping.
        memory: rows whose kernel density is averaged with the network; 0 for the network alone.
        draws: draws of times and noise in the score of a row, at least 2.
        random_state: seed of everything random.
        device: where to train and to score: "cpu", "cuda"; "auto" is cuda, if there is one. Small
            networks are quicker on a CPU.
        verbose: show a progress bar and notes on the error stream while fitting.

    Attributes:
        model_: the `nelbo.Model`.
        schema_: the `nelbo.data.Schema` of a row; with columns, if `fit` was given a mixed frame.
        n_iter_: number of training steps made.
        best_iter_: the step whose weights were kept; 0 for the initial mixture.
        validation_score_: the mean score of the rows held out.
        validation_score_std_: its Monte Carlo standard error.
        n_features_in_: number of columns.
        feature_names_in_: their names, if `fit` was given a frame whose names are strings.
    """

    def fit(self, X: "ArrayLike", y: object = None) -> Self:
        """Train a model of the rows of X, (N, D), or of a mixed frame; y is not used.

        Raises:
            ValueError: fewer than two rows, values that are not finite, sparse data, or columns
                too large for their squares.
        """
        self._learn(X)
        return self

    def score(self, X: "ArrayLike", y: object = None) -> float:
        """Return the mean of `score_samples`, nats per row."""
        return float(np.mean(self.score_samples(X)))

    def sample(
        self, n_samples: int = 1, random_state: "int | RandomState | None" = None, steps: int = 64
    ) -> "np.ndarray | Frame":
        """Draw rows from the model, (n_samples, D), in the units of X.

        Returns a frame with the names of the columns if `sklearn.set_config(transform_output=...)`
        is "pandas" or "polars"; after a mixed frame, always a frame of its library.

        Args:
            n_samples: number of rows.
            random_state: replaces that of the estimator.
            steps: steps of the reverse process, one network call each.
        """
        check_is_fitted(self)
        n_samples, steps = integer("n_samples", n_samples, 1), integer("steps", steps, 1)
        random = check_random_state(self.random_state if random_state is None else random_state)
        seed, schema = int(random.randint(2**31 - 1)), self.schema_

        def draw(rows: Tensor, seed: int) -> Tensor:
            return ancestral(self.model_, len(rows), steps, seed).cpu()

        if schema.columns:
            rows = within(draw, n_samples, schema, seed).numpy()
            frame = encoding.decode(rows, schema.columns)
            return frame.to_pandas() if self._pandas else frame
        rows = draw(torch.arange(n_samples), seed).numpy()
        return _framed(rows, getattr(self, "feature_names_in_", None))


@dataclass(kw_only=True, eq=False, repr=False)
class DiffusionOutlierDetector(OutlierMixin, _Diffusion):
    """Detect rows unlike those of `fit`, by the density of a diffusion model at a resolution.

    The score is the bound on the log-density of the rows at `resolution`. The denoiser averages
    the network with the kernel density of a memory of rows: the network models structure, the
    memory the places where rows have been.

    Args:
        contamination: the fraction of the rows of `fit` that lie below `offset_`; "auto" sets
            `offset_` to the 10 % quantile of the rows held out of training.
        resolution: the finest detail, in standard deviations of each column.
        steps: maximal number of training steps; if None, 200 to 1000, from the number of rows.
            Training ends earlier after five measurements on the rows held out without improvement.
        batch: rows per step.
        lr: peak learning rate.
        width: hidden units.
        depth: residual blocks.
        dropout: fraction of hidden units dropped in training.
        weight_decay: weight decay of the network's matrices.
        validation: fraction of the rows held out, for early stopping.
        memory: rows in the memory, at most; 0 for the network alone.
        draws: draws of times and noise in the score of a row, at least 2.
        random_state: seed of everything random.
        device: where to train and to score: "cpu", "cuda"; "auto" is cuda, if there is one. Small
            networks are quicker on a CPU.
        verbose: show a progress bar and notes on the error stream while fitting.

    Attributes:
        offset_: threshold; `decision_function` is `score_samples` minus this.
        model_: the `nelbo.Model`.
        schema_: the `nelbo.data.Schema` of a row; with columns, if `fit` was given a mixed frame.
        n_iter_: number of training steps made.
        best_iter_: the step whose weights were kept; 0 for the initial mixture.
        validation_score_: the mean score of the rows held out.
        validation_score_std_: its Monte Carlo standard error.
        n_features_in_: number of columns.
        feature_names_in_: their names, if `fit` was given a frame whose names are strings.
    """

    contamination: float | str = "auto"
    resolution: float = 0.1
    steps: int | None = 400
    memory: int = 2000

    def fit(self, X: "ArrayLike", y: object = None) -> Self:
        """Train a model of the rows of X, as `DiffusionDensity`, and set `offset_`; y is not used.

        Raises:
            ValueError: fewer than two rows, values that are not finite, sparse data, columns too
                large for their squares, or an invalid contamination.
        """
        share = plain(self.contamination)
        auto = isinstance(share, str) and share == "auto"
        if not auto and not (isinstance(share, int | float) and 0 < share <= 0.5):
            raise ValueError(f'contamination must be "auto" or in (0, 0.5]; got {share!r}')
        trained, held = self._learn(X)
        scores = self._bound(held if auto else torch.cat([trained, held])).elbo
        self.offset_ = float(np.quantile(scores.numpy(), 0.1 if auto else share))
        return self

    def decision_function(self, X: "ArrayLike") -> np.ndarray:
        """Return `score_samples` minus `offset_`, (N,), nats: negative for outliers."""
        return np.asarray(self.score_samples(X)) - self.offset_

    def predict(self, X: "ArrayLike") -> np.ndarray:
        """Return 1 for rows like those of `fit`, -1 for outliers, (N,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)


def _note(line: str) -> None:
    warnings.warn(line, stacklevel=4)


@contextmanager
def _bar(show: bool, steps: int) -> Iterator[Callable[[int, str], object]]:
    if not show:
        yield lambda done, note: None
        return
    with progress_bar("train", steps) as update:
        yield update


def _affine(x: np.ndarray) -> Affine:
    """Return the standardisation of columns; a constant column keeps its unit."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaler = StandardScaler().fit(x)
    if not (np.isfinite(scaler.scale_).all() and np.isfinite(scaler.mean_).all()):
        raise ValueError("a column of X is too large for its square; rescale it")
    return Affine(torch.from_numpy(scaler.mean_), torch.from_numpy(scaler.scale_))


def _mixture(e: Tensor, resolution: float) -> MixtureDenoiser:
    """Return the initial mixture of Gaussians; no component is narrower than the resolution /
    4."""
    if e.shape[1] > WIDEST:
        return MixtureDenoiser.standard(e.shape[1])
    least = (resolution / NARROWER) ** 2
    found = fit(e.numpy(), COMPONENTS, least)
    weight, mean, covariance = map(
        torch.from_numpy, (found.weights_, found.means_, found.covariances_)
    )
    variance, axes = torch.linalg.eigh(covariance)
    return MixtureDenoiser(weight, mean, variance.clamp(min=least), axes)


def _framed(rows: np.ndarray, names: "np.ndarray | None") -> np.ndarray:
    """Return rows as an array or a frame, as scikit-learn is configured."""
    output = get_config()["transform_output"]
    if output == "default":
        return rows
    columns = [f"x{i}" for i in range(rows.shape[1])] if names is None else list(names)
    return import_module(output).DataFrame(dict(zip(columns, rows.T, strict=True)))
