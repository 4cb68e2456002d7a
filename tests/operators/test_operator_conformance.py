"""Every layer of `lathe.operators` through the shared checks, and by `swap` into networks that were not made for it."""

from __future__ import annotations

import pytest
import torch
from conformance import check_compiles, check_layer
from torch import nn

from lathe.core.surgery import swap
from lathe.operators.multigrid_operator import MgNO, MultigridConv1d, MultigridConv2d, MultigridConv3d


@pytest.mark.parametrize(
    "layer, grid", [(MultigridConv1d, (9,)), (MultigridConv2d, (9, 8)), (MultigridConv3d, (5, 4, 5))]
)
def test_multigrid_convolutions_do_what_every_layer_does(layer, grid):
    x = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(0))
    make = lambda: layer(3, 2, levels=2)  # noqa: E731
    check_layer(make, x, wrong_inputs=[x[:, :2], x[0, 0]])


def test_a_multigrid_network_does_what_every_layer_does():
    x = torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    check_layer(lambda: MgNO(1, 1, channels=4, depth=2, levels=2), x, wrong_inputs=[x.expand(2, 3, 9, 9)])


@pytest.mark.compile
def test_multigrid_convolutions_compile():
    check_compiles(lambda: MultigridConv2d(3, 2, levels=2), torch.randn(2, 3, 9, 9))


def test_multigrid_cycles_replace_the_convolutions_of_a_residual_network():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return x + self.conv2(torch.relu(self.norm(self.conv1(x))))

    net, x = nn.Sequential(nn.Conv2d(1, 4, 1), Block(), Block()).eval(), torch.randn(2, 1, 8, 8)
    before = net(x)
    rules = {nn.Conv2d: lambda conv: MultigridConv2d.from_trained(conv, levels=2) if conv.padding == (1, 1) else None}
    report = swap(net, rules)
    assert len(report.replaced) == 4
    assert [skip.name for skip in report.skipped] == ["0"]
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)
    net.train()(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
