"""Accuracy against a floor: stop counting when it is decided, and say how sure the floor is afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from lathe.core.example import call

__all__ = ["Top1", "floor_confidence"]


class Top1:
    """Top-1 accuracy on labelled samples, which stops early where a floor is decided.

    Args:
        batches: batches `(inputs, labels)`; the output's class dimension is the last of a matrix (`samples x classes`).
        confidence: with which the floor must be decided to stop before all samples were seen.
    """

    def __init__(self, batches: Sequence[tuple[Any, ...]], *, confidence: float = 0.999) -> None:
        self.batches = list(batches)
        self.samples = sum(len(batch[1]) for batch in self.batches)
        self.seen = 0
        """Samples looked at so far, over all calls."""
        # Quantile of the normal distribution, two-sided.
        self.z = math.sqrt(2) * float(torch.erfinv(torch.tensor(confidence, dtype=torch.float64)))

    @torch.no_grad()
    def correct(self, model: nn.Module) -> Bool[Tensor, " samples"]:
        """Which samples the network gets right."""
        self.seen += self.samples
        return torch.cat([_right(model, batch) for batch in self.batches])

    @torch.no_grad()
    def against(self, model: nn.Module, reference: Bool[Tensor, " samples"], ratio: float) -> float:
        """Accuracy relative to `ratio` times that of `reference`, on as many samples as decide whether it is above 1.

        Differences are taken sample by sample (what both get right does not blur them), the samples not yet seen are
        finite in number, and one unseen disagreement of each kind is assumed on top, so that a clean start does not
        pass for certainty. Samples must be in random order.
        """
        seen, total, squares = 0, 0.0, 0.0
        for batch in self.batches:
            right = _right(model, batch).double()
            difference = right - ratio * reference[seen : seen + len(right)].to(right.device)
            seen += len(right)
            self.seen += len(right)
            total += float(difference.sum())
            squares += float(difference.square().sum())
            mean = total / seen
            variance = (squares + 2) / seen - mean * mean
            left = 1 - seen / self.samples
            if left > 0 and abs(mean) > self.z * math.sqrt(variance * left / seen):
                break
        return 1 + mean / max(ratio * float(reference.double().mean()), 1e-12)


def _right(model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
    inputs, labels = batch
    output = call(model, inputs)
    output = getattr(output, "logits", output)
    return output.argmax(-1) == labels


def floor_confidence(
    base: Bool[Tensor, " samples"],
    quantized: Bool[Tensor, " samples"],
    ratio: float,
    *,
    resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Bootstrap confidence that the quantised network reaches `ratio` times the base's accuracy on samples like these.

    The share of resamples of the samples (drawn with replacement, both networks judged on the same ones) in which it
    does. Only the number of samples that each of the two gets right or wrong matters, so a resample is one multinomial
    draw, whatever the number of samples.
    """
    if base.shape != quantized.shape or not base.numel():
        raise ValueError(f"base and quantized must judge the same samples, got {len(base)} and {len(quantized)}")
    counts = torch.bincount(2 * base.long() + quantized.long(), minlength=4).double().cpu()
    generator = torch.Generator().manual_seed(seed)
    # A multinomial is a chain of binomials.
    left = torch.full((resamples,), float(base.numel()), dtype=torch.float64)
    weight = float(base.numel())
    drawn = []
    for count in counts.tolist()[:3]:
        probability = min(count / weight, 1.0) if weight > 0 else 0.0
        draw = torch.binomial(left, torch.full_like(left, probability), generator=generator)
        drawn.append(draw)
        left, weight = left - draw, weight - count
    drawn.append(left)
    _, only_quantized, only_base, both = drawn
    return float((both + only_quantized >= ratio * (both + only_base)).double().mean())
