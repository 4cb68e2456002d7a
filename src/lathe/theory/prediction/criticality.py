"""Whether signals and gradients keep their size in depth, and how to initialise so that they do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lathe.core.gaussian import Activation, activation, line_expectation
from lathe.theory.deep_learning_theory import NoCriticalPoint, critical_point
from lathe.theory.deep_learning_theory.criticality import CriticalPoint
from lathe.theory.prediction.propagation import Propagation
from lathe.theory.prediction.reading import Reading, Step

__all__ = ["Change", "Criticality", "Path", "anchor_of", "apply_changes", "behind", "block_start", "judge", "path_into"]

#: Steps that a signal goes through between two layers, and that do not mix it with another.
_ALONG = ("function", "norm", "scale", "shift", "dropout", "same", "pool", "max pool", "mean", "pad", "select", "units")


@dataclass(frozen=True)
class Path:
    """How a weight layer is fed: from `anchor`, through these activations and norms.

    `gain` is what squares are multiplied with behind the activation, and behind the layer itself.
    """

    anchor: int
    functions: tuple[int, ...]
    norms: tuple[int, ...]
    gain: float

    def activation(self, steps: list[Step]) -> Activation:
        return steps[self.functions[0]].options["act"] if self.functions else activation("linear")


@dataclass(frozen=True)
class Change:
    """What to set one layer to.

    Attributes:
        name: the layer.
        parameters: names of its weight and bias; None where it has none.
        C_W, C_b: variance of the weights times fan-in, and of the biases, as they are.
        new_C_W, new_C_b: as they should be.
        std: standard deviation of the weights then.
        why: in words.
    """

    name: str
    parameters: tuple[str | None, str | None]
    C_W: float
    C_b: float
    new_C_W: float
    new_C_b: float
    std: float
    why: str

    @property
    def needed(self) -> bool:
        """Whether the layer is not as it should be already, to one percent."""
        return (
            abs(self.C_W - self.new_C_W) > 0.01 * self.new_C_W
            or abs(self.C_b - self.new_C_b) > 0.01 + 0.01 * self.new_C_b
        )


@dataclass(frozen=True)
class Criticality:
    """The verdict on a network's initialisation.

    Attributes:
        verdict: "critical" (signals and gradients neither grow nor die, at any depth), "ordered" (gradients die and
            inputs become alike), "chaotic" (gradients grow and inputs part); or, where residual branches or norms set
            the scale, "steady", "vanishing" or "exploding", by the gradients over the whole depth.
        chi: growth of squared gradients in one layer at the fixed point of the kernel (one block, in residual
            networks), as a geometric mean; with norms, of squared gradients times squared signals.
        correlation_length: layers (blocks) over which they change by a factor e; infinite at criticality.
        depth: layers (blocks) between the first and the last that were judged.
        signal_growth: mean square of the last hidden signal over that of the first.
        gradient_growth: squared norm of the gradient at the first layer over that at the last hidden one.
        universality: how networks of this activation behave at their critical point; None where it has none.
        explanation: a sentence or two.
        changes: what to set each layer to, for the verdict "critical" or "steady".
    """

    verdict: str
    chi: float
    correlation_length: float
    depth: int
    signal_growth: float
    gradient_growth: float
    universality: str | None
    explanation: str
    changes: tuple[Change, ...]

    @property
    def critical(self) -> bool:
        return self.verdict in ("critical", "steady")


def path_into(step: Step, steps: list[Step]) -> Path:
    functions: list[int] = []
    norms: list[int] = []
    gain = behind(step, steps) ** 2
    pending = 1.0
    current = steps[step.inputs[0]] if step.inputs else step
    while current.kind in _ALONG:
        if current.kind == "function":
            functions.insert(0, current.index)
            gain, pending = gain * pending, 1.0  # what lies before the activation is the other layer's
        elif current.kind == "norm":
            norms.insert(0, current.index)
        elif current.kind == "scale":
            pending *= current.options["by"] ** 2
        elif current.kind == "dropout":
            gain /= 1 - current.options["p"]
        current = steps[current.inputs[0]]
    if current.kind != "weight" and not functions:
        gain *= pending
    return Path(current.index, tuple(functions), tuple(norms), gain)


def behind(step: Step, steps: list[Step]) -> float:
    """What a layer's outputs are multiplied with before anything else happens to them."""
    total, current = 1.0, step
    while True:
        users = [each for each in steps if current.index in each.inputs]
        if len(users) != 1 or users[0].kind not in ("scale", "same"):
            return total
        current = users[0]
        total *= abs(current.options.get("by", 1.0))


