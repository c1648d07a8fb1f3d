"""Weights of improved- and guided-diffusion: their names, their network, their formulas.

No published file is at hand here. The names and shapes are held against what the modules of
improved_diffusion/unet.py and guided_diffusion/unet.py are called and hold, the network against a
second statement of it by plain functions of the state dict, the formulas against
gaussian_diffusion.py's tables written out in numpy.
"""

import json
import math

import numpy as np
import pytest
import torch
from support.runs import OPENAI
from torch.nn import functional

from nelbo._utils.numerics import seeded
from nelbo.diffusion.times import elbo
from nelbo.integrations import load
from nelbo.integrations.openai import architecture, build, check_flags, named_betas
from nelbo.integrations.openai_unet import UNet

pytestmark = pytest.mark.filterwarnings("ignore:the schedule ends with signal left")


def random_network(flags):
    """Weights at random, also where training starts from zero."""
    with seeded(0):
        network = UNet(architecture(check_flags(flags))).eval()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return network


def images(n=2, size=8):
    with seeded(1):
        return torch.randint(256, (n, 3, size, size))


def test_names_and_shapes():
    """The 32x32 network of improved-diffusion's README (CIFAR-10, 128 channels, 3 blocks):
    places of blocks, attention and resampling, and what each is called."""
    flags = {
        "image_size": 32,
        "num_channels": 128,
        "num_res_blocks": 3,
        "learn_sigma": True,
        "dropout": 0.3,
    }
    with torch.device("meta"):
        state = UNet(architecture(check_flags(flags))).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name, shape in {
        "time_embed.0.weight": (512, 128),
        "time_embed.2.bias": (512,),
        "input_blocks.0.0.weight": (128, 3, 3, 3),
        "input_blocks.1.0.in_layers.0.weight": (128,),
        "input_blocks.1.0.in_layers.2.weight": (128, 128, 3, 3),
        "input_blocks.1.0.emb_layers.1.weight": (256, 512),
        "input_blocks.1.0.out_layers.0.bias": (128,),
        "input_blocks.1.0.out_layers.3.weight": (128, 128, 3, 3),
        "input_blocks.4.0.op.weight": (128, 128, 3, 3),
        "input_blocks.5.0.skip_connection.weight": (256, 128, 1, 1),
        "input_blocks.5.1.norm.weight": (256,),
        "input_blocks.5.1.qkv.weight": (768, 256, 1),
        "input_blocks.5.1.proj_out.weight": (256, 256, 1),
        "input_blocks.15.0.in_layers.2.weight": (256, 256, 3, 3),
        "middle_block.0.in_layers.2.weight": (256, 256, 3, 3),
        "middle_block.1.qkv.bias": (768,),
        "middle_block.2.out_layers.3.bias": (256,),
        "output_blocks.0.0.in_layers.2.weight": (256, 512, 3, 3),
        "output_blocks.3.1.conv.weight": (256, 256, 3, 3),
        "output_blocks.7.2.conv.weight": (256, 256, 3, 3),
        "output_blocks.11.2.conv.weight": (256, 256, 3, 3),
        "output_blocks.12.0.skip_connection.weight": (128, 384, 1, 1),
        "output_blocks.15.0.in_layers.2.weight": (128, 256, 3, 3),
        "out.0.weight": (128,),
        "out.2.weight": (6, 128, 3, 3),
    }.items():
        assert shapes.get(name) == shape, name
    # attention at 16 and 8 pixels: 2 x 3 on the way down, 1, 2 x 4 on the way up
    assert sum(name.endswith("qkv.weight") for name in shapes) == 6 + 1 + 8
    assert "input_blocks.1.0.skip_connection.weight" not in shapes
    assert "input_blocks.1.1.qkv.weight" not in shapes
    assert {name.split(".")[1] for name in shapes if name.startswith("input")} == {
        str(i) for i in range(16)
    }
    guided = flags | {"resblock_updown": True, "class_cond": True, "use_scale_shift_norm": False}
    with torch.device("meta"):
        state = UNet(architecture(check_flags(guided))).state_dict()
    assert state["label_emb.weight"].shape == (1000, 512)
    assert state["input_blocks.4.0.in_layers.2.weight"].shape == (128, 128, 3, 3)
    assert state["output_blocks.3.1.in_layers.2.weight"].shape == (256, 256, 3, 3)
    assert state["input_blocks.1.0.emb_layers.1.weight"].shape == (128, 512)


