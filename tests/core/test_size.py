"""Against counts done by hand, and storages whose size is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lathe.core.size import flop_formula, measure, saved_bytes, saved_for_backward_bytes, stored_bytes


def test_a_linear_layer_costs_what_is_counted_by_hand():
    net = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    net[2].bias.requires_grad_(False)
    size = measure(net, torch.randn(7, 10), repeats=5)
    assert size.parameters == 10 * 20 + 20 + 20 * 5 + 5
    assert size.trainable == size.parameters - 5
    assert size.stored_bytes == 4 * size.parameters
    assert size.flops == 2 * 7 * (10 * 20 + 20 * 5)
    # The largest moment: both hidden activations at once.
    assert size.peak_bytes == 2 * 4 * 7 * 20
    assert 0 < size.latency < 1
    assert size.latency_spread >= 0
    assert size.uncounted == ()


def test_a_convolution_costs_what_is_counted_by_hand():
    size = measure(nn.Conv2d(3, 8, 3, bias=False), torch.randn(2, 3, 10, 10), repeats=1, warmup=0)
    assert size.flops == 2 * 2 * 8 * 8 * 8 * 3 * 9
    assert size.peak_bytes == 4 * 2 * 8 * 8 * 8


def test_peak_memory_of_a_deep_network_does_not_grow_with_depth():
    peaks = [measure(nn.Sequential(*[nn.Tanh()] * depth), torch.randn(1000), repeats=1).peak_bytes for depth in (2, 20)]
    assert peaks == [8000, 8000]


def test_attention_counts_its_matrix_products_also_where_torch_has_a_fused_path():
    net = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    projections, products = 2 * 2 * 5 * 8 * 8 * 4, 2 * 2 * 5 * 5 * 8 * 2
    assert measure(net, (x, x, x), repeats=1).flops == projections + products


def test_a_fourier_transform_counts_five_n_log_n():
    class Transform(nn.Module):
        def forward(self, x):
            return torch.fft.irfft(torch.fft.rfft(x), n=x.shape[-1]) + torch.fft.fft2(x).real

    assert measure(Transform(), torch.randn(4, 16), repeats=1).flops == 2 * 64 * 4 * 5 // 2 + 5 * 64 * 6


def test_custom_operators_are_counted_by_their_formula_or_named():
    @torch.library.custom_op("lathe_test::outer", mutates_args=())
    def outer(x: torch.Tensor) -> torch.Tensor:
        return x[:, None] * x[None]

    class Net(nn.Module):
        def forward(self, x):
            return torch.ops.lathe_test.outer(x)

    before = measure(Net(), torch.randn(5), repeats=1)
    assert (before.flops, before.uncounted) == (0, ("lathe_test.outer",))
    assert "without lathe_test.outer" in str(before)

    @flop_formula(torch.ops.lathe_test.outer)
    def _(shape, *, out_shape, **_) -> int:
        return shape[0] ** 2

    after = measure(Net(), torch.randn(5), repeats=1)
    assert (after.flops, after.uncounted) == (25, ())
    with pytest.raises(ValueError, match="formula already"):
        flop_formula(torch.ops.lathe_test.outer)
    with pytest.raises(ValueError, match="formula already"):
        flop_formula(torch.ops.aten.mm)
    with pytest.raises(TypeError, match="operators must be"):
        flop_formula(torch.mm)


def test_shared_parameters_and_views_count_once():
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    net[1].weight = net[0].weight
    assert stored_bytes(net) == 160
    assert measure(net, torch.zeros(1, dtype=torch.long), repeats=1).parameters == 40
    whole = torch.zeros(100)
    net = nn.Module()
    net.register_buffer("part", whole[:50])
    assert stored_bytes(net) == 200  # what is stored is the view, not the storage behind it
    net.register_buffer("whole", whole)
    net.register_buffer("wide", whole[:1].expand(1000))
    assert stored_bytes(net) == 400


def test_buffers_count_if_they_are_stored():
    net = nn.BatchNorm1d(3)
    assert stored_bytes(net) == 4 * 3 * 4 + 8
    net.register_buffer("cache", torch.zeros(1000), persistent=False)
    assert stored_bytes(net) == 4 * 3 * 4 + 8


def test_a_packed_layer_counts_itself_once():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(100, 100)

        def stored_bytes(self) -> int:
            return 7

    packed = Packed()
    assert stored_bytes(nn.Sequential(packed, packed, nn.Linear(1, 1))) == 7 + 8
    assert stored_bytes(packed) == 7


def test_half_precision_sparse_and_quantised_tensors_count_as_stored():
    assert stored_bytes(nn.Linear(4, 4).bfloat16()) == 2 * 20
    net = nn.Module()
    net.register_buffer("sparse", torch.eye(10).to_sparse())
    assert stored_bytes(net) == 10 * (2 * 8 + 4)
    net = nn.Module()
    net.register_buffer("quantised", torch.quantize_per_tensor(torch.randn(10, 10), 0.1, 0, torch.qint8))
    assert stored_bytes(net) == 100


def test_the_weights_that_torch_packs_out_of_sight_are_counted():
    quantized = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    if torch.backends.quantized.engine == "none":
        pytest.skip("this build of torch has no quantised kernels")
    assert stored_bytes(quantized.Linear(100, 10)) == 1000 + 40


def test_saved_memory_is_that_of_the_tensors_kept_for_the_backward():
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: x.exp()) == 400
    assert saved_bytes(lambda: x * x) == 400  # one storage, saved twice
    assert saved_bytes(lambda: x + 1) == 0
    assert saved_bytes(lambda: x.exp().sin()) == 400  # the output of exp is the input of sin
    assert saved_bytes(lambda: x.sin().exp()) == 800
    assert saved_bytes(lambda: x * x, without=[x]) == 0
    with torch.no_grad():
        assert saved_bytes(lambda: x.exp()) == 400


def test_saved_memory_of_a_network_leaves_out_its_parameters():
    net = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 5))
    assert saved_for_backward_bytes(net, torch.randn(7, 10)) == 4 * 7 * (10 + 20)


def test_measuring_leaves_the_network_as_it_was():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    net[1].eval()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    measure(net, torch.randn(3, 4), repeats=2)
    assert [part.training for part in (net, *net)] == [True, True, False, True]
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_keyword_examples_and_other_batch_sizes():
    class Two(nn.Module):
        def forward(self, left, *, right):
            return left @ right.mT

    example = {"left": torch.randn(1, 3, 4), "right": torch.randn(1, 5, 4)}
    assert measure(Two(), example, repeats=1).flops == 2 * 3 * 4 * 5
    assert measure(Two(), example, repeats=1, batch=6).flops == 6 * 2 * 3 * 4 * 5


def test_the_size_reads_well():
    text = str(measure(nn.Linear(1000, 100), torch.randn(8, 1000), repeats=3))
    assert "100,100 (100,100 trainable)" in text
    assert "391 KiB" in text
    assert "1.6 MFLOP" in text
    assert "3 runs, cpu, 1 thread" in text


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="model"):
        measure("net", torch.zeros(1))
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        measure(nn.ReLU(), torch.zeros(1), repeats=0)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        measure(nn.ReLU(), torch.zeros(1), batch=0)


def test_a_view_of_a_parameter_may_go_into_a_module():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.question, self.layer = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

        def forward(self, x):
            return x @ self.layer(self.question.expand(2, -1)).mT

    assert measure(Asks(), torch.randn(5, 3), repeats=1).flops == 2 * (2 * 4 * 3 + 5 * 3 * 2)
