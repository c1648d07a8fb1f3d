r"""What may be stated as an error, where a variance is only estimated.

A standard error that is stated is so wide that value ± 1.96 of it is a 95 % interval. Of an
estimate s² that is worth ν normal squares, its degrees of freedom, that is

    s t_ν(0.975) / 1.96,        ν = (Σ_g s_g²)² / Σ_g s_g⁴/(d_g + 2) - 2 ,

where s² is a sum of independent s_g² of d_g degrees each (Welch 1947; the less, the more unequal
they are, or the heavier their tails). Where there are fewer than FEWEST nothing is stated: NaN.

One example is drawn too seldom to know its own variance: of two draws both may miss what is rare,
and agree. So all examples share the mean of theirs, as far as their differences are chance
(Bühlmann's credibility): two halves of an example's replicates tell how far they are.
"""

import math
from collections.abc import Sequence

import torch
from scipy.special import stdtrit
from torch import Tensor

FEWEST = 2.0  # degrees of freedom of normal draws, of which an error is stated
OWN = 8  # replicates that give an example an error of its own, if it is like no other
HALVES = 4  # replicates of which two halves have a variance each
MOST = 0.75  # of what an example's own variance differs by counts: none is nearly 0 by chance
FAR, SHARE = 10.0, 0.9  # so many times as far as so many are, and an example is like no other
NOISIER = 4.0  # the same of the noise of half of the replicates
NORMAL = 1.959964  # the 97.5 % quantile


def widened(freedoms: float) -> float:
    """What the root of a variance with so many degrees of freedom is multiplied by."""
    return float(stdtrit(freedoms, 0.975)) / NORMAL


def freedoms(parts: Tensor, each: Tensor) -> float:
    """ν of a sum of estimated variances, (n,), which have so many degrees of freedom, (n,).

    NaN where these are too few, or nothing varies; one at least: where one part is all that there
    is the error is wide, and not only stated when it is not.
    """
    squares = (parts.square() / (each + 2)).sum()
    if not each.sum() >= FEWEST or not squares > 0:
        return math.nan
    return max(1.0, (parts.sum().square() / squares - 2).item())


def apart(
    distance: Tensor,
    example: Tensor | None = None,
    far_is: float = FAR,
    others: Tensor | None = None,
) -> Tensor:
    """Which examples are like no other, (N,): all of their distances are far beyond most others,
    or one is no number.

    Args:
        distance: from what is usual, (n,).
        example: that each is of, (n,), 0..N-1; left out, each is of its own.
        far_is: so many times as far as nine of ten.
        others: the distances of these ten; left out, all of them.
    """
    example = torch.arange(len(distance)) if example is None else example
    number = distance.isfinite().cpu()
    finite = (distance if others is None else others).cpu().double()
    finite = finite[finite.isfinite()]
    usual = finite.kthvalue(math.ceil(SHARE * len(finite))).values.item() if len(finite) else 0.0
    far = distance.cpu() > far_is * usual if usual > 0 else ~number
    like_others = torch.zeros(int(example.max()) + 1, dtype=torch.bool)
    like_others[example[~far]] = True
    like_others[example[~number]] = False
    return ~like_others.to(distance.device)


def errors(replicates: Sequence[Tensor], reference: Tensor | None = None) -> Tensor:
    """The stated error of the mean of each example's replicates, (n,), in blocks (n_g, R_g).

    An example like no other has a variance of its own, or no error where it has few replicates.
    What is usual is that of a reference, (M, R), where there is one, however few or strange the
    examples are, and it shares its variances with them.
    """
    known = 0 if reference is None else len(reference)
    replicates = [*replicates] if reference is None else [reference, *replicates]
    counts = torch.cat([torch.full((len(b),), b.shape[1]) for b in replicates])
    values = torch.cat([block.flatten() for block in replicates])
    example = torch.arange(len(counts)).repeat_interleave(counts)
    usual = slice(None) if reference is None else slice(reference.numel())
    distance = (values - values[usual].nanmedian()).abs()
    far = apart(distance, example, others=distance[usual]) | _noisy(replicates)
    error = torch.full_like(far, math.nan, dtype=torch.float64)
    if not far.all():
        parts = zip(replicates, far.split(list(map(len, replicates))), strict=True)
        shared, freedom = _shared([near for b, f in parts if len(near := b[~f])])
        error[~far] = (shared / counts[~far]).sqrt() * widened(freedom)
    alone = torch.cat([_own(block) for block in replicates])
    enough = far & (counts >= OWN)
    error[enough] = (alone / counts)[enough].sqrt() * widened(OWN - 1)
    return torch.where(error > 0, error, math.nan)[known:]


def _noisy(replicates: Sequence[Tensor]) -> Tensor:
    """Which examples have more noise than any other in each half of many replicates, (n,)."""
    halves = [
        torch.cat([half.std(1) for half in _halves(block)])
        if block.shape[1] >= OWN
        else block.new_zeros(2 * len(block))
        for block in replicates
    ]
    example = torch.arange(sum(map(len, replicates))).split(list(map(len, replicates)))
    return apart(torch.cat(halves), torch.cat([each.repeat(2) for each in example]), NOISIER)


def _halves(block: Tensor) -> tuple[Tensor, Tensor]:
    """Of the replicates, (n_g, R_g)."""
    middle = block.shape[1] // 2
    return block[:, :middle], block[:, middle:]


def _own(block: Tensor) -> Tensor:
    """Of one replicate of each example, (n_g,)."""
    return block.var(1) if block.shape[1] > 1 else torch.full((len(block),), math.nan).double()


def _shared(replicates: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Variances of one replicate of each example, (n,), and the freedoms of their mean."""
    own = torch.cat([_own(block) for block in replicates])
    if own.isnan().any():
        variance, known = typical(replicates)
        return torch.full_like(own, variance), known
    each = torch.cat([torch.full((len(b),), b.shape[1] - 1.0).double() for b in replicates])
    mean = (each * own).sum() / each.sum()
    return mean + _credibility(replicates) * (own - mean), freedoms(each * own, each)


def typical(replicates: Sequence[Tensor], caution: float = 0.0) -> tuple[float, float]:
    """The variance of one replicate of an example that has but one, and its degrees of freedom.

    It is the share of noise, in those that have two, of what differs in all of them, which knows
    of large costs that are rare.

    Args:
        replicates: of examples, in blocks, less what is known of them.
        caution: so many of two replicates that say nothing differs do not say that it is so.
    """
    twice = [block for block in replicates if block.shape[1] > 1]
    once = torch.cat([block[:, 0] for block in replicates])
    noise = torch.cat([block.var(1) for block in twice])
    square = torch.cat([(block - once.mean()).square().mean(1) for block in twice])
    # few tell the noise, and the error would be least where they tell the least
    doubt = caution**2 / len(noise) * square.mean()
    share = (noise.sum() + doubt) / (square.sum() + doubt)
    return (once.var() * share).item(), freedoms(noise, torch.ones_like(noise))


def _credibility(replicates: Sequence[Tensor]) -> float:
    """The share of what variances differ by that is not chance, less one error of it."""
    enough = [block for block in replicates if block.shape[1] >= HALVES]
    if sum(map(len, enough)) < 2:
        return 0.0
    parts = [[half.var(1) for half in _halves(block)] for block in enough]
    one, other = (torch.cat(half) for half in zip(*parts, strict=True))
    whole = torch.cat([block.var(1) for block in enough])
    common = ((one - one.mean()) * (other - other.mean())).mean() / whole.var(correction=0)
    return min(max(0.0, common.nan_to_num(0.0).item() - 1 / math.sqrt(len(whole))), MOST)
