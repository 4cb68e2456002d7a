"""The coordinate check: does training move every layer of a model by as much at any width?

A probe for your own model and optimiser. Yang and Hu, 2020, arXiv 2011.14522 (what each layer should do); Yang et al.,
2022, arXiv 2203.03466, appendix D.1 (the check).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.core.example import call
from lathe.theory.infinite_width_feature_learning.abc import ABC
from lathe.theory.infinite_width_feature_learning.parametrize import Parametrization, parametrize

__all__ = ["CoordinateCheck", "coordinate_check"]


@dataclass(frozen=True)
class CoordinateCheck:
    """Sizes of a model's activations by width, layer and step, and how their changes scale.

    Attributes:
        widths: what the model was made with.
        layers: names of the modules, in the order of the forward pass.
        sizes: mean |x| of each module's output before training and after each step, over seeds.
        changes: mean |x_t - x_0|, likewise; zero at step 0.
        slopes: slope of log(change after the last step) by log(width), by least squares.
        expected: what theory says the slopes are; zero throughout for muP, and where there is no stable limit.
        tolerance: how far apart the two may be.

    `str()` is a table by layer.
    """

    widths: tuple[int, ...]
    layers: tuple[str, ...]
    sizes: Float[Tensor, "widths layers times"]
    changes: Float[Tensor, "widths layers times"]
    slopes: Float[Tensor, " layers"]
    expected: Float[Tensor, " layers"]
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether every layer's slope is as expected; false where training diverged."""
        return bool(((self.slopes - self.expected).abs() <= self.tolerance).all())

    def __str__(self) -> str:
        narrow, wide = self.widths[0], self.widths[-1]
        rows: list[tuple[str, ...]] = [("layer", f"change at {narrow}", f"at {wide}", "slope", "expected", "")]
        for layer, name in enumerate(self.layers):
            slope, expected = self.slopes[layer].item(), self.expected[layer].item()
            ends = (f"{self.changes[width, layer, -1]:.3g}" for width in (0, -1))
            verdict = "" if abs(slope - expected) <= self.tolerance else "<- off"
            rows.append((name, *ends, f"{slope:.2f}", f"{expected:.2f}", verdict))
        longest = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.ljust(size) for cell, size in zip(row, longest)).rstrip() for row in rows)

    def plot(self) -> Any:
        """An Altair chart: mean change of each layer against width after the first and the last step."""
        import altair as alt

        steps = self.changes.shape[-1] - 1
        values = [
            {"width": width, "layer": name, "change": self.changes[i, j, t].item(), "after": _steps(t)}
            for i, width in enumerate(self.widths)
            for j, name in enumerate(self.layers)
            for t in sorted({1, steps})
            if math.isfinite(self.changes[i, j, t].item()) and self.changes[i, j, t] > 0
        ]
        return (
            alt.Chart(alt.Data(values=values), width=260, height=260)
            .mark_line(point=True)
            .encode(
                x=alt.X("width:Q").scale(type="log", base=2, nice=False),
                y=alt.Y("change:Q", title="mean |x(t) - x(0)|").scale(type="log"),
                color=alt.Color("layer:N", sort=list(self.layers), title="layer").scale(scheme="viridis"),
                column=alt.Column("after:N", sort=[_steps(1), _steps(steps)], title=None),
            )
        )


