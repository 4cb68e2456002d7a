"""What the axes of a tensor stand for: inputs, units (channels, features), or positions of a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

__all__ = ["INPUTS", "UNITS", "Layout", "axis_of", "grid_of", "regroup", "reordered", "units_of"]

#: Labels of pieces of axes; the dimensions of a grid are labelled 0, 1, 2.
INPUTS, UNITS = "inputs", "units"
Piece: TypeAlias = tuple[str | int, int]
#: One entry an axis: the labelled pieces that it was merged from, each with its size; none for an axis of size one.
Layout: TypeAlias = tuple[tuple[Piece, ...], ...]


def grid_of(layout: Layout) -> tuple[int, ...]:
    """The sizes of the grid of positions, () where there is none."""
    sizes: dict[int, int] = {}
    for axis in layout:
        for label, size in axis:
            if isinstance(label, int):
                sizes[label] = sizes.get(label, 1) * size
    return tuple(sizes[label] for label in sorted(sizes))


def units_of(layout: Layout) -> int:
    return math.prod(size for axis in layout for label, size in axis if label == UNITS)


def axis_of(layout: Layout, label: str | int) -> int | None:
    """The axis that is made of pieces of this label alone; None where it is merged with others, or split."""
    found = [number for number, axis in enumerate(layout) if any(piece[0] == label for piece in axis)]
    if len(found) == 1 and all(piece[0] == label for piece in layout[found[0]]):
        return found[0]
    return None


def regroup(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """The layout after a reshape to `shape`; None where it tears pieces apart in a way that has no name."""
    pieces = [piece for axis in layout for piece in axis]
    result = []
    for size in shape:
        axis: list[Piece] = []
        while size > 1:
            if not pieces:
                return None
            label, whole = pieces.pop(0)
            if size % whole == 0:
                axis.append((label, whole))
                size //= whole
            elif whole % size == 0:
                axis.append((label, size))
                pieces.insert(0, (label, whole // size))
                size = 1
            else:
                return None
        result.append(tuple(axis))
    return None if any(size > 1 for _, size in pieces) else tuple(result)


def reordered(value: Tensor, layout: Layout) -> Tensor:
    """A tensor as (inputs, positions, units)."""
    pieces = [piece for axis in layout for piece in axis]
    order: dict[str | int, int] = {INPUTS: -1, UNITS: 9}
    places = sorted(
        range(len(pieces)), key=lambda place: (order.get(pieces[place][0], _number(pieces[place][0])), place)
    )
    flat = value.reshape([size for _, size in pieces]).permute(places)
    inputs = math.prod(size for label, size in pieces if label == INPUTS)
    return flat.reshape(inputs, math.prod(grid_of(layout)), units_of(layout))


def _number(label: str | int) -> int:
    return label if isinstance(label, int) else 0
