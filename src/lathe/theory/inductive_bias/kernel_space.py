"""Hypotheses of a kernel space that interpolate the training data, and the exact law of their test loss.

Conditioned on the training data a Gaussian process is Gaussian at the test points (Boopathy et al. 2024, algorithm 1);
its mean squared error is then a weighted sum of shifted squares, whose law needs no sampling (`laws`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from lathe.theory.inductive_bias.estimate import Base, InductiveBias, Tail, Task, check_eps, inductive_bias, with_task
from lathe.theory.inductive_bias.fits import Fit, match_cumulants
from lathe.theory.inductive_bias.laws import log_integral, weighted_chi2_cumulants, weighted_chi2_log_cdf
from lathe.theory.inductive_bias.posterior import (
    Kernel,
    Lengthscale,
    Posterior,
    Space,
    as_tensors,
    iterated_posterior,
    kernel_function,
)

__all__ = ["BiasCurve", "KernelHypotheses", "kernel_hypotheses", "kernel_inductive_bias", "required_bias_curve"]

#: More training points than this are solved for by conjugate gradients.
_LARGEST_CHOLESKY = 20_000
#: Eigenvalues below this share of the largest are zeros.
_ZERO = 1e-12


@dataclass(frozen=True)
class KernelHypotheses:
    """Random functions of a kernel space that fit the training data, at the test points: `f_c ~ N(mean_c, cov)`.

    Attributes:
        mean: `(points, outputs)`.
        cov: `(points, points)`, the same for each output.
        targets: `(points, outputs)`.
        eigenvalues, basis: of `cov`, ascending; zero where below 1e-12 of the largest.
        shifts: `basis' (mean - targets)`, `(points, outputs)`.
        train_size: points that are fitted.
        lengthscale: of the kernel; None where it has none.
        jitter: what was added to the kernel's diagonal in all, noise included.
        residual: largest `|f(X) - Y|` of the mean at the training points.
    """

    mean: Float[Tensor, "points outputs"] = field(repr=False)
    cov: Float[Tensor, "points points"] = field(repr=False)
    targets: Float[Tensor, "points outputs"] = field(repr=False)
    eigenvalues: Float[Tensor, " points"] = field(repr=False)
    basis: Float[Tensor, "points points"] = field(repr=False)
    shifts: Float[Tensor, "points outputs"] = field(repr=False)
    train_size: int = 0
    lengthscale: float | None = None
    jitter: float = 0.0
    residual: float = 0.0

    @classmethod
    def of(
        cls,
        mean: Float[Tensor, "points outputs"],
        cov: Float[Tensor, "points points"],
        targets: Float[Tensor, "points outputs"],
        **about: Any,
    ) -> KernelHypotheses:
        """Any Gaussian hypotheses. One eigendecomposition serves all outputs and all eps.

        Raises:
            ValueError: where no eigenvalue is positive: there is only one hypothesis.
        """
        mean, cov, targets = mean.double(), cov.double(), targets.double()
        with torch.no_grad():
            eigenvalues, basis = torch.linalg.eigh(cov)
            zero = eigenvalues <= _ZERO * eigenvalues[-1]
            if bool(zero.all()):
                raise ValueError("cov must have a positive eigenvalue: the training data leave a single hypothesis")
        if cov.requires_grad:
            # Differentiating eigh divides by gaps of eigenvalues; this gives them their first order without.
            eigenvalues = torch.einsum("ij,ik,kj->j", basis, cov, basis)
        return cls(mean, cov, targets, eigenvalues.masked_fill(zero, 0.0), basis, basis.T @ (mean - targets), **about)

    @property
    def weights(self) -> Float[Tensor, " points"]:
        """The law of the loss: `sum_j weights_j chi'^2_outputs(shifts2_j / weights_j)`."""
        return self.eigenvalues / self.targets.numel()

    @property
    def shifts2(self) -> Float[Tensor, " points"]:
        return self.shifts.square().sum(1) / self.targets.numel()

    @property
    def min_loss(self) -> float:
        """What no hypothesis goes below: the error of the mean where functions cannot vary."""
        return self.shifts2[self.eigenvalues == 0].sum().item()

    def log_cdf(
        self, eps: float | Float[Tensor, "*eps"], *, method: Literal["exact", "saddlepoint"] = "exact"
    ) -> Float[Tensor, "*eps"]:
        """`log P(loss <= eps)`; differentiable, also by what the kernel depends on. See `weighted_chi2_log_cdf`."""
        outputs = float(self.targets.shape[1])
        if not self.cov.requires_grad:
            return weighted_chi2_log_cdf(eps, self.weights, self.shifts2, df=outputs, method=method)
        if method != "exact":
            raise ValueError(f"method must be 'exact' where gradients by the kernel are wanted, got {method!r}")
        x = check_eps(eps).to(self.cov.device)
        above = x > self.min_loss
        law = (self.weights, torch.full_like(self.weights, outputs), self.shifts2)
        rotated = self.basis.T @ self.cov @ self.basis
        coupling = (
            (self.shifts @ self.shifts.T) * (rotated - torch.diag(rotated.diagonal())) / self.targets.numel() ** 2
        )
        found = log_integral(torch.where(above, x, self.cumulants(1)[0].detach()), law, coupling=coupling)
        return torch.where(above, found, -math.inf)

    def cdf(self, eps: float | Float[Tensor, "*eps"]) -> Float[Tensor, "*eps"]:
        """`P(loss <= eps)`."""
        return self.log_cdf(eps).exp()

    def log_prob(self, losses: float | Float[Tensor, "*losses"]) -> Float[Tensor, "*losses"]:
        """Log-density of the loss."""
        x = torch.as_tensor(losses, dtype=torch.float64, device=self.cov.device) - self.min_loss
        some = self.weights > 0
        law = (
            self.weights[some],
            torch.full_like(self.weights[some], float(self.targets.shape[1])),
            self.shifts2[some],
        )
        return torch.where(x > 0, log_integral(torch.where(x > 0, x, 1.0), law, density=True), -math.inf)

    def cumulants(self, order: int = 4) -> Float[Tensor, " order"]:
        """The first cumulants of the loss: mean, variance, ..."""
        return weighted_chi2_cumulants(self.weights, self.shifts2, df=float(self.targets.shape[1]), order=order)

    def sample(self, num_samples: int, *, seed: int = 0) -> Float[Tensor, " samples"]:
        """Mean squared errors of random hypotheses."""
        spread, shift = self.eigenvalues.detach().sqrt(), self.shifts.detach()
        return self._draw(num_samples, seed, lambda z: (spread[:, None] * z + shift).square().mean((1, 2)))

    def sample_functions(self, num_samples: int, *, seed: int = 0) -> Float[Tensor, "samples points outputs"]:
        """Random hypotheses at the test points."""
        root = self.basis * self.eigenvalues.detach().sqrt()
        return self._draw(num_samples, seed, lambda z: self.mean.detach() + root @ z)

    def sample_errors(self, num_samples: int, *, seed: int = 0) -> Float[Tensor, " samples"]:
        """Shares of test points at which the largest output is not the target's."""
        root, right = self.basis * self.eigenvalues.detach().sqrt(), self.targets.argmax(1)
        return self._draw(num_samples, seed, lambda z: ((self.mean + root @ z).argmax(2) != right).double().mean(1))

    def _draw(self, count: int, seed: int, what: Callable[[Tensor], Tensor]) -> Tensor:
        generator = torch.Generator(self.cov.device).manual_seed(seed)
        block = max(1, 4_000_000 // self.targets.numel())
        return torch.cat(
            [
                what(
                    torch.randn(
                        min(block, count - start), *self.targets.shape,
                        dtype=torch.float64, device=self.cov.device, generator=generator,
                    )
                )
                for start in range(0, count, block)
            ]
        )  # fmt: skip


def kernel_inductive_bias(
    x_train: Shaped[Tensor, "train *features"],
    y_train: Shaped[Tensor, "train *outputs"],
    x_test: Shaped[Tensor, "test *features_"],
    y_test: Shaped[Tensor, "test *outputs_"],
    eps: float | Float[Tensor, "*eps"] | None = None,
    *,
    kernel: Kernel = "rbf",
    lengthscale: Lengthscale = "median",
    space: Space = "nngp",
    jitter: float = 1e-6,
    noise: float = 0.0,
    center: bool = False,
    method: Literal["exact", "saddlepoint", "sample"] = "exact",
    num_samples: int = 10_000,
    loss: Literal["mse", "0-1"] = "mse",
    tail: Tail = "ncx2",
    fit: Fit = "mle",
    base: Base = "nats",
    ci: float = 0.95,
    seed: int = 0,
) -> InductiveBias:
    """Inductive bias that a task needs beyond a kernel space: without sampling, and without training a network.

    Args:
        x_train, x_test: inputs of any shape; float32 or float64.
        y_train, y_test: class labels (integers, made one-hot) or real targets, `(n,)` or `(n, outputs)`.
        eps: test losses to be reached; by default the smallest among `num_samples` hypotheses. The mean squared error
            is a mean over points and outputs: to predict the mean of K balanced classes gives (K - 1) / K^2.
        kernel, lengthscale, space, jitter, noise, center: see `kernel_hypotheses`.
        method: "exact"; "saddlepoint" (for tens of thousands of test points); "sample", which draws `num_samples`
            losses and fits their law as the paper does.
        loss: "mse", or "0-1" for shares of errors, whose sampled law is taken for a beta law (our extension).
        tail, fit, base, ci: see `inductive_bias`; `tail` and `fit` for sampled losses only.
        seed: of the samples.

    Returns:
        The bias, with the hypotheses as its `source`. Differentiable by a `lengthscale` that is a tensor.

    Raises:
        ValueError: for eps not positive, empty or mismatched tensors, half precision, unknown options.
        RuntimeError: where the kernel matrix is not positive definite in spite of jitter, which is told.

    Warns:
        UserWarning: where test points are among the training points.
    """
    if method not in ("exact", "saddlepoint", "sample"):
        raise ValueError(f"method must be 'exact', 'saddlepoint' or 'sample', got {method!r}")
    if loss not in ("mse", "0-1"):
        raise ValueError(f"loss must be 'mse' or '0-1', got {loss!r}")
    if eps is not None:
        check_eps(eps)
    hypotheses = kernel_hypotheses(
        x_train, y_train, x_test, y_test,
        kernel=kernel, lengthscale=lengthscale, space=space, jitter=jitter, noise=noise, center=center,
    )  # fmt: skip
    task = Task.of(loss, len(x_train), x_test, hypotheses.targets)
    if loss == "0-1":
        errors = hypotheses.sample_errors(num_samples, seed=seed)
        return with_task(inductive_bias(errors, eps, tail="beta", base=base, ci=ci), task, hypotheses)
    if method == "sample":
        losses = hypotheses.sample(num_samples, seed=seed)
        found = inductive_bias(losses, eps, tail=tail, fit=fit, base=base, ci=ci, floor=hypotheses.min_loss)
        return with_task(found, task, hypotheses)
    target = check_eps(hypotheses.sample(num_samples, seed=seed).min() if eps is None else eps)
    value = -hypotheses.log_cdf(target, method=method)
    unit = math.log(2) if base == "bits" else 1.0
    value, still = value / unit, value.detach() / unit
    nothing = torch.zeros_like(still)
    first = hypotheses.cumulants(3).detach().tolist()
    law = match_cumulants(*first, floor=hypotheses.min_loss)[0]
    return InductiveBias(
        value, still, still, nothing, target, 0, nothing, method, "exact", law, base, task, hypotheses
    )  # fmt: skip


def kernel_hypotheses(
    x_train: Shaped[Tensor, "train *features"],
    y_train: Shaped[Tensor, "train *outputs"],
    x_test: Shaped[Tensor, "test *features_"],
    y_test: Shaped[Tensor, "test *outputs_"],
    *,
    kernel: Kernel = "rbf",
    lengthscale: Lengthscale = "median",
    space: Space = "nngp",
    jitter: float = 1e-6,
    noise: float = 0.0,
    center: bool = False,
) -> KernelHypotheses:
    """The functions of a kernel space that interpolate the training data.

    Args:
        kernel: "rbf", `exp(-d^2 / (2 lengthscale^2))`; "laplace", `exp(-d / lengthscale)`; a network of
            `lathe.theory.kernels`, infinitely wide; or any function of two sets of inputs that gives their matrix.
        lengthscale: of "rbf" and "laplace": a number, or "median", the median distance between training inputs.
        space: what is made of a network: "nngp", the functions of networks at initialisation; "ntk", Gaussian
            processes with the NTK as covariance; "trained", networks after gradient descent from initialisation to the
            end (Lee et al. 2019, equations 14 and 15).
        jitter: added to the diagonal, in units of its mean; ten times as much up to three times if need be.
        noise: standard deviation tau of what hypotheses may miss the targets by: tau^2 joins the diagonal.
        center: take the mean of the training targets from all targets, for each output.

    Raises, warns: see `kernel_inductive_bias`.
    """
    X, T, Y, y = as_tensors(x_train, y_train, x_test, y_test)
    if jitter < 0 or noise < 0:
        raise ValueError(f"jitter and noise must not be negative, got {jitter} and {noise}")
    if center:
        mean_target = Y.mean(0)
        Y, y = Y - mean_target, y - mean_target
    k, scale = kernel_function(kernel, lengthscale, space, X)
    if len(X) <= _LARGEST_CHOLESKY or space == "trained":
        solved = Posterior.of(k, X, T, jitter, noise)
        (mean, cov, residual), added = solved.posterior(len(X), Y), solved.added
    else:
        mean, cov, residual, added = iterated_posterior(k, X, Y, T, jitter, noise)
    return KernelHypotheses.of(
        mean, cov, y, train_size=len(X), lengthscale=scale, jitter=added, residual=residual
    )  # fmt: skip


@dataclass(frozen=True)
class BiasCurve:
    """Inductive bias over the number of training points.

    Attributes:
        sizes: of the training set.
        eps: losses to be reached.
        value: `(sizes, eps)`.
    """

    sizes: tuple[int, ...]
    eps: Float[Tensor, " eps"]
    value: Float[Tensor, "sizes eps"]
    base: Base = "nats"

    def plot(self) -> Any:
        """An Altair chart, one line an eps."""
        import altair as alt

        rows = [
            {"n": size, "bias": value, "eps": f"{eps:.3g}"}
            for size, line in zip(self.sizes, self.value.tolist())
            for eps, value in zip(self.eps.tolist(), line)
            if math.isfinite(value)
        ]
        return (
            alt.Chart(alt.Data(values=rows), width=360, height=240)
            .mark_line(point=True)
            .encode(
                x=alt.X("n:Q", title="training points").scale(type="log"),
                y=alt.Y("bias:Q", title=f"inductive bias ({self.base})"),
                color=alt.Color("eps:N", title="test loss"),
            )
        )


def required_bias_curve(
    x_train: Shaped[Tensor, "train *features"],
    y_train: Shaped[Tensor, "train *outputs"],
    x_test: Shaped[Tensor, "test *features_"],
    y_test: Shaped[Tensor, "test *outputs_"],
    eps: float | Float[Tensor, "*eps"],
    *,
    sizes: tuple[int, ...] | None = None,
    kernel: Kernel = "rbf",
    lengthscale: Lengthscale = "median",
    space: Space = "nngp",
    jitter: float = 1e-6,
    noise: float = 0.0,
    base: Base = "nats",
) -> BiasCurve:
    """What data save: the bias that is still needed with the first n training points, for several n and eps.

    One factorisation serves all sizes, and one lengthscale, that of all training points. Shuffle the data first.

    Args:
        sizes: by default five, each twice the one before, up to all.
        others: see `kernel_inductive_bias`.

    Raises:
        ValueError: also where a size is not between 1 and the number of training points.
    """
    X, T, Y, y = as_tensors(x_train, y_train, x_test, y_test)
    target = check_eps(eps).reshape(-1)
    sizes = sizes or tuple(sorted({max(1, len(X) >> k) for k in range(5)}))
    for size in sizes:
        if not 1 <= size <= len(X):
            raise ValueError(f"sizes must lie between 1 and {len(X)}, got {size}")
    k, _ = kernel_function(kernel, lengthscale, space, X)
    solved = Posterior.of(k, X, T, jitter, noise)
    values = []
    for size in sizes:
        mean, cov, _ = solved.posterior(size, Y)
        values.append(-KernelHypotheses.of(mean, cov, y).log_cdf(target))
    return BiasCurve(tuple(sizes), target, torch.stack(values) / (math.log(2) if base == "bits" else 1.0), base)
