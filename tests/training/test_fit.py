# ruff: noqa: NPY002  (a Dataset draws from the global random numbers, and so does its test)
"""The loop against closed forms, against itself interrupted anywhere, and against broken disks, files and losses."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import resource
import signal
import socket
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lathe.training import (
    CheckpointError,
    EarlyStop,
    Progress,
    TrainingDiverged,
    accuracy,
    cosine,
    evaluate,
    fit,
    one_cycle,
)

sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
adam = partial(torch.optim.AdamW, lr=1e-2)


class Stop(Exception):
    """Thrown by a progress callback, as an interruption would be."""


def stop_at(step: int):
    def progress(done: Progress) -> None:
        if done.step == step:
            raise Stop

    return progress


def blobs(count: int = 70, seed: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=rng)
    return torch.randn(count, 6, generator=rng) + 2 * F.one_hot(labels, 6).float(), labels


def network(seed: int = 1, dropout: float = 0.5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 4))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def noisy(inputs: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)


# What a step does


def test_full_batch_descent_is_the_recursion_in_closed_form(rng):
    x = torch.randn(40, 3, generator=rng, dtype=torch.float64)
    y = torch.randn(40, 2, generator=rng, dtype=torch.float64)
    model = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    start = model.weight.detach().numpy().copy()
    history = fit(model, (x, y), loss=F.mse_loss, optimizer=partial(torch.optim.SGD, lr=0.2), steps=30, batch_size=40)
    # W - W* shrinks by (I - lr H) a step, where H is the Hessian of the quadratic.
    gram, cross = x.numpy().T @ x.numpy() / 40, y.numpy().T @ x.numpy() / 40
    best = cross @ np.linalg.inv(gram)
    expected = best + (start - best) @ np.linalg.matrix_power(np.eye(3) - 0.2 * gram, 30)
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, atol=1e-12)
    assert history.loss[0] == pytest.approx(((x.numpy() @ start.T - y.numpy()) ** 2).mean(), abs=1e-12)


@pytest.mark.parametrize("batch_size, accumulate", [(10, 4), (7, 6), (3, 14)])
def test_accumulated_batches_are_one_large_batch(rng, batch_size, accumulate):
    x, y = torch.randn(40, 3, generator=rng).double(), torch.randn(40, 2, generator=rng).double()
    results = []
    for size, parts in [(40, 1), (batch_size, accumulate)]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2, dtype=torch.float64)
        fit(model, (x, y), loss=F.mse_loss, optimizer=adam, epochs=5, batch_size=size, accumulate=parts)
        results.append(weights(model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-12, rtol=0)


@given(count=st.integers(1, 30), batch_size=st.integers(1, 12), accumulate=st.integers(1, 4), epochs=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_every_epoch_shows_every_sample_once_in_a_new_order(count, batch_size, accumulate, epochs):
    seen = []
    model = nn.Linear(1, 1)

    def loss(output: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        seen.extend(number.tolist())
        return (output**2).mean()

    history = fit(
        model,
        (torch.zeros(count, 1), torch.arange(count)),
        loss=loss,
        optimizer=sgd,
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
    )
    shown = [seen[start : start + count] for start in range(0, len(seen), count)]
    assert len(shown) == epochs and all(sorted(order) == list(range(count)) for order in shown)
    assert history.steps == epochs * math.ceil(math.ceil(count / batch_size) / accumulate)
    if count > 12 and epochs > 1:
        assert shown[0] != shown[1]


def test_a_gradient_is_clipped_to_its_norm():
    model = nn.Linear(6, 4)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    fit(model, blobs(), loss=F.cross_entropy, optimizer=partial(torch.optim.SGD, lr=1.0), steps=1, clip_norm=0.01)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        (cosine(), lambda k: 0.1 * (1 + math.cos(math.pi * k / 20)) / 2),
        (cosine(warmup=0.25, final=0.1), lambda k: 0.1 * ((k + 1) / 5 if k < 5 else _half_wave((k - 5) / 15))),
        (one_cycle(0.3), None),
    ],
)
def test_the_schedule_moves_once_a_step(schedule, expected):
    model = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rates = []
    optimizer.register_step_pre_hook(lambda used, *_: rates.append(used.param_groups[0]["lr"]))
    fit(model, blobs(), loss=F.cross_entropy, optimizer=optimizer, schedule=schedule, steps=20, batch_size=10)
    assert len(rates) == 20
    if expected is None:
        assert max(rates) == pytest.approx(0.3, rel=0.02) and rates[0] == pytest.approx(0.3 / 25) and rates[-1] < 1e-3
    else:
        assert rates == pytest.approx([expected(k) for k in range(20)])


def _half_wave(done: float) -> float:
    return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2


def test_bf16_computes_in_halves_and_learns_in_floats():
    model, kinds = network(dropout=0.0), set()
    model[0].register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        kinds.add(("loss", output.dtype))
        return F.cross_entropy(output, target)

    fit(model, blobs(), loss=loss, optimizer=sgd, epochs=1, batch_size=35, precision="bf16")
    assert kinds == {torch.bfloat16, ("loss", torch.float32)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert "forward" not in vars(model) and not hasattr(model, "_is_accelerate_prepared")


def test_it_learns_and_leaves_the_network_in_eval_mode_and_the_callers_random_numbers_alone():
    model, data = network(dropout=0.1), blobs(400)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    history = fit(
        model,
        data,
        loss=F.cross_entropy,
        optimizer=sgd,
        schedule=one_cycle(0.1),
        epochs=10,
        batch_size=20,
        validation=blobs(200, seed=4),
        metrics={"accuracy": accuracy},
    )
    assert not model.training and history.metrics["accuracy"][-1] > 0.7 and len(history.metrics["loss"]) == 10
    assert history.validated_at == list(range(20, 201, 20)) and history.steps == 200 and history.seconds > 0
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[2]).all()
    if os.environ.get("LATHE_SHAPE_CHECKS", "1") == "0":  # the checks draw from Python's random numbers themselves
        assert random.getstate() == states[1]
    assert evaluate(model, blobs(200, seed=4), {"accuracy": accuracy}) == {
        "accuracy": pytest.approx(history.metrics["accuracy"][-1])
    }


def test_the_seed_decides_and_nothing_else():
    results = []
    for seed, noise in [(0, 1), (0, 2), (5, 1)]:
        model = network()
        torch.manual_seed(noise)
        fit(model, blobs(), loss=F.cross_entropy, optimizer=sgd, epochs=2, batch_size=8, augment=noisy, seed=seed)
        results.append(weights(model))
    assert same(results[0], results[1]) and not same(results[0], results[2])


@given(count=st.integers(1, 50), batch_size=st.integers(1, 60))
@settings(max_examples=20, deadline=None)
def test_metrics_are_means_over_samples_whatever_the_batches(count, batch_size):
    x, y = blobs(count)
    model = network().eval()
    expected = np.mean(model(x).argmax(1).numpy() == y.numpy())
    model.train()
    assert evaluate(model, (x, y), {"share": accuracy}, batch_size=batch_size)["share"] == pytest.approx(expected)
    assert model.training


def test_the_callback_hears_of_every_step():
    told = []
    fit(
        network(),
        blobs(),
        loss=F.cross_entropy,
        optimizer=sgd,
        epochs=2,
        batch_size=35,
        validation=blobs(),
        progress=told.append,
    )
    assert [(t.step, t.total, t.epoch) for t in told] == [(1, 4, 0), (2, 4, 1), (3, 4, 1), (4, 4, 2)]
    assert "loss" not in told[0].metrics and told[1].metrics["loss"] > 0 and all(t.loss > 0 for t in told)


@pytest.mark.timed  # the shape checks take longer than the loop
@pytest.mark.compile  # for the session without the checks; nothing is compiled
def test_a_small_network_pays_less_than_a_third_of_a_millisecond_a_step():
    x, y = blobs(1000)

    def by_hand() -> None:
        model = nn.Linear(6, 4)
        optimizer = sgd(model.parameters())
        for _ in range(20):
            for chosen in torch.randperm(1000).split(100):
                loss = F.cross_entropy(model(x[chosen]), y[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()

    def ours() -> None:
        fit(nn.Linear(6, 4), (x, y), loss=F.cross_entropy, optimizer=sgd, steps=200, batch_size=100)

    best = {by_hand: math.inf, ours: math.inf}
    for _ in range(5):
        for run in best:
            began = time.perf_counter()
            run()
            best[run] = min(best[run], (time.perf_counter() - began) / 200)
    assert best[ours] - best[by_hand] < 0.3e-3


# Interrupted and resumed


class Jittered(Dataset):
    """Draws from the global random numbers of torch, NumPy and Python for every sample."""

    def __init__(self) -> None:
        self.inputs, self.labels = blobs()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        jitter = random.gauss(0, 0.1) + np.random.normal(0, 0.1)
        return self.inputs[index] + jitter + 0.1 * torch.randn(6), self.labels[index]


class Streamed(IterableDataset):
    def __iter__(self):
        return iter(Jittered()[index] for index in torch.randperm(70).tolist())


def sources():
    return {
        "tensors": blobs,
        "dataset": Jittered,
        "loader": lambda: DataLoader(Jittered(), batch_size=8, shuffle=True),
        "loader with its own generator": lambda: DataLoader(
            TensorDataset(*blobs()), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(9)
        ),
        "stream": Streamed,
    }


@pytest.mark.parametrize("kind", sources())
@pytest.mark.parametrize("stop, every", [(2, 1), (5, 5), (8, 3), (15, None)])
def test_a_resumed_run_ends_with_the_very_same_weights(tmp_path, kind, stop, every):
    streamed = kind == "stream"
    arguments = {
        "loss": F.cross_entropy,
        "optimizer": adam,
        "schedule": cosine(warmup=0.2),
        "steps": 17,
        "batch_size": None if "loader" in kind else 8,
        "accumulate": 2,
        "augment": noisy,
        "validation": blobs(30, seed=8),
        "metrics": {"accuracy": accuracy},
        "validate_every": 4,
        "clip_norm": 1.0,
        "seed": 11,
    }
    if streamed and every is None:
        pytest.skip("a stream of unknown length ends no epoch")
    whole = network()
    expected = fit(whole, sources()[kind](), **arguments)

    broken = network()
    with pytest.raises(Stop):
        fit(
            broken,
            sources()[kind](),
            **arguments,
            checkpoint=tmp_path,
            checkpoint_every=every,
            progress=stop_at(stop),
        )
    resumed = network(seed=99)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    first = []
    history = fit(
        resumed,
        sources()[kind](),
        **arguments,
        checkpoint=tmp_path,
        checkpoint_every=every,
        progress=lambda done: first.append(done.step),
    )
    assert same(weights(resumed), weights(whole))
    assert history.loss == expected.loss and history.metrics == expected.metrics
    assert first[0] > 1, "it did not resume"
    again = fit(network(seed=7), sources()[kind](), **arguments, checkpoint=tmp_path)
    assert again.loss == expected.loss


@given(
    stop=st.integers(1, 14), every=st.integers(1, 9), batch=st.sampled_from([4, 9, 20]), accumulate=st.integers(1, 3)
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_resumes_from_anywhere(tmp_path_factory, stop, every, batch, accumulate):
    folder = tmp_path_factory.mktemp("run")
    arguments = {
        "loss": F.cross_entropy,
        "optimizer": sgd,
        "steps": 15,
        "batch_size": batch,
        "accumulate": accumulate,
        "augment": noisy,
    }
    whole, resumed = network(), network()
    fit(whole, blobs(), **arguments)
    with pytest.raises(Stop):
        fit(network(), blobs(), **arguments, checkpoint=folder, checkpoint_every=every, progress=stop_at(stop))
    fit(resumed, blobs(), **arguments, checkpoint=folder, checkpoint_every=every)
    assert same(weights(resumed), weights(whole))


def test_more_steps_go_on_where_the_run_ended(tmp_path):
    arguments = {"loss": F.cross_entropy, "optimizer": sgd, "batch_size": 8}
    whole, parts = network(), network()
    fit(whole, blobs(), epochs=4, **arguments)
    fit(parts, blobs(), epochs=2, **arguments, checkpoint=tmp_path)
    fit(parts, blobs(), epochs=4, **arguments, checkpoint=tmp_path)
    assert same(weights(whole), weights(parts))


def test_a_crash_at_any_moment_of_writing_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    arguments = {"loss": F.cross_entropy, "optimizer": sgd, "steps": 6, "batch_size": 20, "checkpoint_every": 1}
    whole = network()
    fit(whole, blobs(), **arguments)
    replace, calls = os.replace, 0

    def counting(source, target):
        nonlocal calls
        calls += 1
        if calls == crash:
            raise Stop
        replace(source, target)

    for crash in range(1, 10):  # three files a checkpoint, three checkpoints
        folder, calls = tmp_path / str(crash), 0
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", counting)
            patched.setattr("lathe.training._checkpoints.Checkpoints._sweep", lambda self: None)  # killed: no sweeping
            with pytest.raises(Stop):
                fit(network(), blobs(), **arguments, checkpoint=folder)
        resumed = network(seed=50) if crash > 3 else network()
        fit(resumed, blobs(), **arguments, checkpoint=folder)
        assert same(weights(resumed), weights(whole))
        assert len(list(folder.iterdir())) == 3, "pieces of the crash are left"


def test_early_stop_leaves_the_best_weights_and_survives_an_interruption(tmp_path):
    scores = [0.1, 0.5, 0.4, 0.45, 0.3, 0.9, 0.95]

    def run(folder, progress=None):
        model, kept = network(), []

        def score(output: torch.Tensor, target: torch.Tensor) -> float:
            kept.append(weights(model))
            return scores[validations + len(kept) - 1]

        history = fit(
            model,
            blobs(),
            loss=F.cross_entropy,
            optimizer=sgd,
            epochs=7,
            batch_size=10,
            validation=blobs(),
            metrics={"score": score},
            early_stop=EarlyStop("score", patience=3, mode="max"),
            checkpoint=folder,
            progress=progress,
        )
        return model, history, kept

    validations = 0
    model, history, kept = run(None)
    assert history.stopped_early and history.metrics["score"] == scores[:5] and history.steps == 35
    assert same(weights(model), kept[1])
    with pytest.raises(Stop):
        run(tmp_path, stop_at(22))
    validations = 3
    resumed, history, _ = run(tmp_path)
    assert history.metrics["score"] == scores[:5] and same(weights(resumed), weights(model))
    finished, history, later = run(tmp_path)
    assert not later and history.stopped_early and same(weights(finished), weights(model))


# What a checkpoint holds


class Odd(nn.Module):
    """Tied, complex, transposed, empty and half-precision tensors, and state that is none."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.turned = nn.Parameter(torch.randn(4, 6).t())
        self.waves = nn.Parameter(torch.randn(6, dtype=torch.complex64))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("brief", torch.randn(3).bfloat16())
        self.register_buffer("view", torch.arange(10.0)[2:5])
        self.register_buffer("flag", torch.tensor(True))
        self.note = {"scale": scale}

    def get_extra_state(self):
        return self.note

    def set_extra_state(self, state) -> None:
        self.note = state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.tied(self.first(x)) * self.waves.abs()) @ self.turned


