"""Values of the polynomials P_H and Q_H: on batches of matrices, exactly in integers, or on edge lists."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from lathe.core.precision import at_least_float32, without_autocast
from lathe.nn.equivariant_graph_polynomials.basis import injective_terms
from lathe.nn.equivariant_graph_polynomials.calculus import Calculus, Dense, Factor, Pairs, Sparse
from lathe.nn.equivariant_graph_polynomials.multigraph import Multigraph
from lathe.nn.equivariant_graph_polynomials.plan import Step, block_end, contraction_plan, require_path

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["GraphPolynomials", "edge_list_polynomials", "graph_polynomial"]


def graph_polynomial(
    X: Shaped[Tensor, "..."],
    H: Multigraph,
    *,
    injective: bool = False,
    simple: bool = False,
    exact: bool = False,
    mask: Shaped[Tensor, "..."] | None = None,
    as_matrix: bool = True,
    path: Iterable[Step] | None = None,
) -> Shaped[Tensor, "..."]:
    """P_H(X), the sum over all maps j of the nodes of H to nodes of the graph of prod X[j_r, j_s] over H's edges.

    Indices of marked nodes stay free. On a 0/1 adjacency P_H counts homomorphisms of H into the graph, rooted at the
    marks; Q_H, over injective maps only, counts copies of H times its automorphisms.

    Args:
        X: (..., n, n), or (..., n, n, channels) where the edges of H name channels. Floating point; float16 and
            bfloat16 are computed in float32.
        injective: Q_H instead of P_H, as a signed sum of the P's of the quotients of H.
        simple: X is the adjacency of a simple graph (checked), which saves terms of Q_H.
        exact: X holds integers (or booleans), the result is int64 and right to the last digit.
        mask: (..., n), true for the nodes that are there, for graphs that were padded to one size.
        as_matrix: polynomials with two marks that are one node come as diagonal matrices; false: as their diagonals.
        path: steps as of `contraction_plan`, which is what is taken by default.

    Returns:
        Of shape (...) for order 0, (..., n) for order 1, (..., n, n) for order 2.

    Raises:
        ValueError: where X, mask or path do not fit H, or X is not what `simple` says.
        TypeError: for X of integers without `exact`, or of other numbers with it.
        OverflowError: where an exact result does not fit into int64.

    Source: equations of section 3; theorem 3.1.
    """
    if exact:
        return _exactly(X, H, injective, simple, mask, as_matrix, path)
    values = _prepared(X, [H], mask)
    if simple:
        _require_simple(values)
    (result,) = _evaluate(values, [H], injective, simple, mask, path)
    if H.order == 2 and H.marks[0] == H.marks[1] and not as_matrix:
        result = result.diagonal(dim1=-2, dim2=-1)
    return result.reshape((*_batch_shape(X, H), *result.shape[1:])).to(X.dtype)


class GraphPolynomials(nn.Module):
    """Many polynomials of the same graphs at once; what they have in common is computed once.

    Args:
        graphs: the multigraphs; those of lower order than the highest are lifted to it as in the paper: invariants to
            constants, values at nodes to the diagonal.
        injective: Q_H instead of P_H.
        simple: the graphs to come are simple, which saves terms of Q_H (not checked here).

    Shape: `(*batch, n, n)`, or `(*batch, n, n, channels)` where edges name channels, and at will a mask `(*batch, n)`
        -> `(*batch, graphs)` for order 0, `(*batch, graphs, n)` for 1, `(*batch, graphs, n, n)` for 2.

    Raises:
        ValueError: for no graphs, some with channels and some without, or an input that is not square.

    Example:
        >>> triangles = GraphPolynomials([Multigraph([(0, 1), (1, 2), (0, 2)], [0])])
        >>> triangles(1 - torch.eye(4))
        tensor([[6., 6., 6., 6.]])
    """

    def __init__(self, graphs: Sequence[Multigraph], *, injective: bool = False, simple: bool = False) -> None:
        super().__init__()
        self.graphs = tuple(graphs)
        if not self.graphs:
            raise ValueError("graphs must hold at least one multigraph, got none")
        _labelled(self.graphs)
        self.injective, self.simple = injective, simple
        self.order = max(H.order for H in self.graphs)

    def forward(self, X: Shaped[Tensor, "..."], mask: Shaped[Tensor, "..."] | None = None) -> Shaped[Tensor, "..."]:
        values = _prepared(X, self.graphs, mask)
        results = _evaluate(values, self.graphs, self.injective, self.simple, mask, None)
        lifted = [_lifted(result, H.order, self.order, values.shape[1]) for result, H in zip(results, self.graphs)]
        stacked = torch.stack(lifted, 1)
        return stacked.reshape((*_batch_shape(X, self.graphs[0]), *stacked.shape[1:])).to(X.dtype)

    def extra_repr(self) -> str:
        kind = "Q" if self.injective else "P"
        return f"{len(self.graphs)} polynomials {kind}_H of order {self.order}"


def edge_list_polynomials(
    edge_index: Shaped[Tensor, "..."],
    graphs: Sequence[Multigraph],
    *,
    num_nodes: int | None = None,
    edge_weight: Shaped[Tensor, " edges"] | None = None,
    batch: Shaped[Tensor, "..."] | None = None,
    num_graphs: int | None = None,
    pairs: Shaped[Tensor, "2 pairs"] | None = None,
) -> list[Shaped[Tensor, " values"]]:
    """P_H of large sparse graphs, never as an n x n tensor; in float64 on the CPU, without gradients.

    Sums over a node are products of sparse matrices, joins run over edges: a diamond K4 - e costs the sum over edges of
    their squared number of common neighbours.

    Args:
        edge_index: (2, edges): source and target of each edge, X[source, target] = weight; repeated edges add up.
        graphs: multigraphs without channels.
        num_nodes: by default the largest in `edge_index`, plus one.
        edge_weight: 1 by default.
        batch: (nodes,): to which graph each node belongs, as in PyTorch Geometric; by default all to one.
        num_graphs: by default the largest in `batch`, plus one.
        pairs: where values of order 2 are wanted; by default on the edges, in their order.

    Returns:
        For each H: values for each graph (order 0), each node (order 1) or each pair (order 2), float64.

    Raises:
        ValueError: where an index is out of range, an edge leads from one graph of the batch into another, or edges of
            H name channels.
    """
    from scipy.sparse import csr_array

    if _labelled(graphs):
        raise ValueError("graphs must have edges without channels here, got channels")
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must be (2, edges), got {tuple(edge_index.shape)}")
    ends = edge_index.cpu().numpy()
    pairs = edge_index if pairs is None else pairs
    count = int(ends.max(initial=-1)) + 1 if num_nodes is None else num_nodes
    if ends.min(initial=0) < 0 or ends.max(initial=-1) >= count:
        raise ValueError(f"edge_index must lie in 0 to {count - 1}, got {ends.min()} to {ends.max()}")
    member = np.zeros(count, dtype=np.int64) if batch is None else batch.cpu().numpy()
    if member.shape != (count,):
        raise ValueError(f"batch must name a graph for each of {count} nodes, got shape {member.shape}")
    if (member[ends[0]] != member[ends[1]]).any():
        raise ValueError("edge_index must not lead from one graph of the batch into another")
    of = max(1 if batch is None else 0, int(member.max(initial=-1)) + 1) if num_graphs is None else num_graphs
    weights = np.ones(ends.shape[1]) if edge_weight is None else edge_weight.detach().cpu().numpy().astype(np.float64)
    calculus = Sparse(csr_array((weights, (ends[0], ends[1])), shape=(count, count)), member, of)
    at = pairs.cpu().numpy()
    return [torch.from_numpy(_sparse_values(_contracted(calculus, H, None), H, calculus, at)) for H in graphs]


def exact_count(X: csr_array, H: Multigraph) -> int:
    """P_H of a sparse matrix of integers that are not negative, for H without marks, right to the last digit.

    Raises:
        OverflowError: where it does not fit into int64.
    """
    member = np.zeros(X.shape[0], dtype=np.int64)
    about = float(_sparse_values(_contracted(Sparse(X.astype(np.float64), member, 1), H, None), H, None, None)[0])
    if about < 2.0**53:  # then no number on the way that counts was rounded: none of them is negative
        return int(about)
    _require_int64(about)
    return int(_sparse_values(_contracted(Sparse(X.astype(np.int64), member, 1), H, None), H, None, None)[0])


# --- one contraction ---


class _State:
    """The factors that are left: a number, a vector for each node, a matrix for each pair r < s (rows r)."""

    def __init__(self, calculus: Calculus) -> None:
        self.calculus = calculus
        self.number: Factor | None = None
        self.vectors: dict[int, Factor] = {}
        self.matrices: dict[tuple[int, int], Factor] = {}
        self.joins: dict[int, Pairs] = {}

    def copy(self) -> _State:
        """The same factors but for the number, which is not part of a block."""
        other = _State(self.calculus)
        other.vectors, other.matrices, other.joins = dict(self.vectors), dict(self.matrices), dict(self.joins)
        return other

    def multiply(self, nodes: tuple[int, ...], factor: Factor) -> None:
        """One more factor, on no node, one, or two (rows are the first)."""
        times = self.calculus.times
        if not nodes:
            self.number = factor if self.number is None else times(self.number, factor)
        elif len(nodes) == 1:
            (node,) = nodes
            self.vectors[node] = times(self.vectors[node], factor) if node in self.vectors else factor
        else:
            row, column = nodes
            if row > column:
                row, column, factor = column, row, self.calculus.transpose(factor)
            known = self.matrices.get((row, column))
            self.matrices[row, column] = factor if known is None else times(known, factor)

    def between(self, row: int, column: int) -> Factor:
        """The matrix of two nodes, the first along its rows."""
        matrix = self.matrices[min(row, column), max(row, column)]
        return matrix if row < column else self.calculus.transpose(matrix)

    def around(self, node: int) -> list[int]:
        return sorted(other for pair in self.matrices if node in pair for other in pair if other != node)

    def drop(self, nodes: Iterable[int]) -> None:
        gone = set(nodes)
        self.vectors = {node: factor for node, factor in self.vectors.items() if node not in gone}
        self.matrices = {pair: factor for pair, factor in self.matrices.items() if not gone & set(pair)}


def _contracted(calculus: Dense | Sparse, H: Multigraph, path: Iterable[Step] | None) -> _State:
    """All but the marked nodes summed over."""
    steps = contraction_plan(H) if path is None else require_path(H, path)
    state = _State(calculus)
    for edge, times in Counter(H.edges).items():
        factor = calculus.power(calculus.leaf(edge[2] if len(edge) == 3 else 0), times)
        if edge[0] == edge[1]:
            state.multiply(edge[:1], calculus.diagonal(factor))
        else:
            state.multiply(edge[:2], factor)
    place = 0
    while place < len(steps):
        nodes, factor, place = _step(state, steps, place)
        state.multiply(nodes, factor)
    return state


def _step(state: _State, steps: Sequence[Step], place: int) -> tuple[tuple[int, ...], Factor, int]:
    """Does the step at `place`, a join with all steps up to its sum; gives the new factor and the next place."""
    if steps[place].kind == "sum":
        nodes, factor = _summed(state, steps[place].nodes[0])
        return nodes, factor, place + 1
    end = block_end(steps, place)
    gone = [node for step in steps[place:end] for node in step.nodes if node in state.vectors or state.around(node)]
    # What is left of a block depends on its factors and on how its nodes lie to each other, not on their numbers.
    left = sorted({other for node in gone for other in state.around(node)} - set(gone))
    label = {node: number for number, node in enumerate([*gone, *left])}
    made = [step.makes for step in steps[place:end] if step.makes is not None]
    label |= {node: -1 - number for number, node in enumerate(made)}
    touched = [pair for pair in state.matrices if set(pair) & set(gone)]
    ordered = [pair if label[pair[0]] < label[pair[1]] else pair[::-1] for pair in touched]
    named = sorted([(label[r], label[s], state.between(r, s)) for r, s in ordered], key=lambda entry: entry[:2])
    named += sorted([(label[r], label[r], state.vectors[r]) for r in gone if r in state.vectors], key=lambda e: e[0])
    what = (
        "block",
        tuple((step.kind, *(label[node] for node in step.nodes)) for step in steps[place:end]),
        tuple(entry[:2] for entry in named),
    )
    factor = state.calculus.once(what, [entry[2] for entry in named], lambda: _block(state, steps[place:end]))
    state.drop(gone)
    return tuple(left), factor, end


def _summed(state: _State, node: int) -> tuple[tuple[int, ...], Factor]:
    """The sum over the index of a node with at most two neighbours."""
    calculus, around, vector = state.calculus, state.around(node), state.vectors.get(node)
    if len(around) > 2:
        raise ValueError(f"path sums over node {node}, which still has {len(around)} neighbours; join it before")
    if len(around) == 2:
        first, second = around
        left, right = state.between(first, node), state.between(node, second)
        factor = calculus.product(left, vector, right)
    elif around:
        factor = calculus.apply(state.between(around[0], node), vector)
    else:
        assert vector is not None  # every node lies on an edge, whose factor has come down to a vector by now
        factor = calculus.total(vector, state.joins.get(node))
    state.drop([node])
    return tuple(around), factor


def _block(state: _State, steps: Sequence[Step]) -> Any:
    """The value of what a join and the steps up to its sum leave, a chunk of its pairs at a time."""
    calculus, (one, other), makes = state.calculus, steps[0].nodes, steps[0].makes
    assert makes is not None
    matrix = state.between(one, other)
    near = {node: tuple(n for n in (one, other) if n in state.around(node)) for node in steps[0].neighbors}
    # Where both joined nodes have the same factors, pairs (c, d) and (d, c) give the same: half of them will do.
    half = (
        len(steps) == 2
        and matrix.symmetric
        and state.vectors.get(one) is state.vectors.get(other)
        and all(len(ends) == 2 and state.between(one, n) is state.between(other, n) for n, ends in near.items())
    )
    width = max((state.between(ends[0], node).value.shape[-1] for node, ends in near.items()), default=1)
    result = None
    for pairs in calculus.pairs(matrix, half, width, [state.joins.get(one), state.joins.get(other)]):
        places = {one: pairs.rows, other: pairs.columns}
        local = state.copy()
        local.drop([one, other])
        local.joins[makes] = pairs
        weights = pairs.weights
        for node, at in places.items():
            if node in state.vectors:
                weights = calculus.times(weights, calculus.entries(state.vectors[node], at))
        local.multiply((makes,), weights)
        known: dict[tuple[int, ...], Factor] = {}  # the marks of a diamond have the same rows
        for node, ends in near.items():
            key = tuple(number for end in ends for number in (end, state.between(end, node).number))
            if key not in known:
                rows = [calculus.rows(state.between(end, node), places[end]) for end in ends]
                known[key] = rows[0] if len(rows) == 1 else calculus.times(*rows)
            local.multiply((makes, node), known[key])
        place = 1
        while place < len(steps):
            nodes, factor, place = _step(local, steps, place)
            if place < len(steps):
                local.multiply(nodes, factor)
        result = factor.value if result is None else calculus.add(result, factor.value)
    return result


# --- from factors to results ---


@torch.compiler.disable  # plans are Python over graphs: a compiled network calls them between its own two parts
def _evaluate(
    X: Tensor,
    graphs: Sequence[Multigraph],
    injective: bool,
    simple: bool,
    mask: Tensor | None,
    path: Iterable[Step] | None,
) -> list[Tensor]:
    """Each polynomial of X (batch, n, n, ...), as (batch), (batch, n) or (batch, n, n)."""
    batch, n = X.shape[:2]
    present = None if mask is None else mask.reshape(batch, n).to(X.dtype)
    if present is not None:
        grid = present[:, :, None] * present[:, None, :]
        X = X * (grid if X.ndim == 3 else grid[..., None])
    fixed = X.is_meta or torch.compiler.is_compiling()
    calculus = Dense(X, everywhere=fixed or (X.requires_grad and torch.is_grad_enabled()))
    if injective and path is not None:
        raise ValueError("path is for P_H alone: Q_H is a sum of many, each of which has its own")

    def value(H: Multigraph) -> Tensor:
        return _dense_value(_contracted(calculus, H, path), H, X, present)

    with without_autocast(X.device):  # counts in bfloat16 would be wrong from 256 on
        if not injective:
            return [value(H) for H in graphs]
        results = []
        for H in graphs:
            total = X.new_zeros((batch, *[n] * H.order))
            for F, weight in injective_terms(H, simple=simple).items():
                total = total + weight * value(F)
            results.append(total)
    return results


def _dense_value(state: _State, H: Multigraph, X: Tensor, present: Tensor | None) -> Tensor:
    batch, n = X.shape[:2]
    number = X.new_ones(batch) if state.number is None else state.number.value
    if H.order == 0:
        return number
    ones = X.new_ones(batch, n) if present is None else present
    one = H.marks[0]
    first = number[:, None] * (state.vectors[one].value if one in state.vectors else ones)
    if H.order == 1:
        return first
    other = H.marks[1]
    if one == other:
        return torch.diag_embed(first)
    second = state.vectors[other].value if other in state.vectors else ones
    if not state.matrices:
        return first[:, :, None] * second[:, None, :]
    result = state.between(one, other).value
    if one in state.vectors or state.number is not None:
        result = result * first[:, :, None]
    return result * second[:, None, :] if other in state.vectors else result


def _sparse_values(state: _State, H: Multigraph, calculus: Sparse | None, at: np.ndarray | None) -> np.ndarray:
    number = state.number.value if state.number is not None else np.ones(1 if calculus is None else calculus.count)
    if H.order == 0 or calculus is None or at is None:
        return number
    ones = np.ones(len(calculus.graphs))
    one = H.marks[0]
    first = number[calculus.graphs] * (state.vectors[one].value if one in state.vectors else ones)
    if H.order == 1:
        return first
    other = H.marks[1]
    rows, columns = at
    if one == other:
        return np.where(rows == columns, first[rows], 0.0)
    values = first[rows] * (state.vectors[other].value if other in state.vectors else ones)[columns]
    if state.matrices:
        entries = state.between(one, other).value[rows, columns] if len(rows) else np.zeros(0)
        values = values * np.asarray(entries).reshape(-1)
    return np.where(calculus.graphs[rows] == calculus.graphs[columns], values, 0.0)


def _lifted(result: Tensor, order: int, to: int, n: int) -> Tensor:
    if order == 1 and to == 2:
        return torch.diag_embed(result)
    for _ in range(to - order):
        result = result[..., None].expand(*result.shape, n)
    return result


def _exactly(
    X: Tensor,
    H: Multigraph,
    injective: bool,
    simple: bool,
    mask: Tensor | None,
    as_matrix: bool,
    path: Iterable[Step] | None,
) -> Tensor:
    """In float64 where that has digits enough, else in int64, which is right modulo 2**64 all the way."""
    if X.is_floating_point() or X.is_complex():
        raise TypeError(f"X must hold integers or booleans where exact is true, got {X.dtype}")
    options: dict[str, Any] = {"mask": mask, "as_matrix": as_matrix, "path": path}
    # No number of the way is larger than that of |X|, and Q_H is a part of it.
    bound = graph_polynomial(X.double().abs(), H, **options)
    largest = float(bound.max()) if bound.numel() else 0.0
    _require_int64(largest)
    if not injective and largest < 2.0**53:
        found = bound if not (X < 0).any() else graph_polynomial(X.double(), H, **options)
        return found.round().long()
    values = _prepared(X.long(), [H], mask)
    if simple:
        _require_simple(values)
    (result,) = _evaluate(values, [H], injective, simple, mask, path)
    if H.order == 2 and H.marks[0] == H.marks[1] and not as_matrix:
        result = result.diagonal(dim1=-2, dim2=-1)
    return result.reshape((*_batch_shape(X, H), *result.shape[1:]))


def _require_int64(largest: float) -> None:
    if largest >= 2.0**63 * (1 - 1e-9):
        raise OverflowError(f"an exact result must fit into int64, got one of about {largest:.3g}")


def _labelled(graphs: Sequence[Multigraph]) -> bool:
    kinds = {H.labelled for H in graphs if H.degree}
    if len(kinds) > 1:
        raise ValueError("graphs must all have edges with channels, or all without, got both")
    return kinds == {True}


def _batch_shape(X: Tensor, H: Multigraph) -> tuple[int, ...]:
    return tuple(X.shape[: -3 if H.labelled else -2])


def _prepared(X: Tensor, graphs: Sequence[Multigraph], mask: Tensor | None) -> Tensor:
    """X as (batch, n, n) or (batch, n, n, channels), in a precision to compute in."""
    labelled = _labelled(graphs)
    tail = 3 if labelled else 2
    shape = tuple(X.shape)
    if len(shape) < tail or shape[len(shape) - tail] != shape[len(shape) - tail + 1]:
        raise ValueError(f"X must be (..., n, n{', channels' if labelled else ''}), got {shape}")
    if labelled and (most := max(edge[2] for H in graphs for edge in H.edges)) >= shape[-1]:
        raise ValueError(f"X must have more than {most} channels, which H names, got {shape}")
    if mask is not None and tuple(mask.shape) != shape[: 1 - tail]:
        raise ValueError(f"mask must be {shape[: 1 - tail]} for X of {shape}, got {tuple(mask.shape)}")
    if not X.is_floating_point() and X.dtype != torch.int64:
        raise TypeError(f"X must be of floating point unless exact is true, got {X.dtype}")
    # Not reshape(-1, ...), which cannot tell how many graphs of no nodes there are.
    flat = X.reshape(math.prod(shape[:-tail]), *shape[-tail:])
    return flat.to(at_least_float32(flat.dtype))


def _require_simple(X: Tensor) -> None:
    loops = X.diagonal(dim1=-2, dim2=-1) if X.ndim == 3 else X.diagonal(dim1=1, dim2=2)
    if not ((X == 0) | (X == 1)).all() or not torch.equal(X, X.transpose(1, 2)) or loops.any():
        raise ValueError("X must be a simple graph's: symmetric, 0 or 1, with a diagonal of zeros; leave simple false")
