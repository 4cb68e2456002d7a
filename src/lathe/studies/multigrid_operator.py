"""Is one learned multigrid cycle a good linear operator between functions, and a network of them a good neural one?"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import altair as alt
import numpy as np
import torch
from torch import Tensor, nn

from lathe.data.pdes import darcy_2d, poisson, two_phase_coefficient
from lathe.operators.fourier import FNO, SpectralConv
from lathe.operators.multigrid_operator import MgNO, MultigridConv2d
from lathe.studies.engine import Measurement, Run, Setting, Study, at_least, at_most, between, compare
from lathe.training import evaluate, fit, one_cycle
from lathe.training.sobolev import SobolevLoss

study = Study(
    "multigrid-operator",
    title="MgNO: Efficient Parameterization of Linear Operators via Multigrid",
    authors="He, Liu, Xu",
    year=2023,
    arxiv="2310.19809",
    area="operators",
    module="lathe.operators.multigrid_operator",
    summary="""Learns maps between functions, such as coefficient to solution of an elliptic equation, with layers that
    are multigrid cycles: linear cost, few parameters, and boundary conditions by padding. The same layer, planted with
    classical kernels, is a solver, and a preconditioner that stays safe while it learns.""",
    example="""
import torch
from lathe.operators.multigrid_operator import MgNO, MultigridConv2d, flexible_cg

net = MgNO(in_channels=1, out_channels=1, channels=12, depth=3, levels=4)  # coefficient -> solution, any grid
assert net(torch.rand(2, 1, 33, 47)).shape == (2, 1, 33, 47)

