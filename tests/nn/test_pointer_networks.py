"""Pointers against sums written out, decoding against exhaustive search, teacher forcing against single steps."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lathe.data.tours import IGNORED, HullDataset, convex_hull, pad_problems, tour_length, tsp
from lathe.nn.pointer_networks import (
    Hull,
    Permutation,
    PointerAttention,
    PointerNetwork,
    Seq2SeqAttention,
    Seq2SeqFixed,
    SpanPointer,
    TeacherForced,
    Triangles,
    additive_scores,
    hull_metrics,
    is_tour,
    pointer_generator,
    pointer_loss,
    reinforce_loss,
)
from lathe.nn.pointer_networks import attention as attention_file
from lathe.training import fit


def sharp(net: nn.Module) -> nn.Module:
    """Larger weights, so that no two choices are nearly equal."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4)
    return net.double()


def make(**options) -> PointerNetwork:
    return sharp(PointerNetwork(hidden_dim=6, **options))


NETWORKS = {
    "paper": make,
    "memory": lambda **o: make(feed="memory", **o),
    "glimpses": lambda **o: make(glimpses=2, **o),
    "bidirectional": lambda **o: make(bidirectional=True, **o),
    "fixed": lambda **o: sharp(Seq2SeqFixed(4, hidden_dim=6, **o)),
    "attention": lambda **o: sharp(Seq2SeqAttention(4, hidden_dim=6, **o)),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def uniform(count: int, n: int) -> torch.Tensor:
    return torch.rand(count, n, 2, dtype=torch.float64)


def all_sequences(n: int, steps: int) -> list[tuple[int, ...]]:
    """Every sequence of choices that ends with the stop token n, or is cut off after `steps`."""
    ends = [(*body, n) for length in range(steps) for body in itertools.product(range(n), repeat=length)]
    return ends + list(itertools.product(range(n), repeat=steps))


def padded(sequences: list[tuple[int, ...]]) -> torch.Tensor:
    width = max(map(len, sequences))
    return torch.tensor([[*sequence, *[IGNORED] * (width - len(sequence))] for sequence in sequences])


# --- the attention ---


@settings(max_examples=15, deadline=None)
@given(B=st.integers(1, 3), T=st.integers(1, 3), n=st.integers(1, 4), h=st.integers(1, 5), seed=st.integers(0, 999))
def test_logits_are_those_of_equation_3(B, T, n, h, seed):
    torch.manual_seed(seed)
    layer = PointerAttention(3, 4, h).double()
    query, memory = torch.randn(B, T, 3).double(), torch.randn(B, n, 4).double()
    W1, W2, v = (tensor.detach().numpy() for tensor in (layer.key.weight, layer.query.weight, layer.v))
    found = layer(query, memory).detach().numpy()
    for b, i, j in itertools.product(range(B), range(T), range(n)):
        expected = v @ np.tanh(W1 @ memory[b, j].numpy() + W2 @ query[b, i].numpy())
        assert found[b, i, j] == pytest.approx(expected, abs=1e-12)


def test_reordering_the_memory_reorders_the_logits(rng):
    layer, query, memory = PointerAttention(3, 4, 5), torch.randn(2, 3, 3), torch.randn(2, 7, 4)
    order = torch.randperm(7, generator=rng)
    torch.testing.assert_close(layer(query, memory[:, order]), layer(query, memory)[:, :, order])


def test_masked_items_get_no_probability_and_no_gradient():
    layer, query, memory = PointerAttention(3, 4, 5), torch.randn(2, 3, 3), torch.randn(2, 7, 4, requires_grad=True)
    mask = torch.arange(7) < torch.tensor([[3], [7]])
    p = layer(query, memory, mask).softmax(2)
    assert (p[0, :, 3:] == 0).all()
    torch.testing.assert_close(p[0, :, :3], layer(query, memory[:, :3]).softmax(2)[0])
    p.square().sum().backward()
    assert (memory.grad[0, 3:] == 0).all()


@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("largest", [1, 2 * 4 * 5, 9 * 4 * 5, 10**9])
def test_slices_of_an_attention_change_neither_values_nor_gradients(monkeypatch, largest, scale):
    """Also where arguments are so large that exponentials of theirs could overflow."""
    parts = [scale * torch.randn(2, 9, 5), -scale * torch.randn(2, 4, 5), torch.randn(5)]
    parts = [part.double().requires_grad_() for part in parts]
    whole = (parts[0][:, :, None] + parts[1][:, None]).tanh() @ parts[2]
    weight = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weight).sum(), parts)
    monkeypatch.setattr(attention_file, "_CACHED", largest)
    sliced = additive_scores(*parts)
    torch.testing.assert_close(sliced, whole, rtol=0, atol=1e-12)
    for found, gradient in zip(torch.autograd.grad((sliced * weight).sum(), parts), expected):
        torch.testing.assert_close(found, gradient, rtol=0, atol=1e-12)
    assert torch.autograd.gradgradcheck(
        additive_scores,
        [part.detach()[..., :2, :].clone().requires_grad_() if part.ndim == 3 else part for part in parts],
        fast_mode=True,
    )


