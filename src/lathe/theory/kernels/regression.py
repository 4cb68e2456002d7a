"""What infinitely wide networks predict: exact Bayesian posteriors, ridge regression, and gradient descent in time.

Gaussian processes: Lee et al. 2018 (arXiv 1711.00165). Gradient flow of wide networks, mean and variance over random
initialisations: Lee et al. 2019 (arXiv 1902.06720), equations 14-16. All in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.theory.kernels.layers import Layer

__all__ = ["GradientFlow", "KernelRegression", "Prediction", "posterior"]

#: A negative eigenvalue of at most this much of the largest, times the size, is rounding.
_ROUNDING = 4 * torch.finfo(torch.float64).eps


class Prediction(NamedTuple):
    """What is expected at test inputs."""

    mean: Tensor
    """(test, *outputs), with times in front where several were asked for."""
    variance: Tensor | None
    """(test,) of each output, or the covariances (test, test), times in front likewise; None if it is not defined."""


def posterior(
    K: Float[Tensor, "n n"],
    y: Float[Tensor, "n *outputs"],
    K_test: Float[Tensor, "test n"],
    k_test: Float[Tensor, " test"] | Float[Tensor, "test test"] | None = None,
    *,
    noise: float = 0.0,
) -> Prediction:
    """The Gaussian process of kernel K, given `y = f(x) + noise`: mean and variance of f at test inputs.

    With an NTK for K, the mean is that of kernel ridge regression.

    Args:
        K: kernel of the training inputs.
        y: targets, one or several outputs.
        K_test: kernel of test inputs with training inputs.
        k_test: of each test input with itself, or of all pairs, for covariances.
        noise: variance of the noise.

    Raises:
        ValueError: where K with its noise is not positive definite: says its least eigenvalue, and which jitter helps.
    """
    return _solve(_cholesky(K, noise), y, K_test, k_test)


class GradientFlow:
    """Training of a wide network on the squared loss, solved exactly by one eigendecomposition of its NTK.

    Outputs follow `df/dt = -rate * scale * Theta (f - y)`, where `scale` belongs to the loss:

    - "sum": `1/2 sum_a |f_a - y_a|^2`, scale 1 (Lee et al. 2019);
    - "mean": `1/2 mean_a |f_a - y_a|^2` over the n inputs, scale 1/n;
    - "mse": `nn.MSELoss`, the mean of `(f - y)^2` over inputs and outputs, scale 2 / (n outputs).

    (neural-tangents' `gradient_descent_mse` has half of "mse".)

    Args:
        ntk: of the training inputs; the network's outputs count as independent and alike.
        y: targets (n,) or (n, outputs).
        nngp: of the training inputs, for the variance over initialisations.
        loss, rate: see above.
        jitter: added to the diagonal of `ntk`.

    Raises:
        ValueError: where `ntk` is not positive semi-definite, or for an unknown loss.
    """

    def __init__(
        self,
        ntk: Float[Tensor, "n n"],
        y: Float[Tensor, "n *outputs"],
        *,
        nngp: Float[Tensor, "n n"] | None = None,
        loss: str = "mse",
        rate: float = 1.0,
        jitter: float = 0.0,
    ) -> None:
        theta = _symmetric(ntk, "ntk")
        targets = _columns(y).double()
        scales = {"sum": 1.0, "mean": 1 / len(y), "mse": 2 / targets.numel()}
        if loss not in scales:
            raise ValueError(f"loss must be 'sum', 'mean' or 'mse', got {loss!r}")
        if not rate > 0:
            raise ValueError(f"rate must be positive, got {rate}")
        self.eigenvalues, self.vectors = torch.linalg.eigh(theta)
        self.eigenvalues = self.eigenvalues + jitter
        floor = -_ROUNDING * len(y) * float(self.eigenvalues[-1].abs())
        if self.eigenvalues[0] < floor:
            raise ValueError(_not_definite("ntk", self.eigenvalues))
        self.eigenvalues = self.eigenvalues.clamp_min(0.0)
        self.pace = rate * scales[loss]
        self._shape = y.shape[1:]
        self._targets = self.vectors.mT @ targets
        self._nngp = None if nngp is None else self.vectors.mT @ _symmetric(nngp, "nngp") @ self.vectors

    @property
    def largest_rate(self) -> float:
        """Gradient descent converges for rates (times the `rate` given) below this."""
        return 2 / (self.pace * float(self.eigenvalues[-1]))

    def at(
        self,
        times: float | Sequence[float] | Float[Tensor, " times"],
        ntk_test: Float[Tensor, "test n"],
        nngp_test: Float[Tensor, "test n"] | None = None,
        nngp_diagonal: Float[Tensor, " test"] | Float[Tensor, "test test"] | None = None,
        *,
        initial: tuple[Float[Tensor, "n *outputs"], Float[Tensor, "test *outputs"]] | None = None,
    ) -> Prediction:
        """Mean and variance over initialisations after training for `times`; infinity is allowed.

        Args:
            times: one time, or several.
            ntk_test: of test with training inputs. The training inputs may be tested too: `ntk_test=ntk`.
            nngp_test, nngp_diagonal: of test with training inputs, and of test inputs with themselves or all pairs
                (for covariances); both for the variance, which is None without them.
            initial: a certain network's outputs at the start, at training and test inputs, in place of the mean over
                initialisations, zero; there is no variance then.

        Raises:
            ValueError: at infinite time, where the NTK is singular; where nngp is missing.
        """
        moments = torch.as_tensor(times, dtype=torch.float64, device=self.vectors.device)
        if not (moments >= 0).all():
            raise ValueError(f"times must not be negative, got {times}")
        if moments.isinf().any():
            self._check_definite()
        paced = self.pace * moments.reshape(-1, 1).clamp_max(1e300)
        learnt = -torch.expm1(-paced * self.eigenvalues)
        found = self._predict(learnt, paced, ntk_test, nngp_test, nngp_diagonal, initial)
        return found if moments.ndim else _first(found)

    def after(
        self,
        steps: int | Float[Tensor, " times"],
        rate: float,
        ntk_test: Float[Tensor, "test n"],
        nngp_test: Float[Tensor, "test n"] | None = None,
        nngp_diagonal: Float[Tensor, " test"] | Float[Tensor, "test test"] | None = None,
        *,
        initial: tuple[Float[Tensor, "n *outputs"], Float[Tensor, "test *outputs"]] | None = None,
    ) -> Prediction:
        """As `at`, after `steps` of gradient descent of a finite size, `rate` (times the flow's own rate).

        Raises:
            ValueError: for a rate that diverges: names the largest one that does not.
        """
        if not 0 < rate < self.largest_rate:
            raise ValueError(f"rate must lie between 0 and {self.largest_rate:.4g}, where descent diverges, got {rate}")
        count = torch.as_tensor(steps, dtype=torch.float64, device=self.vectors.device).reshape(-1, 1)
        step = rate * self.pace * self.eigenvalues
        slow = step < 0.5  # where 1 - (1 - step)^count would cancel
        learnt = torch.where(slow, -torch.expm1(count * torch.log1p(-step.clamp_max(0.5))), 1 - (1 - step) ** count)
        found = self._predict(learnt, rate * self.pace * count, ntk_test, nngp_test, nngp_diagonal, initial)
        return _first(found) if isinstance(steps, int) else found

    def _check_definite(self) -> None:
        if self.eigenvalues[0] <= _ROUNDING * len(self.eigenvalues) * self.eigenvalues[-1]:
            raise ValueError(_not_definite("ntk", self.eigenvalues) + ", or ask for finite times")

    def _predict(
        self,
        learnt: Tensor,
        paced: Tensor,
        ntk_test: Tensor,
        nngp_test: Tensor | None,
        nngp_diagonal: Tensor | None,
        initial: tuple[Tensor, Tensor] | None,
    ) -> Prediction:
        """From the share of the target that is learnt, for each time and eigenvalue; `paced` is its slope at zero."""
        zero = self.eigenvalues < 1e-300
        part = torch.where(zero, paced, learnt / torch.where(zero, 1.0, self.eigenvalues))
        across = ntk_test.double() @ self.vectors
        targets, start = self._targets, None
        if initial is not None:
            targets = targets - self.vectors.mT @ _columns(initial[0]).double()
            start = _columns(initial[1]).double()
        mean = across @ (part.unsqueeze(-1) * targets)
        if start is not None:
            mean = mean + start
        mean = mean.reshape(*mean.shape[:2], *self._shape)
        variance = None
        if initial is None and (nngp_test is not None or nngp_diagonal is not None):
            if self._nngp is None or nngp_test is None or nngp_diagonal is None:
                raise ValueError("the variance needs nngp (of the flow), nngp_test and nngp_diagonal")
            shared = nngp_test.double() @ self.vectors
            rows = []
            for share in part:  # a time at a time: (test, n) numbers each
                used = across * share
                change = used @ self._nngp - shared
                if nngp_diagonal.ndim == 1:
                    rows.append(nngp_diagonal.double() + ((change - shared) * used).sum(1))
                else:
                    rows.append(nngp_diagonal.double() + change @ used.mT - used @ shared.mT)
            variance = torch.stack(rows)
        return Prediction(mean, variance)


class KernelRegression:
    """An infinitely wide network, trained: by Bayes' rule, by ridge regression, or by gradient flow.

    Args:
        network: the kernel (see `Sequential`, `from_module`).
        x: training inputs.
        y: targets (n,) or (n, outputs).
        noise: variance of the targets' noise, which is the ridge and the gradient flow's jitter as well.
        loss, rate: of the gradient flow: see `GradientFlow`.
    """

    def __init__(
        self,
        network: Layer,
        x: Float[Tensor, "n *features"],
        y: Float[Tensor, "rows *outputs"],
        *,
        noise: float = 0.0,
        loss: str = "mse",
        rate: float = 1.0,
    ) -> None:
        if len(x) != len(y):
            raise ValueError(f"y must have a row for each of the {len(x)} inputs, got {len(y)}")
        if not noise >= 0:
            raise ValueError(f"noise must not be negative, got {noise}")
        self.network, self.x, self.y = network, x, y.double()
        self.noise, self.loss, self.rate = noise, loss, rate

    def posterior(self, x_test: Float[Tensor, "test *features"]) -> Prediction:
        """The exact Bayesian posterior of the network with random weights as its prior (NNGP)."""
        K_test = _given(self.network(x_test, self.x, ("nngp",)).nngp)
        k_test = _given(self.network.diagonal(x_test, ("nngp",)).nngp)
        return _solve(self._factor, self.y, K_test, k_test)

    def ridge(self, x_test: Float[Tensor, "test *features"]) -> Prediction:
        """Kernel ridge regression with the NTK; without noise, where gradient flow ends, on average."""
        theta = _given(self.network(x_test, self.x, ("ntk",)).ntk)
        return _solve(_cholesky(self._kernels[1], self.noise, "ntk"), self.y, theta, None)

    def trained(
        self,
        x_test: Float[Tensor, "test *features"],
        times: float | Sequence[float] | Float[Tensor, " times"] = math.inf,
    ) -> Prediction:
        """Mean and variance over initialisations of the network after gradient flow for `times`."""
        found = self.network(x_test, self.x)
        diagonal = self.network.diagonal(x_test, ("nngp",))
        return self.flow.at(times, _given(found.ntk), _given(found.nngp), _given(diagonal.nngp))

    def log_likelihood(self) -> Tensor:
        """Log marginal likelihood of the targets under the NNGP with noise, summed over outputs: compares networks."""
        L = self._factor
        white = torch.linalg.solve_triangular(L, _columns(self.y), upper=False)
        outputs = white.shape[1]
        volume = L.diagonal().log().sum() + len(L) / 2 * math.log(2 * math.pi)
        return -white.square().sum() / 2 - outputs * volume

    @cached_property
    def flow(self) -> GradientFlow:
        """The gradient flow on the training inputs."""
        nngp, ntk = self._kernels
        return GradientFlow(ntk, self.y, nngp=nngp, loss=self.loss, rate=self.rate, jitter=self.noise)

    @cached_property
    def _kernels(self) -> tuple[Tensor, Tensor]:
        found = self.network(self.x)
        return _given(found.nngp), _given(found.ntk)

    @cached_property
    def _factor(self) -> Tensor:
        known = self.__dict__.get("_kernels")
        K = known[0] if known else _given(self.network(self.x, None, ("nngp",)).nngp)
        return _cholesky(K, self.noise, "nngp")


def _solve(L: Tensor, y: Tensor, K_test: Tensor, k_test: Tensor | None) -> Prediction:
    weights = torch.linalg.solve_triangular(L, K_test.to(L).mT, upper=False)
    targets = torch.linalg.solve_triangular(L, _columns(y).to(L), upper=False)
    mean = (weights.mT @ targets).reshape(len(K_test), *y.shape[1:])
    if k_test is None:
        return Prediction(mean, None)
    used = weights.square().sum(0) if k_test.ndim == 1 else weights.mT @ weights
    return Prediction(mean, k_test.to(L) - used)


def _first(found: Prediction) -> Prediction:
    return Prediction(found.mean[0], None if found.variance is None else found.variance[0])


def _given(kernel: Tensor | None) -> Tensor:
    assert kernel is not None
    return kernel


def _columns(y: Tensor) -> Tensor:
    return y.reshape(len(y), -1)


def _symmetric(K: Tensor, name: str) -> Tensor:
    if K.ndim != 2 or K.shape[0] != K.shape[1] or not torch.isfinite(K).all():
        raise ValueError(f"{name} must be a finite square matrix, got shape {tuple(K.shape)}")
    return K.double()


def _cholesky(K: Tensor, noise: float, name: str = "K") -> Tensor:
    K = _symmetric(K, name)
    if not noise >= 0:
        raise ValueError(f"noise must not be negative, got {noise}")
    noisy = K + noise * torch.eye(len(K), dtype=K.dtype, device=K.device)
    L, failed = torch.linalg.cholesky_ex(noisy)
    if failed:
        raise ValueError(_not_definite(name, torch.linalg.eigvalsh(noisy)))
    return L


def _not_definite(name: str, eigenvalues: Tensor) -> str:
    least, most = float(eigenvalues[0]), float(eigenvalues[-1])
    jitter = max(-2 * least, 10 * len(eigenvalues) * torch.finfo(torch.float64).eps * abs(most))
    return (
        f"{name} must be positive definite, but its least eigenvalue is {least:.3g} (the largest {most:.3g}); remove "
        f"repeated inputs, or add noise (a jitter) of at least {jitter:.1g}"
    )
