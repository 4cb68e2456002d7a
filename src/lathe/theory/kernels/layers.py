"""The layers of infinitely wide networks: what each does to covariances and tangent kernels.

Composed as `nn.Sequential` is; a composed network is a kernel: `net(x1, x2)` gives the covariance of its outputs over
random weights (NNGP) and its neural tangent kernel (NTK). Every layer object stands for weights of its own.

Lee et al. 2018 (arXiv 1711.00165), Jacot et al. 2018 (1806.07572); convolutions: Novak et al. 2019 (1810.05148), Arora
et al. 2019 (1904.11955).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.core.gaussian import ActivationLike, BlockMoments, activation, check_second_moment
from lathe.theory.kernels.fields import Field

__all__ = [
    "Activation",
    "Dense",
    "Kernels",
    "Layer",
    "LayerNorm",
    "Residual",
    "Scale",
    "Sequential",
    "Sum",
    "Weighted",
]

Sizes: TypeAlias = tuple[int, ...]


class Kernels(NamedTuple):
    """Both kernels; None where it was not asked for."""

    nngp: Float[Tensor, "*pairs"] | None
    """Covariance of an output unit over random weights."""
    ntk: Float[Tensor, "*pairs"] | None
    """Inner product of an output unit's gradients by the parameters, each weighted with its learning rate."""


