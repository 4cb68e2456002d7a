"""What a network really does: its NTK and the NTK's differential by autograd, its kernel from re-initialisations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vmap

from lathe.core.gaussian import ActivationLike
from lathe.theory import kernels
from lathe.theory.deep_learning_theory.criticality import critical_point
from lathe.theory.deep_learning_theory.initialization import _first_activation
from lathe.theory.deep_learning_theory.kernels import check_hyperparameters
from lathe.theory.deep_learning_theory.layers import weight_layers
from lathe.theory.deep_learning_theory.single import finite_width_single, susceptibilities
from lathe.theory.kernels.empirical import Rates

__all__ = ["DepthReport", "depth_report", "empirical_dntk", "empirical_ntk", "learning_rate_tensor"]

#: Relative size of the perturbations by which susceptibilities are measured.
_NUDGE = 1e-3


def learning_rate_tensor(model: nn.Module, lambda_b: float = 1.0, lambda_W: float = 1.0) -> dict[str, float]:
    """Each parameter's learning rate by its name: `lambda_W / fan_in` for weights, `lambda_b` for biases, else 1."""
    rates = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    for layer in weight_layers(model, "linear", graph=False):
        rates[f"{layer.name}.weight".lstrip(".")] = lambda_W / layer.fan_in
        if f"{layer.name}.bias".lstrip(".") in rates:
            rates[f"{layer.name}.bias".lstrip(".")] = lambda_b
    return rates


def empirical_ntk(
    model: nn.Module, x: Float[Tensor, batch * features], lr_tensor: Rates | None = None
) -> Float[Tensor, "batch batch outputs outputs"]:
    """`H[a1, a2, i1, i2] = sum_mu lambda_mu (dz_i1(x_a1)/dtheta_mu) (dz_i2(x_a2)/dtheta_mu)` of this network.

    `lr_tensor` gives the `lambda`s by parameter name (`learning_rate_tensor`), as numbers or tensors; 1 by default.
    """
    return kernels.empirical_ntk(model, x, outputs="full", rates=lr_tensor)


def empirical_dntk(
    model: nn.Module, x: Float[Tensor, batch * features], lr_tensor: Rates | None = None
) -> Float[Tensor, "batch batch batch outputs outputs outputs"]:
    """The NTK's differential, `dH[a0, a1, a2, i0, i1, i2] = sum lambda_mu lambda_nu z_0,mu,nu z_1,mu z_2,nu`.

    (Commas are derivatives by parameters.) One gradient step with output errors `eps` changes the NTK by
    `H_12(new) - H_12 = -eta sum_a (dH_12a + dH_21a) eps_a`. By second directional derivatives, one for every pair of
    outputs: for small batches.
    """
    parameters, rates = _parameters(model, lr_tensor)
    jacobian = jacrev(lambda p: _outputs(model, p, x))(parameters)
    batch, outputs = next(iter(jacobian.values())).shape[:2]
    count = batch * outputs
    directions = {
        name: (value.flatten(0, 1).flatten(1) * _flat_rate(rates[name], parameters[name])).reshape(
            count, *parameters[name].shape
        )
        for name, value in jacobian.items()
    }

    def twice(first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
        def once(p: dict[str, Tensor]) -> Tensor:
            return jvp(lambda q: _outputs(model, q, x), (p,), (first,))[1]

        return jvp(once, (parameters,), (second,))[1]

    i, j = torch.triu_indices(count, count, device=x.device)
    pick = [{name: value[index] for name, value in directions.items()} for index in (i, j)]
    upper = vmap(twice, chunk_size=64)(*pick)
    result = upper.new_zeros(count, count, batch, outputs)
    result[i, j] = upper
    result[j, i] = upper
    return result.reshape(batch, outputs, batch, outputs, batch, outputs).permute(4, 0, 2, 5, 1, 3)


@dataclass(frozen=True)
class DepthReport:
    """How signals go through a network, layer by layer and input by input: over draws of its weights, and in theory.

    Attributes:
        names: the weight layers.
        kernel, kernel_theory: `E[G]` of each layer's pre-activations, (layers, inputs).
        fluctuation, fluctuation_theory: `n Var(G) / E[G]^2`, `n` being the width that feeds the layer.
        chi_par, chi_par_theory: growth of a difference in norm from layer to layer, (layers - 1, inputs).
        chi_perp, chi_perp_theory: growth of the squared distance across, likewise.
        C_b, C_W: of the draws.

    Theory is None where layers have different activations.
    """

    names: tuple[str, ...]
    kernel: Float[Tensor, "layers inputs"]
    fluctuation: Float[Tensor, "layers inputs"]
    chi_par: Float[Tensor, "steps inputs"]
    chi_perp: Float[Tensor, "steps inputs"]
    kernel_theory: Float[Tensor, "layers inputs"] | None
    fluctuation_theory: Float[Tensor, "layers inputs"] | None
    chi_par_theory: Float[Tensor, "steps inputs"] | None
    chi_perp_theory: Float[Tensor, "steps inputs"] | None
    C_b: float
    C_W: float

    def _columns(self) -> dict[str, list[tuple[str, Tensor | None]]]:
        return {
            "K": [("measured", self.kernel), ("theory", self.kernel_theory)],
            "n Var G / K²": [("measured", self.fluctuation), ("theory", self.fluctuation_theory)],
            "χ parallel": [("measured", self.chi_par), ("theory", self.chi_par_theory)],
            "χ perpendicular": [("measured", self.chi_perp), ("theory", self.chi_perp_theory)],
        }

    def __str__(self) -> str:
        head = ["layer"] + [
            f"{name} ({who})" for name, sides in self._columns().items() for who, v in sides if v is not None
        ]
        rows = [head]
        for layer, name in enumerate(self.names):
            row = [name]
            for _, sides in self._columns().items():
                row += ["" if layer >= len(v) else f"{v[layer].mean():.4g}" for _, v in sides if v is not None]
            rows.append(row)
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)

    def plot(self) -> Any:
        """An Altair chart: one panel a quantity, layers across, the mean over inputs."""
        import altair as alt

        panels = []
        for name, sides in self._columns().items():
            values = [
                {"layer": layer + 1, name: value[layer].mean().item(), "from": who}
                for who, value in sides
                if value is not None
                for layer in range(len(value))
            ]
            panels.append(
                alt.Chart(alt.Data(values=values), width=220, height=160)
                .mark_line(point=True)
                .encode(x="layer:Q", y=alt.Y(f"{name}:Q").scale(zero=False), color="from:N")
            )
        return alt.concat(*panels, columns=2)


