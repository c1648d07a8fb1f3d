r"""The law that a network of numbers starts from: a mixture of Gaussians over whole rows.

    P(e) = Σ_k π_k N( e; μ_k, Σ_k )     gives     q(z_t) = Σ_k π_k N( z; √α μ_k, M_k ),

M_k = αΣ_k + (1-α)I; and with P_k = M_k⁻¹, y_k = z - √α μ_k, each column i given the others is

    z_i | z_-i, k ~ N( z_i - τ_ki (P_k y_k)_i, τ_ki ),      τ_ki = 1/(P_k)_ii,

    P(k|z_-i) ∝ π_k N( z; √α μ_k, M_k ) / N( z_i | z_-i, k ).

The first is z_i = √α e_i + √(1-α) ε for a Gaussian e_i, whose mean and variance follow. So every
column has a mixture given the other columns at the same noise level, and what z_i itself says of
e_i is added where it is needed. Values that repeat in a column, and missing ones, are no
Gaussian: their shares are known within each k, as in latent class analysis.
"""

import copy
import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture

ROWS = 16_384  # on which the number of components is chosen, at most
FITTED = (65_536, 2**22)  # rows that the mixture is fitted to: at most; and times D², or ROWS
HELD = 5  # each so manieth of them chooses the number of components
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 64, 128)  # components that are tried
PATIENCE = 2  # of these in a row that are no better
SHRINKAGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
TOLERANCE = 1e-3  # nats by which a last step of EM is better
LEAST = 4  # rows for each component, at least; and as many as columns
FEW = 8  # components that a network is given at least; copies, where fewer fit better
APART = 0.1  # of its width that a copy of a component is moved
WIDTH = 0.01  # of a component at least, standard deviations of a column


