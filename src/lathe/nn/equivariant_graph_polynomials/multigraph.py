"""Multigraphs with marked nodes: the names of the basis polynomials, up to isomorphism."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx as nx

__all__ = ["Multigraph"]

Edge = tuple[int, ...]
Written = tuple[tuple[int, int, tuple[int, ...]], ...]


@dataclass(frozen=True, init=False)
class Multigraph:
    """A directed multigraph H with up to two marked nodes; it names the polynomials P_H and Q_H.

    Two of them are equal where they are written alike; `canonical` gives equal ones to isomorphic ones.

    Args:
        edges: pairs of nodes (r, s), loops and repetitions allowed: a factor X[j_r, j_s] each. With channels, triples
            (r, s, channel): a factor X[j_r, j_s, channel].
        marks: nodes whose indices stay free: none for an invariant, (a,) for a value at each node, (a, b) for a value
            at each pair of nodes, where b may be a: then the values lie on the diagonal.
        num_nodes: nodes are 0 to num_nodes - 1; by default as many as edges and marks name.

    Raises:
        ValueError: for a node or channel out of range, more than two marks, edges that are neither all pairs nor all
            triples, or a node that is neither marked nor on an edge (its index would sum over nothing).

    Example:
        >>> Multigraph([(0, 1), (1, 2), (2, 0)]).degree   # closed walks of three steps: the trace of X cubed
        3
    """

    edges: tuple[Edge, ...]
    marks: tuple[int, ...]
    num_nodes: int

    def __init__(self, edges: Iterable[Sequence[int]], marks: Sequence[int] = (), num_nodes: int | None = None) -> None:
        ends = tuple(tuple(int(part) for part in edge) for edge in edges)
        marked = tuple(int(mark) for mark in marks)
        if len({len(edge) for edge in ends} - {2, 3}) or len({len(edge) for edge in ends}) > 1:
            raise ValueError(f"edges must be all pairs (r, s) or all triples (r, s, channel), got {ends}")
        if len(marked) > 2:
            raise ValueError(f"marks must name at most two nodes, got {marked}")
        used = {node for edge in ends for node in edge[:2]} | set(marked)
        count = max(used, default=-1) + 1 if num_nodes is None else num_nodes
        if any(not 0 <= node < count for node in used) or any(edge[2] < 0 for edge in ends if len(edge) == 3):
            raise ValueError(
                f"nodes must lie in 0 to {count - 1} and channels must not be negative, got {ends}, {marked}"
            )
        if len(used) < count:
            isolated = sorted(set(range(count)) - used)
            raise ValueError(f"every unmarked node must lie on an edge, got {isolated} on none")
        object.__setattr__(self, "edges", ends)
        object.__setattr__(self, "marks", marked)
        object.__setattr__(self, "num_nodes", count)

    @property
    def degree(self) -> int:
        """Number of edges: the degree of the polynomial."""
        return len(self.edges)

    @property
    def order(self) -> int:
        """Number of marks: 0 for an invariant, 1 for values at nodes, 2 for values at pairs of nodes."""
        return len(self.marks)

    @property
    def labelled(self) -> bool:
        """Whether edges name channels."""
        return bool(self.edges) and len(self.edges[0]) == 3

    @property
    def simple(self) -> bool:
        """No loops, no two edges between the same nodes, whichever way they point."""
        pairs = {frozenset(edge[:2]) for edge in self.edges}
        return len(pairs) == self.degree and all(len(pair) == 2 for pair in pairs)

    @property
    def connected(self) -> bool:
        """Whether all nodes hang together; a polynomial is the product of those of its components."""
        return len(_components(self.num_nodes, self.edges)) <= 1

    @property
    def transposed(self) -> Multigraph:
        """The marks in the other order: its polynomial is the transpose."""
        return Multigraph(self.edges, self.marks[::-1], self.num_nodes)

    @classmethod
    def from_networkx(cls, graph: nx.Graph, marks: Sequence[object] = ()) -> Multigraph:
        """The edges of any networkx graph, repeated ones too; nodes are numbered in the graph's order.

        Raises:
            ValueError: as of `Multigraph`, and where a mark is no node of the graph.
        """
        number = {node: place for place, node in enumerate(graph.nodes)}
        if strange := [mark for mark in marks if mark not in number]:
            raise ValueError(f"marks must be nodes of the graph, got {strange}")
        edges = [(number[r], number[s]) for r, s in graph.edges()]
        return cls(edges, [number[mark] for mark in marks], len(number))

    def canonical(self, *, directed: bool = True) -> Multigraph:
        """The same graph, numbered in one way for all that are isomorphic (marks to marks, in their order).

        Args:
            directed: false forgets which way edges point, as a symmetric X does.
        """
        edges = self.edges if directed else tuple(_forward(edge) for edge in self.edges)
        return _canonical(tuple(sorted(edges)), self.marks, self.num_nodes, directed)

    def automorphisms(self, *, directed: bool = True) -> int:
        """How many renumberings of the nodes keep edges and marks."""
        matrix = _Adjacency(self.edges, self.num_nodes, directed)
        colours = _mark_colours(self.marks, self.num_nodes)
        count = 1
        for node in range(self.num_nodes):
            # Orbit and stabiliser: in how many places may this node go while those before it stay?
            alike = [other for other in range(self.num_nodes) if colours[other] == colours[node]]
            image = {other: _label(matrix, _set_apart(colours, other))[0] for other in alike}
            count *= sum(image[other] == image[node] for other in alike)
            colours = _set_apart(colours, node)
        return count

    def merged(self, blocks: Sequence[Sequence[int]]) -> Multigraph:
        """The quotient: the nodes of each block become one, edges and marks follow.

        Args:
            blocks: a partition of all nodes.
        """
        place = {node: number for number, block in enumerate(blocks) for node in block}
        edges = [(place[edge[0]], place[edge[1]], *edge[2:]) for edge in self.edges]
        return Multigraph(edges, [place[mark] for mark in self.marks], len(blocks))


def _forward(edge: Edge) -> Edge:
    return (min(edge[:2]), max(edge[:2]), *edge[2:])


def _components(count: int, edges: Iterable[Edge]) -> list[list[int]]:
    root = list(range(count))

    def find(node: int) -> int:
        while root[node] != node:
            root[node] = node = root[root[node]]
        return node

    for edge in edges:
        root[find(edge[0])] = find(edge[1])
    groups: dict[int, list[int]] = {}
    for node in range(count):
        groups.setdefault(find(node), []).append(node)
    return list(groups.values())


def _mark_colours(marks: tuple[int, ...], count: int) -> tuple[int, ...]:
    """0 for most nodes; 1 and 2 for the first and second mark, 3 where they are one."""
    return tuple(sum(position for position, mark in enumerate(marks, 1) if mark == node) for node in range(count))


def _set_apart(colours: tuple[int, ...], node: int) -> tuple[int, ...]:
    """Gives one node a colour of its own, just before its old one."""
    return tuple(2 * colour + (place != node) for place, colour in enumerate(colours))


class _Adjacency:
    """Which labels the edges between two nodes carry: a tuple for each ordered pair."""

    def __init__(self, edges: Iterable[Edge], count: int, directed: bool) -> None:
        between: dict[tuple[int, int], list[int]] = {}
        for r, s, *label in edges:
            between.setdefault((r, s), []).append(label[0] if label else 0)
            if not directed and r != s:
                between.setdefault((s, r), []).append(label[0] if label else 0)
        empty: tuple[int, ...] = ()
        self.count, self.directed = count, directed
        self.rows = [
            [tuple(sorted(between[r, s])) if (r, s) in between else empty for s in range(count)] for r in range(count)
        ]
        self.around = [
            [s for s in range(count) if s != r and (self.rows[r][s] or self.rows[s][r])] for r in range(count)
        ]

    def twins(self, one: int, other: int) -> bool:
        """Whether swapping the two keeps all edges."""
        rows = self.rows
        return (
            rows[one][one] == rows[other][other]
            and rows[one][other] == rows[other][one]
            and all(
                rows[one][node] == rows[other][node] and rows[node][one] == rows[node][other]
                for node in range(self.count)
                if node not in (one, other)
            )
        )


def _refined(matrix: _Adjacency, colours: tuple[int, ...]) -> tuple[int, ...]:
    """Colour refinement to a stable colouring, colours numbered by what the nodes see."""
    rows = matrix.rows
    while True:
        seen = [
            (
                colours[node],
                rows[node][node],
                sorted((colours[other], rows[node][other], rows[other][node]) for other in matrix.around[node]),
            )
            for node in range(matrix.count)
        ]
        order = sorted(range(matrix.count), key=seen.__getitem__)
        ranks, rank = [0] * matrix.count, -1
        for place, node in enumerate(order):
            rank += place == 0 or seen[node] != seen[order[place - 1]]
            ranks[node] = rank
        if len(set(ranks)) == len(set(colours)):
            return tuple(ranks)
        colours = tuple(ranks)


def _label(matrix: _Adjacency, colours: tuple[int, ...]) -> tuple[Written, tuple[int, ...]]:
    """The least way to write the graph over all numberings that refinement leaves open, and one that gives it.

    Nodes are numbered colour by colour.
    """
    ranks = _refined(matrix, colours)
    cells = Counter(ranks)
    open_cell = next((rank for rank in sorted(cells) if cells[rank] > 1), None)
    if open_cell is None:
        order = sorted(range(matrix.count), key=ranks.__getitem__)
        written = tuple((ranks[r], ranks[s], matrix.rows[r][s]) for r in order for s in order if matrix.rows[r][s])
        return written, ranks
    tried: list[int] = []
    best = None
    for node in (node for node in range(matrix.count) if ranks[node] == open_cell):
        if any(matrix.twins(node, other) for other in tried):
            continue
        tried.append(node)
        found = _label(matrix, _set_apart(ranks, node))
        if best is None or found[0] < best[0]:
            best = found
    assert best is not None
    return best


@lru_cache(maxsize=1 << 16)
def _canonical(edges: tuple[Edge, ...], marks: tuple[int, ...], count: int, directed: bool) -> Multigraph:
    """Each component is numbered on its own, marks first; then they are put in order, those with marks first."""
    tones = [(colour - 1) % 4 for colour in _mark_colours(marks, count)]
    parts = []
    for nodes in _components(count, edges):
        place = {node: number for number, node in enumerate(nodes)}
        own = [(place[edge[0]], place[edge[1]], *edge[2:]) for edge in edges if edge[0] in place]
        own_tones = tuple(tones[node] for node in nodes)
        written, ranks = _label(_Adjacency(own, len(nodes), directed), own_tones)
        parts.append(((min(own_tones), len(nodes), sorted(own_tones), written), nodes, ranks))
    number: dict[int, int] = {}
    for _, nodes, ranks in sorted(parts, key=lambda part: part[0]):
        start = len(number)
        number |= {node: start + rank for node, rank in zip(nodes, ranks)}
    renamed = [(number[edge[0]], number[edge[1]], *edge[2:]) for edge in edges]
    return Multigraph(
        sorted(edge if directed else _forward(edge) for edge in renamed), [number[mark] for mark in marks], count
    )


def partitions(nodes: Sequence[int], compatible: Callable[[int, int], bool]) -> Iterator[list[list[int]]]:
    """All partitions of the nodes into blocks of pairwise compatible ones."""

    def grown(place: int, blocks: list[list[int]]) -> Iterator[list[list[int]]]:
        if place == len(nodes):
            yield [list(block) for block in blocks]
            return
        node = nodes[place]
        for block in blocks:
            if all(compatible(node, other) for other in block):
                block.append(node)
                yield from grown(place + 1, blocks)
                block.pop()
        blocks.append([node])
        yield from grown(place + 1, blocks)
        blocks.pop()

    return grown(0, [])
