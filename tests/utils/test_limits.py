"""Limits on what a model may allocate while it is built."""

import pytest
import torch

from nelbo._utils.limits import Within


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(7),
        lambda: torch.arange(2, 9.5),
        lambda: torch.arange(1, 0, -0.3),
        lambda: torch.eye(3),
        lambda: torch.eye(3, 5),
        lambda: torch.linspace(0, 1, 6),
        lambda: torch.linspace(0, 1, steps=6, dtype=torch.float64),
        lambda: torch.randn(2, 3),
        lambda: torch.randn((2, 3)),
        lambda: torch.full((4, 2), 0.5),
    ],
)
def test_a_tensor_is_counted_before_it_is_made(make):
    size = make().numel()
    with Within(size, 1, "far more"):
        make()
    with pytest.raises(ValueError, match="far more"), Within(size - 1, 1, "far more"):
        make()


def test_sizes_beyond_the_address_space_are_counted():
    for make in (lambda: torch.linspace(0, 1, 10**15), lambda: torch.randn(10**9, 10**9)):
        with pytest.raises(ValueError, match="far more"), Within(10**12, 1, "far more"):
            make()
