"""The V-cycle as a layer: `MultigridConv1d`, `MultigridConv2d`, `MultigridConv3d` (arXiv 2310.19809, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from jaxtyping import Inexact
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lathe.core.shapes import conv_arguments
from lathe.operators.multigrid_operator.periodic import fold_periodic, pad_periodic

__all__ = ["REFERENCE", "MultigridConv1d", "MultigridConv2d", "MultigridConv3d"]

REFERENCE: dict[str, Any] = {"residual": False, "transfer": "pi"}
"""Options of `MultigridConv` that give the cycle of the authors' public code: f itself is restricted, no residual."""

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}

_Layer = TypeVar("_Layer", bound="_MultigridConv")


class _Kernel(nn.Module):
    """Weight and bias of one convolution, initialised as torch's own."""

    def __init__(self, shape: tuple[int, ...], bias: int, factory: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self.bias = nn.Parameter(torch.empty(bias, **factory)) if bias else None
        # Kaiming uniform with a = sqrt(5): U(-b, b) with b = 1/sqrt(fan_in); a complex entry keeps that variance.
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        with torch.no_grad():
            for parameter in self.parameters():
                parts = torch.view_as_real(parameter) if parameter.is_complex() else parameter
                parts.uniform_(-bound, bound)
                parameter.mul_(math.sqrt(0.5) if parameter.is_complex() else 1.0)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}"


class _Level(nn.Module):
    """The kernels of one level: S_i and A_i in the order of use and, but for the coarsest, R, Pi, P and the norm."""

    def __init__(self, smoothers: list[_Kernel], operators: list[_Kernel]) -> None:
        super().__init__()
        self.smoothers = nn.ModuleList(smoothers)
        self.operators = nn.ModuleList(operators)
        self.restriction: _Kernel | None = None
        self.injection: _Kernel | None = None
        self.prolongation: _Kernel | None = None
        self.norm: nn.GroupNorm | None = None


