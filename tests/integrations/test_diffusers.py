"""Models saved by diffusers: the bound is that of their scheduler's own coefficients."""

import json
import re
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import norm
from support.transformers import dit
from torch.distributions import kl_divergence

from nelbo import TimeGrid, evaluate
from nelbo._utils.numerics import seeded
from nelbo.diffusion.gaussian import Affine
from nelbo.diffusion.times import ContinuousTime, elbo
from nelbo.integrations import denoisers, is_foreign, load, probe
from nelbo.integrations.diffusers import build

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the schedule ends with signal left"),
    # by diffusers, of its own use of numpy
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]

T = 8
SIZE = 8
UNET = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


@pytest.fixture(scope="module")
def networks():
    """Tiny untrained U-Nets, by channels of the output."""
    with seeded(0):
        return {
            outputs: diffusers.UNet2DModel(
                **(UNET | {"out_channels": outputs}), sample_size=SIZE
            ).eval()
            for outputs in (3, 6)
        }


def images(n=2):
    with seeded(1):
        return torch.randint(256, (n, 3, SIZE, SIZE))


def ddpm(**config):
    given = {"num_train_timesteps": T, "clip_sample": False, "beta_end": 0.6, "beta_start": 0.02}
    return diffusers.DDPMScheduler(**(given | config))


def bins(x, mean, scale):
    """−log of the mass of N(mean, scale²) in the bin of x, outermost bins open; (B,)."""
    e = x.double() / 127.5 - 1
    sign = torch.where(e > mean, 1.0, -1.0)  # so that both ends are in the upper tail
    inner, outer = ((sign * (e - mean) + side / 255) / scale for side in (-1, 1))
    log_inner, log_outer = norm.logsf(inner), norm.logsf(outer)
    open_ = ((x == 255) & (sign > 0)) | ((x == 0) & (sign < 0))
    other = ((x == 255) & (sign < 0)) | ((x == 0) & (sign > 0))
    mass = np.where(open_, log_inner, log_inner + np.log1p(-np.exp(log_outer - log_inner)))
    mass = np.where(other, norm.logcdf(outer), mass)
    return torch.from_numpy(-mass).flatten(1).sum(1)


def their_terms(network, scheduler, x, zs):
    """Terms t = 1..T and the prior term of −ELBO for given z_t, by the output of `step` and by
    `_get_variance`, which are DDPMScheduler's own."""
    e = x.double() / 127.5 - 1
    learned = scheduler.config.variance_type == "learned_range"
    alphas = scheduler.alphas_cumprod.double()
    terms = []
    for t, z in enumerate(zs):
        output = network(z.float(), t).sample
        v = output[:, 3:].double() if learned else None
        x_hat = scheduler.step(output, t, z.float()).pred_original_sample.double()
        if t == 0:
            # the decoder: the mean of the last step, the variance of the one before
            variance = scheduler._get_variance(1, variance_type="fixed_small").double()
            if learned:
                ratio = scheduler.betas[0].double() / variance
                variance = variance * ratio ** ((v + 1) / 2)
            terms.append(bins(x, x_hat, variance.sqrt()))
            continue
        before, now = alphas[t - 1], alphas[t]
        small = scheduler._get_variance(t, variance_type="fixed_small").double()
        variance = scheduler._get_variance(t, predicted_variance=v).double()
        variance = variance.exp() if learned else variance
        of_x = before.sqrt() * (1 - now / before) / (1 - now)
        gap = (of_x * (e - x_hat)) ** 2 / variance
        ratio = small / variance
        terms.append(0.5 * (ratio - 1 - ratio.log() + gap).flatten(1).sum(1))
    last = alphas[-1]
    terms.append(0.5 * (last * e**2 - last - torch.log1p(-last)).flatten(1).sum(1))
    return terms


def our_terms(model, x, zs):
    """The same by the model's probabilities."""
    e = model.embed(x)
    times = torch.arange(1, len(zs) + 1, dtype=torch.float64)[:, None].expand(-1, len(x)) / len(zs)
    terms = [-model.likelihood(zs[0], times[0]).log_prob(x)]
    for z, s, t in zip(zs[1:], times[:-1], times[1:], strict=True):
        terms.append(kl_divergence(model.process.posterior(z, e, s, t), model.reverse(z, s, t)))
    last = times[-1]
    prior = model.process.prior(x.shape[1:], last)
    return [*terms, kl_divergence(model.process.marginal(e, last), prior)]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "sample"},
        {"prediction_type": "v_prediction", "variance_type": "fixed_large"},
        {"variance_type": "learned_range"},
        {"clip_sample": True},
    ],
    ids=str,
)
def test_ddpm_is_what_its_scheduler_computes(networks, config):
    """Every term of the bound, at the same z_t, by them (float32) and by us."""
    scheduler = ddpm(**config)
    network = networks[6 if config.get("variance_type") == "learned_range" else 3]
    model = build(network, scheduler, clip=config.get("clip_sample")).model
    x = images()
    with seeded(2), torch.no_grad():
        e, every = (x / 127.5 - 1).double(), torch.arange(T)
        noise = torch.randn(T, *e.shape, dtype=torch.float64)
        zs = [
            scheduler.add_noise(e, n, t.expand(len(x))) for n, t in zip(noise, every, strict=True)
        ]
        theirs, ours = their_terms(network, scheduler, x, zs), our_terms(model, x, zs)
    assert len(theirs) == len(ours) == T + 1
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_steps_are_those_of_their_scheduler(networks, variance):
    """Mean and variance of P(z_{t-1}|z_t) by `DDPMScheduler.step`, whose noise is drawn again."""
    scheduler = ddpm(variance_type=variance)
    network = networks[6 if variance == "learned_range" else 3]
    model = build(network, scheduler).model
    with seeded(4):
        z = torch.randn(2, 3, SIZE, SIZE)
    for t in (1, 4, T - 1):
        with torch.no_grad():
            output = network(z, t).sample
            times = torch.tensor([[t, t + 1]] * 2, dtype=torch.float64) / T
            p = model.reverse(z.double(), times[:, 0], times[:, 1]).base_dist
        draw = scheduler.step(output, t, z, generator=torch.Generator().manual_seed(5))
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(5))
        want = p.loc + p.scale * noise
        torch.testing.assert_close(draw.prev_sample.double(), want, rtol=1e-4, atol=1e-4)


