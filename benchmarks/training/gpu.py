"""Everything that is said of a GPU, measured in one run of at most ten minutes.

    pip install 'nelbo[bench,codec]'
    python benchmarks/training/gpu.py [--minutes 10] [--json out.json]
    python benchmarks/training/gpu.py --device cpu --small  # proves the script, not the speed

Each check prints its numbers as soon as it has them; one that fails is named with its error, and
the others go on. The last one trains for the time that is left.

    step         a training step of the 32x32 U-Net, bf16, compiled, beside diffusers' loop with
                 the same network (`gpu_step.py`): utilisation of the bf16 peak (goal 40 %),
                 images/s (goal: more than theirs), peak memory
    evaluate     network calls per second of an evaluation with and without control variates (goal:
                 they take at most 10 % of the time)
    tokens       tokens per second of the masked bound at a vocabulary of 50 368, against the same
                 network with a bare cross-entropy (`tokens.py`; goal 0.9)
    equal        the bound of one run on the CPU and on the GPU (goal: equal to 1e-6 nats)
    repeat       two trainings with --deterministic end with the same weights, bit by bit
    resume       so does one that is interrupted and resumed
    shard        a network sharded among one process trains as without, to rounding
    container    a file coded on the CPU is decoded on the GPU exactly, or refused in one sentence
    train        images of the shape and number of CIFAR-10, made of noise at several scales: the
                 validation bound over time
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import nelbo
from nelbo.cli import main as main_of_nelbo
from nelbo.data.schema import Schema
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.times import stratified
from nelbo.models.build import build
from nelbo.training.objective import Objective
from nelbo.training.parallel import shard as divide_network
from nelbo.training.presets import configure

BENCHMARKS = Path(__file__).resolve().parent.parent
Numbers = dict[str, float | str | bool | list]


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts


class Machine:
    """The device, the sizes and a scratch folder.

    Args:
        device: cuda, or cpu for a proof of the script.
        small: use networks and data that a CPU takes seconds for.
        folder: for runs and files.
        end: time at which the last check must end, of `time.monotonic`.
    """

    def __init__(self, device: str, small: bool, folder: Path, end: float) -> None:
        self.device, self.small, self.folder, self.end = device, small, folder, end
        self.data = "digits"
        if small:
            self.data = str(folder / "few.npy")
            x = np.random.default_rng(0).integers(0, 17, (60, 1, 8, 8))
            np.save(self.data, x.astype(np.uint8))

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - time.monotonic()

    def wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()

    def program(self, name: str, *options: str) -> dict:
        """Run another benchmark and return the numbers that it writes as JSON."""
        path = self.folder / f"{Path(name).stem}.json"
        small = ["--small"] if self.small else []
        self.start(
            str(BENCHMARKS / name), "--device", self.device, *small, *options, "--json", str(path)
        )
        return json.loads(path.read_text())

    def nelbo(self, *arguments: str) -> str:
        """Run a command of nelbo in this process and return what it prints."""
        out, err = io.StringIO(), io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                main_of_nelbo(list(arguments))
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(err.getvalue().strip()) from None
        return out.getvalue()

    def start(self, *arguments: str) -> str:
        """Run Python and return its standard output; raise with its message if it fails."""
        found = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=max(30.0, self.left),
        )
        if found.returncode:
            raise RuntimeError((found.stderr or found.stdout).strip()[-2000:])
        return found.stdout

    def train(self, name: str, *options: str) -> Path:
        """Train a small network on digits; return the folder of the run."""
        run = self.folder / name
        self.nelbo("train", self.data, "--out", str(run), *self.training, *options)
        return run

    @property
    def training(self) -> list[str]:
        steps = "12" if self.small else "200"
        sizes = ["--width", "8", "--depth", "1", "--batch", "16"] if self.small else []
        return [
            *("--steps", steps, "--evaluate-every", "6" if self.small else "100", *sizes),
            *("--device", self.device, "--deterministic"),
        ]


def step(on: Machine) -> Numbers:
    found = on.program("training/gpu_step.py")
    ours, theirs = found["nelbo, their network"], found["diffusers"]
    return {
        **{
            f"{loop}: {key}": v
            for loop in found
            if isinstance(found[loop], dict)
            for key, v in found[loop].items()
            if key in ("images_per_second", "utilisation", "peak_memory_gib")
        },
        "images/s over diffusers', same network": (
            ours["images_per_second"] / theirs["images_per_second"]
        ),
    }


def evaluate(on: Machine) -> Numbers:
    levels, shape = 256, (3, 32, 32)
    schema, count = Schema("levels", shape, levels), 4 if on.small else 512
    config, _ = configure(schema, 50_000, network="unet", width=16 if on.small else 256)
    torch.manual_seed(0)
    x = torch.randint(0, levels, (count, *shape), dtype=torch.uint8)
    model = build(config, schema)
    model.fit_statistics(x)
    model.to(on.device).eval()
    calls, found = 4 if on.small else 24, {}
    for name, variates in (("without variates", False), ("with variates", True)):
        nelbo.evaluate(model, x[:2], calls=2, variates=False)  # kernels are chosen
        on.wait()
        begun = time.perf_counter()
        result = nelbo.evaluate(model, x, calls=calls, variates=variates)
        on.wait()
        rate = result.calls_per_example * count / (time.perf_counter() - begun)
        found[f"network calls per second, {name}"] = rate
    slow, quick = found.values()
    return {**found, "share of the time that variates take": 1 - quick / slow}


def tokens(on: Machine) -> Numbers:
    size = () if on.small else ("--vocabulary", "50368", "--calls", "24")
    found = on.program("evaluation/tokens.py", *size)
    numbers: Numbers = {}
    for kind in ("negligible", "real"):
        ours, loop = (found[f"{kind} {way}"]["tokens_per_second"] for way in ("ours", "loop"))
        numbers[f"tokens per second, {kind} network"] = ours
        numbers[f"over the bare loop, {kind} network"] = ours / loop
    return numbers


def equal(on: Machine) -> Numbers:
    found = {}
    for device in ("cpu", on.device):
        run = nelbo.load(on.folder / "first")
        batch, _ = run.batch()
        found[device] = nelbo.evaluate(run.model.to(device), batch, calls=24).nats
    return {"CPU, nats": found["cpu"], "difference, nats": abs(found[on.device] - found["cpu"])}


def weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def repeat(on: Machine) -> Numbers:
    first, again = on.train("first"), on.train("again")
    return {"same bits": weights(first) == weights(again)}


def resume(on: Machine) -> Numbers:
    run = on.folder / "interrupted"
    arguments = ["train", on.data, "--out", str(run), *on.training]
    process = subprocess.Popen(
        [sys.executable, "-m", "nelbo", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    on.nelbo("train", "--resume", str(run), "--device", on.device)
    return {"same bits": weights(run) == weights(on.folder / "first")}


def shard(on: Machine) -> Numbers:
    # the command refuses --shard on one process, as it divides nothing; its mechanism runs
    schema = Schema("levels", (1, 8, 8), 17)
    x = torch.randint(0, 17, (64, 1, 8, 8), device=on.device)
    losses = []
    cuda = on.device.startswith("cuda")
    store = dist.HashStore()
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=0, world_size=1)
    try:
        for divide in (False, True):
            torch.manual_seed(0)
            model = build(configure(schema, 1000)[0], schema)
            model.fit_statistics(x.cpu())
            model.to(on.device).train()
            model.dtype = torch.float32
            if divide:
                divide_network(model, torch.device(on.device))
            optimizer, objective = torch.optim.AdamW(model.parameters(), lr=1e-3), Objective()
            for _ in range(3):
                u = stratified(len(x)).flatten().to(on.device)
                loss = objective(model, Batch(x), u).loss
                optimizer.zero_grad()
                (loss / model.dims).backward()
                optimizer.step()
            losses.append(loss.item() / model.dims)
    finally:
        dist.destroy_process_group()
    return {
        "loss, nats per dimension": losses[0],
        "difference when sharded": losses[1] - losses[0],
    }


def container(on: Machine) -> Numbers:
    run, data = str(on.folder / "first"), on.folder / "images.npy"
    x = nelbo.load(run).examples()
    np.save(data, x[: 8 if on.small else 64].numpy())
    packed, restored = on.folder / "images.nlb", on.folder / "restored.npy"
    on.nelbo("compress", run, str(data), "--out", str(packed), "--steps", "4", "--grid", "uniform")
    try:
        on.nelbo(*("decompress", run, str(packed), "--out", str(restored), "--device", on.device))
    except RuntimeError as error:
        return {"refused": str(error).splitlines()[-1]}
    return {"exact": bool((np.load(restored) == np.load(data)).all())}


def train(on: Machine) -> Numbers:
    generator = np.random.default_rng(0)
    count = 64 if on.small else 50_000
    x = np.zeros((count, 3, 32, 32), dtype=np.float32)
    for side in (2, 4, 8, 16, 32):
        coarse = generator.standard_normal((count, 3, side, side), dtype=np.float32)
        x += coarse.repeat(32 // side, 2).repeat(32 // side, 3) * (2 / side) ** 0.5
    path, run = on.folder / "cifar_shaped.npy", on.folder / "cifar_shaped"
    np.save(path, np.clip(128 + 48 * x, 0, 255).astype(np.uint8))
    sizes = ["--width", "16", "--batch", "4", "--steps", "2", "--evaluate-every", "1"]
    full = [
        *("--width", "256", "--batch", "256", "--precision", "bf16", "--compile"),
        *("--minutes", f"{max(0.5, (on.left - 60) / 60):.1f}", "--evaluate-every", "100"),
    ]
    on.nelbo(
        *("train", str(path), "--out", str(run), "--device", on.device, "--network", "unet"),
        *(sizes if on.small else full),
    )
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"curve": [e for e in events if "step" in e]}


#: in the order in which they run: `equal`, `resume` and `container` use the run of `repeat`
CHECKS: dict[str, Callable[[Machine], Numbers]] = {
    f.__name__: f for f in (repeat, equal, resume, shard, container, evaluate, tokens, step, train)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that a CPU takes seconds for")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", nargs="*", default=list(CHECKS), choices=list(CHECKS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    cuda = torch.device(given.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("there is no CUDA device; give --device cpu --small to prove the script")
    name = torch.cuda.get_device_name() if cuda else "CPU"
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    found: dict[str, Numbers] = {}
    with tempfile.TemporaryDirectory() as folder:
        end = time.monotonic() + 60 * given.minutes
        on = Machine(given.device, given.small, Path(folder), end)
        for check in given.only:
            begun = time.monotonic()
            try:
                found[check] = CHECKS[check](on)
            except Exception as error:
                traceback.print_exc()
                found[check] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"{check} ({time.monotonic() - begun:.0f} s)")
            for key, value in found[check].items():
                shown = f"{value:.6g}" if isinstance(value, float) else str(value)
                shown = (
                    f"{len(value)} events, to {value[-1]}" if isinstance(value, list) else shown
                )
                print(f"  {key:52}{shown}", flush=True)
            if given.json:
                given.json.write_text(json.dumps({"device": name, **found}, indent=2) + "\n")
    failed = [check for check, numbers in found.items() if "failed" in numbers]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
