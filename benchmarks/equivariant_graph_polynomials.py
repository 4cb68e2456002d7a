"""Equivariant polynomials and PPGN++ against what the reference code does for the same values.

The reference (omri1348/Equivariant-Polynomaials) evaluates each of its 12 features as an einsum of five or six copies
of the adjacency, graph by graph, in a version of PyTorch whose einsum goes from left to right. Where opt_einsum is at
hand PyTorch's einsum looks for a better order; the comparison with that is a pair of its own. Its PPGN block
concatenates, masks and convolves one after the other.
"""

from __future__ import annotations

from typing import Any

import networkx as nx
import torch
from harness import Pair
from networkx.algorithms.isomorphism import GraphMatcher
from torch import Tensor, nn

from lathe.data.graphs import random_graphs, rook_graph
from lathe.nn.equivariant_graph_polynomials import (
    PPGN,
    GraphPolynomials,
    Multigraph,
    edge_list_polynomials,
    generating_polynomials,
    paper_polynomials,
    subgraph_count,
)

LEFT_TO_RIGHT = "reference formulation (one einsum a feature and graph, left to right)"
ORDERED = "the same einsums, ordered by opt_einsum"


def pairs() -> list[Pair]:
    """Features, then counting, then the network."""
    regular = torch.stack([rook_graph(6)] * 4).float()
    generator = torch.Generator().manual_seed(0)
    rings = [molecule(generator) for _ in range(64)]
    return [
        # From left to right larger graphs take the peer minutes: n to the power of seven.
        features("12 features of a strongly regular graph, 25 nodes", [rook_graph(5).float()], False, 20.0),
        features("12 features of 4 strongly regular graphs, 36 nodes", list(regular), True, 1.0),
        features("12 features of 2 molecule-like graphs, 18 to 30 nodes", rings[:2], False, 20.0),
        features("12 features of 64 molecule-like graphs, 18 to 30 nodes", rings, True, 1.0),
        minimal(list(regular)),
        on_edges(rings),
        counting("5-cycles", nx.cycle_graph(5), 60, 100.0),
        counting("diamonds (K4 - e)", nx.Graph([(0, 1), (0, 2), (1, 2), (1, 3), (2, 3)]), 200, 100.0),
        network(batch=32, n=24, hidden=96, training=False, target=1.3),
        network(batch=32, n=24, hidden=96, training=True, target=1.3),
    ]


def molecule(generator: torch.Generator) -> Tensor:
    """A tree of degree at most four with a few bonds more, which close rings: about as many edges as ZINC's graphs."""
    n = int(torch.randint(18, 31, (), generator=generator))
    X = torch.zeros(n, n)
    for node in range(1, n):
        free = (X[:node].sum(1) < 3).nonzero().flatten()
        other = int(free[torch.randint(len(free), (), generator=generator)])
        X[node, other] = X[other, node] = 1
    for _ in range(3):
        r, s = torch.randint(n, (2,), generator=generator).tolist()
        if r != s:
            X[r, s] = X[s, r] = 1
    return X


def equation(H: Multigraph) -> str:
    names = "abcdefgh"
    factors = ",".join(names[r] + names[s] for r, s in H.edges)
    return f"{factors}->{''.join(names[mark] for mark in dict.fromkeys(H.marks))}"


def einsums(graphs: list[Tensor], polynomials: list[Multigraph], ordered: bool) -> list[Tensor]:
    """Each polynomial of each graph on its own; values at nodes on the diagonal, invariants everywhere."""
    enabled = torch.backends.opt_einsum.enabled
    torch.backends.opt_einsum.enabled = ordered and torch.backends.opt_einsum.is_available()
    try:
        results = []
        for X in graphs:
            values = []
            for H in polynomials:
                value = torch.einsum(equation(H), *[X] * H.degree)
                value = torch.diag(value) if H.order == 1 else value.expand(len(X), len(X))
                values.append(value)
            results.append(torch.stack(values))
        return results
    finally:
        torch.backends.opt_einsum.enabled = enabled


def padded(graphs: list[Tensor]) -> tuple[Tensor, Tensor]:
    n = max(len(X) for X in graphs)
    X = torch.stack([nn.functional.pad(X, (0, n - len(X)) * 2) for X in graphs])
    return X, torch.stack([torch.arange(n) < len(X) for X in graphs])


def features(title: str, graphs: list[Tensor], ordered: bool, target: float) -> Pair:
    """All 12 of PPGN++(6)."""
    polynomials = paper_polynomials()
    compute = GraphPolynomials(polynomials)
    X, mask = padded(graphs)
    sizes = [len(graph) for graph in graphs]
    return Pair(
        title,
        lambda: [values[:, :size, :size] for values, size in zip(compute(X, mask), sizes)],
        lambda: einsums(graphs, polynomials, ordered),
        ORDERED if ordered else LEFT_TO_RIGHT,
        target=target,
    )


