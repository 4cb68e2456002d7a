"""What a network costs: parameters, bytes stored, floating-point operations, time and memory of a forward.

`print(measure(model, example))` before and after a change tells what was won. Bytes are those that really get stored:
shared tensors once, quantised and packed formats as they are.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import log2, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lathe.core.example import call
from lathe.core.modes import evaluating

__all__ = ["Size", "flop_formula", "measure", "saved_bytes", "saved_for_backward_bytes", "stored_bytes"]


@dataclass(frozen=True)
class Size:
    """What `measure` found; `str(size)` is a table."""

    parameters: int
    """Number of parameters; shared ones count once."""
    trainable: int
    """Those of them that require a gradient."""
    stored_bytes: int
    """Bytes of parameters and persistent buffers as they are stored."""
    flops: int
    """Floating-point operations of a forward; a multiplication and an addition are two."""
    uncounted: tuple[str, ...]
    """Custom operators that ran and have no formula; they count as 0 in `flops`."""
    latency: float
    """Median time of a forward, in seconds."""
    latency_spread: float
    """Interquartile range of the times, in seconds."""
    peak_bytes: int
    """Most bytes that tensors made by a forward hold at one time; parameters and inputs are not in it."""
    repeats: int
    device: str
    threads: int

    def __str__(self) -> str:
        flops = _unit(self.flops, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))
        if self.uncounted:
            flops += f" without {', '.join(self.uncounted)}"
        where = self.device if self.device != "cpu" else f"cpu, {self.threads} thread{'s' * (self.threads > 1)}"
        rows = {
            "parameters": f"{self.parameters:,} ({self.trainable:,} trainable)",
            "stored": _unit(self.stored_bytes, 1024, _BYTES),
            "operations": flops,
            "latency": f"{1e3 * self.latency:.3g} ms, interquartile range {1e3 * self.latency_spread:.2g} ms"
            f" ({self.repeats} runs, {where})",
            "peak memory": _unit(self.peak_bytes, 1024, _BYTES),
        }
        return "\n".join(f"{name:<12} {value}" for name, value in rows.items())


_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")


def measure(model: nn.Module, example: Any, *, repeats: int = 20, warmup: int = 3, batch: int | None = None) -> Size:
    """Size and cost of `model` on `example`, in evaluation mode and without gradients; the model is left as it was.

    Args:
        model: a network, on the device where it shall be measured.
        example: what it takes: a tensor, a tuple of arguments, or a dict of keyword arguments, on the same device.
        repeats: forwards that are timed; the median and the interquartile range are reported.
        warmup: forwards before those, which are not timed.
        batch: takes the first sample of every tensor of `example` this many times; by default the example as it is.

    Raises:
        TypeError: where `model` is no `nn.Module`.
        ValueError: where `repeats` or `batch` is below 1, or `warmup` below 0.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    for name, value, least in (("repeats", repeats, 1), ("warmup", warmup, 0), ("batch", batch, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if batch is not None:
        example = tree_map(lambda leaf: _repeated(leaf, batch), example)
    device = next((t.device for t in (*model.parameters(), *tree_leaves(example)) if isinstance(t, Tensor)), None)
    device = device or torch.device("cpu")
    parameters = [*model.parameters()]  # each once, also where shared
    with evaluating(model), torch.no_grad():
        times = []
        for run in range(warmup + repeats):
            start = _now(device)
            call(model, example)
            if run >= warmup:
                times.append(_now(device) - start)
        flops, uncounted = _flops(model, example)
        peak = _peak_bytes(model, example, device)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if repeats > 1 else (times[0],) * 3
    return Size(
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        stored_bytes=stored_bytes(model),
        flops=flops,
        uncounted=uncounted,
        latency=statistics.median(times),
        latency_spread=high - low,
        peak_bytes=peak,
        repeats=repeats,
        device=str(device),
        threads=torch.get_num_threads(),
    )


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and persistent buffers of `model` as they are stored; shared storages count once.

    A module with a method `stored_bytes()` counts itself, with all that is inside it. Quantised tensors, sparse tensors
    and the weights that `torch.ao` packs out of sight count with what they hold.
    """
    total = 0
    tensors: list[Tensor] = []
    seen: set[int] = set()

    def visit(module: nn.Module) -> None:
        nonlocal total
        if id(module) in seen:
            return
        seen.add(id(module))
        own = getattr(module, "stored_bytes", None)
        if callable(own):
            total += int(own())
            return
        tensors.extend(parameter for parameter in module._parameters.values() if parameter is not None)
        hidden = module._non_persistent_buffers_set
        tensors.extend(b for name, b in module._buffers.items() if b is not None and name not in hidden)
        packed = getattr(module, "_weight_bias", None)  # torch.ao.nn.quantized
        if callable(packed):
            tensors.extend(tensor for tensor in packed() if tensor is not None)
            return  # its children hold the same again
        for child in module.children():
            visit(child)

    visit(model)
    return total + _bytes_of(tensors)


def saved_bytes(function: Callable[[], Any], *, without: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward of what `function` computes; a storage counts once.

    Args:
        function: runs a forward; it is called once.
        without: tensors whose storages do not count, such as parameters, which are held anyway.

    Not seen: what a `torch.autograd.Function` keeps otherwise than by `save_for_backward`.
    """
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # holding it keeps its storage from being taken by another tensor
        return tensor

    held = {part.untyped_storage()._cdata for tensor in without for part in _parts(tensor)}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    sizes = {part.untyped_storage()._cdata: part.untyped_storage().nbytes() for t in kept for part in _parts(t)}
    del result
    return sum(size for storage, size in sizes.items() if storage not in held)


def saved_for_backward_bytes(model: nn.Module, example: Any) -> int:
    """Bytes that a forward of `model` on `example` keeps for its backward, besides the parameters."""
    return saved_bytes(lambda: call(model, example), without=model.parameters())


def flop_formula(*operators: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator: how many floating-point operations a custom operator takes.

    The function gets the operator's arguments with every tensor replaced by its shape, and the shape of the result as
    `out_shape`:

        @flop_formula(torch.ops.lathe.product)
        def _(left_shape, right_shape, *, out_shape, **_) -> int: ...

    Raises:
        TypeError: where something else than an operator packet (`torch.ops.namespace.name`) is given.
        ValueError: where an operator has a formula already.
    """
    for operator in operators:
        if not isinstance(operator, torch._ops.OpOverloadPacket):
            raise TypeError(f"operators must be like torch.ops.namespace.name, got {operator!r}")
        if operator in _FORMULAS or operator in flop_registry:
            raise ValueError(f"{operator} has a formula already")

    def register(formula: Callable[..., int]) -> Callable[..., int]:
        _FORMULAS.update(dict.fromkeys(operators, formula))
        return formula

    return register


_FORMULAS: dict[Any, Callable[..., int]] = {}


@flop_formula(torch.ops.aten._fft_c2c)
def _complex_fft(shape, axes, *_, out_shape, **__) -> int:
    # The usual count for a fast Fourier transform of N points: 5 N log2 N, half of it where one side is real.
    return round(5 * prod(shape) * log2(max(2, prod(shape[axis] for axis in axes))))


@flop_formula(torch.ops.aten._fft_r2c)
def _real_fft(shape, axes, *_, out_shape, **__) -> int:
    return _complex_fft(shape, axes, out_shape=out_shape) // 2


@flop_formula(torch.ops.aten._fft_c2r)
def _inverse_real_fft(shape, axes, *_, out_shape, **__) -> int:
    return _complex_fft(out_shape, axes, out_shape=out_shape) // 2


def _flops(model: nn.Module, example: Any) -> tuple[int, tuple[str, ...]]:
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    counter.mod_tracker = _Untracked()  # type: ignore[assignment]
    names = _CustomOperators()
    # The fused inference path of nn.MultiheadAttention has no formula.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with counter, names:
            call(model, example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops(), tuple(sorted(names.unknown))


class _Untracked:
    """In the place of the tracker of modules, which breaks on a view of a parameter that was made without gradients."""

    parents = ("Global",)

    def __enter__(self) -> None: ...

    def __exit__(self) -> None: ...


class _CustomOperators(TorchDispatchMode):
    """Notes operators outside torch's own that have no formula."""

    def __init__(self) -> None:
        super().__init__()
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = getattr(func, "_overloadpacket", func)
        own = getattr(func, "namespace", "") not in ("aten", "prim", "prims", "profiler", "inductor")
        if own and packet not in flop_registry and packet not in _FORMULAS:
            self.unknown.add(str(packet))
        return func(*args, **(kwargs or {}))


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators make, from their making until they are freed."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {part.untyped_storage()._cdata for tensor in held for part in _parts(tensor)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                for part in _parts(leaf):
                    self._add(part.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def _peak_bytes(model: nn.Module, example: Any, device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(model, example)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    inputs = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    counter = _LiveBytes([*model.parameters(), *model.buffers(), *inputs])
    with counter:
        call(model, example)
    return counter.peak


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors; views of one storage never count for more than the storage."""
    views: dict[int, dict[tuple, int]] = {}
    storages: dict[int, int] = {}
    for tensor in tensors:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
            key = (part.storage_offset(), tuple(part.shape), part.dtype)
            views.setdefault(storage._cdata, {})[key] = part.numel() * part.element_size()
    return sum(min(size, sum(views[storage].values())) for storage, size in storages.items())


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of: itself, or what a sparse, quantised or wrapping tensor holds."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _parts(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    elif tensor.layout is torch.strided:
        yield tensor
        if tensor.is_quantized and tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
            yield from (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points())


def _repeated(leaf: Any, batch: int) -> Any:
    if not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return leaf
    return leaf[:1].expand(batch, *leaf.shape[1:]).contiguous()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _unit(value: float, base: int, names: tuple[str, ...]) -> str:
    power = 0
    while value >= base and power + 1 < len(names):
        value, power = value / base, power + 1
    return f"{value:,.4g} {names[power]}"
