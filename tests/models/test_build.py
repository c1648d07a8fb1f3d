"""Parts registered by a line in a table: those that do not fit are refused before any work."""

import pytest
import torch
from torch import Tensor

from nelbo.data.schema import Schema
from nelbo.diffusion.gaussian import GaussianDiffusion
from nelbo.diffusion.masked import MaskedDiffusion
from nelbo.diffusion.model import Model
from nelbo.diffusion.process import ForwardProcess
from nelbo.diffusion.schedules import Schedule
from nelbo.evaluation.per_dimension import own_step, steps_of
from nelbo.explain.run import kernels_of
from nelbo.models import config
from nelbo.models.build import build
from nelbo.training.presets import configure

LEVELS, TEXT = Schema("levels", (1, 4, 4), 5), Schema("levels", (7,), 6, alphabet="abcde")


class Delegated(ForwardProcess):
    """Gaussian diffusion that is no `GaussianDiffusion`: it has no m_t and no β̃."""

    def __init__(self, schedule, embedding):
        super().__init__(schedule)
        self.inner = GaussianDiffusion(schedule, embedding)
        self.channels, self.codes = 1, self.inner.codes

    def embed(self, x):
        return self.inner.embed(x)

    def features(self, z):
        return self.inner.features(z)

    def log_snr_input(self, t):
        return self.inner.log_snr_input(t)

    def transition(self, z, s, t):
        return self.inner.transition(z, s, t)

    def marginal(self, e, t):
        return self.inner.marginal(e, t)

    def posterior(self, z, e, s, t):
        return self.inner.posterior(z, e, s, t)

    def prior(self, shape, t):
        return self.inner.prior(shape, t)

    def rate(self, z, e, e_hat, t):
        return self.inner.rate(z, e, e_hat, t)


class TwoArguments(MaskedDiffusion):
    def __init__(self, schedule, count):
        super().__init__(schedule, count)


class OneEnd(Schedule):
    def __init__(self, gamma_min, gamma_max):
        super().__init__()
        self.gamma_min = gamma_min

    def forward(self, t: Tensor) -> Tensor:
        return self.gamma_min - torch.log1p(-t.double())


def made(schema: Schema, **options: str) -> Model:
    return build(configure(schema, 100, width=8, depth=1, **options)[0], schema)


def register(monkeypatch, table: str, name: str, of: str) -> None:
    monkeypatch.setitem(getattr(config, table), name, f"{__name__}:{of}")


@pytest.mark.parametrize("step", ["mixture", "beta", "optimal"])
def test_a_step_of_gaussian_diffusion_is_refused_for_another_process(monkeypatch, step):
    register(monkeypatch, "VALUE_PROCESSES", "gaussian", "Delegated")
    with pytest.raises(ValueError, match=r"got Delegated: .* --step posterior$"):
        made(LEVELS, step=step)
    model = made(LEVELS, step="posterior")
    assert isinstance(model.process, Delegated)
    # nor do the report and the explanation compare it with one
    assert [*steps_of(model)] == [*kernels_of(model)] == [own_step(model)]


def test_a_process_of_symbols_needs_the_arguments_that_its_data_need(monkeypatch):
    register(monkeypatch, "SYMBOL_PROCESSES", "absorbing", "TwoArguments")
    assert isinstance(made(LEVELS, process="absorbing").process, TwoArguments)
    with pytest.raises(
        ValueError, match=r"absorbing is not made for text: .* no argument shorter"
    ):
        made(TEXT, process="absorbing")


@pytest.mark.parametrize("schema", [LEVELS, Schema("real", (3,), None)], ids=["levels", "reals"])
def test_a_schedule_of_infinite_ends_is_for_symbols(monkeypatch, schema):
    register(monkeypatch, "SCHEDULES", "cosine", "OneEnd")
    for name, ends in (("quadratic-alpha", "-inf to inf"), ("cosine", r"-?\d+ to inf")):
        with pytest.raises(ValueError, match=f"{name} has γ from {ends}.* --schedule linear"):
            made(schema, schedule=name)
    assert made(LEVELS, process="absorbing", schedule="cosine")


@pytest.mark.parametrize(
    "place", ["nelbo.diffusion.schedules:Lnear", "nelbo.diffusion.scheduling:Linear", "not a name"]
)
def test_a_line_that_names_nothing_is_one_sentence(monkeypatch, place):
    monkeypatch.setitem(config.SCHEDULES, "linear", place)
    with pytest.raises(ValueError, match=f'the line "linear": "{place}" names nothing'):
        made(LEVELS)
