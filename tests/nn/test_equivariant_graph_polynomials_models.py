"""What models can compute against treewidth and the paper's counts; features, counts and PPGN++ against other ways."""

from __future__ import annotations

import copy
import itertools

import jaxtyping
import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networkx.algorithms.approximation import treewidth_min_degree
from torch import nn

from lathe.data.graphs import random_graphs, random_regular_graphs, rook_graph, shrikhande_graph
from lathe.nn.equivariant_graph_polynomials import (
    PPGN,
    GraphPolynomials,
    Multigraph,
    PolynomialRegression,
    PPGNBlock,
    augment,
    equivariant_basis,
    expressive_degree,
    generating_polynomials,
    graph_polynomial,
    homomorphism_count,
    missing_polynomials,
    paper_polynomials,
    polynomial_expressive,
    scaled_features,
    separates,
    subgraph_count,
)


@pytest.fixture
def unchecked():
    """Without jaxtyping's checks, which refuse wrong words before the library does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


DIAMOND = Multigraph([(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], [0, 1])
PAW = nx.Graph([(0, 1), (1, 2), (0, 2), (2, 3)])


def graphs_of(seed=0, count=3, n=9, p=0.45):
    return random_graphs(count, n, p, generator=torch.Generator().manual_seed(seed)).adjacency.double()


# --- the decision rule ---


def test_the_decision_rule_is_treewidth():
    for graph in nx.graph_atlas_g()[2:200:3]:
        graph = graph.subgraph([node for node in graph if graph.degree[node]])
        if not graph.number_of_nodes():
            continue
        nodes = list(graph)
        for marks in [(), *((a,) for a in nodes[:2]), *itertools.permutations(nodes[:3], 2)]:
            H = Multigraph.from_networkx(graph, marks)
            closed = nx.Graph(graph)
            if len(marks) == 2:
                closed.add_edge(*marks)
            assert polynomial_expressive(H, "ppgn") == (treewidth_min_degree(closed)[0] <= 2)
            if len(marks) < 2:
                assert polynomial_expressive(H, "mpnn") == nx.is_forest(graph)
            assert polynomial_expressive(H, 3) == (treewidth_min_degree(closed)[0] <= 3)


def test_the_numbers_of_missing_polynomials_are_the_papers():
    found = [[len(missing_polynomials(d, "ppgn", k)) for k in range(3)] for d in (4, 5, 6)]
    assert found == [[0, 0, 0], [0, 0, 1], [1, 1, 9]]
    assert [len(missing_polynomials(d, "mpnn", 1)) for d in range(1, 6)] == [0, 0, 1, 4, 17]
    # A rule that looks for neighbours in the graph as it was before earlier sums takes this one for computable.
    subdivided = Multigraph([(0, 2), (0, 3), (1, 2), (1, 3), (2, 4), (4, 5), (5, 3)], [0, 1])
    assert not polynomial_expressive(subdivided, "ppgn")
    assert len(paper_polynomials(6)) == 12
    assert missing_polynomials(5, "ppgn") == [DIAMOND]
    assert [expressive_degree("ppgn", k) for k in range(3)] == [5, 5, 4]
    assert [expressive_degree("gin", k) for k in range(3)] == [2, 2, 1]


def test_four_features_stand_for_the_papers_twelve():
    few = generating_polynomials(6, "ppgn")
    assert len(few) == 4
    assert few[0] == DIAMOND
    for H in paper_polynomials(6):
        assert polynomial_expressive(H, "ppgn", given=few)
        assert not polynomial_expressive(H, "ppgn")
    for left_out in range(4):
        rest = few[:left_out] + few[left_out + 1 :]
        assert not all(polynomial_expressive(H, "ppgn", given=rest) for H in paper_polynomials(6))
    # K4 is no more than an edge times a diamond; the diamond with a subdivided edge is more.
    K4 = Multigraph(list(itertools.combinations(range(4), 2)), [0, 1])
    assert polynomial_expressive(K4, "ppgn", given=[DIAMOND])
    assert [polynomial_expressive(H, "ppgn", given=[DIAMOND]) for H in few] == [True, False, False, False]


def test_the_four_features_are_the_formulas_of_the_sheet():
    A = graphs_of()
    squared, degree = A @ A, A.sum(-1)
    P5, *others = GraphPolynomials(generating_polynomials(6, "ppgn"))(A).unbind(1)
    torch.testing.assert_close(P5, torch.einsum("zac,zad,zbc,zbd,zcd->zab", A, A, A, A, A))
    formulas = [
        torch.einsum("zac,zad,zbc,zbd,zcd,zd->zab", A, A, A, A, A, degree),
        torch.einsum("zac,zad,zbc,zbd,zcd->zab", A, A, A, A, squared),
        torch.einsum("zac,zad,zbc,zbd,zcd->zab", A, A, A, squared, A),
    ]
    for ours, formula in zip(others, formulas):
        assert torch.equal(ours, formula) or torch.equal(ours, formula.mT)


def test_message_passing_needs_one_feature_for_triangles():
    (triangle,) = generating_polynomials(3, "gin")
    assert triangle.canonical() == Multigraph([(0, 1), (0, 2), (1, 2)], [0, 1]).canonical()
    for order in (0, 1):
        for H in missing_polynomials(3, "gin", order):
            assert polynomial_expressive(H, "gin", given=[triangle])
    given = generating_polynomials(5, "gin")
    assert all(
        polynomial_expressive(H, "gin", given=given) for d in (3, 4, 5) for H in missing_polynomials(d, "gin", 1)
    )
    assert all(H.order == 1 for H in generating_polynomials(4, "gin", 1))


def test_what_is_asked_of_unknown_models_is_refused():
    for bad in ("cnn", 0):
        with pytest.raises(ValueError, match=f"model must be one of mpnn.*got {bad!r}"):
            polynomial_expressive(DIAMOND, bad)
    with pytest.raises(ValueError, match="order must be 1, 2 or None, got 0"):
        generating_polynomials(3, "gin", 0)
    with pytest.raises(ValueError, match="no limit was found"):
        expressive_degree(4, 0)


# --- counts ---


@pytest.mark.parametrize("H", [nx.cycle_graph(4), nx.cycle_graph(5), PAW, nx.complete_graph(4), nx.star_graph(3)])
def test_counts_are_those_of_networkx(H):
    G = nx.gnp_random_graph(9, 0.5, seed=3)
    matcher = nx.algorithms.isomorphism.GraphMatcher
    own = sum(1 for _ in matcher(H, H).isomorphisms_iter())
    assert subgraph_count(H, G) == sum(1 for _ in matcher(G, H).subgraph_monomorphisms_iter()) // own
    assert subgraph_count(H, G, induced=True) == sum(1 for _ in matcher(G, H).subgraph_isomorphisms_iter()) // own
    X = torch.from_numpy(nx.to_numpy_array(G)).long()
    assert subgraph_count(H, X) == subgraph_count(H, G)
    edges = set(G.edges) | {(s, r) for r, s in G.edges}
    nodes = list(H)
    maps = sum(
        all((j[nodes.index(r)], j[nodes.index(s)]) in edges for r, s in H.edges)
        for j in itertools.product(range(9), repeat=len(nodes))
    )
    assert homomorphism_count(H, G) == maps == int(graph_polynomial(X, Multigraph.from_networkx(H), exact=True))


def test_counts_do_not_round_and_say_where_they_do_not_fit():
    G = nx.complete_graph(300)
    assert homomorphism_count(nx.path_graph(7), G) == 300 * 299**6  # above 2**53
    with pytest.raises(OverflowError, match="must fit into int64"):
        homomorphism_count(nx.path_graph(9), G)
    for bad, says in [
        (torch.ones(2, 3), r"adjacency \(n, n\), got \(2, 3\)"),
        (torch.tensor([[0.0, 2.0], [2.0, 0.0]]), "symmetric with entries 0 and 1"),
    ]:
        with pytest.raises(ValueError, match=says):
            homomorphism_count(nx.path_graph(2), bad)
    with pytest.raises(ValueError, match="H must have no marks"):
        homomorphism_count(DIAMOND, G)
    with pytest.raises(ValueError, match="no loops and no repeated edges"):
        subgraph_count(Multigraph([(0, 0)]), G)
    with pytest.raises(ValueError, match="G must have no loops"):
        subgraph_count(nx.path_graph(2), torch.eye(3))


def test_pairs_are_told_apart_by_distance():
    found = separates(torch.tensor([0.0, 1.0, 1.05]), lambda x: x, tolerance=0.1)
    assert found.tolist() == [[False, True, True], [True, False, False], [True, False, False]]
    assert separates([], lambda x: x).shape == (0, 0)


def test_regression_on_the_basis_finds_the_substructure():
    X = graphs_of(count=200, n=10, p=0.35)
    target = graph_polynomial(X, Multigraph([(0, 1), (1, 2), (0, 2)]), injective=True) / 6
    model = PolynomialRegression(3).fit(X[:150], 2 * target[:150] + 1)
    torch.testing.assert_close(model.predict(X[150:]), 2 * target[150:] + 1, rtol=1e-3, atol=1e-2)
    weights = {len(H.edges): weight for H, weight in model.coefficients.items() if H.num_nodes == 3 and H.degree == 3}
    assert weights[3] == pytest.approx(2 / 6, rel=1e-3)
    nodes = PolynomialRegression(3, order=1).fit(X, X.sum(-1))
    torch.testing.assert_close(nodes.predict(X), X.sum(-1), rtol=1e-3, atol=1e-2)
    with pytest.raises(ValueError, match=r"y must be \(200,\) for order 0, got \(200, 10\)"):
        model.fit(X, X.sum(-1))
    with pytest.raises(RuntimeError, match="fit must be called first"):
        PolynomialRegression(2).predict(X)
    with pytest.raises(ValueError, match="degree must be at least 1"):
        PolynomialRegression(0)
    with pytest.raises(ValueError, match="ridge must not be negative"):
        PolynomialRegression(2, ridge=-1.0)


# --- features for other networks ---


def test_dense_features_stand_where_their_nodes_are(unchecked):
    X = graphs_of()
    polynomials = [DIAMOND, Multigraph([(0, 1), (1, 2), (0, 2)], [0]), Multigraph([(0, 1)])]
    features = augment(X, polynomials=polynomials, scale="none")
    torch.testing.assert_close(features[:, 0], graph_polynomial(X, DIAMOND))
    assert torch.equal(features[:, 1], torch.diag_embed(features[:, 1].diagonal(dim1=1, dim2=2)))
    assert torch.equal(features[:, 2], X.sum((1, 2))[:, None, None].expand(3, 9, 9))
    assert augment(X, "ppgn", 6).shape == (3, 4, 9, 9)
    assert augment(X[0].long(), "ppgn").dtype == torch.float32
    with pytest.raises(ValueError, match="nothing is missing of model 'ppgn' up to degree 4"):
        augment(X, "ppgn", 4)
    with pytest.raises(ValueError, match=r"graph must be \(\.\.\., n, n\), got \(3, 9, 8\)"):
        augment(X[..., :8])
    with pytest.raises(TypeError, match="tensor or a Data of PyTorch Geometric, got str"):
        augment("graph")


def test_scales_keep_zeros_and_signs(unchecked):
    values = torch.tensor([[[0.0, 3.0], [4.0, 0.0]], [[0.0, -4.0], [0.0, 0.0]]])
    unit = scaled_features(values, "unit")
    assert torch.equal(unit == 0, values == 0)
    torch.testing.assert_close(torch.linalg.vector_norm(unit, dim=(-2, -1)), torch.ones(2))
    torch.testing.assert_close(scaled_features(values)[1, 0, 1], -torch.tensor(5.0).log())
    assert scaled_features(values, "none") is values
    with pytest.raises(ValueError, match="scale must be 'log', 'unit' or 'none', got 'square'"):
        scaled_features(values, "square")  # type: ignore[arg-type]


def test_graphs_of_pytorch_geometric_get_columns():
    geometric = pytest.importorskip("torch_geometric")
    data, loader = geometric.data, geometric.loader
    X = graphs_of(count=4)
    single = [data.Data(x=torch.ones(9, 2), edge_index=x.nonzero().T, y=torch.zeros(1)) for x in X]
    polynomials = [Multigraph([(0, 1), (1, 2), (0, 2)], [0]), DIAMOND, Multigraph([(0, 1)])]
    each = [augment(graph, polynomials=polynomials, scale="none") for graph in single]
    for graph, x in zip(each, X):
        r, s = graph.edge_index
        torch.testing.assert_close(graph.x[:, 2].double(), graph_polynomial(x, polynomials[0]))
        torch.testing.assert_close(graph.x[:, 3].double(), x.sum().expand(9))
        torch.testing.assert_close(graph.edge_attr[:, 0].double(), graph_polynomial(x, DIAMOND)[r, s])
    whole = augment(data.Batch.from_data_list(single), polynomials=polynomials, scale="none")
    torch.testing.assert_close(whole.x, torch.cat([graph.x for graph in each]))
    torch.testing.assert_close(whole.edge_attr, torch.cat([graph.edge_attr for graph in each]))
    assert single[0].x.shape == (9, 2), "what was given is left alone"
    bare = augment(data.Data(edge_index=single[0].edge_index, num_nodes=9), "gin", 3)
    assert bare.edge_attr.shape == (single[0].num_edges, 1)
    # The user's own network, with the new columns.
    given = [augment(graph, "gin", 3) for graph in single]
    batch = next(iter(loader.DataLoader(given, batch_size=4)))
    layer = geometric.nn.GINEConv(nn.Linear(2, 3), edge_dim=batch.edge_attr.shape[1])
    assert layer(batch.x, batch.edge_index, batch.edge_attr).shape == (36, 3)
    with pytest.raises(ValueError, match="'log' or 'none' for edge lists"):
        augment(single[0], scale="unit")


# --- PPGN++ ---


class Direct(nn.Module):
    """A block by its formula: concatenations, maps of channels entry by entry, einsum."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        b, h, n = self.block, self.block.out_channels, x.shape[-1]
        W, eye = b.weight.split(h), torch.eye(n, dtype=x.dtype)
        diagonal = b.diagonal if b.identity else torch.zeros(3, h, dtype=x.dtype)
        first = [
            torch.einsum("oc,zcij->zoij", W[part], x)
            + b.bias.split(h)[part][:, None, None]
            + torch.einsum("o,ij->oij", diagonal[part], eye)
            for part in range(3)
        ]
        if b.transpose:
            first[0] = first[0] + torch.einsum("oc,zcji->zoij", W[3], x)
        u, v = b.activation(first[0]), b.activation(first[1])
        for left, lb, right, rb in zip(b.left, b.left_bias, b.right, b.right_bias):
            u = b.activation(torch.einsum("oc,zcij->zoij", left, u) + lb[:, None, None])
            v = b.activation(torch.einsum("oc,zcij->zoij", right, v) + rb[:, None, None])
        z = torch.einsum("zcij,zcjk->zcik", u, v) / (n if b.aggr == "mean" else 1)
        return first[2] + torch.einsum("oc,zcij->zoij", b.mixed, z)


