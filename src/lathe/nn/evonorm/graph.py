"""Normalisation-activation layers as graphs of elementary operations: the space that EvoNorm was found in.

A graph computes a tensor of x's shape from x, a constant zero and two trainable channel vectors; weight and bias follow
outside of it. `to_module` makes it a layer (differentiable as often as you like), `random_graph` draws one, `mutate`
changes one node.
Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020, arXiv 2004.02967, Section 3.1 and Table 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = [
    "ARITY",
    "BASELINE_GRAPHS",
    "EVONORM_GRAPHS",
    "INDEX_SETS",
    "PRIMITIVES",
    "GraphLayer",
    "Node",
    "NormActGraph",
    "mutate",
    "random_graph",
]

ARITY: dict[str, int] = {
    **dict.fromkeys(("add", "mul", "div", "max"), 2),
    **dict.fromkeys(("neg", "sigmoid", "tanh", "exp", "log", "abs", "square", "sqrt", "mean", "rms", "std"), 1),
}
"""The 15 primitives and how many operands each takes. mean, rms and std are moments and take an index set too."""
PRIMITIVES = tuple(ARITY)
INDEX_SETS = ("batch", "layer", "instance", "group")
"""What a moment is taken over: (b, w, h), (w, h, c), (w, h) and (w, h, c / groups)."""

_MOMENTS = ("mean", "rms", "std")
_COMMUTATIVE = ("add", "mul", "max")
# The four fixed nodes.
X, ZERO, V0, V1 = range(4)


@dataclass(frozen=True)
class Node:
    """One operation: a primitive, the nodes it takes, and what a moment is taken over (None for the others)."""

    op: str
    operands: tuple[int, ...]
    over: str | None = None


class NormActGraph:
    """A directed acyclic graph of primitives from x to a tensor of its shape.

    Nodes 0 to 3 are fixed: x, the constant zero, and the trainable channel vectors v0 (starts at zero) and v1 (at one).
    The given nodes are numbered from 4 on; the last one is the output.

    Args:
        nodes: `(op, operands)`, or `(op, operands, index_set)` for the moments mean, rms and std.

    Raises:
        ValueError: on an unknown primitive or index set, a wrong number of operands, an operand that is no earlier
            node, and where there are no nodes.

    Example:
        >>> NormActGraph([("sigmoid", (0,)), ("mul", (0, 4))]).expression()
        'x * sigmoid(x)'
    """

    def __init__(self, nodes: Iterable[Node | Sequence[Any]]) -> None:
        self.nodes = tuple(
            node if isinstance(node, Node) else Node(node[0], tuple(node[1]), *node[2:]) for node in nodes
        )
        if not self.nodes:
            raise ValueError("nodes must hold at least one operation, got none")
        for k, node in enumerate(self.nodes, start=4):
            if node.op not in ARITY:
                raise ValueError(f"nodes: node {k} has the unknown primitive {node.op!r}; known are {', '.join(ARITY)}")
            if len(node.operands) != ARITY[node.op]:
                raise ValueError(f"nodes: node {k} ({node.op}) takes {ARITY[node.op]} operands, got {node.operands}")
            if not all(0 <= operand < k for operand in node.operands):
                raise ValueError(
                    f"nodes: operands of node {k} must be earlier nodes (0 to {k - 1}), got {node.operands}"
                )
            if node.op in _MOMENTS and node.over not in INDEX_SETS:
                raise ValueError(f"nodes: node {k} ({node.op}) needs an index set of {INDEX_SETS}, got {node.over!r}")
            if node.op not in _MOMENTS and node.over is not None:
                raise ValueError(f"nodes: node {k} ({node.op}) takes no index set, got {node.over!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NormActGraph) and self.nodes == other.nodes

    def __hash__(self) -> int:
        return hash(self.nodes)

    def __repr__(self) -> str:
        return f"NormActGraph({self.expression()})"

    @property
    def live(self) -> frozenset[int]:
        """Numbers of the nodes, fixed ones included, on a path to the output."""
        found, open_ = set(), [len(self.nodes) + 3]
        while open_:
            k = open_.pop()
            if k not in found:
                found.add(k)
                open_ += self.nodes[k - 4].operands if k >= 4 else ()
        return frozenset(found)

    @property
    def batch_independent(self) -> bool:
        """Whether no moment over the batch is on a path to the output."""
        return not any(self.nodes[k - 4].over == "batch" for k in self.live if k >= 4)

    def simplify(self) -> NormActGraph:
        """The same function without dead nodes and without repeated subexpressions, in a canonical order."""
        keys, number, kept = self._keys(), {k: k for k in range(4)}, []
        by_key: dict[str, int] = {keys[k]: k for k in range(4)}

        def visit(k: int) -> int:
            if keys[k] not in by_key:
                node = self.nodes[k - 4]
                operands = tuple(visit(operand) for operand in self._ordered(node, keys))
                kept.append(Node(node.op, operands, node.over))
                by_key[keys[k]] = len(kept) + 3
            number[k] = by_key[keys[k]]
            return number[k]

        visit(len(self.nodes) + 3)
        return NormActGraph(kept)

    def hash(self) -> str:
        """A hexadecimal digest that graphs share when they simplify to the same graph."""
        return self._keys()[-1]

    def _keys(self) -> list[str]:
        """A digest of each node's subexpression; the order of operands does not matter where the primitive commutes."""
        keys = ["x", "zero", "v0", "v1"]
        for node in self.nodes:
            told = "|".join([node.op, node.over or "", *(keys[operand] for operand in self._ordered(node, keys))])
            keys.append(hashlib.sha256(told.encode()).hexdigest()[:32])
        return keys

    @staticmethod
    def _ordered(node: Node, keys: list[str]) -> list[int]:
        return sorted(node.operands, key=keys.__getitem__) if node.op in _COMMUTATIVE else list(node.operands)

    def expression(self) -> str:
        """The formula as one reads it, without weight and bias."""
        return self._formula(_TEXT)

    def latex(self) -> str:
        """The formula in LaTeX, without weight and bias and without dollar signs."""
        return self._formula(_LATEX)

    def _formula(self, forms: dict[str, Any]) -> str:
        # Each formula with how tightly it binds: 0 a sum, 1 a product, 2 what never needs brackets.
        written: list[tuple[str, int]] = [(name, 2) for name in forms["fixed"]]
        for node in self.nodes:
            form, binds, wanted = forms[node.op]
            operands = []
            for operand, least in zip(node.operands, wanted):
                text, binding = written[operand]
                operands.append(text if binding >= least else f"({text})")
            written.append((form.format(*operands, over=node.over).replace(" + -", " - "), binds))
        return written[-1][0]

    def to_module(
        self,
        num_features: int,
        *,
        groups: int = 32,
        momentum: float = 0.1,
        eps: float = 1e-5,
        guard: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GraphLayer:
        """A fresh layer that computes this graph; see `GraphLayer` for the arguments."""
        return GraphLayer(
            self, num_features, groups=groups, momentum=momentum, eps=eps, guard=guard, device=device, dtype=dtype
        )


_TEXT: dict[str, Any] = {
    "fixed": ("x", "0", "v0", "v1"),
    "add": ("{} + {}", 0, (0, 0)),
    "mul": ("{} * {}", 1, (1, 1)),
    "div": ("{} / {}", 1, (1, 2)),
    "max": ("max({}, {})", 2, (0, 0)),
    "neg": ("-{}", 0, (1,)),
    "exp": ("exp({})", 2, (0,)),
    "abs": ("abs({})", 2, (0,)),
    "square": ("{}^2", 1, (2,)),
    "sqrt": ("sign_sqrt({})", 2, (0,)),
    "log": ("sign_log({})", 2, (0,)),
    **{name: (name + "({})", 2, (0,)) for name in ("sigmoid", "tanh")},
    **{name: (name + "_{over}({})", 2, (0,)) for name in _MOMENTS},
}
_LATEX: dict[str, Any] = {
    "fixed": ("x", "0", "v_0", "v_1"),
    "add": ("{} + {}", 0, (0, 0)),
    "mul": (r"{} \, {}", 1, (1, 1)),
    "div": (r"\frac{{{}}}{{{}}}", 2, (0, 0)),
    "max": (r"\max({}, {})", 2, (0, 0)),
    "neg": ("-{}", 0, (1,)),
    "exp": ("e^{{{}}}", 1, (0,)),
    "abs": ("|{}|", 2, (0,)),
    "square": ("{{{}}}^2", 1, (2,)),
    "sqrt": (r"\operatorname{{sgn}}\sqrt{{|{}|}}", 1, (0,)),
    "log": (r"\operatorname{{sgn}}\ln|{}|", 1, (0,)),
    "sigmoid": (r"\sigma({})", 2, (0,)),
    "tanh": (r"\tanh({})", 2, (0,)),
    "mean": (r"\mu_{{\mathrm{{{over}}}}}({})", 2, (0,)),
    "rms": (r"r_{{\mathrm{{{over}}}}}({})", 2, (0,)),
    "std": (r"s_{{\mathrm{{{over}}}}}({})", 2, (0,)),
}


class GraphLayer(nn.Module):
    """A layer that computes a `NormActGraph` and applies weight and bias to it; differentiable any number of times.

    Values keep size one along the axes that they do not vary over, so moments stay small until they meet x. Moments
    over the batch become running averages in evaluation: a buffer a node, which holds the mean, or the mean square or
    variance under the root.

    Args:
        graph: what is computed; dead nodes and repeated subexpressions cost nothing.
        num_features: channels of the input.
        groups: of the moments over groups; the largest divisor of `num_features` up to it is taken.
        momentum: share of the new batch in the running averages.
        eps: added under the root of every rms and std.
        guard: keeps div, log and sqrt finite: x / (y + guard sgn y) with sgn 0 = 1, sgn(x) ln(|x| + guard),
            sgn(x) sqrt(|x| + guard).

    Shape: `(batch, num_features, *spatial)` to the same.
    """

    v0: nn.Parameter | None
    v1: nn.Parameter | None

    def __init__(
        self,
        graph: NormActGraph,
        num_features: int,
        *,
        groups: int = 32,
        momentum: float = 0.1,
        eps: float = 1e-5,
        guard: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_features <= 0:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        if groups <= 0:
            raise ValueError(f"groups must be at least 1, got {groups}")
        self.graph, self.num_features = graph.simplify(), num_features
        self.momentum, self.eps, self.guard = momentum, eps, guard
        self.groups = next(count for count in range(min(groups, num_features), 0, -1) if num_features % count == 0)

        def vector(value: float) -> nn.Parameter:
            return nn.Parameter(torch.full((num_features,), value, device=device, dtype=dtype))

        self.weight, self.bias = vector(1.0), vector(0.0)
        live = self.graph.live
        self.register_parameter("v0", vector(0.0) if V0 in live else None)
        self.register_parameter("v1", vector(1.0) if V1 in live else None)
        for k, node in enumerate(self.graph.nodes, start=4):
            if node.over == "batch":
                start = torch.zeros if node.op == "mean" else torch.ones
                self.register_buffer(f"running_{node.op}_{k}", start(num_features, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "batch channels *spatial"]) -> Float[Tensor, "batch channels *spatial"]:
        if not x.is_floating_point():
            raise TypeError(f"x must be of a floating dtype, got {x.dtype}")
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"x must have {self.num_features} channels in dimension 1, got shape {tuple(x.shape)}")
        wide = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).reshape(*x.shape[:2], -1)
        zero = torch.zeros(1, 1, 1, device=x.device, dtype=wide.dtype)
        v0, v1 = (zero if v is None else v.view(1, -1, 1).to(wide.dtype) for v in (self.v0, self.v1))
        values: list[Tensor] = [wide, zero, v0, v1]
        for k, node in enumerate(self.graph.nodes, start=4):
            operands = [values[operand] for operand in node.operands]
            if node.op in _MOMENTS:
                values.append(self._moment(k, node, operands[0]))
            else:
                values.append(_ELEMENTWISE[node.op](self.guard, *operands))
        weight, bias = (p.view(1, -1, 1).to(wide.dtype) for p in (self.weight, self.bias))
        return (values[-1] * weight + bias).expand_as(wide).reshape(x.shape).to(x.dtype)

    def _moment(self, k: int, node: Node, x: Tensor) -> Tensor:
        running = getattr(self, f"running_{node.op}_{k}") if node.over == "batch" else None
        if running is not None and not self.training:
            moment = running.view(1, -1, 1).to(x.dtype)
        elif node.op == "mean":
            moment = self._mean(x, node.over)
        else:
            deviation = x - self._mean(x, node.over) if node.op == "std" else x
            moment = self._mean(deviation.square(), node.over)
        if running is not None and self.training:
            with torch.no_grad():
                running.lerp_(moment.view(-1).expand_as(running).to(running.dtype), self.momentum)
        return moment if node.op == "mean" else (moment + self.eps).sqrt()

    def _mean(self, x: Tensor, over: str | None) -> Tensor:
        """The mean over an index set, of size one along it. Axes of size one are constant, so they change no mean."""
        if over == "batch":
            return x.mean((0, 2), keepdim=True)
        if over == "layer":
            return x.mean((1, 2), keepdim=True)
        x = x.mean(2, keepdim=True)
        if over == "instance" or x.shape[1] == 1:
            return x
        grouped = x.unflatten(1, (self.groups, -1))
        return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"{self.num_features}, {self.graph.expression()}, groups={self.groups}"


