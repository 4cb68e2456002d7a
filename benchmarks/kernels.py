"""Kernels of infinitely wide networks and their predictions against neural-tangents; empirical NTKs against torch.func.

neural-tangents is archived and needs an old JAX: it lives in an environment of its own, and its times are taken there,
in float64 as ours are, compiled, on as many threads.

    python -m venv ENV && ENV/bin/pip install jax==0.4.28 jaxlib==0.4.28 "numpy<2" "scipy<1.13" neural-tangents==0.6.5
    LATHE_NEURAL_TANGENTS_PYTHON=ENV/bin/python python benchmarks/harness.py kernels
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Pair, PeerMissing
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from lathe.theory.kernels import (
    Activation,
    AvgPool,
    Conv,
    Dense,
    Flatten,
    GlobalAvgPool,
    GradientFlow,
    Layer,
    LayerNorm,
    Residual,
    Sequential,
    empirical_ntk,
)

INTERPRETER = "LATHE_NEURAL_TANGENTS_PYTHON"
DEPTH = 10
#: Run by the other interpreter. Its argument is a folder with cases.json; images come as (n, c, h, w).
PEER = """
import json, os, sys, time
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")
import numpy as np
import neural_tangents as nt
from neural_tangents import stax
folder = sys.argv[1]
def median(run, rounds):
    answer, seconds = run(), []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return answer, sorted(seconds)[len(seconds) // 2]
times = {}
for case in json.load(open(os.path.join(folder, "cases.json"))):
    data = np.load(os.path.join(folder, case["name"] + ".npz"))
    if case["kind"] == "kernel":
        x = data["x"]
        x = x if x.ndim == 2 else np.moveaxis(x, 1, -1)
        kernel_fn = jax.jit(eval(case["network"])[2], static_argnums=(2,))
        answer, seconds = median(lambda: jax.block_until_ready(kernel_fn(x, None, ("nngp", "ntk"))), case["rounds"])
        found = {"nngp": answer.nngp, "ntk": answer.ntk}
    else:
        def predict():
            flow = nt.predict.gradient_descent_mse(data["train"], data["y"], learning_rate=1.0)
            outs = [flow(float(t), 0.0, 0.0 * data["test"][:, :1], data["test"])[1] for t in data["times"]]
            return jax.block_until_ready(outs)
        answer, seconds = median(predict, case["rounds"])
        found = {"mean": np.stack(answer)}
    np.savez(os.path.join(folder, case["name"] + "-answer.npz"), seconds=seconds, **found)
"""


@dataclass(frozen=True)
class Case:
    """A network that both libraries have.

    Args:
        title: what is computed.
        network, peer: in our layers, and in those of `stax`.
        shape: of the inputs.
        rounds: timed runs of the peer.
    """

    title: str
    network: Layer
    peer: str
    shape: tuple[int, ...]
    rounds: int = 5


def fully_connected(act: str, depth: int, W: float, b: float) -> Sequential:
    return Sequential(*[part for _ in range(depth - 1) for part in (Dense(W, b), Activation(act))], Dense(W, b))


def stax_fully_connected(layer: str, depth: int, W: float, b: float) -> str:
    dense = f"stax.Dense(1, W_std={W}**0.5, b_std={b}**0.5)"
    return f"stax.serial(*([{dense}, stax.{layer}] * {depth - 1}), {dense})"


def convolutional(act: str, depth: int, last: Layer) -> Sequential:
    conv = Conv(3, padding="same", weight_variance=1.8, bias_variance=0.1)
    return Sequential(*[part for _ in range(depth) for part in (conv, Activation(act))], last, Dense(1.8, 0.1))


def stax_convolutional(layer: str, depth: int, last: str) -> str:
    conv = "stax.Conv(1, (3, 3), padding='SAME', W_std=1.8**0.5, b_std=0.1**0.5)"
    dense = "stax.Dense(1, W_std=1.8**0.5, b_std=0.1**0.5)"
    return f"stax.serial(*([{conv}, stax.{layer}] * {depth}), stax.{last}(), {dense})"


def cases() -> list[Case]:
    """Those whose times are compared."""
    n, images, pooled, pixels, depth = 2000, 64, 8, 32, DEPTH
    found = [
        Case(
            f"fully connected, {act}, depth {depth}, {n} inputs",
            fully_connected(act, depth, 1.8, 0.1),
            stax_fully_connected(layer, depth, 1.8, 0.1),
            (n, 64),
        )
        for act, layer in (("relu", "Relu()"), ("erf", "Erf()"), ("gelu", "Gelu(approximate=False)"))
    ]
    found += [
        Case(
            f"{name}, 4 convolutions, {count} images of {pixels} x {pixels}",
            convolutional(act, 4, ours),
            stax_convolutional(layer, 4, peer),
            (count, 3, pixels, pixels),
            1 if count == pooled else 3,
        )
        for name, act, layer, ours, peer, count in (
            ("convolutional, relu", "relu", "Relu()", Flatten(), "Flatten", images),
            ("convolutional, erf", "erf", "Erf()", Flatten(), "Flatten", images),
            ("globally pooled, relu", "relu", "Relu()", GlobalAvgPool(), "GlobalAvgPool", pooled),
        )
    ]
    return found


def checked() -> list[Case]:
    """Small networks of everything that both libraries have, for tests."""
    conv = "stax.Conv(1, (3, 3), {}padding='{}', W_std=1.3**0.5, b_std=0.2**0.5)"
    same, strided, around = conv.format("", "SAME"), conv.format("(2, 2), ", "VALID"), conv.format("", "CIRCULAR")
    ours = Conv(3, padding="same", weight_variance=1.3, bias_variance=0.2)
    own_strided = Conv(3, 2, weight_variance=1.3, bias_variance=0.2)
    own_around = Conv(3, padding=1, weight_variance=1.3, bias_variance=0.2, padding_mode="circular")
    branch = f"stax.parallel(stax.serial(stax.Relu(), {same}), stax.Identity())"
    block = f"stax.serial(stax.FanOut(2), {branch}, stax.FanInSum())"
    end = "stax.GlobalAvgPool(), stax.Dense(1)"
    standard = "stax.Dense(16, W_std=1.3**0.5, b_std=0.2**0.5, parameterization='standard', s=(1, 16))"
    inner = standard.replace("s=(1, 16)", "s=(16, 16)")
    own_standard = Dense(1.3, 0.2, parametrization="standard", fan_in=5)
    own_inner = Dense(1.3, 0.2, parametrization="standard", fan_in=16)
    return [
        *(
            Case(f"{act}", fully_connected(act, 3, 1.3, 0.2), stax_fully_connected(layer, 3, 1.3, 0.2), (3, 5))
            for act, layer in (
                ("relu", "Relu()"),
                ("erf", "Erf()"),
                ("gelu", "Gelu(approximate=False)"),
                ("sin", "Sin()"),
                ("cos", "Cos()"),
                ("abs", "Abs()"),
                ("exp", "Exp()"),
                ("square", "Monomial(2)"),
                ("gaussian", "Gaussian(1, -1)"),
            )
        ),
        Case(
            "leaky relu, layer norm",
            Sequential(Dense(1.3, 0.2), LayerNorm(), Activation(nn.LeakyReLU(0.2)), Dense(1.3, 0.2)),
            "stax.serial(stax.Dense(1, 1.3**0.5, 0.2**0.5), stax.LayerNorm(eps=1e-5), stax.LeakyRelu(0.2), "
            "stax.Dense(1, 1.3**0.5, 0.2**0.5))",
            (3, 5),
        ),
        Case(
            "standard parametrization",
            Sequential(own_standard, Activation("relu"), own_inner),
            f"stax.serial({standard}, stax.Relu(), {inner})",
            (3, 5),
        ),
        Case(
            "flattened, strided",
            Sequential(own_strided, Activation("erf"), ours, Activation("relu"), Flatten(), Dense()),
            f"stax.serial({strided}, stax.Erf(), {same}, stax.Relu(), stax.Flatten(), stax.Dense(1))",
            (2, 2, 7, 7),
        ),
        Case(
            "residual, pooled twice",
            Sequential(
                ours,
                Residual(Sequential(Activation("relu"), ours)),
                AvgPool(2),
                Sequential(own_strided, Activation("relu")),
                GlobalAvgPool(),
                Dense(),
            ),
            f"stax.serial({same}, {block}, stax.AvgPool((2, 2), (2, 2)), {strided}, stax.Relu(), {end})",
            (2, 2, 8, 8),
        ),
        Case(
            "strided, circular, normalised over all positions, pooled globally",
            Sequential(
                own_strided, Activation("erf"), own_around, LayerNorm(), Activation("relu"), GlobalAvgPool(), Dense()
            ),
            f"stax.serial({strided}, stax.Erf(), {around}, stax.LayerNorm(axis=(1, 2, 3), eps=1e-5), "
            f"stax.Relu(), {end})",
            (2, 2, 7, 7),
        ),
    ]


def neural_tangents(requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the peer answers in its own process: arrays by name, and the median of its `seconds`.

    A request has `kind` ("kernel": `network`, `x`; "flow": `train`, `y`, `test`, `times`) and `rounds`.
    """
    interpreter = os.environ.get(INTERPRETER)
    if not interpreter or not Path(interpreter).exists():
        raise PeerMissing(f"neural-tangents==0.6.5 in an environment of its own, its python named by {INTERPRETER}")
    with tempfile.TemporaryDirectory() as name:
        folder, listed = Path(name), []
        for number, request in enumerate(requests):
            arrays = {key: value.numpy() for key, value in request.items() if isinstance(value, Tensor)}
            np.savez(folder / f"{number}.npz", **arrays)
            listed.append({key: request[key] for key in request if key not in arrays} | {"name": str(number)})
        (folder / "cases.json").write_text(json.dumps(listed))
        threads = torch.get_num_threads()
        flags = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()} intra_op_parallelism_threads={threads}"
        done = subprocess.run(
            [interpreter, "-c", PEER, str(folder)],
            capture_output=True,
            text=True,
            env={**os.environ, "XLA_FLAGS": flags},
        )
        if done.returncode:
            raise RuntimeError(f"neural-tangents failed: {done.stderr[-2000:]}")
        answers = []
        for number in range(len(requests)):
            with np.load(folder / f"{number}-answer.npz") as answer:
                answers.append({key: torch.tensor(answer[key]) for key in answer.files})
        return answers


