r"""One pass over a data set: the mean bound, its terms, its error, its price.

Each example is visited once per replicate r = 1..R, with its own draws of the times and of z:

    L_ir = prior_i + reconstruction_ir + diffusion_ir,      bound = mean_i mean_r L_ir

The times are stratified within blocks of examples, so neighbours share strata, and the replicates
of a block are what is independent. Hence the two parts of the standard error:

    Monte Carlo   Σ_g (n_g/N)² var_r( mean_{i in block g} L_ir ) / R      another seed, same data
    data          ( var_i(mean_r L_ir) − mean_i(var_r(L_ir)/R) ) / N      other data, no noise

The number of network calls is counted at the network. Blocks are seeded one by one.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from nelbo._numerics import LOG_2, seeded
from nelbo._progress import Track
from nelbo.data import as_examples, fingerprint
from nelbo.elbo import Bound, prior_term, reconstruction_term
from nelbo.estimate import Continuum, Grid, Times, stratified
from nelbo.model import Model, measuring, model_hash

BLOCK = 32  # examples that share strata
BINS = 32  # of the curve over time


@dataclass(frozen=True)
class StandardError:
    """Of the mean bound; `total`² = `data`² + `monte_carlo`². NaN where it cannot be known."""

    total: float
    data: float
    monte_carlo: float


@dataclass(frozen=True)
class Terms:
    """The three terms; they add up to the bound."""

    prior: float
    reconstruction: float
    diffusion: float


@dataclass(frozen=True)
class CurvePoint:
    """What the times between t_from and t_to add to the diffusion term."""

    t_from: float
    t_to: float
    value: float
    standard_error: float


@dataclass(frozen=True)
class Evaluation:
    """The bound on −log P(x), mean over examples, and everything needed to obtain it again.

    `nats` is per example. Standard errors, terms and curve are in `unit`: bits/dim for
    probabilities, nats for densities, which have no bits/dim.
    """

    bits_per_dim: float | None
    nats: float
    unit: str
    standard_error: StandardError
    terms: Terms
    examples: int
    dims: int
    calls_per_example: float
    steps: int | None
    seed: int
    weights: str
    split: str
    precision: str
    model_hash: str
    data_hash: str
    curve: list[CurvePoint]
    per_example: Bound = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON, without the terms per example; what is not finite is None."""
        plain = asdict(replace(self, per_example=Bound(*[torch.empty(0)] * 3)))
        del plain["per_example"]
        return {key: _finite(value) for key, value in plain.items()}


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plan(times: Times, calls: int | None) -> tuple[int, int]:
    """Replicates R and draws n of the diffusion term in each: R (1 + n) network calls at most.

    Left to itself: four replicates, of 6 calls each in continuous time; on a grid of the full
    sum, or of 15 of its terms where it has more.
    """
    if calls is None:
        draws = 5 if times.steps is None else min(times.terms, 15)
        return 4, draws
    if calls < 4:
        raise ValueError(
            "calls must be at least 4: two independent draws of the reconstruction and of the"
            f" diffusion term are the least that has an error bar; got {calls}"
        )
    if times.steps is not None and calls >= 2 * times.steps:
        return calls // times.steps, times.terms
    replicates = 4 if calls >= 8 else 2
    return replicates, calls // replicates - 1


def evaluate(
    model: Model,
    x: Tensor,
    *,
    times: Times | None = None,
    calls: int | None = None,
    seed: int = 0,
    weights: str = "as given",
    split: str = "as given",
    track: Track = iter,
) -> Evaluation:
    """The bound on −log P(x|φ), mean over the examples x, each visited exactly once.

    Args:
        model: the model; measured in evaluation mode with float64 around the network.
        x: examples in the space of the data, shape (N, *model.shape).
        times: Continuum(), the default, or Grid(times) for the bound of T steps.
        calls: network calls per example, at most; see `plan`.
        seed: everything random follows from it.
        weights: which weights these are, for the record.
        split: which data these are, for the record.
        track: wraps the blocks of examples, for a progress bar.

    Raises:
        ValueError: examples of another shape or too few calls.
    """
    times = Continuum() if times is None else times
    if len(x) == 0:
        raise ValueError("there must be at least one example to evaluate; got none")
    replicates, draws = plan(times, calls)
    blocks = x.split(BLOCK)
    curve = _Curve(times, len(x) * replicates * draws)
    terms = []
    with measuring(model), _counting(model.network) as rows:
        for g in track(range(len(blocks))):
            with seeded(seed, g):
                block = as_examples(blocks[g]).to(model.device)
                terms.append(_draw_terms(model, block, times, replicates, draws, curve))
    prior, reconstruction, diffusion = (torch.cat(parts) for parts in zip(*terms, strict=True))

    each = prior[:, None] + reconstruction + diffusion
    bound = Bound(prior, reconstruction.mean(1), diffusion.mean(1))
    nats = -bound.elbo.mean().item()
    density = model.decoder.density
    scale = 1.0 if density else 1 / (model.dims * LOG_2)
    return Evaluation(
        bits_per_dim=None if density else nats * scale,
        nats=nats,
        unit="nats" if density else "bits/dim",
        standard_error=_standard_error(each * scale),
        terms=Terms(*((term.mean() * scale).item() for term in bound)),
        examples=len(x),
        dims=model.dims,
        calls_per_example=sum(rows) / len(x),
        steps=times.steps,
        seed=seed,
        weights=weights,
        split=split,
        precision=f"float64 around {next(model.network.parameters()).dtype}".replace("torch.", ""),
        model_hash=model_hash(model),
        data_hash=fingerprint(x),
        curve=curve.points(scale),
        per_example=bound,
    )