def test_float32_logits_are_as_good_as_those_of_tanh():
    parts = [torch.randn(4, 6, 256), torch.randn(4, 7, 256), torch.randn(256) / 16]
    exact = additive_scores(*(part.double() for part in parts))
    plain = (parts[0][:, :, None] + parts[1][:, None]).tanh() @ parts[2]
    error, usual = (float((found - exact).abs().max()) for found in (additive_scores(*parts), plain))
    assert error < max(4 * usual, 1e-6)


def test_an_attention_refuses_what_does_not_fit(shape_checks_off):
    layer = PointerAttention(3, 4, 5)
    with pytest.raises(ValueError, match="positive, got 3, 0, 5"):
        PointerAttention(3, 0, 5)
    with pytest.raises(ValueError, match=r"mask must be \(2, 7\), got shape \(2, 6\)"):
        layer.score(torch.randn(2, 1, 3), torch.randn(2, 7, 5), torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"query must be \(2, queries, 3\), got shape \(1, 1, 3\)"):
        layer.score(torch.randn(1, 1, 3), torch.randn(2, 7, 5))


# --- teacher forcing ---


@each_network
def test_probabilities_of_all_sequences_sum_to_one(name):
    net, points = NETWORKS[name](), uniform(1, 4)
    sequences = padded(all_sequences(4, 3))
    total = net.log_prob(points.expand(len(sequences), -1, -1), sequences).exp().sum()
    assert float(total.detach()) == pytest.approx(1, abs=1e-12)


@each_network
def test_single_steps_give_the_logits_of_teacher_forcing(name):
    net, points = NETWORKS[name](), uniform(3, 4)
    targets = torch.tensor([[2, 0, 3, 1], [0, 0, 1, 4], [3, 1, 4, IGNORED]])
    encoded = net.encode(points)
    inputs, state = net.start.expand(3, 1, -1), tuple(part[:, None] for part in encoded.state)
    steps = []
    for step in range(4):
        logits, state = net.step(inputs, state, encoded)
        steps.append(logits)
        inputs = net.feed_back(points, encoded, targets[:, step : step + 1])
    torch.testing.assert_close(torch.cat(steps, 1), net(points, targets), rtol=0, atol=1e-12)


def test_the_network_is_the_papers_written_out():
    """Encoder and decoder as cells of four gates each, one sample, in NumPy."""
    net, points = make(), uniform(1, 5)
    weights = {name: value.detach().numpy() for name, value in net.named_parameters()}

    def cell(part, x, h, c):
        gates = weights[f"{part}.weight_ih_l0"] @ x + weights[f"{part}.bias_ih_l0"]
        gates = gates + weights[f"{part}.weight_hh_l0"] @ h + weights[f"{part}.bias_hh_l0"]
        i, f, g, o = np.split(gates, 4)
        logistic = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
        c = logistic(f) * c + logistic(i) * np.tanh(g)
        return logistic(o) * np.tanh(c), c

    h = c = np.zeros(6)
    memory = []
    for point in points[0].numpy():
        h, c = cell("encoder", point, h, c)
        memory.append(h)
    memory.append(weights["end"])
    x, expected = weights["start"], []
    for choice in (3, 1, 5):
        h, c = cell("decoder", x, h, c)
        inner = np.tanh(memory @ weights["pointer.key.weight"].T + weights["pointer.query.weight"] @ h)
        expected.append(inner @ weights["pointer.v"])
        x = points[0, choice].numpy() if choice < 5 else None
    found = net(points, torch.tensor([[3, 1, 5]])).detach().numpy()[0]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("name", ["paper", "memory", "glimpses", "bidirectional"])
