r"""Control variates: numbers of known mean that correlate with the costs of the network.

A draw of a term of the bound costs c(x, z), one network call. Two kinds of numbers reduce its
variance and leave its expectation unchanged:

    within    r(x, z) - E[ r(x, z) | x, t ], for a reference r that needs no network
    between   φ(x), any numbers of the example alone, for each stratum of the times

The references, for e = embed(x) and z_t = √α_t e + √(1-α_t) ε:

    linear    the denoiser of N(μ, Σ), mean and covariance of the data: a quadratic in ε
    levels    the Bayes denoiser of independent dimensions whose levels have log-probabilities o.
              The cost of a dimension depends on its own ε alone, so E is one integral over ε
    symbols   the same for masks: whether a symbol is masked is one Bernoulli variable; and for
              symbols that noise replaces: which of K it becomes. Rare early changes cost much, so
              that few draws without the variate would miss them, and their spread as well

o, the context, may be anything that is independent of the dimension's own ε: the log-frequencies
of the data; these plus the evidence of all other dimensions of z under mixtures of Gaussians; or
the network's prediction at a neighbouring draw of the same example, with noise of its own, also
corrected by the difference between the mixtures' evidence at this z and at that one. At low noise
this removes nine tenths of the variance.

For the exact denoiser of any distribution p, the diffusion term between times s < t is
D(s) - D(t), D(t) = KL( q(z_t|x) ‖ p(z_t) ), for each single x, by the chain rule for the KL of the
two chains. These differences are φ of a stratum; features of e from the mixtures of Gaussians, and
of the gradients of an image, are φ of all strata.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from nelbo._utils.numerics import thinned
from nelbo.data.schema import as_examples
from nelbo.diffusion.model import Model
from nelbo.diffusion.terms import TermDraw
from nelbo.evaluation import gaussian_variates, symbol_variates  # noqa: F401  they register
from nelbo.evaluation.intervals import FAR, apart
from nelbo.evaluation.price import CALLS, OF_VARIATES, Budget, Work
from nelbo.evaluation.time_density import FITTED
from nelbo.evaluation.variate import Candidate, ControlVariate, rows_cached, together, variates_of

STANDARD = 256  # examples whose numbers say what is usual, at most


class ControlVariates:
    """The control variates of a model's costs, computed without its network.

    Args:
        model: the model.
        x: examples to fit to, of the distribution of those to be measured, (N, ...); without
            them, there are no control variates.
        edges: times between which the strata lie, the first being that of z_1; shape (S,).
        pairs: use draws of two network calls, each the context of the other, if this reduces the
            variance.
        budget: what they may cost; anything where left out.
        piloted: whether a pilot fits their coefficients; without one, only those whose usual ones
            reduce the variance are used.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor | None,
        edges: Tensor,
        pairs: bool = True,
        budget: Budget | None = None,
        piloted: bool = True,
    ) -> None:
        self.model, self.edges = model, edges.to(model.device)
        #: network calls of a draw
        self.calls = 1
        self.parts: list[ControlVariate] = []
        self.left_out: list[str] = []
        self.centre = self.spread = torch.ones(0, dtype=torch.float64, device=model.device)
        #: of real numbers, their medians, and how far an example of the fit is from them, at most
        self.middle, self.reach = self.centre, math.inf
        if x is None:
            return
        some = as_examples(thinned(x, FITTED)).to(model.device)
        if model.process.has_flow:
            # a single outlier would dominate the fit
            e = model.process.embed(thinned(some, STANDARD)).flatten(1).double()
            self.middle = e.median(0).values
            distance = self._distance(some)
            usual = ~apart(distance)
            some = some[usual]
            if not model.process.codes and len(some):
                self.reach = distance[usual].max().item()
        for candidate in _candidates(model, some, self.edges):
            if not (piloted or candidate.alone):
                continue
            if budget is None or budget.take(candidate.work):
                self.parts.append(candidate.make())
            else:
                self.left_out.append(candidate.name)
        self.calls += pairs and any(part.paired for part in self.parts)
        few = thinned(some, STANDARD)
        phi = torch.cat([self._phi(part) for part in few.split(together(model.dims))])
        self.centre = phi.mean(0)
        spread = (phi - self.centre).square().mean(0).sqrt()
        self.spread = torch.where(spread > 0, spread, 1.0)

    @property
    def note(self) -> str:
        """A sentence on what is left out."""
        notes = [part.note for part in self.parts if part.note]
        if self.left_out:
            notes.append(
                f"control variates were left out, as they would take more than {OF_VARIATES:.1%}"
                f" of the run: {', '.join(self.left_out)};"
                " --variates or variates=True includes them"
            )
        return "; ".join(notes)

    @property
    def columns(self) -> int:
        """G, the number of columns of `within`."""
        return sum(part.columns for part in self.parts)

    @property
    def usual(self) -> Tensor:
        """Coefficients of the columns of `within` without a pilot, (G,): 0 for single calls."""
        known = self.calls > 1
        return known * torch.tensor([k for part in self.parts for k in part.usual]).double()

    @property
    def features(self) -> int:
        """1 + F, the number of columns of `between`."""
        return 1 + self.centre.shape[-1]

    def within(self, draws: Sequence[TermDraw]) -> Tensor:
        """Return numbers of mean zero given x and t, (n, B, G), for one or two draws (n)."""
        none = ControlVariate().within(draws)
        found = torch.cat([none, *(part.within(draws) for part in self.parts)], 2)
        if self.reach < math.inf and self.columns:
            # no coefficient is known of an example far from all of the fit, and 0 has mean zero
            found[:, self._distance(draws[0].x) > self.reach] = 0.0
        return found

    def between(self, x: Tensor) -> Tensor:
        """Return φ of each example and stratum, (B, S, 1 + F): 1, then standardised numbers."""
        phi = (self._phi(x) - self.centre) / self.spread
        # any numbers are valid, so those of an outlier are moved into the usual range
        phi = phi.nan_to_num(0.0).clamp(-FAR, FAR)
        return pad(phi, (1, 0), value=1.0).cpu()

    def _distance(self, x: Tensor) -> Tensor:
        """Return the largest distance of a number of each example from its median, (N,)."""
        e = self.model.process.embed(x).flatten(1).double()
        return (e - self.middle).abs().amax(1)

    def _phi(self, x: Tensor) -> Tensor:
        columns = [column for part in self.parts for column in part.between(x)]
        if not columns:
            return torch.zeros(len(x), len(self.edges), 0, dtype=torch.float64, device=x.device)
        return torch.stack([column.expand(-1, len(self.edges)) for column in columns], 2)


