"""The six layers against timm, closed forms, limits, identities, gradcheck, and replicas that share their batch."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import pickle
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lathe.nn import evonorm
from lathe.nn.evonorm import EvoNormB0, EvoNormB1, EvoNormB2, EvoNormS0, EvoNormS1, EvoNormS2

BATCH = [EvoNormB0, EvoNormB1, EvoNormB2]
SAMPLE = [EvoNormS0, EvoNormS1, EvoNormS2]
ALL = BATCH + SAMPLE

pytestmark = pytest.mark.filterwarnings("ignore:.*normalises over groups of")


def scrambled(layer: nn.Module, rng: torch.Generator) -> nn.Module:
    """The layer with parameters that are nobody's start."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng, dtype=torch.float64) * 0.5 + 0.7)
    return layer


def uniform_between(low: float, high: float, *shape: int, rng: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(*shape, generator=rng, dtype=torch.float64)


@pytest.fixture(scope="module")
def timm() -> ModuleType:
    """timm's file of these layers, without the rest of timm (which wants torchvision)."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        pytest.skip("timm is not installed")
    for name, folder in (("timm", Path(spec.origin).parent), ("timm.layers", Path(spec.origin).parent / "layers")):
        bare = ModuleType(name)
        bare.__path__ = [str(folder)]
        sys.modules[name] = bare
    try:
        return importlib.import_module("timm.layers.evo_norm")
    finally:
        for name in [name for name in sys.modules if name == "timm" or name.startswith("timm.")]:
            del sys.modules[name]


@pytest.mark.parametrize("name", ["B0", "B1", "B2", "S0", "S1", "S2"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_timm_in_value_gradient_and_running_variance(timm, name, memory_format, rng):
    x = (torch.randn(6, 64, 7, 5, generator=rng) * 2 + 0.3).contiguous(memory_format=memory_format)
    theirs = scrambled(getattr(timm, f"EvoNorm2d{name}")(64, eps=1e-5), rng)
    ours = getattr(evonorm, f"EvoNorm{name}")(64)
    ours.load_state_dict(theirs.state_dict())
    grad = torch.randn(x.shape, generator=rng)
    results = []
    for layer in (ours, theirs):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(leaf)
        y.backward(grad)
        results.append([y, leaf.grad, *(parameter.grad for _, parameter in sorted(layer.named_parameters()))])
    for mine, other in zip(*results):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)
    if name.startswith("B"):
        n = x.numel() / 64
        old = 0.9 * torch.ones(64)
        torch.testing.assert_close((ours.running_var - old) * n / (n - 1), theirs.running_var - old, atol=1e-5, rtol=0)
        unbiased = getattr(evonorm, f"EvoNorm{name}")(64, unbiased_running_var=True)
        unbiased(x)
        torch.testing.assert_close(unbiased.running_var, theirs.running_var, atol=1e-5, rtol=0)


def test_timm_linear_variants_divide_by_the_group(timm, rng):
    x = torch.randn(3, 32, 6, 6, generator=rng)
    for name in ("S0", "S1", "S2"):
        theirs = scrambled(getattr(timm, f"EvoNorm2d{name}a")(32, groups=8, apply_act=False, eps=1e-5), rng)
        ours = getattr(evonorm, f"EvoNorm{name}")(32, groups=8, nonlinear=False, linear="group")
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)


def test_b0_without_slope_divides_by_the_larger_deviation(rng):
    x = torch.randn(4, 3, 5, 6, generator=rng, dtype=torch.float64)
    layer = EvoNormB0(3, dtype=torch.float64)
    nn.init.zeros_(layer.v)
    by_batch = torch.stack([x[:, c].var(correction=0) for c in range(3)]).view(1, 3, 1, 1)
    by_instance = torch.stack([torch.stack([x[b, c].var(correction=0) for c in range(3)]) for b in range(4)])
    expected = x / torch.maximum(by_batch, by_instance[:, :, None, None]).add(1e-5).sqrt()
    torch.testing.assert_close(layer(x), expected, atol=1e-10, rtol=0)


def test_b0_saturates_at_one_over_v(rng):
    x = torch.rand(4, 3, 5, 6, generator=rng, dtype=torch.float64) + 0.5
    layer = EvoNormB0(3, dtype=torch.float64)
    nn.init.constant_(layer.v, 1e9)
    torch.testing.assert_close(layer(x), torch.full_like(x, 1e-9), atol=1e-17, rtol=0)


def test_b0_on_single_positions_has_an_instance_deviation_of_sqrt_eps(rng):
    x = torch.randn(16, 3, 1, 1, generator=rng, dtype=torch.float64)
    layer = scrambled(EvoNormB0(3, eps=1e-30, dtype=torch.float64), rng)
    floor = x.var((0, 2, 3), correction=0, keepdim=True).sqrt()
    weight, bias, v = (p.view(1, 3, 1, 1) for p in (layer.weight, layer.bias, layer.v))
    torch.testing.assert_close(layer(x), weight * x / torch.maximum(floor, v * x) + bias, atol=1e-10, rtol=0)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_s1_is_silu_over_the_deviation_inside_group_norm(groups, rng):
    x = torch.randn(3, 8, 4, 5, generator=rng, dtype=torch.float64) + 0.4
    y = EvoNormS1(8, groups=groups, dtype=torch.float64)(x)
    deviation = F.silu(x) / y
    mean = x.unflatten(1, (groups, -1)).mean((2, 3, 4)).repeat_interleave(8 // groups, 1)[:, :, None, None]
    torch.testing.assert_close(deviation * F.group_norm(x, groups) + mean, x, atol=1e-10, rtol=0)


@pytest.mark.parametrize("layer", [EvoNormB0, EvoNormB2])
@given(exponent=st.floats(-3, 3))
@settings(max_examples=10, deadline=None)
def test_b0_and_b2_ignore_the_scale_of_their_input(layer, exponent):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(4, 5, 3, 3, generator=rng, dtype=torch.float64)
    module = scrambled(layer(5, eps=1e-30, dtype=torch.float64), rng)
    torch.testing.assert_close(module(x * 10**exponent), module(x), atol=1e-12, rtol=0)


def test_s_layers_tend_to_a_step_and_to_half_the_linear_map(rng):
    x = torch.randn(2, 8, 4, 4, generator=rng, dtype=torch.float64)
    for layer in SAMPLE:
        module = layer(8, groups=2, eps=1e-30, dtype=torch.float64)
        blocks = x.unflatten(1, (2, 4))
        scale = (blocks if layer is EvoNormS2 else blocks - blocks.mean((2, 3, 4), keepdim=True)).square()
        normalized = (blocks / scale.mean((2, 3, 4), keepdim=True).sqrt()).flatten(1, 2)
        torch.testing.assert_close(module(x * 1e9), normalized * (x > 0), atol=1e-6, rtol=0)
        torch.testing.assert_close(module(x * 1e-9), normalized / 2, atol=1e-6, rtol=0)


def test_b1_tends_to_the_larger_scale_alone(rng):
    x = torch.randn(4, 5, 3, 3, generator=rng, dtype=torch.float64)
    floor, instance = x.var((0, 2, 3), correction=0, keepdim=True), x.square().mean((2, 3), keepdim=True)
    y = EvoNormB1(5, eps=1e-30, dtype=torch.float64)(x * 1e-9)
    torch.testing.assert_close(y, x / torch.maximum(floor, instance).sqrt(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", SAMPLE)
def test_s_layers_do_not_see_the_batch(layer, rng):
    x = torch.randn(5, 12, 3, 4, generator=rng, dtype=torch.float64)
    module = scrambled(layer(12, groups=3, dtype=torch.float64), rng)
    whole = module(x)
    for i in range(5):
        torch.testing.assert_close(whole[i : i + 1], module(x[i : i + 1]), atol=1e-12, rtol=0)
    assert torch.equal(module.train()(x), module.eval()(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", ALL)
def test_backward_passes_gradcheck(layer, training, rng):
    x = torch.randn(3, 4, 3, 2, generator=rng, dtype=torch.float64) * 1.5
    module = scrambled(layer(4, **({"groups": 2} if layer in SAMPLE else {}), dtype=torch.float64), rng).train(training)
    names = [name for name, _ in module.named_parameters()]

    def function(leaf, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters)), (leaf,))

    # A fixed input away from ties of the max: the smallest gap is far above gradcheck's step.
    leaves = [x, *(parameter.detach().clone() for parameter in module.parameters())]
    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves], eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"nonlinear": False, "linear": "group"}, {"nonlinear": False}])
def test_linear_variants_pass_gradcheck(options, rng):
    x = torch.randn(2, 4, 3, generator=rng, dtype=torch.float64)
    module = scrambled(EvoNormS2(4, groups=2, dtype=torch.float64, **options), rng)
    assert torch.autograd.gradcheck(module, x.requires_grad_(), eps=1e-6, atol=1e-6)


def test_backward_in_tiles_equals_backward_as_a_whole(rng, monkeypatch):
    from lathe.nn.evonorm import kernels

    x = torch.randn(7, 6, 4, 4, generator=rng, dtype=torch.float64)
    for layer in ALL:
        module = scrambled(layer(6, **({"groups": 3} if layer in SAMPLE else {}), dtype=torch.float64), rng)
        gradients = []
        for tile in (1, 200, 2**20):
            monkeypatch.setattr(kernels, "_TILE", tile)
            leaf = x.clone().requires_grad_()
            gradients.append(torch.autograd.grad(module(leaf).sin().sum(), [leaf, *module.parameters()]))
        for tiled in gradients[:2]:
            for a, b in zip(tiled, gradients[2]):
                torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("layer", ALL)
def test_a_second_derivative_is_refused_and_never_wrong(layer, rng):
    x = torch.randn(2, 4, 3, 3, generator=rng, requires_grad=True)
    y = layer(4)(x).square().sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(y, x, create_graph=True)
    torch.autograd.grad(y, x)


@pytest.mark.parametrize("layer", BATCH)
def test_evaluation_after_one_full_batch_equals_training(layer, rng):
    x = torch.randn(32, 5, 4, 4, generator=rng)
    module = scrambled(layer(5, momentum=1.0), rng)
    trained = module.train()(x)
    torch.testing.assert_close(module.eval()(x), trained, atol=1e-6, rtol=1e-6)


@given(
    batch=st.integers(1, 4),
    channels=st.integers(1, 12),
    spatial=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    index=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_any_rank_keeps_its_shape_and_stays_finite(batch, channels, spatial, index):
    layer = ALL[index]
    positions = int(torch.tensor(spatial).prod()) if spatial else 1
    x = torch.randn(batch, channels, *spatial, generator=torch.Generator().manual_seed(0))
    module = layer(channels, **({"groups": 1} if layer in SAMPLE else {}))
    too_few = channels * positions < 2 if layer in SAMPLE else not spatial or batch * positions < 2
    if too_few:
        with pytest.raises(ValueError, match=r"value|spatial"):
            module(x)
        return
    y = module(x)
    assert y.shape == x.shape and bool(y.isfinite().all())
    flat = module(x.flatten(2)) if spatial else y
    torch.testing.assert_close(flat.reshape(x.shape), y)


@pytest.mark.parametrize("layer", ALL)
@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_constant_input_stays_finite_forward_and_backward(layer, constant):
    x = torch.full((2, 4, 3, 3), constant, requires_grad=True)
    y = layer(4)(x)
    y.sum().backward()
    assert bool(y.isfinite().all()) and bool(x.grad.isfinite().all())


@pytest.mark.parametrize("layer", ALL)
def test_a_large_mean_does_not_cancel_the_variance(layer, rng):
    x = torch.randn(4, 8, 6, 6, generator=rng, dtype=torch.float64) + 1000
    module = layer(8)
    torch.testing.assert_close(module(x.float()).double(), layer(8, dtype=torch.float64)(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", ALL)
def test_half_precision_input_is_computed_in_float32(layer, dtype, rng):
    x = (torch.randn(4, 8, 6, 6, generator=rng) * 30).to(dtype)
    module = scrambled(layer(8), rng)
    leaf, wide = x.clone().requires_grad_(), x.float().requires_grad_()
    y, reference = module(leaf), module(wide)
    assert y.dtype == dtype
    assert torch.equal(y, reference.to(dtype))
    grad = torch.ones_like(y)
    y.backward(grad)
    reference.backward(grad.float())
    torch.testing.assert_close(leaf.grad.float(), wide.grad, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("layer", ALL)
def test_half_precision_parameters_train(layer, rng):
    module = layer(8, dtype=torch.bfloat16)
    module(torch.randn(4, 8, 3, 3, generator=rng).bfloat16()).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in module.parameters())


def test_saves_only_the_input_for_the_backward_pass(rng):
    x = torch.randn(4, 32, 16, 16, generator=rng, requires_grad=True)
    for layer in ALL:
        saved: dict[int, int] = {}

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(32)(x)
        assert sum(saved.values()) < 1.1 * x.numel() * 4


@pytest.mark.parametrize("layer", ALL)
def test_channels_last_comes_back_channels_last(layer, rng):
    x = torch.randn(2, 8, 5, 6, generator=rng).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(8)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, layer(8)(x.contiguous()))


@pytest.mark.parametrize("layer", ALL)
def test_copies_pickles_and_state_dicts_are_whole(layer, rng):
    x = torch.randn(2, 8, 5, 6, generator=rng)
    module = scrambled(layer(8, zero_init=True), rng)
    module(x)
    module.eval()
    fresh = layer(8).eval()
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        assert torch.equal(other(x), module(x))
    assert not layer(8, zero_init=True)(x).any()


@pytest.mark.compile
@pytest.mark.parametrize("layer", ALL)
def test_compiles_as_one_graph(layer, rng):
    x = torch.randn(4, 8, 5, 6, generator=rng)
    module, leaf, other = scrambled(layer(8), rng), x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = module(leaf)
    expected.sin().sum().backward()
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    y = compiled(other)
    y.sin().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(other.grad, leaf.grad, atol=1e-5, rtol=1e-4)
    for parameter, gradient in zip(module.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.compile
def test_exports(rng):
    x = torch.randn(4, 8, 5, 6, generator=rng)
    for layer in ALL:
        module = layer(8).eval()
        exported = torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}})
        torch.testing.assert_close(exported.module()(x[:3]), module(x[:3]))


def _replica(rank: int, file: str, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # Replicas of unequal size: the batch's moments must be weighted.
    mine = (x[:4] if rank == 0 else x[4:]).clone().requires_grad_()
    for layer in BATCH:
        module = layer(4, sync=True, dtype=torch.float64)
        y = module(mine)
        gradients = torch.autograd.grad(y.sin().sum(), [mine, *module.parameters()])
        queue.put((layer.__name__, rank, [t.detach().numpy() for t in (y, module.running_var, *gradients)]))
    dist.barrier()
    dist.destroy_process_group()


def test_synchronised_replicas_equal_one_large_batch(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_replica, args=(rank, str(tmp_path / "group"), queue)) for rank in range(2)]
    for worker in workers:
        worker.start()
    answers = [queue.get(timeout=60) for _ in range(6)]
    for worker in workers:
        worker.join(60)
    found = {(name, rank): [torch.from_numpy(t) for t in tensors] for name, rank, tensors in answers}
    x = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    for layer in BATCH:
        module = layer(4, dtype=torch.float64)
        y = module(x)
        gradients = torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])
        first, second = found[layer.__name__, 0], found[layer.__name__, 1]
        torch.testing.assert_close(torch.cat([first[0], second[0]]), y)
        torch.testing.assert_close(first[1], module.running_var)
        torch.testing.assert_close(second[1], module.running_var)
        torch.testing.assert_close(torch.cat([first[2], second[2]]), gradients[0])
        for mine, other, joint in zip(first[3:], second[3:], gradients[1:]):
            torch.testing.assert_close(mine + other, joint)


@pytest.mark.parametrize(
    ("norm", "channels"),
    [
        (nn.BatchNorm1d(6), 6),
        (nn.BatchNorm2d(6, affine=False), 6),
        (nn.BatchNorm3d(6), 6),
        (nn.SyncBatchNorm(6), 6),
        (nn.InstanceNorm2d(6), 6),
        (nn.GroupNorm(3, 6), 6),
        (nn.LayerNorm(6), 6),
        (nn.LayerNorm([6, 4, 4]), 6),
    ],
)
def test_like_takes_the_channels_of_any_normalisation(norm, channels):
    norm = norm.double()
    norm.eps = 0.25
    layer = EvoNormS0.like(norm, groups=2)
    assert layer.num_features == channels and layer.groups == 2 and layer.eps == 1e-5
    if norm.weight is not None:
        assert layer.weight.dtype == torch.float64
    assert EvoNormB0.like(norm, keep_eps=True).eps == 0.25


def test_from_trained_starts_nearer_than_a_fresh_layer(rng):
    norm = nn.BatchNorm2d(6).eval()
    with torch.no_grad():
        norm.running_mean.copy_(torch.randn(6, generator=rng) * 0.3)
        norm.running_var.copy_(torch.rand(6, generator=rng) + 0.5)
        norm.weight.copy_(torch.rand(6, generator=rng) + 0.5)
        norm.bias.copy_(torch.randn(6, generator=rng) * 0.3)
    relu = nn.ReLU()
    x = torch.randn(64, 6, 8, 8, generator=rng) * norm.running_var.sqrt().view(1, 6, 1, 1) + norm.running_mean.view(
        1, 6, 1, 1
    )
    target = relu(norm(x))
    for layer in ALL:
        options = {"groups": 3} if layer in SAMPLE else {}
        fitted = layer.from_trained(norm, relu, generator=rng, **options).eval()
        seen = layer.from_trained(norm, relu, inputs=x, **options).eval()
        fresh = layer(6, **options).eval()
        errors = [(module(x) - target).square().mean().item() for module in (seen, fitted, fresh)]
        assert errors[0] <= errors[1] * 1.001 and errors[1] < 0.8 * errors[2]
        assert errors[1] < 0.6 * target.var().item()
    assert not norm.training


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"num_features must be at least 1, got 0"):
        EvoNormS0(0)
    with pytest.raises(ValueError, match=r"eps must be above 0, got 0"):
        EvoNormB0(4, eps=0.0)
    with pytest.raises(ValueError, match=r"momentum"):
        EvoNormB0(4, momentum=1.5)
    with pytest.raises(ValueError, match=r"groups must divide num_features = 48"):
        EvoNormS0(48, strict_groups=True)
    with pytest.raises(ValueError, match=r"groups must divide num_features = 4 "):
        EvoNormS0(4, groups=32, strict_groups=True)
    with pytest.raises(ValueError, match=r"group_size must divide num_features = 48, got 5"):
        EvoNormS0(48, group_size=5)
    with pytest.raises(TypeError, match=r"norm must be .* got Conv2d"):
        EvoNormB0.like(nn.Conv2d(3, 3, 1))
    assert EvoNormS0(48).groups == 24 and EvoNormS0(4).groups == 4 and EvoNormS0(48, group_size=8).groups == 6


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"x must have 4 channels, got 3"):
        EvoNormS0(4)(torch.zeros(2, 3, 5, 5))
    with pytest.raises(ValueError, match=r"1 value a group"):
        EvoNormS0(4)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"more than one value per channel"):
        EvoNormB0(4)(torch.zeros(1, 4, 1, 1))
    with pytest.raises((ValueError, TypeError)):
        EvoNormS0(4)(torch.zeros(4))
    with pytest.raises(TypeError):
        EvoNormS0(4)(torch.zeros(2, 4, 3, dtype=torch.int64))
    with pytest.warns(UserWarning, match=r"groups of 4 values only"):
        EvoNormS0(8, groups=8)(torch.randn(2, 8, 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EvoNormS0(8, groups=2)(torch.randn(2, 8, 2, 2))
