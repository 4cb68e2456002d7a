"""Follows the kernel of every step forwards and the kernel of the gradients backwards, at infinite width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lathe.theory.prediction.layout import reordered
from lathe.theory.prediction.reading import Reading, Step
from lathe.theory.prediction.signals import (
    Geometry,
    composed,
    constant,
    function,
    gaussian,
    product,
)
from lathe.theory.prediction.spreading import Spreading
from lathe.theory.prediction.walk import (
    Flow,
    Propagation,
    boxed,
    check_activation,
    excess,
    paired,
    spreading,
    times,
    unboxed,
    widened,
)

__all__ = ["Flow", "Propagation", "propagate"]


def propagate(
    reading: Reading, generator: torch.Generator, progress: Callable[[str, int, int], None] | None = None
) -> Propagation:
    """Raises ValueError for kernels that are not positive and for activations without finite second moment."""
    with torch.no_grad():
        return _Propagator(reading, generator).run(progress)


class _Propagator(Spreading):
    # --- data and weights -------------------------------------------------------------------------------------------

    def _data(self, step: Step, geometry: Geometry) -> Flow:
        value = step.options["value"]
        x = reordered(value.double(), step.layout)
        x = x[: self.inputs] if len(x) > 1 else x.expand(self.inputs, -1, -1)
        kernel = torch.zeros(geometry.shape, dtype=torch.float64)
        first, second = x[geometry.first], x[geometry.second]
        for number, far in enumerate(geometry.far_position):
            kernel[:, number] = (first * second[:, far]).mean(-1)
        kernel = kernel * geometry.inside
        size = geometry.sites(kernel).mean(1)
        zero = torch.zeros(0, dtype=torch.float64)
        return Flow(((step.units, gaussian(kernel, geometry)),), geometry, size.unsqueeze(1), size, zero)

    def _weight(self, step: Step, geometry: Geometry) -> Flow:
        options = step.options
        C_W, C_b = options["variance"] * options["fan_in"], options["bias_variance"]
        if options["form"] == "embedding":
            index = options["index"][: self.inputs]
            near, far = (side(index).expand(geometry.shape) for side in (geometry.near, geometry.far))
            kernel = options["variance"] * (near == far) * geometry.inside
            size = geometry.sites(kernel).mean(1)
            self.widths.append(0.0)
            zero = torch.zeros(len(self.widths), dtype=torch.float64)
            shift = torch.cat([size.unsqueeze(1), zero.expand(self.inputs, -1)], 1)
            return Flow(((step.units, gaussian(kernel, geometry)),), geometry, shift, size, zero)
        source = self._source(step)
        if options["form"] == "flat":
            kernel = source.on(source.geometry.single())[:, 0].mean(-1).reshape(geometry.shape)
        elif options["form"] == "convolution":
            columns = [
                source.geometry.index[tuple(s * d for s, d in zip(options["stride"], offset))]
                for offset in geometry.offsets
            ]
            kernel = boxed(source.kernel[:, columns], source.geometry.grid, geometry, options)
        else:
            kernel = source.on(geometry)
        kernel = (C_b + C_W * kernel) * geometry.inside
        size = geometry.sites(kernel).mean(1)
        growth = (size - C_b) / source.size.clamp_min(1e-300)
        shift, share = source.shift * growth.unsqueeze(1), source.share
        raw = self.reading.steps[step.inputs[0]].kind == "data"
        shift, share = widened(shift, 1 + len(self.widths)), widened(share, len(self.widths))
        width = 0.0 if raw else float(self.reading.steps[step.inputs[0]].units)
        fresh = torch.zeros(self.inputs, 1, dtype=torch.float64)
        if width:
            spread = spreading(source)
            width = width / max(spread, 1e-12)
            fresh[:, 0] = growth * (excess(source) / width).sqrt()
        self.widths.append(width)
        return Flow(
            ((step.units, gaussian(kernel, geometry)),),
            geometry,
            torch.cat([shift, fresh], 1),
            source.across * growth,
            torch.cat([share, torch.ones(1, dtype=torch.float64) * bool(width)]),
        )

    def _weight_back(self, step: Step, gradient: Tensor) -> None:
        options, geometry = step.options, self.geometries[step.index]
        number = step.inputs[0]
        factor = options["variance"] * options["fan_out"] / options.get("groups", 1)
        target = self.geometries[number]
        if options["form"] == "flat":
            self._give(number, factor * gradient[:, :1].expand(-1, 1, target.positions), target.single())
        elif options["form"] == "convolution":
            moved = Geometry(
                self.inputs, target.grid, [times(options["stride"], offset) for offset in geometry.offsets]
            )
            spread = unboxed(gradient, geometry, target.grid, options)
            order = [moved.index[times(options["stride"], offset)] for offset in geometry.offsets]
            placed = torch.zeros(self.inputs, len(moved.offsets), target.positions, dtype=torch.float64)
            placed[:, order] = spread
            self._give(number, factor * placed * moved.inside, moved)
        else:
            self._give(number, factor * gradient, geometry)

    # --- unit by unit -----------------------------------------------------------------------------------------------

    def _function(self, step: Step, geometry: Geometry) -> Flow:
        act, source = step.options["act"], self._source(step)
        single = geometry.single()
        root, before = self.roots[step.inputs[0]]
        for _, signal in self.flows[root].parts:
            if signal.is_gaussian:
                check_activation(composed(act, before), signal.second(single)[: self.inputs], step.name)
        parts = tuple((units, function(act, signal)) for units, signal in source.parts)
        if all(signal.is_number for _, signal in parts):
            return Flow(parts, geometry, torch.zeros_like(source.shift), torch.zeros_like(source.across), source.share)
        radial = source.mixed(lambda signal: signal.radial(act, geometry)).mean(1)
        slope = source.mixed(lambda signal: single.sites(signal.slopes(act, single))).mean(1)
        growth = (radial / source.size.clamp_min(1e-300)).unsqueeze(1)
        return Flow(parts, geometry, source.shift * growth, source.across * slope, source.share)

    def _function_back(self, step: Step, gradient: Tensor) -> None:
        """Nothing: this is a function of a number, which does not depend on any one unit."""

    def _scale(self, step: Step, geometry: Geometry) -> Flow:
        by, source = step.options["by"], self._source(step)
        parts = tuple((units, signal.scaled(by)) for units, signal in source.parts)
        return Flow(parts, geometry, source.shift * by**2, source.across * by**2, source.share)

    def _shift(self, step: Step, geometry: Geometry) -> Flow:
        source = self._source(step)
        number = constant(torch.full((1, 1), step.options["by"], dtype=torch.float64))
        parts = tuple((units, signal.plus(number)) for units, signal in source.parts)
        return Flow(parts, geometry, source.shift, source.across, source.share)

    def _add(self, step: Step, geometry: Geometry) -> Flow:
        left, right = self._inputs(step, geometry)
        a, b = step.options["scales"]
        parts = paired(left, right, lambda x, y: x.scaled(a).plus(y.scaled(b)))
        length = max(left.shift.shape[1], right.shift.shape[1])
        shift = a**2 * widened(left.shift, length) + b**2 * widened(right.shift, length)
        sizes = [a**2 * left.size.mean(), b**2 * right.size.mean()]
        share = sum(size * widened(flow.share, length - 1) for size, flow in zip(sizes, (left, right))) / sum(
            sizes
        ).clamp_min(1e-300)
        return Flow(parts, geometry, shift, a**2 * left.across + b**2 * right.across, share)

    def _add_back(self, step: Step, gradient: Tensor) -> None:
        for number, scale in zip(step.inputs, step.options["scales"]):
            self._give(number, gradient * scale**2, self.geometries[step.index])

    def _multiply(self, step: Step, geometry: Geometry) -> Flow:
        left, right = self._inputs(step, geometry)
        if step.options.get("number"):
            value = reordered(self.reading.steps[step.inputs[1]].options["value"], step.layout).mean(-1)
            value = value[: self.inputs] if len(value) > 1 else value
            right = Flow(((step.units, constant(value)),), geometry, right.shift * 0, right.across * 0, right.share * 0)
        parts = paired(left, right, product)
        length = max(left.shift.shape[1], right.shift.shape[1])
        K, L = left.size, right.size
        shift = widened(left.shift, length) * L.unsqueeze(1) + widened(right.shift, length) * K.unsqueeze(1)
        share = torch.maximum(widened(left.share, length - 1), widened(right.share, length - 1))
        return Flow(parts, geometry, shift, left.across * L + right.across * K, share)

    def _multiply_back(self, step: Step, gradient: Tensor) -> None:
        geometry = self.geometries[step.index]
        flows = self._inputs(step, geometry)
        numbers = [all(signal.is_number for _, signal in flow.parts) for flow in flows]
        if step.options.get("number"):
            value = reordered(self.reading.steps[step.inputs[1]].options["value"], step.layout).mean(-1)
            value = value[: self.inputs] if len(value) > 1 else value.expand(self.inputs, -1)
            factor = (geometry.near(value) * geometry.far(value)).expand(geometry.shape)[: self.inputs]
            self._give(step.inputs[0], gradient * factor, geometry)
            return
        for number, other, is_number in zip(step.inputs, reversed(flows), numbers):
            if not is_number:  # a number's gradient is spread over all units, 1 / width each
                self._give(number, gradient * other.on(geometry)[: self.inputs], geometry)

    def _dropout(self, step: Step, geometry: Geometry) -> Flow:
        source, p = self._source(step), step.options["p"]
        rate = p / (1 - p)
        noise = torch.zeros(geometry.shape, dtype=torch.float64)
        kernel = source.on(geometry)
        if step.options["whole"]:
            noise[: self.inputs] = rate * kernel[: self.inputs]
        else:
            noise[: self.inputs, 0] = rate * kernel[: self.inputs, 0]
        parts = tuple((units, signal.plus(gaussian(noise, geometry))) for units, signal in source.parts)
        return Flow(parts, geometry, source.shift * (1 + rate), source.across * (1 + rate), source.share)

    def _dropout_back(self, step: Step, gradient: Tensor) -> None:
        factor = torch.ones(gradient.shape[1], 1, dtype=torch.float64)
        factor[slice(None) if step.options["whole"] else 0] = 1 / (1 - step.options["p"])
        self._give(step.inputs[0], gradient * factor, self.geometries[step.index])

    # --- units ------------------------------------------------------------------------------------------------------

    def average(self, step: Step, geometry: Geometry) -> Flow:
        source = self._source(step)
        number = constant(source.mixed(lambda signal: signal.mean(source.geometry)))
        return Flow(
            ((1, number),), geometry, torch.zeros_like(source.shift), torch.zeros_like(source.across), source.share
        )

    def _average_back(self, step: Step, gradient: Tensor) -> None:
        """Nothing: each unit gets one part in the width."""

    def _units(self, step: Step, geometry: Geometry) -> Flow:
        source = self._source(step)
        parts = tuple((units, signal.fresh()) for units, signal in source.parts)
        return Flow(parts, geometry, source.shift, source.across, source.share)

    def _units_back(self, step: Step, gradient: Tensor) -> None:
        whole = self.reading.steps[step.inputs[0]].units
        self._give(step.inputs[0], gradient * step.units / whole, self.geometries[step.index])

    def _join(self, step: Step, geometry: Geometry) -> Flow:
        flows = self._inputs(step, geometry)
        sizes = [self.reading.steps[number].units for number in step.inputs]
        length = max(flow.shift.shape[1] for flow in flows)
        weights = [size / sum(sizes) for size in sizes]
        return Flow(
            tuple(part for flow in flows for part in flow.parts),
            geometry,
            torch.stack([w * widened(flow.shift, length) for w, flow in zip(weights, flows)]).sum(0),
            torch.stack([w * flow.across for w, flow in zip(weights, flows)]).sum(0),
            torch.stack([w * widened(flow.share, length - 1) for w, flow in zip(weights, flows)]).sum(0),
        )

    def _join_back(self, step: Step, gradient: Tensor) -> None:
        for number in step.inputs:
            self._give(number, gradient, self.geometries[step.index])

    def _same(self, step: Step, geometry: Geometry) -> Flow:
        source = self._source(step)
        return Flow(source.parts, geometry, source.shift, source.across, source.share)

    def _same_back(self, step: Step, gradient: Tensor) -> None:
        self._give(step.inputs[0], gradient, self.geometries[step.index])