_ELEMENTWISE: dict[str, Callable[..., Tensor]] = {
    "add": lambda guard, x, y: x + y,
    "mul": lambda guard, x, y: x * y,
    "div": lambda guard, x, y: x / (y + torch.where(y < 0, y.new_tensor(-guard), y.new_tensor(guard))),
    "max": lambda guard, x, y: torch.maximum(x, y),
    "neg": lambda guard, x: -x,
    "sigmoid": lambda guard, x: x.sigmoid(),
    "tanh": lambda guard, x: x.tanh(),
    "exp": lambda guard, x: x.exp(),
    "log": lambda guard, x: x.sign() * (x.abs() + guard).log(),
    "abs": lambda guard, x: x.abs(),
    "square": lambda guard, x: x.square(),
    "sqrt": lambda guard, x: x.sign() * (x.abs() + guard).sqrt(),
}


def random_graph(rng: torch.Generator, n_nodes: int = 10, batch_independent: bool = False) -> NormActGraph:
    """A graph of `n_nodes` random nodes: primitive, index set and operands are drawn uniformly, in this order.

    Args:
        batch_independent: leave out moments over the batch (the search for the S layers).
    """
    if n_nodes < 1:
        raise ValueError(f"n_nodes must be at least 1, got {n_nodes}")
    return NormActGraph([_random_node(rng, k, batch_independent) for k in range(4, 4 + n_nodes)])


