"""What all hypercomplex layers share: a weight that is a sum of Kronecker products, its start, its fit, its keeping."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, TypedDict, TypeVar, Unpack, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lathe.core.kept import Kept
from lathe.core.precision import at_least_float32, autocasts, without_autocast
from lathe.core.shapes import conv_arguments, linear_arguments
from lathe.nn.hypercomplex_layers.algebras import algebra_tensor
from lathe.nn.hypercomplex_layers.kronecker import kronecker_sum, nearest_kronecker_sum

__all__ = ["AlgebraOptions", "HypercomplexLayer", "OnIndivisible", "Options"]

OnIndivisible = Literal["raise", "skip", "largest"]
Layer = TypeVar("Layer", bound="HypercomplexLayer")


class AlgebraOptions(TypedDict, total=False):
    """What every hypercomplex layer takes beyond n and the replaced layer's arguments; see `HypercomplexLayer`."""

    terms: int | None
    rank: int | None
    algebra: str | Tensor | None
    learn_algebra: bool | None
    share_algebra: bool
    init: Literal["matched", "he", "xavier"]


class Options(AlgebraOptions, total=False):
    """The same, with where and how the tensors are made."""

    device: Any
    dtype: torch.dtype | None


class HypercomplexLayer(nn.Module):
    """What the linear layer and the convolutions of this module share: the weight H = sum_i A_i (x) F_i.

    H (s, d, *kernel) has n x n blocks, and block (a, b), which leads from the b-th run of d/n input channels to the
    a-th run of s/n output channels, is sum_i A[i, a, b] F[i]. In eval() without gradients H is kept between calls and
    made anew when a factor has changed (as PyTorch counts changes: a write through `.data` goes unseen).

    Args:
        n: components that inputs and outputs are divided into, as n contiguous runs of channels.
        terms: Kronecker products that are summed, n by default; n**2 of them can be any weight.
        rank: makes each F_i, seen as a matrix (outputs x inputs and kernel), a product U_i V_i of this inner size.
        algebra: the start of A: a name for `algebra_tensor`, or a tensor (terms, n, n). None draws it.
        learn_algebra: whether A is trained. By default it is, unless `algebra` is given (a complex, quaternion, ...
            layer) or n is 1, where A would only be a second scale.
        share_algebra: whether all groups of a grouped convolution use one A, or each has its own.
        init: variance of H's entries at the start: "matched" (that of the replaced layer in `like`; of torch's default
            for such a layer otherwise), "he" (2 / fan_in), or "xavier", the reference code's, with which the outputs
            of networks without normalisation vanish.

    Attributes:
        A: (terms, n, n), with the groups in front where they do not share it; a parameter, or a buffer where fixed.
        F: (terms, s/n, d/n, *kernel), a parameter; None with `rank`, which has U and V in its place.
        relative_error: what `from_trained` could not represent, as a part of the weight's Frobenius norm; else None.

    Raises:
        ValueError: where n is below 1 or does not divide both channel counts (of each group), or an option does not
            fit n.
    """

    replaces: ClassVar[type[nn.Module]]
    transposed: ClassVar[bool] = False
    A: Tensor
    F: nn.Parameter | None
    U: nn.Parameter | None
    V: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight_shape: Sequence[int],
        outputs: int,
        groups: int,
        bias: bool,
        *,
        n: int = 4,
        terms: int | None = None,
        rank: int | None = None,
        algebra: str | Tensor | None = None,
        learn_algebra: bool | None = None,
        share_algebra: bool = True,
        init: Literal["matched", "he", "xavier"] = "matched",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if init not in ("matched", "he", "xavier"):
            raise ValueError(f"init must be 'matched', 'he' or 'xavier', got {init!r}")
        with torch.device("cpu"):  # a layer made on the meta device gets its algebra when it is reset on a real one
            table = None if algebra is None else _table(algebra, n, terms)
        terms = len(table) if table is not None else n if terms is None else terms
        if not 1 <= terms <= n * n:
            raise ValueError(f"terms must lie in 1 to n**2 = {n * n}, got {terms}")
        learnt = (table is None and n > 1) if learn_algebra is None else learn_algebra
        if learnt and n == 1:
            warnings.warn("n = 1 with a learnt algebra has a scale that its filters already have", stacklevel=3)
        first, second, *kernel = weight_shape
        rows, columns = first // n, second // n * math.prod(kernel)
        if rank is not None and not 1 <= rank <= min(rows, columns):
            raise ValueError(f"rank must lie in 1 to {min(rows, columns)} for filters {rows} x {columns}, got {rank}")

        self.n, self.terms, self.rank, self.groups, self.init = n, terms, rank, groups, init
        self.algebra = algebra if isinstance(algebra, str) or algebra is None else "given"
        self.relative_error: float | None = None
        self._table, self._fan_in = table, second * math.prod(kernel)
        self._kept = Kept()

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        A = torch.ones(*(() if share_algebra or groups == 1 else (groups,)), terms, n, n, **made)
        if learnt:
            self.A = nn.Parameter(A)
        else:
            self.register_buffer("A", A)
        shapes: dict[str, tuple[int, ...] | None] = {
            "F": (terms, rows, second // n, *kernel) if rank is None else None,
            "U": None if rank is None else (terms, rows, rank),
            "V": None if rank is None else (terms, rank, second // n, *kernel),
            "bias": (outputs,) if bias else None,
        }
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, **made)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, variance: float | None = None, generator: torch.Generator | None = None) -> None:
        """Draws A, F and the bias anew.

        "matched" and "he" draw A from N(0, 1/terms), scaled so that the mean over the blocks of sum_i A[i, a, b]**2 is
        1 exactly, and F from N(0, variance); "xavier" draws both uniformly, with the variances that
        `nn.init.xavier_uniform_` gives to tensors of their shapes. An algebra that was given is restored.

        Args:
            variance: of H's entries, in place of the one that `init` names.
        """
        n, terms = self.n, self.terms
        reference = self.init == "xavier" and variance is None
        if variance is None:
            # torch starts its own layers with uniform(+-1 / sqrt(fan_in)).
            variance = (2.0 if self.init == "he" else 1.0 / 3.0) / self._fan_in
        if self._table is not None:
            self.A.copy_(self._table)
        elif n == 1:
            self.A.fill_(1.0)
        elif reference:
            bound = math.sqrt(6.0 / (n * n + terms * n))
            self.A.uniform_(-bound, bound, generator=generator)
        else:
            self.A.normal_(generator=generator)
            self.A.mul_(n * self.A.square().sum((-3, -2, -1), keepdim=True).rsqrt())
        filters = [factor for factor in (self.F, self.U, self.V) if factor is not None]
        if reference:
            first = filters[0].shape[1]
            variance = 2.0 / ((first + terms) * (self._fan_in // n))
        elif self._table is not None:
            variance /= float(self._table.square().sum(0).mean())
        if self.rank is not None:
            variance = math.sqrt(variance / self.rank)
        for factor in filters:
            if reference:
                factor.uniform_(-math.sqrt(3.0 * variance), math.sqrt(3.0 * variance), generator=generator)
            else:
                factor.normal_(std=math.sqrt(variance), generator=generator)
        if self.bias is not None:
            bound = 1.0 / math.sqrt(self._fan_in)
            self.bias.uniform_(-bound, bound, generator=generator)

    @classmethod
    def like(
        cls: type[Layer],
        layer: nn.Module,
        *,
        n: int = 4,
        on_indivisible: OnIndivisible = "raise",
        **options: Unpack[Options],
    ) -> Layer | None:
        """A fresh layer that fits where `layer` stood: same shapes, device, dtype and mode.

        Args:
            on_indivisible: where n does not divide both channel counts: "raise"; "skip" returns None; "largest" takes
                the largest divisor below n, and returns None where that is 1. Depthwise convolutions, which have
                nothing to share, always return None.
            options: as in the constructor.

        Raises:
            TypeError: where `layer` is not of the type that this layer replaces.
            ValueError: where n does not divide, with "raise".
        """
        if on_indivisible not in ("raise", "skip", "largest"):
            raise ValueError(f"on_indivisible must be 'raise', 'skip' or 'largest', got {on_indivisible!r}")
        arguments = cls._arguments_of(layer)
        per_group = cls._counts(arguments)
        if arguments.get("groups", 1) > 1 and per_group[0] == 1:
            return None
        if n >= 1 and on_indivisible != "raise" and any(count % n for count in per_group):
            n = max(m for m in range(1, n) if not any(count % m for count in per_group))
            if on_indivisible == "skip" or n == 1:
                return None
        made = cls(**arguments, n=n, **options)
        weight = cast(Tensor, layer.weight)
        if made.init == "matched" and not weight.is_meta:
            made.reset_parameters(float(weight.detach().double().square().mean()))
        return made.train(layer.training)

    @classmethod
    @torch.no_grad()
    def from_trained(
        cls: type[Layer],
        layer: nn.Module,
        *,
        n: int = 4,
        on_indivisible: OnIndivisible = "raise",
        **options: Unpack[Options],
    ) -> Layer | None:
        """As `like`, with the weight that is nearest to the trained one in the Frobenius norm, and its bias.

        The nearest sum of `terms` Kronecker products is exact from `terms = n**2` on; with an `algebra` that is given,
        F is its least-squares fit; with `rank`, each F_i is then cut to that rank. The layer's `relative_error` says
        what was lost.
        """
        made = cls.like(layer, n=n, on_indivisible=on_indivisible, **options)
        if made is None:
            return None
        weight = cast(Tensor, layer.weight).detach()
        given = made._table is not None or made.n == 1
        own = made.A.ndim == 4
        fits = []
        for part, start in zip(weight.chunk(made.groups) if own else [weight], made.A if own else [made.A]):
            algebra = (start.mT if cls.transposed else start) if given else None
            fits.append(
                nearest_kronecker_sum(part, made.n, made.terms, algebra=algebra, groups=1 if own else made.groups)
            )
        if not given:
            A = torch.stack([fit.A for fit in fits]) if own else fits[0].A
            made.A.copy_(A.mT if cls.transposed else A)
        F = torch.cat([fit.F for fit in fits], 1)
        if made.F is not None:
            made.F.copy_(F)
        else:
            assert made.U is not None and made.V is not None
            left, values, right = torch.linalg.svd(F.flatten(2).double(), full_matrices=False)
            roots = values[:, : made.rank].sqrt()
            made.U.copy_(left[:, :, : made.rank] * roots[:, None])
            made.V.copy_((roots[..., None] * right[:, : made.rank]).view_as(made.V))
        if made.bias is not None:
            made.bias.copy_(cast(Tensor, layer.bias))
        norm = float(torch.linalg.vector_norm(weight.double()))
        missing = float(torch.linalg.vector_norm(weight.double() - made._build().double()))
        made.relative_error = missing / norm if norm > 0 else 0.0
        return made

    def filters(self) -> Float[Tensor, "terms p q *kernel"]:
        """F, or the product of U and V (in float32 where these are of half precision)."""
        if self.F is not None:
            return self.F
        assert self.U is not None and self.V is not None
        wide = at_least_float32(self.U.dtype)
        with without_autocast(self.U.device):
            return torch.bmm(self.U.to(wide), self.V.to(wide).flatten(2)).unflatten(2, self.V.shape[2:])

    @property
    def weight(self) -> Float[Tensor, "first second *kernel"]:
        """H, in the layout of the replaced layer's weight (transposed convolutions have inputs first)."""
        if self.training:
            return self._build()
        factors = [factor for factor in (self.A, self.F, self.U, self.V) if factor is not None]
        device = self.A.device
        dtype = torch.get_autocast_dtype(device.type) if autocasts(device) else self.A.dtype
        return self._kept.get(factors, lambda: self._build().to(dtype), key=dtype)

    def _build(self) -> Tensor:
        A, F = self.A.mT if self.transposed else self.A, self.filters()
        if self.groups == 1:
            weight = kronecker_sum(A, F)
        elif A.ndim == 4:
            per_group = F.unflatten(1, (self.groups, -1))
            weight = torch.cat([kronecker_sum(A[g], per_group[:, g]) for g in range(self.groups)])
        else:
            # Rows come out as (component, group, row); a grouped convolution wants its groups outermost.
            weight = kronecker_sum(A, F).unflatten(0, (self.n, self.groups, -1)).transpose(0, 1).flatten(0, 2)
        return weight.to(A.dtype)

    def fold(self) -> nn.Module:
        """The ordinary layer with this layer's weight, bias and mode: the same function, for deployment."""
        with torch.no_grad():
            weight = self._build()
            plain = torch.nn.utils.skip_init(
                cast(Callable[..., nn.Module], self.replaces),
                **self._plain_arguments(),
                device=weight.device,
                dtype=weight.dtype,
            )
            cast(Tensor, plain.weight).copy_(weight)
            if self.bias is not None:
                cast(Tensor, plain.bias).copy_(self.bias)
        return plain.train(self.training)

    def train(self: Layer, mode: bool = True) -> Layer:
        """As `nn.Module.train`; training forgets the weight that eval() kept."""
        if mode:
            self._kept.forget()
        return super().train(mode)

    def _apply(self: Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        self._kept.forget()
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """The replaced layer's arguments, then what differs from the defaults of this layer's own."""
        parts = [f"n={self.n}"]
        parts += [f"terms={self.terms}"] * (self.terms != self.n) + [f"rank={self.rank}"] * (self.rank is not None)
        parts += [f"algebra={self.algebra}"] * (self.algebra is not None)
        return ", ".join(parts)

    @classmethod
    def _arguments_of(cls, layer: nn.Module) -> dict[str, Any]:
        """Constructor arguments of the layer to be replaced."""
        if not isinstance(layer, cls.replaces):
            raise TypeError(f"{cls.__name__} replaces nn.{cls.replaces.__name__}, got {type(layer).__name__}")
        return linear_arguments(layer) if isinstance(layer, nn.Linear) else conv_arguments(cast(_ConvNd, layer))

    @staticmethod
    def _counts(arguments: dict[str, Any]) -> tuple[int, int]:
        """Inputs and outputs per group, both of which n must divide."""
        if "in_features" in arguments:
            return arguments["in_features"], arguments["out_features"]
        return arguments["in_channels"] // arguments["groups"], arguments["out_channels"] // arguments["groups"]

    def _plain_arguments(self) -> dict[str, Any]:
        raise NotImplementedError


def _table(algebra: str | Tensor, n: int, terms: int | None) -> Tensor:
    table = algebra_tensor(algebra) if isinstance(algebra, str) else algebra.detach().clone()
    if table.ndim != 3 or table.shape[1:] != (n, n) or terms not in (None, len(table)):
        named = f"{algebra!r}, which is {tuple(table.shape)}" if isinstance(algebra, str) else tuple(table.shape)
        raise ValueError(f"algebra must be ({'n' if terms is None else terms}, {n}, {n}) for n = {n}, got {named}")
    if not table.any():
        raise ValueError("algebra must not be zero throughout")
    return table
