"""Equivariant tensor products against e3nn: the same irreps, weights and answer, forward and backward.

e3nn is run as well as it can be: eagerly, as TorchScript, and by `torch.compile`, of which the fastest here is timed
against. Compiling takes it minutes from l_max 5 on (8 minutes for the full product at l_max 6); there TorchScript and
eager mode compete, and the target is as much higher (1.6) as compiling has been seen to help it. Ours runs eagerly, and
where it compiles within seconds (to l_max 2, the full product to 4) by `torch.compile` if that is faster.
"""

from __future__ import annotations

import math
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import Pair, PeerMissing
from torch import Tensor, nn

from lathe.nn.equivariant_tensor_products import (
    ClebschGordanProduct,
    FieldProduct,
    GauntProduct,
    Irreps,
    MatrixProduct,
    VectorSignalProduct,
    spherical_harmonics,
)

try:
    import e3nn
    from e3nn import o3
except ImportError as error:
    raise PeerMissing("pip install --no-deps e3nn==0.6.0 opt_einsum_fx==0.1.4") from error

COMPILED_PEER = 4
Maker = Callable[[], nn.Module]


def pairs() -> list[Pair]:
    """Products with a weight for each path, then those with fewer."""
    torch.manual_seed(0)
    found = []
    for l in range(1, 7):
        found += [full(l), fully_connected(l), channelwise(l)]
    for kind in (GauntProduct, MatrixProduct, VectorSignalProduct):
        found += [through_fields(kind, l) for l in range(1, 7)]
    return [*found, harmonics(6)]


def harmonic(l: int, multiplicity: int = 1) -> Irreps:
    return multiplicity * Irreps.spherical_harmonics(l)


def full(l: int) -> Pair:
    """Every path apart, one channel, 1000 samples."""
    irreps = harmonic(l)
    ours = ClebschGordanProduct(irreps, irreps)
    return pair(
        f"full product, l_max {l}",
        l,
        ours,
        lambda: o3.FullTensorProduct(str(irreps), str(irreps)),
        batch=1000,
        compiled_to=4,
    )


def fully_connected(l: int) -> Pair:
    """16 channels with harmonics, as in a convolution over edges with shared weights."""
    irreps, edge = harmonic(l, 16), harmonic(l)

    def peer() -> nn.Module:
        return o3.FullyConnectedTensorProduct(str(irreps), str(edge), str(irreps))

    ours = ClebschGordanProduct.from_trained(peer())
    return pair(f"fully connected product, 16 channels, l_max {l}", l, ours, peer, weight=ours.weight)


def channelwise(l: int) -> Pair:
    """16 channels with harmonics and weights for each edge, as in NequIP and MACE."""
    irreps, edge = harmonic(l, 16), harmonic(l)
    ours = ClebschGordanProduct(irreps, edge, edge, "channelwise", shared_weights=False)

    def peer() -> nn.Module:
        paths = [(path.i1, path.i2, path.out, "uvu", True) for path in ours.paths]
        return o3.TensorProduct(str(irreps), str(edge), str(ours.irreps_out), paths, shared_weights=False)

    weight = torch.randn(256, ours.weight_numel, requires_grad=True)
    return pair(f"channelwise product, 16 channels, weights by sample, l_max {l}", l, ours, peer, weight=weight)


