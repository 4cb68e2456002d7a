"""How good are written hulls, triangulations and tours? Two sequences that mean the same count the same."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lathe.data.tours import IGNORED, convex_hull, delaunay

__all__ = ["DelaunayMetrics", "HullMetrics", "delaunay_metrics", "hull_metrics", "is_tour"]


@dataclass(frozen=True)
class HullMetrics:
    """How hulls came out.

    Args:
        accuracy: share of outputs that are the hull, wherever they start and whichever way they go.
        area: of the true hull's area covered, on average over the outputs that are simple polygons; NaN where none is.
        failed: share of outputs that are no simple polygon. The paper prints FAIL where it exceeds 1 %.
        exact, simple, covered: of each output; covered is NaN where it is no simple polygon.
    """

    accuracy: float
    area: float
    failed: float
    exact: Bool[Tensor, " B"]
    simple: Bool[Tensor, " B"]
    covered: Float[Tensor, " B"]


def hull_metrics(points: Float[Tensor, "B n 2"], sequences: Int64[Tensor, "B T"]) -> HullMetrics:
    """Compares outlines with the convex hulls of their points.

    Args:
        sequences: corners up to the stop token n or to -100; the first may be repeated at the end.

    Raises:
        ValueError: as `convex_hull`.

    Source: Vinyals et al. 2015, section 4.2.
    """
    xy = points.double()
    n = points.shape[1]
    corners, size = _outline(sequences, n)
    truth, true_size = _outline(convex_hull(points), n)
    exact = _same_cycle(corners, size, truth, true_size)
    simple = _simple(xy, corners, size)
    covered = (_area(xy, corners, size) / _area(xy, truth, true_size)).masked_fill(~simple, torch.nan)
    return HullMetrics(
        float(exact.double().mean()),
        float(covered[simple].mean()),
        1 - float(simple.double().mean()),
        exact,
        simple,
        covered,
    )


@dataclass(frozen=True)
class DelaunayMetrics:
    """How triangulations came out.

    Args:
        accuracy: share of outputs with all triangles right and none besides, in any order.
        coverage: share of a set's true triangles that its output has, on average.
        exact, covered: of each output.
    """

    accuracy: float
    coverage: float
    exact: Bool[Tensor, " B"]
    covered: Float[Tensor, " B"]


def delaunay_metrics(points: Float[Tensor, "B n 2"], sequences: Int64[Tensor, "B T"]) -> DelaunayMetrics:
    """Compares sets of triangles with the Delaunay triangulations of their points.

    Args:
        sequences: three indices a triangle up to the stop token n or to -100; what is left of a triangle at the end
            makes the output inexact.

    Raises:
        ValueError: as `delaunay`.

    Source: Vinyals et al. 2015, section 4.3.
    """
    n = points.shape[1]
    truth, _ = _triangles(delaunay(points), n)
    found, whole = _triangles(sequences, n)
    match = (truth[:, :, None] == found[:, None]) & (truth >= 0)[:, :, None]
    hit = match.any(2)
    true_count, extra = (truth >= 0).sum(1), ((found >= 0) & ~match.any(1)).any(1)
    covered = hit.sum(1).double() / true_count
    exact = (hit.sum(1) == true_count) & ~extra & whole
    return DelaunayMetrics(float(exact.double().mean()), float(covered.mean()), exact, covered)


def is_tour(sequences: Int64[Tensor, "B T"], n: int) -> Bool[Tensor, " B"]:
    """Which sequences visit each of n cities once; a stop token n at the end is allowed."""
    corners, size = _outline(sequences, n)
    visits = torch.zeros(len(sequences), n + 1, dtype=torch.long, device=sequences.device)
    visits.scatter_add_(1, corners.masked_fill(~_inside(corners, size), n), torch.ones_like(corners))
    return (size == n) & (visits[:, :n] == 1).all(1)


def _inside(corners: Tensor, size: Tensor) -> Tensor:
    return torch.arange(corners.shape[1], device=corners.device) < size[:, None]


def _outline(sequences: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Indices before the end (0 behind it), and how many; a repeated first one does not count."""
    running = ((sequences >= 0) & (sequences < n)).long().cumprod(1).bool()
    size = running.sum(1)
    corners = sequences.masked_fill(~running, 0)
    last = corners.gather(1, (size - 1).clamp_min(0)[:, None])[:, 0] if corners.shape[1] else size
    return corners, size - ((size > 1) & (last == corners[:, :1].flatten())).long()


