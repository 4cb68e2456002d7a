"""Does a head that attends to pairs of tokens detect triples, and can it be computed without n^3 time or memory?"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt
import mpmath
import torch
from torch import Tensor, nn
from torch.nn import functional

from lathe.nn import tensor_attention as ta
from lathe.studies.engine import Measurement, Run, Setting, Study, at_least, at_most, average, equals
from lathe.training import fit, one_cycle

study = Study(
    "tensor-attention",
    title="How to Capture Higher-order Correlations? Generalizing Matrix Softmax Attention to Kronecker Computation",
    authors="Alman, Song",
    year=2023,
    arxiv="2310.04064",
    area="nn",
    module="lathe.nn.tensor_attention",
    job="build",
    summary="""Attention of one token to pairs (or longer tuples) of others, which detects triples that ordinary
    attention cannot. Exact without ever holding n^3 numbers, or in almost linear time with an error that is known
    beforehand; takes over a trained attention without changing its function.""",
    example="""
import torch
from torch import nn
from lathe.core.surgery import swap
from lathe.nn.tensor_attention import HigherOrderAttention

encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, batch_first=True), 2, enable_nested_tensor=False)
tokens = torch.randn(2, 50, 64)
before = encoder.eval()(tokens)
swap(encoder, {nn.MultiheadAttention: HigherOrderAttention.from_trained})   # order 3, the same function, ready to tune
assert torch.allclose(encoder(tokens), before, atol=1e-5)
""",
    scales={
        "smoke": Setting(
            seeds=1,
            match_tokens=(8, 16),
            match_inputs=20,
            poly_rows=(256, 512, 1024, 2048),
            long_rows=(2048, 4096, 8192),
            exact_rows=(32, 64, 128),
            repeats=3,
            draws=40,
            tokens=8,
            bits=5,
            width=24,
            steps=20,
            batch=64,
            tests=500,
            memory_rows=(192,),
        ),
        "desk": Setting(
            seeds=4,
            match_tokens=(8, 16, 32, 64),
            match_inputs=100,
            poly_rows=(256, 512, 1024, 2048, 4096, 8192),
            long_rows=(8192, 16384, 32768, 65536, 131072),
            exact_rows=(64, 128, 256, 512),
            repeats=7,
            draws=200,
            tokens=8,
            bits=5,
            width=24,
            steps=2500,
            batch=64,
            tests=4000,
            memory_rows=(256, 512, 1024),
        ),
        "full": Setting(
            seeds=4,
            match_tokens=(8, 16, 32, 64, 128, 256),
            match_inputs=100,
            poly_rows=(256, 1024, 4096, 16384, 65536, 262144),
            long_rows=(262144, 524288, 1048576),
            exact_rows=(64, 128, 256, 512, 1024, 2048),
            repeats=15,
            draws=2000,
            tokens=64,
            bits=11,
            width=64,
            steps=10_000,
            batch=128,
            tests=20_000,
            memory_rows=(1024, 2048, 4096),
        ),
    },
)

DIMENSION, ENTRIES, DEGREE = 4, 0.8, 4  # of C3: rank 70
KINDS: tuple[Literal["taylor", "chebyshev"], ...] = ("taylor", "chebyshev")


@study.claim(
    "C1",
    "A single third-order head of width 5 solves Match3 exactly",
    paper="Sanford, Hsu, Telgarsky 2023, the paper's motivation: one third-order unit of constant width; one layer of "
    "ordinary attention needs width x heads x precision of the order of N / log log N",
    kind="exact",
    holds=equals(0.0),
    unit="wrong tokens",
)
def solves_match3(run: Run) -> Measurement:
    wrong, rows = 0, []
    smallest, largest = math.inf, -math.inf
    for n in run.setting.match_tokens:
        M = n * n // 2
        x = torch.randint(0, M, (run.setting.match_inputs, n), generator=run.generator(n)).to(run.device)
        truth = search_for_triples(x, M)
        run.progress(f"Match3 with {n} tokens")
        found = ta.match3_head(M, n)(x)
        wrong += int(((found > 0.5) != truth).sum())
        smallest, largest = min(smallest, float(found[truth].min())), max(largest, float(found[~truth].max()))
        for kind, outputs in (("in a triple", found[truth]), ("in none", found[~truth])):
            levels = torch.linspace(0, 1, 9, dtype=torch.float64, device=outputs.device).tolist()
            rows += [{"n": n, "M": M, "tokens": kind, "output": q} for q in quantiles(outputs, levels)]
    points = alt.Chart(alt.Data(values=rows)).mark_tick(thickness=2, size=18).encode(
        x=alt.X("output:Q", title="output of the head, quantiles (threshold 0.5)", scale=alt.Scale(domain=[0, 1])),
        y=alt.Y("n:O", title="tokens n, modulus n²/2"),
        color=alt.Color("tokens:N", title=None),
        tooltip=["n:O", "M:Q", "tokens:N", "output:Q"],
    )  # fmt: skip
    rule = alt.Chart(alt.Data(values=[{"bound": 0.5}])).mark_rule(strokeDash=[4, 4]).encode(x="bound:Q")
    run.figure((points + rule).properties(width="container", height=220))
    tokens = run.setting.match_inputs * sum(run.setting.match_tokens)
    return Measurement(
        float(wrong),
        also={"tokens": float(tokens), "smallest output in a triple": smallest, "largest output in none": largest},
        note="against a search over all triples; that ordinary attention does not is a theorem, and C6 trains it",
    )


@study.claim(
    "C2",
    "The features give what the same polynomial gives on all pairs at once",
    paper="the lemmas of the upper bound: exact low rank, and (U2 / U3)^T (V1 / V2) = (U2^T V1) o (U3^T V2)",
    kind="exact",
    holds=at_most(1e-10),
    unit="largest difference of an output (float64)",
)
def factorises(run: Run) -> Measurement:
    q, ks, vs = draw(64, DIMENSION, 1.0, run.generator(0))
    logits = torch.einsum("il,jl,kl->ijk", q, *ks) / DIMENSION
    exact = ta.tensor_attention(q, ks, vs, method="exact")
    differences, rows = [], []
    for kind in KINDS:
        for degree in range(1, 9):
            plan = ta.plan_poly(q, ks, vs, degree=degree, kind=kind)
            coefficients, _ = ta.exp_poly(plan.radius, degree, kind)
            weights = torch.stack([c * logits**t for t, c in enumerate(coefficients)]).sum(0)
            weights = weights / weights.sum((1, 2), keepdim=True)
            dense = torch.einsum("ijk,jl,kl->il", weights, *vs)
            found = ta.tensor_attention(q, ks, vs, method="poly", degree=degree, poly=kind)
            differences.append(float((found - dense).abs().max()))
            error = float((found - exact).abs().max())
            rows += [{"degree": degree, "error": error, "polynomial": kind, "which": "measured"}]
            if math.isfinite(plan.error):
                rows += [{"degree": degree, "error": plan.error, "polynomial": kind, "which": "certified beforehand"}]
    lines = alt.Chart(alt.Data(values=rows)).mark_line(point=True).encode(
        x=alt.X("degree:O", title="degree of the polynomial", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("error:Q", title="error of an output", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e")),
        color=alt.Color("polynomial:N", title=None),
        strokeDash=alt.StrokeDash("which:N", title=None, sort=["measured"]),
        tooltip=["polynomial:N", "which:N", "degree:O", "error:Q"],
    )  # fmt: skip
    run.figure(lines.properties(width="container", height=260))
    return Measurement(
        max(differences),
        note="n = 64, d = 4, entries up to 1, degrees 1 to 8; the figure shows the error against exact attention",
    )


@study.claim(
    "C3",
    "Where entries are bounded, attention to pairs takes almost linear time",
    paper="Theorem 1.4: n^(1+o(1)) for d = O(log n) and entries o((log n)^(1/3))",
    holds=at_most(1.2),
    unit="exponent of n in the time",
    also={
        "exponent of the exact method": at_least(2.6),
        "times faster than exact at its largest n": at_least(20.0),
        "largest error there": at_most(1e-3),
        "exponent, causal": at_most(1.2),
        "exponent at the largest n": at_most(1.2),
    },
)
def takes_linear_time(run: Run) -> Measurement:
    setting, rows = run.setting, []

    def seconds(n: int, method: Literal["exact", "poly"], causal: bool = False) -> float:
        run.progress(f"{method}, {n} rows")
        q, ks, vs = (to(each, run.device) for each in draw(n, DIMENSION, ENTRIES, run.generator(n), torch.float32))
        options: dict[str, Any] = {"degree": DEGREE, "bound": ENTRIES} if method == "poly" else {}
        function = lambda: ta.tensor_attention(q, ks, vs, method=method, is_causal=causal, **options)  # noqa: E731
        taken = shortest(run, function, setting.repeats)
        name = {"poly": "degree 4, causal" if causal else "degree 4", "exact": "exact"}[method]
        rows.append({"n": n, "seconds": taken, "method": name})
        return taken

    times = {n: seconds(n, "poly") for n in sorted({*setting.poly_rows, *setting.long_rows, *setting.exact_rows[-1:]})}
    causal = {n: seconds(n, "poly", causal=True) for n in setting.poly_rows}
    exact = {n: seconds(n, "exact") for n in setting.exact_rows}
    largest = setting.exact_rows[-1]
    q, ks, vs = draw(largest, DIMENSION, ENTRIES, run.generator(largest))
    found, true = (ta.tensor_attention(q, ks, vs, method=m, degree=DEGREE, bound=ENTRIES) for m in ("poly", "exact"))
    plan = ta.plan_poly(q, ks, vs, degree=DEGREE, bound=ENTRIES)
    lines = alt.Chart(alt.Data(values=rows)).mark_line(point=True).encode(
        x=alt.X("n:Q", title="rows n", scale=alt.Scale(type="log", nice=False, padding=10), axis=alt.Axis(tickCount=4)),
        y=alt.Y("seconds:Q", title="seconds", scale=alt.Scale(type="log"), axis=alt.Axis(format="~g", tickCount=4)),
        color=alt.Color("method:N", title=None, sort=["exact", "degree 4", "degree 4, causal"]),
        tooltip=["method:N", "n:Q", alt.Tooltip("seconds:Q", format=".3g")],
    )  # fmt: skip
    run.figure(lines.properties(width="container", height=260))
    return Measurement(
        exponent({n: times[n] for n in setting.poly_rows}),
        also={
            "exponent of the exact method": exponent(exact),
            "times faster than exact at its largest n": exact[largest] / times[largest],
            "largest error there": float((found - true).abs().max()),
            "certified error there": plan.error,
            "exponent, causal": exponent(causal),
            "exponent at the largest n": exponent({n: times[n] for n in setting.long_rows}),
            "seconds at the largest n": times[max(times)],
        },
        note=f"d = {DIMENSION}, entries up to {ENTRIES}, degree {DEGREE} (rank {plan.rank}), shortest of "
        f"{setting.repeats} runs; n from {min(setting.poly_rows)} to {max(setting.poly_rows)}, exact from "
        f"{min(exact)} to {largest}, largest n {max(times):,}",
    )


@study.claim(
    "C4",
    "The error is within 2 eps / (1 - eps) max|V1| max|V2|, for a polynomial of relative error eps",
    paper="proof of the upper bound",
    kind="exact",
    holds=at_most(1.0),
    unit="largest error / bound",
)
def keeps_its_bound(run: Run) -> Measurement:
    generator = run.generator(0)
    rows: list[dict[str, Any]] = []
    while len(rows) < run.setting.draws:
        B, kind = 0.3 + 1.5 * float(torch.rand((), generator=generator)), KINDS[len(rows) % 2]
        d, degree = (int(torch.randint(1, most, (), generator=generator)) for most in (6, 8))
        _, eps = ta.exp_poly(B**3, degree, kind)
        if eps >= 1.0:  # no bound to hold
            continue
        q, ks, vs = draw(32, d, B, generator)
        options: dict[str, Any] = {"degree": degree, "bound": B, "poly": kind}
        found, exact = (ta.tensor_attention(q, ks, vs, method=m, **options) for m in ("poly", "exact"))
        bound = ta.error_bound(eps, float(vs[0].abs().max() * vs[1].abs().max()))
        rows.append({"bound": bound, "error": float((found - exact).abs().max()), "polynomial": kind})
    points = alt.Chart(alt.Data(values=rows)).mark_point(filled=True, size=40, opacity=0.7).encode(
        x=alt.X("bound:Q", title="bound", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e")),
        y=alt.Y("error:Q", title="largest error", scale=alt.Scale(type="log"), axis=alt.Axis(format=".0e")),
        color=alt.Color("polynomial:N", title=None),
        tooltip=["polynomial:N", "bound:Q", "error:Q"],
    )  # fmt: skip
    ends = [f(row["bound"] for row in rows) for f in (min, max)]
    line = alt.Chart(alt.Data(values=[{"x": x} for x in ends])).mark_line(strokeDash=[4, 4], color="gray")
    run.figure((points + line.encode(x="x:Q", y="x:Q")).properties(width="container", height=280))
    ratios = [row["error"] / row["bound"] for row in rows]
    return Measurement(
        max(ratios),
        also={"median": statistics.median(ratios)},
        note=f"{len(rows)} draws of entries up to B (0.3 to 1.8), d (1 to 5), degree (1 to 7), n = 32",
    )


@study.claim(
    "C5",
    "The degree needed grows as the k-th power of the largest entry: higher orders need smaller entries",
    paper="abstract, theorem for general order: entries o((log n)^(1/k))",
    kind="exact",
    holds=at_most(0.08),
    unit="worst |slope of log degree against log B, over k, minus 1|",
    also={"degrees that degree_for has otherwise": equals(0.0)},
)
def trades_order_for_entries(run: Run) -> Measurement:
    radii = (8.0, 16.0, 32.0, 64.0)
    degrees = [least_taylor_degree(R, 1e-3) for R in radii]
    rows, slopes, otherwise = [], {}, 0
    for k in (2, 3, 4):
        entries = [R ** (1 / k) for R in radii]
        rows += [{"B": B, "degree": g, "order": k} for B, g in zip(entries, degrees)]
        slopes[k] = slope([math.log(B) for B in entries], [math.log(g) for g in degrees])
        otherwise += sum(ta.degree_for(B, k, 1e-3, "taylor") != g for B, g in zip(entries, degrees))
    lines = alt.Chart(alt.Data(values=rows)).mark_line(point=True).encode(
        x=alt.X("B:Q", title="largest entry B", scale=alt.Scale(type="log", nice=False, padding=10)),
        y=alt.Y("degree:Q", title="degree for error 0.001", scale=alt.Scale(type="log", nice=False, padding=10)),
        color=alt.Color("order:N", title="order"),
        tooltip=["order:N", "B:Q", "degree:Q"],
    )  # fmt: skip
    run.figure(lines.properties(width="container", height=260))
    return Measurement(
        max(abs(slopes[k] / k - 1.0) for k in slopes),
        also={f"slope, order {k}": value for k, value in slopes.items()}
        | {"degrees that degree_for has otherwise": float(otherwise)},
        note=f"least Taylor degrees in extended precision: {', '.join(map(str, degrees))} for B^k = 8, 16, 32, 64",
    )


@study.claim(
    "C6",
    "Trained, third-order attention learns to find triples, and ordinary attention does not",
    paper="motivation of the paper",
    holds=at_least(3.0),
    unit="of 4 seeds with accuracy ≥ 0.98 at order 3 and ≤ 0.80 at order 2",
)
def learns_triples(run: Run) -> Measurement:
    third, second = (run.each_seed(train_detector, order=order) for order in (3, 2))
    reached = [a.accuracy >= 0.98 and b.accuracy <= 0.80 for a, b in zip(third, second)]
    rows = [
        {"step": step, "accuracy": accuracy, "attention": f"order {order}", "seed": seed}
        for order, nets in ((3, third), (2, second))
        for seed, net in enumerate(nets)
        for step, accuracy in net.curve
    ]
    lines = alt.Chart(alt.Data(values=rows)).mark_line(opacity=0.8).encode(
        x=alt.X("step:Q", title="step"),
        y=alt.Y("accuracy:Q", title="accuracy on new sequences", scale=alt.Scale(domain=[0.5, 1.0])),
        color=alt.Color("attention:N", title=None, sort=["order 3", "order 2"]),
        detail="seed:N",
        tooltip=["attention:N", "seed:N", "step:Q", "accuracy:Q"],
    )  # fmt: skip
    rule = alt.Chart(alt.Data(values=[{"majority": third[0].majority}])).mark_rule(strokeDash=[4, 4])
    run.figure((lines + rule.encode(y="majority:Q")).properties(width="container", height=260))
    accuracies = {3: [net.accuracy for net in third], 2: [net.accuracy for net in second]}
    return Measurement(
        float(sum(reached)),
        seeds=len(reached),
        samples=[float(each) for each in reached],
        also={
            "accuracy, order 3": average(accuracies[3]).value,
            "worst accuracy, order 3": min(accuracies[3]),
            "accuracy, order 2": average(accuracies[2]).value,
            "best accuracy, order 2": max(accuracies[2]),
            "majority": third[0].majority,
        },
        note=f"{run.setting.tokens} tokens of {run.setting.bits} bits, label: is there j, k with h_i h_j h_k = 1; "
        f"order 3 has one head ({third[0].parameters:,} parameters), order 2 four ({second[0].parameters:,}); the "
        "dashed line is the share of the more frequent label",
    )


@study.claim(
    "C7",
    "It contains ordinary attention: with ones for the second keys and values nothing else is left",
    paper="order 2",
    kind="exact",
    holds=at_most(1e-12),
    unit="largest difference to scaled_dot_product_attention(scale=1/d) (float64)",
)
def contains_attention(run: Run) -> Measurement:
    errors = []
    for seed in range(10):
        generator = run.generator(seed)
        q, k, v = (torch.randn(2, 3, 33, 8, dtype=torch.float64, generator=generator) for _ in range(3))
        expected = functional.scaled_dot_product_attention(q, k, v, scale=1 / 8)
        for ks, vs in (([k], [v]), ([k, torch.ones_like(k)], [v, torch.ones_like(v)])):
            errors.append(float((ta.tensor_attention(q, ks, vs) - expected).abs().max()))
    return Measurement(
        max(errors), note="order 2, and order 3 with K2 = V2 = 1; 10 draws of 2 x 3 heads, n = 33, d = 8"
    )


@study.claim(
    "C8",
    "Exact attention to pairs, with its gradients, never holds n^3 numbers and is limited by arithmetic",
    paper="ours: the paper's straightforward algorithm takes n^3 time, and as it stands n^3 memory",
    holds=at_most(1024.0),
    unit="MiB at most, the whole process, forward and backward",
)
def stays_small(run: Run) -> Measurement:
    rows, found = [], {}
    for n in run.setting.memory_rows:
        run.progress(f"memory with {n} rows")
        command = [sys.executable, "-c", MEMORY, str(n), run.device]
        found[n] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows += [
            {"n": n, "MiB": found[n]["peak"], "what": "whole process, forward and backward"},
            {"n": n, "MiB": 4 * n**3 / 2**20, "what": "all logits, once"},
        ]
    lines = alt.Chart(alt.Data(values=rows)).mark_line(point=True).encode(
        x=alt.X("n:Q", title="rows n", scale=alt.Scale(type="log", base=2, nice=False, padding=10)),
        y=alt.Y("MiB:Q", title="MiB", scale=alt.Scale(type="log"), axis=alt.Axis(format="~s")),
        color=alt.Color("what:N", title=None),
        tooltip=["what:N", "n:Q", alt.Tooltip("MiB:Q", format=".1f")],
    )  # fmt: skip
    run.figure(lines.properties(width="container", height=260))
    n = max(found)
    last = found[n]
    return Measurement(
        last["peak"],
        also={
            "MiB more than before the call": last["peak"] - last["before"],
            "MiB of the logits alone": 4 * n**3 / 2**20,
            "seconds, forward": last["forward"],
            "seconds, backward": last["backward"],
            "matrix products alone, part of the forward's time": last["products"] / last["forward"],
        },
        note=f"n = {n}, d = 32, float32, one head; most of the peak is Python and torch themselves",
    )


# Runs by itself, because the largest resident set of a process never falls. Linux counts that of the parent process
# into ru_maxrss, but not into VmHWM.
MEMORY = """
import json, pathlib, resource, sys, time, torch
from lathe.nn.tensor_attention import tensor_attention
n, device, d = int(sys.argv[1]), sys.argv[2], 32
torch.set_num_threads(1)
q, k1, k2, v1, v2 = (torch.randn(n, d, device=device, requires_grad=True) for _ in range(5))
status = pathlib.Path("/proc/self/status")
if device == "cpu" and status.exists():
    peak = lambda: int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    wait = lambda: None
