"""One input: susceptibilities, and the recursions of all order-1/n tensors as numbers a layer.

All Gaussian moments are one-dimensional. They are written without second derivatives (integrated by parts), so that
they hold for activations with kinks: `<s s''> = <z s s'>/K - <s'^2>`, `<s'' s'^2 s> = <z s s'^3>/(3K) - <s'^4>/3`,
`<z s' s''> = <s'^2 (z^2/K - 1)>/2`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.core.gaussian import Activation, ActivationLike, activation, line_expectation
from lathe.theory.deep_learning_theory.kernels import check_hyperparameters

__all__ = ["finite_width_single", "susceptibilities"]


class Moments:
    """Single-variable moments of an activation at kernel values `K`, each computed once."""

    def __init__(self, act: Activation, K: Tensor) -> None:
        self.K = K
        columns = {
            "ss": lambda z, s, d: s * s,
            "dd": lambda z, s, d: d * d,
            "ssss": lambda z, s, d: s**4,
            "ssdd": lambda z, s, d: (s * d) ** 2,
            "dddd": lambda z, s, d: d**4,
            "zsd": lambda z, s, d: z * s * d,
            "zsddd": lambda z, s, d: z * s * d**3,
            "ddzz": lambda z, s, d: (d * z) ** 2,
        }

        def all_at_once(z: Tensor) -> Tensor:
            s, d = act(z), act.derivative(z)
            return torch.stack([column(z, s, d) for column in columns.values()])

        values = line_expectation(all_at_once, K, act.kinks)
        self._values = dict(zip(columns, values))

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name]


def susceptibilities(
    K: Float[Tensor, "*batch"], act: ActivationLike, C_b: float, C_W: float
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """`(chi_par, chi_perp, h)` at kernel values `K > 0`: how differences between nearby inputs grow in one layer.

    `chi_par = C_W <z s s'>/K` multiplies a difference in norm, `chi_perp = C_W <s'^2>` the distance across, and
    `h = C_W <s'^2 (z^2 - K)>/(4 K^2)` is half of `chi_perp`'s derivative. `C_b` does not enter; it is checked.

    Raises:
        ValueError: for `C_b < 0`, `C_W <= 0` or a `K` that is not positive.
    """
    check_hyperparameters(C_b, C_W)
    if not (K > 0).all():
        raise ValueError(f"K must be positive, got {K.min().item():g}")
    m = Moments(activation(act), K)
    return C_W * m["zsd"] / K, C_W * m["dd"], C_W * (m["ddzz"] - K * m["dd"]) / (4 * K * K)


def finite_width_single(
    K1: Float[Tensor, "*batch"],
    widths: Sequence[int],
    act: ActivationLike,
    C_b: float,
    C_W: float,
    lambda_b: float = 1.0,
    lambda_W: float = 1.0,
    *,
    theta1: Float[Tensor, "*batch"] | None = None,
) -> dict[str, Float[Tensor, layers * batch]]:
    """K, Theta and the tensors V, D, F, A, B, P, Q at order 1/n for single inputs, at every layer.

    Args:
        K1: the first layer's kernel, `C_b + C_W |x|^2 / n_0`, for each of a batch of inputs.
        widths: `n_0 .. n_L`; the tensors of layer `l` are per `1 / n_{l-1}`.
        theta1: the first layer's NTK; by default `lambda_b + lambda_W (K1 - C_b) / C_W`.

    Raises:
        ValueError: for bad hyperparameters, widths below 1, or a `K1` that is not positive and finite.
    """
    check_hyperparameters(C_b, C_W)
    check_widths(widths)
    if not ((K1 > 0) & torch.isfinite(K1)).all():
        raise ValueError("K1 must be positive and finite")
    s = activation(act)
    K, theta = K1, lambda_b + lambda_W * (K1 - C_b) / C_W if theta1 is None else theta1
    V = D = F = A = B = P = Q = torch.zeros_like(K)
    rows = [(K, theta, V, D, F, A, B, P, Q)]
    for layer in range(1, len(widths) - 1):
        R = widths[layer] / widths[layer - 1]
        m = Moments(s, K)
        par, perp = C_W * m["zsd"] / K, C_W * m["dd"]
        # Moments of the NTK's one-layer increment om = lambda_W s^2 + C_W Theta s'^2.
        om = lambda_W * m["ss"] + C_W * theta * m["dd"]
        ss_om = lambda_W * m["ssss"] + C_W * theta * m["ssdd"]
        om_om = lambda_W**2 * m["ssss"] + 2 * lambda_W * C_W * theta * m["ssdd"] + (C_W * theta) ** 2 * m["dddd"]
        # d<s^2>/dK = <z s s'>/K and d<s'^2>/dK = <s'^2 (z^2 - K)>/(2 K^2), at fixed Theta.
        spread = (m["ddzz"] - K * m["dd"]) / (2 * K * K)
        om_K = lambda_W * m["zsd"] / K + C_W * theta * spread
        bent = m["zsddd"] / (3 * K) - m["dddd"] / 3  # <s'' s'^2 s>
        s_s2 = m["zsd"] / K - m["dd"]  # <s s''>
        u = K * spread  # <z s' s''>
        V, D, F, A, B, P, Q = (
            C_W**2 * (m["ssss"] - m["ss"] ** 2) + R * par**2 * V,
            C_W * (ss_om - m["ss"] * om) + R * (par * om_K * V + par * perp * D),
            C_W**2 * m["ssdd"] * theta + R * par**2 * F,
            om_om - om**2 + R * (om_K**2 * V + 2 * om_K * perp * D + perp**2 * A),
            C_W**2 * m["dddd"] * theta**2 + R * perp**2 * B,
            C_W**2 * bent * theta**2 + R * (C_W**2 * s_s2 * m["dd"] * B + perp * par * P),
            C_W**2 * bent * theta**2
            + lambda_W * C_W * m["ssdd"] * theta
            + R * ((lambda_W * C_W * m["zsd"] + C_W**2 * theta * u) * m["zsd"] / K**2 * F + perp * par * Q),
        )
        K, theta = C_b + C_W * m["ss"], lambda_b + lambda_W * m["ss"] + perp * theta
        rows.append((K, theta, V, D, F, A, B, P, Q))
    names = ("K", "Theta", "V", "D", "F", "A", "B", "P", "Q")
    return {name: torch.stack(values) for name, values in zip(names, zip(*rows))}


def check_widths(widths: Sequence[int]) -> None:
    if len(widths) < 2 or any(width < 1 for width in widths):
        raise ValueError(f"widths must be n_0 .. n_L, at least two, each at least 1, got {list(widths)}")