def restated(w, y, time, flags, label=None):
    """The network as functions of its state dict `w`: two levels, one block each."""
    channels = flags["num_channels"]

    def conv(name, h, stride=1):
        kernel = w[f"{name}.weight"]
        pad = kernel.shape[-1] // 2
        return functional.conv2d(h, kernel, w[f"{name}.bias"], stride, pad)

    def norm(name, h):
        groups = h.reshape(len(h), 32, -1)
        mean, var = groups.mean(2, keepdim=True), groups.var(2, correction=0, keepdim=True)
        h = ((groups - mean) / (var + 1e-5).sqrt()).reshape(h.shape)
        shape = (1, -1) + (1,) * (h.ndim - 2)
        return h * w[f"{name}.weight"].reshape(shape) + w[f"{name}.bias"].reshape(shape)

    def silu(h):
        return h / (1 + torch.exp(-h))

    def linear(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def half(h):
        return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4

    def double(h):
        return h.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def block(name, x, resize=lambda h: h):
        h = conv(f"{name}.in_layers.2", resize(silu(norm(f"{name}.in_layers.0", x))))
        e = linear(f"{name}.emb_layers.1", silu(emb))[:, :, None, None]
        c = h.shape[1]
        if flags.get("use_scale_shift_norm", True):
            h = norm(f"{name}.out_layers.0", h) * (1 + e[:, :c]) + e[:, c:]
        else:
            h = norm(f"{name}.out_layers.0", h + e)
        h = conv(f"{name}.out_layers.3", silu(h))
        x = resize(x)
        return h + (conv(f"{name}.skip_connection", x) if x.shape[1] != c else x)

    def attend(name, x):
        b, c, side, _ = x.shape
        flat = x.reshape(b, c, -1)
        kernel = w[f"{name}.qkv.weight"][:, :, 0]
        qkv = torch.einsum("oc,bcl->bol", kernel, norm(f"{name}.norm", flat))
        qkv = qkv + w[f"{name}.qkv.bias"][:, None]
        per = flags.get("num_head_channels", -1)
        heads = flags["num_heads"] if per == -1 else c // per
        size = c // heads
        out = torch.zeros_like(flat)
        for i in range(heads):
            if flags.get("use_new_attention_order", False):
                starts = (i * size, c + i * size, 2 * c + i * size)
            else:
                starts = (3 * i * size, (3 * i + 1) * size, (3 * i + 2) * size)
            q, k, v = (qkv[:, start : start + size] for start in starts)
            weight = torch.softmax(torch.einsum("bcl,bcm->blm", q, k) / math.sqrt(size), 2)
            out[:, i * size : (i + 1) * size] = torch.einsum("blm,bcm->bcl", weight, v)
        kernel = w[f"{name}.proj_out.weight"][:, :, 0]
        out = torch.einsum("oc,bcl->bol", kernel, out) + w[f"{name}.proj_out.bias"][:, None]
        return (flat + out).reshape(b, c, side, side)

    freq = 10000.0 ** (-torch.arange(channels // 2) / (channels // 2))
    angle = time[:, None] * freq
    emb = linear("time_embed.0", torch.cat([angle.cos(), angle.sin()], 1))
    emb = linear("time_embed.2", silu(emb))
    if label is not None:
        emb = emb + w["label_emb.weight"][label]
    updown = flags.get("resblock_updown", False)
    h0 = conv("input_blocks.0.0", y)
    h1 = block("input_blocks.1.0", h0)
    h2 = block("input_blocks.2.0", h1, half) if updown else conv("input_blocks.2.0.op", h1, 2)
    h3 = attend("input_blocks.3.1", block("input_blocks.3.0", h2))
    h = attend("middle_block.1", block("middle_block.0", h3))
    h = block("middle_block.2", h)
    h = attend("output_blocks.0.1", block("output_blocks.0.0", torch.cat([h, h3], 1)))
    h = attend("output_blocks.1.1", block("output_blocks.1.0", torch.cat([h, h2], 1)))
    up = "output_blocks.1.2"
    h = block(up, h, double) if updown else conv(f"{up}.conv", double(h))
    h = block("output_blocks.2.0", torch.cat([h, h1], 1))
    h = block("output_blocks.3.0", torch.cat([h, h0], 1))
    return conv("out.2", silu(norm("out.0", h)))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"use_scale_shift_norm": False},
        {"resblock_updown": True, "num_head_channels": 16},
        {"use_new_attention_order": True},
        {"class_cond": True},
    ],
    ids=str,
)
def test_the_network_twice(change):
    """The same output by another statement of the architecture, for each flag that changes it."""
    flags = OPENAI | change
    network = random_network(flags).double()
    with seeded(2), torch.no_grad():
        y, time = torch.randn(2, 3, 8, 8).double(), torch.tensor([0.0, 731.0]).double()
        label = torch.tensor([5, 999]) if flags.get("class_cond") else None
        got = network(y, time, label)
        want = restated(network.state_dict(), y, time, flags, label)
    assert got.shape == (2, 6, 8, 8)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # sines are of float32


