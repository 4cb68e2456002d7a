"""Spectral convolution and the Fourier neural operator: the plain, dense ones, for periodic or smooth problems.

The layer multiplies the low Fourier modes of a field by learned matrices, so it acts alike on any resolution.
Li et al., "Fourier Neural Operator for Parametric Partial Differential Equations", 2020, arXiv 2010.08895.

    y = F^-1 (R_k (F v)_k for the kept modes k, else 0) + b          equation 4
    v' = sigma(W v + y)                                              equation 2
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FNO", "SpectralConv"]

_POINTWISE = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class SpectralConv(nn.Module):
    """Convolution whose kernel is given by its low Fourier modes.

    The transform is divided by the number of points ("forward" normalisation), so a trained layer means the same
    operator on every resolution. On a grid with fewer frequencies than `n_modes` the common low ones are used.

    Weights are kept as real blocks, modes first: one real batched matrix product does all modes.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        n_modes: kept modes per axis, even: frequencies -m/2..m/2-1, on the last axis (of a real transform) 0..m/2.
        bias: adds a constant per output channel.

    Shape: `(batch, in_channels, *grid)` -> `(batch, out_channels, *grid)` or `(batch, out_channels, *output_shape)`.

    Raises:
        ValueError: for odd or non-positive modes, or an input of another number of axes or channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        n_modes: Sequence[int],
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not n_modes or any(m < 2 or m % 2 for m in n_modes):
            raise ValueError(f"n_modes must be even and positive on every axis, got {tuple(n_modes)}")
        if in_channels < 1 or out_channels < 1:
            raise ValueError(f"in_channels and out_channels must be positive, got {in_channels} and {out_channels}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.n_modes = tuple(n_modes)
        kept = (*self.n_modes[:-1], self.n_modes[-1] // 2 + 1)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        # The last axis holds [Re | Im] of the out_channels.
        self.weight = nn.Parameter(torch.empty(*kept, in_channels, 2 * out_channels, **factory))
        self.bias = nn.Parameter(torch.empty(out_channels, **factory)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Complex normal weights of variance 2 / (in_channels + out_channels), no bias."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.in_channels + self.out_channels))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def complex_weight(self) -> Complex[Tensor, "in_channels out_channels *modes"]:
        """R as complex numbers; rows of a full axis run from frequency -m/2 to m/2 - 1."""
        real, imag = self.weight.unflatten(-1, (2, self.out_channels)).unbind(-2)
        return torch.complex(real, imag).movedim((-2, -1), (0, 1))

    @torch.no_grad()
    def set_complex_weight(self, weight: Complex[Tensor, "in_channels out_channels *modes"]) -> None:
        """Copy R in, laid out as in `complex_weight`."""
        weight = weight.movedim((0, 1), (-2, -1))
        self.weight.copy_(torch.cat([weight.real, weight.imag], -1))

    def forward(
        self, x: Float[Tensor, "batch in_channels *grid"], output_shape: Sequence[int] | None = None
    ) -> Float[Tensor, "batch out_channels *new_grid"]:
        d = len(self.n_modes)
        if x.ndim != d + 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be (batch, {self.in_channels}, {d} grid axes), got shape {tuple(x.shape)}")
        grid = tuple(x.shape[2:])
        shape = grid if output_shape is None else tuple(output_shape)
        batch, axes = x.shape[0], tuple(range(2, d + 1))
        # Frequencies that the weights, the input and the output all have; on full axes from -lower to upper - 1.
        limits = [min(m, n, k) for m, n, k in zip(self.n_modes, grid, shape)]
        lower, upper = [n // 2 for n in limits[:-1]], [(n + 1) // 2 for n in limits[:-1]]
        last = limits[-1] // 2 + 1

        spectrum = torch.fft.rfft(x, norm="forward")[..., :last]
        if axes:
            spectrum = torch.fft.fftn(spectrum, dim=axes, norm="forward")
        for axis, below, above in zip(axes, lower, upper):
            n = spectrum.shape[axis]
            spectrum = torch.cat([spectrum.narrow(axis, n - below, below), spectrum.narrow(axis, 0, above)], axis)

        weight: Tensor = self.weight
        for axis, (m, below, above) in enumerate(zip(self.n_modes, lower, upper)):
            weight = weight.narrow(axis, m // 2 - below, below + above)
        weight = weight.narrow(d - 1, 0, last).flatten(0, d - 1)
        modes = tuple(spectrum.shape[2:])
        # (modes, [re, im] x batch, in) @ (modes, in, [re | im] x out)
        real = torch.view_as_real(spectrum).flatten(2, -2).permute(2, 3, 0, 1).reshape(-1, 2 * batch, self.in_channels)
        product = torch.bmm(real, weight).view(-1, 2, batch, 2, self.out_channels)
        parts = torch.stack([product[:, 0, :, 0] - product[:, 1, :, 1], product[:, 0, :, 1] + product[:, 1, :, 0]], -1)
        spectrum = torch.view_as_complex(parts.permute(1, 2, 0, 3).contiguous()).unflatten(2, modes)

        for axis, below, above in zip(axes, lower, upper):
            n = shape[axis - 2]
            gap = list(spectrum.shape)
            gap[axis] = n - below - above
            spectrum = torch.cat(
                [spectrum.narrow(axis, below, above), spectrum.new_zeros(gap), spectrum.narrow(axis, 0, below)], axis
            )
        if axes:
            spectrum = torch.fft.ifftn(spectrum, dim=axes, norm="forward")
        # A real field has real coefficients at frequency 0 and Nyquist of the last axis; not every FFT library
        # ignores an imaginary part there.
        real_only = [0, shape[-1] // 2] if shape[-1] % 2 == 0 and last == shape[-1] // 2 + 1 else [0]
        mask = torch.ones(last, 2, dtype=x.dtype, device=x.device)
        mask[real_only, 1] = 0
        spectrum = torch.view_as_complex(torch.view_as_real(spectrum) * mask)
        y = torch.fft.irfft(spectrum, n=shape[-1], norm="forward")
        return y if self.bias is None else y + self.bias.view(-1, *(1,) * d)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, n_modes={self.n_modes}, bias={self.bias is not None}"


class FNO(nn.Module):
    """Fourier neural operator: lift the input and its coordinates, `n_layers` of sigma(W v + K v), project.

    Args:
        n_modes: kept modes per axis, see `SpectralConv`; its length is the number of grid axes.
        in_channels: input functions.
        out_channels: output functions.
        hidden_channels: width.
        n_layers: Fourier layers; GELU after each but the last.
        projection_ratio: hidden width of the pointwise projection, over `hidden_channels`.
        coordinates: append the position in [0, 1) along each axis to the input.
        domain_padding: zeros appended to each axis before the layers and cut off after them, as a fraction of its
            length, for problems that are not periodic.

    Shape: `(batch, in_channels, *grid)` -> `(batch, out_channels, *grid)`, on any grid.
    """

    def __init__(
        self,
        n_modes: Sequence[int],
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        n_layers: int = 4,
        *,
        projection_ratio: float = 2.0,
        coordinates: bool = True,
        domain_padding: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, got {n_layers}")
        if domain_padding < 0:
            raise ValueError(f"domain_padding must not be negative, got {domain_padding}")
        d = len(n_modes)
        if d not in _POINTWISE:
            raise ValueError(f"n_modes must have 1, 2 or 3 axes, got {tuple(n_modes)}")
        pointwise = _POINTWISE[d]
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        projection = max(1, round(projection_ratio * hidden_channels))
        self.in_channels, self.coordinates, self.domain_padding = in_channels, coordinates, domain_padding
        self.lifting = pointwise(in_channels + d * coordinates, hidden_channels, 1, **factory)
        # The pointwise maps carry the bias of the sum.
        self.spectral = nn.ModuleList(
            SpectralConv(hidden_channels, hidden_channels, n_modes, bias=False, **factory) for _ in range(n_layers)
        )
        self.pointwise = nn.ModuleList(
            pointwise(hidden_channels, hidden_channels, 1, **factory) for _ in range(n_layers)
        )
        self.projection = nn.Sequential(
            pointwise(hidden_channels, projection, 1, **factory),
            nn.GELU(),
            pointwise(projection, out_channels, 1, **factory),
        )

    def forward(self, a: Float[Tensor, "batch in_channels *grid"]) -> Float[Tensor, "batch out_channels *grid"]:
        if a.shape[1] != self.in_channels:
            raise ValueError(f"a must have {self.in_channels} channels, got {a.shape[1]}")
        grid = tuple(a.shape[2:])
        if self.coordinates:
            lines = [torch.arange(n, dtype=a.dtype, device=a.device) / n for n in grid]
            position = torch.stack(torch.meshgrid(*lines, indexing="ij"))
            a = torch.cat([a, position.expand(a.shape[0], *position.shape)], 1)
        v = self.lifting(a)
        if self.domain_padding:
            v = F.pad(v, [side for n in reversed(grid) for side in (0, round(self.domain_padding * n))])
        for i, (spectral, pointwise) in enumerate(zip(self.spectral, self.pointwise)):
            v = pointwise(v) + spectral(v)
            v = F.gelu(v) if i < len(self.spectral) - 1 else v
        if self.domain_padding:
            v = v[(..., *(slice(n) for n in grid))]
        return self.projection(v)