def depth_report(
    model: nn.Module,
    x: Float[Tensor, inputs * features],
    *,
    act: ActivationLike | None = None,
    C_b: float | None = None,
    C_W: float | None = None,
    draws: int = 200,
    generator: torch.Generator | None = None,
    chunk_size: int | None = 50,
) -> DepthReport:
    """Kernels, their fluctuations and susceptibilities of a network over fresh draws of its weights, next to theory.

    Weights and biases of all linear layers and convolutions are drawn `draws` times with `(C_b, C_W)`, by default the
    critical point of the network's activation; everything else stays as it is, and `model` is untouched. The kernel of
    a layer is measured from what enters it, `G = C_b + C_W mean(h^2)` (over channels and positions for convolutions),
    which has far less noise than squares of its outputs. Theory is that of a fully connected chain of the same widths.

    Raises:
        ValueError: for `draws < 2`, only one of `C_b, C_W`, bad values of them, or inputs that are zero or not finite.
        NoCriticalPoint: where `C_b, C_W` are left to the activation and it has no critical point.
    """
    if draws < 2:
        raise ValueError(f"draws must be at least 2, got {draws}")
    if (C_b is None) != (C_W is None):
        raise ValueError("C_b and C_W must be given together or not at all")
    norms = x.flatten(1).norm(dim=1)
    if not (torch.isfinite(norms) & (norms > 0)).all():
        raise ValueError("x must be finite and have no zero row")
    layers = weight_layers(model, act)
    first = _first_activation(layers, act)
    if C_b is None or C_W is None:
        point = critical_point(first)
        C_b, C_W = point.C_b, point.C_W
    check_hyperparameters(C_b, C_W)

    metrics = _metrics(model, layers, _nudged(x.double(), generator), C_b, C_W, draws, generator, chunk_size)
    center, wider, narrower, across = metrics.unbind(-1)  # each (draws, layers, inputs): means of squares of h
    fan_in = torch.tensor([layer.fan_in for layer in layers], dtype=torch.float64, device=x.device).unsqueeze(-1)
    kernel = C_b + C_W * center
    mean = kernel.mean(0)
    norm_gap, distance = (wider - narrower).mean(0), across.mean(0)
    same = all(layer.activation == first for layer in layers[1:]) and layers[0].activation is None
    theory: tuple[Tensor | None, ...] = (None, None, None, None)
    if same:
        widths = [layer.fan_in for layer in layers] + [1]
        predicted = finite_width_single(mean[0], widths, first, C_b, C_W)
        par, perp, _ = susceptibilities(predicted["K"][:-1], first, C_b, C_W)
        theory = (predicted["K"], predicted["V"] / predicted["K"] ** 2, par, perp)
    return DepthReport(
        names=tuple(layer.name for layer in layers),
        kernel=mean,
        fluctuation=fan_in * kernel.var(0) / mean**2,
        chi_par=norm_gap[1:] / norm_gap[:-1],
        chi_perp=distance[1:] / distance[:-1],
        kernel_theory=theory[0],
        fluctuation_theory=theory[1],
        chi_par_theory=theory[2],
        chi_perp_theory=theory[3],
        C_b=C_b,
        C_W=C_W,
    )


