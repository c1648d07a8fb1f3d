"""A pilot of a run is paid for once by each user, and nothing in a run can bend a number."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nelbo._utils import cache
from nelbo.diffusion.times import TimeGrid
from nelbo.evaluation.allocation import Strata
from nelbo.evaluation.control_variates import ControlVariates
from nelbo.evaluation.evaluate import evaluate
from nelbo.runs import pilot_cache
from nelbo.runs.loading import load as load_run
from nelbo.runs.pilot_cache import KIND, Pilots

STEPS = 3


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(pilot_cache, "ROWS", 4)
    monkeypatch.setenv("NELBO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_unwritten", {})
    return load_run(shutil.copytree(trained, tmp_path / "run"))


def entries():
    """The files of the cache that keep a pilot."""
    return sorted((cache.folder() / KIND).glob("*.json"))


def measured(run, **options):
    """The result on a few examples, and the rows that the network saw."""
    rows = []
    hook = run.model.network.register_forward_hook(lambda _, inputs, out: rows.append(len(out)))
    x, known = run.examples()[:8], run.examples(split="train")[:100]
    options = {"calls": 4, "times": TimeGrid.uniform(STEPS), "known": known} | options
    result = evaluate(run.model, x, pilots=Pilots(run), **options)
    hook.remove()
    return result, sum(rows)


def test_it_is_paid_for_once_and_changes_nothing(run):
    first, dear = measured(run)
    again, cheap = measured(run)
    assert first == again
    assert dear - cheap == STEPS * pilot_cache.ROWS  # one cell is the reconstruction
    assert cheap == first.calls_per_example * 8 == 4 * 8


def test_others_have_their_own(run):
    """Other weights and times, and draws of two calls; all numbers of draws share one."""
    measured(run)

    assert len(entries()) == 1
    measured(run, times=TimeGrid.uniform(2))
    assert len(entries()) == 2
    measured(run, calls=64)
    assert len(entries()) == 2
    measured(run, calls=2)
    assert len(entries()) == 3
    with torch.no_grad():
        next(run.model.parameters()).add_(1)
    measured(run)
    assert len(entries()) == 4


def tampered(document, how):
    entry = document["value"]
    p = entry["probability"]
    if how == "a stratum without a chance":
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
        "a stratum without a chance",
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
    (file,) = entries()
    file.write_text(json.dumps(tampered(json.loads(file.read_text()), how)))
    again, spent = measured(run)
    assert again == result and spent == dear


@pytest.mark.parametrize("damage", ["", "[]", "{", "null", '{"a": [2, 1]}', "[" * 10**5])
def test_a_damaged_file_is_no_matter(run, damage):
    result, _ = measured(run)
    entries()[0].write_text(damage)
    assert measured(run)[0] == result


def bent(entry):
    """Nearly all visits go to two times, and a huge coefficient is taken off the others, where
    no draw will fall: of mean nothing, and each number shown is far too small."""
    p, between = entry["probability"], entry["between"]
    count = len(p)
    entry["probability"] = [0.05 / count + (i < 2) * (0.95 / 2) for i in range(count)]
    for i in range(2, count):
        between[i][0] -= 1e3
    return entry


def test_nothing_in_the_folder_of_a_run_is_a_pilot(run, tmp_path, monkeypatch):
    """One that would show any number, with a small error, under every key that a run can know."""
    monkeypatch.setattr(pilot_cache, "ROWS", 128)  # of so many, a stratum may have few draws
    result, dear = measured(run, times=TimeGrid.uniform(5))
    (file,) = entries()
    document = json.loads(file.read_text())
    monkeypatch.setenv("NELBO_CACHE", str(tmp_path / "other user"))
    value = bent(document["value"])
    document["value"] = value
    old_key = document["key"]
    (run.path / "pilots.json").write_text(json.dumps(document | {old_key: value}))
    for place in (run.path / KIND, run.path / "cache" / KIND):
        place.mkdir(parents=True)
        (place / file.name).write_text(json.dumps(document))
    assert measured(load_run(run.path), times=TimeGrid.uniform(5)) == (result, dear)
    # the attack is one: as this user's own word it is taken
    entries()[0].write_text(json.dumps(document))
    assert measured(run, times=TimeGrid.uniform(5))[0].nats != pytest.approx(result.nats, rel=0.1)


def test_the_cache_of_another_user_is_not_read(run, monkeypatch):
    result, dear = measured(run)
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    assert measured(run) == (result, dear)


def test_a_pilot_is_of_the_data_too(run):
    """The same weights beside other data, as a run from elsewhere may state them."""
    strata = Strata(TimeGrid.uniform(STEPS))
    controls = ControlVariates(run.model, run.examples(split="train")[:100], strata.edges)
    Pilots(run)(strata, controls)
    other = replace(run.config, hashes={**run.config.hashes, "validation": "others"})
    with pytest.raises(ValueError, match="changed since the run was trained"):
        Pilots(replace(run, config=other))(strata, controls)


def told(run):
    lines = []
    x = run.examples()[:8]
    evaluate(
        run.model, x, times=TimeGrid.uniform(STEPS), calls=4, pilots=Pilots(run, lines.append)
    )
    return lines


def test_a_cache_that_is_read_only_is_no_matter(run, tmp_path, monkeypatch):
    """It is said, and the pilot lasts as long as the process."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("NELBO_CACHE", str(tmp_path / "file"))
    begins, ends = told(run)
    assert begins.startswith("a pilot of")
    assert ends.startswith(f"the pilot is not kept: {tmp_path / 'file'}")
    assert ends.endswith("set NELBO_CACHE to use another folder")
    assert told(run) == []


def test_without_a_home_there_is_no_cache(run, monkeypatch):
    for name in ("NELBO_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert "not kept: no home; set NELBO_CACHE" in told(run)[1]


def no_home():
    raise RuntimeError("no home")


def test_it_says_what_it_does(run):
    assert told(run) == [
        f"a pilot of {STEPS * pilot_cache.ROWS} network calls on the validation split",
        f"the pilot is kept in {cache.folder() / KIND}, for later evaluations",
    ]
    assert told(run) == []


def test_a_run_is_measured_as_the_command_does(run, capsys):
    """`Run.evaluate` is the number of `nelbo evaluate`, with its pilot and training split."""
    from nelbo.cli import main

    here = run.evaluate(calls=1, seed=3).to_dict()
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(run.path), "--calls", "1", "--seed", "3", "--json"])
    assert not ended.value.code
    there = json.loads(capsys.readouterr().out)
    assert here["standard_error"] and here == {name: there[name] for name in here}
    grid = run.grid(STEPS)
    batch, _ = run.batch()
    known = run.examples("train")
    by_hand = evaluate(run.model, batch, known=known, pilots=Pilots(run), times=grid, calls=1)
    assert run.evaluate(steps=STEPS, calls=1).terms == by_hand.terms
    others = run.evaluate(batch[:5], calls=8)  # not the run's own: no pilot is kept for them
    assert others.nats == evaluate(run.model, batch.x[:5], calls=8).nats
