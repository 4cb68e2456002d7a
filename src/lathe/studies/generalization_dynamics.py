"""Does exact theory say how the errors of linear, random-feature and two-layer networks evolve, and when to stop?"""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lathe.studies.engine import Measurement, Run, Setting, Study, at_least, at_most, between, equals
from lathe.theory.generalization_dynamics import (
    LinearTheory,
    RandomFeatures,
    TeacherStudent,
    Trajectory,
    deep_linear_modes,
    gradient_flow,
    size_sweep,
)


class Sizes(NamedTuple):
    """Students of C6 and C7: where their samples come from, how many, and the numbers of hidden units to try."""

    data: str
    samples: int
    hidden: tuple[int, ...]
    snr: float


study = Study(
    "generalization-dynamics",
    title="High-dimensional dynamics of generalization error in neural networks",
    authors="Advani, Saxe, Sompolinsky",
    year=2017,
    arxiv="1710.03667",
    area="theory",
    module="lathe.theory.generalization_dynamics",
    summary="""Tells you from a network's features when to stop training, how strong a ridge penalty does as well, and
    whether you have the worst number of features for your samples. Behind it stand exact learning curves of linear
    networks, errors of training and test at every time, and the same for your own features without a training step.""",
    example="""
import torch
from torch import nn
from lathe import data
from lathe.theory.generalization_dynamics import LinearTheory, recommend

digits = data.load("digits").subset(500)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))
advice = recommend(model, (digits.float(), digits.labels), lr=0.1, generator=torch.Generator().manual_seed(0))
chart = advice.plot()                # measured learning curves beside the theory's, and where to stop; print(advice)
time, error = LinearTheory(alpha=torch.tensor([0.5, 1.0, 2.0]), snr=2.0).optimal_stopping()
assert advice.best_error < advice.final_error and error[0] > error[1] > error[2]
""",
    job="predict",
    scales={
        "smoke": Setting(
            seeds=2, inputs=60, draws=12, sweep_draws=5,
            features=Sizes("teacher", 60, (5, 20, 60, 300), 2.0), tests=300,
            trained=Sizes("teacher", 100, (2, 10, 20, 150), 1.0), steps=300, lr=0.05, at=20,
        ),
        "desk": Setting(
            seeds=6, inputs=100, draws=30, sweep_draws=30,
            features=Sizes("teacher", 100, (5, 10, 20, 35, 50, 65, 80, 90, 100, 110, 120, 150, 200, 400, 1000), 2.0),
            tests=2000,
            trained=Sizes("teacher", 100, (2, 5, 10, 20, 50, 150), 1.0), steps=6000, lr=0.05, at=20,
        ),
        "full": Setting(
            seeds=6, inputs=2000, draws=30, sweep_draws=10,
            features=Sizes("mnist", 2000, (50, 200, 500, 1000, 1500, 1800, 2000, 2200, 3000, 5000, 20_000), 2.0),
            tests=10_000,
            trained=Sizes("mnist", 1000, (2, 5, 8, 13, 20, 50, 200, 1000, 4096), 1.0), steps=100_000, lr=0.05, at=25,
        ),
    },
)  # fmt: skip

#: Variances of C1, C2 and C5.
START, NOISE = 0.25, 0.5
TIMES = (0.1, 1.0, 3.0, 10.0, 100.0, 1e4)