def _same_cycle(a: Tensor, a_size: Tensor, b: Tensor, b_size: Tensor) -> Tensor:
    """Whether two cycles of distinct indices are one, turned and reversed as may be."""
    width = max(a.shape[1], b.shape[1])

    def turned(cycle: Tensor, size: Tensor, backwards: bool) -> Tensor:
        place = torch.arange(width, device=cycle.device)
        inside = place < size[:, None]
        padded = torch.nn.functional.pad(cycle, (0, width - cycle.shape[1])).masked_fill(
            ~inside, torch.iinfo(cycle.dtype).max
        )
        turn = padded.argmin(1, keepdim=True) + (-place if backwards else place)
        return padded.gather(1, turn % size[:, None].clamp_min(1)).masked_fill(~inside, IGNORED)

    target = turned(b, b_size, False)
    same = (turned(a, a_size, False) == target).all(1) | (turned(a, a_size, True) == target).all(1)
    return same & (a_size == b_size)


def _edges(xy: Tensor, corners: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Where each edge begins and ends; those behind the end go from the first corner to itself."""
    inside = _inside(corners, size)
    begin = corners.where(inside, corners[:, :1])
    end = torch.where(_inside(corners, size - 1), begin.roll(-1, 1), corners[:, :1])
    return tuple(xy.gather(1, index[..., None].expand(-1, -1, 2)) for index in (begin, end))  # type: ignore[return-value]


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _area(xy: Tensor, corners: Tensor, size: Tensor) -> Tensor:
    """Gauss's shoelace formula, without the sign."""
    begin, end = _edges(xy, corners, size)
    origin = begin[:, :1]
    return _cross(begin - origin, end - origin).sum(1).abs() / 2


def _simple(xy: Tensor, corners: Tensor, size: Tensor) -> Tensor:
    """At least three corners, and no two edges that touch but neighbours in their corner."""
    T = corners.shape[1]
    if T < 3:
        return torch.zeros_like(size, dtype=torch.bool)
    begin, end = _edges(xy, corners, size)
    inside, place = _inside(corners, size), torch.arange(T, device=xy.device)
    p, q, r, s = begin[:, :, None], end[:, :, None], begin[:, None], end[:, None]

    def side(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return _cross(b - a, c - a).sign()

    def between(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        """Whether c, on the line of a and b, lies in their box."""
        return ((torch.minimum(a, b) <= c) & (c <= torch.maximum(a, b))).all(-1)

    pqr, pqs, rsp, rsq = side(p, q, r), side(p, q, s), side(r, s, p), side(r, s, q)
    touch = (pqr * pqs < 0) & (rsp * rsq < 0)
    touch |= (pqr == 0) & between(p, q, r) | (pqs == 0) & between(p, q, s)
    touch |= (rsp == 0) & between(r, s, p) | (rsq == 0) & between(r, s, q)
    pair = inside[:, :, None] & inside[:, None] & (place[:, None] < place)
    # Neighbours share a corner: they touch elsewhere only where one runs back over the other.
    following = place == place[:, None] + 1
    around = (place[:, None] == 0) & (place == size[:, None, None] - 1)
    back = torch.where(around, pqr == 0, pqs == 0) & (((q - p) * (s - r)).sum(-1) <= 0)
    touch = torch.where(following | around, back, touch)
    return (size >= 3) & ~(touch & pair).flatten(1).any(1)


def _triangles(sequences: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """A number for each triangle whatever the order of its corners (-1 behind the end), and whether none is cut off."""
    running = ((sequences >= 0) & (sequences < n)).long().cumprod(1).bool()
    count = running.sum(1)
    width = sequences.shape[1] // 3 * 3
    whole = running[:, :width].unflatten(1, (-1, 3)).all(2)
    a, b, c = sequences[:, :width].unflatten(1, (-1, 3)).sort(2).values.unbind(2)
    return ((a * n + b) * n + c).masked_fill(~whole, -1), count % 3 == 0
