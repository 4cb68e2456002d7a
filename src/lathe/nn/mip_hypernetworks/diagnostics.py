"""Does the size of the weights, and of their gradients, follow gamma? (Figure 2 and section 3 of the paper.)"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.nn.mip_hypernetworks.driven import HyperDriven
from lathe.nn.mip_hypernetworks.hypernetwork import HyperNetwork

__all__ = ["MagnitudeProfile", "magnitude_profile"]


@dataclass(frozen=True)
class MagnitudeProfile:
    """How large predictions are for each gamma.

    Args:
        magnitude: norm of all real inputs together.
        deviation: standard deviation of each predicted tensor, by name, and of all entries together under "".
        gradient: norm of the gradient of the loss by the hypernetwork's parameters, where a loss was given.
        slope: of log deviation against log magnitude, by the same names, fitted to magnitudes above zero: 1 is
            proportional, 0 is independent; NaN where fewer than two magnitudes differ.
    """

    magnitude: Float[Tensor, " gammas"]
    deviation: dict[str, Float[Tensor, " gammas"]]
    gradient: Float[Tensor, " gammas"] | None
    slope: dict[str, float]

    def plot(self) -> Any:
        """Deviation of all entries (and norm of the gradient) against magnitude, each relative to its mean."""
        import altair as alt

        curves = {"deviation of the weights": self.deviation[""]}
        if self.gradient is not None:
            curves["norm of the gradient"] = self.gradient
        values = [
            {"gamma": gamma, "relative": value / max(float(curve.mean()), 1e-300), "what": what}
            for what, curve in curves.items()
            for gamma, value in zip(self.magnitude.tolist(), curve.tolist())
        ]
        return alt.Chart(alt.Data(values=values)).mark_line(point=True).encode(
            x=alt.X("gamma:Q", title="magnitude of gamma"),
            y=alt.Y("relative:Q", title="relative to the mean", scale=alt.Scale(zero=True)),
            color=alt.Color("what:N", title=None),
        ).properties(width="container", height=260)  # fmt: skip


def magnitude_profile(
    hyper: HyperNetwork | HyperDriven,
    gammas: Mapping[str, Tensor] | Float[Tensor, "gammas ..."],
    *,
    loss: Callable[..., Tensor] | None = None,
) -> MagnitudeProfile:
    """Standard deviations of predicted weights, and norms of gradients, for each of several gammas.

    Args:
        gammas: `(gammas, *shape)` for every input by name, or the tensor itself where there is one input.
        loss: `loss(gamma=...)`, called with each value by name: usually of a batch, computed with the driven network.

    Raises:
        ValueError: as `HyperNetwork.forward`.
    """
    network = hyper.hyper if isinstance(hyper, HyperDriven) else hyper
    named = dict(gammas) if isinstance(gammas, Mapping) else {next(iter(network.inputs)): gammas}
    lengths = {len(values) for values in named.values()}
    if len(lengths) != 1:
        raise ValueError(f"gammas must have one length, got {sorted(lengths)}")
    count = lengths.pop()
    deviations: dict[str, list[float]] = {name: [] for name in ("", *network.shapes)}
    gradients = []
    for index in range(count):
        one = {name: values[index] for name, values in named.items()}
        with torch.no_grad():
            flat = network.flat(**one).double()
        for name, part in {"": flat, **network.split(flat)}.items():
            deviations[name].append(float(part.std(correction=0)))
        if loss is not None:
            learnt = [parameter for parameter in network.parameters() if parameter.requires_grad]
            parts = torch.autograd.grad(loss(**one), learnt, allow_unused=True)
            norms = [torch.linalg.vector_norm(part.double()) for part in parts if part is not None]
            gradients.append(float(torch.stack(norms).norm()) if norms else 0.0)
    reals = [values for name, values in named.items() if network.inputs[name].kind == "real"]
    joined = torch.cat([values.reshape(count, -1).double() for values in reals], -1) if reals else torch.zeros(count, 1)
    magnitude = joined.norm(dim=-1)
    deviation = {name: torch.tensor(values, dtype=torch.float64) for name, values in deviations.items()}
    return MagnitudeProfile(
        magnitude,
        deviation,
        torch.tensor(gradients, dtype=torch.float64) if loss is not None else None,
        {name: _slope(magnitude, values) for name, values in deviation.items()},
    )


def _slope(magnitude: Tensor, deviation: Tensor) -> float:
    used = (magnitude > 0) & (deviation > 0)
    x, y = magnitude[used].log(), deviation[used].log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum()) if len(x) > 1 and bool(x.any()) else float("nan")
