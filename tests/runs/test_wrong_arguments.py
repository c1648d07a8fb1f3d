"""Whatever is given for an argument of a public function: a result, or one sentence of ours."""

import inspect
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from support.runs import TINY
from torch import nn

import nelbo
from nelbo import integrations
from nelbo.diffusion.gaussian import Levels
from nelbo.diffusion.uniform import UniformDiffusion

SOURCE = str(Path(nelbo.__file__).parent)
WRONG = (None, "", "8", -1, 0, 1.5, True, float("nan"), [], {}, np.int64(3), object())
BETAS = torch.linspace(0.1, 0.5, 4)
X = np.random.default_rng(0).integers(0, 17, (6, 8, 8)).astype(np.uint8)


class Ids(nn.Module):
    """From six ids to as many logits."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 6)

    def forward(self, ids):
        return self.table(ids)


def zero(z, t):
    return z * 0


def wrapped():
    return nelbo.wrap(zero, (1, 8, 8), betas=BETAS, scaling=Levels(17, -1, 1))


@pytest.fixture(scope="module")
def run(trained):
    return nelbo.load(trained)


def schedule():
    return wrapped().process.schedule


#: a function and arguments that it takes, of a run
CALLS = {
    "wrap": lambda run: (nelbo.wrap, {"network": zero, "shape": (1, 8, 8), "betas": BETAS}),
    "toy": lambda run: (nelbo.toy, {"betas": [0.1, 0.2], "f": zero}),
    "ancestral": lambda run: (nelbo.ancestral, {"model": wrapped(), "count": 2, "times": 2}),
    "TimeGrid": lambda run: (nelbo.TimeGrid, {"times": [0.5, 1.0]}),
    "TimeGrid.uniform": lambda run: (nelbo.TimeGrid.uniform, {"steps": 2}),
    "ContinuousTime": lambda run: (nelbo.ContinuousTime, {}),
    "MaskedDiffusion": lambda run: (nelbo.MaskedDiffusion, {"schedule": schedule(), "count": 3}),
    "UniformDiffusion": lambda run: (UniformDiffusion, {"schedule": schedule(), "count": 3}),
    "GaussianDiffusion": lambda run: (nelbo.GaussianDiffusion, {"schedule": schedule()}),
    "Batch": lambda run: (nelbo.Batch, {"x": torch.zeros(2, 1, 8, 8)}),
    "inspect": lambda run: (nelbo.inspect, {"data": X}),
    "load": lambda run: (nelbo.load, {"path": run.path}),
    "integrations.load": lambda run: (integrations.load, {"source": "diffusers:nowhere"}),
    "wrap_tokens": lambda run: (integrations.wrap_tokens, {"module": Ids(), "mask_id": 5}),
    "to": lambda run: (run.to, {"device": "cpu"}),
    "examples": lambda run: (run.examples, {}),
    "elbo": lambda run: (nelbo.elbo, {"run": wrapped(), "data": X, "calls": 16}),
    "report": lambda run: (nelbo.report, {"run": "nowhere"}),
    "explain": lambda run: (nelbo.explain, {"run": "nowhere"}),
    "resume": lambda run: (nelbo.resume, {"out": "nowhere"}),
    "decompress": lambda run: (nelbo.decompress, {"run": run, "file": "nowhere.nlb"}),
    "compress": lambda run: (nelbo.compress, {"run": run, "data": X, "out": "x", "steps": 2}),
}
#: which train, draw or measure for what they accept
SLOW = {
    "evaluate": lambda run: (nelbo.evaluate, {"run": wrapped(), "data": X, "calls": 8}),
    "train": lambda run: (nelbo.train, {"data": X, "out": run.path, **TINY}),
    "run.evaluate": lambda run: (run.evaluate, {"data": X, "calls": 8}),
    "sweep": lambda run: (nelbo.sweep, {"run": run, "steps": [2], "data": X, "calls": 8}),
    "sample": lambda run: (nelbo.sample, {"run": run, "n": 2, "steps": 2}),
    "score": lambda run: (nelbo.score, {"run": run, "data": X}),
}
EACH = [
    *CALLS.items(),
    *(pytest.param(name, make, marks=pytest.mark.slow) for name, make in SLOW.items()),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "make"), EACH, ids=[*CALLS, *SLOW])
def test_a_wrong_value_is_answered_in_a_sentence(name, make, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, arguments = make(run)
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        for value in WRONG:
            try:
                call(**{**arguments, parameter.name: value})
            except (ValueError, TypeError, OSError) as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                told = f"{parameter.name}={value!r}: {error} ({where.filename}:{where.lineno})"
                assert where.filename.startswith(SOURCE), told
                assert str(error) and "\n" not in str(error), told
                assert type(error) is not TypeError, told


@pytest.mark.filterwarnings("ignore:the schedule ends with signal left")
def test_calls_that_were_guessed(run):
    """Each failed within a library, or blamed something else."""
    tokens = integrations.wrap_tokens(Ids(), mask_id=5)
    image, pixels = wrapped(), X[:, None]
    for call, says in (
        (lambda: nelbo.evaluate(run, calls="8"), "calls must be a finite number or None; got '8'"),
        (lambda: run.evaluate(importance_samples=1.5), "importance_samples must be an integer"),
        (lambda: run.to(None), "device must be a string; got None"),
        (lambda: nelbo.evaluate(tokens, []), "there is no text to measure"),
        (
            lambda: integrations.wrap_tokens(zero),
            "module must be a torch Module; got <function",
        ),
        (lambda: run.sample(steps="5,10"), "steps must be an integer or None; got '5,10'"),
        (lambda: nelbo.evaluate(Ids(), X, scheduler="ddpm"), "scheduler is a scheduler of diffu"),
        (
            lambda: nelbo.evaluate(image, pixels / 17.0),
            "0.* is not one of the 17 levels|integers 0..16, not scaled",
        ),
        (
            lambda: nelbo.evaluate(image, pixels),
            r"knows 4 times, .* steps=4, TimeGrid.uniform\(4\)",
        ),
        (
            lambda: nelbo.train("to be " * 99, "here"),
            r"a text of 594 characters .* as in \[text\]",
        ),
        (
            lambda: nelbo.inspect({"a": 1}),
            "the column 'a' of the table is the one value 1; give a",
        ),
        (lambda: run.evaluate(X, split="train"), "no splits; leave split out; got 'train'"),
        (lambda: nelbo.train(X, network=zero), "function without arguments .* missing a required"),
        (lambda: nelbo.evaluate(run.model, X, times=2, steps=2), "got steps=2 and times=2"),
        (lambda: nelbo.evaluate(run, X[:0]), r"the data is empty: its shape is \(0, 8, 8\)"),
        (lambda: nelbo.evaluate(image, pixels[:0]), "at least one example to evaluate; got none"),
        (lambda: nelbo.inspect(run.path), "is a run and not data; evaluate and report take it"),
        (lambda: run.evaluate(run.path), "is a run and not data"),
        (lambda: nelbo.train(run.path, "q"), "is a run and not data"),
        (lambda: run.decompress(__file__), "wrong_arguments.py: not a compressed file of nelbo"),
        (
            lambda: nelbo.train(X, "q", levels=5),
            "; rescale it, .* levels 17 or more",
        ),
        (lambda: nelbo.train("digits", "q", size=4), "^size resizes encoded images"),
        (lambda: nelbo.sample(run, guidance=2.0), "; train one with condition NAME"),
        (lambda: nelbo.train(X, "q", schedule="Linear"), "; did you mean 'linear'[?]$"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    with pytest.raises(TypeError, match="no argument step; did you mean steps"):
        nelbo.evaluate(run, step=8)
    with pytest.raises(TypeError, match=r"call decompress\(run, file\); got \('a.nlb'\)"):
        nelbo.decompress("a.nlb")
    assert nelbo.sample(run=run, n=2, steps=2).shape == (2, 8, 8)


def test_a_network_and_its_scheduler_are_a_pair():
    diffusers = pytest.importorskip("diffusers")
    sizes = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = diffusers.UNet2DModel(sample_size=8, layers_per_block=1, **sizes, **blocks)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=10, clip_sample=False)
    x = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
    pair = nelbo.evaluate((unet, scheduler), x, calls=4)
    assert nelbo.evaluate(unet, x, calls=4, scheduler=scheduler).nats == pair.nats
    with pytest.raises(ValueError, match=r"as one of betas, .* or a scheduler of diffusers"):
        nelbo.evaluate(unet, x, steps=5)
    for wrong in (scheduler, (scheduler, unet), (unet, scheduler, None)):
        for given in ({}, {"condition": [0, 1, 0, 1]}, {"clip": False}):
            with pytest.raises(
                ValueError, match=r"as \(network, scheduler\), and one of latents as"
            ):
                nelbo.evaluate(wrong, x, **given)
