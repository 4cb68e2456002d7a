"""Does one searched layer replace normalisation and activation, and does the search find better ones than chance?"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import altair as alt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.core.surgery import swap
from lathe.nn.evonorm import (
    BASELINE_GRAPHS,
    EVONORM_GRAPHS,
    EvoNormB0,
    EvoNormB2,
    EvoNormS0,
    EvoNormS1,
    EvoNormS2,
    NormActGraph,
    SearchResult,
    evolve_norm_act,
    quality_check,
    random_graph,
    stability_check,
    structural_check,
)
from lathe.studies.engine import (
    Measurement,
    NotAtThisScale,
    Run,
    Setting,
    Study,
    at_least,
    at_most,
    average,
    compare,
    equals,
)
from lathe.training import TrainingDiverged, accuracy, evaluate, fit, one_cycle

study = Study(
    "evonorm",
    title="Evolving Normalization-Activation Layers",
    authors="Liu, Brock, Simonyan, Le",
    year=2020,
    arxiv="2004.02967",
    area="nn",
    module="lathe.nn.evonorm",
    summary="""Puts one layer where a normalisation and its activation stood, with half the memory for training and no
    batch to depend on (S layers). The search that found these layers runs on your own networks and data.""",
    example="""
import torch
from torch import nn
from lathe.nn.evonorm import EvoNormS0, replace_norm_act