def _candidates(model: Model, x: Tensor, edges: Tensor) -> list[Candidate]:
    """Return all control variates of a model, to be fitted to examples x."""
    found = variates_of(model.process, model, x, edges)
    if len(model.shape) == 3 and model.shape[1] * model.shape[2] > 1:
        calls = CALLS / min(together(model.dims), len(x))
        work = Work(6 * min(len(x), STANDARD) * model.dims, calls + 7 * model.dims)
        gradients = Candidate("gradients of the images", work, lambda: GradientFeatures(x))
        return [gradients, *found]
    return found


class GradientFeatures(ControlVariate):
    """Σ log(1 + |d|/s) over an image for two kinds of differences d, s the mean of the first.

    They resemble the bits of a coder that predicts a pixel from the one beside or above it, and of
    one that uses both and the corner. For photographs, they follow the bits of a network more
    closely than any of the references.

    Args:
        x: images, shape (N, C, H, W), of more than one pixel.
    """

    def __init__(self, x: Tensor) -> None:
        neighbours, _ = self._differences(x[:STANDARD])  # a scale: some examples do
        self.mean = neighbours.mean().clamp(min=1e-300)

    @staticmethod
    def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
        """Return |differences| of neighbours, and of a pixel from left + above - corner."""
        x = x.double()
        down, right = x.diff(dim=2), x.diff(dim=3)
        neighbours = torch.cat([down.flatten(1), right.flatten(1)], 1)
        return neighbours.abs_(), down.diff(dim=3).flatten(1).abs_()

    @override
    def between(self, x: Tensor) -> list[Tensor]:
        # parts that stay in the cache
        parts = [
            torch.stack([(d / self.mean).log1p_().sum(1) for d in self._differences(part)], 1)
            for part in x.split(rows_cached(x))
        ]
        return list(torch.cat(parts).split(1, 1))
