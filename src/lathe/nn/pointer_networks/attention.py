"""Attention whose weights are the output: which of the items of a memory does a query point at?

Legend: B samples, T queries, n items, h hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

__all__ = ["PointerAttention", "SpanPointer", "additive_scores", "pointer_generator"]

# Numbers in a slice of tanh(W1 e + W2 d): what a core's cache holds, and what an accelerator is kept busy by.
_CACHED, _LARGEST = 2**18, 2 * 10**7

# exp(2 x) exp(2 y) neither overflows nor loses digits in float32 while both are this small.
_SAFE = 20.0


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
    """`v . tanh(keys + query)` for every pair, in slices that are made again in the backward pass.

    Nothing of size B T n h is ever held. On the CPU a slice fits the cache, and its tanh cost no exponential each: with
    E = exp(2 query) and F = exp(2 keys), B (T + n) h of them, tanh(query + keys) = 1 - 2 / (1 + E F). Where an
    argument exceeds 20 in size (E F could overflow), it is the ordinary tanh.
    """
    v = v.to(query.dtype)
    if query.is_meta or torch.compiler.is_compiling():
        return (query[:, :, None] + keys[:, None]).tanh() @ v
    factored = query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64) and query.numel() > 0
    if factored and keys.numel():
        factored = bool(query.detach().abs().amax() <= _SAFE) and bool(keys.detach().abs().amax() <= _SAFE)
    return _AdditiveScores.apply(query, keys, v, factored)


class _AdditiveScores(torch.autograd.Function):
    """See `additive_scores`; differentiable as often as one likes."""

    @staticmethod
    def forward(query: Tensor, keys: Tensor, v: Tensor, factored: bool) -> Tensor:
        scores = query.new_empty(*query.shape[:2], keys.shape[1])
        for rows, steps, tanh in _tanh_slices(query, keys, factored):
            scores[rows, steps] = tanh @ v
        return scores

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.factored = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, keys, v = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of the gradient is wanted
            scores = (query[:, :, None] + keys[:, None]).tanh() @ v
            return (*torch.autograd.grad(scores, (query, keys, v), weight, create_graph=True), None)
        of_query, of_keys, of_v = torch.zeros_like(query), torch.zeros_like(keys), torch.zeros_like(v)
        for rows, steps, tanh in _tanh_slices(query, keys, ctx.factored):
            part = weight[rows, steps]
            of_v += part.flatten() @ tanh.flatten(0, 2)
            part = part[..., None]
            slope = torch.addcmul(part, tanh, tanh * part, value=-1)
            of_query[rows, steps] = slope.sum(2)
            of_keys[rows] += slope.sum(1)
        return of_query.mul_(v), of_keys.mul_(v), of_v, None


def _tanh_slices(query: Tensor, keys: Tensor, factored: bool) -> Iterator[tuple[slice, slice, Tensor]]:
    """tanh(query + keys) for some samples and some of their queries at a time."""
    B, T, h = query.shape
    n = keys.shape[1]
    largest = _CACHED if query.device.type == "cpu" else _LARGEST
    many = max(1, largest // max(1, T * n * h))
    steps = max(1, min(T, largest // max(1, n * h)))
    if factored:
        query, keys = (2 * query).exp(), (2 * keys).exp()
    for row in range(0, B, many):
        for step in range(0, T, steps):
            rows, queries = slice(row, row + many), slice(step, step + steps)
            left, right = query[rows, queries, None], keys[rows, None]
            if factored:
                yield rows, queries, torch.rsub((left * right).add_(1).reciprocal_(), 1, alpha=2)
            else:
                yield rows, queries, (left + right).tanh_()


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
