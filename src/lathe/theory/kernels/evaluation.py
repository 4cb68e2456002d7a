"""A network's kernels for many inputs: block by block, so that a block stays in the cache and memory stays bounded.

A block goes through the whole network before the next one begins. Where a network pools, covariances of all pairs of
positions are wanted at the pool; what comes before it is still done for one offset of the first dimension of space at
a time, and the offsets are gathered there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lathe.core.gaussian import BlockMoments
from lathe.theory.kernels.fields import Field, Offsets, Tape
from lathe.theory.kernels.images import AvgPool, Conv, GlobalAvgPool
from lathe.theory.kernels.layers import Activation, Kernels, Layer, LayerNorm, Sequential, Sum

__all__ = ["evaluate", "evaluate_diagonal"]

#: Numbers in a block: a few such tensors fit a core's cache.
_BLOCK = 1 << 17
#: The same where a gradient is wanted, which keeps everything anyway.
_BLOCK_WITH_GRADIENT = 1 << 24


def evaluate(
    network: Layer,
    x1: Tensor,
    x2: Tensor | None,
    kernels: tuple[str, ...],
    block: int | None,
    dtype: torch.dtype,
) -> Kernels:
    """See `Layer.__call__`."""
    _check(x1, "x1", kernels)
    if x2 is not None:
        _check(x2, "x2", kernels)
        if x2.shape[1:] != x1.shape[1:]:
            raise ValueError(f"x2 must be (m, {', '.join(map(str, x1.shape[1:]))}) as x1 is, got {tuple(x2.shape)}")
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    plan = Plan.of(network, x1, "ntk" in kernels)
    symmetric = x2 is None
    n, m = len(x1), len(x1) if x2 is None else len(x2)
    x = _arranged(x1 if x2 is None else torch.cat([x1, x2]), dtype)
    shift = 0 if symmetric else n
    gradient = x.requires_grad and torch.is_grad_enabled()
    tape = plan.tape(x)
    pairs = block or max(1, (_BLOCK_WITH_GRADIENT if gradient else _BLOCK) // plan.numbers)
    wanted = [name in kernels for name in ("nngp", "ntk")]
    out = [x.new_empty(n, m) if each else None for each in wanted]
    for rows, tile in _tiles(n, m, pairs, symmetric):
        found = plan.run(x, tape, rows, slice(tile.start + shift, tile.stop + shift))
        for whole, part in zip(out, found):
            columns = tile
            if whole is None or part is None:
                continue
            if symmetric and rows.start == columns.start:  # across the diagonal, equal but for rounding
                size = rows.stop - rows.start
                corner = part[:, :size].triu()
                whole[rows, rows] = corner + corner.triu(1).mT
                columns, part = slice(rows.stop, columns.stop), part[:, size:]
            whole[rows, columns] = part
            if symmetric:
                whole[columns, rows] = part.mT
    return Kernels(*out)


def evaluate_diagonal(network: Layer, x: Tensor, kernels: tuple[str, ...], dtype: torch.dtype) -> Kernels:
    """See `Layer.diagonal`."""
    _check(x, "x", kernels)
    plan = Plan.of(network, x, "ntk" in kernels)
    arranged = _arranged(x, dtype)
    tape = plan.tape(arranged)
    parts = [plan.run(arranged, tape, rows, None) for rows in plan.chunks(len(x), plan.after != ())]
    nngp, ntk = (
        torch.cat([part[k].squeeze(-1) for part in parts]) if name in kernels else None  # type: ignore[union-attr]
        for k, name in enumerate(("nngp", "ntk"))
    )
    return Kernels(nngp, ntk)


def _check(x: Tensor, name: str, kernels: tuple[str, ...]) -> None:
    if not 2 <= x.ndim <= 4:
        raise ValueError(
            f"{name} must be (n, features), (n, channels, length) or (n, channels, height, width), got {tuple(x.shape)}"
        )
    if not x.numel():
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} must be finite, got infinite or NaN entries")
    unknown = [kernel for kernel in kernels if kernel not in ("nngp", "ntk")]
    if unknown or not kernels or isinstance(kernels, str):
        raise ValueError(f"kernels must be a tuple of 'nngp' and 'ntk', got {kernels!r}")


def _arranged(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(channels, *sizes, n): space in front of the inputs, as in fields."""
    return x.to(dtype).movedim(0, -1).contiguous()