def anchor_of(number: int, steps: list[Step]) -> int:
    """The layer, sum or input that a step is a function of."""
    while number >= 0 and steps[number].kind in _ALONG:
        number = steps[number].inputs[0]
    return number


def block_start(step: Step, steps: list[Step]) -> int:
    """Where the two streams that a sum adds were last one."""
    streams = [set(_upstream(number, steps)) for number in step.inputs]
    return max(streams[0] & streams[1], default=-1)


def _upstream(number: int, steps: list[Step]) -> Iterator[int]:
    pending, seen = [number], {number}
    while pending:
        yield (current := pending.pop())
        for source in steps[current].inputs:
            if source not in seen:
                seen.add(source)
                pending.append(source)


def judge(reading: Reading, found: Propagation) -> Criticality:
    steps = reading.steps
    needed = set(_upstream(reading.output, steps))
    weights = [step for step in steps if step.kind == "weight" and step.index in needed]
    paths = {step.index: path_into(step, steps) for step in weights if step.inputs}
    blocks = [
        step
        for step in steps
        if step.kind == "add"
        and step.index in needed
        and found.roots[step.index][0] == step.index
        and block_start(step, steps) >= 0
    ]
    hidden = [step for step in weights if step.index in paths and steps[paths[step.index].anchor].kind != "data"]
    inner = hidden[:-1] if len(hidden) > 1 else hidden
    point, reason = _first_point(weights, paths, steps)
    changes = _changes(reading, weights, paths, blocks, point) if point is not None else ()
    first, last = _first_signal(weights, blocks, steps, found), _last_hidden(weights, paths, blocks, steps)
    signal = float(found.flows[last].size.mean() / found.flows[first].size.mean())
    gradient = found.power(first, steps) / max(found.power(last, steps), 1e-300)
    plain = [step for step in inner if not paths[step.index].norms and len(paths[step.index].functions) <= 1]
    chain = not blocks and len(plain) == len(inner) and inner
    common = (signal, gradient, None if point is None else point.universality)
    if chain:
        return _chain(plain, paths, steps, point, reason, common, changes)
    depth = len(blocks) or max(1, len(inner))
    # A norm's gradients go with one over the size of what it takes, which says nothing of depth.
    normalised = any(paths[step.index].norms for step in hidden)
    growth = gradient / signal if normalised else gradient
    chi = max(growth, 1e-300) ** (1 / depth)
    length = math.inf if chi == 1 else 1 / abs(math.log(chi))
    verdict = "steady" if 0.1 <= growth <= 10 else ("vanishing" if growth < 0.1 else "exploding")
    what = f"{len(blocks)} residual blocks" if blocks else f"{depth} normalised layers"
    sizes = f"Over {what} squared gradients change by a factor of {gradient:.3g} and signals by {signal:.3g}"
    if verdict == "steady":
        words = f"{sizes}: no layer is starved or flooded."
    elif blocks:
        words = f"{sizes}; weigh the branches down, by a factor of 1 / sqrt(number of blocks) at their last layer."
    else:
        words = f"{sizes}; norms fix the signals but not the gradients: put skip connections around them."
    return Criticality(verdict, chi, length, depth, *common, words, changes)


