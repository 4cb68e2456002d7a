"""The one training loop: any network, loss, optimiser and schedule, from a laptop to a cluster.

Runs on Hugging Face Accelerate (`accelerate launch` for several processes), adds next to nothing to the time of a small
network's step, stops at a loss that is not finite, and goes on after an interruption to the very same weights.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lathe.training._batches import Batch, Data, Share, Source, derive_seed, open_source
from lathe.training._checkpoints import CheckpointError, Checkpoints, load_weights
from lathe.training._evaluation import Metric, accuracy, evaluate, judge, place
from lathe.training._processes import Forward, Processes
from lathe.training._random import own_randomness, random_state, restore_random, seed_everything
from lathe.training._schedules import Schedule

__all__ = ["EarlyStop", "History", "Progress", "TrainingDiverged", "accuracy", "evaluate", "fit"]

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
        validation: as `data`; its metrics are means over its samples, read 1,000 at a time (a DataLoader, as it says).
        metrics: name -> function of the output and the targets of a batch, a mean over the batch's samples.
        validate_every: steps between validations; None validates after each epoch (a stream of unknown length has
            none). The last step always validates.
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
    _check_plan(
        epochs,
        steps,
        clip_norm,
        precision,
        accumulate=accumulate,
        validate_every=validate_every,
        checkpoint_every=checkpoint_every,
    )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    metrics = dict(metrics or {})
    if "loss" in metrics:
        raise ValueError("metrics must not use the name 'loss', which is the loss on the validation data")
    if validation is None and (metrics or early_stop or validate_every):
        raise ValueError("metrics, validate_every and early_stop need validation data, got validation=None")
    if early_stop and early_stop.metric not in {"loss", *metrics}:
        raise ValueError(f"early_stop.metric must be one of {sorted({'loss', *metrics})}, got {early_stop.metric!r}")

    processes = Processes(device)
    share = Share(processes.rank, processes.world)
    source = open_source(data, batch_size=batch_size, default=100, shuffle=seed, share=share)
    judged = None if validation is None else open_source(validation, default=1000, share=share)
    if steps is None and source.length is None:
        raise ValueError("epochs need data of a known length, got a stream: give steps")
    total = steps if steps is not None else (epochs or 0) * -(-(source.length or 0) // accumulate)

    model.to(processes.device)
    updates = _make_optimizer(optimizer, model)
    updates.zero_grad(set_to_none=True)
    scheduler = schedule(updates, total) if schedule else None
    run = _Run(model, updates, scheduler, early_stop, seed, processes)
    folder = None if checkpoint is None else Checkpoints(checkpoint)
    plan = {
        "seed": seed,
        "samples": source.samples,
        "batches an epoch": source.length,
        "accumulate": accumulate,
        "precision": precision,
        "processes": processes.world,
        "optimizer": f"{type(updates).__name__}({updates.defaults})",
        "steps": total if scheduler else None,
    }
    with own_randomness(processes.device), torch.enable_grad():
        if folder is not None:
            processes.together(folder.prepare)
            if resume and folder.exists():
                run.load(folder, plan, total)
        earlier = run.history.seconds
        alone = Forward(model, processes.device, precision)
        forward = processes.wrap(alone)
        model.train()
        for window in run.windows(source, accumulate, total):
            value = _gradients(forward, window, loss, augment, run.generator, processes)
            run.note(value)
            if clip_norm is not None:
                nn.utils.clip_grad_norm_([p for group in updates.param_groups for p in group["params"]], clip_norm)
            updates.step()
            updates.zero_grad(set_to_none=True)
            if scheduler is not None:
                scheduler.step()
            run.step += 1
            last, ended = run.step == total, run.batch == 0
            if judged is not None and (last or _due(run.step, validate_every, ended)):
                processes.share_buffers(model)
                run.judge(judge(alone, judged, {"loss": loss, **metrics}, processes))
                model.train()
            run.history.seconds = earlier + time.perf_counter() - started
            if folder is not None and (last or run.stopped or _due(run.step, checkpoint_every, ended)):
                run.save(folder, plan)
            if last or run.stopped or not run.pending:
                run.read_losses()
                if progress is not None and processes.rank == 0:
                    progress(run.progress(total))
        run.finish()
    run.history.seconds = earlier + time.perf_counter() - started
    return run.history


class _Run:
    """All that a checkpoint holds, and what moves it on."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        early_stop: EarlyStop | None,
        seed: int,
        processes: Processes,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.early_stop, self.seed, self.processes = early_stop, seed, processes
        self.generator = torch.Generator(processes.device)
        self.step = self.epoch = self.batch = 0
        self.history = History()
        self.pending: list[Tensor] = []
        self.best: float | None = None
        self.best_weights: dict[str, Any] | None = None
        self.waited = 0
        self.random: dict[str, Any] | None = None
        self.saved: int | None = None

    @property
    def stopped(self) -> bool:
        return self.history.stopped_early

    def windows(self, source: Source, accumulate: int, total: int) -> Iterator[list[Batch]]:
        """The batches of each step; `epoch` and `batch` are already those after the step."""
        while self.step < total and not self.stopped:
            seed_everything(derive_seed(self.seed, self.epoch, self.processes.rank, 2), self.generator)
            batches = source.epoch(self.epoch, self.batch)
            if self.batch and self.random is not None:
                restore_random(self.random, self.generator)
            self.random = None
            while self.step < total and not self.stopped:
                window = list(itertools.islice(batches, accumulate))
                if not window:
                    if self.batch == 0:
                        raise ValueError("data must give at least one batch an epoch, got none")
                    self.epoch, self.batch = self.epoch + 1, 0
                    break
                self.batch += len(window)
                if ended := self.batch == source.length:
                    self.epoch, self.batch = self.epoch + 1, 0
                yield window
                if ended:
                    break

    def note(self, value: Tensor) -> None:
        """Keep the loss of a step; on CPU it is read at once, so that a loss of no number never moves a weight."""
        self.pending.append(value)
        if value.device.type == "cpu" or len(self.pending) >= _READ_EVERY:
            self.read_losses()

    def read_losses(self) -> None:
        if not self.pending:
            return
        values = torch.stack(self.pending).tolist() if len(self.pending) > 1 else [self.pending[0].item()]
        self.pending = []
        for value in values:
            if not math.isfinite(value):
                step = self.history.steps + 1
                self.optimizer.zero_grad(set_to_none=True)
                raise TrainingDiverged(f"training diverged: the loss is {value} at step {step}{self.kept}", step)
            self.history.loss.append(value)

    def refuse_broken_weights(self) -> None:
        """A finite loss may have had gradients that were not; such weights are no checkpoint."""
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                message = f"training diverged: {name} is not finite after step {self.step}{self.kept}"
                raise TrainingDiverged(message, self.step)

    @property
    def kept(self) -> str:
        return "" if self.saved is None else f"; the checkpoint of step {self.saved} is kept"

    def judge(self, found: dict[str, float]) -> None:
        """Take down the metrics of a validation, and decide whether to stop early."""
        for name, value in found.items():
            self.history.metrics.setdefault(name, []).append(value)
        self.history.validated_at.append(self.step)
        if (rule := self.early_stop) is None:
            return
        value = found[rule.metric] if rule.mode == "max" else -found[rule.metric]
        if math.isfinite(value) and (self.best is None or value > self.best + rule.min_delta):
            self.best, self.waited = value, 0
            if rule.restore_best:
                state = self.model.state_dict()
                self.best_weights = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        else:
            self.waited += 1
            self.history.stopped_early = self.waited >= rule.patience

    def progress(self, total: int) -> Progress:
        history = self.history
        latest = {name: values[-1] for name, values in history.metrics.items()}
        return Progress(self.step, total, self.epoch, history.loss[-1], latest, history.seconds)

    def finish(self) -> None:
        self.read_losses()
        self.refuse_broken_weights()
        if self.best_weights is not None and self.early_stop and self.early_stop.restore_best:
            self.model.load_state_dict(self.best_weights)
        self.processes.share_buffers(self.model)
        self.model.eval()

    def save(self, folder: Checkpoints, plan: dict[str, Any]) -> None:
        self.read_losses()
        self.refuse_broken_weights()
        random_states = self.processes.all(random_state(self.generator))
        rest = {
            "plan": plan,
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.scheduler is None else self.scheduler.state_dict(),
            "history": {**vars(self.history), "loss": torch.tensor(self.history.loss, dtype=torch.float64)},
            "best": self.best,
            "waited": self.waited,
            "random": random_states,
        }
        states = {"model": self.model.state_dict()}
        if self.best_weights is not None:
            states["best"] = self.best_weights
        self.processes.together(lambda: folder.save(self.step, states, rest))
        self.saved = self.step

    def load(self, folder: Checkpoints, plan: dict[str, Any], total: int) -> None:
        states, rest = folder.load()
        differs = [
            f"{name} {rest['plan'].get(name)}, not {value}"
            for name, value in plan.items()
            if rest["plan"].get(name) != value
        ]
        if rest["step"] > total:
            differs.append(f"{rest['step']} steps, more than {total}")
        if differs:
            raise CheckpointError(
                f"the checkpoint in {folder.folder} is of another run: {'; '.join(differs)} "
                "(another folder or resume=False starts anew)"
            )
        load_weights(self.model, states["model"], folder.folder)
        try:
            self.optimizer.load_state_dict(rest["optimizer"])
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"the checkpoint in {folder.folder} is of another optimizer: {error}") from error
        if self.scheduler is not None:
            self.scheduler.load_state_dict(rest["schedule"])
        self.step, self.epoch, self.batch = rest["step"], rest["epoch"], rest["batch"]
        self.history = History(**{**rest["history"], "loss": rest["history"]["loss"].tolist()})
        self.best, self.waited, self.saved = rest["best"], rest["waited"], rest["step"]
        self.random = rest["random"][self.processes.rank]
        if "best" in states:
            self.best_weights = states["best"]