BLOCKS = [
    {},
    {"depth": 1},
    {"depth": 3, "aggr": "mean"},
    {"transpose": False},
    {"transpose": False, "depth": 1, "identity": False},
    {"activation": nn.Tanh, "aggr": "mean"},
]


@pytest.mark.parametrize("options", BLOCKS)
def test_a_block_is_its_formula_with_all_gradients(options):
    block = PPGNBlock(3, 5, **options, dtype=torch.float64)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    learnt = [x, *block.parameters()]
    ours, expected = block(x), Direct(block)(x)
    torch.testing.assert_close(ours, expected)
    weights = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad((ours * weights).sum(), learnt), torch.autograd.grad((expected * weights).sum(), learnt)
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "options", [{}, {"activation": nn.Sigmoid}, {"aggr": "mean", "activation": nn.Tanh, "depth": 1}]
)
@pytest.mark.parametrize("task", ["graph", "node", "edge"])
def test_padding_changes_no_result(options, task):
    net = PPGN(2, 6, 2, 3, task=task, features="minimal", **options).double()
    sizes = [5, 3, 7, 1, 4, 6, 2, 7, 3]
    singles = [
        torch.cat([graphs_of(s, 1, n)[:, None], torch.randn(1, 1, n, n).double()], 1) for s, n in enumerate(sizes)
    ]
    n = max(sizes)
    padded = torch.cat([nn.functional.pad(x, (0, n - x.shape[-1]) * 2, value=float(k)) for k, x in enumerate(singles)])
    mask = torch.arange(n) < torch.tensor(sizes)[:, None]
    together = net(padded, mask)
    for result, x, size in zip(together, singles, sizes):
        alone = net(x)[0]
        if task == "node":
            assert result[size:].abs().sum() == 0
            result = result[:size]
        elif task == "edge":
            result = result[:, :size, :size]
        torch.testing.assert_close(result, alone)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 100), task=st.sampled_from(["graph", "node", "edge"]))