def mutate(graph: NormActGraph, rng: torch.Generator, batch_independent: bool = False) -> NormActGraph:
    """A copy of `graph` with one node, chosen uniformly, drawn anew (its primitive, index set and operands)."""
    nodes = list(graph.nodes)
    k = _draw(rng, len(nodes))
    nodes[k] = _random_node(rng, k + 4, batch_independent)
    return NormActGraph(nodes)


def _random_node(rng: torch.Generator, k: int, batch_independent: bool) -> Node:
    op = PRIMITIVES[_draw(rng, len(PRIMITIVES))]
    sets = INDEX_SETS[1:] if batch_independent else INDEX_SETS
    over = sets[_draw(rng, len(sets))] if op in _MOMENTS else None
    return Node(op, tuple(_draw(rng, k) for _ in range(ARITY[op])), over)


def _draw(rng: torch.Generator, choices: int) -> int:
    return int(torch.randint(choices, (), generator=rng))


def _normalized(over: str, activation: str) -> NormActGraph:
    """(x - mean) / std over an index set, then ReLU or SiLU."""
    nodes: list[Sequence[Any]] = [
        ("mean", (X,), over),
        ("neg", (4,)),
        ("add", (X, 5)),
        ("std", (X,), over),
        ("div", (6, 7)),
    ]
    nodes += [("max", (8, ZERO))] if activation == "relu" else [("sigmoid", (8,)), ("mul", (8, 9))]
    return NormActGraph(nodes)


