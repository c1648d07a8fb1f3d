r"""Training losses: the bound itself and well-known reweightings of its diffusion term.

    loss = E_t[ w(t) rate(t) ] + reconstruction + prior + λ E[ −log P(x|z_t) ]

w = 1 and λ = 0 is −ELBO. In terms of the error of the noise prediction, rate = ½ γ'(t) ‖ε - ε̂‖²:

    bound     w = 1
    simple    w = 2/γ'(t)                        ‖ε - ε̂‖²: Ho et al. 2020, equation 14
    min-snr   w = 2/γ'(t) · min(SNR, 5)/SNR      Hang et al. 2023: low weight on low noise
    p2        w = 2/γ'(t) · 1/(1 + SNR)          Choi et al. 2022: weight on coarse structure

Each example costs one network call. A share ρ of the batch, chosen at random, contributes the
reconstruction −log P(x|z_1)/ρ, and the others the diffusion term w(t) rate(t)/(1−ρ), so that the
expectation is the bound. The times may have a density p other than uniform, with weights 1/p
(`timestep_samplers`). ρ is not learned from the variances of the two terms as the density is: the
reconstruction can vary much with the data and yet little with the weights.

λ adds the decoder at the drawn time: for level logits, the cross-entropy of the levels, which
costs no call and keeps the decoder calibrated at every time at which a short grid may decode.

A learned γ(t) has endpoints, which the loss trains with the network, and an interior, on which the
bound does not depend. The interior minimises the second moment of d = rate(t), VDM appendix I.2.
With p(γ) = 1/γ' and d = h(γ)/p, this moment is ∫ E[h²|γ]/p dγ, whose gradient

    ∇ E[d²] = −E[ d² ∇ log p(γ) ],      at fixed γ, where E[ ∇ log p(γ) ] = 0,

follows from the d of the step: it costs no network pass and depends on neither w nor λ. The loss
gains log E[d²], whose scale is one, less its own value: `Objective.interior`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nelbo._utils.batch_rng import BatchShard
from nelbo._utils.numerics import constant, slope
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.distributions import draw, kl, kl_noise
from nelbo.diffusion.elbo import prior_term
from nelbo.diffusion.model import Model
from nelbo.diffusion.prediction import Prediction
from nelbo.diffusion.schedules import Schedule, log_density
from nelbo.diffusion.times import ContinuousTime, TimeGrid, stratified

Weight = Callable[[Schedule, Tensor], Tensor]


def bound(schedule: Schedule, t: Tensor) -> Tensor:
    """Return w = 1, for a loss in nats."""
    return torch.ones_like(t)


def simple(schedule: Schedule, t: Tensor) -> Tensor:
    """Return w = 2/γ'(t), for the squared error of the noise at equal weight on all levels."""
    return 2 / slope(schedule, t)


def min_snr(schedule: Schedule, t: Tensor) -> Tensor:
    """Return w = 2/γ'(t) · min(SNR, 5)/SNR, for the squared error of x, times 5 at most."""
    snr = (-schedule(t)).exp()
    return simple(schedule, t) * snr.clamp(max=5) / snr


def p2(schedule: Schedule, t: Tensor) -> Tensor:
    """Return w = 2/γ'(t) · 1/(1 + SNR)."""
    return simple(schedule, t) / (1 + (-schedule(t)).exp())


class Loss(NamedTuple):
    """The loss and the bound that it estimates, in nats per example.

    For a shard of a batch both are its share, so those of all shards add up to those of the batch.

    Args:
        loss: to minimise; scalar.
        bound: −ELBO, without reweighting; scalar.
        each: w(t) rate(t) of each example up to a common factor, 0 where the example contributed
            a reconstruction, shape (B,). The sampler of the times learns from it.
        rate: rate(t) of each example, shape (B,). The interior of a schedule learns from it.
    """

    loss: Tensor
    bound: Tensor
    each: Tensor
    rate: Tensor


