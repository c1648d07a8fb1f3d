r"""The bound of images under a diffusion model of the latents of a variational autoencoder.

An encoder q(z|x), a decoder P(x|z) and a diffusion prior P(z) are a model of x,
P(x) = ∫ P(x|z) P(z) dz. By Jensen's inequality, and with the ELBO of the prior (`elbo`),

    −log P(x) ≤ E_q(z|x)[ −log P(x|z) ]                    decoder
              + E_q(z|x)[ log q(z|x) ]                     encoder, minus its entropy
              + E_q(z|x)[ −ELBO(z) ]                       prior + reconstruction + diffusion

z is real, so the last two terms are densities: each depends on the unit of z, their sum does not.
Here the unit is that of the autoencoder. What the network of the prior sees, (z - shift)/scale, is
part of the prior's embedding, whose log-determinant is in its reconstruction term.

Published autoencoders decode to an image and have no P(x|z). It is a law about that image, such as
a discretised Laplace law, whose scale is fitted to other images than those that are measured.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from typing_extensions import override

from nelbo._utils.network_calls import NetworkCalls
from nelbo._utils.numerics import seeded
from nelbo._utils.sharding import check_finite
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.distributions import (
    Discretised,
    DiscretisedLaplace,
    DiscretisedLogistic,
    DiscretisedNormal,
    draw,
)
from nelbo.diffusion.elbo import prior_term, reconstruction_term
from nelbo.diffusion.gaussian import Affine, Levels
from nelbo.diffusion.model import Model, hash_of, measuring, model_hash
from nelbo.diffusion.process import per_example
from nelbo.diffusion.times import TimeDiscretization, stratified

LAWS: dict[str, Callable[[Tensor, Tensor, Tensor], Discretised]] = {
    "gaussian": DiscretisedNormal,
    "logistic": DiscretisedLogistic,
    "laplace": DiscretisedLaplace,
}
SCALES = (1e-4, 10.0)  # of a law, between which one is fitted, in units of the network
SHOWN = 8  # examples that are encoded to check how the network of the prior is read
FITTED = 2**22  # numbers of images to which a scale is fitted, at most


class PixelLaw(nn.Module):
    """P(x_i|z) about the decoded image: one law for all pixels, with one or a few scales.

    Args:
        scaling: of the data, as the autoencoder sees them.
        law: a key of LAWS; "gaussian" for real data.
        scale: in units of the autoencoder's images, one or one for each channel.
    """

    def __init__(
        self, scaling: Levels | Affine, law: str = "gaussian", scale: float | Tensor = 0.1
    ) -> None:
        super().__init__()
        if law not in LAWS:
            raise ValueError(
                f"law, the distribution of the pixels, must be one of {', '.join(LAWS)}; got"
                f" {law!r}"
            )
        if not scaling.count and law != "gaussian":
            raise ValueError(f"the law of real data must be gaussian; got {law!r}")
        scale = torch.as_tensor(scale, dtype=torch.float64).reshape(-1)
        if not (scale > 0).all() or not scale.isfinite().all():
            raise ValueError(f"the scale of the pixels must be positive; got {scale.tolist()}")
        self.scaling, self.law = scaling, law
        self.log_scale = nn.Parameter(scale.log())

    @override
    def forward(self, mean: Tensor) -> Independent:
        """Return P(x|z) for decoded images (B, *shape)."""
        scale = self.log_scale.exp().to(mean)
        scale = scale.reshape(-1, *(1 for _ in mean.shape[2:])).expand_as(mean)
        made: Distribution
        if self.scaling.count:
            values: Tensor = self.scaling.values.to(mean.device)
            made = LAWS[self.law](mean, scale, values)
        else:
            made = self.scaling.pushforward(mean, scale)
        return per_example(made)

    def __str__(self) -> str:
        scales = ", ".join(f"{s:.3g}" for s in self.log_scale.exp().tolist())
        each = " for each channel" if self.log_scale.numel() > 1 else ""
        return f"{'discretised ' if self.scaling.count else ''}{self.law} of scale {scales}{each}"


class LatentBound(NamedTuple):
    """The terms of the bound per example, shape (B,) each, in nats; their sum is −ELBO."""

    decoder: Tensor
    encoder: Tensor
    prior: Tensor
    reconstruction: Tensor
    diffusion: Tensor

    @property
    def elbo(self) -> Tensor:
        """The lower bound on log P(x|φ) per example, shape (B,), nats."""
        return -torch.stack(self[:]).sum(0)


class LatentModel(nn.Module):
    """A model of x by a diffusion model of the latents of an autoencoder.

    Args:
        encoder: images in [-1, 1], (B, *shape), to the mean and the log-variance of q(z|x) in the
            halves of the channels, (B, 2C, ...).
        decoder: z, (B, C, ...), to images (B, *shape).
        law: P(x|z) about these.
        prior: P(z), a density, or P(z|c).
        shape: of one example.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        law: PixelLaw,
        prior: Model,
        shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        if not prior.decoder.density:
            raise ValueError("the prior of latents must be a density of real numbers, not levels")
        self.encoder, self.decoder, self.law, self.prior = encoder, decoder, law, prior
        self.encoder_calls = NetworkCalls("of the encoder")
        self.decoder_calls = NetworkCalls("of the decoder")
        self.shape = tuple(shape)

    @property
    def diffusion(self) -> Model:
        """The diffusion model, of the latents: the prior."""
        return self.prior

    def latents_of(self, batch: Batch) -> Batch:
        """Return the means of the latents of some images, with their conditions."""
        batch = batch.to(self.device)
        with evaluating(self):
            return Batch(self.posterior(batch.x).mean, batch.condition)

    def examples_of(self, drawn: Tensor) -> Tensor:
        """Return the images that latents decode to, as levels, int64, or real numbers."""
        images = []
        with evaluating(self):
            for some in drawn.split(max(1, self.prior.rows)):
                e = self.law.scaling.inverse(self.decode(some.to(self.device)))
                images.append(e.round().clamp(0, self.codes - 1).long() if self.codes else e)
        return torch.cat(images)

    def check_reading(self, batch: Batch) -> list[str]:
        """Return notes on how the network of the prior is read; see `Model.check_reading`."""
        rows = torch.linspace(0, len(batch) - 1, min(SHOWN, len(batch))).round().long()
        return self.prior.check_reading(self.latents_of(batch[rows]))

    @property
    def dims(self) -> int:
        """D, the number of dimensions of one example."""
        return math.prod(self.shape)

    @property
    def codes(self) -> int:
        """The number of levels of a dimension; 0 for a real number."""
        return self.law.scaling.count

    @property
    def possible(self) -> int:
        """As of a `Model`."""
        return self.codes

    @property
    def density(self) -> bool:
        """Whether P(x) is a density, not a probability."""
        return not self.codes

    #: as of a `Model`: name of a dimension in the unit of a bound; whether examples may have any
    #: length; whether all dimensions are alike
    dimension, any_length, alike = Model.dimension, Model.any_length, True

    def batch(self, x: Tensor | Batch) -> Batch:
        """Return examples as a batch."""
        return Batch.of(x)

    def scored(self, batch: Batch) -> float:
        """Return the number of dimensions whose cost the bound counts, D."""
        return self.dims

    def given(self, batch: Batch) -> str:
        """Return what the bound of a batch is conditioned on, for the record; "" for P(x)."""
        return self.prior.given(batch)

    @property
    def network(self) -> nn.Module:
        """The network of the prior, which is called once for each draw of a term."""
        return self.prior.network

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return self.prior.device

    def hash(self) -> str:
        """Return 16 hex digits of all weights and the classes of parts."""
        own = hash_of((self.encoder, self.decoder, self.law), self)
        whole = f"{own} {self.law.law} {model_hash(self.prior)}"
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def posterior(self, x: Tensor) -> Independent:
        """Return q(z|x) of examples (B, *shape)."""
        output = _called(self.encoder, self.encoder_calls, self.law.scaling(x))
        mean, log_variance = output.chunk(2, 1)
        return per_example(Normal(mean, (log_variance / 2).exp(), validate_args=False))

    def decode(self, z: Tensor) -> Tensor:
        """Return the images that latents decode to, (B, *shape), in the units of `law.scaling`."""
        return _called(self.decoder, self.decoder_calls, z)

    def likelihood(self, z: Tensor) -> Independent:
        """Return P(x|z)."""
        law: Independent = self.law(self.decode(z))
        return law

    def check(self, batch: Batch) -> None:
        """Check that a batch holds examples of this model.

        Raises:
            ValueError: it does not; the message says what.
        """
        x, count = batch.x, self.codes
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"the model is for examples {self.shape}; got {tuple(x.shape[1:])}")
        if count and (x.is_floating_point() or not _within(x, count)):
            raise ValueError(f"examples must be integers 0..{count - 1}; got {x.dtype}")
        self.prior.check_condition(batch.condition, len(batch))

    def fit_law(self, x: Tensor, law: str | None = None, channels: bool = False) -> None:
        """Fit P(x|z), one scale or one for each channel, to examples that are not measured.

        Args:
            x: the examples, (N, *shape); some of them if they are many.
            law: a key of LAWS; by default the best of them.
            channels: fit a scale for each channel.
        """
        x = x[: max(1, FITTED // self.dims)]
        with evaluating(self), seeded(0):
            pairs = []
            for some in x.split(max(1, FITTED // 16 // self.dims)):
                some = Batch(some).to(self.device).x
                pairs.append((some, self.decode(draw(self.posterior(some))).cpu()))
        x, mean = (torch.cat(each).cpu() for each in zip(*pairs, strict=True))
        names = [law] if law else list(LAWS) if self.codes else ["gaussian"]
        scaling = self.law.scaling.cpu()
        groups = [(x[:, i : i + 1], mean[:, i : i + 1]) for i in range(x.shape[1])]
        groups = groups if channels else [(x, mean)]
        found = {name: [_best_scale(scaling, name, *group) for group in groups] for name in names}
        best = min(found, key=lambda name: sum(cost for cost, _ in found[name]))
        scales = torch.tensor([scale for _, scale in found[best]], dtype=torch.float64)
        self.law = PixelLaw(scaling, best, scales).to(self.device)


def _within(x: Tensor, count: int) -> bool:
    """Return whether integers are 0..count-1; those that stay in files have been checked."""
    return not isinstance(x, Tensor) or not len(x) or (int(x.min()) >= 0 and int(x.max()) < count)


def _best_scale(
    scaling: Levels | Affine, law: str, x: Tensor, mean: Tensor
) -> tuple[float, float]:
    """Return the least −log P(x) of a law about the means, in nats, and the scale that has it."""
    from scipy.optimize import minimize_scalar  # here: scipy takes longer to import than nelbo

    def cost(log_scale: float) -> float:
        with torch.no_grad():
            made = PixelLaw(scaling, law, math.exp(log_scale))(mean)
            return -float(made.log_prob(x).sum())

    ends = [math.log(scale) for scale in SCALES]
    found = minimize_scalar(cost, bounds=ends, method="bounded", options={"xatol": 1e-4})
    return float(found.fun), math.exp(found.x)


def _called(network: nn.Module, calls: NetworkCalls, x: Tensor) -> Tensor:
    """Return the output of a network in float64, called in its own type."""
    like = next(network.parameters(), x)
    return calls(network, [x.to(like.dtype)]).double()


@contextmanager
def evaluating(model: LatentModel) -> Iterator[None]:
    """Inside, measure: `measuring` of the prior, and the autoencoder in evaluation mode."""
    check_finite(model, "the model")
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        with measuring(model.prior):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def latent_terms(
    model: LatentModel, batch: Batch, q: Independent, times: TimeDiscretization, u: Tensor
) -> LatentBound:
    """Draw z from q = q(z|x) once, and the terms of each example; the diffusion for each of u.

    Args:
        model: the model.
        batch: examples and conditions, (B, *shape).
        q: `model.posterior` of them.
        times: of the prior.
        u: uniform draws in [0, 1), (B, n).

    Returns:
        LatentBound of (B,), and of (B, n) for the diffusion, whose mean is the term.
    """
    z = draw(q)
    first = torch.full((len(z),), times.first, dtype=torch.float64, device=z.device)
    latents = Batch(z, batch.condition)
    rows = torch.arange(len(z), device=z.device).repeat_interleave(u.shape[1])
    diffusion = times.diffusion(model.prior, latents[rows], u.flatten().to(z.device))
    return LatentBound(
        decoder=-model.likelihood(z).log_prob(batch.x),
        encoder=-q.entropy(),
        prior=prior_term(model.prior, z, torch.ones_like(first)),
        reconstruction=reconstruction_term(model.prior, z, first, batch.condition).cost,
        diffusion=diffusion.reshape(u.shape),
    )


def latent_elbo(
    model: LatentModel,
    x: Tensor | Batch,
    times: TimeDiscretization,
    u: Tensor | None = None,
) -> LatentBound:
    """Return one unbiased, differentiable draw of the terms of −ELBO per example, in nats.

    Args:
        model: the model.
        x: examples, (B, *shape), or a `Batch` of examples and conditions.
        times: of the prior.
        u: uniform draws in [0, 1), (B, n), averaged over n; where left out, the full sum over a
            grid, and one in continuous time.

    Raises:
        ValueError: the examples are not of the model, or lack conditions.
    """
    batch = Batch.of(x)
    model.check(batch)
    batch = batch.to(model.device)
    if u is None:
        u = stratified(len(batch), max(times.terms, 1))
    found = latent_terms(model, batch, model.posterior(batch.x), times, u)
    return found._replace(diffusion=found.diffusion.mean(1))
