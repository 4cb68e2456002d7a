"""Predicts and measures the geometry that the last layers of a classifier take: neural collapse.

Says from class counts and penalties how long each class's classifier and features will be, and which rare class is
given up; measures on any trained network how near it has come (NC1 to NC4).

Dang, Tran, Osher, Tran-The, Ho and Nguyen, "Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced
Data", ICML 2023, arXiv 2301.00437: features as free variables ("unconstrained features") under M linear layers, squared
error or cross-entropy and a penalty on every factor; balanced classes (simplex, orthogonal frame) and imbalanced ones
(general orthogonal frame).
Beyond the paper: a free bias on imbalanced data and real-valued targets, by shrinking the targets' singular values.
Conventions: K classes with n_k of N samples; penalties `weight_decay / 2 |W_m|^2` and `feature_decay / 2 |H|^2`, the
latter summed over all samples; squared error `1 / (2 N)` times the sum over samples and classes.
"""

from __future__ import annotations

from lathe.theory.neural_collapse.accumulator import NCReport, NeuralCollapse
from lathe.theory.neural_collapse.frames import general_orthogonal_frame, orthogonal_frame, simplex_etf
from lathe.theory.neural_collapse.head import DeepLinearHead, UFMLoss, UnconstrainedFeatures
from lathe.theory.neural_collapse.optimum import (
    GOF,
    CrossEntropyETF,
    UFMOptimum,
    collapse_threshold,
    cross_entropy_etf,
    gof,
    max_weight_decay,
    ufm_optimum,
)
from lathe.theory.neural_collapse.probe import neural_collapse

__all__ = [
    "GOF",
    "CrossEntropyETF",
    "DeepLinearHead",
    "NCReport",
    "NeuralCollapse",
    "UFMLoss",
    "UFMOptimum",
    "UnconstrainedFeatures",
    "collapse_threshold",
    "cross_entropy_etf",
    "general_orthogonal_frame",
    "gof",
    "max_weight_decay",
    "neural_collapse",
    "orthogonal_frame",
    "simplex_etf",
    "ufm_optimum",
]