class Objective:
    """Loss of a batch in continuous time.

    Args:
        weight: w(t) on the diffusion term.
        cross_entropy: λ.
        share: ρ, in (0, 1).
        start: time of z_1.
    """

    def __init__(
        self,
        weight: Weight = bound,
        cross_entropy: float = 0.0,
        share: float = 1 / 16,
        start: float = 0.0,
    ) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share must be in (0, 1); got {share}; try 1/16")
        self.weight, self.cross_entropy, self.share = weight, cross_entropy, share
        self.times = ContinuousTime(start)

    def __call__(
        self,
        model: Model,
        batch: Batch,
        u: Tensor,
        weight: Tensor | None = None,
        part: BatchShard | None = None,
    ) -> Loss:
        """Return the loss of examples in random order.

        Args:
            model: to train.
            batch: examples x, shape (B, ...), and their conditions.
            u: draws in [0, 1) for the whole batch, shape (B,) if `part` is left out.
            weight: 1/p(u), shape of u; 1 where left out, for uniform draws.
            part: the shard of a larger batch that these examples are.
        """
        x, part = batch.x, part or BatchShard.whole(len(batch))
        n, schedule, process = part.batch, model.process.schedule, model.process
        first = part.of(stratified(n)[:, 0] < self.share)
        # decoding costs time: for all examples if λ > 0, else for those at the first time alone
        asked = None if self.cross_entropy else first.nonzero()[:, 0].to(x.device)
        first = first.to(x.device)
        t = torch.where(first, self.times.first, self.times.at(part.of(u)))
        weight = part.of(torch.ones_like(u) if weight is None else weight).where(~first, 1.0)
        with constant(schedule.interior()):
            e = model.embed(x)
            z = draw(process.marginal(e, t), part)
            prediction = model.predict(z, t, batch.condition)
            decoded = self._decoded(model, prediction, x, z, t, asked)
            rate = process.predicted_rate(z, e, prediction, t).where(~first, 0.0)
            # length of the integral over t, per example that takes part in it
            length = (1 - self.times.first) / (1 - self.share)
            prior = prior_term(model, x, torch.ones_like(t)).sum() / n
            others = decoded.where(first, 0.0).sum() / self.share / n + prior
            each = length * self.weight(schedule, t) * rate
            entropy = self.cross_entropy * (weight * decoded).sum() / n
            loss = (weight * each).sum() / n + others + entropy
        bound = length * (weight * rate).sum() / n + others
        return Loss(loss, bound.detach(), each.detach(), rate.detach())

    def interior(self, model: Model, u: Tensor, weight: Tensor, rate: Tensor) -> Tensor:
        """Return 0 with the gradient of a learned γ's interior, to add to the loss; scalar."""
        squares = weight * rate.square()
        return log_second_moment(model.process.schedule, self.times.at(u), squares, weight)

    @staticmethod
    def _decoded(
        model: Model,
        prediction: Prediction,
        x: Tensor,
        z: Tensor,
        t: Tensor,
        asked: Tensor | None,
    ) -> Tensor:
        """Return −log P(x|z_t) of all rows, or of the rows `asked` and 0 elsewhere; (B,), nats."""
        if asked is None:
            return -model.decoder(prediction, z, t, model.process).log_prob(x)
        if not len(asked):
            return torch.zeros_like(t)
        of_asked = prediction.map(lambda v: v[asked])
        log_p = model.decoder(of_asked, z[asked], t[asked], model.process).log_prob(x[asked])
        return torch.zeros_like(t, dtype=log_p.dtype).index_put((asked,), -log_p)


def log_second_moment(schedule: Schedule, t: Tensor, squares: Tensor, weight: Tensor) -> Tensor:
    """Return 0 with the gradient of log E[d²] with respect to the schedule's interior; scalar.

    Args:
        schedule: γ(t).
        t: times, shape (B,).
        squares: weight·d², shape (B,).
        weight: 1/p of the times, shape (B,).
    """
    interior = {id(parameter) for parameter in schedule.interior()}
    if not (interior and torch.is_grad_enabled()):
        return squares.new_zeros(())
    with constant(p for p in schedule.parameters() if id(p) not in interior):
        score = log_density(schedule, t)
    # E[ score ] = 0, so subtracting a constant from d² reduces the variance without a bias
    value = ((squares / squares.mean() - weight) * score).mean()
    return value.detach() - value


class GridObjective:
    """Loss of a batch on a grid of times.

    Args:
        times: t_1 < ... < t_T = 1.
        cross_entropy: λ.
    """

    def __init__(self, times: Sequence[float], cross_entropy: float = 0.0) -> None:
        self.grid, self.cross_entropy = TimeGrid(times), cross_entropy

    def __call__(
        self,
        model: Model,
        batch: Batch,
        u: Tensor,
        weight: Tensor | None = None,
        part: BatchShard | None = None,
    ) -> Loss:
        """Return the loss of examples in random order; arguments as for `Objective.__call__`."""
        x, part = batch.x, part or BatchShard.whole(len(batch))
        process, times = model.process, self.grid.times.to(x.device)
        step = (u * len(times)).long().clamp(max=len(times) - 1)
        after = part.among(step > 0)
        weight, n = part.of(torch.ones_like(u) if weight is None else weight), part.batch
        u, i = part.of(u), part.of(step)
        e, t = model.embed(x), times[i]
        z = draw(process.marginal(e, t), part)
        prediction = model.predict(z, t, batch.condition)
        decoded = -model.decoder(prediction, z, t, process).log_prob(x)
        each, inner = decoded, i > 0
        if inner.any():
            z, e, s, t = z[inner], e[inner], times[i[inner] - 1], t[inner]
            q = process.posterior(z, e, s, t)
            p = model.step(prediction.map(lambda v: v[inner]), z, s, t, process)
            steps = kl(q, p, kl_noise(q, p, after))
            kind = torch.promote_types(decoded.dtype, steps.dtype)  # densities are float64
            each = decoded.to(kind).masked_scatter(inner, steps.to(kind))
        each = len(times) * each
        prior = prior_term(model, x, torch.ones_like(u)).sum() / n
        bound = (weight * each).sum() / n + prior
        loss = bound + self.cross_entropy * ((weight * decoded).sum() / n)
        return Loss(loss, bound.detach(), each.detach(), each.detach())

    def interior(self, model: Model, u: Tensor, weight: Tensor, rate: Tensor) -> Tensor:
        """Return 0, as a learned γ gets its gradient from the loss alone; scalar."""
        return u.new_zeros(())


OBJECTIVES: Mapping[str, Weight] = {
    "bound": bound,
    "simple": simple,
    "min-snr": min_snr,
    "p2": p2,
}
