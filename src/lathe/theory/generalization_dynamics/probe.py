"""What the theory says about a person's own network: when to stop, how strongly to regularise, whether size hurts.

On the features of its last layer, under a readout that is trained anew, or on all of its parameters through the
empirical neural tangent kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lathe.core.modes import evaluating
from lathe.theory.generalization_dynamics.spectrum import ModeSpectrum
from lathe.theory.generalization_dynamics.trajectories import gradient_flow
from lathe.theory.generalization_dynamics.units import Loss, time_per_step
from lathe.theory.kernels import empirical_ntk

__all__ = ["LearningCurves", "Recommendation", "learning_curves", "recommend"]

Features = Literal["last", "output", "ntk"]
Data = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]
#: Samples that go through the network at a time.
_BATCH = 512
_TIMES = 100


@dataclass(frozen=True)
class LearningCurves:
    """Errors along gradient flow on the features of a network, as they are and as the theory has them.

    Errors are averaged over samples and outputs, as in `nn.MSELoss`. Measured curves are the exact solution on these
    samples; the theory knows the features, the training targets, and nothing of the test targets.

    Attributes:
        times: of the flow of `1/2 sum residual^2`.
        train, test: measured.
        train_theory, test_theory: expected, for the estimated signal and noise.
        stopping: the time at which theory would stop.
        spectrum: of the features, with the estimates.
        samples, outputs: of the training data.
    """

    times: Float[Tensor, " times"]
    train: Float[Tensor, " times"]
    test: Float[Tensor, " times"]
    train_theory: Float[Tensor, " times"]
    test_theory: Float[Tensor, " times"]
    stopping: float
    spectrum: ModeSpectrum
    samples: int
    outputs: int

    def plot(self) -> Any:
        """An Altair chart: measured curves, those of the theory, and where it would stop."""
        import altair as alt

        sides = {
            ("test", "measured"): self.test,
            ("test", "theory"): self.test_theory,
            ("train", "measured"): self.train,
            ("train", "theory"): self.train_theory,
        }
        rows = [
            {"time": time, "error": error, "on": on, "from": who}
            for (on, who), values in sides.items()
            for time, error in zip(self.times.tolist(), values.tolist())
        ]
        lines = (
            alt.Chart(alt.Data(values=rows), width=420, height=260)
            .mark_line(clip=True)
            .encode(
                x=alt.X("time:Q", title="time along gradient flow").scale(type="log").axis(format="~e", tickCount=6),
                y=alt.Y("error:Q", title="mean squared error").scale(
                    domainMax=2 * max(self.test[0].item(), self.test.min().item()), domainMin=0
                ),
                color=alt.Color("on:N", title="error"),
                strokeDash=alt.StrokeDash("from:N", title=None),
            )
        )
        if not self.times[0] <= self.stopping <= self.times[-1]:
            return lines
        stop = alt.Chart(alt.Data(values=[{"time": self.stopping, "text": "stop here"}]))
        label = stop.mark_text(align="left", dx=4, y=10).encode(x="time:Q", text="text:N")
        return lines + stop.mark_rule(strokeDash=[2, 3]).encode(x="time:Q") + label


@dataclass(frozen=True)
class Recommendation:
    """What the theory advises for these features.

    Attributes:
        stopping_steps: steps of gradient descent at the given rate and loss after which to stop; infinite for never.
        stopping_time: that in time along gradient flow.
        ridge: strength `gamma` of a penalty `gamma/2 |w|^2` beside `1/2 sum residual^2` that does as well.
        best_error, ridge_error, final_error: expected on new samples: stopped, with the penalty, after infinite time.
        features, samples: `N` and `P`; for the NTK, trained parameters, and samples times outputs.
        frozen: directions that never move.
        smallest: the smallest eigenvalue that is not zero; its inverse is the time scale of overtraining.
        largest_lr: the rate above which gradient descent diverges.
        sigma_w, sigma_eps: estimated deviations of a weight and of what the features leave unexplained.
        curves: measured beside the theory, on the samples held out.
    """

    stopping_steps: float
    stopping_time: float
    ridge: float
    best_error: float
    ridge_error: float
    final_error: float
    features: int
    samples: int
    frozen: int
    smallest: float
    largest_lr: float
    sigma_w: float
    sigma_eps: float
    curves: LearningCurves

    @property
    def overtraining(self) -> float:
        """Expected error of training for ever over that of stopping in time; infinite where stopped error is zero."""
        return self.final_error / self.best_error if self.best_error else math.inf

    @property
    def advice(self) -> str:
        """In words."""
        ratio = self.features / self.samples
        if self.sigma_w == 0:
            return "no signal was found in these features: train others"
        if self.overtraining < 1.05:
            return "train as long as you like: overtraining costs less than 5%"
        stop = f"stop after {self.stopping_steps:.3g} steps or use a ridge penalty of {self.ridge:.3g}"
        if 0.5 < ratio < 2:
            return f"features are about as many as samples, the worst case: change their number, or {stop}"
        return stop

    def __str__(self) -> str:
        rows = [
            ("features, samples", f"{self.features}, {self.samples}"),
            ("frozen directions", f"{self.frozen}"),
            ("smallest eigenvalue", f"{self.smallest:.4g}"),
            ("signal, noise", f"{self.sigma_w:.4g} a weight, {self.sigma_eps:.4g}"),
            (
                "expected error: stopped, ridge, final",
                f"{self.best_error:.4g}, {self.ridge_error:.4g}, {self.final_error:.4g}",
            ),
            ("advice", self.advice),
        ]
        return "\n".join(f"{name:<38}{value}" for name, value in rows)

    def plot(self) -> Any:
        """The learning curves, measured and expected."""
        return self.curves.plot()


def learning_curves(
    model: nn.Module,
    train: Data,
    test: Data,
    *,
    features: Features = "last",
    layer: str | None = None,
    times: Float[Tensor, " times"] | None = None,
) -> LearningCurves:
    """Train and test errors along training on a network's features: exact on these data, and as the theory expects.

    Args:
        model: any network that takes the inputs as its one argument. It is run in evaluation mode and left untouched.
        train, test: `(inputs, targets)`, or batches of them (a DataLoader). Whole-number targets are classes and become
            one-hot.
        features: "last" trains a readout anew on what enters the last `nn.Linear`, with intercept; "output" does so on
            what the model returns (a backbone); "ntk" trains all parameters of the network linearised where it stands.
        layer: name of the module whose input "last" takes.
        times: by default a hundred that cover all modes.

    Raises:
        ValueError: where the model has no such layer, its features are not `(samples, features)`, or data do not fit.
    """
    x, y = _gathered(train, "train")
    x_test, y_test = _gathered(test, "test")
    if x_test.shape[1:] != x.shape[1:] or y_test.dtype.is_floating_point != y.dtype.is_floating_point:
        raise ValueError(f"train and test must be alike, got inputs {tuple(x.shape[1:])} and {tuple(x_test.shape[1:])}")
    y, y_test = _targets(y, y_test)
    outputs = y.shape[1]
    if features == "ntk":
        phi, phi_test, residual, residual_test = _tangent(model, x, y, x_test, y_test)
    else:
        whole = _features(model, torch.cat([x, x_test]), features, layer)
        center, mean = whole[: len(x)].mean(0), y.mean(0)
        phi, phi_test = whole[: len(x)] - center, whole[len(x) :] - center
        residual, residual_test = y - mean, y_test - mean
    spectrum = ModeSpectrum.from_features(phi, residual, held_out=phi_test, centred=features != "ntk")
    if features == "ntk":
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        spectrum = replace(spectrum, features=trained)
    if times is None:
        slow, fast = spectrum.eigenvalues[[-1, 0]].tolist()
        times = torch.logspace(math.log10(0.01 / fast), math.log10(10 / slow), _TIMES, dtype=torch.float64)
    flow = gradient_flow(phi, residual, times=times)
    measured, measured_test = (e.reshape(len(e), -1).mean(1) for e in (flow.train, flow.test(phi_test, residual_test)))
    stopping = spectrum.optimal_stopping()[0]
    expected, expected_test = spectrum.train_error(flow.times), spectrum.test_error(flow.times)
    return LearningCurves(
        flow.times, measured, measured_test, expected, expected_test, stopping, spectrum, len(x), outputs
    )


def recommend(
    model: nn.Module,
    data: Data,
    *,
    features: Features = "last",
    layer: str | None = None,
    lr: float = 0.1,
    loss: Loss = "mse",
    held_out: float = 0.2,
    generator: torch.Generator | None = None,
) -> Recommendation:
    """When to stop, how strong a ridge penalty, and whether size is the trouble, for training on a network's features.

    A part of the data is held out: its inputs say how much an error in each direction counts for new samples, and its
    targets show beside the theory how well that does. Steps assume full batches at the given rate; mini-batches of a
    small rate follow the same curve.

    Args:
        model, data, features, layer: as for `learning_curves`.
        lr, loss: of the gradient descent whose steps are counted; see `gradient_descent`.
        held_out: part of the samples.
        generator: chooses them.

    Raises:
        ValueError: for `held_out` outside of (0, 1) or that leaves fewer than two samples, and as `learning_curves`.
    """
    x, y = _gathered(data, "data")
    kept = len(x) - round(held_out * len(x)) if 0 < held_out < 1 else 0
    if not 2 <= kept < len(x):
        raise ValueError(f"held_out must leave samples on both sides, got {held_out} of {len(x)} samples")
    order = torch.randperm(len(x), generator=generator)
    train, test = order[:kept], order[kept:]
    curves = learning_curves(model, (x[train], y[train]), (x[test], y[test]), features=features, layer=layer)
    spectrum = curves.spectrum
    time, best = spectrum.optimal_stopping()
    rate = time_per_step(lr, loss, curves.samples, curves.outputs)
    return Recommendation(
        stopping_steps=time / rate,
        stopping_time=time,
        ridge=spectrum.gamma,
        best_error=best,
        ridge_error=spectrum.ridge(),
        final_error=spectrum.final_error(),
        features=spectrum.features,
        samples=spectrum.samples,
        frozen=spectrum.frozen,
        smallest=spectrum.smallest,
        largest_lr=2 * lr / (rate * spectrum.eigenvalues[0].item()),
        sigma_w=spectrum.sigma_w,
        sigma_eps=spectrum.sigma_eps,
        curves=curves,
    )


def _gathered(data: Data, name: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets whole, of a pair of tensors or of batches."""
    x, y = data if isinstance(data, (tuple, list)) and len(data) == 2 else (None, None)
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        pairs = [(batch[0], batch[1]) for batch in data]
        if not pairs:
            raise ValueError(f"{name} has no batches")
        x, y = (torch.cat(parts) for parts in zip(*pairs))
    if len(x) != len(y) or not len(x):
        raise ValueError(f"{name} must have as many targets as inputs, and one at least, got {len(x)} and {len(y)}")
    return x, y


