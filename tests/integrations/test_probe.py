"""A network that is read wrongly is refused, by its errors on the examples."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from nelbo import Batch, TimeGrid, evaluate
from nelbo._utils.numerics import seeded
from nelbo.diffusion.gaussian import Affine, Levels
from nelbo.integrations import wrap
from nelbo.integrations.probe import ReadingError, _verdict, probe

SHAPE, T = (3, 4, 4), 40
BETAS = np.linspace(0.005, 0.4, T)
ALPHAS = torch.tensor(np.cumprod(1 - BETAS))


def images(n=6):
    """Smooth images, unlike their transposes and negatives."""
    with seeded(5):
        ramp = torch.linspace(0, 180, 4)[:, None] + torch.randint(70, (n, 3, 1, 4))
    return ramp.long()


class Trained(nn.Module):
    """The exact denoiser of `images`, in the words of a training."""

    def __init__(self, predicts="noise", low=-1.0, high=1.0, turned=False, sign=1.0):
        super().__init__()
        data = images().double() / 255 * (high - low) + low
        self.register_buffer("data", data.transpose(-1, -2) if turned else data)
        self.predicts, self.sign = predicts, sign

    def forward(self, z, time):
        alpha = ALPHAS[time.long()].reshape(-1, 1, 1, 1)
        a, b = alpha.sqrt(), (1 - alpha).sqrt()
        far = (z[:, None] - a[:, None] * self.data).square().flatten(2).sum(2)
        weight = (-far / (2 * b.flatten()[:, None] ** 2)).softmax(1)
        x = torch.einsum("bk,kchw->bchw", weight, self.data)
        noise = (z - a * x) / b
        said = {"noise": noise, "data": x, "velocity": a * noise - b * x, "flow": noise - x}
        return self.sign * said[self.predicts]


def read(network, **reading):
    """The notes of a probe, with the noise alone if a condition keeps `wrap` from it."""
    model = wrap(network, SHAPE, betas=BETAS, **reading)
    return probe(model, Batch(images()))


@pytest.fixture(autouse=True)
def no_noise(monkeypatch):
    """Leave the probe without data out: the examples must do."""
    monkeypatch.setattr("nelbo.integrations.probe._at_noise", lambda model: [])


@pytest.mark.parametrize("predicts", ["noise", "data", "velocity", "flow"])
@pytest.mark.parametrize("said", ["noise", "data", "velocity", "flow"])
def test_what_is_predicted_shows(predicts, said):
    """At the same inputs, y = √α x + √(1-α) ε."""
    network = Trained(predicts)
    if predicts == said:
        assert read(network, predicts=said, factor=torch.ones_like) == []
    else:
        with pytest.raises(ValueError, match=f'read as predicts="{predicts}"'):
            read(network, predicts=said, factor=torch.ones_like)


@pytest.mark.parametrize("predicts", ["noise", "velocity"])
def test_a_changed_sign_shows(predicts):
    with pytest.raises(ValueError, match=f'predicts="{predicts}" of minus the output'):
        read(Trained(predicts, sign=-1.0), predicts=predicts)


def test_edm_is_told_apart_from_its_negative_and_from_noise():
    """With σ_data = 1, F of EDM is minus the velocity."""
    edm = {"predicts": "edm", "sigma_data": 1.0}
    assert read(Trained("velocity", sign=-1.0), **edm, times=np.arange(T)) == []
    for network, words in (
        (Trained("velocity"), 'predicts="edm" of minus the output'),
        (Trained("noise"), 'predicts="noise"'),
    ):
        with pytest.raises(ValueError, match=words):
            read(network, **edm, times=np.arange(T))


@pytest.mark.parametrize("low", [0.0, -1.0, -0.5])
@pytest.mark.parametrize("said", [0.0, -1.0])
def test_the_scaling_shows(low, said):
    high = 0.5 if low == -0.5 else 1.0
    network, scaling = Trained(low=low, high=high), Levels(256, said, 1.0)
    if low == said:
        assert read(network, scaling=scaling) == []
    else:
        words = rf"levels scaled to \[{low:g}, {high:g}\]; give scaling=Levels\(256, {low:g}"
        with pytest.raises(ValueError, match=words):
            read(network, scaling=scaling)


def test_images_that_lie_otherwise_show():
    with pytest.raises(ValueError, match="rows and columns exchanged"):
        read(Trained(turned=True))
    with pytest.raises(ValueError, match=r"inverted levels; give 255 - x"):
        read(Trained(low=1.0, high=-1.0))


@pytest.mark.parametrize("output", [lambda z, t: 0 * z, lambda z, t: torch.sin(3 * z)])
def test_a_network_that_fits_none_is_measured_with_a_note(output):
    (note,) = read(output)
    assert "no better than a straight line" in note and "was it trained" in note


def test_evaluate_refuses_and_notes():
    """The probe is part of each evaluation of a wrapped network, in no way of its number."""
    x, times = images(), TimeGrid.uniform(T)
    wrong = wrap(Trained("data"), SHAPE, betas=BETAS, predicts="velocity")
    with pytest.raises(ValueError, match=r'predicts="data".*as given .*check=False.*,check=no'):
        evaluate(wrong, x, times=times)
    said = {"predicts": "velocity", "betas": BETAS, "calls": 8}
    with pytest.raises(ValueError, match="read wrongly"):
        evaluate(Trained("data"), x, **said)
    insisted = evaluate(Trained("data"), x, **said, check=False)
    wrapped = wrap(Trained("data"), SHAPE, betas=BETAS, predicts="velocity", check=False)
    for found in (insisted, evaluate(wrapped, x, times=times, calls=8)):
        assert any("data" in n and n.endswith("as check=False says") for n in found.notes)
        assert found.calls_per_example > 8  # the check is made, and counted
    right = evaluate(wrap(Trained(), SHAPE, betas=BETAS, check=False), x, times=times)
    assert right.notes == ()
    assert evaluate(wrap(Trained(), SHAPE, betas=BETAS), x, times=times).notes == ()
    found = evaluate(wrap(lambda z, t: 0 * z, SHAPE, betas=BETAS), x, times=times)
    assert "straight line" in found.notes[0]


def test_without_contrast_or_levels_nothing_is_guessed():
    """A line fits constant images exactly; real data have no other scalings to try."""
    model = wrap(lambda z, t: 0 * z, SHAPE, betas=BETAS)
    assert probe(model, Batch(torch.full((2, *SHAPE), 7))) == []
    real = wrap(Trained(), SHAPE, betas=BETAS, scaling=Affine())
    assert probe(real, Batch(images() / 127.5 - 1)) == []


class TestInMemory:
    """`evaluate` of a network as people hold it."""

    def bound(self, network=None, x=None, **options):
        x = images() if x is None else x
        return evaluate(network or Trained(), x, betas=BETAS, calls=12, **options)

    def test_images_of_all_kinds_are_the_same(self):
        from PIL import Image

        x = images()
        last = x.movedim(1, -1).to(torch.uint8)
        want = self.bound()
        assert math.isfinite(want.bits_per_dim)
        for same, words in (
            (last.numpy(), "channels last"),
            (x.float() / 255, r"scaled to [0, 1]"),
            (x.numpy() / np.float32(127.5) - 1, "scaled to [-1, 1]"),
            ([Image.fromarray(each.numpy()) for each in last], ""),
            (TensorDataset(x.to(torch.uint8), torch.zeros(6)), ""),
        ):
            shape = {"shape": SHAPE} if isinstance(same, TensorDataset) else {}
            got = self.bound(x=same, **shape)
            assert got.nats == want.nats and got.data_hash == want.data_hash
            assert any(words in note for note in got.notes)
        assert 'read as predicts="noise"' in want.notes[0] and "as -1..1" in want.notes[1]

    def test_real_numbers_that_are_no_levels_are_refused(self):
        with pytest.raises(ValueError, match="not one of the 256 levels"):
            self.bound(x=images() / 255 + 0.001)
        with pytest.raises(ValueError, match="black and white"):
            self.bound(x=(images() > 99).float())

    def test_an_output_with_a_sample(self):
        inner = Trained()
        network = nn.Module()
        network.forward = lambda z, time: SimpleNamespace(sample=inner(z, time))
        assert self.bound(network).nats == self.bound(inner).nats

    def test_steps_are_spaced(self):
        found = self.bound(steps=5)
        assert found.steps == 5
        want = wrap(Trained(), SHAPE, betas=BETAS, keep=[0, 10, 20, 29, 39])
        want = evaluate(want, images(), times=TimeGrid.uniform(5), calls=12)
        assert found.nats == want.nats

    def test_a_condition(self):
        """Labels reach the network as they are, embeddings in their shape, one serves all."""
        told = []

        class Given(Trained):
            def forward(self, z, time, condition):
                told.append(condition)
                shift = condition if condition.ndim == 1 else condition.flatten(1).sum(1)
                return super().forward(z, time) + shift.reshape(-1, 1, 1, 1)

        class Deaf(Trained):  # of the same draws, which follow from the examples and conditions
            def forward(self, z, time, condition):
                return super().forward(z, time)

        def bounds(condition):
            return (self.bound(network, condition=condition) for network in (Given(), Deaf()))

        found, deaf = bounds(0)
        assert found.nats == deaf.nats and found.given == "class"
        assert told[-1].dtype == torch.long
        found, deaf = bounds([0, 0, 0, 2, 0, 0])
        assert found.per_example.elbo[3] < deaf.per_example.elbo[3] - 1
        found, deaf = bounds(np.zeros((6, 2, 5)))
        assert found.nats == deaf.nats and found.given == "embedding"
        assert told[-1].shape[1:] == (2, 5) and told[-1].is_floating_point()
        with pytest.raises(ValueError, match="has 5 values, and there are 6"):
            self.bound(Given(), condition=[0] * 5)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"betas": None}, "one of betas, alphas, sigmas or schedule; got none"),
            ({"label": 3}, "give condition=label"),
            ({"condition": "a cat"}, "must be labels or embeddings"),
            ({"keep": [0, 3], "steps": 2}, "give steps or keep"),
        ],
    )
    def test_what_is_missing_is_asked_for(self, options, words):
        with pytest.raises(ValueError, match=words):
            evaluate(Trained(), images(), **({"betas": BETAS} | options))


def test_scaled_images_are_refused_before_the_network_is_read():
    model = wrap(Trained(), SHAPE, betas=BETAS)
    scaled = Batch(images().double() / 255)
    for measure in (evaluate, probe):
        with pytest.raises(
            ValueError, match=r"x is torch.float64, .* integers 0..255, not scaled"
        ):
            measure(model, scaled)


def test_the_best_of_readings_that_do_not_fit_is_named():
    """By four standard errors, for a network that is half trained in another reading."""
    rows = torch.linspace(-0.1, 0.1, 8).exp().double().expand(2, 8)
    for better, named in ((0.8, True), (0.97, False)):
        noise = torch.stack([rows[0], rows[0].flip(0)])
        other = {"velocity": 1.2 * better * noise}
        (note,) = _verdict(1.2 * rows, 1.5 * rows, 1.5 * rows, other)
        assert "no better than a straight line (1.2 times its error)" in note
        assert ("(the best, as velocity, has 0.96 times)" in note) == named


@pytest.mark.parametrize(
    ("other", "spread", "refused"),
    [
        (0.4, 0.05, True),  # 0.8 times the error, by 20 standard errors
        (0.4, 0.3, False),  # by 3
        (0.48, 0.01, False),  # in the same words, nearly the same error
    ],
)
def test_a_reading_that_fits_is_better_by_standard_errors(other, spread, refused):
    own = torch.full((2, 32), 0.5, dtype=torch.float64)
    noise = torch.randn(2, 32, dtype=own.dtype, generator=torch.Generator().manual_seed(0))
    errors = {
        "velocity": other
        * (spread * (noise - noise.mean(1, True)) / noise.std(1, keepdim=True)).exp()
    }
    if refused:
        with pytest.raises(ReadingError, match="read as velocity"):
            _verdict(own, 4 * own, 4 * own, errors)
    else:
        _verdict(own, 4 * own, 4 * own, errors)


@pytest.mark.parametrize(
    ("size", "other", "refused"), [(1.0, 0.6, True), (1.0, 0.68, False), (0.5, 0.6, False)]
)
def test_half_trained_another_reading_is_better_by_a_factor_at_the_best_size(size, other, refused):
    """Of 1.6 times the error of a line, at the best size or as half of an output that has 0.7."""
    least, rows = 1.6 if size == 1 else 0.7, torch.ones(2, 8, dtype=torch.float64)

    def error(factor):
        return (least + 3.6 * (1 - factor * size) ** 2) * rows

    assert error(1)[0, 0] == pytest.approx(1.6)
    errors = {"velocity": other * rows}
    if refused:
        with pytest.raises(ReadingError, match="read as velocity"):
            _verdict(error(1), error(0), error(2), errors)
    else:
        (note,) = _verdict(error(1), error(0), error(2), errors)
        assert "may be read wrongly" in note


@pytest.mark.parametrize(("other", "refused"), [(0.503, True), (0.53, False)])
def test_errors_that_are_equal_at_one_level_do_not_hide_those_at_another(other, refused):
    """Where there is little noise, ε and the velocity are nearly the same: 0.7 and 7 errors."""
    rows = torch.linspace(-0.1, 0.1, 50, dtype=torch.float64).exp()
    own = torch.stack([0.5 * rows.flip(0) * rows, 2.0 * rows])
    errors = {"velocity": torch.stack([other * rows, 0.6 * rows])}
    if refused:
        with pytest.raises(ReadingError, match="read as velocity"):
            _verdict(own, 4 * own, 4 * own, errors)
    else:
        (note,) = _verdict(own, 4 * own, 4 * own, errors)
        assert "no better than a straight line" in note