def test_schedules():
    """Linear β's scale with 1/T; the cosine's products are cos² up to where β is cut at 0.999."""
    betas = np.array(named_betas("linear", 4000))
    np.testing.assert_allclose([betas[0], betas[-1]], [2.5e-5, 0.005], rtol=1e-12)
    np.testing.assert_allclose(np.diff(betas), np.diff(betas)[0], rtol=1e-9)
    betas = np.array(named_betas("cosine", 50))
    t = np.arange(51) / 50
    alpha = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], alpha[1:-1] / alpha[0], rtol=1e-10)
    assert betas[-1] == 0.999


def their_step(output, z, e, betas, t):
    """Mean and log-variance of q and p of step t, from 0, by the tables of improved-diffusion."""
    alphas = np.cumprod(1 - betas)
    before = np.append(1.0, alphas[:-1])
    posterior = betas * (1 - before) / (1 - alphas)
    low = np.log(np.append(posterior[1], posterior[1:]))[t]
    of_e = (betas * np.sqrt(before) / (1 - alphas))[t]
    of_z = ((1 - before) * np.sqrt(1 - betas) / (1 - alphas))[t]
    noise, v = output[:, :3], output[:, 3:]
    x_hat = np.sqrt(1 / alphas[t]) * z - np.sqrt(1 / alphas[t] - 1) * noise
    share = (v + 1) / 2
    log_var = share * np.log(betas[t]) + (1 - share) * low
    return of_e * e + of_z * z, low, of_e * x_hat + of_z * z, log_var


