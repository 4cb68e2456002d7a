"""Equivariant tensor products behind one interface: choose the cheapest that can express the interaction you need.

For whoever builds E(3)-equivariant networks in the irreps notation of e3nn: Clebsch-Gordan, Gaunt, matrix and
vector-signal products, with measures of what each can express. Xie, Daigavane, Kotak, Smidt, "The Price of Freedom:
Exploring Expressivity and Runtime Tradeoffs in Equivariant Tensor Products", 2025, arXiv 2506.13523 (sections 3 to 5).
"""

from lathe.nn.equivariant_tensor_products.clebsch_gordan import ClebschGordanProduct, Path
from lathe.nn.equivariant_tensor_products.field_product import ExpressivityError, FieldProduct
from lathe.nn.equivariant_tensor_products.functional import (
    cg_product,
    gaunt_product,
    gaunt_product_of_many,
    matrix_product,
    vector_signal_product,
)
from lathe.nn.equivariant_tensor_products.harmonics import (
    clebsch_gordan,
    from_sphere,
    gaunt_coefficients,
    sphere_grid,
    spherical_harmonics,
    to_sphere,
    vector_spherical_harmonics,
    wigner_d,
)
from lathe.nn.equivariant_tensor_products.irreps import Irrep, Irreps
from lathe.nn.equivariant_tensor_products.measures import (
    Cost,
    InteractionReport,
    cheapest_product,
    cost,
    expressivity,
    interaction_report,
    interactions,
)
from lathe.nn.equivariant_tensor_products.products import GauntProduct, MatrixProduct, VectorSignalProduct

__all__ = [
    "ClebschGordanProduct",
    "Cost",
    "ExpressivityError",
    "FieldProduct",
    "GauntProduct",
    "InteractionReport",
    "Irrep",
    "Irreps",
    "MatrixProduct",
    "Path",
    "VectorSignalProduct",
    "cg_product",
    "cheapest_product",
    "clebsch_gordan",
    "cost",
    "expressivity",
    "from_sphere",
    "gaunt_coefficients",
    "gaunt_product",
    "gaunt_product_of_many",
    "interaction_report",
    "interactions",
    "matrix_product",
    "sphere_grid",
    "spherical_harmonics",
    "to_sphere",
    "vector_signal_product",
    "vector_spherical_harmonics",
    "wigner_d",
]
