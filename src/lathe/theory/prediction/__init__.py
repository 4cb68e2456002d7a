"""Tells what your network will do before it is trained: `predict(model, example_input)`.

Layer by layer the kernel and its susceptibilities at initialisation, beside a simulation of that very network; and for
the whole: whether it sits at criticality and how to set it there, how deep it is for its width, which parametrisation
it has and which learning rates survive widening. On the command line: `lathe predict package.module:function`.

Stands on Roberts, Yaida and Hanin 2021 (arXiv 2106.10165) for kernels, criticality and fluctuations; Yang and Hu 2020
(arXiv 2011.14522) for widening; Yang et al. 2019 (arXiv 1902.08129) for batch normalisation at large batches.
"""

from __future__ import annotations

from lathe.theory.prediction.criticality import Change, Criticality
from lathe.theory.prediction.predicting import critical_init_, predict
from lathe.theory.prediction.reading import UnsupportedNetwork
from lathe.theory.prediction.report import DepthToWidth, LayerPrediction, Prediction
from lathe.theory.prediction.scaling import LayerScaling, Scaling, TransferRate

__all__ = [
    "Change",
    "Criticality",
    "DepthToWidth",
    "LayerPrediction",
    "LayerScaling",
    "Prediction",
    "Scaling",
    "TransferRate",
    "UnsupportedNetwork",
    "critical_init_",
    "predict",
]
