"""Contract of the networks: one example is one example, whatever stands beside it."""

import copy

import pytest
import torch
from torch import nn

from nelbo.nn.conv import ConvNet
from nelbo.nn.ensemble import Ensemble
from nelbo.nn.mlp import MLP
from nelbo.nn.transformer import Transformer, _rotate, _turns
from nelbo.nn.unet import UNet
from nelbo.testing import NetworkContract


class TestConvNet(NetworkContract):
    @pytest.fixture
    def network(self):
        return ConvNet(self.shape, self.channels, self.outputs, width=8, depth=2)

    def test_sees_the_whole_image(self, network, inputs):
        """A change in one corner reaches the other."""
        network.eval()
        features, level = inputs
        changed = features.clone()
        changed[..., 0, 0] += 1
        difference = (network(changed, level) - network(features, level))[..., -1, -1, :]
        assert (difference.abs().amax(-1) > 1e-6).all()


class TestConvNetOfOne(NetworkContract):
    outputs = 1
    channels = 1
    shape = (1, 4, 4)

    @pytest.fixture
    def network(self):
        return ConvNet(self.shape, self.channels, self.outputs, width=8, depth=1)


class TestUNet(TestConvNet):
    shape = (3, 9, 21)

    @pytest.fixture
    def network(self):
        return UNet(self.shape, self.channels, self.outputs, width=8, depth=1)


class TestUNetOfOne(NetworkContract):
    outputs = 1
    channels = 1
    shape = (1, 4, 5)

    @pytest.fixture
    def network(self):
        return UNet(self.shape, self.channels, self.outputs, width=8, depth=1)

    @pytest.mark.usefixtures("inputs")
    def test_small_digits_of_z_show(self, network):
        """z moved by a 512th is another wave, not nearly the same input, where noise is small."""
        network.eval()
        features, level = torch.zeros(4, *self.shape), torch.full((4,), -12.0)
        base, near = network(features, level), network(features + 1 / 512, level)
        network.first.weight.data[:, 1:] = 0
        plain = network(features + 1 / 512, level) - network(features, level)
        assert (near - base).abs().max() > 10 * plain.abs().max()


class TestMLP(NetworkContract):
    @pytest.fixture
    def network(self):
        return MLP(self.shape, self.channels, self.outputs, width=16, depth=2)


class OwnLayer(nn.Module):
    """A network whose layer of the condition is called only where there is a condition."""

    def __init__(self):
        super().__init__()
        self.net, self.layer = MLP((5,), 1, 1, width=8, depth=1), nn.Linear(1, 5, bias=False)

    def forward(self, features, level, condition=None):
        output = self.net(features, level)
        return output if condition is None else output + self.layer(condition)


class TestOwnLayer(NetworkContract):
    shape, channels, outputs = (5,), 1, 1

    @pytest.fixture
    def network(self):
        return OwnLayer()


class TestMLPOfVectors(NetworkContract):
    shape = (5,)
    channels = 1
    outputs = 1

    @pytest.fixture
    def network(self):
        return MLP(self.shape, self.channels, self.outputs, width=16, depth=1)


class TestEnsemble(NetworkContract):
    @pytest.fixture
    def network(self):
        sizes = {"width": 16, "depth": 1}
        return Ensemble([MLP(self.shape, self.channels, self.outputs, **sizes) for _ in range(3)])

    def test_is_the_mean_and_trains_each_on_its_part(self, network, inputs):
        network.eval()
        members = torch.stack([member(*inputs) for member in network.members])
        torch.testing.assert_close(network(*inputs), members.mean(0))
        network.train()
        torch.testing.assert_close(network(*inputs)[:2], members[0, :2])
        torch.testing.assert_close(network(*inputs)[2:], members[1, 2:])

    def test_all_parameters_learn(self, network, inputs):
        features, level = (torch.cat([x, x]) for x in inputs)
        super().test_all_parameters_learn(network, (features, level))


class TestTransformer(NetworkContract):
    @pytest.fixture
    def network(self):
        return Transformer(self.shape, self.channels, self.outputs, width=32, depth=2)

    def test_every_token_sees_all(self, network, inputs):
        network.eval()
        features, level = inputs
        changed = features.clone()
        changed[:, 0, 0, 0] += 1  # a channel of the first dimension
        difference = network(changed, level) - network(features, level)
        assert difference.abs().amax((0, -1)).min() > 1e-6

    def test_tokens_differ_only_in_features_and_place(self, network, inputs):
        """Without places, a permutation of the dimensions is one of the outputs."""
        network.eval()
        network.position.data.zero_()
        for convolution in (network.first, *(block.beside for block in network.blocks)):
            convolution.weight.data[..., [0, 1, 2, 4, 5, 6]] = 0  # no neighbours
        network.turn = _turns(1, 32)
        features, level = inputs
        dims = features.unflatten(1, (3, 2)).transpose(1, 2).flatten(2)
        order = torch.randperm(dims.shape[2])
        permuted = dims[..., order].unflatten(2, self.shape).transpose(1, 2).flatten(1, 2)
        expected = network(features, level).flatten(1, 3)[:, order]
        torch.testing.assert_close(network(permuted, level).flatten(1, 3), expected)


class TestTransformerOfVectors(NetworkContract):
    shape = (5,)
    channels = 1
    outputs = 1

    @pytest.fixture
    def network(self):
        return Transformer(self.shape, self.channels, self.outputs, width=32, depth=1)


def test_waves_fade_where_noise_hides_them():
    """The sines add the share of E[ sin ωz | x ]: all of it without noise, nothing of noise."""
    network = UNet((1, 8, 8), 1, 3, width=8).eval()
    nn.init.normal_(network.last.weight)
    z, silent = torch.randn(2, 1, 8, 8), copy.deepcopy(network)
    silent.first.weight.data[:, 1:] = 0
    for gamma, change in ((6.0, False), (0.0, False), (-12.0, True)):
        level = torch.full((2,), gamma)
        difference = (network(z, level) - silent(z, level)).abs().max().item()
        assert (difference > 1e-2) == change and (change or difference < 1e-5), gamma


def test_rotated_products_depend_on_the_distance_only():
    turn = _turns(9, 32)
    q, k = _rotate(torch.randn(1, 1, 2, 1, 32).expand(1, 9, 2, 1, 32), turn)[0, :, :, 0].unbind(1)
    product = q @ k.T
    for distance in range(-8, 9):
        same = product.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-4, atol=1e-4)
    assert product.diagonal(1)[0] != product.diagonal(-1)[0]


def test_networks_start_by_saying_nothing():
    networks = ConvNet((1, 5, 5), 1, 3, width=8), MLP((4,), 1, 3), Transformer((4,), 1, 3, 32)
    for network in networks:
        shape = (1, 5, 5) if isinstance(network, ConvNet) else (4,)
        assert isinstance(network, nn.Module)
        assert not network(torch.randn(2, *shape), torch.zeros(2)).any()


def test_a_u_net_of_any_width_that_it_allows():
    """Also where heads of 32 channels would not fill it: 2·56 = 112 channels are two of 56."""
    network = UNet((1, 10, 10), 1, 3, width=56)
    assert network(torch.randn(2, 1, 10, 10), torch.zeros(2)).shape == (2, 1, 10, 10, 3)
