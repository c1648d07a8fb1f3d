"""What control variates and pilots may cost beside the network, without a clock."""

import math

import pytest
import torch
from torch import nn

from nelbo import TimeGrid
from nelbo.evaluation import gaussian_variates
from nelbo.evaluation import time_estimator as evaluation
from nelbo.evaluation.evaluate import evaluate
from nelbo.evaluation.price import OF_PILOT, OF_VARIATES, PASS, Budget, Work, operations
from nelbo.evaluation.time_estimator import PILOT, _divided, _strata_for
from nelbo.evaluation.variate import variates_of
from nelbo.integrations import wrap

LEVELS = "the denoiser of independent levels"


@pytest.fixture
def model():
    """Of images of 256 levels, whose table of levels costs more than its network."""
    torch.manual_seed(0)
    network = nn.Conv2d(3, 3, 3, padding=1)
    betas = torch.linspace(1e-3, 0.8, 20).double()
    return wrap(lambda y, _: network(y.float()), (3, 4, 4), predicts="noise", betas=betas)


@pytest.fixture
def images():
    return torch.randint(0, 256, (64, 3, 4, 4), generator=torch.Generator().manual_seed(0))


def test_operations_are_those_of_products():
    """Two for each weight and place of a convolution, and for each weight of a linear layer."""
    convolution, linear = nn.Conv2d(3, 5, 3, padding=1), nn.Linear(7, 4)
    assert operations(lambda: convolution(torch.zeros(2, 3, 6, 6))) == 2 * 2 * 36 * 5 * 3 * 9
    assert operations(lambda: linear(torch.zeros(3, 7))) == 2 * 3 * 7 * 4


