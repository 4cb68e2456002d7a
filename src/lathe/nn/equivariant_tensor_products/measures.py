"""What a tensor product can express, what it costs, and which is the cheapest that expresses what is needed.

Expressivity is the dimension of the set of bilinear maps that a product and the linear maps around it can make;
interactability asks which irreps can meet in which at all. Xie et al. 2025 compare products per unit of these.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lathe.core.modes import evaluating
from lathe.core.size import saved_bytes
from lathe.nn.equivariant_tensor_products.clebsch_gordan import ClebschGordanProduct
from lathe.nn.equivariant_tensor_products.field_product import ExpressivityError, FieldProduct
from lathe.nn.equivariant_tensor_products.irreps import Irrep, Irreps, IrrepsLike
from lathe.nn.equivariant_tensor_products.products import GauntProduct, MatrixProduct, VectorSignalProduct

__all__ = [
    "Cost",
    "InteractionReport",
    "cheapest_product",
    "cost",
    "expressivity",
    "interaction_report",
    "interactions",
]

Triple = tuple[Irrep, Irrep, Irrep]


@dataclass(frozen=True)
class Cost:
    """Of one forward pass.

    Args:
        flops: of the products of matrices (two for a multiplication with an addition).
        saved_bytes: what autograd keeps for the backward pass.
        seconds: the median of a few forward and backward passes here.
    """

    flops: int
    saved_bytes: int
    seconds: float


def interactions(product: nn.Module) -> set[Triple]:
    """The triples of irreps (in1, in2, out) that a product of Lathe or of e3nn can couple."""
    if isinstance(product, (ClebschGordanProduct, FieldProduct)):
        return product.interactions()
    return ClebschGordanProduct.like(product).interactions()


def expressivity(product: ClebschGordanProduct | FieldProduct, *, seed: int = 0) -> int:
    """The dimension of the set of bilinear maps Lin_out o T o (Lin_1, Lin_2): its Jacobian's rank at random weights.

    For a product with weights, these are its own. For one without, a number for each term of the irreps before and
    after, and one channel. A Clebsch-Gordan product has as many as there are weights, or paths between channels.
    """
    if isinstance(product, ClebschGordanProduct):
        if product.mode == "full":
            return sum(product.irreps_out[path.out][0] for path in product.paths if path.scale)
        return sum(
            weights.numel() for path, weights in zip(product.paths, product.path_weights(_any(product))) if path.scale
        )
    generator = torch.Generator().manual_seed(seed)
    sides = (product._slots1, product._slots2, product._slots3)
    irreps = (product.irreps_in1, product.irreps_in2, product.irreps_out)
    shapes = [
        (len(slots), m, product.channels) if product.weights else (1, 1, 1)
        for each, of in zip(sides, irreps)
        for slots, (m, _) in zip(each, of)
    ]
    counts = [len(each) for each in sides]
    point = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    slots_of = [len(slots) for each in sides for slots in each]

    def weights(*parts: Tensor) -> Tensor:
        # Without weights, all embeddings of a term share one number.
        wide = [part if product.weights else part.expand(count, 1, 1) for part, count in zip(parts, slots_of)]
        ends = (counts[0], counts[0] + counts[1])
        factors = (wide[: ends[0]], wide[ends[0] : ends[1]], wide[ends[1] :])
        found = product.path_weights(cast(Any, factors))
        return torch.cat([each.flatten() for each in found]) if found else parts[0].new_zeros(0)

    jacobian = torch.autograd.functional.jacobian(weights, tuple(point), vectorize=True)
    matrix = torch.cat([part.flatten(1) if part.ndim > 1 else part[:, None] for part in cast(Any, jacobian)], 1)
    if matrix.numel() == 0:
        return 0
    # Rows of very different size must not hide each other: the rank does not change when they are scaled.
    matrix = matrix / matrix.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-9))


def cost(product: nn.Module, batch: int, *, repetitions: int = 5) -> Cost:
    """What a forward pass of `batch` random samples costs (and, for the time, its backward pass).

    Raises:
        ValueError: where batch is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    inputs = _example(product, batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        product(*inputs)
    kept = saved_bytes(lambda: product(*inputs), without=[*product.parameters(), *product.buffers()])
    times = []
    for _ in range(repetitions + 1):
        began = time.perf_counter()
        result = product(*inputs)
        result.backward(
            torch.ones_like(result), inputs=[t for t in (*inputs, *product.parameters()) if t.requires_grad]
        )
        if result.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    for parameter in product.parameters():
        parameter.grad = None
    return Cost(counter.get_total_flops(), kept, statistics.median(times[1:]))


def cheapest_product(
    irreps_in1: IrrepsLike,
    irreps_in2: IrrepsLike,
    irreps_out: IrrepsLike,
    *,
    needed: Iterable[tuple[Any, Any, Any]] | None = None,
    batch: int = 256,
    **options: Any,
) -> ClebschGordanProduct | FieldProduct:
    """The product, fully connected, that makes the needed interactions in the least time on this machine.

    Args:
        needed: triples of irreps (in1, in2, out), such as ("1o", "1o", "1e"); None: all that the irreps allow.
        batch: samples of the timing, of forward and backward pass.
        options: `channels`, `shared_weights`, `device`, `dtype` of the field products, as far as they have them.

    Raises:
        ExpressivityError: where a needed triple is none of these irreps or breaks parity or the triangle.
    """
    channels = options.pop("channels", None)
    exact = ClebschGordanProduct(irreps_in1, irreps_in2, irreps_out, "fully_connected", **options)
    possible = exact.interactions()
    wanted = (
        possible if needed is None else {cast(Triple, tuple(Irrep.parse(each) for each in triple)) for triple in needed}
    )
    if wanted - possible:
        a, b, c = min(wanted - possible)
        raise ExpressivityError(f"needed must hold interactions that the irreps allow, got {a} x {b} -> {c}")
    found: list[ClebschGordanProduct | FieldProduct] = [exact]
    for kind in (GauntProduct, MatrixProduct, VectorSignalProduct):
        product = kind(irreps_in1, irreps_in2, irreps_out, channels=channels, **options)
        if wanted <= product.interactions():
            found.append(product)
    return min(found, key=lambda product: cost(product, batch).seconds)


@dataclass(frozen=True)
class InteractionReport:
    """What the tensor products of a network can couple, and what they do couple on an example.

    Args:
        possible: by name of the product: the triples that its irreps allow.
        expressed: those that the product can make.
        active: those whose two inputs are not zero on the example, structurally or by chance.
    """

    possible: dict[str, set[Triple]]
    expressed: dict[str, set[Triple]]
    active: dict[str, set[Triple]]

    def __str__(self) -> str:
        lines = []
        for name, possible in self.possible.items():
            lost, idle = possible - self.expressed[name], self.expressed[name] - self.active[name]
            lines.append(
                f"{name or '(root)'}: {len(possible)} interactions, {len(lost)} lost, {len(idle)} without input"
            )
            for what, triples in (("lost", lost), ("without input", idle)):
                if triples:
                    lines.append(f"  {what}: " + ", ".join(f"{a} x {b} -> {c}" for a, b, c in sorted(triples)))
        return "\n".join(lines)


@torch.no_grad()
def interaction_report(model: nn.Module, *example: Any, tolerance: float = 1e-6) -> InteractionReport:
    """Runs a network on an example and tells for each tensor product (of Lathe or e3nn) which interactions are used.

    Args:
        example: the arguments of the network.
        tolerance: an input irrep counts as zero below this part of the feature's largest component.
    """
    found: dict[str, tuple[set[Triple], set[Triple], set[Triple]]] = {}
    handles = []

    def listen(name: str, module: nn.Module) -> Any:
        able = interactions(module)
        in1, in2, out = (Irreps(cast(Any, getattr(module, f"irreps_{which}"))) for which in ("in1", "in2", "out"))
        possible = {(a, b, c) for _, a in in1 for _, b in in2 for _, c in out if c in a * b}
        found[name] = (possible, able, set())

        def hook(_: nn.Module, arguments: Sequence[Any]) -> None:
            alive = [_alive(feature, irreps, tolerance) for feature, irreps in zip(arguments, (in1, in2))]
            found[name][2].update(triple for triple in able if triple[0] in alive[0] and triple[1] in alive[1])

        return module.register_forward_pre_hook(hook)

    try:
        for name, module in model.named_modules():
            if isinstance(module, (ClebschGordanProduct, FieldProduct)) or hasattr(module, "instructions"):
                handles.append(listen(name, module))
        with evaluating(model):
            model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return InteractionReport(*({name: parts[at] for name, parts in found.items()} for at in range(3)))


def _alive(feature: Tensor, irreps: Irreps, tolerance: float) -> set[Irrep]:
    largest = feature.abs().max().clamp(min=1e-30) if feature.numel() else torch.ones(())
    return {
        irrep
        for (multiplicity, irrep), place in zip(irreps, irreps.slices())
        if multiplicity and feature.numel() and bool(feature[..., place].abs().max() > tolerance * largest)
    }


def _any(product: ClebschGordanProduct) -> Tensor:
    return torch.ones(product.weight_numel)


def _example(product: Any, batch: int) -> list[Tensor]:
    like = next((t for t in (*product.parameters(), *product.buffers()) if t.is_floating_point()), torch.zeros(()))
    sizes = [product.irreps_in1.dim, product.irreps_in2.dim]
    numel = product.weight2_numel if isinstance(product, FieldProduct) else product.weight_numel
    if isinstance(product, FieldProduct):
        sizes += [numel] * (numel > 0)
    else:
        sizes += [numel] * (numel > 0 and not product.shared_weights)
    return [torch.randn(batch, size, dtype=like.dtype, device=like.device).requires_grad_() for size in sizes]
