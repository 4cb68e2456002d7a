"""Curvature of a loss: Hessian-vector products, traces of its blocks, and quadratic forms, never the Hessian itself.

`Hessian` multiplies by the second derivative of a mean loss over batches with respect to chosen weights, at the price
of about one more backward pass a product (Pearlmutter, "Fast exact multiplication by the Hessian", 1994).
`hessian_trace` estimates the trace of every diagonal block at once from random signs (Hutchinson, 1990):
`Tr H_ii = E[v_i . (H v)_i]`, because the cross terms `v_i . H_ij v_j` have mean zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lathe.core.example import call

__all__ = ["Hessian", "Trace", "hessian_trace"]

Batches = Sequence[Any]
"""Batches `(inputs, *targets)`; `inputs` is a tensor, a tuple of arguments or a dict of keyword arguments."""


class Trace(NamedTuple):
    """An estimate of a trace."""

    mean: float
    stderr: float
    """Standard error of the mean over probes; infinite after a single probe."""
    probes: int


class Hessian:
    """The Hessian of a mean loss with respect to some of a network's parameters, as a linear operator.

    The loss is `loss_fn(model(inputs), *targets)`, a mean over the batch's samples; batches are weighted by their
    number of samples. The network runs in evaluation mode, and is left as it was, gradients included.

    Args:
        model: any network that can be differentiated twice; attention runs on PyTorch's math backend meanwhile.
        loss_fn: `loss_fn(output, *targets)` -> scalar.
        batches: batches `(inputs, *targets)`, kept and walked through at each product.
        parameters: names of the parameters to differentiate by, as in `named_parameters`; None takes all that require
            a gradient. A parameter that the loss does not depend on has zero rows and columns.

    Raises:
        ValueError: where `batches` is empty, or `parameters` names none or an unknown one.

    Example:
        >>> hessian = Hessian(nn.Linear(2, 1, bias=False), nn.functional.mse_loss, [(torch.eye(2), torch.zeros(2, 1))])
        >>> hessian.product([torch.ones(1, 2)])[0]
        tensor([[1., 1.]])
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        batches: Iterable[Any],
        parameters: Sequence[str] | None = None,
    ) -> None:
        self.model, self.loss_fn, self.batches = model, loss_fn, list(batches)
        if not self.batches:
            raise ValueError("batches must hold at least one batch (inputs, *targets), got none")
        named = dict(model.named_parameters())
        names = [name for name, each in named.items() if each.requires_grad] if parameters is None else list(parameters)
        unknown = [name for name in names if name not in named]
        if unknown or not names:
            raise ValueError(f"parameters must name parameters of the model, got {unknown or 'none'}")
        self.parameters: dict[str, Tensor] = {name: named[name] for name in names}

    @property
    def size(self) -> int:
        """Number of rows, which is that of columns."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """`H v`: one tensor a parameter, of its shape.

        Args:
            vectors: a tensor a parameter, of its shape.
        """
        return [each[0] for each in self.products([vector[None] for vector in vectors])]

    def products(self, vectors: Sequence[Tensor], *, vectorize: bool = False) -> list[Tensor]:
        """`H v` for several `v` at once: one forward and one backward pass a batch serve them all.

        Args:
            vectors: a tensor a parameter, of shape `(probes, *parameter.shape)`.
            vectorize: run the second backward passes of all probes as one (`vmap`), which pays off where a network's
                operations are small, such as narrow MLPs; convolutions on a CPU are faster one after the other.
        """
        parameters = list(self.parameters.values())
        if len(vectors) != len(parameters) or any(v.shape[1:] != p.shape for v, p in zip(vectors, parameters)):
            raise ValueError(
                "vectors must hold, for each parameter, a tensor (probes, *parameter.shape), "
                f"got shapes {[tuple(v.shape) for v in vectors]} for {[tuple(p.shape) for p in parameters]}"
            )
        total = [torch.zeros_like(vector) for vector in vectors]
        for weight, gradient in self._gradients():
            curved = {index: each for index, each in enumerate(gradient) if each is not None and each.requires_grad}
            if not curved:
                continue  # the gradient does not depend on the parameters: the loss is linear in them
            for probe in [slice(None)] if vectorize else range(vectors[0].shape[0]):
                products = torch.autograd.grad(
                    tuple(curved.values()),
                    parameters,
                    grad_outputs=tuple(vectors[index][probe] for index in curved),
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=vectorize,
                )
                for sum_, product in zip(total, products):
                    if product is not None:
                        sum_[probe].add_(product, alpha=weight)
        return total

    def gradient(self) -> list[Tensor]:
        """The mean loss's gradient, a tensor a parameter."""
        total = [torch.zeros_like(parameter) for parameter in self.parameters.values()]
        for weight, gradient in self._gradients():
            for sum_, each in zip(total, gradient):
                if each is not None:
                    sum_.add_(each.detach(), alpha=weight)
        return total

    def forms(self, vectors: Sequence[Mapping[str, Tensor]]) -> Float[Tensor, "n n"]:
        """All quadratic forms `e_i^T H e_j`, from one product a vector.

        Args:
            vectors: `n` sparse vectors; each maps parameter names to tensors of their shapes and is zero elsewhere.
        """
        names = list(self.parameters)
        stacked = [torch.zeros(len(vectors), *parameter.shape, dtype=parameter.dtype, device=parameter.device)
                   for parameter in self.parameters.values()]  # fmt: skip
        for row, vector in enumerate(vectors):
            for name, value in vector.items():
                if name not in self.parameters:
                    raise ValueError(f"vectors must name parameters of this Hessian, got {name!r}")
                stacked[names.index(name)][row] = value
        products = self.products(stacked)
        form = sum(left.flatten(1) @ right.flatten(1).T for left, right in zip(stacked, products))
        assert isinstance(form, Tensor)
        return (form + form.T) / 2

    def _gradients(self) -> Iterator[tuple[float, tuple[Tensor | None, ...]]]:
        """For each batch its share of all samples, and the gradient with the graph to differentiate it again."""
        sizes = [_samples(batch) for batch in self.batches]
        parameters = list(self.parameters.values())
        with _ready(self.model, parameters):
            for batch, size in zip(self.batches, sizes):
                inputs, *targets = batch
                with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                    loss = self.loss_fn(call(self.model, inputs), *targets)
                    if not (isinstance(loss, Tensor) and loss.ndim == 0):
                        raise ValueError(f"loss_fn must return a scalar tensor, got {_describe(loss)}")
                    gradient = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
                yield size / sum(sizes), gradient


