"""Do hypernetworks train faster and more evenly once their predictions no longer scale with their input?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import altair as alt
import torch
from torch import Tensor, nn
from torch.nn import functional

from lathe.nn.mip_hypernetworks import (
    DenseHead,
    HyperDriven,
    HyperMorph2d,
    HyperNetwork,
    RegistrationUNet,
    ScaleSpaceResize,
    encode,
    hypernetize,
    magnitude_profile,
    registration_loss,
)
from lathe.studies.engine import Measurement, Run, Setting, Study, at_most, average, compare, equals

study = Study(
    "mip-hypernetworks",
    title="Magnitude Invariant Parametrizations Improve Hypernetwork Learning",
    authors="Gonzalez Ortiz, Guttag, Dalca",
    year=2023,
    arxiv="2304.07645",
    area="nn",
    module="lathe.nn.mip_hypernetworks",
    summary="""Makes any network depend on a hyperparameter, so that one training serves every value of it: its weights
    are predicted from it. The magnitude-invariant parametrisation keeps that training as fast and even as an ordinary
    one.""",
    example="""
import torch
from torch import nn
from lathe.nn.mip_hypernetworks import hypernetize

model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
driven = hypernetize(model)                               # theta_0 starts at the weights of the model
images = torch.randn(4, 1, 8, 8)
logits = driven(images, gamma=0.3)                        # train with a new gamma in [0, 1] at every step
each = driven(images, gamma=torch.rand(4, 1))             # or with one for each sample
fixed = driven.at(gamma=0.3)                              # an ordinary network, for one value
assert torch.allclose(fixed(images), logits, atol=1e-6)
""",
    job="train",
    scales={
        "smoke": Setting(
            seeds=1,
            data="digits",
            size=8,
            train=400,
            test=100,
            widths=(8, 8),
            hidden=(8, 16),
            batch=32,
            steps=20,
            every=5,
            first=5,
            last=10,
            low=3,
            high=8,
            adam=(1e-3,),
            sgd=(0.03,),
            activations=("ReLU", "Tanh"),
            pairs="digits",
            pair_size=8,
            pair_count=64,
            unet=(8, 8),
            pair_batch=16,
            pair_steps=10,
            pair_rates=(1e-3,),
        ),
        "desk": Setting(
            data="digits",
            size=8,
            train=1437,
            test=360,
            widths=(16, 32, 32),
            hidden=(16, 128),
            batch=64,
            steps=250,
            every=25,
            first=50,
            last=100,
            low=3,
            high=8,
            adam=(3e-4, 1e-3, 3e-3),
            sgd=(0.01, 0.03, 0.1),
            activations=("ReLU", "GELU", "SiLU", "Tanh"),
            pairs="mnist",
            pair_size=14,
            pair_count=2000,
            unet=(16, 32),
            pair_batch=32,
            pair_steps=400,
            pair_rates=(3e-4, 1e-3, 3e-3),
        ),
        "full": Setting(
            data="mnist",
            size=28,
            train=60_000,
            test=10_000,
            widths=(16, 32, 64, 64),
            hidden=(16, 128),
            batch=128,
            steps=20_000,
            every=200,
            first=50,
            last=2000,
            low=8,
            high=28,
            adam=(1e-4, 3e-4, 1e-3, 3e-3),
            sgd=(3e-3, 0.01, 0.03, 0.1),
            activations=("ReLU", "GELU", "SiLU", "Tanh"),
            pairs="mnist",
            pair_size=28,
            pair_count=60_000,
            unet=(16, 32, 32, 32),
            pair_batch=64,
            pair_steps=20_000,
            pair_rates=(1e-4, 3e-4, 1e-3, 3e-3),
        ),
    },
)

# How each arm parametrises the same hypernetwork.
ARMS: dict[str, dict[str, Any]] = {
    "default": {"encoding": "none", "residual": False},
    "encoding only": {"encoding": "mip", "residual": False},
    "residual only": {"encoding": "none", "residual": True},
    "MIP": {"encoding": "mip", "residual": True},
}
# Of colours: those of the default and of MIP are the same in every figure.
ORDER = ["default", "MIP", "encoding only", "residual only", "standing still"]
GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
CHANCE = math.log(10.0)  # cross entropy of ten classes told by chance, which a diverged run counts as


class Classifier(nn.Module):
    """Convolutions on features that are resized by a factor after the first of them, then a linear layer."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        inputs = [1, *widths]
        self.convs = nn.ModuleList([nn.Conv2d(a, b, 3, padding=1) for a, b in zip(inputs, widths)])
        self.resize, self.linear = ScaleSpaceResize(), nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor, factor: float) -> Tensor:
        for layer, conv in enumerate(self.convs):
            x = functional.leaky_relu(conv(x))
            if layer == 0:
                x = self.resize(x, factor)
        return self.linear(x.mean((2, 3)))


