"""Which outputs may come next: masks that make invalid sequences impossible in every decoding strategy.

A constraint is any `callable(state, prefix) -> mask`: for each row the choices that may follow its prefix. It sees rows
that have ended too; what it says about them is ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

__all__ = ["Constraint", "DecodingState", "Hull", "Permutation", "Triangles"]


@dataclass(frozen=True)
class DecodingState:
    """What a constraint may look at, a row for each sequence that is being written.

    Args:
        points: of the row's sample.
        sizes: how many of them there are; the rest is padding.
        visited: which choices the row's prefix holds.
        stop: the stop token, which is the last choice, or None where the network has none.
    """

    points: Float[Tensor, "rows n d"]
    sizes: Int64[Tensor, " rows"]
    visited: Bool[Tensor, "rows choices"]
    stop: int | None

    def unvisited(self) -> Bool[Tensor, "rows choices"]:
        """The points that are no padding and not in the prefix; never the stop token."""
        n = self.points.shape[1]
        allowed = ~self.visited & (
            torch.arange(self.visited.shape[1], device=self.visited.device) < self.sizes[:, None]
        )
        if self.stop is not None:
            allowed[:, n] = False
        return allowed


Constraint = Callable[[DecodingState, Tensor], Tensor]


@dataclass(frozen=True)
class Permutation:
    """Every point once; then the stop token, where there is one. Tours are these.

    Args:
        start: the point that comes first; None lets the network choose.
    """

    start: int | None = 0

    def __call__(self, state: DecodingState, prefix: Int64[Tensor, "rows step"]) -> Bool[Tensor, "rows choices"]:
        allowed, step = state.unvisited(), prefix.shape[1]
        if step == 0 and self.start is not None:
            n = state.points.shape[1]
            if not 0 <= self.start < n:
                raise ValueError(f"start must be in [0, {n}), got {self.start}")
            allowed &= torch.arange(allowed.shape[1], device=allowed.device) == self.start
        if state.stop is not None:
            allowed[:, state.stop] = step >= state.sizes
        return allowed


@dataclass(frozen=True)
class Hull:
    """No point twice, and at least three before the stop token.

    Args:
        convex: only outlines that stay convex and counter-clockwise whenever they are closed, so that no output crosses
            itself. A start from which no third corner lies to the left is not taken: decoding never gets stuck.
    """

    convex: bool = False

    def __call__(self, state: DecodingState, prefix: Int64[Tensor, "rows step"]) -> Bool[Tensor, "rows choices"]:
        stop, step, n = _needs_stop(state, "Hull"), prefix.shape[1], state.points.shape[1]
        allowed = state.unvisited()
        if self.convex and step > 0:
            xy = state.points.double()  # products of float32 differences are exact, or nearly so

            def corner(place: int) -> Tensor:
                return xy.gather(1, prefix[:, place].clamp(0, n - 1)[:, None, None].expand(-1, 1, 2))

            first = corner(0)
            if step == 1:
                away = xy - first
                left = _cross(away[:, :, None], away[:, None]) > 0
                convex = (left & allowed[:, None, :n]).any(2)
            elif step == 2:
                convex = _cross(corner(1) - first, xy - first) > 0
            else:
                before, last, second = corner(step - 2), corner(step - 1), corner(1)
                convex = (
                    (_cross(last - before, xy - last) > 0)
                    & (_cross(xy - last, first - xy) > 0)
                    & (_cross(first - xy, second - first) > 0)
                )
            allowed[:, :n] &= convex
        allowed[:, stop] = step >= 3
        return allowed


@dataclass(frozen=True)
class Triangles:
    """Triples of increasing indices, none of them twice, at most as many as a triangulation has; then the stop token.

    The triples need not fit together: whether they triangulate is for the network to learn.
    """

    def longest(self, n: int) -> int:
        """Most steps of n points, with the stop token: a triangulation has at most 2n - 5 triangles."""
        return 3 * max(0, 2 * n - 5) + 1

    def __call__(self, state: DecodingState, prefix: Int64[Tensor, "rows step"]) -> Bool[Tensor, "rows choices"]:
        stop, step, n = _needs_stop(state, "Triangles"), prefix.shape[1], state.points.shape[1]
        sizes, index = state.sizes[:, None], torch.arange(n, device=prefix.device)
        place = step % 3
        written = prefix[:, : step - place].clamp(0, n - 1).unflatten(1, (-1, 3))
        # How many written triples go on from what is written of this one, by their next index.
        same = (written[..., :place] == prefix[:, None, step - place :]).all(2)
        used = torch.zeros(len(prefix), n, dtype=torch.long, device=prefix.device)
        used.scatter_add_(1, written[..., place], same.long())
        # Of all triples that could: those with two, one or no further index behind it.
        behind = (sizes - 1 - index).clamp_min(0)
        room = (behind * (behind - 1) // 2, behind, (index < sizes).long().expand_as(used))[place]
        allowed = torch.zeros_like(state.visited)
        allowed[:, :n] = used < room
        if place:
            allowed[:, :n] &= index > prefix[:, -1:]
        else:
            allowed[:, :n] &= step < 3 * (2 * sizes - 5)
            allowed[:, stop] = step > 0
        return allowed


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _needs_stop(state: DecodingState, name: str) -> int:
    if state.stop is None:
        raise ValueError(f"{name} needs a network with stop_token=True, got one without")
    return state.stop
