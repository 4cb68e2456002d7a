"""Integer layers against bfloat16 and torchao, and pair interactions against a run of the network for each pair."""

from __future__ import annotations

import copy
import itertools
import warnings
from functools import partial
from typing import Any

import torch
from harness import Pair, PeerMissing
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.compression.mixed_precision_quantization import (
    QuantizedModel,
    Simulator,
    calibrate,
    fold_batch_norms,
    integer_kernel,
    pairwise_interactions,
    quantize_model,
)
from lathe.compression.mixed_precision_quantization.costs import byte_links, cast, copied
from lathe.compression.mixed_precision_quantization.kernels import to_codes
from lathe.compression.mixed_precision_quantization.layers import QuantLinear
from lathe.studies.mixed_precision_quantization import mobile_net, resnet8


def all_pairs_in_full(model: nn.Module, clips: dict[str, float], inputs: Tensor, labels: Tensor) -> Tensor:
    """Losses of all pairs at 4 bits: fake-quantise two layers by PyTorch's kernels, run it all, put them back."""
    layers = {name: module for name, module in model.named_modules() if name in clips}
    names = list(clips)
    losses = torch.zeros(len(names), len(names), dtype=torch.float64)
    for i, j in itertools.combinations_with_replacement(range(len(names)), 2):
        kept, hooks = {}, []
        for name in {names[i], names[j]}:
            layer, step = layers[name], clips[name] / 7
            kept[name] = layer.weight.data
            scale = float(layer.weight.detach().abs().max()) / 7
            layer.weight.data = torch.fake_quantize_per_tensor_affine(layer.weight.data, scale, 0, -7, 7)
            hooks.append(
                layer.register_forward_pre_hook(
                    lambda _, args, step=step: (torch.fake_quantize_per_tensor_affine(args[0], step, 0, -7, 7),)
                )
            )
        losses[i, j] = losses[j, i] = float(F.cross_entropy(model(inputs), labels))
        for hook in hooks:
            hook.remove()
        for name, weight in kept.items():
            layers[name].weight.data = weight
    return losses


@torch.no_grad()
def interactions() -> Pair:
    """N1 of the study, 256 images."""
    torch.manual_seed(0)
    model = mobile_net(16, 1)
    for _ in range(3):
        model(torch.randn(64, 1, 14, 14))  # fills the batch norms' statistics
    model = fold_batch_norms(model)
    inputs, labels = torch.randn(256, 1, 14, 14), torch.randint(0, 10, (256,))
    ranges = calibrate(model, [(inputs,)], bits=[4], symmetric=True)
    simulator = Simulator(model, ranges, per_channel=False)
    clean = float(F.cross_entropy(model(inputs), labels))
    clips = {name: each.clip[4] for name, each in ranges.items()}

    def ours() -> Tensor:
        return clean + pairwise_interactions(simulator, F.cross_entropy, [(inputs, labels)], 4).together()

    @torch.no_grad()
    def peer() -> Tensor:
        return all_pairs_in_full(model, clips, inputs, labels)

    return Pair(
        "Loss of all pairs of 17 layers at 4 bits, 256 images", ours, peer, peer_name="all pairs in full", target=3.0,
        tolerance=1e-4,
    )  # fmt: skip


def mlp(rows: int, width: int = 1024, depth: int = 4) -> tuple[QuantizedModel, nn.Module, Tensor]:
    """An int8 network, the same in bfloat16, and an input for both."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).eval().requires_grad_(False)
    x = torch.randn(rows, width)
    ranges = calibrate(model, [(x,)], bits=[8])
    quantized = quantize_model(model, dict.fromkeys(ranges, 8), ranges, links=byte_links(model, ranges, x))
    quantized.execute = "native"
    return quantized, copied(model, torch.bfloat16), x.bfloat16()


def linear(rows: int, *, from_bytes: bool) -> Pair:
    """One layer: with bytes from the layer before, as in a network, or with floats, which it has to round first."""
    torch.manual_seed(0)
    layer = nn.Linear(1024, 1024).requires_grad_(False)
    x = torch.randn(rows, 1024)
    quantized = QuantLinear.from_trained(layer, 8, calibrate(layer, [(x,)], bits=[8])[""])
    quantized.execute, quantized.byte_dtype = "native", torch.bfloat16
    half, floats = copy.deepcopy(layer).bfloat16(), x.bfloat16()
    scale = float(quantized.input_scale)
    given = to_codes(x, 1 / scale, 128, -127, 127) if from_bytes else floats
    return Pair(
        f"Linear 1024 x 1024 in int8, {rows} rows of {'bytes' if from_bytes else 'bfloat16'}",
        partial(quantized, given), partial(half, floats), peer_name="bfloat16 (oneDNN)",
        target=2.0 if from_bytes else 1.5, tolerance=0.1,
    )  # fmt: skip


def chain(rows: int) -> Pair:
    """Four layers that pass bytes on."""
    quantized, half, x = mlp(rows)
    return Pair(
        f"Four Linear 1024 x 1024 with ReLU in int8, {rows} rows", partial(quantized.network, x), partial(half, x),
        peer_name="bfloat16 (oneDNN)", target=1.8, tolerance=0.1,
    )  # fmt: skip


def convolutions() -> Pair:
    """A ResNet-8 at batch 64."""
    torch.manual_seed(0)
    x = torch.randn(64, 3, 32, 32)
    model = fold_batch_norms(resnet8(32, 3), x).requires_grad_(False)
    ranges = calibrate(model, [(x,)], bits=[8])
    quantized = quantize_model(model, dict.fromkeys(ranges, 8), ranges, links=byte_links(model, ranges, x))
    quantized.execute = "native"
    floats = cast(x, torch.bfloat16)
    return Pair(
        "ResNet-8 of width 32 in int8, 64 images", partial(quantized.network, floats),
        partial(copied(model, torch.bfloat16), floats), peer_name="bfloat16 (oneDNN)", target=1.25, tolerance=0.1,
    )  # fmt: skip


def uniform(rows: int) -> Pair:
    """All layers at 8 bits, against torchao's uniform int8 with dynamic inputs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as missing:
        raise PeerMissing("pip install --no-deps torchao==0.18.0") from missing
    quantized, half, x = mlp(rows)
    peer: Any = copy.deepcopy(half)
    quantize_(peer, Int8DynamicActivationInt8WeightConfig())
    return Pair(
        f"Four Linear 1024 x 1024 with ReLU in int8, {rows} rows", partial(quantized.network, x), partial(peer, x),
        peer_name="torchao 0.18.0, eager", target=1.0, tolerance=0.1,
    )  # fmt: skip


def pairs() -> list[Pair]:
    found = [interactions()]
    if integer_kernel("linear", "cpu") is not None and integer_kernel("conv2d", "cpu") is not None:
        found += [linear(rows, from_bytes=each) for rows in (32, 256) for each in (True, False)]
        found += [chain(32), chain(256), convolutions(), uniform(256)]
    return found
