"""Whole networks: into hypercomplex layers and back, to a parameter budget, and read for the algebras they learnt."""

from __future__ import annotations

import copy
import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lathe.core.surgery import swap
from lathe.nn.hypercomplex_layers.algebras import algebra_span_angles, algebra_tensor
from lathe.nn.hypercomplex_layers.kronecker import kronecker_singular_values
from lathe.nn.hypercomplex_layers.layers import (
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHConvTranspose1d,
    PHConvTranspose2d,
    PHConvTranspose3d,
    PHLinear,
)
from lathe.nn.hypercomplex_layers.weight import HypercomplexLayer, OnIndivisible

__all__ = ["TermPlan", "algebra_report", "choose_terms", "param_groups", "ph_expand", "ph_fold"]

_LAYERS: tuple[type[HypercomplexLayer], ...] = (
    PHLinear,
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHConvTranspose1d,
    PHConvTranspose2d,
    PHConvTranspose3d,
)
_HYPERCOMPLEX: dict[type[nn.Module], type[HypercomplexLayer]] = {layer.replaces: layer for layer in _LAYERS}


def ph_fold(model: nn.Module) -> nn.Module:
    """A copy of `model` with ordinary layers in place of the hypercomplex ones: the same function, for deployment.

    It runs as fast as a network that was never hypercomplex, and stores as many parameters.
    """
    return swap(copy.deepcopy(model), {layer: layer.fold for layer in _LAYERS}).model


def ph_expand(
    model: nn.Module,
    *,
    n: int = 4,
    terms: int | Mapping[str, int] | None = None,
    where: Callable[..., Any] | None = None,
    on_indivisible: OnIndivisible = "skip",
    **options: Any,
) -> nn.Module:
    """A copy of a trained `model` with hypercomplex layers fitted to the weights of its linear layers and convolutions.

    Undoes `ph_fold` exactly: a weight that is a sum of n Kronecker products is fitted without error. Of any other, each
    layer's `relative_error` says what was lost.

    Args:
        terms: products summed in every layer (n by default), or in each layer named, and then no other is replaced:
            `choose_terms(...).terms`.
        where: `where(name)` or `where(name, module)`; false leaves a layer alone.
        on_indivisible, options: as in `HypercomplexLayer.like`.

    Raises:
        ValueError: where `terms` names what is no linear layer or convolution of the model.
    """
    model = copy.deepcopy(model)
    named: Mapping[str, int] | None = terms if isinstance(terms, Mapping) else None
    layers = {name: module for name, module in model.named_modules() if type(module) in _HYPERCOMPLEX}
    if named is not None and (unknown := set(named) - set(layers)):
        raise ValueError(f"terms must name linear layers or convolutions, got {', '.join(sorted(unknown))}")
    terms_of = {layers[name]: count for name, count in (named or {}).items()}

    def rule(replacement: type[HypercomplexLayer]) -> Callable[[nn.Module], nn.Module | None]:
        def fitted(layer: nn.Module) -> nn.Module | None:
            if named is not None and layer not in terms_of:
                return None
            count = terms_of[layer] if named is not None else cast("int | None", terms)
            return replacement.from_trained(layer, n=n, terms=count, on_indivisible=on_indivisible, **options)

        return fitted

    return swap(model, {plain: rule(ours) for plain, ours in _HYPERCOMPLEX.items()}, where=where).model


@dataclass(frozen=True)
class TermPlan:
    """How many Kronecker products each layer gets.

    Args:
        terms: by name of layer; a layer that is cheaper left as it is does not appear.
        relative_error: predicted from the singular values, by name of layer, 0 for those left alone.
        parameters: of the whole network that the plan leads to.
    """

    terms: dict[str, int]
    relative_error: dict[str, float]
    parameters: int


