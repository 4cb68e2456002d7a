"""Follows the kernel of every step forwards and the kernel of the gradients backwards, at infinite width."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from lathe.core.gaussian import Activation, activation, line_expectation
from lathe.theory.prediction import windows
from lathe.theory.prediction.layout import reordered
from lathe.theory.prediction.reading import Reading, Step
from lathe.theory.prediction.signals import (
    Geometry,
    Offset,
    Signal,
    affine,
    composed,
    constant,
    function,
    gaussian,
    pointwise,
    product,
    sampled,
)

__all__ = ["Flow", "Propagation", "propagate"]

#: Covariances that a step may have, beyond which pairs of positions are sampled; fewer where sums of several signals
#: are bent, as each then takes hundreds of points.
_BUDGET, _TANGLED_BUDGET = 400_000, 30_000
#: Inputs that are followed, in networks with and without positions.
_MOST_IMAGES, _MOST_FLAT = 2, 16
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_SPREAD = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(eq=False)
class Flow:
    """What a step puts out.

    Attributes:
        parts: signals of groups of units, with their numbers of units.
        geometry: the sites and pairs for which covariances are known.
        shift: (inputs, 1 + layers): change of the mean second moment, first where the input's square is scaled up, then
            with the fluctuations of one standard deviation that each weight layer so far adds at its finite width.
        across: (inputs,): the squared distance of two inputs that differ a little, and not in norm.
        share: (layers,): the part of the signal that went through each weight layer.
    """

    parts: tuple[tuple[int, Signal], ...]
    geometry: Geometry
    shift: Tensor
    across: Tensor
    share: Tensor
    _kernel: dict[tuple[Offset, ...], Tensor] = field(default_factory=dict)

    def mixed(self, value: Callable[[Signal], Tensor]) -> Tensor:
        """The average over units."""
        total = sum(units for units, _ in self.parts)
        return torch.stack([units / total * value(signal) for units, signal in self.parts]).sum(0)

    def on(self, geometry: Geometry) -> Tensor:
        if geometry.offsets not in self._kernel:
            self._kernel[geometry.offsets] = self.mixed(lambda signal: signal.second(geometry))
        return self._kernel[geometry.offsets]

    @property
    def kernel(self) -> Tensor:
        return self.on(self.geometry)

    @property
    def size(self) -> Tensor:
        """The mean second moment of each input."""
        return self.geometry.sites(self.kernel).mean(1)


@dataclass
class Propagation:
    """Flows and gradients of all steps.

    Attributes:
        flows: by step.
        gradients: by step, (inputs, offsets, positions): second moments of the gradients of `v . output`, for v of
            independent standard normal entries, by each unit; None where none arrives.
        roots: by step, of what step it is a function unit by unit, and which; itself and the identity for most.
        inputs: how many inputs of the example were followed.
        widths: units whose sum each weight layer takes, in the order of the layers; 0 for the raw input.
    """

    flows: list[Flow]
    gradients: list[Tensor | None]
    roots: list[tuple[int, Activation]]
    inputs: int
    widths: list[float]
    notes: list[str]

    def power(self, number: int, steps: list[Step]) -> float:
        """The squared norm of the gradient by all that a step puts out, a mean over inputs."""
        gradient = self.gradients[number]
        return 0.0 if gradient is None else float(gradient[:, 0].sum(1).mean() * steps[number].units)


def propagate(
    reading: Reading, generator: torch.Generator, progress: Callable[[str, int, int], None] | None = None
) -> Propagation:
    """Raises ValueError for kernels that are not positive and for activations without finite second moment."""
    with torch.no_grad():
        return _Propagator(reading, generator).run(progress)


class _Propagator:
    def __init__(self, reading: Reading, generator: torch.Generator) -> None:
        self.reading, self.generator = reading, generator
        positions = any(step.grid for step in reading.steps)
        self.inputs = min(reading.batch, _MOST_IMAGES if positions else _MOST_FLAT)
        self.pairs = self.inputs * (self.inputs + 1) // 2
        self.notes: list[str] = []
        self.widths: list[float] = []
        self.samples: dict[tuple[int, ...], list[Offset]] = {}
        self.sources: list[set[int]] = []
        self.tangled: list[bool] = []
        for step in reading.steps:
            self._gather(step)
        self.budget = _TANGLED_BUDGET if any(self.tangled) else _BUDGET

    def run(self, progress: Callable[[str, int, int], None] | None) -> Propagation:
        steps = self.reading.steps
        needed = self._needed()
        self.geometries = [Geometry(self.inputs, step.grid, sorted(offsets)) for step, offsets in zip(steps, needed)]
        self.flows: list[Flow] = []
        self.roots: list[tuple[int, Activation]] = []
        for step in steps:
            flow = getattr(self, f"_{step.kind.replace(' ', '_')}")(step, self.geometries[step.index])
            self.flows.append(flow)
            self.roots.append(self._root(step))
            if step.kind == "weight":
                _check_kernel(step, flow)
            if progress is not None:
                progress("theory", step.index + 1, len(steps))
        self.gradients: list[Tensor | None] = [None] * len(steps)
        self.seen: dict[int, Tensor] = {}
        last = self.geometries[self.reading.output]
        start = torch.zeros(self.inputs, *last.shape[1:], dtype=torch.float64)
        start[:, 0] = 1.0
        self.gradients[self.reading.output] = start
        for step in reversed(steps):
            gradient = self.gradients[step.index]
            root, act = self.roots[step.index]
            if gradient is None or not step.inputs:
                continue
            if self.tangled[step.index]:
                self._untangle(step, gradient)
                continue
            if root != step.index:
                # Paths that part and meet again unit by unit are one function, and have one slope.
                geometry = self.geometries[step.index]
                slopes = self.flows[root].mixed(functools.partial(Signal.slopes, act=act, geometry=geometry))
                self._give(root, gradient * slopes[: self.inputs], geometry)
            else:
                getattr(self, f"_{step.kind.replace(' ', '_')}_back")(step, gradient)
        for number, seen in self.seen.items():
            known = self.gradients[number]
            self.gradients[number] = seen if known is None else known + seen
        return Propagation(self.flows, self.gradients, self.roots, self.inputs, self.widths, self.notes)

    def _root(self, step: Step) -> tuple[int, Activation]:
        alone = step.index, activation("linear")
        numbers = [all(signal.is_number for _, signal in self.flows[number].parts) for number in step.inputs]
        if any(numbers) or step.kind not in ("function", "scale", "shift", "add", "multiply"):
            return alone
        roots = [self.roots[number] for number in step.inputs]
        if len({root for root, _ in roots}) > 1 or step.options.get("number"):
            return alone
        root, acts = roots[0][0], [act for _, act in roots]
        if step.kind == "function":
            return root, composed(step.options["act"], acts[0])
        if step.kind == "scale":
            return root, affine(acts[0], step.options["by"], 0.0)
        if step.kind == "shift":
            return root, affine(acts[0], 1.0, step.options["by"])
        if step.kind == "multiply":
            return root, pointwise(torch.mul, *acts)
        scaled = [affine(act, scale, 0.0) for act, scale in zip(acts, step.options["scales"])]
        return root, pointwise(torch.add, *scaled)

    # --- functions of sums of several signals -----------------------------------------------------------------------

    def _gather(self, step: Step) -> None:
        """Of which steps it is a function unit by unit, and whether it bends a sum of several."""
        pointwise = step.kind in ("function", "scale", "shift", "add", "multiply") and not step.options.get("number")
        steps = self.reading.steps
        same_grid = all(steps[number].grid == step.grid for number in step.inputs)
        joined = any(
            steps[source].kind in ("join", "average") for number in step.inputs for source in self.sources[number]
        )
        if not pointwise or not same_grid or joined:
            self.sources.append({step.index})
            self.tangled.append(False)
            return
        sources = set().union(*[self.sources[number] for number in step.inputs])
        bends = step.kind in ("function", "multiply") and len(sources) > 1
        self.sources.append(sources)
        self.tangled.append(bends or any(self.tangled[number] for number in step.inputs))

    def _untangle(self, step: Step, gradient: Tensor) -> None:
        """Gives the gradient to all that a step is a function of at once: its slopes along the way are not independent.

        `relu(x + f(x))` after `x = relu(y)`: where the first is open the second is likely to be, too.
        """
        whole, steps = self.geometries[step.index], self.reading.steps
        used = [number for number, column in enumerate(gradient.unbind(1)) if number == 0 or bool(column.any())]
        geometry = Geometry(self.inputs, whole.grid, [whole.offsets[number] for number in used])
        gradient = gradient[:, used]
        sources = sorted(self.sources[step.index])
        between: set[int] = set()
        pending = [step.index]
        while pending:
            number = pending.pop()
            if number not in between and number not in sources:
                between.add(number)
                pending += steps[number].inputs
        inner = sorted(between)
        sums = [number for number in inner if steps[number].kind == "add" and number != step.index]

        def slopes(values: list[Tensor]) -> Tensor:
            with torch.enable_grad():
                known = {number: value.detach().requires_grad_() for number, value in zip(sources, values)}
                for number in inner:
                    known[number] = _computed(steps[number], [known[each] for each in steps[number].inputs])
                wanted = [known[number] for number in [*sources, *sums]]
                found = torch.autograd.grad(known[step.index].sum(), wanted, materialize_grads=True, allow_unused=True)
            return torch.stack(found)

        signals = [self.flows[number].parts[0][1] for number in sources]
        factors = sampled(
            signals,
            geometry,
            lambda near, far: slopes(near) * slopes(far),
            rows=self.inputs,
            held=2 * (len(inner) + len(sources) + len(sums)),
        )
        for number, factor in zip(sources, factors):
            self._give(number, gradient * factor * geometry.inside, geometry)
        for number, factor in zip(sums, factors[len(sources) :]):
            # Only to be told: what goes on from the sum has been given already.
            zero = torch.zeros(self.inputs, *self.geometries[number].shape[1:], dtype=torch.float64)
            columns = [self.geometries[number].index[offset] for offset in geometry.offsets]
            total = self.seen.setdefault(number, zero)
            total[:, columns] += gradient * factor * geometry.inside

    # --- which covariances are needed -------------------------------------------------------------------------------

    def _needed(self) -> list[set[Offset]]:
        steps = self.reading.steps
        needed: list[set[Offset]] = [{(0,) * len(step.grid)} for step in steps]
        for step in reversed(steps):
            mine = needed[step.index]
            for number in step.inputs:
                source = steps[number]
                needed[number] |= self._before(step, source, mine)
            if step.kind == "norm" and step.options["over"] != "features":
                needed[step.inputs[0]] |= set(self._sample(step.grid))
        return needed

    def _before(self, step: Step, source: Step, mine: set[Offset]) -> set[Offset]:
        if step.kind == "weight" and step.options["form"] == "convolution":
            return {tuple(s * d for s, d in zip(step.options["stride"], offset)) for offset in mine}
        if step.kind in ("pool", "max pool"):
            kernel, stride = step.options["kernel"], step.options["stride"]
            moves = list(itertools.product(*[range(1 - k, k) for k in kernel]))
            return {
                tuple(s * d + move for s, d, move in zip(stride, offset, each)) for offset in mine for each in moves
            }
        if step.kind in ("mean", "attention"):
            return set(self._sample(source.grid))
        if source.grid == step.grid:
            return mine
        if len(source.grid) == len(step.grid):  # padding
            return mine
        return {(0,) * len(source.grid)}

    def _sample(self, grid: tuple[int, ...]) -> list[Offset]:
        """All offsets on a grid, or as many of random pairs of positions as may be afforded."""
        if grid not in self.samples:
            everything = math.prod(2 * size - 1 for size in grid)
            afforded = max(16, self.budget // (self.pairs * math.prod(grid)))
            if everything <= 1.5 * afforded:
                chosen = set(itertools.product(*[range(1 - size, size) for size in grid]))
            else:
                sizes = torch.tensor(grid)
                places = (torch.rand(2, afforded, len(grid), generator=self.generator) * sizes).long()
                chosen = {tuple(offset) for offset in (places[1] - places[0]).tolist()}
            self.samples[grid] = sorted(chosen)
        return self.samples[grid]

    # --- helpers ----------------------------------------------------------------------------------------------------

    def _inputs(self, step: Step, geometry: Geometry) -> list[Flow]:
        """What a step takes; where it is the same at all positions, spread over them."""
        flows = []
        for number in step.inputs:
            flow = self.flows[number]
            if flow.geometry.grid != geometry.grid and flow.geometry.positions == 1:
                parts = tuple((units, _spread(signal, flow.geometry, geometry)) for units, signal in flow.parts)
                flow = Flow(parts, geometry, flow.shift, flow.across, flow.share)
            flows.append(flow)
        return flows

    def _source(self, step: Step) -> Flow:
        return self.flows[step.inputs[0]]

    def _from_kernel(
        self, step: Step, source: Flow, kernel: Tensor, geometry: Geometry, mean: Tensor | None = None
    ) -> Flow:
        """A flow of one signal with this kernel, Gaussian about its mean; variations grow as the kernel did."""
        kernel = kernel * geometry.inside
        signal = _closed(kernel, mean, geometry)
        growth = geometry.sites(kernel).mean(1) / source.size.clamp_min(1e-300)
        return Flow(
            ((step.units, signal),), geometry, source.shift * growth.unsqueeze(1), source.across * growth, source.share
        )

    def _give(self, number: int, gradient: Tensor, geometry: Geometry) -> None:
        """Adds to the gradient of a step one that is known for the offsets of `geometry`."""
        target = self.geometries[number]
        if target.grid != geometry.grid and target.positions == 1:
            gradient = gradient.sum((1, 2)).reshape(self.inputs, 1, 1)
        columns = [0] if target.positions == 1 else [target.index[offset] for offset in geometry.offsets]
        total = self.gradients[number]
        if total is None:
            total = torch.zeros(self.inputs, *target.shape[1:], dtype=torch.float64)
        total = total.clone()
        total[:, columns] += gradient
        self.gradients[number] = total

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
            kernel = _boxed(source.kernel[:, columns], source.geometry.grid, geometry, options)
        else:
            kernel = source.on(geometry)
        kernel = (C_b + C_W * kernel) * geometry.inside
        size = geometry.sites(kernel).mean(1)
        growth = (size - C_b) / source.size.clamp_min(1e-300)
        shift, share = source.shift * growth.unsqueeze(1), source.share
        raw = self.reading.steps[step.inputs[0]].kind == "data"
        shift, share = _widened(shift, 1 + len(self.widths)), _widened(share, len(self.widths))
        width = 0.0 if raw else float(self.reading.steps[step.inputs[0]].units)
        fresh = torch.zeros(self.inputs, 1, dtype=torch.float64)
        if width:
            spread = _spreading(source)
            width = width / max(spread, 1e-12)
            fresh[:, 0] = growth * (_excess(source) / width).sqrt()
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
                self.inputs, target.grid, [_times(options["stride"], offset) for offset in geometry.offsets]
            )
            spread = _unboxed(gradient, geometry, target.grid, options)
            order = [moved.index[_times(options["stride"], offset)] for offset in geometry.offsets]
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
                _check_activation(composed(act, before), signal.second(single)[: self.inputs], step.name)
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
        parts = _paired(left, right, lambda x, y: x.scaled(a).plus(y.scaled(b)))
        length = max(left.shift.shape[1], right.shift.shape[1])
        shift = a**2 * _widened(left.shift, length) + b**2 * _widened(right.shift, length)
        sizes = [a**2 * left.size.mean(), b**2 * right.size.mean()]
        share = sum(size * _widened(flow.share, length - 1) for size, flow in zip(sizes, (left, right))) / sum(
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
        parts = _paired(left, right, product)
        length = max(left.shift.shape[1], right.shift.shape[1])
        K, L = left.size, right.size
        shift = _widened(left.shift, length) * L.unsqueeze(1) + _widened(right.shift, length) * K.unsqueeze(1)
        share = torch.maximum(_widened(left.share, length - 1), _widened(right.share, length - 1))
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

    # --- normalisation ----------------------------------------------------------------------------------------------

    def _norm(self, step: Step, geometry: Geometry) -> Flow:
        options, source = step.options, self._source(step)
        gain, eps = options["gain"], options["eps"]
        bias = torch.full(geometry.shape, options["bias_variance"], dtype=torch.float64) * geometry.inside
        if options["over"] == "features":
            single = source.geometry.single()
            mean = source.mixed(lambda signal: signal.mean(single)) if options["centred"] else None
            square = single.sites(source.on(single))
            variance = square if mean is None else square - mean * mean
            step.options["factor"] = factor = gain * (variance + eps).rsqrt()
            parts = []
            for units, signal in source.parts:
                moved = signal if mean is None or not mean.any() else signal.plus(constant(-mean))
                moved = moved.scaled(factor)
                parts.append((units, moved.plus(gaussian(bias, geometry)) if options["bias_variance"] else moved))
            kept = eps / (variance + eps)  # what is left of a difference in norm
            growth = (factor.square() * kept).mean(1, keepdim=True)
            return Flow(
                tuple(parts), geometry, source.shift * growth, source.across * factor.square().mean(1), source.share
            )
        kernel, variance = self._whitened(step, source, geometry)
        scale = gain**2 / (variance + eps)
        step.options["variance"], step.options["kernel"] = variance, kernel / (variance + eps)
        freedom = step.options["freedom"]
        # The mean of one over a variance is larger than one over its mean: by this, in so many degrees of freedom.
        step.options["inverse"] = inverse = freedom / (freedom - 2) if freedom > 4 else 2.0
        flow = self._from_kernel(step, source, scale * kernel + bias, geometry)
        kept = 1.0 if options["over"] == "batch" else 0.0
        shift = torch.zeros_like(source.shift)
        shift[:, :1] = kept * source.shift[:, :1] * scale.mean()
        across = (
            inverse * source.across * (scale.mean() if options["over"] == "batch" else scale[: self.inputs].reshape(-1))
        )
        return Flow(flow.parts, geometry, shift, across, source.share)

    def _whitened(self, step: Step, source: Flow, geometry: Geometry) -> tuple[Tensor, Tensor]:
        """The kernel less the means over a set of units, positions and inputs, and the variance in that set."""
        whole, members = source.geometry, step.options["members"]
        K = source.kernel
        mean = source.mixed(lambda signal: signal.mean(whole))
        outer = (whole.near(mean) * whole.far(mean)).expand(whole.shape)
        averages = _average(whole, (K - outer) * whole.inside)
        rows, cross = _row_average(whole, (K - outer) * whole.inside)
        n, P = whole.inputs, whole.positions
        overall = mean.mean(1, keepdim=True)
        if step.options["over"] == "batch":
            N = step.options["batch"]
            grand = overall.mean()
            row = mean * grand + rows / N + (1 - 1 / N) * cross
            total = grand**2 + (averages[:n] / N + (1 - 1 / N) * cross.mean(1)).mean()
            variance = whole.sites(K).mean() - total
            if N * P <= 16:
                self.notes.append(
                    f"{step.name!r} normalises over {N * P} values a unit, too few for theory to be sharp"
                )
            kernel = K - whole.near(row) - whole.far(row) + total
        else:
            row = mean * overall + rows / members
            total_i = overall**2 + (averages[:n] / members).unsqueeze(1)
            variance_i = whole.sites(K).mean(1, keepdim=True) - total_i
            if members * P <= 16:
                self.notes.append(f"{step.name!r} normalises over {members * P} values, too few for theory to be sharp")
            same = (whole.first == whole.second).reshape(-1, 1, 1)
            # Of different inputs the means differ too; units of one group share them.
            kernel = torch.where(same, K - whole.near(row) - whole.far(row) + whole.near(total_i), K - outer)
            root = (variance_i.clamp_min(0) + 1e-300).sqrt()
            variance = whole.near(root) * whole.far(root)
        # Means over sampled positions are not exact; what they leave must still be a covariance.
        size = whole.sites(kernel)
        size = size.clamp_min(1e-6 * float(size.mean()))
        bound = (whole.near(size) * whole.far(size)).sqrt()
        kernel = torch.maximum(torch.minimum(kernel, bound), -bound) * whole.inside
        kernel[:n, 0] = size
        squares = _average(whole, kernel.square() / bound.square())
        share = step.options.get("batch", 1)
        alike = squares[:n].mean() / share + (1 - 1 / share) * (squares[n:].mean() if n > 1 else 0)
        step.options["freedom"] = step.options["members"] / max(float(alike), 1e-12)
        columns = [whole.index[offset] for offset in geometry.offsets]
        return kernel[:, columns], variance if variance.ndim == 0 else variance[:, :1]

    def _norm_back(self, step: Step, gradient: Tensor) -> None:
        options, geometry = step.options, self.geometries[step.index]
        if options["over"] == "features":
            factor = options["factor"]
            both = (geometry.near(factor) * geometry.far(factor)).expand(geometry.shape)[: self.inputs]
            lost = (1 + options["centred"]) / options["members"]
            self._give(step.inputs[0], gradient * both * max(0.0, 1 - lost), geometry)
            return
        variance = options["variance"] if options["variance"].ndim == 0 else options["variance"][: self.inputs]
        scale = options["gain"] ** 2 / (variance + options["eps"])
        K = options["kernel"][: self.inputs]
        # What the means of g and of g z over the set take away.
        times = geometry.positions**2 * (options["batch"] if options["over"] == "batch" else options["members"])
        plain, along = (value.sum((1, 2)).reshape(-1, 1, 1) / times for value in (gradient, gradient * K))
        if options["over"] == "batch":
            plain, along = plain.mean(), along.mean()
        left = (gradient - plain - along * K) * geometry.inside
        left[:, 0] = left[:, 0].clamp_min(0)
        self._give(step.inputs[0], options["inverse"] * scale * left, geometry)

    # --- positions --------------------------------------------------------------------------------------------------

    def _mean(self, step: Step, geometry: Geometry) -> Flow:
        source, times = self._source(step), step.options["times"]
        whole = source.geometry
        kernel = times**2 * _average(whole, source.kernel).reshape(geometry.shape)
        mean = times * source.mixed(lambda signal: signal.mean(whole)).mean(1, keepdim=True)
        return self._from_kernel(step, source, kernel, geometry, mean)

    def _mean_back(self, step: Step, gradient: Tensor) -> None:
        whole = self.geometries[step.inputs[0]]
        each = gradient[:, :1] * (step.options["times"] / whole.positions) ** 2
        self._give(step.inputs[0], each * whole.inside, whole)

    def _pool(self, step: Step, geometry: Geometry) -> Flow:
        source = self._source(step)
        kernel = windows.pooled(source.kernel, source.geometry, geometry, step.options)
        mean = windows.pooled_mean(
            source.mixed(lambda signal: signal.mean(source.geometry)), source.geometry, step.options
        )
        return self._from_kernel(step, source, kernel, geometry, mean)

    def _pool_back(self, step: Step, gradient: Tensor) -> None:
        target = self.geometries[step.inputs[0]]
        spread = windows.unpooled(gradient, self.geometries[step.index], target, step.options)
        self._give(step.inputs[0], spread, target)

    def _max_pool(self, step: Step, geometry: Geometry) -> Flow:
        source = self._source(step)
        moments = [windows.largest(signal, source.geometry, geometry, step.options) for _, signal in source.parts]
        total = sum(units for units, _ in source.parts)
        kernel, mean, slopes = (
            sum(units / total * value for (units, _), value in zip(source.parts, values)) for values in zip(*moments)
        )
        step.options["slopes"] = slopes[: self.inputs]
        return self._from_kernel(step, source, kernel, geometry, mean)

    def _max_pool_back(self, step: Step, gradient: Tensor) -> None:
        target = self.geometries[step.inputs[0]]
        gradient = gradient * step.options["slopes"]
        spread = windows.unpooled(gradient, self.geometries[step.index], target, step.options, one=True)
        # The slopes at the largest are in already, so that this is the gradient before the activation.
        self._give(self.roots[step.inputs[0]][0], spread, target)

    def _attention(self, step: Step, geometry: Geometry) -> Flow:
        source = self._source(step)
        query, key = (self.flows[number].size.mean().item() for number in step.inputs[1:])
        logit = math.sqrt(query * key * step.options["sharpness"])
        self.notes.append(f"attention logits of {step.name!r} have a standard deviation of about {logit:.2g}")
        matrix = windows.matrix(source.kernel, source.geometry)
        length, causal = source.geometry.positions, step.options["causal"]
        if logit > 0.05 and len(matrix) * length**4 <= 2e8:
            query_matrix, key_matrix = (
                windows.matrix(self.flows[number].kernel, self.geometries[number]) for number in step.inputs[1:]
            )
            matrix = windows.attended(
                matrix, query_matrix, key_matrix, source.geometry, causal, step.options["sharpness"]
            )
        elif causal:
            count = torch.arange(1, length + 1, dtype=torch.float64)
            matrix = matrix.cumsum(-1).cumsum(-2) / (count.unsqueeze(-1) * count)
        else:
            matrix = matrix.mean((-1, -2), keepdim=True).expand_as(matrix)
        return self._from_kernel(step, source, windows.from_matrix(matrix, geometry), geometry)

    def _attention_back(self, step: Step, gradient: Tensor) -> None:
        geometry, target = self.geometries[step.index], self.geometries[step.inputs[0]]
        matrix = windows.matrix(gradient, geometry)
        length = target.positions
        if step.options["causal"]:
            count = torch.arange(1, length + 1, dtype=torch.float64)
            matrix = (matrix / (count.unsqueeze(-1) * count)).flip(-1, -2).cumsum(-1).cumsum(-2).flip(-1, -2)
        else:
            matrix = matrix.sum((-1, -2), keepdim=True).expand(-1, length, length) / length**2
        self._give(step.inputs[0], windows.from_matrix(matrix, target), target)

    def _select(self, step: Step, geometry: Geometry) -> Flow:
        source, place = self._source(step), step.options["position"]
        kernel = source.kernel[:, :1, place : place + 1]
        mean = source.mixed(lambda signal: signal.mean(source.geometry))[:, place : place + 1]
        return self._from_kernel(step, source, kernel, geometry, mean)

    def _select_back(self, step: Step, gradient: Tensor) -> None:
        target = self.geometries[step.inputs[0]]
        spread = torch.zeros(self.inputs, 1, target.positions, dtype=torch.float64)
        spread[:, :, step.options["position"]] = gradient[:, :, 0]
        self._give(step.inputs[0], spread, target.single())

    def _pad(self, step: Step, geometry: Geometry) -> Flow:
        source = self._source(step)
        columns = [source.geometry.index.get(offset, -1) for offset in geometry.offsets]
        margins = [side for pair in reversed(step.options["margins"]) for side in pair]
        known = source.kernel.unflatten(-1, source.geometry.grid)[:, columns]
        known = known * torch.tensor([c >= 0 for c in columns]).reshape(1, -1, *[1] * len(source.geometry.grid))
        mean = source.mixed(lambda signal: signal.mean(source.geometry)).unflatten(-1, source.geometry.grid)
        padded = F.pad(known, margins).flatten(2)
        return self._from_kernel(step, source, padded, geometry, F.pad(mean, margins).flatten(1))

    def _pad_back(self, step: Step, gradient: Tensor) -> None:
        target, geometry = self.geometries[step.inputs[0]], self.geometries[step.index]
        inner = gradient.unflatten(-1, geometry.grid)
        for axis, ((before, _), size) in enumerate(zip(step.options["margins"], target.grid)):
            inner = inner.narrow(2 + axis, before, size)
        kept = [number for number, offset in enumerate(geometry.offsets) if offset in target.index]
        moved = Geometry(self.inputs, target.grid, [geometry.offsets[number] for number in kept])
        self._give(step.inputs[0], inner.flatten(2)[:, kept] * moved.inside, moved)

    # --- units ------------------------------------------------------------------------------------------------------

    def _average(self, step: Step, geometry: Geometry) -> Flow:
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
            torch.stack([w * _widened(flow.shift, length) for w, flow in zip(weights, flows)]).sum(0),
            torch.stack([w * flow.across for w, flow in zip(weights, flows)]).sum(0),
            torch.stack([w * _widened(flow.share, length - 1) for w, flow in zip(weights, flows)]).sum(0),
        )

    def _join_back(self, step: Step, gradient: Tensor) -> None:
        for number in step.inputs:
            self._give(number, gradient, self.geometries[step.index])

    def _same(self, step: Step, geometry: Geometry) -> Flow:
        source = self._source(step)
        return Flow(source.parts, geometry, source.shift, source.across, source.share)

    def _same_back(self, step: Step, gradient: Tensor) -> None:
        self._give(step.inputs[0], gradient, self.geometries[step.index])


def _computed(step: Step, values: list[Tensor]) -> Tensor:
    if step.kind == "function":
        return step.options["act"](values[0])
    if step.kind == "scale":
        return values[0] * step.options["by"]
    if step.kind == "shift":
        return values[0] + step.options["by"]
    if step.kind == "multiply":
        return values[0] * values[1]
    a, b = step.options["scales"]
    return a * values[0] + b * values[1]


# --- small things -----------------------------------------------------------------------------------------------------


def _times(stride: Iterable[int], offset: Offset) -> Offset:
    return tuple(s * d for s, d in zip(stride, offset))


def _widened(t: Tensor, length: int) -> Tensor:
    """Columns of zeros for weight layers that a signal did not go through."""
    return F.pad(t, (0, length - t.shape[-1]))


def _paired(left: Flow, right: Flow, operation: Callable[[Signal, Signal], Signal]) -> tuple[tuple[int, Signal], ...]:
    if len(left.parts) == 1:
        return tuple((units, operation(left.parts[0][1], signal)) for units, signal in right.parts)
    if len(right.parts) == 1:
        return tuple((units, operation(signal, right.parts[0][1])) for units, signal in left.parts)
    if [units for units, _ in left.parts] == [units for units, _ in right.parts]:
        return tuple((units, operation(a, b)) for (units, a), (_, b) in zip(left.parts, right.parts))
    raise ValueError(
        "model joins units in groups of different sizes and then adds or multiplies them, which predict cannot follow"
    )


def _closed(kernel: Tensor, mean: Tensor | None, geometry: Geometry) -> Signal:
    if mean is None or not mean.any():
        return gaussian(kernel, geometry)
    centred = (kernel - geometry.near(mean) * geometry.far(mean)) * geometry.inside
    return gaussian(centred, geometry).plus(constant(mean))


def _spread(signal: Signal, single: Geometry, geometry: Geometry) -> Signal:
    if signal.is_number:
        return signal
    kernel = signal.second(single).expand(geometry.shape) * geometry.inside
    return _closed(kernel, signal.mean(single).expand(-1, geometry.positions), geometry)


def _boxed(kernel: Tensor, grid: tuple[int, ...], geometry: Geometry, options: dict) -> Tensor:
    """Averages over the taps of a convolution."""
    images = kernel.reshape(-1, 1, *grid)
    taps = torch.ones(1, 1, *options["kernel"], dtype=kernel.dtype) / math.prod(options["kernel"])
    convolve = _CONVOLVE[len(grid)]
    out = convolve(images, taps, stride=options["stride"], padding=options["padding"], dilation=options["dilation"])
    return out.reshape(*kernel.shape[:2], -1)


def _unboxed(gradient: Tensor, geometry: Geometry, grid: tuple[int, ...], options: dict) -> Tensor:
    images = gradient.reshape(-1, 1, *geometry.grid)
    taps = torch.ones(1, 1, *options["kernel"], dtype=gradient.dtype)
    extra = [
        whole - ((part - 1) * s - 2 * p + d * (k - 1) + 1)
        for whole, part, s, p, d, k in zip(
            grid, geometry.grid, options["stride"], options["padding"], options["dilation"], options["kernel"]
        )
    ]
    out = _SPREAD[len(grid)](
        images,
        taps,
        stride=options["stride"],
        padding=options["padding"],
        output_padding=extra,
        dilation=options["dilation"],
    )
    return out.reshape(*gradient.shape[:2], -1)


def _average(geometry: Geometry, kernel: Tensor) -> Tensor:
    """The mean of a kernel over all pairs of positions, for each pair of inputs."""
    P = geometry.positions
    if P == 1:
        return kernel[:, 0, 0]
    count = geometry.inside[1:].sum()
    own, others = kernel[:, 0].mean(-1), kernel[:, 1:].sum((1, 2)) / count.clamp_min(1)
    return own / P + (1 - 1 / P) * others if count else own


def _row_average(geometry: Geometry, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """For each site the mean over positions of its own input, and the mean over those of the other inputs."""
    n, P = geometry.inputs, geometry.positions
    others = torch.zeros(n, P, dtype=kernel.dtype)
    if P == 1:
        own = kernel[:n, 0]
    else:
        count = geometry.inside[1:].sum(0)
        fallback = _average(geometry, kernel)[:n].unsqueeze(1)
        rest = kernel[:n, 1:].sum(1) / count.clamp_min(1)
        own = torch.where(count > 0, kernel[:n, 0] / P + (1 - 1 / P) * rest, fallback)
    if n > 1:
        near_count = geometry.inside.sum(0).clamp_min(1)
        far_count = torch.zeros(P, dtype=kernel.dtype)
        far_count.index_add_(0, geometry.far_position.flatten(), geometry.inside.flatten().to(kernel.dtype))
        for i, j, block in zip(geometry.first[n:].tolist(), geometry.second[n:].tolist(), kernel[n:]):
            others[i] += block.sum(0) / near_count / (n - 1)
            far = torch.zeros(P, dtype=kernel.dtype).index_add_(0, geometry.far_position.flatten(), block.flatten())
            others[j] += far / far_count.clamp_min(1) / (n - 1)
    return own, others


def _spreading(source: Flow) -> float:
    """By how much positions move together: the mean square of their correlation; one where it is not known."""
    geometry = source.geometry
    if geometry.positions == 1 or len(geometry.offsets) == 1:
        return 1.0
    K = source.kernel
    variance = geometry.sites(K)
    scale = (geometry.near(variance) * geometry.far(variance)).clamp_min(1e-300)
    return float(_average(geometry, K.square() / scale)[: geometry.inputs].mean())


def _excess(source: Flow) -> Tensor:
    """The variance of a unit's square, for each input."""
    single = source.geometry.single()
    square = source.on(single)[: single.inputs, 0]
    fourth = source.mixed(lambda signal: signal.fourth(single))
    return (fourth - square * square).clamp_min(0).mean(1)


