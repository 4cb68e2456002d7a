"""The one training loop: any network, loss, optimiser and schedule, from a laptop to a cluster.

Runs on Hugging Face Accelerate (`accelerate launch` for several processes), adds next to nothing to the time of a small
network's step, stops at a loss that is not finite, and goes on after an interruption to the very same weights.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from lathe.training._batches import Batch, Data, Share, Source, derive_seed, open_source
from lathe.training._checkpoints import CheckpointError, Checkpoints, load_weights
from lathe.training._schedules import Schedule

__all__ = ["EarlyStop", "History", "Progress", "TrainingDiverged", "accuracy", "evaluate", "fit"]

Metric = Callable[..., Tensor | float]

# On an accelerator the losses are read back this often, so that the device never waits for the host.
_READ_EVERY = 16


@dataclass
class History:
    """What happened in a run, from its first step, resumed or not.

    `loss` has a value per optimiser step: the mean over the samples of the step. `metrics[name]` has a value per
    validation, made after the steps `validated_at`; "loss" is always among them. `seconds` is time spent in `fit`.
    """

    loss: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    validated_at: list[int] = field(default_factory=list)
    seconds: float = 0.0
    stopped_early: bool = False

    @property
    def steps(self) -> int:
        return len(self.loss)


@dataclass(frozen=True, slots=True)
class Progress:
    """What the progress callback is told: `step` of `total` are done; `metrics` are those of the last validation."""

    step: int
    total: int
    epoch: int
    loss: float
    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class EarlyStop:
    """Stop when a validation metric has not improved for `patience` validations.

    Args:
        metric: name among `metrics`, or "loss" for the loss on the validation data.
        patience: validations without improvement after which training stops, at least 1.
        min_delta: what counts as improvement must be larger than this.
        mode: whether lower ("min") or higher ("max") is better.
        restore_best: leave the network with the weights of its best validation, not of its last step.
    """

    metric: str = "loss"
    patience: int = 5
    min_delta: float = 0.0
    mode: Literal["min", "max"] = "min"
    restore_best: bool = True

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")
        if self.min_delta < 0:
            raise ValueError(f"min_delta must not be negative, got {self.min_delta}")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {self.mode!r}")


class TrainingDiverged(RuntimeError):
    """The loss (or a weight) is not a finite number any more; `step` counts from 1."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


def accuracy(output: Float[Tensor, "batch classes *spatial"], target: Int[Tensor, "batch *spatial"]) -> Tensor:
    """Share of the targets that have the highest output, in [0, 1]."""
    return (output.argmax(1) == target).float().mean()