def _tiles(n: int, m: int, pairs: int, symmetric: bool) -> Iterator[tuple[slice, slice]]:
    """Blocks of about `pairs` pairs, wide rather than high; above the diagonal only, if `symmetric`."""
    width = min(m, max(1, round(math.sqrt(8 * pairs))))
    height = max(1, pairs // width)
    for i in range(0, n, height):
        for j in range(i if symmetric else 0, m, width):
            yield slice(i, min(i + height, n)), slice(j, min(j + width, m))


@dataclass(frozen=True)
class Plan:
    """How a network is gone through for inputs of a given shape.

    Attributes:
        before: layers that come before the first pooling, in offsets.
        after: the layer that pools, and what follows.
        sizes: of the image at the start; `pooled` where the two meet.
        stride: from positions there to positions at the start, in the first dimension.
        offsets: of the first dimension at the pool, each worked through on its own; (None,) for all at once.
        tangents, means: what the fields are to carry.
    """

    before: tuple[Layer, ...]
    after: tuple[Layer, ...]
    sizes: tuple[int, ...]
    pooled: tuple[int, ...]
    stride: int
    offsets: Offsets
    tangents: bool
    means: bool

    @classmethod
    def of(cls, network: Layer, x: Tensor, tangents: bool) -> Plan:
        layers = network.layers if isinstance(network, Sequential) else (network,)
        sizes = tuple(x.shape[2:])
        network.gaussian(False)
        left = network.sizes(sizes)
        if left:
            raise ValueError(f"the network ends with images of size {left}; end it with Flatten() or GlobalAvgPool()")
        pools = [any(isinstance(part, (AvgPool, GlobalAvgPool)) for part in layer.walk()) for layer in layers]
        first = pools.index(True) if True in pools else len(layers)
        before, after = layers[:first], layers[first:]
        pooled = Sequential(*before).sizes(sizes)
        convolutions = [part for layer in before for part in layer.walk() if isinstance(part, Conv)]
        offsets: Offsets = (0,)
        if after:
            apart = len(sizes) > 1 and all(conv.padding_mode == "zeros" for conv in convolutions)
            offsets = tuple(range(1 - pooled[0], pooled[0])) if apart else (None,)
        return cls(
            before=before,
            after=after,
            sizes=sizes,
            pooled=pooled,
            stride=_stride(before),
            offsets=offsets,
            tangents=tangents,
            means=any(isinstance(part, LayerNorm) for part in network.walk()),
        )

    @property
    def numbers(self) -> int:
        """Numbers that a pair of inputs has in a field at most, at the start."""
        if not self.after:
            return max(1, math.prod(self.sizes))
        if self.offsets == (None,):
            return math.prod(self.sizes) ** 2
        return math.prod(self.sizes[1:]) ** 2 * self.sizes[0]

    def chunks(self, n: int, full: bool) -> Iterator[slice]:
        """Inputs that go through on their own at a time, with all pairs of positions or without."""
        numbers = max(math.prod(self.pooled) ** 2, self.numbers) if full else math.prod(self.sizes)
        size = max(1, (1 << 22) // max(1, numbers))
        for start in range(0, n, size):
            yield slice(start, min(start + size, n))

    def tape(self, x: Tensor) -> Tape:
        """Notes on all inputs, a few inputs at a time."""
        n = x.shape[-1]
        tapes = []
        later = _notes(self.after)
        for rows in self.chunks(n, later):
            tape = Tape()
            part = x[..., rows]
            whole = slice(0, part.shape[-1])
            f = self._start(part, tape, whole, None, (0,) * len(self.sizes), means=self.means)
            f = Sequential(*self.before).propagate(f)
            if later:
                # Layers after the pool note variances too, which takes all pairs of positions of each input.
                tape.recording = False
                mean, f = f.mean, self._gather(part, tape, whole, None)
                tape.recording, f.mean, f.means = True, mean, self.means
                Sequential(*self.after).propagate(f)
            tape.recording = False
            tapes.append(tape.entries)
        if len(tapes) == 1:
            return Tape(tapes[0], recording=False)
        return Tape([_joined(entries) for entries in zip(*tapes)], recording=False)

    def run(self, x: Tensor, tape: Tape, rows: slice, columns: slice | None) -> tuple[Tensor, Tensor | None]:
        """Kernels of the pairs of a block; without `columns`, of each row with itself."""
        if self.after:
            f = self._gather(x, tape, rows, columns)
            f = Sequential(*self.after).propagate(f)
        else:
            tape.place = 0
            f = self._start(x, tape, rows, columns, (0,) * len(self.sizes))
            f = Sequential(*self.before).propagate(f)
        return f.nngp, torch.zeros_like(f.nngp) if self.tangents and f.ntk is None else f.ntk

    def _start(
        self, x: Tensor, tape: Tape, rows: slice, columns: slice | None, offsets: Offsets, means: bool = False
    ) -> Field:
        f = Field(
            nngp=x,
            ntk=None,
            sizes=self.sizes,
            offsets=offsets,
            rows=rows,
            columns=rows if columns is None else columns,
            paired=columns is None,
            tape=tape,
            mean=x.mean(0) if means else None,
            tangents=self.tangents,
            means=means,
        )
        channels = len(x)
        if not self.sizes and columns is not None:
            f.nngp = x[:, rows].mT @ x[:, columns] / channels
        else:
            left, right = f.left(x), f.right(x)
            total = left[0] * right[0]
            for channel in range(1, channels):
                total = torch.addcmul(total, left[channel], right[channel])
            f.nngp = total / channels
        return f

    def _gather(self, x: Tensor, tape: Tape, rows: slice, columns: slice | None) -> Field:
        """The field at the pool, in full, or already pooled over all positions."""
        whole = isinstance(self.after[0], GlobalAvgPool)
        totals: list[Tensor | None] = [None, None]
        rest: Offsets = (None,) * (len(self.sizes) - 1)
        for offset in self.offsets:
            tape.place = 0
            start = None if offset is None else offset * self.stride
            f = Sequential(*self.before).propagate(self._start(x, tape, rows, columns, (start, *rest)))
            if offset is None:
                return f
            for k, part in enumerate((f.nngp, f.ntk)):
                if part is None:
                    continue
                total = totals[k]
                if whole:
                    part = part.flatten(0, -3).sum(0)
                    totals[k] = part if total is None else total + part
                    continue
                if total is None:
                    total = totals[k] = part.new_empty(self.pooled[0], self.pooled[0], *part.shape[1:])
                total.diagonal(offset, 0, 1).copy_(part.movedim(0, -1))
        if whole:
            # One position that holds the sum: the mean that GlobalAvgPool takes over it is then over one.
            count = math.prod(self.pooled) ** 2
            totals = [None if total is None else total[None, None] / count for total in totals]
            f.sizes = (1,)
            f.offsets = (None,)
        else:
            f.sizes, f.offsets = self.pooled, (None, *rest)
        assert totals[0] is not None
        f.nngp, f.ntk = totals[0], totals[1]
        return f


def _stride(layers: tuple[Layer, ...]) -> int:
    """Positions at the start that one position after the layers is apart, in the first dimension."""
    total = 1
    for layer in layers:
        if isinstance(layer, Sum):
            total *= _stride((layer.branches[0],))
        elif isinstance(layer, Sequential):
            total *= _stride(layer.layers)
        elif isinstance(layer, Conv):
            total *= layer.stride if isinstance(layer.stride, int) else layer.stride[0]
    return total


def _notes(layers: tuple[Layer, ...]) -> bool:
    return any(isinstance(part, (Activation, LayerNorm)) for layer in layers for part in layer.walk())


def _joined(entries: tuple) -> object:
    """What was noted of all inputs, from what was noted of a few at a time."""
    first = entries[0]
    if isinstance(first, BlockMoments):
        return BlockMoments(first.act, torch.cat([entry.variance for entry in entries], -1))
    return tuple(None if part[0] is None else torch.cat(part, -1) for part in zip(*entries))