def test_padding_changes_nothing(name):
    net = NETWORKS[name]()
    problems = [HullDataset(1, n, seed=n)[0] for n in (4, 7, 3)]
    problems = [(points.double(), targets) for points, targets in problems]
    points, targets, lengths = pad_problems(problems)
    together = net.log_prob(points, targets, lengths)
    alone = torch.stack([net.log_prob(p[None], t[None])[0] for p, t in problems])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    beams = net.decode(points, strategy="beam", beam=3, lengths=lengths, valid=Hull())
    for row, (p, _) in enumerate(problems):
        single = net.decode(p[None], strategy="beam", beam=3, valid=Hull())
        torch.testing.assert_close(beams.log_probs[row], single.log_probs[0], rtol=0, atol=1e-12)
        written = [choice for choice in beams.best[row].tolist() if choice not in (IGNORED, 7)]
        assert written == [choice for choice in single.best[0].tolist() if choice not in (IGNORED, len(p))]


def test_padded_points_get_no_gradient():
    net = make()
    points, targets, lengths = pad_problems([HullDataset(1, n, seed=n)[0] for n in (4, 7)])
    points = points.double().requires_grad_()
    pointer_loss(net(points, targets, lengths), targets).backward()
    assert (points.grad[0, 4:] == 0).all()
    assert (points.grad[0, :4] != 0).any()


def test_gradients_of_the_network_are_those_of_finite_differences():
    net, targets = make(glimpses=1), torch.tensor([[1, 0, 3], [2, 3, IGNORED]])
    points = uniform(2, 3).requires_grad_()
    lengths = torch.tensor([3, 3])
    assert torch.autograd.gradcheck(lambda p: net.log_prob(p, targets, lengths), (points,))


def test_the_loss_is_the_negative_log_probability_of_a_sequence():
    net, points = make(), uniform(3, 5)
    targets = convex_hull(points)
    loss = pointer_loss(net(points, targets), targets)
    torch.testing.assert_close(loss, -net.log_prob(points, targets).mean())


@pytest.mark.parametrize("state", [True, False])
def test_any_encoder_will_do(state):
    class SetEncoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 6)
            layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
            self.attend = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

        def forward(self, points, mask=None):
            memory = self.attend(self.inner(points), src_key_padding_mask=None if mask is None else ~mask)
            return (memory, (memory.amax(1), memory.amin(1))) if state and mask is None else memory

    net, points = make(encoder=SetEncoder(), feed="memory"), uniform(4, 5)
    targets = convex_hull(points)
    order = torch.tensor([3, 0, 4, 1, 2])
    # A set encoder: the points in another order are the same problem.
    place = torch.cat([order.argsort(), torch.tensor([5])])
    moved = torch.where(targets == IGNORED, IGNORED, place[targets.clamp_min(0)])
    torch.testing.assert_close(net.log_prob(points[:, order], moved), net.log_prob(points, targets))
    lengths = torch.tensor([5, 5, 5, 5])
    if not state:
        torch.testing.assert_close(net.log_prob(points, targets, lengths), net.log_prob(points, targets))


@each_network
def test_targets_that_are_none_are_refused(name):
    net, points = NETWORKS[name](), uniform(2, 4)
    for targets, message in (
        ([[0, 1, 4], [5, 4, IGNORED]], r"stop token 4, got 5 in sample 1, step 0"),
        ([[0, 1, 4], [0, -1, 4]], r"got -1 in sample 1, step 1"),
        ([[0, 4, 1], [0, 1, 4]], r"end with the stop token.*sample 0, step 2"),
        ([[0, IGNORED, 1], [0, 1, 4]], r"got more in sample 0, step 2"),
    ):
        with pytest.raises(ValueError, match=message):
            net(points, torch.tensor(targets))


