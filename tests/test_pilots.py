"""A pilot of a run is paid for once, and what its file says cannot bend a number."""

import json
import shutil

import pytest
import torch

from nelbo import _files, checkpoint, pilots
from nelbo._files import kept
from nelbo.estimate import Grid
from nelbo.evaluate import evaluate
from nelbo.pilots import FILE, Pilots

STEPS = 3


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(pilots, "ROWS", 4)
    kept_by_others = shutil.ignore_patterns(FILE)
    return checkpoint.load(shutil.copytree(trained, tmp_path / "run", ignore=kept_by_others))


def measured(run, **options):
    """The result on a few examples, and the rows that the network saw."""
    rows = []
    hook = run.model.network.register_forward_hook(lambda _, inputs, out: rows.append(len(out)))
    x, known = run.examples()[0][:8], run.examples(split="train")[0][:100]
    options = {"calls": 4, "times": Grid.uniform(STEPS), "known": known} | options
    result = evaluate(run.model, x, pilots=Pilots(run), **options)
    hook.remove()
    return result, sum(rows)


def test_it_is_paid_for_once_and_changes_nothing(run):
    first, dear = measured(run)
    again, cheap = measured(run)
    assert first == again
    assert dear - cheap == STEPS * pilots.ROWS  # one cell is the reconstruction
    assert cheap == first.calls_per_example * 8 == 4 * 8


def test_others_have_their_own(run):
    """Other weights, times and numbers of draws; draws nearly as many share one."""
    measured(run)

    def kept():
        return len(json.loads((run.path / FILE).read_text()))

    assert kept() == 1
    measured(run, times=Grid.uniform(2))
    assert kept() == 2
    measured(run, calls=64)
    measured(run, calls=72)
    assert kept() == 3
    with torch.no_grad():
        next(run.model.parameters()).add_(1)
    measured(run)
    assert kept() == 4


def tampered(document, how):
    (entry,) = document.values()
    p = entry["probability"]
    if how == "a cell without a chance":
        p[1], p[2] = p[1] + p[2] - 1e-6, 1e-6
    elif how == "more than certain":
        entry["probability"] = [2 * v for v in p]
    elif how == "not a number":
        entry["between"][0][0] = float("nan")
    elif how == "another shape":
        entry["within"] = entry["within"][:-1]
    elif how == "words":
        entry["left"] = "much"
    elif how == "too large a number":
        entry["left"][0] = 10**400
    elif how == "a part":
        del entry["left"]
    return document


@pytest.mark.parametrize(
    "how",
    [
        "a cell without a chance",
        "more than certain",
        "not a number",
        "another shape",
        "words",
        "too large a number",
        "a part",
    ],
)
def test_a_file_that_would_bend_the_number_is_made_again(run, how):
    result, dear = measured(run)
    document = json.loads((run.path / FILE).read_text())
    (run.path / FILE).write_text(json.dumps(tampered(document, how)))
    again, spent = measured(run)
    assert again == result and spent == dear


@pytest.mark.parametrize("damage", ["", "[]", "{", "null", '{"a": [2, 1]}', "[" * 10**5])
def test_a_damaged_file_is_no_matter(run, damage):
    result, _ = measured(run)
    (run.path / FILE).write_text(damage)
    assert measured(run)[0] == result


def test_a_file_from_elsewhere_is_not_read(run, tmp_path):
    measured(run)
    (run.path / FILE).rename(tmp_path / FILE)
    (run.path / FILE).symlink_to(tmp_path / FILE)
    assert kept(run.path / FILE) == {}


def told(run):
    lines = []
    x = run.examples()[0][:8]
    evaluate(run.model, x, times=Grid.uniform(STEPS), calls=4, pilots=Pilots(run, lines.append))
    return lines


def test_a_folder_that_is_read_only_is_no_matter(run, monkeypatch):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(_files, "write", refuse)
    begins, ends = told(run)
    assert begins.startswith("a pilot of")
    assert ends == f"the pilot is not kept: {run.path / FILE}: Permission denied"
    assert not (run.path / FILE).exists()


def test_it_says_what_it_does(run):
    assert told(run) == [
        f"a pilot of {STEPS * pilots.ROWS} network calls on the validation split",
        f"the pilot is kept in {run.path / FILE}, for later evaluations",
    ]
    assert told(run) == []
