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

from nelbo.diffusion.distributions import Noise, draw, kl, kl_noise

if TYPE_CHECKING:
    from nelbo.diffusion.model import Model
    from nelbo.diffusion.prediction import Prediction


class Bound(NamedTuple):
    """The terms of the bound per example, shape (B,) each, in nats; their sum is −ELBO."""

    prior: Tensor
    reconstruction: Tensor
    diffusion: Tensor

    @property
    def elbo(self) -> Tensor:
        """The lower bound on log P(x|φ) per example, shape (B,), nats."""
        return -(self.prior + self.reconstruction + self.diffusion)


class Draw(NamedTuple):
    """One draw of a term: z_t, the prediction at z_t, the noise of the KL and the costs, (B,)."""

    z: Tensor
    prediction: "Prediction"
    noise: Noise
    cost: Tensor


def prior_term(model: "Model", x: Tensor, t: Tensor) -> Tensor:
    """Return KL( q(z_T|x) ‖ P(z_T) ) at the last times t, exact; shape (B,), nats."""
    q = model.process.marginal(model.embed(x), t)
    return kl_divergence(q, model.process.prior(x.shape[1:], t))


def reconstruction_term(
    model: "Model", x: Tensor, t: Tensor, condition: Tensor | None = None
) -> Draw:
    """Draw E_q(z_1|x)[ −log P(x|z_1,φ) ] once, at the first times t; nats."""
    z = draw(model.process.marginal(model.embed(x), t))
    prediction = model.predict(z, t, condition)
    p = model.decoder(prediction, z, t, model.process)
    return Draw(z, prediction, None, -p.log_prob(x))


def diffusion_term(
    model: "Model", x: Tensor, s: Tensor, t: Tensor, condition: Tensor | None = None
) -> Draw:
    """Draw E_q(z_t|x) KL( q(z_s|z_t,x) ‖ P(z_s|z_t,φ) ) once; nats."""
    e = model.embed(x)
    z = draw(model.process.marginal(e, t))
    prediction = model.predict(z, t, condition)
    q = model.process.posterior(z, e, s, t)
    p = model.step(prediction, z, s, t, model.process)
    noise = kl_noise(q, p)
    return Draw(z, prediction, noise, kl(q, p, noise))


def diffusion_rate(model: "Model", x: Tensor, t: Tensor, condition: Tensor | None = None) -> Draw:
    """Draw lim_{s→t} diffusion_term/(t−s) once; nats per unit of time."""
    e = model.embed(x)
    z = draw(model.process.marginal(e, t))
    prediction = model.predict(z, t, condition)
    return Draw(z, prediction, None, model.process.predicted_rate(z, e, prediction, t))
