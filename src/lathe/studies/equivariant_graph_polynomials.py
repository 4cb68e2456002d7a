"""Which polynomials of a graph can a graph network not compute, and what does it gain when it is given them?"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import altair as alt
import networkx as nx
import torch
from torch import Tensor, nn
from torch.nn import functional

from lathe.data.graphs import random_graphs, random_regular_graphs, rook_graph, shrikhande_graph
from lathe.nn import equivariant_graph_polynomials as egp
from lathe.nn.equivariant_graph_polynomials import Multigraph
from lathe.studies.engine import Measurement, Run, Setting, Study, at_least, at_most, average, compare, equals
from lathe.training import fit, one_cycle

FAMILIES = ("sr16622", "sr251256", "sr261034", "sr281264", "sr291467", "sr351899", "sr361446", "sr401224")

study = Study(
    "equivariant-graph-polynomials",
    title="Equivariant Polynomials for Graph Neural Networks",
    authors="Puny, Lim, Kiani, Maron, Lipman",
    year=2023,
    arxiv="2302.11556",
    area="nn",
    module="lathe.nn.equivariant_graph_polynomials",
    summary="""Says which substructures a graph network can never count, and hands it the few features that make up for
    it: as edge and node columns of any network, or as inputs of PPGN++. Counts small graphs in large ones exactly.""",
    example="""
import networkx as nx, torch
from lathe.nn.equivariant_graph_polynomials import PPGN, Multigraph, augment, missing_polynomials, subgraph_count

