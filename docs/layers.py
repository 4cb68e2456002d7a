"""Measures every layer of Lathe beside the layer that it replaces, for the table of docs/replace-a-layer.md.

python docs/layers.py                 measure all, on two threads, into results/layers.json
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
    """

    layer: str
    replaces: str
    page: str
    trained: str
    avoid: str
    old: Callable[[], nn.Module]
    new: Callable[[nn.Module], nn.Module]
    x: Callable[[], Any]


def rows() -> list[Row]:
    """The table, in the order in which it is shown."""
    from lathe.nn.evonorm import EvoNormB0, EvoNormS0
    from lathe.nn.hypercomplex_layers import PHConv2d, PHLinear
    from lathe.operators.multigrid_operator import MultigridConv2d

    def norm_relu() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(64), nn.ReLU())

    def conv() -> nn.Module:
        return nn.Conv2d(64, 64, 3, padding=1)

    def linear() -> nn.Module:
        return nn.Linear(256, 256)

    def image(size: int = 32) -> Callable[[], Tensor]:
        return lambda: torch.randn(32, 64, size, size)

    def tokens() -> Tensor:
        return torch.randn(128, 256)

    return [
        Row("EvoNormB0", "BatchNorm2d, ReLU", "evonorm", "nearly",
            "without training further; where BatchNorm is folded into a convolution",
            norm_relu, lambda old: EvoNormB0.like(old[0]), image()),
        Row("EvoNormS0", "BatchNorm2d or GroupNorm, ReLU", "evonorm", "nearly",
            "without training further; groups of fewer than 8 numbers",
            norm_relu, lambda old: EvoNormS0.like(old[0]), image()),
        Row("PHConv2d (n = 4)", "Conv2d", "hypercomplex-layers", "nearly",
            "to save time; channels that n does not divide",
            conv, lambda old: PHConv2d.like(old, n=4), image(16)),
        Row("PHLinear (n = 4)", "Linear", "hypercomplex-layers", "nearly",
            "where the n³ numbers of the algebra are many beside the weight",
            linear, lambda old: PHLinear.like(old, n=4), tokens),
        Row("MultigridConv2d (2 levels)", "Conv2d, stride 1", "multigrid-operator", "exactly",
            "to save anything: it buys a whole-image receptive field; grids too small to halve",
            conv, lambda old: MultigridConv2d.from_trained(old, levels=2), image(16)),
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
    training = timed((old, new), x)
    sizes = [measure(layer, x, repeats=30) for layer in (old, new)]
    return {
        "input": [list(part.shape) for part in (x if isinstance(x, tuple) else (x,))],
        "parameters": [size.parameters for size in sizes],
        "flops": [size.flops for size in sizes],
        "inference_ms": [1e3 * size.latency for size in sizes],
        "training_ms": list(training),
    }


def table() -> str:
    """The recorded table, in Markdown."""
    record = json.loads(RECORD.read_text())
    lines = [
        "| layer | replaces | keeps trained weights | on | parameters | operations | inference | training | not for |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows():
        found = record["layers"].get(row.layer)
        if found is None:
            raise ValueError(f"{row.layer} is not in {RECORD.name}: run docs/layers.py")

        def ratio(name: str, found: dict[str, Any] = found) -> str:
            old, new = found[name]
            return "–" if not old else f"{new / old:.2f}"

        on = ", ".join(" x ".join(str(side) for side in shape) for shape in found["input"])
        cells = [ratio(name) for name in ("parameters", "flops", "inference_ms", "training_ms")]
        lines.append(
            f"| [`{row.layer}`](papers/{row.page}.md) | {row.replaces} | {row.trained} | {on} "
            f"| {' | '.join(cells)} | {row.avoid} |"
        )
    lines += ["", f"Ratios to the layer replaced, below 1 is less or faster; {record['machine']}."]
    return "\n".join(lines)


def main() -> int:
    torch.set_num_threads(2)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"layers": {}}
    chosen = [row for row in rows() if not sys.argv[1:] or row.layer.split()[0] in sys.argv[1:]]
    for row in chosen:
        found = measured(row)
        record["layers"][row.layer] = found
        print(row.layer, {name: f"{new / old:.2f}" for name, (old, new) in list(found.items())[1:] if old})
    known = [row.layer for row in rows()]
    record["layers"] = {name: record["layers"][name] for name in known if name in record["layers"]}
    record["machine"] = f"two threads, torch {torch.__version__}, forward alone and forward with backward, medians"
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
