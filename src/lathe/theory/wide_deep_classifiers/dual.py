"""The dual activation: the correlation of a layer's outputs as a function of the correlation of its inputs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.core.gaussian import Activation, ActivationLike, activation, hermite_coefficients, line_expectation
from lathe.theory.wide_deep_classifiers.activations import OptimalActivation, SineActivation

__all__ = ["DualActivation", "as_dual"]

#: Hermite coefficients (of a function of unit norm) below this are taken for zero: quadrature is good to about 1e-13.
TOLERANCE = 1e-9
#: Mass that a series may leave out before a smooth function is given more terms, and before the reader is warned.
_TAIL, _WARN = 1e-13, 1e-6
_MOST_TERMS = 480


class DualActivation:
    """`dual(xi) = E phi(u) phi(v)` for standard normal u, v of correlation `xi`, of `phi` scaled to `E phi^2 = 1`.

    With `phi = sum_k c_k h_k` in orthonormal Hermite polynomials, `dual(xi) = sum_k c_k^2 xi^k`. ReLU and its leaky
    relatives have the arc-cosine kernel instead, which has no short series. Of other functions with kinks (ELU, hard
    tanh) the part that a series leaves out is replaced by two powers, one even and one odd, of the same mass and slope,
    so that `dual(1) = 1` and `dual'(1)` are right.

    Args:
        phi: a name ("erf"), a module, a function or an `Activation`.
        centre: subtract the mean, `phi - E phi`.
        order: terms of the series; by default 60, and more for smooth functions that need them.

    Attributes:
        hermite: coefficients `c_0, c_1, ...` of the normalised function.
        A, A_prime: `E phi` and `E phi'` (which is `c_1`); `dual(0) = A^2`, `dual'(0) = A'^2`.
        B_prime: `E phi'^2 = dual'(1)`.
        factor: what `phi` was divided by.
        mean: what was subtracted before that.
        tail: the mass `1 - sum c_k^2` that the series leaves out.
        lead: the first index with a non-zero coefficient.
        odd: whether `dual` is odd.

    Raises:
        ValueError: where `E phi^2` is infinite, zero or NaN, `phi` is constant or jumps, or `order` is below 2.

    Example:
        >>> DualActivation(OptimalActivation(2)).value(torch.tensor(0.5, dtype=torch.float64)).item()
        0.3125
    """

    def __init__(self, phi: ActivationLike, *, centre: bool = False, order: int | None = None) -> None:
        if order is not None and order < 2:
            raise ValueError(f"order must be at least 2, got {order}")
        self.tail = 0.0
        self.mean = 0.0
        self.factor = 1.0
        self._shape: _Series | _Bent
        if isinstance(phi, OptimalActivation):
            self.name = f"optimal({phi.d:g})"
            self._of_series([c * c for c in phi.hermite], [1.0 if c else 0.0 for c in phi.hermite])
        elif isinstance(phi, SineActivation):
            self.name = f"sine({phi.d:g})"
            self._of_series(*_sine_weights(phi.q))
        else:
            act = activation(phi)
            self.name = f"centred {act.name}" if centre else act.name
            self._of_activation(act, centre, order)

    def _of_series(self, weights: list[float], signs: list[float], rest: _Rest = ()) -> None:
        self._shape = _Series(weights, rest)
        self.hermite = torch.tensor([s * math.sqrt(w) for s, w in zip(signs, weights)], dtype=torch.float64)
        self.A, self.A_prime = self.hermite[:2].tolist()
        self.B_prime = math.fsum(k * w for k, w in enumerate(weights)) + math.fsum(m * k for m, k, _ in rest)
        self.lead = self._shape.lead
        self.odd = not any(weights[::2]) and not any(even for _, _, even in rest)

    def _of_activation(self, act: Activation, centre: bool, order: int | None) -> None:
        one = torch.ones((), dtype=torch.float64)
        kinks = act.kinks
        square = line_expectation(lambda u: act(u) ** 2, one, kinks).item()
        _check_moment(act, square)
        mean = line_expectation(act, one, kinks).item()
        # A mean at the level of rounding is that of an odd function.
        mean = 0.0 if abs(mean) < TOLERANCE * math.sqrt(square) else mean
        variance = square - mean * mean
        if not variance > TOLERANCE * square:
            raise ValueError(f"phi ({act.name}) must not be constant")
        self.mean = mean if centre else 0.0
        norm = variance if centre else square
        self.factor = math.sqrt(norm)

        def parts(u: Tensor) -> Tensor:
            """Squares of the even and odd parts of the function and of its derivative."""
            there, back = act(u) - self.mean, act(-u) - self.mean
            slope, slope_back = act.derivative(u), act.derivative(-u)
            return torch.stack([there + back, there - back, slope - slope_back, slope + slope_back]) ** 2 / (4 * norm)

        mirrored = tuple({*kinks, *(-kink for kink in kinks)})
        even, odd, even_slope, odd_slope = line_expectation(parts, one, mirrored).tolist()
        count = order or 60
        while True:
            c = hermite_coefficients(act, one, count + 1) / self.factor
            c[0] = (mean - self.mean) / self.factor
            c = torch.where(c.abs() < TOLERANCE, 0.0, c)
            self.tail = max(0.0, 1 - c.square().sum().item())
            if self.tail <= _TAIL or order or kinks or count >= _MOST_TERMS:
                break
            count *= 2
        weights, signs = c.square().tolist(), c.sign().tolist()
        rest = []
        for start, mass, slope in ((0, even, even_slope), (1, odd, odd_slope)):
            left = mass - math.fsum(weights[start::2])
            slope_left = slope - math.fsum(k * weights[k] for k in range(start, len(weights), 2))
            if left < -1e-6 or slope_left < -1e-5 * (1 + slope):
                raise ValueError(
                    f"phi ({act.name}) must be continuous, so that E phi'^2 is finite; where it only bends, give "
                    "Activation(phi, kinks=...)"
                )
            if left > 1e-15:
                rest.append((left, max(slope_left / left, count + 1.0), start == 0))
        self._of_series(weights, signs, tuple(rest))
        if act.slopes is not None and self.A_prime**2 > TOLERANCE:
            minus, plus = act.slopes
            bend = (plus - minus) ** 2 / (2 * norm)
            if bend > TOLERANCE:
                self._shape = _Bent(bend, minus * plus / norm, centred=centre)
        elif self.tail > _WARN:
            warnings.warn(
                f"{self.tail:.1e} of phi ({act.name}) lies beyond the first {count} Hermite polynomials; "
                "its dual is approximate near xi = 1; Activation(phi, kinks=...) names where it bends",
                stacklevel=3,
            )
        self.B_prime = even_slope + odd_slope

    @property
    def linear(self) -> bool:
        """Whether `phi` is linear, so that layers change nothing."""
        return abs(self.A_prime**2 - 1) < TOLERANCE

    def value(self, xi: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`dual(xi)` for `xi` in [-1, 1]."""
        return self._shape.value(xi)

    def derivative(self, xi: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`dual'(xi)`, which is the (unnormalised) dual of `phi'`."""
        return self._shape.derivative(xi)

    def gap(self, e: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`1 - dual(1 - e)` for `e` in [0, 1], to full relative accuracy however small `e` is."""
        return self._shape.gap(e)

    def excess(self, xi: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`dual(xi) / (c_m^2 xi^m) - 1` with `m = lead`, for `xi` in [0, 1]; accurate where it is small."""
        return self._shape.excess(xi)

    def log_value(self, log_xi: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`log dual(xi)` from `log xi`, for `xi` in (0, 1] that may underflow."""
        return self._lead_term(log_xi, self.lead, self._shape.first) + torch.log1p(self.excess(log_xi.exp()))

    def log_derivative(self, log_xi: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`log dual'(xi)` from `log xi`, likewise."""
        power, first = self._shape.slope_lead, self._shape.slope_first
        return self._lead_term(log_xi, power, first) + torch.log1p(self._shape.slope_excess(log_xi.exp()))

    @staticmethod
    def _lead_term(log_xi: Tensor, power: int, weight: float) -> Tensor:
        return log_xi * power + math.log(weight) if power else torch.full_like(log_xi, math.log(weight))


def as_dual(phi: ActivationLike | DualActivation) -> DualActivation:
    """`phi`, made into a `DualActivation` where it is none."""
    return phi if isinstance(phi, DualActivation) else DualActivation(phi)


#: What a series leaves out: (mass, degree, whether even) of at most two powers of real degree.
_Rest = tuple[tuple[float, float, bool], ...]


class _Series:
    """`sum_k w_k xi^k` plus the powers in `rest`; every weight is positive, so that sums lose no accuracy."""

    def __init__(self, weights: Sequence[float], rest: _Rest = ()) -> None:
        w, self.rest = list(weights), rest
        while w and w[-1] == 0:
            w.pop()
        self.weights = w
        self.lead = next((k for k, each in enumerate(w) if each), None) or 0
        self.first = w[self.lead]
        # 1 - x^k = (1 - x)(1 + ... + x^(k-1)): the gap is e times a polynomial whose coefficients are tails.
        self.tails = [math.fsum(w[j + 1 :]) for j in range(len(w) - 1)] or [0.0]
        self.excesses = [0.0] + [each / self.first for each in w[self.lead + 1 :]]
        slopes = [k * each for k, each in enumerate(w)][1:] or [0.0]
        self.slopes = slopes
        self.slope_lead = next((k for k, each in enumerate(slopes) if each), 0)
        self.slope_first = slopes[self.slope_lead] or 1e-300
        self.slope_excesses = [0.0] + [each / self.slope_first for each in slopes[self.slope_lead + 1 :]]

    def value(self, xi: Tensor) -> Tensor:
        total = _horner(self.weights, xi)
        for mass, degree, even in self.rest:
            power = mass * xi.abs() ** degree
            total = total + (power if even else power * xi.sign())
        return total

    def derivative(self, xi: Tensor) -> Tensor:
        total = _horner(self.slopes, xi)
        for mass, degree, even in self.rest:
            power = mass * degree * xi.abs() ** (degree - 1)
            total = total + (power * xi.sign() if even else power)
        return total

    def gap(self, e: Tensor) -> Tensor:
        total = e * _horner(self.tails, 1 - e)
        for mass, degree, _ in self.rest:
            total = total - mass * torch.expm1(degree * torch.log1p(-e.clamp_max(1 - 1e-16)))
        return total

    def excess(self, xi: Tensor) -> Tensor:
        total = _horner(self.excesses, xi)
        for mass, degree, _ in self.rest:
            total = total + mass / self.first * xi ** (degree - self.lead)
        return total

    def slope_excess(self, xi: Tensor) -> Tensor:
        total = _horner(self.slope_excesses, xi)
        for mass, degree, _ in self.rest:
            total = total + mass * degree / self.slope_first * xi ** (degree - 1 - self.slope_lead)
        return total


@dataclass(frozen=True)
class _Bent:
    """`a_minus z` below zero and `a_plus z` above: `line xi + bend arc(xi)`, less its value at 0 where centred.

    `arc(xi) = (sqrt(1 - xi^2) + xi (pi/2 + arcsin xi)) / pi` is the normalised arc-cosine kernel of order 1.
    """

    bend: float
    line: float
    centred: bool

    @property
    def lead(self) -> int:
        return 1 if self.centred else 0

    @property
    def first(self) -> float:
        return self.slope_first if self.centred else self.bend / math.pi

    @property
    def slope_lead(self) -> int:
        return 0

    @property
    def slope_first(self) -> float:
        return self.line + self.bend / 2

    def _curved(self, xi: Tensor) -> Tensor:
        """`(arc(xi) - arc(0) - xi/2) pi / xi`, which vanishes as `xi / 2`."""
        return torch.asin(xi) - xi / (1 + (1 - xi * xi).clamp_min(0).sqrt())

    def value(self, xi: Tensor) -> Tensor:
        constant = 0.0 if self.centred else self.bend / math.pi
        return constant + xi * (self.slope_first + self.bend / math.pi * self._curved(xi))

    def derivative(self, xi: Tensor) -> Tensor:
        return self.slope_first + self.bend / math.pi * torch.asin(xi)

    def gap(self, e: Tensor) -> Tensor:
        # sin t - t cos t of the angle t, by its series where the two nearly cancel
        t = 2 * torch.asin((e.clamp_min(1e-300) / 2).sqrt())
        square = t * t
        series = t * square * _horner([(-1) ** k * (2 * k + 2) / math.factorial(2 * k + 3) for k in range(9)], square)
        difference = torch.where(t < 0.7, series, torch.sin(t) - t * torch.cos(t))
        return (self.line + self.bend) * e - self.bend / math.pi * difference

    def excess(self, xi: Tensor) -> Tensor:
        curved = self.bend / math.pi * self._curved(xi)
        return curved / self.slope_first if self.centred else xi * (self.slope_first + curved) / self.first

    def slope_excess(self, xi: Tensor) -> Tensor:
        return self.bend / (math.pi * self.slope_first) * torch.asin(xi)


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """The polynomial with these coefficients, lowest first; in x^2 where only every second one is there."""
    start = next((k for k, c in enumerate(coefficients) if c), None)
    if start is None:
        return torch.zeros_like(x)
    kept = list(coefficients[start:])
    variable = x
    if len(kept) > 2 and not any(kept[1::2]):
        kept, variable = kept[::2], x * x
    total = torch.full_like(x, kept[-1])
    for c in reversed(kept[:-1]):
        total = total * variable + c if c else total * variable
    return total * x**start if start else total


def _sine_weights(q: float) -> tuple[list[float], list[float]]:
    """`q^k / (k! sinh q)` for odd k, and the signs of sin's coefficients."""
    log_sinh = q + math.log(-math.expm1(-2 * q) / 2)
    weights, signs = [0.0], [0.0]
    for k in range(1, 60 + 4 * math.ceil(q)):
        weights.append(math.exp(k * math.log(q) - math.lgamma(k + 1) - log_sinh) if k % 2 else 0.0)
        signs.append(0.0 if k % 2 == 0 else 1.0 if k % 4 == 1 else -1.0)
    return weights, signs


def _check_moment(act: Activation, square: float) -> None:
    far = torch.linspace(10, 37, 200, dtype=torch.float64)
    beyond = max((act(u) ** 2 * torch.exp(-0.5 * far * far)).nan_to_num(math.inf).max().item() for u in (far, -far))
    if not math.isfinite(square) or not beyond <= 1e-6 * max(square, 1e-300):
        raise ValueError(
            f"phi ({act.name}) must have a finite E phi(u)^2 over u ~ N(0, 1); it grows too fast, or is NaN"
        )
    if not square > 0:
        raise ValueError(f"phi ({act.name}) must not be zero everywhere: it cannot be scaled to E phi^2 = 1")
