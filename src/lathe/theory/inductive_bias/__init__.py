"""How much prior knowledge a task needs beyond what a class of functions supplies, in nats.

Compares tasks by difficulty, and architectures by the knowledge that they bring: minus the log of the probability that
a random hypothesis which fits the training data reaches a given test loss. Kernel spaces exactly, networks by an
ensemble trained at once, anything else from a vector of losses.

Boopathy, Yue, Hwang, Iyer and Fiete, "Towards Exact Computation of Inductive Bias", 2024, IJCAI, arXiv 2406.15941:
definition (section 3), sampling hypotheses (algorithm 1), the scaled non-central chi-squared tail (section 4). The
exact law of kernel hypotheses is ours.
"""

from __future__ import annotations

from lathe.theory.inductive_bias.estimate import InductiveBias, RelativeBias, Task, inductive_bias, relative_bias
from lathe.theory.inductive_bias.fits import Beta, FittedLaw, ScaledChi2, fit_losses, match_cumulants
from lathe.theory.inductive_bias.kernel_space import (
    BiasCurve,
    KernelHypotheses,
    kernel_hypotheses,
    kernel_inductive_bias,
    required_bias_curve,
)
from lathe.theory.inductive_bias.laws import (
    beta_log_cdf,
    ncx2_log_cdf,
    ncx2_log_prob,
    weighted_chi2_cumulants,
    weighted_chi2_log_cdf,
)
from lathe.theory.inductive_bias.networks import NetworkEnsemble, network_inductive_bias, train_networks

__all__ = [
    "Beta",
    "BiasCurve",
    "FittedLaw",
    "InductiveBias",
    "KernelHypotheses",
    "NetworkEnsemble",
    "RelativeBias",
    "ScaledChi2",
    "Task",
    "beta_log_cdf",
    "fit_losses",
    "inductive_bias",
    "kernel_hypotheses",
    "kernel_inductive_bias",
    "match_cumulants",
    "ncx2_log_cdf",
    "ncx2_log_prob",
    "network_inductive_bias",
    "relative_bias",
    "required_bias_curve",
    "train_networks",
    "weighted_chi2_cumulants",
    "weighted_chi2_log_cdf",
]
