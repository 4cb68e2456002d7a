"""The empirical NTK of a finite network, in blocks of inputs, from what goes into its layers and what comes back.

The gradient of an output by the weights of a linear layer is an outer product, of the layer's input and of the gradient
by its output: inner products of such gradients factorise and need no gradient by weights at all. For convolutions the
cheaper of both ways is taken; all other parameters go through Jacobians of `torch.func`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

__all__ = ["Rates", "empirical_ntk"]

Rates: TypeAlias = Mapping[str, float | Tensor]

#: Numbers that are kept of one block of inputs (256 MiB in float64).
_BLOCK = 1 << 25


def empirical_ntk(
    model: nn.Module,
    x1: Float[Tensor, "n *features"],
    x2: Float[Tensor, "m *features"] | None = None,
    *,
    outputs: str = "trace",
    parameters: Sequence[str] | None = None,
    rates: Rates | None = None,
    block: int | None = None,
) -> Float[Tensor, "n m *outputs"]:
    """`sum_mu rate_mu (dz_i(x1_a) / dtheta_mu) (dz_j(x2_b) / dtheta_mu)` of this network, as it is.

    Outputs are flattened to `(n, outputs)`. The network has to treat its inputs one by one.

    Args:
        model: any module; it is not changed.
        x1, x2: inputs; x1 with itself where x2 is left out.
        outputs: "trace": the mean over outputs of the kernel of each with itself, (n, m), which for a wide network is
            near its infinitely wide NTK; "diagonal": of each output with itself, (n, m, outputs); "full":
            (n, m, outputs, outputs).
        parameters: names of those that count; by default all that require gradients.
        rates: learning rates by name, numbers or tensors; 1 by default.
        block: inputs that are worked on at a time; by default so many that some hundred MB suffice.

    Raises:
        ValueError: for an unknown `outputs`, names that are no parameters, rates below zero, or a network that mixes
            the inputs of a batch (BatchNorm while training).
    """
    if outputs not in ("trace", "full", "diagonal"):
        raise ValueError(f"outputs must be 'trace', 'diagonal' or 'full', got {outputs!r}")
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if any(m.training and isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise ValueError("model mixes the inputs of a batch (BatchNorm while training); call model.eval() first")
    known = dict(model.named_parameters())
    unknown = (set(parameters or ()) | set(rates or ())) - set(known)
    if unknown:
        raise ValueError(
            f"parameters and rates must name parameters of model, these are no parameters: {', '.join(sorted(unknown))}"
        )
    wanted = [name for name, p in known.items() if (p.requires_grad if parameters is None else name in parameters)]
    chosen: dict[str, float | Tensor] = {name: (rates or {}).get(name, 1.0) for name in wanted}
    if any(bool((torch.as_tensor(rate) < 0).any()) for rate in chosen.values()):
        raise ValueError("rates must not be negative")
    chosen = {name: rate for name, rate in chosen.items() if isinstance(rate, Tensor) or rate != 0}
    if not chosen:
        raise ValueError("model has no parameters that count")
    gradients = _Gradients(model, chosen, outputs, x1[:1])
    size = block or gradients.block
    rows: list[list[Tensor]] = []
    for i, left in _blocks(gradients, x1, size):
        row = []
        if x2 is None:
            for j in range(0, i, size):  # known already, from the other side
                known_block = rows[j // size][i // size].transpose(0, 1)
                row.append(known_block.transpose(2, 3) if outputs == "full" else known_block)
            row.append(_kernel(left, left, outputs))
            row += [_kernel(left, right, outputs) for _, right in _blocks(gradients, x1, size, i + size)]
        else:
            row = [_kernel(left, right, outputs) for _, right in _blocks(gradients, x2, size)]
        rows.append(row)
    return torch.cat([torch.cat(row, 1) for row in rows])


@dataclass(frozen=True)
class _Factors:
    """Gradients by a layer's weights and biases: at each position what goes in, times what comes back.

    Attributes:
        h: (inputs, positions, fan-in).
        d: (outputs, inputs, positions, units).
        weight, bias: learning rates, zero for what does not count.
    """

    h: Tensor
    d: Tensor
    weight: float
    bias: float


Parts: TypeAlias = list[_Factors | Tensor]


def _blocks(gradients: _Gradients, x: Tensor, size: int, start: int = 0) -> Iterator[tuple[int, Parts]]:
    for i in range(start, len(x), size):
        yield i, gradients(x[i : i + size])


def _kernel(left: Parts, right: Parts, outputs: str) -> Tensor:
    return sum((_part(a, b, outputs) for a, b in zip(left[1:], right[1:])), _part(left[0], right[0], outputs))


def _part(a: _Factors | Tensor, b: _Factors | Tensor, outputs: str) -> Tensor:
    if isinstance(a, Tensor):  # gradients, (outputs, inputs, parameters)
        assert isinstance(b, Tensor)
        return _inner(a, b, outputs)
    assert isinstance(b, _Factors)
    n, p, fan_in = a.h.shape
    m = len(b.h)
    if p == 1:
        inputs = a.weight * (a.h[:, 0] @ b.h[:, 0].mT) + a.bias
        back = _inner(a.d.squeeze(2), b.d.squeeze(2), outputs)
        return inputs.reshape(n, m, *(1,) * (back.ndim - 2)) * back
    # Only for traces: sums over pairs of positions, a few inputs at a time.
    k = len(a.d)
    flat_h, flat_d = b.h.reshape(m * p, fan_in), b.d.permute(1, 2, 0, 3).reshape(m * p, -1)
    rows = []
    step = max(1, (1 << 23) // (m * p * p))
    for h, d in zip(a.h.split(step), a.d.permute(1, 2, 0, 3).split(step)):
        product = (h.flatten(0, 1) @ flat_h.mT).mul_(a.weight).add_(a.bias)
        product.mul_(d.reshape(len(h) * p, -1) @ flat_d.mT)
        rows.append(product.reshape(len(h), p, m, p).sum((1, 3)) / k)
    return torch.cat(rows)


def _inner(a: Tensor, b: Tensor, outputs: str) -> Tensor:
    """Inner products over the last axis of (outputs, n, P) and (outputs, m, P)."""
    k, n, _ = a.shape
    if outputs == "full":
        return (a.flatten(0, 1) @ b.flatten(0, 1).mT).reshape(k, n, k, -1).permute(1, 3, 0, 2)
    each = torch.bmm(a, b.mT)
    return each.sum(0) / k if outputs == "trace" else each.permute(1, 2, 0)


class _Gradients:
    """What the kernel of a block of inputs is made of: factors for layers, Jacobians for all other parameters."""

    def __init__(self, model: nn.Module, rates: dict[str, float | Tensor], outputs: str, example: Tensor) -> None:
        self.model, self.rates, self.outputs = model, rates, outputs
        self.layers: dict[str, nn.Linear | nn.Conv2d] = {}
        self.others = dict.fromkeys(rates)
        self.owners = Counter(id(value) for part in model.modules() for value in part.parameters(recurse=False))
        for name, module in model.named_modules():
            if not _is_plain(module) or not self._owns(name, module):
                continue
            self.layers[name] = module  # type: ignore[assignment]
            for key in ("weight", "bias"):
                self.others.pop(_join(name, key), None)
        self._check_layers(example)
        self.block = max(1, _BLOCK // max(1, sum(_numbers(part) for part in self(example))))

    def __call__(self, x: Tensor) -> Parts:
        parts: Parts = []
        for each in self._of_layers(x, self.outputs) if self.layers else []:
            parts += each.result()
        if self.others:
            parts.append(self._jacobian(x))
        return parts

    def _owns(self, name: str, module: nn.Module) -> bool:
        """Whether the layer's parameters are wanted, with rates that are numbers, and belong to nothing else."""
        names = [_join(name, key) for key, value in module.named_parameters(recurse=False) if value is not None]
        rates = [self.rates[each] for each in names if each in self.rates]
        shared = any(self.owners[id(value)] > 1 for value in module.parameters(recurse=False))
        return bool(rates) and not shared and not any(isinstance(rate, Tensor) for rate in rates)

    def _check_layers(self, example: Tensor) -> None:
        """Keeps as layers those alone whose parts give the whole gradient of their parameters."""
        if not self.layers:
            return
        found = {each.name: each for each in self._of_layers(example, "one")}
        values = dict(self.model.named_parameters())
        state = {each: values[each].detach().requires_grad_() for name in self.layers for each in self._names(name)}
        with torch.enable_grad():
            out = functional_call(self.model, state, (example,)).flatten(1)
            gradients = torch.autograd.grad(out[:, 0].sum(), list(state.values()), allow_unused=True)
        whole = dict(zip(state, gradients))
        for name in list(self.layers):
            if name not in found or not found[name].gives(
                {key: whole.get(_join(name, key)) for key in ("weight", "bias")}
            ):
                del self.layers[name]
                self.others.update(dict.fromkeys(self._names(name)))

    def _names(self, name: str) -> list[str]:
        """The layer's parameters that are wanted, weights first."""
        return [each for each in (_join(name, "weight"), _join(name, "bias")) if each in self.rates]

    def _of_layers(self, x: Tensor, way: str) -> list[_Collected]:
        """Each layer's gradients, for kernels of the `outputs` that `way` says; "one": for the first output alone."""
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.layers}

        def keep(name: str) -> Any:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
                seen[name].append((arguments[0].detach(), output))
                return output.clone()  # what follows may write into its input

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in self.layers.items()]
        state = {name: value.detach().requires_grad_() for name, value in self.model.named_parameters()}
        try:
            with torch.enable_grad():
                out = functional_call(self.model, state, (x,)).flatten(1)
        finally:
            for handle in handles:
                handle.remove()
        k = 1 if way == "one" else out.shape[1]
        collected: list[_Collected] = []
        for name, calls in seen.items():
            if len(calls) == 1 and len(calls[0][0]) == len(x):
                rates = [float(self.rates.get(_join(name, key), 0.0)) for key in ("weight", "bias")]
                collected.append(_Collected(name, self.layers[name], *calls[0], rates, k, way))
        if collected:
            ends = [each.end for each in collected]
            for i in range(k):
                gradients = torch.autograd.grad(out[:, i].sum(), ends, retain_graph=True, allow_unused=True)
                for each, gradient in zip(collected, gradients):
                    each.add(i, gradient)
        return collected

    def _jacobian(self, x: Tensor) -> Tensor:
        values = {name: value.detach() for name, value in self.model.named_parameters()}
        state = {name: values[name] for name in self.others}

        def single(state: dict[str, Tensor], one: Tensor) -> Tensor:
            return functional_call(self.model, state, (one.unsqueeze(0),)).flatten()

        jacobians = vmap(jacrev(single), (None, 0))(state, x)
        parts = []
        for name, value in jacobians.items():
            root = torch.as_tensor(self.rates[name], dtype=value.dtype, device=value.device).sqrt()
            parts.append((value * root).flatten(2))
        return torch.cat(parts, -1).transpose(0, 1)