def test_tied_and_odd_tensors_come_back(tmp_path):
    torch.manual_seed(0)
    model = Odd(scale=2.0)
    arguments = {"loss": F.cross_entropy, "optimizer": adam, "epochs": 1, "checkpoint": tmp_path}
    fit(model, blobs(), **arguments)
    other = Odd()
    fit(other, blobs(), **arguments)
    assert other.note == {"scale": 2.0} and other.first.weight is other.tied.weight
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other.state_dict()[name]) and value.dtype == other.state_dict()[name].dtype


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    fit(network(), blobs(), loss=F.cross_entropy, optimizer=adam, epochs=1, checkpoint=tmp_path / "run")
    return tmp_path / "run"


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.unlink()
    if how != "missing":
        path.write_bytes({"flipped": content, "short": content[:-7], "empty": b"", "noise": os.urandom(300)}[how])


@pytest.mark.parametrize("how", ["flipped", "short", "empty", "noise", "missing"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".json"])
def test_a_damaged_checkpoint_is_one_error_that_names_the_file(checkpoint, suffix, how):
    path = next(checkpoint.glob(f"*{suffix}"))
    damage(path, how)
    arguments = {"loss": F.cross_entropy, "optimizer": adam, "epochs": 2, "checkpoint": checkpoint}
    if suffix == ".json" and how == "missing":
        return  # no manifest, no checkpoint: the run starts anew, as the next test shows for resume=False
    # A manifest that is damaged yet readable shows by the files that it names.
    named = r"checkpoint file .*\.(json|pt|safetensors) cannot be used" if suffix == ".json" else path.name
    with pytest.raises(CheckpointError, match=named) as raised:
        fit(network(), blobs(), **arguments)
    assert "\n" not in str(raised.value)
    assert fit(network(), blobs(), **arguments, resume=False).steps == 2


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_nothing_in_a_checkpoint_is_run(checkpoint, tmp_path, monkeypatch):
    import hashlib

    monkeypatch.chdir(tmp_path)
    path = next(checkpoint.glob("*.pt"))
    torch.save({"step": Trap(), "states": {}}, path)
    manifest = json.loads((checkpoint / "checkpoint.json").read_text())
    manifest["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=path.name):
        fit(network(), blobs(), loss=F.cross_entropy, optimizer=adam, epochs=2, checkpoint=checkpoint)
    path.write_bytes(pickle.dumps(Trap()))
    manifest["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (checkpoint / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=path.name):
        fit(network(), blobs(), loss=F.cross_entropy, optimizer=adam, epochs=2, checkpoint=checkpoint)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["../other.pt", "/etc/passwd.pt"])
def test_a_manifest_leads_nowhere_else(checkpoint, name):
    (checkpoint / "checkpoint.json").write_text(json.dumps({"format": 1, "step": 1, "files": {name: "0" * 64}}))
    with pytest.raises(CheckpointError, match=r"checkpoint\.json"):
        fit(network(), blobs(), loss=F.cross_entropy, optimizer=adam, epochs=2, checkpoint=checkpoint)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"batch_size": 7}, "batches an epoch 1, not 10"),
        ({"accumulate": 2}, "accumulate 1, not 2"),
        ({"precision": "bf16"}, "precision no, not bf16"),
        ({"optimizer": sgd}, r"optimizer AdamW\(.*, not SGD\("),
        ({"optimizer": partial(torch.optim.AdamW, lr=0.5)}, r"'lr': 0.01.*, not .*'lr': 0.5"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(checkpoint, change, says):
    arguments = {"loss": F.cross_entropy, "optimizer": adam, "epochs": 2, "checkpoint": checkpoint} | change
    with pytest.raises(CheckpointError, match=says):
        fit(network(), blobs(), **arguments)


def test_a_checkpoint_of_another_network_is_refused(checkpoint):
    with pytest.raises(CheckpointError, match=r"another network.*size mismatch"):
        fit(
            nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(), nn.Linear(9, 4)),
            blobs(),
            loss=F.cross_entropy,
            optimizer=adam,
            epochs=2,
            checkpoint=checkpoint,
        )


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    steps = []
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/lathe")):
        with pytest.raises(CheckpointError, match=f"{folder} cannot be written to"):
            fit(
                network(),
                blobs(),
                loss=F.cross_entropy,
                optimizer=sgd,
                steps=2,
                checkpoint=folder,
                progress=steps.append,
            )
    assert not steps


