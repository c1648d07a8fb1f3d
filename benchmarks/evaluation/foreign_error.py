"""The price of an error bar of another library's model, of which no pilot is kept.

    python benchmarks/evaluation/foreign_error.py IMAGES.npz FOLDER [--minutes 25] [--calls 1.85]
                                      [--target 0.01] [--examples 1000] [--seeds 8]

IMAGES.npz has an array x, N x 32 x 32 x 3. If FOLDER does not exist, a UNet2DModel of diffusers of
4 million weights is trained on all images but the last ones (noise prediction, linear β, T = 1000)
and saved there with its scheduler. The last ones are measured with each seed, by so many calls of
an image, or to a target error: rows through the network, those of the pilot included, the stated
Monte Carlo error, and the spread of the means, which shows whether the error holds.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel

import nelbo

CHANNELS, BATCH, RATE, AVERAGE = (32, 64, 96, 96), 32, 3e-4, 0.995


def train(x: torch.Tensor, minutes: float, folder: Path) -> None:
    """Train a U-Net by noise prediction, and save the average of its weights."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=32,
        block_out_channels=CHANNELS,
        norm_num_groups=8,
        attention_head_dim=16,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} million weights", flush=True)
    scheduler = DDPMScheduler(clip_sample=False)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGE)
    )
    optimiser = torch.optim.AdamW(network.parameters(), RATE)
    ends, step = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < ends:
        e = x[torch.randint(len(x), (BATCH,))].float() / 127.5 - 1
        noise, t = torch.randn_like(e), torch.randint(1000, (BATCH,))
        z = scheduler.add_noise(e, noise, t)
        loss = (network(z, t).sample - noise).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        average.update_parameters(network)
        step += 1
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    average.module.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--calls", type=float, default=1.85)
    parser.add_argument("--target", type=float, help="in place of --calls")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    with np.load(options.images) as file:
        x = torch.from_numpy(file["x"]).movedim(-1, 1)
    if not options.folder.exists():
        train(x[: -options.examples], options.minutes, options.folder)
    found = nelbo.integrations.load(f"diffusers:{options.folder}")
    images, means = x[-options.examples :], []
    for seed in range(options.seeds):
        calls = options.calls if options.target is None else None
        result = nelbo.evaluate(found, images, calls=calls, target_error=options.target, seed=seed)
        means.append(result.bits_per_dim)
        print(
            f"seed {seed}: {result.bits_per_dim:.4f} ± {result.standard_error.monte_carlo:.4f}"
            f" bits/dim, {result.calls_per_example * result.examples:.0f} calls,"
            f" {result.visited} images drawn",
            flush=True,
        )
    if len(means) > 1:
        print(f"spread of the means: {torch.tensor(means).std():.4f} bits/dim")


if __name__ == "__main__":
    main()
