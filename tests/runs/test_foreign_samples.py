"""Samples of other libraries' models: those of the model that is measured, and guided ones."""

import json

import numpy as np
import pytest
import torch
from support.commands import nelbo_fails, run_ok
from support.conditional import ddpm, dit, flow, text_unet
from support.transformers import text_encoder

import nelbo
from nelbo import TimeGrid, ancestral
from nelbo._utils.numerics import seeded
from nelbo.integrations import load, wrap
from nelbo.models.conditioning import Guided, guided
from nelbo.runs.foreign_samples import sampler_of

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the schedule ends with signal left"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]


def classes(folder, scheduler=ddpm):
    dit().save_pretrained(folder / "transformer")
    scheduler().save_pretrained(folder / "scheduler")
    return f"diffusers:{folder}"


def drawn(source, count=4, seed=3, **options):
    schema, draw, _ = sampler_of(source, **options)
    assert schema.shape == (3, 8, 8)
    return draw(count, seed, iter)


@pytest.mark.parametrize("steps", [3, None])
def test_they_are_draws_of_the_model_that_is_measured(tmp_path, steps):
    source = classes(tmp_path)
    found = load(source, steps=steps, condition=[3, 0, 10, 3])
    with torch.no_grad():
        want = ancestral(found.model, 4, found.times, seed=3, condition=found.condition.rows(4))
    x = drawn(source, steps=steps, condition=["3", "0", "10", "3"])
    assert torch.equal(x, want) and x.dtype == torch.long and x.min() >= 0 and x.max() < 256
    assert not torch.equal(x, drawn(source, steps=steps, condition="3"))


def test_guidance_is_that_of_the_network_with_and_without(tmp_path):
    """At each step x̂ is from f(z, none) + g (f(z, c) - f(z, none)); at g = 0 c has no part, and
    g = 1 changes nothing."""
    source = classes(tmp_path)
    one = {"steps": 3, "condition": "3"}
    none = drawn(source, steps=3, condition="10")
    assert torch.equal(drawn(source, guidance=0.0, **one), none)
    assert torch.equal(drawn(source, guidance=1.0, **one), drawn(source, **one))
    said = []
    strong = drawn(source, guidance=4.0, tell=said.append, **one)
    assert (
        not torch.equal(strong, drawn(source, **one))
        and "guidance 4: these samples are not draws" in said[0]
    )
    found = load(source, steps=3, condition=3)
    network = found.model.network

    class ByHand(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, features, level, condition):
            free = self.network(features, level, torch.full_like(condition, 10.0))
            return free + 4 * (self.network(features, level, condition) - free)

    found.model.network = ByHand()
    want = ancestral(found.model, 4, found.times, seed=3, condition=found.condition.rows(4))
    assert (strong - want).abs().max() <= 1  # rounding of float32 may pass a level's bound


def test_a_learned_variance_is_not_guided():
    """As in DiT, whose variance stays that of f(z, c)."""

    def network(features, level, condition):
        return torch.stack([features * condition[:, :1], features + condition[:, :1]], -1)

    z, c = torch.ones(2, 3), torch.tensor([[2.0], [3.0]])
    got = Guided(network, 5.0, torch.tensor([1.0]), variance=True)(z, torch.zeros(2), c)
    torch.testing.assert_close(got[..., 0], 1 + 5 * (c - 1).expand(2, 3))
    torch.testing.assert_close(got[..., 1], (1 + c).expand(2, 3))


@pytest.mark.parametrize("clip", [False, True])
def test_a_learned_variance_is_known_to_guidance(clip):
    """Clipping x̂ makes it no other variance."""
    shape, betas = (3, 4, 4), torch.linspace(0.02, 0.3, 5)
    options = {"variance": "learned-range", "clip": clip, "conditioned_on": "class"}
    model = wrap(lambda y, time, c: torch.cat([y, y], 1), shape, betas=betas, **options)
    assert guided(model, 2.0).network.variance


