r"""Standard errors and intervals where the variance is estimated from few draws.

A stated standard error is widened so that the value ± 1.96 standard errors is a 95 % interval. For
an estimate s² with ν degrees of freedom it is

    s t_ν(0.975) / 1.96,        ν = (Σ_g s_g²)² / Σ_g s_g⁴/(d_g + 2) - 2 ,

where s² is the sum of independent s_g² with d_g degrees each (Welch 1947); the more unequal they
are, the smaller ν is. With fewer than FEWEST degrees no error is stated: NaN.

A single example has too few draws for a variance of its own: two draws may both miss rare large
costs and agree. So its variance is that of its d + 1 replicates with the weight w, and else the
mean of all examples, relative to what is known of their sizes (Bühlmann's credibility):

    w s_i² + (1 - w) s²,        1/ν = a/d + (1 - a)²/ν(s²),    a = w + (1 - w)/n ,

where a is the share of s_i² in it, and ν(s²) are the degrees of freedom of the mean. w is the
share of the differences of variances that is not chance, which the two halves of an example's
replicates show; from few examples it is unknown, and w is larger.

An example beside a reference, which has another distribution where it is unusual, is measured by
itself the more, the farther out its mean is: w = d/(d + k), where k is the number of reference
examples with a mean as far out or farther, on its side; beyond all of them k = 0.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nelbo._utils.numerics import over

FEWEST = 2.0  # degrees of freedom below which no error is stated
OWN = 8  # replicates from which an outlying example has an error of its own
HALVES = 6  # replicates from which each half has a variance
MOST = 0.75  # weight of an example's own variance, at most, as it may be nearly 0 by chance
ALONE = 12.0  # examples of which this weight is half what they show, and half MOST
POWER = 1.5, 1.0  # mean and sd of the power of the size that a variance grows with, before
FAR, SHARE = 10.0, 0.9  # an outlier is 10 times as far as the 90 % quantile of distances
NOISIER = 4.0  # the same factor for the noise of half of the replicates
NORMAL = 1.959964  # the 97.5 % quantile of the normal distribution


def widened(freedoms: float) -> float:
    """Return the factor of the root of a variance with these degrees of freedom."""
    return widenings(torch.tensor(freedoms, dtype=torch.float64)).item()


def widenings(freedoms: Tensor) -> Tensor:
    """Return `widened` of each number; of the same shape."""
    from scipy.special import stdtrit  # here: scipy takes longer to import than nelbo

    return torch.as_tensor(stdtrit(freedoms.numpy(), 0.975)) / NORMAL


def error_of_mean(values: Tensor) -> float:
    """Return the stated error of the mean of independent numbers, (n,); NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    return values.std().item() / math.sqrt(len(values)) * widened(len(values) - 1.0)


def beside_size(values: Tensor, size: Tensor | None) -> Tensor:
    """Return what the sizes of examples leave of their costs, (n, ...).

    The bound of texts per token, Σ cost / Σ size, varies from sample to sample as the mean of
    cost - rate size, and not as that of the costs (Cochran 1977, section 6.4).

    Args:
        values: costs, (n, ...).
        size: numbers of tokens, (n,); None for examples of one size.
    """
    if size is None:
        return values
    size = over(size.to(values), values)
    return values - values.sum(0) / size.sum() * size


def as_replicates(draws: Tensor) -> Tensor:
    """Return M numbers that vary as replicates, (M, ...), from R draws of each of J kinds.

    All draws are independent, and so are their M - 1 = (R-1)J contrasts within the kinds. The
    numbers have these contrasts and the mean of the draws, and their spread gives its error with
    M - 1 degrees of freedom, where R sums over the kinds give R - 1. For J = 1 they are the draws.

    Args:
        draws: of which those of a kind are alike, (R, J, ...).
    """
    replicates, kinds = draws.shape[:2]
    within = torch.tensordot(_contrasts(replicates), draws, 1).flatten(0, 1)
    count, mean = len(within) + 1, draws.mean((0, 1))
    scale = math.sqrt(count / (replicates * kinds))
    found = mean + scale * torch.tensordot(_contrasts(count).T, within, 1)
    return torch.where(mean.isfinite(), found, mean)


def _contrasts(n: int) -> Tensor:
    """Return the orthonormal contrasts of n numbers, (n - 1, n) (Helmert 1876)."""
    row, column = torch.arange(1, n)[:, None], torch.arange(n)
    table = (column < row).double() - row * (column == row)
    return table / (row * (row + 1)).double().sqrt()


def freedoms(parts: Tensor, each: Tensor) -> float:
    """Return ν of a sum of estimated variances, from each variance and its degrees of freedom.

    NaN if these are too few or nothing varies. Otherwise ν is at least one, so that a sum of one
    dominant part has a wide error rather than none.

    Args:
        parts: the variances, (n,).
        each: their degrees of freedom, (n,).
    """
    return freedoms_of(parts, each).item()


