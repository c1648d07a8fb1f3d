"""Control variates of Gaussian diffusion: see `control_variates`."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from typing_extensions import override

from nelbo.diffusion.gaussian import GaussianDiffusion
from nelbo.diffusion.gaussian_mixture import FEWEST, GaussianMixtureEnsemble
from nelbo.diffusion.model import Model
from nelbo.diffusion.prediction import level_evidence
from nelbo.diffusion.terms import TermDraw
from nelbo.evaluation.price import PASS, Work
from nelbo.evaluation.reference_denoisers import (
    NODES,
    TABLE,
    WIDEST,
    LevelReference,
    Linear,
    gaussian,
    of_level,
)
from nelbo.evaluation.variate import LEAST, Candidate, ControlVariate, variates_of

FINEST = 64  # levels up to which contexts pay off, as they need the probability of each level


class LinearVariate(ControlVariate):
    """Costs of the denoiser of N(μ, Σ)."""

    columns = 1

    def __init__(self, model: Model, e: Tensor, edges: Tensor) -> None:
        self.model, self.edges, self.reference = model, edges, Linear(e)

    @override
    def within(self, draws: Sequence[TermDraw]) -> Tensor:
        return torch.stack([self.reference.within(self.model, d)[:, None] for d in draws])

    @override
    def between(self, x: Tensor) -> list[Tensor]:
        return [_strata(self.reference.divergence(self.model, x, self.edges))]


class LevelVariates(ControlVariate):
    """Costs of the Bayes denoiser of independent levels, given a context.

    Args:
        model: of levels.
        x: examples to fit to.
        edges: of the strata.
        mixtures: of the embedded examples, as a source of contexts.
    """

    def __init__(
        self, model: Model, x: Tensor, edges: Tensor, mixtures: GaussianMixtureEnsemble | None
    ) -> None:
        self.model, self.mixtures = model, mixtures
        self.reference = LevelReference(model, x, edges)
        self.paired = model.process.codes <= FINEST
        self.columns = 0 if not self.paired else 1 if mixtures is None else 2

    @override
    def within(self, draws: Sequence[TermDraw]) -> Tensor:
        if not self.columns:
            return super().within(draws)
        contexts = [self.reference.log_frequency] * len(draws)
        if len(draws) == 2:
            contexts = [self._by_network(draw) for draw in reversed(draws)]
        columns = [contexts]
        if self.mixtures is not None:
            moved = [self._by_mixtures(self.mixtures, draw) for draw in draws]
            moves = zip(contexts, moved, reversed(moved), strict=True)
            columns = [moved, [(o + here - there).log_softmax(-1) for o, here, there in moves]]
        found = [
            [self.reference.within(self.model, draw, o) for draw, o in zip(draws, of, strict=True)]
            for of in columns
        ]
        return torch.stack([torch.stack(column) for column in found], -1)

    def _by_network(self, draw: TermDraw) -> Tensor:
        """Return the log-probabilities of the network without the dimension's own evidence."""
        predicted, values = draw.prediction.levels, self.reference.values
        if predicted is None:
            return self.reference.log_frequency
        evidence = level_evidence(draw.z, values.to(draw.z), draw.term.t, self.model.process)
        return (predicted.log_probs - evidence).log_softmax(-1).clamp(min=LEAST)

    def _by_mixtures(self, mixtures: GaussianMixtureEnsemble, draw: TermDraw) -> Tensor:
        """Return log-frequencies plus the evidence of all other dimensions of z."""
        z, alpha = draw.z.double().flatten(1), self.model.process.alpha(draw.term.t)
        odds = mixtures.odds(z, alpha, self.reference.values).view(*draw.x.shape, -1)
        return (odds + self.reference.log_frequency).log_softmax(-1)

    @override
    def between(self, x: Tensor) -> list[Tensor]:
        surprise = of_level(-self.reference.log_frequency, x).flatten(1).sum(1, keepdim=True)
        return [_strata(self.reference.divergence(x), surprise)]


class MixtureFeatures(ControlVariate):
    """Densities of the embedded examples under mixtures of Gaussians."""

    def __init__(self, model: Model, mixtures: GaussianMixtureEnsemble) -> None:
        self.model, self.mixtures = model, mixtures

    @override
    def between(self, x: Tensor) -> list[Tensor]:
        e = gaussian(self.model).embed(x).flatten(1).double()
        return list(self.mixtures.features(e).split(1, 1))


@variates_of.register
def _(process: GaussianDiffusion, model: Model, x: Tensor, edges: Tensor) -> list[Candidate]:
    count, dims, strata, levels = len(x), model.dims, len(edges), process.codes
    whole = dims <= WIDEST  # with covariances
    turn = dims**2 / PASS * 4 if whole else 0.0  # into eigenvectors
    e = cache(lambda: process.embed(x).flatten(1).double())
    found = [
        Candidate(
            "the denoiser of a Gaussian",
            Work(count * (5 * dims + turn), 8 * dims + turn, 3 * dims + 2 * turn),
            lambda: LinearVariate(model, e(), edges),
        )
    ]
    mixtures = cache(lambda: GaussianMixtureEnsemble(e()))
    clustered = whole and count >= FEWEST
    odds = dims * (300 + dims) if clustered else 0
    if clustered:
        found.append(
            Candidate(
                "mixtures of Gaussians",
                Work(count * odds, odds, 0.0),
                lambda: MixtureFeatures(model, mixtures()),
            )
        )
    # with sixteen bits, one column of the table would not fit into memory
    if levels and levels**2 <= TABLE:
        integrals = min(TABLE, dims * levels**2 * strata)
        contexts = (NODES + 1) * levels * dims if levels <= FINEST else 0
        found.append(
            Candidate(
                "the denoiser of independent levels",
                Work(
                    2 * NODES * integrals + 9 * count * dims,
                    6 * dims,
                    2 * contexts * (1 + clustered) + odds * (contexts > 0),
                ),
                lambda: LevelVariates(model, x, edges, mixtures() if clustered else None),
            )
        )
    return found


def _strata(divergence: Tensor, surprise: Tensor | float = 0.0) -> Tensor:
    """Return the reconstruction and the differences of D, (B, S), from D at the edges."""
    first = surprise - divergence[:, :1]
    return torch.cat([first, divergence[:, :-1] - divergence[:, 1:]], 1)
