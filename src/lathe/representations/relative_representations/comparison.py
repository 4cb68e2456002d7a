"""How alike two latent spaces are: retrieval, alignment, similarity to a reference, and a table of all pairs of models.

Moschella et al. 2022, arXiv 2209.15430, sections 4.1 (`retrieval_scores`) and 4.2 (`latent_similarity`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.core.matching import linear_cka
from lathe.core.modes import evaluating
from lathe.representations.relative_representations.anchors import select_anchors
from lathe.representations.relative_representations.modules import RelativeEncoder
from lathe.representations.relative_representations.projection import Similarity, relative
from lathe.representations.relative_representations.stitching import stitch

if TYPE_CHECKING:
    import altair

__all__ = ["Comparison", "compare", "latent_similarity", "linear_cka", "retrieval_scores"]

CHUNK = 1 << 24  # entries of the similarities held at a time: 64 MB in float32
BLOCK = 64


def retrieval_scores(
    space1: Float[Tensor, "items1 features1"],
    space2: Float[Tensor, "items2 features2"],
    k: int = 10,
    *,
    truncate: bool = False,
) -> dict[str, float]:
    """Whether the items of one space find themselves in another (section 4.1); rows are L2-normalised first.

    For item i, T is the set of the `k` nearest neighbours of its second vector in the second space, Q that of its first
    vector in the second space (the item itself included).

    Args:
        space1, space2: the same items, row by row, in the same coordinates (for instance relative ones). Leave anchors
            out: an anchor knows its own column and inflates the scores.
        k: neighbours compared.
        truncate: count a reciprocal rank below `k` as 0, as the authors' code does; otherwise the full ranking counts.

    Returns:
        "jaccard": mean of |T and Q| / |T or Q|; "mrr": mean of 1 / rank of the item itself (ties at their middle rank);
        "cosine": mean cosine of an item's two vectors. Memory is bounded: the items x items matrix never exists.

    Raises:
        ValueError: where the spaces differ in shape, or `k` is not 1 to the number of items.
    """
    if space1.shape != space2.shape:
        raise ValueError(f"space1 and space2 must have one shape, got {tuple(space1.shape)} and {tuple(space2.shape)}")
    items = len(space1)
    if not 1 <= k <= items:
        raise ValueError(f"k must be 1 to the {items} items, got {k}")
    queries, targets = (F.normalize(space.detach(), dim=-1) for space in (space1, space2))
    rows = max(1, CHUNK // items)
    overlap = reciprocal = 0.0
    for start in range(0, items, rows):
        own = slice(start, min(start + rows, items))
        to_found = queries[own] @ targets.mT
        among = targets[own] @ targets.mT
        true = to_found.gather(1, torch.arange(own.start, own.stop, device=targets.device)[:, None])
        (near, found), (_, neighbours) = largest(to_found, k), largest(among, k)
        rank = middle_rank(near, true)
        # Above the k-th value the k nearest tell the rank; the whole row is counted for the others only.
        beyond = (true <= near.amin(1, keepdim=True))[:, 0].nonzero()[:, 0]
        rank[beyond] = middle_rank(to_found[beyond], true[beyond])
        score = 1 / rank
        reciprocal += float((score * (rank <= k) if truncate else score).sum())
        overlap += float(jaccard(found, neighbours).sum())
    cosine = float((queries * targets).sum(1).mean(dtype=torch.float64))
    return {"jaccard": overlap / items, "mrr": reciprocal / items, "cosine": cosine}


def largest(
    values: Float[Tensor, "rows columns"], k: int
) -> tuple[Float[Tensor, "rows best"], Int[Tensor, "rows best"]]:
    """The `k` largest values of each row and their columns, in no order.

    The k largest lie in the k blocks with the largest maxima, and maxima of blocks are far cheaper than a selection
    over the whole row.
    """
    columns = values.shape[1]
    whole = columns // BLOCK * BLOCK
    if whole // BLOCK < 4 * k:
        best = values.topk(k, 1, sorted=False)
        return best.values, best.indices
    blocks = values[:, :whole].unflatten(1, (-1, BLOCK))
    chosen = blocks.amax(2).topk(k, 1, sorted=False).indices
    inside = (chosen[:, :, None] * BLOCK + torch.arange(BLOCK, device=values.device)).flatten(1)
    rest = torch.arange(whole, columns, device=values.device).expand(len(values), -1)
    candidates = torch.cat([inside, rest], 1)
    best = values.gather(1, candidates).topk(k, 1, sorted=False)
    return best.values, candidates.gather(1, best.indices)


def jaccard(one: Int[Tensor, "rows k"], other: Int[Tensor, "rows k"]) -> Float[Tensor, " rows"]:
    """Share of common members of two sets of `k` each, row by row: |A and B| / |A or B|."""
    shared = (one[:, :, None] == other[:, None, :]).sum((1, 2)).double()
    return shared / (2 * one.shape[1] - shared)


def middle_rank(values: Float[Tensor, "rows columns"], true: Float[Tensor, "rows 1"]) -> Float[Tensor, " rows"]:
    """Rank of `true` among each row's values, which hold it; ties count half."""
    return (values > true).sum(1).double() + ((values == true).sum(1).double() + 1) / 2


