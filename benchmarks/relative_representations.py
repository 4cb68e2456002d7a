"""Relative representations against what the authors' repository does, told in our words.

That is: a module that normalises both sides and checks its options at each call, and retrieval metrics that go word by
word through dictionaries.
"""

from __future__ import annotations

from enum import Enum, auto

import torch
from harness import Pair
from torch import nn
from torch.nn import functional as F

from lathe.representations.relative_representations import RelativeRepresentation, retrieval_scores, select_anchors
from lathe.representations.relative_representations.comparison import jaccard, middle_rank


class Normalization(Enum):
    NONE = auto()
    L2 = auto()


class Similarity(Enum):
    INNER = auto()
    BASIS = auto()


class AuthorsProjection(nn.Module):
    """As in the authors' attention module: options are enums, looked at in each call; both sides normalised then."""

    def __init__(self, normalization: str = "L2", similarity: str = "INNER") -> None:
        super().__init__()
        self.normalization, self.similarity = Normalization[normalization], Similarity[similarity]

    def forward(self, x: torch.Tensor, anchors: torch.Tensor) -> dict[str, torch.Tensor]:
        if x.shape[-1] != anchors.shape[-1]:
            raise ValueError("different widths")
        original_anchors = anchors
        if self.normalization == Normalization.L2:
            x, anchors = F.normalize(x, p=2, dim=-1), F.normalize(anchors, p=2, dim=-1)
        if self.similarity == Similarity.INNER:
            similarities = torch.einsum("bm,am->ba", x, anchors)
            if self.normalization == Normalization.NONE:
                similarities = similarities / x.shape[-1] ** 0.5
        else:
            similarities = torch.linalg.lstsq(anchors.T, x.T).solution.T
        return {"similarities": similarities, "anchors": original_anchors}


Found = list[dict[str, float]]  # for each word its neighbours, nearest first, with their similarity