@pytest.mark.parametrize("respacing", ["", "4"])
def test_learned_variance_by_their_formulas(respacing):
    """KL of every step, and mean and variance of the last, in numpy, also respaced."""
    flags = OPENAI | {"timestep_respacing": respacing}
    network = random_network(flags)
    found = build(network, flags)
    model, steps = found.model, found.times.steps
    betas = np.array(named_betas("cosine", 10))
    kept = list(range(10))
    if respacing:
        kept = [0, 3, 6, 9]
        products = np.cumprod(1 - betas)[kept]
        betas = 1 - products / np.append(1.0, products[:-1])
    assert steps == len(kept)
    x = images()
    e = model.embed(x)
    for i in range(steps):
        with seeded(3), torch.no_grad():
            z = torch.randn(e.shape, dtype=torch.float64)
            output = network(z.float(), torch.full((2,), 100.0 * kept[i])).double().numpy()
            t = torch.full((2,), (i + 1) / steps, dtype=torch.float64)
            mean_q, log_q, mean_p, log_p = their_step(output, z.numpy(), e.numpy(), betas, i)
            if i == 0:
                p = model.likelihood(z, t).base_dist
                np.testing.assert_allclose(p.loc.numpy(), mean_p, rtol=1e-6, atol=1e-9)
                np.testing.assert_allclose(2 * p.scale.log().numpy(), log_p, rtol=1e-6, atol=1e-9)
                continue
            s = torch.full((2,), i / steps, dtype=torch.float64)
            q = model.process.posterior(z, e, s, t)
            got = torch.distributions.kl_divergence(q, model.reverse(z, s, t))
        want = 0.5 * (log_p - log_q - 1 + np.exp(log_q - log_p))
        want = want + 0.5 * (mean_q - mean_p) ** 2 * np.exp(-log_p)
        np.testing.assert_allclose(got.numpy(), want.sum((1, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize(
    ("flags", "variance"),
    [({}, "large"), ({"sigma_small": True}, "small"), ({"learn_sigma": True}, "learned-range")],
)
def test_variances(flags, variance):
    """FIXED_LARGE unless sigma_small; learn_sigma wins over both."""
    flags = OPENAI | {"learn_sigma": False} | flags
    found = build(random_network(flags), flags)
    assert f"variance {variance}," in found.notes[0]
    with torch.no_grad():
        assert elbo(found.model, images(), found.times).elbo.isfinite().all()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_and_its_flags(tmp_path, suffix):
    """The bound from a file is that from memory; flags stand beside it."""
    from safetensors.torch import save_file

    network = random_network(OPENAI)
    file = tmp_path / f"ema_0.9999_500000.{suffix}"
    if suffix == "pt":
        torch.save(network.state_dict(), file)
    else:
        save_file(network.state_dict(), file)
    file.with_suffix(".json").write_text(json.dumps(OPENAI | {"use_kl": True, "dropout": 0.3}))
    found = load(f"openai:{file}", steps=5)
    assert found.weights == file.name and found.schema.shape == (3, 8, 8)
    bounds = []
    for model in (found.model, build(network, OPENAI, steps=5).model):
        with seeded(4), torch.no_grad():
            bounds.append(elbo(model, images(), found.times).elbo)
    assert torch.equal(*bounds)


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_channels_and_classes_are_those_of_the_weights(tmp_path, learn_sigma):
    """Grey digits of ten classes: the flags have no word for either."""
    flags = OPENAI | {"class_cond": True, "learn_sigma": learn_sigma}
    with seeded(0):
        network = UNet(architecture(check_flags(flags), channels=1, classes=10)).eval()
    torch.save({f"module.{k}": w for k, w in network.state_dict().items()}, tmp_path / "m.pt")
    (tmp_path / "m.json").write_text(json.dumps(flags))
    with pytest.raises(ValueError, match=r"10 classes; give a class in 0\.\.9.*label=N"):
        load(f"openai:{tmp_path}/m.pt,label=10")
    found = load(f"openai:{tmp_path}/m.pt,label=9,check=no")
    assert not found.model.check
    assert found.schema.shape == (1, 8, 8) and "'module.'" in found.notes[-1]
    with torch.no_grad():
        x = images()[:, :1]
        with seeded(3):
            got = elbo(found.model, x, found.times).elbo
        with seeded(3):
            same = build(network, flags, label=9, channels=1, classes=10)
            want = elbo(same.model, x, found.times).elbo
    assert torch.equal(got, want)


def test_classes():
    """P(x|class): the class is asked for and reaches the network."""
    flags = OPENAI | {"class_cond": True}
    network = random_network(flags)
    with pytest.raises(ValueError, match="1000 classes"):
        build(network, flags)
    with pytest.raises(ValueError, match=r"in 0\.\.999 .*got 1000"):
        build(network, flags, label=1000)
    with pytest.raises(ValueError, match="without classes"):
        build(random_network(OPENAI), OPENAI, label=1)
    model = build(network, flags, label=7).model
    y = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        got = model.network(y, torch.tensor([3.0, 9.0]))
        want = network(y, torch.tensor([200.0, 800.0]), torch.tensor([7, 7]))
    torch.testing.assert_close(got.movedim(-1, 1).flatten(1, 2), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"clip_denoised": True}, "another model than the one trained"),
        ({"classifier_scale": 1.0}, "guidance by a classifier"),
        ({"use_ddim": True}, "deterministic sampler"),
        ({"large_size": 256}, "super-resolution"),
        ({"num_chanels": 64}, "unknown key 'num_chanels' in the flags; known are image_size"),
        ({"num_channels": "64"}, "num_channels must be an integer; got '64' in the flags"),
        ({"learn_sigma": 1}, "learn_sigma must be true or false"),
        ({"num_channels": 40}, "multiples of 32; got 40"),
        ({"channel_mult": "0"}, "multiples of 32; got 0"),
        ({"num_channels": 0}, "num_channels must be at least 1; got 0"),
        ({"diffusion_steps": -1}, "diffusion_steps must be at least 1; got -1"),
        ({"num_heads_upsample": 0}, "num_heads_upsample must be positive, or -1"),
        ({"channel_mult": ""}, "image_size 8 needs channel_mult"),
        ({"attention_resolutions": "4;2"}, "attention_resolutions must be integers"),
        ({"noise_schedule": "linear"}, "betas must lie in (0, 1); number 5 is 1.11556"),
        ({"noise_schedule": "sqrt"}, "noise_schedule must be one of linear, cosine; got 'sqrt'"),
        ({"timestep_respacing": "ddim5"}, "deterministic sampler"),
        ({"timestep_respacing": "11"}, "has 10 steps"),
    ],
)
def test_flags_that_have_no_bound(change, words):
    flags = OPENAI | change
    with pytest.raises(ValueError) as error:
        build(UNet(architecture(check_flags(flags))), flags)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_two_repositories_differ_in_a_default():
    flags = {name: value for name, value in OPENAI.items() if name != "rescale_timesteps"}
    with pytest.raises(ValueError, match="improved-diffusion has it true"):
        check_flags(flags)
    check_flags(flags | {"diffusion_steps": 1000})


