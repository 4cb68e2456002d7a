"""Descent in function space with a fixed kernel: the infinitely wide network that learns no features.

The Gaussian-process and neural-tangent baselines of Yang and Hu, 2020, arXiv 2011.14522, section 7: every example seen
is kept, and the function is a sum over them.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from lathe.core.gaussian import ActivationLike, activation, pair_moments

__all__ = ["KernelLearner"]


class KernelLearner:
    """`f(x) = -sum_i lr_i k(x, x_i) delta_i`, `delta_i` being dLoss/df at the example `x_i` when it was seen.

    Kernels of a network with one hidden layer: "gp", of which the readout alone is trained, `E[phi(z) phi(z')]` over
    pre-activations of covariance `weight_var x.x' + bias_var`; "ntk", which adds the first layer's part,
    `readout_var x.x' E[phi'(z) phi'(z')]`; "linear", `weight_var x.x' + bias_var`.

    Args:
        kernel: "gp", "ntk" or "linear".
        out_features: of the function.
        act: activation of the hidden layer.
        weight_var, bias_var, readout_var: as above.
        capacity: keep the most recent examples only; by default all.
        chunk: examples that the kernel is computed for at a time.

    Raises:
        ValueError: for an unknown kernel, or a capacity or chunk below one.
    """

    def __init__(
        self,
        kernel: Literal["gp", "ntk", "linear"],
        out_features: int,
        *,
        act: ActivationLike = "relu",
        weight_var: float = 1.0,
        bias_var: float = 0.0,
        readout_var: float = 1.0,
        capacity: int | None = None,
        chunk: int = 8192,
    ) -> None:
        if kernel not in ("gp", "ntk", "linear"):
            raise ValueError(f"kernel must be 'gp', 'ntk' or 'linear', got {kernel!r}")
        if chunk < 1 or (capacity is not None and capacity < 1):
            raise ValueError(f"capacity and chunk must be at least 1, got {capacity} and {chunk}")
        self.kernel, self.out_features, self.act = kernel, out_features, activation(act)
        self.weight_var, self.bias_var, self.readout_var = weight_var, bias_var, readout_var
        self.capacity, self.chunk = capacity, chunk
        self._x: Tensor | None = None
        self._step: Tensor | None = None  # lr_i delta_i
        self._seen = 0

    def __len__(self) -> int:
        """How many examples are kept."""
        return self._seen if self.capacity is None else min(self._seen, self.capacity)

    def similarities(
        self, x: Float[Tensor, "*batch n in_features"], other: Float[Tensor, "*batch m in_features"]
    ) -> Float[Tensor, "*batch n m"]:
        """The kernel between two sets of inputs."""
        inner = x @ other.mT
        covariance = self.weight_var * inner + self.bias_var
        if self.kernel == "linear":
            return covariance
        variances = [self.weight_var * each.square().sum(-1) + self.bias_var for each in (x, other)]
        if x is other:  # an input's correlation with itself is one, to the last digit
            variances = [covariance.diagonal(dim1=-2, dim2=-1)] * 2
        product, slopes = pair_moments(self.act, variances[0].unsqueeze(-1), covariance, variances[1].unsqueeze(-2))
        return product if self.kernel == "gp" else product + self.readout_var * inner * slopes

    def predict(self, x: Float[Tensor, "batch in_features"]) -> Float[Tensor, "batch out_features"]:
        """The function's values."""
        f = x.new_zeros(len(x), self.out_features)
        if self._x is None or self._step is None:
            return f
        for start in range(0, len(self), self.chunk):
            kept = slice(start, min(start + self.chunk, len(self)))
            f -= self.similarities(x, self._x[kept]) @ self._step[kept]
        return f

    def step(self, x: Float[Tensor, "batch in_features"], labels: Int[Tensor, " batch"], lr: float) -> float:
        """One step of descent on the mean cross entropy of a batch; returns the loss before it.

        Raises:
            ValueError: for a batch that is larger than the capacity.
        """
        f = self.predict(x)
        target = F.one_hot(labels, self.out_features).to(f)
        self.append(x, lr / len(x) * (f.softmax(-1) - target))
        return F.cross_entropy(f, labels).item()

    def append(self, x: Float[Tensor, "batch in_features"], step: Float[Tensor, "batch out_features"]) -> None:
        """Adds examples with their steps `lr_i delta_i`, in place of the oldest where the capacity is reached."""
        if self.capacity is not None and len(x) > self.capacity:
            raise ValueError(f"a batch must not be larger than the capacity {self.capacity}, got {len(x)}")
        if self._x is None or self._step is None:
            room = self.capacity or max(len(x), 1024)
            self._x, self._step = x.new_empty(room, x.shape[1]), x.new_empty(room, self.out_features)
        if self.capacity is None and self._seen + len(x) > len(self._x):
            more = max(len(x), len(self._x))  # doubles: what is kept is copied a constant number of times
            self._x = torch.cat([self._x, self._x.new_empty(more, x.shape[1])])
            self._step = torch.cat([self._step, self._step.new_empty(more, self.out_features)])
        places = torch.arange(self._seen, self._seen + len(x), device=x.device) % len(self._x)
        self._x[places], self._step[places] = x, step
        self._seen += len(x)

    def adapt(
        self,
        support: Float[Tensor, "tasks examples in_features"],
        support_labels: Int[Tensor, "tasks examples"],
        queries: Float[Tensor, "tasks queries in_features"],
        inner_lr: float,
        inner_steps: int = 1,
    ) -> Float[Tensor, "tasks queries out_features"]:
        """Values for the queries after each task's own steps on its support; what was learnt before stays as it was."""
        tasks = len(support)
        within, across = self.similarities(support, support), self.similarities(queries, support)
        start = self.predict(support.flatten(0, 1)).unflatten(0, (tasks, -1))
        target = F.one_hot(support_labels, self.out_features).to(start)
        total = torch.zeros_like(start)
        for _ in range(inner_steps):
            f = start - within @ total
            total = total + inner_lr / support.shape[1] * (f.softmax(-1) - target)
        return self.predict(queries.flatten(0, 1)).unflatten(0, (tasks, -1)) - across @ total
