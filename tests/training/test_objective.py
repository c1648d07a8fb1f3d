"""Training losses are what their names say."""

import math

import pytest
import torch
from torch import nn

from nelbo._utils.numerics import seeded
from nelbo.data import Schema
from nelbo.diffusion.batch import Batch
from nelbo.diffusion.decoder import Evidence, LevelDecoder
from nelbo.diffusion.distributions import draw
from nelbo.diffusion.elbo import prior_term, reconstruction_term
from nelbo.diffusion.gaussian import GaussianDiffusion, Levels
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import EpsPrediction, LevelLogits
from nelbo.diffusion.reverse import Posterior
from nelbo.diffusion.schedules import Cosine, LearnedMonotone, Linear
from nelbo.diffusion.times import ContinuousTime, elbo, stratified
from nelbo.training import objective
from nelbo.training.augmentation import augment
from nelbo.training.objective import Objective

LEVELS = Levels(5)


class Wiggle(nn.Module):
    """Some smooth function of z, the level and the condition."""

    def __init__(self, outputs=1):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, outputs, dtype=torch.float64))

    def forward(self, z, level, condition=None):
        shift = 0 if condition is None else condition[..., None, None]
        base = (z + 0.1 * level[:, None, None, None] + shift).sin()
        return base * self.weight[0] if len(self.weight) == 1 else base[..., None] * self.weight


def noise_model(schedule):
    decoder = Evidence(LEVELS)
    return Model(
        Wiggle(),
        GaussianDiffusion(schedule, LEVELS),
        EpsPrediction(),
        Posterior(),
        decoder,
        (1, 3, 5),
    )


@pytest.fixture
def x():
    with seeded(3):
        return torch.randint(0, 5, (7, 1, 3, 5))


@pytest.mark.parametrize("schedule", [Linear(-5.0, 4.0), Cosine(-5.0, 4.0)])
@pytest.mark.parametrize(
    ("weight", "of_noise_error"),
    [
        (objective.simple, lambda snr: torch.ones_like(snr)),
        (objective.min_snr, lambda snr: torch.minimum(snr, torch.tensor(5.0)) / snr),
        (objective.p2, lambda snr: 1 / (1 + snr)),
    ],
)
def test_reweightings_weigh_the_error_of_the_noise(x, schedule, weight, of_noise_error):
    """The reconstruction of a share, of the others the named weight times ‖ε - ε̂‖²."""
    model = noise_model(schedule)
    u = torch.linspace(0.05, 0.95, len(x), dtype=torch.float64)
    with seeded(1):
        loss = Objective(weight, share=0.3)(model, Batch(x), u).loss
    with seeded(1):
        first = stratified(len(x))[:, 0] < 0.3
        t, e = torch.where(first, 0.0, u), model.embed(x)
        q = model.process.marginal(e, t).base_dist
        z = q.rsample()
        error = ((z - q.loc) / q.scale - model.network(z, schedule(t))).square().flatten(1).sum(1)
        decoded = -model.likelihood(z, t).log_prob(x)
        prior = prior_term(model, x, torch.ones_like(u))
    assert 0 < first.sum() < len(x)
    diffusion = of_noise_error((-schedule(t)).exp()) * error
    expected = (torch.where(first, decoded / 0.3, diffusion / 0.7) + prior).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_of_all_or_nothing_is_refused(share):
    with pytest.raises(ValueError, match=f"share must be in \\(0, 1\\); got {share}"):
        Objective(share=share)


def test_the_bound_is_minus_the_elbo(x):
    """With w = 1, λ = 0 the expected loss is the mean of −ELBO, for any share."""
    model = noise_model(LearnedMonotone(-5.0, 4.0, learn_endpoints=True))
    many = x.repeat(2000, 1, 1, 1)
    with seeded(2):
        bound = -elbo(model, many, ContinuousTime()).elbo.mean()
        losses = [
            Objective(share=0.2)(
                model, Batch(many[torch.randperm(len(many))]), stratified(len(many))[:, 0]
            )
            for _ in range(4)
        ]
    values = torch.stack([value.loss for value in losses])
    error = values.std() / 2
    assert error < 0.02 * bound
    assert abs(values.mean() - bound) < 4 * (error + 0.002 * bound)
    for value in losses:
        torch.testing.assert_close(value.loss.detach(), value.bound)


def test_gradients_reach_learned_end_points(x):
    schedule = LearnedMonotone(-5.0, 4.0, learn_endpoints=True)
    model = noise_model(schedule)
    Objective()(model, Batch(x), stratified(len(x))[:, 0]).loss.backward()
    assert schedule.ends.grad.abs().min() > 0
    assert all(parameter.grad is None for parameter in schedule.interior())