def chart(rows: list[dict], **options: float) -> alt.Chart:
    """A chart of its own data, with the numbers as long as a figure needs them."""
    short = [{k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    return alt.Chart(alt.Data(values=short)).properties(**({"width": "container", "height": 260} | options))


def only(rows: list[dict], **values: str) -> list[dict]:
    """The rows that have these values, without them."""
    kept = [row for row in rows if all(row[name] == value for name, value in values.items())]
    return [{name: value for name, value in row.items() if name not in values} for row in kept]


@study.claim(
    "C1",
    "Average test and training errors of drawn linear students are those of the theory at all times",
    paper="Figures 1-3: theory and simulation of E_g(t) and E_t(t) for few, equal and many samples",
    holds=at_most(1.0),
    unit="largest deviation, in units of the larger of 4 standard errors and 2%",
)
def curves_match_drawn_students(run: Run) -> Measurement:
    deviations, dots = {}, []
    for alpha in (0.5, 1.0, 2.0):
        # Late at alpha = 1 rare draws rule the mean: those times are drawn, and not judged.
        times = [t for t in TIMES if alpha != 1.0 or t <= 10]
        drawn = students(run, alpha, START, times)
        theory = LinearTheory(alpha, sigma_0=START**0.5, sigma_eps=NOISE**0.5)
        sides = {"test": (drawn[0], theory.test_error), "training": (drawn[1], theory.train_error)}
        for name, (errors, curve) in sides.items():
            mean, spread = errors.mean(1), errors.std(1) / math.sqrt(errors.shape[1])
            expected = curve(torch.tensor(times))
            # Once training errors are nothing but rounding there is nothing to compare.
            allowed = torch.maximum(4 * spread, 0.02 * expected).clamp_min(1e-12)
            deviations[f"{name}, alpha = {alpha:g}"] = ((mean - expected).abs() / allowed).max().item()
            # On a logarithmic axis the mean's own error is told by two bars' width below the dot.
            dots += [
                {"t": t, "error": m, "low": m - 2 * s, "high": m + 2 * s, "alpha": f"{alpha:g}", "which": name}
                for t, m, s in zip(times, mean.tolist(), spread.tolist())
                if m > 1e-3
            ]
    grid = torch.logspace(-1, 4, 61, dtype=torch.float64)
    lines = [
        {"t": t, "error": e, "alpha": f"{alpha:g}", "which": name}
        for alpha in (0.5, 1.0, 2.0)
        for theory in (LinearTheory(alpha, sigma_0=START**0.5, sigma_eps=NOISE**0.5),)
        for name, curve in (("test", theory.test_error), ("training", theory.train_error))
        for t, e in zip(grid.tolist(), curve(grid).tolist())
        if e > 1e-3
    ]
    run.figure(alt.hconcat(*(by_alpha(lines, dots, which) for which in ("test", "training"))))
    return Measurement(
        max(deviations.values()),
        seeds=run.setting.draws,
        also=deviations,
        note="seeds are draws of teacher, samples, noise and first weights; alpha = 1 is judged up to t = 10, as rare "
        "draws rule its mean later on",
    )


def by_alpha(lines: list[dict], dots: list[dict], which: str) -> Any:
    """Theory as lines and draws as dots, for one kind of error."""
    x = alt.X("t:Q", title="time").scale(type="log").axis(format="~e", tickCount=5)
    y = alt.Y("error:Q", title=f"{which} error").scale(type="log", nice=False).axis(format="~g")
    color = alt.Color("alpha:N", title="samples / inputs")
    lines, dots = only(lines, which=which), only(dots, which=which)
    bars = chart(dots, width=270).mark_rule().encode(x=x, y=alt.Y("low:Q").scale(type="log"), y2="high:Q", color=color)
    return alt.layer(
        chart(lines, width=270).mark_line().encode(x=x, y=y, color=color),
        bars,
        chart(dots, width=270).mark_circle(size=45, opacity=1).encode(x=x, y=y, color=color),
    )


def students(run: Run, alpha: float, start: float, times: list[float], draws: int | None = None) -> tuple[Tensor, ...]:
    """Test and training errors (times, draws) of drawn linear students, and what went astray in frozen directions.

    The test error is that of the population. Frozen directions come from a full SVD of the samples.
    """
    s = run.setting
    N, draws = s.inputs, draws or s.draws
    P = round(alpha * N)
    generator = run.generator(0)
    drawn: list[list[Tensor]] = []
    for _ in range(draws):
        x = torch.randn(P, N, dtype=torch.float64, generator=generator).to(run.device) / math.sqrt(N)
        teacher, w0 = torch.randn(2, N, dtype=torch.float64, generator=generator).to(run.device)
        eps = math.sqrt(NOISE) * torch.randn(P, dtype=torch.float64, generator=generator).to(run.device)
        w0 = math.sqrt(start) * w0
        flow: Trajectory = gradient_flow(x, x @ teacher + eps, w0, times=torch.tensor(times))
        weights = flow.weights
        test = (weights - teacher).square().mean(-1) + NOISE
        null = torch.linalg.svd(x)[2][P:] if P < N else x[:0]
        drawn.append([test, flow.train, (null @ (weights - w0).T).abs().amax().reshape(1) if P < N else x.new_zeros(1)])
        run.progress(f"students, alpha = {alpha:g}", len(drawn), draws)
    return tuple(torch.stack(each, 1).cpu() for each in zip(*drawn))


@study.claim(
    "C2",
    "The final error diverges at as many parameters as samples, and falls on both sides",
    paper="Figure 4: generalisation error against the number of samples a parameter, after long training",
    kind="exact",
    holds=at_least(10.0),
    unit="E_g at alpha = 1 over that at 1/2, at t = 10^4",
    also={"closed forms, largest relative error": at_most(1e-6)},
)
def final_error_peaks(run: Run) -> Measurement:
    # Denser towards the peak.
    alpha = 10 ** (torch.linspace(-1, 1, 61, dtype=torch.float64) ** 3)
    theory = LinearTheory(alpha, sigma_0=START**0.5, sigma_eps=NOISE**0.5)
    S0, gap = 1 + START, (alpha - 1).abs()
    closed = NOISE + (1 - alpha).clamp_min(0) * S0 + NOISE * alpha.clamp_max(1) / gap
    apart = gap > 0
    late = theory.test_error(1e12)
    worst = ((late - closed)[apart].abs() / closed[apart]).max().item()
    rows = [
        {"alpha": a, "error": e, "time": name}
        for t, name in ((1.0, "1"), (10.0, "10"), (100.0, "100"), (1e4, "10⁴"))
        for a, e in zip(alpha.tolist(), theory.test_error(t).tolist())
    ]
    dots, off = [], []
    for a in (0.2, 0.5, 0.75, 1.0, 1.5, 3.0, 8.0):
        drawn = students(run, a, START, [1e4], run.setting.sweep_draws)[0].quantile(0.5).item()
        dots.append({"alpha": a, "error": drawn, "time": "10⁴"})
        if a != 1.0:
            expected = LinearTheory(a, sigma_0=START**0.5, sigma_eps=NOISE**0.5).test_error(1e4).item()
            off.append(abs(drawn / expected - 1))
    x = alt.X("alpha:Q", title="samples / inputs").scale(type="log").axis(values=[0.1, 0.2, 0.5, 1, 2, 5, 10])
    y = alt.Y("error:Q", title="test error").scale(type="log", nice=False).axis(format="~g")
    color = alt.Color("time:O", title="trained for", sort=["1", "10", "100", "10⁴"]).scale(scheme="viridis")
    run.figure(
        chart(rows).mark_line().encode(x=x, y=y, color=color)
        + chart(dots).mark_circle(size=55, opacity=1).encode(x=x, y=y, color=color)
    )
    pair = LinearTheory(torch.tensor([0.5, 1.0]), sigma_0=START**0.5, sigma_eps=NOISE**0.5).test_error(1e4)
    return Measurement(
        (pair[1] / pair[0]).item(),
        also={
            "closed forms, largest relative error": worst,
            "alpha with the largest error": alpha[late.argmax()].item(),
            "medians of draws, largest relative error away from alpha = 1": max(off),
        },
        note="dots are medians over drawn students: at alpha = 1 the mean is ruled by rare draws",
    )


@study.claim(
    "C3",
    "With as many parameters as samples the error grows as the root of time, by 0.66099 noise variances",
    paper="derived from section 3: E_g - noise -> noise (2 (2 - √2)/√π) √t at alpha = 1",
    kind="exact",
    holds=between(0.49, 0.51),
    unit="fitted exponent of time",
    also={"relative error of the coefficient at t = 10^5": at_most(0.01)},
)
def overtraining_grows_as_the_root_of_time(run: Run) -> Measurement:
    t = torch.logspace(4, 6, 41, dtype=torch.float64)
    theory = LinearTheory(1.0, sigma_eps=1.0)
    grown = theory.test_error(t) - 1
    exponent = np.polyfit(t.log().numpy(), grown.log().numpy(), 1)[0]
    coefficient = 2 * (2 - math.sqrt(2)) / math.sqrt(math.pi)
    at = (theory.test_error(1e5) - 1).item() / math.sqrt(1e5)
    grid = torch.logspace(-1, 6, 71, dtype=torch.float64)
    rows = [
        {"t": x, "grown": e, "curve": name}
        for name, values in (("exact", theory.test_error(grid) - 1), ("0.661 √t", coefficient * grid.sqrt()))
        for x, e in zip(grid.tolist(), values.tolist())
    ]
    run.figure(
        chart(rows)
        .mark_line()
        .encode(
            x=alt.X("t:Q", title="time").scale(type="log").axis(format="~e", tickCount=7),
            y=alt.Y("grown:Q", title="test error above the noise, in noise variances").scale(type="log"),
            color=alt.Color("curve:N", title=None, sort=["exact", "0.661 √t"]),
            strokeDash=alt.StrokeDash("curve:N", title=None, sort=["exact", "0.661 √t"]),
        )
    )
    return Measurement(
        float(exponent), also={"relative error of the coefficient at t = 10^5": abs(at / coefficient - 1)}
    )


@study.claim(
    "C4",
    "Stopped in time, training from zero does nearly as well as the best ridge penalty; from large weights it does not",
    paper="Figure 6: early stopping within about 2% of optimal L2 regularisation",
    kind="exact",
    holds=at_most(1.04),
    unit="largest ratio of the errors, stopped over ridge, from zero weights",
    also={"ratio from weights of variance 1/2": at_least(1.15)},
)
def stopping_is_nearly_ridge(run: Run) -> Measurement:
    alpha = torch.logspace(math.log10(0.2), math.log10(5), 6, dtype=torch.float64)
    snr = torch.logspace(-1, 2, 6, dtype=torch.float64)
    theory = LinearTheory(alpha[:, None], snr=snr)
    ratio = theory.optimal_stopping()[1] / theory.ridge()
    large = LinearTheory(0.5, sigma_0=math.sqrt(0.5), sigma_eps=math.sqrt(0.5))
    rows = [
        {
            "alpha": f"{a:.2g}",
            "snr": f"{q:.0f}" if q > 10 else f"{q:.2g}",
            "loss": 100 * (r - 1),
            "order": q,
            "text": f"{100 * (r - 1):.1f}%",
        }
        for a, line in zip(alpha.tolist(), ratio.tolist())
        for q, r in zip(snr.tolist(), line)
    ]
    x = alt.X("alpha:O", title="samples / inputs", sort=None).axis(labelAngle=0)
    y = alt.Y("snr:O", title="signal / noise", sort=alt.EncodingSortField("order", order="descending"))
    run.figure(
        chart(rows).mark_rect().encode(x=x, y=y, color=alt.Color("loss:Q", title="% above ridge").scale(scheme="blues"))
        + chart(rows)
        .mark_text()
        .encode(x=x, y=y, text="text:N", color=alt.condition("datum.loss > 2", alt.value("white"), alt.value("black")))
    )
    return Measurement(
        ratio.max().item(),
        also={
            "ratio from weights of variance 1/2": (large.optimal_stopping()[1] / large.ridge()).item(),
            "mean ratio": ratio.mean().item(),
        },
    )


@study.claim(
    "C5",
    "Training moves weights in min(inputs, samples) directions; elsewhere the first weights stay, and cost error",
    paper="Section on the frozen subspace: E_g keeps (1 - alpha) sigma_0^2 of the first weights for ever",
    kind="exact",
    holds=at_most(1e-10),
    unit="largest motion in a frozen direction",
    also={
        "rank of the motion minus min(inputs, samples)": equals(0),
        "error of the cost of first weights, in units of 4 standard errors or 2%": at_most(1.0),
    },
)
def frozen_directions_stay(run: Run) -> Measurement:
    alpha, times = 0.5, [0.1, 1.0, 10.0, 100.0, 1e4]
    starts = (0.0, 0.25, 1.0)
    found = {start: students(run, alpha, start, times) for start in starts}
    moved = max(part[2].max().item() for part in found.values())
    off = []
    for start in starts[1:]:
        # The same draws with and without first weights.
        cost = found[start][0][-1] - found[0.0][0][-1]
        expected = (1 - alpha) * start
        allowed = max(4 * cost.std().item() / math.sqrt(len(cost)), 0.02 * expected)
        off.append(abs(cost.mean().item() - expected) / allowed)
    ranks = []
    for N, P in ((30, 12), (12, 30), (20, 20)):
        generator = run.generator(1)
        x = torch.randn(P, N, dtype=torch.float64, generator=generator) / math.sqrt(N)
        w0 = torch.randn(N, N, dtype=torch.float64, generator=generator)
        y = torch.randn(P, N, dtype=torch.float64, generator=generator)
        motion = gradient_flow(x, y, w0, times=torch.tensor([10.0])).weights[0] - w0
        ranks.append(torch.linalg.matrix_rank(motion).item() - min(N, P))
    grid = torch.logspace(-1, 4, 61, dtype=torch.float64)
    lines, dots = [], []
    for start in starts:
        curve = LinearTheory(alpha, sigma_0=start**0.5, sigma_eps=NOISE**0.5).test_error(grid)
        lines += [{"t": t, "error": e, "start": start} for t, e in zip(grid.tolist(), curve.tolist())]
        means = found[start][0].mean(1).tolist()
        dots += [{"t": t, "error": e, "start": start} for t, e in zip(times, means)]
    time = alt.X("t:Q", title="time").scale(type="log").axis(format="~e", tickCount=6)
    error = alt.Y("error:Q", title="test error").scale(zero=False)
    color = alt.Color("start:O", title="variance of first weights").scale(scheme="viridis")
    run.figure(
        chart(lines).mark_line().encode(x=time, y=error, color=color)
        + chart(dots).mark_circle(size=55, opacity=1).encode(x=time, y=error, color=color)
    )
    return Measurement(
        moved,
        seeds=run.setting.draws,
        also={
            "rank of the motion minus min(inputs, samples)": max(ranks, key=abs),
            "error of the cost of first weights, in units of 4 standard errors or 2%": max(off),
        },
    )


@study.claim(
    "C6",
    "Readouts on random features end worst with as many features as samples; very large ones do well; stopping in "
    "time takes the peak away",
    paper="Figures 8-10: random ReLU features, a ReLU teacher, final and stopped error against hidden units",
    holds=at_least(5.0),
    unit="final error at the peak over that of the largest student, median over seeds",
    also={
        "features over samples at the peak": equals(1),
        "stopped error of the largest over the least of all sizes": at_most(1.1),
    },
)
def random_features_peak(run: Run) -> Measurement:
    sizes = run.setting.features
    final, stopped = (torch.tensor(each) for each in zip(*run.each_seed(sweep_of_random_features)))
    peak = sizes.hidden.index(sizes.samples)
    ratios = (final[:, peak] / final[:, -1]).tolist()
    middle, best = final.quantile(0.5, 0), stopped.quantile(0.5, 0)
    rows = [
        {"hidden": n, "error": e, "low": low, "high": high, "when": when}
        for when, values in (("trained for ever", final), ("stopped in time", stopped))
        for n, e, low, high in zip(
            sizes.hidden,
            values.quantile(0.5, 0).tolist(),
            values.amin(0).tolist(),
            values.amax(0).tolist(),
        )
    ]
    x = alt.X("hidden:Q", title="random features").scale(type="log", nice=False)
    y = alt.Y("error:Q", title="test error, without the noise").scale(type="log", nice=False).axis(format="~g")
    order = ["trained for ever", "stopped in time"]
    color, shade = alt.Color("when:N", title=None, sort=order), alt.Fill("when:N", legend=None, sort=order)
    marked = chart([{"hidden": sizes.samples, "text": "samples"}])
    run.figure(
        chart(rows).mark_area(opacity=0.15).encode(x=x, y=alt.Y("low:Q").scale(type="log"), y2="high:Q", fill=shade)
        + chart(rows).mark_line(point=True).encode(x=x, y=y, color=color)
        + marked.mark_rule(strokeDash=[4, 4]).encode(x=x)
        + marked.mark_text(align="left", dx=5, y=8).encode(x=x, text="text:N")
    )
    return Measurement(
        statistics.median(ratios),
        seeds=len(run.seeds),
        samples=ratios,
        also={
            "features over samples at the peak": sizes.hidden[int(middle.argmax())] / sizes.samples,
            "stopped error of the largest over the least of all sizes": (best[-1] / best.min()).item(),
            "final error of the largest": middle[-1].item(),
            "stopped error of the largest": best[-1].item(),
        },
        note="test error against the teacher's outputs without noise; gradient flow from zero, 60 times up to 10^10; "
        "bands of the figure are the range over seeds",
    )


def sweep_of_random_features(run: Run, seed: int) -> tuple[list[float], list[float]]:
    """Final and best-stopped test error by size."""
    sizes = run.setting.features
    (x, y), (x_test, clean) = samples(run, seed, sizes, inputs=20, hidden=15)
    features = RandomFeatures(x.shape[1], max(sizes.hidden), generator=run.generator(seed + 1000)).to(run.device)
    times = torch.logspace(-2, 10, 60, dtype=torch.float64)
    sweep = size_sweep((x, y), (x_test, clean), sizes.hidden, times=times, features=features)
    run.progress(f"random features, seed {seed}")
    return sweep.final.tolist(), sweep.stopped.tolist()


def samples(run: Run, seed: int, sizes: Sizes, inputs: int, hidden: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Noisy training samples, and test samples without noise: of a ReLU teacher, or images with one-hot labels."""
    generator = run.generator(seed)
    if sizes.data == "teacher":
        teacher = TeacherStudent(inputs, hidden, snr=sizes.snr, generator=generator)
        x, y = teacher.sample(sizes.samples, generator)
        x_test, _ = teacher.sample(run.setting.tests, generator)
        parts = (x, y.unsqueeze(1)), (x_test, teacher(x_test).unsqueeze(1))
    else:
        train, test = run.data(sizes.data, "train"), run.data(sizes.data, "test")
        train, test = train.subset(sizes.samples, generator), test.subset(min(run.setting.tests, len(test)), generator)
        mean, scale = train.float().mean(), train.float().std()
        targets = [F.one_hot(part.labels, len(train.names)).double() for part in (train, test)]
        center, spread = targets[0].mean(0), targets[0].std()
        clean = [(target - center) / spread for target in targets]
        noise = torch.randn(clean[0].shape, dtype=torch.float64, generator=generator) / math.sqrt(sizes.snr)
        images = [((part.float() - mean) / scale).flatten(1).double() for part in (train, test)]
        parts = (images[0], clean[0] + noise), (images[1], clean[1])
    return tuple((a.to(run.device), b.to(run.device)) for a, b in parts)


@study.claim(
    "C7",
    "Two-layer networks overtrain worst with about as many parameters as samples; large first weights cost error",
    paper="Figure 11: two-layer ReLU students of a ReLU teacher, both layers trained",
    holds=at_least(1.5),
    unit="final minus best test error, at the peak over the largest network, medians over seeds",
    also={
        "parameters over training targets at the peak": between(0.55, 2.2),
        "best error from weights of scale 1.5 over that from 0.3": at_least(1.2),
    },
)
def two_layer_networks_overtrain(run: Run) -> Measurement:
    sizes = run.setting.trained
    parts = [samples(run, seed, sizes, inputs=10, hidden=5) for seed in run.seeds]
    best: dict[float, list[Tensor]] = {0.3: [], 1.5: []}
    lost: dict[float, list[Tensor]] = {0.3: [], 1.5: []}
    for scale in best:
        for hidden in sizes.hidden:
            last, least = train_two_layers(run, parts, hidden, scale)
            best[scale].append(least)
            lost[scale].append(last - least)
    medians = [values.quantile(0.5).item() for values in lost[0.3]]
    peak = max(range(len(medians)), key=medians.__getitem__)
    inputs, outputs = parts[0][0][0].shape[1], parts[0][0][1].shape[1]
    parameters = [hidden * (inputs + outputs) for hidden in sizes.hidden]
    at = sizes.hidden.index(run.setting.at)
    costs = [best[scale][at].quantile(0.5).item() for scale in (0.3, 1.5)]
    rows = [
        {"parameters": count, "error": values.quantile(0.5).item(), "low": values.min().item(),
         "high": values.max().item(), "scale": f"first weights × {scale}", "which": which}
        for which, table in (("final minus best", lost), ("best", best))
        for scale, found in table.items()
        for count, values in zip(parameters, found)
    ]  # fmt: skip
    run.figure(alt.hconcat(*(by_size(rows, which, sizes.samples * outputs) for which in ("final minus best", "best"))))
    also = {
        "parameters over training targets at the peak": parameters[peak] / (sizes.samples * outputs),
        "best error from weights of scale 1.5 over that from 0.3": costs[1] / costs[0],
        "hidden units at the peak": sizes.hidden[peak],
    }
    also |= {f"final minus best, {n} hidden units": value for n, value in zip(sizes.hidden, medians)}
    return Measurement(
        medians[peak] / medians[-1],
        seeds=len(run.seeds),
        also=also,
        note=f"gradient descent on 1/(2P) sum residual^2, rate {run.setting.lr}, {run.setting.steps} steps, no biases; "
        "at twice that rate the largest network diverges from the larger weights; bands are the range over seeds",
    )


def by_size(rows: list[dict], which: str, targets: int) -> Any:
    rows = only(rows, which=which)
    x = alt.X("parameters:Q").scale(type="log", nice=False)
    y = alt.Y("error:Q", title=f"{which} test error").scale(zero=True)
    color = alt.Color("scale:N", title=None)
    shade = alt.Fill("scale:N", legend=None)
    mark = chart([{"parameters": targets, "text": "samples"}], width=270)
    return alt.layer(
        chart(rows, width=270).mark_area(opacity=0.15).encode(x=x, y="low:Q", y2="high:Q", fill=shade),
        chart(rows, width=270).mark_line(point=True).encode(x=x, y=y, color=color),
        mark.mark_rule(strokeDash=[4, 4]).encode(x=x),
        mark.mark_text(align="left", dx=5, y=8).encode(x=x, text="text:N"),
    )


def train_two_layers(run: Run, parts: list, hidden: int, scale: float) -> tuple[Tensor, Tensor]:
    """Last and least test error over full-batch gradient descent, of one network for each seed, all side by side."""
    x, y, x_test, y_test = (
        torch.stack([part[i][j] for part in parts]).float() for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))
    )
    inputs, outputs, steps = x.shape[2], y.shape[2], run.setting.steps
    drawn = [run.generator(seed + 500) for seed in run.seeds]
    draw = [[torch.randn(*shape, generator=g) for shape in ((hidden, inputs), (outputs, hidden))] for g in drawn]
    W, V = (torch.stack(each).to(run.device) for each in zip(*draw))
    W, V = scale * W / math.sqrt(inputs), scale * V / math.sqrt(hidden)
    least = torch.full((len(parts),), math.inf)
    for step in range(steps + 1):
        if step % 25 == 0 or step == steps:
            found = (((x_test @ W.mT).relu() @ V.mT - y_test).square().mean((1, 2))).cpu()
            least = torch.minimum(least, found)
        if step % 500 == 0:
            run.progress(f"two layers of {hidden}, weights × {scale:g}", step, steps)
        h = (x @ W.mT).relu()
        residual = (h @ V.mT - y) * (run.setting.lr / x.shape[1])
        moved = (residual @ V * (h > 0)).mT @ x
        V -= residual.mT @ h
        W -= moved
    return found, least


@study.claim(
    "C8",
    "Deep linear networks end where shallow ones do; their modes rise as the equation of each mode by itself says",
    paper="Section on deep linear networks: tau du/dt = D u^(2 - 2/D) (s - lambda u)",
    kind="exact",
    holds=at_most(1e-3),
    unit="largest deviation of trained networks' modes, over the final values",
    also={"spread of final values over depths": at_most(1e-3)},
)
def deep_modes_rise_as_predicted(run: Run) -> Measurement:
    lam, end = np.array([1.5, 1.0, 0.7, 0.5]), np.array([2.0, 1.5, 1.2, 1.0])
    u0, lr, horizon, every = 0.1, 4e-4, 16.0, 1000
    times = np.arange(0, round(horizon / lr) + 1, every) * lr
    grid = 10 * np.linspace(0, 1, 61) ** 1.5
    finals, errors, rows = [], [], []
    for depth in (1, 2, 3):
        trained = train_aligned(depth, lam, end, u0, lr, round(horizon / lr), every)
        both = torch.tensor(np.append(times, grid))
        predicted = deep_linear_modes(torch.tensor(lam), torch.tensor(lam * end), u0, depth, both).numpy()
        errors.append(np.abs((trained - predicted[: len(times)]) / end).max())
        finals.append(trained[-1])
        title = f"{depth} layer{'s' if depth > 1 else ''}"
        rows += [
            {"t": t, "u": u, "mode": f"λ = {l:g}", "depth": title, "who": who}
            for who, at, table in (("theory", grid, predicted[len(times) :]), ("network", times[::2], trained[::2]))
            for t, line in zip(at.tolist(), table.tolist())
            for l, u in zip(lam, line)
            if t <= 10
        ]
    panels = []
    for title in ("1 layer", "2 layers", "3 layers"):
        x, y = alt.X("t:Q", title="time"), alt.Y("u:Q", title="strength of the mode").scale(domain=[0, 2.1])
        color = alt.Color("mode:N", title=None, sort=[f"λ = {l:g}" for l in lam])
        theory, dots = (only(rows, depth=title, who=who) for who in ("theory", "network"))
        lines = chart(theory, width=180).mark_line().encode(x=x, y=y, color=color)
        marks = chart(dots, width=180).mark_circle(size=30, opacity=1).encode(x=x, y=y, color=color)
        panels.append((lines + marks).properties(title=title))
    run.figure(alt.hconcat(*panels))
    spread = np.ptp(np.stack(finals), axis=0) / end
    return Measurement(
        float(max(errors)),
        also={"spread of final values over depths": float(spread.max())},
        note=f"full matrices, gradient descent of rate {lr:g} from layers aligned with the data",
    )


def train_aligned(depth: int, lam: np.ndarray, end: np.ndarray, u0: float, lr: float, steps: int, every: int):
    """Modes (records, modes) of a deep linear network of full matrices, along gradient descent step by step."""
    rng, n = np.random.default_rng(0), len(lam)
    # x x^T = Q lam Q^T, y x^T = R (lam end) Q^T: the layers turn between bases of their own.
    bases = [np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(depth + 1)]
    xx = bases[0] * lam @ bases[0].T
    yx = bases[-1] * (lam * end) @ bases[0].T
    layers = [u0 ** (1 / depth) * bases[i + 1] @ bases[i].T for i in range(depth)]
    records = []
    for step in range(steps + 1):
        product = layers[0]
        below = [None, product]
        for layer in layers[1:]:
            product = layer @ product
            below.append(product)
        if step % every == 0:
            records.append(np.diag(bases[-1].T @ product @ bases[0]))
        back = lr * (yx - product @ xx)
        for i in reversed(range(depth)):
            moved = back @ below[i].T if i else back
            back = layers[i].T @ back
            layers[i] = layers[i] + moved
    return np.array(records)
