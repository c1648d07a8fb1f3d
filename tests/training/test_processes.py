"""Training on two processes is the training on one; what ends one of them ends both."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.processes import launch

from nelbo._utils import tensor_files
from nelbo.runs import config as run_config
from nelbo.runs.loading import load as load_run
from nelbo.runs.train import resume, train

pytestmark = pytest.mark.multiprocess

SMALL = {"steps": 4, "batch": 11, "width": 16, "evaluate_every": 2, "dropout": 0.3, "lr": 0.01}
LEARNED = {"schedule": "learned-ends", "times": "importance", "optimizer": "muon", "warmup": 1}
SHARDED = {"shard": True, "checkpoint_activations": True, "accumulate": 3}

SCRIPT = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from nelbo.training import trainer
from nelbo._utils.signals import Interrupted
from nelbo._utils.distributed import process_group
from nelbo.runs.train import resume, train
from training.test_processes import LEARNED, SHARDED, SMALL
folder = sys.argv[1]
def numbers(tensors):  # how many this process holds of them, and how many there are
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return [sum(t.numel() for t in some) for some in (local, tensors)]
def held(self):  # of weights, gradients, averages and moments
    own, averaged = list(self.model.network.parameters()), list(self.average.network.parameters())
    moments = [m for p in own for m in self.optimizer.state[p].values() if m.ndim]
    gradients = [p.grad for p in own if p.grad is not None]  # those that Muon has not used up
    return [numbers(some) for some in (own, gradients, averaged, moments)]
with process_group() as rank:
    train(f"{folder}/x.npy", f"{folder}/two", **SMALL, **LEARNED)
    step = trainer.Trainer.step
    def shown(self):
        step(self)
        if self.at.step == 4:
            print(json.dumps(held(self)))
    trainer.Trainer.step = shown
    train(f"{folder}/x.npy", f"{folder}/sharded", **SMALL, **LEARNED, **SHARDED)
    def interrupted(self):
        step(self)
        if self.at.step == 3 and rank == 1:  # one hears of it, both stop
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # torchrun passes on what came already
    trainer.Trainer.step = interrupted
    for name, options in (("stopped", {}), ("sharded-stopped", SHARDED)):
        try:
            train(f"{folder}/x.npy", f"{folder}/{name}", **SMALL, **LEARNED, **options)
        except Interrupted:
            print("stopped")
    trainer.Trainer.step = step
    resume(f"{folder}/stopped")
    resume(f"{folder}/sharded-stopped")
    # what one began
    resume(f"{folder}/half", steps=4)
    resume(f"{folder}/sharded-half", steps=4, shard=True)
    try:
        train(f"{folder}/x.npy", f"{folder}/two", minutes=1, **SMALL)
    except (ValueError, SystemExit) as error:
        print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the runs of one and of two processes."""
    folder = tmp_path_factory.mktemp("runs")
    np.save(folder / "x.npy", np.random.default_rng(0).integers(0, 5, (80, 4)))
    source = str(folder / "x.npy")
    train(source, folder / "one", **SMALL, **LEARNED)
    for name in ("half", "sharded-half"):
        train(source, folder / name, **SMALL | {"steps": 2, "seed": 0}, **LEARNED)
    both = launch(["-c", SCRIPT, str(folder)], 2)
    assert all(ended.code == 0 for ended in both), both
    return folder, [ended.out.splitlines() for ended in both]


def state(run):
    tensors, about = tensor_files.read_tensors(run / run_config.STATE, hashed=True)
    del about["progress"]["seconds"]
    return tensors, about


def events(run):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in run_config.read_metrics(run)]


