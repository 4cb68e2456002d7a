"""Replacing normalisation and activation in networks whose data flow is known by construction."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lathe.nn.evonorm import EvoNormB0, EvoNormS0, replace_norm_act


class Net(nn.Module):
    """A pair, a normalisation before a function, and a linear one before a sum; registered in misleading order."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.SiLU()
        self.norm3, self.norm2, self.norm1 = nn.GroupNorm(2, 8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.act(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(x)))
        return x + self.norm3(y)


class Untraceable(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def test_pairs_become_one_layer_and_the_original_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.GroupNorm(2, 4))
    report = replace_norm_act(model, EvoNormS0, groups=2)
    new = report.model
    assert [type(module) for module in new] == [nn.Conv2d, EvoNormS0, nn.Identity, nn.Conv2d, EvoNormS0]
    assert new[1].nonlinear and not new[4].nonlinear and new[1].groups == 2
    assert [replaced.name for replaced in report.replaced] == ["1", "4"]
    assert isinstance(model[1], nn.BatchNorm2d) and isinstance(model[2], nn.ReLU)
    x = torch.randn(2, 3, 8, 8)
    by_hand = EvoNormS0(4, nonlinear=False)(model[3](EvoNormS0(8, groups=2)(model[0](x))))
    torch.testing.assert_close(new(x), by_hand)


@pytest.mark.parametrize("example", [None, torch.ones(2, 3, 6, 6)])
def test_functions_that_stay_keep_their_normalisation(example):
    model = Net() if example is None else Untraceable()
    with pytest.warns(UserWarning, match=r"norm2 is left alone: its output goes to the function relu"):
        report = replace_norm_act(model, EvoNormB0, example_input=example)
    new = report.model
    assert isinstance(new.norm1, EvoNormB0) and new.norm1.nonlinear and isinstance(new.act, nn.Identity)
    assert isinstance(new.norm2, nn.BatchNorm2d)
    assert isinstance(new.norm3, EvoNormB0) and not new.norm3.nonlinear
    assert [skip.name for skip in report.skipped] == ["norm2"]


def test_an_activation_of_several_places_stays_with_its_normalisations():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()
            self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

        def forward(self, x):
            return self.relu(self.norms[1](self.relu(self.norms[0](x))))

    with pytest.warns(UserWarning, match=r"relu \(ReLU\), which is not its alone"):
        report = replace_norm_act(Shared(), EvoNormB0)
    assert not report.replaced and all(isinstance(norm, nn.BatchNorm2d) for norm in report.model.norms)


def test_a_guessed_order_removes_no_normalisation_alone():
    with pytest.warns(UserWarning, match="pass example_input"):
        report = replace_norm_act(Untraceable(), EvoNormB0)
    assert isinstance(report.model.norm2, nn.BatchNorm2d) and isinstance(report.model.norm3, nn.GroupNorm)


def test_types_and_places_can_be_chosen():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.SiLU())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = replace_norm_act(model, EvoNormB0, where=lambda name: name == "2")
    assert [type(m) for m in report.model] == [nn.BatchNorm2d, nn.ReLU, EvoNormB0, nn.Identity]
    # An activation outside of `activations` stays, and the normalisation before it counts as linear.
    report = replace_norm_act(model, EvoNormB0, activations=[nn.ReLU])
    assert isinstance(report.model[3], nn.SiLU) and not report.model[2].nonlinear
    report = replace_norm_act(model, EvoNormB0, norms=[nn.GroupNorm])
    assert not report.replaced


def test_mode_device_and_dtype_are_those_of_the_network():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    new = replace_norm_act(model, EvoNormB0, momentum=0.3).model
    assert not new[0].training and new[0].weight.dtype == torch.float64 and new[0].momentum == 0.3
