"""Exact networks of every kind, read in every way: the right reading passes, others are named."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from nelbo import Batch, TimeGrid, evaluate
from nelbo.diffusion.gaussian import Affine, Levels
from nelbo.diffusion.schedules import Linear
from nelbo.integrations import wrap
from nelbo.integrations.adapters import EDM, exploding
from nelbo.integrations.probe import probe

pytestmark = pytest.mark.filterwarnings("ignore:the schedule ends with signal left")
SIDE, T, DATA = 8, 40, 0.5
SHAPE = (1, SIDE, SIDE)
BETAS = np.linspace(0.005, 0.4, T)
ALPHAS = torch.tensor(np.cumprod(1 - BETAS))
SIGMAS = ((1 - ALPHAS) / ALPHAS).sqrt()
TAUS = SIGMAS / (1 + SIGMAS)


def blobs(count=200):
    """Blobs of light of any place, width and contrast, so that a paler one is as likely."""
    random = torch.Generator().manual_seed(3)
    at, contrast, width = torch.rand(4, count, 1, 1, generator=random).split([2, 1, 1])
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    far = (y - 7 * at[0]).square() + 0.6 * (x - 7 * at[1]).square()
    light = (0.3 + 0.7 * contrast[0]) * (-far / (2 * (1.3 + width[0]).square())).exp()
    return (40 + 215 * light)[:, None].round().long()


BLOBS = blobs()


class Exact(nn.Module):
    """The exact denoiser of noisy `BLOBS`, in the inputs and outputs of a training.

    Args:
        kind: output, and convention where it is not that of β's.
        sigma_data: of EDM.
        own: standard deviation of the noise of the data; a larger one than theirs is as if the
            network were half trained.
    """

    def __init__(self, kind, sigma_data=DATA, own=0.05):
        super().__init__()
        self.register_buffer("data", BLOBS.double() / 127.5 - 1)
        self.output, _, self.convention = kind.partition(" of ")
        self.sigma_data, self.own = sigma_data, own

    def signal_and_noise(self, time):
        if self.convention == "sigmas" or self.output == "edm":
            sigma = time.clamp(min=1e-3) if self.convention else (4 * time).exp()
            return torch.ones_like(sigma), sigma
        if self.output == "flow":
            tau = (1 - time if self.convention == "reversed" else time).clamp(1e-3, 1)
            return 1 - tau, tau
        alpha = ALPHAS[time.long()]
        return alpha.sqrt(), (1 - alpha).sqrt()

    def forward(self, y, time):
        a, b = (v.reshape(-1, 1, 1, 1).double() for v in self.signal_and_noise(time))
        c_in = (b**2 + self.sigma_data**2).rsqrt()
        y = y / c_in if self.output == "edm" else y
        own = self.own
        variance = a**2 * own**2 + b**2
        # of |y - a x|², the part that is not the same for all blobs
        data, a_flat = self.data.flatten(1), a.flatten(1)
        far = a_flat**2 * data.square().sum(1) - 2 * a_flat * (y.flatten(1) @ data.T)
        mean = ((-far / (2 * variance.flatten(1))).softmax(1) @ data).view_as(y)
        x = mean + a * own**2 / variance * (y - a * mean)
        noise = (y - a * x) / b
        flow = noise - x
        return {
            "noise": noise,
            "data": x,
            "velocity": a * noise - b * x,
            "score": -noise / b,
            "flow": -flow if self.convention == "reversed" else flow,
            "edm": (x - (self.sigma_data * c_in) ** 2 * y) / (b * self.sigma_data * c_in),
        }[self.output]


VP = [
    (word, {"predicts": word, "betas": BETAS}) for word in ("noise", "data", "velocity", "score")
]
SAID = {
    **dict(VP),
    "flow of betas": {"predicts": "flow", "betas": BETAS},
    "edm of betas": {"predicts": "edm", "betas": BETAS, "sigma_data": DATA},
    "noise of sigmas": {"predicts": "noise", "sigmas": SIGMAS},
    "data of sigmas": {"predicts": "data", "sigmas": SIGMAS},
    "score of sigmas": {"predicts": "score", "sigmas": SIGMAS},
    "edm": {"predicts": "edm", "sigmas": SIGMAS, "sigma_data": DATA},
    "flow": {"predicts": "flow", "sigmas": TAUS},
    "noise of taus": {"predicts": "noise", "sigmas": TAUS},
    "edm of taus": {"predicts": "edm", "sigmas": TAUS, "sigma_data": DATA},
}
KINDS = [*dict(VP), "noise of sigmas", "data of sigmas", "score of sigmas", "edm", "flow"]
#: what was said is right, though in other words
RIGHT = {
    ("edm", "edm of betas"),
    ("edm", "edm of taus"),  # F is one of any σ, and these are some
    ("noise of sigmas", "noise of taus"),
}
#: the noise levels that were given are wrong, and those of the training unknown
UNKNOWN = {(kind, f"{said} of taus") for kind in dict(VP) for said in ("noise", "edm")}
#: x̂ shows in spite of them, though at one level it is no better than a line
UNKNOWN -= {("data", "edm of taus"), ("data", "noise of taus")}
#: both are (y - x)/time: told apart by how pale a blob may be, which is too little to be certain
DOUBTFUL = {("noise of sigmas", "flow")}


@pytest.fixture(autouse=True)
def no_noise(monkeypatch):
    """Leave the probe without data out: the examples must do."""
    monkeypatch.setattr("nelbo.integrations.probe._at_noise", lambda model: [])


def read(network, **said):
    return probe(wrap(network, SHAPE, **said), Batch(BLOBS[:48]))


def refused(network, words, **said):
    with pytest.raises(ValueError, match=f"read wrongly: read as {words}"):
        read(network, **said)


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_read_in_every_way(kind, said):
    network = Exact(kind)
    if kind == said or (kind, said) in RIGHT:
        assert read(network, **SAID[said]) == []
    elif (kind, said) in UNKNOWN:
        (note,) = read(network, **SAID[said])
        assert "no other reading that was tried fits" in note
    elif (kind, said) in DOUBTFUL:
        (note,) = read(network, **SAID[said])
        assert f'may be read wrongly: as predicts="{kind.split()[0]}"' in note
    else:
        refused(network, f'predicts="{kind.split()[0]}"', **SAID[said])


@pytest.mark.parametrize("said", ["noise", "flow", "edm", "noise of taus"])
def test_a_flow_from_noise_to_data_is_named(said):
    """τ counts from the noise, and the output is x - ε, as in much code for flow matching."""
    words = r'predicts="flow" of y = \(1-τ\) x \+ τ ε, with the time input 1 - τ of minus'
    refused(Exact("flow of reversed"), words, **SAID[said])


def test_a_scheduler_s_time_inputs_of_a_flow_are_named():
    exact = Exact("flow")
    said = {"predicts": "velocity", "alphas": torch.linspace(0.999, 0.001, 1000)}
    words = r'predicts="flow" of y = \(1-τ\) x \+ τ ε, with the time input 1000 τ'
    refused(lambda y, time: exact(y, time / 1000), words, **said)


@pytest.mark.parametrize("said", ["flow", "edm", "noise of sigmas"])
@pytest.mark.parametrize("kind", ["noise", "velocity"])
def test_the_usual_betas_are_tried_where_none_were_given(kind, said):
    class Usual(Exact):
        def signal_and_noise(self, time):
            alpha = torch.linspace(1 - 1e-4, 0.98, 1000).double().cumprod(0)[time.long()]
            return alpha.sqrt(), (1 - alpha).sqrt()

    words = f'predicts="{kind}" of y = √α x .*time inputs 0..999 of β from 0.0001 to 0.02'
    refused(Usual(kind), words, **SAID[said])


@pytest.mark.parametrize("true", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 3.0])
def test_sigma_data_is_named(true, ratio):
    """Far off it is refused, a little off it is noted, by about the right value."""
    said = {"predicts": "edm", "sigma_data": true * ratio, "sigmas": np.geomspace(0.02, 80, 30)}
    try:
        notes = read(Exact("edm", true), **said)
    except ValueError as error:
        notes = [str(error)]
        assert "seems to be read wrongly" in notes[0]
    else:
        assert 0.7 <= ratio <= 1.4 and len(notes) == (ratio != 1)
    for note in notes:
        named = float(note.partition('predicts="edm" with sigma_data=')[2].partition(",")[0])
        assert abs(np.log(named / true)) < min(0.2, abs(np.log(ratio)))


@pytest.mark.parametrize("takes", ["log(σ)/4", "σ"])
def test_the_time_input_of_edm_is_named(takes):
    """Some F take σ itself; with the other of the two, no other sigma_data is the cause."""
    exact, logs = Exact("edm"), SIGMAS.log() / 4
    said = {**SAID["edm"], "times": SIGMAS if takes != "σ" else logs}
    words = rf'predicts="edm" with sigma_data=0.5, with the time input {re.escape(takes)}'
    refused(
        lambda y, t: exact(y, t if takes != "σ" else t.clamp(min=1e-9).log() / 4), words, **said
    )


LINE = Linear(-10, 10)  # γ of a network in continuous time
FREE = {
    "noise of sigmas": {
        "predicts": "noise",
        "times": lambda gamma: (gamma / 2).exp(),
        "factor": exploding,
    },
    "flow": {"predicts": "flow"},
    "edm": {"predicts": "edm", "sigma_data": DATA},
}


@pytest.mark.parametrize("said", FREE)
@pytest.mark.parametrize("kind", FREE)
def test_in_continuous_time(kind, said):
    network, told = Exact(kind), FREE[said] | {"schedule": LINE}
    if kind == said:
        assert read(network, **told) == []
    elif (kind, said) in DOUBTFUL:
        assert "may be read wrongly" in read(network, **told)[0]
    else:
        refused(network, f'predicts="{kind.split()[0]}"', **told)


@pytest.mark.parametrize("said", SAID)
def test_random_weights_are_measured_with_a_note(said):
    """A network that is not trained fits no reading, and no reading is called right."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1)
    )
    (note,) = read(lambda y, time: network.double()(y), **SAID[said])
    assert "no other reading that was tried fits" in note


