"""Word2Vec (CBOW with negative sampling) at any width, the infinite one included.

Yang and Hu, 2020, arXiv 2011.14522, section 7.1 and appendix D; the model of Mikolov et al., 2013, arXiv 1301.3781. In
muP with a readout that starts at zero, the infinitely wide network is the one of width `vocab_size` whose embedding
starts as the identity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["InfiniteWord2Vec", "Word2Vec"]

#: Logits beyond this count as certain, as in word2vec.
_CERTAIN = 6.0


class Word2Vec(nn.Module):
    """Predicts a word from the mean embedding of the words around it; embeddings and readout are trained by SGD.

    Finite width in muP: embeddings start uniform with variance `1/width`, the readout at zero, and rates do not depend
    on the width.

    Args:
        vocab_size: number of words.
        width: of the embeddings.
        generator: draws them.

    Attributes:
        embedding: one row a word as context, `(vocab_size, width)`.
        readout: one row a word as what is predicted, `(vocab_size, width)`.

    Raises:
        ValueError: for fewer than two words or a width below one.
    """

    embedding: Tensor
    readout: Tensor

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if vocab_size < 2 or width < 1:
            raise ValueError(f"vocab_size must be at least 2 and width at least 1, got {vocab_size} and {width}")
        reach = (3 / width) ** 0.5
        self._take(torch.rand(vocab_size, width, generator=generator, dtype=dtype).mul_(2).sub_(1).mul_(reach))

    def _take(self, embedding: Tensor) -> None:
        nn.Module.__init__(self)
        self.register_buffer("embedding", embedding)
        self.register_buffer("readout", torch.zeros_like(embedding))

    @property
    def vocab_size(self) -> int:
        return len(self.embedding)

    def forward(
        self, contexts: Int[Tensor, "batch around"], mask: Float[Tensor, "batch around"] | None = None
    ) -> Float[Tensor, "batch vocab_size"]:
        """Logits of all words; `mask` is zero where a context is shorter."""
        mask = torch.ones_like(contexts, dtype=self.embedding.dtype) if mask is None else mask
        return self._mean(contexts, mask) @ self.readout.mT

    @torch.no_grad()
    def train_epoch(
        self,
        tokens: Int[Tensor, " count"],
        *,
        lr: float = 0.05,
        end_lr: float | None = None,
        window: int = 8,
        negatives: int = 25,
        subsample: float = 1e-4,
        weight_decay: float = 1e-3,
        batch_size: int = 256,
        counts: Int[Tensor, " vocab_size"] | None = None,
        generator: torch.Generator | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> float:
        """One pass over a text, every word once a centre, in random order; the mean loss on the way.

        The steps of a batch are computed from the same weights and added up, so that `batch_size=1` is word2vec.

        Args:
            tokens: the text, as places in the vocabulary.
            lr: rate at the start, of each centre's own loss.
            end_lr: rate at the end, linear in between; by default `lr`.
            window: a context reaches up to this many words to both sides, fewer by chance.
            negatives: words that are not the centre, for each centre, drawn from the counts to the power 3/4.
            subsample: words of a share above about this are skipped by chance; 0 for never.
            weight_decay: a row that is touched is multiplied by `1 - lr * weight_decay`.
            counts: how often each word occurs; by default in `tokens`.
            generator: draws everything.
            progress: told centres done and in all.

        Raises:
            ValueError: for a text of fewer than two words, or words outside of the vocabulary.
        """
        counts = self._counts(tokens, counts)
        noise = counts.double().pow(0.75)
        if subsample > 0:
            share = counts.double() / counts.sum()
            keep = ((share / subsample).sqrt() + 1) * (subsample / share)
            drawn = torch.rand(len(tokens), generator=generator, dtype=torch.float64).to(tokens.device)
            tokens = tokens[drawn < keep[tokens]]
        order = torch.randperm(len(tokens), generator=generator).to(tokens.device)
        total = 0.0
        for first in range(0, len(order), batch_size):
            centres = order[first : first + batch_size]
            reach = torch.randint(1, window + 1, (len(centres), 1), generator=generator).to(tokens.device)
            contexts, mask = _contexts(tokens, centres, window, reach)
            others = self._negatives(noise, len(centres), negatives, generator)
            rate = lr if end_lr is None else lr + (end_lr - lr) * first / len(order)
            total += self._step(contexts, mask, tokens[centres], others, rate, weight_decay)
            if progress is not None:
                progress(first, len(order))
        return total / max(1, len(order))

    @torch.no_grad()
    def loss(
        self,
        tokens: Int[Tensor, " count"],
        *,
        window: int = 8,
        negatives: int = 25,
        counts: Int[Tensor, " vocab_size"] | None = None,
        batch_size: int = 1024,
        generator: torch.Generator | None = None,
    ) -> float:
        """The mean over a text of the loss that `train_epoch` descends, all contexts reaching `window` words."""
        noise = self._counts(tokens, counts).double().pow(0.75)
        total = 0.0
        for centres in torch.arange(len(tokens), device=tokens.device).split(batch_size):
            contexts, mask = _contexts(tokens, centres, window, torch.full((len(centres), 1), window).to(tokens))
            others = self._negatives(noise, len(centres), negatives, generator)
            words = torch.cat([tokens[centres].unsqueeze(1), others], 1)
            total += _losses(self._logits(self._mean(contexts, mask), words), words).sum().item()
        return total / len(tokens)

    def _counts(self, tokens: Tensor, counts: Tensor | None) -> Tensor:
        if len(tokens) < 2 or tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise ValueError(f"tokens must be at least two places in a vocabulary of {self.vocab_size} words")
        return torch.bincount(tokens, minlength=self.vocab_size) if counts is None else counts

    def _negatives(self, noise: Tensor, batch: int, count: int, generator: torch.Generator | None) -> Tensor:
        """Words from the noise distribution, by its inverse."""
        cumulated = noise.cumsum(0)
        drawn = torch.rand(batch, count, generator=generator, dtype=torch.float64).to(noise.device) * cumulated[-1]
        return torch.searchsorted(cumulated, drawn, right=True).clamp_max(self.vocab_size - 1)

    def _mean(self, contexts: Tensor, mask: Tensor) -> Tensor:
        weights = (mask / mask.sum(1, keepdim=True).clamp_min(1)).to(self.embedding.dtype)
        return F.embedding_bag(contexts, self.embedding, per_sample_weights=weights, mode="sum")

    def _logits(self, mean: Tensor, words: Tensor) -> Tensor:
        """Products of each mean with some rows of the readout: all products, where there are not many words."""
        if self.vocab_size <= 48 * words.shape[1]:
            return (mean @ self.readout.mT).gather(1, words)
        # One row for each mean at a time, so that what is gathered stays in the cache.
        return torch.stack([(self.readout.index_select(0, column) * mean).sum(-1) for column in words.unbind(1)], 1)

    def _step(
        self, contexts: Tensor, mask: Tensor, centres: Tensor, others: Tensor, rate: float, weight_decay: float
    ) -> float:
        mean = self._mean(contexts, mask)
        words = torch.cat([centres.unsqueeze(1), others], 1)
        logits = self._logits(mean, words)
        told = torch.where(logits.abs() > _CERTAIN, (logits > 0).to(logits), logits.sigmoid())
        # A negative that is the centre by chance does not count.
        g = -rate * told
        g[:, 0] += rate
        g[:, 1:].masked_fill_(others == centres.unsqueeze(1), 0.0)
        back = F.embedding_bag(words, self.readout, per_sample_weights=g, mode="sum")
        shares = (mask / mask.sum(1, keepdim=True).clamp_min(1)).to(g)
        decay = 1 - rate * weight_decay
        _add_rows(self.readout, words, g, mean, decay)
        _add_rows(self.embedding, contexts, shares, back, decay)
        return _losses(logits, words).sum().item()


class InfiniteWord2Vec(Word2Vec):
    """The limit of `Word2Vec` as its width grows, exactly: of width `vocab_size`, and quadratic in it in memory.

    Args:
        vocab_size: number of words.

    Raises:
        ValueError: for fewer than two words.
    """

    def __init__(
        self, vocab_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2, got {vocab_size}")
        self._take(torch.eye(vocab_size, device=device, dtype=dtype))


def _contexts(tokens: Tensor, centres: Tensor, window: int, reach: Tensor) -> tuple[Tensor, Tensor]:
    """The words around each centre, `(batch, 2 window)`, and which of them count."""
    away = torch.arange(-window, window + 1, device=tokens.device)
    away = away[away != 0]
    places = centres.unsqueeze(1) + away
    mask = (places >= 0) & (places < len(tokens)) & (away.abs() <= reach)
    return tokens[places.clamp(0, len(tokens) - 1)], mask.to(torch.get_default_dtype())


def _losses(logits: Tensor, words: Tensor) -> Tensor:
    """`-log sigmoid(f_centre) - sum log sigmoid(-f_negative)`, one a row."""
    counts = words[:, 1:] != words[:, :1]
    return F.softplus(-logits[:, 0]) + (F.softplus(logits[:, 1:]) * counts).sum(1)


def _add_rows(matrix: Tensor, rows: Tensor, weights: Tensor, values: Tensor, decay: float) -> None:
    """Adds `weights[i, k] * values[i]` to row `rows[i, k]`; a row is multiplied by `decay` for each of its weights."""
    where = weights.flatten().nonzero().squeeze(1)
    order = where[rows.flatten()[where].argsort(stable=True)]
    touched, count = torch.unique_consecutive(rows.flatten()[order], return_counts=True)
    sums = F.embedding_bag(
        order // rows.shape[1],
        values,
        offsets=count.cumsum(0) - count,
        per_sample_weights=weights.flatten()[order],
        mode="sum",
    )
    matrix[touched] = torch.addcmul(sums, matrix[touched], (decay**count).to(matrix).unsqueeze(1))
