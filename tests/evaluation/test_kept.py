"""An evaluation that is interrupted continues where it stood, to the same bits and calls."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from evaluation.test_masks import tiny
from integrations.test_huggingface import write
from support.commands import nelbo_fails, run_ok
from support.known_models import gaussian, replaced, text
from support.processes import launch
from support.runs import StoppedError, stopping
from support.tokens import seeded_model

import nelbo
from nelbo._utils.tensor_files import read_tensors
from nelbo.evaluation import mask_estimator, variate

TEXTS = [[0, 1, 2], [1, 1], [3, 1, 2, 0, 1], [2, 0, 1, 1]] * 6


@pytest.fixture
def small(monkeypatch):
    """Tasks of few texts."""
    monkeypatch.setattr(mask_estimator, "CALLED", 0)
    monkeypatch.setattr(mask_estimator, "FEWEST", 100)


@pytest.mark.parametrize("calls", [1, 9])
def test_it_continues_where_it_stood(tmp_path, small, calls):
    """After any number of network calls, with a surrogate and the order beside it."""
    model, path = tiny(4), tmp_path / "kept"
    options = {"calls": 32, "surrogate": tiny(4), "sampler": "greedy", "per_example": True}
    whole = nelbo.evaluate(model, TEXTS, **options, resume=tmp_path / "other")
    assert whole.nats == nelbo.evaluate(model, TEXTS, **options).nats
    hook = stopping(model, calls)
    with pytest.raises(StoppedError):
        nelbo.evaluate(model, TEXTS, **options, resume=path)
    hook.remove()
    made = []
    counter = model.network.register_forward_hook(lambda net, given, out: made.append(1))
    again = nelbo.evaluate(model, TEXTS, **options, resume=path)
    counter.remove()
    assert again.to_dict() == whole.to_dict()
    for name, array in again.to_arrays().items():
        np.testing.assert_array_equal(array, whole.to_arrays()[name])
    made_again = []
    counter = model.network.register_forward_hook(lambda net, given, out: made_again.append(1))
    third = nelbo.evaluate(model, TEXTS, **options, resume=path)  # all is known by now
    counter.remove()
    assert third.to_dict() == whole.to_dict() and len(made_again) < len(made)


OTHERS = {
    "real numbers, a pilot": (gaussian, 400, {"calls": 24}),
    "masks, 4 steps": (text, 400, {"calls": 8, "steps": 4, "per_example": True}),
    "a target error": (gaussian, 400, {"target_error": 0.05}),
    "without a pilot": (replaced, 120, {"calls": 6, "variates": True}),
    "importance": (text, 130, {"steps": 3, "importance_samples": 2}),
    "probability flow": (gaussian, 130, {"ode": True, "tolerance": 1e-3}),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_every_bound_continues(tmp_path, monkeypatch, name, share):
    """Any process, in steps or continuous time, by all estimators; also what a pilot found."""
    monkeypatch.setattr(variate, "MANY", variate.FEW)  # or all draws are computed together
    make, examples, options = OTHERS[name]
    known, path = make(), tmp_path / "kept"
    x, model = known.examples(examples), known.model
    made = []
    counter = model.network.register_forward_hook(lambda net, given, out: made.append(1))
    whole = nelbo.evaluate(model, x, **options)
    counter.remove()
    hook = stopping(model, int(share * len(made)))
    with pytest.raises(StoppedError):
        nelbo.evaluate(model, x, **options, resume=path)
    hook.remove()
    made_again = []
    counter = model.network.register_forward_hook(lambda net, given, out: made_again.append(1))
    again = nelbo.evaluate(model, x, **options, resume=path)
    counter.remove()
    assert again.to_dict() == whole.to_dict()
    assert len(made_again) < len(made) or share < 0.5
    with pytest.raises(ValueError, match="another evaluation: its seed is 0, and now 1"):
        nelbo.evaluate(model, x, **options, resume=path, seed=1)


# Imports no test, as those of language models take longer to import than this to run.
SHARED = """
import json, sys
import nelbo
from nelbo._utils.distributed import process_group
from nelbo.evaluation import mask_estimator
from support.runs import StoppedError, stopping
from support.tokens import seeded_model
mask_estimator.CALLED, mask_estimator.FEWEST = 0, 100
with process_group() as rank:
    model, texts = seeded_model(4), json.loads(sys.argv[1])
    options = {"calls": 32, "sampler": "greedy", "resume": sys.argv[2]}
    if sys.argv[3] == "stop":
        stopping(model, 6 + 3 * rank)
        try:
            nelbo.evaluate(model, texts, **options)
        except StoppedError:
            print("stopped")
    else:
        print(nelbo.evaluate(model, texts, **options).to_dict())
