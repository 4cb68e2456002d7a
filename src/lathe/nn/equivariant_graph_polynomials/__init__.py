"""Equivariant polynomials of graphs: what a graph network cannot compute, and the features that make up for it.

For whoever has a graph network and wants to know which substructures it can never count, to hand it those values fast,
or to count small graphs in large ones exactly. Puny, Lim, Kiani, Maron, Lipman, "Equivariant Polynomials for Graph
Neural Networks", 2023, arXiv 2302.11556 (theorem 3.1: the basis; section 4: the decision procedure; section 5: PPGN++).
"""

from lathe.nn.equivariant_graph_polynomials.basis import (
    count_basis,
    equivariant_basis,
    homomorphism_terms,
    injective_terms,
)
from lathe.nn.equivariant_graph_polynomials.contraction import (
    GraphPolynomials,
    edge_list_polynomials,
    graph_polynomial,
)
from lathe.nn.equivariant_graph_polynomials.counting import (
    PolynomialRegression,
    homomorphism_count,
    separates,
    subgraph_count,
)
from lathe.nn.equivariant_graph_polynomials.expressivity import (
    expressive_degree,
    generating_polynomials,
    missing_polynomials,
    polynomial_expressive,
)
from lathe.nn.equivariant_graph_polynomials.features import augment, paper_polynomials, scaled_features
from lathe.nn.equivariant_graph_polynomials.multigraph import Multigraph
from lathe.nn.equivariant_graph_polynomials.plan import Step, contraction_plan
from lathe.nn.equivariant_graph_polynomials.ppgn import PPGN, PPGNBlock, PPGNConv

__all__ = [
    "PPGN",
    "GraphPolynomials",
    "Multigraph",
    "PPGNBlock",
    "PPGNConv",
    "PolynomialRegression",
    "Step",
    "augment",
    "contraction_plan",
    "count_basis",
    "edge_list_polynomials",
    "equivariant_basis",
    "expressive_degree",
    "generating_polynomials",
    "graph_polynomial",
    "homomorphism_count",
    "homomorphism_terms",
    "injective_terms",
    "missing_polynomials",
    "paper_polynomials",
    "polynomial_expressive",
    "scaled_features",
    "separates",
    "subgraph_count",
]
