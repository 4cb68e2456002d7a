"""The front by brute force, the checks by hand on tiny networks, and a search that can be stopped and replayed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lathe.nn.evonorm import (
    BASELINE_GRAPHS,
    EVONORM_GRAPHS,
    Candidate,
    EvoNormS0,
    NormActGraph,
    SearchResult,
    evolve_norm_act,
    pareto_front,
    quality_check,
    rerank,
    stability_check,
    structural_check,
)
from lathe.nn.evonorm.search import _Training, _winner

S0 = EVONORM_GRAPHS["S0"]
EXP = NormActGraph([("exp", (0,))])


def s0(channels):
    return S0.to_module(channels, groups=2)


def chain(norm_act):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), norm_act(4), nn.Conv2d(4, 4, 2), norm_act(4), nn.Flatten(), nn.Linear(36, 3)
    )


def single(norm_act):
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm_act(4), nn.Flatten(), nn.Linear(64, 3))


def task(rng, count=96):
    """Three classes that a linear map tells apart."""
    labels = torch.randint(3, (count,), generator=rng)
    patterns = torch.randn(3, 1, 6, 6, generator=rng)
    inputs = patterns[labels] + 0.3 * torch.randn(count, 1, 6, 6, generator=rng)
    return inputs[: count // 2], labels[: count // 2], inputs[count // 2 :], labels[count // 2 :]


def test_front_equals_brute_force_on_a_thousand_matrices(rng):
    for _ in range(1000):
        rows, columns = (int(n) for n in torch.randint(1, 7, (2,), generator=rng))
        scores = torch.randint(0, 4, (rows, columns), generator=rng).double()  # few values: many ties
        table = scores.tolist()
        kept = [
            not any(
                all(b >= a for a, b in zip(mine, other)) and any(b > a for a, b in zip(mine, other)) for other in table
            )
            for mine in table
        ]
        assert pareto_front(scores).tolist() == kept


def test_structure_is_judged_without_training():
    assert structural_check(NormActGraph([("add", (1, 3))])) == "input-free"
    assert structural_check(NormActGraph([("neg", (0,)), ("add", (0, 4))])) == "input-free"
    assert structural_check(NormActGraph([("mul", (0, 1))])) == "input-free"
    assert structural_check(NormActGraph([("mul", (0, 0))])) == "sign-blind"
    blow_up = [("exp", (0,)), *[("exp", (k,)) for k in range(4, 8)]]
    assert structural_check(NormActGraph(blow_up)) == "not finite"
    for graph in (*EVONORM_GRAPHS.values(), *BASELINE_GRAPHS.values(), EXP):
        assert structural_check(graph) is None


def test_quality_passes_what_learns_and_stops_at_the_first_failure(rng):
    data = task(rng)
    good = quality_check(s0, [chain, single], data, steps=60, batch_size=16)
    assert good.passed and len(good.values) == 2 and min(good.values) > 0.8 and good.failed_anchor is None
    flat = NormActGraph([("mean", (0,), "layer")])
    bad = quality_check(flat.to_module, [single, chain], data, steps=20, batch_size=16, threshold=0.9)
    assert not bad.passed and bad.failed_anchor == 0 and len(bad.values) == 1
    blown = quality_check(NormActGraph([("exp", (0,)), ("exp", (4,)), ("exp", (5,))]).to_module, [single], data)
    assert not blown.passed and blown.values == (0.0,)


def test_quality_threshold_is_twice_chance(rng):
    inputs, labels, *rest = task(rng)
    always = quality_check(s0, [single], (inputs, labels, *rest), steps=0, threshold=0.0)
    assert always.passed
    report = quality_check(s0, [single], (inputs, labels, *rest), steps=0)
    assert report.passed == (report.values[0] >= 2 / 3)


def test_fused_layers_are_judged_as_their_graphs(rng):
    data = task(rng)
    fused = quality_check(lambda c: EvoNormS0(c, groups=2), [single], data, steps=30, batch_size=16)
    graph = quality_check(lambda c: S0.to_module(c, groups=2, guard=0.0), [single], data, steps=30, batch_size=16)
    assert fused.values == pytest.approx(graph.values, abs=0.03)


def test_training_goes_on_where_it_stopped(rng):
    data = task(rng)
    once, twice = (_Training(s0, chain, data, 16, 0.1, 5) for _ in range(2))
    once.advance(20)
    twice.advance(7)
    accuracy = twice.accuracy()  # must not disturb what follows
    twice.advance(20)
    assert 0 <= accuracy <= 1
    for a, b in zip(once.model.state_dict().values(), twice.model.state_dict().values()):
        assert torch.equal(a, b)


def test_stability_starts_from_the_gradient_norm_and_climbs(rng):
    data = task(rng)
    torch.manual_seed(0)
    model = single(s0)
    batch = torch.randperm(48, generator=torch.Generator().manual_seed(0))[:16]
    loss = F.cross_entropy(model(data[0][batch]), data[1][batch])
    (gradient,) = torch.autograd.grad(loss, model[0].weight)
    norms = [stability_check(s0, [single], data, steps=n, batch_size=16).values[0] for n in (0, 1, 5, 30)]
    assert norms[0] == pytest.approx(float(gradient.norm()), rel=1e-5)
    assert norms[0] < norms[1] <= norms[2] <= norms[3]


def test_stability_tells_bounded_layers_from_explosive_ones(rng):
    data = task(rng)
    for name in ("B0", "S0", "S2"):
        layer = partial(EVONORM_GRAPHS[name].to_module, groups=2)
        report = stability_check(layer, [chain, single], data, batch_size=16)
        assert report.passed and len(report.values) == 2
    report = stability_check(EXP.to_module, [chain, single], data, batch_size=16)
    assert not report.passed and report.failed_anchor == 0 and len(report.values) == 1


def test_stability_refuses_a_layer_that_differentiates_once(rng):
    with pytest.raises(RuntimeError, match="differentiable once"):
        stability_check(lambda c: EvoNormS0(c, groups=2), [single], task(rng), steps=2, batch_size=16)


def test_global_random_numbers_are_left_alone(rng):
    data = task(rng)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    quality_check(s0, [single], data, steps=2, batch_size=16)
    assert torch.equal(torch.rand(4), expected)


SEARCH = {
    "window": 6,
    "tournament": 3,
    "groups": 2,
    "proxy_steps": 8,
    "quality_steps": 4,
    "stability_steps": 1,
    "threshold": 0.3,
    "batch_size": 16,
    "seed": 1,
}


def told(result: SearchResult) -> list:
    return [(c.graph, c.accuracies, c.origin) for c in result.history]


def test_a_search_replays_and_resumes_to_the_same_history(rng):
    data, seen = task(rng), []
    whole = evolve_norm_act(
        [single, chain], data, evaluations=10, on_result=lambda result, graph, out: seen.append(out), **SEARCH
    )
    again = evolve_norm_act([single, chain], data, evaluations=10, **SEARCH)
    assert told(whole) == told(again)
    part = evolve_norm_act([single, chain], data, evaluations=4, **SEARCH)
    stored = SearchResult.from_json(part.to_json())
    resumed = evolve_norm_act([single, chain], data, evaluations=10, resume=stored, **SEARCH)
    assert told(resumed) == told(whole) and len({c.graph.hash() for c in part.history}) == 4
    assert whole.attempts == resumed.attempts and whole.rejections == resumed.rejections
    assert whole.attempts == len(whole.history) + sum(whole.rejections.values()) == len(seen)
    assert len({c.graph.hash() for c in whole.history}) == 10 == len(whole.history) - whole.reused
    assert len({c.origin for c in whole.history}) == 2
    assert whole.best.mean == max(c.mean for c in whole.history) == whole.top(3)[0].mean
    for kept in whole.front:
        assert not any(
            all(b >= a for a, b in zip(kept.accuracies, c.accuracies)) and c.accuracies != kept.accuracies
            for c in whole.history
        )


def test_random_search_shares_its_draws_and_verdicts_with_evolution(rng):
    data, known = task(rng), {}
    random = evolve_norm_act([single], data, evaluations=5, explore=1.0, known=known, **SEARCH)
    assert {c.origin for c in random.history} == {"random"} and len(known) <= random.attempts
    evolved = evolve_norm_act([single], data, evaluations=5, known=known, **SEARCH)
    assert evolved.seconds < random.seconds
    alone = evolve_norm_act([single], data, evaluations=5, **SEARCH)
    assert told(alone) == told(evolved)


def test_two_processes_find_what_the_rule_says_and_random_search_finds_the_same(rng):
    data = task(rng)
    alone = evolve_norm_act([single, chain], data, evaluations=5, explore=1.0, **SEARCH)
    both = evolve_norm_act([single, chain], data, evaluations=5, explore=1.0, workers=2, **SEARCH)
    assert told(alone) == told(both) and alone.attempts == both.attempts and alone.rejections == both.rejections
    whole = evolve_norm_act([single], data, evaluations=6, workers=2, **SEARCH)
    part = evolve_norm_act([single], data, evaluations=3, workers=2, **SEARCH)
    resumed = evolve_norm_act([single], data, evaluations=6, workers=2, resume=part, **SEARCH)
    assert told(resumed) == told(whole)
    # A child of attempt k is drawn from what was known before attempt k - 1.
    seen = {c.graph.hash(): c.attempt for c in reversed(whole.history)}
    for child in whole.history:
        if child.origin == "mutation":
            assert min(seen.values()) < child.attempt - 1


def test_batch_independent_search_uses_no_batch_moment(rng):
    result = evolve_norm_act([single], task(rng), evaluations=5, batch_independent=True, **SEARCH)
    assert all(c.graph.batch_independent for c in result.history)


def test_a_time_budget_ends_the_search(rng):
    result = evolve_norm_act([single], task(rng), evaluations=10_000, seconds=0.3, **SEARCH)
    assert result.seconds < 5 and len(result.history) < 10_000


def test_tournaments_pick_from_the_front_or_by_the_mean(rng):
    def candidate(*accuracies):
        return Candidate(S0, accuracies)

    recent = [candidate(0.9, 0.1), candidate(0.5, 0.6), candidate(0.4, 0.5), candidate(0.1, 0.8)]
    assert all(_winner(recent, 4, "average", rng) is recent[1] for _ in range(20))
    counts = [0] * 4
    for _ in range(3000):
        counts[recent.index(_winner(recent, 4, "pareto", rng))] += 1
    assert counts[2] == 0 and all(abs(counts[k] - 1000) < 120 for k in (0, 1, 3))
    # A small share of a small window still compares two.
    assert sum(_winner(recent, 0.05, "average", rng) is recent[2] for _ in range(2000)) < 2000 / 4


def test_rerank_trains_anew_and_sorts(rng):
    data = task(rng)
    result = rerank([Candidate(EXP, (1.0,)), Candidate(S0, (0.0,))], [chain, single], data, steps=40, batch_size=16)
    assert [len(c.accuracies) for c in result] == [2, 2] and result[0].mean >= result[1].mean
    expected = quality_check(s0, [chain, single], data, steps=40, batch_size=16, threshold=0.0).values
    assert next(c for c in result if c.graph == S0).accuracies == expected


def test_bad_arguments_are_named(rng):
    data = task(rng)
    for change, message in (
        ({"evaluations": 0}, "evaluations"),
        ({"explore": 1.5}, "explore"),
        ({"select": "best"}, "select"),
        ({"quality_steps": 9}, "quality_steps"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            evolve_norm_act([single], data, **{"evaluations": 2, **SEARCH, **change})
    with pytest.raises(ValueError, match="anchors"):
        evolve_norm_act([], data, evaluations=1)
    with pytest.raises(ValueError, match="pair inputs with labels"):
        evolve_norm_act([single], (data[0][:5], *data[1:]), evaluations=1)
    with pytest.raises(ValueError, match="no candidate"):
        _ = SearchResult().best
    assert SearchResult().front == []
    with pytest.raises(ValueError, match="without convolution or linear weights"):
        stability_check(s0, [lambda factory: nn.Sequential(nn.Flatten(), nn.PReLU())], data)
