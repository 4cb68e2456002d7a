"""Networks whose features keep learning as they grow wide: the theory, your own model, and the limits themselves.

Judges any scaling rule of weights and learning rates (`ABC`); re-parametrises your model so that the rates tuned on a
narrow copy stay right on the wide one (`parametrize`, `coordinate_check`); and trains infinitely wide networks
(`LinearMuPLimit`, `ParticleLimit`, `InfiniteWord2Vec`, `first_order_maml`), beside those that learn no features
(`KernelLearner`).

Yang and Hu, "Feature Learning in Infinite-Width Neural Networks" (Tensor Programs IV), 2020, arXiv 2011.14522; the
rules for models and Adam from Yang et al., "Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer", 2022,
arXiv 2203.03466.
"""

from __future__ import annotations

from lathe.theory.infinite_width_feature_learning.abc import ABC, ABCNetwork
from lathe.theory.infinite_width_feature_learning.coordinates import CoordinateCheck, coordinate_check
from lathe.theory.infinite_width_feature_learning.kernel_learner import KernelLearner
from lathe.theory.infinite_width_feature_learning.limits import (
    LinearMuPLimit,
    LinearNetwork,
    MeanFieldLimit,
    ParticleLimit,
    two_layer_limit,
)
from lathe.theory.infinite_width_feature_learning.maml import Adapted, first_order_maml
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
from lathe.theory.infinite_width_feature_learning.word2vec import InfiniteWord2Vec, Word2Vec

__all__ = [
    "ABC",
    "ABCNetwork",
    "Adapted",
    "CoordinateCheck",
    "InfiniteWord2Vec",
    "KernelLearner",
    "LinearMuPLimit",
    "LinearNetwork",
    "MeanFieldLimit",
    "MuConv1dReadout",
    "MuConv3dReadout",
    "MuConvReadout",
    "MuReadout",
    "Parametrization",
    "ParticleLimit",
    "ScaledTensor",
    "Word2Vec",
    "coordinate_check",
    "first_order_maml",
    "fold_",
    "parametrize",
    "two_layer_limit",
    "update_rule",
]
