"""Travelling-salesman tours of many point sets at once: optimal ones, and those of four cheaper methods.

A tour of n cities is a permutation that starts at city 0; the way back to it is understood. Distances are Euclidean.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import networkx
import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lathe.data.tours.geometry import float64_points

__all__ = ["canonical_tour", "counter_clockwise", "nearest_neighbour", "tour_length", "tsp", "two_opt"]

# Numbers that one step of dynamic programming works on together: what fits into a core's cache.
_TOGETHER = 2**18


def tsp(
    points: Float[Tensor, "batch n 2"],
    method: Literal["held_karp", "christofides", "nearest", "two_opt"] = "held_karp",
    direction: Literal["index", "counter_clockwise"] = "index",
) -> Int64[Tensor, "batch n"]:
    """A tour of each set from city 0.

    Args:
        method: "held_karp" is optimal, O(2^n n^2), by dynamic programming over subsets from both ends of the tour;
            "christofides" at most 1.5 times as long (NetworkX, one set at a time); "nearest" goes to the nearest city
            not yet visited; "two_opt" starts there and reverses stretches until none shortens the tour.
        direction: "index" has a second city of lower index than the last; "counter_clockwise" is a function of where
            the cities lie alone, and is learnt in a fraction of the steps.

    Raises:
        ValueError: for an unknown method, points that are not finite, or more than 20 cities for "held_karp".
    """
    xy = float64_points(points)
    n = xy.shape[1]
    if direction not in ("index", "counter_clockwise"):
        raise ValueError(f"direction must be 'index' or 'counter_clockwise', got {direction!r}")
    if method == "held_karp":
        if n > 20:
            raise ValueError(f"method 'held_karp' needs memory of order 2^n and takes up to 20 cities, got {n}")
        tours = _held_karp(xy)
    elif method == "christofides":
        tours = np.array([_christofides(cities) for cities in xy], dtype=np.int64).reshape(len(xy), n)
    elif method in ("nearest", "two_opt"):
        tours = _nearest(xy)
        if method == "two_opt":
            tours = _two_opt(xy, tours)
    else:
        raise ValueError(f"method must be 'held_karp', 'christofides', 'nearest' or 'two_opt', got {method!r}")
    found = torch.from_numpy(tours).to(points.device)
    return canonical_tour(found) if direction == "index" else counter_clockwise(points, found)


def nearest_neighbour(points: Float[Tensor, "batch n 2"]) -> Int64[Tensor, "batch n"]:
    """The nearest-neighbour tour from city 0, in the order in which it is built."""
    return torch.from_numpy(_nearest(float64_points(points))).to(points.device)


def two_opt(points: Float[Tensor, "batch n 2"], tours: Int64[Tensor, "batch n"]) -> Int64[Tensor, "batch n"]:
    """Each tour after 2-opt: the best reversal of a stretch is made until none shortens the tour.

    Raises:
        ValueError: where a tour is no permutation of the cities.
    """
    xy = float64_points(points)
    if tours.shape != points.shape[:2] or not bool((tours.sort(1).values == torch.arange(tours.shape[1])).all()):
        raise ValueError(f"tours must be permutations of {xy.shape[1]} cities, got shape {tuple(tours.shape)}")
    return torch.from_numpy(_two_opt(xy, tours.cpu().numpy())).to(points.device)


def tour_length(points: Float[Tensor, "batch n 2"], tours: Int64[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
    """Length of each closed tour."""
    corners = points.gather(1, tours[..., None].expand(-1, -1, 2))
    return (corners - corners.roll(-1, 1)).norm(dim=2).sum(1)


def canonical_tour(tours: Int64[Tensor, "batch n"]) -> Int64[Tensor, "batch n"]:
    """The same tours from city 0, in the direction in which the second city has a lower index than the last."""
    n = tours.shape[1]
    start = tours.argmin(1, keepdim=True)
    tours = tours.gather(1, (start + torch.arange(n, device=tours.device)) % n)
    if n < 3:
        return tours
    return torch.where(tours[:, 1:2] > tours[:, -1:], _reversed(tours), tours)


def counter_clockwise(points: Float[Tensor, "batch n 2"], tours: Int64[Tensor, "batch n"]) -> Int64[Tensor, "batch n"]:
    """The same tours from the same cities, turned so that the area that they enclose is positive."""
    x, y = points.double().gather(1, tours[..., None].expand(-1, -1, 2)).unbind(2)
    doubled_area = (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1, keepdim=True)
    return torch.where(doubled_area < 0, _reversed(tours), tours)


def _reversed(tours: Tensor) -> Tensor:
    return torch.cat([tours[:, :1], tours[:, 1:].flip(1)], 1)


def _distances(xy: np.ndarray) -> np.ndarray:
    return np.linalg.norm(xy[:, :, None] - xy[:, None], axis=-1)


def _nearest(xy: np.ndarray) -> np.ndarray:
    count, n, _ = xy.shape
    distance, rows = _distances(xy), np.arange(count)
    tours = np.zeros((count, n), dtype=np.int64)
    for step in range(1, n):
        distance[rows, :, tours[:, step - 1]] = np.inf  # no way leads back there
        tours[:, step] = distance[rows, tours[:, step - 1]].argmin(1)
    return tours


def _two_opt(xy: np.ndarray, tours: np.ndarray) -> np.ndarray:
    n, tours = xy.shape[1], tours.copy()
    if n < 4:
        return tours
    # Taking the edges after places i < j out of the tour reverses the places i + 1 ... j.
    i, j = np.triu_indices(n, 2)
    i, j = i[j - i < n - 1], j[j - i < n - 1]
    i_next, j_next, place = (i + 1) % n, (j + 1) % n, np.arange(n)
    distance = _distances(xy)
    active = np.arange(len(xy))
    while len(active):
        tour = tours[active]
        along = np.take_along_axis(np.take_along_axis(distance[active], tour[:, :, None], 1), tour[:, None], 2)
        gain = along[:, i, i_next] + along[:, j, j_next] - along[:, i, j] - along[:, i_next, j_next]
        best = gain.argmax(1)
        better = gain[np.arange(len(active)), best] > 1e-12
        active, tour, best = active[better], tour[better], best[better]
        low, high = i[best, None] + 1, j[best, None]
        tours[active] = np.take_along_axis(
            tour, np.where((place >= low) & (place <= high), low + high - place, place), 1
        )
    return tours


def _christofides(cities: np.ndarray) -> list[int]:
    n = len(cities)
    if n < 4:
        return list(range(n))
    graph = networkx.complete_graph(n)
    distance = _distances(cities[None])[0]
    for a, b in graph.edges:
        graph.edges[a, b]["weight"] = distance[a, b]
    tour = networkx.approximation.christofides(graph)[:-1]
    return tour[tour.index(0) :] + tour[: tour.index(0)]


def _held_karp(xy: np.ndarray) -> np.ndarray:
    count, n, _ = xy.shape
    if n < 4:
        return np.tile(np.arange(n), (count, 1))
    together = max(1, _TOGETHER // max(level.previous.size for level in _levels(n - 1)[1:]))
    parts = [_held_karp_part(xy[start : start + together]) for start in range(0, max(1, count), together)]
    return np.concatenate(parts)


class _Level:
    """The subsets of k of the m cities other than city 0, in the order of their bit masks.

    Slot t of a subset is its t-th lowest city.

    members: (subsets, k) cities. previous: (k, subsets) number, one level below, of the subset without slot t.
    edges: (k, subsets, k - 1) number in the flat (m, m) table of the edge from each city of that subset to slot t.
    """

    def __init__(self, masks: np.ndarray, rank: np.ndarray, m: int, k: int) -> None:
        self.masks = masks
        self.members = np.nonzero(masks[:, None] >> np.arange(m) & 1)[1].reshape(len(masks), k)
        self.previous = rank[masks ^ (1 << self.members.T)]
        others = np.stack([np.delete(self.members, slot, axis=1) for slot in range(k)])
        self.edges = others * m + self.members.T[:, :, None]


@lru_cache(maxsize=8)
def _levels(m: int) -> list[_Level]:
    """Levels 1 to ceil((m + 1) / 2): a tour is two paths from city 0 that meet in a city, of half the cities each."""
    masks = np.arange(2**m)
    sizes = (masks[:, None] >> np.arange(m) & 1).sum(1)
    rank = np.zeros(2**m, dtype=np.int64)
    for k in range(m + 1):
        rank[sizes == k] = np.arange((sizes == k).sum())
    return [_Level(masks[sizes == k], rank, m, k) for k in range(1, (m + 2) // 2 + 1)]


def _held_karp_part(xy: np.ndarray) -> np.ndarray:
    """Held and Karp 1962: lengths[k - 1][S, t, b] is that of b's shortest path from city 0 through S to slot t.

    The batch stands last, so that every step moves rows of it. Paths grow to half of the cities only; the other half
    of the tour is such a path too, walked backwards.
    """
    count, n, _ = xy.shape
    m = n - 1
    levels = _levels(m)
    distance = np.ascontiguousarray(_distances(xy).transpose(1, 2, 0))
    between = np.ascontiguousarray(distance[1:, 1:].reshape(m * m, count))
    lengths = [distance[0, 1:][:, None]]
    for k, level in enumerate(levels[1:], start=2):
        new = np.empty((len(level.masks), k, count))
        for slot in range(k):
            ways = lengths[-1][level.previous[slot]]
            ways += between[level.edges[slot]]
            ways.min(1, out=new[:, slot])
        lengths.append(new)

    # Where both halves meet: S ends in slot t of level k; the rest of the cities with that city is of level m + 1 - k.
    top, k = levels[-1], len(levels)
    other = levels[m - k]
    met, met_slot = np.empty((k, len(top.masks)), dtype=np.int64), np.empty((k, len(top.masks)), dtype=np.int64)
    for slot in range(k):
        city = top.members[:, slot]
        met[slot] = np.searchsorted(other.masks, (2**m - 1) ^ top.masks | 1 << city)
        met_slot[slot] = (other.members[met[slot]] == city[:, None]).argmax(1)
    best = np.full(count, np.inf)
    subset, slot_of = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    for slot in range(k):
        total = lengths[-1][:, slot] + lengths[m - k][met[slot], met_slot[slot]]
        found = total.argmin(0)
        value = total[found, np.arange(count)]
        subset, slot_of = np.where(value < best, found, subset), np.where(value < best, slot, slot_of)
        best = np.minimum(best, value)

    there = _walk_back(levels, lengths, between, k, subset, slot_of)
    back = _walk_back(levels, lengths, between, m + 1 - k, met[slot_of, subset], met_slot[slot_of, subset])
    # `there` starts in the meeting city and ends next to city 0, so does `back`.
    return np.concatenate([np.zeros((count, 1), dtype=np.int64), there[:, ::-1] + 1, back[:, 1:] + 1], 1)


def _walk_back(
    levels: list[_Level],
    lengths: list[np.ndarray],
    between: np.ndarray,
    k: int,
    subset: np.ndarray,
    slot: np.ndarray,
) -> np.ndarray:
    """The cities of each set's path from its end to its beginning: (sets, k), numbered without city 0."""
    rows = np.arange(between.shape[1])
    cities = []
    while True:
        level = levels[k - 1]
        cities.append(level.members[subset, slot])
        if k == 1:
            return np.stack(cities, 1)
        previous = level.previous[slot, subset]
        ways = lengths[k - 2][previous, :, rows] + between[level.edges[slot, subset], rows[:, None]]
        subset, slot, k = previous, ways.argmin(1), k - 1
