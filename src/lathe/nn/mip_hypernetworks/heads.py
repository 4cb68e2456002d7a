"""The last layer of a hypernetwork: from its hidden vector to every predicted tensor, dense or with fewer weights.

A dense head has hidden x |theta| weights, which is nearly all of a hypernetwork: 128 million for a primary of a
million. The other heads cut that down. All start with the variance 1 / m in the rows of a tensor of m entries (fan_out
a tensor, section 4), so that a small tensor does not depend on how large the others are. Each is called with hidden
vectors `(*batch, hidden)` and theta_0 flat, and returns all entries `(*batch, |theta|)`, tensor after tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["AdapterHead", "ChunkedHead", "DenseHead", "LowRankHead"]

Shapes = Mapping[str, tuple[int, ...]]


class DenseHead(nn.Module):
    """One matrix, `weight` (|theta|, hidden): a single product for all tensors."""

    def __init__(self, hidden: int, shapes: Shapes, **made: Any) -> None:
        super().__init__()
        self.rows = _rows(shapes)
        self.weight = nn.Parameter(torch.empty(_total(shapes), hidden, **made))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal, variance 1 / m."""
        self.weight.normal_(generator=generator)
        for start, stop in self.rows.values():
            self.weight[start:stop] /= math.sqrt(stop - start)

    @torch.no_grad()
    def scale_rows(self, name: str, factor: float) -> None:
        start, stop = self.rows[name]
        self.weight[start:stop] *= factor

    def forward(
        self, hidden: Float[Tensor, "*batch hidden"], start: Float[Tensor, " theta"] | None = None
    ) -> Float[Tensor, "*batch theta"]:
        if hidden.ndim == 1 and start is not None:
            return torch.addmv(start, self.weight, hidden)  # its gradients cost less than those of a one-row product
        return functional.linear(hidden, self.weight, start)


class LowRankHead(nn.Module):
    """A product of two matrices, `left` (|theta|, rank) and `right` (rank, hidden)."""

    def __init__(self, hidden: int, shapes: Shapes, rank: int, **made: Any) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"head_rank must be at least 1, got {rank}")
        self.rows = _rows(shapes)
        self.left = nn.Parameter(torch.empty(_total(shapes), rank, **made))
        self.right = nn.Parameter(torch.empty(rank, hidden, **made))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal, the product's variance 1 / m."""
        self.left.normal_(generator=generator)
        self.right.normal_(std=1.0 / math.sqrt(len(self.right)), generator=generator)
        for start, stop in self.rows.values():
            self.left[start:stop] /= math.sqrt(stop - start)

    @torch.no_grad()
    def scale_rows(self, name: str, factor: float) -> None:
        start, stop = self.rows[name]
        self.left[start:stop] *= factor

    def forward(
        self, hidden: Float[Tensor, "*batch hidden"], start: Float[Tensor, " theta"] | None = None
    ) -> Float[Tensor, "*batch theta"]:
        return functional.linear(functional.linear(hidden, self.right), self.left, start)


