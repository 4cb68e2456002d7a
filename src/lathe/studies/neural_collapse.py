"""Do classifiers end in the geometry that class counts and penalties prescribe, and are small classes given up?"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lathe.studies.engine import Measurement, Run, Setting, Study, at_least, at_most, average, equals
from lathe.theory.neural_collapse import (
    GOF,
    DeepLinearHead,
    NCReport,
    NeuralCollapse,
    UFMLoss,
    UnconstrainedFeatures,
    cross_entropy_etf,
    gof,
    neural_collapse,
)


class Network(NamedTuple):
    """A network of C2 and C4: what makes the features, their width, and the linear layers on top."""

    kind: str
    width: int
    depth: int


#: Class sizes of the trained networks over the first: the paper's 500, 500, 400, ...
SHARES = (1.0, 1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2)
RARE = (20, 10, 5, 2)
#: Of starts. To keep a class and to give it up are both local minima: small starts find the one, larger ones the other.
SIZES = (0.3, 0.6)

study = Study(
    "neural-collapse",
    title="Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data",
    authors="Dang, Tran, Osher, Tran-The, Ho, Nguyen",
    year=2023,
    arxiv="2301.00437",
    area="theory",
    module="lathe.theory.neural_collapse",
    summary="""Measures on any trained classifier how far its last layers have collapsed onto class means (NC1 to NC4).
    Predicts from class counts and penalties where they end: how long each class's classifier and features are, and at
    which penalty a rare class is given up.""",
    example="""
import torch
from torch import nn
from lathe.theory.neural_collapse import gof, max_weight_decay, neural_collapse

counts = [200, 100, 50, 5]                                                 # a long-tailed training set
print(max_weight_decay(counts, depth=2))                                   # a class is given up beyond its penalty
assert gof(counts, 5e-3, 5e-3, depth=2).collapsed.tolist() == [False, False, False, True]
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))       # any classifier
batches = [(torch.randn(355, 8), torch.arange(4).repeat_interleave(torch.tensor(counts)))]
report = neural_collapse(model, batches, weight_decay=1e-3, feature_decay=1e-3)
assert report.nc1 > 1 and report.reference == "gof"                        # untrained: report.plot() shows how far off
""",
    job="read",
    scales={
        "smoke": Setting(
            seeds=1, counts=((40, 20, 10, 5),), penalties=(5e-3, 2e-2), depths=(1, 2), starts=2,
            data="digits", largest=40, balanced=20, networks=(Network("mlp", 32, 1),), penalty=1e-3, lr=1e-3,
            steps=20, schedule="cosine", frame_counts=(10,), frame_depths=(1, 3), deep=(2,),
        ),
        "desk": Setting(
            counts=((200, 100, 50, 50), (40, 20, 10, 5)), penalties=(5e-4, 2e-3, 5e-3, 2e-2), depths=(1, 2, 3),
            starts=3, data="digits", largest=100, balanced=60, networks=(Network("mlp", 128, 1),), penalty=1e-3,
            lr=1e-3, steps=2500, schedule="cosine", frame_counts=(10, 30, 100), frame_depths=(1, 3), deep=(2, 3),
        ),
        "full": Setting(
            counts=((200, 100, 50, 50), (40, 20, 10, 5)), penalties=(5e-4, 2e-3, 5e-3, 2e-2), depths=(1, 2, 3),
            starts=3, data="cifar10", largest=500, balanced=300,
            networks=(*(Network("resnet18", 512, M) for M in (1, 3, 6)), Network("mlp", 2048, 1)),
            penalty=1e-5, lr=1e-4, steps=12_000, schedule="step", frame_counts=(10, 30, 100), frame_depths=(1, 3),
            deep=(2, 3),
        ),
    },
)  # fmt: skip


# --- free features ----------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Where a descent ended."""

    loss: float
    head: DeepLinearHead
    features: Tensor
    labels: Tensor


def best_of(
    run: Run,
    starts: int,
    counts: Sequence[int],
    penalty: float,
    depth: int,
    width: int,
    stds: Sequence[float] = (0.3,),
    **options: Any,
) -> Found:
    """The lowest of several descents of the unconstrained feature model, from starts of these sizes in turn."""
    found = []
    for start in range(starts):
        run.progress(f"counts {tuple(counts)}, {depth} layers, penalty {penalty:g}", start, starts)
        std = stds[start % len(stds)]
        found.append(descend(counts, penalty, depth, width, run.generator(start), std=std, **options))
    return min(found, key=lambda each: each.loss)


