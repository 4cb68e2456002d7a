"""Labels against SciPy, brute force over permutations and circles, python_tsp, and what theorems promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull

from lathe.data.tours import (
    IGNORED,
    DelaunayDataset,
    HullDataset,
    PointDataset,
    TSPDataset,
    batches,
    canonical_tour,
    convex_hull,
    counter_clockwise,
    delaunay,
    nearest_neighbour,
    pad_problems,
    tour_length,
    tsp,
    two_opt,
)


def uniform(count: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written(row: torch.Tensor) -> list[int]:
    return [choice for choice in row.tolist() if choice != IGNORED]


def brute_length(cities: torch.Tensor) -> float:
    tours = torch.tensor([(0, *rest) for rest in itertools.permutations(range(1, len(cities)))])
    return float(tour_length(cities.expand(len(tours), -1, -1), tours).min())


# --- hulls ---


@settings(max_examples=20, deadline=None)
@given(n=st.integers(3, 30), seed=st.integers(0, 10**6), spread=st.sampled_from([1e-3, 1.0, 1e4]))
def test_hulls_are_scipys_from_the_lowest_index(n, seed, spread):
    points = 5 + spread * uniform(20, n, seed)
    for cloud, row in zip(points, convex_hull(points)):
        corners = ConvexHull(cloud.numpy()).vertices
        assert written(row) == [*np.roll(corners, -corners.argmin()), n]


def test_more_hulls_than_are_worked_on_together_come_out_the_same():
    points = uniform(2500, 6)
    assert torch.equal(convex_hull(points)[2040:2060], convex_hull(points[2040:2060]))
    assert convex_hull(points[:0]).shape == (0, 7)


def test_points_on_an_edge_and_repeated_points_are_no_corners():
    square = torch.tensor([[0.0, 0.0], [0.5, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.5], [0.5, 0.5]])
    assert written(convex_hull(square[None])[0]) == [0, 2, 3, 4, 7]
    twice = torch.cat([square, square])
    corners = written(convex_hull(twice[None])[0])[:-1]
    assert len(corners) == 4
    assert {tuple(twice[corner].tolist()) for corner in corners} == {(0, 0), (1, 0), (1, 1), (0, 1)}


def test_closed_hulls_repeat_their_first_corner_before_the_stop():
    points = uniform(50, 7)
    for plain, closed in zip(convex_hull(points), convex_hull(points, close=True)):
        corners = written(plain)[:-1]
        assert written(closed) == [*corners, corners[0], 7]


def test_points_that_have_no_hull_or_triangulation_are_refused():
    line = torch.stack([torch.linspace(0, 1, 5), 3 * torch.linspace(0, 1, 5) + 1], 1)
    for label in (convex_hull, delaunay):
        with pytest.raises(ValueError, match=r"points\[1\] lie on a line"):
            label(torch.stack([torch.rand(5, 2), line]))
        with pytest.raises(ValueError, match=r"at least 3, got shape \(1, 2, 2\)"):
            label(torch.rand(1, 2, 2))
        with pytest.raises(ValueError, match=r"finite.*points\[0\]"):
            label(torch.full((1, 4, 2), torch.nan))
    with pytest.raises(ValueError, match="twice"):
        delaunay(torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]]))


# --- triangulations ---


def circumscribed(a, b, c, d) -> float:
    """Positive where d lies in the circle through a, b and c."""
    rows = np.array([[*(p - d), (p - d) @ (p - d)] for p in (a, b, c)])
    return np.linalg.det(rows) * np.sign(np.cross([*(b - a), 0], [*(c - a), 0])[2])


@pytest.mark.parametrize("n", [3, 4, 6, 9])
def test_triangles_are_those_whose_circle_is_empty(n):
    points = uniform(10, n, seed=n)
    for cloud, row in zip(points.numpy(), delaunay(points)):
        *corners, stop = written(row)
        found = [tuple(corners[i : i + 3]) for i in range(0, len(corners), 3)]
        expected = {
            triple
            for triple in itertools.combinations(range(n), 3)
            if all(circumscribed(*cloud[list(triple)], cloud[d]) < 0 for d in set(range(n)) - set(triple))
        }
        assert stop == n
        assert set(found) == expected
        assert len(found) == len(expected) == 2 * n - 2 - len(ConvexHull(cloud).vertices)


def test_triangles_stand_in_the_order_of_their_incentres():
    points = uniform(5, 8)
    for cloud, row in zip(points.numpy(), delaunay(points)):
        corners = written(row)[:-1]
        centers = []
        for i in range(0, len(corners), 3):
            A, B, C = cloud[corners[i : i + 3]]
            a, b, c = np.linalg.norm(B - C), np.linalg.norm(A - C), np.linalg.norm(A - B)
            centers.append(tuple((a * A + b * B + c * C) / (a + b + c)))
        assert centers == sorted(centers)


# --- tours ---


@pytest.mark.parametrize("n", range(1, 9))
def test_held_karp_is_brute_force(n):
    points = uniform(12, n, seed=n)
    tours = tsp(points)
    assert tours.sort(1).values.tolist() == [list(range(n))] * 12
    for cities, length in zip(points, tour_length(points, tours)):
        assert float(length) == pytest.approx(brute_length(cities), abs=1e-12)


@pytest.mark.parametrize("n", [9, 10, 11])
def test_held_karp_is_python_tsps(n):
    exact = pytest.importorskip("python_tsp.exact")
    points = uniform(2, n, seed=n)
    for cities, length in zip(points, tour_length(points, tsp(points))):
        distance = torch.cdist(cities, cities).numpy()
        _, expected = exact.solve_tsp_dynamic_programming(distance)
        assert float(length) == pytest.approx(expected, abs=1e-9)


def test_cities_on_a_circle_are_visited_around_it():
    angle = torch.tensor([0, 5, 2, 7, 1, 10, 4, 8, 12, 6, 3, 11, 9]) * 2 * np.pi / 13
    points = torch.stack([angle.cos(), angle.sin()], 1)[None]
    tour = tsp(points)[0]
    around = (angle[tour] * 13 / (2 * np.pi)).round().long().tolist()
    assert around in ([*range(13)], [0, *range(12, 0, -1)])


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_cheaper_tours_are_tours_within_their_bounds(n, seed):
    points = uniform(3, n, seed)
    optimal = tour_length(points, tsp(points))
    for method in ("christofides", "nearest", "two_opt"):
        tours = tsp(points, method=method)
        assert tours.sort(1).values.tolist() == [list(range(n))] * 3
        assert torch.equal(tours, canonical_tour(tours))
        assert (tours[:, 0] == 0).all()
        length = tour_length(points, tours)
        assert (length >= optimal - 1e-9).all()
        if method == "christofides":
            assert (length <= 1.5 * optimal + 1e-9).all()
    assert (tour_length(points, tsp(points, "two_opt")) <= tour_length(points, tsp(points, "nearest")) + 1e-9).all()


def test_the_nearest_city_comes_next():
    for cities, tour in zip(*(lambda p: (p, nearest_neighbour(p)))(uniform(5, 8))):
        for step in range(1, 8):
            ways = {city: float((cities[city] - cities[tour[step - 1]]).norm()) for city in tour[step:].tolist()}
            assert int(tour[step]) == min(ways, key=ways.__getitem__)


def test_after_two_opt_no_reversal_shortens_a_tour():
    points = uniform(4, 9)
    tours = two_opt(points, torch.stack([torch.randperm(9) for _ in range(4)]))
    lengths = tour_length(points, tours)
    for i, j in itertools.combinations(range(10), 2):
        other = torch.cat([tours[:, :i], tours[:, i:j].flip(1), tours[:, j:]], 1)
        assert (tour_length(points, other) >= lengths - 1e-9).all()


def test_a_canonical_tour_does_not_depend_on_start_and_direction():
    tours = torch.stack([torch.randperm(7) for _ in range(10)])
    expected = canonical_tour(tours)
    assert (expected[:, 0] == 0).all()
    assert (expected[:, 1] < expected[:, -1]).all()
    assert torch.equal(canonical_tour(tours.roll(3, 1)), expected)
    assert torch.equal(canonical_tour(tours.flip(1)), expected)


def test_counter_clockwise_tours_turn_left_on_the_whole():
    points = uniform(20, 7)
    tours = tsp(points, direction="counter_clockwise")
    assert torch.equal(canonical_tour(tours), tsp(points))
    assert torch.equal(counter_clockwise(points, canonical_tour(tours.flip(1))), tours)
    for cities, tour in zip(points, tours):
        turn = torch.view_as_complex(cities[tour].roll(-1, 0) - cities[tour])
        assert float((turn.roll(-1) / turn).angle().sum()) == pytest.approx(2 * np.pi)  # optimal tours do not cross


def test_what_no_tour_can_be_made_of_is_refused(shape_checks_off):
    with pytest.raises(ValueError, match="up to 20 cities, got 21"):
        tsp(torch.rand(1, 21, 2))
    with pytest.raises(ValueError, match="method must be"):
        tsp(torch.rand(1, 5, 2), "lkh")
    with pytest.raises(ValueError, match="direction must be"):
        tsp(torch.rand(1, 5, 2), direction="clockwise")
    with pytest.raises(ValueError, match="permutations of 4 cities"):
        two_opt(torch.rand(1, 4, 2), torch.tensor([[0, 1, 1, 2]]))


# --- data sets ---


def test_a_data_set_is_a_function_of_its_seed_whoever_draws_it():
    one, same = HullDataset(50, (3, 6), seed=4), HullDataset(50, (3, 6), seed=4, workers=2)
    other = HullDataset(50, (3, 6), seed=5)
    assert len(one) == 50
    for (points, targets), (p, t) in zip(one.parts, same.parts, strict=True):
        assert torch.equal(points, p)
        assert torch.equal(targets, t)
    assert [len(points) for points, _ in one.parts] != [0, 0, 0, 0]
    assert not torch.equal(one[0][0], other[0][0])


def test_a_data_set_gives_each_of_its_samples_once():
    data = DelaunayDataset(30, (4, 5))
    seen = [data[i] for i in range(len(data))]
    assert {len(points) for points, _ in seen} == {4, 5}
    assert len({float(points.sum()) for points, _ in seen}) == 30
    assert torch.equal(data[-1][0], seen[-1][0])
    with pytest.raises(IndexError, match="30"):
        data[30]


def test_batches_have_one_size_no_padding_that_none_needs_and_every_sample_in_a_pass():
    data = HullDataset(60, (4, 6), seed=1)
    stream = iter(data.batches(8, seed=3))
    lots = sum(-(-len(points) // 8) for points, _ in data.parts)
    seen = []
    for _ in range(lots):
        (points, targets), again = next(stream)
        assert torch.equal(targets, again)
        assert torch.equal(targets, convex_hull(points)[:, : targets.shape[1]])
        assert (targets[:, -1] != IGNORED).any()
        seen += points.sum((1, 2)).tolist()
    assert len(set(seen)) == len(seen) == 60
    first = [next(iter(data.batches(8, seed=3)))[0][0] for _ in range(2)]
    assert torch.equal(*first)


def test_labels_of_ones_own_make_a_data_set():
    data = PointDataset(nearest_neighbour, 10, 5)
    assert torch.equal(data.parts[0][1], nearest_neighbour(data.parts[0][0]))
    (points, tours), _ = next(iter(batches(TSPDataset(10, 5).parts, 10)))
    assert torch.equal(tours, tsp(points))


def test_padded_problems_keep_their_labels_and_share_a_stop_token():
    small, large = HullDataset(1, 4)[0], HullDataset(1, 6)[0]
    points, targets, lengths = pad_problems([small, large])
    assert points.shape == (2, 6, 2)
    assert lengths.tolist() == [4, 6]
    assert written(targets[0]) == [6 if choice == 4 else choice for choice in written(small[1])]
    assert written(targets[1]) == written(large[1])
    _, tours, _ = pad_problems([TSPDataset(1, 4)[0], TSPDataset(1, 6)[0]], stop_token=False)
    assert written(tours[0]) == TSPDataset(1, 4)[0][1].tolist()


def test_impossible_data_sets_are_refused():
    for size, n in ((0, 5), (5, 0), (5, (6, 4))):
        with pytest.raises(ValueError, match="size and n"):
            HullDataset(size, n)
    with pytest.raises(ValueError, match="at least one"):
        pad_problems([])
