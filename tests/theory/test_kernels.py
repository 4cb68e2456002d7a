"""Composed kernels: against closed forms, literal recursions, sampled networks, neural-tangents; what they refuse."""

from __future__ import annotations

import itertools
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lathe.core.gaussian import Activation as Function
from lathe.core.gaussian import activation, line_expectation, pair_moments, polynomial, sinusoid
from lathe.theory.kernels import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    LayerNorm,
    Residual,
    Scale,
    Sequential,
    Sum,
)


def double(*shape: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=rng)


def mlp(act: object, depth: int, W: float = 1.5, b: float = 0.1) -> Sequential:
    return Sequential(*[part for _ in range(depth - 1) for part in (Dense(W, b), Activation(act))], Dense(W, b))


# --- fully connected --------------------------------------------------------------------------------------------------


def test_relu_networks_have_arc_cosine_kernels(rng):
    x = double(5, 4, rng=rng)
    nngp, ntk = mlp("relu", 3)(x)
    K = 0.1 + 1.5 * x.numpy() @ x.numpy().T / 4
    theta = K
    for _ in range(2):
        norm = np.sqrt(np.outer(K.diagonal(), K.diagonal()))
        angle = np.arccos(np.clip(K / norm, -1, 1))
        theta = 1.5 * theta * (np.pi - angle) / (2 * np.pi)
        K = 0.1 + 1.5 * norm * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
        theta = theta + K
    np.testing.assert_allclose(nngp, K, atol=1e-10)
    np.testing.assert_allclose(ntk, theta, atol=1e-7)


def test_linear_networks_have_kernels_in_closed_form(rng):
    x = double(4, 3, rng=rng)
    gram = x @ x.mT / 3
    nngp, ntk = Sequential(*[Dense(1.3, 0.0)] * 5)(x)
    torch.testing.assert_close(nngp, 1.3**5 * gram)
    torch.testing.assert_close(ntk, 5 * 1.3**5 * gram)
    rated = Sequential(Dense(2.0, weight_rate=0.3), Dense(0.5, 0.2, bias_rate=7.0, weight_rate=0.0))(x)
    torch.testing.assert_close(rated.ntk, 0.5 * 0.3 * gram + 7.0)


@pytest.mark.parametrize("act", ["relu", "tanh", "swish"])
def test_blocks_sides_and_diagonals_agree(act, rng):
    x = double(200, 6, rng=rng)  # enough for tables
    net = mlp(act, 3)
    nngp, ntk = net(x)
    assert torch.equal(nngp, nngp.mT) and nngp.dtype == torch.float64
    other = net(x[:7], x[5:60], block=11)
    torch.testing.assert_close(other.nngp, nngp[:7, 5:60], atol=1e-7, rtol=0)
    torch.testing.assert_close(other.ntk, ntk[:7, 5:60], atol=1e-7, rtol=0)
    torch.testing.assert_close(net(x, block=300).ntk, ntk, atol=1e-7, rtol=0)
    alone = net.diagonal(x)
    torch.testing.assert_close(alone.nngp, nngp.diagonal(), atol=1e-7, rtol=0)
    torch.testing.assert_close(alone.ntk, ntk.diagonal(), atol=1e-7, rtol=0)
    assert net(x[:3], kernels=("nngp",)).ntk is None and net.diagonal(x[:3], ("ntk",)).nngp is None


def test_single_precision_can_be_had(rng):
    x = double(6, 6, rng=rng)
    exact, rough = mlp("gelu", 4)(x), mlp("gelu", 4)(x, dtype=torch.float32)
    assert rough.ntk.dtype == torch.float32
    torch.testing.assert_close(rough.ntk.double(), exact.ntk, rtol=1e-4, atol=1e-5)


def grid(f, kaa: float, kab: float, kbb: float) -> float:
    """`<f(z_a) f(z_b)>` by a fine trapezoid rule, kinks at zero on a node."""
    u = np.linspace(-9, 9, 1201)
    w = np.exp(-0.5 * u**2) * (u[1] - u[0]) / math.sqrt(2 * math.pi)
    a = math.sqrt(kaa) * u
    b = kab / math.sqrt(kaa) * u[:, None] + math.sqrt(kbb - kab**2 / kaa) * u
    return float(w * f(a) @ f(b) @ w)