@dataclass(frozen=True)
class Trained:
    """One training.

    `losses`: cross entropy, mean over GAMMAS, after 0, `every`, 2 `every`, ... steps. `gradients`: norm at every step;
    `weight_gradients`: of the part of the last layer that predicts weights, not biases. `before`, `after`: deviation
    of the predicted weights at gamma = 0, 0.1, ..., 1.
    """

    losses: list[float]
    every: int
    gradients: list[float]
    weight_gradients: list[float]
    before: list[float]
    after: list[float]

    @property
    def final(self) -> float:
        return self.losses[-1]

    def steps_to(self, loss: float) -> int:
        """Steps until the loss is reached; all steps where it never is."""
        last = len(self.losses) - 1
        return self.every * next((i for i, value in enumerate(self.losses) if value <= loss), last)


@dataclass(frozen=True)
class Registered:
    """Losses on test pairs for each of GAMMAS, after training and without moving anything."""

    by_gamma: list[float]
    still: list[float]

    @property
    def final(self) -> float:
        return statistics.fmean(self.by_gamma)


@study.claim(
    "C1",
    "MIP trains faster than the default parametrisation, with Adam and with SGD",
    paper="convergence figures of all four tasks; best learning rate of each arm",
    holds=at_most(0.5),
    unit="cross entropy of MIP / of the default (Adam, 1e-3)",
    also={
        "Adam: steps to the default's final loss / its steps": at_most(0.5),
        "SGD: steps to the default's final loss / its steps": at_most(0.5),
    },
)
def trains_faster(run: Run) -> Measurement:
    mip, default = (run.each_seed(train_classifier, arm=arm, optimizer="Adam", lr=1e-3) for arm in ("MIP", "default"))
    best = {
        (arm, optimizer): best_rate(run, optimizer, arm=arm)
        for optimizer in ("Adam", "SGD")
        for arm in ("default", "MIP")
    }
    run.figure(convergence({key: runs for key, (_, runs) in best.items()}))
    parts, told = {}, []
    for optimizer in ("Adam", "SGD"):
        (slow_rate, slow), (fast_rate, fast) = best["default", optimizer], best["MIP", optimizer]
        needed = [ours.steps_to(theirs.final) / run.setting.steps for ours, theirs in zip(fast, slow)]
        parts[f"{optimizer}: steps to the default's final loss / its steps"] = statistics.fmean(needed)
        told.append(
            f"{optimizer}: {mean_loss(slow):.3f} (default, rate {slow_rate:g}), {mean_loss(fast):.3f} (MIP, "
            f"{fast_rate:g})"
        )
    return compare(
        [each.final for each in mip],
        [each.final for each in default],
        how="ratio",
        also=parts,
        note=f"final cross entropy at the best rate of each arm: {'; '.join(told)}",
    )


@study.claim(
    "C2",
    "With zero biases and a piecewise linear activation, the default's predictions are proportional to gamma",
    paper="section 3 and Figure 2: deviation of the weights against gamma, a line",
    kind="exact",
    holds=equals(1.0, 5e-4),
    unit="slope of log deviation against log gamma",
    also={"h(a gamma) / a against h(gamma), relative": at_most(1e-12)},
)
def proportional(run: Run) -> Measurement:
    target = Classifier(run.setting.widths).double()
    worst, errors = 1.0, []
    for seed, activation in enumerate((nn.ReLU, nn.LeakyReLU, nn.Identity)):
        for d in (1, 3):
            generator = run.generator(seed)
            hyper = HyperNetwork(d, target, run.setting.hidden, activation, generator=generator, **ARMS["default"])
            direction = torch.rand(d, dtype=torch.float64, generator=generator)
            alphas = torch.logspace(-2, 0, 9, dtype=torch.float64)
            with torch.no_grad():
                whole = hyper.flat(gamma=direction)
                for alpha in alphas:
                    part = hyper.flat(gamma=alpha * direction) / alpha
                    errors.append(float((part - whole).abs().max() / whole.abs().max()))
            slope = magnitude_profile(hyper, alphas[:, None] * direction).slope[""]
            worst = max(worst, slope, key=lambda value: abs(value - 1.0))
    run.figure(deviation_lines(run))
    return Measurement(
        worst,
        also={"h(a gamma) / a against h(gamma), relative": max(errors)},
        note="ReLU, LeakyReLU and identity, one and three inputs; the slope furthest from 1",
    )


