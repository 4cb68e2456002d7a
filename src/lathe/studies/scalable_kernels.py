"""Can features of inputs times features of parameters stand in for layers, adapters and whole networks?"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import altair as alt
import torch
from torch import Tensor, nn
from torch.nn import functional

from lathe.core.size import stored_bytes
from lathe.nn import scalable_kernels as sk
from lathe.studies.engine import (
    Measurement,
    NotAtThisScale,
    Run,
    Setting,
    Study,
    at_least,
    at_most,
    average,
    between,
    compare,
)
from lathe.training import cosine, fit

SMALL: dict[str, Any] = {
    "draws": 10,
    "samples": 400_000,
    "features_data": "digits",
    "m": 512,
    "adapt_data": "digits",
    "width": 128,
    "rank": 24,
    "equal_rank": 8,
    "adapter_features": (16, 64),
    "snnk_bottleneck": 12,
    "pooler_data": "mnist",
    "vit": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 2},
}

study = Study(
    "scalable-kernels",
    title="Scalable Neural Network Kernels",
    authors="Sehanobish, Choromanski, Zhao, Dubey, Likhosherstov",
    year=2023,
    arxiv="2310.13225",
    area="nn",
    module="lathe.nn.scalable_kernels",
    summary="""Writes a layer as features of its input times features of its parameters: adapters with a fifth of the
    trained parameters inside a frozen transformer, and whole networks bundled into one matrix that is solved for
    without backpropagation.""",
    example="""
import torch
from torch import nn
from lathe.nn.scalable_kernels import add_adapters, bundle, trainable_parameters

