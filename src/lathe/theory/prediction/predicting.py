"""`predict`: puts reading, propagation, simulation and verdicts together."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lathe.theory.deep_learning_theory import NoCriticalPoint, aspect_ratio
from lathe.theory.prediction.criticality import Change, anchor_of, apply_changes, block_start, judge, path_into
from lathe.theory.prediction.propagation import Propagation, propagate
from lathe.theory.prediction.reading import Reading, Step, read
from lathe.theory.prediction.report import DepthToWidth, LayerPrediction, Prediction
from lathe.theory.prediction.scaling import Scaling, compare_widths, looks_like
from lathe.theory.prediction.simulation import Simulation, drawings, simulate

__all__ = ["critical_init_", "predict"]


def predict(
    model: nn.Module,
    example_input: Any,
    *,
    draws: int = 20,
    seed: int = 0,
    make_model: Callable[[int], nn.Module] | None = None,
    widths: tuple[int, int] = (64, 256),
    progress: Callable[[str, int, int], None] | None = None,
) -> Prediction:
    """What theory expects of a network at initialisation, layer by layer, beside a simulation of that very network.

    The network is run once on the example in training mode, and every operation between its tensors is read: linear
    layers, convolutions, embeddings, activations (modules, functions, or formulas written out), sums and products of
    streams, BatchNorm, LayerNorm, GroupNorm and RMSNorm, dropout, pooling, and attention, which is taken as uniform.
    Kernels are those of wide layers (exact in expectation for piecewise linear activations at any width); the
    simulation draws the parameters anew, by each module's own initialiser where they look as it leaves them. `model` is
    left as it was.

    Args:
        model: any network; see `UnsupportedNetwork` for what theory has nothing to say about.
        example_input: what the network takes: a tensor whose first axis counts inputs, a tuple of arguments, or a dict.
            With two or more inputs correlations are predicted too; with BatchNorm the batch is part of the network.
        draws: networks that are simulated; 0 for theory alone.
        seed: of the simulation.
        make_model: gives the network at any width; with it the parametrisation is found from two widths, not guessed.
        widths: those two widths.
        progress: called as `progress(what, done, total)`.

    Raises:
        UnsupportedNetwork: naming every part that cannot be followed, and what to do.
        ValueError: where the network does not run on the example, has no weights, an activation has no finite Gaussian
            second moment, or a kernel is not positive; for `draws` of 1 or below 0, or two equal widths.
    """
    if draws < 0 or draws == 1:
        raise ValueError(f"draws must be 0, or at least 2 for a standard error, got {draws}")
    reading = read(model, example_input)
    plan = drawings(model, reading)
    found = propagate(reading, torch.Generator().manual_seed(0), progress)
    simulated = None
    if draws:
        simulated = simulate(model, example_input, reading, plan, found.inputs, draws, seed, progress)
    chosen = [step.index for step in reading.steps if _is_layer(step, reading.steps, found)]
    spans = [
        (block_start(step, reading.steps), step.index)
        for step in reading.steps
        if step.kind == "add" and step.index in chosen and block_start(step, reading.steps) >= 0
    ]
    layers = tuple(
        _layer(reading, found, simulated, number, any(start < number < end for start, end in spans))
        for number in chosen
    )
    return Prediction(
        layers=layers,
        kernel=torch.stack([found.flows[number].size for number in chosen]),
        gradient=torch.tensor([layer.gradient for layer in layers], dtype=torch.float64),
        measured_kernel=None if simulated is None else simulated.kernel[:, chosen],
        measured_gradient=None if simulated is None else simulated.gradient[:, chosen],
        inputs=found.inputs,
        criticality=judge(reading, found),
        depth_to_width=_depth_to_width(reading, found),
        scaling=_scaling(model, example_input, reading, make_model, widths),
        notes=tuple(dict.fromkeys([*reading.notes, *found.notes])),
    )


def critical_init_(
    model: nn.Module, example_input: Any, *, generator: torch.Generator | None = None
) -> tuple[Change, ...]:
    """Draws a network's weights so that signals and gradients keep their size in depth; says what it changed.

    Layers behind an activation get its critical point; the last layers of residual branches are scaled down with the
    number of branches (or by `1 - skip^2`, where the skip connection has a weight); layers that a norm follows are left
    alone, as it divides their scale out. `predict(...).criticality.changes` says the same without doing it.

    Raises:
        NoCriticalPoint: where the network's activation has none, with the reason; UnsupportedNetwork and ValueError as
            `predict`.
    """
    reading = read(model, example_input)
    drawings(model, reading)
    verdict = judge(reading, propagate(reading, torch.Generator().manual_seed(0)))
    if not verdict.changes and verdict.universality is None:
        raise NoCriticalPoint(verdict.explanation)
    apply_changes(model, verdict.changes, generator)
    return verdict.changes


def _scaling(
    model: nn.Module,
    example: Any,
    reading: Reading,
    make_model: Callable[[int], nn.Module] | None,
    widths: tuple[int, int],
) -> Scaling:
    if make_model is None:
        return looks_like(model, reading)
    narrow, wide = sorted(widths)
    if narrow == wide or narrow < 1:
        raise ValueError(f"widths must be two different widths of at least 1, got {widths}")
    readings = []
    with torch.random.fork_rng():
        for width in (narrow, wide):
            torch.manual_seed(0)
            made = make_model(width)
            if not isinstance(made, nn.Module):
                raise ValueError(f"make_model must return a module for width {width}, got {type(made).__name__}")
            readings.append(read(made, example))
            drawings(made, readings[-1])
    return compare_widths(made, *readings)


def _is_layer(step: Step, steps: list[Step], found: Propagation) -> bool:
    if step.kind == "weight":
        return True
    # Sums inside of one activation's formula, and biases that are added, are no layers.
    return (
        step.kind == "add"
        and found.roots[step.index][0] == step.index
        and all(steps[number].kind != "data" or steps[number].units > 1 for number in step.inputs)
        and found.gradients[step.index] is not None
    )


def _layer(
    reading: Reading, found: Propagation, simulated: Simulation | None, number: int, in_branch: bool
) -> LayerPrediction:
    steps, step, flow = reading.steps, reading.steps[number], found.flows[number]
    options = step.options
    if step.kind == "weight":
        path = path_into(step, steps)
        start = path.anchor if step.inputs else -1
        fed_by = ", ".join(
            steps[each].options["act"].name if steps[each].kind == "function" else _norm_name(steps[each])
            for each in sorted([*path.functions, *path.norms])
        )
        if start >= 0 and steps[start].kind == "data":
            fed_by = ", ".join(filter(None, ("input", fed_by)))
    else:
        start, fed_by = anchor_of(block_start(step, steps), steps), ""
    begun = start >= 0 and steps[start].kind != "data"
    power, here = found.power(start, steps) if begun else 0.0, found.power(number, steps)
    gradient = found.gradients[number]
    each = 0.0 if gradient is None else float(gradient[:, 0].mean())
    return LayerPrediction(
        name=step.name,
        kind={"weight": {"flat": "linear"}.get(options.get("form", ""), options.get("form", "")), "add": "sum"}[
            step.kind
        ],
        fed_by=fed_by,
        fan_in=options.get("fan_in", step.units),
        fan_out=options.get("fan_out", step.units),
        C_W=options["variance"] * options["fan_in"] if step.kind == "weight" else None,
        C_b=options.get("bias_variance"),
        drawn="" if step.kind == "add" else "own initialiser" if options.get("own") else "as present",
        kernel=float(flow.size.mean()),
        correlation=_correlation(flow.kernel[:, 0].mean(-1), found.inputs),
        chi_parallel=_ratio(flow.shift[:, 0], found.flows[start].shift[:, 0]) if begun else None,
        chi_perpendicular=_ratio(flow.across, found.flows[start].across) if begun else None,
        gradient=each,
        gradient_norm=math.sqrt(here),
        gradient_factor=power / here if begun and here and power else None,
        fluctuation=float((flow.shift[:, 1:].square().sum(1) / flow.size.square().clamp_min(1e-300)).mean()),
        in_branch=in_branch,
        **_measured(simulated, number),
    )


def _norm_name(step: Step) -> str:
    return {"features": "norm of units", "batch": "norm of the batch", "group": "norm of groups"}[step.options["over"]]


def _ratio(here: Tensor, before: Tensor) -> float | None:
    before = before.mean()
    return float(here.mean() / before) if before > 0 else None


def _correlation(kernel: Tensor, inputs: int) -> float | None:
    if inputs < 2:
        return None
    own = kernel[:inputs]
    first, second = zip(*[(i, j) for i in range(inputs) for j in range(i + 1, inputs)])
    scale = (own[list(first)] * own[list(second)]).sqrt()
    return float((kernel[inputs:] / scale.clamp_min(1e-300)).mean())


def _measured(simulated: Simulation | None, number: int) -> dict[str, float | None]:
    if simulated is None:
        return {}
    result: dict[str, float | None] = {}
    for name, error, values in (
        ("measured_kernel", "kernel_error", simulated.kernel[:, number]),
        ("measured_gradient", "gradient_error", simulated.gradient[:, number]),
    ):
        if torch.isfinite(values).all():
            result |= {name: float(values.mean()), error: float(values.std() / math.sqrt(len(values)))}
    return result


def _depth_to_width(reading: Reading, found: Propagation) -> DepthToWidth:
    steps = reading.steps
    last = max(step.index for step in steps if step.kind == "weight" and found.gradients[step.index] is not None)
    flow = found.flows[last]
    ratio = sum(float(share) ** 2 / width for share, width in zip(flow.share, found.widths) if width)
    fluctuation = float((flow.shift[:, 1:].square().sum(1) / flow.size.square().clamp_min(1e-300)).mean())
    acts = [step.options["act"] for step in steps if step.kind == "function"]
    optimal = None
    with contextlib.suppress(NoCriticalPoint):
        optimal = aspect_ratio(acts[0] if acts else "linear", max(2, steps[last].units))
    wave = f"squared outputs vary by {math.sqrt(fluctuation):.0%} from draw to draw"
    aim = "" if optimal is None else f" Outputs inform one another most near {optimal:.2g} (an order of magnitude)."
    scale = optimal if optimal is not None else 0.1
    if ratio < scale / 10:
        verdict, words = "wide", f"So wide for its depth that it starts close to its kernel limit; {wave}.{aim}"
    elif ratio <= 2 * scale:
        verdict, words = "balanced", f"Depth matters and theory holds to first order in depth / width; {wave}.{aim}"
    elif ratio < 1:
        verdict, words = "deep", f"Deep for its width: expect draws, and training runs, to differ; {wave}.{aim}"
    else:
        verdict = "too deep"
        words = f"Depth exceeds width: draws have little in common, and corrections to theory are large; {wave}.{aim}"
    return DepthToWidth(ratio, fluctuation, optimal, verdict, words)