def latent_similarity(
    relative1: Float[Tensor, "items1 anchors1"], relative2: Float[Tensor, "items2 anchors2"], *, center: bool = False
) -> float:
    """Mean cosine of the items' relative coordinates in two models (section 4.2).

    Against a good reference model it predicts a model's accuracy without labels. `center` takes each column's mean off
    first, which spreads out the values of latents that all point one way.

    Raises:
        ValueError: where the shapes differ.
    """
    if relative1.shape != relative2.shape:
        raise ValueError(
            f"relative1 and relative2 must have one shape, got {tuple(relative1.shape)} and {tuple(relative2.shape)}"
        )
    if center:
        relative1, relative2 = relative1 - relative1.mean(0), relative2 - relative2.mean(0)
    return float(F.cosine_similarity(relative1, relative2, dim=-1).mean(dtype=torch.float64))


@dataclass(frozen=True)
class Comparison:
    """Every pair of models compared: entry [i, j] of a matrix is model i against model j.

    Args:
        names: the models.
        cka: linear CKA of the latents.
        jaccard, mrr, cosine: `retrieval_scores` of the relative coordinates, from i to j.
        stitching: loss of encoder i under head j (on the diagonal: unstitched); NaN where j has no head.
        items, anchors: how many of each stand behind the numbers; anchors are not among the items.
    """

    names: tuple[str, ...]
    cka: Float[Tensor, "models models"]
    jaccard: Float[Tensor, "models models"]
    mrr: Float[Tensor, "models models"]
    cosine: Float[Tensor, "models models"]
    stitching: Float[Tensor, "models models"]
    items: int
    anchors: int

    def rows(self) -> list[dict[str, Any]]:
        """One record an ordered pair of models."""
        columns = ("cka", "jaccard", "mrr", "cosine", "stitching")
        return [
            {"encoder": a, "against": b} | {column: float(getattr(self, column)[i, j]) for column in columns}
            for i, a in enumerate(self.names)
            for j, b in enumerate(self.names)
        ]

    def __str__(self) -> str:
        wide = max(map(len, (*self.names, "against")))
        columns = f"{'CKA':>6}  {'Jaccard':>7}  {'MRR':>6}  {'cosine':>6}  stitching loss"
        head = f"{'encoder':<{wide}}  {'against':<{wide}}  {columns}"
        lines = [
            f"{row['encoder']:<{wide}}  {row['against']:<{wide}}  {row['cka']:6.3f}  {row['jaccard']:7.3f}  "
            f"{row['mrr']:6.3f}  {row['cosine']:6.3f}  "
            + (f"{row['stitching']:14.4g}" if math.isfinite(row["stitching"]) else f"{'-':>14}")
            for row in self.rows()
        ]
        return "\n".join([head, *lines])

    def plot(self, measure: str = "mrr") -> altair.LayerChart | altair.FacetChart:
        """One measure of all pairs, as a matrix.

        Raises:
            ValueError: for a measure that is none of the table's.
        """
        import altair as alt

        measures = {"cka": "CKA", "jaccard": "Jaccard", "mrr": "MRR", "cosine": "cosine", "stitching": "stitching loss"}
        if measure not in measures:
            raise ValueError(f"measure must be one of {', '.join(measures)}, got {measure!r}")
        rows = [row | {measure: None if math.isnan(row[measure]) else row[measure]} for row in self.rows()]
        told = alt.Chart(alt.InlineData(values=rows)).encode(
            x=alt.X("against:N", sort=list(self.names), title="against"),
            y=alt.Y("encoder:N", sort=list(self.names), title="encoder"),
        )
        cells = told.mark_rect(opacity=0.6).encode(color=alt.Color(f"{measure}:Q", title=measures[measure]))
        text = told.mark_text().encode(text=alt.Text(f"{measure}:Q", format=".3g"))
        return alt.layer(cells, text).properties(width="container", height=260)


