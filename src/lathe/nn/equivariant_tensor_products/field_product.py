"""What the Gaunt, matrix and vector-signal products share: weights, their fit to trained ones, and how they run.

Each is z = Lin_out(T(Lin_1 x, Lin_2 y)): equivariant linear maps mix the channels of each degree, T multiplies fields.
The weight of the path (l1, l2, l3) between three channels thus is a sum of products of weights of the degrees, times a
fixed coefficient of T, which may be zero: such an interaction is lost.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from lathe.nn.equivariant_tensor_products.clebsch_gordan import ClebschGordanProduct, check_feature
from lathe.nn.equivariant_tensor_products.fields import (
    Field,
    Fields,
    Slot,
    multiply,
    slot_coefficients,
)
from lathe.nn.equivariant_tensor_products.fitting import fit_factors
from lathe.nn.equivariant_tensor_products.irreps import Irrep, Irreps, IrrepsLike
from lathe.nn.equivariant_tensor_products.tables import TabledModule, flattened

__all__ = ["ExpressivityError", "FieldProduct"]

Product = TypeVar("Product", bound="FieldProduct")
Lost = Literal["warn", "raise", "ignore"]
Factors = tuple[list[Tensor], list[Tensor], list[Tensor]]


class ExpressivityError(ValueError):
    """The product cannot make an interaction that the replaced layer has."""


class FieldProduct(TabledModule):
    """What the Gaunt, matrix and vector-signal products share.

    Args:
        irreps_in1, irreps_in2: of the two inputs.
        irreps_out: of the output; None: all irreps that can come out, `channels` of each.
        weights: whether channels are mixed before and after. Without weights all multiplicities of an input are equal
            (those of one input may be 1), each irrep stands once, and channel c of x meets channel c of y.
        channels: fields multiplied side by side, the rank of the weights that can be represented; the largest
            multiplicity by default.
        shared_weights: whether the layer owns the weights of the second input, or is given them for each sample.
        backend: the product's own ("grid" or "matrices") computes it by its definition; "paths" adds up Clebsch-Gordan
            products with the weights that the fields amount to: the same function, and faster for low degrees. "auto"
            chooses.

    Attributes:
        weight_in1, weight_in2, weight_out: by term of the irreps, then embedding, multiplicity and channel.
        relative_error: what `from_trained` could not represent, as a part of the trained product's norm; else None.
        weight2_numel: weights a sample that `forward` wants where `shared_weights` is False.

    Shape: `(*, irreps_in1.dim)`, `(*, irreps_in2.dim)` -> `(*, irreps_out.dim)`, leading axes broadcast.

    Raises:
        ValueError: where an argument is unknown, or multiplicities do not fit a product without weights.
    """

    weight_in1: nn.Parameter | None
    weight_in2: nn.Parameter | None
    weight_out: nn.Parameter | None
    relative_error: float | None

    def __init__(
        self,
        fields: Fields,
        irreps_in1: IrrepsLike,
        irreps_in2: IrrepsLike,
        irreps_out: IrrepsLike | None,
        *,
        weights: bool,
        channels: int | None,
        shared_weights: bool,
        backend: str,
        backends: Sequence[str],
        device: Any,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(device, dtype)
        if backend not in backends:
            raise ValueError(f"backend must be one of {', '.join(backends)}, got {backend!r}")
        self.fields, self.weights, self.relative_error = fields, weights, None
        self.irreps_in1, self.irreps_in2 = Irreps(irreps_in1), Irreps(irreps_in2)
        self.shared_weights = shared_weights or not weights
        self.channels = self._channels(channels)
        self._slots1, self._slots2 = (
            [self._slots(irrep) for _, irrep in each] for each in (self.irreps_in1, self.irreps_in2)
        )
        self.irreps_out = self._reachable() if irreps_out is None else Irreps(irreps_out)
        if not weights:
            self._check_unweighted()
        self._slots3 = [self._slots(irrep) for _, irrep in self.irreps_out]
        self._resolve()

        sizes = [
            sum(len(slots) * multiplicity * self.channels for slots, (multiplicity, _) in zip(each, irreps))
            for each, irreps in self._sides()
        ]
        self.weight2_numel = sizes[1] if weights and not self.shared_weights else 0
        for name, size in zip(("weight_in1", "weight_in2", "weight_out"), sizes):
            owned = weights and not (name == "weight_in2" and self.weight2_numel)
            self.register_parameter(name, nn.Parameter(torch.empty(size, **self._made)) if owned else None)
        self._lay_out(backend, backends)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the weights normal, such that unit-normal inputs give outputs of variance 1."""
        if not self.weights:
            return
        for parameter, irreps, slots in (
            (self.weight_in1, self.irreps_in1, self._slots1),
            (self.weight_in2, self.irreps_in2, self._slots2),
        ):
            if parameter is not None:
                parameter.normal_(generator=generator)
                for part, (multiplicity, _) in zip(self._parts(parameter, irreps, slots), irreps):
                    part.mul_(max(multiplicity, 1) ** -0.5)
        assert self.weight_out is not None
        self.weight_out.normal_(generator=generator)
        parts = self._parts(self.weight_out, self.irreps_out, self._slots3)
        for part, of_term in zip(parts, self._slots3):
            energies = [self._energy(slot) for slot in of_term]
            alive = sum(energy > 0 for energy in energies)
            for each, energy in zip(part, energies):
                each.mul_((self.channels * alive * energy) ** -0.5 if energy > 0 else 1.0)

    @classmethod
    def like(cls: type[Product], layer: nn.Module, *, lost: Lost = "warn", **options: Any) -> Product:
        """A fresh product of the irreps of `layer`, an e3nn `TensorProduct` or a `ClebschGordanProduct`.

        Args:
            lost: what to do where `layer` has interactions that this product cannot make: "warn" of them, "raise" an
                `ExpressivityError`, or "ignore" them.
            options: as in the constructor; `channels` is the largest multiplicity by default.

        Raises:
            TypeError: where `layer` is no tensor product.
            ValueError: where `layer` takes its weights from outside, which are too many for this product, or is a
                product without weights.
            ExpressivityError: with "raise".
        """
        if lost not in ("warn", "raise", "ignore"):
            raise ValueError(f"lost must be 'warn', 'raise' or 'ignore', got {lost!r}")
        exact = ClebschGordanProduct.like(layer)
        if exact.mode == "full" or not exact.shared_weights:
            what = "no weights" if exact.mode == "full" else "weights from outside"
            raise ValueError(f"layer must own its weights to be replaced by {cls.__name__}, got one with {what}")
        assert exact.weight is not None
        options = {"device": exact.weight.device, "dtype": exact.weight.dtype} | options
        made = cast(Any, cls)(exact.irreps_in1, exact.irreps_in2, exact.irreps_out, **options)
        missing = sorted(exact.interactions() - made.interactions())
        if missing and lost != "ignore":
            paths = ", ".join(f"{a} x {b} -> {c}" for a, b, c in missing)
            message = f"{cls.__name__} cannot make {len(missing)} interactions of {type(layer).__name__}: {paths}"
            if lost == "raise":
                raise ExpressivityError(message)
            warnings.warn(message, stacklevel=2)
        return made.train(layer.training)

    @classmethod
    @torch.no_grad()
    def from_trained(
        cls: type[Product],
        layer: nn.Module,
        *,
        lost: Lost = "warn",
        iterations: int = 40,
        **options: Any,
    ) -> Product:
        """As `like`, with weights fitted to the trained ones by alternating least squares.

        The error counts the weights of all paths in the Frobenius norm of the bilinear map; `relative_error` says what
        is left of it. It falls with `channels`, down to what the lost interactions carry.
        """
        made = cls.like(layer, lost=lost, **options)
        exact = ClebschGordanProduct.from_trained(layer)
        full = exact.path_weights()
        if exact.mode == "channelwise":
            full = [torch.diag_embed(weight.mT).movedim(0, 1) for weight in full]
        target: dict[tuple[int, int, int], Tensor] = {}
        for path, weight in zip(exact.paths, full):
            target[path[:3]] = target.get(path[:3], 0) + weight.detach().double().cpu()
        factors, made.relative_error = fit_factors(
            target,
            {key: made.coefficients(*key) for key in made._triples()},
            cast(Factors, tuple([p.double().cpu() for p in side] for side in made.factors())),
            iterations,
        )
        for side, fitted in zip(made.factors(), factors):
            for part, value in zip(side, fitted):
                part.copy_(value)
        return made

    def forward(
        self,
        x: Float[Tensor, "*#batch dim1"],
        y: Float[Tensor, "*#batch dim2"],
        weight: Float[Tensor, "*#batch numel"] | None = None,
    ) -> Float[Tensor, "..."]:
        """The product of two features.

        Args:
            weight: (..., weight2_numel), of the second input, where the layer does not own them.

        Raises:
            ValueError: where the last axis of an input does not fit its irreps, leading axes do not broadcast, or
                weights are missing.
        """
        check_feature(x, self.irreps_in1, "x")
        check_feature(y, self.irreps_in2, "y")
        if self.weight2_numel == 0:
            if weight is not None:
                raise ValueError(f"weight must be None where the layer owns its weights, got {tuple(weight.shape)}")
            lead, (x, y) = flattened(x, y)
            weight = self.weight_in2
        else:
            if weight is None or weight.shape[-1:] != (self.weight2_numel,):
                got = None if weight is None else tuple(weight.shape)
                raise ValueError(f"weight must be (..., {self.weight2_numel}), got {got}")
            lead, (x, y, weight) = flattened(x, y, weight)
        if self._paths is not None:
            return self._along_paths(x, y).view(*lead, self.irreps_out.dim)
        f = self._mixed(x, self.irreps_in1, self._slots1, self.weight_in1)
        g = self._mixed(y, self.irreps_in2, self._slots2, weight)
        return self._read_out(self._product(f, g), x.shape[0]).view(*lead, self.irreps_out.dim)

    def interactions(self) -> set[tuple[Irrep, Irrep, Irrep]]:
        """The triples of irreps that the product can couple."""
        found = set()
        for i, j, k in self._triples():
            if self.coefficients(i, j, k).any():
                found.add((self.irreps_in1[i][1], self.irreps_in2[j][1], self.irreps_out[k][1]))
        return found

    def coefficients(self, i1: int, i2: int, out: int) -> Tensor:
        """What the product makes of a path, as multiples of the Clebsch-Gordan tensor: one for each three embeddings.

        Float64, (embeddings of term i1 of irreps_in1, of i2 of irreps_in2, of out of irreps_out).
        """
        slots = self._slots1[i1], self._slots2[i2], self._slots3[out]
        values = [self._known.get((a, b, c), 0.0) for a, b, c in itertools.product(*slots)]
        return torch.tensor(values, dtype=torch.float64, device="cpu").view(*map(len, slots))

    def factors(self) -> Factors:
        """The weights of each side, a view a term: (embeddings, multiplicity, channels).

        Ones where the product has no weights: for one channel.
        """
        sides = []
        for name, (slots, irreps) in zip(("weight_in1", "weight_in2", "weight_out"), self._sides()):
            parameter = getattr(self, name)
            if parameter is None:
                if self.weights:
                    raise ValueError(f"{name} must be the layer's own, got a layer that takes it from outside")
                sides.append([torch.ones(len(each), 1, 1) for each in slots])
            else:
                sides.append(self._parts(parameter, irreps, slots))
        return cast(Factors, tuple(sides))

    def path_weights(self, factors: Factors | None = None) -> list[Float[Tensor, "c1 c2 c3"]]:
        """What the layer amounts to: the weight of the bare Clebsch-Gordan tensor of every possible path, in turn.

        The paths are those of `ClebschGordanProduct(..., "fully_connected")` of the same irreps.
        """
        factors = factors or self.factors()
        tables = [self.coefficients(*triple).to(factors[0][triple[0]]) for triple in self._triples()]
        return self._weights(tables, factors)

    def _weights(self, tables: list[Tensor], factors: Factors) -> list[Tensor]:
        a, b, c = factors
        found = []
        for (i, j, k), table in zip(self._triples(), tables):
            mixed = torch.einsum("stuc,svc->tcuv", torch.einsum("rst,ruc->stuc", table, a[i]), b[j])
            found.append(torch.einsum("tcuv,twc->uvw", mixed, c[k]))
        return found

    @torch.no_grad()
    def to_clebsch_gordan(self) -> ClebschGordanProduct:
        """The same function as a product with a weight for each path, for layers with weights."""
        if not self.weights or not self.shared_weights:
            raise ValueError("the product must own its weights to be written out, got one that does not")
        weights = torch.cat([weight.flatten() for weight in self.path_weights()])
        made = ClebschGordanProduct(
            self.irreps_in1,
            self.irreps_in2,
            self.irreps_out,
            "fully_connected",
            irrep_normalization="none",
            path_normalization="none",
            device=weights.device,
            dtype=weights.dtype,
        )
        assert made.weight is not None
        made.weight.copy_(weights)
        return made

    def extra_repr(self) -> str:
        """Irreps, channels and backend."""
        irreps = f"{self.irreps_in1.simplify()} x {self.irreps_in2.simplify()} -> {self.irreps_out.simplify()}"
        return f"{irreps}, channels={self.channels}, weights={self.weights}, backend={self.backend!r}"

    # --- set-up ---

    def _slots(self, irrep: Irrep) -> list[Slot]:
        return self.fields.slots(irrep)

    def _sides(self) -> list[tuple[list[list[Slot]], Irreps]]:
        return [(self._slots1, self.irreps_in1), (self._slots2, self.irreps_in2), (self._slots3, self.irreps_out)]

    def _triples(self) -> list[tuple[int, int, int]]:
        return [
            (i, j, k)
            for i, (_, left) in enumerate(self.irreps_in1)
            for j, (_, right) in enumerate(self.irreps_in2)
            for k, (_, out) in enumerate(self.irreps_out)
            if out in left * right
        ]

    def _channels(self, channels: int | None) -> int:
        multiplicities = [{m for m, _ in each} for each in (self.irreps_in1, self.irreps_in2)]
        if self.weights:
            if channels is not None and channels < 1:
                raise ValueError(f"channels must be at least 1, got {channels}")
            return channels or max(multiplicities[0] | multiplicities[1], default=1) or 1
        if channels is not None:
            raise ValueError(f"channels must be None without weights, got {channels}")
        first, second = (each or {1} for each in multiplicities)
        if len(first) > 1 or len(second) > 1 or len((first | second) - {1}) > 1:
            raise ValueError(
                "irreps must have one multiplicity each, the same or 1, in a product without weights, got "
                f"{self.irreps_in1} and {self.irreps_in2}"
            )
        return max(first | second)

    def _check_unweighted(self) -> None:
        for name, irreps in (
            ("irreps_in1", self.irreps_in1),
            ("irreps_in2", self.irreps_in2),
            ("irreps_out", self.irreps_out),
        ):
            kinds = [irrep for _, irrep in irreps]
            if len(set(kinds)) < len(kinds):
                raise ValueError(f"{name} must have each irrep once in a product without weights, got {irreps}")
        if any(multiplicity != self.channels for multiplicity, _ in self.irreps_out):
            raise ValueError(f"irreps_out must have the multiplicity {self.channels}, got {self.irreps_out}")

    def _reachable(self) -> Irreps:
        """Every irrep that some embedding can make."""
        candidates = sorted({c for _, a in self.irreps_in1 for _, b in self.irreps_in2 for c in a * b})
        self.irreps_out = Irreps([(self.channels, irrep) for irrep in candidates])
        self._slots3 = [self._slots(irrep) for irrep in candidates]
        self._resolve()
        reached = {out for _, _, out in self.interactions()}
        return Irreps([(self.channels, irrep) for irrep in candidates if irrep in reached])

    def _resolve(self) -> None:
        sides = [
            list(dict.fromkeys(slot for slots in each for slot in slots))
            for each in (self._slots1, self._slots2, self._slots3)
        ]
        self.fields.resolve(*sides)
        self._known = slot_coefficients(self.fields, *sides)

    def _energy(self, slot: Slot) -> float:
        """Variance of a component of what a slot of the output reads, for unit-normal slots of the inputs."""
        firsts, seconds = ([slot for slots in each for slot in slots] for each in (self._slots1, self._slots2))
        return sum(self._known.get((a, b, slot), 0.0) ** 2 for a in firsts for b in seconds) / slot.irrep.dim

    def _lay_out(self, backend: str, backends: Sequence[str]) -> None:
        """Which slots each field holds, and the tables that lead to its values and back."""
        holds = []
        for slots, _ in self._sides():
            by_field: dict[Field, list[tuple[int, int]]] = {}
            for term, each in enumerate(slots):
                for position, slot in enumerate(each):
                    by_field.setdefault(slot.field, []).append((term, position))
            holds.append(by_field)
        products = [p for p in self.fields.products() if p[0] in holds[0] and p[1] in holds[1] and p[3] in holds[2]]
        self._products = products
        self._holds = [
            {field: members for field, members in by_field.items() if any(p[at] == field for p in products)}
            for by_field, at in zip(holds, (0, 1, 3))
        ]
        # Without weights the slots of a term in one field are always taken together.
        self._merge = not self.weights
        if backend == "auto":
            backend = "paths" if self._prefers_paths() and self.weight2_numel == 0 else backends[1]
        if backend == "paths" and self.weight2_numel:
            raise ValueError("backend must not be 'paths' where weights come from outside, got 'paths'")
        self.backend = backend
        self._paths: ClebschGordanProduct | None = None
        if backend == "paths":
            self._lay_out_paths()
        else:
            self._lay_out_fields()

    def _prefers_paths(self) -> bool:
        """Whether Clebsch-Gordan products have been measured to be faster (on CPU)."""
        return not self.weights and self.irreps_in1.dim * self.irreps_in2.dim * self.irreps_out.dim <= 16_384

    def _members(self, side: int, field: Field) -> list[tuple[int, list[int]]]:
        """Terms in a field, each with the positions of its slots: one by one, or together where they are merged."""
        members = self._holds[side][field]
        if not self._merge:
            return [(term, [position]) for term, position in members]
        together: dict[int, list[int]] = {}
        for term, position in members:
            together.setdefault(term, []).append(position)
        return list(together.items())

    def _field_table(self, side: int, field: Field) -> np.ndarray:
        slots = self._sides()[side][0]
        make = self.fields.embedding if side < 2 else self.fields.projection
        tables = [
            sum(make(slots[term][position]) for position in positions) for term, positions in self._members(side, field)
        ]
        return np.concatenate(cast(Any, tables), 0 if side < 2 else 2)

    def _lay_out_fields(self) -> None:
        for side, name in enumerate(("in1", "in2", "out")):
            for number, field in enumerate(self._holds[side]):
                table = self._field_table(side, field)
                flat = table.reshape(table.shape[0], -1) if side < 2 else table.reshape(-1, table.shape[2])
                self.add_table(f"{name}_{number}", flat)

    def _lay_out_paths(self) -> None:
        triples = self._triples()
        options = {"irrep_normalization": "none", "path_normalization": "none", **self._made}
        if self.weights:
            irreps = (self.irreps_in1, self.irreps_in2, self.irreps_out)
            product = ClebschGordanProduct(*irreps, "fully_connected", shared_weights=False, **options)
            for number, triple in enumerate(triples):
                self.add_table(f"coefficients{number}", self.coefficients(*triple).numpy())
        else:
            scales = {triple: float(self.coefficients(*triple).sum()) for triple in triples}
            kept = [triple for triple, scale in scales.items() if scale]
            in1, in2, out = (Irreps([(1, irrep) for _, irrep in each]) for _, each in self._sides())
            product = ClebschGordanProduct(
                in1, in2, out, "full", paths=kept, scales=[scales[t] for t in kept], **options
            )
        self._paths = product

    # --- running; B samples, C channels ---

    def _parts(self, weight: Tensor, irreps: Irreps, slots: list[list[Slot]]) -> list[Tensor]:
        """A view a term: (..., embeddings, multiplicity, channels)."""
        shapes = [(len(each), multiplicity, self.channels) for each, (multiplicity, _) in zip(slots, irreps)]
        parts = weight.split([math.prod(shape) for shape in shapes], -1)
        return [part.view(*part.shape[:-1], *shape) for part, shape in zip(parts, shapes)]

    def _mixed(self, x: Tensor, irreps: Irreps, slots: list[list[Slot]], weight: Tensor | None) -> dict[Field, Tensor]:
        """For each field the coefficients of its slots, (B, C, width)."""
        side = 0 if slots is self._slots1 else 1
        B, terms = x.shape[0], x.split(irreps.sizes, -1)
        shaped = [term.view(B, m, irrep.dim) for term, (m, irrep) in zip(terms, irreps)]
        if weight is None:
            runs = {f: [t for t, _ in self._members(side, f)] for f in self._holds[side]}
            if all(m == 1 for m, _ in irreps) and all(t == list(range(t[0], t[-1] + 1)) for t in runs.values()):
                places = irreps.slices()  # what a field holds lies side by side already
                return {f: x[:, None, places[t[0]].start : places[t[-1]].stop] for f, t in runs.items()}
            chosen = {f: [shaped[t] for t, _ in self._members(side, f)] for f in self._holds[side]}
        else:
            parts = self._parts(weight, irreps, slots)
            if not self.shared_weights and side == 1:
                parts = [part * max(multiplicity, 1) ** -0.5 for part, (multiplicity, _) in zip(parts, irreps)]
            mixed = []
            for part, each in zip(parts, shaped):
                count = part.shape[-3]
                joined = part.transpose(-3, -2).flatten(-2)  # (..., multiplicity, embeddings x channels)
                turned = torch.matmul(each.transpose(1, 2), joined)
                mixed.append(turned.unflatten(-1, (count, self.channels)).permute(2, 0, 3, 1))
            chosen = {f: [mixed[t][p[0]] for t, p in self._members(side, f)] for f in self._holds[side]}
        return {f: each[0] if len(each) == 1 else torch.cat(each, -1) for f, each in chosen.items()}

    def _along_paths(self, x: Tensor, y: Tensor) -> Tensor:
        assert self._paths is not None
        if self.weights:
            tables = [getattr(self, f"coefficients{number}") for number in range(len(self._paths.paths))]
            weights = self._weights(tables, self.factors())
            joined = torch.cat([each.flatten() for each in weights]) if weights else x.new_zeros(0)
            return self._paths.with_weights(x, y, joined)
        B, C = x.shape[0], self.channels
        x, y = (_channels_first(part, irreps) for part, irreps in ((x, self.irreps_in1), (y, self.irreps_in2)))
        if C == 1:
            return self._paths(x[:, 0], y[:, 0])
        z = self._paths(x, y).split([irrep.dim for _, irrep in self.irreps_out], -1)
        return torch.cat([part.flatten(1) for part in z], -1) if z else x.new_zeros(B, 0)

    def _product(self, f: dict[Field, Tensor], g: dict[Field, Tensor]) -> dict[Field, Tensor]:
        if not self._products:
            return {}
        values1, values2 = (
            {
                field: (each @ getattr(self, f"{name}_{number}")).unflatten(-1, (3 if field.rank == 1 else 1, -1))
                for number, (field, each) in enumerate(coefficients.items())
            }
            for name, coefficients in (("in1", f), ("in2", g))
        )
        sums: dict[Field, Tensor] = {}
        for field1, field2, kind, field3 in self._products:
            result = multiply(kind, values1[field1], values2[field2])
            sums[field3] = sums[field3] + result if field3 in sums else result
        return {
            field: sums[field].flatten(-2) @ getattr(self, f"out_{number}")
            for number, field in enumerate(self._holds[2])
        }

    def _read_out(self, z: dict[Field, Tensor], B: int) -> Tensor:
        read: dict[int, list[tuple[int, Tensor]]] = {}
        for field, values in z.items():
            members = self._members(2, field)
            widths = [self.irreps_out[term][1].dim for term, _ in members]
            for (term, positions), value in zip(members, values.split(widths, -1)):
                read.setdefault(term, []).append((positions[0], value))
        like = next(iter(z.values())) if z else None
        weight = self.weight_out
        parts = None if weight is None else self._parts(weight, self.irreps_out, self._slots3)
        outputs = []
        for term, (multiplicity, irrep) in enumerate(self.irreps_out):
            found = sorted(read.get(term, []), key=lambda each: each[0])
            if not found or like is None:
                some = next(iter(self.buffers())) if like is None else like
                outputs.append(some.new_zeros(B, multiplicity * irrep.dim))
            elif parts is None:
                total = found[0][1]
                for _, value in found[1:]:
                    total = total + value
                outputs.append(total.flatten(1))
            else:
                stacked = torch.cat([value for _, value in found], 1)  # (B, embeddings x C, m)
                positions = [position for position, _ in found]
                mixing = parts[term] if len(positions) == len(parts[term]) else parts[term][positions]
                turned = torch.matmul(stacked.transpose(1, 2), mixing.transpose(1, 2).flatten(0, 1))
                outputs.append(turned.transpose(1, 2).flatten(1))
        return torch.cat(outputs, -1)


def _channels_first(x: Tensor, irreps: Irreps) -> Tensor:
    """(B, dim) with one multiplicity throughout as (B, multiplicity, components of each term)."""
    if all(multiplicity == 1 for multiplicity, _ in irreps):
        return x.unsqueeze(1)
    parts = [p.view(len(x), m, irrep.dim) for p, (m, irrep) in zip(x.split(irreps.sizes, -1), irreps)]
    return torch.cat(parts, -1)
