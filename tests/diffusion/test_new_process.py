"""A process that the package does not have takes one class: all that is above works with it."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent
from torch.nn.functional import one_hot

from nelbo._utils.numerics import over, seeded, slope
from nelbo.codec.api import compress, decompress
from nelbo.codec.settings import Settings
from nelbo.data import Schema
from nelbo.diffusion.decoder import Categorical
from nelbo.diffusion.distributions import Discrete
from nelbo.diffusion.model import Model
from nelbo.diffusion.parametrization import SymbolLogits
from nelbo.diffusion.process import ForwardProcess, Shape, per_example
from nelbo.diffusion.reverse import Posterior
from nelbo.diffusion.schedules import Linear, Schedule
from nelbo.diffusion.times import TimeGrid, elbo
from nelbo.evaluation.evaluate import evaluate
from nelbo.evaluation.grid_search import best_grid
from nelbo.evaluation.per_dimension import own_step, steps_of
from nelbo.nn.mlp import MLP
from nelbo.pages.images import Canvas
from nelbo.report.studies import trajectory
from nelbo.sampling.samplers import ancestral, complete, probability_flow
from nelbo.testing import ProcessContract

SHAPE, LEVELS = (1, 4, 5), 5
GRID = TimeGrid.uniform(8)


class FrequencyDiffusion(ForwardProcess):
    """Each symbol is kept with probability α_t, else any of K by its frequency π_k.

    Source: Vignac et al. 2023, section 4.1.
    """

    frequency: Tensor

    def __init__(self, schedule: Schedule, count: int) -> None:
        super().__init__(schedule)
        self.count = self.width = self.codes = self.channels = count
        falling = torch.arange(count, 0, -1).double()
        self.register_buffer("frequency", falling / falling.sum())

    def embed(self, x: Tensor) -> Tensor:
        return self._one(x).log()

    def features(self, z: Tensor) -> Tensor:
        return self._one(z).movedim(-1, 2).flatten(1, 2)

    def log_snr_input(self, t: Tensor) -> Tensor:
        return self.schedule(t)

    def transition(self, z: Tensor, s: Tensor, t: Tensor) -> Independent:
        return self._of(self._kept(self._one(z), self.log_kept(s, t).exp()))

    def marginal(self, e: Tensor, t: Tensor) -> Independent:
        return self._of(self._kept(e.exp(), self.alpha(t)))

    def posterior(self, z: Tensor, e: Tensor, s: Tensor, t: Tensor) -> Independent:
        one, kept = self._one(z), self.log_kept(s, t).exp()
        of_z = self.frequency[z.long()][..., None]
        back = over(kept, one) * one + (1 - over(kept, one)) * of_z
        joint = back * self._kept(e.exp(), self.alpha(s))
        return self._of(joint / joint.sum(-1, keepdim=True))

    def prior(self, shape: Shape, t: Tensor) -> Independent:
        return self._of(self.frequency.expand(len(t), *shape, self.count).to(t))

    def rate(self, z: Tensor, e: Tensor, e_hat: Tensor, t: Tensor) -> Tensor:
        """γ'(1-α_t) π_z Σ_{j≠z} u_j log(u_j/û_j) - u_j + û_j, u_j = q(z_t = j)/q(z_t = z)."""
        marginals = (self._kept(v.exp(), self.alpha(t)) for v in (e, e_hat))
        u, u_hat = (q / q.gather(-1, z.long()[..., None]) for q in marginals)
        each = u * (u / u_hat).log() - u + u_hat
        each = self.frequency[z.long()][..., None] * each
        return slope(self.schedule, t) * self.schedule(t).sigmoid() * _sum(each)

    def _one(self, z: Tensor) -> Tensor:
        return one_hot(z.long(), self.count).double()

    def _kept(self, p: Tensor, share: Tensor) -> Tensor:
        return over(share, p) * p + (1 - over(share, p)) * self.frequency

    def _of(self, p: Tensor) -> Independent:
        return per_example(Discrete(p.log()))


def _sum(each: Tensor) -> Tensor:
    return each.flatten(1).sum(1)


class TestFrequencyDiffusion(ProcessContract):
    @staticmethod
    def examples(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(LEVELS, shape)

    @staticmethod
    def guess(e: Tensor) -> Tensor:
        return torch.randn_like(e.exp()).log_softmax(-1)

    @pytest.fixture
    def process(self):
        return FrequencyDiffusion(Linear(-4.0, 3.0), LEVELS)


@pytest.fixture(scope="module")
def x():
    with seeded(0):
        return torch.randint(LEVELS, (40, *SHAPE)).clamp(max=3)


@pytest.fixture(scope="module")
def model(x):
    with seeded(0):
        network = MLP(SHAPE, LEVELS, LEVELS, 16, 1, 0.0, 0)
    process, head = FrequencyDiffusion(Linear(-6.0, 4.0), LEVELS), SymbolLogits(LEVELS, SHAPE)
    made = Model(network, process, head, Posterior(), Categorical(), SHAPE).double().eval()
    made.fit_statistics(x)
    return made


@pytest.mark.parametrize("times", [GRID, None], ids=["grid", "continuous"])
def test_its_bound_is_estimated(model, x, times):
    """The mean of the plain estimator, within four standard errors of both."""
    found = evaluate(model, x, times=times, calls=16, seed=1)
    with torch.no_grad(), seeded(2):
        plain = torch.stack([-elbo(model, x, times).elbo for _ in range(64)])
    nats = found.standard_error.monte_carlo * found.nats / found.bits_per_dim
    error = (plain.mean(1).var() / len(plain) + nats**2).sqrt()
    assert (found.nats - plain.mean()).abs() < 4 * error
    assert best_grid(model, x, 3).steps == 3


def test_it_compresses(model, x):
    data = compress(model, x, Settings(tuple(GRID.times.tolist())))
    assert torch.equal(decompress(data, model).x.long(), x)


def test_it_draws(model, x):
    assert ancestral(model, 2, GRID, 1).shape == (2, *SHAPE)
    known = x[:2] > 1
    assert torch.equal(complete(model, x[:2], known, GRID)[known], x[:2][known])
    with pytest.raises(ValueError, match="FrequencyDiffusion; use the ancestral sampler"):
        probability_flow(model, 1, GRID)


def test_it_is_reported(model, x):
    """Its steps by name, and its latents and predictions as pictures."""
    assert list(steps_of(model)) == [own_step(model)] == ["reverse step"]
    path = trajectory(model, 3, GRID, 1)
    canvas = Canvas(model.process, Schema("levels", SHAPE, LEVELS), x)
    for t, z, e_hat in zip(path.times, path.z, path.e_hat, strict=True):
        assert canvas.latent(z, t).shape == canvas.prediction(e_hat, z).shape == (3, 4, 5, 3)
