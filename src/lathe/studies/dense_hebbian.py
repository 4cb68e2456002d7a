"""Does replica-symmetric theory say what a memory retrieves that only saw noisy examples, and what P buys it?"""

from __future__ import annotations

import math
import statistics
from typing import Any

import altair as alt
import torch
from scipy.stats import binom
from torch import Tensor

from lathe.studies.engine import Measurement, Run, Setting, Study, at_least, at_most, between
from lathe.theory.dense_hebbian import (
    DenseHebbian,
    critical_load,
    dataset_entropy,
    examples,
    load,
    mattis_magnetization,
    noise_couplings,
    one_step_overlap,
    replica_symmetric,
    replica_symmetric_examples,
    zero_temperature,
)

study = Study(
    "dense-hebbian",
    title="Dense Hebbian neural networks: a replica symmetric picture of supervised learning",
    authors="Agliari, Albanese, Alemanno, Alessandrelli, Barra, Giannotti, Lotito, Pedreschi",
    year=2022,
    arxiv="2212.00606",
    area="theory",
    module="lathe.theory.dense_hebbian",
    summary="""Stores patterns that it only saw as noisy examples, without gradients, in couplings of P spins that are
    never built. Says beforehand how many patterns come back, from how many examples of which quality, at which P.""",
    example="""
import torch
from lathe.theory.dense_hebbian import DenseHebbian, best_order, examples, mattis_magnetization

rng = torch.Generator().manual_seed(0)
patterns = 2.0 * torch.randint(0, 2, (500, 100), generator=rng) - 1        # 500 patterns in 100 spins
seen = examples(patterns, r=0.8, M=9, generator=rng)                       # nine noisy copies of each are all it gets
plan = best_order(N=100, K=500, M=9, r=0.8)                                # which P holds them?
memory = DenseHebbian(seen, plan.best)
m = mattis_magnetization(memory(seen[:20, 0], 10), patterns[:20]).diagonal()    # recall from one noisy example each
assert plan.best == 4 and m.mean() > 0.98
""",
    job="predict",
    scales={
        "smoke": Setting(
            seeds=1, vote_seeds=20, N_vote=2000, cases=((100, 1667), (150, 1406), (200, 27)), draws=1, sweeps=30,
            burn=15, storage_N=60, larger_N=64, storage=(0.1, 0.2, 0.3, 0.5), storage_draws=1, storage_sweeps=20,
            sizes=(24, 34), size_draws=2, step_draws=2, noise={2: (32, 64), 4: (16, 24)}, noise_draws=3, data="digits",
            orders=(2, 16), steps=20,
        ),
        "desk": Setting(
            vote_seeds=20, N_vote=2000, cases=((100, 1667), (150, 1406), (200, 27)), draws=12, sweeps=30, burn=15,
            storage_N=60, larger_N=100, storage=(0.1, 0.2, 0.3, 0.5), storage_draws=4, storage_sweeps=100,
            sizes=(24, 32, 40, 52, 64), size_draws=4, step_draws=6, noise={2: (32, 64, 128), 4: (16, 24, 32, 40)},
            noise_draws=5, data="digits", orders=(2, 4, 8, 16), steps=40,
        ),
        "full": Setting(
            vote_seeds=20, N_vote=2000, cases=((200, 100_000), (300, 400_000), (300, 27)), draws=4, sweeps=60, burn=30,
            storage_N=100, larger_N=200, storage=(0.1, 0.2, 0.3, 0.4, 0.5), storage_draws=4, storage_sweeps=100,
            sizes=(24, 32, 48, 64, 96), size_draws=8, step_draws=12, noise={2: (32, 64, 128), 4: (16, 24, 32, 40, 64)},
            noise_draws=7, data="mnist", orders=(2, 4, 8, 16, 32), steps=60,
        ),
    },
)  # fmt: skip


