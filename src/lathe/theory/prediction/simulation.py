"""The network itself, drawn anew at initialisation many times: what its signals and gradients really are."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lathe.theory.prediction.layout import INPUTS, reordered
from lathe.theory.prediction.reading import Reading, Recorder, Step

__all__ = ["Drawing", "Simulation", "drawings", "simulate"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Drawing:
    """How a parameter is drawn: by its module's own initialiser, or as Gaussian of the variance that it has now."""

    name: str
    std: float
    own: bool


def drawings(model: nn.Module, reading: Reading) -> list[Drawing]:
    """How each parameter of the weight layers is drawn; sets the steps' variances to those that are drawn from.

    A module whose parameters look as its `reset_parameters` leaves them is taken to be drawn by it, and the variance is
    the initialiser's; others keep the mean square that they have.
    """
    known: dict[str, Drawing] = {}
    for step in reading.steps:
        if step.kind != "weight":
            continue
        for key, variance in (("weights", "variance"), ("biases", "bias_variance")):
            names = step.options[key]
            if not names:
                continue
            # Of a weight that is computed from several parameters the largest carries the randomness.
            name = max(names, key=lambda each: model.get_parameter(each).numel())
            parameter = model.get_parameter(name).detach().double()
            square = float(parameter.square().mean())
            if name not in known:
                expected = _expected(model, name)
                own = expected is not None and _agree(square, expected, parameter.numel())
                known[name] = Drawing(name, math.sqrt(expected if own and expected is not None else square), own)
            drawn = known[name]
            factor = 1.0 if step.options.get("inner") or square == 0 else step.options[variance] / square
            step.options[variance] = drawn.std**2 * factor
            if key == "weights":
                step.options |= {"multiplier": math.sqrt(factor), "own": drawn.own}
    return list(known.values())


def _agree(square: float, expected: float, numel: int) -> bool:
    if expected == 0 or square == 0:
        return expected == square
    return abs(square / expected - 1) <= 5 * math.sqrt(2 / numel)


def _expected(model: nn.Module, name: str) -> float | None:
    """The mean square that a parameter has on average after its module's own initialiser."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and key in ("weight", "bias"):
        return 1 / (3 * module.weight[0].numel())
    reset = _initialiser(module)
    if reset is None:
        return None
    twin = copy.deepcopy(module)
    squares = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for _ in range(4):
            getattr(twin, reset)()
            squares.append(float(twin.get_parameter(key).double().square().mean()))
    return sum(squares) / len(squares)


def _initialiser(module: nn.Module) -> str | None:
    return next((name for name in ("reset_parameters", "_reset_parameters") if hasattr(module, name)), None)


@dataclass(frozen=True)
class Simulation:
    """(draws, steps) mean squares of units and of their gradients, over the inputs that theory follows; else NaN."""

    kernel: Tensor
    gradient: Tensor


def simulate(
    model: nn.Module,
    example: Any,
    reading: Reading,
    plan: list[Drawing],
    inputs: int,
    draws: int,
    seed: int,
    progress: Progress | None = None,
) -> Simulation:
    """Draws, runs and differentiates a copy of the network; the gradients are those of `v . output`, v fresh normal."""
    twin = copy.deepcopy(model).train().requires_grad_(True)
    kernel, gradient = (torch.full((draws, len(reading.steps)), float("nan"), dtype=torch.float64) for _ in range(2))
    parameters = [p for p in twin.parameters() if p.is_floating_point()]
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        for draw in range(draws):
            _redraw(twin, plan)

            def observe(step: Step, tensor: Tensor, draw: int = draw) -> None:
                if step.kind not in ("weight", "add") or step.options.get("inner"):
                    return
                kernel[draw, step.index] = _square(tensor, step, inputs)

                def keep(g: Tensor) -> None:
                    gradient[draw, step.index] = _square(g, step, inputs)

                # What is the same for all inputs gets the gradients of all.
                if tensor.requires_grad and any(label == INPUTS for axis in step.layout for label, _ in axis):
                    tensor.register_hook(keep)

            recorder = Recorder(twin, example, observe)
            recorder.run()
            output = recorder.output
            torch.autograd.grad((output * torch.randn_like(output)).sum(), parameters, allow_unused=True)
            if progress is not None:
                progress("simulate", draw + 1, draws)
    return Simulation(kernel, gradient)


def _square(tensor: Tensor, step: Step, inputs: int) -> float:
    return float(reordered(tensor.detach().double(), step.layout)[:inputs].square().mean())


@torch.no_grad()
def _redraw(model: nn.Module, plan: list[Drawing]) -> None:
    own: dict[str, list[bool]] = {}
    for drawing in plan:
        own.setdefault(drawing.name.rpartition(".")[0], []).append(drawing.own)
    for path, each in own.items():
        module = model.get_submodule(path)
        reset = _initialiser(module)
        if all(each) and reset is not None:
            getattr(module, reset)()
    for drawing in plan:
        if not all(own[drawing.name.rpartition(".")[0]]):
            model.get_parameter(drawing.name).normal_(0.0, drawing.std)
