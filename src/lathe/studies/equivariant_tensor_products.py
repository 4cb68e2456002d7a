"""What do fast equivariant tensor products give up, and is what is left still faster by the piece?"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import altair as alt
import torch
from torch import Tensor, nn
from torch.nn import functional

from lathe.nn import equivariant_tensor_products as tp
from lathe.nn.equivariant_tensor_products import Irreps
from lathe.studies.engine import (
    Measurement,
    NotAtThisScale,
    Run,
    Setting,
    Study,
    at_least,
    at_most,
    equals,
)

study = Study(
    "equivariant-tensor-products",
    title="The Price of Freedom: Exploring Expressivity and Runtime Tradeoffs in Equivariant Tensor Products",
    authors="Xie, Daigavane, Kotak, Smidt",
    year=2025,
    arxiv="2506.13523",
    area="nn",
    module="lathe.nn.equivariant_tensor_products",
    summary="""Every tensor product of E(3)-equivariant networks behind one interface, in the irreps notation of e3nn
    and faster: Clebsch-Gordan, Gaunt, matrix and vector-signal products. Says what each can express, what it loses and
    what it costs, so that you take the cheapest that makes the interactions you need.""",
    example="""
import torch
from lathe.nn.equivariant_tensor_products import ClebschGordanProduct, GauntProduct, expressivity, spherical_harmonics

