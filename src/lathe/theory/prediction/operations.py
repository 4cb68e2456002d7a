"""What each operation of PyTorch does to signals: the kinds of steps, and how a call is read as one.

| kind | what it does |
| --- | --- |
| data | a tensor that no random weight had a part in |
| weight | a linear layer, convolution or embedding: fresh Gaussian units |
| function, scale, shift | unit by unit |
| add, multiply | two signals, unit by unit |
| norm | shift and scale by statistics of units, positions or inputs |
| pool, max pool, mean | over positions |
| average | over units: the same number for all |
| attention | mixes positions |
| dropout, pad, select, units, join, same | as they say |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.core.gaussian import Activation, activation
from lathe.theory.prediction.layout import (
    INPUTS,
    UNITS,
    Layout,
    axis_of,
    grid_of,
    regroup,
    units_of,
)

if TYPE_CHECKING:
    from lathe.theory.prediction.reading import Recorder, Step

__all__ = ["HANDLERS", "HINTS", "OPENING", "plain_name"]

Made = list[tuple[Tensor, "Step"]] | str
Handler = Callable[..., Made]

_REVERSED = {"radd": "add", "rmul": "mul", "rdiv": "rdiv", "rtruediv": "rdiv", "rsub": "rsub"}
_SAME_NAME = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "ipow": "pow",
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "concat": "cat",
    "concatenate": "cat",
    "mm": "matmul",
    "imatmul": "matmul",
    "rms_norm": "rms_norm",
}

#: Functions that may be the first to bring weights in.
OPENING = frozenset(
    [
        "linear",
        "conv1d",
        "conv2d",
        "conv3d",
        "embedding",
        "matmul",
        "addmm",
        "multi_head_attention_forward",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "bilinear",
        "einsum",
    ]
)

HINTS = {
    "setitem": "values are written into a tensor; build it with torch.cat or by adding",
    "softmax": "attention is read where it is nn.MultiheadAttention or scaled_dot_product_attention; leave a last "
    "softmax out, the loss has it",
    "log_softmax": "leave the last softmax out of the model, the loss has it",
    "bmm": "a product of two signals; attention is read as nn.MultiheadAttention or scaled_dot_product_attention",
    "einsum": "say it with torch.matmul, linear layers or convolutions",
    "lstm": "recurrent layers repeat their weights at each step, which is another theory; predict the layers around it",
    "gru": "recurrent layers repeat their weights at each step, which is another theory; predict the layers around it",
    "rnn_tanh": "recurrent layers repeat their weights at each step; predict the layers around it",
    "rnn_relu": "recurrent layers repeat their weights at each step; predict the layers around it",
    "interpolate": "predict the part before the upsampling",
    "conv_transpose1d": "predict the part before it; transposed convolutions are not followed",
    "conv_transpose2d": "predict the part before it; transposed convolutions are not followed",
    "conv_transpose3d": "predict the part before it; transposed convolutions are not followed",
    "adaptive_max_pool2d": "use nn.AdaptiveAvgPool2d, or nn.MaxPool2d",
    "bilinear": "a product of two signals under one weight; use linear layers and a product",
    "alpha_dropout": "use nn.Dropout",
}


def plain_name(func: Any) -> str:
    """`__iadd__`, `add_` and `Tensor.add` are all "add"."""
    name = str(getattr(func, "__name__", func)).strip("_")
    return _REVERSED.get(name, _SAME_NAME.get(name, name))


# --- operands ---------------------------------------------------------------------------------------------------------


def _bound(names: str, args: Any, kwargs: Any, **defaults: Any) -> list[Any]:
    """Arguments by name, wherever they were given."""
    keys = names.split()
    values = {**defaults, **dict(zip(keys, args)), **kwargs}
    return [values.get(key) for key in keys]


def _features_last(rec: Recorder, x: Tensor) -> Layout:
    """Inputs first, units last, positions between."""
    first = ((INPUTS, x.shape[0]),) if x.shape[0] == rec.batch else ((0, x.shape[0]),) if x.shape[0] > 1 else ()
    if x.ndim == 1:
        return (((UNITS, x.shape[0]),),)
    middle = tuple(((axis + 1, size),) for axis, size in enumerate(x.shape[1:-1]))
    return (first, *middle, ((UNITS, x.shape[-1]),))


def _units_second(rec: Recorder, x: Tensor) -> Layout:
    grid = tuple(((axis, size),) for axis, size in enumerate(x.shape[2:]))
    return (((INPUTS, x.shape[0]),), ((UNITS, x.shape[1]),), *grid)


def _operand(rec: Recorder, value: Tensor, layout: Callable[[Recorder, Tensor], Layout]) -> Step:
    return rec.step_of(value) or rec.data(value, layout(rec, value))


def _merged(left: Layout, right: Layout) -> Layout:
    """The layout of two tensors that broadcast."""
    length = max(len(left), len(right))
    padded = [((),) * (length - len(each)) + tuple(each) for each in (left, right)]
    return tuple(a or b for a, b in zip(*padded))


def _single(layout: Layout, axis: int) -> str | int | None:
    labels = {label for label, _ in layout[axis]}
    return labels.pop() if len(labels) == 1 else None


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


# --- layers with weights ----------------------------------------------------------------------------------------------


def _linear(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, weight, bias = _bound("input weight bias", args, kwargs)
    return _dense(rec, x, weight, bias, result, turned=True)


def _matmul(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, weight = _bound("input other", args, kwargs)
    if weight.ndim != 2 or rec.step_of(weight) is not None:
        return HINTS["bmm"]
    return _dense(rec, x, weight, None, result)


def _addmm(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    bias, x, weight = _bound("input mat1 mat2", args, kwargs)
    return _dense(rec, x, weight, bias, result)


def _dense(rec: Recorder, x: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor, turned: bool = False) -> Made:
    """A linear layer whose weight is (in, out); (out, in) if `turned`."""
    step = _operand(rec, x, _features_last)
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


def _convolution(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, weight, bias, stride, padding, dilation, groups = _bound(
        "input weight bias stride padding dilation groups", args, kwargs, stride=1, padding=0, dilation=1, groups=1
    )
    dimensions = weight.ndim - 2
    if x.ndim != dimensions + 2:
        return f"the input must have a batch axis, got shape {tuple(x.shape)}"
    step = _operand(rec, x, _units_second)
    labels = [_single(step.layout, axis) for axis in range(1, x.ndim)]
    options = _weights(rec, weight, bias, weight[0].numel())
    if isinstance(options, str):
        return options
    kernel = tuple(weight.shape[2:])
    stride, dilation = (_tuple(value, dimensions) for value in (stride, dilation))
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel)]
        if any(value % 2 for value in total):
            return "padding='same' of an even kernel is not followed; pad by numbers"
        padding = [value // 2 for value in total]
    padding = _tuple(0 if padding == "valid" else padding, dimensions)
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


def grid_labels(layout: Layout) -> list[int]:
    return sorted({label for axis in layout for label, _ in axis if isinstance(label, int)})


def _tuple(value: Any, dimensions: int) -> tuple[int, ...]:
    return (
        tuple(value)
        if isinstance(value, (tuple, list)) and len(value) > 1
        else ((int(value[0]) if isinstance(value, (tuple, list)) else int(value),) * dimensions)
    )


def _embedding(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    index, weight = _bound("input weight", args, kwargs)
    if not isinstance(index, Tensor) or rec.step_of(index) is not None:
        return "an embedding of computed indices is not followed"
    options = _weights(rec, weight, None, 1)
    if isinstance(options, str):
        return options
    layout = _features_last(rec, result)
    value = (
        index if index.shape[:1] == (rec.batch,) else index.expand(rec.batch, *index.shape[-max(index.ndim - 1, 1) :])
    )
    value = value.reshape(rec.batch, -1)
    options |= {"form": "embedding", "fan_out": weight.shape[1], "index": value.clone()}
    return [(result, rec.add("weight", (), layout, **options))]


def _attention(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    names = "query key value attn_mask dropout_p is_causal scale"
    query, key, value, mask, _, causal, scale = _bound(names, args, kwargs)
    steps = [rec.step_of(each) for each in (query, key, value)]
    if any(step is None for step in steps):
        return "attention to a tensor that has no weights before it is not followed"
    q, k, v = (step for step in steps if step is not None)
    token = _single(v.layout, -2)
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


def _multi_head(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> Made:
    names = "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn"
    names += " dropout_p out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask"
    bound = _bound(names, args, kwargs)
    query, _key, value, width, _heads, weight, bias, _, _, _, _, out_weight, out_bias, _, padding, _, mask = bound
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


# --- unit by unit -----------------------------------------------------------------------------------------------------

#: Functions of one argument, as the activation of that name.
_NAMED = {
    **{name: name for name in ("relu", "tanh", "sin", "cos", "erf", "sigmoid", "mish", "selu", "relu6", "hardswish")},
    "silu": "swish",
    "sign": "perceptron",
}
#: Other functions, with where they bend, given their further arguments.
_BENT: dict[str, Callable[..., tuple[float, ...]]] = {
    "elu": lambda alpha=1.0: (0.0,),
    "celu": lambda alpha=1.0: (0.0,),
    "gelu": lambda approximate="none": (),
    "softplus": lambda beta=1.0, threshold=20.0: (),
    "hardtanh": lambda min_val=-1.0, max_val=1.0: (float(min_val), float(max_val)),
    "clamp": lambda min=None, max=None: tuple(float(edge) for edge in (min, max) if edge is not None),
    "clamp_min": lambda min: (float(min),),
    "clamp_max": lambda max: (float(max),),
    "hardsigmoid": lambda: (-3.0, 3.0),
    "softshrink": lambda lambd=0.5: (-float(lambd), float(lambd)),
    "hardshrink": lambda lambd=0.5: (-float(lambd), float(lambd)),
    "threshold": lambda threshold, value: (float(threshold),),
    "softsign": lambda: (0.0,),
    "abs": lambda: (0.0,),
    **{name: lambda: () for name in ("tanhshrink", "logsigmoid", "exp", "expm1", "square", "sqrt", "rsqrt", "log")},
    **{name: lambda: () for name in ("log1p", "reciprocal", "sinh", "cosh", "atan", "arctan", "asinh", "tan", "sinc")},
}


def _function(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    step = rec.step_of(args[0] if args else kwargs["input"])
    if step is None:
        return "its first argument must be the signal"
    rest = [value for value in args[1:] if not isinstance(value, bool)]
    options = {key: value for key, value in kwargs.items() if key not in ("input", "inplace")}
    if name == "prelu":
        if rest[0].numel() > 1:
            rec.note(f"the slopes of {rec.stack[-1]!r} are taken to be all their mean")
        act = activation(nn.LeakyReLU(float(rest[0].detach().mean())))
    elif name == "leaky_relu":
        act = activation(nn.LeakyReLU(float(options.get("negative_slope", rest[0] if rest else 0.01))))
    elif name == "rrelu":
        lower, upper = ([*rest, 1 / 8, 1 / 3])[:2]
        rec.note(f"the random slopes of {rec.stack[-1]!r} are taken to be their mean")
        act = activation(nn.LeakyReLU((float(lower) + float(upper)) / 2))
    elif name in _NAMED and (name != "relu6" or not rest):
        act = activation(_NAMED[name])
    elif name == "gelu" and options.get("approximate", "none") == "none":
        act = activation("gelu")
    elif name == "softplus" and not rest and not {k: v for k, v in options.items() if (k, v) not in _PLAIN_SOFTPLUS}:
        act = activation("softplus")
    else:
        pure = getattr(F, name, None) or getattr(torch, name, None) or getattr(Tensor, name)
        kinks = _BENT[name](*rest, **options)
        act = Activation(lambda z: pure(z, *rest, **options), kinks=kinks, name=name)
    return [(result, rec.add("function", (step.index,), step.layout, rec.place(name), act=act))]


_PLAIN_SOFTPLUS = {("beta", 1), ("beta", 1.0), ("threshold", 20), ("threshold", 20.0)}


def _power(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, exponent = _bound("input exponent", args, kwargs)
    step = rec.step_of(x)
    if step is None or not isinstance(exponent, int | float):
        return "powers are followed where the exponent is a number"
    kinks = () if float(exponent).is_integer() and exponent >= 0 else (0.0,)
    act = Activation(lambda z: z**exponent, kinks=kinks, name=f"power({exponent:g})")
    return [(result, rec.add("function", (step.index,), step.layout, rec.place(name), act=act))]


def _sum(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, y, alpha = _bound("input other alpha", args, kwargs, alpha=1)
    sign = -float(alpha) if name == "sub" else float(alpha)
    if name == "rsub":
        x, y, sign = y, x, -float(alpha)
    scales = [1.0, sign]
    place = rec.place("add")
    left, right = rec.step_of(x), rec.step_of(y)
    if left is None or right is None:
        step, value, mine = (right, x, scales[1]) if left is None else (left, y, scales[0])
        assert step is not None
        other = scales[0] if left is None else scales[1]
        if not isinstance(value, Tensor) or value.numel() == 1:
            if mine != 1:
                step = rec.add("scale", (step.index,), step.layout, place, by=mine)
            return [(result, rec.add("shift", (step.index,), step.layout, place, by=other * float(value)))]
        layout = _merged(step.layout, _like(step.layout, value))
        data = rec.data(value.expand(result.shape), layout)
        left, right = (data, step) if left is None else (step, data)
    layout = _merged(left.layout, right.layout)
    return [(result, rec.add("add", (left.index, right.index), layout, place, scales=scales))]


def _like(layout: Layout, value: Tensor) -> Layout:
    """Labels of a tensor that broadcasts to one of this layout."""
    tail = layout[len(layout) - value.ndim :] if value.ndim <= len(layout) else layout
    return tuple(() if size == 1 else axis for axis, size in zip(tail, value.shape))


def _product(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, y = _bound("input other", args, kwargs)
    place = rec.place(name)
    if name == "rdiv":
        x, y = y, x
    left, right = rec.step_of(x), rec.step_of(y)
    if name in ("div", "rdiv"):
        if right is not None:
            act = Activation(torch.reciprocal, kinks=(0.0,), name="reciprocal")
            right = rec.add("function", (right.index,), right.layout, place, act=act)
            y = None
        else:
            y = 1 / y
    if left is not None and right is not None:
        layout = _merged(left.layout, right.layout)
        return [(result, rec.add("multiply", (left.index, right.index), layout, place))]
    step, value = (right, x) if left is None else (left, y)
    assert step is not None
    if not isinstance(value, Tensor) or value.numel() == 1:
        return [(result, rec.add("scale", (step.index,), step.layout, place, by=float(value)))]
    aligned = _like(step.layout, value)
    labels = {label for axis in aligned for label, _ in axis}
    if (labels and UNITS not in labels and value.shape == result.shape[result.ndim - value.ndim :]) or labels <= {
        INPUTS
    }:
        number = rec.data(value.expand(result.shape).double(), step.layout)
        return [(result, rec.add("multiply", (step.index, number.index), step.layout, place, number=True))]
    by = float(value.detach().double().square().mean().sqrt())
    if labels != {UNITS}:
        rec.note(f"the factors in {place!r} are taken to be all their root mean square")
    return [(result, rec.add("scale", (step.index,), step.layout, place, by=by))]


def _negative(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    step = rec.step_of(args[0])
    assert step is not None
    return [(result, rec.add("scale", (step.index,), step.layout, rec.place(name), by=-1.0))]


def _gated(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, dim = _bound("input dim", args, kwargs, dim=-1)
    step = rec.step_of(x)
    assert step is not None
    if _single(step.layout, dim) != UNITS:
        return "gates are followed where they halve the units"
    layout = _resized(step.layout, dim, x.shape[dim] // 2)
    value, gate = (rec.add("units", (step.index,), layout, rec.place(name)) for _ in range(2))
    opened = rec.add("function", (gate.index,), layout, rec.place(name), act=activation("sigmoid"))
    return [(result, rec.add("multiply", (value.index, opened.index), layout, rec.place(name)))]


def _dropped(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, p, training = _bound("input p training", args, kwargs, p=0.5, training=True)
    step = rec.step_of(x)
    assert step is not None
    if not training or p == 0:
        return [(result, rec.add("same", (step.index,), step.layout, rec.place(name)))]
    return [(result, rec.add("dropout", (step.index,), step.layout, rec.place(name), p=p, whole=name != "dropout"))]


# --- normalisation ----------------------------------------------------------------------------------------------------


def _norm(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    step = rec.step_of(args[0] if args else kwargs["input"])
    if step is None:
        return "a norm of the raw input is not followed; normalise the data before it enters"
    options: dict[str, Any] = {"centred": True}
    if name in ("layer_norm", "rms_norm"):
        _, shape, weight, bias, eps = _bound("input normalized_shape weight bias eps", args, kwargs)
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
        _, _, variance, weight, bias, training, _, eps = _bound(
            "input running_mean running_var weight bias training momentum eps", args, kwargs, eps=1e-5, training=False
        )
        if not training:
            gain = (variance + eps).rsqrt() * (1 if weight is None else weight)
            by = float(gain.detach().double().square().mean().sqrt())
            return [(result, rec.add("scale", (step.index,), step.layout, rec.place(name), by=by))]
        options |= {"over": "batch", "members": 1, "batch": rec.batch}
    elif name == "group_norm":
        _, groups, weight, bias, eps = _bound("input num_groups weight bias eps", args, kwargs, eps=1e-5)
        options |= {"over": "group", "members": step.units // groups}
    else:
        _, _, _, weight, bias, _use, _, eps = _bound(
            "input running_mean running_var weight bias use_input_stats momentum eps", args, kwargs, eps=1e-5
        )
        options |= {"over": "group", "members": 1}
    options |= {
        "eps": float(eps),
        "gain": 1.0 if weight is None else float(weight.detach().double().square().mean().sqrt()),
        "bias_variance": 0.0 if bias is None else float(bias.detach().double().square().mean()),
    }
    return [(result, rec.add("norm", (step.index,), step.layout, rec.place(name), **options))]


# --- positions --------------------------------------------------------------------------------------------------------


def _pool(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> Made:
    if not isinstance(result, Tensor):
        return "pooling that also returns indices is not followed"
    x, kernel, stride, padding, more, _ceil = _bound(
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
    kernel = _tuple(kernel, dimensions)
    options = {
        "kernel": kernel,
        "stride": kernel if stride is None or stride == [] else _tuple(stride, dimensions),
        "padding": _tuple(padding, dimensions),
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


def _mean(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, dims, keep = _bound("input dim keepdim", args, kwargs)
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


def _padded(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, pad, mode, value = _bound("input pad mode value", args, kwargs, mode="constant", value=0)
    step = rec.step_of(x)
    assert step is not None
    sides = [tuple(pad[2 * k : 2 * k + 2]) for k in range(len(pad) // 2)][::-1]
    axes = range(x.ndim - len(sides), x.ndim)
    if mode != "constant" or value not in (None, 0, 0.0) or any(s < 0 for side in sides for s in side):
        return "padding is followed with zeros"
    if any(any(side) and not isinstance(_single(step.layout, axis), int) for axis, side in zip(axes, sides)):
        return "padding is followed along positions"
    whole = dict(zip(axes, sides))
    layout = tuple(
        ((axis_pieces[0][0], result.shape[axis]),) if any(whole.get(axis, ())) else axis_pieces
        for axis, axis_pieces in enumerate(step.layout)
    )
    label_of = {_single(step.layout, axis): side for axis, side in whole.items() if any(side)}
    margins = [label_of.get(label, (0, 0)) for label in grid_labels(step.layout)]
    return [(result, rec.add("pad", (step.index,), layout, rec.place(name), margins=margins))]


# --- shapes -----------------------------------------------------------------------------------------------------------


def _reshaped(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    step = rec.step_of(args[0])
    assert step is not None
    layout = regroup(step.layout, result.shape)
    if layout is None:
        return f"a reshape to {tuple(result.shape)} tears positions and units apart"
    return [(result, rec.add("same", (step.index,), layout, rec.place(name)))]


def _permuted(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x = args[0]
    step = rec.step_of(x)
    assert step is not None
    axes = list(range(x.ndim))
    if name == "permute":
        given = kwargs.get("dims", args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:])
        axes = [axis % x.ndim for axis in given]
    else:
        _, a, b = _bound("input dim0 dim1", args, kwargs)
        axes[a], axes[b] = axes[b], axes[a]
    return [(result, rec.add("same", (step.index,), tuple(step.layout[axis] for axis in axes), rec.place(name)))]


def _same(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    step = rec.step_of(args[0] if args else kwargs["input"])
    if step is None or tuple(result.shape) != tuple(args[0].shape):
        return HINTS.get(name, "its result has another shape, which is not followed")
    return [(result, rec.add("same", (step.index,), step.layout, rec.place(name)))]


def _resized(layout: Layout, axis: int, size: int) -> Layout:
    axis %= len(layout)
    return tuple(((UNITS, size),) if number == axis else pieces for number, pieces in enumerate(layout))


def _parts(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Any) -> Made:
    _, _, dim = _bound("input sizes dim", args, kwargs, dim=0)
    step = rec.step_of(args[0])
    assert step is not None
    if _single(step.layout, dim) != UNITS:
        return "splits are followed along the units"
    return [
        (part, rec.add("units", (step.index,), _resized(step.layout, dim, part.shape[dim]), rec.place(name)))
        for part in result
    ]


def _indexed(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
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
        elif isinstance(each, slice) and _single(step.layout, axis) == UNITS:
            kind = "units"
            layout.append(((UNITS, len(range(*each.indices(size)))),))
        elif (
            isinstance(each, int) and len(step.grid) == 1 and _single(step.layout, axis) == grid_labels(step.layout)[0]
        ):
            kind, options = "select", {"position": each % size}
        elif isinstance(each, int) and not pieces:
            pass
        else:
            return "indexing is followed with whole axes, slices of units, and one position"
        axis += 1
    layout += step.layout[axis:]
    return [(result, rec.add(kind, (step.index,), tuple(layout), rec.place("index"), **options))]


def _joined(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    tensors, dim = _bound("tensors dim", args, kwargs, dim=0)
    tensors = [tensor for tensor in tensors if tensor.numel()]
    known = [rec.step_of(tensor) for tensor in tensors]
    layout = next(step.layout for step in known if step is not None)
    if len(tensors) == 1:
        assert known[0] is not None
        return [(result, rec.add("same", (known[0].index,), known[0].layout, rec.place(name)))]
    if _single(layout, dim) != UNITS:
        return "joining is followed along units; positions that are joined (class tokens) are not"
    steps = [step or rec.data(tensor, _resized(layout, dim, tensor.shape[dim])) for step, tensor in zip(known, tensors)]
    layout = _resized(layout, dim, result.shape[dim])
    return [(result, rec.add("join", tuple(step.index for step in steps), layout, rec.place(name)))]


HANDLERS: dict[str, Handler] = {
    "linear": _linear,
    "matmul": _matmul,
    "addmm": _addmm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head,
    **dict.fromkeys((*_NAMED, *_BENT, "prelu", "leaky_relu", "rrelu"), _function),
    "pow": _power,
    **dict.fromkeys(("add", "sub", "rsub"), _sum),
    **dict.fromkeys(("mul", "div", "rdiv"), _product),
    "neg": _negative,
    "glu": _gated,
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"), _dropped),
    **dict.fromkeys(("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"), _norm),
    **dict.fromkeys((f"{kind}_pool{d}d" for kind in ("avg", "max", "adaptive_avg") for d in (1, 2, 3)), _pool),
    **dict.fromkeys(("mean", "sum"), _mean),
    "pad": _padded,
    **dict.fromkeys(
        ("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"), _reshaped
    ),
    **dict.fromkeys(("permute", "transpose"), _permuted),
    **dict.fromkeys(("contiguous", "clone", "to", "float", "double", "type", "type_as", "detach", "alias"), _same),
    **dict.fromkeys(("requires_grad", "cpu", "cuda", "expand", "expand_as", "nan_to_num"), _same),
    **dict.fromkeys(("chunk", "split", "tensor_split"), _parts),
    "getitem": _indexed,
    "cat": _joined,
}
