"""What `predict` gives: a record a layer, the verdicts on the whole network, and how they are shown."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, is_dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.theory.prediction.criticality import Criticality
from lathe.theory.prediction.scaling import Scaling

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["DepthToWidth", "LayerPrediction", "Prediction"]


@dataclass(frozen=True)
class LayerPrediction:
    """One layer with weights, or one sum of two streams.

    Attributes:
        name: as in the model; of a sum, the module in which it is made.
        kind: "linear", "convolution", "embedding" or "sum".
        fed_by: what its input went through since the last layer or sum.
        fan_in, fan_out: inputs that a unit sums, and units; of a sum both are its units.
        C_W, C_b: variance of the weights times fan-in, and of the biases; None for a sum.
        drawn: "own initialiser" where the weights look as the module's own `reset_parameters` leaves them, and C_W is
            that initialiser's; "as present" where their mean square was taken; "" for a sum.
        kernel: predicted mean square of its outputs, a mean over inputs.
        correlation: predicted, between different inputs, a mean over pairs; None for a single input.
        chi_parallel, chi_perpendicular: by what squared differences of nearby inputs grow from the last layer or sum to
            here, in norm and across; for a sum from where its streams parted. None right behind the input.
        gradient: predicted mean square of the gradient by one output, for a loss `v . output`, v standard normal.
        gradient_norm: predicted norm of the gradient by all outputs, of one input.
        gradient_factor: the gradient's squared norm at the last layer or sum over that here; None behind the input.
        fluctuation: predicted relative variance of the kernel over draws, at the network's width, to first order.
        in_branch: whether it stands beside a skip connection.
        measured_kernel, measured_gradient: means over draws of the network itself; None where not simulated.
        kernel_error, gradient_error: their standard errors.
    """

    name: str
    kind: str
    fed_by: str
    fan_in: int
    fan_out: int
    C_W: float | None
    C_b: float | None
    drawn: str
    kernel: float
    correlation: float | None
    chi_parallel: float | None
    chi_perpendicular: float | None
    gradient: float
    gradient_norm: float
    gradient_factor: float | None
    fluctuation: float
    in_branch: bool = False
    measured_kernel: float | None = None
    kernel_error: float | None = None
    measured_gradient: float | None = None
    gradient_error: float | None = None

    @property
    def kernel_z(self) -> float | None:
        """By how many standard errors the simulation lies above the prediction."""
        return _z(self.measured_kernel, self.kernel, self.kernel_error)

    @property
    def gradient_z(self) -> float | None:
        return _z(self.measured_gradient, self.gradient, self.gradient_error)


@dataclass(frozen=True)
class DepthToWidth:
    """How deep the network is for its width.

    Attributes:
        ratio: sum of 1 / width over the hidden layers; branches count by the square of their share of the sum.
        fluctuation: predicted relative variance of the output's size over draws, to first order in 1 / width.
        optimal: the ratio at which outputs inform one another most, an order of magnitude; None without critical point.
        verdict: "wide", "balanced", "deep" or "too deep".
        explanation: in words.
    """

    ratio: float
    fluctuation: float
    optimal: float | None
    verdict: str
    explanation: str


@dataclass(frozen=True)
class Prediction:
    """What theory expects of a network at initialisation, beside what simulation of that network finds.

    `print` shows it, `plot()` draws it, `to_json()` gives plain data.

    Attributes:
        layers: in the order of execution.
        kernel: predicted mean square of each layer's outputs for each input.
        gradient: predicted mean square of the gradient by each layer's outputs.
        measured_kernel, measured_gradient: the same of each simulated draw, means over inputs; None without simulation.
        inputs: inputs of the example that were followed: all, up to 16, or 2 where there are positions.
        criticality, depth_to_width, scaling: the verdicts.
        notes: what theory took as something simpler than it is.
    """

    layers: tuple[LayerPrediction, ...]
    kernel: Float[Tensor, "layers inputs"]
    gradient: Float[Tensor, " layers"]
    measured_kernel: Float[Tensor, "draws layers"] | None
    measured_gradient: Float[Tensor, "draws layers"] | None
    inputs: int
    criticality: Criticality
    depth_to_width: DepthToWidth
    scaling: Scaling
    notes: tuple[str, ...]

    def layer(self, name: str) -> LayerPrediction:
        """The record of the layer (or last sum) of that name.

        Raises:
            KeyError: where there is none.
        """
        for layer in reversed(self.layers):
            if layer.name == name:
                return layer
        raise KeyError(f"no layer {name!r}; there are {', '.join(repr(layer.name) for layer in self.layers)}")

    def table(self) -> Table:
        """The layers as a rich table."""
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        head, rows = self._rows()
        for number, column in enumerate(head):
            table.add_column(column, justify="left" if number < 2 else "right", no_wrap=number != 1)
        for row in rows:
            table.add_row(*row)
        return table

    def sentences(self) -> tuple[tuple[str, str, str], ...]:
        """The verdicts: what of, in a word, in words."""
        depth, critical, scaling = self.depth_to_width, self.criticality, self.scaling
        rows = [
            ("criticality", critical.verdict, critical.explanation),
            ("depth to width", f"{depth.ratio:.2g}, {depth.verdict}", depth.explanation),
            ("parametrisation", scaling.name, scaling.explanation),
        ]
        changes = [change for change in critical.changes if change.needed]
        if changes and not critical.critical:
            same = {(f"{change.new_C_W:.4g}", f"{change.new_C_b:.4g}") for change in changes}
            told = "; ".join(
                f"{c.name}: C_W {c.C_W:.3g} -> {c.new_C_W:.3g}, C_b {c.C_b:.2g} -> {c.new_C_b:.2g}" for c in changes[:6]
            )
            if len(same) == 1 and len(changes) > 2:
                told = f"C_W = {changes[0].new_C_W:.4g}, C_b = {changes[0].new_C_b:.4g} in {len(changes)} layers"
            elif len(changes) > 6:
                told += f"; and {len(changes) - 6} more"
            rows.append(("what to set", "critical_init_(model, x)", told))
        agreement = self._agreement()
        if agreement:
            rows.append(agreement)
        return tuple(rows)

    def __str__(self) -> str:
        head, rows = self._rows()
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
            for row in [head, ["-" * width for width in widths], *rows]
        ]
        told = [f"{what}: {word}. {words}" for what, word, words in self.sentences()]
        return "\n".join([*lines, "", *told, *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts; what is not finite is None."""
        return _plain(self)

    def plot(self) -> Any:
        """An Altair chart: size of signals and of gradients, layer by layer, predicted and measured.

        The line is the prediction; points are means over draws, bars hold nine draws in ten.
        """
        import altair as alt

        names = [_shortened(layer.name) for layer in self.layers]
        wide = len(names) > 10
        width = max(420, 26 * len(names)) if wide else 330
        axis = alt.Axis(
            labelExpr=f"{json.dumps(names)}[datum.value]",
            labelAngle=-40 if max(map(len, names)) > 3 or wide else 0,
            labelLimit=130,
            title="layer",
            grid=False,
        )
        branches = any(layer.in_branch for layer in self.layers)
        legend = ["predicted", *(["predicted, in branches"] if branches else [])]
        legend += ["measured"] if self.measured_kernel is not None else []
        color = alt.Color("from:N", title=None).scale(domain=legend)
        shape = alt.Shape("from:N", title=None).scale(domain=legend, range=_SHAPES if branches else _SHAPES[::2])
        panels = []
        for title, unit, key, measured in (
            ("Signals", "mean square of the outputs", "kernel", self.measured_kernel),
            ("Gradients", "squared norm of the gradient", "gradient", self.measured_gradient),
        ):
            rows, bars = [], []
            for i, layer in enumerate(self.layers):
                value = getattr(layer, key)
                factor = layer.gradient_norm**2 / layer.gradient if key == "gradient" and layer.gradient else 1.0
                row = {"layer": i, "name": layer.name, "value": value * factor}
                if value > 0:
                    rows.append({**row, "from": legend[1] if layer.in_branch else "predicted"})
                found = None if measured is None else measured[:, i]
                if found is not None and bool((found > 0).all()):
                    low, high = torch.quantile(found, torch.tensor([0.05, 0.95], dtype=found.dtype)).tolist()
                    bars.append({"layer": i, "from": "measured", "low": low * factor, "high": high * factor})
                    rows.append({**row, "from": "measured", "value": float(found.mean()) * factor})
            values = [row["value"] for row in rows] + [bar[end] for bar in bars for end in ("low", "high")]
            scale = alt.Scale(type="log", domain=[min(values) / 1.4, max(values) * 1.4], nice=False)
            x = alt.X("layer:O", axis=axis)
            y = alt.Y("value:Q", title=unit, scale=scale).axis(format="~g", values=_ticks(values))
            chart = alt.Chart(alt.Data(values=rows))
            line = chart.transform_filter("datum.from == 'predicted'").mark_line(strokeWidth=2.4)
            drawn: Any = line.encode(x=x, y=y, color=color)
            if bars:
                rule = alt.Chart(alt.Data(values=bars)).mark_rule(strokeWidth=2.4, opacity=0.4, strokeDash=[1, 0])
                drawn += rule.encode(x=x, y=alt.Y("low:Q", scale=scale), y2="high:Q", color=color)
            hints = [alt.Tooltip("name:N"), alt.Tooltip("from:N"), alt.Tooltip("value:Q", format=".4g")]
            # Predictions are larger, so that measurements that agree do not hide them.
            for which, size in (("!=", 120), ("==", 34)):
                points = chart.transform_filter(f"datum.from {which} 'measured'").mark_point(size=size, opacity=1)
                drawn += points.encode(x=x, y=y, color=color, shape=shape, tooltip=hints)
            panels.append(drawn.properties(width=width, height=220, title=title))
        return alt.vconcat(*panels, spacing=18) if wide else alt.hconcat(*panels, spacing=34)

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        head = ["layer", "fed by", "fan-in", "fan-out", "C_W", "C_b", "kernel", "corr.", "χ∥", "χ⊥", "|gradient|"]
        simulated = self.measured_kernel is not None
        if simulated:
            head += ["measured kernel", "z", "measured |gradient|", "z"]
        rows = []
        for layer in self.layers:
            row = [layer.name, layer.fed_by, str(layer.fan_in), str(layer.fan_out), _told(layer.C_W), _told(layer.C_b)]
            row += [_told(layer.kernel), _told(layer.correlation), _told(layer.chi_parallel)]
            row += [_told(layer.chi_perpendicular), _told(layer.gradient_norm)]
            if simulated:
                norm = None
                if layer.measured_gradient is not None and layer.gradient:
                    norm = layer.gradient_norm * math.sqrt(layer.measured_gradient / layer.gradient)
                row += [_told(layer.measured_kernel), _sign(layer.kernel_z), _told(norm), _sign(layer.gradient_z)]
            rows.append(row)
        return head, rows

    def _agreement(self) -> tuple[str, str, str] | None:
        pairs = [(layer.measured_kernel, layer.kernel) for layer in self.layers]
        pairs += [(layer.measured_gradient, layer.gradient) for layer in self.layers]
        off = [abs(found / told - 1) for found, told in pairs if found is not None and told]
        if not off or self.measured_kernel is None:
            return None
        scores = [abs(z) for layer in self.layers for z in (layer.kernel_z, layer.gradient_z) if z is not None]
        words = f"Over {len(self.measured_kernel)} draws the largest deviation is {max(off):.0%} of the prediction"
        words += f" ({max(scores):.1f} standard errors)." if scores else "."
        return "simulation", f"median deviation {sorted(off)[len(off) // 2]:.1%}", words


#: Of predictions on the stream and in branches, and of measurements.
_SHAPES = ["square", "diamond", "circle"]


def _ticks(values: list[float]) -> list[float]:
    """Decades; where there are few, also what lies between."""
    low, high = math.floor(math.log10(min(values) / 1.4)), math.ceil(math.log10(max(values) * 1.4))
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    every = max(1, (high - low) // 6)
    return [step * 10.0**power for power in range(low, high + 1, every) for step in steps]


def _z(found: float | None, told: float, error: float | None) -> float | None:
    if found is None or not error or not math.isfinite(error):
        return None
    return (found - told) / error


def _told(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _sign(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}"


def _shortened(name: str) -> str:
    return name if len(name) <= 22 else "…" + name[-21:]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Fraction):
        return float(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    return value
