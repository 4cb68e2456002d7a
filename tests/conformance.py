"""What every layer of Lathe must do, whatever it computes; a layer's own tests need not say it again.

check_layer(lambda: PHLinear(8, 4, n=2), torch.randn(3, 8), wrong_inputs=[torch.randn(3, 7)])
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

__all__ = ["check_compiles", "check_layer"]


def check_layer(
    make_layer: Callable[[], nn.Module],
    example_input: Tensor,
    *,
    wrong_inputs: Sequence[Tensor] = (),
    training: Sequence[bool] = (True, False),
    empty_batch: Sequence[bool] | None = None,
    gradcheck: bool = True,
    gradcheck_input: Tensor | None = None,
    export: bool = True,
    bfloat16_tolerance: float = 0.05,
) -> None:
    """Runs all checks on the layers that `make_layer` makes, on CPU.

    Args:
        make_layer: makes a fresh float32 layer; it may draw from torch's global generator.
        example_input: float32, the batch first.
        wrong_inputs: each must be refused with a ValueError that names its shape (asked with jaxtyping's checks off,
            which would refuse first).
        training: the modes that the layer has.
        empty_batch: the modes in which a batch of no samples must give a result of no samples; by default evaluation
            only, since batch statistics of nothing do not exist. In training it must do the same or raise a ValueError.
        gradcheck: compare the gradients of input and parameters with finite differences, in float64.
        gradcheck_input: a smaller input for that, away from kinks.
        export: whether `torch.export` must take the layer.
        bfloat16_tolerance: allowed error of a bfloat16 forward, relative to the largest output.
    """
    for mode in training:
        _check_state_dict(make_layer, example_input, mode)
        _check_copies(make_layer, example_input, mode)
        _check_dtypes(make_layer, example_input, mode, bfloat16_tolerance)
        _check_same_seed_same_result(make_layer, example_input, mode)
        _check_wrong_shapes(make_layer, wrong_inputs, mode)
        _check_empty_batch(make_layer, example_input, mode, must_run=mode in (empty_batch or (False,)))
        if gradcheck:
            _check_gradients(make_layer, example_input if gradcheck_input is None else gradcheck_input, mode)
    _check_meta(make_layer, example_input)
    if export:
        _check_export(make_layer, example_input)


def check_compiles(make_layer: Callable[[], nn.Module], example_input: Tensor, *, tolerance: float = 1e-4) -> None:
    """`torch.compile(fullgraph=True)` takes forward and backward in both modes, and gives the same numbers."""
    for mode in (True, False):
        layer = _made(make_layer, mode)
        twin = copy.deepcopy(layer)
        compiled = torch.compile(twin, fullgraph=True)
        left, right = (example_input.clone().requires_grad_() for _ in range(2))
        torch.manual_seed(1)
        expected = layer(left)
        torch.manual_seed(1)
        found = compiled(right)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        seed = torch.randn_like(expected)
        (expected * seed).sum().backward()
        (found * seed).sum().backward()
        torch.testing.assert_close(right.grad, left.grad, rtol=tolerance, atol=tolerance)
        for (name, one), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(
                other.grad, one.grad, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )
        for one, other in zip(layer.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)


def _made(make_layer: Callable[[], nn.Module], training: bool, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layer = make_layer()
    for module in layer.modules():
        assert module.training, f"{type(module).__name__} must be made in training mode"
    layer.train(training)
    with torch.no_grad():  # away from starts that are zero or one, where a mistake does not show
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def _same(result: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        result, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what} differs: {text}"
    )


def _forward(layer: nn.Module, x: Tensor, seed: int = 2) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        result = layer(x)
    assert isinstance(result, Tensor), f"a layer must return one tensor, got {type(result).__name__}"
    assert torch.isfinite(result).all(), "the result must be finite"
    return result


def _check_state_dict(make_layer: Callable[[], nn.Module], x: Tensor, mode: bool) -> None:
    layer = _made(make_layer, mode)
    _forward(layer, x)  # so that running statistics are not those of the start
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    other = _made(make_layer, mode, seed=5)
    _forward(other, x)  # so that anything remembered from old weights would show
    problems = other.load_state_dict(torch.load(saved, weights_only=True))
    assert not problems.missing_keys
    assert not problems.unexpected_keys
    assert {key: value.shape for key, value in other.state_dict().items()} == {
        key: value.shape for key, value in layer.state_dict().items()
    }
    _same(_forward(other, x), _forward(layer, x), "the result after a state_dict round trip")


def _check_copies(make_layer: Callable[[], nn.Module], x: Tensor, mode: bool) -> None:
    layer = _made(make_layer, mode)
    _forward(layer, x)
    copies = {"deepcopy": copy.deepcopy(layer), "pickle": pickle.loads(pickle.dumps(layer))}
    expected = _forward(copy.deepcopy(layer), x)
    held = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}
    for name, other in copies.items():
        assert type(other) is type(layer)
        assert other.training is mode, f"{name} changed the mode"
        _same(_forward(other, x), expected, f"the result of the {name}")
        for tensor in (*other.parameters(), *other.buffers()):
            assert tensor.numel() == 0 or tensor.untyped_storage().data_ptr() not in held, f"{name} shares memory"


def _check_dtypes(make_layer: Callable[[], nn.Module], x: Tensor, mode: bool, tolerance: float) -> None:
    exact = _forward(_made(make_layer, mode).double(), x.double())
    assert exact.dtype == torch.float64, f"a float64 layer gave {exact.dtype}"
    single = _forward(_made(make_layer, mode), x)
    assert single.dtype == torch.float32, f"a float32 layer gave {single.dtype}"
    scale = exact.abs().max().clamp(min=1e-6)
    error = float((single.double() - exact).abs().max() / scale)
    assert error < 1e-4, f"float32 is {error:.1e} from float64"
    half = _forward(_made(make_layer, mode).bfloat16(), x.bfloat16())
    assert half.dtype == torch.bfloat16, f"a bfloat16 layer gave {half.dtype}"
    error = float((half.double() - exact).abs().max() / scale)
    assert error < tolerance, f"bfloat16 is {error:.2f} of the largest output from float64"
    back = _made(make_layer, mode).double().float()
    _same(_forward(back, x), single, "the result after a move to float64 and back")


def _check_same_seed_same_result(make_layer: Callable[[], nn.Module], x: Tensor, mode: bool) -> None:
    first, second = _made(make_layer, mode), _made(make_layer, mode)
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        _same(other, one, f"{name}, made twice under one seed,")
    _same(_forward(second, x), _forward(first, x), "the result under one seed")


def _check_wrong_shapes(make_layer: Callable[[], nn.Module], wrong_inputs: Sequence[Tensor], mode: bool) -> None:
    layer = _made(make_layer, mode)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    for wrong in wrong_inputs:
        shape = tuple(wrong.shape)
        checks_off = jaxtyping.config.jaxtyping_disable
        jaxtyping.config.update("jaxtyping_disable", True)
        try:
            with pytest.raises(ValueError) as caught:
                layer(wrong)
        finally:
            jaxtyping.config.update("jaxtyping_disable", checks_off)
        said = str(caught.value)
        assert str(shape) in said or str(list(shape)) in said, (
            f"the error for {shape} does not name the shape: {said!r}"
        )
    for name, value in layer.state_dict().items():
        _same(value, state[name], f"{name} after a refused input")


def _check_empty_batch(make_layer: Callable[[], nn.Module], x: Tensor, mode: bool, must_run: bool) -> None:
    layer = _made(make_layer, mode)
    expected = (0, *_forward(layer, x).shape[1:])
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    empty = x[:0].clone().requires_grad_()
    try:
        result = layer(empty)
    except ValueError as error:
        assert not must_run, f"an empty batch must give an empty result, got {error!r}"
        return
    assert tuple(result.shape) == expected, f"an empty batch gave {tuple(result.shape)}, expected {expected}"
    result.sum().backward()
    assert empty.grad is not None
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), f"{name}: gradient of an empty batch"
    for name, value in layer.state_dict().items():
        assert torch.isfinite(value).all(), f"{name} is not finite after an empty batch"
        if not mode:
            _same(value, state[name], f"{name} after an empty batch in evaluation mode")


def _check_gradients(make_layer: Callable[[], nn.Module], x: Tensor, mode: bool) -> None:
    layer = _made(make_layer, mode).double()
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    values = [layer.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        torch.manual_seed(2)
        state: dict[str, Any] = {**dict(zip(names, parameters)), **{name: b.clone() for name, b in buffers.items()}}
        return torch.func.functional_call(layer, state, (x,))

    assert torch.autograd.gradcheck(function, (x.double().requires_grad_(), *values), fast_mode=True, atol=1e-4)


def _check_meta(make_layer: Callable[[], nn.Module], x: Tensor) -> None:
    layer = _made(make_layer, False)
    expected = _forward(layer, x)
    state = layer.state_dict()
    on_meta = copy.deepcopy(layer).to("meta")
    result = on_meta(x.to("meta"))
    assert result.device.type == "meta"
    assert result.shape == expected.shape
    back = on_meta.to_empty(device="cpu")
    back.load_state_dict(state)
    _same(_forward(back, x), expected, "the result after the way over the meta device")
    with torch.device("meta"):
        made = make_layer()
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        assert tensor.is_meta, f"{name} does not go to the default device"


def _check_export(make_layer: Callable[[], nn.Module], x: Tensor) -> None:
    layer = _made(make_layer, False)
    expected = _forward(copy.deepcopy(layer), x)
    program = torch.export.export(layer, (x,))
    _same_or_near(program.module()(x), expected)


def _same_or_near(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
