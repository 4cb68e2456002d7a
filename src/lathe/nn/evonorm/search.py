"""Search for normalisation-activation layers: rejection tests that cost little, and evolution over several networks.

`evolve_norm_act` judges each candidate graph on all of your networks ("anchors") and your data, and keeps those that no
other beats everywhere. `quality_check` and `stability_check` test any layer the same way.
Liu, Brock, Simonyan, Le, "Evolving Normalization-Activation Layers", 2020, arXiv 2004.02967, Sections 3.2, 3.3 and 4.
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from lathe.nn.evonorm.graph import NormActGraph, mutate, random_graph

__all__ = [
    "Candidate",
    "CheckReport",
    "SearchResult",
    "evolve_norm_act",
    "pareto_front",
    "quality_check",
    "rerank",
    "stability_check",
    "structural_check",
]

LayerFactory = Callable[[int], nn.Module]
"""Takes a number of channels, returns a layer that normalises and activates."""
Anchor = Callable[[LayerFactory], nn.Module]
"""Takes a layer factory, returns a fresh classifier that uses it."""
Data = tuple[Tensor, Tensor, Tensor, Tensor]
"""Inputs and labels to train on, inputs and labels to validate on."""
Verdict = str | tuple[float, ...]
"""Why a graph is rejected, or its accuracies on the anchors."""


@dataclass(frozen=True)
class CheckReport:
    """What a rejection test saw.

    Args:
        passed: whether the layer may go on.
        values: one for each anchor tested: validation accuracy, or the largest gradient norm met.
        failed_anchor: the anchor that rejected the layer, after which no other was tested.
    """

    passed: bool
    values: tuple[float, ...]
    failed_anchor: int | None = None


def structural_check(graph: NormActGraph, num_features: int = 8, seed: int = 0) -> str | None:
    """Why a graph needs no training to be rejected, or None. Costs a few forward passes on random numbers.

    Returns:
        "input-free": the output does not depend on x; "not finite": on a batch of normal numbers; "sign-blind": f(-x) =
        f(x), so that the sign of no weight before it matters.
    """
    if 0 not in graph.live:
        return "input-free"
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.randn(2, 4, num_features, 9, generator=generator, dtype=torch.float64)
    layer = graph.to_module(num_features, dtype=torch.float64)
    with torch.no_grad():
        y, y_other, y_mirrored = layer(x), layer(other), layer(-x)
    if not bool(y.isfinite().all()):
        return "not finite"
    tolerance = 1e-9 * float(y.abs().max()) + 1e-12
    if float((y - y_other).abs().max()) <= tolerance:
        return "input-free"
    if float((y - y_mirrored).abs().max()) <= tolerance:
        return "sign-blind"
    return None


def quality_check(
    layer_factory: LayerFactory,
    anchors: Sequence[Anchor],
    data: Data,
    steps: int = 100,
    threshold: float | None = None,
    *,
    batch_size: int = 64,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> CheckReport:
    """Trains briefly on each anchor; rejects a layer that stays near chance on any of them (Section 3.3).

    Args:
        layer_factory: makes the layer for a number of channels; a graph's `to_module` is one.
        threshold: accuracy to reach; twice that of chance by default.
        batch_size, learning_rate: of SGD with Nesterov momentum 0.9.
        seed: of initial weights and order of the data, the same for every layer.
    """
    threshold = _threshold(data, threshold)
    accuracies: list[float] = []
    for index, anchor in enumerate(anchors):
        training = _Training(layer_factory, anchor, data, batch_size, learning_rate, seed)
        accuracies.append(training.accuracy() if training.advance(steps) else 0.0)
        if accuracies[-1] < threshold:
            return CheckReport(False, tuple(accuracies), index)
    return CheckReport(True, tuple(accuracies))


def stability_check(
    layer_factory: LayerFactory,
    anchors: Sequence[Anchor],
    data: Data,
    steps: int = 100,
    limit: float = 1e8,
    *,
    batch_size: int = 64,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> CheckReport:
    """Moves an untrained network's weights to where its gradient explodes; rejects a layer that lets it (Section 3.3).

    Ascends log ||d loss / d theta|| over the convolution weights theta on one fixed batch. Each tensor moves by
    `learning_rate` times its own norm along its normalised gradient. This differentiates twice, which autograd refuses
    for a fused layer: test its graph (`EVONORM_GRAPHS["S0"].to_module`).

    Args:
        limit: gradient norms above it, or not finite, reject the layer.
    """
    largest: list[float] = []
    for index, anchor in enumerate(anchors):
        largest.append(_worst_gradient(layer_factory, anchor, data, steps, limit, batch_size, learning_rate, seed))
        if not largest[-1] <= limit:
            return CheckReport(False, tuple(largest), index)
    return CheckReport(True, tuple(largest))


def _threshold(data: Data, threshold: float | None) -> float:
    return 2.0 / (int(data[1].max()) + 1) if threshold is None else threshold


def _fresh(layer_factory: LayerFactory, anchor: Anchor, data: Data, seed: int) -> nn.Module:
    """The anchor with the same initial weights for every layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return anchor(layer_factory).to(data[0].device)


