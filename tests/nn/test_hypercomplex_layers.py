"""Layers against torch's own on a brute-force weight, quaternions by 16 terms, counts, moments, and lifecycles."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lathe.core.surgery import swap
from lathe.nn.hypercomplex_layers import (
    HypercomplexLayer,
    PHConv1d,
    PHConv2d,
    PHConv3d,
    PHConvTranspose1d,
    PHConvTranspose2d,
    PHConvTranspose3d,
    PHLinear,
    algebra_tensor,
)

CONVS = [PHConv1d, PHConv2d, PHConv3d]
TRANSPOSED = [PHConvTranspose1d, PHConvTranspose2d, PHConvTranspose3d]


def brute_weight(layer: HypercomplexLayer, F: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """H entry by entry, from its definition, in the layout of the replaced layer's weight."""
    weight = torch.zeros(shape, dtype=F.dtype)
    n, groups = layer.n, layer.groups
    first, second = shape[0] // (groups * n), shape[1] // n
    for g, x, y, p, q in itertools.product(range(groups), range(n), range(n), range(first), range(second)):
        A = layer.A if layer.A.ndim == 3 else layer.A[g]
        # Forwards the first dimension holds outputs (block a), transposed it holds inputs (block b).
        coefficient = A[:, y, x] if layer.transposed else A[:, x, y]
        weight[(g * n + x) * first + p, y * second + q] = torch.tensordot(coefficient, F[:, g * first + p, q], 1)
    return weight


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 3),
    n=st.integers(1, 3),
    groups=st.integers(1, 2),
    transposed=st.booleans(),
    own_algebra=st.booleans(),
    low_rank=st.booleans(),
    padding_mode=st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
    seed=st.integers(0, 100),
)
def test_convolutions_are_torchs_own_on_the_weight_of_the_definition(
    rank, n, groups, transposed, own_algebra, low_rank, padding_mode, seed
):
    torch.manual_seed(seed)
    ours = (TRANSPOSED if transposed else CONVS)[rank - 1]
    arguments = {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "groups": groups}
    arguments |= {"output_padding": 1} if transposed else {"padding_mode": padding_mode}
    channels = (2 * n * groups, n * groups)
    plain = ours.replaces(*channels, **arguments, dtype=torch.float64)
    layer = ours(
        *channels,
        **arguments,
        n=n,
        share_algebra=not own_algebra,
        rank=1 if low_rank else None,
        dtype=torch.float64,
    )
    if low_rank:
        F = torch.einsum("mpr,mrq...->mpq...", layer.U, layer.V)
    else:
        F = layer.F
    with torch.no_grad():
        plain.weight.copy_(brute_weight(layer, F, plain.weight.shape))
        plain.bias.copy_(layer.bias)
    x = torch.randn(2, channels[0], *(7, 6, 5)[:rank], dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(layer.weight, plain.weight, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(layer(x[0]), plain(x[0]), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(layer.fold()(x), layer(x), atol=1e-12, rtol=1e-12)


def test_padding_by_name_and_output_size_work_as_in_torch():
    x = torch.randn(1, 4, 6, 6)
    same = PHConv2d(4, 8, 3, padding="same", n=2)
    torch.testing.assert_close(same(x), functional.conv2d(x, same.weight, same.bias, padding="same"))
    up = PHConvTranspose2d(4, 2, 3, stride=2, n=2)
    assert up(x, output_size=(14, 14)).shape == (1, 2, 14, 14)
    with pytest.raises(ValueError, match="output size"):
        up(x, output_size=(20, 20))


def test_channels_lie_in_contiguous_blocks_not_interleaved():
    layer = PHConv2d(4, 4, 1, bias=False, n=2, algebra="complex")
    with torch.no_grad():
        layer.F.copy_(torch.tensor([[[2.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, 3.0]]]).view(2, 2, 2, 1, 1))
    real, imaginary = torch.tensor([1.0, 10.0]), torch.tensor([100.0, 1000.0])
    y = layer(torch.cat([real, imaginary]).view(1, 4, 1, 1)).flatten()
    assert y.tolist() == [*(2 * real - 3 * imaginary), *(3 * real + 2 * imaginary)]


def test_a_pointwise_quaternion_layer_multiplies_quaternions(rng):
    layer = PHConv2d(4, 4, 1, bias=False, n=4, algebra="quaternion", dtype=torch.float64)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, generator=rng)
    a, b, c, d = layer.F.detach().flatten()
    e, f, g, h = x[0]
    expected = torch.stack([
        a * e - b * f - c * g - d * h,
        a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f,
        a * h + b * g - c * f + d * e,
    ])  # fmt: skip
    y = layer(x)[0]
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    norms = torch.stack([a, b, c, d]).norm() * x[0].norm(dim=0)
    torch.testing.assert_close(y.norm(dim=0), norms, atol=1e-12, rtol=1e-12)


def test_a_complex_layer_is_torchs_complex_convolution(rng):
    layer = PHConv2d(6, 4, 3, bias=False, n=2, algebra="complex", dtype=torch.float64)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64, generator=rng)
    expected = functional.conv2d(torch.complex(x[:, :3], x[:, 3:]), torch.complex(layer.F[0], layer.F[1]))
    torch.testing.assert_close(layer(x), torch.cat([expected.real, expected.imag], 1), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("n", range(1, 9))
def test_layers_hold_as_many_parameters_as_the_formula_says(n):
    s, d, k = 2 * n, 3 * n, 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = [PHLinear(d, s, n=n, learn_algebra=True)]
        layers += [conv(d, s, k, n=n, learn_algebra=True) for conv in (*CONVS, *TRANSPOSED)]
    for layer, rank in zip(layers, (0, 1, 2, 3, 1, 2, 3)):
        assert sum(p.numel() for p in layer.parameters()) == n**3 + s * d * k**rank // n + s
    low = PHConv2d(d, s, k, bias=False, n=n, rank=1, terms=1)
    assert sum(p.numel() for p in low.parameters()) == (n > 1) * n * n + 2 + 3 * k * k


def test_n_of_one_is_the_ordinary_layer_without_a_second_scale():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = PHConv2d(3, 5, 3, n=1)
    assert not isinstance(layer.A, nn.Parameter)
    assert torch.equal(layer.weight, layer.F[0])
    with pytest.warns(UserWarning, match="n = 1"):
        PHConv2d(3, 5, 3, n=1, learn_algebra=True)


@pytest.mark.parametrize("options", [{}, {"algebra": "quaternion"}, {"terms": 7}, {"rank": 3}, {"init": "he"}], ids=str)
def test_weights_start_with_the_variance_of_the_replaced_layer(options):
    target = (2.0 if options.get("init") == "he" else 1.0 / 3.0) / (16 * 9)
    layers = [PHConv2d(16, 24, 3, n=4, **options) for _ in range(200)]
    variances = torch.stack([layer.weight.detach().var() for layer in layers])
    assert float(variances.mean()) == pytest.approx(target, rel=0.03)


def test_xavier_weights_start_with_the_variance_of_the_reference():
    n, s, d, k = 4, 24, 16, 9
    layers = [PHConv2d(d, s, 3, n=n, init="xavier") for _ in range(400)]
    variances = torch.stack([layer.weight.detach().var() for layer in layers])
    assert float(variances.mean()) == pytest.approx(2 / (n * d * k * (1 + s / n**2)), rel=0.03)
    layer = layers[0]
    assert layer.A.abs().max() <= 3**0.5 / n
    assert layer.F.abs().max() <= (6 / (s // n * d // n * k + d * k)) ** 0.5


def test_a_replacement_starts_with_the_variance_of_the_very_layer_it_replaces():
    conv = nn.Conv2d(32, 32, 3)
    nn.init.normal_(conv.weight, std=0.5)
    assert float(PHConv2d.like(conv, n=2).weight.detach().var()) == pytest.approx(0.25, rel=0.1)
    nn.init.zeros_(conv.weight)
    assert not PHConv2d.like(conv).weight.any()


def test_the_same_generator_draws_the_same_weights():
    layer = PHLinear(8, 8)
    layer.reset_parameters(generator=torch.Generator().manual_seed(3))
    first = layer.weight.detach().clone()
    layer.reset_parameters(generator=torch.Generator().manual_seed(3))
    assert torch.equal(layer.weight, first)


@pytest.mark.parametrize("ours", [PHLinear, *CONVS, *TRANSPOSED])
def test_replacements_have_shapes_dtype_and_mode_of_what_they_replace(ours):
    rank = 0 if ours is PHLinear else int(ours.__name__[-2])
    if rank == 0:
        plain = nn.Linear(8, 12, bias=False, dtype=torch.float64)
    else:
        plain = ours.replaces(8, 12, 3, stride=2, padding=1, groups=2, bias=False, dtype=torch.float64)
    plain.eval()
    for made in (ours.like(plain, n=2), ours.from_trained(plain, n=2)):
        x = torch.randn(2, 8, *(9,) * rank, dtype=torch.float64)
        assert made(x).shape == plain(x).shape
        assert made.weight.shape == plain.weight.shape
        assert made.weight.dtype == torch.float64
        assert not made.training
        assert made.bias is None
        assert type(made.fold()) is type(plain)


@pytest.mark.parametrize("ours", [PHLinear, PHConv2d, PHConvTranspose2d])
@pytest.mark.parametrize("share", [True, False])
def test_enough_terms_reproduce_any_trained_layer(ours, share):
    if ours is PHLinear:
        plain, x = nn.Linear(8, 12, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    else:
        plain = ours.replaces(8, 12, 3, groups=2, dtype=torch.float64)
        x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    made = ours.from_trained(plain, n=2, terms=4, share_algebra=share)
    torch.testing.assert_close(made(x), plain(x), atol=1e-12, rtol=1e-12)
    assert made.relative_error < 1e-12


def test_the_reported_error_is_that_of_the_weight():
    conv = nn.Conv2d(16, 16, 3)
    for options in ({}, {"terms": 2}, {"algebra": "quaternion"}, {"rank": 2}, {"terms": 16, "rank": 4}):
        made = PHConv2d.from_trained(conv, n=4, **options)
        error = float((made.weight - conv.weight).detach().norm() / conv.weight.detach().norm())
        assert 0 < error < 1
        assert made.relative_error == pytest.approx(error, rel=1e-4)
        assert torch.equal(made.bias, conv.bias)


def test_trained_quaternion_layers_are_found_again():
    original = PHConv2d(8, 8, 3, n=4, algebra="quaternion", dtype=torch.float64)
    made = PHConv2d.from_trained(original.fold(), n=4, algebra="quaternion")
    torch.testing.assert_close(made.F, original.F, atol=1e-12, rtol=1e-12)
    # Full rank of the filters loses nothing either.
    low = PHConv2d.from_trained(original.fold(), n=4, rank=2)
    torch.testing.assert_close(low.weight, original.weight, atol=1e-12, rtol=1e-12)


def test_indivisible_and_depthwise_layers_are_refused_skipped_or_divided_by_less():
    rgb, depthwise = nn.Conv2d(3, 12, 3), nn.Conv2d(8, 8, 3, groups=8)
    with pytest.raises(ValueError, match="in_channels must be a multiple of n = 4, got 3; the nearest is 4"):
        PHConv2d.like(rgb, n=4)
    assert PHConv2d.like(rgb, n=4, on_indivisible="skip") is None
    assert PHConv2d.like(rgb, n=4, on_indivisible="largest").n == 3
    assert PHConv2d.like(nn.Conv2d(5, 7, 3), n=4, on_indivisible="largest") is None
    for how in ("raise", "skip", "largest"):
        assert PHConv2d.like(depthwise, n=4, on_indivisible=how) is None
        assert PHConv2d.from_trained(depthwise, n=4, on_indivisible=how) is None
    with pytest.raises(TypeError, match=r"PHConv2d replaces nn\.Conv2d, got Linear"):
        PHConv2d.like(nn.Linear(4, 4))


def test_arguments_that_cannot_work_are_refused_before_any_work():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        PHLinear(4, 4, n=0)
    with pytest.raises(ValueError, match="out_features must be a multiple of n = 4, got 10; the nearest is 8 or 12"):
        PHLinear(8, 10, n=4)
    with pytest.raises(ValueError, match=r"n \* groups = 4 \* 2, got 12"):
        PHConv2d(8, 12, 3, groups=2, n=4)
    with pytest.raises(ValueError, match=r"algebra must be .* for n = 4, got 'octonion'"):
        PHLinear(8, 8, n=4, algebra="octonion")
    with pytest.raises(ValueError, match="algebra must be"):
        PHLinear(8, 8, n=4, algebra=torch.ones(4, 2, 2))
    with pytest.raises(ValueError, match="terms must lie in 1 to"):
        PHLinear(8, 8, n=2, terms=5)
    with pytest.raises(ValueError, match="rank must lie in 1 to 2"):
        PHLinear(8, 8, n=4, rank=3)
    with pytest.raises(ValueError, match=r"x must be \(batch, 8, 2 spatial"):
        PHConv2d(8, 8, 3)(torch.zeros(1, 4, 5, 5))
    with pytest.raises(ValueError, match="8 features"):
        PHLinear(8, 8)(torch.zeros(1, 4))


def test_swap_divides_the_parameters_of_any_network_by_n():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, 8))
    report = swap(
        model,
        {
            nn.Conv2d: partial(PHConv2d.like, n=4, on_indivisible="skip"),
            nn.Linear: partial(PHLinear.from_trained, n=4),
        },
    )
    assert [each.name for each in report.replaced] == ["2", "4"]
    assert [each.name for each in report.skipped] == ["0"]
    assert sum(p.numel() for p in model[2].parameters()) == 9280 + 64
    assert model(torch.randn(2, 3, 5, 5)).shape == (2, 8)
    # Replacements are not replaced again.
    assert not swap(model, {nn.Linear: partial(PHLinear.like, n=4)}).replaced


@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("rank", [None, 4])
def test_few_rows_go_through_the_factors_to_the_same_answer_and_gradients(rows, rank):
    layer = PHLinear(512, 256, n=4, rank=rank)
    x = torch.randn(rows, 512, requires_grad=True)
    learnt = [x, *layer.parameters()]
    ours = torch.autograd.grad(layer(x).square().sum(), learnt)
    expected = torch.autograd.grad(functional.linear(x, layer.weight, layer.bias).square().sum(), learnt)
    for ours_of, expected_of in zip(ours, expected):
        torch.testing.assert_close(ours_of, expected_of, rtol=1e-3, atol=2e-3)


def test_small_products_of_rows_of_any_shape_keep_their_shape():
    layer = PHLinear(512, 256, n=4)
    assert layer(torch.randn(512)).shape == (256,)
    assert layer(torch.randn(0, 512)).shape == (0, 256)
    assert layer(torch.randn(2, 3, 512)).shape == (2, 3, 256)


class TestKeptWeight:
    """In eval() without gradients H is kept, and never a stale one."""

    @staticmethod
    def fresh():
        return PHConv2d(8, 8, 3, n=4).eval()

    def test_it_is_made_once(self):
        layer = self.fresh()
        with torch.no_grad():
            assert layer.weight is layer.weight
            with torch.inference_mode():
                assert layer.weight is layer.weight
        assert layer.weight.requires_grad

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.F.mul_(2),
            lambda layer: layer.A.mul_(2),
            lambda layer: layer.load_state_dict(PHConv2d(8, 8, 3, n=4).state_dict()),
            lambda layer: setattr(layer, "F", nn.Parameter(layer.F.clone() * 2)),
            lambda layer: setattr(layer.F, "data", layer.F.data * 2),
            lambda layer: nn.utils.vector_to_parameters(torch.randn(8 * 8 * 9 // 4 + 64 + 8), layer.parameters()),
            lambda layer: layer.double(),
            lambda layer: layer.bfloat16(),
        ],
        ids=["F", "A", "load", "replace", "data", "vector", "double", "bfloat16"],
    )
    def test_it_follows_every_change_of_a_factor(self, change):
        layer = self.fresh()
        with torch.no_grad():
            before = layer.weight
            for _ in range(2):
                change(layer)
                layer.train()
                expected = layer.weight
                layer.training = False  # unlike eval(), keeps hold of whatever was kept
                assert torch.equal(layer.weight, expected)
                assert layer.weight.dtype == layer.F.dtype
            assert not torch.equal(layer.weight, before) or layer.weight.dtype != before.dtype

    def test_a_change_shows_without_a_change_of_mode(self):
        layer = self.fresh()
        x = torch.randn(1, 8, 5, 5)
        with torch.no_grad():
            y = layer(x)
            layer.F.mul_(2)
            assert not torch.allclose(layer(x), y)

    def test_optimiser_steps_in_eval_mode_are_seen(self):
        layer = self.fresh()
        x = torch.randn(1, 8, 5, 5)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        with torch.no_grad():
            before = layer(x)
        layer(x).sum().backward()
        assert layer.F.grad is not None
        optimizer.step()
        with torch.no_grad():
            assert not torch.allclose(layer(x), before)

    def test_training_deepcopy_and_pickle_forget_it(self):
        layer = self.fresh()
        with torch.no_grad():
            kept = layer.weight
            assert set(layer.state_dict()) == {"A", "F", "bias"}
            for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert other._kept._tensor is None
                assert torch.equal(other.weight, kept)
                assert other.weight is not kept
            layer.train()
            assert layer._kept._tensor is None

    def test_a_weight_made_in_inference_mode_serves_input_gradients_later(self):
        layer = self.fresh().requires_grad_(False)
        with torch.inference_mode():
            layer(torch.randn(1, 8, 5, 5))
        x = torch.randn(1, 8, 5, 5, requires_grad=True)
        layer(x).sum().backward()
        assert x.grad is not None

    def test_functional_calls_and_vmap_do_not_leave_their_weights_behind(self):
        layer = self.fresh()
        x = torch.randn(1, 8, 5, 5)
        with torch.no_grad():
            own = layer(x)
            doubled = {name: 2 * value for name, value in layer.state_dict().items()}
            torch.testing.assert_close(torch.func.functional_call(layer, doubled, x), 4 * (own - 0) - 2 * self.b(layer))
            stacked = {name: torch.stack([value, 2 * value]) for name, value in layer.state_dict().items()}
            both = torch.func.vmap(lambda values: torch.func.functional_call(layer, values, x))(stacked)
            torch.testing.assert_close(both[0], own)
            torch.testing.assert_close(layer(x), own)
        gradient = torch.func.grad(lambda z: layer(z).sum())(x)
        assert gradient.shape == x.shape
        with torch.no_grad():
            torch.testing.assert_close(layer(x), own)

    @staticmethod
    def b(layer):
        return layer.bias.view(1, -1, 1, 1)


def test_under_autocast_the_weight_is_made_in_float32_and_rounded_once():
    layer = PHConv2d(16, 16, 3, n=4)
    x = torch.randn(2, 16, 6, 6)
    expected = functional.conv2d(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.dtype == torch.float32
        y = layer(x)
        y.float().sum().backward()
    assert torch.equal(y, expected)
    assert layer.A.grad.dtype == layer.F.grad.dtype == torch.float32
    layer.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer(x), expected)
    with torch.no_grad():
        assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("rank", [None, 2])
def test_weights_of_half_precision_layers_are_rounded_once(rank):
    layer = PHConv2d(16, 16, 3, n=4, rank=rank, dtype=torch.bfloat16)
    wide = copy.deepcopy(layer).double().weight
    assert layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight, wide.bfloat16(), rtol=2**-7, atol=1e-6)
    assert layer(torch.randn(1, 16, 5, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16
    low = PHConv2d(16, 16, 3, n=4, rank=2)
    with torch.autocast("cpu", torch.bfloat16):
        under = low.weight
    assert torch.equal(under, low.weight)


def test_state_dicts_go_round_also_with_a_fixed_algebra(tmp_path):
    first, second = (PHLinear(8, 8, n=4, algebra="quaternion") for _ in range(2))
    assert {name for name, _ in first.named_parameters()} == {"F", "bias"}
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 8)
    assert torch.equal(first(x), second(x))


def test_a_named_algebra_can_be_where_learning_starts():
    layer = PHLinear(8, 8, n=4, algebra="quaternion", learn_algebra=True)
    assert torch.equal(layer.A, algebra_tensor("quaternion"))
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.A.grad.any()


def test_attention_projections_are_hypercomplex_too():
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    attention.out_proj = PHLinear.from_trained(attention.out_proj, n=4, terms=16)
    x = torch.randn(2, 5, 16)
    expected = nn.MultiheadAttention(16, 4, batch_first=True)
    state = attention.state_dict()
    plain = {name: value for name, value in state.items() if not name.startswith("out_proj")}
    plain |= {f"out_proj.{name}": value for name, value in attention.out_proj.fold().state_dict().items()}
    expected.load_state_dict(plain)
    torch.testing.assert_close(attention(x, x, x)[0], expected(x, x, x)[0])


def test_gradients_reach_factors_and_input(rng):
    layer = PHConv2d(4, 4, 2, groups=2, n=2, share_algebra=False, rank=1, dtype=torch.float64)
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, generator=rng, requires_grad=True)
    names = list(dict(layer.named_parameters()))
    assert torch.autograd.gradcheck(
        lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values)), x), (x, *layer.parameters())
    )


@pytest.mark.compile
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_layers_compile_into_one_graph_and_export(mode):
    model = nn.Sequential(PHConv2d(8, 8, 3, n=4), nn.Flatten(), PHLinear(72, 8, n=4))
    model.train(mode == "train")
    x = torch.randn(2, 8, 5, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), model(x))
    with torch.no_grad():
        model(x)  # eval() keeps H from here on
        torch.testing.assert_close(compiled(x), model(x))
        model[0].F.mul_(2)
        torch.testing.assert_close(compiled(x), model(x))
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        y = torch.randn(7, 8, 5, 5)
        torch.testing.assert_close(program.module()(y), model(y))
