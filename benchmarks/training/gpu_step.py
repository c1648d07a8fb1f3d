"""A training step of a U-Net at 32x32 on a GPU: images/s, utilisation of the peak, memory.

    pip install 'nelbo[diffusers]'
    python benchmarks/training/gpu_step.py [--batch 256] [--steps 50] [--peak-tflops 989]
        [--json out.json]
    python benchmarks/training/gpu_step.py --device cpu --small  # proves the code, not the speed

Three loops in turn, each in bf16 by autocast with a compiled network, on colour images of 256
levels made of noise, since time does not depend on what is in them:

    nelbo                   whole steps of `nelbo train` with its U-Net: batch from memory, bound,
                            reconstruction, clipped gradient, optimiser of the preset, averaged
                            weights
    nelbo, their network    the bound of the UNet2DModel below, clipped gradient, AdamW
    diffusers               their example of unconditional training: `DDPMScheduler.add_noise`, the
                            network, squared error of the noise, clipped gradient, AdamW

The UNet2DModel is that of google/ddpm-cifar10-32, 35.7 million parameters and 37.3 GFLOP for each
image; at --width 256 nelbo's U-Net takes about as much.

Method of the utilisation: the FLOPs of one image through the network, forward and backward, are
counted by torch.utils.flop_counter on the network itself, not compiled, attention as two matrix
products: 2 for each multiply-add of convolutions and matrix products, and nothing for all else.
Times the images that went through the network in a step, counted there,
over the seconds of the step and the dense bf16 peak that the maker of the device states. What is
computed besides the network, loss, optimiser and averages, counts as time and not as work.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss
from torch.utils.flop_counter import FlopCounterMode

from nelbo.data import Dataset, Schema
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.gaussian import Levels
from nelbo.diffusion.model import counting
from nelbo.diffusion.schedules import Linear
from nelbo.diffusion.times import stratified
from nelbo.integrations import wrap
from nelbo.integrations.diffusers_network import Plain
from nelbo.training.objective import Objective
from nelbo.training.presets import configure
from nelbo.training.trainer import Trainer

SHAPE, LEVELS, T = (3, 32, 32), 256, 1000
WARMUP = 5  # steps that are not timed, after the one that compiles
#: dense bf16, 10^12 FLOP/s, by the name that torch gives the device, the longest that fits
PEAKS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.0,
    "MI300X": 1307.0,
}


class Loop(NamedTuple):
    """A training step, the network in it, and what it is called with for one image."""

    step: Callable[[], None]
    network: nn.Module
    inputs: tuple[Tensor, ...]


def their_network(given: argparse.Namespace) -> Plain:
    torch.manual_seed(0)
    blocks = (32, 64) if given.small else (128, 256, 256, 256)
    rest = len(blocks) - 2
    network = UNet2DModel(
        sample_size=SHAPE[-1],
        layers_per_block=1 if given.small else 2,
        block_out_channels=blocks,
        down_block_types=("DownBlock2D", "AttnDownBlock2D") + ("DownBlock2D",) * rest,
        up_block_types=("UpBlock2D",) * rest + ("AttnUpBlock2D", "UpBlock2D"),
    )
    return Plain(network).to(given.device).train()


def images(count: int) -> Tensor:
    return torch.randint(0, LEVELS, (count, *SHAPE), dtype=torch.uint8)


def nelbo(given: argparse.Namespace) -> Loop:
    schema, x = Schema("levels", SHAPE, LEVELS), images(max(1024, 2 * given.batch))
    options = {"batch": given.batch, "width": given.width, "precision": "bf16"}
    configured = configure(schema, 50_000, **options, network="unet")
    dataset = Dataset("memory", schema, {"train": x, "validation": x[:50]})
    learner = Trainer(*configured, dataset, given.device)
    model = learner.model
    z = torch.zeros(1, *SHAPE, device=given.device)
    told = torch.zeros(1, 1, device=given.device)
    return Loop(learner.step, model.network, (model.process.features(z), told[0], told))


def theirs_with(
    given: argparse.Namespace, network: Plain, loss_of: Callable[[Tensor], Tensor]
) -> Loop:
    """AdamW on a loss of images (B, C, H, W) of levels."""
    x, on = images(max(1024, 2 * given.batch)), given.device
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step() -> None:
        batch = x[torch.randint(len(x), (given.batch,))].to(on).long()
        optimizer.zero_grad()
        loss_of(batch).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    one = torch.zeros(1, *SHAPE, device=on), torch.zeros(1, device=on)
    return Loop(step, network, one)


def diffusers(given: argparse.Namespace) -> Loop:
    network, scheduler, on = their_network(given), DDPMScheduler(), given.device

    def loss_of(x: Tensor) -> Tensor:
        clean = x / ((LEVELS - 1) / 2) - 1
        noise = torch.randn(clean.shape, device=on)
        t = torch.randint(len(scheduler), (len(x),), device=on)
        with torch.autocast(torch.device(on).type, torch.bfloat16):
            output = network(scheduler.add_noise(clean, noise, t), t)
        return mse_loss(output.float(), noise)

    return theirs_with(given, network, loss_of)


def nelbo_their_network(given: argparse.Namespace) -> Loop:
    network, low, high = their_network(given), -9.0, 9.0
    model = wrap(
        network,
        SHAPE,
        predicts="noise",
        schedule=Linear(low, high),
        times=lambda gamma: T * (gamma - low) / (high - low),
        scaling=Levels(LEVELS),
    )
    model.to(given.device).train()
    model.dtype, model.precision, objective = torch.float32, torch.bfloat16, Objective()

    def loss_of(x: Tensor) -> Tensor:
        u = stratified(len(x)).flatten().to(x.device)
        return objective(model, Batch(x), u).loss / (model.dims * math.log(2))

    return theirs_with(given, network, loss_of)


LOOPS = {"nelbo": nelbo, "nelbo, their network": nelbo_their_network, "diffusers": diffusers}


def flops(loop: Loop) -> int:
    """Return the operations of one image through the network and back."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loop.network(*loop.inputs).sum().backward()
    loop.network.zero_grad()
    return int(counter.get_total_flops())


