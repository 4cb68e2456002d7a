"""Neural-collapse metrics of a trained network: finds its classifier, streams what enters it, compares with theory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lathe.core.example import call
from lathe.core.modes import evaluating
from lathe.core.surgery import get_module
from lathe.theory.neural_collapse.accumulator import NCReport, NeuralCollapse, Reference
from lathe.theory.neural_collapse.head import DeepLinearHead, factors_of
from lathe.theory.neural_collapse.optimum import Numbers

__all__ = ["neural_collapse"]


@torch.no_grad()
def neural_collapse(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layer: str | nn.Module | None = None,
    reference: Reference = "auto",
    weight_decay: float | Numbers | None = None,
    feature_decay: float | None = None,
    class_counts: Numbers | None = None,
    nc4: bool = True,
    progress: Callable[[int], None] | None = None,
) -> NCReport:
    """How collapsed a classifier is on the samples of `loader`, beside what theory predicts for their class counts.

    The network is run in evaluation mode and left as it was. What enters its classifier is summed as it passes, in
    float64; features are never held for more than one batch.

    Args:
        model: any classifier, called as `model(inputs)`, `model(*inputs)` or `model(**inputs)`.
        loader: gives `(inputs, target)`, target holding class numbers: a DataLoader, or a list of batches. For
            predictions to apply these are the training samples, each once.
        layer: the classifier: its name in the model, or the module; an `nn.Linear`, a `DeepLinearHead`, or an
            `nn.Sequential` of linear layers. By default the last one to run. Inputs with more than two dimensions are
            taken as many samples (tokens, pixels), with as many targets.
        reference: what to compare with, see `NeuralCollapse.compute`; unequal classes need the decays, or "etf" or
            "orthogonal".
        weight_decay: penalty of the head's layers (one number, or one a layer), as in `UFMLoss`. The decay of an
            optimiser that acts on all parameters is another model, for which nothing is predicted.
        feature_decay: penalty of the features, for the sum over all training samples.
        class_counts: of the training set, where `loader` holds other samples.
        nc4: whether to measure nc4, for which the network has to run twice over `loader`; left out (nan) where `loader`
            is an iterator, which cannot be started again.
        progress: told the number of batches done.

    Raises:
        ValueError: where the classifier is not found or does not fit the targets, `loader` is empty or lacks a class,
            features are not finite, or "gof" has no decays.
        TypeError: where `layer` is no linear layer, or a batch is no pair.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with evaluating(model):
        batches = iter(_moved(loader, device))
        first = next(batches, None)
        if first is None:
            raise ValueError("loader must give at least one batch, got none")
        head = _last_linear(model, first[0]) if layer is None else _named(model, layer)
        weights, bias = factors_of(head)
        collapse = NeuralCollapse(len(weights[-1]))
        done = 0
        with _entering(head) as entered:
            for inputs, target in _again(first, batches):
                features, target = _features(model, head, entered, inputs, target)
                collapse.update(features, target)
                done += 1
                if progress is not None:
                    progress(done)
            agreement = math.nan
            if nc4 and iter(loader) is not loader:
                means, agreed, seen = collapse.class_means, torch.zeros((), dtype=torch.int64, device=device), 0
                W = weights[0].double()
                for weight in weights[1:]:
                    W = weight.double() @ W
                centre = means.mean(0)
                around = means - centre
                for inputs, target in _moved(loader, device):
                    h = _features(model, head, entered, inputs, target)[0].double()
                    logits = h @ W.mT + (0.0 if bias is None else bias.double())
                    nearest = (around.square().sum(1) - 2 * (h - centre) @ around.mT).argmin(1)
                    agreed += (logits.argmax(1) == nearest).sum()
                    seen += len(h)
                    done += 1
                    if progress is not None:
                        progress(done)
                if seen:
                    agreement = int(agreed) / seen
    return collapse.compute(
        head,
        reference=reference,
        weight_decay=weight_decay,
        feature_decay=feature_decay,
        class_counts=class_counts,
        nc4=agreement,
    )


def _again(first: tuple[Any, Tensor], rest: Iterator[tuple[Any, Tensor]]) -> Iterator[tuple[Any, Tensor]]:
    yield first
    yield from rest


def _moved(loader: Iterable[Any], device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    for batch in loader:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
            raise TypeError(f"loader must give pairs (inputs, target) with target a tensor, got {type(batch).__name__}")
        yield _to(batch[0], device), batch[1]


def _to(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    if isinstance(inputs, dict):
        return {key: _to(part, device) for key, part in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_to(part, device) for part in inputs)
    return inputs


@contextmanager
def _entering(head: nn.Module) -> Iterator[list[Tensor]]:
    """What enters `head`, call by call."""
    entered: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, arguments: entered.append(arguments[0]))
    try:
        yield entered
    finally:
        handle.remove()


def _features(
    model: nn.Module, head: nn.Module, entered: list[Tensor], inputs: Any, target: Tensor
) -> tuple[Tensor, Tensor]:
    entered.clear()
    call(model, inputs)
    if len(entered) != 1:
        raise ValueError(f"the classifier {type(head).__name__} must run once a batch, it ran {len(entered)} times")
    features, target = entered[0].detach().flatten(0, -2), target.flatten()
    if len(features) != len(target):
        raise ValueError(f"target must have one class a sample, got {len(target)} for {len(features)} features")
    return features, target


def _last_linear(model: nn.Module, inputs: Any) -> nn.Module:
    """The linear layer or deep head that runs last."""
    order: list[nn.Module] = []
    heads = [module for module in model.modules() if isinstance(module, (nn.Linear, DeepLinearHead))]
    handles = [head.register_forward_pre_hook(lambda module, arguments: order.append(module)) for head in heads]
    try:
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not order:
        raise ValueError(
            f"{type(model).__name__} runs no nn.Linear and no DeepLinearHead: name its classifier by layer=, or "
            "replace a convolution that classifies by an nn.Linear"
        )
    return order[-1]


def _named(model: nn.Module, layer: str | nn.Module) -> nn.Module:
    head = get_module(model, layer) if isinstance(layer, str) else layer
    try:
        factors_of(head)
    except ValueError as error:
        raise TypeError(str(error).replace("head", "layer", 1)) from None
    if not any(module is head for module in model.modules()):
        raise ValueError(f"layer must be a part of the model, got a {type(head).__name__} that is not")
    return head
