"""Irreducible representations of O(3), written as users of e3nn write them: "16x0e + 8x1o + 4x2e".

"8x1o" is 8 copies of the representation of degree l = 1 and odd parity (o: changes sign under inversion; e: does not).
A feature of these irreps is a vector (..., dim): for each term its copies one after the other, each with 2l + 1
components m = -l to l. The basis is real, with the polar axis y, so that 1o is a vector (x, y, z), as in e3nn.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Irrep", "Irreps", "IrrepsLike"]

_TERM = re.compile(r"\s*(?:(\d+)\s*x\s*)?(-?\d+)\s*([A-Za-z]?)\s*")


class Irrep(NamedTuple):
    """A degree and a parity: `Irrep(1, -1)` is "1o"."""

    l: int
    p: int

    @property
    def dim(self) -> int:
        """2l + 1."""
        return 2 * self.l + 1

    @property
    def natural(self) -> bool:
        """Whether the parity is (-1)**l, that of spherical harmonics."""
        return self.p == (-1) ** self.l

    def __mul__(self, other: object) -> tuple[Irrep, ...]:  # type: ignore[override]
        """The irreps in the tensor product with another one."""
        if not isinstance(other, Irrep):
            return NotImplemented
        return tuple(Irrep(l, self.p * other.p) for l in range(abs(self.l - other.l), self.l + other.l + 1))

    def __str__(self) -> str:
        return f"{self.l}{'e' if self.p == 1 else 'o'}"

    @classmethod
    def parse(cls, irrep: str | tuple[int, int]) -> Irrep:
        """From "1o", or from a pair (l, p).

        Raises:
            ValueError: where it is neither, l is negative or the parity is unknown.
        """
        if isinstance(irrep, str):
            terms = Irreps(irrep).terms
            if len(terms) != 1 or terms[0][0] != 1:
                raise ValueError(f"irrep must be one irrep such as '1o', got {irrep!r}")
            return terms[0][1]
        l, p = irrep
        if l < 0 or p not in (1, -1):
            raise ValueError(f"irrep must have l >= 0 and parity 1 or -1, got l = {l}, parity = {p}")
        return cls(int(l), int(p))


class Irreps(Sequence[tuple[int, Irrep]]):
    """A direct sum of irreps with multiplicities, and the layout of a feature.

    Args:
        irreps: "8x0e + 4x1o", an `Irrep`, pairs (multiplicity, irrep) where an irrep is "1o" or (l, p), or e3nn's
            own `Irreps`.

    Raises:
        ValueError: where l is negative, the parity is neither e nor o, or the text cannot be read.

    Example:
        >>> Irreps("8x0e + 4x1o").dim
        20
    """

    terms: tuple[tuple[int, Irrep], ...]

    def __init__(self, irreps: IrrepsLike = "") -> None:
        if isinstance(irreps, Irreps):
            self.terms = irreps.terms
        elif isinstance(irreps, Irrep):
            self.terms = ((1, Irrep.parse(irreps)),)
        elif isinstance(irreps, str) or hasattr(irreps, "num_irreps"):  # e3nn's Irreps are read by their text
            text = str(irreps)
            self.terms = tuple(_term(part, text) for part in text.split("+")) if text.strip() else ()
        else:
            self.terms = tuple(_pair(part) for part in irreps)

    @classmethod
    def spherical_harmonics(cls, lmax: int) -> Irreps:
        """Degrees 0 to lmax once each with parity (-1)**l: "1x0e+1x1o+1x2e+..."."""
        if lmax < 0:
            raise ValueError(f"lmax must be at least 0, got {lmax}")
        return cls([(1, Irrep(l, (-1) ** l)) for l in range(lmax + 1)])

    @property
    def dim(self) -> int:
        """Components of a feature."""
        return sum(multiplicity * irrep.dim for multiplicity, irrep in self.terms)

    @property
    def num_irreps(self) -> int:
        """Irreps counted with multiplicity."""
        return sum(multiplicity for multiplicity, _ in self.terms)

    @property
    def lmax(self) -> int:
        """Highest degree.

        Raises:
            ValueError: where there are no irreps.
        """
        if not self.terms:
            raise ValueError("irreps must not be empty to have an lmax, got ''")
        return max(irrep.l for _, irrep in self.terms)

    @property
    def sizes(self) -> list[int]:
        """Components of each term."""
        return [multiplicity * irrep.dim for multiplicity, irrep in self.terms]

    def slices(self) -> list[slice]:
        """Where each term lies in the last axis of a feature."""
        ends = list(itertools.accumulate(self.sizes, initial=0))
        return [slice(start, end) for start, end in itertools.pairwise(ends)]

    def count(self, irrep: Any) -> int:
        """Multiplicity of an irrep ("1o" or (l, p)) over all terms."""
        wanted = Irrep.parse(irrep)
        return sum(multiplicity for multiplicity, each in self.terms if each == wanted)

    def simplify(self) -> Irreps:
        """Neighbouring terms of the same irrep joined, empty ones left out: the same layout in fewer terms."""
        joined: list[tuple[int, Irrep]] = []
        for multiplicity, irrep in self.terms:
            if joined and joined[-1][1] == irrep:
                joined[-1] = (joined[-1][0] + multiplicity, irrep)
            elif multiplicity:
                joined.append((multiplicity, irrep))
        return Irreps(joined)

    def randn(self, *leading: int, generator: torch.Generator | None = None, **options: Any) -> Float[Tensor, "*batch"]:
        """A feature of standard normal components, shape (*leading, dim); `options` as in `torch.randn`."""
        return torch.randn(*leading, self.dim, generator=generator, **options)

    def transformation(self, rotation: Float[Tensor, "3 3"]) -> Float[Tensor, "dim dim"]:
        """The matrix by which features change when coordinates change by an orthogonal matrix, proper or not.

        `x @ irreps.transformation(R).T` is the feature of the turned (and reflected, where det R = -1) input.

        Raises:
            ValueError: where `rotation` is no orthogonal matrix.
        """
        from lathe.nn.equivariant_tensor_products.harmonics import wigner_d

        if tuple(rotation.shape) != (3, 3):
            raise ValueError(f"rotation must be a 3 x 3 matrix, got {tuple(rotation.shape)}")
        exact = rotation.detach().double()
        if not torch.allclose(exact @ exact.T, torch.eye(3, dtype=torch.float64, device=exact.device), atol=1e-5):
            raise ValueError(f"rotation must be orthogonal, got {rotation.tolist()}")
        inverts = torch.linalg.det(exact) < 0
        proper = -exact if inverts else exact
        blocks = []
        for multiplicity, irrep in self.terms:
            block = wigner_d(irrep.l, proper) * (irrep.p if inverts else 1)
            blocks += [block] * multiplicity
        return torch.block_diag(*blocks).to(rotation) if blocks else rotation.new_zeros(0, 0)

    def __getitem__(self, index: Any) -> Any:
        return Irreps(self.terms[index]) if isinstance(index, slice) else self.terms[index]

    def __len__(self) -> int:
        return len(self.terms)

    def __iter__(self) -> Iterator[tuple[int, Irrep]]:
        return iter(self.terms)

    def __contains__(self, irrep: object) -> bool:
        return any(each == Irrep.parse(cast(Any, irrep)) and multiplicity for multiplicity, each in self.terms)

    def __add__(self, other: IrrepsLike) -> Irreps:
        return Irreps((*self.terms, *Irreps(other).terms))

    def __mul__(self, copies: int) -> Irreps:
        """Every multiplicity times `copies`."""
        return Irreps([(copies * multiplicity, irrep) for multiplicity, irrep in self.terms])

    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Irreps) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(self.terms)

    def __str__(self) -> str:
        return "+".join(f"{multiplicity}x{irrep}" for multiplicity, irrep in self.terms)

    def __repr__(self) -> str:
        return f"Irreps({str(self)!r})"


IrrepsLike = str | Irrep | Irreps | Iterable[Any]


def _term(text: str, whole: str) -> tuple[int, Irrep]:
    match = _TERM.fullmatch(text)
    if match is None:
        raise ValueError(f"irreps must be written like '8x0e + 4x1o', got {whole!r}")
    multiplicity, l, parity = match.groups()
    if parity not in ("e", "o"):
        raise ValueError(f"irreps must have the parity e or o behind every degree, got {whole!r}")
    if int(l) < 0:
        raise ValueError(f"irreps must have degrees l >= 0, got {whole!r}")
    return int(multiplicity or 1), Irrep(int(l), 1 if parity == "e" else -1)


def _pair(part: Any) -> tuple[int, Irrep]:
    try:
        multiplicity, irrep = part
        read = Irrep.parse(irrep if type(irrep) in (str, tuple, list, Irrep) else str(irrep))
    except TypeError:
        raise ValueError(f"irreps must hold pairs (multiplicity, irrep), got {part!r}") from None
    if multiplicity < 0:
        raise ValueError(f"irreps must have multiplicities >= 0, got {part!r}")
    return int(multiplicity), read