def archetypes(K: int, N: int, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(0, 2, (K, N), generator=generator) - 1


@study.claim(
    "C1",
    "At low load and temperature zero the memory returns the majority vote of the examples, whatever P",
    paper="Low-load theorem: m = erf(1 / sqrt(2 rho))",
    kind="exact",
    holds=at_most(0.02),
    unit="largest difference from erf(1/√(2ρ))",
    also={"standard errors from the binomial vote": at_most(3.0)},
)
def majority_vote(run: Run) -> Measurement:
    s, gaps, errors, rows = run.setting, [], [], []
    for P in (2, 4):
        for r, M in ((0.5, 11), (0.3, 41), (0.2, 201)):
            overlaps = []
            for seed in range(s.vote_seeds):
                generator = run.generator(seed)
                xi = archetypes(1, s.N_vote, generator)
                field = DenseHebbian(examples(xi, r, M, generator), P).field(xi)
                overlaps.append((field.sign() * xi).mean().item())
            m, rho = statistics.fmean(overlaps), dataset_entropy(r, M)
            vote = 2 * float(binom.sf(M // 2, M, (1 + r) / 2)) - 1
            gaps.append(abs(m - math.erf(1 / math.sqrt(2 * rho))))
            errors.append(abs(m - vote) / math.sqrt((1 - vote * vote) / (s.N_vote * s.vote_seeds)))
            rows.append({"rho": rho, "m": m, "who": f"network, P = {P}"})
    line = [{"rho": x / 100, "m": math.erf(1 / math.sqrt(2 * x / 100)), "who": "theory"} for x in range(5, 45)]
    base = alt.Chart().encode(
        x=alt.X("rho:Q", title="entropy of the data, ρ").axis(tickCount=6),
        y=alt.Y("m:Q", title="overlap with the archetype, m").scale(zero=False),
        color=alt.Color("who:N", title=None),
    )
    run.figure(
        alt.layer(
            base.mark_line().properties(data=alt.Data(values=line)),
            base.mark_point(size=70, filled=True)
            .encode(shape=alt.Shape("who:N", legend=None))
            .properties(data=alt.Data(values=rows)),
        ).properties(width="container", height=260)
    )
    return Measurement(
        max(gaps),
        seeds=s.vote_seeds,
        also={"standard errors from the binomial vote": max(errors)},
        note="one evaluation of all fields at the archetype; both P see the same examples, an odd number: no ties",
    )


@study.claim(
    "C2",
    "The replica-symmetric equations predict what Monte Carlo finds in networks that saw noisy examples only",
    paper="Self-consistency theorem and the Monte Carlo figures",
    holds=at_most(0.03),
    unit="largest difference of the mean overlap m",
)
def theory_against_chains(run: Run) -> Measurement:
    s, rows, gaps, exact = run.setting, [], [], []
    r, M, T = 0.5, 10, 0.2
    for N, K in s.cases:
        found = [m for part in run.each_seed(retrieved, N=N, K=K, r=r, M=M, T=T) for m in part]
        gamma = load(K, N, 4)
        theory = replica_symmetric(4, 1 / T, gamma, dataset_entropy(r, M)).m.item()
        binomial = replica_symmetric_examples(4, 1 / T, gamma, r, M).m.item()
        m = statistics.fmean(found)
        error = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0
        gaps.append(abs(m - theory))
        exact.append(abs(m - binomial))
        case = f"N = {N}, K = {K}"
        rows += [
            {"case": case, "m": m, "low": m - 2 * error, "high": m + 2 * error, "who": "Monte Carlo, ± 2 s.e."},
            {"case": case, "m": theory, "who": "theory, Gaussian examples"},
            {"case": case, "m": binomial, "who": "theory, exact for 10 examples"},
        ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("case:N", title=None, sort=None), color=alt.Color("who:N", title=None)
    )
    run.figure(
        alt.layer(
            base.transform_filter("isValid(datum.low)")
            .mark_rule(strokeWidth=2)
            .encode(
                x=alt.X("low:Q", title="overlap with the archetype, m").scale(zero=False).axis(tickCount=6), x2="high:Q"
            ),
            base.mark_point(size=90, filled=True).encode(
                x=alt.X("m:Q").scale(zero=False), shape=alt.Shape("who:N", legend=None)
            ),
        ).properties(width="container", height=180)
    )
    return Measurement(
        max(gaps),
        seeds=len(run.seeds),
        also={"with the exact law of 10 examples": max(exact)},
        note=f"P = 4, T' = {T}, r = {r}, M = {M}; sequential Glauber with exact fields from the archetype; "
        f"{s.draws} networks a seed",
    )


def retrieved(run: Run, seed: int, N: int, K: int, r: float, M: int, T: float) -> list[float]:
    """Overlap with the archetype, averaged over the sweeps after burn-in, of each of several networks."""
    s, generator = run.setting, run.generator(seed)
    found = []
    for draw in range(s.draws):
        run.progress(f"N = {N}, K = {K}", draw, s.draws)
        xi = archetypes(K, N, generator)
        averages = torch.cat([examples(part, r, M, generator).mean(1) for part in xi.split(20_000)])
        memory = DenseHebbian(averages, 4, second_moment=r * r + (1 - r * r) / M).to(run.device)
        found.append(chain_mean(memory, xi[:1], 12 / T, s.sweeps, s.burn, generator, run.device))
    return found


def chain_mean(
    memory: DenseHebbian, xi: Tensor, beta: float, sweeps: int, burn: int, generator: torch.Generator, device: str
) -> float:
    trace: list[float] = []
    archetype = xi[:1].to(device)
    # The chain draws where it runs.
    drawing = torch.Generator(device).manual_seed(int(torch.randint(1 << 30, (1,), generator=generator)))
    memory.sample(
        archetype,
        beta,
        sweeps,
        generator=drawing,
        observe=lambda s: trace.append(abs(mattis_magnetization(s, archetype).item())),
    )
    return statistics.fmean(trace[burn:])


@study.claim(
    "C3",
    "Ultra-storage: of the order of N^(P-1) patterns are retrieved, up to a jump where theory puts it",
    paper="Phase diagrams: retrieval at K = 2 gamma N^(P-1) / P!",
    holds=at_least(0.98),
    unit="m at γ = 0.1 (P = 4, T' = 0.3)",
    also={
        "m at γ = 0.2": at_least(0.97),
        "m at γ = 0.3": at_least(0.9),
        "m at γ = 0.5": at_most(0.6),
        "exponent of K against N, P = 2": between(0.85, 1.15),
        "exponent of K against N, P = 4": between(2.85, 3.15),
    },
)
def ultra_storage(run: Run) -> Measurement:
    s, N, T = run.setting, run.setting.storage_N, 0.3
    rows, means, errors = [], {}, {}
    for gamma in s.storage:
        found = [m for part in run.each_seed(stored, gamma=gamma, T=T, N=N, draws=s.storage_draws) for m in part]
        means[gamma] = statistics.fmean(found)
        errors[gamma] = statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else math.nan
        rows += [{"gamma": gamma, "m": m, "who": f"chains, N = {N}"} for m in found]
    larger = {}
    for gamma in (0.3, 0.5):
        draws = max(1, s.storage_draws // 2)
        found = [m for part in run.each_seed(stored, gamma=gamma, T=T, N=s.larger_N, draws=draws) for m in part]
        larger[gamma] = statistics.fmean(found)
        rows += [{"gamma": gamma, "m": m, "who": f"chains, N = {s.larger_N}"} for m in found]
    edge = critical_load(4, 0.0, T)
    grid = torch.cat([torch.linspace(0, edge * 0.999, 60, dtype=torch.float64), torch.tensor([edge * 1.001, 0.6])])
    curve = replica_symmetric(4, 1 / T, grid).m
    rows += [{"gamma": g, "m": m, "who": "theory"} for g, m in zip(grid.tolist(), curve.tolist())]
    exponents, of_subsets = {}, {}
    for P in (2, 4):
        K = [statistics.fmean(run.each_seed(patterns_at, P=P, N=size)) for size in s.sizes]
        exponents[P] = statistics.linear_regression([math.log(n) for n in s.sizes], [math.log(k) for k in K]).slope
        subsets = [math.log(math.comb(size - 1, P - 1)) for size in s.sizes]
        of_subsets[P] = statistics.linear_regression(subsets, [math.log(k) for k in K]).slope
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("gamma:Q", title="load γ = 12 K / N³"),
        y=alt.Y("m:Q", title="overlap with the archetype, m"),
        color=alt.Color("who:N", title=None),
    )
    run.figure(
        alt.layer(
            base.transform_filter("datum.who == 'theory'").mark_line(),
            base.transform_filter("datum.who != 'theory'").mark_circle(size=45, opacity=0.6),
        ).properties(width="container", height=260)
    )
    return Measurement(
        means[0.1],
        seeds=len(run.seeds),
        also={
            **{f"m at γ = {gamma:g}": means[gamma] for gamma in (0.2, 0.3, 0.5)},
            **{f"exponent of K against N, P = {P}": slope for P, slope in exponents.items()},
            **{f"exponent of K against C(N−1, P−1), P = {P}": slope for P, slope in of_subsets.items()},
            **{f"m at γ = {gamma:g}, N = {s.larger_N}": m for gamma, m in larger.items()},
            **{f"standard error at γ = {g:g}": e for g, e in errors.items() if g >= 0.3 and len(run.seeds) > 1},
        },
        note=f"clean patterns; chains start at the archetype, {s.storage_draws} networks a seed; the second half of "
        f"{s.storage_sweeps} sweeps is averaged. At N = 60 networks differ: some leave at γ = 0.3 (the longer, the "
        "more), some stay at 0.5, hence the standard errors. Tried, not judged: larger networks, which stay at 0.3 as "
        "theory has it, and take longer to leave at 0.5; 1,000 sweeps at N = 60 bring 0.5 down to 0.35, and 0.3 to "
        "0.8. Exponents: K at which one parallel step keeps m = 0.9. Exactly, K grows as C(N-1, P-1), whose own slope "
        "between N = 24 and 64 is 3.16 at P = 4",
    )


def stored(run: Run, seed: int, gamma: float, T: float, N: int, draws: int) -> list[float]:
    s, generator = run.setting, run.generator(seed)
    K = round(gamma * N**3 / 12)
    found = []
    for draw in range(draws):
        run.progress(f"N = {N}, γ = {gamma}", draw, draws)
        xi = archetypes(K, N, generator)
        memory = DenseHebbian(xi, 4).to(run.device)
        found.append(chain_mean(memory, xi, 12 / T, s.storage_sweeps, s.storage_sweeps // 2, generator, run.device))
    return found


def patterns_at(run: Run, seed: int, P: int, N: int) -> float:
    """K at which the archetype's overlap after one parallel step is 0.9, between loads on either side of it."""
    s, generator = run.setting, run.generator(seed)
    target, unit = 0.9, N ** (P - 1) * 2 / math.factorial(P)
    # Around the theory's own answer; finite networks deviate from it by far less than this range.
    center = (P / 2) / 2 / float(torch.erfinv(torch.tensor(target))) ** 2
    points = []
    for factor in (0.6, 0.8, 1.0, 1.25, 1.6):
        K = max(2, round(center * factor * unit))
        # Small networks need many patterns started from, not many networks.
        starts = max(1, 40_000 // N // s.size_draws // 5)
        m = []
        for _ in range(s.size_draws):
            xi = archetypes(K, N, generator)
            begin = xi[:starts]
            m.append((DenseHebbian(xi, P).field(begin).sign() * begin).mean().item())
        points.append((K, statistics.fmean(m)))
    x, y = [math.log(K) for K, _ in points], [m for _, m in points]
    near = sorted(range(len(y)), key=lambda i: abs(y[i] - target))[:3]
    fit = statistics.linear_regression([y[i] for i in near], [x[i] for i in near])
    return math.exp(fit.intercept + fit.slope * target)


@study.claim(
    "C4",
    "One step from the archetype follows its closed form; letting indices coincide costs 2.5 times the noise at P = 4",
    paper="(not in the paper: whether energy and formulas belong together)",
    kind="exact",
    holds=at_most(0.03),
    unit="largest difference of m₁ from its closed form, γ ≤ 0.5",
    also={"noise with coinciding indices over noise without, P = 4": between(2.2, 2.8)},
)
def one_step(run: Run) -> Measurement:
    s, rows, gaps = run.setting, [], []
    for P, N, gamma in ((4, 60, 0.5), (4, 60, 2.0), (2, 400, 0.5)):
        K = round(gamma * 2 * N ** (P - 1) / math.factorial(P))
        m = []
        for draw in range(s.step_draws):
            xi = archetypes(K, N, run.generator(draw))
            begin = xi[: 8000 // N]
            m.append((DenseHebbian(xi, P).field(begin).sign() * begin).mean().item())
        theory = one_step_overlap(P, gamma).item()
        rows.append({"case": f"P = {P}, γ = {gamma:g}", "network": statistics.fmean(m), "closed form": theory})
        if gamma <= 0.5:
            gaps.append(abs(statistics.fmean(m) - theory))
        else:
            beyond = abs(statistics.fmean(m) - theory)
    ratios = []
    for draw in range(s.step_draws):
        generator = run.generator(draw)
        xi, state = archetypes(2000, 100, generator), archetypes(400, 100, generator)
        both = [DenseHebbian(xi, 4, self_interaction=full).field(state).var().item() for full in (True, False)]
        ratios.append(both[0] / both[1])
    flat = [{"case": row["case"], "m": row[who], "who": who} for row in rows for who in ("network", "closed form")]
    run.figure(
        alt.Chart(alt.Data(values=flat))
        .mark_point(size=90, filled=True)
        .encode(
            y=alt.Y("case:N", title=None),
            x=alt.X("m:Q", title="overlap after one parallel step, m₁").scale(zero=False),
            color=alt.Color("who:N", title=None),
            shape=alt.Shape("who:N", title=None),
        )
        .properties(width="container", height=140)
    )
    also: dict[str, float] = {"noise with coinciding indices over noise without, P = 4": statistics.fmean(ratios)}
    also["difference at γ = 2, P = 4"] = beyond
    return Measurement(max(gaps), seeds=s.step_draws, also=also)


@study.claim(
    "C5",
    "Larger P holds more clean patterns, and fewer poor ones",
    paper="Phase diagrams at several P and rho",
    kind="exact",
    holds=at_most(1e-3),
    unit="largest difference from the table of critical loads",
    also={
        "γ_c(8) − γ_c(6) at ρ = 0": at_least(0.0),
        "γ_c(6) − γ_c(8) at ρ = 0.1": at_least(0.0),
    },
)
def trade_off(run: Run) -> Measurement:
    clean = {4: 0.39572, 6: 0.47304, 8: 0.55880, 10: 0.64468}
    poor = {4: (0.315, 0.261, 0.197, 0.141), 6: (0.321, 0.231, 0.140, 0.076), 8: (0.331, 0.210, 0.103, 0.043)}
    errors = [abs(critical_load(P) - gamma) for P, gamma in clean.items()]
    for P, row in poor.items():
        errors += [abs(critical_load(P, rho) - gamma) for rho, gamma in zip((0.05, 0.1, 0.2, 0.4), row)]
    found = {(P, rho): critical_load(P, rho) for P in (6, 8) for rho in (0.0, 0.1)}
    # The iteration, which the closed form does not know of, loses the archetype at the same load.
    lost = [zero_temperature(P, critical_load(P, 0.1) * torch.tensor([0.99, 1.01]), 0.1).m.tolist() for P in (4, 6, 8)]
    rows = [
        {"rho": k / 200, "gamma": critical_load(P, k / 200), "P": str(P)}
        for P in (4, 6, 8, 10)
        for k in range(0, 81, 2)
    ]
    run.figure(
        alt.Chart(alt.Data(values=rows))
        .mark_line()
        .encode(
            x=alt.X("rho:Q", title="entropy of the data, ρ"),
            y=alt.Y("gamma:Q", title="critical load γ at temperature zero"),
            color=alt.Color("P:O", sort=["4", "6", "8", "10"], scale=alt.Scale(scheme="viridis")),
        )
        .properties(width="container", height=260)
    )
    return Measurement(
        max(errors),
        also={
            "γ_c(8) − γ_c(6) at ρ = 0": found[8, 0.0] - found[6, 0.0],
            "γ_c(6) − γ_c(8) at ρ = 0.1": found[6, 0.1] - found[8, 0.1],
            "iterations that disagree 1% away": sum((below < 0.3) + (above > 0.3) for below, above in lost),
        },
    )


@study.claim(
    "C6",
    "Ultra-detection: a pattern survives noise on every tensor entry up to the order of sqrt(C(N-1, P-1))",
    paper="Ultra-detection: signals far below the noise at P = 4, not at P = 2",
    holds=at_least(0.95),
    unit="smallest median m, noise 0.25 √C(N−1, P−1)",
    also={"largest median m, noise 0.83 √C(N−1, P−1)": at_most(0.8)},
)
def ultra_detection(run: Run) -> Measurement:
    s, rows = run.setting, []
    for P, sizes in s.noise.items():
        for N in sizes:
            for c in (0.25, 0.5, 0.83):
                found = [m for part in run.each_seed(detected, P=P, N=N, c=c) for m in part]
                w = c * math.sqrt(math.comb(N - 1, P - 1))
                rows.append({"P": f"P = {P}", "N": N, "c": c, "noise": w, "m": statistics.median(found)})
    kept, lost = ([row["m"] for row in rows if row["c"] == c] for c in (0.25, 0.83))
    largest = max(row["noise"] for row in rows if row["c"] == 0.25)
    run.figure(
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("noise:Q", title="noise over signal, on a tensor entry").scale(type="log"),
            y=alt.Y("m:Q", title="overlap after recall, median").scale(domain=[0, 1]),
            color=alt.Color("N:O", title="N", scale=alt.Scale(scheme="viridis")),
            column=alt.Column("P:N", title=None),
        )
        .properties(width=260, height=220)
    )
    return Measurement(
        min(kept),
        seeds=len(run.seeds),
        also={
            "largest median m, noise 0.83 √C(N−1, P−1)": max(lost),
            "largest noise over signal survived": largest,
            "median m, largest network of P = 4, noise 0.83": next(
                row["m"] for row in reversed(rows) if row["P"] == "P = 4" and row["c"] == 0.83
            ),
        },
        note=f"one pattern, 5% of its spins flipped, noise on every entry of the explicit tensor, damped recall at "
        f"temperature zero; {s.noise_draws} networks a seed",
    )


def detected(run: Run, seed: int, P: int, N: int, c: float) -> list[float]:
    s, generator = run.setting, run.generator(seed)
    found = []
    for _ in range(s.noise_draws):
        xi = archetypes(1, N, generator)
        noise = noise_couplings(N, P, c * math.sqrt(math.comb(N - 1, P - 1)), generator)
        start = torch.where(torch.rand(1, N, generator=generator) < 0.05, -xi, xi)
        memory = DenseHebbian(xi, P, couplings=noise).to(run.device)
        end = memory.sample(start.to(run.device), math.inf, 20, update="parallel").cpu()
        found.append(mattis_magnetization(end, xi).abs().item())
    return found


@study.claim(
    "C7",
    "Images: only a large P turns class averages, which overlap, into attractors of their own",
    paper="MNIST and Fashion-MNIST figures",
    holds=at_least(0.6),
    unit="share of test images that end at their class at P = 16",
    also={
        "share at P = 2": at_most(0.0),
        "accuracy at P = 16 below the nearest average's": at_most(0.05),
    },
)
def images(run: Run) -> Measurement:
    s = run.setting
    X, y, tests, labels = binarised(run, s.data)
    plain = DenseHebbian.from_examples(X, y, 4)
    ideals = torch.where(plain.patterns >= 0, 1.0, -1.0).double()
    nearest = (plain.classify(tests) == labels).double().mean().item()
    by_sign = (mattis_magnetization(tests, ideals).argmax(1) == labels).double().mean().item()
    shares, accuracies, rows = {}, {}, []
    for recentre in (False, True):
        for P in s.orders:
            memory = DenseHebbian.from_examples(X, y, P, recentre=recentre)
            end = memory.sample(
                tests, math.inf, s.steps, update="parallel", field="plefka1", generator=run.generator(0)
            )
            right = mattis_magnetization(end, ideals).gather(1, labels.unsqueeze(1))[:, 0]
            share, accuracy = (
                (right > 0.95).double().mean().item(),
                (memory.classify(end) == labels).double().mean().item(),
            )
            if not recentre:
                shares[P], accuracies[P] = share, accuracy
            kind = "recentred averages" if recentre else "averages"
            rows += [
                {"P": P, "value": share, "what": "ends at its class", "kind": kind},
                {"P": P, "value": accuracy, "what": "accuracy", "kind": kind},
            ]
    run.figure(
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("P:Q", title="order P").scale(type="log", base=2),
            y=alt.Y("value:Q", title="share of test images").scale(domain=[0, 1]),
            color=alt.Color("what:N", title=None),
            strokeDash=alt.StrokeDash("kind:N", title=None),
        )
        .properties(width="container", height=260)
    )
    centred = {row["P"]: row["value"] for row in rows if row["kind"] != "averages" and row["what"] == "accuracy"}
    return Measurement(
        shares[16],
        baseline=nearest,
        also={
            "share at P = 2": shares[2],
            "accuracy at P = 16 below the nearest average's": nearest - accuracies[16],
            "accuracy, nearest average": nearest,
            "accuracy, nearest sign of average": by_sign,
            **{f"accuracy at P = {P}": accuracy for P, accuracy in accuracies.items()},
            **{f"accuracy at P = {P}, recentred": accuracy for P, accuracy in centred.items()},
        },
        note=f"{s.data}, {len(X)} training images; damped parallel recall at temperature zero with the mean field",
    )


def binarised(run: Run, name: str) -> tuple[Any, ...]:
    """Training and test images of +-1, N entries each, and labels; digits at 7.5 of 16, others at half."""
    parts: list[Tensor] = []
    for split in ("train", "test"):
        data = run.data(name, split)
        images = data.inputs.flatten(1).double()
        level = images.max() * 7.5 / 16
        parts += [torch.where(images > level, 1.0, -1.0), data.labels.long()]
    return tuple(parts)
