"""Covariances of pairs of inputs, at the positions of their images: what one layer hands to the next.

A field holds a block of pairs: rows of inputs against columns of inputs (or, `paired`, each input against itself). For
images every dimension of space is in one of two states. With an *offset* d there are covariances of positions p and
p + d alone: convolutions keep the offset, so a network without pooling needs d = 0 only. *In full* (None) there are all
pairs of positions. Axes stand as `(p, p', q, q', rows, columns)` for two full dimensions, `(p, q, rows, columns)` for
two offsets: inputs come last, so that a shift in space moves whole runs of memory.

What depends on a single input (variances, norms) is computed once, written on a tape, and read back for every block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["Field", "Offsets", "Tape", "valid"]

Offsets: TypeAlias = tuple[int | None, ...]


def valid(size: int, offset: int) -> tuple[int, int]:
    """The positions p, from and up to, for which p and p + offset both lie within `size`."""
    low = max(0, -offset)
    return low, max(low, min(size, size - offset))  # none, where padding has made an image larger than the offset is


@dataclass
class Tape:
    """What layers noted of single inputs, in the order in which a walk through the network meets them."""

    entries: list[Any] = field(default_factory=list)
    place: int = 0
    recording: bool = True

    def note(self, compute: Callable[[], Any]) -> Any:
        """What `compute` gives, if this is the first walk; what it gave then, if not."""
        if self.recording:
            self.entries.append(compute())
        self.place += 1
        return self.entries[self.place - 1]


@dataclass
class Field:
    """Covariances `nngp` and tangent kernels `ntk` of a block of pairs.

    Attributes:
        sizes: of the image, one number a dimension of space; none for flat inputs.
        offsets: for each dimension the offset, or None for all pairs of positions.
        rows, columns: which inputs, among those on the tape.
        paired: the block is each of `rows` with itself; its last axis has length one.
        tape: notes on single inputs.
        mean: of the units, (*sizes, inputs), as far as it is not zero; only while the tape records.
        tangents: whether `ntk` is wanted; it is None, which stands for zero, before the first weights.
        means: whether `mean` is wanted.
    """

    nngp: Tensor
    ntk: Tensor | None
    sizes: tuple[int, ...]
    offsets: Offsets
    rows: slice
    columns: slice
    paired: bool
    tape: Tape
    mean: Tensor | None = None
    tangents: bool = True
    means: bool = False

    def left(self, t: Tensor) -> Tensor:
        """A tensor (..., *sizes, inputs) at the first member of each pair, broadcastable to the block."""
        index: list[Any] = [...]
        for size, offset in zip(self.sizes, self.offsets):
            index += [slice(None), None] if offset is None else [slice(*valid(size, offset))]
        return t[(*index, self.rows, None)]

    def right(self, t: Tensor) -> Tensor:
        """A tensor (..., *sizes, inputs) at the second member of each pair, broadcastable to the block."""
        index: list[Any] = [...]
        for size, offset in zip(self.sizes, self.offsets):
            if offset is None:
                index += [None, slice(None)]
            else:
                low, high = valid(size, offset)
                index.append(slice(low + offset, high + offset))
        return t[(*index, self.rows, None)] if self.paired else t[(*index, None, self.columns)]

    def axis(self, dimension: int) -> int:
        """Where the axis of a dimension of space is (the first of two, if it is full)."""
        return dimension + sum(offset is None for offset in self.offsets[:dimension])

    def variance(self) -> Tensor:
        """The variances of single inputs at single positions, (*sizes, inputs), of a paired field."""
        K = self.nngp.squeeze(-1)
        for dimension, offset in enumerate(self.offsets):
            if offset is None:  # the axes before have lost their twins already
                K = K.diagonal(dim1=dimension, dim2=dimension + 1).movedim(-1, dimension)
        return K

    @property
    def single(self) -> bool:
        """Whether the field is nothing but the variances of single inputs at single positions."""
        return self.paired and all(offset == 0 for offset in self.offsets)

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """The same linear change of the kernel and of the tangent kernel."""
        self.nngp = change(self.nngp)
        if self.ntk is not None:
            self.ntk = change(self.ntk)

    def fork(self) -> Field:
        """A field that goes another way; a layer never writes into what it was given."""
        return Field(**vars(self))

    def mean_over_positions(self, t: Tensor) -> Tensor:
        """(*sizes, inputs) -> (inputs)."""
        return t.flatten(0, -2).mean(0) if self.sizes else t


def filter_axis(t: Tensor, f: Field, dimension: int, size_out: int, window: tuple[int, int, int, int]) -> Tensor:
    """Sums over a window of one dimension of space, moving both positions of a pair together; zeros lie outside.

    `window` is kernel size, stride, padding and dilation.
    """
    kernel, stride, padding, dilation = window
    axis, offset, size = f.axis(dimension), f.offsets[dimension], f.sizes[dimension]
    full = offset is None
    low, high = (0, size) if full else valid(size, offset or 0)
    first, last = (0, size_out) if full else valid(size_out, (offset or 0) // stride)
    centre = next((tap for tap in range(kernel) if dilation * tap == padding), None)
    if stride == 1 and size_out == size and centre is not None:
        out = t.clone()
    else:
        shape = list(t.shape)
        shape[axis] = max(last - first, 0)
        if full:
            shape[axis + 1] = shape[axis]
        out, centre = t.new_zeros(shape), None
    for tap in range(kernel):
        if tap == centre:
            continue
        shift = dilation * tap - padding  # the tap reads position stride * q + shift
        start = max(first, -((shift - low) // stride))  # the least q with stride * q + shift >= low
        stop = min(last, (high - 1 - shift) // stride + 1)
        if stop <= start:
            continue
        begin = stride * start + shift - low
        source = slice(begin, begin + stride * (stop - start - 1) + 1, stride)
        target = slice(start - first, stop - first)
        before = (slice(None),) * axis
        if full:
            out[(*before, target, target)] += t[(*before, source, source)]
        else:
            out[(*before, target)] += t[(*before, source)]
    return out


def wrap_axis(t: Tensor, f: Field, dimension: int, padding: int) -> Tensor:
    """Continues a dimension of space periodically by `padding` positions on either side."""
    axes = (f.axis(dimension), f.axis(dimension) + 1) if f.offsets[dimension] is None else (f.axis(dimension),)
    index = torch.arange(-padding, f.sizes[dimension] + padding, device=t.device) % f.sizes[dimension]
    for axis in axes:
        t = t.index_select(axis, index)
    return t
