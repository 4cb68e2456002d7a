"""The basis of all equivariant polynomials of a graph: listed, counted without listing, and changed from P to Q."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

from lathe.nn.equivariant_graph_polynomials.multigraph import Edge, Multigraph, partitions

__all__ = ["count_basis", "equivariant_basis", "homomorphism_terms", "injective_terms"]


def equivariant_basis(
    degree: int,
    order: int,
    *,
    directed: bool = True,
    loops: bool = True,
    multi: bool = True,
    simple: bool = False,
    connected: bool = False,
    channels: int | None = None,
    nodes: int | None = None,
) -> list[Multigraph]:
    """One multigraph for each polynomial of a basis of the equivariant ones that are homogeneous of this degree.

    The {P_H} and the {Q_H} of these H each are a basis (theorem 3.1); independent as functions of n x n matrices where
    n is at least the largest number of nodes, `min(2 * degree + order, nodes)`. Of n x n matrices for smaller n, the
    {Q_H} with at most n nodes are.

    Args:
        degree: number of edges.
        order: number of free indices: 0 invariants, 1 node vectors, 2 edge tensors (among these the diagonal ones,
            whose two marks are one node).
        directed: false for symmetric X.
        loops: false for X with a diagonal of zeros.
        multi: false for X with entries 0 and 1.
        simple: short for the three of them.
        connected: only connected ones: the others are products of these.
        channels: edges carry one of so many labels, for X of shape (n, n, channels).
        nodes: only those with at most so many nodes.

    Returns:
        Canonical multigraphs, in a fixed order.

    Raises:
        ValueError: for a negative degree, or an order that is not 0, 1 or 2.

    Source: theorem 3.1 and section 3.
    """
    _require(degree, order, channels)
    if simple:
        directed = loops = multi = False
    found = _listed(degree, order, directed, loops, multi, connected, channels)
    return [graph for graph in found if nodes is None or graph.num_nodes <= nodes]


def count_basis(
    degree: int,
    order: int,
    *,
    directed: bool = True,
    loops: bool = True,
    multi: bool = True,
    simple: bool = False,
    channels: int | None = None,
    nodes: int | None = None,
) -> int:
    """How many `equivariant_basis` would list, by Burnside's lemma: no graph is listed.

    With `nodes=n` it is the dimension of the homogeneous equivariant polynomials of n x n matrices.

    Args:
        degree, order, directed, loops, multi, simple, channels, nodes: as in `equivariant_basis`.

    Raises:
        ValueError: as `equivariant_basis`.
    """
    _require(degree, order, channels)
    if simple:
        directed = loops = multi = False
    # Marks that fall together are one marked node; unmarked nodes may lie on no edge here, so that the multigraphs on
    # exactly m of them are those without such nodes on at most m.
    total = 0
    for marked in {0: (0,), 1: (1,), 2: (1, 2)}[order]:
        free = 2 * degree if nodes is None else min(2 * degree, nodes - marked)
        if free < 0:
            continue
        average = Fraction(0)
        for cycles in _cycle_types(free):
            slots = _slot_cycles([*[1] * marked, *cycles], directed, loops, channels or 1)
            average += Fraction(_coefficient(slots, degree, multi), _centraliser(cycles))
        assert average.denominator == 1
        total += int(average)
    return total


def homomorphism_terms(H: Multigraph, *, simple: bool = False) -> dict[Multigraph, int]:
    """P_H as a sum of Q's: P_H = sum over F of `terms[F]` Q_F, over all quotients F of H.

    Args:
        simple: X is a simple graph: quotients with loops vanish and repeated edges are one.
    """
    return dict(_summed(H, simple, False))


def injective_terms(H: Multigraph, *, simple: bool = False) -> dict[Multigraph, int]:
    """Q_H as a sum of P's: Q_H = sum over F of `terms[F]` P_F, by the Moebius function of the partition lattice.

    A quotient that merges both marks counts on the diagonal only. The number of quotients of m nodes is Bell's: 203 for
    6 nodes, 4,140 for 8.

    Args:
        simple: X is a simple graph: quotients with loops vanish and repeated edges are one.
    """
    return dict(_summed(H, simple, True))


@lru_cache(maxsize=1 << 12)
def _summed(H: Multigraph, simple: bool, signed: bool) -> tuple[tuple[Multigraph, int], ...]:
    """All quotients of H with the number of partitions that lead to each, or the sum of their Moebius function."""
    apart = {frozenset(edge[:2]) for edge in H.edges} if simple else set()
    if any(len(pair) == 1 for pair in apart):
        return ()
    terms: Counter[Multigraph] = Counter()
    for blocks in partitions(range(H.num_nodes), lambda one, other: frozenset((one, other)) not in apart):
        moebius = math.prod((-1) ** (len(block) - 1) * math.factorial(len(block) - 1) for block in blocks)
        merged = H.merged(blocks)
        if simple:
            kept = {(min(edge[:2]), max(edge[:2]), *edge[2:]) for edge in merged.edges}
            merged = Multigraph(sorted(kept), merged.marks, merged.num_nodes)
        terms[merged.canonical(directed=not simple)] += moebius if signed else 1
    return tuple((graph, count) for graph, count in terms.items() if count)


def _require(degree: int, order: int, channels: int | None) -> None:
    if degree < 0:
        raise ValueError(f"degree must not be negative, got {degree}")
    if order not in (0, 1, 2):
        raise ValueError(f"order must be 0, 1 or 2, got {order}")
    if channels is not None and channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")


@lru_cache(maxsize=256)
def _listed(
    degree: int, order: int, directed: bool, loops: bool, multi: bool, connected: bool, channels: int | None
) -> tuple[Multigraph, ...]:
    if connected and order:
        # A connected graph may hang together by edges between its marks only: mark what is connected already.
        unmarked = _listed(degree, 0, directed, loops, multi, True, channels)
        graphs = [*unmarked, *([Multigraph([], [0])] if degree == 0 else [])]
        marked = {
            Multigraph(graph.edges, marks, graph.num_nodes).canonical(directed=directed)
            for graph in graphs
            for marks in itertools.product(range(graph.num_nodes), repeat=order)
        }
        if degree == 0 and order == 2:
            marked = {Multigraph([], [0, 0])}
        return _in_order(marked)
    if degree == 0:
        return {0: (Multigraph([]),), 1: (Multigraph([], [0]),), 2: (Multigraph([], [0, 0]), Multigraph([], [0, 1]))}[
            order
        ]
    found = set()
    labels = [()] if channels is None else [(channel,) for channel in range(channels)]
    for graph in _listed(degree - 1, order, directed, loops, multi, connected, channels):
        for r, s in _places(graph.num_nodes, directed, loops, connected and degree > 1):
            for label in labels:
                edge: Edge = (r, s, *label)
                if multi or edge not in graph.edges:
                    count = max(graph.num_nodes, r + 1, s + 1)
                    found.add(Multigraph([*graph.edges, edge], graph.marks, count).canonical(directed=directed))
    return _in_order(found)


def _places(count: int, directed: bool, loops: bool, touching: bool) -> Iterator[tuple[int, int]]:
    """Where one more edge can go: between nodes that are there, or with one or two new ones."""
    for r, s in itertools.product(range(count + 2), repeat=2):
        if (not directed and r > s) or (not loops and r == s):
            continue
        new = {node for node in (r, s) if node >= count}
        if new <= {count} or (new == {count, count + 1} and (r < s or not directed)):
            if touching and new == {r, s}:
                continue
            yield r, s


def _in_order(graphs: set[Multigraph]) -> tuple[Multigraph, ...]:
    return tuple(sorted(graphs, key=lambda graph: (graph.num_nodes, graph.marks, graph.edges)))


def _cycle_types(count: int, largest: int | None = None) -> Iterator[list[int]]:
    """Partitions of a number: the cycle lengths of its permutations."""
    if count == 0:
        yield []
        return
    for length in range(min(count, largest or count), 0, -1):
        for rest in _cycle_types(count - length, length):
            yield [length, *rest]


def _centraliser(cycles: list[int]) -> int:
    """Permutations of n with these cycle lengths are n! over this."""
    return math.prod(length**times * math.factorial(times) for length, times in Counter(cycles).items())


def _slot_cycles(cycles: list[int], directed: bool, loops: bool, channels: int) -> Counter[int]:
    """Cycle lengths of a permutation of nodes on the places where an edge can lie."""
    slots: Counter[int] = Counter()
    for one, a in enumerate(cycles):
        if loops:
            slots[a] += 1
        if directed:
            slots[a] += a - 1
        else:
            slots[a] += (a - 1) // 2
            if a % 2 == 0:
                slots[a // 2] += 1
        for b in cycles[one + 1 :]:
            slots[math.lcm(a, b)] += math.gcd(a, b) * (2 if directed else 1)
    return Counter({length: times * channels for length, times in slots.items() if times})


def _coefficient(slots: Counter[int], degree: int, multi: bool) -> int:
    """How many (multi)sets of `degree` slots the permutation keeps."""
    series = [1] + [0] * degree
    for length, times in slots.items():
        # (1 + x^length)^times, or 1 / (1 - x^length)^times where a slot may be taken again.
        powers = range(degree // length + 1)
        factor = [math.comb(times + k - 1, k) if multi else math.comb(times, k) for k in powers]
        series = [
            sum(factor[k] * series[total - k * length] for k in range(total // length + 1))
            for total in range(degree + 1)
        ]
    return series[degree]