class _Training:
    """One layer in one anchor. Training goes on where it stopped, so that a check's steps count for the evaluation."""

    def __init__(
        self,
        layer_factory: LayerFactory,
        anchor: Anchor,
        data: Data,
        batch_size: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        self.data, self.batch_size = data, min(batch_size, len(data[0]))
        self.model = _fresh(layer_factory, anchor, data, seed)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True, fused=True
        )
        self.order = torch.Generator().manual_seed(seed)
        self.batches: list[Tensor] = []
        self.steps = 0

    def advance(self, steps: int) -> bool:
        """Trains up to `steps` in all; False where the loss stops being finite."""
        inputs, labels = self.data[:2]
        self.model.train()
        while self.steps < steps:
            if not self.batches:
                order = torch.randperm(len(inputs), generator=self.order).to(inputs.device)
                full = len(inputs) - len(inputs) % self.batch_size
                self.batches = list(order[:full].split(self.batch_size))
            batch = self.batches.pop()
            loss = F.cross_entropy(self.model(inputs[batch]), labels[batch])
            if not math.isfinite(loss.item()):
                return False
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.steps += 1
        return True

    @torch.no_grad()
    def accuracy(self) -> float:
        self.model.eval()
        inputs, labels = self.data[2:]
        right = sum(int((self.model(x).argmax(1) == y).sum()) for x, y in zip(inputs.split(512), labels.split(512)))
        return right / len(labels)


def _worst_gradient(
    layer_factory: LayerFactory,
    anchor: Anchor,
    data: Data,
    steps: int,
    limit: float,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> float:
    """The largest gradient norm met on the way up; stops at the first beyond the limit."""
    model = _fresh(layer_factory, anchor, data, seed).train()
    weights = [module.weight for module in model.modules() if isinstance(module, _ConvNd)]
    weights = weights or [parameter for parameter in model.parameters() if parameter.ndim > 1]
    if not weights:
        raise ValueError("anchors: a network without convolution or linear weights has nothing to test")
    batch = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))[:batch_size]
    batch = batch.to(data[0].device)
    inputs, labels = data[0][batch], data[1][batch]
    worst = 0.0
    for step in range(steps + 1):
        loss = F.cross_entropy(model(inputs), labels)
        gradients = torch.autograd.grad(loss, weights, create_graph=step < steps, allow_unused=True)
        squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
        norm = torch.stack(squares).sum().sqrt() if squares else torch.zeros(())
        size = norm.item()
        worst = size if math.isnan(size) else max(worst, size)
        # A gradient of zero has no direction of ascent.
        if not size <= limit or size == 0.0 or step == steps or not norm.requires_grad:
            break
        ascent = torch.autograd.grad(norm.log(), weights, allow_unused=True)
        with torch.no_grad():
            for weight, direction in zip(weights, ascent):
                if direction is not None:
                    scale = weight.norm() / direction.norm().clamp(min=torch.finfo(weight.dtype).tiny)
                    weight.add_(direction * (learning_rate * scale))
    return worst


