"""Measures every layer of Lathe beside the layer that it replaces, for the table of docs/replace-a-layer.md.

python docs/layers.py                 measure all, on one thread, into results/layers.json
python docs/layers.py PHConv2d ...    measure these only
python docs/measured.py               put what is recorded into the page
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lathe import measure
from lathe.nn.mip_hypernetworks import hypernetize

RECORD = Path(__file__).parents[1] / "results" / "layers.json"


@dataclass(frozen=True)
class Row:
    """A layer, what stood in its place, and when to leave that there.

    Args:
        layer: as the reader would write it.
        replaces: what stood there.
        page: slug of the layer's paper.
        trained: what `from_trained` keeps of the old layer's weights: "exactly", "nearly" or "no".
        avoid: when not to use it, in half a sentence.
        old: makes the ordinary layer.
        new: makes the replacement from it.
        x: an example input.
        trains: whether gradients pass through the replacement.
    """

    layer: str
    replaces: str
    page: str
    trained: str
    avoid: str
    old: Callable[[], nn.Module]
    new: Callable[[nn.Module], nn.Module]
    x: Callable[[], Any]
    trains: bool = True


class Steered(nn.Module):
    """A layer whose weights a hypernetwork predicts, called with one input of the hypernetwork."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.driven = hypernetize(layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.driven(x, gamma=0.5)