@pytest.mark.parametrize("kind", ["two", "sharded"])
def test_the_loss_curve_of_two_processes_is_that_of_one(runs, kind):
    """A batch of 11, dropout, learned γ and times, orthogonal steps: to float32's rounding."""
    folder, _ = runs
    one, two = events(folder / "one"), events(folder / kind)
    assert len(one) == len(two) == 2
    for a, b in zip(one, two, strict=True):
        for key in ("train", "validation", "validation_standard_error", "lr"):
            assert a[key] == pytest.approx(b[key], rel=2e-6)
    (alone, _), (shared, _) = state(folder / "one"), state(folder / kind)
    assert alone.keys() == shared.keys()
    for name in alone:
        torch.testing.assert_close(alone[name], shared[name], rtol=1e-3, atol=2e-5)
    options = SHARDED if kind == "sharded" else {}
    configured = replace(load_run(folder / "one").config.train, **options)
    assert load_run(folder / kind).config.train == configured


def test_each_process_holds_its_share_of_what_is_sharded(runs):
    """Weights, gradients, averages and moments; a row more where they are odd."""
    for mine, all_of_it in [pair for said in runs[1] for pair in json.loads(said[0])]:
        assert mine == pytest.approx(all_of_it / 2, rel=0.05)


@pytest.mark.parametrize(
    ("whole", "stopped"), [("two", "stopped"), ("sharded", "sharded-stopped")]
)
def test_two_processes_that_were_stopped_continue_exactly(runs, whole, stopped):
    """SIGTERM on one of them ends both after the same step, with the run saved."""
    folder, said = runs
    assert said[0][1:3] == said[1][1:3] == ["stopped"] * 2
    (left, at), (right, then) = state(folder / whole), state(folder / stopped)
    assert at == then and events(folder / whole) == events(folder / stopped)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(("half", "whole"), [("half", "two"), ("sharded-half", "sharded")])
def test_a_run_continues_on_another_number_of_processes(runs, tmp_path, half, whole):
    """The curve goes on where half was trained on one process, or all on two; sharded or not."""
    folder, _ = runs
    assert [event["step"] for event in events(folder / half)] == [2, 4]
    continued = shutil.copytree(folder / whole, tmp_path / whole)
    assert resume(continued, steps=6).metrics[-1]["step"] == 6


def test_halves_of_a_curve_meet_whether_they_are_sharded_or_not(runs):
    folder, _ = runs
    one, two = events(folder / "half"), events(folder / "sharded-half")
    assert [e["train"] for e in one] == pytest.approx([e["train"] for e in two], rel=2e-6)
    assert run_config.read_config(folder / "sharded-half").train.shard


def test_one_process_has_nothing_to_shard(runs, tmp_path):
    with pytest.raises(ValueError, match="shard divides a network among processes"):
        train(str(runs[0] / "x.npy"), tmp_path / "run", shard=True, **SMALL)
    assert not (tmp_path / "run").exists()


def test_what_the_first_process_refuses_is_refused_once(runs):
    _, said = runs
    assert "two exists and is a run" in said[0][-1]
    assert said[1][-1] == "SystemExit 2"


def test_accumulated_parts_are_the_batch_too(runs):
    folder, _ = runs
    run = train(str(folder / "x.npy"), folder / "parts", accumulate=3, **SMALL, **LEARNED)
    one, parts = events(folder / "one"), events(run.path)
    assert [e["train"] for e in one] == pytest.approx([e["train"] for e in parts], rel=2e-6)


DYING = """
import os, sys
from nelbo.training import trainer
step = trainer.Trainer.step
def die(self):
    if self.at.step == 2 and os.environ["RANK"] == "1":
        {how}
    step(self)
trainer.Trainer.step = die
from nelbo.cli import main
run = ["--steps", "50", "--evaluate-every", "1", "--out", *sys.argv[2:]]
main(["train", sys.argv[1], *run])
"""