net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
x, y = torch.randn(500, 64), torch.randint(10, (500,))
small = bundle(net, num_features=40, data=x).fit(x, y)             # all hidden layers in one 10 x 80 matrix, solved for
assert sum(p.numel() for p in small.parameters()) == 810
tuned = add_adapters(net, where=lambda name: name in ("0", "2"))   # the rest is frozen, outputs are as they were
assert torch.equal(tuned(x), net(x)) and sum(p.numel() for p in trainable_parameters(tuned)) == 4_352
""",
    job="build",
    scales={
        "smoke": Setting(
            seeds=1,
            sizes=(16, 64, 256, 1024),
            repeats=60,
            mlp_epochs=1,
            rates=(1e-2,),
            adapter_epochs=2,
            pooler_train=1000,
            pooler_epochs=1,
            vit_epochs=1,
            **SMALL,
        ),
        "desk": Setting(
            seeds=5,
            sizes=(16, 64, 256, 1024, 4096),
            repeats=300,
            mlp_epochs=40,
            rates=(1e-2, 2e-2),
            adapter_epochs=40,
            pooler_train=20_000,
            pooler_epochs=6,
            vit_epochs=12,
            **SMALL,
        ),
        "full": Setting(
            seeds=5,
            sizes=(16, 64, 256, 1024, 4096, 16384),
            draws=20,
            samples=4_000_000,
            repeats=1000,
            features_data="cifar10",
            m=16_384,
            mlp_epochs=40,
            adapt_data="mnist",
            width=768,
            rank=48,
            equal_rank=8,
            adapter_features=(16, 64),
            snnk_bottleneck=15,
            rates=(1e-3, 3e-3, 1e-2),
            adapter_epochs=20,
            pooler_data="mnist",
            pooler_train=60_000,
            pooler_epochs=20,
            vit={"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "patch_size": 4},
            vit_epochs=20,
        ),
    },
)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "cos": torch.cos,
    "sin": torch.sin,
    "gauss": lambda z: torch.exp(-z.square() / 2),
    "sech": lambda z: 1 / torch.cosh(z),
}


@study.claim(
    "C1",
    "Universal random features estimate a layer without bias, with an error that falls as m^(-1/2)",
    paper="unbiasedness of URFs and the figure on pointwise estimation",
    kind="exact",
    holds=between(-0.6, -0.4),
    unit="slope of log error over log m, the one farthest from -1/2",
    also={"largest z-score of the mean error": at_most(4.0)},
)
def estimates_layers(run: Run) -> Measurement:
    x, w = on_sphere(50, 16, run.generator(0)), on_sphere(40, 16, run.generator(1))
    table, slopes, scores = [], {}, []
    for done, (name, f) in enumerate(FUNCTIONS.items()):
        truth = f(x @ w.T)
        estimators: tuple[tuple[Any, str], ...] = (
            (0.0, "M = 0 (paper)"),
            ("auto", "M and frequencies at their optimum"),
        )
        for M, told in estimators:
            errors, shifts = [], []
            for m in run.setting.sizes:
                made = [sk.URF(name, 16, m, M=M, seed=seed, dtype=torch.float64) for seed in range(run.setting.draws)]
                wrong = [each.phi(x) @ each.psi(w).T - truth for each in made]
                errors.append(statistics.fmean(float(each.norm() / truth.norm()) for each in wrong))
                shifts += [math.sqrt(m) * float(each.mean()) for each in wrong]
                table.append({"m": m, "error": errors[-1], "function": name, "estimator": told})
            slope = statistics.linear_regression([math.log(m) for m in run.setting.sizes], [*map(math.log, errors)])[0]
            slopes[f"{name}, {told}"] = slope
            if M == "auto":
                scores.append(abs(statistics.fmean(shifts)) / (statistics.stdev(shifts) / math.sqrt(len(shifts))))
        run.progress("estimating layers", done + 1, len(FUNCTIONS))
    best = {name: slope for name, slope in slopes.items() if "paper" not in name}
    run.figure(error_over_features(table))
    return Measurement(
        max(best.values(), key=lambda slope: abs(slope + 0.5)),
        also={"largest z-score of the mean error": max(scores)} | {f"slope, {k}": v for k, v in slopes.items()},
        seeds=run.setting.draws,
        note="d = 16, norms 1, 50 x 40 pairs; damping and frequencies by the variance formula. With the paper's M = 0 "
        "the variance for sech is infinite where |x + w|^2 > pi/2, and its error falls more slowly",
    )


@study.claim(
    "C2",
    "The variance of a draw is known in closed form, and so is the best M; orthogonal directions are better",
    paper="derived from the generalised exponential features that URFs are built on; orthogonality: appendix",
    kind="exact",
    holds=at_most(0.02),
    unit="relative difference of E|z|^2 to samples, at worst",
    also={
        "M at optimum against a numeric minimum": at_most(1e-6),
        "variance, orthogonal / independent": at_most(0.999),
    },
)
def knows_its_variance(run: Run) -> Measurement:
    from scipy.optimize import brentq

    d, generator = 16, run.generator(0)
    x, w = on_sphere(1, d, generator)[0], on_sphere(1, d, generator)[0]
    worst, table = 0.0, []
    s = 1.0
    xi = s / (2 * math.pi * float((x + w).square().sum()))
    best = float(sk.optimal_damping(s, d))
    for M in (0.0, best, 2 * best):
        sampled = sampled_second_moment(x, w, xi, M, run.setting.samples, generator)
        known = float(sk.second_moment(s, d, M))
        worst = max(worst, abs(sampled / known - 1))
        table.append({"M": M, "moment": sampled, "what": "samples"})
    curve = [3 * best * i / 60 for i in range(61)]
    table += [{"M": M, "moment": float(sk.second_moment(s, d, M)), "what": "formula"} for M in curve]
    gaps = []
    for each in (0.1, 1.0, 10.0, 50.0):
        for dimension in (2, 16, 64):
            optimum = float(sk.optimal_damping(each, dimension))
            found = brentq(slope_of_moment, 0.0, 3 * optimum, args=(each, dimension), xtol=1e-12)
            gaps.append(abs(found - optimum))
    xs, ws = on_sphere(50, d, generator), on_sphere(50, d, generator)
    spread = {}
    for orthogonal in (True, False):
        wrong = []
        for name in ("cos", "sin"):  # real and imaginary part of a complex draw
            truth = FUNCTIONS[name]((xs * ws).sum(1))
            for seed in range(run.setting.repeats):
                made = sk.URF(name, d, d, orthogonal=orthogonal, seed=seed, dtype=torch.float64)
                wrong.append((made.phi(xs) * made.psi(ws)).sum(1) - truth)
        spread[orthogonal] = float(torch.stack(wrong).square().mean())
    run.figure(moment_over_damping(table, best))
    return Measurement(
        worst,
        also={
            "M at optimum against a numeric minimum": max(gaps),
            "variance, orthogonal / independent": spread[True] / spread[False],
        },
        note=f"{run.setting.samples:,} samples; m = d = 16, 50 pairs, {run.setting.repeats} sets of directions, "
        "complex draws (cos and sin together); for cos alone, near w^T x = 0, orthogonality changes next to nothing: "
        "what it takes from the variance is in the sine",
    )


@study.claim(
    "C3",
    "SNNKs are more expressive: the arc-cosine layer is no function of w^T x",
    paper="section on ReLU-SNNKs",
    kind="exact",
    holds=at_least(0.1),
    unit="relative difference at equal w^T x",
    also={"closed form against features": at_most(0.01)},
)
def is_more_expressive(run: Run) -> Measurement:
    x = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]], dtype=torch.float64)
    w = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.0, 1.0]], dtype=torch.float64)
    assert torch.equal((x * w).sum(1), torch.full((2,), 0.5, dtype=torch.float64))
    kernel = sk.arccos_kernel(x, w).diagonal()
    made = sk.ArcCosFeatures(3, 1_000_000, orthogonal=False, seed=0, dtype=torch.float64)
    estimate = (made.phi(x) * made.psi(w)).sum(1)
    generator = run.generator(0)
    many_x, many_w = (torch.randn(25, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    run.figure(kernel_over_product(many_x, many_w))
    return Measurement(
        float((kernel[1] / kernel[0] - 1).abs()),
        also={"closed form against features": float((estimate / kernel - 1).abs().max())},
        note=f"w^T x = 0.5 twice, kernel {float(kernel[0]):.4f} and {float(kernel[1]):.4f}; 1,000,000 features",
    )


@dataclass(frozen=True)
class Scored:
    """Test accuracy in percent, trained parameters (without a head), seconds of training, change at its start."""

    accuracy: float
    parameters: int
    seconds: float = 0.0
    change: float = 0.0


@study.claim(
    "C4",
    "A fully bundled network with explicit parameters is competitive, without backpropagation",
    paper="section on bundling, closed-form optimum; regression experiments",
    holds=at_least(-0.5),
    unit="percentage points, one hidden layer bundled minus MLP",
    also={
        "two hidden layers bundled minus MLP": at_least(-0.5),
        "the worse of both minus linear ridge": at_least(2.0),
        "seconds, MLP / bundled": at_least(10.0),
    },
)
def needs_no_backpropagation(run: Run) -> Measurement:
    found = {
        name: run.each_seed(solve_or_train, method=name) for name in ("linear ridge", "MLP", "bundled", "bundled twice")
    }
    scores = {name: [each.accuracy for each in runs] for name, runs in found.items()}
    seconds = {name: statistics.median(each.seconds for each in runs) for name, runs in found.items()}
    run.figure(strips(found))
    against_linear = [compare(scores[name], scores["linear ridge"]).value for name in ("bundled", "bundled twice")]
    return compare(
        scores["bundled"],
        scores["MLP"],
        also={
            "two hidden layers bundled minus MLP": compare(scores["bundled twice"], scores["MLP"]).value,
            "the worse of both minus linear ridge": min(against_linear),
            "seconds, MLP / bundled": seconds["MLP"] / seconds["bundled"],
            "seconds, MLP / bundled twice": seconds["MLP"] / seconds["bundled twice"],
        },
        note=", ".join(f"{name} {statistics.fmean(values):.1f} %" for name, values in scores.items())
        + f"; m = {run.setting.m} ReLU features a layer, ridge 1e-4, a random 70/30 split a seed",
    )


@study.claim(
    "C5",
    "SNNK adapters come close to ordinary ones with a fraction of the trained parameters",
    paper="abstract: up to 5x fewer trainable parameters; tables on GLUE and of ViT",
    holds=at_least(0.5),
    unit="share of the gap from head only to the ordinary adapter",
    also={"parameters, ordinary adapter / SNNK": at_least(2.8)},
)
def adapts_with_few_parameters(run: Run) -> Measurement:
    measured = adapter_measurement(run, run.each_seed(fine_tune, vit=False))
    tried = (
        "the plain SNNK is held back by directions that are fixed at random: a LayerNorm before them, whose gain "
        "steers what they see, or a bottleneck behind, variants of the paper and of the same size here, close most "
        "of the gap. Tried beside, with little change: N(0, 0.02) at the start, independent instead of orthogonal "
        "directions, centred or standardized inputs, directions drawn from the covariance of the inputs, cosines and "
        "sines; rates up to 4e-2 help the SNNK and the head alone alike"
    )
    return dataclasses.replace(measured, note=f"{measured.note}; {tried}")


@study.claim(
    "C6",
    "A bundled pooler and classifier need a small part of the parameters at similar accuracy",
    paper="BERT's pooler and classifier bundled: about 30x fewer parameters",
    holds=at_most(1.0),
    unit="percentage points of accuracy lost",
    also={"parameters of the replaced part / of A": at_least(20.0)},
)
def bundles_the_pooler(run: Run) -> Measurement:
    runs = run.each_seed(bundle_pooler)
    last = [rows[-1] for rows in runs]
    run.figure(accuracy_over_size(runs))
    return average(
        [row["original"] - row["outputs"] for row in last],
        baseline=statistics.fmean(row["original"] for row in last),
        also={
            "parameters of the replaced part / of A": last[0]["replaced"] / last[0]["parameters"],
            "lost with A fitted to the labels": statistics.fmean(row["original"] - row["labels"] for row in last),
            "lost by a linear readout in its place": statistics.fmean(r["original"] - r["linear"] for r in last),
            "stored bytes of the replaced part / of A and its directions": last[0]["bytes"],
        },
        note=f"{run.setting.pooler_data} in place of Fashion-MNIST, which is not at hand; last hidden tanh layer and "
        f"head of 784-256-256-10 replaced by A ({last[0]['parameters']:,} numbers), by ridge on the network's outputs; "
        "fitted to one-hot labels instead, A lost 1.1 points in a first run on all 60,000 images. Directions are "
        "products of signs and Hadamard matrices, a byte a sign; as a dense matrix, they need more bytes than what A "
        "replaces",
    )


@study.claim(
    "C7",
    "SNNK adapters work the same inside a transformer of Hugging Face",
    paper="adapters in BERT and ViT; abstract: up to 5x fewer trainable parameters",
    holds=at_least(0.5),
    unit="share of the gap from head only to the ordinary adapter",
    also={
        "change of the output when adapters are put in": at_most(0.0),
        "parameters at d = 768, bottleneck 48 / SNNK 16": at_least(5.0),
    },
)
def adapts_transformers(run: Run) -> Measurement:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise NotAtThisScale("transformers is not installed: pip install transformers") from None
    runs = run.each_seed(fine_tune, vit=True)
    measured = adapter_measurement(run, runs)
    plain, ours = (sum(p.numel() for p in m.parameters()) for m in (sk.BottleneckAdapter(768), sk.SNNKAdapter(768)))
    also = {
        "change of the output when adapters are put in": max(each["SNNK"].change for each in runs),
        "parameters at d = 768, bottleneck 48 / SNNK 16": plain / ours,
    }
    blocks, width = run.setting.vit["num_hidden_layers"], run.setting.vit["hidden_size"]
    note = f"a ViT of {blocks} blocks of width {width}, adapters behind the feed-forward layers; {measured.note}"
    return dataclasses.replace(measured, also=also | dict(measured.also), note=note)


# --- experiments ---


def on_sphere(count: int, dimension: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(count, dimension, dtype=torch.float64, generator=generator)
    return x / x.norm(dim=1, keepdim=True)


def sampled_second_moment(x: Tensor, w: Tensor, xi: float, M: float, samples: int, generator: torch.Generator) -> float:
    """Mean of |L(g, rho x) L(g, rho w)|^2 over draws of g, from the definition in complex numbers."""
    rho, d, total = torch.tensor(2j * math.pi * xi).to(torch.complex128).sqrt(), len(x), 0.0
    for start in range(0, samples, 100_000):
        g = torch.randn(min(100_000, samples - start), d, dtype=torch.float64, generator=generator)
        z = torch.ones(len(g), dtype=torch.complex128)
        for u in (x, w):
            exponent = -M * g.square().sum(1) + math.sqrt(1 + 4 * M) * rho * (g @ u) - rho**2 * (u @ u) / 2
            z = z * (1 + 4 * M) ** (d / 4) * exponent.exp()
        total += float(z.abs().square().sum())
    return total / samples


def slope_of_moment(M: float, s: float, dimension: int) -> float:
    """Derivative of the logarithm of the second moment in M, by autograd."""
    at = torch.tensor(M, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(sk.second_moment(s, dimension, at).log(), at)
    return float(slope)


def whole(run: Run, name: str) -> tuple[Tensor, Tensor]:
    """Inputs in [0, 1] as vectors and labels, training and test part together."""
    parts = [run.data(name, split) for split in ("train", "test")]
    x = torch.cat([part.float().flatten(1) for part in parts])
    return x, torch.cat([part.labels for part in parts]).long()


def split(count: int, share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    order = torch.randperm(count, generator=generator)
    return order[: round(share * count)], order[round(share * count) :]


def percent(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        outputs = torch.cat([logits_of(network(part)) for part in x.split(2000)])
    return 100 * float((outputs.argmax(1) == y).float().mean())


def logits_of(output: Any) -> Tensor:
    return getattr(output, "logits", output)


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def solve_or_train(run: Run, seed: int, method: str) -> Scored:
    """C4: one way to a classifier on images."""
    setting = run.setting
    x, y = whole(run, setting.features_data)
    train, test = split(len(x), 0.7, run.generator(seed))
    x, y = x.to(run.device), y.to(run.device)
    inputs, classes = x.shape[1], int(y.max()) + 1
    begun = time.perf_counter()
    net: nn.Module
    if method == "MLP":
        net = mlp(inputs, 128, 128, classes)
        training(run, net, x[train], y[train], 1e-3, setting.mlp_epochs, seed)
    elif method == "linear ridge":
        net = sk.BundledNetwork([], torch.zeros(classes, inputs), torch.zeros(classes)).to(run.device)
        net.fit(x[train], y[train], 1e-4)
    else:
        start = mlp(inputs, *[128] * (2 if method == "bundled twice" else 1), classes).to(run.device)
        net = sk.bundle(start, setting.m, x[train], refit=False, seed=seed).fit(x[train], y[train], 1e-4)
    seconds = time.perf_counter() - begun
    parameters = sum(parameter.numel() for parameter in net.parameters())
    return Scored(percent(net, x[test], y[test]), parameters, seconds)


def training(run: Run, net: nn.Module, x: Tensor, y: Tensor, rate: float, epochs: int, seed: int) -> None:
    fit(
        net,
        (x, y),
        loss=lambda output, target: functional.cross_entropy(logits_of(output), target),
        optimizer=torch.optim.Adam(sk.trainable_parameters(net), lr=rate),
        schedule=cosine(),
        epochs=epochs,
        batch_size=32 if len(x) < 5000 else 100,
        seed=seed,
        device=run.device,
    )


def halves(run: Run, seed: int, vit: bool) -> tuple[tuple[Tensor, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Images of the lower five classes to pretrain on; of the upper five for training, choosing a rate, and testing."""
    x, y = whole(run, run.setting.adapt_data)
    if vit:
        side = math.isqrt(x.shape[1])
        x = x.view(-1, 1, side, side)
    lower, upper = y < 5, y >= 5
    x_new, y_new = x[upper], y[upper] - 5
    learn, test = split(len(x_new), 0.7, run.generator(100 + seed))
    kept = round(0.85 * len(learn))
    parts = {"train": learn[:kept], "choose": learn[kept:], "test": test}
    device = run.device
    return (x[lower].to(device), y[lower].to(device)), {
        name: (x_new[rows].to(device), y_new[rows].to(device)) for name, rows in parts.items()
    }


