"""PPGN++: networks on pairs of nodes that multiply their features as matrices, with polynomials as further inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from lathe.core.precision import autocasts
from lathe.nn.equivariant_graph_polynomials.expressivity import generating_polynomials
from lathe.nn.equivariant_graph_polynomials.features import Scale, _dense_features, paper_polynomials
from lathe.nn.equivariant_graph_polynomials.multigraph import Multigraph

__all__ = ["PPGN", "PPGNBlock", "PPGNConv"]

Features = Literal["paper", "minimal"] | Sequence[Multigraph] | None  # polynomials that are appended to an input


class PPGNBlock(nn.Module):
    """One block of PPGN++: W [x; u v] + b, with u = MLP([x; x^T; I]) and v = MLP([x; I]) multiplied channel by channel.

    The MLPs act on each pair of nodes alone. The transpose is what PPGN++ has over PPGN: without it no layer can read
    x_ji at (i, j).

    Args:
        in_channels, out_channels: features of a pair of nodes.
        depth: linear maps of each MLP, an activation after each.
        transpose: false for the block of PPGN.
        identity: appends the identity matrix to the input, as the reference does before each block.
        aggr: "sum" multiplies matrices; "mean" also divides by the number of nodes, which keeps the size of features
            the same from small graphs to large ones.
        activation: makes the activation.
        device, dtype: of the parameters.

    Shape: `(batch, in_channels, n, n)`, and a mask `(batch, n)` of the nodes that are there
        -> `(batch, out_channels, n, n)`, zero outside of the mask.

    Raises:
        ValueError: for channels or a depth below 1, an unknown aggr, or an input or mask of the wrong shape.

    Source: section 5 (PPGN++), after Maron et al. 2019 (arXiv 1905.11136).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        depth: int = 2,
        transpose: bool = True,
        *,
        identity: bool = True,
        aggr: Literal["sum", "mean"] = "sum",
        activation: Callable[[], nn.Module] = nn.ReLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_channels < 1 or out_channels < 1 or depth < 1:
            raise ValueError(
                f"in_channels, out_channels and depth must be at least 1, got {in_channels}, {out_channels} and {depth}"
            )
        if aggr not in ("sum", "mean"):
            raise ValueError(f"aggr must be 'sum' or 'mean', got {aggr!r}")
        self.in_channels, self.out_channels, self.depth = in_channels, out_channels, depth
        self.transpose, self.identity, self.aggr = transpose, identity, aggr
        self.activation = activation()

        def made(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        h = out_channels
        # One matrix for all that is linear in x: u, v, the skip connection, and u's part that reads x transposed.
        self.weight = made((4 if transpose else 3) * h, in_channels)
        self.bias = made(3 * h)
        # What the identity matrix adds to u (its transpose with it), v and the skip connection, on the diagonal only.
        self.diagonal = made(3, h) if identity else None
        self.mixed = made(h, h)
        self.left = nn.ParameterList(made(h, h) for _ in range(depth - 1))
        self.right = nn.ParameterList(made(h, h) for _ in range(depth - 1))
        self.left_bias = nn.ParameterList(made(h) for _ in range(depth - 1))
        self.right_bias = nn.ParameterList(made(h) for _ in range(depth - 1))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Xavier's uniform start for each linear map as the reference has them, biases zero."""
        h, c, one = self.out_channels, self.in_channels, int(self.identity)
        fans = [h + (1 + self.transpose) * (c + one), h + c + one, 2 * h + c + one]
        fans += fans[:1] if self.transpose else []
        with torch.no_grad():
            for part, fan in zip(self.weight.split(h), fans):
                part.uniform_(-((6 / fan) ** 0.5), (6 / fan) ** 0.5, generator=generator)
            if self.diagonal is not None:
                for part, fan in zip(self.diagonal, fans):
                    part.uniform_(-((6 / fan) ** 0.5), (6 / fan) ** 0.5, generator=generator)
            self.mixed.uniform_(-((6 / fans[2]) ** 0.5), (6 / fans[2]) ** 0.5, generator=generator)
            for matrix in (*self.left, *self.right):
                matrix.uniform_(-((3 / h) ** 0.5), (3 / h) ** 0.5, generator=generator)
            for bias in (self.bias, *self.left_bias, *self.right_bias):
                bias.zero_()

    def forward(
        self, x: Float[Tensor, "batch in_channels n n"], mask: Shaped[Tensor, "batch n"] | None = None
    ) -> Float[Tensor, "batch out_channels n n"]:
        require_pairs(x, self.in_channels, mask)
        batch, _, n, _ = x.shape
        shape = (batch, self.out_channels, n, n)

        def mapped(weight: Tensor, bias: Tensor, y: Tensor) -> Tensor:
            return torch.baddbmm(bias[:, None], weight.expand(batch, -1, -1), y.flatten(2))

        inputs: tuple[Tensor | None, ...] = (x, self.weight, self.bias, self.diagonal)
        if autocasts(x.device):
            # Here, since autocast does not reach into the backward pass of what is written out.
            inputs = tuple(
                part if part is None else part.to(torch.get_autocast_dtype(x.device.type)) for part in inputs
            )
        u, v, skip = _Linear.apply(*inputs)
        scale, mixed = None, self.mixed.to(u.dtype)
        if mask is not None:  # the sum runs over the nodes that are there, and so does the mean
            scale = mask.to(u.dtype)[:, None, :, None]
            if self.aggr == "mean":
                scale = scale / scale.sum(2, keepdim=True).clamp(min=1)
        elif self.aggr == "mean":
            mixed = mixed / max(n, 1)
        u = self._activated(u, fresh=self.transpose)
        v = self._activated(v, fresh=False, scale=scale if self.depth == 1 else None)
        for number, (W, b, M, c) in enumerate(zip(self.left, self.left_bias, self.right, self.right_bias)):
            last = number == self.depth - 2
            u = self._activated(mapped(W, b, u).view(shape), fresh=True)
            v = self._activated(mapped(M, c, v).view(shape), fresh=True, scale=scale if last else None)
        y: Tensor = _AddProduct.apply(skip, mixed, u, v)
        return y if mask is None else _masked(y, mask)

    def _activated(self, x: Tensor, *, fresh: bool, scale: Tensor | None = None) -> Tensor:
        """The activation, times `scale`."""
        if not isinstance(self.activation, nn.ReLU):
            y = self.activation(x)
            return y if scale is None else y * scale
        if scale is not None:  # before a ReLU it is the same, and one tensor less to keep
            x, fresh = x * scale, True
        return x.relu_() if fresh else x.relu()

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, depth={self.depth}, transpose={self.transpose}, "
            f"identity={self.identity}, aggr={self.aggr!r}"
        )