@pytest.mark.parametrize(
    ("how", "wait", "options"),
    [
        ("os._exit(9)", "100", ["--shard"]),
        ("import time; time.sleep(18); os._exit(9)", "10", []),
    ],
    ids=["dies", "hangs"],
)
def test_a_process_that_dies_or_hangs_ends_the_others(runs, tmp_path, how, wait, options):
    """In one sentence, within the time to wait, and the run is there to be continued.

    With a sharded network that is found out within it, else after the backward pass.
    """
    folder, _ = runs
    command = ["-c", DYING.format(how=how), str(folder / "x.npy"), str(tmp_path / "run"), *options]
    first, second = launch(command, 2, NELBO_TIMEOUT=wait)
    assert first.code == 2 and second.code == 9
    last = first.err.strip().splitlines()[-1]
    assert last.startswith("nelbo: process 0 of 2: another one ended or did not answer")
    assert "Traceback" not in first.err
    assert json.loads((tmp_path / "run" / run_config.CONFIG).read_text())["train"]["steps"] == 50
    assert load_run(tmp_path / "run").metrics[-1]["step"] == 2


SHARED = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from nelbo.runs.loading import load as load_run
from nelbo.sampling import samplers
from nelbo._utils.distributed import gather, process_group
from nelbo.codec.files import compress_file, decompress_file
from nelbo.diffusion.times import TimeGrid
from nelbo.evaluation.grid_search import best_grid
from nelbo.diffusion.model import counting
from nelbo.sampling.smc import conditional
from nelbo.evaluation.per_dimension import by_dimension
from nelbo.evaluation.anomaly_scores import Scorer
from nelbo.evaluation.probability_flow import evaluate_flow
from nelbo.evaluation.importance_bound import evaluate_importance
from support.known_models import levels
source, folder, out = sys.argv[1:]
with process_group() as rank:
    run = load_run(folder)
    x, grid = run.examples(), TimeGrid.uniform(3)
    found = [samplers.ancestral(run.model, count, grid, seed=2) for count in (1, 5)]
    known = torch.tensor([True, False, True, False])
    found.append(samplers.complete(run.model, x[:5].long(), known, grid, seed=3, rounds=2))
    found.append(samplers.probability_flow(run.model, 5, grid, seed=2))
    found.append(Scorer("bound", run.config.schema, run.model, x, calls=8)(x[:7]).nats)
    found += by_dimension(run.model, x[:7], grid)[0]
    file = Path(out) / "x.nlb"
    compress_file(run.model, run.config.schema, source, file, lambda: grid, block=20)
    decompress_file(run.model, run.config.schema, file, Path(out) / "x.npy")
    x = x.repeat(9, 1)[:70].long()  # more than a block, and no whole number of them
    with counting(run.model.network) as calls:
        exact = [best_grid(run.model, x, 3).times.tolist()]
        some = known.expand(70, 4)
        exact.append(conditional(run.model, x, some, grid, particles=3).tolist())
    exact.append(sum(gather(calls.forward)))
    for tight in (
        evaluate_importance(run.model, x, times=grid, samples=3, replicates=2),
        # of another model, for the solver does not settle that of the run
        evaluate_flow(levels().model, x[:, :2] % 4, tolerance=0.05),
    ):
        exact.append([tight.to_dict() | {"processes": None}, tight.per_example.tolist()])
    if rank == 0:
        found = [exact, [v.tolist() for v in found]]
        (Path(out) / "found.json").write_text(json.dumps(found))
"""


def test_what_uses_a_run_gives_on_two_processes_what_it_gives_on_one(runs, tmp_path):
    """Samples, completions, scores and costs to rounding; what is seeded in blocks, a compressed
    file and what it held to the bit, with as many calls of the network."""
    pytest.importorskip("constriction")
    folder, _ = runs
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        arguments = [str(folder / "x.npy"), str(folder / "one"), str(out)]
        for ended in launch(["-c", SHARED, *arguments], processes):
            assert ended.code == 0, ended.err
    one, two = (json.loads((tmp_path / n / "found.json").read_text()) for n in ("1", "2"))
    assert one[0] == two[0]
    for a, b in zip(one[1], two[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert (tmp_path / "1" / "x.nlb").read_bytes() == (tmp_path / "2" / "x.nlb").read_bytes()
    assert np.array_equal(np.load(tmp_path / "2" / "x.npy"), np.load(folder / "x.npy"))


COMMANDS = """
import json, sys
from contextlib import nullcontext
import torch
torch.set_num_threads(1)
from nelbo._utils import distributed
from nelbo.cli import main
with distributed.process_group() as rank:
    distributed.process_group = lambda: nullcontext(rank)  # once for all commands
    for command in json.loads(sys.argv[1]):
        try:
            main(command)
        except SystemExit as ended:
            print("exit", ended.code)
        distributed.main_process_first(lambda: None)  # what one wrote, the next command reads
