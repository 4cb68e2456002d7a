"""Activation functions as theory needs them: with derivatives, kinks and closed-form Gaussian moments."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.core.gaussian import closed

__all__ = ["Activation", "ActivationLike", "activation", "polynomial", "sinusoid"]

Pointwise: TypeAlias = Callable[[Tensor], Tensor]
PairMoments: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Activation:
    """A scalar function applied to each element, and what is known about it.

    Args:
        fn: the function, of tensors of any shape.
        d1: its first derivative; by autograd where not given.
        d2: its second derivative away from the kinks; by autograd where not given.
        kinks: where `fn` or its first derivatives jump. Quadrature splits the line there. `fn` itself has to be
            continuous for identities that integrate by parts (all of `lathe.theory` uses them).
        order: nodes per dimension that a Gauss-Hermite rule needs for this function.
        name: for messages.
        slopes: `(a_minus, a_plus)` where the function is `a_minus z` below zero and `a_plus z` above.
        pair: closed form `(K_aa, K_ab, K_bb) -> (<s_a s_b>, <s'_a s'_b>)`, elementwise, if there is one.
        jumps: whether `fn` itself jumps, so that its true derivative holds delta functions, which `d1` leaves out.
    """

    fn: Pointwise
    d1: Pointwise | None = None
    d2: Pointwise | None = None
    kinks: tuple[float, ...] = ()
    order: int = 100
    name: str = "activation"
    slopes: tuple[float, float] | None = None
    pair: PairMoments | None = None
    jumps: bool = False

    def __call__(self, z: Tensor) -> Tensor:
        return self.fn(z)

    def derivative(self, z: Tensor, order: int = 1) -> Tensor:
        """The derivative of the given order at `z`, elementwise; delta functions at the kinks are left out."""
        known = {0: self.fn, 1: self.d1, 2: self.d2}
        start = max(k for k, function in known.items() if function is not None and k <= order)
        function = known[start]
        assert function is not None
        for _ in range(order - start):
            function = _differentiate(function)
        return function(z)


ActivationLike: TypeAlias = Activation | str | nn.Module | Callable[..., Any]


def activation(spec: ActivationLike) -> Activation:
    """The `Activation` that a name ("tanh"), a module (`nn.LeakyReLU(0.1)`) or a plain function stands for.

    A plain function or an unknown module is taken to be smooth; give `Activation(fn, kinks=...)` where it is not.

    Raises:
        ValueError: where `spec` is a name that is not known.
        TypeError: where `spec` is no name, module, function or `Activation`.
    """
    if isinstance(spec, Activation):
        return spec
    if isinstance(spec, str):
        name = _ALIASES.get(spec.lower(), spec.lower())
        if name not in _NAMED:
            raise ValueError(f"spec must name a known activation ({', '.join(sorted(_NAMED))}), got {spec!r}")
        return _NAMED[name]
    if isinstance(spec, nn.Module):
        return _of_module(spec)
    if callable(spec):
        name = getattr(spec, "__name__", "activation")
        return _FUNCTIONS.get(spec) or Activation(spec, name=name)
    raise TypeError(f"spec must be a name, a module, a function or an Activation, got {type(spec).__name__}")


def polynomial(*coefficients: float) -> Activation:
    """`a_0 + a_1 z + a_2 z^2 + ...`, with closed forms; `polynomial(0, 0, 0, 1)` is a cube.

    Raises:
        ValueError: without coefficients.
    """
    if not coefficients:
        raise ValueError("polynomial needs at least one coefficient")
    first = [i * a for i, a in enumerate(coefficients)][1:]
    second = [i * a for i, a in enumerate(first)][1:]

    def horner(a: Sequence[float]) -> Pointwise:
        def value(z: Tensor) -> Tensor:
            total = torch.zeros_like(z)
            for each in reversed(a):
                total = total * z + each
            return total

        return value

    name = f"polynomial({', '.join(f'{a:g}' for a in coefficients)})"
    return Activation(
        horner(coefficients), horner(first), horner(second), name=name, pair=closed.polynomial(coefficients)
    )


def sinusoid(amplitude: float = 1.0, frequency: float = 1.0, phase: float = 0.0) -> Activation:
    """`amplitude sin(frequency z + phase)`, with closed forms.

    `sinusoid(2**0.5, (2 * gamma) ** 0.5, pi / 4)` makes a Dense layer's kernel the radial one,
    `exp(-gamma |z_a - z_b|^2)` on average (random Fourier features).
    """
    return Activation(
        lambda z: amplitude * torch.sin(frequency * z + phase),
        lambda z: amplitude * frequency * torch.cos(frequency * z + phase),
        lambda z: -amplitude * frequency**2 * torch.sin(frequency * z + phase),
        name=f"sinusoid({amplitude:g}, {frequency:g}, {phase:g})",
        pair=closed.sinusoid(amplitude, frequency, phase),
    )


def _differentiate(function: Pointwise) -> Pointwise:
    def derivative(z: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z if z.requires_grad else z.detach().requires_grad_()
            value = function(leaf)
            if not value.requires_grad:
                return torch.zeros_like(z)
            slope = torch.autograd.grad(value.sum(), leaf, create_graph=True, materialize_grads=True)[0]
        return slope if z.requires_grad else slope.detach()

    return derivative


def _piecewise_linear(a_minus: float, a_plus: float, name: str) -> Activation:
    straight = a_minus == a_plus
    return Activation(
        lambda z: torch.where(z >= 0, a_plus * z, a_minus * z),
        lambda z: torch.where(z >= 0, torch.full_like(z, a_plus), torch.full_like(z, a_minus)),
        torch.zeros_like,
        kinks=() if straight else (0.0,),
        name=name,
        slopes=(a_minus, a_plus),
        pair=closed.piecewise_linear(a_minus, a_plus),
    )


def _bent_line(
    fn: Pointwise, name: str, bends: list[tuple[float, float]], slope: float = 0.0, offset: float = 0.0
) -> Activation:
    kinks = tuple(place for place, _ in bends)
    return Activation(fn, kinks=kinks, name=name, pair=closed.bent_line(bends, slope, offset))


def _normal_density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _swish_d1(z: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return gate * (1 + z * (1 - gate))


def _swish_d2(z: Tensor) -> Tensor:
    gate = torch.sigmoid(z)
    return gate * (1 - gate) * (2 + z * (1 - 2 * gate))


_NAMED = {
    "linear": _piecewise_linear(1.0, 1.0, "linear"),
    "relu": _piecewise_linear(0.0, 1.0, "relu"),
    "leaky_relu": _piecewise_linear(0.01, 1.0, "leaky_relu"),
    "tanh": Activation(
        torch.tanh,
        lambda z: 1 - torch.tanh(z) ** 2,
        lambda z: -2 * torch.tanh(z) * (1 - torch.tanh(z) ** 2),
        name="tanh",
    ),
    "sin": Activation(torch.sin, torch.cos, lambda z: -torch.sin(z), name="sin", pair=closed.sine),
    "cos": Activation(torch.cos, lambda z: -torch.sin(z), lambda z: -torch.cos(z), name="cos", pair=closed.cosine),
    "erf": Activation(
        torch.erf,
        lambda z: 2 / math.sqrt(math.pi) * torch.exp(-z * z),
        lambda z: -4 / math.sqrt(math.pi) * z * torch.exp(-z * z),
        name="erf",
        pair=closed.error_function,
    ),
    "gelu": Activation(
        F.gelu,
        lambda z: torch.special.ndtr(z) + z * _normal_density(z),
        lambda z: (2 - z * z) * _normal_density(z),
        name="gelu",
        pair=closed.gelu,
    ),
    "swish": Activation(F.silu, _swish_d1, _swish_d2, name="swish"),
    "sigmoid": Activation(torch.sigmoid, name="sigmoid"),
    "softplus": Activation(F.softplus, torch.sigmoid, lambda z: torch.sigmoid(z) * torch.sigmoid(-z), name="softplus"),
    "mish": Activation(lambda z: z * torch.tanh(F.softplus(z)), name="mish"),
    "elu": Activation(F.elu, kinks=(0.0,), name="elu"),
    "selu": Activation(F.selu, kinks=(0.0,), name="selu"),
    "hardtanh": _bent_line(F.hardtanh, "hardtanh", [(-1.0, 1.0), (1.0, -1.0)], offset=-1.0),
    "relu6": _bent_line(F.relu6, "relu6", [(0.0, 1.0), (6.0, -1.0)]),
    "hardswish": Activation(F.hardswish, kinks=(-3.0, 3.0), name="hardswish"),
    "perceptron": Activation(
        torch.sign,
        torch.zeros_like,
        torch.zeros_like,
        kinks=(0.0,),
        name="perceptron",
        pair=closed.piecewise_constant(-1.0, 1.0),
        jumps=True,
    ),
    "step": Activation(
        lambda z: (z > 0).to(z.dtype),
        torch.zeros_like,
        torch.zeros_like,
        kinks=(0.0,),
        name="step",
        pair=closed.piecewise_constant(0.0, 1.0),
        jumps=True,
    ),
    "abs": _piecewise_linear(-1.0, 1.0, "abs"),
    "square": Activation(
        torch.square,
        lambda z: 2 * z,
        lambda z: torch.full_like(z, 2.0),
        name="square",
        pair=closed.polynomial((0, 0, 1)),
    ),
    "exp": Activation(torch.exp, torch.exp, torch.exp, name="exp", pair=closed.exponential),
    "gaussian": Activation(
        lambda z: torch.exp(-z * z),
        lambda z: -2 * z * torch.exp(-z * z),
        lambda z: (4 * z * z - 2) * torch.exp(-z * z),
        name="gaussian",
        pair=closed.bell,
    ),
}
_ALIASES = {"silu": "swish", "identity": "linear", "sign": "perceptron", "leakyrelu": "leaky_relu"}
_FUNCTIONS: dict[Any, Activation] = {
    torch.tanh: _NAMED["tanh"],
    F.tanh: _NAMED["tanh"],
    torch.relu: _NAMED["relu"],
    F.relu: _NAMED["relu"],
    F.leaky_relu: _NAMED["leaky_relu"],
    torch.abs: _NAMED["abs"],
    torch.square: _NAMED["square"],
    torch.exp: _NAMED["exp"],
    torch.sign: _NAMED["perceptron"],
    torch.sin: _NAMED["sin"],
    torch.cos: _NAMED["cos"],
    torch.erf: _NAMED["erf"],
    F.gelu: _NAMED["gelu"],
    F.silu: _NAMED["swish"],
    torch.sigmoid: _NAMED["sigmoid"],
    F.sigmoid: _NAMED["sigmoid"],
    F.softplus: _NAMED["softplus"],
    F.mish: _NAMED["mish"],
    F.elu: _NAMED["elu"],
    torch.selu: _NAMED["selu"],
    F.selu: _NAMED["selu"],
    F.hardtanh: _NAMED["hardtanh"],
    F.relu6: _NAMED["relu6"],
    F.hardswish: _NAMED["hardswish"],
}
_MODULES: dict[type[nn.Module], str] = {
    nn.Identity: "linear",
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.SiLU: "swish",
    nn.Sigmoid: "sigmoid",
    nn.Mish: "mish",
    nn.SELU: "selu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
}


def _of_module(module: nn.Module) -> Activation:
    kind = type(module)
    if kind in _MODULES:
        return _NAMED[_MODULES[kind]]
    if isinstance(module, nn.LeakyReLU):
        return _piecewise_linear(module.negative_slope, 1.0, f"leaky_relu({module.negative_slope:g})")
    if isinstance(module, nn.PReLU) and module.weight.numel() == 1:
        slope = module.weight.item()
        return _piecewise_linear(slope, 1.0, f"prelu({slope:g})")
    if isinstance(module, nn.GELU) and module.approximate == "none":
        return _NAMED["gelu"]
    if isinstance(module, nn.Softplus) and (module.beta, module.threshold) == (1.0, 20.0):
        return _NAMED["softplus"]
    name = kind.__name__.lower()
    if isinstance(module, nn.Hardtanh):
        low, high = float(module.min_val), float(module.max_val)
        return _bent_line(_pure(module), name, [(low, 1.0), (high, -1.0)], offset=low)
    if isinstance(module, nn.Hardsigmoid):
        return _bent_line(_pure(module), name, [(-3.0, 1 / 6), (3.0, -1 / 6)])
    if isinstance(module, nn.Softshrink):
        width = float(module.lambd)
        return _bent_line(_pure(module), name, [(-width, -1.0), (width, 1.0)], slope=1.0, offset=width)
    kinks: tuple[float, ...] = ()
    if isinstance(module, (nn.ELU, nn.CELU)):
        kinks = (0.0,)
    elif isinstance(module, nn.Hardshrink):
        kinks = (-float(module.lambd), float(module.lambd))
    elif isinstance(module, nn.Threshold):
        kinks = (float(module.threshold),)
    jumps = isinstance(module, nn.Hardshrink) or (isinstance(module, nn.Threshold) and module.threshold != module.value)
    return Activation(_pure(module), kinks=kinks, name=name, jumps=jumps)


def _pure(module: nn.Module) -> Pointwise:
    """The module as a function that never writes into its argument."""
    if getattr(module, "inplace", False):
        module = copy.copy(module)
        module.inplace = False  # type: ignore[assignment]
    return module
