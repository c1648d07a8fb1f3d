"""A batch is solved as scipy's RK45 solves each of its rows: the same steps, the same values."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from nelbo.evaluation.ode_solver import solve


def rms(error):
    return error.square().mean(1).sqrt()


#: stiffness of each row: from one step to some dozens; 0 stands still
RATES = torch.tensor([0.0, 0.3, 2.0, 9.0], dtype=torch.float64)


def field(t, y, rows):
    """An oscillation whose pace grows with t, not linear in y; another pace in each row."""
    rate = RATES[rows, None] * (1 + t[:, None] ** 2)
    return rate * torch.stack([y[:, 1], -y[:, 0].sin()], 1)


def solved(start, end, tolerance, field=field, max_steps=10_000):
    """Values at the end and the number of calls of each row."""
    calls = torch.zeros(len(RATES), dtype=torch.long)

    def counted(t, y, rows):
        calls[rows] += 1
        return field(t, y, rows)

    y = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.5, -1.0], [1.0, 0.3]])
    return y, solve(counted, y, start, end, tolerance, rms, max_steps), calls


@pytest.mark.parametrize(("start", "end"), [(-1.0, 2.0), (2.0, -1.0)])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
def test_each_row_takes_the_steps_of_scipy(start, end, tolerance):
    y, found, calls = solved(start, end, tolerance)
    for i, first in enumerate(y.double().numpy()):

        def one(t, v, i=i):
            row = field(torch.tensor([t]), torch.from_numpy(v)[None], torch.tensor([i]))
            return row[0].numpy()

        alone = solve_ivp(one, (start, end), first, rtol=tolerance, atol=tolerance)
        assert calls[i] == alone.nfev
        np.testing.assert_allclose(found[i].numpy(), alone.y[:, -1], rtol=1e-7, atol=1e-9)
    assert calls.max() > 2 * calls.min()


def test_a_solution_that_is_known():
    """y = exp(t³ / 3) y(0), to the tolerance."""
    y = torch.tensor([[1.0], [-2.0]])
    found = solve(lambda t, y, rows: t[:, None] ** 2 * y, y, 0.0, 2.0, 1e-10, rms, 1000)
    torch.testing.assert_close(found, y.double() * np.exp(8 / 3), rtol=1e-8, atol=0)


def test_what_does_not_come_to_an_end_is_refused():
    with pytest.raises(ValueError, match=r"at tolerance 1e-06 .*more than 20\); try a larger"):
        solved(-1.0, 2.0, 1e-6, max_steps=20)

    def pole(t, y, rows):
        return y**2

    with pytest.raises(ValueError, match="did not come to an end"):
        solved(0.0, 2.0, 1e-6, field=pole)
