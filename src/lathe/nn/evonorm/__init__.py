"""EvoNorm: one layer that normalises and activates, and the search that found it.

Drop-in layers for BatchNorm + ReLU (B0, B1, B2) and for GroupNorm + ReLU (S0, S1, S2); `replace_norm_act` puts them
into any network; `evolve_norm_act` searches for such layers from elementary operations, on networks and data of yours.
Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020, arXiv 2004.02967, Tables 1 and 2, Section 3.
"""

from lathe.nn.evonorm.graph import (
    BASELINE_GRAPHS,
    EVONORM_GRAPHS,
    GraphLayer,
    Node,
    NormActGraph,
    mutate,
    random_graph,
)
from lathe.nn.evonorm.layers import EvoNormB0, EvoNormB1, EvoNormB2, EvoNormS0, EvoNormS1, EvoNormS2
from lathe.nn.evonorm.search import (
    Candidate,
    CheckReport,
    SearchResult,
    evolve_norm_act,
    pareto_front,
    quality_check,
    rerank,
    stability_check,
    structural_check,
)
from lathe.nn.evonorm.surgery import replace_norm_act

__all__ = [
    "BASELINE_GRAPHS",
    "EVONORM_GRAPHS",
    "Candidate",
    "CheckReport",
    "EvoNormB0",
    "EvoNormB1",
    "EvoNormB2",
    "EvoNormS0",
    "EvoNormS1",
    "EvoNormS2",
    "GraphLayer",
    "Node",
    "NormActGraph",
    "SearchResult",
    "evolve_norm_act",
    "mutate",
    "pareto_front",
    "quality_check",
    "random_graph",
    "replace_norm_act",
    "rerank",
    "stability_check",
    "structural_check",
]