@study.claim(
    "C3",
    "With MIP, neither the norm of the encoded input nor the deviation of the weights depends on gamma",
    paper="the same figure: the line of MIP is flat",
    kind="exact",
    holds=at_most(1.15),
    unit="largest / smallest deviation of the weights over gamma, at the start",
    also={
        "norm of E(gamma) against sqrt(d)": at_most(1e-12),
        "the same of the default, gamma 0.1 to 1": equals(10.0, 1e-9),
    },
)
def independent(run: Run) -> Measurement:
    errors = []
    for d in range(1, 9):
        gamma = torch.rand(1000, d, dtype=torch.float64, generator=run.generator(d))
        errors.append(float((encode(gamma).norm(dim=1) - math.sqrt(d)).abs().max()))
    spreads: dict[str, list[float]] = {"MIP": [], "default": []}
    for arm, found in spreads.items():
        for seed in run.seeds:
            profile = deviations(build(run, seed, arm).double())
            found.append(max(profile) / min(profile) if arm == "MIP" else profile[-1] / profile[1])
    run.figure(deviation_lines(run))
    return average(
        spreads["MIP"],
        also={
            "norm of E(gamma) against sqrt(d)": max(errors),
            "the same of the default, gamma 0.1 to 1": max(spreads["default"], key=lambda value: abs(value - 10.0)),
        },
        note="of all predicted entries together, theta_0 included",
    )


@study.claim(
    "C3a",
    "That remains so after training",
    paper="the same figure",
    holds=at_most(1.5),
    unit="largest / smallest deviation of the weights over gamma, after training (Adam, 1e-3)",
)
def stays_independent(run: Run) -> Measurement:
    mip, default = (run.each_seed(train_classifier, arm=arm, optimizer="Adam", lr=1e-3) for arm in ("MIP", "default"))
    table = [
        {"arm": arm, "kind": when, "x": i / 10, "y": statistics.fmean(getattr(each, when)[i] for each in runs)}
        for arm, runs in (("default", default), ("MIP", mip))
        for when in ("before", "after")
        for i in range(11)
    ]
    run.figure(
        lines(table, x=alt.X("x:Q", title="gamma"), y=alt.Y("y:Q", title="deviation of the weights"), kinds="training")
    )
    # The default predicts zeros for gamma = 0 at the start: its range begins at 0.1.
    return average(
        [max(each.after) / min(each.after) for each in mip],
        baseline=statistics.fmean(max(each.after[1:]) / min(each.after[1:]) for each in default),
    )


@study.claim(
    "C4",
    "Gradient norms vary less from step to step with MIP",
    paper="figure of the gradients' variance over minibatches",
    holds=at_most(0.8),
    unit="coefficient of variation of the gradient norm, MIP / default: first steps",
    also={"last steps": at_most(0.8)},
)
def steadier_gradients(run: Run) -> Measurement:
    first, last = run.setting.first, run.setting.last
    mip, default = (run.each_seed(train_classifier, arm=arm, optimizer="Adam", lr=1e-3) for arm in ("MIP", "default"))
    run.figure(gradient_norms({"default": default, "MIP": mip}))

    def ratio(which: str, steps: slice) -> float:
        ours, theirs = ([variation(getattr(each, which)[steps]) for each in runs] for runs in (mip, default))
        return compare(ours, theirs, how="ratio").value

    return compare(
        [variation(each.gradients[:first]) for each in mip],
        [variation(each.gradients[:first]) for each in default],
        how="ratio",
        also={
            "last steps": ratio("gradients", slice(-last, None)),
            "first steps, heads of weights alone": ratio("weight_gradients", slice(first)),
            "last steps, heads of weights alone": ratio("weight_gradients", slice(-last, None)),
        },
        note=f"the first {first} and the last {last} steps of C1's runs with Adam at 1e-3; also the gradient of those "
        "rows of the last layer that predict weights, for which the paper's argument holds. In its first steps the "
        "default does not learn yet: its gradient is that of predicted biases, which hardly depends on gamma, while "
        "that of MIP grows as it learns",
    )


