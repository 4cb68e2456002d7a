"""The exact average learning curves of a linear student, as samples and inputs grow together (sections 2 and 3)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lathe.theory.generalization_dynamics.units import Loss, checked_times, time_per_step

__all__ = ["LinearTheory"]

Number = float | Tensor
#: Nodes of the quadrature, and the smallest angle that it resolves: times up to 1e16 over the eigenvalues' scale.
_NODES, _SMALLEST_ANGLE = 200, 1e-8
#: Values of the integrand that are held at a time (2 MiB, so that they stay in the cache).
_BLOCK = 1 << 18
#: Halvings of the logarithm of time, after which Newton's steps find the optimal time.
_BISECTIONS = 28


class LinearTheory:
    """Average errors along gradient flow on `1/2 sum residual^2` of a linear student of a noisy linear teacher.

    `N` inputs with independent entries of variance `1/N`, `P = alpha N` samples, targets `y = wbar x + eps`, student
    `w x` started at random; `N, P -> inf`. Time is in units in which `dw/dt` is minus the gradient (tau = 1), so that
    the eigenvalues of `X X^T` are of order one: see `steps`. Test errors include the noise, train errors are a sample.

    Parameters broadcast to a batch of curves. Times come last: an error has the shape `(*batch, *times)`. All is in
    float64 and can be differentiated by the parameters and by time.

    Args:
        alpha: samples over inputs, `P / N`.
        snr: `sigma_w^2 / sigma_eps^2`; or else `sigma_eps`.
        sigma_w: standard deviation of the teacher's weights.
        sigma_0: standard deviation of the student's first weights.
        sigma_eps: standard deviation of the targets' noise.

    Raises:
        ValueError: unless `alpha > 0`, deviations are at least 0, `snr > 0`, and just one of `snr, sigma_eps` is given.

    Example:
        >>> theory = LinearTheory(alpha=2.0, snr=1.0)
        >>> time, error = theory.optimal_stopping()
        >>> round(time.item(), 4), round(error.item(), 4), round(theory.ridge().item(), 4)
        (0.6185, 1.4232, 1.4142)
    """

    def __init__(
        self,
        alpha: Number,
        snr: Number | None = None,
        sigma_w: Number = 1.0,
        sigma_0: Number = 0.0,
        sigma_eps: Number | None = None,
    ) -> None:
        if (snr is None) == (sigma_eps is None):
            raise ValueError("give one of snr and sigma_eps, " + ("not both" if snr is not None else "got neither"))
        given = {"alpha": alpha, "sigma_w": sigma_w, "sigma_0": sigma_0}
        given["snr" if snr is not None else "sigma_eps"] = snr if snr is not None else sigma_eps  # type: ignore[assignment]
        values = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in given.items()}
        for name, value in values.items():
            positive = name in ("alpha", "snr")
            inside = value > 0 if positive else value >= 0
            if not (inside & (torch.isfinite(value) | (value == math.inf) & (name == "snr"))).all():
                raise ValueError(f"{name} must be {'positive' if positive else 'at least 0'}, got {value.tolist()}")
        #: Shape of the batch of curves.
        self.shape = torch.broadcast_shapes(*(value.shape for value in values.values()))
        for name, value in values.items():
            # Not expanded: curves that share alpha share the integrals.
            values[name] = value.reshape((1,) * (len(self.shape) - value.ndim) + value.shape)
        self.alpha, self.sigma_w, self.sigma_0 = values["alpha"], values["sigma_w"], values["sigma_0"]
        self.sigma_eps = values["sigma_eps"] if snr is None else self.sigma_w / values["snr"].sqrt()

    def __repr__(self) -> str:
        names = ("alpha", "sigma_w", "sigma_0", "sigma_eps")
        return f"LinearTheory({', '.join(f'{name}={getattr(self, name).tolist()}' for name in names)})"

    # The spectrum of X X^T -------------------------------------------------------------------------------------------

    @property
    def edges(self) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """Smallest and largest eigenvalue of the continuous part, `(sqrt(alpha) -+ 1)^2`."""
        root = self.alpha.sqrt()
        return self._whole((root - 1).square()), self._whole((root + 1).square())

    @property
    def frozen(self) -> Float[Tensor, "*batch"]:
        """The part of all directions in which nothing is ever learnt, `max(0, 1 - alpha)`."""
        return self._whole((1 - self.alpha).clamp_min(0))

    @property
    def overtraining_time(self) -> Float[Tensor, "*batch"]:
        """When the slowest mode has taken up its noise, `1 / lambda_-`; infinite at `alpha = 1`."""
        return 1 / self.edges[0]

    def spectrum(self, lam: Float[Tensor, "*eigenvalues"]) -> Float[Tensor, "*batch_eigenvalues"]:
        """Density of the non-zero eigenvalues at `lam` (Marchenko-Pastur); its mass is `min(1, alpha)`."""
        lam = torch.as_tensor(lam, dtype=torch.float64)
        low, high = (self._before(edge, lam.ndim) for edge in self.edges)
        inside = (lam > low) & (lam < high) & (lam > 0)
        under = torch.where(inside, (high - lam) * (lam - low), 0.0)
        return torch.where(inside, under.sqrt() / (2 * math.pi * torch.where(inside, lam, 1.0)), 0.0)

    # Errors ----------------------------------------------------------------------------------------------------------

    def test_error(self, t: Number) -> Float[Tensor, "*batch_times"]:
        """Mean squared error on new samples at the times `t`, noise included (infinite times allowed)."""
        t = checked_times(t, "t")
        return self._at(t, self._test(self._row(t)), self.final_error())

    def train_error(self, t: Number) -> Float[Tensor, "*batch_times"]:
        """Mean squared residual of the training samples at the times `t`."""
        t = checked_times(t, "t")
        signal, noise = self._average(_remaining_residual, self._row(t))
        alpha, S0, noise_variance = (self._before(each, 1) for each in (self.alpha, self._S0, self._noise))
        error = (S0 * signal + noise_variance * noise) / alpha + (1 - 1 / alpha).clamp_min(0) * noise_variance
        return self._at(t, error, self._whole((1 - 1 / self.alpha).clamp_min(0) * self._noise))

    def weight_norm(self, t: Number) -> Float[Tensor, "*batch_times"]:
        """`|w|^2 / N` of the student at the times `t`."""
        t = checked_times(t, "t")
        start, noise, learnt = self._average(_weights, self._row(t))
        frozen = self._before(self.frozen, 1)
        parts = (self.sigma_w.square(), self.sigma_0.square(), self._noise)
        teacher, first, noise_variance = (self._before(part, 1) for part in parts)
        norm = teacher * learnt + first * (start + frozen) + noise_variance * noise
        final = self.sigma_w.square() * (1 - self.frozen) + self.sigma_0.square() * self.frozen + self._final_noise()
        return self._at(t, norm, self._whole(final))

    def final_error(self) -> Float[Tensor, "*batch"]:
        """Test error after infinite time; infinite at `alpha = 1`, unless there is no noise."""
        return self._whole(self._noise + self.frozen * self._S0 + self._final_noise())

    def ridge(self, gamma: Number | None = None) -> Float[Tensor, "*batch"]:
        """Test error of ridge regression, `w = y X^T (X X^T + gamma)^-1`, in closed form.

        By default with the best `gamma = sigma_eps^2 / sigma_w^2`, where it is the least error that any estimator of a
        Gaussian teacher reaches. The first weights play no part.

        Raises:
            ValueError: for `gamma < 0`.
        """
        alpha, noise, teacher = self.alpha, self._noise, self.sigma_w.square()
        if gamma is None:
            gamma = noise / teacher
        gamma = torch.as_tensor(gamma, dtype=torch.float64)
        if not (gamma >= 0).all():
            raise ValueError(f"gamma must be at least 0, got {gamma.tolist()}")
        # G = int rho/(lambda + gamma) solves gamma G^2 + (gamma + alpha - 1) G = 1; each branch is the one that does
        # not subtract equals. What is needed is gamma^2 int rho/(lambda + gamma)^2 and int rho lambda/(lambda+gamma)^2.
        b = gamma + alpha - 1
        root = (b.square() + 4 * gamma).sqrt()
        few, many = alpha <= 1, alpha > 1
        gamma_G = torch.where(few, (root - b) / 2, 2 * gamma / torch.where(many, root + b, 1.0))
        bias = gamma_G * (gamma_G + gamma) / root
        slow = 2 * alpha * gamma_G / torch.where(few, root * (root + gamma + 1 - alpha), 1.0)
        fast = (root - gamma - 1 + alpha) / torch.where(many, (root + b) * root, 1.0)
        variance = torch.where(few, slow, fast)
        error = noise + teacher * bias + torch.where(noise > 0, noise * variance, 0.0)
        # Infinitely much regularisation predicts zero; none at alpha = 1 has no finite variance.
        error = torch.where(gamma.isinf(), noise + teacher, error)
        error = torch.where(root == 0, torch.where(noise > 0, math.inf, noise), error)
        return error.expand(torch.broadcast_shapes(error.shape, self.shape))

    # When to stop ----------------------------------------------------------------------------------------------------

    def mode_stopping(self, lam: Float[Tensor, "*eigenvalues"]) -> Float[Tensor, "*batch_eigenvalues"]:
        """When a mode of eigenvalue `lam` by itself had better stop: `log(1 + lam S0 / sigma_eps^2) / lam`."""
        lam = torch.as_tensor(lam, dtype=torch.float64)
        return _mode_stopping(lam, self._before(self._S0 / self._noise, lam.ndim))

    def optimal_stopping(self) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """The time of the least test error, and that error. Infinite without noise.

        The minimum is unique: the slope is a Laplace transform of a density that changes its sign once, and so it
        changes sign once (Descartes' rule). It lies between the best times of the fastest and the slowest mode.
        """
        S0, noise = (self._whole(each) for each in (self._S0, self._noise))
        low, high = self.edges
        noisy = noise > 0
        ratio = torch.where(noisy, S0 / torch.where(noisy, noise, 1.0), 1.0)
        with torch.no_grad():
            left, right = (_mode_stopping(edge, torch.where(ratio > 0, ratio, 1.0)).log() for edge in (high, low))
            for _ in range(_BISECTIONS):
                middle = (left + right) / 2
                rising = self._slope(middle.exp())[0] > 0
                left, right = torch.where(rising, left, middle), torch.where(rising, middle, right)
            t = ((left + right) / 2).exp()
            for _ in range(2):
                slope, curvature = self._slope(t)
                t = t - slope / torch.where(curvature > 0, curvature, math.inf)
            curvature = self._slope(t)[1]
        # One step of Newton's, through which the time is differentiated as the implicit function that it is.
        moved = t - self._slope(t)[0] / torch.where(curvature > 0, curvature, math.inf)
        t = torch.where(noisy & (ratio > 0), moved, torch.where(noisy, 0.0, math.inf))
        error = self._test(torch.where(noisy, t, 0.0).unsqueeze(-1)).squeeze(-1)
        return t, torch.where(noisy, error, self.final_error())

    def steps(
        self,
        t: Number,
        lr: float,
        *,
        loss: Loss = "sum",
        samples: int | None = None,
        input_variance: float | None = None,
    ) -> Float[Tensor, "*times"]:
        """How many steps of gradient descent take the student to the times `t`.

        Args:
            t: times of this theory, as from `optimal_stopping`.
            lr: the learning rate.
            loss: what is descended: "sum" is `1/2 sum residual^2`, "mean" is `1/(2P) sum residual^2`, "mse" is
                `nn.MSELoss`, twice that.
            samples: `P`; needed for all but "sum" with the theory's inputs.
            input_variance: of an input's entries; by default the theory's `1/N`, with `N = P / alpha`.

        Raises:
            ValueError: where gradient descent diverges at this rate (the message has the bound), and for `t < 0`.
        """
        t = checked_times(t, "t")
        rate = torch.tensor(time_per_step(lr, loss, samples), dtype=torch.float64)
        if input_variance is not None:
            if samples is None or not input_variance > 0:
                raise ValueError(f"input_variance must be positive and needs samples, got {input_variance}, {samples}")
            rate = rate * input_variance * samples / self.alpha
        largest = (rate * self.edges[1]).max().item()
        if largest >= 2:
            raise ValueError(f"lr must be below {2 * lr / largest:.6g}, where gradient descent diverges; got {lr}")
        return t / rate

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def _S0(self) -> Tensor:
        return self.sigma_w.square() + self.sigma_0.square()

    @property
    def _noise(self) -> Tensor:
        return self.sigma_eps.square()

    def _final_noise(self) -> Tensor:
        """`sigma_eps^2 int rho / lambda`, over the eigenvalues that are not zero."""
        noise, gap = self._noise, (self.alpha - 1).abs()
        inverse = self.alpha.clamp_max(1) / torch.where(gap > 0, gap, 1.0)
        inverse = torch.where(gap > 0, inverse, math.inf)
        return torch.where(noise > 0, noise * torch.where(noise > 0, inverse, 1.0), 0.0)

    def _whole(self, value: Tensor) -> Tensor:
        return value.expand(self.shape)

    @staticmethod
    def _before(value: Tensor, axes: int) -> Tensor:
        """`value` with `axes` new axes behind."""
        return value.reshape(value.shape + (1,) * axes)

    def _row(self, t: Tensor) -> Tensor:
        """The finite times, for all curves alike: (1, ..., 1, times)."""
        return torch.where(t.isinf(), 0.0, t).reshape((1,) * len(self.shape) + (-1,))

    def _at(self, t: Tensor, flat: Tensor, final: Tensor) -> Tensor:
        """`(*batch, times)` in the shape of `t`, with `final` where `t` is infinite."""
        found = flat.expand((*self.shape, t.numel())).reshape(self.shape + t.shape)
        return torch.where(t.isinf(), self._before(final, t.ndim), found)

    def _test(self, t: Tensor) -> Tensor:
        """Test errors at the times of each curve, (*batch, times) or what broadcasts to it."""
        start, noise = self._average(_remaining, t)
        frozen, S0, noise_variance = (self._before(each, 1) for each in (self.frozen, self._S0, self._noise))
        return noise_variance + S0 * (start + frozen) + noise_variance * noise

    def _slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Half the slope of the test error at one time for each curve, and the derivative of that."""
        signal, noise, bend, noise_bend = (each.squeeze(-1) for each in self._average(_slopes, t.unsqueeze(-1)))
        return self._noise * noise - self._S0 * signal, self._S0 * bend + self._noise * noise_bend

    def _average(self, f: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]], t: Tensor) -> list[Tensor]:
        """Integrals over the eigenvalues above zero, as `f(lambda, weights, t)` takes them: (*curves, times) each.

        `t` is (*curves, times); curves are broadcast against alpha. With `lambda = (1 - r)^2 + 4 r sin^2(theta/2)`,
        `r = sqrt(alpha)`, the density is smooth in the angle, and `theta = s sinh(u)` spreads the nodes over all its
        scales: one rule serves every alpha, 1 included, and every time.
        """
        theta, weight = (torch.as_tensor(each, device=t.device) for each in _angles())
        shape = torch.broadcast_shapes(self.alpha.shape, t.shape[:-1])
        alpha = self.alpha.expand(shape).reshape(-1, 1)
        t = t.expand(*shape, t.shape[-1]).reshape(len(alpha), -1)
        root, count = alpha.sqrt(), t.shape[1]
        width, rows = max(1, _BLOCK // len(theta)), max(1, _BLOCK // (len(theta) * max(1, count)))
        found: list[list[Tensor]] = []
        for first in range(0, len(alpha), rows):
            some = slice(first, first + rows)
            lam = (1 - root[some]).square() + 4 * root[some] * (theta / 2).sin().square()
            rho = weight * 2 * alpha[some] * theta.sin().square() / (math.pi * lam)
            for start in range(0, count, width):
                parts = f(lam.unsqueeze(-1), rho.unsqueeze(1), t[some, start : start + width].unsqueeze(1))
                found.append([part.squeeze(1) for part in parts])
        columns = len(range(0, count, width))
        return [
            torch.cat([torch.cat(each[i : i + columns], 1) for i in range(0, len(each), columns)]).reshape(
                *shape, count
            )
            for each in ([block[part] for block in found] for part in range(len(found[0])))
        ]


@functools.lru_cache(maxsize=1)
def _angles() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on (0, pi), dense at 0 on a logarithmic scale."""
    u, weight = np.polynomial.legendre.leggauss(_NODES)
    half = np.arcsinh(math.pi / _SMALLEST_ANGLE) / 2
    u = (u + 1) * half
    return _SMALLEST_ANGLE * np.sinh(u), weight * half * _SMALLEST_ANGLE * np.cosh(u)


# What follows takes eigenvalues (curves, nodes, 1), their weights (curves, 1, nodes) and times (curves, 1, times):
# products with the weights from the left are several times as fast as sums over a last axis.


def _remaining(lam: Tensor, rho: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of the start, and what was learnt of the noise."""
    return _weights(lam, rho, t)[:2]


def _remaining_residual(lam: Tensor, rho: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    signal, noise = (torch.cat([rho * lam.mT, rho], 1) @ torch.exp(-2 * lam * t)).split(1, 1)
    return signal, noise


def _weights(lam: Tensor, rho: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_remaining`, and what was learnt of the teacher."""
    learnt = torch.expm1(-lam * t)  # with the other sign
    both, noise = (torch.cat([rho, rho / lam.mT], 1) @ (learnt * learnt)).split(1, 1)
    return rho.sum(-1, keepdim=True) + 2 * (rho @ learnt) + both, noise, both


def _slopes(lam: Tensor, rho: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    learnt = -torch.expm1(-lam * t)
    left, weighted = 1 - learnt, rho * lam.mT
    signal, bend = (torch.cat([weighted, 2 * weighted * lam.mT], 1) @ left.square()).split(1, 1)
    return signal, rho @ (left * learnt), bend, 2 * signal - weighted @ left


def _mode_stopping(lam: Tensor, ratio: Tensor) -> Tensor:
    lam, ratio = torch.broadcast_tensors(lam, ratio)
    return torch.where(lam > 0, torch.log1p(lam * ratio) / torch.where(lam > 0, lam, 1.0), ratio)
