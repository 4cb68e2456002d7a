"""Finding pairs and triples of tokens that add up to zero: what a third-order unit does and one of order 2 cannot.

Sanford, Hsu, Telgarsky, "Representational Strengths and Limitations of Transformers", 2023, arXiv 2306.02896: Match2
and Match3, and the lower bound for one layer of ordinary attention on the latter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lathe.nn.tensor_attention.attention import tensor_attention

__all__ = ["match2", "match3", "match3_head"]


def match2(x: Int[Tensor, "*batch n"], M: int) -> Bool[Tensor, "*batch n"]:
    """Whether token i has some j with x_i + x_j = 0 mod M (j may be i).

    Raises:
        ValueError: where M is below 1.
    """
    present = _present(x, M)
    return present.gather(-1, torch.remainder(-x, M))


def match3(x: Int[Tensor, "*batch n"], M: int) -> Bool[Tensor, "*batch n"]:
    """Whether token i has some j and k with x_i + x_j + x_k = 0 mod M (indices may coincide).

    Raises:
        ValueError: where M is below 1.
    """
    _present(x, M)
    pairs = (x.unsqueeze(-1) + x.unsqueeze(-2)).flatten(-2)
    return _present(pairs, M).gather(-1, torch.remainder(-x, M))


def _present(x: Tensor, M: int) -> Tensor:
    """(*batch, M): which residues occur."""
    if M < 1:
        raise ValueError(f"M must be at least 1, got {M}")
    found = torch.zeros(*x.shape[:-1], M, dtype=torch.bool, device=x.device)
    return found.scatter_(-1, torch.remainder(x, M), True)


def match3_head(M: int, n: int) -> Callable[[Int[Tensor, "*batch n"]], Float[Tensor, "*batch n"]]:
    """One third-order head of width 5 that solves Match3: its output is above 1/2 exactly where `match3` holds.

    Token x becomes an angle 2 pi x / M. Four features make the logit c * cos(sum of the three angles), which is largest
    where the residues add up to 0; the fifth lets a blank token, whose value is 0, score halfway between that and the
    next best sum. With c = 2 / gap * log(4 (n + 1)^2), gap = 1 - cos(2 pi / M), a matching pair outweighs all others
    together, and the blank all that do not match. c grows as M^2 log n: float64 is used.

    Args:
        M: the modulus.
        n: the largest number of tokens.

    Returns:
        A function of integers (*batch, up to n), which gives float64 numbers between 0 and 1.

    Raises:
        ValueError: where M is below 2 or n below 1; by the function, where it gets more than n tokens.
    """
    if M < 2 or n < 1:
        raise ValueError(f"M must be at least 2 and n at least 1, got {M} and {n}")
    gap = 1.0 - math.cos(2.0 * math.pi / M)
    sharpness = 2.0 / gap * math.log(4.0 * (n + 1) ** 2)

    def head(x: Tensor) -> Tensor:
        if x.shape[-1] > n:
            raise ValueError(f"x must have at most n = {n} tokens, got {tuple(x.shape)}")
        angle = 2.0 * math.pi * torch.remainder(x, M).double() / M
        cos, sin, one = angle.cos(), angle.sin(), torch.ones_like(angle)
        q = torch.stack([cos, -cos, -sin, -sin, one], -1)
        k1 = torch.stack([cos, sin, cos, sin, 0.0 * one], -1)
        k2 = torch.stack([cos, sin, sin, cos, 0.0 * one], -1)
        blank = torch.zeros_like(k1[..., :1, :])
        blank[..., 4] = 1.0
        value = torch.cat([one, 0.0 * one[..., :1]], -1).unsqueeze(-1)
        ks = [torch.cat([k1, blank], -2), torch.cat([k2, (1.0 - gap / 2.0) * blank], -2)]
        return tensor_attention(q, ks, [value, value], scale=sharpness, method="exact").squeeze(-1)

    return head
