"""The parts of the paper's tasks: registration with any strength of regularisation, and features at any resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lathe.core.precision import at_least_float32
from lathe.nn.mip_hypernetworks.driven import HyperDriven, hypernetize
from lathe.nn.mip_hypernetworks.selection import Select

__all__ = [
    "HyperMorph2d",
    "Registration",
    "RegistrationUNet",
    "ScaleSpaceResize",
    "integrate",
    "registration_loss",
    "smoothness",
    "warp",
]

_STANDSTILL = 1e-5  # deviation of the last layer of a registration network at the start


def warp(
    image: Float[Tensor, "batch channels height width"],
    flow: Float[Tensor, "batch 2 height width"],
    *,
    padding_mode: str = "border",
) -> Float[Tensor, "batch channels height width"]:
    """The image read at displaced places: `out[y, x] = image[y + flow[0], x + flow[1]]`, bilinear in between.

    The flow is in pixels, rows first. What lies outside is as `padding_mode` of `grid_sample` says, with
    `align_corners=False`: "border", "zeros" or "reflection" (about the outer edges of the outermost pixels).

    Raises:
        ValueError: where the flow is not of the image's size.
    """
    if flow.ndim != 4 or flow.shape[1] != 2 or image.ndim != 4 or flow.shape[2:] != image.shape[2:]:
        raise ValueError(
            f"flow must be (batch, 2, height, width) for an image (batch, channels, height, width), "
            f"got {tuple(flow.shape)} for {tuple(image.shape)}"
        )
    height, width = flow.shape[2:]
    made: dict[str, Any] = {"device": flow.device, "dtype": flow.dtype}
    y = torch.arange(height, **made)[:, None] + flow[:, 0]
    x = torch.arange(width, **made) + flow[:, 1]
    # With align_corners=True an image of one row could not be shifted.
    grid = torch.stack([(2.0 * x + 1.0) / width - 1.0, (2.0 * y + 1.0) / height - 1.0], -1)
    return functional.grid_sample(image, grid, mode="bilinear", padding_mode=padding_mode, align_corners=False)


def smoothness(flow: Float[Tensor, "batch axes height width"]) -> Float[Tensor, " batch"]:
    """Mean square of a flow's forward differences along rows and columns: small for smooth flows, zero for shifts.

    Raises:
        ValueError: for a flow without neighbours.
    """
    if flow.ndim != 4 or min(flow.shape[2:]) < 2:
        raise ValueError(f"flow must be (batch, axes, height, width) of at least 2 x 2 pixels, got {tuple(flow.shape)}")
    down, right = flow.diff(dim=2).square(), flow.diff(dim=3).square()
    return (down.mean((1, 2, 3)) + right.mean((1, 2, 3))) / 2


def integrate(velocity: Float[Tensor, "batch 2 height width"], steps: int = 5) -> Float[Tensor, "batch 2 height width"]:
    """The flow after unit time along a stationary velocity, by `steps` squarings: no folds where that is smooth."""
    flow = velocity / 2**steps
    for _ in range(steps):
        flow = flow + warp(flow, flow)
    return flow


class Registration(NamedTuple):
    """A moving image brought onto a fixed one, and the flow that does it, in pixels."""

    moved: Float[Tensor, "batch channels height width"]
    flow: Float[Tensor, "batch 2 height width"]


class RegistrationUNet(nn.Module):
    """Moving and fixed image in, a velocity out, `(batch, 2, height, width)`; starts next to standing still.

    Kaiming normal for its LeakyReLUs, biases zero, and the last layer normal with a deviation of 1e-5.

    Args:
        channels: of each image.
        widths: channels of the levels, each half as fine as the one before.
    """

    def __init__(self, channels: int = 1, widths: Sequence[int] = (16, 32, 32)) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"widths must name two levels at least, got {tuple(widths)}")
        inputs = [2 * channels, *widths]
        self.down = nn.ModuleList([nn.Conv2d(a, b, 3, padding=1) for a, b in zip(inputs, widths)])
        self.up = nn.ModuleList([nn.Conv2d(b + a, a, 3, padding=1) for a, b in pairwise(widths)])
        self.flow = nn.Conv2d(widths[0], 2, 3, padding=1)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name == "flow.weight":
                nn.init.normal_(parameter, std=_STANDSTILL)
            else:
                nn.init.kaiming_normal_(parameter, a=0.2)

    def forward(
        self, moving: Float[Tensor, "batch channels height width"], fixed: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch 2 height width"]:
        x, skips = torch.cat([moving, fixed], 1), []
        for level, conv in enumerate(self.down):
            if level > 0:
                skips.append(x)
                x = functional.max_pool2d(x, 2, ceil_mode=True)
            x = functional.leaky_relu(conv(x), 0.2)
        for conv, skip in zip(reversed(self.up), reversed(skips)):
            x = functional.interpolate(x, size=skip.shape[2:], mode="nearest")
            x = functional.leaky_relu(conv(torch.cat([x, skip], 1)), 0.2)
        return self.flow(x)


class HyperMorph2d(nn.Module):
    """Registration whose strength of regularisation, gamma in [0, 1], is chosen after training (HyperMorph).

    Train with `registration_loss(model(moving, fixed, gamma=gamma), fixed, gamma)` and gamma uniform in [0, 1].

    Args:
        network: takes moving and fixed image, gives a velocity; a `RegistrationUNet` where none is given.
        flow: glob of the tensors of its last layer, whose predicted changes (and theta_0, where it is drawn anew by
            `pretrained=False`) start as near zero as a `RegistrationUNet` has that layer itself: else training starts
            from a random warp. None leaves them as they are.
        integration_steps: see `integrate`; 0 takes the network's output for the flow itself.
        select, hyper: as in `hypernetize`.

    Raises:
        ValueError: where `flow` matches no predicted tensor, and as `hypernetize`.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        *,
        flow: str | None = "flow.*",
        integration_steps: int = 5,
        select: Select = None,
        **hyper: Any,
    ) -> None:
        super().__init__()
        self.driven: HyperDriven = hypernetize(RegistrationUNet() if network is None else network, select, **hyper)
        self.integration_steps = integration_steps
        shapes = self.driven.hyper.shapes
        last = [name for name in shapes if flow is not None and fnmatchcase(name, flow)]
        if flow is not None and not last:
            raise ValueError(f"flow must match predicted tensors ({', '.join(shapes)}), got {flow!r}")
        for name in last:
            # A head's rows start with a deviation of 1 / sqrt(entries); these with that of the network's own layer.
            factor = _STANDSTILL * math.sqrt(math.prod(shapes[name]))
            self.driven.hyper.scale(name, factor, theta0=not hyper.get("pretrained", True))

    def forward(
        self,
        moving: Float[Tensor, "batch channels height width"],
        fixed: Float[Tensor, "batch channels height width"],
        gamma: Float[Tensor, "..."] | float,
    ) -> Registration:
        velocity = self.driven(moving, fixed, gamma=gamma)
        flow = integrate(velocity, self.integration_steps) if self.integration_steps else velocity
        return Registration(warp(moving, flow), flow)