NAMED = {
    "abs": (np.abs, np.sign),
    "square": (np.square, lambda z: 2 * z),
    "exp": (np.exp, np.exp),
    "gaussian": (lambda z: np.exp(-z * z), lambda z: -2 * z * np.exp(-z * z)),
    "step": (lambda z: (np.sign(z) + 1) / 2, None),
    "sign": (np.sign, None),
    "polynomial": (lambda z: 0.3 - z + 0.5 * z**2 + 0.2 * z**3, lambda z: -1 + z + 0.6 * z**2),
    "sinusoid": (lambda z: 1.4 * np.sin(0.7 * z + 0.4), lambda z: 0.98 * np.cos(0.7 * z + 0.4)),
}


@pytest.mark.parametrize("name", NAMED)
def test_closed_forms_are_the_integrals(name):
    own = {"polynomial": polynomial(0.3, -1.0, 0.5, 0.2), "sinusoid": sinusoid(1.4, 0.7, 0.4)}
    act = own.get(name) or activation(name)
    f, slope = NAMED[name]
    z = torch.linspace(-2, 2, 41, dtype=torch.float64)
    np.testing.assert_allclose(act(z), f(z.numpy()), atol=1e-12)
    for K in ((0.8, 0.3, 1.1), (0.5, -0.4, 0.6)):
        kernel, steep = pair_moments(act, *[torch.tensor(k, dtype=torch.float64) for k in K])
        kinked = name in ("abs", "step", "sign")
        assert kernel.item() == pytest.approx(grid(f, *K), abs=1e-3 if kinked else 1e-9)
        if slope is not None:
            np.testing.assert_allclose(act.derivative(z), slope(z.numpy()), atol=1e-12)
            assert steep.item() == pytest.approx(grid(slope, *K), abs=3e-3 if kinked else 1e-9)


@pytest.mark.parametrize("name", ["elu", "selu"])
def test_kinks_at_zero_are_tabulated_to_many_digits(name, rng):
    alpha, scale = {"elu": (1.0, 1.0), "selu": (1.6732632423543772, 1.0507009873554805)}[name]
    variance = torch.tensor([0.3, 1.1, 2.5], dtype=torch.float64).repeat(7)
    rho = 2 * torch.rand(21, 21, dtype=torch.float64, generator=rng) - 1
    rho[0, 1], rho[1, 0], rho[0, 2] = 0.999, -0.999, 0.3
    K = rho * (variance[:, None] * variance).sqrt()
    kernel = pair_moments(activation(name), variance[:, None], K, variance)[0]
    for i, j in ((0, 1), (1, 0), (0, 2), (4, 9)):

        def halves(z: np.ndarray) -> np.ndarray:
            return scale * np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0)))

        assert kernel[i, j].item() == pytest.approx(grid(halves, variance[i], K[i, j], variance[j]), abs=1e-5)
    same = pair_moments(activation(name), variance, variance, variance)  # few pairs: by quadrature
    table = pair_moments(activation(name), variance.repeat(5), variance.repeat(5), variance.repeat(5))
    for few, many in zip(same, table):
        torch.testing.assert_close(few.repeat(5), many, atol=1e-8, rtol=0)


@pytest.mark.parametrize("spec", ["hardtanh", "relu6", nn.Hardsigmoid(), nn.Softshrink(0.4), nn.Hardtanh(-0.3, 2.0)])
def test_lines_that_bend_off_zero_have_one_integral_a_pair(spec):
    act = activation(spec)
    K = [torch.tensor(k, dtype=torch.float64) for k in ([0.8, 0.8, 4.0], [0.3, -0.7, 3.9], [1.1, 1.1, 4.5])]
    kernel, slope = pair_moments(act, *K)

    def values(z: np.ndarray) -> np.ndarray:
        return act(torch.from_numpy(z)).numpy()

    def slopes(z: np.ndarray) -> np.ndarray:
        return (values(z + 1e-6) - values(z - 1e-6)) / 2e-6

    for place, (kaa, kab, kbb) in enumerate(zip(*[k.tolist() for k in K])):
        assert kernel[place].item() == pytest.approx(grid(values, kaa, kab, kbb), abs=1e-4)
        assert slope[place].item() == pytest.approx(grid(slopes, kaa, kab, kbb), abs=2e-2)
    variance = torch.tensor([0.01, 0.5, 30.0], dtype=torch.float64)
    same, steep = pair_moments(act, variance, variance, variance)
    torch.testing.assert_close(same, line_expectation(lambda z: act(z) ** 2, variance, act.kinks), atol=1e-7, rtol=0)
    squared = line_expectation(lambda z: act.derivative(z) ** 2, variance, act.kinks)
    torch.testing.assert_close(steep, squared, atol=1e-5, rtol=0)
    leaves = [k.clone().requires_grad_() for k in K]
    (rise,) = torch.autograd.grad(pair_moments(act, *leaves)[0].sum(), leaves[1:2])
    torch.testing.assert_close(rise, slope, atol=1e-6, rtol=0)  # Price's theorem