model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 10, 3))
report = replace_norm_act(model, EvoNormS0, groups=4)   # a copy: the ReLU is gone, the BatchNorm is an EvoNorm-S0
images = torch.randn(4, 3, 16, 16)
assert torch.allclose(report.model(images)[:1], report.model(images[:1]), atol=1e-5)   # the batch plays no part
""",
    job="build",
    scales={
        "smoke": Setting(
            seeds=1,
            data="digits",
            train=300,
            test=200,
            size=8,
            widths=(8, 16, 32),
            epochs=1,
            batch=100,
            lr=0.1,
            other_lr=0.03,
            weight_decay=5e-4,
            anchor_width=8,
            anchor_steps=20,
            proxy_batch=32,
            proxy_lr=0.1,
            random_graphs=8,
            stability_steps=5,
            search_anchors=("plain",),
            search_average=False,
            search_evaluations=3,
            search_quality_steps=4,
            search_steps=4,
            search_stability_steps=1,
            search_threshold=0.05,
            search_workers=1,
            window=40,
            tournament=5,
        ),
        "desk": Setting(
            data="cifar10",
            train=10_000,
            test=5000,
            size=16,
            widths=(16, 32, 64),
            epochs=10,
            batch=100,
            lr=0.1,
            other_lr=0.03,
            weight_decay=5e-4,
            anchor_width=8,
            anchor_steps=100,
            proxy_batch=32,
            proxy_lr=0.1,
            random_graphs=300,
            stability_steps=100,
            search_anchors=("plain", "residual", "inverted"),
            search_average=True,
            search_evaluations=200,
            search_quality_steps=30,
            search_steps=100,
            search_stability_steps=3,
            search_threshold=0.2,
            search_workers=1,
            window=40,
            tournament=5,
        ),
        "full": Setting(
            data="cifar10",
            train=50_000,
            test=10_000,
            size=32,
            widths=(64, 128, 256),
            epochs=100,
            batch=128,
            lr=0.1,
            other_lr=0.03,
            weight_decay=5e-4,
            anchor_width=16,
            anchor_steps=100,
            proxy_batch=64,
            proxy_lr=0.1,
            random_graphs=5000,
            stability_steps=100,
            search_anchors=("plain", "residual", "inverted"),
            search_average=True,
            search_evaluations=5000,
            search_quality_steps=100,
            search_steps=2000,
            search_stability_steps=100,
            search_threshold=0.2,
            search_workers=16,
            window=2500,
            tournament=0.05,
        ),
    },
)

PERCENT = "percentage points"


# --- C1 to C3: the layers in a pre-activation ResNet ------------------------------------------------------------------


class ChunkedBatchNorm(nn.BatchNorm2d):
    """BatchNorm whose statistics in training are those of `chunk` images, as on a worker that has no more.

    The running averages take the mean over the chunks, which is more than a worker has: it errs in favour of BatchNorm.
    """

    def __init__(self, num_features: int, chunk: int) -> None:
        super().__init__(num_features)
        self.chunk = chunk

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        chunks = len(input) // self.chunk
        # Each chunk's channels beside those of the others: one call normalises them all.
        spread = input.unflatten(0, (chunks, self.chunk)).transpose(0, 1).flatten(1, 2)
        mean, var = torch.zeros(chunks * self.num_features), torch.ones(chunks * self.num_features)
        mean, var = mean.to(input.device), var.to(input.device)
        weight, bias = self.weight.repeat(chunks), self.bias.repeat(chunks)
        out = F.batch_norm(spread, mean, var, weight, bias, training=True, momentum=1.0, eps=self.eps)
        with torch.no_grad():
            for running, seen in ((self.running_mean, mean), (self.running_var, var)):
                assert running is not None
                running.lerp_(seen.view(chunks, -1).mean(0), 0.1)
        return out.unflatten(1, (chunks, -1)).transpose(0, 1).flatten(0, 1)


class Chunked(nn.Module):
    """Any layer, called on `chunk` images at a time."""

    def __init__(self, layer: nn.Module, chunk: int) -> None:
        super().__init__()
        self.layer, self.chunk = layer, chunk

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layer(part) for part in x.split(self.chunk)])


GROUPS = 8
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "BN-ReLU": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()),
    "BN-SiLU": lambda c: nn.Sequential(nn.BatchNorm2d(c), nn.SiLU()),
    "BN-ReLU, 2 images": lambda c: nn.Sequential(ChunkedBatchNorm(c, 2), nn.ReLU()),
    "GN-ReLU": lambda c: nn.Sequential(nn.GroupNorm(GROUPS, c), nn.ReLU()),
    "ReLU": lambda c: nn.ReLU(),
    "B0": EvoNormB0,
    "S0": partial(EvoNormS0, groups=GROUPS),
}


class PreActivationBlock(nn.Module):
    def __init__(self, inward: int, width: int, stride: int, norm_act: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first = norm_act(inward)
        self.branch = nn.Sequential(conv(inward, width, stride=stride), norm_act(width), conv(width, width))
        self.shortcut = conv(inward, width, 1, stride=stride) if stride > 1 or inward != width else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.first(x)
        return self.branch(activated) + (x if self.shortcut is None else self.shortcut(activated))


def conv(inward: int, outward: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inward, outward, kernel, padding=kernel // 2, bias=False, **options)


def head(width: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]


def resnet8(norm_act: Callable[[int], nn.Module], widths: tuple[int, ...], channels: int, classes: int) -> nn.Module:
    """A pre-activation ResNet with one block a stage: eight layers with weights for three widths."""
    blocks, inward = [], widths[0]
    for stage, width in enumerate(widths):
        blocks.append(PreActivationBlock(inward, width, 1 if stage == 0 else 2, norm_act))
        inward = width
    return nn.Sequential(conv(channels, widths[0]), *blocks, norm_act(inward), *head(inward, classes))


def images(run: Run, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images, standardised and average-pooled to the setting's size, with labels."""
    setting, parts = run.setting, []
    for split, count in (("train", setting.train), ("test", setting.test)):
        data = run.data(setting.data, split)
        data = data.subset(min(count, len(data)), run.generator(seed if split == "train" else 0))
        inputs = data.float()
        if inputs.shape[-1] > setting.size:
            inputs = F.avg_pool2d(inputs, inputs.shape[-1] // setting.size)
        parts += [inputs, data.labels]
    train, labels, test, test_labels = parts
    mean, std = train.mean((0, 2, 3), keepdim=True), train.std((0, 2, 3), keepdim=True)
    return (train - mean) / std, labels, (test - mean) / std, test_labels


def flip(inputs: Tensor, generator: torch.Generator) -> Tensor:
    chosen = torch.rand(len(inputs), generator=generator, device=generator.device) < 0.5
    return torch.where(chosen.to(inputs.device).view(-1, 1, 1, 1), inputs.flip(3), inputs)


@dataclass(frozen=True)
class Trained:
    """One trained network: test accuracy in percent, and for S0 what working in chunks of two images changes."""

    accuracy: float
    chunk_accuracy_change: float = 0.0
    chunk_gradient_change: float = 0.0


def train_net(run: Run, seed: int, layer: str, lr: float | None = None) -> Trained:
    """A network with `layer` for every normalisation and activation, the same recipe for all."""
    setting = run.setting
    lr = setting.lr if lr is None else lr
    inputs, labels, test, test_labels = images(run, seed)
    model = resnet8(LAYERS[layer], setting.widths, inputs.shape[1], 10)
    try:
        fit(
            model,
            (inputs, labels),
            loss=F.cross_entropy,
            optimizer=partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True, weight_decay=setting.weight_decay),
            schedule=one_cycle(max_lr=lr),
            epochs=setting.epochs,
            batch_size=setting.batch,
            augment=flip if setting.data == "cifar10" else None,
            seed=seed,
            device=run.device,
        )
    except TrainingDiverged:
        return Trained(10.0)
    found = evaluate(model, (test, test_labels), {"accuracy": accuracy}, batch_size=500)["accuracy"]
    if layer != "S0":
        return Trained(100 * found)
    return Trained(100 * found, *chunking_changes(model, test.to(run.device), test_labels.to(run.device)))


