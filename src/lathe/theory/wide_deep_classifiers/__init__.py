"""Tells what great depth makes of a wide network, and gives the classifier at the end: Bayes consistent, no training.

Infinitely wide and then infinitely deep networks, fitted to zero square loss, become one of three classifiers: a
majority vote, the nearest neighbour, or a vote weighted by a singular kernel `|x - z|^-alpha`. Two or three numbers of
the activation decide which. With `alpha` the dimension of the data the last is Bayes consistent.

Radhakrishnan, Belkin and Uhler, "Wide and Deep Neural Networks Achieve Optimality for Classification", 2022,
arXiv 2204.14126. Data lie on the part of the unit sphere where no coordinate is negative, so that `xi = <x, z>` is in
[0, 1]; `d` is their dimension, one less than the number of coordinates. Networks have no biases.
"""

from __future__ import annotations

from lathe.theory.wide_deep_classifiers.activations import OptimalActivation, SineActivation, optimal_activation
from lathe.theory.wide_deep_classifiers.classifier import SingularKernelClassifier
from lathe.theory.wide_deep_classifiers.depth import nngp, ntk
from lathe.theory.wide_deep_classifiers.dual import DualActivation
from lathe.theory.wide_deep_classifiers.koenigs import Koenigs, koenigs
from lathe.theory.wide_deep_classifiers.limits import DepthLimit, classify_depth_limit
from lathe.theory.wide_deep_classifiers.networks import wide_deep_mlp
from lathe.theory.wide_deep_classifiers.sphere import intrinsic_dimension, to_sphere

__all__ = [
    "DepthLimit",
    "DualActivation",
    "Koenigs",
    "OptimalActivation",
    "SineActivation",
    "SingularKernelClassifier",
    "classify_depth_limit",
    "intrinsic_dimension",
    "koenigs",
    "nngp",
    "ntk",
    "optimal_activation",
    "to_sphere",
    "wide_deep_mlp",
]
