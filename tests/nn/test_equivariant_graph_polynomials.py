"""Basis and contraction against brute force, Burnside, chromatic polynomials, closed walks and networkx."""

from __future__ import annotations

import itertools
import math

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networkx.algorithms.approximation import treewidth_min_degree

from lathe.data.graphs import random_graphs, rook_graph, shrikhande_graph
from lathe.nn.equivariant_graph_polynomials import (
    GraphPolynomials,
    Multigraph,
    Step,
    contraction_plan,
    count_basis,
    edge_list_polynomials,
    equivariant_basis,
    graph_polynomial,
    homomorphism_terms,
    injective_terms,
)

K4 = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
WHEEL = [(0, rim) for rim in range(1, 5)] + [(1, 2), (2, 3), (3, 4), (4, 1)]
DIAMOND = Multigraph(K4[1:], [0, 1])
# With joins, nested joins, loops, parallel and opposite edges, and marks that fall together.
HARD = [
    Multigraph(K4),
    Multigraph(K4, [0, 2]),
    DIAMOND,
    Multigraph([*K4, (0, 0), (1, 1), (0, 1), (1, 0)], [3, 3]),
    Multigraph(WHEEL, [1]),
    Multigraph(list(itertools.combinations(range(5), 2)), [2, 1]),
    Multigraph([(0, 1), (2, 3), (3, 2), (4, 4)], [0, 2]),
    Multigraph([(0, 0)], [1, 2]),
]
BASIS = [H for d in range(3) for k in range(3) for H in equivariant_basis(d, k) if H.num_nodes <= 4]


def brute_force(X, H, injective=False):
    """The definition: a sum over all maps of the nodes."""
    n = X.shape[0]
    result = torch.zeros([n] * H.order, dtype=X.dtype)
    for j in itertools.product(range(n), repeat=H.num_nodes):
        if not injective or len(set(j)) == len(j):
            result[tuple(j[mark] for mark in H.marks)] += math.prod(X[j[r], j[s]].item() for r, s in H.edges)
    return result


@st.composite
def multigraphs(draw, most_edges=4, orders=(0, 1, 2)):
    count = draw(st.integers(1, 4))
    node = st.integers(0, count - 1)
    edges = draw(st.lists(st.tuples(node, node), min_size=1, max_size=most_edges))
    marks = draw(st.lists(node, min_size=min(orders), max_size=max(orders)))
    used = sorted({end for edge in edges for end in edge} | set(marks))
    place = {node: number for number, node in enumerate(used)}
    return Multigraph([(place[r], place[s]) for r, s in edges], [place[mark] for mark in marks])


# --- multigraphs ---


@settings(deadline=None, max_examples=60)
@given(H=multigraphs(), data=st.data())
def test_isomorphic_multigraphs_have_one_canonical_form(H, data):
    order = data.draw(st.permutations(range(H.num_nodes)))
    edges = data.draw(st.permutations([(order[r], order[s]) for r, s in H.edges]))
    other = Multigraph(edges, [order[mark] for mark in H.marks], H.num_nodes)
    assert other.canonical() == H.canonical()
    assert H.canonical().canonical() == H.canonical()
    turned = Multigraph([(s, r) for r, s in edges], other.marks, other.num_nodes)
    assert turned.canonical(directed=False) == H.canonical(directed=False)


@pytest.mark.parametrize("graph", nx.graph_atlas_g()[30:130:3])
def test_canonical_forms_and_automorphisms_agree_with_networkx(graph):
    graph = nx.convert_node_labels_to_integers(graph.subgraph([node for node in graph if graph.degree[node]]))
    H = Multigraph.from_networkx(graph)
    matcher = nx.algorithms.isomorphism.GraphMatcher(graph, graph)
    assert H.automorphisms(directed=False) == sum(1 for _ in matcher.isomorphisms_iter())
    assert H.simple
    assert H.connected == (not H.num_nodes or nx.is_connected(graph))