def test_networks_refuse_what_does_not_fit(shape_checks_off):
    with pytest.raises(ValueError, match=r"targets must be \(2, 3\), got shape \(2, 4\)"):
        pointer_loss(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long))
    net, points = make(), uniform(2, 4)
    targets = torch.tensor([[0, 1, 4], [0, 1, 4]])
    with pytest.raises(ValueError, match="got 3 in sample 1, step 1"):
        net(points, torch.tensor([[0, 1, 4], [0, 3, 4]]), torch.tensor([4, 2]))
    with pytest.raises(ValueError, match=r"lengths must be in \[1, 4\], got \[4, 5\]"):
        net(points, targets, torch.tensor([4, 5]))
    with pytest.raises(ValueError, match="made for 4 points"):
        NETWORKS["fixed"]()(uniform(2, 5), targets)
    with pytest.raises(ValueError, match="with lengths"):
        NETWORKS["attention"]()(points, targets, torch.tensor([4, 4]))
    for options in ({"feed": "e"}, {"glimpses": -1}, {"hidden_dim": 0}, {"hidden_dim": 5, "bidirectional": True}):
        with pytest.raises(ValueError, match=next(iter(options))):
            PointerNetwork(**{"hidden_dim": 6, **options})
    with pytest.raises(ValueError, match="batch_first"):
        PointerNetwork(encoder=nn.LSTM(2, 8), hidden_dim=8)
    with pytest.raises(ValueError, match=r"memory of \(2, 4, 6\), got shape \(2, 4, 3\)"):
        make(encoder=nn.Linear(2, 3))(points, targets)
    without = make(stop_token=False)
    with pytest.raises(ValueError, match="got 4 in sample 0"):
        without(points, targets)


# --- decoding ---


@each_network
@pytest.mark.parametrize("strategy", ["greedy", "beam", "sample", "stochastic_beam"])
def test_decoded_sequences_have_the_probability_that_decoding_says(name, strategy):
    net, points = NETWORKS[name](), uniform(3, 4)
    found = net.decode(points, strategy=strategy, beam=5, samples=4, generator=torch.Generator().manual_seed(1))
    K = found.sequences.shape[1]
    assert {"greedy": 1, "beam": 5, "sample": 4, "stochastic_beam": 5}[strategy] == K
    rows = points.repeat_interleave(K, 0)
    expected = net.log_prob(rows, found.sequences.flatten(0, 1)).view(3, K).detach()
    torch.testing.assert_close(found.log_probs, expected, rtol=0, atol=1e-6)
    assert (found.log_probs.diff(dim=1) <= 0).all()


@each_network
def test_a_beam_as_wide_as_all_sequences_finds_the_best_of_them(name):
    net, points = NETWORKS[name](), uniform(2, 4)
    sequences = padded(all_sequences(4, 4))
    found = net.decode(points, 4, "beam", beam=len(sequences))
    for row in range(2):
        scores = net.log_prob(points[row].expand(len(sequences), -1, -1), sequences).detach()
        assert found.sequences.shape[1] == len(sequences)
        torch.testing.assert_close(found.log_probs[row], scores.sort(descending=True).values, rtol=0, atol=1e-9)
        assert found.best[row].tolist() == sequences[scores.argmax()].tolist()
        narrow = net.decode(points[row : row + 1], 4, "beam", beam=3)
        assert float(narrow.log_probs[0, 0]) <= float(scores.max()) + 1e-9


@each_network
def test_a_beam_of_one_is_greedy(name):
    net, points = NETWORKS[name](), uniform(6, 4)
    assert torch.equal(net.decode(points, strategy="beam", beam=1).best, net.decode(points).best)


def test_a_wide_beam_over_valid_tours_finds_the_best_of_all_tours():
    net, points = make(stop_token=False), uniform(3, 5)
    tours = torch.tensor([(0, *rest) for rest in itertools.permutations(range(1, 5))])
    found = net.decode(points, strategy="beam", beam=24, valid=Permutation())
    for row in range(3):
        scores = net.log_prob(points[row].expand(24, -1, -1), tours, valid=Permutation()).detach()
        assert float(scores.exp().sum()) == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(found.log_probs[row], scores.sort(descending=True).values, rtol=0, atol=1e-9)
        assert found.best[row].tolist() == tours[scores.argmax()].tolist()


