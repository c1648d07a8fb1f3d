"""The times of training: stratified as a whole, unbiased however they are drawn, less variance."""

import importlib
import math
import signal
from itertools import pairwise

import pytest
import torch
from support.runs import TINY

from nelbo._utils import tensor_files
from nelbo._utils.batch_rng import BatchShard
from nelbo._utils.numerics import constant, seeded, slope
from nelbo.data import Schema
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.decoder import LevelDecoder
from nelbo.diffusion.gaussian import Affine, GaussianDiffusion, Levels
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import LevelLogits
from nelbo.diffusion.reverse import Posterior
from nelbo.diffusion.schedules import LearnedMonotone, Linear, log_density
from nelbo.models.build import build
from nelbo.models.config import ModelConfig
from nelbo.nn.embedding import zero
from nelbo.runs import config as run_config
from nelbo.training import objective, trainer
from nelbo.training.objective import Objective, log_second_moment
from nelbo.training.timestep_samplers import (
    BINS,
    SecondMomentImportance,
    Stratified,
    TimestepSampler,
    Uniform,
    stratified,
)

LEVELS = Levels(5)

# `nelbo.train` is the function; this is its module.
training = importlib.import_module("nelbo.runs.train")


@pytest.fixture(autouse=True)
def _seed():
    with seeded(7):
        yield


def strata(u, count):
    return (u.flatten() * count).long().sort().values.tolist()


def steep(u):
    return (-4 * u).exp()


def taught(f=steep, steps=100):
    law = SecondMomentImportance()
    for _ in range(steps):
        u, _ = law(128)
        law.learn(u, f(u))
    return law


def schedule_of(shift, **options):
    """A learned schedule, moved away from where it starts."""
    schedule = LearnedMonotone(-5.0, 4.0, width=6, **options)
    with torch.no_grad():
        for p in schedule.interior():
            p += shift * torch.randn_like(p)
    return schedule


# ---- the global batch


@pytest.mark.parametrize("examples", [21, 5, 12, 1, 49, 98, 103, 107])
def test_a_batch_is_stratified(examples):
    """49 and its like give no extra draw (PITFALLS 13)."""
    u = stratified(examples)
    assert u.shape == (examples,) and u.dtype == torch.float64
    assert strata(u, examples) == list(range(examples))


def test_no_example_is_tied_to_a_time():
    """Each u is uniform by itself."""
    u = torch.stack([stratified(6) for _ in range(4000)])
    error = math.sqrt(1 / 12 / 4000)
    assert ((u.mean(0) - 0.5).abs() < 4.5 * error).all()
    assert ((u.var(0) - 1 / 12).abs() < 0.006).all()


@pytest.mark.parametrize(
    "law", [Uniform(), Stratified(), taught()], ids=lambda law: law._get_name()
)
def test_processes_share_one_draw(law: TimestepSampler):
    """Equal generators: the parts are different, and together the draw of the global batch."""
    parts = []
    for rank in range(4):
        part = BatchShard(torch.arange(128)[rank::4], 128)
        with seeded(5), part:
            parts.append(part.of(law(128)[0]))
    u = torch.cat(parts)
    assert len(u.unique()) == 128
    if isinstance(law, SecondMomentImportance):  # its distribution function makes p uniform
        edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
        inside = (u[:, None] - edges[:-1]).clamp(0, 1 / BINS)
        u = (inside * law.density()).sum(1)
    if not isinstance(law, Uniform):
        assert strata(u, 128) == list(range(128))


# ---- importance


@pytest.mark.parametrize("f", [torch.ones_like, torch.sin, steep, lambda u: u**3], ids=range(4))
def test_weighted_draws_are_unbiased(f):
    """E_p[ f/p ] = ∫ f, though p was learned from another f."""
    law = taught()
    u, weight = law(20_000)
    fine = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    torch.testing.assert_close((weight * f(u)).mean(), f(fine).mean(), rtol=2e-4, atol=0)