features, edges = torch.randn(10, 64), spherical_harmonics(2, torch.randn(10, 3))
exact = ClebschGordanProduct("16x0e + 16x1o", "0e + 1o + 2e", "16x0e + 16x1o + 16x1e", "fully_connected")
fast = GauntProduct.like(exact, lost="ignore", channels=16)           # no 1o x 1o -> 1e: it has no cross product
assert fast(features, edges).shape == exact(features, edges).shape == (10, 112)
assert len(exact.interactions() - fast.interactions()) == 1
assert expressivity(GauntProduct("0e+1o+2e", "0e+1o+2e", weights=False)) == 9                # of 19 paths
""",
    job="build",
    scales={
        "smoke": Setting(
            seeds=1,
            degrees=(1, 2, 3),
            triangles=3,
            ranks=(1, 2, 3),
            timed=(2, 4),
            batch=200,
            rounds=5,
            layers=3,
            multiplicity=2,
            steps=15,
            lr=5e-3,
            points=12,
            channels=4,
            l_max=2,
        ),
        "desk": Setting(
            degrees=tuple(range(1, 9)),
            triangles=6,
            ranks=tuple(range(1, 7)),
            timed=(2, 4, 6, 8),
            batch=1000,
            rounds=30,
            layers=3,
            multiplicity=4,
            steps=400,
            lr=5e-3,
            points=48,
            channels=16,
            l_max=4,
        ),
        "full": Setting(
            degrees=tuple(range(1, 9)),
            triangles=6,
            ranks=tuple(range(1, 7)),
            timed=(2, 4, 6, 8),
            batch=10_000,
            rounds=100,
            layers=3,
            multiplicity=8,
            steps=1000,
            lr=1e-3,
            points=512,
            channels=64,
            l_max=4,
        ),
    },
)

natural = Irreps.spherical_harmonics
PRODUCTS = {"Gaunt": tp.GauntProduct, "matrix": tp.MatrixProduct, "vector-signal": tp.VectorSignalProduct}


@study.claim(
    "C1",
    "The Gaunt product is the same on a sphere grid, on the torus, and as a weighted sum of Clebsch-Gordan products",
    paper="sections 3 and 4",
    kind="exact",
    holds=at_most(1e-12),
    unit="largest difference over the largest component (float64)",
)
def three_forms_agree(run: Run) -> Measurement:
    table: list[dict[str, Any]] = []
    for l in run.setting.degrees:
        run.progress(f"degree {l}", l, max(run.setting.degrees))
        generator = run.generator(l)
        x, y = (natural(l).randn(8, generator=generator, dtype=torch.float64) for _ in range(2))
        expected = weighted_sum(x, y, l)
        for name in ("grid", "fourier", "fourier_direct"):
            z = tp.gaunt_product(x, y, natural(l), natural(l), backend=name)
            error = float((z - expected).abs().max() / expected.abs().max())
            table.append({"l": l, "form": FORMS[name], "error": max(error, 1e-17)})
    run.figure(
        alt.Chart(alt.Data(values=table)).mark_line(point=True).encode(
            x=alt.X("l:O", title="highest degree of both inputs", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("error:Q", title="difference to the weighted sum", scale=alt.Scale(type="log"), axis=EXPONENTS),
            color=alt.Color("form:N", title=None),
        ).properties(width="container", height=260)
    )  # fmt: skip
    return Measurement(max(row["error"] for row in table))


@study.claim(
    "C2",
    "Gaunt products are symmetric and lose every odd interaction; vector signals make them all",
    paper="section 4: the antisymmetric interactions that signals on the sphere cannot express",
    kind="exact",
    holds=at_most(1e-13),
    unit="largest Gaunt coefficient of an odd l1 + l2 + l3, by quadrature",
    also={"triangles reached by vector signals (%)": equals(100.0), "asymmetry of the Gaunt product": at_most(1e-13)},
)
def odd_interactions(run: Run) -> Measurement:
    top = run.setting.triangles
    triangles = [t for t in itertools.product(range(top + 1), repeat=3) if abs(t[0] - t[1]) <= t[2] <= t[0] + t[1]]
    points, weights = tp.sphere_grid(3 * top, dtype=torch.float64)
    values = tp.spherical_harmonics(top, points)
    odd = 0.0
    for l1, l2, l3 in triangles:
        if (l1 + l2 + l3) % 2:
            a, b, c = (values[:, l * l : (l + 1) ** 2] for l in (l1, l2, l3))
            odd = max(odd, float(torch.einsum("p,pi,pj,pk->ijk", weights, a, b, c).abs().max()))
    ways: dict[str, Any] = {
        "Gaunt": tp.GauntProduct(natural(top), natural(top), weights=False),
        "matrix": tp.MatrixProduct(natural(top), natural(top), weights=False),
    }
    for coupling in (("dot",), ("cross",), ("scalar",), ("dot", "cross", "scalar")):
        name = "vector signals: " + (coupling[0] if len(coupling) == 1 else "all")
        ways[name] = tp.VectorSignalProduct(
            natural(top), natural(top), all_irreps(top), coupling=coupling, backend="grid"
        )
    table: list[dict[str, Any]] = []
    for name, product in ways.items():
        reached = {tuple(irrep.l for irrep in triple) for triple in product.interactions()}
        for parity in ("even", "odd"):
            of_parity = [t for t in triangles if sum(t) % 2 == (parity == "odd")]
            share = 100 * sum(t in reached for t in of_parity) / len(of_parity)
            table.append({"product": name, "sum": f"{parity} l1 + l2 + l3", "share": share, "of": len(of_parity)})
    run.figure(
        alt.Chart(alt.Data(values=table)).mark_bar().encode(
            y=alt.Y("product:N", title=None, sort=list(ways)),
            x=alt.X("share:Q", title="interactions that can be made (%)", scale=alt.Scale(domain=[0, 100])),
            yOffset="sum:N",
            color=alt.Color("sum:N", title=None),
            tooltip=["product:N", "sum:N", "share:Q", "of:Q"],
        ).properties(width="container", height=320)
    )  # fmt: skip
    shares = {row["product"]: [r["share"] * r["of"] for r in table if r["product"] == row["product"]] for row in table}
    total = {name: sum(parts) / len(triangles) for name, parts in shares.items()}
    generator = run.generator(0)
    x, y = (natural(top).randn(8, generator=generator, dtype=torch.float64) for _ in range(2))
    both = [tp.gaunt_product(*pair, natural(top), natural(top)) for pair in ((x, y), (y, x))]
    return Measurement(
        odd,
        also={
            "triangles reached by vector signals (%)": total["vector signals: all"],
            "asymmetry of the Gaunt product": float((both[0] - both[1]).abs().max() / both[0].abs().max()),
        }
        | {f"{name} (%)": share for name, share in total.items() if name != "vector signals: all"},
        note=f"{len(triangles)} triangles with l up to {top}; cross alone misses (0, 0, 0); a few 6j symbols vanish by "
        "accident, and the matrix product with them",
    )


@study.claim(
    "C3",
    "Gaunt products span 4L + 1 dimensions, Clebsch-Gordan products (L + 1)(2(L + 1)^2 + 1) / 3",
    paper="table of expressivity: O(L) against O(L^3)",
    kind="exact",
    holds=equals(0.0),
    unit="largest deviation of a rank from its formula",
)
def expressivities(run: Run) -> Measurement:
    table, worst = [], 0
    for l in run.setting.ranks:
        irreps = natural(l)
        ranks = {
            "Clebsch-Gordan": (tp.expressivity(tp.ClebschGordanProduct(irreps, irreps)), paths(l)),
            "Gaunt": (tp.expressivity(tp.GauntProduct(irreps, irreps, weights=False)), 4 * l + 1),
            "Gaunt, outputs to L": (tp.expressivity(tp.GauntProduct(irreps, irreps, irreps, weights=False)), 3 * l + 1),
            "matrix": (tp.expressivity(tp.MatrixProduct(irreps, irreps, weights=False)), 6 * l),
        }
        table += [{"l": l, "product": name, "rank": rank} for name, (rank, _) in ranks.items()]
        worst = max(worst, *(abs(rank - formula) for rank, formula in ranks.values()))
    run.figure(
        alt.Chart(alt.Data(values=table)).mark_line(point=True).encode(
            x=alt.X("l:O", title="highest degree L", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("rank:Q", title="dimensions of bilinear maps", scale=alt.Scale(type="log")),
            color=alt.Color("product:N", title=None, sort=list(ranks)),
        ).properties(width="container", height=260)
    )  # fmt: skip
    return Measurement(
        float(worst),
        note="rank of the Jacobian at random weights; also 3L + 1 where outputs end at L, and 6L, which we find for "
        "the matrix product (it makes both parities)",
    )


@study.claim(
    "C4",
    "On the sphere grid the Gaunt product is far faster than as a convolution on the torus",
    paper="authors' timings, CPU, batch 10,000, L = 8: 33.8 ms against 2292 ms; RTX GPU, L = 7: 0.67 against 6.94 ms",
    holds=at_least(3.0),
    unit="times faster than the direct convolution, worst L from 4 on",
)
def grid_beats_torus(run: Run) -> Measurement:
    table, ratios = [], {}
    for l in run.setting.timed:
        run.progress(f"degree {l}", l, max(run.setting.timed))
        x, y = (natural(l).randn(run.setting.batch, generator=run.generator(s)).to(run.device) for s in range(2))
        products = {
            name: tp.GauntProduct(natural(l), natural(l), weights=False, backend=name, device=run.device)  # type: ignore[arg-type]
            for name in FORMS
        }
        times = time_each(run, {name: partial(product, x, y) for name, product in products.items()})
        table += [{"l": l, "form": FORMS[name], "ms": 1e3 * seconds} for name, seconds in times.items()]
        ratios[l] = (times["fourier_direct"] / times["grid"], times["fourier"] / times["grid"])
    run.figure(
        alt.Chart(alt.Data(values=table)).mark_line(point=True).encode(
            x=alt.X("l:O", title="highest degree L", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("ms:Q", title=f"ms for {run.setting.batch} products", scale=alt.Scale(type="log")),
            color=alt.Color("form:N", title=None, sort=list(FORMS.values())),
        ).properties(width="container", height=260)
    )  # fmt: skip
    return Measurement(
        min(direct for l, (direct, _) in ratios.items() if l >= 4),
        also={f"L = {l}": direct for l, (direct, _) in ratios.items()}
        | {f"by FFT, L = {l}": fft for l, (_, fft) in ratios.items()},
        note=f"forward, float32, one thread, batch {run.setting.batch}; also against convolution by FFT",
    )


@study.claim(
    "C5",
    "The Gaunt product is much faster than all Clebsch-Gordan paths, but not for each interaction that it makes",
    paper="authors' CPU timings, L = 8: 213 ms for 285 paths, 33.8 ms for 17 outputs: 0.75 against 2.0 ms a piece",
    holds=at_least(5.0),
    unit="times faster than e3nn's full product, L = 4",
    also={"share left per unit of expressivity, L = 4": at_most(1 / 3), "largest rise with L, per unit": at_most(0.0)},
)
def no_free_lunch(run: Run) -> Measurement:
    try:
        from e3nn import o3
    except ImportError:
        raise NotAtThisScale("e3nn is not installed: pip install --no-deps e3nn opt_einsum_fx") from None
    table, raw, unit, own = [], {}, {}, {}
    for l in [each for each in run.setting.timed if each <= 6]:
        run.progress(f"degree {l}", l, 6)
        irreps = natural(l)
        x, y = (irreps.randn(run.setting.batch, generator=run.generator(s)).to(run.device) for s in range(2))
        gaunt = tp.GauntProduct(irreps, irreps, weights=False, backend="grid", device=run.device)
        products: dict[str, nn.Module] = {
            "e3nn": o3.FullTensorProduct(str(irreps), str(irreps)).to(run.device),
            "Clebsch-Gordan": tp.ClebschGordanProduct(irreps, irreps, device=run.device),
            "Gaunt": gaunt,
        }
        times = time_each(run, {name: partial(product, x, y) for name, product in products.items()})
        ranks = {"e3nn": paths(l), "Clebsch-Gordan": paths(l), "Gaunt": 4 * l + 1}
        for name, seconds in times.items():
            table.append({"l": l, "product": name, "us": 1e6 * seconds / run.setting.batch, "what": "one product"})
            per = 1e6 * seconds / run.setting.batch / ranks[name]
            table.append({"l": l, "product": name, "us": per, "what": "per unit of expressivity"})
        raw[l] = times["e3nn"] / times["Gaunt"]
        own[l] = times["Clebsch-Gordan"] / times["Gaunt"]
        unit[l] = raw[l] * (4 * l + 1) / paths(l)
    lines = alt.Chart(alt.Data(values=table)).mark_line(point=True).encode(
        x=alt.X("l:O", title="highest degree L", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("us:Q", title="µs", scale=alt.Scale(type="log")),
        color=alt.Color("product:N", title=None, sort=["e3nn", "Clebsch-Gordan", "Gaunt"]),
    )  # fmt: skip
    panels = [
        lines.transform_filter(alt.datum.what == what).properties(title=what, width=260, height=240)
        for what in ("one product", "per unit of expressivity")
    ]
    run.figure(alt.hconcat(*panels))
    degrees = sorted(raw)
    return Measurement(
        raw[4],
        also={
            "share left per unit of expressivity, L = 4": unit[4] / raw[4],
            "largest rise with L, per unit": max(unit[b] - unit[a] for a, b in itertools.pairwise(degrees)),
        }
        | {f"e3nn / Gaunt, L = {l}": raw[l] for l in degrees}
        | {f"the same per unit, L = {l}": unit[l] for l in degrees}
        | {f"Lathe's Clebsch-Gordan / Gaunt, L = {l}": own[l] for l in degrees},
        note=f"forward, float32, batch {run.setting.batch}, e3nn eager; expressivity is the rank of claim C3",
    )


@study.claim(
    "C6",
    "Without antisymmetric products a network cannot tell a shape from its mirror image; with vector signals it can",
    paper="Tetris figure: Gaunt networks end at 7 of 8 shapes, Clebsch-Gordan and vector-signal ones at 8",
    holds=equals(0.875, 1e-9),
    unit="accuracy of the Gaunt network, best seed",
    also={
        "largest difference of the mirrored shapes' logits, Gaunt": at_most(1e-5),
        "seeds with 8 of 8, Clebsch-Gordan": at_least(2),
        "seeds with 8 of 8, vector-signal": at_least(2),
    },
)
def chirality(run: Run) -> Measurement:
    nets = {name: run.each_seed(train_tetris, product=name) for name in ("Clebsch-Gordan", "vector-signal", "Gaunt")}
    table = [
        {"step": step, "accuracy": accuracy, "product": name, "seed": seed}
        for name, results in nets.items()
        for seed, result in enumerate(results)
        for step, accuracy in result.curve
    ]
    lines = alt.Chart(alt.Data(values=table)).mark_line(interpolate="step-after").encode(
        x=alt.X("step:Q", title="step of Adam"),
        y=alt.Y("mean(accuracy):Q", title="shapes recognised", scale=alt.Scale(domain=[0, 1]), axis=EIGHTHS),
        color=alt.Color("product:N", title=None, sort=list(nets)),
    )  # fmt: skip
    rule = alt.Chart(alt.Data(values=[{"bound": 0.875}])).mark_rule(strokeDash=[4, 4]).encode(y="bound:Q")
    run.figure((lines + rule).properties(width="container", height=260))
    complete = {name: float(sum(result.accuracy == 1.0 for result in results)) for name, results in nets.items()}
    gaunt = nets["Gaunt"]
    return Measurement(
        max(result.accuracy for result in gaunt),
        seeds=len(gaunt),
        samples=[result.accuracy for result in gaunt],
        also={
            "largest difference of the mirrored shapes' logits, Gaunt": max(result.mirror_gap for result in gaunt),
            "seeds with 8 of 8, Clebsch-Gordan": complete["Clebsch-Gordan"],
            "seeds with 8 of 8, vector-signal": complete["vector-signal"],
        },
        note=f"{run.setting.layers} layers, {run.setting.multiplicity} of each irrep up to l = 2 of both parities, "
        f"{run.setting.steps} steps at {run.setting.lr:g}, shapes turned at random at every step",
    )


@study.claim(
    "C7",
    "With the grid in place of the torus a network trains faster",
    paper="table: MACE trains about 30 % faster",
    holds=at_most(0.8),
    unit="time of a training step, grid / torus",
)
def faster_training(run: Run) -> Measurement:
    steps = {name: training_step(run, name) for name in FORMS}
    times = time_each(run, steps, warmup=1)
    values = [{"form": FORMS[name], "ms": 1e3 * seconds} for name, seconds in times.items()]
    bars = alt.Chart(alt.Data(values=values)).mark_bar().encode(
        y=alt.Y("form:N", title=None, sort=list(FORMS.values())), x=alt.X("ms:Q", title="ms a training step")
    )  # fmt: skip
    run.figure(bars.properties(width="container", height=140))
    return Measurement(
        times["grid"] / times["fourier"],
        also={"grid / torus by direct convolution": times["grid"] / times["fourier_direct"]},
        note=f"a network of two message-passing layers in place of MACE: {run.setting.channels} channels, degrees up "
        f"to {run.setting.l_max}, {run.setting.points} points, against convolution by FFT, the faster of the two",
    )


FORMS = {"grid": "sphere grid", "fourier": "torus, FFT", "fourier_direct": "torus, direct convolution"}
EXPONENTS = alt.Axis(format=".0e")
EIGHTHS = alt.Axis(format=".3f", values=[0, 0.25, 0.5, 0.75, 0.875, 1])


def paths(l: int) -> int:
    """Interactions of two features with the degrees 0 to l."""
    return (l + 1) * (2 * (l + 1) ** 2 + 1) // 3


def all_irreps(l: int) -> Irreps:
    return Irreps([(1, (each, parity)) for each in range(l + 1) for parity in (1, -1)])


def weighted_sum(x: Tensor, y: Tensor, l: int) -> Tensor:
    """The Gaunt product path by path."""
    z = x.new_zeros(len(x), (2 * l + 1) ** 2)
    for l1, l2 in itertools.product(range(l + 1), repeat=2):
        for l3 in range(abs(l1 - l2), l1 + l2 + 1, 2):
            table = tp.gaunt_coefficients(l1, l2, l3, dtype=x.dtype)
            a, b = x[:, l1 * l1 : (l1 + 1) ** 2], y[:, l2 * l2 : (l2 + 1) ** 2]
            z[:, l3 * l3 : (l3 + 1) ** 2] += torch.einsum("bi,bj,ijk->bk", a, b, table)
    return z


def time_each(run: Run, calls: dict[str, Callable[[], Any]], warmup: int = 3, most: float = 10.0) -> dict[str, float]:
    """Median seconds of each call, by turns; fewer rounds than the setting says where a call takes `most` in all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(run.setting.rounds + warmup):
        for name, call in calls.items():
            if sum(times[name]) > most:
                continue
            began = time.perf_counter()
            call()
            if run.device != "cpu":
                torch.cuda.synchronize()
            if repetition >= warmup:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in times.items()}


