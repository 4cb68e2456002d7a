"""Graphs to learn from and to be told apart: random ones, regular ones, and pairs that fool most graph networks."""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

from lathe.data.kinds import Graphs

__all__ = ["circular_skip_link_graph", "random_graphs", "random_regular_graphs", "rook_graph", "shrikhande_graph"]


def random_graphs(count: int, nodes: int, probability: float, *, generator: torch.Generator) -> Graphs:
    """Gilbert's graphs: each pair of nodes is an edge with the given probability, all independent.

    Raises:
        ValueError: where `count` or `nodes` is negative, or `probability` does not lie in 0 to 1.
    """
    if count < 0 or nodes < 0 or not 0 <= probability <= 1:
        raise ValueError(
            f"count and nodes must not be negative and probability must lie in 0 to 1, got {count}, {nodes} "
            f"and {probability}"
        )
    upper = (torch.rand(count, nodes, nodes, generator=generator) < probability).triu(1).byte()
    return Graphs(upper | upper.mT)


def random_regular_graphs(count: int, nodes: int, degree: int, *, generator: torch.Generator) -> Graphs:
    """Graphs in which every node has `degree` neighbours, nearly uniform (Steger and Wormald, by networkx).

    Raises:
        ValueError: where there is no such graph: `degree` must be less than `nodes`, and their product even.
    """
    import networkx as nx

    if count < 0 or not 0 <= degree < max(nodes, 1) or nodes * degree % 2:
        raise ValueError(
            f"degree must lie in 0 to nodes - 1 with nodes * degree even, and count must not be negative, "
            f"got {degree}, {nodes} and {count}"
        )
    adjacency = torch.zeros(count, nodes, nodes, dtype=torch.uint8)
    for which, seed in enumerate(torch.randint(2**31, (count,), generator=generator).tolist()):
        ends = list(nx.random_regular_graph(degree, nodes, seed=seed).edges)
        if ends:
            rows, columns = torch.tensor(ends).T
            adjacency[which, rows, columns] = adjacency[which, columns, rows] = 1
    return Graphs(adjacency)


def circular_skip_link_graph(nodes: int, skip: int) -> UInt8[Tensor, "nodes nodes"]:
    """A cycle whose every node is also joined to the one `skip` further on: 4-regular, alike to message passing.

    Murphy et al. 2019 (arXiv 1903.02541) use 41 nodes and skips 2, 3, 4, 5, 6, 9, 11, 12, 13 and 16.

    Raises:
        ValueError: where `skip` does not lie in 2 to (nodes - 1) / 2.
    """
    if not 2 <= skip <= (nodes - 1) // 2:
        raise ValueError(f"skip must lie in 2 to (nodes - 1) / 2 = {(nodes - 1) // 2}, got {skip}")
    place = torch.arange(nodes)
    distance = (place[:, None] - place) % nodes
    return sum((distance == step) | (distance == nodes - step) for step in (1, skip)).byte()  # type: ignore[union-attr]


def rook_graph(side: int) -> UInt8[Tensor, "nodes nodes"]:
    """Squares of a board of `side` x `side`, joined where a rook moves from one to the other.

    Strongly regular: (side**2, 2 (side - 1), side - 2, 2).
    """
    row, column = torch.arange(side**2) // side, torch.arange(side**2) % side
    return ((row[:, None] == row) ^ (column[:, None] == column)).byte()


def shrikhande_graph() -> UInt8[Tensor, "16 16"]:
    """The graph on Z4 x Z4 that joins what differs by (1, 0), (0, 1) or (1, 1), or by minus one of these.

    Strongly regular with the parameters of `rook_graph(4)`, (16, 6, 2, 2), and yet another graph: it has no K4.
    """
    place = torch.arange(16)
    difference = torch.stack(
        [(place[:, None] // 4 - place // 4) % 4, (place[:, None] % 4 - place % 4) % 4], -1
    )  # fmt: skip
    steps = torch.tensor([(1, 0), (3, 0), (0, 1), (0, 3), (1, 1), (3, 3)])
    return (difference[:, :, None] == steps).all(-1).any(-1).byte()
