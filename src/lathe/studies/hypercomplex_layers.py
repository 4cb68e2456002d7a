"""Does a network keep its accuracy with 1/n of its weights, and is a learnt algebra better than a fixed one?"""

from __future__ import annotations

import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import altair as alt
import torch
from torch import Tensor, nn
from torch.nn import functional

from lathe.nn import hypercomplex_layers as ph
from lathe.studies.engine import Measurement, Run, Setting, Study, at_least, at_most, average, between, compare, equals
from lathe.training import accuracy, cosine, fit, one_cycle

study = Study(
    "hypercomplex-layers",
    title="PHNNs: Lightweight Neural Networks via Parameterized Hypercomplex Convolutions",
    authors="Grassucci, Zhang, Comminiello",
    year=2021,
    arxiv="2110.04176",
    area="nn",
    module="lathe.nn.hypercomplex_layers",
    summary="""Divides a network's weights by n by swapping its layers: each weight becomes a sum of n Kronecker
    products of small learnt matrices and filter blocks. It costs what the ordinary network costs to run, and folds
    back into one.""",
    example="""
import torch
from functools import partial
from torch import nn
from lathe.core.surgery import swap
from lathe.nn.hypercomplex_layers import PHConv2d, ph_fold

model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
report = swap(model, {nn.Conv2d: partial(PHConv2d.like, n=4, on_indivisible="skip")})   # 3 channels: left alone
assert sum(p.numel() for p in model[2].parameters()) == 9_344                           # of 36,928
folded = ph_fold(model.eval())                                                         # ordinary layers again
image = torch.randn(1, 3, 16, 16)
assert torch.allclose(folded(image), model(image), atol=1e-5)
""",
    job="build",
    scales={
        "smoke": Setting(
            seeds=1,
            data="digits",
            train=200,
            test=200,
            size=8,
            depth=20,
            blocks=(1, 1, 1),
            widths=(24, 48, 96),
            epochs=1,
            batch=50,
            lr=0.1,
            weight_decay=5e-4,
            init="xavier",
            schedule="one cycle",
            clips=24,
            test_clips=16,
            audio_epochs=1,
            audio_batch=12,
            audio_width=16,
            audio_hidden=16,
            toy_epochs=3,
            timings=8,
        ),
        "desk": Setting(
            data="cifar10",
            train=6000,
            test=4000,
            size=16,
            depth=20,
            blocks=(1, 1, 1),
            widths=(24, 48, 96),
            epochs=7,
            batch=100,
            lr=0.1,
            weight_decay=5e-4,
            init="xavier",
            schedule="one cycle",
            clips=320,
            test_clips=200,
            audio_epochs=11,
            audio_batch=10,
            audio_width=32,
            audio_hidden=32,
            toy_epochs=5,
            timings=60,
        ),
        "full": Setting(
            data="cifar10",
            train=50_000,
            test=10_000,
            size=32,
            depth=18,
            blocks=None,
            widths=(60, 120, 240, 516),
            epochs=200,
            batch=128,
            lr=0.1,
            weight_decay=5e-4,
            init="xavier",
            schedule="cosine",
            clips=8000,
            test_clips=1000,
            audio_epochs=60,
            audio_batch=16,
            audio_width=64,
            audio_hidden=128,
            toy_epochs=5,
            timings=200,
        ),
    },
)

# Network -> (components, share of the width, the algebra that is fixed).
NETWORKS: dict[str, tuple[int | None, float, str | None]] = {
    "real": (None, 1.0, None),
    "real, half width": (None, 0.5, None),
    "n = 2": (2, 1.0, None),
    "n = 3": (3, 1.0, None),
    "n = 4": (4, 1.0, None),
    "quaternion": (4, 1.0, "quaternion"),
}


@dataclass(frozen=True)
class Trained:
    """A trained network: the metric of its test set in percent, and its sizes."""

    score: float
    parameters: int
    conv_parameters: int


