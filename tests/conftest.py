"""One small trained run for the tests that need one; every test has its own, fixed seed."""

import gc
import signal
from pathlib import Path
from zlib import crc32

import pytest
import torch
from support.runs import TINY

from nelbo._utils.numerics import seeded
from nelbo.diffusion import gaussian_mixture
from nelbo.diffusion.batch import Batch
from nelbo.evaluation import grid_search
from nelbo.runs import pilot_cache
from nelbo.runs.train import train
from nelbo.training import trainer

pytest.register_assert_rewrite("nelbo.testing")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """A package that is missing fails the tests that need it: `make setup` installs all."""
    return _failed_if_missing((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _failed_if_missing((yield))


def _failed_if_missing(report):
    if report.skipped and "could not import" in str(report.longrepr):
        report.outcome = "failed"
    return report


def pytest_collection_finish():
    """Seldom look for garbage in all that was imported: it takes up to a third of a second."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], 100)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _interrupts():
    """Ctrl-C and SIGHUP are heard also behind a shell that ignores them, or nohup."""
    heard = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}
    heard = {getattr(signal, k): v for k, v in heard.items() if hasattr(signal, k)}
    before = {number: signal.signal(number, handler) for number, handler in heard.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Keep nothing in the cache of the user who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NELBO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _small_measurements():
    """Validations, pilots, grids and control variates are of little: short runs take no longer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "VALIDATION", (16, 2**18))
        patch.setattr(pilot_cache, "ROWS", 16)
        patch.setattr(grid_search, "EXAMPLES", 16)
        patch.setattr(gaussian_mixture, "SIZES", (1, 2))
        yield


@pytest.fixture(autouse=True)
def _seeded(request):
    """A test without a seed of its own draws the same each time it runs."""
    file, _, name = request.node.nodeid.partition("::")
    seed = crc32(f"tests/{Path(file).name}::{name}".encode())
    torch.default_generator.manual_seed(seed)  # without the traceback torch keeps for GPUs, 1 ms


@pytest.fixture
def drawn_by_places(monkeypatch):
    """An example that changes leaves the order of draws, and so those of all others."""
    monkeypatch.setattr(Batch, "order", property(lambda batch: torch.arange(len(batch))))


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run on digits; do not change it, copy it."""
    return train("digits", tmp_path_factory.mktemp("runs") / "digits", **TINY).path


@pytest.fixture(scope="session")
def of_words(tmp_path_factory):
    """A finished run and its table: two words are the same and say where the number is."""
    pl = pytest.importorskip("polars")
    path = tmp_path_factory.mktemp("impute")
    with seeded(5):
        left = torch.rand(400) < 0.5
        noise = torch.randn(400, dtype=torch.float64)
    word = ["left" if v else "right" for v in left]
    number = torch.where(left, -3.0, 3.0) + noise / 4
    holes = torch.arange(400) % 7 == 0
    frame = pl.DataFrame(
        {
            "where": word,
            "again": [None if no else v for v, no in zip(word, holes, strict=True)],
            "x": number.tolist(),
            "id": range(400),
        }
    )
    frame.drop("id").write_csv(path / "t.csv")
    options = {"steps": 250, "batch": 64, "width": 32, "depth": 1, "lr": 5e-3}
    return train(str(path / "t.csv"), path / "run", evaluate_every=250, **options), frame