assert len(missing_polynomials(3, "gin", order=1)) == 1          # message passing cannot count triangles
friends = nx.karate_club_graph()
A = torch.tensor(nx.to_numpy_array(friends, weight=None)).float()
features = augment(A, model="ppgn", degree=6)                    # (4, 34, 34): what PPGN cannot compute up to degree 6
assert subgraph_count(nx.complete_graph(4), friends) == 11       # exact, by contractions
net = PPGN(in_channels=1, hidden=16, layers=3, out_channels=1, features="minimal")      # PPGN++ with these features
assert net(A[None, None]).shape == (1, 1)
""",
    job="build",
    scales={
        "smoke": Setting(
            seeds=1,
            listed=2,
            edges=5,
            atlas=200,
            families=(),
            train=62,
            test=40,
            nodes=10,
            width=8,
            epochs=2,
            regular=30,
            regular_test=20,
            cycle_width=8,
            cycle_epochs=3,
            sizes=(20, 40),
            repeats=3,
        ),
        "desk": Setting(
            listed=3,
            edges=7,
            atlas=1253,
            families=FAMILIES,
            train=1000,
            test=500,
            nodes=12,
            width=16,
            epochs=30,
            regular=300,
            regular_test=150,
            cycle_width=16,
            cycle_epochs=40,
            sizes=(40, 80, 160),
            repeats=15,
        ),
        "full": Setting(
            listed=3,
            edges=7,
            atlas=1253,
            families=(*FAMILIES, "sr351668"),
            train=10_000,
            test=2_000,
            nodes=16,
            width=64,
            epochs=100,
            regular=5_000,
            regular_test=1_000,
            cycle_width=64,
            cycle_epochs=100,
            sizes=(80, 160, 320),
            repeats=15,
        ),
    },
)

DIAMOND = Multigraph([(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], [0, 1])  # K4 without the edge of its marks: P5
# The graph of lowest degree that we know to tell apart the two graphs that the others do not.
K33 = Multigraph(list(itertools.product(range(3), range(3, 6))), [0, 3])
INPUTS: dict[str, list[Multigraph]] = {"adjacency": [], "adjacency and P5": [DIAMOND]}
SR_INPUTS = {**INPUTS, "adjacency, P5 and K3,3": [DIAMOND, K33]}
GENERALISED_QUADRANGLES = (
    ". The pair of sr401224 is the two generalised quadrangles of order 3, and 1 of 378 pairs is more than 0.2 %. "
    "Tried in vain: the 12 features of degree 6 (or their 4) and the 22 generating ones of degree 7; all invariants of "
    "degree up to 8 that PPGN lacks are equal on the two, exactly. K3,3, of degree 9, tells them apart (418,560 and "
    "470,400 homomorphisms): given it besides P5, no pair of sr401224 stays alike"
)

# By number of edges: what PPGN cannot compute, with 0, 1 and 2 marks, and of how many connected simple graphs.
MISSING_OF_PPGN = {4: (0, 0, 0), 5: (0, 0, 1), 6: (1, 1, 9), 7: (2, 6, 69)}
CONNECTED = {5: (12, 37, 125), 6: (30, 114, 460)}
# What message passing cannot compute at a node, of how many.
MISSING_OF_MPNN = {1: (0, 1), 2: (0, 2), 3: (1, 5), 4: (4, 13), 5: (17, 37), 6: (66, 114)}


@study.claim(
    "C1",
    "The polynomials of multigraphs are a basis: as many as Burnside counts, and independent from n = nodes of H on",
    paper="theorem 3.1",
    kind="exact",
    holds=equals(0.0),
    unit="ranks and counts that are off, summed",
    also={"equivariance error": at_most(1e-12)},
)
def is_a_basis(run: Run) -> Measurement:
    counts = {
        True: {0: (1, 2, 11, 52), 1: (1, 5, 32, 199), 2: (2, 15, 117, 877)},
        False: {0: (1, 2, 7, 23), 1: (1, 4, 17, 69), 2: (2, 11, 56, 266)},
    }
    off = 0
    for directed, order, degree in itertools.product(counts, range(3), range(run.setting.listed + 1)):
        listed = len(egp.equivariant_basis(degree, order, directed=directed))
        burnside = egp.count_basis(degree, order, directed=directed)
        off += abs(listed - counts[directed][order][degree]) + abs(burnside - listed)
    table = []
    # With 5 nodes, the one polynomial of degree 2 whose graph has 6 nodes depends on the others.
    for degree, order, n, dependent in [
        (1, 0, 2, 0),
        (1, 2, 4, 0),
        (2, 0, 4, 0),
        (2, 1, 5, 0),
        (2, 2, 6, 0),
        (2, 2, 5, 1),
    ]:
        X = torch.randn(12, n, n, dtype=torch.float64, generator=run.generator(n))
        columns = egp.GraphPolynomials(egp.equivariant_basis(degree, order))(X).movedim(1, -1).flatten(0, -2)
        columns = columns / torch.linalg.vector_norm(columns, dim=0)
        rank = int((torch.linalg.svdvals(columns) > 1e-9).sum())
        off += abs(rank - (columns.shape[1] - dependent))
        case = f"degree {degree}, order {order}, n = {n}"
        table += [
            {"case": case, "what": "polynomials", "count": columns.shape[1]},
            {"case": case, "what": "rank", "count": rank},
        ]
    run.figure(
        alt.Chart(alt.Data(values=table)).mark_point(filled=True, opacity=1).encode(
            x=alt.X("count:Q", title="polynomials, and their rank", scale=alt.Scale(type="log", domain=[1, 200])),
            y=alt.Y("case:N", title=None, sort=None),
            color=alt.Color("what:N", title=None, sort=["polynomials", "rank"]),
            size=alt.Size("what:N", legend=None, sort=["polynomials", "rank"], scale=alt.Scale(range=[220, 50])),
            tooltip=["case:N", "what:N", "count:Q"],
        ).properties(width="container", height=220)
    )  # fmt: skip
    return Measurement(float(off), also={"equivariance error": equivariance_error(run)})


@study.claim(
    "C2",
    "Message passing computes all polynomials at nodes up to 2 edges, PPGN up to 5, at pairs up to 4; to 6 it lacks 12",
    paper="section 4: MPNN is 2-node-exact, PPGN 4-edge-exact and 5-node-exact; PPGN++ adds 1 + 11 features",
    kind="exact",
    holds=equals(0.0),
    unit="counts and decisions that are off, summed",
    also={"missing of PPGN with 5 edges": equals(1.0), "features that stand for all 12": equals(4.0)},
)
def decides_expressivity(run: Run) -> Measurement:
    off, table = 0, []
    for edges in range(1, run.setting.edges + 1):
        missing = [egp.missing_polynomials(edges, "ppgn", order) for order in range(3)]
        if edges in MISSING_OF_PPGN:
            off += sum(abs(len(found) - expected) for found, expected in zip(missing, MISSING_OF_PPGN[edges]))
        totals = [connected(edges, order) for order in range(3)]
        if edges in CONNECTED:
            off += sum(abs(found - expected) for found, expected in zip(totals, CONNECTED[edges]))
        of_mpnn = len(egp.missing_polynomials(edges, "mpnn", 1))
        if edges in MISSING_OF_MPNN:
            off += abs(of_mpnn - MISSING_OF_MPNN[edges][0]) + abs(totals[1] - MISSING_OF_MPNN[edges][1])
        table += [
            {"model": "PPGN, pairs", "edges": edges, "share": 100 * len(missing[2]) / totals[2]},
            {"model": "PPGN, nodes", "edges": edges, "share": 100 * len(missing[1]) / totals[1]},
            {"model": "message passing, nodes", "edges": edges, "share": 100 * of_mpnn / totals[1]},
        ]
    run.figure(
        alt.Chart(alt.Data(values=table)).mark_line(point=True).encode(
            x=alt.X("edges:O", title="edges of the connected simple graph", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("share:Q", title="polynomials out of reach (%)"),
            color=alt.Color("model:N", title=None),
            tooltip=["model:N", "edges:O", alt.Tooltip("share:Q", format=".2f")],
        ).properties(width="container", height=260)
    )  # fmt: skip
    decided, wrong = treewidth_disagreements(run.setting.atlas)
    few = egp.generating_polynomials(6, "ppgn")
    for H in egp.paper_polynomials(6):
        off += not egp.polynomial_expressive(H, "ppgn", given=few)
    return Measurement(
        float(off + wrong),
        also={
            "missing of PPGN with 5 edges": float(len(egp.missing_polynomials(5, "ppgn"))),
            "features that stand for all 12": float(len(few)),
        },
        note=f"{decided:,} decisions held against treewidth and forests, graphs of the atlas of up to 7 nodes",
    )


@study.claim(
    "C3",
    "Without training, PPGN tells no strongly regular graphs apart; given P5 it tells nearly all",
    paper="table on strongly regular graphs, untrained networks",
    kind="exact",
    holds=at_most(0.2),
    unit="% of pairs alike with P5, in the worst family",
    also={"% alike on the adjacency alone, at least": at_least(100.0)},
)
def separates_strongly_regular_graphs(run: Run) -> Measurement:
    found = {name: run.each_seed(alike, given=name) for name in SR_INPUTS}
    families = list(found["adjacency"][0])
    table = [
        {"family": family, "input": name, "seed": seed, "alike": result[family][0] / result[family][1] * 100}
        for name, results in found.items()
        for seed, result in enumerate(results)
        for family in families
    ]
    scale = alt.Scale(type="symlog", constant=0.1)
    axis = alt.Axis(values=[0, 0.1, 1, 10, 100], labelExpr="datum.value")
    run.figure(
        alt.Chart(alt.Data(values=table)).mark_point(filled=True, size=80).encode(
            x=alt.X("alike:Q", title="pairs that the untrained network cannot tell apart (%)", scale=scale, axis=axis),
            y=alt.Y("family:N", title=None, sort=families),
            color=alt.Color("input:N", title=None),
            tooltip=["family:N", "input:N", "seed:Q", alt.Tooltip("alike:Q", format=".3f")],
        ).properties(width="container", height=30 * len(families) + 40)
    )  # fmt: skip
    shares = {
        name: {family: [result[family][0] / result[family][1] * 100 for result in results] for family in families}
        for name, results in found.items()
    }
    worst = max(families, key=lambda family: statistics.fmean(shares["adjacency and P5"][family]))
    given, more = found["adjacency and P5"], found["adjacency, P5 and K3,3"]
    pairs = ", ".join(f"{name} {max(each[name][0] for each in given)} of {given[0][name][1]:,}" for name in families)
    return average(
        shares["adjacency and P5"][worst],
        baseline=statistics.fmean(shares["adjacency"][worst]),
        also={
            "% alike on the adjacency alone, at least": min(min(each) for each in shares["adjacency"].values()),
            "pairs alike with P5 and K3,3, last family": float(max(each[families[-1]][0] for each in more)),
        },
        note=f"pairs alike with P5, at most over seeds: {pairs}"
        + ("" if "sr401224" not in families else GENERALISED_QUADRANGLES),
    )


@study.claim(
    "C4",
    "Given the polynomials that it lacks, PPGN++ predicts better: here the number of K4 in random graphs",
    paper="ZINC-12k: 0.071 mean absolute error with the features, 0.076 without; Alchemy 0.109",
    holds=at_most(0.5),
    unit="test error with P5 / without",
    also={"worst seed": at_most(0.6)},
)
def helps_to_predict(run: Run) -> Measurement:
    errors = {name: run.each_seed(predict_cliques, given=bool(given)) for name, given in INPUTS.items()}
    run.figure(strips(errors, "mean absolute error / standard deviation of the number of K4"))
    ratio = compare(errors["adjacency and P5"], errors["adjacency"], how="ratio")
    given, alone = (statistics.fmean(errors[name]) for name in ("adjacency and P5", "adjacency"))
    return compare(
        errors["adjacency and P5"],
        errors["adjacency"],
        how="ratio",
        also={"worst seed": max(ratio.samples), "error with P5": given, "error without": alone},
        note=f"random graphs G({run.setting.nodes}, 0.4), {run.setting.train:,} to learn from, in place of ZINC",
    )


@study.claim(
    "C5",
    "On regular graphs message passing is blind; products of edge features count triangles, 4- and 5-cycles at nodes",
    paper="section 4: a triangle at a node is the first polynomial that message passing lacks",
    holds=at_least(0.95),
    unit="R² of PPGN, worst of the three counts",
    also={"R² of message passing, best of the three": at_most(0.02)},
)
def counts_cycles(run: Run) -> Measurement:
    found = {name: run.each_seed(learn_cycles, model=name) for name in ("GIN", "GIN with features", "PPGN")}
    table = [
        {"model": name, "seed": seed, "cycle": f"{length}-cycles", "R²": round(max(score, -0.2), 4)}
        for name, runs in found.items()
        for seed, scores in enumerate(runs)
        for length, score in scores.items()
    ]
    run.figure(
        alt.Chart(alt.Data(values=table)).mark_point(filled=True, size=80).encode(
            x=alt.X("R²:Q", title="R² on new graphs", scale=alt.Scale(domain=[-0.2, 1])),
            y=alt.Y("cycle:N", title=None),
            color=alt.Color("model:N", title=None, sort=list(found)),
            yOffset=alt.YOffset("model:N", sort=list(found)),
            tooltip=["model:N", "cycle:N", "seed:Q", "R²:Q"],
        ).properties(width="container", height=240)
    )  # fmt: skip
    return average(
        [min(scores.values()) for scores in found["PPGN"]],
        baseline=statistics.fmean(max(scores.values()) for scores in found["GIN"]),
        also={
            "R² of message passing, best of the three": max(max(scores.values()) for scores in found["GIN"]),
            "R² of message passing with polynomials at nodes": statistics.fmean(
                min(scores.values()) for scores in found["GIN with features"]
            ),
        },
        note="4-regular graphs of 16 nodes, constant node features",
    )


@study.claim(
    "C6",
    "The order of contraction decides the cost: n to the power of treewidth + 1",
    paper="section 3: computing P_H is a tensor contraction",
    holds=at_least(10.0),
    unit="time from left to right / planned, smaller of the two graphs",
    also={"path: exponent off 3": at_most(0.4), "diamond: exponent off 4": at_most(0.4)},
)
def orders_contractions(run: Run) -> Measurement:
    path = Multigraph([(node, node + 1) for node in range(6)], [0, 6]).canonical(directed=False)
    middle, table, exponents, ratios = run.setting.sizes[-2], [], {}, {}
    for name, (H, treewidth) in {"path": (path, 2), "diamond": (DIAMOND, 3)}.items():
        planned = {}
        for n in run.setting.sizes:
            # Several at once, so that arithmetic outweighs the overhead of calls.
            X = torch.randn(8 if H is path else 1, n, n, dtype=torch.float64, generator=run.generator(n)).to(run.device)
            planned[n] = median_time(run, partial(egp.graph_polynomial, X, H))
            table.append({"graph": name, "order": "planned", "n": n, "ms": 1e3 * planned[n]})
            if n <= middle:  # above, tensors of n**4 entries do not fit
                direct = median_time(run, partial(left_to_right, H, X[:1])) * len(X)
                table.append({"graph": name, "order": "left to right", "n": n, "ms": 1e3 * direct})
                ratios[name] = direct / planned[n]
        low, high = min(planned), max(planned)
        exponents[name] = math.log(planned[high] / planned[low]) / math.log(high / low) - (treewidth + 1)
    ticks, log_axis = alt.Axis(values=list(run.setting.sizes)), alt.Axis(tickCount=6, labelExpr="datum.value")
    run.figure(
        alt.Chart(alt.Data(values=table)).mark_line(point=True).encode(
            x=alt.X("n:Q", title="nodes", scale=alt.Scale(type="log", nice=False, padding=20), axis=ticks),
            y=alt.Y("ms:Q", title="milliseconds", scale=alt.Scale(type="log"), axis=log_axis),
            color=alt.Color("graph:N", title=None),
            strokeDash=alt.StrokeDash("order:N", title=None, sort=["planned", "left to right"]),
            tooltip=["graph:N", "order:N", "n:Q", alt.Tooltip("ms:Q", format=".3f")],
        ).properties(width="container", height=260)
    )  # fmt: skip
    return Measurement(
        min(ratios.values()),
        also={"path: exponent off 3": abs(exponents["path"]), "diamond: exponent off 4": abs(exponents["diamond"])}
        | {f"{name}: left to right / planned": ratio for name, ratio in ratios.items()},
        note=f"6 edges with both ends marked, and P5; dense float64 matrices, n = {middle}. Left to right through the "
        "edges as the basis lists them; listed from one end to the other, left to right is the planned order",
    )


def equivariance_error(run: Run) -> float:
    """Largest difference between moving nodes before and after, over the largest value that |X| gives."""
    polynomials = egp.GraphPolynomials([H for degree in range(3) for H in egp.equivariant_basis(degree, 2)])
    X = torch.randn(6, 6, dtype=torch.float64, generator=run.generator(0))
    values, scale = polynomials(X), polynomials(X.abs()).amax((1, 2))
    errors = []
    for seed in range(5):
        order = torch.randperm(6, generator=run.generator(seed))
        difference = polynomials(X[order][:, order]) - values[:, order][:, :, order]
        errors.append(float((difference.abs().amax((1, 2)) / scale).max()))
    return max(errors)


def connected(edges: int, order: int) -> int:
    """Connected simple graphs with so many edges and marks, two of which are two nodes."""
    graphs = egp.equivariant_basis(edges, order, simple=True, connected=True)
    return sum(len(set(H.marks)) == order for H in graphs)


def treewidth_disagreements(count: int) -> tuple[int, int]:
    """Decisions made on graphs of the atlas, and those that treewidth at most 2, or being a forest, contradicts."""
    from networkx.algorithms.approximation import treewidth_min_degree

    decided = wrong = 0
    for graph in nx.graph_atlas_g()[1:count]:
        graph = graph.subgraph([node for node in graph if graph.degree[node]])
        for marks in [(), *((node,) for node in list(graph)[:1]), *list(itertools.combinations(graph, 2))[:4]]:
            H = Multigraph.from_networkx(graph, marks)
            closed = nx.Graph(graph)
            if len(marks) == 2:
                closed.add_edge(*marks)
            narrow = treewidth_min_degree(closed)[0] <= 2 if closed else True  # exact up to 2
            wrong += egp.polynomial_expressive(H, "ppgn") != narrow
            decided += 1
            if len(marks) < 2 and graph:
                wrong += egp.polynomial_expressive(H, "mpnn") != nx.is_forest(graph)
                decided += 1
    return decided, wrong


def alike(run: Run, seed: int, given: str) -> dict[str, tuple[int, int]]:
    """Family -> pairs that an untrained network gives the same 16 numbers, up to 1e-7, and all pairs."""
    torch.manual_seed(seed)
    net = egp.PPGN(1, 6, 3, 16, features=SR_INPUTS[given], activation=nn.Tanh, aggr="mean").double().to(run.device)
    families = {"Shrikhande and 4 x 4 rook": torch.stack([shrikhande_graph(), rook_graph(4)])}
    families |= {name: run.data("strongly-regular", name).adjacency for name in run.setting.families}
    result = {}
    for done, (name, graphs) in enumerate(families.items()):
        run.progress(f"{name}, seed {seed}", done, len(families))
        with torch.no_grad():
            values = torch.cat([net(part[:, None].double().to(run.device)) for part in graphs.split(64)])
        apart = int(egp.separates(values, lambda value: value).sum()) // 2
        pairs = len(graphs) * (len(graphs) - 1) // 2
        result[name] = (pairs - apart, pairs)
    return result


def predict_cliques(run: Run, seed: int, given: bool) -> float:
    """Mean absolute error of the number of K4 in new graphs, in standard deviations."""
    setting = run.setting
    A = random_graphs(setting.train + setting.test, setting.nodes, 0.4, generator=run.generator(seed)).adjacency.float()
    P5 = egp.graph_polynomial(A, DIAMOND)
    cliques = (A * P5).sum((1, 2)) / 24
    train, test = (slice(0, setting.train), slice(setting.train, None))
    target = ((cliques - cliques[train].mean()) / cliques[train].std())[:, None]
    x = torch.stack([A, P5 / P5[train].std()], 1) if given else A[:, None]
    torch.manual_seed(seed)
    net = egp.PPGN(x.shape[1], setting.width, 3, 1, aggr="mean")
    fit(
        net,
        (x[train], target[train]),
        loss=functional.l1_loss,
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        schedule=one_cycle(3e-3),
        epochs=setting.epochs,
        batch_size=31,
        seed=seed,
        device=run.device,
        progress=lambda now: run.progress(f"K4, {'with' if given else 'without'} P5, seed {seed}", now.step, now.total),
    )
    with torch.no_grad():
        return float((net(x[test].to(run.device)).cpu() - target[test]).abs().mean())


class DenseGIN(nn.Module):
    """Graph isomorphism network (Xu et al. 2019) on dense adjacencies: x <- MLP((1 + eps) x + A x)."""

    def __init__(self, features: int, width: int, layers: int, out: int) -> None:
        super().__init__()
        sizes = [features] + [width] * layers
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(i, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()) for i in sizes[:-1]
        )
        self.eps = nn.Parameter(torch.zeros(layers))
        self.out = nn.Linear(width, out)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs (batch, n, n + features): adjacency, then features of nodes."""
        n = inputs.shape[1]
        A, x = inputs[..., :n], inputs[..., n:]
        for eps, layer in zip(self.eps, self.layers):
            x = layer((1 + eps) * x + A @ x)
        return self.out(x)