def hessian_trace(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Any],
    params: Literal["per_layer", "per_parameter"] | Mapping[str, Sequence[str]] = "per_layer",
    probes: int = 50,
    seed: int = 0,
    tol: float | None = None,
    *,
    probe: Literal["joint", "block"] = "joint",
    at_once: int = 10,
    vectorize: bool = False,
) -> dict[str, Trace]:
    """Traces of the diagonal blocks of the Hessian, by Hutchinson's estimator with random signs.

    Args:
        model, loss_fn, batches: as for `Hessian`.
        params: what a block is: all parameters that one module owns itself ("per_layer", by the module's name), each
            parameter, or a mapping from block names to parameter names.
        probes: how many sign vectors at most.
        seed: of the signs.
        tol: stop as soon as every block's standard error is below `tol * |mean|` (after `at_once` probes at the
            earliest); None draws all probes.
        probe: "joint" draws signs for all blocks together and gets all traces from one product; "block" uses a product
            a block, which leaves out the cross terms and so needs fewer probes, each as many times dearer as there are
            blocks.
        at_once: probes that share a forward and a backward pass, and after which the stopping rule is asked.
        vectorize: as for `Hessian.products`.

    Returns:
        For each block `Trace(mean, stderr, probes)`.

    Raises:
        ValueError: where `probes`, `at_once` or `tol` is not positive, or a block is empty.
    """
    if probes < 1 or at_once < 1:
        raise ValueError(f"probes and at_once must be at least 1, got {probes} and {at_once}")
    if tol is not None and tol <= 0:
        raise ValueError(f"tol must be positive, got {tol}")
    if probe not in ("joint", "block"):
        raise ValueError(f"probe must be 'joint' or 'block', got {probe!r}")
    blocks = _blocks(model, params)
    hessian = Hessian(model, loss_fn, batches, [name for names in blocks.values() for name in names])
    position = {name: index for index, name in enumerate(hessian.parameters)}
    generator = torch.Generator().manual_seed(seed)
    samples: dict[str, list[float]] = {name: [] for name in blocks}
    done = 0
    while done < probes:
        count = min(at_once, probes - done)
        signs = [_signs(count, parameter, generator) for parameter in hessian.parameters.values()]
        for members in [list(blocks)] if probe == "joint" else [[name] for name in blocks]:
            active = {position[name] for block in members for name in blocks[block]}
            vectors = [sign if index in active else torch.zeros_like(sign) for index, sign in enumerate(signs)]
            products = hessian.products(vectors, vectorize=vectorize)
            for block in members:
                values = sum(
                    (signs[position[name]] * products[position[name]]).flatten(1).sum(1, dtype=torch.float64)
                    for name in blocks[block]
                )
                assert isinstance(values, Tensor)
                samples[block] += values.tolist()
        done += count
        traces = {name: _trace(values) for name, values in samples.items()}
        if tol is not None and all(each.stderr <= tol * abs(each.mean) for each in traces.values()):
            break
    return traces


def _trace(samples: list[float]) -> Trace:
    values = torch.tensor(samples, dtype=torch.float64)
    stderr = float(values.std() / len(samples) ** 0.5) if len(samples) > 1 else float("inf")
    return Trace(float(values.mean()), stderr, len(samples))


def _signs(count: int, parameter: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, (count, *parameter.shape), generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(device=parameter.device, dtype=parameter.dtype)


def _blocks(model: nn.Module, params: str | Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    if isinstance(params, Mapping):
        blocks = {name: list(members) for name, members in params.items()}
    elif params == "per_parameter":
        blocks = {name: [name] for name, each in model.named_parameters() if each.requires_grad}
    elif params == "per_layer":
        blocks = {}
        for name, each in model.named_parameters():
            if each.requires_grad:
                blocks.setdefault(name.rpartition(".")[0], []).append(name)
    else:
        raise ValueError(f"params must be 'per_layer', 'per_parameter' or a mapping of blocks, got {params!r}")
    empty = [name for name, members in blocks.items() if not members]
    if empty or not blocks:
        raise ValueError(f"params must give blocks of at least one parameter, got {empty or 'no block'}")
    return blocks


@contextmanager
def _ready(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Evaluation mode, and the parameters differentiable; afterwards as before."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for module, _ in modes:
        module.training = False
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, mode in modes:
            module.training = mode


def _samples(batch: Any) -> int:
    """Number of samples of a batch: the first dimension of its first tensor."""
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise ValueError("a batch must hold a tensor with a first dimension of samples, got none")


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
