"""One small trained run for the tests that need one."""

import pytest
import torch

from nelbo.train import train

TINY = {"steps": 4, "batch": 16, "width": 8, "depth": 1, "evaluate_every": 2}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run on digits; do not change it, copy it."""
    return train("digits", tmp_path_factory.mktemp("runs") / "digits", **TINY).path
