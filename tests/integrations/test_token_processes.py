"""Wrapped models of tokens that are not masked, and those of scores, by enumeration."""

import itertools
import math

import pytest
import torch
from support.closed_forms import legendre_nodes
from support.tokens import MASK, PAD, Tiny, V
from torch import nn
from torch.distributions import kl_divergence

import nelbo
from nelbo._utils.numerics import seeded
from nelbo.diffusion.times import elbo
from nelbo.integrations import wrap_tokens
from nelbo.integrations.token_scores import opinions
from nelbo.sampling.samplers import ancestral
from nelbo.training.surrogate import train_surrogate

#: shares α that noise leaves, with weights for ∫ dα; α = 1 - u⁴, as costs have a logarithm at 1
U, WEIGHTS = legendre_nodes(0.0, 1.0, 24)
SHARES = list(zip(1 - U**4, WEIGHTS * 4 * U**3, strict=True))


@pytest.fixture
def module():
    with seeded(4):
        return Tiny().double()


def every(text, scored):
    """All ids at the scored places of a text, (n, L)."""
    kinds = [range(V) if i in scored else [k] for i, k in enumerate(text)]
    return torch.tensor(list(itertools.product(*kinds)))


def chances(alpha, count=V):
    return alpha * torch.eye(count).double() + (1 - alpha) / count


def by_jumps(text, scored, score):
    """The bound on -log P of a text: E_q of the KL of jumps back, whose ratios are score(z, α)."""
    z, total = every(text, scored), 0.0
    for alpha, weight in SHARES:
        s, m = score(z, alpha), chances(alpha)[text]
        q = torch.stack([m[i][z[:, i]] for i in scored]).prod(0)
        for i in scored:
            u = m[i] / m[i][z[:, i]][:, None]
            each = u * (u / s[:, i]).log() - u + s[:, i]
            jumps = torch.arange(V) != z[:, i : i + 1]
            total = total + weight / alpha / V * (q * torch.where(jumps, each, 0.0).sum(1)).sum()
    return total.item()


def of_module(module, never=(), clock=None, shift=0):
    """Ratios of the noisy probabilities of each place, from the logits of a module."""

    def score(z, alpha):
        time = () if clock is None else (clock(alpha).expand(len(z)),)
        logits = module(z, *time).clone()
        logits[..., list(never)] = -torch.inf
        place = (torch.arange(z.shape[1]) - shift).clamp(min=0)
        m = logits.softmax(-1)[:, place] @ chances(alpha)
        return m / m.gather(-1, z[..., None])

    return score


def measured(model, batch):
    """The same by the package, of each text: E_q of its rate over all z, integrated over α."""
    texts = zip(batch.x.tolist(), batch.condition, strict=True)
    z = torch.cat([every(x, (c == -1).nonzero()[:, 0].tolist()) for x, c in texts])
    count, process = len(z) // len(batch), model.process
    x, rows = (v.repeat_interleave(count, 0) for v in (batch.x, batch.condition))
    total = torch.zeros(len(batch), dtype=torch.float64)
    with torch.no_grad():
        for alpha, weight in SHARES:
            t = (1 - alpha).pow(1 / 3).expand(len(z))  # α = 1 - t³
            log_q = process.marginal(x, t).base_dist.log_prob(z)
            q = torch.where(rows == -1, log_q, 0.0).sum(1).exp()
            rate = process.predicted_rate(z, x, model.predict(z, t, rows), t)
            total += weight / (3 * t[0] ** 2) * (q * rate).view(-1, count).sum(1)
    return total


UNIFORM = {
    "plain": ({}, {}),
    "never": ({"never": (0, 2)}, {"never": (0, 2)}),
    "padding": ({"pad_id": PAD}, {"never": (PAD,)}),
    "shift": ({"shift": 1}, {"shift": 1}),
    "sigma": ({"time": "sigma"}, {"clock": lambda alpha: -alpha.log()}),
    "alpha": ({"time": lambda alpha: alpha}, {"clock": lambda alpha: alpha}),
}


