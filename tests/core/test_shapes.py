"""A layer built from another's arguments fits where the other stood."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lathe.core.shapes import conv_arguments, linear_arguments


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from([nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d]),
    groups=st.sampled_from([1, 2]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_convolution_of_the_same_arguments_takes_the_same_weights(kind, groups, kernel, stride, padding, bias, dtype):
    conv = kind(4, 6, kernel, stride=stride, padding=padding, groups=groups, bias=bias, dtype=dtype)
    twin = type(conv)(**conv_arguments(conv))
    twin.load_state_dict(conv.state_dict())
    x = torch.randn(2, 4, *[5] * (conv.weight.ndim - 2), dtype=dtype)
    assert torch.equal(twin(x), conv(x)) and twin.weight.dtype == dtype


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_of_the_same_arguments_takes_the_same_weights(bias):
    linear = nn.Linear(3, 5, bias=bias, dtype=torch.float64)
    twin = nn.Linear(**linear_arguments(linear))
    twin.load_state_dict(linear.state_dict())
    assert torch.equal(twin(torch.ones(1, 3, dtype=torch.float64)), linear(torch.ones(1, 3, dtype=torch.float64)))


def test_other_layers_are_refused_by_name():
    with pytest.raises(TypeError, match=r"conv must be a convolution of torch\.nn, got Linear"):
        conv_arguments(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear, got Conv2d"):
        linear_arguments(nn.Conv2d(1, 1, 1))
