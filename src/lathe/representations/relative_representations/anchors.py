"""Which samples to take as anchors, how good they are, and how to find parallel ones from a few known pairs.

Moschella et al. 2022, arXiv 2209.15430, section 3 (anchors, parallel anchors) and appendix (choice of anchors). The
bootstrap goes beyond the paper; the idea of growing parallel anchors from a seed is that of Cannistraci et al. 2023.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Num, Shaped
from torch import Tensor
from torch.nn import functional as F

from lathe.representations.relative_representations.projection import check_anchors, check_index, relative

if TYPE_CHECKING:
    import altair

__all__ = [
    "AnchorPairs",
    "AnchorQuality",
    "anchor_quality",
    "bootstrap_anchors",
    "gaussian_anchors",
    "parallel_anchors",
    "resample_anchors",
    "select_anchors",
]

METHODS = ("uniform", "fps", "kmeans", "stratified", "frequent")
CHUNK = 1 << 24  # entries of the largest intermediate matrix: 64 MB in float32


def select_anchors(
    samples: Shaped[Tensor, "samples *features"],
    n: int,
    *,
    method: str = "uniform",
    labels: Int[Tensor, " labelled"] | None = None,
    frequencies: Num[Tensor, " counted"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " n"]:
    """Indices of `n` different samples to serve as anchors.

    Args:
        samples: data or latents; "fps" and "kmeans" read them as latents (flattened and L2-normalised).
        n: how many. It is the dimension of the relative space; the paper takes 300 to 768.
        method: "uniform": at random (the paper's main text).
            "fps": farthest point sampling from a random start.
            "kmeans": the sample nearest to each of `n` centroids.
            "stratified": at random, taking the classes of `labels` in turn.
            "frequent": the highest `frequencies`; where None, the first `n` (word vectors come sorted by frequency).
        labels: classes of the samples, for "stratified".
        generator: CPU generator behind every random choice.

    Raises:
        ValueError: an unknown method, `n` below 1 or above the number of samples, labels missing or not one a sample,
            or fewer anchors than classes with "stratified".
    """
    count = len(samples)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not 1 <= n <= count:
        raise ValueError(f"n must be 1 to the {count} samples, got {n}")
    if method == "uniform":
        return torch.randperm(count, generator=generator)[:n]
    if method == "stratified":
        if labels is None or len(labels) != count:
            raise ValueError(f"stratified anchors need labels of the {count} samples, got {_length(labels)}")
        return _stratified(labels.cpu(), n, generator)
    if method == "frequent":
        if frequencies is None:
            return torch.arange(n)
        if len(frequencies) != count:
            raise ValueError(f"frequencies must count the {count} samples, got {len(frequencies)}")
        return frequencies.cpu().argsort(descending=True, stable=True)[:n]
    points = F.normalize(samples.detach().flatten(1).to(torch.promote_types(samples.dtype, torch.float32)), dim=-1)
    return _farthest(points, n, generator) if method == "fps" else _nearest_to_centroids(points, n, generator)


def parallel_anchors(
    pairs: Mapping[Any, Any], n: int, *, generator: torch.Generator | None = None
) -> tuple[list, list]:
    """`n` anchors of domain X and, in the same order, their partners in domain Y, out of a partial bijection X -> Y.

    Raises:
        ValueError: where two of X share a partner, or there are fewer than `n` pairs.
    """
    if len(set(pairs.values())) != len(pairs):
        raise ValueError("pairs must be a bijection, but two items share a partner")
    if not 1 <= n <= len(pairs):
        raise ValueError(f"n must be 1 to the {len(pairs)} pairs, got {n}")
    items = list(pairs.items())
    chosen = [items[i] for i in torch.randperm(len(items), generator=generator)[:n].tolist()]
    return [x for x, _ in chosen], [y for _, y in chosen]


def resample_anchors(
    labels: Int[Tensor, " samples"], per_class: int, *, generator: torch.Generator | None = None
) -> Int[Tensor, " anchors"]:
    """Indices of `per_class` random samples of each class, the first of every class, then the second of every class.

    Drawn anew at each training step and averaged by class, they make coordinates that lean on no single anchor.

    Raises:
        ValueError: where a class has fewer samples.
    """
    classes, counts = labels.unique(return_counts=True)
    if not 1 <= per_class <= int(counts.min()):
        raise ValueError(f"per_class must be 1 to the {int(counts.min())} samples of the rarest class, got {per_class}")
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    return torch.stack([order[labels[order] == c][:per_class] for c in classes]).mT.reshape(-1)


def gaussian_anchors(
    latents: Float[Tensor, "samples features"],
    labels: Int[Tensor, " labelled"],
    per_class: int,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "anchors features"]:
    """Latents drawn from a Gaussian fitted to each class (independent features), in the order of `resample_anchors`.

    Raises:
        ValueError: where labels do not match, `per_class` is below 1, or a class has fewer than two samples.
    """
    if len(labels) != len(latents):
        raise ValueError(f"labels must name the class of each of {len(latents)} latents, got {len(labels)}")
    classes, counts = labels.unique(return_counts=True)
    if per_class < 1 or int(counts.min()) < 2:
        raise ValueError(f"per_class must be positive (got {per_class}) and every class have two samples or more")
    mean = torch.stack([latents[labels == c].mean(0) for c in classes])
    deviation = torch.stack([latents[labels == c].std(0) for c in classes])
    noise = torch.randn(per_class, *mean.shape, generator=generator, dtype=latents.dtype).to(latents.device)
    return (mean + deviation * noise).flatten(0, 1)


# --- quality ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnchorQuality:
    """What a set of anchors can tell apart.

    Args:
        condition: of the Gram matrix of the normalised anchors, over its nonzero eigenvalues. Large: decoding
            similarities back to latents (`translate`) amplifies noise.
        rank, effective_rank: directions that the anchors span, and exp(entropy of their spectrum).
        features: of the latents; anchors of a smaller rank are blind to the rest.
        coverage: cosine of every sample with its nearest anchor.
        nearest: which anchor that is.
        redundancy: largest cosine of each anchor with another one; 1 is a duplicate.
        spectrum: eigenvalues of the Gram matrix, descending.
        per_class: anchors in each class of `classes`; None where no labels were given.
    """

    condition: float
    rank: int
    effective_rank: float
    features: int
    coverage: Float[Tensor, " samples"]
    nearest: Int[Tensor, " samples"]
    redundancy: Float[Tensor, " anchors"]
    spectrum: Float[Tensor, " directions"]
    classes: Int[Tensor, " classes"] | None = None
    per_class: Int[Tensor, " classes"] | None = None

    def __str__(self) -> str:
        told = (
            f"{len(self.redundancy)} anchors span {self.rank} of {self.features} directions "
            f"(effectively {self.effective_rank:.1f}), condition {self.condition:.3g}; nearest anchor at cosine "
            f"{float(self.coverage.mean()):.3f} on average, {float(self.coverage.min()):.3f} at worst; "
            f"closest two anchors at {float(self.redundancy.max()):.3f}"
        )
        if self.classes is None or self.per_class is None:
            return told
        counts = ", ".join(f"{c}: {k}" for c, k in zip(self.classes.tolist(), self.per_class.tolist()))
        return f"{told}; per class {counts}"

    def plot(self) -> altair.Chart:
        """How many samples lie how near to their anchor."""
        import altair as alt

        counts, edges = torch.histogram(self.coverage.double().cpu(), 40)
        rows = [{"from": float(a), "to": float(b), "samples": int(k)} for a, b, k in zip(edges, edges[1:], counts)]
        return (
            alt.Chart(alt.InlineData(values=rows))
            .mark_bar()
            .encode(
                x=alt.X("from:Q", bin="binned", title="cosine with the nearest anchor"),
                x2="to:Q",
                y=alt.Y("samples:Q", title="samples"),
            )
            .properties(width="container", height=260)
        )


def anchor_quality(
    latents: Float[Tensor, "samples features"],
    anchors: Shaped[Tensor, "anchors *anchor_features"],
    labels: Int[Tensor, " labelled"] | None = None,
) -> AnchorQuality:
    """How well anchors (latents, or rows of `latents`) span and cover the samples; `labels` are the samples' classes.

    Raises:
        ValueError: anchors that do not fit, labels of another number, or labels with anchors that are no rows.
    """
    rows = None if anchors.is_floating_point() else anchors
    if labels is not None and (rows is None or len(labels) != len(latents)):
        raise ValueError("labels must be those of the samples, with anchors given as rows of latents")
    chosen = latents[rows].double() if rows is not None else anchors.double()
    check_anchors(chosen)
    unit = F.normalize(chosen, dim=-1)
    spectrum = torch.linalg.svdvals(unit).square()
    kept = spectrum[spectrum > spectrum[0] * (max(unit.shape) * torch.finfo(torch.float64).eps) ** 2]
    share = kept / kept.sum()
    among = unit @ unit.mT
    among.fill_diagonal_(-1.0)
    nearest = [relative(part, chosen.to(part.dtype)).max(-1) for part in latents.split(_rows(len(chosen)))]
    classes = per_class = None
    if labels is not None and rows is not None:
        classes, index = labels.unique(return_inverse=True)
        per_class = torch.bincount(index[rows], minlength=len(classes))
    return AnchorQuality(
        condition=float(kept[0] / kept[-1]),
        rank=len(kept),
        effective_rank=float(torch.exp(-(share * share.log()).sum())),
        features=unit.shape[1],
        coverage=torch.cat([best.values for best in nearest]),
        nearest=torch.cat([best.indices for best in nearest]),
        redundancy=among.amax(-1),
        spectrum=spectrum,
        classes=classes,
        per_class=per_class,
    )


# --- few known pairs, grown ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnchorPairs:
    """Items of two spaces that are taken for the same thing.

    Args:
        a, b: rows of either space, pair by pair; the seed first.
        similarity: cosine of the centred relative coordinates of a pair, in which it was found.
        growth: how many pairs there were after each round.
    """

    a: Int[Tensor, " pairs"]
    b: Int[Tensor, " pairs"]
    similarity: Float[Tensor, " pairs"]
    growth: tuple[int, ...]

    def plot(self) -> altair.Chart:
        """Pairs after each round."""
        import altair as alt

        rows = [{"round": i + 1, "pairs": count} for i, count in enumerate(self.growth)]
        return (
            alt.Chart(alt.InlineData(values=rows))
            .mark_line(point=True)
            .encode(x=alt.X("round:O", title="round"), y=alt.Y("pairs:Q", title="pairs of anchors"))
            .properties(width="container", height=260)
        )


def bootstrap_anchors(
    latents_a: Float[Tensor, "samples_a features_a"],
    latents_b: Float[Tensor, "samples_b features_b"],
    seed_a: Int[Tensor, " pairs_a"],
    seed_b: Int[Tensor, " pairs_b"],
    *,
    n: int,
    rounds: int = 10,
    method: str = "mutual",
    temperature: float = 0.05,
    sinkhorn_steps: int = 50,
) -> AnchorPairs:
    """Grows a few known pairs into `n` parallel anchors, for who cannot translate hundreds.

    Each round tells both spaces relative to the pairs so far (centred cosine), pairs up items that are each other's
    best match, and keeps the seed and the most similar of the others, more of them from round to round. Only the seed
    is held fixed: a wrong pair of an early round is dropped when better anchors tell it apart.

    Args:
        latents_a, latents_b: the two spaces; their widths may differ, and their rows need not correspond.
        seed_a, seed_b: rows that are known to correspond, pair by pair.
        n: how many pairs to end with at most; fewer are returned where fewer are mutual.
        method: "mutual": nearest neighbours, in chunks of bounded memory. "sinkhorn": best matches under the
            doubly stochastic matrix nearest to the similarities, which keeps hubs from attracting everything; holds
            `samples_a x samples_b` in memory.
        temperature, sinkhorn_steps: of "sinkhorn".

    Raises:
        ValueError: seeds that are empty, of different length or out of range, `n` below the seeds or above the samples,
            or an unknown method.
    """
    count = len(seed_a)
    if count == 0 or count != len(seed_b):
        raise ValueError(f"seed_a and seed_b must be pairs, got {count} and {len(seed_b)}")
    for name, seed, latents in (("seed_a", seed_a, latents_a), ("seed_b", seed_b, latents_b)):
        check_index(seed, len(latents), name, "rows of its space")
        if len(seed.unique()) != count:
            raise ValueError(f"{name} must name every row once")
    if not count <= n <= min(len(latents_a), len(latents_b)):
        raise ValueError(f"n must be {count} (the seed) to {min(len(latents_a), len(latents_b))}, got {n}")
    if rounds < 1 or temperature <= 0:
        raise ValueError(f"rounds and temperature must be positive, got {rounds} and {temperature}")
    if method not in ("mutual", "sinkhorn"):
        raise ValueError(f"method must be mutual or sinkhorn, got {method!r}")

    rows_a, rows_b = seed_a, seed_b
    similarity = latents_a.new_ones(count)
    growth = []
    for done in range(1, rounds + 1):
        told_a, told_b = _told(latents_a, rows_a), _told(latents_b, rows_b)
        if method == "mutual":
            best_b, best_a = _best_matches(told_a, told_b)
        else:
            best_b, best_a = _sinkhorn_matches(told_a, told_b, temperature, sinkhorn_steps)
        own = torch.arange(len(told_a), device=best_b.device)
        mutual = best_a[best_b] == own
        mutual[seed_a] = False
        mutual &= ~torch.isin(best_b, seed_b)
        found_a, found_b = own[mutual], best_b[mutual]
        score = (told_a[found_a] * told_b[found_b]).sum(-1)
        wanted = count + round((n - count) * done / rounds)
        keep = score.argsort(descending=True)[: wanted - count]
        rows_a, rows_b = torch.cat([seed_a, found_a[keep]]), torch.cat([seed_b, found_b[keep]])
        similarity = torch.cat([(told_a[seed_a] * told_b[seed_b]).sum(-1), score[keep]])
        growth.append(len(rows_a))
    return AnchorPairs(rows_a, rows_b, similarity, tuple(growth))


def _told(latents: Tensor, anchors: Tensor) -> Tensor:
    """Unit rows of relative coordinates that any two spaces share: each column (anchor) free of its mean."""
    coordinates = relative(latents, anchors, center=True)
    return F.normalize(coordinates - coordinates.mean(0), dim=-1)


def _best_matches(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each row of `a` the nearest of `b`, and the reverse, from one pass over chunks of the similarities."""
    best_b, offset = [], 0
    best = a.new_full((len(b),), -torch.inf)
    best_a = torch.zeros(len(b), dtype=torch.long, device=a.device)
    for chunk in a.split(_rows(len(b))):
        similarity = chunk @ b.mT
        best_b.append(similarity.argmax(1))
        value, row = similarity.max(0)
        best_a = torch.where(value > best, row + offset, best_a)
        best = torch.maximum(best, value)
        offset += len(chunk)
    return torch.cat(best_b), best_a


def _sinkhorn_matches(a: Tensor, b: Tensor, temperature: float, steps: int) -> tuple[Tensor, Tensor]:
    plan = (a @ b.mT) / temperature
    for _ in range(steps):
        plan = plan - plan.logsumexp(1, keepdim=True)
        plan = plan - plan.logsumexp(0, keepdim=True)
    return plan.argmax(1), plan.argmax(0)


# --- one way of choosing after the other -----------------------------------------------------------------------------


def _stratified(labels: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    classes = labels.unique()
    if n < len(classes):
        raise ValueError(f"n must be at least the {len(classes)} classes for stratified anchors, got {n}")
    order = torch.randperm(len(labels), generator=generator)
    queues = [order[labels[order] == c] for c in classes]
    turn = torch.cat([torch.arange(len(queue)) for queue in queues])
    # A stable sort by turn takes the first of every class, then the second of every class that has one.
    return torch.cat(queues)[turn.argsort(stable=True)][:n]


def _farthest(points: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    """Greedy max-min on the unit sphere, with one running vector of similarities to the nearest chosen point."""
    chosen = torch.empty(n, dtype=torch.long, device=points.device)
    chosen[0] = torch.randint(len(points), (1,), generator=generator)[0]
    nearest = points.new_full((len(points),), -torch.inf)
    for i in range(1, n):
        torch.maximum(nearest, torch.mv(points, points[chosen[i - 1]]), out=nearest)
        nearest[chosen[i - 1]] = torch.inf  # its own similarity is 1 up to rounding; a duplicate may be chosen, it not
        chosen[i] = nearest.argmin()
    return chosen.cpu()


def _nearest_to_centroids(points: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
    from sklearn.cluster import KMeans

    seed = int(torch.randint(2**31 - 1, (1,), generator=generator))
    centroids = KMeans(n, n_init=1, random_state=seed).fit(points.cpu().numpy()).cluster_centers_
    distances = torch.cdist(torch.from_numpy(centroids).to(points), points)
    taken = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    chosen = []
    for row in distances:  # two centroids may share their nearest sample: the second takes the next
        best = int(row.masked_fill(taken, torch.inf).argmin())
        taken[best] = True
        chosen.append(best)
    return torch.tensor(chosen)


def _rows(columns: int) -> int:
    return max(1, CHUNK // max(columns, 1))


def _length(labels: Tensor | None) -> str:
    return "none" if labels is None else str(len(labels))