def test_a_full_disk_is_told_and_costs_nothing(tmp_path):
    arguments = {
        "loss": F.cross_entropy,
        "optimizer": sgd,
        "batch_size": 20,
        "checkpoint": tmp_path,
        "checkpoint_every": 1,
    }
    model = network()
    fit(model, blobs(), steps=2, **arguments)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
        with pytest.raises(
            CheckpointError, match=r"step 3 could not be written.*the checkpoint before it is untouched"
        ):
            fit(model, blobs(), steps=5, **arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    whole = network()
    fit(whole, blobs(), steps=5, loss=F.cross_entropy, optimizer=sgd, batch_size=20)
    fit(model, blobs(), steps=5, **arguments)
    assert same(weights(model), weights(whole))


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    others = ["model-00001-of-00002.safetensors", "training-notes.pt", "best.safetensors", "model-last.safetensors"]
    for name in others:
        (tmp_path / name).write_text("mine")
    fit(network(), blobs(), loss=F.cross_entropy, optimizer=sgd, epochs=3, checkpoint=tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in others)
    assert len(list(tmp_path.iterdir())) == len(others) + 3


# What goes wrong in training


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_of_no_number_stops_before_it_touches_the_weights(tmp_path, value):
    calls, model = [], network()

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        calls.append(weights(model))
        return F.cross_entropy(output, target) * (value if len(calls) == 5 else 1.0)

    arguments = {"optimizer": sgd, "steps": 9, "batch_size": 20, "checkpoint": tmp_path, "checkpoint_every": 2}
    with pytest.raises(TrainingDiverged, match=r"at step 5; the checkpoint of step 4 is kept") as raised:
        fit(model, blobs(), loss=loss, **arguments)
    assert raised.value.step == 5
    learnt = {name: value for name, value in weights(model).items() if "running" not in name and "num" not in name}
    assert all(torch.equal(value, calls[4][name]) for name, value in learnt.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    resumed, whole = network(), network()
    fit(resumed, blobs(), loss=F.cross_entropy, **arguments)
    fit(whole, blobs(), loss=F.cross_entropy, optimizer=sgd, steps=9, batch_size=20)
    assert same(weights(resumed), weights(whole))


def test_weights_of_no_number_never_become_a_checkpoint(tmp_path):
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output * 0).abs().sqrt().mean()  # zero, with an infinite slope

    with pytest.raises(TrainingDiverged, match=r"(weight|bias) is not finite after step 1"):
        fit(nn.Linear(6, 4), blobs(), loss=loss, optimizer=sgd, steps=4, checkpoint=tmp_path, checkpoint_every=1)
    assert not (tmp_path / "checkpoint.json").exists()


@pytest.mark.parametrize(
    "change, error",
    [
        ({"epochs": None}, "epochs or steps"),
        ({"steps": 3}, "epochs or steps"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"epochs": True}, "epochs must be a whole number"),
        ({"epochs": None, "steps": -1}, "steps must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"accumulate": 0}, "accumulate must be"),
        ({"checkpoint_every": 0}, "checkpoint_every must be"),
        ({"clip_norm": -1.0}, "clip_norm must be a positive number"),
        ({"metrics": {"accuracy": accuracy}}, "need validation data"),
        ({"early_stop": EarlyStop()}, "need validation data"),
        ({"validation": blobs(), "early_stop": EarlyStop("f1")}, "early_stop.metric must be one of"),
        ({"validation": blobs(), "metrics": {"loss": accuracy}}, "must not use the name 'loss'"),
        ({"device": "tpu9"}, "device must be one of this machine"),
        ({"device": "meta:7x"}, "device must be one of this machine"),
        ({"optimizer": partial(torch.optim.LBFGS, lr=1.0)}, "got LBFGS"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)}, "parameters of model"),
        ({"loss": partial(F.cross_entropy, reduction="none")}, "tensor of one number"),
    ],
)
def test_bad_arguments_are_told(change, error):
    arguments = {"loss": F.cross_entropy, "optimizer": sgd, "epochs": 1} | change
    with pytest.raises(ValueError, match=error):
        fit(network(), blobs(), **arguments)


