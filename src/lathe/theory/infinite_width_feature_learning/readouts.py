"""Readouts with a multiplier: the one place where muP changes a network's forward pass."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lathe.core.shapes import conv_arguments, linear_arguments

__all__ = ["MuConv1dReadout", "MuConv3dReadout", "MuConvReadout", "MuReadout", "fold_"]


class _Multiplied(nn.Module):
    """Mixed into a layer: its input is multiplied by a constant before the weight, the bias is not."""

    multiplier: float
    weight: Tensor
    bias: Any

    def __init__(self, *args: Any, width_mult: float = 1.0, output_mult: float = 1.0, **kwargs: Any) -> None:
        if not width_mult > 0:
            raise ValueError(f"width_mult must be positive, got {width_mult}")
        super().__init__(*args, **kwargs)
        self.multiplier = output_mult / width_mult
        with torch.no_grad():  # undoes the law 1/fan_in of the initialiser: sizes stay those of the base width
            self.weight.mul_(width_mult**0.5)
            if self.bias is not None:
                self.bias.mul_(width_mult**0.5)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, multiplier={self.multiplier:g}"

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.multiplier == 1 else x * self.multiplier


class MuReadout(_Multiplied, nn.Linear):
    """`nn.Linear` from a width to a fixed number of outputs: `output_mult / width_mult * weight x + bias`.

    Its initial weight and bias have the sizes that `nn.Linear` has at the base width. `parametrize` puts it in by
    itself; use it by hand in a model of your own.

    Takes the arguments of `nn.Linear`, then its own.

    Args:
        width_mult: `in_features` over `in_features` of the base model.
        output_mult: a constant to tune, the same at every width.

    Shape: `(*batch, in_features)` -> `(*batch, out_features)`.

    Raises:
        ValueError: for a `width_mult` that is not positive, or an input with another number of features.
    """

    @classmethod
    def like(cls, linear: nn.Linear, *, width_mult: float = 1.0, output_mult: float = 1.0) -> MuReadout:
        """A fresh layer that fits where `linear` stood: same shapes, device and dtype."""
        return cls(**linear_arguments(linear), width_mult=width_mult, output_mult=output_mult)

    def forward(self, input: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(f"input must be (*batch, {self.in_features}), got {tuple(input.shape)}")
        return super().forward(self._scaled(input))


class _MultipliedConv(_Multiplied, nn.modules.conv._ConvNd):
    def forward(self, input: Tensor) -> Tensor:
        dimensions = len(self.kernel_size)
        if not dimensions < input.ndim <= dimensions + 2 or input.shape[-1 - dimensions] != self.in_channels:
            raise ValueError(
                f"input must be (batch, {self.in_channels}, ...) with {dimensions} dimensions behind, "
                f"got {tuple(input.shape)}"
            )
        return super().forward(self._scaled(input))

    @classmethod
    def like(cls, conv: nn.Module, *, width_mult: float = 1.0, output_mult: float = 1.0) -> _MultipliedConv:
        """A fresh layer that fits where `conv` stood: same shapes, device and dtype."""
        return cls(**conv_arguments(conv), width_mult=width_mult, output_mult=output_mult)


class MuConvReadout(_MultipliedConv, nn.Conv2d):
    """`nn.Conv2d` from a growing number of channels to a fixed one, as `MuReadout`."""


class MuConv1dReadout(_MultipliedConv, nn.Conv1d):
    """`nn.Conv1d` from a growing number of channels to a fixed one, as `MuReadout`."""


class MuConv3dReadout(_MultipliedConv, nn.Conv3d):
    """`nn.Conv3d` from a growing number of channels to a fixed one, as `MuReadout`."""


#: The plain layer of each readout.
READOUTS: dict[type[nn.Module], type[_Multiplied]] = {
    nn.Linear: MuReadout,
    nn.Conv1d: MuConv1dReadout,
    nn.Conv2d: MuConvReadout,
    nn.Conv3d: MuConv3dReadout,
}


@torch.no_grad()
def fold_(model: nn.Module, *, untie: bool = False) -> nn.Module:
    """Multiplies the readouts' weights by their multipliers and makes plain layers of them again, for export.

    The model computes the same and is plain PyTorch from then on; it is no longer muP to train further.

    Args:
        model: changed in place, and returned.
        untie: give a readout whose weight is shared (with an embedding, say) a weight of its own.

    Raises:
        ValueError: where a readout's weight is shared and `untie` is false.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    readouts = {module: name for name, module in model.named_modules() if isinstance(module, _Multiplied)}
    shared = {module for module in readouts if module.multiplier != 1 and len(owners[id(module.weight)]) > 1}
    if shared and not untie:
        module = next(iter(shared))
        raise ValueError(
            f"the weight of readout {readouts[module]!r} is shared: {', '.join(owners[id(module.weight)])}; folding "
            f"its multiplier in would change them all. fold_(model, untie=True) gives it a weight of its own"
        )
    for module in readouts:
        if module in shared:
            module.weight = nn.Parameter(module.weight.clone(), requires_grad=module.weight.requires_grad)
        module.weight.mul_(module.multiplier)
        plain = next(plain for plain, scaled in READOUTS.items() if isinstance(module, scaled))
        module.__class__ = plain  # type: ignore[assignment]
        del module.multiplier
    return model
