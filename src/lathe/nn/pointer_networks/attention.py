"""Attention whose weights are the output: which of the items of a memory does a query point at?

Legend: B samples, T queries, n items, h hidden units.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["PointerAttention", "SpanPointer", "additive_scores", "pointer_generator"]

# Above this many numbers, tanh(W1 e + W2 d) is made in slices of the queries, and once more in the backward pass.
_LARGEST = 2 * 10**7


class PointerAttention(nn.Module):
    """`u[i, j] = v . tanh(W1 e_j + W2 d_i)`: logits over the positions of a memory of any length.

    Works behind any encoder; the softmax of its logits is the distribution to point by. Reordering the memory reorders
    the logits alike.

    Args:
        query_dim: size of a query d_i.
        memory_dim: size of an item e_j.
        hidden_dim: of v; W1 and W2 have no bias.

    Shape: query `(B, T, query_dim)`, memory `(B, n, memory_dim)`, mask `(B, n)` with True where there is an item
    -> `(B, T, n)`, -inf where there is none.

    Raises:
        ValueError: where sizes are not positive or shapes do not fit.

    Source: Vinyals et al. 2015, equation 3.

    Example:
        >>> PointerAttention(8, 16, 32)(torch.zeros(2, 3, 8), torch.zeros(2, 5, 16)).shape
        torch.Size([2, 3, 5])
    """

    def __init__(
        self,
        query_dim: int,
        memory_dim: int,
        hidden_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if min(query_dim, memory_dim, hidden_dim) < 1:
            raise ValueError(
                f"query_dim, memory_dim and hidden_dim must be positive, got {query_dim}, {memory_dim}, {hidden_dim}"
            )
        self.query_dim, self.memory_dim, self.hidden_dim = query_dim, memory_dim, hidden_dim
        self.query = nn.Linear(query_dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.key = nn.Linear(memory_dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.v = nn.Parameter(torch.empty(hidden_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew, as `nn.Linear` does."""
        self.query.reset_parameters()
        self.key.reset_parameters()
        bound = self.hidden_dim**-0.5
        nn.init.uniform_(self.v, -bound, bound)

    def extra_repr(self) -> str:
        return f"{self.query_dim}, {self.memory_dim}, {self.hidden_dim}"

    def precompute(self, memory: Float[Tensor, "B n memory_dim"]) -> Float[Tensor, "B n h"]:
        """`W1 e_j`, which does not change from query to query."""
        if memory.ndim != 3 or memory.shape[2] != self.memory_dim:
            raise ValueError(f"memory must be (batch, n, {self.memory_dim}), got shape {tuple(memory.shape)}")
        return self.key(memory)

    def score(
        self,
        query: Float[Tensor, "B T query_dim"],
        keys: Float[Tensor, "B n h"],
        mask: Bool[Tensor, "B n"] | None = None,
    ) -> Float[Tensor, "B T n"]:
        """As `forward`, for a memory that went through `precompute`."""
        if query.ndim != 3 or query.shape[2] != self.query_dim or query.shape[0] != keys.shape[0]:
            raise ValueError(
                f"query must be ({keys.shape[0]}, queries, {self.query_dim}), got shape {tuple(query.shape)}"
            )
        if mask is not None and mask.shape != keys.shape[:2]:
            raise ValueError(f"mask must be {tuple(keys.shape[:2])}, got shape {tuple(mask.shape)}")
        logits = additive_scores(self.query(query), keys, self.v)
        return logits if mask is None else logits.masked_fill(~mask[:, None], float("-inf"))

    def forward(
        self,
        query: Float[Tensor, "B T query_dim"],
        memory: Float[Tensor, "B n memory_dim"],
        mask: Bool[Tensor, "B n"] | None = None,
    ) -> Float[Tensor, "B T n"]:
        return self.score(query, self.precompute(memory), mask)