class Code:
    """An object of a hostile file."""

    def __reduce__(self):
        return (print, ("code was run",))


def test_files_that_are_no_weights(tmp_path, capsys):
    """Nothing in a file is run; what cannot be used is one sentence."""
    file = tmp_path / "model.pt"

    def refused(words, kind=ValueError):
        with pytest.raises(kind, match=words) as error:
            load(f"openai:{file}")
        assert "\n" not in str(error.value)

    refused("model.pt does not exist", FileNotFoundError)
    torch.save({"weights": Code()}, file)
    refused("model.json does not exist; write there the flags", FileNotFoundError)
    file.with_suffix(".json").write_text(json.dumps(OPENAI))
    refused("not a file of tensors")
    assert "code was run" not in capsys.readouterr().out
    file.write_bytes(b"nothing")
    refused("not a file of tensors")
    torch.save([torch.zeros(3)], file)
    refused("no state dict")
    torch.save(random_network(OPENAI | {"learn_sigma": False}).state_dict(), file)
    refused("another architecture")
    file.with_suffix(".json").write_text("[1]")
    refused("must be a JSON object")
    file.with_suffix(".json").write_text("{")
    refused("is not JSON")
    file.with_suffix(".json").unlink()
    refused("write there the flags", FileNotFoundError)