laplacian = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]], dtype=torch.float64)
cycle = MultigridConv2d.from_stencil(laplacian, spacing=1 / 64, levels=6, smoother="spai")  # a solver, not yet trained
apply = lambda u: 64**2 * torch.nn.functional.conv2d(u, laplacian[None, None], padding=1)
assert flexible_cg(apply, torch.ones(1, 1, 63, 63, dtype=torch.float64), cycle, tol=1e-8).iterations < 12
""",
    job="build",
    scales={
        "smoke": Setting(
            seeds=1,
            planted=(7, 15, 31),
            linear={
                "n": 16,
                "train": 16,
                "test": 8,
                "levels": 4,
                "fewer": 2,
                "width": 4,
                "smoothing": 3,
                "modes": 8,
                "steps": 3,
                "lr": 5e-3,
            },
            darcy={
                "n": 16,
                "train": 16,
                "test": 8,
                "tau": 3.0,
                "channels": 4,
                "depth": 2,
                "cycle": ((1, 0), (1, 0), (2, 0)),
                "fno_width": 4,
            },
            training={"modes": 4, "steps": 4, "lr": 2e-3, "batch": 8, "weight_decay": 0.0},
            small={"samples": 8, "steps": 4},
            timed={"sides": (32, 64, 128), "channels": 4, "depth": 1, "levels": 4, "repeats": 2},
        ),
        "desk": Setting(
            planted=(15, 31, 63, 127),
            linear={
                "n": 32,
                "train": 512,
                "test": 128,
                "levels": 5,
                "fewer": 3,
                "width": 8,
                "smoothing": 14,
                "modes": 24,
                "steps": 400,
                "lr": 5e-3,
            },
            darcy={
                "n": 24,
                "train": 512,
                "test": 88,
                "tau": 3.0,
                "channels": 12,
                "depth": 3,
                "cycle": ((1, 0), (1, 0), (1, 0), (2, 0)),
                "fno_width": 16,
            },
            training={"modes": 16, "steps": 600, "lr": 2e-3, "batch": 16, "weight_decay": 0.0},
            small={"samples": 64, "steps": 400},
            timed={"sides": (64, 128, 256, 512), "channels": 12, "depth": 2, "levels": 6, "repeats": 7},
        ),
        "full": Setting(
            planted=(15, 31, 63, 127, 255, 511),
            linear={
                "n": 256,
                "train": 4096,
                "test": 256,
                "levels": 8,
                "fewer": 4,
                "width": 8,
                "smoothing": 14,
                "modes": 24,
                "steps": 20_000,
                "lr": 5e-3,
            },
            darcy={
                "n": 256,
                "train": 1280,
                "test": 112,
                "tau": 20.0,
                "channels": 24,
                "depth": 4,
                "cycle": ((1, 0),) * 5 + ((2, 0),),
                "fno_width": 32,
            },
            training={"modes": 24, "steps": 80_000, "lr": 5e-4, "batch": 8, "weight_decay": 1e-4},
            small={"samples": 128, "steps": 8000},
            timed={"sides": (128, 256, 512, 1024), "channels": 24, "depth": 4, "levels": 6, "repeats": 10},
        ),
    },
)

_LAPLACIAN = ((0.0, -1.0, 0.0), (-1.0, 4.0, -1.0), (0.0, -1.0, 0.0))
_L2 = SobolevLoss(0, reduction="mean")
_H1 = SobolevLoss(1, reduction="mean", form="differences", boundary="zero")


# ---------------------------------------------------------------------------------------------- C1: the planted cycle


@study.claim(
    "C1",
    "With classical kernels planted the layer is a multigrid cycle, whose contraction does not depend on the grid",
    paper="Theory section: a V-cycle parameterises the solution operator of an elliptic equation",
    holds=at_most(0.4),
    unit="residual factor of a V(1,1) cycle, largest over the grids",
    kind="exact",
    also={"spread over grids": at_most(0.05), "difference from a NumPy multigrid": at_most(1e-12)},
)
def planted_cycle_contracts(run: Run) -> Measurement:
    stencil = torch.tensor(_LAPLACIAN, dtype=torch.float64)
    histories, differences = {}, []
    for n in run.setting.planted:
        h = 1 / (n + 1)
        layer = MultigridConv2d.from_stencil(stencil, h, (n + 1).bit_length() - 1).requires_grad_(False)
        f = torch.randn(1, 1, n, n, dtype=torch.float64, generator=run.generator(0))
        theirs = _numpy_cycle(f[0, 0].numpy(), h)
        differences.append(float(np.abs(layer(f)[0, 0].numpy() - theirs).max() / np.abs(theirs).max()))
        u, norms = torch.zeros_like(f), []
        for _ in range(11):
            defect = f - torch.nn.functional.conv2d(u, stencil[None, None] / h**2, padding=1)
            norms.append(float(defect.norm()))
            u = u + layer(defect)
        histories[n] = [norm / norms[0] for norm in norms]
    # Ten corrections: the last one's factor is near the asymptotic one.
    factors = [history[-1] / history[-2] for history in histories.values()]
    rows = [
        {"cycle": k, "residual": value, "grid": f"{n} x {n}"}
        for n, norms in histories.items()
        for k, value in enumerate(norms)
    ]
    run.figure(
        alt.Chart(alt.InlineData(values=rows), width="container", height=260)
        .mark_line(point=True)
        .encode(
            x=alt.X("cycle:Q", title="cycles"),
            y=alt.Y("residual:Q", title="residual / first residual", scale=alt.Scale(type="log")),
            color=alt.Color("grid:N", title="interior nodes", sort=[f"{n} x {n}" for n in histories]),
        )
    )
    also = {f"factor on {n} x {n}": factor for n, factor in zip(histories, factors)}
    also |= {"spread over grids": max(factors) - min(factors), "difference from a NumPy multigrid": max(differences)}
    return Measurement(max(factors), also=also)


def _numpy_cycle(f: np.ndarray, h: float) -> np.ndarray:
    """One V(1,1) cycle for the 5-point Laplacian from a zero guess, in loops over slices."""

    def defect(u: np.ndarray) -> np.ndarray:
        w = np.pad(u, 1)
        around = w[2:, 1:-1] + w[:-2, 1:-1] + w[1:-1, 2:] + w[1:-1, :-2]
        return f - (4 * u - around) / h**2

    if len(f) == 1:
        return h**2 / 4 * f
    u = 0.2 * h**2 * f
    r = defect(u)
    r = (r[:-2:2] + 2 * r[1:-1:2] + r[2::2]) / 4
    r = (r[:, :-2:2] + 2 * r[:, 1:-1:2] + r[:, 2::2]) / 4
    coarse = _numpy_cycle(r, 2 * h)
    nodes = np.pad(coarse, 1)
    tall = np.zeros((2 * len(nodes) - 1, len(nodes)))
    tall[::2], tall[1::2] = nodes, (nodes[1:] + nodes[:-1]) / 2
    fine = np.zeros((len(tall), len(tall)))
    fine[:, ::2], fine[:, 1::2] = tall, (tall[:, 1:] + tall[:, :-1]) / 2
    u = u + fine[1:-1, 1:-1]
    return u + 0.2 * h**2 * defect(u)


# ------------------------------------------------------------------------------- C2, C4: learning the inverse Laplacian


class _SpectralLayer(nn.Module):
    """One linear Fourier layer with the lifting and the projection that give it as many channels as the cycle."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        self.lifting = nn.Conv2d(1, width, 1, bias=False)
        self.spectral = SpectralConv(width, width, (modes, modes), bias=False)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.projection = nn.Conv2d(width, 1, 1, bias=False)

    def forward(self, f: Tensor) -> Tensor:
        v = self.lifting(f)
        return self.projection(self.spectral(v) + self.pointwise(v))


