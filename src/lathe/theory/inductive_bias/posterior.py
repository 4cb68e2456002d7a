"""Gaussian processes given training data: mean and covariance at the test points, for any kernel and any size."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.theory.kernels import Layer

__all__ = [
    "Kernel",
    "Lengthscale",
    "Posterior",
    "Space",
    "as_tensors",
    "iterated_posterior",
    "kernel_function",
    "one_hot",
]

Kernel: TypeAlias = Literal["rbf", "laplace"] | Layer | Callable[[Tensor, Tensor], Tensor]
Space: TypeAlias = Literal["nngp", "ntk", "trained"]
Lengthscale: TypeAlias = float | Float[Tensor, ""] | Literal["median"]
#: The matrix that is solved with and, for trained networks, the covariance of their start; of two sets, or of one.
Kernels: TypeAlias = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Posterior:
    """The kernel matrix of the training inputs, factorised, against the test inputs.

    Attributes:
        factor: Cholesky's lower triangle of the matrix that is solved with, `added` on its diagonal.
        half: `factor^{-1} k(X, T)`.
        prior: covariance at the test points before anything is fitted.
        added: jitter and noise.
        signals: for trained networks, covariances of their start: `(X, X)` and `(X, T)`.
    """

    factor: Tensor
    half: Tensor
    prior: Tensor
    added: float
    signals: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, k: Kernels, X: Tensor, T: Tensor, jitter: float, noise: float) -> Posterior:
        within, start = k(X, None)
        across, start_across = k(X, T)
        at_test, start_at_test = k(T, None)
        factor, added = cholesky(within, jitter, noise)
        signals = None if start is None or start_across is None else (start, start_across)
        half = torch.linalg.solve_triangular(factor, across, upper=False)
        return cls(factor, half, at_test if start_at_test is None else start_at_test, added, signals)

    def posterior(self, size: int, Y: Tensor) -> tuple[Tensor, Tensor, float]:
        """Mean and covariance at the test points after the first `size` training points, and the fit's residual.

        A leading block of a Cholesky factor is the factor of the leading block.
        """
        factor, half = self.factor[:size, :size], self.half[:size]
        solved = torch.linalg.solve_triangular(factor, Y[:size], upper=False)
        mean = half.T @ solved
        alpha = torch.linalg.solve_triangular(factor.T, solved, upper=True)
        if self.signals is None:
            cov = self.prior - half.T @ half
        else:
            start, across = self.signals[0][:size, :size], self.signals[1][:size]
            pulled = torch.linalg.solve_triangular(factor.T, half, upper=True)
            crossed = pulled.T @ across
            cov = self.prior + pulled.T @ start @ pulled - crossed - crossed.T
        return mean, (cov + cov.T) / 2, self.added * alpha.detach().abs().max().item()


def cholesky(matrix: Tensor, jitter: float, noise: float) -> tuple[Tensor, float]:
    size = matrix.detach().diagonal().mean().item()
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for attempt in range(4):
        added = jitter * 10**attempt * size + noise**2
        factor, failed = torch.linalg.cholesky_ex(matrix + added * eye)
        if not failed:
            return factor, added
    raise RuntimeError(
        f"the kernel matrix of x_train is not positive definite with {added:.1e} on its diagonal: drop repeated "
        "inputs, shorten the lengthscale, or raise jitter"
    )


def iterated_posterior(
    k: Kernels, X: Tensor, Y: Tensor, T: Tensor, jitter: float, noise: float, tolerance: float = 1e-9
) -> tuple[Tensor, Tensor, float, float]:
    """As `Posterior.posterior` (and what was added), by conjugate gradients; the kernel matrix is never held.

    Preconditioned by Nystroem's approximation from a thousand of the inputs.
    """
    n, block = len(X), max(1, 20_000_000 // len(X))
    size = torch.cat([k(x[None], None)[0].flatten() for x in X[:100]]).mean().item()
    added = jitter * size + noise**2
    across, at_test = k(X, T)[0], k(T, None)[0]
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(0))[: min(n // 2, 1000)].to(X.device)
    landmarks = X[chosen]
    root, _ = cholesky(k(landmarks, None)[0], 1e-9, 0.0)
    A = torch.linalg.solve_triangular(root, k(landmarks, X)[0], upper=False).T
    inner = torch.linalg.cholesky(A.T @ A + added * torch.eye(len(chosen), dtype=A.dtype, device=A.device))

    def apply(P: Tensor) -> Tensor:
        return torch.cat([k(X[i : i + block], X)[0] @ P for i in range(0, n, block)]) + added * P

    def precondition(R: Tensor) -> Tensor:
        return (R - A @ torch.cholesky_solve(A.T @ R, inner)) / added

    B = torch.cat([Y, across], 1)
    S, R = torch.zeros_like(B), B
    Z = precondition(R)
    P, old = Z, (R * Z).sum(0)
    for _ in range(10 * n):
        Q = apply(P)
        rate = old / (P * Q).sum(0).clamp_min(1e-300)
        S, R = S + rate * P, R - rate * Q
        if bool((R.norm(dim=0) <= tolerance * B.norm(dim=0)).all()):
            break
        Z = precondition(R)
        new = (R * Z).sum(0)
        P, old = Z + (new / old.clamp_min(1e-300)) * P, new
    else:
        raise RuntimeError(f"conjugate gradients did not converge with {added:.1e} on the diagonal: raise jitter")
    alpha, pulled = S[:, : Y.shape[1]], S[:, Y.shape[1] :]
    cov = at_test - across.T @ pulled
    return across.T @ alpha, (cov + cov.T) / 2, added * alpha.abs().max().item(), added


def kernel_function(kernel: Kernel, lengthscale: Lengthscale, space: Space, X: Tensor) -> tuple[Kernels, float | None]:
    """The matrix that is solved with and, for trained networks, the covariance at their start; the lengthscale."""
    if space not in ("nngp", "ntk", "trained"):
        raise ValueError(f"space must be 'nngp', 'ntk' or 'trained', got {space!r}")
    if isinstance(kernel, Layer):
        wanted = ("ntk", "nngp") if space == "trained" else (space,)

        def of_network(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
            found = kernel(a, b, wanted)
            return getattr(found, wanted[0]), found.nngp if space == "trained" else None

        return of_network, None
    if space != "nngp":
        raise ValueError(f"space={space!r} needs a network of lathe.theory.kernels as kernel, got {kernel!r}")
    if callable(kernel):
        return lambda a, b: (kernel(a, a if b is None else b).double(), None), None
    if kernel not in ("rbf", "laplace"):
        raise ValueError(
            f"kernel must be 'rbf', 'laplace', a network of lathe.theory.kernels or a function, got {kernel!r}"
        )
    scale: float | Tensor
    if isinstance(lengthscale, str):
        if lengthscale != "median":
            raise ValueError(f"lengthscale must be a number or 'median', got {lengthscale!r}")
        scale = _median_distance(X)
    else:
        scale = lengthscale
    number = float(torch.as_tensor(scale).detach())
    if not number > 0:
        raise ValueError(f"lengthscale must be positive, got {number:g}")
    middle = X.flatten(1).mean(0)

    def of_distance(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a = a.flatten(1) - middle
        b = a if b is None else b.flatten(1) - middle
        # |a|^2 + |b|^2 - 2 a.b: the differences themselves would take (n, m, features) numbers.
        square = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)
        if kernel == "rbf":
            return torch.exp(-square / (2 * scale**2)), None
        return torch.exp(-square.sqrt() / scale), None

    return of_distance, number


def _median_distance(X: Tensor) -> float:
    flat = X.flatten(1)
    if len(flat) < 2:
        raise ValueError("lengthscale='median' needs at least two training inputs, got one")
    # Two thousand inputs give the median to a percent.
    flat = flat[:: max(1, len(flat) // 2000)][:2000]
    median = torch.pdist(flat).median().item()
    if median == 0:
        raise ValueError("lengthscale='median' is zero: more than half of the pairs of x_train are the same")
    return median


def as_tensors(
    x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and targets in float64, checked; labels as one-hot."""
    for name, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) == 0 or len(x) != len(y):
            raise ValueError(f"x_{name} and y_{name} must be as many, and not none, got {len(x)} and {len(y)}")
        for letter, value in (("x", x), ("y", y)):
            if value.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(f"{letter}_{name} must be float32 or float64, got {value.dtype}")
            if not bool(value.isfinite().all()):
                raise ValueError(f"{letter}_{name} must be finite")
    if x_train.shape[1:] != x_test.shape[1:] or x_train.ndim < 2:
        raise ValueError(
            f"x_train and x_test must have the same features, got {tuple(x_train.shape)} and {tuple(x_test.shape)}"
        )
    seen = {row.tobytes() for row in x_train.detach().double().cpu().flatten(1).numpy()}
    again = sum(row.tobytes() in seen for row in x_test.detach().double().cpu().flatten(1).numpy())
    if again:
        warnings.warn(f"{again} of the test points are among the training points: their loss is known", stacklevel=4)
    Y, y = one_hot(y_train, y_test)
    return x_train.double(), x_test.double(), Y.to(x_train.device), y.to(x_train.device)


def one_hot(y_train: Tensor, y_test: Tensor) -> tuple[Float[Tensor, "train outputs"], Float[Tensor, "test outputs"]]:
    """Targets in float64, `(n, outputs)`: labels made one-hot over the classes of both."""
    if y_train.is_floating_point() != y_test.is_floating_point() or y_train.shape[1:] != y_test.shape[1:]:
        raise ValueError(
            f"y_train and y_test must be of one kind, got {y_train.dtype} {tuple(y_train.shape)} and "
            f"{y_test.dtype} {tuple(y_test.shape)}"
        )
    if y_train.is_floating_point():
        return y_train.double().reshape(len(y_train), -1), y_test.double().reshape(len(y_test), -1)
    if y_train.ndim != 1 or min(y_train.min(), y_test.min()) < 0:
        raise ValueError("y_train and y_test must be vectors of labels 0, 1, ..., or real targets")
    classes = int(max(y_train.max(), y_test.max())) + 1
    return tuple(torch.nn.functional.one_hot(y.long(), classes).double() for y in (y_train, y_test))  # type: ignore[return-value]