def _chain(
    plain: list[Step],
    paths: dict[int, Path],
    steps: list[Step],
    point: CriticalPoint | None,
    reason: str,
    common: tuple[float, float, str | None],
    changes: tuple[Change, ...],
) -> Criticality:
    """Plain layers: the fixed points of their kernels decide, not the transient at this depth."""
    logs, tolerance, parallel = 0.0, 0.0, 0.0
    for step in plain:
        path, options = paths[step.index], step.options
        C_W = options["variance"] * options["fan_in"] * path.gain
        par, perp = _at_fixed_point(path.activation(steps), C_W, options["bias_variance"])
        logs += math.log(max(perp, 1e-300)) / len(plain)
        parallel += math.log(max(par, 1e-300)) / len(plain)
        # A sample of weights says their variance only so well.
        tolerance += (0.01 + (0 if options.get("own") else 3 * math.sqrt(2 / options["numel"]))) / len(plain)
    chi, depth = math.exp(logs), len(plain)
    length = math.inf if abs(logs) <= tolerance else 1 / abs(logs)
    if abs(logs) <= tolerance and parallel <= tolerance:
        p = point.p_perp if point is not None else None
        law = f", up to a power law: gradients go as depth to the power {p:g}" if p else ""
        words = f"Signals and gradients keep their size in depth{law}."
        return Criticality("critical", 1.0 if not p else chi, math.inf, depth, *common, words, changes)
    verdict = "ordered" if logs < 0 else "chaotic"
    fate = "die" if logs < 0 else "grow"
    scale = f"{length:.3g} layers" if math.isfinite(length) else "no finite length"
    words = f"Squared gradients {fate} by a factor of {chi:.3g} a layer, once e in {scale}; the network has {depth}"
    if depth < length / 2:
        words += ", which is shallow enough not to matter"
    words += f". {reason}" if reason else "."
    return Criticality(verdict, chi, length, depth, *common, words, changes)


def _at_fixed_point(act: Activation, C_W: float, C_b: float) -> tuple[float, float]:
    """`(chi_par, chi_perp)` where the kernel settles, or far on its way to zero or infinity."""
    if C_W == 0:
        return 0.0, 0.0
    if act.slopes is not None:
        chi = C_W * (act.slopes[0] ** 2 + act.slopes[1] ** 2) / 2
        return chi, chi

    def moments(K: Tensor) -> Tensor:
        def columns(z: Tensor) -> Tensor:
            s, d = act(z), act.derivative(z)
            return torch.stack([s * s, d * d, z * s * d])

        return line_expectation(columns, K, act.kinks)

    # From K = 1 the kernel moves to the next root of K' - K, up or down, or runs away.
    grid = torch.logspace(-8, 8, 161, dtype=torch.float64)
    growth = (C_b + C_W * moments(grid)[0]) / grid - 1
    start, up = 80, bool(growth[80] > 0)
    order = range(start, 161) if up else range(start, -1, -1)
    end = next((place for place in order if bool(growth[place] > 0) != up), None)
    if end is None:
        K = grid[-1:] if up else grid[:1]
    else:
        low, high = sorted((end, end - 1 if up else end + 1))
        edges = grid[low], grid[high]
        for _ in range(12):
            fine = torch.logspace(float(edges[0].log10()), float(edges[1].log10()), 17, dtype=torch.float64)
            sign = (C_b + C_W * moments(fine)[0]) / fine - 1 > 0
            place = int((sign[1:] != sign[:-1]).nonzero()[0]) if bool((sign[1:] != sign[:-1]).any()) else 0
            edges = fine[place], fine[place + 1]
        K = edges[0].reshape(1)
    _, slope, radial = moments(K)
    return float(C_W * radial / K), float(C_W * slope)


def _first_point(weights: list[Step], paths: dict[int, Path], steps: list[Step]) -> tuple[CriticalPoint | None, str]:
    for step in weights:
        path = paths.get(step.index)
        if path is not None and path.functions:
            try:
                return critical_point(path.activation(steps)), ""
            except NoCriticalPoint as error:
                return None, f"There is nothing to set: {error}."
    return critical_point("linear"), ""


