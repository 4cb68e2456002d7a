"""Multi-head attention of any order in the place of `nn.MultiheadAttention` and of Hugging Face's self-attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lathe.nn.tensor_attention.attention import Method, tensor_attention
from lathe.nn.tensor_attention.polynomials import Kind

__all__ = ["HigherOrderAttention", "HuggingFaceAttention"]


class Options(TypedDict, total=False):
    """What `HigherOrderAttention` has beyond the arguments of `nn.MultiheadAttention`."""

    method: Method
    window: int | tuple[int, ...] | None
    degree: int | None
    poly: Kind
    bound: float | None
    tol: float | None
    strict: bool


class HigherOrderAttention(nn.Module):
    """Multi-head attention in which a query attends to tuples of order - 1 keys.

    Takes the arguments of `nn.MultiheadAttention` (but for `add_bias_kv` and `add_zero_attn`), then its own. There is
    one projection of queries and of outputs, and order - 1 projections of keys and of values.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, device, dtype: as in `nn.MultiheadAttention`; the
            batch comes first by default.
        order: how many tokens a logit depends on; 2 is ordinary attention.
        scale: of the logits, 1 / head_dim by default.
        method, window, degree, poly, bound, tol, strict: as in `tensor_attention`.

    Shape: as `nn.MultiheadAttention`: `(batch, n, embed_dim)`, without batch, or with the batch second.

    Raises:
        ValueError: where num_heads does not divide embed_dim, or order is below 2.

    Example:
        >>> x = torch.randn(2, 5, 8)
        >>> HigherOrderAttention(8, num_heads=2)(x, x, x)[0].shape
        torch.Size([2, 5, 8])
    """

    # `nn.TransformerEncoderLayer` reads these to find out whether it may bypass the module: it may not.
    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        order: int = 3,
        scale: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"num_heads must divide embed_dim, got {num_heads} and {embed_dim}")
        if order < 2:
            raise ValueError(f"order must be at least 2, got {order}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must lie in 0 to 1, got {dropout:g}")
        if unknown := set(options) - set(Options.__annotations__):
            raise TypeError(f"HigherOrderAttention has no argument {', '.join(sorted(unknown))}")
        self.embed_dim, self.num_heads, self.order, self.dropout = embed_dim, num_heads, order, dropout
        self.kdim, self.vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        self.head_dim, self.batch_first = embed_dim // num_heads, batch_first
        self.scale = 1.0 / self.head_dim if scale is None else scale
        self.options = options

        def linear(inputs: int) -> nn.Linear:
            return nn.Linear(inputs, embed_dim, bias=bias, device=device, dtype=dtype)

        self.q_proj = linear(embed_dim)
        self.k_projs = nn.ModuleList([linear(self.kdim) for _ in range(order - 1)])
        self.v_projs = nn.ModuleList([linear(self.vdim) for _ in range(order - 1)])
        self.out_proj = linear(embed_dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier's rule for the weights and zeros for the biases, as in `nn.MultiheadAttention`.

        But the biases of keys and values after the first are 1: the layer starts near ordinary attention, whereas a
        product of several averages of values would nearly vanish.
        """
        for projection in (self.q_proj, *self.k_projs, *self.v_projs):
            nn.init.xavier_uniform_(projection.weight)
        self.out_proj.reset_parameters()
        for projection in (self.q_proj, *self.k_projs, *self.v_projs, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        for projection in (*self.k_projs[1:], *self.v_projs[1:]):
            if projection.bias is not None:
                nn.init.ones_(projection.bias)

    @classmethod
    def like(
        cls, attention: nn.Module, order: int = 3, *, scale: float | None = None, **options: Unpack[Options]
    ) -> HigherOrderAttention:
        """A fresh layer that fits where `attention` stood: same shapes, device, dtype and mode.

        Raises:
            TypeError: where `attention` is no `nn.MultiheadAttention`.
            ValueError: where it appends keys (`add_bias_kv`, `add_zero_attn`), which has no counterpart here.
        """
        attention = _checked(attention)
        made = cls(
            attention.embed_dim,
            attention.num_heads,
            attention.dropout,
            attention.in_proj_bias is not None,
            attention.kdim,
            attention.vdim,
            attention.batch_first,
            attention.out_proj.weight.device,
            attention.out_proj.weight.dtype,
            order=order,
            scale=scale,
            **options,
        )
        return made.train(attention.training)

    @classmethod
    def from_trained(cls, attention: nn.Module, order: int = 3, **options: Unpack[Options]) -> HigherOrderAttention:
        """A layer that computes exactly what the trained `attention` does, ready to be fine-tuned at its order.

        Queries, outputs and the first keys and values are taken over; all other keys and values start as ones (their
        weights are 0 and their biases 1), so that a tuple scores and counts as its first token alone. The scale is that
        of the layer taken over, 1 / sqrt(head_dim). The layer has biases even where `attention` has none.

        Raises:
            TypeError, ValueError: as `like`.
        """
        attention = _checked(attention)
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        made = cls._from_projections(
            [*zip(weights, biases), (attention.out_proj.weight, attention.out_proj.bias)],
            attention.num_heads,
            order,
            1.0 / math.sqrt(attention.head_dim),
            attention.dropout,
            attention.batch_first,
            options,
        )
        return made.train(attention.training)

    @classmethod
    @torch.no_grad()
    def _from_projections(
        cls,
        projections: list[tuple[Tensor, Tensor | None]],
        num_heads: int,
        order: int,
        scale: float,
        dropout: float,
        batch_first: bool,
        options: Options,
    ) -> HigherOrderAttention:
        """From weights and biases of queries, keys, values and outputs."""
        (q, _), (k, _), (v, _), (out, _) = projections
        if {len(q), len(k), len(v), len(out), out.shape[1], q.shape[1]} != {len(q)}:
            shapes = ", ".join(str(tuple(weight.shape)) for weight, _ in projections)
            raise ValueError(
                f"queries, keys, values and outputs must have embed_dim features each, got weights {shapes}"
            )
        made = cls(
            len(q),
            num_heads,
            dropout,
            True,
            k.shape[1],
            v.shape[1],
            batch_first,
            q.device,
            q.dtype,
            order=order,
            scale=scale,
            **options,
        )
        taken: Any = (made.q_proj, made.k_projs[0], made.v_projs[0], made.out_proj)
        for projection, (weight, bias) in zip(taken, projections):
            projection.weight.copy_(weight)
            projection.bias.copy_(torch.zeros_like(projection.bias) if bias is None else bias)
        further: Any = (*made.k_projs[1:], *made.v_projs[1:])
        for projection in further:
            nn.init.zeros_(projection.weight)
            nn.init.ones_(projection.bias)
        return made

    def forward(
        self,
        query: Float[Tensor, "..."],
        key: Float[Tensor, "..."],
        value: Float[Tensor, "..."],
        key_padding_mask: Float[Tensor, "..."] | Bool[Tensor, "..."] | None = None,
        need_weights: bool = False,
        attn_mask: Float[Tensor, "..."] | Bool[Tensor, "..."] | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Float[Tensor, "..."], None]:
        """As `nn.MultiheadAttention`, without the weights, of which there are n**order.

        Args:
            query, key, value: (batch, n, embed_dim), (batch, m, kdim), (batch, m, vdim), all without the batch, or with
                it second where `batch_first` is false.
            key_padding_mask: (batch, m): true, or what is added to the logits, leaves a key out on every axis.
            need_weights, average_attn_weights: without effect.
            attn_mask: (n, m) or (batch * num_heads, n, m): true leaves the key out on every axis, or numbers that are
                added for each key of a tuple.
            is_causal: query i sees the keys up to i; attn_mask, where it is given as well, holds in addition.

        Raises:
            ValueError: where shapes do not fit.
        """
        inputs = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (x, features) in inputs.items():
            if x.ndim not in (2, 3) or x.ndim != query.ndim or x.shape[-1] != features:
                where = "batch first" if self.batch_first else "batch second"
                raise ValueError(f"{name} must be (batch, rows, {features}), {where} or left out, got {tuple(x.shape)}")
        batched = query.ndim == 3
        if batched and not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        batch, n, m = query.shape[0], query.shape[1], key.shape[1]
        if key_padding_mask is not None:
            expected: list[tuple[int, ...]] = [(batch, m)] if batched else [(1, m), (m,)]
            key_padding_mask = _checked_mask("key_padding_mask", key_padding_mask, expected).view(batch, 1, m)
        if attn_mask is not None:
            attn_mask = _checked_mask("attn_mask", attn_mask, [(n, m), (batch * self.num_heads, n, m)])
            attn_mask = attn_mask.view(-1, self.num_heads, n, m) if attn_mask.ndim == 3 else attn_mask
            if attn_mask.dtype == torch.bool:
                attn_mask = ~attn_mask
        out = self.attend(*self.project(query, key, value), attn_mask, key_padding_mask, is_causal)
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        return out, None

    def project(
        self,
        query: Float[Tensor, "batch n _embed"],
        key: Float[Tensor, "batch m _kdim"],
        value: Float[Tensor, "batch m _vdim"],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Queries (batch, heads, n, head_dim), and the keys and values (batch, heads, m, head_dim) of each axis."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        ks, vs = (
            [heads(projection(x)) for projection in some] for some, x in ((self.k_projs, key), (self.v_projs, value))
        )
        return heads(self.q_proj(query)), ks, vs

    def attend(
        self,
        q: Float[Tensor, "batch heads n _d"],
        ks: Sequence[Float[Tensor, "batch heads m _d"]],
        vs: Sequence[Float[Tensor, "batch heads m _d"]],
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "batch n _embed"]:
        """From what `project` gives to the output; every axis gets both masks, which are as in `tensor_attention`."""
        axes = self.order - 1
        out = tensor_attention(
            q,
            ks,
            vs,
            scale=self.scale,
            attn_mask=None if attn_mask is None else [attn_mask] * axes,
            key_padding_mask=None if key_padding_mask is None else [key_padding_mask] * axes,
            is_causal=is_causal,
            dropout=self.dropout if self.training else 0.0,
            **self.options,
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        """The arguments that differ from what the shapes of the projections say."""
        parts = [f"order={self.order}", f"num_heads={self.num_heads}", f"scale={self.scale:.4g}"]
        parts += [f"dropout={self.dropout:g}"] * (self.dropout > 0.0)
        return ", ".join(parts + [f"{name}={value}" for name, value in self.options.items() if value is not None])


class HuggingFaceAttention(nn.Module):
    """A `HigherOrderAttention` that is called as the self-attention of a Hugging Face model, masks, cache and all.

    For modules with linear `q_proj`, `k_proj`, `v_proj` and `o_proj` or `out_proj` (ViT, CLIP, SigLIP, OPT, ...) and
    for GPT-2's fused `c_attn` and `c_proj`. Rotary positions, normalised or grouped keys and cross-attention are
    refused.

        swap(model, {ViTAttention: HuggingFaceAttention.from_trained})

    Args:
        attention: what does the work; its batch comes first.
        is_causal: whether a query sees later tokens where the model gives no mask.
        dropout: of the output, as GPT-2 has it.
        layer_idx: where the model's cache keeps keys and values: those of all axes, side by side.

    Shape: `(batch, n, embed_dim)` -> the same, and None in the place of the weights.
    """

    def __init__(
        self,
        attention: HigherOrderAttention,
        *,
        is_causal: bool = False,
        dropout: float = 0.0,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.attention, self.is_causal, self.layer_idx = attention, is_causal, layer_idx
        self.output_dropout = nn.Dropout(dropout)

    @classmethod
    def like(
        cls, attention: nn.Module, order: int = 3, *, scale: float | None = None, **options: Unpack[Options]
    ) -> HuggingFaceAttention:
        """A fresh layer in the place of a Hugging Face self-attention.

        Raises:
            TypeError: where `attention` does not have the projections that are known, or more than those.
            ValueError: where keys have other features than queries (grouped keys).
        """
        made = cls.from_trained(attention, order, **options)
        made.attention.scale = 1.0 / made.attention.head_dim if scale is None else scale
        made.attention.reset_parameters()
        return made

    @classmethod
    def from_trained(cls, attention: nn.Module, order: int = 3, **options: Unpack[Options]) -> HuggingFaceAttention:
        """A layer that computes exactly what the trained `attention` does; see `HigherOrderAttention.from_trained`.

        Raises:
            TypeError, ValueError: as `like`.
        """
        found: Any = attention
        out = _first(found, "o_proj", "out_proj")
        projections: list[tuple[Tensor, Tensor | None]]
        if all(isinstance(getattr(found, f"{name}_proj", None), nn.Linear) for name in "qkv") and out is not None:
            projections = [(linear.weight, linear.bias) for linear in (found.q_proj, found.k_proj, found.v_proj, out)]
        elif hasattr(found, "c_attn") and hasattr(found, "c_proj") and not hasattr(found, "q_attn"):
            # GPT-2 keeps its weights transposed, and queries, keys and values in one.
            fused = zip(found.c_attn.weight.mT.chunk(3), found.c_attn.bias.chunk(3))
            projections = [*fused, (found.c_proj.weight.mT, found.c_proj.bias)]
        else:
            raise TypeError(
                "attention must have q_proj, k_proj, v_proj and o_proj or out_proj, or c_attn and c_proj, "
                f"got {type(attention).__name__}"
            )
        if hasattr(found, "q_norm") or hasattr(found, "k_norm"):
            raise TypeError(f"attention must not normalise queries and keys, got {type(attention).__name__}")
        heads = _first(found, "num_heads", "num_attention_heads")
        heads = len(projections[0][0]) // found.head_dim if heads is None else heads
        scale = _first(found, "scaling", "scale")
        dropout = _first(found, "attn_dropout", "attention_dropout", "dropout")
        made = HigherOrderAttention._from_projections(
            projections,
            heads,
            order,
            1.0 / math.sqrt(len(projections[0][0]) // heads) if scale is None else scale,
            _probability(dropout),
            True,
            options,
        )
        after = _probability(_first(found, "resid_dropout"))
        causal, layer = bool(_first(found, "is_causal")), _first(found, "layer_idx")
        return cls(made, is_causal=causal, dropout=after, layer_idx=layer).train(attention.training)

    def forward(
        self,
        hidden_states: Float[Tensor, "..."],
        attention_mask: Float[Tensor, "..."] | Bool[Tensor, "..."] | None = None,
        **options: Any,
    ) -> tuple[Float[Tensor, "batch n _embed"], None]:
        """As the attention that it replaces; of `options` only the cache counts.

        Args:
            hidden_states: (batch, n, embed_dim).
            attention_mask: (batch or 1, heads or 1, n, m), true where a key takes part, or numbers that are added.

        Raises:
            ValueError: for another shape, for rotary positions and for the states of an encoder.
        """
        embed = self.attention.embed_dim
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != embed:
            raise ValueError(f"hidden_states must be (batch, n, {embed}), got {tuple(hidden_states.shape)}")
        for name in ("position_embeddings", "encoder_hidden_states", "key_value_states"):
            if options.get(name) is not None:
                raise ValueError(f"{name} must be None: rotary positions and cross-attention have no counterpart here")
        q, ks, vs = self.attention.project(hidden_states, hidden_states, hidden_states)
        cache = options.get("cache", options.get("past_key_values"))
        if cache is not None:
            cache = getattr(cache, "self_attention_cache", cache)
            keys, values = cache.update(torch.cat(ks, -1), torch.cat(vs, -1), self.layer_idx)
            ks, vs = list(keys.chunk(len(ks), -1)), list(values.chunk(len(vs), -1))
        causal = self.is_causal and attention_mask is None and q.shape[-2] > 1
        out = self.attention.attend(q, ks, vs, attention_mask, None, causal)
        return self.output_dropout(out), None


def _first(module: Any, *names: str) -> Any:
    """The first attribute that the module has, or None."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _probability(dropout: Any) -> float:
    return float(dropout.p if isinstance(dropout, nn.Dropout) else dropout or 0.0)


def _checked(attention: nn.Module) -> nn.MultiheadAttention:
    if not isinstance(attention, nn.MultiheadAttention):
        raise TypeError(f"attention must be an nn.MultiheadAttention, got {type(attention).__name__}")
    if attention.bias_k is not None or attention.add_zero_attn:
        raise ValueError("attention must not have add_bias_kv or add_zero_attn, which have no counterpart here")
    return attention


def _checked_mask(name: str, mask: Tensor, shapes: list[tuple[int, ...]]) -> Tensor:
    if tuple(mask.shape) not in shapes:
        raise ValueError(f"{name} must be {' or '.join(map(str, shapes))}, got {tuple(mask.shape)}")
    return mask