def minimal(graphs: list[Tensor]) -> Pair:
    """Our 4 features, which serve a network as well as the 12."""
    ours, theirs = GraphPolynomials(generating_polynomials(6, "ppgn")), paper_polynomials()
    X = torch.stack(graphs)
    return Pair(
        "4 features with the power of the 12, the same graphs",
        lambda: ours(X),
        lambda: einsums(graphs, theirs, True),
        f"all 12, {ORDERED}",
        target=1.0,
        tolerance=None,
    )


def on_edges(graphs: list[Tensor]) -> Pair:
    """What message passing lacks up to degree 5, on the edge lists of a batch, beside dense einsums."""
    polynomials = [H for H in generating_polynomials(5, "gin") if H.order == 2]
    starts = torch.tensor([0] + [len(X) for X in graphs]).cumsum(0)
    index = torch.cat([X.nonzero().T + start for X, start in zip(graphs, starts)], 1)
    batch = torch.arange(len(graphs)).repeat_interleave(torch.tensor([len(X) for X in graphs]))

    def theirs() -> list[Tensor]:
        values = einsums(graphs, polynomials, True)
        return [
            torch.cat([value[number][X != 0] for value, X in zip(values, graphs)]) for number in range(len(polynomials))
        ]

    return Pair(
        f"{len(polynomials)} edge features of a batch of 64 molecule-like graphs",
        lambda: edge_list_polynomials(index, polynomials, batch=batch),
        theirs,
        ORDERED,
        target=1.0,
    )


def counting(what: str, H: nx.Graph, nodes: int, target: float) -> Pair:
    """Copies of a small graph in a random one that has 15 % of all edges."""
    X = random_graphs(1, nodes, 0.15, generator=torch.Generator().manual_seed(1)).adjacency[0]
    G = nx.from_numpy_array(X.numpy())
    own = sum(1 for _ in GraphMatcher(H, H).isomorphisms_iter())
    return Pair(
        f"{what} in a graph of {nodes} nodes",
        lambda: subgraph_count(H, X),
        lambda: sum(1 for _ in GraphMatcher(G, H).subgraph_monomorphisms_iter()) // own,
        f"networkx {nx.__version__} GraphMatcher",
        target=target,
    )


class Reference(nn.Module):
    """PPGN++ as the reference formulates it, with the weights of ours."""

    def __init__(self, net: PPGN) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(), net.head
        for block in net.blocks:
            h = block.out_channels
            u, v, skip, turned = block.weight.detach().split(h)  # type: ignore[operator]
            on_u, on_v, on_skip = block.diagonal.detach()[..., None]  # type: ignore[union-attr]
            kernels = {
                # The identity is symmetric: what reads it once is shared by both of the reference's copies of it.
                "u": torch.cat([u, on_u, turned, 0 * on_u], 1),
                "v": torch.cat([v, on_v], 1),
                "u2": block.left[0].detach(),  # type: ignore[index]
                "v2": block.right[0].detach(),  # type: ignore[index]
                "skip": torch.cat([skip, on_skip, block.mixed.detach()], 1),
            }
            convs = nn.ModuleDict({name: nn.Conv2d(kernel.shape[1], h, 1) for name, kernel in kernels.items()})
            with torch.no_grad():
                for name, kernel in kernels.items():
                    convs[name].weight.copy_(kernel[..., None, None])
                    nn.init.zeros_(convs[name].bias)
            self.layers.append(convs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        grid = (mask[:, None, :] * mask[:, :, None])[:, None]
        count = mask.sum(1, keepdim=True)
        for convs in self.layers:
            eye = torch.eye(x.shape[-1]).repeat(len(x), 1, 1, 1)
            x = torch.cat([x, eye], 1)
            u = convs["u"](torch.cat([x, x.mT], 1)).relu()
            v = convs["v"](x).relu()
            u, v = convs["u2"](u).relu() * grid, convs["v2"](v).relu() * grid
            x = convs["skip"](torch.cat([x, u @ v], 1)) * grid * grid
        trace = x.diagonal(dim1=-2, dim2=-1).sum(-1)
        others = (x.sum((-2, -1)) - trace) / (count * (count - 1))
        return self.head(torch.cat([trace / count, others], 1))


def network(batch: int, n: int, hidden: int, training: bool, target: float) -> Pair:
    """PPGN++ of ZINC's size, with a mask."""
    torch.manual_seed(0)
    net = PPGN(4, hidden, 4, 1)
    reference = Reference(net)
    x = torch.rand(batch, 4, n, n)
    mask = (torch.arange(n) < torch.randint(n // 2, n + 1, (batch, 1))).float()
    x = x * mask[:, None, :, None] * mask[:, None, None, :]

    @torch.no_grad()
    def infer(module: nn.Module) -> Any:
        return module(x, mask)

    def train(module: nn.Module) -> Any:
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        y = module(leaf, mask)
        y.square().sum().backward()
        return leaf.grad

    run = train if training else infer
    return Pair(
        f"PPGN++ {'training step' if training else 'forward pass'}, 4 blocks of width {hidden}, batch {batch}, n = {n}",
        lambda: run(net),
        lambda: run(reference),
        "reference formulation (concatenations, 1x1 convolutions, masks)",
        target=target,
        tolerance=1e-3,
        saved_memory=training,
        memory_target=0.5 if training else None,
    )
