"""The minimum of the unconstrained feature model in closed form: which classes survive, how long, in what frame.

With every factor penalised the loss depends on the outputs alone, through a Schatten quasi-norm, so that the optimum
keeps the singular vectors of the targets and shrinks each singular value y by itself (arXiv 2301.00437, sections 3, 4):

    min over x >= 0 of  y^2 / (x^M + 1) + b x,    b = M N (N lH prod lW)^(1/M),    output o = y x^M / (x^M + 1).

x = 0 is optimal, and the direction given up, once the load b / y^2 reaches (M - 1)^((M - 1)/M) / M.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import brentq
from torch import Tensor

__all__ = [
    "GOF",
    "CrossEntropyETF",
    "UFMOptimum",
    "collapse_threshold",
    "cross_entropy_etf",
    "gof",
    "max_weight_decay",
    "ufm_optimum",
]

Numbers = Sequence[float] | Tensor


@dataclass(frozen=True)
class GOF:
    """The global minimum for one-hot labels: without a bias a general orthogonal frame, one direction a class.

    Without a bias direction j is class j. With a free bias directions are the K - 1 singular directions of the centred
    labels, largest first: a simplex ETF for equal counts, and in general no orthogonal frame.

    Attributes:
        class_counts: n_k.
        weight_decays, feature_decay: of W_1 .. W_M and of the features.
        bias: the optimal bias of the last layer, n_k / N; None where there is none.
        threshold: a direction survives while its load is below this.
        load: penalties against data, b / n_k (with a bias, over the squared singular value).
        collapsed: which directions are zero at the optimum.
        singular_values: of W_1; those of W_m are `sqrt(weight_decays[0] / weight_decays[m - 1])` times as large.
        loss: the minimum.
        directions: (classes, directions), orthonormal columns: how a direction enters the logits.
        class_features: (classes, directions): each class's share in the features' unit direction.
        strength: `lW_m s_m^2 = lH s_H^2`, by which all factors are balanced.
    """

    class_counts: Float[Tensor, " classes"]
    weight_decays: tuple[float, ...]
    feature_decay: float
    bias: Float[Tensor, " classes"] | None
    threshold: float
    load: Float[Tensor, " directions"]
    collapsed: Bool[Tensor, " directions"]
    singular_values: Float[Tensor, " directions"]
    loss: float
    directions: Float[Tensor, "classes directions"]
    class_features: Float[Tensor, "classes directions"]
    strength: Float[Tensor, " directions"]

    @property
    def depth(self) -> int:
        """M, the number of linear layers."""
        return len(self.weight_decays)

    @property
    def rank(self) -> int:
        """Of the classifier: directions that survive."""
        return int((~self.collapsed).sum())

    @property
    def classifier_gram(self) -> Float[Tensor, "classes classes"]:
        """`W W^T` of the whole head, W = W_M .. W_1."""
        return self.classifier_gram_from(1)

    @property
    def feature_gram(self) -> Float[Tensor, "classes classes"]:
        """Products of the class means that enter the head."""
        return self.feature_gram_at(1)

    @property
    def classifier_norms(self) -> Float[Tensor, " classes"]:
        """Lengths of the rows of W."""
        return (self.directions.square() @ self._classifier_squares(1)).sqrt()

    @property
    def feature_norms(self) -> Float[Tensor, " classes"]:
        """Lengths of the class means that enter the head."""
        return (self.class_features.square() @ self._feature_squares(1)).sqrt()

    @property
    def output(self) -> Float[Tensor, "classes classes"]:
        """`W Hbar`: column k holds the logits of class k, without the bias."""
        fitted = (self._classifier_squares(1) * self._feature_squares(1)).sqrt()
        return (self.directions * fitted) @ self.class_features.mT

    def classifier_gram_from(self, layer: int) -> Float[Tensor, "classes classes"]:
        """`S S^T` of S = W_M .. W_layer; layers count from 1."""
        return (self.directions * self._classifier_squares(layer)) @ self.directions.mT

    def feature_gram_at(self, layer: int) -> Float[Tensor, "classes classes"]:
        """Products of the class means that enter layer `layer`."""
        return (self.class_features * self._feature_squares(layer)) @ self.class_features.mT

    def dual_at(self, layer: int) -> Float[Tensor, "classes classes"]:
        """The matrix D with `W_M .. W_layer = D Hbar^T`, Hbar being the class means that enter layer `layer`.

        Without a bias and at layer 1 it is diag(w_k + N lH) (NC3: rows of W are parallel to class means).
        """
        K, N = len(self.class_counts), float(self.class_counts.sum())
        if self.bias is None:
            residual = 1 - self.output.diagonal()
            inverse = torch.diag(1 / residual)
        else:
            inverse = torch.linalg.pinv(
                torch.eye(K, dtype=torch.float64) - self.bias[:, None] - self.output, rtol=1e-12
            )
        dual = N * self.feature_decay * inverse.mT
        if layer == 1:
            return dual
        # What the layers before this one stretch each direction by; a collapsed one has nothing to undo.
        stretch = self.strength ** (layer - 1) / math.prod(self.weight_decays[: layer - 1])
        undone = torch.where(self.collapsed, 0.0, 1 / stretch)
        return (self.directions * undone) @ self.directions.mT @ dual

    def _classifier_squares(self, layer: int) -> Float[Tensor, " directions"]:
        if not 1 <= layer <= self.depth:
            raise ValueError(f"layer must be between 1 and {self.depth}, got {layer}")
        return self.strength ** (self.depth - layer + 1) / math.prod(self.weight_decays[layer - 1 :])

    def _feature_squares(self, layer: int) -> Float[Tensor, " directions"]:
        if not 1 <= layer <= self.depth:
            raise ValueError(f"layer must be between 1 and {self.depth}, got {layer}")
        return self.strength**layer / (self.feature_decay * math.prod(self.weight_decays[: layer - 1]))


class UFMOptimum(NamedTuple):
    """A global minimiser for any targets; every other one differs by rotations between the factors."""

    outputs: Float[Tensor, "classes samples"]
    """`W_M .. W_1 H`, without the bias."""
    bias: Float[Tensor, " classes"] | None
    weights: list[Float[Tensor, "out in"]]
    """W_1 .. W_M."""
    features: Float[Tensor, "features samples"]
    """H."""
    loss: float


class CrossEntropyETF(NamedTuple):
    """The simplex ETF under cross-entropy."""

    logit_gap: float
    """Logit of the true class minus that of any other; 0 where the ETF is no better than nothing."""
    loss: float


def gof(
    class_counts: Numbers,
    weight_decays: float | Numbers,
    feature_decay: float,
    *,
    depth: int | None = None,
    width: int | Sequence[int] | None = None,
    bias: bool = False,
) -> GOF:
    """The optimal classifier and class means for squared error: lengths, angles, and which classes are given up.

    Args:
        class_counts: n_k, samples of each class.
        weight_decays: of W_1 .. W_M; one number for all, with `depth`.
        feature_decay: of the features, summed over all samples.
        depth: M where `weight_decays` is one number; 1 where nothing is said.
        width: the features' dimension d_1, or d_1 .. d_M. Below K it leaves the largest classes only; of equal classes
            at the cut the first are kept here, though any rotation among them is as good.
        bias: whether the last layer has a bias, which is not penalised.

    Raises:
        ValueError: for fewer than two classes, and counts, decays or widths that are not positive.
    """
    n = _checked_counts(class_counts)
    lW, lH = _checked_decays(weight_decays, feature_decay, depth)
    N = float(n.sum())
    if bias:
        # Y (I - 11^T/N) has the left singular vectors of Y (I - 11^T/N) Y^T; its null vector is left to the bias.
        squares, U = torch.linalg.eigh(torch.diag(n) - torch.outer(n, n) / N)
        squares, U = squares.flip(0)[:-1], U.flip(1)[:, :-1]
        columns = U - (n @ U) / N
    else:
        squares, U = n, torch.eye(len(n), dtype=torch.float64)
        columns = U
    solved = _shrink(squares, N, lW, lH, _smallest(width))
    return GOF(
        class_counts=n,
        weight_decays=tuple(lW),
        feature_decay=lH,
        bias=n / N if bias else None,
        threshold=collapse_threshold(len(lW)),
        load=solved.load,
        collapsed=solved.strength == 0,
        singular_values=(solved.strength / lW[0]).sqrt(),
        loss=solved.loss,
        directions=U,
        class_features=columns / squares.sqrt(),
        strength=solved.strength,
    )


def ufm_optimum(
    Y: Float[Tensor, "classes samples"],
    weight_decays: float | Numbers,
    feature_decay: float,
    *,
    depth: int | None = None,
    width: int | Sequence[int] | None = None,
    bias: bool = False,
) -> UFMOptimum:
    """The minimum for any targets, with its factors: one-hot labels, imbalanced data with a bias, regression.

    Args:
        Y: targets, a column a sample.
        weight_decays, feature_decay, depth, bias: as in `gof`.
        width: d_1 .. d_M, or one for all; as small as loses nothing where nothing is said.

    Raises:
        ValueError: for targets that are not finite, and decays or widths that are not positive.
    """
    lW, lH = _checked_decays(weight_decays, feature_decay, depth)
    if Y.ndim != 2 or not Y.numel() or not bool(torch.isfinite(Y).all()):
        raise ValueError(f"Y must be a finite matrix (classes, samples), got shape {tuple(Y.shape)}")
    Y = Y.double()
    K, N = Y.shape
    M, rank = len(lW), _smallest(width)
    widths = [min(K, N) if width is None else width] * M if not isinstance(width, Sequence) else list(width)
    if len(widths) != M:
        raise ValueError(f"width must be one number or {M}, one a layer, got {len(widths)}")
    mean = Y.mean(1) if bias else None
    U, y, V = torch.linalg.svd(Y if mean is None else Y - mean[:, None], full_matrices=False)
    solved = _shrink(y.square(), float(N), lW, lH, rank)
    kept = int((solved.strength > 0).sum())  # singular values fall, so that the kept come first
    U, V, g = U[:, :kept], V[:kept], solved.strength[:kept]
    features = Y.new_zeros(widths[0], N)
    features[:kept] = (g / lH).sqrt()[:, None] * V
    weights = []
    for m, decay in enumerate(lW):
        values = (g / decay).sqrt()
        weight = Y.new_zeros(K if m == M - 1 else widths[m + 1], widths[m])
        if m == M - 1:
            weight[:, :kept] = U * values
        else:
            weight[:kept, :kept] = torch.diag(values)
        weights.append(weight)
    fitted = (g ** (M + 1) / (lH * math.prod(lW))).sqrt()
    return UFMOptimum((U * fitted) @ V, mean, weights, features, solved.loss)


def collapse_threshold(depth: int) -> float:
    """The load b / n_k from which a class is given up: (M - 1)^((M - 1)/M) / M; 1 for M = 1, 1/2 for M = 2.

    For M >= 2 a class that is given up jumps to zero from a finite length.

    Raises:
        ValueError: for a depth below 1.
    """
    if depth < 1 or int(depth) != depth:
        raise ValueError(f"depth must be a whole number of at least 1, got {depth}")
    return (depth - 1) ** ((depth - 1) / depth) / depth


def max_weight_decay(
    class_counts: Numbers, depth: int = 1, *, feature_decay: float | None = None
) -> Float[Tensor, " classes"]:
    """For each class the penalty at which it is given up (squared error, no bias): stay below the smallest.

    Args:
        class_counts: n_k.
        depth: M.
        feature_decay: of the features; where nothing is said, they are penalised like the weights.

    Raises:
        ValueError: for counts, a depth or a decay that are not positive.
    """
    n = _checked_counts(class_counts)
    N = float(n.sum())
    bearable = n * collapse_threshold(depth) / (depth * N)  # of (N lH lW^M)^(1/M)
    if feature_decay is None:
        return (bearable**depth / N) ** (1 / (depth + 1))
    return bearable / (N * _positive("feature_decay", feature_decay)) ** (1 / depth)


def cross_entropy_etf(
    K: int, n: int, weight_decays: float | Numbers, feature_decay: float, *, depth: int | None = None
) -> CrossEntropyETF:
    """The simplex ETF under cross-entropy, for K classes of n samples: a stationary point.

    For one linear layer it is the global minimum. For two and more it is not: solutions of lower rank lie below it
    (study claim C7; Garrod and Keating, arXiv 2410.23169).

    Raises:
        ValueError: for fewer than two classes, no samples, or decays that are not positive.
    """
    if K < 2 or n < 1:
        raise ValueError(f"K must be at least 2 and n at least 1, got K = {K}, n = {n}")
    lW, lH = _checked_decays(weight_decays, feature_decay, depth)
    M = len(lW)
    a = math.exp((sum(map(math.log, lW)) + math.log(lH * n)) / (M + 1))

    def loss(gap: float) -> float:
        return math.log1p((K - 1) * math.exp(-gap)) + (K - 1) * (M + 1) / 2 * a * gap ** (2 / (M + 1))

    # The derivative vanishes where log a + log(e^t + K - 1) = kappa log t: its two sides touch at most twice.
    kappa = (M - 1) / (M + 1)

    def rise(gap: float) -> float:
        log_sum = gap + math.log1p((K - 1) * math.exp(-gap))
        return kappa * (math.log(gap) if M > 1 else 0.0) - math.log(a) - log_sum

    peak = brentq(lambda t: kappa / t - 1 / (1 + (K - 1) * math.exp(-t)), 1e-12, K + 1.0) if M > 1 else 0.0
    if rise(peak) <= 0:
        return CrossEntropyETF(0.0, math.log(K))
    far = peak + 1.0
    while rise(far) > 0:
        far *= 2
    gap = brentq(rise, peak, far, xtol=1e-14, rtol=1e-15)
    return CrossEntropyETF(gap, loss(gap)) if loss(gap) < math.log(K) else CrossEntropyETF(0.0, math.log(K))


class _Shrunk(NamedTuple):
    load: Tensor
    strength: Tensor
    loss: float


def _shrink(squares: Tensor, N: float, lW: list[float], lH: float, rank: int | None) -> _Shrunk:
    """The scalar problem for each squared singular value of the targets; at most `rank` of them survive."""
    # In NumPy, which is ten times as fast as tensors on arrays of a few numbers.
    M, squared = len(lW), squares.numpy()
    scale = math.exp((math.log(N) + math.log(lH) + sum(map(math.log, lW))) / M)
    load = M * N * scale / np.maximum(squared, np.finfo(np.float64).tiny)
    x = _largest_root(load, M)
    if rank is not None and rank < len(x):
        x[np.argsort(-squared, kind="stable")[rank:]] = 0.0
    loss = float((squared / (x**M + 1)).sum() / (2 * N) + M * scale / 2 * x.sum())
    return _Shrunk(torch.from_numpy(load), torch.from_numpy(scale * x), loss)


def _largest_root(load: np.ndarray, M: int) -> np.ndarray:
    """The minimiser x of `1 / (x^M + 1) + load x`: the largest root of its derivative, or 0."""
    x = np.zeros_like(load)
    survives = load < collapse_threshold(M)
    if M == 1:
        x[survives] = load[survives] ** -0.5 - 1
        return x
    # In t = log x the logarithm of M x^(M-1) / (x^M + 1)^2 / load is concave, and its asymptote for large t vanishes
    # to the right of the largest root: Newton's steps come down from there, and never pass it.
    log_load = np.log(load[survives])
    t = (math.log(M) - log_load) / (M + 1)
    for _ in range(20):
        softplus = np.logaddexp(0.0, M * t)
        value = math.log(M) + (M - 1) * t - 2 * softplus - log_load
        step = value / (M - 1 - 2 * M * np.exp(M * t - softplus))
        t -= step
        if np.abs(step).max(initial=0.0) < 1e-8:  # the next step would be its square
            break
    x[survives] = np.exp(t)
    return x


def _checked_counts(class_counts: Numbers) -> Float[Tensor, " classes"]:
    n = torch.as_tensor(class_counts, dtype=torch.float64, device="cpu").detach()
    if n.ndim != 1 or len(n) < 2:
        raise ValueError(f"class_counts must list at least two classes, got shape {tuple(n.shape)}")
    low, high = torch.aminmax(n)
    if not (low > 0 and high < math.inf):
        wrong = [(k, each) for k, each in enumerate(n.tolist()) if not 0 < each < math.inf]
        told = ", ".join(f"class {k} has {each:g}" for k, each in wrong[:5])
        raise ValueError(f"class_counts must be positive: {told}; leave out classes without samples")
    return n


def _checked_decays(
    weight_decays: float | Numbers, feature_decay: float, depth: int | None
) -> tuple[list[float], float]:
    """The decays of all layers, and that of the features."""
    decays = torch.as_tensor(weight_decays, dtype=torch.float64)
    if decays.ndim > 1 or not decays.numel():
        raise ValueError(f"weight_decays must be one number or one a layer, got shape {tuple(decays.shape)}")
    if depth is not None:
        collapse_threshold(depth)
    if decays.ndim == 0:
        decays = decays.expand(depth or 1)
    elif depth is not None and depth != len(decays):
        raise ValueError(f"weight_decays must have one entry a layer, got {len(decays)} for a depth of {depth}")
    return [_positive("weight_decays", each) for each in decays.tolist()], _positive("feature_decay", feature_decay)


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be positive, got {value}: without a penalty the optimum is not unique")
    return float(value)


def _smallest(width: int | Sequence[int] | None) -> int | None:
    """R of the paper, without the number of classes."""
    if width is None:
        return None
    widths = [width] if isinstance(width, int) else list(width)
    if not widths or min(widths) < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    return min(widths)
