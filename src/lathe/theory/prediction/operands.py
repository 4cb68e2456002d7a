"""What handlers of operations share: arguments by name, and what axes of operands stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from lathe.theory.prediction.layout import INPUTS, UNITS, Layout

if TYPE_CHECKING:
    from lathe.theory.prediction.reading import Recorder, Step

__all__ = [
    "HINTS",
    "Handler",
    "Made",
    "as_tuple",
    "bound",
    "features_last",
    "grid_labels",
    "merged",
    "operand",
    "resized",
    "single",
    "units_second",
]

#: The steps that a call made, with their tensors; or why it cannot be followed.
Made: TypeAlias = "list[tuple[Tensor, Step]] | str"
Handler: TypeAlias = Callable[..., Made]

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


def bound(names: str, args: Any, kwargs: Any, **defaults: Any) -> list[Any]:
    """Arguments by name, wherever they were given."""
    keys = names.split()
    values = {**defaults, **dict(zip(keys, args)), **kwargs}
    return [values.get(key) for key in keys]


def features_last(rec: Recorder, x: Tensor) -> Layout:
    """Inputs first, units last, positions between."""
    first = ((INPUTS, x.shape[0]),) if x.shape[0] == rec.batch else ((0, x.shape[0]),) if x.shape[0] > 1 else ()
    if x.ndim == 1:
        return (((UNITS, x.shape[0]),),)
    middle = tuple(((axis + 1, size),) for axis, size in enumerate(x.shape[1:-1]))
    return (first, *middle, ((UNITS, x.shape[-1]),))


def units_second(rec: Recorder, x: Tensor) -> Layout:
    grid = tuple(((axis, size),) for axis, size in enumerate(x.shape[2:]))
    return (((INPUTS, x.shape[0]),), ((UNITS, x.shape[1]),), *grid)


def operand(rec: Recorder, value: Tensor, layout: Callable[[Recorder, Tensor], Layout]) -> Step:
    return rec.step_of(value) or rec.data(value, layout(rec, value))


def merged(left: Layout, right: Layout) -> Layout:
    """The layout of two tensors that broadcast."""
    length = max(len(left), len(right))
    padded = [((),) * (length - len(each)) + tuple(each) for each in (left, right)]
    return tuple(a or b for a, b in zip(*padded))


def single(layout: Layout, axis: int) -> str | int | None:
    labels = {label for label, _ in layout[axis]}
    return labels.pop() if len(labels) == 1 else None


def grid_labels(layout: Layout) -> list[int]:
    return sorted({label for axis in layout for label, _ in axis if isinstance(label, int)})


def as_tuple(value: Any, dimensions: int) -> tuple[int, ...]:
    return (
        tuple(value)
        if isinstance(value, (tuple, list)) and len(value) > 1
        else ((int(value[0]) if isinstance(value, (tuple, list)) else int(value),) * dimensions)
    )


def resized(layout: Layout, axis: int, size: int) -> Layout:
    axis %= len(layout)
    return tuple(((UNITS, size),) if number == axis else pieces for number, pieces in enumerate(layout))
