"""Networks whose features keep learning as they grow wide: the theory, your own model, and the limits themselves.

Judges any scaling rule of weights and learning rates (`ABC`); re-parametrises your model so that the rates tuned on a
narrow copy stay right on the wide one (`parametrize`, `coordinate_check`); and trains infinitely wide networks
(`LinearMuPLimit`, `ParticleLimit`, `Word2Vec`, first-order MAML).

Yang and Hu, "Feature Learning in Infinite-Width Neural Networks" (Tensor Programs IV), 2020, arXiv 2011.14522; the
rules for models and Adam from Yang et al., "Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer", 2022,
arXiv 2203.03466.
"""

from __future__ import annotations

from lathe.theory.infinite_width_feature_learning.abc import ABC, ABCNetwork
from lathe.theory.infinite_width_feature_learning.parametrize import (
    Parametrization,
    ScaledTensor,
    parametrize,
    update_rule,
)
from lathe.theory.infinite_width_feature_learning.readouts import (
    MuConv1dReadout,
    MuConv3dReadout,
    MuConvReadout,
    MuReadout,
    fold_,
)

__all__ = [
    "ABC",
    "ABCNetwork",
    "MuConv1dReadout",
    "MuConv3dReadout",
    "MuConvReadout",
    "MuReadout",
    "Parametrization",
    "ScaledTensor",
    "fold_",
    "parametrize",
    "update_rule",
]