@pytest.mark.parametrize("kind", ["velocity", "noise of sigmas"])
def test_a_half_trained_network_is_measured_with_a_note(kind):
    """Another reading fits better by chance, but not well: a slow average of few steps is so."""
    exact = Exact(kind)
    (note,) = read(lambda y, time: exact(y, time) / 2, **SAID[kind])
    assert "the network may be read wrongly" in note


@pytest.mark.parametrize("kind", ["noise", "velocity"])
def test_outputs_that_are_a_quarter_too_small_are_measured_with_a_note(kind):
    """Those of an average of weights that lags; another reading fits, and at that size worse."""
    exact = Exact(kind)
    (note,) = read(lambda y, time: 0.75 * exact(y, time), **SAID[kind])
    assert f'may be read wrongly: as predicts="{kind}" of y = x + σ ε' in note


def test_half_trained_where_noise_is_larger_than_the_data():
    """An error of five lines, and another reading that fits: still, half of the noise is found."""
    exact, scaling = Exact("noise of sigmas"), Levels(256, -0.31, 0.69)
    exact.data = scaling(BLOBS)
    (note,) = read(lambda y, time: exact(y, time) / 2, scaling=scaling, **SAID["noise of sigmas"])
    assert 'may be read wrongly: as predicts="edm"' in note and "as given 4.9 times" in note


