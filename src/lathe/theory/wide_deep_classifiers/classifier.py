"""The classifier that wide networks become in the limit of depth, and the ones that they are at a finite depth."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Tensor

from lathe.core.gaussian import ActivationLike
from lathe.theory.wide_deep_classifiers.activations import optimal_activation
from lathe.theory.wide_deep_classifiers.depth import DeepKernel, check_depth, signed_kernel
from lathe.theory.wide_deep_classifiers.dual import DualActivation, as_dual
from lathe.theory.wide_deep_classifiers.koenigs import Koenigs
from lathe.theory.wide_deep_classifiers.sphere import intrinsic_dimension, to_sphere, unit_rows
from lathe.theory.wide_deep_classifiers.tables import SMALLEST, gaps

__all__ = ["SingularKernelClassifier"]

Array: TypeAlias = Tensor | np.ndarray

#: Scores closer than this, relative to the larger, are a tie.
_TIE = 1e-6


class SingularKernelClassifier(ClassifierMixin, BaseEstimator):
    """A deep, infinitely wide network fitted to zero square loss: `argmax_c sum_(i in c) psi(<x_i, x>)`.

    There is nothing to train and nothing to tune: the limit of depth keeps the diagonal of the kernel matrix alone, so
    that nothing is inverted either. Prediction is one pass over all pairs of queries and training points. Where the
    singularity of `psi` fits the dimension of the data the classifier interpolates its labels and is yet Bayes
    consistent. Follows scikit-learn; arrays and tensors are taken, and given back as `y` was.

    Args:
        d: dimension of the data, for which an optimal activation is taken; or an activation; or None, which estimates
            the dimension from the nearest neighbours of the training points ("two-nn", as `intrinsic_dimension`).
        depth: hidden layers; infinitely many by default. With a number, the kernel of that depth interpolates the
            one-hot labels, for which any activation will do.
        kernel: of a finite depth, "nngp" (only the last layer is trained) or "ntk"; their limits are the same.
        feature_map: "sphere" where the rows are on the unit sphere already; "append" or "normalise" as `to_sphere`.
        class_prior: probabilities of the classes where these are not their shares of the training points: a mapping
            from label to probability, or a sequence in the order of `classes_`. May be changed after fitting.
        chunk: pairs that are worked on at a time.

    Attributes:
        classes_: the labels, sorted.
        dual_: the activation in use.
        dimension_: the dimension that it was chosen for; None where an activation was given.
        dimension_source_: "given", "two-nn" or "activation".

    Example:
        >>> import torch
        >>> angle = torch.linspace(0.1, 1.4, 8, dtype=torch.float64)
        >>> X = torch.stack([angle.cos(), angle.sin()], 1)
        >>> SingularKernelClassifier(d=1).fit(X, (angle > 0.7).long()).predict(X[2:5])
        tensor([0, 0, 1])
    """

    def __init__(
        self,
        d: float | ActivationLike | DualActivation | None = None,
        *,
        depth: float = math.inf,
        kernel: Literal["nngp", "ntk"] = "nngp",
        feature_map: Literal["sphere", "append", "normalise"] = "sphere",
        class_prior: Mapping[Any, float] | Sequence[float] | None = None,
        chunk: int = 1 << 17,
    ) -> None:
        self.d = d
        self.depth = depth
        self.kernel = kernel
        self.feature_map = feature_map
        self.class_prior = class_prior
        self.chunk = chunk

    def fit(self, X: Array, y: Array, sample_weight: Array | None = None) -> SingularKernelClassifier:
        """Keeps the training points; of a finite depth, also solves for the interpolant.

        Args:
            X: `(n, features)`.
            y: `(n,)`, labels of any type.
            sample_weight: `(n,)`, non-negative: point i counts `sample_weight[i]` times. Infinite depth only.

        Raises:
            TypeError: for labels that are real numbers. At great depth the regression function is zero off the data.
            ValueError: for points that are not finite or not on the sphere, a single class, sizes that differ, and an
                activation whose limit is no singular kernel.
        """
        limit = self.depth == math.inf
        if not limit:
            check_depth(self.depth)
        if self.kernel not in ("nngp", "ntk"):
            raise ValueError(f"kernel must be 'nngp' or 'ntk', got {self.kernel!r}")
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")
        if self.feature_map not in ("sphere", "append", "normalise"):
            raise ValueError(f"feature_map must be 'sphere', 'append' or 'normalise', got {self.feature_map!r}")
        rows = torch.as_tensor(X)
        labels = _checked_labels(y, len(rows))
        self._tensors = isinstance(y, Tensor)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must have at least 2 classes, got {len(self.classes_)}")
        weight = torch.ones(len(rows), dtype=torch.float64)
        if sample_weight is not None:
            weight = torch.as_tensor(sample_weight).double().cpu()
            if weight.shape != (len(rows),) or not (torch.isfinite(weight) & (weight >= 0)).all() or not weight.any():
                raise ValueError("sample_weight must be n non-negative numbers that are not all zero")
            if not limit:
                raise ValueError("sample_weight has no meaning for an interpolant: use it with depth=math.inf")
        self._range = None
        if self.feature_map == "append":
            self._range = rows.double().amin(0), rows.double().amax(0)
        self._X = self._on_sphere(rows, "X")
        onehot = torch.zeros(len(rows), len(self.classes_), dtype=torch.float64)
        onehot[torch.arange(len(rows)), torch.from_numpy(codes)] = weight
        self._onehot = onehot.to(self._X.device)
        self._mass = self._onehot.sum(0)
        self._choose_activation()
        if limit:
            self._koenigs = Koenigs(self.dual_)
            self._votes = self._onehot
            self._table = self._koenigs.table(self._X.device)
        else:
            self._kernel: DeepKernel | None = None
            self._votes = self._interpolate()[0]
        return self

    def predict(self, X: Array) -> Array:
        """Labels `(m,)`. A tie goes to the class with the larger prior; at a training point its own label wins."""
        return self._labels(self._scores(X))

    def decision_function(self, X: Array) -> Array:
        """Scores of the classes, scaled to a sum of absolute values of one: `(m, classes)`; with two classes the
        difference of the second to the first, `(m,)`."""
        scores = self._scores(X)
        return self._given(scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores)

    def predict_proba(self, X: Array) -> Array:
        """Each class's share of the weights, `(m, classes)`, which estimates its probability. Infinite depth only.

        Raises:
            ValueError: at a finite depth, where scores are values of an interpolant.
        """
        if self.depth != math.inf:
            raise ValueError("predict_proba needs depth=math.inf: an interpolant's values are no probabilities")
        scores = self._scores(X).clamp_min(0)
        total = scores.sum(1, keepdim=True)
        share = self._mass * self._prior_factor()
        return self._given(torch.where(total > 0, scores / total.clamp_min(1e-300), share / share.sum()))

    def leave_one_out(self) -> Array:
        """Labels that the training points would be given without themselves, in closed form; to choose `d` or `depth`.

        Infinite depth leaves out a point's own term; an interpolant's values without point i are
        `y_i - (K^-1 y)_i / (K^-1)_ii`.
        """
        n = len(self._X)
        if self.depth == math.inf:
            parts = [self._limit_scores(self._X[rows], own=rows) for rows in self._chunks(n)]
            return self._labels(_normalised(torch.cat(parts) * self._prior_factor()))
        votes, inverse = self._interpolate(inverse=True)
        if inverse is None:  # the kernel is diagonal but for terms that only count beside each other
            parts = [self._depth_scores(self._X[rows], own=rows) for rows in self._chunks(n)]
            return self._labels(_normalised(torch.cat(parts)))
        return self._labels(_normalised(self._onehot - votes / inverse.unsqueeze(1)))

    def _choose_activation(self) -> None:
        self.dimension_: float | None
        if self.d is None:
            # Points on a line would make 1 - 1e-2 of it: no kernel is singular enough below 1.
            estimate = max(1.0, intrinsic_dimension(self._X))
            self.dimension_, self.dimension_source_ = estimate, "two-nn"
            chosen = optimal_activation(1 if estimate < 1.001 else estimate, continuous=True)
            self.dual_ = DualActivation(chosen)
        elif isinstance(self.d, (int, float)):
            self.dimension_, self.dimension_source_ = float(self.d), "given"
            self.dual_ = DualActivation(optimal_activation(self.d, continuous=True))
        else:
            self.dimension_, self.dimension_source_ = None, "activation"
            self.dual_ = as_dual(self.d)

    def _on_sphere(self, X: Tensor, name: str) -> Tensor:
        if self.feature_map == "sphere":
            return unit_rows(X, name)
        low, high = self._range or (None, None)
        return to_sphere(X, self.feature_map, low=low, high=high)

    def _chunks(self, m: int) -> Iterator[slice]:
        rows = max(1, self.chunk // len(self._X))
        return (slice(start, min(start + rows, m)) for start in range(0, m, rows))

    def _scores(self, X: Array) -> Tensor:
        if not hasattr(self, "_X"):
            raise ValueError("fit must be called before predictions are asked for")
        query = self._on_sphere(torch.as_tensor(X).to(self._X.device), "X")
        if query.shape[1] != self._X.shape[1]:
            raise ValueError(f"X must have the training points' {self._X.shape[1]} coordinates, got {query.shape[1]}")
        factor = self._prior_factor()
        score = self._limit_scores if self.depth == math.inf else self._depth_scores
        parts = [score(query[rows]) for rows in self._chunks(len(query))]
        return _normalised(torch.cat(parts) * factor) if parts else query.new_zeros(0, len(self.classes_))

    def _limit_scores(self, query: Tensor, own: slice | None = None) -> Tensor:
        """Sums of psi over the classes, each row scaled by its own factor."""
        e = gaps(query, self._X)
        if own is not None:
            e.diagonal(own.start).fill_(1.0)
        xi = 1 - e
        weights = self._table(e, xi)  # log(psi / xi)
        top = weights.amax(1, keepdim=True)
        weights.sub_(top).exp_().mul_(xi)
        if e.amax() > 1 + 1e-9:
            self._warn_negative()
            beyond = e > 1
            sign, logarithm = self._koenigs.signed(e[beyond])
            weights[beyond] = sign * (logarithm - top.expand_as(e)[beyond]).exp()
        if e.amin() < SMALLEST:
            same = e < SMALLEST
            weights = torch.where(same.any(1, keepdim=True), same.to(weights), weights)
        return weights @ self._votes

    def _depth_scores(self, query: Tensor, own: slice | None = None) -> Tensor:
        """The interpolant, each row scaled by its own factor."""
        e = gaps(query, self._X)
        if e.amax() > 1 + 1e-12:
            self._warn_negative()
            weights = signed_kernel(self.dual_, e, int(self.depth), self.kernel)
        else:
            weights = self._deep(e).log(e)
            if own is not None:
                weights.diagonal(own.start).fill_(-math.inf)
            weights = (weights - weights.amax(1, keepdim=True)).exp()
        if own is not None:
            weights.diagonal(own.start).fill_(0.0)
        return weights @ self._votes

    def _interpolate(self, inverse: bool = False) -> tuple[Tensor, Tensor | None]:
        """`K^-1 onehot` up to scale, and the diagonal of `K^-1` where it is asked for and K is not its diagonal."""
        e = gaps(self._X, self._X)
        deep = self._deep(e)
        if e.amax() > 1 + 1e-12:
            K = signed_kernel(self.dual_, e, int(self.depth), self.kernel) / math.exp(deep.at_zero)
        else:
            K = (deep.log(e) - deep.at_zero).exp()
        K.diagonal().fill_(1.0)
        if K.abs().sum(1).max() - 1 < 1e-8:
            return self._onehot, None
        factor, failed = torch.linalg.cholesky_ex(K)
        if not failed and factor.diagonal().min() > 1e-7:
            diagonal = torch.cholesky_inverse(factor).diagonal() if inverse else None
            return torch.cholesky_solve(self._onehot, factor), diagonal
        # Equal points, or a kernel that depth has made constant: the limit of a vanishing ridge.
        values, vectors = torch.linalg.eigh(K)
        kept = values > len(K) * torch.finfo(K.dtype).eps * values[-1]
        inverses = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
        pseudo = (vectors * inverses) @ vectors.mT
        return pseudo @ self._onehot, pseudo.diagonal() if inverse else None

    def _deep(self, e: Tensor) -> DeepKernel:
        """The kernel of the depth asked for, with a table (if any) that reaches down to the gaps `e`; kept."""
        positive = e[e >= SMALLEST]
        low = float(positive.amin()) if len(positive) else 1.0
        kept = self._kernel
        if kept is None or not kept.serves(e.numel(), low):
            kept = DeepKernel(self.dual_, int(self.depth), self.kernel, e.numel(), low / 1024, device=e.device)
            self._kernel = kept
        return kept

    def _warn_negative(self) -> None:
        if not self.dual_.odd:
            warnings.warn(
                f"points with negative inner products: the theory of {self.dual_.name} is for non-negative ones; "
                "use feature_map='append', or an odd activation",
                stacklevel=4,
            )

    def _prior_factor(self) -> Tensor:
        if self.class_prior is None:
            return torch.ones_like(self._mass)
        if self.depth != math.inf:
            raise ValueError("class_prior has no meaning for an interpolant: use it with depth=math.inf")
        prior = self.class_prior
        values = [prior[label] for label in self.classes_.tolist()] if isinstance(prior, Mapping) else list(prior)
        if len(values) != len(self.classes_) or not all(value >= 0 for value in values) or not sum(values) > 0:
            raise ValueError(f"class_prior must give {len(self.classes_)} non-negative numbers, got {self.class_prior}")
        wanted = torch.tensor(values, dtype=torch.float64, device=self._mass.device)
        return wanted / wanted.sum() * self._mass.sum() / self._mass.clamp_min(1e-300)

    def _labels(self, scores: Tensor) -> Array:
        best = scores.amax(1, keepdim=True)
        tied = scores >= best - _TIE * best.abs()
        share = self._mass * self._prior_factor()
        found = torch.where(tied, share, -1.0).argmax(1).cpu().numpy()
        labels = self.classes_[found]
        return torch.from_numpy(labels) if self._tensors else labels

    def _given(self, values: Tensor) -> Array:
        return values if self._tensors else values.cpu().numpy()


def _normalised(scores: Tensor) -> Tensor:
    return scores / scores.abs().sum(1, keepdim=True).clamp_min(1e-300)


def _checked_labels(y: Array, n: int) -> np.ndarray:
    labels = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if labels.shape != (n,):
        raise ValueError(f"y must have one label for each of the {n} rows of X, got shape {labels.shape}")
    if labels.dtype.kind in "fc":
        if np.isnan(labels).any():
            raise ValueError("y must not contain NaN")
        if labels.dtype.kind == "c" or (labels != np.round(labels)).any():
            raise TypeError(
                "y must be class labels, got real numbers: at great depth only the sign of the predictor carries "
                "information, its regression function is zero off the data"
            )
    return labels
