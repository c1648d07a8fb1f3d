"""The lines of docs/foreign.md by which a published model is audited, run as they stand there."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.runs import OPENAI
from support.transformers import POOLED, WIDTH, dit, sd3
from torch import nn

import nelbo
from nelbo._utils.numerics import seeded
from nelbo.diffusion.schedules import Linear
from nelbo.integrations import load_weights
from nelbo.integrations.adapters import exploding
from nelbo.integrations.openai import architecture, check_flags
from nelbo.integrations.openai_unet import UNet

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the schedule ends with signal left"),
    pytest.mark.filterwarnings("ignore:.*read as images with channels last"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]
PAGE = Path(__file__).parents[2] / "docs" / "foreign.md"
BLOCKS = dict(re.findall(r"```python ([\w-]+)\n(.*?)```", PAGE.read_text(), re.DOTALL))
SIZE = 8


def images(n=11, size=SIZE):
    with seeded(1):
        return torch.randint(256, (n, size, size, 3)).to(torch.uint8).numpy()


def unet(**config):
    given = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return {
        "sample_size": SIZE // 2,
        "in_channels": 2,
        "out_channels": 2,
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        **given,
        **config,
    }


def autoencoder():
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=2,
    ).eval()


def run(family, **names):
    """Run the lines of a family; return the names that they leave."""
    place = {"nelbo": nelbo, "torch": torch, "math": math, "images": images()} | names
    exec(compile(BLOCKS[family], f"{PAGE.name}: {family}", "exec"), place)
    return SimpleNamespace(**{name: place[name] for name in place if name[0] != "_"})


def test_there_are_five_families_and_the_files_of_trainings():
    assert set(BLOCKS) == {"improved-diffusion", "edm", "weights", "dit", "sd", "flow"}


def check(result, steps, given=""):
    assert result.unit == "bits/dim" and math.isfinite(result.bits_per_dim)
    assert result.standard_error.total > 0 and result.steps == steps and result.given == given
    assert sum(vars(result.terms).values()) == pytest.approx(result.bits_per_dim)
    assert any("ancestral sampling" in note for note in result.notes)


def test_improved_diffusion(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with seeded(0):
        network = UNet(architecture(check_flags(OPENAI)))
    torch.save(network.state_dict(), "ema_0.9999_500000.pt")
    Path("ema_0.9999_500000.json").write_text(json.dumps({**OPENAI, "diffusion_steps": 100}))
    made = run("improved-diffusion", images=images(size=OPENAI["image_size"]))
    check(made.result, 100)


class Denoiser(nn.Module):
    """x̂ of a Gaussian with the variance 1/4, as a function of y = x + σ ε and of σ."""

    def forward(self, y, sigma, labels=None):
        return y * (0.25 / (0.25 + sigma**2)).reshape(-1, 1, 1, 1)


def test_edm():
    made = run("edm", net=Denoiser(), Linear=Linear, exploding=exploding)
    check(made.result, 18)
    assert made.limit.steps is None
    # more steps of the same Gaussian are better, and there is nothing better than continuous time
    error = made.limit.standard_error.monte_carlo + made.result.standard_error.monte_carlo
    assert made.limit.bits_per_dim < made.result.bits_per_dim + 4 * error


class Inner(nn.Module):
    """F of EDM; with gain 0, x̂ is that of a Gaussian with the variance σ_data² = 1/4."""

    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, y, time):
        return self.gain * y


def test_weights_of_lightning(tmp_path, monkeypatch):
    """The average is measured, and not the raw weights."""
    monkeypatch.chdir(tmp_path)
    both = {"model.gain": torch.tensor(0.3), "ema.gain": torch.tensor(0.0)}
    torch.save({"state_dict": both, "epoch": 3}, "last.ckpt")
    told = {"predicts": "edm", "sigma_data": 0.5, "sigmas": torch.linspace(0.01, 80, 9)}
    made = run("weights", module=Inner(0.5), load_weights=load_weights, sigmas=told["sigmas"])
    check(made.result, 9)
    assert made.result.nats == nelbo.evaluate(Inner(0.0), images(), **told).nats
    assert made.result.weights == "those under 'state_dict.ema.' in last.ckpt (averaged, EMA)"


def test_dit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with seeded(0):
        network = dit(2, 4, SIZE // 2)
        vae = autoencoder()
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    folder = Path("DiT-XL-2-256")
    for part, name in ((network, "transformer"), (vae, "vae"), (scheduler, "scheduler")):
        part.save_pretrained(folder / name)
    made = run("dit", labels=[i % 10 for i in range(11)])
    check(made.result, 10, "class")
    assert made.result.examples == 10  # a tenth is left out for the law of the pixels


def test_latent_diffusion_from_text():
    with seeded(0):
        network = diffusers.UNet2DConditionModel(
            **unet(
                cross_attention_dim=WIDTH,
                attention_head_dim=4,
                down_block_types=("CrossAttnDownBlock2D",),
                up_block_types=("CrossAttnUpBlock2D",),
            )
        ).eval()
        vae, embeddings = autoencoder(), torch.randn(11, 4, WIDTH)
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    pipeline = SimpleNamespace(
        unet=network,
        vae=vae,
        scheduler=scheduler,
        components={"unet": network, "vae": vae, "scheduler": scheduler},
        encode_prompt=lambda prompt, device, do_classifier_free_guidance: (
            embeddings[[int(each.split()[-1]) for each in prompt]],
            None,
        ),
    )
    made = run("sd", pipeline=pipeline, captions=[f"image {i}" for i in range(11)])
    check(made.result, 10, "embedding")
    assert any("discretised laplace" in note for note in made.result.notes)


def test_flow_matching():
    class Velocity(nn.Module):
        """ε - x of a Gaussian with the variance 1/4."""

        def forward(self, y, tau):
            tau = tau.reshape(-1, 1, 1, 1)
            variance = 0.25 * (1 - tau) ** 2 + tau**2
            return y * (tau - 0.25 * (1 - tau)) / variance

    with seeded(0):
        transformer = sd3(SIZE)
        prompts, pooled = torch.randn(11, 4, WIDTH), torch.randn(11, POOLED)
    made = run(
        "flow",
        velocity=Velocity(),
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        prompts=prompts,
        pooled=pooled,
    )
    check(made.result, 20)
    check(made.other, 20, "embedding")