"""


@pytest.mark.multiprocess
def test_several_processes_continue(tmp_path, small):
    """Each keeps its own tasks; another number of processes, or one, goes on with all of them."""
    model, path = seeded_model(4), tmp_path / "kept"
    whole = nelbo.evaluate(model, TEXTS, calls=32, sampler="greedy").to_dict()
    command = ["-c", SHARED, json.dumps(TEXTS), str(path)]
    stopped = launch([*command, "stop"], 2)
    assert stopped[0].out == "stopped\n", stopped
    assert stopped[1].out == "stopped\n" or "continue with resume" in stopped[1].err, stopped
    assert path.exists() and (tmp_path / "kept.part1").exists()
    shutil.copytree(tmp_path, tmp_path / "copy")
    alone = nelbo.evaluate(
        model, TEXTS, calls=32, sampler="greedy", resume=tmp_path / "copy" / "kept"
    )
    assert alone.to_dict() == whole and not (tmp_path / "copy" / "kept.part1").exists()
    both = launch([*command, "go"], 2)
    assert [end.code for end in both] == [0, 0], both
    whole["in_order"]["processes"] = 2
    assert str(whole | {"processes": 2}) == both[0].out.strip() == both[1].out.strip()
    assert not (tmp_path / "kept.part1").exists()


def test_another_evaluation_is_refused(tmp_path):
    """Other options, seeds, data or weights than those of the file."""
    model, path = tiny(4), tmp_path / "kept"
    nelbo.evaluate(model, TEXTS[:4], calls=8, resume=path)
    for what, change in {
        "calls": lambda: nelbo.evaluate(model, TEXTS[:4], calls=9, resume=path),
        "seed": lambda: nelbo.evaluate(model, TEXTS[:4], calls=8, seed=1, resume=path),
        "data": lambda: nelbo.evaluate(model, TEXTS[:3], calls=8, resume=path),
        "model": lambda: nelbo.evaluate(tiny(5), TEXTS[:4], calls=8, resume=path),
    }.items():
        with pytest.raises(ValueError, match=f"another evaluation: its {what} is .*, and now"):
            change()
    with pytest.raises(ValueError, match=r"its steps is None .*, and now 2 "):
        nelbo.evaluate(model, TEXTS[:4], steps=2, calls=8, resume=path)
    with pytest.raises(ValueError, match="resume is for the bound of data"):
        nelbo.evaluate(model, TEXTS, steps=2, importance_samples=2, own_samples=2, resume=path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is truncated, damaged"):
        nelbo.evaluate(model, TEXTS[:4], calls=8, resume=path)


SCRIPT = """
import sys, torch
from nelbo.cli import main
from nelbo.evaluation import mask_estimator
from nelbo.integrations.token_network import TokenNetwork
mask_estimator.CALLED, mask_estimator.FEWEST = 0, 100
torch.set_num_threads(1)
before, seen = TokenNetwork.forward, [0]
def slow(self, *given):
    seen[0] += 1
    if seen[0] == 5:
        print("begun", flush=True)
        import time
        time.sleep(60)
    return before(self, *given)
TokenNetwork.forward = slow
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "reading",
    [{"shift": 1}, {"never": [0]}, {"block": 2}, {"time": "sigma"}, {"head": "score"}],
    ids=str,
)
def test_another_reading_of_the_same_weights_is_another_model(tmp_path, reading):
    """What a module's ids, places and time mean decides the number."""
    model, path, texts = tiny(4), tmp_path / "kept", [[3, 1, 2], [1, 1]]
    assert model.hash() == tiny(4).hash() != tiny(4, **reading).hash()
    nelbo.evaluate(model, texts, calls=8, resume=path)
    with pytest.raises(ValueError, match="another evaluation: its model is"):
        nelbo.evaluate(tiny(4, **reading), texts, calls=8, resume=path)


def test_a_time_input_is_known_by_its_values():
    """All lambdas have one name; the same function has one hash, however it is written."""
    given = [lambda alpha: alpha, lambda alpha: alpha / 2, lambda alpha: alpha * 1.0, "masked"]
    one, other, again, named = [tiny(4, time=time).hash() for time in given]
    assert one == again and len({one, other, named}) == 3
    assert named == tiny(4, time=lambda alpha: 1 - alpha).hash()


@pytest.mark.slow  # another process imports all
def test_the_command_after_sigterm(tmp_path, capsys, small):
    """`--resume` writes what was measured when SIGTERM comes; `--save` is then the same too."""
    home = write(tmp_path / "m")
    (tmp_path / "a.txt").write_text("abcdab\nab\nbbA\n" * 4)
    command = ["evaluate", f"hf:{home}", "--data", tmp_path / "a.txt", "--lines", "--calls", 8]
    command += ["--sampler", "margin", "--json"]
    kept, save = tmp_path / "kept", tmp_path / "a.npz"
    words = [*map(str, command), "--resume", str(kept)]
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *words], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "begun\n"
        time.sleep(0.1)
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait(30) == 128 + signal.SIGTERM
    tensors, about = read_tensors(kept, hashed=True)
    known = sum(1 for name in tensors if name.endswith("calls"))
    assert known >= 1 and about["seed"] == "0"
    run_ok(*command, "--save", save, "--resume", tmp_path / "other")
    whole, arrays = json.loads(capsys.readouterr().out), dict(np.load(save))
    kept_before = kept.read_bytes()
    line = nelbo_fails(capsys, *command, "--resume", kept, "--seed", 1)
    assert "its seed is 0, and now 1" in line and kept.read_bytes() == kept_before
    run_ok(*command, "--resume", kept)  # per example was not asked for, so it is another
    assert json.loads(capsys.readouterr().out)["model_hash"] == whole["model_hash"]
    run_ok(*command, "--resume", kept)
    again = json.loads(capsys.readouterr().out)
    run_ok(*command)
    assert again == json.loads(capsys.readouterr().out)
    assert {"nats_per_token", "token_nats", "token_standard_error"} <= arrays.keys()
    assert arrays["token_nats"].shape == (12, 8)
