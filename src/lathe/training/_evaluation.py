"""Metrics of a network over a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lathe.training._batches import Batch, Data, Source, open_source, walk
from lathe.training._processes import Forward, Processes

__all__ = ["Metric", "accuracy", "evaluate", "judge", "place"]

Metric = Callable[..., Tensor | float]


def accuracy(output: Float[Tensor, "batch classes *spatial"], target: Int[Tensor, " batch *spatial"]) -> Tensor:
    """Share of the targets that have the highest output, in [0, 1]."""
    return (output.argmax(1) == target).float().mean()


def evaluate(
    model: nn.Module, data: Data, metrics: Mapping[str, Metric], *, batch_size: int | None = None
) -> dict[str, float]:
    """Means of the metrics over all samples of `data`, in eval mode, on the model's device.

    Args:
        data: `(inputs, *targets)`, a Dataset or a DataLoader, as for `fit`.
        metrics: name -> function of the output and the targets of a batch, a mean over the batch's samples.
        batch_size: samples of a forward pass; 1000 where nothing is said.
    """
    source = open_source(data, batch_size=batch_size, default=1000)
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    training = model.training
    try:
        return judge(Forward(model, device, "no"), source, metrics, None)
    finally:
        model.train(training)


@torch.no_grad()
def judge(
    forward: Forward, source: Source, metrics: Mapping[str, Metric], processes: Processes | None
) -> dict[str, float]:
    """Means of the metrics over the samples of all processes; a metric's value counts by its batch's size."""
    forward.eval()
    sums = torch.zeros(len(metrics) + 1, dtype=torch.float64)
    for batch in source.epoch(0):
        if batch.mine:
            inputs, targets = place(batch, forward.device)
            output = forward(inputs)
            values = [float(metric(output, *targets)) for metric in metrics.values()]
            sums += batch.mine * torch.tensor([*values, 1.0], dtype=torch.float64)
    if processes is not None and processes.world > 1:
        sums = torch.stack(processes.all(sums)).sum(0)
    if not sums[-1]:
        raise ValueError("validation data must hold at least one sample, got none")
    return {name: (value / sums[-1]).item() for name, value in zip(metrics, sums)}


def place(batch: Batch, device: torch.device) -> tuple[Any, tuple[Any, ...]]:
    """The batch's inputs and targets on `device`."""
    move = partial(_move, device)
    return walk(move, batch.inputs), tuple(walk(move, target) for target in batch.targets)


def _move(device: torch.device, part: Tensor) -> Tensor:
    return part if part.device == device else part.to(device, non_blocking=True)
