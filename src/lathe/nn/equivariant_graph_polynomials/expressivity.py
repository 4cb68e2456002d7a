"""Which polynomials a graph network can compute, which it cannot, and the fewest that would make up for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from lathe.nn.equivariant_graph_polynomials.basis import equivariant_basis
from lathe.nn.equivariant_graph_polynomials.multigraph import Multigraph

__all__ = ["expressive_degree", "generating_polynomials", "missing_polynomials", "polynomial_expressive"]

# On how many nodes the result of summing over one may live.
_WIDTHS = {"mpnn": 1, "gin": 1, "gcn": 1, "gatedgcn": 1, "ppgn": 2}
Neighbors = dict[int, set[int]]


def polynomial_expressive(H: Multigraph, model: str | int = "mpnn", *, given: Sequence[Multigraph] = ()) -> bool:
    """Can the network compute P_H, at any depth and width, with point-wise products of its features?

    Message passing ("mpnn", also "gin", "gcn", "gatedgcn") may sum over a node with one neighbour in what is left of H;
    "ppgn", which multiplies edge features as matrices (2-FWL), over one with two, which become neighbours; a number is
    the most neighbours that a model of your own may sum over (3 for 3-FWL). P_H can be computed where only marked nodes
    are left in the end. Up to two neighbours it does not matter which node is summed first; for more, all orders are
    tried. Parallel edges count once, loops not at all.

    Args:
        H: of order 2 with two marks, it is what the model can say of pairs; message passing can say only what is a
            product of values at both nodes, times the edge between them.
        given: polynomials that the network gets as input features: values at nodes (one mark), or at pairs (two). For
            message passing those at pairs are read on edges only. X is a simple graph's where any are given.

    Raises:
        ValueError: for an unknown model.

    Source: section 4 (models as contraction banks; the decision procedure). With `given`: ours; H is searched for
        copies of the given graphs, and each stands for an edge between its marks.
    """
    width = _width(model)
    near = _neighbors(H)
    return _computable(near, near, frozenset(H.marks), width, _inputs(given, width), set())


def missing_polynomials(degree: int, model: str | int = "mpnn", order: int | None = None) -> list[Multigraph]:
    """The connected simple graphs with so many edges whose polynomials the network cannot compute on simple graphs.

    Args:
        degree: number of edges, exactly.
        model: as in `polynomial_expressive`.
        order: 0, 1 or 2 marks (two different ones, in both orders); None for all.

    Raises:
        ValueError: for an unknown model, a negative degree, or an order that is not 0, 1, 2 or None.
    """
    orders = (0, 1, 2) if order is None else (order,)
    width = _width(model)
    return [graph for k in orders for graph in _missing(degree, width, k)]


def expressive_degree(model: str | int = "mpnn", order: int = 1) -> int:
    """The largest degree up to which the network computes all polynomials of an order on simple graphs.

    Message passing: 2 for values at nodes. PPGN: 5 for values at nodes, 4 at pairs of nodes.

    Raises:
        ValueError: for an unknown model, or one so strong that no graph of up to eight edges is missing.
    """
    width = _width(model)
    for degree in range(1, 9):
        if _missing(degree, width, order):
            return degree - 1
    raise ValueError(f"model {model!r} computes all polynomials of order {order} up to degree 8; no limit was found")


def generating_polynomials(degree: int, model: str | int = "mpnn", order: int | None = None) -> list[Multigraph]:
    """A short list of input features that lets the network compute all polynomials up to a degree.

    Goes through the missing ones, those with fewest edges first, and takes each that does not follow from those before.
    For PPGN and degree 6 it takes 4 where the paper gives 12. For message passing, features at pairs are read on edges
    and those at nodes only taken where no edge feature gives them.

    Args:
        degree: the largest number of edges.
        model: as in `polynomial_expressive`.
        order: 1 for node features only, 2 for features of pairs (or edges) only; None for both.

    Raises:
        ValueError: as `missing_polynomials`, or for order 0.
    """
    if order not in (None, 1, 2):
        raise ValueError(f"order must be 1, 2 or None, got {order}")
    return list(_generating(degree, _width(model), order))


def _width(model: str | int) -> int:
    width = _WIDTHS.get(model) if isinstance(model, str) else model
    if width is None or width < 1:
        raise ValueError(f"model must be one of {', '.join(_WIDTHS)} or a number of neighbours from 1, got {model!r}")
    return width


def _neighbors(H: Multigraph) -> Neighbors:
    near: Neighbors = {node: set() for node in range(H.num_nodes)}
    for edge in H.edges:
        if edge[0] != edge[1]:
            near[edge[0]].add(edge[1])
            near[edge[1]].add(edge[0])
    return near


def _summable(near: Neighbors, marks: frozenset[int], width: int) -> bool:
    """Whether all unmarked nodes can be summed over, each when it has at most `width` neighbours."""
    failed: set[frozenset[int]] = set()

    def from_here(near: Neighbors) -> bool:
        near = _reduced(near, marks, min(width, 2))
        free = frozenset(near) - marks
        # Up to two neighbours the order does not matter; with more, a sum can spoil another.
        if width < 3 or not free or free in failed:
            return not free
        ready = [node for node in free if len(near[node]) <= width]
        if any(from_here(_without(near, node)) for node in ready):
            return True
        failed.add(free)  # what is left of H depends on which nodes are gone alone
        return False

    return from_here(near)


def _without(near: Neighbors, node: int) -> Neighbors:
    """The graph as it is after a sum: the node is gone, its neighbours are neighbours."""
    around = near[node]
    rest = {other: set(others) for other, others in near.items() if other != node}
    for other in around:
        rest[other] |= around - {other}
        rest[other].discard(node)
    return rest


def _reduced(near: Neighbors, marks: frozenset[int], width: int) -> Neighbors:
    """What is left when all nodes are summed over that have so many neighbours in what is left (at most two)."""
    while True:
        ready = next((node for node in near if node not in marks and len(near[node]) <= width), None)
        if ready is None:
            return near
        near = _without(near, ready)


def _computable(
    near: Neighbors,
    raw: Neighbors,
    marks: frozenset[int],
    width: int,
    inputs: Sequence[Multigraph],
    seen: set[object],
) -> bool:
    """`raw` are the edges that are X's own; the others of `near` stand for given graphs that were cut out."""
    if _summable(near, marks, width):
        return True
    # Copies are sought in what was not reduced: a sum over a corner leaves no edge of X behind.
    key = frozenset((node, frozenset(around)) for node, around in near.items())
    if key in seen:
        return False
    seen.add(key)
    return any(
        _computable(*smaller, marks, width, inputs, seen)
        for given in inputs
        for smaller in _replaced(near, raw, marks, given)
    )


