"""Do generated kernels as large as the image make a classifier that needs no residual additions?"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import altair as alt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.core.surgery import swap
from lathe.nn.hyper_zzw import (
    ContextSlowNet,
    GroupInstanceBatchStd,
    Kar3,
    SFNEBlock,
    SlowNet,
    Terminator,
    apply_weights,
    norm_penalty,
    slow_neural_loss,
)
from lathe.studies.engine import Measurement, Run, Setting, Study, at_least, at_most, average, between, compare, equals
from lathe.training import cosine, fit

study = Study(
    "hyper-zzw",
    title="HyperZ·Z·W Operator Connects Slow-Fast Networks for Full Context Interaction",
    authors="Zhang",
    year=2024,
    arxiv="2401.17948",
    area="nn",
    module="lathe.nn.hyper_zzw",
    summary="""Small coordinate networks generate kernels as large as the image; times the activations they become
    weights that depend on what is seen. Gives classifiers, and drop-in convolutions, whose parameters do not grow with
    their receptive field.""",
    example="""
import torch
from functools import partial
from torch import nn
from lathe.core.surgery import swap
from lathe.nn.hyper_zzw import HyperConv2d, Kar3, Terminator

net = Terminator(in_channels=1, num_classes=10, size=8, factors=(12, 2, 2), local_sizes=(3, 7, 5, 5))
x, labels = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
loss = nn.functional.cross_entropy(net(x), labels, label_smoothing=0.1) + net.slow_loss()
loss.backward()
Kar3(net.parameters(), lr=3e-4).step()

