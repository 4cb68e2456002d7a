"""Sobolev losses: errors of a field and of its derivatives, relative to the target's.

For operators between functions: an L2 loss leaves small scales unlearned, an H1 loss weights frequency k by |k|.
Used by He, Liu, Xu, "MgNO", 2023, arXiv 2310.19809 (spectral form), and throughout neural operators.

    ||w F(prediction - u)|| / ||w F u||,  w(k) = (1 + a^2 |k|^2)^(s/2)         spectral
    sqrt(sum d^2 + a^2 sum |grad d|^2), over the same of u                     differences, s = 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["SobolevLoss"]


class SobolevLoss(nn.Module):
    """Relative H^s error of a batch of fields.

    Args:
        order: s; 0 is the relative L2 error.
        weight: a, of the derivatives against the field itself.
        truncate: spectral form: a component k_j with |k_j| >= `truncate` counts as 0 in w (the authors' code: 20).
        reduction: "sum" over the batch (the paper's), "mean", or "none".
        form: "spectral", with integer frequencies k (k periods over the domain, no factor 2 pi), or "differences".
        boundary: differences: "zero" (forward differences of the field continued by 0: the discrete Dirichlet energy),
            "periodic" (central), or "one-sided" (central, third order at the ends).
        lengths: differences: the domain's length along each axis, or along all; the spacing is length / points.
        field_weight: differences: weight of sum d^2 against the gradients; the Helmholtz loss has 10.
        relative: divide by the target's norm; without, the error itself.

    Shape: two tensors `(batch, channels, *grid)` -> scalar, or `(batch,)` for "none". Norms run over channels and grid.

    Raises:
        ValueError: for an unknown option, an order that the form has not, unequal shapes, or, with
            boundary="one-sided", fewer than 4 points on an axis.
    """

    def __init__(
        self,
        order: float = 1,
        weight: float = 1.0,
        truncate: int | None = None,
        reduction: Literal["sum", "mean", "none"] = "sum",
        *,
        form: Literal["spectral", "differences"] = "spectral",
        boundary: Literal["zero", "periodic", "one-sided"] = "zero",
        lengths: float | Sequence[float] = 1.0,
        field_weight: float = 1.0,
        relative: bool = True,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("reduction", reduction, ("sum", "mean", "none")),
            ("form", form, ("spectral", "differences")),
            ("boundary", boundary, ("zero", "periodic", "one-sided")),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        if form == "differences" and order not in (0, 1):
            raise ValueError(f"order must be 0 or 1 with form='differences', got {order}")
        if form == "differences" and truncate is not None:
            raise ValueError(f"truncate is of the spectral form, got {truncate} with form='differences'")
        self.order, self.weight, self.truncate, self.reduction = order, weight, truncate, reduction
        self.form, self.boundary, self.lengths = form, boundary, lengths
        self.field_weight, self.relative = field_weight, relative

    def forward(
        self, prediction: Float[Tensor, "batch channels *grid"], target: Float[Tensor, "batch channels *grid"]
    ) -> Float[Tensor, "*result"]:
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction must have the target's shape {tuple(target.shape)}, got {tuple(prediction.shape)}"
            )
        norm = self._spectral_norm if self.form == "spectral" else self._difference_norm
        error = norm(prediction - target)
        if self.relative:
            error = error / norm(target).clamp_min(torch.finfo(target.dtype).tiny)
        if self.reduction == "none":
            return error
        return error.sum() if self.reduction == "sum" else error.mean()

    def _spectral_norm(self, x: Tensor) -> Tensor:
        grid, axes = x.shape[2:], tuple(range(2, x.ndim))
        if self.order == 0:
            return x.flatten(1).norm(dim=1)
        lines = [torch.fft.fftfreq(n, 1 / n, dtype=x.dtype, device=x.device) for n in grid[:-1]]
        lines.append(torch.arange(grid[-1] // 2 + 1, dtype=x.dtype, device=x.device))
        if self.truncate is not None:
            lines = [k * (k.abs() < self.truncate) for k in lines]
        square: Tensor = sum(k**2 for k in torch.meshgrid(*lines, indexing="ij"))  # type: ignore[assignment]
        energy = (1 + self.weight**2 * square) ** self.order
        # The half spectrum holds each pair k, -k once: all columns but 0 and Nyquist count twice.
        twice = torch.full((grid[-1] // 2 + 1,), 2.0, dtype=x.dtype, device=x.device)
        twice[0] = 1
        if grid[-1] % 2 == 0:
            twice[-1] = 1
        spectrum = torch.fft.rfftn(x, dim=axes, norm="ortho")
        root = (energy * twice).sqrt()
        return torch.view_as_real(spectrum * root).flatten(1).norm(dim=1)

    def _difference_norm(self, x: Tensor) -> Tensor:
        total = self.field_weight * x.square().flatten(1).sum(1)
        if self.order:
            d = x.ndim - 2
            lengths = [float(self.lengths)] * d if isinstance(self.lengths, (int, float)) else list(self.lengths)
            if len(lengths) != d:
                raise ValueError(f"lengths must name one length for each of {d} axes, got {self.lengths}")
            for axis, length in enumerate(lengths, start=2):
                steps = self._difference(x, axis) * (x.shape[axis] / length)
                total = total + self.weight**2 * steps.square().flatten(1).sum(1)
        # The root has no finite slope at an exact prediction.
        return total.clamp_min(math.sqrt(torch.finfo(x.dtype).tiny)).sqrt()

    def _difference(self, x: Tensor, axis: int) -> Tensor:
        """The derivative along an axis of unit spacing."""
        n = x.shape[axis]
        if self.boundary == "zero":
            edge = torch.zeros_like(x.narrow(axis, 0, 1))
            return torch.diff(x, dim=axis, prepend=edge, append=edge)
        if self.boundary == "periodic":
            return (x.roll(-1, axis) - x.roll(1, axis)) / 2
        if n < 4:
            raise ValueError(f"boundary='one-sided' needs at least 4 points on an axis, got {n}")
        inner = (x.narrow(axis, 2, n - 2) - x.narrow(axis, 0, n - 2)) / 2
        taps = x.new_tensor([-11.0, 18.0, -9.0, 2.0]).div_(6).view(-1, *(1,) * (x.ndim - axis - 1))
        first = (x.narrow(axis, 0, 4) * taps).sum(axis, keepdim=True)
        final = (x.narrow(axis, n - 4, 4) * -taps.flip(0)).sum(axis, keepdim=True)
        return torch.cat([first, inner, final], axis)