@pytest.mark.parametrize("name", UNIFORM)
def test_a_uniform_state_model_by_enumeration(module, name):
    """The bound of a text whose first token shows, by the jumps of all others."""
    options, given = UNIFORM[name]
    model = wrap_tokens(module, process="uniform", **options)
    text = [2, 1, 3]
    padded = [*text, PAD, PAD] if "pad_id" in options else text
    shown = torch.tensor([True, *[False] * (len(padded) - 1)])
    wanted = by_jumps(text, (1, 2), of_module(module, **given))
    assert abs(measured(model, model.batch([padded], shown=shown)) - wanted) < 1e-9 * wanted
    assert wanted > 1


@pytest.mark.parametrize("options", [{}, {"never": (0, 1, 4), "time": "sigma"}], ids=str)
def test_bounds_of_a_uniform_state_model_sum_to_at_most_one(module, options):
    """Equation 1: Σ_x exp(ELBO(x)) <= 1 over all answers of two tokens."""
    model = wrap_tokens(module, process="uniform", **options)
    possible = [k for k in range(V) if k not in options.get("never", ())]
    texts = [[3, *answer] for answer in itertools.product(possible, repeat=2)]
    batch = model.batch(texts, shown=torch.tensor([True, False, False]))
    total = (-measured(model, batch)).exp().sum()
    assert 0.02 < total <= 1


@pytest.mark.parametrize("times", [None, nelbo.TimeGrid.uniform(4)], ids=["continuous", "grid"])
def test_a_uniform_state_model_is_measured_and_drawn(module, times):
    model = wrap_tokens(module, process="uniform", never=[5], pad_id=PAD)
    texts = [[3, 1, 2, PAD], [PAD, 0, 1, 2], [1, 1, 1, 1]]
    shown = torch.zeros(3, 4, dtype=torch.bool)
    shown[:, 1] = True
    batch = model.batch(texts, shown=shown)
    found = nelbo.evaluate(model, batch, calls=800, times=times, seed=1)
    assert "noise replaces a token by any of the ids" in found.notes
    assert "but not padding, ids 5, whose probability is 0" in found.notes[1]
    alone = [
        nelbo.evaluate(model, model.batch([text], shown=mask), calls=1600, times=times)
        for text, mask in zip(
            ([3, 1, 2], [0, 1, 2], texts[2]), ([0, 1, 0], [1, 0, 0], [0, 1, 0, 0]), strict=True
        )
        for mask in [torch.tensor(mask) == 1]
    ]
    mean = sum(one.nats for one in alone) / 3
    error = found.standard_error.monte_carlo * found.nats / found.bits_per_dim
    assert abs(found.nats - mean) < 5 * error and error < 0.1 * mean
    drawn = ancestral(model, 3, nelbo.TimeGrid.uniform(3), condition=batch.condition)
    showing = batch.condition >= 0
    assert showing.sum() == 3 and torch.equal(drawn[showing], batch.x[showing])
    assert not torch.isin(drawn[batch.condition == -1], torch.tensor([PAD, 5])).any()


def test_processes_that_do_not_fit_are_refused(module):
    with pytest.raises(ValueError, match=r"a masked model has a mask_id.*got masked and None"):
        wrap_tokens(module)
    with pytest.raises(ValueError, match=r"got uniform and 5; if its mask is never predicted"):
        wrap_tokens(module, MASK, process="uniform")
    with pytest.raises(
        ValueError, match="process must be one of masked, uniform; got 'absorbing'"
    ):
        wrap_tokens(module, MASK, process="absorbing")
    with pytest.raises(ValueError, match="head must be one of logits, score, log-score; got 'x'"):
        wrap_tokens(module, MASK, head="x")
    with pytest.raises(ValueError, match=r"got \[7\] in never, pad_id or mask_id"):
        wrap_tokens(module, process="uniform", never=[7])
    model = wrap_tokens(module, process="uniform")
    with pytest.raises(ValueError, match="a surrogate is for a masked model"):
        train_surrogate(model, [[1, 2, 3]])
    with pytest.raises(ValueError, match="greedy needs a masked model"):
        nelbo.evaluate(model, torch.tensor([[1, 2, 3]]), sampler="greedy")


