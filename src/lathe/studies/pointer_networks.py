"""Can a network learn geometry from examples by pointing at its own input, and on more points than it has seen?"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

import altair as alt
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lathe.data.tours import (
    DelaunayDataset,
    HullDataset,
    TSPDataset,
    batches,
    counter_clockwise,
    delaunay,
    nearest_neighbour,
    tour_length,
    tsp,
)
from lathe.nn.pointer_networks import (
    Permutation,
    PointerNetwork,
    PointSequenceModel,
    Seq2SeqAttention,
    Seq2SeqFixed,
    TeacherForced,
    Triangles,
    delaunay_metrics,
    hull_metrics,
    is_tour,
    pointer_loss,
)
from lathe.studies.engine import Measurement, Run, Setting, Study, at_least, at_most, average
from lathe.training import fit

study = Study(
    "pointer-networks",
    title="Pointer Networks",
    authors="Vinyals, Fortunato, Jaitly",
    year=2015,
    arxiv="1506.03134",
    area="nn",
    module="lathe.nn.pointer_networks",
    summary="""Lets a network answer with positions of its own input: attention weights are the output distribution, so
    that the dictionary grows with what is given. Outlines, triangulations and tours are learnt from examples, and
    masks make invalid ones impossible.""",
    example="""
import torch
from lathe.data.tours import HullDataset
from lathe.nn.pointer_networks import Hull, PointerNetwork, TeacherForced, hull_metrics, pointer_loss
from lathe.training import fit

