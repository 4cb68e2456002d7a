"""Hypernetworks against homogeneity, closed forms of their start, trigonometry, and the authors' package."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lathe.nn.mip_hypernetworks import HyperNetwork, InputSpec, encode, magnitude_profile, param_groups

F64 = torch.float64
SHAPES = {"conv.weight": (6, 3, 3, 3), "conv.bias": (6,), "linear.weight": (5, 6)}
HEADS = [{}, {"head_rank": 4}, {"head_chunk": 7}, {"adapter_rank": 1}]
USUAL = {"encoding": "none", "residual": False}


class TestEncoding:
    def test_a_quarter_turn_leads_from_cosine_to_sine(self):
        ends = encode(torch.tensor([[0.0], [1.0]], dtype=F64))
        torch.testing.assert_close(ends, torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=F64), atol=1e-15, rtol=0)

    @given(a=st.floats(0, 1), b=st.floats(0, 1))
    def test_inner_products_are_cosines_of_the_distance(self, a, b):
        both = encode(torch.tensor([[a], [b]], dtype=F64))
        assert float(both[0] @ both[1]) == pytest.approx(math.cos(math.pi * (a - b) / 2), abs=1e-14)

    @given(
        gamma=st.lists(st.floats(0, 1), min_size=1, max_size=9),
        frequencies=st.integers(1, 4),
    )
    def test_the_norm_depends_on_the_number_of_inputs_alone(self, gamma, frequencies):
        encoded = encode(torch.tensor(gamma, dtype=F64), frequencies=frequencies)
        assert encoded.shape == (2 * len(gamma) * frequencies,)
        assert float(encoded.norm()) == pytest.approx(math.sqrt(len(gamma)), abs=1e-12)

    def test_its_jacobian_has_the_same_norm_everywhere(self):
        for gamma in torch.linspace(0, 1, 7, dtype=F64):
            jacobian = torch.autograd.functional.jacobian(encode, gamma[None])
            assert float(jacobian.norm()) == pytest.approx(math.pi / 2, abs=1e-14)

    def test_the_other_encodings_do_not_have_a_constant_norm(self):
        gamma = torch.tensor([0.25, 0.5])
        assert torch.equal(encode(gamma, "none"), gamma)
        assert encode(gamma, "complement").tolist() == [0.25, 0.5, 0.75, 0.5]

    def test_all_cosines_come_before_all_sines_as_in_the_authors_package(self, rng):
        encoding = pytest.importorskip("hyperlight.hypernet.encoding")
        gamma = torch.rand(4, 3, dtype=F64, generator=rng)
        for ours, theirs in (("mip", "cos|sin"), ("complement", "z|1-z"), ("none", None)):
            torch.testing.assert_close(encode(gamma, ours), encoding.encode_input(gamma, theirs), atol=1e-15, rtol=0)


class TestInputSpec:
    def test_scales_lead_from_a_range_to_the_unit_interval(self):
        def unit(spec, *values):
            return [float(spec.rows("gamma", value)[0]) for value in values]

        assert unit(InputSpec(low=-2.0, high=2.0), -2.0, 0.0, 2.0) == [0.0, 0.5, 1.0]
        assert unit(InputSpec(low=1e-4, high=1.0, scale="log"), 1e-4, 1e-2, 1.0) == pytest.approx([0, 0.5, 1], abs=1e-6)
        assert unit(InputSpec(low=2.0, high=4.0, scale="sigmoid"), 2.0, 3.0, 4.0) == pytest.approx([0.25, 0.5, 0.75])
        assert unit(InputSpec(low=2.0, high=4.0, scale="sigmoid"), -1e6, 1e6) == [0.0, 1.0]

    def test_ranks_make_any_distribution_uniform(self, rng):
        samples = torch.randn(4000, generator=rng, dtype=F64).exp()  # heavy-tailed
        spec = InputSpec.ranked(samples)
        fresh = torch.randn(4000, generator=rng, dtype=F64).exp()
        ranks = spec.rows("gamma", fresh[:, None])[0].flatten().sort().values
        uniform = (torch.arange(4000) + 0.5) / 4000
        assert float((ranks - uniform).abs().max()) < 0.04  # Kolmogorov-Smirnov's distance, two samples of 4000
        assert spec.rows("gamma", 1e9)[0].item() == 1.0
        assert spec.rows("gamma", -1e9)[0].item() == 0.0

    def test_ranks_of_values_that_occur_often_stay_ranks(self):
        spec = InputSpec.ranked(torch.cat([torch.zeros(50), torch.linspace(0, 1, 50)]), quantiles=101)
        half, later = (float(spec.rows("gamma", value)[0]) for value in (1e-6, 0.5))
        assert float(spec.rows("gamma", 0.0)[0]) == 0.0
        assert half == pytest.approx(0.5, abs=0.02)
        assert later == pytest.approx(0.75, abs=0.02)

    def test_numbers_are_as_exact_as_the_weights(self):
        hyper = HyperNetwork(1, {"w": (3,)}, dtype=F64)
        assert torch.equal(hyper.flat(gamma=0.3), hyper.flat(gamma=torch.tensor([0.3], dtype=F64)))

    def test_categories_become_one_hot_vectors_next_to_the_encoded_rest(self):
        hyper = HyperNetwork({"kind": InputSpec(3, kind="categorical"), "amount": 1}, {"w": (2,)}, hidden=())
        seen = []
        hyper.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        hyper(kind=torch.tensor(2), amount=0.0)
        hyper(kind=torch.tensor([0, 1]), amount=1.0)
        assert seen[0].tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]
        torch.testing.assert_close(seen[1], torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0, 0.0]]))

    def test_ranges_and_kinds_that_cannot_be_are_refused(self, shape_checks_off):
        for wrong, told in [
            ({"size": 0}, "size must be at least 1, got 0"),
            ({"low": 1.0}, "low must be less than high, got 1.0 and 1.0"),
            ({"scale": "log"}, "low must be positive on a log scale, got 0.0"),
            ({"scale": "rank"}, "quantiles belong to scale 'rank', got 0"),
            ({"scale": "cubic"}, "scale must be 'linear'.*got 'cubic'"),
            ({"kind": "text"}, "kind must be 'real' or 'categorical', got 'text'"),
            ({"scale": "rank", "quantiles": (1.0, 1.0)}, "quantiles must ascend from a smallest to a larger number"),
            ({"scale": "rank", "quantiles": (1.0, 0.0, 2.0)}, "quantiles must ascend"),
        ]:
            with pytest.raises(ValueError, match=told):
                InputSpec(**wrong)


class TestProportionality:
    """Section 3: the usual hypernetwork with zero biases is positively homogeneous in gamma."""

    @settings(max_examples=30, deadline=None)
    @given(
        d=st.integers(1, 4),
        hidden=st.lists(st.integers(1, 24), max_size=3),
        activation=st.sampled_from([nn.ReLU, nn.LeakyReLU, nn.Identity, partial(nn.LeakyReLU, 0.3)]),
        alpha=st.floats(0.01, 1.0),
        head=st.sampled_from(HEADS[:3]),
        seed=st.integers(0, 1000),
    )
    def test_predictions_of_the_usual_hypernetwork_are_proportional_to_gamma(
        self, d, hidden, activation, alpha, head, seed
    ):
        generator = torch.Generator().manual_seed(seed)
        hyper = HyperNetwork(d, SHAPES, hidden, activation, generator=generator, dtype=F64, **USUAL, **head)
        gamma = torch.rand(d, dtype=F64, generator=generator)
        whole, part = hyper.flat(gamma=gamma), hyper.flat(gamma=alpha * gamma)
        torch.testing.assert_close(part / alpha, whole, rtol=1e-12, atol=1e-14)

    def test_biases_encoding_or_residual_end_it(self):
        gamma = torch.tensor([0.8], dtype=F64)
        for options in ({"residual": False}, {"encoding": "none"}, {"encoding": "complement", "residual": False}):
            hyper = HyperNetwork(1, SHAPES, dtype=F64, **options)
            assert not torch.allclose(hyper.flat(gamma=gamma / 2) * 2, hyper.flat(gamma=gamma), rtol=1e-3)
        biased = HyperNetwork(1, SHAPES, dtype=F64, **USUAL)
        nn.init.ones_(biased.trunk[0].bias)
        assert not torch.allclose(biased.flat(gamma=gamma / 2) * 2, biased.flat(gamma=gamma), rtol=1e-3)

    def test_outputs_and_gradients_of_an_l_layer_primary_follow_powers_of_gamma(self, rng):
        shapes = {str(layer): shape for layer, shape in enumerate([(16, 8), (16, 16), (16, 16), (4, 16)])}
        hyper = HyperNetwork(1, shapes, dtype=F64, **USUAL)
        x = torch.randn(5, 8, dtype=F64, generator=rng)
        outputs, gradients = [], []
        gammas = torch.logspace(-1, 0, 5, dtype=F64)
        for gamma in gammas:
            weights = {name: weight.detach().requires_grad_() for name, weight in hyper(gamma=gamma).items()}
            y = x
            for weight in weights.values():
                y = functional.leaky_relu(functional.linear(y, weight), 0.1)
            outputs.append(y.detach().norm())
            gradients.append(torch.stack([g.norm() for g in torch.autograd.grad(y.sum(), [*weights.values()])]))

        def slope(values):
            x, y = gammas.log(), torch.stack(values).log()
            x = x - x.mean()
            return (x @ (y - y.mean(0))) / x.square().sum()

        assert float(slope(outputs)) == pytest.approx(4.0, abs=1e-3)
        assert slope(gradients).tolist() == pytest.approx([3.0] * 4, abs=1e-3)

    def test_layer_norm_makes_the_usual_hypernetwork_blind(self):
        hyper = HyperNetwork(1, SHAPES, dtype=F64, norm=partial(nn.LayerNorm, eps=1e-14), **USUAL)
        one = hyper.flat(gamma=1.0)
        for gamma in (1e-3, 0.1, 0.7):
            torch.testing.assert_close(hyper.flat(gamma=gamma), one, rtol=1e-6, atol=1e-8)
        mip = HyperNetwork(1, SHAPES, dtype=F64, norm=nn.LayerNorm)
        assert not torch.allclose(mip.flat(gamma=0.1), mip.flat(gamma=1.0))

    def test_the_profile_tells_proportional_from_independent(self):
        gammas = torch.linspace(0.1, 1.0, 6, dtype=F64)[:, None]
        usual = magnitude_profile(HyperNetwork(1, SHAPES, dtype=F64, **USUAL), gammas)
        mip = HyperNetwork(1, SHAPES, dtype=F64)
        profile = magnitude_profile(mip, gammas, loss=lambda gamma: mip.flat(gamma=gamma).square().sum())
        for name in SHAPES:
            assert usual.slope[name] == pytest.approx(1.0, abs=1e-10)
        assert abs(profile.slope[""]) < 0.1
        assert profile.gradient.shape == (6,)
        expected = torch.stack([mip.flat(gamma=gamma).std(correction=0) for gamma in gammas])
        torch.testing.assert_close(profile.deviation[""], expected.detach(), atol=1e-12, rtol=1e-12)
        assert profile.plot().to_dict()["mark"]["type"] == "line"
        with pytest.raises(ValueError, match="gammas must have one length"):
            magnitude_profile(HyperNetwork({"a": 1, "b": 1}, SHAPES), {"a": torch.rand(2, 1), "b": torch.rand(3, 1)})


class TestStart:
    @pytest.mark.parametrize("head", HEADS[:3], ids=str)
    @pytest.mark.parametrize("d", [1, 3])
    def test_changes_start_with_the_deviation_of_the_closed_form(self, d, head):
        """E |a|^2 = |E(gamma)|^2 = d through Kaiming layers by fan_out, and the rows of a head have variance 1/m."""
        gamma = torch.rand(d, generator=torch.Generator().manual_seed(1))
        squares = dict.fromkeys(SHAPES, 0.0)
        for seed in range(200):
            hyper = HyperNetwork(
                d, SHAPES, (32, 64), residual=False, generator=torch.Generator().manual_seed(seed), **head
            )
            for name, change in hyper(gamma=gamma).items():
                squares[name] += float(change.detach().square().mean()) / 200
        for name, shape in SHAPES.items():
            assert math.sqrt(squares[name]) == pytest.approx(math.sqrt(d / math.prod(shape)), rel=0.1 if head else 0.05)

    def test_theta0_starts_as_a_fresh_network(self):
        hyper = HyperNetwork(1, {"a.weight": (400, 50), "a.bias": (400,), "norm.weight": (9,), "norm.bias": (9,)})
        theta0 = hyper.theta0()
        gain = math.sqrt(2 / (1 + 0.01**2))
        assert float(theta0["a.weight"].detach().std()) == pytest.approx(gain / math.sqrt(50), rel=0.03)
        assert not theta0["a.bias"].any()
        assert not theta0["norm.bias"].any()
        assert (theta0["norm.weight"] == 1).all()

    def test_theta0_starts_at_the_values_of_tensors_and_networks(self):
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.PReLU())
        for target in (net, dict(net.named_parameters())):
            theta0 = HyperNetwork(1, target).theta0()
            assert {name: tuple(value.shape) for name, value in theta0.items()} == {
                name: tuple(value.shape) for name, value in net.named_parameters()
            }
            for name, parameter in net.named_parameters():
                assert torch.equal(theta0[name], parameter)

    def test_an_adapter_starts_at_theta0_and_learns_matrices_of_low_rank(self, rng):
        hyper = HyperNetwork(1, {"w": (20, 4, 3), "b": (20,)}, adapter_rank=2, dtype=F64)
        assert torch.equal(hyper(gamma=0.3)["w"], hyper.theta0()["w"])
        with torch.no_grad():
            for parameter in hyper.head.parameters():
                parameter.normal_(generator=rng)
        change = (hyper(gamma=0.3)["w"] - hyper.theta0()["w"]).flatten(1)
        assert int(torch.linalg.matrix_rank(change, rtol=1e-10)) == 2
        assert tuple(hyper.head.factors.weight.shape) == (2 * (20 + 12) + 20, 128)

    def test_chunks_share_one_matrix_and_differ_by_their_embedding(self):
        hyper = HyperNetwork(1, {"a": (3, 4), "b": (5,)}, (8,), head_chunk=5, residual=False, dtype=F64)
        seen = []
        hyper.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        found = hyper(gamma=0.4)
        chunks = [hyper.head.weight @ (row * seen[0]) for row in hyper.head.embedding]
        assert len(chunks) == 3 + 1
        torch.testing.assert_close(found["a"].flatten(), torch.cat(chunks[:3])[:12])
        torch.testing.assert_close(found["b"], chunks[3])

    @pytest.mark.parametrize("head", HEADS, ids=str)
    def test_scaling_a_tensor_scales_theta0_and_its_changes_and_no_other(self, head, rng):
        hyper = HyperNetwork(1, SHAPES, dtype=F64, **head)
        with torch.no_grad():
            for parameter in hyper.head.parameters():
                parameter.normal_(generator=rng)
        before = {name: weight.clone() for name, weight in hyper(gamma=0.6).items()}
        theta0 = {name: weight.clone() for name, weight in hyper.theta0().items()}
        hyper.scale("conv.*", 0.5)
        hyper.scale("linear.weight", 3.0, theta0=False)
        after = hyper(gamma=0.6)
        torch.testing.assert_close(after["conv.weight"], before["conv.weight"] / 2)
        torch.testing.assert_close(after["conv.bias"], before["conv.bias"] / 2)
        change = before["linear.weight"] - theta0["linear.weight"]
        torch.testing.assert_close(after["linear.weight"], theta0["linear.weight"] + 3 * change)
        with pytest.raises(ValueError, match=r"select must match predicted tensors \(conv.weight, .*got 'head'"):
            hyper.scale("head", 1.0)

    def test_the_same_generator_gives_the_same_hypernetwork(self):
        one, other = (HyperNetwork(2, SHAPES, generator=torch.Generator().manual_seed(7)) for _ in range(2))
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values()):
            assert torch.equal(a, b), name


class TestPrediction:
    @settings(max_examples=20, deadline=None)
    @given(
        batch=st.integers(0, 5),
        d=st.integers(1, 3),
        head=st.sampled_from(HEADS),
        residual=st.booleans(),
        encoding=st.sampled_from(["mip", "none", "complement"]),
    )
    def test_a_batch_is_a_loop_over_its_rows(self, batch, d, head, residual, encoding):
        hyper = HyperNetwork(d, SHAPES, (5, 7), encoding=encoding, residual=residual, dtype=F64, **head)
        gammas = torch.rand(batch, d, dtype=F64)
        together = hyper(gamma=gammas)
        for name, shape in SHAPES.items():
            assert together[name].shape == (batch, *shape)
            for row, gamma in enumerate(gammas):
                torch.testing.assert_close(together[name][row], hyper(gamma=gamma)[name], atol=1e-12, rtol=1e-12)

    def test_it_is_the_sum_that_the_paper_writes(self, rng):
        hyper = HyperNetwork(2, SHAPES, (4, 6), dtype=F64)
        gamma = torch.rand(2, dtype=F64, generator=rng)
        a = torch.cat([(math.pi * gamma / 2).cos(), (math.pi * gamma / 2).sin()])
        for layer in (hyper.trunk[0], hyper.trunk[2]):
            z = layer.weight @ a + layer.bias
            a = torch.where(z > 0, z, 0.01 * z)
        expected = hyper.head.weight @ a + hyper.flat_theta0
        found = torch.cat([weight.flatten() for weight in hyper(gamma=gamma).values()])
        torch.testing.assert_close(found, expected, atol=1e-14, rtol=1e-14)

    def test_with_its_weights_it_is_the_hypernetwork_of_the_authors_package(self, rng):
        hyperlight = pytest.importorskip("hyperlight")
        inputs = {"b": (2,), "a": (1,), "c": (2, 2)}
        peer = hyperlight.HyperNet(input_shapes=inputs, output_shapes=SHAPES, hidden_sizes=[5, 9]).double()
        ours = HyperNetwork(inputs, SHAPES, (5, 9), dtype=F64)
        linears = [module for module in peer.backbone if isinstance(module, nn.Linear)]
        with torch.no_grad():
            for linear in linears:
                linear.bias.normal_(generator=rng)
            for mine, theirs in zip([ours.trunk[0], ours.trunk[2]], linears):
                mine.load_state_dict(theirs.state_dict())
            ours.head.weight.copy_(linears[-1].weight)
            ours.flat_theta0.copy_(linears[-1].bias)
        for batch in ((), (3,)):
            gammas = {n: torch.rand(*batch, *shape, dtype=F64, generator=rng) for n, shape in inputs.items()}
            expected, found = peer(**dict(gammas)), ours(**gammas)
            for name in SHAPES:
                torch.testing.assert_close(found[name], expected[name], atol=1e-10, rtol=1e-10)

    def test_predictions_are_views_of_one_tensor_and_their_gradient_is_whole(self):
        hyper = HyperNetwork(1, SHAPES, dtype=F64)
        weights = hyper(gamma=0.2)
        storages = {weight.untyped_storage().data_ptr() for weight in weights.values()}
        assert len(storages) == 1
        sum(weight.sum() for weight in weights.values()).backward()
        assert torch.equal(hyper.flat_theta0.grad, torch.ones_like(hyper.flat_theta0))

    @pytest.mark.parametrize("head", HEADS, ids=str)
    def test_gradients_are_those_of_finite_differences(self, head):
        hyper = HyperNetwork({"a": 1, "b": 2}, {"w": (3, 2), "b": (2,)}, (4,), nn.Tanh, dtype=F64, **head)
        names = [name for name, _ in hyper.named_parameters()]
        a, b = torch.rand(1, dtype=F64, requires_grad=True), torch.rand(2, 2, dtype=F64, requires_grad=True)

        def function(a, b, *values):
            found = torch.func.functional_call(hyper, dict(zip(names, values)), (), {"a": a, "b": b})
            return torch.cat([weight.flatten(1) for weight in found.values()], 1)

        values = [(p + 0.1 * torch.randn_like(p)).detach().requires_grad_() for p in hyper.parameters()]
        assert torch.autograd.gradcheck(function, (a, b, *values))

    def test_theta0_can_be_set_frozen_and_kept_from_weight_decay(self):
        net = nn.Linear(3, 2)
        hyper = HyperNetwork(1, {"weight": (2, 3), "bias": (2,)})
        hyper.set_theta0(net)
        hyper.set_theta0(net.state_dict() | {"other": torch.zeros(1)})
        assert torch.equal(hyper.theta0()["weight"], net.weight)
        decayed, kept = param_groups(hyper, 0.1)
        assert [id(p) for p in kept["params"]] == [id(hyper.flat_theta0)]
        assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
        assert len(decayed["params"]) == len([*hyper.parameters()]) - 1
        hyper.freeze_theta0()
        assert not hyper.flat_theta0.requires_grad
        hyper.freeze_theta0(False)
        assert hyper.flat_theta0.requires_grad
        with pytest.raises(ValueError, match="got none for bias"):
            hyper.set_theta0({"weight": net.weight})
        with pytest.raises(ValueError, match=r"weight must be of shape \(2, 3\), got \(3, 3\)"):
            hyper.set_theta0({"weight": torch.zeros(3, 3), "bias": torch.zeros(2)})
        with pytest.raises(RuntimeError, match="residual=False"):
            HyperNetwork(1, SHAPES, residual=False).theta0()

    def test_autocast_does_not_round_the_weights(self):
        hyper = HyperNetwork(1, SHAPES)
        with torch.autocast("cpu", torch.bfloat16):
            under = hyper.flat(gamma=0.3)
        assert torch.equal(under, hyper.flat(gamma=0.3))


class TestBadInput:
    hyper = HyperNetwork({"a": 1, "b": InputSpec(2, -1.0, 1.0)}, SHAPES)

    @pytest.mark.parametrize(
        "gammas, error, told",
        [
            ({"a": 0.1}, ValueError, "inputs must be a, b; missing: b, unknown: none"),
            ({"a": 0.1, "b": torch.zeros(2), "c": 1.0}, ValueError, "missing: none, unknown: c"),
            ({"a": 1.1, "b": torch.zeros(2)}, ValueError, "a must lie in 0 to 1, got 1.1"),
            ({"a": float("nan"), "b": torch.zeros(2)}, ValueError, "a must lie in 0 to 1, got nan"),
            ({"a": 0.1, "b": torch.tensor([-1.5, 2.0])}, ValueError, "b must lie in -1 to 1, got -1.5 to 2"),
            ({"a": torch.tensor([1]), "b": torch.zeros(2)}, TypeError, "a must be a floating-point tensor.*int64"),
            ({"a": torch.rand(5), "b": torch.zeros(2)}, ValueError, r"a must be of shape \(1,\) or .*got \(5,\)"),
            ({"a": torch.rand(2, 1), "b": torch.zeros(3, 2)}, ValueError, "batches of one size, got a: 2, b: 3"),
        ],
    )
    def test_inputs_that_are_missing_out_of_range_or_of_another_shape_are_refused(self, gammas, error, told):
        with pytest.raises(error, match=told):
            self.hyper(**gammas)

    def test_rounding_errors_are_forgiven_and_clamping_forgives_all(self):
        self.hyper(a=1.0 + 5e-7, b=torch.zeros(2))
        clamping = HyperNetwork(1, SHAPES, clamp=True)
        assert torch.equal(clamping.flat(gamma=7.0), clamping.flat(gamma=1.0))

    def test_categories_are_integers_that_exist(self, shape_checks_off):
        hyper = HyperNetwork({"kind": InputSpec(3, kind="categorical")}, SHAPES)
        with pytest.raises(ValueError, match="kind must lie in 0 to 2, got 3"):
            hyper(kind=torch.tensor(3))
        with pytest.raises(TypeError, match="kind is categorical"):
            hyper(kind=torch.tensor(1.0))
        assert hyper(kind=torch.tensor([0, 2]))["conv.bias"].shape == (2, 6)

    def test_arguments_that_cannot_work_are_refused_before_any_work(self, shape_checks_off):
        for arguments, error, told in [
            ({"target": {}}, ValueError, "target must have tensors to predict, got none"),
            ({"target": nn.ReLU()}, ValueError, "target must have tensors"),
            ({"target": {"w": (0, 3)}}, ValueError, r"tensors with entries, got shape \(0, 3\) for w"),
            (
                {"target": {"w": torch.zeros(2, dtype=torch.int32)}},
                TypeError,
                "floating-point tensors, got torch.int32",
            ),
            ({"target": {"a": torch.zeros(2), "b": torch.zeros(2, dtype=F64)}}, ValueError, "one dtype on one device"),
            ({"hidden": (0,)}, ValueError, r"hidden must hold positive sizes, got \(0,\)"),
            ({"encoding": "fourier"}, ValueError, "encoding must be 'mip', 'none' or 'complement', got 'fourier'"),
            ({"encoding": "none", "frequencies": 2}, ValueError, "frequencies must be 1"),
            ({"head_rank": 2, "head_chunk": 2}, ValueError, "head_rank and head_chunk exclude each other"),
            ({"head_rank": 0}, ValueError, "head_rank must be at least 1, got 0"),
            ({"inputs": {}}, ValueError, "inputs must name at least one"),
            ({"inputs": {"a b": 1}}, ValueError, "inputs must be named like Python arguments, got 'a b'"),
        ]:
            with pytest.raises(error, match=told):
                HyperNetwork(**({"inputs": 1, "target": SHAPES} | arguments))