def test_a_radial_kernel_comes_from_a_sinusoid(rng):
    x = double(4, 3, rng=rng)
    nngp = Sequential(Dense(3.0), Activation(sinusoid(2**0.5, (2 * 0.7) ** 0.5, math.pi / 4)))(x).nngp
    torch.testing.assert_close(nngp, torch.exp(-0.7 * torch.cdist(x, x) ** 2))


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 6),
    d=st.integers(1, 5),
    act=st.sampled_from(["relu", "erf", "gelu", "sin", "abs", "tanh", "square"]),
    W=st.floats(0.1, 2.0),
    b=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
)
def test_kernels_are_symmetric_semidefinite_and_ordered(n, d, act, W, b, seed):
    x = double(n, d, rng=torch.Generator().manual_seed(seed))
    nngp, ntk = mlp(act, 3, W, b)(x)
    for K in (nngp, ntk, ntk - nngp):  # the last layer's own part of the NTK is the NNGP kernel
        assert torch.linalg.eigvalsh(K)[0] > -1e-7 * float(K.diagonal().max())


def test_kernels_can_be_differentiated(rng):
    x = double(2, 2, 4, rng=rng).requires_grad_()
    weights = double(2, 2, rng=rng)
    conv = Conv(3, padding="same", weight_variance=1.4, bias_variance=0.1)
    for last in (Flatten(), GlobalAvgPool()):
        net = Sequential(conv, Activation("erf"), conv, LayerNorm(), Activation("gelu"), last, Dense())
        assert torch.autograd.gradcheck(lambda x, net=net: (net(x).ntk * weights).sum(), x, atol=1e-6)


# --- convolutions -----------------------------------------------------------------------------------------------------


def literal(layers: list, x1: np.ndarray, x2: np.ndarray) -> tuple[float, float]:
    """NNGP and NTK of two images (c, h, w), position by position; relu for every activation."""
    images = {
        (i, j): np.einsum("cij,ckl->ijkl", (x1, x2)[i], (x1, x2)[j]) / len(x1) for i, j in ((0, 0), (0, 1), (1, 1))
    }
    theta = np.zeros_like(images[0, 1])
    for layer in layers:
        if isinstance(layer, Conv):
            W, b = layer.weight_variance, layer.bias_variance
            theta = W * windows(theta, layer) + W * windows(images[0, 1], layer) + b
            images = {pair: b + W * windows(K, layer) for pair, K in images.items()}
        elif isinstance(layer, Activation):
            variances = [np.einsum("ijij->ij", images[i, i]) for i in (0, 1)]
            new = {}
            for (i, j), K in images.items():
                kernel, slope = np.empty_like(K), np.empty_like(K)
                for place in itertools.product(*map(range, K.shape)):
                    a, c = variances[i][place[:2]], variances[j][place[2:]]
                    angle = math.acos(min(1.0, max(-1.0, K[place] / math.sqrt(a * c))))
                    slope[place] = (math.pi - angle) / (2 * math.pi)
                    kernel[place] = math.sqrt(a * c) * math.sin(angle) / (2 * math.pi) + K[place] * slope[place]
                new[i, j] = kernel
                if (i, j) == (0, 1):
                    theta = theta * slope
            images = new
        elif isinstance(layer, AvgPool):
            k = layer.kernel_size

            def pool(K: np.ndarray, k: int = k) -> np.ndarray:
                h, w, _, _ = K.shape
                return K.reshape(h // k, k, w // k, k, h // k, k, w // k, k).mean((1, 3, 5, 7))

            images, theta = {pair: pool(K) for pair, K in images.items()}, pool(theta)
    K = images[0, 1]
    if isinstance(layers[-1], Flatten):
        return float(np.einsum("ijij->ij", K).mean()), float(np.einsum("ijij->ij", theta).mean())
    return float(K.mean()), float(theta.mean())


def windows(K: np.ndarray, conv: Conv) -> np.ndarray:
    """The mean over a convolution's window, both positions moving together."""
    k, s, p, d = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    h, w = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n in K.shape[:2]]
    out = np.zeros((h, w, h, w))
    for i, j, a, c in itertools.product(range(h), range(w), range(h), range(w)):
        for u, v in itertools.product(range(k), range(k)):
            place = [s * i - p + d * u, s * j - p + d * v, s * a - p + d * u, s * c - p + d * v]
            if conv.padding_mode == "circular":
                place = [q % n for q, n in zip(place, K.shape)]
            if all(0 <= q < n for q, n in zip(place, K.shape)):
                out[i, j, a, c] += K[tuple(place)] / k**2
    return out