def fit(
    model: nn.Module,
    data: Data,
    *,
    loss: Callable[..., Tensor],
    optimizer: Callable[..., Optimizer] | Optimizer,
    schedule: Schedule | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    validation: Data | None = None,
    metrics: Mapping[str, Metric] | None = None,
    validate_every: int | None = None,
    augment: Callable[[Any, torch.Generator], Any] | None = None,
    precision: Literal["no", "bf16"] = "no",
    accumulate: int = 1,
    clip_norm: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    early_stop: EarlyStop | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[Progress], None] | None = None,
) -> History:
    """Train `model` in place; it ends on `device`, in eval mode.

    A step minimises `loss(model(inputs), *targets)`, which must be a mean over samples. All randomness comes from
    `seed`: order of samples, `augment`, dropout; the caller's global random numbers are left as they were.

    Args:
        data: `(inputs, *targets)`, tensors with samples along the first dimension, left on the device where they lie
            and indexed a batch at a time; or a torch Dataset or DataLoader that gives such tuples.
        loss: called with the network's output and the targets; gives a scalar.
        optimizer: called with the parameters that require gradients, such as `partial(torch.optim.SGD, lr=0.1)`;
            or an optimiser of the model's parameters.
        schedule: `one_cycle(...)`, `cosine(...)` or any function of optimiser and total steps; stepped every step.
        epochs, steps: one of the two; a step is one update of the weights.
        batch_size: samples of one forward pass over all processes together; 100 where nothing is said.
        validation: as `data`; its metrics are means over its samples.
        metrics: name -> function of the output and the targets of a batch, a mean over the batch's samples.
        validate_every: steps between validations; None validates after each epoch. The last step always validates.
        augment: `augment(inputs, generator) -> inputs` on each training batch, on the device.
        precision: "bf16" runs the forward pass in autocast and gives the loss float32 outputs.
        accumulate: batches whose gradients make one step; an epoch's last step takes those that are left.
        clip_norm: largest norm of all gradients together.
        checkpoint: folder of this run's one checkpoint, the last good one.
        checkpoint_every: steps between checkpoints; None saves after each epoch. The last step is always saved.
        resume: go on from the checkpoint where there is one. On CPU the weights end bit-identical to those of an
            uninterrupted run (with DataLoader workers, as far as these draw no random numbers).
        device: where to train; under `accelerate launch`, the kind of device.
        progress: called in the main process after each step, on accelerators every 16 steps.

    Raises:
        ValueError, TypeError: for arguments that do not fit, before any work is done.
        TrainingDiverged: at a loss that is not finite, before it touches the weights (on CPU).
        CheckpointError: where the checkpoint cannot be read or written, or is of another run.
    """
    started = time.perf_counter()
    _check_plan(epochs, steps, accumulate, clip_norm, precision, validate_every, checkpoint_every)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    metrics = dict(metrics or {})
    if "loss" in metrics:
        raise ValueError("metrics must not use the name 'loss', which is the loss on the validation data")
    if validation is None and (metrics or early_stop or validate_every):
        raise ValueError("metrics, validate_every and early_stop need validation data, got validation=None")
    if early_stop and early_stop.metric not in {"loss", *metrics}:
        raise ValueError(f"early_stop.metric must be one of {sorted({'loss', *metrics})}, got {early_stop.metric!r}")

    processes = _Processes(torch.device(device))
    share = Share(processes.rank, processes.world)
    source = open_source(data, batch_size=batch_size, default=100, shuffle=seed, share=share)
    judged = None
    if validation is not None:
        judged = open_source(
            validation, batch_size=None if _is_loader(validation) else 1000, default=1000, shuffle=None, share=share
        )
    updates = None if source.length is None else -(-source.length // accumulate)
    if steps is None and updates is None:
        raise ValueError("epochs need data of known length: give steps for a stream")
    total = steps if steps is not None else (epochs or 0) * (updates or 0)

    model.to(processes.device)
    optimiser = _make_optimizer(optimizer, model)
    scheduler = schedule(optimiser, total) if schedule else None
    run = _Run(model, optimiser, scheduler, processes, early_stop, total)
    plan = {
        "seed": seed,
        "samples": source.samples,
        "batches": source.length,
        "accumulate": accumulate,
        "precision": precision,
        "processes": processes.world,
        "steps": total if scheduler else None,
    }
    folder = Checkpoints(checkpoint) if checkpoint is not None else None
    generator = torch.Generator(processes.device)

    with _own_randomness(processes.device):
        if folder is not None:
            processes.agree(folder.prepare)
            if resume and folder.exists():
                run.load(folder, plan)
        run.history.seconds, before = 0.0, run.history.seconds
        forward = processes.wrap(_Forward(model, processes.device, precision))
        trainable = [p for group in optimiser.param_groups for p in group["params"]]

        def report(done: Progress) -> None:
            if progress is not None and processes.rank == 0:
                progress(done)

        def save() -> None:
            if folder is None:
                return
            run.read_losses()
            run.refuse_broken_weights()
            run.history.seconds = before + time.perf_counter() - started
            states, rest = run.state(plan, processes.gather(_random_state(generator)))
            if processes.rank == 0:
                processes.agree(lambda: folder.save(run.step, states, rest))
            else:
                processes.agree(lambda: None)

        while run.step < total and not run.stopped:
            _seed_everything(derive_seed(seed, run.epoch, processes.rank, 2), generator)
            batches = source.epoch(run.epoch, run.batch)
            run.restore_randomness(generator)
            model.train()
            seen = run.batch
            while run.step < total and not run.stopped:
                window = _take(batches, accumulate)
                if not window:
                    if not seen:
                        raise ValueError("data must give at least one batch an epoch, got none")
                    break
                value = _gradients(forward, window, loss, augment, generator, processes)
                run.learn(value)
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(trainable, clip_norm)
                optimiser.step()
                if scheduler is not None:
                    scheduler.step()
                optimiser.zero_grad(set_to_none=True)
                run.step += 1
                seen += len(window)
                ended = seen == source.length
                run.batch = 0 if ended else seen
                run.epoch += ended
                last = run.step == total
                if judged is not None and (last or _due(run.step, validate_every, ended)):
                    run.read_losses()
                    run.judge(_judge(forward, judged, metrics, processes, loss))
                    model.train()
                if folder is not None and (last or run.stopped or _due(run.step, checkpoint_every, ended)):
                    save()
                if progress is not None and not run.pending:
                    elapsed = before + time.perf_counter() - started
                    report(
                        Progress(run.step, total, run.epoch, run.history.loss[-1], run.latest, elapsed)
                    )
                if ended:
                    break
            else:
                continue
            if run.batch:  # a stream ran out
                run.epoch, run.batch = run.epoch + 1, 0
        run.read_losses()
        run.refuse_broken_weights()
        run.restore_best()
    model.eval()
    run.history.seconds = before + time.perf_counter() - started
    return run.history