def test_networks_are_equivariant(seed, task):
    generator = torch.Generator().manual_seed(seed)
    net = PPGN(2, 5, 2, 3, task=task, features="paper").double()
    x = torch.cat([graphs_of(seed, 2, 6)[:, None], torch.randn(2, 1, 6, 6, generator=generator).double()], 1)
    order = torch.randperm(6, generator=generator)
    expected = net(x)
    if task == "node":
        expected = expected[:, order]
    elif task == "edge":
        expected = expected[:, :, order][..., order]
    torch.testing.assert_close(net(x[:, :, order][..., order]), expected, rtol=1e-10, atol=1e-10)


def test_only_the_transpose_reads_the_other_direction():
    x = torch.randn(1, 1, 4, 4)
    changed = x.clone()
    changed[0, 0, 2, 1] += 1.0
    for transpose in (False, True):
        block = PPGNBlock(1, 4, transpose=transpose)
        nn.init.zeros_(block.mixed)  # no product: what is left acts on each pair alone
        nn.init.zeros_(block.weight[8:12].detach())
        at = (block(changed) - block(x))[0, :, 1, 2]
        assert bool(at.abs().max() > 0) == False  # noqa: E712 - the skip connection reads (1, 2) alone
    u_of = lambda block, x: nn.functional.conv2d(x, block.weight[:4, :, None, None])  # noqa: E731
    assert torch.equal(u_of(block, x)[0, :, 1, 2], u_of(block, changed)[0, :, 1, 2])


