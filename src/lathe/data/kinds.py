"""What `load` gives: tensors in memory with names, one frozen class for each kind of data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

__all__ = ["Fields", "Graph", "Graphs", "Images", "OneShot", "Ratings", "Text", "Views"]


@dataclass(frozen=True)
class Images:
    """Labelled images: `inputs` in 0..255, `labels` in 0..len(names)-1."""

    inputs: UInt8[Tensor, "count channels height width"]
    labels: Int64[Tensor, " count"]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def float(self) -> Float32[Tensor, "count channels height width"]:
        """The images in [0, 1]."""
        return self.inputs.float().div_(255)

    def subset(self, n: int, generator: torch.Generator | None = None) -> Images:
        """`n` of the images without repetition: drawn with `generator`, the first `n` where there is none.

        Raises:
            ValueError: where there are fewer than `n`.
        """
        if not 0 < n <= len(self):
            raise ValueError(f"n must be between 1 and {len(self)}, got {n}")
        chosen = torch.arange(n) if generator is None else torch.randperm(len(self), generator=generator)[:n]
        return replace(self, inputs=self.inputs[chosen], labels=self.labels[chosen])


@dataclass(frozen=True)
class OneShot:
    """Runs of one-shot classification: one image of each class to learn from, and images to tell the class of.

    `answers[run, query]` is the place in `support[run]` of the class of `queries[run, query]`.
    """

    support: UInt8[Tensor, "runs ways channels height width"]
    queries: UInt8[Tensor, "runs queries channels height width"]
    answers: Int64[Tensor, "runs queries"]

    def __len__(self) -> int:
        return len(self.answers)


@dataclass(frozen=True)
class Text:
    """Running text, as it stands in the file."""

    content: str

    def __len__(self) -> int:
        return len(self.content)

    def characters(self, vocabulary: tuple[str, ...] | None = None) -> tuple[Int64[Tensor, " count"], tuple[str, ...]]:
        """The text as places in a sorted vocabulary of its characters, or in the one given.

        Raises:
            ValueError: where the text has a character that is not in `vocabulary`.
        """
        vocabulary = vocabulary or tuple(sorted(set(self.content)))
        return _encode(self.content, vocabulary, None, "character"), vocabulary

    def words(
        self, vocabulary: tuple[str, ...] | None = None, *, unknown: str = "<unk>", end_of_line: str = "<eos>"
    ) -> tuple[Int64[Tensor, " count"], tuple[str, ...]]:
        """The text as places in a vocabulary of its words, the most frequent first, or in the one given.

        Words are what stands between spaces; each line ends in `end_of_line`; other words are `unknown`, where the
        vocabulary has it.

        Raises:
            ValueError: where the text has a word that is not in `vocabulary`, which has no `unknown` either.
        """
        words = [word for line in self.content.splitlines() for word in (*line.split(), end_of_line)]
        if vocabulary is None:
            counts = Counter(words)
            vocabulary = tuple(sorted(counts, key=lambda word: (-counts[word], word)))
        return _encode(words, vocabulary, unknown, "word"), vocabulary


@dataclass(frozen=True)
class Ratings:
    """Who rated what, when, and how: a row per rating; users and items are counted from 0.

    `user_ids[users]` and `item_ids[items]` are the numbers in the file; `times` are seconds since 1970 (UTC).
    """

    users: Int64[Tensor, " count"]
    items: Int64[Tensor, " count"]
    values: Float32[Tensor, " count"]
    times: Int64[Tensor, " count"]
    user_ids: Int64[Tensor, " users"]
    item_ids: Int64[Tensor, " items"]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> tuple[int, int]:
        """Number of users and of items."""
        return len(self.user_ids), len(self.item_ids)


@dataclass(frozen=True)
class Graph:
    """A graph with a feature vector and a label for each node.

    `edges` holds each edge of the undirected graph in both directions, sorted, without loops.
    """

    features: Float32[Tensor, "nodes features"]
    edges: Int64[Tensor, "2 edges"]
    labels: Int64[Tensor, " nodes"]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Graphs:
    """Simple undirected graphs on equally many nodes: symmetric 0/1 matrices with zeros on the diagonal."""

    adjacency: UInt8[Tensor, "count nodes nodes"]

    def __len__(self) -> int:
        return len(self.adjacency)


@dataclass(frozen=True)
class Fields:
    """Pairs of functions on a grid: the operator to learn maps `inputs` to `outputs`."""

    inputs: Float32[Tensor, "count channels *grid"]
    outputs: Float32[Tensor, "count out_channels *out_grid"]

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class Views:
    """Photographs of one scene: RGBA in 0..255 with straight alpha, and where each camera stood.

    `poses` take camera coordinates (x right, y up, looking along -z) to the world's; `focal` is in pixels.
    """

    images: UInt8[Tensor, "count 4 height width"]
    poses: Float32[Tensor, "count 4 4"]
    focal: float

    def __len__(self) -> int:
        return len(self.images)

    def over(self, background: float = 1.0) -> Float32[Tensor, "count 3 height width"]:
        """Colours in [0, 1] over a background of one grey; white is the field's custom."""
        images = self.images.float().div_(255)
        colour, alpha = images[:, :3], images[:, 3:]
        return colour * alpha + background * (1 - alpha)


def _encode(tokens: str | list[str], vocabulary: tuple[str, ...], unknown: str | None, what: str) -> Tensor:
    places = {token: place for place, token in enumerate(vocabulary)}
    if len(places) != len(vocabulary):
        raise ValueError(f"vocabulary must name each {what} once, got {len(vocabulary) - len(places)} repeated")
    fallback = places.get(unknown) if unknown is not None else None
    if fallback is None:
        strange = next((token for token in tokens if token not in places), None)
        if strange is not None:
            raise ValueError(f"vocabulary must hold every {what} of the text, got none for {strange!r}")
        return torch.tensor([places[token] for token in tokens], dtype=torch.int64)
    return torch.tensor([places.get(token, fallback) for token in tokens], dtype=torch.int64)
