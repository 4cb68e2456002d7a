"""The pointer network, and what it shares with the networks that it is compared with.

Legend: B samples, n points, d features of a point, h hidden units, T steps, K sequences of a sample, C choices.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lathe.data.tours import IGNORED
from lathe.nn.pointer_networks.attention import PointerAttention
from lathe.nn.pointer_networks.constraints import Constraint
from lathe.nn.pointer_networks.decoding import Decoded, Strategy, allowed_choices, decode

__all__ = ["Encoded", "PointSequenceModel", "PointerNetwork"]


@dataclass(frozen=True)
class Encoded:
    """What a decoder knows of the points.

    Args:
        memory: the encoder's, and behind it the stop token's vector.
        keys: what each attention makes of the memory once.
        mask: which of the memory is no padding; None where nothing is.
        state: the decoder's h and c before its first step, and the context that it reads there, if it reads one.
    """

    memory: Float[Tensor, "B items h"]
    keys: tuple[Tensor, ...]
    mask: Bool[Tensor, "B items"] | None
    state: tuple[Tensor, ...]


class PointSequenceModel(nn.Module):
    """An encoder, an LSTM decoder and what both need; the subclasses say how its hidden state names a choice.

    The choices are the n points and, with `stop_token`, the stop token n (of a padded batch: the padded n).
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        stop_token: bool,
        feed: Literal["input", "memory"],
        encoder: nn.Module | None,
        bidirectional: bool,
        reads_context: bool,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        if input_dim < 1 or hidden_dim < 1:
            raise ValueError(f"input_dim and hidden_dim must be positive, got {input_dim} and {hidden_dim}")
        if feed not in ("input", "memory"):
            raise ValueError(f"feed must be 'input' or 'memory', got {feed!r}")
        if bidirectional and (hidden_dim % 2 or encoder is not None):
            raise ValueError("bidirectional needs the encoder to be left out and an even hidden_dim")
        self.input_dim, self.hidden_dim, self.stop_token, self.feed = input_dim, hidden_dim, stop_token, feed
        self.reads_context = reads_context
        if encoder is None:
            size = hidden_dim // 2 if bidirectional else hidden_dim
            encoder = nn.LSTM(input_dim, size, batch_first=True, bidirectional=bidirectional, **options)
        elif isinstance(encoder, nn.LSTM) and not encoder.batch_first:
            raise ValueError("encoder must be an LSTM with batch_first=True, got batch_first=False")
        self.encoder = encoder
        fed = input_dim if feed == "input" else hidden_dim
        self.decoder = nn.LSTM(fed + reads_context * hidden_dim, hidden_dim, batch_first=True, **options)
        self.start = nn.Parameter(torch.zeros(fed, **options))
        # In the memory behind the points: what the decoder points at to say that it is done.
        self.end = nn.Parameter(torch.empty(hidden_dim, **options)) if stop_token else None
        if self.end is not None:
            nn.init.uniform_(self.end, -(hidden_dim**-0.5), hidden_dim**-0.5)

    # --- for users ---

    def forward(
        self,
        points: Float[Tensor, "B n d"],
        targets: Int64[Tensor, "B T"],
        lengths: Int64[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T C"]:
        """Logits of every step, given the targets of the steps before (teacher forcing).

        Args:
            targets: choices; -100 behind the end.
            lengths: how many points each sample has; the others are padding, and are never pointed at (-inf).

        Raises:
            ValueError: for shapes that do not fit, targets outside the choices, or anything behind a stop token.
        """
        _check_targets(points, targets, lengths, self.stop_token)
        encoded = self.encode(points, lengths)
        fed = self.feed_back(points, encoded, targets[:, :-1])
        start = self.start.expand(len(points), min(1, targets.shape[1]), -1)
        return self.unroll(torch.cat([start, fed], 1), encoded)

    def log_prob(
        self,
        points: Float[Tensor, "B n d"],
        targets: Int64[Tensor, "B T"],
        lengths: Int64[Tensor, " B"] | None = None,
        *,
        valid: Constraint | None = None,
    ) -> Float[Tensor, " B"]:
        """Log-probability of each target sequence, differentiable; equation 1 of the paper.

        Args:
            valid: a constraint, whose masks then take part as they do in `decode`: -inf for what it forbids.

        Raises:
            ValueError: as `forward`.
        """
        logits = self(points, targets, lengths)
        counts = targets != IGNORED
        if valid is not None:
            logits = logits.masked_fill(
                ~(self._allowed(points, targets, lengths, valid) | ~counts[..., None]), -torch.inf
            )
        picked = logits.log_softmax(2).gather(2, targets.clamp_min(0)[..., None])[..., 0]
        return torch.where(counts, picked, 0.0).sum(1)

    def decode(
        self,
        points: Float[Tensor, "B n d"],
        max_len: int | None = None,
        strategy: Strategy = "greedy",
        beam: int = 8,
        valid: Constraint | None = None,
        *,
        lengths: Int64[Tensor, " B"] | None = None,
        samples: int = 1,
        temperature: float = 1.0,
        length_penalty: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Decoded:
        """Writes sequences, without gradients.

        Args:
            max_len: most steps; n, one more with a stop token, or what `Triangles` needs where it is left out.
            strategy: "greedy"; "beam" keeps the `beam` best prefixes; "sample" draws `samples` sequences of each sample
                independently; "stochastic_beam" draws `beam` different ones, without replacement.
            valid: a constraint, `Permutation()`, `Hull()`, `Triangles()` or any `callable(state, prefix) -> mask` (see
                `DecodingState`); None, the paper's way for hulls and triangulations, leaves the choice to the network.
            temperature: of "sample".
            length_penalty: beams are ranked by log-probability / length**length_penalty.
            generator: source of randomness; torch's global one by default.

        Raises:
            ValueError: for an unknown strategy, beam, samples or max_len below 1, or where a mask leaves a sample
                nothing to choose; says which, and at which step.
        """
        return decode(
            self,
            points,
            max_len=max_len,
            strategy=strategy,
            beam=beam,
            samples=samples,
            valid=valid,
            lengths=lengths,
            temperature=temperature,
            length_penalty=length_penalty,
            generator=generator,
        )

    # --- for decoding ---

    def encode(self, points: Float[Tensor, "B n d"], lengths: Int64[Tensor, " B"] | None = None) -> Encoded:
        """Reads the points; done once for all steps and beams."""
        if points.ndim != 3 or points.shape[2] != self.input_dim or points.shape[1] < 1:
            raise ValueError(f"points must be (batch, n, {self.input_dim}), got shape {tuple(points.shape)}")
        mask = None
        if lengths is not None:
            _check_lengths(points, lengths)
            mask = torch.arange(points.shape[1], device=points.device) < lengths.to(points.device)[:, None]
        memory, state = self._read(points, lengths, mask)
        if self.end is not None:
            memory = torch.cat([memory, self.end.expand(len(points), 1, -1)], 1)
            mask = None if mask is None else functional.pad(mask, (0, 1), value=True)
        if self.reads_context:
            state = (*state, torch.zeros_like(state[0]))
        return Encoded(memory, self._keys(memory), mask, state)

    def feed_back(self, points: Tensor, encoded: Encoded, choice: Int64[Tensor, "B T"]) -> Float[Tensor, "B T fed"]:
        """What the decoder reads next: the points last pointed to, or their memory; anything after the end."""
        source = points if self.feed == "input" else encoded.memory
        index = choice.clamp(0, points.shape[1] - 1)
        return source.gather(1, index[..., None].expand(-1, -1, source.shape[2]))

    def step(
        self, inputs: Float[Tensor, "B K fed"], state: Any, encoded: Encoded
    ) -> tuple[Float[Tensor, "B K C"], tuple[Tensor, ...]]:
        """One step of the decoder on K sequences of each sample."""
        h, c = self._cell(torch.cat([inputs, *state[2:]], 2), state)
        logits, context = self._head(h, encoded)
        return logits, (h, c, *context)

    def unroll(self, inputs: Float[Tensor, "B T fed"], encoded: Encoded) -> Float[Tensor, "B T C"]:
        """All steps at once, since what they read is known; one by one only where they also read a context."""
        if not self.reads_context:
            hidden, _ = self.decoder(inputs, tuple(part[None].contiguous() for part in encoded.state))
            return self._head(hidden, encoded)[0]
        state: tuple[Tensor, ...] = tuple(part[:, None] for part in encoded.state)
        logits = []
        for step in range(inputs.shape[1]):
            new, state = self.step(inputs[:, step : step + 1], state, encoded)
            logits.append(new)
        return torch.cat(logits, 1)

    @abstractmethod
    def _keys(self, memory: Tensor) -> tuple[Tensor, ...]:
        """What the attention of `_head` makes of the memory once."""

    @abstractmethod
    def _head(self, hidden: Tensor, encoded: Encoded) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits (B, T, C) of hidden states (B, T, h), and the context that the next step reads, if any."""

    # --- helpers ---

    def _read(self, points: Tensor, lengths: Tensor | None, mask: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        n = points.shape[1]
        if not isinstance(self.encoder, nn.LSTM):
            found = self.encoder(points) if mask is None else self.encoder(points, mask)
            memory, state = found if isinstance(found, tuple) else (found, None)
            self._check_memory(memory, points)
            if state is None:
                # An encoder without a state of its own: start from the average of its memory.
                weight = torch.ones_like(memory[..., :1]) if mask is None else mask[..., None].to(memory.dtype)
                average = (memory * weight).sum(1) / weight.sum(1)
                state = (average, torch.zeros_like(average))
            return memory, state
        if lengths is None:
            memory, state = self.encoder(points)
        else:
            # The final state must be that after a sample's last point, not after its padding.
            packed = pack_padded_sequence(points, lengths.cpu(), batch_first=True, enforce_sorted=False)
            memory, state = self.encoder(packed)
            memory, _ = pad_packed_sequence(memory, batch_first=True, total_length=n)
        self._check_memory(memory, points)
        last = -2 if self.encoder.bidirectional else -1
        return memory, tuple(part[last:].transpose(0, 1).flatten(1) for part in state)

    def _check_memory(self, memory: Tensor, points: Tensor) -> None:
        expected = (*points.shape[:2], self.hidden_dim)
        if memory.shape != expected:
            raise ValueError(f"encoder must give a memory of {expected}, got shape {tuple(memory.shape)}")

    def _cell(self, inputs: Tensor, state: Any) -> tuple[Tensor, Tensor]:
        lstm = self.decoder
        rows = tuple(part.flatten(0, 1) for part in state[:2])
        h, c = torch.lstm_cell(inputs.flatten(0, 1), rows, *lstm.all_weights[0])
        return h.unflatten(0, inputs.shape[:2]), c.unflatten(0, inputs.shape[:2])

    def _allowed(self, points: Tensor, targets: Tensor, lengths: Tensor | None, valid: Constraint) -> Tensor:
        n = points.shape[1]
        stop = n if self.stop_token else None
        sizes = torch.full((len(points),), n, device=points.device) if lengths is None else lengths.to(points.device)
        visited = torch.zeros(len(points), 1, n + self.stop_token, dtype=torch.bool, device=points.device)
        masks = []
        for step in range(targets.shape[1]):
            masks.append(allowed_choices(valid, points, sizes, stop, visited, targets[:, None, :step])[:, 0])
            visited.scatter_(2, targets[:, None, step : step + 1].clamp_min(0), True)
        return torch.stack(masks, 1) if masks else visited[:, :0]


class PointerNetwork(PointSequenceModel):
    """Sequences of positions of the input: its dictionary grows with what it is given.

    An LSTM reads the points, a second one writes; at each step its hidden state points at one of the first one's
    (`PointerAttention`), whose point it reads next. Trained on few points it runs on many.

    Args:
        input_dim: features of a point.
        hidden_dim: of both LSTMs and of the attention.
        stop_token: whether one choice more, at index n, ends the sequence: a learnt vector at the end of the memory.
            Tours have a known length and need none.
        feed: what the decoder reads after each choice: the chosen point itself (the paper's), or its memory.
        encoder: any module in place of the LSTM: `encoder(points)`, or `encoder(points, mask)` where lengths are given,
            returns a memory (B, n, hidden_dim), or that and the decoder's first (h, c). Without these the decoder
            starts from the average of the memory.
        glimpses: how often the hidden state looks at the memory before it points, 0 in the paper (Bello et al. 2016,
            arXiv 1611.09940, have 1).
        bidirectional: read the points in both directions, with half of the hidden units each.

    Shape: points `(B, n, d)`, targets `(B, T)` -> logits `(B, T, n + 1)`, or `(B, T, n)` without a stop token.

    Source: Vinyals et al. 2015, section 2.3.

    Example:
        >>> net = PointerNetwork(hidden_dim=16)
        >>> net.decode(torch.rand(3, 7, 2), strategy="beam", beam=4, valid=Hull()).sequences.shape[:2]
        torch.Size([3, 4])
    """

    def __init__(
        self,
        input_dim: int = 2,
        hidden_dim: int = 256,
        stop_token: bool = True,
        feed: Literal["input", "memory"] = "input",
        encoder: nn.Module | None = None,
        glimpses: int = 0,
        *,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(input_dim, hidden_dim, stop_token, feed, encoder, bidirectional, False, options)
        if glimpses < 0:
            raise ValueError(f"glimpses must not be negative, got {glimpses}")
        make = lambda: PointerAttention(hidden_dim, hidden_dim, hidden_dim, **options)  # noqa: E731
        self.pointer = make()
        self.glimpses = nn.ModuleList(make() for _ in range(glimpses))

    def _keys(self, memory: Tensor) -> tuple[Tensor, ...]:
        return tuple(head.precompute(memory) for head in (self.pointer, *self.glimpses))  # type: ignore[operator]

    def _head(self, hidden: Tensor, encoded: Encoded) -> tuple[Tensor, tuple[Tensor, ...]]:
        for head, keys in zip(self.glimpses, encoded.keys[1:]):
            hidden = head.score(hidden, keys, encoded.mask).softmax(2) @ encoded.memory  # type: ignore[operator]
        return self.pointer.score(hidden, encoded.keys[0], encoded.mask), ()


def _check_lengths(points: Tensor, lengths: Tensor) -> None:
    if lengths.shape != points.shape[:1] or lengths.is_floating_point():
        raise ValueError(f"lengths must be {len(points)} whole numbers, got shape {tuple(lengths.shape)}")
    if _known(lengths) and lengths.numel() and not 1 <= int(lengths.min()) <= int(lengths.max()) <= points.shape[1]:
        raise ValueError(f"lengths must be in [1, {points.shape[1]}], got {lengths.tolist()}")


def _check_targets(points: Tensor, targets: Tensor, lengths: Tensor | None, stop_token: bool) -> None:
    if points.ndim != 3 or targets.ndim != 2 or len(targets) != len(points) or targets.is_floating_point():
        raise ValueError(
            "targets must be whole numbers, (batch, steps) for points (batch, n, d), "
            f"got shapes {tuple(targets.shape)} and {tuple(points.shape)}"
        )
    if not _known(targets):
        return
    n = points.shape[1]
    written = targets != IGNORED
    ends = written & (targets == n) if stop_token else torch.zeros_like(written)
    within = (targets >= 0) & (targets < (n if lengths is None else lengths.to(targets.device)[:, None]))
    wrong = written & ~within & ~ends
    if bool(wrong.any()):
        row, step = wrong.nonzero()[0].tolist()
        named = f"points of their sample{f', or the stop token {n}' if stop_token else ''}"
        raise ValueError(f"targets must name {named}, got {int(targets[row, step])} in sample {row}, step {step}")
    late = written[:, 1:] & (ends | ~written)[:, :-1]
    if bool(late.any()):
        row, step = late.nonzero()[0].tolist()
        raise ValueError(
            f"targets must end with the stop token or with {IGNORED}, got more in sample {row}, step {step + 1}"
        )


def _known(tensor: Tensor) -> bool:
    """Whether its values may be looked at: not on the meta device, nor while a graph is being made."""
    return not (tensor.is_meta or torch.compiler.is_compiling())
