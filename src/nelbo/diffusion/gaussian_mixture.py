r"""Mixtures of Gaussians over whole rows, from which networks for numbers start.

    P(e) = Σ_k π_k N( e; μ_k, Σ_k )     gives     q(z_t) = Σ_k π_k N( z; √α μ_k, M_k ),

M_k = αΣ_k + (1-α)I; and with P_k = M_k⁻¹, y_k = z - √α μ_k, each column i given the others is

    z_i | z_-i, k ~ N( z_i - τ_ki (P_k y_k)_i, τ_ki ),      τ_ki = 1/(P_k)_ii,

    P(k|z_-i) ∝ π_k N( z; √α μ_k, M_k ) / N( z_i | z_-i, k ).

The former is the distribution of z_i = √α e_i + √(1-α) ε for a Gaussian e_i, whose mean and
variance follow. So each column is a mixture given the other columns at the same noise level; the
evidence of z_i itself is added where it is needed. Repeating and missing values of a column are
not Gaussian: they have a probability within each k, as in latent class analysis.
"""

import copy
import math
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from typing_extensions import override

from nelbo._utils.numerics import thinned

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture


ROWS = 16_384  # rows on which the number of components is selected, at most
FITTED = (65_536, 2**22)  # rows of the final fit, at most; and rows times D², unless below ROWS
HELD = 5  # one row in 5 is held out for the selection
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 32, 64, 128)  # numbers of components to try
PATIENCE = 2  # numbers in a row without an improvement after which the search ends
SHRINKAGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)  # weights λ of the identity in the covariances
TOLERANCE = 1e-3  # nats per row; EM ends when a step gains less
LEAST = 4  # rows per component, at least; the number of columns if greater
FEW = 8  # components for a network, at least; copies fill up where fewer fit better
APART = 0.1  # shift of a copy, in standard deviations of its component
WIDTH = 0.01  # least standard deviation of a component, in those of a column


