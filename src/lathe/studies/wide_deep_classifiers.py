"""Do infinitely wide and deep networks become the three classifiers of the theory, one of them Bayes consistent?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import altair as alt
import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from lathe.studies.engine import Measurement, Run, Setting, Study, at_least, at_most, average, equals
from lathe.theory.wide_deep_classifiers import (
    DualActivation,
    OptimalActivation,
    SingularKernelClassifier,
    classify_depth_limit,
    koenigs,
    nngp,
    ntk,
    to_sphere,
    wide_deep_mlp,
)

study = Study(
    "wide-deep-classifiers",
    title="Wide and Deep Neural Networks Achieve Optimality for Classification",
    authors="Radhakrishnan, Belkin, Uhler",
    year=2022,
    arxiv="2204.14126",
    area="theory",
    module="lathe.theory.wide_deep_classifiers",
    summary="""Tells what great depth makes of a network with a given activation: a majority vote, the nearest
    neighbour, or a vote weighted by a singular kernel. The last is a classifier without training or tuning that is
    Bayes consistent when the activation fits the dimension of the data; it is here, with activations for any.""",
    example="""
import torch
from lathe.theory.wide_deep_classifiers import SingularKernelClassifier, classify_depth_limit

print(classify_depth_limit("relu"))                  # majority: depth destroys it; subtract the mean 0.398942
X = torch.rand(2000, 3)                              # any features; the map to the sphere scales them
y = (X[:, 0] > X[:, 1] * X[:, 2]).long()
classifier = SingularKernelClassifier(feature_map="append").fit(X[:1500], y[:1500])    # estimates the dimension
accuracy = (classifier.predict(X[1500:]) == y[1500:]).double().mean()
assert 2.5 < classifier.dimension_ < 3.5 and accuracy > 0.93
""",
    job="predict",
    scales={
        "smoke": Setting(
            seeds=2, mixtures=(1,), n=300, tests=300, points=40, queries=100, vote_points=16, vote_depth=800,
            depth_n=80, depth_tests=200, depths=(1, 3, 10, 40), width=128, draws=4, sampled_points=6,
            hidden=(2,), train_points=20, test_points=50, steps=100, nets=1,
        ),
        "desk": Setting(
            seeds=10, mixtures=(1,), n=1000, tests=1000, points=100, queries=500, vote_points=50, vote_depth=20_000,
            depth_n=300, depth_tests=1000, depths=(1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100), width=2048, draws=20,
            sampled_points=12, hidden=(2, 3), train_points=60, test_points=200, steps=2000, nets=3,
        ),
        "full": Setting(
            seeds=10, mixtures=(1, 2, 4, 8), n=10_000, tests=10_000, points=1000, queries=5000, vote_points=200,
            vote_depth=100_000, depth_n=1000, depth_tests=5000, depths=(1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100),
            width=8192, draws=50, sampled_points=30, hidden=(2, 3), train_points=60, test_points=500, steps=5000,
            nets=3,
        ),
    },
)  # fmt: skip

#: Dirichlet parameters of the two classes by the dimension of the simplex.
MIXTURES = {
    1: ((1, 2), (2, 1)),
    2: ((0.5, 0.5, 2.5), (2.5, 0.1, 0.5)),
    4: ((3, 1, 2, 1, 1), (1, 2, 2, 2, 3)),
    8: ((1, 2, 1, 2, 1, 1, 1, 1, 1), (1, 1, 1, 2, 3, 4, 2, 2, 1)),
}
PRIOR = 0.4


#: Of the descent that trains the networks of C6.
MOMENTUM = 0.9


@study.claim(
    "C1",
    "The explicit activations have a kernel with singularity |x - z|^-d, for every dimension d",
    paper="Corollary on the activations (h_1 + h_7)/sqrt 2 and 2^(-d/4) h_1 + sqrt(1 - 2^(1-d/2)) h_2 + 2^(-d/4) h_3",
    kind="exact",
    holds=at_most(1e-12),
    unit="largest |alpha - d|, d = 1..12",
    also={"relative error of the fitted exponent": at_most(0.01)},
)
def alpha_is_the_dimension(run: Run) -> Measurement:
    errors, slopes, rows = [], [], []
    gap = torch.logspace(-8, -4, 60, dtype=torch.float64)
    log_distance = 0.5 * (2 * gap).log()
    for d in range(1, 13):
        limit = classify_depth_limit(OptimalActivation(d))
        assert limit.alpha is not None
        errors.append(abs(limit.alpha - d))
        log_psi = koenigs(limit.dual).of_gap(gap, log=True)
        slope = float(np.polyfit(log_distance.numpy(), log_psi.numpy(), 1)[0])
        slopes.append(abs(-slope / d - 1))
        if d in (1, 2, 4, 8, 12):
            e = torch.logspace(-8, math.log10(0.5), 60, dtype=torch.float64)
            far = koenigs(limit.dual).of_gap(e, log=True) / math.log(10)
            rows += [
                {"distance": r, "psi": p, "d": str(d)}
                for r, p in zip((2 * e).sqrt().tolist(), far.tolist(), strict=True)
            ]
    run.figure(
        alt.Chart(alt.Data(values=rows), width="container", height=260)
        .mark_line()
        .encode(
            x=alt.X("distance:Q", title="distance |x − z|").scale(type="log"),
            y=alt.Y("psi:Q", title="log₁₀ of the singular kernel ψ"),
            color=alt.Color("d:N", title="dimension d", sort=["12", "8", "4", "2", "1"]),
        )
    )
    return Measurement(max(errors), also={"relative error of the fitted exponent": max(slopes)})


def dirichlet_mixture(d: int, n: int, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Points on the sphere, their labels (1 with probability 0.4), and what Bayes' rule makes of them."""
    first, second = (np.asarray(part, float) for part in MIXTURES[d])
    y = generator.random(n) < PRIOR
    P = np.where(y[:, None], generator.dirichlet(first, n), generator.dirichlet(second, n))
    P = np.clip(P, 1e-300, None)

    def log_density(a: np.ndarray) -> np.ndarray:
        return np.log(P) @ (a - 1) + math.lgamma(a.sum()) - sum(math.lgamma(each) for each in a)

    bayes = math.log(PRIOR) + log_density(first) > math.log(1 - PRIOR) + log_density(second)
    return to_sphere(torch.from_numpy(P), "normalise"), torch.from_numpy(y).long(), torch.from_numpy(bayes).long()