@study.claim(
    "C5",
    "Both parts matter: encoding and residual form together are best",
    paper="ablation: input encoding only, output encoding only, both",
    holds=at_most(1.1),
    unit="cross entropy of MIP / of the better single part (Adam, best rate of each arm)",
    also={"MIP / default": at_most(0.7)},
)
def both_parts(run: Run) -> Measurement:
    best = {arm: best_rate(run, "Adam", arm=arm) for arm in ARMS}
    run.figure(convergence({(arm, "Adam"): runs for arm, (_, runs) in best.items()}))
    single = min(("encoding only", "residual only"), key=lambda arm: mean_loss(best[arm][1]))
    against = compare([e.final for e in best["MIP"][1]], [e.final for e in best["default"][1]], how="ratio")
    return compare(
        [each.final for each in best["MIP"][1]],
        [each.final for each in best[single][1]],
        how="ratio",
        also={"MIP / default": against.value},
        note=", ".join(f"{arm} {mean_loss(runs):.3f} (rate {rate:g})" for arm, (rate, runs) in best.items()),
    )


@study.claim(
    "C6",
    "Another activation in the hypernetwork is no cure: MIP is better with each",
    paper="ablation of activation functions",
    holds=at_most(1.0),
    unit="cross entropy of MIP / of the default (Adam, best rate of each arm), worst activation",
)
def any_activation(run: Run) -> Measurement:
    best = {
        activation: {arm: best_rate(run, "Adam", arm=arm, activation=activation) for arm in ("default", "MIP")}
        for activation in run.setting.activations
    }
    ratios = {
        activation: compare([e.final for e in arms["MIP"][1]], [e.final for e in arms["default"][1]], how="ratio")
        for activation, arms in best.items()
    }
    run.figure(points({name: {arm: runs for arm, (_, runs) in arms.items()} for name, arms in best.items()}))
    worst = max(ratios, key=lambda name: ratios[name].value)
    found = ratios[worst]
    return average(
        found.samples,
        baseline=found.baseline,
        also={name: ratio.value for name, ratio in ratios.items()},
        note=f"the worst ({worst}) is the value",
    )


@study.claim(
    "C7",
    "LayerNorm in the hypernetwork makes it blind to a scalar gamma",
    paper="appendix on normalisation",
    kind="exact",
    holds=at_most(1e-5),
    unit="largest change of a predicted weight over gamma / deviation of the weights",
)
def blind(run: Run) -> Measurement:
    norm = partial(nn.LayerNorm, eps=1e-12)
    target = Classifier(run.setting.widths).double()
    gammas = torch.logspace(-2, 0, 21, dtype=torch.float64)[:, None]
    changes = {}
    for arm in ("default", "MIP"):
        hyper = HyperNetwork(1, target, run.setting.hidden, norm=norm, generator=run.generator(0), **ARMS[arm])
        with torch.no_grad():
            flat = hyper.flat(gamma=gammas)
        changes[arm] = ((flat - flat[-1]).abs().amax(1) / flat[-1].std()).tolist()
    run.figure(
        lines(
            [
                {"arm": arm, "x": float(gamma), "y": max(change, 1e-16)}
                for arm, found in changes.items()
                for gamma, change in zip(gammas[:-1], found)
            ],
            x=alt.X("x:Q", title="gamma", scale=alt.Scale(type="log")),
            y=alt.Y(
                "y:Q",
                title="largest change of a weight since gamma = 1",
                scale=alt.Scale(type="log"),
                axis=alt.Axis(format=".0e", values=[1e-16, 1e-12, 1e-8, 1e-4, 1]),
            ),
        )
    )
    return Measurement(
        max(changes["default"]),
        also={"the same with MIP": max(changes["MIP"])},
        note="gamma from 0.01 to 1, zero biases, a LayerNorm after each hidden layer",
    )