def fine_tune(run: Run, seed: int, vit: bool) -> dict[str, Scored]:
    """C5 and C7: a network pretrained on the lower five classes learns the upper five in several ways.

    The learning rate is chosen by held-out images, for every way alike.
    """
    setting = run.setting
    (x, y), parts = halves(run, seed, vit)
    epochs, rates = (setting.vit_epochs, (1e-2,)) if vit else (setting.adapter_epochs, setting.rates)
    torch.manual_seed(seed)
    start: Any
    if vit:
        start = vision_transformer(x.shape[-1], setting.vit)
        head, chosen = "classifier", lambda name: "attention" not in name and name.endswith(("mlp.fc2", "output.dense"))
    else:
        start = mlp(x.shape[1], setting.width, setting.width, 5)
        head, chosen = "4", lambda name: name in ("1", "3")
    training(run, start, x, y, 1e-3, epochs, seed)
    start.get_submodule(head).reset_parameters()

    few, many = setting.adapter_features
    ways: dict[str, Callable[..., nn.Module] | None] = {
        "head only": None,
        "SNNK": partial(sk.SNNKAdapter, num_features=few),
        # Variants of the paper of the same size: the LayerNorm costs as much as two features.
        "SNNK, LayerNorm before": partial(sk.SNNKAdapter, num_features=few - 2, norm="before"),
        "SNNK, bottleneck": partial(sk.SNNKAdapter, num_features=3 * few, bottleneck=setting.snnk_bottleneck),
        "SNNK, large": partial(sk.SNNKAdapter, num_features=many),
        "adapter": partial(sk.BottleneckAdapter, bottleneck=setting.rank),
        "adapter of SNNK's size": partial(sk.BottleneckAdapter, bottleneck=setting.equal_rank),
        "everything": None,
    }
    if vit:
        del ways["SNNK, large"], ways["everything"]
    found = {}
    for way, adapter in ways.items():
        tried = []
        for rate in rates:
            torch.manual_seed(seed)
            change = 0.0
            if adapter is not None:
                net = sk.add_adapters(
                    start, where=chosen, adapter=adapter, train=lambda name: name.startswith(head), example_input=x[:1]
                )
                with torch.no_grad():
                    change = float((logits_of(net(x[:50])) - logits_of(start(x[:50]))).abs().max())
            else:
                net = copy.deepcopy(start)
                for name, parameter in net.named_parameters():
                    parameter.requires_grad_(way == "everything" or name.startswith(head))
            trained = [(name, p.numel()) for name, p in net.named_parameters() if p.requires_grad]
            # All of a network takes smaller steps than what starts at zero.
            training(run, net, *parts["train"], rate / 10 if way == "everything" else rate, epochs, seed)
            size = sum(count for name, count in trained if not name.startswith(head))
            tried.append((percent(net, *parts["choose"]), Scored(percent(net, *parts["test"]), size, change=change)))
        found[way] = max(tried, key=lambda each: each[0])[1]
        run.progress(f"fine-tuning, seed {seed}", len(found), len(ways))
    return found