def through_fields(kind: type[FieldProduct], l: int) -> Pair:
    """A product without weights; e3nn makes the same by adding up its paths with the right constants."""
    irreps = harmonic(l)
    ours = kind(irreps, irreps, weights=False)  # type: ignore[call-arg]

    def peer() -> nn.Module:
        instructions, signs = [], []
        for i, j, k in ours._triples():
            value = float(ours.coefficients(i, j, k).sum())
            if value:
                instructions.append((i, j, k, "uuu", False, value**2))
                signs.append(math.copysign(1.0, value))
        made = o3.TensorProduct(
            *(str(each) for each in (irreps, irreps, ours.irreps_out)),
            instructions,
            irrep_normalization="none",
            path_normalization="none",
            compile_left_right=False,
        )
        # e3nn takes the root of a path's weight, which has no sign: write it into the instructions.
        signed = [ins._replace(path_weight=sign * ins.path_weight) for ins, sign in zip(made.instructions, signs)]
        defaults = e3nn.get_optimization_defaults()
        from e3nn.o3._tensor_product._codegen import codegen_tensor_product_left_right

        graph = codegen_tensor_product_left_right(
            made.irreps_in1, made.irreps_in2, made.irreps_out, signed, True, defaults["specialized_code"], True
        )
        made._codegen_register({"_compiled_main_left_right": graph})
        return made

    name = {GauntProduct: "Gaunt", MatrixProduct: "matrix", VectorSignalProduct: "vector-signal"}[kind]
    return pair(f"{name} product, l_max {l}", l, ours, peer, batch=1000, compile_peer=l <= 2)


def harmonics(l: int) -> Pair:
    """Of 10,000 vectors."""
    vectors = torch.randn(10_000, 3, requires_grad=True)
    degrees = list(range(l + 1))
    seed = torch.randn(10_000, (l + 1) ** 2)
    return Pair(
        f"spherical harmonics to degree {l}, forward and backward",
        lambda: gradients(spherical_harmonics(l, vectors), [vectors], seed),
        lambda: gradients(o3.spherical_harmonics(degrees, vectors, True, "integral"), [vectors], seed),
        f"e3nn {e3nn.__version__}",
        tolerance=1e-3,
    )


def gradients(result: Tensor, inputs: list[Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    return (result, *torch.autograd.grad(result, inputs, seed))


def pair(
    title: str,
    l: int,
    ours: Any,
    peer: Maker,
    *,
    batch: int = 256,
    weight: Tensor | None = None,
    compiled_to: int = 2,
    compile_peer: bool = True,
) -> Pair:
    """Ours at its best against e3nn at its best: the answer, and the gradients of inputs and weights."""
    x = torch.randn(batch, ours.irreps_in1.dim, requires_grad=True)
    y = torch.randn(batch, ours.irreps_in2.dim, requires_grad=True)
    seed = torch.randn(batch, ours.irreps_out.dim)
    learnt = [x, y] if weight is None else [x, y, weight]

    def step(product: Callable[..., Tensor]) -> Callable[[], Any]:
        given = () if weight is None else (weight,)
        return lambda: gradients(product(x, y, *given), learnt, seed)

    mine = {"eager": step(ours)}
    if l <= compiled_to:
        mine["compiled"] = step(compiled(ours))
    theirs = {mode: step(in_mode(peer, mode)) for mode in ("eager", "script")}
    if compile_peer and l <= COMPILED_PEER:
        theirs["compiled"] = step(compiled(in_mode(peer, "eager")))
    best, best_peer = (min(ways, key=lambda mode: seconds(ways[mode])) for ways in (mine, theirs))
    behind = l > COMPILED_PEER or not compile_peer
    return Pair(
        f"{title}, {batch} samples, forward and backward ({best})",
        mine[best],
        theirs[best_peer],
        f"e3nn {e3nn.__version__} ({best_peer})",
        target=1.6 if behind else 1.0,
        tolerance=1e-4,
    )


def in_mode(peer: Maker, mode: str) -> nn.Module:
    before = e3nn.get_optimization_defaults()["jit_mode"]
    e3nn.set_optimization_defaults(jit_mode=mode)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return peer()
    finally:
        e3nn.set_optimization_defaults(jit_mode=before)


def compiled(product: nn.Module) -> Callable[..., Tensor]:
    def call(*inputs: Tensor) -> Tensor:
        return product(*inputs)

    # Compiled graphs are kept by code object, eight of each: with a shared one, the ninth product would run eagerly.
    own = types.FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)
    return torch.compile(own)


def seconds(function: Callable[[], Any], repetitions: int = 9) -> float:
    times = []
    for _ in range(repetitions + 2):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return sorted(times[2:])[repetitions // 2]
