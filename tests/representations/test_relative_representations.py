"""The projection: invariances, scikit-learn, brute force, and identities of a full pipeline that need no training."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity, euclidean_distances, manhattan_distances
from torch import nn

from lathe.representations.relative_representations import (
    RelativeEncoder,
    RelativeRepresentation,
    average_by_class,
    from_relative,
    quantize,
    relative,
    stitch,
    translate,
)


def gaussian(rng, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=rng, dtype=dtype)


def rotation(rng, d):
    return torch.linalg.qr(gaussian(rng, d, d)).Q


def apart(a, b):
    return float((a - b).detach().abs().max())


# --- invariances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_rotation_reflection_and_scale_change_nothing(rng, scale):
    z, a, q = gaussian(rng, 50, 16), gaussian(rng, 9, 16), rotation(rng, 16)
    reflected = q * torch.tensor([-1.0] + [1.0] * 15, dtype=torch.float64)
    for turn in (q, reflected):
        assert apart(relative(scale * z @ turn, scale * a @ turn), relative(z, a)) < 1e-12


def test_a_scale_of_its_own_for_every_row_changes_nothing(rng):
    z, a = gaussian(rng, 50, 16), gaussian(rng, 9, 16)
    scales_z, scales_a = torch.rand(50, 1, generator=rng).double() + 0.1, torch.rand(9, 1, generator=rng).double() + 0.1
    assert apart(relative(scales_z * z, scales_a * a), relative(z, a)) < 1e-12


def test_a_translation_changes_the_coordinates_unless_centred(rng):
    z, a, shift = gaussian(rng, 50, 16), gaussian(rng, 9, 16), gaussian(rng, 16)
    assert apart(relative(z + shift, a + shift), relative(z, a)) > 0.1
    assert apart(relative(z + shift, a + shift, center=True), relative(z, a, center=True)) < 1e-12


def test_an_affine_map_changes_whitened_coordinates_only_in_rounding(rng):
    z, a, m, shift = gaussian(rng, 50, 8), gaussian(rng, 40, 8), gaussian(rng, 8, 8), gaussian(rng, 8)
    before, after = (relative(x, y, whiten=True) for x, y in ((z, a), (z @ m + shift, a @ m + shift)))
    assert apart(before, after) < 1e-8
    assert apart(relative(z, a, center=True), relative(z @ m + shift, a @ m + shift, center=True)) > 0.05


def test_whitened_cosine_is_that_of_mahalanobis(rng):
    z, a = gaussian(rng, 20, 5) @ gaussian(rng, 5, 5), gaussian(rng, 30, 5)
    inverse = np.linalg.inv(np.cov(a.numpy().T))
    x, y = (z - a.mean(0)).numpy(), (a - a.mean(0)).numpy()
    lengths = np.sqrt(np.einsum("id,de,ie->i", x, inverse, x))[:, None] * np.sqrt(
        np.einsum("id,de,ie->i", y, inverse, y)
    )
    np.testing.assert_allclose(relative(z, a, whiten=True), x @ inverse @ y.T / lengths, atol=1e-10)


def test_inner_keeps_rotation_and_loses_scale(rng):
    z, a, q = gaussian(rng, 50, 16), gaussian(rng, 9, 16), rotation(rng, 16)
    before = relative(z, a, similarity="inner")
    assert apart(relative(z @ q, a @ q, similarity="inner"), before) < 1e-12
    assert apart(relative(2 * z, 2 * a, similarity="inner"), 4 * before) < 1e-12
    np.testing.assert_allclose(before, z.numpy() @ a.numpy().T / 4.0, atol=1e-12)


@pytest.mark.parametrize("measure", ["l1", "l2", "linf"])
def test_distances_keep_translation_and_a_common_scale(rng, measure):
    z, a, shift = gaussian(rng, 50, 16), gaussian(rng, 9, 16), gaussian(rng, 16)
    before = relative(z, a, similarity=measure)
    assert apart(relative(3 * (z + shift), 3 * (a + shift), similarity=measure), before) < 1e-10
    if measure == "l2":
        q = rotation(rng, 16)
        assert apart(relative(z @ q, a @ q, similarity="l2"), before) < 1e-10


# --- against others --------------------------------------------------------------------------------------------------


def test_cosine_is_that_of_scikit_learn_and_of_torch(rng):
    z, a = gaussian(rng, 30, 7), gaussian(rng, 11, 7)
    np.testing.assert_allclose(relative(z, a), cosine_similarity(z, a), atol=1e-12)
    torch.testing.assert_close(
        relative(z, a), nn.functional.cosine_similarity(z[:, None], a[None], dim=-1), atol=1e-12, rtol=0
    )


def test_distances_are_those_of_scikit_learn(rng):
    z, a = gaussian(rng, 30, 7), gaussian(rng, 11, 7)
    centre = a.mean(0, keepdim=True)
    for measure, distances in (("l1", manhattan_distances), ("l2", euclidean_distances)):
        wanted = -distances(z, a) / distances(a, centre).mean()
        np.testing.assert_allclose(relative(z, a, similarity=measure), wanted, atol=1e-10)
    spread = (a - centre).abs().amax(1).mean()
    wanted = -(z[:, None] - a[None]).abs().amax(-1) / spread
    torch.testing.assert_close(relative(z, a, similarity="linf"), wanted)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.lists(st.integers(0, 4), max_size=3),
    d=st.integers(1, 6),
    m=st.integers(1, 8),
    kind=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    similarity=st.sampled_from(["cosine", "inner", "basis", "l1", "l2", "linf"]),
)
def test_every_batch_shape_and_type_comes_back_finite(batch, d, m, kind, similarity):
    generator = torch.Generator().manual_seed(d * 10 + m)
    x = torch.randn(*batch, d, generator=generator).to(kind)
    a = torch.randn(m, d, generator=generator).to(kind)
    r = relative(x, a, similarity=similarity)
    assert r.shape == (*batch, m) and r.dtype == kind and r.isfinite().all()
    flat = relative(x.reshape(-1, d), a, similarity=similarity)
    torch.testing.assert_close(r.reshape(-1, m), flat)


def test_half_precision_is_accumulated_in_single(rng):
    z, a = (gaussian(rng, n, 4096, dtype=torch.float32).bfloat16() for n in (20, 10))
    exact = cosine_similarity(z.double(), a.double())
    np.testing.assert_allclose(relative(z, a).double(), exact, atol=1e-3, rtol=2**-8)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_allclose(relative(z.float(), a.float()), exact, atol=1e-6)


# --- identities ------------------------------------------------------------------------------------------------------


def test_basis_coefficients_rebuild_the_latent_and_ignore_every_invertible_map(rng):
    z, a, m = gaussian(rng, 20, 6), gaussian(rng, 6, 6), gaussian(rng, 6, 6)
    r = relative(z, a, similarity="basis")
    assert apart(r @ a, z) < 1e-8
    assert apart(relative(z @ m, a @ m, similarity="basis"), r) < 1e-8


def test_basis_solves_least_squares_with_few_and_with_many_anchors(rng):
    z = gaussian(rng, 5, 6)
    for m in (3, 9):
        a = gaussian(rng, m, 6)
        wanted = np.linalg.lstsq(a.numpy().T, z.numpy().T, rcond=None)[0].T
        np.testing.assert_allclose(relative(z, a, similarity="basis"), wanted, atol=1e-10)


def test_anchors_told_by_themselves_are_a_gram_matrix(rng):
    a = gaussian(rng, 12, 5)
    r = relative(a, a)
    assert apart(r.diagonal(), torch.ones(12)) < 1e-12
    assert apart(r, r.mT) < 1e-12
    assert int(torch.linalg.matrix_rank(r)) == 5


def test_several_similarities_stand_side_by_side(rng):
    z, a = gaussian(rng, 20, 6), gaussian(rng, 4, 6)
    names = ("cosine", "l1", "l2", "linf", lambda x, y: x @ y.mT)
    r = relative(z, a, similarity=names)
    for block, name in zip(r.chunk(5, -1), names):
        torch.testing.assert_close(block, relative(z, a, similarity=name))


def test_integer_anchors_are_rows(rng):
    z = gaussian(rng, 20, 6)
    torch.testing.assert_close(relative(z, torch.tensor([3, 0, 7])), relative(z, z[[3, 0, 7]]))


def test_gradient_is_that_of_finite_differences(rng):
    z, a = gaussian(rng, 4, 3).requires_grad_(), gaussian(rng, 5, 3).requires_grad_()
    for similarity in ("cosine", "inner", "basis", "l2"):
        assert torch.autograd.gradcheck(lambda x, y, s=similarity: relative(x, y, similarity=s, center=True), (z, a))


def test_a_zero_latent_has_zero_cosines_and_a_warning(rng):
    z, a = gaussian(rng, 3, 4), gaussian(rng, 2, 4)
    z[1] = 0
    with pytest.warns(UserWarning, match="zero latent"):
        r = relative(z.requires_grad_(), a)
    assert (r[1] == 0).all() and r.isfinite().all()
    r.sum().backward()
    assert z.grad.isfinite().all()
    with pytest.warns(UserWarning, match="anchor has a zero latent"):
        assert (relative(a, torch.zeros(2, 4, dtype=torch.float64)) == 0).all()


@pytest.mark.parametrize(
    ("x", "anchors", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), "the 3 features of x, got 5"),
        (torch.ones(2, 3), torch.ones(0, 3), "non-empty"),
        (torch.ones(2, 3), torch.ones(3), "non-empty"),
        (torch.ones(2, 3), torch.tensor([0, 2]), "index the 2 rows of x, got 0..2"),
        (torch.ones(2, 2, 3), torch.tensor([0, 1]), "rows of a matrix"),
    ],
)
def test_anchors_that_do_not_fit_are_refused(x, anchors, message):
    with pytest.raises(ValueError, match=message):
        relative(x, anchors)


def test_unknown_similarities_are_refused():
    with pytest.raises(ValueError, match=r"cosine, inner, basis.*'dot'"):
        relative(torch.ones(1, 2), torch.ones(1, 2), similarity="dot")
    with pytest.raises(ValueError, match="at least one measure"):
        relative(torch.ones(1, 2), torch.ones(1, 2), similarity=())
    with pytest.raises(ValueError, match=r"shape \(1, 1\), returned \(1, 2\)"):
        relative(torch.ones(1, 2), torch.ones(1, 2), similarity=lambda x, a: x)


# --- quantisation and aggregation ------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(values=st.lists(st.floats(-3, 3), min_size=1, max_size=8), bin_size=st.sampled_from([0.05, 0.1, 0.3, 1.0]))
def test_rounded_values_lie_on_the_grid_nearest(values, bin_size):
    v = torch.tensor(values, dtype=torch.float64)
    steps = quantize(v, "round", bin_size) / bin_size
    assert apart(steps, steps.round()) < 1e-9
    assert apart(steps * bin_size, v) <= bin_size / 2 + 1e-12


def test_rounding_passes_the_gradient_as_the_identity_does(rng):
    v, weight = gaussian(rng, 5, 4).requires_grad_(), gaussian(rng, 5, 4)
    (quantize(v, "round", 0.25) * weight).sum().backward()
    assert (v.grad == weight).all()
    module = RelativeRepresentation(gaussian(rng, 3, 4), quantize="round", bin_size=0.2, quantize_latents=True)
    module(v).sum().backward()
    assert (v.grad != weight).any()


def test_smooth_steps_are_flat_on_the_grid_and_steepest_between():
    b = 0.2
    v = torch.tensor([0.0, b, 5 * b, 0.5 * b], dtype=torch.float64, requires_grad=True)
    steps = quantize(v, "smooth", b)
    assert apart(steps.detach(), v.detach()) < 1e-12  # fixed points: the grid and the middles
    (slope,) = torch.autograd.grad(steps.sum(), v)
    assert apart(slope, torch.tensor([0.0, 0.0, 0.0, 2.0])) < 1e-9
    one = quantize(torch.tensor([0.3], dtype=torch.float64), "smooth", 1.0)
    assert float(one) == pytest.approx(0.3 - np.sin(2 * np.pi * 0.3) / (2 * np.pi))


def test_clustered_rows_become_the_mean_of_rows_within_a_diameter(rng):
    centres = 10 * torch.eye(3, dtype=torch.float64)
    rows = centres.repeat_interleave(4, 0) + 0.05 * gaussian(rng, 12, 3)
    merged = quantize(rows, "cluster", 1.0)
    for i in range(3):
        assert apart(merged[4 * i : 4 * i + 4], rows[4 * i : 4 * i + 4].mean(0).expand(4, 3)) < 1e-12
    assert apart(quantize(rows, "cluster", 1e-9), rows) < 1e-12
    assert apart(quantize(rows[None], "cluster", 1.0)[0], merged) == 0


def test_class_averages_by_a_double_loop(rng):
    r, labels = gaussian(rng, 6, 11), torch.tensor([2, 0, 5, 0, 2, 5, 5, 0, 2, 2, 0])
    for groups in (1, 2, 3):
        wanted = []
        for group in range(groups):
            for label in (0, 2, 5):
                columns = (labels == label).nonzero()[:, 0].tolist()
                wanted.append(r[:, columns[group::groups]].mean(1))
        torch.testing.assert_close(average_by_class(r, labels, groups), torch.stack(wanted, 1))
    with pytest.raises(ValueError, match="at most the 3 anchors of the rarest class, got 4"):
        average_by_class(r, labels, 4)
    with pytest.raises(ValueError, match="each of 11 anchors"):
        average_by_class(r, labels[:-1])


# --- the module ------------------------------------------------------------------------------------------------------


def test_module_is_the_function(rng):
    z, a = gaussian(rng, 20, 6, dtype=torch.float32), gaussian(rng, 4, 6, dtype=torch.float32)
    for options in ({}, {"similarity": "basis"}, {"center": True}, {"similarity": ("cosine", "l2"), "whiten": True}):
        module = RelativeRepresentation(a, **options)
        torch.testing.assert_close(module(z), relative(z, a, **options))
        torch.testing.assert_close(RelativeRepresentation(**options)(z, a), relative(z, a, **options))
        assert module(z).shape[-1] == module.out_features


def test_module_notices_new_anchors_however_they_come(rng):
    z, a, b = (gaussian(rng, n, 6, dtype=torch.float32) for n in (20, 4, 4))
    module = RelativeRepresentation(a)
    module(z)
    module.set_anchors(b)
    torch.testing.assert_close(module(z), relative(z, b))
    for seed in range(8):  # a tensor may come to lie where one lay that was dropped
        module.set_anchors(gaussian(rng, 4, 6, dtype=torch.float32))
        module.set_anchors(a if seed % 2 else b)
        torch.testing.assert_close(module(z), relative(z, a if seed % 2 else b))
    module.anchors.copy_(a)
    torch.testing.assert_close(module(z), relative(z, a))
    module.load_state_dict(RelativeRepresentation(b).state_dict())
    torch.testing.assert_close(module(z), relative(z, b))
    torch.testing.assert_close(module.double()(z.double()).float(), relative(z, b))
    assert module.num_anchors == 4


def test_heads_are_projections_of_chunks(rng):
    z, a = gaussian(rng, 20, 6), gaussian(rng, 4, 6)
    parts = torch.stack([relative(z[:, i : i + 2], a[:, i : i + 2]) for i in (0, 2, 4)])
    wanted = {"none": torch.cat(list(parts), 1), "sum": parts.sum(0), "mean": parts.mean(0), "max": parts.amax(0)}
    for pool, answer in wanted.items():
        torch.testing.assert_close(RelativeRepresentation(a, heads=3, pool=pool)(z), answer)
    learnt = RelativeRepresentation(a, heads=3, pool="linear").double()
    torch.testing.assert_close(learnt(z), learnt.combine(wanted["none"]))
    assert learnt.out_features == 4


def test_norms_are_those_of_torch(rng):
    z, a = gaussian(rng, 2, 20, 6, dtype=torch.float32), gaussian(rng, 4, 6, dtype=torch.float32)
    plain = relative(z, a)
    torch.testing.assert_close(RelativeRepresentation(a, norm="layer")(z), nn.functional.layer_norm(plain, (4,)))
    torch.testing.assert_close(RelativeRepresentation(a, norm="l2")(z), nn.functional.normalize(plain, dim=-1))
    flat = plain.flatten(0, 1)
    wanted = (flat - flat.mean(0)) / (flat.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(RelativeRepresentation(a, norm="batch")(z).flatten(0, 1), wanted, atol=1e-4, rtol=1e-4)


def test_class_averages_of_several_similarities_keep_their_blocks(rng):
    z, a, labels = gaussian(rng, 20, 6), gaussian(rng, 4, 6), torch.tensor([0, 1, 1, 0])
    module = RelativeRepresentation(a, similarity=("cosine", "l2"), anchor_labels=labels)
    wanted = [average_by_class(relative(z, a, similarity=s), labels) for s in ("cosine", "l2")]
    torch.testing.assert_close(module(z), torch.cat(wanted, 1))
    assert module.out_features == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bin_size": 0.1}, "need quantize"),
        ({"quantize": "round", "bin_size": 0.0}, "bin_size must be positive, got 0"),
        ({"quantize": "floor"}, "round, smooth or cluster, got 'floor'"),
        ({"heads": 0}, "heads must be at least 1"),
        ({"heads": 4}, "heads must divide the 6 features"),
        ({"pool": "median"}, "pool must be one of"),
        ({"norm": "group"}, "norm must be"),
        ({"anchor_labels": torch.tensor([0, 1])}, "declared|each of"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RelativeRepresentation(torch.ones(3, 6), **options)


def test_a_module_without_anchors_says_so(rng):
    with pytest.raises(ValueError, match="no anchors"):
        RelativeRepresentation()(torch.ones(2, 3))
    with pytest.raises(ValueError, match="needs anchors or num_anchors"):
        RelativeRepresentation(norm="layer")
    with pytest.raises(ValueError, match="none are set"):
        _ = RelativeRepresentation().out_features
    module = RelativeRepresentation(num_anchors=5, norm="layer")
    assert module.out_features == 5
    with pytest.raises(ValueError, match="the 5 that were declared, got 4"):
        module(gaussian(rng, 2, 3, dtype=torch.float32), gaussian(rng, 4, 3, dtype=torch.float32))


# --- the encoder -----------------------------------------------------------------------------------------------------


def batch_norm_net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 6))


def test_encoder_follows_its_weights_in_evaluation(rng):
    net, anchors, x = batch_norm_net(), gaussian(rng, 5, 8).float(), gaussian(rng, 7, 8).float()
    encoder = RelativeEncoder(net, anchors).eval()
    torch.testing.assert_close(encoder(x), relative(net(x), net(anchors)))
    kept = encoder.anchor_latents()
    assert encoder.anchor_latents() is kept  # not computed again
    with torch.no_grad():
        net[3].weight.mul_(torch.linspace(0.5, 2, 6)[:, None])
    torch.testing.assert_close(encoder(x), relative(net(x), net(anchors)))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    encoder(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(encoder(x), relative(net(x), net(anchors)))
    for _ in range(4):  # a replaced weight may come to lie where the old one lay
        net[3] = nn.Linear(16, 6)
        torch.testing.assert_close(encoder(x), relative(net(x), net(anchors)))
    net[3].weight.data.mul_(torch.linspace(0.5, 2, 6)[:, None])  # unseen by autograd
    encoder.refresh()
    torch.testing.assert_close(encoder(x), relative(net(x), net(anchors)))


def test_anchors_share_the_mode_of_the_encoder_in_training(rng):
    net, anchors = batch_norm_net(), gaussian(rng, 5, 8).float()
    encoder = RelativeEncoder(net, anchors).train()
    with torch.no_grad():
        by_batch = net(anchors)
        torch.testing.assert_close(encoder.anchor_latents(), by_batch)
        torch.testing.assert_close(encoder.eval().anchor_latents(), net(anchors))
        assert apart(net(anchors), by_batch) > 1e-3
    frozen = RelativeEncoder(net, anchors, refresh="eval").train()
    net.eval()
    expected = net(anchors)
    torch.testing.assert_close(frozen.train().anchor_latents(), expected)
    assert net.training  # the mode is put back


def test_gradient_reaches_the_encoder_through_the_anchors_only_if_asked(rng):
    anchors, x = gaussian(rng, 5, 8).float(), gaussian(rng, 7, 8).float()
    for through in (False, True):
        net = nn.Linear(8, 6)
        RelativeEncoder(net, anchors, grad_through_anchors=through)(x).square().sum().backward()
        ours, net.weight.grad = net.weight.grad.clone(), None
        latents = net(anchors) if through else net(anchors).detach()
        relative(net(x), latents).square().sum().backward()
        torch.testing.assert_close(ours, net.weight.grad)
    encoder = RelativeEncoder(net, anchors, grad_through_anchors=True).eval()
    assert encoder.anchor_latents().requires_grad


def test_anchors_are_refreshed_every_third_step_or_in_turn(rng):
    net, anchors = nn.Linear(8, 6), gaussian(rng, 5, 8).float()

    def write():
        with torch.no_grad():
            net.weight.add_(0.1)

    encoder = RelativeEncoder(net, anchors, refresh=3).train()
    seen = []
    for _ in range(7):
        seen.append(apart(encoder.anchor_latents(), net(anchors).detach()) == 0)
        write()
    assert seen == [True, False, False, True, False, False, True]
    assert apart(encoder.eval().anchor_latents(), net(anchors).detach()) == 0

    encoder = RelativeEncoder(net, anchors, anchor_batch=2).train()
    encoder.anchor_latents()
    fresh = []
    for _ in range(3):
        write()
        same = (encoder.anchor_latents() - net(anchors)).abs().amax(1) < 1e-6
        fresh.append(same.nonzero()[:, 0].tolist())
    assert fresh == [[2, 3], [0, 4], [1, 2]]


def test_integer_anchors_index_a_data_set(rng):
    data, net = gaussian(rng, 20, 8).float(), nn.Linear(8, 6)
    encoder = RelativeEncoder(net, torch.tensor([4, 1]), dataset=data)
    torch.testing.assert_close(encoder(data), relative(net(data), net(data[[4, 1]])))
    with pytest.raises(ValueError, match=r"index the 20 samples of dataset, got 1\.\.20"):
        RelativeEncoder(net, torch.tensor([1, 20]), dataset=data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh": "sometimes"}, "'always', 'eval' or a number"),
        ({"refresh": 0}, "'always', 'eval' or a number"),
        ({"anchor_batch": 6}, "1 to the 5 anchors"),
        ({"projection": RelativeRepresentation(num_anchors=4)}, "the 4 anchors of projection, got 5"),
    ],
)
def test_encoder_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RelativeEncoder(nn.Linear(8, 6), torch.ones(5, 8), **options)
    with pytest.raises(ValueError, match="at least one sample"):
        RelativeEncoder(nn.Linear(8, 6), torch.ones(0, 8))


def test_copies_and_saved_encoders_answer_alike(rng):
    anchors, x = gaussian(rng, 5, 8).float(), gaussian(rng, 7, 8).float()
    encoder = RelativeEncoder(batch_norm_net(), anchors, projection=RelativeRepresentation(num_anchors=5, norm="layer"))
    encoder.eval()
    answer = encoder(x)
    torch.testing.assert_close(copy.deepcopy(encoder)(x), answer)
    torch.testing.assert_close(encoder.freeze()(x), answer)
    other = RelativeEncoder(
        nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 6)),
        torch.zeros(5, 8),
        projection=RelativeRepresentation(num_anchors=5, norm="layer"),
    ).eval()
    file = io.BytesIO()
    torch.save(encoder.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x), answer)


def test_latents_kept_in_inference_mode_do_not_spoil_training(rng):
    net, anchors, x = nn.Linear(8, 6), gaussian(rng, 5, 8).float(), gaussian(rng, 7, 8).float()
    encoder = RelativeEncoder(net, anchors).eval()
    stored = RelativeRepresentation(anchors)
    with torch.inference_mode():
        encoder(x)
        stored(x)
    encoder(x).sum().backward()
    leaf = x.clone().requires_grad_()
    stored(leaf).sum().backward()
    assert net.weight.grad.isfinite().all() and leaf.grad.isfinite().all()


# --- insertion -------------------------------------------------------------------------------------------------------


class Branched(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(8, 10), nn.Sequential(nn.GELU(), nn.Linear(10, 6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x)) * 1.0)


def test_inserted_projection_is_the_model_cut_at_its_path(rng):
    model, anchors, x = Branched(), gaussian(rng, 5, 8).float(), gaussian(rng, 7, 8).float()
    untouched = copy.deepcopy(model.state_dict())
    head = nn.Linear(5, 6)
    new = RelativeRepresentation.insert(model, "body.1", anchors=anchors, head=head)
    before, cut = model(x), lambda z: model.body(model.stem(z))
    torch.testing.assert_close(new(x), model.head(head(relative(cut(x), cut(anchors)))))
    torch.testing.assert_close(model(x), before)
    assert all(torch.equal(untouched[name], tensor) for name, tensor in model.state_dict().items())
    new.eval()
    torch.testing.assert_close(copy.deepcopy(new)(x), new(x))
    with torch.no_grad():
        new.stem.weight.mul_(torch.linspace(0.5, 2, 10)[:, None])
    again = copy.deepcopy(model)
    again.stem.load_state_dict(new.stem.state_dict())
    cut = lambda z: again.body(again.stem(z))  # noqa: E731
    torch.testing.assert_close(new(x), again.head(head(relative(cut(x), cut(anchors)))))


def test_inserted_projection_trains(rng):
    new = RelativeRepresentation.insert(
        Branched(), "body", anchors=gaussian(rng, 5, 8).float(), head=nn.Linear(5, 6), grad_through_anchors=True
    )
    x, y = gaussian(rng, 64, 8).float(), torch.randint(3, (64,), generator=rng)
    optimizer = torch.optim.Adam(new.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        losses.append(nn.functional.cross_entropy(new(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_insertion_at_no_module_or_at_one_that_is_not_run_is_refused(rng):
    with pytest.raises(ValueError, match="tail"):
        RelativeRepresentation.insert(Branched(), "tail", anchors=torch.ones(5, 8))
    model = Branched()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="runs through"):
        RelativeRepresentation.insert(model, "unused", anchors=torch.ones(5, 8))
    with pytest.raises(ValueError, match="at least one sample"):
        RelativeRepresentation.insert(model, "body", anchors=torch.ones(0, 8))


# --- stitching -------------------------------------------------------------------------------------------------------


def test_a_rotated_twin_stitches_exactly(rng):
    """Model j is model i with its latent space rotated and scaled: every stitched output equals the unstitched one."""
    encoder_i = batch_norm_net().eval()
    q = rotation(rng, 6).float()
    encoder_j = nn.Sequential(encoder_i, nn.Linear(6, 6, bias=False))
    encoder_j[1].weight.data = 2.5 * q
    anchors, x = gaussian(rng, 9, 8).float(), gaussian(rng, 20, 8).float()
    head = nn.Sequential(nn.LayerNorm(9), nn.Linear(9, 4), nn.GELU(), nn.Linear(4, 3))
    whole = nn.Sequential(RelativeEncoder(encoder_j, anchors), head).eval()
    torch.testing.assert_close(stitch(encoder_i, head, anchors)(x), whole(x), atol=1e-5, rtol=0)
    shuffled = stitch(encoder_i, head, anchors.flip(0))
    assert apart(shuffled(x), whole(x)) > 1e-2  # the order of anchors matters

    # Absolute: the first layer of decoder j undoes the rotation, so that the twin computes the same function; encoder i
    # under decoder j does not, and translated it does again.
    decoder_i, decoder_j = nn.Linear(6, 8), nn.Linear(6, 8)
    decoder_j.weight.data, decoder_j.bias.data = decoder_i.weight.data @ q.mT / 2.5, decoder_i.bias.data
    torch.testing.assert_close(decoder_j(encoder_j(x)), decoder_i(encoder_i(x)), atol=1e-5, rtol=0)
    assert apart(decoder_j(encoder_i(x)), decoder_i(encoder_i(x))) > 1e-2
    across = translate(encoder_i(anchors), encoder_j(anchors))
    torch.testing.assert_close(decoder_j(across(encoder_i(x))), decoder_i(encoder_i(x)), atol=1e-4, rtol=0)


def test_a_stitched_model_is_a_copy_in_evaluation_mode(rng):
    net, head = batch_norm_net().train(), nn.Linear(5, 3)
    stitched = stitch(net, head, gaussian(rng, 5, 8).float())
    assert net.training and not stitched.training and not stitched.encoder.encoder.training
    assert stitched.head.weight is not head.weight
    x = gaussian(rng, 7, 8).float()
    torch.testing.assert_close(stitched(x)[:1], stitched(x[:1]))  # no sample depends on its batch


def test_a_relative_encoder_brings_its_projection(rng):
    anchors, x = gaussian(rng, 5, 8).float(), gaussian(rng, 7, 8).float()
    encoder = RelativeEncoder(nn.Linear(8, 6), anchors, projection=RelativeRepresentation(similarity="inner"))
    head = nn.Linear(5, 3)
    torch.testing.assert_close(stitch(encoder, head, anchors)(x), head(encoder(x)))


def test_stitching_what_does_not_fit_is_refused():
    encoder, anchors = nn.Linear(8, 6), torch.randn(5, 8)
    for head in (nn.Linear(4, 3), nn.Sequential(nn.Flatten(), nn.LayerNorm(4)), nn.Bilinear(5, 5, 2)):
        with pytest.raises((ValueError, TypeError), match=r"5 coordinates|input2"):
            stitch(encoder, head, anchors)
    with pytest.raises(ValueError, match="must pair up, got 5 and 6"):
        stitch(encoder, nn.Linear(5, 3), anchors, torch.randn(6, 8))


@pytest.mark.compile
def test_compiled_projection_is_the_eager_one(rng):
    z, a = gaussian(rng, 20, 6).float(), gaussian(rng, 4, 6).float()
    module = RelativeRepresentation(a, norm="layer")
    torch.testing.assert_close(torch.compile(module)(z), module(z))
    encoder = RelativeEncoder(nn.Linear(8, 6), gaussian(rng, 5, 8).float()).eval()
    x = gaussian(rng, 7, 8).float()
    torch.testing.assert_close(torch.compile(encoder)(x), encoder(x))
    exported = torch.export.export(encoder.freeze(), (x,)).module()
    torch.testing.assert_close(exported(x), encoder(x))


# --- and back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("center", [False, True])
def test_latents_come_back_from_their_coordinates(rng, center):
    z, a = gaussian(rng, 20, 6), gaussian(rng, 15, 6)
    for similarity in ("inner", "basis"):
        r = relative(z, a, similarity=similarity, center=center)
        assert apart(from_relative(r, a, similarity=similarity, center=center), z) < 1e-10
    back = from_relative(relative(z, a, center=center), a, center=center)
    mean = a.mean(0) if center else 0
    assert apart(back, nn.functional.normalize(z - mean, dim=-1) + mean) < 1e-10


def test_translation_is_exact_between_similar_spaces(rng):
    z, q, shift = gaussian(rng, 50, 6), rotation(rng, 6), gaussian(rng, 6)
    other = 3 * z @ q + shift
    assert apart(translate(z[:15], other[:15])(z), other) < 1e-10
    assert apart(translate(z[:15], 3 * z[:15] @ q, center=False)(z), 3 * z @ q) < 1e-10


def test_bad_conditioning_is_told(rng):
    z = gaussian(rng, 20, 6)
    with pytest.warns(UserWarning, match="span 3 of 6 directions"):
        translate(z[:3], z[:3], center=False)
    flat = z * torch.tensor([1, 1, 1, 1, 1, 1e-6], dtype=torch.float64)
    with pytest.warns(UserWarning, match="condition number"):
        from_relative(relative(z, flat), flat)
    with pytest.warns(UserWarning, match="span 5 of 6"):
        from_relative(relative(z, flat), flat, tolerance=1e-3)


def test_taking_back_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="must be cosine, inner or basis"):
        from_relative(torch.ones(2, 3), torch.ones(3, 4), similarity="l1")
    with pytest.raises(ValueError, match="to the 3 anchors, got 2"):
        from_relative(torch.ones(2, 2), torch.ones(3, 4))
    with pytest.raises(ValueError, match="pair up, got 3 and 2"):
        translate(torch.ones(3, 4), torch.ones(2, 4))
