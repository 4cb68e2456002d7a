"""Exact attention of any order, tile by tile: neither forward nor backward ever holds the n**order logits.

Legend: B problems, n queries, m inner keys, J the combinations of one row from each outer key matrix, d features,
v features of the values. Order 3 has one outer matrix (J = m1), order 2 none (J = 1, a row of ones); for more, the
outer matrices are multiplied out row by row (Khatri-Rao), which is why every order runs through the same code:

    logit[i, J, k] = q[i] . (K[J] * k[k])      out[i] = sum_Jk softmax(logit[i])[J, k] (V[J] * v[k])

A tile of logits is one matrix product of the rows q[i] * K[J] with the inner keys; the softmax is joint over (J, k) and
accumulated over tiles, with a running maximum where logits may be large. The backward pass makes each tile again from
the logarithm of the normaliser, which is all that the forward pass keeps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lathe.core.precision import without_autocast
from lathe.core.size import flop_formula

__all__ = ["attend"]

# Logits in a tile. On CPUs a tile should stay in the caches; on GPUs it should fill the device.
_TILE = {"cpu": 2**20}
_TILE_ELSEWHERE = 2**24
# Up to here exp needs no maximum taken off: float32 holds e^60 and e^-60 with room for sums.
_SAFE_LOGIT = 60.0

_ARGUMENTS = (
    "Tensor q, Tensor K, Tensor V, Tensor k, Tensor v, int[] sizes, Tensor[] biases, bool[] biased, Tensor? mask, "
    "bool causal, float dropout, Tensor? seed"
)


def attend(
    q: Tensor,
    K: Tensor,
    V: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sizes: Sequence[int],
    biases: Sequence[Tensor | None],
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, n, v) and the logarithms of the normalisers (B, n); rows without any key give 0 and -inf.

    Args:
        q, K, V, k, v: (B, n, d), (B, J, d), (B, J, v), (B, m, d), (B, m, v), of one dtype; q is scaled already.
        sizes: rows of the outer key matrices, whose product is J (the last one runs fastest), and then m.
        biases: for each outer axis and then the inner one, what is added along it: (B or 1, n or 1, rows).
        mask: added to the logits if floating, else false leaves out: (B or 1, n or 1, rows or 1 of every axis).
        causal: query i sees rows up to i on every axis.
        dropout: part of the weights that are set to 0; the others are scaled up.
    """
    # The seed is a tensor so that a compiled graph draws a new one at every call.
    seed = torch.randint(2**62, (1,)) if dropout > 0.0 else None
    biased, given = [bias is not None for bias in biases], [bias for bias in biases if bias is not None]
    return torch.ops.lathe.tensor_attention(q, K, V, k, v, sizes, given, biased, mask, causal, dropout, seed)


# --- tiles ------------------------------------------------------------------------------------------------------------


@dataclass
class _Tile:
    """Queries `rows` of problems `batch` against the combinations `J` and the first `reach` inner keys."""

    batch: slice
    rows: slice
    J: slice | Tensor
    width: int
    """How many combinations."""
    reach: int
    first: bool
    """Whether it is the first tile of its queries."""
    last: bool
    number: int


