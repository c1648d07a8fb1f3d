"""Events of a training for a tracker, and the device on which it runs."""

import pytest
import torch
from support.runs import TINY

from nelbo.diffusion.model import find_device
from nelbo.runs import config
from nelbo.runs.train import resume, train


def test_a_tracker_gets_the_events_that_are_written(tmp_path):
    """Plain values, in order, also of a run that goes on; changing them changes no file."""
    got = []

    def on_event(event):
        got.append(dict(event))
        event.clear()

    run = train("digits", tmp_path / "run", on_event=on_event, **TINY)
    assert got == config.read_metrics(run.path) and [e["step"] for e in got] == [2, 4]
    assert all(type(v) in (int, float, str, type(None)) for e in got for v in e.values())
    resume(run.path, steps=6, on_event=on_event)
    assert got == config.read_metrics(run.path) and got[-1]["step"] == 6


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen = []
    monkeypatch.setattr(torch, "zeros", lambda n, device: seen.append(device) or torch.ones(n))
    find_device("auto")
    assert seen == ["cuda"]


@pytest.mark.parametrize("name", ["mps", "mps:0"])
def test_mps_is_refused_before_any_work(name):
    with pytest.raises(ValueError, match=r"no float64.*try cpu"):
        find_device(name)
