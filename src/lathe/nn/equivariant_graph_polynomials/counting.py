"""Exact counts of small graphs in large ones, pairs that a function tells apart, and regression on the basis itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from lathe.nn.equivariant_graph_polynomials.basis import equivariant_basis, injective_terms
from lathe.nn.equivariant_graph_polynomials.contraction import GraphPolynomials, exact_count
from lathe.nn.equivariant_graph_polynomials.multigraph import Multigraph

if TYPE_CHECKING:
    import networkx as nx
    from scipy.sparse import csr_array

__all__ = ["PolynomialRegression", "homomorphism_count", "separates", "subgraph_count"]


def homomorphism_count(H: Multigraph | nx.Graph, G: nx.Graph | Shaped[Tensor, "n n"]) -> int:
    """The number of maps from the nodes of H to those of G that take edges to edges: P_H of G's adjacency, exactly.

    Args:
        H: without marks.
        G: an undirected graph, with loops if need be, or its 0/1 adjacency.

    Raises:
        ValueError: for marks, or an adjacency that is not square, symmetric and 0 or 1.
        OverflowError: where the count does not fit into int64.
    """
    return exact_count(_adjacency(G), _pattern(H))


def subgraph_count(H: Multigraph | nx.Graph, G: nx.Graph | Shaped[Tensor, "n n"], *, induced: bool = False) -> int:
    """The number of subgraphs of G that are isomorphic to H: Q_H over H's automorphisms, exactly.

    Args:
        H: simple and without marks.
        G: a simple undirected graph, or its adjacency.
        induced: count only those between whose nodes G has no further edges. The sum runs over all graphs between H and
            the complete graph on its nodes: 2 to the number of missing edges.

    Raises:
        ValueError: where H or G is not simple, H is marked, or an adjacency is not square.
        OverflowError: where a count of homomorphisms on the way does not fit into int64.
    """
    pattern, X = _pattern(H), _adjacency(G)
    if not pattern.simple:
        raise ValueError(f"H must have no loops and no repeated edges, got {pattern.edges}")
    if X.diagonal().any():
        raise ValueError("G must have no loops")
    known: dict[Multigraph, int] = {}

    def injective(graph: Multigraph) -> int:
        total = 0
        for F, weight in injective_terms(graph, simple=True).items():
            if F not in known:
                known[F] = exact_count(X, F)
            total += weight * known[F]
        return total

    if not induced:
        count = injective(pattern)
    else:
        edges = {frozenset(edge) for edge in pattern.edges}
        pairs = itertools.combinations(range(pattern.num_nodes), 2)
        missing = [pair for pair in pairs if frozenset(pair) not in edges]
        count = sum(
            (-1) ** size * injective(Multigraph([*pattern.edges, *more], (), pattern.num_nodes))
            for size in range(len(missing) + 1)
            for more in itertools.combinations(missing, size)
        )
    return count // pattern.automorphisms(directed=False)


def separates(
    graphs: Sequence[Any] | Tensor, function: Callable[[Any], Any], tolerance: float = 1e-7
) -> Bool[Tensor, "graphs graphs"]:
    """Which pairs of graphs a function tells apart: those whose values differ by more than `tolerance` (L2).

    Args:
        graphs: whatever `function` takes; a tensor (graphs, n, n) too.
        function: called with one graph; gives a number or a tensor.
        tolerance: as a plain distance; choose it well above rounding, and compute in float64.

    Returns:
        True at (i, j) where graphs i and j are told apart; false on the diagonal.
    """
    if len(graphs) == 0:
        return torch.zeros(0, 0, dtype=torch.bool)
    with torch.no_grad():
        values = torch.stack([torch.as_tensor(function(graph), dtype=torch.float64).flatten() for graph in graphs])
    # Differences themselves, not |a|^2 + |b|^2 - 2 ab, which would round away what is asked for.
    rows = [torch.linalg.vector_norm(values - row, dim=1) > tolerance for row in values]
    return torch.stack(rows)


@dataclass(frozen=True)
class _Fit:
    mean: Tensor
    scale: Tensor
    weights: Tensor
    intercept: float


class PolynomialRegression:
    """A linear model on the basis: which substructures, counted, make up a property of graphs?

    Features are the polynomials of connected simple graphs up to a degree, standardised over the training graphs; ridge
    regression in closed form. `coefficients` names the weight of each multigraph.

    Args:
        degree: largest number of edges.
        order: 0 for one target a graph, 1 for one a node, 2 for one a pair of nodes.
        ridge: weight of the squared coefficients, in units of the number of targets.
        injective: counts of copies (Q_H) instead of homomorphisms (P_H).

    Source: ours; the basis is the paper's.
    """

    def __init__(self, degree: int, order: int = 0, *, ridge: float = 1e-6, injective: bool = True) -> None:
        if ridge < 0:
            raise ValueError(f"ridge must not be negative, got {ridge}")
        graphs = [H for d in range(1, degree + 1) for H in equivariant_basis(d, order, simple=True, connected=True)]
        if not graphs:
            raise ValueError(f"degree must be at least 1, got {degree}")
        self.order, self.ridge = order, ridge
        self.polynomials = GraphPolynomials(graphs, injective=injective, simple=True)
        self._fit: _Fit | None = None

    def fit(self, X: Float[Tensor, "graphs n n"], y: Float[Tensor, "graphs *values"]) -> PolynomialRegression:
        """Learns from adjacencies and their targets.

        Raises:
            ValueError: where y is not one value for each graph, node or pair, as the order says.
        """
        expected = (len(X), *[X.shape[-1]] * self.order)
        if tuple(y.shape) != expected:
            raise ValueError(f"y must be {expected} for order {self.order}, got {tuple(y.shape)}")
        features = self._features(X)
        mean, scale = features.mean(0), features.std(0, correction=0)
        scale = torch.where(scale > 0, scale, 1.0)
        target = y.double().flatten()
        A = (features - mean) / scale
        gram = A.T @ A / len(A) + self.ridge * torch.eye(A.shape[1], dtype=A.dtype)
        weights = torch.linalg.lstsq(gram, A.T @ (target - target.mean()) / len(A), driver="gelsd").solution
        self._fit = _Fit(mean, scale, weights, float(target.mean()))
        return self

    def predict(self, X: Float[Tensor, "graphs n n"]) -> Float[Tensor, "graphs *values"]:
        """The targets of new graphs, float64.

        Raises:
            RuntimeError: before `fit`.
        """
        fit = self._fitted()
        values = ((self._features(X) - fit.mean) / fit.scale) @ fit.weights + fit.intercept
        return values.reshape(len(X), *[X.shape[-1]] * self.order)

    @property
    def coefficients(self) -> dict[Multigraph, float]:
        """What one more copy (or homomorphism) of each multigraph adds.

        Raises:
            RuntimeError: before `fit`.
        """
        fit = self._fitted()
        return dict(zip(self.polynomials.graphs, (fit.weights / fit.scale).tolist()))

    def _fitted(self) -> _Fit:
        if self._fit is None:
            raise RuntimeError("fit must be called first")
        return self._fit

    def _features(self, X: Tensor) -> Tensor:
        return self.polynomials(X.double()).movedim(1, -1).flatten(0, -2)


def _pattern(H: Multigraph | nx.Graph) -> Multigraph:
    pattern = H if isinstance(H, Multigraph) else Multigraph.from_networkx(H)
    if pattern.order:
        raise ValueError(f"H must have no marks, got {pattern.marks}")
    return pattern


def _adjacency(G: nx.Graph | Tensor) -> csr_array:
    from scipy.sparse import csr_array

    if isinstance(G, Tensor):
        if G.ndim != 2 or G.shape[0] != G.shape[1]:
            raise ValueError(f"G must be an adjacency (n, n), got {tuple(G.shape)}")
        if not torch.equal(G, G.T) or not ((G == 0) | (G == 1)).all():
            raise ValueError("G must be symmetric with entries 0 and 1")
        return csr_array(G.cpu().numpy().astype(np.int64))
    number = {node: place for place, node in enumerate(G.nodes)}
    ends = np.array([(number[r], number[s]) for r, s in G.edges()], dtype=np.int64).reshape(-1, 2)
    both = np.concatenate([ends, ends[ends[:, 0] != ends[:, 1]][:, ::-1]])
    matrix = csr_array((np.ones(len(both), dtype=np.int64), (both[:, 0], both[:, 1])), shape=(len(number),) * 2)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix
