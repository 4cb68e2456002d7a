"""Points in the plane with exact labels: convex hulls, Delaunay triangulations and travelling-salesman tours.

Labels are sequences of indices into the points, as pointer networks learn them (Vinyals, Fortunato, Jaitly 2015, arXiv
1506.03134, section 3): then the stop token n, then -100, which losses ignore. All functions take a batch.
"""

from lathe.data.tours.datasets import DelaunayDataset, HullDataset, PointDataset, TSPDataset, batches, pad_problems
from lathe.data.tours.geometry import IGNORED, convex_hull, delaunay
from lathe.data.tours.salesman import canonical_tour, counter_clockwise, nearest_neighbour, tour_length, tsp, two_opt

__all__ = [
    "IGNORED",
    "DelaunayDataset",
    "HullDataset",
    "PointDataset",
    "TSPDataset",
    "batches",
    "canonical_tour",
    "convex_hull",
    "counter_clockwise",
    "delaunay",
    "nearest_neighbour",
    "pad_problems",
    "tour_length",
    "tsp",
    "two_opt",
]