def rows() -> list[Row]:
    """The table, in the order in which it is shown."""
    from lathe.compression.mixed_precision_quantization import QuantConv2d, QuantLinear, calibrate
    from lathe.nn import evonorm, hyper_zzw
    from lathe.nn.equivariant_graph_polynomials import PPGNConv
    from lathe.nn.equivariant_tensor_products import (
        ClebschGordanProduct,
        GauntProduct,
        MatrixProduct,
        VectorSignalProduct,
    )
    from lathe.nn.hypercomplex_layers import PHConv2d, PHConvTranspose2d, PHLinear
    from lathe.nn.pointer_networks import SpanPointer
    from lathe.nn.scalable_kernels import SNNKConv1x1, SNNKLinear
    from lathe.nn.tensor_attention import HigherOrderAttention, HuggingFaceAttention
    from lathe.operators.multigrid_operator import MultigridConv2d
    from lathe.theory.neural_collapse import DeepLinearHead

    def norm_relu() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(64), nn.ReLU())

    def evo(kind: str, replaces: str, more: str) -> Row:
        layer = getattr(evonorm, f"EvoNorm{kind}")
        avoid = f"without training further; where BatchNorm is folded into a convolution{more}"
        return Row(
            layer.__name__, replaces, "evonorm", "nearly", avoid, norm_relu, lambda old: layer.like(old[0]), image()
        )

    def conv() -> nn.Module:
        return nn.Conv2d(64, 64, 3, padding=1)

    def linear() -> nn.Module:
        return nn.Linear(256, 256)

    def image(size: int = 32) -> Callable[[], Tensor]:
        return lambda: torch.randn(32, 64, size, size)

    def tokens() -> Tensor:
        return torch.randn(128, 256)

    def attention() -> nn.Module:
        return nn.MultiheadAttention(64, 4, batch_first=True)

    def sequences() -> tuple[Tensor, ...]:
        return (torch.randn(4, 64, 64),) * 3

    def irreps() -> tuple[Tensor, ...]:
        return torch.randn(256, 16 * 16), torch.randn(256, 16 * 16)

    def tensor_product() -> nn.Module:
        from e3nn import o3

        features = o3.Irreps("16x0e + 16x1o + 16x2e + 16x3o")
        return o3.FullyConnectedTensorProduct(features, features, features)

    def vit_attention() -> nn.Module:
        from transformers import ViTConfig
        from transformers.models.vit.modeling_vit import ViTAttention

        return ViTAttention(ViTConfig(hidden_size=64, num_attention_heads=4, attn_implementation="sdpa"))

    def dense_gcn() -> nn.Module:
        from torch_geometric.nn import DenseGCNConv

        return DenseGCNConv(64, 64)

    def graphs() -> tuple[Tensor, ...]:
        return torch.randn(8, 24, 64), (torch.rand(8, 24, 24) < 0.2).float()

    def wide_linear() -> nn.Module:
        return nn.Linear(1024, 1024)

    def quantized(kind: Any, old: nn.Module, x: Tensor) -> nn.Module:
        made = kind.from_trained(old.requires_grad_(False), 8, calibrate(old, [(x,)], bits=[8])[""])
        made.execute = "native"
        return made

    return [
        *(evo(kind, "BatchNorm2d, ReLU", "") for kind in ("B0", "B1", "B2")),
        *(evo(kind, "BatchNorm2d or GroupNorm, ReLU", "; tiny groups") for kind in ("S0", "S1", "S2")),
        Row("PHConv2d (n = 4)", "Conv2d", "hypercomplex-layers", "nearly",
            "to save time; channels that n does not divide",
            conv, lambda old: PHConv2d.like(old, n=4), image(16)),
        Row("PHLinear (n = 4)", "Linear", "hypercomplex-layers", "nearly",
            "where the n³ numbers of the algebra are many beside the weight",
            linear, lambda old: PHLinear.like(old, n=4), tokens),
        Row("PHConvTranspose2d (n = 4)", "ConvTranspose2d", "hypercomplex-layers", "nearly",
            "to save time; channels that n does not divide",
            lambda: nn.ConvTranspose2d(64, 64, 3, padding=1), lambda old: PHConvTranspose2d.like(old, n=4), image(16)),
        Row("MultigridConv2d (2 levels)", "Conv2d, stride 1", "multigrid-operator", "exactly",
            "to save anything: it buys a whole-image receptive field; grids too small to halve",
            conv, lambda old: MultigridConv2d.from_trained(old, levels=2), image(16)),
        Row("HigherOrderAttention (order 3)", "MultiheadAttention", "tensor-attention", "exactly",
            "long sequences without a window or the polynomial: exact cost grows as n³",
            attention, lambda old: HigherOrderAttention.like(old, order=3), sequences),
        Row("HuggingFaceAttention (order 3)", "ViTAttention, GPT2Attention, ...", "tensor-attention", "exactly",
            "rotary positions, grouped keys, cross-attention, which it refuses; long sequences, as above",
            vit_attention, lambda old: HuggingFaceAttention.like(old, order=3), lambda: torch.randn(4, 64, 64)),
        Row("SNNKLinear (m = 64)", "Linear, activation", "scalable-kernels", "nearly",
            "to save time; where a low-rank layer of as many parameters does as well: compare",
            lambda: nn.Sequential(linear(), nn.ReLU()), lambda old: SNNKLinear.like(old[0], num_features=64), tokens),
        Row("SNNKConv1x1 (m = 16)", "Conv2d 1 x 1, activation", "scalable-kernels", "nearly",
            "kernels larger than 1 x 1, which it leaves alone",
            lambda: nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU()),
            lambda old: SNNKConv1x1.like(old[0], num_features=16), image(16)),
        Row("HyperConv2d (image-sized kernel)", "Conv2d, stride 1", "hyper-zzw", "nearly",
            "to save time; dense kernels of a few pixels that are far from separable",
            conv, lambda old: hyper_zzw.HyperConv2d.like(old, kernel_size=31), image(16)),
        Row("HyperConv1d (sequence-long kernel)", "Conv1d, stride 1", "hyper-zzw", "nearly",
            "to save time; dense kernels of a few positions that are far from separable",
            lambda: nn.Conv1d(64, 64, 3, padding=1), lambda old: hyper_zzw.HyperConv1d.like(old, kernel_size=127),
            lambda: torch.randn(32, 64, 64)),
        Row("GroupInstanceBatchStd", "BatchNorm2d", "hyper-zzw", "no",
            "single samples, unless running=True",
            lambda: nn.BatchNorm2d(48), lambda old: hyper_zzw.GroupInstanceBatchStd.like(old),
            lambda: torch.randn(32, 48, 32, 32)),
        Row("SpanPointer", "Linear (hidden -> 2) of a question-answering head", "pointer-networks", "no",
            "where start and end do not depend on each other",
            lambda: nn.Linear(256, 2), lambda old: SpanPointer.like(old), lambda: torch.randn(16, 64, 256)),
        Row("ClebschGordanProduct", "e3nn TensorProduct", "equivariant-tensor-products", "exactly",
            "where a cheaper product can express the interaction (`cheapest_product` tells)",
            tensor_product, ClebschGordanProduct.from_trained, irreps),
        Row("GauntProduct", "e3nn TensorProduct", "equivariant-tensor-products", "nearly",
            "interactions of odd degree sum, such as cross products, which it cannot make",
            tensor_product, lambda old: GauntProduct.like(old, lost="ignore"), irreps),
        Row("MatrixProduct", "e3nn TensorProduct", "equivariant-tensor-products", "nearly",
            "parity: it makes all couplings of degrees with shared weights",
            tensor_product, lambda old: MatrixProduct.like(old, lost="ignore"), irreps),
        Row("VectorSignalProduct", "e3nn TensorProduct", "equivariant-tensor-products", "nearly",
            "where a Gaunt product can express the interaction: that one is cheaper",
            tensor_product, lambda old: VectorSignalProduct.like(old, lost="ignore"), irreps),
        Row("PPGNConv", "DenseGCNConv of PyTorch Geometric", "equivariant-graph-polynomials", "no",
            "large graphs: it holds all pairs of nodes",
            dense_gcn, PPGNConv.like, graphs),
        Row("DeepLinearHead (depth 3)", "Linear at a classifier's end", "neural-collapse", "exactly",
            "for accuracy: it computes what one linear layer does",
            linear, lambda old: DeepLinearHead.from_trained(old, depth=3), tokens),
        Row("hypernetize: HyperLinear", "Linear", "mip-hypernetworks", "no",
            "where no input steers the network: it predicts every weight",
            linear, Steered, tokens),
        Row("hypernetize: HyperConv2d", "Conv2d", "mip-hypernetworks", "no",
            "where no input steers the network: it predicts every weight",
            conv, Steered, image(16)),
        Row("QuantLinear (8 bits)", "Linear", "mixed-precision-quantization", "nearly",
            "training: it is for inference; machines without integer kernels, where it simulates",
            wide_linear, lambda old: quantized(QuantLinear, old, torch.randn(128, 1024)),
            lambda: torch.randn(128, 1024), trains=False),
        Row("QuantConv2d (8 bits)", "Conv2d", "mixed-precision-quantization", "nearly",
            "training: it is for inference; depthwise kernels, where a per-tensor grid loses most",
            conv, lambda old: quantized(QuantConv2d, old, torch.randn(32, 64, 16, 16)), image(16), trains=False),
    ]  # fmt: skip