KINDS = {
    "attention": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, batch_first=True), 2
    ).eval(),
    "transposed": lambda: nn.ConvTranspose2d(5, 3, 4, 2),
    "groups": lambda: nn.Conv1d(6, 4, 3, groups=2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_torch_counts(kind):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    network = KINDS[kind]()
    x = torch.zeros(
        {"attention": (5, 2, 16), "transposed": (2, 5, 6, 7), "groups": (2, 6, 9)}[kind]
    )
    found = operations(lambda: network(x))
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(x)
    torch.backends.mha.set_fastpath_enabled(fast)
    assert found == counter.get_total_flops() > 0


@pytest.mark.parametrize("equation", ["bij,bkj->bik", "ij,jk", "...ij,jk->...ik"])
def test_operations_of_einsum(equation):
    a, b = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    a, b = (a, b) if "b" in equation else (a[0], b[0].T)
    shape = torch.einsum(equation, a, b).shape
    assert operations(lambda: torch.einsum(equation, a, b)) == 2 * 4 * shape.numel()


def test_a_budget_is_a_share_of_the_run():
    counted = []

    def call():
        counted.append(1)
        return 5e8

    around, network = OF_VARIATES * 100 * 2e3, OF_VARIATES * 100 * (2e3 + 5e8 / PASS)
    budget = Budget(10, 100, 2e3, call)
    assert budget.take(Work(0.9 * around)) and not counted  # as it is little in any case
    assert budget.spent == Work(0.9 * around)
    # beside the network, 10 examples and 100 draws
    assert budget.take(Work(example=0.4 * network / 10, draw=0.5 * network / 100))
    assert not budget.take(Work(0.2 * network)) and budget.take(Work(0.05 * network))
    assert len(counted) == 1


def test_a_run_of_unknown_length_takes_what_stays_little():
    """Numbers of draws must be little beside a call, as any number of them may follow; others may
    take what is free, and the run is as long as makes them and the pilot a tenth."""
    budget = Budget(10, 100, 2e3, lambda: 0.0, free=1e6, endless=True)
    assert not budget.take(Work(draw=1.01 * OF_VARIATES * 2e3))
    assert budget.take(Work(draw=0.5 * OF_VARIATES * 2e3)) and budget.take(Work(9e5))
    assert not budget.take(Work(2e5))
    calls = budget.least(136)
    spent = 136 * 2e3 + 9e5 + calls * 0.5 * OF_VARIATES * 2e3
    assert 0.9 * spent < 0.08 * calls * 2e3 < 1.3 * spent


def test_what_does_not_pay_is_left_out_and_said(model, images, monkeypatch):
    """Beside a small network, whatever the machine is busy with; beside a large one, or where they
    are asked for, all are used."""
    options = {"times": TimeGrid.uniform(20), "calls": 700}
    small = evaluate(model, images, **options)
    (note,) = small.notes
    assert LEVELS in note and "variates=True" in note
    assert evaluate(model, images, **options).nats == small.nats
    asked = evaluate(model, images, variates=True, **options)
    assert not asked.notes and asked.nats != small.nats
    monkeypatch.setattr(evaluation, "_operations", lambda *_: 1e12)
    large = evaluate(model, images, **options)
    assert not large.notes and large.nats == asked.nats
    target = evaluate(model, images, times=TimeGrid.uniform(20), target_error=1.0)
    assert LEVELS not in "".join(target.notes)


def test_a_short_run_has_no_pilot(model, images):
    """It would take more than a tenth of it, and a note says so, unless it is asked for."""
    options = {"times": TimeGrid.uniform(20), "calls": 24}
    found = evaluate(model, images, **options)
    assert found.notes == (evaluation.SHORT,)
    asked = evaluate(model, images, variates=True, **options)
    assert not asked.notes and asked.nats != found.nats


@pytest.mark.parametrize("operations", [1.0, 1e12])
def test_a_run_to_a_target_is_ten_times_its_pilot(model, images, monkeypatch, operations):
    """However soon the target is reached; with variates=True it ends there."""
    taken, made = [], evaluation.pilot

    def counted(strata, controls, batch, calls):
        taken.append(calls * strata.count)
        return made(strata, controls, batch, calls)

    monkeypatch.setattr(evaluation, "pilot", counted)
    monkeypatch.setattr(evaluation, "_operations", lambda *_: operations)
    options = {"times": TimeGrid.uniform(20), "target_error": 100.0}
    found = evaluate(model, images, **options)
    assert 0 < taken[0] <= 0.07 * found.calls_per_example * len(images)
    assert "ends at the target" in found.notes[0]
    short = evaluate(model, images, variates=True, **options)
    assert taken[1] == taken[0] > 0.2 * short.calls_per_example * len(images)
    assert not short.notes


def test_a_target_that_takes_too_many_calls_is_refused(model, images):
    with pytest.raises(ValueError, match=r"some [0-9.]+e\+[0-9]+ network calls per example"):
        evaluate(model, images, times=TimeGrid.uniform(20), target_error=1e-30)


def test_a_target_without_control_variates(model):
    """The pilot knows the level of each stratum, so that what varies is the noise alone."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 1, 1), generator=g)
    images = (images + torch.randint(-9, 10, (64, 3, 4, 4), generator=g)).clamp(0, 255)
    options = {"times": TimeGrid.uniform(20), "target_error": 0.1}
    without, all_ = (evaluate(model, images, variates=v, **options) for v in (False, True))
    assert without.calls_per_example < 3 * all_.calls_per_example


def test_no_mixtures_are_fitted_for_nothing(model, images, monkeypatch):
    """Levels finer than FINEST have no contexts; the fit would take time."""
    made = []
    mixtures = gaussian_variates.GaussianMixtureEnsemble
    monkeypatch.setattr(mixtures, "__init__", lambda *_: made.append(1))
    edges = torch.linspace(0.5, 1, 2).double()
    found = variates_of(model.process, model, images, edges)
    next(each for each in found if each.name == f"{LEVELS} (examples)").make()
    assert not made


def test_a_kept_pilot_leaves_nothing_out(model, images, monkeypatch):
    """It was fitted to all of them."""
    from nelbo.diffusion.batch import Batch
    from nelbo.evaluation.allocation import pilot

    seen = []

    def kept(strata, controls):
        seen.append(controls)
        return pilot(strata, controls, Batch(images), 64)

    monkeypatch.setattr(evaluation, "_operations", None)  # and nothing is counted
    result = evaluate(model, images, times=TimeGrid.uniform(20), calls=24, pilots=kept)
    assert not result.notes and not seen[0].left_out


@pytest.mark.parametrize("examples", [1, 20, 69, 447, 10_000])
@pytest.mark.parametrize("calls", [1.9, 3, 24, 1000])
def test_a_pilot_takes_less_than_a_tenth(examples, calls):
    """And with the variates no more; it sees each stratum PILOT times at least."""
    if calls < 2 and examples < 100:
        return
    most = _strata_for(calls * examples)
    for strata in (2, 9, most + 1):
        rows, left = _divided(examples, calls, strata, False, False)
        whole = calls if calls < 2 else int(calls)
        assert rows == 0 or rows >= PILOT
        assert rows * strata <= OF_PILOT * whole * examples
        assert math.isclose(left, whole - rows * strata / examples)


def test_fewer_strata_are_better_than_no_pilot():
    """Where a pilot of all strata would cost too much, it is one of fewer."""
    assert _strata_for(24 * 1000) == 32
    assert 6 <= _strata_for(24 * 100) < 32
    rows, _ = _divided(100, 24, _strata_for(24 * 100) + 1, False, False)
    assert rows >= PILOT
    assert _divided(100, 24, 33, False, False)[0] == 0
    assert _strata_for(100) == 32  # without a pilot