def test_a_ppgn_needs_the_diamond_for_the_strongly_regular_twins():
    pair = torch.stack([rook_graph(4), shrikhande_graph()]).double()[:, None]
    for seed in range(3):
        torch.manual_seed(seed)
        plain = PPGN(1, 6, 3, 16, activation=nn.Tanh, aggr="mean").double()
        more = PPGN(1, 6, 3, 16, activation=nn.Tanh, aggr="mean", features=[DIAMOND]).double()
        assert not separates(pair, lambda x, net=plain: net(x[None])).any()
        assert separates(pair, lambda x, net=more: net(x[None])).sum() == 2


def test_graphs_of_one_node_and_of_none_have_finite_results():
    net = PPGN(1, 4, 1, 2)
    assert torch.isfinite(net(torch.zeros(2, 1, 1, 1))).all()
    assert torch.isfinite(net(torch.zeros(2, 1, 3, 3), torch.zeros(2, 3))).all()
    assert net(torch.zeros(2, 1, 0, 0)).shape == (2, 2)


def test_under_autocast_blocks_run_in_bfloat16_and_train():
    net = PPGN(1, 8, 2, 1, features="minimal")
    x = graphs_of().float()[:, None]
    expected = net(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        diamonds = graph_polynomial(1 - torch.eye(40), DIAMOND)
    assert diamonds[0, 1] == 38 * 37, "counts are not rounded to bfloat16"
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1)
    assert all(parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in net.parameters())