@study.claim(
    "C8",
    "One registration network covers all strengths of regularisation, and MIP trains it no slower",
    paper="HyperMorph on OASIS: convergence figure and loss against gamma",
    holds=at_most(1.0),
    unit="loss of MIP / of the default (Adam, best rate of each arm, mean over gamma)",
)
def registers(run: Run) -> Measurement:
    best = {}
    for arm in ("default", "MIP"):
        found = {rate: run.each_seed(train_registration, arm=arm, lr=rate) for rate in run.setting.pair_rates}
        rate = min(found, key=lambda rate: statistics.fmean(each.final for each in found[rate]))
        best[arm] = rate, found[rate]
    shown = {arm: [each.by_gamma for each in runs] for arm, (_, runs) in best.items()}
    shown["standing still"] = [each.still for each in best["MIP"][1]]
    table = [
        {"arm": arm, "x": gamma, "y": statistics.fmean(losses[i] for losses in found)}
        for arm, found in shown.items()
        for i, gamma in enumerate(GAMMAS)
    ]
    run.figure(
        lines(
            table, x=alt.X("x:Q", title="gamma, the weight of smoothness"), y=alt.Y("y:Q", title="loss on test pairs")
        )
    )
    return compare(
        [each.final for each in best["MIP"][1]],
        [each.final for each in best["default"][1]],
        how="ratio",
        also={
            "MIP / standing still": statistics.fmean(
                each.final / statistics.fmean(each.still) for each in best["MIP"][1]
            )
        },
        note="pairs of the same digit; the flow layer starts near zero in both arms; "
        + ", ".join(f"{arm}: rate {rate:g}" for arm, (rate, _) in best.items()),
    )


def build(run: Run, seed: int, arm: str, activation: str = "LeakyReLU") -> HyperDriven:
    """The classifier driven by a hypernetwork of one arm; a seed draws the same hypernetwork in every arm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        primary = Classifier(run.setting.widths)
    return hypernetize(
        primary,
        hidden=run.setting.hidden,
        activation=getattr(nn, activation),
        pretrained=False,
        generator=run.generator(seed),
        **ARMS[arm],
    )


def train_classifier(
    run: Run, seed: int, arm: str, optimizer: str, lr: float, activation: str = "LeakyReLU"
) -> Trained:
    """Digits at a random resolution, gamma, at each step; a seed has the same minibatches and gammas in every arm."""
    setting = run.setting
    (x, y), test = (images(run, split, count) for split, count in (("train", setting.train), ("test", setting.test)))
    driven = build(run, seed, arm, activation).to(run.device)
    learnt = list(driven.parameters())
    stepper: torch.optim.Optimizer = (
        torch.optim.Adam(learnt, lr=lr, fused=True)  # most of a step, else
        if optimizer == "Adam"
        else torch.optim.SGD(learnt, lr=lr, momentum=0.9, nesterov=True, fused=True)
    )
    stream = run.generator(1000 + seed)
    before, losses = deviations(driven), [test_loss(run, driven, test)]
    gradients: list[float] = []
    weight_gradients: list[float] = []
    head = cast(DenseHead, driven.hyper.head)
    weights = [slice(*rows) for name, rows in head.rows.items() if name.endswith("weight")]
    for step in range(setting.steps):
        gamma = torch.rand(1, generator=stream)
        chosen = torch.randint(len(x), (setting.batch,), generator=stream)
        logits = driven(x[chosen], factor_of(run, float(gamma)), gamma=gamma)
        loss = functional.cross_entropy(logits, y[chosen])
        stepper.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in learnt if p.grad is not None]))
        if not math.isfinite(norm):
            # A diverged run counts as chance from here on; its gradients end here.
            losses += [CHANCE] * (setting.steps // setting.every + 1 - len(losses))
            break
        gradients.append(norm)
        by_head = cast(Tensor, head.weight.grad)
        weight_gradients.append(math.hypot(*(float(torch.linalg.vector_norm(by_head[rows])) for rows in weights)))
        stepper.step()
        if (step + 1) % setting.every == 0:
            losses.append(test_loss(run, driven, test))
            run.progress(f"{arm}, {optimizer} {lr:g}, {activation}, seed {seed}", step + 1, setting.steps)
    return Trained(losses, setting.every, gradients, weight_gradients, before, deviations(driven))


def images(run: Run, split: str, count: int) -> tuple[Tensor, Tensor]:
    """Images standardised by the mean and deviation of the training images."""
    train = run.data(run.setting.data, "train").float()[:, :1]
    data = run.data(run.setting.data, split)
    data = data.subset(min(count, len(data)))
    return ((data.float()[:, :1] - train.mean()) / train.std()).to(run.device), data.labels.to(run.device)


def factor_of(run: Run, gamma: float) -> float:
    """Features of low + (high - low) gamma pixels, rounded, as a part of the image's."""
    setting = run.setting
    return round(setting.low + (setting.high - setting.low) * gamma) / setting.size


