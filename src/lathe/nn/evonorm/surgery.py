"""Put EvoNorm into a network in the place of its normalisations and the activations behind them.

`replace_norm_act(model, EvoNormB0)` finds by data flow which activation follows which normalisation, puts one layer
where the two stood, and says what it left alone and why.
Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020, arXiv 2004.02967, Section 5.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lathe.core.dataflow import REGISTERED, DataFlow
from lathe.core.surgery import SwapReport, swap
from lathe.nn.evonorm.layers import EvoNormB0, EvoNormB1, EvoNormB2, EvoNormS0, EvoNormS1, EvoNormS2

__all__ = ["ACTIVATIONS", "NORMS", "replace_norm_act"]

EvoNorm = EvoNormB0 | EvoNormB1 | EvoNormB2 | EvoNormS0 | EvoNormS1 | EvoNormS2

ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Tanh,
)
NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)
# What functional activations are called in a traced or recorded forward.
_FUNCTIONAL = frozenset(
    name + ending
    for name in (
        *(
            "relu",
            "relu6",
            "leaky_relu",
            "prelu",
            "elu",
            "celu",
            "selu",
            "gelu",
            "silu",
            "mish",
            "hardswish",
            "hardtanh",
        ),
        *("clamp", "clamp_min", "tanh", "sigmoid", "softplus"),
    )
    for ending in ("", "_")
)


def replace_norm_act(
    model: nn.Module,
    layer: type[EvoNorm],
    *,
    activations: Sequence[type[nn.Module]] = ACTIVATIONS,
    norms: Sequence[type[nn.Module]] = NORMS,
    example_input: Any = None,
    where: Callable[..., Any] | None = None,
    **options: Any,
) -> SwapReport:
    """A copy of `model` in which `layer` stands for each normalisation and the activation behind it.

    The activation becomes `nn.Identity`. A normalisation without activation gets the layer with `nonlinear=False`. One
    whose activation cannot be taken away (a function called in `forward`, a module used in several places, an output
    that others use too) is left alone, with a warning: a layer before an activation that stays is not EvoNorm.

    Args:
        model: any network; it is left as it is.
        layer: one of the six layers.
        activations, norms: the types that are replaced; compared exactly.
        example_input: what the network takes, to record its data flow where `torch.fx` cannot trace it.
        where: `where(name)` or `where(name, module)`; false leaves that normalisation alone.
        options: keyword-only arguments of `layer`.

    Returns:
        `report.model` is the new network; `report.replaced` and `report.skipped` say what happened; `str(report)` is a
        table. New layers start fresh: the network is to be trained.
    """
    model = copy.deepcopy(model)
    norms, activations = tuple(norms), tuple(activations)
    kept: dict[int, str] = {}
    flow = DataFlow(model, {*norms, *activations}, example_input)
    for norm in model.modules():
        if type(norm) in norms and isinstance(flow.sequence(norm, (norms, activations)), str):
            taker = _activation_after(flow, norm, activations)
            if taker is not None:
                kept[id(norm)] = taker

    def with_activation(norm: nn.Module, activation: nn.Module) -> nn.Module:
        return layer.like(norm, **options)

    def alone(norm: nn.Module) -> nn.Module | None:
        return None if id(norm) in kept else layer.like(norm, **{**options, "nonlinear": False})

    report = swap(
        model,
        {(norms, activations): with_activation, **dict.fromkeys(norms, alone)},
        where=where,
        example_input=example_input,
    )
    skipped = {skip.name for skip in report.skipped}
    for name, module in model.named_modules():
        if name in skipped and id(module) in kept:
            warnings.warn(f"{name} is left alone: its output goes to {kept[id(module)]}", stacklevel=2)
    return report


def _activation_after(flow: DataFlow, norm: nn.Module, activations: tuple[type[nn.Module], ...]) -> str | None:
    """An activation that takes the output of `norm` and cannot be removed, in words; None where there is none."""
    for region in flow.regions:
        for seen in region.flows:
            if region.found_by == REGISTERED and id(norm) in seen.consumers:
                return "what could only be guessed; pass example_input"
            for consumer in seen.consumers.get(id(norm), []):
                if consumer.module is not None:
                    follower = flow.modules[consumer.module]
                    if type(follower) in activations:
                        name = flow.names[consumer.module]
                        return f"{name} ({type(follower).__name__}), which is not its alone"
                elif consumer.description in _FUNCTIONAL:
                    return f"the function {consumer.description}, which cannot be taken out of forward"
    return None