def chunking_changes(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Points of accuracy, and the gradient's relative change, where layers see two images at a time in training."""
    model.train()
    inputs, labels = inputs[:200], labels[:200]
    answers, gradients = [], []
    chunked = wrapped(model)
    for net in (model, chunked):
        output = net(inputs)
        answers.append((output.argmax(1) == labels).float().mean().item())
        found = torch.autograd.grad(F.cross_entropy(output, labels), list(net.parameters()))
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    change = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    return 100 * abs(answers[0] - answers[1]), float(change)


def wrapped(model: nn.Module) -> nn.Module:
    """A copy of `model` whose S0 layers are called on two images at a time."""
    return swap(copy.deepcopy(model), {EvoNormS0: lambda layer: Chunked(layer, 2)}).model


def accuracies(run: Run, layer: str) -> list[float]:
    return [net.accuracy for net in run.each_seed(train_net, layer=layer)]


def layer_chart(run: Run, layers: list[str]) -> alt.Chart:
    """Test accuracy of each layer, a point a seed."""
    values = [
        {"layer": layer, "seed": seed, "accuracy": round(value, 2)}
        for layer in layers
        for seed, value in zip(run.seeds, accuracies(run, layer))
    ]
    return (
        alt.Chart(alt.Data(values=values))
        .mark_point(size=90, filled=True, opacity=0.7)
        .encode(
            x=alt.X("accuracy:Q", title="test accuracy (%)", scale=alt.Scale(zero=False)),
            y=alt.Y("layer:N", title=None, sort=layers),
            tooltip=["layer:N", "seed:O", "accuracy:Q"],
        )
        .properties(width="container", height=260)
    )


@study.claim(
    "C1",
    "EvoNorm-B0 does as well as BatchNorm and ReLU with the same recipe, and far better than ReLU alone",
    paper="Table 4: 76.6 against 76.3 top-1 (ResNet-50, ImageNet)",
    holds=at_least(-0.3),
    unit=PERCENT,
    also={"gain over ReLU without normalisation": at_least(3.0)},
)
def beats_batch_norm(run: Run) -> Measurement:
    ours, baseline, bare = accuracies(run, "B0"), accuracies(run, "BN-ReLU"), accuracies(run, "ReLU")
    layers = ["B0", "BN-ReLU", "ReLU"]
    run.figure(layer_chart(run, layers))
    # Equal tuning: each layer may choose between two rates, by its mean over the seeds.
    tuned = [
        max(
            statistics.fmean(first),
            statistics.fmean(net.accuracy for net in run.each_seed(train_net, layer=layer, lr=run.setting.other_lr)),
        )
        for layer, first in (("B0", ours), ("BN-ReLU", baseline))
    ]
    also = {
        "gain over ReLU without normalisation": statistics.fmean(ours) - statistics.fmean(bare),
        f"difference, each at the better of rates {run.setting.lr:g} and {run.setting.other_lr:g}": tuned[0] - tuned[1],
        "B0": statistics.fmean(ours),
    }
    note = "single seeds of a smaller setting gave +2.4 at a rate of 0.03 and -2.4 at 0.2"
    return compare(ours, baseline, also=also, note=note)


@study.claim(
    "C2",
    "EvoNorm-S0 does not depend on the batch: with statistics over two images it beats BatchNorm and ReLU",
    paper="Figure 1 and Table 5: flat from 128 to 4 images a worker, where BatchNorm falls",
    holds=at_least(1.0),
    unit=PERCENT,
    also={"change of S0's accuracy by chunks of 2": equals(0.0), "relative change of S0's gradient": at_most(1e-4)},
)
def small_batches(run: Run) -> Measurement:
    nets = run.each_seed(train_net, layer="S0")
    run.figure(layer_chart(run, ["S0", "BN-ReLU, 2 images", "BN-ReLU"]))
    return compare(
        [net.accuracy for net in nets],
        accuracies(run, "BN-ReLU, 2 images"),
        also={
            "change of S0's accuracy by chunks of 2": max(net.chunk_accuracy_change for net in nets),
            "relative change of S0's gradient": max(net.chunk_gradient_change for net in nets),
            "BN-ReLU, whole batch": statistics.fmean(accuracies(run, "BN-ReLU")),
        },
        note="BatchNorm is evaluated with running statistics; S0 trained on whole batches is S0 trained on chunks",
    )


@study.claim(
    "C3",
    "EvoNorm-S0 does at least as well as GroupNorm and ReLU",
    paper="Table 5: about one point (ResNet-50); box AP 43.6 against 42.7 (Mask R-CNN)",
    holds=at_least(0.0),
    unit=PERCENT,
    also={"share of seeds": at_least(0.66)},
)
def beats_group_norm(run: Run) -> Measurement:
    ours, baseline = accuracies(run, "S0"), accuracies(run, "GN-ReLU")
    run.figure(layer_chart(run, ["S0", "GN-ReLU"]))
    share = sum(a >= b for a, b in zip(ours, baseline)) / len(ours)
    return compare(ours, baseline, also={"share of seeds": share})


# --- C4: what scaling the input does ----------------------------------------------------------------------------------


@study.claim(
    "C4",
    "B0 and B2 ignore the scale of their input; S0, S1 and S2 tend to a normalised step and to half the linear map",
    paper="Section 5, analysis of scale invariance",
    kind="exact",
    holds=at_most(1e-12),
    unit="largest difference",
    also={"S layers against their limits": at_most(1e-6)},
)
def scale_behaviour(run: Run) -> Measurement:
    x = torch.randn(4, 8, 5, 5, generator=run.generator(0), dtype=torch.float64)
    exact, values = 0.0, []
    exponents = [step / 2 for step in range(-6, 7)]
    shown: dict[str, nn.Module] = {
        "B0": EvoNormB0(8, eps=1e-30, dtype=torch.float64),
        "B2": EvoNormB2(8, eps=1e-30, dtype=torch.float64),
        "S0": EvoNormS0(8, groups=2, eps=1e-30, dtype=torch.float64),
    }
    with torch.no_grad():
        for name, layer in shown.items():
            start = layer(x)
            for exponent in exponents:
                change = float((layer(x * 10**exponent) - start).abs().max())
                values.append({"layer": name, "scale": 10**exponent, "change": max(change, 1e-17)})
                if name != "S0":
                    exact = max(exact, change)
        limits = max(_limit_difference(layer, x) for layer in (EvoNormS0, EvoNormS1, EvoNormS2))
    run.figure(
        alt.Chart(alt.Data(values=values))
        .mark_line(point=True)
        .encode(
            x=alt.X("scale:Q", title="factor on the input", scale=alt.Scale(type="log")),
            y=alt.Y("change:Q", title="largest change of the output", scale=alt.Scale(type="log")),
            color=alt.Color("layer:N", title=None),
        )
        .properties(width="container", height=260)
    )
    return Measurement(exact, also={"S layers against their limits": limits})


def _limit_difference(layer: type[EvoNormS0] | type[EvoNormS1] | type[EvoNormS2], x: Tensor) -> float:
    """How far f(alpha x) is from gamma x [v x > 0] / s for a huge alpha, and from gamma x / (2 s) for a tiny one."""
    module = layer(8, groups=2, eps=1e-30, dtype=torch.float64)
    groups = x.unflatten(1, (2, 4))
    spread = groups if layer is EvoNormS2 else groups - groups.mean((2, 3, 4), keepdim=True)
    normalized = (groups / spread.square().mean((2, 3, 4), keepdim=True).sqrt()).flatten(1, 2)
    high = (module(x * 1e9) - normalized * (x > 0)).abs().max()
    low = (module(x * 1e-9) - normalized / 2).abs().max()
    return float(torch.maximum(high, low))


# --- C5 to C7: the search ---------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def plain(norm_act: Callable[[int], nn.Module], width: int) -> nn.Module:
    """A chain of convolutions."""
    return nn.Sequential(
        conv(1, width, stride=2), norm_act(width), conv(width, width), norm_act(width), *head(width, 10)
    )


def residual(norm_act: Callable[[int], nn.Module], width: int) -> nn.Module:
    """A pre-activation residual network."""
    branch = (norm_act(width), conv(width, width), norm_act(width), conv(width, width))
    return nn.Sequential(conv(1, width, stride=2), Residual(*branch), norm_act(width), *head(width, 10))


def inverted(norm_act: Callable[[int], nn.Module], width: int) -> nn.Module:
    """Inverted residuals with a depthwise convolution, after MobileNetV2."""
    wide = 2 * width
    branch = (
        conv(width, wide, 1),
        norm_act(wide),
        conv(wide, wide, groups=wide),
        norm_act(wide),
        conv(wide, width, 1),
    )
    return nn.Sequential(conv(1, width, stride=2), norm_act(width), Residual(*branch), *head(width, 10))


ANCHORS = {"plain": plain, "residual": residual, "inverted": inverted}


Factory = Callable[[int], nn.Module]
GROUPS_OF_ANCHORS = 4
GOOD = {name: BASELINE_GRAPHS[name] for name in ("BN-ReLU", "GN-ReLU", "FRN-TLU")} | EVONORM_GRAPHS
BAD = {
    "exp(x)": NormActGraph([("exp", (0,))]),
    "x x": NormActGraph([("mul", (0, 0))]),
    "x / mean x": NormActGraph([("mean", (0,), "instance"), ("div", (0, 4))]),
    "constant": NormActGraph([("add", (1, 3))]),
}


def proxy(
    run: Run, anchors: tuple[str, ...] = tuple(ANCHORS)
) -> tuple[list[Callable[[Factory], nn.Module]], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Anchors, and standardised digits to judge layers on."""
    train, test = run.data("digits", "train"), run.data("digits", "test")
    inputs, test_inputs = train.float(), test.float()
    mean, std = inputs.mean(), inputs.std()
    data = ((inputs - mean) / std, train.labels, (test_inputs - mean) / std, test.labels)
    a, b, c, d = (part.to(run.device) for part in data)
    return [partial(ANCHORS[name], width=run.setting.anchor_width) for name in anchors], (a, b, c, d)


def layer_of(graph: NormActGraph) -> Factory:
    return partial(graph.to_module, groups=GROUPS_OF_ANCHORS)


def training_options(run: Run) -> dict[str, Any]:
    return {"batch_size": run.setting.proxy_batch, "learning_rate": run.setting.proxy_lr}


def judge_random_graphs(run: Run, seed: int) -> list[tuple[str | None, tuple[float, ...]]]:
    """For each random graph why it fails without training (or None), and its accuracies up to the first below 20 %."""
    anchors, data = proxy(run)
    rng = run.generator(seed)
    found: list[tuple[str | None, tuple[float, ...]]] = []
    count = max(1, run.setting.random_graphs // len(run.seeds))
    for done in range(count):
        run.progress("random graphs", done, count)
        graph = random_graph(rng)
        cause = structural_check(graph)
        # What ignores its input stays at chance: no need to train for that. Other causes are tested in earnest.
        if cause == "input-free":
            found.append((cause, (0.1,)))
            continue
        report = quality_check(layer_of(graph), anchors, data, run.setting.anchor_steps, 0.2, **training_options(run))
        found.append((cause, report.values))
    return found


def baseline_accuracies(run: Run, seed: int) -> tuple[float, ...]:
    """BatchNorm and ReLU on each anchor."""
    anchors, data = proxy(run)
    graph = BASELINE_GRAPHS["BN-ReLU"]
    return quality_check(layer_of(graph), anchors, data, run.setting.anchor_steps, 0.0, **training_options(run)).values


@study.claim(
    "C5",
    "Few random layers learn on three small networks at once, and hardly any comes near BatchNorm and ReLU on all",
    paper="Figures 2 and 3: thousands of random layers, most near chance on at least one network",
    holds=at_most(35.0),
    unit="% of random graphs above 20 % accuracy on all networks",
    also={"% within 2 points of BN-ReLU on all": at_most(5.0)},
)
def space_is_sparse(run: Run) -> Measurement:
    by_seed = run.each_seed(judge_random_graphs)
    baseline = run.each_seed(baseline_accuracies)[0]

    def passed(accuracies: tuple[float, ...]) -> bool:
        return len(accuracies) == len(ANCHORS) and min(accuracies) >= 0.2

    def near(accuracies: tuple[float, ...]) -> bool:
        return passed(accuracies) and all(a >= b - 0.02 for a, b in zip(accuracies, baseline))

    graphs = [graph for found in by_seed for graph in found]
    shares = [100 * statistics.fmean(passed(accuracies) for _, accuracies in found) for found in by_seed]
    points = [
        {"network": name, "accuracy": round(100 * accuracy, 1), "graph": index}
        for index, (_, accuracies) in enumerate(graphs)
        if len(accuracies) > 1
        for name, accuracy in zip(ANCHORS, accuracies)
    ]
    rules = [{"network": name, "accuracy": round(100 * accuracy, 1)} for name, accuracy in zip(ANCHORS, baseline)]
    encoding = {
        "x": alt.X("network:N", title=None, sort=list(ANCHORS)),
        "y": alt.Y("accuracy:Q", title="accuracy (%)"),
    }
    lines = alt.Chart(alt.Data(values=points)).mark_line(opacity=0.4, point=True).encode(**encoding, detail="graph:N")
    marks = alt.Chart(alt.Data(values=rules)).mark_tick(thickness=3, size=60).encode(**encoding)
    run.figure((lines + marks).properties(width=420, height=260))
    input_free = 100 * statistics.fmean(cause == "input-free" for cause, _ in graphs)
    return average(
        shares,
        also={
            "% within 2 points of BN-ReLU on all": 100 * statistics.fmean(near(a) for _, a in graphs),
            "% rejected without training": input_free,
            "random graphs": len(graphs),
        },
        note="figure: random graphs that pass on the first network, a line each; ticks are BatchNorm and ReLU",
    )


@dataclass(frozen=True)
class Tested:
    """What the rejection tests said of one layer, and how long they took."""

    name: str
    passed: bool
    seconds: float


def reject_or_pass(run: Run, seed: int) -> list[Tested]:
    """Both rejection tests on the good and the bad layers."""
    anchors, data = proxy(run)
    options = training_options(run)
    found: list[Tested] = []
    for name, graph in (GOOD | BAD).items():
        run.progress(name, len(found), len(GOOD) + len(BAD))
        began = time.perf_counter()
        factory = layer_of(graph)
        passed = quality_check(factory, anchors, data, run.setting.anchor_steps, 0.2, seed=seed, **options).passed and (
            stability_check(
                factory, anchors, data, run.setting.stability_steps, seed=seed, batch_size=run.setting.proxy_batch
            ).passed
        )
        found.append(Tested(name, passed, time.perf_counter() - began))
    return found


@study.claim(
    "C6",
    "The rejection tests pass every good layer, reject every bad one, and cost little where they reject",
    paper="Section 4.1: quality and stability tests before the evaluation",
    holds=equals(0.0),
    unit="wrong verdicts",
    also={"time to reject over time to pass": at_most(1 / 3)},
)
def rejection_is_right(run: Run) -> Measurement:
    tested = run.each_seed(reject_or_pass)[0]
    wrong = [each.name for each in tested if each.passed != (each.name in GOOD)]
    reject = statistics.fmean(each.seconds for each in tested if each.name in BAD)
    accept = statistics.fmean(each.seconds for each in tested if each.name in GOOD)
    run.figure(
        alt.Chart(
            alt.Data(
                values=[
                    {"layer": t.name, "seconds": round(t.seconds, 3), "verdict": "pass" if t.passed else "reject"}
                    for t in tested
                ]
            )
        )
        .mark_bar()
        .encode(
            x=alt.X("seconds:Q", title="seconds for both tests"),
            y=alt.Y("layer:N", title=None, sort=[t.name for t in tested]),
            color=alt.Color("verdict:N", title=None),
        )
        .properties(width="container", height=260)
    )
    return Measurement(
        float(len(wrong)),
        also={"time to reject over time to pass": reject / accept, "good layers": len(GOOD), "bad layers": len(BAD)},
        note=f"the tests alone, without the structural pre-check{'; wrong: ' + ', '.join(wrong) if wrong else ''}",
    )


@dataclass(frozen=True)
class Search:
    """One search: what it found, and the best mean accuracy after each evaluation."""

    best: float
    top: float
    unbalance: float
    formula: str
    curve: tuple[float, ...]
    attempts: int
    rejections: tuple[tuple[str, int], ...]


def report_progress(run: Run, name: str, result: SearchResult, graph: NormActGraph, outcome: Any) -> None:
    run.progress(name, len(result.history), run.setting.search_evaluations)


def search(run: Run, seed: int) -> dict[str, Search]:
    """Random search and evolution with the same rejections. They share verdicts: a graph's is the same in both."""
    setting = run.setting
    anchors, data = proxy(run, setting.search_anchors)
    known: dict[str, Any] = {}
    ways: dict[str, dict[str, Any]] = {"random": {"explore": 1.0}, "evolution": {"select": "pareto"}}
    if setting.search_average:
        ways["evolution by average"] = {"select": "average"}
    found = {}
    for name, options in ways.items():
        result = evolve_norm_act(
            anchors,
            data,
            evaluations=setting.search_evaluations,
            window=setting.window,
            tournament=setting.tournament,
            proxy_steps=setting.search_steps,
            quality_steps=setting.search_quality_steps,
            stability_steps=setting.search_stability_steps,
            threshold=setting.search_threshold,
            groups=GROUPS_OF_ANCHORS,
            seed=seed,
            known=known,
            workers=setting.search_workers,
            on_result=partial(report_progress, run, name),
            **options,
            **training_options(run),
        )
        top = result.top(10)
        scores = {candidate.graph.hash(): 100 * candidate.mean for candidate in result.history}
        curve = tuple(round(best, 2) for best in itertools.accumulate(scores.values(), max))
        found[name] = Search(
            best=100 * result.best.mean,
            top=100 * statistics.fmean(candidate.mean for candidate in top),
            unbalance=100 * statistics.fmean(max(c.accuracies) - min(c.accuracies) for c in top),
            formula=result.best.graph.simplify().expression(),
            curve=curve,
            attempts=result.attempts,
            rejections=tuple(result.rejections.items()),
        )
    return found


@study.claim(
    "C7",
    "Evolution over several networks finds better layers than random search with as many evaluations",
    paper="Figures 4 and 5; Table 4: random search with rejection 75.8, EvoNorm-B0 76.6",
    holds=at_least(0.66),
    unit="share of seeds in which evolution's best is better",
    also={"share of seeds in which its top 10 are better": equals(1.0)},
)
def evolution_beats_random(run: Run) -> Measurement:
    searches = run.each_seed(search)
    better = [float(each["evolution"].best > each["random"].best) for each in searches]
    better_top = [float(each["evolution"].top > each["random"].top) for each in searches]
    values = [
        {"search": name, "seed": seed, "evaluations": index + 1, "accuracy": accuracy}
        for seed, each in zip(run.seeds, searches)
        for name, one in each.items()
        for index, accuracy in enumerate(one.curve)
        if index == len(one.curve) - 1 or index == 0 or one.curve[index - 1] != accuracy
    ]
    run.figure(
        alt.Chart(alt.Data(values=values))
        .mark_line(interpolate="step-after")
        .encode(
            x=alt.X("evaluations:Q", title="layers evaluated"),
            y=alt.Y("accuracy:Q", title="best mean accuracy so far (%)", scale=alt.Scale(zero=False)),
            color=alt.Color("search:N", title=None),
            detail="seed:N",
        )
        .properties(width="container", height=260)
    )
    also = {"share of seeds in which its top 10 are better": statistics.fmean(better_top)}
    for name in searches[0]:
        also[f"best, {name}"] = statistics.fmean(each[name].best for each in searches)
        also[f"top 10, {name}"] = statistics.fmean(each[name].top for each in searches)
        also[f"gap between networks, {name}"] = statistics.fmean(each[name].unbalance for each in searches)
        also[f"graphs drawn, {name}"] = statistics.fmean(each[name].attempts for each in searches)
    best = max((each["evolution"] for each in searches), key=lambda one: one.best)
    note = (
        f"best found: {best.formula}. An evaluation is a layer that none before it equals: where repeats of a layer "
        "counted as evaluations, evolution, which repeats itself more, lost (63.2 against 69.6, one seed of 60)"
    )
    return average(better, also=also, note=note)


@study.claim(
    "C8",
    "EvoNorm in the generator of BigGAN lowers the FID",
    paper="Table 8: 7.3 with BatchNorm, 5.9 with B0, 6.3 with S0",
    holds=at_most(0.0),
    unit="FID, EvoNorm less BatchNorm",
)
def better_images(run: Run) -> Measurement:
    raise NotAtThisScale("BigGAN-deep at 128 pixels trains for days on a TPU pod; no smaller FID says the same")