SHAPES = (
    ((0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 1, 0)),  # chiral
    ((1, 1, 1), (1, 1, 2), (2, 1, 1), (2, 0, 1)),  # its mirror image
    ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)),  # square
    ((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 0, 3)),  # line
    ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)),  # corner
    ((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)),  # L
    ((0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 1)),  # T
    ((0, 0, 0), (1, 0, 0), (1, 1, 0), (2, 1, 0)),  # zigzag
)


class Convolution(nn.Module):
    """Messages by one tensor product with the harmonics of the edges, beside a linear map of the node itself."""

    def __init__(self, product: Callable[..., nn.Module], irreps_in: Irreps, edge: Irreps, irreps_out: Irreps) -> None:
        super().__init__()
        self.product = product(irreps_in, edge, irreps_out)
        # A product with a constant is the equivariant linear map.
        self.own = tp.ClebschGordanProduct(irreps_in, "0e", irreps_out, "fully_connected")

    def forward(self, x: Tensor, edges: Tensor, harmonics: Tensor) -> Tensor:
        messages = self.product(x[edges[0]], harmonics)
        pooled = x.new_zeros(len(x), messages.shape[-1]).index_add(0, edges[1], messages)
        return pooled / 2**0.5 + self.own(x, x.new_ones(len(x), 1))


