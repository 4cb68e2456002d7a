"""A classification head without gradients: binarised features, one memory a class, fitted in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lathe.theory.dense_hebbian.dynamics import mean_field
from lathe.theory.dense_hebbian.network import DenseHebbian

__all__ = ["DenseHebbianClassifier"]


class DenseHebbianClassifier(nn.Module):
    """Scores features by their overlap with the class averages, after a recall that lets the memories compete.

    A drop-in for the last `nn.Linear` on frozen features. Before `fit` all scores are 0.

    Args:
        in_features: number of features, at least P.
        out_features: number of classes.
        P: order of the interaction, even: larger keeps classes apart that have much in common.
        steps: of recall before scoring; 0 takes the nearest average.
        binarize: compare features with 0 ("sign") or with their medians over the data ("median", which `fit` keeps in
            memory to find them).
        recentre: subtract from the averages what all classes share.

    Shape: `(batch, in_features)` -> `(batch, out_features)`, cosines in [-1, 1]. Gradients go straight through the
    comparison, for features within 1 of the threshold.

    Raises:
        ValueError: for an odd P, one that exceeds in_features, no class, or negative steps.
    """

    threshold: Tensor
    averages: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        P: int = 8,
        steps: int = 5,
        binarize: Literal["sign", "median"] = "sign",
        recentre: bool = False,
    ) -> None:
        super().__init__()
        if P < 2 or P % 2 or in_features < P:
            raise ValueError(f"P must be even, from 2 to in_features = {in_features}, got {P}")
        if out_features < 1 or steps < 0:
            raise ValueError(f"out_features must be at least 1 and steps at least 0, got {out_features} and {steps}")
        if binarize not in ("sign", "median"):
            raise ValueError(f"binarize must be 'sign' or 'median', got {binarize!r}")
        self.in_features, self.out_features, self.P, self.steps = in_features, out_features, P, steps
        self.binarize, self.recentre = binarize, recentre
        self.register_buffer("threshold", torch.zeros(in_features))
        self.register_buffer("averages", torch.zeros(out_features, in_features))

    @classmethod
    def like(cls, linear: nn.Linear, *, P: int = 8, steps: int = 5, recentre: bool = False) -> DenseHebbianClassifier:
        """An unfitted head where `linear` stood: same shapes, device and dtype."""
        head = cls(linear.in_features, linear.out_features, P=P, steps=steps, recentre=recentre)
        return head.to(linear.weight)

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> DenseHebbianClassifier:
        """Learns from `(features, labels)` batches, once through; what was learnt before is forgotten.

        Raises:
            ValueError: for features of another width or that are not finite, or a class without an example.
        """
        if self.binarize == "median":
            batches = list(batches)
            if batches:
                self.threshold.copy_(torch.cat([features for features, _ in batches]).median(0).values)
        sums = torch.zeros(self.averages.shape, dtype=torch.float64, device=self.averages.device)
        counts = sums.new_zeros(self.out_features)
        for features, labels in batches:
            if not torch.isfinite(features).all():
                raise ValueError("features must be finite, got infinite or NaN entries")
            if len(labels) and not 0 <= labels.min() <= labels.max() < self.out_features:
                raise ValueError(f"labels must lie in 0 .. {self.out_features - 1}, got {labels.unique().tolist()}")
            labels = labels.to(sums.device)
            sums.index_add_(0, labels, self._signs(features.to(self.averages.device)).double())
            counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        if (counts == 0).any():
            empty = (counts == 0).nonzero()[:, 0].tolist()
            raise ValueError(f"batches must hold examples of all {self.out_features} classes, got none of {empty}")
        averages = sums / counts.unsqueeze(1)
        self.averages.copy_(averages - averages.mean(0) if self.recentre else averages)
        return self

    def memory(self) -> DenseHebbian:
        """The network behind the head: energies (an outlier score), exact fields, sampling."""
        return DenseHebbian(self.averages, self.P)

    def forward(self, x: Float[Tensor, "batch in_features"]) -> Float[Tensor, "batch out_features"]:
        s = self._signs(x)
        R = self.averages.square().mean(1).clamp_min(1e-12)
        odd = torch.arange(self.in_features, device=x.device) % 2 == 1
        for _ in range(self.steps):
            for half in (~odd, odd):
                # Only signs count: the scale keeps the sums near one.
                h = mean_field(self.averages * R.rsqrt().unsqueeze(1), torch.ones_like(R), self.P, s)
                s = torch.where(half & (s * h < 0), -s, s)
        return s @ self.averages.T / (self.in_features * R.sqrt())

    def _signs(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"features must have the shape (batch, {self.in_features}), got {tuple(x.shape)}")
        away = x - self.threshold
        soft = away.clamp(-1, 1)
        return torch.where(away >= 0, 1.0, -1.0).to(x.dtype) + (soft - soft.detach())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, P={self.P}, steps={self.steps}"
