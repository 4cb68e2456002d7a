"""Ways out: torchao's layers in our configuration, and ONNX with integer weights."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.compression.mixed_precision_quantization.layers import QuantConv2d, QuantLinear
from lathe.compression.mixed_precision_quantization.quantizers import levels
from lathe.core.codes import pack_bits
from lathe.core.surgery import set_module

__all__ = ["export_onnx", "to_torchao"]


def to_torchao(model: Any) -> nn.Module:
    """See `QuantizedModel.to_torchao`."""
    try:
        logging.getLogger("torchao").setLevel(
            logging.ERROR
        )  # it warns of every kernel that this machine has no use for
        from torchao.quantization import (
            FqnToConfig,
            Int8DynamicActivationInt8WeightConfig,
            IntxWeightOnlyConfig,
            quantize_,
        )
    except ImportError as missing:
        raise ImportError("to_torchao needs torchao: pip install --no-deps torchao") from missing
    network = copy.deepcopy(model.network)
    configs: dict[str, Any] = {}
    for name, layer in model.quantized_layers().items():
        if isinstance(layer, QuantLinear):
            configs[name] = (
                Int8DynamicActivationInt8WeightConfig()
                if layer.bits == 8
                else IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{layer.bits}"))
            )
        set_module(network, name, _as_float(layer, model.dtype))
    if configs:
        quantize_(network, FqnToConfig(configs), filter_fn=None)
    return network.eval()


def _as_float(layer: QuantLinear | QuantConv2d, dtype: torch.dtype) -> nn.Linear | nn.Conv2d:
    """A plain layer with the weights that the codes stand for."""
    bias = layer.bias is not None
    plain: nn.Linear | nn.Conv2d
    if isinstance(layer, QuantLinear):
        plain = nn.Linear(layer.in_features, layer.out_features, bias)
    else:
        options: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
            "bias": bias,
            "padding_mode": layer.padding_mode,
        }
        plain = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        if layer.bias is not None and plain.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain.to(device=layer.packed_weight.device, dtype=dtype).requires_grad_(False)  # type: ignore[return-value]


class _OnnxLayer(nn.Module):
    """A quantised layer as ONNX writes it: inputs clipped, quantised, dequantised; integer weights, dequantised."""

    def __init__(self, layer: QuantLinear | QuantConv2d) -> None:
        super().__init__()
        self.layer = layer
        self.codes: Tensor
        self.scales: Tensor
        self.zeros: Tensor
        self.register_buffer("codes", layer.codes())
        scales = layer.weight_scale if layer.per_channel else layer.weight_scale[0]
        self.register_buffer("scales", scales.clone())
        self.register_buffer("zeros", torch.zeros(scales.shape, dtype=torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        layer, op = self.layer, torch.onnx.ops.symbolic
        if layer.activation_bits != 16:
            low, high = levels(layer.activation_bits, layer.signed)
            byte = torch.int8 if layer.signed else torch.uint8
            scale, zero = layer.input_scale, torch.zeros((), dtype=byte)
            # QuantizeLinear saturates at the type's range, which is wider than the grid.
            x = torch.maximum(torch.minimum(x, high * scale), low * scale)
            codes = op("QuantizeLinear", (x, scale, zero), dtype=byte, shape=x.shape, version=21)
            x = op("DequantizeLinear", (codes, scale, zero), dtype=torch.float32, shape=x.shape, version=21)
        attributes: dict[str, Any] = {"axis": 0} if layer.per_channel else {}
        operands = (self.codes, self.scales, self.zeros)
        shape = self.codes.shape
        weight = op("DequantizeLinear", operands, attributes, dtype=torch.float32, shape=shape, version=21)
        if isinstance(layer, QuantLinear):
            return F.linear(x, weight, layer.bias)
        return layer._linear_map(x, weight, layer.bias)


def export_onnx(model: Any, path: Any, example: Any) -> None:
    """See `QuantizedModel.export_onnx`."""
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError as missing:
        raise ImportError("export_onnx needs onnx and onnxscript: pip install onnx onnxscript") from missing
    network = copy.deepcopy(model.network).float()
    narrow: dict[str, Tensor] = {}
    for name, layer in model.quantized_layers().items():
        twin = copy.deepcopy(layer).float()
        set_module(network, name, _OnnxLayer(twin))
        if layer.bits <= 4:
            narrow[f"{name}.codes"] = layer.codes()
    args, kwargs = _arguments(example)
    batch = torch.export.Dim("batch", min=1)

    def shapes(leaf: Any) -> Any:
        return {0: batch} if isinstance(leaf, Tensor) else None

    dynamic = torch.utils._pytree.tree_map(shapes, kwargs or args)
    program = torch.onnx.export(
        network.eval(),
        args,
        kwargs=kwargs or None,
        dynamo=True,
        verbose=False,
        opset_version=21,
        dynamic_shapes=dynamic,
    )
    assert program is not None
    proto = program.model_proto
    for initializer in proto.graph.initializer:
        if initializer.name in narrow:
            codes = narrow[initializer.name]
            # ONNX packs as we do: two codes a byte, the first in the low half.
            packed = pack_bits(codes, 4).numpy().tobytes()
            four = onnx.helper.make_tensor(initializer.name, onnx.TensorProto.INT4, list(codes.shape), packed, raw=True)
            initializer.CopyFrom(four)
    _match_zeros(onnx, proto, narrow)
    used = {name for node in proto.graph.node for name in node.input}
    for unused in [each for each in proto.graph.initializer if each.name not in used]:
        proto.graph.initializer.remove(unused)
    for described in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del described.metadata_props[:]  # traces of this program, larger than small networks
    del proto.graph.value_info[:]
    onnx.save(proto, path)


def _match_zeros(onnx: Any, proto: Any, narrow: Mapping[str, Tensor]) -> None:
    """Gives the 4-bit weights zero points of their type."""
    zeros = {
        node.input[2] for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in narrow
    }
    sizes = {each.name: list(each.dims) for each in proto.graph.initializer if each.name in zeros}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in narrow and node.input[2] in sizes:
            shape = sizes[node.input[2]]
            name = f"{node.input[0]}.zero"
            zeros_packed = bytes((math.prod(shape) + 1) // 2)
            zero = onnx.helper.make_tensor(name, onnx.TensorProto.INT4, shape, zeros_packed, raw=True)
            proto.graph.initializer.append(zero)
            node.input[2] = name


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    return (example,), {}
