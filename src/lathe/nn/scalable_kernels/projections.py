"""Random directions g ~ N(0, I): independent, orthogonal in blocks, or as products of signs and Hadamard matrices."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["GaussianProjection", "HadamardProjection", "Orthogonality", "projection"]

Orthogonality = bool | Literal["hadamard"]


def projection(
    in_features: int, num_features: int, *, orthogonal: Orthogonality, generator: torch.Generator | None, **made: Any
) -> GaussianProjection | HadamardProjection:
    """`num_features` directions of each of which the marginal is N(0, I) (nearly so with "hadamard").

    Args:
        orthogonal: False draws them independently; True takes rows of Haar-distributed orthogonal matrices, a block of
            `in_features` at a time, of independent chi-distributed norms; "hadamard" takes rows of H D3 H D2 H D1, with
            diagonal random signs, which store 3 bytes a block and dimension and cost d sqrt(d) a block and input.
        made: device and dtype of the buffers.
    """
    for name, count in (("in_features", in_features), ("num_features", num_features)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if orthogonal not in (True, False, "hadamard"):
        raise ValueError(f"orthogonal must be True, False or 'hadamard', got {orthogonal!r}")
    if orthogonal == "hadamard":
        return HadamardProjection(in_features, num_features, generator=generator, **made)
    return GaussianProjection(in_features, num_features, orthogonal=bool(orthogonal), generator=generator, **made)


def buffer_of(value: Tensor, device: Any = None, dtype: torch.dtype | None = None) -> Tensor:
    """`value`, drawn on the CPU, where and how a parameter would be made (also on the meta device)."""
    return torch.empty(value.shape, device=device, dtype=dtype).copy_(value)


class GaussianProjection(nn.Module):
    """x -> x G^T, with the rows of `weight` (num_features, in_features) for directions."""

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        num_features: int,
        *,
        orthogonal: bool = True,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dimension = in_features
        shape = (num_features, in_features)
        G = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)
        if orthogonal:
            norms, blocks = torch.linalg.vector_norm(G, dim=1, keepdim=True), []
            for start in range(0, num_features, in_features):
                rows = min(in_features, num_features - start)
                draw = torch.randn(in_features, rows, generator=generator, device="cpu", dtype=torch.float64)
                Q, R = torch.linalg.qr(draw)
                blocks.append((Q * R.diagonal().sign()).T)  # without the signs Q is not Haar-distributed
            G = torch.cat(blocks) * norms
        self.register_buffer("weight", buffer_of(G, device, dtype))

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_features"]:
        """The product with every direction."""
        return functional.linear(x, self.weight)

    def squared_norms(self) -> Float[Tensor, " num_features"]:
        """|g|^2 of each direction."""
        return self.weight.square().sum(1)

    def scale_(self, factors: Float[Tensor, " num_features"]) -> None:
        """Multiplies each direction by a factor."""
        self.weight.mul_(factors.to(self.weight)[:, None])


class HadamardProjection(nn.Module):
    """x -> rows of H D3 H D2 H D1 x, times `norms`; x is filled up with zeros to the next power of two, `dimension`."""

    signs: Tensor
    norms: Tensor
    hadamard: Tensor

    def __init__(
        self,
        in_features: int,
        num_features: int,
        *,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        power = max(1, math.ceil(math.log2(in_features)))
        self.dimension, self.num_features = 2**power, num_features
        self._left, self._right = 2 ** (power - power // 2), 2 ** (power // 2)
        blocks = math.ceil(num_features / self.dimension)
        bits = torch.randint(0, 2, (3, blocks, self.dimension), generator=generator, device="cpu")
        self.register_buffer("signs", buffer_of(2 * bits - 1, device, torch.int8))
        # chi with `dimension` degrees of freedom, whatever that is.
        concentration = torch.full((num_features,), self.dimension / 2, device="cpu", dtype=torch.float64)
        squares = 2 * torch._standard_gamma(concentration, generator=generator)
        self.register_buffer("norms", buffer_of(squares.sqrt(), device, dtype))
        H = torch.ones(1, 1, device="cpu")
        while len(H) < self._left:
            H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
        # Sylvester's matrix is a Kronecker product of smaller ones, each the corner of a larger: one is kept.
        self.register_buffer("hadamard", buffer_of(H, device, dtype))

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_features"]:
        """The product with every direction."""
        left = self.hadamard / math.sqrt(self._left)
        right = self.hadamard[: self._right, : self._right] / math.sqrt(self._right)
        x = functional.pad(x, (0, self.dimension - x.shape[-1])).unsqueeze(-2)
        for signs in self.signs:
            y = (x * signs).unflatten(-1, (self._left, self._right))
            x = (left @ y @ right).flatten(-2)
        return x.flatten(-2)[..., : self.num_features] * self.norms

    def squared_norms(self) -> Float[Tensor, " num_features"]:
        """|g|^2 of each direction."""
        return self.norms.square()

    def scale_(self, factors: Float[Tensor, " num_features"]) -> None:
        """Multiplies each direction by a factor."""
        self.norms.mul_(factors.to(self.norms))
