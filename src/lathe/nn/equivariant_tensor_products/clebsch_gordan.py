"""The Clebsch-Gordan product: every interaction, each with a weight of its own. e3nn's tensor product, faster.

z_(l3 m3) = sum_(m1 m2) C^(l1 l2 l3)_(m1 m2 m3) x_(l1 m1) y_(l2 m2) for each path (l1, l2, l3) of a triangle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lathe.nn.equivariant_tensor_products.harmonics import coupling
from lathe.nn.equivariant_tensor_products.irreps import Irrep, Irreps, IrrepsLike
from lathe.nn.equivariant_tensor_products.tables import TabledModule, flattened

__all__ = ["ClebschGordanProduct", "Mode", "Path"]

Mode = Literal["full", "channelwise", "fully_connected"]
_CONNECTIONS: dict[str, Mode] = {"uvuv": "full", "uvu": "channelwise", "uvw": "fully_connected"}


class Path(NamedTuple):
    """Which terms of the irreps interact (positions in irreps_in1, irreps_in2, irreps_out), and a constant factor."""

    i1: int
    i2: int
    out: int
    scale: float


class ClebschGordanProduct(TabledModule):
    """All equivariant bilinear interactions of two features.

    Inputs, outputs, weights and their order are those of e3nn: a state_dict's `weight` fits, and gives the same answer.

    Args:
        irreps_in1, irreps_in2: of the two inputs.
        irreps_out: of the output ("fully_connected"), or the irreps to keep of all that come out ("full" and
            "channelwise"; None keeps all). The attribute `irreps_out` says what comes out.
        mode: "full": every pair of channels on every path, without weights (e3nn's `FullTensorProduct`, "uvuv").
            "channelwise": channels of the first input keep apart, with a weight for each path and pair of channels
            ("uvu", as interatomic potentials use it). "fully_connected": a weight for each path and each three
            channels ("uvw").
        irrep_normalization: "component", "norm" or "none", of a path; as in e3nn.
        path_normalization: "element", "path" or "none", over the paths into one output; as in e3nn.
        shared_weights: whether the layer owns its weights; else `forward` is given weights for each sample.
        sparse: walk through the non-zero coefficients instead of multiplying matrices ("full" only): O(l^2) instead of
            O(l^3) products a path, yet slower on every machine we know.
        paths: triples (term of irreps_in1, of irreps_in2, of irreps_out), in place of all that are allowed;
            irreps_out is then the output's.
        scales: a factor for each path, in place of the normalisation's.

    Attributes:
        weight: (weight_numel,), by path, then channels (c1, c2, c3) or (c1, c2); None where there is none.
        paths: the `Path`s, in the order of the weights.

    Shape: `(*, irreps_in1.dim)`, `(*, irreps_in2.dim)` -> `(*, irreps_out.dim)`, leading axes broadcast.

    Raises:
        ValueError: where an argument is unknown, or a path breaks parity or the triangle.

    Example:
        >>> product = ClebschGordanProduct("8x0e + 8x1o", "1x0e + 1x1o", "8x0e + 8x1o", "fully_connected")
        >>> product(torch.zeros(5, 32), torch.zeros(5, 4)).shape
        torch.Size([5, 32])
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        irreps_in1: IrrepsLike,
        irreps_in2: IrrepsLike,
        irreps_out: IrrepsLike | None = None,
        mode: Mode = "full",
        *,
        irrep_normalization: Literal["component", "norm", "none"] = "component",
        path_normalization: Literal["element", "path", "none"] = "element",
        shared_weights: bool = True,
        sparse: bool = False,
        paths: Sequence[tuple[int, int, int]] | None = None,
        scales: Sequence[float] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device, dtype)
        if mode not in _CONNECTIONS.values():
            raise ValueError(f"mode must be 'full', 'channelwise' or 'fully_connected', got {mode!r}")
        if irrep_normalization not in ("component", "norm", "none"):
            raise ValueError(f"irrep_normalization must be 'component', 'norm' or 'none', got {irrep_normalization!r}")
        if path_normalization not in ("element", "path", "none"):
            raise ValueError(f"path_normalization must be 'element', 'path' or 'none', got {path_normalization!r}")
        if sparse and mode != "full":
            raise ValueError(f"sparse must be False unless mode is 'full', got mode {mode!r}")
        self.mode: Mode = mode
        self.sparse = sparse
        self.shared_weights = shared_weights or mode == "full"
        self.irreps_in1, self.irreps_in2 = Irreps(irreps_in1), Irreps(irreps_in2)
        if paths is not None:
            self.irreps_out = Irreps(irreps_out or "")
            triples = [(int(i), int(j), int(k)) for i, j, k in paths]
        elif mode == "fully_connected":
            if irreps_out is None:
                raise ValueError("irreps_out must be given in the mode 'fully_connected', got None")
            self.irreps_out = Irreps(irreps_out)
            triples = self._connected()
        else:
            triples = self._separate(None if irreps_out is None else Irreps(irreps_out))
        self._check(triples)
        if scales is None:
            scales = self._scales(triples, irrep_normalization, path_normalization)
        elif len(scales) != len(triples):
            raise ValueError(f"scales must be one number for each of {len(triples)} paths, got {len(scales)}")
        self.paths = tuple(Path(*triple, float(scale)) for triple, scale in zip(triples, scales))

        self._shapes = [self._weight_shape(path) for path in self.paths]
        self.weight_numel = sum(math.prod(shape) for shape in self._shapes) if mode != "full" else 0
        owned = self.shared_weights and self.weight_numel > 0
        self.weight = nn.Parameter(torch.empty(self.weight_numel, **self._made)) if owned else None
        self._single = all(multiplicity == 1 for multiplicity, _ in self.irreps_in2)
        self._lay_out()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the weights from N(0, 1), as e3nn does: the normalisation is in the paths' factors."""
        if self.weight is not None:
            self.weight.normal_(generator=generator)

    @classmethod
    def like(cls, layer: nn.Module) -> ClebschGordanProduct:
        """A fresh product that fits where `layer` stood: an e3nn `TensorProduct` or another product of this module.

        Raises:
            TypeError: where `layer` is no tensor product.
            ValueError: where an e3nn product mixes its channels in another way than the three modes do.
        """
        if isinstance(layer, ClebschGordanProduct):
            mode, shared, triples = layer.mode, layer.shared_weights, [(path[:3], path.scale) for path in layer.paths]
        elif hasattr(layer, "irreps_in1") and hasattr(layer, "instructions"):
            instructions = [each for each in cast(Any, layer.instructions) if 0 not in each.path_shape]
            kinds = {each.connection_mode for each in instructions} or {"uvw"}
            weighted = {each.has_weight for each in instructions}
            mode = _CONNECTIONS.get(next(iter(kinds)), "full")
            if len(kinds) > 1 or kinds - set(_CONNECTIONS) or (weighted and weighted != {mode != "full"}):
                raise ValueError(
                    "layer must connect all channels by 'uvw' or 'uvu' with weights or 'uvuv' without, got "
                    + ", ".join(sorted(f"{e.connection_mode} (has_weight={e.has_weight})" for e in set(instructions)))
                )
            shared = bool(layer.shared_weights)
            triples = [((each.i_in1, each.i_in2, each.i_out), each.path_weight) for each in instructions]
        else:
            raise TypeError(f"layer must be a tensor product of e3nn or of Lathe, got {type(layer).__name__}")
        like = next((t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()), None)
        made = cls(
            cast(Any, layer.irreps_in1),
            cast(Any, layer.irreps_in2),
            cast(Any, layer.irreps_out),
            mode,
            shared_weights=shared,
            paths=[triple for triple, _ in triples],
            scales=[scale for _, scale in triples],
            device=None if like is None else like.device,
            dtype=None if like is None else like.dtype,
        )
        return made.train(layer.training)

    @classmethod
    @torch.no_grad()
    def from_trained(cls, layer: nn.Module) -> ClebschGordanProduct:
        """As `like`, with the trained weights: the same function, exactly."""
        made = cls.like(layer)
        if made.weight is not None:
            made.weight.copy_(cast(Tensor, layer.weight))
        return made

    def forward(
        self,
        x: Float[Tensor, "*#batch dim1"],
        y: Float[Tensor, "*#batch dim2"],
        weight: Float[Tensor, "*#batch numel"] | None = None,
    ) -> Float[Tensor, "..."]:
        """The product of two features.

        Args:
            weight: (..., weight_numel), for each sample, where the layer does not own its weights; or
                (weight_numel,) in place of those that it owns.

        Raises:
            ValueError: where the last axis of an input does not fit its irreps, leading axes do not broadcast, or
                weights are missing.
        """
        check_feature(x, self.irreps_in1, "x")
        check_feature(y, self.irreps_in2, "y")
        if weight is None:
            weight = self.weight
            if weight is None and self.weight_numel:
                raise ValueError(
                    f"weight must be given, (..., {self.weight_numel}), where the layer owns none, got None"
                )
        elif weight.shape[-1:] != (self.weight_numel,) or (self.shared_weights and weight.ndim > 1):
            wanted = f"({self.weight_numel},)" if self.shared_weights else f"(..., {self.weight_numel})"
            raise ValueError(f"weight must be {wanted}, got {tuple(weight.shape)}")
        if weight is None or self.shared_weights:
            lead, (x, y) = flattened(x, y)
        else:
            lead, (x, y, weight) = flattened(x, y, weight)
        z = self._full(x, y) if weight is None else self.with_weights(x, y, weight)
        return z.view(*lead, self.irreps_out.dim)

    def with_weights(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """The product of features (batch, dim), with weights (weight_numel,) for all or (batch, weight_numel)."""
        parts = weight.split([math.prod(shape) for shape in self._shapes], -1)
        weights = [part.view(*part.shape[:-1], *shape) for part, shape in zip(parts, self._shapes)]
        return (self._channelwise if self.mode == "channelwise" else self._fully_connected)(x, y, weights)

    def interactions(self) -> set[tuple[Irrep, Irrep, Irrep]]:
        """The triples of irreps that the product can couple."""
        return {self._irreps(path) for path in self.paths if path.scale}

    def path_weights(self, weight: Float[Tensor, " numel"] | None = None) -> list[Float[Tensor, "c1 c2 *c3"]]:
        """What multiplies the bare Clebsch-Gordan tensors: for each path, (c1, c2, c3) or (c1, c2)."""
        if self.mode == "full":
            return [torch.full(shape, path.scale) for path, shape in zip(self.paths, self._shapes)]
        weight = self.weight if weight is None else weight
        if weight is None:
            raise ValueError("weight must be given where the layer owns none, got None")
        parts = weight.split([math.prod(shape) for shape in self._shapes])
        return [path.scale * part.view(shape) for path, part, shape in zip(self.paths, parts, self._shapes)]

    def extra_repr(self) -> str:
        """Irreps, mode and counts."""
        irreps = f"{self.irreps_in1.simplify()} x {self.irreps_in2.simplify()} -> {self.irreps_out.simplify()}"
        return f"{irreps}, mode={self.mode!r}, paths={len(self.paths)}, weights={self.weight_numel}"

    # --- which paths there are ---

    def _irreps(self, path: Sequence[Any]) -> tuple[Irrep, Irrep, Irrep]:
        return self.irreps_in1[path[0]][1], self.irreps_in2[path[1]][1], self.irreps_out[path[2]][1]

    def _connected(self) -> list[tuple[int, int, int]]:
        return [
            (i, j, k)
            for i, (_, left) in enumerate(self.irreps_in1)
            for j, (_, right) in enumerate(self.irreps_in2)
            for k, (_, out) in enumerate(self.irreps_out)
            if out in left * right
        ]

    def _separate(self, keep: Irreps | None) -> list[tuple[int, int, int]]:
        """A term of irreps_out for each path, by degree and parity; sets irreps_out."""
        found = [
            (out, i, j)
            for i, (_, left) in enumerate(self.irreps_in1)
            for j, (_, right) in enumerate(self.irreps_in2)
            for out in left * right
            if keep is None or out in keep
        ]
        order = sorted(range(len(found)), key=lambda index: found[index][0])
        channels = [self.irreps_in1[i][0] * (self.irreps_in2[j][0] if self.mode == "full" else 1) for _, i, j in found]
        self.irreps_out = Irreps([(channels[index], found[index][0]) for index in order])
        return [(found[index][1], found[index][2], position) for position, index in enumerate(order)]

    def _check(self, triples: Sequence[tuple[int, int, int]]) -> None:
        for triple in triples:
            terms = (self.irreps_in1, self.irreps_in2, self.irreps_out)
            if any(not 0 <= index < len(irreps) for index, irreps in zip(triple, terms)):
                raise ValueError(f"paths must point to terms of the irreps, got {triple}")
            left, right, out = self._irreps(triple)
            if out not in left * right:
                raise ValueError(f"paths must obey parity and the triangle, got {triple}: {left} x {right} -> {out}")
            first, second, third = (irreps[index][0] for index, irreps in zip(triple, terms))
            wanted = {"full": first * second, "channelwise": first, "fully_connected": third}[self.mode]
            if third != wanted:
                raise ValueError(
                    f"paths must lead to {wanted} channels in the mode {self.mode!r}, got {triple}: {third}"
                )

    def _scales(self, triples: Sequence[tuple[int, int, int]], irrep: str, path: str) -> list[float]:
        def elements(triple: tuple[int, int, int]) -> int:
            first, second = self.irreps_in1[triple[0]][0], self.irreps_in2[triple[1]][0]
            return {"full": 1, "channelwise": second, "fully_connected": first * second}[self.mode]

        scales = []
        for triple in triples:
            left, right, out = self._irreps(triple)
            square = {"component": out.dim, "norm": left.dim * right.dim, "none": 1}[irrep]
            into = [other for other in triples if other[2] == triple[2]]
            if path == "element":
                fan_in = sum(elements(other) for other in into)
            else:
                fan_in = elements(triple) * len(into) if path == "path" else 1
            scales.append(math.sqrt(square / fan_in) if fan_in else 0.0)
        return scales

    def _weight_shape(self, path: Path) -> tuple[int, ...]:
        shape = (self.irreps_in1[path.i1][0], self.irreps_in2[path.i2][0])
        return (*shape, self.irreps_out[path.out][0]) if self.mode == "fully_connected" else shape

    # --- tables ---

    def _coupling(self, path: Path) -> np.ndarray:
        left, right, out = self._irreps(path)
        return path.scale * coupling(left.l, right.l, out.l)

    def _lay_out(self) -> None:
        self._live = [index for index, shape in enumerate(self._shapes) if math.prod(shape)]
        if self.mode == "full":
            self._lay_out_full()
            return
        # Paths by what their matrices are joined over: the output, then the first input; or the first input alone.
        connected = self.mode == "fully_connected"
        self._groups: dict[tuple[int, int], list[int]] = {}
        order = sorted(self._live, key=lambda index: (self.paths[index].out if connected else 0, self.paths[index].i1))
        for index in order:
            path = self.paths[index]
            self._groups.setdefault((path.out if connected else 0, path.i1), []).append(index)
        if self._single:
            columns = []
            for members in self._groups.values():
                blocks = []
                for index in members:
                    path = self.paths[index]
                    table = self._coupling(path)
                    block = np.zeros((self.irreps_in2.dim, table.shape[0], table.shape[2]))
                    block[self.irreps_in2.slices()[path.i2]] = table.transpose(1, 0, 2)
                    blocks.append(block)
                # Rows of a group's matrix are (m1, path), or m1 alone with the paths side by side.
                joined = np.stack(blocks, 2) if connected else np.concatenate(blocks, 2)
                columns.append(joined.reshape(self.irreps_in2.dim, -1))
            joined = np.concatenate(columns, 1) if columns else np.zeros((self.irreps_in2.dim, 0))
            self._columns = [column.shape[1] for column in columns]
            self.add_table("table", joined)
        else:
            for j in range(len(self.irreps_in2)):
                tables = [self._coupling(self.paths[index]) for index in self._live if self.paths[index].i2 == j]
                flat = [table.transpose(1, 0, 2).reshape(table.shape[1], -1) for table in tables]
                self.add_table(
                    f"table{j}", np.concatenate(flat, 1) if flat else np.zeros((self.irreps_in2[j][1].dim, 0))
                )

    def _lay_out_full(self) -> None:
        self._dense = self.irreps_in1.dim * self.irreps_in2.dim * self.irreps_out.dim <= 16_384 and not self.sparse
        starts = [
            [each.start for each in irreps.slices()] for irreps in (self.irreps_in1, self.irreps_in2, self.irreps_out)
        ]
        if self._dense or self.sparse:
            entries = []
            for index in self._live:
                path, (channels1, channels2) = self.paths[index], self._shapes[index]
                table = self._coupling(path)
                places = np.argwhere(table)
                u, v = (each.reshape(-1, 1) for each in np.mgrid[:channels1, :channels2])
                first = starts[0][path.i1] + u * table.shape[0] + places[:, 0]
                second = starts[1][path.i2] + v * table.shape[1] + places[:, 1]
                out = starts[2][path.out] + (u * channels2 + v) * table.shape[2] + places[:, 2]
                values = np.broadcast_to(table[tuple(places.T)], first.shape)
                entries.append([part.reshape(-1) for part in (first, second, out, values)])
            first, second, out, values = (
                np.concatenate([entry[part] for entry in entries]) if entries else np.zeros(0, int) for part in range(4)
            )
            if self.sparse:
                order = np.argsort(out, kind="stable")
                self.add_table("first", first[order])
                self.add_table("second", second[order])
                self.add_table("out", out[order])
                self.add_table("values", values[order].astype(float)[:, None])
            else:
                dense = np.zeros((self.irreps_in1.dim, self.irreps_in2.dim, self.irreps_out.dim))
                np.add.at(dense, (first, second, out), values)  # several paths may lead to one output
                self.add_table("table", dense.reshape(-1, self.irreps_out.dim))
            return
        self._groups = {}
        for index in self._live:
            self._groups.setdefault((self.paths[index].i1, self.paths[index].i2), []).append(index)
        for number, members in enumerate(self._groups.values()):
            joined = np.concatenate([self._coupling(self.paths[index]) for index in members], 2)
            self.add_table(f"table{number}", joined.reshape(-1, joined.shape[2]).T)

    # --- the products; B samples, u, v, w channels ---

    def _coupled(self, y: Tensor) -> list[Tensor]:
        """For each group, the Clebsch-Gordan tensors of its paths with y put in: (B, rows, columns).

        "fully_connected": rows (m1; path, v), columns m3. "channelwise": rows m1, columns (path, v, m3).
        """
        connected, B = self.mode == "fully_connected", y.shape[0]
        if self._single:
            if torch.compiler.is_compiling() and y.shape[1] < 8:  # fuses with what follows; a product of matrices not
                joined = (y.unsqueeze(-1) * cast(Tensor, self.table)).sum(1)
            else:
                joined = y @ cast(Tensor, self.table)
            heights = [self._height(i1, members) for (_, i1), members in self._groups.items()]
            parts = joined.split(self._columns, -1)
            return [part.reshape(B, rows, part.shape[1] // rows) for part, rows in zip(parts, heights)]
        blocks: dict[int, Tensor] = {}
        for j, part in enumerate(y.split(self.irreps_in2.sizes, -1)):
            members = [index for index in self._live if self.paths[index].i2 == j]
            if not members:
                continue
            multiplicity, irrep = self.irreps_in2[j]
            shapes = [
                (self._irreps(self.paths[index])[0].dim, self._irreps(self.paths[index])[2].dim) for index in members
            ]
            joined = part.reshape(-1, irrep.dim) @ getattr(self, f"table{j}")
            pieces = joined.view(B, multiplicity, joined.shape[1]).split([m1 * m3 for m1, m3 in shapes], -1)
            for index, piece, (m1, m3) in zip(members, pieces, shapes):
                blocks[index] = piece.view(B, multiplicity, m1, m3).transpose(1, 2)
        if connected:
            return [torch.cat([blocks[i] for i in members], 2).flatten(1, 2) for members in self._groups.values()]
        return [torch.cat([blocks[i].flatten(2) for i in members], 2) for members in self._groups.values()]

    def _height(self, i1: int, members: list[int]) -> int:
        return self.irreps_in1[i1][1].dim * (len(members) if self.mode == "fully_connected" else 1)

    def _fully_connected(self, x: Tensor, y: Tensor, weights: list[Tensor]) -> Tensor:
        B = x.shape[0]
        turned = [
            part.reshape(B, multiplicity, irrep.dim).transpose(1, 2).contiguous()
            for part, (multiplicity, irrep) in zip(x.split(self.irreps_in1.sizes, -1), self.irreps_in1)
        ]
        into: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for ((out, i1), members), coupled in zip(self._groups.items(), self._coupled(y)):
            # The channels are mixed before they are coupled: the sum over paths then is one product of matrices.
            joined = torch.cat([weights[index].flatten(-2) for index in members], -1)
            mixed = torch.matmul(turned[i1], joined).view(B, coupled.shape[1], self.irreps_out[out][0])
            into.setdefault(out, []).append((mixed, coupled))
        outputs = []
        for out, (channels, irrep) in enumerate(self.irreps_out):
            if out not in into:
                outputs.append(x.new_zeros(B, channels * irrep.dim))
                continue
            mixed, coupled = (parts[0] if len(parts) == 1 else torch.cat(parts, 1) for parts in zip(*into[out]))
            outputs.append(_contract(mixed.transpose(1, 2), coupled).reshape(B, channels * irrep.dim))
        return torch.cat(outputs, -1) if outputs else x.new_zeros(B, 0)

    def _channelwise(self, x: Tensor, y: Tensor, weights: list[Tensor]) -> Tensor:
        B = x.shape[0]
        firsts = x.split(self.irreps_in1.sizes, -1)
        into: dict[int, list[Tensor]] = {}
        for ((_, i1), members), coupled in zip(self._groups.items(), self._coupled(y)):
            u, irrep = self.irreps_in1[i1]
            joined = _contract(firsts[i1].reshape(B, u, irrep.dim), coupled)
            shapes = [(self._shapes[index][1], self._irreps(self.paths[index])[2].dim) for index in members]
            for index, part, (v, m3) in zip(members, joined.split([v * m3 for v, m3 in shapes], -1), shapes):
                if v == 1:
                    result = part * weights[index]
                else:
                    result = (part.unflatten(-1, (v, m3)) * weights[index].unsqueeze(-1)).sum(2)
                into.setdefault(self.paths[index].out, []).append(result.reshape(B, u * m3))
        outputs = []
        for out, size in enumerate(self.irreps_out.sizes):
            outputs.append(_added(into.get(out) or [x.new_zeros(B, size)]))
        return torch.cat(outputs, -1) if outputs else x.new_zeros(B, 0)

    def _full(self, x: Tensor, y: Tensor) -> Tensor:
        B, dim = x.shape[0], self.irreps_out.dim
        if self._dense:
            return (x.unsqueeze(2) * y.unsqueeze(1)).flatten(1) @ cast(Tensor, self.table)
        if self.sparse:
            first, second, out, values = (cast(Tensor, getattr(self, n)) for n in ("first", "second", "out", "values"))
            terms = x.t().index_select(0, first) * y.t().index_select(0, second) * values
            return x.new_zeros(dim, B).index_add(0, out, terms).t().contiguous()
        # Samples last: outer products and the regrouping by output then move long runs.
        firsts, seconds = (
            [
                part.t().reshape(multiplicity, irrep.dim, B).transpose(0, 1).contiguous()
                for part, (multiplicity, irrep) in zip(feature.split(irreps.sizes, -1), irreps)
            ]
            for feature, irreps in ((x, self.irreps_in1), (y, self.irreps_in2))
        )
        into: dict[int, list[Tensor]] = {}
        for number, ((i1, i2), members) in enumerate(self._groups.items()):
            left, right = firsts[i1], seconds[i2]
            outer = left[:, None, :, None] * right[None, :, None]
            u, v = outer.shape[2:4]
            rows = outer.reshape(left.shape[0] * right.shape[0], u * v * B)
            coupled = torch.mm(getattr(self, f"table{number}"), rows)
            sizes = [self._irreps(self.paths[index])[2].dim for index in members]
            for index, part in zip(members, coupled.split(sizes)):
                if u * v > 1:
                    part = part.view(len(part), u * v, B).transpose(0, 1).reshape(len(part) * u * v, B)
                into.setdefault(self.paths[index].out, []).append(part)
        outputs = [_added(into.get(out) or [x.new_zeros(size, B)]) for out, size in enumerate(self.irreps_out.sizes)]
        return torch.cat(outputs).t().contiguous() if outputs else x.new_zeros(B, 0)


def _contract(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for a batch of small matrices."""
    if torch.compiler.is_compiling() and a.shape[2] < 8:
        return (a.unsqueeze(-1) * b.unsqueeze(1)).sum(2)  # a compiled graph unrolls the sum and fuses what follows
    return torch.bmm(a, b)


def _added(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def check_feature(x: Tensor, irreps: Irreps, name: str) -> None:
    """Refuses a feature whose last axis does not fit its irreps."""
    if x.ndim == 0 or x.shape[-1] != irreps.dim:
        raise ValueError(f"{name} must have {irreps.dim} components ({irreps}) in its last axis, got {tuple(x.shape)}")