def vision_transformer(side: int, options: dict[str, Any]) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    options = options | {"intermediate_size": 2 * options["hidden_size"], "image_size": side, "num_channels": 1}
    return ViTForImageClassification(ViTConfig(**options, id2label={label: str(label) for label in range(5)}))


def adapter_measurement(run: Run, runs: list[dict[str, Scored]]) -> Measurement:
    """The share of the gap between training the head only and ordinary adapters that SNNK adapters close."""
    run.figure(accuracy_over_parameters(runs))
    mean = {way: statistics.fmean(each[way].accuracy for each in runs) for way in runs[0]}
    sizes = {way: runs[0][way].parameters for way in mean}
    gap = mean["adapter"] - mean["head only"]

    def shares(way: str) -> list[float]:
        return [(each[way].accuracy - each["head only"].accuracy) / gap if gap else math.nan for each in runs]

    beside = {f"share, {way}": statistics.fmean(shares(way)) for way in mean if "SNNK" in way and way != "SNNK"}
    table = "; ".join(f"{way} {mean[way]:.1f} % ({sizes[way]:,})" for way in mean)
    return average(
        shares("SNNK"),
        also={"parameters, ordinary adapter / SNNK": sizes["adapter"] / sizes["SNNK"]} | beside,
        note=f"digits 5 to 9 after pretraining on 0 to 4, accuracy (trained parameters without the head): {table}",
    )


