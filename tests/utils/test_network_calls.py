"""A network is called in as many rows as fit, and no draw or number depends on how many."""

import numpy as np
import pytest
import torch
from support.known_models import image
from torch import nn

from nelbo import evaluate
from nelbo._utils import network_calls
from nelbo._utils.network_calls import NetworkCalls, fixed_rows
from nelbo._utils.numerics import seeded
from nelbo.integrations import wrap, wrap_tokens

pytestmark = pytest.mark.filterwarnings("ignore:the schedule ends with signal left")

GIB = 2.0**30


class Small(nn.Module):
    """A network on a device that holds few rows; it remembers the rows of each call."""

    def __init__(self, most, error=torch.OutOfMemoryError):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.most, self.error, self.rows = most, error, []

    def forward(self, y, time):
        self.rows.append(len(y))
        if len(y) > self.most:
            if self.error is None:
                torch.empty(2**60, dtype=torch.uint8)  # more than any machine has
            raise self.error("out of memory")
        return torch.tanh(self.weight * y) + time.to(y).reshape(-1, *[1] * (y.ndim - 1)) / 50


@pytest.fixture
def memory(monkeypatch):
    """Return a dict for the report of a device: bytes before a call, free and at the peak."""
    told = {"before": 2 * GIB, "free": 100 * GIB, "peak": 0.0}
    monkeypatch.setattr(network_calls, "_allocated", lambda device: told["before"])
    monkeypatch.setattr(
        network_calls, "device_memory", lambda device: (told["free"], told["peak"])
    )
    return told


def bound(network):
    with seeded(1):
        x = torch.randint(256, (30, 3, 2, 5))
    model = wrap(network, (3, 2, 5), predicts="noise", betas=np.linspace(0.02, 0.6, 12))
    found = evaluate(model, x, steps=12, calls=4, seed=3)
    return found, torch.get_rng_state()


@pytest.mark.parametrize("most", [1, 3, 8])
def test_the_bound_is_that_of_a_large_device(most):
    large, small = Small(10**6), Small(most)
    (want, state), (got, state_of_small) = bound(large), bound(small)
    assert max(large.rows) > 8
    torch.testing.assert_close(got.per_example, want.per_example, rtol=1e-12, atol=0)
    assert got.calls_per_example == want.calls_per_example
    assert torch.equal(state, state_of_small)
    refused = [rows for rows in small.rows if rows > most]
    # halved until it fits, and no size is tried twice
    assert refused and refused == sorted({*refused}, reverse=True)


def test_a_model_of_our_own_is_halved_too():
    known, refused = image(), []
    x = known.examples(40)

    def small(_, inputs):
        if len(inputs[0]) > 4:
            refused.append(len(inputs[0]))
            raise torch.OutOfMemoryError("out of memory")

    want = evaluate(known.model, x, calls=4, seed=3)
    known.model.network.register_forward_pre_hook(small)
    got = evaluate(known.model, x, calls=4, seed=3)
    assert refused
    torch.testing.assert_close(got.per_example, want.per_example, rtol=1e-12, atol=0)
    assert got.calls_per_example == want.calls_per_example


@pytest.mark.parametrize("time", [None, "masked"])
def test_a_model_of_tokens_is_halved_too(time):
    """Its texts have several lengths, and each length is a call of its own."""

    class Bag(nn.Module):
        def __init__(self, most):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.most, self.rows = nn.Embedding(5, 5), most, []

        def forward(self, ids, *time):
            self.rows.append(len(ids))
            if len(ids) > self.most:
                raise torch.OutOfMemoryError("out of memory")
            found = self.table(ids) + self.table(ids).mean(1, keepdim=True)
            return found + sum(t[:, None, None] for t in time)

    texts = [[i % 4, (i + 1) % 4, 2][: 2 + i % 2] for i in range(12)]
    found = []
    for module in (large := Bag(10**6), small := Bag(2)):
        model = wrap_tokens(module, 4, time=time)
        found.append(evaluate(model, texts, calls=4, seed=3))
    want, got = found
    assert max(large.rows) > 2 and max(small.rows) > 2 and 2 in small.rows
    torch.testing.assert_close(got.per_example, want.per_example, rtol=1e-6, atol=0)
    assert got.calls_per_example == want.calls_per_example
    small.most = 0
    with pytest.raises(ValueError, match=r"network Bag does not fit .* even with 1 row"):
        evaluate(model, texts, calls=4)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, None])
