"""Networks that fit the training data as random hypotheses: many trained at once, from as many starts.

Training is taken for a sampler of hypotheses given their fit, as in Boopathy et al. 2024, section 4. Parameters of all
networks are stacked, and one optimiser moves them: what it does to each number by itself (Adam, SGD with momentum, ...)
it does to each network as it would alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from lathe.theory.inductive_bias.estimate import Base, InductiveBias, Tail, Task, inductive_bias, with_task
from lathe.theory.inductive_bias.fits import Fit
from lathe.theory.inductive_bias.posterior import one_hot

__all__ = ["NetworkEnsemble", "network_inductive_bias", "train_networks"]

Optimizer: TypeAlias = Literal["adam", "sgd"] | Callable[..., torch.optim.Optimizer]
Data: TypeAlias = tuple[Tensor, Tensor]
State: TypeAlias = dict[str, Tensor]
#: Up to this many samples, every step takes all of them.
_FULL_BATCH, _BATCH = 2000, 128
#: Inputs of all networks that are evaluated at a time.
_EVALUATED = 65_536


@dataclass(frozen=True)
class NetworkEnsemble:
    """Networks trained from independent starts.

    Attributes:
        model: their architecture.
        parameters, buffers: by name, `(models, ...)`.
        fits: which ones reached the tolerance; all where there was none.
        train_losses: mean squared errors on the training data.
        steps: how many each was trained for.
        vectorized: whether they are run at once or one by one.
    """

    model: nn.Module = field(repr=False)
    parameters: State = field(repr=False)
    buffers: State = field(repr=False)
    fits: Bool[Tensor, " models"]
    train_losses: Float[Tensor, " models"]
    steps: Int64[Tensor, " models"]
    vectorized: bool = True

    @torch.no_grad()
    def predict(self, x: Shaped[Tensor, "points *features"]) -> Float[Tensor, "models points *outputs"]:
        """Outputs of all networks, in evaluation mode."""
        block = max(1, _EVALUATED // len(self.fits))
        run = _forward(self.model.eval(), self.vectorized)
        return torch.cat([run(self.parameters, self.buffers, part, True) for part in x.split(block)], 1)

    def losses(
        self, x: Shaped[Tensor, "points *features"], y: Float[Tensor, "points outputs"]
    ) -> Float[Tensor, " fitting"]:
        """Mean squared errors of the networks that fit, over points and outputs; in float64."""
        outputs = self.predict(x)[self.fits.to(x.device)].double()
        return (outputs.flatten(2) - y.double()).square().mean((1, 2))

    def errors(
        self, x: Shaped[Tensor, "points *features"], labels: Int64[Tensor, " points"]
    ) -> Float[Tensor, " fitting"]:
        """Shares of points that the networks that fit get wrong."""
        return (self.predict(x)[self.fits.to(x.device)].argmax(2) != labels).double().mean(1)


def network_inductive_bias(
    make_model: Callable[[], nn.Module],
    train_data: Data,
    test_data: Data,
    eps: float | Float[Tensor, "*eps"] | None = None,
    *,
    num_models: int = 64,
    train_steps: int = 1000,
    lr: float = 1e-3,
    optimizer: Optimizer = "adam",
    batch_size: int | None = None,
    vectorize: bool = True,
    chunk: int | None = None,
    tolerance: float | None = None,
    loss: Literal["mse", "0-1"] = "mse",
    tail: Tail = "ncx2",
    fit: Fit = "mle",
    base: Base = "nats",
    ci: float = 0.95,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> InductiveBias:
    """Inductive bias that a task needs beyond an architecture, from networks trained on it.

    Args:
        make_model: gives a fresh network; called under a seed of its own for each.
        train_data, test_data: `(inputs, targets)`; targets are labels (integers, made one-hot) or real.
        eps: test losses to be reached; by default the smallest of the networks'.
        loss: what eps is of: "mse", the mean over points and outputs, or "0-1", the share of errors, whose law is taken
            for a beta law (our extension). Networks are trained on the mean squared error.
        num_models, train_steps, lr, optimizer, batch_size, vectorize, chunk, tolerance, seed, progress: see
            `train_networks`. Numbers of different architectures are comparable where training went to the same
            `tolerance`; networks that did not get there are left out.
        tail, fit, base, ci: see `inductive_bias`.

    Returns:
        The bias, with the trained networks as its `source`.

    Raises:
        ValueError: also where fewer than 20 networks fit the training data.
    """
    if loss not in ("mse", "0-1"):
        raise ValueError(f"loss must be 'mse' or '0-1', got {loss!r}")
    (x, y), (x_test, y_test) = train_data, test_data
    if len(x) == 0 or len(x_test) == 0 or len(x) != len(y) or len(x_test) != len(y_test):
        raise ValueError(
            f"train_data and test_data must have as many targets as inputs, and not none, got {len(x)} inputs and "
            f"{len(y)} targets, and {len(x_test)} and {len(y_test)}"
        )
    if x.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"train_data and test_data must have the same features, got {x.shape} and {x_test.shape}")
    targets, test_targets = one_hot(y, y_test)
    ensemble = train_networks(
        make_model, (x, targets), num_models=num_models, train_steps=train_steps, lr=lr, optimizer=optimizer,
        batch_size=batch_size, vectorize=vectorize, chunk=chunk, tolerance=tolerance, seed=seed, progress=progress,
    )  # fmt: skip
    fitting = int(ensemble.fits.sum())
    if fitting < 20:
        raise ValueError(
            f"only {fitting} of {num_models} networks reached the tolerance {tolerance} on the training data "
            f"(median loss {ensemble.train_losses.median():.2g}) and 20 are needed: raise train_steps, lr or tolerance"
        )
    task = Task.of(loss, len(x), x_test, test_targets)
    if loss == "0-1":
        errors = ensemble.errors(x_test, test_targets.argmax(1))
        return with_task(inductive_bias(errors, eps, tail="beta", base=base, ci=ci), task, ensemble)
    losses = ensemble.losses(x_test, test_targets)
    return with_task(inductive_bias(losses, eps, tail=tail, fit=fit, base=base, ci=ci), task, ensemble)


def train_networks(
    make_model: Callable[[], nn.Module],
    data: Data,
    *,
    num_models: int = 64,
    train_steps: int = 1000,
    lr: float = 1e-3,
    optimizer: Optimizer = "adam",
    batch_size: int | None = None,
    vectorize: bool = True,
    chunk: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> NetworkEnsemble:
    """Trains networks from independent starts on the mean squared error, all at once.

    Args:
        make_model: gives a fresh network; any module that `torch.func.vmap` can run, else see `vectorize`.
        data: inputs, and real targets of the shape of the outputs; the networks are trained where these lie.
        num_models: how many.
        train_steps: at most.
        lr: learning rate.
        optimizer: "adam", "sgd" (momentum 0.9), or a function of the parameters that gives an optimiser; it must treat
            every number by itself, since it sees the networks stacked (no clipping by norm, no LAMB).
        batch_size: samples of a step, drawn in an order of its own for each network; by default all up to 2000, else
            128.
        vectorize: False runs the networks one by one, which any module can.
        chunk: networks at a time; all by default. Results do not depend on it, but for dropout.
        tolerance: a network is taken as it is when its loss on all training data first gets here (checked every step
            where the batch is everything, else every epoch); what has not got here at the end does not fit.
        seed: of starts, orders and dropout; the global generators are left as they were.
        progress: told `(steps done, steps in all)`.

    Raises:
        ValueError: for sizes that are not positive, outputs of another shape than the targets.
    """
    x, y = data
    for name, value in (("num_models", num_models), ("train_steps", train_steps), ("lr", lr)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    if optimizer not in ("adam", "sgd") and not callable(optimizer):
        raise ValueError(f"optimizer must be 'adam', 'sgd' or a function of the parameters, got {optimizer!r}")
    size = 1 if not vectorize else chunk or num_models
    batch = min(len(x), batch_size or (len(x) if len(x) <= _FULL_BATCH else _BATCH))
    parts, done = [], 0
    for start in range(0, num_models, size):
        seeds = [seed * 1_000_003 + number for number in range(start, min(start + size, num_models))]

        def tell(step: int, done: int = done) -> None:
            if progress is not None:
                progress(done + step, -(-num_models // size) * train_steps)

        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            models = []
            for one in seeds:
                torch.manual_seed(one)
                models.append(make_model().to(x.device).train())
            parts.append(_train(models, x, y, seeds, train_steps, lr, optimizer, batch, tolerance, vectorize, tell))
        done += train_steps

    def joined(states: list[State]) -> State:
        return {name: torch.cat([state[name] for state in states]) for name in states[0]}

    losses = torch.cat([part[2] for part in parts])
    fits = torch.isfinite(losses) if tolerance is None else losses <= tolerance
    parameters, buffers = joined([part[0] for part in parts]), joined([part[1] for part in parts])
    return NetworkEnsemble(
        copy.deepcopy(models[0]), parameters, buffers, fits, losses, torch.cat([part[3] for part in parts]), vectorize
    )


def _train(
    models: list[nn.Module],
    x: Tensor,
    y: Tensor,
    seeds: list[int],
    train_steps: int,
    lr: float,
    optimizer: Optimizer,
    batch: int,
    tolerance: float | None,
    vectorize: bool,
    tell: Callable[[int], None],
) -> tuple[State, State, Tensor, Tensor]:
    """Parameters, buffers, training losses and steps of networks that are trained together."""
    parameters, buffers = stack_module_state(models)  # type: ignore[arg-type]
    parameters = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    template = copy.deepcopy(models[0])
    run = _forward(template, vectorize)
    leaves = list(parameters.values())
    if optimizer == "adam":
        stepper: torch.optim.Optimizer = torch.optim.Adam(leaves, lr=lr)
    elif optimizer == "sgd":
        stepper = torch.optim.SGD(leaves, lr=lr, momentum=0.9)
    else:
        stepper = optimizer(leaves)  # type: ignore[operator]
    everything = batch == len(x)
    orders = _Orders(len(x), batch, seeds)
    count = len(models)
    kept = {name: value.detach().clone() for name, value in {**parameters, **buffers}.items()}
    losses = torch.full((count,), torch.inf, dtype=torch.float64, device=x.device)
    steps = torch.full((count,), train_steps)
    waiting = torch.ones(count, dtype=torch.bool, device=x.device)

    def squared(outputs: Tensor, wanted: Tensor) -> Tensor:
        if outputs.shape[2:] != y.shape[1:]:
            raise ValueError(
                f"make_model must give outputs of the shape of the targets, {tuple(y.shape[1:])}, got "
                f"{tuple(outputs.shape[2:])}"
            )
        return (outputs - wanted).square().flatten(1).mean(1)

    def whole() -> Tensor:
        with torch.no_grad():
            template.eval()
            total = sum(
                squared(run(parameters, buffers, a, True), b.to(leaves[0])).double() * len(a)
                for a, b in zip(x.split(_EVALUATED // count or 1), y.split(_EVALUATED // count or 1))
            )
            template.train()
        return total / len(x)  # type: ignore[return-value]

    def keep(which: Tensor, values: Tensor, step: int) -> None:
        losses[which], steps[which.cpu()] = values[which], step
        for name, value in {**parameters, **buffers}.items():
            kept[name][which] = value.detach()[which]
        waiting[which] = False

    targets = y.to(leaves[0])
    for step in range(train_steps):
        if everything:
            outputs, wanted = run(parameters, buffers, x, True), targets
        else:
            pick = orders.next().to(x.device)
            outputs, wanted = run(parameters, buffers, x[pick], False), targets[pick]
        values = squared(outputs, wanted)
        if tolerance is not None:
            # In training mode a loss is the network's own where nothing in it knows of the mode.
            now = values.detach().double() if everything and not buffers else None
            if now is None and orders.epoch_begins(step):
                now = whole()
            if now is not None:
                reached = waiting & (now <= tolerance)
                if bool(reached.any()):
                    keep(reached, now, step)
                if not bool(waiting.any()):
                    break
        stepper.zero_grad(set_to_none=True)
        values.sum().backward()
        stepper.step()
        if step % 16 == 15:
            tell(step + 1)
    if bool(waiting.any()):
        keep(waiting.clone(), whole(), train_steps)
    return {name: kept[name] for name in parameters}, {name: kept[name] for name in buffers}, losses, steps


class _Orders:
    """Samples of each step for each network, each in an order of its own."""

    def __init__(self, size: int, batch: int, seeds: list[int]) -> None:
        self.size, self.batch = size, batch
        self.generators = [torch.Generator().manual_seed(seed + 1) for seed in seeds]
        self.steps = -(-size // batch)
        self.step = 0

    def next(self) -> Int64[Tensor, "models batch"]:
        at = self.step % self.steps
        if at == 0:
            self.order = torch.stack([torch.randperm(self.size, generator=own) for own in self.generators])
        self.step += 1
        # The last batch of an epoch is filled up from the order's start.
        places = torch.arange(at * self.batch, (at + 1) * self.batch) % self.size
        return self.order[:, places]

    def epoch_begins(self, step: int) -> bool:
        return step % self.steps == 0


def _forward(template: nn.Module, vectorize: bool) -> Callable[[State, State, Tensor, bool], Tensor]:
    """`(parameters, buffers, inputs, shared) -> (models, points, ...)`; inputs are shared by all, or one set each."""

    def single(parameters: State, buffers: State, x: Tensor) -> Tensor:
        return functional_call(template, {**parameters, **buffers}, (x,))

    def together(parameters: State, buffers: State, x: Tensor, shared: bool) -> Tensor:
        return vmap(single, in_dims=(0, 0, None if shared else 0), randomness="different")(parameters, buffers, x)

    def in_turn(parameters: State, buffers: State, x: Tensor, shared: bool) -> Tensor:
        count = len(next(iter(parameters.values())))

        def of(state: State, which: int) -> State:
            return {name: value[which] for name, value in state.items()}

        return torch.stack(
            [single(of(parameters, i), of(buffers, i), x if shared else x[i]) for i in range(count)]
        )  # fmt: skip

    return together if vectorize else in_turn