def bundle_pooler(run: Run, seed: int) -> list[dict[str, float]]:
    """C6: the last hidden layer and the head of a trained network, replaced by bundles of several sizes."""
    setting = run.setting
    data = {name: run.data(setting.pooler_data, name) for name in ("train", "test")}
    data["train"] = data["train"].subset(min(setting.pooler_train, len(data["train"])))
    (x, y), (x_test, y_test) = (
        (part.float().flatten(1).to(run.device), part.labels.long().to(run.device)) for part in data.values()
    )
    torch.manual_seed(seed)
    net = mlp(x.shape[1], 256, 256, 10, activation=nn.Tanh)
    training(run, net, x, y, 1e-3, setting.pooler_epochs, seed)
    head, tail = net[:2], net[2:]
    with torch.no_grad():
        hidden, hidden_test = head(x), head(x_test)
    replaced = sum(p.numel() for p in tail.parameters())
    linear = sk.BundledNetwork([], torch.zeros(10, 256), torch.zeros(10)).to(run.device).fit(hidden, y)
    rows = []
    for m in (24, 72, 169):
        small = sk.bundle(tail, m, hidden, orthogonal="hadamard", seed=seed)
        outputs = percent(small, hidden_test, y_test)
        small.fit(hidden, y)
        rows.append(
            {
                "original": percent(tail, hidden_test, y_test),
                "outputs": outputs,
                "labels": percent(small, hidden_test, y_test),
                "linear": percent(linear, hidden_test, y_test),
                "replaced": replaced,
                "parameters": sum(p.numel() for p in small.parameters()),
                "bytes": stored_bytes(tail) / stored_bytes(small),
            }
        )
    return rows


