"""The mixture over whole rows that a model of numbers starts from: exact at every noise level."""

import numpy as np
import torch

from nelbo._utils.numerics import seeded
from nelbo.data.columns import Column, places
from nelbo.diffusion.gaussian_mixture import GaussianMixtureWithAtoms
from nelbo.diffusion.schedules import Linear
from nelbo.models.tabular.continuous import ContinuousColumns, ContinuousMixture

D = 3
COLUMNS = [Column(f"c{i}", "real") for i in range(D)]


def head_and_process():
    """A head of a mixture whose columns hang together."""
    with seeded(0):
        process = ContinuousColumns(Linear(-6.0, 4.0), torch.nn.Identity())
        head = ContinuousMixture(process.transform, places(COLUMNS)).double()
        law = head.law
        law.mean.normal_()
        law.axes.copy_(torch.linalg.qr(torch.randn(*law.axes.shape, dtype=torch.float64)).Q)
        law.spread.uniform_(0.05, 1.0)
        law.log_weight.copy_(torch.randn_like(law.log_weight).log_softmax(0))
    return head, process


def test_rows_are_denoised_exactly():
    """Σ_k P(k|z) ( μ_k + √α Σ_k M_k⁻¹ (z - √α μ_k) ), from whole rows, column by column."""
    head, process = head_and_process()
    law, t = head.law, torch.tensor([0.0, 0.3, 0.6, 1.0]).double()
    z = torch.randn(4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = head(torch.zeros(4, D, head.outputs).double(), z, t, process).e_hat
    covariance = law.axes @ law.spread.diag_embed() @ law.axes.mT
    for row, time, e_hat in zip(z, t, found, strict=True):
        alpha = process.alpha(time)
        total = alpha * covariance + (1 - alpha) * torch.eye(D)
        loc = alpha.sqrt() * law.mean
        each = torch.distributions.MultivariateNormal(loc, total).log_prob(row)
        pulled = torch.linalg.solve(total, (row - loc)[..., None])
        mean = law.mean + alpha.sqrt() * (covariance @ pulled)[..., 0]
        truth = (law.log_weight + each).softmax(0) @ mean
        torch.testing.assert_close(e_hat, truth, rtol=0, atol=1e-4)  # for NARROWEST


def test_noise_leaves_the_law_of_the_data():
    """Variances stay positive where float32 would lose τ - (1-α)."""
    head, _ = head_and_process()
    alpha = torch.tensor([1e-7])
    _, mean, variance = head.law.float()(torch.randn(1, D), alpha, 1 - alpha)
    marginal = torch.einsum("ke,kde->dk", head.law.spread, head.law.axes.square())
    torch.testing.assert_close(variance[0], marginal, rtol=1e-4, atol=0)
    torch.testing.assert_close(mean[0], head.law.mean.T, rtol=0, atol=5e-3)


def test_what_repeats_is_known_from_other_columns():
    """One column is 0 wherever the other is low."""
    random = np.random.default_rng(0)
    low = random.random(600) < 0.5
    first = np.where(low, -1.0, 1.0) + 0.1 * random.normal(size=600)
    second = np.where(low, 0.0, random.normal(size=600))
    e = torch.from_numpy(np.stack([first, second], 1))
    special = torch.from_numpy(np.stack([0 * low + 1, 1 - low], 1))
    law = GaussianMixtureWithAtoms(2, 8, 1)
    law.fit_statistics(e, special)
    z = torch.tensor([[-1.0, 0.3], [1.0, 0.3]]).double()
    alpha = torch.full((2,), 0.9).double()
    log_weights, _, _ = law(z, alpha, 1 - alpha)
    torch.testing.assert_close(log_weights.exp().sum(-1), torch.ones(2, 2).double())
    share = log_weights[:, 1, 0].exp()
    assert share[0] > 0.98 and share[1] < 0.02
    assert (log_weights[:, 0, 0] == -torch.inf).all()  # nothing repeats in the first