@torch.no_grad()
def test_loss(run: Run, driven: HyperDriven, test: tuple[Tensor, Tensor]) -> float:
    """Mean cross entropy over GAMMAS; chance where it is not finite."""
    losses = []
    for gamma in GAMMAS:
        fixed = driven.at(gamma=gamma)
        parts = [
            functional.cross_entropy(fixed(x, factor_of(run, gamma)), y, reduction="sum")
            for x, y in zip(test[0].split(1000), test[1].split(1000))
        ]
        losses.append(float(torch.stack(parts).sum()) / len(test[0]))
    mean = statistics.fmean(losses)
    return mean if math.isfinite(mean) else CHANCE


def deviations(driven: HyperDriven) -> list[float]:
    """Of all predicted entries together, for gamma = 0, 0.1, ..., 1."""
    gammas = torch.linspace(0, 1, 11, dtype=torch.float64)
    return magnitude_profile(driven, gammas[:, None]).deviation[""].tolist()


def best_rate(run: Run, optimizer: str, **options: Any) -> tuple[float, list[Trained]]:
    """The learning rate of the grid with the lowest final loss, and its runs."""
    rates = run.setting.adam if optimizer == "Adam" else run.setting.sgd
    found = {lr: run.each_seed(train_classifier, optimizer=optimizer, lr=lr, **options) for lr in rates}
    rate = min(found, key=lambda lr: mean_loss(found[lr]))
    return rate, found[rate]


def mean_loss(runs: Sequence[Trained]) -> float:
    return statistics.fmean(each.final for each in runs)


def variation(values: Sequence[float]) -> float:
    """Coefficient of variation: standard deviation over mean."""
    return statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else math.nan


