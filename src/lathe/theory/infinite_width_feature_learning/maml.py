"""First-order MAML on linear networks with one hidden layer: all tasks of a batch at once, no parameters copied.

For finite networks and for their infinitely wide limit alike, which is such a network of width `in + out`. Yang and Hu,
2020, arXiv 2011.14522, section 7.2 and appendix D; the algorithm of Finn, Abbeel and Levine, 2017, arXiv 1703.03400.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lathe.theory.infinite_width_feature_learning.limits import LinearNetwork

__all__ = ["Adapted", "first_order_maml"]


@dataclass(frozen=True)
class Adapted:
    """How a network did on the queries of a batch of tasks after adapting to each task's support.

    Attributes:
        loss: cross entropy, the mean over tasks and queries.
        accuracy: share of queries told right, of each task.
        outputs: for the queries.
    """

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, " tasks"]
    outputs: Float[Tensor, "tasks queries out_features"]


@torch.no_grad()
def first_order_maml(
    model: LinearNetwork,
    support: Float[Tensor, "tasks examples in_features"],
    support_labels: Int[Tensor, "tasks examples"],
    queries: Float[Tensor, "tasks queries in_features"],
    query_labels: Int[Tensor, "tasks queries"],
    inner_lr: float,
    *,
    inner_steps: int = 1,
    backward: bool = True,
) -> Adapted:
    """Adapts to each task by SGD on its support, and adds the gradient of the queries' mean loss to `.grad`.

    First order: the gradient at the adapted parameters is taken for that at the model's. An inner step changes `U` by a
    matrix of rank `examples`, which is kept in factors: no task has a copy of it. Follow with clipping and any
    optimiser, or with `backward=False` to test.

    Args:
        model: finite or infinite.
        support, support_labels: what each task adapts to.
        queries, query_labels: what it is judged on.
        inner_lr: rate of the inner steps, on all of `U, V, b`.
        inner_steps: how many.
        backward: whether to compute gradients.

    Raises:
        ValueError: where tasks or features of the arguments differ, for a negative `inner_lr` or `inner_steps`.
    """
    in_features = model.U.shape[1]
    for name, value in (("support", support), ("queries", queries)):
        if value.ndim != 3 or value.shape[2] != in_features or len(value) != len(support):
            raise ValueError(f"{name} must be ({len(support)}, examples, {in_features}), got {tuple(value.shape)}")
    if support_labels.shape != support.shape[:2] or query_labels.shape != queries.shape[:2]:
        told = f"{tuple(support_labels.shape)} and {tuple(query_labels.shape)}"
        raise ValueError(f"labels must match support and queries, one a row, got {told}")
    if inner_lr < 0 or inner_steps < 0:
        raise ValueError(f"inner_lr and inner_steps must not be negative, got {inner_lr} and {inner_steps}")
    # T tasks, S examples of the support, Q queries, D in, H width, C out; e_TSH sums over inner steps.
    U, alpha = model.U, model.alpha
    beta = 0.0 if model.b is None else model.beta
    shift = 0.0 if model.b is None else beta * model.b
    h_TSH, h_TQH = support @ U.mT + shift, queries @ U.mT + shift
    V_TCH = model.V.expand(len(support), -1, -1)
    if inner_steps:
        gram_TSS = support @ support.mT + beta**2
        gram_TQS = queries @ support.mT + beta**2
        e_TSH = torch.zeros_like(h_TSH)
        for _ in range(inner_steps):
            now_TSH = torch.baddbmm(h_TSH, gram_TSS, e_TSH, alpha=-inner_lr)
            delta_TSC = alpha * _error(alpha * now_TSH @ V_TCH.mT, support_labels) / support.shape[1]
            e_TSH.baddbmm_(delta_TSC, V_TCH)
            V_TCH = torch.baddbmm(V_TCH, delta_TSC.mT, now_TSH, alpha=-inner_lr)
        h_TQH = torch.baddbmm(h_TQH, gram_TQS, e_TSH, alpha=-inner_lr)
    f_TQC = alpha * h_TQH @ V_TCH.mT
    if backward:
        delta_TQC = alpha * _error(f_TQC, query_labels) / query_labels.numel()
        back_TQH = delta_TQC @ V_TCH
        _add(model.V, delta_TQC.flatten(0, 1).mT @ h_TQH.flatten(0, 1))
        _add(model.U, back_TQH.flatten(0, 1).mT @ queries.flatten(0, 1))
        if model.b is not None:
            _add(model.b, beta * back_TQH.sum((0, 1)))
    loss = torch.nn.functional.cross_entropy(f_TQC.flatten(0, 1), query_labels.flatten())
    accuracy = (f_TQC.argmax(-1) == query_labels).to(f_TQC.dtype).mean(1)
    return Adapted(loss, accuracy, f_TQC)


def _error(f: Tensor, labels: Tensor) -> Tensor:
    """Softmax less the one-hot labels."""
    return f.softmax(-1).scatter_add_(-1, labels.unsqueeze(-1), -torch.ones_like(f[..., :1]))


def _add(parameter: torch.nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
