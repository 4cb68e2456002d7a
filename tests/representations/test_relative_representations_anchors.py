"""Anchors and comparisons: brute force, closed forms, limits, and planted answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lathe.representations.relative_representations import (
    RelativeEncoder,
    anchor_quality,
    bootstrap_anchors,
    compare,
    gaussian_anchors,
    latent_similarity,
    linear_cka,
    parallel_anchors,
    relative,
    resample_anchors,
    retrieval_scores,
    select_anchors,
)
from lathe.representations.relative_representations import anchors as anchors_module
from lathe.representations.relative_representations import comparison as comparison_module


def gaussian(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=dtype)


def rotation(rng, d):
    return torch.linalg.qr(gaussian(rng, d, d)).Q


# --- choosing --------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(4, 12),
    share=st.floats(0.3, 1.0),
    method=st.sampled_from(["uniform", "fps", "kmeans", "stratified", "frequent"]),
    twins=st.booleans(),
)
def test_anchors_are_different_samples_and_repeat_with_their_seed(count, share, method, twins):
    n = max(3, round(share * count))
    points = torch.randn(count, 3, generator=torch.Generator().manual_seed(count))
    if twins:
        points[count // 2 :] = points[: count - count // 2].clone()  # duplicates must not be taken for one sample
    labels = torch.arange(count) % 3

    def chosen(seed):
        generator = torch.Generator().manual_seed(seed)
        return select_anchors(points, n, method=method, labels=labels, generator=generator)

    index = chosen(1)
    assert index.shape == (n,) and index.dtype == torch.long
    assert len(set(index.tolist())) == n and 0 <= int(index.min()) <= int(index.max()) < count
    assert torch.equal(index, chosen(1))


def test_farthest_points_by_brute_force(rng):
    points = gaussian(rng, 30, 4)
    index = select_anchors(points, 6, method="fps", generator=rng).tolist()
    unit = (points / points.norm(dim=1, keepdim=True)).numpy()
    for taken in range(1, 6):
        distance = [min(np.linalg.norm(unit[i] - unit[j]) for j in index[:taken]) for i in range(30)]
        assert index[taken] == int(np.argmax(distance))


def test_centroids_find_planted_clusters(rng):
    centres = torch.linalg.qr(gaussian(rng, 8, 8)).Q[:5]
    points = centres.repeat(20, 1) + 0.05 * gaussian(rng, 100, 8)
    index = select_anchors(points, 5, method="kmeans", generator=rng)
    assert sorted((index % 5).tolist()) == [0, 1, 2, 3, 4]


def test_strata_take_turns(rng):
    labels = torch.tensor([0] * 20 + [1] * 3 + [2] * 10)
    index = select_anchors(labels, 12, method="stratified", labels=labels, generator=rng)
    assert torch.bincount(labels[index]).tolist() == [5, 3, 4] or torch.bincount(labels[index]).tolist() == [4, 3, 5]
    assert sorted(labels[index[:3]].tolist()) == sorted(labels[index[3:6]].tolist()) == [0, 1, 2]
    with pytest.raises(ValueError, match="at least the 3 classes"):
        select_anchors(labels, 2, method="stratified", labels=labels)
    with pytest.raises(ValueError, match="need labels of the 33 samples, got none"):
        select_anchors(labels, 4, method="stratified")


def test_most_frequent_samples_come_first():
    counts = torch.tensor([5, 9, 9, 1])
    assert select_anchors(torch.ones(4, 2), 3, method="frequent", frequencies=counts).tolist() == [1, 2, 0]
    assert select_anchors(torch.ones(4, 2), 3, method="frequent").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("n", "method", "message"), [(0, "uniform", "1 to the 4"), (5, "fps", "got 5"), (2, "best", "one of")]
)
def test_impossible_choices_are_refused(n, method, message):
    with pytest.raises(ValueError, match=message):
        select_anchors(torch.ones(4, 2), n, method=method)


def test_parallel_anchors_keep_their_partners(rng):
    pairs = {f"dog{i}": f"perro{i}" for i in range(20)}
    a, b = parallel_anchors(pairs, 8, generator=rng)
    assert len(set(a)) == 8 and [pairs[x] for x in a] == b
    with pytest.raises(ValueError, match="share a partner"):
        parallel_anchors({"a": 1, "b": 1}, 1)
    with pytest.raises(ValueError, match="1 to the 20 pairs, got 21"):
        parallel_anchors(pairs, 21)


def test_resampled_anchors_run_over_the_classes(rng):
    labels = torch.randint(4, (60,), generator=rng)
    index = resample_anchors(labels, 3, generator=rng)
    assert labels[index].tolist() == [0, 1, 2, 3] * 3 and len(set(index.tolist())) == 12
    with pytest.raises(ValueError, match="rarest class"):
        resample_anchors(labels, 60)


def test_gaussian_anchors_have_the_moments_of_their_class(rng):
    labels = torch.arange(400) % 2
    latents = gaussian(rng, 400, 3) * torch.tensor([1.0, 5.0, 0.1]) + 20.0 * labels[:, None]
    drawn = gaussian_anchors(latents, labels, 4000, generator=rng).reshape(4000, 2, 3)
    for c in (0, 1):
        own = latents[labels == c]
        torch.testing.assert_close(drawn[:, c].std(0), own.std(0), rtol=0.05, atol=0)
        assert ((drawn[:, c].mean(0) - own.mean(0)).abs() < 5 * own.std(0) / 4000**0.5).all()
    with pytest.raises(ValueError, match="two samples or more"):
        gaussian_anchors(latents[:3], torch.tensor([0, 0, 1]), 2)


# --- quality ---------------------------------------------------------------------------------------------------------


def test_quality_by_definition(rng):
    z = gaussian(rng, 40, 6)
    index = torch.tensor([0, 5, 7, 9, 11, 13, 20, 30])
    labels = torch.arange(40) % 4
    quality = anchor_quality(z, index, labels)
    unit = (z[index] / z[index].norm(dim=1, keepdim=True)).numpy()
    eigenvalues = np.linalg.eigvalsh(unit @ unit.T)[::-1]
    assert quality.condition == pytest.approx(eigenvalues[0] / eigenvalues[5], rel=1e-9)
    assert quality.rank == 6 and quality.features == 6
    share = eigenvalues[:6] / eigenvalues[:6].sum()
    assert quality.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    similarities = relative(z, z[index])
    torch.testing.assert_close(quality.coverage, similarities.amax(1))
    assert torch.equal(quality.nearest, similarities.argmax(1))
    assert quality.per_class.tolist() == [sum(int(i) % 4 == c for i in index) for c in range(4)]
    assert "8 anchors span 6 of 6" in str(quality) and "0: 2" in str(quality)
    assert quality.plot().to_dict()["mark"]


def test_quality_tells_duplicates_and_blind_directions(rng):
    z = gaussian(rng, 40, 6)
    z[:10, 4:] = 0
    z[1] = 2 * z[0]
    quality = anchor_quality(z, z[:10])
    assert quality.rank == 4
    assert float(quality.redundancy[0]) == pytest.approx(1.0) and quality.per_class is None
    with pytest.raises(ValueError, match="rows of latents"):
        anchor_quality(z, z[:10], torch.zeros(40, dtype=torch.long))


# --- bootstrap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mutual", "sinkhorn"])
def test_few_pairs_grow_into_a_hidden_permutation(rng, method):
    centres = 2 * gaussian(rng, 12, 16)
    z = centres[torch.randint(12, (200,), generator=rng)] + gaussian(rng, 200, 16)
    order = torch.randperm(200, generator=rng)
    other = (1.7 * z @ rotation(rng, 16) + 0.1 * gaussian(rng, 200, 16))[order]
    where = order.argsort()
    seed = torch.arange(12)
    pairs = bootstrap_anchors(z, other, seed, where[seed], n=100, method=method)
    assert torch.equal(pairs.a[:12], seed) and len(pairs.a) == len(set(pairs.a.tolist())) == len(set(pairs.b.tolist()))
    right = (where[pairs.a] == pairs.b).double().mean()
    assert len(pairs.a) == 100 and right > 0.97
    assert pairs.growth[-1] == 100 and sorted(pairs.growth) == list(pairs.growth)
    assert pairs.plot().to_dict()["mark"]


def test_best_matches_in_chunks_are_those_of_the_whole_matrix(rng, monkeypatch):
    a, b = gaussian(rng, 30, 5), gaussian(rng, 23, 5)
    monkeypatch.setattr(anchors_module, "CHUNK", 100)
    best_b, best_a = anchors_module._best_matches(a, b)
    assert torch.equal(best_b, (a @ b.mT).argmax(1)) and torch.equal(best_a, (a @ b.mT).argmax(0))


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ([], [], {}, "must be pairs, got 0"),
        ([0], [0, 1], {}, "must be pairs, got 1 and 2"),
        ([0], [9], {}, "seed_b must index the 8"),
        ([0, 0], [0, 1], {}, "every row once"),
        ([0, 1], [0, 1], {"n": 1}, "n must be 2"),
        ([0, 1], [0, 1], {"method": "best"}, "mutual or sinkhorn"),
        ([0, 1], [0, 1], {"rounds": 0}, "positive"),
    ],
)
def test_impossible_seeds_are_refused(rng, a, b, options, message):
    z = gaussian(rng, 8, 3)
    with pytest.raises(ValueError, match=message):
        bootstrap_anchors(z, z, torch.tensor(a).long(), torch.tensor(b).long(), **({"n": 4} | options))


# --- retrieval -------------------------------------------------------------------------------------------------------


def by_hand(space1, space2, k):
    """The scores item by item, over sorted lists and Python sets."""
    one, two = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in (space1.numpy(), space2.numpy()))
    jaccard, mrr, truncated = [], [], []
    for i in range(len(one)):
        found = list(np.argsort(-(two @ one[i]), kind="stable"))
        near = list(np.argsort(-(two @ two[i]), kind="stable"))
        q, t = set(found[:k]), set(near[:k])
        jaccard.append(len(q & t) / len(q | t))
        rank = found.index(i) + 1
        mrr.append(1 / rank)
        truncated.append(1 / rank if rank <= k else 0.0)
    return {"jaccard": np.mean(jaccard), "mrr": np.mean(mrr), "cosine": np.mean((one * two).sum(1))}, np.mean(truncated)


@pytest.mark.parametrize(("items", "k", "noise"), [(40, 5, 1.0), (300, 1, 2.0), (700, 2, 1.0), (61, 61, 1.0)])
def test_scores_by_hand(rng, monkeypatch, items, k, noise):
    monkeypatch.setattr(comparison_module, "CHUNK", 64 * items + 1)  # several chunks
    space = gaussian(rng, items, 6)
    other = space + noise * gaussian(rng, items, 6)
    wanted, truncated = by_hand(space, other, k)
    assert retrieval_scores(space, other, k) == pytest.approx(wanted, abs=1e-12)
    assert retrieval_scores(space, other, k, truncate=True)["mrr"] == pytest.approx(truncated, abs=1e-12)


def test_largest_values_by_blocks_are_those_of_topk(rng):
    values = gaussian(rng, 7, 1030)
    for k in (1, 4):
        best, index = comparison_module.largest(values, k)
        torch.testing.assert_close(best.sort(1).values, values.topk(k).values.sort(1).values)
        torch.testing.assert_close(values.gather(1, index), best)


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


def test_memory_of_retrieval_is_bounded(rng, monkeypatch):
    monkeypatch.setattr(comparison_module, "CHUNK", 10_000)
    space = gaussian(rng, 800, 8)
    with LargestTensor() as seen:
        retrieval_scores(space, space + gaussian(rng, 800, 8), 5)
    assert seen.elements <= 10_000 < 800**2
    monkeypatch.setattr(anchors_module, "CHUNK", 10_000)
    with LargestTensor() as seen:
        bootstrap_anchors(space, 2 * space, torch.arange(10), torch.arange(10), n=20, rounds=1)
    assert seen.elements <= 10_000


def test_a_space_retrieves_itself_perfectly(rng):
    space = gaussian(rng, 500, 8)
    assert retrieval_scores(space, space) == pytest.approx({"jaccard": 1, "mrr": 1, "cosine": 1})
    assert retrieval_scores(space, 5 * space) == pytest.approx({"jaccard": 1, "mrr": 1, "cosine": 1})


def test_unrelated_spaces_retrieve_by_chance(rng):
    scores = retrieval_scores(gaussian(rng, 500, 300), gaussian(rng, 500, 300))
    assert scores["mrr"] == pytest.approx(sum(1 / i for i in range(1, 501)) / 500, abs=0.006)
    assert abs(scores["cosine"]) < 0.01


def test_a_collapsed_space_earns_no_rank(rng):
    scores = retrieval_scores(torch.ones(99, 4), torch.ones(99, 4))
    assert scores["mrr"] == pytest.approx(1 / 50)  # the middle of 99 ties


def test_impossible_retrievals_are_refused():
    with pytest.raises(ValueError, match="one shape"):
        retrieval_scores(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="1 to the 3 items, got 4"):
        retrieval_scores(torch.ones(3, 2), torch.ones(3, 2), 4)


def test_similarity_to_a_reference_is_the_mean_cosine(rng):
    a, b = gaussian(rng, 30, 5), gaussian(rng, 30, 5)
    wanted = np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a.numpy(), b.numpy())])
    assert latent_similarity(a, b) == pytest.approx(wanted)
    assert latent_similarity(a + 100, b + 100) > 0.99 > latent_similarity(a + 100, b + 100, center=True)
    with pytest.raises(ValueError, match="one shape"):
        latent_similarity(a, b[:, 1:])


# --- all pairs of models ---------------------------------------------------------------------------------------------


def test_table_of_models_by_its_parts(rng):
    x = gaussian(rng, 120, 8).float()
    twin, stranger = nn.Linear(8, 6), nn.Linear(8, 5)
    turned = nn.Sequential(twin, nn.Linear(6, 6, bias=False))
    turned[1].weight.data = 3 * rotation(rng, 6).float()
    anchors = torch.arange(20)
    head = nn.Linear(20, 8)
    models = {
        "one": (RelativeEncoder(twin, x[anchors]), head),
        "two": (RelativeEncoder(turned, x[anchors]), head),
        "absolute": (stranger, nn.Linear(5, 8)),
        "bare": stranger,
    }
    table = compare(models, (x, x), anchors=anchors, loss=nn.functional.mse_loss, k=5)
    assert table.items == 100 and table.anchors == 20 and table.names == ("one", "two", "absolute", "bare")
    assert float(table.cka[0, 1]) == pytest.approx(1, abs=1e-5)
    assert float(table.mrr[0, 1]) == pytest.approx(1) and float(table.jaccard[1, 0]) == pytest.approx(1)
    assert float(table.mrr[0, 2]) < 0.9
    items = x[20:]
    with torch.no_grad():
        own = float(nn.functional.mse_loss(head(relative(twin(items), twin(x[anchors]))), items))
    assert float(table.stitching[0, 0]) == pytest.approx(own, rel=1e-5)
    assert float(table.stitching[1, 0]) == pytest.approx(own, rel=1e-4)  # the rotated twin under the same head
    assert table.stitching[3, 0].isfinite() and table.stitching[3, 2].isfinite()  # encoders without a head of their own
    assert table.stitching[:, 3].isnan().all() and table.stitching[0, 2].isnan()  # no head; another width
    assert len(str(table).splitlines()) == 17 and len(table.rows()) == 16
    for measure in ("cka", "jaccard", "mrr", "cosine", "stitching"):
        assert table.plot(measure).to_dict()["layer"]
    with pytest.raises(ValueError, match="measure must be"):
        table.plot("loss")


def test_comparison_leaves_modes_and_weights_alone(rng):
    net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    table = compare({"a": net, "b": net}, gaussian(rng, 60, 8).float(), anchors=10, generator=rng)
    assert net.training and all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(float(table.mrr[i, j]) == pytest.approx(1) for i, j in itertools.product(range(2), repeat=2))
    assert table.stitching.isnan().all()


def test_impossible_comparisons_are_refused(rng):
    x = torch.ones(12, 8)
    with pytest.raises(ValueError, match="at least one model"):
        compare({}, x)
    with pytest.raises(ValueError, match="loss needs targets"):
        compare({"a": nn.Linear(8, 6)}, x, anchors=2, loss=nn.functional.mse_loss)
    with pytest.raises(ValueError, match="at least 10 samples beside the anchors, got 2"):
        compare({"a": nn.Linear(8, 6)}, x, anchors=10)


def test_alignment_survives_rotation_scale_and_shift(rng):
    z = gaussian(rng, 60, 7)
    assert float(linear_cka(z, 4 * z @ rotation(rng, 7) + gaussian(rng, 7))) == pytest.approx(1, abs=1e-10)
