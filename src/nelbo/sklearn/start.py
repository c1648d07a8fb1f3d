"""Training of real rows: the mixture it starts from, and the measurements that end it."""

from typing import cast

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from nelbo.diffusion.gaussian import Affine
from nelbo.diffusion.gaussian_mixture import fit
from nelbo.diffusion.model import Model
from nelbo.evaluation.row_bounds import row_bounds
from nelbo.nn.mixture import MixtureDenoiser

COMPONENTS = 128  # of the mixture, at most
NARROWER = 4  # a component may be narrower than the resolution by this factor
WIDEST = 1000  # columns, beyond which training starts from a standard normal distribution
MEASURED = (1000, 8)  # held-out rows, at most, and draws per row in a measurement


def affine_of(x: np.ndarray) -> Affine:
    """Return the standardisation of columns; a constant column keeps its unit."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaler = StandardScaler().fit(x)
    if not (np.isfinite(scaler.scale_).all() and np.isfinite(scaler.mean_).all()):
        raise ValueError("a column of X is too large for its square; rescale it")
    return Affine(torch.from_numpy(scaler.mean_), torch.from_numpy(scaler.scale_))


def mixture_of(e: Tensor, resolution: float) -> MixtureDenoiser:
    """Return the initial mixture; no component is narrower than a quarter of the resolution."""
    if e.shape[1] > WIDEST:
        return MixtureDenoiser.standard(e.shape[1])
    least = (resolution / NARROWER) ** 2
    found = fit(e.numpy(), COMPONENTS, least)
    weight, mean, covariance = map(
        torch.from_numpy, (found.weights_, found.means_, found.covariances_)
    )
    variance, axes = torch.linalg.eigh(covariance)
    return MixtureDenoiser(weight, mean, variance.clamp(min=least), axes)


class Measure:
    """Measures the bound of held-out rows by an averaged model.

    A model counts as better than the first one only by the part of the gain that exceeds its
    standard error; otherwise the best of many would win by chance.
    """

    def __init__(self, x: Tensor, seed: int, known: MixtureDenoiser, resolution: float) -> None:
        self.x, self.seed, self.known = x[: MEASURED[0]], seed, known
        self.resolution = resolution
        self.first: Tensor | None = None

    def __call__(self, model: Model) -> float:
        """Return the mean cost of the rows, nats, less the part of the gain that is sure."""
        widen(model, self.resolution)
        nats = -row_bounds(model, self.x, MEASURED[1], self.seed, self.known).elbo
        if self.first is None:
            self.first = nats
        gain = self.first - nats
        error = gain.std(correction=0) / len(gain) ** 0.5
        return (self.first.mean() - gain.mean() + error).item()


def widen(model: Model, resolution: float) -> None:
    """Make the decoder at least as wide as the resolution."""
    with torch.no_grad():
        cast(Tensor, model.decoder.log_spread).clamp_(min=float(np.log(resolution)))