class _Linear(torch.autograd.Function):
    """All that is linear in x at once: u (from x and its transpose), v and the skip connection, (batch, h, n, n) each.

    Written out, because slices of one result would each be padded to all of it in the backward pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, diagonal: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        batch, _, n, _ = x.shape
        h = len(bias) // 3
        bias = nn.functional.pad(bias, (0, len(weight) - 3 * h))
        linear = torch.baddbmm(bias[:, None], weight.expand(batch, -1, -1), x.flatten(2))
        maps = linear.unflatten(2, (n, n))
        u, v, skip = (maps[:, part * h : (part + 1) * h] for part in range(3))
        if len(weight) > 3 * h:
            u = u + maps[:, 3 * h :].mT
        if diagonal is not None:
            for part, added in zip((u, v, skip), diagonal):
                part.diagonal(dim1=-2, dim2=-1).add_(added[:, None])
        return u, v, skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, weight, _, diagonal = inputs
        ctx.save_for_backward(x, weight)
        ctx.identity = diagonal is not None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        parts = list(gradients)
        if len(weight) > parts[0].shape[1] * 3:
            parts.append(parts[0].mT)
        flat = torch.cat(parts, 1).flatten(2)
        of_x = (weight.T.expand(len(x), -1, -1) @ flat).view(x.shape) if ctx.needs_input_grad[0] else None
        of_weight = (flat @ x.flatten(2).mT).sum(0)
        of_bias = flat[:, : 3 * parts[0].shape[1]].sum((0, 2))
        diagonals = [part.diagonal(dim1=-2, dim2=-1).sum((0, 2)) for part in gradients]
        return of_x, of_weight, of_bias, torch.stack(diagonals) if ctx.identity else None


class _AddProduct(torch.autograd.Function):
    """skip + mixed (u v); the product u v is made again in the backward pass instead of being kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(skip: Tensor, mixed: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return torch.baddbmm(skip.flatten(2), mixed.expand(len(u), -1, -1), (u @ v).flatten(2)).view_as(u)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        mixed, u, v = ctx.saved_tensors
        flat = gradients[0].flatten(2)
        of_product = (mixed.T.expand(len(u), -1, -1) @ flat).view_as(u)
        of_mixed = (flat @ (u @ v).flatten(2).mT).sum(0)
        return gradients[0], of_mixed, of_product @ v.mT, u.mT @ of_product


class PPGN(nn.Module):
    """PPGN++: blocks on pairs of nodes, then a head for graphs, nodes or pairs.

    Args:
        in_channels: features of a pair of nodes; the first is the adjacency where `features` are asked for.
        hidden: channels of all blocks.
        layers: number of blocks.
        out_channels: of the result.
        features: polynomials of the adjacency that are appended to the input: "paper" (the 12 of PPGN++(6)), "minimal"
            (4 of them, from which the network can make the others), a list of multigraphs, or none.
        scale: of these features, as in `scaled_features`.
        task: "graph", "node" or "edge".
        head: width of the head's hidden layer; `hidden` by default.
        depth, transpose, aggr, activation: as in `PPGNBlock`; `transpose=False` without features is PPGN.
        device, dtype: of the parameters.

    Shape: `(batch, in_channels, n, n)` and a mask `(batch, n)` -> `(batch, out_channels)` for graphs,
        `(batch, n, out_channels)` for nodes, `(batch, out_channels, n, n)` for edges; zero where the mask is. Graphs of
        one node have no pairs of two: their mean off the diagonal is 0.

    Raises:
        ValueError: for sizes below 1, an unknown task or set of features, or an input or mask of the wrong shape.

    Source: section 5; the reference's heads for graphs.

    Example:
        >>> net = PPGN(1, 16, 2, 3, features="minimal")
        >>> net(torch.ones(2, 1, 5, 5)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        layers: int,
        out_channels: int,
        *,
        features: Features = None,
        scale: Scale = "log",
        task: Literal["graph", "node", "edge"] = "graph",
        head: int | None = None,
        depth: int = 2,
        transpose: bool = True,
        aggr: Literal["sum", "mean"] = "sum",
        activation: Callable[[], nn.Module] = nn.ReLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if layers < 1 or out_channels < 1 or (head is not None and head < 1):
            raise ValueError(f"layers, out_channels and head must be at least 1, got {layers}, {out_channels}, {head}")
        if task not in ("graph", "node", "edge"):
            raise ValueError(f"task must be 'graph', 'node' or 'edge', got {task!r}")
        self.in_channels, self.task, self.scale = in_channels, task, scale
        self.features = _named_features(features)
        width = in_channels + len(self.features)
        self.blocks = nn.ModuleList(
            PPGNBlock(
                hidden if number else width,
                hidden,
                depth,
                transpose,
                aggr=aggr,
                activation=activation,
                device=device,
                dtype=dtype,
            )
            for number in range(layers)
        )
        head = hidden if head is None else head
        read = hidden if task == "edge" else 2 * hidden
        self.head = nn.Sequential(
            nn.Linear(read, head, device=device, dtype=dtype),
            activation(),
            nn.Linear(head, out_channels, device=device, dtype=dtype),
        )
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(
        self, x: Float[Tensor, "batch in_channels n n"], mask: Shaped[Tensor, "batch n"] | None = None
    ) -> Float[Tensor, "batch *result"]:
        require_pairs(x, self.in_channels, mask)
        if mask is not None and not torch.compiler.is_compiling() and (groups := _groups_of_like_size(mask)):
            return self._in_groups(x, mask, groups)
        return self._together(x, mask)

    def _in_groups(self, x: Tensor, mask: Tensor, groups: list[tuple[Tensor, int]]) -> Tensor:
        """Each group without the padding that it does not need, results in the order of the graphs."""
        n, parts = x.shape[-1], []
        for members, size in groups:
            y = self._together(x[members, :, :size, :size], mask[members, :size])
            padding = {"graph": (), "node": (0, 0, 0, n - size), "edge": (0, n - size) * 2}[self.task]
            parts.append(nn.functional.pad(y, padding) if padding else y)
        order = torch.cat([members for members, _ in groups]).argsort()
        return torch.cat(parts)[order]

    def _together(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.features:
            x = torch.cat([x, _dense_features(x[:, 0], self.features, self.scale, mask)], 1)
        for block in self.blocks:
            x = block(x, mask)
        if self.task == "edge":
            y = self.head(x.movedim(1, -1)).movedim(-1, 1)
            return y if mask is None else _masked(y, mask)
        present = x.new_ones(x.shape[0], x.shape[-1]) if mask is None else mask.to(x.dtype)
        nodes = present.sum(1)[:, None]
        diagonal = x.diagonal(dim1=-2, dim2=-1)
        if self.task == "node":
            others = (x.sum(-1) - diagonal) / (nodes[..., None] - 1).clamp(min=1)
            y = self.head(torch.cat([diagonal, others], 1).mT)
            return y if mask is None else y * present[..., None]
        trace = diagonal.sum(-1)
        others = (x.sum((-2, -1)) - trace) / (nodes * (nodes - 1)).clamp(min=1)
        return self.head(torch.cat([trace / nodes.clamp(min=1), others], 1))


class PPGNConv(nn.Module):
    """A PPGN++ block in the place of a dense message passing layer: features of nodes in, features of nodes out.

    The adjacency and, on the diagonal, the features of the nodes are the block's input; what comes out at a node is a
    linear map of the diagonal and of the mean of its row.

    Args:
        in_channels, out_channels: features of a node.
        hidden: channels of the block; `out_channels` by default.
        depth, transpose, aggr, activation: as in `PPGNBlock`.
        device, dtype: of the parameters.

    Shape: x `(batch, n, in_channels)`, adj `(batch, n, n)` (or `(n, n)`), mask `(batch, n)` -> `(batch, n,
        out_channels)`: the arguments of PyTorch Geometric's `DenseGCNConv`.

    Raises:
        ValueError: for sizes below 1, or inputs of the wrong shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        hidden: int | None = None,
        depth: int = 2,
        transpose: bool = True,
        aggr: Literal["sum", "mean"] = "sum",
        activation: Callable[[], nn.Module] = nn.ReLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        hidden = out_channels if hidden is None else hidden
        self.block = PPGNBlock(
            in_channels + 1, hidden, depth, transpose, aggr=aggr, activation=activation, device=device, dtype=dtype
        )
        self.out = nn.Linear(2 * hidden, out_channels, device=device, dtype=dtype)

    @classmethod
    def like(
        cls,
        layer: nn.Module,
        *,
        hidden: int | None = None,
        depth: int = 2,
        transpose: bool = True,
        aggr: Literal["sum", "mean"] = "sum",
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> PPGNConv:
        """A fresh layer that fits where a dense layer of PyTorch Geometric stood (`DenseGCNConv` and its like).

        Raises:
            NotImplementedError: for layers on edge lists, which hold no pairs of nodes: use `augment` there.
            TypeError: where the layer does not tell its in_channels and out_channels.
        """
        if hasattr(layer, "propagate"):
            raise NotImplementedError(
                f"PPGNConv needs dense adjacencies, {type(layer).__name__} works on edge lists; "
                "give it more features with augment"
            )
        sizes = [getattr(layer, name, None) for name in ("in_channels", "out_channels")]
        if not all(isinstance(size, int) for size in sizes):
            raise TypeError(
                f"PPGNConv replaces dense graph layers with in_channels and out_channels, got {type(layer).__name__}"
            )
        parameter = next(layer.parameters(), torch.empty(0))
        made = cls(
            *sizes,  # type: ignore[arg-type]
            hidden=hidden,
            depth=depth,
            transpose=transpose,
            aggr=aggr,
            activation=activation,
            device=parameter.device,
            dtype=parameter.dtype,
        )
        return made.train(layer.training)

    def forward(
        self,
        x: Float[Tensor, "..."],
        adj: Float[Tensor, "..."],
        mask: Shaped[Tensor, "batch n"] | None = None,
        add_loop: bool = True,
    ) -> Float[Tensor, "batch n out_channels"]:
        """`add_loop` is there for the layers replaced; the block knows the diagonal and needs no loops."""
        if x.ndim != 3 or x.shape[-1] != self.in_channels:
            raise ValueError(f"x must be (batch, n, {self.in_channels}), got {tuple(x.shape)}")
        if adj.shape[-2:] != (x.shape[1],) * 2 or adj.ndim not in (2, 3):
            raise ValueError(f"adj must be (batch, {x.shape[1]}, {x.shape[1]}), got {tuple(adj.shape)}")
        adj = adj.to(x.dtype).expand(len(x), -1, -1)
        y = self.block(torch.cat([adj[:, None], torch.diag_embed(x.mT)], 1), mask)
        diagonal = y.diagonal(dim1=-2, dim2=-1)
        nodes = x.shape[1] if mask is None else mask.sum(1).clamp(min=1).to(x.dtype)[:, None, None]
        result = self.out(torch.cat([diagonal, y.sum(-1) / nodes], 1).mT)
        return result if mask is None else result * mask.to(x.dtype)[..., None]


def _named_features(features: Features) -> tuple[Multigraph, ...]:
    if features is None:
        return ()
    if features == "paper":
        return tuple(paper_polynomials(6))
    if features == "minimal":
        return tuple(generating_polynomials(6, "ppgn"))
    if isinstance(features, str):
        raise ValueError(f"features must be 'paper', 'minimal', a list of multigraphs or None, got {features!r}")
    return tuple(features)


def _groups_of_like_size(mask: Tensor, least: int = 4, most: int = 8) -> list[tuple[Tensor, int]]:
    """Graphs (their places) and the size that each group needs; none where grouping would save less than a tenth.

    Padding to the largest of a batch makes pairs of nodes that are none: half of all, for sizes as of molecules.
    """
    batch, n = mask.shape
    count = min(most, batch // least)
    if count < 2 or n == 0 or mask.is_meta:
        return []
    # The last node that is there: nodes need not stand in front.
    sizes = ((mask != 0) * torch.arange(1, n + 1, device=mask.device)).amax(1)
    groups = [
        (members, max(1, int(sizes[members].max()))) for members in sizes.argsort(stable=True).tensor_split(count)
    ]
    saved = 1 - sum(len(members) * size**2 for members, size in groups) / (batch * n**2)
    return groups if saved > 0.1 else []


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    present = mask.to(x.dtype)
    return x * (present[:, :, None] * present[:, None, :])[:, None]


def require_pairs(x: Tensor, channels: int, mask: Tensor | None) -> None:
    """Refuses what is no (batch, channels, n, n), or a mask that does not fit it."""
    if x.ndim != 4 or x.shape[1] != channels or x.shape[2] != x.shape[3]:
        raise ValueError(f"x must be (batch, {channels}, n, n), got {tuple(x.shape)}")
    if mask is not None and tuple(mask.shape) != (x.shape[0], x.shape[2]):
        raise ValueError(f"mask must be {(x.shape[0], x.shape[2])}, got {tuple(mask.shape)}")
