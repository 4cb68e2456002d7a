"""The two-dimensional Fourier form of signals on the sphere, in which the Gaunt product is a convolution.

A signal is continued to the torus by letting the polar angle run to 2 pi: f = sum_uv f_uv exp(i (u theta + v phi)) with
|u|, |v| <= L. Luo, Chen, Krishnapriyan, "Enabling Efficient Equivariant Operations in the Fourier Basis via Gaunt
Tensor Products", 2024, arXiv 2401.10216. Kept for comparison: the grid on the sphere gives the same numbers sooner.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from lathe.nn.equivariant_tensor_products.harmonics import spherical_harmonics

__all__ = ["convolve", "torus_read_out", "torus_spectrum"]


@functools.lru_cache(maxsize=256)
def torus_spectrum(l: int, band: int) -> NDArray[np.complex128]:
    """y^lm_uv, (2l + 1, 2 band + 1, 2 band + 1), centred; non-zero for v = +-m only."""
    size = 2 * band + 1
    angle = torch.arange(size, dtype=torch.float64) * (2 * math.pi / size)
    theta, phi = angle[:, None], angle[None, :]
    points = torch.stack([theta.sin() * phi.sin(), theta.cos().expand(-1, size), theta.sin() * phi.cos()], -1)
    samples = spherical_harmonics(l, points, normalize=False)[..., l * l :].permute(2, 0, 1)
    spectrum = np.fft.fftshift(np.fft.fft2(samples.numpy()), axes=(1, 2)) / size**2
    spectrum[np.abs(spectrum) < 1e-15] = 0.0
    return spectrum


@functools.lru_cache(maxsize=256)
def torus_read_out(l: int, band: int) -> NDArray[np.complex128]:
    """z^lm_uv, (2 band + 1, 2 band + 1, 2l + 1): the integral over the sphere of Y_lm exp(i (u theta + v phi))."""
    own = torus_spectrum(l, l)
    # The integral of exp(i n theta) sin theta over half a turn.
    n = np.arange(-band - l, band + l + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        half_turn = (1 + np.exp(1j * math.pi * n)) / (1 - n.astype(float) ** 2)
    half_turn[np.abs(n) == 1] = 0.5j * math.pi * n[np.abs(n) == 1]
    table = np.zeros((2 * band + 1, 2 * band + 1, 2 * l + 1), dtype=np.complex128)
    for v in range(-min(l, band), min(l, band) + 1):
        for u in range(-band, band + 1):
            # exp(i u theta) meets exp(i u' theta) for u' = -l to l, and v meets -v.
            table[u + band, v + band] = 2 * math.pi * own[:, :, l - v] @ half_turn[u + band : u + band + 2 * l + 1]
    return table


def convolve(f: Tensor, g: Tensor, direct: bool) -> Tensor:
    """Two-dimensional convolution of spectra (..., n1, n1) and (..., n2, n2): (..., n1 + n2 - 1, n1 + n2 - 1)."""
    first, second = f.shape[-1], g.shape[-1]
    size = first + second - 1
    if not direct:
        product = torch.fft.fft2(f, s=(size, size)) * torch.fft.fft2(g, s=(size, size))
        return torch.fft.ifft2(product)
    lead = torch.broadcast_shapes(f.shape[:-2], g.shape[:-2])
    kernel = g.expand(*lead, second, second).reshape(-1, 1, second, second).flip(-2, -1)
    padded = functional.pad(f.expand(*lead, first, first).reshape(1, -1, first, first), (second - 1,) * 4)
    return functional.conv2d(padded, kernel, groups=kernel.shape[0]).view(*lead, size, size)
