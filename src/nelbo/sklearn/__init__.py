"""Density estimation and outlier detection as scikit-learn estimators: `fit(X)`, scores, samples.

Both train a diffusion model of real rows in memory, by `training.trainer.Trainer`. Training starts
from a mixture of Gaussians (`diffusion.gaussian_mixture.fit`), whose exact denoiser the network
corrects, and stops by the bound of held-out rows. The model describes the standardised rows at a
finite resolution r: its first latent keeps noise of r standard deviations of each column, so that
the decoder is never narrower. Thus a column, however few distinct values it has, contributes to

    log P(x) <= -Σ_i log( √(2π) r s_i ),    s_i the standard deviation of column i (1 if constant).

A frame of pandas or polars with words, booleans or missing values is modelled as `nelbo train`
models a table instead: each column as what it is, numbers at the precision of their cells. There
is then no mixture, no resolution and no memory, the score is the bound of `nelbo.elbo`, and
samples are frames in the types of X.

The times and the noise in the score of a row depend on the seed and the row only.
"""

from nelbo.sklearn.density import DiffusionDensity
from nelbo.sklearn.outliers import DiffusionOutlierDetector

__all__ = ["DiffusionDensity", "DiffusionOutlierDetector"]
