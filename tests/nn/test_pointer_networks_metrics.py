"""Metrics against shapely, hand-made cases, and what must not change them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull

from lathe.data.tours import IGNORED, convex_hull, delaunay
from lathe.nn.pointer_networks import delaunay_metrics, hull_metrics, is_tour

SQUARE = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0], [1.0, 0.5]]])


@settings(max_examples=40, deadline=None)
@given(n=st.integers(3, 8), T=st.integers(1, 9), seed=st.integers(0, 10**6), grid=st.booleans())
def test_simple_polygons_and_areas_are_shapelys(n, T, seed, grid):
    shapely = pytest.importorskip("shapely")
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(12, n, 2, generator=generator).double()
    if grid:  # where corners lie on edges, and edges over each other
        points = torch.randint(0, 4, (12, n, 2), generator=generator).double()
        points[:, :3] = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    sequences = torch.randint(0, n + 1, (12, T), generator=generator)
    metrics = hull_metrics(points, sequences)
    for row, cloud in enumerate(points.numpy()):
        outline = list(itertools.takewhile(lambda choice: choice < n, sequences[row].tolist()))
        if len(outline) > 1 and outline[0] == outline[-1]:
            outline.pop()
        polygon = shapely.Polygon(cloud[outline]) if len(outline) > 2 else None
        simple = polygon is not None and polygon.is_valid and polygon.exterior.is_simple and polygon.area > 0
        distinct = len({tuple(cloud[corner]) for corner in outline}) == len(outline)
        assert bool(metrics.simple[row]) == (simple and distinct)
        if metrics.simple[row]:
            hull = shapely.Polygon(cloud[ConvexHull(cloud).vertices])
            expected = polygon.intersection(hull).area / hull.area
            assert float(metrics.covered[row]) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(3, 12), turn=st.integers(0, 11), backwards=st.booleans(), close=st.booleans())
def test_where_a_hull_starts_and_which_way_it_goes_does_not_matter(n, turn, backwards, close):
    points = torch.rand(6, n, 2)
    sequences = torch.full((6, n + 2), IGNORED)
    for row, target in enumerate(convex_hull(points).tolist()):
        corners = target[: target.index(n)]
        corners = list(np.roll(corners[::-1] if backwards else corners, turn))
        corners = [*corners, corners[0], n] if close else [*corners, n]
        sequences[row, : len(corners)] = torch.tensor(corners)
    metrics = hull_metrics(points, sequences)
    assert metrics.accuracy == 1
    assert metrics.failed == 0
    assert metrics.area == pytest.approx(1, abs=1e-12)


def test_area_is_averaged_over_simple_polygons_only():
    sequences = torch.tensor([[0, 1, 2, 3, 5], [0, 1, 2, 5, IGNORED], [0, 2, 1, 3, 5], [0, 1, 5, IGNORED, IGNORED]])
    metrics = hull_metrics(SQUARE.expand(4, -1, -1), sequences)
    assert metrics.exact.tolist() == [True, False, False, False]
    assert metrics.simple.tolist() == [True, True, False, False]
    assert metrics.covered.tolist()[:2] == [1.0, 0.5]
    assert metrics.accuracy == 0.25
    assert metrics.area == 0.75
    assert metrics.failed == 0.5


def test_the_label_of_a_triangulation_is_right_in_any_order():
    points = torch.rand(5, 7, 2)
    truth = delaunay(points)
    assert delaunay_metrics(points, truth).accuracy == 1
    mixed = truth.clone()
    for row in range(5):
        size = int((truth[row] < 0).logical_not().sum()) - 1
        triangles = truth[row, :size].view(-1, 3)
        triangles = triangles[torch.randperm(len(triangles))][:, torch.randperm(3)]
        mixed[row, :size] = triangles.flatten()
    assert delaunay_metrics(points, mixed).accuracy == 1


def test_coverage_counts_true_triangles_once():
    # The inner point 4 of the square: four triangles around it.
    label = delaunay(SQUARE)[0].tolist()
    stop = label.index(5)
    assert stop == 12
    half = [*label[:6], *label[:6], 5]
    rest = [*label[:9], 5]
    cut = [*label[:12], 0, 5]
    false = [*label[:12], 0, 1, 2, 5]
    sequences = torch.full((4, 16), IGNORED)
    for row, sequence in enumerate((half, rest, cut, false)):
        sequences[row, : len(sequence)] = torch.tensor(sequence)
    metrics = delaunay_metrics(SQUARE.expand(4, -1, -1), sequences)
    assert metrics.covered.tolist() == [0.5, 0.75, 1, 1]
    assert metrics.exact.tolist() == [False] * 4
    assert metrics.coverage == pytest.approx(3.25 / 4)


def test_a_tour_visits_every_city_once():
    sequences = torch.tensor([[0, 2, 1, 3], [3, 1, 0, 2], [0, 1, 1, 3], [0, 1, 2, 3], [0, 1, 4, IGNORED]])
    assert is_tour(sequences, 3).tolist() == [True, False, False, True, False]
    assert is_tour(sequences[:, :3], 4).tolist() == [False] * 5
    assert is_tour(sequences, 4).tolist() == [True, True, False, True, False]