@pytest.mark.parametrize("said", ["noise", "velocity", "flow", "score of sigmas"])
def test_a_half_trained_network_that_is_read_wrongly_is_refused(said):
    """It has 0.6 times the error of a line as it was trained, and as given more than no output."""
    exact, words = Exact("edm"), r'predicts="edm" with sigma_data=0.5.* it has 0\.5\d times'
    refused(lambda y, time: exact(y, time) / 2, words, **SAID[said])


HALF = {"own": 0.35}  # 0.55 times the error of a line, read as it was trained


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("flow", "noise"),
        ("flow", "velocity"),
        ("velocity", "flow of betas"),
        ("noise of sigmas", "noise"),
        ("noise of sigmas", "velocity"),
        ("data", "velocity"),
    ],
)
def test_a_half_trained_network_is_refused_where_another_reading_is_better_by_a_factor(kind, said):
    """Though it has more than half of the error of a line."""
    refused(Exact(kind, **HALF), f'predicts="{kind.split()[0]}"', **SAID[said])


@pytest.mark.parametrize("kind", ["noise", "velocity", "noise of sigmas"])
def test_the_scaling_of_a_half_trained_network_is_named(kind):
    said = SAID[kind] | {"scaling": Levels(256, 0, 1)}
    refused(Exact(kind, **HALF), r"levels scaled to \[-1, 1\]", **said)


@pytest.mark.parametrize("kind", KINDS)
def test_a_half_trained_network_that_is_read_rightly_is_measured(kind):
    read(Exact(kind, own=0.25), **SAID[kind])


