"""Modules whose constants are exact: float64 tables that follow the module to any device and precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["TabledModule", "flattened"]

Self = TypeVar("Self", bound="TabledModule")


class TabledModule(nn.Module):
    """Holds constants that are no part of the state, and makes them anew from float64 wherever the module goes."""

    def __init__(self, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._exact: dict[str, NDArray[Any]] = {}
        self._made: dict[str, Any] = {"device": device, "dtype": dtype}

    def add_table(self, name: str, table: NDArray[Any]) -> None:
        """Registers a constant; integer tables keep their type."""
        self._exact[name] = table
        options = dict(self._made)
        if table.dtype.kind == "i":
            options["dtype"] = torch.int64
        self.register_buffer(name, torch.empty(table.shape, **options), persistent=False)
        self._fill(name)

    def _fill(self, name: str) -> None:
        buffer = getattr(self, name)
        if not buffer.is_meta:
            with torch.no_grad(), torch.device("cpu"):
                buffer.copy_(torch.from_numpy(np.ascontiguousarray(self._exact[name])))

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A table cast to half precision and back would stay rounded; one that comes from the meta device is empty.
        super()._apply(fn, recurse)
        for name in self._exact:
            self._fill(name)
        return self


def flattened(x: Tensor, y: Tensor, *others: Tensor) -> tuple[tuple[int, ...], list[Tensor]]:
    """Leading axes broadcast against each other and joined into one: their shape, and each tensor as a matrix.

    Raises:
        ValueError: where they do not broadcast.
    """
    tensors = (x, y, *others)
    leads = [tuple(tensor.shape[:-1]) for tensor in tensors]
    lead = leads[0]
    if any(each != lead for each in leads):
        try:
            lead = tuple(torch.broadcast_shapes(*leads))
        except RuntimeError:
            raise ValueError(
                f"the leading axes of the inputs must broadcast, got {', '.join(str(tuple(t.shape)) for t in tensors)}"
            ) from None
    return lead, [tensor.expand(*lead, tensor.shape[-1]).reshape(-1, tensor.shape[-1]) for tensor in tensors]
