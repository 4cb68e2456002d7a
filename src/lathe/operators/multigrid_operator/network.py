"""MgNO: a fully connected network whose neurons are functions and whose weights are multigrid cycles."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Inexact
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.operators.multigrid_operator.cycle import MultigridConv1d, MultigridConv2d, MultigridConv3d, channels_last

__all__ = ["MgNO", "rollout"]

_CYCLES = {1: MultigridConv1d, 2: MultigridConv2d, 3: MultigridConv3d}
_POINTWISE = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class MgNO(nn.Module):
    """A neural operator: v_l = sigma(W_l v_{l-1} + B_l v_{l-1} + b_l), u = A v_L, every W_l one multigrid cycle.

    The first cycle takes the raw input functions; there is no lifting and no projection network.

    Args:
        in_channels: input functions.
        out_channels: output functions.
        channels: functions in each hidden layer.
        depth: hidden layers L.
        levels: levels of each cycle; or give `steps=` among the options.
        activation: "gelu", "relu", "silu" or "tanh".
        skip: add the pointwise B_l v + b_l. The authors' Navier-Stokes and Helmholtz networks have none.
        head: "pointwise", the 1x1 convolution A without bias, or "multigrid", one more cycle (Helmholtz).
        residual_output: add the input to the output (time stepping).
        normalizer: `(mean, std)`, broadcast against the output: u = mean + std * A v_L. Lets the network learn
            standardised targets and return physical ones.
        norm_layers: normalise each layer over channels and points before its activation (wide Helmholtz network).
        ndim: 1, 2 or 3 grid axes.
        **options: of the cycles, see `MultigridConv2d`.

    Shape: `(batch, in_channels, *grid)` -> `(batch, out_channels, *grid)`, on any grid that holds the levels.

    Raises:
        ValueError: for an unknown name, no layer, or a residual between different numbers of channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int = 24,
        depth: int = 4,
        levels: int | None = 6,
        activation: str = "gelu",
        skip: bool = True,
        head: Literal["pointwise", "multigrid"] = "pointwise",
        residual_output: bool = False,
        normalizer: tuple[Tensor, Tensor] | None = None,
        *,
        norm_layers: bool = False,
        ndim: int = 2,
        **options: Any,
    ) -> None:
        super().__init__()
        if ndim not in _CYCLES:
            raise ValueError(f"ndim must be 1, 2 or 3, got {ndim}")
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {tuple(_ACTIVATIONS)}, got {activation!r}")
        if head not in ("pointwise", "multigrid"):
            raise ValueError(f"head must be 'pointwise' or 'multigrid', got {head!r}")
        if residual_output and in_channels != out_channels:
            raise ValueError(f"residual_output needs as many outputs as inputs, got {in_channels} and {out_channels}")
        levels = None if "steps" in options else levels
        cycle, pointwise = _CYCLES[ndim], _POINTWISE[ndim]
        widths = [in_channels] + [channels] * depth
        factory: dict[str, Any] = {"device": options.get("device"), "dtype": options.get("dtype")}
        self.activation, self.residual_output = activation, residual_output
        self.cycles = nn.ModuleList(cycle(a, b, levels, **options) for a, b in itertools.pairwise(widths))
        self.skips = nn.ModuleList(
            pointwise(a, b, 1, **factory) if skip else nn.Identity() for a, b in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(
            nn.GroupNorm(1, channels, **factory) if norm_layers else nn.Identity() for _ in self.cycles
        )
        self.head = (
            pointwise(channels, out_channels, 1, bias=False, **factory)
            if head == "pointwise"
            else cycle(channels, out_channels, levels, **options)
        )
        self.skip = skip
        mean, std = (torch.tensor(0.0), torch.tensor(1.0)) if normalizer is None else normalizer
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())
        self.normalized = normalizer is not None

    def forward(self, a: Inexact[Tensor, "batch in_channels *grid"]) -> Inexact[Tensor, "batch out_channels *grid"]:
        sigma = _ACTIVATIONS[self.activation]
        v = a
        for cycle, skip, norm in zip(self.cycles, self.skips, self.norms):
            v = channels_last(v)  # one copy at most, for the cycle and the skip
            w = cycle(v)
            v = sigma(norm(skip(v).add_(w) if self.skip else w))
        u = self.head(v)
        if self.normalized:
            u = self.mean + self.std * u
        return a + u if self.residual_output else u

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, skip={self.skip}, residual_output={self.residual_output}"


def rollout(
    model: Callable[[Tensor], Tensor], u0: Inexact[Tensor, "batch channels *grid"], steps: int
) -> Inexact[Tensor, "batch steps channels *grid"]:
    """The states after 1, ..., `steps` applications of a one-step model to `u0`; differentiable.

    Raises:
        ValueError: for fewer than 1 step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    states = []
    for _ in range(steps):
        u0 = model(u0)
        states.append(u0)
    return torch.stack(states, 1)