@dataclass(frozen=True)
class Cycles:
    """4-regular graphs (adjacency) and the number of 3-, 4- and 5-cycles through each node, standardised."""

    A: Tensor
    counts: Tensor


def cycles(count: int, generator: torch.Generator) -> Cycles:
    A = random_regular_graphs(count, 16, 4, generator=generator).adjacency.float()
    rings = [Multigraph([(node, (node + 1) % k) for node in range(k)], [0]) for k in (3, 4, 5)]
    # Each cycle is met once in either direction.
    found = egp.GraphPolynomials(rings, injective=True, simple=True)(A).mT / 2
    return Cycles(A, (found - found.mean((0, 1))) / found.std((0, 1)))


def learn_cycles(run: Run, seed: int, model: str) -> dict[int, float]:
    """Length of the cycle -> R² of the counts at the nodes of new graphs."""
    setting = run.setting
    train, test = (
        cycles(count, run.generator(1000 * seed + count)) for count in (setting.regular, setting.regular_test)
    )

    def inputs(A: Tensor) -> Tensor:
        if model == "PPGN":
            return A[:, None]
        x = torch.ones(*A.shape[:2], 1)
        if model == "GIN with features":
            missing = [H for degree in range(3, 6) for H in egp.missing_polynomials(degree, "gin", 1)]
            x = torch.cat([x, egp.GraphPolynomials(missing)(A).mT], -1)
        return torch.cat([A, x], -1)

    x, unseen = inputs(train.A), inputs(test.A)
    if model == "GIN with features":
        mean, std = x[..., 17:].mean((0, 1)), x[..., 17:].std((0, 1)).clamp(min=1e-6)
        for part in (x, unseen):
            part[..., 17:] = (part[..., 17:] - mean) / std
    torch.manual_seed(seed)
    width = setting.cycle_width
    net: nn.Module
    if model == "PPGN":
        net = egp.PPGN(1, width, 3, 3, task="node", head=2 * width)
    else:
        net = DenseGIN(unseen.shape[2] - 16, 2 * width, 3, 3)
    fit(
        net,
        (x, train.counts),
        loss=functional.mse_loss,
        optimizer=partial(torch.optim.Adam, lr=5e-3),
        schedule=one_cycle(5e-3),
        epochs=setting.cycle_epochs,
        batch_size=10,
        clip_norm=1.0,
        seed=seed,
        device=run.device,
        progress=lambda now: run.progress(f"cycles by {model}, seed {seed}", now.step, now.total),
    )
    with torch.no_grad():
        error = (net(unseen.to(run.device)).cpu() - test.counts).square().mean((0, 1))
    spread = (test.counts - test.counts.mean((0, 1))).square().mean((0, 1))
    return {length: float(1 - error[k] / spread[k]) for k, length in enumerate((3, 4, 5))}


