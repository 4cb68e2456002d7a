"""Convex hulls of many point sets at once, and Delaunay triangulations, in the canonical orders that networks learn."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.spatial import Delaunay, QhullError
from torch import Tensor

__all__ = ["IGNORED", "convex_hull", "delaunay", "float64_points"]

# What follows the stop token; `ignore_index` of torch's losses.
IGNORED = -100

# A triangle counts as flat below this share of the squared extent of its points.
_FLAT = 1e-12

# Sets of points that are worked on together, so that what they need stays in the cache.
_TOGETHER = 2048


def convex_hull(points: Float[Tensor, "batch n 2"], close: bool = False) -> Int64[Tensor, "batch length"]:
    """The corners of each set's convex hull, counter-clockwise from the one with the lowest index.

    Andrew's monotone chain on all sets in step, in float64: 2n vector operations a chain, whatever the batch. Points in
    the middle of an edge are no corners; of several equal points one is.

    Args:
        points: y points up (with image coordinates the order is clockwise to the eye).
        close: repeat the first corner before the stop token, as the paper's figure 1 does.

    Returns:
        Corners, the stop token n, then `IGNORED`; length is n + 1, or n + 2 where closed.

    Raises:
        ValueError: for fewer than three points, points that are not finite, or a set that lies on a line.

    Source: Vinyals et al. 2015, section 3.1.
    """
    xy = float64_points(points, least=3)
    targets = np.full((len(xy), xy.shape[1] + 1 + close), IGNORED, dtype=np.int64)
    for start in range(0, len(xy), _TOGETHER):
        _fill_hulls(targets[start : start + _TOGETHER], xy[start : start + _TOGETHER], start, close)
    return torch.from_numpy(targets).to(points.device)


def _fill_hulls(targets: np.ndarray, xy: np.ndarray, first: int, close: bool) -> None:
    count, n, _ = xy.shape
    z = np.ascontiguousarray(xy).view(np.complex128)[..., 0]  # one number a point: one look-up, one product
    by_place = np.argsort(z.real, axis=1)
    placed = np.take_along_axis(z, by_place, 1)
    tied = np.flatnonzero((placed.real[:, 1:] == placed.real[:, :-1]).any(1))
    if len(tied):  # where x is the same, y decides; to sort by both is slow
        by_place[tied] = np.lexsort((z[tied].imag, z[tied].real))
        placed[tied] = np.take_along_axis(z[tied], by_place[tied], 1)
    chains, sizes = _chain(np.concatenate([placed, placed[:, ::-1]]))
    lower, upper, lower_size, upper_size = chains[:count], chains[count:], sizes[:count], sizes[count:]
    # Each chain ends where the other begins.
    size = lower_size + upper_size - 2
    column = np.arange(int(size.max()))
    kept = np.concatenate([np.arange(n) < lower_size[:, None] - 1, np.arange(n) < upper_size[:, None] - 1], 1)
    row = n * np.arange(count)[:, None]
    both = by_place.take(row + np.concatenate([lower, n - 1 - upper], 1), mode="clip")
    inside = column < size[:, None]
    corners = np.full(inside.shape, n)
    corners[inside] = both[kept]
    turned = corners.argmin(1)[:, None] + column
    turned -= np.where(turned >= size[:, None], size[:, None], 0)
    corners = np.take_along_axis(corners, turned, 1)
    corners = np.where(inside, corners, corners[:, :1])

    outline = z.take(row + corners) - z.take(row + corners[:, :1])
    doubled_area = (outline.conj() * np.roll(outline, -1, 1)).imag.sum(1)
    extent = np.abs(outline).max(1)
    flat = np.flatnonzero(doubled_area <= _FLAT * extent**2)
    if len(flat):
        raise ValueError(f"points[{first + flat[0]}] lie on a line: a convex hull needs three points that do not")

    targets[:, : len(column)] = np.where(inside, corners, IGNORED)
    if close:
        np.put_along_axis(targets, size[:, None], corners[:, :1], 1)
    np.put_along_axis(targets, size[:, None] + close, n, 1)


def _chain(placed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lower chain of points sorted from left to right: their places, and how many they are.

    Every step pops a point of each set's stack or pushes one onto it; each set is at a point of its own.
    """
    count, n = placed.shape
    z = placed.ravel()
    row = n * np.arange(count)
    stack, size, at = np.zeros(count * n, dtype=np.int64), np.zeros(count, dtype=np.int64), row.copy()
    end = row + n
    for _ in range(2 * n):
        top = row + size
        before = z.take(stack.take(top - 2, mode="wrap"), mode="clip")
        turn = ((z.take(stack.take(top - 1, mode="wrap")) - before).conj() * (z.take(at, mode="clip") - before)).imag
        waiting = at < end
        pop = (size >= 2) & (turn <= 0) & waiting
        push = waiting & ~pop
        if not waiting.any():
            break
        stack[top[push]] = at[push]
        size += push
        size -= pop
        at += push
    return stack.reshape(count, n) - row[:, None], size


