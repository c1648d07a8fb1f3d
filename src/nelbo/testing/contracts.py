"""Contracts of processes, schedules and decoders into integers.

A new one inherits: `class TestMine(ProcessContract)` with the fixture and methods named there. A
failure names the methods of the process that it is about.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from nelbo._utils.numerics import seeded, slope
from nelbo.diffusion.process import ForwardProcess
from nelbo.diffusion.schedules import Schedule, time_of
from nelbo.testing.assertions import assert_mean, orders


def of(methods: str) -> Callable[[str], str]:
    """Return what puts the names of methods before the message of `assert_close`."""
    return lambda message: f"{methods}: {message}"


class ProcessContract:
    """q(z_t|x) and its conditionals. Give the fixture `process` and the two methods."""

    @staticmethod
    def examples(shape: tuple[int, ...]) -> Tensor:
        """Make data of this shape, (B, ...)."""
        raise NotImplementedError

    @staticmethod
    def guess(e: Tensor) -> Tensor:
        """Return any valid prediction in place of e."""
        raise NotImplementedError

    @pytest.fixture(params=[(2, 3, 5, 7), (2, 3), (1, 3, 5)], ids=str)
    def x(self, request: pytest.FixtureRequest) -> Tensor:
        """Examples (B, ...) of several shapes."""
        with seeded(5):
            return self.examples(request.param)

    @staticmethod
    def times(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return r < s < t, different for each example."""
        r, s, t = torch.tensor([[0.1, 0.3], [0.35, 0.5], [0.6, 0.95]], dtype=torch.float64)
        return r[: len(x)], s[: len(x)], t[: len(x)]

    def path(self, process: ForwardProcess, x: Tensor) -> tuple[Tensor, ...]:
        """Return e, a guess of it, s, t, and draws of z_s and z_t."""
        with seeded(6):
            _, s, t = self.times(x)
            e = process.embed(x)
            z_s = process.marginal(e, s).sample()
            return e, self.guess(e), s, t, z_s, process.transition(z_s, s, t).sample()

    def test_bayes(self, process: ForwardProcess, x: Tensor) -> None:
        """Equation 4: q(z_t|z_s) q(z_s|x) = q(z_s|z_t,x) q(z_t|x), per example."""
        e, _, s, t, z_s, z_t = self.path(process, x)
        forward = process.transition(z_s, s, t).log_prob(z_t) + process.marginal(e, s).log_prob(
            z_s
        )
        back = process.posterior(z_t, e, s, t).log_prob(z_s) + process.marginal(e, t).log_prob(z_t)
        assert forward.shape == (len(x),), "transition, marginal: log_prob must be one per example"
        said = of("transition, marginal or posterior breaks Bayes' rule")
        torch.testing.assert_close(forward, back, rtol=1e-11, atol=1e-10, msg=said)

    def test_two_transitions_are_one(self, process: ForwardProcess, x: Tensor) -> None:
        """Chapman-Kolmogorov: q(z_t|z_r) = ∫ q(z_t|z_s) q(z_s|z_r) dz_s. With Bayes' rule for the
        middle, q(z_s|z_r,z_t) = q(z_t|z_s) q(z_s|z_r) / q(z_t|z_r) must integrate to 1."""
        r, s, t = (v[:1].expand(20_000) for v in self.times(x))
        x = x[:1].flatten(1)[:, :2].expand(20_000, 2)
        start = process.marginal(process.embed(x), r).sample()[:1].expand(20_000, 2)
        ends = process.transition(start[:1], r[:1], t[:1]).sample().expand(20_000, 2)
        z = process.transition(start, r, s).sample()
        density = process.transition(z, s, t).log_prob(ends)
        whole = process.transition(start, r, t).log_prob(ends)
        assert_mean((density - whole).exp(), 1.0, error=0.04)

    def test_the_truth_costs_nothing(self, process: ForwardProcess, x: Tensor) -> None:
        """Equation 5: KL and rate are zero where the prediction is the data."""
        e, _, s, t, _, z = self.path(process, x)
        q = process.posterior(z, e, s, t)
        zeros = torch.zeros(len(x), dtype=torch.float64)
        kl, rate = kl_divergence(q, q), process.rate(z, e, e, t)
        torch.testing.assert_close(kl, zeros, rtol=0, atol=0, msg=of("posterior"))
        torch.testing.assert_close(rate, zeros, rtol=0, atol=0, msg=of("rate"))

    def test_a_guess_costs(self, process: ForwardProcess, x: Tensor) -> None:
        """Equation 5: KL and rate are positive and finite where it is not."""
        e, guess, s, t, _, z = self.path(process, x)
        q, p = process.posterior(z, e, s, t), process.posterior(z, guess, s, t)
        kl, rate = kl_divergence(q, p), process.rate(z, e, guess, t)
        assert (kl > 0).all() and kl.isfinite().all(), f"posterior: KL {kl}"
        assert (rate > 0).all() and rate.isfinite().all(), f"rate: {rate}"

    def test_rate_is_the_limit_of_the_kl(self, process: ForwardProcess, x: Tensor) -> None:
        """Equations 8 and 9: KL(s, t)/(t-s) → rate(t) as s → t, at first order."""
        e, guess, _, t, _, z = self.path(process, x)
        rate = process.rate(z, e, guess, t)
        errors = []
        for h in (2.0**-k for k in (9, 10, 11, 12)):
            q, p = (process.posterior(z, v, t - h, t) for v in (e, guess))
            errors.append((kl_divergence(q, p) / h / rate - 1).abs().max().item())
        assert errors[-1] < 0.01, f"rate: not the limit of posterior's KL, off by {errors}"
        assert ((orders(errors) - 1).abs() < 0.05).all(), f"rate: orders {orders(errors)}"

    def test_examples_do_not_mix(self, process: ForwardProcess, x: Tensor) -> None:
        """Each example of a batch, with its own times, is as if it were alone."""
        e, guess, s, t, z_s, z = self.path(process, x)

        def values(i: slice) -> dict[str, Tensor]:
            q = process.posterior(z[i], e[i], s[i], t[i])
            return {
                "marginal": process.marginal(e[i], t[i]).log_prob(z[i]),
                "transition": process.transition(z_s[i], s[i], t[i]).log_prob(z[i]),
                "posterior": q.log_prob(z_s[i]),
                "prior": process.prior(x.shape[1:], t[i]).log_prob(z[i]),
                "posterior, its KL": kl_divergence(
                    q, process.posterior(z[i], guess[i], s[i], t[i])
                ),
                "rate": process.rate(z[i], e[i], guess[i], t[i]),
                "features": process.features(z[i]).flatten(1).sum(1),
            }

        alone = [values(slice(i, i + 1)) for i in range(len(x))]
        for method, together in values(slice(None)).items():
            single = torch.cat([each[method] for each in alone])
            torch.testing.assert_close(together, single, rtol=1e-13, atol=1e-13, msg=of(method))

    def test_prior_term_by_draws(self, process: ForwardProcess, x: Tensor) -> None:
        """Equation 5: KL( q(z_T|x) ‖ p(z_T) ) is the mean of log q/p under q."""
        x = x[:1].flatten(1)[:, :2].expand(100_000, 2)
        t = torch.ones(len(x), dtype=torch.float64)
        q, p = process.marginal(process.embed(x), t), process.prior(x.shape[1:], t)
        z = q.sample()
        exact = kl_divergence(q, p)
        assert exact[0] > 0, "prior: it must not be q(z_T|x)"
        assert_mean(q.log_prob(z) - p.log_prob(z), exact[0], error=0.1 * exact[0].item())

    def test_features_tell_latents_apart(self, process: ForwardProcess, x: Tensor) -> None:
        """A network sees `channels` channels per channel of z, and two z's look different."""
        *_, z_s, z_t = self.path(process, x)
        a, b = process.features(z_s), process.features(z_t)
        wanted = (len(x), process.channels * x.shape[1], *x.shape[2:])
        assert a.shape == wanted, f"features, channels: {tuple(a.shape)} where {wanted} is needed"
        moved = (a - b).abs().reshape(len(x), x.shape[1], process.channels, -1).sum(2)
        assert torch.equal(moved.flatten() > 0, (z_s != z_t).flatten()), "features: some are alike"

    def test_factors_are_the_whole(self, process: ForwardProcess, x: Tensor) -> None:
        """A latent is those of the factors side by side; one that is no product is its factor."""
        parts = process.split(x)
        assert len(parts) == len(process.factors), "split, factors"
        whole = torch.cat([part.flatten(1) for part in parts], 1)
        assert torch.equal(whole, x.flatten(1)), "split"

    def test_codes_are_all_that_the_data_have(self, process: ForwardProcess, x: Tensor) -> None:
        """Integers are 0..codes-1; real numbers have no codes."""
        assert (process.codes == 0) == x.is_floating_point(), f"codes: {process.codes}"
        if process.codes:
            assert x.min() >= 0 and x.max() < process.codes, f"codes: {process.codes}"

    def test_a_mask_hides_or_shows(self, process: ForwardProcess, x: Tensor) -> None:
        """Equation 9: where there is a mask, z is x or the mask, both in some places."""
        x = x[:1].expand(500, *x.shape[1:])
        z = process.marginal(process.embed(x), torch.full((500,), 0.5).double()).sample()
        if process.mask is not None:
            assert ((z == process.mask) | (z == x)).all(), "mask, marginal: z is x or the mask"
            assert 0 < (z == process.mask).sum() < z.numel(), "mask, marginal: both occur"

    def test_the_blank_latent_is_one_of_the_prior(
        self, process: ForwardProcess, x: Tensor
    ) -> None:
        """The coder begins from it: the network sees numbers, and the prior can give it."""
        blank, t = process.blank(x.shape[1:]), torch.ones(1, dtype=torch.float64)
        assert blank.shape == x.shape[1:] and blank.dtype == torch.float64, "blank"
        assert process.features(blank[None]).isfinite().all(), "blank, features"
        assert process.prior(x.shape[1:], t).log_prob(blank[None]).isfinite(), "blank, prior"

    def test_the_grid_of_a_latent_is_fine(self, process: ForwardProcess, x: Tensor) -> None:
        """Its width is at most a standard deviation of the draw; symbols are their own grid."""
        *_, z_s, z_t = self.path(process, x)
        s, t, u = (torch.tensor(v, dtype=torch.float64) for v in (0.35, 0.6, 0.95))
        for before, after in ((None, u), (s, u), (s, None)):
            width = process.grid_width(x.shape[1:], before, t, after)
            assert width.shape == x.shape[1:] and (width > 0).all(), "grid_width"
            if not z_t.is_floating_point():
                assert (width == 1).all(), "grid_width: 1 for symbols"
            elif before is not None:
                q = process.transition(z_s[:1], s[None], t[None]).base_dist
                assert (width <= q.stddev * (1 + 1e-12)).all(), "grid_width: beyond a deviation"

    def test_a_linear_transition_is_the_transition(
        self, process: ForwardProcess, x: Tensor
    ) -> None:
        """Equation 2: where q(z_t|z_s) is said to be N(a z_s, b²), it is."""
        *_, z_s, z_t = self.path(process, x)
        s, t = (torch.tensor(v, dtype=torch.float64) for v in (0.35, 0.6))
        move = process.linear_transition(s, t)
        if move is not None:
            a, b = move
            each = torch.distributions.Normal(a * z_s, b).log_prob(z_t).flatten(1).sum(1)
            s, t = s.expand(len(x)), t.expand(len(x))
            whole, said = process.transition(z_s, s, t).log_prob(z_t), of("linear_transition")
            torch.testing.assert_close(whole, each, rtol=1e-12, atol=1e-12, msg=said)

    def test_the_mean_under_the_truth_is_the_data(
        self, process: ForwardProcess, x: Tensor
    ) -> None:
        """E[x|z_t] of the prediction e = embed(x) is x, in the units of the data."""
        e, *_, z = self.path(process, x)
        mean = process.mean(e, z)
        torch.testing.assert_close(mean, x.double(), rtol=1e-12, atol=1e-12, msg=of("mean"))

    def test_the_picture_is_in_the_units_of_the_data(
        self, process: ForwardProcess, x: Tensor
    ) -> None:
        """`picture` is finite; of real latents at the data's end it is x but for the noise: within
        3 standard deviations, so that levels may be scaled to leave room for 2 of them."""
        e, _, _, t, _, z = self.path(process, x)
        shown, hidden = process.picture(z, t[0])
        assert shown.shape == hidden.shape == z.shape and hidden.dtype == torch.bool, "picture"
        assert shown.isfinite().all(), "picture"
        if z.is_floating_point() and e.shape == z.shape:
            start = torch.tensor(process.schedule.start, dtype=torch.float64)
            q = process.marginal(e, start.expand(len(x))).base_dist
            shown, _ = process.picture(q.mean, start)
            noise = (process.mean(e + q.stddev, z) - process.mean(e, z)).abs()
            error = (shown - x).abs()
            assert (error <= 3 * noise + 1e-9).all(), (
                f"picture: off by up to {error.max():g} at t = {start:g}, where the noise is"
                f" {noise.max():g} in the units of the data"
            )


