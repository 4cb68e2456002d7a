"""In which type a computation is made, whatever type its inputs and autocast have."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["at_least_float32", "at_least_single", "autocast_dtype", "autocasts", "without_autocast"]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The type in which products of factors of this type are made: float32 for half precision, else the type itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def at_least_single(tensor: Tensor) -> Tensor:
    """The tensor, in float32 where it is of half precision."""
    return tensor.to(at_least_float32(tensor.dtype))


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; false on those that know no autocast (meta)."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast rounds to on a device, None where it is off: a fused operation rounds as autocast would."""
    return torch.get_autocast_dtype(device.type) if autocasts(device) else None


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Keeps matrix products in the type of their factors; costs nothing where autocast is off."""
    if autocasts(device):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