def test_what_a_constraint_forbids_has_no_probability():
    net, points = make(stop_token=False), uniform(2, 4)
    found = net.log_prob(points, torch.tensor([[0, 1, 1, 2], [0, 3, 1, 2]]), valid=Permutation()).detach()
    assert found[0] == -math.inf
    assert found[1] > net.log_prob(points, torch.tensor([[0, 1, 1, 2], [0, 3, 1, 2]])).detach()[1]


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(3, 8),
    strategy=st.sampled_from(["greedy", "beam", "sample", "stochastic_beam"]),
    short=st.integers(0, 5),
    seed=st.integers(0, 999),
)
def test_constrained_outputs_are_valid_whatever_the_network_says(n, strategy, short, seed):
    torch.manual_seed(seed)
    lengths = torch.tensor([n, max(3, n - short)])
    points = torch.rand(2, n, 2)
    options = {"strategy": strategy, "beam": 4, "samples": 3, "lengths": lengths}
    net, without = (PointerNetwork(hidden_dim=4, stop_token=stop) for stop in (True, False))

    for stop, sequences in (
        (n, net.decode(points, valid=Permutation(), **options).sequences),
        (None, without.decode(points, valid=Permutation(), **options).sequences),
    ):
        for row, size in enumerate(lengths.tolist()):
            written = [choice for choice in sequences[row, 0].tolist() if choice not in (IGNORED, stop)]
            assert written[0] == 0
            assert sorted(written) == list(range(size))

    for convex in (False, True):
        sequences = net.decode(points, valid=Hull(convex), **options).sequences
        for row, size in enumerate(lengths.tolist()):
            *corners, stop = (choice for choice in sequences[row, 0].tolist() if choice != IGNORED)
            assert stop == n
            assert len(set(corners)) == len(corners) >= 3
            assert max(corners) < size
            if convex:
                assert hull_metrics(points[row, corners][None], torch.arange(len(corners))[None]).accuracy == 1
                away = points[row, corners].double() - points[row, corners[0]].double()
                assert float((away[:-1, 0] * away[1:, 1] - away[:-1, 1] * away[1:, 0]).sum()) > 0

    sequences = net.decode(points, valid=Triangles(), **options).sequences
    for row, size in enumerate(lengths.tolist()):
        *corners, stop = (choice for choice in sequences[row, 0].tolist() if choice != IGNORED)
        triples = [tuple(corners[i : i + 3]) for i in range(0, len(corners), 3)]
        assert stop == n
        assert len(set(triples)) == len(triples) <= 2 * size - 5
        assert all(a < b < c < size for a, b, c in triples)


def test_every_set_of_triangles_can_be_written():
    """What the mask lets through for four points: all sequences of at most three different triples."""
    net, points = make(), uniform(1, 4)
    triples = list(itertools.combinations(range(4), 3))
    sequences = [(*sum(chosen, ()), 4) for k in (1, 2, 3) for chosen in itertools.permutations(triples, k)]
    scores = net.log_prob(points.expand(len(sequences), -1, -1), padded(sequences), valid=Triangles())
    assert float(scores.exp().sum().detach()) == pytest.approx(1, abs=1e-12)


def test_a_constraint_can_be_any_function():
    net, points = make(), uniform(3, 5)

    def falling(state, prefix):
        choice = torch.arange(6)
        last = prefix[:, -1:] if prefix.shape[1] else torch.full((len(prefix), 1), 5)
        return (choice < last) | (choice == state.stop)

    found = net.decode(points, strategy="beam", valid=falling).sequences
    for sequence in found.flatten(0, 1).tolist():
        body = [choice for choice in sequence if choice not in (5, IGNORED)]
        assert body == sorted(set(body), reverse=True)


@pytest.mark.parametrize("strategy", ["greedy", "beam", "sample", "stochastic_beam"])
def test_a_mask_that_leaves_no_choice_is_told_with_sample_and_step(strategy):
    def stuck(state, prefix):
        mask = ~state.visited
        return mask & ~((prefix.shape[1] == 2) & (state.points[:, :1, 0] > 5))

    points = uniform(3, 4)
    points[1] += 10
    with pytest.raises(ValueError, match="no choice for sample 1 at step 2"):
        make(stop_token=False).decode(points, strategy=strategy, valid=stuck)