"""


def test_commands_write_and_say_once_on_two_processes(runs, tmp_path):
    """One process speaks to the user and writes to the disk, and the other does not."""
    pytest.importorskip("constriction")
    pl = pytest.importorskip("polars")
    frame = pl.DataFrame({"a": [0.1 * i for i in range(70)], "b": ["u", "v"] * 35})
    frame.write_csv(tmp_path / "t.csv")
    small = {"steps": 2, "batch": 8, "width": 8, "evaluate_every": 2}
    train(str(tmp_path / "t.csv"), tmp_path / "table", **small)
    holes = frame.with_columns(pl.when(pl.int_range(pl.len()) % 2 == 0).then("b").alias("b"))
    holes.write_csv(tmp_path / "holes.csv")
    run, packed = str(runs[0] / "one"), str(tmp_path / "x.nlb")
    steps = ["--steps", "2", "--grid", "uniform"]
    commands = [
        ["compress", run, str(runs[0] / "x.npy"), "--out", packed, *steps, "--block", "20"],
        ["decompress", run, packed, "--out", str(tmp_path / "x.npy")],
        ["evaluate", run, *steps, "--importance-samples", "2", "--json", "--data"],
        ["sample", str(tmp_path / "table"), "--impute", str(tmp_path / "holes.csv")],
        ["inspect", packed],
    ]
    commands[2].append(f"file://{runs[0]}/x.npy")  # one of them copies it
    commands[3] += [*steps, "--particles", "2", "--out", str(tmp_path / "whole.csv")]
    cache = str(tmp_path / "cache")
    first, second = launch(["-c", COMMANDS, json.dumps(commands)], 2, NELBO_CACHE=cache)
    assert first.out.count("exit 0") == 4 and "80 of 80 examples in" in first.err
    assert "copy file://" in first.err and "70 rows in" in first.err
    assert '"processes": 2' in first.out
    assert pl.read_csv(tmp_path / "whole.csv")["b"].null_count() == 0
    assert second.out.split() == ["exit", "0"] * 4 + ["exit", "2"]
    said = second.err.strip()
    assert said == "nelbo: inspect runs in one process, not in 2; start it without torchrun"


def test_each_process_does_its_part_of_the_work(runs):
    """Else two were no quicker than one."""
    script = """
from nelbo._utils import distributed
from nelbo._utils import batch_rng
from nelbo._utils.distributed import process_group
done = []
with process_group() as rank:
    squares = distributed.map_across_processes(5, lambda i: done.append(i) or i * i)
    assert squares == [0, 1, 4, 9, 16]
    print(done, batch_rng.local_shard(5).rows.tolist(), len(batch_rng.local_shard(1)))
"""
    said = [ended.out.strip() for ended in launch(["-c", script], 2)]
    assert said == ["[0, 2, 4] [0, 2, 4] 1", "[1, 3] [1, 3] 1"]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed on Linux")
def test_no_thread_of_the_group_outlives_it():
    """One that did would abort the end of Python, whenever it then let go of a tensor."""
    script = """
import sys
from pathlib import Path
from nelbo._utils import distributed
for name in [name for name in sys.modules if name.startswith("torch.distributed.nn")]:
    del sys.modules[name]  # as in a new process
with distributed.process_group():
    import torch.distributed.nn  # an optimiser does, by the compiler
    distributed.gather(0)
tasks = Path("/proc/self/task").glob("*/comm")
print([name for name in (task.read_text().strip() for task in tasks) if "gloo" in name])
"""
    assert [ended.out.strip() for ended in launch(["-c", script], 2)] == ["[]", "[]"]