def search_by_chunks(queries: torch.Tensor, table: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarities and places of the nearest `k`, nearest first."""
    best = [(part @ table.T).topk(k) for part in queries.split(1000)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])


def by_name(words: list[str], values: torch.Tensor, indices: torch.Tensor) -> Found:
    """The answer of a search as dictionaries."""
    return [
        {words[i]: value for i, value in zip(places, row)} for places, row in zip(indices.tolist(), values.tolist())
    ]


def metrics_word_by_word(words: list[str], target: Found, found: Found) -> dict[str, float]:
    """Neighbours by word, their names as sets, their places as dictionaries."""
    target_of, found_of = dict(zip(words, target)), dict(zip(words, found))
    target_names = {word: set(target_of[word].keys()) for word in words}
    found_names = {word: set(found_of[word].keys()) for word in words}
    jaccards = {
        word: len(set.intersection(target_names[word], found_names[word]))
        / len(set.union(target_names[word], found_names[word]))
        for word in words
    }
    places = {word: {name: i for i, name in enumerate(near.keys(), start=1)} for word, near in found_of.items()}
    reciprocal = {word: 1 / place[word] if word in place else 0.0 for word, place in places.items()}
    return {"jaccard": sum(jaccards.values()) / len(words), "mrr": sum(reciprocal.values()) / len(words)}


def farthest_by_all_distances(points: torch.Tensor, n: int, start: int) -> torch.Tensor:
    """Each new point by its distances to all that are chosen, taken anew."""
    points = F.normalize(points, dim=-1)
    chosen = [start]
    while len(chosen) < n:
        nearest = torch.cdist(points, points[chosen]).amin(1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


def pairs() -> list[Pair]:
    generator = torch.Generator().manual_seed(0)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    found = []
    for title, n, d, m in (
        ("20,000 word vectors of 300 on 300 anchors", 20_000, 300, 300),
        ("batch of 128 latents of 1024 on 500 anchors", 128, 1024, 500),
        ("one latent of 768 on 768 anchors", 1, 768, 768),
    ):
        x, anchors = gaussian(n, d), gaussian(m, d)
        ours, theirs = RelativeRepresentation(anchors), AuthorsProjection()
        found.append(
            Pair(
                f"cosine projection, {title}",
                ours=torch.no_grad()(lambda x=x, ours=ours: ours(x)),
                peer=torch.no_grad()(lambda x=x, a=anchors, theirs=theirs: theirs(x, a)["similarities"]),
                peer_name="the authors' formulation",
                target=1.0,
                tolerance=1e-5,
            )
        )
    x, anchors = gaussian(2000, 128).requires_grad_(), gaussian(500, 128)
    trained, theirs = RelativeRepresentation(), AuthorsProjection()

    def backward(similarities: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(similarities.square().sum(), x)[0]

    found.append(
        Pair(
            "cosine projection with its gradient, 2,000 latents of 128 on 500 anchors",
            ours=lambda: backward(trained(x, anchors)),
            peer=lambda: backward(theirs(x, anchors)["similarities"]),
            peer_name="the authors' formulation",
            target=1.0,
            tolerance=1e-4,
        )
    )
    square, wide = RelativeRepresentation(gaussian(256, 256), similarity="basis"), gaussian(64, 256)
    basis = AuthorsProjection("NONE", "BASIS")
    found.append(
        Pair(
            "change of basis, 64 latents of 256 on 256 anchors",
            ours=torch.no_grad()(lambda: square(wide)),
            peer=torch.no_grad()(lambda: basis(wide, square.anchors)["similarities"]),
            peer_name="the authors' formulation",
            target=1.0,
            tolerance=1e-2,  # the least squares problem is conditioned like a random square matrix, in float32
        )
    )

    # The paper's 20,000 words. Neighbours are found once, in few dimensions; what is timed is what comes after.
    words, k = [f"w{i}" for i in range(20_000)], 10
    target = F.normalize(gaussian(20_000, 16), dim=-1)
    query = F.normalize(target + 0.2 * gaussian(20_000, 16), dim=-1)
    near, near_index = search_by_chunks(query, target, k)
    neighbours = search_by_chunks(target, target, k)[1]
    target_found = by_name(words, *search_by_chunks(target, target, k))
    query_found = by_name(words, near, near_index)
    # An item that is found has its similarity among the values; one that is not lies below them all.
    own = near_index == torch.arange(len(words))[:, None]
    true = torch.where(own.any(1), near.masked_fill(~own, -2).amax(1), -1.0)[:, None]

    def metrics() -> dict[str, float]:
        rank = middle_rank(near, true)
        inside = (true >= near[:, -1:])[:, 0]
        return {
            "jaccard": float(jaccard(near_index, neighbours).mean()),
            "mrr": float((inside / rank).mean()),
        }

    space = gaussian(5_000, 300)
    other = space + 3.0 * gaussian(5_000, 300)

    def whole() -> dict[str, float]:
        scores = retrieval_scores(space, other, k, truncate=True)
        return {name: scores[name] for name in ("jaccard", "mrr")}

    def whole_word_by_word() -> dict[str, float]:
        table, queries = F.normalize(other, dim=-1), F.normalize(space, dim=-1)
        names = words[:5_000]
        found_of_both = (by_name(names, *search_by_chunks(side, table, k)) for side in (table, queries))
        return metrics_word_by_word(names, *found_of_both)

    found += [
        Pair(
            "Jaccard and MRR from given neighbours, 20,000 words, k = 10",
            ours=metrics,
            peer=lambda: metrics_word_by_word(words, target_found, query_found),
            peer_name="word by word in dictionaries",
            target=20.0,
            tolerance=1e-4,
        ),
        Pair(
            "Jaccard and MRR with the search, 5,000 words of 300, k = 10",
            ours=whole,
            peer=whole_word_by_word,
            peer_name="search in chunks, then dictionaries",
            target=1.0,
            tolerance=1e-4,
        ),
    ]
    points = gaussian(20_000, 300)

    def start() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    first_index = int(torch.randint(len(points), (1,), generator=start()))
    found.append(
        Pair(
            "farthest point sampling, 40 of 20,000",
            ours=lambda: select_anchors(points, 40, method="fps", generator=start()),
            peer=lambda: farthest_by_all_distances(points, 40, first_index),
            peer_name="distances to all chosen, each time",
            target=1.0,
            tolerance=0.0,
        )
    )
    return found
