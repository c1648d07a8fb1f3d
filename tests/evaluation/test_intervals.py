"""Errors stated of few draws are true, and no example's error is another's doing."""

import math

import pytest
import torch

from nelbo._utils.numerics import seeded
from nelbo.evaluation.intervals import (
    apart,
    as_replicates,
    errors,
    errors_beside,
    freedoms,
    widened,
)

N, TRIALS = 40, 400


@pytest.fixture(autouse=True)
def _seed():
    with seeded(60):
        yield


def covered(draws, mean):
    """The share of the intervals value ± 1.96 errors of (N, R) draws, TRIALS times, that hold it;
    and of the errors that were stated."""
    found = [(draw.mean(1) - mean, errors([draw])) for draw in (draws() for _ in range(TRIALS))]
    off, stated = (torch.stack(each) for each in zip(*found, strict=True))
    hit = off.abs() <= 1.96 * stated
    return (hit.sum() / stated.isfinite().sum()).item(), stated.isfinite().double().mean().item()


@pytest.mark.parametrize("replicates", [2, 4, 8])
@pytest.mark.parametrize("law", ["normal", "exponential", "rare"])
def test_few_replicates_cover(law, replicates):
    """Two replicates cover 70 % and less, if each example knows but its own."""
    laws = {
        "normal": (lambda: torch.randn(N, replicates).double(), 0.0),
        "exponential": (lambda: -torch.rand(N, replicates).double().log(), 1.0),
        # nothing in two of three draws, else much
        "rare": (lambda: torch.rand(N, replicates).double().sub(2 / 3).relu() * 6, 1 / 3),
    }
    share, stated = covered(*laws[law])
    assert stated == 1
    assert 0.93 <= share <= 0.97


@pytest.mark.parametrize("share", [1 / 2, 1 / 3, 1])
def test_replicates_of_a_share_of_the_draws_tell_the_noise_of_the_others(share):
    """Half of the examples have two or three, the others a single one of all draws."""

    def draws():
        single = torch.randn(N, 1).double()
        return [torch.randn(N, max(2, round(1 / share))).double() / share**0.5, single]

    found = [(drawn, errors(drawn, share=share)) for drawn in (draws() for _ in range(TRIALS))]
    off = torch.stack([torch.cat([block.mean(1) for block in drawn]) for drawn, _ in found])
    stated = torch.stack([each for _, each in found])
    for part in (slice(N), slice(N, None)):
        assert 0.93 <= (off.abs() <= 1.96 * stated)[:, part].double().mean() <= 0.97


