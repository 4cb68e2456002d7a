"""In which order layers may lose bits, least sensitive first: the paper's, its companion's, and controls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lathe.compression.mixed_precision_quantization.calibration import as_batches, calibrate
from lathe.compression.mixed_precision_quantization.interactions import Interactions, pairwise_interactions
from lathe.compression.mixed_precision_quantization.simulation import Simulator
from lathe.core.curvature import Hessian, Trace, hessian_trace
from lathe.core.example import call

__all__ = [
    "Order",
    "augmented_scores",
    "greedy_pairs",
    "half_pair_scores",
    "hessian_scores",
    "noise_scores",
    "quantization_errors",
    "sensitivity_order",
]

Order = Literal[
    "augmented", "hessian", "qe", "noise", "random", "single", "greedy_pairs", "half_pairs", "hessian_pairs"
]


def quantization_errors(simulator: Simulator, bits: int) -> Float[Tensor, " layers"]:
    """QE: `||Q(W) - W|| / ||W||` of each layer's weight; needs no data."""
    errors = simulator.errors(bits)
    ratios = [
        float(errors[name].norm() / layer.weight.detach().float().norm().clamp_min(1e-30))
        for name, layer in simulator.layers.items()
    ]
    return torch.tensor(ratios, dtype=torch.float64)


def hessian_scores(
    simulator: Simulator,
    loss_fn: Callable[..., Tensor],
    batches: Any,
    bits: int,
    *,
    probes: int = 50,
    tol: float | None = 0.05,
    seed: int = 0,
    traces: dict[str, Trace] | None = None,
) -> Float[Tensor, " layers"]:
    """`h_i = Tr(H_i) / n_i * ||Q(W_i) - W_i||^2` (HAWQ-V2), with the unquantised network's Hessian.

    Traces below zero (of a network that is not at a minimum) count as zero.

    Args:
        probes, tol, seed: for `hessian_trace`.
        traces: estimated before; None estimates them.
    """
    if traces is None:
        traces = layer_traces(simulator, loss_fn, batches, probes=probes, tol=tol, seed=seed)
    errors = simulator.errors(bits)
    scores = [
        max(traces[name].mean, 0.0) / error.numel() * float(error.double().square().sum())
        for name, error in errors.items()
    ]
    return torch.tensor(scores, dtype=torch.float64)


def layer_traces(
    simulator: Simulator, loss_fn: Callable[..., Tensor], batches: Any, *, probes: int, tol: float | None, seed: int
) -> dict[str, Trace]:
    """Hessian traces with respect to the layers' weights, no layer quantised."""
    kept = simulator.config
    simulator.configure({})
    try:
        data = as_batches(batches, name="batches")
        return hessian_trace(simulator, loss_fn, data, simulator.weight_names(), probes, seed, tol)
    finally:
        simulator.configure(kept)


@torch.no_grad()
def noise_scores(
    simulator: Simulator, loss_fn: Callable[..., Tensor], batches: Any, bits: int, *, draws: int = 3, seed: int = 0
) -> Float[Tensor, " layers"]:
    """Mean loss increase when a layer's weight gets Gaussian noise as large as its rounding error (companion paper)."""
    kept, data = simulator.config, as_batches(batches, name="batches")
    generator = torch.Generator().manual_seed(seed)
    simulator.configure({})
    try:
        clean = _loss(simulator, loss_fn, data)
        scores = []
        for name, error in simulator.errors(bits).items():
            layer, size = simulator.layers[name], error.square().mean().sqrt()
            increase = 0.0
            for _ in range(draws):
                noise = torch.randn(error.shape, generator=generator).to(error.device) * size
                layer.noise = noise.to(layer.weight.dtype)
                increase += _loss(simulator, loss_fn, data) - clean
                layer.noise = None
            scores.append(increase / draws)
        return torch.tensor(scores, dtype=torch.float64)
    finally:
        for layer in simulator.layers.values():
            layer.noise = None
        simulator.configure(kept)


def augmented_scores(
    hessian: Float[Tensor, " layers"], interactions: Interactions, weight: float = 1.0
) -> Float[Tensor, " layers"]:
    """r1: `h_i / mean(h) + weight * r_i / mean(r)` with `r_i = sum_j D({i, j})`, which includes `D({i})` itself.

    The layers' own curvature and what is measured in company, each in units of its mean.
    """
    rows = interactions.together().sum(1)
    return _in_means(hessian) + weight * _in_means(rows)


def half_pair_scores(interactions: Interactions) -> Float[Tensor, " layers"]:
    """r3: `D({i}) + 1/2 sum_j Omega_ij`."""
    return interactions.single + interactions.pair.sum(1) / 2


def greedy_pairs(single: Float[Tensor, " layers"], pair: Float[Tensor, "layers layers"]) -> list[int]:
    """r2 (r4 with `Omega_ij = e_i^T H e_j`): append the layer that costs least beside those chosen, again and again.

    That is `argmin_i d_i + sum_{j chosen} Omega_ij`; the first of equals is taken.
    """
    cost = single.clone()
    order: list[int] = []
    for _ in range(len(single)):
        masked = cost.clone()
        masked[order] = float("inf")
        chosen = int(masked.argmin())
        order.append(chosen)
        cost = cost + pair[:, chosen]
    return order


