"""Foreign denoisers: whatever language a model is in, its bound is the same."""

import contextlib
import math
import re
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from nelbo import Batch, ContinuousTime, TimeGrid, evaluate
from nelbo._utils.numerics import seeded
from nelbo.diffusion.gaussian import Affine, Levels
from nelbo.diffusion.model import counting
from nelbo.diffusion.prediction import Prediction
from nelbo.diffusion.schedules import Linear
from nelbo.diffusion.times import elbo
from nelbo.integrations import adapters, denoisers, spaced, wrap
from nelbo.integrations.adapters import (
    EDM,
    Flow,
    LastStep,
    OnSteps,
    Steps,
    exploding,
    interpolating,
)
from nelbo.testing import DiscreteContract, ProcessContract, ScheduleContract

# the tests want a prior term that can be seen
pytestmark = pytest.mark.filterwarnings("ignore:the schedule ends with signal left")

SHAPE = (3, 2, 5)
T = 12
BETAS = np.linspace(0.02, 0.6, T)
ALPHAS = np.cumprod(1 - BETAS)


@pytest.fixture(autouse=True)
def _seed():
    with seeded(11):
        yield


class Network(nn.Module):
    """A function as a network; it remembers the times it was told."""

    def __init__(self, function):
        super().__init__()
        self.function, self.told = function, []

    def forward(self, y, time):
        self.told.append(time)
        return self.function(y, time)


def constant(value, channels=3):
    """x̂ = value, whatever y is: then no term of the bound depends on a draw."""
    return Network(lambda y, time: y.new_full((len(y), channels, *SHAPE[1:]), value))


def images(n=4, levels=256):
    with seeded(1):
        return torch.randint(levels, (n, *SHAPE))


def full_sum(model, x, steps=T):
    with seeded(2):
        return elbo(model, x, TimeGrid.uniform(steps))


def betas_tilde(alphas):
    """β_t and β̃_t of the steps between these α's, with α_0 = 1."""
    before = np.concatenate([[1.0], alphas[:-1]])
    beta = 1 - alphas / before
    return beta, beta * (1 - before) / (1 - alphas)


def by_hand(x, x_hat, alphas, log_variance, decoder_scale):
    """−ELBO for a constant x̂, term by term, in numpy, from equations 3, 5 and 6 alone."""
    e = x.numpy() / 127.5 - 1
    dims = (1, 2, 3)
    last = alphas[-1]
    prior = 0.5 * (last * e**2 + (1 - last) - 1 - math.log(1 - last)).sum(dims)
    beta, tilde = betas_tilde(alphas)
    diffusion = np.zeros(len(x))
    for t in range(1, len(alphas)):
        of_x = math.sqrt(alphas[t - 1]) * beta[t] / (1 - alphas[t])
        gap = (of_x * (e - x_hat)) ** 2
        ratio = tilde[t] / np.exp(log_variance[t])
        diffusion += 0.5 * (ratio - 1 - np.log(ratio) + gap / np.exp(log_variance[t])).sum(dims)
    upper = np.where(x == 255, np.inf, e + 1 / 255)
    lower = np.where(x == 0, -np.inf, e - 1 / 255)
    # by the tail that is small, or nothing of it is left
    below = norm.cdf(upper, x_hat, decoder_scale) - norm.cdf(lower, x_hat, decoder_scale)
    above = norm.sf(lower, x_hat, decoder_scale) - norm.sf(upper, x_hat, decoder_scale)
    mass = np.where(e > x_hat, above, below)
    return prior, -np.log(mass).sum(dims), diffusion


@pytest.mark.parametrize("variance", ["small", "large", "learned-range"])
@pytest.mark.parametrize("keep", [None, [0, 3, 4, 9, 11]], ids=["all", "some"])
def test_the_bound_by_hand(variance, keep):
    """Equation 5 with σ² = β̃, β or between (Nichol & Dhariwal 2021, equation 15), the decoder
    N(x̂, σ_1²) in bins with β̃_2 in place of β̃_1 = 0, for all times and for some of them."""
    v = 0.3
    output = constant(0.1)
    if variance == "learned-range":
        both = torch.tensor([0.1] * 3 + [v] * 3, dtype=torch.float64).reshape(1, 6, 1, 1)
        output = Network(lambda y, time: both.expand(len(y), 6, *SHAPE[1:]))
    model = wrap(output, SHAPE, predicts="data", betas=BETAS, variance=variance, keep=keep)
    alphas = ALPHAS if keep is None else ALPHAS[keep]
    beta, tilde = betas_tilde(alphas)
    tilde[0] = tilde[1]
    share = {"small": 0.0, "large": 1.0, "learned-range": (v + 1) / 2}[variance]
    log_variance = share * np.log(beta) + (1 - share) * np.log(tilde)
    first = tilde[1] if variance != "learned-range" else np.exp(log_variance[0])
    x = images()
    got = full_sum(model, x, len(alphas))
    want = by_hand(x, 0.1, alphas, log_variance, math.sqrt(first))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-9)


