"""Warps, flows and resizing against pixels moved by hand, finite differences, and ordinary differential equations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lathe.nn.mip_hypernetworks import (
    HyperMorph2d,
    Registration,
    RegistrationUNet,
    ScaleSpaceResize,
    hypernetize,
    integrate,
    registration_loss,
    smoothness,
    warp,
)

F64 = torch.float64


def waves(height, width, amplitude):
    """A smooth flow that vanishes at the border."""
    y = torch.linspace(0, math.pi, height, dtype=F64).sin()[:, None]
    x = torch.linspace(0, math.pi, width, dtype=F64).sin()[None]
    return amplitude * torch.stack([y * x, -y * x])[None]


class TestWarp:
    @settings(max_examples=20, deadline=None)
    @given(down=st.integers(-3, 3), right=st.integers(-3, 3), height=st.integers(1, 7), width=st.integers(1, 7))
    def test_whole_pixels_move_as_by_hand(self, down, right, height, width):
        image = torch.arange(2 * height * width, dtype=F64).view(1, 2, height, width)
        flow = torch.tensor([down, right], dtype=F64).view(1, 2, 1, 1).expand(1, 2, height, width)
        for mode in ("border", "zeros"):
            moved = warp(image, flow, padding_mode=mode)
            for y in range(height):
                for x in range(width):
                    inside = 0 <= y + down < height and 0 <= x + right < width
                    source = (min(max(y + down, 0), height - 1), min(max(x + right, 0), width - 1))
                    expected = image[0, :, source[0], source[1]] * float(inside or mode == "border")
                    torch.testing.assert_close(moved[0, :, y, x], expected, atol=1e-9, rtol=0)

    def test_parts_of_pixels_read_in_between(self):
        image = torch.tensor([[0.0, 1.0], [10.0, 11.0]], dtype=F64).view(1, 1, 2, 2)
        flow = torch.zeros(1, 2, 2, 2, dtype=F64)
        flow[0, 0, 0, 0], flow[0, 1, 0, 0] = 0.25, 0.5
        assert float(warp(image, flow)[0, 0, 0, 0]) == pytest.approx(0.25 * 10 + 0.5)

    def test_gradients_are_those_of_finite_differences(self, rng):
        image = torch.randn(1, 2, 4, 5, dtype=F64, generator=rng, requires_grad=True)
        flow = (0.2 + 0.5 * torch.rand(1, 2, 4, 5, dtype=F64, generator=rng)).requires_grad_()
        assert torch.autograd.gradcheck(warp, (image, flow))

    def test_flows_of_another_size_are_refused(self, shape_checks_off):
        with pytest.raises(ValueError, match=r"got \(1, 2, 4, 4\) for \(1, 1, 5, 5\)"):
            warp(torch.zeros(1, 1, 5, 5), torch.zeros(1, 2, 4, 4))


class TestFlow:
    def test_smoothness_is_the_mean_square_of_differences(self, rng):
        flow = torch.randn(3, 2, 5, 4, dtype=F64, generator=rng)
        array = flow.numpy()
        down, right = (array[:, :, 1:] - array[:, :, :-1]) ** 2, (array[..., 1:] - array[..., :-1]) ** 2
        expected = [(d.mean() + r.mean()) / 2 for d, r in zip(down, right)]
        assert smoothness(flow).tolist() == pytest.approx(expected, rel=1e-12)

    def test_shifts_are_perfectly_smooth(self):
        assert not smoothness(torch.full((1, 2, 4, 4), 3.0)).any()
        with pytest.raises(ValueError, match=r"at least 2 x 2 pixels, got \(1, 2, 1, 4\)"):
            smoothness(torch.zeros(1, 2, 1, 4))

    def test_a_constant_velocity_integrates_to_itself(self):
        velocity = torch.full((1, 2, 6, 6), 1.5, dtype=F64)
        torch.testing.assert_close(integrate(velocity, 4), velocity)

    def test_integration_follows_the_differential_equation(self):
        """Points that start on pixels, moved by small steps of a fourth-order rule, end where the flow says."""
        velocity = waves(33, 33, 3.0)

        def at(points):
            grid = (2 * points.flip(-1) / 32 - 1).view(1, 1, -1, 2)
            return nn.functional.grid_sample(velocity, grid, align_corners=True)[0, :, 0].T

        start = torch.cartesian_prod(*[torch.arange(33, dtype=F64)] * 2)
        points, step = start, 1 / 64
        for _ in range(64):
            a = at(points)
            b = at(points + step / 2 * a)
            c = at(points + step / 2 * b)
            points = points + step / 6 * (a + 2 * b + 2 * c + at(points + step * c))
        expected = (points - start).T.view(1, 2, 33, 33)
        assert float((integrate(velocity, 8) - expected).abs().max()) < 0.02
        assert float((velocity - expected).abs().max()) > 0.2

    def test_integrated_flows_do_not_fold_where_the_velocity_itself_would(self):
        velocity = waves(33, 33, 14.0)

        def determinants(flow):
            rows, columns = torch.gradient(flow[0], dim=(1, 2))
            return (1 + rows[0]) * (1 + columns[1]) - rows[1] * columns[0]

        assert float(determinants(velocity).min()) < 0
        assert float(determinants(integrate(velocity, 8)).min()) > 0


class TestHyperMorph:
    def test_it_starts_next_to_standing_still_with_any_parametrisation(self, rng):
        moving, fixed = torch.rand(2, 2, 1, 14, 14, generator=rng)
        for options in ({}, {"encoding": "none", "residual": False}, {"residual": False}, {"head_rank": 4}):
            moved, flow = HyperMorph2d(**options)(moving, fixed, gamma=0.5)
            assert flow.any()
            assert float(flow.detach().abs().max()) < 0.01
            torch.testing.assert_close(moved, moving, atol=0.01, rtol=0)
        assert float(HyperMorph2d(flow=None)(moving, fixed, gamma=0.5).flow.detach().abs().max()) > 0.01

    def test_its_loss_weighs_mismatch_against_smoothness_for_each_sample(self, rng):
        moved, fixed = torch.rand(2, 3, 1, 6, 6, dtype=F64, generator=rng)
        flow = torch.randn(3, 2, 6, 6, dtype=F64, generator=rng)
        gamma = torch.rand(3, 1, dtype=F64, generator=rng)
        parts = [
            (1 - g) * (m - f).square().mean() + g * smoothness(u[None])[0]
            for g, m, f, u in zip(gamma, moved, fixed, flow)
        ]
        torch.testing.assert_close(registration_loss(Registration(moved, flow), fixed, gamma), torch.cat(parts).mean())
        one = registration_loss(Registration(moved, flow), fixed, 0.25)
        torch.testing.assert_close(one, 0.75 * (moved - fixed).square().mean() + 0.25 * smoothness(flow).mean())

    def test_one_gamma_for_each_pair_is_a_loop_over_pairs(self, rng):
        model = HyperMorph2d(flow=None).double()
        moving, fixed = torch.rand(2, 3, 1, 9, 10, dtype=F64, generator=rng)
        gamma = torch.rand(3, 1, dtype=F64, generator=rng)
        together = model(moving, fixed, gamma)
        for i in range(3):
            alone = model(moving[i : i + 1], fixed[i : i + 1], gamma[i])
            torch.testing.assert_close(together.flow[i : i + 1], alone.flow, atol=1e-12, rtol=1e-12)

    def test_after_training_a_larger_gamma_gives_a_smoother_flow(self, rng):
        y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
        centres = 3 + 5 * torch.rand(16, 2, 1, 1, generator=rng)
        blobs = (-((y - centres[:, :1]) ** 2 + (x - centres[:, 1:]) ** 2) / 6).exp()
        moving, fixed = blobs[:8], blobs[8:]
        model = HyperMorph2d(RegistrationUNet(widths=(8, 8)), hidden=(8, 16))
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(80):
            gamma = torch.rand(1, generator=rng)
            optimizer.zero_grad()
            registration_loss(model(moving, fixed, gamma), fixed, gamma).backward()
            optimizer.step()
            with torch.no_grad():
                losses.append(float((model(moving, fixed, 0.1).moved - fixed).square().mean()))
        assert losses[-1] < 0.8 * losses[0]
        with torch.no_grad():
            rough, smooth = (smoothness(model(moving, fixed, gamma).flow).mean() for gamma in (0.02, 0.98))
        assert smooth < rough

    def test_networks_of_ones_own_are_taken_and_single_levels_refused(self):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.last = nn.Conv2d(2, 2, 3, padding=1)

            def forward(self, moving, fixed):
                return self.last(torch.cat([moving, fixed], 1))

        model = HyperMorph2d(Own(), flow="last.*", integration_steps=0, pretrained=False)
        x = torch.rand(1, 1, 5, 5)
        assert model(x, x, gamma=0.0).flow.shape == (1, 2, 5, 5)
        assert float(model(x, x, gamma=0.0).flow.detach().abs().max()) < 0.01
        with pytest.raises(ValueError, match=r"flow must match predicted tensors \(last.weight, .*got 'flow\.\*'"):
            HyperMorph2d(Own())
        with pytest.raises(ValueError, match=r"widths must name two levels at least, got \(8,\)"):
            RegistrationUNet(widths=(8,))


class TestScaleSpace:
    @given(height=st.integers(1, 9), width=st.integers(1, 9), factor=st.floats(0.05, 2.5))
    @settings(max_examples=25, deadline=None)
    def test_sizes_are_rounded_and_constants_stay(self, height, width, factor):
        y = ScaleSpaceResize()(torch.full((1, 2, height, width), 3.0), factor)
        assert y.shape == (1, 2, max(1, round(height * factor)), max(1, round(width * factor)))
        torch.testing.assert_close(y, torch.full_like(y, 3.0))

    def test_halving_averages_with_the_triangle_of_twice_the_width(self):
        x = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 8)
        y = ScaleSpaceResize()(x.expand(1, 1, 8, 8), 0.5)
        # Centres of the new pixels lie at 0.5, 2.5, 4.5; the triangle weighs distances 0.5 and 1.5 by 3/8 and 1/8.
        torch.testing.assert_close(y[0, 0, 2], torch.tensor([0.0, 0.375, 0.125, 0.0]))

    def test_a_driven_network_takes_the_factor_beside_its_gamma(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.resize = nn.Conv2d(1, 2, 3, padding=1), ScaleSpaceResize()

            def forward(self, x, factor):
                return self.resize(self.conv(x), factor)

        driven = hypernetize(Net())
        assert driven(torch.zeros(1, 1, 8, 8), 0.5, gamma=0.5).shape == (1, 2, 4, 4)
        assert driven(torch.zeros(1, 1, 8, 8), factor=0.25, gamma=0.25).shape == (1, 2, 2, 2)

    def test_factors_that_cannot_be_are_refused(self):
        for factor in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="factor must be positive"):
                ScaleSpaceResize()(torch.zeros(1, 1, 4, 4), factor)
