"""What is known of a layer's units in the limit of wide layers: sums of Gaussian fields and of functions of them.

All units of a layer are independent draws of one random field over inputs and positions. It is written as a `Signal`,
a sum of terms: Gaussian fields (what linear layers and convolutions put out), functions of signals (activations),
products (gates) and numbers. Residual streams keep their parts apart, so that `relu(x) + f(x)` is no Gaussian and is
not taken for one. Where a Gaussian field alone goes through an activation its moments are integrals over one or two
variables; where several do, they are averaged over quasi-random points.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lathe.core.gaussian import Activation, activation, closed, line_expectation, pair_moments

__all__ = [
    "Function",
    "Gaussian",
    "Geometry",
    "Signal",
    "affine",
    "composed",
    "constant",
    "function",
    "gaussian",
    "pointwise",
    "product",
    "sampled",
]

#: Values that quasi-random averages hold at a time and take in all, and points that they use at least and at most.
_BLOCK, _VALUES, _FEWEST, _MOST = 1 << 20, 1 << 24, 256, 4096

Coefficient: TypeAlias = float | Tensor
Offset: TypeAlias = tuple[int, ...]


class Geometry:
    """Which pairs of (input, position) covariances are kept for: all pairs of inputs, positions `p` and `p + offset`.

    Tensors over single sites are (inputs, positions), over pairs (pairs, offsets, positions) with zeros where
    `p + offset` lies outside. The first pairs are the inputs with themselves, the first offset is zero.
    """

    def __init__(self, inputs: int, grid: tuple[int, ...], offsets: Sequence[Offset]) -> None:
        zero = (0,) * len(grid)
        self.inputs, self.grid = inputs, grid
        self.offsets: tuple[Offset, ...] = (zero, *sorted(set(offsets) - {zero}))
        self.index = {offset: number for number, offset in enumerate(self.offsets)}
        same = [(i, i) for i in range(inputs)]
        pairs = same + [(i, j) for i in range(inputs) for j in range(i + 1, inputs)]
        self.first, self.second = (torch.tensor(side) for side in zip(*pairs))
        self.positions = math.prod(grid)
        places = torch.tensor([*itertools.product(*[range(size) for size in grid])], dtype=torch.long)
        moved = places + torch.tensor(self.offsets, dtype=torch.long).unsqueeze(1)
        sizes = torch.tensor(grid, dtype=torch.long)
        self.inside = ((moved >= 0) & (moved < sizes)).all(-1)
        strides = torch.tensor([math.prod(grid[axis + 1 :]) for axis in range(len(grid))], dtype=torch.long)
        self.far_position = (moved.clamp(min=0).minimum(sizes - 1) * strides).sum(-1)

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.first), len(self.offsets), self.positions

    def near(self, site: Tensor) -> Tensor:
        """A tensor over sites at the first member of each pair."""
        return site.unsqueeze(1) if len(site) == 1 else site[self.first].unsqueeze(1)

    def far(self, site: Tensor) -> Tensor:
        """A tensor over sites at the second member of each pair."""
        site = site if len(site) == 1 else site[self.second]
        return site[:, self.far_position] if site.shape[1] > 1 else site.unsqueeze(1)

    def sites(self, kernel: Tensor) -> Tensor:
        """The second moment at each site, out of a kernel over pairs."""
        return kernel[: self.inputs, 0]

    def single(self) -> Geometry:
        """The same sites, each with itself only."""
        return self if len(self.offsets) == 1 else Geometry(self.inputs, self.grid, ())


@dataclass(eq=False)
class Gaussian:
    """A Gaussian field of zero mean; `kernel` are its covariances over pairs."""

    kernel: Tensor
    geometry: Geometry
    number: int = field(default_factory=itertools.count().__next__)

    def on(self, geometry: Geometry) -> Tensor:
        if geometry.offsets == self.geometry.offsets:
            kernel = self.kernel
        else:
            kernel = self.kernel[:, [self.geometry.index[offset] for offset in geometry.offsets]]
        return kernel[: len(geometry.first)]


@dataclass(eq=False)
class Function:
    """`act` of a signal, unit by unit."""

    act: Activation
    of: Signal


@dataclass(eq=False)
class Product:
    """Two signals multiplied, unit by unit."""

    left: Signal
    right: Signal


@dataclass(eq=False)
class Number:
    """What is the same for all units, a number for each site."""

    value: Tensor


Atom: TypeAlias = Gaussian | Function | Product | Number
Term: TypeAlias = tuple[Coefficient, Atom]


def _sources(atom: Atom) -> set[Gaussian]:
    if isinstance(atom, Gaussian):
        return {atom}
    if isinstance(atom, Function):
        return atom.of.sources
    if isinstance(atom, Product):
        return atom.left.sources | atom.right.sources
    return set()


@dataclass(eq=False)
class Signal:
    """A sum of terms `coefficient * atom`; coefficients are numbers, or tensors over sites (inputs, positions or 1)."""

    terms: tuple[Term, ...]
    _known: dict[Any, Tensor] = field(default_factory=dict)

    @property
    def sources(self) -> set[Gaussian]:
        return set().union(*[_sources(atom) for _, atom in self.terms])

    @property
    def is_gaussian(self) -> bool:
        return all(isinstance(atom, Gaussian) for _, atom in self.terms)

    @property
    def is_number(self) -> bool:
        return all(isinstance(atom, Number) for _, atom in self.terms)

    def number(self) -> Tensor:
        return sum((c * atom.value for c, atom in self.terms if isinstance(atom, Number)), torch.zeros(1, 1).double())

    def scaled(self, by: Coefficient) -> Signal:
        return Signal(tuple((by * c, atom) for c, atom in self.terms))

    def plus(self, other: Signal) -> Signal:
        mine, yours = _as_function(self), _as_function(other)
        if _bent(self, other) and mine is not None and yours is not None and mine[0].same_as(yours[0]):
            return function(pointwise(torch.add, mine[1], yours[1]), mine[0])
        return _sum(self, other)

    def same_as(self, other: Signal) -> bool:
        """Whether both are the same sum of the same Gaussian fields."""
        mine, yours = ({(id(atom), _key(c)) for c, atom in each.terms} for each in (self, other))
        return mine == yours

    def fresh(self) -> Signal:
        """A signal of the same law for other units, independent of this one."""
        twins: dict[Gaussian, Gaussian] = {}
        return _renewed(self, twins)

    # --- moments ---

    def second(self, geometry: Geometry) -> Tensor:
        """`E[x(p) x(p + offset)]` over pairs."""
        return self._remember(("second", geometry.offsets), lambda: self._second(geometry))

    def mean(self, geometry: Geometry) -> Tensor:
        """`E[x(p)]` over sites."""
        return self._remember("mean", lambda: self._mean(geometry))

    def fourth(self, geometry: Geometry) -> Tensor:
        """`E[x(p)^4]` over sites."""
        single = geometry.single()
        if self.is_gaussian:
            return 3 * single.sites(self.second(single)).square()
        coefficient, atom = self.terms[0]
        if len(self.terms) == 1 and isinstance(atom, Function) and atom.of.is_gaussian:
            act = atom.act
            variance = single.sites(atom.of.second(single))
            return coefficient**4 * line_expectation(lambda z: act(z) ** 4, variance, act.kinks)
        return single.sites(_quasi(self, single, lambda a, b: (a * b).square()))

    def slopes(self, act: Activation, geometry: Geometry) -> Tensor:
        """`E[act'(x(p)) act'(x(p + offset))]` over pairs."""
        if self.is_gaussian:
            return self._pairs(act, geometry)[1]
        return _quasi(self, geometry, lambda a, b: act.derivative(a) * act.derivative(b))

    def radial(self, act: Activation, geometry: Geometry) -> Tensor:
        """`E[x act(x) act'(x)]` over sites: by how much `E[act(x)^2] / 2` grows where x is scaled up."""
        single = geometry.single()
        if self.is_gaussian:
            variance = single.sites(self.second(single))
            return line_expectation(lambda z: z * act(z) * act.derivative(z), variance, act.kinks)
        return single.sites(_quasi(self, single, lambda a, b: a * act(a) * act.derivative(a)))

    def _remember(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]

    def _pairs(self, act: Activation, geometry: Geometry) -> tuple[Tensor, Tensor]:
        K = self.second(geometry)
        variance = geometry.sites(K)
        near, far = geometry.near(variance).expand_as(K), geometry.far(variance).expand_as(K)
        inside = geometry.inside.expand_as(K)
        # Where a position lies outside, any regular pair will do: it is masked afterwards.
        values = pair_moments(act, near[inside], K[inside], far[inside])
        kernel, slope = torch.zeros_like(K), torch.zeros_like(K)
        kernel[inside], slope[inside] = values
        return kernel, slope

    def _second(self, geometry: Geometry) -> Tensor:
        if not _disjoint(self.terms):
            return _quasi(self, geometry, torch.mul) * geometry.inside
        total = torch.zeros(geometry.shape, dtype=torch.float64)
        means: list[Tensor] = []
        for coefficient, atom in self.terms:
            total = total + _both(coefficient, geometry) * _second_of(atom, geometry)
            mean = _mean_of(atom, geometry)
            if mean is not None:
                mean = coefficient * mean
                for other in means:
                    total = (
                        total + geometry.near(mean) * geometry.far(other) + geometry.near(other) * geometry.far(mean)
                    )
                means.append(mean)
        return total * geometry.inside

    def _mean(self, geometry: Geometry) -> Tensor:
        total = torch.zeros(geometry.inputs, geometry.positions, dtype=torch.float64)
        for coefficient, atom in self.terms:
            mean = _mean_of(atom, geometry)
            if mean is not None:
                total = total + coefficient * mean
        return total


def gaussian(kernel: Tensor, geometry: Geometry) -> Signal:
    return Signal(((1.0, Gaussian(kernel, geometry)),))


def constant(value: Tensor) -> Signal:
    """The same for all units; `value` is over sites, (inputs or 1, positions or 1)."""
    return Signal(((1.0, Number(value)),))


def function(act: Activation, of: Signal) -> Signal:
    """`act` of a signal; of a function of a Gaussian field it is again a function of that field."""
    if of.is_number:
        return constant(act(of.number()))
    inner = _as_function(of) if _bent(of) else None
    if inner is not None:
        base, first = inner
        act, of = composed(act, first), base
    return Signal(((1.0, Function(act, of)),))


def product(left: Signal, right: Signal) -> Signal:
    if left.is_number:
        return right.scaled(left.number())
    if right.is_number:
        return left.scaled(right.number())
    mine, yours = _as_function(left), _as_function(right)
    if mine is not None and yours is not None and mine[0].same_as(yours[0]):
        return function(pointwise(torch.mul, mine[1], yours[1]), mine[0])
    return Signal(((1.0, Product(left, right)),))


# --- signals that are functions of one Gaussian field -----------------------------------------------------------------


def _bent(*signals: Signal) -> bool:
    return any(not signal.is_gaussian for signal in signals)


def _as_function(signal: Signal) -> tuple[Signal, Activation] | None:
    """`(x, f)` where the signal is `f(x)` for a Gaussian field x whose first coefficient is one, else None."""
    if signal.is_gaussian:
        base, scale = _unscaled(signal)
        return base, affine(activation("linear"), scale, 0.0)
    functions = [(c, atom) for c, atom in signal.terms if isinstance(atom, Function)]
    numbers = [c * atom.value for c, atom in signal.terms if isinstance(atom, Number)]
    if len(functions) != 1 or 1 + len(numbers) != len(signal.terms):
        return None
    coefficient, atom = functions[0]
    if isinstance(coefficient, Tensor) or not atom.of.is_gaussian or any(number.numel() > 1 for number in numbers):
        return None
    base, scale = _unscaled(atom.of)
    act = atom.act if scale == 1 else composed(atom.act, affine(activation("linear"), scale, 0.0))
    return base, affine(act, coefficient, sum(number.item() for number in numbers))


def _unscaled(signal: Signal) -> tuple[Signal, float]:
    scale = signal.terms[0][0]
    return (signal, 1.0) if isinstance(scale, Tensor) or scale in (0, 1) else (signal.scaled(1 / scale), scale)


def affine(act: Activation, scale: float, shift: float) -> Activation:
    """`scale * act(z) + shift`."""
    if scale == 1 and shift == 0:
        return act
    pair = act.pair
    if shift == 0 and act.slopes is not None:
        return _bent_line(scale * act.slopes[0], scale * act.slopes[1], act.name)

    def scaled(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        assert pair is not None
        kernel, slope = pair(a, b, c)
        return scale**2 * kernel, scale**2 * slope

    return Activation(
        lambda z: scale * act(z) + shift,
        lambda z: scale * act.derivative(z),
        kinks=act.kinks,
        name=act.name,
        pair=None if pair is None or shift else scaled,
    )


def _bent_line(low: float, high: float, name: str) -> Activation:
    return Activation(
        lambda z: torch.where(z >= 0, high * z, low * z),
        lambda z: torch.where(z >= 0, high, low).to(z),
        torch.zeros_like,
        kinks=() if low == high else (0.0,),
        name=name,
        slopes=(low, high),
        pair=closed.piecewise_linear(low, high),
    )


def pointwise(operation: Callable[..., Tensor], left: Activation, right: Activation) -> Activation:
    """`operation(left(z), right(z))`."""
    kinks = tuple(sorted({*left.kinks, *right.kinks}))
    name = right.name if left.name == "linear" else left.name
    return Activation(lambda z: operation(left(z), right(z)), kinks=kinks, name=name)


def composed(outer: Activation, inner: Activation) -> Activation:
    """`outer(inner(z))`."""
    if inner.slopes == (1.0, 1.0):
        return outer
    if outer.slopes is not None and inner.slopes is not None:
        # Lines again: below zero and above, what `inner` gives decides which slope of `outer` it meets.
        low, high = inner.slopes
        return _bent_line(low * outer.slopes[int(low < 0)], high * outer.slopes[int(high > 0)], outer.name)
    # Where `inner` meets a kink of `outer` is found on a line of points; smooth outer functions need no search.
    kinks = set(inner.kinks)
    if outer.kinks:
        z = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
        for kink in outer.kinks:
            above = inner(z) > kink
            kinks |= set(((z[1:] + z[:-1]) / 2)[above[1:] != above[:-1]].tolist())
    name = outer.name if inner.name == "linear" else f"{outer.name}({inner.name})"
    return Activation(lambda z: outer(inner(z)), kinks=tuple(sorted(kinks)), name=name)


def _key(coefficient: Coefficient) -> Any:
    return id(coefficient) if isinstance(coefficient, Tensor) else float(coefficient)


def _sum(left: Signal, right: Signal) -> Signal:
    terms: list[Term] = list(left.terms)
    for c, atom in right.terms:
        for place, (mine, known) in enumerate(terms):
            if known is atom:
                terms[place] = (mine + c, atom)
                break
        else:
            terms.append((c, atom))
    return Signal(tuple(terms))


def _renewed(signal: Signal, twins: dict[Gaussian, Gaussian]) -> Signal:
    terms: list[Term] = []
    for c, atom in signal.terms:
        if isinstance(atom, Gaussian):
            terms.append((c, twins.setdefault(atom, Gaussian(atom.kernel, atom.geometry))))
        elif isinstance(atom, Function):
            terms.append((c, Function(atom.act, _renewed(atom.of, twins))))
        elif isinstance(atom, Product):
            terms.append((c, Product(_renewed(atom.left, twins), _renewed(atom.right, twins))))
        else:
            terms.append((c, atom))
    return Signal(tuple(terms))


# --- moments of atoms -------------------------------------------------------------------------------------------------


def _disjoint(terms: Sequence[Term]) -> bool:
    """Whether no Gaussian field is in two terms, unless all terms are such fields."""
    seen: set[Gaussian] = set()
    for _, atom in terms:
        mine = _sources(atom)
        if mine & seen:
            return False
        seen |= mine
    return True


def _both(coefficient: Coefficient, geometry: Geometry) -> Tensor | float:
    if isinstance(coefficient, Tensor):
        return geometry.near(coefficient) * geometry.far(coefficient)
    return coefficient * coefficient


def _second_of(atom: Atom, geometry: Geometry) -> Tensor:
    if isinstance(atom, Gaussian):
        return atom.on(geometry)
    if isinstance(atom, Function):
        if atom.of.is_gaussian:
            return atom.of._pairs(atom.act, geometry)[0]
        return _quasi(Signal(((1.0, atom),)), geometry, torch.mul)
    if isinstance(atom, Product):
        if atom.left.sources & atom.right.sources:
            return _quasi(Signal(((1.0, atom),)), geometry, torch.mul)
        return atom.left.second(geometry) * atom.right.second(geometry)
    value = atom.value.expand(geometry.inputs, geometry.positions)
    return (geometry.near(value) * geometry.far(value)).expand(geometry.shape)


def _mean_of(atom: Atom, geometry: Geometry) -> Tensor | None:
    """None where it is zero."""
    single = geometry.single()
    if isinstance(atom, Gaussian):
        return None
    if isinstance(atom, Number):
        return atom.value.expand(geometry.inputs, geometry.positions)
    if isinstance(atom, Function) and atom.of.is_gaussian:
        return line_expectation(atom.act, single.sites(atom.of.second(single)), atom.act.kinks)
    if isinstance(atom, Product) and not atom.left.sources & atom.right.sources:
        return atom.left.mean(geometry) * atom.right.mean(geometry)
    return single.sites(_quasi(Signal(((1.0, atom),)), single, lambda a, b: a))


# --- several Gaussian fields at once: averages over quasi-random points -----------------------------------------------


def _quasi(signal: Signal, geometry: Geometry, f: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return sampled([signal], geometry, lambda near, far: f(near[0], far[0]))


def sampled(
    signals: Sequence[Signal],
    geometry: Geometry,
    f: Callable[[list[Tensor], list[Tensor]], Tensor],
    *,
    rows: int | None = None,
    held: int = 1,
) -> Tensor:
    """`E[f]` of signals at both members of each pair, (..., pairs, offsets, positions), for the first `rows` pairs.

    `f` takes the signals at one member and at the other, each (points, entries), and gives (..., points, entries);
    `held` is how many tensors of that size it keeps.
    """
    sources = sorted({source for signal in signals for source in signal.sources}, key=lambda source: source.number)
    shape = (len(geometry.first) if rows is None else rows, *geometry.shape[1:])
    entries = math.prod(shape)
    count = min(_MOST, max(_FEWEST, 1 << int(math.log2(max(1, _VALUES // (entries * len(sources)))))))
    u, v = _normal_points(count, 2 * len(sources)).unflatten(1, (2, -1)).unbind(1)

    def flat(t: Tensor) -> Tensor:
        return t.expand(geometry.shape)[: shape[0]].reshape(-1)

    factors = []
    for source in sources:
        K = source.on(geometry)
        variance = geometry.sites(K)
        near, far = flat(geometry.near(variance)), flat(geometry.far(variance))
        root = near.clamp_min(0).sqrt()
        across = torch.where(root > 1e-12, flat(K) / root.clamp_min(1e-12), 0.0)
        factors.append((root, across, (far - across * across).clamp_min(0).sqrt()))
    values = []
    size = max(1, _BLOCK // (count * held))
    for start in range(0, entries, size):
        part = slice(start, start + size)
        near_z, far_z = {}, {}
        for number, (source, (root, across, rest)) in enumerate(zip(sources, factors)):
            one, two = u[:, number : number + 1], v[:, number : number + 1]
            near_z[source] = one * root[part]
            far_z[source] = one * across[part] + two * rest[part]

        def at_near(site: Tensor, part: slice = part) -> Tensor:
            return flat(geometry.near(site))[part]

        def at_far(site: Tensor, part: slice = part) -> Tensor:
            return flat(geometry.far(site))[part]

        near_x = [_evaluate(signal, near_z, at_near) for signal in signals]
        far_x = [_evaluate(signal, far_z, at_far) for signal in signals]
        values.append(f(near_x, far_x).mean(-2))
    whole = torch.cat(values, -1)
    return whole.reshape(*whole.shape[:-1], *shape)


def _evaluate(signal: Signal, z: dict[Gaussian, Tensor], at: Callable[[Tensor], Tensor]) -> Tensor:
    total: Tensor | float = 0.0
    for coefficient, atom in signal.terms:
        if isinstance(atom, Gaussian):
            value = z[atom]
        elif isinstance(atom, Function):
            value = atom.act(_evaluate(atom.of, z, at))
        elif isinstance(atom, Product):
            value = _evaluate(atom.left, z, at) * _evaluate(atom.right, z, at)
        else:
            value = at(atom.value)
        total = total + (at(coefficient) if isinstance(coefficient, Tensor) else coefficient) * value
    assert isinstance(total, Tensor)
    return total


def _normal_points(count: int, dimensions: int) -> Tensor:
    points = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=0).draw(count, dtype=torch.float64)
    z = torch.special.ndtri(points.clamp(1e-12, 1 - 1e-12))
    # Unit variance and zero mean exactly, which second moments of sums want most.
    z = z - z.mean(0)
    return z / z.square().mean(0).sqrt()
