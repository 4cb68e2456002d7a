"""The six EvoNorm layers as two fused operations that keep nothing but their input for the backward pass.

Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020, arXiv 2004.02967, Table 2; the closed-form
gradients are ours. The layers are memory bound: temporaries are written in place, the backward pass works on tiles of
the batch so that it touches little memory beyond its result, statistics come from row sums (`torch.var` is an order of
magnitude slower on CPU), and all that is smaller than x is combined afterwards. Computation runs in float32 where x is
half or bfloat16.

Shapes: x is B C L (batch, channels, positions); a "row" is one channel of one sample; G counts groups of channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

__all__ = ["BatchForm", "batch_evonorm", "sample_evonorm"]

BatchForm = Literal["B0", "B1", "B2"]


def sample_evonorm(
    x: Float[Tensor, "batch channels length"],
    weight: Float[Tensor, " channels"],
    bias: Float[Tensor, " channels"],
    v: Float[Tensor, " channels"] | None,
    *,
    groups: int,
    eps: float,
    centred: bool,
    gated: bool,
) -> Float[Tensor, "batch channels length"]:
    """S0, S1, S2: `weight * x * sigmoid(v x) / s + bias`, differentiable once.

    Args:
        v: the gate's slope; None is a slope of one.
        centred: s is the group's standard deviation (S0, S1), or its root mean square (S2).
        gated: with the sigmoid; without it this is the division alone.
    """
    return _SampleEvoNorm.apply(x, weight, bias, v, groups, eps, centred, gated)


def batch_evonorm(
    x: Float[Tensor, "batch channels length"],
    weight: Float[Tensor, " channels"],
    bias: Float[Tensor, " channels"],
    v: Float[Tensor, " channels"] | None,
    running_var: Float[Tensor, " channels"] | None,
    *,
    form: BatchForm,
    eps: float,
    sync: bool,
) -> tuple[Float[Tensor, "batch channels length"], Float[Tensor, " channels"], Float[Tensor, ""]]:
    """B0, B1, B2: `weight * x / max(s_b, slope x + offset) + bias`, differentiable once.

    Slope and offset are (v, s_i) for B0, (r_i, r_i) for B1 and (-1, r_i) for B2.

    Args:
        running_var: s_b comes from it, as a constant; None takes the batch's own variance, and gradient flows through.
        sync: the batch is that of all replicas of the default process group.

    Returns:
        The output, the (biased) variance of the batch and the number of values that it was taken over a channel.
    """
    return _BatchEvoNorm.apply(x, weight, bias, v, running_var, form, eps, sync)


# Elements of a backward tile for each thread: calls cost little beside the work, and what a tile needs stays in cache.
_TILE = 2**17


def _tiles(x: Tensor) -> list[slice]:
    """Parts of the batch to be worked off one after the other; the whole of it off the CPU and under compilation."""
    if not x.is_cpu or torch.compiler.is_compiling() or x.numel() == 0:
        return [slice(0, x.shape[0])]
    samples = max(1, _TILE * torch.get_num_threads() // x[0].numel())
    return [slice(start, start + samples) for start in range(0, x.shape[0], samples)]


def _wide(x: Tensor) -> Tensor:
    """x in the type that it is computed in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _column(per_channel: Tensor, like: Tensor) -> Tensor:
    """A channel vector as C 1, in the type of `like`."""
    return per_channel.to(like.dtype).unsqueeze(-1)


def _reuse(y: Tensor) -> Tensor | None:
    """y as the place for a result; nowhere under compilation and export, which plan memory themselves."""
    return None if torch.compiler.is_compiling() else y


def _row_means(x: Tensor) -> Tensor:
    return x.mean(2, keepdim=True)


def _group_means(rows: Tensor, groups: int) -> Tensor:
    """Means over the channels of each group, B C 1 -> B G 1."""
    return rows.unflatten(1, (groups, -1)).mean(2)


def _over_channels(by_group: Tensor, channels: int) -> Tensor:
    """Each group's value for each of its channels, B G 1 -> B C 1."""
    batch, groups, _ = by_group.shape
    return by_group.unsqueeze(2).expand(batch, groups, channels // groups, 1).flatten(1, 2)


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Refuses to build a graph of the backward pass.

    `torch.autograd.function.once_differentiable` raises only if its node is walked, which `torch.autograd.grad` for
    chosen inputs does not do: it would return a second derivative that lacks a part.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "an EvoNorm layer is differentiable once, but create_graph=True asks for more; use its graph, such as"
                ' EVONORM_GRAPHS["S0"].to_module(num_features)'
            )
        return backward(ctx, *grads)

    return checked