def test_the_density_is_one_and_bounds_its_weights():
    for law in (
        SecondMomentImportance(),
        taught(),
        taught(torch.zeros_like),
        SecondMomentImportance(uniform=1.0),
    ):
        p = law.density()
        assert p.mean().item() == pytest.approx(1, abs=1e-12)
        assert p.min() >= law.uniform - 1e-12
        assert law(1000)[1].max() <= 1 / law.uniform + 1e-9


def test_the_density_is_the_best_one():
    """Mixed with its uniform share, p ∝ √E[f²|u]; then E_p[(f/p)²] is near (∫|f|)², its least."""
    law = taught(steps=400)
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[:-1]
    rms = steep(edges + 0.5 / BINS)
    want = law.uniform + (1 - law.uniform) * rms / rms.mean()
    # at the ends the smoothing sees one side only, 1.5/64 wide, over which f moves by a tenth
    torch.testing.assert_close(law.density(), want, rtol=0.1, atol=0)
    u, weight = law(10_000)
    second, uniform = (
        (weight * steep(u)).square().mean(),
        steep(Uniform()(10_000)[0]).square().mean(),
    )
    least = ((1 - math.exp(-4)) / 4) ** 2
    assert second < 1.1 * least and uniform > 2 * least


def test_one_small_step_is_enough_to_be_of_use():
    """No warm-up (PITFALLS 39): after 16 draws the second moment is already far lower."""
    law = taught(steps=0)
    u, _ = law(16)
    law.learn(u, steep(u))
    p = law.density().repeat_interleave(100)
    fine = (torch.arange(100 * BINS, dtype=torch.float64) + 0.5) / (100 * BINS)
    assert (steep(fine) ** 2 / p).mean() < 0.65 * (steep(fine) ** 2).mean()


def test_it_forgets():
    """A density learned from one f becomes that of another."""
    law = taught()
    for _ in range(600):
        u, _ = law(128)
        law.learn(u, steep(1 - u))
    torch.testing.assert_close(
        law.density(), taught(lambda u: steep(1 - u)).density(), rtol=0.1, atol=0
    )


def test_shares_outside_their_range_are_refused():
    for uniform in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"uniform must be in \(0, 1\]; got .*; try 0.25"):
            SecondMomentImportance(uniform)


# ---- in the loss