def test_fewer_steps_are_theirs(networks):
    """--steps takes the times that the scheduler takes, told to the network as they are."""
    told = []
    network = networks[3]
    found = build(network, ddpm(), steps=3)
    assert found.times.steps == 3
    handle = network.register_forward_pre_hook(lambda _, inputs: told.extend(inputs[1].tolist()))
    with torch.no_grad():
        elbo(found.model, images(1), found.times)
    handle.remove()
    scheduler = ddpm()
    scheduler.set_timesteps(3)
    assert sorted(set(told)) == sorted(scheduler.timesteps.tolist())
    assert any("signal left" in note for note in found.notes)
    np.testing.assert_allclose(
        found.model.process.alpha(torch.ones(1, dtype=torch.float64)).item(),
        scheduler.alphas_cumprod[scheduler.timesteps[0]].item(),
        rtol=1e-6,
    )


def test_zero_terminal_snr(networks):
    """rescale_betas_zero_snr: nothing is left of x in z_T; noise prediction has no model there."""
    scheduler = ddpm(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    found = build(networks[3], scheduler)
    with torch.no_grad():
        bound = elbo(found.model, images(), found.times)
    assert (bound.prior == 0).all() and bound.elbo.isfinite().all()
    with pytest.raises(ValueError, match=r"α_T = 0"):
        build(networks[3], ddpm(rescale_betas_zero_snr=True))


class Recorder(torch.nn.Module):
    """F = some function, with the config of a network; what it was given is kept."""

    def __init__(self, function=torch.sin):
        super().__init__()
        self.function, self.given = function, []
        self.config = {"sample_size": SIZE, "in_channels": 3, "out_channels": 3}

    def forward(self, y, time, return_dict, class_labels=None):
        assert not return_dict
        self.given.append((y, time))
        return (self.function(y),)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edm_is_preconditioned_as_by_its_scheduler(kind):
    """Input, time and x̂ of `scale_model_input` and `precondition_outputs`, at each of its σ's."""
    scheduler = diffusers.EDMEulerScheduler(prediction_type=kind)
    network = Recorder()
    found = build(network, scheduler, steps=5)
    scheduler.set_timesteps(5)
    with seeded(6):
        y = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    for i, sigma in enumerate(scheduler.sigmas[:-1].flip(0).double()):
        t = torch.full((2,), (i + 1) / 5, dtype=torch.float64)
        got = found.model.predict(y / (1 + sigma**2).sqrt(), t).e_hat
        fed, time = network.given[-1]
        want = scheduler.precondition_inputs(y, sigma)
        torch.testing.assert_close(fed, want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            time, scheduler.precondition_noise(sigma).expand(2).double(), rtol=1e-6, atol=1e-6
        )
        want = scheduler.precondition_outputs(y, torch.sin(want), sigma)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_flow_matching_is_its_scheduler():
    """z and τ as `scale_noise` makes them, x̂ = y - τ F: one Euler step down to τ = 0."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    network = Recorder()
    found = build(network, scheduler, steps=6)
    scheduler.set_timesteps(6)
    assert found.model.process.alpha(torch.ones(1).double()) == 0  # τ = 1
    with seeded(7):
        x, noise = torch.randn(2, 1, 3, SIZE, SIZE, dtype=torch.float64)
    for i, tau in enumerate(scheduler.sigmas[:-1].flip(0).double()):
        t = torch.full((1,), (i + 1) / 6, dtype=torch.float64)
        q = found.model.process.marginal(x, t).base_dist
        got = found.model.predict(q.loc + q.scale * noise, t).e_hat
        fed, time = network.given[-1]
        y = (1 - tau) * x + tau * noise
        torch.testing.assert_close(fed, y, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(time, 1000 * tau[None], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got, y - tau * torch.sin(y), rtol=1e-9, atol=1e-9)


def test_one_step_from_pure_noise_is_refused(networks):
    """P(x|z_1) without the network is uniform there: log 256 for each number, whatever it is."""
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    zero_ddim = diffusers.DDIMScheduler(timestep_spacing="trailing", clip_sample=False, **zero)
    for scheduler in (diffusers.FlowMatchEulerDiscreteScheduler(), zero_ddim):
        with pytest.raises(ValueError, match=r"a single step, from pure noise.*give more steps"):
            evaluate((networks[3], scheduler), images(8), steps=1, calls=9)
        assert evaluate((networks[3], scheduler), images(8), steps=2, calls=9).bits_per_dim > 0


@pytest.mark.filterwarnings("ignore:invalid value")  # of a scheduler that divides by zero
def test_a_number_of_steps_that_a_scheduler_does_not_take_is_named(networks):
    with pytest.raises(ValueError, match=r"a PNDMScheduler cannot take 2 steps \(operands"):
        build(networks[3], diffusers.PNDMScheduler(num_train_timesteps=40), steps=2)
    shifted = diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.02)
    with pytest.raises(ValueError, match="times for steps=1 are no numbers; give more steps"):
        build(networks[3], shifted, steps=1)


@pytest.mark.parametrize(
    ("kind", "zero"),
    [
        ("EDMEulerScheduler", lambda fed, time: -0.5 * (-4 * time).exp() * fed),
        ("FlowMatchEulerDiscreteScheduler", lambda y, time: 1000 * y / time),
    ],
)
def test_steps_and_continuous_time_have_the_same_ends(kind, zero):
    """For x̂ = 0 the diffusion term telescopes to ½ (SNR_0 - SNR_1) ‖x‖² (equation 7), whatever
    the steps: so also in continuous time, by the midpoint rule."""
    x = images(1)

    def diffusion(steps, u=None):
        network = Recorder(None)
        network.forward = lambda y, time, return_dict: (zero(y, time.reshape(-1, 1, 1, 1)),)
        found = build(network, getattr(diffusers, kind)(), steps=steps)
        assert isinstance(found.times, ContinuousTime if steps is None else TimeGrid)
        with torch.no_grad():
            return elbo(found.model, x, found.times, u).diffusion.item()

    few = diffusion(7)
    np.testing.assert_allclose(diffusion(200), few, rtol=1e-6)
    u = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    np.testing.assert_allclose(diffusion(None, u[None]), few, rtol=1e-6)


def elbo_of(found, x):
    """The bound of each example, with the same noise for all models."""
    with seeded(9), torch.no_grad():
        return elbo(found.model, x, found.times).elbo


def save(folder, network, scheduler):
    network.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.parametrize("pipeline", [True, False])
def test_a_folder_is_what_was_saved(networks, tmp_path, pipeline):
    """The same bound to the bit from memory and from disk, as a pipeline or side by side."""
    scheduler = ddpm()
    if pipeline:
        save(tmp_path, networks[3], scheduler)
    else:
        networks[3].save_pretrained(tmp_path)
        scheduler.save_pretrained(tmp_path)
    assert is_foreign(f"diffusers:{tmp_path}") and not is_foreign(str(tmp_path))
    found = load(f"diffusers:{tmp_path}")
    x = images().numpy().astype(np.uint8)
    np.savez(tmp_path / "x.npz", x=x)
    examples, name = found.examples(str(tmp_path / "x.npz"))
    assert name.startswith("all of") and np.array_equal(examples.numpy(), x)
    a = evaluate(found.model, examples, times=found.times, calls=2 * T)
    b = evaluate(
        build(networks[3], scheduler).model, examples, times=TimeGrid.uniform(T), calls=2 * T
    )
    assert a.bits_per_dim == b.bits_per_dim and a.model_hash == b.model_hash
    assert "8 of 8 steps, variance small, x̂ not clipped" in found.notes[0]


def test_names_of_old_weights(networks, tmp_path):
    """Weights from before attention was renamed load as what they are."""
    from safetensors.torch import load_file, save_file

    save(tmp_path, networks[3], ddpm())
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    new = load_file(file)
    old = {}
    for name, tensor in new.items():
        for a, b in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
            name = name.replace(a, b)
        old[name.replace("to_out.0", "proj_attn")] = tensor
    assert old.keys() != new.keys()
    save_file(old, file)
    loaded = load(f"diffusers:{tmp_path}").model.network.network.network.state_dict()
    for name, tensor in networks[3].state_dict().items():
        assert torch.equal(loaded[name], tensor)


def test_clipping_must_be_said(networks, tmp_path):
    """Most DDPM schedulers have clip_sample: two models, two bounds, and no default."""
    path = f"diffusers:{save(tmp_path, networks[3], ddpm(clip_sample=True))}"
    with pytest.raises(ValueError, match="clip must be True, False or None; got 'no'"):
        build(networks[3], ddpm(clip_sample=True), clip="no")
    with pytest.raises(ValueError, match=r"clip_sample.*clip=True.*clip=False"):
        build(networks[3], ddpm(clip_sample=True))
    with pytest.raises(ValueError, match="clip_sample") as refusal:
        load(path)
    shown = re.findall(r"`nelbo evaluate (\S+) --data X`", str(refusal.value))
    assert shown == [f"{path},clip=yes", f"{path},clip=no"]
    bounds = []
    for clip in ("yes", "no"):
        found = load(f"{path},clip={clip}")
        with seeded(9), torch.no_grad():
            bounds.append(elbo(found.model, images(), found.times).elbo)
    assert (bounds[0] > bounds[1]).all()  # an untrained x̂ is outside the data's range


def test_a_transformer_of_classes():
    """DiT: a class is asked for; the variance that DDIM does not use is left out, and said."""
    with seeded(0):
        network = dit(4, 8, 4)
        torch.nn.init.normal_(network.proj_out_2.weight)
        torch.nn.init.normal_(network.proj_out_1.weight)
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=T, clip_sample=False)
    with pytest.raises(ValueError, match="11 classes"):
        build(network, scheduler, scaling=Affine())
    z, t = torch.randn(2, 4, 4, 4), torch.full((2,), 0.5, dtype=torch.float64)
    for label in (3, 10):
        found = build(network, scheduler, scaling=Affine(), label=label)
        assert found.schema.levels is None and "is not used" in found.notes[-1]
        got = found.model.network(z, 8 * t.float())
        want = network(z, torch.full((2,), 3), class_labels=torch.full((2,), label)).sample
        torch.testing.assert_close(got, want[:, :4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"thresholding": True}, "thresholding=True"),
        ({"variance_type": "learned"}, "variance_type must be one of"),
        ({"clip_sample": True, "clip_sample_range": 2.0, "clip": True}, "clip_sample_range"),
        ({"steps": T + 1}, f"has {T} steps"),
        ({"label": 3}, "without classes"),
    ],
)
def test_what_has_no_bound_is_refused(networks, config, words):
    options = {k: config.pop(k) for k in ("clip", "steps", "label") if k in config}
    with pytest.raises(ValueError, match=words):
        build(networks[3], ddpm(**config), **options)


@pytest.mark.parametrize(
    ("scheduler", "config", "words"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, "dynamic_shifting"),
        ("RePaintScheduler", {"clip_sample": False}, "does not say what the network predicts"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas"),
        ("ScoreSdeVeScheduler", {}, "no betas"),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            "timestep_type",
        ),
    ],
)
def test_schedulers_without_a_bound(networks, scheduler, config, words):
    with pytest.raises(ValueError, match=words):
        build(networks[3], getattr(diffusers, scheduler)(**config))


def test_sizes_that_a_network_cannot_halve_are_refused():
    """It would end in the middle of the run, at the first skip connection."""
    network = Recorder()
    network.config = network.config | {"block_out_channels": (8, 8, 8), "sample_size": 10}
    with pytest.raises(ValueError, match=r"halves its images 2 times.*10 is no multiple of 4"):
        build(network, ddpm())


def test_what_is_not_a_model_is_refused(networks, tmp_path):
    """No pickles, no other classes, no damaged or foreign files: one sentence each."""
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(f"diffusers:{tmp_path}/none")
    with pytest.raises(ValueError, match="diffusers:PATH or openai:PATH"):
        load("torch:model.pt")
    with pytest.raises(ValueError, match="clip=yes or clip=no"):
        load(f"diffusers:{tmp_path},clip=1")
    save(tmp_path, networks[3], ddpm())
    unet = tmp_path / "unet"
    config = json.loads((unet / "config.json").read_text())

    def refused(words, kind=ValueError):
        with pytest.raises(kind, match=words):
            load(f"diffusers:{tmp_path}")

    (unet / "config.json").write_text(json.dumps(config | {"_class_name": "UNet3DModel"}))
    refused("holds a UNet3DModel")
    (unet / "config.json").write_text("{")
    refused("is not JSON")
    (unet / "config.json").write_text(json.dumps(config | {"block_out_channels": [8, 16]}))
    refused("another architecture")
    (unet / "config.json").write_text(json.dumps(config | {"norm_num_groups": 3}))
    refused(r"unet.config\.json: num_channels .* divisible")
    (unet / "config.json").write_text(json.dumps(config | {"sample_size": None}))
    refused("sample_size")
    (unet / "config.json").write_text(json.dumps(config))
    weights = unet / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused("truncated")
    weights.rename(unet / "diffusion_pytorch_model.bin")
    refused(r"only \.bin, a format that can hold code")
    (unet / "diffusion_pytorch_model.bin").unlink()
    weights.write_bytes(whole)
    settings = tmp_path / "scheduler" / "scheduler_config.json"
    described = json.loads(settings.read_text())
    settings.write_text(json.dumps(described | {"beta_schedule": "cosine"}))
    refused("has beta_schedule='cosine', which a DDPMScheduler does not know; write squared")
    settings.write_text('{"_class_name": "UNet2DModel"}')
    refused("names no scheduler")
    settings.unlink()
    refused(r"scheduler.scheduler_config\.json does not exist; write it", FileNotFoundError)


@pytest.mark.parametrize(
    ("folder", "kind", "index"),
    [
        ("vae", None, None),
        ("vqvae", None, None),
        ("first_stage", "VQModel", None),
        ("decoder", "AsymmetricAutoencoderKL", None),
        ("decoder", "AutoencoderDC", None),
        (None, None, {"movq": ["diffusers", "VQModel"]}),
        (None, None, {"image_decoder": ["diffusers", "ConsistencyDecoderVAE"]}),
        (None, None, {"_class_name": "LDMPipeline"}),
    ],
)
def test_latents_are_not_pixels(networks, tmp_path, folder, kind, index):
    """An autoencoder in any folder, or named in the index whatever is there, is refused."""
    save(tmp_path, networks[3], ddpm())
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]})
    )
    load(f"diffusers:{tmp_path}")
    if folder is not None:
        (tmp_path / folder).mkdir()
    if kind is not None:
        (tmp_path / folder / "config.json").write_text(json.dumps({"_class_name": kind}))
    if index is not None:
        (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="latents of an autoencoder"):
        load(f"diffusers:{tmp_path}")


def test_it_brings_no_data(networks):
    found = build(networks[3], ddpm())
    with pytest.raises(ValueError, match="give some with --data"):
        found.examples(None)
    with pytest.raises(ValueError, match="17 levels where 256"):
        found.examples("digits")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DDPMScheduler", {"trained_betas": ["a"] * T}),
        ("DDPMScheduler", {"trained_betas": [[0.1]] * T}),
        ("DDPMScheduler", {"beta_schedule": ["linear"]}),
        ("DDPMScheduler", {"num_train_timesteps": T, "prediction_type": None}),
        ("EDMEulerScheduler", {"sigma_data": "wide"}),
        ("EDMEulerScheduler", {"sigma_min": "a"}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": "much"}),
        ("KarrasVeScheduler", {}),
        ("FlaxDDPMScheduler", {}),  # of another framework
        ("CosineDPMSolverMultistepScheduler", {}),  # needs torchsde
        ("ScoreSdeVpScheduler", {}),
        ("NoSuchScheduler" * 10**4, {}),
    ],
)
def test_a_scheduler_of_a_strange_description_is_one_sentence(networks, tmp_path, name, config):
    (tmp_path / "scheduler").mkdir()
    networks[3].save_pretrained(tmp_path / "unet")
    document = {"_class_name": name, "num_train_timesteps": T, "clip_sample": False} | config
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(document))
    for steps in (None, 2):
        with pytest.raises(ValueError) as error:
            load(f"diffusers:{tmp_path}", steps=steps)
        assert len(str(error.value)) < 1000 and "\n" not in str(error.value)


@pytest.mark.parametrize("times", [[9, 3], [3, 3], [-1, 2]])
def test_a_scheduler_that_takes_times_of_no_training_is_refused(networks, times):
    scheduler = ddpm()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(scheduler),
            "set_timesteps",
            lambda self, *_: setattr(self, "timesteps", torch.tensor(times)),
        )
        with pytest.raises(ValueError, match=r"some of them outside of 0\.\.7 or repeated"):
            build(networks[3], scheduler, steps=2)


@pytest.mark.parametrize("kind", ["KDPM2Discrete", "KDPM2AncestralDiscrete", "PNDM"])
def test_a_scheduler_of_calls_between_its_steps_is_refused(networks, kind):
    scheduler = getattr(diffusers, f"{kind}Scheduler")(num_train_timesteps=40)  # PNDM: with PRK
    build(networks[3], scheduler)  # all steps of the training
    with pytest.raises(ValueError, match=rf"for 10 steps a {kind}Scheduler .*higher order"):
        build(networks[3], scheduler, steps=10)


def test_the_default_weights_are_those_that_their_index_names(networks, tmp_path):
    """Shards beside a file of other weights, which diffusers leaves to those who name it."""
    save(tmp_path, networks[3], ddpm())
    want = load(f"diffusers:{tmp_path}").model
    with seeded(7):
        other = diffusers.UNet2DModel.from_config(networks[3].config)
    for file in (tmp_path / "unet").iterdir():
        file.unlink()
    networks[3].save_pretrained(tmp_path / "unet", max_shard_size="15KB")
    other.save_pretrained(tmp_path / "unet", variant="non_ema")
    found = load(f"diffusers:{tmp_path}").model
    assert all(map(torch.equal, found.state_dict().values(), want.state_dict().values()))
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    text = index.read_text()
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(ValueError, match="must name the weights' files beside it"):
        load(f"diffusers:{tmp_path}")
    index.write_text(text)
    several = index.parent.glob("*-of-*")
    one, two, *_ = sorted(several)
    one.rename(moved := tmp_path / one.name)
    with pytest.raises(FileNotFoundError, match=rf"index\.json names .*{one.name} is not beside"):
        load(f"diffusers:{tmp_path}")
    shutil.copy(two, one.with_name(whole := "diffusion_pytorch_model.safetensors"))
    with pytest.raises(FileNotFoundError, match=f"delete the index, if .* those of {whole} now"):
        load(f"diffusers:{tmp_path}")
    one.with_name(whole).unlink()
    shutil.copy(two, one)  # as of a save with other shards
    with pytest.raises(ValueError, match=rf"{one.name} (lacks|also has) the weight .* two saves"):
        load(f"diffusers:{tmp_path}")
    moved.replace(one)
    index.unlink()
    with pytest.raises(ValueError, match=r"several variants, .*non_ema.*; keep one"):
        load(f"diffusers:{tmp_path}")
    named = load(f"diffusers:{tmp_path},weights=non_ema")
    states = [each.state_dict().values() for each in (named.model.network.network.network, other)]
    assert all(map(torch.equal, *states))
    assert named.weights == "UNet2DModel, non_ema" and "non_ema" in named.notes[-1]
    with pytest.raises(ValueError, match=r"no weights of 'fp16'; it has .*non_ema"):
        load(f"diffusers:{tmp_path},weights=fp16")


def test_other_weights_beside_the_network_are_mentioned(networks, tmp_path):
    save(tmp_path, networks[3], ddpm())
    with seeded(7):
        other = diffusers.UNet2DModel.from_config(networks[3].config)
    other.save_pretrained(tmp_path / "unet_ema")
    notes = load(f"diffusers:{tmp_path}").notes
    assert (
        "weights in unet are measured; for those in unet_ema, add ,weights=unet_ema" in notes[-1]
    )
    with pytest.raises(ValueError, match=r"no weights of 'ema'.*; for those in unet_ema, add"):
        load(f"diffusers:{tmp_path},weights=ema")
    found = load(f"diffusers:{tmp_path},weights=unet_ema")
    states = [each.state_dict().values() for each in (found.model.network.network.network, other)]
    assert all(map(torch.equal, *states))
    assert not any("unet_ema" in note for note in found.notes)


def test_averages_of_training_scripts_are_read_with_their_settings(networks, tmp_path):
    """EMAModel writes its decay, counter and others into the config of the network."""
    from diffusers.training_utils import EMAModel

    save(tmp_path, networks[3], ddpm())
    averages = EMAModel(
        networks[3].parameters(),
        model_cls=diffusers.UNet2DModel,
        model_config=networks[3].config,
    )
    averages.shadow_params = [p.data + 1 for p in averages.shadow_params]
    averages.save_pretrained(tmp_path / "unet_ema")
    config = json.loads((tmp_path / "unet_ema" / "config.json").read_text())
    assert {"decay", "optimization_step"} < config.keys()
    network = load(f"diffusers:{tmp_path},weights=unet_ema").model.network.network.network
    for got, raw in zip(network.parameters(), networks[3].parameters(), strict=True):
        assert torch.equal(got, raw + 1)
    (tmp_path / "unet_ema" / "config.json").write_text(json.dumps({**config, "decoy": 1}))
    with pytest.raises(ValueError, match="decoy=1, and a UNet2DModel has no such key"):
        load(f"diffusers:{tmp_path},weights=unet_ema")


def test_adapters_that_are_not_applied_are_mentioned(networks, tmp_path):
    save(tmp_path, networks[3], ddpm())
    for name in ("pytorch_lora_weights", "unet/adapter_model"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    note = load(f"diffusers:{tmp_path}").notes[-1]
    assert re.search("pytorch_lora.*adapter_model.*not applied; pipeline.load_lora_weights", note)
    (tmp_path / "unet").rename(tmp_path / "other")
    with pytest.raises(ValueError, match="no network, only changes of another's, pytorch_lora"):
        load(f"diffusers:{tmp_path}")


def test_weights_of_parallel_training(networks, tmp_path):
    from safetensors.torch import load_file, save_file

    save(tmp_path, networks[3], ddpm())
    want = load(f"diffusers:{tmp_path}")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({f"module.{name}": w for name, w in load_file(file).items()}, file)
    got = load(f"diffusers:{tmp_path}")
    assert all(map(torch.equal, got.model.state_dict().values(), want.model.state_dict().values()))
    assert "'module.'" in got.notes[-1] and len(got.notes) == len(want.notes) + 1


def test_a_variance_after_the_path(networks, tmp_path):
    """That of the scheduler by another name, also in place of a learned one."""
    path = f"diffusers:{save(tmp_path / 'a', networks[3], ddpm())}"
    x = images()

    def bound(found):
        with seeded(9), torch.no_grad():
            return elbo(found.model, x, found.times).elbo

    large = bound(build(networks[3], ddpm(variance_type="fixed_large")))
    assert torch.equal(bound(load(f"{path},variance=large")), large)
    assert not torch.equal(bound(load(path)), large)
    learned = ddpm(variance_type="learned_range")
    found = load(f"diffusers:{save(tmp_path / 'b', networks[6], learned)},variance=large")
    assert "variance large" in found.notes[0] and "is not used" in found.notes[-1]
    assert bound(found).isfinite().all()
    with pytest.raises(ValueError, match="trained with β's"):
        build(Recorder(), diffusers.EDMEulerScheduler(), variance="large")


def test_a_reading_that_is_insisted_on(networks, tmp_path, monkeypatch):
    """What the check would refuse is a note, with other numbers of steps too."""

    def refuse(*_):
        raise probe.ReadingError("another fits")

    folder = save(tmp_path, networks[3], ddpm())
    monkeypatch.setattr(denoisers, "probe", refuse)
    with pytest.raises(ValueError, match=r"another fits; .*,check=no after a folder"):
        load(f"diffusers:{folder}")
    found = load(f"diffusers:{folder},check=no")
    for each in (found, found.of_steps(2)):
        assert "another fits; it is measured as given" in " ".join(each.notes)
    pair = (networks[3], ddpm())
    with pytest.raises(ValueError, match=r"another fits; .*check=False"):
        evaluate(pair, images())
    assert any("another fits" in note for note in evaluate(pair, images(), check=False).notes)


def test_options_after_the_path(networks, tmp_path):
    """A comma in a folder's name, data in [0, 1], some of the times."""
    folder = tmp_path / "a,clip=no"
    folder.mkdir()
    save(folder, networks[3], ddpm())
    found = load(f"diffusers:{folder},scaling=0:1,keep=1:4:7")
    x = images(1)
    torch.testing.assert_close(found.model.embed(x), x.double() / 255, rtol=1e-15, atol=0)
    assert "levels 0..255 as 0..1" in found.notes[1]
    assert "as -1..1" in load(f"diffusers:{folder}").notes[1]
    assert found.model.network.times.tolist() == [1, 4, 7] and found.times.steps == 3
    for wrong, words in {
        "keep=1-4": r"keep after a path is given as keep=0:4:9 .*; got 'keep=1-4'",
        "scaling=nan:1": r"scaling after a path is given as scaling=0:1 .*; got 'scaling=nan:1'",
        "clip=no,clip=no": "clip is given once",
        "weights=../x": "weights after a path",
        "colour=no": r"options of diffusers: are clip=yes or.*; got 'colour=no'",
        "": r"options of diffusers: are clip=yes or.*; got ''",
    }.items():
        with pytest.raises(ValueError, match=words):
            load(f"diffusers:{folder},{wrong}")
    with pytest.raises(ValueError, match="low must be less than high"):
        load(f"diffusers:{folder},scaling=1:0")
    with pytest.raises(ValueError, match="without steps"):
        load(f"diffusers:{folder},keep=1:4", steps=2)


def test_a_flag_that_a_scheduler_passes_over_is_refused(networks, tmp_path):
    """PNDM made from the config of a zero-SNR training keeps the flag and does nothing with it."""
    trained = ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    swapped = diffusers.PNDMScheduler.from_config(trained.config)
    save(tmp_path, networks[3], swapped)
    with pytest.raises(ValueError, match=r"rescale_betas_zero_snr=true.*PNDMScheduler ignores"):
        load(f"diffusers:{tmp_path}")


@pytest.mark.parametrize("kind", ["LMSDiscrete", "DEISMultistep", "HeunDiscrete", "KDPM2Discrete"])
def test_no_scheduler_passes_over_zero_snr(networks, kind):
    trained = ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    swapped = getattr(diffusers, f"{kind}Scheduler").from_config(trained.config)
    with pytest.raises(ValueError, match=f"{kind}Scheduler ignores it"):
        build(networks[3], swapped)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("predict_epsilon", False, "prediction_type"),
        ("prediciton_type", "sample", "write prediction_type"),
        ("timesteps", 1000, "num_train_timesteps"),
        ("shift", 3.0, "no such key"),
        ("sigma_data", 0.5, "as the network was trained"),
        ("prediction_type", None, "epsilon, sample, v_prediction; got None"),
        ("beta_start", "0.1", "beta_start='0.1', where a DDPMScheduler takes one number"),
        ("num_train_timesteps", 8.5, "num_train_timesteps=8.5, where .* takes one whole number"),
        ("trained_betas", ["a"] * T, r"where a DDPMScheduler takes a list of numbers"),
        ("trained_betas", "0.1", r"trained_betas='0.1', where .* a list of numbers"),
        ("trained_betas", [0.1] * 3, "3 betas and num_train_timesteps=8"),
    ],
)
def test_a_key_of_no_scheduler_is_refused(networks, tmp_path, key, value, words):
    """diffusers warns of some and reads on; whatever they were meant to say is lost."""
    save(tmp_path, networks[3], ddpm())
    settings = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(settings.read_text())
    # keys of other samplers and empty ones say nothing of the training
    settings.write_text(json.dumps(config | {"skip_prk_steps": True, "timestep_values": None}))
    load(f"diffusers:{tmp_path}")
    settings.write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=words):
        load(f"diffusers:{tmp_path}")


