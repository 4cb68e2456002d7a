"""Tensor attention: one query attends to pairs (or longer tuples) of keys, exactly in tiles or in almost linear time.

For whoever needs to detect triples of related tokens, which no layer of ordinary attention of bounded size can: as a
function, as a layer in the place of `nn.MultiheadAttention`, and with an error that is certified beforehand.
Alman, Song, "How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker Computation",
2023, arXiv 2310.04064 (the definition, its general order, the almost linear algorithm).
"""

from lathe.nn.tensor_attention.approximate import PolyPlan, plan_poly
from lathe.nn.tensor_attention.attention import tensor_attention
from lathe.nn.tensor_attention.layers import HigherOrderAttention, HuggingFaceAttention
from lathe.nn.tensor_attention.matching import match2, match3, match3_head
from lathe.nn.tensor_attention.polynomials import (
    degree_for,
    error_bound,
    exp_poly,
    khatri_rao,
    monomial_features,
    poly_rank,
)

__all__ = [
    "HigherOrderAttention",
    "HuggingFaceAttention",
    "PolyPlan",
    "degree_for",
    "error_bound",
    "exp_poly",
    "khatri_rao",
    "match2",
    "match3",
    "match3_head",
    "monomial_features",
    "plan_poly",
    "poly_rank",
    "tensor_attention",
]