cnn = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
swap(cnn, {nn.Conv2d: partial(HyperConv2d.like, kernel_size=7, omega0=10.0)})   # a 7x7 view, where 3x3 stood
assert cnn(torch.randn(2, 3, 12, 12)).shape == (2, 16, 12, 12)
""",
    job="build",
    scales={
        "smoke": Setting(
            seeds=1,
            data="digits",
            train=192,
            test=100,
            size=8,
            factors=(12, 2, 2),
            local_sizes=(3, 7, 5, 5),
            hidden=(32, 16),
            dropout=(0.0, 0.0, 0.0),
            epochs=1,
            batch=64,
            rates={"Kar3": 3e-4, "AdamW": 1e-3},
            baseline_widths={"residual": 28, "plain": 39},
            warmup=0.08,
            penalty=4e-5,
            jacobian=6,
        ),
        "desk": Setting(
            data="digits",
            train=1437,
            test=360,
            size=8,
            factors=(12, 2, 2),
            local_sizes=(3, 7, 5, 5),
            hidden=(32, 16),
            dropout=(0.0, 0.0, 0.0),
            epochs=20,
            batch=64,
            rates={"Kar3": 3e-4, "AdamW": 1e-3},
            baseline_widths={"residual": 28, "plain": 39},
            warmup=0.08,
            penalty=4e-5,
            jacobian=8,
        ),
        "full": Setting(
            data="cifar10",
            train=50_000,
            test=10_000,
            size=32,
            factors=(4, 3, 2, 2, 2),
            local_sizes=(3, 9, 5, 7),
            hidden=(64, 32),
            dropout=(0.0, 0.05, 0.05, 0.05, 0.05),
            epochs=100,
            batch=64,
            rates={"Kar3": 1.215e-3, "AdamW": 1e-3},
            baseline_widths={"residual": 121, "plain": 172},
            warmup=0.08,
            penalty=4e-5,
            jacobian=8,
        ),
    },
)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"Kar3": Kar3, "AdamW": torch.optim.AdamW}


@dataclass(frozen=True)
class Trained:
    """Accuracies in percent: on the test set after the last epoch, and on the training batches epoch by epoch."""

    test: float
    train: list[float]
    parameters: int
    distance: float
    """Of the kernels of all blocks, at the end (`slow_neural_loss`); 0 for networks without."""


@study.claim(
    "C1",
    "Few parameters and no residual addition: as accurate as a residual network of equal size",
    paper="the author's logs of the released code: 95.3 % on CIFAR-10 with 1.3M parameters, 100 epochs",
    holds=at_least(96.0),
    unit="% test accuracy",
    also={"minus the residual network": at_least(-2.5)},
)
def classifies(run: Run) -> Measurement:
    nets = {f"Terminator, {name}": run.each_seed(train, network="Terminator", optimizer=name) for name in OPTIMIZERS}
    nets |= {
        f"{title}, {name}": run.each_seed(train, network=network, optimizer=name)
        for title, network in (("residual network", "residual"), ("plain CNN", "plain"))
        for name in OPTIMIZERS
    }
    run.figure(strips(nets, "test accuracy (%)"))
    ours, residual, plain = (best(nets, prefix) for prefix in ("Terminator", "residual", "plain"))
    counts = ", ".join(f"{name} {nets[name][0].parameters:,}" for name in (ours, residual, plain))
    return average(
        tests(nets[ours]),
        baseline=statistics.fmean(tests(nets[residual])),
        also={
            "minus the residual network": compare(tests(nets[ours]), tests(nets[residual])).value,
            **{f"accuracy of the {name}": statistics.fmean(tests(runs)) for name, runs in nets.items()},
        },
        note=f"of each network the optimiser with the better training accuracy: {counts} parameters; {images_of(run)}",
    )


@study.claim(
    "C2",
    "Without any skip, generated hyper-kernels are at least as good as kernels of ones",
    paper="'possible to discard residual learning'; ablation tables",
    holds=at_least(0.0),
    unit="percentage points of test accuracy",
)
def needs_no_skips(run: Run) -> Measurement:
    kinds = {"generated": "generated", "free parameters": "free", "ones": "ones"}
    nets = {name: run.each_seed(train, network="no skips", kernels=kind) for name, kind in kinds.items()}
    plain = best_of(run, "plain")
    run.figure(
        strips({f"no skips, {name}": runs for name, runs in nets.items()} | {"plain CNN": plain}, "test accuracy (%)")
    )
    ours = tests(nets["generated"])
    return compare(
        ours,
        tests(nets["ones"]),
        also={
            "generated, accuracy": statistics.fmean(ours),
            "minus free parameters": compare(ours, tests(nets["free parameters"])).value,
            "minus a plain CNN of six layers": compare(ours, tests(plain)).value,
        },
        note="kernels of all slow nets replaced: of ones, they leave the products of activations; free parameters are "
        f"one number for each of theirs; {images_of(run)}",
    )


@study.claim(
    "C3",
    "It converges faster than a residual network",
    paper="convergence figure; the author's log: 90.2 % on CIFAR-10 after 10 epochs",
    holds=at_most(1.0),
    unit="epochs to 95 % training accuracy / those of the residual network",
)
def converges(run: Run) -> Measurement:
    nets = {
        f"{title}, {name}": run.each_seed(train, network=network, optimizer=name)
        for title, network in (("Terminator", "Terminator"), ("residual network", "residual"))
        for name in OPTIMIZERS
    }
    smooth = run.each_seed(train, network="Terminator", optimizer="AdamW", omega0=20.0)
    run.figure(curves({**nets, "Terminator, AdamW, omega0 = 20": smooth}))
    reached = {name: [epochs_to(each, 95.0) for each in runs] for name, runs in nets.items()}
    ours, theirs = (
        min((name for name in nets if name.startswith(prefix)), key=lambda name: statistics.fmean(reached[name]))
        for prefix in ("Terminator", "residual")
    )
    return compare(
        reached[ours],
        reached[theirs],
        how="ratio",
        also={f"epochs of the {name}": statistics.fmean(epochs) for name, epochs in reached.items()}
        | {"epochs of the Terminator, AdamW, omega0 = 20": statistics.fmean(epochs_to(each, 95.0) for each in smooth)},
        note=f"the fastest optimiser of each: {ours}; {theirs}; what never got there counts as one epoch more than all "
        "there were; training accuracy is that of the batches as they were seen",
    )


@study.claim(
    "C4",
    "Features have zero mean: each group of channels over the batch or in each sample",
    paper="figure of feature statistics",
    kind="exact",
    holds=at_most(1e-5),
    unit="largest absolute mean after G-IBS",
)
def has_zero_means(run: Run) -> Measurement:
    torch.manual_seed(0)
    net = terminator(run).to(run.device)
    means: list[dict[str, Any]] = []

    def record(block: int) -> Callable[..., None]:
        def hook(norm: GroupInstanceBatchStd, args: Any, y: Tensor) -> None:
            groups = y.detach().double().unflatten(1, (norm.groups, -1)).flatten(3)
            by_batch, by_sample = groups[:, ::2].mean((0, 3)), groups[:, 1::2].mean(3)
            for kind, values in (("over the batch", by_batch), ("in each sample", by_sample)):
                means.append({"block": block, "kind": kind, "mean": float(values.abs().max())})

        return hook

    norms = [module for module in net.modules() if isinstance(module, GroupInstanceBatchStd)]
    for i, norm in enumerate(norms, 1):
        norm.register_forward_hook(record(i))
    with torch.no_grad():
        net(images(run, "train", run.setting.batch)[0].to(run.device))
    chart = alt.Chart(alt.Data(values=means)).mark_point(filled=True, size=90).encode(
        x=alt.X("mean:Q", title="largest absolute mean of a channel", scale=alt.Scale(type="log"),
                axis=alt.Axis(format=".0e")),
        y=alt.Y("block:O", title="block"),
        color=alt.Color("kind:N", title="standardised", legend=alt.Legend(orient="bottom")),
    )  # fmt: skip
    rule = alt.Chart(alt.Data(values=[{"bound": 1e-5}])).mark_rule(strokeDash=[4, 4]).encode(x="bound:Q")
    run.figure((chart + rule).properties(width="container", height=200))
    return Measurement(max(each["mean"] for each in means), note=f"single precision; {images_of(run)}")


@study.claim(
    "C5",
    "The slow neural loss aligns the kernels of all blocks and does not hurt accuracy",
    paper="figure of pixel-level scores",
    holds=at_most(0.3),
    unit="final distance of the kernels with the loss / without",
    also={"accuracy with minus without (points)": between(-1.0, 1.0)},
)
def aligns_kernels(run: Run) -> Measurement:
    aligned = run.each_seed(train, network="Terminator", optimizer="Kar3")
    free = run.each_seed(train, network="Terminator", optimizer="Kar3", slow=0.0)
    run.figure(distances({"with the loss": aligned, "without": free}))
    return compare(
        [each.distance for each in aligned],
        [each.distance for each in free],
        how="ratio",
        also={"accuracy with minus without (points)": compare(tests(aligned), tests(free)).value},
        note="trained with Kar3, weights 1 and 0; the distance is the slow neural loss itself",
    )


@study.claim(
    "C6",
    "Parameters do not grow with the kernel, but for the maps p of one number a pixel",
    paper="the idea of slow and fast networks",
    kind="exact",
    holds=equals(0.0),
    unit="further parameters at twice the size",
)
def does_not_grow(run: Run) -> Measurement:
    size = run.setting.size
    counts = {}
    for side in (size, 2 * size):
        net, free = terminator(run, size=side), terminator(run, size=side, pixel_bias=False)
        maps = sum(each.numel() for name, each in net.named_parameters() if name.endswith("pixel_bias"))
        # Maps over channels and over local windows stay as they are when the image grows.
        counts[side] = (parameters(net), maps, parameters(free))
    small, large = counts[size], counts[2 * size]
    growth = (large[0] - large[1]) - (small[0] - small[1])
    dense = {side: sum(width * side**2 for width in widths(run)) for side in counts}
    bars = [
        {"size": f"{side}x{side}", "what": what, "parameters": count}
        for side, (total, maps, _) in counts.items()
        for what, count in (
            ("everything but the maps p", total - maps),
            ("maps p", maps),
            ("kernels, were they free parameters", dense[side]),
        )
    ]
    run.figure(
        alt.Chart(alt.Data(values=bars)).mark_bar().encode(
            y=alt.Y("what:N", title=None, sort=None),
            x=alt.X("parameters:Q", title="parameters"),
            row=alt.Row("size:N", title=None, sort=None, header=alt.Header(labelAngle=0, labelAlign="left")),
            color=alt.Color("what:N", legend=None, sort=None),
        ).properties(width="container", height=90)
    )  # fmt: skip
    return Measurement(
        float(abs(growth) + abs(large[2] - small[2])),
        also={"parameters": small[0], "at twice the size": large[0], "of them maps p": large[1]},
        note=f"{size}x{size} and {2 * size}x{2 * size} pixels, with maps p set apart, and without any",
    )


@study.claim(
    "C7",
    "One block sees the whole image; the product of matrices alone sees a row and a column",
    paper="title; 'full context interaction'",
    kind="exact",
    holds=equals(1.0),
    unit="share of pairs of pixels that depend on one another",
    also={"the product's share is (2H - 1) / H^2 within": at_most(0.0)},
)
def sees_everything(run: Run) -> Measurement:
    side = run.setting.jacobian
    torch.manual_seed(0)
    block = SFNEBlock(2, 6, side, local_sizes=run.setting.local_sizes).double()
    x = torch.randn(1, 2, side, side, dtype=torch.float64, generator=run.generator(0))
    of_block = reach(lambda x: block(x.expand(2, -1, -1, -1))[:1], x)
    of_product = reach(lambda x: apply_weights(x, x), x)
    of_convolution = reach(lambda x: apply_weights(x, x, "convolution"), x)
    pixel = (side // 2) * side + side // 3
    table = [
        {"what": what, "row": i // side, "column": i % side, "strength": float(seen[pixel, i])}
        for what, seen in (("the product alone", of_product), ("the block", of_block))
        for i in range(side**2)
    ]
    run.figure(
        alt.Chart(alt.Data(values=table)).mark_rect(stroke="white", strokeWidth=1).encode(
            x=alt.X("column:O", title=None, axis=None),
            y=alt.Y("row:O", title=None, axis=None),
            color=alt.Color("strength:Q", title="influence on one pixel", scale=alt.Scale(type="sqrt", scheme="blues"),
                            legend=alt.Legend(orient="bottom")),
            column=alt.Column("what:N", title=None, sort=None),
        ).properties(width=220, height=220)
    )  # fmt: skip
    shares = {name: float((seen > 0).double().mean()) for name, seen in
              (("block", of_block), ("product", of_product), ("convolution", of_convolution))}  # fmt: skip
    rows, columns = torch.arange(side**2) // side, torch.arange(side**2) % side
    cross = (rows[:, None] == rows) | (columns[:, None] == columns)
    wrong = float(((of_product > 0) != cross).sum()) + abs(shares["product"] - (2 * side - 1) / side**2)
    return Measurement(
        shares["block"],
        also={
            "the product's share is (2H - 1) / H^2 within": wrong,
            "the product's share": shares["product"],
            "share of the convolution by FFT": shares["convolution"],
        },
        note=f"{side}x{side} pixels; a block's sample stands beside a copy of itself in the batch",
    )


# --- networks ---


def terminator(
    run: Run, *, size: int | None = None, skips: bool = True, pixel_bias: bool = True, omega0: float = 2000.0
) -> Terminator:
    setting = run.setting
    hidden, small = setting.hidden
    return Terminator(
        images(run, "train", 1)[0].shape[1],
        10,
        size or setting.size,
        setting.factors,
        dropout=setting.dropout,
        hidden=hidden,
        local_hidden=small,
        channel_hidden=small,
        interaction_hidden=16,
        local_sizes=setting.local_sizes,
        skips=None if skips else [()] * len(setting.factors),
        pixel_bias=pixel_bias,
        omega0=omega0,
    )


def widths(run: Run) -> list[int]:
    """Channels of each block's kernel."""
    return [block.channels for block in terminator(run).blocks if isinstance(block, SFNEBlock)]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(width, width), nn.ReLU(), *conv_bn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def conv_bn(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)