def timed(layers: tuple[nn.Module, nn.Module], x: Any, seconds: float = 1.5) -> tuple[float, float]:
    """Median milliseconds of forward and backward of both layers, interleaved."""
    inputs = [(x if isinstance(x, tuple) else (x,)) for _ in layers]
    times: list[list[float]] = [[], []]
    began = time.perf_counter()
    while len(times[0]) < 5 or time.perf_counter() - began < seconds:
        for side, (layer, arguments) in enumerate(zip(layers, inputs)):
            learnt = [part.detach().clone().requires_grad_() for part in arguments]
            start = time.perf_counter()
            answer = layer(*learnt)
            answer = answer[0] if isinstance(answer, tuple) else answer
            answer.square().mean().backward()
            times[side].append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[0][2:]), statistics.median(times[1][2:])


def measured(row: Row) -> dict[str, Any]:
    """Parameters, operations and times of both layers."""
    torch.manual_seed(0)
    old = row.old().train()
    new, x = row.new(old).train(), row.x()
    training = timed((old, new), x) if row.trains else None
    sizes = [measure(layer, x, repeats=30) for layer in (old, new)]
    return {
        "input": [list(part.shape) for part in (x if isinstance(x, tuple) else (x,))],
        "stored": [size.stored_bytes for size in sizes],
        "flops": [size.flops for size in sizes],
        "inference_ms": [1e3 * size.latency for size in sizes],
        "training_ms": training,
    }


def table() -> str:
    """The recorded table, in Markdown."""
    record = json.loads(RECORD.read_text())
    lines = [
        "| layer | replaces | keeps trained weights | on | stored | operations | inference | training | not for |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows():
        found = record["layers"].get(row.layer)
        if found is None:
            raise ValueError(f"{row.layer} is not in {RECORD.name}: run docs/layers.py")

        def ratio(name: str, found: dict[str, Any] = found) -> str:
            old, new = found[name] or (None, None)
            return "–" if not old else f"{new / old:.2f}"

        on = ", ".join(" x ".join(str(side) for side in shape) for shape in found["input"])
        cells = [ratio(name) for name in ("stored", "flops", "inference_ms", "training_ms")]
        lines.append(
            f"| [`{row.layer}`](papers/{row.page}.md) | {row.replaces} | {row.trained} | {on} "
            f"| {' | '.join(cells)} | {row.avoid} |"
        )
    lines += ["", f"Ratios to the layer replaced, below 1 is less or faster; {record['machine']}."]
    return "\n".join(lines)


def main() -> int:
    torch.set_num_threads(1)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"layers": {}}
    chosen = [row for row in rows() if not sys.argv[1:] or row.layer.split()[0] in sys.argv[1:]]
    for row in chosen:
        found = measured(row)
        record["layers"][row.layer] = found
        print(
            row.layer, {name: f"{pair[1] / pair[0]:.2f}" for name, pair in list(found.items())[1:] if pair and pair[0]}
        )
    known = [row.layer for row in rows()]
    record["layers"] = {name: record["layers"][name] for name in known if name in record["layers"]}
    record["machine"] = f"one thread, torch {torch.__version__}, forward alone and forward with backward, medians"
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
