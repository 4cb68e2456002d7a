"""Products that interact through fields: cheaper than Clebsch-Gordan at high degree, because they compute less."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lathe.nn.equivariant_tensor_products.field_product import FieldProduct
from lathe.nn.equivariant_tensor_products.fields import Field, MatrixFields, SphereFields
from lathe.nn.equivariant_tensor_products.irreps import Irreps, IrrepsLike
from lathe.nn.equivariant_tensor_products.torus import convolve, torus_read_out, torus_spectrum

__all__ = ["GauntProduct", "MatrixProduct", "VectorSignalProduct"]


class GauntProduct(FieldProduct):
    """Products of signals on the sphere, of which every irrep is a part (Gaunt tensor product).

    z_l3 = sum k C^(l1 l2 l3)(x_l1, y_l2) with k = sqrt((2 l1 + 1)(2 l2 + 1)(2 l3 + 1) / 4 pi) |(l1 l2 l3; 0 0 0)|: only
    even l1 + l2 + l3. It is symmetric: no cross product, and from inputs of natural parity no pseudoscalar, ever.

    Args:
        irreps_in1, irreps_in2, irreps_out, weights, channels, shared_weights: as in `FieldProduct`.
        backend: "grid" (Gauss-Legendre grid on the sphere, the smallest exact one), "fourier" (spectra on the torus,
            convolved by FFT, as Luo et al. 2024), "fourier_direct" (without FFT), "paths" or "auto" as in
            `FieldProduct`.

    Example:
        >>> product = GauntProduct("8x0e + 8x1o", "1x0e + 1x1o + 1x2e", "8x0e + 8x1o")
        >>> product(torch.zeros(5, 32), torch.zeros(5, 9)).shape
        torch.Size([5, 32])
    """

    def __init__(
        self,
        irreps_in1: IrrepsLike,
        irreps_in2: IrrepsLike,
        irreps_out: IrrepsLike | None = None,
        *,
        weights: bool = True,
        channels: int | None = None,
        shared_weights: bool = True,
        backend: Literal["auto", "grid", "paths", "fourier", "fourier_direct"] = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            SphereFields(("signal",)),
            irreps_in1,
            irreps_in2,
            irreps_out,
            weights=weights,
            channels=channels,
            shared_weights=shared_weights,
            backend=backend,
            backends=("auto", "grid", "paths", "fourier", "fourier_direct"),
            device=device,
            dtype=dtype,
        )

    def _lay_out_fields(self) -> None:
        if self.backend == "grid":
            super()._lay_out_fields()
            return
        bands = [max((irrep.l for _, irrep in irreps), default=0) for _, irreps in self._sides()[:2]]
        for side, (name, (_, irreps)) in enumerate(zip(("in1", "in2", "out"), self._sides())):
            for number, field in enumerate(self._holds[side]):
                degrees = [irreps[term][1].l for term, _ in self._members(side, field)]
                if side < 2:
                    spectra = np.concatenate([torus_spectrum(l, bands[side]) for l in degrees])
                    pairs = np.stack([spectra.real, spectra.imag], -1).reshape(len(spectra), -1)
                else:
                    back = np.concatenate([torus_read_out(l, sum(bands)) for l in degrees], 2)
                    pairs = np.stack([back.real, -back.imag], 2).reshape(-1, back.shape[2])
                self.add_table(f"{name}_{number}", pairs)

    def _product(self, f: dict[Field, Tensor], g: dict[Field, Tensor]) -> dict[Field, Tensor]:
        if not self.backend.startswith("fourier") or not self._products:
            return super()._product(f, g)
        spectra: list[dict[Field, Tensor]] = []
        for name, coefficients in (("in1", f), ("in2", g)):
            pairs = {
                field: (each @ getattr(self, f"{name}_{number}")).unflatten(-1, (-1, 2))
                for number, (field, each) in enumerate(coefficients.items())
            }
            sizes = {field: math.isqrt(each.shape[-2]) for field, each in pairs.items()}
            spectra.append({
                field: torch.view_as_complex(each.contiguous()).unflatten(-1, (sizes[field], sizes[field]))
                for field, each in pairs.items()
            })  # fmt: skip
        sums: dict[Field, Tensor] = {}
        for field1, field2, _, field3 in self._products:
            result = convolve(spectra[0][field1], spectra[1][field2], self.backend == "fourier_direct")
            sums[field3] = sums[field3] + result if field3 in sums else result
        return {
            field: torch.view_as_real(sums[field]).flatten(-3) @ getattr(self, f"out_{number}")
            for number, field in enumerate(self._holds[2])
        }


class MatrixProduct(FieldProduct):
    """Products of matrices into which irreps are embedded (matrix tensor product; `FusedTensor` in e3x).

    M(x) = sum_lm C^(t t l)_(ijm) x_lm, Z = M(x) M(y), and the same coefficients read z out of Z: a path has the weight
    +-{l1 l2 l3; t t t}, a 6j symbol, also for odd l1 + l2 + l3. Parities multiply.

    Args:
        irreps_in1, irreps_in2, irreps_out, weights, channels, shared_weights, backend: as in `FieldProduct`.
        space: "single" (spin t) or "stacked" (all spins 0 to t side by side, with blocks between them).
        t: half of the highest degree that the matrices hold; by default they hold all that the inputs can make,
            t = ceil((lmax1 + lmax2) / 2).

    Raises:
        ValueError: where the matrices are too small for the irreps.

    Example:
        >>> product = MatrixProduct("8x0e + 8x1o", "1x0e + 1x1o", "8x0e + 8x1o + 8x1e")
        >>> product(torch.zeros(5, 32), torch.zeros(5, 4)).shape
        torch.Size([5, 56])
    """

    def __init__(
        self,
        irreps_in1: IrrepsLike,
        irreps_in2: IrrepsLike,
        irreps_out: IrrepsLike | None = None,
        *,
        space: Literal["single", "stacked"] = "single",
        t: int | None = None,
        weights: bool = True,
        channels: int | None = None,
        shared_weights: bool = True,
        backend: Literal["auto", "matrices", "paths"] = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if space not in ("single", "stacked"):
            raise ValueError(f"space must be 'single' or 'stacked', got {space!r}")
        inputs = [max((irrep.l for _, irrep in Irreps(irreps)), default=0) for irreps in (irreps_in1, irreps_in2)]
        if t is None:
            t = -(-sum(inputs) // 2)
        if 2 * t < max(inputs):
            raise ValueError(f"t must be at least {-(-max(inputs) // 2)} to hold degree {max(inputs)}, got {t}")
        super().__init__(
            MatrixFields(space, t),
            irreps_in1,
            irreps_in2,
            irreps_out,
            weights=weights,
            channels=channels,
            shared_weights=shared_weights,
            backend=backend,
            backends=("auto", "matrices", "paths"),
            device=device,
            dtype=dtype,
        )

    def _prefers_paths(self) -> bool:
        # Small matrices multiply slowly, one pair for each channel.
        return self.weights or super()._prefers_paths()


class VectorSignalProduct(FieldProduct):
    """Products of signals and vector fields on the sphere: what the Gaunt product loses, at a constant factor.

    An irrep of degree j is a part of scalar signals, and of vector fields by the harmonics V^l_j, l = j - 1, j, j + 1.
    "dot" makes a scalar signal of two vector fields, "cross" a vector field, "scalar" a vector field of a scalar and a
    vector field. A path's weight is sqrt(6) or sqrt(3) times square roots and |(l1 l2 l3; 0 0 0)| times a 9j symbol,
    for each choice of the l's; together they reach every triangle.

    Args:
        irreps_in1, irreps_in2, irreps_out, weights, channels, shared_weights, backend: as in `FieldProduct`; without
            weights, each irrep is put on all harmonics alike.
        coupling: which products are added up.
        parity: the vector fields used: "polar", "axial" or "both".

    Example:
        >>> product = VectorSignalProduct("8x0e + 8x1o", "1x0e + 1x1o", "8x0e + 8x1o + 8x1e")
        >>> product(torch.zeros(5, 32), torch.zeros(5, 4)).shape
        torch.Size([5, 56])
    """

    def __init__(
        self,
        irreps_in1: IrrepsLike,
        irreps_in2: IrrepsLike,
        irreps_out: IrrepsLike | None = None,
        *,
        coupling: Sequence[Literal["dot", "cross", "scalar"]] = ("dot", "cross", "scalar"),
        parity: Literal["polar", "axial", "both"] = "both",
        weights: bool = True,
        channels: int | None = None,
        shared_weights: bool = True,
        backend: Literal["auto", "grid", "paths"] = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not coupling or set(coupling) - {"dot", "cross", "scalar"}:
            raise ValueError(f"coupling must name some of 'dot', 'cross' and 'scalar', got {tuple(coupling)}")
        if parity not in ("polar", "axial", "both"):
            raise ValueError(f"parity must be 'polar', 'axial' or 'both', got {parity!r}")
        signs = {"polar": (-1,), "axial": (1,), "both": (1, -1)}[parity]
        super().__init__(
            SphereFields(tuple(dict.fromkeys(coupling)), signs),
            irreps_in1,
            irreps_in2,
            irreps_out,
            weights=weights,
            channels=channels,
            shared_weights=shared_weights,
            backend=backend,
            backends=("auto", "grid", "paths"),
            device=device,
            dtype=dtype,
        )

    def _prefers_paths(self) -> bool:
        # Eight components a point, and up to seven embeddings an irrep: seen to be slower at all degrees up to 6.
        return True
