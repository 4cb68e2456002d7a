"""The two sequence-to-sequence networks with a fixed dictionary that pointer networks are compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lathe.nn.pointer_networks.attention import PointerAttention
from lathe.nn.pointer_networks.network import Encoded, PointSequenceModel

__all__ = ["Seq2SeqAttention", "Seq2SeqFixed"]


class _FixedDictionary(PointSequenceModel):
    """Choices out of a dictionary that training fixes: one network for each number of points.

    Args:
        n: points; the network takes no other number of them.
        input_dim, hidden_dim, stop_token: as of `PointerNetwork`.
    """

    reads_blend = False

    def __init__(
        self,
        n: int,
        input_dim: int = 2,
        hidden_dim: int = 256,
        stop_token: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if n < 1:
            raise ValueError(f"n must be positive, got {n}")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(input_dim, hidden_dim, stop_token, "input", None, False, self.reads_blend, options)
        self.n = n
        self.output = nn.Linear(hidden_dim * (1 + self.reads_blend), n + stop_token, **options)

    def encode(self, points: Tensor, lengths: Tensor | None = None) -> Encoded:
        if lengths is not None or (points.ndim == 3 and points.shape[1] != self.n):
            raise ValueError(
                f"{type(self).__name__} was made for {self.n} points and takes no others, "
                f"got shape {tuple(points.shape)}{'' if lengths is None else ' with lengths'}"
            )
        return super().encode(points)


class Seq2SeqFixed(_FixedDictionary):
    """The paper's first baseline: a sequence-to-sequence LSTM with a softmax over n + 1 fixed indices.

    Arguments as of `PointerNetwork`, after n, the one number of points that it takes.

    Source: Vinyals et al. 2015, section 2.1.
    """

    def _keys(self, memory: Tensor) -> tuple[Tensor, ...]:
        return ()

    def _head(self, hidden: Tensor, encoded: Encoded) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.output(hidden), ()


class Seq2SeqAttention(_FixedDictionary):
    """The paper's second baseline: attention blends the memory for the softmax over n + 1 fixed indices.

    The next step reads that blend, so that training too goes step by step. Arguments as of `Seq2SeqFixed`.

    Source: Vinyals et al. 2015, section 2.2.
    """

    reads_blend = True

    def __init__(
        self, n: int, input_dim: int = 2, hidden_dim: int = 256, stop_token: bool = True, **options: Any
    ) -> None:
        super().__init__(n, input_dim, hidden_dim, stop_token, **options)
        self.attention = PointerAttention(hidden_dim, hidden_dim, hidden_dim, **options)

    def _keys(self, memory: Tensor) -> tuple[Tensor, ...]:
        return (self.attention.precompute(memory),)

    def _head(self, hidden: Tensor, encoded: Encoded) -> tuple[Tensor, tuple[Tensor, ...]]:
        blend = self.attention.score(hidden, encoded.keys[0], encoded.mask).softmax(2) @ encoded.memory
        return self.output(torch.cat([hidden, blend], 2)), (blend,)
