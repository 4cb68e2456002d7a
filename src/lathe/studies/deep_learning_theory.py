"""Does theory at first order in 1/width say how deep networks of finite width start, train and differ?"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import altair as alt
import torch
from torch import Tensor
from torch.nn import functional as F

from lathe.core.gaussian import activation
from lathe.studies.engine import Measurement, Run, Setting, Study, at_least, at_most, between, compare, equals
from lathe.theory.deep_learning_theory import (
    NoCriticalPoint,
    critical_point,
    finite_width,
    finite_width_single,
    fluctuation_rate,
    information_series,
    layer_rates,
    output_information,
    susceptibilities,
)


class Deep(NamedTuple):
    """Deep tanh networks of C5: layers, width, and how they are trained on batches of 50."""

    depth: int
    width: int
    momentum: float
    lrs: tuple[float, ...]


study = Study(
    "deep-learning-theory",
    title="The Principles of Deep Learning Theory",
    authors="Roberts, Yaida, Hanin",
    year=2021,
    arxiv="2106.10165",
    area="theory",
    module="lathe.theory.deep_learning_theory",
    summary="""Finds for any activation the initialisation that neither explodes nor vanishes with depth, the learning
    rates that make all layers count equally, and how deep a network of a given width may be. Predicts what finite width
    adds to the infinitely wide network: fluctuations between draws, and features that move.""",
    example="""
import torch
from torch import nn
from lathe.theory.deep_learning_theory import aspect_ratio, critical_init_, critical_param_groups, depth_report

model = nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(64, 64), nn.GELU())], nn.Linear(64, 10))
layers = critical_init_(model)                       # finds the activation, solves for its critical (C_b, C_W)
optimizer = torch.optim.SGD(critical_param_groups(model, lr=0.5))   # every layer moves the output equally
report = depth_report(model, torch.randn(2, 64), draws=50)          # measured over fresh draws, beside theory
assert abs(layers[0].C_W - 1.98305826) < 1e-8 and (report.kernel > 0.5).all() and 0.01 < aspect_ratio("gelu", 10) < 0.02
""",
    job="predict",
    scales={
        "smoke": Setting(
            seeds=1, nets=4000, width=64, wide=128, depth=10, sampled_nets=2000, sampled_width=24, sampled_chunk=1000,
            data="digits", deep_steps=40,
            deep={"planned": Deep(20, 32, 0.0, (0.003, 0.01)), "wider": Deep(20, 64, 0.9, (0.001, 0.003))},
            depths=(4, 8), rate_width=32, rate_examples=64, rate_steps=10, octaves=(-4, 4),
            shapes=((2, 64), (4, 32)), shape_nets=20, shape_inputs=8,
        ),
        "desk": Setting(
            nets=200_000, width=64, wide=256, depth=10, sampled_nets=20_000, sampled_width=30, sampled_chunk=2000,
            data="digits", deep_steps=300,
            deep={
                "planned": Deep(60, 64, 0.0, (0.003, 0.01, 0.03)),
                "wider": Deep(100, 128, 0.9, (0.0003, 0.001, 0.003)),
            },
            depths=(4, 8, 16, 32), rate_width=64, rate_examples=256, rate_steps=30, octaves=(-6, 6),
            shapes=((2, 100), (3, 75), (4, 50), (6, 50), (8, 40), (9, 30)), shape_nets=200, shape_inputs=8,
        ),
        "full": Setting(
            nets=1_000_000, width=64, wide=256, depth=10, sampled_nets=1_000_000, sampled_width=200, sampled_chunk=1000,
            data="mnist", deep_steps=5000,
            deep={
                "planned": Deep(200, 64, 0.0, (0.001, 0.003, 0.01)),
                "wider": Deep(200, 300, 0.9, (0.0001, 0.0003, 0.001)),
            },
            depths=(4, 8, 16, 32, 64), rate_width=512, rate_examples=2000, rate_steps=100, octaves=(-6, 6),
            shapes=((2, 100), (4, 200), (4, 50), (8, 100), (12, 60), (30, 100)), shape_nets=1000, shape_inputs=16,
        ),
    },
)  # fmt: skip

TABLE = {
    "relu": (0.0, 2.0),
    "tanh": (0.0, 1.0),
    "sin": (0.0, 1.0),
    "gelu": (0.17292239, 1.98305826),
    "swish": (0.55514317, 1.98800468),
}


@study.claim(
    "C1",
    "Solving for the critical point gives the known initialisations, and none for softplus and sigmoid",
    paper="Chapter 5: ReLU (0, 2), tanh and sin (0, 1), GELU (0.17292239, 1.98305826), SWISH (0.55514317, 1.98800468)",
    kind="exact",
    holds=at_most(1e-8),
    unit="largest difference of C_b or C_W",
    also={"activations refused": equals(2)},
)
def critical_points_of_the_book(run: Run) -> Measurement:
    errors = []
    for name, values in TABLE.items():
        point = critical_point(name)
        errors += [abs(point.C_b - values[0]), abs(point.C_W - values[1])]
    refused = 0
    for name in ("softplus", "sigmoid"):
        try:
            critical_point(name)
        except NoCriticalPoint:
            refused += 1
    return Measurement(max(errors), also={"activations refused": refused})


@study.claim(
    "C2",
    "Fluctuations of the kernel between draws grow as depth over width: by 5 for ReLU, 2 for linear, 2/3 for tanh",
    paper="Chapters 3-5: V/(n K^2) = 5 l/n (ReLU), 2 l/n (linear), -> (2/3) l/n (tanh)",
    holds=at_most(0.05),
    unit="largest relative error of the growth, over activations",
    also={"tanh: V / (K² l) at layer 200": between(0.655, 0.657)},
)
def fluctuations_grow_with_depth(run: Run) -> Measurement:
    s, rows, errors, growth = run.setting, [], [], {}
    for name in ("linear", "relu", "tanh"):
        point = critical_point(name)
        K1 = torch.ones((), dtype=torch.float64)
        for n in (s.width, s.wide):
            moments = torch.stack(
                [torch.stack(run_) for run_ in run.each_seed(kernel_moments_of_draws, name=name, n=n)]
            )
            mean, square = moments.mean(0)
            if point.universality == "scale-invariant":
                # E[G^2]/E[G]^2 = (1 + nu/n)^(l-1) exactly.
                log_growth = torch.log(square[1:] / mean[1:] ** 2) / torch.arange(1, s.depth)
                rate = n * math.expm1(log_growth[-1].item())
                theory, line = point.nu, n * ((1 + point.nu / n) ** torch.arange(s.depth) - 1)
            else:
                predicted = finite_width_single(K1, [1] + [n] * s.depth, name, point.C_b, point.C_W)
                line = predicted["V"] / predicted["K"] ** 2
                rate, theory = (
                    (n * (square[-1] / mean[-1] ** 2 - 1) / (s.depth - 1)).item(),
                    line[-1].item() / (s.depth - 1),
                )
            if n == s.wide:
                growth[name] = rate
                errors.append(abs(rate / theory - 1))
            for layer, (m, q, t) in enumerate(zip(mean.tolist(), square.tolist(), line.tolist()), 1):
                rows += [
                    {"layer": layer, "fluctuation": (q / m**2 - 1), "from": f"{name}, n = {n}", "who": "draws"},
                    {"layer": layer, "fluctuation": t / n, "from": f"{name}, n = {n}", "who": "theory"},
                ]
    deep = finite_width_single(torch.ones((), dtype=torch.float64), [1] * 201, "tanh", 0.0, 1.0)
    run.figure(
        alt.Chart(alt.Data(values=rows), width="container", height=260)
        .mark_line(point=True)
        .encode(
            x=alt.X("layer:Q", title="layer"),
            y=alt.Y("fluctuation:Q", title="Var(G) / E[G]², between draws"),
            color=alt.Color("from:N", title="network"),
            strokeDash=alt.StrokeDash("who:N", title=None),
        )
    )
    return Measurement(
        max(errors),
        seeds=len(run.seeds),
        also={
            "tanh: V / (K² l) at layer 200": (deep["V"][199] / deep["K"][199] ** 2 / 200).item(),
            "ReLU growth": growth["relu"],
            "linear growth": growth["linear"],
            "tanh growth": growth["tanh"],
        },
        note="growth a layer at the larger width, the exact power (1 + nu/n)^(l-1) divided out; a layer's neurons are "
        "drawn independently, as they are given the kernel of the layer before",
    )


def kernel_moments_of_draws(run: Run, seed: int, name: str, n: int) -> tuple[Tensor, Tensor]:
    """`E[G]` and `E[G^2]` at each layer over drawn networks that start from K = 1."""
    s, act, point = run.setting, activation(name), critical_point(name)
    generator = run.generator(seed)
    nets, chunk = s.nets // len(run.seeds), 2000
    total = torch.zeros(2, s.depth, dtype=torch.float64)
    for start in range(0, nets, chunk):
        count = min(chunk, nets - start)
        G = torch.ones(count, dtype=torch.float64)
        for layer in range(s.depth):
            total[:, layer] += torch.stack([G.sum(), (G * G).sum()])
            if layer + 1 < s.depth:
                z = torch.randn(count, n, generator=generator) * G.sqrt().float().unsqueeze(1)
                G = point.C_b + point.C_W * act(z).square().mean(1).double()
        run.progress(f"{name}, n = {n}", start, nets)
    total /= nets
    return total[0], total[1]


@study.claim(
    "C3",
    "At criticality tanh kernels decay as a power, K l (-a_1) -> 1; elsewhere they relax exponentially, as predicted",
    paper="Chapter 5: K ~ 1/((-a_1) l); correlation length 1/|log chi|",
    kind="exact",
    holds=between(0.99, 1.01),
    unit="K l (-a_1) at layer 1000",
    also={"error of the exponential rates": at_most(1e-3)},
)
def power_law_at_criticality(run: Run) -> Measurement:
    K1, errors, rows = torch.ones((), dtype=torch.float64), [], []
    for C_W in (0.9, 1.0, 1.1):
        K = finite_width_single(K1, [1] * 1001, "tanh", 0.0, C_W)["K"]
        picked = sorted({round(1.2**k) for k in range(1, 38)} | {1})
        rows += [
            {"layer": layer, "K": K[layer - 1].item(), "C_W": f"{C_W:g}"} for layer in picked if K[layer - 1] > 1e-12
        ]
        if C_W == 1.0:
            critical = 2 * 1000 * K[999].item()
            continue
        fixed = K[-1] if C_W > 1 else torch.zeros_like(K1)
        # Fitted where the distance is small enough for linear response and far above rounding.
        gap = (K - fixed).abs()
        inside = ((gap < 1e-4) & (gap > 1e-8)).nonzero()[:, 0]
        rate = (gap[inside[-1]] / gap[inside[0]]).log() / (inside[-1] - inside[0])
        chi = susceptibilities(fixed.clamp_min(1e-14), "tanh", 0.0, C_W)[0]
        errors.append(abs(rate - chi.log()).item())
    run.figure(
        alt.Chart(alt.Data(values=rows), width="container", height=260)
        .mark_line()
        .encode(
            x=alt.X("layer:Q", title="layer").scale(type="log"),
            y=alt.Y("K:Q", title="kernel K").scale(type="log"),
            color=alt.Color("C_W:N", title="C_W"),
        )
    )
    return Measurement(critical, also={"error of the exponential rates": max(errors)})


@study.claim(
    "C4",
    "The seven order-1/n tensors describe networks of finite width, NTK and its differential included",
    paper="Chapters 4, 8, 11: recursions of V, D, F, A, B, P, Q",
    holds=at_most(1.0),
    unit="largest deviation, in units of 4 standard errors + 3/n of the tensor",
)
def tensors_match_sampled_networks(run: Run) -> Measurement:
    s = run.setting
    n, x = s.sampled_width, sampled_inputs()
    predicted = finite_width(x, [3, n, n, 2], "tanh", 0.1, 1.2, 0.3, 0.7)
    rows, scores = [], {}
    samples = run.each_seed(sample_tensors)
    for name in "VDFABPQ":
        theory = predicted[name][2].flatten()
        mean = torch.stack([torch.tensor(sample[name][0]) for sample in samples]).mean(0)
        error = torch.stack([torch.tensor(sample[name][1]) for sample in samples]).square().sum(0).sqrt() / len(samples)
        allowed = 4 * error + 3 / n * theory.abs().max()
        scores[name] = ((mean - theory).abs() / allowed).max().item()
        rows += [
            {"theory": round(t, 5), "sampled": round(m, 5), "tensor": name, "low": m - 2 * e, "high": m + 2 * e}
            for t, m, e in zip(theory.tolist(), mean.tolist(), error.tolist())
        ]
    base = alt.Chart(alt.Data(values=rows)).encode(x=alt.X("theory:Q", title="theory, order 1/n"), color="tensor:N")
    run.figure(
        alt.layer(
            base.mark_rule().encode(y=alt.Y("low:Q", title="mean over networks, ± 2 s.e."), y2="high:Q"),
            base.mark_circle(size=40).encode(y="sampled:Q"),
        ).properties(width="container", height=260)
    )
    return Measurement(max(scores.values()), seeds=len(run.seeds), also=scores)


def sampled_inputs() -> Tensor:
    return torch.tensor([[0.9, -0.4, 1.1], [-0.3, 0.8, 0.5]], dtype=torch.float64)


def sample_tensors(run: Run, seed: int) -> dict[str, tuple[list[float], list[float]]]:
    """Mean and standard error of each tensor's estimator over drawn tanh networks of three layers and two outputs."""
    s = run.setting
    nets = s.sampled_nets // len(run.seeds)
    generator = run.generator(seed)
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, nets, s.sampled_chunk):
        run.progress("networks", start, nets)
        drawn = draw_networks(s.sampled_chunk, [3, s.sampled_width, s.sampled_width, 2], 0.1, 1.2, generator)
        for name, value in observe(drawn, sampled_inputs()).items():
            parts.setdefault(name, []).append(value)
    z, G, H, dH = (torch.cat(parts[name]) for name in ("z", "G", "H", "dH"))
    n = s.sampled_width
    dG, DH = G - G.mean(0), H - H.mean(0)
    # Neurons 0 and 1 of the output are as good as any pair: both orders are averaged.
    per_net = {
        "V": [torch.einsum("tab,tcd->tabcd", dG, dG)],
        "D": [torch.einsum("ta,tb,tcd->tabcd", z[:, :, i], z[:, :, i], DH[:, :, :, j, j]) for i, j in ((0, 1), (1, 0))],
        "F": [torch.einsum("ta,tb,tcd->tacbd", z[:, :, i], z[:, :, j], H[..., i, j]) for i, j in ((0, 1), (1, 0))],
        "A": [torch.einsum("tab,tcd->tabcd", DH[..., 0, 0], DH[..., 1, 1])],
        "B": [torch.einsum("tab,tcd->tacbd", H[..., i, j], H[..., i, j]) for i, j in ((0, 1), (1, 0))],
        "P": [torch.einsum("tabc,td->tabcd", dH[..., i, j, j], z[:, :, i]) for i, j in ((0, 1), (1, 0))],
        "Q": [torch.einsum("tabc,td->tabcd", dH[..., i, i, j], z[:, :, j]) for i, j in ((0, 1), (1, 0))],
    }
    found = {}
    for name, versions in per_net.items():
        values = n * torch.stack(versions).mean(0).flatten(1)
        found[name] = (values.mean(0).tolist(), (values.std(0) / math.sqrt(len(values))).tolist())
    return found


