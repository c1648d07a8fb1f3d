"""Densities and outliers in scikit-learn's manner: `fit(X)`, then scores per row, and samples.

Both train a diffusion model of real rows by `learner.Learner`, in memory. The model is of the
standardised rows seen at a finite resolution r: its first latent keeps a noise of r standard
deviations of each column. So no column, however few values it has, gives more than

    log P(x) <= -Σ_i log( √(2π) r s_i ),    s_i the standard deviation of column i (1 if constant).

Scores use the same times and noise for every row (`common_noise`): they are a function of the row.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Self, cast

import numpy as np
import torch
from sklearn import get_config
from sklearn.base import BaseEstimator, DensityMixin, OutlierMixin
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from nelbo.common_noise import common_bound
from nelbo.config import ModelConfig, TrainConfig
from nelbo.data import Dataset, Schema
from nelbo.estimate import Grid
from nelbo.grids import even_times
from nelbo.learner import Learner
from nelbo.nn.ensemble import Ensemble
from nelbo.nn.memory import Memory, best_bandwidth
from nelbo.process import Affine
from nelbo.sample import ancestral

if TYPE_CHECKING:
    from numpy.random import RandomState
    from numpy.typing import ArrayLike

PATIENCE = 5  # measurements without a better one


class _Diffusion(BaseEstimator):
    """What both share: a model of the rows of X, and its bound for a row."""

    def __init__(
        self,
        *,
        resolution: float = 0.01,
        steps: int | None = None,
        batch: int = 128,
        lr: float = 2e-3,
        width: int = 64,
        depth: int = 3,
        dropout: float = 0.1,
        weight_decay: float = 0.1,
        validation: float = 0.1,
        memory: int = 0,
        draws: int = 32,
        random_state: "int | RandomState | None" = None,
    ) -> None:
        self.resolution = resolution
        self.steps = steps
        self.batch = batch
        self.lr = lr
        self.width = width
        self.depth = depth
        self.dropout = dropout
        self.weight_decay = weight_decay
        self.validation = validation
        self.memory = memory
        self.draws = draws
        self.random_state = random_state

    def _learn(self, X: "ArrayLike") -> tuple[np.ndarray, np.ndarray]:
        """Fit; returns the rows that were trained on and those held out."""
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must be a share in (0, 1); got {self.validation}")
        if not 0 < self.resolution <= 1:
            raise ValueError(f"resolution must be in (0, 1]; got {self.resolution}; try 0.01")
        if not self.memory >= 0:
            raise ValueError(f"memory must be a number of rows, or 0; got {self.memory}")
        x = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        random = check_random_state(self.random_state)
        seed, order = int(random.randint(2**31 - 1)), random.permutation(len(x))
        held = min(len(x) - 1, max(1, round(self.validation * len(x))))
        rows = {"train": x[np.sort(order[held:])], "validation": x[np.sort(order[:held])]}
        splits = {name: torch.tensor(part) for name, part in rows.items()}
        dataset = Dataset("memory", Schema("real", (x.shape[1],), None), splits)
        learner = Learner(*self._configure(len(x), seed), dataset, affine=_affine(x))
        model = learner.fit(PATIENCE).double()
        with torch.no_grad():  # no narrower than what is stated above
            spread = cast(Tensor, model.decoder.log_spread)
            spread.clamp_(min=float(np.log(self.resolution)))
        if self.memory:
            known = model.embed(splits["train"])[order[held:].argsort()[: self.memory]]
            bandwidth = best_bandwidth(known, self.resolution) if len(known) > 1 else 1.0
            model.network = Ensemble([model.network, Memory(known, bandwidth)]).eval()
        self.model_, self.n_iter_, self._seed = model, learner.at.step, seed
        return rows["train"], rows["validation"]

    def _configure(self, rows: int, seed: int) -> tuple[ModelConfig, TrainConfig]:
        """Names and sizes; few rows need few steps."""
        steps = min(1000, max(200, 2 * rows)) if self.steps is None else self.steps
        model = ModelConfig(
            head="velocity",
            step="posterior",
            decoder="gaussian",
            network="mlp",
            gamma_min=2 * float(np.log(self.resolution)) if self.resolution > 0 else 0.0,
            width=self.width,
            depth=self.depth,
            dropout=self.dropout,
        )
        train = TrainConfig(
            steps=steps,
            batch=self.batch,
            lr=self.lr,
            warmup=50,
            weight_decay=self.weight_decay,
            cross_entropy=0.0,
            augment=0.0,
            evaluate_every=50,
            seed=seed,
        )
        return model, train

    def score_samples(self, X: "ArrayLike") -> np.ndarray:
        """The lower bound on log P(x) of each row, (N,), nats, in the units of X.

        Raises:
            NotFittedError: before `fit`.
            ValueError: other columns than those of `fit`, or values that are not finite.
        """
        check_is_fitted(self)
        x = validate_data(self, X, dtype=np.float64, reset=False)
        return self._bound(x)

    def _bound(self, x: np.ndarray) -> np.ndarray:
        return common_bound(self.model_, torch.tensor(x), self.draws, self._seed).elbo.numpy()


class DiffusionDensity(DensityMixin, _Diffusion):
    """The density of the rows of a table of real numbers, by a diffusion model.

    Args:
        resolution: the finest detail, in standard deviations of each column: the floor under a
            density of repeated values, as `reg_covar` is for a mixture of Gaussians.
        steps: training steps, at most; by the number of rows where left out, 200 to 1000.
        batch: rows in a step.
        lr: peak learning rate.
        width: hidden units.
        depth: residual blocks.
        dropout: share of hidden units dropped in training.
        weight_decay: of the matrices of the network.
        validation: share of the rows held out, to stop in time.
        memory: rows whose kernel density stands beside the network; 0 for the network alone.
        draws: of times and noise in the score of a row.
        random_state: everything random follows from it.

    Attributes:
        model_: the `nelbo.Model`.
        n_iter_: training steps that were made.
        n_features_in_: number of columns.
        feature_names_in_: their names, if `fit` was given a frame whose names are texts.
    """

    def fit(self, X: "ArrayLike", y: object = None) -> Self:
        """Train a model of the rows of X, (N, D); y is not used.

        Raises:
            ValueError: fewer than two rows, values that are not finite, sparse data, or columns
                too large for their squares.
        """
        self._learn(X)
        return self

    def score(self, X: "ArrayLike", y: object = None) -> float:
        """The mean of `score_samples`, nats per row."""
        return float(self.score_samples(X).mean())

    def sample(
        self, n_samples: int = 1, random_state: "int | RandomState | None" = None, steps: int = 64
    ) -> np.ndarray:
        """Draw rows from the model, (n_samples, D), in the units of X.

        A frame of the columns' names where `sklearn.set_config(transform_output=...)` asks for
        "pandas" or "polars".

        Args:
            n_samples: how many.
            random_state: in place of that of the estimator.
            steps: of the reverse process, a network call each.
        """
        check_is_fitted(self)
        random = check_random_state(self.random_state if random_state is None else random_state)
        grid = Grid(even_times(self.model_.process.schedule, steps, steps))
        rows = ancestral(self.model_, n_samples, grid, int(random.randint(2**31 - 1))).numpy()
        return _framed(rows, getattr(self, "feature_names_in_", None))


class DiffusionOutlierDetector(OutlierMixin, _Diffusion):
    """Rows that are unlike those of `fit`, by the density of a diffusion model at a resolution.

    The score is the bound on the log-density of the rows seen at `resolution`. Beside the network
    stands the kernel density of a memory of rows, their denoisers averaged: the network knows
    structure, the memory where rows have been.

    Args:
        contamination: the share of the rows of `fit` that lie below `offset_`; "auto" puts it
            where one in ten of the rows lies that were held out of training.
        resolution: the finest detail, in standard deviations of each column.
        steps: training steps, at most; by the number of rows, 200 to 1000, where None.
        batch: rows in a step.
        lr: peak learning rate.
        width: hidden units.
        depth: residual blocks.
        dropout: share of hidden units dropped in training.
        weight_decay: of the matrices of the network.
        validation: share of the rows held out, to stop in time.
        memory: rows in the memory, at most; 0 for the network alone.
        draws: of times and noise in the score of a row.
        random_state: everything random follows from it.

    Attributes:
        offset_: `decision_function` is `score_samples` less this.
        model_: the `nelbo.Model`.
        n_iter_: training steps that were made.
        n_features_in_: number of columns.
        feature_names_in_: their names, if `fit` was given a frame whose names are texts.
    """

    def __init__(
        self,
        *,
        contamination: float | str = "auto",
        resolution: float = 0.1,
        steps: int | None = 400,
        batch: int = 128,
        lr: float = 2e-3,
        width: int = 64,
        depth: int = 3,
        dropout: float = 0.1,
        weight_decay: float = 0.1,
        validation: float = 0.1,
        memory: int = 2000,
        draws: int = 32,
        random_state: "int | RandomState | None" = None,
    ) -> None:
        self.contamination = contamination
        super().__init__(
            resolution=resolution,
            steps=steps,
            batch=batch,
            lr=lr,
            width=width,
            depth=depth,
            dropout=dropout,
            weight_decay=weight_decay,
            validation=validation,
            memory=memory,
            draws=draws,
            random_state=random_state,
        )

    def fit(self, X: "ArrayLike", y: object = None) -> Self:
        """Train a model of the rows of X, (N, D), and place `offset_`; y is not used.

        Raises:
            ValueError: fewer than two rows, values that are not finite, sparse data, columns too
                large for their squares, or no such contamination.
        """
        auto = isinstance(self.contamination, str) and self.contamination == "auto"
        if not auto and not (
            isinstance(self.contamination, int | float) and 0 < self.contamination <= 0.5
        ):
            raise ValueError(
                f'contamination must be "auto" or in (0, 0.5]; got {self.contamination!r}'
            )
        trained, held = self._learn(X)
        share = 0.1 if auto else float(self.contamination)
        scores = self._bound(held if auto else np.concatenate([trained, held]))
        self.offset_ = float(np.quantile(scores, share))
        return self

    def decision_function(self, X: "ArrayLike") -> np.ndarray:
        """`score_samples` less `offset_`, (N,), nats: negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: "ArrayLike") -> np.ndarray:
        """1 for rows like those of `fit`, -1 for outliers, (N,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)


def _affine(x: np.ndarray) -> Affine:
    """Standardisation by columns; a constant one has no scale of its own and keeps its unit."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaler = StandardScaler().fit(x)
    if not (np.isfinite(scaler.scale_).all() and np.isfinite(scaler.mean_).all()):
        raise ValueError("a column of X is too large for its square; rescale it")
    return Affine(torch.from_numpy(scaler.mean_), torch.from_numpy(scaler.scale_))


def _framed(rows: np.ndarray, names: "np.ndarray | None") -> np.ndarray:
    """The rows as scikit-learn is configured to give them."""
    output = get_config()["transform_output"]
    if output == "default":
        return rows
    columns = [f"x{i}" for i in range(rows.shape[1])] if names is None else list(names)
    return import_module(output).DataFrame(dict(zip(columns, rows.T, strict=True)))
