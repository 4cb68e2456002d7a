"""Polynomials as input features for any graph network, dense or of PyTorch Geometric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Shaped
from torch import Tensor

from lathe.core.precision import at_least_float32
from lathe.nn.equivariant_graph_polynomials.contraction import GraphPolynomials, edge_list_polynomials
from lathe.nn.equivariant_graph_polynomials.expressivity import generating_polynomials, missing_polynomials
from lathe.nn.equivariant_graph_polynomials.multigraph import Multigraph

__all__ = ["Scale", "augment", "paper_polynomials", "scaled_features"]

Scale = Literal["log", "unit", "none"]


def paper_polynomials(degree: int = 6) -> list[Multigraph]:
    """The features of PPGN++: all connected simple graphs of up to so many edges that PPGN cannot compute.

    One of degree 5, eleven more of degree 6 (tables of section 5; the file names of the reference code).
    """
    return [H for edges in range(degree + 1) for H in missing_polynomials(edges, "ppgn")]


def scaled_features(features: Shaped[Tensor, "... channels n n"], scale: Scale = "log") -> Shaped[Tensor, "... c n n"]:
    """Counts brought to a size that a network can take.

    Args:
        scale: "log": sign(x) log(1 + |x|), which loses nothing; "unit": the reference's: the channels of each pair of
            nodes to length one, then each channel of a graph to Frobenius norm one; "none".

    Raises:
        ValueError: for another scale.
    """
    if scale == "log":
        return features.sign() * features.abs().log1p()
    if scale == "unit":
        for axes in (-3, (-2, -1)):
            norm = torch.linalg.vector_norm(features, dim=axes, keepdim=True)
            features = features / torch.where(norm > 0, norm, 1.0)
        return features
    if scale == "none":
        return features
    raise ValueError(f"scale must be 'log', 'unit' or 'none', got {scale!r}")


def augment(
    graph: Any,
    model: str | int = "gin",
    degree: int = 5,
    *,
    order: int | None = None,
    scale: Scale = "log",
    polynomials: Sequence[Multigraph] | None = None,
) -> Any:
    """What a model cannot compute of a graph up to a degree, as further input features for it.

    Of the missing polynomials only as many as are needed: the others follow from them (`generating_polynomials`).

    Args:
        graph: dense adjacencies (..., n, n), of simple graphs; or a `Data` or `Batch` of PyTorch Geometric. As
            `transform=partial(augment, model="gin")` of a data set, each graph is done once.
        model, degree, order: as in `generating_polynomials`.
        scale: as in `scaled_features`; "log" or "none" for edge lists.
        polynomials: these instead, of any kind.

    Returns:
        Dense: features (..., channels, n, n), values at nodes on the diagonal, invariants constant. For PyTorch
        Geometric: a copy with columns added to `x` (values at nodes, invariants) and `edge_attr` (values at pairs, on
        the edges in their order); what was there stands before them. Edge weights are not looked at.

    Raises:
        TypeError: where `graph` is neither.
        ValueError: for a tensor that is not square, an unknown scale or model, or nothing missing.
    """
    graphs = list(polynomials) if polynomials is not None else generating_polynomials(degree, model, order)
    if not graphs:
        raise ValueError(f"nothing is missing of model {model!r} up to degree {degree}: there is no feature to add")
    if isinstance(graph, Tensor):
        if graph.ndim < 2 or graph.shape[-1] != graph.shape[-2]:
            raise ValueError(f"graph must be (..., n, n), got {tuple(graph.shape)}")
        floating = graph if graph.is_floating_point() else graph.to(torch.get_default_dtype())
        return _dense_features(floating, graphs, scale)
    if not hasattr(graph, "edge_index"):
        raise TypeError(f"graph must be a tensor or a Data of PyTorch Geometric, got {type(graph).__name__}")
    return _with_columns(graph, graphs, scale)


def _dense_features(X: Tensor, graphs: Sequence[Multigraph], scale: Scale, mask: Tensor | None = None) -> Tensor:
    """Features (..., channels, n, n) of adjacencies, computed in float32 at least."""
    pairs = [H if H.order == 2 else _as_pairs(H) for H in graphs]
    wide = X.to(at_least_float32(X.dtype))
    return scaled_features(GraphPolynomials(pairs)(wide, mask), scale).to(X.dtype)


def _as_pairs(H: Multigraph) -> Multigraph:
    """Values at nodes on the diagonal; invariants at every pair, which are two nodes more, on no edge."""
    if H.order == 1:
        return Multigraph(H.edges, H.marks * 2, H.num_nodes)
    return Multigraph(H.edges, (H.num_nodes, H.num_nodes + 1), H.num_nodes + 2)


def _with_columns(data: Any, graphs: Sequence[Multigraph], scale: Scale) -> Any:
    if scale not in ("log", "none"):
        raise ValueError(f"scale must be 'log' or 'none' for edge lists, got {scale!r}")
    index, nodes = data.edge_index, data.num_nodes
    batch = getattr(data, "batch", None)
    count = getattr(data, "num_graphs", 1) if batch is not None else 1
    values = edge_list_polynomials(index, graphs, num_nodes=nodes, batch=batch, num_graphs=count)
    dtype = data.x.dtype if data.x is not None and data.x.is_floating_point() else torch.get_default_dtype()
    columns: dict[str, list[Tensor]] = {"x": [], "edge_attr": []}
    for H, value in zip(graphs, values):
        column = value.log1p() if scale == "log" else value
        if H.order == 0:
            column = column.expand(nodes) if batch is None else column[batch.cpu()]
        columns["edge_attr" if H.order == 2 else "x"].append(column.to(index.device, dtype))
    result = data.clone()
    for name, new in columns.items():
        if new:
            old = getattr(data, name, None)
            parts = [] if old is None else [old[:, None] if old.ndim == 1 else old]
            setattr(result, name, torch.cat([*(part.to(dtype) for part in parts), torch.stack(new, 1)], 1))
    return result
