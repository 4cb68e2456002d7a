"""The walk over a network's steps, forwards with kernels and backwards with those of gradients."""

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
from lathe.theory.prediction.reading import Reading, Step
from lathe.theory.prediction.signals import (
    Geometry,
    Offset,
    Signal,
    affine,
    composed,
    constant,
    gaussian,
    pointwise,
    sampled,
)

__all__ = [
    "Flow",
    "Propagation",
    "Walk",
    "average",
    "boxed",
    "check_activation",
    "check_kernel",
    "closed",
    "computed",
    "excess",
    "paired",
    "row_average",
    "spread",
    "spreading",
    "times",
    "unboxed",
    "widened",
]

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


class Walk:
    """Takes each step by its kind's rule, `_kind` forwards and `_kind_back` backwards; subclasses have these."""

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
                check_kernel(step, flow)
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
                    known[number] = computed(steps[number], [known[each] for each in steps[number].inputs])
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
                parts = tuple((units, spread(signal, flow.geometry, geometry)) for units, signal in flow.parts)
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
        signal = closed(kernel, mean, geometry)
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


def computed(step: Step, values: list[Tensor]) -> Tensor:
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


def times(stride: Iterable[int], offset: Offset) -> Offset:
    return tuple(s * d for s, d in zip(stride, offset))


def widened(t: Tensor, length: int) -> Tensor:
    """Columns of zeros for weight layers that a signal did not go through."""
    return F.pad(t, (0, length - t.shape[-1]))


def paired(left: Flow, right: Flow, operation: Callable[[Signal, Signal], Signal]) -> tuple[tuple[int, Signal], ...]:
    if len(left.parts) == 1:
        return tuple((units, operation(left.parts[0][1], signal)) for units, signal in right.parts)
    if len(right.parts) == 1:
        return tuple((units, operation(signal, right.parts[0][1])) for units, signal in left.parts)
    if [units for units, _ in left.parts] == [units for units, _ in right.parts]:
        return tuple((units, operation(a, b)) for (units, a), (_, b) in zip(left.parts, right.parts))
    raise ValueError(
        "model joins units in groups of different sizes and then adds or multiplies them, which predict cannot follow"
    )


def closed(kernel: Tensor, mean: Tensor | None, geometry: Geometry) -> Signal:
    if mean is None or not mean.any():
        return gaussian(kernel, geometry)
    centred = (kernel - geometry.near(mean) * geometry.far(mean)) * geometry.inside
    return gaussian(centred, geometry).plus(constant(mean))


def spread(signal: Signal, single: Geometry, geometry: Geometry) -> Signal:
    if signal.is_number:
        return signal
    kernel = signal.second(single).expand(geometry.shape) * geometry.inside
    return closed(kernel, signal.mean(single).expand(-1, geometry.positions), geometry)


def boxed(kernel: Tensor, grid: tuple[int, ...], geometry: Geometry, options: dict) -> Tensor:
    """Averages over the taps of a convolution."""
    images = kernel.reshape(-1, 1, *grid)
    taps = torch.ones(1, 1, *options["kernel"], dtype=kernel.dtype) / math.prod(options["kernel"])
    convolve = _CONVOLVE[len(grid)]
    out = convolve(images, taps, stride=options["stride"], padding=options["padding"], dilation=options["dilation"])
    return out.reshape(*kernel.shape[:2], -1)


def unboxed(gradient: Tensor, geometry: Geometry, grid: tuple[int, ...], options: dict) -> Tensor:
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


def average(geometry: Geometry, kernel: Tensor) -> Tensor:
    """The mean of a kernel over all pairs of positions, for each pair of inputs."""
    P = geometry.positions
    if P == 1:
        return kernel[:, 0, 0]
    count = geometry.inside[1:].sum()
    own, others = kernel[:, 0].mean(-1), kernel[:, 1:].sum((1, 2)) / count.clamp_min(1)
    return own / P + (1 - 1 / P) * others if count else own


def row_average(geometry: Geometry, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """For each site the mean over positions of its own input, and the mean over those of the other inputs."""
    n, P = geometry.inputs, geometry.positions
    others = torch.zeros(n, P, dtype=kernel.dtype)
    if P == 1:
        own = kernel[:n, 0]
    else:
        count = geometry.inside[1:].sum(0)
        fallback = average(geometry, kernel)[:n].unsqueeze(1)
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


def spreading(source: Flow) -> float:
    """By how much positions move together: the mean square of their correlation; one where it is not known."""
    geometry = source.geometry
    if geometry.positions == 1 or len(geometry.offsets) == 1:
        return 1.0
    K = source.kernel
    variance = geometry.sites(K)
    scale = (geometry.near(variance) * geometry.far(variance)).clamp_min(1e-300)
    return float(average(geometry, K.square() / scale)[: geometry.inputs].mean())


def excess(source: Flow) -> Tensor:
    """The variance of a unit's square, for each input."""
    single = source.geometry.single()
    square = source.on(single)[: single.inputs, 0]
    fourth = source.mixed(lambda signal: signal.fourth(single))
    return (fourth - square * square).clamp_min(0).mean(1)


def check_kernel(step: Step, flow: Flow) -> None:
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


def check_activation(act: Activation, variance: Tensor, name: str) -> None:
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
