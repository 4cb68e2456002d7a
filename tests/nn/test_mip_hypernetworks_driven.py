"""Driven networks against the networks themselves, loops over samples, functional_call, and the authors' package."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from networks import language_model, residual_network, vision_transformer
from torch import nn
from torch.func import functional_call

from lathe.core.surgery import swap
from lathe.nn.mip_hypernetworks import (
    HyperConv2d,
    HyperDriven,
    HyperLinear,
    HyperNetwork,
    InputSpec,
    external_shapes,
    hypernetize,
    using_weights,
)

F64 = torch.float64
MATRICES = {"residual_network": None, "vision_transformer": None, "language_model": "transformer.h.*"}
NETWORKS = [residual_network, vision_transformer, language_model]


def logits(answer):
    return getattr(answer, "logits", answer)


def small_network():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.LeakyReLU(), nn.Flatten(), nn.Linear(4 * 9, 3))


class TestAnyNetwork:
    @pytest.mark.parametrize("make", NETWORKS)
    @pytest.mark.parametrize("training", [False, True])
    def test_without_changes_it_is_the_pretrained_network_bit_for_bit(self, make, training):
        net, x = make()
        twin = copy.deepcopy(net).train(training)
        driven = hypernetize(net.train(training), MATRICES[make.__name__], pretrained=True)
        driven.hyper.scale("*", 0.0, theta0=False)
        for gamma in (0.0, 0.37, 1.0):
            torch.manual_seed(1)
            expected = logits(twin(x))
            torch.manual_seed(1)
            assert torch.equal(logits(driven(x, gamma=gamma)), expected)
        buffers = dict(driven.primary.named_buffers())
        for name, buffer in twin.named_buffers():
            assert torch.equal(buffers[name], buffer), name

    @pytest.mark.parametrize("make", NETWORKS)
    @pytest.mark.parametrize("options", [{}, {"head_rank": 3}, {"head_chunk": 64}, {"adapter_rank": 2}], ids=str)
    def test_it_trains_and_depends_on_gamma_and_the_given_network_is_untouched(self, make, options):
        net, x = make()
        net.eval()
        before = {name: value.clone() for name, value in net.state_dict().items()}
        driven = hypernetize(net, MATRICES[make.__name__], **options)
        optimizer = torch.optim.Adam(driven.parameters(), lr=3e-3)
        targets = torch.arange(2) % 4

        def loss(gamma):
            answer = logits(driven(x, gamma=gamma)).flatten(1)[:, :4]
            # One network for two tasks: gamma weighs the labels against the labels turned by one.
            return (1 - gamma) * nn.functional.cross_entropy(answer, targets) + gamma * nn.functional.cross_entropy(
                answer, (targets + 1) % 4
            )

        losses = []
        for step in range(60):
            optimizer.zero_grad()
            losses.append(loss((step % 2) * 0.9 + 0.05))
            losses[-1].backward()
            if step == 0:
                assert [name for name, p in driven.named_parameters() if p.grad is None and "lm_head" not in name] == []
            optimizer.step()
        assert sum(losses[-4:]).item() < 0.7 * sum(losses[:4]).item()
        with torch.no_grad():
            classes = [logits(driven(x, gamma=gamma)).flatten(1)[:, :4].argmax(1) for gamma in (0.05, 0.95)]
        assert classes[0].tolist() != classes[1].tolist()
        for name, value in net.state_dict().items():
            assert torch.equal(value, before[name]), name

    @pytest.mark.parametrize("make", NETWORKS)
    def test_one_gamma_for_each_sample_is_a_loop_over_samples_in_value_and_gradient(self, make):
        net, x = make()
        driven = hypernetize(net.double().eval(), MATRICES[make.__name__], dtype=F64)
        x = x.double() if x.is_floating_point() else x
        gammas = torch.tensor([[0.1], [0.8]], dtype=F64)
        options = {"use_cache": False} if make is language_model else {}
        together = logits(driven(x, gamma=gammas, **options))
        alone = torch.cat([logits(driven(x[i : i + 1], gamma=gammas[i], **options)) for i in range(2)])
        torch.testing.assert_close(together, alone, atol=1e-12, rtol=1e-12)
        learnt = list(driven.parameters())
        for one, other in zip(
            torch.autograd.grad(together.square().sum(), learnt, allow_unused=True),
            torch.autograd.grad(alone.square().sum(), learnt, allow_unused=True),
        ):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)

    @pytest.mark.parametrize("make", NETWORKS)
    def test_for_one_gamma_it_is_an_ordinary_network_again(self, make):
        net, x = make()
        driven = hypernetize(net.eval(), MATRICES[make.__name__])
        fixed = driven.at(gamma=0.4)
        assert type(fixed) is type(net)
        assert fixed.state_dict().keys() == net.state_dict().keys()
        assert sum(p.numel() for p in fixed.parameters()) == sum(p.numel() for p in net.parameters())
        torch.testing.assert_close(logits(fixed(x)), logits(driven(x, gamma=0.4)), atol=1e-6, rtol=1e-6)
        net.load_state_dict(fixed.state_dict())
        assert torch.equal(logits(net(x)), logits(fixed(x)))
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in fixed.parameters())

    @pytest.mark.parametrize("make", [residual_network, vision_transformer])
    def test_a_fixed_network_exports(self, make):
        net, x = make()
        fixed = hypernetize(net.eval()).at(gamma=0.4)
        with torch.no_grad():
            expected = logits(fixed(x))
        torch.testing.assert_close(logits(torch.export.export(fixed, (x,)).module()(x)), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("options", [{"adapter_rank": 1}, {"head_chunk": 1 << 14}], ids=str)
    def test_a_resnet18_of_eleven_million_weights_is_driven_by_a_small_hypernetwork(self, options):
        transformers = pytest.importorskip("transformers")
        config = transformers.ResNetConfig(
            embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=10
        )
        net, x = transformers.ResNetForImageClassification(config).eval(), torch.randn(2, 3, 64, 64)
        driven = hypernetize(net, hidden=(16, 32), **options)
        theta = sum(weight.numel() for weight in driven.theta0().values())
        assert theta > 11_000_000
        assert sum(p.numel() for p in driven.hyper.parameters()) - theta < 0.3 * theta
        y = driven(x, gamma=0.5).logits
        y.square().mean().backward()
        assert all(p.grad is not None for p in driven.parameters())
        with torch.no_grad():
            torch.testing.assert_close(driven.at(gamma=0.5)(x).logits, y, atol=1e-4, rtol=1e-4)
            driven.hyper.scale("*", 0.0, theta0=False)
            assert torch.equal(driven(x, gamma=0.5).logits, net(x).logits)

    def test_recurrent_networks_are_driven_too_one_gamma_or_many(self):
        class Tagger(nn.Module):
            def __init__(self):
                super().__init__()
                self.lstm = nn.LSTM(3, 4, num_layers=2, batch_first=True)

            def forward(self, x):
                return self.lstm(x)[0]

        net, x = Tagger(), torch.randn(3, 5, 3)
        driven = hypernetize(net, nn.LSTM)
        driven.hyper.scale("*", 0.0, theta0=False)
        assert torch.equal(driven(x, gamma=0.3), net(x))
        driven = hypernetize(net, nn.LSTM)
        gammas = torch.rand(3, 1)
        expected = torch.cat([driven(x[i : i + 1], gamma=gammas[i]) for i in range(3)])
        torch.testing.assert_close(driven(x, gamma=gammas), expected)

    def test_scales_of_normalisations_alone_can_be_predicted(self):
        net, x = residual_network()
        driven = hypernetize(net, nn.BatchNorm2d)
        assert set(driven.hyper.shapes) == {
            f"{block}.bn{i}.{what}" for block in (1, 2) for i in (1, 2) for what in ("weight", "bias")
        }
        assert torch.equal(driven.theta0()["1.bn1.weight"], torch.ones(8))
        driven(x, gamma=0.5).square().sum().backward()
        assert driven.hyper.flat_theta0.grad.any()

    def test_a_hypernetwork_can_be_driven_by_another(self):
        inner = HyperNetwork({"gamma": 1}, {"w": (4, 3)}, (8,))
        outer = hypernetize(inner, "trunk.*", {"task": InputSpec(3, kind="categorical")})
        one, other = (outer(gamma=0.3, task=torch.tensor(task))["w"] for task in (0, 1))
        assert one.shape == (4, 3)
        assert not torch.equal(one, other)
        assert torch.equal(outer.at(task=torch.tensor(1))(gamma=0.3)["w"], other)


class TestAgainstOthers:
    def test_it_is_functional_call_with_the_predicted_weights(self, rng):
        net, x = small_network(), torch.randn(4, 2, 5, 5, generator=rng)
        driven = hypernetize(net)
        expected = functional_call(net, driven.weights(gamma=0.7), (x,))
        assert torch.equal(driven(x, gamma=0.7), expected)

    def test_with_its_weights_it_is_a_network_of_the_authors_package(self, rng):
        hyperlight = pytest.importorskip("hyperlight")
        net, x = small_network().double(), torch.randn(4, 2, 5, 5, dtype=F64, generator=rng)
        driven = hypernetize(net)
        weights = driven.weights(gamma=torch.tensor([0.6], dtype=F64))
        modules = hyperlight.find_modules_of_type(net, [nn.Conv2d, nn.Linear])
        peer = hyperlight.hypernetize(net, modules=modules)
        assert {name: tuple(shape) for name, shape in peer.external_shapes().items()} == driven.hyper.shapes
        with peer.using_externals(weights):
            torch.testing.assert_close(driven(x, gamma=torch.tensor([0.6], dtype=F64)), peer(x), atol=1e-10, rtol=1e-10)


class TestSelection:
    def test_types_globs_functions_and_parameters_select(self):
        net, _ = residual_network()
        first = {"0.weight", "0.bias"}
        everything = {name for name, _ in net.named_parameters()}
        for select, expected in [
            (nn.Linear, {"5.weight", "5.bias"}),
            ((nn.Linear, nn.BatchNorm2d), {n for n in everything if ".bn" in n or n.startswith("5")}),
            ("0", first),
            ("0.*", first),
            (["1.conv?", "5.bias"], {"1.conv1.weight", "1.conv1.bias", "1.conv2.weight", "1.conv2.bias", "5.bias"}),
            (
                lambda name, parameter: parameter.ndim == 4,
                {n for n in everything if n.endswith("weight") and "bn" not in n and n[0] != "5"},
            ),
            ([net[0].weight, "5.bias"], {"0.weight", "5.bias"}),
            ("*", everything),
        ]:
            assert set(hypernetize(net, select).hyper.shapes) == expected

    def test_nothing_buffers_and_strangers_are_refused_with_what_there_is(self):
        net, _ = residual_network()
        with pytest.raises(
            ValueError, match=r"got none with .*; modules that have some: Conv2d \(5\), BatchNorm2d \(4\)"
        ):
            hypernetize(net, nn.LSTM)
        with pytest.raises(ValueError, match=r"'9.\*' matches no parameter"):
            hypernetize(net, "9.*")
        with pytest.raises(ValueError, match=r"only the buffer 1\.bn1\.running_mean"):
            hypernetize(net, "*.running_mean")
        with pytest.raises(ValueError, match=r"a tensor \(8,\) is a buffer of it"):
            hypernetize(net, [net[1].bn1.running_mean])
        with pytest.raises(ValueError, match=r"a tensor \(2,\) is no parameter of it"):
            hypernetize(net, [nn.Parameter(torch.zeros(2))])
        with pytest.raises(ValueError, match="empty list"):
            hypernetize(net, [])
        language, _ = language_model()
        with pytest.raises(ValueError, match=r"got none with None; modules that have some: Conv1D \(8\)"):
            hypernetize(language)

    def test_names_that_the_network_takes_itself_are_refused(self):
        class Takes(nn.Linear):
            def forward(self, x, gamma=None):
                return super().forward(x)

        with pytest.raises(ValueError, match="must not be named like arguments of the network, got gamma"):
            hypernetize(Takes(2, 2))
        hypernetize(Takes(2, 2), inputs={"strength": 1})(torch.zeros(1, 2), strength=0.1)

    def test_hypernetworks_of_other_names_or_shapes_are_refused(self):
        with pytest.raises(ValueError, match="other is no parameter of the network"):
            HyperDriven(nn.Linear(2, 2), HyperNetwork(1, {"other": (2, 2)}))
        with pytest.raises(ValueError, match=r"weight must be of shape \(2, 2\), got \(3, 2\)"):
            HyperDriven(nn.Linear(2, 2), HyperNetwork(1, {"weight": (3, 2)}))
        with pytest.raises(ValueError, match="running_mean is a buffer"):
            HyperDriven(nn.BatchNorm1d(2), HyperNetwork(1, {"running_mean": (2,)}))

    def test_tied_and_shared_weights_are_predicted_once_and_used_everywhere(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
                self.out.weight = self.embed.weight
                self.twice = nn.Sequential(nn.Linear(4, 4))
                self.twice.append(self.twice[0])

            def forward(self, x):
                return self.out(self.twice(self.embed(x)))

        net, x = Tied(), torch.arange(6)
        driven = hypernetize(net, "*")
        assert list(driven.hyper.shapes) == ["embed.weight", "twice.0.weight", "twice.0.bias"]
        w, v, b = driven.weights(gamma=0.2).values()
        h = w[x] @ v.T + b
        torch.testing.assert_close(driven(x, gamma=0.2), (h @ v.T + b) @ w.T)
        fixed = driven.at(gamma=0.2)
        assert fixed.out.weight is fixed.embed.weight
        torch.testing.assert_close(fixed(x), driven(x, gamma=0.2))
        assert set(hypernetize(net).hyper.shapes) == {"twice.0.weight", "twice.0.bias"}
        with pytest.raises(ValueError, match=r"out.weight is tied to embed.weight: it must be predicted once"):
            HyperDriven(net, HyperNetwork(1, {"embed.weight": (6, 4), "out.weight": (6, 4)}))
        with using_weights(net, {"embed.weight": torch.zeros(6, 4)}):
            assert not net(x).any()
            assert not net.out.weight.any()
        assert net.out.weight is net.embed.weight


class TestCalling:
    def test_a_call_without_gamma_says_what_is_missing(self):
        driven = hypernetize(small_network(), inputs={"a": 1, "b": 1})
        x = torch.zeros(1, 2, 5, 5)
        with pytest.raises(RuntimeError, match=r"call it with a=\.\.\., b=\.\.\."):
            driven(x)
        with pytest.raises(ValueError, match="missing: b"):
            driven(x, a=0.1)
        with pytest.raises(TypeError):
            driven(x, a=0.1, b=0.1, c=0.1)

    def test_batches_of_other_lengths_and_batch_statistics_are_refused(self):
        net, x = residual_network()
        driven = hypernetize(net)
        with pytest.raises(ValueError, match=r"1.bn1 \(BatchNorm2d\) would take statistics of one sample"):
            driven(x, gamma=torch.rand(2, 1))
        with pytest.raises(ValueError, match=r"3 samples, one a gamma, got shape \(2, 3, 10, 10\)"):
            driven.eval()(x, gamma=torch.rand(3, 1))
        with pytest.raises(ValueError, match=r"at\(\) takes one gamma, got a batch of 2"):
            driven.at(gamma=torch.rand(2, 1))
        assert driven(x[:0], gamma=torch.rand(0, 1)).shape == (0, 4)
        assert driven(x[:1], gamma=torch.rand(1, 1)).shape == (1, 4)

    def test_dropout_differs_between_samples_of_a_batch_of_gammas(self):
        driven = hypernetize(nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5)))
        driven.hyper.scale("*", 0.0, theta0=False)
        y = driven(torch.ones(2, 4), gamma=torch.rand(2, 1))
        assert not torch.equal(y[0], y[1])

    def test_the_ordinary_parameters_learn_with_the_hypernetwork_and_the_predicted_are_gone(self):
        net, x = residual_network()
        driven = hypernetize(net)
        names = {name for name, _ in driven.named_parameters()}
        assert {name for name in names if name.startswith("primary.")} == {
            f"primary.{block}.bn{i}.{what}" for block in (1, 2) for i in (1, 2) for what in ("weight", "bias")
        }
        assert "primary.0.weight" not in driven.state_dict()
        driven(x, gamma=0.5).square().sum().backward()
        assert all(parameter.grad is not None for parameter in driven.parameters())
        driven.freeze_theta0()
        assert not driven.hyper.flat_theta0.requires_grad

    def test_gradients_reach_gamma(self):
        driven = hypernetize(small_network().double())
        gamma = torch.tensor([0.3], dtype=F64, requires_grad=True)
        x = torch.randn(2, 2, 5, 5, dtype=F64)
        assert torch.autograd.gradcheck(lambda gamma: driven(x, gamma=gamma), gamma)

    def test_state_dicts_copies_and_pickles_go_round(self):
        net, x = residual_network()
        driven, other = (hypernetize(net, head_rank=4).eval() for _ in range(2))
        file = io.BytesIO()
        torch.save(driven.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        with torch.no_grad():
            expected = driven(x, gamma=0.3)
            for each in (other, copy.deepcopy(driven), pickle.loads(pickle.dumps(driven))):
                assert torch.equal(each(x, gamma=0.3), expected)

    def test_a_fresh_start_redraws_what_is_predicted_and_keeps_the_rest(self):
        net, _ = residual_network()
        driven = hypernetize(net, "*", pretrained=False)
        theta0 = driven.theta0()
        assert not torch.equal(theta0["0.weight"], net[0].weight)
        assert not theta0["0.bias"].any()
        assert torch.equal(theta0["1.bn1.weight"], net[1].bn1.weight)

    def test_activation_checkpoints_go_around_the_driven_network(self):
        driven = hypernetize(small_network())
        x = torch.randn(2, 2, 5, 5)
        expected = torch.autograd.grad(driven(x, gamma=0.3).square().sum(), driven.hyper.flat_theta0)
        answer = torch.utils.checkpoint.checkpoint(driven, x, gamma=0.3, use_reentrant=False)
        found = torch.autograd.grad(answer.square().sum(), driven.hyper.flat_theta0)
        torch.testing.assert_close(found, expected)


class TestRemembered:
    """In evaluation without gradients the weights of the last gamma are kept, and never stale ones."""

    @staticmethod
    def fresh():
        return hypernetize(small_network()).eval(), torch.randn(1, 2, 5, 5)

    def test_the_hypernetwork_runs_once_for_the_same_gamma(self):
        driven, x = self.fresh()
        calls = []
        driven.hyper.head.register_forward_hook(lambda *each: calls.append(1))
        with torch.no_grad():
            for gamma in (0.3, torch.tensor([0.3]), torch.tensor([0.3]), 0.4, 0.4):
                driven(x, gamma=gamma)
            assert len(calls) == 3
            driven(x, gamma=torch.tensor([[0.4]]))
            assert len(calls) == 4
        driven(x, gamma=0.4)
        driven(x, gamma=0.4)
        assert len(calls) == 6

    @pytest.mark.parametrize(
        "change",
        [
            lambda driven: driven.hyper.flat_theta0.mul_(2),
            lambda driven: driven.hyper.trunk[0].weight.mul_(2),
            lambda driven: driven.hyper.reset_parameters(),
            lambda driven: driven.load_state_dict(hypernetize(small_network()).state_dict()),
            lambda driven: setattr(driven.hyper.flat_theta0, "data", driven.hyper.flat_theta0.data * 2),
            lambda driven: driven.double().float().hyper.scale("*", 2.0),
        ],
    )
    def test_they_follow_every_change_of_a_weight(self, change):
        driven, x = self.fresh()
        with torch.no_grad():
            before = driven(x, gamma=0.3)
            change(driven)
            after = driven(x, gamma=0.3)
            assert not torch.equal(after, before)
            assert torch.equal(after, functional_call(driven.primary, driven.hyper(gamma=0.3), (x,)))

    def test_weights_of_inference_mode_do_not_leave_it(self):
        driven, x = self.fresh()
        with torch.inference_mode():
            driven(x, gamma=0.3)
        with torch.no_grad():
            assert not driven.weights(gamma=0.3)["0.weight"].is_inference()


class TestUsingWeights:
    def test_gradients_flow_into_the_weights_and_the_network_is_as_before(self):
        net, x = small_network(), torch.randn(2, 2, 5, 5)
        own = dict(net.named_parameters())
        weights = {name: torch.randn_like(p).requires_grad_() for name, p in own.items()}
        with using_weights(net, weights) as same:
            assert same is net
            net(x).sum().backward()
        assert all(weight.grad is not None for weight in weights.values())
        assert all(parameter is own[name] and parameter.grad is None for name, parameter in net.named_parameters())

    def test_after_an_exception_the_network_is_as_before(self):
        net = small_network()
        own = dict(net.named_parameters())
        with pytest.raises(ZeroDivisionError), using_weights(net, {"0.bias": torch.zeros(4)}):
            raise ZeroDivisionError
        assert all(parameter is own[name] for name, parameter in net.named_parameters())

    def test_blocks_nest(self):
        net, x = nn.Linear(2, 1), torch.ones(1, 2)
        with using_weights(net, {"bias": torch.tensor([10.0])}):
            outer = net(x)
            with using_weights(net, {"weight": torch.zeros(1, 2)}):
                assert net(x).item() == 10.0
            assert torch.equal(net(x), outer)

    def test_unknown_names_buffers_and_other_shapes_are_refused_before_anything_changes(self):
        net = nn.BatchNorm1d(3)
        for weights, told in [
            ({"scale": torch.zeros(3)}, "scale is no parameter"),
            ({"running_mean": torch.zeros(3)}, "running_mean is a buffer"),
            ({"weight": torch.zeros(3), "bias": torch.zeros(2)}, r"bias must be of shape \(3,\), got \(2,\)"),
        ]:
            with pytest.raises(ValueError, match=told), using_weights(net, weights):
                pass
        assert torch.equal(net.weight, torch.ones(3))

    def test_threads_do_not_see_each_others_weights(self):
        net, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))), torch.randn(4, 8)
        driven = hypernetize(net).eval().requires_grad_(False)  # so that weights are remembered, too
        gammas = [0.0, 0.3, 0.6, 1.0]
        expected = {gamma: driven(x, gamma=gamma).detach() for gamma in gammas}
        wrong = []

        def work(gamma):
            weights = {name: weight.detach() for name, weight in driven.weights(gamma=gamma).items()}
            for _ in range(60):
                if not torch.equal(driven(x, gamma=gamma), expected[gamma]):
                    wrong.append(gamma)
                with using_weights(net, weights):
                    if not torch.equal(net(x), expected[gamma]):
                        wrong.append(gamma)

        threads = [threading.Thread(target=work, args=(gamma,)) for gamma in gammas]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


class TestExternalLayers:
    def network(self):
        return nn.Sequential(
            HyperConv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), HyperLinear(100, 3)
        )

    def test_they_hold_no_memory_and_name_their_shapes(self):
        net = self.network()
        assert external_shapes(net) == {"0.weight": (4, 2, 3, 3), "3.weight": (3, 100), "3.bias": (3,)}
        assert {name for name, _ in net.named_parameters()} == {"1.weight", "1.bias"}
        assert repr(net[0]) == "HyperConv2d(2, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=False)"
        assert repr(HyperConv2d(2, 4, 3)) == "HyperConv2d(2, 4, kernel_size=(3, 3), stride=(1, 1))"
        assert repr(net[3]) == "HyperLinear(in_features=100, out_features=3, bias=True)"

    def test_a_hypernetwork_predicts_exactly_them(self):
        net, x = self.network(), torch.randn(2, 2, 5, 5)
        with pytest.raises(RuntimeError, match="HyperConv2d was called without weight"):
            net(x)
        driven = hypernetize(net, inputs=2)
        assert driven.hyper.shapes == external_shapes(net)
        assert HyperNetwork(2, net).shapes == external_shapes(net)
        gamma = torch.rand(2)
        weights = driven.weights(gamma=gamma)
        with using_weights(net, weights):
            expected = net(x)
        torch.testing.assert_close(driven(x, gamma=gamma), expected)
        torch.testing.assert_close(driven.at(gamma=gamma)(x), expected)
        y = nn.functional.conv2d(x, weights["0.weight"], padding=1)
        y = nn.functional.batch_norm(y, None, None, training=True).flatten(1)
        torch.testing.assert_close(expected, nn.functional.linear(y, weights["3.weight"], weights["3.bias"]))

    def test_they_and_ordinary_weights_can_be_predicted_together(self):
        driven = hypernetize(self.network(), nn.BatchNorm2d)
        assert set(driven.hyper.shapes) == {"0.weight", "1.weight", "1.bias", "3.weight", "3.bias"}
        assert torch.equal(driven.theta0()["1.weight"], torch.ones(4))
        assert driven.theta0()["0.weight"].any()

    @pytest.mark.parametrize("make", [residual_network, vision_transformer])
    def test_swap_puts_them_into_any_network(self, make):
        net, x = make()
        expected = set(hypernetize(net).hyper.shapes)
        report = swap(net, {nn.Conv2d: HyperConv2d.like, nn.Linear: HyperLinear.like})
        assert len(report.replaced) == {"residual_network": 6, "vision_transformer": 14}[make.__name__]
        driven = hypernetize(net)
        assert set(driven.hyper.shapes) == expected
        optimizer = torch.optim.Adam(driven.parameters(), lr=3e-3)
        losses = []
        for _ in range(15):
            optimizer.zero_grad()
            losses.append(nn.functional.cross_entropy(logits(driven(x, gamma=0.5)), torch.tensor([0, 1])))
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < losses[0]

    def test_they_replace_their_own_kind_only(self):
        with pytest.raises(TypeError, match=r"HyperConv2d replaces nn\.Conv2d, got Conv1d"):
            HyperConv2d.like(nn.Conv1d(2, 2, 1))
        with pytest.raises(TypeError, match="Linear"):
            HyperLinear.like(nn.Conv1d(2, 2, 1))
        like = HyperConv2d.like(
            nn.Conv2d(4, 6, (3, 1), 2, "valid", groups=2, bias=False, padding_mode="circular").eval()
        )
        assert (like.external, like.training) == ({"weight": (6, 2, 3, 1)}, False)
        assert (like.stride, like.padding_mode) == ((2, 2), "circular")
