"""muP against the package mup, and MAML on infinitely wide linear networks against the reference's loop over tasks.

What muP costs in training is a multiplication of the readout's input, in both packages. The reference code (edwardjhu/
TP4) adapts a copy of the parameters for each task of a batch, one task after the other; the same is formulated here.
"""

from __future__ import annotations

import copy
import time

import torch
from harness import Pair, PeerMissing
from torch import Tensor, nn
from torch.nn import functional as F

from lathe.theory.infinite_width_feature_learning import LinearMuPLimit, LinearNetwork, first_order_maml, parametrize

try:
    import mup
except ImportError as error:
    raise PeerMissing("pip install --no-deps mup==1.0.0 (and pyyaml, seaborn, tqdm)") from error

PEER = "mup 1.0.0"


def network(width: int, readout: type[nn.Module] = nn.Linear) -> nn.Sequential:
    hidden = (nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(*hidden, readout(width, 10))


def training(width: int, batch: int) -> Pair:
    """Forward, backward and a step of Adam; losses agree, as both start from the same weights."""
    x, y = torch.randn(batch, 64), torch.randint(10, (batch,))
    ours, theirs = network(width), network(width, mup.MuReadout)
    theirs.load_state_dict(ours.state_dict())
    scaled = parametrize(ours, base=network, base_width=64, optimizer=torch.optim.Adam)
    mup.set_base_shapes(theirs, network(64, mup.MuReadout), delta=network(128, mup.MuReadout))
    steps = [(ours, torch.optim.Adam(scaled.param_groups(1e-3))), (theirs, mup.MuAdam(theirs.parameters(), lr=1e-3))]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return float(loss)

    title = f"training step of an MLP of width {width}, Adam, batch {batch}"
    return Pair(title, lambda: step(*steps[0]), lambda: step(*steps[1]), PEER, 0.98, tolerance=None)


def setting_up(width: int) -> Pair:
    """Rescaling a model of a hundred million parameters, against the second that it may take."""
    model = network(width)
    count = sum(parameter.numel() for parameter in model.parameters())

    def clock() -> float:
        fresh = copy.deepcopy(model)
        start = time.perf_counter()
        parametrize(fresh, base=network, base_width=64, optimizer=torch.optim.Adam)
        return time.perf_counter() - start

    title = f"parametrize a model of {count / 1e6:.0f} million parameters"
    return Pair(title, clock, lambda: 1.0, "the second that it may take", 1.0, tolerance=None, timed=False)


def one_task_at_a_time(
    model: LinearNetwork, support: Tensor, labels: Tensor, queries: Tensor, wanted: Tensor, inner_lr: float
) -> tuple[Tensor, ...]:
    """First-order MAML by autograd on a copy of the parameters for each task."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    losses = []
    for task in range(len(support)):
        adapted = copy.deepcopy(model)
        parameters = list(adapted.parameters())
        gradients = torch.autograd.grad(F.cross_entropy(adapted(support[task]), labels[task]), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients):
                parameter -= inner_lr * gradient
        loss = F.cross_entropy(adapted(queries[task]), wanted[task])
        for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters)):
            sum_ += gradient / len(support)
        losses.append(loss.detach())
    return (torch.stack(losses).mean(), *total)


def maml(model: LinearNetwork, name: str, target: float) -> Pair:
    """One outer step's gradients: 32 tasks of 5 ways, 1 shot, 1 query each, on 28 x 28 images."""
    tasks, ways = 32, 5
    support, queries = torch.rand(tasks, ways, 784), torch.rand(tasks, ways, 784)
    labels = torch.arange(ways).expand(tasks, ways)

    def ours() -> tuple[Tensor, ...]:
        model.zero_grad()
        adapted = first_order_maml(model, support, labels, queries, labels, 0.4)
        return (adapted.loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None))

    return Pair(
        f"first-order MAML of {tasks} tasks, {name}",
        ours,
        lambda: one_task_at_a_time(model, support, labels, queries, labels, 0.4),
        "a copy of the parameters a task, by autograd",
        target=target,
        tolerance=1e-3,
    )


def pairs() -> list[Pair]:
    torch.manual_seed(0)
    limit = LinearMuPLimit(784, 5, sigma_v=1 / 32, hidden_bias=1.0)
    return [
        training(1024, 256),
        setting_up(7000),
        maml(limit.sample(128), "width 128", 10.0),
        maml(limit, "infinite width", 10.0),
    ]