def draw_networks(
    count: int, widths: list[int], C_b: float, C_W: float, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Weights and biases of `count` networks at a time: `(count, out, in)`, `(count, 1, out)`, layer by layer."""
    drawn = []
    for fan_in, fan_out in itertools.pairwise(widths):
        drawn.append(
            torch.randn(count, fan_out, fan_in, dtype=torch.float64, generator=generator) * math.sqrt(C_W / fan_in)
        )
        drawn.append(torch.randn(count, 1, fan_out, dtype=torch.float64, generator=generator) * math.sqrt(C_b))
    return tuple(drawn)


def observe(drawn: tuple[Tensor, ...], x: Tensor) -> dict[str, Tensor]:
    """Outputs, last kernel, NTK and its differential of a batch of networks, by autograd alone."""
    lambda_b, lambda_W, C_b, C_W = 0.3, 0.7, 0.1, 1.2

    def network(*parameters: Tensor) -> tuple[Tensor, Tensor]:
        h = x.expand(len(parameters[0]), -1, -1)
        for i in range(0, len(parameters), 2):
            entered = h if i == 0 else torch.tanh(h)
            h = torch.baddbmm(parameters[i + 1], entered, parameters[i].mT)
        return h, entered

    leaves = [p.requires_grad_() for p in drawn]
    z, entered = network(*leaves)
    count, inputs, outputs = z.shape
    # The networks do not meet, so that one backward pass gives each its own gradient.
    gradients = [
        torch.autograd.grad(z[:, a, i].sum(), leaves, retain_graph=True) for a in range(inputs) for i in range(outputs)
    ]
    rates = [lambda_W / p.shape[-1] if k % 2 == 0 else lambda_b for k, p in enumerate(leaves)]
    flat = [torch.stack([g[k].flatten(1) for g in gradients], 1) for k in range(len(leaves))]
    H = torch.stack([rate * f @ f.mT for rate, f in zip(rates, flat)]).sum(0)
    frozen = tuple(p.detach() for p in drawn)
    size = inputs * outputs
    dH = torch.zeros(count, inputs, outputs, size, size, dtype=torch.float64)
    for first in range(size):
        for second in range(first, size):
            v, w = (tuple(r * g for r, g in zip(rates, gradients[k])) for k in (first, second))

            def once(*p: Tensor, v: tuple[Tensor, ...] = v) -> Tensor:
                return torch.func.jvp(lambda *q: network(*q)[0], p, v)[1]

            dH[..., first, second] = dH[..., second, first] = torch.func.jvp(once, frozen, w)[1]
    entered = entered.detach()
    shape = (count, inputs, outputs, inputs, outputs)
    return {
        "z": z.detach(),
        "G": C_b + C_W * entered @ entered.mT / entered.shape[-1],
        "H": H.reshape(shape).permute(0, 1, 3, 2, 4),
        "dH": dH.reshape(count, inputs, outputs, *shape[1:]).permute(0, 1, 3, 5, 2, 4, 6),
    }


@study.claim(
    "C5",
    "Tanh networks that are far deeper than usual train from the critical initialisation, and from no other",
    paper="Chapter 5: signals of ordered and chaotic networks die or scramble within a correlation length",
    holds=at_least(10.0),
    unit="points of accuracy, critical against the better of the two others",
)
def only_critical_networks_train(run: Run) -> Measurement:
    best: dict[str, dict[float, list[float]]] = {}
    rows = []
    for name, design in run.setting.deep.items():
        results = {C_W: run.each_seed(train_deep, C_W=C_W, design=name) for C_W in (0.5, 1.0, 2.0)}
        best[name] = {C_W: [max(by_lr) for by_lr in runs] for C_W, runs in results.items()}
        rows += [
            {"C_W": f"{C_W:g}", "network": f"depth {design.depth}, width {design.width}", "accuracy": accuracy}
            for C_W, runs in best[name].items()
            for accuracy in runs
        ]
    run.figure(
        alt.Chart(alt.Data(values=rows), width="container", height=260)
        .mark_point(filled=True, size=80, opacity=0.8)
        .encode(
            x=alt.X("C_W:N", title="C_W").axis(labelAngle=0),
            xOffset="network:N",
            y=alt.Y("accuracy:Q", title="test accuracy (%), best rate of three").scale(domain=[0, 100]),
            color=alt.Color("network:N", title=None),
        )
    )
    also: dict[str, float] = {}
    for name, by_C_W in best.items():
        also |= {f"{name} network, C_W = {C_W:g}": statistics.fmean(values) for C_W, values in by_C_W.items()}
    wider = best["wider"]
    also["wider network, critical against the better other"] = statistics.fmean(
        critical - max(pair) for critical, *pair in zip(wider[1.0], wider[0.5], wider[2.0])
    )
    planned = best["planned"]
    return compare(
        planned[1.0],
        [max(pair) for pair in zip(planned[0.5], planned[2.0])],
        also=also,
        note="""judged on the network planned beforehand, depth 60 and width 64. Its depth is of the order of its width,
        so that fluctuations from net to net drown the difference, and C_W = 2 with its correlation length of 10 layers
        is only mildly chaotic. The wider network was chosen after seeing that, on seed 0; its margin is recorded here,
        not judged""",
    )


def train_deep(run: Run, seed: int, C_W: float, design: str) -> list[float]:
    """Test accuracy (%) of one tanh network for each learning rate, trained side by side by SGD."""
    steps, deep = run.setting.deep_steps, run.setting.deep[design]
    (x, y), (x_test, y_test) = images(run, seed)
    widths = [x.shape[1]] + [deep.width] * (deep.depth - 1) + [10]
    generator = run.generator(seed)
    one = tuple(p.float() for p in draw_networks(1, widths, 0.0, C_W, generator))
    stack = [p.repeat(len(deep.lrs), 1, 1).to(run.device) for p in one]
    rates = [torch.tensor(deep.lrs, device=run.device)] * len(stack)
    velocities = [torch.zeros_like(p) for p in stack]
    for step in range(steps):
        pick = torch.randint(len(x), (50,), generator=generator)

        def losses(z: Tensor, pick: Tensor = pick) -> Tensor:
            return cross_entropies(z, y[pick])

        descend(stack, rates, x[pick], losses, torch.tanh, velocities, deep.momentum)
        if step % 20 == 0:
            run.progress(f"tanh, C_W = {C_W:g}", step, steps)
    z = forward(stack, x_test, torch.tanh)
    return (100 * (z.argmax(-1) == y_test).float().mean(-1)).tolist()


def images(run: Run, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Flat images of zero mean and unit mean square in all, for training and for testing."""
    loaded = [run.data(run.setting.data, split) for split in ("train", "test")]
    order = torch.randperm(len(loaded[0]), generator=run.generator(seed))
    parts = [(loaded[0].float()[order], loaded[0].labels[order]), (loaded[1].float(), loaded[1].labels)]
    mean, scale = parts[0][0].mean(), parts[0][0].std()
    (x, y), (x_test, y_test) = [(((x - mean) / scale).flatten(1).to(run.device), y.to(run.device)) for x, y in parts]
    return (x, y), (x_test, y_test)


def forward(stack: list[Tensor], x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Outputs (nets, examples, classes) of a stack of networks on the same examples."""
    h = x.expand(len(stack[0]), -1, -1)
    for i in range(0, len(stack), 2):
        h = torch.baddbmm(stack[i + 1], h if i == 0 else act(h), stack[i].mT)
    return h


def cross_entropies(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.transpose(1, 2), y.expand(len(z), -1), reduction="none").mean(1)


def descend(
    stack: list[Tensor],
    rates: list[Tensor],
    x: Tensor,
    losses: Callable[[Tensor], Tensor],
    act: Callable[[Tensor], Tensor],
    velocities: list[Tensor] | None = None,
    momentum: float = 0.0,
) -> Tensor:
    """One step of SGD in place, with a rate for each network and parameter; returns the losses before it."""
    leaves = [p.requires_grad_() for p in stack]
    values = losses(forward(leaves, x, act))
    gradients = torch.autograd.grad(values.sum(), leaves)
    with torch.no_grad():
        if velocities is not None:
            gradients = tuple(v.mul_(momentum).add_(g) for v, g in zip(velocities, gradients))
        for parameter, rate, gradient in zip(stack, rates, gradients):
            parameter.sub_(rate.to(parameter).reshape(-1, 1, 1) * gradient)
            parameter.detach_()
    return values.detach()


@study.claim(
    "C6",
    "With learning rates by the equivalence principle the best global rate does not depend on depth",
    paper="Chapter 9: lambda = 1/L for scale-invariant activations",
    holds=at_most(1.0),
    unit="octaves by which the best rate moves",
    also={"octaves with constant rates": at_least(2.0)},
)
def best_rate_does_not_move(run: Run) -> Measurement:
    low, high = run.setting.octaves
    rows, moved = [], {}
    for scaled, told in ((True, "by depth (1/L)"), (False, "constant")):
        best = []
        for depth in run.setting.depths:
            losses = torch.tensor(run.each_seed(losses_by_rate, depth=depth, scaled=scaled)).mean(0)
            best.append(losses.argmin().item())
            rows += [
                {"rate": 2.0**k, "loss": min(loss, 3.0), "depth": str(depth), "rates": told}
                for k, loss in zip(range(low, high + 1), losses.tolist())
                if math.isfinite(loss)
            ]
        moved[scaled] = float(max(best) - min(best))
    run.figure(
        alt.Chart(alt.Data(values=rows), width=260, height=260)
        .mark_line(point=True)
        .encode(
            x=alt.X("rate:Q", title="global learning rate").scale(type="log", base=2),
            y=alt.Y("loss:Q", title="training loss"),
            color=alt.Color("depth:O", title="depth"),
            column=alt.Column("rates:N", title=None),
        )
    )
    return Measurement(
        moved[True], baseline=moved[False], seeds=len(run.seeds), also={"octaves with constant rates": moved[False]}
    )


def losses_by_rate(run: Run, seed: int, depth: int, scaled: bool) -> list[float]:
    """Training loss of a critical ReLU network after full-batch descent, for each octave of the global rate."""
    s = run.setting
    (x, y), _ = images(run, seed)
    x, y = x[: s.rate_examples], y[: s.rate_examples]
    widths = [x.shape[1]] + [s.rate_width] * (depth - 1) + [10]
    octaves = torch.arange(s.octaves[0], s.octaves[1] + 1)
    one = [p.float() for p in draw_networks(1, widths, 0.0, 2.0, run.generator(seed))]
    stack = [p.repeat(len(octaves), 1, 1).to(run.device) for p in one]
    rates, point = [], critical_point("relu")
    for layer in range(1, depth + 1):
        lambda_b, lambda_W = layer_rates(point, layer, depth) if scaled else (1.0, 1.0)
        rates += [2.0**octaves * lambda_W / widths[layer - 1], 2.0**octaves * lambda_b]
    for step in range(s.rate_steps):
        run.progress(f"depth {depth}", step, s.rate_steps)
        descend(stack, rates, x, lambda z: cross_entropies(z, y), torch.relu)
    losses = cross_entropies(forward(stack, x, torch.relu), y).detach()
    return torch.where(torch.isfinite(losses), losses, math.inf).clamp_max(20.0).tolist()


@study.claim(
    "C7",
    "How much training moves the NTK, that is the features, grows in proportion to depth over width",
    paper="Chapter 11: the NTK's differential over the NTK is of order L/n",
    holds=between(0.7, 1.3),
    unit="slope of log NTK change by log L/n",
)
def features_move_with_depth_over_width(run: Run) -> Measurement:
    shapes = run.setting.shapes
    changes = [run.each_seed(ntk_change, depth=depth, width=width) for depth, width in shapes]
    slopes = []
    ratios = torch.tensor([depth / width for depth, width in shapes], dtype=torch.float64).log()
    for of_seed in zip(*changes):
        logs = torch.tensor(of_seed, dtype=torch.float64).log()
        centred = ratios - ratios.mean()
        slopes.append(((centred * logs).sum() / (centred * centred).sum()).item())
    rows = [
        {"ratio": depth / width, "change": statistics.fmean(values), "shape": f"L = {depth}, n = {width}"}
        for (depth, width), values in zip(shapes, changes)
    ]
    run.figure(
        alt.Chart(alt.Data(values=rows), width="container", height=260)
        .mark_circle(size=80)
        .encode(
            x=alt.X("ratio:Q", title="depth / width").scale(type="log"),
            y=alt.Y("change:Q", title="relative change of the NTK").scale(type="log"),
            color=alt.Color("shape:N", title=None),
        )
    )
    return Measurement(
        statistics.fmean(slopes),
        spread=statistics.stdev(slopes) if len(slopes) > 1 else None,
        seeds=len(slopes),
        samples=slopes,
    )


def ntk_change(run: Run, seed: int, depth: int, width: int) -> float:
    """Median relative change of critical ReLU networks' NTK once descent has halved the loss."""
    s = run.setting
    generator = run.generator(seed)
    features = 16
    x = torch.randn(s.shape_inputs, features, dtype=torch.float64, generator=generator)
    x = x / x.square().mean(1, keepdim=True).sqrt()
    y = torch.randn(s.shape_inputs, 1, dtype=torch.float64, generator=generator)
    widths = [features] + [width] * (depth - 1) + [1]
    stack = list(draw_networks(s.shape_nets, widths, 0.0, 2.0, generator))
    fan_in = [w for fan in widths[:-1] for w in (fan, 1)]
    start, before = stack_ntk(stack, x), None
    # One step takes half of the error along a direction of the NTK's mean eigenvalue: about 20 halve the loss.
    speed = 0.5 * s.shape_inputs / start.diagonal(dim1=1, dim2=2).sum(1)
    rates = [speed / fan for fan in fan_in]
    change = torch.full((s.shape_nets,), math.nan, dtype=torch.float64)
    for _ in range(200):
        now = stack_ntk(stack, x)
        losses = descend(stack, rates, x, lambda z: (z - y).square().mean((1, 2)), torch.relu)
        before = losses if before is None else before
        moved = (now - start).flatten(1).norm(dim=1) / start.flatten(1).norm(dim=1)
        change = torch.where(change.isnan() & (losses <= 0.5 * before), moved, change)
        if not change.isnan().any():
            break
    return change.nanmedian().item()


def stack_ntk(stack: list[Tensor], x: Tensor) -> Tensor:
    """NTKs (nets, inputs, inputs) of ReLU networks with one output, rates 1/fan_in and 1, by the chain rule."""
    h, entered, open_ = x.expand(len(stack[0]), -1, -1), [], []
    for i in range(0, len(stack), 2):
        entered.append(h)
        z = torch.baddbmm(stack[i + 1], h, stack[i].mT)
        open_.append((z > 0).to(z))
        h = torch.relu(z)
    delta = torch.ones_like(z)
    total = torch.zeros(len(h), len(x), len(x), dtype=h.dtype)
    for layer in reversed(range(len(entered))):
        inside = entered[layer] @ entered[layer].mT / entered[layer].shape[-1] + 1
        total = total + inside * (delta @ delta.mT)
        if layer:
            delta = (delta @ stack[2 * layer]) * open_[layer - 1]
    return total


@study.claim(
    "C8",
    "Outputs inform each other most at the depth-to-width ratio 4 / ((20 + 3 n_L) nu)",
    paper="Appendix A: r* = 4 / ((20 + 3 n_L) nu), nu = 2 (linear), 5 (ReLU), 2/3 (tanh)",
    kind="exact",
    holds=equals(0.0),
    unit="series coefficients that differ",
    also={"error of the measured third-order coefficient": at_most(1e-3)},
)
def optimal_ratio(run: Run) -> Measurement:
    wrong = 0
    for m1 in range(1, 7):
        for m2 in range(1, 7):
            second, third = information_series(m1, m2)
            wrong += (8 * second != m1 * m2) + (6 * third != -second * (3 * (m1 + m2) + 20))
    # In terms of the log-normal's own parameter s the 20 becomes 14: v = exp(s) - 1.
    errors = []
    for m1, m2 in ((1, 1), (2, 3)):
        sizes = torch.tensor([0.0005, 0.00075, 0.001, 0.00125, 0.0015], dtype=torch.float64)
        ratios = torch.tensor([output_information(m1, m2, s) / s**2 for s in sizes.tolist()], dtype=torch.float64)
        fit = torch.linalg.solve(torch.stack([sizes**k for k in range(5)], 1), ratios)
        errors.append(abs(fit[1].item() / (-(m1 * m2 / 8) * (3 * (m1 + m2) + 14) / 6) - 1))
    nu, rows = fluctuation_rate("relu"), []
    for n_out in (2, 10):
        quadratic, cubic = map(float, information_series(n_out // 2, n_out - n_out // 2))
        for k in range(61):
            ratio = k / 60 * 0.06
            information = quadratic * (nu * ratio) ** 2 + cubic * (nu * ratio) ** 3
            rows.append({"ratio": ratio, "information": max(information, 0.0), "outputs": str(n_out)})
    run.figure(
        alt.Chart(alt.Data(values=rows), width="container", height=260)
        .mark_line()
        .encode(
            x=alt.X("ratio:Q", title="depth / width (ReLU)"),
            y=alt.Y("information:Q", title="mutual information (nats), cut series"),
            color=alt.Color("outputs:N", title="outputs"),
        )
    )
    return Measurement(float(wrong), also={"error of the measured third-order coefficient": max(errors)})
