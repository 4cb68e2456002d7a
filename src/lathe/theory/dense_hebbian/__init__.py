"""Stores patterns that were only seen as noisy examples, in couplings of P spins, and says how many will come back.

A memory or classifier without gradients, and the chart to design it by: how many patterns, from how many examples of
which quality, at which order P and temperature.

Agliari, Albanese, Alemanno, Alessandrelli, Barra, Giannotti, Lotito and Pedreschi, "Dense Hebbian neural networks: a
replica symmetric picture of supervised learning", 2022, arXiv 2212.00606; its unsupervised companion is 2211.14067.
Conventions: strictly ordered indices; `gamma = (P!/2) K / N^{P-1}`; `beta' = 2 beta / P!`, T' its inverse; quality r,
`rho = (1 - r^2) / (r^2 M)`, `R = r^2 (1 + rho)`. Overlaps: m with the archetype, n with the examples.
"""

from __future__ import annotations

from lathe.theory.dense_hebbian.capacity import (
    Design,
    best_order,
    critical_load,
    one_step_overlap,
    samples_needed,
    zero_temperature,
)
from lathe.theory.dense_hebbian.classifier import DenseHebbianClassifier
from lathe.theory.dense_hebbian.network import DenseHebbian
from lathe.theory.dense_hebbian.patterns import (
    beta_prime,
    dataset_entropy,
    estimate_quality,
    examples,
    load,
    mattis_magnetization,
    noise_couplings,
)
from lathe.theory.dense_hebbian.replica import (
    PHASES,
    RSState,
    phase_diagram,
    replica_symmetric,
    replica_symmetric_examples,
)
from lathe.theory.dense_hebbian.symmetric import elementary_symmetric

__all__ = [
    "PHASES",
    "DenseHebbian",
    "DenseHebbianClassifier",
    "Design",
    "RSState",
    "best_order",
    "beta_prime",
    "critical_load",
    "dataset_entropy",
    "elementary_symmetric",
    "estimate_quality",
    "examples",
    "load",
    "mattis_magnetization",
    "noise_couplings",
    "one_step_overlap",
    "phase_diagram",
    "replica_symmetric",
    "replica_symmetric_examples",
    "samples_needed",
    "zero_temperature",
]
