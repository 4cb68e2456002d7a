"""Layers, adapters and bundled networks: identities, least squares by NumPy, and transformers of Hugging Face."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from functools import partial

import jaxtyping
import numpy as np
import pytest
import torch
from networks import language_model, vision_transformer
from torch import nn
from torch.nn import functional

from lathe.core.surgery import swap
from lathe.nn.scalable_kernels import (
    URF,
    ArcCosFeatures,
    BottleneckAdapter,
    BundledNetwork,
    SNNKAdapter,
    SNNKConv1x1,
    SNNKLinear,
    add_adapters,
    bundle,
    bundling_report,
    merge,
    trainable_parameters,
)


@pytest.fixture
def unchecked():
    """Switches the shape and type checks of the tests off, which would refuse first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- layers ---


def test_layers_hold_only_the_features_of_the_parameters():
    assert count(SNNKLinear(768, 768, num_features=16, bias=False)) == 768 * 16
    assert count(SNNKLinear(768, 768, num_features=16)) == 768 * 17
    assert count(SNNKLinear(768, 10, num_features=16, activation="cos", bias=False)) == 10 * 32
    # A constant feature takes the place of the bias where the activation has a constant part.
    sigmoid = SNNKLinear(768, 10, num_features=16, activation="sigmoid")
    assert count(sigmoid) == 10 * 33
    assert sigmoid.bias is None


def test_a_trained_layer_is_taken_over_in_expectation(rng):
    layer = nn.Linear(6, 5, dtype=torch.float64)
    layer.weight.data *= 0.5
    x = torch.randn(200, 6, dtype=torch.float64, generator=rng)
    for name in ("tanh", "sigmoid", "cos"):
        truth = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "cos": torch.cos}[name](layer(x))
        made = [
            SNNKLinear.from_trained(layer, activation=name, data=x, refit=False, num_features=1024, seed=seed)
            for seed in range(12)
        ]
        mean = torch.stack([each(x) for each in made]).mean(0)
        assert float((mean - truth).norm() / truth.norm()) < 0.25
        assert torch.equal(made[0].weight, made[0].features.psi(layer.weight, layer.bias))
        # A refit is the least-squares solution, by NumPy.
        refitted = SNNKLinear.from_trained(layer, activation=name, data=x, num_features=10, ridge=1e-10, seed=0)
        P = refitted.features.phi(x).detach().numpy()
        if refitted.bias is not None:
            P = np.concatenate([P, np.ones((200, 1))], 1)
        best = P @ np.linalg.lstsq(P, truth.detach().numpy(), rcond=None)[0]
        np.testing.assert_allclose(refitted(x).detach(), best, atol=2e-3)
        assert refitted.relative_error == pytest.approx(float((refitted(x) - truth).norm() / truth.norm()), rel=1e-6)