def _targets(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Targets (samples, outputs) in float64; classes one-hot."""
    if train.is_floating_point():
        return train.double().reshape(len(train), -1), test.double().reshape(len(test), -1)
    train, test = train.long(), test.long()
    if train.ndim != 1 or min(train.min(), test.min()) < 0:
        raise ValueError(f"targets that are classes must be one axis of numbers from 0, got {tuple(train.shape)}")
    classes = int(max(train.max(), test.max())) + 1
    return nn.functional.one_hot(train, classes).double(), nn.functional.one_hot(test, classes).double()


def _features(model: nn.Module, x: Tensor, kind: Features, layer: str | None) -> Tensor:
    """What enters the last linear layer, or leaves the model, (samples, features), in float64."""
    if kind not in ("last", "output"):
        raise ValueError(f"features must be last, output or ntk, got {kind!r}")
    modules = dict(model.named_modules())
    if layer is not None and layer not in modules:
        raise ValueError(f"layer must name a module of the model, got {layer!r}; it has {', '.join(modules)}")
    watched = [modules[layer]] if layer is not None else [m for m in modules.values() if isinstance(m, nn.Linear)]
    if kind == "last" and not watched:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear: name a layer=..., or take features='output' or 'ntk'"
        )
    entered: list[Tensor] = []
    handles = [module.register_forward_pre_hook(lambda _, given: entered.append(given[0])) for module in watched]
    found = []
    try:
        with evaluating(model), torch.no_grad():
            for part in x.split(_BATCH):
                entered.clear()
                returned = model(part)
                found.append((returned if kind == "output" else entered[-1]).double())
    finally:
        for handle in handles:
            handle.remove()
    features = torch.cat(found)
    if features.ndim != 2 or len(features) != len(x):
        shape = tuple(features.shape)
        raise ValueError(f"features must be samples by features, got shape {shape}: pool them, or name another layer")
    return features


def _tangent(
    model: nn.Module, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features whose Gram matrix is the network's NTK, for train and test, and what its outputs are yet off by.

    Rows are samples and outputs. The kernel of both sets together is taken apart, so that what test samples have
    outside of all that can be learnt is there too.
    """
    both = torch.cat([x, x_test])
    with evaluating(model):
        kernel = empirical_ntk(model, both, outputs="full").detach().double()
        with torch.no_grad():
            start = model(both).double().flatten(1)
    if start.shape[1] != y.shape[1]:
        raise ValueError(f"the model has {start.shape[1]} outputs, but there are {y.shape[1]} targets a sample")
    rows = start.numel()
    values, vectors = torch.linalg.eigh(kernel.permute(0, 2, 1, 3).reshape(rows, rows))
    features = vectors * values.clamp_min(0).sqrt()
    cut = y.numel()
    residual = torch.cat([y, y_test]) - start
    return features[:cut], features[cut:], residual.flatten()[:cut], residual.flatten()[cut:]
