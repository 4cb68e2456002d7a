"""Which scaling rules learn features, and what do infinitely wide networks that do so do?"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache

import altair as alt
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.studies.engine import Measurement, Run, Setting, Study, at_least, at_most, average, between, equals
from lathe.theory.infinite_width_feature_learning import (
    ABC,
    ABCNetwork,
    InfiniteWord2Vec,
    KernelLearner,
    LinearMuPLimit,
    LinearNetwork,
    Word2Vec,
    first_order_maml,
    parametrize,
)

#: Best settings of the reference code for MAML by width (0 is the limit): meta-rate, sigma_u, sigma_v, hidden bias.
MAML = {
    2: (0.05, 0.5, 0.5, 2.0),
    8: (0.1, 0.5, 0.25, 1.0),
    32: (0.4, 1.0, 1 / 8, 0.5),
    128: (0.1, 1.0, 1 / 8, 1.0),
    512: (0.1, 1.0, 1 / 32, 1.0),
    2048: (0.1, 1.0, 1 / 32, 1.0),
    8192: (0.1, 1.0, 1 / 32, 1.0),
    0: (0.1, 1.0, 1 / 32, 1.0),
}

study = Study(
    "infinite-width-feature-learning",
    title="Feature Learning in Infinite-Width Neural Networks",
    authors="Yang, Hu",
    year=2020,
    arxiv="2011.14522",
    area="theory",
    module="lathe.theory.infinite_width_feature_learning",
    summary="""Re-parametrises your model (muP) so that the learning rate tuned on a narrow copy stays right on the wide
    one and every layer keeps learning, for any torch optimiser. Judges any scaling rule of weights and rates with
    width, and trains the infinitely wide networks themselves.""",
    example="""
import torch
from torch import nn
from lathe.theory.infinite_width_feature_learning import ABC, coordinate_check, parametrize

def make_model(width):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))