def test_data_makes_a_better_layer_than_the_parameters_alone(rng):
    layer = nn.Linear(12, 8)
    x = torch.randn(500, 12, generator=rng)
    for name in ("relu", "gelu", torch.relu):
        refitted = SNNKLinear.from_trained(layer, activation=name, data=x, num_features=48, seed=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            raw = SNNKLinear.from_trained(layer, activation=name, data=x, refit=False, num_features=48, seed=0)
        assert refitted.relative_error < 0.5 * raw.relative_error
        fresh = torch.randn(500, 12, generator=rng)
        truth = functional.gelu(layer(fresh)) if name == "gelu" else functional.relu(layer(fresh))
        assert float((refitted(fresh) - truth).norm() / truth.norm()) < 0.45


def test_noise_beyond_the_signal_is_warned_of():
    with pytest.warns(UserWarning, match=r"predicted to err by .* refit"):
        SNNKLinear.from_trained(nn.Linear(512, 4), activation="tanh", num_features=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SNNKLinear.from_trained(nn.Linear(4, 4), activation="cos", num_features=2048)
        SNNKLinear.from_trained(nn.Linear(512, 4), activation="tanh", num_features=16, data=torch.randn(64, 512))


def test_fresh_layers_start_with_the_variance_of_what_they_replace(rng):
    x = torch.randn(2000, 64, generator=rng)
    for options in ({}, {"activation": "cos"}, {"activation": "gelu"}, {"orthogonal": "hadamard"}):
        layer = SNNKLinear(64, 400, bias=False, num_features=256, **options)
        assert float(layer(x).square().mean()) == pytest.approx(1 / 3, rel=0.35)
    strong = nn.Linear(64, 400)
    strong.weight.data *= 3
    made = SNNKLinear.like(strong, num_features=256)
    assert float((made(x) - made.bias).square().mean()) == pytest.approx(3, rel=0.35)


def test_pointwise_convolutions_are_linear_layers_at_every_pixel(rng):
    conv = nn.Conv2d(6, 4, 1, stride=2)
    x = torch.randn(2, 6, 5, 4, generator=rng)
    made = SNNKConv1x1.from_trained(conv, data=x, num_features=12, seed=0)
    linear = nn.Linear(6, 4)
    linear.weight.data, linear.bias.data = conv.weight.data.flatten(1), conv.bias.data
    pixels = x.movedim(1, -1).flatten(0, -2)
    flat = SNNKLinear.from_trained(linear, data=pixels, num_features=12, seed=0)
    torch.testing.assert_close(made(x), flat(x[:, :, ::2, ::2].movedim(1, -1)).movedim(-1, 1))
    assert made(x).shape == conv(x).shape
    assert SNNKConv1x1.like(conv).stride == (2, 2)
    assert SNNKConv1x1.like(nn.Conv2d(6, 4, 3)) is None
    assert SNNKConv1x1.from_trained(nn.Conv2d(6, 6, 1, groups=2)) is None
    with pytest.raises(TypeError, match=r"nn\.Conv2d, got Linear"):
        SNNKConv1x1.like(linear)
    with pytest.raises(ValueError, match=r"got \(3, 6\)"):
        SNNKConv1x1.from_trained(conv, data=x[0, :3, 0, :1].expand(3, 6))


def test_layers_refuse_what_cannot_be(unchecked):
    with pytest.raises(ValueError, match=r"step, relu, relu2, cos.*got 'swishy'"):
        SNNKLinear(4, 4, activation="swishy")
    with pytest.raises(ValueError, match="out_features must be at least 1, got 0"):
        SNNKLinear(4, 0)
    with pytest.raises(ValueError, match="num_features must be at least 1, got -1"):
        SNNKLinear(4, 4, num_features=-1)
    with pytest.raises(ValueError, match="floor is of the arc-cosine features only"):
        SNNKLinear(4, 4, activation="cos", floor=0.1)
    with pytest.raises(TypeError, match=r"nn\.Linear, got Conv2d"):
        SNNKLinear.like(nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match=r"data must be \(samples, 4\), got \(3, 5\)"):
        SNNKLinear.from_trained(nn.Linear(4, 4), data=torch.zeros(3, 5))


# --- bundling ---


def network(*sizes: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, dtype=torch.float64), activation()]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid])
def test_a_bundled_network_is_the_network_of_snnk_layers(activation, rng):
    net = network(4, 6, 5, 3, activation=activation)
    x = torch.randn(7, 4, dtype=torch.float64, generator=rng)
    bundled = bundle(net, [8, 9], x, refit=False, seed=0)
    first, second = bundled.features
    # Layer by layer, with all the parameters there: o1 = Psi1 phi1(x); o2 = psi(W2 Psi1, b2) phi2(phi1(x)).
    Psi1 = first.psi(net[0].weight, net[0].bias)
    Psi2 = second.psi(net[2].weight @ Psi1, net[2].bias)
    o2 = second.phi(first.phi(x)) @ Psi2.T
    expected = net[4](o2)
    torch.testing.assert_close(bundled(x), expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    assert count(bundled) == 3 * second.feature_dim + 3


def test_many_features_without_any_data_give_the_network():
    net = network(3, 4, 2)
    net[0].weight.data *= 0.3
    bundled = bundle(net, 30_000, seed=0)
    x = 0.5 * torch.randn(50, 3, dtype=torch.float64)
    assert float((bundled(x) - net(x)).norm() / net(x).norm()) < 0.15


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_refitted_bundles_follow_the_network_also_on_new_inputs(activation, rng):
    net = network(6, 16, 16, 3, activation=activation)
    x, new = (torch.randn(3000, 6, dtype=torch.float64, generator=rng) for _ in range(2))
    errors = []
    for layers, m in ((net[2:], 64), (net, [128, 128])):
        inputs = [net[:2](each).detach() if len(layers) == 3 else each for each in (x, new)]
        bundled = bundle(layers, m, inputs[0], seed=0)
        truth = layers(inputs[1])
        errors.append(float((bundled(inputs[1]) - truth).norm() / truth.norm()))
    assert errors[0] < 0.1
    assert errors[1] < 0.5


def test_the_last_bundle_is_the_ridge_fit_to_the_networks_outputs(rng):
    net = network(5, 8, 3)
    x = torch.randn(400, 5, dtype=torch.float64, generator=rng)
    bundled = bundle(net, 20, x, ridge=1e-9, seed=0)
    P = np.concatenate([bundled.features(x).numpy(), np.ones((400, 1))], 1)
    best = P @ np.linalg.lstsq(P, net(x).detach().numpy(), rcond=None)[0]
    np.testing.assert_allclose(bundled(x).detach(), best, atol=1e-3)


def test_bundles_are_fitted_to_any_targets_in_batches(rng, unchecked):
    from sklearn.linear_model import Ridge

    bundled = bundle(network(5, 8, 3, activation=nn.ReLU), 20, seed=0)
    x, y = torch.randn(300, 5, dtype=torch.float64, generator=rng), torch.randint(3, (300,), generator=rng)
    bundled.fit(x, y, 0.3, batch_size=77)
    P = np.concatenate([bundled.features(x).numpy(), np.ones((300, 1))], 1)
    theirs = Ridge(alpha=0.3, fit_intercept=False).fit(P, functional.one_hot(y).numpy())
    np.testing.assert_allclose(bundled(x).detach(), theirs.predict(P), atol=1e-8)
    bundled.fit(x, y, 1e-6, loss="fisher")
    with pytest.raises(ValueError, match=r"3 columns or classes, got \(300, 1\)"):
        bundled.fit(x, x[:, 0])
    with pytest.raises(ValueError, match="pair up"):
        bundled.fit(x, y[:5])


def test_networks_that_are_no_chain_are_refused_by_the_name_of_what_breaks_it(unchecked):
    linear = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"'1' must be an elementwise activation.*LayerNorm"):
        bundle(nn.Sequential(linear, nn.LayerNorm(4), linear), 8)
    with pytest.raises(ValueError, match=r"'1' must be an elementwise activation.*Softmax"):
        bundle(nn.Sequential(linear, nn.Softmax(-1), linear), 8)
    with pytest.raises(ValueError, match=r"'0' must be a linear layer, got Conv2d"):
        bundle(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), linear), 8)
    with pytest.raises(ValueError, match=r"'1\.0' must be an elementwise.*Linear"):
        bundle(nn.Sequential(linear, nn.Sequential(nn.Linear(4, 2), nn.ReLU())), 8)
    with pytest.raises(ValueError, match="with a hidden layer, got 2 layers"):
        bundle(nn.Sequential(linear, nn.ReLU()), 8)
    chain = nn.Sequential(nn.Dropout(), nn.Sequential(linear, nn.ReLU()), linear)
    assert isinstance(bundle(chain, 8), BundledNetwork)
    with pytest.raises(ValueError, match="one entry a hidden layer, 1, got 2"):
        bundle(chain, [8, 8])
    with pytest.raises(ValueError, match=r"data must be \(samples, 4\), got \(2, 5\)"):
        bundle(chain, 8, torch.zeros(2, 5))
    with pytest.raises(ValueError, match="relu must be 'arc-cosine' or 'urf', got 'leaky'"):
        bundle(chain, 8, relu="leaky")


