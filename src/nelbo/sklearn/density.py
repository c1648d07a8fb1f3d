"""The estimator of a density."""

from importlib import import_module
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from sklearn import get_config
from sklearn.base import DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from nelbo._utils.scalars import integer
from nelbo.data.tabular import encoding, frames
from nelbo.sampling.imputation import within
from nelbo.sampling.samplers import ancestral
from nelbo.sklearn.base import Diffusion

if TYPE_CHECKING:
    from numpy.random import RandomState
    from numpy.typing import ArrayLike

    from nelbo.data.tabular.tables import Frame


class DiffusionDensity(DensityMixin, Diffusion):
    """Estimate the density of real rows by a diffusion model.

    Args:
        resolution: the finest detail, in standard deviations of each column: the floor under the
            density of repeated values, like `reg_covar` of a mixture of Gaussians. Of rows of
            numbers alone, as is `memory`: refused with a mixed frame unless left as it is.
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
        is "pandas" or "polars"; after a mixed frame, always a frame of its library and types.

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
            return frame if self._dtypes is None else frames.to_pandas(frame, self._dtypes)
        rows = draw(torch.arange(n_samples), seed).numpy()
        return _framed(rows, getattr(self, "feature_names_in_", None))


def _framed(rows: np.ndarray, names: "np.ndarray | None") -> np.ndarray:
    """Return rows as an array or a frame, as scikit-learn is configured."""
    output = get_config()["transform_output"]
    if output == "default":
        return rows
    columns = [f"x{i}" for i in range(rows.shape[1])] if names is None else list(names)
    return import_module(output).DataFrame(dict(zip(columns, rows.T, strict=True)))
