"""Predicts learning curves: how long to train, when overtraining hurts, and which sizes of network it hurts.

Exact average errors of linear networks along training when parameters and samples are comparable in number, the same on
given features or a given network from one decomposition, and what follows: an optimal stopping time, a ridge penalty, a
frozen subspace that keeps large networks safe.

Advani and Saxe, "High-dimensional dynamics of generalization error in neural networks", 2017, arXiv 1710.03667 (with
Sompolinsky in Neural Networks 132, 2020): linear students, their spectrum, stopping and regularisation; deep linear
networks; random features and networks that are not linear; bounds.
Conventions: time is that of gradient flow on `1/2 sum residual^2`; test errors include the noise.
"""

from __future__ import annotations

from lathe.theory.generalization_dynamics.bounds import conditioning_bound, rademacher_bound
from lathe.theory.generalization_dynamics.deep import deep_linear_modes
from lathe.theory.generalization_dynamics.linear import LinearTheory
from lathe.theory.generalization_dynamics.probe import LearningCurves, Recommendation, learning_curves, recommend
from lathe.theory.generalization_dynamics.spectrum import ModeSpectrum
from lathe.theory.generalization_dynamics.students import RandomFeatures, SizeSweep, TeacherStudent, size_sweep
from lathe.theory.generalization_dynamics.trajectories import (
    Trajectory,
    gradient_descent,
    gradient_flow,
    ridge_regression,
)

__all__ = [
    "LearningCurves",
    "LinearTheory",
    "ModeSpectrum",
    "RandomFeatures",
    "Recommendation",
    "SizeSweep",
    "TeacherStudent",
    "Trajectory",
    "conditioning_bound",
    "deep_linear_modes",
    "gradient_descent",
    "gradient_flow",
    "learning_curves",
    "rademacher_bound",
    "recommend",
    "ridge_regression",
    "size_sweep",
]
