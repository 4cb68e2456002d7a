"""Three networks that no layer of Lathe was made for, and what is asked of them after `swap`.

residual_network(), vision_transformer() and language_model() each return (network, example input).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

__all__ = ["language_model", "residual_network", "trains", "vision_transformer"]


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.relu1, self.conv1 = nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        self.bn2, self.relu2, self.conv2 = nn.BatchNorm2d(width), nn.ReLU(True), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.relu2(self.bn2(self.conv1(self.relu1(self.bn1(x))))))


def residual_network():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), ResidualBlock(8), ResidualBlock(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    return net, torch.randn(2, 3, 10, 10)


def vision_transformer():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=4,
    )
    return transformers.ViTForImageClassification(config), torch.randn(2, 3, 8, 8)


def language_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config), torch.arange(12).view(2, 6)


def trains(net: nn.Module, x: torch.Tensor) -> None:
    """A few steps of gradient descent lower the loss, and every parameter takes part."""

    def loss():
        output = net(x)
        logits = getattr(output, "logits", output).flatten(0, -2)
        return F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1])

    net.train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    first = loss()
    first.backward()
    assert [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None] == []
    for _ in range(15):
        optimizer.step()
        optimizer.zero_grad()
        last = loss()
        last.backward()
    assert float(last.detach()) < float(first.detach())
