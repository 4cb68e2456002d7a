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
from lathe.representations.relative_representations.comparison import jaccard, largest, middle_rank


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


def search(words: list[str], table: torch.Tensor, queries: torch.Tensor, k: int) -> Found:
    """What an exact index answers: all queries at once, then the answer by name."""
    best = (F.normalize(queries, dim=-1) @ F.normalize(table, dim=-1).T).topk(k)
    return [
        {words[i]: value for i, value in zip(row, values)}
        for row, values in zip(best.indices.tolist(), best.values.tolist())
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

    items, k = 5_000, 10
    space = gaussian(items, 300)
    other = space + 3.0 * gaussian(items, 300)
    words = [f"w{i}" for i in range(items)]
    target_found, query_found = search(words, other, other, k), search(words, other, space, k)
    similarities = F.normalize(space, dim=-1) @ F.normalize(other, dim=-1).T
    true = similarities.diagonal()[:, None]
    near, near_index = largest(similarities, k)
    neighbours = largest(F.normalize(other, dim=-1) @ F.normalize(other, dim=-1).T, k)[1]

    def metrics() -> dict[str, float]:
        rank = middle_rank(near, true)
        inside = (true >= near.amin(1, keepdim=True))[:, 0]
        return {
            "jaccard": float(jaccard(near_index, neighbours).mean()),
            "mrr": float((inside / rank).mean()),
        }

    def whole() -> dict[str, float]:
        scores = retrieval_scores(space, other, k, truncate=True)
        return {name: scores[name] for name in ("jaccard", "mrr")}

    found += [
        Pair(
            f"Jaccard and MRR from given neighbours, {items:,} words, k = {k}",
            ours=metrics,
            peer=lambda: metrics_word_by_word(words, target_found, query_found),
            peer_name="word by word in dictionaries",
            target=20.0,
            tolerance=1e-4,
        ),
        Pair(
            f"Jaccard and MRR with the search, {items:,} words of 300",
            ours=whole,
            peer=lambda: metrics_word_by_word(words, search(words, other, other, k), search(words, other, space, k)),
            peer_name="all similarities at once, then dictionaries",
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
