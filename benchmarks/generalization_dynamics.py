"""Learning curves at a hundred times against neural-tangents, a loop of gradient descent, and scikit-learn's ridge.

neural-tangents is archived and needs an old JAX: it lives in an environment of its own, and its times are taken there.

    python -m venv ENV && ENV/bin/pip install jax==0.4.28 jaxlib==0.4.28 "numpy<2" "scipy<1.13" neural-tangents==0.6.5
    LATHE_NEURAL_TANGENTS_PYTHON=ENV/bin/python python benchmarks/harness.py generalization_dynamics
"""

from __future__ import annotations

import math
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import Pair, PeerMissing
from sklearn.linear_model import Ridge
from torch import Tensor

from lathe.theory.generalization_dynamics import LinearTheory, gradient_descent, gradient_flow, ridge_regression

INTERPRETER = "LATHE_NEURAL_TANGENTS_PYTHON"
SAMPLES, TESTS, TIMES, STEPS = 2000, 500, 100, 10_000
#: Features of the students that neural-tangents trains too.
FEATURES = (500, 1000)
#: Run by the other interpreter: from the features to the predictions at all times, as ours is. Arguments are files.
PEER = """
import sys, time
import jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
import numpy as np
import neural_tangents as nt
source, target = sys.argv[1:]
data = np.load(source)
train, test, y, times = (jnp.asarray(data[name]) for name in ("train", "test", "y", "times"))
nothing = jnp.zeros((len(train), 1)), jnp.zeros((len(test), 1))
def run():
    predict = nt.predict.gradient_descent_mse(train @ train.T, y, diag_reg=0.0)
    return jax.block_until_ready(predict(times * len(train), *nothing, test @ train.T))
answer, seconds = run(), []
for _ in range(5):
    start = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - start)
np.savez(target, train=answer[0], test=answer[1], seconds=sorted(seconds)[2])
"""


def problem(samples: int, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features of training and test samples, and targets of one output, of a noisy linear teacher."""
    rng = torch.Generator().manual_seed(0)
    phi = torch.randn(samples + TESTS, features, dtype=torch.float64, generator=rng) / math.sqrt(features)
    w = torch.randn(features, 1, dtype=torch.float64, generator=rng)
    noise = 0.7 * torch.randn(samples, 1, dtype=torch.float64, generator=rng)
    return phi[:samples], phi[samples:], phi[:samples] @ w + noise


def neural_tangents(train: Tensor, test: Tensor, y: Tensor, times: Tensor) -> tuple[Tensor, Tensor, float]:
    """Predictions (times, samples, 1) on both sets and the median seconds, on as many threads, in another process."""
    interpreter = os.environ.get(INTERPRETER)
    if not interpreter or not Path(interpreter).exists():
        raise PeerMissing(f"neural-tangents==0.6.5 in an environment of its own, its python named by {INTERPRETER}")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "data.npz", Path(folder) / "answer.npz"
        np.savez(source, train=train.numpy(), test=test.numpy(), y=y.numpy(), times=times.numpy())
        flags = f"--xla_cpu_multi_thread_eigen=true intra_op_parallelism_threads={torch.get_num_threads()}"
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(torch.get_num_threads()))
        command = [interpreter, "-c", PEER, str(source), str(target)]
        environment = {**os.environ, **threads, "XLA_FLAGS": flags}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        with np.load(target) as answer:
            return torch.tensor(answer["train"]), torch.tensor(answer["test"]), float(answer["seconds"])


def against_neural_tangents(features: int) -> Pair:
    train, test, y = problem(SAMPLES, features)
    times = torch.logspace(-2, 3, TIMES, dtype=torch.float64)

    def ours() -> tuple[Tensor, Tensor]:
        run = gradient_flow(train, y, times=times)
        return run.predict(train), run.predict(test)

    *theirs, seconds = neural_tangents(train, test, y, times)
    for mine, other in zip(ours(), theirs):
        worst = ((mine - other).abs().max() / other.abs().max()).item()
        if not worst < 1e-6:
            raise AssertionError(f"{features} features: we and neural-tangents differ by {worst:.1e}")

    def clock() -> float:
        start = time.perf_counter()
        ours()
        return time.perf_counter() - start

    title = f"predictions at {TIMES} times, {SAMPLES} samples, {features} features"
    peer = "neural-tangents 0.6.5, gradient_descent_mse"
    return Pair(title, clock, lambda: seconds, peer, target=3.0, tolerance=None, timed=False)


def against_a_loop() -> Pair:
    train, test, y = problem(1000, 200)
    steps, lr = torch.linspace(0, STEPS, TIMES).round().long(), 0.1
    marks = set(steps.tolist())

    def ours() -> tuple[Tensor, Tensor]:
        run = gradient_descent(train, y, steps=steps, lr=lr)
        return run.weights, run.predict(test)

    def peer() -> tuple[Tensor, Tensor]:
        w, seen = torch.zeros(train.shape[1], 1, dtype=torch.float64), []
        for step in range(STEPS + 1):
            if step in marks:
                seen.append(w.clone())
            w -= lr * (train.T @ (train @ w - y))
        weights = torch.stack(seen)
        return weights, test @ weights

    title = f"weights and test predictions at {TIMES} of {STEPS} steps, 1000 samples, 200 features"
    return Pair(title, ours, peer, "gradient descent, step by step", target=100.0, tolerance=1e-8)


def against_ridge() -> Pair:
    train, test, y = problem(SAMPLES, 500)
    gammas = torch.logspace(-3, 2, TIMES, dtype=torch.float64)
    x, x_test, target = train.numpy(), test.numpy(), y.numpy()

    def ours() -> Tensor:
        return ridge_regression(train, y, gammas=gammas).predict(test)

    def peer() -> np.ndarray:
        # The fastest of its solvers here.
        fits = (Ridge(alpha=g, fit_intercept=False, solver="cholesky").fit(x, target) for g in gammas.tolist())
        return np.stack([fit.predict(x_test).reshape(-1, 1) for fit in fits])

    title = f"ridge path of {TIMES} strengths, {SAMPLES} samples, 500 features"
    return Pair(title, ours, peer, "scikit-learn Ridge", target=1.0, tolerance=1e-8)


def curves() -> Pair:
    """The quadrature itself, against the second that ten thousand curves may take."""
    theory = LinearTheory(torch.linspace(0.1, 5, 10_000, dtype=torch.float64), snr=2.0)
    times = torch.logspace(-2, 4, TIMES, dtype=torch.float64)

    def clock() -> float:
        start = time.perf_counter()
        theory.test_error(times)
        return time.perf_counter() - start

    title = f"10 000 exact test-error curves of {TIMES} times, every alpha its own"
    return Pair(title, clock, lambda: 1.0, "the budget of one second", target=1.0, tolerance=None, timed=False)


def pairs() -> list[Pair]:
    return [against_a_loop(), against_ridge(), curves(), *(against_neural_tangents(count) for count in FEATURES)]