class Bump(torch.nn.Module):
    """Logits that depend on z and the level."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))

    def forward(self, z, level):
        return (z + 0.1 * level[:, None, None, None]).sin()[..., None] * self.weight


def level_model(schedule, network=None):
    process, head = GaussianDiffusion(schedule, LEVELS), LevelLogits(LEVELS.values)
    return Model(network or Bump(), process, head, Posterior(), LevelDecoder(), (1, 2, 3))


@pytest.mark.parametrize("weight", [objective.bound, objective.simple, objective.min_snr])
def test_every_objective_and_its_gradient_keep_their_mean(weight):
    """Uniform and weighted times give the same loss, bound and gradient, λ included."""
    model = level_model(Linear(-5.0, 4.0))
    x = torch.randint(0, 5, (500, 1, 2, 3))
    results = []
    for law in (Stratified(), taught()):
        draws = []
        for _ in range(40):
            u, weights = law(len(x))
            loss = Objective(weight, 0.5)(model, Batch(x[torch.randperm(500)]), u, weight=weights)
            (gradient,) = torch.autograd.grad(loss.loss, model.network.weight)
            draws.append(torch.cat([gradient, torch.stack([loss.loss.detach(), loss.bound])]))
        results.append(torch.stack(draws))
    uniform, importance = results
    error = ((uniform.var(0) + importance.var(0)) / 40).sqrt()
    difference = uniform.mean(0) - importance.mean(0)
    assert (difference.abs() < 4 * error).all()
    assert error.norm() < 0.02 * uniform.mean(0).norm()


def test_what_the_law_learns_from_is_the_weighted_rate_at_uniform_times():
    model = level_model(Linear(-5.0, 4.0))
    x, u = torch.randint(0, 5, (9, 1, 2, 3)), torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    each = []
    for factor in (1.0, 3.0):
        with seeded(1):
            each.append(
                Objective(objective.p2)(model, Batch(x), u, weight=factor * torch.ones(9)).each
            )
    torch.testing.assert_close(each[0], each[1])
    with seeded(1):
        plain = Objective()(model, Batch(x), u).each
    torch.testing.assert_close(each[0], plain * objective.p2(model.process.schedule, u))


def test_the_density_is_part_of_the_checkpoint(tmp_path, monkeypatch):
    """A run of importance times that was stopped ends as one that was not, to the bit."""
    options = {**TINY, "evaluate_every": 4, "times": "importance", "schedule": "learned-ends"}
    whole = training.train("digits", tmp_path / "whole", **options).path
    order = trainer.batch_indices

    def interrupt(examples, batch, step, *where):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return order(examples, batch, step, *where)

    monkeypatch.setattr(trainer, "batch_indices", interrupt)
    with pytest.raises(KeyboardInterrupt):
        training.train("digits", tmp_path / "run", **options)
    monkeypatch.setattr(trainer, "batch_indices", order)
    training.resume(tmp_path / "run")
    left, right = (
        tensor_files.read_tensors(path / run_config.STATE)[0] for path in (whole, tmp_path / "run")
    )
    assert left["law.count"].sum() > 0 and left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_classic_recipe_trains_from_the_first_of_its_steps(tmp_path):
    """β linear in 1000 steps, in continuous time from 1/1000 on: γ = logit of the first β."""
    options = {"head": "noise", "schedule": "betas", "times": "iid", "objective": "simple"}
    run = training.train("digits", tmp_path / "run", **TINY, **options)
    schedule = run.model.process.schedule
    first = schedule(torch.tensor([schedule.start], dtype=torch.float64)).item()
    assert schedule.start == 1e-3 and first == pytest.approx(math.log(1e-4 / (1 - 1e-4)))
    assert math.isfinite(run.metrics[-1]["validation"])


@pytest.mark.parametrize(
    ("schedule", "gamma"), [("betas", math.log(1e-4 / (1 - 1e-4))), ("learned", -7.0)]
)
def test_a_density_starts_at_the_spread_that_its_schedule_leaves(schedule, gamma):
    config = ModelConfig(
        schedule=schedule, head="noise", step="posterior", decoder="gaussian", network="mlp"
    )
    model = build(config, Schema("real", (3,), None))
    assert model.decoder.log_spread.item() == pytest.approx(gamma / 2)


# ---- a learned γ


def test_the_gradient_of_the_density_is_at_fixed_gamma():
    """log_density against difference quotients with t found again for the same γ."""
    schedule = schedule_of(0.5)
    t = torch.tensor([0.13, 0.5, 0.81], dtype=torch.float64)
    gamma = schedule(t).detach()

    def at_gamma():
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(40):
            middle = (low + high) / 2
            below = schedule(middle) < gamma
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return -slope(schedule, low).log()

    torch.testing.assert_close(log_density(schedule, t), at_gamma())
    for parameter in schedule.interior():
        (got,) = torch.autograd.grad(log_density(schedule, t).sum(), parameter)
        flat, want = parameter.data.view(-1), torch.empty_like(got).view(-1)
        for i in range(len(flat)):
            values = []
            for h in (1e-5, -1e-5):
                flat[i] += h
                values.append(at_gamma().sum().item())
                flat[i] -= h
            want[i] = (values[0] - values[1]) / 2e-5
        torch.testing.assert_close(got.view(-1), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("law", [Stratified(), taught()], ids=["uniform", "importance"])
def test_the_interior_goes_down_the_second_moment(law):
    """With d = γ'(t) h(γ(t)): the gradient of log ∫ d² dt, by autograd through h, is got from
    the values of d alone, whichever times they were drawn at."""
    schedule = schedule_of(0.5, learn_endpoints=True)
    fine = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
    want = torch.autograd.grad(
        (slope(schedule, fine) * (-0.3 * schedule(fine)).exp()).square().mean().log(),
        schedule.interior(),
    )
    t, weight = law(50_000)
    d = (slope(schedule, t) * (-0.3 * schedule(t)).exp()).detach()
    value = log_second_moment(schedule, t, weight * d**2, weight)
    assert value.item() == 0
    got = torch.autograd.grad(value, schedule.interior(), retain_graph=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4)
    ends = torch.autograd.grad(value, schedule.ends, allow_unused=True)
    assert ends[0] is None


@pytest.mark.parametrize("cross_entropy", [0.0, 0.5])
def test_each_parameter_has_the_gradient_of_its_loss(cross_entropy):
    """Network and ends get the gradient of the loss, the interior that of the second moment
    and nothing of the loss."""
    schedule = schedule_of(0.5, learn_endpoints=True)
    model = level_model(schedule)
    x, (u, weight) = torch.randint(0, 5, (40, 1, 2, 3)), taught()(40)
    with seeded(1):
        of_both = Objective(objective.bound, cross_entropy)
        loss = of_both(model, Batch(x), u, weight=weight)
    (loss.loss + of_both.interior(model, u, weight, loss.rate)).backward()
    moment = log_second_moment(schedule, u, weight * loss.rate**2, weight)
    want = torch.autograd.grad(moment, schedule.interior())
    for p, gradient in zip(schedule.interior(), want, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    fixed = level_model(schedule)
    fixed.load_state_dict(model.state_dict())
    with seeded(1), constant(schedule.interior()):
        same = Objective(objective.bound, cross_entropy)(fixed, Batch(x), u, weight=weight).loss
        ends, network = torch.autograd.grad(same, [schedule.ends, fixed.network.weight])
    torch.testing.assert_close(same, loss.loss)
    torch.testing.assert_close(schedule.ends.grad, ends)
    torch.testing.assert_close(model.network.weight.grad, network)
    assert ends.abs().min() > 0 and all(p.requires_grad for p in schedule.parameters())


def test_the_bound_does_not_depend_on_the_interior():
    """Equation 8 by quadrature: ∫ ½ γ' SNR ‖e‖² dt = ½ (SNR(0) − SNR(1)) ‖e‖²."""
    t = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    e = torch.ones(len(t), 1, dtype=torch.float64)
    squares = []
    for shift in (0.0, 0.4, 0.8):
        process = GaussianDiffusion(schedule_of(shift), Affine())
        d = process.rate(e, e, 0 * e, t).detach()
        assert d.mean().item() == pytest.approx((math.exp(5) - math.exp(-4)) / 2, rel=1e-5)
        squares.append(d.square().mean().item())
    assert min(abs(math.log(a / b)) for a, b in pairwise(squares)) > 0.05


def test_a_learned_gamma_lowers_the_variance_of_a_draw():
    """The exact denoiser of independent pixels: after 120 steps single draws of the bound have
    clearly less variance than with γ linear, and the same mean."""
    schedule = LearnedMonotone(-5.0, 6.0, width=8)
    model = level_model(schedule, zero(Bump()))
    step = torch.optim.Adam(schedule.interior(), lr=0.05)
    for _ in range(120):
        x, (u, weight) = torch.randint(0, 5, (64, 1, 2, 3)), Stratified()(64)
        step.zero_grad()
        rate = Objective()(model, Batch(x), u, weight=weight).rate
        Objective().interior(model, u, weight, rate).backward()
        step.step()
    draws = []
    for gamma in (schedule, Linear(-5.0, 6.0)):
        x, (u, _) = torch.randint(0, 5, (20_000, 1, 2, 3)), Uniform()(20_000)
        with torch.no_grad():
            draws.append(Objective()(level_model(gamma, zero(Bump())), Batch(x), u).each)
    learned, linear = draws
    assert learned.var() < 0.6 * linear.var()
    error = ((learned.var() + linear.var()) / 20_000).sqrt()
    assert abs(learned.mean() - linear.mean()) < 4 * error