def test_beams_that_are_stuck_give_way_to_others():
    def only_after_zero(state, prefix):
        mask = torch.zeros_like(state.visited)
        mask[:, :2] = prefix.shape[1] == 0
        if prefix.shape[1]:
            mask[:, -1] = prefix[:, 0] == 0
        return mask

    found = make().decode(uniform(4, 3), strategy="beam", beam=2, valid=only_after_zero)
    assert found.best.tolist() == [[0, 3]] * 4
    assert found.sequences[:, 1].tolist() == [[IGNORED, IGNORED]] * 4
    assert (found.log_probs[:, 1] == -math.inf).all()


def test_samples_have_the_frequencies_of_the_network():
    net, points = make(), uniform(1, 3)
    sequences = all_sequences(3, 2)
    probability = net.log_prob(points.expand(len(sequences), -1, -1), padded(sequences)).detach().exp()
    drawn = net.decode(points, 2, "sample", samples=20_000, generator=torch.Generator().manual_seed(0)).sequences[0]
    counts = torch.tensor([float((drawn == row).all(1).double().mean()) for row in padded(sequences)])
    assert float((counts - probability).abs().max()) < 0.015
    cold = net.decode(points, 2, "sample", samples=50, temperature=1e-3).sequences
    assert (cold == net.decode(points, 2).best[:, None]).all()


def test_stochastic_beams_sample_without_replacement():
    net, points = make(), uniform(1, 3)
    sequences = all_sequences(3, 2)
    table = padded(sequences)
    probability = net.log_prob(points.expand(len(sequences), -1, -1), table).detach().exp()
    many = points.expand(8000, -1, -1)
    found = net.decode(many, 2, "stochastic_beam", beam=2, generator=torch.Generator().manual_seed(0)).sequences
    assert not (found[:, 0] == found[:, 1]).all(1).any()
    held = torch.stack([(found == row).all(2).any(1).double().mean() for row in table])
    # One of the first two drawn: first, or second after another.
    others = (probability / (1 - probability)).sum() - probability / (1 - probability)
    torch.testing.assert_close(held, probability * (1 + others), rtol=0, atol=0.02)


def test_a_length_penalty_ranks_by_log_probability_a_step():
    net, points = make(), uniform(5, 4)
    found = net.decode(points, 3, "beam", beam=85, length_penalty=1.0)
    size = (found.sequences != IGNORED).sum(2)
    assert ((found.log_probs / size).diff(dim=1) <= 1e-9).all()
    assert not torch.equal(found.best, net.decode(points, 3, "beam", beam=85).best)


def test_decoding_refuses_what_it_cannot_do():
    net, points = make(), uniform(1, 4)
    for options, message in (
        ({"beam": 0}, "at least 1, got 0"),
        ({"samples": 0}, "at least 1"),
        ({"max_len": 0}, "at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"valid": Permutation(start=4)}, r"start must be in \[0, 4\), got 4"),
        ({"valid": lambda state, prefix: state.visited[:, :2]}, r"bool mask of \(1, 5\)"),
    ):
        with pytest.raises(ValueError, match=message):
            net.decode(points, **options)
    for constraint in (Hull(), Triangles()):
        with pytest.raises(ValueError, match="stop_token=True"):
            make(stop_token=False).decode(points, valid=constraint)


def test_decoding_nothing_gives_nothing():
    found = make().decode(uniform(0, 4), strategy="beam")
    assert found.sequences.shape[0] == found.log_probs.shape[0] == 0


# --- learning ---


def test_a_small_network_learns_to_sort_numbers_of_any_count():
    """Four and five numbers in training, six in the test."""
    torch.manual_seed(0)
    net = PointerNetwork(input_dim=1, hidden_dim=32, stop_token=False)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for step in range(250):
        x = torch.rand(64, 4 + step % 2, 1)
        optimizer.zero_grad()
        order = x[..., 0].argsort(1)
        pointer_loss(net(x, order), order).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 2.0)
        optimizer.step()
    x = torch.rand(200, 6, 1)
    right = (net.decode(x, valid=Permutation(start=None)).best == x[..., 0].argsort(1)).double().mean()
    assert float(right) > 0.5  # 1/6 by chance