class ChunkedHead(nn.Module):
    """Tensors are cut into chunks of `size` entries, which share one matrix and differ by how they weigh its inputs.

    Chunk c is `weight @ (embedding[c] * hidden)`: size x hidden and (number of chunks) x hidden weights. A tensor
    starts a chunk of its own; what its last one has too much is dropped.
    """

    def __init__(self, hidden: int, shapes: Shapes, size: int, **made: Any) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"head_chunk must be at least 1, got {size}")
        entries = {name: math.prod(shape) for name, shape in shapes.items()}
        self.chunks = _bounds({name: -(-count // size) for name, count in entries.items()})
        self.entries = entries
        self.weight = nn.Parameter(torch.empty(size, hidden, **made))
        self.embedding = nn.Parameter(torch.empty(max(stop for _, stop in self.chunks.values()), hidden, **made))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Normal, the product's variance 1 / m."""
        self.weight.normal_(generator=generator)
        self.embedding.normal_(generator=generator)
        for name, (start, stop) in self.chunks.items():
            self.embedding[start:stop] /= math.sqrt(self.entries[name])

    @torch.no_grad()
    def scale_rows(self, name: str, factor: float) -> None:
        start, stop = self.chunks[name]
        self.embedding[start:stop] *= factor

    def forward(
        self, hidden: Float[Tensor, "*batch hidden"], start: Float[Tensor, " theta"] | None = None
    ) -> Float[Tensor, "*batch theta"]:
        padded = functional.linear(hidden.unsqueeze(-2) * self.embedding, self.weight)
        parts = padded.split([stop - start for start, stop in self.chunks.values()], -2)
        flat = torch.cat([part.flatten(-2)[..., :count] for part, count in zip(parts, self.entries.values())], -1)
        return flat if start is None else flat + start


class AdapterHead(nn.Module):
    """Predicts changes of low rank, as LoRA learns them: the change of an (m, n) weight is `up @ down`, of rank `rank`.

    The two factors of each matrix (kernels are flattened to one) come out of dense heads; tensors for which that is no
    saving are predicted whole. `up` starts at zero, and so does every change of a matrix: the start is theta_0.
    """

    def __init__(self, hidden: int, shapes: Shapes, rank: int, **made: Any) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"adapter_rank must be at least 1, got {rank}")
        self.rank, self.sizes = rank, {name: math.prod(shape) for name, shape in shapes.items()}
        self.factored: dict[str, tuple[int, int]] = {}
        outputs: dict[str, tuple[int, ...]] = {}
        for name, shape in shapes.items():
            rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
            if rank * (rows + columns) < rows * columns:
                self.factored[name] = (rows, columns)
                outputs |= {f"{name}.up": (rows, rank), f"{name}.down": (rank, columns)}
            else:
                outputs[name] = shape
        self.factors = DenseHead(hidden, outputs, **made)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """As `DenseHead`, with `up` zero."""
        self.factors.reset_parameters(generator)
        for name in self.factored:
            self.factors.scale_rows(f"{name}.up", 0.0)

    def scale_rows(self, name: str, factor: float) -> None:
        self.factors.scale_rows(f"{name}.up" if name in self.factored else name, factor)

    def forward(
        self, hidden: Float[Tensor, "*batch hidden"], start: Float[Tensor, " theta"] | None = None
    ) -> Float[Tensor, "*batch theta"]:
        lengths = [stop - start for start, stop in self.factors.rows.values()]
        found = dict(zip(self.factors.rows, self.factors(hidden).split(lengths, -1)))
        parts = []
        for name in self.sizes:
            if name in self.factored:
                rows, columns = self.factored[name]
                up = found[f"{name}.up"].unflatten(-1, (rows, self.rank))
                down = found[f"{name}.down"].unflatten(-1, (self.rank, columns))
                parts.append((up @ down).flatten(-2))
            else:
                parts.append(found[name])
        flat = torch.cat(parts, -1)
        return flat if start is None else flat + start


def make_head(
    hidden: int,
    shapes: Shapes,
    head_rank: int | None,
    head_chunk: int | None,
    adapter_rank: int | None,
    **made: Any,
) -> DenseHead | LowRankHead | ChunkedHead | AdapterHead:
    """The head that the one option given asks for."""
    options = {"head_rank": head_rank, "head_chunk": head_chunk, "adapter_rank": adapter_rank}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} exclude each other: give one of them")
    if head_rank is not None:
        return LowRankHead(hidden, shapes, head_rank, **made)
    if head_chunk is not None:
        return ChunkedHead(hidden, shapes, head_chunk, **made)
    if adapter_rank is not None:
        return AdapterHead(hidden, shapes, adapter_rank, **made)
    return DenseHead(hidden, shapes, **made)


def _total(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _rows(shapes: Shapes) -> dict[str, tuple[int, int]]:
    return _bounds({name: math.prod(shape) for name, shape in shapes.items()})


def _bounds(counts: dict[str, int]) -> dict[str, tuple[int, int]]:
    """First and last (exclusive) row of each name."""
    stops = list(accumulate(counts.values()))
    return {name: (stop - count, stop) for (name, count), stop in zip(counts.items(), stops)}