# ---- score entropy


class Exact(nn.Module):
    """The exact concrete scores of a joint probability of two tokens, told σ; times a factor."""

    def __init__(self, truth, masked, factor=1.0, log=False):
        super().__init__()
        self.truth, self.masked, self.factor, self.log = truth, masked, factor, log
        self.count = len(truth)

    def forward(self, ids, sigma):
        """p_t(z with y at i)/p_t(z) by sums over all x, (B, 2, ids)."""
        count = self.count + self.masked
        found = torch.zeros(len(ids), 2, count, dtype=torch.float64)
        for row, (z, alpha) in enumerate(zip(ids.tolist(), (-sigma).exp(), strict=True)):
            if self.masked:
                q = alpha * torch.eye(count)[:-1].double()
                q[:, -1] += 1 - alpha
            else:
                q = chances(alpha, count)
            p = q.T @ self.truth @ q  # p_t of all z
            found[row, 0], found[row, 1] = p[:, z[1]] / p[tuple(z)], p[z[0]] / p[tuple(z)]
        found = found * self.factor
        return found.log() if self.log else found


@pytest.fixture
def truth():
    with seeded(3):
        p = torch.rand(3, 3, dtype=torch.float64) ** 2
    return p / p.sum()


@pytest.mark.parametrize("log", [False, True])
def test_scores_of_masks_become_the_conditionals(truth, log):
    """Of a joint probability, P(x_i|z) is exact; and a factor of the scores is of no account."""
    head = "log-score" if log else "score"
    for factor in (1.0, 3.0):
        module = Exact(truth, True, factor, log)
        model = wrap_tokens(module, 3, head=head, time="sigma", length=2)
        z = torch.tensor([[3, 3], [1, 3], [3, 2]])
        batch = model.batch(torch.zeros(3, 2, dtype=torch.long))
        for share in (0.1, 0.9):
            t = torch.full((3,), share, dtype=torch.float64)
            # two ids of the vocabulary, the mask and that of the process, hide a token
            found = model.predict(torch.where(z == 3, 4, z), t, batch.condition).e_hat.exp()
            assert (found[..., 3] == 0).all()
            first, second = truth.sum(1), truth.sum(0)
            torch.testing.assert_close(found[0, :, :3], torch.stack([first, second]))
            torch.testing.assert_close(found[1, 1, :3], truth[1] / truth[1].sum())
            torch.testing.assert_close(found[2, 0, :3], truth[:, 2] / truth[:, 2].sum())


def entropy_of_masks(scores, x, z, sigma):
    """Denoising score entropy of masks, per unit of σ (Lou et al. 2024): Σ_y s_y - r log s_x + r
    (log r - 1) at each mask, r = 1/(e^σ - 1)."""
    r = 1 / torch.expm1(sigma)
    each = scores[..., :3].sum(-1) - r * scores.gather(-1, x[..., None])[..., 0].log()
    return torch.where(z == 3, each + r * (r.log() - 1), 0.0).sum(1)


@pytest.mark.parametrize("factor", [1.0, 1.7])
def test_the_bound_of_masks_is_that_of_score_entropy(truth, factor):
    """Equal for exact scores; for others lower by r (c - 1 - log c) at each mask."""
    module = Exact(truth, True, factor)
    model = wrap_tokens(module, 3, head="score", time="sigma", length=2)
    x, z = torch.tensor([[2, 1]] * 3), torch.tensor([[3, 3], [2, 3], [2, 1]])
    batch = model.batch(x)
    t = torch.tensor([0.3, 0.7, 0.5], dtype=torch.float64)
    alpha = 1 - t.square()
    sigma, slope = -alpha.log(), 2 * t / alpha
    scores = module(z, sigma)
    hidden = torch.where(z == 3, 4, z)
    got = model.process.predicted_rate(hidden, x, model.predict(hidden, t, batch.condition), t)
    wanted = slope * entropy_of_masks(scores, x, z, sigma[:, None])
    excess = (factor - 1 - math.log(factor)) / torch.expm1(sigma) * (z == 3).sum(1)
    torch.testing.assert_close(got, wanted - slope * excess)
    assert got[0] > 0 and got[2] == 0


