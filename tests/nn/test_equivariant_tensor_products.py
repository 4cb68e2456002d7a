"""The products against e3nn, closed forms of sympy, quadrature, hand-written vector algebra, and rotations."""

from __future__ import annotations

import itertools
import math
import warnings

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lathe.nn.equivariant_tensor_products import (
    ClebschGordanProduct,
    ExpressivityError,
    GauntProduct,
    Irrep,
    Irreps,
    MatrixProduct,
    VectorSignalProduct,
    cg_product,
    clebsch_gordan,
    from_sphere,
    gaunt_coefficients,
    gaunt_product,
    gaunt_product_of_many,
    matrix_product,
    sphere_grid,
    spherical_harmonics,
    to_sphere,
    vector_signal_product,
)

FIELD_PRODUCTS = [GauntProduct, MatrixProduct, VectorSignalProduct]
IN1, IN2, OUT = "4x0e+3x1o+2x1e+2x2e", "1x0e+1x1o+2x2e", "5x0e+3x1o+2x2e+1x3o+2x2o+1x0o"
DOUBLE = torch.float64


@pytest.fixture
def exact():
    """e3nn makes its constants in the default precision."""
    torch.set_default_dtype(DOUBLE)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def unchecked():
    """What a user is told, who has no type checker."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def features(product, *lead, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        irreps.randn(*lead, generator=generator, dtype=DOUBLE) for irreps in (product.irreps_in1, product.irreps_in2)
    ]


def rotation(seed, improper=False):
    q, r = torch.linalg.qr(torch.randn(3, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)))
    q = q * r.diagonal().sign()
    return q if (torch.linalg.det(q) < 0) == improper else -q


def natural(l):
    return Irreps.spherical_harmonics(l)


# --- e3nn: the same paths, weights and numbers ---


@pytest.mark.parametrize("in2", [IN2, "1x0e+1x1o+1x2e"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("normalization", ["component", "norm"])
def test_fully_connected_products_are_e3nns(exact, in2, shared, normalization):
    o3 = pytest.importorskip("e3nn.o3")
    peer = o3.FullyConnectedTensorProduct(IN1, in2, OUT, shared_weights=shared, irrep_normalization=normalization)
    ours = ClebschGordanProduct.from_trained(peer).double()
    fresh = ClebschGordanProduct(
        IN1, in2, OUT, "fully_connected", shared_weights=shared, irrep_normalization=normalization, dtype=DOUBLE
    )
    assert [path[:3] for path in fresh.paths] == [path[:3] for path in ours.paths]
    x, y = features(ours, 5)
    weight = torch.randn(5, peer.weight_numel, dtype=DOUBLE) if not shared else peer.weight.detach().double()
    expected = peer.double()(x, y, weight)
    torch.testing.assert_close(ours(x, y, weight), expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(fresh(x, y, weight), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("in1", ["1x0e+1x1o", IN1])
@pytest.mark.parametrize("sparse", [True, False])
def test_full_products_are_e3nns(exact, in1, sparse):
    o3 = pytest.importorskip("e3nn.o3")
    peer = o3.FullTensorProduct(in1, IN2).double()
    ours = ClebschGordanProduct(in1, IN2, sparse=sparse, dtype=DOUBLE)
    assert str(ours.irreps_out) == str(peer.irreps_out)
    x, y = features(ours, 2, 3)
    torch.testing.assert_close(ours(x, y), peer(x, y), atol=1e-12, rtol=1e-10)
    kept = ClebschGordanProduct(in1, IN2, "1o+2e", sparse=sparse, dtype=DOUBLE)
    filtered = o3.FullTensorProduct(in1, IN2, filter_ir_out=["1o", "2e"]).double()
    torch.testing.assert_close(kept(x, y), filtered(x, y), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("in2", [IN2, "1x0e+1x1o+1x2e"])
@pytest.mark.parametrize("path_normalization", ["element", "path", "none"])
def test_channelwise_products_are_e3nns(exact, in2, path_normalization):
    o3 = pytest.importorskip("e3nn.o3")
    ours = ClebschGordanProduct(
        IN1, in2, mode="channelwise", shared_weights=False, path_normalization=path_normalization, dtype=DOUBLE
    )
    peer = o3.TensorProduct(
        IN1,
        in2,
        str(ours.irreps_out),
        [(path.i1, path.i2, path.out, "uvu", True) for path in ours.paths],
        shared_weights=False,
        path_normalization=path_normalization,
    ).double()
    x, y = features(ours, 5)
    weight = torch.randn(5, ours.weight_numel, dtype=DOUBLE)
    torch.testing.assert_close(ours(x, y, weight), peer(x, y, weight), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(
        ClebschGordanProduct.like(peer)(x, y, weight), peer(x, y, weight), atol=1e-10, rtol=1e-10
    )


def test_paths_that_share_an_output_are_added_up(exact):
    o3 = pytest.importorskip("e3nn.o3")
    paths = [(0, 0, 0, "uvu", True), (1, 1, 0, "uvu", True), (0, 1, 1, "uvu", True)]
    peer = o3.TensorProduct("3x0e+3x1o", "2x0e+1x1o", "3x0e+3x1o+2x2e", paths).double()
    ours = ClebschGordanProduct.from_trained(peer)
    x, y = features(ours, 4)
    torch.testing.assert_close(ours(x, y), peer(x, y), atol=1e-12, rtol=1e-10)
    assert not ours(x, y)[:, 12:].any()


def test_tables_and_rotations_are_e3nns(exact):
    o3 = pytest.importorskip("e3nn.o3")
    for l1, l2, l3 in itertools.product(range(5), repeat=3):
        if abs(l1 - l2) <= l3 <= l1 + l2:
            table = clebsch_gordan(l1, l2, l3, dtype=DOUBLE)
            torch.testing.assert_close(table, o3.wigner_3j(l1, l2, l3, dtype=DOUBLE), atol=1e-14, rtol=0)
    vectors = torch.randn(20, 3, dtype=DOUBLE)
    for normalization in ("integral", "component", "norm"):
        for normalize in (True, False):
            expected = o3.spherical_harmonics(list(range(7)), vectors, normalize, normalization)
            ours = spherical_harmonics(6, vectors, normalize=normalize, normalization=normalization)
            torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-11)
    turned = rotation(1, improper=True)
    expected = o3.Irreps("2x0o+1e+3o").D_from_matrix(turned)
    torch.testing.assert_close(Irreps("2x0o+1e+3o").transformation(turned), expected, atol=1e-12, rtol=0)
    assert Irreps(o3.Irreps("4x0e+2x1o")) == Irreps("4x0e+2x1o")
    assert Irreps([(2, o3.Irrep("1o"))]) == Irreps("2x1o")


# --- equivariance, also under reflections ---


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), improper=st.booleans(), which=st.integers(0, 8))
def test_every_product_turns_with_its_inputs(seed, improper, which):
    torch.manual_seed(seed)
    kind, options = [
        (ClebschGordanProduct, {"mode": "fully_connected"}),
        (ClebschGordanProduct, {"mode": "channelwise"}),
        (ClebschGordanProduct, {"mode": "full"}),
        (GauntProduct, {"backend": "grid"}),
        (GauntProduct, {"backend": "fourier"}),
        (MatrixProduct, {"backend": "matrices"}),
        (MatrixProduct, {"space": "stacked"}),
        (VectorSignalProduct, {"backend": "grid"}),
        (VectorSignalProduct, {"coupling": ("cross",), "parity": "polar"}),
    ][which]
    out = None if options.get("mode") in ("channelwise", "full") else OUT
    product = kind(IN1, IN2, out, **options, dtype=DOUBLE)
    x, y = features(product, 3, seed=seed)
    turn = rotation(seed, improper)
    before, left, right = (
        irreps.transformation(turn).T for irreps in (product.irreps_out, product.irreps_in1, product.irreps_in2)
    )
    torch.testing.assert_close(product(x @ left, y @ right), product(x, y) @ before, atol=1e-12, rtol=1e-9)


# --- the meaning of single paths ---


def test_two_vectors_make_their_dot_and_cross_product():
    a, b = torch.randn(2, 7, 3, dtype=DOUBLE)
    bare = {"irrep_normalization": "none", "path_normalization": "none"}
    dot = cg_product(a, b, "1o", "1o", "0e", **bare)
    torch.testing.assert_close(dot[:, 0], (a * b).sum(-1) / 3**0.5)
    torch.testing.assert_close(cg_product(a, b, "1o", "1o", "1e", **bare), torch.linalg.cross(a, b) / 6**0.5)
    # Point-wise: the product of two linear functions on the sphere, and their integral.
    assert float(gaunt_product(a, b, "1o", "1o", "0e")[0, 0]) == pytest.approx(
        float(a[0] @ b[0]) / (4 * math.pi) ** 0.5
    )


def test_gaunt_coefficients_are_sympys():
    sympy_wigner = pytest.importorskip("sympy.physics.wigner")
    for l1, l2, l3 in [(1, 1, 2), (2, 2, 2), (2, 1, 3), (3, 2, 3), (1, 1, 1), (2, 2, 1)]:
        ours = gaunt_coefficients(l1, l2, l3, dtype=DOUBLE)
        for m1, m2, m3 in itertools.product(*(range(-l, l + 1) for l in (l1, l2, l3))):
            # sympy's polar axis is z and its l = 1 are (y, z, x) as ours are (x, y, z) with the polar axis y: the
            # axes are relabelled, the order m = -l to l stays. Its harmonics carry the Condon-Shortley phase.
            sign = (-1) ** (abs(m1) + abs(m2) + abs(m3))
            expected = sign * float(sympy_wigner.real_gaunt(l1, l2, l3, m1, m2, m3))
            assert float(ours[m1 + l1, m2 + l2, m3 + l3]) == pytest.approx(expected, abs=1e-13)


@settings(max_examples=15, deadline=None)
@given(l1=st.integers(0, 4), l2=st.integers(0, 4), seed=st.integers(0, 100))
def test_gaunt_products_are_products_of_functions(l1, l2, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(3, (l + 1) ** 2, dtype=DOUBLE, generator=generator) for l in (l1, l2))
    points = torch.nn.functional.normalize(torch.randn(11, 3, dtype=DOUBLE, generator=generator), dim=-1)
    expected = to_sphere(x, points) * to_sphere(y, points)
    for backend in ("paths", "grid", "fourier", "fourier_direct"):
        z = gaunt_product(x, y, natural(l1), natural(l2), backend=backend)
        torch.testing.assert_close(to_sphere(z, points), expected, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(gaunt_product_of_many([x, y]), z, atol=1e-12, rtol=1e-10)
    cube = gaunt_product_of_many([x, y, x])
    torch.testing.assert_close(to_sphere(cube, points), expected * to_sphere(x, points), atol=1e-11, rtol=1e-9)


def test_the_grid_is_the_smallest_exact_one():
    for l in (1, 2, 4):
        x, y = torch.randn(2, 5, (l + 1) ** 2, dtype=DOUBLE)
        exact = gaunt_product(x, y, natural(l), natural(l), backend="fourier")
        heights, angles = 2 * l + 1, 4 * l + 1
        points, weights = sphere_grid(4 * l, dtype=DOUBLE)
        assert len(points) == heights * angles

        def on(points, weights, x=x, y=y, l=l):
            return from_sphere(to_sphere(x, points) * to_sphere(y, points), 2 * l, points, weights)

        assert float((on(points, weights) - exact).abs().max()) < 1e-13 * float(exact.abs().max()) + 1e-13
        coarse, coarse_weights = sphere_grid(4 * l - 2, dtype=DOUBLE)
        assert float((on(coarse, coarse_weights) - exact).abs().max()) > 1e-6


# --- the fields' coefficients, by formulas of which the code knows nothing ---


def test_gaunt_coefficients_of_paths_follow_the_closed_form():
    sympy_wigner = pytest.importorskip("sympy.physics.wigner")
    product = GauntProduct(natural(4), natural(4), weights=False)
    for i, j, k in product._triples():
        l3 = product.irreps_out[k][1].l
        three_j = abs(float(sympy_wigner.wigner_3j(i, j, l3, 0, 0, 0)))
        expected = math.sqrt((2 * i + 1) * (2 * j + 1) * (2 * l3 + 1) / (4 * math.pi)) * three_j
        assert float(product.coefficients(i, j, k)) == pytest.approx(expected, abs=1e-12)


def test_matrix_coefficients_of_paths_are_6j_symbols():
    sympy_wigner = pytest.importorskip("sympy.physics.wigner")
    for t in (2, 3):
        product = MatrixProduct(natural(3), natural(3), weights=False, t=t)
        for i, j, k in product._triples():
            l3 = product.irreps_out[k][1].l
            expected = abs(float(sympy_wigner.wigner_6j(i, j, l3, t, t, t))) if l3 <= 2 * t else 0.0
            assert abs(float(product.coefficients(i, j, k).sum())) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "name, spins, factor", [("cross", (1, 1, 1), 6.0), ("dot", (1, 1, 0), 3.0), ("scalar", (0, 1, 1), 3.0)]
)
def test_vector_signal_coefficients_are_9j_symbols(name, spins, factor):
    sympy_wigner = pytest.importorskip("sympy.physics.wigner")
    product = VectorSignalProduct(natural(2), natural(2), coupling=(name,))
    seen = 0
    for i, j, k in product._triples():
        slots = product._slots1[i], product._slots2[j], product._slots3[k]
        table = product.coefficients(i, j, k)
        for (a, first), (b, second), (c, third) in itertools.product(*(enumerate(each) for each in slots)):
            if (first.field.rank, second.field.rank, third.field.rank) != spins:
                continue
            ls, js = [s.l for s in (first, second, third)], [s.irrep.l for s in (first, second, third)]
            expected = math.sqrt(factor * math.prod((2 * l + 1) * (2 * m + 1) for l, m in zip(ls, js)) / (4 * math.pi))
            expected *= abs(float(sympy_wigner.wigner_3j(*ls, 0, 0, 0)))
            nine = float(sympy_wigner.wigner_9j(*(value for row in zip(ls, spins, js) for value in row), prec=64))
            allowed = first.field.sign * second.field.sign == third.field.sign
            wanted = expected * abs(nine) if allowed else 0.0
            if name == "cross":  # with rows (l, 1, j) the rule holds with its sign
                assert float(table[a, b, c]) == pytest.approx(expected * nine * allowed, abs=1e-11)
            assert abs(float(table[a, b, c])) == pytest.approx(wanted, abs=1e-11)
            seen += wanted > 0
    assert seen > 10


def test_matrices_of_spin_1_are_vector_algebra():
    # Vectors are the generators of so(3), scalars multiples of the identity.
    a, b = torch.randn(2, 4, 3, dtype=DOUBLE)
    options = {"t": 1, "dtype": DOUBLE, "weights": False}
    ab, ba = (MatrixProduct("1o", "1o", "1e", **options)(*pair) for pair in ((a, b), (b, a)))
    ratio = (ab - ba) / torch.linalg.cross(a, b)
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    assert abs(float(ratio[0, 0])) > 0.1
    one = torch.ones(4, 1, dtype=DOUBLE)
    scaled = MatrixProduct("0e", "1o", "1o", **options)(one, a) / a
    torch.testing.assert_close(scaled, scaled[0, 0].expand_as(scaled))


def test_matrix_products_are_associative():
    # In the basis in which embedding and reading out are inverse to each other: sqrt(2l + 1) times the coefficients.
    irreps = Irreps("0e+1e+2e+3e+4e")
    scale = torch.cat([torch.full((irrep.dim,), irrep.dim**0.5, dtype=DOUBLE) for _, irrep in irreps])
    x, y, z = torch.randn(3, 6, irreps.dim, dtype=DOUBLE)
    product = MatrixProduct(irreps, irreps, irreps, t=2, weights=False, dtype=DOUBLE)

    def times(a, b):
        return scale * product(scale * a, scale * b)

    torch.testing.assert_close(times(times(x, y), z), times(x, times(y, z)), atol=1e-11, rtol=1e-9)
    one = torch.zeros(6, irreps.dim, dtype=DOUBLE)
    one[:, 0] = 5**0.5
    torch.testing.assert_close(times(one, x), x, atol=1e-12, rtol=1e-9)


# --- one engine, several ways ---


@pytest.mark.parametrize("kind", FIELD_PRODUCTS)
def test_field_products_are_clebsch_gordan_products_of_their_path_weights(kind):
    product = kind(IN1, IN2, OUT, channels=5, dtype=DOUBLE)
    x, y = features(product, 6)
    torch.testing.assert_close(product(x, y), product.to_clebsch_gordan()(x, y), atol=1e-12, rtol=1e-9)
    own = "matrices" if kind is MatrixProduct else "grid"
    paths, fields = (kind(IN1, IN2, OUT, channels=5, backend=backend, dtype=DOUBLE) for backend in ("paths", own))
    paths.load_state_dict(product.state_dict())
    fields.load_state_dict(product.state_dict())
    torch.testing.assert_close(paths(x, y), fields(x, y), atol=1e-12, rtol=1e-9)
    irreps = natural(3)
    paths, fields = (kind(irreps, irreps, weights=False, backend=backend, dtype=DOUBLE) for backend in ("paths", own))
    x, y = features(paths, 6)
    torch.testing.assert_close(paths(x, y), fields(x, y), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("kind", FIELD_PRODUCTS)
def test_weights_from_outside_are_those_of_the_second_input(kind):
    own = kind(IN1, IN2, OUT, channels=3, dtype=DOUBLE)
    given = kind(IN1, IN2, OUT, channels=3, shared_weights=False, dtype=DOUBLE)
    given.load_state_dict({name: value for name, value in own.state_dict().items() if name != "weight_in2"})
    x, y = features(own, 4)
    # Outside weights are unit normal; the layer's own start scaled by the multiplicity.
    scales = torch.cat([
        torch.full((len(slots) * m * 3,), m**0.5, dtype=DOUBLE) for slots, (m, _) in zip(own._slots2, own.irreps_in2)
    ])  # fmt: skip
    weight = (own.weight_in2 * scales).expand(4, -1)
    torch.testing.assert_close(given(x, y, weight), own(x, y), atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("kind", FIELD_PRODUCTS)
def test_products_without_weights_pair_channels(kind):
    irreps = Irreps.spherical_harmonics(2)
    single = kind(irreps, irreps, weights=False, dtype=DOUBLE)
    several = kind(4 * irreps, irreps, weights=False, dtype=DOUBLE)
    x, y = features(several, 3)
    z = several(x, y)
    for channel in range(4):
        one = torch.cat([part.view(3, 4, -1)[:, channel] for part in x.split(several.irreps_in1.sizes, -1)], -1)
        expected = single(one, y)
        found = torch.cat([part.view(3, 4, -1)[:, channel] for part in z.split(several.irreps_out.sizes, -1)], -1)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)


def test_functional_forms_are_the_products_without_weights():
    irreps = natural(2)
    x, y = torch.randn(2, 3, 9, dtype=DOUBLE)
    for function, kind in ((matrix_product, MatrixProduct), (vector_signal_product, VectorSignalProduct)):
        torch.testing.assert_close(
            function(x, y, irreps, "0e+1o+2e"), kind(irreps, irreps, weights=False, dtype=DOUBLE)(x, y)
        )


@pytest.mark.parametrize("kind", [ClebschGordanProduct, *FIELD_PRODUCTS])
def test_leading_axes_broadcast(kind):
    mode = {"mode": "fully_connected"} if kind is ClebschGordanProduct else {}
    product = kind("2x0e+2x1o", "0e+1o", "2x0e+2x1o", **mode, dtype=DOUBLE)
    x, y = torch.randn(5, 1, 8, dtype=DOUBLE), torch.randn(3, 4, dtype=DOUBLE)
    z = product(x, y)
    assert z.shape == (5, 3, 8)
    torch.testing.assert_close(z[2, 1], product(x[2, 0], y[1]))
    assert product(x[:0], y).shape == (0, 3, 8)


@pytest.mark.parametrize("kind", [ClebschGordanProduct, *FIELD_PRODUCTS])
def test_forces_can_be_trained_on(kind):
    mode = {"mode": "fully_connected"} if kind is ClebschGordanProduct else {}
    product = kind("2x0e+1x1o", "0e+1o", "1x0e+1x1o", **mode, dtype=DOUBLE)
    x, y = features(product, 2)
    x, y = x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(product, (x, y))
    assert torch.autograd.gradgradcheck(product, (x, y))


def test_harmonics_differentiate_twice_at_the_poles_too():
    points = torch.tensor([[0.0, 1.0, 0.0], [0.0, -2.0, 0.0], [0.3, 0.1, -0.4]], dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda p: spherical_harmonics(3, p), (points,))


def test_outputs_start_with_variance_1():
    for kind in FIELD_PRODUCTS:
        totals = []
        for seed in range(12):
            torch.manual_seed(seed)
            product = kind("8x0e+8x1o+8x2e", "0e+1o+2e", "8x0e+8x1o+8x2e")
            totals.append(product(product.irreps_in1.randn(50), product.irreps_in2.randn(50)).detach().var())
        assert float(torch.stack(totals).mean()) == pytest.approx(1.0, rel=0.15)


# --- replacing trained layers ---


def test_what_is_lost_is_said():
    layer = ClebschGordanProduct("4x0e+4x1o", "0e+1o", "4x0e+4x1o+4x1e", "fully_connected")
    with pytest.warns(UserWarning, match="cannot make 1 interactions of ClebschGordanProduct: 1o x 1o -> 1e"):
        GauntProduct.like(layer)
    with pytest.raises(ExpressivityError, match="1o x 1o -> 1e"):
        GauntProduct.like(layer, lost="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GauntProduct.like(layer, lost="ignore")
        assert isinstance(VectorSignalProduct.like(layer), VectorSignalProduct)


@pytest.mark.parametrize("kind", FIELD_PRODUCTS)
def test_trained_products_are_found_again_with_enough_channels(kind):
    layer = ClebschGordanProduct("3x0e+3x1o", "0e+1o+2e", "3x0e+3x1o", "fully_connected", dtype=DOUBLE)
    few, many = (kind.from_trained(layer, channels=channels) for channels in (2, 18))
    assert many.relative_error < 1e-4
    assert few.relative_error > 10 * many.relative_error
    x, y = features(layer, 50)
    torch.testing.assert_close(many(x, y), layer(x, y), atol=1e-2, rtol=1e-3)
    left = (few.to_clebsch_gordan().weight - torch.cat([w.flatten() for w in layer.path_weights()])).norm()
    whole = torch.cat([w.flatten() for w in layer.path_weights()]).norm()
    assert few.relative_error == pytest.approx(float(left / whole), rel=1e-6)


def test_e3nn_layers_can_be_replaced_by_any_product():
    o3 = pytest.importorskip("e3nn.o3")
    peer = o3.FullyConnectedTensorProduct("4x0e+4x1o", "0e+1o", "4x0e+4x1o").double().eval()
    for kind in (ClebschGordanProduct, *FIELD_PRODUCTS):
        made = kind.like(peer)
        assert not made.training
        assert next(made.parameters()).dtype == DOUBLE
        x, y = features(made, 3)
        assert made(x, y).shape == peer(x, y).shape


def test_layers_that_cannot_be_replaced_are_refused():
    with pytest.raises(TypeError, match="tensor product of e3nn or of Lathe, got Linear"):
        ClebschGordanProduct.like(nn.Linear(2, 2))
    full = ClebschGordanProduct("0e", "0e")
    with pytest.raises(ValueError, match="no weights"):
        GauntProduct.like(full)
    outside = ClebschGordanProduct("0e", "0e", "0e", "fully_connected", shared_weights=False)
    with pytest.raises(ValueError, match="weights from outside"):
        GauntProduct.like(outside)
    o3 = pytest.importorskip("e3nn.o3")
    with pytest.raises(ValueError, match="'uvw' or 'uvu' with weights or 'uvuv' without, got uuu"):
        ClebschGordanProduct.like(o3.ElementwiseTensorProduct("2x0e", "2x0e"))


# --- bad input ---


@pytest.mark.parametrize(
    "text, message",
    [
        ("1x-1e", "l >= 0, got '1x-1e'"),
        ("2x1", "parity e or o"),
        ("3x1q", "parity"),
        ("1o+", "written like"),
        ("x1o", "written"),
    ],
)
def test_irreps_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Irreps(text)


def test_irreps_are_read_counted_and_joined():
    irreps = Irreps("8x0e + 4x1o+1o")
    assert (irreps.dim, irreps.lmax, irreps.num_irreps, len(irreps)) == (23, 1, 13, 3)
    assert [each.stop for each in irreps.slices()] == [8, 20, 23]
    assert irreps.count("1o") == 5
    assert irreps.simplify() == Irreps("8x0e+5x1o")
    assert "1o" in irreps
    assert "1e" not in irreps
    assert Irreps([(8, "0e"), (4, (1, -1)), (1, Irrep(1, -1))]) == irreps
    assert str(2 * Irreps("0e+1o") + "1e") == "2x0e+2x1o+1x1e"
    assert (str(irreps[:1]), Irreps(Irrep(2, 1)).dim, Irreps("").dim) == ("8x0e", 5, 0)
    with pytest.raises(ValueError, match="lmax"):
        _ = Irreps("").lmax
    with pytest.raises(ValueError, match="pairs"):
        Irreps([3])
    with pytest.raises(ValueError, match="orthogonal"):
        irreps.transformation(torch.ones(3, 3))


def test_arguments_that_cannot_work_are_refused(unchecked):
    with pytest.raises(ValueError, match="mode must be"):
        ClebschGordanProduct("0e", "0e", mode="uvw")
    with pytest.raises(ValueError, match="irreps_out must be given"):
        ClebschGordanProduct("0e", "0e", mode="fully_connected")
    with pytest.raises(ValueError, match="sparse"):
        ClebschGordanProduct("0e", "0e", "0e", "fully_connected", sparse=True)
    with pytest.raises(ValueError, match=r"parity and the triangle.*1o x 0e -> 1e"):
        ClebschGordanProduct("1o", "0e", "1e", "fully_connected", paths=[(0, 0, 0)])
    with pytest.raises(ValueError, match="2 channels in the mode 'channelwise'"):
        ClebschGordanProduct("2x0e", "0e", "3x0e", "channelwise", paths=[(0, 0, 0)])
    with pytest.raises(ValueError, match="backend must be one of"):
        MatrixProduct("0e", "0e", "0e", backend="fourier")
    with pytest.raises(ValueError, match="t must be at least 2"):
        MatrixProduct("3o", "0e", "3o", t=1)
    with pytest.raises(ValueError, match="coupling"):
        VectorSignalProduct("0e", "0e", "0e", coupling=("wedge",))
    with pytest.raises(ValueError, match="one multiplicity each"):
        GauntProduct("2x0e+3x1o", "0e", weights=False)
    with pytest.raises(ValueError, match=r"degrees must be >= 0.*\(1, 1, 3\)"):
        clebsch_gordan(1, 1, 3)
    with pytest.raises(ValueError, match=r"\(L \+ 1\)\*\*2 components.*\(5,\)"):
        gaunt_product_of_many([torch.zeros(5)])
    with pytest.raises(ValueError, match=r"3 components.*\(4,\)"):
        spherical_harmonics(2, torch.zeros(4))
    product = ClebschGordanProduct("2x0e+1o", "0e", "0e", "fully_connected")
    with pytest.raises(ValueError, match=r"x must have 5 components \(2x0e\+1x1o\).*\(3, 4\)"):
        product(torch.zeros(3, 4), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"weight must be \(2,\), got \(7,\)"):
        product(torch.zeros(3, 5), torch.zeros(3, 1), torch.zeros(7))
    with pytest.raises(ValueError, match="broadcast"):
        product(torch.zeros(3, 5), torch.zeros(2, 1))
    outside = GauntProduct("2x0e", "0e", "0e", shared_weights=False)
    with pytest.raises(ValueError, match=r"weight must be \(\.\.\., 2\), got None"):
        outside(torch.zeros(3, 2), torch.zeros(3, 1))