class ShapeNetwork(nn.Module):
    """Convolutions with gates between them; of the eight logits a pseudoscalar tells the first two apart."""

    def __init__(self, product: Callable[..., nn.Module], layers: int, multiplicity: int) -> None:
        super().__init__()
        m, edge = multiplicity, natural(2)
        self.scalars, self.tensors = (
            Irreps([(m, "0e"), (m, "0o")]),
            Irreps([(m, (l, p)) for l in (1, 2) for p in (1, -1)]),
        )
        gates = Irreps([(self.tensors.num_irreps, "0e")])
        widths = [Irreps("1x0e"), *[self.scalars + self.tensors] * (layers - 1)]
        outs = [*[self.scalars + gates + self.tensors] * (layers - 1), Irreps("1x0o + 7x0e")]
        self.layers = nn.ModuleList([Convolution(product, a, edge, b) for a, b in zip(widths, outs)])

    def forward(self, points: Tensor, edges: Tensor, shape_of: Tensor) -> Tensor:
        harmonics = tp.spherical_harmonics(2, points[edges[1]] - points[edges[0]], normalization="component")
        x = points.new_ones(len(points), 1)
        for layer in self.layers:
            x = layer(x, edges, harmonics)
            if layer is not self.layers[-1]:
                x = self.gated(x)
        pooled = x.new_zeros(len(SHAPES), x.shape[1]).index_add(0, shape_of, x) / 4
        odd, even, rest = pooled[:, :1] * pooled[:, 1:2], -pooled[:, :1] * pooled[:, 1:2], pooled[:, 2:]
        return torch.cat([odd, even, rest], 1)

    def gated(self, x: Tensor) -> Tensor:
        even, odd = self.scalars.sizes
        true, pseudo, gates, rest = x.split([even, odd, self.tensors.num_irreps, self.tensors.dim], -1)
        parts, at = [functional.silu(true), torch.tanh(pseudo)], 0
        for part, (multiplicity, irrep) in zip(rest.split(self.tensors.sizes, -1), self.tensors):
            gate = torch.sigmoid(gates[:, at : at + multiplicity])
            parts.append((part.unflatten(-1, (multiplicity, irrep.dim)) * gate.unsqueeze(-1)).flatten(1))
            at += multiplicity
        return torch.cat(parts, -1)


