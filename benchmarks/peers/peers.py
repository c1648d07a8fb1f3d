"""nelbo against its peers: cost of a training step, and the posterior that all of them compute.

    pip install 'nelbo[bench]'
    python benchmarks/peers/peers.py [DATA] [--rounds 30] [--batch 16] [--threads 1]
        [--json out.json]

Training: one UNet2DModel on the same images, in turn, in one process. diffusers' step is that of
its own example of unconditional training: `DDPMScheduler.add_noise`, the network, mean squared
error of the noise, clipped gradient, AdamW. nelbo's is the bound in continuous time with the same
prediction: all three terms, a sixteenth of the calls for the reconstruction. "by default" is a
whole step of `nelbo train` instead, with averaged weights, on its preset's U-Net, of the width
whose parameters are nearest to theirs in number. The ratios are of neighbouring steps, with the
error of their median.

Posterior: mean and variance of q(z_{t-1}|z_t,x) for every t of the 1000 linear β's, by
`DDPMScheduler.step` as shipped (float32), by the same code on float64 tables, by azula's
`DDPMSampler.step`, and by `process.posterior`; against formulas in 60 decimal digits.

DATA is as for `nelbo train`; by default scikit-learn's digits, enlarged to 32x32. Without a
torchvision that fits your torch: pip install diffusers, and pip install --no-deps azula einops.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal, getcontext
from pathlib import Path

import torch
from azula.denoise import Denoiser, DiracPosterior
from azula.noise import Schedule as AzulaSchedule
from azula.sample import DDPMSampler
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor
from torch.nn.functional import interpolate, mse_loss

from nelbo import data
from nelbo.data import Dataset, Schema
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion, Levels
from nelbo.diffusion.schedules import Linear, Schedule
from nelbo.diffusion.times import stratified
from nelbo.integrations import wrap
from nelbo.integrations.diffusers_network import Plain
from nelbo.training.objective import Objective
from nelbo.training.presets import configure
from nelbo.training.trainer import Trainer

Step = Callable[[Tensor], None]
Draw = Callable[[Tensor, Tensor, int, int], Tensor]  # z_t, x, t, seed -> z_{t-1}
T = 1000


def load_images(source: str) -> tuple[Tensor, int]:
    """Integers (N, C, H, W) and their number of levels; small ones are enlarged to 32 pixels."""
    dataset = data.load(source)
    x, levels = dataset.splits["train"].long(), dataset.schema.levels
    if levels is None or x.ndim != 4:
        raise SystemExit(f"{source} must be images of integers")
    if x.shape[-1] < 32:
        x = interpolate(x.float(), size=(32, 32), mode="nearest").long()
    return x, levels


def make_network(shape: tuple[int, ...], seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=shape[-1],
        in_channels=shape[0],
        out_channels=shape[0],
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).train()


def their_step(shape: tuple[int, ...], levels: int) -> Step:
    network, scheduler = make_network(shape), DDPMScheduler()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    values = Levels(levels).values.float()

    def step(x: Tensor) -> None:
        clean = values[x]
        noise = torch.randn(clean.shape)
        t = torch.randint(len(scheduler), (len(x),))
        output = network(scheduler.add_noise(clean, noise, t), t).sample
        optimizer.zero_grad()
        mse_loss(output, noise).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    return step


def our_step(shape: tuple[int, ...], levels: int) -> Step:
    low, high = -9.0, 9.0
    model = wrap(
        Plain(make_network(shape)),
        shape,
        predicts="noise",
        schedule=Linear(low, high),
        times=lambda gamma: T * (gamma - low) / (high - low),
        scaling=Levels(levels),
    ).train()
    model.dtype = torch.float32
    objective = Objective()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(x: Tensor) -> None:
        loss = objective(model, Batch(x), stratified(len(x)).flatten()).loss
        optimizer.zero_grad()
        (loss / (model.dims * math.log(2))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def default_step(x: Tensor, levels: int, batch: int) -> tuple[Step, int]:
    """A step as `nelbo train` takes it, on its own batch, and the parameters of its network."""
    schema = Schema("levels", tuple(x.shape[1:]), levels)
    dataset = Dataset("memory", schema, {"train": x, "validation": x[:50]})
    model, train = configure(schema, len(x), batch=batch)
    theirs = count_parameters(make_network(schema.shape))

    def learner(width: int) -> Trainer:
        return Trainer(replace(model, width=width), train, dataset)

    def off(learner: Trainer) -> float:
        return abs(math.log(count_parameters(learner.model.network) / theirs))

    nearest = min((learner(width) for width in range(16, 81, 8)), key=off)
    return lambda _: nearest.step(), count_parameters(nearest.model.network)


def count_parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def training(x: Tensor, levels: int, rounds: int, batch: int) -> dict[str, dict[str, float]]:
    """Return steps per second, parameters, and time over diffusers' with its error, of each."""
    shape = tuple(x.shape[1:])
    default, parameters = default_step(x, levels, batch)
    steps = {
        "diffusers": their_step(shape, levels),
        "nelbo, same network": our_step(shape, levels),
        "nelbo, by default": default,
    }
    counts = dict.fromkeys(steps, count_parameters(make_network(shape)))
    counts["nelbo, by default"] = parameters
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 3):
        examples = x[torch.randint(len(x), (batch,))]
        for name in list(steps)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            steps[name](examples)
            if i >= 3:
                seconds[name].append(time.perf_counter() - start)
    found = {}
    for name, times in seconds.items():
        ratios = [ours / theirs for ours, theirs in zip(times, seconds["diffusers"], strict=True)]
        found[name] = {
            "steps_per_second": 1 / statistics.median(times),
            "parameters": counts[name],
            "ratio": statistics.median(ratios),
            "error": 1.2533 * statistics.stdev(ratios) / math.sqrt(len(ratios)),
        }
    return found