def test_directed_automorphisms_keep_directions_and_marks():
    triangle = [(0, 1), (1, 2), (2, 0)]
    assert Multigraph(triangle).automorphisms() == 3
    assert Multigraph(triangle).automorphisms(directed=False) == 6
    assert Multigraph(triangle, [0]).automorphisms(directed=False) == 2
    assert Multigraph(triangle, [0, 1]).automorphisms(directed=False) == 1


def test_marks_are_ordered():
    path = [(0, 1), (1, 2)]
    assert Multigraph(path, [0, 1]).canonical() != Multigraph(path, [1, 0]).canonical()
    assert Multigraph(path, [0, 0]).canonical() != Multigraph(path, [0]).canonical()
    assert Multigraph(path, [0, 2]).transposed == Multigraph(path, [2, 0])


@pytest.mark.parametrize(
    "arguments, says",
    [
        (([(0, 1)], (), 3), r"lie on an edge, got \[2\] on none"),
        (([(0, 1)], [5], 3), r"nodes must lie in 0 to 2.*\(5,\)"),
        (([(0, -1)],), "nodes must lie in 0 to 0"),
        (([(0, 1)], [0, 1, 1]), r"at most two nodes, got \(0, 1, 1\)"),
        (([(0, 1), (1, 2, 0)],), "all pairs .* or all triples"),
        (([(0, 1, -1)],), "channels must not be negative"),
        (([(0,)],), "all pairs"),
    ],
)
def test_multigraphs_that_name_no_polynomial_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        Multigraph(*arguments)
    with pytest.raises(ValueError, match=r"marks must be nodes of the graph, got \['x'\]"):
        Multigraph.from_networkx(nx.path_graph(3), ["x"])


# --- the basis ---


def test_the_basis_has_the_sizes_that_burnside_and_the_paper_give():
    directed = {0: [1, 2, 11, 52], 1: [1, 5, 32, 199], 2: [2, 15, 117, 877]}
    undirected = {0: [1, 2, 7, 23], 1: [1, 4, 17, 69], 2: [2, 11, 56, 266]}
    for way, sizes in ((True, directed), (False, undirected)):
        for order, expected in sizes.items():
            listed = 4 if order == 0 else 3
            assert [len(equivariant_basis(d, order, directed=way)) for d in range(listed)] == expected[:listed]
            assert [count_basis(d, order, directed=way) for d in range(4)] == expected
    # The linear maps of Maron et al. 2019: the Bell numbers 15, 5 and 2.
    assert (count_basis(1, 2), count_basis(1, 1), count_basis(1, 0)) == (15, 5, 2)
    # Graphs by number of edges, without isolated nodes: OEIS A000664.
    assert [count_basis(d, 0, simple=True) for d in range(8)] == [1, 1, 2, 5, 11, 26, 68, 177]


@pytest.mark.parametrize(
    "options", [{"simple": True}, {"loops": False}, {"multi": False}, {"channels": 2}, {"nodes": 3}, {"nodes": 1}]
)
def test_listing_and_counting_agree(options):
    for degree, order in itertools.product(range(3), range(3)):
        assert len(equivariant_basis(degree, order, **options)) == count_basis(degree, order, **options)


@pytest.mark.parametrize(
    "degree, order, n, missing", [(1, 2, 4, 0), (2, 1, 5, 0), (2, 2, 6, 0), (2, 2, 5, 1), (1, 2, 3, 1)]
)
def test_basis_polynomials_are_independent_where_the_theorem_says_so(rng, degree, order, n, missing):
    X = torch.randn(12, n, n, dtype=torch.float64, generator=rng)
    columns = GraphPolynomials(equivariant_basis(degree, order))(X).movedim(1, -1).flatten(0, -2)
    columns = columns / torch.linalg.vector_norm(columns, dim=0)
    rank = int((torch.linalg.svdvals(columns) > 1e-9).sum())
    assert rank == columns.shape[1] - missing == count_basis(degree, order, nodes=n)


