"""Feature maps with f(w^T x + b) ~ phi(x) . psi(w, b): universal random features, and arc-cosine features for ReLU."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lathe.nn.scalable_kernels.projections import Orthogonality, buffer_of, projection
from lathe.nn.scalable_kernels.spectra import Activation, named_function, spectrum

__all__ = ["URF", "ArcCosFeatures", "Features", "arccos_kernel", "feature_map"]


class URF(nn.Module):
    """Universal random features: phi(x) . psi(w, b) is an unbiased estimate of f(w^T x + b), for almost any f.

    With g ~ N(0, I), xi from the spectrum of f and rho = sqrt(2 pi i xi), both sides are the real form of
    (1 + 4M)^(d/4) exp(-M |g|^2 + sqrt(1 + 4M) rho g^T u - rho^2 |u|^2 / 2) for u = x and u = w, from the same draws.
    The error falls with num_features^(-1/2) and grows with exp(|x + w|^2): both norms must be near 1, see
    `SNNKLinear.from_trained`, which balances them.

    Args:
        activation: see `spectrum`: cos, sin, gauss, sech, cauchy, sinc are exact; other names and functions hold for
            |w^T x + b| <= window, and are cut off at frequencies whose noise would outweigh them.
        in_features: d.
        num_features: m, the number of draws (g, xi); phi and psi have 2m entries, and one more for a constant part.
        M: damping of the exponentials, at least 0 (0 is the plain estimator); "auto" takes the optimum of every draw
            and spends more draws where the variance is.
        orthogonal: directions in orthogonal blocks (True), independent (False), or "hadamard", structured ones that
            need no stored matrix; with those, estimates are unbiased only nearly.
        window: for activations without integrable transform.
        squared_norm: the |x + w|^2 (after scaling) that "auto" and the cut-off expect.
        input_scale: a; phi takes a x and psi takes w / a, which leaves w^T x as it is and balances the two norms.
        seed: of the draws; None draws from torch's global generator.

    Raises:
        ValueError: for num_features or in_features below 1, M below 0, an unknown activation, or one that is not
            finite around its window.

    Source: section 3, URFs; damping in the notation of generalised exponential features with A = -M.
    """

    scale: Tensor
    xi: Tensor
    gain: Tensor
    phase: Tensor
    M: Tensor
    log_scale: Tensor

    def __init__(
        self,
        activation: Activation,
        in_features: int,
        num_features: int,
        *,
        M: float | Literal["auto"] = 0.0,
        orthogonal: Orthogonality = True,
        window: float = 4.0,
        squared_norm: float = 2.0,
        input_scale: float = 1.0,
        seed: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_scale(input_scale)
        if isinstance(M, str):
            if M != "auto":
                raise ValueError(f"M must be a number or 'auto', got {M!r}")
        elif not (math.isfinite(M) and M >= 0):
            raise ValueError(f"M must be finite and at least 0, got {M}")
        if not (math.isfinite(squared_norm) and squared_norm >= 0):
            raise ValueError(f"squared_norm must be finite and at least 0, got {squared_norm}")
        self.activation = activation if isinstance(activation, str) else getattr(activation, "__name__", "function")
        self.in_features, self.num_features = in_features, num_features
        of_activation = spectrum(activation, window=window)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.projection = projection(in_features, num_features, orthogonal=orthogonal, generator=generator, **made)
        D = self.projection.dimension
        with torch.device("cpu"):
            drawn = of_activation.draw(num_features, D, M=M, squared_norm=squared_norm, generator=generator)
        self.register_buffer("xi", buffer_of(drawn.xi, **made))
        self.register_buffer("gain", buffer_of(drawn.weight.abs(), **made))
        self.register_buffer("phase", buffer_of(drawn.weight.angle(), **made))
        self.register_buffer("M", buffer_of(drawn.M, **made))
        squared_norms = self.projection.squared_norms()
        log_scale = D / 4 * torch.log1p(4 * self.M) - self.M * squared_norms - math.log(num_features) / 2
        self.register_buffer("log_scale", log_scale)
        self.register_buffer("scale", buffer_of(torch.tensor(input_scale, device="cpu", dtype=torch.float64), **made))
        # From here on the rows are a sqrt(pi xi (1 + 4M)) g: times x, the real and the imaginary part of the exponent.
        self.projection.scale_(self.scale * torch.sqrt(math.pi * self.xi * (1 + 4 * self.M)))
        has_constant = abs(drawn.constant) > 1e-12
        self.constant: Tensor | None
        constant = torch.tensor([drawn.constant], device="cpu", dtype=torch.float64)
        self.register_buffer("constant", buffer_of(constant, **made) if has_constant else None)
        self.feature_dim = 2 * num_features + has_constant

    def phi(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch feature_dim"]:
        """Features of inputs.

        Raises:
            ValueError: where the last dimension of x is not in_features.
        """
        scale, angle = self._exponents(x, "x", self.scale.square())
        parts = [scale * angle.cos(), scale * angle.sin()]
        if self.constant is not None:
            parts.append(torch.ones_like(scale[..., :1]))
        return torch.cat(parts, -1).to(x.dtype)

    def psi(
        self, weight: Float[Tensor, "*batch in_features"], bias: Float[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch feature_dim"]:
        """Features of parameters, as `weight` and `bias` of `nn.Linear`.

        Raises:
            ValueError: where the last dimension of weight is not in_features, or bias has not its other dimensions.
        """
        check_features(weight, self.in_features, "weight")
        scale, angle = self._exponents(weight / self.scale.square(), "weight", self.scale.square())
        angle = angle + self.phase
        if bias is not None:
            _check_bias(bias, weight)
            angle = angle + 2 * math.pi * self.xi * bias[..., None]
        scale = scale * self.gain
        parts = [scale * angle.cos(), -scale * angle.sin()]
        if self.constant is not None:
            parts.append(self.constant.expand_as(scale[..., :1]))
        return torch.cat(parts, -1).to(weight.dtype)

    def _exponents(self, u: Tensor, name: str, squared_scale: Tensor) -> tuple[Tensor, Tensor]:
        """exp(real part) and the imaginary part of the exponent: rho^2 |u|^2 / 2 is a pure phase."""
        check_features(u, self.in_features, name)
        wide = torch.promote_types(u.dtype, torch.float32)
        product = self.projection(u).to(wide)
        squares = u.to(wide).square().sum(-1, keepdim=True) * squared_scale
        return torch.exp(product + self.log_scale), product - math.pi * self.xi * squares

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch feature_dim"]:
        """`phi`."""
        return self.phi(x)

    @torch.no_grad()
    def variance(
        self,
        x: Float[Tensor, "inputs in_features"],
        weight: Float[Tensor, "units in_features"],
        bias: Float[Tensor, " units"] | None = None,
    ) -> Float[Tensor, "inputs units"]:
        """Variance of phi(x) . psi(w, b) over independent directions, exact for the frequencies drawn; in float64.

        Stratified frequencies add little to it, and orthogonal directions take something away.
        """
        check_features(x, self.in_features, "x")
        check_features(weight, self.in_features, "weight")
        D = self.projection.dimension
        scale = self.scale.double()
        x, weight = scale * x.double(), weight.double() / scale
        products = (x @ weight.T)[..., None]
        sums = (x.square().sum(1)[:, None] + weight.square().sum(1))[..., None] + 2 * products
        b = torch.zeros(len(weight)).to(weight) if bias is None else bias.double()
        total = torch.zeros(products.shape[:2]).to(products)
        # Legend: every tensor below is (inputs, units, draws), for as many draws at a time as fit into about 8 MB.
        step = max(1, 2**20 // max(1, total.numel()))
        buffers = [buffer.double().split(step) for buffer in (self.xi, self.gain, self.phase, self.M)]
        for xi, gain, phase, M in zip(*buffers):
            growth, damped = D * (torch.log1p(4 * M) - torch.log1p(8 * M) / 2), (1 + 4 * M) / (1 + 8 * M)
            turn = 2 * math.pi * xi
            second = torch.exp(growth + damped * turn * sums)
            # E z^2 of the complex draw z: what tells the real part's variance from half of the complex one's.
            angle = 2 * phase + turn * (2 * b[:, None] + 2 * products + (2 * damped - 1) * sums)
            mean = torch.cos(turn * (products + b[:, None]) + phase)
            draws = (second + growth.exp() * torch.cos(angle)) / 2 - mean.square()
            total += (gain.square() * draws).sum(-1)
        return total / self.num_features**2

    def required_features(
        self,
        x: Float[Tensor, "inputs in_features"],
        weight: Float[Tensor, "units in_features"],
        bias: Float[Tensor, " units"] | None = None,
        *,
        error: float,
    ) -> int:
        """The num_features at which the predicted error, relative to the root mean square of f, is `error`.

        Raises:
            ValueError: where error is not positive.
        """
        if not error > 0:
            raise ValueError(f"error must be positive, got {error}")
        return math.ceil(self.num_features * (self.relative_error(x, weight, bias) / error) ** 2)

    def relative_error(
        self,
        x: Float[Tensor, "inputs in_features"],
        weight: Float[Tensor, "units in_features"],
        bias: Float[Tensor, " units"] | None = None,
    ) -> float:
        """Predicted standard deviation of the estimates, relative to the root mean square of what they estimate."""
        z = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        truth = torch.full_like(z, 0.0 if self.constant is None else float(self.constant))
        step = max(1, 2**20 // max(1, z.numel()))
        for xi, gain, phase in zip(*(buffer.double().split(step) for buffer in (self.xi, self.gain, self.phase))):
            truth += (torch.cos(2 * math.pi * xi * z[..., None] + phase) @ gain) / self.num_features
        power = truth.square().mean()
        return float((self.variance(x, weight, bias).mean() / power).sqrt())

    def mean_squared_norm(self, squared_norm: float = 1.0) -> Float[Tensor, ""]:
        """E |phi(x)|^2 over directions, for |a x|^2 = squared_norm: M does not change it."""
        return torch.exp(2 * math.pi * self.xi * squared_norm).mean() + (self.constant is not None)

    def extra_repr(self) -> str:
        """What it estimates, and its size."""
        return f"{self.activation!r}, in_features={self.in_features}, num_features={self.num_features}"


class ArcCosFeatures(nn.Module):
    """phi(u) = psi(u) = max(G u, floor)^order / sqrt(m): in expectation the arc-cosine kernel of x and w.

    That kernel depends on norms and angle of x and w: it is no function of w^T x, and so not the layer relu(W x + b)
    itself, but one whose parameters are to be trained or refitted.

    Args:
        num_features: m, entries of phi and psi.
        order: 1 is ReLU, 0 the step, 2 its square.
        floor: replaces 0 in max(., 0), as a leaky variant.
        bias: whether inputs get one more coordinate, 1, and weights their bias there.
        input_scale: a; phi takes (a x, 1) and psi takes (w / a, b).
        orthogonal, seed: as in `URF`.

    Source: section on ReLU-SNNKs; Cho and Saul 2009 for the kernel.
    """

    scale: Tensor

    def __init__(
        self,
        in_features: int,
        num_features: int,
        *,
        order: int = 1,
        floor: float = 0.0,
        bias: bool = False,
        input_scale: float = 1.0,
        orthogonal: Orthogonality = True,
        seed: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_scale(input_scale)
        if order not in (0, 1, 2):
            raise ValueError(f"order must be 0, 1 or 2, got {order}")
        self.in_features, self.num_features, self.feature_dim = in_features, num_features, num_features
        self.order, self.floor, self.bias = order, float(floor), bias
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.projection = projection(
            in_features + bias, num_features, orthogonal=orthogonal, generator=generator, device=device, dtype=dtype
        )
        # relu^n is homogeneous: 1 / sqrt(m) and a cost nothing at run time.
        share = num_features ** (-0.5 / order) if order else 1.0
        self.projection.scale_(torch.full((num_features,), share * input_scale, device="cpu", dtype=torch.float64))
        self._floor = share * self.floor
        scale = torch.tensor(input_scale, device="cpu", dtype=torch.float64)
        self.register_buffer("scale", buffer_of(scale, device, dtype))

    def phi(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_features"]:
        """Features of inputs.

        Raises:
            ValueError: where the last dimension of x is not in_features.
        """
        check_features(x, self.in_features, "x")
        if self.bias:
            x = torch.cat([x, (1 / self.scale).to(x.dtype).expand_as(x[..., :1])], -1)
        return self._features(x)

    def psi(
        self, weight: Float[Tensor, "*batch in_features"], bias: Float[Tensor, "*batch"] | None = None
    ) -> Float[Tensor, "*batch num_features"]:
        """Features of parameters.

        Raises:
            ValueError: where the last dimension of weight is not in_features, or a bias comes to features without one.
        """
        check_features(weight, self.in_features, "weight")
        if not self.bias:
            if bias is not None:
                raise ValueError("bias must be None for features made with bias=False")
            return self._features(weight / self.scale.square())
        last = torch.zeros_like(weight[..., :1])
        if bias is not None:
            _check_bias(bias, weight)
            last = bias[..., None]
        return self._features(torch.cat([weight / self.scale.square(), last / self.scale], -1))

    def _features(self, u: Tensor) -> Tensor:
        product = self.projection(u)
        if self.order == 0:
            return (product > self.floor).to(product.dtype) * self.num_features**-0.5
        # In place: no projection needs its product again, neither forwards nor backwards.
        product = functional.relu(product, inplace=True) if self._floor == 0 else product.clamp(min=self._floor)
        return product if self.order == 1 else product.square()

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_features"]:
        """`phi`."""
        return self.phi(x)

    def mean_squared_norm(self, squared_norm: float = 1.0) -> float:
        """E |phi(x)|^2 over directions, for |a x|^2 = squared_norm (without floor)."""
        return (0.5, 0.5, 1.5)[self.order] * (squared_norm + self.bias) ** self.order

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"in_features={self.in_features}, num_features={self.num_features}, order={self.order}"


Features = URF | ArcCosFeatures
_ORDERS = {"step": 0, "relu": 1, "relu2": 2}


def feature_map(
    activation: Activation,
    in_features: int,
    num_features: int,
    *,
    bias: bool = False,
    floor: float = 0.0,
    **options: Any,
) -> Features:
    """Arc-cosine features for "relu", "step" and "relu2", universal random features for all else.

    Args:
        bias: whether arc-cosine features have the coordinate for a bias; URFs take one at no cost.
        options: of `URF`; those that arc-cosine features do not know (M, window, squared_norm) do not matter to them.

    Raises:
        ValueError: for an unknown activation, and as the feature maps do.
    """
    if isinstance(activation, str) and activation in _ORDERS:
        names = ("orthogonal", "input_scale", "seed", "device", "dtype")
        known = {name: options[name] for name in names if name in options}
        order = _ORDERS[activation]
        return ArcCosFeatures(in_features, num_features, order=order, floor=floor, bias=bias, **known)
    if not callable(activation):
        try:
            named_function(activation)
        except ValueError as error:
            raise ValueError(str(error).replace("one of ", f"one of {', '.join(_ORDERS)}, ")) from None
    if floor:
        raise ValueError(f"floor is of the arc-cosine features only, got {floor} for {activation!r}")
    return URF(activation, in_features, num_features, **options)


def arccos_kernel(
    x: Float[Tensor, "*batch in_features"], weight: Float[Tensor, "units in_features"], order: int = 1
) -> Float[Tensor, "*batch units"]:
    """E[relu(g^T x)^n relu(g^T w)^n] over g ~ N(0, I), the arc-cosine kernel of order n = 0, 1 or 2 (over 2).

    Raises:
        ValueError: for another order, or other sizes of x than of weight.
    """
    if order not in (0, 1, 2):
        raise ValueError(f"order must be 0, 1 or 2, got {order}")
    check_features(x, weight.shape[-1], "x")
    norms = torch.linalg.vector_norm(x, dim=-1)[..., None] * torch.linalg.vector_norm(weight, dim=-1)
    cosine = (x @ weight.mT / norms.clamp(min=torch.finfo(x.dtype).tiny)).clamp(-1, 1)
    angle = torch.acos(cosine)
    sine = torch.sqrt((1 - cosine.square()).clamp(min=0))
    rest = math.pi - angle
    if order == 0:
        return rest / (2 * math.pi)
    if order == 1:
        return norms * (sine + rest * cosine) / (2 * math.pi)
    return norms.square() * (3 * sine * cosine + rest * (1 + 2 * cosine.square())) / (2 * math.pi)


def check_features(u: Tensor, in_features: int, name: str) -> None:
    if u.ndim == 0 or u.shape[-1] != in_features:
        raise ValueError(f"{name} must have {in_features} features in its last dimension, got {tuple(u.shape)}")


def _check_scale(input_scale: float) -> None:
    if not (math.isfinite(input_scale) and input_scale > 0):
        raise ValueError(f"input_scale must be positive and finite, got {input_scale}")


def _check_bias(bias: Tensor, weight: Tensor) -> None:
    if bias.shape != weight.shape[:-1]:
        raise ValueError(f"bias must be {tuple(weight.shape[:-1])}, as weight has it, got {tuple(bias.shape)}")