@lru_cache(maxsize=8)
def _poisson_pairs(n: int, samples: int, boundary: str, seed: int) -> tuple[Tensor, Tensor]:
    """White noise f, whose energy the inverse Laplacian moves to the largest scales, and u scaled to unit size."""
    f = torch.randn(samples, n, n, generator=torch.Generator().manual_seed(1000 + seed))
    if boundary == "periodic":
        f = f - f.mean((1, 2), keepdim=True)
    u = poisson(f, boundary="dirichlet" if boundary == "dirichlet" else "periodic")
    return f[:, None], (u / u.std())[:, None]


@dataclass(frozen=True)
class Linear:
    """A fitted linear layer: relative L2 error on unseen right-hand sides, size, and how the error fell."""

    error: float
    parameters: int
    steps: list[int]
    errors: list[float]


def fit_inverse_laplacian(
    run: Run, seed: int, layer: str, padding: Literal["zeros", "circular"] = "zeros", boundary: str = "dirichlet"
) -> Linear:
    """Fit one linear layer ("levels", "fewer", "single" or "spectral") to f -> u with -Lap u = f."""
    s = run.setting.linear
    head = partial(nn.Conv2d, out_channels=1, kernel_size=1, bias=False)
    net: nn.Module
    if layer == "spectral":
        net = _SpectralLayer(s["width"], s["modes"])
    elif layer == "single":
        # Three times the width brings the single level to the size of the cycle.
        width = 3 * s["width"]
        net = nn.Sequential(MultigridConv2d(1, width, steps=[(s["smoothing"], 0)], padding_mode=padding), head(width))
    else:
        net = nn.Sequential(MultigridConv2d(1, s["width"], s[layer], padding_mode=padding), head(s["width"]))
    f, u = _poisson_pairs(s["n"], s["train"] + s["test"], boundary, seed)
    held_out = (f[s["train"] :], u[s["train"] :])
    history = fit(
        net,
        (f[: s["train"]], u[: s["train"]]),
        loss=_L2,
        optimizer=partial(torch.optim.Adam, lr=s["lr"]),
        schedule=one_cycle(s["lr"]),
        steps=s["steps"],
        batch_size=min(16, s["train"]),
        validation=held_out,
        validate_every=max(1, s["steps"] // 10),
        seed=seed,
        device=run.device,
    )
    errors = history.metrics["loss"]
    return Linear(errors[-1], sum(p.numel() for p in net.parameters()), history.validated_at, errors)


@study.claim(
    "C2",
    "One linear cycle learns the inverse Laplacian; a single level of its size, or a spectral layer, cannot",
    paper="Section on the efficient parameterisation of linear operators by multigrid",
    holds=at_most(1 / 1.5),
    unit="error of the deep cycle over that of a cycle with fewer levels",
    also={"over a single level": at_most(1 / 3), "over a spectral layer": at_most(1 / 5)},
)
def cycle_learns_inverse(run: Run) -> Measurement:
    s = run.setting.linear
    names = {
        "levels": f"{s['levels']} levels",
        "fewer": f"{s['fewer']} levels",
        "single": "1 level",
        "spectral": "spectral layer",
    }
    fits = {layer: run.each_seed(fit_inverse_laplacian, layer=layer) for layer in names}
    rows = [
        {"step": step, "error": error, "layer": f"{names[layer]}, {results[0].parameters:,} parameters"}
        for layer, results in fits.items()
        for step, error in zip(results[0].steps, np.mean([r.errors for r in results], axis=0).tolist())
    ]
    run.figure(_curves(rows, "layer", "relative L2 error of u, unseen f"))
    ours = [r.error for r in fits["levels"]]
    also = {f"error of {names[layer]}": _mean(r.error for r in results) for layer, results in fits.items()}
    also |= {f"parameters of {names[layer]}": results[0].parameters for layer, results in fits.items()}
    also["over a single level"] = _ratio(ours, [r.error for r in fits["single"]])
    also["over a spectral layer"] = _ratio(ours, [r.error for r in fits["spectral"]])
    return compare(ours, [r.error for r in fits["fewer"]], how="ratio", also=also)


@study.claim(
    "C4",
    "Boundary conditions come from the padding: the right padding fits either problem better than the wrong one",
    paper="Text: boundary conditions through padding",
    holds=at_most(0.7),
    unit="error with zero padding over circular padding, Dirichlet problem",
    also={"circular over zeros, periodic problem": at_most(0.7)},
)
def padding_sets_boundary(run: Run) -> Measurement:
    errors = {
        (boundary, padding): [
            result.error
            for result in run.each_seed(fit_inverse_laplacian, layer="levels", padding=padding, boundary=boundary)
        ]
        for boundary in ("dirichlet", "periodic")
        for padding in ("zeros", "circular")
    }
    rows = [{"problem": b, "padding": p, "error": e} for (b, p), values in errors.items() for e in values]
    run.figure(
        alt.Chart(alt.InlineData(values=rows), width="container", height=260)
        .mark_point(filled=True, size=80)
        .encode(
            x=alt.X("error:Q", title="relative L2 error of u, unseen f", scale=alt.Scale(zero=True)),
            y=alt.Y("problem:N", title="problem"),
            color=alt.Color("padding:N", title="padding"),
        )
    )
    also = {f"error, {boundary} problem, {padding}": _mean(values) for (boundary, padding), values in errors.items()}
    also["circular over zeros, periodic problem"] = _ratio(errors["periodic", "circular"], errors["periodic", "zeros"])
    note = "The periodic cycle wraps in its prolongation too, so nothing tells it where the border is."
    return compare(errors["dirichlet", "zeros"], errors["dirichlet", "circular"], how="ratio", also=also, note=note)


# ---------------------------------------------------------------------------------------------- C3, C5, C6: Darcy flow


class _Standardized(nn.Module):
    """A network between standardised inputs and standardised outputs, for fields in their own units."""

    in_mean: Tensor
    in_std: Tensor
    out_mean: Tensor
    out_std: Tensor

    def __init__(self, net: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
        super().__init__()
        self.net = net
        for name, values in (("in", inputs), ("out", outputs)):
            self.register_buffer(f"{name}_mean", values.mean())
            self.register_buffer(f"{name}_std", values.std())

    def forward(self, a: Tensor) -> Tensor:
        return self.out_mean + self.out_std * self.net((a - self.in_mean) / self.in_std)


@lru_cache(maxsize=4)
def _darcy_pairs(n: int, samples: int, tau: float, seed: int) -> tuple[Tensor, Tensor]:
    a = two_phase_coefficient(samples, n, tau=tau, generator=torch.Generator().manual_seed(2000 + seed))
    return a[:, None], darcy_2d(a)[:, None]


@dataclass(frozen=True)
class Operator:
    """A trained operator: relative test and training errors along the training, and size."""

    parameters: int
    steps: list[int]
    test_l2: list[float]
    test_h1: list[float]
    train_l2: float
    mean_l2: float


def train_on_darcy(run: Run, seed: int, model: str, loss: str = "h1", few: bool = False) -> Operator:
    """Train "mgno" or "fno" on coefficient -> pressure, with all or `few` samples."""
    d, t = run.setting.darcy, run.setting.training
    samples, steps = (run.setting.small["samples"], run.setting.small["steps"]) if few else (d["train"], t["steps"])
    a, u = _darcy_pairs(d["n"], d["train"] + d["test"], d["tau"], seed)
    train, test = (a[:samples], u[:samples]), (a[d["train"] :], u[d["train"] :])
    net = (
        MgNO(1, 1, d["channels"], d["depth"], steps=d["cycle"])
        if model == "mgno"
        else FNO((t["modes"], t["modes"]), 1, 1, d["fno_width"])
    )
    operator = _Standardized(net, *train)
    history = fit(
        operator,
        train,
        loss=_H1 if loss == "h1" else _L2,
        optimizer=partial(torch.optim.Adam, lr=t["lr"], weight_decay=t["weight_decay"]),
        schedule=one_cycle(t["lr"], pct_start=0.2, div_factor=2.0, final_div_factor=100.0),
        steps=steps,
        batch_size=min(t["batch"], samples),
        validation=test,
        metrics={"l2": _L2, "h1": _H1},
        validate_every=max(1, steps // 10),
        seed=seed,
        device=run.device,
        progress=lambda p: run.progress(f"{model}, {loss} loss, {samples} samples, seed {seed}", p.step, p.total),
    )
    return Operator(
        sum(p.numel() for p in net.parameters()),
        history.validated_at,
        history.metrics["l2"],
        history.metrics["h1"],
        evaluate(operator, train, {"l2": _L2})["l2"],
        float(_L2(train[1].mean(0).expand_as(test[1]), test[1])),
    )


@study.claim(
    "C3",
    "On Darcy flow the multigrid operator is more accurate than a Fourier operator with three times its parameters",
    paper="Main Darcy table: L2 error several times below FNO's, 0.57M against 2.4M parameters (as remembered)",
    holds=at_most(0.85),
    unit="test L2 error over FNO's",
    also={"test H1 error over FNO's": at_most(0.75), "parameters over FNO's": at_most(1 / 3)},
)
def beats_fourier(run: Run) -> Measurement:
    ours, theirs = run.each_seed(train_on_darcy, model="mgno"), run.each_seed(train_on_darcy, model="fno")
    rows = [
        {"step": step, "error": error, "operator": f"{name}, {norm.upper()}"}
        for name, results in (("MgNO", ours), ("FNO", theirs))
        for norm in ("l2", "h1")
        for step, error in zip(
            results[0].steps, np.mean([getattr(r, f"test_{norm}") for r in results], axis=0).tolist()
        )
    ]
    run.figure(_curves(rows, "operator", "relative test error of the pressure"))
    also = {
        "test H1 error over FNO's": _ratio([r.test_h1[-1] for r in ours], [r.test_h1[-1] for r in theirs]),
        "parameters over FNO's": ours[0].parameters / theirs[0].parameters,
        "MgNO's test L2 error": _mean(r.test_l2[-1] for r in ours),
        "MgNO's test H1 error": _mean(r.test_h1[-1] for r in ours),
        "FNO's test H1 error": _mean(r.test_h1[-1] for r in theirs),
        "MgNO's parameters": ours[0].parameters,
        "L2 error of the mean field": _mean(r.mean_l2 for r in ours),
    }
    note = """Both train at the same learning rate, 2e-3 at desk scale. A larger one, 5e-3, helps both and leaves the
    order as it is (one seed: 0.022 against 0.037 in L2, 0.053 against 0.091 in H1)."""
    return compare(
        [r.test_l2[-1] for r in ours],
        [r.test_l2[-1] for r in theirs],
        how="ratio",
        also=also,
        note=" ".join(note.split()),
    )


@study.claim(
    "C5",
    "With few samples the multigrid operator's test error does not rise late in training; the Fourier operator's does",
    paper="Training-dynamics figure: FNO over-fits, MgNO does not",
    holds=at_most(1.0),
    unit="MgNO's last test L2 error over that at half of training",
    also={"FNO's last over half": at_least(1.0)},
)
def overfits_less(run: Run) -> Measurement:
    ours = run.each_seed(train_on_darcy, model="mgno", few=True)
    theirs = run.each_seed(train_on_darcy, model="fno", few=True)
    rows = [
        {"step": step, "error": error, "operator": name}
        for name, results in (("MgNO", ours), ("FNO", theirs))
        for step, error in zip(results[0].steps, np.mean([r.test_l2 for r in results], axis=0).tolist())
    ]
    run.figure(_curves(rows, "operator", "relative test L2 error, few samples"))

    def half(result: Operator) -> float:
        return result.test_l2[(len(result.test_l2) - 1) // 2]

    also = {"FNO's last over half": _ratio([r.test_l2[-1] for r in theirs], [half(r) for r in theirs])}
    for name, results in (("MgNO", ours), ("FNO", theirs)):
        also[f"{name}'s test L2 error"] = _mean(r.test_l2[-1] for r in results)
        also[f"{name}'s training L2 error"] = _mean(r.train_l2 for r in results)
        also[f"{name}'s test H1 error"] = _mean(r.test_h1[-1] for r in results)
    note = """A falling learning rate lets neither test error rise at this size, so the difference that the claim is
    about does not show. MgNO's test errors are the lower ones; its distance to its training error is not."""
    return compare(
        [r.test_l2[-1] for r in ours], [half(r) for r in ours], how="ratio", also=also, note=" ".join(note.split())
    )


@study.claim(
    "C6",
    "Training on the H1 error lowers the H1 test error and does not raise the L2 test error",
    paper="Ablation of the loss",
    holds=at_most(1.0),
    unit="test H1 error after H1 training over that after L2 training",
    also={"test L2 error, H1 over L2 training": at_most(1.1)},
)
def h1_training_helps(run: Run) -> Measurement:
    h1, l2 = run.each_seed(train_on_darcy, model="mgno"), run.each_seed(train_on_darcy, model="mgno", loss="l2")
    rows = [
        {"error": value[-1], "norm": norm, "loss": name}
        for name, results in (("H1 loss", h1), ("L2 loss", l2))
        for r in results
        for norm, value in (("test L2", r.test_l2), ("test H1", r.test_h1))
    ]
    run.figure(
        alt.Chart(alt.InlineData(values=rows), width="container", height=260)
        .mark_point(filled=True, size=80)
        .encode(
            x=alt.X("error:Q", title="relative test error", scale=alt.Scale(zero=True)),
            y=alt.Y("norm:N", title="measured in"),
            color=alt.Color("loss:N", title="trained on"),
        )
    )
    also = {
        "test L2 error, H1 over L2 training": _ratio([r.test_l2[-1] for r in h1], [r.test_l2[-1] for r in l2]),
        "test L2 error after H1 training": _mean(r.test_l2[-1] for r in h1),
        "test L2 error after L2 training": _mean(r.test_l2[-1] for r in l2),
    }
    return compare([r.test_h1[-1] for r in h1], [r.test_h1[-1] for r in l2], how="ratio", also=also)


# ------------------------------------------------------------------------------------------------------- C7: the cost


@study.claim(
    "C7",
    "The cost of a forward pass is linear in the number of grid points",
    paper="Complexity: O(n) operations for n grid points",
    holds=between(0.9, 1.1),
    unit="slope of log time against log points",
)
def cost_is_linear(run: Run) -> Measurement:
    t = run.setting.timed
    net = MgNO(1, 1, t["channels"], t["depth"], t["levels"]).to(run.device).eval().requires_grad_(False)
    # Batches of the same number of points in all: caches and the overhead of calls weigh alike on every grid.
    batches = [(max(t["sides"]) // side) ** 2 for side in t["sides"]]
    fields = [torch.randn(batch, 1, side, side, device=run.device) for batch, side in zip(batches, t["sides"])]
    # Processor time on the CPU: what else the machine does is no part of the cost.
    clock = time.perf_counter if run.device.startswith("cuda") else time.process_time
    best = [math.inf] * len(fields)
    for repeat in range(t["repeats"] + 1):
        for i, field in enumerate(fields):
            start = clock()
            net(field)
            if run.device.startswith("cuda"):
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                best[i] = min(best[i], clock() - start)
    points, seconds = [side**2 for side in t["sides"]], [s / batch for s, batch in zip(best, batches)]
    slope = float(np.polyfit(np.log(points), np.log(seconds), 1)[0])
    rows = [{"points": p, "ms": 1e3 * s} for p, s in zip(points, seconds)]
    run.figure(
        alt.Chart(alt.InlineData(values=rows), width="container", height=260)
        .mark_line(point=True)
        .encode(
            x=alt.X("points:Q", title="grid points", scale=alt.Scale(type="log")),
            y=alt.Y("ms:Q", title="forward pass, milliseconds a sample", scale=alt.Scale(type="log")),
        )
    )
    also = {f"ms a sample at {side} x {side}": 1e3 * s for side, s in zip(t["sides"], seconds)}
    note = """Batches hold equally many points in all and processor time is taken. One sample a grid, by the clock of a
    busy machine, gave slopes from 0.72 to 1.31 (1.108 first): call overhead weighs on small grids, caches on large."""
    return Measurement(slope, also=also, note=" ".join(note.split()))


# ------------------------------------------------------------------------------------------------------------ shared


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return _mean(a / b for a, b in zip(ours, theirs))


def _curves(rows: list[dict[str, object]], by: str, title: str) -> alt.Chart:
    return (
        alt.Chart(alt.InlineData(values=rows), width="container", height=260)
        .mark_line(point=True)
        .encode(
            x=alt.X("step:Q", title="training steps"),
            y=alt.Y("error:Q", title=title, scale=alt.Scale(type="log")),
            color=alt.Color(f"{by}:N", title=None, sort=None, legend=alt.Legend(labelLimit=0, orient="top", columns=2)),
        )
    )