def freedoms_of(parts: Tensor, each: Tensor) -> Tensor:
    """Return `freedoms` of several sums, (...), from their parts, (n, ...), and `each`, (n,)."""
    divisor = (each + 2).view(-1, *[1] * (parts.ndim - 1))
    squares = (parts.square() / divisor).sum(0)
    known = (squares > 0) & (each.sum() >= FEWEST)
    found = (parts.sum(0).square() / squares - 2).clamp(min=1)
    return torch.where(known, found, math.nan)


def apart(distance: Tensor, example: Tensor | None = None, far_is: float = FAR) -> Tensor:
    """Return a mask of outlying examples, (N,).

    All distances of an outlier are far beyond most others, or one is not finite.

    Args:
        distance: from a typical value, (n,).
        example: of each distance, (n,), 0..N-1; each is of its own example where left out.
        far_is: factor on the 90 % quantile beyond which a distance is far.
    """
    example = torch.arange(len(distance)) if example is None else example
    number = distance.isfinite().cpu()
    finite = distance[number.to(distance.device)].cpu().double()
    usual = finite.kthvalue(math.ceil(SHARE * len(finite))).values.item() if len(finite) else 0.0
    far = distance.cpu() > far_is * usual if usual > 0 else ~number
    like_others = torch.zeros(int(example.max()) + 1, dtype=torch.bool)
    like_others[example[~far]] = True
    like_others[example[~number]] = False
    return ~like_others.to(distance.device)


def errors(replicates: Sequence[Tensor], size: Tensor | None = None, share: float = 1.0) -> Tensor:
    """Return the stated error of the mean of each example's replicates, (n,).

    An outlying example has a variance of its own, or no error, NaN, if it has few replicates.

    Args:
        replicates: of the examples, in blocks (n_g, R_g).
        size: of each example, (n,), such as its number of tokens, where they differ in it: they
            share the variance relative to a power of it. The error of an example of size 0, which
            has no noise, is 0.
        share: of the draws of a single replicate, in one of several, if some have just one.
    """
    if size is not None:
        noisy, error = size > 0, torch.zeros_like(size)
        parts = zip(replicates, noisy.split(list(map(len, replicates))), strict=True)
        if noise := [block[some] for block, some in parts if some.any()]:
            scale = size[noisy] ** (_power(noise, size[noisy]) / 2)
            both = zip(noise, scale.split(list(map(len, noise))), strict=True)
            error[noisy] = scale * errors([block / of[:, None] for block, of in both], None, share)
        return error
    counts = torch.cat([torch.full((len(b),), b.shape[1]) for b in replicates])
    far = _outlying(replicates)
    error = torch.full_like(far, math.nan, dtype=torch.float64)
    if not far.all():
        parts = zip(replicates, far.split(list(map(len, replicates))), strict=True)
        shared, freedom = _shared([near for b, f in parts if len(near := b[~f])], share)
        draws = torch.where(counts > 1, share * counts, counts)
        error[~far] = (shared / draws[~far]).sqrt() * widenings(freedom)
    alone = torch.cat([_own(block) for block in replicates])
    enough = far & (counts >= OWN)
    error[enough] = (alone / counts)[enough].sqrt() * widened(OWN - 1)
    return torch.where(error > 0, error, math.nan)


