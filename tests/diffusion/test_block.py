"""Block diffusion: the sum over blocks of masked diffusion given the clean blocks before."""

import itertools
import math

import pytest
import torch
from support.closed_forms import Formula, legendre_nodes, states
from support.contracts import SymbolContract
from torch import Tensor
from torch.distributions import kl_divergence

import nelbo
from nelbo._utils.numerics import seeded
from nelbo.codec.api import compress, decompress
from nelbo.codec.settings import Settings
from nelbo.diffusion.decoder import Categorical
from nelbo.diffusion.masked import BlockDiffusion, MaskedDiffusion
from nelbo.diffusion.model import Model, measuring
from nelbo.diffusion.parametrization import SymbolLogits
from nelbo.diffusion.reverse import Posterior
from nelbo.diffusion.schedules import Linear, PowerAlpha
from nelbo.diffusion.times import TimeGrid, elbo
from nelbo.diffusion.unmasking import UnmaskingOrder
from nelbo.evaluation.unmasking_order import log_prob
from nelbo.sampling.samplers import ancestral
from nelbo.testing import assert_mean

K, L = 2, 4
X = torch.tensor(list(itertools.product(range(K), repeat=L)))
Z = torch.tensor(states(K, L))  # K stands for the mask


class TestBlockDiffusion(SymbolContract):
    @pytest.fixture
    def process(self):
        """Of 14 blocks, 1 and 2 for the shapes of the examples."""
        return BlockDiffusion(Linear(-4.0, 3.0), 5, 8)

    def path(self, process, x):
        """... and the block of time t is masked, so that there is something to guess."""
        e, guess, s, t, z_s, z = super().path(process, x)
        _, places = process.rates_of_places(t, x.shape[1:])
        return e, guess, s, t, z_s, torch.where(places, process.mask, z)


with seeded(2):
    TABLE = 0.7 * torch.randn((K + 1) ** L, L, K, dtype=torch.float64)


def logits_of(z: Tensor) -> Tensor:
    """Logits (B, L, K) that depend on all of z."""
    return TABLE[(z * (K + 1) ** torch.arange(L)).sum(1)]


def made(process):
    def network(features: Tensor, level: Tensor) -> Tensor:
        return logits_of(features.reshape(-1, L, K + 1).argmax(-1))

    return Model(Formula(network), process, SymbolLogits(K), Posterior(), Categorical(), (L,))


def cost(x: Tensor, shown: set[int], asked: set[int]) -> Tensor:
    """Σ -log P(x_i|x of what shows) over the places asked."""
    z = torch.tensor([[k if i in shown else K for i, k in enumerate(x.tolist())]])
    log_p = logits_of(z)[0].log_softmax(-1)
    return -sum(log_p[i, x[i]] for i in asked)


def by_counts(x: Tensor, block: int) -> Tensor:
    """The bound in continuous time: Σ_blocks Σ_l 1/l E_{|S|=l} Σ_S -log P(x_i|z)."""
    total = torch.zeros(()).double()
    for first in range(0, L, block):
        places = range(first, min(first + block, L))
        for size in range(1, len(places) + 1):
            sets = list(itertools.combinations(places, size))
            for hidden in sets:
                shown = {*range(first), *places} - {*hidden}
                total = total + cost(x, shown, {*hidden}) / size / len(sets)
    return total


def by_steps(x: Tensor, block: int, steps: int) -> Tensor:
    """The same with even steps of each block, where α = 1 - τ²."""
    total = torch.zeros(()).double()
    for first in range(0, L, block):
        places = range(first, min(first + block, L))
        for k in range(1, steps + 1):
            hide, before = (k / steps) ** 2, ((k - 1) / steps) ** 2
            for pattern in itertools.product([True, False], repeat=len(places)):
                hidden = {i for i, hides in zip(places, pattern, strict=True) if hides}
                if hidden:
                    q = hide ** len(hidden) * (1 - hide) ** (len(places) - len(hidden))
                    shown = {*range(first), *places} - hidden
                    total = total + q * (1 - before / hide) * cost(x, shown, hidden)
    return total