# --- figures ---


def error_over_features(table: list[dict[str, Any]]) -> Any:
    """Error over m, both logarithmic, a panel for each estimator; a line of slope -1/2 for the eye."""
    start = max(row["error"] for row in table)
    sizes = sorted({row["m"] for row in table})
    guide = [{"m": m, "error": start * math.sqrt(sizes[0] / m)} for m in (sizes[0], sizes[-1])]
    x = alt.X("m:Q", title="random features m", scale=alt.Scale(type="log", base=2), axis=alt.Axis(values=sizes))
    y = alt.Y("error:Q", title="relative error", scale=alt.Scale(type="log", nice=False, padding=10))
    panels = []
    for told in dict.fromkeys(row["estimator"] for row in table):
        rows = [row for row in table if row["estimator"] == told]
        color = alt.Color("function:N", title=None, sort=list(FUNCTIONS))
        lines = alt.Chart(alt.Data(values=rows)).mark_line(point=True).encode(x=x, y=y, color=color)
        rule = alt.Chart(alt.Data(values=guide)).mark_line(strokeDash=[4, 4], color="gray").encode(x=x, y=y)
        panels.append((rule + lines).properties(title=told, width=280, height=260))
    return alt.hconcat(*panels).resolve_scale(y="shared")


def moment_over_damping(table: list[dict[str, Any]], best: float) -> Any:
    x = alt.X("M:Q", title="damping M", axis=alt.Axis(tickCount=6))
    y = alt.Y("moment:Q", title="second moment of a draw", scale=alt.Scale(zero=False))
    curve, points = ([row for row in table if row["what"] == what] for what in ("formula", "samples"))
    color = alt.Color("what:N", title=None)
    rule = alt.Chart(alt.Data(values=[{"M": best}])).mark_rule(strokeDash=[4, 4]).encode(x="M:Q")
    return (
        rule
        + alt.Chart(alt.Data(values=curve)).mark_line().encode(x=x, y=y, color=color)
        + alt.Chart(alt.Data(values=points)).mark_point(filled=True, size=80).encode(x=x, y=y, color=color)
    ).properties(width="container", height=260)