@pytest.mark.filterwarnings("ignore:the output has the slope")
@pytest.mark.parametrize(
    "said",
    [
        {"betas": BETAS},
        {"betas": BETAS, "keep": [3], "decoder": "evidence"},
        {"betas": BETAS, "keep": [0, 39]},
        {"betas": [*BETAS, 1.0], "predicts": "velocity"},  # no signal at the last time
        {"betas": BETAS, "predicts": "mean"},
        {"betas": BETAS, "scaling": Affine(torch.arange(5.0), 2.0)},
        {"sigmas": [0.5, 1.0], "predicts": "flow"},
        {"sigmas": [0.5, 1.0, 90.0], "predicts": "edm", "sigma_data": 1e-3},
        {"sigmas": [0.5, 1.0, 90.0], "predicts": EDM(0.5, -1.0)},
    ],
)
@pytest.mark.parametrize("count", [1, 9])
def test_few_times_few_examples_and_rows_of_numbers(said, count):
    model = wrap(lambda z, time: torch.sin(z), (5,), **said)
    random = torch.Generator().manual_seed(0)
    x = torch.randint(256, (count, 5), generator=random)
    notes = probe(model, Batch(x.double() if model.density else x))
    assert all("no other reading that was tried fits" in note for note in notes)


class Low(nn.Module):
    """An exact network with weights of low precision, and a condition that it needs."""

    def __init__(self, kind):
        super().__init__()
        self.exact = Exact(kind)
        self.one = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

    def forward(self, y, time, condition=None):
        assert condition is None or condition.shape == (len(y), 2)
        return self.exact(y.double() * self.one, time.double()).to(y.dtype)


def test_weights_of_low_precision():
    assert read(Low("noise"), **SAID["noise"]) == []
    refused(Low("flow"), 'predicts="flow"', **SAID["noise"])


def test_a_condition_reaches_the_network():
    batch = Batch(BLOBS[:48], torch.ones(48, 2))
    right = wrap(Low("velocity"), SHAPE, conditioned_on="class", **SAID["velocity"])
    assert probe(right, batch) == []
    wrong = wrap(Low("score"), SHAPE, conditioned_on="class", **SAID["velocity"])
    with pytest.raises(ValueError, match='read as predicts="score"'):
        probe(wrong, batch)


def test_a_network_that_takes_no_other_times_is_read():
    """Places in a table of embeddings: a call with other inputs may fail, and is left out."""
    exact = Exact("noise")

    def network(y, time):
        if time.is_floating_point():
            raise KeyError("times are places in a table")
        return exact(y, time)

    assert read(network, **SAID["noise"]) == []
    refused(network, 'predicts="noise"', **SAID["velocity"])


@pytest.mark.parametrize("keep", [None, [37, 38, 39]])
def test_whole_times_are_not_exceeded(keep):
    """A place beyond a table of embeddings would end the work on a GPU; σ is 90 at the last."""
    told = []
    exact = Exact("noise")
    read(lambda y, time: told.append(time) or exact(y, time), **SAID["noise"], keep=keep)
    times = torch.cat([time.double() for time in told])
    assert times.trunc().min() >= 0 and times.max() <= T - 1


def test_a_learned_variance_and_a_clipped_prediction():
    def wide(y, time):
        return torch.cat([exact(y, time), torch.zeros_like(y)], 1)

    exact = Exact("noise")
    for options in ({"variance": "learned-range"}, {"variance": "learned-range", "clip": True}):
        assert read(wide, **SAID["noise"], **options) == []
        refused(wide, 'predicts="noise"', **SAID["velocity"], **options)


def test_the_rows_of_the_check_are_counted():
    """By the network itself; they come on top of those of the bound."""
    calls, network = [], Exact("noise")
    network.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    model = wrap(network, SHAPE, **SAID["noise"])
    for options in (
        {"calls": 8},
        {"importance_samples": 2},
        {"importance_samples": 2, "own_samples": 3},
    ):
        calls.clear()
        found = evaluate(model, BLOBS[:5], times=TimeGrid.uniform(T), **options)
        assert found.calls_per_example * found.examples == pytest.approx(sum(calls))
    calls.clear()
    probe(model, Batch(BLOBS[:5]))
    checked = sum(calls)
    found = evaluate(model, BLOBS[:5], times=TimeGrid.uniform(T), calls=8)
    assert 8 * 16 <= checked <= 8 * 40 and found.calls_per_example - checked / 5 <= 8
