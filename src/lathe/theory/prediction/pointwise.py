"""Calls that act unit by unit: activations, sums, products, gates, dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.core.gaussian import Activation, activation
from lathe.theory.prediction.layout import INPUTS, UNITS, Layout
from lathe.theory.prediction.operands import (
    Made,
    bound,
    merged,
    resized,
    single,
)

if TYPE_CHECKING:
    from lathe.theory.prediction.reading import Recorder

__all__ = ["BENT", "NAMED", "added", "dropped", "function", "gated", "negative", "power", "product"]


#: Functions of one argument, as the activation of that name.
NAMED = {
    **{name: name for name in ("relu", "tanh", "sin", "cos", "erf", "sigmoid", "mish", "selu", "relu6", "hardswish")},
    "silu": "swish",
    "sign": "perceptron",
}
#: Other functions, with where they bend, given their further arguments.
BENT: dict[str, Callable[..., tuple[float, ...]]] = {
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


def function(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
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
    elif name in NAMED and (name != "relu6" or not rest):
        act = activation(NAMED[name])
    elif name == "gelu" and options.get("approximate", "none") == "none":
        act = activation("gelu")
    elif name == "softplus" and not rest and not {k: v for k, v in options.items() if (k, v) not in _PLAIN_SOFTPLUS}:
        act = activation("softplus")
    else:
        pure = getattr(F, name, None) or getattr(torch, name, None) or getattr(Tensor, name)
        kinks = BENT[name](*rest, **options)
        act = Activation(lambda z: pure(z, *rest, **options), kinks=kinks, name=name)
    return [(result, rec.add("function", (step.index,), step.layout, rec.place(name), act=act))]


_PLAIN_SOFTPLUS = {("beta", 1), ("beta", 1.0), ("threshold", 20), ("threshold", 20.0)}


def power(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, exponent = bound("input exponent", args, kwargs)
    step = rec.step_of(x)
    if step is None or not isinstance(exponent, int | float):
        return "powers are followed where the exponent is a number"
    kinks = () if float(exponent).is_integer() and exponent >= 0 else (0.0,)
    act = Activation(lambda z: z**exponent, kinks=kinks, name=f"power({exponent:g})")
    return [(result, rec.add("function", (step.index,), step.layout, rec.place(name), act=act))]


def added(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, y, alpha = bound("input other alpha", args, kwargs, alpha=1)
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
        layout = merged(step.layout, _like(step.layout, value))
        data = rec.data(value.expand(result.shape), layout)
        left, right = (data, step) if left is None else (step, data)
    layout = merged(left.layout, right.layout)
    return [(result, rec.add("add", (left.index, right.index), layout, place, scales=scales))]


def _like(layout: Layout, value: Tensor) -> Layout:
    """Labels of a tensor that broadcasts to one of this layout."""
    tail = layout[len(layout) - value.ndim :] if value.ndim <= len(layout) else layout
    return tuple(() if size == 1 else axis for axis, size in zip(tail, value.shape))


def product(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, y = bound("input other", args, kwargs)
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
        layout = merged(left.layout, right.layout)
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


def negative(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    step = rec.step_of(args[0])
    assert step is not None
    return [(result, rec.add("scale", (step.index,), step.layout, rec.place(name), by=-1.0))]


def gated(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, dim = bound("input dim", args, kwargs, dim=-1)
    step = rec.step_of(x)
    assert step is not None
    if single(step.layout, dim) != UNITS:
        return "gates are followed where they halve the units"
    layout = resized(step.layout, dim, x.shape[dim] // 2)
    value, gate = (rec.add("units", (step.index,), layout, rec.place(name)) for _ in range(2))
    opened = rec.add("function", (gate.index,), layout, rec.place(name), act=activation("sigmoid"))
    return [(result, rec.add("multiply", (value.index, opened.index), layout, rec.place(name)))]


def dropped(rec: Recorder, name: str, func: Any, args: Any, kwargs: Any, result: Tensor) -> Made:
    x, p, training = bound("input p training", args, kwargs, p=0.5, training=True)
    step = rec.step_of(x)
    assert step is not None
    if not training or p == 0:
        return [(result, rec.add("same", (step.index,), step.layout, rec.place(name)))]
    return [(result, rec.add("dropout", (step.index,), step.layout, rec.place(name), p=p, whole=name != "dropout"))]