def measure(given: argparse.Namespace, loop: Loop, peak: float | None) -> dict[str, float]:
    cuda = torch.device(given.device).type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    work = flops(loop)
    with counting(loop.network) as calls:
        loop.step()
    if given.compile:
        loop.network.compile()  # as `nelbo train --compile` does
    for _ in range(1 + (1 if given.small else WARMUP)):
        loop.step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(given.steps):
        wait()
        begun = time.perf_counter()
        loop.step()
        wait()
        seconds.append(time.perf_counter() - begun)
    middle, rows = statistics.median(seconds), calls.forward
    found = {
        "parameters": sum(p.numel() for p in loop.network.parameters()),
        "gflop_per_image": work / 1e9,
        "network_images_per_step": rows,
        "images_per_second": given.batch / middle,
        "tflops_per_second": work * rows / middle / 1e12,
    }
    if peak:
        found["utilisation"] = found["tflops_per_second"] / peak
    if cuda:
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=None, help="256, or 4 with --small")
    parser.add_argument("--steps", type=int, default=None, help="50, or 3 with --small")
    parser.add_argument("--width", type=int, default=None, help="256, or 16 with --small")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--small", action="store_true", help="small networks, not compiled")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of the device")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    small = {"batch": 4, "steps": 3, "width": 16, "compile": False}
    for name, full in {"batch": 256, "steps": 50, "width": 256, "compile": True}.items():
        if getattr(given, name) is None:
            setattr(given, name, small[name] if given.small else full)
    name, peak = given.device, given.peak_tflops
    if torch.device(given.device).type == "cuda":
        name = torch.cuda.get_device_name()
        fits = [known for known in PEAKS if known in name]
        peak = peak or (PEAKS[max(fits, key=len)] if fits else None)
    results: dict[str, dict[str, float]] = {}
    print(
        f"{name}, batch {given.batch}, bf16, {'' if given.compile else 'not '}compiled; peak:",
        end="",
    )
    print(f" {peak:g} TFLOP/s dense bf16" if peak else " not known, so no utilisation")
    for loop, make in LOOPS.items():
        results[loop] = found = measure(given, make(given), peak)
        print(loop)
        for key, value in found.items():
            print(f"  {key.replace('_', ' '):26}{value:14.4g}")
    if given.json:
        about = {"device": name, "peak_tflops": peak, "torch": torch.__version__, **results}
        given.json.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
