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

from typing import Any

from lathe.theory.prediction import arrangement, pointwise, weighted
from lathe.theory.prediction.operands import HINTS, Handler

__all__ = ["HANDLERS", "HINTS", "OPENING", "plain_name"]

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


def plain_name(func: Any) -> str:
    """`__iadd__`, `add_` and `Tensor.add` are all "add"."""
    name = str(getattr(func, "__name__", func)).strip("_")
    return _REVERSED.get(name, _SAME_NAME.get(name, name))


HANDLERS: dict[str, Handler] = {
    "linear": weighted.linear,
    "matmul": weighted.matmul,
    "addmm": weighted.addmm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), weighted.convolution),
    "embedding": weighted.embedding,
    "scaled_dot_product_attention": weighted.attention,
    "multi_head_attention_forward": weighted.multi_head,
    **dict.fromkeys((*pointwise.NAMED, *pointwise.BENT, "prelu", "leaky_relu", "rrelu"), pointwise.function),
    "pow": pointwise.power,
    **dict.fromkeys(("add", "sub", "rsub"), pointwise.added),
    **dict.fromkeys(("mul", "div", "rdiv"), pointwise.product),
    "neg": pointwise.negative,
    "glu": pointwise.gated,
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"), pointwise.dropped),
    **dict.fromkeys(("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"), arrangement.norm),
    **dict.fromkeys(
        (f"{kind}_pool{d}d" for kind in ("avg", "max", "adaptive_avg") for d in (1, 2, 3)), arrangement.pool
    ),
    **dict.fromkeys(("mean", "sum"), arrangement.mean),
    "pad": arrangement.padded,
    **dict.fromkeys(
        ("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"),
        arrangement.reshaped,
    ),
    **dict.fromkeys(("permute", "transpose"), arrangement.permuted),
    **dict.fromkeys(
        ("contiguous", "clone", "to", "float", "double", "type", "type_as", "detach", "alias"), arrangement.same
    ),
    **dict.fromkeys(("requires_grad", "cpu", "cuda", "expand", "expand_as", "nan_to_num"), arrangement.same),
    **dict.fromkeys(("chunk", "split", "tensor_split"), arrangement.parts),
    "getitem": arrangement.indexed,
    "cat": arrangement.joined,
}
