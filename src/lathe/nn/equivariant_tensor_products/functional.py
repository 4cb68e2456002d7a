"""The products without weights, as functions of features and the irreps that they hold."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lathe.nn.equivariant_tensor_products.clebsch_gordan import ClebschGordanProduct
from lathe.nn.equivariant_tensor_products.harmonics import degree_of, grid_arrays, spherical_harmonics
from lathe.nn.equivariant_tensor_products.irreps import Irreps, IrrepsLike
from lathe.nn.equivariant_tensor_products.products import GauntProduct, MatrixProduct, VectorSignalProduct

__all__ = ["cg_product", "gaunt_product", "gaunt_product_of_many", "matrix_product", "vector_signal_product"]


def cg_product(
    x: Float[Tensor, "*#batch dim1"],
    y: Float[Tensor, "*#batch dim2"],
    irreps_in1: IrrepsLike,
    irreps_in2: IrrepsLike,
    irreps_out: IrrepsLike | None = None,
    **options: Any,
) -> Float[Tensor, "..."]:
    """All paths apart, sorted by irrep: e3nn's `FullTensorProduct`; `irreps_out` are the irreps to keep.

    Options: as in `ClebschGordanProduct`.
    """
    return _made(ClebschGordanProduct, x, irreps_in1, irreps_in2, irreps_out, options)(x, y)


def gaunt_product(
    x: Float[Tensor, "*#batch dim1"],
    y: Float[Tensor, "*#batch dim2"],
    irreps_in1: IrrepsLike,
    irreps_in2: IrrepsLike,
    irreps_out: IrrepsLike | None = None,
    **options: Any,
) -> Float[Tensor, "..."]:
    """The product of two signals on the sphere, in the irreps `irreps_out` (None: all), which stand once each.

    Options: as in `GauntProduct`.
    """
    return _made(GauntProduct, x, irreps_in1, irreps_in2, irreps_out, options | {"weights": False})(x, y)


def matrix_product(
    x: Float[Tensor, "*#batch dim1"],
    y: Float[Tensor, "*#batch dim2"],
    irreps_in1: IrrepsLike,
    irreps_in2: IrrepsLike,
    irreps_out: IrrepsLike | None = None,
    **options: Any,
) -> Float[Tensor, "..."]:
    """The product of two matrices into which the irreps are embedded. Options: as in `MatrixProduct`."""
    return _made(MatrixProduct, x, irreps_in1, irreps_in2, irreps_out, options | {"weights": False})(x, y)


def vector_signal_product(
    x: Float[Tensor, "*#batch dim1"],
    y: Float[Tensor, "*#batch dim2"],
    irreps_in1: IrrepsLike,
    irreps_in2: IrrepsLike,
    irreps_out: IrrepsLike | None = None,
    **options: Any,
) -> Float[Tensor, "..."]:
    """The products of signals and vector fields, each irrep on all harmonics alike. Options: `VectorSignalProduct`."""
    return _made(VectorSignalProduct, x, irreps_in1, irreps_in2, irreps_out, options | {"weights": False})(x, y)


def gaunt_product_of_many(signals: Sequence[Float[Tensor, "..."]], l_out: int | None = None) -> Float[Tensor, "..."]:
    """The point-wise product of any number of signals, degrees 0 to L_i side by side, in one pass over one grid.

    What many-body features need (the symmetric contraction of MACE): nu factors cost nu transforms, not nu - 1 products
    of ever higher degree.

    Args:
        signals: (..., (L_i + 1)**2), L_i may differ.
        l_out: highest degree of the result; by default the sum of the L_i, which loses nothing.

    Raises:
        ValueError: where there are no signals, or one has no (L + 1)**2 components.
    """
    if not signals:
        raise ValueError("signals must hold at least one, got none")
    degrees = [degree_of(signal, f"signals[{index}]") for index, signal in enumerate(signals)]
    l_out = sum(degrees) if l_out is None else l_out
    harmonics, weights = _grid(sum(degrees) + l_out, max(*degrees, l_out), signals[0].dtype, signals[0].device)
    values = signals[0] @ harmonics[: signals[0].shape[-1]]
    for signal in signals[1:]:
        values = values * (signal @ harmonics[: signal.shape[-1]])
    return (values * weights) @ harmonics[: (l_out + 1) ** 2].T


@functools.lru_cache(maxsize=32)
def _grid(degree: int, lmax: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    points, weights = grid_arrays(degree)
    harmonics = spherical_harmonics(lmax, torch.from_numpy(points)).T
    return harmonics.to(device=device, dtype=dtype).contiguous(), torch.from_numpy(weights).to(
        device=device, dtype=dtype
    )


def _made(
    kind: Any, x: Tensor, in1: IrrepsLike, in2: IrrepsLike, out: IrrepsLike | None, options: dict[str, Any]
) -> Any:
    irreps = (Irreps(in1), Irreps(in2), None if out is None else Irreps(out))
    return _product(kind, *irreps, x.dtype, x.device, tuple(sorted(options.items())))


@functools.lru_cache(maxsize=64)
def _product(
    kind: Any,
    in1: Irreps,
    in2: Irreps,
    out: Irreps | None,
    dtype: torch.dtype,
    device: torch.device,
    options: tuple[tuple[str, Any], ...],
) -> Any:
    with torch.inference_mode(False):
        return kind(in1, in2, out, dtype=dtype, device=device, **dict(options))
