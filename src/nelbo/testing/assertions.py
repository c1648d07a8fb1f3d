"""Assertions about means of draws and about orders of convergence."""

import math

import torch
from torch import Tensor


def assert_mean(draws: Tensor, truth: Tensor | float, error: float) -> None:
    """Assert that the mean of draws, over dim 0, is the truth within 4 standard errors <= error.

    `error` makes the test able to fail: draws too few or too noisy to see a fault are refused.
    """
    truth = torch.as_tensor(truth, dtype=torch.float64).detach()
    standard_error = draws.double().std(0) / math.sqrt(len(draws))
    off = (draws.double().mean(0) - truth).abs()
    assert (standard_error <= error).all(), f"standard error {standard_error.max():.3g} > {error}"
    assert (off <= 4 * standard_error + 1e-12).all(), (
        f"off by {(off / standard_error).max():.2f} standard errors"
    )


def orders(errors: list[float]) -> Tensor:
    """Measured orders of convergence, log2 of the ratio of errors at h and h/2."""
    e = torch.tensor(errors, dtype=torch.float64).abs()
    return (e[:-1] / e[1:]).log2()
