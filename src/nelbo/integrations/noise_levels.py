"""Tables of noise levels, as other libraries have them: β's, α's or σ's, and times for them."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nelbo._utils.text import shortened

Numbers = Tensor | Sequence[float]
Table = Tensor | Callable[[Tensor], Tensor] | None


def spaced(total: int, steps: int) -> list[int]:
    """Return `steps` of the indices 0..total-1, evenly spaced with both ends (Nichol & Dhariwal
    2021).

    >>> spaced(1000, 5)
    [0, 250, 500, 749, 999]
    """
    if not 1 <= steps <= total:
        raise ValueError(
            f"the model has {total} steps, and a bound of {steps} was asked for; try {total}"
        )
    stride = (total - 1) / (steps - 1) if steps > 1 else 1.0
    return [round(i * stride) for i in range(steps)]


def gamma_of(
    *,
    betas: Numbers | None = None,
    alphas: Numbers | None = None,
    sigmas: Numbers | None = None,
) -> Tensor:
    """Return γ_1..γ_T, float64, from one of the three tables; see `wrap`."""
    given = {"betas": betas, "alphas": alphas, "sigmas": sigmas}
    named = [(name, value) for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(
            "give the noise levels as one of betas, alphas, sigmas or schedule; got"
            f" {' and '.join(name for name, _ in named) or 'none'}"
        )
    name, numbers = named[0]
    v = row_of(name, numbers)
    # β may be 1, and α 0, at the last time only
    if name == "betas":
        if len(v) > 1 and 0.5 < v[0] < 1 and (v.diff() < 0).all():
            raise ValueError(
                f"the betas decrease from {v[0].item():.4g}: are these products of 1 - β, as the"
                " .alphas_cumprod of a scheduler are? Give them as alphas=; or its .betas"
            )
        check_levels(name, v, (v <= 0) | (v >= 1) & (v != v.new_tensor([*[0] * (len(v) - 1), 1])))
        log_alpha = torch.log1p(-v).cumsum(0)
        return (-torch.expm1(log_alpha)).log() - log_alpha
    if name == "alphas":
        check_levels(name, v, (v < 0) | (v >= 1) | (v.diff(prepend=v.new_ones(1)) >= 0))
        if len(v) >= 10 and v.median() > 0.9:
            raise ValueError(
                f"most of the alphas are near 1 (the last is {v[-1].item():.3g}): are these 1 - β,"
                " as the .alphas of a scheduler are? Give their products, .alphas_cumprod; if they"
                " are the products, give betas instead"
            )
        return torch.log1p(-v) - v.log()
    check_levels(name, v, v.diff(prepend=v.new_zeros(1)) <= 0)
    return 2 * v.log()


RULES = {
    "betas": "must lie in (0, 1)",
    "alphas": "must decrease within [0, 1)",
    "sigmas": "must be positive and increase",
}


def check_levels(name: str, values: Tensor, wrong: Tensor, rule: str = "") -> None:
    """Raise ValueError with the first of the values that is wrong, and the rule that it breaks."""
    if wrong.any():
        i = int(wrong.nonzero()[0])
        ordered = not rule and name != "betas" and len(values) > 1 and wrong[1:].all()
        hint = f"; they are in reverse order: give {name}.flip(0)" if ordered else ""
        raise ValueError(f"{name} {rule or RULES[name]}; number {i} is {values[i].item():g}{hint}")


def row_of(name: str, numbers: Numbers) -> Tensor:
    """Return a table of noise levels as float64, (T,), if it is a row of finite numbers."""
    if isinstance(numbers, np.ndarray):
        numbers = numbers.copy()  # torch reads no array that runs backwards
    v = torch.as_tensor(numbers, dtype=torch.float64)
    if v.ndim != 1 or len(v) == 0:
        raise ValueError(f"{name} must be one row of numbers, (T,); got shape {tuple(v.shape)}")
    check_levels(name, v, ~v.isfinite(), "must be finite numbers, those of the training")
    return v


def as_table(times: Numbers | Callable[[Tensor], Tensor] | None) -> Table:
    """Return times as a tensor of their own type, or as the function that they are."""
    if times is None or callable(times):
        return times
    return torch.as_tensor(times.copy() if isinstance(times, np.ndarray) else times)


def rising(sigmas: Tensor, times: Table) -> tuple[Tensor, Table]:
    """Return σ's from the least to the largest, without a 0 at the end, and their times."""
    whole = len(sigmas)
    sigmas = sigmas[:-1] if whole > 1 and sigmas[-1] == 0 else sigmas
    order = sigmas.argsort(stable=True)
    if isinstance(times, Tensor) and times.shape in ((whole,), sigmas.shape):
        times = times[: len(sigmas)][order]
    return sigmas[order], times


def kept_times(keep: Sequence[int] | None, total: int) -> Tensor:
    """Return the indices of the times to keep, of 0..total-1; all where none are given.

    Raises:
        ValueError: they are not increasing, or not among these.
    """
    kept = torch.arange(total) if keep is None else torch.as_tensor(keep)
    if len(kept) == 0 or (kept.diff() <= 0).any() or kept[0] < 0 or kept[-1] >= total:
        raise ValueError(
            f"keep must be increasing numbers of the {total} times, 0..{total - 1}; got"
            f" {shortened(str(kept.tolist()))}; a number of steps chooses as many, evenly, as"
            f" spaced({total}, 10) does"
        )
    return kept