def by_diffusers(wide: bool) -> Draw:
    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False)
    dtype = torch.float64 if wide else torch.float32
    if wide:
        scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
        scheduler.one = scheduler.one.double()

    def draw(z: Tensor, x: Tensor, t: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        step = scheduler.step(x.to(dtype), t, z.to(dtype), generator=generator)
        return step.prev_sample.double()

    return draw


def by_azula(betas: Tensor) -> Draw:
    alphas = (1 - betas).cumprod(0)

    class Table(AzulaSchedule):
        def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return alphas[t].sqrt(), (1 - alphas[t]).sqrt()

    class Oracle(Denoiser):
        schedule, x = Table(), torch.empty(0)

        def forward(self, x_t: Tensor, t: Tensor, **_: object) -> DiracPosterior:
            return DiracPosterior(self.x)

    oracle = Oracle()
    sampler = DDPMSampler(oracle)

    def draw(z: Tensor, x: Tensor, t: int, seed: int) -> Tensor:
        oracle.x = x
        torch.manual_seed(seed)
        step: Tensor = sampler.step(z, torch.tensor(t), torch.tensor(t - 1))
        return step

    return draw


def by_nelbo(betas: Tensor) -> Draw:
    process = GaussianDiffusion(Schedule.from_betas(betas), Affine())

    def draw(z: Tensor, x: Tensor, t: int, seed: int) -> Tensor:
        torch.manual_seed(seed)
        s_t = torch.tensor([[t / T], [(t + 1) / T]], dtype=torch.float64)
        return process.posterior(z[None], x[None], *s_t).sample()[0]

    return draw


def exact(betas: Tensor) -> list[tuple[Decimal, Decimal, Decimal]]:
    """Return the weights of z and x in the mean, and the variance, at t = 1..T-1; equation 6."""
    getcontext().prec = 60
    beta = [Decimal(b) for b in betas.tolist()]
    alphas = [1 - beta[0]]
    for b in beta[1:]:
        alphas.append(alphas[-1] * (1 - b))
    rows = []
    for s, t, b in zip(alphas, alphas[1:], beta[1:], strict=False):
        of_z = (1 - s) * (1 - b).sqrt() / (1 - t)
        rows.append((of_z, s.sqrt() * b / (1 - t), b * (1 - s) / (1 - t)))
    return rows


def posterior() -> dict[str, dict[str, float]]:
    """Largest error of mean and of variance (relative) over all t, of each."""
    betas = DDPMScheduler().betas.double()
    truth = exact(betas)
    generator = torch.Generator().manual_seed(0)
    z, x = torch.randn(2, 1, 1024, generator=generator, dtype=torch.float64)
    draws = {
        "diffusers, as shipped": by_diffusers(False),
        "diffusers, float64 tables": by_diffusers(True),
        "azula": by_azula(betas),
        "nelbo": by_nelbo(betas),
    }
    errors = {name: {"mean": 0.0, "variance": 0.0} for name in draws}
    for t in range(1, T):
        of_z, of_x, variance = (float(v) for v in truth[t - 1])
        for name, draw in draws.items():
            # Two draws with known noise give mean and deviation of any sampler.
            dtype = torch.float32 if name.endswith("shipped") else torch.float64
            noises, values = [], []
            for seed in (1, 2):
                own = torch.Generator().manual_seed(seed)
                noises.append(torch.randn(z.shape, generator=own, dtype=dtype).double())
                values.append(draw(z, x, t, seed))
            gap = noises[0] - noises[1]
            deviation = (gap * (values[0] - values[1])).sum() / gap.square().sum()
            mean = values[0] - deviation * noises[0]
            off = (mean - (of_z * z + of_x * x)).abs().max().item()
            relative = abs(deviation.item() ** 2 / variance - 1)
            errors[name]["mean"] = max(errors[name]["mean"], off)
            errors[name]["variance"] = max(errors[name]["variance"], relative)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default="digits")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x, levels = load_images(options.data)
    cost = training(x, levels, options.rounds, options.batch)
    print(f"training, images {tuple(x.shape[1:])}, batch {options.batch}", end="")
    print(f"{'steps/s':>12}{'parameters':>12}{'time/diffusers':>22}")
    for name, of in cost.items():
        numbers = f"{of['steps_per_second']:12.2f}{of['parameters']:12}"
        print(f"  {name:36}{numbers}{of['ratio']:14.3f} ± {of['error']:.3f}")
    errors = posterior()
    print(f"posterior, largest error over {T - 1} steps{'mean':>12}{'variance, relative':>22}")
    for name, error in errors.items():
        print(f"  {name:28}{error['mean']:21.1e}{error['variance']:22.1e}")
    if options.json:
        result = {"training": cost, "posterior": errors}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