def _gradients(
    forward: nn.Module,
    window: list[Batch],
    loss: Callable[..., Tensor],
    augment: Callable[[Any, torch.Generator], Any] | None,
    generator: torch.Generator,
    processes: Processes,
) -> Tensor:
    """Add up the gradients of one step's batches; returns the mean loss over its samples in all processes."""
    whole = sum(batch.whole for batch in window)
    total: Tensor | None = None
    for number, batch in enumerate(window, start=1):
        inputs, targets = place(batch, processes.device)
        if augment is not None:
            inputs = augment(inputs, generator)
        # Processes exchange gradients once a step; they average, so that a batch weighs by its share of the samples.
        waits = processes.world > 1 and number < len(window)
        with forward.no_sync() if waits else nullcontext():  # type: ignore[operator]
            value = loss(forward(inputs), *targets)
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"loss must give a tensor of one number, the mean over the batch, got {got}")
            weight = batch.mine * processes.world / whole
            value = value.reshape(()) if weight == 1 else value.reshape(()) * weight
            value.backward()
        total = value.detach() if total is None else total + value.detach()
    assert total is not None
    return processes.mean(total)


def _due(step: int, every: int | None, epoch_ended: bool) -> bool:
    return epoch_ended if every is None else step % every == 0


def _check_plan(epochs: int | None, steps: int | None, clip_norm: float | None, precision: str, **counts: Any) -> None:
    if (epochs is None) == (steps is None):
        raise ValueError(f"give epochs or steps, one of the two, got epochs={epochs} and steps={steps}")
    for name, value in {"epochs": epochs, "steps": steps, **counts}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if clip_norm is not None and not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(f"clip_norm must be a positive number, got {clip_norm}")
    if precision not in ("no", "bf16"):
        raise ValueError(f"precision must be 'no' or 'bf16', got {precision!r}")


def _make_optimizer(optimizer: Callable[..., Optimizer] | Optimizer, model: nn.Module) -> Optimizer:
    if not isinstance(optimizer, Optimizer):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("model must have a parameter that requires gradients, got none")
        optimizer = optimizer(parameters)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must make a torch.optim.Optimizer, got {type(optimizer).__name__}")
    else:
        mine = {id(parameter) for parameter in model.parameters()}
        if not any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError("optimizer must hold parameters of model, got an optimizer of others")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("optimizer must make one step from one gradient, got LBFGS")
    return optimizer
