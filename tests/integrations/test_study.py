"""The study of a model of diffusers: steps, variances, levels, and what a bad bound may mean."""

import json
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from support.commands import nelbo_fails, run_ok

from nelbo import Batch, evaluate, sample
from nelbo._utils.numerics import seeded
from nelbo.cli import main
from nelbo.diffusion.times import elbo
from nelbo.integrations import load
from nelbo.integrations.diffusers import build
from nelbo.report.figures import plot
from nelbo.report.sweep_figure import _against_steps, _over_time

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the schedule ends with signal left"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]
T, SIZE = 8, 4
UNET = {
    "sample_size": SIZE,
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}


class Constant(torch.nn.Module):
    """x̂ = 0.1 whatever is seen, with the config of a network."""

    def __init__(self):
        super().__init__()
        self.config = {"sample_size": SIZE, "in_channels": 3, "out_channels": 3}

    def forward(self, y, time, return_dict):
        return (torch.full_like(y, 0.1),)


def images(n=20):
    with seeded(1):
        return torch.randint(256, (n, 3, SIZE, SIZE))


def ddpm(**config):
    given = {"num_train_timesteps": T, "clip_sample": False, "beta_end": 0.6, "beta_start": 0.02}
    return diffusers.DDPMScheduler(**(given | config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    with seeded(0):
        network = diffusers.UNet2DModel(**UNET)
    network.save_pretrained(place / "unet")
    ddpm().save_pretrained(place / "scheduler")
    np.savez(place / "x.npz", x=images(10).numpy().astype(np.uint8))
    return place


def test_several_steps_side_by_side(folder, capsys):
    """Each row is the bound of `--steps` alone, from the fewest; one object with --json."""
    begin = ["evaluate", f"diffusers:{folder}", "--data", str(folder / "x.npz"), "--calls", "9"]
    run_ok(*begin, "--steps", "4,2", "--json")
    found = json.loads(capsys.readouterr().out)
    assert [each["steps"] for each in found["sweep"]] == [2, 4]
    for each in found["sweep"]:
        run_ok(*begin, "--steps", each["steps"], "--json")
        alone = json.loads(capsys.readouterr().out)
        assert {**alone, "notes": 0} == {**each, "notes": 0}
    run_ok(*begin, "--steps", "2,4")
    shown = capsys.readouterr()
    for each in found["sweep"]:
        value = f"{each['bits_per_dim']:.4f}"
        assert re.search(rf"{each['steps']} .*{re.escape(value)}", shown.out)
    assert "2 of 8 steps" in shown.err and "4 of 8 steps" in shown.err
    for wrong, words in (("4,x", "several as in 10,50,200"), ("4,4", "twice"), ("0,4", "steps")):
        assert words in nelbo_fails(capsys, *begin, "--steps", wrong)
    assert "give one number" in nelbo_fails(capsys, *begin, "--steps", "2,4", "--ode")
    assert "trained at 8 times only; leave --ode" in nelbo_fails(capsys, *begin[:-2], "--ode")
    assert "worse than uniform" not in shown.out


def test_several_steps_are_refused_before_the_work(folder, capsys):
    begin = ["evaluate", f"diffusers:{folder}", "--data", str(folder / "x.npz"), "--calls", "9"]
    with pytest.raises(SystemExit):
        main([*begin, "--steps", "5,21"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == "nelbo: the model has 8 steps, and 21 were asked for; try 8"
    with pytest.raises(ValueError, match="steps must be an integer or None; got '5,10'"):
        evaluate(f"diffusers:{folder}", images(), steps="5,10")


def test_a_picture_of_several_steps(folder, tmp_path, capsys):
    """Bound and terms against T; and what is spent up to t, which ends at all but the prior."""
    found = [evaluate(f"diffusers:{folder}", images(10), steps=steps, calls=9) for steps in (2, 8)]
    with plot(600, 300, 1, 2) as (_, [left, right]):
        _against_steps(left, found)
        _over_time(right, found)
        bounds = left.containers[0].lines[0].get_ydata()
        spent = [line.get_ydata() for line in right.lines]
    assert list(bounds) == [each.value for each in found]
    for each, line in zip(found, spent, strict=True):
        assert line[0] == pytest.approx(each.terms.reconstruction)
        assert line[-1] == pytest.approx(each.value - each.terms.prior)
    begin = ["evaluate", f"diffusers:{folder}", "--data", str(folder / "x.npz"), "--calls", "9"]
    run_ok(*begin, "--steps", "2,8", "--figure", str(tmp_path / "x.png"))
    assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"
    capsys.readouterr()
    wrong = ["--figure", str(tmp_path / "x.jpg")]
    assert "writes a .png" in nelbo_fails(capsys, *begin, "--steps", "2,8", *wrong)
    assert "several --steps" in nelbo_fails(capsys, *begin, "--steps", "2", *wrong)


def test_the_best_variance_is_fitted_to_other_images():
    """v = E(e - x̂)² of the images left out; each term is that of β̃ + (√α_s β/(1-α_t))² v."""
    x = images()
    found = build(Constant(), ddpm(prediction_type="sample"), variance="optimal")
    told = []
    chosen, _ = found.examples(x, tell=told.append)
    assert len(chosen) == 18 and torch.equal(
        torch.as_tensor(chosen).long(), x[[i for i in range(20) if i % 10 != 9]]
    )
    assert "fitted to the 2 images that were left out" in told[-1]
    e = x[[9, 19]].double() / 127.5 - 1
    v = (e - 0.1).square().mean()
    torch.testing.assert_close(found.model.step.errors, v.expand(T), rtol=1e-12, atol=0)
    with torch.no_grad(), seeded(2):
        got = elbo(found.model, chosen.long(), found.times)
    e = chosen.double() / 127.5 - 1
    alphas = np.cumprod(1 - np.linspace(0.02, 0.6, T, dtype=np.float32).astype(np.float64))
    diffusion = torch.zeros(len(e)).double()
    for t in range(1, T):
        s, beta = alphas[t - 1], 1 - alphas[t] / alphas[t - 1]
        tilde = beta * (1 - s) / (1 - alphas[t])
        of_x = math.sqrt(s) * beta / (1 - alphas[t])
        variance = tilde + of_x**2 * v
        gap = (of_x * (e - 0.1)) ** 2 / variance
        ratio = tilde / variance
        diffusion += 0.5 * (ratio - 1 - ratio.log() + gap).flatten(1).sum(1)
    torch.testing.assert_close(got.diffusion, diffusion, rtol=1e-5, atol=0)
    bounds = {
        variance: evaluate(
            (Constant(), ddpm(prediction_type="sample")), x, variance=variance, calls=9
        )
        for variance in ("small", "large", "optimal")
    }
    best = bounds["optimal"].bits_per_dim
    assert best < min(bounds["small"].bits_per_dim, bounds["large"].bits_per_dim) - 1


def test_the_best_variance_after_a_path(folder):
    x = images(10)
    found = load(f"diffusers:{folder},variance=optimal", steps=4)
    result = evaluate(found, x, calls=9)
    assert result.examples == 9 and "variance optimal" in result.notes[0]
    assert any("in the last, P(x|z_1)" in note for note in result.notes)
    worst = evaluate(f"diffusers:{folder}", x, steps=4, calls=9)
    assert result.bits_per_dim < worst.bits_per_dim
    with pytest.raises(ValueError, match="one example; give more"):
        evaluate(found, x[:1])
    with pytest.raises(ValueError, match="not a Batch"):
        evaluate(found, Batch(x))


def test_levels_after_a_path(folder):
    model = load(f"diffusers:{folder},levels=16").model
    torch.testing.assert_close(
        model.embed(torch.full((1, 3, SIZE, SIZE), 15)), torch.ones(1, 3, SIZE, SIZE).double()
    )
    half = load(f"diffusers:{folder},levels=5,scaling=0:1")
    assert half.schema.levels == 5 and half.model.process.embedding.low == 0


def test_a_bound_that_the_last_step_spends_says_what_to_look_at():
    """A constant x̂ has most of its cost where the variance is least."""
    from nelbo.evaluation.plausibility import worse_than_uniform

    pair = Constant(), ddpm(prediction_type="sample", beta_start=1e-4)
    small = evaluate(pair, images(), calls=9)
    line = worse_than_uniform(small, 256)
    assert "worse than uniform with 8 steps: 256" in line
    assert "last step, P(x|z_1)" in line and ",variance=optimal" in line
    best = evaluate(pair, images(), calls=9, variance="optimal")
    assert "last step" not in worse_than_uniform(best, 256)
    # P(x|z_1) as that of the best variance, and the cost in the first bin of the diffusion term
    part = replace(best, terms=replace(small.terms, reconstruction=best.terms.reconstruction))
    line = worse_than_uniform(replace(part, curve=small.curve), 256)
    assert (
        f"up to t = 0.25 takes {small.curve[0].value:.4g}" in line and ",variance=optimal" in line
    )


def test_autocast_is_asked_for_and_recorded(folder, capsys):
    """In every number of steps, and only where it was asked for; the number is near the other."""
    begin = ["evaluate", f"diffusers:{folder}", "--data", str(folder / "x.npz"), "--calls", "9"]
    found = {}
    for precision in ([], ["--precision", "bf16"]):
        run_ok(*begin, "--steps", "4", "--json", *precision)
        found[len(precision)] = json.loads(capsys.readouterr().out)
    assert found[0]["precision"] == "float64 around float32"
    assert found[2]["precision"] == "float64 around float32 with autocast to bfloat16"
    assert 0 < abs(found[2]["nats"] / found[0]["nats"] - 1) < 0.05
    assert any("autocast to bfloat16" in note for note in found[2]["notes"])
    model = load(f"diffusers:{folder}", precision="bf16").of_steps(2).model
    assert model.autocast == torch.bfloat16
    with pytest.raises(ValueError, match="the precision of diffusers: is bf16"):
        load(f"diffusers:{folder}", precision="fp16")


def test_a_time_that_the_network_does_not_take_is_named():
    """log(0) of a Fourier embedding is no fault of the data."""

    class Logarithm(torch.nn.Module):
        def forward(self, y, time):
            return y * time.double().log().reshape(-1, 1, 1, 1)

    betas = np.linspace(0.02, 0.99, 12)
    with pytest.raises(ValueError, match="not finite at the time 0; was it trained at that time"):
        evaluate(Logarithm(), images(), betas=betas, calls=24)


@pytest.mark.parametrize("home", ["", "scheduler"])
def test_a_folder_that_is_no_run_is_named_as_it_must_be(tmp_path, home):
    """Parts of a pipeline, saved without its index."""
    diffusers.DDPMScheduler().save_pretrained(tmp_path / home)
    with pytest.raises(FileNotFoundError, match=f"not a run.* give it as diffusers:{tmp_path}"):
        evaluate(tmp_path, np.zeros((2, 3, 8, 8), np.uint8))


@pytest.mark.parametrize("kind", ["pair", "module"])
def test_autocast_of_a_network_in_memory(kind, tmp_path):
    """As of a folder: recorded, noted and near the other; other options of files are refused."""
    with seeded(0):
        network = {
            "pair": diffusers.UNet2DModel(**UNET),
            "module": torch.nn.Conv2d(3, 3, 3, padding=1),
        }[kind]
    thing, options = (network, ddpm()), {}
    if kind == "module":
        thing, options = (lambda y, time: network(y.float())), {"betas": ddpm().betas}
    measured = partial(evaluate, thing, images(10), calls=9, **options)
    plain, narrow = measured(), measured(precision="bf16")
    assert plain.precision.startswith("float64") and "bfloat16" not in plain.precision
    assert narrow.precision.endswith("with autocast to bfloat16")
    assert 0 < abs(narrow.nats / plain.nats - 1) < 0.05
    assert any("autocast to bfloat16" in note for note in narrow.notes)
    with pytest.raises(ValueError, match=r"network in memory is bf16, by autocast.*got 'fp16'"):
        measured(precision="fp16")
    for wrong in ({"device_map": "auto"}, {"trust_remote_code": True}):
        with pytest.raises(ValueError, match="are for a model that is read from files"):
            measured(**wrong)
    state = {"resume": tmp_path / "state"}
    assert measured(**state).nats == plain.nats
    with pytest.raises(ValueError, match=r"its precision is its own, and now torch\.bfloat16"):
        measured(**state, precision="bf16")
    if kind == "pair":
        drawn = [sample(thing, 2, steps=2, precision=p) for p in (None, "bf16")]
        assert drawn[0].shape == drawn[1].shape and not np.array_equal(*drawn)