def classify_mixture(run: Run, seed: int, d: int) -> dict[str, float]:
    """Accuracies on one draw of the Dirichlet mixture, and the share of equal predictions of psi and Hilbert."""
    s, generator = run.setting, np.random.default_rng(seed)
    X, y, _ = dirichlet_mixture(d, s.n, generator)
    query, truth, bayes = dirichlet_mixture(d, s.tests, generator)
    found = {f"α = {k}d": SingularKernelClassifier(k * d).fit(X, y).predict(query) for k in (1, 2, 4)}
    predictions = {str(name): torch.as_tensor(labels) for name, labels in found.items()}
    signs = 2.0 * y.double() - 1
    votes = []
    for part in query.split(500):
        squared = torch.cdist(part, X, compute_mode="donot_use_mm_for_euclid_dist") ** 2
        votes.append((squared.clamp_min(1e-300) ** (-d / 2)) @ signs)
    predictions["Hilbert"] = (torch.cat(votes) > 0).long()
    predictions["Bayes"] = bayes
    nearest = KNeighborsClassifier(1).fit(X.numpy(), y.numpy())
    predictions["1-NN"] = torch.from_numpy(nearest.predict(query.numpy()))
    predictions["majority"] = torch.full_like(truth, int(y.double().mean() > 0.5))
    accuracy = {name: (labels == truth).double().mean().item() for name, labels in predictions.items()}
    same = (predictions["α = 1d"] == predictions["Hilbert"]).double().mean().item()
    return {**accuracy, "agreement": same}