@pytest.mark.parametrize("log", [False, True])
def test_scores_of_the_uniform_graph_become_the_opinions(truth, log):
    """P(x_i|z but z_i) of a joint probability, at each noise level; the bound is log P(x)."""
    module = Exact(truth, False, log=log)
    head = "log-score" if log else "score"
    model = wrap_tokens(module, process="uniform", head=head, time="sigma", length=2)
    z = torch.tensor(list(itertools.product(range(3), repeat=2)))
    batch = model.batch(z)
    for share in (0.02, 0.5, 0.97):
        t = torch.full((9,), share, dtype=torch.float64)
        q = chances(1 - share**3, 3)
        found = model.predict(z, t, batch.condition).e_hat.exp()
        for row, (i, j) in enumerate(z.tolist()):
            opinion = torch.stack([truth @ q[:, j], q[:, i] @ truth])
            wanted = opinion / opinion.sum(1, keepdim=True)
            torch.testing.assert_close(found[row], wanted, rtol=1e-9, atol=1e-12)


def test_the_bound_of_the_uniform_graph_is_that_of_score_entropy(truth):
    """Equal for any scores that some P has, as those of other noise and a factor less than 1."""
    with seeded(8):
        other = torch.rand(2, 3, 3, dtype=torch.float64).softmax(-1)

    class Wrong(nn.Module):
        def forward(self, ids, sigma):
            p = torch.stack([other[0][ids[:, 1]], other[1][ids[:, 0]]], 1)
            m = torch.stack([p[b] @ chances((-v).exp(), 3) for b, v in enumerate(sigma)])
            return m / m.gather(-1, ids[..., None])

    model = wrap_tokens(Wrong(), process="uniform", head="score", time="sigma", length=2)
    x, z = torch.tensor([[2, 1]] * 4), torch.tensor([[2, 1], [2, 0], [1, 1], [0, 2]])
    t = torch.tensor([0.3, 0.7, 0.9, 0.1], dtype=torch.float64)
    batch = model.batch(x)
    got = model.process.predicted_rate(z, x, model.predict(z, t, batch.condition), t)
    alpha = 1 - t**3
    wanted = torch.zeros(4, dtype=torch.float64)
    s = Wrong()(z, -alpha.log())
    for b, i in itertools.product(range(4), range(2)):
        m = chances(alpha[b], 3)[x[b, i]]
        for y in set(range(3)) - {z[b, i].item()}:
            r = m[y] / m[z[b, i]]
            wanted[b] += (
                3
                * t[b] ** 2
                / alpha[b]
                / 3
                * (s[b, i, y] - r * s[b, i, y].log() + r * (r.log() - 1))
            )
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_scores_that_no_probability_has(truth):
    """What lacks to (1-α)/K becomes 0, and P is normalised; negative scores are refused."""
    scores = torch.tensor([[[1.0, 0.05, 2.0]]], dtype=torch.float64)
    found = opinions(scores.log(), torch.tensor([[0]]), torch.tensor([0.4]).double())
    m = scores[0, 0] / 3.05
    wanted = torch.tensor([m[0] - 0.2, 0.0, m[2] - 0.2])
    torch.testing.assert_close(found.softmax(-1)[0, 0], (wanted / wanted.sum()).double())
    model = wrap_tokens(Exact(truth, True, log=True), 3, head="score", time="sigma", length=2)
    with pytest.raises(ValueError, match=r'got -.*if they are logarithms, give head="log-score"'):
        nelbo.evaluate(model, torch.tensor([[1, 2]]))
    model = wrap_tokens(
        Exact(truth, False), process="uniform", head="score", time="sigma", length=2
    )
    with pytest.raises(ValueError, match="leave the steps out, for continuous time"):
        nelbo.evaluate(model, torch.tensor([[1, 2]]), steps=4)