def test_fit_trains_on_batches_of_different_sizes():
    net = PointerNetwork(hidden_dim=8)
    data = HullDataset(200, (4, 6))
    options = {"loss": pointer_loss, "optimizer": torch.optim.Adam, "clip_norm": 2.0}
    history = fit(TeacherForced(net), data.batches(32), steps=30, **options)
    assert history.loss[-1] < history.loss[0]


def test_reinforce_points_the_way_of_the_exact_gradient():
    """Three cities after the first: six tours, whose expected length can be differentiated as it stands."""
    torch.manual_seed(1)
    net, points = make(stop_token=False), uniform(1, 4)
    tours = torch.tensor([(0, *rest) for rest in itertools.permutations(range(1, 4))])
    cities = points.expand(6, -1, -1)
    length = tour_length(cities, tours)
    exact_loss = (net.log_prob(cities, tours, valid=Permutation()).exp() * length).sum()
    parameters = [net.pointer.v, net.start]
    exact = torch.cat([part.flatten() for part in torch.autograd.grad(exact_loss, parameters)])
    loss = reinforce_loss(net, points.expand(2000, -1, -1), tour_length, valid=Permutation(), samples=4)
    found = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
    assert float(torch.cosine_similarity(found, exact, dim=0)) > 0.98
    assert float(found.norm() / exact.norm()) == pytest.approx(1, abs=0.15)
    with pytest.raises(ValueError, match="at least 2"):
        reinforce_loss(net, points, tour_length, samples=1)


def test_reinforce_shortens_tours_without_labels():
    torch.manual_seed(0)
    net = PointerNetwork(hidden_dim=16, stop_token=False)
    points = torch.rand(64, 5, 2)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    before = tour_length(points, net.decode(points, valid=Permutation()).best).mean()
    for _ in range(40):
        optimizer.zero_grad()
        reinforce_loss(net, points, tour_length, valid=Permutation()).backward()
        optimizer.step()
    after = net.decode(points, valid=Permutation()).best
    assert is_tour(after, 5).all()
    assert tour_length(points, tsp(points)).mean() <= tour_length(points, after).mean() < before


# --- spans and copies: the worked example of the page ---


def test_a_span_pointer_learns_where_a_span_begins_and_ends():
    """Marked items in noise, behind a Transformer encoder."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder, head = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), SpanPointer(16)
    network = nn.Sequential(nn.Embedding(6, 16), encoder, head)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)

    def questions(count):
        text = torch.randint(0, 4, (count, 9))
        ends = torch.stack([torch.randint(0, 4, (count,)), torch.randint(5, 9, (count,))], 1)
        text[torch.arange(count), ends[:, 0]], text[torch.arange(count), ends[:, 1]] = 4, 5
        return text, ends

    for _ in range(60):
        text, ends = questions(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(text), ends).backward()
        optimizer.step()
    text, ends = questions(200)
    assert float((network(text).argmax(1) == ends).double().mean()) > 0.9


def test_a_span_pointer_ignores_what_is_masked_and_refuses_other_heads():
    head, hidden = SpanPointer(8), torch.randn(2, 6, 8)
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    masked = head(hidden, mask)
    torch.testing.assert_close(masked[0, :4], head(hidden[:1, :4])[0])
    assert (masked[0, 4:] == -math.inf).all()
    with pytest.raises(ValueError, match="two outputs, start and end, got 3"):
        SpanPointer.like(nn.Linear(8, 3))


def test_a_pointer_generator_mixes_saying_and_copying():
    vocabulary, pointers = torch.randn(2, 3, 7).double(), torch.randn(2, 3, 4).double()
    source, generate = torch.tensor([[1, 1, 6, 0], [2, 3, 4, 5]]), torch.randn(2, 3).double()
    found = pointer_generator(vocabulary, pointers, source, generate).exp()
    torch.testing.assert_close(found.sum(2), torch.ones(2, 3).double())
    say, copy, g = vocabulary.softmax(2), pointers.softmax(2), generate.sigmoid()
    for b, t, w in itertools.product(range(2), range(3), range(7)):
        copied = sum(float(copy[b, t, j]) for j in range(4) if source[b, j] == w)
        expected = float(g[b, t] * say[b, t, w] + (1 - g[b, t]) * copied)
        assert float(found[b, t, w]) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(ValueError, match=r"source must be in \[0, 7\), got 1 to 7"):
        pointer_generator(vocabulary, pointers, source + 1, generate)
