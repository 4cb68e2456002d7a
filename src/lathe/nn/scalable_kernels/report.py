"""What bundling costs in accuracy and saves in size and time, beside the plain alternative of the same size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lathe.core.size import stored_bytes
from lathe.nn.scalable_kernels.bundling import bundle, linear_chain

__all__ = ["BundlingReport", "BundlingRow", "bundling_report"]


@dataclass(frozen=True)
class BundlingRow:
    """One network beside the original one.

    Args:
        method: "original", "bundled" (refitted), "bundled, not refitted", or "low rank" (every weight a product of two
            smaller matrices), with as many parameters, or of as many bytes, as the refitted one.
        depth: hidden layers that are bundled or made low-rank, counted from the last.
        num_features: m; None for the others.
        parameters: trainable ones of the part that is replaced.
        stored_bytes: of that part with all its buffers: fixed directions too have to be kept somewhere.
        relative_error: of the network's outputs on inputs that were not fitted to.
        milliseconds: median time of the replaced part on those inputs.
    """

    method: str
    depth: int
    num_features: int | None
    parameters: int
    stored_bytes: int
    relative_error: float
    milliseconds: float


@dataclass(frozen=True)
class BundlingReport:
    """Rows by depth and size; `str()` is a table, `plot()` a chart."""

    rows: tuple[BundlingRow, ...]

    def __str__(self) -> str:
        lines = [f"{'method':<29}{'depth':>6}{'m':>7}{'parameters':>12}{'bytes':>11}{'error':>9}{'ms':>9}"]
        for row in self.rows:
            m = "" if row.num_features is None else f"{row.num_features}"
            lines.append(
                f"{row.method:<29}{row.depth:>6}{m:>7}{row.parameters:>12,}{row.stored_bytes:>11,}"
                f"{row.relative_error:>9.2g}{row.milliseconds:>9.3g}"
            )
        return "\n".join(lines)

    def plot(self) -> Any:
        """Error over parameters, a panel for each depth (an Altair chart)."""
        import altair as alt

        values = [vars(row) for row in self.rows if row.method != "original"]
        return (
            alt.Chart(alt.Data(values=values))
            .mark_line(point=True)
            .encode(
                x=alt.X("parameters:Q", title="trainable parameters", scale=alt.Scale(type="log")),
                y=alt.Y("relative_error:Q", title="relative error of the outputs", scale=alt.Scale(type="log")),
                color=alt.Color("method:N", title=None),
                column=alt.Column("depth:O", title="hidden layers replaced"),
                tooltip=["method:N", "num_features:Q", "parameters:Q", "relative_error:Q", "milliseconds:Q"],
            )
        )


@torch.no_grad()
def bundling_report(
    network: nn.Sequential,
    data: Float[Tensor, "samples in_features"],
    num_features: Sequence[int] = (32, 128, 512),
    **options: Any,
) -> BundlingReport:
    """Bundles the last 1, 2, ... hidden layers of a network and sets them beside low-rank layers of equal size.

    Answers three questions before anything is replaced: would plain low-rank layers do as well, is anything faster, and
    how does the error grow with depth?

    Args:
        network: as for `bundle`.
        data: at least two inputs; the first half fits, the second judges.
        num_features: sizes to try.
        options: of `bundle`.

    Raises:
        ValueError: as `bundle` does, and where there are fewer than two inputs.
    """
    if data.ndim != 2 or len(data) < 2:
        raise ValueError(f"data must be (samples, in_features) with two samples or more, got {tuple(data.shape)}")
    chain, last = linear_chain(network)
    layers = [module for pair in chain for module in pair] + [last]
    half = len(data) // 2
    rows: list[BundlingRow] = []
    for depth in range(1, len(chain) + 1):
        head, tail = nn.Sequential(*layers[: -2 * depth - 1]), nn.Sequential(*layers[-2 * depth - 1 :])
        fitted, judged = head(data[:half]), head(data[half:])
        add = partial(_row, depth=depth, inputs=judged, expected=tail(judged))
        rows.append(add("original", tail))
        for m in num_features:
            bundled = add("bundled", bundle(tail, m, fitted, **options), m)
            numbers = bundled.stored_bytes // data.element_size()
            rows += [
                bundled,
                add("bundled, not refitted", bundle(tail, m, fitted, **options, refit=False), m),
                add("low rank, as many parameters", low_rank(tail, fitted, bundled.parameters)),
                add("low rank, as many bytes", low_rank(tail, fitted, numbers)),
            ]
    return BundlingReport(tuple(rows))


def _row(
    method: str, module: nn.Module, num_features: int | None = None, *, depth: int, inputs: Tensor, expected: Tensor
) -> BundlingRow:
    error = float((module(inputs) - expected).norm() / expected.norm().clamp(min=1e-30))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    time_of = _milliseconds(module, inputs)
    return BundlingRow(method, depth, num_features, parameters, stored_bytes(module), error, time_of)


def low_rank(network: nn.Sequential, data: Tensor, parameters: int) -> nn.Sequential:
    """The network with weights cut to ranks that take about `parameters` numbers in all.

    Each cut is optimal for the layer's outputs on the data. Every layer starts at rank 1; what keeps most of the
    energy of its layer's outputs for its price is bought next, as long as there are numbers left.
    """
    linears = [module for module in network if isinstance(module, nn.Linear)]
    energies, directions, x = [], [], data
    for module in network:
        if isinstance(module, nn.Linear):
            outputs = (x @ module.weight.T).double()
            values, vectors = torch.linalg.eigh(outputs.T @ outputs)
            energies.append((values.flip(0) / values.sum().clamp(min=1e-30)).tolist())
            directions.append(vectors.flip(1).to(module.weight))
        x = module(x)
    prices = [layer.in_features + layer.out_features for layer in linears]
    ranks = [1] * len(linears)
    left = parameters - sum(prices) - sum(layer.out_features for layer in linears if layer.bias is not None)
    while True:
        offers = [
            (energy[rank] / price, index)
            for index, (energy, rank, price) in enumerate(zip(energies, ranks, prices))
            if price <= left and rank < min(linears[index].in_features, linears[index].out_features)
        ]
        if not offers:
            break
        _, index = max(offers)
        ranks[index] += 1
        left -= prices[index]
    cuts = iter([vectors[:, :rank] for vectors, rank in zip(directions, ranks)])
    factors = [_factors(module, next(cuts)) if isinstance(module, nn.Linear) else [module] for module in network]
    return nn.Sequential(*[module for pair in factors for module in pair])


def _factors(layer: nn.Linear, U: Tensor) -> list[nn.Module]:
    """W ~ U U^T W with U the leading directions of the layer's outputs."""
    down = nn.Linear(layer.in_features, U.shape[1], bias=False).to(layer.weight)
    up = nn.Linear(U.shape[1], layer.out_features, bias=layer.bias is not None).to(layer.weight)
    down.weight.copy_(U.T @ layer.weight)
    up.weight.copy_(U)
    if layer.bias is not None:
        up.bias.copy_(layer.bias)
    return [down, up]


def _milliseconds(module: Callable[[Tensor], Tensor], x: Tensor, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        module(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)
