"""Latent pipelines of diffusers: bits of the image, through the autoencoder."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from support.commands import nelbo_fails, run_ok

from nelbo import evaluate
from nelbo._utils.numerics import seeded
from nelbo.diffusion.gaussian import Affine, Levels
from nelbo.diffusion.latent import latent_elbo
from nelbo.diffusion.times import elbo
from nelbo.integrations import diffusers as ours
from nelbo.integrations import load

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the schedule ends with signal left"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]
T = 3


def autoencoder(channels=1, latent=1, blocks=1, **config):
    return diffusers.AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(16,) * blocks,
        norm_num_groups=1,
        latent_channels=latent,
        mid_block_add_attention=False,
        **config,
    )


def unet(size, latent=1, **config):
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=latent,
        out_channels=latent,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
        **config,
    )


def ddpm(**config):
    given = {"num_train_timesteps": T, "clip_sample": False, "beta_end": 0.7, "beta_start": 0.2}
    return diffusers.DDPMScheduler(**(given | config))


SIZE = 8  # of images, and half of it of the latents


@pytest.fixture(scope="module")
def parts():
    """An untrained latent pipeline of classes: an autoencoder that halves images, and a prior."""
    with seeded(1):
        vae = autoencoder(3, 2, 2, scaling_factor=0.5, shift_factor=0.3).eval()
        network = unet(SIZE // 2, 2, num_class_embeds=4).eval()
    return vae, network, ddpm()


def images(n=6):
    with seeded(2):
        return torch.randint(256, (n, 3, SIZE, SIZE)).to(torch.uint8)


def save(folder, vae, network, scheduler):
    vae.save_pretrained(folder / "vae")
    network.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    index = {"_class_name": "LatentPipeline", "vae": ["diffusers", type(vae).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_terms_are_those_of_the_parts(parts):
    """Each term by the autoencoder and the scheduler themselves, for the same noise."""
    vae, network, scheduler = parts
    found = ours.build(network, scheduler, vae=vae, law="gaussian:0.4", label=2)
    model, x = found.model, images(2)
    assert found.schema.shape == (3, SIZE, SIZE) and found.schema.levels == 256
    with seeded(3), torch.no_grad():
        got = latent_elbo(model, x, found.times)
    with torch.no_grad():
        q = vae.encode(x.float() / 127.5 - 1).latent_dist
        with seeded(3):
            torch.randperm(2), torch.rand(2, dtype=torch.float64)  # the times
            z = q.mean + q.std * torch.randn(q.mean.shape, dtype=torch.float64)
        image = vae.decode(z.float()).sample.double()
        e = (z - 0.3) * 0.5
        alpha = scheduler.alphas_cumprod[-1].double()
        prior = 0.5 * (alpha * e**2 - alpha - torch.log1p(-alpha)).flatten(1).sum(1)
        entropy = (0.5 * math.log(2 * math.pi * math.e) + q.std.double().log()).flatten(1).sum(1)
    torch.testing.assert_close(got.encoder, -entropy, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got.prior, prior, rtol=1e-5, atol=1e-4)
    below, above = (
        torch.special.ndtr((x.double() / 127.5 - 1 + side / 255 - image) / 0.4) for side in (-1, 1)
    )
    mass = torch.where(x == 255, 1.0, above) - torch.where(x == 0, 0.0, below)
    torch.testing.assert_close(got.decoder, -mass.log().flatten(1).sum(1), rtol=1e-4, atol=1e-3)
    # the log-determinant: log p(z) = log p(e) + D log 0.5, for the same noise
    plain = ours.build(network, scheduler, scaling=Affine(), label=2)
    each = []
    for prior, latents in ((model.prior, z), (plain.model, e)):
        with seeded(4), torch.no_grad():
            each.append(elbo(prior, latents, plain.times).elbo)
    torch.testing.assert_close(each[0], each[1] + 32 * math.log(0.5), rtol=1e-5, atol=1e-3)


def test_a_folder_and_a_pipeline_are_the_parts(parts, tmp_path):
    """The same number from the parts, a pipeline and a folder; conditions and the law reach it."""
    vae, network, scheduler = parts
    x, labels = images(12), [0, 1, 2, 3] * 3
    path = f"diffusers:{save(tmp_path, *parts)}"
    with pytest.raises(ValueError, match=r"P\(x\|class\)"):
        load(path)
    found = evaluate(f"{path},law=laplace:0.3", x, condition=labels, calls=4)
    assert found.unit == "bits/dim" and found.given == "class" and found.examples == 12
    checked = 8 / 12  # images that are encoded to check how the network is read
    assert found.encoder_calls_per_example == pytest.approx(1 + checked)
    assert found.decoder_calls_per_example == 2
    assert found.calls_per_example >= 4 + 2 * checked and found.standard_error.total > 0
    assert sum(vars(found.terms).values()) == pytest.approx(found.bits_per_dim)
    assert any("discretised laplace of scale 0.3" in note for note in found.notes)
    assert "diffusion model is of 2x4x4 latents" in found.notes[0]

    class Pipeline:
        def __init__(self):
            self.unet, self.vae, self.scheduler = network, vae, scheduler
            self.components = {"unet": network, "vae": vae, "scheduler": scheduler}

    again = evaluate(Pipeline(), x, condition=labels, calls=4, law="laplace:0.3")
    assert again.nats == found.nats and again.model_hash == found.model_hash
    fitted = evaluate(path, x, condition=labels, calls=4)
    assert fitted.examples == 11  # the tenth image is left out
    assert any("fitted to the 1 image that was left out" in note for note in fitted.notes)
    splits = {"train": x[:4].numpy(), "test": x[4:].numpy()}
    by_split = evaluate(f"{path},label=2,law=gaussian:channels", splits, "test", calls=4)
    assert by_split.examples == 8
    assert any(
        "gaussian of scale" in n and "fitted to the train split" in n for n in by_split.notes
    )
    with pytest.raises(ValueError, match="measured 2 times; got 3"):
        evaluate(f"{path},label=2,law=gaussian:0.1", x, calls=3)
    with pytest.raises(ValueError, match="there is only one example"):
        evaluate(f"{path},label=2", x[:1])
    with pytest.raises(ValueError, match=r"law=laplace \(or gaussian"):
        load(f"{path},label=2,law=cauchy")


def test_what_has_no_bound_of_images_is_refused(parts, tmp_path):
    _, network, scheduler = parts
    with seeded(1):
        vq = diffusers.VQModel(
            block_out_channels=(4,), norm_num_groups=2, latent_channels=2, num_vq_embeddings=5
        )
    save(tmp_path / "a", vq, network, scheduler)
    for make in (
        lambda: load(f"diffusers:{tmp_path / 'a'},label=1"),
        lambda: ours.build(network, scheduler, vae=vq, label=1),
    ):
        with pytest.raises(
            ValueError, match=r"encoder of a VQModel is deterministic.*is infinite"
        ):
            make()
    with pytest.raises(ValueError, match=r"takes 2 channels.*autoencoder have 1"):
        ours.build(network, scheduler, vae=autoencoder(), label=1)
    with pytest.raises(ValueError, match="law is for models of the latents"):
        ours.build(unet(4), scheduler, law="laplace")


def test_the_command(parts, tmp_path, capsys):
    """`nelbo evaluate` of a latent folder prints the five terms, and one object with --json."""
    path = f"diffusers:{save(tmp_path, *parts)},label=2"
    np.savez(tmp_path / "x.npz", x=images(8).numpy())
    arguments = ["evaluate", path, "--data", str(tmp_path / "x.npz"), "--calls", "4"]
    run_ok(*arguments)
    shown = capsys.readouterr()
    names = {"decoder", "encoder", "prior", "reconstruction", "diffusion"}
    assert all(name in shown.out for name in names)
    assert "fitted to the 1 image that was left out" in shown.err
    run_ok(*arguments, "--json")
    found = json.loads(capsys.readouterr().out)
    assert set(found["terms"]) == names and found["decoder_calls_per_example"] == 2
    assert "latents" in nelbo_fails(capsys, *arguments[:-2], "--ode")
    missing = [*arguments, "--resume", tmp_path / "state"]  # and refused before data are read
    missing[missing.index("--data") + 1] = tmp_path / "none.npz"
    assert "resume: for models of the data themselves" in nelbo_fails(capsys, *missing)


LEVELS, LATENT_SCALE = 3, 4.0
STEPS, RATE = 400, 0.012  # of the training


def every_picture():
    """All pictures of 2x1 with 3 levels."""
    every = itertools.product(range(LEVELS), repeat=2)
    return torch.tensor(list(every)).reshape(-1, 1, 2, 1)


@pytest.fixture(scope="module")
def trained():
    """A tiny autoencoder and its prior, trained together on `every_picture`."""
    with seeded(0):
        vae = autoencoder(scaling_factor=LATENT_SCALE, shift_factor=0.2)
        with torch.no_grad():  # latents that tell pictures apart from the first step on
            vae.quant_conv.weight[0] *= 100 / LATENT_SCALE
            vae.quant_conv.bias[1] = -4 - 2 * math.log(LATENT_SCALE)
            vae.post_quant_conv.weight *= LATENT_SCALE
        scheduler = ddpm(prediction_type="sample", beta_start=0.1, beta_end=0.14)
        found = ours.build(
            unet((2, 1)), scheduler, scaling=Levels(LEVELS), vae=vae, law="gaussian:0.25"
        )
        model, x = found.model, every_picture().repeat(2, 1, 1, 1)
        model.law.requires_grad_(False)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.Adam(parameters)
        for i in range(STEPS):
            rate = min(1, (STEPS - i) / (STEPS / 3), (i + 1) / 5)
            optimiser.param_groups[0]["lr"] = RATE * rate
            bound = latent_elbo(model, x, found.times)
            rest = -bound.elbo - bound.decoder
            loss = (bound.decoder + min(1.0, 0.05 + 1.5 * i / STEPS) * rest).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval(), found.times


@pytest.mark.slow
def test_all_pictures_have_at_most_probability_one(trained):
    """Σ_x exp(ELBO(x)) by enumeration is in [0.5, 1], and without any one of the terms it is not:
    each of them counts, with its sign and its unit."""
    model, times = trained
    x = every_picture().repeat_interleave(2000, 0)
    with seeded(6), torch.no_grad():
        found = latent_elbo(model, x, times)

    def total(bound):
        each = bound.elbo.reshape(9, -1)
        mass = each.mean(1).exp()
        error = (mass.square() * each.var(1) / each.shape[1]).sum().sqrt()
        return mass.sum().item(), 4 * error.item()

    value, error = total(found)
    assert value - error > 0.5 and value + error < 1
    for name in found._fields:
        value, error = total(found._replace(**{name: torch.zeros_like(found.prior)}))
        assert value + error < 0.5 or value - error > 1, name
