"""Fourier transforms of activations, and how frequencies are drawn from them.

A real activation is f(z) = constant + Re of the integral over xi > 0 of amplitude(xi) exp(2 pi i xi z), where the
amplitude is twice the Fourier transform. Transforms known in closed form are used as they are; any other activation is
continued periodically outside a window, smoothly, and its Fourier series taken, since tanh, GELU, softplus or ReLU have
no integrable transform.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn import functional

__all__ = ["Activation", "Frequencies", "Spectrum", "named_function", "optimal_damping", "second_moment", "spectrum"]

Activation = str | Callable[[Tensor], Tensor]

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "cos": torch.cos,
    "sin": torch.sin,
    "gauss": lambda z: torch.exp(-z.square() / 2),
    "sech": lambda z: 1 / torch.cosh(z),
    "cauchy": lambda z: 1 / (1 + z.square()),
    "sinc": lambda z: torch.sinc(z / math.pi),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "softplus": functional.softplus,
    "elu": functional.elu,
    "relu": functional.relu,
    "relu2": lambda z: functional.relu(z).square(),
    "step": lambda z: (z > 0).to(z.dtype),
}
# Twice the Fourier transform over xi > 0, and the frequency beyond which less than 1e-15 of its mass lies.
_TRANSFORMS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "gauss": (lambda xi: 2 * math.sqrt(2 * math.pi) * torch.exp(-2 * math.pi**2 * xi.square()), 1.3),
    "sech": (lambda xi: 2 * math.pi / torch.cosh(math.pi**2 * xi), 3.6),
    "cauchy": (lambda xi: 2 * math.pi * torch.exp(-2 * math.pi * xi), 5.6),
    "sinc": (lambda xi: torch.full_like(xi, 2 * math.pi), 1 / (2 * math.pi)),
}
_CELLS = 4096  # of a continuous transform, within which its density is proposed as constant
_SAMPLES = 2**14  # of a period, for the Fourier series of a continued activation


def named_function(activation: Activation) -> Callable[[Tensor], Tensor]:
    """The activation itself.

    Raises:
        ValueError: for a name that there is not.
    """
    if callable(activation):
        return activation
    if activation not in _FUNCTIONS:
        raise ValueError(f"activation must be callable or one of {', '.join(_FUNCTIONS)}, got {activation!r}")
    return _FUNCTIONS[activation]


def second_moment(
    s: Float[Tensor, "*shape"] | float, dimension: int, M: Float[Tensor, "*shape"] | float
) -> Float[Tensor, "*shape"]:
    """E|L(g, rho x) L(g, rho w)|^2 over g ~ N(0, I), for s = 2 pi xi |x + w|^2: what the variance of a draw grows by.

    (1 + 4M)^d (1 + 8M)^(-d/2) exp((1 + 4M) s / (1 + 8M)), in float64.
    """
    return _log_second_moment(_double(s), dimension, _double(M)).exp()


def optimal_damping(s: Float[Tensor, "*shape"] | float, dimension: int) -> Float[Tensor, "*shape"]:
    """The M >= 0 that minimises `second_moment`, in float64."""
    s = _double(s)
    # The positive root of a quadratic, in the form that does not cancel for small s.
    root = torch.sqrt((s - dimension).square() + 8 * dimension * s)
    near = 8 * dimension * s / (root - (s - dimension)).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(s > dimension, s - dimension + root, near) / (16 * dimension)


def _double(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _log_second_moment(s: Tensor, dimension: int, M: Tensor) -> Tensor:
    return dimension * (torch.log1p(4 * M) - torch.log1p(8 * M) / 2) + (1 + 4 * M) / (1 + 8 * M) * s


@dataclass(frozen=True)
class Frequencies:
    """Draws from a spectrum, all in float64: f(z) is the mean over l of Re(weight_l exp(2 pi i xi_l z)), plus constant.

    Args:
        xi: positive frequencies, in cycles per unit of z.
        weight: amplitude over probability.
        M: damping of each draw.
    """

    xi: Float[Tensor, " draws"]
    weight: Complex[Tensor, " draws"]
    M: Float[Tensor, " draws"]
    constant: float


@dataclass(frozen=True)
class Spectrum:
    """Where an activation has its frequencies.

    Args:
        constant: its part at frequency 0.
        xi: frequencies, or midpoints of cells of frequencies, all positive.
        amplitude: of each frequency, or of each cell in all.
        cell: width of the cells; 0 for single frequencies.
        density: amplitude per unit of frequency within the cells; None for single frequencies.
        exact: whether this is the whole activation; if not, it holds on a window only and may be cut off where the
            predicted noise of a frequency outweighs what it adds.
    """

    constant: float
    xi: Float[Tensor, " parts"]
    amplitude: Complex[Tensor, " parts"]
    cell: float = 0.0
    density: Callable[[Tensor], Tensor] | None = None
    exact: bool = True

    @property
    def mass(self) -> float:
        """c: the integral of |amplitude|, which bounds |f - constant|."""
        return float(self.amplitude.abs().sum())

    def draw(
        self,
        count: int,
        dimension: int,
        *,
        M: float | str = "auto",
        squared_norm: float = 2.0,
        generator: torch.Generator | None = None,
    ) -> Frequencies:
        """Stratified draws: one from each of `count` parts of equal probability, in random order.

        A number for M is the paper's estimator: frequencies come with probability |amplitude| / c. With "auto", each
        frequency has its own optimal M and comes with probability |amplitude| times the square root of its second
        moment at |x + w|^2 = squared_norm, which minimises the variance there. Both are unbiased.
        """
        s = 2 * math.pi * self.xi * squared_norm
        damping = optimal_damping(s, dimension) if M == "auto" else torch.full_like(s, float(M))
        log_moment = _log_second_moment(s, dimension, damping)
        size = self.amplitude.abs()
        log_q = size.clamp(min=1e-300).log() + (log_moment / 2 if M == "auto" else 0)
        if not self.exact:
            kept = self._worthwhile(count, log_q, log_moment)
            log_q = log_q[:kept]
        q = torch.softmax(log_q, 0)
        upper = q.cumsum(0)
        jitter = torch.rand(count, generator=generator, dtype=torch.float64)
        u = (torch.arange(count, dtype=torch.float64) + jitter) / count * upper[-1]
        part = torch.searchsorted(upper, u).clamp(max=len(q) - 1)
        xi, amplitude = self.xi[part], self.amplitude[part]
        if self.density is not None:
            within = ((u - upper[part]) / q[part] + 1).clamp(0, 1)
            xi = xi + (within - 0.5) * self.cell
            amplitude = (self.density(xi) * self.cell).to(amplitude.dtype)
        # In random order, so that orthogonal blocks of directions do not share a range of frequencies.
        order = torch.randperm(count, generator=generator)
        M_of = optimal_damping(2 * math.pi * xi * squared_norm, dimension) if M == "auto" else damping[part]
        return Frequencies(xi[order], (amplitude / q[part])[order], M_of[order], self.constant)

    def _worthwhile(self, count: int, log_q: Tensor, log_moment: Tensor) -> int:
        """How many frequencies to keep: where (mass cut off)^2 + (variance of the mean of `count` draws) is least."""
        size = self.amplitude.abs()
        tail = size.flip(0).cumsum(0).flip(0) - size
        # The variance is at most sum |a|^2 V / q, with q = exp(log_q) over its sum.
        log_variance = (2 * size.clamp(min=1e-300).log() + log_moment - log_q).logcumsumexp(0) + log_q.logcumsumexp(0)
        return int((tail.square() + (log_variance - math.log(count)).clamp(max=700).exp()).argmin()) + 1


def spectrum(activation: Activation, *, window: float = 4.0) -> Spectrum:
    """The spectrum of an activation.

    Args:
        activation: a name, or any elementwise function of a tensor. "cos", "sin", "gauss" (exp(-z^2/2)), "sech",
            "cauchy" (1/(1+z^2)) and "sinc" (sin z / z) are exact everywhere. "tanh", "sigmoid", "gelu", "silu",
            "softplus", "elu", "relu", "relu2", "step" and functions hold for |z| <= window, beyond which they go over
            into their next period.
        window: the largest |z| to be represented.

    Raises:
        ValueError: for an unknown name, a window that is not positive, and a function that is not finite on
            |z| <= 3 window.
    """
    named_function(activation)
    with torch.device("cpu"):
        if activation in ("cos", "sin"):
            amplitude = torch.tensor([1.0 if activation == "cos" else -1j], dtype=torch.complex128)
            return Spectrum(0.0, torch.tensor([1 / (2 * math.pi)], dtype=torch.float64), amplitude)
        if isinstance(activation, str) and activation in _TRANSFORMS:
            density, reach = _TRANSFORMS[activation]
            cell = reach / _CELLS
            xi = (torch.arange(_CELLS, dtype=torch.float64) + 0.5) * cell
            return Spectrum(0.0, xi, (density(xi) * cell).to(torch.complex128), cell, density)
        return _continued(activation, window)


def _continued(activation: Activation, window: float) -> Spectrum:
    """The Fourier series of period 4 window of f on [-window, window], blended smoothly with its shifted self."""
    if not (math.isfinite(window) and window > 0):
        raise ValueError(f"window must be positive and finite, got {window}")
    function, period = named_function(activation), 4 * window
    z = torch.arange(_SAMPLES, dtype=torch.float64) * (period / _SAMPLES) - window
    with torch.no_grad():
        here, next_period = function(z).double(), function(z - period).double()
        few = function(z[:9]).double()
    if here.shape != z.shape or not torch.allclose(few, here[:9], equal_nan=True):
        name = activation if isinstance(activation, str) else type(activation).__name__
        raise ValueError(f"activation must be an elementwise function, got {name}")
    # A step without any kink from 1 (at z = window) to 0 (at z = 3 window, which is -window of the next period).
    t = ((z - window) / (2 * window)).clamp(0, 1)
    step = torch.sigmoid(1 / t.clamp(min=1e-9) - 1 / (1 - t).clamp(min=1e-9))
    values = torch.where(step > 0, step * here, 0) + torch.where(step < 1, (1 - step) * next_period, 0)
    if not bool(values.isfinite().all()):
        raise ValueError(
            f"activation must be finite for |z| <= 3 * window = {3 * window:g}, so that its mass is finite"
        )
    series = torch.fft.rfft(values) / _SAMPLES
    xi = torch.arange(1, _SAMPLES // 2, dtype=torch.float64) / period
    # The samples start at -window.
    amplitude = 2 * series[1 : _SAMPLES // 2] * torch.exp(2j * math.pi * xi * window)
    # Rounding of the transform is not part of f.
    kept = amplitude.abs() > 1e-13 * float(values.abs().max())
    if not bool(kept.any()):  # a constant
        kept[0] = True
    return Spectrum(float(series[0].real), xi[kept], amplitude[kept], exact=False)