def _nudged(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Each input five times: itself, larger and smaller, and moved to either side across."""
    flat = x.flatten(1)
    side = torch.randn(flat.shape, dtype=x.dtype, generator=generator).to(x.device)
    square = (flat * flat).sum(1, keepdim=True)
    side = side - flat * ((side * flat).sum(1, keepdim=True) / square)
    side = side * (square.sqrt() / side.norm(dim=1, keepdim=True).clamp_min(1e-300))
    moved = [flat, flat * (1 + _NUDGE), flat * (1 - _NUDGE), flat + _NUDGE * side, flat - _NUDGE * side]
    return torch.cat(moved).reshape(-1, *x.shape[1:])


def _metrics(
    model: nn.Module,
    layers: list[Any],
    inputs: Tensor,
    C_b: float,
    C_W: float,
    draws: int,
    generator: torch.Generator | None,
    chunk_size: int | None,
) -> Tensor:
    """(draws, layers, inputs, 4): mean squares of what enters each layer: for x, larger, smaller, half the gap."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    fixed = {k: v.detach().double() if v.is_floating_point() else v for k, v in state.items()}
    entered: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            h = arguments[0].reshape(5, arguments[0].shape[0] // 5, -1)
            half = (h[3] - h[4]) / 2
            squares = [h[0] * h[0], h[1] * h[1], h[2] * h[2], half * half]
            entered[name] = torch.stack([square.mean(-1) for square in squares], -1)

        return hook

    def one_draw(drawn: dict[str, Tensor]) -> Tensor:
        entered.clear()
        functional_call(model, {**fixed, **drawn}, (inputs,))
        return torch.stack([entered[layer.name] for layer in layers])

    training = model.training
    handles = [layer.module.register_forward_pre_hook(keep(layer.name)) for layer in layers]
    try:
        model.eval()
        with torch.no_grad():
            blocks = []
            size = min(draws, chunk_size or draws)
            for start in range(0, draws, size):
                count = min(size, draws - start)
                drawn = {}
                for layer in layers:
                    prefix = f"{layer.name}." if layer.name else ""
                    for key, variance in (("weight", C_W / layer.fan_in), ("bias", C_b)):
                        parameter = getattr(layer.module, key)
                        if parameter is not None:
                            noise = torch.randn(count, *parameter.shape, dtype=torch.float64, generator=generator)
                            drawn[prefix + key] = (noise * variance**0.5).to(inputs.device)
                blocks.append(vmap(one_draw, randomness="different")(drawn))
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return torch.cat(blocks)


def _parameters(model: nn.Module, lr_tensor: Rates | None) -> tuple[dict[str, Tensor], dict[str, float | Tensor]]:
    parameters = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    rates: dict[str, float | Tensor] = dict.fromkeys(parameters, 1.0)
    if lr_tensor is not None:
        unknown = set(lr_tensor) - set(dict(model.named_parameters()))
        if unknown:
            raise ValueError(f"lr_tensor has names that are no parameters: {', '.join(sorted(unknown))}")
        rates.update({name: value for name, value in lr_tensor.items() if name in parameters})
    return parameters, rates


def _outputs(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(model, parameters, (x,)).flatten(1)


def _flat_rate(rate: float | Tensor, parameter: Tensor) -> float | Tensor:
    return rate.expand(parameter.shape).flatten() if isinstance(rate, Tensor) else rate
