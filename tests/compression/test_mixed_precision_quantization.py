"""`mixed_precision` on a person's networks: a small CNN and a transformer; costs, storage, execution, export."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lathe.compression.mixed_precision_quantization import (
    LatencyTable,
    QuantConv2d,
    QuantizedModel,
    QuantLinear,
    bops_costs,
    byte_costs,
    calibrate,
    fold_batch_norms,
    integer_kernel,
    layer_macs,
    measure_latency,
    mixed_precision,
    quantize_model,
    roofline_costs,
)
from lathe.compression.mixed_precision_quantization import costs as costs_module
from lathe.compression.mixed_precision_quantization import kernels as kernels_module
from lathe.compression.mixed_precision_quantization import model as model_module
from lathe.compression.mixed_precision_quantization.costs import byte_links

needs_kernels = pytest.mark.skipif(
    integer_kernel("linear", "cpu") is None or integer_kernel("conv2d", "cpu") is None,
    reason="this CPU has no int8 kernels that PyTorch can use",
)


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = torch.tensor(loaded.images / 16.0).float()[:, None]
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[shuffled], torch.tensor(loaded.target).long()[shuffled]


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1), nn.ReLU(),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels), nn.ReLU(),
            nn.Conv2d(2 * channels, channels, 1),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x)


@pytest.fixture(scope="module")
def trained(digits):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Residual(8), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), Residual(12), nn.Flatten(),
        nn.Linear(12 * 16, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for step in range(100):
        rows = slice(50 * (step % 20), 50 * (step % 20) + 50)
        optimizer.zero_grad()
        F.cross_entropy(net(digits[0][rows]), digits[1][rows]).backward()
        optimizer.step()
    return net.eval()


def test_the_floor_holds_and_bytes_are_saved_on_a_cnn(trained, digits):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    calibration = tuple(each[:128] for each in digits)
    held_out = tuple(each[1000:] for each in digits)
    small = mixed_precision(trained, calibration, held_out, keep=0.97, cost="bytes", probes=10)
    report = small.report
    accuracy = float((small(held_out[0]).argmax(1) == held_out[1]).double().mean())
    assert accuracy == pytest.approx(report.accuracy) and report.accuracy >= report.floor
    assert report.floor == pytest.approx(0.97 * report.base_accuracy) and report.base_accuracy > 0.85
    assert report.evaluations <= 2 * math.ceil(math.log2(len(small.config) + 1)) + 2
    assert 4 in small.config.values()
    assert report.bytes == small.stored_bytes() < 0.6 * report.base_bytes
    assert report.cost < 0.6
    assert 0.5 < report.confidence <= 1
    assert sorted(report.order) == sorted(small.config)
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("order", ["qe", "hessian"])
@pytest.mark.parametrize("search", ["bisect", "greedy"])
def test_other_orders_and_searches_keep_the_floor_too(trained, digits, order, search):
    evaluations = []

    def evaluate(model):
        evaluations.append(1)
        with torch.no_grad():
            return float((model(digits[0][1200:]).argmax(1) == digits[1][1200:]).double().mean())

    small = mixed_precision(
        trained, tuple(each[:64] for each in digits), evaluate, keep=0.9, cost="bops", order=order, search=search,
        probes=5, dtype=torch.float32, per_channel=False, observer="mse", refine_steps=2,
    )  # fmt: skip
    assert small.report.accuracy >= 0.9 * small.report.base_accuracy
    assert small.report.confidence is None
    assert len(evaluations) == small.report.evaluations


def test_an_order_may_be_given_by_name(trained, digits):
    calibration = tuple(each[:64] for each in digits)
    names = list(calibrate(fold_batch_norms(trained), calibration))[::-1]
    small = mixed_precision(trained, calibration, lambda _: 1.0, bits=(16, 4), cost="bytes", order=names)
    assert small.report.order == tuple(names)
    assert set(small.config.values()) == {4}
    with pytest.raises(ValueError, match="order must name each of"):
        mixed_precision(trained, calibration, lambda _: 1.0, cost="bytes", order=names[1:])


@needs_kernels
def test_latency_never_lowers_a_layer_that_would_get_slower(trained, digits):
    table = LatencyTable(
        seconds={"a": {16: 2.0, 8: 1.5}, "b": {16: 2.0, 8: 2.2}, "c": {16: 1.0, 8: 1.4}},
        conversion={"a": 0.1, "b": 0.5, "c": 0.1},
        follows={"b": "a", "c": "b"},
        rest=1.0,
    )
    assert table.best(dict.fromkeys("abc", 8)) == {"a": 8, "b": 8, "c": 16}
    assert table.best({"a": 16, "b": 8, "c": 8}) == {"a": 16, "b": 16, "c": 16}
    assert table.predict({"a": 8, "b": 8, "c": 16}) == pytest.approx(1.0 + 1.5 + 2.2 - 0.5 + 1.0)
    assert table.predict({"a": 16, "b": 8, "c": 8}) == pytest.approx(1.0 + 2.0 + 2.2 + 1.4 - 0.1)
    small = mixed_precision(trained, tuple(each[:64] for each in digits), lambda _: 1.0, order="qe", cost="latency")
    assert small.report.predicted_latency <= small.report.base_latency * 3
    assert 4 not in small.config.values()
    assert small.report.measured_latency > 0


def test_every_best_configuration_is_that_of_enumeration(rng):
    for _ in range(10):
        values = torch.rand(4, 3, generator=rng).tolist()
        names = "abcd"
        table = LatencyTable(
            {n: {16: v[0], 8: v[1]} for n, v in zip(names, values)},
            {n: v[2] * v[1] for n, v in zip(names, values)},
            {"b": "a", "c": "b", "d": "b"},
            0.0,
        )
        configs = [{n: 8 if number >> k & 1 else 16 for k, n in enumerate(names)} for number in range(16)]
        best = min(map(table.predict, configs))
        assert table.predict(table.best(dict.fromkeys(names, 8))) == pytest.approx(best)


def test_a_machine_without_kernels_falls_back_to_an_ideal_one(trained, digits, monkeypatch):
    for module in (model_module, costs_module, kernels_module):
        monkeypatch.setattr(module, "integer_kernel", lambda kind, device: None)
    with pytest.warns(RuntimeWarning, match="cost is an ideal machine's latency"):
        small = mixed_precision(trained, tuple(each[:64] for each in digits), lambda _: 1.0, order="qe")
    assert small.execute == "simulate"
    assert small.report.predicted_latency is None


# --- costs ------------------------------------------------------------------------------------------------------------


def test_macs_of_convolutions_and_linear_layers_by_counting():
    assert layer_macs(nn.Conv2d(6, 8, 3, padding=1, stride=2, groups=2), (5, 6, 9, 9)) == 8 * 5 * 5 * 3 * 9
    assert layer_macs(nn.Linear(7, 5), (4, 3, 7)) == 3 * 7 * 5


@pytest.mark.parametrize("per_channel", [True, False])
def test_byte_costs_are_the_bytes_of_the_layers_built(trained, digits, per_channel):
    folded = fold_batch_norms(trained)
    ranges = calibrate(folded, (digits[0][:64],))
    table = byte_costs(folded, ranges, (16, 8, 4, 3), per_channel=per_channel)
    for bits in (8, 4, 3):
        built = quantize_model(folded, dict.fromkeys(ranges, bits), ranges, per_channel=per_channel)
        for name, layer in built.quantized_layers().items():
            assert layer.stored_bytes() == table[name][bits]
        state = built.state_dict().values()
        assert built.stored_bytes() == sum(each.numel() * each.element_size() for each in state)


def test_the_network_counts_its_packed_bytes_in_core_size(trained, digits):
    size = pytest.importorskip("lathe.core.size")
    folded = fold_batch_norms(trained)
    ranges = calibrate(folded, (digits[0][:64],))
    built = quantize_model(folded, dict.fromkeys(ranges, 4), ranges)
    assert size.measure(built, digits[0][:2]).stored_bytes == built.stored_bytes()


def test_bit_operations_and_the_roofline_scale_with_the_widths(trained, digits):
    folded = fold_batch_norms(trained)
    ranges = calibrate(folded, (digits[0][:64],))
    for by_bits in bops_costs(folded, ranges, (16, 8, 4)).values():
        assert by_bits[16] == 4 * by_bits[8] == 16 * by_bits[4]
    compute = roofline_costs(folded, ranges, (16, 8, 4), bandwidth=1e30)
    memory = roofline_costs(folded, ranges, (16, 8, 4), peak=1e30)
    for table in (compute, memory):
        for by_bits in table.values():
            assert by_bits[16] == pytest.approx(2 * by_bits[8]) == pytest.approx(4 * by_bits[4])


@needs_kernels
def test_measured_latency_covers_every_layer_and_finds_the_chains(trained, digits):
    folded = fold_batch_norms(trained)
    ranges = calibrate(folded, (digits[0][:16],))
    table = measure_latency(folded, ranges, digits[0][:16], (16, 8), repeats=3)
    assert set(table.seconds) == set(ranges)
    assert all(value > 0 for by_bits in table.seconds.values() for value in by_bits.values())
    # Inside a residual block only, and between the last two layers: elsewhere others read the output too.
    assert table.follows == {
        "3.body.2": "3.body.0", "3.body.4": "3.body.2", "8.body.2": "8.body.0", "8.body.4": "8.body.2", "12": "10",
    }  # fmt: skip


# --- execution --------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("bits", [8, 4])
def test_layers_that_pass_bytes_compute_what_the_simulation_computes(trained, digits, bits):
    folded = fold_batch_norms(trained)
    ranges = calibrate(folded, (digits[0][:64],))
    x = digits[0][:32]
    links = byte_links(folded, ranges, x)
    model = quantize_model(folded, dict.fromkeys(ranges, bits), ranges, dtype=torch.float32, links=links)
    simulated = model(x)
    passed = []
    for name in links:
        model.quantized_layers()[name].register_forward_pre_hook(lambda _, args: passed.append(args[0].dtype))
    model.execute = "native"
    native = model(x)
    assert passed == [torch.uint8] * len(links)
    # Scales multiply in another order, which may move a value across a rounding boundary: a step here and there.
    step = float(simulated.abs().max()) / (2 ** (bits - 1) - 1)
    assert float((native - simulated).abs().mean()) < 0.05 * step
    assert float((native - simulated).abs().max()) < 3 * step
    model.execute = "simulate"
    assert torch.equal(model(x), simulated)


def test_the_state_dict_round_trip_keeps_every_output(trained, digits):
    folded = fold_batch_norms(trained)
    ranges = calibrate(folded, (digits[0][:64],))
    config = {name: (16, 8, 4)[place % 3] for place, name in enumerate(ranges)}
    source = quantize_model(folded, config, ranges)
    torch.manual_seed(1)
    blank = copy.deepcopy(folded)
    for parameter in blank.parameters():
        nn.init.normal_(parameter)
    target = quantize_model(blank, config, ranges)
    x = digits[0][:8]
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(source.state_dict())
    for mode in ("simulate", "native"):
        source.execute = target.execute = mode
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(source(x), target(x))
    assert torch.equal(copy.deepcopy(source)(x), source(x))


def test_the_simulation_can_be_exported(trained, digits):
    folded = fold_batch_norms(trained)
    ranges = calibrate(folded, (digits[0][:64],))
    model = quantize_model(folded, dict.fromkeys(ranges, 4), ranges, dtype=torch.float32)
    x = digits[0][:8]
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))


def test_quantised_layers_stand_where_the_configuration_says(trained, digits):
    folded = fold_batch_norms(trained)
    ranges = calibrate(folded, (digits[0][:64],))
    model = quantize_model(folded, {"0": 8, "12": 4}, ranges)
    assert isinstance(model.network[0], QuantConv2d) and model.network[0].bits == 8
    assert isinstance(model.network[12], QuantLinear) and model.network[12].bits == 4
    assert type(model.network[10]) is nn.Linear and model.network[10].weight.dtype == torch.bfloat16
    assert model(digits[0][:2]).dtype == torch.float32


def test_a_single_layer_is_a_network_as_well(rng):
    net = nn.Linear(8, 4)
    x = torch.randn(32, 8, generator=rng)
    small = mixed_precision(net, (x, net(x).argmax(1)), lambda _: 1.0, order="qe", cost="bytes")
    assert small.config == {"": 4} and isinstance(small.network, QuantLinear)


# --- transformers -----------------------------------------------------------------------------------------------------


def test_a_bert_classifier_is_quantised_within_its_floor(rng):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    net = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        net.classifier.weight.mul_(20)
    tokens = torch.randint(0, 50, (120, 12), generator=rng)
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        labels = net(input_ids=tokens, attention_mask=mask).logits.argmax(1)

    def batches(rows):
        inputs = {"input_ids": tokens[rows], "attention_mask": mask[rows]}
        return [(inputs, labels[rows])]

    small = mixed_precision(
        net, batches(slice(0, 32)), batches(slice(32, 120)), keep=0.9, cost="bytes", probes=4,
        loss=lambda output, target: F.cross_entropy(output.logits, target),
    )  # fmt: skip
    assert len(small.config) == 14  # six a block, the pooler, the classifier
    assert small.report.accuracy >= 0.9 * small.report.base_accuracy
    assert min(small.config.values()) < 16
    assert small.report.bytes < small.report.base_bytes


def test_pytorchs_transformer_encoder_does_not_slip_past_its_quantised_layers(rng):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(4, 5, 16, generator=rng)
    ranges = calibrate(net, (x,))
    assert [name for name in ranges if "linear" in name] == list(ranges)  # out_proj is read, not called
    model = quantize_model(net, dict.fromkeys(ranges, 2), ranges, dtype=torch.float32)
    with torch.no_grad():
        quantized, plain = model(x), net(x)
    assert float((quantized - plain).abs().max()) > 0.01
    with torch.enable_grad():
        torch.testing.assert_close(model(x.requires_grad_()), quantized)


# --- ways out ---------------------------------------------------------------------------------------------------------


def mixed_net(digits, trained):
    folded = fold_batch_norms(trained)
    ranges = calibrate(folded, (digits[0][:64],))
    config = {name: (8, 4)[place % 2] for place, name in enumerate(ranges)} | {"10": 16}
    return quantize_model(folded, config, ranges, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore")
def test_onnx_runs_elsewhere_and_holds_four_bit_weights(trained, digits, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = mixed_net(digits, trained)
    path = tmp_path / "net.onnx"
    model.export_onnx(path, digits[0][:4])
    session = runtime.InferenceSession(str(path))
    x = digits[0][:200]
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = model(x)
    # The same but for values that fall on the other side of a rounding boundary, where other code adds up: a sample
    # that has one moves by a step of a grid of 4 bits, others not at all. A wrong scale would leave none as it was.
    difference = (torch.tensor(output) - expected).abs()
    assert float((difference.amax(1) < 1e-4 * float(expected.abs().max())).float().mean()) > 0.2
    assert float(difference.mean()) < 0.05 * float(expected.abs().mean())
    assert float((torch.tensor(output).argmax(1) == expected.argmax(1)).float().mean()) > 0.98
    stored = onnx.load(path).graph.initializer
    assert {onnx.TensorProto.INT4, onnx.TensorProto.INT8} <= {each.data_type for each in stored}
    for name, layer in model.quantized_layers().items():
        (codes,) = (each for each in stored if each.name == f"{name}.codes")
        count = layer.weight.numel()
        assert len(codes.raw_data) == (count if layer.bits == 8 else -(-count // 2))


@pytest.mark.filterwarnings("ignore")
def test_torchao_takes_over_the_configuration(rng):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10))
    x = torch.randn(32, 64, generator=rng)
    model = quantize_model(net, {"0": 8, "2": 4}, calibrate(net, (x,)), dtype=torch.float32)
    there = model.to_torchao()
    assert [type(there[n].weight).__module__.split(".")[0] for n in (0, 2, 4)] == ["torchao", "torchao", "torch"]
    rounded = nn.Sequential(*(copy.deepcopy(each) for each in net))
    with torch.no_grad():
        for n in (0, 2):
            rounded[n].weight.copy_(model.network[n].weight)
        expected = rounded(x)
        assert float((there(x) - expected).abs().mean()) < 0.15 * float(expected.abs().mean())


@pytest.mark.parametrize(("method", "module"), [("to_torchao", "torchao"), ("export_onnx", "onnx")])
def test_missing_packages_are_named(trained, digits, monkeypatch, method, module):
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    arguments = () if method == "to_torchao" else ("net.onnx", digits[0][:2])
    with pytest.raises(ImportError, match=f"{method} needs {module}"):
        getattr(mixed_net(digits, trained), method)(*arguments)


# --- bad arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep must be in \(0, 1\], got 0.0"),
        ({"keep": 1.1}, r"keep must be in \(0, 1\], got 1.1"),
        ({"bits": (16, 9)}, "bits must be 2 to 8, or 16"),
        ({"bits": (8, 4)}, "bits must start with 16"),
        ({"bits": (16,)}, "bits must start with 16 and have a lower width"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mixed_precision(nn.Linear(2, 2), (torch.ones(2, 2), torch.zeros(2).long()), lambda _: 1.0, **options)


def test_a_model_without_layers_and_empty_calibration_are_refused():
    data = (torch.ones(2, 2), torch.zeros(2).long())
    with pytest.raises(ValueError, match="model must have a layer that can be quantised"):
        mixed_precision(nn.ReLU(), data, lambda _: 1.0)
    with pytest.raises(ValueError, match="calibration must hold at least one sample"):
        mixed_precision(nn.Linear(2, 2), [], lambda _: 1.0)


def test_an_unknown_way_to_execute_is_refused():
    with pytest.raises(ValueError, match="execute must be 'simulate' or 'native', got 'fast'"):
        QuantizedModel(nn.Identity(), {}, torch.float32, {}).execute = "fast"