class LatentClasses(nn.Module):
    """A mixture of Gaussians over D columns.

    Args:
        columns: D.
        components: K, at most; as many are in use as fit best, though FEW at least.
        special: S, of the values of each column that are no Gaussian, at most.
    """

    log_weight: Tensor
    mean: Tensor
    axes: Tensor
    spread: Tensor
    log_share: Tensor
    log_rest: Tensor
    used: Tensor

    def __init__(self, columns: int, components: int, special: int) -> None:
        super().__init__()
        d, k, s = columns, components, special
        self.register_buffer("log_weight", torch.full((k,), -math.log(k)))
        self.register_buffer("mean", torch.zeros(k, d))
        self.register_buffer("axes", torch.eye(d).expand(k, d, d).clone())
        self.register_buffer("spread", torch.ones(k, d))  # variances along the axes
        self.register_buffer("log_share", torch.full((d, k, s), -torch.inf))
        self.register_buffer("log_rest", torch.zeros(d, k))  # of what is not special
        self.register_buffer("used", torch.tensor([k, s]))

    def start_from(self, e: Tensor, special: Tensor) -> None:
        """Fit to rows e, (N, D); which special value each is, (N, D) integers, S if none."""
        found = fit(e.numpy(), len(self.log_weight))
        weight, mean, covariance, belongs = map(
            torch.from_numpy,
            (found.weights_, found.means_, found.covariances_, found.predict_proba(e.numpy())),
        )
        of = torch.arange(max(len(weight), min(FEW, len(self.log_weight)))) % len(weight)
        variance, axes = torch.linalg.eigh(covariance[of])
        # copies are moved a little, or they would stay alike in training
        g = torch.Generator().manual_seed(0)
        moved = APART * variance.sqrt() * torch.randn(*variance.shape, generator=g)
        moved[: len(weight)] = 0
        counts = belongs.new_zeros(e.shape[1], self.log_share.shape[2] + 1, belongs.shape[1])
        for of_column, which in zip(counts, special.T, strict=True):
            of_column.index_add_(0, which, belongs)
        counts = counts[:, :-1].mT  # of each special value in each class, (D, K, S)
        overall = counts.sum(1, keepdim=True) / len(e)  # counts as one row more of each class
        shares = ((counts + overall) / (belongs.sum(0)[:, None] + 1))[:, of]
        rest = (1 - shares.sum(2)).clamp(min=1 / len(e))
        k, s = len(of), _last((counts > 0).any(1).any(0)) + 1
        self.used.copy_(torch.tensor([k, s]))
        self.log_weight[:k] = (weight[of] / torch.bincount(of)[of]).log()
        self.mean[:k] = mean[of] + torch.einsum("kde,ke->kd", axes, moved)
        self.axes[:k], self.spread[:k] = axes, variance
        self.log_share[:, :k], self.log_rest[:, :k] = shares.log(), rest.log()

    def forward(self, z: Tensor, alpha: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The law of each column given the others: log-weights, then means and variances.

        Args:
            z: (B, D), at a level of noise.
            alpha: α_t, (B,).
            noise: 1-α_t, (B,).

        Returns:
            Log-weights (B, D, S+K), of the special values and of the components in use; means
            and variances of e_i in these components, (B, D, K).
        """
        a, n = (v.to(z)[:, None, None] for v in (alpha, noise))
        k, s = self.used.tolist()
        axes, mean, spread = (v[:k].to(z) for v in (self.axes, self.mean, self.spread))
        total = a * spread + n  # eigenvalues of M_k, (B, K, D)
        y = z[:, None] - a.sqrt() * mean
        along = torch.einsum("bkd,kde->bke", y, axes)
        pulled = torch.einsum("bke,kde->bkd", along / total, axes)  # P_k y_k
        tau = 1 / torch.einsum("bke,kde->bkd", 1 / total, axes.square())
        log_joint = self.log_weight[:k].to(z) - (total.log() + along.square() / total).sum(2) / 2
        log_others = log_joint[..., None] + (tau.log() + pulled.square() * tau) / 2
        log_class = log_others.log_softmax(1).transpose(1, 2)  # log P(k|z_-i), (B, D, K)
        share = self.log_share[:, :k, :s].exp().to(z)
        special = torch.einsum("bdk,dks->bds", log_class.exp(), share).log()
        log_weights = torch.cat([special, log_class + self.log_rest[:, :k].to(z)], -1)
        mean = mean + (y - tau * pulled) / a.sqrt()
        # (τ-(1-α))/α without the difference: P_ii τ = 1, and Σ_e U_ie² = 1
        variance = torch.einsum("bke,kde->bkd", spread / total, axes.square()) * tau
        return log_weights, mean.transpose(1, 2), variance.transpose(1, 2)


def fit(e: np.ndarray, most: int, floor: float = WIDTH**2) -> "GaussianMixture":
    """The mixture of Gaussians whose size and shrinkage tell held-out rows best.

    Sizes are tried from 1 on until two in a row are no better, each with the covariances
    (1-λ) Σ_k + λ I for a few λ: few rows of many columns do not settle them. One component with
    λ = 1 is the standard normal law, so with too few rows for anything else the law is that.

    Args:
        e: embedded rows, of about mean 0 and variance 1 in each column, (N, D).
        most: components, at most.
        floor: the least variance of a component in any direction.
    """
    from sklearn.mixture import GaussianMixture

    some = _thinned(e, ROWS)
    held = np.arange(len(some)) % HELD == HELD - 1

    def fitted(mixture: GaussianMixture, rows: np.ndarray) -> GaussianMixture:
        mixture.set_params(reg_covar=floor, tol=TOLERANCE, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not quite converged
            return mixture.fit(rows)

    best, chosen, shrinkage, worse = -math.inf, GaussianMixture(), 1.0, 0
    for k in (k for k in COUNTS if k <= most):
        if not held.any() or worse == PATIENCE:
            break
        if k > 1 and k * max(LEAST, e.shape[1]) > (~held).sum():
            break
        found, worse = fitted(GaussianMixture(k), some[~held]), worse + 1
        for share in SHRINKAGES:
            score = _shrunk(found, share).score(some[held])
            if score > best:
                best, shrinkage, worse = score, share, 0
                # all rows are fitted from there: another start ends elsewhere
                chosen = GaussianMixture(
                    k,
                    weights_init=found.weights_,
                    means_init=found.means_,
                    precisions_init=found.precisions_,
                )
    rows = _thinned(e, max(ROWS, min(FITTED[0], FITTED[1] // e.shape[1] ** 2)))
    return _shrunk(fitted(chosen, rows), shrinkage)


def _shrunk(found: "GaussianMixture", share: float) -> "GaussianMixture":
    """The mixture with a share of the identity in its covariances."""
    covariances = (1 - share) * found.covariances_ + share * np.eye(found.means_.shape[1])
    shrunk = copy.copy(found)
    shrunk.covariances_ = covariances
    halves = np.linalg.inv(np.linalg.cholesky(covariances))
    shrunk.precisions_cholesky_ = halves.transpose(0, 2, 1)
    if share == 1 and len(shrunk.means_) == 1:
        shrunk.means_ = np.zeros_like(shrunk.means_)
    return shrunk


def _thinned(e: np.ndarray, most: int) -> np.ndarray:
    return e[:: math.ceil(len(e) / most)]


def _last(which: Tensor) -> int:
    """The last that is true, or 0."""
    return int((which * torch.arange(len(which))).max())