@dataclass(frozen=True)
class Recognition:
    """Of a trained network: accuracy on shapes turned anew, its course, and how far the mirrored logits differ."""

    accuracy: float
    curve: list[tuple[int, float]]
    mirror_gap: float


def connected(**options: Any) -> Callable[..., nn.Module]:
    """A fully connected Clebsch-Gordan product."""
    return lambda in1, in2, out: tp.ClebschGordanProduct(in1, in2, out, "fully_connected", **options)


def train_tetris(run: Run, seed: int, product: str) -> Recognition:
    """A network on the eight shapes of four cubes, turned at random at every step."""
    setting = run.setting
    make: Any = {"Clebsch-Gordan": connected(), **PRODUCTS}[product]
    torch.manual_seed(seed)
    network = ShapeNetwork(make, setting.layers, setting.multiplicity).to(run.device)
    generator = run.generator(seed)
    points = torch.tensor(SHAPES, dtype=torch.float64)
    points = points - points.mean(1, keepdim=True)
    shape_of = torch.arange(8).repeat_interleave(4)
    near = (torch.cdist(points, points) < 1.1) & ~torch.eye(4, dtype=torch.bool)
    shape, source, target = near.nonzero().T
    edges = torch.stack([4 * shape + source, 4 * shape + target]).to(run.device)
    labels = torch.arange(8, device=run.device)

    def logits(dtype: torch.dtype = torch.float32) -> Tensor:
        turned = (points @ rotations(8, generator).mT).flatten(0, 1)
        return network(turned.to(run.device, dtype), edges, shape_of.to(run.device))

    optimizer = torch.optim.Adam(network.parameters(), lr=setting.lr)
    curve = []
    for step in range(setting.steps):
        found = logits()
        loss = functional.cross_entropy(found, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, setting.steps // 50) == 0:
            curve.append((step, float((found.argmax(1) == labels).float().mean())))
            run.progress(f"{product}, seed {seed}", step, setting.steps)
    network.double()  # single precision alone makes logits of some tens differ by more than 1e-5
    with torch.no_grad():
        checks = torch.stack([logits(torch.float64) for _ in range(10)])
    accuracy = float((checks.argmax(2) == labels).float().mean())
    curve.append((setting.steps, accuracy))
    return Recognition(accuracy, curve, float((checks[:, 0] - checks[:, 1]).abs().max()))


def rotations(count: int, generator: torch.Generator) -> Tensor:
    """Uniform proper rotations, (count, 3, 3)."""
    q, r = torch.linalg.qr(torch.randn(count, 3, 3, generator=generator, dtype=torch.float64))
    q = q * r.diagonal(dim1=1, dim2=2).sign().unsqueeze(1)
    return q * torch.linalg.det(q).sign()[:, None, None]


def training_step(run: Run, backend: str) -> Callable[[], Any]:
    """One step of a two-layer message-passing network on a random cloud of points."""
    setting = run.setting
    torch.manual_seed(0)
    hidden = setting.channels * natural(setting.l_max)
    points = torch.rand(setting.points, 3, generator=run.generator(0))
    edges = ((torch.cdist(points, points) < 0.4) & ~torch.eye(len(points), dtype=torch.bool)).nonzero().T
    edges = edges.to(run.device)
    harmonics = tp.spherical_harmonics(setting.l_max, points.to(run.device)[edges[1]] - points.to(run.device)[edges[0]])

    def make(*irreps: Any) -> nn.Module:
        return tp.GauntProduct(*irreps, backend=backend)  # type: ignore[arg-type]

    dims: Sequence[Irreps] = (hidden, hidden, Irreps("1x0e"))
    layers = [Convolution(make, a, natural(setting.l_max), b) for a, b in itertools.pairwise(dims)]
    network = nn.ModuleList(layers).to(run.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    x = torch.randn(len(points), hidden.dim, generator=run.generator(1)).to(run.device)

    def step() -> None:
        optimizer.zero_grad()
        features = x
        for layer in network:
            features = layer(features, edges, harmonics)
        features.square().mean().backward()
        optimizer.step()

    return step