def descend(
    counts: Sequence[int],
    penalty: float,
    depth: int,
    width: int,
    generator: torch.Generator,
    loss: str = "mse",
    bias: bool = False,
    std: float = 0.3,
) -> Found:
    """L-BFGS (line search with the strong Wolfe conditions) from N(0, std^2) to a gradient below 1e-10, in float64."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    features = UnconstrainedFeatures(len(labels), width, dtype=torch.float64)
    head = DeepLinearHead(width, len(counts), depth, bias, dtype=torch.float64)
    criterion = UFMLoss(penalty, penalty, loss)  # type: ignore[arg-type]
    parameters = [*features.parameters(), *head.parameters()]
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, std, generator=generator)

    def value_and_gradient(vector: Any) -> tuple[float, Any]:
        vector_to_parameters(torch.from_numpy(vector), parameters)
        h = features()
        value = criterion(head(h), labels, h, head)
        gradient = torch.autograd.grad(value, parameters)
        return value.item(), parameters_to_vector(gradient).numpy()

    start = parameters_to_vector(parameters).detach().numpy().copy()
    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 0.0, "gtol": 1e-10, "maxcor": 30, "maxls": 50}
    done = minimize(value_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    vector_to_parameters(torch.from_numpy(done.x), parameters)
    return Found(float(done.fun), head, features().detach(), labels)


def singular_values(head: DeepLinearHead) -> Tensor:
    return torch.linalg.svdvals(head.product().detach())


@study.claim(
    "C1",
    "The minimum of the penalised problem is as the closed form says, for equal and unequal classes and several layers",
    paper="Theorems on balanced and imbalanced data (squared error, no bias)",
    kind="exact",
    holds=at_most(1e-10),
    unit="largest difference of the loss, best descent against closed form",
    also={
        "diagonal of the classifier's products, relative": at_most(1e-5),
        "beside the diagonal, relative": at_most(1e-5),
    },
)
def closed_form_is_the_minimum(run: Run) -> Measurement:
    s = run.setting
    rows, off_loss, off_diagonal, beside = [], 0.0, 0.0, 0.0
    for counts in s.counts:
        for depth in s.depths:
            for penalty in s.penalties:
                theory = gof(counts, penalty, penalty, depth=depth)
                found = best_of(run, 2 * s.starts, counts, penalty, depth, width=16, stds=SIZES)
                W = found.head.product().detach()
                measured, expected = W @ W.mT, theory.classifier_gram.diagonal()
                largest = expected.max().item() or 1.0  # nothing survives the strongest penalties
                off_loss = max(off_loss, abs(found.loss - theory.loss))
                off_diagonal = max(off_diagonal, ((measured.diagonal() - expected).abs().max() / largest).item())
                beside = max(beside, ((measured - torch.diag(measured.diagonal())).abs().max() / largest).item())
                rows += [
                    {"closed form": a, "descent": b, "layers": str(depth), "penalty": f"{penalty:g}"}
                    for a, b in zip(expected.sqrt().tolist(), measured.diagonal().sqrt().tolist())
                    if a > 0
                ]
    limits = [min(row["closed form"] for row in rows) / 1.3, max(row["closed form"] for row in rows) * 1.3]
    log = alt.Scale(type="log", domain=limits, nice=False)
    line = alt.Chart(alt.Data(values=[{"x": limit} for limit in limits])).mark_line(color="gray", strokeDash=[4, 4])
    dots = alt.Chart(alt.Data(values=rows)).mark_point(size=50, filled=True, opacity=0.7)
    run.figure(
        alt.layer(
            line.encode(x="x:Q", y="x:Q"),
            dots.encode(
                x=alt.X("closed form:Q", title="length of a class's classifier, closed form", scale=log),
                y=alt.Y("descent:Q", title="length after descent", scale=log),
                color=alt.Color("layers:N", title="layers"),
                shape=alt.Shape("penalty:N", title="penalty"),
            ),
        ).properties(width="container", height=300)
    )
    return Measurement(
        off_loss,
        seeds=2 * s.starts,
        also={
            "diagonal of the classifier's products, relative": off_diagonal,
            "beside the diagonal, relative": beside,
            "problems": len(s.counts) * len(s.depths) * len(s.penalties),
        },
        note=f"best of {s.starts} descents from N(0, 0.3²), as planned, and {s.starts} from N(0, 0.6²): small starts "
        "alone end in the local minimum that gives up a class near its threshold (3 missed one of 24 problems); "
        "relative to the largest entry, or to 1 where every class is given up",
    )


@study.claim(
    "C3",
    "A class is given up exactly where its load b / n reaches the threshold",
    paper="Theorems on imbalanced data: minority collapse for M >= 2",
    kind="exact",
    holds=equals(0),
    unit="penalties at which the rank differs from the number of classes below the threshold",
)
def small_classes_are_given_up_at_the_threshold(run: Run) -> Measurement:
    penalties, wrong, ranks, dots = (0.005, 0.010, 0.013, 0.016, 0.02, 0.03, 0.05), 0, [], []
    for penalty in penalties:
        theory = gof(RARE, penalty, penalty, depth=2)
        found = best_of(run, 4, RARE, penalty, 2, width=8, stds=SIZES)
        rank = int((singular_values(found.head) > 1e-3).sum())
        ranks.append(rank)
        wrong += rank != int((theory.load < theory.threshold).sum())
        lengths = found.head.product().detach().norm(dim=1).tolist()
        dots += [
            {"penalty": penalty, "length": value, "class": f"{n} samples", "who": "descent"}
            for n, value in zip(RARE, lengths)
        ]
    lines = [
        {"penalty": penalty, "length": value, "class": f"{n} samples"}
        for penalty in torch.linspace(0.004, 0.056, 105).tolist()
        for n, value in zip(RARE, gof(RARE, penalty, penalty, depth=2).classifier_norms.tolist())
    ]
    shared = {
        "x": alt.X("penalty:Q", title="penalty on every factor").scale(zero=False),
        "y": alt.Y("length:Q", title="length of a class's classifier"),
        "color": alt.Color("class:N", title=None, sort=[f"{n} samples" for n in RARE]),
    }
    run.figure(
        alt.layer(
            alt.Chart(alt.Data(values=lines)).mark_line(opacity=0.6).encode(**shared),
            alt.Chart(alt.Data(values=dots)).mark_point(filled=True, size=60, opacity=1).encode(**shared),
        ).properties(width="container", height=280)
    )
    told = ", ".join(f"{rank} at {penalty:g}" for rank, penalty in zip(ranks, penalties))
    note = f"lines: theory; dots: best of 4 descents, two from N(0, 0.3²) and two from N(0, 0.6²); ranks {told}"
    return Measurement(float(wrong), seeds=4, note=note)


@study.claim(
    "C5",
    "Features of too few dimensions keep the largest classes only",
    paper="Theorem on imbalanced data, M = 1, R = min(K, d) < K",
    kind="exact",
    holds=at_most(1e-6),
    unit="largest difference of an entry of the classifier's products",
)
def bottleneck_keeps_the_largest(run: Run) -> Measurement:
    theory = gof(RARE, 1e-3, 1e-3, width=2).classifier_gram
    W = best_of(run, 4, RARE, 1e-3, 1, width=2).head.product().detach()
    diagonal = (W @ W.mT).diagonal()
    rows = [
        {"class": f"{n} samples", "square": value, "who": who}
        for who, values in (("closed form", theory.diagonal()), ("descent", diagonal))
        for n, value in zip(RARE, values.tolist())
    ]
    run.figure(
        alt.Chart(alt.Data(values=rows), width="container", height=240)
        .mark_bar()
        .encode(
            x=alt.X("class:N", title=None, sort=[f"{n} samples" for n in RARE]).axis(labelAngle=0),
            xOffset="who:N",
            y=alt.Y("square:Q", title="squared length of a class's classifier"),
            color=alt.Color("who:N", title=None),
        )
    )
    names = ("largest class", "second", "third", "smallest")
    return Measurement(
        (W @ W.mT - theory).abs().max().item(), seeds=4, also=dict(zip(names, diagonal.tolist())), note="2 dimensions"
    )


@study.claim(
    "C6",
    "Under cross-entropy and one linear layer the minimum is the simplex, at the predicted loss",
    paper="Theorem on cross-entropy, M = 1",
    kind="exact",
    holds=at_most(1e-6),
    unit="largest difference of the loss",
    also={"spread of the K - 1 singular values, relative": at_most(1e-4), "wrong ranks": equals(0)},
)
def cross_entropy_ends_in_the_simplex(run: Run) -> Measurement:
    off, spread, wrong, spectra = 0.0, 0.0, 0, {}
    for K in (4, 10):
        found = best_of(run, 4, [10] * K, 1e-3, 1, width=K + 2, loss="cross_entropy")
        values = singular_values(found.head)
        off = max(off, abs(found.loss - cross_entropy_etf(K, 10, 1e-3, 1e-3).loss))
        spread = max(spread, (1 - values[K - 2] / values[0]).item())
        wrong += int((values > 1e-3 * values[0]).sum()) != K - 1
        spectra[f"{K} classes"] = values
    run.figure(spectrum(spectra, "classes"))
    also = {"spread of the K - 1 singular values, relative": spread, "wrong ranks": wrong}
    return Measurement(off, seeds=4, also=also)


@study.claim(
    "C7",
    "Under cross-entropy and two or more layers, solutions of lower rank beat the simplex (contradicts the paper)",
    paper="Theorem on cross-entropy claims the simplex for every M; see Garrod and Keating, arXiv 2410.23169",
    kind="exact",
    holds=at_most(0.95),
    unit="largest ratio of the best loss found to the simplex's",
    also={"largest rank found": at_most(8)},
)
def lower_rank_beats_the_simplex(run: Run) -> Measurement:
    ratios, ranks, spectra = {}, [], {}
    for depth in run.setting.deep:
        found = best_of(run, 3, [10] * 10, 1e-3, depth, width=12, loss="cross_entropy")
        values = singular_values(found.head)
        gap, loss = cross_entropy_etf(10, 10, 1e-3, 1e-3, depth=depth)
        ratios[depth] = found.loss / loss
        ranks.append(int((values > 1e-3 * values[0]).sum()))
        spectra[f"{depth} layers, found"] = values
        stretched = (gap * math.sqrt(10)) ** (depth / (depth + 1))  # every factor carries the same part of the logits
        spectra[f"{depth} layers, simplex"] = torch.tensor([stretched] * 9 + [0.0])
    run.figure(spectrum(spectra, None))
    also = {"largest rank found": float(max(ranks))}
    also |= {f"{depth} layers: ratio": ratio for depth, ratio in ratios.items()}
    note = f"10 classes of 10 samples, penalties 1e-3; ranks found {', '.join(map(str, ranks))}, the simplex has 9"
    return Measurement(max(ratios.values()), seeds=3, also=also, note=note)


def spectrum(spectra: dict[str, Tensor], title: str | None) -> alt.Chart:
    """Singular values of classifiers, each spectrum by its place."""
    rows = [
        {"place": place, "value": value, "of": name}
        for name, values in spectra.items()
        for place, value in enumerate(values.tolist(), 1)
    ]
    return (
        alt.Chart(alt.Data(values=rows), width="container", height=240)
        .mark_line(point=True)
        .encode(
            x=alt.X("place:O", title="singular value").axis(labelAngle=0),
            y=alt.Y("value:Q", title="size"),
            color=alt.Color("of:N", title=title),
        )
    )


# --- trained networks -------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride > 1
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(inside + self.shortcut(x))


def backbone(network: Network, shape: torch.Size) -> nn.Module:
    """Images of `shape` to features, the last step linear, so that they may take any sign."""
    width = network.width
    if network.kind == "mlp":
        sizes = [math.prod(shape), width, width]
        hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, width))
    channels = [width // 8, width // 8, width // 4, width // 2, width]
    blocks: list[nn.Module] = []
    for stage, (inputs, outputs) in enumerate(itertools.pairwise(channels)):
        blocks += [ResidualBlock(inputs, outputs, 2 if stage else 1), ResidualBlock(outputs, outputs, 1)]
    stem = [nn.Conv2d(shape[0], channels[0], 3, 1, 1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, width))


class Trained(NamedTuple):
    """A network after training: metrics against its own frame and against others, and their course."""

    right: NCReport
    others: dict[str, NCReport]
    loss: float
    course: list[dict[str, float]]


def train(run: Run, seed: int, network: Network, sizes: Sequence[int], bias: bool) -> Trained:
    """Full-batch Adam on squared error with penalties on the head's factors and the features, as the theory has it."""
    s = run.setting
    images = run.data(s.data, "train")
    order = torch.randperm(len(images), generator=run.generator(seed))
    labels = images.labels[order]
    chosen = torch.cat([(labels == k).nonzero()[:n, 0] for k, n in enumerate(sizes)])
    x, y = images.float()[order[chosen]].to(run.device), labels[chosen].to(run.device)
    head = DeepLinearHead(network.width, len(sizes), network.depth, bias)
    model = nn.Sequential(backbone(network, x.shape[1:]), head).to(run.device)
    criterion, lr = UFMLoss(s.penalty, s.penalty), s.lr
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda t: (1 + math.cos(math.pi * t / s.steps)) / 2 if s.schedule == "cosine" else 0.1 ** (2 * t // s.steps),
    )
    checkpoints = {round(s.steps * (k / 16) ** 2) for k in range(16)}
    course = []
    decays = {"weight_decay": s.penalty, "feature_decay": s.penalty}
    for step in range(s.steps):
        h = model[0](x)
        loss = criterion(head(h), y, h, head)
        if step in checkpoints:
            run.progress(f"{network.kind}, {network.depth} linear layers", step, s.steps)
            now = collapse_of(h, y, head, **decays)
            against_plain = collapse_of(h, y, head, reference="orthogonal")
            course.append(
                {"step": step, "NC1": now.nc1, "NC2 to the prediction": now.nc2_w, "NC3": now.nc3}
                | {"NC2 to equal lengths": against_plain.nc2_w}
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    batches = [(a, b) for a, b in zip(x.split(500), y.split(500))]
    others = {
        name: neural_collapse(model, batches, layer="1", reference=name, nc4=False) for name in ("etf", "orthogonal")
    }
    return Trained(neural_collapse(model, batches, layer="1", **decays), others, loss.item(), course)


def collapse_of(h: Tensor, y: Tensor, head: nn.Module, **options: Any) -> NCReport:
    """Metrics of features at hand, in training mode."""
    collapse = NeuralCollapse(int(y.max()) + 1)
    collapse.update(h.detach(), y)
    return collapse.compute(head, **options)


def told(network: Network) -> str:
    return f"{network.kind}, {network.depth} linear"


@study.claim(
    "C2",
    "Networks trained on unequal classes approach the predicted general orthogonal frame",
    paper="Figures on imbalanced data: NC1, NC2, NC3 fall by orders of magnitude (MLP, ResNet18, VGG16 on CIFAR-10)",
    holds=at_most(1e-3),
    unit="NC1, largest over networks",
    also={"NC2 to the predicted frame": at_most(0.01), "over NC2 to a frame of equal lengths": at_most(0.1)},
)
def networks_approach_the_frame(run: Run) -> Measurement:
    s = run.setting
    sizes = [round(s.largest * share) for share in SHARES]
    runs = {network: run.each_seed(train, network=network, sizes=sizes, bias=False) for network in s.networks}
    worst = max(runs, key=lambda network: statistics.fmean(each.right.nc1 for each in runs[network]))
    nc2 = {n: statistics.fmean(each.right.nc2_w for each in trained) for n, trained in runs.items()}
    plain = {n: statistics.fmean(each.others["orthogonal"].nc2_w for each in trained) for n, trained in runs.items()}
    first = runs[s.networks[0]]
    theory = first[0].right.prediction
    assert theory is not None
    run.figure(courses_and_lengths(first, theory, sizes))
    squares = torch.stack([each.right.classifier_norms.square() for each in first])
    also = {
        "NC2 to the predicted frame": max(nc2.values()),
        "over NC2 to a frame of equal lengths": max(nc2[n] / plain[n] for n in runs),
        "NC2 to a frame of equal lengths": min(plain.values()),
        "NC2 of the class means": statistics.fmean(each.right.nc2_h for each in first),
        "NC3": statistics.fmean(each.right.nc3 for each in first),
        "NC4": statistics.fmean(each.right.nc4 for each in first),
        "NC1 at the start": statistics.fmean(each.course[0]["NC1"] for each in first),
        "loss over its lower bound": statistics.fmean(each.loss for each in first) / theory.loss,
        "squared lengths, largest relative error": (squares / theory.classifier_norms.square() - 1).abs().max().item(),
    }
    note = f"{told(worst)} layer(s) on {s.data}, {sizes[0]} to {sizes[-1]} images a class, penalties {s.penalty:g}"
    return average([each.right.nc1 for each in runs[worst]], also=also, note=note)


def courses_and_lengths(trained: Sequence[Trained], theory: GOF, sizes: Sequence[int]) -> alt.HConcatChart:
    """Metrics over training, and lengths at its end beside the prediction."""
    names = [name for name in trained[0].course[0] if name != "step"]
    course = [
        {"step": points[0]["step"], "distance": statistics.geometric_mean([p[name] for p in points]), "metric": name}
        for points in zip(*(each.course[1:] for each in trained))  # the head starts as an exact orthogonal frame
        for name in names
    ]
    left = (
        alt.Chart(alt.Data(values=course), width=300, height=260)
        .mark_line(point=alt.OverlayMarkDef(size=20))
        .encode(
            x=alt.X("step:Q", title="step"),
            y=alt.Y("distance:Q", title="distance").scale(type="log").axis(format=".0e", tickCount=6),
            color=alt.Color("metric:N", title=None, sort=names).legend(orient="bottom", columns=2),
        )
    )
    dots = [
        {"samples": n, "length": value, "of": of}
        for each in trained
        for of, lengths in (("classifier", each.right.classifier_norms), ("class mean", each.right.feature_norms))
        for n, value in zip(sizes, lengths.tolist())
    ]
    lines = [
        {"samples": n, "length": value, "of": of}
        for of, lengths in (("classifier", theory.classifier_norms), ("class mean", theory.feature_norms))
        for n, value in zip(sizes, lengths.tolist())
    ]
    shared = {
        "x": alt.X("samples:Q", title="samples of the class").scale(zero=False),
        "y": alt.Y("length:Q", title="length (lines: predicted)"),
        "color": alt.Color("of:N", title=None).legend(orient="bottom"),
    }
    right = alt.layer(
        alt.Chart(alt.Data(values=lines)).mark_line(opacity=0.6).encode(**shared),
        alt.Chart(alt.Data(values=dots)).mark_point(filled=True, size=45, opacity=0.9).encode(**shared),
    ).properties(width=240, height=260)
    return alt.hconcat(left, right).resolve_scale(color="independent")


@study.claim(
    "C4",
    "Equal classes end in an orthogonal frame without a bias and in a simplex with one, at every layer of the head",
    paper="Theorems and figures on balanced data (synthetic; MLP, ResNet18, VGG16 on CIFAR-10, M = 1, 3, 6, 9)",
    holds=at_most(1e-4),
    unit="largest NC2 or NC3 of free features",
    also={"network: NC2 to its frame": at_most(0.02), "network: NC2 to the other": at_least(0.2)},
)
def equal_classes_end_in_the_right_frame(run: Run) -> Measurement:
    s, worst, rows = run.setting, 0.0, []
    for n in s.frame_counts:
        for depth in s.frame_depths:
            for bias in (False, True):
                found = best_of(run, s.starts, [n] * 4, 5e-4, depth, width=16, bias=bias)
                report = collapse_of(found.features, found.labels, found.head)
                layers = torch.cat([report.per_layer["nc2_w"], report.per_layer["nc2_h"]])
                worst = max(worst, layers.max().item(), report.nc3)
    right, wrong = [], []
    for network in s.networks:
        for bias, own, other in ((False, "orthogonal", "etf"), (True, "etf", "orthogonal")):
            trained = run.each_seed(train, network=network, sizes=[s.balanced] * 10, bias=bias)
            right.append(statistics.fmean(each.others[own].nc2_w for each in trained))
            wrong.append(statistics.fmean(each.others[other].nc2_w for each in trained))
            rows += [
                {
                    "head": f"{told(network)}, {'with' if bias else 'without'} a bias",
                    "distance": report.nc2_w,
                    "to": name,
                }
                for each in trained
                for name, report in (("orthogonal frame", each.others["orthogonal"]), ("simplex", each.others["etf"]))
            ]
    run.figure(
        alt.Chart(alt.Data(values=rows), width="container", height=60 + 50 * len(right))
        .mark_point(filled=True, size=90, opacity=0.8)
        .encode(
            x=alt.X("distance:Q", title="NC2 of trained networks").scale(type="log"),
            y=alt.Y("head:N", title=None).axis(labelLimit=260),
            color=alt.Color("to:N", title="distance to"),
        )
    )
    also = {"network: NC2 to its frame": max(right), "network: NC2 to the other": min(wrong)}
    note = f"free features: 4 classes of {', '.join(map(str, s.frame_counts))}, {s.starts} starts; networks on {s.data}"
    return Measurement(worst, seeds=len(run.seeds), also=also, note=note)
