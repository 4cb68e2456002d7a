"""Pointer networks and their labels against step-by-step decoders, and against solvers called once a set.

The reference code for training (shirgur/PointerNet) writes its decoder's LSTM cell by hand, one step after the other,
and runs the memory through the attention's first layer anew at every step. `StepByStep` does the same with our weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import Pair, PeerMissing
from scipy.spatial import ConvexHull
from torch import Tensor, nn
from torch.nn import functional

from lathe.data.tours import IGNORED, HullDataset, TSPDataset, convex_hull, tour_length, tsp
from lathe.nn.pointer_networks import Permutation, PointerNetwork, pointer_loss

STEP_BY_STEP = "reference formulation (decoder step by step)"


class StepByStep(nn.Module):
    """The same network, teacher forced, in the reference's way: cells by hand, and W1 e_j once more at every step."""

    def __init__(self, net: PointerNetwork) -> None:
        super().__init__()
        self.net = net
        pointer, decoder = net.pointer, net.decoder
        h = net.hidden_dim
        self.input, self.hidden = nn.Linear(2, 4 * h), nn.Linear(h, 4 * h)
        # The very parameters of the network: gradients land in the same place.
        self.input.weight, self.input.bias = decoder.weight_ih_l0, decoder.bias_ih_l0
        self.hidden.weight, self.hidden.bias = decoder.weight_hh_l0, decoder.bias_hh_l0
        self.query, self.v = pointer.query, pointer.v
        self.key = pointer.key

    def cell(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (self.input(x) + self.hidden(h)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def forward(self, points: Tensor, targets: Tensor) -> Tensor:
        net = self.net
        memory, (h, c) = net.encoder(points)
        if net.end is not None:
            memory = torch.cat([memory, net.end.expand(len(points), 1, -1)], 1)
        channels = memory.transpose(1, 2)
        h, c, x, logits = h[0], c[0], net.start.expand(len(points), -1), []
        for step in range(targets.shape[1]):
            h, c = self.cell(x, h, c)
            context = functional.conv1d(channels, self.key.weight[..., None])
            query = self.query(h)[:, :, None].expand(-1, -1, context.shape[2])
            logits.append(torch.bmm(self.v.expand(len(points), 1, -1), (query + context).tanh())[:, 0])
            choice = targets[:, step].clamp(0, points.shape[1] - 1)
            x = points.gather(1, choice[:, None, None].expand(-1, 1, 2))[:, 0]
        return torch.stack(logits, 1)


def pairs() -> list[Pair]:
    """Training, decoding, labels."""
    torch.manual_seed(0)
    return [
        training(10, h=256, batch=128, target=4.0),
        training(10, h=128, batch=128, target=2.0),
        training(50, h=256, batch=32, target=4.0, hull=False),
        beams(20, h=128, batch=16, beam=8, target=4.0),
        *hulls(),
        *tours(),
    ]


def step(net: PointerNetwork, forward: Callable[..., Tensor], points: Tensor, targets: Tensor) -> Callable[[], Any]:
    parameters = list(net.parameters())

    def run() -> Any:
        return torch.autograd.grad(pointer_loss(forward(points, targets), targets), parameters)

    return run


def training(n: int, *, h: int, batch: int, target: float, hull: bool = True) -> Pair:
    """Loss and gradients of one batch: hulls (as long as the longest of them), or tours."""
    data = HullDataset(batch, n) if hull else TSPDataset(batch, n, method="nearest")
    points, targets = data.parts[0]
    targets = targets[:, : int((targets != IGNORED).sum(1).max())]
    net = PointerNetwork(hidden_dim=h, stop_token=hull)
    what = "hulls" if hull else "tours"
    return Pair(
        f"training step on {what} of {n} points, h={h}, batch {batch}",
        step(net, net, points, targets),
        step(net, StepByStep(net), points, targets),
        STEP_BY_STEP,
        target=target,
        tolerance=5e-3,  # gradients that sum many steps in another order
        saved_memory=True,
    )


def beams(n: int, *, h: int, batch: int, beam: int, target: float) -> Pair:
    """A beam over valid tours: all samples and beams at once, against one sample after the other."""
    net, points = PointerNetwork(hidden_dim=h, stop_token=False).eval(), torch.rand(batch, n, 2)

    def decode(part: Tensor) -> Tensor:
        return net.decode(part, strategy="beam", beam=beam, valid=Permutation()).log_probs

    return Pair(
        f"beam of {beam} over valid tours of {n} cities, h={h}, {batch} samples",
        lambda: decode(points),
        lambda: torch.cat([one_beam(net, cities, beam) for cities in points]),
        "the same search with lists, a sample after the other",
        target=target,
        tolerance=1e-4,
    )


@torch.no_grad()
def one_beam(net: PointerNetwork, cities: Tensor, beam: int) -> Tensor:
    """Beam search as it is usually written: a list of prefixes with their states, each continued on its own."""
    memory, (h, c) = net.encoder(cities[None])
    decoder = net.decoder
    weights = decoder.weight_ih_l0, decoder.weight_hh_l0, decoder.bias_ih_l0, decoder.bias_hh_l0
    found = [(0.0, [], net.start[None], h[0], c[0])]
    for step in range(len(cities)):
        new = []
        for score, tour, x, h, c in found:
            h_next, c_next = torch.lstm_cell(x, (h, c), *weights)
            logits = net.pointer(h_next[None], memory)[0, 0]
            free = torch.zeros(len(cities), dtype=torch.bool)
            free[[0] if step == 0 else [city for city in range(len(cities)) if city not in tour]] = True
            log_p = logits.masked_fill(~free, -torch.inf).log_softmax(0)
            for city in free.nonzero().flatten().tolist():
                new.append((score + float(log_p[city]), [*tour, city], cities[city : city + 1], h_next, c_next))
        found = sorted(new, key=lambda item: -item[0])[:beam]
    return torch.tensor([[item[0] for item in found]])


def hulls() -> list[Pair]:
    import scipy

    def one_by_one(points: Tensor) -> np.ndarray:
        n = points.shape[1]
        targets = np.full((len(points), n + 1), IGNORED)
        for row, cloud in enumerate(points.numpy()):
            corners = ConvexHull(cloud).vertices
            targets[row, : len(corners)] = np.roll(corners, -corners.argmin())
            targets[row, len(corners)] = n
        return targets

    found = []
    for n, count in ((5, 4000), (10, 4000), (50, 1000)):
        points = torch.rand(count, n, 2).double()
        found.append(
            Pair(
                f"convex hulls of {count} sets of {n} points",
                lambda points=points: convex_hull(points),  # type: ignore[misc]
                lambda points=points: one_by_one(points),  # type: ignore[misc]
                f"scipy {scipy.__version__} ConvexHull, one at a time",
                target=10.0,
                tolerance=0.0,
            )
        )
    return found


def tours() -> list[Pair]:
    try:
        from importlib.metadata import version

        from python_tsp.exact import solve_tsp_dynamic_programming
    except ImportError as error:
        raise PeerMissing("pip install --no-deps python-tsp") from error

    def one_by_one(points: Tensor) -> Tensor:
        lengths = [solve_tsp_dynamic_programming(torch.cdist(cities, cities).numpy())[1] for cities in points]
        return torch.tensor(lengths, dtype=torch.float64)

    found = []
    for n, count in ((5, 1000), (8, 100), (10, 20)):
        points = torch.rand(count, n, 2).double()
        found.append(
            Pair(
                f"optimal tours of {count} sets of {n} cities",
                lambda points=points: tour_length(points, tsp(points)),  # type: ignore[misc]
                lambda points=points: one_by_one(points),  # type: ignore[misc]
                f"python-tsp {version('python-tsp')} dynamic programming, one at a time",
                target=50.0,
                tolerance=1e-9,
            )
        )
    return found