def test_the_report_sets_bundles_beside_low_rank_layers_of_the_same_size(rng):
    net = network(8, 24, 24, 4).float()
    x = torch.randn(600, 8, generator=rng)
    state = [module.training for module in net.modules()]
    report = bundling_report(net, x, (16, 64), seed=0)
    assert [module.training for module in net.modules()] == state
    assert {row.depth for row in report.rows} == {1, 2}
    original = [row for row in report.rows if row.method == "original"]
    assert [row.parameters for row in original] == [24 * 25 + 100, 8 * 24 + 24 + 24 * 25 + 100]
    assert original[0].relative_error == 0
    for depth in (1, 2):
        bundled = [row for row in report.rows if row.method == "bundled" and row.depth == depth]
        assert bundled[1].relative_error < bundled[0].relative_error
        assert bundled[0].stored_bytes > 4 * bundled[0].parameters  # the fixed directions are counted
    for low, like in zip(
        [row for row in report.rows if row.method == "low rank, as many parameters"],
        [row for row in report.rows if row.method == "bundled"],
    ):
        assert low.parameters <= max(like.parameters, 8 + 24 + 24 + 24 + 24 + 4 + 52)
    assert "low rank, as many bytes" in str(report)
    assert report.plot().to_dict()["mark"]["type"] == "line"