def test_equivariant_maps_of_any_degree_are_counted_by_the_injective_basis(rng):
    graphs = equivariant_basis(2, 2, nodes=3)
    X = torch.randn(40, 3, 3, dtype=torch.float64, generator=rng)
    columns = GraphPolynomials(graphs, injective=True)(X).movedim(1, -1).flatten(0, -2)
    columns = columns / torch.linalg.vector_norm(columns, dim=0)
    assert int((torch.linalg.svdvals(columns) > 1e-9).sum()) == len(graphs) == count_basis(2, 2, nodes=3)


@pytest.mark.parametrize("simple", [False, True])
def test_p_and_q_are_sums_of_each_other(simple):
    for H in [DIAMOND, Multigraph(K4[:4], [2]), Multigraph([(0, 1), (2, 3)], [0, 2]), Multigraph([(0, 1), (1, 2)])]:
        back: dict[Multigraph, int] = {}
        for F, weight in injective_terms(H, simple=simple).items():
            for E, times in homomorphism_terms(F, simple=simple).items():
                back[E] = back.get(E, 0) + weight * times
        assert {E: total for E, total in back.items() if total} == {H.canonical(directed=not simple): 1}
    bell = {1: 1, 2: 2, 3: 5, 4: 15, 5: 52}
    for m, number in bell.items():
        path = Multigraph([(node, node + 1) for node in range(m - 1)], () if m > 1 else (0,))
        assert sum(homomorphism_terms(path).values()) == number


def test_a_basis_that_does_not_exist_is_refused():
    for function in (equivariant_basis, count_basis):
        with pytest.raises(ValueError, match="degree must not be negative, got -1"):
            function(-1, 0)
        with pytest.raises(ValueError, match="order must be 0, 1 or 2, got 3"):
            function(1, 3)
        with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
            function(1, 1, channels=0)


# --- values ---


@pytest.mark.parametrize("injective", [False, True])
def test_values_are_those_of_the_definition(rng, injective):
    X = torch.randn(4, 4, dtype=torch.float64, generator=rng)
    for H in [*HARD, *BASIS[::3]]:
        ours, expected = graph_polynomial(X, H, injective=injective), brute_force(X, H, injective)
        scale = float(brute_force(X.abs(), H).max())
        assert float((ours - expected).abs().max()) <= 1e-10 * scale, H