def test_a_key_of_no_network_is_refused(networks, tmp_path):
    save(tmp_path, networks[3], ddpm())
    settings = tmp_path / "unet" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"freq_shft": 1}))
    with pytest.raises(ValueError, match=r"freq_shft=1.*write freq_shift"):
        load(f"diffusers:{tmp_path}")


def test_an_edm_scheduler_of_x_is_refused(networks):
    """F is scaled by c_out for ε or for v; no class of diffusers says how for x."""
    with pytest.raises(ValueError, match=r"epsilon, v_prediction.*got 'sample'"):
        build(networks[3], diffusers.EDMEulerScheduler(prediction_type="sample"))


def test_alphas_that_are_not_of_the_betas_are_refused(networks):
    with pytest.raises(ValueError, match=r"changes its α's after.*wrap"):
        scheduler = diffusers.CogVideoXDDIMScheduler(num_train_timesteps=T, clip_sample=False)
        build(networks[3], scheduler)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("DPMSolverMultistep", {"use_karras_sigmas": True}),
        ("DPMSolverMultistep", {"timestep_spacing": "trailing"}),
        ("DPMSolverMultistep", {}),
        ("EulerDiscrete", {"use_karras_sigmas": True}),
        ("UniPCMultistep", {"timestep_spacing": "leading", "steps_offset": 1}),
        ("HeunDiscrete", {"timestep_spacing": "trailing"}),
        ("FlowMatchHeunDiscrete", {"shift": 2.0}),
    ],
)
def test_steps_are_those_of_any_sampler(kind, config):
    """--steps by the noise levels and times that a scheduler itself takes: for a constant x̂, the
    sum of equation 5 in numpy."""
    flow = kind.startswith("Flow")
    if not flow:
        config = config | {"beta_end": 0.3, "beta_start": 0.02, "prediction_type": "sample"}
    scheduler = getattr(diffusers, f"{kind}Scheduler")(num_train_timesteps=40, **config)
    network = Recorder()
    if flow:  # the velocity whose x̂ is 0.1
        network.function = lambda y: (y - 0.1) / (network.given[-1][1] / 40).reshape(-1, 1, 1, 1)
    else:
        network.function = lambda y: torch.full_like(y, 0.1)
    found = build(network, scheduler, steps=5)
    x = images()
    with torch.no_grad(), seeded(3):
        got = elbo(found.model, x, found.times)
    scheduler.set_timesteps(5)
    told = sorted({float(t) for _, time in network.given for t in time})
    assert told == pytest.approx(sorted({*scheduler.timesteps.tolist()}), rel=1e-6)
    sigmas = np.unique(scheduler.sigmas.numpy()[:-1].astype(np.float64))
    assert len(sigmas) == 5
    a = (1 - sigmas) ** 2 / ((1 - sigmas) ** 2 + sigmas**2) if flow else 1 / (1 + sigmas**2)
    e = x.numpy() / 127.5 - 1
    diffusion = sum(
        0.5 * (s / (1 - s) - t / (1 - t)) * ((e - 0.1) ** 2).sum((1, 2, 3)) for s, t in pairwise(a)
    )
    np.testing.assert_allclose(got.diffusion.numpy(), diffusion, rtol=2e-3)
    prior = 0.5 * (a[-1] * (e**2 - 1) - np.log1p(-a[-1])).sum((1, 2, 3))
    np.testing.assert_allclose(got.prior.numpy(), prior, rtol=2e-3)