@study.claim(
    "C1",
    "Hypercomplex networks keep the accuracy of the ordinary one with about 1/n of its weights",
    paper="CIFAR-10, ResNet50: 89.6 % with 22.5M parameters; 90.4 % with 7.6M (n = 3), 5.7M with n = 4",
    holds=at_least(-2.0),
    unit="percentage points",
    also={"n = 4 minus half-width real": at_least(-0.5), "worst convolution weights x n / real": between(0.97, 1.03)},
)
def keeps_accuracy(run: Run) -> Measurement:
    nets = {name: run.each_seed(train_classifier, network=name) for name in ("real", "n = 2", "n = 3", "n = 4")}
    slim = run.each_seed(train_classifier, network="real, half width")
    run.figure(accuracy_against_size({**nets, "real, half width": slim}))
    gaps = {name: compare(scores(nets[name]), scores(nets["real"])) for name in ("n = 2", "n = 3", "n = 4")}
    worst = min(gaps, key=lambda name: gaps[name].value)
    real = nets["real"][0].conv_parameters
    shares = [nets[name][0].conv_parameters * int(name[-1]) / real for name in gaps]
    return compare(
        scores(nets[worst]),
        scores(nets["real"]),
        also={f"{name} minus real": gap.value for name, gap in gaps.items()}
        | {
            "n = 4 minus half-width real": compare(scores(nets["n = 4"]), scores(slim)).value,
            "worst convolution weights x n / real": max(shares, key=lambda share: abs(share - 1.0)),
        },
        note=f"the worst n ({worst}) is the value; {sizes({**nets, 'half width': slim})} parameters",
    )


@study.claim(
    "C2",
    "A learnt algebra is at least as good as the fixed quaternion algebra of the same size",
    paper="the same table, also SVHN and CIFAR-100: the quaternion networks score lower than n = 4",
    holds=at_least(0.0),
    unit="percentage points",
)
def beats_quaternions(run: Run) -> Measurement:
    learnt = run.each_seed(train_classifier, network="n = 4")
    fixed = run.each_seed(train_classifier, network="quaternion")
    run.figure(strips({"n = 4, learnt": learnt, "quaternion, fixed": fixed}, "test accuracy (%)"))
    difference = compare(scores(learnt), scores(fixed))
    return compare(scores(learnt), scores(fixed), note=f"a weak effect: {interval(difference)}")


@study.claim(
    "C3",
    "n = 3 takes RGB without a dummy channel, and is no worse than n = 4 with one",
    paper="the same table: n = 3 is the best of all",
    holds=at_least(-0.3),
    unit="percentage points",
)
def fits_rgb(run: Run) -> Measurement:
    three, four = (run.each_seed(train_classifier, network=name) for name in ("n = 3", "n = 4"))
    run.figure(strips({"n = 3, RGB": three, "n = 4, RGB + zeros": four}, "test accuracy (%)"))
    return compare(scores(three), scores(four), note=f"{sizes({'n = 3': three, 'n = 4': four})} parameters")