# ---- block diffusion


def by_blocks(module, text, block, scored=None, never=(MASK,), shift=0, mask=MASK):
    """The bound on -log P of a text: each block by mask counts, by a module that reads no more
    than the text up to its end."""
    scored, total = [*range(len(text))] if scored is None else scored, 0.0
    for first in range(0, len(text), block):
        end = min(first + block, len(text))
        places = [i for i in scored if first <= i < end]
        for size in range(1, len(places) + 1):
            sets = list(itertools.combinations(places, size))
            for hidden in sets:
                ids = [mask if i in hidden else k for i, k in enumerate(text[:end])]
                logits = module(torch.tensor([ids]))[0].detach().clone()
                logits[:, list(never)] = -torch.inf
                log_p = logits.log_softmax(-1)
                cost = -sum(log_p[max(i - shift, 0), text[i]] for i in hidden)
                total = total + cost / size / len(sets)
    return float(total)


def of_blocks(model, batch, nodes=4):
    """The same by the package, of each text: E_q of its rate over all z, integrated over t."""
    found, process = [], model.process
    n = process.blocks(batch.x.shape[1:])
    for x, condition in zip(batch.x, batch.condition, strict=True):
        free = condition == -1
        kinds = [
            [k.item(), process.mask] if f else [k.item()] for k, f in zip(x, free, strict=True)
        ]
        z = torch.tensor(list(itertools.product(*kinds)))
        e, rows, total = x.expand_as(z), condition.expand_as(z), 0.0
        with torch.no_grad():
            for k in range(n):
                for t, weight in zip(*legendre_nodes(k / n, (k + 1) / n, nodes), strict=True):
                    now = t.expand(len(z))
                    log_q = process.marginal(e, now).base_dist.log_prob(z)
                    q = torch.where(free, log_q, 0.0).sum(1).exp()
                    rate = process.predicted_rate(z, e, model.predict(z, now, rows), now)
                    total = total + weight * torch.where(q > 0, q * rate, 0.0).sum()
        found.append(float(total))
    return found


def of_steps(model, batch, times):
    """The bound of a grid of times of each text, by sums over all z."""
    found, process = [], model.process
    for x, condition in zip(batch.x, batch.condition, strict=True):
        free = condition == -1
        kinds = [
            [k.item(), process.mask] if f else [k.item()] for k, f in zip(x, free, strict=True)
        ]
        z = torch.tensor(list(itertools.product(*kinds)))
        e, rows, total = x.expand_as(z), condition.expand_as(z), 0.0
        for s, t in itertools.pairwise([None, *times.times.tolist()]):
            now = torch.full((len(z),), t, dtype=torch.float64)
            q = torch.where(free, process.marginal(e, now).base_dist.log_prob(z), 0.0).sum(1).exp()
            with torch.no_grad():
                if s is None:
                    each = -model.likelihood(z, now, rows).log_prob(e)
                else:
                    before = torch.full_like(now, s)
                    p = model.reverse(z, before, now, rows)
                    each = kl_divergence(process.posterior(z, e, before, now), p)
            total = total + torch.where(q > 0, q * each, 0.0).sum()
        found.append(float(total))
    return found