class ScheduleContract:
    """γ(t). Give the fixture `schedule` and its ends, where they are finite."""

    #: γ at the earliest time and at 1; None where it is infinite
    ends: tuple[float | None, float | None]

    def inside(self, schedule: Schedule) -> Tensor:
        """Return times on which γ is promised to be finite."""
        low = schedule.start if self.ends[0] is not None else schedule.start + 1e-6
        high = 1.0 if self.ends[1] is not None else 1 - 1e-6
        return torch.linspace(low, high, 2049, dtype=torch.float64)

    def test_increases(self, schedule: Schedule) -> None:
        """Equation 8: γ = -log SNR increases, finite between its ends, in float64."""
        gamma = schedule(self.inside(schedule))
        assert gamma.dtype == torch.float64
        assert gamma.isfinite().all()
        assert (gamma.diff() > 0).all()

    def test_meets_its_ends(self, schedule: Schedule) -> None:
        """γ(start) and γ(1) are what was asked for."""
        times = torch.tensor([schedule.start, 1.0], dtype=torch.float64)
        for got, end, infinity in zip(
            schedule(times), self.ends, (-torch.inf, torch.inf), strict=True
        ):
            want = torch.tensor(infinity if end is None else end, dtype=torch.float64)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    def test_slope(self, schedule: Schedule) -> None:
        """Equation 8: γ'(t) by differentiation is the difference quotient, to O(h²)."""
        h = 1e-5
        places = torch.tensor([0.031, 0.17, 0.43, 0.68, 0.94], dtype=torch.float64)
        t = schedule.start + (1 - schedule.start) * places
        quotient = (schedule(t + h) - schedule(t - h)) / (2 * h)
        # h²/6 · γ''' ≈ 1e-6 relative at the earliest time of the steepest, 1/t
        torch.testing.assert_close(slope(schedule, t), quotient, rtol=1e-6, atol=1e-6)

    def test_is_elementwise(self, schedule: Schedule) -> None:
        """γ of a table of times is the table of γ's, float32 times included."""
        t = self.inside(schedule)[torch.randperm(2049)[:35]].reshape(5, 7)
        one_by_one = torch.stack([schedule(v) for v in t.flatten()]).reshape(5, 7)
        torch.testing.assert_close(schedule(t), one_by_one, rtol=1e-13, atol=1e-13)
        t = t.float().clamp(min=self.inside(schedule)[0].item() + 1e-3)
        torch.testing.assert_close(schedule(t), schedule(t.double()), rtol=0, atol=0)

    def test_times_are_found_again(self, schedule: Schedule) -> None:
        """A time follows from its γ, by a formula or by bisection; at infinite ends too."""
        t = torch.cat([self.inside(schedule)[::17], torch.tensor([1.0])]).view(2, -1)
        found = time_of(schedule, schedule(t), schedule.start)
        torch.testing.assert_close(found, t, rtol=0, atol=1e-9)
        assert ((found >= schedule.start) & (found <= 1)).all()


