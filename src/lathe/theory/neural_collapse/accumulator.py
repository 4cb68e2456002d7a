"""Neural-collapse metrics from streamed features: one pass, three sums a class and one second moment.

Class means and the within-class covariance come out of a single pass because every class is summed around its own first
mean, which leaves nothing to cancel however far collapse has gone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lathe.theory.neural_collapse.head import factors_of
from lathe.theory.neural_collapse.optimum import GOF, Numbers, gof

__all__ = ["NCReport", "NeuralCollapse", "Reference"]

Reference = Literal["auto", "etf", "orthogonal", "gof"]


@dataclass(frozen=True)
class NCReport:
    """How near a classifier and its features have come to neural collapse: every metric falls to 0, nc4 rises to 1.

    Matrices are compared after each is divided by its Frobenius norm.

    Attributes:
        nc1: within-class against between-class scatter of the features, `tr(Sigma_W Sigma_B^+) / K`.
        nc2_w: classifier: distance of `W W^T` from the reference's.
        nc2_h: class means: distance of their products from the reference's.
        nc3: alignment: distance of `W Hbar` (logits of the class means, without bias) from the reference's.
        dual: distance of W from the class means, scaled by class as the reference says.
        nc4: share of samples that the head and the nearest class mean put in the same class; nan where not measured.
        cdnv: mean over pairs of classes of their within-class variances over the squared distance of their means.
        rank: of the classifier: singular values above a thousandth of the largest.
        reference: "etf" (simplex), "orthogonal" or "gof" (the theory's optimum for the counts and decays).
        per_layer: nc1, nc2_w, nc2_h and dual for each layer's features and the product of the layers from there on.
        class_counts: samples of each class.
        classifier_norms, feature_norms: lengths of the rows of W and of the class means (around the mean of all samples
            where the reference has a bias).
        class_variance: mean squared distance of a class's samples from their mean.
        prediction: the theory's optimum; None unless decays were given.
    """

    nc1: float
    nc2_w: float
    nc2_h: float
    nc3: float
    dual: float
    nc4: float
    cdnv: float
    rank: int
    reference: str
    per_layer: Mapping[str, Float[Tensor, " depth"]]
    class_counts: Int[Tensor, " classes"]
    classifier_norms: Float[Tensor, " classes"]
    feature_norms: Float[Tensor, " classes"]
    class_variance: Float[Tensor, " classes"]
    prediction: GOF | None

    def __str__(self) -> str:
        names = ("nc1", "nc2_w", "nc2_h", "nc3", "dual", "nc4", "cdnv")
        told = ", ".join(f"{name} {getattr(self, name):.3g}" for name in names)
        return f"{told}, rank {self.rank} of {len(self.class_counts)} classes (reference: {self.reference})"

    def plot(self) -> Any:
        """An Altair chart: the metrics, and each class's lengths, measured and predicted."""
        import altair as alt

        names = {"nc1": "NC1", "nc2_w": "NC2, classifier", "nc2_h": "NC2, means", "nc3": "NC3", "dual": "duality"}
        metrics = [
            {"metric": told, "distance": value}
            for name, told in names.items()
            if 0 < (value := getattr(self, name)) < math.inf
        ]
        left = (
            alt.Chart(alt.Data(values=metrics), width=240, height=220, title="distance from collapse")
            .mark_point(filled=True, size=80, opacity=1)
            .encode(
                x=alt.X("distance:Q", title=None).scale(type="log").axis(format=".0e", tickCount=4),
                y=alt.Y("metric:N", title=None, sort=list(names.values())),
            )
        )
        sides = {"classifier": self.classifier_norms, "class mean": self.feature_norms}
        rows = [
            {"class": k, "length": length, "of": of, "from": "measured"}
            for of, lengths in sides.items()
            for k, length in enumerate(lengths.tolist())
        ]
        if self.prediction is not None:
            predicted = {"classifier": self.prediction.classifier_norms, "class mean": self.prediction.feature_norms}
            rows += [
                {"class": k, "length": length, "of": of, "from": "predicted"}
                for of, lengths in predicted.items()
                for k, length in enumerate(lengths.tolist())
            ]
        told = "length by class" if self.prediction is None else "length by class: dots measured, bars predicted"
        lengths = alt.Chart(alt.Data(values=rows), width=280, height=220, title=told).encode(
            x=alt.X("class:O", title="class").axis(labelAngle=0),
            y=alt.Y("length:Q", title=None).scale(zero=True),
            color=alt.Color("of:N", title=None),
        )
        dots = lengths.transform_filter("datum.from == 'measured'").mark_point(filled=True, size=60, opacity=1)
        bars = lengths.transform_filter("datum.from == 'predicted'").mark_tick(thickness=2, width=16)
        return alt.hconcat(left, alt.layer(bars, dots))


class NeuralCollapse:
    """Sums features by class, batch by batch, and computes the metrics of `NCReport` at any time.

    Everything is held in float64 on the device of the first features, and no batch makes the host wait for the device:
    what is wrong with a batch on an accelerator is told by `compute`. Takes `8 d^2` bytes for d features.

    Args:
        num_classes: K.

    Raises:
        ValueError: for fewer than two classes.

    Example:
        >>> collapse = NeuralCollapse(3)
        >>> collapse.update(torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4))
        >>> collapse.compute(torch.eye(3)).nc3
        0.0
    """

    def __init__(self, num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.reset()

    def reset(self) -> None:
        """Forgets all samples."""
        self._state: dict[str, Tensor] | None = None

    @torch.no_grad()
    def update(self, features: Float[Tensor, "batch features"], target: Int[Tensor, " batch"]) -> None:
        """Takes in what enters the classifier for a batch, and the batch's classes.

        Raises:
            ValueError: for features of another width than before, one class number too few or many, and on the CPU for
                features that are not finite and classes outside 0 .. K - 1 (elsewhere `compute` raises).
        """
        if features.ndim != 2 or target.shape != features.shape[:1]:
            raise ValueError(
                f"features must be (batch, features) and target (batch,), got {tuple(features.shape)} and "
                f"{tuple(target.shape)}"
            )
        if not len(features):
            return
        if self._state is None:
            self._state = self._empty(features.shape[1], features.device)
        state = self._state
        if features.shape[1] != state["sums"].shape[1]:
            raise ValueError(f"features must have {state['sums'].shape[1]} columns as before, got {features.shape[1]}")
        h = features.to(state["sums"])
        target = target.to(h.device, torch.int64)
        outside = (target < 0) | (target >= self.num_classes)
        infinite = ~torch.isfinite(h).all(1)
        if h.device.type == "cpu":
            _refuse(int(outside.sum()), int(infinite.sum()), self.num_classes)
        state["wrong"] += torch.stack([outside.sum(), infinite.sum()])
        target = target.clamp(0, self.num_classes - 1)
        counts = torch.zeros_like(state["counts"]).index_add_(0, target, torch.ones_like(target))
        sums = torch.zeros_like(state["sums"]).index_add_(0, target, h)
        new = (state["counts"] == 0) & (counts > 0)
        state["shift"] = torch.where(new[:, None], sums / counts.clamp_min(1)[:, None], state["shift"])
        rest = h - state["shift"][target]
        state["counts"] += counts
        state["sums"].index_add_(0, target, rest)
        state["squares"].index_add_(0, target, rest.square().sum(1))
        # Only blocks on and above the diagonal: the moment is symmetric.
        block = max(128, -(-rest.shape[1] // 4))
        for i in range(0, rest.shape[1], block):
            state["moment"][i : i + block, i:].addmm_(rest[:, i : i + block].mT, rest[:, i:])

    @torch.no_grad()
    def merge(self, other: NeuralCollapse) -> None:
        """Takes in the samples of another accumulator, of another process for one; `other` stays as it is.

        Raises:
            ValueError: where the two differ in classes or features.
        """
        if other.num_classes != self.num_classes:
            raise ValueError(f"other must have {self.num_classes} classes, got {other.num_classes}")
        if other._state is None:
            return
        width = other._state["sums"].shape[1]
        if self._state is None:
            self._state = self._empty(width, other._state["sums"].device)
        state = self._state
        if width != state["sums"].shape[1]:
            raise ValueError(f"other must have {state['sums'].shape[1]} features, got {width}")
        theirs = {name: tensor.to(state["sums"].device) for name, tensor in other._state.items()}
        state["shift"] = torch.where((state["counts"] == 0)[:, None], theirs["shift"], state["shift"])
        # Their sums around my shift: h - mine = (h - theirs) + gap.
        gap = theirs["shift"] - state["shift"]
        n = theirs["counts"].double()[:, None]
        cross = gap.mT @ (theirs["sums"] + n * gap / 2)
        state["moment"] += theirs["moment"] + cross + cross.mT
        state["squares"] += theirs["squares"] + (gap * (2 * theirs["sums"] + n * gap)).sum(1)
        state["sums"] += theirs["sums"] + n * gap
        state["counts"] += theirs["counts"]
        state["wrong"] += theirs["wrong"]

    @property
    def class_means(self) -> Float[Tensor, "classes features"]:
        """Of the features so far.

        Raises:
            ValueError: for a class without samples.
        """
        state = self._filled()
        return state["shift"] + state["sums"] / state["counts"][:, None]

    @torch.no_grad()
    def compute(
        self,
        weight: Float[Tensor, "classes features"] | Sequence[Tensor] | nn.Module,
        *,
        bias: bool = False,
        reference: Reference = "auto",
        weight_decay: float | Numbers | None = None,
        feature_decay: float | None = None,
        class_counts: Numbers | None = None,
        nc4: float = math.nan,
    ) -> NCReport:
        """The metrics of a classifier and the samples so far.

        Args:
            weight: the classifier's matrix, or its factors W_1 .. W_M, or the head itself.
            bias: whether the classifier has a bias; a head tells that by itself.
            reference: what to compare with; "auto" takes a simplex ETF for equal counts and a bias, an orthogonal frame
                for equal counts without one, and the theory's optimum for unequal counts.
            weight_decay, feature_decay: as in `gof`, for "gof" and for the prediction.
            class_counts: of the training set, where the samples are others.
            nc4: measured elsewhere, for the report.

        Raises:
            ValueError: for a class without samples, a classifier that does not fit, an unknown reference, or "gof"
                without decays.
        """
        state = self._filled()
        if isinstance(weight, nn.Module):
            factors, b = factors_of(weight)
            bias = b is not None
        else:
            factors = [weight] if isinstance(weight, Tensor) else list(weight)
        factors = [factor.detach().to(state["sums"]) for factor in factors]
        d, K = state["sums"].shape[1], self.num_classes
        sizes = [d, *(factor.shape[0] for factor in factors)]
        if sizes[-1] != K or any(factor.shape[1] != size for factor, size in zip(factors, sizes)):
            shapes = ", ".join(str(tuple(factor.shape)) for factor in factors)
            raise ValueError(f"weight must lead from {d} features to {K} classes, got {shapes}")
        counts = state["counts"].cpu()
        trained_on = counts if class_counts is None else torch.as_tensor(class_counts)
        if len(trained_on) != K:
            raise ValueError(f"class_counts must have {K} entries, got {len(trained_on)}")
        equal = bool((trained_on == trained_on[0]).all())
        chosen = _chosen(reference, bias, equal, weight_decay, feature_decay)
        prediction = None
        if weight_decay is not None and feature_decay is not None:
            prediction = gof(
                trained_on,
                weight_decay,
                feature_decay,
                depth=len(factors) if torch.as_tensor(weight_decay).ndim == 0 else None,
                width=sizes[:-1],
                bias=bias,
            )
            if prediction.depth != len(factors):
                raise ValueError(f"weight_decay must have {len(factors)} entries, got {prediction.depth}")

        n, N = counts.to(state["sums"]), counts.sum()
        off = state["sums"] / n[:, None]
        means = state["shift"] + off
        moment = state["moment"].triu() + state["moment"].triu(1).mT
        within = (moment - (off * n[:, None]).mT @ off) / N
        centre = n @ means / N
        centred = chosen == "etf" or (chosen == "gof" and bias)
        layers = _by_layer(factors, means, centre, within, centred, chosen, prediction)
        W = layers["product"][0]
        shown = means - centre if centred else means
        variance = (state["squares"] / n - off.square().sum(1)).clamp_min(0)
        rank = int((torch.linalg.svdvals(W) > 1e-3 * torch.linalg.matrix_norm(W, 2)).sum())
        if len(factors) > 1 and rank < min(K - 1, *sizes[:-1]):
            warnings.warn(
                f"the head of {len(factors)} linear layers has rank {rank} for {K} classes: its penalties gave up "
                "directions, as they do for small classes and, under cross-entropy, at any depth above 1",
                stacklevel=2,
            )
        per_layer = {name: torch.tensor(layers[name]) for name in ("nc1", "nc2_w", "nc2_h", "dual")}
        return NCReport(
            nc1=layers["nc1"][0],
            nc2_w=layers["nc2_w"][0],
            nc2_h=layers["nc2_h"][0],
            nc3=_distance(W @ shown.mT, _frame(K, chosen, prediction, "output")),
            dual=layers["dual"][0],
            nc4=nc4,
            cdnv=_cdnv(means, variance),
            rank=rank,
            reference=chosen,
            per_layer=per_layer,
            class_counts=counts,
            classifier_norms=W.norm(dim=1).cpu(),
            feature_norms=shown.norm(dim=1).cpu(),
            class_variance=variance.cpu(),
            prediction=prediction,
        )

    def _empty(self, width: int, device: torch.device) -> dict[str, Tensor]:
        K = self.num_classes
        zeros = torch.zeros(K, width, dtype=torch.float64, device=device)
        return {
            "counts": torch.zeros(K, dtype=torch.int64, device=device),
            "shift": zeros,
            "sums": zeros.clone(),  # of h - shift
            "squares": torch.zeros_like(zeros[:, 0]),  # of |h - shift|^2
            "moment": torch.zeros(width, width, dtype=torch.float64, device=device),  # upper triangle
            "wrong": torch.zeros(2, dtype=torch.int64, device=device),
        }

    def _filled(self) -> dict[str, Tensor]:
        if self._state is None:
            raise ValueError("there are no samples yet: call update() first")
        outside, infinite = self._state["wrong"].tolist()
        _refuse(outside, infinite, self.num_classes)
        missing = (self._state["counts"] == 0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(f"every class needs a sample, got none of class {', '.join(map(str, missing[:10]))}")
        return self._state


def _refuse(outside: int, infinite: int, num_classes: int) -> None:
    if outside:
        raise ValueError(f"target must be between 0 and {num_classes - 1}, got {outside} outside of it")
    if infinite:
        raise ValueError(f"features must be finite, got {infinite} samples that are not")


def _chosen(reference: str, bias: bool, equal: bool, weight_decay: object, feature_decay: object) -> str:
    if reference not in ("auto", "etf", "orthogonal", "gof"):
        raise ValueError(f"reference must be 'auto', 'etf', 'orthogonal' or 'gof', got {reference!r}")
    if (weight_decay is None) != (feature_decay is None):
        raise ValueError("weight_decay and feature_decay belong together, got one of them")
    chosen = reference if reference != "auto" else "gof" if not equal else "etf" if bias else "orthogonal"
    if chosen == "gof" and weight_decay is None:
        raise ValueError(
            "classes differ in size, so that the optimum depends on the penalties: give weight_decay and "
            "feature_decay, or compare with reference='etf' or 'orthogonal'"
        )
    return chosen


def _frame(K: int, reference: str, prediction: GOF | None, name: str, layer: int = 1) -> Tensor:
    """The reference's matrix: "output", "classifier" or "features" products, or the map from class means to W."""
    if reference == "gof":
        assert prediction is not None
        if name == "output":
            return prediction.output
        of_layer = {
            "classifier": prediction.classifier_gram_from,
            "features": prediction.feature_gram_at,
            "dual": prediction.dual_at,
        }
        return of_layer[name](layer)
    eye = torch.eye(K, dtype=torch.float64)
    return eye - 1 / K if reference == "etf" and name != "dual" else eye


def _by_layer(
    factors: list[Tensor],
    means: Tensor,
    centre: Tensor,
    within: Tensor,
    centred: bool,
    reference: str,
    prediction: GOF | None,
) -> dict[str, list]:
    """Metrics of the features entering each layer, and of the product of the layers from there on."""
    K = len(means)
    found: dict[str, list] = {name: [] for name in ("nc1", "nc2_w", "nc2_h", "dual", "product")}
    products = factors[-1:]
    for factor in factors[-2::-1]:
        products.insert(0, products[0] @ factor)
    for layer, product in enumerate(products, 1):
        shown = means - centre if centred else means
        found["product"].append(product)
        found["nc1"].append(_nc1(means - centre, within))
        frame = {name: _frame(K, reference, prediction, name, layer) for name in ("classifier", "features", "dual")}
        found["nc2_w"].append(_distance(product @ product.mT, frame["classifier"]))
        found["nc2_h"].append(_distance(shown @ shown.mT, frame["features"]))
        found["dual"].append(_distance(product, frame["dual"].to(shown) @ shown))
        into = factors[layer - 1]
        means, centre, within = means @ into.mT, centre @ into.mT, into @ within @ into.mT
    return found


def _distance(measured: Tensor, reference: Tensor) -> float:
    """Between the two at Frobenius norm 1; a matrix that is zero stays zero."""
    a, b = (matrix / matrix.norm().clamp_min(1e-300) for matrix in (measured, reference.to(measured)))
    return float((a - b).norm())


def _nc1(centred: Tensor, within: Tensor) -> float:
    """`tr(Sigma_W Sigma_B^+) / K` by the few directions that the means span; infinite where they all coincide."""
    K, d = centred.shape
    _, s, V = torch.linalg.svd(centred, full_matrices=False)
    between = s.square() / K
    # The cut of torch.linalg.pinv on the d x d matrix; K means around their common mean have rank K - 1.
    kept = between > max(K, d) * torch.finfo(s.dtype).eps * between[0]
    kept[K - 1 :] = False
    if not bool(kept.any()):
        return math.inf
    spread = ((V @ within) * V).sum(1)
    return float((spread[kept] / between[kept]).sum() / K)


def _cdnv(means: Tensor, variance: Tensor) -> float:
    K = len(means)
    distance = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").square()
    i, j = torch.triu_indices(K, K, 1, device=means.device)
    return float(((variance[i] + variance[j]) / (2 * distance[i, j])).mean())