class Layer:
    """A layer or network of infinite width, and its kernels when called."""

    def __call__(
        self,
        x1: Float[Tensor, "n *features"],
        x2: Float[Tensor, "m *others"] | None = None,
        kernels: tuple[str, ...] = ("nngp", "ntk"),
        *,
        block: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> Kernels:
        """Kernels of all pairs of inputs, n x m; differentiable.

        Args:
            x1, x2: inputs `(n, features)`, `(n, channels, length)` or `(n, channels, height, width)`; x1 with itself
                where x2 is left out, which is half the work.
            kernels: which ones: "nngp", "ntk".
            block: pairs of inputs that are worked on at a time; by default as many as fit a core's cache. Memory is
                that of the results and of one block.
            dtype: of the computation. Kernels of deep networks and their inverses want float64.

        Raises:
            ValueError: for inputs of another shape than the network takes, not finite, or unknown kernels; where an
                activation has no finite second moment; where an NTK is asked of an activation that jumps.
        """
        from lathe.theory.kernels.evaluation import evaluate

        return evaluate(self, x1, x2, kernels, block, dtype)

    def diagonal(
        self,
        x: Float[Tensor, "n *features"],
        kernels: tuple[str, ...] = ("nngp", "ntk"),
        *,
        dtype: torch.dtype = torch.float64,
    ) -> Kernels:
        """Kernels of each input with itself, (n,); arguments as for a call."""
        from lathe.theory.kernels.evaluation import evaluate_diagonal

        return evaluate_diagonal(self, x, kernels, dtype)

    # What follows is for the layers of this file.

    @property
    def fresh(self) -> bool:
        """Whether outputs have zero mean whatever the input, because weights come last."""
        return False

    @property
    def transparent(self) -> bool:
        """Whether outputs have zero mean where inputs have."""
        return True

    def parts(self) -> tuple[Layer, ...]:
        """The layers that this one is made of."""
        return ()

    def walk(self) -> Iterator[Layer]:
        yield self
        for part in self.parts():
            yield from part.walk()

    def sizes(self, sizes: Sizes) -> Sizes:
        """Positions that come out where `sizes` go in, `()` for flat features."""
        return sizes

    def gaussian(self, before: bool) -> bool:
        """Whether outputs are Gaussian over random weights, where inputs are or are not."""
        return before

    def propagate(self, f: Field) -> Field:
        """Kernels of the outputs from those of the inputs; `f` may be changed, its tensors not."""
        raise NotImplementedError


def _non_negative(name: str, value: float | None) -> None:
    if value is not None and not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a number that is not negative, got {value}")


class Weighted(Layer):
    """A layer that ends with a sum over random weights."""

    weight_variance: float
    bias_variance: float
    parametrization: str
    fan_in: int | None
    weight_rate: float | None
    bias_rate: float | None

    def __post_init__(self) -> None:
        for name in ("weight_variance", "bias_variance", "weight_rate", "bias_rate", "fan_in"):
            _non_negative(name, getattr(self, name))
        if self.parametrization not in ("ntk", "standard"):
            raise ValueError(f"parametrization must be 'ntk' or 'standard', got {self.parametrization!r}")
        if self.parametrization == "standard" and self.weight_rate is None and self.fan_in is None:
            raise ValueError(
                "the standard parametrization needs fan_in, the inputs that a unit sums: its NTK grows with it"
            )

    @property
    def fresh(self) -> bool:
        return True

    def gaussian(self, before: bool) -> bool:
        return True

    @property
    def rates(self) -> tuple[float, float]:
        """The learning rates of weights (times fan-in) and biases."""
        if self.parametrization == "standard":
            weight, bias = float(self.fan_in or 0), 1.0
        else:
            weight, bias = self.weight_variance, self.bias_variance
        return (
            weight if self.weight_rate is None else self.weight_rate,
            bias if self.bias_rate is None else self.bias_rate,
        )

    def weigh(self, f: Field, window: float = 1.0) -> None:
        """`K -> W K`, `Theta -> rate_W K + W Theta`, each over the `window` terms that are summed next."""
        weight = self.weight_variance / window
        if f.tangents:
            own = torch.mul(f.nngp, self.rates[0] / window)
            f.ntk = own if f.ntk is None else own.add_(f.ntk, alpha=weight)
        f.nngp = torch.mul(f.nngp, weight)
        f.mean = None

    def shift(self, f: Field) -> None:
        """Adds the biases: `K -> K + b`, `Theta -> Theta + rate_b`; both have been made anew by now."""
        if self.bias_variance:
            f.nngp = f.nngp.add_(self.bias_variance)
        if f.ntk is not None and self.rates[1]:
            f.ntk = f.ntk.add_(self.rates[1])


@dataclass(frozen=True)
class Dense(Weighted):
    """A fully connected layer; its weights have variance `weight_variance / fan_in`.

    Args:
        weight_variance: of the weights, times fan-in.
        bias_variance: of the biases.
        parametrization: which learning rates the NTK is for. "ntk": weights are scaled in the forward pass and have
            learning rate one, so that rates are in effect `weight_variance / fan_in` and `bias_variance`; "standard":
            PyTorch's own, rate one for every weight and bias, where the NTK grows with `fan_in`.
        fan_in: inputs that a unit sums; for "standard" only.
        weight_rate: learning rate of the weights times fan-in, in place of the one that `parametrization` gives.
        bias_rate: learning rate of the biases, likewise; 0 where the layer has none.

    Raises:
        ValueError: for variances or rates that are negative, or a standard parametrization without fan_in.
    """

    weight_variance: float = 1.0
    bias_variance: float = 0.0
    parametrization: str = "ntk"
    fan_in: int | None = None
    weight_rate: float | None = None
    bias_rate: float | None = None

    def sizes(self, sizes: Sizes) -> Sizes:
        if sizes:
            raise ValueError(
                f"Dense takes flat features, got images of size {sizes}; put Flatten() or GlobalAvgPool() before it, "
                "or use Conv(1) to work on each position"
            )
        return ()

    def propagate(self, f: Field) -> Field:
        self.weigh(f)
        self.shift(f)
        return f


@dataclass(frozen=True, repr=False)
class Activation(Layer):
    """A function of each unit.

    Args:
        function: a name ("relu", "gelu", "tanh", ...), a module, a function of tensors or a `core.gaussian.Activation`
            (which can name the points where the function is not smooth).

    Raises:
        ValueError: for a name that is not known.
        TypeError: for anything that is no activation.
    """

    function: ActivationLike = "relu"

    def __post_init__(self) -> None:
        activation(self.function)

    def __repr__(self) -> str:
        return f"Activation({activation(self.function).name})"

    @property
    def transparent(self) -> bool:
        return False

    def gaussian(self, before: bool) -> bool:
        if not before:
            raise ValueError(
                f"{self} takes units that are no sums over random weights (inputs, or outputs of an activation, maybe "
                "added to something), which are not Gaussian; put Dense or Conv before it, on every branch of a sum"
            )
        return False

    def propagate(self, f: Field) -> Field:
        act = activation(self.function)
        if f.tangents and f.ntk is not None and act.jumps:
            raise ValueError(
                f"activation {act.name} jumps, and a network with it has no NTK; ask for kernels=('nngp',) only"
            )

        def moments() -> BlockMoments:
            variance = f.variance()
            if act.pair is None:
                check_second_moment(act, variance)
            return BlockMoments(act, variance)

        known: BlockMoments = f.tape.note(moments)
        wanted = f.ntk is not None
        if f.tape.recording and f.means:
            f.mean = known.mean()
        if f.single:
            square, steepness = known.alone(wanted)
            found = square[..., f.rows, None], None if steepness is None else steepness[..., f.rows, None]
        else:
            found = known(f.nngp, f.left, f.right, (f.rows, f.columns), wanted)
        kernel, slope = found
        if f.tape.recording and not torch.isfinite(kernel).all():
            raise ValueError(f"activation {act.name} has no finite second moment at the variances that reach it")
        f.nngp = kernel
        if f.ntk is not None and slope is not None:
            f.ntk = f.ntk * slope
        return f


@dataclass(frozen=True)
class LayerNorm(Layer):
    """Shifts and scales the units of each input to mean zero and variance one.

    Its own gain and bias count as fixed at one and zero: under the standard parametrization their part of the NTK is
    to that of the weights as one to the width.

    Args:
        eps: added to the variance.
        positions: of images, normalise over channels and positions together, as `nn.LayerNorm((c, h, w))` and
            `nn.GroupNorm(1, c)` do; False: each position by itself, over channels.
    """

    eps: float = 1e-5
    positions: bool = True

    def __post_init__(self) -> None:
        _non_negative("eps", self.eps)

    def propagate(self, f: Field) -> Field:
        def norms() -> tuple[Tensor, Tensor | None, Tensor | None]:
            square, mean, centre = f.variance(), f.mean, f.mean
            if self.positions and f.sizes:
                square = f.mean_over_positions(square).expand_as(square)
                centre = None if mean is None else f.mean_over_positions(mean).expand_as(square)
            variance = square if centre is None else square - centre * centre
            return (variance + self.eps).rsqrt(), mean, centre

        scale, mean, centre = f.tape.note(norms)
        both = f.left(scale) * f.right(scale)
        if centre is not None:
            m, c = (f.left(mean), f.right(mean)), (f.left(centre), f.right(centre))
            f.nngp = f.nngp - m[0] * c[1] - c[0] * m[1] + c[0] * c[1]
        f.nngp = f.nngp * both
        if f.ntk is not None:
            f.ntk = f.ntk * both
        f.mean = (mean - centre) * scale if f.tape.recording and f.mean is not None else None
        return f


@dataclass(frozen=True)
class Scale(Layer):
    """All units times a number."""

    factor: float

    def propagate(self, f: Field) -> Field:
        f.each(lambda t: t * self.factor**2)
        f.mean = None if f.mean is None else f.mean * self.factor
        return f


@dataclass(frozen=True, init=False, repr=False)
class Sequential(Layer):
    """Layers one after another; empty, it is the identity."""

    layers: tuple[Layer, ...]

    def __init__(self, *layers: Layer) -> None:
        _check_layers(layers)
        flat: list[Layer] = []
        for layer in layers:
            flat += layer.layers if isinstance(layer, Sequential) else [layer]
        object.__setattr__(self, "layers", tuple(flat))

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.layers))})"

    def parts(self) -> tuple[Layer, ...]:
        return self.layers

    @property
    def fresh(self) -> bool:
        for layer in reversed(self.layers):
            if layer.fresh:
                return True
            if not layer.transparent:
                return False
        return False

    @property
    def transparent(self) -> bool:
        return all(layer.transparent for layer in self.layers)

    def gaussian(self, before: bool) -> bool:
        for layer in self.layers:
            before = layer.gaussian(before)
        return before

    def sizes(self, sizes: Sizes) -> Sizes:
        for layer in self.layers:
            sizes = layer.sizes(sizes)
        return sizes

    def propagate(self, f: Field) -> Field:
        for layer in self.layers:
            f = layer.propagate(f)
        return f