def test_a_description_may_hold_infinity(networks, tmp_path):
    save(tmp_path, networks[3], diffusers.DPMSolverMultistepScheduler(num_train_timesteps=T))
    settings = tmp_path / "scheduler" / "scheduler_config.json"
    assert "-Infinity" in settings.read_text()
    assert load(f"diffusers:{tmp_path}").times is not None
    settings.write_text(settings.read_text().replace("-Infinity", "NaN"))
    with pytest.raises(ValueError, match="NaN is not a number"):
        load(f"diffusers:{tmp_path}")
    settings.write_text(settings.read_text().replace("NaN", "0").replace("0.02", "Infinity"))
    with pytest.raises(ValueError):
        load(f"diffusers:{tmp_path}")


class TestInMemory:
    """`evaluate` of pipelines and of networks with their schedulers."""

    def test_a_pipeline_is_its_parts(self, networks):
        x = images().to(torch.uint8)
        network, scheduler = networks[3], ddpm()
        found = build(network, scheduler, steps=4)
        want = evaluate(found.model, x, times=found.times, calls=9)
        pipeline = diffusers.DDPMPipeline(network, scheduler)
        for thing in (pipeline, (network, scheduler)):
            got = evaluate(thing, x.movedim(1, -1).numpy(), steps=4, calls=9)
            assert got.nats == want.nats and got.model_hash == want.model_hash
            assert got.notes[0] == found.notes[0]
            for words in ("channels last", "no better than a straight line"):
                assert any(words in note for note in got.notes)
        with pytest.raises(
            ValueError, match="betas: the scheduler of a DDPMPipeline determines this"
        ):
            evaluate(pipeline, x, betas=scheduler.betas)
        with pytest.raises(ValueError, match="clip_sample"):
            evaluate((network, ddpm(clip_sample=True)), x)
        got = evaluate((network, ddpm(clip_sample=True)), x, clip=False, steps=4, calls=9)
        assert got.nats == want.nats

    def test_classes(self, tmp_path):
        with seeded(0):
            network = diffusers.UNet2DModel(
                **UNET, sample_size=SIZE, num_class_embeds=3, time_embedding_type="positional"
            ).eval()
            torch.nn.init.normal_(network.class_embedding.weight, std=9.0)
        scheduler, x = ddpm(), images(4)
        alone = [elbo_of(build(network, scheduler, label=label), x) for label in range(3)]
        assert (alone[0] - alone[1]).abs().min() > 1e-3
        labels = [2, 0, 1, 1]
        found = build(network, scheduler, condition=labels)
        batch, _ = found.examples(x)
        got = elbo_of(found, batch)
        want = torch.stack([alone[label][i] for i, label in enumerate(labels)])
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        found = evaluate((network, scheduler), x, condition=np.array(labels), steps=2, calls=4)
        assert found.given == "class"
        path = f"diffusers:{save(tmp_path, network, scheduler)}"
        again = evaluate(path, x, condition=torch.tensor(labels), steps=2, calls=4)
        assert again.nats == found.nats
        for condition, words in (
            ([3, 0, 0, 0], r"labels must be 0..2; got 3"),
            (np.zeros((4, 2)), "class labels, integers"),
        ):
            with pytest.raises(ValueError, match=words):
                evaluate((network, scheduler), x, condition=condition)
        with pytest.raises(ValueError, match="because label is one for all"):
            build(network, scheduler, condition=labels, label=1)