def denoiser(z, alpha):
    """Some x̂(z_t, α_t), in our latents."""
    return torch.tanh(1.3 * z - 0.2) * alpha.sqrt()


def language(name):
    """A network that says `denoiser` in the terms of `name`, and what `wrap` is told of it."""
    alphas = torch.tensor(ALPHAS)
    sigmas = ((1 - alphas) / alphas).sqrt()
    tau = sigmas / (1 + sigmas)
    c_data = 0.5

    def at(i):
        return alphas[i].reshape(-1, 1, 1, 1), sigmas[i].reshape(-1, 1, 1, 1)

    def preserving(say):
        def function(y, time):
            a, _ = at(time)
            x_hat = denoiser(y, a)
            return say(y, x_hat, (y - a.sqrt() * x_hat) / (1 - a).sqrt(), a)

        return Network(function)

    def exploding(say):
        def function(y, time):
            a, s = at(torch.searchsorted(sigmas, time, right=False))
            x_hat = denoiser(y / (1 + s**2).sqrt(), a)
            return say(y, x_hat, s)

        return Network(function)

    def flow(y, time):
        i = torch.searchsorted(tau, time)
        a, _ = at(i)
        w = tau[i].reshape(-1, 1, 1, 1)
        x_hat = denoiser(y / ((1 - w) ** 2 + w**2).sqrt(), a)
        return (y - (1 - w) * x_hat) / w - x_hat

    def edm(f, time):
        i = torch.searchsorted(sigmas.log() / 4, time - 1e-9)
        a, s = at(i)
        y = f * (s**2 + c_data**2).sqrt()
        x_hat = denoiser(y / (1 + s**2).sqrt(), a)
        skip = c_data**2 / (s**2 + c_data**2)
        return (x_hat - skip * y) * (s**2 + c_data**2).sqrt() / (s * c_data)

    head = EDM(c_data)
    return {
        "noise": lambda: (preserving(lambda y, x, e, a: e), {"betas": BETAS}),
        "data": lambda: (preserving(lambda y, x, e, a: x), {"alphas": ALPHAS}),
        "velocity": lambda: (
            preserving(lambda y, x, e, a: a.sqrt() * e - (1 - a).sqrt() * x),
            {"betas": BETAS},
        ),
        "score": lambda: (
            preserving(lambda y, x, e, a: -(y - a.sqrt() * x) / (1 - a)),
            {"betas": BETAS},
        ),
        "noise exploding": lambda: (exploding(lambda y, x, s: (y - x) / s), {"sigmas": sigmas}),
        "score exploding": lambda: (
            exploding(lambda y, x, s: (x - y) / s**2),
            {"sigmas": sigmas, "predicts": "score"},
        ),
        "data exploding": lambda: (
            exploding(lambda y, x, s: x),
            {"sigmas": sigmas, "predicts": "data"},
        ),
        "flow": lambda: (
            Network(flow),
            {"alphas": ALPHAS, "times": tau, "factor": interpolating, "predicts": Flow()},
        ),
        "flow of sigmas": lambda: (Network(flow), {"sigmas": tau}),
        "flow as a part": lambda: (Network(flow), {"sigmas": tau, "predicts": Flow()}),
        "flow of a sampler": lambda: (
            Network(flow),
            {"sigmas": torch.cat([tau.flip(0), torch.zeros(1)]), "times": tau.flip(0)},
        ),
        "edm": lambda: (
            Network(edm),
            {
                "sigmas": sigmas,
                "times": sigmas.log() / 4,
                "factor": head.factor,
                "predicts": head,
            },
        ),
        "edm as a part": lambda: (Network(edm), {"sigmas": sigmas, "predicts": head}),
        "edm by name": lambda: (
            Network(edm),
            {"sigmas": sigmas, "predicts": "edm", "sigma_data": c_data},
        ),
        "edm of a sampler": lambda: (
            Network(edm),
            {
                "sigmas": torch.cat([sigmas.flip(0), torch.zeros(1)]),
                "predicts": "edm",
                "sigma_data": c_data,
            },
        ),
    }[name]()


