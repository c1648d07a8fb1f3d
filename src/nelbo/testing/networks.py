"""Contract of networks."""

import pytest
import torch
from torch import Tensor, nn

from nelbo._utils.numerics import seeded


class NetworkContract:
    """One example is one example, whatever stands beside it. Give the fixture `network`.

    It is for examples of `shape` with `channels` features and `outputs` numbers per dimension.
    """

    shape: tuple[int, ...] = (3, 5, 7)
    channels = 2
    outputs = 4

    @pytest.fixture
    def inputs(self, network: nn.Module) -> tuple[Tensor, Tensor]:
        """Features (4, channels·C, ...) and levels (4,)."""
        with seeded(1):
            for parameter in network.parameters():  # the last layers start at zero
                parameter.data += 0.1 * torch.randn_like(parameter)
            first = (self.channels * self.shape[0], *self.shape[1:])
            return torch.randn(4, *first), torch.tensor([-6.0, 0.0, 0.5, 5.0])

    def test_examples_do_not_mix(self, network: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        """An example alone has the output that it has among others."""
        network.eval()
        features, level = inputs
        together = network(features, level)
        extra = () if self.outputs == 1 else (self.outputs,)
        assert together.shape == (4, *self.shape, *extra)
        alone = network(features[2:3], level[2:3])
        torch.testing.assert_close(together[2:3], alone, rtol=1e-4, atol=1e-5)

    def test_all_inputs_matter(self, network: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        """Features, level and condition change the output; a condition of zeros is none."""
        network.eval()
        features, level = inputs
        base = network(features, level)
        assert (network(features + 0.1, level) - base).abs().max() > 1e-4
        assert (network(features, level + 0.1) - base).abs().max() > 1e-4
        conditioned = network(features, level, torch.ones(4, 1))
        assert (conditioned - base).abs().max() > 1e-4
        torch.testing.assert_close(network(features, level, torch.zeros(4, 1)), base)

    def test_all_parameters_learn(self, network: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        """The loss has a gradient in each parameter, also of a layer of the condition."""
        network.train()
        features, level = inputs
        network(features, level, torch.ones(len(level), 1)).square().sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