def test_examples_that_differ_have_errors_that_differ():
    """Half of them have ten times the noise of the others, and eight replicates tell."""
    scale = torch.tensor([1.0, 10.0]).double().repeat(N // 2)[:, None]
    found = errors([scale * torch.randn(N, 8).double()])
    assert found[1::2].mean() > 1.5 * found[::2].mean()
    share, _ = covered(lambda: scale * torch.randn(N, 8).double(), 0.0)
    assert 0.93 <= share <= 0.98


def test_agreement_by_chance_is_no_certainty():
    """Two draws that are equal have an error; draws that all are say nothing of one."""
    draws = torch.randn(N, 2).double()
    draws[:20, 1] = draws[:20, 0]
    assert (errors([draws]) > 0.3).all()
    assert errors([torch.ones(N, 2).double()]).isnan().all()
    assert errors([torch.zeros(1, 2).double()]).isnan().all()


@pytest.mark.parametrize("far", [1e5, 1e150, math.inf, -math.inf, math.nan])
def test_one_example_moves_no_other_s_error(far):
    """It has its own of eight replicates, if it is a number at all, and none of two."""
    for replicates in (2, 8):
        draws = torch.randn(N, replicates).double()
        before = errors([draws])
        draws[3] = far * (1 + 0.1 * torch.randn(replicates).double())
        after, others = errors([draws]), torch.arange(N) != 3
        assert (after[others] / before[others] - 1).abs().max() < 0.3
        if replicates == 8 and math.isfinite(far):
            assert 0.01 < after[3] / far < 0.1
        else:
            assert after[3].isnan()


def test_one_example_s_noise_is_no_other_s():
    """It is as large as the others, but varies thirty times as much, in both of its halves."""
    scale = torch.ones(N, 1).double()
    clean = [errors([torch.randn(N, 8).double()]) for _ in range(20)]
    scale[3] = 30.0
    draws = [scale * torch.randn(N, 8).double() for _ in range(20)]
    found, others = torch.stack([errors([d]) for d in draws]), torch.arange(N) != 3
    assert found[:, others].mean() < 1.1 * torch.stack(clean).mean()
    assert 0.7 < found[:, 3].mean() / (30 / math.sqrt(8) * widened(7)) < 1.3


def test_a_rare_draw_is_no_rare_example():
    """One that is far out in one of its replicates counts with all; and if it is all that counts,
    little is known."""
    draws = torch.randn(N, 2).double()
    draws[:6, 1] = 1e3
    assert (errors([draws]) > 100).all()
    draws[1:, 1] = 0
    assert (errors([draws]) > 300).all()


def test_an_example_is_apart_of_most_others():
    distance = torch.rand(50).double()
    distance[[4, 9]] = torch.tensor([1e3, math.nan]).double()
    assert apart(distance).nonzero()[:, 0].tolist() == [4, 9]
    # those of 25 examples, two each: of the second only one is far
    example = torch.arange(50) % 25
    distance[[9, 34]] = torch.tensor([1e3, 1e3]).double()
    assert apart(distance, example).nonzero()[:, 0].tolist() == [9]
    assert not apart(torch.zeros(5)).any()
    assert apart(torch.full((5,), math.inf)).all()


def test_degrees_of_freedom():
    """Equal normal parts have the sum of their freedoms; one that is all there is has its own."""
    estimates = torch.randn(5000, 21, 4).double().var(2)
    found = torch.tensor([freedoms(e, torch.full((21,), 3.0)) for e in estimates]).median()
    assert found.item() == pytest.approx(63, rel=0.15)
    one = torch.tensor([1e9, 1.0, 1.0]).double()
    assert freedoms(one, torch.tensor([7.0, 1, 1])) == pytest.approx(7)
    assert widened(7) * 1.959964 == pytest.approx(2.364624, rel=1e-6)
    assert widened(1e6) == pytest.approx(1, abs=1e-5)
    assert freedoms(torch.tensor([1e9, 1.0, 1.0]), torch.ones(3)) == pytest.approx(1)
    few, enough = torch.ones(1), torch.ones(3)
    assert math.isnan(freedoms(few, few)) and math.isnan(freedoms(0 * enough, enough))
    assert math.isnan(widened(math.nan))


def test_a_short_text_among_long_ones_has_an_error_of_its_own_size():
    """Replicates of texts of 4 symbols and of 64, the reference all of 64; and the others that
    are scored beside a text do not change its error."""
    torch.manual_seed(0)
    size = torch.tensor([64.0] * 50 + [4.0] * 40 + [64.0] * 40).double()
    values = 100 + size[:, None].sqrt() * torch.randn(len(size), 8).double()
    reference, texts = values[:50], values[50:]
    sizes = size[:50], size[50:]
    found = errors_beside(reference, texts, sizes)
    true = (size[50:] / 8).sqrt()
    assert found[:40].median().item() == pytest.approx(true[0].item(), rel=0.4)
    assert found[40:].median().item() == pytest.approx(true[-1].item(), rel=0.3)
    alone = errors_beside(reference, texts[:1], (size[:50], size[50:51]))
    torch.testing.assert_close(alone, found[:1], rtol=1e-12, atol=0)
    assert alone.item() < errors_beside(reference, texts[:1]).item() / 2


@pytest.mark.parametrize(("shift", "noise"), [(0.0, 1.0), (20.0, 1.8), (-20.0, 3.0), (20.0, 0.3)])
def test_errors_beside_a_reference_cover_usual_and_unusual_examples(shift, noise):
    """An example among the reference has its noise; one far from it, on either side, its own: with
    that of the reference, the intervals hold 72 % of those with 1.8 times the noise."""
    off, stated = [], []
    for _ in range(40):
        means = torch.randn(200, 1).double() + shift * (torch.arange(200) >= 150)[:, None]
        spread = 1 + (noise - 1) * (torch.arange(200) >= 150)[:, None]
        draws = means + spread * torch.randn(200, 4).double()
        off.append((draws.mean(1) - means[:, 0])[150:])
        stated.append(errors_beside(draws[:150], draws[150:]))
    share = (torch.cat(off).abs() <= 1.96 * torch.cat(stated)).double().mean().item()
    assert 0.93 <= share <= 0.97
    wide = torch.cat(stated).mean().item() / (noise / 2)
    assert wide < (1.6 if shift else 1.1)


def test_what_has_no_error_beside_a_reference():
    """Nothing that varies, or not by a number; an example that is far out has its own."""
    reference = torch.randn(50, 4).double()
    odd = torch.tensor([[1e9, 2e9, 3e9, 4e9], [1.0, 2.0, math.inf, 3.0], [math.nan] * 4]).double()
    found = errors_beside(reference, odd)
    assert 5e8 < found[0] < 2e9 and found[1:].isnan().all()
    assert errors_beside(torch.ones(9, 4).double(), torch.ones(2, 4).double()).isnan().all()


def test_draws_of_different_kinds_are_as_good_as_replicates():
    """Their mean stays, its variance has no bias and (R-1)J degrees of freedom, though the kinds
    differ; single draws are replicates already, and what is infinite stays so."""
    kinds = torch.tensor([0.0, 5.0, -20.0])
    draws = kinds[:, None] + torch.randn(4, 3, 5000).double()
    found = as_replicates(draws)
    assert found.shape == (10, 5000)
    torch.testing.assert_close(found.mean(0), draws.mean((0, 1)))
    # a mean of 12 numbers: 9 s²/σ² is χ² of nine degrees, with the variance 18
    chi = 9 * found.var(0) / 10 * 12
    assert abs(chi.mean() - 9) < 4 * math.sqrt(18 / 5000)
    assert 0.9 < chi.var() / 18 < 1.1
    torch.testing.assert_close(as_replicates(draws[:, :1]), draws[:, 0])
    draws[1, 1, 7] = math.inf
    found = as_replicates(draws)
    assert (found.isinf().all(0) == (torch.arange(5000) == 7)).all() and not found.isnan().any()