def _draw_terms(
    model: Model, x: Tensor, times: Times, replicates: int, draws: int, curve: "_Curve"
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a block of B examples: prior (B,), reconstruction and diffusion (B, replicates)."""
    prior = prior_term(model, x, _full(x, 1.0)).cpu()
    copies = x.repeat_interleave(replicates, 0)
    reconstruction = _in_chunks(reconstruction_term, model, copies, _full(copies, times.first))
    diffusion = torch.zeros(len(x), replicates, dtype=torch.float64)
    if draws:
        u = torch.stack([stratified(len(x), draws) for _ in range(replicates)], 1)
        copies = x.repeat_interleave(replicates * draws, 0)
        each = _in_chunks(times.diffusion, model, copies, u.flatten().to(x.device))
        diffusion = each.reshape(u.shape).mean(-1)
        curve.add(u.flatten(), each)
    return prior, reconstruction.reshape(-1, replicates), diffusion


def _standard_error(each: Tensor) -> StandardError:
    """Of the mean of each (N, R), in blocks whose replicates are independent."""
    examples, replicates = each.shape
    monte_carlo = sum(
        (len(block) / examples) ** 2 * block.mean(0).var().item() / replicates
        for block in each.split(BLOCK)
    )
    if examples == 1:
        return StandardError(math.nan, math.nan, math.sqrt(monte_carlo))
    noise = each.var(1).mean() / replicates
    data = max(0.0, (each.mean(1).var() - noise).item() / examples)
    return StandardError(*(math.sqrt(v) for v in (data + monte_carlo, data, monte_carlo)))


def _full(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float64, device=x.device)


def _in_chunks(
    term: Callable[[Model, Tensor, Tensor], Tensor], model: Model, x: Tensor, t: Tensor
) -> Tensor:
    """term(model, x, t) on as many rows at a time as memory allows; on the CPU."""
    chunks = zip(x.split(model.rows), t.split(model.rows), strict=True)
    return torch.cat([term(model, x, t).double().cpu() for x, t in chunks])


@contextmanager
def _counting(network: nn.Module) -> Iterator[list[int]]:
    """Collects the number of rows of each call of a network."""
    rows: list[int] = []
    handle = network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    try:
        yield rows
    finally:
        handle.remove()


class _Curve:
    """Mean and standard error of the diffusion term's integrand over u, in bins."""

    def __init__(self, times: Times, draws: int) -> None:
        # at least 16 draws a bin, so that its error bar means something
        most = max(1, min(BINS, draws // 16))
        self.bins = min(times.terms, BINS) if isinstance(times, Grid) else most
        edges = torch.linspace(0, 1, self.bins + 1, dtype=torch.float64) if self.bins else None
        if isinstance(times, Grid) and edges is not None:
            edges = times.times[(edges * times.terms).round().long()]
        elif edges is not None:
            edges = times.first + (1 - times.first) * edges
        self.edges = edges
        self.sums = torch.zeros(3, max(self.bins, 1), dtype=torch.float64)

    def add(self, u: Tensor, value: Tensor) -> None:
        i = (u * self.bins).long().clamp(max=self.bins - 1)
        for row, power in enumerate((torch.ones_like(value), value, value.square())):
            self.sums[row].index_add_(0, i, power)

    def points(self, scale: float) -> list[CurvePoint]:
        if self.edges is None:
            return []
        count, total, squares = self.sums
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0) / (count - 1)
        unit = scale / self.bins
        return [
            CurvePoint(*values)
            for values in zip(
                self.edges[:-1].tolist(),
                self.edges[1:].tolist(),
                (mean * unit).tolist(),
                (variance.sqrt() * unit).tolist(),
                strict=True,
            )
        ]