net, data = PointerNetwork(input_dim=2, hidden_dim=32), HullDataset(1000, n=(5, 8))    # a real run: 5,000 steps
fit(TeacherForced(net), data.batches(64), loss=pointer_loss, optimizer=torch.optim.Adam, steps=20, clip_norm=2.0)
points = torch.rand(4, 12, 2)                                                         # more than it was trained on
outlines = net.decode(points, strategy="beam", beam=8, valid=Hull(convex=True)).best  # indices, the stop token, -100
assert hull_metrics(points, outlines).failed == 0                                     # no outline crosses itself
""",
    job="build",
    scales={
        "smoke": Setting(
            seeds=1,
            hidden=16,
            batch=32,
            lr=4e-3,
            hull_n=5,
            hull_most=7,
            hull_steps=60,
            tsp_n=5,
            tsp_steps=60,
            teacher_n=7,
            teacher_steps=40,
            delaunay_n=5,
            delaunay_steps=40,
            delaunay_hidden=16,
            delaunay_lr=2e-3,
            longer=10,
            samples=2000,
            test=200,
        ),
        "desk": Setting(
            hidden=64,
            batch=64,
            lr=4e-3,
            hull_n=5,
            hull_most=8,
            hull_steps=8000,
            tsp_n=5,
            tsp_steps=5000,
            teacher_n=10,
            teacher_steps=6000,
            delaunay_n=5,
            delaunay_steps=12_000,
            delaunay_hidden=128,
            delaunay_lr=2e-3,
            longer=10,
            samples=200_000,
            test=2000,
        ),
        "full": Setting(
            hidden=512,
            batch=128,
            lr=1e-3,
            hull_n=10,
            hull_most=50,
            hull_steps=100_000,
            tsp_n=20,
            tsp_steps=100_000,
            teacher_n=50,
            teacher_steps=100_000,
            delaunay_n=10,
            delaunay_steps=100_000,
            delaunay_hidden=512,
            delaunay_lr=1e-3,
            longer=50,
            samples=1_000_000,
            test=10_000,
        ),
    },
)

Scores = dict[str, float]


@study.claim(
    "C1",
    "Pointer networks learn convex hulls, better than an LSTM with a fixed dictionary, with or without attention",
    paper="Table 1, n = 50: 72.6 % of the hulls exact, 38.9 % by LSTM with attention, 1.9 % by LSTM; area 99.9 %",
    holds=at_least(0.75),
    unit="share of hulls that are exact, at n = 5",
    also={"minus LSTM": at_least(0.05), "area covered": at_least(0.98)},
)
def learns_hulls(run: Run) -> Measurement:
    n = run.setting.hull_n
    found = {
        "pointer network": run.each_seed(learn_hulls),
        "LSTM with attention": run.each_seed(learn_hulls_by_index, attention=True),
        "LSTM": run.each_seed(learn_hulls_by_index, attention=False),
    }
    exact = {name: column(scores, f"exact {n}") for name, scores in found.items()}
    run.figure(strips(exact, "share of hulls that are exact", 0.75))
    ours, attention, lstm = (exact[name] for name in found)
    return average(
        ours,
        baseline=statistics.fmean(attention),
        also={
            "minus LSTM": statistics.fmean(ours) - statistics.fmean(lstm),
            "minus LSTM with attention": statistics.fmean(ours) - statistics.fmean(attention),
            "area covered": statistics.fmean(column(found["pointer network"], f"area {n}")),
            "not simple": statistics.fmean(column(found["pointer network"], f"failed {n}")),
        },
        note=f"the pointer network is trained on {n} to {run.setting.hull_most} points, the others on {n}, all for "
        f"{run.setting.hull_steps:,} steps; beams of 8 without masks",
    )


@study.claim(
    "C2",
    "A pointer network works on more points than it was trained on",
    paper="Table 1: trained on 5 to 50 points, 50.3 % exact at 100; area over 99 % up to 500",
    holds=at_least(0.5),
    unit="accuracy one point beyond training / at the most points of training",
    also={"area covered two beyond": at_least(0.95)},
)
def grows(run: Run) -> Measurement:
    most = run.setting.hull_most
    scores = run.each_seed(learn_hulls)
    run.figure(beyond_training(run, scores))
    try:
        Seq2SeqFixed(most, hidden_dim=4)(torch.rand(1, most + 1, 2), torch.zeros(1, 1, dtype=torch.long))
    except ValueError:
        refused = "a network with a fixed dictionary refuses one point more"
    return average(
        [score[f"exact {most + 1}"] / max(score[f"exact {most}"], 1e-9) for score in scores],
        baseline=statistics.fmean(column(scores, f"exact {most}")),
        also={
            "area covered two beyond": statistics.fmean(column(scores, f"area {most + 2}")),
            f"exact at {most + 1}": statistics.fmean(column(scores, f"exact {most + 1}")),
        },
        note=f"trained on {run.setting.hull_n} to {most} points; {refused}",
    )


@study.claim(
    "C3",
    "A pointer network finds nearly optimal tours of few cities",
    paper="n = 5: length 2.12, as the optimum; n = 10: 2.88 against 2.87; n = 20: 3.88 against 3.83",
    holds=at_most(1.03),
    unit="mean length / optimal, beam of 8 over valid tours",
    also={"over nearest neighbour": at_most(0.9999), "beam of 8 over greedy": at_most(1.0)},
)
def finds_tours(run: Run) -> Measurement:
    scores = run.each_seed(learn_tours)
    rows = {"nearest neighbour": "nearest", "pointer, greedy": "greedy", "pointer, beam of 8": "beam"}
    run.figure(strips({name: column(scores, key) for name, key in rows.items()}, "length / optimal", 1.03))
    beam, greedy, nearest = (statistics.fmean(column(scores, key)) for key in ("beam", "greedy", "nearest"))
    return average(
        column(scores, "beam"),
        baseline=nearest,
        also={"over nearest neighbour": beam / nearest, "beam of 8 over greedy": beam / greedy, "greedy": greedy},
        note=f"n = {run.setting.tsp_n}; labels run counter-clockwise: in earlier trials the loss left its plateau "
        "after some 800 steps; with the lower index next (h = 128) after 4,000, and at 6,000 lengths were 1.09",
    )


@study.claim(
    "C4",
    "A pointer network that imitates a bad teacher can beat it",
    paper="n = 50, trained on tours of method A1 (6.46): 6.42",
    holds=at_most(1.0),
    unit="mean length / the teacher's",
)
def beats_its_teacher(run: Run) -> Measurement:
    scores = run.each_seed(imitate)
    names = {"teacher": "teacher", "nearest neighbour": "nearest", "pointer, beam of 8": "beam"}
    run.figure(strips({name: column(scores, key) for name, key in names.items()}, "length / optimal"))
    return average(
        [score["beam"] / score["teacher"] for score in scores],
        baseline=statistics.fmean(column(scores, "teacher")),
        also={
            "over optimal": statistics.fmean(column(scores, "beam")),
            "nearest neighbour over optimal": statistics.fmean(column(scores, "nearest")),
        },
        note=f"n = {run.setting.teacher_n}; the teacher is nearest neighbour with one random stretch reversed",
    )


@study.claim(
    "C5",
    "Delaunay triangulations are learnt in part",
    paper="n = 5: 80.7 % exact, 93.0 % of the triangles; n = 10: 22.6 % and 81.3 %; n = 50: 0 % and 52.8 %",
    holds=at_least(0.6),
    unit="share of true triangles found",
    also={"minus a random triangulation": at_least(0.1)},
)
def triangulates(run: Run) -> Measurement:
    scores = run.each_seed(learn_triangulations)
    rows = {"pointer network": "coverage", "random triangulation": "random"}
    run.figure(strips({name: column(scores, key) for name, key in rows.items()}, "share of true triangles", 0.6))
    coverage, chance = (statistics.fmean(column(scores, key)) for key in ("coverage", "random"))
    return average(
        column(scores, "coverage"),
        baseline=chance,
        also={
            "minus a random triangulation": coverage - chance,
            "exact": statistics.fmean(column(scores, "exact")),
            "by a beam of 8 over triangles": statistics.fmean(column(scores, "masked")),
        },
        note=f"n = {run.setting.delaunay_n}, greedy, without masks",
    )


@study.claim(
    "C6",
    "A beam over valid tours gives tours only; a free one does not",
    paper="section 4.4: beyond 20 cities more than 10 % of the free outputs are no tours",
    holds=at_least(1.0),
    unit="share of outputs that are tours",
    also={"without masks": at_most(0.9999)},
)
def stays_valid(run: Run) -> Measurement:
    scores = run.each_seed(learn_tours)
    run.figure(validity(run, scores))
    longer = run.setting.longer
    return average(
        column(scores, f"valid {longer}"),
        also={
            "without masks": statistics.fmean(column(scores, f"free {longer}")),
            f"without masks at n = {run.setting.tsp_n}": statistics.fmean(column(scores, f"free {run.setting.tsp_n}")),
        },
        note=f"the network of C3 on {longer} cities, beams of 8",
    )


# --- networks and what they are trained on ---


def train(
    run: Run, net: PointSequenceModel, data: Any, steps: int, seed: int, what: str, lr: float | None = None
) -> None:
    """Adam at a constant rate, a tenth of it in the last fifth of the steps; gradients clipped as in the paper."""
    setting = run.setting
    fit(
        TeacherForced(net),
        data,
        loss=pointer_loss,
        optimizer=partial(torch.optim.Adam, lr=lr or setting.lr),
        schedule=lambda optimizer, total: LambdaLR(optimizer, lambda step: 1.0 if step < 0.8 * total else 0.1),
        steps=steps,
        clip_norm=2.0,
        seed=seed,
        device=run.device,
        progress=lambda now: run.progress(f"{what}, seed {seed}", now.step, now.total),
    )


def test_points(run: Run, n: int) -> Tensor:
    """The same for all networks, and of seeds that no training set has."""
    return torch.rand(run.setting.test, n, 2, generator=run.generator(10**6 + n)).to(run.device)


def learn_hulls(run: Run, seed: int) -> Scores:
    """Trained on a range of sizes; judged on these and three more."""
    setting = run.setting
    data = HullDataset(setting.samples, (setting.hull_n, setting.hull_most), seed=seed)
    net = PointerNetwork(hidden_dim=setting.hidden)
    train(run, net, data.batches(setting.batch, seed=seed), setting.hull_steps, seed, "hulls")
    return hull_scores(run, net, range(setting.hull_n, setting.hull_most + 4))


def learn_hulls_by_index(run: Run, seed: int, attention: bool) -> Scores:
    """A baseline, for its one number of points."""
    setting = run.setting
    data = HullDataset(setting.samples, setting.hull_n, seed=seed)
    net = (Seq2SeqAttention if attention else Seq2SeqFixed)(setting.hull_n, hidden_dim=setting.hidden)
    train(run, net, data.batches(setting.batch, seed=seed), setting.hull_steps, seed, type(net).__name__)
    return hull_scores(run, net, [setting.hull_n])


def hull_scores(run: Run, net: PointSequenceModel, sizes: Any) -> Scores:
    scores: Scores = {}
    for n in sizes:
        points = test_points(run, n)
        found = hull_metrics(points, net.decode(points, strategy="beam").best)
        area = found.area if found.failed < 1 else 0.0
        scores |= {f"exact {n}": found.accuracy, f"area {n}": area, f"failed {n}": found.failed}
    return scores


def learn_tours(run: Run, seed: int) -> Scores:
    """Trained on optimal tours of one size; judged there, and for validity up to `longer` cities."""
    setting = run.setting
    data = TSPDataset(setting.samples, setting.tsp_n, direction="counter_clockwise", seed=seed)
    net = PointerNetwork(hidden_dim=setting.hidden, stop_token=False)
    train(run, net, data.batches(setting.batch, seed=seed), setting.tsp_steps, seed, "tours")
    scores = tour_scores(run, net, setting.tsp_n)
    for n in range(setting.tsp_n, setting.longer + 1):
        points = test_points(run, n)
        for name, valid in (("valid", Permutation()), ("free", None)):
            written = net.decode(points, strategy="beam", valid=valid).best
            scores[f"{name} {n}"] = float(is_tour(written, n).double().mean())
    return scores


def imitate(run: Run, seed: int) -> Scores:
    """Trained on the tours of a bad teacher."""
    setting = run.setting
    generator = run.generator(seed)
    points = torch.rand(setting.samples, setting.teacher_n, 2, generator=generator)
    parts = [(points, bad_tours(points, generator))]
    net = PointerNetwork(hidden_dim=setting.hidden, stop_token=False)
    train(run, net, batches(parts, setting.batch, seed=seed), setting.teacher_steps, seed, "imitation")
    scores = tour_scores(run, net, setting.teacher_n)
    tests = test_points(run, setting.teacher_n)
    optimal = scores.pop("optimal length")
    taught = tour_length(tests, bad_tours(tests, run.generator(seed)))
    return scores | {"teacher": float(taught.mean()) / optimal}


def bad_tours(points: Tensor, generator: torch.Generator) -> Tensor:
    """Nearest-neighbour tours, each with one random stretch reversed, all counter-clockwise on the whole."""
    tours = nearest_neighbour(points)
    count, n = tours.shape
    one = torch.randint(1, n, (count, 1), generator=generator)
    other = 1 + (one - 1 + torch.randint(1, n - 1, (count, 1), generator=generator)) % (n - 1)
    low, high = torch.minimum(one, other), torch.maximum(one, other)
    place = torch.arange(n).expand(count, n)
    place = torch.where((place >= low) & (place <= high), low + high - place, place).to(tours.device)
    return counter_clockwise(points, tours.gather(1, place))


def tour_scores(run: Run, net: PointSequenceModel, n: int) -> Scores:
    """Mean lengths over the optimal one."""
    points = test_points(run, n)
    optimal = float(tour_length(points, tsp(points, "held_karp" if n <= 14 else "two_opt")).mean())
    beam, greedy = (net.decode(points, strategy=how, valid=Permutation()).best for how in ("beam", "greedy"))  # type: ignore[arg-type]
    lengths = {"beam": beam, "greedy": greedy, "nearest": nearest_neighbour(points)}
    scores = {name: float(tour_length(points, tours).mean()) / optimal for name, tours in lengths.items()}
    return scores | {"optimal length": optimal}


def learn_triangulations(run: Run, seed: int) -> Scores:
    setting = run.setting
    data = DelaunayDataset(setting.samples, setting.delaunay_n, seed=seed)
    net = PointerNetwork(hidden_dim=setting.delaunay_hidden)
    stream = data.batches(setting.batch, seed=seed)
    train(run, net, stream, setting.delaunay_steps, seed, "triangulations", setting.delaunay_lr)
    points = test_points(run, setting.delaunay_n)
    longest = Triangles().longest(setting.delaunay_n)
    found = delaunay_metrics(points, net.decode(points, longest).best)
    masked = delaunay_metrics(points, net.decode(points, strategy="beam", valid=Triangles()).best)
    some = points[:200].cpu()
    chance = delaunay_metrics(some, random_triangulations(some, run.generator(seed))).coverage
    return {"coverage": found.coverage, "exact": found.accuracy, "masked": masked.coverage, "random": chance}


def random_triangulations(points: Tensor, generator: torch.Generator) -> Tensor:
    """Edges in random order, each drawn if it crosses none before it; then all triangles without a point inside."""
    found = torch.full_like(delaunay(points), -100)
    for row, xy in enumerate(points.double().tolist()):
        pairs = list(itertools.combinations(range(len(xy)), 2))
        drawn: set[tuple[int, int]] = set()
        for number in torch.randperm(len(pairs), generator=generator).tolist():
            a, b = pairs[number]
            if not any(
                len({a, b, c, d}) == 4
                and side(xy[a], xy[b], xy[c]) != side(xy[a], xy[b], xy[d])
                and side(xy[c], xy[d], xy[a]) != side(xy[c], xy[d], xy[b])
                for c, d in drawn
            ):
                drawn.add((a, b))
        triangles = [
            (a, b, c)
            for a, b, c in itertools.combinations(range(len(xy)), 3)
            if {(a, b), (b, c), (a, c)} <= drawn
            and not any(
                side(xy[a], xy[b], point) == side(xy[b], xy[c], point) == side(xy[c], xy[a], point)
                for d, point in enumerate(xy)
                if d not in (a, b, c)
            )
        ]
        found[row, : 3 * len(triangles)] = torch.tensor(triangles).flatten()
    return found


def side(a: list[float], b: list[float], c: list[float]) -> bool:
    """Whether c lies to the left of the way from a to b."""
    return (b[0] - a[0]) * (c[1] - a[1]) > (b[1] - a[1]) * (c[0] - a[0])


# --- figures ---


def column(scores: list[Scores], name: str) -> list[float]:
    return [score[name] for score in scores]


def strips(rows: Mapping[str, list[float]], title: str, bound: float | None = None) -> alt.LayerChart:
    """A point a seed, a tick at the mean; the dashed rule is the claim's bound."""
    values = [
        {"who": name, "seed": seed, "value": round(value, 4)}
        for name, samples in rows.items()
        for seed, value in enumerate(samples)
    ]
    base = alt.Chart(alt.Data(values=values)).encode(y=alt.Y("who:N", title=None, sort=list(rows)))
    points = base.mark_point(filled=True, size=70).encode(
        x=alt.X("value:Q", title=title, scale=alt.Scale(zero=False, padding=12)),
        tooltip=["who:N", "seed:Q", "value:Q"],
    )
    layers = points + base.mark_tick(thickness=2, size=30).encode(x="mean(value):Q")
    if bound is not None:
        rule = alt.Chart(alt.Data(values=[{"bound": bound}])).mark_rule(strokeDash=[4, 4]).encode(x="bound:Q")
        layers = layers + rule
    return layers.properties(width="container", height=max(120, 60 * len(rows)))