def test_cross_entropy_is_the_decoder_at_the_drawn_time(x):
    head = LevelLogits(LEVELS.values)
    process = GaussianDiffusion(Linear(-5.0, 4.0), LEVELS)
    model = Model(Wiggle(5), process, head, Posterior(), LevelDecoder(), (1, 3, 5))
    u = torch.linspace(0.05, 0.95, len(x), dtype=torch.float64)
    with seeded(1):
        plain = Objective()(model, Batch(x), u)
    with seeded(1):
        with_decoder = Objective(cross_entropy=0.5)(model, Batch(x), u)
    with seeded(1):
        t = torch.where(stratified(len(x))[:, 0] < 1 / 16, 0.0, u)
        decoded = reconstruction_term(model, x, t).cost.mean()
    torch.testing.assert_close(with_decoder.loss - plain.loss, 0.5 * decoded, rtol=1e-9, atol=0)
    torch.testing.assert_close(with_decoder.bound, plain.bound)


def test_conditions_follow_their_examples(x):
    """A batch with conditions is the mean of its halves with theirs."""
    model = noise_model(Linear(-5.0, 4.0))
    with torch.no_grad():
        t = torch.full((len(x),), 0.4, dtype=torch.float64)
        z = model.embed(x)
        condition = torch.arange(len(x), dtype=torch.float64)[:, None]
        together = model.predict(z, t, condition).e_hat
        alone = model.predict(z[3:4], t[3:4], condition[3:4]).e_hat
        without = model.predict(z, t).e_hat
        one = Batch(x, condition)[3:4]
        chosen = model.predict(z[3:4], t[3:4], one.condition).e_hat
        with pytest.raises(ValueError, match="got 7 conditions of 2 examples"):
            model.predict(z[:2], t[:2], condition)
    torch.testing.assert_close(together[3:4], alone)
    torch.testing.assert_close(chosen, alone)
    torch.testing.assert_close(together[:1], without[:1])  # condition 0
    assert (together[1:] - without[1:]).abs().min() > 0


@pytest.mark.parametrize("cross_entropy", [0.0, 0.3])
def test_each_term_is_given_its_own_conditions(x, cross_entropy):
    """The loss of a batch with conditions is that of the model that is given them."""
    head = LevelLogits(LEVELS.values)
    process = GaussianDiffusion(Linear(-5.0, 4.0), LEVELS)
    model = Model(Wiggle(5), process, head, Posterior(), LevelDecoder(), (1, 3, 5))
    u = torch.linspace(0.05, 0.95, len(x), dtype=torch.float64)
    condition = torch.arange(len(x), dtype=torch.float64)[:, None] + 1
    objective = Objective(cross_entropy=cross_entropy, share=0.3)
    with seeded(1):
        loss = objective(model, Batch(x, condition), u).loss
    with seeded(1):
        first = stratified(len(x))[:, 0] < 0.3
        t = torch.where(first, 0.0, u)
        z = draw(process.marginal(model.embed(x), t))
        rate = process.rate(z, model.embed(x), model.predict(z, t, condition).e_hat, t) / 0.7
        decoded = -model.likelihood(z, t, condition).log_prob(x)
        prior = prior_term(model, x, torch.ones_like(u))
    each = torch.where(first, decoded / 0.3, rate) + prior + cross_entropy * decoded
    torch.testing.assert_close(loss, each.mean())


def test_augmented_images_are_marked_and_the_others_untouched():
    schema = Schema("levels", (3, 9, 6), 17)
    with seeded(5):
        x = torch.randint(0, 17, (400, 3, 9, 6))
        moved, which = augment(x, 0.7, schema)
    assert which.unique().tolist() == [0.0, 1.0]
    assert abs(which.mean().item() - 0.7) < 4 * math.sqrt(0.21 / 400)
    assert torch.equal(moved[which == 0], x[which == 0])
    assert (moved[which == 1] != x[which == 1]).flatten(1).any(1).all()
    assert moved.dtype == x.dtype and moved.min() >= 0 and moved.max() <= 16


def test_augmentation_moves_little():
    """A bright dot in the middle stays within the stated shift, rotation and scale."""
    schema = Schema("levels", (1, 17, 17), 256)
    x = torch.zeros(300, 1, 17, 17, dtype=torch.int64)
    x[:, :, 7:10, 7:10] = 255
    with seeded(6):
        moved, which = augment(x, 0.99, schema)
    mass = moved[which == 1].double().flatten(1)
    place = torch.arange(17.0).double() - 8
    rows = (mass.reshape(-1, 17, 17).sum(2) * place).sum(1) / mass.sum(1)
    assert rows.abs().max() < 0.25 * 8.5 * 1.3
    assert rows.std() > 0.5
