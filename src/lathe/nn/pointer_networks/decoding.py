"""One loop for greedy, beam, sampled and stochastic-beam decoding, under any constraint.

Legend: B samples, K sequences of each that are being written, C choices, T steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lathe.data.tours import IGNORED
from lathe.nn.pointer_networks.constraints import Constraint, DecodingState, Triangles

if TYPE_CHECKING:
    from lathe.nn.pointer_networks.network import PointSequenceModel

__all__ = ["Decoded", "Strategy", "allowed_choices", "decode"]

Strategy = Literal["greedy", "beam", "sample", "stochastic_beam"]


@dataclass(frozen=True)
class Decoded:
    """Sequences as they were written, the most probable of each sample first.

    Args:
        sequences: choices, with the stop token where the network has one, then -100.
        log_probs: of each sequence under the network, with the constraint where there was one; -inf (and a sequence of
            -100) where a sample has fewer sequences than asked for.
    """

    sequences: Int64[Tensor, "B K T"]
    log_probs: Float[Tensor, "B K"]

    @property
    def best(self) -> Int64[Tensor, "B T"]:
        """The most probable sequence of each sample."""
        return self.sequences[:, 0]


@torch.no_grad()
def decode(
    model: PointSequenceModel,
    points: Tensor,
    *,
    max_len: int | None,
    strategy: Strategy,
    beam: int,
    samples: int,
    valid: Constraint | None,
    lengths: Tensor | None,
    temperature: float,
    length_penalty: float,
    generator: torch.Generator | None,
) -> Decoded:
    """See `PointSequenceModel.decode`."""
    if strategy not in ("greedy", "beam", "sample", "stochastic_beam"):
        raise ValueError(f"strategy must be 'greedy', 'beam', 'sample' or 'stochastic_beam', got {strategy!r}")
    if beam < 1 or samples < 1 or (max_len is not None and max_len < 1):
        raise ValueError(f"beam, samples and max_len must be at least 1, got {beam}, {samples} and {max_len}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    encoded = model.encode(points, lengths)
    B, n, _ = points.shape
    C = n + model.stop_token
    stop = n if model.stop_token else None
    sizes = torch.full((B,), n, device=points.device) if lengths is None else lengths.to(points.device)
    steps = max_len
    if steps is None:
        steps = valid.longest(n) if isinstance(valid, Triangles) else C
    searches = strategy in ("beam", "stochastic_beam")
    K = samples if strategy == "sample" else 1

    # Beams grow out of the one empty prefix.
    state = tuple(part[:, None].expand(-1, K, -1) for part in encoded.state)
    inputs = model.start.expand(B, K, -1)
    prefix = torch.full((B, K, steps), IGNORED, device=points.device)
    visited = torch.zeros(B, K, C, dtype=torch.bool, device=points.device)
    scores = torch.zeros(B, K, dtype=torch.promote_types(points.dtype, torch.float32), device=points.device)
    perturbed = torch.zeros_like(scores)
    written = torch.zeros(B, K, dtype=torch.long, device=points.device)
    ended = torch.zeros(B, K, dtype=torch.bool, device=points.device)
    for step in range(steps):
        if stop is None and max_len is None:
            ended = ended | (step >= sizes[:, None])
        if bool(ended.all()):
            break
        logits, state = model.step(inputs, state, encoded)
        logits = logits.to(scores.dtype)
        if valid is not None:
            logits = logits.masked_fill(~allowed_choices(valid, points, sizes, stop, visited, prefix[..., :step]), -inf)
        stuck = logits.isneginf().all(2) & ~ended
        if bool(stuck.any()):
            lost = (stuck | scores.isneginf()).all(1) if searches else stuck.any(1)
            if bool(lost.any()):
                raise ValueError(f"valid leaves no choice for sample {int(lost.nonzero()[0])} at step {step}")
        # What has ended goes on in one way, at no cost; what is stuck, in none.
        log_p = logits.log_softmax(2).masked_fill((ended | stuck)[..., None], -inf)
        log_p[..., 0] = log_p[..., 0].masked_fill(ended, 0.0)
        if searches:
            total = scores[..., None] + log_p
            if strategy == "stochastic_beam":
                rank = _perturb(total, perturbed, generator)
            else:
                rank = total / _length_scale(written + ~ended, length_penalty)[..., None]
            rank, found = rank.flatten(1).topk(min(beam, K * C), 1)
            parent, choice = found // C, found % C
            K = found.shape[1]
            scores, perturbed = total.flatten(1).gather(1, found), rank
            written, ended = written.gather(1, parent), ended.gather(1, parent)
            prefix, visited = _of_parents(prefix, parent), _of_parents(visited, parent)
            state = tuple(_of_parents(part, parent) for part in state)
        else:
            if strategy == "greedy":
                choice = log_p.argmax(2)
            else:
                weights = (log_p / temperature).softmax(2).flatten(0, 1)
                choice = torch.multinomial(weights, 1, generator=generator).view(B, K)
            scores = scores + log_p.gather(2, choice[..., None])[..., 0]
        prefix[..., step] = choice.masked_fill(ended, IGNORED)
        written = written + ~ended
        visited.scatter_(2, choice[..., None], True)
        ended = ended | scores.isneginf()
        if stop is not None:
            ended = ended | (choice == stop)
        inputs = model.feed_back(points, encoded, choice)

    order = (scores / _length_scale(written, length_penalty)).argsort(1, descending=True)
    scores, written, prefix = scores.gather(1, order), written.gather(1, order), _of_parents(prefix, order)
    longest = int(written.max()) if written.numel() else 0
    return Decoded(prefix.masked_fill(scores.isneginf()[..., None], IGNORED)[..., :longest], scores)


def allowed_choices(
    valid: Constraint, points: Tensor, sizes: Tensor, stop: int | None, visited: Tensor, prefix: Tensor
) -> Tensor:
    """What `valid` says of prefixes (B, K, step): a mask (B, K, C)."""
    B, K, C = visited.shape
    rows = points[:, None].expand(-1, K, -1, -1).flatten(0, 1)
    state = DecodingState(rows, sizes.repeat_interleave(K), visited.flatten(0, 1), stop)
    mask = valid(state, prefix.flatten(0, 1))
    if mask.shape != (B * K, C) or mask.dtype != torch.bool:
        raise ValueError(f"valid must give a bool mask of {(B * K, C)}, got {mask.dtype} of {tuple(mask.shape)}")
    return mask.view(B, K, C)


def _of_parents(tensor: Tensor, parent: Tensor) -> Tensor:
    return tensor.gather(1, parent[..., None].expand(-1, -1, tensor.shape[2]))


def _length_scale(written: Tensor, length_penalty: float) -> Tensor:
    return written.clamp_min(1) ** length_penalty


def _perturb(total: Tensor, parent: Tensor, generator: torch.Generator | None) -> Tensor:
    """Gumbel-perturbed log-probabilities of the continuations, given that their largest is that of their parent.

    The k largest of all sequences are then a sample without replacement (Kool, van Hoof, Welling 2019, arXiv
    1903.06059, section 4.1).
    """
    noise = torch.rand(total.shape, dtype=total.dtype, device=total.device, generator=generator)
    free = total - (-noise.clamp(torch.finfo(total.dtype).tiny, 1 - torch.finfo(total.dtype).eps).log()).log()
    largest = free.amax(2, keepdim=True)
    parent = parent[..., None]
    gap = parent - free + torch.log1p(-(free - largest).exp())
    return torch.where(free.isneginf(), free, parent - gap.relu() - torch.log1p((-gap.abs()).exp()))