def _check_kernel(step: Step, flow: Flow) -> None:
    size = flow.size
    if not torch.isfinite(flow.kernel).all():
        raise ValueError(f"the kernel at {step.name!r} is not finite: signals overflow, initialise it smaller")
    if not (size > 0).any():
        raise ValueError(
            f"the kernel at {step.name!r} is zero, and with it every signal: its weights or inputs are zero; give "
            "example_input with entries that are not zero and weights as they are before training"
        )
    n, geometry = flow.geometry.inputs, flow.geometry
    matrix = torch.zeros(n, n, dtype=torch.float64)
    matrix[geometry.first, geometry.second] = flow.kernel[:, 0].mean(-1)
    lowest = torch.linalg.eigvalsh(matrix.triu() + matrix.triu(1).mT)[0]
    if lowest < -1e-6 * matrix.trace():
        raise ValueError(f"the kernel at {step.name!r} is not positive definite: its lowest eigenvalue is {lowest:.3g}")


def _check_activation(act: Activation, variance: Tensor, name: str) -> None:
    """Raises where the integral of `act(z)^2` is carried by the far tails or by a point."""
    K = variance[variance > 0].flatten()
    if not len(K):
        return
    K = K.mean().reshape(1)
    root = K.sqrt()
    whole = line_expectation(lambda z: act(z).square(), K, act.kinks)
    tails = line_expectation(lambda z: torch.where(z.abs() > 7.5 * root, act(z).square(), 0.0), K, act.kinks)
    core = line_expectation(lambda z: torch.where(z.abs() < 4e-3 * root, act(z).square(), 0.0), K, act.kinks)
    # Between nodes that lie a little elsewhere a pole shows, and nothing else does.
    moved = line_expectation(lambda z: act(z).square(), K * 1.001, act.kinks)
    poles = (moved / whole - 1).abs() > 0.2
    if not torch.isfinite(whole).all() or poles.any() or (tails > 1e-4 * whole).any() or (core > 0.5 * whole).any():
        raise ValueError(
            f"the activation {act.name!r} at {name!r} has no finite Gaussian second moment at variance {K.item():.3g}; "
            "use one that grows no faster than a polynomial and has no poles"
        )
