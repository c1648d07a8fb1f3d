r"""The derivation. For any q(z) (equations 1, 4, 5 of docs/derivation.md):

    log P(x|φ) = ELBO + KL[ q(z) ‖ P(z|x,φ) ],   ELBO = ∫ q(z) log[ P(x,z|φ) / q(z) ] dz.

By Bayes, q(z_t|z_{t-1}) = q(z_{t-1}|z_t,x) q(z_t|x) / q(z_{t-1}|x), the product over t telescopes:

    log P(x,z)/q(z|x) = log P(z_T)/q(z_T|x) + Σ_{t=2..T} log P(z_{t-1}|z_t)/q(z_{t-1}|z_t,x)
                        + log P(x|z_1),

    −ELBO =   KL( q(z_T|x) ‖ P(z_T) )                                             prior
            + E_q(z_1|x)[ −log P(x|z_1,φ) ]                                       reconstruction
            + Σ_{t=2..T} E_q(z_t|x) KL( q(z_{t-1}|z_t,x) ‖ P(z_{t-1}|z_t,φ) )     diffusion

Each function draws one term with one z per example: shape (B,), nats. Nothing here depends on the
process, network, reverse kernel or decoder. Given a condition c, P is P(·|c) throughout.
"""

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.distributions import kl_divergence

from nelbo._utils.numerics import draw

if TYPE_CHECKING:
    from nelbo.diffusion.model import Model


class Bound(NamedTuple):
    """The terms of the bound per example, shape (B,) each, in nats; their sum is −ELBO."""

    prior: Tensor
    reconstruction: Tensor
    diffusion: Tensor

    @property
    def elbo(self) -> Tensor:
        """The lower bound on log P(x|φ) per example, shape (B,), nats."""
        return -(self.prior + self.reconstruction + self.diffusion)


def prior_term(model: "Model", x: Tensor, t: Tensor) -> Tensor:
    """Return KL( q(z_T|x) ‖ P(z_T) ) at the last times t, exact; shape (B,), nats."""
    q = model.process.marginal(model.embed(x), t)
    return kl_divergence(q, model.process.prior(x.shape[1:], t))


def reconstruction_term(
    model: "Model", x: Tensor, t: Tensor, condition: Tensor | None = None
) -> Tensor:
    """Draw E_q(z_1|x)[ −log P(x|z_1,φ) ] once, at the first times t; shape (B,), nats."""
    z = draw(model.process.marginal(model.embed(x), t))
    return -model.likelihood(z, t, condition).log_prob(x)


def diffusion_term(
    model: "Model", x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None
) -> Tensor:
    """Draw E_q(z_t|x) KL( q(z_s|z_t,x) ‖ P(z_s|z_t,φ) ) once; shape (B,), nats."""
    e = model.embed(x)
    z = draw(model.process.marginal(e, t))
    return kl_divergence(model.process.posterior(z, e, s, t), model.reverse(z, s, t, condition))


def diffusion_rate(
    model: "Model", x: Tensor, t: Tensor, condition: Tensor | None = None
) -> Tensor:
    """Draw lim_{s→t} diffusion_term/(t−s) once; shape (B,), nats per unit of time."""
    e = model.embed(x)
    z = draw(model.process.marginal(e, t))
    return model.process.rate(z, e, model.predict(z, t, condition).e_hat, t)
