"""Numerics decided in one place: broadcasting, derivatives, log(1 - exp), draws and seeds."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Rows = TypeVar("Rows", Tensor, np.ndarray)
LOG_2 = 0.6931471805599453


def over(v: Tensor, x: Tensor) -> Tensor:
    """Return v of shape (B,) as (B, 1, ..., 1), to broadcast over x, (B, ...), in x's dtype.

    Coefficients are computed in float64 and meet the data only here.

    >>> over(torch.tensor([1.0, 2.0]), torch.zeros(2, 3, 5, 7)).shape
    torch.Size([2, 1, 1, 1])
    """
    dtype = x.dtype if x.is_floating_point() else v.dtype
    return v.reshape(v.shape + (1,) * (x.ndim - v.ndim)).to(dtype)


def thinned(x: Rows, most: int) -> Rows:
    """Return at most so many of the rows of x, evenly spaced."""
    return x[:: max(1, math.ceil(len(x) / most))]


def broadcast_shape(*shapes: torch.Size) -> torch.Size:
    """Return the common shape; `torch.broadcast_shapes` imports sympy, 50 MiB, at its first use.

    >>> broadcast_shape(torch.Size([2, 1]), torch.Size([3]))
    torch.Size([2, 3])
    """
    return torch.Size(np.broadcast_shapes(*shapes))


def widened(x: Tensor) -> Tensor:
    """Return stored values in the type that models take: int64 for levels, float64 for reals."""
    return x.double() if x.is_floating_point() else x.long()


def slope(f: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Return df/dt of an elementwise f; shape of t, differentiable in the parameters of f.

    By reverse mode: torch 2.13's forward mode compiles with the deprecated `torch.jit.script` at
    its first use, which is an error where warnings are errors.

    >>> slope(lambda t: t**3, torch.tensor([2.0])).item()
    12.0
    """
    training = torch.is_grad_enabled()
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        (df,) = torch.autograd.grad(f(t).sum(), t, create_graph=training)
    return df


def digest_of(*values: Tensor) -> str:
    """Return 16 hex digits that say what a function is by its values at fixed inputs.

    A name would not: all lambdas share one. Values count to 9 significant digits, as the last ones
    differ between machines.

    >>> digest_of(torch.ones(2)) == digest_of(torch.ones(2) + 1e-12)
    True
    """
    digest = hashlib.sha256()
    for each in values:
        numbers = each.detach().double().flatten().tolist()
        digest.update(" ".join(f"{v + 0.0:.8e}" for v in numbers).encode())
        digest.update(b";")
    return digest.hexdigest()[:16]


@contextmanager
def constant(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, hold these parameters constant: nothing has a gradient with respect to them."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, learned in before:
            parameter.requires_grad_(learned)


def log1mexp(a: Tensor) -> Tensor:
    """Return log(1 - exp(a)) for a <= 0, accurate at both ends (Maechler 2012, eq. 7)."""
    near_zero = a > -LOG_2
    return torch.where(
        near_zero,
        (-torch.expm1(torch.where(near_zero, a, -1.0))).log(),
        torch.log1p(-torch.where(near_zero, -1.0, a).exp()),
    )


def derive_seed(*path: int) -> int:
    """Return a 63-bit seed for a path (seed, step, ...), so that streams are independent."""
    if min(path) < 0:
        raise ValueError(f"seed must be at least 0; got {min(path)}")
    # SeedSequence ignores trailing zeros: without the length, (1, 0) would give the seed of (1,)
    sequence = np.random.SeedSequence([len(path), *path])
    return int(sequence.generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def seeded(*path: int) -> Iterator[None]:
    """Inside, seed the default generators by `path`; restore those of the caller after.

    >>> with seeded(0): a = torch.rand(())
    >>> with seeded(0): b = torch.rand(())
    >>> bool(a == b)
    True
    """
    # only the GPU of this process: others belong to other processes
    used = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(used):
        if torch.cuda.is_available():
            torch.manual_seed(derive_seed(*path))
        else:
            # the same, without the traceback that torch keeps for GPUs that may come, for 1 ms
            torch.default_generator.manual_seed(derive_seed(*path))
        yield
