"""The spectral convolution against closed forms, einsum on full spectra, and translations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lathe.operators.fourier import FNO, SpectralConv


def waves(*shape, rng):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def full_spectrum(layer, x):
    """The layer by NumPy: the whole complex transform, every kept mode and its conjugate written out one by one."""
    weight = layer.complex_weight.detach().numpy()
    grid = x.shape[2:]
    X = np.fft.fftn(x.numpy(), axes=range(2, x.ndim)) / math.prod(grid)
    Y = np.zeros((x.shape[0], weight.shape[1], *grid), complex)
    lows = [m // 2 for m in layer.n_modes[:-1]]
    for index in np.ndindex(*weight.shape[2:]):
        k = (*(i - low for i, low in zip(index[:-1], lows)), index[-1])
        if not all(-(n // 2) <= q < (n + 1) // 2 for q, n in zip(k[:-1], grid[:-1])) or k[-1] > grid[-1] // 2:
            continue
        mode = np.einsum("bi,io->bo", X[(..., *k)], weight[(..., *index)])
        alone = k[-1] == 0 or 2 * k[-1] == grid[-1]
        Y[(..., *k)] += mode / 2 if alone else mode
        mirror = tuple(-q for q in k)
        mirror = tuple(q % n for q, n in zip(mirror, grid))
        Y[(..., *mirror)] += np.conj(mode) / 2 if alone else np.conj(mode)
    return np.fft.ifftn(Y * math.prod(grid), axes=range(2, x.ndim)).real


@pytest.mark.parametrize("grid", [(16,), (9,), (12, 10), (7, 9), (6, 20), (8, 6, 10), (5, 7, 4)])
def test_layer_is_the_sum_over_modes(grid, rng):
    layer = SpectralConv(2, 3, (6, 8, 6)[-len(grid) :], bias=False, dtype=torch.float64)
    x = waves(2, 2, *grid, rng=rng)
    np.testing.assert_allclose(layer(x).detach(), full_spectrum(layer, x), atol=1e-12)


def test_delta_weight_is_the_ideal_low_pass(rng):
    layer = SpectralConv(2, 2, (8, 8), bias=False, dtype=torch.float64)
    delta = torch.eye(2, dtype=torch.complex128)[:, :, None, None].expand_as(layer.complex_weight)
    layer.set_complex_weight(delta)
    j = torch.arange(32, dtype=torch.float64) / 32 * 2 * math.pi
    kept = torch.sin(3 * j)[:, None] * torch.cos(2 * j) + torch.cos(3 * j + 1)[:, None] + torch.sin(4 * j)
    lost = torch.sin(7 * j)[:, None] + torch.cos(5 * j)
    field = torch.stack([kept, 2 * kept])[None]
    torch.testing.assert_close(layer(field), field, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(field + lost), field, rtol=0, atol=1e-12)


def test_inverse_square_weight_solves_poisson(rng):
    layer = SpectralConv(1, 1, (12, 12), bias=False, dtype=torch.float64)
    k1, k2 = torch.meshgrid(torch.arange(-6, 6), torch.arange(7), indexing="ij")
    square = 4 * math.pi**2 * (k1**2 + k2**2).double()
    weight = torch.where(square > 0, 1 / square.clamp_min(1), 0.0)
    layer.set_complex_weight(weight.to(torch.complex128)[None, None])
    x = torch.arange(24, dtype=torch.float64) / 24
    u = torch.sin(2 * math.pi * 3 * x)[:, None] * torch.cos(2 * math.pi * 2 * x) + torch.sin(2 * math.pi * 5 * x)
    f = (
        4
        * math.pi**2
        * (
            13 * torch.sin(2 * math.pi * 3 * x)[:, None] * torch.cos(2 * math.pi * 2 * x)
            + 25 * torch.sin(2 * math.pi * 5 * x)
        )
    )
    torch.testing.assert_close(layer(f[None, None])[0, 0], u, rtol=0, atol=1e-12)


def test_band_limited_fields_give_the_same_on_every_grid(rng):
    layer = SpectralConv(1, 2, (6, 6), dtype=torch.float64)
    coarse, fine = (
        torch.sin(2 * x)[:, None] * torch.cos(x)
        for x in (torch.arange(n, dtype=torch.float64) * (2 * math.pi / n) for n in (16, 48))
    )
    torch.testing.assert_close(layer(fine[None, None])[..., ::3, ::3], layer(coarse[None, None]), rtol=0, atol=1e-10)
    torch.testing.assert_close(layer(coarse[None, None], (48, 48)), layer(fine[None, None]), rtol=0, atol=1e-10)


def test_layer_and_network_commute_with_translations(rng):
    layer = SpectralConv(2, 2, (6, 8), dtype=torch.float64)
    net = FNO((6, 8), 2, 1, 4, coordinates=False, dtype=torch.float64)
    x = waves(1, 2, 12, 17, rng=rng)
    for function in (layer, net):
        torch.testing.assert_close(
            function(x.roll((3, -5), (2, 3))), function(x).roll((3, -5), (2, 3)), rtol=0, atol=1e-10
        )


def test_weights_start_with_the_stated_variance():
    layer = SpectralConv(24, 40, (8, 8))
    assert abs(layer.complex_weight.abs().square().mean() / (2 / 64) - 1) < 0.05


def test_gradients_by_finite_differences(rng):
    layer = SpectralConv(2, 1, (4, 4), dtype=torch.float64)
    x = waves(1, 2, 6, 5, rng=rng).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, b: layer(x), (x, layer.weight, layer.bias))


@settings(max_examples=25, deadline=None)
@given(
    grid=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    padding=st.sampled_from([0.0, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_network_takes_any_grid(grid, padding, dtype):
    net = FNO((4,) * len(grid), 2, 3, 4, 2, domain_padding=padding, dtype=dtype)
    u = net(torch.ones(2, 2, *grid, dtype=dtype))
    assert u.shape == (2, 3, *grid) and u.dtype == dtype and torch.isfinite(u).all()


def test_plain_network_has_the_known_size():
    """Lifting, four dense layers with their 1x1 maps, and the projection."""
    net = FNO((16, 16), 1, 1, 16)
    dense = 4 * (16 * 9 * 16 * 16 * 2 + 16 * 16 + 16)
    assert sum(p.numel() for p in net.parameters()) == (3 * 16 + 16) + dense + (16 * 32 + 32) + (32 + 1)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="even"):
        SpectralConv(1, 1, (5, 4))
    with pytest.raises(ValueError, match="2 grid axes"):
        SpectralConv(1, 1, (4, 4))(torch.zeros(1, 1, 8))
    with pytest.raises(ValueError, match="must have 2 channels, got 1"):
        FNO((4, 4), 2, 1, 4)(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="n_layers"):
        FNO((4, 4), 1, 1, 4, 0)
