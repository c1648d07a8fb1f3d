"""One small trained run for the tests that need one; every test has its own, fixed seed."""

from zlib import crc32

import pytest
import torch

from nelbo.train import train

TINY = {"steps": 4, "batch": 16, "width": 8, "depth": 1, "evaluate_every": 2}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded(request):
    """What a test draws without a seed of its own is the same each time it runs."""
    torch.manual_seed(crc32(request.node.nodeid.encode()))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run on digits; do not change it, copy it."""
    return train("digits", tmp_path_factory.mktemp("runs") / "digits", **TINY).path