@study.claim(
    "C2",
    "The singular-kernel classifier with alpha = d comes near the Bayes rule; the nearest neighbour does not",
    paper="Figure: Dirichlet mixtures; the infinitely deep classifier lies between 1-NN and the Bayes optimum",
    holds=at_least(0.45),
    unit="share of the way from 1-NN to Bayes",
    also={"alpha = d over alpha = 2d, points": at_least(2.0)},
)
def comes_near_bayes(run: Run) -> Measurement:
    shares: dict[int, list[float]] = {}
    leads, rows = [], []
    for d in run.setting.mixtures:
        runs = run.each_seed(classify_mixture, d=d)
        means = {name: statistics.fmean(each[name] for each in runs) for name in runs[0]}
        shares[d] = [(each["α = 1d"] - each["1-NN"]) / (means["Bayes"] - means["1-NN"]) for each in runs]
        leads.append(100 * statistics.fmean(each["α = 1d"] - each["α = 2d"] for each in runs))
        rows += [
            {"classifier": name, "accuracy": 100 * each[name], "d": f"d = {d}"}
            for each in runs
            for name in ("Bayes", "Hilbert", "α = 1d", "α = 2d", "α = 4d", "1-NN", "majority")
        ]
    base = alt.Chart().encode(
        x=alt.X("accuracy:Q", title="test accuracy, %").scale(zero=False),
        y=alt.Y(
            "classifier:N", title=None, sort=["Bayes", "Hilbert", "α = 1d", "α = 2d", "α = 4d", "1-NN", "majority"]
        ),
    )
    chart = alt.layer(
        base.mark_circle(size=30, opacity=0.35),
        base.mark_tick(thickness=3, size=18, color="black").encode(x=alt.X("mean(accuracy):Q")),
    )
    if len(run.setting.mixtures) == 1:
        run.figure(chart.properties(data=alt.Data(values=rows), width="container", height=240))
    else:
        run.figure(chart.properties(width=160, height=200).facet("d:N", data=alt.Data(values=rows), columns=2))
    worst = min(shares, key=lambda d: statistics.fmean(shares[d]))
    also = {"alpha = d over alpha = 2d, points": min(leads)}
    if len(run.setting.mixtures) == 1:
        also |= {f"accuracy of {name}": means[name] for name in ("Bayes", "Hilbert", "α = 1d", "α = 2d", "1-NN")}
    return average(shares[worst], also=also)


@study.claim(
    "C3",
    "With alpha = d it decides as the Hilbert estimate does, which weighs by 1 / |x - z|^d",
    paper="Theorem 2",
    holds=at_least(0.97),
    unit="share of test points with the same decision",
)
def decides_as_hilbert(run: Run) -> Measurement:
    samples = []
    for d in run.setting.mixtures:
        samples.append([each["agreement"] for each in run.each_seed(classify_mixture, d=d)])
    d, generator = run.setting.mixtures[0], np.random.default_rng(run.seeds[0])
    X, y, _ = dirichlet_mixture(d, run.setting.n, generator)
    query = dirichlet_mixture(d, 400, generator)[0]
    ours = torch.as_tensor(SingularKernelClassifier(d).fit(X, y).decision_function(query))
    weight = torch.cdist(query, X, compute_mode="donot_use_mm_for_euclid_dist") ** -float(d)
    hilbert = weight @ (2.0 * y.double() - 1) / weight.sum(1)
    rows = [{"ours": round(a, 4), "hilbert": round(b, 4)} for a, b in zip(ours.tolist(), hilbert.tolist())]
    run.figure(
        alt.Chart(alt.Data(values=rows), width="container", height=260)
        .mark_circle(size=30, opacity=0.5)
        .encode(
            x=alt.X("hilbert:Q", title="score of the Hilbert estimate"),
            y=alt.Y("ours:Q", title="score of the deep network"),
        )
    )
    return average(min(samples, key=statistics.fmean))