def baseline(run: Run, network: str) -> nn.Module:
    """Six convolutions, or one and five residual blocks, at full resolution and of the size of our network."""
    width, channels = run.setting.baseline_widths[network], images(run, "train", 1)[0].shape[1]
    body = [*conv_bn(channels, width), nn.ReLU()]
    for _ in range(5):
        body += [Residual(width)] if network == "residual" else [*conv_bn(width, width), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class Given(nn.Module):
    """Stands in for a slow net: a kernel of ones, or of free parameters that start as the net's own kernel."""

    def __init__(self, net: nn.Module, kind: str) -> None:
        super().__init__()
        with torch.no_grad():
            if isinstance(net, ContextSlowNet):
                kernel = net.train()(torch.zeros(1, net.out_channels, *net.size))
                ones = torch.full_like(kernel, 1 / kernel[0].numel())  # a local mean, which keeps the scale
            else:
                assert isinstance(net, SlowNet)
                kernel = net()
                ones = torch.ones_like(kernel)
        self.kernel = nn.Parameter(kernel.clone(), requires_grad=True) if kind == "free" else None
        self.register_buffer("ones", ones if kind == "ones" else None)

    def forward(self, *_: Any) -> Tensor:
        kernel = self.ones if self.kernel is None else self.kernel
        assert isinstance(kernel, Tensor)
        return kernel


def train(
    run: Run,
    seed: int,
    network: str = "Terminator",
    optimizer: str = "Kar3",
    slow: float = 1.0,
    kernels: str = "generated",
    omega0: float = 2000.0,
) -> Trained:
    """One network, from its seed to its last epoch."""
    setting = run.setting
    net: nn.Module
    net = (
        terminator(run, skips=network == "Terminator", omega0=omega0)
        if network in ("Terminator", "no skips")
        else baseline(run, network)
    )
    if kernels != "generated":
        swap(net, {kind: lambda each: Given(each, kernels) for kind in (SlowNet, ContextSlowNet)})
    seen: list[tuple[int, int]] = []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        value = F.cross_entropy(logits, labels, label_smoothing=0.1)
        if net.training:
            seen.append((int((logits.argmax(1) == labels).sum()), len(labels)))
            if isinstance(net, Terminator):
                value = value + setting.penalty * norm_penalty(net)
                if slow and kernels == "generated":
                    value = value + slow * net.slow_loss()
        return value

    data = images(run, "train", setting.train)
    fit(
        net,
        data,
        loss=loss,
        optimizer=lambda trained: OPTIMIZERS[optimizer](trained, lr=setting.rates[optimizer]),
        schedule=cosine(warmup=setting.warmup),
        epochs=setting.epochs,
        batch_size=setting.batch,
        augment=None if setting.data == "digits" else cropped_and_mirrored,
        seed=seed,
        device=run.device,
        progress=lambda now: run.progress(f"{network}, {optimizer}, seed {seed}", now.step, now.total),
    )
    steps = len(seen) // setting.epochs
    epochs = [seen[i * steps : (i + 1) * steps] for i in range(setting.epochs)]
    accuracies = [100 * sum(hits for hits, _ in each) / sum(count for _, count in each) for each in epochs]
    distance = 0.0
    if isinstance(net, Terminator) and kernels == "generated":
        with torch.no_grad():
            distance = float(slow_neural_loss(net.kernels()))
    return Trained(test_accuracy(run, net), accuracies, parameters(net), distance)


def test_accuracy(run: Run, net: nn.Module) -> float:
    """In batches of the training's size: without running statistics, that is part of the network."""
    x, labels = images(run, "test", run.setting.test)
    net.eval()
    with torch.no_grad():
        found = torch.cat([net(part.to(run.device)).argmax(1).cpu() for part in x.split(run.setting.batch)])
    return 100 * float((found == labels).double().mean())


def images(run: Run, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Standardised images and their labels."""
    data = run.data(run.setting.data, split)
    scale = run.data(run.setting.data, "train").float()
    data = data.subset(min(count, len(data)))
    mean, deviation = scale.mean((0, 2, 3), keepdim=True), scale.std((0, 2, 3), keepdim=True)
    return ((data.float() - mean) / deviation).contiguous(), data.labels


def images_of(run: Run) -> str:
    train, test = (len(images(run, split, 10**9)[1][: getattr(run.setting, split)]) for split in ("train", "test"))
    return f"{run.setting.data}, {train:,} images to train on and {test:,} to test"


def cropped_and_mirrored(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored with probability 1/2, and the batch moved by up to four pixels."""
    mirrored = torch.rand(len(x), generator=generator).to(x.device) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    down, right = torch.randint(0, 9, (2,), generator=generator).tolist()
    padded = F.pad(x, (4, 4, 4, 4), mode="reflect")
    return padded[..., down : down + x.shape[-2], right : right + x.shape[-1]]


def reach(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """How strongly each output pixel depends on each input pixel, summed over channels: (pixels, pixels)."""
    jacobian = torch.autograd.functional.jacobian(function, x)
    outputs, side = jacobian.shape[1], x.shape[-1]
    return jacobian.view(outputs, side**2, x.shape[1], side**2).abs().sum((0, 2))


# --- reading the results ---


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def tests(runs: list[Trained]) -> list[float]:
    return [each.test for each in runs]


def best(nets: dict[str, list[Trained]], prefix: str) -> str:
    """Of one network's optimisers the one with the better training accuracy at the end; the test set has no say."""
    names = [name for name in nets if name.startswith(prefix)]
    return max(names, key=lambda name: statistics.fmean(each.train[-1] for each in nets[name]))


def best_of(run: Run, network: str) -> list[Trained]:
    nets = {name: run.each_seed(train, network=network, optimizer=name) for name in OPTIMIZERS}
    return nets[best(nets, "")]


def epochs_to(trained: Trained, accuracy: float) -> float:
    return next((i for i, each in enumerate(trained.train, 1) if each >= accuracy), len(trained.train) + 1.0)


def strips(nets: dict[str, list[Trained]], title: str) -> alt.LayerChart:
    """A point a seed, and a tick at the mean."""
    values = [
        {"network": name, "seed": seed, "score": round(each.test, 3)}
        for name, runs in nets.items()
        for seed, each in enumerate(runs)
    ]
    base = alt.Chart(alt.Data(values=values)).encode(y=alt.Y("network:N", title=None, sort=list(nets)))
    points = base.mark_point(filled=True, size=70, opacity=0.7).encode(
        x=alt.X("score:Q", title=title, scale=alt.Scale(zero=False)), tooltip=["network:N", "seed:Q", "score:Q"]
    )
    means = base.mark_tick(thickness=2, size=24).encode(x="mean(score):Q")
    return (points + means).properties(width="container", height=36 * len(nets) + 20)


def curves(nets: dict[str, list[Trained]]) -> alt.LayerChart:
    """Training accuracy epoch by epoch, the mean over seeds; the rule is what has to be reached."""
    values = [
        {"network": name, "epoch": epoch, "accuracy": round(statistics.fmean(each), 2)}
        for name, runs in nets.items()
        for epoch, each in enumerate(zip(*(trained.train for trained in runs)), 1)
    ]
    lines = alt.Chart(alt.Data(values=values)).mark_line().encode(
        x=alt.X("epoch:Q", title="epoch", axis=alt.Axis(tickMinStep=1)),
        y=alt.Y("accuracy:Q", title="training accuracy (%)", scale=alt.Scale(zero=False)),
        color=alt.Color("network:N", title=None, sort=list(nets), legend=alt.Legend(orient="bottom", columns=2)),
    )  # fmt: skip
    rule = alt.Chart(alt.Data(values=[{"bound": 95.0}])).mark_rule(strokeDash=[4, 4]).encode(y="bound:Q")
    return (lines + rule).properties(width="container", height=260)


def distances(nets: dict[str, list[Trained]]) -> alt.Chart:
    values = [
        {"network": name, "seed": seed, "distance": each.distance, "accuracy": round(each.test, 2)}
        for name, runs in nets.items()
        for seed, each in enumerate(runs)
    ]
    return (
        alt.Chart(alt.Data(values=values))
        .mark_point(filled=True, size=90)
        .encode(
            x=alt.X(
                "distance:Q",
                title="distance of the kernels of all blocks",
                scale=alt.Scale(type="log", padding=20),
                axis=alt.Axis(format=".0e"),
            ),
            y=alt.Y("accuracy:Q", title="test accuracy (%)", scale=alt.Scale(zero=False, padding=20)),
            color=alt.Color("network:N", title="trained", sort=list(nets), legend=alt.Legend(orient="bottom")),
            tooltip=["network:N", "seed:Q", "distance:Q", "accuracy:Q"],
        )
        .properties(width="container", height=260)
    )