def left_to_right(H: Multigraph, X: Tensor) -> Tensor:
    """einsum of copies of X in the order of H's edges, without PyTorch's search for a better one."""
    names = "abcdefgh"
    factors = ",".join("z" + names[r] + names[s] for r, s in H.edges)
    enabled = torch.backends.opt_einsum.enabled
    torch.backends.opt_einsum.enabled = False
    try:
        return torch.einsum(f"{factors}->z{''.join(names[mark] for mark in H.marks)}", *[X] * H.degree)
    finally:
        torch.backends.opt_einsum.enabled = enabled


def median_time(run: Run, function: Callable[[], Tensor]) -> float:
    """Seconds; as often as the setting says, or until a second is over."""
    durations: list[float] = []
    function()
    while len(durations) < run.setting.repeats and (len(durations) < 3 or sum(durations) < 1.0):
        began = time.perf_counter()
        function()
        if run.device != "cpu":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - began)
    return statistics.median(durations)


def strips(values: dict[str, list[float]], title: str) -> alt.LayerChart:
    """A point a seed, and a tick at the mean."""
    table = [
        {"input": name, "seed": seed, "error": round(error, 5)}
        for name, errors in values.items()
        for seed, error in enumerate(errors)
    ]
    base = alt.Chart(alt.Data(values=table)).encode(y=alt.Y("input:N", title=None, sort=list(values)))
    points = base.mark_point(filled=True, size=80).encode(
        x=alt.X("error:Q", title=title, scale=alt.Scale(domainMin=0)), tooltip=["input:N", "seed:Q", "error:Q"]
    )
    means = base.mark_tick(thickness=2, size=30).encode(x="mean(error):Q")
    return (points + means).properties(width="container", height=160)