def kernel_over_product(x: Tensor, w: Tensor) -> Any:
    """The arc-cosine kernel over w^T x: a cloud, where a layer f(w^T x) would be a curve."""
    products, values = (x @ w.T).flatten().tolist(), sk.arccos_kernel(x, w).flatten().tolist()
    cloud = [
        {"product": round(p, 4), "value": round(v, 4), "what": "arc-cosine layer"} for p, v in zip(products, values)
    ]
    line = [{"product": p, "value": max(p, 0.0), "what": "ReLU layer"} for p in (min(products), 0.0, max(products))]
    encoded = {
        "x": alt.X("product:Q", title="wᵀx"),
        "y": alt.Y("value:Q", title="output"),
        "color": alt.Color("what:N", title=None),
    }
    points = alt.Chart(alt.Data(values=cloud)).mark_point(filled=True, size=22, opacity=0.6).encode(**encoded)
    return (points + alt.Chart(alt.Data(values=line)).mark_line().encode(**encoded)).properties(
        width="container", height=260
    )


def strips(found: dict[str, list[Scored]]) -> Any:
    """A point a seed, and a tick at the mean."""
    values = [{"method": name, "accuracy": round(each.accuracy, 3)} for name, runs in found.items() for each in runs]
    base = alt.Chart(alt.Data(values=values)).encode(y=alt.Y("method:N", title=None, sort=list(found)))
    points = base.mark_point(filled=True, size=70).encode(
        x=alt.X("accuracy:Q", title="test accuracy (%)", scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=7))
    )
    ticks = base.mark_tick(thickness=2, size=30).encode(x="mean(accuracy):Q")
    return (points + ticks).properties(width="container", height=260)


