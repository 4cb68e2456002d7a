"""Probabilities of sums of squares of Gaussians, in log space, as deep in the lower tail as one likes.

`sum_j l_j (z_j + b_j / sqrt(l_j))^2` has the cumulant generating function
`K(t) = sum_j -df_j/2 log(1 - 2 t l_j) + t b_j^2 / (1 - 2 t l_j)`, from which Laplace inversion gives the law:

    F(x) = 1/(2 pi i) int exp(s x + K(-s)) / s ds

Exactly: trapezoidal sums along a hyperbola through the saddle point of the integrand, bent as steepest descent is
there; they converge geometrically, whatever the degrees of freedom and however small `F`. Quickly: the saddle point
alone (Barndorff-Nielsen 1986, r*). Everything is in float64, batched and differentiable.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["beta_log_cdf", "ncx2_log_cdf", "ncx2_log_prob", "weighted_chi2_cumulants", "weighted_chi2_log_cdf"]

#: First step of the trapezoidal sum, in widths of the integrand at its saddle point; nodes at a time, and at most.
_STEP, _NODES, _MOST_NODES = 0.3, 32, 2048
#: Widths after which the nodes part.
_SOON = 4.0
#: Numbers (thresholds x nodes x terms) that one evaluation holds.
_CHUNK = 4_000_000
Law = tuple[Tensor, Tensor, Tensor]


def weighted_chi2_log_cdf(
    eps: float | Float[Tensor, "*eps"],
    weights: Float[Tensor, " terms"],
    shifts2: Float[Tensor, " terms"],
    *,
    df: float | Float[Tensor, "#terms"] = 1.0,
    method: Literal["exact", "saddlepoint"] = "exact",
) -> Float[Tensor, "*eps"]:
    """`log P(sum_j Q_j <= eps)`, `Q_j` being `weights_j` times chi-squared of `df_j` degrees, shifted.

    With `df = 1`, `Q_j = (sqrt(weights_j) z_j + b_j)^2` for standard normal `z_j` and `shifts2_j = b_j^2`. Terms of
    equal weight may be given as one: their `df` and `shifts2` add up.

    Args:
        eps: thresholds; -inf is returned at and below the floor, the sum of `shifts2` where `weights` is 0.
        weights: not negative.
        shifts2: not negative.
        df: degrees of freedom of each term, any non-negative numbers.
        method: "exact" (to about 1e-11 nats) or "saddlepoint" (a tenth of the time; within 1e-3 nats where many terms
            count, within 2% where one does).

    Raises:
        ValueError: where an argument is negative or not finite, or no weight is positive.
    """
    x = _double(eps, weights.device)
    law = _law(weights, df, shifts2)
    if method not in ("exact", "saddlepoint"):
        raise ValueError(f"method must be 'exact' or 'saddlepoint', got {method!r}")
    floor = law[2].masked_fill(law[0] > 0, 0.0).sum(-1)
    inside = law[0] > 0
    if not bool(inside.all()):
        law = (law[0][inside], law[1][inside], law[2][inside])
    above = x > floor
    x = torch.where(above, x - floor, 1.0)
    found = log_integral(x, law) if method == "exact" else _saddlepoint_log_cdf(x, law)
    return torch.where(above, found.clamp_max(0.0), -math.inf)


def weighted_chi2_cumulants(
    weights: Float[Tensor, " terms"],
    shifts2: Float[Tensor, " terms"],
    *,
    df: float | Float[Tensor, "#terms"] = 1.0,
    order: int = 4,
) -> Float[Tensor, " order"]:
    """The first cumulants of the sum: `kappa_k = 2^(k-1) (k-1)! sum_j l_j^(k-1) (df_j l_j + k b_j^2)`."""
    l, df, b2 = _law(weights, df, shifts2)
    return torch.stack(
        [2 ** (k - 1) * math.factorial(k - 1) * (l ** (k - 1) * (df * l + k * b2)).sum() for k in range(1, order + 1)]
    )


def ncx2_log_cdf(
    x: float | Float[Tensor, "*x"], df: float | Float[Tensor, "*df"], nc: float | Float[Tensor, "*nc"]
) -> Float[Tensor, "*batch"]:
    """`log F(x; df, nc)` of the non-central chi-squared law, to about 1e-11 nats and as far down as 1e5 nats.

    Args:
        x: thresholds; -inf is returned where they are not positive. All three broadcast.
        df: degrees of freedom, any positive number.
        nc: non-centrality, not negative; 0 is the central law.

    Raises:
        ValueError: where `df` is not positive, or `nc` negative, or either not finite.
    """
    return _ncx2(x, df, nc, density=False)


def ncx2_log_prob(
    x: float | Float[Tensor, "*x"], df: float | Float[Tensor, "*df"], nc: float | Float[Tensor, "*nc"]
) -> Float[Tensor, "*batch"]:
    """Log-density of the non-central chi-squared law; arguments as for `ncx2_log_cdf`."""
    return _ncx2(x, df, nc, density=True)


def _ncx2(x: float | Tensor, df: float | Tensor, nc: float | Tensor, density: bool) -> Tensor:
    device = next((a.device for a in (x, df, nc) if isinstance(a, Tensor)), torch.device("cpu"))
    at, freedom, shift = torch.broadcast_tensors(*(_double(a, device) for a in (x, df, nc)))
    _require("df", freedom, freedom > 0, "positive")
    _require("nc", shift, shift >= 0, "0 or more")
    law = (torch.ones_like(freedom)[..., None], freedom[..., None], shift[..., None])
    inside = (at > 0) & (at < math.inf)
    found = log_integral(torch.where(inside, at, 1.0), law, density=density)
    beyond = torch.where(at > 0, -math.inf if density else 0.0, -math.inf)
    return torch.where(inside, found if density else found.clamp_max(0.0), beyond)


def beta_log_cdf(
    x: Float[Tensor, "*x"], a: float | Float[Tensor, ""], b: float | Float[Tensor, ""]
) -> Float[Tensor, "*x"]:
    """`log I_x(a, b)`, the regularised incomplete beta function, in log space; differentiable in all three.

    The series of positive terms `x^a (1-x)^b / (a B(a, b)) sum_n (a+b)_n / (a+1)_n x^n` below the mean, and the
    complement above it.
    """
    x, a, b = _double(x), _double(a), _double(b)
    _require("a", a, a > 0, "positive")
    _require("b", b, b > 0, "positive")
    below = x <= a / (a + b)

    def series(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        worst = float(x.detach().max())
        terms = int(50 + 12 * math.sqrt(float((a + b).detach())) + 40 / max(1 - worst, 1e-3))
        n = torch.arange(terms, dtype=x.dtype, device=x.device)
        steps = torch.lgamma(a + b + n) - torch.lgamma(a + b) - torch.lgamma(a + 1 + n) + torch.lgamma(a + 1)
        total = torch.logsumexp(steps + n * x[..., None].log(), -1)
        front = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b) - a.log()
        return front + a * x.log() + b * torch.log1p(-x) + total

    low = series(torch.where(below & (x > 0), x, 0.5 * a / (a + b)), a, b)
    high = torch.log1p(-series(torch.where(~below & (x < 1), 1 - x, 0.5 * b / (a + b)), b, a).exp())
    found = torch.where(below, low, high)
    return torch.where(x <= 0, -math.inf, torch.where(x >= 1, 0.0, found))


def log_integral(
    x: Float[Tensor, "*batch"],
    law: Law,
    *,
    density: bool = False,
    coupling: Float[Tensor, "terms terms"] | None = None,
) -> Float[Tensor, "*batch"]:
    """`log F(x)`, or the log-density, by inversion along a bent contour.

    Args:
        x: positive.
        law: weights, degrees of freedom and shifts squared, of shape `(terms,)` or `(*batch, terms)`; weights positive.
        density: the log-density instead of the log-probability.
        coupling: terms' covariances that are zero in value and not in gradient, `sum_c b_ic b_jc M_ij` off the
            diagonal: `2 s^2 q' coupling q` joins the exponent, which makes the gradient that of the eigenvalues'
            matrix even where eigenvalues coincide.
    """
    shape, shared = x.shape, law[0].ndim == 1
    x = x.flatten()
    if not shared:
        law = tuple(part.flatten(0, -2) for part in law)  # type: ignore[assignment]
    size = max(1, _CHUNK // (law[0].shape[-1] * _NODES))
    found = torch.empty_like(x)
    above = torch.zeros_like(x, dtype=torch.bool) if density else x > _mean(law)
    for pole, side in ((-1, above), (0 if density else 1, ~above)):
        for some in side.nonzero()[:, 0].split(size):
            part = law if shared else tuple(p[some] for p in law)
            value = _log_integral(x[some], part, pole, coupling)  # type: ignore[arg-type]
            # Above the mean the path passes the pole on its other side, and gives the complement.
            found = found.index_put((some,), torch.log1p(-value.exp()) if pole < 0 else value)
    return found.reshape(shape)


def _log_integral(x: Tensor, law: Law, pole: int, coupling: Tensor | None) -> Tensor:
    """x (batch,), each part of the law (terms,) or (batch, terms); pole: 1 below the mean, -1 above it, 0 for
    densities."""
    path = _contour(x, law, pole)
    block = max(4, min(_NODES, _CHUNK // max(1, len(x) * law[0].shape[-1])))
    step = _STEP
    for _ in range(5):
        blocks: list[Tensor] = []
        while len(blocks) * block < _MOST_NODES:
            node = torch.arange(len(blocks) * block, (len(blocks) + 1) * block, dtype=x.dtype, device=x.device)
            blocks.append(_integrand(x, law, path, node * step, pole, coupling)[0])
            with torch.no_grad():
                total = torch.stack([part.sum(1) for part in blocks]).sum(0)
                if bool((blocks[-1][:, -2:].abs().amax(1) <= 1e-16 * total).all()):
                    break
        value = torch.cat(blocks, 1)
        with torch.no_grad():
            # The sum's error is squared when its step is halved: 1e-7 of twice the step is 1e-14 of this one.
            gap = value[:, 1::2].sum(1) - value[:, ::2].sum(1)
            if bool((gap.abs() <= 1e-7 * total).all()):
                break
        step /= 2
    return _exponent(x, law, path[0], pole) + torch.log(value.sum(1) * (step / math.pi))


def log_prob_and_scores(x: Float[Tensor, " batch"], df: float, nc: float) -> tuple[Tensor, Tensor]:
    """`log f(x; df, nc)` of the non-central chi-squared law, and its derivatives by `x`, `df`, `nc`, (3, batch)."""
    law = (torch.ones_like(x[:, None]), torch.full_like(x[:, None], df), torch.full_like(x[:, None], nc))
    path = _contour(x, law, 0)
    real, imaginary, along = _integrand(x, law, path, torch.arange(48, dtype=x.dtype, device=x.device) * _STEP, 0, None)
    total = real.sum(1)
    through, turned = 1 + 2 * along, torch.complex(real, imaginary)
    scores = [(turned * part).real.sum(1) / total for part in (along, -0.5 * through.log(), -along / through)]
    return _exponent(x, law, path[0], 0) + torch.log(total * (_STEP / math.pi)), torch.stack(scores)


def _exponent(x: Tensor, law: Law, s: Tensor, pole: int) -> Tensor:
    """`s x + K(-s)`, less `log |s|` where there is a pole; s (batch,)."""
    l, df, b2 = law
    through = 1 + 2 * s[:, None] * l
    value = s * x - (0.5 * df * through.log() + s[:, None] * b2 / through).sum(-1)
    return value - s.abs().log() if pole else value


def _integrand(
    x: Tensor, law: Law, path: tuple[Tensor, Tensor, Tensor], node: Tensor, pole: int, coupling: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Real and imaginary part of the integrand by `node`, over its value at `s`, and the points; each (batch, nodes).

    The path is the hyperbola `s + i u - g(u)` that bends as steepest descent does at `s` and ends at 45 degrees: along
    it no term grows faster than `exp(-x g)` falls. `u` grows as sinh of the node, so that the ends are soon reached. In
    real arithmetic, several times faster than in complex. The node at `s` counts half.
    """
    s, bend, width = path
    u, speed = _SOON * torch.sinh(node / _SOON) * width[:, None], torch.cosh(node / _SOON) * width[:, None]
    root = (1 + (2 * bend[:, None] * u) ** 2).sqrt()
    # (root - 1) / (2 bend), without the cancellation where it hardly bends.
    back, slope = 2 * bend[:, None] * u * u / (1 + root), 2 * bend[:, None] * u / root
    l, df, b2 = (part.expand(len(x), -1) for part in law)
    q = 1 / (1 + 2 * s[:, None] * l)
    p, c = 2 * l * q, b2 * q * q
    size = u * u + back * back
    # 1 + p delta, delta = i u - g: how far a term's branch point is, as seen from the node over seen from s.
    real = 1 - back[..., None] * p[:, None]
    imaginary = u[..., None] * p[:, None]
    square = real * real + imaginary * imaginary
    magnitude = -0.25 * (square.log() @ df[..., None])[..., 0] - x[:, None] * back
    phase = -0.5 * (torch.atan2(imaginary, real) @ df[..., None])[..., 0] + x[:, None] * u
    pulled, pushed = (square.reciprocal() @ torch.stack([c, c * p], -1)).unbind(-1)
    magnitude = magnitude + back * pulled - size * pushed
    phase = phase - u * pulled
    if pole:
        over = torch.complex(1 - back / s[:, None], u / s[:, None])
        magnitude, phase = magnitude - over.abs().log(), phase - over.angle()
    if coupling is not None:
        at = q[:, None] / torch.complex(real, imaginary)
        extra = 2 * torch.complex(s[:, None] - back, u) ** 2 * ((at @ coupling.to(at)) * at).sum(-1)
        magnitude, phase = magnitude + extra.real, phase + extra.imag
    height = magnitude.exp()
    cosine, sine = height * phase.cos(), height * phase.sin()
    counted = torch.where(node > 0, speed, 0.5 * speed)
    return (cosine - slope * sine) * counted, (sine + slope * cosine) * counted, torch.complex(s[:, None] - back, u)