def beyond_training(run: Run, scores: list[Scores]) -> alt.LayerChart:
    """Accuracy and area over n, the mean of the seeds and their range; the sizes of training are shaded."""
    least, most = run.setting.hull_n, run.setting.hull_most
    kinds = {"exact": "hulls exact", "area": "area covered (simple outlines)"}
    values = [
        {"n": n, "share": round(score[f"{key} {n}"], 4), "what": name}
        for n in range(least, most + 4)
        for key, name in kinds.items()
        for score in scores
    ]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("n:Q", title="points", axis=alt.Axis(tickMinStep=1, format="d"), scale=alt.Scale(zero=False)),
        color=alt.Color("what:N", title=None, legend=alt.Legend(orient="bottom")),
    )
    shares = alt.Y("mean(share):Q", title="share", scale=alt.Scale(domain=[0, 1]))
    lines = base.mark_line(point=True).encode(y=shares, tooltip=["what:N", "n:Q", "mean(share):Q"])
    bands = base.mark_area(opacity=0.2).encode(y="min(share):Q", y2="max(share):Q")
    shade = alt.Chart(alt.Data(values=[{"from": least, "to": most, "what": "sizes of training"}]))
    box = shade.mark_rect(opacity=0.08, color="gray").encode(x="from:Q", x2="to:Q")
    label = shade.mark_text(align="left", baseline="bottom", dx=6, dy=-6, opacity=0.7).encode(
        x="from:Q", y=alt.datum(0), text="what:N"
    )
    return (box + bands + lines + label).properties(width="container", height=260)


def validity(run: Run, scores: list[Scores]) -> alt.Chart:
    """Share of valid outputs over n, with and without masks."""
    kinds = {"valid": "over valid tours", "free": "free"}
    values = [
        {"n": n, "share": round(score[f"{key} {n}"], 4), "beam": name}
        for n in range(run.setting.tsp_n, run.setting.longer + 1)
        for key, name in kinds.items()
        for score in scores
    ]
    line = alt.Chart(alt.Data(values=values)).mark_line(point=True).encode(
        x=alt.X("n:Q", title="cities", axis=alt.Axis(tickMinStep=1, format="d"), scale=alt.Scale(zero=False)),
        y=alt.Y("mean(share):Q", title="share of outputs that are tours", scale=alt.Scale(domain=[0, 1])),
        color=alt.Color("beam:N", title="beam", sort=list(kinds.values()), legend=alt.Legend(orient="bottom")),
        tooltip=["beam:N", "n:Q", "mean(share):Q"],
    )  # fmt: skip
    return line.properties(width="container", height=260)
