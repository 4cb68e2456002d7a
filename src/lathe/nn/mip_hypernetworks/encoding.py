"""Inputs of a hypernetwork: their ranges, and encodings whose norm does not depend on them (section 4, E_L2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lathe.core.precision import at_least_float32

__all__ = ["Encoding", "InputSpec", "encode"]

Encoding = Literal["mip", "none", "complement"]
Scale = Literal["linear", "log", "sigmoid", "rank"]
# What a range may be missed by, in units of the range: rounding, not a mistake.
_TOLERANCE = 1e-6


def encode(
    gamma: Float[Tensor, "*batch d"], encoding: Encoding = "mip", *, frequencies: int = 1
) -> Float[Tensor, "*batch encoded"]:
    """Inputs in [0, 1] to what the first layer of a hypernetwork sees.

    Args:
        encoding: "mip": a quarter turn per entry, all cosines, then all sines; the norm is sqrt(d) for every gamma.
            "none": gamma as it is, the usual hypernetwork. "complement": (gamma, 1 - gamma), of varying norm.
        frequencies: with "mip", also 2, 4, ... quarter turns, up to this many in all, scaled to the same norm: for
            weights that change fast with gamma. The paper has one.

    Returns:
        d numbers with "none", 2 d with "complement", 2 d * frequencies with "mip".
    """
    if encoding == "none":
        return gamma
    if encoding == "complement":
        return torch.cat([gamma, 1.0 - gamma], -1)
    turns = gamma * (math.pi / 2)
    if frequencies > 1:
        turns = torch.cat([turns * 2**octave for octave in range(frequencies)], -1)
    encoded = torch.cat([turns.cos(), turns.sin()], -1)
    return encoded if frequencies == 1 else encoded / math.sqrt(frequencies)


@dataclass(frozen=True)
class InputSpec:
    """What one input of a hypernetwork may be.

    Args:
        size: how many numbers one value has, or its shape; of a categorical input, the number of categories.
        low, high: the range of every entry, mapped to [0, 1]. With "sigmoid", the values that are mapped to 1/4 and
            3/4: there is no bound.
        scale: "linear"; "log" for what is drawn log-uniformly; "sigmoid" for unbounded values; "rank" maps a value to
            the share of `quantiles` below it, see `ranked`.
        kind: "real", or "categorical": integers from 0, encoded as one-hot vectors, whose norm is constant already.
        quantiles: of the values to expect, ascending; for scale "rank" only.

    Raises:
        ValueError: where the range is empty, "log" meets a bound that is not positive, or quantiles do not ascend.
    """

    size: int | tuple[int, ...] = 1
    low: float = 0.0
    high: float = 1.0
    scale: Scale = "linear"
    kind: Literal["real", "categorical"] = "real"
    quantiles: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if any(side < 1 for side in self.shape):
            raise ValueError(f"size must be at least 1, got {self.size!r}")
        if self.scale not in ("linear", "log", "sigmoid", "rank"):
            raise ValueError(f"scale must be 'linear', 'log', 'sigmoid' or 'rank', got {self.scale!r}")
        if self.kind not in ("real", "categorical"):
            raise ValueError(f"kind must be 'real' or 'categorical', got {self.kind!r}")
        if self.kind == "categorical" and len(self.shape) != 1:
            raise ValueError(f"size of a categorical input must be a number of categories, got {self.size!r}")
        if not self.low < self.high:
            raise ValueError(f"low must be less than high, got {self.low} and {self.high}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low must be positive on a log scale, got {self.low}")
        if (self.scale == "rank") != bool(self.quantiles):
            raise ValueError(f"quantiles belong to scale 'rank', got {len(self.quantiles)} with scale {self.scale!r}")
        if self.quantiles and not (
            self.quantiles[0] < self.quantiles[-1] and all(a <= b for a, b in pairwise(self.quantiles))
        ):
            raise ValueError("quantiles must ascend from a smallest to a larger number, see InputSpec.ranked")

    @classmethod
    def ranked(
        cls, samples: Sequence[float] | Tensor, size: int | tuple[int, ...] = 1, *, quantiles: int = 33
    ) -> InputSpec:
        """For values of any range and distribution: each becomes its rank among `samples`, linear in between."""
        values = torch.as_tensor(samples, dtype=torch.float64).flatten()
        points = torch.quantile(values, torch.linspace(0, 1, quantiles, dtype=torch.float64))
        return cls(size, scale="rank", quantiles=tuple(points.tolist()))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one value; that of a categorical input is its one-hot vector's."""
        return (self.size,) if isinstance(self.size, int) else self.size

    @property
    def entries(self) -> int:
        return math.prod(self.shape)

    def rows(self, name: str, value: Tensor | float, *, clamp: bool = False) -> tuple[Tensor, bool]:
        """One value or a batch of them as rows in [0, 1]: `(batch, entries)`, and whether it was a batch.

        Raises:
            TypeError: for an integer tensor of a real input, a floating one of a categorical input.
            ValueError: for any other shape, or a value outside its range (unless `clamp`).
        """
        if self.kind == "categorical":
            return self._one_hot(name, value)
        given = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
        if not given.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor or a number, got {given.dtype}")
        if given.shape == self.shape or (given.ndim == 0 and self.entries == 1):
            batched = False
        elif given.shape[1:] == self.shape and given.ndim > 0:
            batched = True
        else:
            raise ValueError(
                f"{name} must be of shape {self.shape} or {('batch', *self.shape)}, got {tuple(given.shape)}"
            )
        rows = given.reshape(len(given) if batched else 1, self.entries)
        # Half precision would turn an angle by up to 0.2 degrees: range and encoding are at least float32.
        rows = rows.to(at_least_float32(rows.dtype))
        return self._unit(name, rows, clamp), batched

    def _unit(self, name: str, rows: Tensor, clamp: bool) -> Tensor:
        low, high = self.low, self.high
        if self.scale == "sigmoid":
            return torch.sigmoid((2.0 * (rows - low) / (high - low) - 1.0) * math.log(3.0))
        if self.scale == "rank":
            points = torch.tensor(self.quantiles, dtype=torch.float64, device=rows.device)
            above = torch.searchsorted(points, rows.detach().double().contiguous()).clamp(1, len(points) - 1)
            width = points[above] - points[above - 1]
            part = torch.where(width > 0, (rows - points[above - 1]) / width, 0.0)
            return ((above - 1 + part.clamp(0.0, 1.0)) / (len(points) - 1)).to(rows.dtype)
        if clamp:
            rows = rows.clamp(low, high)
        elif _readable(rows):
            slack = _TOLERANCE * (high - low)
            least, most = (float(each) for each in rows.detach().aminmax()) if rows.numel() else (low, high)
            # Written so that NaN is refused too.
            if not (least >= low - slack and most <= high + slack):
                raise ValueError(f"{name} must lie in {low:g} to {high:g}, got {_told(least, most)}")
        if self.scale == "log":
            return (rows.clamp(min=low) / low).log() / math.log(high / low)
        return rows if (low, high) == (0.0, 1.0) else (rows - low) / (high - low)

    def _one_hot(self, name: str, value: Int[Tensor, "*batch"] | float) -> tuple[Tensor, bool]:
        given = torch.as_tensor(value)
        if given.is_floating_point() or given.dtype == torch.bool:
            raise TypeError(
                f"{name} is categorical: it must be an integer from 0 to {self.entries - 1}, got {given.dtype}"
            )
        if given.ndim > 1:
            raise ValueError(f"{name} must be one category or (batch,) of them, got {tuple(given.shape)}")
        if _readable(given) and given.numel():
            least, most = (int(each) for each in given.aminmax())
            if least < 0 or most >= self.entries:
                raise ValueError(f"{name} must lie in 0 to {self.entries - 1}, got {_told(least, most)}")
        rows = functional.one_hot(given.reshape(-1).long(), self.entries).to(torch.get_default_dtype())
        return rows, given.ndim == 1


def specs(inputs: Mapping[str, InputSpec | int | tuple[int, ...]] | int) -> dict[str, InputSpec]:
    """The inputs of a hypernetwork by name, sorted, as the reference orders them; a number is the size of "gamma"."""
    named = {"gamma": inputs} if isinstance(inputs, int) else dict(inputs)
    if not named:
        raise ValueError("inputs must name at least one input, got none")
    for name, spec in named.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"inputs must be named like Python arguments, got {name!r}")
        if not isinstance(spec, (InputSpec, int, tuple)):
            raise TypeError(f"input {name!r} must be an InputSpec, a size or a shape, got {type(spec).__name__}")
    return {name: spec if isinstance(spec, InputSpec) else InputSpec(spec) for name, spec in sorted(named.items())}


def _readable(values: Tensor) -> bool:
    """Whether a range can be checked: not while a graph is recorded, inside vmap, or without data."""
    return not (
        torch.compiler.is_compiling() or values.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(values)
    )


def _told(least: float, most: float) -> str:
    return f"{least:g}" if least == most or least != least else f"{least:g} to {most:g}"