class _Collected:
    """A layer's gradients, an output at a time: kept as factors, or multiplied out at once where that is cheaper."""

    def __init__(
        self,
        name: str,
        module: nn.Linear | nn.Conv2d,
        entered: Tensor,
        end: Tensor,
        rates: list[float],
        outputs: int,
        way: str,
    ) -> None:
        self.name, self.module, self.end = name, module, end
        self.weight, self.bias = rates
        if isinstance(module, nn.Linear):
            self.h = entered.reshape(len(entered), -1, entered.shape[-1])
        else:
            assert not isinstance(module.padding, str)
            self.h = F.unfold(entered, module.kernel_size, module.dilation, module.padding, module.stride).mT
        n, p, fan_in = self.h.shape
        units = end.numel() // max(1, n * p)
        apart = p * p * (fan_in + outputs * units)  # operations for a pair of inputs, against those of whole gradients
        factors = p == 1 or (way == "trace" and apart < outputs * fan_in * units)
        self.kept: list[Tensor] = []
        self.whole: Tensor | None = None
        if way == "one" or not factors:
            self.whole = self.h.new_empty(outputs, n, units, fan_in)
            self.sums = self.h.new_empty(outputs, n, units)

    def add(self, output: int, gradient: Tensor | None) -> None:
        """`gradient` is that of the sum of one output by the layer's output."""
        d = torch.zeros_like(self.end) if gradient is None else gradient
        # (inputs, positions, units), whatever the layer
        d = d.reshape(len(d), -1, d.shape[-1]) if isinstance(self.module, nn.Linear) else d.flatten(2).mT
        if self.whole is None:
            self.kept.append(d)
            return
        if self.weight:
            torch.bmm(d.mT, self.h, out=self.whole[output])
        if self.bias:
            torch.sum(d, 1, out=self.sums[output])

    def result(self) -> Parts:
        if self.whole is None:
            return [_Factors(self.h, torch.stack(self.kept), self.weight, self.bias)]
        pairs = ((self.weight, self.whole.flatten(2)), (self.bias, self.sums))
        return [part if rate == 1 else part * rate**0.5 for rate, part in pairs if rate]

    def gives(self, gradients: dict[str, Tensor | None]) -> bool:
        """Whether these are the gradients of the first output by the whole weight and bias."""
        assert self.whole is not None
        for rate, key, made in ((self.weight, "weight", self.whole), (self.bias, "bias", self.sums)):
            expected = gradients[key]
            if rate:
                known = torch.zeros_like(made[0, 0]) if expected is None else expected.reshape(made.shape[2:])
                slack = 1e-4 * float(known.abs().max()) + 1e-12
                if not torch.allclose(made[0].sum(0), known, rtol=1e-3, atol=slack):
                    return False
        return True


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _is_plain(module: nn.Module) -> bool:
    if type(module) is nn.Linear:
        return True
    return type(module) is nn.Conv2d and (
        module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    )


def _numbers(part: _Factors | Tensor) -> int:
    return part.numel() if isinstance(part, Tensor) else part.h.numel() + part.d.numel()