class _SampleEvoNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        weight: Tensor,
        bias: Tensor,
        v: Tensor | None,
        groups: int,
        eps: float,
        centred: bool,
        gated: bool,
    ) -> Tensor:
        x, channels = _wide(given), given.shape[1]
        # The output's memory serves as scratch for the statistics: two passes, so that a large mean cancels nothing.
        mean = _group_means(_row_means(x), groups) if centred else None
        y = x - _over_channels(mean, channels) if mean is not None else x.clone()
        s = (_group_means(_row_means(y.mul_(y)), groups) + eps).sqrt()
        if not gated:
            y.copy_(x)
        elif v is None:
            y = torch.sigmoid(x, out=_reuse(y)).mul_(x)
        else:
            y = torch.mul(x, _column(v, x), out=_reuse(y)).sigmoid_().mul_(x)
        y.mul_(_column(weight, x) / _over_channels(s, channels)).add_(_column(bias, x))
        ctx.save_for_backward(given, weight, v, mean, s)
        ctx.gated = gated
        return y.to(given.dtype)

    @staticmethod
    @_once
    def backward(ctx: Any, given_grad: Tensor) -> tuple[Tensor | None, ...]:
        given, weight, v, mean, s = ctx.saved_tensors
        _, channels, length = given.shape
        gamma, slope = _column(weight, s), _column(v, s) if v is not None else None
        group_size = channels // s.shape[1] * length
        dx = torch.empty_like(given)
        # Row sums, one piece a tile: of grad, of grad u, and of grad du/dv, where u = x sigmoid(v x).
        grad_rows, u_rows, v_rows = [], [], []
        for tile in _tiles(given):
            x, grad, s_rows = _wide(given[tile]), _wide(given_grad[tile]), _over_channels(s[tile], channels)
            grad_rows.append(grad.sum(2, keepdim=True))
            gate = torch.sigmoid(x if slope is None else x * slope) if ctx.gated else torch.ones_like(x)
            through_u = grad * gate
            scratch = through_u * x
            u_rows.append(scratch.sum(2, keepdim=True))
            if ctx.gated:
                scratch.sub_(gate.mul_(scratch))
                if slope is not None:
                    v_rows.append(torch.mul(scratch, x, out=_reuse(gate)).sum(2, keepdim=True))
                    scratch.mul_(slope)
                through_u.add_(scratch)
            # ds/dx = (x - mean) / (group_size s), without the mean where s is a root mean square.
            u_groups = (u_rows[-1] * gamma).unflatten(1, (s.shape[1], -1)).sum(2)
            through_s = u_groups / (s[tile] ** 3 * group_size)
            through_u.mul_(gamma / s_rows).sub_(torch.mul(x, _over_channels(through_s, channels), out=_reuse(scratch)))
            if mean is not None:
                through_u.add_(_over_channels(through_s * mean[tile], channels))
            dx[tile] = through_u
        s_rows = _over_channels(s, channels)
        dweight = (torch.cat(u_rows) / s_rows).sum((0, 2)).to(weight.dtype)
        dbias = torch.cat(grad_rows).sum((0, 2)).to(weight.dtype)
        dv = (torch.cat(v_rows) * gamma / s_rows).sum((0, 2)).to(weight.dtype) if v_rows else None
        return dx, dweight, dbias, dv, None, None, None, None