def test_a_time_that_a_sampler_takes_twice_is_one_step():
    """PNDM without its first phase, as Stable Diffusion has it."""
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    network = Recorder()
    found = build(network, scheduler, steps=10)
    with torch.no_grad():
        elbo(found.model, images(), found.times)
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 11
    told = {float(t) for _, time in network.given for t in time}
    assert told == set(scheduler.timesteps.tolist()) and found.times.steps == 10


@pytest.mark.parametrize("kind", ["DDIM", "DPMSolverMultistep", "UniPCMultistep"])
def test_as_many_steps_as_in_training_are_all_of_them(kind):
    """Also where the scheduler never takes the first of them: a study ends with all steps."""
    offset = {"steps_offset": 1, "clip_sample": False} if kind == "DDIM" else {}
    scheduler = getattr(diffusers, f"{kind}Scheduler")(num_train_timesteps=20, **offset)
    some, every = (build(Recorder(), scheduler, steps=n) for n in (20, None))
    times = torch.arange(1, 21).double() / 20
    one, other = (found.model.process.schedule(times) for found in (some, every))
    assert some.times.steps == 20 and torch.equal(one, other)
    with pytest.raises(ValueError, match="20 steps, and 21 were asked for"):
        build(Recorder(), scheduler, steps=21)
