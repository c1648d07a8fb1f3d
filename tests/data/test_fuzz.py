"""A few damaged files of every kind; `benchmarks/data/fuzz.py` reads for as long as one likes."""

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("polars")
pytest.importorskip("constriction")
from support.fuzzing import SECONDS, TOLD, Kind, alarm, damaged, kinds, outcome

NAMES = (
    *("x.npy", "x.npz", "x-images-idx3-ubyte", "x-images-idx3-ubyte.gz", "x.csv", "x.tsv"),
    *("x.parquet", "x.arrow", "x.tar", "x.txt", "x.png", "x.jpg", "schema.json", "config.json"),
    *("model.safetensors", "state.safetensors", "metrics.jsonl", "grids.json"),
    *("pilots.json", "net.pt", "net.json", "x.nlb", "header.json", "cells.csv"),
    *("sparse.npz", "sparse.parquet", "sparse.arrow", "heads.tar", "heading.json"),
)


@pytest.fixture(scope="module")
def made(trained):
    return {kind.name: kind for kind in kinds(trained)}


def test_every_kind_is_fuzzed(made):
    assert set(made) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_file_is_read(made, tmp_path, name):
    assert outcome(made[name], made[name].content, tmp_path) == "read"


@pytest.mark.parametrize("examples", [8, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_damage_is_told_in_a_sentence_or_harmless(made, tmp_path, name, examples):
    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(made[name]))
    def run(content):
        assert outcome(made[name], content, tmp_path) in ("read", "refused")

    run()


def test_what_is_neither_is_found(tmp_path):
    """An exception of another kind, a warning, and a read that does not end."""

    def wrong(path):
        raise IndexError

    def warn(path):
        import warnings

        warnings.warn("odd", stacklevel=1)

    assert not issubclass(IndexError, TOLD) and SECONDS
    for read in (wrong, warn):
        with pytest.raises((IndexError, UserWarning)):
            outcome(Kind("x", b"", read), b"", tmp_path)
    with pytest.raises(Exception, match="not done in 1 s of CPU"), alarm(1):
        while True:
            pass
    busy = "import time\nwhile time.process_time() < 1.2: pass"
    with pytest.raises(Exception, match="not done in 1 s of CPU"), alarm(1):
        subprocess.run([sys.executable, "-S", "-c", busy])


@settings(max_examples=30, derandomize=True, database=None)
@given(st.data())
def test_damage_is_done(data):
    kind = Kind("x.json", b'{"a": [1, 2], "b": {"c": "d"}}', str, json=True)
    assert isinstance(data.draw(damaged(kind)), bytes)