def test_every_sign_of_too_little_memory(error):
    network, y = Small(2, error), torch.randn(7, 3, dtype=torch.float64)
    with torch.no_grad():
        got = NetworkCalls("Small")(network, [y, torch.arange(7)])
        want = Small(7)(y, torch.arange(7))
    assert network.rows == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_a_cpu_convolves_as_many_images_as_its_cache_holds():
    sizes = []
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 64**2, 1))
    network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(*inputs)))
    y = torch.randn(11, 1, 64, 64)
    with torch.no_grad():
        got, fewer = (NetworkCalls("net")(network, [y], rows) for rows in (None, 3))
        want = network(y)
    assert sizes == [4, 4, 3, 3, 3, 3, 2, 11]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(fewer, want)
    # a matrix is used for all rows at once, and gradients take what the caller gives
    sizes.clear()
    with torch.no_grad():
        network[2].register_forward_pre_hook(lambda _, inputs: sizes.append(len(*inputs)))
        NetworkCalls("flat")(nn.Sequential(nn.Flatten(), network[2]), [y.expand(-1, 2, -1, -1)])
        assert NetworkCalls("none")(network[0], [y[:0]]).shape == (0, *network[0](y[:1]).shape[1:])
    NetworkCalls("net")(network, [y])
    assert sizes == [11, 11, 11]


@pytest.mark.parametrize(("patch", "sizes"), [(2, [1] * 9), (8, [9]), (4, [4, 4, 1])])
def test_a_cpu_takes_as_many_patches(patch, sizes):
    """Images of 64x64 have 1024, 64 or 256 patches: a transformer of patches has no others."""
    got, network = [], nn.Sequential(nn.Conv2d(1, 2, patch, stride=patch), nn.Flatten())
    network.register_forward_pre_hook(lambda _, inputs: got.append(len(*inputs)))
    with torch.no_grad():
        NetworkCalls("patches")(network, [torch.randn(9, 1, 64, 64)])
    assert got == sizes


def test_one_row_that_does_not_fit_is_one_sentence():
    with pytest.raises(
        ValueError, match=r"network Small .* cpu even with 1 row \(3x2x5, float64\)"
    ):
        bound(Small(0))


def test_a_network_that_sets_the_seed_is_refused():
    """Whoever's it is: what is drawn after each call would be the same."""

    def seeding(x):
        torch.manual_seed(5)
        return x

    def fork(x):
        with torch.random.fork_rng():
            return seeding(x)

    x = torch.ones(3, 2)
    assert torch.equal(NetworkCalls("Net")(fork, [x]), x)
    with pytest.raises(ValueError, match="network Net sets the seed of torch's random numbers"):
        NetworkCalls("Net")(seeding, [x])


def test_other_errors_are_not_of_memory():
    def broken(y):
        raise RuntimeError("shapes differ")

    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes differ"):
        NetworkCalls("broken")(broken, [torch.zeros(4, 2)])


def calls_of(network, total, rows, calls=None):
    """Call a network with `total` rows; return the rows of its calls."""
    y, first = torch.randn(total, 3, dtype=torch.float64), len(network.rows)
    with torch.no_grad():
        got = (calls or NetworkCalls("Small"))(network, [y, torch.arange(total)], rows)
        want = Small(total)(y, torch.arange(total))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    return network.rows[first:]


def test_rows_grow_to_half_of_the_free_memory(memory):
    memory["peak"] = memory["before"] + 4 * GIB  # 1 GiB a row: 50 rows take half of 100 GiB
    calls, network = NetworkCalls("Small"), Small(10**6)
    assert calls_of(network, 120, 4, calls) == [4, 50, 50, 16]
    memory["free"] = 10 * GIB  # another program came, and the call fails
    network.most = 30
    assert calls_of(network, 60, 4, calls) == [50, 25, 25, 10]


@pytest.mark.parametrize("peak", [2 * GIB, 102 * GIB])
def test_rows_do_not_shrink_below_the_rule_where_it_fits(memory, peak):
    """An earlier peak says little of the memory of a row."""
    memory["peak"] = peak
    assert calls_of(Small(10**6), 12, 4) == [4, 4, 4]


def test_rows_that_did_not_fit_do_not_grow(memory):
    memory["peak"] = memory["before"] + GIB
    assert calls_of(Small(2), 7, 4) == [4, 2, 2, 2, 1]


def test_a_codec_and_gradients_keep_the_rule(memory):
    """Both sides of a codec call the network in the same batches; a graph outlives its call."""
    memory["peak"] = memory["before"] + GIB
    inputs = [torch.randn(9, 3, dtype=torch.float64), torch.arange(9)]
    large, small = Small(100), Small(2)
    with torch.no_grad(), fixed_rows():
        NetworkCalls("Small")(large, inputs, 4)
        with pytest.raises(torch.OutOfMemoryError):
            NetworkCalls("Small")(small, inputs, 4)
    NetworkCalls("Small")(large, inputs, 4)
    assert large.rows == [4, 4, 1] * 2
    with pytest.raises(torch.OutOfMemoryError):
        NetworkCalls("Small")(small, inputs, 4)
