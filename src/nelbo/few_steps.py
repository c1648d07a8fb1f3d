r"""The loss of a fixed grid of T times: the T-step bound itself, one of its T terms per example.

    −ELBO = prior + Σ_{i=1..T} C_i = prior + E_u[ T C_⌈Tu⌉ ],
    C_1 = −log P(x|z_1),   C_i = KL( q(z_{i-1}|z_i,x) ‖ P(z_{i-1}|z_i) ),

so a step costs one network call per example, decoding included. As in `objective`, λ adds the
decoder asked at the drawn time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from nelbo._numerics import draw
from nelbo.elbo import prior_term
from nelbo.estimate import Grid
from nelbo.model import Model
from nelbo.objective import Loss


class FewSteps:
    """The loss of a batch on a grid.

    Args:
        times: t_1 < ... < t_T = 1.
        cross_entropy: λ.
    """

    def __init__(self, times: Sequence[float], cross_entropy: float = 0.0) -> None:
        self.grid, self.cross_entropy = Grid(times), cross_entropy

    def __call__(
        self,
        model: Model,
        x: Tensor,
        u: Tensor,
        weight: Tensor | None = None,
    ) -> Loss:
        """Loss of examples x, shape (B, ...), in random order, at draws u, shape (B,).

        The draws are uniform, or weighted by `weight` = 1/p(u), shape (B,).
        """
        weight = torch.ones_like(u) if weight is None else weight
        process, times = model.process, self.grid.times.to(x.device)
        i = (u * len(times)).long().clamp(max=len(times) - 1)
        e, t = model.embed(x), times[i]
        z = draw(process.marginal(e, t))
        prediction = model.predict(z, t)
        decoded = -model.decoder(prediction, z, t, process).log_prob(x)
        each, inner = decoded, i > 0
        if inner.any():
            z, e, s, t = z[inner], e[inner], times[i[inner] - 1], t[inner]
            p = model.step(prediction.map(lambda v: v[inner]), z, s, t, process)
            kl = kl_divergence(process.posterior(z, e, s, t), p)
            kind = torch.promote_types(decoded.dtype, kl.dtype)  # a density is float64
            each = decoded.to(kind).masked_scatter(inner, kl.to(kind))
        each = len(times) * each
        bound = (weight * each).mean() + prior_term(model, x, torch.ones_like(u)).mean()
        loss = bound + self.cross_entropy * (weight * decoded).mean()
        return Loss(loss, bound.detach(), each.detach())