def errors_beside(
    reference: Tensor, replicates: Tensor, sizes: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Return the stated error of the mean of each example's replicates beside a reference, (n,).

    It depends on no other of the n examples; NaN where nothing varies, or not by a number.

    Args:
        reference: replicates of usual examples, (M, R), at least two of each.
        replicates: of the examples, (n, R).
        sizes: of the reference, (M,), and of the examples, (n,), as for `errors`.
    """
    sizes = sizes or (torch.ones(len(reference)), torch.ones(len(replicates)))
    of_reference, of_each = (size.double() for size in sizes)
    power = _power([reference], of_reference) / 2
    scaled = reference / of_reference[:, None] ** power
    usual = ~_outlying([scaled])
    noise, levels = scaled[usual].var(1), (reference.mean(1) / of_reference)[usual].sort().values
    own, level = (replicates / of_each[:, None] ** power).var(1), replicates.mean(1) / of_each
    below = torch.searchsorted(levels, level, right=True)
    above = len(levels) - torch.searchsorted(levels, level)
    count = replicates.shape[1]
    weight = (count - 1) / (count - 1 + torch.minimum(below, above))
    each = torch.full_like(noise, reference.shape[1] - 1.0)
    variance = noise.mean() + weight * (own - noise.mean())
    shared = (1 - weight).square() / freedoms(each * noise, each)
    known = 1 / (weight / (count - 1) + shared)
    error = of_each**power * (variance / count).sqrt() * widenings(known)
    return torch.where(error > 0, error, math.nan)


def _outlying(replicates: Sequence[Tensor]) -> Tensor:
    """Return a mask of examples that are far from most others, or much noisier, (n,)."""
    counts = torch.cat([torch.full((len(b),), b.shape[1]) for b in replicates])
    values = torch.cat([block.flatten() for block in replicates])
    example = torch.arange(len(counts)).repeat_interleave(counts)
    return apart((values - values.nanmedian()).abs(), example) | _noisy(replicates)


def _power(replicates: Sequence[Tensor], size: Tensor) -> float:
    """Return p of variances c size^p, the most likely of normal replicates given p ~ POWER."""
    own = torch.cat([_own(block) for block in replicates])
    each = torch.cat([torch.full((len(b),), b.shape[1] - 1.0).double() for b in replicates])
    p, (mean, sd) = torch.linspace(0, 3, 31).double(), POWER
    common = (each * own * size ** -p[:, None]).sum(1) / each.sum()
    likely = -each.sum() / 2 * common.log() - p / 2 * (each * size.log()).sum()
    return p[(likely - ((p - mean) / sd).square() / 2).nan_to_num().argmax()].item()


def _noisy(replicates: Sequence[Tensor]) -> Tensor:
    """Return a mask of examples much noisier than others in both halves of replicates, (n,)."""
    halves = [
        torch.cat([half.std(1) for half in _halves(block)])
        if block.shape[1] >= OWN
        else block.new_zeros(2 * len(block))
        for block in replicates
    ]
    example = torch.arange(sum(map(len, replicates))).split(list(map(len, replicates)))
    return apart(torch.cat(halves), torch.cat([each.repeat(2) for each in example]), NOISIER)


def _halves(block: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two halves of the replicates, (n_g, R_g)."""
    middle = block.shape[1] // 2
    return block[:, :middle], block[:, middle:]


def _own(block: Tensor) -> Tensor:
    """Return the variance of one replicate of each example, (n_g,), NaN for a single one."""
    return block.var(1) if block.shape[1] > 1 else torch.full((len(block),), math.nan).double()


def _shared(replicates: Sequence[Tensor], share: float) -> tuple[Tensor, Tensor]:
    """Return variances of one replicate of each example and their degrees of freedom, (n,)."""
    own = torch.cat([_own(block) for block in replicates])
    if own.isnan().any():
        variance, freedom = typical(replicates, share=share)
        return variance.expand_as(own), freedom.expand_as(own)
    each = torch.cat([torch.full((len(b),), b.shape[1] - 1.0).double() for b in replicates])
    mean, weight = (each * own).sum() / each.sum(), _credibility(replicates)
    of_own = weight + (1 - weight) * each / each.sum()
    known = 1 / (of_own / each + (1 - of_own).square() / freedoms(each * own, each))
    return mean + weight * (own - mean), known


def typical(
    replicates: Sequence[Tensor], caution: float = 0.0, share: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return the variance of a replicate of an example that has just one, and its freedoms; (...).

    It is the variance over all examples, which includes rare large costs, times the share of
    noise in it, as estimated from the examples with two replicates.

    Args:
        replicates: of examples, in blocks (n_g, R_g, ...), less their known costs.
        caution: weight of the assumption that all differences are noise, in examples; it protects
            against few examples that happen to show none.
        share: of the draws of a single replicate, in one of several; at least 1/R.
    """
    twice = [block for block in replicates if block.shape[1] > 1]
    once = torch.cat([_as_single(block, share) for block in replicates])
    noise = torch.cat([block.var(1) for block in twice])
    square = torch.cat([(block - once.mean(0)).square().mean(1) for block in twice])
    noise, square = share * noise, square - (1 - share) * noise
    # with few examples the noise may look small by chance
    doubt = caution**2 / len(noise) * square.mean(0)
    of_noise = (noise.sum(0) + doubt) / (square.sum(0) + doubt)
    return once.var(0) * of_noise, freedoms_of(noise, noise.new_ones(len(noise)))


def _as_single(block: Tensor, share: float) -> Tensor:
    """Return a number of each example with the noise of a single replicate, (n_g, ...).

    `share`: of the draws of a single replicate, in one of several.
    """
    mean, count = block.mean(1), block.shape[1]
    left = math.sqrt((share * count - 1) / (count - 1)) if count > 1 else 0.0
    return mean + left * (block[:, 0] - mean)


def _credibility(replicates: Sequence[Tensor]) -> float:
    """Return w, the weight of an example's own variance; 0 if all have too few replicates."""
    enough = [block for block in replicates if block.shape[1] >= HALVES]
    count = sum(map(len, enough))
    if not count:
        return 0.0
    parts = [[half.var(1) for half in _halves(block)] for block in enough]
    one, other = (torch.cat(half) for half in zip(*parts, strict=True))
    whole = torch.cat([block.var(1) for block in enough])
    common = ((one - one.mean()) * (other - other.mean())).mean() / whole.var(correction=0)
    found = min(max(0.0, common.nan_to_num(0.0).item()), MOST)
    few = 1 / (1 + (count / ALONE) ** 2)
    return few * MOST + (1 - few) * found