model = make_model(width=512)
scaled = parametrize(model, base=make_model, base_width=16, optimizer=torch.optim.AdamW)   # print(scaled): a table
optimizer = torch.optim.AdamW(scaled.param_groups(lr=1e-2, weight_decay=0.1))             # as tuned at width 16
data = torch.randn(64, 8), torch.randint(4, (64,))
check = coordinate_check(make_model, [64, 256, 1024], data, torch.optim.AdamW, base_width=16, lr=1e-2, tolerance=0.2)
assert check.passed and scaled.rates["2.weight"] == 1 / 32 and ABC.ntk(3).kernel_regime      # check.plot()
""",
    job="predict",
    scales={
        "smoke": Setting(
            seeds=1, widths=(64, 128, 256), nets=2, grid=(-1, 1), train_every=2, moved_widths=(64, 512),
            limit_widths=(64, 256, 1024), limit_nets=10, characters="digits", maml_widths=(2, 8), outer=40,
            limit_outer=40, test_tasks=100, text=None, vocabulary=60, w2v_widths=(8, 32), w2v_epochs=1,
            images="digits", mlp_widths=(32, 128), steps=20, octaves=(-6, 1), entropy_width=64,
        ),
        "desk": Setting(
            widths=(128, 256, 512, 1024, 2048), nets=20, grid=(-2, 2), train_every=4, moved_widths=(64, 256, 1024),
            limit_widths=(64, 256, 1024, 4096, 16384), limit_nets=20, characters="omniglot",
            maml_widths=(2, 8, 32, 128), outer=1500, limit_outer=1500, test_tasks=2000, text="wikitext-2",
            vocabulary=1000, w2v_widths=(8, 32, 128, 512), w2v_epochs=3, images="digits",
            mlp_widths=(64, 256, 1024, 2048), steps=200, octaves=(-8, 3), entropy_width=1024,
        ),
        "full": Setting(
            widths=(128, 512, 2048, 8192, 32768), nets=20, grid=(-4, 4), train_every=1,
            moved_widths=(64, 256, 1024, 4096), limit_widths=(64, 256, 1024, 4096, 16384, 65536), limit_nets=100,
            characters="omniglot", maml_widths=(2, 8, 32, 128, 512, 2048, 8192), outer=10_000, limit_outer=10_000,
            test_tasks=20_000, text="wikitext-2", vocabulary=10_000, w2v_widths=(8, 32, 128, 512, 2048),
            w2v_epochs=15, images="mnist", mlp_widths=(64, 256, 1024, 4096, 8192), steps=1000, octaves=(-12, 3),
            entropy_width=8192,
        ),
    },
)  # fmt: skip

_HALF, _QUARTER = Fraction(1, 2), Fraction(1, 4)
RULES = {
    "NTP": ABC.ntk(2),
    "muP": ABC.mup(2),
    "SP, c = 1": ABC.standard(2),
    "muP, c = 1/4": ABC(ABC.mup(2).a, ABC.mup(2).b, _QUARTER),
    "between": ABC((-_QUARTER, _QUARTER, _HALF), (_QUARTER, _QUARTER, _QUARTER), 0),
}


@study.claim(
    "C1",
    "The exponents alone predict how a network's features and outputs move as it gets wider",
    paper="Theorems 3.2-3.8: training changes x^L by n^(-r), and f by n^0 where nontrivial",
    holds=at_most(0.08),
    unit="largest difference between a measured and a predicted slope, over 5 parametrizations",
)
def exponents_predict_movement(run: Run) -> Measurement:
    s, rows, errors, also = run.setting, [], [], {}
    for name, abc in RULES.items():
        moved = []
        for done, width in enumerate(s.widths):
            run.progress(f"{name}, width {width}", done, len(s.widths))
            nets = [moves(abc, width, seed) for seed in range(s.nets)]
            moved.append([statistics.fmean(of_layer) for of_layer in zip(*nets)])
        for what, values, predicted in zip(("features", "output"), zip(*moved), (-abc.r, -abc.change_exponents[-1])):
            slope = log_slope(s.widths, values)
            also[f"{name}: slope of the {what} (predicted {float(predicted):g})"] = slope
            if what == "features" or abc.nontrivial:
                errors.append(abs(slope - float(predicted)))
            rows += [
                {"width": n, "change": v, "rule": f"{name} (r = {float(abc.r):g})", "of": what}
                for n, v in zip(s.widths, values)
            ]
    run.figure(
        alt.Chart(alt.Data(values=rows), width=280, height=260)
        .mark_line(point=True)
        .encode(
            x=alt.X("width:Q").scale(type="log", base=2, nice=False),
            y=alt.Y("change:Q", title="mean change in 2 steps").scale(type="log"),
            color=alt.Color("rule:N", title=None, sort=None),
            column=alt.Column("of:N", title=None),
        )
    )
    return Measurement(
        max(errors),
        seeds=s.nets,
        also=also,
        note="""20 networks a width: with 5, what the output happens to be at the start leaves an error of about 0.1 in
        the slopes of NTP and SP (0.117 was measured)""",
    )


def moves(abc: ABC, width: int, seed: int, steps: int = 2) -> tuple[float, float]:
    """Mean change of the last hidden layer's pre-activations and of the output of a tanh network."""
    x, y, net, optimizer = small_problem(abc, width, seed)
    *_, h, f = (value.detach() for value in net.preactivations(x))
    for _ in range(steps):
        descend(net, optimizer, x, y)
    *_, h_moved, f_moved = (value.detach() for value in net.preactivations(x))
    return (h_moved - h).abs().mean().item(), (f_moved - f).abs().mean().item()


def small_problem(abc: ABC, width: int, seed: int) -> tuple[Tensor, Tensor, ABCNetwork, torch.optim.Optimizer]:
    """Four samples in four dimensions, the same for every seed, a network, and descent with rate 1/2."""
    samples = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, dtype=torch.float64, generator=samples)
    y = torch.randn(4, 1, dtype=torch.float64, generator=samples)
    net = ABCNetwork(abc, width, 4, generator=torch.Generator().manual_seed(1 + seed))
    return x, y, net, torch.optim.SGD(net.param_groups(0.5))


