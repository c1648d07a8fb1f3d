"""The detector of outliers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from sklearn.base import OutlierMixin

from nelbo._utils.scalars import plain
from nelbo.sklearn.base import Diffusion

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


@dataclass(kw_only=True, eq=False, repr=False)
class DiffusionOutlierDetector(OutlierMixin, Diffusion):
    """Detect rows unlike those of `fit`, by the density of a diffusion model at a resolution.

    The score is the bound on the log-density of the rows at `resolution`. The denoiser averages
    the network with the kernel density of a memory of rows: the network models structure, the
    memory the places where rows have been.

    Args:
        contamination: the fraction of the rows of `fit` that lie below `offset_`; "auto" sets
            `offset_` to the 10 % quantile of the rows held out of training.
        resolution: the finest detail, in standard deviations of each column. Of rows of numbers
            alone, as is `memory`: refused with a mixed frame unless left as it is.
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
        found, place = self._bound(held if auto else torch.cat([trained, held]))
        scores = found.elbo[place].numpy()
        self.offset_ = float(np.quantile(scores, 0.1 if auto else share))
        return self

    def decision_function(self, X: "ArrayLike") -> np.ndarray:
        """Return `score_samples` minus `offset_`, (N,), nats: negative for outliers."""
        return np.asarray(self.score_samples(X)) - self.offset_

    def predict(self, X: "ArrayLike") -> np.ndarray:
        """Return 1 for rows like those of `fit`, -1 for outliers, (N,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)