@study.claim(
    "C4",
    "Given its filters, the layer learns the Hamilton rule exactly from data",
    paper="tutorials: A converges to the Hamilton matrices within 1e-7, loss 0 after 2 epochs",
    kind="exact",
    holds=at_most(1e-4),
    unit="largest error of an entry of A",
    also={"2x2 convolution, by Adam": at_most(1e-4), "by least squares": at_most(1e-10)},
)
def learns_hamilton(run: Run) -> Measurement:
    products = run.each_seed(learn_products)
    convolutions = run.each_seed(learn_convolution)
    table = [
        {"step": step, "error": error, "task": task}
        for task, runs in (("quaternion products", products), ("2x2 convolution", convolutions))
        for step, error in runs[0]
    ]
    line = alt.Chart(alt.Data(values=table)).mark_line().encode(
        x=alt.X("step:Q", title="step of Adam (one sample each)"),
        y=alt.Y("error:Q", title="largest error of A", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e")),
        color=alt.Color("task:N", title=None),
    )  # fmt: skip
    rule = alt.Chart(alt.Data(values=[{"bound": 1e-4}])).mark_rule(strokeDash=[4, 4]).encode(y="bound:Q")
    run.figure((line + rule).properties(width="container", height=260))
    worst = [max(errors[-1][1] for errors in runs) for runs in (products, convolutions)]
    return average(
        [errors[-1][1] for errors in products],
        also={
            "worst seed": worst[0],
            "2x2 convolution, by Adam": worst[1],
            "by least squares": max(run.each_seed(solve_products)),
        },
    )


@study.claim(
    "C5",
    "A layer holds n^3 + s d k^r / n weights and s biases",
    paper="section III",
    kind="exact",
    holds=equals(0.0),
    unit="parameters too many or too few, at worst",
)
def counts_parameters(run: Run) -> Measurement:
    errors = []
    for n, r, bias in itertools.product(range(1, 9), range(4), (False, True)):
        s, d, k = 3 * n, 2 * n, 3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # n = 1 drops its redundant scale unless it is told not to
            layer: nn.Module
            if r == 0:
                layer = ph.PHLinear(d, s, bias, n=n, learn_algebra=True)
            else:
                conv = (ph.PHConv1d, ph.PHConv2d, ph.PHConv3d)[r - 1]
                layer = conv(d, s, k, bias=bias, n=n, learn_algebra=True)
        count = sum(parameter.numel() for parameter in layer.parameters())
        errors.append(abs(count - (n**3 + s * d * k**r // n + s * bias)))
    return Measurement(float(max(errors)), note=f"{len(errors)} layers: n = 1 to 8, linear and r = 1, 2, 3")


@study.claim(
    "C6",
    "The layer contains complex, quaternion and octonion convolutions",
    paper="section III",
    kind="exact",
    holds=at_most(1e-12),
    unit="largest difference to the direct formulas (float64)",
)
def contains_algebras(run: Run) -> Measurement:
    errors = {}
    for name, n in (("complex", 2), ("quaternion", 4), ("octonion", 8)):
        layer = ph.PHConv2d(2 * n, 3 * n, 3, bias=False, n=n, algebra=name, dtype=torch.float64)
        x = torch.randn(2, 2 * n, 7, 6, dtype=torch.float64, generator=run.generator(n))
        assert layer.F is not None
        expected = doubled_convolution(layer.F, list(x.chunk(n, 1)))
        errors[name] = float((layer(x) - torch.cat(expected, 1)).detach().abs().max())
    return Measurement(max(errors.values()), also=errors)


@study.claim(
    "C7",
    "In sound event detection from ambisonics, n = 4 matches the ordinary network with a fraction of its weights",
    paper="L3DAS21 task 2: F-scores of PHC SEDnets (n = 2 to 16) at or above the real and quaternion ones",
    holds=at_least(-3.0),
    unit="points of F-score",
    also={"share of convolution weights": at_most(0.35)},
)
def detects_sounds(run: Run) -> Measurement:
    nets = {name: run.each_seed(train_detector, network=name) for name in ("real", "n = 4")}
    run.figure(strips(nets, "F-score of frames (%)"))
    share = nets["n = 4"][0].conv_parameters / nets["real"][0].conv_parameters
    return compare(
        scores(nets["n = 4"]),
        scores(nets["real"]),
        also={"share of convolution weights": share},
        note="synthetic first-order ambisonics: bursts of tones of four kinds, random directions, in noise; "
        "L3DAS21 (30 GB) is not used; with bursts half as loud and as many steps, where neither network had converged, "
        "n = 4 lagged by 2.6 and 4.6 points in two seeds (F-scores of 70 to 78)",
    )


@study.claim(
    "C8",
    "Running the layer costs no more than the ordinary one, since its weight can be folded",
    paper="table of times: training and inference comparable with the real network",
    holds=between(0.98, 1.02),
    unit="folded inference time / nn.Conv2d",
    also={"training step / nn.Conv2d": at_most(1.25)},
)
def costs_no_more(run: Run) -> Measurement:
    x = torch.randn(32, 64, 16, 16, generator=run.generator(0)).to(run.device)
    plain = nn.Conv2d(64, 64, 3, padding=1).to(run.device)
    layer = ph.PHConv2d(64, 64, 3, padding=1, n=4).to(run.device)
    folded = layer.fold()

    def infer(module: nn.Module) -> None:
        with torch.no_grad():
            module(x)

    def train(module: nn.Module) -> None:
        module.zero_grad()
        module(x.detach().requires_grad_()).sum().backward()

    inference = time_ratio(run, partial(infer, folded), partial(infer, plain), 3 * run.setting.timings)
    training = time_ratio(run, partial(train, layer), partial(train, plain), run.setting.timings)
    return Measurement(
        inference, also={"training step / nn.Conv2d": training}, note="64 channels, 3x3, 16x16, batch 32, one thread"
    )


def train_classifier(run: Run, seed: int, network: str) -> Trained:
    """One network of `NETWORKS` on small colour images; accuracy on the test set."""
    setting = run.setting
    n, share, algebra = NETWORKS[network]
    train, test = (images(run, split, count) for split, count in (("train", setting.train), ("test", setting.test)))
    channels = 3 if n in (None, 3) else 4
    train, test = ((ph.to_hypercomplex(x, channels), y) for x, y in (train, test))
    torch.manual_seed(seed)
    # The paper's networks start as its code does; normalisation makes up for the small variance.
    options: dict[str, Any] = {} if n is None else {"algebra": algebra, "init": setting.init}
    net = ph.ph_resnet(
        setting.depth,
        n,
        channels,
        10,
        widths=[round(share * width) for width in setting.widths],
        blocks=setting.blocks,
        **options,
    )
    optimizer = torch.optim.SGD(ph.param_groups(net, setting.weight_decay), lr=setting.lr, momentum=0.9, nesterov=True)
    history = fit(
        net,
        train,
        loss=functional.cross_entropy,
        optimizer=optimizer,
        schedule=one_cycle(setting.lr) if setting.schedule == "one cycle" else cosine(),
        epochs=setting.epochs,
        batch_size=setting.batch,
        validation=test,
        metrics={"accuracy": accuracy},
        validate_every=10**9,
        augment=None if setting.data == "digits" else shifted_and_mirrored,
        seed=seed,
        device=run.device,
        progress=lambda now: run.progress(f"{network}, seed {seed}", now.step, now.total),
    )
    return Trained(100 * history.metrics["accuracy"][-1], *parameter_counts(net))


def images(run: Run, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Standardised images in three channels, of the size of the setting."""
    data = run.data(run.setting.data, split)
    data = data.subset(min(count, len(data)))
    x = data.float()
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    if x.shape[-1] != run.setting.size:
        x = functional.adaptive_avg_pool2d(x, run.setting.size)
    return x.expand(-1, 3, -1, -1).contiguous(), data.labels


def shifted_and_mirrored(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored with probability 1/2, and the batch shifted by up to an eighth of the width."""
    mirrored = torch.rand(len(x), generator=generator).to(x.device) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    reach = x.shape[-1] // 8
    down, right = torch.randint(0, 2 * reach + 1, (2,), generator=generator).tolist()
    return functional.pad(x, (reach,) * 4)[..., down : down + x.shape[-2], right : right + x.shape[-1]]


def learn_products(run: Run, seed: int) -> list[tuple[int, float]]:
    """PHM learns A from 1000 quaternion products of integers, one at a time: (step, largest error of A)."""
    W, X, Y = (t.float() for t in quaternion_products(run.generator(seed)))

    def loss(A: Tensor, step: int) -> Tensor:
        weight = ph.kronecker_sum(A, W[step % 1000].view(4, 1, 1))
        return functional.mse_loss(weight @ X[step % 1000], Y[step % 1000])

    return learn_algebra(loss, run.setting.toy_epochs, run.generator(seed))


def learn_convolution(run: Run, seed: int) -> list[tuple[int, float]]:
    """PHC with given 2x2 filters learns A from 1000 integer images of 4 channels, one at a time."""
    generator = run.generator(seed)
    F = torch.randint(-10, 10, (1000, 4, 1, 1, 2, 2), generator=generator).float()
    X = torch.randint(-10, 10, (1000, 4, 3, 3), generator=generator).float()
    Y = [torch.cat(doubled_convolution(filters, list(x.chunk(4)))) for filters, x in zip(F, X)]

    def loss(A: Tensor, step: int) -> Tensor:
        output = functional.conv2d(X[step % 1000], ph.kronecker_sum(A, F[step % 1000]))
        return functional.mse_loss(output, Y[step % 1000])

    return learn_algebra(loss, run.setting.toy_epochs, generator)


def learn_algebra(
    loss: Callable[[Tensor, int], Tensor], epochs: int, generator: torch.Generator
) -> list[tuple[int, float]]:
    """Adam at 5e-3 over 1000 samples an epoch, from uniform(+-0.07); the error at every hundredth step."""
    A = (torch.rand(4, 4, 4, generator=generator) * 0.14 - 0.07).requires_grad_()
    hamilton = hamilton_product_table()
    optimizer = torch.optim.Adam([A], lr=5e-3)
    errors = []
    for step in range(1000 * epochs):
        optimizer.zero_grad()
        loss(A, step).backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            errors.append((step + 1, float((A.detach() - hamilton).abs().max())))
    return errors


def solve_products(run: Run, seed: int) -> float:
    """The same A by least squares: a product's components are linear in the 16 products of components."""
    W, X, Y = quaternion_products(run.generator(seed))
    features = torch.einsum("si,sb->sib", W, X).flatten(1)
    A = torch.linalg.lstsq(features, Y).solution.unflatten(0, (4, 4)).transpose(1, 2)
    return float((A - hamilton_product_table()).abs().max())


def quaternion_products(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """1000 pairs of quaternions with integer components in [-10, 10), and their products, in float64."""
    W, X = (torch.randint(-10, 10, (1000, 4), generator=generator).double() for _ in range(2))
    (a, b, c, d), (e, f, g, h) = W.T, X.T
    product = [
        a * e - b * f - c * g - d * h,
        a * f + b * e + c * h - d * g,
        a * g - b * h + c * e + d * f,
        a * h + b * g - c * f + d * e,
    ]
    return W, X, torch.stack(product, 1)


def hamilton_product_table() -> Tensor:
    """A[i, a, b]: component a of e_i e_b, by Hamilton's i j = k and its turns, entry by entry."""
    A = torch.zeros(4, 4, 4)
    for i, b in itertools.product(range(4), repeat=2):
        A[i, i ^ b, b] = doubled_sign(i, b, 4)
    return A


def doubled_sign(i: int, j: int, n: int) -> int:
    """Sign of e_i e_j by Cayley-Dickson doubling, (p, q)(r, s) = (p r - s* q, s p + q r*); e_i e_j is +-e_(i xor j)."""
    if n == 1:
        return 1
    half = n // 2
    if i < half:
        return doubled_sign(i, j, half) if j < half else doubled_sign(j - half, i, half)
    conjugated = 1 if j % half == 0 else -1
    if j < half:
        return conjugated * doubled_sign(i - half, j, half)
    return -conjugated * doubled_sign(j - half, i - half, half)


def doubled_convolution(filters: Tensor, components: list[Tensor]) -> list[Tensor]:
    """Convolution in the algebra of doubled reals, a real convolution for each pair of components."""
    n = len(components)
    outputs: list[Tensor | float] = [0.0] * n
    for i, j in itertools.product(range(n), repeat=2):
        outputs[i ^ j] = outputs[i ^ j] + doubled_sign(i, j, n) * functional.conv2d(components[j], filters[i])
    return [torch.as_tensor(output) for output in outputs]


SAMPLE_RATE, WINDOW, FRAMES = 8000, 128, 64


def train_detector(run: Run, seed: int, network: str) -> Trained:
    """SEDnet on synthetic ambisonics; F-score over the frames and events of the test clips."""
    setting = run.setting
    n = NETWORKS[network][0]
    train = ambisonics(setting.clips, torch.Generator().manual_seed(1000 + seed))
    test = ambisonics(setting.test_clips, torch.Generator().manual_seed(2000))
    torch.manual_seed(seed)
    net = ph.ph_sednet(
        n,
        4,
        4,
        frequencies=WINDOW // 2,
        widths=(setting.audio_width,) * 3,
        pools=(4, 4, 2),
        hidden=setting.audio_hidden,
    )
    fit(
        net,
        train,
        loss=functional.binary_cross_entropy_with_logits,
        optimizer=torch.optim.Adam(ph.param_groups(net, 0.0), lr=3e-3),
        schedule=cosine(warmup=0.1),
        epochs=setting.audio_epochs,
        batch_size=setting.audio_batch,
        seed=seed,
        device=run.device,
        progress=lambda now: run.progress(f"SEDnet {network}, seed {seed}", now.step, now.total),
    )
    with torch.no_grad():
        heard = torch.cat([net(x.to(run.device)).cpu() > 0 for x in test[0].split(50)])
    truth = test[1].bool()
    hits = int((heard & truth).sum())
    return Trained(100 * 2 * hits / max(1, int(heard.sum() + truth.sum())), *parameter_counts(net))


def ambisonics(clips: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Log magnitudes (clips, 4, frames, frequencies) of W, X, Y, Z, and which of 4 kinds of burst each frame holds.

    A burst is a steady tone, a rising one, a falling one, or a trembling one, at a random pitch, time and direction;
    a clip has up to four of them, which may overlap, in noise of its own for each channel.
    """
    length = WINDOW * FRAMES

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    time_of = torch.arange(length) / SAMPLE_RATE
    sound = 0.5 * torch.randn(clips, 4, length, generator=generator)
    truth = torch.zeros(clips, FRAMES, 4)
    for kind, slope in enumerate((0.0, 1500.0, -1500.0, 0.0)):
        present = (torch.rand(clips, 1, generator=generator) < 0.5).float()
        frames = torch.randint(12, 28, (clips, 1), generator=generator)
        first = (torch.rand(clips, 1, generator=generator) * (FRAMES - frames)).long()
        inside = ((torch.arange(FRAMES) >= first) & (torch.arange(FRAMES) < first + frames)).float() * present
        pitch, phase = draw(1200, 2800, clips, 1), draw(0, 2 * math.pi, clips, 1)
        since = time_of - first * WINDOW / SAMPLE_RATE
        wave = torch.sin(phase + 2 * math.pi * (pitch * since + slope * since**2 / 2))
        if kind == 3:
            wave = wave * (1 + torch.sin(2 * math.pi * 12 * since)) / 1.25
        wave = wave * inside.repeat_interleave(WINDOW, 1) * draw(0.5, 1.0, clips, 1)
        azimuth, elevation = draw(-math.pi, math.pi, clips), draw(-math.pi / 4, math.pi / 4, clips)
        direction = [
            torch.full((clips,), math.sqrt(0.5)),
            azimuth.cos() * elevation.cos(),
            azimuth.sin() * elevation.cos(),
            elevation.sin(),
        ]
        sound += torch.stack(direction, 1)[:, :, None] * wave[:, None]
        truth[:, :, kind] = inside
    window = torch.hann_window(2 * WINDOW)
    padded = functional.pad(sound, (WINDOW // 2, WINDOW // 2))
    spectra = torch.fft.rfft(padded.unfold(-1, 2 * WINDOW, WINDOW) * window).abs()
    # Frequencies in pairs: 2 * 64 bins, without that of the average, become 64.
    magnitudes = functional.avg_pool2d(spectra[..., 1:], (1, 2))
    return magnitudes.log1p(), truth


def time_ratio(run: Run, ours: Callable[[], None], other: Callable[[], None], repetitions: int) -> float:
    """Median time of ours over that of the other, each pair of calls one after the other, by turns first."""
    durations: tuple[list[float], list[float]] = ([], [])
    for repetition in range(repetitions + 5):
        order = (0, 1) if repetition % 2 else (1, 0)
        for which in order:
            began = time.perf_counter()
            (ours, other)[which]()
            if run.device != "cpu":
                torch.cuda.synchronize()
            if repetition >= 5:
                durations[which].append(time.perf_counter() - began)
    return statistics.median(durations[0]) / statistics.median(durations[1])


def parameter_counts(net: nn.Module) -> tuple[int, int]:
    """Of the network, and of its convolutions alone."""
    convs = [module for module in net.modules() if isinstance(module, (nn.Conv2d, ph.PHConv2d))]
    total, of_convs = (
        sum(parameter.numel() for module in modules for parameter in module.parameters()) for modules in ([net], convs)
    )
    # A fixed algebra is no parameter, but a table that is stored all the same.
    return total, of_convs + sum(buffer.numel() for conv in convs for buffer in conv.buffers())


def scores(runs: list[Trained]) -> list[float]:
    return [each.score for each in runs]


def sizes(nets: dict[str, list[Trained]]) -> str:
    return ", ".join(f"{name}: {runs[0].parameters:,}" for name, runs in nets.items())


def interval(difference: Measurement) -> str:
    """Mean and 95 % interval by Student's t."""
    if difference.spread is None:
        return f"{difference.value:+.2f} in one seed"
    from scipy import stats

    half = float(stats.t.ppf(0.975, difference.seeds - 1)) * difference.spread / math.sqrt(difference.seeds)
    return (
        f"95 % interval {difference.value - half:+.2f} to {difference.value + half:+.2f} over {difference.seeds} seeds"
    )


def strips(nets: dict[str, list[Trained]], title: str) -> alt.LayerChart:
    """A point a seed, and a tick at the mean."""
    values = [
        {"network": name, "seed": seed, "score": round(each.score, 3)}
        for name, runs in nets.items()
        for seed, each in enumerate(runs)
    ]
    base = alt.Chart(alt.Data(values=values)).encode(y=alt.Y("network:N", title=None, sort=list(nets)))
    points = base.mark_point(filled=True, size=70).encode(
        x=alt.X("score:Q", title=title, scale=alt.Scale(zero=False)), tooltip=["network:N", "seed:Q", "score:Q"]
    )
    means = base.mark_tick(thickness=2, size=30).encode(x="mean(score):Q")
    return (points + means).properties(width="container", height=260)


def accuracy_against_size(nets: dict[str, list[Trained]]) -> alt.LayerChart:
    """Accuracy over parameters, a point a seed; the rule is the bound, two points below the ordinary network."""
    values = [
        {"network": name, "seed": seed, "parameters": each.parameters, "accuracy": round(each.score, 3)}
        for name, runs in nets.items()
        for seed, each in enumerate(runs)
    ]
    points = alt.Chart(alt.Data(values=values)).mark_point(filled=True, size=70).encode(
        x=alt.X("parameters:Q", title="parameters", scale=alt.Scale(type="log", nice=False, padding=20)),
        y=alt.Y("accuracy:Q", title="test accuracy (%)", scale=alt.Scale(zero=False)),
        color=alt.Color("network:N", title=None, sort=list(nets)),
        tooltip=["network:N", "seed:Q", "parameters:Q", "accuracy:Q"],
    )  # fmt: skip
    bound = statistics.fmean(scores(nets["real"])) - 2.0
    rule = alt.Chart(alt.Data(values=[{"bound": bound}])).mark_rule(strokeDash=[4, 4]).encode(y="bound:Q")
    return (points + rule).properties(width="container", height=260)