class DiscreteContract:
    """A probability of integers. Give the fixture `distribution` and the number `levels`."""

    levels: int

    def table(self, distribution: Independent) -> Tensor:
        """P of each level for each element, shape (K, B, ...)."""
        base = distribution.base_dist
        return torch.stack(
            [base.log_prob(torch.full(base.batch_shape, k)) for k in range(self.levels)]
        ).exp()

    def test_sums_to_one(self, distribution: Independent) -> None:
        """The probabilities of all levels sum to 1, for each element."""
        total = self.table(distribution).sum(0)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-13)

    def test_an_example_is_the_product_of_its_elements(self, distribution: Independent) -> None:
        """log P(x|z_1) of an example, shape (B,), sums its dimensions and no other's."""
        value = distribution.sample()
        elements = distribution.base_dist.log_prob(value)
        got = distribution.log_prob(value)
        torch.testing.assert_close(got, elements.flatten(1).sum(1), rtol=1e-13, atol=1e-13)
        assert got.isfinite().all()

    def test_samples_follow_the_probabilities(self, distribution: Independent) -> None:
        """Frequencies of the levels over all elements of 200 draws, and the mean surprise of the
        draws, the entropy, within 4 standard errors; a level of probability zero never comes."""
        n = 200
        draws = distribution.sample((n,))
        table = self.table(distribution)
        assert draws.min() >= 0 and draws.max() < self.levels
        counts = torch.bincount(draws.flatten(), minlength=self.levels)
        expected, variance = (
            n * v.flatten(1).sum(1) for v in (table, (table * (1 - table)).clamp(min=0))
        )
        # where less than one draw is expected, 4 are as rare as 4 standard errors
        assert ((counts - expected).abs() <= 4 * variance.sqrt().clamp(min=1)).all()
        surprise = -distribution.log_prob(draws)
        assert surprise.isfinite().all()
        entropy = torch.special.entr(table).sum(0).flatten(1).sum(1)
        assert_mean(surprise, entropy, error=2.0)

    def test_the_mode_is_the_most_probable(self, distribution: Independent) -> None:
        """The mode has the greatest probability of all levels."""
        table = self.table(distribution)
        at_mode = table.gather(0, distribution.base_dist.mode[None])[0]
        torch.testing.assert_close(at_mode, table.amax(0), rtol=1e-13, atol=0)
