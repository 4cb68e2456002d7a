"""Calls that bring weights in: linear layers, convolutions, embeddings, attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lathe.theory.prediction.layout import INPUTS, UNITS, Layout, axis_of, grid_of
from lathe.theory.prediction.operands import (
    HINTS,
    Made,
    as_tuple,
    bound,
    features_last,
    grid_labels,
    operand,
    single,
    units_second,
)

if TYPE_CHECKING:
    from lathe.theory.prediction.reading import Recorder

__all__ = ["addmm", "attention", "convolution", "embedding", "linear", "matmul", "multi_head"]


def _weights(
    rec: Recorder, weight: Tensor, bias: Tensor | None, fan_in: int, owners: tuple[Any, Any] | None = None
) -> dict[str, Any] | str:
    """What a weight layer's step knows of its parameters; `owners` are what weight and bias were cut from."""
    if rec.step_of(weight) is not None:
        return "its weight is computed from the input, and is not Gaussian"
    square = float(weight.detach().double().square().mean())
    mean, numel = float(weight.detach().double().mean()), weight.numel()
    names, bias_names = (sorted(rec.parameters_of(each)) for each in owners or (weight, bias))
    if abs(mean) > 6 * math.sqrt(max(square, 1e-300) / numel) and square > 0 and numel > 32:
        rec.note(f"the weights of {rec.stack[-1]!r} have a mean of {mean:.2g}; theory takes them to have none")
    if not names:
        rec.note(f"the weights of {rec.stack[-1]!r} are no parameters; they are taken as one draw of a Gaussian")
    if names and rec.called.issuperset(names) and owners is None:
        rec.note(f"{names[0]!r} is used more than once; each use is taken to have weights of its own")
    rec.called.update(names)
    return {
        "weights": names,
        "biases": bias_names,
        "variance": square,
        "bias_variance": 0.0 if bias is None else float(bias.detach().double().square().mean()),
        "numel": numel,
        "fan_in": fan_in,
    }