def sensitivity_order(
    model: nn.Module,
    method: str = "augmented",
    *,
    loss_fn: Callable[..., Tensor] | None = None,
    batches: Any = None,
    bits: int = 4,
    weight: float = 1.0,
    probes: int = 50,
    tol: float | None = 0.05,
    seed: int = 0,
    interactions: Interactions | None = None,
    traces: dict[str, Trace] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[str]:
    """Names of the quantisable layers, least sensitive first; equals keep the order in which they run.

    Args:
        model: a `Simulator`, or a network, which is then calibrated on `batches`.
        method: "augmented" (r1, Hessian and pairs), "hessian" (trace times error), "qe" (relative error of the
            weights), "noise", "random", "single" (measured `D({i})`), "greedy_pairs" (r2), "half_pairs" (r3),
            "hessian_pairs" (r4, greedy on Hessian forms, without measuring pairs).
        loss_fn, batches: the criterion and the calibration set; "qe" and "random" need none (given a `Simulator`).
        bits: at which errors and pairs are taken: the lowest that the search may use.
        weight: of the pair term in "augmented".
        probes, tol: for the Hessian's traces. seed: of the probes, of the noise and of the random order.
        interactions, traces: measured before; None measures what is needed.

    Raises:
        ValueError: where `method` is unknown, or what it needs is missing.
    """
    if method not in get_args(Order):
        raise ValueError(f"method must be one of {', '.join(get_args(Order))}, got {method!r}")
    if batches is None and not (isinstance(model, Simulator) and method in ("qe", "random")):
        raise ValueError(f"batches must be given for the order {method!r}, got None")
    data = None if batches is None else as_batches(batches, name="batches")
    simulator = model if isinstance(model, Simulator) else Simulator(model, calibrate(model, data))
    names = list(simulator.layers)
    if method == "random":
        places = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
        return [names[place] for place in places]
    if method == "qe":
        return _ascending(names, quantization_errors(simulator, bits))
    if loss_fn is None:
        raise ValueError(f"loss_fn must be given for the order {method!r}, got None")
    assert data is not None
    if method == "noise":
        return _ascending(names, noise_scores(simulator, loss_fn, data, bits, seed=seed))
    if method == "hessian_pairs":
        return [names[place] for place in greedy_pairs(*hessian_interactions(simulator, loss_fn, data, bits))]
    options: dict[str, Any] = {"probes": probes, "tol": tol, "seed": seed, "traces": traces}
    if method == "hessian":
        return _ascending(names, hessian_scores(simulator, loss_fn, data, bits, **options))
    if method == "single" and interactions is None:
        return _ascending(names, single_increases(simulator, loss_fn, data, bits))
    if interactions is None:
        interactions = pairwise_interactions(simulator, loss_fn, data, bits, progress=progress)
    if method == "single":
        return _ascending(names, interactions.single)
    if method == "greedy_pairs":
        return [names[place] for place in greedy_pairs(interactions.single, interactions.pair)]
    if method == "half_pairs":
        return _ascending(names, half_pair_scores(interactions))
    hessian = hessian_scores(simulator, loss_fn, data, bits, **options)
    return _ascending(names, augmented_scores(hessian, interactions, weight))


def hessian_interactions(simulator: Simulator, loss_fn: Callable[..., Tensor], batches: Any, bits: int) -> Interactions:
    """Second-order terms without forward passes: `D({i}) ~ e_i^T H e_i / 2` and `Omega_ij ~ e_i^T H e_j` (r4)."""
    kept, data = simulator.config, as_batches(batches, name="batches")
    simulator.configure({})
    try:
        weights = {name: parameters[0] for name, parameters in simulator.weight_names().items()}
        hessian = Hessian(simulator, loss_fn, data, list(dict.fromkeys(weights.values())))
        errors = [{weights[name]: error} for name, error in simulator.errors(bits).items()]
        forms = hessian.forms(errors).double()
    finally:
        simulator.configure(kept)
    single = forms.diagonal().clone() / 2
    return Interactions(single, forms.fill_diagonal_(0.0))


@torch.no_grad()
def single_increases(
    simulator: Simulator, loss_fn: Callable[..., Tensor], batches: Any, bits: int
) -> Float[Tensor, " layers"]:
    """`D({i})`: the loss increase with one layer quantised, in L + 1 runs."""
    kept, data = simulator.config, as_batches(batches, name="batches")
    try:
        clean = _loss(simulator.configure({}), loss_fn, data)
        values = [_loss(simulator.configure({name: bits}), loss_fn, data) - clean for name in simulator.layers]
    finally:
        simulator.configure(kept)
    return torch.tensor(values, dtype=torch.float64)


def _loss(simulator: Simulator, loss_fn: Callable[..., Tensor], batches: Sequence[tuple[Any, ...]]) -> float:
    total, samples = 0.0, 0
    for inputs, *targets in batches:
        size = next(leaf.shape[0] for leaf in torch.utils._pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
        total += size * float(loss_fn(call(simulator, inputs), *targets))
        samples += size
    return total / samples


def _in_means(values: Tensor) -> Tensor:
    """In units of the mean magnitude."""
    return values / values.abs().mean().clamp_min(torch.finfo(values.dtype).tiny)


def _ascending(names: list[str], scores: Tensor) -> list[str]:
    return [names[place] for place in scores.argsort(stable=True).tolist()]