EVONORM_GRAPHS: dict[str, NormActGraph] = {
    "B0": NormActGraph(
        [
            ("std", (X,), "batch"),
            ("mul", (V1, X)),
            ("std", (X,), "instance"),
            ("add", (5, 6)),
            ("max", (4, 7)),
            ("div", (X, 8)),
        ]
    ),
    "B1": NormActGraph(
        [
            ("std", (X,), "batch"),
            ("rms", (X,), "instance"),
            ("mul", (X, 5)),
            ("add", (6, 5)),
            ("max", (4, 7)),
            ("div", (X, 8)),
        ]
    ),
    "B2": NormActGraph(
        [
            ("std", (X,), "batch"),
            ("rms", (X,), "instance"),
            ("neg", (X,)),
            ("add", (5, 6)),
            ("max", (4, 7)),
            ("div", (X, 8)),
        ]
    ),
    "S0": NormActGraph([("mul", (V1, X)), ("sigmoid", (4,)), ("mul", (X, 5)), ("std", (X,), "group"), ("div", (6, 7))]),
    "S1": NormActGraph([("sigmoid", (X,)), ("mul", (X, 4)), ("std", (X,), "group"), ("div", (5, 6))]),
    "S2": NormActGraph([("sigmoid", (X,)), ("mul", (X, 4)), ("rms", (X,), "group"), ("div", (5, 6))]),
}
"""The six layers that the search of the paper found."""

BASELINE_GRAPHS: dict[str, NormActGraph] = {
    "BN-ReLU": _normalized("batch", "relu"),
    "BN-SiLU": _normalized("batch", "silu"),
    "GN-ReLU": _normalized("group", "relu"),
    "GN-SiLU": _normalized("group", "silu"),
    "LN-ReLU": _normalized("layer", "relu"),
    # Filter response normalisation with its thresholded linear unit (the threshold is v0).
    "FRN-TLU": NormActGraph([("rms", (X,), "instance"), ("div", (X, 4)), ("max", (5, V0))]),
}
"""What the paper compares with, in the same space."""
