"""Parts to train as the theory has it: free features, a head of several linear layers, and the penalised loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.core.kept import Kept
from lathe.core.shapes import linear_arguments

__all__ = ["DeepLinearHead", "UFMLoss", "UnconstrainedFeatures", "factors_of"]


class UnconstrainedFeatures(nn.Module):
    """Features as free variables: what an arbitrarily able network could output for each sample.

    Args:
        num_samples: N.
        width: dimension of a feature.
        std: of the normal entries at the start.

    Shape: called with sample numbers `(batch,)`, or with nothing for all -> `(batch, width)`.

    Raises:
        ValueError: for no samples or no width.
    """

    def __init__(
        self,
        num_samples: int,
        width: int,
        *,
        std: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_samples < 1 or width < 1:
            raise ValueError(f"num_samples and width must be at least 1, got {num_samples} and {width}")
        self.features = nn.Parameter(std * torch.randn(num_samples, width, device=device, dtype=dtype))

    def forward(self, index: Shaped[Tensor, " batch"] | None = None) -> Float[Tensor, "batch width"]:
        return self.features if index is None else self.features[index]


class DeepLinearHead(nn.Module):
    """A classifier of `depth` linear layers with nothing between them; only the last has a bias.

    It computes what one `nn.Linear` can, but a penalty on its factors acts as one on a Schatten quasi-norm of their
    product: it prefers few directions, the more so the deeper. The factors are multiplied first, from the side of the
    classes, so that the batch meets one matrix, whatever the depth; in evaluation the product is kept.

    Args:
        in_features, num_classes: as `in_features` and `out_features` of `nn.Linear`.
        depth: number of layers, M.
        bias: of the last layer.
        width: of the layers between; `in_features` where nothing is said.

    Shape: `(*, in_features)` -> `(*, num_classes)`.

    Raises:
        ValueError: for sizes or a depth below 1.

    Example:
        >>> DeepLinearHead(8, 3, depth=2)(torch.zeros(5, 8)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        depth: int,
        bias: bool = True,
        *,
        width: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = in_features if width is None else width
        if min(in_features, num_classes, depth, width) < 1:
            raise ValueError(
                "in_features, num_classes, depth and width must be at least 1, got "
                f"{in_features}, {num_classes}, {depth} and {width}"
            )
        self.in_features, self.num_classes, self.depth, self.width = in_features, num_classes, depth, width
        sizes = [in_features, *[width] * (depth - 1), num_classes]
        self.weights = nn.ParameterList(
            torch.empty(fan_out, fan_in, device=device, dtype=dtype) for fan_in, fan_out in itertools.pairwise(sizes)
        )
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        self._kept = Kept()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthogonal factors (as the paper starts), which let signals pass at any depth, and no bias."""
        for weight in self.weights:
            if not weight.is_meta:
                with torch.no_grad():  # drawn in float32 at least: QR knows no half precision
                    weight.copy_(nn.init.orthogonal_(torch.empty_like(weight, dtype=torch.float32)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def like(cls, linear: nn.Linear, *, depth: int, width: int | None = None) -> DeepLinearHead:
        """A fresh head that fits where `linear` stood: same sizes, device and dtype."""
        return cls(**_arguments(linear), depth=depth, width=width)

    @classmethod
    def from_trained(cls, linear: nn.Linear, *, depth: int, width: int | None = None) -> DeepLinearHead:
        """As `like`, computing what `linear` does: its matrix in `depth` balanced factors, the bias as it is.

        Balanced factors, `W_{m+1}^T W_{m+1} = W_m W_m^T`, have the least sum of squares for their product.

        Raises:
            ValueError: where `width` is below the smaller of the matrix's sizes, and would cut it.
        """
        head = cls.like(linear, depth=depth, width=width)
        rank = min(linear.weight.shape)
        if depth > 1 and head.width < rank:
            raise ValueError(f"width must be at least {rank} to hold the trained matrix, got {head.width}")
        with torch.no_grad():
            U, s, V = torch.linalg.svd(linear.weight.double(), full_matrices=False)
            share = s ** (1 / depth)
            for m, weight in enumerate(head.weights):
                left, right = m == depth - 1, m == 0
                if left and right:
                    weight.copy_(linear.weight)
                    continue
                weight.zero_()
                if left:
                    weight[:, :rank] = (U * share).to(weight)
                elif right:
                    weight[:rank] = (share[:, None] * V).to(weight)
                else:
                    weight[:rank, :rank] = torch.diag(share).to(weight)
            if head.bias is not None:
                head.bias.copy_(linear.bias)
        return head

    def product(self) -> Float[Tensor, "classes features"]:
        """W = W_M .. W_1, in the cheapest order."""
        factors = list(self.weights)[::-1]
        return factors[0] if len(factors) == 1 else torch.linalg.multi_dot(factors)

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch classes"]:
        if not x.ndim or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features in its last dimension, got {tuple(x.shape)}")
        weight = self.product() if self.training else self._kept.get(list(self.weights), self.product)
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        width = f", width={self.width}" if self.width != self.in_features else ""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, depth={self.depth}, "
            f"bias={self.bias is not None}{width}"
        )


class UFMLoss(nn.Module):
    """The loss whose minimum the theory gives: data, plus a penalty on every factor of the head and on the features.

    This is not weight decay in the optimiser: leave that off. Squared error is summed over classes and divided by twice
    the samples, not by classes as torch's mean is: another factor there would move the threshold of collapse.

    Args:
        weight_decay: of the head's factors; one number, or one a layer from W_1 on.
        feature_decay: of the features, for the sum over all samples.
        loss: "mse" or "cross_entropy".
        num_samples: size of the training set, where batches are smaller: a batch's features then stand for all.
        bias_decay: of the head's bias; the theory of squared error has none.

    Shape: called as `loss(logits, target, features, head)` with `(batch, classes)`, class numbers `(batch,)` (for "mse"
    also real-valued targets `(batch, classes)`), `(batch, features)`, and the head: an `nn.Linear`, a `DeepLinearHead`
    or an `nn.Sequential` of linear layers. A scalar comes back.

    Raises:
        ValueError: for an unknown loss, negative decays, class numbers outside the logits, or shapes that do not match.
    """

    def __init__(
        self,
        weight_decay: float | Sequence[float],
        feature_decay: float,
        loss: Literal["mse", "cross_entropy"] = "mse",
        *,
        num_samples: int | None = None,
        bias_decay: float = 0.0,
    ) -> None:
        super().__init__()
        decays = [float(each) for each in (weight_decay if isinstance(weight_decay, Sequence) else [weight_decay])]
        if loss not in ("mse", "cross_entropy"):
            raise ValueError(f"loss must be 'mse' or 'cross_entropy', got {loss!r}")
        if not decays or not all(0 <= each < math.inf for each in (*decays, feature_decay, bias_decay)):
            raise ValueError(f"decays must be >= 0, got {weight_decay}, {feature_decay} and {bias_decay}")
        self.weight_decay, self.feature_decay, self.bias_decay = decays, float(feature_decay), float(bias_decay)
        self.loss, self.num_samples = loss, num_samples

    def forward(
        self,
        logits: Float[Tensor, "batch classes"],
        target: Shaped[Tensor, "batch *classes"],
        features: Float[Tensor, "batch features"],
        head: nn.Module,
    ) -> Float[Tensor, ""]:
        batch, classes = logits.shape
        if len(target) != batch or len(features) != batch:
            raise ValueError(
                f"logits, target and features must have one row a sample, got {batch}, {len(target)}, {len(features)}"
            )
        weights, bias = factors_of(head)
        if len(self.weight_decay) not in (1, len(weights)):
            raise ValueError(f"weight_decay has {len(self.weight_decay)} entries for a head of {len(weights)} layers")
        decays = self.weight_decay * len(weights) if len(self.weight_decay) == 1 else self.weight_decay
        if self.loss == "cross_entropy":
            data = F.cross_entropy(logits, target)
        else:
            if target.ndim == 1:
                target = F.one_hot(target.long(), classes)
            if target.shape != logits.shape:
                raise ValueError(f"target must be of shape {tuple(logits.shape)}, got {tuple(target.shape)}")
            data = (logits - target.to(logits)).square().sum() / (2 * batch)
        penalty = sum(decay / 2 * weight.square().sum() for decay, weight in zip(decays, weights))
        penalty = penalty + self.feature_decay / 2 * (self.num_samples or batch) / batch * features.square().sum()
        if bias is not None and self.bias_decay:
            penalty = penalty + self.bias_decay / 2 * bias.square().sum()
        return data + penalty


def factors_of(head: nn.Module) -> tuple[list[Tensor], Tensor | None]:
    """W_1 .. W_M of a head, and the bias of the last.

    Raises:
        ValueError: for a module that is no chain of linear layers, or has a bias before the last of them.
    """
    if isinstance(head, DeepLinearHead):
        return list(head.weights), head.bias
    if isinstance(head, nn.Linear):
        return [head.weight], head.bias
    if isinstance(head, nn.Sequential):
        layers = [layer for layer in head if not isinstance(layer, (nn.Identity, nn.Dropout, nn.Flatten))]
        if layers and all(isinstance(layer, nn.Linear) for layer in layers):
            if any(layer.bias is not None for layer in layers[:-1]):
                raise ValueError("head must have no bias before its last layer, as in DeepLinearHead")
            return [layer.weight for layer in layers], layers[-1].bias  # type: ignore[misc, return-value]
    raise ValueError(
        f"head must be an nn.Linear, a DeepLinearHead or an nn.Sequential of linear layers, got {type(head).__name__}"
    )


def _arguments(linear: nn.Linear) -> dict:
    arguments = linear_arguments(linear)
    arguments["num_classes"] = arguments.pop("out_features")
    return arguments