def accuracy_over_parameters(runs: list[dict[str, Scored]]) -> Any:
    """A point a seed for each kind of adapter; rules for the head alone and for everything."""
    values = [
        {"way": way, "parameters": each.parameters, "accuracy": round(each.accuracy, 3)}
        for found in runs
        for way, each in found.items()
        if way not in ("head only", "everything")
    ]
    bounds = [
        {"way": way, "accuracy": statistics.fmean(found[way].accuracy for found in runs)}
        for way in ("head only", "everything")
        if way in runs[0]
    ]
    y = alt.Y("accuracy:Q", title="test accuracy (%)", scale=alt.Scale(zero=False))
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X(
            "parameters:Q",
            title="trained parameters",
            scale=alt.Scale(type="log", nice=False, padding=30),
            axis=alt.Axis(values=[1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000]),
        ),
        color=alt.Color("way:N", title=None, sort=[way for way in runs[0] if way not in ("head only", "everything")]),
    )
    points = base.mark_point(filled=True, size=60, opacity=0.5).encode(
        y=y, tooltip=["way:N", "parameters:Q", "accuracy:Q"]
    )
    means = base.mark_point(shape="diamond", size=140, filled=True).encode(y=alt.Y("mean(accuracy):Q"))
    rules = alt.Chart(alt.Data(values=bounds))
    lines = rules.mark_rule(strokeDash=[4, 4]).encode(y=y)
    names = rules.mark_text(align="left", dy=-7, x=4).encode(y=y, text="way:N")
    return (lines + names + points + means).properties(width="container", height=300)


def accuracy_over_size(runs: list[list[dict[str, float]]]) -> Any:
    """Accuracy over the parameters of what stands in place of pooler and head, a point a seed."""
    values = [
        {"parameters": row["parameters"], "accuracy": round(row[kind], 3), "fitted to": told}
        for rows in runs
        for row in rows
        for kind, told in (("labels", "labels"), ("outputs", "the network's outputs"))
    ]
    original = statistics.fmean(rows[-1]["original"] for rows in runs)
    marks = [{"accuracy": original, "told": "original"}, {"accuracy": original - 1, "told": "1 point less"}]
    y = alt.Y("accuracy:Q", title="test accuracy (%)", scale=alt.Scale(zero=False))
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("parameters:Q", title="numbers in A", scale=alt.Scale(type="log", nice=False, padding=20)),
        color=alt.Color("fitted to:N"),
    )
    rules = [alt.Chart(alt.Data(values=[mark])) for mark in marks]
    return (
        alt.Chart(alt.Data(values=marks)).mark_rule(strokeDash=[4, 4]).encode(y=y)
        + rules[0].mark_text(align="left", dy=-7, x=4).encode(y=y, text="told:N")
        + rules[1].mark_text(align="left", dy=9, x=4).encode(y=y, text="told:N")
        + base.mark_point(filled=True, size=60).encode(y=y)
        + base.mark_line().encode(y=alt.Y("mean(accuracy):Q"))
    ).properties(width="container", height=300)