@settings(deadline=None, max_examples=40)
@given(H=multigraphs(), seed=st.integers(0, 1000))
def test_any_multigraph_has_the_values_of_the_definition_also_on_edge_lists(H, seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    X = X * (torch.rand(4, 4, generator=generator) < 0.6)
    expected = brute_force(X, H)
    torch.testing.assert_close(graph_polynomial(X, H), expected, rtol=1e-9, atol=1e-9)
    if H.connected:
        index, everywhere = X.nonzero().T, torch.ones(4, 4).nonzero().T
        (ours,) = edge_list_polynomials(index, [H], num_nodes=4, edge_weight=X[*index], pairs=everywhere)
        torch.testing.assert_close(ours, expected.flatten(), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(H=multigraphs(), seed=st.integers(0, 1000))
def test_polynomials_are_equivariant_and_homogeneous(H, seed):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(2, 5, 5, dtype=torch.float64, generator=generator)
    order = torch.randperm(5, generator=generator)
    values, moved = graph_polynomial(X, H), graph_polynomial(X[:, order][:, :, order], H)
    expected = values
    for axis in range(H.order):
        expected = expected.index_select(1 + axis, order)
    scale = float(graph_polynomial(X.abs(), H).max())
    assert float((moved - expected).abs().max()) <= 1e-12 * scale
    torch.testing.assert_close(graph_polynomial(2 * X, H), 2**H.degree * values)


@pytest.mark.parametrize("n", [4, 5])
def test_on_complete_graphs_they_are_factorials_and_chromatic_polynomials(n):
    complete = 1 - torch.eye(n, dtype=torch.long)
    for graph in nx.graph_atlas_g()[1:60]:
        if min(dict(graph.degree).values()) == 0:
            continue
        H = Multigraph.from_networkx(graph)
        m = H.num_nodes
        injective = graph_polynomial(complete, H, injective=True, simple=True, exact=True)
        assert int(injective) == (math.factorial(n) // math.factorial(n - m) if m <= n else 0)
        chromatic = nx.chromatic_polynomial(graph)
        colourings = chromatic.subs(dict.fromkeys(chromatic.free_symbols, n))
        assert int(graph_polynomial(complete, H, exact=True)) == int(colourings)


def test_cycles_are_closed_walks_and_their_injective_parts_the_textbook_counts():
    for seed in range(3):
        X = random_graphs(1, 12, 0.4, generator=torch.Generator().manual_seed(seed)).adjacency[0].long()
        graph = nx.from_numpy_array(X.numpy())
        cycles = {k: Multigraph([(node, (node + 1) % k) for node in range(k)]) for k in (3, 4, 5, 6)}
        for k, H in cycles.items():
            assert int(graph_polynomial(X, H, exact=True)) == int(torch.linalg.matrix_power(X, k).trace())
        q3, q4 = (int(graph_polynomial(X, cycles[k], injective=True, exact=True)) for k in (3, 4))
        assert q3 == 2 * sum(nx.triangles(graph).values())
        degrees = X.sum(0)
        assert q4 == int(torch.linalg.matrix_power(X, 4).trace() - 2 * (degrees**2).sum() + degrees.sum())
        rooted = graph_polynomial(X, Multigraph([(0, 1), (1, 2), (2, 0)], [0]), injective=True, exact=True)
        assert (rooted // 2).tolist() == list(nx.triangles(graph).values())


def test_the_derivative_removes_an_edge_and_marks_its_ends(rng):
    X = torch.randn(4, 4, dtype=torch.float64, generator=rng).requires_grad_()
    twisted = Multigraph([(0, 0), (0, 1), (0, 1), (1, 2), (2, 0), (0, 3), (3, 1)])
    # Symmetric X too: an entry and its mirror image are two variables.
    for at in (X, (X + X.T).detach().requires_grad_()):
        for H in [Multigraph(K4), Multigraph(WHEEL), twisted]:
            (gradient,) = torch.autograd.grad(graph_polynomial(at, H), at)
            expected = sum(
                graph_polynomial(at.detach(), Multigraph([*H.edges[:e], *H.edges[e + 1 :]], H.edges[e], H.num_nodes))
                for e in range(H.degree)
            )
            torch.testing.assert_close(gradient, expected)
    assert torch.autograd.gradcheck(lambda x: graph_polynomial(x, DIAMOND), (X,))
    # At a zero too, where a product over existing edges alone would have no derivative.
    sparse = (X * (X > 0)).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: graph_polynomial(x, HARD[1]), (sparse,))


def test_strongly_regular_twins_have_the_diamonds_that_2fwl_cannot_see():
    rook, shrikhande = rook_graph(4).long(), shrikhande_graph().long()
    for X in (rook, shrikhande):  # (16, 6, 2, 2)
        assert torch.equal(X @ X, 2 + 4 * torch.eye(16, dtype=torch.long))
    assert int((rook * graph_polynomial(rook, DIAMOND, exact=True)).sum()) == 8 * 24
    assert int((shrikhande * graph_polynomial(shrikhande, DIAMOND, exact=True)).sum()) == 0


def test_many_at_once_share_work_and_give_the_same():
    X = random_graphs(3, 8, 0.5, generator=torch.Generator().manual_seed(0)).adjacency.double()
    graphs = [H for d in (4, 5) for k in range(3) for H in equivariant_basis(d, k, simple=True, connected=True)]
    together = GraphPolynomials(graphs)(X)
    assert together.shape == (3, len(graphs), 8, 8)
    for H, values in zip(graphs, together.unbind(1)):
        alone = graph_polynomial(X, H)
        if H.order == 0:
            alone = alone[:, None, None].expand(3, 8, 8)
        torch.testing.assert_close(values, torch.diag_embed(alone) if H.order == 1 else alone)
    pair = GraphPolynomials([Multigraph([(0, 1)]), Multigraph([(0, 1)], [0])])(X)
    torch.testing.assert_close(pair[:, 0], X.sum((1, 2))[:, None].expand(3, 8))
    torch.testing.assert_close(pair[:, 1], X.sum(2))


def test_padding_changes_nothing():
    X = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(X, (0, 2, 0, 2), value=7.0)
    mask = torch.tensor([True] * 4 + [False] * 2).expand(2, 6)
    for H in HARD:
        expected = graph_polynomial(X, H)
        expected = torch.nn.functional.pad(expected, (0, 2) * H.order) if H.order else expected
        torch.testing.assert_close(graph_polynomial(padded, H, mask=mask), expected)


def test_edges_may_name_channels(rng):
    X = torch.randn(2, 3, 3, 2, dtype=torch.float64, generator=rng)
    walk = graph_polynomial(X, Multigraph([(0, 1, 0), (1, 2, 1)], [0, 2]))
    torch.testing.assert_close(walk, X[..., 0] @ X[..., 1])
    assert len(equivariant_basis(1, 2, channels=2)) == 2 + 2 * (15 - 2) + 2
    with pytest.raises(ValueError, match=r"more than 2 channels, which H names, got \(2, 3, 3, 2\)"):
        graph_polynomial(X, Multigraph([(0, 1, 2)]))
    with pytest.raises(ValueError, match="with channels, or all without"):
        GraphPolynomials([Multigraph([(0, 1, 0)]), Multigraph([(0, 1)])])


def test_exact_values_have_all_digits_or_are_refused():
    X = torch.full((6, 6), 20, dtype=torch.long)
    H = Multigraph([(node, node + 1) for node in range(8)])
    assert int(graph_polynomial(X, H, exact=True)) == 6**9 * 20**8  # above 2**53
    assert int(graph_polynomial(-X, H, exact=True)) == 6**9 * 20**8
    signed = torch.randint(-3, 4, (5, 5), generator=torch.Generator().manual_seed(0))
    for H_small in HARD[:5]:
        expected = brute_force(signed.double(), H_small)
        assert torch.equal(graph_polynomial(signed, H_small, exact=True), expected.long())
    with pytest.raises(OverflowError, match="must fit into int64, got one of about"):
        graph_polynomial(100 * X, H, exact=True)
    with pytest.raises(TypeError, match=r"integers or booleans where exact is true, got torch\.float32"):
        graph_polynomial(X.float(), H, exact=True)
    with pytest.raises(TypeError, match=r"floating point unless exact is true, got torch\.int32"):
        graph_polynomial(X.int(), H)
    assert graph_polynomial(X > 50, DIAMOND, exact=True).dtype == torch.int64


def test_half_precision_is_computed_in_float32_and_empty_batches_are_empty():
    X = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = graph_polynomial(X.float(), DIAMOND).bfloat16()
    assert torch.equal(graph_polynomial(X, DIAMOND), expected)
    assert graph_polynomial(X[:0], DIAMOND).shape == (0, 6, 6)
    assert graph_polynomial(torch.zeros(3, 0, 0), DIAMOND).shape == (3, 0, 0)
    assert graph_polynomial(torch.zeros(2, 5, 5), DIAMOND).abs().max() == 0
    assert graph_polynomial(X.float()[None], Multigraph([])).tolist() == [[1.0, 1.0]]
    assert graph_polynomial(X, Multigraph([(0, 0)], [0, 0]), as_matrix=False).shape == (2, 6)


def test_inputs_that_cannot_be_are_refused():
    square = torch.zeros(2, 4, 4)
    with pytest.raises(ValueError, match=r"X must be \(\.\.\., n, n\), got \(2, 4, 3\)"):
        graph_polynomial(square[..., :3], DIAMOND)
    with pytest.raises(ValueError, match=r"mask must be \(2, 4\) for X of \(2, 4, 4\), got \(2, 3\)"):
        graph_polynomial(square, DIAMOND, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="must be a simple graph's"):
        graph_polynomial(square + 0.5, DIAMOND, injective=True, simple=True)
    with pytest.raises(ValueError, match="at least one multigraph"):
        GraphPolynomials([])
    index = torch.tensor([[0, 1], [1, 0]])
    with pytest.raises(ValueError, match=r"edge_index must be \(2, edges\), got \(2,\)"):
        edge_list_polynomials(index[0], [DIAMOND])
    with pytest.raises(ValueError, match="edge_index must lie in 0 to 0"):
        edge_list_polynomials(index, [DIAMOND], num_nodes=1)
    with pytest.raises(ValueError, match="lead from one graph of the batch into another"):
        edge_list_polynomials(index, [DIAMOND], batch=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="a graph for each of 2 nodes"):
        edge_list_polynomials(index, [DIAMOND], batch=torch.tensor([0]))
    with pytest.raises(ValueError, match="without channels"):
        edge_list_polynomials(index, [Multigraph([(0, 1, 0)])])


# --- plans ---


def test_plans_cost_what_the_treewidth_says():
    n = 10**6
    for degree, order in itertools.product((2, 4, 6), range(3)):
        for H in equivariant_basis(degree, order, simple=True, connected=True)[::3]:
            graph = nx.Graph(list(H.edges) + ([H.marks] if len(set(H.marks)) == 2 else []))
            width, _ = treewidth_min_degree(graph)  # exact up to 2, and K4 is all that is wider here
            largest = max((step.cost for step in contraction_plan(H, n)), default=1)
            # Nodes that are marked are not summed over: a mark of degree one saves its factor n.
            assert math.log(largest, n) <= width + 1 + 1e-6
            if order == 0:
                assert math.log(largest, n) == pytest.approx(width + 1, abs=1e-6)


def test_any_order_that_is_a_plan_gives_the_same(rng):
    X = torch.randn(5, 5, dtype=torch.float64, generator=rng)
    ring = Multigraph([(node, (node + 1) % 5) for node in range(5)])
    step = lambda node, *near: Step("sum", (node,), near, None, 0.0, 0.0)  # noqa: E731
    path = [step(2, 1, 3), step(0, 1, 4), step(3, 1, 4), step(1, 4), step(4)]
    torch.testing.assert_close(graph_polynomial(X, ring, path=path), graph_polynomial(X, ring))
    with pytest.raises(ValueError, match=r"path must sum over or join each of the nodes \[0, 1, 2, 3, 4\] once"):
        graph_polynomial(X, ring, path=path[:4])
    with pytest.raises(ValueError, match="node 2, which still has 3 neighbours; join it before"):
        graph_polynomial(X, DIAMOND, path=[step(2, 0, 1, 3), step(3, 0, 1)])
    with pytest.raises(ValueError, match="path is for P_H alone"):
        graph_polynomial(X, ring, path=path, injective=True)


def test_large_joins_are_cut_into_chunks(rng, monkeypatch):
    X = torch.randn(2, 7, 7, dtype=torch.float64, generator=rng)
    expected = [graph_polynomial(X, H) for H in HARD]
    monkeypatch.setattr("lathe.nn.equivariant_graph_polynomials.calculus._CHUNK", 40)
    for H, values in zip(HARD, expected):
        torch.testing.assert_close(graph_polynomial(X, H), values)


def test_edge_lists_of_a_batch_are_evaluated_graph_by_graph():
    X = random_graphs(4, 9, 0.45, generator=torch.Generator().manual_seed(3)).adjacency.double()
    where = X.nonzero()
    index = (where[:, 1:] + 9 * where[:, :1]).T
    batch = torch.arange(4).repeat_interleave(9)
    apart = Multigraph([(0, 1), (2, 3), (3, 4), (4, 2)], [0, 2])
    for H in [*HARD, apart]:
        dense = graph_polynomial(X, H)
        (ours,) = edge_list_polynomials(index, [H], num_nodes=36, batch=batch)
        torch.testing.assert_close(ours, dense[*where.T] if H.order == 2 else dense.flatten())