same = Conv(3, padding="same", weight_variance=1.7, bias_variance=0.1)
relu = Activation("relu")
LITERAL = {
    "flattened": [same, relu, same, relu, Flatten()],
    "strided": [Conv(3, 2, 1, weight_variance=1.7), relu, Conv(2, bias_variance=0.3), relu, Flatten()],
    "globally pooled": [same, relu, Conv(3, 2, 1, bias_variance=0.2), relu, GlobalAvgPool()],
    "dilated, circular": [
        Conv(3, padding=2, dilation=2, weight_variance=1.7, padding_mode="circular"),
        *(relu, Conv(3, padding=1, bias_variance=0.1, padding_mode="circular"), relu, GlobalAvgPool()),
    ],
    "dilated": [Conv(3, padding=2, dilation=2, weight_variance=1.7), relu, Conv(2, 2), relu, GlobalAvgPool()],
    "padded beyond its size": [Conv(1, padding=4, bias_variance=0.2), relu, Conv(3, 2, 1), relu, GlobalAvgPool()],
    "pooled between": [same, relu, AvgPool(2), same, relu, GlobalAvgPool()],
    "pooled, flattened": [same, relu, AvgPool(2), Conv(2, padding=1), relu, Flatten()],
}


@pytest.mark.parametrize("name", LITERAL)
def test_convolutional_kernels_follow_the_recursion_position_by_position(name, rng):
    layers = LITERAL[name]
    x = double(3, 2, 6, 4, rng=rng)
    nngp, ntk = Sequential(*layers)(x)
    for i, j in ((0, 0), (0, 2)):
        expected = literal(layers, x[i].numpy(), x[j].numpy())
        assert nngp[i, j].item() == pytest.approx(expected[0], abs=1e-10)
        assert ntk[i, j].item() == pytest.approx(expected[1], abs=1e-7)
    network = Sequential(*layers, Dense(1.3, 0.2))
    nngp, ntk = network(x)
    for part, whole in zip(network(x[:2], x[1:], block=1), (nngp, ntk)):
        torch.testing.assert_close(part, whole[:2, 1:], atol=1e-8, rtol=0)
    for part, whole in zip(network.diagonal(x), (nngp, ntk)):
        torch.testing.assert_close(part, whole.diagonal(), atol=1e-8, rtol=0)


def test_a_sequence_is_an_image_of_one_row(rng):
    x = double(3, 2, 7, rng=rng)
    for last in (Flatten(), GlobalAvgPool()):
        line = Sequential(Conv(3, 2, 1, weight_variance=1.5), Activation("erf"), last)(x)
        row = Sequential(Conv((1, 3), (1, 2), (0, 1), weight_variance=1.5), Activation("erf"), last)(x[:, :, None])
        torch.testing.assert_close(line.ntk, row.ntk)


def test_memory_of_a_pooled_network_does_not_hold_all_pairs_of_positions(rng):
    x = double(2, 1, 48, 48, rng=rng)
    net = Sequential(Conv(3, padding="same"), Activation("relu"), GlobalAvgPool())
    largest = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest[0] = max(largest[0], out.numel())
            return out

    with Watch():
        net(x)
    assert largest[0] <= 2 * 48**3  # against 48^4 a pair


# --- networks drawn at random -----------------------------------------------------------------------------------------