def linear(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, weight, bias = bound("input weight bias", args, kwargs)
    return _dense(rec, x, weight, bias, result, turned=True)


def matmul(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, weight = bound("input other", args, kwargs)
    if weight.ndim != 2 or rec.step_of(weight) is not None:
        return HINTS["bmm"]
    return _dense(rec, x, weight, None, result)


def addmm(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    bias, x, weight = bound("input mat1 mat2", args, kwargs)
    return _dense(rec, x, weight, bias, result)


def _dense(rec: Recorder, x: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor, turned: bool = False) -> Made:
    """A linear layer whose weight is (in, out); (out, in) if `turned`."""
    step = operand(rec, x, features_last)
    labels = {label for label, _ in step.layout[-1]}
    grid = {label for axis in step.layout for label, _ in axis if isinstance(label, int)}
    if INPUTS in labels or (labels & grid and (UNITS not in labels or not grid <= labels)):
        return "a linear layer over positions (token mixing) is not followed; use a convolution"
    fan_in, fan_out = weight.shape[::-1] if turned else weight.shape
    options = _weights(rec, weight, bias, fan_in)
    if isinstance(options, str):
        return options
    layout = (*step.layout[:-1], ((UNITS, fan_out),))
    options |= {"form": "flat" if labels & grid else "linear", "fan_out": fan_out}
    return [(result, rec.add("weight", (step.index,), layout, **options))]


def convolution(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, weight, bias, stride, padding, dilation, groups = bound(
        "input weight bias stride padding dilation groups", args, kwargs, stride=1, padding=0, dilation=1, groups=1
    )
    dimensions = weight.ndim - 2
    if x.ndim != dimensions + 2:
        return f"the input must have a batch axis, got shape {tuple(x.shape)}"
    step = operand(rec, x, units_second)
    labels = [single(step.layout, axis) for axis in range(1, x.ndim)]
    options = _weights(rec, weight, bias, weight[0].numel())
    if isinstance(options, str):
        return options
    kernel = tuple(weight.shape[2:])
    stride, dilation = (as_tuple(value, dimensions) for value in (stride, dilation))
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel)]
        if any(value % 2 for value in total):
            return "padding='same' of an even kernel is not followed; pad by numbers"
        padding = [value // 2 for value in total]
    padding = as_tuple(0 if padding == "valid" else padding, dimensions)
    options |= {"fan_out": weight.shape[0], "groups": groups}
    if not step.grid and set(x.shape[2:]) == {1}:
        if set(result.shape[2:]) != {1}:
            return "a convolution that widens a single position is not followed"
        options |= {"form": "linear", "fan_in": weight.shape[1]}
        return [
            (
                result,
                rec.add(
                    "weight",
                    (step.index,),
                    (step.layout[0], ((UNITS, weight.shape[0]),), *[()] * dimensions),
                    **options,
                ),
            )
        ]
    if labels[0] != UNITS or labels[1:] != sorted(grid_labels(step.layout)):
        return "a convolution over axes that are not its positions is not followed"
    if weight.shape[1] < 8 and groups > 1:
        rec.note(
            f"{rec.stack[-1]!r} sums {weight[0].numel()} inputs a unit (depthwise): its units are far from Gaussian"
        )
    options |= {"form": "convolution", "kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    grid = tuple(((axis, size),) for axis, size in enumerate(result.shape[2:]))
    return [(result, rec.add("weight", (step.index,), (step.layout[0], ((UNITS, weight.shape[0]),), *grid), **options))]


def embedding(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    index, weight = bound("input weight", args, kwargs)
    if not isinstance(index, Tensor) or rec.step_of(index) is not None:
        return "an embedding of computed indices is not followed"
    options = _weights(rec, weight, None, 1)
    if isinstance(options, str):
        return options
    layout = features_last(rec, result)
    value = (
        index if index.shape[:1] == (rec.batch,) else index.expand(rec.batch, *index.shape[-max(index.ndim - 1, 1) :])
    )
    value = value.reshape(rec.batch, -1)
    options |= {"form": "embedding", "fan_out": weight.shape[1], "index": value.clone()}
    return [(result, rec.add("weight", (), layout, **options))]


def attention(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    names = "query key value attn_mask dropout_p is_causal scale"
    query, key, value, mask, _, causal, scale = bound(names, args, kwargs)
    steps = [rec.step_of(each) for each in (query, key, value)]
    if any(step is None for step in steps):
        return "attention to a tensor that has no weights before it is not followed"
    q, k, v = (step for step in steps if step is not None)
    token = single(v.layout, -2)
    if not isinstance(token, int) or grid_of(v.layout) != grid_of(k.layout) or len(grid_of(v.layout)) != 1:
        return "attention is followed over one axis of positions"
    if query.shape[-2] != value.shape[-2]:
        return "cross attention between sequences of different lengths is not followed"
    causal = _causal(causal, mask, value.shape[-2])
    if isinstance(causal, str):
        return causal
    rec.note(_UNIFORM)
    layout = tuple(a if axis == len(q.layout) - 2 else b for axis, (a, b) in enumerate(zip(q.layout, v.layout)))
    # The variance of a logit over that of q . k / sqrt(head).
    options = {"causal": causal, "sharpness": 1.0 if scale is None else float(scale) ** 2 * query.shape[-1]}
    return [(result, rec.add("attention", (v.index, q.index, k.index), layout, rec.place("attention"), **options))]


_UNIFORM = "attention is followed to second order in its logits, which holds while these are small"


def _causal(causal: Any, mask: Tensor | None, length: int) -> bool | str:
    if mask is None:
        return bool(causal)
    seen = mask if mask.dtype == torch.bool else mask > -1e4
    triangle = torch.ones(length, length, dtype=torch.bool).tril()
    if seen.shape[-2:] == (length, length) and bool((seen == triangle).all()):
        return True
    return False if bool(seen.all()) else "attention masks are followed where they are causal or let all through"


def multi_head(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> Made:
    names = "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn"
    names += " dropout_p out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask"
    given = bound(names, args, kwargs)
    query, _key, value, width, _heads, weight, bias, _, _, _, _, out_weight, out_bias, _, padding, _, mask = given
    if weight is None or padding is not None or kwargs.get("bias_k") is not None:
        return "followed with one projection for queries, keys and values, and without padding masks"
    if query.shape != value.shape:
        return "cross attention between sequences of different lengths is not followed"
    layout: Layout = (((0, value.shape[0]),), ((INPUTS, value.shape[1]),), ((UNITS, width),))
    source = rec.step_of(value) or rec.data(value, layout)
    if axis_of(source.layout, UNITS) != 2 or len(source.grid) != 1:
        return "attention is followed over one axis of positions"
    causal = _causal(kwargs.get("is_causal"), mask, value.shape[0])
    if isinstance(causal, str):
        return causal
    rec.note(_UNIFORM)
    made = []
    place = rec.stack[-1]
    for part, label in enumerate(("queries", "keys", "values")):
        rows = slice(part * width, (part + 1) * width)
        options = _weights(rec, weight[rows], None if bias is None else bias[rows], width, (weight, bias))
        assert isinstance(options, dict)
        options |= {"form": "linear", "fan_out": width, "inner": True}
        made.append(rec.add("weight", (source.index,), source.layout, f"{place}.in_proj ({label})", **options))
    q, k, v = made
    options = {"causal": causal, "sharpness": 1.0}
    mixed = rec.add("attention", (v.index, q.index, k.index), source.layout, f"{place} (attention)", **options)
    last = _weights(rec, out_weight, out_bias, width)
    assert isinstance(last, dict)
    last |= {"form": "linear", "fan_out": width}
    return [(result[0], rec.add("weight", (mixed.index,), source.layout, f"{place}.out_proj", **last))]