def registration_loss(
    registration: Registration, fixed: Float[Tensor, "batch channels height width"], gamma: Tensor | float
) -> Float[Tensor, ""]:
    """(1 - gamma) times the mean square difference of the images, plus gamma times the flow's `smoothness`.

    Args:
        gamma: one for the batch, or `(batch, 1)`.
    """
    strength = torch.as_tensor(gamma, dtype=fixed.dtype, device=fixed.device).flatten()
    mismatch = (registration.moved - fixed).square().mean((1, 2, 3))
    return ((1.0 - strength) * mismatch + strength * smoothness(registration.flow)).mean()


class ScaleSpaceResize(nn.Module):
    """Brings feature maps to `factor` times their size: the place of pooling in a network for any resolution.

    A driven network that is told the factor as its gamma too learns weights that go with it.

    Args:
        mode: of `torch.nn.functional.interpolate`, "bilinear" or "nearest".

    Shape: `(batch, channels, height, width)` -> sizes times the factor, rounded, at least 1.
    """

    def __init__(self, mode: str = "bilinear") -> None:
        super().__init__()
        self.mode = mode

    def forward(
        self, x: Float[Tensor, "batch channels height width"], factor: float
    ) -> Float[Tensor, "batch channels new_height new_width"]:
        """Antialiased where it makes smaller.

        Raises:
            ValueError: for a factor that is not positive, or another number of dimensions.
        """
        if x.ndim != 4:
            raise ValueError(f"x must be (batch, channels, height, width), got {tuple(x.shape)}")
        if not factor > 0 or math.isinf(factor):
            raise ValueError(f"factor must be positive, got {factor}")
        size = [max(1, round(side * factor)) for side in x.shape[2:]]
        smooth = self.mode in ("bilinear", "bicubic")
        y = functional.interpolate(
            # torch has no antialiasing in half precision on every device
            x.to(at_least_float32(x.dtype)) if smooth else x,
            size=size,
            mode=self.mode,
            antialias=smooth,
            align_corners=False if smooth else None,
        )
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        """The mode."""
        return f"mode={self.mode!r}"