def coordinate_check(
    make_model: Callable[[int], nn.Module],
    widths: Sequence[int],
    data: Any,
    optimizer: type[torch.optim.Optimizer] | functools.partial = torch.optim.SGD,
    *,
    scheme: str | ABC = "mup",
    lr: float = 0.1,
    steps: int = 3,
    seeds: int = 3,
    base_width: int | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 0.1,
) -> CoordinateCheck:
    """Trains a model at several widths on one batch for a few steps, and measures how its activations change.

    Judge changes, not sizes: at the start muP's outputs shrink as `1/sqrt(width)`, and should.

    Args:
        make_model: a fresh model of a given width; drawn from torch's global generator, which is seeded and restored.
            Dropout is turned off.
        widths: at least three, rising by factors.
        data: `(inputs, targets)`, or whatever `loss` takes. Floating-point tensors in it are taken to `dtype`.
        optimizer: a torch optimiser, or a partial of one; also says which rates `parametrize` gives.
        scheme: as `parametrize` takes it; "sp" checks the model as it is.
        lr: the global learning rate, at the base width.
        steps: of training.
        seeds: how many models of each width are averaged.
        base_width: by default the smallest of `widths`.
        loss: `loss(model, data)`; by default cross entropy of `model(inputs)` for integer targets, the mean squared
            error for others, and `model(**data).loss` where `data` is a dict.
        dtype: float32 hides changes that fall fast with width behind rounding.
        tolerance: between a measured and an expected slope.

    Raises:
        ValueError: for fewer than three widths, no steps, or no seeds; and as `parametrize`.
    """
    if len(widths) < 3 or sorted(set(widths)) != list(widths):
        raise ValueError(f"widths must be at least three rising numbers, got {list(widths)}")
    if steps < 1 or seeds < 1:
        raise ValueError(f"steps and seeds must be at least 1, got {steps} and {seeds}")
    base_width = widths[0] if base_width is None else base_width
    data, loss = _to(data, dtype), loss or _loss
    sizes, changes, shapes = [], [], []
    with torch.random.fork_rng(devices=[]):
        for width in widths:
            measured = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = make_model(width)
                scaled = parametrize(model, scheme, base=make_model, base_width=base_width, optimizer=optimizer)
                recorder = _Recorder(model.to(dtype), data, loss)
                measured.append(recorder.train(cast(Any, optimizer)(scaled.param_groups(lr)), steps))
            shapes.append(recorder.shapes)
            sizes.append(torch.stack([size for size, _ in measured]).mean(0))
            changes.append(torch.stack([change for _, change in measured]).mean(0))
    size, change = torch.stack(sizes), torch.stack(changes)
    moves = (change[:, :, -1] != 0).any(0)  # what comes before the first weight does not
    layers = [name for name, moved in zip(recorder.names, moves.tolist()) if moved]
    size, change = size[:, moves], change[:, moves]
    logs = torch.tensor(widths, dtype=torch.float64).log()
    logs = logs - logs.mean()
    slopes = (logs[:, None] * change[:, :, -1].log()).sum(0) / logs.square().sum()
    expected = _expected(scaled, layers, {name for name in layers if shapes[0][name] == shapes[-1][name]})
    return CoordinateCheck(tuple(widths), tuple(layers), size, change, slopes, expected, tolerance)


class _Recorder:
    """Trains a model and keeps the mean size and the mean change of every module's output."""

    def __init__(self, model: nn.Module, data: Any, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        self.model, self.data, self.loss = model, data, loss
        self.names: list[str] = []
        self.outputs: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
            if not list(module.children()) or list(module.parameters(recurse=False)):
                module.register_forward_hook(self._keep(name or "(model)"))

    def train(self, optimizer: torch.optim.Optimizer, steps: int) -> tuple[Tensor, Tensor]:
        """Sizes and changes, `(layers, steps + 1)` each."""
        sizes, changes = [], []
        start: dict[str, Tensor] = {}
        for step in range(steps + 1):
            self.outputs = {}
            value = self.loss(self.model, self.data)
            start = start or self.outputs
            self.names = list(start)
            sizes.append(torch.stack([self.outputs[name].abs().mean() for name in start]))
            changes.append(torch.stack([(self.outputs[name] - start[name]).abs().mean() for name in start]))
            if step < steps:
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
        return torch.stack(sizes, 1).double().cpu(), torch.stack(changes, 1).double().cpu()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(output.shape) for name, output in self.outputs.items()}

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, Tensor) and first.is_floating_point():
                self.outputs[name] = first.detach().clone()

        return hook


def _expected(scaled: Parametrization, layers: Sequence[str], fixed: set[str]) -> Tensor:
    """The slope that theory predicts for each module: what it learns itself, or the most that came before it did."""
    abc = scaled.abc
    if abc is None or not abc.stable:
        return torch.zeros(len(layers), dtype=torch.float64)
    own = {"input": abc.r_layer[0], "tied": abc.r_layer[0], "hidden": abc.r_layer[-1]}
    kinds: dict[str, list[str]] = {}
    for tensor in scaled.tensors:
        kinds.setdefault(tensor.name.rpartition(".")[0] or "(model)", []).append(tensor.kind)
    slopes, reached = [], math.inf
    for name in layers:
        reached = min([reached, *(float(own[kind]) for kind in kinds.get(name, ()) if kind in own)])
        slopes.append(-float(abc.change_exponents[-1]) if name in fixed else -reached)
    return torch.tensor(slopes, dtype=torch.float64)


def _loss(model: nn.Module, data: Any) -> Tensor:
    if isinstance(data, Mapping):
        return call(model, data).loss
    inputs, targets = data
    outputs = call(model, inputs)
    return F.mse_loss(outputs, targets) if targets.is_floating_point() else F.cross_entropy(outputs, targets)


def _to(data: Any, dtype: torch.dtype) -> Any:
    if isinstance(data, Tensor):
        return data.to(dtype) if data.is_floating_point() else data
    if isinstance(data, Mapping):
        return {key: _to(value, dtype) for key, value in data.items()}
    return tuple(_to(value, dtype) for value in data) if isinstance(data, (tuple, list)) else data


def _steps(count: int) -> str:
    return f"after {count} step{'s' if count > 1 else ''}"