def mean(process, x, t, each):
    """E_q(z_t|x) of a cost of each z."""
    q = process.marginal(x, t).log_prob(Z).exp()
    return torch.where(q > 0, q * each, 0.0).sum()


def rate(model, x, t):
    now, e = torch.full((len(Z),), t, dtype=torch.float64), x.expand(len(Z), L)
    prediction = model.predict(Z, now)
    return mean(model.process, e, now, model.process.predicted_rate(Z, e, prediction, now))


def continuous(model, x):
    n, total = model.process.blocks((L,)), torch.zeros(()).double()
    for k in range(n):
        nodes = zip(*legendre_nodes(k / n, (k + 1) / n, 4), strict=True)
        total = total + sum(w * rate(model, x, t.item()) for t, w in nodes)
    return total


def on_grid(model, x, times):
    """Reconstruction and diffusion, with sums over all z."""
    one, e = torch.ones(len(Z)).double(), x.expand(len(Z), L)
    first = times[0] * one
    total = mean(model.process, e, first, -model.likelihood(Z, first).log_prob(e))
    for s, t in itertools.pairwise(times):
        q = model.process.posterior(Z, e, s * one, t * one)
        kl = kl_divergence(q, model.reverse(Z, s * one, t * one))
        total = total + mean(model.process, e, t * one, kl)
    return total


def even(steps):
    return [k / steps for k in range(1, steps + 1)]


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_the_bound_is_the_sum_over_blocks(block):
    """By mask counts of each block; continuous time and T = 2 and 3 steps of each block."""
    model = made(BlockDiffusion(PowerAlpha(2.0), K, block))
    n = model.process.blocks((L,))
    with torch.no_grad():
        for x in X[::5]:
            torch.testing.assert_close(continuous(model, x), by_counts(x, block))
            for steps in (1, 2, 3):
                found = on_grid(model, x, even(n * steps))
                torch.testing.assert_close(found, by_steps(x, block, steps))
    last = torch.ones(1).double()
    assert kl_divergence(model.process.marginal(X[:1], last), model.process.prior((L,), last)) == 0


@pytest.mark.parametrize("block", [1, 2, 3, 4])
def test_bounds_sum_to_at_most_one(block):
    """Equation 1: Σ_x exp(ELBO(x)) <= 1; of blocks of one symbol, exactly 1."""
    total = sum(math.exp(-by_counts(x, block)) for x in X)
    assert abs(total - 1) < 1e-12 if block == 1 else 0.3 < total < 1


def test_steps_over_several_blocks_are_a_bound_too():
    """Of a network that predicts all that is hidden."""
    model = made(BlockDiffusion(PowerAlpha(2.0), K, 1))
    with torch.no_grad():
        for times in ([1.0], [0.3, 1.0], [0.4, 0.6, 1.0]):
            total = sum(math.exp(-on_grid(model, x, times)) for x in X)
            assert 0.3 < total < 1 + 1e-12


def test_blocks_of_one_are_autoregressive():
    """The bound is -Σ_i log P(x_i|x_<i), and samples have these probabilities."""
    model = made(BlockDiffusion(PowerAlpha(2.0), K, 1))
    wanted = torch.stack([sum(cost(x, {*range(i)}, {i}) for i in range(L)) for x in X])
    with torch.no_grad():
        found = torch.stack([continuous(model, x) for x in X])
    torch.testing.assert_close(found, wanted)
    x = ancestral(model, 20_000, TimeGrid.uniform(L), seed=3)
    seen = (x.long() @ K ** torch.arange(L - 1, -1, -1))[:, None] == torch.arange(K**L)
    assert_mean(seen.double(), (-wanted).exp(), 0.004)


def test_one_block_is_masked_diffusion():
    """The same numbers, to the last bit, for the same draws."""
    models = [
        made(BlockDiffusion(PowerAlpha(2.0), K, L)),
        made(MaskedDiffusion(PowerAlpha(2.0), K)),
    ]
    for times in (None, TimeGrid.uniform(4), TimeGrid([0.3, 1.0])):
        found = []
        for model in models:
            with torch.no_grad(), seeded(5):
                found.append(torch.stack(elbo(model, X, times)))
        assert torch.equal(*found) and found[0].sum() > 0


