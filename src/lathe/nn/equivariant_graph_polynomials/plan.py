"""In which order the nodes of a multigraph are summed over, and what each sum costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from lathe.nn.equivariant_graph_polynomials.multigraph import Multigraph

__all__ = ["Step", "contraction_plan"]

# Up to so many nodes with three or more neighbours, all ways to join them are tried.
_EXHAUSTIVE = 8


@dataclass(frozen=True)
class Step:
    """One step of a contraction.

    "sum" sums over the index of `nodes[0]`, which has at most two neighbours: it leaves a number, a vector or a matrix.
    "join" makes one node of two neighbours whose own neighbours are too many for that; its index runs over the pairs
    with X[j_c, j_d] != 0. Nothing larger than a matrix is ever made: not one (n, n, n) tensor for a K4.

    Args:
        kind: "sum" or "join".
        nodes: what is summed over or joined; the nodes of H, then those that joins made.
        neighbors: the nodes that the result lives on.
        makes: number of the node that a join makes.
        cost: multiplications, for dense X.
        memory: entries of the largest tensor made, for dense X and before large joins are cut into chunks.
    """

    kind: Literal["sum", "join"]
    nodes: tuple[int, ...]
    neighbors: tuple[int, ...]
    makes: int | None
    cost: float
    memory: float


@dataclass(frozen=True)
class _Graph:
    """What is left of H: which nodes are neighbours, and how many indices of H each node stands for."""

    neighbors: dict[int, frozenset[int]]
    size: dict[int, int]

    def without(self, node: int) -> _Graph:
        """The node is gone, and its neighbours are neighbours of each other."""
        around = self.neighbors[node]
        rest = {other: near for other, near in self.neighbors.items() if other != node}
        rest |= {other: (rest[other] - {node}) | (around - {other}) for other in around}
        return _Graph(rest, self.size)

    def joined(self, one: int, other: int, makes: int) -> _Graph:
        around = (self.neighbors[one] | self.neighbors[other]) - {one, other}
        rest = {node: near for node, near in self.neighbors.items() if node not in (one, other)}
        rest |= {node: (rest[node] - {one, other}) | {makes} for node in around}
        rest[makes] = around
        return _Graph(rest, {**self.size, makes: self.size[one] + self.size[other]})

    def fill(self, node: int) -> int:
        """How many pairs of its neighbours are none of each other."""
        return sum(b not in self.neighbors[a] for a, b in itertools.combinations(self.neighbors[node], 2))


def contraction_plan(H: Multigraph, n: int = 32) -> tuple[Step, ...]:
    """The steps that compute P_H of an n x n matrix.

    Nodes with at most two neighbours go first, those with fewest neighbours and then those whose sum joins fewest
    strangers before others; where none is left, two are joined. For dense X and up to six edges the largest cost is n
    to the power of the treewidth of H with its marks joined, plus one. From seven edges on a few graphs (2 of 1,747
    connected simple ones) pay one power more; in sparse graphs joins list edges and paths, which are far fewer.

    Args:
        n: number of nodes of the graphs to come; the order hardly depends on it, the costs do.

    Returns:
        A step a sum or join; none where all nodes are marked.
    """
    return _planned(H, int(n))


@lru_cache(maxsize=1 << 14)
def _planned(H: Multigraph, n: int) -> tuple[Step, ...]:
    near: dict[int, set[int]] = {node: set() for node in range(H.num_nodes)}
    for edge in H.edges:
        if edge[0] != edge[1]:
            near[edge[0]].add(edge[1])
            near[edge[1]].add(edge[0])
    graph = _Graph({node: frozenset(around) for node, around in near.items()}, dict.fromkeys(near, 1))
    return tuple(_search(graph, frozenset(near) - set(H.marks), None, H.num_nodes, float(n))[1])


def _search(graph: _Graph, free: frozenset[int], joined: int | None, makes: int, n: float) -> tuple[float, list[Step]]:
    """The cheapest steps from here, with their cost. `joined` is the node of a join that is still to be summed over."""
    steps: list[Step] = []
    while True:
        # While a join is open, only its neighbours can have become ready: the steps up to its sum all touch it.
        ready = [node for node in free if len(graph.neighbors[node]) <= 2]
        if not ready:
            break
        node = min(ready, key=lambda node: (len(graph.neighbors[node]), graph.fill(node), graph.size[node], node))
        steps.append(_sum(graph, node, n))
        graph, free = graph.without(node), free - {node}
        joined = None if node == joined else joined
    cost = sum(step.cost for step in steps)
    if not free:
        return cost, steps
    pairs = [
        (one, other)
        for one, other in itertools.combinations(sorted(free), 2)
        if other in graph.neighbors[one] and (joined is None or joined in (one, other))
    ]
    around = {pair: (graph.neighbors[pair[0]] | graph.neighbors[pair[1]]) - {*pair} for pair in pairs}
    if len(free) > _EXHAUSTIVE:
        pairs = [min(pairs, key=lambda pair: (len(around[pair]), sum(graph.size[node] for node in pair), pair))]
    best: tuple[float, list[Step]] | None = None
    for pair in pairs:
        rows = n ** (graph.size[pair[0]] + graph.size[pair[1]])
        columns = [n ** graph.size[node] for node in around[pair]]
        step = Step(
            "join", pair, tuple(sorted(around[pair])), makes, rows * sum(columns), rows * max(columns, default=1)
        )
        rest, more = _search(graph.joined(*pair, makes), free - {*pair} | {makes}, makes, makes + 1, n)
        if best is None or step.cost + rest < best[0]:
            best = (step.cost + rest, [step, *more])
    assert best is not None  # a node with three neighbours has one that is free, since at most two are marked
    return cost + best[0], steps + best[1]


def _sum(graph: _Graph, node: int, n: float) -> Step:
    around = tuple(sorted(graph.neighbors[node]))
    memory = n ** sum(graph.size[other] for other in around)
    return Step("sum", (node,), around, None, memory * n ** graph.size[node], memory)


def block_end(steps: Sequence[Step], start: int) -> int:
    """The place after the sum over the node that the join at `start` makes, or over what that is joined into.

    Raises:
        ValueError: where the steps do not get there.
    """
    makes = steps[start].makes
    for place in range(start + 1, len(steps)):
        step = steps[place]
        if makes not in (*step.nodes, *step.neighbors):
            raise ValueError(f"path sums over node {step.nodes[0]} before the join of {steps[start].nodes} is done")
        if makes in step.nodes:
            if step.kind == "sum":
                return place + 1
            makes = step.makes
    raise ValueError(f"path never sums over the join of nodes {steps[start].nodes}")


def require_path(H: Multigraph, path: Iterable[Step]) -> tuple[Step, ...]:
    """The path, if it sums over each unmarked node of H once.

    Raises:
        ValueError: where it does not.
    """
    steps = tuple(path)
    made = {step.makes for step in steps if step.makes is not None}
    named = sorted(node for step in steps for node in step.nodes)
    expected = sorted({node for node in range(H.num_nodes) if node not in H.marks} | made)
    if named != expected:
        raise ValueError(f"path must sum over or join each of the nodes {expected} once, got {named}")
    return steps
