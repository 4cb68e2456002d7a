"""Judge a scaling rule: does the infinitely wide network exist, does it move, does it learn features?

An abc-parametrization says how weight multipliers, initial variances and learning rates scale with width. What happens
in the limit follows from the exponents alone: Yang and Hu, "Feature Learning in Infinite-Width Neural Networks", 2020,
arXiv 2011.14522, definitions 3.1-3.5 and theorems 3.2-3.8. The rules for Adam-like optimisers come from the same count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lathe.core.gaussian import ActivationLike, activation

__all__ = ["ABC", "ABCNetwork", "Exponent", "Rule"]

Exponent: TypeAlias = Fraction | float
Rule: TypeAlias = Literal["sgd", "adam"]

_HALF = Fraction(1, 2)
#: By how much exponents that are given as floats may miss an equality.
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class ABC:
    """Exponents of a fully connected network with `L` hidden layers of width `n`, layers counted `1..L+1`.

    Layer `l` has the weight `W = n^(-a_l) w`, of which `w` is trained, drawn from `N(0, n^(-2 b_l))`, with the learning
    rate `lr n^(-c_l)`. Biases are input weights on a constant and scale as layer 1. Exponents that are integers or
    fractions are compared exactly, others to 1e-9.

    Args:
        a, b: one exponent a layer, `L + 1` of them.
        c: one exponent for all layers (the paper's case) or one a layer.
        optimizer: "sgd" for updates in proportion to the gradient, "adam" for updates whose entries are of order one
            whatever the gradient's size.

    Raises:
        ValueError: for different lengths, fewer than one hidden layer, exponents that are not finite, or another
            optimizer.

    Example:
        >>> ABC.ntk(2).kernel_regime, ABC.mup(2).feature_learning
        (True, True)
    """

    a: tuple[Exponent, ...]
    b: tuple[Exponent, ...]
    c: tuple[Exponent, ...]
    optimizer: Rule = "sgd"

    def __init__(
        self,
        a: Sequence[Exponent],
        b: Sequence[Exponent],
        c: Exponent | Sequence[Exponent] = 0,
        optimizer: Rule = "sgd",
    ) -> None:
        a, b = tuple(a), tuple(b)
        c = tuple(c) if isinstance(c, Sequence) else (c,) * len(a)
        if not len(a) == len(b) == len(c):
            raise ValueError(f"a, b and c must have one exponent a layer, got {len(a)}, {len(b)} and {len(c)}")
        if len(a) < 2:
            raise ValueError(f"an ABC needs at least one hidden layer, that is two exponents in a, got {len(a)}")
        if optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer must be 'sgd' or 'adam', got {optimizer!r}")
        for name, values in (("a", a), ("b", b), ("c", c)):
            object.__setattr__(self, name, tuple(_exponent(name, value) for value in values))
        object.__setattr__(self, "optimizer", optimizer)

    # The named rows.

    @classmethod
    def standard(cls, L: int, c: Exponent | None = None, optimizer: Rule = "sgd") -> ABC:
        """PyTorch's parametrization: weights of variance 1/fan_in, no multipliers, one rate.

        `c` is by default the smallest that is stable: 1 for SGD, 3/2 for Adam. `c=0` is a rate that ignores the width.
        """
        default = Fraction(1) if optimizer == "sgd" else Fraction(3, 2)
        return cls((0,) * _layers(L), (0, *[_HALF] * L), default if c is None else c, optimizer)

    @classmethod
    def ntk(cls, L: int, optimizer: Rule = "sgd") -> ABC:
        """The parametrization of the neural tangent kernel (Jacot et al., 2018)."""
        return cls((0, *[_HALF] * L), (0,) * _layers(L), _by_layer(L, optimizer), optimizer)

    @classmethod
    def mean_field(cls) -> ABC:
        """Mean field, for one hidden layer: `f = (1/n) sum v phi(u x)` with rates in proportion to `n`."""
        return cls((0, 1), (0, 0), -1)

    @classmethod
    def mup(cls, L: int, optimizer: Rule = "sgd") -> ABC:
        """The maximal update parametrization: every layer learns as much as stability allows."""
        a = (-_HALF, *[Fraction(0)] * (L - 1), _HALF)
        return cls(a, (_HALF,) * _layers(L), _by_layer(L, optimizer), optimizer)

    # Symmetry.

    def shift(self, theta: Exponent | Sequence[Exponent]) -> ABC:
        """The same training of the same functions, with multipliers `n^(-theta)` moved into the weights (eq. 5).

        `a + theta, b - theta`, and `c - 2 theta` for SGD, momentum included, `c - theta` for Adam; one `theta` for all
        layers or one a layer. Weight decay breaks the symmetry.
        """
        thetas = tuple(theta) if isinstance(theta, Sequence) else (theta,) * len(self.a)
        if len(thetas) != len(self.a):
            raise ValueError(f"theta must be one number or {len(self.a)}, one a layer, got {len(thetas)}")
        moves = [_exponent("theta", value) for value in thetas]
        return ABC(
            [a + theta for a, theta in zip(self.a, moves)],
            [b - theta for b, theta in zip(self.b, moves)],
            [c - self._power * theta for c, theta in zip(self.c, moves)],
            self.optimizer,
        )

    def canonical(self) -> ABC:
        """The member of the class of `shift` whose rates do not depend on width: equal for equal training."""
        return self.shift([c / self._power for c in self.c])

    # What the exponents say.

    @property
    def L(self) -> int:
        """Number of hidden layers."""
        return len(self.a) - 1

    @property
    def r_layer(self) -> tuple[Exponent, ...]:
        """For each hidden layer `l`: its own update changes the layer's coordinates by order `n^(-r_l)`."""
        # Adam takes the backward signal's size, the first summand, out of the update.
        signal = min(self.a[-1] + self.b[-1], self._readout) if self.optimizer == "sgd" else 0
        return tuple(
            signal + c + self._power * a - 1 + (layer == 0)
            for layer, (a, c) in enumerate(zip(self.a[:-1], self.c[:-1]))
        )

    @property
    def r(self) -> Exponent:
        """Training changes the coordinates of the last hidden layer by order `n^(-r)` (definition 3.2)."""
        return min(self.r_layer)

    @property
    def change_exponents(self) -> tuple[Exponent, ...]:
        """For each layer: training changes its outputs by `n` to minus this; what comes from the layers below counts.

        The last is the network's output.
        """
        return (*accumulate(self.r_layer, min), min(self._readout, self.a[-1] + self.b[-1] + self.r) - 1)

    @property
    def stable(self) -> bool:
        """Activations are of order one at the start and nothing blows up in training (theorem 3.2)."""
        return not self._unstable

    @property
    def nontrivial(self) -> bool:
        """Stable, and training moves the output in the limit (theorem 3.3)."""
        return self.stable and self._is(self.change_exponents[-1], 0)

    @property
    def feature_learning(self) -> bool:
        """Stable and nontrivial, and features move in the limit (theorem 3.4)."""
        return self.nontrivial and self._is(self.r, 0)

    @property
    def kernel_regime(self) -> bool:
        """Stable and nontrivial, and the limit is gradient descent with a fixed kernel (theorem 3.4)."""
        return self.nontrivial and not self._is(self.r, 0)

    @property
    def maximally_updated(self) -> tuple[bool, ...]:
        """For each layer, readout included: no larger update would be stable (definition 5.2)."""
        return (*(self._is(r, 0) for r in self.r_layer), self._is(self._readout, 1))

    @property
    def maximally_initialized(self) -> bool:
        """The readout starts as large as it may when features are learned."""
        return self._is(self.a[-1] + self.b[-1], 1)

    @property
    def maximal(self) -> bool:
        """Stable, all layers maximally updated, and the readout maximally initialised; muP alone is (section 5)."""
        return self.stable and all(self.maximally_updated) and self.maximally_initialized

    @property
    def kernel_layers(self) -> tuple[int, ...]:
        """The layers, counted from 1, whose updates make up the limit's kernel; empty outside of the kernel regime."""
        if not self.kernel_regime:
            return ()
        start = self.a[-1] + self.b[-1]
        layers = [layer for layer, r in enumerate(self.r_layer, 1) if self._is(start + r, 1)]
        return (*layers, *([self.L + 1] if self._is(self._readout, 1) else []))

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is unstable, each inequality that fails; or why it is stable and trivial; else empty."""
        if self._unstable or self.nontrivial:
            return self._unstable
        return (f"training changes the output by order n^{_told(-self.change_exponents[-1])}, which vanishes",)

    @property
    def regime(self) -> str:
        """In words: "unstable", "trivial", "kernel" or "feature learning"."""
        if not self.stable:
            return "unstable"
        if not self.nontrivial:
            return "trivial"
        return "feature learning" if self.feature_learning else "kernel"

    def __str__(self) -> str:
        rows = [f"{name} = ({', '.join(map(_told, getattr(self, name)))})" for name in "abc"]
        because = f": {'; '.join(self.reasons)}" if self.reasons else ""
        return f"{', '.join(rows)} ({self.optimizer}): r = {_told(self.r)}, {self.regime}{because}"

    @property
    def _power(self) -> int:
        """How often a multiplier enters an update: in the gradient and in the forward pass, or there only."""
        return 2 if self.optimizer == "sgd" else 1

    @property
    def _readout(self) -> Exponent:
        """The readout's update moves the output by order `n^(1 - this)`."""
        return self._power * self.a[-1] + self.c[-1]

    @property
    def _slack(self) -> float:
        exact = all(isinstance(value, Fraction) for value in (*self.a, *self.b, *self.c))
        return 0.0 if exact else _TOLERANCE

    def _is(self, value: Exponent, wanted: Exponent) -> bool:
        return -self._slack <= value - wanted <= self._slack

    @property
    def _unstable(self) -> tuple[str, ...]:
        slack, found = self._slack, []
        start, r = self.a[-1] + self.b[-1], self.r
        for layer in range(self.L):
            want = _HALF if layer else 0
            if not self._is(self.a[layer] + self.b[layer], want):
                size = "vanishes" if self.a[layer] + self.b[layer] > want else "blows up"
                found.append(f"a_{layer + 1} + b_{layer + 1} must be {_told(want)}, or the layer {size} at the start")
        if start < _HALF - slack:
            found.append(f"a_{self.L + 1} + b_{self.L + 1} must be at least 1/2, or the output blows up at the start")
        if r < -slack:
            found.append(f"r = {_told(r)} must not be negative, or features blow up in training")
        if self._readout < 1 - slack:
            sum_ = f"{'2 ' if self.optimizer == 'sgd' else ''}a_{self.L + 1} + c_{self.L + 1}"
            found.append(f"{sum_} must be at least 1, or the readout's update blows up the output")
        if start + r < 1 - slack:
            found.append(
                f"a_{self.L + 1} + b_{self.L + 1} + r must be at least 1, or moving features blow up the output"
            )
        return tuple(found)


class ABCNetwork(nn.Module):
    """The fully connected network of finite width that an `ABC` speaks of, without biases.

    Args:
        abc: the exponents.
        width: of all hidden layers.
        in_features, out_features: fixed while the width grows.
        act: after each hidden layer.
        generator: draws the weights; the same for the same generator, whatever the exponents, up to scale.
        dtype: of the weights.

    Shape: `(*batch, in_features)` -> `(*batch, out_features)`.

    Raises:
        ValueError: for a width below 1.
    """

    def __init__(
        self,
        abc: ABC,
        width: int,
        in_features: int,
        out_features: int = 1,
        *,
        act: ActivationLike = "tanh",
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.abc, self.width, self.act = abc, width, activation(act)
        sizes = [in_features, *[width] * abc.L, out_features]
        self.weights = nn.ParameterList(
            width ** -float(b) * torch.randn(fan_out, fan_in, generator=generator, dtype=dtype)
            for fan_in, fan_out, b in zip(sizes, sizes[1:], abc.b)
        )

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        return self.preactivations(x)[-1]

    def preactivations(self, x: Float[Tensor, "*batch in_features"]) -> list[Float[Tensor, "*batch width"]]:
        """What goes into each activation, `h_1 .. h_L`, and the output."""
        found: list[Tensor] = []
        for weight, a in zip(self.weights, self.abc.a):
            entering = self.act(found[-1]) if found else x
            found.append(entering @ weight.mT * self.width ** -float(a))
        return found

    def param_groups(self, lr: float) -> list[dict]:
        """One group a layer, with the rate `lr n^(-c_l)`, for an optimiser of the kind `abc.optimizer`."""
        return [{"params": [weight], "lr": lr * self.width ** -float(c)} for weight, c in zip(self.weights, self.abc.c)]


def _layers(L: int) -> int:
    if L < 1:
        raise ValueError(f"L must be at least 1, got {L}")
    return L + 1


def _by_layer(L: int, optimizer: Rule) -> tuple[Fraction, ...]:
    """The rates' exponents of both `ntk` and `mup`."""
    return (Fraction(0),) * (L + 1) if optimizer == "sgd" else (_HALF, *[Fraction(1)] * (L - 1), _HALF)


def _exponent(name: str, value: Exponent) -> Exponent:
    if isinstance(value, (Fraction, int)):
        return Fraction(value)
    if not isinstance(value, float) or not math.isfinite(value):
        raise ValueError(f"{name} must hold finite numbers, got {value!r}")
    return value


def _told(value: Exponent) -> str:
    return str(value) if isinstance(value, Fraction) else f"{value:.4g}"