class GaussianMixtureWithAtoms(nn.Module):
    """Mixture of Gaussians over D columns with point masses in each column.

    Args:
        columns: D.
        components: K, at most; the number in use is the one that fits best, FEW or more.
        special: S, the number of point masses of a column, at most.
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
        self.register_buffer("log_rest", torch.zeros(d, k))  # log-share of values not special
        self.register_buffer("used", torch.tensor([k, s]))

    def fit_statistics(self, e: Tensor, special: Tensor) -> None:
        """Fit to rows.

        Args:
            e: the rows, (N, D).
            special: index of the special value that each number is, S if none, (N, D) integers.
        """
        found = fit(e.numpy(), len(self.log_weight))
        weight, mean, covariance, belongs = map(
            torch.from_numpy,
            (found.weights_, found.means_, found.covariances_, found.predict_proba(e.numpy())),
        )
        of = torch.arange(max(len(weight), min(FEW, len(self.log_weight)))) % len(weight)
        variance, axes = torch.linalg.eigh(covariance[of])
        # copies are shifted a little, or training would keep them equal
        g = torch.Generator().manual_seed(0)
        moved = APART * variance.sqrt() * torch.randn(*variance.shape, generator=g)
        moved[: len(weight)] = 0
        counts = belongs.new_zeros(e.shape[1], self.log_share.shape[2] + 1, belongs.shape[1])
        for of_column, which in zip(counts, special.T, strict=True):
            of_column.index_add_(0, which, belongs)
        counts = counts[:, :-1].mT  # of each special value in each class, (D, K, S)
        overall = counts.sum(1, keepdim=True) / len(e)  # as one more row in each class
        shares = ((counts + overall) / (belongs.sum(0)[:, None] + 1))[:, of]
        rest = (1 - shares.sum(2)).clamp(min=1 / len(e))
        k, s = len(of), _last((counts > 0).any(1).any(0)) + 1
        self.used.copy_(torch.tensor([k, s]))
        self.log_weight[:k] = (weight[of] / torch.bincount(of)[of]).log()
        self.mean[:k] = mean[of] + torch.einsum("kde,ke->kd", axes, moved)
        self.axes[:k], self.spread[:k] = axes, variance
        self.log_share[:, :k], self.log_rest[:, :k] = shares.log(), rest.log()

    @override
    def forward(self, z: Tensor, alpha: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mixture of each column given the other columns.

        Args:
            z: latents, (B, D).
            alpha: α_t, (B,).
            noise: 1-α_t, (B,).

        Returns:
            Log-weights (B, D, S+K) of the special values and the components in use; means and
            variances of e_i in these components, (B, D, K) each.
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
    """Fit the mixture of Gaussians whose size and shrinkage predict held-out rows best.

    Sizes are tried from 1 on until two in a row do not improve, each with the covariances
    (1-λ) Σ_k + λ I for a few λ, since few rows do not determine the covariances of many columns.
    One component with λ = 1 is the standard normal distribution, the result for very few rows.

    Args:
        e: embedded rows, with mean about 0 and variance about 1 in each column, (N, D).
        most: number of components, at most.
        floor: the least variance of a component in any direction.
    """
    from sklearn.mixture import GaussianMixture

    some = thinned(e, ROWS)
    held = np.arange(len(some)) % HELD == HELD - 1

    def fitted(mixture: GaussianMixture, rows: np.ndarray) -> GaussianMixture:
        mixture.set_params(reg_covar=floor, tol=TOLERANCE, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of convergence, which need not be complete
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
                # the fit to all rows starts here, as another start may end elsewhere
                chosen = GaussianMixture(
                    k,
                    weights_init=found.weights_,
                    means_init=found.means_,
                    precisions_init=found.precisions_,
                )
    rows = thinned(e, max(ROWS, min(FITTED[0], FITTED[1] // e.shape[1] ** 2)))
    return _shrunk(fitted(chosen, rows), shrinkage)


def _shrunk(found: "GaussianMixture", share: float) -> "GaussianMixture":
    """Return the mixture with covariances (1-λ) Σ_k + λ I, λ = `share`."""
    covariances = (1 - share) * found.covariances_ + share * np.eye(found.means_.shape[1])
    shrunk = copy.copy(found)
    shrunk.covariances_ = covariances
    halves = np.linalg.inv(np.linalg.cholesky(covariances))
    shrunk.precisions_cholesky_ = halves.transpose(0, 2, 1)
    if share == 1 and len(shrunk.means_) == 1:
        shrunk.means_ = np.zeros_like(shrunk.means_)
    return shrunk


def _last(which: Tensor) -> int:
    """Return the index of the last true element, 0 if there is none."""
    return int((which * torch.arange(len(which))).max())


RANK = 64  # principal components with free covariances
SIZES = (1, 4, 10)  # components of the mixtures; each component needs an example per principal ..
FEWEST = 32  # .. component, and at least as many examples as this
FLOOR = 0.05  # least variance of a component in any direction, in mean variances of the examples
STEPS = 50  # of k-means and of EM, at most
NOISES = (-4.0, -1.0, 2.0)  # γ at which `features` evaluates the densities


class GaussianMixtureEnsemble:
    """Mixtures of several sizes, fitted to embedded examples.

    Args:
        e: embedded examples, flat, shape (N, D), with D up to about a thousand.
    """

    def __init__(self, e: Tensor) -> None:
        principal = Principal(e)
        self.mixtures = [Mixture(principal, size) for size in self.sizes(*e.shape)]

    @staticmethod
    def sizes(count: int, dims: int) -> list[int]:
        """Return the components of each mixture, of so many examples and dimensions."""
        most = max(1, count // max(FEWEST, min(RANK, dims)))
        return sorted({min(most, size) for size in SIZES})

    def odds(self, z: Tensor, alpha: Tensor, values: Tensor) -> Tensor:
        """Return the mean of `Mixture.odds`, (B, D, K)."""
        parts = [mixture.odds(z, alpha, values) for mixture in self.mixtures]
        return torch.stack(parts).mean(0)

    def features(self, e: Tensor) -> Tensor:
        """Return the mean of `Mixture.features`, (B, 2 len(NOISES))."""
        return torch.stack([mixture.features(e) for mixture in self.mixtures]).mean(0)


class Principal:
    """Principal components of embedded examples, and the variance beyond them.

    Args:
        e: the examples, (N, D).
    """

    def __init__(self, e: Tensor) -> None:
        #: (D,); the axes are (D, R)
        self.mean, centred = e.mean(0), e - e.mean(0)
        spread, axes = torch.linalg.eigh(centred.T @ centred / len(e))
        rank = min(RANK, e.shape[1])
        self.axes, beyond = axes[:, -rank:], spread[:-rank].clamp(min=0)
        #: of the examples, (N, R)
        self.coordinates = centred @ self.axes
        #: the least variance of a component, and `beyond`, the variance in all further directions
        self.floor = FLOOR * spread.clamp(min=0).mean() + 1e-12
        mean_beyond = beyond.mean() if len(beyond) else torch.zeros_like(self.floor)
        self.beyond = mean_beyond.maximum(self.floor)


class Mixture:
    """Mixture of C Gaussians fitted to embedded examples.

    Args:
        principal: components of the examples.
        components: C.
    """

    def __init__(self, principal: Principal, components: int) -> None:
        fitted = _fit_components(principal.coordinates, components, principal.floor.item())
        #: w_c (C,), μ_c (C, D), and S_c as orthonormal vectors (C, D, R) with variances (C, R), ..
        self.log_weight, means, covariances = fitted
        self.variance, vectors = torch.linalg.eigh(covariances)
        self.mean = principal.mean + means @ principal.axes.T
        self.vectors = principal.axes @ vectors
        #: .. and one variance in the directions beyond
        self.beyond = principal.beyond

    def _precision(self, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Return the precisions of p(z|c) along the vectors, (B, C, R), and beyond, (B, 1, 1)."""
        alpha = alpha[:, None, None]
        noise = 1 - alpha
        return 1 / (alpha * self.variance + noise), 1 / (alpha * self.beyond + noise)

    def _given_others(self, z: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log p(z), (B,), and log w_ci, mean and variance of e_i given z_-i, (B, C, D)."""
        along, beyond = self._precision(alpha)
        root = alpha.sqrt()[:, None, None]
        d = z[:, None] - root * self.mean
        part = (torch.einsum("bcd,cdr->bcr", d, self.vectors)) * (along - beyond)
        q_d = torch.einsum("bcr,cdr->bcd", part, self.vectors) + beyond * d
        squares = self.vectors.square()
        q_ii = torch.einsum("bcr,cdr->bcd", along - beyond, squares) + beyond
        # (1/Q_ii - σ²)/α without cancellation, by α S_c = Q_c⁻¹ - σ²
        s_q, s_q_beyond = self.variance * along, self.beyond * beyond
        variance = torch.einsum("bcr,cdr->bcd", s_q - s_q_beyond, squares) + s_q_beyond
        rest = d.shape[-1] - along.shape[-1]
        log_det = along.log().sum(-1) + rest * beyond.log()[..., 0]
        log_p = self.log_weight + (log_det - (q_d * d).sum(-1)) / 2
        r = q_d / q_ii
        log_w = log_p[..., None] + (r.square() * q_ii - q_ii.log()) / 2
        constant = d.shape[-1] / 2 * math.log(2 * math.pi)
        return (
            log_p.logsumexp(-1) - constant,
            log_w.log_softmax(1),
            (z[:, None] - r) / root,
            variance / q_ii,
        )

    def odds(self, z: Tensor, alpha: Tensor, values: Tensor) -> Tensor:
        """Return log p(e_i = v_k|z_j, j≠i) - log p(e_i = v_k), (B, D, K).

        Args:
            z: shape (B, D).
            alpha: shape (B,).
            values: v_1..v_K, shape (K,).
        """
        _, log_w, mean, variance = self._given_others(z, alpha)
        own = torch.einsum("cdr,cr->cd", self.vectors.square(), self.variance - self.beyond)
        alone = _mixed(self.log_weight[:, None], self.mean, own + self.beyond, values)
        return _mixed(log_w, mean, variance, values) - alone

    def features(self, e: Tensor) -> Tensor:
        """Return -log p(z) and -Σ_i log p(e_i|z_j, j≠i) at z = √α e, (B, 2 len(NOISES)).

        The α are those of the γ in NOISES.
        """
        columns = []
        for gamma in NOISES:
            alpha = torch.full_like(e[:, 0], -gamma).sigmoid()
            log_p, log_w, mean, variance = self._given_others(alpha.sqrt()[:, None] * e, alpha)
            each = log_w - ((e[:, None] - mean).square() / variance + variance.log()) / 2
            columns += [-log_p, -each.logsumexp(1).sum(1)]
        return torch.stack(columns, 1)


def _mixed(log_w: Tensor, mean: Tensor, variance: Tensor, values: Tensor) -> Tensor:
    """Return log Σ_c w_c N(v_k; mean, variance) up to a constant, (.., D, K), from (.., C, D)."""
    # in place: new memory for each step would take twice the time of the arithmetic
    logits = (values - mean[..., None]).square_().mul_((-0.5 / variance)[..., None])
    logits.add_((log_w - variance.log() / 2)[..., None])
    most = logits.amax(-3, keepdim=True)
    return logits.sub_(most).exp_().sum(-3).log_().add_(most.squeeze(-3))


def _clusters(e: Tensor, count: int) -> Tensor:
    """Return the cluster of each row by k-means, as zeros and ones, (C, N).

    The first centres are rows far from each other (Arthur and Vassilvitskii 2007). SciPy would
    take half a second to import.
    """
    generator, centres = torch.Generator().manual_seed(0), e[:1]
    while len(centres) < count:
        far = torch.cdist(e, centres).amin(1).square() + 1e-300  # all rows may be equal
        centres = torch.cat([centres, e[torch.multinomial(far.cpu(), 1, generator=generator)]])
    for _ in range(STEPS):
        nearest = torch.cdist(e, centres).argmin(1)
        found = one_hot(nearest, count).to(e).T
        rows, before = found.sum(1)[:, None], centres
        centres = torch.where(rows > 0, found @ e / rows, before)
        if torch.equal(centres, before):
            break
    return found


def _fit_components(e: Tensor, components: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return log w_c, (C,), means, (C, R), and covariances, (C, R, R), by EM from k-means.

    scikit-learn would take a second to import, which few measurements are worth.
    """
    share = _clusters(e, components)  # P(c|e), (C, N)
    least, before = floor * torch.eye(e.shape[1]).to(e), -math.inf
    for _ in range(STEPS):
        count = share.sum(1).clamp(min=1e-10)  # a component may have lost its examples
        mean = share @ e / count[:, None]
        moment = (share[..., None] * e).mT @ e / count[:, None, None]
        covariance = moment - mean[..., None] * mean[:, None] + least
        half = torch.linalg.cholesky(covariance)
        unit = torch.linalg.inv(half).mT
        square = (e @ unit - mean[:, None] @ unit).square_().sum(2)
        log_det = half.diagonal(dim1=1, dim2=2).log().sum(1)
        log_weight = (count / len(e)).log()
        log_p = (log_weight - log_det)[:, None] - square / 2
        likelihood = log_p.logsumexp(0).mean().item()
        if likelihood < before + TOLERANCE:
            break
        share, before = log_p.softmax(0), likelihood
    return log_weight, mean, covariance
