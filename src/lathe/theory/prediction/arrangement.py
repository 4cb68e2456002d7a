"""Calls that normalise, mix positions or change shapes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lathe.theory.prediction.layout import UNITS, Layout, regroup, units_of
from lathe.theory.prediction.operands import (
    HINTS,
    Made,
    as_tuple,
    bound,
    grid_labels,
    resized,
    single,
)

if TYPE_CHECKING:
    from lathe.theory.prediction.reading import Recorder

__all__ = ["indexed", "joined", "mean", "norm", "padded", "parts", "permuted", "pool", "reshaped", "same"]


def norm(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    step = rec.step_of(args[0] if args else kwargs["input"])
    if step is None:
        return "a norm of the raw input is not followed; normalise the data before it enters"
    options: dict[str, Any] = {"centred": True}
    if name in ("layer_norm", "rms_norm"):
        _, shape, weight, bias, eps = bound("input normalized_shape weight bias eps", args, kwargs)
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        if name == "rms_norm":
            bias, options["centred"] = None, False
        labels = {label for axis in step.layout[-len(shape) :] for label, _ in axis}
        grid = set(grid_labels(step.layout))
        if (
            UNITS not in labels
            or units_of(step.layout[-len(shape) :]) != step.units
            or labels - {UNITS} not in (set(), grid)
        ):
            return "a norm over positions without units is not followed"
        options |= {"over": "features" if labels == {UNITS} else "group", "members": step.units}
    elif name == "batch_norm":
        _, _, variance, weight, bias, training, _, eps = bound(
            "input running_mean running_var weight bias training momentum eps", args, kwargs, eps=1e-5, training=False
        )
        if not training:
            gain = (variance + eps).rsqrt() * (1 if weight is None else weight)
            by = float(gain.detach().double().square().mean().sqrt())
            return [(result, rec.add("scale", (step.index,), step.layout, rec.place(name), by=by))]
        options |= {"over": "batch", "members": 1, "batch": rec.batch}
    elif name == "group_norm":
        _, groups, weight, bias, eps = bound("input num_groups weight bias eps", args, kwargs, eps=1e-5)
        options |= {"over": "group", "members": step.units // groups}
    else:
        _, _, _, weight, bias, _use, _, eps = bound(
            "input running_mean running_var weight bias use_input_stats momentum eps", args, kwargs, eps=1e-5
        )
        options |= {"over": "group", "members": 1}
    options |= {
        "eps": float(eps),
        "gain": 1.0 if weight is None else float(weight.detach().double().square().mean().sqrt()),
        "bias_variance": 0.0 if bias is None else float(bias.detach().double().square().mean()),
    }
    return [(result, rec.add("norm", (step.index,), step.layout, rec.place(name), **options))]


def pool(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> Made:
    if not isinstance(result, Tensor):
        return "pooling that also returns indices is not followed"
    x, kernel, stride, padding, more, _ceil = bound(
        "input kernel_size stride padding dilation ceil_mode"
        if "max" in name
        else "input kernel_size stride padding ceil_mode count_include_pad",
        args,
        kwargs,
        padding=0,
    )
    step = rec.step_of(x)
    if step is None:
        return "pooling of the raw input is not followed; pool the data before it enters"
    dimensions = len(step.grid)
    if name.startswith("adaptive"):
        size = result.shape[2:]
        if set(size) == {1}:
            return [(result, rec.add("mean", (step.index,), _without_grid(step.layout), rec.place(name), times=1.0))]
        if any(whole % part for whole, part in zip(step.grid, size)):
            return f"adaptive pooling of {step.grid} to {tuple(size)} is followed where one divides the other"
        kernel = stride = tuple(whole // part for whole, part in zip(step.grid, size))
    if not dimensions:
        return [(result, rec.add("same", (step.index,), step.layout, rec.place(name)))]
    kernel = as_tuple(kernel, dimensions)
    options = {
        "kernel": kernel,
        "stride": kernel if stride is None or stride == [] else as_tuple(stride, dimensions),
        "padding": as_tuple(padding, dimensions),
    }
    grid = tuple(((axis, size),) for axis, size in enumerate(result.shape[2:]))
    kind = "max pool" if "max" in name else "pool"
    if kind == "max pool":
        if more not in (None, 1, (1,) * dimensions, [1] * dimensions):
            return "max pooling with dilation is not followed"
        rec.note("max pooling is averaged over positions and sampled: kernels after it are good to a few percent")
    return [(result, rec.add(kind, (step.index,), (*step.layout[:2], *grid), rec.place(name), **options))]


def _without_grid(layout: Layout) -> Layout:
    return tuple(tuple(piece for piece in axis if not isinstance(piece[0], int)) for axis in layout)


def mean(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, dims, keep = bound("input dim keepdim", args, kwargs)
    step = rec.step_of(x)
    if step is None or dims is None:
        return "means are followed over positions or over units, with dim=..."
    axes = sorted({axis % x.ndim for axis in ([dims] if isinstance(dims, int) else dims)})
    labels = {label for axis in axes for label, _ in step.layout[axis]}
    layout = tuple(
        () if axis in axes else pieces for axis, pieces in enumerate(step.layout) if keep or axis not in axes
    )
    if labels == {UNITS} and units_of(layout) == 1:
        if name == "sum":
            return "sums over units grow with width; use the mean"
        return [(result, rec.add("average", (step.index,), layout, rec.place(name)))]
    if labels and labels == set(grid_labels(step.layout)):
        times = float(math.prod(step.grid)) if name == "sum" else 1.0
        return [(result, rec.add("mean", (step.index,), layout, rec.place(name), times=times))]
    return "means are followed over all positions or over all units"


def padded(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, pad, mode, value = bound("input pad mode value", args, kwargs, mode="constant", value=0)
    step = rec.step_of(x)
    assert step is not None
    sides = [tuple(pad[2 * k : 2 * k + 2]) for k in range(len(pad) // 2)][::-1]
    axes = range(x.ndim - len(sides), x.ndim)
    if mode != "constant" or value not in (None, 0, 0.0) or any(s < 0 for side in sides for s in side):
        return "padding is followed with zeros"
    if any(any(side) and not isinstance(single(step.layout, axis), int) for axis, side in zip(axes, sides)):
        return "padding is followed along positions"
    whole = dict(zip(axes, sides))
    layout = tuple(
        ((axis_pieces[0][0], result.shape[axis]),) if any(whole.get(axis, ())) else axis_pieces
        for axis, axis_pieces in enumerate(step.layout)
    )
    label_of = {single(step.layout, axis): side for axis, side in whole.items() if any(side)}
    margins = [label_of.get(label, (0, 0)) for label in grid_labels(step.layout)]
    return [(result, rec.add("pad", (step.index,), layout, rec.place(name), margins=margins))]


def reshaped(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    step = rec.step_of(args[0])
    assert step is not None
    layout = regroup(step.layout, result.shape)
    if layout is None:
        return f"a reshape to {tuple(result.shape)} tears positions and units apart"
    return [(result, rec.add("same", (step.index,), layout, rec.place(name)))]


def permuted(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x = args[0]
    step = rec.step_of(x)
    assert step is not None
    axes = list(range(x.ndim))
    if name == "permute":
        given = kwargs.get("dims", args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:])
        axes = [axis % x.ndim for axis in given]
    else:
        _, a, b = bound("input dim0 dim1", args, kwargs)
        axes[a], axes[b] = axes[b], axes[a]
    return [(result, rec.add("same", (step.index,), tuple(step.layout[axis] for axis in axes), rec.place(name)))]


def same(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    step = rec.step_of(args[0] if args else kwargs["input"])
    if step is None or tuple(result.shape) != tuple(args[0].shape):
        return HINTS.get(name, "its result has another shape, which is not followed")
    return [(result, rec.add("same", (step.index,), step.layout, rec.place(name)))]


def parts(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> Made:
    _, _, dim = bound("input sizes dim", args, kwargs, dim=0)
    step = rec.step_of(args[0])
    assert step is not None
    if single(step.layout, dim) != UNITS:
        return "splits are followed along the units"
    return [
        (part, rec.add("units", (step.index,), resized(step.layout, dim, part.shape[dim]), rec.place(name)))
        for part in result
    ]


def indexed(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, index = args[0], args[1]
    step = rec.step_of(x)
    if step is None:
        return "indexing by a signal is not followed"
    index = index if isinstance(index, tuple) else (index,)
    if Ellipsis in [each for each in index if each is Ellipsis]:
        place = next(i for i, each in enumerate(index) if each is Ellipsis)
        missing = x.ndim - sum(each is not None for each in index) + 1
        index = (*index[:place], *[slice(None)] * missing, *index[place + 1 :])
    layout: list[Any] = []
    kind, options, axis = "same", {}, 0
    for each in index:
        if each is None:
            layout.append(())
            continue
        pieces, size = step.layout[axis], x.shape[axis]
        if isinstance(each, slice) and each.indices(size) == (0, size, 1):
            layout.append(pieces)
        elif isinstance(each, slice) and single(step.layout, axis) == UNITS:
            kind = "units"
            layout.append(((UNITS, len(range(*each.indices(size)))),))
        elif isinstance(each, int) and len(step.grid) == 1 and single(step.layout, axis) == grid_labels(step.layout)[0]:
            kind, options = "select", {"position": each % size}
        elif isinstance(each, int) and not pieces:
            pass
        else:
            return "indexing is followed with whole axes, slices of units, and one position"
        axis += 1
    layout += step.layout[axis:]
    return [(result, rec.add(kind, (step.index,), tuple(layout), rec.place("index"), **options))]


def joined(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    tensors, dim = bound("tensors dim", args, kwargs, dim=0)
    tensors = [tensor for tensor in tensors if tensor.numel()]
    known = [rec.step_of(tensor) for tensor in tensors]
    layout = next(step.layout for step in known if step is not None)
    if len(tensors) == 1:
        assert known[0] is not None
        return [(result, rec.add("same", (known[0].index,), known[0].layout, rec.place(name)))]
    if single(layout, dim) != UNITS:
        return "joining is followed along units; positions that are joined (class tokens) are not"
    steps = [step or rec.data(tensor, resized(layout, dim, tensor.shape[dim])) for step, tensor in zip(known, tensors)]
    layout = resized(layout, dim, result.shape[dim])
    return [(result, rec.add("join", tuple(step.index for step in steps), layout, rec.place(name)))]