def choose_terms(
    model: nn.Module, *, n: int = 4, parameters: float, where: Callable[[str], bool] | None = None
) -> TermPlan:
    """Spends a budget of parameters where it lowers the error of the weights most.

    Minimises the sum over layers of the squared relative errors of `ph_expand(model, n=n, terms=plan.terms)`, which the
    singular values of the rearranged weights tell beforehand. What has the largest gain for its price is bought first,
    which is optimal but for the last purchases. A layer stays ordinary where that costs no more, where n does not
    divide its channels, and where it shares its weight with another.

    Args:
        parameters: of the whole network: a part of what it has up to 1, else a number.
        where: `where(name)`; false leaves a layer ordinary.

    Raises:
        ValueError: where one product a layer is already more than the budget.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    budget = int(parameters * total) if parameters <= 1 else int(parameters)
    uses = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    energies: dict[str, list[float]] = {}
    prices: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        ours = _HYPERCOMPLEX.get(type(module))
        if ours is None or (where is not None and not where(name)):
            continue
        weight = cast(Tensor, module.weight)
        groups = cast(int, getattr(module, "groups", 1))
        first, second = weight.shape[:2]
        depthwise = groups > 1 and (first // groups if ours.transposed else second) == 1
        if depthwise or first % (n * groups) or second % n or uses[id(weight)] > 1:
            continue
        values = kronecker_singular_values(weight, n, groups=groups) ** 2
        scale = float(values.sum())
        energies[name] = (values / scale).tolist() if scale > 0 else [0.0] * len(values)
        prices[name] = (n * n + weight.numel() // (n * n), weight.numel())

    # Every layer starts with one product, where that is a saving at all.
    bought = {name: 1 for name, (product, plain) in prices.items() if product < plain}
    spent = total - sum(prices[name][1] - prices[name][0] for name in bought)
    if spent > budget:
        raise ValueError(f"parameters must leave room for one product a layer, {spent:,} in all, got {budget:,}")

    def offer(name: str) -> tuple[float, str, int, int]:
        """The purchase with the largest gain for its price: one product more, several, or the layer as it is (0)."""
        product, plain = prices[name]
        energy, owned = energies[name], bought[name]
        most = min(len(energy), (plain - 1) // product)
        choices = [(m, (m - owned) * product, sum(energy[owned:m])) for m in range(owned + 1, most + 1)]
        choices.append((0, plain - owned * product, sum(energy[owned:])))
        count, price, gain = max(choices, key=lambda choice: choice[2] / choice[1])
        return -gain / price, name, count, price

    offers = [offer(name) for name in bought]
    heapq.heapify(offers)
    while offers:
        _, name, count, price = heapq.heappop(offers)
        if spent + price > budget:
            continue
        spent += price
        if count == 0:
            del bought[name]
        else:
            bought[name] = count
            heapq.heappush(offers, offer(name))
    errors = {name: max(0.0, sum(energies[name][bought[name] :])) ** 0.5 if name in bought else 0.0 for name in prices}
    return TermPlan(bought, errors, spent)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser that decay all but the algebras.

    H is a product: with decay on A and on F it would shrink twice (the reference code decays both).
    """
    algebras = {id(module.A) for module in model.modules() if isinstance(module, HypercomplexLayer)}
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in learnt if id(p) not in algebras], "weight_decay": weight_decay},
        {"params": [p for p in learnt if id(p) in algebras], "weight_decay": 0.0},
    ]


def algebra_report(
    model: nn.Module, algebras: Sequence[str] = ("complex", "quaternion", "octonion", "clifford(1,1)", "clifford(2,0)")
) -> dict[str, dict[str, float]]:
    """Which algebra did each layer learn? The largest angle between its span and that of each algebra of its n.

    Returns:
        Name of layer -> name of algebra -> radians, from 0 (the same span) to pi/2. Spans drawn at random are nearly
        orthogonal in some direction: an angle close to pi/2 says no more than that the layer learnt something else.
    """
    tables = {name: algebra_tensor(name, dtype=torch.float64) for name in algebras}
    report: dict[str, dict[str, float]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, HypercomplexLayer):
            continue
        A = module.A.detach().cpu().flatten(0, -3)
        report[name] = {
            algebra: float(algebra_span_angles(A, table)[-1])
            for algebra, table in tables.items()
            if table.shape[1:] == A.shape[1:]
        }
    return report
