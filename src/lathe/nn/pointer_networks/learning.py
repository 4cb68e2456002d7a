"""What pointer networks are trained by: the likelihood of known sequences, or the cost of sequences they write."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from lathe.data.tours import IGNORED
from lathe.nn.pointer_networks.constraints import Constraint
from lathe.nn.pointer_networks.network import PointSequenceModel

__all__ = ["TeacherForced", "pointer_loss", "reinforce_loss"]


def pointer_loss(
    logits: Float[Tensor, "B T C"], targets: Int64[Tensor, "B T"], ignore_index: int = IGNORED
) -> Float[Tensor, ""]:
    """-log p of the target sequences, the stop token with them: a sum over steps, a mean over the batch.

    Raises:
        ValueError: where shapes do not fit.

    Source: Vinyals et al. 2015, equation 2.
    """
    if logits.shape[:2] != targets.shape:
        raise ValueError(f"targets must be {tuple(logits.shape[:2])}, got shape {tuple(targets.shape)}")
    total = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction="sum"
    )
    return total / max(1, len(targets))


class TeacherForced(nn.Module):
    """A network as `lathe.training.fit` calls it, with one argument: `(points, targets)`, or these and lengths.

    fit(TeacherForced(net), HullDataset(100_000, 10).batches(128), loss=pointer_loss, optimizer=..., steps=5000)
    """

    def __init__(self, network: PointSequenceModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, problem: tuple[Tensor, ...] | list[Tensor]) -> Float[Tensor, "B T C"]:
        return self.network(*problem)


def reinforce_loss(
    network: PointSequenceModel,
    points: Float[Tensor, "B n d"],
    cost: Callable[[Tensor, Tensor], Tensor],
    *,
    valid: Constraint | None = None,
    samples: int = 8,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """A loss whose gradient is that of the expected cost of what the network writes; no labels are needed.

    Of each sample several sequences are drawn; the mean cost of the others is the baseline of each (Kool et al. 2019,
    "Buy 4 REINFORCE samples, get a baseline for free"). Its value is 0 on average and says nothing.

    Args:
        cost: `cost(points, sequences)` of (rows, n, d) and (rows, T), a number a row: `tour_length` for tours.
        valid: the constraint under which sequences are drawn and weighed.
        samples: sequences of each sample, at least 2.

    Raises:
        ValueError: for fewer than 2 samples.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, each being the other's baseline, got {samples}")
    drawn = network.decode(points, strategy="sample", samples=samples, valid=valid, generator=generator).sequences
    rows, sequences = points.repeat_interleave(samples, 0), drawn.flatten(0, 1)
    with torch.no_grad():
        costs = cost(rows, sequences).view(-1, samples)
        advantage = (costs - costs.mean(1, keepdim=True)) * samples / (samples - 1)
    return (advantage.flatten() * network.log_prob(rows, sequences, valid=valid)).mean()