@torch.no_grad()
def _contour(x: Tensor, law: Law, pole: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the path crosses the real axis, how it bends there, and the integrand's width; all (batch,)."""
    s = _saddle(x, law, max(pole, 0))
    if pole < 0:
        # Between the first branch point and the pole: near the saddle point of both, which a quadratic gives.
        second = _derivatives(s, law, 0)[1]
        lowest = -0.5 / law[0].amax(-1)
        s = torch.maximum((s - (s * s + 4 / second).sqrt()) / 2, (lowest + s) / 2)
    second = _derivatives(s, law, 0)[1]
    # The pole counts for the width only: bent by it as well, the path would leave the valley of many terms.
    return s, _third(s, law) / (6 * second), (second + (1 / s**2 if pole else 0)).rsqrt()


@torch.no_grad()
def _saddle(x: Tensor, law: Law, pole: int) -> Tensor:
    """The `s` where `K'(-s) + pole / s = x`; bracketed Newton steps on the logarithms of both sides."""
    # Without the pole at 0 the integrand is analytic down to the first branch point.
    lowest = torch.zeros_like(x) if pole else (-0.5 / law[0].amax(-1)).expand_as(x)
    target = x.log()
    # Where a gamma law of the same mean and variance has it, in the lower tail.
    mean, variance = _derivatives(torch.zeros_like(x), law, 0)
    at = torch.maximum((mean / x - 1) * mean / variance, 1 / x).log()
    low, high = torch.full_like(x, -math.inf), torch.full_like(x, math.inf)
    for _ in range(200):
        e = at.exp()
        first, second = _derivatives(lowest + e, law, pole)
        gap = first.log() - target
        low, high = torch.where(gap > 0, at, low), torch.where(gap > 0, high, at)
        proposed = at + (gap * first / (second * e)).clamp(-4, 4)
        proposed = torch.where((proposed >= low) & (proposed <= high), proposed, (low + high) / 2)
        done = bool(((proposed - at).abs() <= 1e-9).all())
        at = proposed
        if done:
            break
    return lowest + at.exp()


def _mean(law: Law) -> Tensor:
    return (law[0] * law[1] + law[2]).sum(-1)


def _derivatives(s: Tensor, law: Law, pole: int) -> tuple[Tensor, Tensor]:
    """`K'` and `K''` at `t = -s`, each with the part of `-log s` (times `pole`), both positive; s (batch,)."""
    l, df, b2 = law
    q = ((2 * s)[:, None] * l).add_(1).reciprocal_()
    y, q2 = l * q, q * q
    first = _weighed(y, df) + _weighed(q2, b2)
    second = 2 * _weighed(y * y, df) + 4 * _weighed(y * q2, b2)
    return (first + 1 / s, second + 1 / s**2) if pole else (first, second)


def _weighed(values: Tensor, weights: Tensor) -> Tensor:
    """Sums over terms, (batch, terms) -> (batch,); a product with a vector makes no copy."""
    return values @ weights if weights.ndim == 1 else (values * weights).sum(-1)


def _third(s: Tensor, law: Law) -> Tensor:
    """The third derivative of `K` at `t = -s`."""
    l, df, b2 = law
    q = 1 / (1 + 2 * s[:, None] * l)
    y = l * q
    return (y * y * (8 * df * y + 24 * b2 * q * q)).sum(-1)


def _saddlepoint_log_cdf(x: Tensor, law: Law) -> Tensor:
    """`log Phi(r*)`, `r* = w + log(u / w) / w`, where `K'(t) = x`, `w^2 / 2 = t x - K(t)`, `u = t sqrt(K''(t))`."""
    shape, x = x.shape, x.flatten()
    s = _saddle(x, law, 0)
    # One Newton step with gradients gives the saddle point's own.
    first, second = _derivatives(s, law, 0)
    s = s + (first - x) / second
    second = _derivatives(s, law, 0)[1]
    rate = -_exponent(x, law, s, 0)
    # At the mean both w and u vanish, and what they say with them: r* -> K''' / (6 K''^(3/2)).
    central = (s * second.sqrt()).abs() < 1e-3
    w = -torch.sign(s) * torch.where(central, 1.0, 2 * rate).clamp_min(1e-300).sqrt()
    u = torch.where(central, 1.0, -s * second.sqrt())
    far = w + torch.log((u / w).clamp_min(1e-300)) / w
    near = -s * second.sqrt() + _third(s, law) / (6 * second**1.5)
    return torch.special.log_ndtr(torch.where(central, near, far)).reshape(shape)


def _law(weights: Tensor, df: float | Tensor, shifts2: Tensor) -> Law:
    l, b2 = _double(weights), _double(shifts2)
    f = _double(df, l.device).expand_as(l)
    for name, value in (("weights", l), ("shifts2", b2), ("df", f)):
        _require(name, value, value >= 0, "0 or more")
    if not bool((l > 0).any()):
        raise ValueError("weights must have a positive one, or nothing is random")
    return l, f, b2


def _double(value: float | Tensor, device: torch.device | None = None) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=value.device if isinstance(value, Tensor) else device)


def _require(name: str, value: Tensor, condition: Tensor, expected: str) -> None:
    if not bool((condition & value.isfinite()).all()):
        worst = value[~(condition & value.isfinite())].flatten()[0].item()
        raise ValueError(f"{name} must be {expected} and finite, got {worst:g}")
