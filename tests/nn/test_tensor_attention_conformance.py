"""`HigherOrderAttention` through the shared checks, and by `swap` into networks that were not made for it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conformance import check_compiles, check_layer
from networks import language_model, residual_network, trains, vision_transformer
from torch import Tensor, nn

from lathe.core.surgery import swap
from lathe.nn.tensor_attention import HigherOrderAttention, HuggingFaceAttention

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
# A layer of its own dropout draws another mask for another shape of tiles, which is all that these checks would see.
VARIANTS = [
    {},
    {"order": 2},
    {"order": 4},
    {"window": 3},
    {"method": "poly", "poly": "taylor", "degree": 4, "scale": 0.05},
    {"method": "poly", "degree": 5, "bound": 4.0, "scale": 0.02},
]


class SelfAttention(nn.Module):
    """One tensor in, one out, as the shared checks want it."""

    def __init__(self, causal: bool = False, **options) -> None:
        super().__init__()
        self.attention, self.causal = HigherOrderAttention(8, 2, **options), causal

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, is_causal=self.causal)[0]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_it_does_what_every_layer_does(options):
    check_layer(
        lambda: SelfAttention(**options),
        X,
        wrong_inputs=[X[..., :7], X[0, 0], X[None]],
        empty_batch=(True, False),
        gradcheck_input=X[:1, :4],
    )


@pytest.mark.parametrize("options", [{}, {"method": "poly", "poly": "taylor", "degree": 4, "scale": 0.05}], ids=str)
def test_causal_attention_does_what_every_layer_does(options):
    check_layer(lambda: SelfAttention(causal=True, **options), X, gradcheck_input=X[:1, :4])


@pytest.mark.compile
@pytest.mark.parametrize(
    "options", [{}, {"order": 4, "window": 3}, {"method": "poly", "degree": 2, "bound": 4.0}], ids=str
)
def test_it_compiles(options):
    check_compiles(lambda: SelfAttention(causal=True, scale=0.02, **options), X)


# --- networks not made for it ---


class VisionTransformer(nn.Module):
    """Patches, a class token, and encoder layers of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.first = nn.Parameter(torch.zeros(1, 1, 16))
        self.positions = nn.Parameter(0.1 * torch.randn(1, 5, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.first.expand(len(x), -1, -1), tokens], 1) + self.positions
        return self.head(self.encoder(tokens)[:, 0])


class LanguageModel(nn.Module):
    """A causal model of torch's encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(24, 16), nn.Parameter(0.1 * torch.randn(8, 16))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        later = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        states = self.tokens(x) + self.positions[: x.shape[1]]
        return self.head(self.encoder(states, mask=later, is_causal=True))


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("make", [VisionTransformer, LanguageModel])
def test_it_replaces_the_attention_of_torchs_transformers(make, order):
    net = make()
    x = torch.randn(2, 3, 8, 8) if make is VisionTransformer else torch.arange(12).view(2, 6)
    report = swap(net, {nn.MultiheadAttention: partial(HigherOrderAttention.like, order=order)})
    assert len(report.replaced) == 2
    assert not any(isinstance(module, nn.MultiheadAttention) for module in net.modules())
    trains(net, x)
    if make is LanguageModel:  # what comes later changes nothing before it
        with torch.no_grad():
            other = torch.cat([x[:, :4], 23 - x[:, 4:]], 1)
            torch.testing.assert_close(net.eval()(x)[:, :4], net(other)[:, :4])


@pytest.mark.parametrize("make", [VisionTransformer, LanguageModel])
def test_trained_transformers_keep_their_function_and_go_on_training(make):
    net = make().eval()
    x = torch.randn(2, 3, 8, 8) if make is VisionTransformer else torch.arange(12).view(2, 6)
    before = net(x)
    swap(net, {nn.MultiheadAttention: HigherOrderAttention.from_trained})
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)
    trains(net, x)


@pytest.mark.parametrize(("make", "name"), [(vision_transformer, "ViTAttention"), (language_model, "GPT2Attention")])
@pytest.mark.parametrize("order", [2, 3])
def test_it_replaces_the_attention_of_hugging_faces_models(make, name, order):
    net, x = make()
    kind = next(type(module) for module in net.modules() if type(module).__name__ == name)
    report = swap(net, {kind: partial(HuggingFaceAttention.like, order=order)})
    assert len(report.replaced) == 2
    trains(net, x)


def test_a_network_without_attention_is_left_alone():
    net, _ = residual_network()
    assert not swap(net, {nn.MultiheadAttention: HigherOrderAttention.like}).replaced