def test_starts_are_xaviers_for_the_maps_of_the_reference():
    block = PPGNBlock(95, 95)
    std = lambda fan: (2 / fan) ** 0.5  # noqa: E731
    u, v, skip, turned = block.weight.detach().split(95)
    for part, fan in (
        (u, 3 * 95 + 2),
        (turned, 3 * 95 + 2),
        (v, 2 * 95 + 1),
        (skip, 3 * 95 + 1),
        (block.mixed, 3 * 95 + 1),
    ):
        assert float(part.detach().std()) == pytest.approx(std(fan), rel=0.05)
    first = copy.deepcopy(block)
    for each in (first, block):
        each.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(first.weight, block.weight)
    # ZINC's network of the paper: 8 blocks of width 95 stay under half a million parameters.
    zinc = PPGN(13, 95, 8, 1)
    assert sum(p.numel() for p in zinc.parameters()) == pytest.approx(500_000, rel=0.15)


def test_networks_that_cannot_be_are_refused(unchecked):
    for arguments, says in [
        ((0, 4), "in_channels, out_channels and depth must be at least 1, got 0, 4 and 2"),
        ((1, 4, 0), "got 1, 4 and 0"),
    ]:
        with pytest.raises(ValueError, match=says):
            PPGNBlock(*arguments)
    with pytest.raises(ValueError, match="aggr must be 'sum' or 'mean', got 'max'"):
        PPGNBlock(1, 4, aggr="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers, out_channels and head must be at least 1, got 0, 1, None"):
        PPGN(1, 4, 0, 1)
    with pytest.raises(ValueError, match="task must be 'graph', 'node' or 'edge', got 'link'"):
        PPGN(1, 4, 1, 1, task="link")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="features must be 'paper', 'minimal', a list"):
        PPGN(1, 4, 1, 1, features="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mask must be \(2, 3\), got \(2, 4\)"):
        PPGN(1, 4, 1, 1)(torch.zeros(2, 1, 3, 3), torch.ones(2, 4))


def test_message_passing_is_blind_on_regular_graphs_and_one_feature_opens_its_eyes():
    X = random_regular_graphs(2, 10, 3, generator=torch.Generator().manual_seed(0)).adjacency.double()
    rooted = [H for d in range(1, 6) for H in equivariant_basis(d, 1, simple=True, connected=True)]
    trees = [H for H in rooted if polynomial_expressive(H, "mpnn")]
    values = GraphPolynomials(trees)(X)
    assert torch.equal(values, values[:, :, :1].expand_as(values))
    seen = GraphPolynomials(missing_polynomials(3, "gin", 1))(X)
    assert (seen != seen[:, :, :1]).any()
