"""Metrics, probe, head and loss: against direct formulas, exact frames, a peer's numbers, invariances and theory."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from conformance import check_compiles, check_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import language_model, residual_network, trains, vision_transformer
from torch import nn
from torch.nn import functional as F

from lathe.core.surgery import swap
from lathe.theory.neural_collapse import (
    DeepLinearHead,
    NeuralCollapse,
    UFMLoss,
    UnconstrainedFeatures,
    gof,
    neural_collapse,
    orthogonal_frame,
    simplex_etf,
    ufm_optimum,
)

# The peer is rhubarbwu/neural-collapse (MIT) at commit c05a0b8, which is on no package index: its accumulators in
# float64 on `waves()`, with the mean of all samples as global mean. Its cdnv is rounded to float32 on the way.
PEER = {"nc1": 0.2353263632779467, "nc2_h": 0.36663109104604774, "nc3": 0.5588534086573925, "nc2_w": 0.8094384017970585}
PEER |= {"cdnv": 0.23154324293136597, "nc4": 0.9583333333333334}
METRICS = ("nc1", "nc2_w", "nc2_h", "nc3", "dual")


def waves():
    i, j = torch.arange(48, dtype=torch.float64)[:, None], torch.arange(6, dtype=torch.float64)
    y = torch.arange(48) % 4
    y[40:] = 0
    k = torch.arange(4, dtype=torch.float64)[:, None]
    features = 0.8 * torch.sin(12.9898 * (i + 1) * (j + 1)) + torch.cos(y[:, None] * (j + 1))
    return features, y, torch.cos(k * (j + 1)) - 0.3 + 0.5 * torch.sin((k + 1) * (j + 2))


def blobs(rng, counts=(7, 4, 6), width=5, noise=0.3):
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    y = y[torch.randperm(len(y), generator=rng)]
    means = torch.randn(len(counts), width, dtype=torch.float64, generator=rng) + 3
    return means[y] + noise * torch.randn(len(y), width, dtype=torch.float64, generator=rng), y


def collected(features, y, classes, batch=5):
    collapse = NeuralCollapse(classes)
    for h, target in zip(features.split(batch), y.split(batch)):
        collapse.update(h, target)
    return collapse


def test_metrics_are_those_of_the_peer():
    features, y, W = waves()
    head = nn.Linear(6, 4, bias=False).double()
    head.weight.data = W
    loader = list(zip(features.split(7), y.split(7)))
    report = neural_collapse(nn.Sequential(nn.Identity(), head), loader, reference="etf")
    for name, value in PEER.items():
        assert getattr(report, name) == pytest.approx(value, abs=1e-7 if name == "cdnv" else 1e-12), name
    assert report.class_counts.tolist() == [18, 10, 10, 10]


def test_metrics_are_their_formulas_sample_by_sample(rng):
    features, y = blobs(rng)
    W = torch.randn(3, 5, dtype=torch.float64, generator=rng)
    report = collected(features, y, 3).compute(W, reference="etf")
    h, t = features.numpy(), y.numpy()
    mu = np.stack([h[t == k].mean(0) for k in range(3)])
    centred = mu - h.mean(0)
    within = sum(np.outer(a - mu[k], a - mu[k]) for a, k in zip(h, t)) / len(h)
    between = sum(np.outer(m, m) for m in centred) / 3
    assert report.nc1 == pytest.approx(np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / 3, rel=1e-9)

    def distance(a, b):
        return np.linalg.norm(a / np.linalg.norm(a) - b / np.linalg.norm(b))

    simplex = np.eye(3) - 1 / 3
    assert report.nc2_w == pytest.approx(distance(W @ W.mT, simplex))
    assert report.nc2_h == pytest.approx(distance(centred @ centred.T, simplex))
    assert report.nc3 == pytest.approx(distance(W @ centred.T, simplex))
    assert report.dual == pytest.approx(distance(W, centred))
    variance = np.array([((h[t == k] - mu[k]) ** 2).sum(1).mean() for k in range(3)])
    pairs = [(i, j) for i in range(3) for j in range(i)]
    cdnv = np.mean([(variance[i] + variance[j]) / 2 / ((mu[i] - mu[j]) ** 2).sum() for i, j in pairs])
    assert report.cdnv == pytest.approx(cdnv)
    np.testing.assert_allclose(report.class_variance, variance)
    plain = collected(features, y, 3).compute(W, reference="orthogonal")
    assert plain.nc2_h == pytest.approx(distance(mu @ mu.T, np.eye(3)))
    assert plain.nc3 == pytest.approx(distance(W @ mu.T, np.eye(3)))


@pytest.mark.parametrize("shape", ["etf", "orthogonal"])
def test_exact_frames_are_fully_collapsed(shape, rng):
    frame = {"etf": simplex_etf, "orthogonal": orthogonal_frame}[shape](4, 7, generator=rng, dtype=torch.float64)
    shift = 5.0 if shape == "etf" else 0.0  # a common shift is the bias's to absorb
    collapse = collected((2 * frame + shift).repeat(3, 1), torch.arange(4).repeat(3), 4)
    report = collapse.compute(3 * frame, bias=shape == "etf")
    assert report.reference == shape
    assert max(getattr(report, name) for name in METRICS) < 1e-12
    assert report.prediction is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("counts", "decays"), [([9, 6, 4, 2], [2e-3]), ([9, 6, 4, 2], [2e-3, 4e-3, 3e-3])])
def test_the_optimum_of_the_theory_is_fully_collapsed_at_every_layer(counts, decays, bias, rng):
    y = torch.arange(4).repeat_interleave(torch.tensor(counts))
    found = ufm_optimum(F.one_hot(y).double().mT, decays, 1e-3, bias=bias, width=6)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=rng)).Q
    weights = [found.weights[0] @ turn.mT, *found.weights[1:]]
    collapse = collected((turn @ found.features).mT, y, 4)
    report = collapse.compute(weights, bias=bias, weight_decay=decays, feature_decay=1e-3)
    assert report.reference == "gof"
    assert max(getattr(report, name) for name in METRICS) < 1e-9
    assert max(values.max().item() for values in report.per_layer.values()) < 1e-9
    assert report.per_layer["dual"].shape == (len(decays),)
    torch.testing.assert_close(report.classifier_norms, report.prediction.classifier_norms)
    torch.testing.assert_close(report.feature_norms, report.prediction.feature_norms)
    assert collapse.compute(weights, reference="orthogonal").nc2_w > 0.05


def test_layers_of_a_deep_head_see_the_features_that_enter_them(rng):
    features, y = blobs(rng)
    W_1, W_2 = (torch.randn(*shape, dtype=torch.float64, generator=rng) for shape in ((4, 5), (3, 4)))
    whole = collected(features, y, 3).compute([W_1, W_2], reference="etf")
    last = collected(features @ W_1.mT, y, 3).compute(W_2, reference="etf")
    first = collected(features, y, 3).compute(W_2 @ W_1, reference="etf")
    for name, values in whole.per_layer.items():
        assert values.tolist() == pytest.approx([getattr(first, name), getattr(last, name)])
    assert whole.nc3 == pytest.approx(last.nc3) == pytest.approx(first.nc3)


@given(seed=st.integers(0, 99), batch=st.integers(1, 20), scale=st.floats(1e-3, 1e3), cut=st.integers(0, 17))
@settings(max_examples=20, deadline=None)
def test_metrics_do_not_depend_on_batches_order_rotation_scale_or_processes(seed, batch, scale, cut):
    rng = torch.Generator().manual_seed(seed)
    features, y = blobs(rng)
    W = torch.randn(3, 5, dtype=torch.float64, generator=rng)
    expected = collected(features, y, 3, batch=17).compute(W, reference="etf")
    order = torch.randperm(17, generator=rng)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=rng)).Q
    moved, labels = scale * features[order] @ turn, y[order]
    left, right = collected(moved[:cut], labels[:cut], 3, batch), collected(moved[cut:], labels[cut:], 3, batch)
    kept = copy.deepcopy(right)
    left.merge(right)
    report = left.compute(2 * W @ turn, reference="etf")
    for name in (*METRICS, "cdnv"):
        assert getattr(report, name) == pytest.approx(getattr(expected, name), rel=1e-8, abs=1e-12)
    left.reset()
    left.merge(kept)
    if len(labels[cut:].unique()) == 3:
        once = kept.compute(2 * W @ turn, reference="etf")
        assert left.compute(2 * W @ turn, reference="etf").nc1 == pytest.approx(once.nc1, rel=1e-9)


def test_nc1_does_not_see_invertible_linear_maps(rng):
    features, y = blobs(rng, counts=(9, 9, 9, 9), width=3)  # as many directions as the means span
    mix = torch.randn(3, 3, dtype=torch.float64, generator=rng)
    one, other = (collected(h, y, 4).compute(torch.eye(4, 3), reference="etf").nc1 for h in (features, features @ mix))
    assert other == pytest.approx(one, rel=1e-9)


@pytest.mark.parametrize("noise", [1e-3, 1e-6])
def test_nothing_cancels_however_far_collapse_has_gone(noise, rng):
    y = torch.arange(3).repeat(40)
    deviation = torch.randn(40, 3, 4, dtype=torch.float64, generator=rng)
    deviation -= deviation.mean(0)
    means = 100 + simplex_etf(3, 4, dtype=torch.float64)
    features = (means + noise * deviation).flatten(0, 1)
    report = collected(features, y, 3, batch=16).compute(torch.eye(3, 4), reference="etf")
    reference = collected((means - 100 + 1e-2 * deviation).flatten(0, 1), y, 3, batch=120)
    expected = reference.compute(torch.eye(3, 4), reference="etf").nc1 * (noise / 1e-2) ** 2
    assert report.nc1 == pytest.approx(expected, rel=1e-6)


def test_means_that_coincide_are_not_called_collapsed():
    collapse = collected(torch.tensor([[0.0], [1.0], [0.0], [1.0]]), torch.tensor([0, 0, 1, 1]), 2)
    assert collapse.compute(torch.ones(2, 1), reference="etf").nc1 == math.inf


@pytest.mark.parametrize("network", [residual_network, vision_transformer, language_model])
def test_the_probe_finds_the_classifier_of_networks_that_it_was_not_made_for(network):
    net, x = network()
    tokens = x.dtype == torch.int64
    classes, batches = (24, 8) if tokens else (4, 6)
    inputs = [torch.randint(0, 24, x.shape) if tokens else torch.randn_like(x) for _ in range(batches)]
    count = inputs[0].numel() if tokens else len(x)
    targets = [(torch.arange(count) + count * i) % classes for i in range(batches)]
    loader = [(a, b.view(x.shape) if tokens else b) for a, b in zip(inputs, targets)]
    net.train()
    state = copy.deepcopy(net.state_dict())
    report = neural_collapse(net, loader, reference="etf")
    assert net.training and all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert int(report.class_counts.sum()) == batches * count
    assert report.nc1 > 0 and 0 <= report.nc4 <= 1 and report.rank <= classes
    assert report.reference == "etf"


def test_the_probe_takes_a_named_head_of_several_layers_and_one_pass(rng):
    features, y = blobs(rng)
    model = nn.Sequential()
    model.add_module("fc", nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)).double())
    loader = list(zip(features.split(6), y.split(6)))
    told = []
    options = {"layer": "fc", "weight_decay": 1e-3, "feature_decay": 1e-3, "progress": told.append}
    report = neural_collapse(model, loader, **options)
    assert told == list(range(1, 2 * len(loader) + 1))
    assert (report.reference, report.prediction.depth, report.per_layer["nc1"].shape) == ("gof", 2, (2,))
    once = neural_collapse(model, iter(loader), layer=model.fc, reference="etf", class_counts=[1, 1, 1])
    assert math.isnan(once.nc4) and once.nc1 == pytest.approx(report.nc1)
    agreed = [
        (model(h).argmax() == (torch.stack([features[y == k].mean(0) for k in range(3)]) - h).norm(dim=1).argmin())
        for h in features
    ]
    assert report.nc4 == pytest.approx(sum(map(bool, agreed)) / len(y))
    assert report.plot().to_dict()["hconcat"] and once.plot().to_dict()
    assert "nc1" in str(report) and "rank" in str(report)


def test_a_deep_head_that_gave_up_directions_is_told(rng):
    features, y = blobs(rng, counts=(5, 5, 5, 5))
    head = DeepLinearHead(5, 4, depth=2).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        neural_collapse(nn.Sequential(head), [(features, y)])
    head.weights[1].data[:, 1:] = 0
    with pytest.warns(UserWarning, match="2 linear layers has rank 1 for 4 classes"):
        assert neural_collapse(nn.Sequential(head), [(features, y)]).rank == 1


# --- the head and the loss --------------------------------------------------------------------------------------------

VECTORS = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{"depth": 1}, {"depth": 3}, {"depth": 2, "bias": False, "width": 5}])
def test_deep_heads_do_what_every_layer_does(options):
    make = partial(DeepLinearHead, 8, 4, **options)
    check_layer(make, VECTORS, wrong_inputs=[VECTORS[:, :7], VECTORS[0, 0]], empty_batch=(True, False))
    check_layer(make, VECTORS[None].expand(2, 3, 8))


@pytest.mark.compile
def test_deep_heads_compile():
    check_compiles(lambda: DeepLinearHead(8, 4, depth=3), VECTORS)


@pytest.mark.parametrize("network", [residual_network, vision_transformer])
def test_deep_heads_stand_in_for_linear_layers(network):
    net, x = network()
    net.eval()
    before = net(x)
    report = swap(net, {nn.Linear: partial(DeepLinearHead.from_trained, depth=3)})
    assert report.replaced and all(each.new_type == "DeepLinearHead" for each in report.replaced)
    after = net(x)
    for one, other in zip((before, after), (after, before)):
        one, other = (getattr(output, "logits", output) for output in (one, other))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    net, x = network()
    swap(net, {nn.Linear: partial(DeepLinearHead.like, depth=2)})
    trains(net, x)


@pytest.mark.parametrize("sizes", [(6, 3), (3, 6)])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_trained_layer_becomes_balanced_factors_of_the_same_product(sizes, depth):
    linear = nn.Linear(*sizes).double()
    head = DeepLinearHead.from_trained(linear, depth=depth)
    torch.testing.assert_close(head.product(), linear.weight, rtol=0, atol=1e-12)
    assert torch.equal(head.bias, linear.bias)
    for below, above in zip(head.weights, list(head.weights)[1:]):
        torch.testing.assert_close(above.mT @ above, below @ below.mT, rtol=0, atol=1e-12)
    # Balanced factors have the least squares for their product: depth times the sum of s^(2/depth).
    squares = sum(weight.square().sum() for weight in head.weights)
    torch.testing.assert_close(squares, depth * (torch.linalg.svdvals(linear.weight) ** (2 / depth)).sum())


def test_a_head_that_was_trained_on_forgets_its_product():
    head = DeepLinearHead(8, 4, depth=2).eval()
    with torch.no_grad():
        before = head(VECTORS)
        head.weights[0].mul_(2)
        torch.testing.assert_close(head(VECTORS), 2 * before)


@pytest.mark.parametrize("depth", [1, 3])
def test_the_loss_at_the_optimum_is_the_minimum(depth):
    counts, decay = [5, 3, 2], 2e-3
    y = torch.arange(3).repeat_interleave(torch.tensor(counts))
    found = ufm_optimum(F.one_hot(y).double().mT, decay, decay, depth=depth, width=4)
    features = UnconstrainedFeatures(10, 4, dtype=torch.float64)
    head = DeepLinearHead(4, 3, depth, bias=False, dtype=torch.float64)
    features.features.data = found.features.mT
    for weight, optimal in zip(head.weights, found.weights):
        weight.data = optimal
    h = features()
    loss = UFMLoss(decay, decay)
    value = loss(head(h), y, h, head)
    assert value.item() == pytest.approx(gof(counts, decay, decay, depth=depth).loss, abs=1e-13)
    value.backward()
    assert max(parameter.grad.norm().item() for parameter in (*features.parameters(), *head.parameters())) < 1e-10
    # Batches of half the samples, each standing for all, average to the same.
    part = UFMLoss(decay, decay, num_samples=10)
    halves = [part(head(features(i)), y[i], features(i), head) for i in torch.randperm(10).split(5)]
    torch.testing.assert_close(torch.stack(halves).mean(), value)


def test_the_loss_takes_ordinary_heads_targets_and_cross_entropy(rng):
    features, y = blobs(rng)
    linear = nn.Linear(5, 3).double()
    logits = linear(features)
    penalty = 0.1 / 2 * linear.weight.square().sum() + 0.2 / 2 * features.square().sum()
    entropy = UFMLoss(0.1, 0.2, "cross_entropy", bias_decay=0.3)(logits, y, features, linear)
    expected = F.cross_entropy(logits, y) + penalty + 0.3 / 2 * linear.bias.square().sum()
    torch.testing.assert_close(entropy, expected)
    real = torch.randn(17, 3, dtype=torch.float64, generator=rng)
    value = UFMLoss(0.1, 0.2)(logits, real, features, nn.Sequential(nn.Dropout(), linear))
    torch.testing.assert_close(value, 1.5 * F.mse_loss(logits, real) + penalty)
    deep = DeepLinearHead(5, 3, depth=2).double()
    by_layer = UFMLoss([0.1, 0.4], 0.0)(logits, y, features, deep) - UFMLoss(0.0, 0.0)(logits, y, features, deep)
    torch.testing.assert_close(by_layer, 0.05 * deep.weights[0].square().sum() + 0.2 * deep.weights[1].square().sum())


def corners():
    return collected(torch.eye(3), torch.arange(3), 3)


FULL = [(torch.randn(6, 5), torch.arange(6) % 3)]
LINEAR = nn.Sequential(nn.Linear(5, 3))
THREE = (torch.eye(3), torch.arange(3), torch.eye(3))


@pytest.mark.usefixtures("shape_checks_off")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NeuralCollapse(1), "num_classes must be at least 2"),
        (lambda: NeuralCollapse(3).compute(torch.eye(3)), "no samples yet"),
        (lambda: NeuralCollapse(3).update(torch.eye(3), torch.arange(1, 4)), "between 0 and 2, got 1 outside"),
        (lambda: NeuralCollapse(3).update(torch.eye(3) / 0, torch.arange(3)), "must be finite, got 3 samples"),
        (lambda: NeuralCollapse(3).update(torch.eye(3), torch.arange(2)), r"\(3, 3\) and \(2,\)"),
        (lambda: NeuralCollapse(3).merge(NeuralCollapse(4)), "other must have 3 classes"),
        (lambda: collected(torch.eye(3), torch.tensor([0, 0, 2]), 3).class_means, "none of class 1"),
        (lambda: corners().update(torch.eye(2), torch.arange(2)), "must have 3 columns"),
        (lambda: corners().compute(torch.eye(3, 4)), "lead from 3 features to 3"),
        (lambda: corners().compute(torch.eye(3), reference="frame"), "'frame'"),
        (lambda: corners().compute(torch.eye(3), weight_decay=1.0), "belong together"),
        (lambda: collected(torch.eye(3), torch.tensor([0, 1, 1]), 2).compute(torch.eye(2, 3)), "differ in size"),
        (lambda: neural_collapse(LINEAR, []), "at least one batch"),
        (lambda: neural_collapse(LINEAR, [(FULL[0][0], torch.arange(5))]), "got 5 for 6"),
        (lambda: neural_collapse(nn.Conv1d(5, 3, 1), [(torch.randn(6, 5, 1), FULL[0][1])]), "no nn.Linear"),
        (lambda: neural_collapse(LINEAR, FULL, layer="head"), "head"),
        (lambda: neural_collapse(LINEAR, FULL, layer=nn.Linear(5, 3)), "part of the model"),
        (lambda: neural_collapse(LINEAR, [(FULL[0][0], FULL[0][1] + 1)]), "between 0 and 2"),
        (lambda: DeepLinearHead(4, 3, depth=0), "at least 1, got 4, 3, 0"),
        (lambda: DeepLinearHead.from_trained(nn.Linear(6, 4), depth=2, width=3), "width must be at least 4"),
        (lambda: UnconstrainedFeatures(0, 3), "at least 1, got 0 and 3"),
        (lambda: UFMLoss(0.1, 0.1, "hinge"), "'hinge'"),
        (lambda: UFMLoss(-0.1, 0.1), "decays must be >= 0"),
        (lambda: UFMLoss([0.1, 0.1], 0.1)(*THREE, LINEAR), "2 entries for a"),
        (lambda: UFMLoss(0.1, 0.1)(THREE[0], torch.arange(2), THREE[2], LINEAR[0]), "one row a sample"),
        (lambda: UFMLoss(0.1, 0.1)(THREE[0], torch.zeros(3, 2), THREE[2], LINEAR[0]), r"shape \(3, 3\)"),
        (lambda: UFMLoss(0.1, 0.1)(*THREE, nn.ReLU()), "got ReLU"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.usefixtures("shape_checks_off")
def test_what_is_no_classifier_and_no_batch_is_refused():
    with pytest.raises(TypeError, match="got ReLU"):
        neural_collapse(nn.Sequential(nn.Linear(5, 3), nn.ReLU()), FULL, layer="1")
    with pytest.raises(TypeError, match="pairs"):
        neural_collapse(LINEAR, [FULL[0][0]])
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear, got Conv2d"):
        DeepLinearHead.like(nn.Conv2d(3, 4, 1), depth=2)
    biased = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    with pytest.raises(TypeError, match="no bias before its last"):
        neural_collapse(nn.Sequential(biased), FULL, layer="0")