@dataclass(frozen=True, init=False, repr=False)
class Sum(Layer):
    """The sum of branches that all start from the same input.

    All branches but one have to end in weights of their own (Dense, Conv; pooling, Flatten or LayerNorm may follow):
    else the terms are correlated, and their sum's kernel is not the sum of theirs.

    Raises:
        ValueError: where more than one branch does not end in weights.
    """

    branches: tuple[Layer, ...]

    def __init__(self, *branches: Layer) -> None:
        _check_layers(branches)
        if not branches:
            raise ValueError("Sum needs at least one branch")
        stale = [branch for branch in branches if not branch.fresh]
        if len(stale) > 1:
            raise ValueError(
                f"{len(stale)} branches of a sum do not end in weights, so that they are correlated: {stale}; "
                "end all but one of them with Dense or Conv"
            )
        object.__setattr__(self, "branches", branches)

    def __repr__(self) -> str:
        return f"Sum({', '.join(map(repr, self.branches))})"

    def parts(self) -> tuple[Layer, ...]:
        return self.branches

    @property
    def fresh(self) -> bool:
        return all(branch.fresh for branch in self.branches)

    @property
    def transparent(self) -> bool:
        return all(branch.transparent or branch.fresh for branch in self.branches)

    def gaussian(self, before: bool) -> bool:
        found = [branch.gaussian(before) for branch in self.branches]  # each branch is to be checked
        return all(found)

    def sizes(self, sizes: Sizes) -> Sizes:
        found = [branch.sizes(sizes) for branch in self.branches]
        if len(set(found)) > 1:
            raise ValueError(f"branches of a sum must end at the same size, got {found} from {sizes}")
        return found[0]

    def propagate(self, f: Field) -> Field:
        total, *others = [branch.propagate(f.fork()) for branch in self.branches]
        for other in others:
            total.nngp = total.nngp + other.nngp
            total.ntk = _plus(total.ntk, other.ntk)
            total.mean = _plus(total.mean, other.mean)
        return total


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _check_layers(layers: Any) -> None:
    for layer in layers:
        if not isinstance(layer, Layer):
            raise TypeError(
                f"layers must be those of lathe.theory.kernels, got {type(layer).__name__}; "
                "from_module reads an nn.Module"
            )


def Residual(branch: Layer, shortcut: Layer | None = None, scale: float = 1.0) -> Sum:
    """`shortcut(x) + scale * branch(x)`; without `shortcut`, `x + scale * branch(x)`.

    Raises:
        ValueError: where neither of both ends in weights (see `Sum`).
    """
    scaled = branch if scale == 1.0 else Sequential(branch, Scale(scale))
    return Sum(Sequential() if shortcut is None else shortcut, scaled)