@pytest.mark.parametrize(
    ("times", "masks"),
    [(None, None), (None, "plain"), (TimeGrid.uniform(4), None)],
    ids=["continuous", "exact counts", "grid"],
)
def test_the_bound_is_estimated(times, masks):
    """The mean of the package's estimators, and the errors that they state."""
    model = made(BlockDiffusion(PowerAlpha(2.0), K, 2))
    wanted = sum(by_counts(x, 2) if times is None else by_steps(x, 2, 2) for x in X) / len(X)
    off = []
    for seed in range(6):
        calls = 16 if masks is None else 4  # of six masks in all
        options = {"times": times, "masks": masks, "calls": calls, "seed": seed}
        found = nelbo.evaluate(model, X.repeat(2, 1), **options)
        error = found.standard_error.monte_carlo * found.nats / found.bits_per_dim
        off.append((found.nats - wanted.item()) / error)
    assert error < 0.1 * wanted
    assert 0.3 < sum(v * v for v in off) < 28, off  # χ² of 6, but for 1 in 1000 below, 10^4 above


def test_all_masks_of_a_few_blocks_are_exact():
    """As many calls as there are masks: the sum over the counts of each block, no error."""
    model = made(BlockDiffusion(PowerAlpha(2.0), K, 2))
    found = nelbo.evaluate(model, X, masks="plain", calls=256)
    wanted = sum(by_counts(x, 2) for x in X) / len(X)
    assert found.nats == pytest.approx(wanted.item(), rel=1e-12)
    assert found.standard_error.monte_carlo == 0


def test_the_block_of_a_time():
    """The last block is masked first; at a boundary it is the one that ends there."""
    process = BlockDiffusion(PowerAlpha(2.0), K, 2)
    t = torch.tensor([0.0, 0.1, 1 / 3, 0.34, 2 / 3, 0.7, 1.0], dtype=torch.float64)
    block, tau = process.current(t, (5,))
    assert block.tolist() == [2, 2, 2, 1, 1, 0, 0]
    torch.testing.assert_close(tau, torch.tensor([0, 0.3, 1, 0.02, 1, 0.1, 1], dtype=t.dtype))
    times = process.times_of_places(torch.tensor([0.5]).double(), (5,))
    torch.testing.assert_close(times, torch.tensor([[0, 0, 0.5, 0.5, 1]]).double())
    for n in range(1, 60):
        ends = torch.arange(1, n + 1).double() / n
        found, tau = BlockDiffusion(PowerAlpha(), K, 1).current(ends, (n,))
        assert found.tolist() == list(range(n - 1, -1, -1)) and (tau == 1).all()
    with pytest.raises(ValueError, match="block must be at least 1; got 0"):
        BlockDiffusion(PowerAlpha(), K, 0)


def test_it_compresses():
    model = made(BlockDiffusion(PowerAlpha(2.0), K, 2))
    grid = tuple(TimeGrid.uniform(4).times.tolist())
    data = compress(model, X, Settings(grid))
    assert torch.equal(decompress(data, model).x.long(), X)


def test_the_random_order_is_refused():
    """It is a mean over orders of all symbols, and blocks have one after the other."""
    model = made(BlockDiffusion(PowerAlpha(2.0), K, 2))
    with pytest.raises(ValueError, match="random needs a masked model; got one of BlockDiffusion"):
        nelbo.evaluate(model, X, sampler="random")


@pytest.mark.parametrize("block", [1, 2, 4])
def test_an_order_within_blocks_is_exact(block):
    """Σ_x P(x) = 1; of blocks of one symbol it is P(x) from left to right, and so is the bound."""
    model = made(BlockDiffusion(PowerAlpha(2.0), K, block))
    for sampler in ("greedy", "left-to-right"):
        order = UnmaskingOrder(sampler)
        with measuring(model):
            found = log_prob(model, nelbo.Batch(X), order)
        assert abs(found.exp().sum().item() - 1) < 1e-12
    if block == 1:
        bound = nelbo.evaluate(model, X, calls=2400, sampler="left-to-right")
        error = bound.standard_error.monte_carlo
        assert abs(bound.bits_per_dim - bound.in_order.bits_per_dim) < 4 * error + 1e-9
