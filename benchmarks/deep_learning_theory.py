"""Kernels and NTKs of a thousand inputs against neural-tangents, and a finite-width tensor against adaptive cubature.

neural-tangents is archived and needs an old JAX: it lives in an environment of its own, and its times are taken there.

    python -m venv ENV && ENV/bin/pip install jax==0.4.28 jaxlib==0.4.28 "numpy<2" "scipy<1.13" neural-tangents==0.6.5
    LATHE_NEURAL_TANGENTS_PYTHON=ENV/bin/python python benchmarks/harness.py deep_learning_theory
"""

from __future__ import annotations

import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from harness import Pair, PeerMissing
from scipy.integrate import cubature
from torch import Tensor

from lathe.theory.deep_learning_theory import finite_width, first_kernel, ntk_recursion

INTERPRETER = "LATHE_NEURAL_TANGENTS_PYTHON"
INPUTS, FEATURES, DEPTH = 1000, 64, 10
#: Activation, its name in stax, (C_b, C_W), and the peer's time over ours that we want.
CASES = [
    ("relu", "Relu()", 0.1, 1.8, 1.0),
    ("erf", "Erf()", 0.1, 1.2, 1.0),
    ("gelu", "Gelu(approximate=False)", 0.1, 1.8, 1.0),
    ("sin", "Sin()", 0.1, 1.2, 1.0),
]
#: Run by the other interpreter: arguments are the inputs' file, the answers' file, the layer, C_b, C_W, the depth.
PEER = """
import os, sys, time
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")
import numpy as np
from neural_tangents import stax
source, target, layer, C_b, C_W, depth = sys.argv[1:]
x = np.load(source)
dense = lambda: stax.Dense(1, W_std=float(C_W) ** 0.5, b_std=float(C_b) ** 0.5, parameterization="ntk")
layers = [part for _ in range(int(depth) - 1) for part in (dense(), eval("stax." + layer))] + [dense()]
kernel_fn = jax.jit(stax.serial(*layers)[2], static_argnums=(2,))
run = lambda: jax.block_until_ready(kernel_fn(x, None, ("nngp", "ntk")))
answer, seconds = run(), []
for _ in range(7):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
np.savez(target, K=answer.nngp, theta=answer.ntk, seconds=sorted(seconds)[3])
"""


def neural_tangents(x: Tensor, layer: str, C_b: float, C_W: float, depth: int = DEPTH) -> tuple[Tensor, Tensor, float]:
    """`(K, Theta)` of the last layer and the median seconds that they took, on two threads in another process."""
    interpreter = os.environ.get(INTERPRETER)
    if not interpreter or not Path(interpreter).exists():
        raise PeerMissing(f"neural-tangents==0.6.5 in an environment of its own, its python named by {INTERPRETER}")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "x.npy", Path(folder) / "answer.npz"
        np.save(source, x.numpy())
        flags = f"--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={torch.get_num_threads()}"
        subprocess.run(
            [interpreter, "-c", PEER, str(source), str(target), layer, str(C_b), str(C_W), str(depth)],
            check=True,
            capture_output=True,
            env={**os.environ, "XLA_FLAGS": flags},
        )
        with np.load(target) as answer:
            return torch.tensor(answer["K"]), torch.tensor(answer["theta"]), float(answer["seconds"])


def ours(x: Tensor, name: str, C_b: float, C_W: float) -> Callable[[], tuple[Tensor, Tensor]]:
    # The peer's "ntk" parameterisation gives biases and weights the rates C_b and C_W.
    return lambda: ntk_recursion(x, DEPTH, name, C_b, C_W, C_b, C_W, layers=[DEPTH])


def cubature_of_products(K: np.ndarray, indices: tuple[int, ...], rtol: float) -> float:
    """`<s_i s_j ...>` for s = tanh, over the inputs concerned, each once, to a relative error of `rtol`."""
    inputs = sorted(set(indices))
    root = np.linalg.cholesky(K[np.ix_(inputs, inputs)])
    powers = [indices.count(each) for each in inputs]

    def weighted(u: np.ndarray) -> np.ndarray:
        density = np.exp(-0.5 * (u * u).sum(-1)) / (2 * np.pi) ** (len(inputs) / 2)
        return np.prod(np.tanh(u @ root.T) ** powers, axis=-1) * density

    reach = np.full(len(inputs), 8.0)
    return float(cubature(weighted, -reach, reach, rtol=rtol, atol=1e-9).estimate)


def four_point() -> Pair:
    """The order-1/n tensor V of a second layer; ntkunlimited, which is on no package index, integrates it like this."""
    n, C_b, C_W = 3, 0.1, 1.4
    x = torch.randn(n, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def ours() -> Tensor:
        return finite_width(x, [16, 64, 64], "tanh", C_b, C_W, tensors=["V"])["V"][-1]

    def peer() -> Tensor:
        K = first_kernel(x, C_b, C_W).numpy()
        two = {
            pair: cubature_of_products(K, pair, 1e-7) for pair in itertools.combinations_with_replacement(range(n), 2)
        }
        four = {
            each: cubature_of_products(K, each, 1e-6) for each in itertools.combinations_with_replacement(range(n), 4)
        }
        V = torch.empty(n, n, n, n, dtype=torch.float64)
        for i, j, k, l in itertools.product(range(n), repeat=4):
            apart = two[min(i, j), max(i, j)] * two[min(k, l), max(k, l)]
            a, b, c, d = sorted((i, j, k, l))
            V[i, j, k, l] = C_W**2 * (four[a, b, c, d] - apart)
        return V

    title = "V of a second layer, tanh, 3 inputs"
    return Pair(title, ours, peer, "adaptive cubature, entry by entry (scipy)", target=100.0, tolerance=1e-4)


def pairs() -> list[Pair]:
    x = torch.randn(INPUTS, FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = [four_point()]
    for name, layer, C_b, C_W, target in CASES:
        mine = ours(x, name, C_b, C_W)
        K, theta, seconds = neural_tangents(x, layer, C_b, C_W)
        for ours_, theirs in zip(mine(), (K, theta)):
            worst = ((ours_[0] - theirs).abs().max() / theirs.abs().max()).item()
            if not worst < 1e-6:
                raise AssertionError(f"{name}: we and neural-tangents differ by {worst:.1e}")

        def clock(mine: Callable[[], object] = mine) -> float:
            start = time.perf_counter()
            mine()
            return time.perf_counter() - start

        found.append(
            Pair(
                f"K and NTK, {name}, {INPUTS} inputs, depth {DEPTH}",
                clock,
                lambda seconds=seconds: seconds,
                "neural-tangents 0.6.5",
                target=target,
                tolerance=None,
                timed=False,
            )
        )
    return found