def train_registration(run: Run, seed: int, arm: str, lr: float) -> Registered:
    """HyperMorph on pairs of the same digit."""
    setting = run.setting
    torch.manual_seed(seed)
    model = HyperMorph2d(
        RegistrationUNet(widths=setting.unet), hidden=setting.hidden, generator=run.generator(seed), **ARMS[arm]
    ).to(run.device)
    moving, fixed = pairs(run, "train", seed)
    test = pairs(run, "test", 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    stream = run.generator(1000 + seed)

    @torch.no_grad()
    def losses() -> list[float]:
        found = []
        for gamma in GAMMAS:
            parts = [
                float(registration_loss(model(a, b, gamma), b, gamma)) * len(a)
                for a, b in zip(test[0].split(500), test[1].split(500))
            ]
            found.append(sum(parts) / len(test[0]))
        return found

    model.eval()
    still = losses()
    model.train()
    for step in range(setting.pair_steps):
        gamma = torch.rand(1, generator=stream)
        chosen = torch.randint(len(moving), (setting.pair_batch,), generator=stream)
        loss = registration_loss(model(moving[chosen], fixed[chosen], gamma), fixed[chosen], gamma)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % setting.every == 0:
            run.progress(f"registration, {arm}, {lr:g}, seed {seed}", step + 1, setting.pair_steps)
    model.eval()
    found = losses()
    # A run that diverged has moved nothing of use.
    return Registered([a if math.isfinite(a) else b for a, b in zip(found, still)], still)


def pairs(run: Run, split: str, seed: int) -> tuple[Tensor, Tensor]:
    """Images, and for each another one of the same class."""
    setting = run.setting
    data = run.data(setting.pairs, split)
    data = data.subset(min(setting.pair_count if split == "train" else setting.pair_count // 4, len(data)))
    x, labels = data.float()[:, :1], data.labels
    if x.shape[-1] != setting.pair_size:
        x = functional.adaptive_avg_pool2d(x, setting.pair_size)
    partner = torch.empty_like(labels)
    generator = run.generator(seed)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        shuffled = members[torch.randperm(len(members), generator=generator)]
        partner[shuffled] = shuffled.roll(1)
    return x.to(run.device), x[partner].to(run.device)


def lines(table: Sequence[Mapping[str, Any]], x: alt.X, y: alt.Y, kinds: str | None = None) -> alt.Chart:
    """A line an arm; `kinds` titles a second distinction, by dashes."""
    arms = sorted({row["arm"] for row in table}, key=ORDER.index)
    encoding: dict[str, Any] = {"x": x, "y": y, "color": alt.Color("arm:N", title=None, sort=arms)}
    if kinds is not None:
        order = list(dict.fromkeys(row["kind"] for row in table))
        encoding["strokeDash"] = alt.StrokeDash("kind:N", title=kinds, sort=order)
    return (
        alt.Chart(alt.Data(values=list(table)))
        .mark_line(strokeWidth=2.5)
        .encode(**encoding)
        .properties(width="container", height=260)
    )


def convergence(runs: Mapping[tuple[str, str], Sequence[Trained]]) -> alt.Chart:
    """Mean cross entropy over seeds against steps, by arm and optimiser."""
    table = [
        {
            "arm": arm,
            "kind": optimizer,
            "x": i * found[0].every,
            "y": statistics.fmean(each.losses[i] for each in found),
        }
        for (arm, optimizer), found in runs.items()
        for i in range(len(found[0].losses))
    ]
    several = len({optimizer for _, optimizer in runs}) > 1
    return lines(
        table,
        x=alt.X("x:Q", title="step"),
        y=alt.Y("y:Q", title="cross entropy, mean over gamma", scale=alt.Scale(type="log", nice=False)),
        kinds="optimiser" if several else None,
    )


def deviation_lines(run: Run) -> alt.Chart:
    """Deviation of the weights against gamma at the start, of the first seed."""
    table = [
        {"arm": arm, "x": i / 10, "y": value}
        for arm in ARMS
        for i, value in enumerate(deviations(build(run, run.seeds[0], arm)))
    ]
    return lines(table, x=alt.X("x:Q", title="gamma"), y=alt.Y("y:Q", title="deviation of the predicted weights"))


def gradient_norms(runs: Mapping[str, Sequence[Trained]]) -> alt.Chart:
    """Gradient norm at every step, of the first seed."""
    table = [
        {"arm": arm, "step": step + 1, "norm": norm}
        for arm, found in runs.items()
        for step, norm in enumerate(found[0].gradients)
        if norm > 0
    ]
    return alt.Chart(alt.Data(values=table)).mark_line(strokeWidth=1).encode(
        x=alt.X("step:Q"),
        y=alt.Y(
            "norm:Q",
            title="norm of the gradient",
            scale=alt.Scale(type="log"),
            axis=alt.Axis(format=".0e", values=[10.0**power for power in range(-8, 4)]),
        ),
        color=alt.Color("arm:N", title=None, sort=ORDER[:2]),
    ).properties(width="container", height=260)  # fmt: skip


def points(runs: Mapping[str, Mapping[str, Sequence[Trained]]]) -> alt.Chart:
    """Final cross entropy, a point a seed, by activation and arm."""
    table = [
        {"activation": activation, "arm": arm, "seed": seed, "loss": each.final}
        for activation, arms in runs.items()
        for arm, found in arms.items()
        for seed, each in enumerate(found)
    ]
    return alt.Chart(alt.Data(values=table)).mark_point(filled=True, size=80).encode(
        x=alt.X("loss:Q", title="cross entropy, mean over gamma", scale=alt.Scale(type="log", nice=False, padding=20)),
        y=alt.Y("activation:N", title=None, sort=list(runs)),
        color=alt.Color("arm:N", title=None, sort=ORDER[:2]),
        tooltip=["activation:N", "arm:N", "seed:Q", "loss:Q"],
    ).properties(width="container", height=260)  # fmt: skip