class _MultigridConv(nn.Module):
    """A linear operator from `in_channels` to `out_channels` grid functions: one multigrid cycle of learned kernels.

    On level l (0 is the finest) with nu_l steps before and nu'_l steps after the coarser levels:

        u <- u + S_i (f - A_i u),   i = 1..nu_l       (from the zero guess the first step is u = S_1 f)
        f' = R (f - A u),  u' = Pi u,  u <- u + P cycle(f', u')
        u <- u + S'_i (f - A'_i u), i = 1..nu'_l

    No nonlinearity and no bias inside (unless asked for): the layer is linear in f. It takes any grid of at least
    `2**(levels - 1)` points an axis, odd ones too; its kernels live on pixels, so a trained layer belongs to the grid
    spacing that it was trained on.

    Args:
        in_channels: channels of f.
        out_channels: channels of u.
        levels: number of grids; each has half the points of the finer one.
        steps: instead of `levels`, `pre`, `post`, `coarse`: smoothing steps `(before, after)` by level, finest first.
        pre: smoothing steps before the coarser levels.
        post: smoothing steps after them.
        coarse: smoothing steps on the coarsest level of several; a single level takes `pre` steps.
        residual: restrict f - A u (the true cycle, default) or f alone (the authors' code).
        transfer: the coarser level's guess: `"pi"`, a learned Pi u, or `"zero"`.
        kernel_size: of S and A, odd; R and Pi have 3 taps an axis, P has 4 (offsets -1..2 around the coarse point).
        padding_mode: `"zeros"` (Dirichlet), `"circular"` (periodic; P wraps too), `"reflect"` (Neumann), `"replicate"`.
        transfer_padding: 1: n -> ceil(n/2) points, coarse point j over fine point 2j; 0: n -> (n-1)//2, coarse j over
            fine 2j+1, the nested interior nodes of a Dirichlet problem (and the Helmholtz networks' 101, 50, 24, ...).
        bias: biases in S and A make the operator affine.
        norm: `"layer"` normalises over channels and points after each u + P u'' with an affine map per channel; the
            Navier-Stokes and Helmholtz variants of the authors' code. The layer is then no longer linear.
        share_operator: one A for all uses on a level.
        cycle: `"v"`, or `"w"`, which visits each level but the coarsest twice from the one above, same kernels.
        widen: level l has `1 + widen * l` times the channels; 1 is the wide Helmholtz variant.
        recompute: keep only f and u of each step for the backward pass and recompute f - A u there: less memory, one
            more convolution a step.

    Shape: `(batch, in_channels, *grid)` -> `(batch, out_channels, *grid)`, real, or complex with a complex `dtype`.

    Raises:
        ValueError: for impossible steps, sizes or options; in `forward`, for a wrong number of channels or a grid that
            is too small for the levels.
    """

    ndim: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        levels: int | None = None,
        *,
        steps: Sequence[tuple[int, int]] | None = None,
        pre: int = 1,
        post: int = 0,
        coarse: int = 2,
        residual: bool = True,
        transfer: Literal["pi", "zero"] = "pi",
        kernel_size: int | tuple[int, ...] = 3,
        padding_mode: Literal["zeros", "circular", "reflect", "replicate"] = "zeros",
        transfer_padding: Literal[0, 1] = 1,
        bias: bool = False,
        norm: Literal["layer"] | None = None,
        share_operator: bool = False,
        cycle: Literal["v", "w"] = "v",
        widen: int = 0,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if (steps is None) == (levels is None):
            raise ValueError(f"give either levels or steps, got levels={levels} and steps={steps}")
        if steps is None:
            if levels is None or levels < 1:
                raise ValueError(f"levels must be at least 1, got {levels}")
            steps = [(pre, post)] * (levels - 1) + [(coarse if levels > 1 else pre, 0)]
        kernel = (kernel_size,) * self.ndim if isinstance(kernel_size, int) else tuple(kernel_size)
        _check_options(in_channels, out_channels, steps, transfer, kernel, padding_mode, transfer_padding, norm, cycle)
        if len(kernel) != self.ndim:
            raise ValueError(f"kernel_size must have {self.ndim} entries, got {kernel_size}")

        self.in_channels, self.out_channels = in_channels, out_channels
        self.steps = tuple((int(before), int(after)) for before, after in steps)
        self.residual, self.transfer, self.cycle = residual, transfer, cycle
        self.kernel_size, self.padding_mode, self.transfer_padding = kernel, padding_mode, transfer_padding
        self.share_operator, self.widen, self.recompute = share_operator, widen, recompute
        self.levels = nn.ModuleList()

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        three, four = (3,) * self.ndim, (4,) * self.ndim
        for l, (before, after) in enumerate(self.steps):
            c_f, c_u = in_channels * (1 + widen * l), out_channels * (1 + widen * l)
            coarsest = l == len(self.steps) - 1
            uses = before + after - self._from_zero(l) + (residual and not coarsest)
            level = _Level(
                [_Kernel((c_u, c_f, *kernel), c_u * bias, factory) for _ in range(before + after)],
                [
                    _Kernel((c_f, c_u, *kernel), c_f * bias, factory)
                    for _ in range(min(uses, 1) if share_operator else uses)
                ],
            )
            if not coarsest:
                wide_f, wide_u = in_channels * (1 + widen * (l + 1)), out_channels * (1 + widen * (l + 1))
                level.restriction = _Kernel((wide_f, c_f, *three), 0, factory)
                level.injection = _Kernel((wide_u, c_u, *three), 0, factory) if transfer == "pi" else None
                level.prolongation = _Kernel((wide_u, c_u, *four), 0, factory)
                level.norm = nn.GroupNorm(1, c_u, device=device, dtype=dtype) if norm else None
            self.levels.append(level)

    @classmethod
    def like(cls: type[_Layer], conv: nn.Module, *, levels: int | None = None, **options: Any) -> _Layer:
        """A fresh cycle that fits where `conv`, a convolution of stride 1 that keeps the grid, stood.

        Same channels, kernel size, padding mode, device and dtype; a bias of `conv` becomes biases of S and A.

        Raises:
            ValueError: for strides, dilation, groups, even kernels, or a padding that changes the grid.
        """
        arguments = conv_arguments(conv)  # type: ignore[arg-type]
        if len(arguments["kernel_size"]) != cls.ndim or isinstance(conv, nn.modules.conv._ConvTransposeNd):
            raise ValueError(f"conv must be an nn.Conv{cls.ndim}d, got {type(conv).__name__}")
        for name in ("stride", "dilation"):
            if set(arguments[name]) != {1}:
                raise ValueError(f"conv must have {name} 1, got {arguments[name]}")
        if arguments["groups"] != 1:
            raise ValueError(f"conv must have groups=1, got {arguments['groups']}")
        half = tuple(size // 2 for size in arguments["kernel_size"])
        if arguments["padding"] not in ("same", half):
            raise ValueError(f"conv must keep the grid, with padding {half}, got {arguments['padding']}")
        for name in ("stride", "dilation", "groups", "padding"):
            del arguments[name]
        return cls(**{**arguments, "levels": levels, **options})

    @classmethod
    def from_trained(cls: type[_Layer], conv: nn.Module, *, levels: int | None = None, **options: Any) -> _Layer:
        """As `like`, starting as exactly the trained `conv`: its filters are S_1, and all that is added to u is 0.

        The coarser levels take part from the first gradient step on, through P.
        """
        layer = cls.like(conv, levels=levels, **options)
        finest = cast(_Level, layer.levels[0])
        if finest.norm is not None:
            raise ValueError("from_trained needs norm=None: a normalised cycle cannot equal a convolution")
        with torch.no_grad():
            first, *others = cast("list[_Kernel]", list(finest.smoothers))
            first.weight.copy_(cast(Tensor, conv.weight))
            if first.bias is not None:
                first.bias.copy_(cast(Tensor, conv.bias))
            for kernel in [*others, finest.prolongation]:
                for parameter in kernel.parameters() if kernel is not None else ():
                    parameter.zero_()
        return layer

    @classmethod
    def from_stencil(
        cls: type[_Layer],
        stencil: Tensor,
        spacing: float,
        levels: int,
        *,
        smoother: Literal["jacobi", "spai"] = "jacobi",
        damping: float = 0.8,
        pre: int = 1,
        post: int = 1,
        coarse: int = 1,
        coarse_damping: float = 1.0,
        padding_mode: Literal["zeros", "circular", "reflect"] = "zeros",
        cycle: Literal["v", "w"] = "v",
        device: torch.device | str | None = None,
    ) -> _Layer:
        """A classical multigrid cycle for `stencil / spacing**2`, one channel; see `plant` for the arguments.

        With zero padding the unknowns are the interior nodes of a Dirichlet problem: `2**k - 1` points an axis make the
        grids nest; with circular padding `2**k` points, with reflect padding `2**k + 1`, both ends included.

        Raises:
            ValueError: where the stencil does not have 3 entries an axis, or a zero centre.
        """
        from lathe.operators.multigrid_operator.solving import plant

        layer = cls(
            1,
            1,
            steps=[(pre, post)] * (levels - 1) + [(coarse, 0)],
            transfer="zero",
            padding_mode=padding_mode,
            transfer_padding=0 if padding_mode == "zeros" else 1,
            cycle=cycle,
            device=device,
            dtype=stencil.dtype,
        )
        plant(layer, stencil, spacing, smoother=smoother, damping=damping, coarse_damping=coarse_damping)
        return layer

    def forward(self, f: Inexact[Tensor, "batch in_channels *grid"]) -> Inexact[Tensor, "batch out_channels *grid"]:
        self._check_input(f)
        return self._visit(0, channels_last(f), None)

    def as_matrix(self, *grid: int) -> Inexact[Tensor, "outputs inputs"]:
        """The linear part of the operator on a grid as a matrix: `(out_channels * points, in_channels * points)`.

        Column by column from unit vectors, so for small grids. A number alone stands for a grid of equal sides.
        """
        self._check_linear("as_matrix")
        grid = grid * self.ndim if len(grid) == 1 else grid
        weight = self._first_weight
        count = self.in_channels * math.prod(grid)
        units = torch.eye(count, dtype=weight.dtype, device=weight.device).reshape(count, self.in_channels, *grid)
        return (self(units) - self(torch.zeros_like(units[:1]))).reshape(count, -1).T

    def transpose_apply(
        self, u: Inexact[Tensor, "batch out_channels *grid"]
    ) -> Inexact[Tensor, "batch in_channels *grid"]:
        """W^T u, without conjugation: the transposed cycle, by reverse differentiation; differentiable itself."""
        self._check_linear("transpose_apply")
        keep_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            f = u.new_zeros(u.shape[0], self.in_channels, *u.shape[2:]).requires_grad_()
            (transposed,) = torch.autograd.grad(self(f), f, u.conj(), create_graph=keep_graph)
        return transposed.conj()

    # ------------------------------------------------------------------------------------------------- the cycle

    def _visit(self, l: int, f: Tensor, u: Tensor | None) -> Tensor:
        """The cycle from level l down and back: u near W_l f, from the guess u (None is zero)."""
        level = cast(_Level, self.levels[l])
        before, after = self.steps[l]
        use = 0  # how many of the level's operators are behind us
        for i in range(before):
            u = self._step(cast(_Kernel, level.smoothers[i]), None if u is None else self._operator(level, use), f, u)
            use += i > 0 or not self._from_zero(l)
        if l < len(self.steps) - 1:
            assert u is not None  # the constructor makes sure of a first step
            # A W-cycle visits the level below twice, but the coarsest once: there a visit only repeats the smoother.
            for _ in range(2 if self.cycle == "w" and l < len(self.steps) - 2 else 1):
                coarse_f, coarse_u = self._maybe_recomputed(self._coarsen, level, use, f, u)
                u = self._prolong(level, self._visit(l + 1, coarse_f, coarse_u), u)
                if level.norm is not None:
                    u = level.norm(u)
            use += self.residual
        for i in range(before, before + after):
            u = self._step(cast(_Kernel, level.smoothers[i]), self._operator(level, use), f, u)
            use += 1
        assert u is not None
        return u

    def _operator(self, level: _Level, use: int) -> _Kernel:
        return cast(_Kernel, level.operators[0 if self.share_operator else use])

    def _step(self, smoother: _Kernel, operator: _Kernel | None, f: Tensor, u: Tensor | None) -> Tensor:
        if u is None or operator is None:
            return self._conv(self._pad(f, self.kernel_size), smoother, self.kernel_size)
        return self._maybe_recomputed(self._smooth, smoother, operator, f, u)

    def _smooth(self, smoother: _Kernel, operator: _Kernel, f: Tensor, u: Tensor) -> Tensor:
        """u + S (f - A u); both sums go into the convolutions' fresh outputs."""
        defect = self._conv(self._pad(u, self.kernel_size), operator, self.kernel_size, sign=-1).add_(f)
        return self._conv(self._pad(defect, self.kernel_size), smoother, self.kernel_size).add_(u)

    def _coarsen(self, level: _Level, use: int, f: Tensor, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """(R (f - A u) or R f, Pi u or None) on the next coarser grid; u is padded once for A and Pi."""
        three = (3,) * self.ndim
        padded = self._pad(u, self.kernel_size) if self.residual else u
        if self.residual:
            f = self._conv(padded, self._operator(level, use), self.kernel_size, sign=-1).add_(f)
        coarse_f = self._transfer(f if not self.transfer_padding else self._pad(f, three), level.restriction)
        if level.injection is None:
            return coarse_f, None
        if not self.transfer_padding:
            padded = u
        elif not (self.residual and self.kernel_size == three):
            padded = self._pad(u, three)
        return coarse_f, self._transfer(padded, level.injection)

    def _transfer(self, padded: Tensor, kernel: nn.Module | None) -> Tensor:
        assert isinstance(kernel, _Kernel)
        padding = self.transfer_padding if self.padding_mode == "zeros" else 0
        return _CONV[self.ndim](padded, kernel.weight, stride=2, padding=padding)

    def _prolong(self, level: _Level, coarse: Tensor, u: Tensor) -> Tensor:
        """u + P coarse: coarse point j reaches points -1..2 around its own; what leaves the grid is cut, or wraps."""
        wraps = self.padding_mode == "circular"
        assert level.prolongation is not None
        fine = _CONV_TRANSPOSE[self.ndim](
            coarse, level.prolongation.weight, stride=2, padding=0 if wraps else self.transfer_padding
        )
        if wraps:
            fine = fold_periodic(fine, tuple((1, m - 1 - n) for m, n in zip(fine.shape[2:], u.shape[2:])))
        elif fine.shape != u.shape:
            for axis in range(2, fine.ndim):
                fine = fine.narrow(axis, 0, u.shape[axis])
            return u + fine
        return fine.add_(u)

    def _conv(self, padded: Tensor, kernel: _Kernel, size: tuple[int, ...], sign: int = 1) -> Tensor:
        """The convolution with sign * kernel; the sign goes to the few weights, not to the field."""
        weight: Tensor = kernel.weight
        bias: Tensor | None = kernel.bias
        if sign < 0:
            weight, bias = -weight, None if bias is None else -bias
        padding = tuple(n // 2 for n in size) if self.padding_mode == "zeros" else 0
        return _CONV[self.ndim](padded, weight, bias, padding=padding)

    def _pad(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        if self.padding_mode == "zeros":
            return x
        if self.padding_mode == "circular":
            return pad_periodic(x, tuple((n // 2, n // 2) for n in size))
        return F.pad(x, [n // 2 for n in reversed(size) for _ in range(2)], mode=self.padding_mode)

    def _maybe_recomputed(self, function: Any, *arguments: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)

    # ------------------------------------------------------------------------------------------------- checks

    def _from_zero(self, l: int) -> bool:
        return l == 0 or self.transfer == "zero"

    @property
    def _first_weight(self) -> Tensor:
        return cast(_Kernel, cast(_Level, self.levels[0]).smoothers[0]).weight

    def _check_linear(self, name: str) -> None:
        if self.levels[0].norm is not None:
            raise ValueError(f"{name} needs a linear cycle, and norm='layer' makes it nonlinear")

    def _check_input(self, f: Tensor) -> None:
        if f.ndim != self.ndim + 2:
            raise ValueError(f"f must be (batch, channels, {self.ndim} grid axes), got shape {tuple(f.shape)}")
        if f.shape[1] != self.in_channels:
            raise ValueError(f"f must have {self.in_channels} channels, got f of shape {tuple(f.shape)}")
        count = len(self.steps)
        smallest = min(f.shape[2:])
        possible = (smallest + 1 - self.transfer_padding).bit_length() - (1 - self.transfer_padding)
        if count > possible:
            raise ValueError(f"a grid of {tuple(f.shape[2:])} points allows at most {possible} levels, got {count}")
        radius = max(self.kernel_size) // 2
        coarsest = smallest
        for _ in range(count - 1):
            coarsest = (coarsest + 1) // 2 if self.transfer_padding else (coarsest - 1) // 2
        needed = {"reflect": radius + 1, "circular": radius}.get(self.padding_mode, 1)
        if coarsest < needed:
            raise ValueError(
                f"padding_mode={self.padding_mode!r} with kernel_size {self.kernel_size} needs at least "
                f"{needed} points on the coarsest level, got {coarsest} for a grid of {tuple(f.shape[2:])} points "
                f"and {count} levels"
            )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, steps={self.steps}, padding_mode={self.padding_mode!r}"


class MultigridConv1d(_MultigridConv):
    __doc__ = _MultigridConv.__doc__
    ndim = 1


class MultigridConv2d(_MultigridConv):
    __doc__ = _MultigridConv.__doc__
    ndim = 2


class MultigridConv3d(_MultigridConv):
    __doc__ = _MultigridConv.__doc__
    ndim = 3


def _check_options(
    in_channels: int,
    out_channels: int,
    steps: Sequence[tuple[int, int]],
    transfer: str,
    kernel: tuple[int, ...],
    padding_mode: str,
    transfer_padding: int,
    norm: str | None,
    cycle: str,
) -> None:
    if in_channels < 1 or out_channels < 1:
        raise ValueError(f"in_channels and out_channels must be positive, got {in_channels} and {out_channels}")
    if not steps or any(min(pair) < 0 for pair in steps):
        raise ValueError(f"steps must name a pair of non-negative counts a level, got {steps}")
    if steps[0][0] < 1:
        raise ValueError(
            f"steps must start with a smoothing step on the finest level, which has no guess yet, got {steps}"
        )
    if steps[-1][1]:
        raise ValueError(f"steps must have no steps after the coarsest level, got {steps}")
    if transfer == "zero" and min(before for before, _ in steps) < 1:
        raise ValueError(f"steps must start each level with a step where transfer='zero' leaves no guess, got {steps}")
    if any(size < 1 or size % 2 == 0 for size in kernel):
        raise ValueError(f"kernel_size must be odd, got {kernel}")
    for name, value, allowed in (
        ("transfer", transfer, ("pi", "zero")),
        ("padding_mode", padding_mode, ("zeros", "circular", "reflect", "replicate")),
        ("transfer_padding", transfer_padding, (0, 1)),
        ("norm", norm, (None, "layer")),
        ("cycle", cycle, ("v", "w")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    if padding_mode == "circular" and not transfer_padding:
        raise ValueError("transfer_padding=0 cuts a border off, but a periodic grid (padding_mode='circular') has none")


def channels_last(x: Tensor) -> Tensor:
    """On the CPU, `x` with its channels innermost: oneDNN convolves few channels up to twice as fast in that order."""
    if x.device.type != "cpu" or x.ndim - 2 not in _CHANNELS_LAST:
        return x
    if x.shape[1] == 1:
        # One channel lies in both orders; only its strides tell the convolution which one is meant.
        return x.contiguous().view(x.shape[0], *x.shape[2:], 1).movedim(-1, 1)
    return x.contiguous(memory_format=_CHANNELS_LAST[x.ndim - 2])
