"""Laws of the loss of random hypotheses, fitted to a sample of losses: scaled non-central chi-squared, and beta.

Losses are modelled as `floor + scale * chi'^2_df(nc)`, which has cumulants

    kappa_1 = scale (df + nc),   kappa_2 = 2 scale^2 (df + 2 nc),   kappa_3 = 8 scale^3 (df + 3 nc)

Boopathy et al. 2024, section 4, fit it by maximum likelihood. That is done here by Fisher scoring on the mean, the
variance and `nc / (df + nc)`, on which the law depends almost independently.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lathe.theory.inductive_bias.laws import beta_log_cdf, log_prob_and_scores, ncx2_log_cdf, ncx2_log_prob

__all__ = ["Beta", "FittedLaw", "ScaledChi2", "check_losses", "fit_losses", "match_cumulants"]

Fit: TypeAlias = Literal["mle", "cumulants"]
#: Chebyshev nodes at which a likelihood is computed for any number of losses; it is smooth in the loss's logarithm.
_NODES = 48


@dataclass(frozen=True)
class ScaledChi2:
    """`floor + scale * chi'^2_df(nc)`.

    Attributes:
        df, nc: degrees of freedom and non-centrality.
        scale, floor: in units of the loss.
    """

    df: float
    nc: float
    scale: float
    floor: float = 0.0

    @property
    def mean(self) -> float:
        return self.floor + self.scale * (self.df + self.nc)

    @property
    def variance(self) -> float:
        return 2 * self.scale**2 * (self.df + 2 * self.nc)

    def log_cdf(self, eps: float | Float[Tensor, "*eps"]) -> Float[Tensor, "*eps"]:
        """`log P(loss <= eps)`."""
        x = torch.as_tensor(eps, dtype=torch.float64)
        return ncx2_log_cdf((x - self.floor) / self.scale, self.df, self.nc)

    def log_prob(self, losses: float | Float[Tensor, "*losses"]) -> Float[Tensor, "*losses"]:
        """Log-density at these losses."""
        x = torch.as_tensor(losses, dtype=torch.float64)
        return ncx2_log_prob((x - self.floor) / self.scale, self.df, self.nc) - math.log(self.scale)

    def sample(self, count: int, *, seed: int = 0) -> Float[Tensor, " count"]:
        """Losses drawn from the law."""
        drawn = np.random.default_rng(seed).noncentral_chisquare(self.df, self.nc, count)
        return self.floor + self.scale * torch.from_numpy(drawn)


@dataclass(frozen=True)
class Beta:
    """The beta law of a share of errors, with parameters `a` and `b`."""

    a: float
    b: float

    @property
    def mean(self) -> float:
        return self.a / (self.a + self.b)

    @property
    def variance(self) -> float:
        return self.mean * (1 - self.mean) / (self.a + self.b + 1)

    def log_cdf(self, eps: float | Float[Tensor, "*eps"]) -> Float[Tensor, "*eps"]:
        """`log P(loss <= eps)`."""
        return beta_log_cdf(torch.as_tensor(eps, dtype=torch.float64), self.a, self.b)

    def sample(self, count: int, *, seed: int = 0) -> Float[Tensor, " count"]:
        """Shares drawn from the law."""
        return torch.from_numpy(np.random.default_rng(seed).beta(self.a, self.b, count))


@dataclass(frozen=True)
class FittedLaw:
    """A law with what its parameters owe to chance.

    Attributes:
        law: the fitted law.
        fit: how: "mle", "cumulants" (three), "two moments" or, for the beta law, "moments".
        estimates: what was estimated: `(log mean, log variance, nc / (df + nc))` for "mle", else cumulants.
        covariance: of `estimates`, by the inverse Fisher information or the sample covariance of cumulants.
    """

    law: ScaledChi2 | Beta
    fit: str
    estimates: Float[Tensor, " estimates"]
    covariance: Float[Tensor, "estimates estimates"]

    def log_cdf_and_sd(self, eps: Float[Tensor, " eps"]) -> tuple[Float[Tensor, " eps"], Float[Tensor, " eps"]]:
        """`log P(loss <= eps)` and its standard deviation by the delta method."""
        floor = self.law.floor if isinstance(self.law, ScaledChi2) else 0.0

        def log_cdf(estimates: Tensor) -> Tensor:
            first, second, *rest = _PARAMETERS[self.fit](estimates)
            if self.fit == "moments":
                return beta_log_cdf(eps, first, second)
            return ncx2_log_cdf((eps - floor) / rest[0], first, second)

        value = log_cdf(self.estimates)
        # Backwards, one threshold at a time: the contour of each is its own.
        gradient = torch.autograd.functional.jacobian(log_cdf, self.estimates)
        variance = torch.einsum("ei,ij,ej->e", gradient, self.covariance, gradient)
        return value, variance.clamp_min(0).sqrt().masked_fill(value.isinf(), 0.0)


def match_cumulants(
    kappa1: float, kappa2: float, kappa3: float | None = None, *, floor: float = 0.0
) -> tuple[ScaledChi2, str]:
    """The law with these cumulants, and "cumulants"; or, where no such law exists, of the first two, "two moments".

    Three cumulants can be met where `3/2 <= kappa_1 kappa_3 / kappa_2^2 <= 2` (with `kappa_1` counted from the floor).
    Where `kappa3` is left out, the central law (`nc = 0`) that has the first two is returned.

    Raises:
        ValueError: where `kappa1` is not above the floor, or `kappa2` not positive.
    """
    above = kappa1 - floor
    if not (above > 0 and kappa2 > 0):
        raise ValueError(f"kappa1 must be above the floor and kappa2 positive, got {kappa1}, {floor} and {kappa2}")
    if kappa3 is not None:
        discriminant = kappa2**2 - above * kappa3 / 2
        # On the edge, where the non-centrality vanishes, rounding decides on which side it lies.
        if discriminant >= -1e-12 * kappa2**2:
            for sign in (1, -1):
                scale = (kappa2 + sign * math.sqrt(max(discriminant, 0.0))) / (2 * above)
                nc = kappa2 / (2 * scale**2) - above / scale
                df = above / scale - nc
                if df > 0 and nc >= -1e-9 * df:
                    return ScaledChi2(df, max(nc, 0.0), scale, floor), "cumulants"
    scale = kappa2 / (2 * above)
    return ScaledChi2(above / scale, 0.0, scale, floor), "two moments"


def fit_losses(
    losses: Float[Tensor, " samples"],
    *,
    tail: Literal["ncx2", "chi2", "beta"] = "ncx2",
    fit: Fit = "mle",
    floor: float = 0.0,
) -> FittedLaw:
    """Fits a law to sampled losses.

    Args:
        losses: one a hypothesis.
        tail: "ncx2"; "chi2", the central law; "beta" for shares of errors (our extension).
        fit: "mle", or "cumulants", which matches three (two for "chi2") and falls back on two. The beta law is always
            matched in mean and variance.
        floor: a loss that no hypothesis can go below.

    Raises:
        ValueError: for fewer than 20 losses, losses that are not finite, at or below the floor, or all the same; for
            "beta" outside of 0 to 1.
    """
    if tail not in ("ncx2", "chi2", "beta"):
        raise ValueError(f"tail must be 'ncx2', 'chi2' or 'beta', got {tail!r}")
    if fit not in ("mle", "cumulants"):
        raise ValueError(f"fit must be 'mle' or 'cumulants', got {fit!r}")
    e = check_losses(losses) - floor
    size = len(e)
    if tail == "beta":
        mean, variance = e.mean().item(), e.var().item()
        if e.max() > 1 or variance >= mean * (1 - mean):
            raise ValueError(f"losses must be shares in 0 to 1 for the beta law, with largest {e.max():g}")
        estimates = torch.tensor([mean, variance], dtype=torch.float64)
        a, b = _PARAMETERS["moments"](estimates)
        return FittedLaw(Beta(a.item(), b.item()), "moments", estimates, _cumulant_covariance(e, 2) / size)
    if e.min() <= 0:
        raise ValueError(f"losses must be above the floor {floor:g}, got {e.min() + floor:g}")
    kappa = _cumulants(e)
    law, name = match_cumulants(kappa[0], kappa[1], kappa[2] if tail == "ncx2" else None)
    if fit == "mle":
        try:
            theta, covariance = _maximum_likelihood(e, law, free=tail == "ncx2")
        except torch.linalg.LinAlgError:
            pass  # the likelihood does not tell the parameters apart: the cumulants do
        else:
            df, nc, scale = (value.item() for value in _PARAMETERS["mle"](theta))
            return FittedLaw(ScaledChi2(df, nc, scale, floor), "mle", theta, covariance)
    count = 3 if name == "cumulants" else 2
    estimates = torch.tensor(kappa[:count], dtype=torch.float64)
    law = ScaledChi2(law.df, law.nc, law.scale, floor)
    return FittedLaw(law, name, estimates, _cumulant_covariance(e, count) / size)


def check_losses(losses: Tensor) -> Tensor:
    """The losses in float64, if a law can be fitted to them; see `fit_losses` for what raises."""
    if losses.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"losses must be float32 or float64, got {losses.dtype}: a tail needs more digits")
    if losses.ndim != 1 or len(losses) < 20:
        raise ValueError(f"losses must be a vector of at least 20, got shape {tuple(losses.shape)}")
    e = losses.detach().double().cpu()
    if not e.isfinite().all() or (e < 0).any():
        raise ValueError("losses must be finite and not negative: drop hypotheses that diverged, and say how many")
    if (e.max() - e.min()) <= 1e-12 * e.max():
        raise ValueError(f"losses must differ from each other, got {len(e)} times {e[0]:g}")
    return e


def _cumulants(e: Tensor) -> tuple[float, float, float]:
    """Unbiased (k-statistics)."""
    n, centred = len(e), e - e.mean()
    second = centred.square().sum() / (n - 1)
    third = centred.pow(3).sum() * n / ((n - 1) * (n - 2))
    return e.mean().item(), second.item(), third.item()


def _cumulant_covariance(e: Tensor, count: int) -> Tensor:
    """Covariance of what one loss adds to each sample cumulant (influence functions)."""
    centred = e - e.mean()
    second, third = centred.square().mean(), centred.pow(3).mean()
    influence = torch.stack([centred, centred**2 - second, centred**3 - 3 * second * centred - third])[:count]
    return influence @ influence.T / len(e)


def _of_means(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance, share = theta[0].exp(), theta[1].exp(), theta[2]
    scale = variance / (2 * mean * (1 + share))
    total = mean / scale
    return total * (1 - share), total * share, scale


def _of_three(kappa: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # The root in use is the one whose law is proper; the other has no positive df or a negative nc.
    root = (kappa[1] ** 2 - kappa[0] * kappa[2] / 2).clamp_min(0).sqrt()
    options = [(kappa[1] + sign * root) / (2 * kappa[0]) for sign in (1, -1)]
    for scale in options:
        nc = kappa[1] / (2 * scale**2) - kappa[0] / scale
        df = kappa[0] / scale - nc
        if df > 0 and nc >= -1e-9 * df:
            return df, nc.clamp_min(0), scale
    raise ValueError(f"no scaled chi-squared law has the cumulants {kappa.tolist()}")


def _of_two(kappa: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return 2 * kappa[0] ** 2 / kappa[1], torch.zeros_like(kappa[0]), kappa[1] / (2 * kappa[0])


def _of_beta(moments: Tensor) -> tuple[Tensor, Tensor]:
    total = moments[0] * (1 - moments[0]) / moments[1] - 1
    return moments[0] * total, (1 - moments[0]) * total


_PARAMETERS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "mle": _of_means,
    "cumulants": _of_three,
    "two moments": _of_two,
    "moments": _of_beta,
}


def _maximum_likelihood(e: Tensor, start: ScaledChi2, free: bool) -> tuple[Tensor, Tensor]:
    """`(log mean, log variance, nc / (df + nc))` of greatest likelihood, and their covariance.

    The share is held in 0 to 1: where the data are more skewed than any central law it stays at 0, and what it owes to
    chance is not counted.
    """
    ends = e.log().min().item(), e.log().max().item()
    turn = torch.arange(_NODES, dtype=torch.float64) * (math.pi / (_NODES - 1))
    nodes = ((ends[0] + ends[1]) / 2 + (ends[1] - ends[0]) / 2 * turn.cos()).exp()
    spread = _interpolation(e.log(), nodes.log())

    def likelihood(theta: Tensor) -> tuple[Tensor, Tensor]:
        df, nc, scale = (value.item() for value in _of_means(theta))
        value, (by_x, by_df, by_nc) = log_prob_and_scores(nodes / scale, df, nc)
        share, total = theta[2].item(), df + nc
        by_log_scale = -(nodes / scale) * by_x - 1
        by_log_total = df * by_df + nc * by_nc
        by_share = (by_log_total - by_log_scale) / (1 + share) - total * (by_df - by_nc)
        scores = torch.stack([2 * by_log_total - by_log_scale, by_log_scale - by_log_total, by_share])
        at = spread @ torch.cat([(value - math.log(scale))[None], scores]).T
        return at[:, 0].mean(), at[:, 1:]

    def climb(share: float) -> tuple[Tensor, Tensor, Tensor]:
        theta = torch.tensor([math.log(start.mean), math.log(start.variance), share], dtype=torch.float64)
        value, scores = likelihood(theta)
        covariance = torch.zeros(3, 3, dtype=torch.float64)
        for _ in range(50):
            gradient, information = scores.mean(0), scores.T @ scores / len(e)
            held = not free or (theta[2] <= 0 and gradient[2] <= 0) or (theta[2] >= _MOST_SHARE and gradient[2] >= 0)
            step = torch.zeros_like(theta)
            if not held:
                step = torch.linalg.solve(information, gradient)
                step[2] = (theta[2] + step[2]).clamp(0, _MOST_SHARE) - theta[2]
            # The other two given the step of the share, which its ends may have shortened.
            step[:2] = torch.linalg.solve(information[:2, :2], gradient[:2] - information[:2, 2] * step[2])
            count = 2 if held else 3
            covariance.zero_()
            covariance[:count, :count] = torch.linalg.inv(information[:count, :count]) / len(e)
            if gradient @ step < 1e-12:
                break
            size = 1.0
            while size > 1e-4:
                new_value, new_scores = likelihood(theta + size * step)
                if new_value > value:
                    break
                size /= 2
            else:
                break
            theta, value, scores = theta + size * step, new_value, new_scores
        return value, theta, covariance

    # The likelihood may have a maximum at either end of the share.
    _, theta, covariance = max((climb(share) for share in ((0.0, 0.9) if free else (0.0,))), key=lambda found: found[0])
    return theta, covariance


#: At a share of 1 no degrees of freedom are left, and the law has an atom at its floor.
_MOST_SHARE = 0.999


def _interpolation(x: Float[Tensor, " points"], nodes: Float[Tensor, " nodes"]) -> Float[Tensor, "points nodes"]:
    """Rows that take values at Chebyshev nodes (ends included) to values at `x`; barycentric."""
    weights = torch.ones_like(nodes)
    weights[1::2] = -1
    weights[0] /= 2
    weights[-1] /= 2
    gap = x[:, None] - nodes
    hit: Bool[Tensor, "points nodes"] = gap.abs() < 1e-14 * (nodes[0] - nodes[-1]).abs()
    terms = weights / gap.masked_fill(hit, 1.0)
    rows = terms / terms.sum(1, keepdim=True)
    return torch.where(hit.any(1, keepdim=True), hit.double(), rows)