def pareto_front(scores: Float[Tensor, "candidates objectives"]) -> Bool[Tensor, " candidates"]:
    """Which rows no other row dominates: at least as high everywhere, and higher somewhere."""
    mine, other = scores[:, None], scores[None]
    return ~((other >= mine).all(-1) & (other > mine).any(-1)).any(1)


@dataclass(frozen=True)
class Candidate:
    """A layer that passed the rejection tests, its validation accuracy on each anchor, and which attempt it was."""

    graph: NormActGraph
    accuracies: tuple[float, ...]
    origin: Literal["random", "mutation"] = "random"
    attempt: int = 0

    @property
    def mean(self) -> float:
        return sum(self.accuracies) / len(self.accuracies)


@dataclass
class SearchResult:
    """What a search found, in the order in which it found it.

    Args:
        history: every candidate that entered the window, repeats included.
        rejections: how often each cause rejected a graph: those of `structural_check`, "quality", "unstable".
        attempts: graphs drawn in all.
        reused: of these, candidates that compute what an earlier one did and got its score at no cost.
        seconds: time spent.
    """

    history: list[Candidate] = field(default_factory=list)
    rejections: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    reused: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> Candidate:
        """The candidate of the highest mean accuracy."""
        return self.top(1)[0]

    @property
    def front(self) -> list[Candidate]:
        """The candidates that no other beats on all anchors, one for each function."""
        scores = torch.tensor([candidate.accuracies for candidate in self.history], dtype=torch.float64)
        if not self.history:
            return []
        found = {c.graph.hash(): c for c, kept in zip(self.history, pareto_front(scores).tolist()) if kept}
        return list(found.values())

    def top(self, count: int) -> list[Candidate]:
        """The `count` best candidates by mean accuracy, one for each function.

        Raises:
            ValueError: where nothing was evaluated.
        """
        if not self.history:
            raise ValueError("the search has evaluated no candidate yet")
        distinct = {candidate.graph.hash(): candidate for candidate in self.history}
        return sorted(distinct.values(), key=lambda candidate: -candidate.mean)[:count]

    def to_json(self) -> str:
        """Everything, to be kept and given to `evolve_norm_act(resume=SearchResult.from_json(...))`."""
        history = [
            {
                "nodes": [
                    [node.op, list(node.operands), *([node.over] if node.over else [])] for node in c.graph.nodes
                ],
                "accuracies": list(c.accuracies),
                "origin": c.origin,
                "attempt": c.attempt,
            }
            for c in self.history
        ]
        return json.dumps(
            {
                "history": history,
                "rejections": dict(self.rejections),
                "attempts": self.attempts,
                "reused": self.reused,
                "seconds": self.seconds,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> SearchResult:
        """The result that `to_json` wrote."""
        told = json.loads(text)
        history = [
            Candidate(NormActGraph(c["nodes"]), tuple(c["accuracies"]), c["origin"], c["attempt"])
            for c in told["history"]
        ]
        return cls(history, Counter(told["rejections"]), told["attempts"], told["reused"], told["seconds"])


@dataclass(frozen=True)
class _Judge:
    """Rejection tests and evaluation, the cheapest first."""

    anchors: tuple[Anchor, ...]
    data: Data
    groups: int
    proxy_steps: int
    quality_steps: int
    stability_steps: int
    threshold: float
    limit: float
    batch_size: int
    learning_rate: float
    seed: int

    def __call__(self, graph: NormActGraph) -> Verdict:
        cause = structural_check(graph)
        if cause is not None:
            return cause
        trainings = []
        layer = partial(graph.to_module, groups=self.groups)
        for anchor in self.anchors:
            training = _Training(layer, anchor, self.data, self.batch_size, self.learning_rate, self.seed)
            if not training.advance(self.quality_steps) or training.accuracy() < self.threshold:
                return "quality"
            trainings.append(training)
        if self.stability_steps:
            report = stability_check(
                layer,
                self.anchors,
                self.data,
                self.stability_steps,
                self.limit,
                batch_size=self.batch_size,
                seed=self.seed,
            )
            if not report.passed:
                return "unstable"
        return tuple(each.accuracy() if each.advance(self.proxy_steps) else 0.0 for each in trainings)


def evolve_norm_act(
    anchors: Sequence[Anchor],
    data: Data,
    *,
    evaluations: int,
    window: int = 2500,
    tournament: float = 0.05,
    select: Literal["pareto", "average"] = "pareto",
    explore: float = 0.5,
    proxy_steps: int = 2000,
    groups: int = 32,
    n_nodes: int = 10,
    batch_independent: bool = False,
    quality_steps: int = 100,
    stability_steps: int = 100,
    threshold: float | None = None,
    limit: float = 1e8,
    batch_size: int = 64,
    learning_rate: float = 0.1,
    seed: int = 0,
    proxy_seed: int = 0,
    seconds: float | None = None,
    known: dict[str, Verdict] | None = None,
    workers: int = 1,
    on_result: Callable[[SearchResult, NormActGraph, str | Candidate], None] | None = None,
    resume: SearchResult | None = None,
) -> SearchResult:
    """Evolves layers that do well on all anchors at once (Section 3.2; `explore=1` is random search).

    A child is a random graph, or a mutation of a tournament's winner among the most recent candidates. What passes the
    rejection tests is trained on every anchor, with the same initial weights and order of data for all.

    Args:
        anchors: each takes a layer factory and returns a fresh classifier.
        data: inputs and labels to train on, inputs and labels to validate on.
        evaluations: different candidates to evaluate in all, those of `resume` included. Rejected graphs do not count,
            nor does a graph that computes what an earlier candidate did: its score is reused.
        window: most recent candidates among which tournaments are held.
        tournament: share of the window in a tournament (two candidates at least); 1 or more is their number.
        select: the tournament's winner: uniformly from its Pareto front, or the highest mean accuracy.
        explore: probability of a random graph.
        proxy_steps: training steps of an evaluation; the first `quality_steps` are also the quality test.
        groups: of moments over groups; narrow networks need fewer, or each group is one channel.
        n_nodes: nodes of a graph beside the four fixed ones.
        batch_independent: search without moments over the batch (S layers).
        quality_steps, threshold: see `quality_check`.
        stability_steps, limit: see `stability_check`; 0 steps leave it out.
        batch_size, learning_rate: of the training.
        seed: of the graphs drawn.
        proxy_seed: of initial weights and order of the data.
        seconds: stop after this much time, with what has been found.
        known: verdicts by `graph.hash()`, read and added to: searches that judge alike may share one.
        workers: how many graphs are judged at once, each in a process of one thread. A child is then drawn before the
            `workers - 1` attempts before it are judged: the result depends on this number, not on which process is
            fastest, and random search does not depend on it at all. Anchors must be picklable (top-level functions).
        on_result: called after each graph with the result so far, the graph, and a cause of rejection or the candidate.
        resume: an earlier result of the same call; the search goes on as if it had not stopped.

    Raises:
        ValueError: on arguments out of range.
    """
    if not anchors:
        raise ValueError("anchors must hold at least one network factory, got none")
    if len({len(data[0]), len(data[1])}) > 1 or len({len(data[2]), len(data[3])}) > 1:
        raise ValueError(f"data must pair inputs with labels, got lengths {[len(part) for part in data]}")
    if min(evaluations, window, workers) < 1 or tournament <= 0:
        raise ValueError(
            "evaluations, window, tournament and workers must be positive, got "
            f"{evaluations}, {window}, {tournament} and {workers}"
        )
    if not 0 <= explore <= 1:
        raise ValueError(f"explore must lie in [0, 1], got {explore}")
    if select not in ("pareto", "average"):
        raise ValueError(f'select must be "pareto" or "average", got {select!r}')
    if quality_steps > proxy_steps:
        raise ValueError(f"quality_steps must be at most proxy_steps = {proxy_steps}, got {quality_steps}")
    judge = _Judge(
        tuple(anchors),
        data,
        groups,
        proxy_steps,
        quality_steps,
        stability_steps,
        _threshold(data, threshold),
        limit,
        batch_size,
        learning_rate,
        proxy_seed,
    )
    result = SearchResult() if resume is None else SearchResult.from_json(resume.to_json())
    evaluated = {candidate.graph.hash() for candidate in result.history}
    known = {} if known is None else known
    known.update({candidate.graph.hash(): candidate.accuracies for candidate in result.history})
    before, began = result.seconds, time.perf_counter()

    def child(attempt: int) -> tuple[NormActGraph, Literal["random", "mutation"]]:
        # A stream for each attempt: going on after an interruption draws what would have been drawn.
        rng = torch.Generator().manual_seed((seed << 32) + attempt)
        judged = bisect_left(result.history, attempt - workers + 1, key=lambda candidate: candidate.attempt)
        recent = result.history[max(0, judged - window) : judged]
        if not recent or float(torch.rand((), generator=rng)) < explore:
            return random_graph(rng, n_nodes, batch_independent), "random"
        return mutate(_winner(recent, tournament, select, rng).graph, rng, batch_independent), "mutation"

    with _judging(judge, workers) as submit:
        running: deque[tuple[NormActGraph, Literal["random", "mutation"], str]] = deque()
        verdicts: dict[str, Future[Verdict]] = {}
        while len(evaluated) < evaluations and (seconds is None or result.seconds < seconds):
            while len(running) < workers:
                graph, origin = child(result.attempts + len(running))
                key = graph.hash()
                running.append((graph, origin, key))
                if key not in known and key not in verdicts:
                    verdicts[key] = submit(graph)
            graph, origin, key = running.popleft()
            if key not in known:
                known[key] = verdicts.pop(key).result()
            verdict = known[key]
            outcome: str | Candidate
            if isinstance(verdict, str):
                result.rejections[verdict] += 1
                outcome = verdict
            else:
                result.reused += key in evaluated
                evaluated.add(key)
                outcome = Candidate(graph, verdict, origin, result.attempts)
                result.history.append(outcome)
            result.attempts += 1
            result.seconds = before + time.perf_counter() - began
            if on_result is not None:
                on_result(result, graph, outcome)
    return result


_worker_judge: _Judge | None = None  # of a process that judges


def _start_judging(judge: _Judge) -> None:
    global _worker_judge
    torch.set_num_threads(1)
    _worker_judge = judge


def _judged(graph: NormActGraph) -> Verdict:
    assert _worker_judge is not None
    return _worker_judge(graph)


@contextmanager
def _judging(judge: _Judge, workers: int) -> Iterator[Callable[[NormActGraph], Future[Verdict]]]:
    """A function that hands a graph to a process, which has the data already; one worker is this very process."""
    if workers == 1:

        def here(graph: NormActGraph) -> Future[Verdict]:
            done: Future[Verdict] = Future()
            done.set_result(judge(graph))
            return done

        yield here
        return
    # Spawned, not forked: the threads of torch and a GPU do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_judging, (judge,))
    try:
        yield lambda graph: pool.submit(_judged, graph)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _winner(recent: Sequence[Candidate], tournament: float, select: str, rng: torch.Generator) -> Candidate:
    size = int(tournament) if tournament >= 1 else max(2, round(tournament * len(recent)))
    chosen = torch.randperm(len(recent), generator=rng)[:size].tolist()
    sample = [recent[index] for index in chosen]
    if select == "average":
        return max(sample, key=lambda candidate: candidate.mean)
    front = pareto_front(torch.tensor([candidate.accuracies for candidate in sample])).nonzero().flatten()
    return sample[int(front[torch.randint(len(front), (), generator=rng)])]


def rerank(
    candidates: Sequence[Candidate],
    anchors: Sequence[Anchor],
    data: Data,
    *,
    steps: int,
    groups: int = 32,
    batch_size: int = 64,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> list[Candidate]:
    """The candidates trained anew, on larger anchors or for longer, the highest mean accuracy first.

    This is the last stage of the paper's search, where the ten best are compared.
    """

    def trained(graph: NormActGraph, anchor: Anchor) -> float:
        layer = partial(graph.to_module, groups=groups)
        training = _Training(layer, anchor, data, batch_size, learning_rate, seed)
        return training.accuracy() if training.advance(steps) else 0.0

    found = [Candidate(c.graph, tuple(trained(c.graph, anchor) for anchor in anchors), c.origin) for c in candidates]
    return sorted(found, key=lambda candidate: -candidate.mean)
