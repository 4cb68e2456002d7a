"""Attention to pairs of keys against the dense formulation and against lucidrains' simplicial-attention.

Both peers hold all n^3 logits, and their gradients hold them several times; so do all public implementations that run
without a GPU. The polynomial method has no peer but the exact one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Pair, PeerMissing
from torch import Tensor

from lathe.nn.tensor_attention import tensor_attention

EINSUM = f"torch {torch.__version__} einsum over all pairs"


def dense(q: Tensor, ks: list[Tensor], vs: list[Tensor]) -> Tensor:
    """Logits of all pairs, one softmax over them, and the weighted products of values."""
    d = q.shape[1]
    logits = torch.einsum("il,jl,kl->ijk", q, *ks) / d
    weights = logits.flatten(1).softmax(1).view_as(logits)
    return torch.einsum("ijk,jl,kl->il", weights, *vs)


def pairs() -> list[Pair]:
    """The exact method against both peers, in inference and training; then the polynomial one against the exact one."""
    try:
        from importlib.metadata import version

        from simplicial_attention import naive_two_simplicial_attend, nth_order_attend
    except ImportError:
        raise PeerMissing("pip install --no-deps simplicial-attention==0.1.6") from None
    peer = f"simplicial-attention {version('simplicial-attention')}"
    torch.manual_seed(0)

    def simplicial(q: Tensor, ks: list[Tensor], vs: list[Tensor], **options: Any) -> Tensor:
        wide = [tuple(each[None, None] for each in some) for some in (ks, vs)]
        # It scales by 1 / sqrt(d).
        return naive_two_simplicial_attend(q[None, None] * q.shape[1] ** -0.5, *wide, **options)[0, 0]

    def nth_order(q: Tensor, ks: list[Tensor], vs: list[Tensor]) -> Tensor:
        wide = [tuple(each[None, None] for each in some) for some in (ks, vs)]
        return nth_order_attend(q[None, None] * q.shape[1] ** -0.5, *wide)[0, 0]

    return [
        inference("order 3", 256, 32, tensor_attention, dense, EINSUM, target=3.0),
        inference("order 3", 256, 32, tensor_attention, simplicial, peer, target=3.0),
        inference("order 3, causal", 256, 32, *both(simplicial, is_causal=True, causal=True), peer, target=3.0),
        inference("order 4", 56, 32, tensor_attention, nth_order, peer, axes=3, target=3.0),
        training("order 3", 256, 32, dense, EINSUM, target=1.5),
        training("order 3", 256, 32, simplicial, peer, target=1.5),
        bounded(512, 4, target=20.0),
        bounded(512, 4, target=3.0, is_causal=True),
    ]


def both(peer: Callable[..., Tensor], *, is_causal: bool, causal: bool) -> tuple[Callable[..., Tensor], ...]:
    return (
        lambda *inputs: tensor_attention(*inputs, is_causal=is_causal),
        lambda *inputs: peer(*inputs, causal=causal),
    )


def inputs(
    n: int, d: int, axes: int, size: float = 1.0, learnt: bool = False
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Queries, keys and values for so many axes of keys; keys and queries are scaled by `size`."""
    drawn = [torch.randn(n, d) for _ in range(2 * axes + 1)]
    if size != 1.0:
        drawn[: axes + 1] = [size * x / x.abs().max() for x in drawn[: axes + 1]]
    drawn = [each.requires_grad_(learnt) for each in drawn]
    return drawn[0], drawn[1 : axes + 1], drawn[axes + 1 :]


def inference(
    title: str,
    n: int,
    d: int,
    ours: Callable[..., Any],
    peer: Callable[..., Tensor],
    peer_name: str,
    *,
    axes: int = 2,
    target: float,
) -> Pair:
    """Forward alone."""
    q, ks, vs = inputs(n, d, axes)
    return Pair(f"{title}, n = {n}, d = {d}", lambda: ours(q, ks, vs), lambda: peer(q, ks, vs), peer_name, target)


def training(title: str, n: int, d: int, peer: Callable[..., Tensor], peer_name: str, *, target: float) -> Pair:
    """Forward and backward; what is kept between the two must be less than a twentieth of the peer's."""
    q, ks, vs = inputs(n, d, 2, learnt=True)

    def step(attend: Callable[..., Any]) -> Any:
        return torch.autograd.grad(attend(q, ks, vs).square().mean(), [q, *ks, *vs])

    return Pair(
        f"{title}, training step, n = {n}, d = {d}",
        lambda: step(tensor_attention),
        lambda: step(peer),
        peer_name,
        target,
        tolerance=1e-3,
        saved_memory=True,
        memory_target=0.05,
    )


def bounded(n: int, d: int, *, target: float, **options: Any) -> Pair:
    """The polynomial method, degree 4, against the exact one, where entries are at most 0.8."""
    q, ks, vs = inputs(n, d, 2, size=0.8)
    seen = ", causal" if options else ""
    return Pair(
        f"order 3{seen}, entries up to 0.8, degree 4, n = {n}, d = {d}",
        lambda: tensor_attention(q, ks, vs, method="poly", degree=4, bound=0.8, **options),
        lambda: tensor_attention(q, ks, vs, method="exact", **options),
        "the exact method",
        target,
        tolerance=1e-3,
    )