def additive_scores(
    query: Float[Tensor, "B T h"], keys: Float[Tensor, "B n h"], v: Float[Tensor, " h"]
) -> Float[Tensor, "B T n"]:
    """`v . tanh(keys + query)` for every pair, and what is kept for the backward pass: one number a pair and unit.

    Where that would be more than 2e7 numbers, slices of the queries are worked on one after the other and made again in
    the backward pass: memory no longer grows with T.
    """
    B, T, h = query.shape
    n = keys.shape[1]
    if B * T * n * h <= _LARGEST:
        return _scores(query, keys, v)
    slices = query.split(max(1, _LARGEST // (B * n * h)), 1)
    if not torch.is_grad_enabled():
        return torch.cat([_scores(part, keys, v) for part in slices], 1)
    return torch.cat([checkpoint(_scores, part, keys, v, use_reentrant=False) for part in slices], 1)


def _scores(query: Tensor, keys: Tensor, v: Tensor) -> Tensor:
    # tanh in place: the sum is needed by nobody.
    return (query[:, :, None] + keys[:, None]).tanh_() @ v


class SpanPointer(nn.Module):
    """Points at the first and the last item of a span, the last in knowledge of the first.

    A drop-in for the linear layer `(features -> 2)` at the end of an extractive question-answering network. Start and
    end are two queries to the same memory; the end's is the memory as the start's softmax weighs it.

    Args:
        in_features: of the hidden states.
        hidden_dim: of the pointers; in_features by default.

    Shape: `(B, n, in_features)` -> `(B, n, 2)`, the logits of start and end; with mask `(B, n)`, True where there is an
    item, -inf elsewhere.

    Raises:
        ValueError: where shapes do not fit.

    Source: the pointer of Vinyals et al. 2015, equation 3, used as Wang and Jiang 2016 (arXiv 1608.07905) do for spans.
    """

    def __init__(
        self,
        in_features: int,
        hidden_dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.attention = PointerAttention(
            in_features, in_features, hidden_dim or in_features, device=device, dtype=dtype
        )
        self.start = nn.Parameter(torch.empty(in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all weights anew."""
        self.attention.reset_parameters()
        nn.init.normal_(self.start, std=self.in_features**-0.5)

    @classmethod
    def like(cls, layer: nn.Linear, *, hidden_dim: int | None = None) -> SpanPointer:
        """A fresh head that fits where the linear `layer` stood: same shapes, device and dtype.

        Raises:
            ValueError: where the layer has other than two outputs.
        """
        if layer.out_features != 2:
            raise ValueError(f"layer must have two outputs, start and end, got {layer.out_features}")
        made = cls(layer.in_features, hidden_dim, device=layer.weight.device, dtype=layer.weight.dtype)
        return made.train(layer.training)

    def forward(
        self, hidden: Float[Tensor, "B n in_features"], mask: Bool[Tensor, "B n"] | None = None
    ) -> Float[Tensor, "B n 2"]:
        keys = self.attention.precompute(hidden)
        start = self.attention.score(self.start.expand(len(hidden), 1, -1), keys, mask)
        end = self.attention.score(start.softmax(2) @ hidden, keys, mask)
        return torch.cat([start, end], 1).transpose(1, 2)


def pointer_generator(
    vocabulary: Float[Tensor, "B T words"],
    pointers: Float[Tensor, "B T n"],
    source: Int64[Tensor, "B n"],
    generate: Float[Tensor, "B T"],
) -> Float[Tensor, "B T words"]:
    """Log-probabilities of the next word where a network may also copy a word of its source.

    `p(w) = g p_vocabulary(w) + (1 - g) sum over j with source[j] = w of p_pointer(j)`: words that the vocabulary model
    has never produced can be said when they stand in the source.

    Args:
        vocabulary: logits of a language model.
        pointers: logits over the source's positions, such as a `PointerAttention` gives.
        source: the words that stand there; ids may exceed those that the model says, if `vocabulary` is padded (-inf).
        generate: g, as a logit.

    Raises:
        ValueError: where a word of the source is not in [0, words).

    Source: See, Liu, Manning 2017 (arXiv 1704.04368), equation 9, with the pointer of Vinyals et al. 2015.
    """
    words = vocabulary.shape[2]
    if source.numel() and not 0 <= int(source.min()) <= int(source.max()) < words:
        raise ValueError(f"source must be in [0, {words}), got {int(source.min())} to {int(source.max())}")
    copied = pointers.softmax(2).to(vocabulary.dtype)
    index = source[:, None].expand_as(copied)
    copied = torch.zeros_like(vocabulary).scatter_add(2, index, copied)
    generate = generate[..., None]
    tiny = torch.finfo(vocabulary.dtype).tiny
    return torch.logaddexp(
        nn.functional.logsigmoid(generate) + vocabulary.log_softmax(2),
        nn.functional.logsigmoid(-generate) + copied.clamp_min(tiny).log(),
    )