elif device == "cpu":
    unit = 1 if sys.platform == "darwin" else 2**10
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    wait = lambda: None
else:
    peak = lambda: torch.cuda.max_memory_allocated() / 2**20
    wait = torch.cuda.synchronize
small = [each[:64] for each in (q, k1, k2, v1, v2)]
tensor_attention(small[0], small[1:3], small[3:]).sum().backward()  # loads what is loaded once
wait()
found = {"before": peak()}
start = time.perf_counter()
out = tensor_attention(q, [k1, k2], [v1, v2])
wait()
found["forward"] = time.perf_counter() - start
start = time.perf_counter()
out.square().sum().backward()
wait()
found["backward"] = time.perf_counter() - start
found["peak"] = peak()
with torch.no_grad():  # the two matrix products of each tile of 2**18 logits, and nothing else
    rows = max(1, 2**18 // n)
    left, right, tile = torch.randn(rows, d, device=device), k2.mT.contiguous(), torch.empty(rows, n, device=device)
    values = torch.randn(n, d + 1, device=device)
    for repeat in range(2):
        start = time.perf_counter()
        for _ in range(n * n // rows):
            torch.mm(left, right, out=tile)
            torch.mm(tile, values)
        wait()
        found["products"] = time.perf_counter() - start
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Detector:
    """A trained detector: its accuracy on new sequences, in the end and on the way."""

    accuracy: float
    curve: list[tuple[int, float]]
    majority: float
    parameters: int


class TripleDetector(nn.Module):
    """One layer of attention over the tokens and a blank one, then a small network on what it found and the token."""

    def __init__(self, order: int, num_heads: int, bits: int, width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(bits + 1, num_heads * width)
        self.keys, self.values = (
            nn.ModuleList([nn.Linear(bits + 1, num_heads * width) for _ in range(order - 1)]) for _ in range(2)
        )
        self.log_scale = nn.Parameter(torch.ones(()))
        self.read = nn.Sequential(
            nn.Linear(num_heads * width + bits, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        # The last feature tells the blank token from the others.
        blank = torch.zeros_like(tokens[:, :1])
        with_blank = functional.pad(torch.cat([tokens, blank], 1), (0, 1))
        with_blank[:, -1, -1] = 1.0

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        query = heads(self.query(with_blank[:, :-1])) * self.log_scale.exp()
        keys, values = ([heads(each(with_blank)) for each in some] for some in (self.keys, self.values))
        found = ta.tensor_attention(query, keys, values).transpose(1, 2).flatten(2)
        return self.read(torch.cat([found, tokens], -1)).squeeze(-1)


def train_detector(run: Run, seed: int, order: int) -> Detector:
    """On sequences that are each seen once; order 2 gets four heads, which is more parameters than order 3 has."""
    setting = run.setting
    train = sequences(setting.steps * setting.batch, setting.tokens, setting.bits, torch.Generator().manual_seed(seed))
    test = sequences(setting.tests, setting.tokens, setting.bits, torch.Generator().manual_seed(10_000))
    torch.manual_seed(seed)
    net = TripleDetector(order, {3: 1, 2: 4}[order], setting.bits, setting.width)
    history = fit(
        net,
        train,
        loss=functional.binary_cross_entropy_with_logits,
        optimizer=torch.optim.Adam(net.parameters(), lr=1e-2),
        schedule=one_cycle(1e-2),
        steps=setting.steps,
        batch_size=setting.batch,
        clip_norm=1.0,
        validation=test,
        metrics={"accuracy": lambda output, target: ((output > 0) == (target > 0.5)).float().mean()},
        validate_every=max(1, setting.steps // 25),
        seed=seed,
        device=run.device,
        progress=lambda now: run.progress(f"order {order}, seed {seed}", now.step, now.total),
    )
    accuracies, ones = history.metrics["accuracy"], float(test[1].mean())
    curve = [(step, round(accuracy, 4)) for step, accuracy in zip(history.validated_at, accuracies)]
    return Detector(accuracies[-1], curve, max(ones, 1.0 - ones), sum(p.numel() for p in net.parameters()))


def sequences(count: int, tokens: int, bits: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random tokens in {-1, 1}^bits, (count, tokens, bits), and whether token i has j, k with h_i h_j h_k = 1."""
    h = torch.randint(0, 2, (count, tokens, bits), generator=generator)
    words = (h << torch.arange(bits)).sum(-1)
    labels = []
    for part in words.split(max(1, 2**22 // tokens**3)):
        triples = part[:, :, None, None] ^ part[:, None, :, None] ^ part[:, None, None, :]
        labels.append((triples == 0).flatten(2).any(-1))
    return 1.0 - 2.0 * h, torch.cat(labels).float()


def search_for_triples(x: Tensor, M: int) -> Tensor:
    """Whether token i is in a triple that adds up to 0 mod M, by looking at all of them."""
    found = []
    for part in x.split(max(1, 2**24 // x.shape[-1] ** 3)):
        sums = part[:, :, None, None] + part[:, None, :, None] + part[:, None, None, :]
        found.append((sums % M == 0).flatten(2).any(-1))
    return torch.cat(found)


def least_taylor_degree(R: float, eps: float) -> int:
    """The least degree with |P(x) - e^x| <= eps e^x on a grid of [-R, R], summed up in 80 digits."""
    with mpmath.workdps(80):
        grid = [R * mpmath.cos(mpmath.pi * i / 48) for i in range(49)]
        factor, terms, sums = [mpmath.exp(-x) for x in grid], [mpmath.mpf(1)] * 49, [mpmath.mpf(1)] * 49
        degree = 0
        while max(abs(s * f - 1) for s, f in zip(sums, factor)) > eps:
            degree += 1
            terms = [term * x / degree for term, x in zip(terms, grid)]
            sums = [s + term for s, term in zip(sums, terms)]
        return degree


def draw(
    n: int, d: int, B: float, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Queries and two key matrices with entries in [-B, B], and two value matrices with entries in [-1, 1]."""
    q, k1, k2, v1, v2 = (2 * torch.rand(n, d, dtype=dtype, generator=generator) - 1 for _ in range(5))
    return B * q, [B * k1, B * k2], [v1, v2]


def to(part: Tensor | list[Tensor], device: str) -> Any:
    return part.to(device) if isinstance(part, Tensor) else [each.to(device) for each in part]


def shortest(run: Run, function: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of several calls, after one that is not timed: other work on the machine only adds."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if run.device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def exponent(times: dict[int, float]) -> float:
    """Of n in the time, by least squares on logarithms."""
    return slope([math.log(n) for n in times], [math.log(t) for t in times.values()])


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    return statistics.linear_regression(x, y).slope


def quantiles(values: Tensor, levels: Sequence[float]) -> list[float]:
    return torch.quantile(values.cpu(), torch.tensor(levels, dtype=values.dtype)).tolist() if len(values) else []