def test_layer_norm_takes_off_the_mean_that_activations_leave(rng):
    x = double(3, 4, rng=rng)
    net = Sequential(Dense(1.5, 0.1), Activation("relu"), LayerNorm(), Dense(1.2), Activation("gelu"))
    width = 4000
    h = F.relu(0.1**0.5 * double(width, rng=rng) + x @ double(4, width, rng=rng) * (1.5 / 4) ** 0.5)
    h = F.gelu(F.layer_norm(h, (width,)) @ double(width, width, rng=rng) * (1.2 / width) ** 0.5)
    torch.testing.assert_close(net(x).nngp, h @ h.mT / width, atol=0.04, rtol=0.04)
    raw = Sequential(LayerNorm(), Dense())(x + 3.0)  # inputs have a mean too
    z = F.layer_norm(x + 3.0, (4,))
    torch.testing.assert_close(raw.nngp, z @ z.mT / 4, atol=1e-7, rtol=0)


@pytest.mark.parametrize("positions", [True, False])
def test_layer_norm_of_images_is_that_of_sampled_networks(positions, rng):
    x = double(2, 3, 3, 3, rng=rng)
    norm = LayerNorm(positions=positions)
    net = Sequential(Conv(3, padding=1, weight_variance=1.5), Activation("relu"), norm, Conv(2, weight_variance=1.4))
    width = 3000
    h = F.relu(F.conv2d(x, double(width, 3, 3, 3, rng=rng) * (1.5 / 27) ** 0.5, padding=1))
    h = F.layer_norm(h, h.shape[1:]) if positions else F.layer_norm(h.movedim(1, -1), (width,)).movedim(-1, 1)
    z = F.conv2d(h, double(width // 4, width, 2, 2, rng=rng) * (1.4 / (4 * width)) ** 0.5)
    for last, expected in ((Flatten(), z.flatten(1)), (GlobalAvgPool(), z.mean((2, 3)))):
        found = Sequential(net, last)(x).nngp
        torch.testing.assert_close(found, expected @ expected.mT / expected.shape[1], atol=0.08, rtol=0.08)


def test_sums_scale_and_add(rng):
    x = double(3, 4, rng=rng)
    branch, stem = Sequential(Activation("relu"), Dense(0.8)), Dense(1.2, 0.3)
    base, deep = stem(x), Sequential(stem, branch)(x)
    for kernel, a, b in zip(Sequential(stem, Residual(branch, scale=0.5))(x), base, deep):
        torch.testing.assert_close(kernel, a + 0.25 * b)
    for kernel, a, b in zip(Sequential(stem, Residual(branch, Dense(2.0)))(x), Sequential(stem, Dense(2.0))(x), deep):
        torch.testing.assert_close(kernel, a + b)
    torch.testing.assert_close(Sequential(stem, Scale(3.0))(x).ntk, 9 * base.ntk)


# --- the peer ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def peer(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    for name in ("kernels", "harness"):
        sys.modules.pop(name, None)
    import kernels

    return kernels


def fixed(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.sin(1.7 * torch.arange(math.prod(shape), dtype=torch.float64) ** 1.1).reshape(shape)


#: neural-tangents 0.6.5 on jax 0.4.28 in float64: first input with the last one, NNGP and NTK, inputs `fixed(shape)`.
FROZEN: list[tuple[str, float, float]] = [
    ("relu", 0.4630953543415, 0.5631481271586),
    ("erf", 0.238000385589, 0.1810396199557),
    ("gelu", 0.3270883471893, 0.3864176225143),
    ("sin", 0.2438767424721, 0.2039763347333),
    ("cos", 0.8493633635389, 1.197577824184),
    ("abs", 1.528419453267, 2.158425642596),
    ("exp", 17006.70280061, 51411.83599897),
    ("square", 14.32145459394, 23.54998146003),
    ("gaussian", 0.775624962308, 1.00150865041),
    ("leaky relu, layer norm", 0.2084271343588, 0.08957329691971),
    ("standard parametrization", 0.302605932456, 2.09224380498),
    ("flattened, strided", 0.1677656399245, 0.2915559409837),
    ("residual, pooled twice", 0.4790062034553, 1.274010310148),
    ("strided, circular, normalised over all positions, pooled globally", 0.2777869492141, 0.4608206293552),
]


def test_kernels_are_those_that_neural_tangents_gave(peer):
    cases = peer.checked()
    assert [case.title for case in cases] == [title for title, _, _ in FROZEN]
    for case, (_, nngp, ntk) in zip(cases, FROZEN):
        found = case.network(fixed(case.shape))
        assert found.nngp[0, -1].item() == pytest.approx(nngp, rel=1e-9), case.title
        assert found.ntk[0, -1].item() == pytest.approx(ntk, rel=1e-7), case.title


def test_kernels_are_those_that_neural_tangents_gives(peer):
    if not os.environ.get("LATHE_NEURAL_TANGENTS_PYTHON"):
        pytest.skip("LATHE_NEURAL_TANGENTS_PYTHON names no interpreter")
    cases = peer.checked()
    answers = peer.neural_tangents(
        [{"kind": "kernel", "network": case.peer, "x": fixed(case.shape), "rounds": 1} for case in cases]
    )
    for case, answer in zip(cases, answers):
        found = case.network(fixed(case.shape))
        scale = float(answer["ntk"].abs().max())
        torch.testing.assert_close(found.nngp, answer["nngp"], atol=1e-9 * scale, rtol=0, msg=case.title)
        torch.testing.assert_close(found.ntk, answer["ntk"], atol=1e-7 * scale, rtol=0, msg=case.title)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_activations_that_grow_too_fast_are_refused(rng):
    x = double(3, 4, rng=rng) + 2
    wild = Function(lambda z: torch.exp(z * z), name="exp(z^2)")
    with pytest.raises(ValueError, match=r"exp\(z\^2\) has no finite second moment.*take a bounded"):
        mlp(wild, 2, 2.0)(x)
    with pytest.raises(ValueError, match="exp has no finite second moment"):
        mlp("exp", 5, 2.0)(x)
    with pytest.raises(ValueError, match=r"perceptron jumps.*kernels=\('nngp',\)"):
        mlp("sign", 2)(x)
    assert mlp("sign", 2)(x, kernels=("nngp",)).nngp.shape == (3, 3)


def test_units_that_are_not_gaussian_are_refused(rng):
    x = double(2, 3, rng=rng)
    with pytest.raises(ValueError, match="not Gaussian; put Dense or Conv before it"):
        Sequential(Activation("relu"), Dense())(x)
    with pytest.raises(ValueError, match="not Gaussian"):
        Sequential(Dense(), Activation("relu"), Residual(Dense()), Activation("relu"), Dense())(x)
    with pytest.raises(ValueError, match=r"2 branches of a sum do not end in weights.*Dense or Conv"):
        Residual(Activation("relu"))


def test_bad_arguments_are_refused(rng):
    flat, image = double(2, 3, rng=rng), double(2, 3, 4, 4, rng=rng)
    net = mlp("relu", 2)
    cases = [
        (lambda: Dense(-1.0), "weight_variance must be a number that is not negative, got -1.0"),
        (lambda: Dense(parametrization="standard"), "needs fan_in"),
        (lambda: Dense(parametrization="mup"), "parametrization must be 'ntk' or 'standard', got 'mup'"),
        (lambda: Conv(0), "kernel_size must be at least 1, got 0"),
        (lambda: Conv(2, padding="same"), "needs odd kernels"),
        (lambda: Conv(padding_mode="reflect"), "'zeros' or 'circular', got 'reflect'"),
        (lambda: net(image), r"Dense takes flat features, got images of size \(4, 4\).*Flatten"),
        (lambda: Sequential(Conv())(flat), "Conv takes images"),
        (lambda: Sequential(Conv())(image), r"ends with images of size \(2, 2\).*Flatten\(\)"),
        (lambda: Sequential(Conv(7), Flatten())(image), "does not fit an image"),
        (lambda: Sequential(Conv((3, 3, 3)), Flatten())(image), "kernel_size must be a number or 2 of them"),
        (lambda: GlobalAvgPool()(flat), "takes images"),
        (lambda: Sum(), "at least one branch"),
        (lambda: Sequential(Sum(Conv(3), Conv(1)), Flatten())(image), "must end at the same size"),
        (lambda: net(flat * math.inf), "x1 must be finite"),
        (lambda: net(flat, flat[:, :2]), r"x2 must be \(m, 3\)"),
        (lambda: net(flat[0]), "must be"),
        (lambda: net(flat[:0]), r"x1 must not be empty, got shape \(0, 3\)"),
        (lambda: net(flat, kernels=("ntk", "nngp", "mean")), "kernels must be a tuple of 'nngp' and 'ntk'"),
        (lambda: net(flat, block=0), "block must be at least 1, got 0"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="Linear"):
        Sequential(nn.Linear(2, 2))
