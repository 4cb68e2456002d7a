"""Students that are not linear: fixed random features under a trained readout, their teachers, and sweeps of size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lathe.core.gaussian import ActivationLike, kernel_moments, line_expectation
from lathe.core.gaussian import activation as activation_of
from lathe.theory.generalization_dynamics.trajectories import gradient_flow

__all__ = ["RandomFeatures", "SizeSweep", "TeacherStudent", "size_sweep"]


class RandomFeatures(nn.Module):
    """A fixed random layer, `act(W x) / sqrt(hidden)` with `W_ij ~ N(0, 1/in_features)`, under a trained readout.

    Scaled so that the features' Gram matrix has a limit as `hidden` grows, and times mean the same at every size. For
    inputs whose entries have unit variance.

    Args:
        in_features, hidden: sizes.
        activation: any that `lathe.core.gaussian.activation` knows.
        generator: draws the weights.

    Shape: `(*batch, in_features)` -> `(*batch, hidden)`, in float64 by default.
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        hidden: int,
        activation: ActivationLike = "relu",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or hidden < 1:
            raise ValueError(f"in_features and hidden must be at least 1, got {in_features} and {hidden}")
        weight = torch.randn(hidden, in_features, dtype=torch.float64, generator=generator) / math.sqrt(in_features)
        self.register_buffer("weight", weight)
        self.activation = activation

    def narrow(self, hidden: int) -> RandomFeatures:
        """The first `hidden` of these features, rescaled: students of different sizes that share their features."""
        if not 1 <= hidden <= len(self.weight):
            raise ValueError(f"hidden must be between 1 and {len(self.weight)}, got {hidden}")
        small = RandomFeatures(self.weight.shape[1], hidden, self.activation)
        small.weight = self.weight[:hidden]
        return small

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch hidden"]:
        hidden = activation_of(self.activation)(x.to(self.weight) @ self.weight.T)
        return hidden / math.sqrt(len(self.weight))


class TeacherStudent:
    """Data from a noisy teacher: standard normal inputs, outputs of mean 0 and variance 1, and noise of variance 1/snr.

    Args:
        n_in: inputs.
        n_teacher: hidden units of the teacher; None for a linear one.
        snr: variance of the teacher's output over that of the noise; infinity for none.
        activation: of the hidden units. Mean and variance of the output are exact, for any activation.
        generator: draws the teacher.

    Example:
        >>> teacher = TeacherStudent(20, 15, snr=2.0, generator=torch.Generator().manual_seed(0))
        >>> x, y = teacher.sample(100)
        >>> x.shape, y.shape, teacher(x).shape
        (torch.Size([100, 20]), torch.Size([100]), torch.Size([100]))
    """

    def __init__(
        self,
        n_in: int,
        n_teacher: int | None = None,
        snr: float = math.inf,
        activation: ActivationLike = "relu",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        if n_in < 1 or (n_teacher is not None and n_teacher < 1):
            raise ValueError(f"n_in and n_teacher must be at least 1, got {n_in} and {n_teacher}")
        if not snr > 0:
            raise ValueError(f"snr must be positive, got {snr}")
        self.noise = 1 / math.sqrt(snr)
        self.activation: ActivationLike = "linear" if n_teacher is None else activation
        hidden = n_teacher or 1
        self.weight = torch.randn(hidden, n_in, dtype=torch.float64, generator=generator) / math.sqrt(n_in)
        self.readout = torch.randn(hidden, dtype=torch.float64, generator=generator)
        act = activation_of(self.activation)
        K = self.weight @ self.weight.T
        mean = line_expectation(act, K.diagonal(), act.kinks)
        self.mean = (self.readout @ mean).item()
        square = (self.readout @ kernel_moments(act, K, slope=False)[0] @ self.readout).item()
        self.deviation = math.sqrt(square - self.mean**2)

    def __call__(self, x: Float[Tensor, "*samples inputs"]) -> Float[Tensor, "*samples"]:
        """The teacher's outputs without noise."""
        hidden = activation_of(self.activation)(x.to(self.weight) @ self.weight.T)
        return (hidden @ self.readout - self.mean) / self.deviation

    def sample(
        self, samples: int, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "samples inputs"], Float[Tensor, " samples"]]:
        """Inputs, and outputs with noise."""
        x = torch.randn(samples, self.weight.shape[1], dtype=torch.float64, generator=generator)
        return x, self(x) + self.noise * torch.randn(samples, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class SizeSweep:
    """Errors of students of several sizes along their training.

    Attributes:
        sizes: numbers of features.
        times: of gradient flow on `1/2 sum residual^2`.
        train, test: mean squared errors, averaged over outputs.
        samples: training samples, where the final error peaks.
    """

    sizes: tuple[int, ...]
    times: Float[Tensor, " times"]
    train: Float[Tensor, "sizes times"]
    test: Float[Tensor, "sizes times"]
    samples: int

    @property
    def final(self) -> Float[Tensor, " sizes"]:
        """Test error at the last time."""
        return self.test[:, -1]

    @property
    def stopped(self) -> Float[Tensor, " sizes"]:
        """The least test error over the times."""
        return self.test.amin(1)

    def plot(self) -> Any:
        """An Altair chart: final and best-stopped test error by size."""
        import altair as alt

        rows = [
            {"features": size, "test error": value, "when": when}
            for when, values in (("last time", self.final), ("best time", self.stopped))
            for size, value in zip(self.sizes, values.tolist())
        ]
        lines = (
            alt.Chart(alt.Data(values=rows), width=360, height=240)
            .mark_line(point=True)
            .encode(
                x=alt.X("features:Q").scale(type="log"),
                y=alt.Y("test error:Q").scale(type="log"),
                color=alt.Color("when:N", title="stopped at"),
            )
        )
        mark = alt.Chart(alt.Data(values=[{"features": self.samples}])).mark_rule(strokeDash=[4, 4])
        return mark.encode(x="features:Q") + lines


def size_sweep(
    train: tuple[Float[Tensor, "samples inputs"], Float[Tensor, "samples *outputs"]],
    test: tuple[Float[Tensor, "others inputs"], Float[Tensor, "others *outputs"]],
    sizes: Sequence[int],
    *,
    times: Float[Tensor, " times"],
    features: RandomFeatures | None = None,
    generator: torch.Generator | None = None,
) -> SizeSweep:
    """Trains readouts of random-feature students of several sizes on the same samples, at all times at once.

    The sizes share their features (the first rows of one matrix), which makes the curve over sizes smooth. The final
    error peaks where there are as many features as samples, whatever the number of outputs.

    Args:
        train, test: inputs and targets; noiseless test targets give the error without the noise.
        sizes: numbers of features.
        times: as for `gradient_flow`, from a start at zero.
        features: the largest student's; by default ReLU features drawn with `generator`.

    Raises:
        ValueError: for no sizes, or sizes that `features` cannot serve, and as for `gradient_flow`.
    """
    sizes = tuple(sizes)
    if not sizes:
        raise ValueError("sizes must not be empty")
    if features is None:
        features = RandomFeatures(train[0].shape[1], max(sizes), generator=generator)
    curves = []
    for size in sizes:
        student = features.narrow(size)
        run = gradient_flow(student(train[0]), train[1].double(), times=times)
        errors = run.train, run.test(student(test[0]), test[1].double())
        curves.append([error.reshape(len(error), -1).mean(1) for error in errors])
    train_errors, test_errors = (torch.stack(each) for each in zip(*curves))
    return SizeSweep(sizes, torch.as_tensor(times), train_errors, test_errors, len(train[0]))