@pytest.mark.parametrize(
    "name",
    [
        "data",
        "velocity",
        "score",
        "noise exploding",
        "score exploding",
        "data exploding",
        "flow",
        "flow of sigmas",
        "flow of a sampler",
        "flow as a part",
        "edm as a part",
        "edm",
        "edm by name",
        "edm of a sampler",
    ],
)
def test_every_language_says_the_same(name):
    """y = a x + b ε with any a, b, and any prediction: one denoiser has one bound."""
    x = images()
    network, told = language("noise")
    want = full_sum(wrap(network, SHAPE, **told), x)
    network, told = language(name)
    told.setdefault("predicts", name.split()[0])
    got = full_sum(wrap(network, SHAPE, **told), x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class Preconditioned(nn.Module):
    """x̂(y, σ) as Karras et al. 2022 compute it of F, equation 7 and table 1."""

    def __init__(self, inner, sigma_data):
        super().__init__()
        self.inner, self.sigma_data = inner, sigma_data

    def forward(self, y, sigma):
        sigma = sigma.reshape(-1, 1, 1, 1)
        skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        out = sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        c_in = 1 / (self.sigma_data**2 + sigma**2).sqrt()
        return skip * y + out * self.inner(c_in * y, sigma.log().flatten() / 4)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_is_what_its_preconditioning_computes(sigma_data):
    """F by name has the bound of x̂(y, σ) around it: on σ's, on some of them, in all of time."""
    inner = Network(lambda y, time: torch.sin(y + time.reshape(-1, 1, 1, 1)))
    whole, x = Preconditioned(inner, sigma_data), images()
    sigmas = np.geomspace(0.01, 80, 9)
    edm = {"predicts": "edm", "sigma_data": sigma_data}
    for keep, steps in ((None, 9), ([0, 4, 8], 3)):
        got = full_sum(wrap(inner, SHAPE, sigmas=sigmas, keep=keep, **edm), x, steps)
        want = full_sum(wrap(whole, SHAPE, predicts="data", sigmas=sigmas, keep=keep), x, steps)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    line = Linear(2 * math.log(0.01), 2 * math.log(80))
    ve = {"times": lambda gamma: (gamma / 2).exp(), "factor": exploding}
    got = wrap(inner, SHAPE, schedule=line, **edm)
    want = wrap(whole, SHAPE, predicts="data", schedule=line, **ve)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    z = torch.randn(4, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(got.predict(z, t).e_hat, want.predict(z, t).e_hat)


@pytest.mark.parametrize(
    "told",
    [
        {"predicts": "edm"},
        {"predicts": "edm", "sigma_data": -1.0},
        {"predicts": "data", "sigma_data": 0.5},
    ],
)
def test_edm_and_its_sigma_data_go_together(told):
    with pytest.raises(ValueError, match=r'predicts="edm" and sigma_data, .* go together; got'):
        wrap(constant(0.0), SHAPE, sigmas=[0.5, 2.0], **told)


def test_the_network_is_told_its_own_times():
    """Times count from 0, are kept under `keep`, are σ's for σ's, and are never mixed up when a
    large batch goes in parts."""
    grid = {"predicts": "data", "decoder": "evidence"}
    network = constant(0.0)
    model = wrap(network, SHAPE, betas=BETAS, **grid)
    t = torch.tensor([1, 5, 12]).double() / T
    model.predict(torch.zeros(3, *SHAPE).double(), t)
    assert network.told[-1].tolist() == [0, 4, 11]
    model = wrap(network, SHAPE, betas=BETAS, keep=[2, 5, 7, 11], **grid)
    model.predict(torch.zeros(2, *SHAPE).double(), torch.tensor([0.25, 0.75]).double())
    assert network.told[-1].tolist() == [2, 7]
    model = wrap(network, SHAPE, sigmas=[0.5, 2.0, 80.0], **grid)
    model.predict(torch.zeros(1, *SHAPE).double(), torch.tensor([1 / 3], dtype=torch.float64))
    assert network.told[-1].tolist() == [0.5]


def test_large_batches_go_in_parts(monkeypatch):
    """The output for one example does not depend on how a batch is cut."""
    network, told = language("velocity")
    model = wrap(network, SHAPE, predicts="velocity", **told)
    x = images(7)
    whole = full_sum(model, x)
    monkeypatch.setattr(adapters, "NUMBERS", 5 * math.prod(SHAPE))
    network.told.clear()
    for a, b in zip(full_sum(model, x), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert {len(time) for time in network.told} == {5, 2}


def test_a_network_of_less_precision_is_told_exact_times():
    """A bfloat16 network gets its time exactly: 998, which bfloat16 has not, is not 1000."""

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros((), dtype=torch.bfloat16))

        def forward(self, y, time):
            assert y.dtype == torch.bfloat16
            return y * self.weight + (time == 998).reshape(-1, 1, 1, 1)

    model = wrap(Half(), SHAPE, predicts="data", betas=np.linspace(1e-4, 0.02, 1000))
    t = torch.tensor([0.999], dtype=torch.float64)
    e_hat = model.predict(torch.zeros(1, *SHAPE).double(), t).e_hat
    assert (e_hat == 1).all()


def test_no_signal_at_the_end():
    """Zero terminal SNR: z_T says nothing, so the prior term is 0, and all else is finite."""
    betas = [*BETAS[:-1], 1.0]
    network = Network(lambda y, time: torch.sin(y))
    bound = full_sum(wrap(network, SHAPE, predicts="velocity", betas=betas), images())
    assert (bound.prior == 0).all()
    assert (bound.diffusion > 0).all() and bound.diffusion.isfinite().all()
    with pytest.raises(ValueError, match=r"α_T = 0"):
        wrap(network, SHAPE, predicts="noise", betas=betas)


def test_signal_left_at_the_end_is_told_in_nats():
    """The largest prior term of any data in [-1, 1] is that of |e| = 1: D/2 · −log(1-α_T)."""
    with pytest.warns(UserWarning, match="signal left") as caught:
        model = wrap(constant(0.0), SHAPE, predicts="data", betas=BETAS[:5])
    nats = 15 * -math.log(1 - ALPHAS[4])
    assert f"{nats:.3g} nats" in str(caught[0].message)
    extremes = 255 * torch.ones(1, *SHAPE).long()
    prior = full_sum(model, extremes, 5).prior.item()
    np.testing.assert_allclose(prior, nats, rtol=1e-12)


def test_signal_left_of_real_data_is_that_of_their_mean_square():
    """Real data have no largest value: the note gives the prior term for any, exactly."""
    with pytest.warns(UserWarning, match="signal left") as caught:
        model = wrap(
            constant(0.0), SHAPE, predicts="data", betas=BETAS[:5], scaling=Affine(0.5, 2.0)
        )
    x = 40 * torch.randn(7, *SHAPE, generator=torch.Generator().manual_seed(3)).double()
    square = ((x - 0.5) / 2).square().mean().item()
    said = str(caught[0].message)
    first, second = map(float, re.search(r"costs (\S+) \+ (\S+) \(E\[e²\] - 1\)", said).groups())
    prior = full_sum(model, x, 5).prior.mean().item()
    assert first + second * (square - 1) == pytest.approx(prior, rel=0.005)
    assert "up to" not in said


def test_no_warning_where_no_signal_is_left():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(constant(0.0), SHAPE, betas=np.linspace(1e-4, 0.02, 1000))


def test_clipping_is_another_model():
    """x̂ = 1.4 clipped is the model whose x̂ is 1, and not the one that was trained."""
    x = images()

    def bound(value, clip):
        model = wrap(constant(value), SHAPE, predicts="data", betas=BETAS, clip=clip)
        return full_sum(model, x).elbo

    torch.testing.assert_close(bound(1.4, True), bound(1.0, False), rtol=1e-12, atol=0)
    assert (bound(1.4, True) > bound(1.4, False) + 1).all()


def test_continuous_time():
    """A network that takes any γ: for constant x̂ the diffusion term is ½ (SNR_0 - SNR_1) ‖x-x̂‖²
    (equation 8), here by the midpoint rule."""
    told = []

    def function(y, time):
        told.append(time)
        return torch.zeros_like(y)

    model = wrap(
        Network(function),
        SHAPE,
        predicts="data",
        schedule=Linear(-6.0, 8.0),
        times=lambda g: g / 8,
    )
    x = images(1)
    u = (torch.arange(4000).double() + 0.5) / 4000
    got = elbo(model, x, ContinuousTime(), u[None]).diffusion
    e = x / 127.5 - 1
    want = 0.5 * (math.exp(6) - math.exp(-8)) * e.square().sum()
    torch.testing.assert_close(got[0], want.double(), rtol=1e-5, atol=0)
    gamma = -6 + 14 * u
    torch.testing.assert_close(torch.cat(told)[-4000:], gamma / 8, rtol=1e-12, atol=1e-12)


def test_a_density_of_real_data():
    """Data in other units: log p(x) changes by −D log scale, and nothing else does."""
    network, told = language("noise")
    x = torch.randn(3, *SHAPE, dtype=torch.float64)

    def bound(affine, x):
        return full_sum(wrap(network, SHAPE, scaling=affine, **told), x).elbo

    plain = bound(Affine(), x)
    moved = bound(Affine(5.0, 2.0), 2 * x + 5)
    torch.testing.assert_close(moved, plain - 30 * math.log(2), rtol=1e-10, atol=1e-10)


def test_scalings_of_eight_bits():
    """x/127.5 - 1, x/255, and bins centred in [-1, 1], 2(x + ½)/256 - 1."""
    x = torch.arange(256)
    for ends, values in (
        ((), x.double() / 127.5 - 1),
        ((0.0, 1.0), x.double() / 255),
        ((-255 / 256, 255 / 256), (2 * x.double() + 1) / 256 - 1),
    ):
        torch.testing.assert_close(Levels(256, *ends)(x), values, rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="low must be less than high"):
        Levels(256, 1.0, 0.0)


class TestLastStep(DiscreteContract):
    """P(x|z_1) sums to one for every scaling of the data and every variance."""

    levels = 256

    @pytest.fixture(params=[(-1.0, 1.0), (-255 / 256, 255 / 256), (0.0, 1.0)], ids=str)
    def scaling(self, request):
        return Levels(256, *request.param)

    @pytest.fixture(params=[None, 0.0, 0.7], ids=["fixed", "smallest", "learned"])
    def distribution(self, scaling, request):
        with seeded(3):
            process = OnSteps(Steps(torch.linspace(-9, 5, 6).double()), scaling)
            e_hat = torch.randn(2, *SHAPE).double()
            prediction = Prediction(e_hat)
            if request.param is not None:
                prediction = Prediction(e_hat, fraction=torch.full_like(e_hat, request.param))
            t = torch.full((2,), 1 / 6, dtype=torch.float64)
            return LastStep(scaling)(prediction, e_hat, t, process)


class TestSteps(ScheduleContract):
    """A table of γ's is a schedule on its own times."""

    ends = (-8.0, 4.0)

    @pytest.fixture
    def schedule(self):
        return Steps(torch.linspace(-8, 4, 2049).double())

    def inside(self, schedule):
        return torch.arange(1, 2050).double() / 2049

    test_slope = test_times_are_found_again = None  # it has neither: off its times it raises

    def test_is_elementwise(self, schedule):
        t = self.inside(schedule)[:2048].reshape(32, 64)
        assert torch.equal(schedule(t).flatten(), schedule(t.flatten()))

    def test_knows_no_other_times(self, schedule):
        with pytest.raises(ValueError, match=r"i/2049"):
            schedule(torch.tensor([0.5]).double())


class TestOnSteps(ProcessContract):
    """It is the Gaussian process, up to what a network is told."""

    @staticmethod
    def examples(shape):
        return torch.randn(shape, dtype=torch.float64)

    @staticmethod
    def guess(e):
        return e + 0.3

    @pytest.fixture
    def process(self):
        return OnSteps(Steps(torch.linspace(-6, 4, 20).double()), Affine())

    test_rate_is_the_limit_of_the_kl = None  # no limit on discrete times
    test_the_truth_costs_nothing = None
    test_a_guess_costs = None

    def test_examples_do_not_mix(self, process, x):
        t = self.times(x)[2]
        assert torch.equal(process.log_snr_input(t), (20 * t).round())


def test_respacing():
    """Nichol & Dhariwal 2021: from the first to the last, evenly; all of them is all of them."""
    assert spaced(1000, 1000) == list(range(1000))
    assert spaced(1000, 1) == [0]
    for steps in (2, 7, 50, 999):
        kept = spaced(1000, steps)
        assert kept[0] == 0 and kept[-1] == 999 and len(set(kept)) == steps
        assert max(abs(k - i * 999 / (steps - 1)) for i, k in enumerate(kept)) <= 0.5 + 1e-9


GOOD = {"predicts": "noise", "betas": BETAS}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"betas": [0.1, 0.0, 0.2]}, "betas must lie in (0, 1); number 1 is 0"),
        ({"betas": [0.1, 1.0, 0.2]}, "number 1 is 1"),
        ({"betas": [0.1, float("nan")]}, "betas must be finite numbers, those of the training;"),
        ({"betas": [0.1, math.inf]}, "number 1 is inf"),
        ({"betas": None, "sigmas": [0.1, math.nan, 0.5]}, "number 1 is nan"),
        ({"betas": None, "sigmas": [math.nan, 0.5], "predicts": "flow"}, "number 0 is nan"),
        ({"betas": [[0.1]]}, "betas must be"),
        ({"betas": None}, "one of betas, alphas, sigmas or schedule; got none"),
        ({"alphas": ALPHAS}, "got betas and alphas"),
        ({"betas": None, "alphas": ALPHAS[::-1].copy()}, "reverse order: give alphas.flip(0)"),
        ({"betas": None, "alphas": [0.9, 0.5, 0.6]}, "must decrease within [0, 1); number 2"),
        ({"betas": ALPHAS}, "these products of 1 - β, as the .alphas_cumprod"),
        (
            {"betas": None, "sigmas": [0.5, 0.0, 0.9]},
            "must be positive and increase; number 0 is 0",
        ),
        ({"betas": None, "sigmas": [0.5, 0.4, 0.5]}, "number 2 is 0.5"),
        ({"betas": None, "alphas": 1 - np.linspace(1e-4, 0.02, 1000)}, "are these 1 - β"),
        ({"betas": None, "sigmas": [0.5, 1.5], "predicts": "flow"}, "(0, 1]; number 1 is 1.5"),
        ({"schedule": Linear(-5, 5)}, "not as both"),
        ({"betas": None, "schedule": Linear(-5, 5)}, "times=, a function of γ"),
        ({"times": [1, 2, 3]}, "times must be 12 numbers"),
        ({"predicts": "x9"}, "of noise, data, velocity, score, flow, edm, mean; got 'x9'"),
        ({"variance": "fixed"}, "variance must be one of small, large, learned-range"),
        ({"keep": [3, 2]}, "keep must be increasing numbers of the 12 times, 0..11; got [3, 2]"),
        ({"keep": [3, 12]}, "0..11"),
        ({"keep": [3]}, "at least 2 times"),
        ({"decoder": "exact"}, "decoder must be a nelbo Decoder or one of step, evidence"),
        ({"scaling": Affine(), "clip": True}, "real data have none"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    """One sentence with what it got."""
    with pytest.raises(ValueError) as error:
        wrap(constant(0.0), SHAPE, **(GOOD | change))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_arrays_may_run_backwards():
    """A view of NumPy with negative strides; σ's of a sampler, the last first and then 0, or in
    any other order."""
    sigmas, order = np.sqrt((1 - ALPHAS) / ALPHAS), np.random.default_rng(0).permutation(T)
    want = wrap(constant(0.0), SHAPE, predicts="data", sigmas=sigmas)
    for given in (
        {"sigmas": sigmas[::-1].copy()[::-1]},
        {"sigmas": sigmas[::-1]},
        {"sigmas": np.append(sigmas[::-1], 0.0)},
        {"sigmas": np.append(sigmas[::-1], 0.0), "times": np.append(sigmas[::-1], 0.0)},
        {"sigmas": sigmas, "times": sigmas[::-1].copy()[::-1]},
        {"sigmas": sigmas[order], "times": sigmas[order]},
        {"sigmas": np.append(sigmas[order], 0.0), "times": np.append(sigmas[order], 0.0)},
    ):
        got = wrap(constant(0.0), SHAPE, predicts="data", **given)
        assert torch.equal(got.process.schedule.gamma, want.process.schedule.gamma)
        assert torch.equal(got.network.times, want.network.times)
    betas = BETAS[::-1].copy()[::-1]
    got = wrap(constant(0.0), SHAPE, predicts="data", betas=betas)
    torch.testing.assert_close(got.process.schedule.gamma, want.process.schedule.gamma)


def test_a_flow_is_no_velocity():
    """ε - x follows the noise where no signal is left, √α ε - √(1-α) x does not."""
    flow = Network(lambda y, time: y - 0.9)
    with pytest.raises(ValueError, match=r'slope 1.00.*"velocity".*nearly 0.*predicts="flow"'):
        wrap(flow, SHAPE, predicts="velocity", betas=np.linspace(1e-4, 0.02, 1000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrap(flow, SHAPE, predicts="flow", sigmas=[0.1, 0.5, 1.0])
        wrap(constant(0.4), SHAPE, predicts="velocity", betas=np.linspace(1e-4, 0.02, 1000))
    with pytest.warns(UserWarning, match=r'slope 0.00.*"velocity"'):
        wrap(constant(0.4), SHAPE, predicts="flow", sigmas=[0.1, 0.5, 1.0])


def test_a_flow_in_continuous_time():
    """The default time of a flow is τ: the bound of x̂ = y - τ F = 0.1 is that of this x̂."""
    flow = Network(lambda y, time: (y - 0.1) / time.reshape(-1, 1, 1, 1))
    one = wrap(flow, SHAPE, predicts="flow", schedule=Linear(-6.0, 12.0))
    other = wrap(
        constant(0.1), SHAPE, predicts="data", schedule=Linear(-6.0, 12.0), times=lambda g: g
    )
    with seeded(2):
        got = elbo(one, images(), ContinuousTime()).diffusion
    with seeded(2):
        want = elbo(other, images(), ContinuousTime()).diffusion
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def test_a_wrong_shape_is_told():
    with pytest.raises(ValueError, match=r"\(8, 3, 2, 5\); got \(8, 6, 2, 5\).*learned-range"):
        wrap(constant(0.0, channels=6), SHAPE, **GOOD)
    with pytest.raises(ValueError, match=r"\(8, 6, 2, 5\); got \(8, 3, 2, 5\)"):
        wrap(constant(0.0), SHAPE, **GOOD, variance="learned-range")
    with pytest.raises(ValueError, match="got dict"):
        wrap(Network(lambda y, time: {"sample": y}), SHAPE, **GOOD)


def test_other_times_than_its_own_are_refused():
    """More steps than the schedule has, times between, continuous time, a late first time."""
    model = wrap(constant(0.0), SHAPE, **GOOD)
    x = images()
    for times, words in (
        (TimeGrid.uniform(2 * T), r"knows 12 times.*TimeGrid.uniform\(12\)"),
        (TimeGrid.uniform(5), "knows 12 times"),
        (ContinuousTime(), "no bound in continuous time"),
        (TimeGrid.uniform(4), "the grid begins later"),
    ):
        with pytest.raises(ValueError, match=words):
            elbo(model, x, times)
    late = wrap(constant(0.0), SHAPE, **GOOD, decoder="evidence")
    assert elbo(late, x, TimeGrid.uniform(4)).elbo.isfinite().all()
    with pytest.raises(ValueError, match="has 12 steps, and a bound of 13"):
        spaced(T, 13)


def test_decoders():
    """Without steps the default needs no network, and so for real data."""
    continuous = {"schedule": Linear(-6.0, 6.0), "times": lambda g: g, "predicts": "data"}
    model = wrap(constant(0.0), SHAPE, **continuous)
    assert model.decoder.density is False
    model = wrap(constant(0.0), SHAPE, scaling=Affine(), **continuous)
    assert model.decoder.density is True
    np.testing.assert_allclose(model.decoder.log_spread.item(), -3.0)
    given = denoisers.Evidence(Levels(256))
    assert wrap(constant(0.0), SHAPE, **GOOD, decoder=given).decoder is given


@pytest.mark.parametrize(
    ("ours", "others"),
    [
        ("noise", ["epsilon", "eps"]),
        ("data", ["x", "x0", "sample"]),
        ("velocity", ["v", "v_prediction"]),
    ],
)
def test_an_output_has_the_names_that_papers_and_libraries_use(ours, others):
    x = images()
    bounds = [
        full_sum(wrap(constant(0.1), SHAPE, predicts=name, betas=BETAS), x).elbo
        for name in (ours, *others)
    ]
    assert all(torch.equal(bound, bounds[0]) for bound in bounds)


def test_a_function_that_gives_the_mean_of_the_step_has_the_bound_of_its_data_prediction():
    """With x̂ = 0, the mean m_t(z, 0) is a multiple of z."""
    beta, _ = betas_tilde(ALPHAS)
    before = np.concatenate([[1.0], ALPHAS[:-1]])
    weight = torch.tensor(np.sqrt(1 - beta) * (1 - before) / (1 - ALPHAS))

    def mean(z, t):
        return weight[t][:, None, None, None] * z

    x = images()
    expected = full_sum(wrap(constant(0.0), SHAPE, predicts="data", betas=BETAS), x).elbo
    bound = full_sum(wrap(mean, SHAPE, predicts="mean", betas=BETAS), x).elbo
    torch.testing.assert_close(bound, expected)
    with pytest.raises(ValueError, match="one step of T"):
        wrap(mean, SHAPE, predicts="mean", betas=BETAS, keep=[0, 5])


@pytest.mark.parametrize("network", [nn.Identity, "unet"])
def test_a_class_or_a_name_is_no_network(network):
    with pytest.raises(
        ValueError, match=r"not its class|network must be a torch Module or a function; got"
    ):
        wrap(network, SHAPE, betas=BETAS)


def test_another_reading_of_a_network_is_another_model():
    """Functions count by their values, as all lambdas have one name; so do numbers of parts."""
    with seeded(3):
        network = nn.Conv2d(3, 3, 1)

    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.own = network

        def forward(self, y, time):
            return self.own(y)

    def of(network=None, **options):
        schedule = options.pop("schedule", Linear(-10, 10))
        given = {"times": lambda gamma: gamma} | options
        return wrap(network or Timed(), SHAPE, schedule=schedule, **given).hash()

    others = [
        {},
        {"times": lambda gamma: gamma + 1},
        {"times": lambda gamma: (gamma / 2).exp()},
        {"factor": exploding},
        {"schedule": Linear(-9, 10)},
        {"scaling": Levels(256, 0, 1)},
        {"predicts": "data"},
        {"predicts": "data", "clip": True},
        {"predicts": "score"},
        {"predicts": "edm", "sigma_data": 0.5},
        {"predicts": "edm", "sigma_data": 0.7},
    ]
    assert len({of(**each) for each in others}) == len(others)
    assert of() == of(times=lambda gamma: 1.0 * gamma)
    functions = [lambda y, time: 0.1 * y, lambda y, time: 0.2 * y]
    assert of(functions[0]) == of(lambda y, time: y * 0.1) != of(functions[1])
    assert wrap(Timed(), SHAPE, betas=BETAS).hash() != wrap(Timed(), SHAPE, betas=BETAS / 2).hash()


class Fails(nn.Module):
    """A network that fails when it is asked to."""

    def __init__(self):
        super().__init__()
        self.frozen, self.dropout, self.fails = nn.BatchNorm2d(3), nn.Dropout(), False

    def forward(self, y, time):
        if self.fails:
            raise ArithmeticError
        assert not self.dropout.training
        return 0 * y


@pytest.mark.parametrize("fails", [False, True])
def test_each_part_of_a_network_keeps_its_mode(fails):
    network = Fails()
    network.frozen.eval()
    model = wrap(network, SHAPE, predicts="velocity", betas=BETAS)
    modes = [part.training for part in network.modules()]
    assert modes == [True, False, True]
    network.fails = fails
    with contextlib.suppress(ArithmeticError):
        evaluate(model, images(), times=TimeGrid.uniform(T))
    assert [part.training for part in network.modules()] == modes


def test_functions_of_conditions_do_not_continue_each_other(tmp_path):
    """Without weights, only a condition says which function it is."""
    batch = Batch(images(), torch.ones(4, 1))
    for factor, fails in ((0.1, False), (0.1, False), (0.2, True)):
        function = lambda y, time, c, a=factor: a * c[:, :1, None, None] * y  # noqa: E731
        model = wrap(function, SHAPE, betas=BETAS, conditioned_on="class", check=False)
        wrong = pytest.raises(ValueError, match="another evaluation: its network is")
        with wrong if fails else contextlib.nullcontext():
            evaluate(model, batch, times=TimeGrid.uniform(T), calls=4, resume=tmp_path / "kept")


def test_a_condition_reaches_a_wrapped_network():
    """The network of a class is the one that always predicts its colour."""

    def of_class(y, time, condition):
        colours = y.new_tensor([-0.5, 0.25])[condition[:, 0].long()]
        return colours[:, None, None, None].expand_as(y)

    model = wrap(of_class, SHAPE, predicts="data", betas=BETAS, conditioned_on="class")
    x, labels = images(), torch.tensor([[0], [1], [1], [0]])
    bounds = full_sum(model, Batch(x, labels)).elbo
    for label, colour in enumerate((-0.5, 0.25)):
        alone = wrap(constant(colour), SHAPE, predicts="data", betas=BETAS)
        own = full_sum(alone, x).elbo
        rows = labels[:, 0] == label
        torch.testing.assert_close(bounds[rows], own[rows])
    with pytest.raises(ValueError, match="without their class"):
        evaluate(model, x, times=TimeGrid.uniform(T))


def test_a_network_that_fails_says_what_it_was_called_with():
    """One sentence, of a plain function with the way out; too little memory is another matter."""
    inner = torch.nn.Conv2d(3, 3, 3, padding=1)
    with pytest.raises(ValueError, match=r"called with float64 \(\d+, 3, 4, 4\), .*y\.float\(\)"):
        wrap(lambda y, time: inner(y), (3, 4, 4), betas=np.linspace(0.02, 0.9, 12))

    class Labels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, y, time, label):
            return self.inner(y)

    with pytest.raises(ValueError, match=r"float32 .*missing 1 required.*'label'; is that how"):
        wrap(Labels(), (3, 4, 4), betas=np.linspace(0.02, 0.9, 12))


@pytest.mark.parametrize("shape", [None, (3, 4, 4)])
def test_no_example_is_one_sentence(shape):
    options = {} if shape is None else {"shape": shape}
    with pytest.raises(ValueError, match=r"empty: its shape is \(0, 3, 4, 4\); give at least 1"):
        evaluate(
            lambda y, time: y,
            np.zeros((0, 3, 4, 4), np.uint8),
            betas=np.linspace(0.02, 0.9, 12),
            **options,
        )


def seeding(y, time):
    torch.manual_seed(5)
    return y


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda y, _: torch.complex(y, y), "type torch.complex128"),
        (lambda y, _: y.long(), "type torch.int64"),
        (seeding, "sets the seed of torch's random numbers"),
    ],
    ids=["complex", "integers", "seeds"],
)
def test_a_network_whose_numbers_would_be_wrong_is_refused(function, said):
    with pytest.raises(ValueError, match=said):
        wrap(Network(function), SHAPE, predicts="noise", betas=BETAS)


def test_a_network_may_seed_and_switch_for_itself():
    """Random numbers inside a fork, and gradients."""

    def own(y, time):
        torch.set_grad_enabled(True)
        with torch.random.fork_rng():
            return seeding(y, time) * nn.Parameter(torch.ones(()))

    x = torch.randint(0, 256, (4, *SHAPE))
    models = (
        wrap(Network(of), SHAPE, predicts="noise", betas=BETAS) for of in (own, lambda y, _: y)
    )
    one, other = (evaluate(model, x, times=TimeGrid.uniform(T), calls=8) for model in models)
    assert one.nats == other.nats and torch.is_grad_enabled()


def test_a_call_whose_result_is_refused_is_counted():
    network = Network(lambda y, _: y * math.inf)
    model = wrap(network, SHAPE, predicts="noise", betas=BETAS, check=False)
    x = torch.randint(0, 256, (4, *SHAPE))
    with counting(model.network) as calls, pytest.raises(ValueError, match="not finite"):
        evaluate(model, x, times=TimeGrid.uniform(T), calls=8)
    assert calls.forward > 0
