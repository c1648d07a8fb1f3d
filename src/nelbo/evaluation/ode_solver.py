r"""An adaptive Runge–Kutta solver that gives each row of a batch steps of its own.

The pair of orders 5 and 4 of Dormand and Prince (1980): a step of length h from (t, y) is

    k_i = f(t + c_i h, y + h Σ_j a_ij k_j),   y' = y + h Σ_j b_j k_j,   error = h Σ_j e_j k_j,

with k_7 = f(t + h, y'), the k_1 of the next step. A step is taken if the norm of the error, in
units of the tolerance, is below 1; the next one is 0.9 · norm^(−1/5) times as long (Hairer,
Nørsett and Wanner, Solving Ordinary Differential Equations I, section II.4). The steps of a row
are those of scipy's RK45, which solves one row at a time. Solvers that take one norm over a batch,
as torchdiffeq does, let the value of an example depend on the others beside it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),  # b
)
C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def solve(
    f: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    start: float,
    end: float,
    tolerance: float,
    norm: Callable[[Tensor], Tensor],
    max_steps: int,
) -> Tensor:
    """Return y(end) of dy/dt = f(t, y, rows), y(start) = y; shape (B, N), float64.

    Args:
        f: of times (B',), values (B', N) and the rows of the batch that these are, (B',).
        y: values at `start`, shape (B, N).
        start: a time.
        end: a time, before or after `start`.
        tolerance: absolute and relative, of the error of one step.
        norm: of an error in units of the tolerance, (B', N) -> (B',).
        max_steps: steps of a row, taken or refused, at most.

    Raises:
        ValueError: if f is not finite, or a row is not at the end after `max_steps` steps.
    """
    y, rows = y.double(), torch.arange(len(y), device=y.device)
    sign, result, t = 1 if end > start else -1, y.clone(), y.new_full((len(y),), start)
    slope, refused = f(t, y, rows), torch.zeros(len(y), dtype=torch.bool, device=y.device)
    h = first_step(f, y, t, slope, end, tolerance, norm)
    for _ in range(max_steps):
        rest = (end - t).abs()
        h, last = torch.minimum(h, rest), h >= rest
        if (~last & (t + h == t)).any():
            break
        slopes, at = [slope], y
        for a, c in zip(A, C, strict=True):
            at = y + sign * h[:, None] * sum(w * k for w, k in zip(a, slopes, strict=True))
            slopes.append(f(t + sign * c * h, at, rows))
        error = h[:, None] * sum(w * k for w, k in zip(E, slopes, strict=True))
        ratio = norm(error / (tolerance + tolerance * torch.maximum(y.abs(), at.abs())))
        taken = ratio < 1
        t, y, slope = (
            torch.where(taken.view(-1, *[1] * (new.ndim - 1)), new, old)
            for new, old in ((t + sign * h, t), (at, y), (slopes[-1], slope))
        )
        factor = (0.9 * ratio.pow(-0.2)).clamp(0.2, 10).nan_to_num(0.2)
        h = h * torch.where(refused, factor.clamp(max=1), factor)  # wary after a refused step
        done, refused = taken & last, ~taken
        result[rows[done]] = y[done]
        t, y, slope, h, refused, rows = (v[~done] for v in (t, y, slope, h, refused, rows))
        if not len(rows):
            return result
    raise ValueError(
        f"the ODE solver did not come to an end at tolerance {tolerance:g} (the flow is not"
        f" finite, or needs steps too short or more than {max_steps}); try a larger tolerance"
    )


def first_step(
    f: Callable[[Tensor, Tensor, Tensor], Tensor],
    y: Tensor,
    t: Tensor,
    slope: Tensor,
    end: float,
    tolerance: float,
    norm: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the length of the first step of each row, (B,), from the size of f and its change."""
    rest, scale = (end - t).abs(), tolerance + tolerance * y.abs()
    size, change = norm(y / scale), norm(slope / scale)
    small = (size < 1e-5) | (change < 1e-5)
    tried = torch.where(small, 1e-6, 0.01 * size / change).minimum(rest)
    step = tried * (end - t).sign()
    there = f(t + step, y + step[:, None] * slope, torch.arange(len(y), device=y.device))
    most = torch.maximum(change, norm((there - slope) / scale) / tried)
    best = torch.where(most <= 1e-15, (1e-3 * tried).clamp(min=1e-6), (0.01 / most).pow(0.2))
    return torch.minimum(best, 100 * tried).minimum(rest)