@pytest.mark.parametrize("block", [1, 2, 3, 7])
@pytest.mark.parametrize("options", [{}, {"shift": 1}, {"never": (0, MASK)}], ids=str)
def test_block_diffusion_by_enumeration(module, block, options):
    """Of texts of different lengths, some tokens of which show."""
    given = {k: v for k, v in options.items() if k == "never"}
    model = wrap_tokens(module, MASK, block=block, **(options | given))
    texts = [[1, 2, 3, 4, 1], [2, 1, 3], [4, 4, 1, 2]]
    shown = torch.tensor([[True, False, True, False, False]] * 3)
    batch = model.batch(texts, shown=shown)
    for text, got in zip(texts, of_blocks(model, batch), strict=True):
        scored = [i for i in (1, 3, 4) if i < len(text)]
        wanted = by_blocks(module, text, block, scored, **options)
        assert abs(got - wanted) < 1e-9 * wanted and wanted > 1e-3


def test_blocks_of_one_token_are_a_left_to_right_model():
    """-log P(x) exactly, of a module that reads no later token: Σ_x exp(ELBO(x)) = 1."""
    with seeded(4):
        causal = Tiny(causal=True).double()
    model = wrap_tokens(causal, MASK, block=1, never=(0, 3))
    texts = [[*text] for text in itertools.product([1, 2, 4], repeat=3)]
    found = torch.tensor(of_blocks(model, model.batch(texts)))
    wanted = torch.tensor([by_blocks(causal, text, 1, never=(0, 3, MASK)) for text in texts])
    torch.testing.assert_close(found, wanted)
    assert abs((-found).exp().sum() - 1) < 1e-6
    with pytest.raises(ValueError, match="it reads from left to right"):
        wrap_tokens(causal, MASK, block=2)


def test_bounds_of_block_diffusion_sum_to_at_most_one(module):
    model = wrap_tokens(module, MASK, block=2, never=(0, 3))
    texts = [[*text] for text in itertools.product([1, 2, 4], repeat=3)]
    total = (-torch.tensor(of_blocks(model, model.batch(texts)))).exp().sum()
    assert 0.05 < total < 1


@pytest.mark.parametrize("times", [None, nelbo.TimeGrid.uniform(6)], ids=["continuous", "grid"])
def test_block_diffusion_is_measured_and_drawn(module, times):
    model = wrap_tokens(module, MASK, block=2, pad_id=PAD)
    batch = model.batch(
        [[3, 1, 2, 0, 1], [1, 2, 1, PAD, PAD]], shown=torch.tensor([True] + [False] * 4)
    )
    calls = 5 if times is None else 1200  # of few masks with exact counts
    found = nelbo.evaluate(model, batch, calls=calls, times=times, seed=1)
    each = of_blocks(model, batch) if times is None else of_steps(model, batch, times)
    error = found.standard_error.monte_carlo * found.nats / found.bits_per_dim
    assert error < 0.05 * sum(each) / 2
    assert abs(found.nats - sum(each) / 2) < 5 * error + 1e-6
    assert any("blocks of 2 tokens" in note for note in found.notes)
    drawn = ancestral(model, 2, nelbo.TimeGrid.uniform(6), condition=batch.condition)
    assert torch.equal(drawn[:, 0], batch.x[:, 0]) and (drawn[:, 1:3] < PAD).all()


def test_one_block_is_the_masked_model(module):
    """The same numbers for the same draws."""
    texts, found = torch.tensor([[1, 2, 3, 0], [0, 1, 1, 2]]), []
    for options in ({"block": 4}, {}):
        model = wrap_tokens(module, MASK, **options)
        with torch.no_grad(), seeded(3):
            found.append(torch.stack(elbo(model, texts)))
    assert torch.equal(*found)


def test_blocks_that_do_not_fit_are_refused(module):
    for block in (0, 1.5):
        with pytest.raises(ValueError, match=f"block must be .*; got {block}"):
            wrap_tokens(module, MASK, block=block)
    with pytest.raises(ValueError, match="block diffusion is masked; leave block or process out"):
        wrap_tokens(module, process="uniform", block=2)
    model = wrap_tokens(module, MASK, block=2)
    for steps in (1, 2, 5):
        with pytest.raises(ValueError, match="must be a multiple of 3"):
            nelbo.evaluate(model, torch.tensor([[1, 2, 3, 1, 2]] * 2), steps=steps)