def _changes(
    reading: Reading, weights: list[Step], paths: dict[int, Path], blocks: list[Step], first: CriticalPoint
) -> tuple[Change, ...]:
    steps = reading.steps
    closing = _closing(blocks, steps)
    changes = []
    for step in weights:
        path, options = paths.get(step.index), step.options
        if path is None or options.get("inner") or not options["weights"]:
            continue
        if _normalised_next(step, steps):
            continue  # its scale is divided out again
        if path.norms and step.index not in closing:
            continue  # its input has a fixed size, whatever comes before
        raw = steps[path.anchor].kind == "data"
        act = path.activation(steps)
        try:
            point = first if raw and not path.functions else critical_point(act)
        except NoCriticalPoint:
            continue
        C_W, C_b, why = point.C_W / path.gain, point.C_b, f"critical point of {act.name}"
        if raw and not path.functions:
            why = "takes the raw input"
        if step.index in closing:
            skip = closing[step.index]
            part = 1 - skip**2 if skip < 1 else 1 / len(blocks)
            C_W, C_b = C_W * part, C_b * part
            why += ", closes a residual branch" if skip < 1 else f", closes one of {len(blocks)} residual branches"
        multiplier = options.get("multiplier", 1.0) or 1.0
        names = (options["weights"][0], options["biases"][0] if options["biases"] else None)
        now = options["variance"] * options["fan_in"]
        std = math.sqrt(C_W / options["fan_in"]) / multiplier
        changes.append(Change(step.name, names, now, options["bias_variance"], C_W, C_b, std, why))
    return tuple(changes)


def _closing(blocks: list[Step], steps: list[Step]) -> dict[int, float]:
    """The last layers of residual branches, with the weight of the skip connection beside them."""
    found = {}
    for block in blocks:
        start = block_start(block, steps)
        for side in (0, 1):
            current = steps[block.inputs[side]]
            while current.kind in _ALONG:
                current = steps[current.inputs[0]]
            skip = abs(block.options["scales"][1 - side])
            other = steps[block.inputs[1 - side]]
            while other.kind in ("scale", "same"):
                skip *= abs(other.options.get("by", 1.0))
                other = steps[other.inputs[0]]
            if current.kind == "weight" and current.index > start and other.index <= start:
                found[current.index] = skip
    return found


def _normalised_next(step: Step, steps: list[Step]) -> bool:
    current = step
    while True:
        users = [each for each in steps if current.index in each.inputs]
        if not users:
            return False
        if all(each.kind == "norm" for each in users):
            return True
        if len(users) > 1 or users[0].kind not in ("same", "scale", "dropout"):
            return False
        current = users[0]


def _first_signal(weights: list[Step], blocks: list[Step], steps: list[Step], found: Propagation) -> int:
    """Where the residual stream begins, or the first layer."""
    starts = [anchor_of(block_start(block, steps), steps) for block in blocks]
    candidates = [start for start in starts if steps[start].kind != "data"] or [block.index for block in blocks]
    candidates = candidates or [step.index for step in weights if found.gradients[step.index] is not None]
    return min(candidates)


def _last_hidden(weights: list[Step], paths: dict[int, Path], blocks: list[Step], steps: list[Step]) -> int:
    """The last layer or sum before the readout."""
    readout = weights[-1]
    if blocks and blocks[-1].index > readout.index:
        return blocks[-1].index
    if readout.index in paths and steps[paths[readout.index].anchor].kind in ("weight", "add"):
        return paths[readout.index].anchor
    return max(step.index for step in steps if step.kind in ("weight", "add"))


@torch.no_grad()
def apply_changes(model: nn.Module, changes: tuple[Change, ...], generator: torch.Generator | None = None) -> None:
    for change in changes:
        weight, bias = change.parameters
        assert weight is not None
        model.get_parameter(weight).normal_(0.0, change.std, generator=generator)
        if bias is not None:
            parameter = model.get_parameter(bias)
            if change.new_C_b > 0:
                parameter.normal_(0.0, math.sqrt(change.new_C_b), generator=generator)
            else:
                parameter.zero_()
