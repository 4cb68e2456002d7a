"""Quantisers, kernels and layers: against torch's own, numpy integers, numerical integration, and simulation."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from torch import nn

from lathe.compression.mixed_precision_quantization import (
    QuantConv2d,
    QuantLinear,
    Range,
    calibrate,
    dequantize,
    fake_quantize,
    fold_batch_norms,
    integer_kernel,
    levels,
    mse_clip,
    quantize,
    quantize_model,
)
from lathe.compression.mixed_precision_quantization import kernels as kernels_module
from lathe.compression.mixed_precision_quantization import layers as layers_module
from lathe.compression.mixed_precision_quantization.kernels import Int8Product, to_codes
from lathe.core.size import measure

needs_kernels = pytest.mark.skipif(
    integer_kernel("linear", "cpu") is None or integer_kernel("conv2d", "cpu") is None,
    reason="this CPU has no int8 kernels that PyTorch can use",
)

BITS = st.integers(2, 8)
SEEDS = st.integers(0, 10_000)


def values(seed, count=200):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


# --- the quantiser ----------------------------------------------------------------------------------------------------


@given(BITS, SEEDS, st.floats(0.1, 5.0), st.booleans())
@settings(deadline=None)
def test_quantising_twice_is_quantising_once(bits, seed, clip, signed):
    once = fake_quantize(values(seed), bits, clip, signed=signed)
    torch.testing.assert_close(fake_quantize(once, bits, clip, signed=signed), once, rtol=0, atol=0)


@given(BITS, SEEDS, st.floats(0.1, 5.0))
@settings(deadline=None)
def test_error_is_half_a_step_inside_the_range_and_the_quantiser_is_odd(bits, seed, clip):
    x = values(seed).double().clamp(-clip, clip)
    error = (fake_quantize(x, bits, clip) - x).abs().max()
    assert float(error) <= clip / (2 ** (bits - 1) - 1) / 2 * (1 + 1e-6)
    assert torch.equal(fake_quantize(-x, bits, clip), -fake_quantize(x, bits, clip))


@given(BITS, SEEDS, st.floats(0.1, 5.0), st.booleans())
@settings(deadline=None)
def test_equals_torchs_fused_kernel_exactly(bits, seed, clip, signed):
    x = values(seed)
    low, high = levels(bits, signed)
    scale = float(torch.tensor(clip) / high)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, 0, low, high)
    assert torch.equal(fake_quantize(x, bits, clip, signed=signed), expected)


@given(SEEDS, st.floats(0.1, 5.0))
@settings(deadline=None)
def test_codes_are_those_of_torchs_quantised_tensors(seed, clip):
    x = values(seed).clamp(-clip, clip)
    codes, scale = quantize(x, 8, torch.tensor(clip) / 127)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.quantize_per_tensor(x, float(scale), 0, torch.qint8).int_repr()
    assert torch.equal(codes, expected)
    torch.testing.assert_close(dequantize(codes, scale), fake_quantize(x, 8, clip))


def test_each_channel_has_its_own_scale(rng):
    weight = torch.randn(5, 3, 2, 2, generator=rng)
    clip = weight.abs().amax((1, 2, 3))
    rows = [fake_quantize(weight[index], 4, float(clip[index])) for index in range(5)]
    assert torch.equal(fake_quantize(weight, 4, clip, axis=0), torch.stack(rows))


def test_gradients_pass_straight_through_inside_the_range_only():
    x = torch.tensor([-3.0, -0.4, 0.3, 0.9, 2.0], requires_grad=True)
    fake_quantize(x, 4, 1.0).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]))


def test_sixteen_bits_leave_values_alone(rng):
    x = torch.randn(7, generator=rng)
    assert torch.equal(fake_quantize(x, 16, 1.0), x)


@pytest.mark.parametrize(("bits", "clip", "error"), [(4, 2.474, 0.012889), (8, 3.921, 8.831e-5)])
def test_best_clip_of_a_normal_distribution_is_that_of_numerical_integration(bits, clip, error):
    # A million quantiles stand for the distribution.
    x = torch.tensor(stats.norm.ppf((np.arange(1_000_000) + 0.5) / 1_000_000), dtype=torch.float32)
    found = mse_clip(x, bits)
    high = 2 ** (bits - 1) - 1

    def loss(value, alpha=float(found)):
        step = alpha / high
        return (value - step * np.clip(np.round(value / step), -high, high)) ** 2 * stats.norm.pdf(value)

    steps = np.linspace(-8, 8, 200_001)
    integral = integrate.simpson(loss(steps), x=steps)
    assert float(found) == pytest.approx(clip, abs=0.04)  # the grid of candidates is 0.05 wide
    assert integral == pytest.approx(error, rel=0.005)
    assert float((fake_quantize(x, bits, found) - x).square().mean()) == pytest.approx(error, rel=0.01)


@given(BITS, SEEDS)
@settings(max_examples=20, deadline=None)
def test_best_clip_never_loses_to_the_largest_magnitude(bits, seed):
    x = values(seed)
    best = (fake_quantize(x, bits, mse_clip(x, bits)) - x).square().sum()
    assert best <= (fake_quantize(x, bits, x.abs().max()) - x).square().sum() * (1 + 1e-5)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clip_that_is_no_range_is_refused(clip):
    with pytest.raises(ValueError, match="clip must be positive and finite"):
        fake_quantize(torch.ones(2), 8, clip)


@pytest.mark.parametrize("bits", [1, 9, 32])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be 2 to 8, got {bits}"):
        fake_quantize(torch.ones(2), bits, 1.0)


# --- kernels ----------------------------------------------------------------------------------------------------------


@given(SEEDS, st.floats(1e-3, 10.0), BITS, st.booleans())
@settings(deadline=None)
def test_bytes_round_exactly_as_the_simulation_does(seed, clip, bits, signed):
    low, high = levels(bits, signed)
    zero = 128 if signed else 0
    scale = torch.tensor(clip) / high
    x = torch.cat([values(seed), (torch.arange(-300, 300) + 0.5) * scale])  # ties included
    codes = to_codes(x, float(scale.reciprocal()), zero, low, high)
    assert torch.equal((codes.float() - zero) * scale, fake_quantize(x, bits, clip, signed=signed))


def test_without_torchs_byte_quantiser_the_bytes_are_the_same(rng, monkeypatch):
    x = 4 * torch.randn(1000, generator=rng)
    fast = to_codes(x, 30.0, 128, -127, 127)
    monkeypatch.setattr(kernels_module, "_has_byte_quantizer", lambda: False)
    assert torch.equal(to_codes(x, 30.0, 128, -127, 127), fast)


@pytest.mark.parametrize("kind", ["onednn", "int_mm"])
@pytest.mark.parametrize("zero", [0, 128])
def test_int32_products_are_those_of_numpy(rng, kind, zero):
    kernel = integer_kernel("linear", "cpu") if kind == "onednn" else Int8Product
    if kernel is None:
        pytest.skip("no integer kernel")
    weight = torch.randint(-127, 128, (21, 35), generator=rng, dtype=torch.int8)
    codes = torch.randint(0, 256, (6, 35), generator=rng, dtype=torch.uint8)
    expected = (codes.numpy().astype(np.int64) - zero) @ weight.numpy().astype(np.int64).T
    products = kernel(weight, torch.ones(1), None, 1.0, zero)(codes, torch.float32)
    np.testing.assert_array_equal(products.numpy().astype(np.int64), expected)


@needs_kernels
def test_int32_convolutions_are_those_of_integers(rng):
    weight = torch.randint(-127, 128, (8, 3, 3, 3), generator=rng, dtype=torch.int8)
    codes = torch.randint(0, 256, (2, 3, 9, 7), generator=rng, dtype=torch.uint8)
    kernel = integer_kernel("conv2d", "cpu")(
        weight, torch.ones(8), None, 1.0, 128,
        stride=(2, 1), padding=(1, 0), dilation=(1, 1), groups=1, shape=codes.shape,
    )  # fmt: skip
    expected = nn.functional.conv2d(codes.double() - 128, weight.double(), None, (2, 1), (1, 0))
    assert torch.equal(kernel(codes, torch.float32).double(), expected)


# --- layers -----------------------------------------------------------------------------------------------------------


def layer_range(bits, signed, clip=2.5):
    return Range(signed, {bits: clip}, (1,))


@needs_kernels
@given(
    bits=BITS, signed=st.booleans(), per_channel=st.booleans(), bias=st.booleans(),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9)), seed=SEEDS,
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_a_linear_layer_on_integers_equals_its_simulation(bits, signed, per_channel, bias, sizes, seed):
    inputs, outputs, rows = sizes
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias)
    x = torch.randn(rows, 2, inputs)
    quantized = QuantLinear.from_trained(layer, bits, layer_range(bits, signed), per_channel=per_channel)
    simulated = quantized(x)
    quantized.execute = "native"
    spread = float(simulated.abs().max()) + 1e-6
    assert float((quantized(x) - simulated).abs().max()) <= 1e-4 * spread


@needs_kernels
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": "same"},
        {"padding": "same", "kernel_size": 4},
        {"padding": 2, "padding_mode": "reflect", "stride": 2},
        {"groups": 6, "padding": 1, "bias": False},
        {"dilation": 2, "kernel_size": (1, 3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_convolution_on_integers_equals_its_simulation(rng, options, bits, signed):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 12, **{"kernel_size": 3, **options})
    x = torch.randn(3, 6, 11, 9, generator=rng)
    quantized = QuantConv2d.from_trained(conv, bits, layer_range(bits, signed), per_channel=False)
    simulated = quantized(x)
    assert simulated.shape == conv(x).shape
    quantized.execute = "native"
    assert float((quantized(x) - simulated).abs().max()) <= 1e-4 * float(simulated.abs().max())


def test_simulation_is_the_float_layer_on_rounded_weights_and_inputs(rng):
    layer = nn.Linear(9, 5)
    x = torch.randn(4, 9, generator=rng)
    quantized = QuantLinear.from_trained(layer, 4, layer_range(4, True))
    weight = fake_quantize(layer.weight.detach(), 4, layer.weight.detach().abs().amax(1), axis=0)
    expected = nn.functional.linear(fake_quantize(x, 4, 2.5), weight, layer.bias)
    torch.testing.assert_close(quantized(x), expected, rtol=1e-6, atol=1e-6)


def test_eight_bits_come_close_to_the_float_layer(rng):
    layer = nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(50, 64, generator=rng)
    quantized = QuantLinear.from_trained(layer, 8, layer_range(8, True, 4.0))
    assert float((quantized(x) - layer(x)).square().mean() / layer(x).var()) < 1e-3


@pytest.mark.parametrize(("bits", "weights"), [(8, 60 * 33), (4, 990), (3, 743), (2, 495)])
def test_stored_bytes_are_packed_codes_and_scales(bits, weights):
    layer = QuantLinear.from_trained(nn.Linear(60, 33), bits, layer_range(bits, True))
    assert layer.stored_bytes() == weights + 4 * 33 + 4 + 4 * 33
    assert layer.stored_bytes() == sum(each.numel() * each.element_size() for each in layer.state_dict().values())
    assert QuantLinear(60, 33, bias=False, bits=bits, per_channel=False).stored_bytes() == weights + 4 + 4


@pytest.mark.parametrize("mode", ["simulate", "native"])
def test_the_state_dict_holds_the_layer(rng, mode):
    source = QuantConv2d.from_trained(nn.Conv2d(3, 4, 3), 4, layer_range(4, True))
    target = QuantConv2d.like(nn.Conv2d(3, 4, 3), bits=4)
    x = torch.randn(2, 3, 5, 5, generator=rng)
    source.execute = target.execute = mode
    assert not torch.equal(source(x), target(x))
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(x), target(x))
    for twin in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert torch.equal(twin(x), source(x))


def test_a_change_of_dtype_keeps_the_scales(rng):
    layer = QuantLinear.from_trained(nn.Linear(8, 8), 8, layer_range(8, True))
    x = torch.randn(3, 8, generator=rng)
    exact = layer(x)
    layer.to(torch.bfloat16)
    assert layer.weight_scale.dtype == layer.input_scale.dtype == torch.float32
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x.bfloat16()).float(), exact, atol=0.05, rtol=0.05)


def test_weights_alone_may_be_quantised(rng):
    linear = nn.Linear(16, 8)
    layer = QuantLinear.from_trained(linear, 4, None)
    x = 100 * torch.randn(3, 16, generator=rng)
    weight = fake_quantize(linear.weight.detach(), 4, linear.weight.detach().abs().amax(1), axis=0)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, linear.bias))


def test_without_a_kernel_the_layer_warns_once_and_simulates(rng, monkeypatch):
    layer = QuantLinear.from_trained(nn.Linear(8, 8), 8, layer_range(8, True))
    x = torch.randn(3, 8, generator=rng)
    simulated = layer(x)
    monkeypatch.setattr(layers_module, "integer_kernel", lambda kind, device: None)
    layer.execute = "native"
    with pytest.warns(RuntimeWarning, match="no integer kernel for QuantLinear on cpu: simulating"):
        assert torch.equal(layer(x), simulated)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)


def test_a_range_without_the_width_is_refused():
    with pytest.raises(ValueError, match=r"a clip for 4 bits, got clips for \[8\]"):
        QuantLinear.from_trained(nn.Linear(2, 2), 4, layer_range(8, True))


# --- calibration ------------------------------------------------------------------------------------------------------


def test_calibration_sees_the_inputs_of_every_layer(rng):
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(64, 4, generator=rng)
    ranges = calibrate(net, x.split(16))
    assert list(ranges) == ["0", "2"]
    assert ranges["0"].signed and not ranges["2"].signed
    assert ranges["0"].clip[8] == pytest.approx(float(x.abs().max()))
    assert ranges["2"].clip[4] == pytest.approx(float(net[:2](x).max()))
    assert calibrate(net, (x,), symmetric=True)["2"].signed


def test_percentiles_clip_outliers_and_least_squares_clip_more_at_fewer_bits(rng):
    x = torch.randn(5000, 8, generator=rng)
    x[0, 0] = 1000.0
    net = nn.Linear(8, 2)
    assert calibrate(net, (x,), "percentile", percentile=99.9)[""].clip[8] < 5
    normal = calibrate(net, (x[1:],), "mse")[""].clip
    assert normal[2] < normal[4] < normal[8]


def test_folded_batch_norms_compute_the_same(rng):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 7), nn.BatchNorm1d(7)
    )
    for _ in range(5):
        net(torch.randn(32, 3, 5, 5, generator=rng) * 3 + 1)
    with torch.no_grad():
        for norm in (net[1], net[5]):
            norm.weight.uniform_(0.5, 2.0)
            norm.bias.normal_()
    net.eval()
    x = torch.randn(4, 3, 5, 5, generator=rng)
    before = net(x)
    folded = fold_batch_norms(net, x)
    torch.testing.assert_close(folded(x), before, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(each, (nn.BatchNorm1d, nn.BatchNorm2d)) for each in folded.modules())
    assert isinstance(net[1], nn.BatchNorm2d) and torch.equal(net(x), before)


def test_an_input_that_is_all_zero_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"input of layer '0' must be finite and not all zero, got largest magnitude 0"
    ):
        calibrate(nn.Sequential(nn.Linear(2, 2)), (torch.zeros(3, 2),))


def test_an_infinite_input_is_refused_by_name():
    with pytest.raises(ValueError, match=r"layer '0' must be finite"):
        calibrate(nn.Sequential(nn.Linear(2, 2)), (torch.full((3, 2), float("inf")),))


def test_an_empty_calibration_set_is_refused():
    with pytest.raises(ValueError, match="calibration must hold at least one sample"):
        calibrate(nn.Linear(2, 2), [])


@needs_kernels
def test_a_network_on_integers_takes_as_many_operations_as_the_network_in_floats(rng):
    net = nn.Sequential(nn.Conv2d(4, 16, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).eval()
    x = torch.randn(3, 4, 8, 8, generator=rng)
    small = quantize_model(net, {"0": 8, "3": 8}, calibrate(net, (x,)))
    small.execute = "native"
    measured = measure(small, x)
    assert measured.flops == measure(net, x).flops and measured.uncounted == ()
