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
from nelbo.parts import Part


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
        part: Part | None = None,
    ) -> Loss:
        """Loss of examples x, shape (B, ...), in random order, at draws u, shape (B,).

        The draws are uniform, or weighted by `weight` = 1/p(u), shape (B,). Where x is a part of
        a batch, they are those of the whole batch.
        """
        part = part or Part.whole(len(x))
        process, times = model.process, self.grid.times.to(x.device)
        step = (u * len(times)).long().clamp(max=len(times) - 1)
        after = part.among(step > 0)
        weight, n = part.of(torch.ones_like(u) if weight is None else weight), part.batch
        u, i = part.of(u), part.of(step)
        e, t = model.embed(x), times[i]
        z = draw(process.marginal(e, t))
        prediction = model.predict(z, t)
        decoded = -model.decoder(prediction, z, t, process).log_prob(x)
        each, inner = decoded, i > 0
        if inner.any():
            z, e, s, t = z[inner], e[inner], times[i[inner] - 1], t[inner]
            p = model.step(prediction.map(lambda v: v[inner]), z, s, t, process)
            with after:
                kl = kl_divergence(process.posterior(z, e, s, t), p)
            kind = torch.promote_types(decoded.dtype, kl.dtype)  # a density is float64
            each = decoded.to(kind).masked_scatter(inner, kl.to(kind))
        each = len(times) * each
        prior = prior_term(model, x, torch.ones_like(u)).sum() / n
        bound = (weight * each).sum() / n + prior
        loss = bound + self.cross_entropy * ((weight * decoded).sum() / n)
        return Loss(loss, bound.detach(), each.detach(), each.detach())

    def interior(self, model: Model, u: Tensor, weight: Tensor, rate: Tensor) -> Tensor:
        """Zero: a learned γ gets its gradient from the loss alone."""
        return u.new_zeros(())