# --- adapters ---


def test_adapters_have_the_published_number_of_parameters():
    assert count(SNNKAdapter(768, num_features=16)) == 13_056
    assert count(BottleneckAdapter(768, bottleneck=48)) == 74_544
    assert count(SNNKAdapter(768, num_features=16, bottleneck=8)) == 8 * 16 + 8 * 768 + 768


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"activation": "cos"},
        {"activation": "sigmoid"},
        {"bottleneck": 3},
        {"norm": "before"},
    ],
)
def test_merged_adapters_are_the_same_function_of_one_matrix(options, rng):
    adapter = SNNKAdapter(6, num_features=5, **options)
    x = torch.randn(2, 3, 6, generator=rng)
    assert torch.equal(adapter(x), x)
    for parameter in adapter.parameters():
        parameter.data += torch.randn(parameter.shape, generator=rng)
    merged = merge(nn.Sequential(adapter))
    torch.testing.assert_close(merged(x), adapter(x), rtol=1e-4, atol=1e-5)
    assert merged[0].modulation is None
    assert merged[0].up is None
    phi = adapter.features.phi(x if adapter.norm_before is None else adapter.norm_before(x))
    by_hand = (
        adapter.modulation * (phi @ adapter.weight.T) if adapter.up is None else adapter.up(phi @ adapter.weight.T)
    )
    torch.testing.assert_close(adapter(x), x + by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter(x[0, 0]), adapter(x)[0, 0])


BERT_LAYERS = 2


def bert():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=BERT_LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config).eval(), torch.arange(24).view(3, 8)


@pytest.mark.parametrize(
    ("make", "where", "number"),
    [
        (bert, lambda name: name.endswith("output.dense"), 2 * BERT_LAYERS),
        (bert, lambda name: name.endswith("output.dense") and "attention" not in name, BERT_LAYERS),
        (vision_transformer, lambda name: name.endswith(("mlp.fc2", "output.dense")), None),
        (language_model, lambda name: name.endswith("mlp.c_proj"), 2),
    ],
)
@pytest.mark.parametrize("factory", [partial(SNNKAdapter, num_features=4), partial(BottleneckAdapter, bottleneck=2)])
def test_transformers_take_adapters_without_a_change_of_output_or_names(make, where, number, factory):
    model, x = make()
    model.eval()
    before = model(x).logits
    adapted = add_adapters(model, where=where, adapter=factory, train=lambda name: name.startswith("classifier"))
    assert torch.equal(adapted(x).logits, before)
    own = dict(model.state_dict())
    assert own.keys() <= adapted.state_dict().keys()
    new = [module for module in adapted.modules() if isinstance(module, (SNNKAdapter, BottleneckAdapter))]
    assert len(new) == number if number else len(new) >= 2
    assert not any("adapter" in name for name in own)
    assert all(parameter.requires_grad for parameter in model.parameters())
    expected = sum(count(module) for module in new)
    expected += sum(p.numel() for name, p in model.named_parameters() if name.startswith("classifier"))
    assert sum(parameter.numel() for parameter in trainable_parameters(adapted)) == expected

    optimizer = torch.optim.AdamW(trainable_parameters(adapted), lr=1e-2)
    target = torch.arange(before.flatten(0, -2).shape[0]) % before.shape[-1]
    losses = []
    for _ in range(12):
        loss = functional.cross_entropy(adapted(x).logits.flatten(0, -2), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for name, value in own.items():
        if not name.startswith("classifier"):
            assert torch.equal(adapted.state_dict()[name], value)

    # It comes back from a checkpoint, a copy and a pickle, and merged.
    after = adapted(x).logits
    again = add_adapters(model, where=where, adapter=factory)
    again.load_state_dict(adapted.state_dict())
    for other in (again, copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(other(x).logits, after)
    torch.testing.assert_close(merge(adapted)(x).logits, after, rtol=1e-4, atol=1e-5)


def test_torchs_own_encoder_runs_its_adapters_also_where_it_would_take_a_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    adapted = add_adapters(layer, where=lambda name: name == "linear2")
    nn.init.ones_(adapted.linear2.adapter.modulation)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert not torch.allclose(adapted(x), layer(x))


def test_blocks_that_do_not_tell_their_width_are_measured():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 2))
    with pytest.raises(ValueError, match=r"example_input is needed to tell .* '0' puts out"):
        add_adapters(model, where=lambda name: name == "0")
    x = torch.randn(3, 4)
    adapted = add_adapters(model, where=lambda name: name == "0", example_input=x)
    assert adapted[0].adapter.width == 6
    assert torch.equal(adapted(x), model(x))
    nn.init.ones_(adapted[0].adapter.modulation)
    torch.testing.assert_close(adapted(x), adapted[1](adapted[0].adapter(model[0](x))))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.raises(ValueError, match="is not called"):
        add_adapters(encoder, where=lambda name: name.endswith("out_proj"))
    with pytest.raises(ValueError, match="is not called"):
        add_adapters(encoder, where=lambda name: name == "layers")
    with pytest.raises(ValueError, match="at least one module, got none"):
        add_adapters(encoder, where=lambda name: name == "nowhere")
    once = add_adapters(model, where=lambda name: name == "1")
    with pytest.raises(ValueError, match="'1' has an adapter already"):
        add_adapters(once, where=lambda name: name == "1")


