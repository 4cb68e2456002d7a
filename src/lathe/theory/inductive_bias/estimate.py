"""Inductive bias of a task: how improbable it is that a random hypothesis that fits the training data does well."""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from lathe.theory.inductive_bias.fits import Beta, Fit, FittedLaw, ScaledChi2, check_losses, fit_losses

__all__ = ["InductiveBias", "RelativeBias", "Task", "inductive_bias", "relative_bias"]

Tail: TypeAlias = Literal["ncx2", "chi2", "beta", "empirical"]
Base: TypeAlias = Literal["nats", "bits"]
_UNIT = {"nats": 1.0, "bits": math.log(2)}


@dataclass(frozen=True)
class Task:
    """What a number of nats belongs to: only numbers of the same test set and loss can be compared.

    Attributes:
        loss: "mse" (mean over test points and outputs), "0-1", or a name of your own.
        train_size: points that hypotheses fit.
        test: a fingerprint of the test points and their targets.
    """

    loss: str
    train_size: int
    test: str

    @classmethod
    def of(cls, loss: str, train_size: int, x_test: Tensor, y_test: Tensor) -> Task:
        """The task of these tensors; the fingerprint does not depend on their precision's name or their device."""
        digest = hashlib.sha256()
        for part in (x_test, y_test):
            digest.update(part.detach().double().cpu().contiguous().numpy().tobytes())
        return cls(loss, train_size, digest.hexdigest()[:16])


@dataclass(frozen=True)
class InductiveBias:
    """`-log P(test loss <= eps | the training data are fitted)`, for each eps.

    Attributes:
        value: in `base`; infinite where no hypothesis goes that low.
        low, high: the interval that chance leaves, of the asked confidence; equal to `value` where the law is exact.
        sd: standard deviation of `value`.
        eps: losses to be reached, in the shape of the above.
        n: sampled losses behind the value; 0 where the law is exact.
        extrapolation: `value` over log n, in nats: up to 1 the event was seen, above 3 trust differences only. 0 where
            the law is exact.
        tail, fit: the law of the losses, and how it was fitted ("exact" for both where nothing was).
        law: the fitted law; beside an exact value, the law that matches its first three cumulants, for comparison.
        base: "nats" or "bits".
        task: what it belongs to; None where only losses were given.
        source: the hypotheses: `KernelHypotheses`, `NetworkEnsemble`, or None.
    """

    value: Float[Tensor, "*eps"]
    low: Float[Tensor, "*eps"]
    high: Float[Tensor, "*eps"]
    sd: Float[Tensor, "*eps"]
    eps: Float[Tensor, "*eps"]
    n: int
    extrapolation: Float[Tensor, "*eps"]
    tail: str
    fit: str
    law: ScaledChi2 | Beta | None = None
    base: Base = "nats"
    task: Task | None = None
    source: Any = field(default=None, repr=False)

    def plot(self) -> Any:
        """An Altair chart of the bias over eps, with its interval."""
        import altair as alt

        columns = zip(*(part.detach().flatten().tolist() for part in (self.eps, self.value, self.low, self.high)))
        rows = [
            {"eps": eps, "bias": value, "low": low, "high": min(high, 2 * value + 1)}
            for eps, value, low, high in sorted(columns)
            if math.isfinite(value)
        ]
        base = alt.Chart(alt.Data(values=rows), width=360, height=240).encode(x=alt.X("eps:Q", title="test loss"))
        line = base.mark_line(point=True).encode(y=alt.Y("bias:Q", title=f"inductive bias ({self.base})"))
        return base.mark_area(opacity=0.2).encode(y="low:Q", y2="high:Q") + line


@dataclass(frozen=True)
class RelativeBias:
    """What choosing a narrow class over a broad one contributes: the difference of two biases at the same eps.

    Attributes:
        value, low, high, sd: in `base`; errors of both propagated.
        eps: as in both.
    """

    value: Float[Tensor, "*eps"]
    low: Float[Tensor, "*eps"]
    high: Float[Tensor, "*eps"]
    sd: Float[Tensor, "*eps"]
    eps: Float[Tensor, "*eps"]
    base: Base