def _over_replicas(mean: Tensor, variance: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of the batches of all replicas together (law of total variance)."""
    mine = torch.cat([mean.flatten(), variance.flatten(), count.flatten()])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    stacked = torch.stack(everyone)
    means, variances = stacked[:, :-1].unflatten(1, (2, -1)).unbind(1)
    counts = stacked[:, -1:]
    total = counts.sum()
    joint = (counts * means).sum(0) / total
    spread = (counts * (variances + (means - joint) ** 2)).sum(0) / total
    return joint.view_as(mean), spread.view_as(variance), total


def _line(form: str, v: Tensor | None, instance: Tensor) -> tuple[Tensor | float, Tensor]:
    """Slope and offset of the line that competes with s_b."""
    if form == "B0":
        assert v is not None
        return _column(v, instance), instance
    return (instance, instance) if form == "B1" else (-1.0, instance)


class _BatchEvoNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        weight: Tensor,
        bias: Tensor,
        v: Tensor | None,
        running_var: Tensor | None,
        form: str,
        eps: float,
        sync: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = _wide(given)
        batch, _, length = x.shape
        # The output's memory serves as scratch for the statistics: two passes, so that a large mean cancels nothing.
        mean = _row_means(x)
        y = x - mean
        variance = _row_means(y.mul_(y))
        instance = (variance + eps if form == "B0" else variance + mean.square() + eps).sqrt()
        count = torch.full((), batch * length, dtype=x.dtype, device=x.device)
        if running_var is None:
            # Law of total variance: the batch's moments from the rows', without another look at x.
            batch_mean = mean.mean(0)
            batch_var = variance.mean(0) + (mean - batch_mean).square().mean(0)
            if sync:
                batch_mean, batch_var, count = _over_replicas(batch_mean, batch_var, count)
        else:
            # Adding zero makes a tensor of its own: a Function must not return what it was given.
            batch_mean, batch_var = None, _column(running_var, x) + 0.0
        floor = (batch_var + eps).sqrt()
        slope, offset = _line(form, v, instance)
        y.copy_(x).mul_(slope).add_(offset)
        y = torch.div(x, torch.maximum(y, floor, out=_reuse(y)), out=_reuse(y))
        y.mul_(_column(weight, x)).add_(_column(bias, x))
        ctx.save_for_backward(given, weight, v, mean if form == "B0" else None, instance, batch_mean, floor, count)
        ctx.form, ctx.sync = form, sync
        batch_var = batch_var.squeeze(-1)
        ctx.mark_non_differentiable(batch_var, count)
        return y.to(given.dtype), batch_var, count

    @staticmethod
    @_once
    def backward(ctx: Any, given_grad: Tensor, _var: Tensor, _count: Tensor) -> tuple[Tensor | None, ...]:
        given, weight, v, mean, instance, batch_mean, floor, count = ctx.saved_tensors
        gamma, (slope, offset) = _column(weight, instance), _line(ctx.form, v, instance)
        dx, tiles = torch.empty_like(given), _tiles(given)
        # Row sums, one piece a tile: of grad, of grad x / m (m is the denominator), of h = grad x / m^2, of h where the
        # line is the denominator, and of h x there.
        pieces: list[tuple[Tensor, ...]] = []
        for tile in tiles:
            x, grad = _wide(given[tile]), _wide(given_grad[tile])
            tile_slope = offset[tile] if ctx.form == "B1" else slope
            # By how much the line lies above the floor; zero where s_b wins the max.
            excess = (x * tile_slope).add_(offset[tile] - floor).relu_()
            m = excess + floor
            through_x = grad / m
            h = through_x * x
            quotient_rows = h.sum(2, keepdim=True)
            h.div_(m)
            line = excess.sign_().mul_(h)
            line_rows, line_x_rows = line.sum(2, keepdim=True), torch.mul(line, x, out=_reuse(m)).sum(2, keepdim=True)
            pieces.append((grad.sum(2, keepdim=True), quotient_rows, h.sum(2, keepdim=True), line_rows, line_x_rows))
            dx[tile] = through_x.sub_(line.mul_(tile_slope)).mul_(gamma)
        grad_rows, quotient_rows, h_rows, line_rows, line_x_rows = (torch.cat(rows) for rows in zip(*pieces))
        doffset, dslope = -gamma * line_rows, -gamma * line_x_rows
        dinstance = doffset + dslope if ctx.form == "B1" else doffset
        # What is left of dx is linear in x along each row: ds/dx = (x - mean) / (count s), dr/dx the same without mean.
        by_x = dinstance / (given.shape[2] * instance)
        constant = -by_x * mean if mean is not None else torch.zeros_like(by_x)
        if batch_mean is not None:
            dfloor = (gamma * (line_rows - h_rows)).sum(0)
            if ctx.sync:
                dist.all_reduce(dfloor)
            by_batch = dfloor / (count * floor)
            by_x, constant = by_x + by_batch, constant - by_batch * batch_mean
        for tile in tiles:
            dx[tile] += (given[tile] * by_x[tile]).add_(constant[tile])
        dweight, dbias = quotient_rows.sum((0, 2)).to(weight.dtype), grad_rows.sum((0, 2)).to(weight.dtype)
        dv = dslope.sum((0, 2)).to(weight.dtype) if v is not None else None
        return dx, dweight, dbias, dv, None, None, None, None