@study.claim(
    "C4",
    "Depth makes h_2, h_3 and centred cos the nearest neighbour, ReLU and sigmoid a vote, odd activations singular",
    paper="Theorem 1: the three classes",
    kind="exact",
    holds=equals(1.0),
    unit="smallest share of predictions that are the nearest neighbour's (deep h_2, h_3, centred cos)",
    also={
        "share of predictions that are the majority's (deep ReLU NTK, sigmoid)": equals(1.0),
        "odd activations found singular": equals(4),
    },
)
def three_classes(run: Run) -> Measurement:
    s, generator = run.setting, np.random.default_rng(0)

    def sphere(n: int, ambient: int) -> Tensor:
        return to_sphere(torch.from_numpy(np.abs(generator.standard_normal((n, ambient)))), "normalise")

    X, query = sphere(s.points, 5), sphere(s.queries, 5)
    y = torch.from_numpy(generator.integers(0, 2, s.points))
    nearest = torch.from_numpy(KNeighborsClassifier(1).fit(X.numpy(), y.numpy()).predict(query.numpy()))
    cases: dict[str, tuple[DualActivation, Tensor, Tensor, Tensor, str, tuple[int, ...]]] = {}
    for name, phi in {"h₂": hermite_2, "h₃": hermite_3, "centred cos": centred_cosine}.items():
        cases[name] = (DualActivation(phi), X, y, query, "nngp", (1, 2, 3, 5, 10, 20, 40))
    # The vote: three fifths are of one class.
    X2 = X[: s.vote_points]
    y2 = (torch.arange(s.vote_points) * 5 >= 2 * s.vote_points).long()
    deep = s.vote_depth
    vote = torch.ones(len(X2), dtype=torch.int64)
    cases["ReLU (NTK)"] = (DualActivation("relu"), X2, y2, query[: len(X2)], "ntk", (1, 10, 100, deep // 20, deep))
    cases["sigmoid"] = (DualActivation("sigmoid"), X2, y2, query[: len(X2)], "nngp", (1, 2, 3, 5, 10, 20, 40))
    rows, last = [], {}
    for done, (name, (dual, points, labels, queries, kernel, depths)) in enumerate(cases.items()):
        run.progress(name, done, len(cases))
        expected = nearest if len(queries) == len(query) else vote
        for depth in depths:
            classifier = SingularKernelClassifier(dual, depth=depth, kernel=kernel).fit(points, labels)  # type: ignore[arg-type]
            same = (torch.as_tensor(classifier.predict(queries)) == expected).double().mean().item()
            rows.append({"activation": name, "depth": depth, "same": 100 * same})
            last[name] = same
    run.figure(
        alt.Chart(alt.Data(values=rows), width="container", height=260)
        .mark_line(point=True)
        .encode(
            x=alt.X("depth:Q", title="hidden layers").scale(type="log"),
            y=alt.Y("same:Q", title="predictions that are the limit's, %").scale(zero=False),
            color=alt.Color("activation:N", sort=list(cases)),
        )
    )
    odd: list[str | nn.Module] = ["erf", "tanh", "sin", OptimalActivation(2)]
    return Measurement(
        min(last[name] for name in ("h₂", "h₃", "centred cos")),
        also={
            "share of predictions that are the majority's (deep ReLU NTK, sigmoid)": min(
                last["ReLU (NTK)"], last["sigmoid"]
            ),
            "odd activations found singular": sum(classify_depth_limit(phi).kind == "singular" for phi in odd),
        },
    )


def hermite_2(z: Tensor) -> Tensor:
    return z * z - 1


def hermite_3(z: Tensor) -> Tensor:
    return z**3 - 3 * z


def centred_cosine(z: Tensor) -> Tensor:
    return torch.cos(z) - math.exp(-0.5)


@study.claim(
    "C5",
    "Depth helps classification and hurts regression",
    paper="Section on regression: the deep interpolant is zero off the data, only its sign carries information",
    holds=at_most(0.05),
    unit="R² of the interpolant at the greatest depth",
    also={
        "largest fall of accuracy with depth, in units of its noise (2 s.e.)": at_most(1.0),
        "accuracy, greatest depth less depth 1": at_least(0.0),
    },
)
def depth_helps_and_hurts(run: Run) -> Measurement:
    depths = run.setting.depths
    found = {name: run.each_seed(fit_depths, activation=name) for name in ("optimal", "centred ReLU")}
    rows, falls = [], {}
    for name, runs in found.items():
        accuracy = np.array([[each[depth][0] for depth in depths] for each in runs])
        r2 = np.array([[each[depth][1] for depth in depths] for each in runs])
        falls[name] = largest_fall(accuracy)
        for what, values in (("accuracy", accuracy), ("R²", r2)):
            rows += [
                {"depth": depth, "value": v, "what": what, "activation": name}
                for depth, v in zip(depths, values.mean(0).tolist())
            ]
    run.figure(
        alt.Chart(alt.Data(values=rows), width="container", height=260)
        .mark_line(point=True)
        .encode(
            x=alt.X("depth:Q", title="hidden layers").scale(type="log"),
            y=alt.Y("value:Q", title="accuracy, and R² of regression"),
            color=alt.Color("activation:N"),
            strokeDash=alt.StrokeDash("what:N", title=None),
        )
    )
    first, last = ([each[depth] for each in found["optimal"]] for depth in (depths[0], depths[-1]))
    relu = found["centred ReLU"]
    return average(
        [each[1] for each in last],
        also={
            "largest fall of accuracy with depth, in units of its noise (2 s.e.)": falls["optimal"],
            "accuracy, greatest depth less depth 1": statistics.fmean(
                b[0] - a[0] for a, b in zip(first, last, strict=True)
            ),
            "the fall with centred ReLU": falls["centred ReLU"],
            "the gain with centred ReLU": statistics.fmean(each[depths[-1]][0] - each[depths[0]][0] for each in relu),
        },
        note="judged with the optimal polynomial of C2. Its shallow kernels are polynomials of low degree: their "
        "matrix has a lower rank than there are points, which smooths over label noise until, at about 5 layers, it "
        "begins to interpolate; accuracy falls to there and rises from there on. Tried: NTK in place of NNGP, erf, "
        "labels without noise, d = 2 and 4, digits; all dip, and erf on digits (alpha far below d) falls without "
        "recovering. Centred ReLU, whose kernel interpolates from the first layer on, has no dip (beside it)",
    )


def fit_depths(run: Run, seed: int, activation: str) -> dict[int, tuple[float, float]]:
    """Test accuracy, and R^2 of regression on a smooth function, of the NNGP interpolant at each depth."""
    s, generator = run.setting, np.random.default_rng(seed)
    X, y, _ = dirichlet_mixture(1, s.depth_n, generator)
    query, truth, _ = dirichlet_mixture(1, s.depth_tests, generator)
    dual = DualActivation("relu", centre=True) if activation == "centred ReLU" else DualActivation(OptimalActivation(1))
    target, wanted = smooth(X), smooth(query)
    mean = target.mean()
    found = {}
    for depth in s.depths:
        run.progress(f"{activation}, depth {depth}")
        classifier = SingularKernelClassifier(dual, depth=depth).fit(X, y)
        accuracy = (torch.as_tensor(classifier.predict(query)) == truth).double().mean().item()
        # gelsd: shallow kernels have a lower rank than there are points
        weights = torch.linalg.lstsq(nngp(X, None, dual, depth), (target - mean).unsqueeze(1), driver="gelsd").solution
        predicted = mean + (nngp(query, X, dual, depth) @ weights)[:, 0]
        residual, total = (wanted - predicted).square().sum(), (wanted - wanted.mean()).square().sum()
        found[depth] = (accuracy, 1 - (residual / total).item())
    return found


def smooth(X: Tensor) -> Tensor:
    return torch.sin(4 * X[:, 0]) + X[:, 1]


def largest_fall(accuracy: np.ndarray) -> float:
    """The largest fall from any depth to a greater one, over twice its standard error over seeds (rows)."""
    seeds, count = accuracy.shape
    worst = 0.0
    for i in range(count):
        for j in range(i + 1, count):
            fall = accuracy[:, i] - accuracy[:, j]
            error = max(fall.std(ddof=1) / math.sqrt(seeds), 1e-3)
            worst = max(worst, fall.mean() / (2 * error))
    return float(worst)


@study.claim(
    "C6",
    "Wide networks of a few layers follow the theory: their NTK on average, and what they predict once trained",
    paper="ours: sampled networks of width 2048 with the optimal activation for d = 2",
    holds=at_least(0.90),
    unit="share of test points where trained network and kernel predictor agree, worst depth",
    also={"deviation of the mean NTK, in units of 4 standard errors + 2%": at_most(1.0)},
)
def networks_follow(run: Run) -> Measurement:
    rows, deviations = [], []
    x = to_sphere(torch.from_numpy(np.abs(np.random.default_rng(7).standard_normal((run.setting.sampled_points, 3)))))
    pairs = torch.triu_indices(len(x), len(x)).unbind()
    for depth in run.setting.hidden:
        theory = ntk(x, None, OptimalActivation(2), depth)[pairs]
        samples = torch.cat(
            [torch.tensor(each, dtype=torch.float64) for each in run.each_seed(sample_ntk, depth=depth)]
        )
        mean, error = samples.mean(0), samples.std(0) / math.sqrt(len(samples))
        deviations.append(((mean - theory).abs() / (4 * error + 0.02 * theory.abs())).max().item())
        rows += [
            {"theory": t, "mean": m, "low": m - 2 * e, "high": m + 2 * e, "depth": f"{depth} hidden layers"}
            for t, m, e in zip(theory.tolist(), mean.tolist(), error.tolist(), strict=True)
        ]
    runs = [
        [each for each in run.each_seed(train_net, depth=depth) if each is not None] for depth in run.setting.hidden
    ]
    agreements = [[each["agreement"] for each in of_depth] for of_depth in runs]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("theory:Q", title="NTK of the infinitely wide network"), color=alt.Color("depth:N", title=None)
    )
    run.figure(
        alt.layer(
            base.mark_rule().encode(y=alt.Y("low:Q", title="mean of drawn networks, ± 2 s.e."), y2="high:Q"),
            base.mark_circle(size=40).encode(y="mean:Q"),
        ).properties(width="container", height=260)
    )
    return average(
        min(agreements, key=statistics.fmean),
        also={
            "deviation of the mean NTK, in units of 4 standard errors + 2%": max(deviations),
            "largest training loss": max(each["loss"] for of_depth in runs for each in of_depth),
            "agreement with the kernel's own descent, as many steps": min(
                statistics.fmean(each["descent"] for each in of_depth) for of_depth in runs
            ),
        },
        note="the function at initialisation is subtracted from the trained one. The kernel matrix is singular to "
        "rounding (condition number 1e16): its interpolant rests on directions that no descent reaches, and the "
        "network's loss stays above zero; the same descent of the kernel predictor is the well-posed comparison",
    )


def sample_ntk(run: Run, seed: int, depth: int) -> list[list[float]]:
    """NTK entries of drawn networks: sums over layers of products of derivatives times products of inputs."""
    s = run.setting
    x = to_sphere(torch.from_numpy(np.abs(np.random.default_rng(7).standard_normal((s.sampled_points, 3))))).float()
    pairs = torch.triu_indices(len(x), len(x)).unbind()
    generator, found = run.generator(seed), []
    for _ in range(max(1, s.draws // len(run.seeds))):
        net = wide_deep_mlp(x.shape[1], 1, OptimalActivation(2), s.width, depth, generator=generator)
        K = torch.zeros(len(x), len(x), dtype=torch.float64)
        layers: list[tuple[Tensor, Tensor]] = []
        h = x
        for layer in net:
            a, h = h, layer(h)
            if list(layer.parameters()):
                layers.append((a, h))
        for (a, _), delta in zip(layers, torch.autograd.grad(h.sum(), [z for _, z in layers]), strict=True):
            # All but the first layer divide by the root of their width.
            scale = 1.0 if a is x else 1 / s.width
            K += (delta @ delta.mT).double() * (a @ a.mT).double() * scale
        found.append(K[pairs].tolist())
    return found


def train_net(run: Run, seed: int, depth: int) -> dict[str, float] | None:
    """One network trained to (nearly) zero loss by gradient descent with momentum, against its kernel's interpolant."""
    s = run.setting
    if run.seeds.index(seed) >= s.nets:
        return None
    generator = np.random.default_rng(100 + seed)
    X, y, _ = dirichlet_mixture(2, s.train_points, generator)
    query = dirichlet_mixture(2, s.test_points, generator)[0]
    signs = 2.0 * y.double() - 1
    K = ntk(X, None, OptimalActivation(2), depth)
    f = ntk(query, X, OptimalActivation(2), depth) @ torch.linalg.solve(K, signs)
    net = wide_deep_mlp(3, 1, OptimalActivation(2), s.width, depth, generator=run.generator(seed))
    rate = 0.5 / torch.linalg.eigvalsh(K)[-1].item()
    loss, steps, learnt = descend(run, net, X.float(), signs.float(), rate, s.steps)
    trained = learnt(query.float())
    # The same descent of the linear model with the kernel K, whose weights combine the gradients of the samples.
    combination, velocity = torch.zeros_like(signs), torch.zeros_like(signs)
    for _ in range(steps):
        velocity = MOMENTUM * velocity + K @ combination - signs
        combination = combination - rate * velocity
    descent = ntk(query, X, OptimalActivation(2), depth) @ combination
    return {
        "agreement": ((trained > 0) == (f > 0)).double().mean().item(),
        "descent": ((trained > 0) == (descent > 0)).double().mean().item(),
        "loss": loss,
    }


def descend(
    run: Run, net: nn.Sequential, X: Tensor, signs: Tensor, rate: float, steps: int
) -> tuple[float, int, Callable[[Tensor], Tensor]]:
    """Trains on the squared loss; the mean squared error, the steps taken, and what was learnt beyond the start."""
    import copy

    start = copy.deepcopy(net)

    def learnt(x: Tensor) -> Tensor:
        with torch.no_grad():
            return (net(x) - start(x))[:, 0]

    with torch.no_grad():
        goal = signs + start(X)[:, 0]
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=MOMENTUM)
    error, step = math.inf, 0
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        difference = net(X)[:, 0] - goal
        (0.5 * difference.square().sum()).backward()
        optimizer.step()
        error = difference.square().mean().item()
        if error < 1e-4:
            break
        if step % 50 == 0:
            run.progress(f"training, mean squared error {error:.1e}", step, steps)
    return error, step, learnt
