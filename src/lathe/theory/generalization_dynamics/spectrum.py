"""The same theory for features as they are: their own spectrum, and signal and noise estimated from it (section 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.theory.generalization_dynamics.trajectories import checked, modes_of
from lathe.theory.generalization_dynamics.units import checked_times

__all__ = ["ModeSpectrum"]

#: Points of a search over a logarithmic scale, and how often it zooms in on the best of them.
_POINTS, _ZOOMS = 241, 5


@dataclass(frozen=True)
class ModeSpectrum:
    """How features are spread over the samples, and the learning curves that follow if every direction is as likely.

    The teacher's weights are taken as independent with variance `sigma_w^2`, what the features cannot express as noise
    of variance `sigma_eps^2` together with the labels' own. For independent inputs this is `LinearTheory` of the
    instance; its eigenvalues come from the data in place of the Marchenko-Pastur law.

    Attributes:
        eigenvalues: of `Phi^T Phi`, those that are not zero, in descending order.
        weights: how much an error along each mode counts in the test error, the mean of `(x . q_i)^2` over new samples.
        frozen_weight: the mean of `|x|^2` outside of all modes.
        samples, features: `P` and `N`.
        sigma_w, sigma_eps: by maximum likelihood, an output's share where there are several; NaN without targets.
    """

    eigenvalues: Float[Tensor, " modes"]
    weights: Float[Tensor, " modes"]
    frozen_weight: float
    samples: int
    features: int
    sigma_w: float = math.nan
    sigma_eps: float = math.nan

    @classmethod
    def from_features(
        cls,
        features: Float[Tensor, "samples features"],
        targets: Float[Tensor, "samples *outputs"] | None = None,
        *,
        held_out: Float[Tensor, "others features"] | None = None,
        centred: bool = False,
    ) -> ModeSpectrum:
        """Takes features apart and, given targets, estimates signal and noise from the modes.

        Args:
            features: `Phi`.
            targets: one or several outputs; estimates are shared.
            held_out: features of other samples, without targets, that say how much each direction counts in the test
                error. Without them all directions are taken to count alike, which real features are far from.
            centred: the means of features and targets have been taken off, which costs a degree of freedom.

        Raises:
            ValueError: for shapes that do not fit, values that are not finite, or features that are all zero.
        """
        features = checked(features, "features")
        samples, count = features.shape
        modes = modes_of(features)
        moving = modes.eigenvalues > 0
        if not moving.any():
            raise ValueError("features must not all be zero")
        lam, directions = modes.eigenvalues[moving], modes.directions[:, moving]
        if held_out is None:
            alike = (lam.sum() / (samples * count)).item()
            weights, frozen_weight = torch.full_like(lam, alike), alike * (count - len(lam))
        else:
            held_out = checked(held_out, "held_out").to(features.device)
            if held_out.ndim != 2 or held_out.shape[1] != count:
                raise ValueError(f"held_out must be samples by {count} features, got shape {tuple(held_out.shape)}")
            weights = (held_out @ directions).square().mean(0)
            frozen_weight = max(0.0, (held_out.square().sum(1).mean() - weights.sum()).item())
        if targets is None:
            return cls(lam, weights, frozen_weight, samples, count)
        targets = checked(targets, "targets").to(features.device)
        if len(targets) != samples:
            raise ValueError(f"targets must be of {samples} samples, got {len(targets)}")
        targets = targets.reshape(samples, -1)
        along = modes.residual(features, targets)[moving]
        outside = (targets.square().sum() - along.square().sum()).clamp_min(0)
        freedom = samples - centred
        sigma_w, sigma_eps = _most_likely(lam, along, outside if len(lam) < freedom else 0 * outside, freedom)
        return cls(lam, weights, frozen_weight, samples, count, sigma_w, sigma_eps)

    @property
    def frozen(self) -> int:
        """How many directions never move, `N - rank`."""
        return self.features - len(self.eigenvalues)

    @property
    def frozen_fraction(self) -> float:
        """That as a part of all directions."""
        return self.frozen / self.features

    @property
    def smallest(self) -> float:
        """The smallest eigenvalue that is not zero."""
        return self.eigenvalues[-1].item()

    @property
    def gamma(self) -> float:
        """The strength of the best ridge penalty, `sigma_eps^2 / sigma_w^2`; infinite where no signal was found."""
        return (self.sigma_eps / self.sigma_w) ** 2 if self.sigma_w else math.inf

    def test_error(self, t: float | Tensor, sigma_0: float = 0.0) -> Float[Tensor, "*times"]:
        """Expected squared error on new samples along gradient flow; first weights of deviation `sigma_0`."""
        t = checked_times(t, "t").to(self.eigenvalues)
        learnt = -torch.expm1(-self.eigenvalues * t.unsqueeze(-1))
        S0, noise = self.sigma_w**2 + sigma_0**2, self.sigma_eps**2
        error = (1 - learnt).square() @ (self.weights * S0)
        return noise + self.frozen_weight * S0 + error + learnt.square() @ (self.weights / self.eigenvalues * noise)

    def train_error(self, t: float | Tensor, sigma_0: float = 0.0) -> Float[Tensor, "*times"]:
        """Expected squared residual of the training samples along gradient flow."""
        t = checked_times(t, "t").to(self.eigenvalues)
        left = torch.exp(-2 * self.eigenvalues * t.unsqueeze(-1))
        S0, noise = self.sigma_w**2 + sigma_0**2, self.sigma_eps**2
        return (left @ (self.eigenvalues * S0 + noise) + (self.samples - len(self.eigenvalues)) * noise) / self.samples

    def final_error(self, sigma_0: float = 0.0) -> float:
        """Expected test error after infinite time."""
        return self.test_error(math.inf, sigma_0).item()

    def ridge(self, gamma: float | None = None) -> float:
        """Expected test error of ridge regression, by default with the best strength."""
        gamma = self.gamma if gamma is None else gamma
        if not gamma >= 0:
            raise ValueError(f"gamma must be at least 0, got {gamma}")
        lam, signal, noise = self.eigenvalues, self.sigma_w**2, self.sigma_eps**2
        left, learnt = (
            (torch.ones_like(lam), 0 * lam) if math.isinf(gamma) else (gamma / (lam + gamma), lam / (lam + gamma))
        )
        error = left.square() @ (self.weights * signal) + learnt.square() @ (self.weights / lam * noise)
        return error.item() + noise + self.frozen_weight * signal

    def optimal_stopping(self, sigma_0: float = 0.0) -> tuple[float, float]:
        """The time of the least expected test error, and that error; infinite without noise, zero without signal."""
        self._need_estimates()
        S0, noise = self.sigma_w**2 + sigma_0**2, self.sigma_eps**2
        if noise == 0:
            return math.inf, self.final_error(sigma_0)
        if S0 == 0:
            return 0.0, self.test_error(0.0, sigma_0).item()
        # Before the best time of the fastest mode all modes still improve, after that of the slowest none does.
        first, last = (math.log(math.log1p(lam * S0 / noise) / lam) for lam in self.eigenvalues[[0, -1]].tolist())
        t = math.exp(_maximum(lambda log_t: -self.test_error(log_t.exp(), sigma_0), first, last))
        return t, self.test_error(t, sigma_0).item()

    def _need_estimates(self) -> None:
        if math.isnan(self.sigma_eps):
            raise ValueError("this spectrum was made without targets; give targets to estimate signal and noise")


def _most_likely(lam: Tensor, along: Tensor, outside: Tensor, freedom: int) -> tuple[float, float]:
    """`sigma_w` and `sigma_eps` for modes `N(0, lam sigma_w^2 + sigma_eps^2)`, and noise alone in other directions.

    For a given ratio of the two variances the best scale is an average, which leaves a search in one dimension.
    """
    outputs = along.shape[1]
    power = along.square().sum(1)
    if (power.sum() + outside).item() == 0:
        return 0.0, 0.0
    count = outputs * freedom

    def scale(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        spread = 1 + lam * log_ratio.exp().unsqueeze(-1)
        return ((power / spread).sum(-1) + outside) / count, spread

    def likelihood(log_ratio: Tensor) -> Tensor:
        noise, spread = scale(log_ratio)
        return -0.5 * (outputs * spread.log().sum(-1) + count * noise.log())

    first, last = math.log(1e-9 / lam[0].item()), math.log(1e9 / lam[-1].item())
    best = _maximum(likelihood, first, last)
    noise = scale(torch.tensor(best, dtype=lam.dtype, device=lam.device))[0].item()
    # At an end of the range the likelihood says that there is no signal, or no noise.
    sigma_w = 0.0 if best - first < 1e-3 else math.sqrt(noise * math.exp(best))
    return sigma_w, 0.0 if last - best < 1e-3 else math.sqrt(noise)


def _maximum(f: Callable[[Tensor], Tensor], first: float, last: float) -> float:
    """Where `f`, which takes a tensor of points, is largest between the two: a grid that zooms in on its best point."""
    for _ in range(_ZOOMS):
        points = torch.linspace(first, last, _POINTS, dtype=torch.float64)
        best = int(f(points).argmax())
        first, last = points[max(best - 1, 0)].item(), points[min(best + 1, _POINTS - 1)].item()
    return points[best].item()