@dataclass
class _Problem:
    """What all tiles of one call share."""

    q: Tensor
    K: Tensor
    k: Tensor
    sizes: Sequence[int]
    given: Sequence[Tensor]
    biased: Sequence[bool]
    mask: Tensor | None
    causal: bool
    dropout: float
    seed: Tensor | None

    def __post_init__(self) -> None:
        given = iter(self.given)
        self.biases = [next(given) if biased else None for biased in self.biased]
        self.first_seed = 0 if self.seed is None else int(self.seed)
        self.keys = self.k.mT.contiguous()
        J, m = self.K.shape[1], self.k.shape[1]
        # Of each outer axis, the row that a combination has from it.
        self.positions: list[Tensor] = []
        combination = torch.arange(J, device=self.q.device)
        for size in reversed(self.sizes[:-1]):
            self.positions.insert(0, combination % size)
            combination = combination // size
        B, n = self.q.shape[:2]
        size = _TILE.get(self.q.device.type, _TILE_ELSEWHERE)
        self.wide = max(1, min(J, size // max(1, m)))
        self.tall = max(1, min(n, size // max(1, J * m)))
        if self.causal:  # few enough queries that their keys are hardly more than each may see; enough for even rows
            self.tall = max(min(self.tall, n // 8), min(n, 16))
            self.wide = max(1, min(J, size // max(1, self.tall * m)))
        self.deep = max(1, min(B, size // max(1, self.tall * self.wide * m)))
        self.capacity = self.deep * self.tall * self.wide * m

    def bounded(self) -> bool:
        """Whether no logit can be so large that exp needs the maximum taken off, going by the largest entries."""
        # On other devices the answer would have to be waited for.
        if self.q.device.type != "cpu" or not (self.mask is None or self.mask.dtype == torch.bool):
            return False
        if not all(each.numel() for each in (self.q, self.K, self.k)):
            return False
        largest = torch.stack([each.abs().flatten(0, 1).amax(0) for each in (self.q, self.K, self.k)])
        reach = largest.prod(0).sum()
        for bias in self.given:
            reach = reach + bias.masked_fill(bias == -math.inf, 0.0).abs().amax()
        return bool(reach <= _SAFE_LOGIT)

    def buffer(self) -> Tensor:
        return self.q.new_empty(self.capacity)

    def tiles(self) -> Iterator[_Tile]:
        B, n = self.q.shape[:2]
        if self.K.shape[1] * self.k.shape[1] == 0:
            return
        number = 0
        for i in range(0, n, self.tall):
            end = min(n, i + self.tall)
            pieces, reach = self.combinations(end), end if self.causal else self.k.shape[1]
            for b in range(0, B, self.deep):
                for at, (J, width) in enumerate(pieces):
                    batch, rows = slice(b, min(B, b + self.deep)), slice(i, end)
                    yield _Tile(batch, rows, J, width, reach, at == 0, at == len(pieces) - 1, number)
                    number += 1

    def combinations(self, end: int) -> list[tuple[slice | Tensor, int]]:
        """Those that queries before `end` may see, in pieces that fit a tile."""
        count = self.K.shape[1]
        if self.causal and len(self.positions) > 1:
            latest = torch.stack(self.positions).amax(0)
            return [(J, len(J)) for J in (latest < end).nonzero().squeeze(1).split(self.wide)]
        if self.causal and self.positions:
            count = end
        return [
            (slice(j, min(count, j + self.wide)), min(count, j + self.wide) - j) for j in range(0, count, self.wide)
        ]

    def rows(self, tile: _Tile) -> tuple[Tensor, Tensor]:
        """Of a tile, K[J] as (b, J, d), and q[i] * K[J] as (b, i * J, d)."""
        K = self.K[tile.batch, tile.J]
        return K, (self.q[tile.batch, tile.rows].unsqueeze(2) * K.unsqueeze(1)).flatten(1, 2)

    def logits(self, tile: _Tile, rows: Tensor, buffer: Tensor) -> Tensor:
        """Into the buffer: (b, i, J, k), with all that is masked at -inf."""
        b, height = rows.shape[:2]
        flat = buffer[: b * height * tile.reach].view(b, height, tile.reach)
        torch.bmm(rows, self.keys[tile.batch, :, : tile.reach], out=flat)
        logits = flat.view(b, -1, tile.width, tile.reach)
        for positions, bias in zip(self.positions, self.biases):
            if bias is not None:
                logits.add_(_part(bias, tile).index_select(2, positions[tile.J]).unsqueeze(3))
        inner = self.biases[-1]
        if inner is not None:
            logits.add_(_part(inner, tile)[:, :, None, : tile.reach])
        if self.mask is not None:
            at = [positions[tile.J] for positions in self.positions]
            index: Any = [positions if size > 1 else positions * 0 for positions, size in zip(at, self.mask.shape[2:])]
            mask = _part(self.mask, tile)
            mask = (mask[:, :, *index] if index else mask.unsqueeze(2))[..., : tile.reach]
            if mask.dtype == torch.bool:
                logits.masked_fill_(~mask, -math.inf)
            else:
                logits.add_(mask)
        if self.causal and tile.rows.stop - tile.rows.start > 1:
            i = torch.arange(tile.rows.start, tile.rows.stop, device=rows.device)
            logits[..., tile.rows.start :].masked_fill_((i > i.unsqueeze(1)).unsqueeze(1), -math.inf)
            if self.positions and (isinstance(tile.J, Tensor) or tile.J.stop > tile.rows.start):
                for positions in self.positions:
                    logits.masked_fill_((positions[tile.J] > i.unsqueeze(1)).unsqueeze(2), -math.inf)
        return logits

    def kept(self, tile: _Tile, like: Tensor) -> Tensor:
        """Which weights dropout keeps, scaled; the same for a tile whenever it is made."""
        generator = torch.Generator(like.device).manual_seed(self.first_seed + tile.number)
        kept = torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype) >= self.dropout
        return kept.to(like.dtype).mul_(1.0 / (1.0 - self.dropout) if self.dropout < 1.0 else 0.0)


def _part(tensor: Tensor, tile: _Tile) -> Tensor:
    """A tile's problems and queries of something that may have only one of either."""
    tensor = tensor[tile.batch] if len(tensor) > 1 else tensor
    return tensor[:, tile.rows] if tensor.shape[1] > 1 else tensor


# --- forward ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "lathe::tensor_attention", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor out, Tensor lse)"
)
def _forward(q, K, V, k, v, sizes, biases, biased, mask, causal, dropout, seed):
    with without_autocast(q.device):
        return _attend(_Problem(q, K, k, sizes, biases, biased, mask, causal, dropout, seed), V, v)


@_forward.register_fake
def _(q, K, V, k, v, *_):
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2])


def _attend(problem: _Problem, V: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q, dropout = problem.q, problem.dropout
    # A column of ones turns the sums of the weights into one more value.
    inner, outer_values = (torch.cat([value, torch.ones_like(value[..., :1])], -1) for value in (v, V))
    out, lse = q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_full(q.shape[:2], -math.inf)
    buffer, bounded = problem.buffer(), problem.bounded()
    for tile in problem.tiles():
        weights = problem.logits(tile, problem.rows(tile)[1], buffer)
        flat = weights.flatten(2)
        if tile.first:
            top = flat.new_full(flat.shape[:2], 0.0 if bounded else -math.inf)
            sums = flat.new_zeros(*flat.shape[:2], inner.shape[-1])
        if not bounded:
            new = torch.maximum(top, flat.amax(2))
            finite = new.masked_fill(new == -math.inf, 0.0)  # nothing to see yet: keep -inf - -inf out
            flat.sub_(finite.unsqueeze(2))
            sums.mul_((top - finite).exp().unsqueeze(2))
            top = new
        flat.exp_()
        total = flat.sum(2) if dropout > 0.0 else None
        if total is not None:
            flat.mul_(problem.kept(tile, flat))
        values = torch.bmm(weights.flatten(1, 2), inner[tile.batch, : tile.reach]).view(*weights.shape[:3], -1)
        part = values.mul_(outer_values[tile.batch, tile.J].unsqueeze(1)).sum(2)
        if total is not None:
            part[..., -1] = total
        sums.add_(part)
        if tile.last:
            normaliser = sums[..., -1]
            nothing = normaliser == 0.0
            out[tile.batch, tile.rows] = sums[..., :-1] / normaliser.masked_fill(nothing, 1.0).unsqueeze(2)
            lse[tile.batch, tile.rows] = top + normaliser.log()
    return out, lse


# --- backward ---------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "lathe::tensor_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor shift, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad, shift, lse, q, K, V, k, v, sizes, biases, biased, mask, causal, dropout, seed):
    with without_autocast(q.device):
        return _differentiate(
            _Problem(q, K, k, sizes, biases, biased, mask, causal, dropout, seed), V, v, grad, shift, lse
        )


@_backward.register_fake
def _(grad, shift, lse, q, K, V, k, v, *_):
    return tuple(torch.empty_like(each, memory_format=torch.contiguous_format) for each in (q, K, V, k, v))


def _differentiate(
    problem: _Problem, V: Tensor, v: Tensor, grad: Tensor, shift: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, K, V, k, v; `shift` is what the softmax takes off the gradient of every logit of a query."""
    q, K, k, dropout = problem.q, problem.K, problem.k, problem.dropout
    dq, dK, dV, dk, dv = found = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, K, V, k, v)]
    lse = lse.masked_fill(lse == -math.inf, math.inf)  # queries without any key: all weights are 0
    values, buffers = v.mT.contiguous(), (problem.buffer(), problem.buffer())
    for tile in problem.tiles():
        at = tile.batch, slice(tile.reach)
        chosen, rows = problem.rows(tile)
        weights = problem.logits(tile, rows, buffers[0])
        weights.flatten(2).sub_(lse[tile.batch, tile.rows].unsqueeze(2)).exp_()
        up = grad[tile.batch, tile.rows].unsqueeze(2)
        products = (up * V[tile.batch, tile.J].unsqueeze(1)).flatten(1, 2)
        flat = weights.flatten(1, 2)
        by_weight = buffers[1][: flat.numel()].view_as(flat)
        torch.bmm(products, values[tile.batch, :, : tile.reach], out=by_weight)
        dropped = flat
        if dropout > 0.0:
            kept = problem.kept(tile, weights.flatten(2)).view_as(flat)
            by_weight.mul_(kept)
            dropped = flat * kept
        dv[at].baddbmm_(dropped.mT, products)
        averages = torch.bmm(dropped, v[at]).view(*weights.shape[:3], -1)
        dV[tile.batch, tile.J] += averages.mul_(up).sum(1)
        by_logit = by_weight
        by_logit.view(*weights.shape[:2], -1).sub_(shift[tile.batch, tile.rows].unsqueeze(2))
        by_logit.mul_(flat)
        dk[at].baddbmm_(by_logit.mT, rows)
        by_row = torch.bmm(by_logit, k[at]).view(*weights.shape[:3], -1)
        dK[tile.batch, tile.J] += (by_row * q[tile.batch, tile.rows].unsqueeze(2)).sum(1)
        dq[tile.batch, tile.rows] += by_row.mul_(chosen.unsqueeze(1)).sum(2)
    return tuple(found)


def _keep(ctx, inputs, output):
    q, K, V, k, v, ctx.sizes, biases, ctx.biased, mask, ctx.causal, ctx.dropout, seed = inputs
    out, lse = output
    ctx.save_for_backward(q, K, V, k, v, out, lse, mask, seed, *biases)


def _gradients(ctx, grad, grad_lse):
    q, K, V, k, v, out, lse, mask, seed, *biases = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    shift = (grad * out).sum(-1)
    if grad_lse is not None:
        shift = shift - grad_lse
    found = torch.ops.lathe.tensor_attention_backward(
        grad, shift, lse, q, K, V, k, v, ctx.sizes, biases, ctx.biased, mask, ctx.causal, ctx.dropout, seed
    )
    return *found, None, [None] * len(biases), None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)


# --- what it costs ----------------------------------------------------------------------------------------------------


@flop_formula(torch.ops.lathe.tensor_attention)
def _(q, K, V, k, v, sizes, biases, biased, mask, causal, *_, **__) -> int:
    return _products(q, K, k, v, len(sizes), causal)


@flop_formula(torch.ops.lathe.tensor_attention_backward)
def _(grad, shift, lse, q, K, V, k, v, sizes, biases, biased, mask, causal, *_, **__) -> int:
    return 3 * _products(q, K, k, v, len(sizes), causal)


def _products(q, K, k, v, axes: int, causal: bool) -> int:
    """Operations of the matrix products: two a feature and logit, for the logits and for the values."""
    batch, n, d = q
    seen = sum(i**axes for i in range(1, n + 1)) if causal else n * K[1] * k[1]
    return 2 * batch * seen * (d + v[-1])
