"""EvoNorm: one layer that normalises and activates, and the search that found it.

Drop-in layers for BatchNorm + ReLU (B0, B1, B2) and for GroupNorm + ReLU (S0, S1, S2); `replace_norm_act` puts them
into any network; `evolve_norm_act` searches for such layers from elementary operations, on networks and data of yours.
Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020, arXiv 2004.02967, Tables 1 and 2, Section 4.
"""

from lathe.nn.evonorm.layers import EvoNormB0, EvoNormB1, EvoNormB2, EvoNormS0, EvoNormS1, EvoNormS2

__all__ = [
    "EvoNormB0",
    "EvoNormB1",
    "EvoNormB2",
    "EvoNormS0",
    "EvoNormS1",
    "EvoNormS2",
]