def test_adapted_and_bundled_networks_export(rng):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).eval()
    x = torch.randn(5, 4, generator=rng)
    adapted = add_adapters(model, where=lambda name: name == "0")
    nn.init.ones_(adapted[0].adapter.modulation)
    for each in (adapted, bundle(model, 7, x, seed=0)):
        program = torch.export.export(each, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        y = torch.randn(9, 4, generator=rng)
        torch.testing.assert_close(program.module()(y), each(y))
        assert not torch.equal(each(y), model(y))


def test_outputs_in_tuples_are_adapted_in_their_first_entry():
    model = nn.ModuleDict({"rnn": nn.GRU(4, 6, batch_first=True)})
    x = torch.randn(2, 5, 4)
    rnn = add_adapters(nn.Sequential(model["rnn"]), where=lambda name: name == "0", example_input=x)[0]
    outputs, last = rnn(x)
    expected = model["rnn"](x)
    torch.testing.assert_close(outputs, expected[0])
    torch.testing.assert_close(last, expected[1])
    nn.init.ones_(rnn.adapter.modulation)
    assert not torch.equal(rnn(x)[0], outputs)


def test_adapters_refuse_what_cannot_be(unchecked):
    with pytest.raises(ValueError, match="norm must be"):
        SNNKAdapter(4, norm="inside")
    with pytest.raises(ValueError, match="init must be"):
        SNNKAdapter(4, init="xavier")
    with pytest.raises(ValueError, match="bottleneck must be at least 1, got 0"):
        SNNKAdapter(4, bottleneck=0)
    with pytest.raises(ValueError, match="features must be at least 1, got 0"):
        BottleneckAdapter(0)


def test_the_pooler_and_classifier_of_bert_become_one_matrix(rng):
    model, _ = bert()
    tokens = torch.randint(0, 30, (200, 8), generator=rng)
    with torch.no_grad():
        first = model.bert(tokens).last_hidden_state[:, 0]
    tail = nn.Sequential(model.bert.pooler.dense, nn.Tanh(), model.classifier)
    bundled = bundle(tail, 40, first[:150], seed=0)
    small = copy.deepcopy(model)
    small.bert.pooler.dense, small.bert.pooler.activation, small.classifier = bundled, nn.Identity(), nn.Identity()
    before, after = model(tokens[150:]).logits, small(tokens[150:]).logits
    assert float((after - before).norm() / before.norm()) < 0.2
    assert count(bundled) == 3 * 80 + 3


def test_feed_forward_layers_of_a_vision_transformer_become_snnks():
    from transformers.activations import GELUActivation

    model, x = vision_transformer()
    rules = {
        (nn.Linear, GELUActivation): lambda linear, act: SNNKLinear.like(linear, activation="gelu", num_features=8)
    }
    report = swap(model, rules, example_input=x)
    assert len(report.replaced) == 2
    assert sum(isinstance(module, SNNKLinear) for module in model.modules()) == 2
    assert isinstance(next(m for m in model.modules() if isinstance(m, SNNKLinear)).features, (URF, ArcCosFeatures))
    model(x).logits.sum().backward()