def inductive_bias(
    losses: Float[Tensor, " samples"],
    eps: float | Float[Tensor, "*eps"] | None = None,
    *,
    tail: Tail = "ncx2",
    fit: Fit = "mle",
    base: Base = "nats",
    ci: float = 0.95,
    interval: Literal["delta", "bootstrap"] = "delta",
    floor: float = 0.0,
    seed: int = 0,
) -> InductiveBias:
    """Inductive bias from the test losses of random hypotheses that fit the training data.

    Works for any task that has a loss: classification, control, episodes of few-shot learning, language models.

    Args:
        losses: one a hypothesis, not negative.
        eps: the loss to be reached; by default the smallest that was sampled, at which the bias is about log samples.
        tail: "ncx2" (the paper's scaled non-central chi-squared law), "chi2" (central), "beta" (for shares of errors;
            our extension), "empirical" (counts, infinite below the smallest loss).
        fit: "mle" or "cumulants", see `fit_losses`.
        base: "nats" or "bits".
        ci: confidence of the interval.
        interval: "delta", from the covariance of what was fitted; "bootstrap", from 200 samples of the fitted law.
        floor: a known loss that no hypothesis goes below, such as the noise of the targets.
        seed: of the bootstrap.

    Raises:
        ValueError: for eps not positive, fewer than 20 losses, losses that are negative, not finite or all the same,
            and unknown options.

    Warns:
        UserWarning: where the bias is more than three times the log of the number of samples: the tail is extrapolated
            far, and only differences between classes that were fitted alike can be trusted.
    """
    if base not in _UNIT:
        raise ValueError(f"base must be 'nats' or 'bits', got {base!r}")
    if tail not in ("ncx2", "chi2", "beta", "empirical"):
        raise ValueError(f"tail must be 'ncx2', 'chi2', 'beta' or 'empirical', got {tail!r}")
    if interval not in ("delta", "bootstrap"):
        raise ValueError(f"interval must be 'delta' or 'bootstrap', got {interval!r}")
    if not 0 < ci < 1:
        raise ValueError(f"ci must lie between 0 and 1, got {ci}")
    e = check_losses(losses)
    target = check_eps(e.min() if eps is None else eps)
    points = target.flatten()
    size = len(e)
    if tail == "empirical":
        count = (e <= points[:, None]).sum(1).double()
        value = -(count / size).log()
        sd = ((1 - count / size) / count).sqrt()
        # Clopper and Pearson's interval of the probability.
        high = -torch.from_numpy(stats.beta.ppf((1 - ci) / 2, count, size - count + 1)).nan_to_num(0.0).log()
        low = -torch.from_numpy(stats.beta.ppf((1 + ci) / 2, count + 1, size - count)).nan_to_num(1.0).log()
        law, name = None, "counts"
    else:
        fitted = fit_losses(e, tail=tail, fit=fit, floor=floor)
        value, sd = fitted.log_cdf_and_sd(points)
        law, name, value = fitted.law, fitted.fit, -value
        if interval == "delta":
            reach = stats.norm.ppf((1 + ci) / 2) * sd
            low, high = (value - reach).clamp_min(0), value + reach
        else:
            drawn = _bootstrap(fitted, points, size, tail, fit, floor, seed)
            sd = drawn.std(0)
            low, high = torch.quantile(drawn, torch.tensor([(1 - ci) / 2, (1 + ci) / 2], dtype=torch.float64), dim=0)
    extrapolation = value / math.log(size)
    if bool((extrapolation[value.isfinite()] > 3).any()):
        warnings.warn(
            f"the bias is {extrapolation[value.isfinite()].max():.1f} times log {size}: the tail is extrapolated far "
            "beyond the sampled losses; trust its order of magnitude, and differences between classes fitted alike",
            stacklevel=2,
        )
    unit = _UNIT[base]
    value, low, high, sd = ((part / unit).reshape(target.shape) for part in (value, low, high, sd))
    return InductiveBias(
        value, low, high, sd, target, size, extrapolation.reshape(target.shape), tail, name, law, base
    )  # fmt: skip


def _bootstrap(
    fitted: FittedLaw, points: Tensor, size: int, tail: Any, fit: Fit, floor: float, seed: int, draws: int = 200
) -> Float[Tensor, "draws eps"]:
    found = []
    for draw in range(draws):
        again = fit_losses(fitted.law.sample(size, seed=seed * draws + draw), tail=tail, fit=fit, floor=floor)
        found.append(-again.law.log_cdf(points))
    return torch.stack(found)


def check_eps(eps: float | Tensor) -> Tensor:
    """eps in float64.

    Raises:
        ValueError: where it is not positive and finite.
    """
    target = torch.as_tensor(eps, dtype=torch.float64)
    if not bool(((target > 0) & target.isfinite()).all()):
        raise ValueError(f"eps must be positive and finite, got {target.min():g}")
    return target


def relative_bias(broad: InductiveBias, narrow: InductiveBias) -> RelativeBias:
    """What the narrow class of hypotheses knows about the task that the broad one does not: `I_broad - I_narrow`.

    Raises:
        ValueError: where the two are not of the same eps, base, loss and test set: their difference means nothing.
    """
    if broad.base != narrow.base:
        raise ValueError(f"broad and narrow must have the same base, got {broad.base} and {narrow.base}")
    if broad.eps.shape != narrow.eps.shape or not torch.allclose(broad.eps, narrow.eps, rtol=1e-9, atol=0):
        raise ValueError(f"broad and narrow must have the same eps, got {broad.eps} and {narrow.eps}")
    if broad.task is not None and narrow.task is not None:
        for name in ("loss", "test"):
            mine, other = getattr(broad.task, name), getattr(narrow.task, name)
            if mine != other:
                raise ValueError(f"broad and narrow must have the same {name}, got {mine} and {other}")
    value = broad.value - narrow.value
    # Each side's distance from its value to its limit, added in squares.
    below = ((broad.value - broad.low).square() + (narrow.high - narrow.value).square()).sqrt()
    above = ((broad.high - broad.value).square() + (narrow.value - narrow.low).square()).sqrt()
    sd = (broad.sd.square() + narrow.sd.square()).sqrt()
    return RelativeBias(value, value - below, value + above, sd, broad.eps, broad.base)


def with_task(bias: InductiveBias, task: Task, source: Any) -> InductiveBias:
    """The same number, with what it belongs to."""
    return replace(bias, task=task, source=source)