Model = nn.Module | tuple[nn.Module, nn.Module]


def compare(
    models: Mapping[str, Model],
    data: Tensor | Sequence[Tensor],
    *,
    anchors: int | Int[Tensor, " anchors"] = 128,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    similarity: Similarity = "cosine",
    center: bool = False,
    k: int = 10,
    batch_size: int = 1024,
    generator: torch.Generator | None = None,
) -> Comparison:
    """Compares every two models: alignment of their latents, retrieval by relative coordinates, and stitching.

    Args:
        models: by name, an encoder (inputs -> latents) or a pair of an encoder and its head. A head behind a
            `RelativeEncoder` is stitched by relative coordinates, with that encoder's projection; a head behind a plain
            encoder takes the other's latents as they are (NaN where their widths differ). Left as they are.
        data: inputs, or (inputs, targets) where `loss` is asked for.
        anchors: rows of the inputs, or how many to draw.
        loss: of `(head's output, target)`; for an auto-encoder the targets are the inputs.
        similarity, center: of the relative coordinates that are compared.
        k: neighbours of `retrieval_scores`.
        batch_size: samples embedded at a time.
        generator: draws the anchors.

    Raises:
        ValueError: no models, a loss without targets, or fewer than `k` items beside the anchors.
    """
    inputs, targets = (data, None) if isinstance(data, Tensor) else (data[0], data[1] if len(data) > 1 else None)
    if not models:
        raise ValueError("models must name at least one model, got none")
    if loss is not None and targets is None:
        raise ValueError("loss needs targets: data must be (inputs, targets)")
    index = select_anchors(inputs, anchors, generator=generator) if isinstance(anchors, int) else anchors
    items = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
    items[index] = False
    if int(items.sum()) < max(k, 2):
        raise ValueError(f"data must hold at least {max(k, 2)} samples beside the anchors, got {int(items.sum())}")

    pairs = [model if isinstance(model, tuple) else (model, None) for model in models.values()]
    latents = [_latents(_plain(encoder), inputs, batch_size) for encoder, _ in pairs]
    coordinates = [relative(z[items], z[index], similarity=similarity, center=center) for z in latents]
    count = len(pairs)
    tables = {name: torch.full((count, count), math.nan) for name in ("cka", "jaccard", "mrr", "cosine", "stitching")}
    for i in range(count):
        for j in range(count):
            tables["cka"][i, j] = linear_cka(latents[i][items], latents[j][items])
            for name, score in retrieval_scores(coordinates[i], coordinates[j], k).items():
                tables[name][i, j] = score
            if loss is not None and targets is not None:
                output = _stitched(pairs[i][0], pairs[j], inputs[items], inputs[index], batch_size)
                tables["stitching"][i, j] = math.nan if output is None else float(loss(output, targets[items]))
    return Comparison(tuple(models), **tables, items=int(items.sum()), anchors=len(index))


def _stitched(
    encoder: nn.Module, other: tuple[nn.Module, nn.Module | None], x: Tensor, anchors: Tensor, batch_size: int
) -> Tensor | None:
    """Output of the other's head above the encoder; None where it has none, or takes another width."""
    its_encoder, head = other
    if head is None:
        return None
    if not isinstance(its_encoder, RelativeEncoder):
        try:
            return _latents(nn.Sequential(_plain(encoder), head), x, batch_size, flat=False)
        except RuntimeError:
            return None
    if isinstance(encoder, RelativeEncoder):
        anchors = encoder.anchor_inputs  # in the order that the head was trained with
    elif len(anchors) != len(its_encoder.anchor_inputs):
        return None
    return _latents(
        stitch(_plain(encoder), head, anchors, projection=its_encoder.projection), x, batch_size, flat=False
    )


def _plain(encoder: nn.Module) -> nn.Module:
    return encoder.encoder if isinstance(encoder, RelativeEncoder) else encoder


def _latents(model: nn.Module, inputs: Tensor, batch_size: int, flat: bool = True) -> Tensor:
    with torch.no_grad(), evaluating(model):
        output = torch.cat([model(part) for part in inputs.split(batch_size)])
    return output.flatten(1) if flat else output