def test_prompts_are_guided_by_the_empty_one(tmp_path):
    text_encoder(tmp_path)
    text_unet().save_pretrained(tmp_path / "unet")
    ddpm().save_pretrained(tmp_path / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "vae": [None, None]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"]}
    index |= {"tokenizer": ["transformers", "CLIPTokenizer"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    source = f"diffusers:{tmp_path}"
    free = drawn(source, steps=3, condition="")
    assert torch.equal(drawn(source, steps=3, condition="a cat", guidance=0.0), free)
    assert not torch.equal(drawn(source, steps=3, condition="a cat", guidance=3.0), free)


def test_latents_are_decoded(tmp_path):
    """The images of a latent model are those that draws of its prior decode to."""
    with seeded(0):
        vae = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            norm_num_groups=2,
            latent_channels=3,
        )
    vae.save_pretrained(tmp_path / "vae")
    schema, draw, _ = sampler_of(f"{classes(tmp_path)},label=3", steps=3)
    assert schema.shape == (3, 16, 16)
    found = load(f"diffusers:{tmp_path},label=3", steps=3)
    with torch.no_grad():
        z = ancestral(found.model.prior, 2, TimeGrid.uniform(3), seed=1)
        image = vae.eval().decode(z.float()).sample
    want = ((image + 1) * 127.5).round().clamp(0, 255)
    assert (draw(2, 1, iter) - want).abs().max() <= 1


def test_in_python(tmp_path):
    source = classes(tmp_path)
    x = nelbo.sample(source, 3, 4, condition=3, guidance=2.0, seed=5)
    want = drawn(source, 3, 5, steps=4, condition=3, guidance=2.0)
    assert x.dtype == np.uint8 and np.array_equal(x, want.movedim(1, 3).numpy())


@pytest.mark.parametrize("sampler", ["ancestral", "flow"])
def test_the_command(tmp_path, sampler, capsys):
    source, out = classes(tmp_path, flow), tmp_path / "x.npz"
    begin = ["sample", source, "--condition", "3", "--n", "3", "--sampler", sampler]
    run_ok(*begin, "--steps", "4", "--guidance", "2", "--out", str(out))
    x = np.load(out)["x"]
    want = drawn(source, 3, 0, steps=4, condition="3", guidance=2.0, sampler=sampler)
    assert np.array_equal(x, want.numpy())
    assert "guidance 2: these samples are not draws from the model" in capsys.readouterr().err
    run_ok(*begin, "--steps", "2", "--out", str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "3"], "in .png or .npz; got none"),
        (["--steps", "3", "--out", "x.csv"], "a file --out that ends in .png or .npz"),
        (["--out", "x.npz"], "has no steps of its own; give a number, --steps 50"),
        (["--out", "x.npz", "--grid", "best"], "not for another library's model; leave"),
        (["--out", "x.npz", "--steps", "3", "--n", "0"], "number of samples must be at least 1"),
        (["--out", "x.npz", "--steps", "3", "--sampler", "greedy"], "must be one of ancestral, f"),
    ],
)
def test_what_is_refused(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    source = classes(tmp_path, flow)
    assert words in nelbo_fails(capsys, "sample", source, "--condition", "3", *options)
    capsys.readouterr()


def test_guidance_without_a_condition_is_refused(tmp_path):
    source = classes(tmp_path)
    with pytest.raises(ValueError, match="has no condition; give one, such as --condition 3"):
        sampler_of(f"{source},label=3", steps=3, guidance=2.0)
    text_unet().save_pretrained(tmp_path / "t" / "unet")
    ddpm().save_pretrained(tmp_path / "t" / "scheduler")
    with pytest.raises(ValueError, match="lacks: a DiT has a class for it"):
        sampler_of(
            f"diffusers:{tmp_path / 't'}", steps=3, guidance=2.0, condition=np.zeros((1, 4, 12))
        )


def test_every_form_of_a_model_has_the_same_numbers(tmp_path):
    """Its folder, what `load` returns, and a pipeline: samples, bounds, scores, steps, a page."""
    network = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipeline = diffusers.DDPMPipeline(network, ddpm())
    pipeline.save_pretrained(tmp_path / "m")
    source = f"diffusers:{tmp_path / 'm'}"
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    forms = [source, load(source), pipeline]
    for verb, key in (
        (lambda form: nelbo.sample(form, 2, 3, seed=1).tolist(), "sample"),
        (lambda form: nelbo.elbo(form, x, steps=3, calls=16).elbo.tolist(), "elbo"),
        (lambda form: nelbo.score(form, x, steps=3, calls=8).nats.tolist(), "score"),
        (lambda form: [e.nats for e in nelbo.sweep(form, [2, 3], x, calls=8)], "sweep"),
        (lambda form: nelbo.evaluate(form, x, steps=3, calls=8).nats, "evaluate"),
    ):
        first, *others = map(verb, forms)
        assert others == [first, first], key
    page = nelbo.report(pipeline, tmp_path / "page.html", data=x, steps=3, calls=4)
    assert "DDPMPipeline" in page.read_text()


def test_a_wrapped_network_is_sampled_in_its_own_steps():
    with seeded(2):
        network = torch.nn.Conv2d(3, 3, 1)
    model = wrap(lambda y, time: network(y.float()).double(), (3, 4, 4), betas=[0.1, 0.2, 0.4])
    with torch.no_grad():
        want = ancestral(model, 2, TimeGrid.uniform(3), seed=5)
    x = nelbo.sample(model, 2, seed=5)
    assert x.dtype == np.uint8 and (x == want.movedim(1, -1).numpy()).all()
    with pytest.raises(ValueError, match=r"a network alone says neither .* nelbo.wrap\(network"):
        nelbo.sample(lambda y, time: y, 2)


def test_a_pair_is_looked_at_before_it_is_sampled():
    """There are no examples; an output that follows pure noise is no velocity."""

    class Noise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = {"sample_size": 4, "in_channels": 3, "out_channels": 3}

        def forward(self, y, time, return_dict):
            return (y,)

    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    with pytest.raises(ValueError, match=r'slope 1.00.*predicts="velocity".*predicts="flow"'):
        nelbo.sample((Noise(), scheduler), 2, steps=3)