def _inputs(given: Sequence[Multigraph], width: int) -> list[Multigraph]:
    """Given features as they can be used: also transposed, and on the diagonal."""
    usable: dict[Multigraph, None] = {}
    for H in given:
        if width == 1 and H.order == 2 and H.marks[0] != H.marks[1]:
            H = Multigraph([*H.edges, H.marks], H.marks, H.num_nodes)
        usable[H] = None
        if H.order == 2 and H.marks[0] != H.marks[1]:
            usable[H.transposed] = None
            if width > 1 and not any(set(edge) == set(H.marks) for edge in H.edges):
                a, b = H.marks
                rest = [[node] for node in range(H.num_nodes) if node not in (a, b)]
                usable[H.merged([[a, b], *rest])] = None
    return [H for H in usable if H.num_nodes > len(set(H.marks))]


def _replaced(
    near: Neighbors, raw: Neighbors, marks: frozenset[int], given: Multigraph
) -> Iterator[tuple[Neighbors, Neighbors]]:
    """H with a copy of a given graph cut out: its inner nodes are gone, and its marks are neighbours."""
    own = _neighbors(given)
    inner = set(own) - set(given.marks)
    order = sorted(own, key=lambda node: (node not in inner, -len(own[node])))

    def placed(number: int, at: dict[int, int]) -> Iterator[dict[int, int]]:
        if number == len(order):
            yield at
            return
        node = order[number]
        for place in near:
            # An inner node's place has no edges but those of the copy: all of them go with it.
            if place in at.values() or (node in inner and (place in marks or len(near[place]) != len(own[node]))):
                continue
            if all(at[other] in raw[place] for other in own[node] if other in at):
                yield from placed(number + 1, {**at, node: place})

    done = set()
    for at in placed(0, {}):
        gone, ends = frozenset(at[node] for node in inner), tuple(at[mark] for mark in given.marks)
        if (gone, ends) in done:
            continue
        done.add((gone, ends))
        smaller, still_raw = ({n: some[n] - gone for n in some if n not in gone} for some in (near, raw))
        if len(set(ends)) == 2:
            smaller[ends[0]].add(ends[1])
            smaller[ends[1]].add(ends[0])
        yield smaller, still_raw


@lru_cache(maxsize=256)
def _missing(degree: int, width: int, order: int) -> tuple[Multigraph, ...]:
    graphs: Iterable[Multigraph] = equivariant_basis(degree, order, simple=True, connected=True)
    return tuple(
        H
        for H in graphs
        if (order < 2 or H.marks[0] != H.marks[1]) and not _summable(_neighbors(H), frozenset(H.marks), width)
    )


@lru_cache(maxsize=64)
def _generating(degree: int, width: int, order: int | None) -> tuple[Multigraph, ...]:
    chosen: list[Multigraph] = []
    for edges in range(1, degree + 1):
        wanted = [H for k in (2, 1) if order in (None, k) for H in _missing(edges, width, k)]
        if order == 1 or (order is None and width > 1):
            wanted += _missing(edges, width, 0)
        for H in wanted:
            if width == 1 and H.order == 2 and not any(set(edge) == set(H.marks) for edge in H.edges):
                continue  # on edges it is the one with an edge more, whose turn comes
            if not polynomial_expressive(H, width, given=chosen):
                chosen.append(H)
    return tuple(H if H.order else Multigraph(H.edges, [0], H.num_nodes) for H in chosen)