@pytest.mark.parametrize(
    "data, error",
    [
        ((torch.zeros(3, 6), torch.zeros(4)), r"one length.*\[3, 4\]"),
        ((torch.zeros(0, 6), torch.zeros(0)), "at least 1"),
        ((), "at least one tensor"),
        ((torch.tensor(1.0),), "scalar"),
        (Streamed(), "give steps"),
    ],
)
def test_bad_data_are_told(data, error):
    with pytest.raises(ValueError, match=error):
        fit(network(), data, loss=F.cross_entropy, optimizer=sgd, epochs=1)


def test_a_loader_has_its_own_batch_size():
    with pytest.raises(ValueError, match="leave batch_size out"):
        fit(network(), DataLoader(Jittered()), loss=F.cross_entropy, optimizer=sgd, epochs=1, batch_size=3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: EarlyStop(patience=0),
        lambda: EarlyStop(min_delta=-1.0),
        lambda: cosine(warmup=1.0),
        lambda: cosine(final=2.0),
        lambda: one_cycle(0.0),
    ],
)
def test_bad_settings_are_told(make):
    with pytest.raises(ValueError, match="must"):
        make()


# Two processes


def _train_in_two(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    results = {name: train() for name, train in parallel_runs(Path(folder)).items()}
    with pytest.raises(CheckpointError, match="cannot be written to"):
        fit(plain_network(), blobs(), loss=F.cross_entropy, optimizer=sgd, steps=1, checkpoint="/proc/lathe")
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def plain_network() -> nn.Module:
    return network(dropout=0.0).double()


def doubles(count: int = 71) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = blobs(count)
    return inputs.double(), labels


def parallel_runs(folder: Path):
    """Runs whose results must not depend on the number of processes, but for `resumed` and its like."""

    def run(model, data, **options):
        arguments = {"loss": F.cross_entropy, "optimizer": sgd, "epochs": 3} | options
        history = fit(model, data, validation=doubles(33), metrics={"accuracy": accuracy}, **arguments)
        return {**weights(model), "loss": torch.tensor(history.loss), "metric": torch.tensor(history.metrics["loss"])}

    def linear():
        torch.manual_seed(2)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()

    def resumed():
        options = {"batch_size": 10, "checkpoint": folder / "run", "checkpoint_every": 2}
        noise = lambda x, generator: x + 0.1 * torch.randn(x.shape, generator=generator).double()  # noqa: E731
        whole = run(linear(), doubles(), batch_size=10, augment=noise)
        counted = []

        def explode(x, generator):
            counted.append(0)
            if len(counted) == 6:
                raise Stop
            return noise(x, generator)

        with pytest.raises(Stop):
            run(linear(), doubles(), augment=explode, **options)
        again = run(linear(), doubles(), augment=noise, **options)
        return {"same": torch.tensor(same(whole, again))}

    return {
        # 71 samples in tens leave a batch of one, of which the second process has nothing.
        "uneven": lambda: run(linear(), doubles(), batch_size=10),
        "accumulated": lambda: run(linear(), doubles(), batch_size=6, accumulate=3, clip_norm=0.5),
        "dataset": lambda: run(linear(), TensorDataset(*doubles()), batch_size=10),
        "loader": lambda: run(linear(), DataLoader(TensorDataset(*doubles()), batch_size=10, shuffle=True)),
        "resumed": resumed,
    }


def test_two_processes_train_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "two").mkdir()
    torch.multiprocessing.spawn(_train_in_two, (port, str(tmp_path / "two")), nprocs=2)
    ranks = [torch.load(tmp_path / "two" / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, train in parallel_runs(tmp_path / "one").items():
        alone = train()
        for key, value in alone.items():
            assert torch.equal(ranks[0][name][key], ranks[1][name][key]), f"processes differ in {key} of {name}"
            torch.testing.assert_close(ranks[0][name][key], value, atol=1e-6 if "loss" in key else 1e-10, rtol=0)
    assert ranks[0]["resumed"]["same"]