def flow_request() -> dict[str, Any]:
    """Kernels of 500 training and 200 test inputs, three targets, twenty times."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(700, 32, dtype=torch.float64, generator=g)
    kernel = fully_connected("erf", 3, 1.5, 0.1)(x, x[:500], ("ntk",)).ntk
    assert kernel is not None
    y = torch.randn(500, 3, dtype=torch.float64, generator=g)
    times = torch.logspace(0, 5, 20, dtype=torch.float64)
    return {"kind": "flow", "train": kernel[:500], "test": kernel[500:], "y": y, "times": times, "rounds": 3}


def flow(request: dict[str, Any]) -> Tensor:
    # The peer's loss is half of nn.MSELoss.
    return GradientFlow(request["train"], request["y"], loss="mse", rate=0.5).at(request["times"], request["test"]).mean


def plain_ntk(model: nn.Module, x: Tensor) -> Tensor:
    """The mean over outputs of the empirical NTK as one would write it with torch.func: whole Jacobians, contracted."""
    state = {name: value.detach() for name, value in model.named_parameters()}
    jacobian = vmap(jacrev(lambda p, one: functional_call(model, p, (one[None],))[0]), (None, 0))(state, x)
    return sum(torch.einsum("aip,bip->ab", each.flatten(2), each.flatten(2)) for each in jacobian.values()) / 10


def finite_networks() -> list[tuple[str, nn.Module, Tensor]]:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    conv = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
    conv.extend([nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)])
    return [
        ("784-512-512-10, 48 inputs", dense, torch.randn(48, 784)),
        ("three convolutions, 10 outputs, 32 images of 32 x 32", conv, torch.randn(32, 3, 32, 32)),
    ]


def clock(run: Callable[[], object]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return seconds


def pairs() -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    known = cases()
    inputs = [torch.randn(case.shape, dtype=torch.float64, generator=generator) for case in known]
    requests: list[dict[str, Any]] = [
        {"kind": "kernel", "network": case.peer, "x": x, "rounds": case.rounds} for case, x in zip(known, inputs)
    ]
    requests.append(flow_request())
    runs: list[tuple[str, Callable[[], Any]]] = [
        (case.title, lambda case=case, x=x: case.network(x)) for case, x in zip(known, inputs)
    ]
    runs.append(("gradient flow, 500 inputs, 20 times", lambda: [flow(requests[-1])]))
    found = []
    for (title, run), answer in zip(runs, neural_tangents(requests)):
        for ours, theirs in zip(run(), [answer[key] for key in ("nngp", "ntk", "mean") if key in answer]):
            worst = ((ours - theirs).abs().max() / theirs.abs().max()).item()
            if not worst < 1e-6:
                raise AssertionError(f"{title}: we and neural-tangents differ by {worst:.1e}")
        seconds = float(answer["seconds"])
        found.append(
            Pair(
                title,
                clock(run),
                lambda seconds=seconds: seconds,
                "neural-tangents 0.6.5",
                target=1.0,
                tolerance=None,
                timed=False,
            )
        )
    for title, model, x in finite_networks():
        found.append(
            Pair(
                f"empirical NTK, {title}",
                lambda model=model, x=x: empirical_ntk(model, x),
                lambda model=model, x=x: plain_ntk(model, x),
                "Jacobians of torch.func, contracted",
                target=1.0,
                tolerance=1e-4,
            )
        )
    return found