def delaunay(points: Float[Tensor, "batch n 2"]) -> Int64[Tensor, "batch length"]:
    """Each set's Delaunay triangulation as one sequence: three increasing indices a triangle.

    Triangles stand in the order of their incentres, by x and then by y. SciPy (Qhull) triangulates, in float64; of
    four points on a circle either triangulation is a right one, and one is returned.

    Returns:
        3T indices, the stop token n, then `IGNORED`; length is 3 (2n - 5) + 1, the most that n points can need.

    Raises:
        ValueError: for fewer than three points, points that are not finite, a set that lies on a line, or equal points.

    Source: Vinyals et al. 2015, section 3.2.
    """
    xy = float64_points(points, least=3)
    count, n, _ = xy.shape
    triangles = np.zeros((count, 2 * n - 5, 3), dtype=np.int64)
    sizes = np.zeros((count, 1), dtype=np.int64)
    for row, cloud in enumerate(xy):
        try:
            found = Delaunay(cloud)
        except QhullError as error:
            raise ValueError(f"points[{row}] lie on a line: a triangulation needs three points that do not") from error
        if len(found.coplanar):
            raise ValueError(f"points[{row}] must differ, got point {found.coplanar[0, 0]} twice")
        sizes[row] = len(found.simplices)
        triangles[row, : len(found.simplices)] = np.sort(found.simplices, axis=1)
    slot = np.arange(2 * n - 5)
    center = _incenters(xy, triangles)
    order = np.lexsort((center[..., 1], center[..., 0], slot >= sizes), axis=1)
    triangles = np.take_along_axis(triangles, order[..., None], 1)
    targets = np.full((count, 3 * (2 * n - 5) + 1), IGNORED, dtype=np.int64)
    targets[:, :-1] = np.where((slot < sizes)[..., None], triangles, IGNORED).reshape(count, -1)
    np.put_along_axis(targets, 3 * sizes, n, 1)
    return torch.from_numpy(targets).to(points.device)


def _incenters(xy: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Corners weighted by the lengths of the opposite sides."""
    corners = np.take_along_axis(xy[:, :, None], triangles[..., None].reshape(len(xy), -1, 1, 1), 1)
    corners = corners.reshape(*triangles.shape, 2)
    sides = np.linalg.norm(np.roll(corners, -1, 2) - np.roll(corners, -2, 2), axis=-1)
    return (sides[..., None] * corners).sum(2) / np.maximum(sides.sum(2), np.finfo(float).tiny)[..., None]


def float64_points(points: Tensor, least: int = 1) -> np.ndarray:
    """The points as an array of float64, checked.

    Raises:
        ValueError: where they are not (batch, n, 2) with n of at least `least`, or not finite.
    """
    if points.ndim != 3 or points.shape[2] != 2 or points.shape[1] < least:
        raise ValueError(f"points must be (batch, n, 2) with n of at least {least}, got shape {tuple(points.shape)}")
    xy = points.detach().cpu().double().numpy()
    if not np.isfinite(xy).all():
        raise ValueError(f"points must be finite, got points[{np.argwhere(~np.isfinite(xy))[0, 0]}] with others")
    return xy