def descend(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    (0.5 * (net(x) - y).square().mean()).backward()
    optimizer.step()


def log_slope(widths: Sequence[int], values: Sequence[float]) -> float:
    return statistics.linear_regression([math.log(n) for n in widths], [math.log(v) for v in values]).slope


@study.claim(
    "C2",
    "Every stable rule that trains either learns features or is a kernel method, never both, and muP alone is maximal",
    paper="Figure 2, corollary 3.9 and section 5, for fully connected networks",
    kind="exact",
    holds=equals(0),
    unit="rules on the half-integer grid that are both or neither (L = 2, 3)",
    also={
        "maximal classes that are not muP": equals(0),
        "classes whose trained networks disagree": equals(0),
    },
)
def dichotomy(run: Run) -> Measurement:
    low, high = run.setting.grid
    halves = [Fraction(k, 2) for k in range(low, high + 1)]
    wrong = strangers = 0
    classes: dict[ABC, ABC] = {}
    counts: Counter[str] = Counter()
    for L in (2, 3):
        run.progress(f"{L} hidden layers", L - 2, 2)
        # At L = 2 every row of the grid; at L = 3 those that start stable, as no other can be stable.
        rows = itertools.product(halves, repeat=L + 1)
        for a in rows:
            starts = [halves] * L if L == 2 else [[(_HALF if l else Fraction(0)) - a[l]] for l in range(L)]
            for b in itertools.product(*starts, halves):
                if not all(a[l] + b[l] == (_HALF if l else 0) for l in range(L)):
                    counts["unstable"] += len(halves)
                    wrong += not ABC(a, b, 0).reasons
                    continue
                for c in halves:
                    abc = ABC(a, b, c)
                    counts[abc.regime] += 1
                    if abc.nontrivial:
                        wrong += abc.feature_learning == abc.kernel_regime
                        classes.setdefault(abc.canonical(), abc)
                    if abc.maximal:
                        strangers += abc.canonical() != ABC.mup(L).canonical()
    disagree, points = 0, []
    for abc in list(classes.values())[:: run.setting.train_every]:
        widths = run.setting.moved_widths
        slope = log_slope(widths, [statistics.fmean(kernel_move(abc, n, seed) for seed in range(8)) for n in widths])
        disagree += (slope > -0.5) != abc.feature_learning
        points.append({"r": float(abc.r), "slope": slope, "L": f"{abc.L} hidden layers", "says": abc.regime})
    run.figure(
        alt.Chart(alt.Data(values=points), width="container", height=260)
        .mark_point(filled=True, size=90, opacity=0.7)
        .encode(
            x=alt.X("r:Q", title="r of the parametrization"),
            y=alt.Y("slope:Q", title="measured exponent of the feature kernel's change"),
            color=alt.Color("says:N", title=None),
            shape=alt.Shape("L:N", title=None),
        )
    )
    return Measurement(
        float(wrong),
        also={
            "maximal classes that are not muP": float(strangers),
            "classes whose trained networks disagree": float(disagree),
            "stable nontrivial classes": float(len(classes)),
            **{f"rules that are {regime}": float(count) for regime, count in sorted(counts.items())},
        },
        note=f"""classes under the symmetry, of which {len(points)} are trained too: tanh, 2 steps; features count as
        moving where the kernel's change falls more slowly than the root of the width; 8 networks a width (with 2, a
        kernel class had -0.47)""",
    )


def kernel_move(abc: ABC, width: int, seed: int) -> float:
    """Relative change of the Gram matrix of the last hidden layer in two steps."""
    x, y, net, optimizer = small_problem(abc, width, seed)

    def kernel() -> Tensor:
        features = torch.tanh(net.preactivations(x)[-2].detach())
        return features @ features.mT / width

    before = kernel()
    for _ in range(2):
        descend(net, optimizer, x, y)
    return ((kernel() - before).norm() / before.norm()).item()


@study.claim(
    "C3",
    "Finite networks in muP approach their infinitely wide limit as one over the root of the width",
    paper="Theorem 6.1 and figures 3-4: finite widths converge to the calculated limit",
    holds=between(-0.56, -0.44),
    unit="slope of log RMS error by log width",
)
def convergence_to_the_limit(run: Run) -> Measurement:
    s, errors = run.setting, {}
    for done, width in enumerate(s.limit_widths):
        run.progress(f"width {width}", done, len(s.limit_widths))
        errors[width] = math.sqrt(statistics.fmean(squared_error(width, seed) for seed in range(s.limit_nets)))
    rows = [{"width": n, "error": e, "which": "measured"} for n, e in errors.items()]
    scale = statistics.geometric_mean(e * math.sqrt(n) for n, e in errors.items())
    rows += [{"width": n, "error": scale / math.sqrt(n), "which": "width^(-1/2)"} for n in errors]
    run.figure(
        alt.Chart(alt.Data(values=rows), width="container", height=260)
        .mark_line(point=True)
        .encode(
            x=alt.X("width:Q").scale(type="log", base=2, nice=False),
            y=alt.Y("error:Q", title="RMS distance of outputs from the limit's").scale(type="log"),
            color=alt.Color("which:N", title=None),
        )
    )
    also = {f"RMS error x sqrt(n), n = {n}": e * math.sqrt(n) for n, e in errors.items()}
    return Measurement(log_slope(list(errors), list(errors.values())), seeds=s.limit_nets, also=also)


def squared_error(width: int, seed: int, steps: int = 20) -> float:
    """Of a finite linear network's outputs, against those of the limit trained on the same samples in turn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 6, dtype=torch.float64, generator=generator)
    y = torch.randn(8, 1, dtype=torch.float64, generator=generator)
    limit = LinearMuPLimit(6, 1, dtype=torch.float64)
    nets = [limit, limit.sample(width, generator)]
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for step in range(steps):
            optimizer.zero_grad()
            (0.5 * (net(x[step % 8]) - y[step % 8]).square().sum()).backward()
            optimizer.step()
    with torch.no_grad():
        return (nets[0](x) - nets[1](x)).square().mean().item()


@study.claim(
    "C4",
    "Few-shot learning of characters: wider is better, the infinite network is best, kernels stay far behind",
    paper="""Section 7.2, Omniglot 5-way 1-shot: 55.3% (width 2), 64.5 (8), 66.2 (32 and more), 66.4 (infinite);
    Gaussian process 47.6, NTK 47.8, linear kernel 41.7""",
    holds=at_least(6.0),
    unit="points of accuracy, limit against the best kernel",
    also={"points, limit against width 8": at_least(4.0)},
)
def few_shot(run: Run) -> Measurement:
    results = {width: run.each_seed(meta_train, width=width) for width in (*run.setting.maml_widths, 0)}
    kernels = run.each_seed(best_kernels)
    by_kernel = {name: [of_seed[name] for of_seed in kernels] for name in kernels[0]}
    learned = {name: values for name, values in by_kernel.items() if name != "nearest neighbour"}
    best = max(learned, key=lambda name: statistics.fmean(learned[name]))
    rows = [
        {"accuracy": value, "network": str(width or "infinite")}
        for width, values in results.items()
        for value in values
    ]
    rules = [{"accuracy": statistics.fmean(v), "kernel": name} for name, v in by_kernel.items()]
    chart = alt.Chart(alt.Data(values=rows), width="container", height=280)
    dots = chart.mark_point(filled=True, size=80, opacity=0.8).encode(
        x=alt.X("network:N", title="width", sort=None).axis(labelAngle=0),
        y=alt.Y("accuracy:Q", title="5-way 1-shot accuracy (%)").scale(zero=False),
    )
    lines = (
        alt.Chart(alt.Data(values=rules))
        .mark_rule(strokeDash=[4, 3])
        .encode(y="accuracy:Q", color=alt.Color("kernel:N", title="no features learned"))
    )
    run.figure(dots + lines)
    means = {width: statistics.fmean(values) for width, values in results.items()}
    also = {f"width {width}" if width else "infinite width": value for width, value in means.items()}
    also |= {name: statistics.fmean(values) for name, values in by_kernel.items()}
    also["points, limit against width 8"] = means[0] - means[8]
    gains = [limit - kernel for limit, kernel in zip(results[0], by_kernel[best])]
    return average(
        gains,
        baseline=statistics.fmean(by_kernel[best]),
        also=also,
        note=f"""against {best}, the best of three kernels, each with the rate and scaling of inputs that are best on
        the training classes; 136 training and 156 test characters and their rotations, in place of 1,200 and 423""",
    )


def meta_train(run: Run, seed: int, width: int) -> float:
    """Accuracy (%) on new classes, after 20 inner steps, of a linear network trained by first-order MAML."""
    s, generator = run.setting, run.generator(seed)
    lr, sigma_u, sigma_v, bias = MAML[width]
    train, test = (bank.to(run.device) for bank in drawings(s.characters))
    features = train.shape[-1]
    limit = LinearMuPLimit(features, 5, sigma_u=sigma_u, sigma_v=sigma_v, hidden_bias=bias)
    net: LinearNetwork = limit.sample(width, generator) if width else limit
    net.to(run.device)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    outer = s.outer if width else s.limit_outer
    for step in range(outer):
        if step % 100 == 0:
            run.progress(f"width {width or 'infinite'}, seed {seed}", step, outer)
        optimizer.zero_grad()
        first_order_maml(net, *tasks(train, 32, generator), inner_lr=0.4)
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
    fresh = tasks(test, s.test_tasks, run.generator(1000 + seed))
    return 100 * first_order_maml(net, *fresh, inner_lr=0.4, inner_steps=20, backward=False).accuracy.mean().item()


@cache
def drawings(name: str) -> tuple[Tensor, Tensor]:
    """Training and test classes with their rotations, ink 1 on 0, `(classes, 20, pixels)`."""
    from lathe import data

    banks = []
    for split in ("small1", "small2") if name == "omniglot" else ("train", "test"):
        loaded = data.load(name, split)
        images = loaded.float()
        if name == "omniglot":
            images = F.interpolate(1 - images, size=(28, 28), mode="area")
        classes = [images[loaded.labels == label][:20] for label in range(len(loaded.names))]
        bank = torch.stack(classes)[:, :, 0]
        banks.append(torch.cat([torch.rot90(bank, turns, (2, 3)) for turns in range(4)]).flatten(2))
    return banks[0], banks[1]


def tasks(bank: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Five classes a task, one drawing of each to learn from and one to tell: support, labels, queries, labels."""
    classes = torch.rand(count, len(bank), generator=generator).topk(5, 1).indices
    which = torch.rand(count, 5, bank.shape[1], generator=generator).topk(2, 2).indices
    found = bank[classes.unsqueeze(-1).to(bank.device), which.to(bank.device)]
    labels = torch.arange(5, device=bank.device).expand(count, 5)
    return found[:, :, 0], labels, found[:, :, 1], labels


def best_kernels(run: Run, seed: int) -> dict[str, float]:
    """Accuracy (%) of three kernels' descent on each task's support, and of the nearest neighbour."""
    train, test = drawings(run.setting.characters)
    tuning = tasks(train, 1000, run.generator(2000 + seed))
    fresh = tasks(test, run.setting.test_tasks, run.generator(1000 + seed))
    found = {}
    for name, kernel in (("linear kernel", "linear"), ("Gaussian process", "gp"), ("NTK", "ntk")):
        learner = KernelLearner(kernel, 5)  # type: ignore[arg-type]

        def accuracy(sampled: tuple[Tensor, ...], unit: bool, lr: float, learner: KernelLearner = learner) -> float:
            support, labels, queries, answers = sampled
            if unit:
                support, queries = F.normalize(support, dim=-1), F.normalize(queries, dim=-1)
            return 100 * (learner.adapt(support, labels, queries, lr, 20).argmax(-1) == answers).float().mean().item()

        choices = itertools.product((False, True), (0.01, 0.1, 1.0, 10.0))
        found[name] = accuracy(fresh, *max(choices, key=lambda choice: accuracy(tuning, *choice)))
    support, _, queries, answers = fresh
    found["nearest neighbour"] = 100 * (torch.cdist(queries, support).argmin(-1) == answers).float().mean().item()
    return found


@study.claim(
    "C5",
    "Word embeddings get better with width, towards those of the infinitely wide network",
    paper="Section 7.1, analogies on text8: 33.4% (width 64), 41.6 (256), 42.6 (1024), 43.3 (infinite); kernels 0",
    holds=at_most(1.01),
    unit="held-out loss of the limit over that of the widest network",
    also={
        "times that the loss rises with width": equals(0),
        "Spearman correlation of similarities, limit and widest": at_least(0.9),
    },
)
def words(run: Run) -> Measurement:
    widths = (*run.setting.w2v_widths, 0)
    results = {width: run.each_seed(embed, width=width) for width in widths}
    losses = {width: [loss for loss, _ in of_width] for width, of_width in results.items()}
    means = {width: statistics.fmean(values) for width, values in losses.items()}
    alike = [
        scipy.stats.spearmanr(ours, theirs).statistic for (_, ours), (_, theirs) in zip(results[0], results[widths[-2]])
    ]
    rises = sum(after > before for before, after in itertools.pairwise(means[n] for n in widths[:-1]))
    rows = [{"width": str(n or "infinite"), "loss": v} for n, values in losses.items() for v in values]
    run.figure(
        alt.Chart(alt.Data(values=rows), width="container", height=260)
        .mark_point(filled=True, size=80, opacity=0.8)
        .encode(
            x=alt.X("width:N", sort=None).axis(labelAngle=0),
            y=alt.Y("loss:Q", title="held-out CBOW loss").scale(zero=False),
        )
    )
    return average(
        [limit / wide for limit, wide in zip(losses[0], losses[widths[-2]])],
        also={
            "times that the loss rises with width": float(rises),
            "Spearman correlation of similarities, limit and widest": statistics.fmean(alike),
            **{f"loss, {f'width {n}' if n else 'infinite width'}": value for n, value in means.items()},
        },
        note="""validation and test part of WikiText-2 as letters only, its 1,000 most frequent words, the last tenth
        held out"""
        if run.setting.text
        else "generated words",
    )


def embed(run: Run, seed: int, width: int) -> tuple[float, list[float]]:
    """Held-out loss of CBOW with 25 negatives, and the cosines of all pairs of embeddings."""
    s = run.setting
    train, held_out = (tokens.to(run.device) for tokens in text(s.text, s.vocabulary))
    counts = torch.bincount(train, minlength=s.vocabulary)
    net = Word2Vec(s.vocabulary, width, generator=run.generator(seed)) if width else InfiniteWord2Vec(s.vocabulary)
    net.to(run.device)
    for epoch in range(s.w2v_epochs):
        run.progress(f"width {width or 'infinite'}, seed {seed}", epoch, s.w2v_epochs)
        rates = [0.05 * max(1 - (epoch + part) / s.w2v_epochs, 1e-4) for part in (0, 1)]
        net.train_epoch(
            train,
            lr=rates[0],
            end_lr=rates[1],
            subsample=1e-3,
            counts=counts,
            generator=run.generator(100 * seed + epoch),
        )
    unit = F.normalize(net.embedding, dim=1)
    pairs = torch.triu_indices(s.vocabulary, s.vocabulary, 1)
    return net.loss(held_out, counts=counts, generator=run.generator(9)), (unit @ unit.mT)[pairs[0], pairs[1]].tolist()


@cache
def text(name: str | None, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Places of a text's most frequent words, the others left out: nine tenths to train on, one to test."""
    from lathe import data

    if name is None:  # words of six topics, which come in runs
        generator = torch.Generator().manual_seed(0)
        topics = torch.randint(6, (400, 1), generator=generator).expand(-1, 10).flatten()
        tokens = 10 * topics + torch.randint(10, topics.shape, generator=generator)
    else:
        content = " ".join(data.load(name, split).content for split in ("valid", "test"))
        found = re.sub("[^a-z]+", " ", content.lower().replace("<unk>", " ")).split()
        places = {word: place for place, (word, _) in enumerate(Counter(found).most_common(vocabulary))}
        tokens = torch.tensor([places[word] for word in found if word in places])
    cut = len(tokens) * 9 // 10
    return tokens[:cut], tokens[cut:]


@study.claim(
    "C6",
    "In muP the best learning rate stays where it is when the network gets wider; in the standard one it falls",
    paper="Section 5; Tensor Programs V (2203.03466), figures 1 and 3",
    holds=at_most(1.0),
    unit="octaves by which the best rate moves over the widths, muP",
    also={"octaves from the narrowest to the widest, standard": at_least(3.0)},
)
def best_rate(run: Run) -> Measurement:
    s = run.setting
    low, high = s.octaves
    rows, best = [], {}
    for scheme, told in (("mup", "muP"), ("sp", "standard")):
        for width in s.mlp_widths:
            losses = means_over_seeds(run.each_seed(losses_by_rate, scheme=scheme, width=width, entropy=False))
            best[scheme, width] = low + min(range(len(losses)), key=losses.__getitem__)
            rows += [
                {"rate": 2.0**k, "loss": loss, "width": width, "parametrization": told}
                for k, loss in zip(range(low, high + 1), losses)
                if loss < 0.6
            ]
    moved = {
        scheme: max(abs(best[scheme, n] - best[scheme, m]) for n in s.mlp_widths for m in s.mlp_widths)
        for scheme in ("mup", "sp")
    }
    fall = best["sp", s.mlp_widths[0]] - best["sp", s.mlp_widths[-1]]
    also = {"octaves from the narrowest to the widest, standard": fall}
    for scheme, told in (("mup", "muP"), ("sp", "standard")):
        ends = [
            means_over_seeds(run.each_seed(losses_by_rate, scheme=scheme, width=width, entropy=True))
            for width in (s.mlp_widths[0], s.entropy_width)
        ]
        narrow, wide = (min(range(len(end)), key=end.__getitem__) for end in ends)
        also[f"with cross entropy, {told}: octaves from {s.mlp_widths[0]} to {s.entropy_width}"] = narrow - wide
    run.figure(
        alt.Chart(alt.Data(values=rows), width=260, height=260)
        .mark_line(point=True)
        .encode(
            x=alt.X("rate:Q", title="learning rate").scale(type="log", base=2),
            y=alt.Y("loss:Q", title="squared error on the training set").scale(type="log"),
            color=alt.Color("width:O").scale(scheme="viridis"),
            column=alt.Column("parametrization:N", title=None),
        )
    )
    return Measurement(
        float(moved["mup"]),
        baseline=float(moved["sp"]),
        seeds=len(run.seeds),
        also={name: float(value) for name, value in also.items()},
        note="""He initialisation, squared error. Both were chosen after trying others. With cross entropy the best rate
        of the standard parametrization hardly falls in 200 steps, as the softmax saturates and networks survive rates
        at which their outputs blow up at first (recorded above, not judged). With squared error and variances of
        1/fan_in it fell by 2 octaves from width 64 to 2048, and moved by 1 in muP""",
    )


def means_over_seeds(losses: list[list[float]]) -> list[float]:
    return [statistics.fmean(of_rate) for of_rate in zip(*losses)]


def mlp(features: int) -> Callable[[int], nn.Module]:
    """A network by its width, with He initialisation."""

    def make(width: int) -> nn.Module:
        sizes = (features, width, width, 10)
        layers = [nn.Linear(fan_in, fan_out) for fan_in, fan_out in itertools.pairwise(sizes)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    return make


def losses_by_rate(run: Run, seed: int, scheme: str, width: int, entropy: bool) -> list[float]:
    """Training loss after plain SGD on batches of 32, for each octave of the rate; infinite where it diverged."""
    s = run.setting
    images = run.data(s.images, "train")
    x, y = images.float().flatten(1).to(run.device), images.labels.to(run.device)
    x = (x - x.mean()) / x.std()
    target = F.one_hot(y, 10).float()
    make = mlp(x.shape[1])

    def loss(f: Tensor, of: Tensor | slice) -> Tensor:
        return F.cross_entropy(f, y[of]) if entropy else 0.5 * (f - target[of]).square().sum(1).mean()

    found = []
    for octave in range(s.octaves[0], s.octaves[1] + 1):
        run.progress(f"{scheme}, width {width}, seed {seed}", octave - s.octaves[0], s.octaves[1] - s.octaves[0])
        torch.manual_seed(seed)
        net = make(width)
        scaled = parametrize(net, scheme, base=make, base_width=s.mlp_widths[0])
        optimizer = torch.optim.SGD(scaled.param_groups(2.0**octave))
        net.to(run.device)
        generator, value = run.generator(seed), 0.0
        for _ in range(s.steps):
            pick = torch.randint(len(x), (32,), generator=generator)
            error = loss(net(x[pick]), pick)
            if not error.item() < 1e3:
                value = math.inf
                break
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
        if value != math.inf:
            with torch.no_grad():
                value = loss(net(x), slice(None)).item()
        found.append(value if math.isfinite(value) else math.inf)
    return found
